"""The page of a training run: whole in one file, escaped, right images marked."""

from html.parser import HTMLParser

import pytest

from pipelines.report.page import ContactRow, TrainingPage, training_report
from tests.support.pairs import png


class Collector(HTMLParser):
    """Tags with attributes, in order; checks that what is opened is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag


def page(**changes) -> TrainingPage:
    row = ContactRow("a <b>red</b> & round ring", [png("red"), png("blue")], [False, True], "remark <i>")
    values = {
        "title": "run <script>alert(1)</script>",
        "lead": "5 < 6",
        "facts": {"data": "s3://bucket/<x>"},
        "recall": {f"image_retrieval_recall_at_{k}": k / 100 for k in (1, 5, 10)}
        | {"images": 200.0, "captions": 200.0},
        "contact_sheet": [row],
        "validation": {"image_retrieval_recall_at_1": [(0, 0.0), (100, 0.1)]},
        "losses": {"<cma>": [(0, 5.0), (1, 4.0)]},
    }
    return TrainingPage(**values | changes)


def test_a_page_needs_nothing_from_outside_and_runs_no_script(tmp_path):
    training_report(tmp_path / "new" / "report.html", page())
    html = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    tags = Collector(html).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    addresses = [value for _, attrs in tags for name, value in attrs.items() if name in ("src", "href", "srcset")]
    assert addresses and all((value or "").startswith("data:image/png;base64,") for value in addresses)
    assert "url(" not in html and "@import" not in html and "http" not in html


def test_every_text_is_escaped(tmp_path):
    training_report(tmp_path / "report.html", page())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for raw in ("<script>", "<b>red", "<i>", "<x>", "<cma>"):
        assert raw not in html
    assert "a &lt;b&gt;red&lt;/b&gt; &amp; round ring" in html and "&lt;cma&gt;" in html


def test_right_images_are_marked_by_border_tick_and_words(tmp_path):
    training_report(tmp_path / "report.html", page())
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    hits = html.split('<ol class="hits">')[1].split("</ol>")[0].split("</li>")
    assert "right" not in hits[0] and "✓" not in hits[0]
    assert "class=right" in hits[1] and "✓" in hits[1] and 'alt="Rank 2, right"' in hits[1]


def test_empty_parts_are_left_out(tmp_path):
    training_report(tmp_path / "report.html", TrainingPage("only a title"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<section>" not in html and "only a title" in html


def test_images_of_another_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="JPEG, PNG"):
        training_report(tmp_path / "report.html", page(contact_sheet=[ContactRow("a", [b"<svg/>"], [True])]))
