"""Which run is promoted: the best sound trial of a sweep, and only what finished."""

import json

import pytest

from pipelines.config import PRESETS
from pipelines.tracking.registry import CHAMPION
from tests.support.promotion_cases import (
    PAIRS,
    make_run,
    refused,
    state,
)
from tuning.promote.promote import promote
from tuning.sweep.sweep_record import Protocol, Sweep, Trial

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_that_failed_is_refused_though_it_has_a_package(folder, registry, standing, tmp_path, status):
    make_run(tmp_path / "run", str(folder / "data"), PAIRS, status)
    refused(tmp_path / "run", standing, f"at read: .*did not finish, MLflow has it as {status}")
    assert state(registry, standing) == ({CHAMPION: 1}, [1])


def write_sweep(folder, trials):
    """A sweep whose trials t0, t1, ... are runs that are there, changed as given."""
    sweep = Sweep(
        name=folder.name,
        preset="clip-tiny",
        base=PRESETS["clip-tiny"],
        space={},
        search="grid",
        scheduler="none",
        trials_planned=len(trials),
        protocol=Protocol(val_data="", val_manifest="", pairs=PAIRS),
    )
    for number, (run, change) in enumerate(trials):
        place = folder / "trials" / f"t{number}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(run)
        fields = {"trial_id": place.name, "status": "finished", "run_folder": f"trials/{place.name}"}
        fields["mlflow_run_id"] = json.loads((run / "mlflow.json").read_text())["run_id"]
        fields["metrics"] = json.loads((run / "metrics.json").read_text())
        sweep.trials.append(Trial(**fields | change))
    sweep.save(str(folder))
    return str(folder)


def metrics_of(recall):
    return {"val/image_retrieval_recall_at_1": recall, "val/text_retrieval_recall_at_1": recall}


def again(recall):
    return [{"seed": 1, "metrics": metrics_of(recall), "samples_seen": 1}]


COLLAPSED = {"alarms": ["codebook/collapse 0.93 is above 0.9: pairs agree because few codes are in use"]}


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        (({}, {}, {}), "t2"),
        (({}, {}, {"status": "pruned"}), "t1"),
        (({}, {}, COLLAPSED), "t1"),
        (({}, {}, {"alarms": ["codebook/dead 0.6 is above 0.5: codes"]}), "t2"),
        (({}, {}, {"alarms": ["repeat with seed 1 pruned: step 9: codebook/collapse 0.95 is above 0.9"]}), "t2"),
        (({}, {"repeats": again(0.5)}, {}), "t1"),
        (({}, {}, {"metrics": {}}), "t1"),
        (({}, {"repeats": again(0.9)}, {"repeats": again(0.1)}), "t1"),
    ],
)
def test_of_a_sweep_the_best_sound_finished_trial_is_taken(folder, registry, name, tmp_path, changes, chosen):
    runs = [folder / run for run in ("poor", "fair", "good")]
    sweep = write_sweep(tmp_path / "sweep", list(zip(runs, changes, strict=True)))
    done = promote(sweep, name)
    assert f"trial {chosen}" in done.text() and done.run_folder == f"{sweep}/trials/{chosen}"
    assert registry.by_alias(name, CHAMPION).run_id


@pytest.mark.parametrize(("change", "hint"), [({"status": "pruned"}, "none finished"), (COLLAPSED, "collapsed")])
def test_a_sweep_without_a_sound_finished_trial_is_refused(folder, standing, tmp_path, change, hint):
    refused(write_sweep(tmp_path / "sweep", [(folder / "good", change)]), standing, f"at read: .*of 1 .*{hint}")
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    refused(tmp_path / "sweep", standing, "damaged")
