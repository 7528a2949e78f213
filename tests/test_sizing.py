"""Under a memory limit a run chooses by itself what goes through the model at once: nothing is killed or lost."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cgroups import memory_group
from factories import save_family_model
from tuning import history

from llmtune import FineTuner
from llmtune.runs import RunDirectory

pytestmark = pytest.mark.slow
MIB = 2**20
# With this vocabulary it is the logits that fill memory: 12 bytes for each of its entries and each token of a pass.
VOCABULARY, USUAL_BUDGET = 48_000, 1024
SETTINGS: dict[str, Any] = {
    "method": "lora",
    "precision": "fp32",
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "max_steps": 4,
    "global_batch_size": 16,
    "evaluate.every_steps": 2,
    "num_samples": 1,
    "max_new_tokens": 4,
    "monitor.report": False,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "TinyLlama-wide"
    return save_family_model("llama", directory, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "rows.jsonl"
    texts = [" ".join(rng.choices(("lamp", "keeps", "who", "number", "and"), k=rng.randint(8, 60))) for _ in range(96)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(model: Path, rows: Path, output: Path, **changes: Any) -> dict[str, Any]:
    where = {"model": str(model), "data.path": str(rows), "output": str(output), "output.root": str(output.parent)}
    return SETTINGS | where | changes


def command(**wanted: Any) -> list[str]:
    flags = [part for key, value in wanted.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "llmtune", "train", *flags]


def needs(model: Path, rows: Path, output: Path, budget: int) -> int:
    """Bytes that a run with this token budget is said to take."""
    fixed = {"token_budget": budget, "activation_checkpointing": False}
    return FineTuner(**settings(model, rows, output, **fixed)).plan().memory.peak_bytes


def test_the_limit_is_one(limit: Any) -> None:
    group = limit(100 * MIB)
    assert group.run([sys.executable, "-c", "bytearray(20 * 2**20)"]).returncode == 0
    assert group.kills == 0
    assert group.run([sys.executable, "-c", "bytearray(200 * 2**20)"]).returncode == -9
    assert group.kills == 1


def test_a_group_is_removed_with_what_runs_in_it(limit: Any) -> None:
    with memory_group(100 * MIB) as group:
        sleeping = subprocess.Popen(["sh", "-c", f"echo $$ > {group.path}/cgroup.procs && exec sleep 60"])
        while str(sleeping.pid) not in (group.path / "cgroup.procs").read_text().split():
            pass
    assert sleeping.wait(10) == -9
    assert not group.path.exists()


def test_a_limit_below_the_usual_pass_makes_passes_smaller_and_nothing_else(
    model: Path, rows: Path, tmp_path: Path, limit: Any
) -> None:
    free, bound = tmp_path / "free", tmp_path / "bound"
    FineTuner(**settings(model, rows, free)).train()
    least, usual = (needs(model, rows, tmp_path / "never", budget) for budget in (64, USUAL_BUDGET))
    group = limit(least + (usual - least) // 2)
    done = group.run(command(**settings(model, rows, bound)), env=dict(os.environ), cwd=tmp_path, timeout=300)

    assert (done.returncode, group.kills) == (0, 0), done.stderr[-2000:]
    plans = [json.loads(path.read_text()) for path in RunDirectory.open(bound).plans]
    assert plans[0]["choices"]["token_budget"]["value"] < USUAL_BUDGET
    assert [len(plan["measured"]["passes"]) <= 2 for plan in plans if plan.get("measured")] == [True]
    assert {step["global_batch_size"] for step in RunDirectory.open(bound).steps()} == {16}
    expected = [value for step in history(free) for value in step]
    assert [value for step in history(bound) for value in step] == pytest.approx(expected, rel=2e-4)


def test_a_fixed_budget_that_does_not_fit_is_refused_before_anything_is_loaded(
    model: Path, rows: Path, tmp_path: Path, limit: Any
) -> None:
    group, output = limit(needs(model, rows, tmp_path / "never", USUAL_BUDGET) - 100 * MIB), tmp_path / "run"
    wanted = settings(model, rows, output, **{"train.token_budget": USUAL_BUDGET})
    done = group.run(command(**wanted), env=dict(os.environ), cwd=tmp_path, timeout=300)
    assert (done.returncode, group.kills) == (4, 0), done.stderr[-2000:]
    assert "--set train.token_budget=auto" in done.stderr
    assert not output.exists()
