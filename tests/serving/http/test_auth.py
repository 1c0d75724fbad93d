from pathlib import Path

import pytest

from models.config import InputError
from serving.http import auth
from serving.http.auth import VARIABLE, Keys, check_bind, is_loopback, read_keys

ONE, TWO, THREE = "first-key-of-a-test", "second:key-of-a-test", "third-key-of-a-test"


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def test_environment_and_file_are_both_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# who may ask\n\n  shop:{TWO}  \n{THREE}\n")
    found = read_keys(str(file), {VARIABLE: f"batch:{ONE}"})
    assert len(found) == 3
    assert [found.label_of(bearer(key)) for key in (ONE, TWO, THREE, "x" * 20)] == ["batch", "shop", "key-3", None]
    assert not read_keys("", {})


@pytest.mark.parametrize(
    "header", [b"", b"Bearer", b"Bearer ", ONE.encode(), b"Basic " + ONE.encode(), bearer(ONE[:-1]), bearer(ONE + "x")]
)
def test_anything_but_the_whole_key_is_nobodys(header: bytes) -> None:
    assert Keys({"shop": ONE}).label_of(header) is None


def test_the_scheme_may_be_written_in_any_case_and_bytes_may_be_any() -> None:
    assert Keys({"shop": ONE}).label_of(b"bearer  " + ONE.encode()) == "shop"
    assert Keys({"shop": ONE}).label_of(b"Bearer \xff\x00") is None


def test_every_key_is_compared_even_after_a_match(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    assert Keys({"a": ONE, "b": TWO, "c": THREE}).label_of(bearer(ONE)) == "a"
    assert len(compared) == 3 and {len(one) for pair in compared for one in pair} == {32}


@pytest.mark.parametrize(
    ("environment", "content", "says"),
    [
        ("short", None, "at least 16"),
        (f"a:{ONE},a:{THREE}", None, "labelled 'a'"),
        (f"a:{ONE}", f"a:{THREE}", "labelled 'a'"),
        (f"a:{ONE},b:{ONE}", None, "the same key"),
        (f":{ONE}", None, "empty label"),
        ("", "# nothing\n", "holds no API key"),
    ],
)
def test_doubtful_keys_are_refused(tmp_path: Path, environment: str, content: str | None, says: str) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=says) as raised:
        read_keys(str(file) if content is not None else "", {VARIABLE: environment})
    assert ONE not in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the API keys"):
        read_keys(str(tmp_path / "nothing"), {})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_bind(host, Keys({}), allow_open=False)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "", "10.0.0.5", "192.168.1.2", "example.com", "localhost.example.com"]
)
def test_elsewhere_needs_a_key_or_a_word(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match="no API key"):
        check_bind(host, Keys({}), allow_open=False)
    check_bind(host, Keys({"shop": ONE}), allow_open=False)
    check_bind(host, Keys({}), allow_open=True)
