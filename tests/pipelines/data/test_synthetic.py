import io
import json
import tarfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.config import InputError
from pipelines import storage
from pipelines.data import synthetic, synthetic_scenes
from pipelines.data.synthetic import CorpusConfig, draw_scenes, samples, split_of, synthesize
from pipelines.data.synthetic_scenes import AXES, COLOURS, KINDS, SIZES, TEXTURES, Caption, Scene, Thing

SMALL = {"pairs": 100, "image_size": 32}


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*"))}


def from_parquet(folder: Path) -> list[tuple]:
    rows = [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return [(row["id"], row["image"], row["caption"]) for row in rows]


def from_tars(folder: Path) -> list[tuple]:
    """Read as the format says: members of one key stand together, image and text."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, suffix = member.name.split(".", 1)
                assert key not in list(found)[:-1], "members of a sample are consecutive"
                found.setdefault(key, {})[suffix] = archive.extractfile(member).read()
    rows = []
    for key, parts in found.items():
        image = next(data for suffix, data in parts.items() if suffix in ("jpg", "png"))
        text = parts["txt"].decode() if "txt" in parts else json.loads(parts["json"])["caption"]
        rows.append((key, image, text))
    return rows


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        synthesize(str(tmp_path / name), seed=seed, noise=0.1, broken=0.1, **SMALL)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert not set(files(tmp_path / "one").values()) & set(files(tmp_path / "three").values())


def test_splits_share_no_scene_whatever_the_seed_and_no_scene_comes_twice():
    drawn = {split: draw_scenes(seed, split, 600) for seed, split in enumerate(synthetic.SPLITS)}
    again = {split: draw_scenes(7, split, 600) for split in synthetic.SPLITS}
    for split, drawn_scenes in drawn.items():
        assert len(set(drawn_scenes)) == 600
        for other in set(again) - {split}:
            assert not set(drawn_scenes) & set(again[other])
        assert draw_scenes(7, split, 50) == again[split][:50]


def test_split_sizes_and_row_groups(tmp_path):
    counts = synthesize(str(tmp_path / "out"), pairs=2500, image_size=16)
    assert counts == {"train": 2500, "val": 250, "test": 250}
    for split, count in counts.items():
        tables = [pq.ParquetFile(path) for path in (tmp_path / "out" / split).iterdir()]
        assert sum(table.metadata.num_rows for table in tables) == count
        assert all(t.metadata.row_group(0).num_rows <= 128 for t in tables)
        assert tables[0].schema_arrow.names == ["image", "caption", "id", "image_id"]
    assert synthesize(str(tmp_path / "small"), pairs=5, image_size=16) == {"train": 5, "val": 100, "test": 100}


def holds(scene: Scene, text: str) -> bool:
    """Whether the caption's words are true of the scene, judged from the text alone."""
    words = text.split()
    numbers = dict(zip(synthetic_scenes._NUMBERS, "0123456789", strict=True)) | {digit: digit for digit in "0123456789"}
    singular = {"big": "large", "little": "small", "spotted": "dotted", "solid": "plain"}
    heads = [place for place, word in enumerate(words) if word in KINDS or word in numbers]
    said = []
    for before, place in zip([-1, *heads], heads, strict=False):
        mention = {singular.get(word, word) for word in words[before + 1 : place]}
        said.append((numbers.get(words[place], words[place]), mention))
    axis = AXES[scene.axis]
    told = " ".join(words)
    names = {"left": ("to the left of", "left of", "on its left"), "above": ("above", "over")}
    opposites = {"left": ("right",), "above": ("below", "under")}

    def fits(kind_and_words: tuple[str, set[str]], thing: Thing) -> bool:
        kind, mention = kind_and_words
        pairs = ((COLOURS, thing.colour), (SIZES, thing.size), (TEXTURES, thing.texture))
        return kind == KINDS[thing.kind] and all(mention & set(t) <= {list(t)[i]} for t, i in pairs)

    if len(said) == 1:
        return fits(said[0], scene.first) or fits(said[0], scene.second)
    in_order = fits(said[0], scene.first) and fits(said[1], scene.second)
    swapped = fits(said[0], scene.second) and fits(said[1], scene.first)
    if not any(word in told for known in (names, opposites) for group in known.values() for word in group):
        return in_order or swapped
    aside = " with " in told.removeprefix("a picture")
    forward = any(name in told for name in names[axis])
    backward = any(name in told for name in opposites[axis])
    if aside:  # "A with B on its left": B lies to the left
        return (forward and swapped) or (backward and in_order)
    return (forward and in_order) or (backward and swapped)


def test_captions_are_true_of_their_scenes_and_mismatched_ones_are_not():
    rows = list(samples(CorpusConfig(pairs=1000, image_size=16, noise=0.3, captions_per_image=2), "train"))
    assert all(holds(row.scene, text) for row in rows if not row.mismatched for text in row.captions)
    assert not any(holds(row.scene, text) for row in rows if row.mismatched for text in row.captions)
    assert sum(row.mismatched for row in rows) == 300


def test_fifteen_percent_of_the_attributes_are_left_out_of_full_captions():
    random = Random(0)
    told = [synthetic_scenes.describe(synthetic_scenes.draw_scene(random), random) for _ in range(3000)]
    full = [caption for caption in told if len(caption.things) == 2]
    attributes = np.array([thing[1:] for caption in full for thing in caption.things])
    assert abs((attributes < 0).mean() - 0.15) < 0.02
    assert len({caption.text for caption in full}) > 0.98 * len(full)


def test_broken_pairs_are_as_many_as_asked_and_cannot_be_used():
    rows = list(samples(CorpusConfig(broken=0.2, noise=0.5, **SMALL), "train"))
    assert Counter(row.defect for row in rows if row.defect) == dict.fromkeys(synthetic.DEFECTS, 5)
    assert sum(row.mismatched for row in rows) == 50
    assert not any(row.mismatched and row.defect for row in rows)
    for row in rows:
        if row.defect in ("", "empty_caption"):
            Image.open(io.BytesIO(row.image)).load()
            assert bool(row.captions[0].strip()) == (row.defect == "")
        else:
            with pytest.raises(OSError):
                Image.open(io.BytesIO(row.image)).load()


def test_val_and_test_stay_clean():
    for split in ("val", "test"):
        clean = samples(CorpusConfig(broken=0.5, noise=0.5, **SMALL), split)
        assert not any(row.mismatched or row.defect for row in clean)


@pytest.mark.parametrize("captions", [1, 3])
def test_both_formats_carry_the_same_pairs(tmp_path, captions):
    for form in ("parquet", "webdataset"):
        synthesize(str(tmp_path / form), format=form, captions_per_image=captions, broken=0.1, **SMALL)
    for split in synthetic.SPLITS:
        rows = from_parquet(tmp_path / "parquet" / split)
        assert rows == from_tars(tmp_path / "webdataset" / split)
        assert all(isinstance(text, str) if captions == 1 else len(text) == captions for _, _, text in rows)


def test_pictures_are_of_the_size_asked_jpeg_and_png_mixed():
    rows = list(samples(CorpusConfig(pairs=100, image_size=48), "train"))
    pictures = [Image.open(io.BytesIO(row.image)) for row in rows]
    assert {picture.size for picture in pictures} == {(48, 48)}
    formats = Counter(picture.format for picture in pictures)
    assert min(formats["JPEG"], formats["PNG"]) > 25
    assert all({"jpg": "JPEG", "png": "PNG"}[r.extension] == p.format for r, p in zip(rows, pictures, strict=True))


@pytest.mark.parametrize("axis", range(len(AXES)))
def test_objects_lie_where_the_scene_says(axis):
    red, blue = list(COLOURS).index("red"), list(COLOURS).index("blue")
    for seed in range(20):
        random = Random(seed)
        size = random.randrange(len(SIZES))
        scene = Scene(axis, Thing(random.randrange(18), red, size, 0), Thing(random.randrange(18), blue, 2 - size, 0))
        pixels = np.asarray(synthetic_scenes.draw(scene, 64, random), np.int32)
        # image coordinates (down, across) of each object's centre of mass
        first = np.argwhere(pixels[..., 0] - pixels[..., 2] > 60).mean(0)
        second = np.argwhere(pixels[..., 2] - pixels[..., 0] > 60).mean(0)
        apart = second - first
        along, across = (apart[1], apart[0]) if AXES[axis] == "left" else (apart[0], apart[1])
        assert along > abs(across)


def test_a_perfect_reader_stays_below_ninety_percent_but_finds_most():
    scenes_of_test = draw_scenes(0, "test", 1000)
    told = [synthetic_scenes.describe(scene, Random(index)) for index, scene in enumerate(scenes_of_test)]
    assert 0.8 < synthetic_scenes.ideal_recall(told, scenes_of_test) < 0.9


def test_ideal_recall_counts_what_a_caption_fits():
    ring, star = Thing(7, 0, 0, 0), Thing(3, 1, 1, 1)
    gallery = [Scene(0, ring, star), Scene(1, ring, star), Scene(0, star, ring), Scene(0, star, star)]
    exact = Caption("", (ring, star), 0)
    either_order = Caption("", (ring, star), -1)
    lone = Caption("", (Thing(3, -1, -1, -1),), -1)
    unknown = Caption("", (Thing(7, -1, 0, -1), star), -1)
    truths = list(synthetic_scenes.truth([exact, either_order, lone, unknown], gallery))
    assert [list(truth) for truth in truths] == [
        [True, False, False, False],
        [True, True, True, False],
        [True, True, True, True],
        [True, True, True, False],
    ]
    assert synthetic_scenes.ideal_recall([exact, either_order, lone, lone], gallery) == pytest.approx(
        (1 + 1 / 3 + 1 / 2) / 4
    )


def test_it_writes_to_a_url(tmp_path):
    synthesize(f"file://{tmp_path}/out", **SMALL)
    assert storage.exists(f"file://{tmp_path}/out/val/00000.parquet")
    assert len(from_parquet(tmp_path / "out" / "val")) == 100


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"pairs": 0}, "pairs"),
        ({"noise": 1.5}, "noise"),
        ({"broken": -0.1}, "broken"),
        ({"noise": 0.6, "broken": 0.6}, "noise 0.6 and broken 0.6"),
        ({"format": "csv"}, "format"),
        ({"image_size": 4}, "image_size"),
        ({"captions_per_image": 0}, "captions_per_image"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_knobs_are_named_before_anything_is_written(tmp_path, knobs, named):
    with pytest.raises(InputError, match=named) as caught:
        synthesize(str(tmp_path / "out"), **knobs)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_files_is_refused_and_an_empty_one_taken(tmp_path):
    synthesize(str(tmp_path), **SMALL)
    before = files(tmp_path)
    with pytest.raises(InputError, match="already holds files"):
        synthesize(str(tmp_path), **SMALL | {"pairs": 50})
    assert files(tmp_path) == before


def test_thousands_are_drawn_in_seconds():
    config = CorpusConfig(pairs=1000)
    start = time.process_time()
    assert sum(1 for _ in samples(config, "train")) == 1000
    assert time.process_time() - start < 2.5, "0.3 ms a pair on an idle core; 10,000 must stay far below a minute"


def test_every_scene_has_one_split():
    random = Random(0)
    shares = Counter(split_of(synthetic_scenes.draw_scene(random)) for _ in range(6000))
    assert all(abs(shares[split] / 6000 - 1 / 12) < 0.02 for split in ("val", "test"))
