"""Whether a causal language model is a decoder with a linear head and the usual cross-entropy over it.

Asked by who predicts what a model's loss takes, and by who computes it: both go by the same parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Keys of configurations that count experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def causal_of(model: Any) -> Any:
    """The causal language model in ``model``, which may be one, or hold one under an adapter; None if neither."""
    from transformers import PreTrainedModel

    inner = getattr(model, "get_base_model", None)  # PEFT's; it is not imported where there is no adapter
    model = model if inner is None else inner()
    return model if isinstance(model, PreTrainedModel) else None


def decoder_of(model: PreTrainedModel) -> torch.nn.Module | None:
    """What gives the hidden states that the head reads; None where a model has no such part."""
    decoder: torch.nn.Module | None = model._modules.get(model.base_model_prefix)
    return decoder


def own_loss(model: PreTrainedModel) -> str | None:
    """Why the loss of ``model`` is one of its own, as far as its parts tell; None where they tell of none."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    head, decoder = model.get_output_embeddings(), decoder_of(model)
    config = model.config.get_text_config()
    if type(head) is not torch.nn.Linear:
        return f"its head is {'missing' if head is None else 'a ' + type(head).__name__}, not a plain linear layer"
    if decoder is None or set(map(id, model._modules.values())) != {id(decoder), id(head)}:
        return f"{type(model).__name__} has other parts than a decoder and a head: {', '.join(model._modules)}"
    if any(getattr(config, name, None) for name in _EXPERTS):
        return "it is a mixture of experts, whose routers may have a loss of their own"
    if model.loss_function is not ForCausalLMLoss:
        return "it has a loss function of its own"
    return None


@contextmanager
def standing_in(decoder: torch.nn.Module, answer: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Calls of ``decoder`` go to ``answer``, which gives its last hidden states [batch, seq, hidden] and no more."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    def forward(*args: Any, **kwargs: Any) -> Any:
        states = answer(*args, **kwargs)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)

    own = decoder.__dict__.get("forward")
    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
        if own is not None:
            decoder.forward = own
