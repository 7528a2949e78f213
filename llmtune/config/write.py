"""A configuration as a YAML file that explains itself."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llmtune.config.keys import settable_keys
from llmtune.config.schema import RunConfig

WIDTH = 100
# Never written, so that a file can be shown around.
SECRETS = ("model.token",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What will be taken for a key that is not set, and why."""

    value: Any
    reason: str


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Everything that was set, be it to its default, by full key and as plain values; no secrets."""
    return {
        f"{group}.{leaf}": value
        for group, values in config.model_dump(mode="json", exclude_unset=True).items()
        for leaf, value in values.items()
        if value is not None and f"{group}.{leaf}" not in SECRETS
    }


def commented_yaml(
    config: RunConfig,
    *,
    header: Sequence[str] = (),
    remarks: Mapping[str, str] | None = None,
    planned: Mapping[str, Planned] | None = None,
) -> str:
    """The text of a configuration file that loads as ``config`` and says what the keys left out will be.

    What is set stands as a key below what it is for. What is planned stands the same way as ``#key: value``, below its
    reason; without the ``#`` it is set.

    Args:
        config: What is set in it is written; secrets are not.
        header: Paragraphs at the top.
        remarks: Key -> what to say about it besides what it is for.
        planned: Key -> what will be taken for it; keys that are set are ignored.
    """
    given, purposes = settings_of(config), settable_keys()
    remarks, planned = remarks or {}, planned or {}
    blocks = ["\n#\n".join(map(_comment, header))] if header else []
    for group in RunConfig.model_fields:
        entries = []
        for key in (key for key in purposes if key.startswith(f"{group}.")):
            leaf, said = key.partition(".")[2], [purposes[key], *([remarks[key]] if key in remarks else [])]
            if key in given:
                entries.append([*said, f"{leaf}: {_written(given[key])}"])
            elif key in planned:
                entries.append([*said, f"why: {planned[key].reason}", f"#{leaf}: {_written(planned[key].value)}"])
        if entries:
            texts = ["\n".join([*(_comment(text) for text in said), entry]) for *said, entry in entries]
            blocks.append(f"{group}:\n" + textwrap.indent("\n\n".join(texts), "  "))
    return "\n\n".join(blocks) + "\n"


def _comment(text: str) -> str:
    """A paragraph as comment lines. Whatever it quotes, no line of it can be read as YAML."""
    words = "".join(letter if letter.isprintable() else " " for letter in text)
    return textwrap.fill(
        words, WIDTH, initial_indent="# ", subsequent_indent="# ", break_long_words=False, break_on_hyphens=False
    )


def _written(value: Any) -> str:
    """One value as YAML that can stand behind a key. What a reader would not see, such as U+0085, is escaped."""
    plain = [list(value) if isinstance(value, tuple) else value]
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    if not text.strip().isprintable():
        text = yaml.safe_dump(plain, default_flow_style=True, width=10**9, sort_keys=False)
    return text.strip()[1:-1]
