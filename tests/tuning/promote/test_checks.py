"""What a candidate must pass, without a registry: recall that was not measured is never better or worse."""

import contextlib
import math
from pathlib import Path

import pytest

from models.config import InputError
from pipelines.tracking.registry import Version
from tuning.promote import checks
from tuning.promote.candidate import Candidate
from tuning.promote.promotion_record import Promotion

CHAMPION = Version("shapes", 3, "/champion", "", {})
IMAGE, TEXT = "val/image_retrieval_recall_at_1", "val/text_retrieval_recall_at_1"
COUNTS = {"val/images": 100.0, "val/captions": 100.0}
UNMEASURED = [{IMAGE: math.nan, TEXT: math.nan}, {IMAGE: 0.9, TEXT: math.nan}, {IMAGE: 0.9}, {}]


class Scores:
    """Held-out data on which the champion scores so; they never change."""

    data = "/data"

    def __init__(self, recalls):
        self._recalls = recalls

    def score(self, package, rerank_top=0):
        return COUNTS | self._recalls

    def check(self):
        pass


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    monkeypatch.setattr(checks, "registered_package", lambda version: contextlib.nullcontext(Path(version.source)))


def promotion_with(recalls):
    return Promotion("shapes", "/run", metrics=COUNTS | recalls)


@pytest.mark.parametrize("recalls", UNMEASURED)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_candidate_whose_recall_was_not_measured_never_wins(recalls, allowed):
    with pytest.raises(InputError, match=r"^the candidate's recall@1 could not be measured; look at the data"):
        checks.compare(promotion_with(recalls), CHAMPION, Scores({IMAGE: 0.1, TEXT: 0.1}), allowed)


@pytest.mark.parametrize("recalls", UNMEASURED)
def test_a_candidate_is_refused_as_soon_as_it_is_scored(recalls):
    candidate = Candidate("/run", "", None, {IMAGE: 0.5, TEXT: 0.5}, "", "", "")
    promotion = Promotion("shapes", "/run")
    with pytest.raises(InputError, match=r"^the candidate's recall@1 could not be measured"):
        checks.evaluate(promotion, candidate, Scores(recalls), given=True)
    assert [step.outcome for step in promotion.steps] == ["refused"]


@pytest.mark.parametrize("measured", UNMEASURED)
def test_what_the_run_did_not_measure_itself_is_not_told(measured):
    candidate, promotion = Candidate("/run", "", None, measured, "", "", ""), Promotion("shapes", "/run")
    checks.evaluate(promotion, candidate, Scores({IMAGE: 0.5, TEXT: 0.7}), given=True)
    assert promotion.steps[0].text.startswith("on /data; recall@1 mean 0.6000 +- ")
    assert "itself" not in promotion.steps[0].text


@pytest.mark.parametrize("recalls", UNMEASURED)
def test_a_champion_whose_recall_was_not_measured_is_replaced_only_if_allowed(recalls):
    promotion = promotion_with({IMAGE: 0.9, TEXT: 0.9})
    with pytest.raises(InputError, match=r"the champion cannot be scored .*; --allow-worse goes on without"):
        checks.compare(promotion, CHAMPION, Scores(recalls), False)
    checks.compare(promotion, CHAMPION, Scores(recalls), True)
    assert [step.outcome for step in promotion.steps] == ["refused", "done"]
