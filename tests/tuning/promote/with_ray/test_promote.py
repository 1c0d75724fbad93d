import pytest

from pipelines.evaluation.evaluate import evaluate_model
from pipelines.recall import mean_recall
from serving.service.smoke import served_vectors
from tests.support.promotion_cases import PAIRS
from tuning.promote.promote import promote

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


def test_with_ray_the_champion_is_evaluated_under_its_name(folder, registry, name, ray_local):
    done = promote(str(folder / "good"), name, smoke=served_vectors)
    assert "the service answers the same vectors within" in done.text()
    scores = evaluate_model(f"models:/{name}@champion", str(folder / "data"))
    assert mean_recall({f"val/{key}": value for key, value in scores.items()}) == 1 == mean_recall(done.metrics)
    assert scores["images"] == PAIRS
