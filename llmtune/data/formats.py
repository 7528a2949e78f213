"""The closed registry of data formats: how each is recognised, and how a row of it becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmtune.data import conversions
from llmtune.data.conversions import Converter, verdict
from llmtune.data.messages import plain_chat
from llmtune.data.records import Problem, Record, SourceRow
from llmtune.data.reporter import RowReporter

# Fields that belong to a conversation whatever its turns are called.
_SURROUNDINGS = ("system", "history", "tools", "functions")
_PROMPT_PARTS = ("context", "input")


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One shape of rows.

    Attributes:
        name: What ``data.format`` calls it; several shapes may share a name.
        title: What messages call it.
        required: Fields that recognise it.
        optional: Further fields that are read.
        trainable: Whether supervised fine-tuning can use it.
        converter: Makes a record of a row.
        plain: Fast way for a row without anything odd; None from it means that ``converter`` must look.
        instead: For a shape that is not trainable, the settings under which its answers can be learned.
        fields: Every field that is read.
    """

    name: str
    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    trainable: bool = True
    converter: Converter
    plain: Callable[[SourceRow], Record | None] | None = None
    instead: str = ""
    fields: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fields", frozenset((*self.required, *self.optional)))

    def has_fields(self, row: Mapping[str, Any]) -> bool:
        """Return whether ``row`` has what is required. A null field counts as absent: tables have it in every row."""
        return all(row.get(field) is not None for field in self.required)

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """Return why ``row`` has this format, or None."""
        if not self.has_fields(row) or ("label" in self.required and verdict(row["label"]) is None):
            return None
        return f"the rows have {' and '.join(map(repr, self.required))}"

    def convert(self, row: SourceRow, texts: frozenset[str] = frozenset()) -> Record | list[Problem]:
        """Return the record of ``row``, or everything that is wrong with it. ``texts``: see `RowReporter`."""
        if self.plain is not None:
            record: Record | None = self.plain(row)
            if record is not None:
                return record
        report = RowReporter(row, texts)
        record = self.converter(row.value, report)
        if report.problems or record is None:
            return report.problems
        if report.unused or report.extra_keys:
            record.unused, record.extra_keys = tuple(report.unused), tuple(report.extra_keys)
        return record


def _pairs(question: str, answer: str) -> Format:
    return Format(
        name="question_answer",
        title=f"question/answer ({question}/{answer})",
        required=(question, answer),
        optional=(*_SURROUNDINGS, *(part for part in _PROMPT_PARTS if part != question)),
        converter=conversions.pair(question, answer),
    )


def _judged(*required: str, converter: Converter, optional: tuple[str, ...] = (), instead: str = "") -> Format:
    name = "kto" if "label" in required else "preference"
    title = "KTO" if "label" in required else "preference"
    return Format(
        name=name,
        title=title,
        required=required,
        optional=optional,
        trainable=False,
        converter=converter,
        instead=instead,
    )


_ALL_ANSWERS = "--set data.format=chat"
_CHOSEN = "--set data.format=prompt_completion --set data.columns.completion=chosen"
_PROMPT = ("prompt", "messages", "conversations", "system", "history", *_PROMPT_PARTS)

FORMATS: tuple[Format, ...] = (
    Format(
        name="chat",
        title="chat",
        required=("messages",),
        optional=_SURROUNDINGS,
        converter=conversions.listed("messages"),
        plain=plain_chat,
    ),
    Format(
        name="sharegpt",
        title="ShareGPT",
        required=("conversations",),
        optional=_SURROUNDINGS,
        converter=conversions.listed("conversations"),
    ),
    Format(
        name="alpaca",
        title="Alpaca",
        required=("instruction", "output"),
        optional=(*_PROMPT_PARTS, *_SURROUNDINGS),
        converter=conversions.alpaca,
    ),
    _judged(
        "prompt",
        "completion",
        "label",
        converter=conversions.kto,
        optional=("system", "history", *_PROMPT_PARTS),
        instead="--set data.format=prompt_completion",
    ),
    _judged(
        "messages",
        "label",
        converter=conversions.listed_kto("messages"),
        optional=("system", "history"),
        instead=_ALL_ANSWERS,
    ),
    _judged(
        "conversations",
        "label",
        converter=conversions.listed_kto("conversations"),
        optional=("system", "history"),
        instead="--set data.format=sharegpt",
    ),
    Format(
        name="prompt_completion",
        title="prompt/completion",
        required=("prompt", "completion"),
        optional=(*_SURROUNDINGS, *_PROMPT_PARTS),
        converter=conversions.prompt_completion,
    ),
    _pairs("question", "answer"),
    _pairs("query", "response"),
    _pairs("input", "output"),
    _judged("chosen", "rejected", converter=conversions.preference, optional=_PROMPT, instead=_CHOSEN),
    _judged(
        "chosen_messages",
        "rejected_messages",
        converter=conversions.whole_preference("chosen_messages", "rejected_messages"),
        instead=f"{_ALL_ANSWERS} --set data.columns.messages=chosen_messages",
    ),
    _judged(
        "messages",
        "rejected_response",
        converter=conversions.rejected_reply("rejected_response"),
        instead=_ALL_ANSWERS,
    ),
    _judged(
        "messages",
        "rejected_messages",
        converter=conversions.rejected_reply("rejected_messages"),
        instead=_ALL_ANSWERS,
    ),
    Format(
        name="text",
        title="plain text",
        required=("text",),
        optional=("role", "replies", "parent_id"),
        converter=conversions.text,
    ),
)
FORMAT_NAMES = tuple(dict.fromkeys(each.name for each in FORMATS))


def candidates(row: Mapping[str, Any], among: Sequence[Format] = FORMATS) -> tuple[Format, ...]:
    """Return the formats that ``row`` may have; one that another reads completely and more is not listed."""
    found = [each for each in among if each.detect(row) is not None]
    return tuple(
        each for each in found if not any(other is not each and set(each.required) < other.fields for other in found)
    )
