"""Rows as the model will see them: every token with its text, and whether it is learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile, islice, takewhile
from typing import Any

from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.reading import Reading, require_trainable
from llmtune.data.records import Conversation, Document, Problem, Record
from llmtune.data.truncation import TooLong, left_out, shorten
from llmtune.errors import DataError

# What a decoder writes for bytes that are not, or not yet, a character.
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewToken:
    """One token. ``text``: its part of the decoded row, see `token_texts`; ``special``: a token of the template's."""

    id: int
    text: str
    supervised: bool
    special: bool = False

    def to_json(self) -> dict[str, Any]:
        """An entry of ``tokens`` in ``preview --json``."""
        return {"id": self.id, "text": self.text, "supervised": self.supervised}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreviewRow:
    """One row: its tokens, or the problems for which it has none. ``supervised_text``: what is learned, decoded."""

    file: str
    line: int
    tokens: tuple[PreviewToken, ...] = ()
    supervised_text: str = ""
    problems: tuple[Problem, ...] = ()

    @property
    def num_supervised(self) -> int:
        """How many of its tokens are learned."""
        return sum(token.supervised for token in self.tokens)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens by all tokens, 0 to 1."""
        return self.num_supervised / len(self.tokens) if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        """An entry of ``rows`` in ``preview --json``."""
        return {
            "file": self.file,
            "line": self.line,
            "num_tokens": len(self.tokens),
            "num_supervised_tokens": self.num_supervised,
            "tokens": [token.to_json() for token in self.tokens],
            "supervised_text": self.supervised_text,
            "problems": [problem.to_json() for problem in self.problems],
        }


def preview(
    reading: Reading,
    encoder: ChatEncoder,
    *,
    rows: int = 3,
    line: int = 1,
    max_length: int | None = None,
    too_long: TooLong = "refuse",
) -> list[PreviewRow]:
    """Encode some rows as training would and take them apart; a row that cannot be encoded comes with its problems.

    Args:
        reading: The data.
        encoder: The model's tokenizer and chat template.
        rows: How many rows.
        line: Start at the first row of this line (row number in containers without lines) or a later one.
        max_length: Longest row in tokens; longer ones are shown as they will be trained on, with a note.
        too_long: What will be done with longer rows.

    Raises:
        DataError: There is no such line, or data that is not for supervised training.
        ConfigError: A conversation, and no chat template.
    """
    require_trainable(reading)
    chosen = list(islice(dropwhile(lambda item: _place(item)[1] < line, reading), rows))
    if not chosen:
        where = ", ".join(reading.source.labels[:3])
        raise DataError(f"{where}: there is no row at line {line:,} or after it; pass a smaller --line.")
    encoded = iter(encoder.encode_batch([item for item in chosen if isinstance(item, (Conversation, Document))]))
    found = []
    for item in chosen:
        file, number = _place(item)
        result = next(encoded) if isinstance(item, (Conversation, Document)) else item
        if isinstance(item, (Conversation, Document)) and isinstance(result, Encoded):
            notes: tuple[Problem, ...] = ()
            if max_length is not None and len(result.input_ids) > max_length:
                result, notes = _cut(encoder, item, result, max_length, too_long)
            row = _taken_apart(file, number, result, encoder.tokenizer)
            found.append(replace(row, problems=notes))
        elif isinstance(result, (Problem, list)):
            problems = (result,) if isinstance(result, Problem) else tuple(result)
            found.append(PreviewRow(file=file, line=number, problems=problems))
    return found


def _cut(
    encoder: ChatEncoder, record: Conversation | Document, encoded: Encoded, max_length: int, too_long: TooLong
) -> tuple[Encoded, tuple[Problem, ...]]:
    """What is left of a row that is too long, or all of it where it is left out; and a note that says so."""
    if too_long == "left" or too_long == "turns":
        cut = shorten(encoder, record, encoded, max_length=max_length, policy=too_long)
    else:
        cut = left_out(encoded)
    if cut.encoded is not None:
        fate = f"is cut by {cut.tokens_lost:,} tokens, {cut.answer_tokens_lost:,} of them of answers"
    else:
        fate = "would be refused" if too_long == "refuse" else "is left out"
    note = Problem(
        file=record.file,
        line=record.line,
        field=None,
        problem=f"the row has {len(encoded.input_ids):,} tokens, more than data.max_length={max_length}; it {fate}",
        hint="choose with --set data.max_length and data.too_long=refuse|drop|left|turns",
    )
    return cut.encoded or encoded, (note,)


def token_texts(decode: Callable[[list[int]], str], ids: list[int]) -> list[str]:
    """What each token adds to the text of the row, so that the texts one after the other are ``decode(ids)``.

    A character whose bytes are spread over several tokens belongs to the last of them; those before it add nothing.
    A token's text depends on its neighbours (``▁Lima`` reads ``Lima`` at the beginning of a row), so each token is
    decoded behind the one before it, and what that gives is looked up in the text of the whole row.
    """
    whole = decode(ids)
    texts = []
    told = 0  # characters of the row that earlier tokens have
    # ids[start:middle] are whole characters that end at `base` in the row, and have `behind` characters on their own.
    start = middle = base = behind = 0
    for end in range(1, len(ids) + 1):
        ahead = decode(ids[start:end])[behind:]
        agreed = _agreed(ahead, whole[base : base + len(ahead)])
        reached = len(whole) if end == len(ids) else max(told, base + agreed)
        texts.append(whole[told:reached])
        told = reached
        if ahead and agreed == len(ahead) and not ahead.endswith(_REPLACEMENT):
            start, middle, base = middle, end, reached
            behind = len(decode(ids[start:middle]))
    return texts


def _agreed(one: str, other: str) -> int:
    """How many characters two texts have in common from the beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _taken_apart(file: str, line: int, row: Encoded, tokenizer: Any) -> PreviewRow:
    # As in the proof of the masks: transformers' own decode may tidy spaces up.
    decode = partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = row.input_ids.tolist()
    tokens = tuple(
        PreviewToken(id=index, text=text, supervised=supervised, special=index in special)
        for index, text, supervised in zip(ids, token_texts(decode, ids), row.supervised.tolist(), strict=True)
    )
    learned = decode(row.input_ids[row.supervised].tolist())
    return PreviewRow(file=file, line=line, tokens=tokens, supervised_text=learned)


def _place(item: Record | list[Problem]) -> tuple[str, int]:
    first = item[0] if isinstance(item, list) else item
    return first.file, first.line
