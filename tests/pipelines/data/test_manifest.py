import io
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.config import InputError
from pipelines import storage
from pipelines.config import PairsConfig
from pipelines.data import manifest as module
from pipelines.data.manifest import FILE_NAME, Manifest, build_manifest
from pipelines.data.reader import read_units
from pipelines.data.sample import Unit
from tests.support.pairs import jpeg, make_pairs, write_parquet_pairs

PAIRS = PairsConfig()


def read_all(manifest, pairs=PAIRS):
    return read_units(manifest.units, pairs)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_all_samples_come_back_in_the_files_order(kind, write_pairs):
    manifest = build_manifest(write_pairs(150, kind), PAIRS)
    samples = read_all(manifest)
    assert manifest.count == 150 and [sample.id for sample in samples] == [f"key{i}" for i in range(150)]
    assert [(s.unit, s.ordinal) for s in samples] == [(u.unit, i) for u in manifest.units for i in range(u.count)]
    assert not any(sample.reason for sample in samples)
    assert samples[77].image == jpeg(77) and samples[77].captions == ("Picture number 77, of noise.",)
    ending = "#row=77" if kind == "parquet" else "#key77.jpg"
    assert samples[77].uri == manifest.units[0].uri + ending
    backwards = read_units(manifest.units[::-1], PAIRS)
    assert sorted(backwards) == sorted(samples) and backwards[0].unit == manifest.units[-1].unit


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_units_keep_their_limits(kind, write_pairs, monkeypatch):
    folder = write_pairs(150, kind)
    manifest = build_manifest(folder, PAIRS)
    assert [unit.unit for unit in manifest.units] == list(range(len(manifest.units)))
    assert len(manifest.units) >= 50 and {unit.count for unit in manifest.units} <= {2, 3}  # ceil(150 / 64) = 3
    monkeypatch.setattr(module, "LEAST_UNITS", 1)
    assert [unit.count for unit in build_manifest(folder, PAIRS).units] == [150]
    monkeypatch.setattr(module, "MOST_SAMPLES", 40)
    assert {unit.count for unit in build_manifest(folder, PAIRS).units} <= {36, 37, 38, 39, 40}
    monkeypatch.setattr(module, "MOST_BYTES", 10_000)
    small = build_manifest(folder, PAIRS)
    assert max(unit.length for unit in small.units) <= 10_000 and small.count == 150
    assert len({s.id for s in read_all(small)}) == 150


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_sample_ids_are_the_same_on_s3(kind, write_pairs, s3):
    here, there = write_pairs(70, kind), f"{s3.bucket()}/some where"
    storage.upload(here, there)
    local, remote = build_manifest(here, PAIRS), build_manifest(there, PAIRS)
    assert remote.units[0].uri.startswith(there) and local.hash != remote.hash
    rows = [[(s.unit, s.ordinal, s.id, s.image, s.captions) for s in read_all(m)] for m in (local, remote)]
    assert rows[0] == rows[1] and len(rows[0]) == 70


def test_manifests_survive_a_file(write_pairs, tmp_path):
    manifest = build_manifest(write_pairs(20), PAIRS)
    manifest.save(str(tmp_path / "m.parquet"))
    loaded = Manifest.load(str(tmp_path / "m.parquet"))
    assert loaded == manifest and loaded.hash == manifest.hash
    assert pickle.loads(pickle.dumps(manifest)).hash == manifest.hash
    table = pq.read_table(tmp_path / "m.parquet")
    assert table.num_rows == len(manifest.units) and table.column("uri")[0].as_py() == manifest.units[0].uri
    (tmp_path / "m.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(InputError, match="not a manifest"):
        Manifest.load(str(tmp_path / "m.parquet"))
    pq.write_table(table.slice(1), tmp_path / "m.parquet")
    with pytest.raises(InputError, match="the manifest is damaged"):
        Manifest.load(str(tmp_path / "m.parquet"))


def test_the_hash_changes_with_the_data(write_pairs):
    folder = write_pairs(20)
    before = build_manifest(folder, PAIRS)
    assert build_manifest(folder, PAIRS).hash == before.hash
    write_parquet_pairs(f"{folder}/1.parquet", make_pairs(1))
    assert build_manifest(folder, PAIRS).hash != before.hash


def test_a_saved_index_is_taken_while_it_is_true(write_pairs, monkeypatch):
    folder = write_pairs(20)
    manifest = build_manifest(folder, PAIRS)
    manifest.save(f"{folder}/{FILE_NAME}", PAIRS)
    indexed = []
    real = module.index_table
    monkeypatch.setattr(module, "index_table", lambda uri, pairs: indexed.append(uri) or real(uri, pairs))
    assert build_manifest(folder, PAIRS) == manifest and not indexed
    build_manifest(folder, PairsConfig(id_column="other"))
    assert len(indexed) == 1
    write_parquet_pairs(f"{folder}/0.parquet", make_pairs(21))
    assert build_manifest(folder, PAIRS).count == 21 and len(indexed) == 2


def test_one_file_is_a_data_set_and_order_is_by_name(tmp_path):
    for name in ("b/2.parquet", "a.parquet", "b/10.parquet"):
        write_parquet_pairs(str(tmp_path / name), make_pairs(2, start=len(name)))
    manifest = build_manifest(str(tmp_path), PAIRS)
    names = [str(Path(unit.uri).relative_to(tmp_path)) for unit in manifest.units]
    assert names == ["a.parquet"] * 2 + ["b/10.parquet"] * 2 + ["b/2.parquet"] * 2
    assert build_manifest(str(tmp_path / "a.parquet"), PAIRS).count == 2


@pytest.mark.parametrize("wrong", ["image", "caption"])
def test_missing_columns_are_named_with_what_is_there(tmp_path, wrong):
    pairs = [{("x" if k == wrong else k): v for k, v in pair.items()} for pair in make_pairs(2)]
    file = write_parquet_pairs(str(tmp_path / "a.parquet"), pairs)
    with pytest.raises(InputError, match=rf"a.parquet: no column {wrong}, it has .*x.*--pairs.image-column") as caught:
        build_manifest(file, PAIRS)
    assert "\n" not in str(caught.value)
    found = build_manifest(file, PairsConfig(**{f"{wrong}_column": "x"}))
    assert not any(s.reason for s in read_all(found, PairsConfig(**{f"{wrong}_column": "x"})))


def test_columns_of_another_kind_are_refused(tmp_path):
    file = write_parquet_pairs(str(tmp_path / "a.parquet"), [{"image": "a/path.jpg", "caption": "a"}])
    with pytest.raises(InputError, match="column image holds string"):
        build_manifest(file, PAIRS)
    file = write_parquet_pairs(str(tmp_path / "a.parquet"), [{"image": b"x", "caption": 5}])
    with pytest.raises(InputError, match="column caption holds int64"):
        build_manifest(file, PAIRS)


def test_data_sets_without_pairs_are_refused(tmp_path, s3):
    for uri in (str(tmp_path / "no"), f"{s3.bucket()}/no"):
        with pytest.raises(InputError, match="no such path"):
            build_manifest(uri, PAIRS)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=r"neither \*.parquet nor \*.tar"):
        build_manifest(str(tmp_path), PAIRS)
    tarfile.open(tmp_path / "a.tar", "w").close()
    with pytest.raises(InputError, match="no pairs in its 1 files; all are empty"):
        build_manifest(str(tmp_path), PAIRS)
    (tmp_path / "a.tar").write_bytes(b"nothing like a tar" * 100)
    with pytest.raises(InputError, match="all are damaged"):
        build_manifest(str(tmp_path), PAIRS)


def test_row_numbers_count_over_row_groups(tmp_path):
    file = write_parquet_pairs(str(tmp_path / "a.parquet"), make_pairs(25), row_group_size=10)
    manifest = build_manifest(file, PAIRS)
    samples = read_all(manifest)
    assert [s.uri.rpartition("=")[2] for s in samples] == [str(i) for i in range(25)]
    assert [unit.row_group for unit in manifest.units] == [0] * 10 + [1] * 10 + [2] * 5
    table = pa.table({"a": [1]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert {s.reason for s in read_all(manifest)} == {"fetch_failed"}


def test_units_say_where_their_bytes_are(write_pairs):
    manifest = build_manifest(write_pairs(30, "webdataset"), PAIRS)
    whole = Path(manifest.units[0].uri).read_bytes()
    unit: Unit = manifest.units[7]
    with tarfile.open(fileobj=io.BytesIO(whole[unit.offset : unit.offset + unit.length])) as archive:
        assert archive.getnames() == ["key7.jpg", "key7.txt"]
    assert manifest.size == len(whole) == unit.size
