import io
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.config import InputError
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data import lookup
from pipelines.data.lookup import read_image
from pipelines.data.manifest import build_manifest
from pipelines.data.reader import read_units
from tests.support.pairs import make_pairs, write_parquet_pairs, write_tar_pairs


def samples_of(folder):
    manifest = build_manifest(str(folder), PairsConfig())
    return read_units(manifest.units, PairsConfig())


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("folder", ["plain", "with # and ?", "a.tar#b", "a.parquet#row=3"])
def test_the_uri_of_every_sample_names_its_picture(write_pairs, tmp_path, kind, folder):
    write_pairs(20, kind, str(tmp_path / folder))
    samples = samples_of(tmp_path / folder)
    assert len(samples) == 20
    for sample in samples:
        assert read_image(sample.uri) == sample.image != b""


def test_on_object_storage(write_pairs, s3):
    for kind in ("parquet", "webdataset"):
        folder = write_pairs(5, kind, f"{s3.bucket()}/some")
        for sample in samples_of(folder):
            assert sample.uri.startswith("s3://") and read_image(sample.uri) == sample.image


def test_a_plain_path_or_url(tmp_path, s3):
    (tmp_path / "a#row=1.jpg").write_bytes(b"picture")
    assert read_image(str(tmp_path / "a#row=1.jpg")) == b"picture"
    bucket = s3.bucket()
    storage.write_bytes(f"{bucket}/b.png", b"other")
    assert read_image(f"{bucket}/b.png") == b"other"


def test_the_hugging_face_struct_and_another_column(tmp_path):
    rows = [{"photo": {"bytes": pair["image"], "path": None}, "caption": ""} for pair in make_pairs(3)]
    write_parquet_pairs(str(tmp_path / "0.parquet"), rows)
    for number, row in enumerate(rows):
        assert read_image(f"{tmp_path}/0.parquet#row={number}", "photo") == row["photo"]["bytes"]


def test_only_the_row_group_and_the_column_that_are_asked_for_are_read(tmp_path, monkeypatch):
    rows = [pair | {"noise": "x" * 1000} for pair in make_pairs(40)]
    write_parquet_pairs(str(tmp_path / "0.parquet"), rows, row_group_size=10)
    asked = []

    class Watched(pq.ParquetFile):
        def iter_batches(self, size, row_groups, columns):
            asked.append((row_groups, columns))
            return super().iter_batches(size, row_groups=row_groups, columns=columns)

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    assert read_image(f"{tmp_path}/0.parquet#row=25") == rows[25]["image"]
    assert asked == [([2], ["image"])]


def test_the_headers_of_a_tar_are_read_once(tmp_path, monkeypatch):
    write_tar_pairs(str(tmp_path / "0.tar"), make_pairs(5))
    lookup._members.cache_clear()
    opened, real = [], tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda *args, **options: opened.append(1) or real(*args, **options))
    for number in (3, 1, 3):
        assert read_image(f"{tmp_path}/0.tar#key{number}.jpg") == make_pairs(5)[number]["image"]
    assert len(opened) == 1


def test_a_tar_that_was_replaced_is_looked_at_again(tmp_path):
    write_tar_pairs(str(tmp_path / "0.tar"), make_pairs(2))
    read_image(f"{tmp_path}/0.tar#key1.jpg")
    later = make_pairs(9)[::-1]
    write_tar_pairs(str(tmp_path / "0.tar"), later)
    assert read_image(f"{tmp_path}/0.tar#key1.jpg") == later[-2]["image"]


def test_members_with_odd_names(tmp_path):
    names = ["./here/0.jpg", "long/" + "n" * 200 + ".png", "a#b.tar#c.jpg", "ü.jpg"]
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            archive.addfile(member, io.BytesIO(name.encode()))
    for name in names:
        assert read_image(f"{tmp_path}/0.tar#{name.removeprefix('./')}") == name.encode()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("0.parquet#row=40", "no such row; it has 3"),
        ("0.parquet#row=1", "no image in this row"),
        ("no.parquet#row=1", "no such path"),
        ("bad.parquet#row=0", "bad.parquet"),
        ("0.tar#key9.jpg", "no member key9.jpg"),
        ("bad.tar#key1.jpg", "not a readable tar"),
        ("no.tar#key1.jpg", "no such path"),
        ("no.jpg", "no such path"),
        ("other.parquet#row=0", "no column image of images"),
        ("http://example.com/a.jpg", "not a path that can be read"),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tmp_path, uri, words):
    pairs = make_pairs(3)
    pairs[1]["image"] = None
    write_parquet_pairs(str(tmp_path / "0.parquet"), pairs)
    write_tar_pairs(str(tmp_path / "0.tar"), make_pairs(2))
    pq.write_table(pa.table({"image": ["a string"]}), tmp_path / "other.parquet")
    for name in ("bad.parquet", "bad.tar"):
        (tmp_path / name).write_bytes(b"neither" * 200)
    with pytest.raises(InputError, match=words) as caught:
        read_image(uri if "://" in uri else f"{tmp_path}/{uri}")
    assert len(str(caught.value).splitlines()) == 1
