"""Let your own measure of answers choose the best checkpoint.

    python examples/own_metric.py [OUTPUT_DIR]

A metric gets the model's greedy answers to held-out prompts and their references, in order, and returns a number.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llmtune import FineTuner

HERE = Path(__file__).parent


def words_right(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of the reference's words that the answer has too."""
    shares = []
    for answer, reference in zip(answers, references, strict=True):
        wanted = set(reference.lower().split())
        shares.append(len(wanted & set(answer.lower().split())) / max(len(wanted), 1))
    return sum(shares) / len(shares)


result = FineTuner(
    HERE / "harbour_log.jsonl",
    eval_path=str(HERE / "harbour_log_heldout.jsonl"),
    model="builtin:tiny",
    preset="highspeed",
    metrics={"words_right": words_right},
    metric="words_right",
    metric_rows=16,
    max_new_tokens=48,
    output=sys.argv[1] if len(sys.argv) > 1 else None,
).train()

metrics = result.metrics
assert metrics["eval_loss"] < metrics["base_eval_loss"], "the loss on held-out rows did not fall"
print(f"words right: {metrics['base_words_right']:.0%} -> {metrics['words_right']:.0%}")
print(f"adapter: {result.adapter_dir}")
