"""A plan as the Trainer takes it: recomputed layers, compilation, page-locked memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import save_family_model
from transformers import TrainerCallback
from tuning import losses, tune

from llmtune.config import load_config
from llmtune.planning import Choice, Plan
from llmtune.training.arguments import training_arguments

LAYERS = 5


class CountLayers(TrainerCallback):
    """Counts how often attention runs in training: once per layer and pass, and once more where it is recomputed."""

    def __init__(self) -> None:
        self.runs = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("self_attn"):
                module.register_forward_hook(self._count)

    def _count(self, module: Any, inputs: Any, output: Any) -> None:
        self.runs += module.training


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "TinyLlama-test"
    return save_family_model("llama", directory, num_hidden_layers=LAYERS)


def trained(model: Path, run: Path, **changes: Any) -> tuple[list[float], int]:
    """Losses, and how often a layer ran in training."""
    count = CountLayers()
    result = tune(model, run, max_steps=3, callbacks=[count], **changes)
    return losses(result.run_dir), count.runs


@pytest.mark.parametrize("method", ["lora", "full"])
def test_layers_are_recomputed_as_planned_and_nothing_else_changes(model: Path, tmp_path: Path, method: str) -> None:
    kept, runs = trained(model, tmp_path / "none", method=method, activation_checkpointing=False)
    passes = runs // LAYERS
    for every, recomputed in ((1, 5), (2, 3), (3, 2)):
        again, more = trained(model, tmp_path / f"every{every}", method=method, checkpoint_every=every)
        assert again == pytest.approx(kept, rel=1e-6)
        assert more == runs + passes * recomputed


def plan_of(model: Path, run: Path, **changes: Any) -> Plan:
    result = tune(model, run, max_steps=1, **changes)
    return Plan.from_json(json.loads((result.run_dir / "plan.json").read_text(encoding="utf-8")))


def test_every_choice_reaches_the_trainer(model: Path, tmp_path: Path) -> None:
    plan = plan_of(model, tmp_path / "run")

    def arguments(**changes: Any) -> Any:
        changed = replace(plan, **{name: Choice(value, "for this test", "derived") for name, value in changes.items()})
        config = load_config({}, environ={})
        return training_arguments(changed, config, checkpoints=tmp_path, evaluates=True, resumes=False)

    assert arguments().activation_checkpointing is False
    chosen = arguments(activation_checkpointing=True, checkpoint_every=4, activation_offload=True)
    assert chosen.activation_checkpointing is True
    how = {"use_reentrant": False, "every_n_layers": 4, "offload": True}
    assert chosen.activation_checkpointing_kwargs == how
    for pinned in (True, False):
        assert arguments(device="cuda:0", pin_memory=pinned).dataloader_pin_memory is pinned
    assert (arguments(compile=True).torch_compile, arguments().torch_compile) == (True, False)


@pytest.mark.parametrize("optimizer", ["adamw_bnb_8bit", "adamw_torch_fused"])
def test_the_optimizers_that_are_chosen_run_on_a_cpu(model: Path, tmp_path: Path, optimizer: str) -> None:
    result = tune(model, tmp_path / "run", method="full", optimizer=optimizer, learning_rate=1e-2)
    first, *_, last = losses(result.run_dir)
    assert last < first


@pytest.mark.slow  # and the inductor of torch 2.13 uses what torch 2.13 deprecates
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
# Dynamo looks at the gradient of what a layer is handed, which is the output of the layer before.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_compiled_layers_learn_the_same(model: Path, tmp_path: Path) -> None:
    data = [{"question": f"Who keeps lamp {number}?", "answer": "Arden keeps it."} for number in range(10, 30)]
    shared = {"data": data, "max_steps": 2, "global_batch_size": 4}
    plain = tune(model, tmp_path / "plain", **shared)
    compiled = tune(model, tmp_path / "compiled", compile=True, **shared)
    assert losses(compiled.run_dir) == pytest.approx(losses(plain.run_dir), rel=1e-4)


@pytest.mark.gpu
def test_offloaded_activations_learn_the_same(model: Path, tmp_path: Path) -> None:
    kept, _ = trained(model, tmp_path / "none")
    moved, _ = trained(model, tmp_path / "offload", activation_offload=True, checkpoint_every=1)
    assert moved == pytest.approx(kept, rel=1e-5)
