"""The loss of a causal language model, computed inside its own forward pass on the rows that have a label.

`attach_loss` puts a forward of ours before that of one model instance; class, modules and names of weights stay as they
are. It serves calls with ``labels`` alone, and only of models for which it has been shown to compute what their own
forward does; see `_proof`.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from llmtune.kernels.loss import supervised_loss, supervised_losses
from llmtune.models.heads import causal_of, decoder_of, own_loss, standing_in

IGNORED = -100  # as transformers' losses have it
_ATTACHED = "_supervised_head"
# Arguments of a call that change what upstream's forward computes or returns beyond what is done here.
_FOREIGN = ("shift_labels", "logits_to_keep", "output_router_logits", "ignore_index", "weight")
# The proof: so many positions, of which one has no label, and logits of this size, so that bounds of logits bend them.
_PROOF_POSITIONS, _PROOF_LOGITS = 8, 30.0
# Largest relative difference of the losses; in 16 bits upstream rounds the logits after each factor.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
_TOLERANCE_16_BITS = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """How a model's logits come about: ``softcap × tanh(logit_scale × (weight · hidden + bias) / softcap)``."""

    chunk_rows: int
    logit_scale: float
    softcap: float | None
    shape: tuple[int, int]


def attach_loss(model: Any, *, chunk_rows: int) -> str | None:
    """Have ``model`` compute its loss on supervised rows alone, without ever holding their logits.

    Calls with ``labels`` return the loss as before and ``logits=None``; all others are served as before. Such a call
    may name the supervised positions itself, as ``supervised_positions``: int64, numbers ``row × seq + position`` of
    the positions whose *next* one has a label. That spares waiting for an accelerator to count them. With
    ``per_row=True`` the loss of such a call is a vector, the sum of each row's losses; it has no gradient.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        chunk_rows: See `supervised_loss`.

    Returns:
        None if attached, else the sentence why this model keeps its own loss.
    """
    causal = causal_of(model)
    if causal is None:
        return "it is no causal language model of transformers"
    was_attached = _ATTACHED in causal.__dict__
    refusal = _refusal(causal)
    if "forward" in causal.__dict__ and not was_attached:
        refusal = "another forward has been put before its own"
    if refusal is None:
        head = _head(causal, chunk_rows)
        refusal = _proof(causal, head)
    if refusal is not None:
        detach_loss(model)
        return refusal
    causal.__dict__[_ATTACHED] = head
    if not was_attached:
        causal.forward = types.MethodType(_forward_of(causal.__class__), causal)
    return None


def detach_loss(model: Any) -> None:
    """Undo `attach_loss`; nothing where it did nothing."""
    causal = causal_of(model)
    if causal is None or _ATTACHED not in causal.__dict__:
        return
    if getattr(causal.forward, "__func__", None) is _forward_of(causal.__class__):
        del causal.forward, causal.__dict__[_ATTACHED]
    else:  # another, such as accelerate, has put its own before ours, which now stands by
        causal.__dict__[_ATTACHED] = None


def attached_rows(model: Any) -> int | None:
    """Rows whose logits exist at once where `attach_loss` has been at work; None where the model keeps its own loss."""
    causal = causal_of(model)
    head = None if causal is None else causal.__dict__.get(_ATTACHED)
    return None if head is None else head.chunk_rows


def attached_decoder(model: Any) -> torch.nn.Module | None:
    """What gives the hidden states to the loss of `attach_loss`; None where the model keeps its own loss."""
    return None if attached_rows(model) is None else decoder_of(causal_of(model))


# ---------------------------------------------------------------------- whose loss it is


def _refusal(causal: Any) -> str | None:
    """Why the parts of this model are not those that are known; None where they are."""
    why = own_loss(causal)
    if why is None:
        weight = causal.get_output_embeddings().weight
        if weight.is_meta or weight.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return "the weights of its head are elsewhere, or quantised"
    return why


def _head(causal: Any, chunk_rows: int) -> _Head:
    """Factor and bound of the logits, as Cohere, Granite and Gemma name them; the proof finds what is not named so."""
    config = causal.config
    scale = float(getattr(causal, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return _Head(
        chunk_rows=chunk_rows,
        logit_scale=scale,
        softcap=None if softcap is None else float(softcap),
        shape=tuple(causal.get_output_embeddings().weight.shape),
    )


# ---------------------------------------------------------------------- the forward pass


@functools.cache  # one per class: told from what others wrap around it
def _forward_of(kind: Any) -> Any:
    """The forward of an instance of ``kind``: its class's where there are no labels, or more than a loss is wanted."""
    upstream = kind.forward
    names = list(inspect.signature(upstream).parameters)[1:]

    @functools.wraps(upstream)  # transformers reads the names of its arguments
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        head: _Head | None = self.__dict__.get(_ATTACHED)
        named = kwargs | dict(zip(names, args, strict=False))
        if head is not None and named.get("labels") is not None and _is_served(self, head, named):
            return _with_loss(self, head, **named)
        kwargs.pop("supervised_positions", None)
        kwargs.pop("per_row", None)
        return upstream(self, *args, **kwargs)

    return forward


def _is_served(causal: Any, head: _Head, arguments: Mapping[str, Any]) -> bool:
    """Whether a call with labels asks for nothing but the loss, of a head that is as it was."""
    if any(isinstance(value, torch.Tensor) or value for value in map(arguments.get, _FOREIGN)):
        return False
    if arguments.get("return_dict") is False or not getattr(causal.config, "return_dict", True):
        return False
    module = causal.get_output_embeddings()
    # Somebody who hooks the head wants to see what comes in and out of it, or changes it.
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    # Spread over ranks the weight is of another class (FSDP2), flat (FSDP) or empty (ZeRO-3) but in its own forward.
    return type(module) is torch.nn.Linear and not any(hooks) and _is_whole(module.weight, head.shape)


def _is_whole(weight: torch.Tensor, shape: tuple[int, int]) -> bool:
    return type(weight) in (torch.Tensor, torch.nn.Parameter) and tuple(weight.shape) == shape


def _with_loss(
    causal: Any,
    head: _Head,
    *,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    supervised_positions: torch.Tensor | None = None,
    per_row: bool = False,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    decoder: Any = decoder_of(causal)
    outputs = decoder(**_for_decoder(kwargs))
    states = outputs.last_hidden_state
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1).to(states.device)
    positions = (following != IGNORED).nonzero().squeeze(1) if supervised_positions is None else supervised_positions
    module = causal.get_output_embeddings()
    rows = states.reshape(-1, states.shape[-1]).index_select(0, positions)
    targets = following.index_select(0, positions)
    how: dict[str, Any] = {
        "bias": module.bias,
        "logit_scale": head.logit_scale,
        "softcap": head.softcap,
        "chunk_rows": head.chunk_rows,
    }
    if per_row:
        losses = supervised_losses(rows, module.weight, targets, **how)
        spread = losses.new_zeros(following.shape).index_copy(0, positions, losses)
        loss = spread.reshape(labels.shape).sum(1)
    else:
        loss = supervised_loss(rows, module.weight, targets, **how)
    items = positions.numel() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutputWithPast(
        loss=loss / (items.to(loss.device) if isinstance(items, torch.Tensor) else items),
        logits=None,
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _for_decoder(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What upstream's forward hands on: all but what it takes out itself."""
    return {name: value for name, value in arguments.items() if name not in (*_FOREIGN, "return_dict")}


# ---------------------------------------------------------------------- the proof


def _proof(causal: Any, head: _Head) -> str | None:
    """Compare what upstream's forward gives with what ours does, once; None where both are the same.

    A stand-in takes the decoder's place: it notes what it is called with and gives back random hidden states that make
    logits large enough for any bound to show. So the proof costs a few products of eight rows with the head. Random
    states, modes and gradients stay as they were. It is done in evaluation and in training mode, for what upstream does
    in one of them alone.
    """
    decoder: Any = decoder_of(causal)
    with _still(causal), torch.no_grad():
        states, batch = _proof_batch(causal, head)
        named: dict[str, Any] = batch | {"num_items_in_batch": 3}
        expected = []
        try:
            with _noted(decoder, states) as calls:
                for training in (False, True):
                    causal.train(training)
                    expected.append(float(causal.__class__.forward(causal, **named).loss))
                ours = float(_with_loss(causal, head, **named).loss)  # the same in both modes, but for the decoder
        except (AttributeError, TypeError, ValueError, LookupError, RuntimeError) as error:
            return f"its forward pass is not that of a decoder with a head: {' '.join(str(error).split())[:200]}"
    if len(calls) != 3:  # the last is ours
        return f"it does not call its decoder, {type(decoder).__name__}, once"
    for call in calls[:-1]:
        if call != calls[-1]:
            return f"it calls its decoder with {', '.join(call)}, not {', '.join(calls[-1])}"
    for theirs in expected:
        if not abs(ours - theirs) <= _TOLERANCE.get(states.dtype, _TOLERANCE_16_BITS) * abs(theirs):
            return f"its loss is {theirs:.6g} where cross-entropy of its logits would be {ours:.6g}"
    return None


def _proof_batch(causal: Any, head: _Head) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states [1, positions, hidden size], and a batch for them; all random, from a generator of its own."""
    weight, count = causal.get_output_embeddings().weight, _PROOF_POSITIONS
    generator = torch.Generator().manual_seed(0)
    vocabulary, width = head.shape
    norm = float(weight[:: max(1, vocabulary // 256)].float().norm(dim=1).mean()) * abs(head.logit_scale)
    states = torch.randn((1, count, width), generator=generator) * (_PROOF_LOGITS / norm if norm > 0 else 1.0)
    tokens = torch.randint(vocabulary, (2, 1, count), generator=generator).to(weight.device)
    labels = tokens[1].clone()
    labels[0, count // 2] = IGNORED
    mask = torch.ones_like(labels)
    return states.to(weight), {"input_ids": tokens[0], "attention_mask": mask, "labels": labels}


@contextmanager
def _still(causal: Any) -> Iterator[None]:
    """Random states and the modes of all modules are put back."""
    modes = [(module, module.training) for module in causal.modules()]
    weight = causal.get_output_embeddings().weight
    devices = [weight.device] if weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def _noted(decoder: Any, states: torch.Tensor) -> Iterator[list[dict[str, Any]]]:
    """Calls of ``decoder`` give ``states``; yields what it was called with, by name, but for what is None."""
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(decoder.forward)

    def answer(*args: Any, **kwargs: Any) -> torch.Tensor:
        named = dict(signature.bind(*args, **kwargs).arguments)
        named |= named.pop("kwargs", {})
        ignored = ("num_items_in_batch",)  # of the loss, which upstream hands on
        calls.append(
            {name: _plain(value) for name, value in named.items() if value is not None and name not in ignored}
        )
        return states

    with standing_in(decoder, answer):
        yield calls


def _plain(value: Any) -> Any:
    """Something that can be compared."""
    return value.tolist() if isinstance(value, torch.Tensor) else value
