"""What would be learned, counted over all rows before any weights load, and the reasons not to start."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.data.masks import ChatEncoder, Encoded
from llmtune.data.records import Conversation, Document, nearest_rank, percentile
from llmtune.data.truncation import Cut
from llmtune.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_UNKNOWN_TOKEN, _BYTE_TOKEN = 1, 2
_EXAMPLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Supervision:
    """What would be learned, counted over all good rows with the model's tokenizer. Lengths in tokens, shares 0 to 1.

    Lengths and shares are those of the rows as they are trained on, after they were cut; ``rows_too_long`` counts
    rows as they were before. ``stop_token_supervised``: in every row that was not cut off at its end.
    ``supervised_share_p5`` and so on: of the share in each row. ``bos_once``: no row begins with two beginning-of-text
    tokens. ``pad_is_eos``: common, and harmless here, where the mask goes by position and not by token.
    ``byte_fallback_share``: tokens such as ``<0xE4>``, one byte each. ``longest_row``: where the longest row is.
    ``tokenizer_problems``: what is wrong with the tokenizer itself.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    length_p50: int
    length_p95: int
    length_p99: int
    length_max: int
    longest_row: str
    supervised_share_p5: float
    supervised_share_p50: float
    supervised_share_p95: float
    stop_token_supervised: bool
    rows_without_supervision: int
    rows_without_stop: int
    rows_too_long: int
    rows_truncated: int
    rows_dropped: int
    tokens_lost: int
    answer_tokens_lost: int
    turns_lost: int
    bos_once: bool
    ids_in_vocabulary: bool
    pad_is_eos: bool
    unknown_share: float
    byte_fallback_share: float
    tokenizer_problems: tuple[str, ...] = ()
    examples: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def supervised_share(self) -> float:
        """Supervised tokens by all tokens, 0 to 1."""
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def examples_of(self, flaw: str) -> tuple[str, ...]:
        """The first places (``file:line``) where ``flaw`` (a field of this class) was found."""
        return dict(self.examples).get(flaw, ())

    @classmethod
    def from_fields(cls, fields: dict[str, Any], now: Callable[[str], str]) -> Supervision:
        """What ``asdict`` wrote, read back from JSON; ``now`` gives a place (``file:line``) the name it has now."""
        return cls(
            **{
                **fields,
                "longest_row": now(fields["longest_row"]),
                "tokenizer_problems": tuple(fields["tokenizer_problems"]),
                "examples": tuple((name, tuple(map(now, places))) for name, places in fields["examples"]),
            }
        )

    def to_json(self) -> dict[str, Any]:
        """The ``supervision`` object of ``check --json``."""
        apart = ("rows", "tokens", "supervised_tokens", "tokenizer_problems", "examples")
        counted: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__ if name not in apart}
        counted["supervised_share"] = self.supervised_share
        counted["tokenizer_problems"] = list(self.tokenizer_problems)
        return counted


@dataclass(slots=True, kw_only=True)
class SupervisionTally:
    """Counts over encoded rows that can be added up; two 32-bit integers per row. Made by `of`; can be pickled.

    ``rare``: uint8 by token id, 1 for the unknown token and 2 for single bytes; None where the tokenizer has neither.
    """

    stop_ids: frozenset[int]
    whole_text: bool
    bos_id: int | None
    vocab_size: int | None
    max_length: int | None
    rare: NDArray[np.uint8] | None
    pad_is_eos: bool
    tokenizer_problems: tuple[str, ...]
    lengths: array[int] = field(default_factory=lambda: array("i"))
    learned: array[int] = field(default_factory=lambda: array("i"))
    longest: tuple[int, str] = (0, "")
    too_long: int = 0
    truncated: int = 0
    dropped: int = 0
    tokens_lost: int = 0
    answer_tokens_lost: int = 0
    turns_lost: int = 0
    unknown: int = 0
    single_bytes: int = 0
    flaws: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, encoder: ChatEncoder, *, vocab_size: int | None = None, max_length: int | None = None
    ) -> SupervisionTally:
        """A tally of nothing.

        Args:
            encoder: What encodes the rows.
            vocab_size: How many embeddings the model has; ids are not compared with it when None.
            max_length: Longest row in tokens, to count longer ones.
        """
        tokenizer = encoder.tokenizer
        return cls(
            stop_ids=encoder.stop_ids,
            whole_text=encoder.supervise == "text",
            bos_id=tokenizer.bos_token_id,
            vocab_size=vocab_size,
            max_length=max_length,
            rare=_rare_tokens(tokenizer),
            pad_is_eos=tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id,
            tokenizer_problems=tuple(tokenizer_problems(tokenizer)),
        )

    def another(self) -> SupervisionTally:
        """A tally of nothing, for the same encoder; a vocabulary is looked through once."""
        return SupervisionTally(
            stop_ids=self.stop_ids,
            whole_text=self.whole_text,
            bos_id=self.bos_id,
            vocab_size=self.vocab_size,
            max_length=self.max_length,
            rare=self.rare,
            pad_is_eos=self.pad_is_eos,
            tokenizer_problems=self.tokenizer_problems,
        )

    def add(self, record: Conversation | Document, encoded: Encoded, cut: Cut | None = None) -> None:
        """Count one good row: as it was ``encoded``, and what became of it where it was ``cut``."""
        full_length = len(encoded.input_ids)
        self.too_long += cut is not None or (self.max_length is not None and full_length > self.max_length)
        if cut is not None:
            self.tokens_lost += cut.tokens_lost
            self.answer_tokens_lost += cut.answer_tokens_lost
            self.turns_lost += cut.turns_lost
            if cut.encoded is None:
                self.dropped += 1
                return
            self.truncated += 1
            encoded = cut.encoded
        ids, learned = encoded.input_ids, encoded.input_ids[encoded.supervised]
        self.lengths.append(len(ids))
        self.learned.append(len(learned))
        if len(ids) > self.longest[0]:
            self.longest = (len(ids), f"{record.file}:{record.line}")
        self._look(record, ids, learned, open_ended=cut is not None and isinstance(record, Document))

    def _look(
        self, record: Conversation | Document, ids: NDArray[np.int32], learned: NDArray[np.int32], *, open_ended: bool
    ) -> None:
        if len(learned) == 0:
            self._flaw("rows_without_supervision", record)
        elif not open_ended:
            # Where all of the text is learned, a line break may follow the stop token.
            ending = learned[-3:] if self.whole_text else learned[-1:]
            if not any(index in self.stop_ids for index in ending.tolist()):
                self._flaw("rows_without_stop", record)
        if self.bos_id is not None and len(ids) > 1 and ids[0] == ids[1] == self.bos_id:
            self._flaw("bos_once", record)
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            self._flaw("ids_in_vocabulary", record)
        if self.rare is not None:
            counts = np.bincount(self.rare[ids], minlength=3)
            self.unknown += int(counts[_UNKNOWN_TOKEN])
            self.single_bytes += int(counts[_BYTE_TOKEN])

    def _flaw(self, name: str, record: Conversation | Document) -> None:
        self.flaws[name] = self.flaws.get(name, 0) + 1
        places = self.places.setdefault(name, [])
        if len(places) < _EXAMPLES:
            places.append(f"{record.file}:{record.line}")

    def merge(self, other: SupervisionTally) -> None:
        """Count what ``other`` has counted in rows that follow."""
        self.lengths.extend(other.lengths)
        self.learned.extend(other.learned)
        self.longest = max(self.longest, other.longest, key=lambda row: row[0])
        self.too_long += other.too_long
        self.truncated += other.truncated
        self.dropped += other.dropped
        self.tokens_lost += other.tokens_lost
        self.answer_tokens_lost += other.answer_tokens_lost
        self.turns_lost += other.turns_lost
        self.unknown += other.unknown
        self.single_bytes += other.single_bytes
        for name, count in other.flaws.items():
            self.flaws[name] = self.flaws.get(name, 0) + count
            places = self.places.setdefault(name, [])
            places += other.places[name][: _EXAMPLES - len(places)]

    def supervision(self) -> Supervision:
        """The account of all rows."""
        lengths = np.array(self.lengths, dtype=np.int64)
        learned = np.array(self.learned, dtype=np.int64)
        shares = learned / np.maximum(lengths, 1)
        lengths.sort()
        shares.sort()
        tokens = int(lengths.sum())
        return Supervision(
            rows=len(lengths),
            tokens=tokens,
            supervised_tokens=int(learned.sum()),
            length_p50=percentile(lengths, 0.50),
            length_p95=percentile(lengths, 0.95),
            length_p99=percentile(lengths, 0.99),
            length_max=percentile(lengths, 1.0),
            longest_row=self.longest[1],
            supervised_share_p5=nearest_rank(shares, 0.05),
            supervised_share_p50=nearest_rank(shares, 0.50),
            supervised_share_p95=nearest_rank(shares, 0.95),
            stop_token_supervised=len(lengths) > 0
            and not self.flaws.get("rows_without_stop")
            and not self.flaws.get("rows_without_supervision"),
            rows_without_supervision=self.flaws.get("rows_without_supervision", 0),
            rows_without_stop=self.flaws.get("rows_without_stop", 0),
            rows_too_long=self.too_long,
            rows_truncated=self.truncated,
            rows_dropped=self.dropped,
            tokens_lost=self.tokens_lost,
            answer_tokens_lost=self.answer_tokens_lost,
            turns_lost=self.turns_lost,
            bos_once=not self.flaws.get("bos_once"),
            ids_in_vocabulary=not self.flaws.get("ids_in_vocabulary"),
            pad_is_eos=self.pad_is_eos,
            unknown_share=self.unknown / tokens if tokens else 0.0,
            byte_fallback_share=self.single_bytes / tokens if tokens else 0.0,
            tokenizer_problems=self.tokenizer_problems,
            examples=tuple((name, tuple(places)) for name, places in sorted(self.places.items())),
        )


def require_supervised(supervision: Supervision) -> None:
    """Refuse to start a run that would learn the wrong thing, with every reason at once.

    Raises:
        DataError: No rows, a row with nothing to learn or without its stop token, a doubled beginning of text, ids
            that the model has no embedding for, or a tokenizer that cannot say where a text ends.
    """
    reasons = [f"The tokenizer {problem}." for problem in supervision.tokenizer_problems]
    if supervision.rows == 0 and supervision.rows_dropped:
        reasons.append(
            f"There is no row to learn from: all {supervision.rows_dropped:,} were left out for their length. Raise "
            "--set data.max_length, or cut rows: --set data.too_long=left or turns."
        )
    elif supervision.rows == 0:
        reasons.append("There is no row to learn from. Give data with at least one good row.")
    if supervision.rows_without_supervision:
        where = _where(supervision, "rows_without_supervision", supervision.rows_without_supervision)
        reasons.append(
            f"{where} hold no token to learn. Give an answer in each a weight of 1 (the last one, with --set "
            "data.supervise=last or completion), or take the rows out."
        )
    if supervision.rows_without_stop:
        where = _where(supervision, "rows_without_stop", supervision.rows_without_stop)
        reasons.append(
            f"{where} end without a supervised stop token, so the model would not learn to stop. Use a chat template "
            "that closes every answer with one: --set data.chat_template=FILE."
        )
    if not supervision.bos_once:
        where = _where(supervision, "bos_once", None)
        reasons.append(f"{where} begin with two beginning-of-text tokens. Take one out of the text or the template.")
    if not supervision.ids_in_vocabulary:
        where = _where(supervision, "ids_in_vocabulary", None)
        reasons.append(
            f"{where} hold token ids that the model has no embedding for. Use the tokenizer that the model was saved "
            "with."
        )
    if reasons:
        count = f"{len(reasons)} reasons not to start. " if len(reasons) > 1 else ""
        raise DataError(count + " ".join(reasons))


def tokenizer_problems(tokenizer: Any) -> list[str]:
    """What is wrong with a tokenizer whatever the data is; each completes "the tokenizer …".

    That the padding token is the end-of-text token is none of it: masks here go by position.
    """
    if tokenizer.eos_token_id is None:
        return [
            "has no end-of-text token, so generation has nothing to stop at; set eos_token in its "
            "tokenizer_config.json to the token that closes an answer"
        ]
    # Byte-level tokenizers know every text; that many of them name one token for everything does no harm.
    if tokenizer.eos_token == getattr(tokenizer.backend_tokenizer.model, "unk_token", None):
        return [
            f"writes {tokenizer.eos_token!r} both at the end of a text and for what it does not know, so that every "
            "unknown piece of text would end an answer; give it another eos_token or unk_token"
        ]
    return []


def _rare_tokens(tokenizer: Any) -> NDArray[np.uint8] | None:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    rare = np.zeros(max(vocabulary.values(), default=0) + 1, dtype=np.uint8)
    rare[[index for token, index in vocabulary.items() if _BYTE.fullmatch(token)]] = _BYTE_TOKEN
    # Some tokenizers name their end-of-text token as the unknown one, which they never need.
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        rare[tokenizer.unk_token_id] = _UNKNOWN_TOKEN
    return rare if rare.any() else None


def _where(supervision: Supervision, flaw: str, count: int | None) -> str:
    places = ", ".join(supervision.examples_of(flaw))
    return f"{count:,} of {supervision.rows:,} rows ({places})" if count is not None else f"Rows ({places} …)"
