import io
import logging
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data import parquet, reader
from pipelines.data.manifest import build_manifest, captions_of
from pipelines.data.reader import read_units
from tests.support.pairs import jpeg, make_pairs, write_parquet_pairs, write_tar_pairs

PAIRS = PairsConfig()


def read_all(manifest, pairs=PAIRS):
    return read_units(manifest.units, pairs)


def tar_of(members, **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
                archive.addfile(info)
            else:
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_hugging_face_structs_lists_and_ids_are_read(tmp_path):
    rows = [
        {"image": {"bytes": jpeg(1), "path": "a.jpg"}, "caption": ["One.", "Two."], "id": 11, "image_id": 5},
        {"image": {"bytes": None, "path": "b.jpg"}, "caption": ["Three."], "id": 12, "image_id": 6},
        {"image": None, "caption": [], "id": None, "image_id": None},
        {"image": {"bytes": b"", "path": None}, "caption": None, "id": 14, "image_id": 7},
    ]
    file = write_parquet_pairs(str(tmp_path / "a.parquet"), rows)
    first, second, third, fourth = read_all(build_manifest(file, PAIRS))
    assert (first.image, first.captions, first.id, first.image_id) == (jpeg(1), ("One.", "Two."), "11", "5")
    assert (second.reason, second.detail) == ("missing_member", "no image")
    assert (third.reason, third.detail, third.id) == ("missing_member", "no image and caption", "2-0")
    assert (fourth.reason, fourth.detail) == ("missing_member", "no caption")


def test_a_row_group_is_read_once_for_all_its_units(write_pairs, monkeypatch):
    folder = write_pairs(300)  # one row group, as pandas writes it
    assert pq.ParquetFile(f"{folder}/0.parquet").num_row_groups == 1
    manifest = build_manifest(folder, PAIRS)
    decoded = []

    class Counting(pq.ParquetFile):
        def iter_batches(self, size, row_groups, columns):
            for batch in super().iter_batches(50, row_groups=row_groups, columns=columns):
                decoded.append(len(batch))
                yield batch

    monkeypatch.setattr(parquet.pq, "ParquetFile", Counting)
    chosen = [manifest.units[number] for number in (40, 3, 22, 9)]
    samples = read_units(chosen, PAIRS)
    assert [s.unit for s in samples] == [u.unit for u in chosen for _ in range(u.count)]
    last = max(unit.first + unit.count for unit in chosen)
    assert sum(decoded) == -(-last // 50) * 50 < 300  # up to the last row needed, and no row twice


def test_tars_are_read_by_byte_range(write_pairs, monkeypatch):
    manifest = build_manifest(write_pairs(200, "webdataset"), PAIRS)
    read = []
    real = storage.read_bytes
    monkeypatch.setattr(
        storage, "read_bytes", lambda uri, at=0, size=None: read.append((at, size)) or real(uri, at, size)
    )
    chosen = [manifest.units[number] for number in (30, 5)]
    samples = read_units(chosen, PAIRS)
    assert sorted(read) == sorted((unit.offset, unit.length) for unit in chosen)
    assert [s.id for s in samples] == [f"key{u.first + i}" for u in chosen for i in range(u.count)]


def test_large_row_groups_are_streamed_and_warned_of(write_pairs, monkeypatch, caplog):
    monkeypatch.setattr(parquet, "_LARGE", 1000)
    folder = write_pairs(60)
    with caplog.at_level(logging.WARNING):
        manifest = build_manifest(folder, PAIRS)
    assert "row groups of at most 1000 rows" in caplog.text
    assert [s.id for s in read_units(manifest.units[7:9], PAIRS)] == ["key7", "key8"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_members_become_samples(tmp_path, form):
    long = "a-folder/" + "long" * 40
    members = [
        ("./one.jpg", jpeg(1)),
        ("./one.txt", "Ein Bär".encode()),
        ("folder", None),
        ("folder/two.seg.png", b"not the image"),
        ("folder/two.PNG", jpeg(2)),
        ("folder/two.json", b'{"caption": ["A", "B", 3], "image_id": 8}'),
        ("three.webp", jpeg(3)),
        ("four.txt", b"alone"),
        ("five.cls", b"0"),
        ("._six.jpg", b"mac rubbish"),
        ("six.jpeg", jpeg(6)),
        ("six.json", b"{not json"),
        ("seven.jpg", jpeg(7)),
        ("seven.json", b'{"text": "no caption key"}'),
        ("eight.jpg", jpeg(8)),
        ("eight.json", b'{"caption": "from json \\ud800", "image_id": "x"}'),
        ("eight.txt", b"from text"),
    ]
    if form != tarfile.USTAR_FORMAT:
        members += [(f"{long}.jpg", jpeg(9)), (f"{long}.txt", b"long name")]
    (tmp_path / "a.tar").write_bytes(tar_of(members, format=form))
    manifest = build_manifest(str(tmp_path), PAIRS)
    samples = {s.id: s for s in read_all(manifest)}
    assert len(samples) == manifest.count == 8 + (form != tarfile.USTAR_FORMAT)
    assert samples["one"].captions == ("Ein Bär",) and samples["one"].uri.endswith("a.tar#one.jpg")
    two = samples["folder/two"]
    assert (two.image, two.captions, two.image_id, two.reason) == (jpeg(2), ("A", "B"), "8", "")
    reasons = {key: (s.reason, s.detail) for key, s in samples.items() if s.reason}
    assert reasons == {
        "three": ("missing_member", "no caption"),
        "four": ("missing_member", "no image"),
        "five": ("missing_member", "no image and no caption"),
        "six": ("unreadable", reasons["six"][1]),
        "seven": ("missing_member", "no caption"),
    }
    assert reasons["six"][1].startswith("caption is not JSON")
    assert (samples["eight"].captions, samples["eight"].image_id) == (("from text",), "x")
    if form != tarfile.USTAR_FORMAT:
        assert samples[long].captions == ("long name",) and samples[long].image == jpeg(9)


def test_pandas_like_and_tar_pairs_have_the_same_content(tmp_path):
    pairs = [pair | {"caption": ["first", "second"]} for pair in make_pairs(3)]
    table = read_all(build_manifest(write_parquet_pairs(str(tmp_path / "a.parquet"), pairs), PAIRS))
    archive = read_all(build_manifest(write_tar_pairs(str(tmp_path / "a.tar"), pairs), PAIRS))
    assert [(s.id, s.image, s.captions) for s in table] == [(s.id, s.image, s.captions) for s in archive]


def test_damaged_files_are_rows_with_reasons(tmp_path):
    good = write_parquet_pairs(str(tmp_path / "a.parquet"), make_pairs(50))
    data = Path(good).read_bytes()
    (tmp_path / "b.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "c.parquet").write_bytes(b"")
    whole = Path(write_tar_pairs(str(tmp_path / "x.tar"), make_pairs(50))).read_bytes()
    (tmp_path / "d.tar").write_bytes(whole[: len(whole) // 2 + 700])
    (tmp_path / "e.tar").write_bytes(b"<html>" * 500)
    (tmp_path / "f.tar").write_bytes(b"")
    middle = bytearray(whole)
    for place in range(len(whole) // 2 // 512 * 512, len(whole), 512):
        middle[place : place + 512] = b"\xff" * 512
    (tmp_path / "g.tar").write_bytes(bytes(middle))
    manifest = build_manifest(str(tmp_path), PAIRS)
    samples = read_all(manifest)
    assert len(samples) == manifest.count

    def of(name):
        return [s for s in samples if f"/{name}#" in s.uri]

    assert len(of("a.parquet")) == len(of("x.tar")) == 50
    assert not any(s.reason for s in of("a.parquet") + of("x.tar"))
    for name in ("b.parquet", "c.parquet", "e.tar", "f.tar"):
        (row,) = of(name)
        assert row.reason == "unreadable" and ("Parquet" in row.detail or "tar" in row.detail), row
    for name in ("d.tar", "g.tar"):
        rows = of(name)
        assert 20 < len(rows) < 50 and [s.reason for s in rows[:20]] == [""] * 20
        assert rows[-1].reason == "unreadable" and "tar is damaged or not a tar from byte" in rows[-1].detail


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_damage_after_indexing_is_rows_with_reasons(kind, write_pairs):
    folder = write_pairs(40, kind)
    manifest = build_manifest(folder, PAIRS)
    file = Path(manifest.units[0].uri)
    data = bytearray(file.read_bytes())
    data[len(data) // 4 : len(data) // 2] = b"\xff" * (len(data) // 2 - len(data) // 4)
    file.write_bytes(data)
    samples = read_all(manifest)
    assert [(s.unit, s.ordinal) for s in samples] == [(u.unit, i) for u in manifest.units for i in range(u.count)]
    if kind == "webdataset":
        assert 5 <= sum(s.reason == "unreadable" for s in samples) < 30 and not samples[0].reason


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_files_that_are_gone_or_changed_are_fetch_failed(kind, write_pairs):
    manifest = build_manifest(write_pairs(10, kind), PAIRS)
    file = Path(manifest.units[0].uri)
    file.write_bytes(file.read_bytes() + b"more")
    samples = read_all(manifest)
    assert {s.reason for s in samples} == {"fetch_failed"} and len(samples) == 10
    assert "when it was indexed; index the data again" in samples[0].detail
    file.unlink()
    samples = read_all(manifest)
    assert {s.reason for s in samples} == {"fetch_failed"} and "no such path" in samples[0].detail
    assert samples[3].uri.startswith(f"{file}#")


def test_a_store_that_is_down_is_asked_again_and_then_raises(write_pairs, monkeypatch):
    manifest = build_manifest(write_pairs(10), PAIRS)
    real, calls = storage.open_input, []

    def flaky(uri):
        calls.append(uri)
        if len(calls) <= failures:
            raise storage.Unavailable("down")
        return real(uri)

    monkeypatch.setattr(storage, "open_input", flaky)
    monkeypatch.setattr(reader.time, "sleep", lambda seconds: None)
    failures = 2
    assert [s.reason for s in read_units(manifest.units[:1], PAIRS)] == [""]
    calls.clear()
    failures = 100
    with pytest.raises(storage.Unavailable):
        read_units(manifest.units[:1], PAIRS)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_captions_come_without_the_images(kind, write_pairs, monkeypatch):
    folder = write_pairs(130, kind)
    manifest = build_manifest(folder, PAIRS)
    wanted = [f"Picture number {i}, of noise." for i in range(130)]
    assert list(captions_of(manifest, PAIRS, 1000)) == wanted
    some = list(captions_of(manifest, PAIRS, 20))
    assert len(some) == 20 and set(some) <= set(wanted) and some == list(captions_of(manifest, PAIRS, 20))
    assert int(some[-1].split()[2].strip(",")) > 80  # spread over the whole set
    Path(manifest.units[0].uri).unlink()
    assert list(captions_of(manifest, PAIRS, 20)) == []
