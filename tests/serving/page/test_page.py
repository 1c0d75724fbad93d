"""The page at `/` in a headless browser: what it finds and shows."""

import base64
import io
import json
import re
from urllib.parse import parse_qs

from PIL import Image
from playwright.sync_api import Route, expect

from models.preprocess import resize_for_eval
from tests.support.browser import FIELD, FIXTURES, Open, a_file, answered, expected_hits, in_transfer, shown
from tests.support.stand_in import (
    SIZE,
    StandInPool,
    as_file,
    drawing,
    image_vector,
    make_corpus,
    match_probability,
    text_vector,
)

browser, page_pool, page_address, usual_page, tab = FIXTURES

# What is found


def test_words_find_images_in_order_with_their_scores(tab: Open) -> None:
    visit = tab()
    visit.search("red circle")
    assert shown(visit) == expected_hits(text_vector("red circle"))
    assert visit.asked == [{"text": "red circle", "target": "image", "top_k": 24}]
    expect(visit.page.get_by_role("status")).to_have_text("18 images, by cosine similarity.")
    expect(visit.page.locator("#answered")).to_have_text(
        re.compile(r"Answered by shapes/3 in \d+ ms, embedding space space-of-shapes-3")
    )
    loaded = "(all) => all.every((one) => one.complete && one.naturalWidth > 0)"
    assert visit.page.locator(".hit img").evaluate_all(loaded)


def test_a_hit_without_thumbnail_shows_its_caption_in_its_place(tab: Open) -> None:
    visit = tab()
    visit.search("red circle")
    tile = visit.page.locator(".hit", has=visit.page.locator(".words"))
    expect(tile).to_have_count(1)
    expect(tile.locator(".image")).to_have_text("A red circle.")
    assert tile.locator("img").count() == 0


def test_captions_are_found_too(tab: Open) -> None:
    visit = tab()
    visit.page.get_by_role("radio", name="Captions").check()
    visit.search("green square")
    assert shown(visit) == expected_hits(text_vector("green square"), "text")


def test_markup_in_a_caption_stays_text(tab: Open) -> None:
    visit = tab()
    bad = "<img src=x onerror=alert(1)><b>bold</b>"
    hit = {"object": "search_hit", "index": 0, "id": bad, "score": 0.5, "caption": bad, "thumbnail": None}
    visit.page.route("**/v1/search", lambda route: route.fulfill(json={"object": "list", "data": [hit]}))
    visit.search(bad)
    expect(visit.page.locator(".hit .image")).to_have_text(bad)
    visit.page.locator(".hit").click()
    expect(visit.page.locator("#query-caption")).to_have_text(bad)
    assert visit.page.locator("main b:has-text('bold'), main img[src='x']").count() == 0


def test_more_can_be_shown(tab: Open) -> None:
    visit = tab()

    def many(route: Route) -> None:
        count = json.loads(route.request.post_data or "")["top_k"]
        row = {"object": "search_hit", "score": 0.5, "thumbnail": None}
        route.fulfill(json={"data": [row | {"index": n, "id": str(n), "caption": f"row {n}"} for n in range(count)]})

    visit.page.route("**/v1/search", many)
    visit.search("anything")
    visit.page.get_by_role("button", name="Show more").click()
    expect(visit.page.locator(".hit")).to_have_count(48)
    expect(visit.page.locator(".hit").nth(24)).to_be_focused()


# Images


def test_a_chosen_image_is_sent_as_it_is_where_it_is_small(tab: Open) -> None:
    visit, content = tab(), as_file(drawing("blue", "square"))
    visit.page.set_input_files("#file", a_file("square.jpg", content))
    answered(visit)
    assert visit.asked[0]["image"] == "data:image/jpeg;base64," + base64.b64encode(content).decode()
    assert visit.captions()[:3] == [caption for caption, _ in _by_image(content)[:3]]
    expect(visit.page.locator("#query-caption")).to_have_text("square.jpg")
    assert content[:60].hex() not in visit.page.url and "image%2F" not in visit.page.url
    assert len(visit.page.url) < len(visit.base) + 40


def _by_image(content: bytes) -> list[tuple[str, str]]:
    return expected_hits(image_vector(resize_for_eval(Image.open(io.BytesIO(content)), SIZE)))


def test_a_dropped_image_is_scaled_down_over_white(tab: Open) -> None:
    visit = tab()
    large = Image.new("RGBA", (1600, 800), (0, 0, 0, 0))
    large.paste((40, 80, 220, 255), (400, 200, 1200, 600))
    transfer = in_transfer(visit, "large.png", "image/png", as_file(large, "PNG"))
    visit.page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(visit.page.get_by_text("Drop the image to search with it")).to_be_visible()
    visit.page.dispatch_event("#start", "drop", {"dataTransfer": transfer})
    answered(visit)
    expect(visit.page.locator("#drop")).to_be_hidden()
    kind, data = visit.asked[0]["image"].split(",")
    sent = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    assert (kind, sent.size) == ("data:image/jpeg;base64", (512, 256))
    corner, middle = sent.getpixel((4, 4)), sent.getpixel((256, 128))
    assert max(abs(a - b) for a, b in zip((*corner, *middle), (255, 255, 255, 40, 80, 220), strict=True)) <= 6
    assert "blue" in visit.captions()[0]


def test_a_pasted_image_is_searched(tab: Open) -> None:
    visit = tab()
    transfer = in_transfer(visit, "", "image/png", as_file(drawing("green", "circle"), "PNG"))
    paste = "(to, data) => to.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))"
    visit.page.get_by_label(FIELD).evaluate(paste, transfer)
    answered(visit)
    assert "green" in visit.captions()[0]


def test_a_file_that_is_no_image_is_refused_before_it_is_sent(tab: Open) -> None:
    visit = tab()
    visit.page.set_input_files("#file", {"name": "a.pdf", "mimeType": "application/pdf", "buffer": b"%PDF"})
    expect(visit.page.get_by_role("alert")).to_contain_text("This file is not an image.")
    assert visit.asked == []


def test_a_damaged_image_is_the_services_to_judge(tab: Open) -> None:
    visit = tab()
    visit.refused = True
    visit.page.set_input_files("#file", a_file("damaged.jpg", b"\xff\xd8\xff not an image"))
    expect(visit.page.get_by_role("alert")).to_contain_text("The service cannot use this image.")
    expect(visit.page.locator("#query-caption")).to_have_text("damaged.jpg")
    assert visit.page.locator(".hit").count() == 0


# Neighbours and history


def test_a_hit_leads_to_its_neighbours_and_back_again(tab: Open) -> None:
    visit = tab()
    visit.search("yellow triangle")
    before = shown(visit)
    visit.page.locator(".hit").nth(1).click()
    expect(visit.page.locator("#query-title")).to_have_text("Nearest to this image")
    answered(visit)
    row = next(n for n, hit in enumerate(make_corpus().hits) if hit.caption == before[1][0])
    assert visit.asked[-1]["id"] == make_corpus().hits[row].id and visit.asked[-1]["side"] == "image"
    assert shown(visit) == expected_hits(make_corpus().vectors["image"][row])[1:]  # without itself
    expect(visit.page.locator("#query-caption")).to_have_text(before[1][0])
    visit.page.go_back()
    expect(visit.page.get_by_label(FIELD)).to_have_value("yellow triangle")
    expect(visit.page.locator("#query")).to_be_hidden()
    answered(visit)
    assert shown(visit) == before
    visit.page.go_back()
    expect(visit.page.get_by_text("choose an image")).to_be_visible()
    assert visit.page.locator(".hit").count() == 0


def test_the_address_alone_brings_a_search_back(tab: Open) -> None:
    visit = tab()
    visit.page.get_by_role("radio", name="Captions").check()
    visit.search("blue & red, 100 %")
    again = tab(visit.page.url.removeprefix(visit.base))
    answered(again)
    assert again.asked == visit.asked
    expect(again.page.get_by_label(FIELD)).to_have_value("blue & red, 100 %")
    assert parse_qs(again.page.url.split("#")[1]) == {"q": ["blue & red, 100 %"], "target": ["text"]}


def test_a_image_is_gone_after_a_reload_and_the_page_says_so(tab: Open) -> None:
    visit = tab()
    visit.page.set_input_files("#file", a_file("a.jpg", as_file(drawing("red", "square"))))
    answered(visit)
    visit.page.reload()
    expect(visit.page.get_by_role("alert")).to_contain_text("The image of this search is gone.")
    expect(visit.page.locator("body")).not_to_have_class("busy")


def test_the_page_says_that_a_search_is_under_way(tab: Open) -> None:
    visit = tab()
    held: list[Route] = []
    visit.page.route("**/v1/search", lambda route: held.append(route))
    visit.enter("red square")
    expect(visit.page.get_by_role("status")).to_have_text("Searching.")
    expect(visit.page.locator("#results")).to_have_attribute("aria-busy", "true")
    expect(visit.page.locator("#progress")).to_be_visible()
    held[0].continue_()
    answered(visit)
    expect(visit.page.locator("#progress")).to_be_hidden()
    assert visit.page.locator("#results").get_attribute("aria-busy") is None


def test_an_overtaken_reply_is_never_shown(tab: Open, page_pool: StandInPool) -> None:
    visit = tab()
    calls = len(page_pool.model.calls)
    page_pool.model.delay = 0.3
    visit.enter("red square")
    while len(page_pool.model.calls) == calls:
        visit.page.wait_for_timeout(5)
    page_pool.model.delay = 0.0
    visit.search("blue circle")
    visit.page.wait_for_timeout(700)  # the first one's search and its index take 0.3 s each
    assert shown(visit) == expected_hits(text_vector("blue circle"))
    assert [asked["text"] for asked in visit.asked] == ["red square", "blue circle"]


# Versions and re-ranking


def test_another_version_is_asked_for_by_its_header(tab: Open) -> None:
    visit = tab()
    visit.search("red circle")
    select = visit.page.get_by_label("Model")
    assert select.locator("option").all_text_contents() == ["shapes/3 (current)", "shapes/2"]
    select.select_option("shapes/2")
    expect(visit.page.locator("#answered")).to_contain_text("shapes/2")
    expect(visit.page.locator("#answered")).to_contain_text("space-of-shapes-2")
    expect(visit.page.locator("#rerank")).to_be_hidden()
    select.select_option(label="shapes/3 (current)")
    expect(visit.page.locator("#answered")).to_contain_text("shapes/3")
    assert visit.versions == [None, "shapes/2", None]


def test_a_version_that_is_gone_is_named(tab: Open) -> None:
    visit = tab("#q=red&version=shapes%2F1")
    visit.refused = True
    expect(visit.page.get_by_role("alert")).to_contain_text("not loaded any more")
    expect(visit.page.get_by_label("Model")).to_have_value("shapes/1")
    visit.page.get_by_label("Model").select_option("shapes/2")
    answered(visit)
    assert visit.versions == ["shapes/1", "shapes/2"]


def test_an_alarm_is_told(tab: Open, page_pool: StandInPool) -> None:
    page_pool.alarm = "shapes/4: health vectors differ"
    try:
        expect(tab().page.get_by_text("A newer version is not served: shapes/4: health vectors differ")).to_be_visible()
    finally:
        page_pool.alarm = ""


def test_re_ranking_orders_by_match_probability(tab: Open) -> None:
    visit = tab()
    visit.search("red circle")
    visit.page.get_by_label("Re-rank").check()
    expect(visit.page.get_by_role("status")).to_contain_text("re-ranked by match probability")
    corpus = make_corpus()
    scored = [
        (hit.caption, match_probability("red circle", corpus.pixels[hit.uri]))
        for hit in corpus.hits
        if hit.uri in corpus.pixels
    ]
    best = sorted(scored, key=lambda one: -one[1])
    assert shown(visit)[:-1] == [(caption, f"{score:.3f}") for caption, score in best]  # the last one's file is gone
    assert visit.asked[-1]["rerank"] is True
    visit.page.get_by_role("radio", name="Captions").check()
    expect(visit.page.get_by_text("only between words and images")).to_be_visible()
    expect(visit.page.get_by_label("Re-rank")).to_be_disabled()
    answered(visit)
    assert "rerank" not in visit.asked[-1]


def test_a_link_with_re_ranking_is_answered_with_it(tab: Open) -> None:
    visit = tab("#q=red+circle&rerank=1")
    expect(visit.page.get_by_role("status")).to_contain_text("re-ranked by match probability")
    expect(visit.page.get_by_label("Re-rank")).to_be_checked()
    assert [asked.get("rerank") for asked in visit.asked] == [True]
