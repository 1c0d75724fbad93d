import ray

from pipelines.config import PRESETS
from pipelines.data.synthetic import synthesize
from pipelines.train import fit as training
from pipelines.train.alarms import COLLAPSE, Alarm, Alarms
from tests.support.trial_cases import TEXT, Post, run_of


def test_a_collapse_ends_a_real_trial(ray_local, monkeypatch, tmp_path):
    """Its workers, in this process, see the alarm at every report; nothing else of the way is made up."""
    synthesize(str(tmp_path / "data"), pairs=100, image_size=32)
    paths = {"train_data": f"{tmp_path}/data/train", "val_data": f"{tmp_path}/data/val", "out": str(tmp_path / "out")}
    small = {"optim.batch_size": 32, "optim.min_samples": 0, "progress.every": 1, "objective.queue.size": 64}
    threads = {"compute.threads": 1, "validation.pairs": 50, "name": "sweep", "objective.codebook.size": 16}
    monkeypatch.setattr(training, "ScalingConfig", lambda **_: ray.train.ScalingConfig(num_workers=0))
    monkeypatch.setattr(Alarms, "check", lambda *_: [Alarm(COLLAPSE, 0.95, "alarm", TEXT)])
    post = Post()
    one = run_of(PRESETS["both-dual-tiny"].override(paths | small | threads), post)
    result = one.step()
    assert result["status"] == "pruned" and result["done"]
    assert post.events[-1]["kind"] == "ended" and post.events[-1]["reason"] == f"step 1: {TEXT}"
    assert [event["kind"] for event in post.events] == ["startup", "step", "alarm", "ended"]
