import os
import socket

import pytest

from models.config import InputError
from pipelines import storage


@pytest.fixture(params=["local", "s3"])
def root(request, tmp_path):
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3").bucket()


def test_bytes_come_back_whole_and_in_ranges(root):
    uri = storage.join(root, "a folder", "file+1.bin")
    storage.write_bytes(uri, b"0123456789")
    assert storage.read_bytes(uri) == b"0123456789"
    assert storage.read_bytes(uri, 3, 4) == b"3456"
    assert storage.read_bytes(uri, 8, 100) == b"89"
    assert storage.read_bytes(uri, 20) == b""
    assert storage.exists(uri) and storage.exists(storage.join(root, "a folder"))
    assert not storage.exists(storage.join(root, "other"))
    with storage.open_input(uri) as file:
        file.seek(5)
        assert file.read(2) == b"56"


def test_listings_are_sorted_by_name_and_leave_hidden_names_out(root):
    names = ["b.tar", "a/2.tar", "a/10.tar", "a.tar", "_index", ".hidden", "_folder/x.tar", "a/.part", "ab/c d.tar"]
    for name in names:
        storage.write_bytes(storage.join(root, "data", name), name.encode())
    storage.write_bytes(storage.join(root, "database", "x.tar"), b"a neighbour whose name begins alike")
    found = storage.listing(storage.join(root, "data"))
    below = storage.join(root, "data") + "/"
    assert [info.uri.removeprefix(below) for info in found] == ["a.tar", "a/10.tar", "a/2.tar", "ab/c d.tar", "b.tar"]
    assert [info.size for info in found] == [5, 8, 7, 10, 5]
    assert storage.listing(storage.join(root, "data") + "/") == found
    one = storage.listing(storage.join(root, "data", "b.tar"))
    assert [info.uri for info in one] == [below + "b.tar"] and one[0] == found[-1]
    assert storage.read_bytes(found[3].uri) == b"ab/c d.tar"


def test_etags_change_with_the_content(root):
    uri = storage.join(root, "data", "file")
    storage.write_bytes(uri, b"one")
    before = storage.listing(uri)[0]
    assert storage.listing(uri)[0] == before
    storage.write_bytes(uri, b"two")
    if storage.is_local(uri):
        os.utime(uri, ns=(1, 1))  # whatever the clock's resolution
    assert storage.listing(uri)[0].etag != before.etag


def test_folders_go_up_and_down(root, tmp_path):
    source, back = tmp_path / "source", tmp_path / "back"
    for name in ("one", "sub/two"):
        storage.write_bytes(str(source / name), name.encode())
    storage.upload(str(source), storage.join(root, "copy"))
    storage.download(storage.join(root, "copy"), str(back))
    assert (back / "one").read_bytes() == b"one" and (back / "sub" / "two").read_bytes() == b"sub/two"


def test_what_is_not_there_is_one_line(root):
    missing = storage.join(root, "nothing", "here")
    for act in (storage.read_bytes, storage.listing, lambda uri: storage.download(uri, "x")):
        with pytest.raises(InputError, match="no such path") as caught:
            act(missing)
        assert missing in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_with_nothing_to_list_is_empty(root):
    storage.write_bytes(storage.join(root, "data", "_only"), b"x")
    assert storage.listing(storage.join(root, "data")) == []


def test_s3_folder_keys_are_no_files(s3):
    import boto3

    bucket = s3.bucket()
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key="data/", Body=b"")
    storage.write_bytes(f"{bucket}/data/a.tar", b"x")
    assert [info.uri for info in storage.listing(f"{bucket}/data")] == [f"{bucket}/data/a.tar"]
    assert [info.uri for info in storage.listing(bucket)] == [f"{bucket}/data/a.tar"]


def test_missing_buckets_are_named(s3):
    for act in (storage.listing, storage.read_bytes, lambda uri: storage.write_bytes(uri, b"x")):
        with pytest.raises(InputError, match=r"s3://no-such-bucket/data: no such (bucket|path)") as caught:
            act("s3://no-such-bucket/data")
        assert "\n" not in str(caught.value) and "testing" not in str(caught.value)


def test_refused_requests_are_about_permission(s3):
    bucket = s3.bucket()
    storage.write_bytes(f"{bucket}/data/a.tar", b"x")
    s3.require_signatures(True)
    try:
        for act in (storage.listing, storage.read_bytes, lambda uri: storage.write_bytes(uri, b"x")):
            with pytest.raises(InputError, match="no permission; check the credentials") as caught:
                act(f"{bucket}/data/a.tar")
            assert "testing" not in str(caught.value) and not isinstance(caught.value, storage.Unavailable)
    finally:
        s3.require_signatures(False)


def test_a_server_that_is_gone_may_come_back(s3, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(storage.Unavailable, match="s3://gone/data: the store cannot be reached"):
        storage.listing("s3://gone/data")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[Errno 13] Failed to open local file. Detail: [errno 13] Permission denied", "no permission"),
        ("When reading: AWS Error ACCESS_DENIED during GetObject operation", "no permission"),
        ("AWS Error UNKNOWN (HTTP status 403) during HeadObject operation", "no permission"),
        ("AWS Error NO_SUCH_BUCKET during ListObjectsV2", "no such bucket"),
        ("[Errno 28] No space left on device", "no space left"),
    ],
)
def test_errors_say_what_is_wrong(text, expected):
    error = storage.explain("s3://bucket/key", OSError(text))
    assert str(error).startswith(f"s3://bucket/key: {expected}") and not isinstance(error, storage.Unavailable)


def test_secrets_never_show():
    error = storage.explain("s3://key:secret@bucket/x?session_token=secret", OSError("odd"))
    assert "secret" not in str(error)
    with pytest.raises(InputError, match=r"ftp://\*\*\*@host/x: not a path that can be read") as caught:
        storage.open_input("ftp://user:secret@host/x")
    assert "secret" not in str(caught.value)


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file stands where a folder should be"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")
    with pytest.raises(InputError, match="is a folder"):
        storage.read_bytes(str(tmp_path))


def test_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.make_absolute("a/b") == str(tmp_path / "a" / "b")
    assert storage.make_absolute("s3://b/k") == "s3://b/k"
    assert storage.join("s3://b/k/", "x", "y") == "s3://b/k/x/y" and storage.join("/", "x") == "/x"
    storage.write_bytes("a/b", b"x")
    assert storage.read_bytes(f"file://{tmp_path}/a/b") == b"x"


def test_a_reader_never_sees_half_a_file(tmp_path, monkeypatch):
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("pulled plug")))
    with pytest.raises(InputError, match="pulled plug"):
        storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"old" and len(storage.listing(str(tmp_path))) == 1
