"""Captions for `clipart.py`: what the RDF in an SVG says of its picture, without what no picture can show."""

import html
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

from models.config import InputError

COMMON = 3
"""A title or description that more pictures than this carry names a collection; a caption is kept so often at most."""

_DC = "{http://purl.org/dc/elements/1.1/}"
_KEYWORDS = 4  # keywords a caption takes at most
_WORDS = 20  # longer descriptions tell stories about the picture instead of what it shows
_NOT_SEEN = re.compile(
    r"[<@]|https?:|www\.|hash\(|\b0x\w|\b(inkscape|sodipodi|svg|eps|clip ?arts?|vector\w*|autotraced|collection|theme"
    r"|submission|untitled|file|copyright|public domain|openclipart|created?|contact|license|colou?ring|free)\b",
    re.IGNORECASE,
)
_EMPTY_WORDS = {
    "hash",
    "unsorted",
    "special",
    "magick",
    "mimetypes",
    "filesystem",
    "mapsym",
    "signs and symbols",
    "menu",
}
_BLACK_WHITE = re.compile(r"\(?\b(b ?(and|&) ?w|bw|b/w)\b\)?", re.IGNORECASE)

log = logging.getLogger("clipart")


@dataclass(frozen=True)
class Entry:
    """One clip art as its metadata tells it; `name` is its path without suffix, relative to the svg folder."""

    name: str
    title: str
    description: str
    keywords: tuple[str, ...]
    authors: tuple[str, ...]


def parse_safely(data: bytes) -> ElementTree.Element:
    """The document's root; ValueError where it is not XML or declares entities (they could expand without end)."""

    def refuse(*_: object) -> None:
        raise ValueError("declares entities")

    guard = expat.ParserCreate()
    guard.EntityDeclHandler = refuse
    try:
        guard.Parse(data, True)
        return ElementTree.fromstring(data)
    except (expat.ExpatError, ElementTree.ParseError) as error:
        raise ValueError(f"not XML: {error}") from None


def read_entries(folder: Path) -> Iterator[Entry]:
    """Entries of FOLDER/svg with a PNG beside them in FOLDER/png; links and the collection of duplicates left out."""
    if not (folder / "svg").is_dir():
        raise InputError(f"{folder}: has no folder svg")
    for path in sorted((folder / "svg").rglob("*.svg")):
        name = path.relative_to(folder / "svg").with_suffix("").as_posix()
        if path.is_symlink() or "duplicates/" in name or not (folder / "png" / f"{name}.png").is_file():
            continue
        try:
            root = parse_safely(path.read_bytes())
        except ValueError as error:
            log.debug("%s: left out: %s", name, error)
            continue
        work = next((node for node in root.iter() if node.tag.endswith("}Work")), None)
        if work is not None:
            yield _entry(name, work)


def _entry(name: str, work: ElementTree.Element) -> Entry:
    """What the RDF says of the picture."""

    def texts(tag: str) -> tuple[str, ...]:
        """Texts anywhere below the picture's own fields of that name."""
        nodes = (node for field in work.findall(_DC + tag) for node in field.iter())
        return tuple(line for node in nodes if (line := _line(node.text)))

    return Entry(
        name=name,
        title=_line(work.findtext(_DC + "title")),
        description=_line(work.findtext(_DC + "description")),
        keywords=texts("subject"),
        authors=texts("creator") + texts("rights"),
    )


def _line(text: str | None) -> str:
    return " ".join(html.unescape(text or "").split())


# ---- captions


def captions(entries: list[Entry]) -> Iterator[tuple[Entry, str]]:
    """Entries whose metadata say what is seen, with the caption made of it."""
    titles = Counter(entry.title for entry in entries)
    descriptions = Counter(entry.description for entry in entries)
    for entry in entries:
        title = "" if titles[entry.title] > COMMON else _readable(entry.title, entry)
        description = "" if descriptions[entry.description] > COMMON else _readable(entry.description, entry)
        if len(description.split()) > _WORDS:
            description = ""
        if not set(words_of(title)) - set(words_of(description)):  # the description says it all, and better
            title = ""
        elif not set(words_of(description)) - set(words_of(title)):
            description = ""
        said = [part for part in (title, description) if part]
        if said:
            yield entry, ", ".join([*said, *_new_keywords(entry, " ".join(said))])


def _readable(text: str, entry: Entry) -> str:
    """The text as words: no collection, file or author name, no serial number; "" where nothing is left."""
    text = re.sub(r"^clip ?art by [^-]* - ", "", text, flags=re.IGNORECASE)
    text = re.sub(r"\.(svg|png)$| - RPG map elements$| in SVG format$| - body part$|\s*\|.*", "", text)
    if _NOT_SEEN.search(text) or len(text) > 200:
        return ""
    for author in [*entry.authors, *(word for name in entry.authors for word in name.split() if len(word) > 4)]:
        text = re.sub(rf"(\bby )?\b{re.escape(author)}\b", "", text, flags=re.IGNORECASE)
    text = _BLACK_WHITE.sub("black and white", text.replace("_", " "))
    text = re.sub(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Za-z])-(?=[A-Za-z])", " ", text)  # CamelCase and hyphens
    text = re.sub(r"(?<=[^\W\d])\d+\b|#\s*\d+|\s+0*\d+$", "", text)  # tigre05, man#102, photo 3
    text = " ".join(text.split()).strip(" ,.-:;")
    return text if len(re.findall(r"[^\W\d_]", text)) > 2 else ""


def _new_keywords(entry: Entry, said: str) -> list[str]:
    """Keywords that say more than `said`."""
    known = {_stem(word) for word in words_of(said)}
    chosen: list[str] = []
    for keyword in entry.keywords:
        words = keyword.replace("_", " ").lower()
        fresh = {_stem(word) for word in words_of(words)} - known
        author = any(words in name.lower() or name.lower() in words for name in entry.authors)
        dull = author or words in _EMPTY_WORDS or _NOT_SEEN.search(words) or not 2 < len(words) < 20
        if fresh and not dull and words not in said.lower().replace(" ", ""):  # "guineabissau"
            chosen.append(words)
            known |= fresh
    return chosen[:_KEYWORDS]


def _stem(word: str) -> str:
    return word.rstrip("s")


def words_of(text: str) -> tuple[str, ...]:
    """What makes captions equal: their words in order of the alphabet, without numbers, letters and colouring."""
    words = set(re.findall(r"[^\W\d_]{2,}", text.lower()))
    return tuple(sorted(words - {"the", "of", "and", "an", "in", "on", "with", "black", "white", "this", "is"}))
