"""Whether an update takes as long as the plan says before anything has run; and the constants that would say it best.

    python tests/benchmarks/bench_time.py            # all cases, about ten minutes on two cores
    python tests/benchmarks/bench_time.py --only nf4
    python tests/benchmarks/bench_time.py --fit      # and fit the costs of ``planning/passes.py`` to them

Each case is a true ``FineTuner(...).train()`` in a process of its own, on random weights and rows of one width; its
fastest update counts, because what else the machine does only slows. Predicted is the plan of the same settings from
the rates of this machine, with nothing learned from earlier runs. Nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from memory_cases import settings_of
from memory_worker import measure, surroundings

PACKAGES = ("llmtune", "torch", "transformers", "peft")
UPDATES = 6
SMALL = {"hidden": 256, "layers": 6, "heads": 4, "vocabulary": 8192}
MIDDLE = {"hidden": 576, "layers": 12, "heads": 9, "kv_heads": 3, "mlp": 1536, "vocabulary": 49152, "tied": True}
WIDE = {"hidden": 1024, "layers": 6, "heads": 16, "mlp": 2816, "vocabulary": 32000}
WORDS = {"architecture": "qwen2", "hidden": 896, "layers": 6, "heads": 14, "kv_heads": 2, "mlp": 4864} | {
    "vocabulary": 151936,
    "tied": True,
}
CASES: tuple[dict[str, Any], ...] = (
    {"name": "small", **SMALL},
    {"name": "small, few tokens", **SMALL, "rows": 1, "width": 64},
    {"name": "small, many passes", **SMALL, "rows": 2, "width": 128, "passes": 4},
    {"name": "small, full", **SMALL, "method": "full"},
    {"name": "middle", **MIDDLE},
    {"name": "middle, few tokens", **MIDDLE, "rows": 1, "width": 64},
    {"name": "middle, long rows", **MIDDLE, "rows": 1, "width": 1000},
    {"name": "middle, longer rows", **MIDDLE, "rows": 1, "width": 2000},
    {"name": "middle, rank 64", **MIDDLE, "rank": 64},
    {"name": "middle, two modules", **MIDDLE, "targets": ["q_proj", "v_proj"]},
    {"name": "middle, dropout", **MIDDLE, "dropout": 0.1},
    {"name": "middle, recomputed", **MIDDLE, "checkpoint_every": 1},
    {"name": "middle, full", **MIDDLE, "method": "full"},
    {"name": "middle, fp32", **MIDDLE, "precision": "fp32", "rows": 2},
    {"name": "middle, nf4", **MIDDLE, "method": "qlora"},
    {"name": "middle, nf4, few tokens", **MIDDLE, "method": "qlora", "rows": 1, "width": 128},
    {"name": "wide", **WIDE},
    {"name": "wide, long rows", **WIDE, "rows": 1, "width": 1500},
    {"name": "wide, dropout", **WIDE, "dropout": 0.1, "rows": 2},
    {"name": "wide, full", **WIDE, "method": "full", "rows": 2},
    {"name": "wide, recomputed", **WIDE, "checkpoint_every": 1, "width": 128},
    {"name": "wide, nf4", **WIDE, "method": "qlora"},
    {"name": "large vocabulary", **WORDS},
    {"name": "large vocabulary, two modules", **WORDS, "targets": ["q_proj", "v_proj"], "rows": 2},
    {"name": "large vocabulary, full", **WORDS, "method": "full", "rows": 2},
    {"name": "phi", "architecture": "phi", "vocabulary": 51200},
    {"name": "gpt2", "architecture": "gpt2", "vocabulary": 50257, "tied": True},
)


# What these cases cannot tell from other costs is held at what it is now.
HELD = ("adapter", "optimizer", "weight_gradient")


def update_seconds(case: Mapping[str, Any], root: Path, costs: Any = None) -> float:
    """What the plan says of one update of this case, here with other costs."""
    from llmtune import FineTuner
    from llmtune.planning import timing

    before = timing.costs_of
    timing.costs_of = before if costs is None else lambda *_: costs
    try:
        with tempfile.TemporaryDirectory(dir=root) as output:
            return FineTuner(**settings_of(dict(case), root, Path(output) / "run")).plan().time.step_seconds
    finally:
        timing.costs_of = before


def measured(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """The case as it ran, and as it was predicted."""
    seconds = measure({key: value for key, value in case.items() if key != "name"}, root, ("plain",))
    fastest, predicted = min(seconds["step_seconds"][1:]), update_seconds(case, root)
    return {"case": case, "seconds": fastest, "predicted": predicted, "ratio": predicted / fastest}


def fitted(found: Sequence[Mapping[str, Any]], root: Path) -> dict[str, float]:
    """Costs with which predicted over measured has the least squares from 1; none below nothing."""
    from llmtune.hardware import detect
    from llmtune.planning.passes import costs_of

    now = costs_of("cpu", detect().cpu)
    names = [field.name for field in fields(now) if field.name not in (*HELD, "overlaps")]
    nothing = replace(now, **dict.fromkeys(names, 0.0))
    cases = [one["case"] for one in found]
    base = np.array([update_seconds(case, root, nothing) for case in cases])
    parts = np.array([[update_seconds(c, root, replace(nothing, **{n: 1.0})) for n in names] for c in cases])
    seconds = np.array([one["seconds"] for one in found])
    rows, wanted = (parts - base[:, None]) / seconds[:, None], 1 - base / seconds
    free = [i for i in range(len(names)) if rows[:, i].any()]
    values = dict.fromkeys(names, 0.0)
    while free:
        solved, *_ = np.linalg.lstsq(rows[:, free], wanted, rcond=None)
        if (solved >= 0).all():
            values |= {names[i]: float(value) for i, value in zip(free, solved, strict=True)}
            break
        free.pop(int(np.argmin(solved)))
    return values


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Measured beside predicted, in Markdown."""
    lines = ["| case | an update took, s | predicted, s | predicted / measured |", "| --- | --- | --- | --- |"]
    lines += [f"| {o['case']['name']} | {o['seconds']:.3f} | {o['predicted']:.3f} | {o['ratio']:.2f} |" for o in found]
    ratios = sorted(one["ratio"] for one in found)
    within = sum(1 / 1.25 <= ratio <= 1.25 for ratio in ratios)
    lines += ["", f"median {median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}; "]
    lines[-1] += f"{within} of {len(ratios)} within 25 %"
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--fit", action="store_true", help="print costs fitted to these cases")
    parser.add_argument("--root", type=Path, help="where models and rows are kept for the next call")
    parser.add_argument("--json", type=Path, help="write everything there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = asked.root or Path(place)
        os.environ |= surroundings(root) | {"LLMTUNE_STORE": f"sqlite:///{place}/nothing-learned.db"}
        found = []
        for case in CASES:
            if asked.only is None or asked.only in case["name"]:
                found.append(measured(case | {"updates": UPDATES}, root))
                told = f"{case['name']}: {found[-1]['seconds']:.3f} s, {found[-1]['ratio']:.2f}"
                print(told, file=sys.stderr, flush=True)
        document: dict[str, Any] = {"found": found, "versions": {name: version(name) for name in PACKAGES}}
        document |= {"machine": platform.platform(), "command": shlex.join(["python", *sys.argv])}
        print(table(found))
        if asked.fit:
            document["fit"] = fitted(found, root)
            print("\n" + "\n".join(f"    {name}={value:.3g}," for name, value in document["fit"].items()))
        if asked.json:
            asked.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
