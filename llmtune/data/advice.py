"""What to do about what was counted: one finding, one suggestion each. Silent when all is well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llmtune.presets.facts import SMALL_BELOW_ROWS

if TYPE_CHECKING:
    from llmtune.data.duplicates import Duplicates, Leakage
    from llmtune.data.supervision import Supervision

# All bounds are llmtune's, chosen; where they are crossed the person looks, nothing is changed for them.
_LONG_TAIL = 4  # longest row by the 95th percentile
_EXACT_SHARE = 0.01
_NEAR_SHARE = 0.05
_LEAST_SAMPLE = 20  # rows below which a share of the sample says nothing
_ONE_ANSWER, _NEARLY_ONE_ANSWER = 0.3, 0.8
_MIXED_IN = (0.01, 0.1)
_LOW_DISTINCT, _LOW_COMPRESSED = 0.4, 0.15
_SUPERVISED_SHARE = 0.1
_UNKNOWN_SHARE, _BYTE_SHARE = 0.001, 0.05
# Written together, or strewn in everywhere.
_ONE_WRITING = {
    name: "east asian" for name in ("cjk", "hiragana", "katakana", "katakana-hiragana", "hangul", "bopomofo")
}
_EVERYWHERE = ("latin", "greek")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing worth doing about the data.

    ``kind``: few_rows, too_long, long_tail, duplicates, near_duplicates, imbalance, mixed_scripts, low_diversity,
    low_supervision, unknown_tokens, byte_fallback or leakage.
    """

    kind: str
    finding: str
    suggestion: str
    severity: Literal["info", "warning"]

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return {name: getattr(self, name) for name in self.__slots__}


def advise(
    statistics: Mapping[str, Any],
    duplicates: Duplicates | None = None,
    supervision: Supervision | None = None,
    leakage: Leakage | None = None,
) -> tuple[Advice, ...]:
    """Everything worth doing about this data, warnings first.

    Args:
        statistics: Of `TextTally.statistics`.
        duplicates: What repeats; None where it was not looked for.
        supervision: What would be learned; None without a tokenizer.
        leakage: What is in both training and evaluation; None without evaluation data.
    """
    found = [*_of_text(statistics)]
    if duplicates is not None:
        found += _of_duplicates(duplicates)
    if supervision is not None:
        found += _of_supervision(supervision)
    if leakage is not None:
        found += _of_leakage(leakage)
    return tuple(sorted(found, key=lambda advice: advice.severity != "warning"))


def _of_text(statistics: Mapping[str, Any]) -> Iterator[Advice]:
    rows = statistics["good_rows"]
    if rows < SMALL_BELOW_ROWS:
        yield Advice(
            kind="few_rows",
            finding=f"{rows:,} rows are few",
            suggestion=(
                f"About {SMALL_BELOW_ROWS:,} varied rows are enough to teach a form or a tone. Find more sources, or "
                "have questions paraphrased and check the answers; copies of the same rows do not help."
            ),
            severity="info",
        )
    if statistics["sampled_rows"] < _LEAST_SAMPLE:
        return
    share, answer = statistics["repetition"]["answer"], statistics["repetition"].get("most_common_answer")
    if share >= _ONE_ANSWER:
        yield Advice(
            kind="imbalance",
            finding=f"one answer is given in {share:.0%} of the rows: {answer!r}",
            suggestion="Add rows with other answers or leave some of these out; else that one is learned first.",
            severity="warning" if share >= _NEARLY_ONE_ANSWER else "info",
        )
    for name, part in _mixed_in(statistics["scripts"]):
        yield Advice(
            kind="mixed_scripts",
            finding=f"{part:.1%} of the letters are {name}, the others are not",
            suggestion="Look at those rows: too few to learn from, enough to make the model switch language.",
            severity="info",
        )
    diversity = statistics["diversity"]
    if diversity["distinct_2"] < _LOW_DISTINCT or diversity["compression_ratio"] < _LOW_COMPRESSED:
        yield Advice(
            kind="low_diversity",
            finding=(
                f"the rows resemble each other: {diversity['distinct_2']:.0%} of the word pairs are distinct, the text "
                f"compresses to {diversity['compression_ratio']:.0%}"
            ),
            suggestion=(
                "Vary the wording of the prompts and add other sources; with data as it is use fewer passes, "
                "--set train.epochs=1."
            ),
            severity="info",
        )


def _mixed_in(shares: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    writings: dict[str, float] = {}
    for name, share in shares.items():
        writing = _ONE_WRITING.get(name, name)
        writings[writing] = writings.get(writing, 0.0) + share
    for name, share in writings.items():
        if name not in _EVERYWHERE and _MIXED_IN[0] <= share < _MIXED_IN[1]:
            yield name, share


def _of_duplicates(duplicates: Duplicates) -> Iterator[Advice]:
    if duplicates.exact_rows:
        share = duplicates.exact_rows / duplicates.rows
        yield Advice(
            kind="duplicates",
            finding=f"{duplicates.exact_rows:,} rows ({share:.1%}) repeat an earlier one",
            suggestion="Leave them out with --set data.duplicates=drop_exact, unless they are meant to weigh more.",
            severity="warning" if share >= _EXACT_SHARE else "info",
        )
    if duplicates.near_rows:
        share = duplicates.near_rows / duplicates.rows
        yield Advice(
            kind="near_duplicates",
            finding=f"{duplicates.near_rows:,} rows ({share:.1%}) nearly repeat an earlier one",
            suggestion=(
                "Look at the examples; leave them out with --set data.duplicates=drop_near. Keep them where they share "
                "no more than a long instruction."
            ),
            severity="warning" if share >= _NEAR_SHARE else "info",
        )


def _of_supervision(supervision: Supervision) -> Iterator[Advice]:
    if supervision.rows_too_long:
        yield Advice(
            kind="too_long",
            finding=(
                f"{supervision.rows_too_long:,} rows are longer than data.max_length: {supervision.rows_truncated:,} "
                f"cut, {supervision.rows_dropped:,} left out; that costs {supervision.tokens_lost:,} tokens, "
                f"{supervision.answer_tokens_lost:,} of them of answers, and {supervision.turns_lost:,} turns"
            ),
            suggestion=(
                "Raise --set data.max_length, or choose what is lost: --set data.too_long=turns (oldest turns), left "
                "(oldest tokens), drop, or refuse."
            ),
            severity="warning",
        )
    p95, longest = supervision.length_p95, supervision.length_max
    if longest > _LONG_TAIL * max(1, p95):
        wanted = -(-max(16, supervision.length_p99) // 64) * 64
        yield Advice(
            kind="long_tail",
            finding=f"the longest row has {longest:,} tokens, 95 % of the rows at most {p95:,}",
            suggestion=(
                f"Memory is planned for the longest row: --set data.max_length={wanted} with --set data.too_long=turns "
                "(oldest turns go first) or --set data.too_long=drop costs at most 1 % of the rows."
            ),
            severity="info",
        )
    if supervision.supervised_share_p50 < _SUPERVISED_SHARE:
        yield Advice(
            kind="low_supervision",
            finding=f"in half of the rows at most {supervision.supervised_share_p50:.1%} of the tokens are learned",
            suggestion=(
                "Shorten the prompts, or put several questions about one text into one conversation "
                "(all answers are learned with --set data.supervise=all)."
            ),
            severity="warning",
        )
    if supervision.unknown_share > _UNKNOWN_SHARE:
        yield Advice(
            kind="unknown_tokens",
            finding=f"{supervision.unknown_share:.2%} of the tokens are unknown to the tokenizer: that text is lost",
            suggestion="Choose a model whose tokenizer knows these characters: --model ID, see llmtune presets.",
            severity="warning",
        )
    if supervision.byte_fallback_share > _BYTE_SHARE:
        yield Advice(
            kind="byte_fallback",
            finding=f"{supervision.byte_fallback_share:.1%} of the tokens are single bytes, for want of better ones",
            suggestion="A model made for this script needs fewer tokens: --model ID, see llmtune presets.",
            severity="warning",
        )


def _of_leakage(leakage: Leakage) -> Iterator[Advice]:
    if leakage.leaked:
        near = 0 if leakage.near_rows is None else len(leakage.near_rows)
        yield Advice(
            kind="leakage",
            finding=(
                f"{leakage.leaked:,} of {leakage.rows:,} evaluation rows are also trained on "
                f"({len(leakage.exact_rows):,} exactly, {near:,} nearly): the evaluation will flatter"
            ),
            suggestion=(
                f"Take the {len(leakage.training_rows):,} training rows out, or leave --eval-data out: the rows "
                "that are then held out share none with training."
            ),
            severity="warning",
        )
