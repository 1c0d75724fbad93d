from pathlib import Path

import pytest

from models.config import InputError
from pipelines.config import PairsConfig
from pipelines.data import inspect
from pipelines.data.inspect import index_data, lint_data, stats_data
from pipelines.data.manifest import FILE_NAME, Manifest, build_manifest
from tests.support.pairs import jpeg, make_pairs, write_parquet_pairs, write_tar_pairs


@pytest.fixture
def folder(tmp_path):
    """Nine good samples (two of one image, two of one caption), three bad ones."""
    pairs = make_pairs(8)
    pairs[1]["image"] = pairs[0]["image"]
    pairs[2]["caption"] = pairs[3]["caption"].upper()
    pairs[4]["image"] = jpeg(4, 300, 50)
    pairs[5]["caption"] = "?"
    pairs[6]["image"] = b"<html>"
    write_parquet_pairs(str(tmp_path / "a.parquet"), pairs)
    tar = make_pairs(4, start=20)
    tar[0]["caption"] = ["one", "two words"]
    del tar[1]["image"]
    write_tar_pairs(str(tmp_path / "b.tar"), tar)
    return str(tmp_path)


def test_index_leaves_a_manifest_beside_the_data(folder):
    told = index_data(folder)
    assert told["manifest"] == f"{folder}/{FILE_NAME}"
    manifest = Manifest.load(told["manifest"])
    assert manifest == build_manifest(folder, PairsConfig()) and told["hash"] == manifest.hash
    size = sum((Path(folder) / name).stat().st_size for name in ("a.parquet", "b.tar"))
    assert {name: told[name] for name in ("samples", "files", "bytes", "units")} == {
        "samples": 12,
        "files": 2,
        "bytes": size,
        "units": 12,
    }
    assert told["formats"] == ["parquet", "webdataset"]
    assert index_data(f"{folder}/b.tar")["manifest"] == f"{folder}/b.tar.manifest"
    assert index_data(folder)["samples"] == 12  # its own files are no data


def test_lint_lists_bad_samples_by_reason(folder):
    rows = lint_data(folder)
    assert [(r["reason"], r["sample_id"], r["id"]) for r in rows] == [
        ("empty_caption", "5-0", "key5"),
        ("missing_member", "9-0", "key21"),
        ("unreadable", "6-0", "key6"),
    ]
    assert rows[2]["uri"] == f"{folder}/a.parquet#row=6" and "<html>" in rows[2]["detail"]
    text = inspect.lint(folder)
    assert text.splitlines()[0].startswith("5-0\tempty_caption\t")
    assert text.splitlines()[-1] == "3 bad samples: 1 empty_caption, 1 missing_member, 1 unreadable"


def test_stats_count_what_can_be_used(folder):
    found = stats_data(folder)
    assert (found["samples"], found["good"], found["captions"]) == (12, 9, 10)
    assert found["skipped"] == {"empty_caption": 1, "unreadable": 1, "missing_member": 1}
    assert (found["distinct_images"], found["repeated_images"]) == (8, 1)
    assert (found["distinct_captions"], found["repeated_captions"]) == (9, 1)
    assert found["caption_words"] == {"min": 1, "median": 5.0, "mean": 4.3, "max": 5}
    assert found["image_width"] == {"min": 32, "median": 32.0, "mean": pytest.approx(61.78), "max": 300}
    assert found["image_height"]["max"] == 50
    assert "repeated images    1" in inspect.stats(folder)


def test_a_clean_set_has_nothing_to_lint_and_a_missing_one_is_named(tmp_path):
    write_parquet_pairs(str(tmp_path / "a.parquet"), make_pairs(2))
    assert inspect.lint(str(tmp_path)) == "0 bad samples"
    assert inspect.index(str(tmp_path)).startswith("manifest ")
    for look in (inspect.index, inspect.lint, inspect.stats):
        with pytest.raises(InputError, match="no such path"):
            look(str(tmp_path / "none"))
