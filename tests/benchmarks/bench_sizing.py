"""Whether llmtune finds, under a memory limit, forward passes that fit and are as fast as any that do.

    python tests/benchmarks/bench_sizing.py                  # all cases, about a quarter of an hour on two cores
    python tests/benchmarks/bench_sizing.py --only phi       # those named so
    python tests/benchmarks/bench_sizing.py --no-rivals      # without the fixed budgets it is compared with

For each case a control group with a memory limit is made, too small for the usual token budget. The real command
``llmtune train`` runs in it and chooses by itself; then fixed token budgets run in the same group, with and without
activation checkpointing, and are not refused even where the plan says that they do not fit: the kernel judges. Nothing
else may run.

Asked: no process killed for want of memory, at most two probe passes, the global batch exact in every update, and at
least 90 % of the throughput of the best fixed budget that gets through.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from memory_cases import build, model_directory, write_rows
from memory_worker import surroundings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cgroups import MemoryGroup, NoMemoryGroupError, memory_group

PACKAGES = ("llmtune", "torch", "transformers", "peft")
MIB = 2**20
UPDATES, GLOBAL_BATCH, ROWS = 8, 16, 256
# Fixed budgets, in padded tokens per forward pass, and whether activations are recomputed.
RIVALS = ((1024, False), (512, False), (256, False), (1024, True), (512, True))
# The command itself, but a plan that is said not to fit is carried out all the same.
UNREFUSED = (
    "import sys; from llmtune.planning import Plan; Plan.require_fit = lambda self: None; "
    "from llmtune.cli import main; sys.exit(main(sys.argv[1:]))"
)
USABLE_SHARE = 0.92  # of free memory that a plan uses

SMALL = {"hidden": 512, "layers": 8, "heads": 8, "mlp": 1408, "vocabulary": 32000}
# ``room``: the limit lies so far from what one longest row needs to what the usual budget needs.
CASES: tuple[dict[str, Any], ...] = (
    {"name": "llama lora, some room", "architecture": "llama", "room": 0.6},
    {"name": "llama lora, little room", "architecture": "llama", "room": 0.15},
    {"name": "phi lora, some room", "architecture": "phi", "vocabulary": 51200, "room": 0.4},
    {"name": "qwen2 large vocabulary", "architecture": "qwen2", "vocabulary": 98304, "tied": True, "room": 0.3},
    {"name": "mistral method left open", "architecture": "mistral", "method": None, "room": 0.5},
    {"name": "qwen3 full", "architecture": "qwen3", "tied": True, "method": "full", "room": 0.5},
    {"name": "phi3 qlora", "architecture": "phi3", "method": "qlora", "room": 0.4},
    {"name": "llama long rows", "architecture": "llama", "longest": 768, "room": 0.3},
)


# ── one command under a limit ────────────────────────────────────────────────────────────────────────────────────


def settings_of(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """What the user fixes; how much goes through the model at once is left to the plan."""
    settings = {
        "model.id": str(model_directory(_shape(case), root)),
        "data.path": str(_rows_path(case, root)),
        "data.format": "text",
        "data.supervise": "text",
        "data.eval_fraction": 0.1,
        "train.max_steps": UPDATES,
        "train.global_batch_size": GLOBAL_BATCH,
        "train.precision": "bf16",
        "train.device": "cpu",
        "train.threads": len(os.sched_getaffinity(0)),
        "evaluate.every_steps": UPDATES // 2,
        "evaluate.max_new_tokens": 16,
        "save.every_steps": UPDATES // 2,
        "monitor.report": False,
    }
    method = case.get("method", "lora")
    return settings if method is None else settings | {"train.method": method}


def _shape(case: dict[str, Any]) -> dict[str, Any]:
    return SMALL | {key: value for key, value in case.items() if key not in ("name", "room", "method", "longest")}


def _rows_path(case: dict[str, Any], root: Path) -> Path:
    return root / "data" / f"mixed-{case.get('longest', 256)}.jsonl"


def prepare(case: dict[str, Any], root: Path) -> None:
    """Model and rows of a case; the rows are of many lengths, and one is the longest that is promised."""
    build(_shape(case), root)
    path, longest = _rows_path(case, root), case.get("longest", 256)
    if not path.exists():
        lengths = np.clip(np.random.default_rng(0).lognormal(np.log(90), 0.6, ROWS), 16, longest).astype(int).tolist()
        write_rows(path, [*lengths, longest], random.Random(0))


def train(case: dict[str, Any], root: Path, group: MemoryGroup, **fixed: Any) -> dict[str, Any]:
    """Run the command in the group; with ``fixed`` settings it is not refused."""
    with tempfile.TemporaryDirectory(dir=root) as output:
        run = Path(output) / "run"
        settings = settings_of(case, root) | fixed | {"output.dir": str(run), "output.root": output}
        spelled = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
        flags = [part for key, value in spelled.items() for part in ("--set", f"{key}={value}")]
        program = ["-c", UNREFUSED] if fixed else ["-m", "llmtune"]
        started = time.perf_counter()
        done = group.run(
            [sys.executable, *program, "train", *flags], env=os.environ | surroundings(root), cwd=output, timeout=900
        )
        seconds = time.perf_counter() - started
        return _told(run) | {
            "code": done.returncode,
            "kills": group.kills,
            "major_faults": group.major_faults,
            "seconds": seconds,
            "said": done.stderr[-2000:] if done.returncode else "",
        }


def _told(run: Path) -> dict[str, Any]:
    """What the run's own files say."""
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines() if (run / "events.jsonl").exists() else []
    steps = [event for event in map(json.loads, lines) if event["event"] == "step"]
    files = sorted(run.glob("plan*.json"), key=lambda path: (len(path.name), path.name))
    plans = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    measured = [plan["measured"] for plan in plans if plan.get("measured")]
    wanted = ("method", "token_budget", "micro_batch_size", "activation_checkpointing", "checkpoint_every")
    return {
        "updates": len(steps),
        "batches": [step["global_batch_size"] for step in steps],
        # The fastest: what else runs only slows. The first update meets every shape for the first time.
        "tokens_per_second": max((step["tokens_per_second"] for step in steps[1:]), default=0.0),
        "memory_bytes": max((step["memory_bytes"] for step in steps), default=0),
        "choices": {name: plans[-1]["choices"][name]["value"] for name in wanted} if plans else {},
        "plans": [plan["memory"]["peak_bytes"] for plan in plans],
        "probe_passes": len(measured[-1]["passes"]) if measured else None,
    }


# ── one case ─────────────────────────────────────────────────────────────────────────────────────────────────────


def limit_of(case: dict[str, Any], root: Path) -> int:
    """A limit below what the usual budget is said to need, and above what one longest row is."""
    from llmtune import FineTuner

    def peak(budget: int) -> int:
        settings = settings_of(case, root) | {"train.token_budget": budget, "train.activation_checkpointing": False}
        settings |= {"train.method": settings.get("train.method", "lora"), "output.dir": str(root / "never")}
        return FineTuner(**settings).plan().memory.peak_bytes

    longest = case.get("longest", 256)
    least, usual = peak(longest), peak(max(1024, 2 * longest))
    return int((least + case["room"] * (usual - least)) / USABLE_SHARE)


def measure(case: dict[str, Any], root: Path, *, rivals: bool) -> dict[str, Any]:
    """The plan's own choice and the fixed ones, all under the same limit."""
    limit = limit_of(case, root)
    with memory_group(limit) as group:
        own = train(case, root, group)
    fixed = []
    for budget, checkpointing in RIVALS if rivals else ():
        method = own["choices"].get("method", "lora")
        settings = {"train.token_budget": budget, "train.activation_checkpointing": checkpointing}
        if budget < case.get("longest", 256):
            continue
        with memory_group(limit) as group:
            found = train(case, root, group, **settings, **{"train.method": method})
        fixed.append(found | {"token_budget": budget, "checkpointing": checkpointing})
    return {"case": case["name"], "limit_bytes": limit, "own": own, "fixed": fixed}


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """The figures that are asked for."""
    own = result["own"]
    feasible = [found for found in result["fixed"] if found["code"] == 0 and not found["kills"]]
    best = max(feasible, key=lambda found: found["tokens_per_second"], default=None)
    return {
        "kills": own["kills"],
        "finished": own["code"] == 0 and own["updates"] == UPDATES,
        "probe_passes": own["probe_passes"],
        "batch_exact": own["updates"] > 0 and set(own["batches"]) == {GLOBAL_BATCH},
        "share_of_best": own["tokens_per_second"] / best["tokens_per_second"] if best else None,
        "best": f"{best['token_budget']}{' recomputed' if best['checkpointing'] else ''}" if best else None,
    }


def _tell(result: dict[str, Any]) -> None:
    own, found = result["own"], verdict(result)
    choices = own["choices"]
    chosen = f"{choices.get('method')} {choices.get('token_budget')}"
    chosen += " recomputed" if choices.get("activation_checkpointing") else ""
    share = "" if found["share_of_best"] is None else f"{100 * found['share_of_best']:.0f} % of {found['best']}"
    print(
        f"{result['case']:28} limit {result['limit_bytes'] / MIB:6.0f}  resident {own['memory_bytes'] / MIB:6.0f}  "
        f"kills {found['kills']}  updates {own['updates']}  probes {found['probe_passes']}  "
        f"batch {'exact' if found['batch_exact'] else own['batches']}  {chosen:24} "
        f"{own['tokens_per_second']:6.0f} tok/s  {own['major_faults']} pages read again  {share}",
        flush=True,
    )
    for rival in result["fixed"]:
        outcome = f"{rival['tokens_per_second']:.0f} tok/s" if rival["code"] == 0 else f"exit code {rival['code']}"
        outcome = "killed" if rival["kills"] else outcome
        recomputed = " recomputed" if rival["checkpointing"] else ""
        again = f"{rival['major_faults']} pages read again"
        print(f"    {rival['token_budget']:5}{recomputed:11} {outcome:12} {again}", flush=True)
    if own["code"]:
        print(f"    exit code {own['code']}: {own['said'].strip().splitlines()[-1:]}", flush=True)


def main() -> None:
    """Run the matrix, print it, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="cases whose name contains this")
    parser.add_argument("--no-rivals", action="store_true", help="without the fixed budgets")
    parser.add_argument("--root", type=Path, help="where models and rows are kept for the next time")
    parser.add_argument("--json", type=Path, help="write everything that was found here")
    asked = parser.parse_args()
    cases = [case for case in CASES if not asked.only or any(part in case["name"] for part in asked.only)]
    about = {
        "machine": {"cores": len(os.sched_getaffinity(0)), "memory": psutil.virtual_memory().total},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "command": " ".join(sys.argv),
        "load_before": os.getloadavg()[0],
    }
    print(json.dumps(about, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = (asked.root or Path(scratch)).resolve()
        os.environ.update(surroundings(root), GOMP_SPINCOUNT="10000")
        try:
            with memory_group(1 << 30):
                pass
        except NoMemoryGroupError as error:
            print(f"skipped: {error}")
            return
        results = []
        for case in cases:
            prepare(case, root)
            results.append(measure(case, root, rivals=not asked.no_rivals))
            _tell(results[-1])
    found = [verdict(result) for result in results]
    shares = [one["share_of_best"] for one in found if one["share_of_best"] is not None]
    summary = {
        "cases": len(found),
        "killed": sum(one["kills"] for one in found),
        "finished": sum(one["finished"] for one in found),
        "batch exact": sum(one["batch_exact"] for one in found),
        "most probe passes": max((one["probe_passes"] or 0 for one in found), default=0),
        "least share of the best": min(shares, default=None),
    }
    print(json.dumps(summary))
    if asked.json:
        asked.json.write_text(json.dumps(about | {"summary": summary, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
