"""Liger's Triton kernels for the norms and gated MLPs of a model on CUDA, where liger-kernel is installed.

Liger replaces classes and functions of transformers' modules, for the whole process: a model on a CPU, as rehearsals
and exports load one, would run into kernels for GPUs. So these are put back at once, and what stays are the forwards of
this one model's own modules. Its rotary embedding is such a function and is not taken; nor are its losses, which
compute rows that have no label.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llmtune.models.heads import causal_of, decoder_of

WANTED = {"rms_norm": True, "swiglu": True}
LEFT_OUT = {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
# The proof: positions of one row, and the least cosine of hidden states and of gradients with those of transformers.
# Kernels round at other places, in 16 bits once or twice a layer.
_PROOF_POSITIONS, _LEAST_COSINE = 64, 0.999


def attach_liger(model: Any) -> str | None:
    """Give the norms and gated MLPs of ``model`` Liger's forwards, if it computes the same with them where it is now.

    Names of modules and weights stay as they are.

    Args:
        model: A causal language model of transformers on CUDA, or a PEFT model around one.

    Returns:
        None where that was done, else the sentence why not.
    """
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        return "norms and gated MLPs are those of transformers; `pip install liger-kernel` has faster ones"
    causal = causal_of(model)
    decoder = None if causal is None else decoder_of(causal)
    if decoder is None:
        return "Liger's kernels are for models with a decoder of their own"
    if any("forward" in vars(module) for module in decoder.modules() if _is_replaceable(module)):
        return "Liger's kernels are not used: another library has replaced norms or MLPs"
    before = _outcome(causal, decoder)
    own = [(module, dict(vars(module))) for module in decoder.modules()]
    try:
        with _names_of(causal):
            liger = importlib.import_module("liger_kernel.transformers")
            liger._apply_liger_kernel_to_instance(model=causal, **WANTED, **LEFT_OUT)
        replaced = [module for module, was in own if vars(module).get("forward") is not was.get("forward")]
        why = None if replaced else f"it has none for {causal.config.model_type}"
        if replaced and not _alike(before, _outcome(causal, decoder)):
            why = "this model computes something else with them"
    except Exception as error:  # Triton compiles for the GPU that is there, and may fail in any way
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if why is None:
        return None
    for module, was in own:
        vars(module).clear()
        vars(module).update(was)
    return f"Liger's kernels are not used: {why}"


def _is_replaceable(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith(("RMSNorm", "MLP"))


@contextmanager
def _names_of(causal: Any) -> Iterator[None]:
    """What the modules of transformers that define ``causal`` call by which name is put back."""
    modules = {sys.modules[kind.__module__] for kind in type(causal).__mro__ if kind.__module__ in sys.modules}
    modules = {module for module in modules if module.__name__.startswith("transformers.models.")}
    names = [(module, dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for module, was in names:
            vars(module).update(was)


def _outcome(causal: Any, decoder: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of random tokens, and a gradient that went back through all layers; without dropout."""
    modes = [(module, module.training) for module in causal.modules()]
    embedding = causal.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding.shape[0], (1, _PROOF_POSITIONS), generator=generator).to(embedding.device)
    towards = torch.randn((1, _PROOF_POSITIONS, causal.config.get_text_config().hidden_size), generator=generator)
    causal.eval()
    try:
        with torch.enable_grad():
            given = causal.get_input_embeddings()(tokens).detach().requires_grad_()
            states = decoder(inputs_embeds=given, use_cache=False).last_hidden_state
            (gradient,) = torch.autograd.grad(states, given, towards.to(states))
    finally:
        for module, mode in modes:
            module.training = mode
    return states.detach(), gradient


def _alike(theirs: tuple[torch.Tensor, ...], ours: tuple[torch.Tensor, ...]) -> bool:
    cosines = (
        torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0)
        for a, b in zip(theirs, ours, strict=True)
    )
    return all(float(cosine) >= _LEAST_COSINE for cosine in cosines)
