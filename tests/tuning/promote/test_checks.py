"""Checks of a candidate: files, vectors, recall, the service, and the comparison with the champion."""

import contextlib
import math
import shutil
from math import sqrt
from pathlib import Path

import pytest
import torch

from models.config import InputError
from models.package import health_vectors, load_package, load_tensors, save_tensors, write_files_json
from pipelines.tracking.registry import CHAMPION, PREVIOUS, Version
from tests.support.promotion_cases import (
    evaluate_directly,
    make_run,
    nothing_held,
    recall_of,
    refused,
    state,
    write_data,
)
from tuning.promote import checks
from tuning.promote.candidate import Candidate
from tuning.promote.checks import standard_error
from tuning.promote.promote import promote
from tuning.promote.promotion_record import Promotion

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:mlflow.*", "ignore::DeprecationWarning:sqlalchemy.*"
)


def test_a_worse_one_is_refused_unless_allowed_and_an_equal_one_is_fine(folder, registry, name):
    promote(str(folder / "fair"), name)
    difference = recall_of(folder / "poor") - recall_of(folder / "fair")
    record = refused(folder / "poor", name, rf"at compare: worse than the champion.* {difference:.4f} \+- ")
    assert record.version is None and record.steps[-1].outcome == "refused"
    assert state(registry, name) == ({CHAMPION: 1}, [1])
    assert "the same vectors" in promote(str(folder / "fair"), name).text()
    assert state(registry, name) == ({CHAMPION: 2, PREVIOUS: 1}, [1, 2])
    assert promote(str(folder / "poor"), name, allow_worse=True).version == 3
    assert registry.aliases(name) == {CHAMPION: 3, PREVIOUS: 2}


def test_the_standard_error_is_that_of_queries_drawn_at_random():
    image, text, captions, images = 0.3, 0.6, 50, 20
    generator = torch.Generator().manual_seed(0)
    draws = [
        (torch.rand(200_000, n, generator=generator) < p).double().mean(1)
        for p, n in ((image, captions), (text, images))
    ]
    metrics = {"val/image_retrieval_recall_at_1": image, "val/text_retrieval_recall_at_1": text}
    metrics |= {"val/captions": captions, "val/images": images}
    assert standard_error(metrics) == pytest.approx(float(((draws[0] + draws[1]) / 2).std()), rel=0.01)
    assert standard_error(metrics) == pytest.approx(sqrt(0.21 / 50 + 0.24 / 20) / 2)


def test_a_champion_that_cannot_be_scored_is_replaced_only_if_allowed(folder, registry, name, tmp_path):
    make_run(tmp_path / "lost", str(folder / "data"), 3, seed=1)
    promote(str(tmp_path / "lost"), name)
    (Path(registry.version(name, 1).source) / "model.safetensors").write_bytes(b"x")
    refused(folder / "good", name, "the champion cannot be scored .*--allow-worse")
    assert state(registry, name) == ({CHAMPION: 1}, [1])
    assert promote(str(folder / "good"), name, allow_worse=True).replaces == 1


def test_data_that_change_between_the_two_scores_are_noticed(folder, registry, name, monkeypatch, tmp_path):
    data = write_data(tmp_path / "data")
    promote(str(folder / "poor"), name, data=data)
    scored = []

    def evaluate_and_change(*arguments):
        scores = evaluate_directly(*arguments)
        scored.append(scores)
        if len(scored) == 3:  # the champion
            write_data(tmp_path / "data" / "more")
        return scores

    monkeypatch.setattr(checks, "evaluate_package", evaluate_and_change)
    refused(folder / "good", name, "the data changed meanwhile", data=data)
    assert registry.aliases(name) == {CHAMPION: 1}


def other_vectors(run):
    stored = load_tensors(run / "package" / "health.safetensors")
    stored["text_vectors"][1, 2] += 2e-5
    save_tensors(stored, run / "package" / "health.safetensors")
    write_files_json(run / "package")


def other_weights(run):
    weights = load_tensors(run / "package" / "model.safetensors")
    weights["image_projection.bias"] += 0.01
    save_tensors(weights, run / "package" / "model.safetensors")
    write_files_json(run / "package")


def cut_weights(run):
    weights = run / "package" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("spoil", "hint"),
    [
        (other_vectors, "at verify: .*text_vectors differ by 2.*e-05"),
        (other_weights, "was changed after it was written"),
        (cut_weights, "was changed|cannot be read|damaged"),
        (lambda run: (run / "package" / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda run: (run / "package" / "README.md").unlink(), "at verify: .*README.md is missing or damaged; train"),
        (lambda run: (run / "package" / "files.json").unlink(), "left no package"),
        (lambda run: (run / "metrics.json").unlink(), "left no package with metrics"),
        (lambda run: (run / "config.json").unlink(), "neither a run folder nor a sweep folder"),
    ],
)
def test_a_package_that_is_not_what_was_trained_is_refused(folder, registry, standing, tmp_path, spoil, hint):
    run = shutil.copytree(folder / "good", tmp_path / "run")
    spoil(run)
    refused(run, standing, hint)
    assert state(registry, standing) == ({CHAMPION: 1}, [1]) and nothing_held(registry, standing)


def test_a_reloaded_package_with_another_recall_is_refused(folder, registry, name, monkeypatch):
    scores = []

    def unsteady(*arguments):
        scores.append(evaluate_directly(*arguments))
        return scores[-1] | {"image_retrieval_recall_at_5": 0.5 + 1e-5 * len(scores)}

    monkeypatch.setattr(checks, "evaluate_package", unsteady)
    refused(folder / "good", name, "at verify: the reloaded package gives val/image_retrieval_recall_at_5 0.500020")
    assert state(registry, name) == ({}, [])


def test_a_service_that_answers_other_vectors_stops_it(folder, registry, name):
    def honest(package):
        return health_vectors(load_package(package))[:2]

    def wrong(package):
        image, text = honest(package)
        return image, text.flip(0)

    refused(folder / "good", name, "at served: the service's vectors differ", smoke=wrong)
    assert state(registry, name) == ({}, [])
    assert "answers the same vectors" in promote(str(folder / "good"), name, smoke=honest).text()


STANDING = Version("shapes", 3, "/champion", "", {})

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


@pytest.fixture
def packages(monkeypatch):
    monkeypatch.setattr(checks, "registered_package", lambda version: contextlib.nullcontext(Path(version.source)))


def promotion_with(recalls):
    return Promotion("shapes", "/run", metrics=COUNTS | recalls)


@pytest.mark.parametrize("recalls", UNMEASURED)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_candidate_whose_recall_was_not_measured_never_wins(packages, recalls, allowed):
    with pytest.raises(InputError, match=r"^the candidate's recall@1 could not be measured; look at the data"):
        checks.compare(promotion_with(recalls), STANDING, Scores({IMAGE: 0.1, TEXT: 0.1}), allowed)


@pytest.mark.parametrize("recalls", UNMEASURED)
def test_a_candidate_is_refused_as_soon_as_it_is_scored(recalls):
    candidate = Candidate("/run", "", None, {IMAGE: 0.5, TEXT: 0.5}, "", "", "")
    promotion = Promotion("shapes", "/run")
    with pytest.raises(InputError, match=r"^the candidate's recall@1 could not be measured"):
        checks.evaluate(promotion, candidate, Scores(recalls), given=True)
    assert [step.outcome for step in promotion.steps] == ["refused"]


@pytest.mark.parametrize("measured", UNMEASURED)
def test_what_the_run_did_not_measure_itself_is_not_noted(measured):
    candidate, promotion = Candidate("/run", "", None, measured, "", "", ""), Promotion("shapes", "/run")
    checks.evaluate(promotion, candidate, Scores({IMAGE: 0.5, TEXT: 0.7}), given=True)
    assert promotion.steps[0].text.startswith("on /data; recall@1 mean 0.6000 +- ")
    assert "itself" not in promotion.steps[0].text


@pytest.mark.parametrize("recalls", UNMEASURED)
def test_a_champion_whose_recall_was_not_measured_is_replaced_only_if_allowed(packages, recalls):
    promotion = promotion_with({IMAGE: 0.9, TEXT: 0.9})
    with pytest.raises(InputError, match=r"the champion cannot be scored .*; --allow-worse goes on without"):
        checks.compare(promotion, STANDING, Scores(recalls), False)
    checks.compare(promotion, STANDING, Scores(recalls), True)
    assert [step.outcome for step in promotion.steps] == ["refused", "done"]
