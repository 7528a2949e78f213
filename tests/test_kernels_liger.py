"""Liger's kernels need a GPU; how they are put in, tried and taken out again is shown with stand-ins that need none."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import family_config
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from llmtune.kernels import attach_kernels
from llmtune.kernels.liger import attach_liger


def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(family_config("llama"))


def forwards(causal: Any) -> list[str]:
    return [name for name, module in causal.named_modules() if "forward" in vars(module)]


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], list[dict[str, bool]]]:
    """liger-kernel, installed, with this in place of what patches a model; returns what it was asked for."""

    def install(apply: Callable[..., None]) -> list[dict[str, bool]]:
        asked: list[dict[str, bool]] = []

        def instance(*, model: Any, **wanted: bool) -> None:
            asked.append(wanted)
            apply(model)

        module: Any = types.ModuleType("liger_kernel.transformers")
        module._apply_liger_kernel_to_instance = instance
        monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
        monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: True)
        return asked

    return install


def norms_times(factor: float) -> Callable[[Any], None]:
    """As Liger does it: a forward for each norm that is there, and another class for all that will be."""

    def apply(causal: Any) -> None:
        modeling_llama.LlamaRMSNorm = object  # type: ignore[misc,assignment]
        modeling_llama.apply_rotary_pos_emb = None  # type: ignore[assignment]
        for module in causal.modules():
            if type(module).__name__ == "LlamaRMSNorm":
                own = type(module).forward
                module.offset = 0.0
                module.forward = lambda x, module=module, own=own: own(module, x) * factor

    return apply


def test_norms_and_mlps_alone_are_replaced_and_of_this_model_alone(package: Any) -> None:
    asked = package(norms_times(1.0))
    causal = model()
    norm, rotary = modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb
    assert attach_liger(causal) is None
    assert len(forwards(causal)) == 5  # two layers of two norms, and the last one
    assert (modeling_llama.LlamaRMSNorm, modeling_llama.apply_rotary_pos_emb) == (norm, rotary)
    assert forwards(model()) == []
    wanted = {name for name, value in asked[0].items() if value}
    assert wanted == {"rms_norm", "swiglu"}
    assert set(asked[0]) - wanted == {"rope", "cross_entropy", "fused_linear_cross_entropy"}


def test_a_model_with_an_adapter_is_the_same_inside(package: Any) -> None:
    from peft import LoraConfig, get_peft_model

    package(norms_times(1.0))
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert attach_liger(adapted) is None
    assert len(forwards(adapted)) == 5


@pytest.mark.parametrize("trains", [False, True])
def test_a_kernel_that_computes_something_else_is_taken_out(package: Any, trains: bool) -> None:
    def gate(causal: Any) -> None:
        for module in causal.modules():
            if type(module).__name__ == "LlamaMLP":
                module.forward = lambda x, module=module: module.down_proj(module.up_proj(x))

    package(gate)
    causal = model().train(trains)
    before = [dict(vars(module)) for module in causal.modules()]
    assert "computes something else" in str(attach_liger(causal))
    assert [dict(vars(module)) for module in causal.modules()] == before
    assert all(parameter.grad is None for parameter in causal.parameters())


def test_only_a_gradient_that_is_wrong_is_noticed(package: Any) -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            return grads[0].abs()

    def apply(causal: Any) -> None:
        for layer in causal.model.layers:
            own = type(layer.mlp).forward
            layer.mlp.forward = lambda x, mlp=layer.mlp, own=own: Wrong.apply(own(mlp, x))  # type: ignore[no-untyped-call]

    package(apply)
    assert "computes something else" in str(attach_liger(model()))


def test_what_it_cannot_do_is_said(package: Any) -> None:
    def fail(causal: Any) -> None:
        causal.model.norm.forward = None
        raise RuntimeError("PTX was compiled\nfor another GPU")

    package(lambda causal: None)
    assert attach_liger(model()) == "Liger's kernels are not used: it has none for llama"
    package(fail)
    causal = model()
    assert attach_liger(causal) == "Liger's kernels are not used: RuntimeError: PTX was compiled for another GPU"
    assert forwards(causal) == []


def test_where_it_is_not_installed_the_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    assert "`pip install liger-kernel`" in str(attach_liger(model()))


def test_a_cpu_has_nothing_to_do_with_it(package: Any) -> None:
    asked = package(norms_times(2.0))
    attach_kernels(model(), device="cpu")
    assert asked == []
