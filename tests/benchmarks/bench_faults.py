"""The stock Trainer and ours under the same faults, and what a save costs.

    python tests/benchmarks/bench_faults.py                # the table of faults, about ten minutes on two cores
    python tests/benchmarks/bench_faults.py --points 0     # every mutating system call instead of some
    python tests/benchmarks/bench_faults.py --times        # what saves cost; nothing else may run

Faults: each trial is the fork of one run, killed by strace at a system call inside a save, or the finished save with
one file damaged. A process that has never seen the run continues it. Counted: it ends bit for bit as the run that
nothing happened to; it stops and says so; it ends differently and says nothing.

Times, all of one run each on the same disk: a save in the foreground against the stock Trainer's plus the fsync that it
leaves out (asked: at most 1.3 times), and how long a save in the background stops training (asked: at most a tenth of
one in the foreground).
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))
from factories import save_family_model  # noqa: E402
from trials import trials  # noqa: E402

PACKAGES = ("llmtune", "torch", "transformers", "peft", "safetensors")
RANK, STEPS = 64, 24
OUTCOMES = ("continued, equal", "stopped, said so", "silently different")


def outcomes(result: dict[str, Any], *, what: str | None = None) -> Counter[str]:
    """How many trials had which outcome; ``what`` keeps those of one kind."""
    counted: Counter[str] = Counter()
    for trial in result["trials"]:
        if what is not None and trial["what"] != what:
            continue
        if what is None and not trial.get("killed"):
            continue
        broken = result["broken"].get(str(trial["state"]))
        counted[OUTCOMES[0] if broken is None else OUTCOMES[2] if broken == "differs" else OUTCOMES[1]] += 1
    return counted


def faults(points: int, root: Path, model: Path) -> None:
    rows: list[tuple[str, str, Counter[str]]] = []
    for system in ("stock", "ours"):
        killed = trials(root / f"{system}-kill", model, system=system, points=points)
        rows.append(("killed inside a save", system, outcomes(killed)))
        damaged = trials(root / f"{system}-damage", model, system=system, fault="damage")
        for what in ("file missing", "truncated", "zeroed tail", "bit flip"):
            rows.append((f"newest checkpoint: {what}", system, outcomes(damaged, what=what)))
    print(f"| fault | system | trials | {' | '.join(OUTCOMES)} |")
    print("|---|---|---|---|---|---|")
    for fault, system, counted in sorted(rows, key=lambda row: (row[0], row[1] == "ours")):
        cells = " | ".join(str(counted[outcome]) for outcome in OUTCOMES)
        print(f"| {fault} | {system} | {counted.total()} | {cells} |")


def times(root: Path, model: Path) -> None:
    from stock_run import stock_save_seconds
    from tuning import events, tune

    import llmtune.training.train as training

    blocking: list[float] = []
    usual = training.UpdateTrainer._save_behind

    def noted(self: Any) -> None:
        usual(self)
        blocking.append(self.save_blocking_seconds)

    training.UpdateTrainer._save_behind = noted
    how = {"max_steps": STEPS, "rank": RANK, "eval_fraction": 0, "probe": False}
    stock = stock_save_seconds(str(model), root / "stock", steps=STEPS, rank=RANK)
    tune(model, root / "foreground", **how)
    tune(model, root / "background", **how, **{"save.asynchronous": True})
    ours = [event["seconds"] for event in events(root / "foreground", "checkpoint_saved")]
    newest = root / "foreground" / "checkpoints" / f"checkpoint-{STEPS}"
    size = sum(path.stat().st_size for path in newest.iterdir())
    print(f"\none checkpoint: {size / 2**20:.1f} MiB; medians of {len(stock)}, {len(ours)} and {len(blocking)} saves")
    print(f"stock save and fsync  {median(stock) * 1e3:8.1f} ms")
    print(f"ours, foreground      {median(ours) * 1e3:8.1f} ms   {median(ours) / median(stock):.2f} times stock")
    print(
        f"ours, background      {median(blocking) * 1e3:8.1f} ms   {median(blocking) / median(ours):.1%} of foreground"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24, help="kills inside a save; 0 is one at every call")
    parser.add_argument("--times", action="store_true", help="what saves cost, instead of the faults")
    parser.add_argument("--place", help="a directory on the disk to measure; a temporary one if not given")
    given = parser.parse_args()
    shown = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}, {shown}")
    with tempfile.TemporaryDirectory(dir=given.place) as name:
        root = Path(name)
        if given.times:
            shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
            times(root, save_family_model("llama", root / "model", **shape, num_key_value_heads=8))
        else:
            faults(given.points, root, save_family_model("llama", root / "TinyLlama-test"))


if __name__ == "__main__":
    main()
