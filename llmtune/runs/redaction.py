"""Keeps secrets out of everything that a run writes down."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

HIDDEN = "[redacted]"

# HF_TOKEN, WANDB_API_KEY, DB_PASSWORD ...; not TOKENIZERS_PARALLELISM, and not HF_TOKEN_PATH, which names a file.
_SECRET_NAME = re.compile(r"(TOKEN(?!IZ)|SECRET|PASSWORD|API_KEY)(?!.*_(PATH|FILE|DIR)$)", re.IGNORECASE)
# --set model.token=…; not token_budget, and not the number of tokens.
_SECRET_KEY = re.compile(r"(?:^|[._-])(?:token|secret|password|api_?key)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_URL_PASSWORD = re.compile(r"(://[^\s:/@]*:)[^\s/@]+(?=@)")
_URL_PARAMETER = re.compile(r"([?&][\w-]*(?:token|secret|password|api_?key)=)[^\s&\"'#]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(Bearer )[\w.~+/=-]{6,}", re.IGNORECASE)

# Shorter values ("1", "true", "none") are switches, not secrets, and would blot out ordinary words.
_SHORTEST_SECRET = 6


def secrets_of(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> list[str]:
    """The values in ``environment`` and after ``key=`` in ``arguments`` that must never be written, longest first."""
    found = {value for name, value in environment.items() if _SECRET_NAME.search(name)}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--set=").partition("=")
        if equals and _SECRET_KEY.search(key.strip()):
            found |= {value, value.strip().strip("\"'")}
    return sorted((value for value in found if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def redactor(environment: Mapping[str, str], arguments: Sequence[str] = ()) -> Callable[[str], str]:
    """A function that replaces by ``[redacted]`` the secrets of ``environment`` and ``arguments``.

    Hub tokens, and what stands where passwords stand in URLs and headers, are replaced wherever they come from.
    """
    secrets = secrets_of(environment, arguments)

    def hide(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        text = _URL_PASSWORD.sub(rf"\1{HIDDEN}", _HUB_TOKEN.sub(HIDDEN, text))
        return _BEARER.sub(rf"\1{HIDDEN}", _URL_PARAMETER.sub(rf"\1{HIDDEN}", text))

    return hide


def own_redactor() -> Callable[[str], str]:
    """The redactor of this process: its environment and its command line."""
    return redactor(os.environ, sys.argv)


def redact(text: str) -> str:
    """``text`` without the secrets of this process; used for everything that a run writes."""
    return own_redactor()(text)
