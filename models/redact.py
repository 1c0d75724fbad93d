"""What may be said of a URL: one rule for every message, log line, record and page.

Users, passwords, queries and fragments may hold secrets (a password, a presigned URL's signature, a token), and no list
of their names is complete: all of them go. What is left names the place: scheme, host, port and path.
"""

import re

_URL = re.compile(r'(?<![\w+.-])([A-Za-z][\w+.-]*+)://([^\s"<>]*+)')
_SIGN_IN = re.compile(r'(?<![^\s/"<>])[^\s/"<>:@]*+:[^\s/"<>]*@')
"""`user:password@` of an address without a scheme, or with a mistyped one."""
_QUERY = re.compile(r'(?<=[^\s?])\?[\w.%\[\]-]++=[^\s"<>]*+')
"""The query of an address without scheme and host, as HTTP clients' errors quote it."""
_AFTER = ":;,.)]}'"
"""What may follow a URL in a sentence, and is none of it."""
_FILES = frozenset({"s3", "gs", "gcs", "file"})
"""Schemes of files, where a fragment names a sample of the file, and no store gives it a meaning."""


def redact(text: str) -> str:
    """`text` without the secrets of the URLs in it: `***@` for user and password, nothing for query and fragment.

    The fragment of a file's URL stays (FILE#row=N, FILE#MEMBER). A URL ends at white space, `"`, `<` or `>`. Where a
    password cannot be told from a path or a query (`scheme://a:b/c@d`), both go. Redacting twice changes nothing.
    """
    return _SIGN_IN.sub("***@", _QUERY.sub("", _URL.sub(_place, text)))


def _place(url: re.Match[str]) -> str:
    """One URL's scheme, host, port and path, and what follows it in the sentence."""
    scheme, whole = url.groups()
    rest = whole.rstrip(_AFTER)
    return f"{scheme}://{_without_query(scheme.lower(), _without_user(rest))}{whole[len(rest) :]}"


def _without_user(rest: str) -> str:
    """What comes after `user:password@`; a password may hold `@ / ? #` unquoted, which database drivers take."""
    user, at, place = rest.rpartition("@")
    if not at or not re.match("[^/?#]*[:@]", rest):  # no @, or one in the path only
        return rest
    return "***" if re.search("[?#]", user) else f"***@{place}"  # in the first case @ may be part of a query


def _without_query(scheme: str, rest: str) -> str:
    bare, _, fragment = rest.partition("?")[0].partition("#")
    return f"{bare}#{fragment}" if fragment and scheme in _FILES else bare
