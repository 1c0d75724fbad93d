"""What a tracking server holds, asked directly."""

from typing import Any


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    return sorted((metric.step, metric.value) for metric in MlflowClient(uri).get_metric_history(run_id, key))


def run_of(uri: str, run_id: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri).get_run(run_id)


def children(store: str, parent: str) -> dict[str, Any]:
    """{trial id: run} of all runs with this parent; fails where two are of one trial."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    runs = client.search_runs(
        [client.get_experiment_by_name("triptych").experiment_id], f"tags.mlflow.parentRunId = '{parent}'"
    )
    names = [run.data.tags["triptych.trial"] for run in runs]
    assert len(names) == len(set(names))
    return dict(zip(names, runs, strict=True))
