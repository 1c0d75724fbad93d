import io
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.config import InputError
from pipelines import storage
from pipelines.config import ExperimentConfig, PairsConfig
from pipelines.data.manifest import build_manifest
from pipelines.data.ray_data import PrepareSettings, read_eval
from pipelines.data.skip_ledger import ledger_rows, read_ledger, write_ledger
from pipelines.embed import job as embed_module
from pipelines.embed.encoder import Encoder, _as_pixels
from pipelines.embed.folder import Job, claim, complete
from pipelines.embed.job import embed
from pipelines.embed.thumbnails import thumbnail
from pipelines.embed.transforms import _as_bytes
from pipelines.evaluation.evaluate import encode
from tests.support.pairs import encoded, jpeg, make_pairs, write_parquet_pairs, write_tar_pairs
from tests.support.paths import ROOT
from tests.support.serving_models import save_small

PAIRS = 90
BROKEN = {11: "unreadable", 22: "empty_caption", 33: "missing_member"}
SEVERAL = 44
"""A sample with three captions, one of which is empty."""
AGAIN = 55
"""A sample whose picture is that of number 5."""
pytestmark = pytest.mark.usefixtures("ray_local")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("package")
    return folder, save_small(folder)


def write_corpus(folder, pairs=PAIRS):
    """Two thirds in Parquet, the rest in a tar; some samples are broken, one has captions, one comes again."""
    rows = make_pairs(pairs)
    rows[11]["image"] = jpeg(11)[:200]
    rows[22]["caption"] = "..."
    rows[33]["image"] = None
    rows[AGAIN]["image"] = rows[5]["image"]
    cut = pairs * 2 // 3
    for number, row in enumerate(rows):
        row["caption"] = [f"First of {number}!", "...", "Second, other"] if number == SEVERAL else [row["caption"]]
    write_parquet_pairs(f"{folder}/a.parquet", rows[:cut], row_group_size=25)
    write_tar_pairs(f"{folder}/b.tar", [row | {"caption": row["caption"][0]} for row in rows[cut:]])
    return rows


def table_of(out):
    """All rows, in the order that `vectors.json` gives the files."""
    about = json.loads((out / "vectors.json").read_text())
    return pa.concat_tables([pq.ParquetFile(out / entry["name"]).read() for entry in about["files"]]).combine_chunks()


def matrix(table, column):
    return np.array(table.column(column).to_pylist(), np.float32)


@pytest.fixture(scope="module")
def done(package, tmp_path_factory):
    """(the corpus' rows, its folder, the vectors' folder, what embed said)."""
    data, out = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("out") / "vectors of it"
    rows = write_corpus(data)
    return rows, data, out, embed(str(package[0]), str(data), str(out))


def test_every_sample_is_in_the_vectors_or_in_the_ledger(done):
    _, _, out, result = done
    assert (result.samples, result.skipped, result.encoded) == (PAIRS - 3, 3, PAIRS)
    assert result.rows == PAIRS - 3 + 1
    ledger = read_ledger(str(out / "skipped.parquet"))
    assert dict(zip(ledger["id"].to_pylist(), ledger["reason"].to_pylist(), strict=True)) == {
        f"key{number}": reason for number, reason in BROKEN.items()
    }
    table = table_of(out)
    expected = [number for number in range(PAIRS) if number not in BROKEN for _ in range(1 + (number == SEVERAL))]
    assert table["id"].to_pylist() == [f"key{number}" for number in expected]
    assert pq.read_table(out / "vectors").num_rows == len(expected)
    assert "3 skipped (" in result.text() and str(out) in result.text()


def test_captions_are_the_users_own_words_and_equal_pictures_say_so(done):
    _, data, out, _ = done
    table = table_of(out)
    by_id = {}
    for row in table.to_pylist():
        by_id.setdefault(row["id"], []).append(row)
    assert [row["caption"] for row in by_id[f"key{SEVERAL}"]] == [f"First of {SEVERAL}!", "Second, other"]
    assert by_id["key7"][0]["caption"] == "Picture number 7, of noise."
    assert by_id[f"key{AGAIN}"][0]["image_id"] == by_id["key5"][0]["image_id"]
    assert len({row["image_id"] for row in table.to_pylist()}) == PAIRS - 3 - 1
    assert by_id["key7"][0]["uri"] == f"{data}/a.parquet#row=7"
    assert by_id["key70"][0]["uri"] == f"{data}/b.tar#key70.jpg"


def test_vectors_equal_those_that_evaluation_scores(done, package):
    _, data, out, _ = done
    manifest = build_manifest(str(data), PairsConfig())
    experiment = ExperimentConfig().model_copy(update={"encoder": package[1].config})
    settings = PrepareSettings.of(experiment, package[1].tokenizer.to_json())
    gallery = encode(package[1], read_eval(manifest.units, settings), keep_tokens=False)
    table = table_of(out)
    owner = gallery.relevance.owner.numpy()
    np.testing.assert_allclose(matrix(table, "image_vector"), gallery.images.numpy()[owner], atol=1e-5)
    np.testing.assert_allclose(matrix(table, "text_vector"), gallery.texts.numpy(), atol=1e-5)
    assert np.ptp(matrix(table, "image_vector"), axis=0).max() > 1e-2, "untrained, but not blind"


def test_thumbnails_are_small_jpegs_of_the_picture(done):
    rows, _, out, _ = done
    table = table_of(out)
    for row in table.to_pylist()[::10]:
        with Image.open(io.BytesIO(row["thumbnail"])) as small:
            assert small.format == "JPEG" and small.size == (32, 32)
            original = Image.open(io.BytesIO(rows[int(row["id"][3:])]["image"]))
            assert np.abs(np.asarray(small).astype(int) - np.asarray(original).astype(int)).mean() < 8


def test_a_thumbnail_is_upright_without_metadata_and_never_enlarged():
    halves = Image.new("RGB", (800, 400), "red")
    halves.paste("blue", (400, 0, 800, 400))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: red above, blue below
    exif[0x010E] = "where it was taken"
    small = Image.open(io.BytesIO(thumbnail(encoded(halves, "JPEG", exif=exif, comment=b"secret"))))
    assert small.size == (80, 160) and not small.getexif() and "comment" not in small.info
    assert small.getpixel((40, 20))[0] > 200 and small.getpixel((40, 140))[2] > 200
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    small = Image.open(io.BytesIO(thumbnail(encoded(clear, "PNG"))))
    assert small.size == (30, 20) and small.getpixel((5, 5)) == (255, 255, 255)
    assert thumbnail(jpeg(1)[:200]) is None and thumbnail(b"") is None


def test_the_npy_files_hold_the_same_rows_in_clip_retrievals_layout(done):
    _, _, out, _ = done
    table = table_of(out)
    for folder, column in (("img_emb", "image_vector"), ("text_emb", "text_vector")):
        array = np.load(out / folder / f"{folder}_0.npy", allow_pickle=False)
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, matrix(table, column))
    metadata = pq.ParquetFile(out / "metadata" / "metadata_0.parquet").read()
    assert metadata.column_names[:2] == ["image_path", "caption"]
    assert metadata["image_path"].to_pylist() == table["uri"].to_pylist()
    assert metadata["caption"].to_pylist() == table["caption"].to_pylist()


def test_pixels_travel_through_tables_that_are_cut_and_joined():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 5, 3), np.uint8)
    whole = pa.table({"pixels": _as_bytes(pixels)})
    np.testing.assert_array_equal(_as_pixels(whole.slice(2, 4)["pixels"], 5), pixels[2:6])
    joined = pa.concat_tables([whole.slice(5), whole.slice(0, 3)])
    np.testing.assert_array_equal(_as_pixels(joined["pixels"], 5), np.concatenate([pixels[5:], pixels[:3]]))


def test_the_folder_says_whose_it_is_and_nothing_of_the_job_is_left(done, package):
    _, data, out, result = done
    about = json.loads((out / "vectors.json").read_text())
    assert about["embedding_space"] == result.embedding_space == package[1].embedding_space
    assert about["manifest"] == build_manifest(str(data), PairsConfig()).hash
    assert about["dimensions"] == matrix(table_of(out), "image_vector").shape[1] == 8
    assert sorted(path.name for path in out.iterdir()) == [
        "img_emb", "metadata", "skipped.parquet", "text_emb", "vectors", "vectors.json"
    ]  # fmt: skip
    assert all(path.suffix == ".parquet" for path in (out / "vectors").iterdir())


def test_a_job_that_is_done_is_not_repeated(done, package):
    _, data, out, result = done
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = embed(str(package[0]), str(data), str(out))
    assert (again.encoded, again.rows, again.samples, again.skipped) == (0, result.rows, PAIRS - 3, 3)
    assert "all done before" in again.text()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_folder_of_other_vectors_is_refused_by_name(done, package, tmp_path):
    _, data, out, result = done
    other = save_small(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=f"embedding space {result.embedding_space} there and {other.embedding_space}"):
        embed(str(tmp_path / "other"), str(data), str(out))
    write_parquet_pairs(str(tmp_path / "data" / "0.parquet"), make_pairs(5))
    with pytest.raises(InputError, match="hash of the data's index"):
        embed(str(package[0]), str(tmp_path / "data"), str(out))
    with pytest.raises(InputError, match="thumbnails of side 160 there and 0 here"):
        embed(str(package[0]), str(data), str(out), thumbnails=False)
    (tmp_path / "strange" / "vectors").mkdir(parents=True)
    with pytest.raises(InputError, match="unknown job"):
        embed(str(package[0]), str(data), str(tmp_path / "strange"))


def failing(progress):
    """An encoder that breaks at its fourth batch, once two files are written and noted."""

    class Failing(Encoder):
        calls = 0

        def __call__(self, table):
            self.calls += 1
            until = time.monotonic() + 30
            while self.calls > 3:
                notes = [path for path in progress.glob("*.parquet") if "pending" not in path.name]
                if len(notes) > 1 or time.monotonic() > until:
                    raise OSError("out of luck")
                time.sleep(0.05)
            return super().__call__(table)

    return Failing


def partly_done(manifest, notes):
    """Units of which some samples are noted and some are not."""
    units = np.concatenate([pq.read_table(path)["sample"].to_numpy() >> 32 for path in notes])
    return [unit for unit in manifest.units if 0 < np.sum(units == unit.unit) < unit.count]


def test_a_job_that_broke_goes_on_and_encodes_nothing_twice(package, tmp_path, monkeypatch):
    write_corpus(tmp_path / "data", 400)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(embed_module, "Encoder", failing(out / "_progress"))
        patch.setattr(embed_module, "BATCH", 100)
        patch.setattr(embed_module, "FEWEST_ROWS", 50)
        patch.setattr(embed_module, "BLOCK_BYTES", 20_000)  # files end within units
        with pytest.raises(Exception, match="out of luck"):
            embed(str(package[0]), str(tmp_path / "data"), str(out), npy=False)
    assert not (out / "vectors.json").exists()
    kept = {path: path.read_bytes() for path in (out / "vectors").glob("*.parquet")}
    orphan, *others = sorted((out / "_progress").iterdir())
    noted = sum(pq.ParquetFile(path).metadata.num_rows for path in others)
    assert noted and partly_done(build_manifest(str(tmp_path / "data"), PairsConfig()), others)
    lost = out / "vectors" / orphan.name  # as if it had been killed between the file and its note:
    orphan.rename(orphan.with_name(f"{orphan.stem}.pending.parquet"))
    result = embed(str(package[0]), str(tmp_path / "data"), str(out), npy=False)
    assert result.encoded == 400 - noted
    assert kept.pop(lost) and not lost.exists()
    assert all(path.read_bytes() == before for path, before in kept.items())
    assert sorted(table_of(out)["id"].to_pylist()) == sorted(
        f"key{n}" for n in range(400) if n not in BROKEN for _ in range(1 + (n == SEVERAL))
    )
    assert result.skipped == 3 and result.samples == 397


@pytest.fixture
def written(tmp_path):
    """(folder, job, manifest) of ten samples in one file each, number 3 skipped; nothing is summed up yet."""
    write_parquet_pairs(str(tmp_path / "data" / "0.parquet"), make_pairs(10))
    manifest = build_manifest(str(tmp_path / "data"), PairsConfig())
    out, job = tmp_path / "out", Job("space", "name", 2, manifest.hash, 0, False)
    assert claim(str(out), job) is None
    (out / "vectors" / "_skipped").mkdir(parents=True)
    for unit in manifest.units:
        for ordinal in range(unit.count):
            number = unit.first + ordinal
            if number == 3:
                row = {
                    "unit": unit.unit,
                    "ordinal": ordinal,
                    "id": "key3",
                    "uri": "",
                    "reason": "unreadable",
                    "detail": "",
                }
                table = ledger_rows({name: np.array([value], object) for name, value in row.items()}, 0)
                write_ledger(f"{out}/vectors/_skipped/{number}.parquet", table)
            else:
                pq.write_table(
                    pa.table({"unit": [unit.unit], "ordinal": [ordinal]}), out / "vectors" / f"{number}.parquet"
                )
    return out, job, manifest


def test_a_share_of_skipped_samples_is_allowed_and_no_more(written):
    out, job, manifest = written
    with pytest.raises(InputError, match="1 of 10 samples were skipped, more than 5%"):
        complete(str(out), job, manifest, 0.05)
    assert not (out / "vectors.json").exists()
    assert len(read_ledger(str(out / "skipped.parquet"))) == 1
    about = complete(str(out), job, manifest, 0.1)
    assert (about["samples"], about["skipped"], about["reasons"]) == (9, 1, {"unreadable": 1})
    assert claim(str(out), job) == json.loads((out / "vectors.json").read_text()) == about


def test_a_lost_sample_and_one_that_is_there_twice_are_noticed(written):
    out, job, manifest = written
    (out / "vectors" / "7.parquet").rename(out / "7")
    with pytest.raises(RuntimeError, match="10 samples planned, but 8 trained and 1 skipped"):
        complete(str(out), job, manifest, 0.1)
    shutil.copy(out / "vectors" / "6.parquet", out / "vectors" / "7.parquet")
    with pytest.raises(RuntimeError, match="written twice"):
        complete(str(out), job, manifest, 0.1)


def test_on_object_storage_without_thumbnails(package, s3):
    bucket = s3.bucket()
    write_parquet_pairs(f"{bucket}/data/0.parquet", make_pairs(20))
    result = embed(str(package[0]), f"{bucket}/data", f"{bucket}/out", thumbnails=False, npy=False)
    assert (result.samples, result.rows) == (20, 20)
    about = json.loads(storage.read_bytes(f"{bucket}/out/vectors.json"))
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(f"{bucket}/out/{e['name']}"))) for e in about["files"]]
    assert pa.concat_tables(tables)["id"].to_pylist() == [f"key{number}" for number in range(20)]
    assert "thumbnail" not in tables[0].column_names
    assert not storage.exists(f"{bucket}/out/_progress") and not storage.exists(f"{bucket}/out/_embed.json")
    assert embed(str(package[0]), f"{bucket}/data", f"{bucket}/out", thumbnails=False, npy=False).encoded == 0


def test_gpus_that_are_not_there_are_said(package, tmp_path):
    write_parquet_pairs(str(tmp_path / "data" / "0.parquet"), make_pairs(5))
    with pytest.raises(InputError, match=r"^--gpus: the cluster has no GPU"):
        embed(str(package[0]), str(tmp_path / "data"), str(tmp_path / "out"), gpus=True)


JOB = """
import os, ray
os.environ["RAY_AUTH_MODE"] = "disabled"
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir={temp!r})
from pipelines.embed import job
job.BATCH = job.FEWEST_ROWS = job.MOST_ROWS = 50
job.embed({package!r}, {data!r}, {out!r})
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_killed_at_any_moment_goes_on_and_ends_complete(package, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write_corpus(data, 3000)
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        code = textwrap.dedent(JOB).format(temp=temp, package=str(package[0]), data=str(data), out=str(out))
        job = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
        while job.poll() is None and len(list((out / "vectors").glob("*.parquet"))) < 5:
            time.sleep(0.05)
        job.kill()
        job.wait()
    assert not (out / "vectors.json").exists()
    time.sleep(5)  # its Ray ends with it
    before = {path.name for path in (out / "vectors").glob("*.parquet")}
    result = embed(str(package[0]), str(data), str(out))
    assert 0 < result.encoded <= 3000 - 50
    assert before & {path.name for path in (out / "vectors").glob("*.parquet")}
    assert result.samples + result.skipped == 3000 and result.rows == 2998
    assert len(set(table_of(out)["id"].to_pylist())) == 2997
