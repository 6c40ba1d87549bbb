"""Keeps secrets out of what is printed, logged and stored: stars instead of values that this process knows as secret."""

from __future__ import annotations

import logging
import os
import re
from urllib.parse import urlsplit

_SHORTEST = 6
_NAMES = re.compile(
    r"(SECRET|PASSWORD|PASSWD|TOKEN(?!IZER)|CREDENTIAL|PRIVATE_KEY|API_?KEY|_PASS$)(?!.*_(PATH|FILE|URI)$)"
)
_known: set[str] = set()


def is_secret(name: str) -> bool:
    """Whether a variable or a field of this name holds a secret."""
    return name in _known or _NAMES.search(name.upper()) is not None


def know(*names: str) -> None:
    """From now on the values of these environment variables are secrets, whatever their names."""
    _known.update(names)


def masked(text: str) -> str:
    """`text` without the secrets of this process's environment and without passwords in addresses."""
    values = set()
    for name, value in os.environ.items():
        if "://" in value:
            # of an address only the password is secret
            value = _password(value)
        elif not is_secret(name):
            continue
        if len(value) >= _SHORTEST:
            values.add(value)
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER.sub(r"\1***@", text)


_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^/\s:@]*:)[^/\s@]+@")


def _password(address: str) -> str:
    try:
        return urlsplit(address).password or ""
    except ValueError:
        return ""


class Formatter(logging.Formatter):
    """A log formatter whose lines, tracebacks included, hold no secret."""

    def format(self, record: logging.LogRecord) -> str:
        return masked(super().format(record))
