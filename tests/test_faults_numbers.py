"""Numbers that go wrong inside a real training: what is dropped, what is named, where the run goes back to."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import save_family_model
from transformers import TrainerCallback
from tuning import ROWS, events, history, losses, tune, weights

from llmtune.checkpoints import list_checkpoints
from llmtune.data import epoch_order
from llmtune.errors import DataError, TrainingError
from llmtune.hardware import accelerate_config_path
from llmtune.runs import RunDirectory

pytestmark = pytest.mark.fault

Model = Callable[[str], Path]
MARK = "zzyzx"  # a word of the poisoned rows, and of no other


def blocks(model: Any) -> Any:
    """The decoder layers of a model, with or without an adapter."""
    return (
        getattr(model, "base_model", model).model.model.layers if hasattr(model, "peft_config") else model.model.layers
    )


class During(TrainerCallback):
    """Puts a hook on the model for the updates of these numbers, counted from 0."""

    def __init__(self, steps: Iterable[int], put_on: Callable[[Any], Any]) -> None:
        self._steps, self._put_on, self._handle = set(steps), put_on, None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            self._handle = self._put_on(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_step_end(args, state, control)  # a rollback leaves an update before its end


class PassOver(TrainerCallback):
    """The reference: an update whose gradients are thrown away just before the optimizer."""

    def __init__(self, steps: Iterable[int]) -> None:
        self._steps = set(steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self._steps:
            for parameter in model.parameters():
                parameter.grad = None


def nan_gradient(model: Any) -> Any:
    """NaN leaves the backward pass of the second layer's MLP."""
    return blocks(model)[1].mlp.register_full_backward_hook(lambda module, gi, go: tuple(g * math.nan for g in gi))


def nan_output(model: Any) -> Any:
    """NaN comes out of the first layer's attention."""
    return blocks(model)[0].self_attn.o_proj.register_forward_hook(lambda module, inputs, output: output * math.nan)


def infinite_loss(model: Any) -> Any:
    """The logits of one token overflow."""

    def overflow(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill(torch.arange(output.shape[-1]) % 2 == 0, -math.inf)

    return model.get_output_embeddings().register_forward_hook(overflow)


FAULTS = {
    "gradient": (nan_gradient, "layers.1.mlp", "backward"),
    "output": (nan_output, "layers.0.self_attn.o_proj", "forward"),
    "loss": (infinite_loss, "lm_head", "forward"),
}


def rows_of(step: int, run: Path) -> list[int]:
    """Row numbers of an update of the runs here: 23 rows, 8 in an update."""
    order = epoch_order(_parts(run), 42, step // 3)
    return [int(row) for row in order[step % 3 * 8 : step % 3 * 8 + 8]]


def _parts(run: Path) -> Any:
    from llmtune.data import Part

    return (Part(num_rows=23),)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


# --- 41: once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("method", "step"), [("lora", 0), ("lora", 3), ("full", 4)])
def test_fault_41_an_update_with_nan_is_as_if_it_had_not_been(
    family_model: Model, tmp_path: Path, fault: str, method: str, step: int
) -> None:
    put_on, layer, where = FAULTS[fault]
    how = {"method": method, "micro_batch_size": 3}
    hurt = tune(family_model("llama"), tmp_path / "hurt", callbacks=[During([step], put_on)], **how)
    tune(family_model("llama"), tmp_path / "spared", callbacks=[PassOver([step])], **how)
    assert hurt.steps == 6
    ended, spared = weights(tmp_path / "hurt"), weights(tmp_path / "spared")
    assert all_finite(ended.values())
    assert all(torch.equal(ended[name], tensor) for name, tensor in spared.items())
    (incident,) = events(tmp_path / "hurt", "incident")
    (recovery,) = events(tmp_path / "hurt", "recovery")
    assert (incident["step"], incident["kind"], recovery["action"]) == (step, "non_finite", "skip_update")
    assert incident["rows"] == rows_of(step, tmp_path)
    assert incident["bad_rows"] == sorted(incident["rows"])  # it was the layer, not a row
    assert layer in incident["layer"]
    assert incident["where"] == where
    assert len(incident["places"]) == 8
    told = history(tmp_path / "hurt")
    assert [line[0] for line in told] == [1, 2, 3, 4, 5, 6]
    unlike = [line[0] - 1 for line, other in zip(told, history(tmp_path / "spared"), strict=True) if line != other]
    assert unlike == [step]  # every other loss, norm, rate and count is the same
    assert "nan" in told[step] or "inf" in told[step]


def test_fault_41_the_gradient_alone_may_be_infinite(family_model: Model, tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                parameter = next(p for n, p in model.named_parameters() if p.requires_grad and "layers.1" in n)
                self.handle = parameter.register_hook(lambda gradient: gradient * math.inf)
            elif state.global_step == 3:
                self.handle.remove()

    tune(family_model("llama"), tmp_path / "run", callbacks=[Overflow()])
    (incident,) = events(tmp_path / "run", "incident")
    assert incident["step"] == 2
    assert "layers.1" in incident["layer"]
    assert math.isfinite(incident["loss"])
    assert incident["grad_norm"] in ("nan", "inf")
    assert all_finite(weights(tmp_path / "run").values())


def test_fault_41_looking_for_the_cause_changes_nothing(family_model: Model, tmp_path: Path) -> None:
    """With dropout, random numbers that the search has drawn would show in every later loss."""
    put_on, _, _ = FAULTS["gradient"]
    tune(family_model("llama"), tmp_path / "hurt", callbacks=[During([2], put_on)], dropout=0.3)
    tune(family_model("llama"), tmp_path / "spared", callbacks=[PassOver([2])], dropout=0.3)
    assert losses(tmp_path / "hurt") == losses(tmp_path / "spared")
    assert all(torch.equal(weights(tmp_path / "hurt")[k], v) for k, v in weights(tmp_path / "spared").items())


# --- 42: always -------------------------------------------------------------------------------------------------------


def test_fault_42_nan_at_every_update_ends_the_run_after_its_budgets(family_model: Model, tmp_path: Path) -> None:
    budgets = {"recover.skip_budget": 2, "recover.rollback_budget": 2, "max_steps": 30}
    with pytest.raises(TrainingError, match=r"good checkpoint is .*checkpoint-") as stopped:
        tune(family_model("llama"), tmp_path / "run", callbacks=[During(range(4, 30), nan_gradient)], **budgets)
    assert stopped.value.exit_code == 5
    assert RunDirectory.open(tmp_path / "run").run["exit_code"] == 5
    actions = [event["action"] for event in events(tmp_path / "run", "recovery")]
    assert actions == ["skip_update"] * 2 + ["roll_back"] * 2
    named = next(Path(word.rstrip(".;")) for word in str(stopped.value).split() if "checkpoint-" in word)
    kept = {info.path: info for info in list_checkpoints(tmp_path / "run" / "checkpoints")}
    assert kept[named].healthy
    from safetensors.torch import load_file

    assert all_finite(load_file(named / "adapter_model.safetensors").values())
    rates = [event["learning_rate"] for event in events(tmp_path / "run", "recovery") if event["action"] == "roll_back"]
    assert rates == [5e-4, 2.5e-4]


def test_fault_42_a_run_without_a_checkpoint_to_go_back_to_says_so(family_model: Model, tmp_path: Path) -> None:
    budgets = {"recover.skip_budget": 1, "save.every_steps": 6, "evaluate.every_steps": 6}
    with pytest.raises(TrainingError, match="no healthy checkpoint before step 1"):
        tune(family_model("llama"), tmp_path / "run", callbacks=[During(range(30), nan_gradient)], **budgets)


# --- 43: some rows ----------------------------------------------------------------------------------------------------


def poisoned(model: Any) -> Any:
    """NaN for every row with the token that the marked rows have and no other."""
    token = model.poison

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        hit = (inputs[0] == token).any(dim=-1, keepdim=True)
        return output.masked_fill(hit[..., None], math.nan)

    return model.get_input_embeddings().register_forward_hook(spoil)


def test_fault_43_poisoned_rows_are_found_and_named(family_model: Model, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family_model("llama"))
    common = {token for row in ROWS for text in row.values() for token in tokenizer(f" {text}\n{text}").input_ids}
    token = next(t for t in tokenizer(f" {MARK} {MARK}").input_ids if t not in common)
    marked = {3, 11, 17}
    rows = [row | {"answer": f"{MARK} {MARK} {row['answer']}"} if i in marked else row for i, row in enumerate(ROWS)]
    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    class Poison(During):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.poison = token
            super().on_step_begin(args, state, control, model=model, **kwargs)

    tune(family_model("llama"), tmp_path / "run", str(data), callbacks=[Poison(range(3), poisoned)])
    incidents = events(tmp_path / "run", "incident")
    assert incidents
    named = {place for incident in incidents for place in incident["places"]}
    assert {int(place.rpartition(":")[2]) - 1 for place in named} <= marked
    assert all(place.startswith(("lamps.jsonl:", str(data))) for place in named)
    assert all(set(incident["bad_rows"]) < set(incident["rows"]) for incident in incidents)
    assert all("embed_tokens" in incident["layer"] for incident in incidents)
    assert all_finite(weights(tmp_path / "run").values())


# --- spikes -----------------------------------------------------------------------------------------------------------


def loud(model: Any) -> Any:
    """Logits twenty times too large: a loss and a gradient far out of proportion."""
    return model.get_output_embeddings().register_forward_hook(lambda module, inputs, output: output * 20)


LONG = {"max_steps": 80, "evaluate.every_steps": 40, "save.every_steps": 10, "patience": 20, "warmup_ratio": 0.1}


def test_a_spike_is_clipped_to_what_is_usual(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "run", callbacks=[During([70], loud)], **LONG)
    (incident,) = events(tmp_path / "run", "incident")
    (recovery,) = events(tmp_path / "run", "recovery")
    assert (incident["kind"], incident["step"], recovery["action"]) == ("spike", 70, "clip")
    assert incident["rows"]
    assert incident["grad_norm"] > 3 * incident["grad_norm_spike"]["usual"]


def test_spikes_that_persist_send_the_run_back_and_are_skipped(family_model: Model, tmp_path: Path) -> None:
    result = tune(family_model("llama"), tmp_path / "run", callbacks=[During(range(62, 66), loud)], **LONG)
    assert result.steps == 80
    told = events(tmp_path / "run", "recovery")
    assert [event["action"] for event in told] == ["clip", "clip", "clip", "roll_back"]
    back = told[-1]
    assert (back["checkpoint"], back["skip"], back["learning_rate"]) == ("checkpoint-60", [62, 66], 5e-4)
    last = {step[0]: step for step in history(tmp_path / "run")}
    assert [step - 1 for step, line in last.items() if line[1] == "nan"] == [62, 63, 64, 65]
    assert all_finite(weights(tmp_path / "run").values())
    plan = RunDirectory.open(tmp_path / "run").latest_plan()
    assert plan is not None
    assert plan["choices"]["learning_rate"]["value"] == 5e-4
    # What was learned at the lowered rate is half of what was planned there.
    assert last[75][3] == pytest.approx(0.5 * 1e-3 * _planned(75), rel=1e-6)


def _planned(step: int) -> float:
    """Share of the peak rate that the schedule gives to update ``step`` (from 1): warm-up over 8, then to zero."""
    warmup, of = 8, 80
    done = step - 1
    return step / warmup if step <= warmup else 0.5 * (1 + math.cos(math.pi * (done - warmup) / (of - warmup)))


@pytest.mark.parametrize("seed", range(3))
def test_fault_44_small_healthy_runs_give_no_alarm(family_model: Model, tmp_path: Path, seed: int) -> None:
    """Real noise: updates of two rows, three learning rates."""
    rate = (3e-3, 1e-3, 3e-4)[seed]
    how = LONG | {"global_batch_size": 2, "learning_rate": rate, "seed": seed, "max_steps": 150}
    tune(family_model("llama"), tmp_path / "run", **how)
    assert events(tmp_path / "run", "incident") == []
    assert len(history(tmp_path / "run")) == 150


# --- 46, 47: caught before step 1 -------------------------------------------------------------------------------------


def test_fault_46_rows_with_nothing_to_learn_are_named_before_step_1(family_model: Model, tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Bo.", "weight": 0}]
    data.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    with pytest.raises(DataError, match=r"chats\.jsonl:1\b"):
        tune(family_model("llama"), tmp_path / "run", str(data))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_fault_47_a_row_with_a_token_the_model_does_not_have_is_named_before_step_1(tmp_path: Path) -> None:
    model = save_family_model("llama", tmp_path / "TinyLlama-small", vocab_size=300)
    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.raises(DataError, match=r"lamps\.jsonl:\d+.* token ids that the model has no embedding for"):
        tune(model, tmp_path / "run", str(data))
    assert not (tmp_path / "run" / "checkpoints").exists()


# --- two ranks --------------------------------------------------------------------------------------------------------

ON_ONE_RANK = """
import sys
from pathlib import Path
import torch.distributed as dist
from tuning import tune
from test_faults_numbers import During, infinite_loss

class OnOne(During):
    def on_step_begin(self, *args, **kwargs):
        if dist.get_rank() == 1:
            super().on_step_begin(*args, **kwargs)

if __name__ == "__main__":
    tune("builtin:tiny", Path(sys.argv[1]), callbacks=[OnOne([2], infinite_loss)], method="full")
"""


@pytest.mark.slow
def test_fault_41_a_loss_that_is_infinite_on_one_rank_is_dropped_on_all(tmp_path: Path) -> None:
    script, here = tmp_path / "script.py", str(Path(__file__).parent)
    script.write_text(ON_ONE_RANK)
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [*launcher, "--config_file", str(accelerate_config_path("cpu_ddp")), str(script), str(tmp_path / "run")]
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    environment = clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    (incident,) = events(tmp_path / "run", "incident")
    assert incident["step"] == 2
    assert set(incident["bad_rows"]) < set(incident["rows"])  # those of the other rank are blameless
    assert [step[0] for step in history(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert all_finite(weights(tmp_path / "run").values())
