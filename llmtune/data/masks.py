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

from llmtune.data.proof import clip
from llmtune.data.records import Conversation, Document, Problem
from llmtune.data.spans import ChatTemplate, Located, Supervise, refused
from llmtune.data.unwritten import unwritten
from llmtune.errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Run = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Encoded:
    """One row. ``input_ids``: int32 [seq]; ``supervised``: bool [seq], whether the token is learned.

    ``unwritten``: names of parts of the row that the chat template leaves out.
    """

    input_ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    unwritten: tuple[str, ...] = ()


class ChatEncoder:
    """Encodes conversations with a chat template, and documents without. Can be pickled where its tokenizer can.

    Args:
        tokenizer: A fast tokenizer of transformers.
        template: The Jinja text of a chat template; the tokenizer's own when None.
        supervise: What is learned of a conversation: ``all`` answers of the assistant but those of weight 0, the
            ``last`` answer, the ``completion`` (all answers after the last message of the user), or the whole
            ``text``, prompts included.

    Raises:
        ConfigError: The tokenizer reports no character offsets.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, *, supervise: Supervise = "all") -> None:
        if not getattr(tokenizer, "is_fast", False):
            name = type(tokenizer).__name__
            raise ConfigError(
                "tokenizer", [f"{name} reports no character offsets; expected a fast one (tokenizer.json)"]
            )
        self.tokenizer = tokenizer
        self.supervise: Supervise = supervise
        self.stop_ids = _stop_ids(tokenizer)
        specials = tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
        self._chat = ChatTemplate(tokenizer, template, specials, supervise)

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

    def _tokens(self, texts: list[str], *, add_special_tokens: bool) -> list[Any]:
        """The encodings of the tokenizer's own backend, set as transformers sets it for a plain call."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        encodings: list[Any] = backend.encode_batch(texts, add_special_tokens=add_special_tokens)
        return encodings

    def _documents(self, documents: Sequence[Document]) -> list[Encoded | Problem]:
        if not documents:
            return []
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        if eos is None:
            raise ConfigError("tokenizer", ["it has no end-of-text token (eos_token), so a model never learns to stop"])
        results: list[Encoded | Problem] = []
        for encoding in self._tokens([document.text for document in documents], add_special_tokens=True):
            ids = encoding.ids
            if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
                ids = ids[1:]  # the text brought its own
            if not ids or ids[-1] != eos:
                ids = [*ids, eos]
            array = np.array(ids, dtype=np.int32)
            results.append(Encoded(input_ids=array, supervised=np.ones(len(array), dtype=np.bool_)))
        return results

    def _conversations(self, chats: Sequence[Conversation]) -> list[Encoded | Problem]:
        if not chats:
            return []
        located = self._chat.locate(chats)
        encodings = iter(
            self._tokens([item.text for item in located if isinstance(item, Located)], add_special_tokens=False)
        )
        rows = [_Row(item, next(encodings)) if isinstance(item, Located) else item for item in located]
        # One call for all rows: the proof costs about a tenth of the tokenisation.
        runs = [ids for row in rows if isinstance(row, _Row) for ids in row.learned()]
        decoded = iter(self._decode(runs))
        results: list[Encoded | Problem] = []
        for chat, row in zip(chats, rows, strict=True):
            if isinstance(row, Problem):
                results.append(row)
                continue
            reason = self._flaw(row, [next(decoded) for _ in row.runs])
            if reason is not None and row.use_offsets():
                reason = self._flaw(row, self._decode(row.learned()))
            results.append(row.encoded(unwritten(chat, row.text)) if reason is None else refused(chat, reason))
        return results

    def _decode(self, runs: list[list[int]]) -> list[str]:
        if self.supervise == "text":  # every token is learned, so there is no mask to prove
            return ["" for _ in runs]
        decoded: list[str] = self.tokenizer.backend_tokenizer.decode_batch(runs, skip_special_tokens=False)
        return decoded

    def _flaw(self, row: _Row, decoded: Sequence[str]) -> str | None:
        """Why the mask of a row is not to be trusted, None where its supervised tokens read as its answers."""
        bos = self.tokenizer.bos_token_id
        if bos is not None and row.ids[:2] == [bos, bos]:
            return "the text begins with two beginning-of-text tokens"
        if self.supervise == "text":
            return None
        if any(earlier[1] > later[0] for earlier, later in zip(row.runs, row.runs[1:], strict=False)):
            return "two answers share a token"
        for (start, end), (first, last), text in zip(row.spans, row.runs, decoded, strict=True):
            span = row.text[start:end]
            if first >= last or row.ids[last - 1] not in self.stop_ids:
                return f"the stop token at the end of {clip(span)} is not a single token"
            if not self._reads(text, span):
                unknown = self.tokenizer.unk_token_id
                if unknown is not None and unknown in row.ids[first:last]:
                    return f"the tokenizer has no token for some of the text of {clip(span)}"
                return f"the supervised tokens read {clip(text)}, the answer is {clip(span)}"
        return None

    def _reads(self, decoded: str, span: str) -> bool:
        """Whether ``decoded`` is the span, as the tokenizer normalises it, after at most other leading whitespace."""
        if decoded.lstrip() == span.lstrip():
            return True
        normalizer = self.tokenizer.backend_tokenizer.normalizer
        normal = span if normalizer is None else normalizer.normalize_str(span)
        # SentencePiece writes a space as ▁, and so reads ▁ as a space.
        return decoded.replace("▁", " ").lstrip() in (
            span.replace("▁", " ").lstrip(),
            normal.replace("▁", " ").lstrip(),
        )


class _Row:
    """A row before its proof. ``runs``: per span the range of tokens, end exclusive, that claims to be it."""

    __slots__ = ("_encoding", "_exact", "ids", "runs", "spans", "text")

    def __init__(self, located: Located, encoding: Any) -> None:
        self.text, self.spans = located
        self.ids: list[int] = encoding.ids
        self._encoding = encoding
        self._exact = False
        self.runs: list[Run] = []
        for start, end in self.spans:
            # Asking for two characters is far cheaper than the offsets of all tokens. A character that no token
            # covers (a space that was trimmed) is left to the offsets, and so is a row that fails its proof.
            first, last = encoding.char_to_token(start), encoding.char_to_token(end - 1) if end > start else None
            if first is None or last is None:
                self.use_offsets()
                break
            self.runs.append((first, last + 1))

    def use_offsets(self) -> bool:
        """Find the runs by the offsets of all tokens; False where that has been done."""
        if self._exact:
            return False
        # Offsets rise, so the overlapping tokens are neighbours. A token whose offsets were trimmed to no width
        # (a space of its own) counts where it lies.
        offsets, self._exact = self._encoding.offsets, True
        self.runs = [
            (bisect_right(offsets, start, key=itemgetter(1)), bisect_left(offsets, end, key=itemgetter(0)))
            for start, end in self.spans
        ]
        return True

    def learned(self) -> list[list[int]]:
        """The supervised ids, run by run."""
        return [self.ids[first:last] for first, last in self.runs]

    def encoded(self, unwritten: tuple[str, ...]) -> Encoded:
        """The row as it is kept."""
        supervised = np.zeros(len(self.ids), dtype=np.bool_)
        for first, last in self.runs:
            supervised[first:last] = True
        return Encoded(input_ids=np.array(self.ids, dtype=np.int32), supervised=supervised, unwritten=unwritten)


def _stop_ids(tokenizer: Any) -> frozenset[int]:
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset((special | {tokenizer.eos_token_id}) - {None})
