"""Text from elsewhere, made safe to print: a prompt, a token, a file or a stranger's machine must not steer the terminal."""

from __future__ import annotations

import re

# what json.dumps leaves raw, and a terminal acts on or cannot be written as UTF-8: DEL, C1, halves of pairs
_RAW_IN_JSON = re.compile("[\x7f-\x9f\ud800-\udfff]")

# user:password@ or token@ in an address; a password may have an @ in it
_LOGIN = re.compile(r"(?<=://)[^/\s'\"]*@")


def without_logins(text: str) -> str:
    """The text with `***` for the login of every address in it, as HF_ENDPOINT may have one."""
    return _LOGIN.sub("***@", text)


def escape(text: str, keep: str = "") -> str:
    """Control characters, changes of direction and lone surrogates as backslash escapes; those in `keep` stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def safe_json(text: str) -> str:
    """JSON that says the same, without the characters that a terminal would act on."""
    return _RAW_IN_JSON.sub(lambda c: f"\\u{ord(c[0]):04x}", text)
