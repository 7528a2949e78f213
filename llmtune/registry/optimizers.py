"""Every optimizer of transformers' ``OptimizerNames``: its class, its arguments and what it needs.

Tried with transformers 5.23, torch 2.13, bitsandbytes 0.50, torchao 0.18 and torch-optimi 0.3 on a CPU; the contract
test in ``tests/test_registry.py`` trains with every optimizer that is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmtune.registry.needs import Package, missing_packages


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """A name of ``OptimizerNames``.

    Attributes:
        factory: ``module:class`` of the optimizer; empty where llmtune refuses the name.
        defaults: Arguments that llmtune passes unless others are given.
        fixed: Arguments that transformers passes because of the name.
        why: Source of the defaults.
        packages: Packages besides those that llmtune requires.
        devices: Types of devices that it runs on; empty means all.
        refused: Reason why llmtune does not train with it, as the end of "it …"; empty where it does.
        instead: A name to use in place of a refused one, or on another device.
    """

    name: str
    factory: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    packages: tuple[Package, ...] = ()
    devices: tuple[str, ...] = ()
    refused: str = ""
    instead: str = "adamw_torch_fused"

    def problem(self, device: str) -> str | None:
        """Return why a run on this type of device cannot use the optimizer, and what to do; None where it can."""
        if self.refused:
            return f"which llmtune does not run: it {self.refused}; expected another one, such as {self.instead}"
        if self.devices and device not in self.devices:
            return f"which needs {' or '.join(map(_device_name, self.devices))}; expected {self.instead}"
        if absent := missing_packages(self.packages):
            return f"which needs a package that is not installed: {absent[0].command}"
        return None


# Arguments that another key or the name of the optimizer decides, and what to do instead.
DECIDED_ELSEWHERE = {
    "lr": "give train.learning_rate",
    "weight_decay": "give train.weight_decay",
    "params": "leave it out",
    "args": "leave it out",
    "optim_bits": "the name of the optimizer decides it",
    "is_paged": "the name of the optimizer decides it",
    "fused": "the name of the optimizer decides it",
    "scale_parameter": "leave it out: train.learning_rate is the step size",
    "relative_step": "leave it out: train.schedule decides the learning rate",
    "warmup_init": "leave it out: train.warmup_ratio decides the warm-up",
    "maximize": "leave it out: it would raise the loss",
    "foreach": "leave it out: it does not change the result",
    "capturable": "leave it out: it does not change the result",
    "differentiable": "leave it out: it does not change the result",
    "gradient_release": "leave it out: an update has several backward passes",
    "triton": "leave it out: it does not change the result",
    "block_wise": "the name of the optimizer decides it",
}

_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
_ADAM_WHY = "the values of the paper (arXiv:1412.6980), as in PyTorch"
# transformers passes Adam's 0.999 as second beta; Lion's authors use 0.99.
_LION = {"betas": (0.9, 0.99)}
_LION_WHY = "Lion's own values (arXiv:2302.06675)"
_ADEMAMIX = {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "eps": 1e-8}
_ADEMAMIX_WHY = "the values of the paper (arXiv:2409.03137)"
_RMSPROP = {"alpha": 0.99, "eps": 1e-8, "momentum": 0.0}
_TORCHAO = Package(modules=("torchao",), install="torchao>=0.11", least="0.11", distribution="torchao")
_OPTIMI = Package(modules=("optimi",), install="torch-optimi")
_BNB_DEVICES = ("cpu", "cuda", "xpu")

_LAYERWISE = (
    "moves the weights inside each backward pass, before the passes of an update are added up and the gradient is "
    "clipped"
)
_PROJECTED = (
    "needs all weights to be trained and the package {package}, and as transformers sets it up ignores "
    "train.weight_decay"
)
_SCHEDULE_FREE = (
    "needs the package schedulefree and other weights in evaluations and checkpoints than in training, which llmtune "
    "does not switch, and brings a learning rate of its own that train.schedule would multiply"
)
_LOMO = f"needs the package lomo-optim and {_LAYERWISE}"


def _plain(name: str, factory: str, defaults: Mapping[str, Any], why: str, **more: Any) -> Optimizer:
    return Optimizer(name=name, factory=factory, defaults=defaults, why=why, **more)


def _bitsandbytes(name: str, kind: str, defaults: Mapping[str, Any], why: str) -> Optimizer:
    return _plain(name, f"bitsandbytes.optim:{kind}", defaults, why, devices=_BNB_DEVICES)


def _torchao(name: str, kind: str) -> Optimizer:
    return _plain(name, f"torchao.optim:{kind}", _ADAM, _ADAM_WHY, packages=(_TORCHAO,), devices=_BNB_DEVICES)


def _paged(name: str, kind: str, defaults: Mapping[str, Any], why: str, instead: str) -> Optimizer:
    factory = f"bitsandbytes.optim:{kind}"
    return _plain(name, factory, defaults, why, devices=("cuda",), instead=instead)


def _projected(name: str, package: str) -> Optimizer:
    reason = f"needs the package {package} and {_LAYERWISE}" if name.endswith("layerwise") else ""
    return Optimizer(name=name, refused=reason or _PROJECTED.format(package=package), instead="adamw_bnb_8bit")


OPTIMIZERS: Mapping[str, Optimizer] = {
    optimizer.name: optimizer
    for optimizer in (
        _plain("adamw_torch", "torch.optim:AdamW", _ADAM, _ADAM_WHY),
        _plain("adamw_torch_fused", "torch.optim:AdamW", _ADAM, _ADAM_WHY, fixed={"fused": True}),
        _plain(
            "adafactor",
            "transformers.optimization:Adafactor",
            {"clip_threshold": 1.0, "decay_rate": -0.8},
            "the values of the paper (arXiv:1804.04235), as in transformers",
            fixed={"scale_parameter": False, "relative_step": False},
        ),
        _plain("sgd", "torch.optim:SGD", {"momentum": 0.0}, "PyTorch's own value"),
        _plain("adagrad", "torch.optim:Adagrad", {"lr_decay": 0.0, "eps": 1e-10}, "PyTorch's own values"),
        _plain("rmsprop", "torch.optim:RMSprop", _RMSPROP, "PyTorch's own values"),
        _torchao("adamw_torch_4bit", "AdamW4bit"),
        _torchao("adamw_torch_8bit", "AdamW8bit"),
        _plain("stable_adamw", "optimi:StableAdamW", _ADAM, "as for AdamW", packages=(_OPTIMI,)),
        _bitsandbytes("adamw_bnb_8bit", "AdamW", _ADAM, _ADAM_WHY),
        _bitsandbytes("adamw_8bit", "AdamW", _ADAM, _ADAM_WHY),
        _bitsandbytes("lion_32bit", "Lion", _LION, _LION_WHY),
        _bitsandbytes("lion_8bit", "Lion", _LION, _LION_WHY),
        _bitsandbytes("ademamix", "AdEMAMix", _ADEMAMIX, _ADEMAMIX_WHY),
        _bitsandbytes("ademamix_8bit", "AdEMAMix", _ADEMAMIX, _ADEMAMIX_WHY),
        _bitsandbytes("rmsprop_bnb", "RMSprop", _RMSPROP, "bitsandbytes' own values"),
        _bitsandbytes("rmsprop_bnb_8bit", "RMSprop", _RMSPROP, "bitsandbytes' own values"),
        _bitsandbytes("rmsprop_bnb_32bit", "RMSprop", _RMSPROP, "bitsandbytes' own values"),
        _paged("paged_adamw_32bit", "AdamW", _ADAM, _ADAM_WHY, "adamw_torch_fused"),
        _paged("paged_adamw_8bit", "AdamW", _ADAM, _ADAM_WHY, "adamw_bnb_8bit"),
        _paged("paged_ademamix_32bit", "AdEMAMix", _ADEMAMIX, _ADEMAMIX_WHY, "ademamix"),
        _paged("paged_ademamix_8bit", "AdEMAMix", _ADEMAMIX, _ADEMAMIX_WHY, "ademamix_8bit"),
        _paged("paged_lion_32bit", "Lion", _LION, _LION_WHY, "lion_32bit"),
        _paged("paged_lion_8bit", "Lion", _LION, _LION_WHY, "lion_8bit"),
        Optimizer(name="adamw_torch_xla", refused="needs a TPU and the package torch_xla"),
        Optimizer(name="adamw_torch_npu_fused", refused="needs an Ascend NPU and the package torch_npu"),
        Optimizer(
            name="adamw_anyprecision",
            refused="needs the package torchdistx, which is not on PyPI and is no longer developed",
        ),
        Optimizer(
            name="grokadamw",
            refused="needs the package grokadamw and does not keep all of its state in checkpoints, so that a resumed "
            "run would be another run (tried with version 0.1.2)",
        ),
        Optimizer(name="lomo", refused=_LOMO, instead="sgd"),
        Optimizer(name="adalomo", refused=_LOMO, instead="adafactor"),
        *(
            Optimizer(name=f"schedule_free_{kind}", refused=_SCHEDULE_FREE, instead=instead)
            for kind, instead in (("adamw", "adamw_torch_fused"), ("radam", "adamw_torch_fused"), ("sgd", "sgd"))
        ),
        *(
            _projected(f"galore_{kind}", "galore-torch")
            for kind in (
                "adamw",
                "adamw_8bit",
                "adafactor",
                "adamw_layerwise",
                "adamw_8bit_layerwise",
                "adafactor_layerwise",
            )
        ),
        *(_projected(f"apollo_{kind}", "apollo-torch") for kind in ("adamw", "adamw_layerwise")),
    )
}


def _device_name(device: str) -> str:
    return {"cuda": "an NVIDIA or AMD GPU (CUDA)", "xpu": "an Intel GPU", "cpu": "a CPU"}.get(device, device)
