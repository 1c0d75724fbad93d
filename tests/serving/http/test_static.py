"""The page's files are sent once: a client that names the version it has is answered 304, without a body."""

import http.client
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from serving.http.app import HttpApp
from serving.http.static import FOLDER
from tests.support.stand_in import StandInPool, listening, one

PATHS = ["/", "/docs", *sorted(f"/{path.name}" for path in FOLDER.iterdir())]
KEPT = ("etag", "cache-control", "content-security-policy", "referrer-policy", "x-content-type-options")
"""Headers that a cache takes over from a 304 into what it stores: they must be those of the whole reply."""
OTHER = '"another-version"'


@pytest.fixture(scope="module")
def app() -> HttpApp:
    return HttpApp(StandInPool())


@pytest.fixture(scope="module")
def address(app: HttpApp) -> Iterator[str]:
    with listening(app) as address:
        yield address


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("path", PATHS)
def test_a_file_that_the_client_has_is_not_sent_again(app: HttpApp, path: str, method: str) -> None:
    whole = one(app, path, method=method)
    reply = one(app, path, headers={"if-none-match": whole.headers["etag"]}, method=method)
    assert (whole.status, reply.status, reply.body) == (200, 304, b"")
    assert {name: reply.headers[name] for name in KEPT} == {name: whole.headers[name] for name in KEPT}
    assert reply.headers["x-triptych-model"] == whole.headers["x-triptych-model"] and reply.headers["x-request-id"]
    assert not {"content-length", "content-type"} & set(reply.headers)


@pytest.mark.parametrize(
    "form", ["{tag}", "W/{tag}", "{other}, {tag}", "{other},W/{tag} , {other}", ', {tag},, "a,b"', "*"]
)
def test_every_form_of_if_none_match_that_fits_is_understood(app: HttpApp, form: str) -> None:
    tag = one(app, "/page.js", method="GET").headers["etag"]
    asked = {"if-none-match": form.format(tag=tag, other=OTHER)}
    assert one(app, "/page.js", headers=asked, method="GET").status == 304


@pytest.mark.parametrize("form", ["{other}", "W/{other}, {other}", "{bare}", '"{bare}', '"x{bare}"', '"*"', ""])
def test_a_file_that_the_client_does_not_have_is_sent_whole(app: HttpApp, form: str) -> None:
    whole = one(app, "/page.js", method="GET")
    asked = {"if-none-match": form.format(other=OTHER, bare=whole.headers["etag"].strip('"'))}
    reply = one(app, "/page.js", headers=asked, method="GET")
    assert (reply.status, reply.body) == (200, whole.body)
    assert reply.headers["content-length"] == str(len(whole.body))


def test_two_files_have_two_tags(app: HttpApp) -> None:
    tags = {path: one(app, path, method="GET").headers["etag"] for path in PATHS}
    assert tags["/"] == tags["/index.html"] and tags["/docs"] == tags["/docs.html"]
    assert len(set(tags.values())) == len(PATHS) - 2
    assert one(app, "/page.css", headers={"if-none-match": tags["/page.js"]}, method="GET").status == 200


def test_a_condition_is_no_matter_for_other_methods_and_missing_files(app: HttpApp) -> None:
    assert one(app, "/", headers={"if-none-match": "*"}, method="POST").status == 404
    assert one(app, "/nothing.js", headers={"if-none-match": "*"}, method="GET").status == 404


def test_whatever_has_an_etag_is_answered_304(app: HttpApp) -> None:
    """Also for what is added later: any path that is answered with a tag must know it again."""
    paths = [*PATHS, "/openapi.json", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/shapes"]
    for path in paths:
        tag = one(app, path, method="GET").headers.get("etag")
        if tag is not None:
            assert one(app, path, headers={"if-none-match": tag}, method="GET").status == 304, path


def test_a_connection_goes_on_after_a_304(address: str) -> None:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=10)
    connection.request("GET", "/docs.js")
    whole = connection.getresponse()
    body, tag = whole.read(), whole.headers["etag"]
    for method in ("GET", "HEAD", "GET"):
        connection.putrequest(method, "/docs.js")
        connection.putheader("If-None-Match", OTHER)
        connection.putheader("If-None-Match", tag)  # two lines are one list
        connection.endheaders()
        reply = connection.getresponse()
        assert (reply.status, reply.read(), reply.headers["etag"]) == (304, b"", tag)
    connection.request("GET", "/docs.js")
    assert connection.getresponse().read() == body
    connection.close()
