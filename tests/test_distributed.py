"""Two real processes over gloo: the same loss as one, one account, and a word when fewer run than were asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tuning import ROWS, history

from llmtune.hardware import accelerate_config_path
from llmtune.runs import RunDirectory

pytestmark = pytest.mark.slow
SETTINGS = {
    "max_steps": 6,
    "global_batch_size": 5,  # odd, and 23 rows leave a last update of three: ranks get unequal shares
    "precision": "fp32",
    "dropout": 0.0,
    "learning_rate": 1e-3,
    "evaluate.every_steps": 3,
    "num_samples": 1,
    "max_new_tokens": 4,
    "monitor.report": False,
}


def train(data: Path, output: Path, *launch: str, extra: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    flags = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    where = ["--output", str(output), "--set", f"output.root={output.parent}"]
    command = [*launch, "-m", "llmtune", "train", str(data), "--model", "builtin:tiny", *where, *flags, *extra]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        environment.pop(name, None)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "lamps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "lamps.jsonl"


def test_two_processes_train_as_one(tmp_path: Path, data: Path) -> None:
    alone = train(data, tmp_path / "alone", sys.executable)
    assert alone.returncode == 0, alone.stderr
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    pair = train(data, tmp_path / "pair", *launcher, "--config_file", str(accelerate_config_path("cpu_ddp")))
    assert pair.returncode == 0, pair.stderr
    one, two = history(tmp_path / "alone"), history(tmp_path / "pair")
    started = next(e for e in RunDirectory.open(tmp_path / "pair").events() if e["event"] == "run_started")
    assert started["processes"] == 2
    assert [step[0] for step in two] == [1, 2, 3, 4, 5, 6]
    assert [step[4:] for step in one] == [step[4:] for step in two]  # the same tokens in every update
    difference = np.abs(np.subtract([step[1] for step in one], [step[1] for step in two]))
    assert difference.max() < 1e-5
    assert pair.stderr.count("evaluation at step 6") == 1  # one account, not one per process


def test_fewer_processes_than_asked_for_are_named(tmp_path: Path, data: Path) -> None:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
    done = train(data, tmp_path / "run", *launcher)
    assert done.returncode == 0, done.stderr
    assert "warning: " in done.stderr
    assert "cpu_ddp" in done.stderr
