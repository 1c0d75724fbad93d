"""The page at `/` in a headless browser: what goes wrong is told in words, and the key is asked for."""

import re

import pytest
from playwright.sync_api import expect

from serving.http.auth import Keys
from tests.support.browser import FIXTURES, Open, answered, expected_hits, page_server
from tests.support.stand_in import StandInPool, StandInVersion, text_vector

browser, page_pool, page_address, usual_page, tab = FIXTURES
KEY = "correct-horse-battery-staple"


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"retry-after": "7"}, "The service is full. Try again in 7 seconds."),
        (413, {}, "This is too large for the service. m"),
        (400, {}, "The service cannot answer this. m"),
        (422, {}, "The service did not understand the request. m"),
        (500, {}, "Something went wrong in the service. m"),
        (
            503,
            {"retry-after": "5"},
            "The service is not ready. It may still be loading its model. Try again in 5 seconds.",
        ),
        (504, {}, "The service took too long. It gave this search up. Try again when it is less busy."),
    ],
)
def test_an_error_is_told_in_words(tab: Open, status: int, headers: dict[str, str], words: str) -> None:
    visit = tab()
    visit.failing(status, headers)
    visit.enter("red")
    alert = visit.page.get_by_role("alert")
    expect(alert).to_contain_text(re.compile("."))
    assert " ".join(alert.locator("strong, .detail").all_text_contents()) == words
    again = alert.get_by_role("button", name="Try again")
    assert again.count() == (status >= 429)
    if again.count():
        visit.page.unroute("**/v1/search")
        again.click()
        answered(visit)
        expect(alert).to_be_empty()


def test_an_error_page_of_something_in_between_is_told_too(tab: Open) -> None:
    visit = tab()
    visit.page.route("**/v1/search", lambda route: route.fulfill(status=200, body="<html>log in first</html>"))
    visit.enter("red")
    expect(visit.page.get_by_role("alert")).to_contain_text("The answer was not understood.")


def test_a_service_that_is_gone_is_told(tab: Open) -> None:
    visit = tab()
    visit.search("red")
    visit.refused = True
    visit.page.route("**/v1/search", lambda route: route.abort())
    visit.enter("blue")
    expect(visit.page.get_by_role("alert")).to_contain_text("The service cannot be reached.")
    expect(visit.page.locator("#answered")).to_be_empty()
    assert visit.page.locator(".hit").count() == 0


def test_a_service_without_index_says_how_to_get_one(tab: Open) -> None:
    with page_server(StandInPool(StandInVersion(index=False))) as address:
        visit = tab(at=address)
        visit.refused = True
        expect(visit.page.get_by_text("no index loaded")).to_be_visible()
        visit.enter("red")
        expect(visit.page.get_by_role("alert")).to_contain_text("triptych serve MODEL --index URI")


def test_the_key_is_asked_for_and_kept_in_this_tab_only(tab: Open) -> None:
    with page_server(StandInPool(), Keys({"page": KEY})) as address:
        visit = tab(at=address)
        visit.refused = True
        field = visit.page.get_by_label("API key", exact=True)
        expect(field).to_be_focused()
        field.fill("not-the-right-key-at-all")
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_text("The API key was not accepted.")).to_be_visible()
        field.fill(KEY)
        visit.page.keyboard.press("Enter")
        expect(visit.page.get_by_label("Model")).to_have_text(re.compile("shapes/3"))
        expect(field).to_be_hidden()
        visit.search("red circle")
        assert visit.captions()[0] == expected_hits(text_vector("red circle"))[0][0]
        kept = visit.page.evaluate(
            "[Object.values(sessionStorage), Object.values(localStorage), document.cookie, location.href]"
        )
        assert kept[:3] == [[KEY], [], ""] and KEY not in kept[3]
        visit.page.get_by_role("button", name="Forget the API key").click()
        expect(visit.page.get_by_text("This service asks for an API key")).to_be_visible()
        assert visit.page.evaluate("sessionStorage.length") == 0
