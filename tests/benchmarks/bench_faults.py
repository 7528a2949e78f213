"""The stock Trainer and ours under the same faults, and what a save costs.

    python tests/benchmarks/bench_faults.py                # the table of faults, about ten minutes on two cores
    python tests/benchmarks/bench_faults.py --points 0     # every mutating system call instead of some
    python tests/benchmarks/bench_faults.py --times        # what saves and guards cost; nothing else may run

Faults: each trial is the fork of one run, killed by strace at a system call inside a save, or the finished save with
one file damaged. A process that has never seen the run continues it. Counted: it ends bit for bit as the run that
nothing happened to; it stops and says so; it ends differently and says nothing.

Times, all of one run each on the same disk: a save in the foreground against the stock Trainer's plus the fsync that it
leaves out (asked: at most 1.3 times), and how long a save in the background stops training (asked: at most a tenth of
one in the foreground). And how much of an update of about half a second goes into guards and monitoring (asked: at most
1 %): callbacks, the judgement of loss and gradient norm beyond the norm that clipping takes anyway, memory guard, copy
of random states. It is what their calls take, on the training thread.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


def overhead(root: Path, model: Path) -> None:
    """What guards and monitoring take of each update."""
    from transformers.trainer_callback import CallbackHandler
    from tuning import history, tune

    from llmtune.runs import RunDirectory
    from llmtune.training import memory_guard, numerics, shortage

    spent: Counter[str] = Counter()

    def timed(place: Any, name: str, told: str, counts: Callable[..., bool] = lambda *given: True) -> None:
        usual = getattr(place, name)

        def wrapped(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return usual(*args, **named)
            finally:
                spent[told] += (time.perf_counter() - began) * counts(*args)

        setattr(place, name, wrapped)

    usual_passing = memory_guard.MemoryGuard.passing

    @contextmanager
    def passing(guard: Any, tokens: int) -> Iterator[None]:
        began = time.perf_counter()
        with usual_passing(guard, tokens):
            spent["memory guard"] += time.perf_counter() - began
            yield
            began = time.perf_counter()
        spent["memory guard"] += time.perf_counter() - began

    per_update = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "on_log")
    timed(CallbackHandler, "call_event", "callbacks", lambda handler, event, *rest: event in per_update)
    timed(numerics.NumberGuard, "clip", "loss and gradient norm, clipping included")
    timed(numerics, "get_total_norm", "of these the norm")
    timed(numerics, "clip_grads_with_norm_", "of these the clipping")
    timed(shortage, "random_states", "random states")
    memory_guard.MemoryGuard.passing = passing
    rows = [{"question": f"Who keeps lamp {n}?", "answer": "The keeper of it does. " * 12} for n in range(64)]
    tune(model, root / "run", rows, max_steps=STEPS, rank=16, eval_fraction=0, **{"save.every_steps": STEPS})
    seconds = [step["step_seconds"] for step in RunDirectory.open(root / "run").steps()]
    assert len(history(root / "run")) == STEPS
    norm_and_clipping = spent.pop("of these the norm") + spent.pop("of these the clipping")
    ours = sum(spent.values()) - norm_and_clipping
    print(
        f"\n{STEPS} updates of {median(seconds):.3f} s (median); "
        f"norm and clipping, which stock does too, {norm_and_clipping / STEPS * 1e3:.2f} ms"
    )
    for told, of_all in spent.items():
        print(f"{told:<42} {of_all / STEPS * 1e3:7.2f} ms")
    print(f"{'guards and monitoring without the clipping':<42} {ours / STEPS * 1e3:7.2f} ms, {ours / sum(seconds):.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=24, help="kills inside a save; 0 is one at every call")
    parser.add_argument("--times", action="store_true", help="what saves and guards cost, instead of the faults")
    parser.add_argument("--place", help="a directory on the disk to measure; a temporary one if not given")
    given = parser.parse_args()
    shown = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    print(f"{platform.processor() or platform.machine()}, python {platform.python_version()}, {shown}")
    with tempfile.TemporaryDirectory(dir=given.place) as name:
        root = Path(name)
        if given.times:
            shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
            larger = save_family_model("llama", root / "model", **shape, num_key_value_heads=8)
            times(root, larger)
            overhead(root, larger)
        else:
            faults(given.points, root, save_family_model("llama", root / "TinyLlama-test"))


if __name__ == "__main__":
    main()
