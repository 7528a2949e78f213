"""Keeps secrets out of everything that a run writes down."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping

HIDDEN = "[redacted]"

# HF_TOKEN, WANDB_API_KEY, DB_PASSWORD ...; not TOKENIZERS_PARALLELISM, and not HF_TOKEN_PATH, which names a file.
_SECRET_NAME = re.compile(r"(TOKEN(?!IZ)|SECRET|PASSWORD|API_KEY)(?!.*_(PATH|FILE|DIR)$)", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}\b")
_URL_PASSWORD = re.compile(r"(://[^\s:/@]+:)[^\s/@]+(?=@)")

# Shorter values ("1", "true", "none") are switches, not secrets, and would blot out ordinary words.
_SHORTEST_SECRET = 6


def secrets_of(environment: Mapping[str, str]) -> list[str]:
    """The values in ``environment`` that must never be written, longest first."""
    found = {value for name, value in environment.items() if _SECRET_NAME.search(name)}
    return sorted((value for value in found if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def redactor(environment: Mapping[str, str]) -> Callable[[str], str]:
    """A function that replaces by ``[redacted]`` the secrets of ``environment``, Hub tokens and passwords in URLs."""
    secrets = secrets_of(environment)

    def hide(text: str) -> str:
        for secret in secrets:
            text = text.replace(secret, HIDDEN)
        return _URL_PASSWORD.sub(rf"\1{HIDDEN}", _HUB_TOKEN.sub(HIDDEN, text))

    return hide


def redact(text: str) -> str:
    """``text`` without the secrets of this process; used for everything that a run writes."""
    return redactor(os.environ)(text)
