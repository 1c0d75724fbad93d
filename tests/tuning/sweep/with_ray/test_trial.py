"""Real trials: one that an alarm ends, and one that pauses, leaves and goes on."""

import json
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from pipelines.config import PRESETS
from pipelines.data.synthetic import synthesize
from pipelines.train import fit as training
from pipelines.train.alarms import COLLAPSE, Alarm, Alarms
from tests.support.sweep_cases import PAIRS, base_of, every_id, trained_ids
from tests.support.trial_cases import TEXT, FakeMailbox, trial_run
from tuning.sweep.schedulers import TIME
from tuning.sweep.sweep_record import METRIC


def in_a_thread(work: Callable[[], Any], seconds: float = 240) -> Any:
    """What `work` returns; raises queue.Empty where it takes longer."""
    answers: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=lambda: answers.put(work()), daemon=True).start()
    return answers.get(timeout=seconds)


@pytest.mark.slow
def test_a_trial_waits_at_its_holds_leaves_when_told_and_goes_on_without_training_a_sample_twice(
    ray_local, corpus, tmp_path
):
    from tuning.sweep.trial import TrialRun

    base = base_of(corpus, tmp_path, **{"optim.epochs": 4, "checkpoints.every": 1 / 9})
    run = f"{tmp_path}/sweep/trials/t00"

    def trial(mailbox: FakeMailbox, **task: object) -> TrialRun:
        made = TrialRun.__new__(TrialRun)  # as Tune's actor makes it, without the actor
        whole = {"trial_id": "t00", "overrides": {}, "seed": None, "until": 0, "undecided": None}
        made.setup({"task": whole | task}, base, (133, 399), mailbox)
        return made

    first, mailbox = trial(FakeMailbox(), undecided=(133, 0.25)), FakeMailbox()
    assert first.step() == {TIME: 133, METRIC: 0.25}, "what an earlier driver had not decided on"
    first._mailbox = mailbox
    held = in_a_thread(first.step)
    assert 133 <= held[TIME] < 133 + 32 and 0 <= held[METRIC] <= 1
    time.sleep(1)
    assert max(event["samples"] for event in mailbox.events) == held[TIME], "it waits"
    held = in_a_thread(first.step)
    assert 399 <= held[TIME] < 399 + 32
    first.cleanup()
    assert not first._thread.is_alive() and not Path(run, "metrics.json").exists()

    again = FakeMailbox()
    last = in_a_thread(trial(again).step)
    assert last["done"] and last["status"] == "finished" and last[TIME] == 4 * PAIRS
    steps = [[event["step"] for event in events if "step" in event] for events in (mailbox.events, again.events)]
    assert max(steps[0]) < min(steps[1])
    assert [event["kind"] for event in mailbox.events + again.events].count("ended") == 1
    assert again.events[-1]["metrics"] == json.loads(Path(run, "metrics.json").read_text())
    assert set(trained_ids(run)) == every_id(run, 4) and set(trained_ids(run).values()) == {1}
    assert not Path(run, "mlflow.json").exists()

    third = trial(FakeMailbox()).step()
    assert third["status"] == "finished" and third[TIME] == 4 * PAIRS, "a finished run is not trained again"


def test_a_collapse_ends_a_real_trial(ray_local, monkeypatch, tmp_path):
    """Its workers, in this process, see the alarm at every report; nothing else of the way is made up."""
    synthesize(str(tmp_path / "data"), pairs=100, image_size=32)
    paths = {"train_data": f"{tmp_path}/data/train", "val_data": f"{tmp_path}/data/val", "out": str(tmp_path / "out")}
    small = {"optim.batch_size": 32, "optim.min_samples": 0, "progress.every": 1, "objective.queue.size": 64}
    threads = {"compute.threads": 1, "validation.pairs": 50, "name": "sweep", "objective.codebook.size": 16}
    monkeypatch.setattr(training, "ScalingConfig", lambda **_: ray.train.ScalingConfig(num_workers=0))
    monkeypatch.setattr(Alarms, "check", lambda *_: [Alarm(COLLAPSE, 0.95, "alarm", TEXT)])
    mailbox = FakeMailbox()
    one = trial_run(PRESETS["both-dual-tiny"].override(paths | small | threads), mailbox)
    result = one.step()
    assert result["status"] == "pruned" and result["done"]
    assert mailbox.events[-1]["kind"] == "ended" and mailbox.events[-1]["reason"] == f"step 1: {TEXT}"
    assert [event["kind"] for event in mailbox.events] == ["startup", "step", "alarm", "ended"]
