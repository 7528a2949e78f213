"""The shortest way: data in, adapter and account out.

python examples/quickstart.py [OUTPUT_DIR]
"""

import sys
from pathlib import Path

from llmtune import FineTuner

HERE = Path(__file__).parent

tuner = FineTuner(
    HERE / "harbour_log.jsonl",
    eval_path=str(HERE / "harbour_log_heldout.jsonl"),
    model="builtin:tiny",
    preset="highspeed",
    output=sys.argv[1] if len(sys.argv) > 1 else None,
)
print(tuner.plan())
result = tuner.train()

assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"], "the loss on held-out rows did not fall"
print(tuner.evaluate().text)
print(f"report: {result.run_dir / 'report.html'}")
