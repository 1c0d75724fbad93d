import pytest

from models.config import InputError
from pipelines.cluster.job_paths import check_paths, job_environment, local_path

TRACKING = {"MLFLOW_TRACKING_URI": "http://mlflow.internal:5000"}


@pytest.mark.parametrize(
    "command",
    [
        ["train", "tcl-tiny", "--out", "runs"],
        ["train", "tcl-tiny", "--out=./runs"],
        ["train", "tcl-tiny", "--train-data=~/pairs", "--out", "s3://bucket/runs"],
        ["train", "tcl-tiny", "--val_data", "val.parquet"],
        ["train", "tcl-tiny", "--init", "../other/package"],
        ["train", "tcl-tiny", "--encoder.vision.backbone", "./vit"],
        ["evaluate", "runs/first", "--data", "s3://bucket/test"],
        ["evaluate", "s3://bucket/runs/first", "--data", "s3://bucket/test", "--json", "scores.json"],
        ["data", "index", "pairs"],
    ],
)
def test_relative_paths_are_refused_wherever_the_cluster_is(command):
    for same_machine in (True, False):
        with pytest.raises(InputError, match=r"relative path.*throw-away copy"):
            check_paths(command, same_machine)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "tcl-tiny", "--train-data", "/data/train"],
        ["train", "tcl-tiny", "--out=file:///data/runs"],
        ["train", "tcl-tiny", "--encoder.text.tokenizer=/models/bert"],
        ["evaluate", "/data/runs/first"],
        ["data", "synth", "/data/pairs"],
    ],
)
def test_absolute_paths_are_for_a_cluster_on_the_same_machine(command):
    check_paths(command, same_machine=True)
    with pytest.raises(InputError, match=r"path of this machine.*s3://"):
        check_paths(command, same_machine=False)


def test_urls_models_hub_names_and_names_pass():
    tiny = ["train", "tcl-tiny", "--train-data", "s3://b/train", "--val-data=gs://b/val", "--out", "S3://b/runs"]
    check_paths(
        [*tiny, "--name", "first", "--encoder.text.backbone", "google-bert/bert-base-uncased", "--resume"], False
    )
    check_paths(["evaluate", "models:/pairs@champion", "--data", "s3://b/test"], False)
    check_paths(["--help"], False)


def test_a_path_is_told_from_a_url():
    assert local_path("s3://bucket/key") is None
    assert local_path("models:/pairs@champion") is None
    assert local_path("file:///data/a%20b") == "/data/a b"
    assert local_path("runs/first") == "runs/first"


@pytest.mark.parametrize("uri", ["sqlite:///mlflow.db", "sqlite:////data/mlflow.db", "file:///data/runs", "./mlruns"])
def test_tracking_files_are_refused_on_another_machine(uri):
    with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI.*tracking server"):
        job_environment(["train"], {"MLFLOW_TRACKING_URI": uri}, same_machine=False)


def test_tracking_files_on_this_machine_are_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("sqlite:////data/mlflow.db", "file:///data/runs"):
        assert job_environment(["train"], {"MLFLOW_TRACKING_URI": uri}, True) == {"MLFLOW_TRACKING_URI": uri}
    with pytest.raises(InputError, match="relative path"):
        job_environment(["train"], {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}, True)
    assert job_environment(["train"], {}, True) == {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db"}


def test_without_a_tracking_server_only_what_tracks_is_refused():
    for command in (["train", "tcl-tiny"], ["evaluate", "models:/pairs@champion"]):
        with pytest.raises(InputError, match=r"MLFLOW_TRACKING_URI is not set.*set it to"):
            job_environment(command, {}, same_machine=False)
    assert job_environment(["data", "stats", "s3://b/train"], {}, same_machine=False) == {}
    assert job_environment(["train", "--help"], {}, same_machine=False) == {}


def test_no_secret_travels_with_a_job():
    secrets = {
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SESSION_TOKEN": "t",
        "MLFLOW_TRACKING_PASSWORD": "p",
    }
    open_values = {
        "AWS_ENDPOINT_URL": "https://s3.internal",
        "AWS_REGION": "eu-west-1",
        "AWS_DEFAULT_REGION": "eu-west-1",
    }
    assert job_environment(["train"], secrets | open_values | TRACKING, False) == open_values | TRACKING
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        for value in ("https://me:hunter2@host:5000", "https://hunter2@host", "https://host/?access_token=hunter2"):
            with pytest.raises(InputError, match=f"{name} carries a user, password or key") as refusal:
                job_environment(["train"], {name: value}, same_machine=True)
            assert "hunter2" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["s3://AKIA:hunter2@bucket/x", "s3://AKIA:hun/ter2@bucket/x", "https://b.s3.host/x?X-Amz-Signature=hunter2"]
)
def test_no_secret_is_in_a_jobs_command(url):
    for command in (["data", "stats", url], ["train", "tcl-tiny", f"--out={url}"], ["train", "tcl-tiny", "--out", url]):
        with pytest.raises(InputError, match="carries a user, password or key, and Ray's dashboard shows") as refusal:
            check_paths(command, same_machine=True)
        assert "hunter2" not in str(refusal.value) and "ter2" not in str(refusal.value)


def test_addresses_without_a_secret_are_taken():
    for url in ("gs://anonymous@bucket/x", "s3://bucket/folder@2x/file?versionId=3", "models:/pairs@champion"):
        check_paths(["evaluate", "models:/pairs@champion", "--data", url], same_machine=False)
    database = {"MLFLOW_TRACKING_URI": "postgresql://host/db?sslmode=require"}
    assert job_environment(["train"], database, same_machine=False) == database


def test_addresses_of_this_machine_are_refused_on_another():
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL"):
        own = {name: "http://localhost:5000"}
        assert job_environment(["train"], TRACKING | own, True) == TRACKING | own
        with pytest.raises(InputError, match=f"{name}.*this machine's own address"):
            job_environment(["train"], TRACKING | own, False)
