import json
import shutil
import threading
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.config import InputError
from pipelines import storage
from serving.index import approximate, build
from serving.index.approximate import kind_of, make_vector_index, recall_of
from serving.index.build import build_index
from serving.index.index import open_index

D = 8
FILES = 3


def unit_vectors(rows, seed, dimensions=D):
    vectors = np.random.default_rng(seed).standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def corpus():
    """60 pairs: every tenth image is that of the row before, rows 20 and 21 are one pair, 30 to 32 have one id."""
    rows = 60
    images, texts = unit_vectors(rows, 1), unit_vectors(rows, 2)
    image_id = np.arange(rows) * 7 - 50
    for row in [*range(10, rows, 10), 21]:
        image_id[row], images[row] = image_id[row - 1], images[row - 1]
    captions, ids = [f"Caption {row}." for row in range(rows)], [f"id{row}" for row in range(rows)]
    captions[21], texts[21] = captions[20], texts[20]
    ids[31] = ids[32] = ids[30]
    return {
        "id": ids,
        "image_id": image_id,
        "caption": captions,
        "uri": [f"/data/{row}.jpg" for row in range(rows)],
        "image_vector": images,
        "text_vector": texts,
        "thumbnail": [b"jpeg of %d" % image for image in image_id],
    }


def column(values):
    if not isinstance(values, np.ndarray) or values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def write_vectors(folder, rows, files=FILES, **changes):
    """A complete folder of vectors as `triptych embed` leaves it."""
    table = pa.table({name: column(values) for name, values in rows.items()})
    size = -(-len(table) // files)
    (folder / "vectors").mkdir(parents=True)
    entries = []
    for number in range(files):
        part = table.slice(number * size, size)
        entries.append({"name": f"vectors/{number}.parquet", "rows": len(part)})
        pq.write_table(part, folder / entries[-1]["name"], row_group_size=7)
    about = {
        "format": "triptych-vectors-1",
        "name": "small",
        "embedding_space": "space-1",
        "dimensions": rows["image_vector"].shape[1],
        "manifest": "hash",
        "files": entries,
    }
    (folder / "vectors.json").write_text(json.dumps(about | changes))
    return str(folder)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    rows = corpus()
    return rows, write_vectors(tmp_path_factory.mktemp("vectors"), rows)


@pytest.fixture(scope="module")
def flat(vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "flat"
    return folder, build_index(vectors[1], str(folder))


def once(rows, side):
    """Rows that a side holds: an image once, and a caption of an image once."""
    seen, kept = set(), []
    for row, (image, caption) in enumerate(zip(rows["image_id"].tolist(), rows["caption"], strict=True)):
        key = image if side == "image" else (image, caption)
        if key not in seen:
            seen.add(key)
            kept.append(row)
    return kept


def by_definition(rows, side, query, k):
    """(cosine, row) of the k nearest, by a loop."""
    scored = [(float(query @ rows[f"{side}_vector"][row]), row) for row in once(rows, side)]
    return sorted(scored, reverse=True)[:k]


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_search_finds_what_the_definition_finds(vectors, flat, side):
    rows, index = vectors[0], open_index(flat[0])
    queries = unit_vectors(5, 3)
    for query, hits in zip(queries, index.search(queries, side, 10), strict=True):
        expected = by_definition(rows, side, query, 10)
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in expected], abs=1e-6)
        for hit, (_, row) in zip(hits, expected, strict=True):
            assert (hit.id, hit.caption, hit.uri) == (rows["id"][row], rows["caption"][row], rows["uri"][row])
            assert hit.thumbnail == rows["thumbnail"][row]


def test_an_image_is_there_once_and_so_is_a_caption_of_it(vectors, flat):
    rows, index = vectors[0], open_index(flat[0])
    assert (index.images, index.texts) == (len(once(rows, "image")), len(once(rows, "text"))) == (54, 59)
    assert flat[1].counts == {"image": 54, "text": 59} and flat[1].rows == 60
    hits = index.search(rows["image_vector"][20:21], "image", 60)[0]
    assert len({hit.thumbnail for hit in hits}) == len(hits) == 54


def test_a_long_list_is_the_whole_side_in_order(flat):
    index = open_index(flat[0])
    (hits,) = index.search(unit_vectors(1, 4), "text", 1000)
    assert len(hits) == index.texts
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_queries_of_any_length_are_scored_by_cosine(flat):
    index = open_index(flat[0])
    query = unit_vectors(1, 5)
    short, long = (index.search(query * factor, "image", 5)[0] for factor in (0.1, 30))
    assert [hit.id for hit in short] == [hit.id for hit in long]
    assert [hit.score for hit in short] == pytest.approx([hit.score for hit in long], abs=1e-6)
    with pytest.raises(InputError, match="vectors of 8 numbers"):
        index.search(unit_vectors(1, 5, 9), "image", 5)


def test_every_row_gives_its_vectors_by_its_id(vectors, flat):
    rows, index = vectors[0], open_index(flat[0])
    for row, row_id in enumerate(rows["id"]):
        row = 30 if row in (31, 32) else row  # of equal ids the first
        for modality in ("image", "text"):
            np.testing.assert_array_equal(index.vector_of(row_id, modality), rows[f"{modality}_vector"][row])
    assert index.vector_of("id60", "image") is None and index.vector_of("", "text") is None


def test_ids_whose_hashes_are_equal_are_told_apart(vectors, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.index.files.hash_id", lambda row_id: 7)
    monkeypatch.setattr("serving.index.build.hash_id", lambda row_id: 7 if row_id.startswith("id") else hash(row_id))
    build_index(vectors[1], str(tmp_path / "index"))
    index = open_index(tmp_path / "index")
    np.testing.assert_array_equal(index.vector_of("id44", "text"), vectors[0]["text_vector"][44])
    assert index.vector_of("id60", "text") is None


def test_an_index_of_another_space_is_refused_by_name(flat):
    index = open_index(flat[0])
    assert (index.embedding_space, index.name, index.dimensions) == ("space-1", "small", D)
    index.require("space-1")
    with pytest.raises(InputError, match=r"space-1 \(small\), the model of space-2"):
        index.require("space-2")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """4,000 pairs around 100 centres: rows and the folder of vectors."""
    centres = unit_vectors(100, 6, 16)[np.random.default_rng(7).integers(0, 100, 4000)]
    sides = [centres + 0.4 * unit_vectors(4000, seed, 16) for seed in (8, 9)]
    images, texts = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    rows = {
        "id": [str(row) for row in range(4000)],
        "caption": [f"{row}" for row in range(4000)],
        "uri": [""] * 4000,
        "image_vector": images.astype(np.float32),
        "text_vector": texts.astype(np.float32),
    }
    return rows, write_vectors(tmp_path_factory.mktemp("many"), rows)


@pytest.fixture(scope="module", params=["hnsw", "ivfpq"])
def large(request, many, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large") / request.param
    return request.param, folder, build_index(many[1], str(folder), request.param, threads=1)


def test_approximate_kinds_score_exactly_and_state_their_recall(many, large):
    kind, folder, report = large
    index = open_index(folder)
    assert index.kind == kind and report.kinds == {"image": kind, "text": kind}
    queries = many[0]["text_vector"][:: 4000 // 200][:200]
    cosines = queries @ many[0]["image_vector"].T
    found = 0
    for row, hits in zip(cosines, index.search(queries, "image", 10), strict=True):
        assert [hit.score for hit in hits] == pytest.approx([row[int(hit.id)] for hit in hits], abs=1e-6)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        found += len({int(hit.id) for hit in hits} & set(np.argsort(-row)[:10].tolist()))
    assert found / 2000 >= approximate.RECALL
    assert report.recall_at_10["image"] == pytest.approx(found / 2000, abs=0.02) == index.recall["image"]
    assert f"recall@10 {report.recall_at_10['image']:.3f}" in report.text() and kind in report.text()


def test_approximate_kinds_give_the_whole_side_where_it_is_asked_for(large):
    index = open_index(large[1])
    (hits,) = index.search(unit_vectors(1, 4, 16), "image", 5000)
    assert len({hit.id for hit in hits}) == len(hits) == 4000


def test_rows_without_thumbnails_and_image_ids_are_all_different_images(large):
    index = open_index(large[1])
    assert index.images == index.texts == 4000
    assert index.search(unit_vectors(1, 4, 16), "text", 1)[0][0].thumbnail == b""


def test_many_threads_get_their_own_answers(many, large):
    index, queries = open_index(large[1]), many[0]["image_vector"][:64]
    expected = [[hit.id for hit in hits] for hits in index.search(queries, "text", 5)]
    wrong = []

    def ask(start):
        for number in range(start, 64, 4):
            (hits,) = index.search(queries[number : number + 1], "text", 5)
            wrong.extend([number] if [hit.id for hit in hits] != expected[number] else [])

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_opening_reads_nothing_into_memory(many, large):
    def own_memory():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    open_index(large[1])
    before = own_memory()
    kept = [open_index(large[1]) for _ in range(20)]
    files = sum(path.stat().st_size for path in large[1].iterdir())
    assert own_memory() - before < 20 * files / 4, "20 copies would be 20 times the files"
    assert len(kept) == 20


def test_kinds_by_size():
    assert [kind_of("auto", count) for count in (1, 50_000, 50_001, 2_000_000, 2_000_001)] == [
        "flat", "flat", "hnsw", "hnsw", "ivfpq"
    ]  # fmt: skip
    assert kind_of("ivfpq", 1999) == "flat" and kind_of("ivfpq", 2000) == "ivfpq"
    assert kind_of("hnsw", 3) == "hnsw"


def test_recall_is_the_share_of_the_nearest_that_is_found():
    truth = np.array([[0.9, 0.8], [0.7, 0.7]], np.float32)
    assert recall_of(truth, truth) == 1
    assert recall_of(np.array([[0.9, 0.5], [0.7, 0.7]], np.float32), truth) == 0.75
    assert recall_of(np.array([[0.5, 0.4], [0.1, 0.1]], np.float32), truth) == 0


def test_the_search_parameter_rises_until_the_recall_is_reached(monkeypatch):
    vectors, queries = unit_vectors(3000, 1, 16), unit_vectors(50, 2, 16)
    found = {}
    for wanted in (0.0, 1.0):
        monkeypatch.setattr(approximate, "RECALL", wanted)
        index, recall = make_vector_index("ivfpq", vectors, queries)
        found[wanted] = (index.search_parameter, recall)
    assert found[0.0][0] == 8 < found[1.0][0] <= 75 / 4
    assert found[0.0][1] < found[1.0][1] <= 1


@pytest.mark.parametrize("name", ["image_vectors.npy", "rows.arrow", "ids.npy", "thumbnails.arrow"])
def test_a_damaged_file_is_refused_by_name(flat, tmp_path, name):
    folder = tmp_path / "index"
    shutil.copytree(flat[0], folder)
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=rf"{name} has {len(whole) - 1:,} bytes instead of {len(whole):,}"):
        open_index(folder)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{name} was changed"):
        open_index(folder, verify=True)
    path.unlink()
    with pytest.raises(InputError, match=f"{name} is missing"):
        open_index(folder)


def test_a_folder_that_is_no_index_is_refused(flat, tmp_path):
    with pytest.raises(InputError, match=r"index.json is missing"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index.json is damaged"):
        open_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="no index of this application"):
        open_index(tmp_path)


def test_an_index_is_not_written_over(vectors, flat):
    with pytest.raises(InputError, match="an index already"):
        build_index(vectors[1], str(flat[0]))


def test_a_place_that_cannot_be_a_folder_is_said(vectors, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="no folder can be made there"):
        build_index(vectors[1], str(tmp_path / "file" / "index"))


def test_a_build_that_did_not_end_leaves_no_index_and_can_be_repeated(vectors, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build, "make_vector_index", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build_index(vectors[1], str(tmp_path))
    with pytest.raises(InputError, match=r"index.json is missing"):
        open_index(tmp_path)
    build_index(vectors[1], str(tmp_path))
    assert open_index(tmp_path, verify=True).images == 54


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "vectors.json").unlink(), "vectors.json is missing; run"),
        (lambda folder: (folder / "vectors.json").write_text("[]"), "vectors.json is damaged"),
        (lambda folder: (folder / "vectors/1.parquet").unlink(), "1.parquet: the file is missing"),
        (lambda folder: (folder / "vectors/1.parquet").write_bytes(b"x" * 100), "1.parquet: damaged"),
        (lambda folder: shutil.copy(folder / "vectors/0.parquet", folder / "vectors/6.parquet"), "9 rows instead of 6"),
    ],
)
def test_vectors_that_are_not_whole_are_refused(tmp_path, harm, words):
    write_vectors(tmp_path / "vectors", corpus(), files=7)
    harm(tmp_path / "vectors")
    with pytest.raises(InputError, match=words):
        build_index(str(tmp_path / "vectors"), str(tmp_path / "index"))


def test_vectors_that_cannot_be_compared_are_refused(tmp_path):
    rows = corpus()
    write_vectors(tmp_path / "wide", rows, dimensions=D + 1)
    with pytest.raises(InputError, match="does not hold vectors of 9 numbers"):
        build_index(str(tmp_path / "wide"), str(tmp_path / "index"))
    rows["text_vector"] = rows["text_vector"] * 2
    write_vectors(tmp_path / "long", rows)
    with pytest.raises(InputError, match="text_vector holds vectors that are not of length 1"):
        build_index(str(tmp_path / "long"), str(tmp_path / "index"))


def test_from_and_to_object_storage_the_file_that_completes_it_comes_last(vectors, s3, tmp_path, monkeypatch):
    bucket = s3.bucket()
    storage.upload(vectors[1], f"{bucket}/vectors")
    with pytest.raises(InputError, match="only local folders"):
        build_index(f"{bucket}/vectors", str(tmp_path / "index"))
    states, upload = [], storage.upload

    def cancel_on_disconnect(folder, uri):
        upload(folder, uri)
        states.append(sorted(info.uri.rpartition("/")[2] for info in storage.listing(uri)))

    monkeypatch.setattr(storage, "upload", cancel_on_disconnect)
    report = build_index(f"{bucket}/vectors", f"{bucket}/index", files=storage)
    assert "index.json" not in states[0] and "index.json" in states[1] and len(states) == 2
    storage.download(f"{bucket}/index", str(tmp_path / "index"))
    assert open_index(tmp_path / "index", verify=True).texts == report.counts["text"] == 59
    with pytest.raises(InputError, match="an index already"):
        build_index(f"{bucket}/vectors", f"{bucket}/index", files=storage)


def test_the_callers_faiss_threads_stay_what_they_were_after_a_build(vectors, tmp_path):
    before = faiss.omp_get_max_threads()
    build_index(vectors[1], str(tmp_path / "index"), threads=before + 3)
    assert faiss.omp_get_max_threads() == before
