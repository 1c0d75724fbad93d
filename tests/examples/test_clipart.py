import importlib
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from models.config import InputError
from tests.support.paths import ROOT

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF>
<cc:Work><dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{keywords}</rdf:Bag></dc:subject>
<dc:publisher><cc:Agent><dc:title>Open Clip Art Library</dc:title></cc:Agent></dc:publisher>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator></cc:Work>
</rdf:RDF></metadata></svg>"""


@pytest.fixture
def clipart(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    yield importlib.import_module("clipart")
    for name in ("clipart", "clipart_captions"):
        sys.modules.pop(name, None)


def picture(seed: int, size: tuple[int, int] = (90, 60)) -> Image.Image:
    """A few random blocks on a transparent ground: different seeds, different outlines."""
    random, image = np.random.default_rng(seed), Image.new("RGBA", size)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        (x, y), (w, h) = random.integers(0, 50, 2), random.integers(8, 40, 2)
        pen.rectangle((x, y, x + w, y + h), fill=(*map(int, random.integers(0, 200, 3)), 255))
    return image


def add(folder: Path, name: str, title: str, image: Image.Image, description: str = "", keywords=(), author="") -> None:
    for kind in ("svg", "png"):
        (folder / kind / name).parent.mkdir(parents=True, exist_ok=True)
    bag = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    text = SVG.format(title=title, description=description, keywords=bag, author=author)
    (folder / "svg" / f"{name}.svg").write_text(text)
    image.save(folder / "png" / f"{name}.png")


def read(out: Path) -> dict[str, list[dict]]:
    return {path.parent.name: pq.read_table(path).to_pylist() for path in out.glob("*/*.parquet")}


def captions(clipart, folder: Path) -> dict[str, str]:
    return {entry.name: caption for entry, caption in clipart.captions(list(clipart.read_entries(folder)))}


def test_captions_keep_what_is_seen_and_drop_the_rest(tmp_path, clipart):
    cases = {
        "animals/tigre05_ann_lee_01": ("Tigre05", "", ["mammal", "hash", "cat"], "tigre"),
        "food/pie_bw": ("Apple_Pie_bw", "somebody@example.org", ["dessert"], "apple pie black and white, dessert"),
        "music/guitar1": ("guitar2", "acoustic guitar", ["musicstuff"], "acoustic guitar, musicstuff"),
        "tools/shovel": ("RoundPointShovel", "Created with the Inkscape", ["Ann Lee", "0x8b7"], "round point shovel"),
        "people/brain": ("Brain by Ann Lee", "HASH(0x85caca8)", ["brain", "anatomy"], "brain, anatomy"),
        "people/quote": ("Grampa&amp;#39;n Gramma", "", [], "grampa'n gramma"),
        "maps/flag": ("clipart", "", ["flag"], None),
        "icons/nothing": ("", "", ["icon", "computer"], None),
    }
    for seed, (name, (title, description, keywords, _)) in enumerate(cases.items()):
        add(tmp_path, name, title, picture(seed), description, keywords, "Ann Lee")
    for number in range(4):  # a title four pictures share names a collection
        add(tmp_path, f"icons/set{number}", "Lemon icons", picture(50 + number), keywords=["icon"])
    found = {name: caption.lower() for name, caption in captions(clipart, tmp_path).items()}
    expected = {name: case[3] for name, case in cases.items() if case[3]}
    expected["animals/tigre05_ann_lee_01"] = "tigre, mammal, cat"
    assert found == expected


def test_equal_captions_series_and_look_alikes_stay_in_one_split(tmp_path, clipart):
    for seed in range(200):
        add(tmp_path, f"misc/thing_{chr(97 + seed % 26)}{chr(97 + seed // 26)}", f"thing {seed}", picture(seed))
    words = iter(f"{a}{b}{c}" for a in ("ba", "do", "ke", "mi", "zu") for b in ("lo", "ra", "ti") for c in "ndlt")
    for family in range(20):
        image = picture(1000 + family)
        add(tmp_path, f"a/equal{chr(97 + family)}", f"equal {next(words)}", picture(2000 + family))
        add(tmp_path, f"b/other{chr(97 + family)}", f"look {next(words)}", image)
        close = image.copy()
        close.putpixel((3, 3), (9, 9, 9, 255))
        add(tmp_path, f"b/again{chr(97 + family)}", f"alike {next(words)}", close)
    for number in range(1, 4):
        add(
            tmp_path,
            f"c/castle_ann_lee_0{number}",
            f"castle {'abc'[number - 1] * 3}",
            picture(3000 + number),
            author="Ann",
        )
    entries = list(clipart.captions(list(clipart.read_entries(tmp_path))))
    pairs = [clipart.Pair(e, text, *clipart.load(tmp_path / "png" / f"{e.name}.png")) for e, text in entries]
    groups = clipart.families(pairs)
    home = {pairs[index].entry.name: number for number, group in enumerate(groups) for index in group}
    assert len({home[f"b/other{chr(97 + f)}"] for f in range(20)}) > 15, "different pictures are not all one family"
    assert all(home[f"b/other{chr(97 + f)}"] == home[f"b/again{chr(97 + f)}"] for f in range(20))
    parts = clipart.divide(groups, len(pairs))
    where = {index: split for split, indices in parts.items() for index in indices}
    assert sorted(where) == list(range(len(pairs)))
    assert all(len({where[index] for index in group}) == 1 for group in groups)


def test_series_are_known_by_their_file_names(clipart):
    entry = clipart.Entry
    names = ("a/castle_ann_lee_01", "b/castle_ann_l_02", "c/castle03", "d/castle_bw")
    assert {clipart.series(entry(name, "", "", (), ("Ann Lee",))) for name in names} == {"castle"}
    assert clipart.series(entry("a/castle_gate", "", "", (), ("Ann Lee",))) == "castle gate"


def test_build_writes_three_splits_of_small_pictures_over_white(tmp_path, clipart):
    folder, out = tmp_path / "in", tmp_path / "out"
    names = [f"{a}{b}{c}" for a in ("ba", "do", "ke", "mi", "zu") for b in ("lo", "ra", "ti", "pu") for c in "nd"]
    for seed, name in enumerate(names):
        add(folder, f"x/{name}", f"{name} drawing", picture(seed, (900, 600)))
    add(folder, "x/blank", "blank sheet", Image.new("RGBA", (50, 50)))
    add(folder, "x/broken", "broken thing", picture(99))
    (folder / "png/x/broken.png").write_bytes(b"not a picture")
    counts = clipart.build(folder, str(out))
    rows = read(out)
    assert counts == {split: len(rows[split]) for split in ("train", "val", "test")}
    assert sum(counts.values()) == 40 and counts["val"] == counts["test"] == 4
    every = [row for part in rows.values() for row in part]
    assert {row["id"] for row in every} == {f"x/{name}" for name in names}
    assert len({row["image_id"] for row in every}) == 40
    image = Image.open(io.BytesIO(every[0]["image"]))
    assert (image.mode, max(image.size)) == ("RGB", 256)
    assert image.getpixel((255, image.height - 1)) == (255, 255, 255)
    with pytest.raises(InputError, match="already holds files"):
        clipart.build(folder, str(out))


def test_the_same_pair_counts_once_and_a_caption_at_most_three_times(tmp_path, clipart):
    for number, seed in enumerate([1, 1, 2, 3, 4, 5]):
        add(tmp_path, f"x/man{number}", f"Man#{number}", picture(seed))
    out = tmp_path / "out"
    assert sum(clipart.build(tmp_path, str(out)).values()) == 3


def test_entities_are_refused_and_the_file_left_out(tmp_path, clipart):
    bomb = '<!DOCTYPE svg [<!ENTITY a "haha"><!ENTITY b "&a;&a;&a;&a;">]>'
    add(tmp_path, "x/good", "good thing", picture(1))
    add(tmp_path, "x/bomb", "bad &b; thing", picture(2))
    path = tmp_path / "svg/x/bomb.svg"
    path.write_text(path.read_text().replace("?>\n", f"?>\n{bomb}\n", 1))
    add(tmp_path, "x/torn", "torn thing", picture(3))
    (tmp_path / "svg/x/torn.svg").write_text("<svg><metadata>")
    assert list(captions(clipart, tmp_path)) == ["x/good"]
    with pytest.raises(ValueError, match="entities"):
        importlib.import_module("clipart_captions").parse_safely(path.read_bytes())


def test_links_and_the_folder_of_duplicates_are_left_out(tmp_path, clipart):
    add(tmp_path, "x/good", "good thing", picture(1))
    add(tmp_path, "unsorted/duplicates/good", "good thing too", picture(2))
    for kind in ("svg", "png"):
        (tmp_path / kind / f"x/link.{kind}").symlink_to(tmp_path / kind / f"x/good.{kind}")
    assert list(captions(clipart, tmp_path)) == ["x/good"]


def test_wrong_input_is_one_line_and_exit_code_one(tmp_path, clipart, monkeypatch, capsys):
    with pytest.raises(InputError, match="no folder svg"):
        clipart.build(tmp_path, str(tmp_path / "out"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert clipart.main([str(tmp_path / "out"), "--work", str(tmp_path / "work")]) == 1
    assert capsys.readouterr().err == "apt-get: not found; this example needs Debian or Ubuntu\n"
