"""How far the predicted memory and time of a run are from what the run really takes, on a CPU.

    python tests/benchmarks/bench_memory.py                      # all cases, about 20 minutes on two cores
    python tests/benchmarks/bench_memory.py --cases 6            # every ninth
    python tests/benchmarks/bench_memory.py --only qwen --no-rss # those named so, tensors alone

Models of 20 to 300 million parameters with random weights. This process asks ``FineTuner.plan()`` for each case; the
measuring is done by ``memory_worker.py`` in processes of its own, which know nothing of the prediction. Tensors are
counted from the allocator's events, two runs at a time; resident set and seconds are those of another run, alone on
the machine and with nothing watching. Nothing else may run.

Asked: tensor peak within 2 % mean and 5 % worst; resident set within 15 % worst and never under-predicted by more than
3 %; seconds per update, as corrected by the run's own probe, within 25 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from memory_cases import settings_of
from memory_worker import measure, surroundings, tracked

PACKAGES = ("llmtune", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors")
# Imported once, before the tracked runs are forked off.
PRELOADED = ["torch", "transformers", "transformers.trainer", "peft", "datasets", "accelerate", "bitsandbytes"]

# ── the cases ────────────────────────────────────────────────────────────────────────────────────────────────────

# Grouped queries, wide heads, tied heads, fused projections, layers without gate: what sets architectures apart.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden": 768, "layers": 12, "heads": 12, "kv_heads": 4, "mlp": 2048, "vocabulary": 32000},
    "phi": {"hidden": 512, "layers": 10, "heads": 8, "mlp": 2048, "vocabulary": 51200},
    "phi3": {"hidden": 768, "layers": 8, "heads": 12, "mlp": 2048, "vocabulary": 32064},
    "mistral": {"hidden": 1024, "layers": 6, "heads": 16, "kv_heads": 4, "mlp": 3584, "vocabulary": 32768},
    "qwen2": {"hidden": 640, "layers": 10, "heads": 10, "kv_heads": 2, "mlp": 2432, "vocabulary": 98304, "tied": True},
    "qwen3": {
        "hidden": 512,
        "layers": 12,
        "heads": 8,
        "kv_heads": 4,
        "head_dim": 128,
        "mlp": 1536,
        "vocabulary": 48000,
        "tied": True,
    },
}
# Settings of one case by architecture; each line names what it is there for.
LINES: tuple[tuple[str, dict[str, Any]], ...] = (
    # lora, the usual way, at several shapes of batch
    ("llama", {"rows": 4, "width": 256}),
    ("llama", {"rows": 1, "width": 1024, "dropout": 0.05}),
    ("llama", {"rows": 1, "width": 3072}),
    ("llama", {"rows": 16, "width": 64, "rank": 64}),
    ("phi", {"rows": 4, "width": 256, "dropout": 0.05}),
    ("phi", {"rows": 8, "width": 64, "targets": ["all-linear"]}),
    ("phi3", {"rows": 4, "width": 256}),
    ("phi3", {"rows": 2, "width": 512, "dropout": 0.1, "rank": 8}),
    ("mistral", {"rows": 4, "width": 256, "dropout": 0.05}),
    ("mistral", {"rows": 1, "width": 512, "targets": ["q_proj", "v_proj"]}),
    ("qwen2", {"rows": 4, "width": 128}),
    ("qwen2", {"rows": 2, "width": 384, "dropout": 0.05, "rank": 32}),
    ("qwen3", {"rows": 4, "width": 256, "dropout": 0.05}),
    ("qwen3", {"rows": 1, "width": 768}),
    # lora in fp32
    ("llama", {"rows": 2, "width": 256, "precision": "fp32"}),
    ("phi", {"rows": 2, "width": 128, "precision": "fp32", "dropout": 0.05}),
    ("qwen3", {"rows": 2, "width": 256, "precision": "fp32"}),
    # lora with every layer, or every second one, recomputed
    ("llama", {"rows": 4, "width": 256, "checkpoint_every": 1}),
    ("llama", {"rows": 4, "width": 256, "checkpoint_every": 2, "dropout": 0.05}),
    ("phi", {"rows": 4, "width": 256, "checkpoint_every": 1, "dropout": 0.05}),
    ("phi3", {"rows": 8, "width": 128, "checkpoint_every": 2}),
    ("mistral", {"rows": 2, "width": 512, "checkpoint_every": 1, "dropout": 0.05}),
    ("qwen2", {"rows": 1, "width": 512, "checkpoint_every": 2, "dropout": 0.05}),
    ("qwen3", {"rows": 4, "width": 256, "checkpoint_every": 1}),
    # lora: packed rows, evaluation, several passes, other optimizers
    ("llama", {"rows": 4, "width": 256, "packed": True, "dropout": 0.05}),
    ("qwen2", {"rows": 4, "width": 128, "packed": True, "checkpoint_every": 1}),
    ("mistral", {"rows": 2, "width": 256, "evaluate": True, "passes": 2}),
    ("phi3", {"rows": 2, "width": 256, "evaluate": True, "optimizer": "adafactor"}),
    ("qwen3", {"rows": 2, "width": 256, "optimizer": "adamw_8bit", "rank": 64, "targets": ["all-linear"]}),
    # rows of many lengths, as in real data: each shape leaves gaps of its own in the heap
    ("llama", {"rows": 2, "width": 256, "mixed": True, "passes": 4, "dropout": 0.05}),
    ("qwen2", {"rows": 2, "width": 192, "mixed": True, "passes": 4, "checkpoint_every": 1, "evaluate": True}),
    ("phi", {"method": "qlora", "rows": 2, "width": 192, "mixed": True, "passes": 4}),
    ("qwen3", {"method": "full", "rows": 2, "width": 192, "mixed": True, "passes": 4, "evaluate": True}),
    # qlora
    ("llama", {"method": "qlora", "rows": 4, "width": 128, "dropout": 0.05}),
    ("phi", {"method": "qlora", "rows": 4, "width": 128}),
    ("phi3", {"method": "qlora", "rows": 2, "width": 256, "checkpoint_every": 1}),
    ("mistral", {"method": "qlora", "rows": 2, "width": 256, "dropout": 0.05, "checkpoint_every": 1}),
    ("mistral", {"method": "qlora", "quantization": "int8", "rows": 2, "width": 128}),
    ("qwen2", {"method": "qlora", "rows": 2, "width": 128, "optimizer": "adamw_8bit"}),
    ("qwen2", {"method": "qlora", "quantization": "int8", "rows": 2, "width": 128, "checkpoint_every": 1}),
    ("qwen3", {"method": "qlora", "rows": 4, "width": 128, "dropout": 0.05, "optimizer": "adamw_torch"}),
    ("qwen3", {"method": "qlora", "rows": 2, "width": 256, "precision": "fp32"}),
    # the whole model
    ("llama", {"method": "full", "rows": 2, "width": 256}),
    ("llama", {"method": "full", "rows": 4, "width": 256, "checkpoint_every": 1, "optimizer": "adamw_8bit"}),
    ("llama", {"method": "full", "rows": 2, "width": 128, "precision": "fp32", "optimizer": "sgd"}),
    ("phi", {"method": "full", "rows": 4, "width": 128, "optimizer": "adamw_torch"}),
    ("phi", {"method": "full", "rows": 4, "width": 256, "optimizer": "lion_32bit", "checkpoint_every": 2}),
    ("phi3", {"method": "full", "rows": 4, "width": 128, "optimizer": "adafactor"}),
    ("phi3", {"method": "full", "rows": 2, "width": 128, "precision": "fp32", "checkpoint_every": 1}),
    ("mistral", {"method": "full", "rows": 2, "width": 128, "checkpoint_every": 1}),
    ("mistral", {"method": "full", "rows": 1, "width": 256, "optimizer": "sgd", "evaluate": True}),
    ("qwen2", {"method": "full", "rows": 2, "width": 128, "optimizer": "adafactor"}),
    ("qwen2", {"method": "full", "rows": 2, "width": 256, "optimizer": "adamw_8bit", "checkpoint_every": 1}),
    ("qwen3", {"method": "full", "rows": 4, "width": 128}),
    ("qwen3", {"method": "full", "rows": 2, "width": 256, "optimizer": "lion_8bit", "saved_dtype": "fp32"}),
)


def all_cases() -> list[dict[str, Any]]:
    """Every case with its name: architecture, method, batch, and what is unusual about it."""
    cases = []
    for architecture, line in LINES:
        case = {"architecture": architecture, **SHAPES[architecture], **line}
        method = line.get("quantization", line.get("method", "lora")).replace("qlora", "nf4")
        told = {"rows", "width", "method", "quantization"}
        rest = [_spelled(key, value) for key, value in line.items() if key not in told]
        cases.append(case | {"name": " ".join([architecture, method, f"{line['rows']}x{line['width']}", *rest])})
    return cases


def _spelled(key: str, value: Any) -> str:
    short = {"dropout": "drop", "checkpoint_every": "ckpt", "optimizer": "", "precision": "", "rank": "r"}
    if value is True:
        return key
    return short.get(key, "") + (f"{value:g}" if isinstance(value, int | float) else "+".join(_listed(value)))


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


# ── predicted and measured ───────────────────────────────────────────────────────────────────────────────────────


def predict(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """What ``llmtune plan`` says of this case."""
    from llmtune import FineTuner

    plan = FineTuner(**settings_of(case, root, root / "never")).plan()
    return {
        "tensor_peak_bytes": plan.memory.tensor_peak_bytes,
        "peak_bytes": plan.memory.peak_bytes,
        "terms": dict(plan.memory.terms),
        "step_seconds": plan.time.step_seconds,
    }


def _track(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """A tracked run in this very process, silent; two updates hold everything that a later one does."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    return tracked(case | {"updates": 2}, root)


def run(cases: list[dict[str, Any]], root: Path, *, rss: bool) -> list[dict[str, Any]]:
    """Measure all cases; one line is printed for each as it is done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    _build_all(cases, root)
    predicted = [predict(case, root) for case in cases]
    with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = [pool.submit(_track, case, root) for case in cases]
        seen = []
        for case, told, future in zip(cases, predicted, waiting, strict=True):
            seen.append(_finished(future))
            if not rss:
                print(_line({"case": case, "predicted": told, "measured": seen[-1]}), flush=True)
    results = []
    for case, told, tensors in zip(cases, predicted, seen, strict=True):
        found = tensors
        if rss and "error" not in tensors:
            try:
                found = tensors | measure(case, root, ("plain",))
            except RuntimeError as error:
                found = {"error": str(error)}
            print(_line({"case": case, "predicted": told, "measured": found}), flush=True)
        results.append({"case": case, "predicted": told, "measured": found})
    return results


def _build_all(cases: list[dict[str, Any]], root: Path) -> None:
    """In a process of its own: what it takes must not be there when runs are measured."""
    code = (
        "import json, sys; from pathlib import Path; from memory_cases import build\n"
        "for case in json.load(sys.stdin): build(case, Path(sys.argv[1]))"
    )
    every = [case | {"updates": updates} for case in cases for updates in (2, 3)]
    command = [sys.executable, "-c", code, str(root)]
    subprocess.run(
        command, input=json.dumps(every), text=True, check=True, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent
    )


def _finished(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except Exception as error:  # whatever a run dies of is a line of the table
        return {"error": f"{type(error).__name__}: {error}"}


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────

MIB = 2**20
HEADER = (
    f"{'case':46} {'predicted':>9} {'tensors':>9} {'error':>7} {'predicted':>10} {'resident':>9} {'error':>7} "
    f"{'planned':>8} {'probed':>8} {'s/update':>8} {'error':>7}"
)


def _errors(result: dict[str, Any]) -> dict[str, float]:
    """Predicted over measured, less one, of what was measured."""
    told, found = result["predicted"], result["measured"]
    errors = {}
    if "tensor_peak_bytes" in found:
        errors["tensors"] = told["tensor_peak_bytes"] / found["tensor_peak_bytes"] - 1
    if "rss_peak_bytes" in found:
        seconds = _seconds(found)
        errors["resident set"] = told["peak_bytes"] / found["rss_peak_bytes"] - 1
        errors["seconds, planned"] = told["step_seconds"] / seconds - 1
        errors["seconds, after the probe"] = _probed(found) / seconds - 1
    return errors


def _seconds(found: dict[str, Any]) -> float:
    """An update once everything has been seen before."""
    return statistics.median(found["step_seconds"][1:])


def _probed(found: dict[str, Any]) -> float:
    """Seconds per update as the run's last plan before training says."""
    return float(found["plans"][-1]["time"]["step_seconds"])


def _line(result: dict[str, Any]) -> str:
    name, told, found = result["case"]["name"], result["predicted"], result["measured"]
    if "error" in found:
        return f"{name:46} {found['error'].splitlines()[-1][:120]}"
    errors = _errors(result)
    line = f"{name:46} {told['tensor_peak_bytes'] / MIB:9.0f} {found['tensor_peak_bytes'] / MIB:9.0f}"
    line += f" {100 * errors['tensors']:+6.1f}%"
    if "rss_peak_bytes" in found:
        line += f" {told['peak_bytes'] / MIB:10.0f} {found['rss_peak_bytes'] / MIB:9.0f}"
        line += f" {100 * errors['resident set']:+6.1f}%"
        line += f" {told['step_seconds']:8.2f} {_probed(found):8.2f} {_seconds(found):8.2f}"
        line += f" {100 * errors['seconds, after the probe']:+6.0f}%"
    return line


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each figure: mean of the absolute errors, the worst, the least and greatest signed one; in percent."""
    table: dict[str, dict[str, float]] = {}
    errors = [_errors(result) for result in results if "error" not in result["measured"]]
    for figure in errors[0] if errors else ():
        values = [100 * error[figure] for error in errors]
        table[figure] = {
            "cases": len(values),
            "mean": statistics.fmean(map(abs, values)),
            "worst": max(map(abs, values)),
            "most below": min(values),
            "most above": max(values),
        }
        if figure.startswith("seconds"):
            table[figure]["median ratio"] = 1 + statistics.median(values) / 100
            table[figure]["share within 25 %"] = 100 * statistics.fmean(abs(value) <= 25 for value in values)
    return table


def main() -> None:
    """Predict, measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="so many of them, spread evenly")
    parser.add_argument("--only", action="append", help="cases whose name contains this")
    parser.add_argument("--no-rss", action="store_true", help="tensors alone: neither resident set nor seconds")
    parser.add_argument("--root", type=Path, help="where models and rows are kept for the next time")
    parser.add_argument("--json", type=Path, help="write everything that was found here")
    asked = parser.parse_args()
    cases = [case for case in all_cases() if not asked.only or any(part in case["name"] for part in asked.only)]
    if asked.cases:
        cases = [cases[i * len(cases) // asked.cases] for i in range(min(asked.cases, len(cases)))]
    started = time.time()
    about = {
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "memory": psutil.virtual_memory().total},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "command": " ".join(sys.argv),
        "load_before": os.getloadavg()[0],
    }
    print(json.dumps(about, indent=1), HEADER, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        root = (asked.root or Path(scratch)).resolve()
        os.environ.update(surroundings(root), GOMP_SPINCOUNT="10000")
        results = run(cases, root, rss=not asked.no_rss)
    found = summary(results)
    failed = sum("error" in result["measured"] for result in results)
    for figure, numbers in found.items():
        print(f"{figure:26}", "  ".join(f"{name} {value:.2f}" for name, value in numbers.items()))
    print(f"{failed} of {len(results)} cases failed; {time.time() - started:.0f} s")
    if asked.json:
        asked.json.write_text(json.dumps(about | {"summary": found, "results": results}, indent=1) + "\n")


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
