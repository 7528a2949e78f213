"""The catalogue's faults of memory, 35 to 37, 39 and 40: the run ends as it would have without them."""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from factories import save_family_model
from shortages import RunsOut, changed_models
from tuning import evaluations, events, history, tune, weights

from llmtune.errors import RecoveryExhausted
from llmtune.kernels import CHUNK_ROWS
from llmtune.runs import RunDirectory

pytestmark = pytest.mark.fault
Model = Callable[[str], Path]
HOW: dict[str, Any] = {"max_steps": 6, "learning_rate": 1e-4, "probe": False, "evaluate.every_steps": 3}


def with_fault(model: Path, path: Path, fault: RunsOut, **how: Any) -> None:
    with changed_models(fault):
        assert tune(model, path, callbacks=[fault], **HOW | how).status == "finished"


def require_nothing_lost(run: Path, whole: Path) -> None:
    """As many updates, each of the same rows, and the same weights."""
    assert [(step[0], *step[4:]) for step in history(run)] == [(step[0], *step[4:]) for step in history(whole)]
    first, second = weights(run), weights(whole)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-6


def test_fault_35_memory_runs_out_in_one_step(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    fault = RunsOut(once_at_step=4)
    with_fault(family_model("llama"), tmp_path / "run", fault)
    assert fault.raised == 1
    require_nothing_lost(tmp_path / "run", tmp_path / "whole")


def test_fault_36_memory_runs_out_whenever_a_pass_is_larger(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    fault = RunsOut(above_rows=2)
    with_fault(family_model("llama"), tmp_path / "run", fault)
    assert fault.raised > 0
    require_nothing_lost(tmp_path / "run", tmp_path / "whole")


def test_fault_37_one_row_is_too_much(family_model: Model, tmp_path: Path) -> None:
    """It stops, and says which; the run then goes on with the same command once there is memory."""
    fault = RunsOut(above_tokens=48)
    with pytest.raises(RecoveryExhausted, match=r"line \d+, \d\d tokens"):
        with_fault(family_model("llama"), tmp_path / "run", fault)
    assert RunDirectory.open(tmp_path / "run").run["exit_code"] == 5
    tune(family_model("llama"), tmp_path / "run", **HOW)
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    require_nothing_lost(tmp_path / "run", tmp_path / "whole")


def test_fault_39_memory_runs_out_in_evaluation(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "whole", **HOW)
    fault = RunsOut(above_rows=1, in_evaluation=True)
    with_fault(family_model("llama"), tmp_path / "run", fault)
    assert fault.raised > 0
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    whole = evaluations(tmp_path / "whole")
    assert evaluations(tmp_path / "run") == {step: pytest.approx(loss, abs=1e-5) for step, loss in whole.items()}
    assert {event["action"] for event in events(tmp_path / "run", "recovery")} == {"smaller_evaluation"}


# --- 40: the kernel kills ---------------------------------------------------------------------------------------------

# With this vocabulary it is the logits of the loss's chunks that fill memory: 4 bytes for each of its entries and rows.
VOCABULARY, BUDGET = 150_000, 1024
CHUNK = 4 * VOCABULARY * CHUNK_ROWS
# A neighbour takes memory after the run has been planned; in the second case the guard knows what a pass takes by then.
RUN = f"""
import sys
from pathlib import Path
from transformers import TrainerCallback
from llmtune import FineTuner

model, rows, output, guard, at, left = sys.argv[1:]

class Neighbour(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(at):
            from llmtune.training.memory_guard import bytes_left
            self.held = bytearray(b"x") * max(0, bytes_left() - int(left))

FineTuner(rows, model=model, output=output, callbacks=[Neighbour()], method="lora", precision="fp32", dropout=0.0,
    learning_rate=1e-4, max_steps=4, global_batch_size=16, token_budget={BUDGET}, num_samples=0, report=False,
    device="cpu", threads=1, probe=False, num_workers=0,
    **{{"output.root": str(Path(output).parent), "evaluate.base": False, "evaluate.every_steps": 4,
       "recover.memory_guard": guard == "yes", "activation_checkpointing": False}}).train()
"""


@pytest.mark.parametrize(
    "at", [pytest.param(0, id="first pass"), pytest.param(1, id="known pass", marks=pytest.mark.sweep)]
)
def test_fault_40_the_kernel_would_have_killed(tmp_path: Path, limit: Any, at: int) -> None:
    model = save_family_model("llama", tmp_path / "TinyLlama-wide", vocab_size=VOCABULARY)
    rng, rows = random.Random(0), tmp_path / "rows.jsonl"
    texts = [" ".join(rng.choices(("lamp", "keeps", "who", "number", "and"), k=rng.randint(8, 60))) for _ in range(96)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "run.py").write_text(RUN)

    def run(name: str, guard: str, left: int) -> tuple[int, int, str]:
        group = limit(3 * 2**30)
        how = [str(model), str(rows), str(tmp_path / name), guard, str(at), str(left)]
        settings = {"env": dict(os.environ), "cwd": tmp_path, "timeout": 300}
        done = group.run([sys.executable, str(tmp_path / "run.py"), *how], **settings)
        return done.returncode, group.kills, done.stderr[-3000:]

    short = CHUNK // 2
    assert run("free", "yes", 3 * 2**30)[:2] == (0, 0)
    assert run("killed", "no", short)[:2] == (-9, 1)
    code, kills, said = run("guarded", "yes", short)
    assert (code, kills) == (0, 0), said
    assert "memory guard" in {event["error"].split(":")[0] for event in events(tmp_path / "guarded", "incident")}
    require_nothing_lost(tmp_path / "guarded", tmp_path / "free")
    assert events(tmp_path / "free", "incident") == []
