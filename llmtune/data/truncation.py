"""Rows longer than the longest length: what is left of them, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.records import Conversation, Document

if TYPE_CHECKING:
    from numpy.typing import NDArray

TooLong = Literal["refuse", "drop", "left", "turns"]
Policy = Literal["left", "turns"]  # of these, the ones that keep something of a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What became of a row that was too long. Counts in tokens; no cost is left out.

    ``encoded``: what is left, None where the whole row is left out. ``answer_tokens_lost``: supervised tokens among
    ``tokens_lost``. ``turns_lost``: questions that a row was shortened by, with all that answers them.
    """

    encoded: Encoded | None
    tokens_lost: int
    answer_tokens_lost: int
    turns_lost: int = 0


def shorten(
    encoder: ChatEncoder, record: Conversation | Document, encoded: Encoded, *, max_length: int, policy: Policy
) -> Cut:
    """Make a row fit, or leave it out where nothing useful would be left.

    ``left`` takes the oldest tokens of a conversation away, apart from a beginning-of-text token. The last answer
    stays whole, with at least one token of its prompt; an earlier answer that does not is no longer learned. ``turns``
    takes whole turns away, the oldest first: a message of the user and all that answers it; system prompt and tools
    stay. A document has neither prompt nor turns: ``left`` keeps its beginning, which can be read without what follows
    (what is lost is counted, and its end-of-text token is among it, since the text does not end there); ``turns``
    leaves it out.

    Args:
        encoder: The encoder that made ``encoded``.
        record: The row.
        encoded: All of it, longer than ``max_length``.
        max_length: Longest row in tokens.
        policy: What to take away.
    """
    if policy == "turns":
        return _without_turns(encoder, record, encoded, max_length)
    if isinstance(record, Document):
        return _cut(encoded, np.arange(max_length), encoded.supervised[:max_length])
    return _without_left(encoder, encoded, max_length)


def left_out(encoded: Encoded) -> Cut:
    """The cost of a row that is left out."""
    return Cut(
        encoded=None, tokens_lost=len(encoded.input_ids), answer_tokens_lost=int(np.count_nonzero(encoded.supervised))
    )


def _without_left(encoder: ChatEncoder, encoded: Encoded, max_length: int) -> Cut:
    ids, supervised = encoded.input_ids, encoded.supervised
    bos = encoder.tokenizer.bos_token_id
    has_bos = bos is not None and int(ids[0]) == bos
    start = len(ids) - max_length + has_bos  # the first token that stays
    keep = np.arange(start, len(ids))
    mask = supervised[keep]
    if encoder.supervise != "text":
        # An answer is learned neither without its beginning nor without any of its prompt.
        if mask.all() or not mask.any():
            return left_out(encoded)  # nothing but an answer, or none
        mask[: int(np.argmin(mask))] = False
        # The last answer must stay whole, behind some of its prompt.
        begins = np.flatnonzero(supervised[1:] & ~supervised[:-1]) + 1
        if len(begins) == 0 or begins[-1] <= start:
            return left_out(encoded)
    if has_bos and not (ids[keep[:1]] == bos).any():  # a turn that begins with one of its own brings it along
        keep, mask = np.concatenate([[0], keep]), np.concatenate([supervised[:1], mask])
    return _cut(encoded, keep, mask)


def _without_turns(encoder: ChatEncoder, record: Conversation | Document, encoded: Encoded, max_length: int) -> Cut:
    if isinstance(record, Document):
        return left_out(encoded)
    roles = [message.role for message in record.messages]
    users = [i for i, role in enumerate(roles) if role == "user"]
    head = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), 0)

    def without(turns: int) -> Encoded | None:
        messages = (*record.messages[:head], *record.messages[users[turns] :])
        result = encoder.encode_batch([replace(record, messages=messages)])[0]
        fits = isinstance(result, Encoded) and len(result.input_ids) <= max_length and result.supervised.any()
        return result if isinstance(result, Encoded) and fits else None

    # The fewest turns to take away, by bisection: rows of thousands of turns exist.
    fewest, most, best = 1, len(users) - 1, None
    while fewest <= most:
        middle = (fewest + most) // 2
        shorter = without(middle)
        if shorter is None:
            fewest = middle + 1
        else:
            best, most = (middle, shorter), middle - 1
    if best is None:
        return left_out(encoded)
    turns, shorter = best
    before, after = left_out(encoded), left_out(shorter)
    return Cut(
        encoded=shorter,
        tokens_lost=before.tokens_lost - after.tokens_lost,
        answer_tokens_lost=max(0, before.answer_tokens_lost - after.answer_tokens_lost),
        turns_lost=turns,
    )


def _cut(encoded: Encoded, keep: NDArray[np.intp], mask: NDArray[np.bool_]) -> Cut:
    return Cut(
        encoded=Encoded(input_ids=encoded.input_ids[keep], supervised=mask.copy()),
        tokens_lost=len(encoded.input_ids) - len(keep),
        answer_tokens_lost=int(np.count_nonzero(encoded.supervised) - np.count_nonzero(mask)),
    )
