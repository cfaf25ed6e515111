"""Text for people and records, without the passwords that URIs in it hold."""

from __future__ import annotations

import re

HIDDEN = "***"
_USER = re.compile(r"(\w://[^\s:/@]*):\S*@")  # scheme://user:password@, up to the last @ of the word
_OPTION = re.compile(r"([?&](?:password|passwd|token|secret|api_?key)=)[^&\s'\"]+", re.IGNORECASE)


def without_passwords(text: str) -> str:
    """The text with `***` for every password of a URI."""
    return _OPTION.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1:{HIDDEN}@", text))
