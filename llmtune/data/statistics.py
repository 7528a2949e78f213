"""What the text of a data set is like: counted over every row where that is cheap, on a sample where it is not.

The sample is the rows with the lowest content digests: random with respect to what they say, the same whatever the
order of the rows and however they were divided over processes, and one row for each distinct text.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llmtune.data.records import Conversation, Document, Record, percentile
from llmtune.presets.facts import dataset_size

SAMPLE_ROWS = 1_000
SAMPLE_CHARS = 2_000  # of each row, divided evenly over its messages

_NO_BOUND = 1 << 64
_SEGMENT_WORDS = 1_000  # distinct bigrams fall with the length of the text, so every count is over as many words
_COMPRESSED_BYTES = 1 << 20
_SHOWN_CHARS = 80
_CODE = re.compile(
    r"```|^\s*(?:def \w+\(|import \w+$|from \w+ import |#include|function \w+\(|SELECT )|\)\s*[;{]$", re.M
)
_MATH = re.compile(r"\\(?:frac|sqrt|sum|int|begin|left|cdot|times)\b|[\d)]\s*[+*×÷^=]\s*[-(]?\d|\d [-/] \d")

# What each part of the complexity score weighs, and the values between which it rises from 0 to 1.
# llmtune: chosen; the bundled harbour log scores 0.21, GSM8K 0.64, long varied conversations about code near 1.
COMPLEXITY_PARTS: Mapping[str, tuple[float, float, float]] = {
    "log2_answer_chars": (0.25, 3.0, 11.0),  # log2 of the median answer (or document): 8 to 2,048 characters
    "turns": (0.15, 1.0, 8.0),  # assistant turns per row, mean
    "vocabulary": (0.25, 0.3, 0.95),  # distinct bigrams by all bigrams, see diversity
    "incompressibility": (0.2, 0.05, 0.45),  # compressed by plain bytes, see diversity
    "structure": (0.15, 0.0, 0.5),  # share of rows with code, mathematics or tools
}
COMPLEXITY_DEFINITION = "sum over the parts of weight × min(1, max(0, (value - zero_at) / (one_at - zero_at)))"

# One sampled row: whether it has tools, the characters of its answers, and its messages as (role, text), cut.
_Row = tuple[bool, int, tuple[tuple[str, str], ...]]


class TextTally:
    """Counts over the text of good rows. Add rows in any order, merge tallies in any order: the statistics agree.

    Can be pickled; takes 16 bytes a row and a sample of bounded size.
    """

    __slots__ = (
        "_answer_chars",
        "_bound",
        "_bytes",
        "_chars",
        "_roles",
        "_sample",
        "_turns",
        "_with_system",
        "_with_tools",
    )

    def __init__(self) -> None:
        self._chars = array("I")
        self._bytes = array("I")
        self._answer_chars = array("I")
        self._turns = array("I")
        self._roles: Counter[str] = Counter()
        self._with_system = 0
        self._with_tools = 0
        self._sample: dict[int, _Row] = {}
        self._bound = _NO_BOUND

    def add(self, record: Record, digest: int) -> None:
        """Count one good row; ``digest`` is the `content_digest` of its text."""
        if isinstance(record, Document):
            text = record.text
            self._chars.append(len(text))
            self._bytes.append(_num_bytes(text))
            if digest <= self._bound:
                self._keep(digest, (False, len(text), (("document", text[:SAMPLE_CHARS]),)))
            return
        if isinstance(record, Conversation):
            messages, tools = record.messages, record.tools is not None
        else:
            messages, tools = (*record.prompt, *record.chosen), False
        chars = beyond_ascii = answer_chars = turns = 0
        roles = self._roles
        for message in messages:
            content, role = message.content, message.role
            length = len(content)
            chars += length
            if not content.isascii():
                beyond_ascii += _num_bytes(content) - length
            roles[role] += 1
            if role == "assistant":
                answer_chars += length
                turns += 1
            if message.tool_calls:
                tools = True
        num_bytes = chars + beyond_ascii
        self._chars.append(chars)
        self._bytes.append(num_bytes)
        self._answer_chars.append(answer_chars)
        self._turns.append(turns)
        self._with_tools += tools
        self._with_system += messages[0].role in ("system", "developer")
        if digest <= self._bound:
            most = SAMPLE_CHARS // len(messages)
            texts = tuple([(message.role, message.content[:most]) for message in messages])
            self._keep(digest, (tools, answer_chars, texts))

    def _keep(self, digest: int, row: _Row) -> None:
        other = self._sample.get(digest)
        # Of texts with one digest the lowest is kept, so that the order of the rows cannot show.
        self._sample[digest] = row if other is None else min(row, other)
        if len(self._sample) > SAMPLE_ROWS * 5 // 4:
            kept = sorted(self._sample)[:SAMPLE_ROWS]
            self._sample = {digest: self._sample[digest] for digest in kept}
            self._bound = kept[-1]

    def merge(self, other: TextTally) -> None:
        """Count what ``other`` has counted as well."""
        self._chars.extend(other._chars)
        self._bytes.extend(other._bytes)
        self._answer_chars.extend(other._answer_chars)
        self._turns.extend(other._turns)
        self._roles.update(other._roles)
        self._with_system += other._with_system
        self._with_tools += other._with_tools
        for digest, row in other._sample.items():
            if digest <= self._bound:
                self._keep(digest, row)

    def statistics(self) -> dict[str, Any]:
        """The ``statistics`` object of ``check --json``. Lengths per row in characters or bytes; shares 0 to 1.

        Complexity is a score in [0, 1]: `COMPLEXITY_DEFINITION` over `COMPLEXITY_PARTS`, both part of the result.
        """
        rows = [self._sample[digest] for digest in sorted(self._sample)[:SAMPLE_ROWS]]
        statistics: dict[str, Any] = {
            "good_rows": len(self._chars),
            "size_class": dataset_size(len(self._chars)),
            "chars": spread(self._chars),
            "bytes": spread(self._bytes),
        }
        if self._turns:
            statistics |= {
                "answer_chars": spread(self._answer_chars),
                "turns": spread(self._turns),
                "roles": dict(sorted(self._roles.items())),
                "rows_with_system": self._with_system,
                "rows_with_tools": self._with_tools,
            }
        statistics |= _of_sample(rows)
        answers = statistics.get("answer_chars", statistics["chars"])["p50"]
        turns = sum(self._turns) / len(self._turns) if self._turns else 1.0
        diversity, structure = statistics["diversity"], statistics["structure"]
        statistics["complexity"] = complexity(
            {
                "log2_answer_chars": float(np.log2(max(1, answers))),
                "turns": turns,
                "vocabulary": diversity["distinct_2"],
                "incompressibility": diversity["compression_ratio"],
                "structure": structure["any"],
            }
        )
        return statistics


def _num_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def spread(values: array[int]) -> dict[str, int]:
    """Total, percentiles and maximum of counts."""
    ordered = np.sort(np.array(values, dtype=np.int64))
    shares = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
    most = int(ordered[-1]) if len(ordered) else 0
    return {"total": int(ordered.sum()), **{k: percentile(ordered, share) for k, share in shares.items()}, "max": most}


def complexity(values: Mapping[str, float]) -> dict[str, Any]:
    """How demanding the data is, 0 to 1; rises (or stays) with each of ``values``, one for each of the parts."""
    parts = {}
    for name, (weight, zero_at, one_at) in COMPLEXITY_PARTS.items():
        score = min(1.0, max(0.0, (values[name] - zero_at) / (one_at - zero_at)))
        parts[name] = {"value": values[name], "score": score, "weight": weight, "zero_at": zero_at, "one_at": one_at}
    score = sum(part["weight"] * part["score"] for part in parts.values())
    return {"score": min(1.0, score), "parts": parts, "definition": COMPLEXITY_DEFINITION}


def _of_sample(rows: Sequence[_Row]) -> dict[str, Any]:
    texts = ["\n".join(text for _, text in messages) for *_, messages in rows]
    answers = Counter((chars, messages[-1][1]) for _, chars, messages in rows if messages[-1][0] == "assistant")
    prompts = Counter(next((text for role, text in messages if role == "user"), None) for *_, messages in rows)
    del prompts[None]
    repetition: dict[str, Any] = {"answer": _most_common(answers.values()), "prompt": _most_common(prompts.values())}
    if repetition["answer"]:
        repetition["most_common_answer"] = min(answers, key=lambda key: (-answers[key], key))[1][:_SHOWN_CHARS]
    found = [
        (bool(_CODE.search(text)), bool(_MATH.search(text)), row[0]) for text, row in zip(texts, rows, strict=True)
    ]
    shares = [sum(column) / len(rows) for column in zip(*found, strict=True)] if rows else [0.0] * 3
    kinds = dict(zip(("code", "math", "tools"), shares, strict=True))
    return {
        "sampled_rows": len(rows),
        "scripts": scripts(texts),
        "diversity": {"distinct_2": distinct_2(texts), "compression_ratio": compression_ratio(texts)},
        "repetition": repetition,
        "structure": {**kinds, "any": sum(any(row) for row in found) / len(rows) if rows else 0.0},
    }


def _most_common(counts: Iterable[int]) -> float:
    counts = list(counts)
    return max(counts) / sum(counts) if counts and max(counts) > 1 else 0.0


def scripts(texts: Iterable[str]) -> dict[str, float]:
    """Share of the letters in each script, the largest first, named as Unicode names its letters: latin, cjk."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4")
    counts: Counter[str] = Counter()
    by_code = np.bincount(codes)
    for code in np.flatnonzero(by_code).tolist():
        letter = unicodedata.normalize("NFKC", chr(code))[0]
        if letter.isalpha():
            counts[unicodedata.name(letter, "UNNAMED LETTER").split()[0].lower()] += int(by_code[code])
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def distinct_2(texts: Iterable[str]) -> float:
    """Distinct by all pairs of neighbouring words (Li et al. 2016, arXiv:1510.03055), mean over 1,000 words each.

    In scripts that write no spaces, pairs of characters.
    """
    words: list[str] = []
    for text in texts:
        split = text.lower().split()
        words += split if len(text) < 16 * len(split) else "".join(split)
    shares = []
    for start in range(0, max(1, len(words) - _SEGMENT_WORDS // 2), _SEGMENT_WORDS):
        pairs = list(pairwise(words[start : start + _SEGMENT_WORDS]))
        shares.append(len(set(pairs)) / len(pairs) if pairs else 0.0)
    return sum(shares) / len(shares)


def compression_ratio(texts: Iterable[str]) -> float:
    """Compressed by plain bytes (zlib) of at most 1 MiB: near 0 for one sentence over and over, 0.4 for prose."""
    plain = "\n".join(texts).encode("utf-8", "surrogatepass")[:_COMPRESSED_BYTES]
    return min(1.0, len(zlib.compress(plain)) / len(plain)) if plain else 0.0
