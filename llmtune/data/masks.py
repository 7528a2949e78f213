"""Token ids and their supervision mask, built in one pass and proven for every row.

A conversation is rendered once and tokenised once; the tokens that overlap an answer's span (see `llmtune.data.spans`)
are supervised. A token that lies across the beginning of a span may bring template whitespace with it (``▁Lima``),
nothing else. The proof: decoding the supervised tokens gives the answers and their stop tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.records import Conversation, Document, Problem
from llmtune.data.spans import ChatTemplate, Located, clip, refused
from llmtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """One row. ``input_ids``: int32 [seq]; ``supervised``: bool [seq], whether the token is learned."""

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]


class ChatEncoder:
    """Encodes conversations with a chat template, and documents without.

    Args:
        tokenizer: A fast tokenizer of transformers.
        template: The Jinja text of a chat template; the tokenizer's own when None.

    Raises:
        ConfigError: The tokenizer reports no character offsets.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            name = type(tokenizer).__name__
            raise ConfigError(
                "tokenizer", [f"{name} reports no character offsets; expected a fast one (tokenizer.json)"]
            )
        self.tokenizer = tokenizer
        self.stop_ids = _stop_ids(tokenizer)
        self._chat = ChatTemplate(tokenizer, template, tokenizer.convert_ids_to_tokens(sorted(self.stop_ids)))

    @property
    def template(self) -> str | None:
        """The Jinja text in use, None where there is none."""
        return self._chat.text

    def encode(self, record: Conversation | Document) -> Encoded:
        """One record.

        Raises:
            DataError: The template or the tokenizer cannot do this row justice; names file and line.
            ConfigError: A conversation, and no chat template.
        """
        result = self.encode_batch([record])[0]
        if isinstance(result, Problem):
            raise DataError(f"{result}. To mend it, {result.hint}.")
        return result

    def encode_batch(self, records: Sequence[Conversation | Document]) -> list[Encoded | Problem]:
        """Records in order, each encoded or with the reason why not.

        Raises:
            ConfigError: A conversation, and no chat template.
        """
        chats = [record for record in records if isinstance(record, Conversation)]
        documents = [record for record in records if isinstance(record, Document)]
        encoded_chats, encoded_documents = iter(self._conversations(chats)), iter(self._documents(documents))
        return [next(encoded_chats if isinstance(record, Conversation) else encoded_documents) for record in records]

    def _documents(self, documents: Sequence[Document]) -> list[Encoded | Problem]:
        if not documents:
            return []
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if eos is None:
            raise ConfigError("tokenizer", ["it has no end-of-text token (eos_token), so a model never learns to stop"])
        results: list[Encoded | Problem] = []
        for ids in self.tokenizer([document.text for document in documents], verbose=False)["input_ids"]:
            if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
                ids = ids[1:]  # the text brought its own
            if not ids or ids[-1] != eos:
                ids = [*ids, eos]
            array = np.asarray(ids, dtype=np.int32)
            results.append(Encoded(input_ids=array, supervised=np.ones(len(array), dtype=np.bool_)))
        return results

    def _conversations(self, chats: Sequence[Conversation]) -> list[Encoded | Problem]:
        if not chats:
            return []
        located = self._chat.locate(chats)
        texts = [item.text for item in located if isinstance(item, Located)]
        if not texts:
            return [item for item in located if isinstance(item, Problem)]
        batch = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        rows = [_mask(item, *next(tokens)) if isinstance(item, Located) else item for item in located]
        return self._proven(chats, rows)

    def _proven(self, chats: Sequence[Conversation], rows: Sequence[_Masked | Problem]) -> list[Encoded | Problem]:
        """Decode every supervised run and compare it with its span; a row that differs becomes a `Problem`."""
        runs = [run for row in rows if isinstance(row, _Masked) for run in row.runs]
        decoded = iter(self.tokenizer.backend_tokenizer.decode_batch(runs, skip_special_tokens=False))
        results: list[Encoded | Problem] = []
        for chat, row in zip(chats, rows, strict=True):
            if isinstance(row, Problem):
                results.append(row)
                continue
            reason = self._flaw(row, [next(decoded) for _ in row.runs])
            results.append(row.encoded if reason is None else refused(chat, reason))
        return results

    def _flaw(self, row: _Masked, decoded: Sequence[str]) -> str | None:
        ids, bos = row.encoded.input_ids, self.tokenizer.bos_token_id
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            return "the text begins with two beginning-of-text tokens"
        if sum(map(len, row.runs)) != int(row.encoded.supervised.sum()):
            return "two answers share a token"
        for span, text, run in zip(row.spans, decoded, row.runs, strict=True):
            if not run or run[-1] not in self.stop_ids:
                return f"the stop token at the end of {clip(span)} is not a single token"
            if not self._reads(text, span):
                unknown = self.tokenizer.unk_token_id
                if unknown is not None and unknown in run:
                    return f"the tokenizer has no token for some of the text of {clip(span)}"
                inside = next((index for index in run[:-1] if index in self.stop_ids), None)
                if inside is not None:
                    token = self.tokenizer.convert_ids_to_tokens(inside)
                    return (
                        f"the answer contains the special token {token!r}, and the tokenizer alters the text around it"
                    )
                return f"the supervised tokens read {clip(text)}, the answer is {clip(span)}"
        return None

    def _reads(self, decoded: str, span: str) -> bool:
        """Whether ``decoded`` is the span, as the tokenizer normalises it, after at most other leading whitespace."""
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        return decoded.lstrip() == span.lstrip() or (
            normalizer is not None and decoded.lstrip() == normalizer.normalize_str(span).lstrip()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masked:
    """A row before its proof: the text of each span beside the run of ids that claims to be it."""

    encoded: Encoded
    spans: tuple[str, ...]
    runs: tuple[list[int], ...]


def _mask(located: Located, ids: list[int], offsets: list[tuple[int, int]]) -> _Masked:
    supervised = np.zeros(len(ids), dtype=np.bool_)
    runs = []
    for start, end in located.spans:
        # Offsets rise, so the overlapping tokens are neighbours. A token whose offsets were trimmed to no width
        # (a space of its own) counts where it lies.
        first = bisect_right(offsets, start, key=itemgetter(1))
        last = bisect_left(offsets, end, key=itemgetter(0))
        supervised[first:last] = True
        runs.append(ids[first:last])
    encoded = Encoded(input_ids=np.asarray(ids, dtype=np.int32), supervised=supervised)
    return _Masked(
        encoded=encoded, spans=tuple(located.text[start:end] for start, end in located.spans), runs=tuple(runs)
    )


def _stop_ids(tokenizer: Any) -> frozenset[int]:
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((special | {tokenizer.eos_token_id}) - {None})
