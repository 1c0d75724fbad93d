"""Both pages in a headless browser: for the keyboard, on a phone, in the dark, read aloud; and what `/docs` says."""

import json
import re
import shlex
import urllib.error
import urllib.request
from itertools import pairwise

import pytest
from playwright.sync_api import expect

from tests.support.browser import FIELD, FIXTURES, Open, answered, fits

browser, page_pool, page_address, usual_page, tab = FIXTURES


def test_the_keyboard_alone_is_enough(tab: Open) -> None:
    visit = tab()
    page = visit.page
    expect(page.get_by_label("Model")).to_be_enabled()
    walked = []
    for _ in range(9):
        page.keyboard.press("Tab")
        walked.append(page.evaluate(WHO))
        assert page.evaluate(SEEN), walked[-1]
    assert walked == ["skip", "brand", "API", "version", "text", "pick", "go", "target", "rerank"]
    page.get_by_label(FIELD).focus()
    page.keyboard.type("purple triangle")
    page.keyboard.press("Enter")
    answered(visit)
    for _ in range(5):
        page.keyboard.press("Tab")
    expect(page.locator(".hit").first).to_be_focused()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    across = page.locator(".hit").evaluate_all(
        "(all) => all.filter((one) => one.offsetTop === all[0].offsetTop).length"
    )
    expect(page.locator(".hit").nth(1 + across)).to_be_focused()
    assert page.evaluate(SEEN)
    opened = visit.captions()[1 + across]
    page.keyboard.press("Enter")
    expect(page.locator("#query-caption")).to_have_text(opened)
    expect(page.locator("#results")).to_be_focused()


WHO = """(({ id, className, name, textContent }) => id || className || name || textContent)(document.activeElement)"""
SEEN = """(() => {
  const here = document.activeElement, ring = (one) => getComputedStyle(one);
  const mark = here.type === "radio" ? here.nextElementSibling : here;
  return (ring(mark).outlineStyle !== "none" && parseFloat(ring(mark).outlineWidth) >= 2) ||
    (here.id === "text" && ring(here.parentElement).boxShadow !== "none");
})()"""
"""Whether what has the focus shows it."""

TARGETS = """(all) => all.filter((one) => one.checkVisibility() && getComputedStyle(one).position !== "absolute")
  .map((one) => [one.outerHTML.slice(0, 60), one.closest("label")?.offsetHeight ?? one.offsetHeight])
  .filter(([, height]) => height < 40)"""


def test_a_phone_shows_all_without_scrolling_sideways(tab: Open) -> None:
    visit = tab(width=360, is_mobile=True, has_touch=True)
    assert fits(visit)
    visit.search("a green square and " + "w" * 60)
    assert fits(visit)
    visit.page.get_by_role("radio", name="Captions").check()
    answered(visit)
    assert fits(visit)
    visit.page.locator(".hit").first.click()
    expect(visit.page.locator("#query")).to_be_visible()
    answered(visit)
    assert fits(visit)
    assert visit.page.locator("button, select, input:not([type=file])").evaluate_all(TARGETS) == []
    visit.failing(400, message="a_" * 80)
    visit.enter("red")
    expect(visit.page.get_by_role("alert")).to_be_visible()
    assert fits(visit)
    assert fits(tab("docs", width=360, is_mobile=True))


def test_the_target_check_sees_small_targets(tab: Open) -> None:
    visit = tab()
    visit.page.locator("#pick").evaluate("(one) => { one.style.height = '20px'; }")
    assert len(visit.page.locator("button").evaluate_all(TARGETS)) == 1


PARTS = """(() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const field = (one) => one.matches("input, select");
  const named = (one) => one.ariaLabel || (field(one) ? one.labels[0]?.textContent : one.textContent)?.trim();
  const ids = all("[id]").map((one) => one.id);
  const points = ["for", "aria-labelledby", "aria-describedby"].flatMap((name) =>
    all(`[${name}]`).map((one) => one.getAttribute(name)));
  return {
    lang: document.documentElement.lang, title: document.title, headings: all("h1").length, mains: all("main").length,
    unnamed: all("button, input:not([type=file]), select, a, nav").filter((one) => !named(one)).length,
    images: all("img:not([alt])").length, twice: ids.filter((one, at) => ids.indexOf(one) !== at),
    broken: points.filter((id) => !document.getElementById(id)),
    positive: all("[tabindex]").filter((one) => one.tabIndex > 0).length,
  };
})()"""


@pytest.mark.parametrize(("path", "title"), [("#q=red+circle", "red circle: Triptych"), ("docs", "Triptych: API")])
def test_the_parts_of_a_page_are_named(tab: Open, path: str, title: str) -> None:
    visit = tab(path)
    visit.page.locator(".hit, .operation").first.wait_for()
    expected = {"lang": "en", "title": title, "headings": 1, "mains": 1, "images": 0, "positive": 0}
    assert visit.page.evaluate(PARTS) == expected | {"unnamed": 0, "twice": [], "broken": []}


def test_text_stands_out_in_light_and_dark(tab: Open) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        visit = tab(color_scheme=scheme)
        colours = visit.page.evaluate(COLOURS)
        for text, ground in PAIRS:
            assert contrast(colours[text], colours[ground]) >= 4.5, (scheme, text, ground)
        assert contrast(colours["edge"], colours["paper"]) >= 3
        grounds.append(colours["wall"])
    assert luminance(grounds[0]) > 0.7 and luminance(grounds[1]) < 0.05


PAIRS = [(text, ground) for text in ("ink", "soft", "accent") for ground in ("wall", "paper", "tint")]
PAIRS += [("bad", "bad-tint"), ("bad", "wall"), ("on-accent", "accent"), ("ink", "well"), ("soft", "well")]
COLOURS = """Object.fromEntries(
  ["ink", "soft", "accent", "wall", "paper", "tint", "bad", "bad-tint", "on-accent", "well", "edge"].map((name) => {
    const made = document.body.appendChild(document.createElement("i"));
    made.style.color = `var(--${name})`;
    return [name, getComputedStyle(made).color.match(/\\d+/g).map(Number)];
  }))"""


def luminance(rgb: list[int]) -> float:
    """WCAG's relative luminance."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (value / 255 for value in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG's contrast ratio."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_nothing_moves_where_that_is_asked_for(tab: Open) -> None:
    moving = "getComputedStyle(document.getElementById('progress'), '::before').animationName"
    visit = tab()
    assert visit.page.evaluate(moving) == "none"
    visit.page.emulate_media(reduced_motion="no-preference")
    assert visit.page.evaluate(moving) == "sweep"


# The documentation


def document_of(base: str) -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    with urllib.request.urlopen(base + "openapi.json", timeout=10) as reply:
        return json.load(reply)  # type: ignore[no-any-return]


def test_every_operation_is_shown_with_its_parts(tab: Open, page_address: str) -> None:
    visit = tab("docs")
    visit.page.locator(".operation").first.wait_for()
    operations = [
        (f"{method.upper()}{path}", operation)
        for path, methods in document_of(page_address)["paths"].items()
        for method, operation in methods.items()
    ]
    sections = visit.page.locator(".operation")
    assert sections.locator("h2").all_text_contents() == [name for name, _ in operations]
    assert visit.page.locator("#contents a").count() == len(operations)
    for number, (_, operation) in enumerate(operations):
        section = sections.nth(number)
        replies = section.locator(".replies > details > summary b, .replies > .row b").all_text_contents()
        assert replies == list(operation["responses"])
        names = [parameter["name"] for parameter in operation.get("parameters", [])]  # type: ignore[attr-defined]
        assert section.locator("h3:text-is('Parameters') + dl > div > dt > b").all_text_contents() == names
    search = sections.nth([name for name, _ in operations].index("POST/v1/search"))
    fields = search.locator("h3:has-text('application/json') ~ dl").first.locator("> div > dt > b").all_text_contents()
    assert fields == ["model", "text", "image", "id", "side", "target", "top_k", "rerank"]
    expect(search.get_by_text('"image" | "text", default "image"').first).to_be_visible()


def test_every_line_of_curl_is_answered(tab: Open) -> None:
    visit = tab("docs")
    visit.page.locator(".operation").first.wait_for()
    lines = visit.page.locator("figure pre[aria-label^=curl]").all_text_contents()
    statuses = {line: answer(shlex.split(line)) for line in lines if "{id}" not in line and " -F " not in line}
    assert len(statuses) >= 10 and set(statuses.values()) == {200}, statuses
    assert [line.split()[-1] for line in lines if " -F " in line] == ["'image=@image.jpg'"]


def answer(line: list[str]) -> int:
    """Status of what curl would ask."""
    headers = dict(given.split(": ") for option, given in pairwise(line) if option == "-H")
    body = next((given for option, given in pairwise(line) if option == "-d"), None)
    request = urllib.request.Request(line[1], body and body.encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return int(reply.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_a_place_in_the_document_can_be_linked_to(tab: Open) -> None:
    visit = tab("docs#post-v1-rerank")
    expect(visit.page.locator("#post-v1-rerank h2")).to_be_in_viewport()
    visit.page.get_by_role("link", name="GET /metrics").click()
    expect(visit.page.locator("#get-metrics h2")).to_be_in_viewport()


def test_a_document_that_does_not_come_is_told(tab: Open) -> None:
    visit = tab()
    visit.refused = True
    visit.page.route("**/openapi.json", lambda route: route.fulfill(status=503))
    visit.page.goto(visit.base + "docs")
    expect(visit.page.get_by_role("alert")).to_have_text(re.compile("cannot be shown: status 503"))
