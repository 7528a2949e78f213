"""The fast path: loss on supervised rows alone, arithmetic of adapters and norms, attention without needless masks.

Each part computes what transformers and PEFT compute, or stands back and says why.
"""

from __future__ import annotations

from typing import Any

# Rows of logits that are there at once. Of 128, 256, 512 and 1,024 the fastest or within 3 % of it, forward and
# backward on an AMX core, for vocabularies of 49,152 and 151,936 words.
CHUNK_ROWS = 512


def attach_kernels(model: Any, *, device: str, sharded: bool = False) -> tuple[str, ...]:
    """Put a loaded causal language model, with its adapter if it has one, on the fast path.

    Names of modules and weights stay as they are: what is saved loads with transformers and PEFT alone.

    Args:
        model: As it was loaded, before anything wraps it.
        device: Where it is going to compute. Kernels for CUDA are tried there, so it is moved to one right away.
        sharded: Whether its weights will be spread over the ranks, where they are not whole.

    Returns:
        A sentence for each part that leaves this model as it is.
    """
    if sharded:
        return ("the model is spread over the ranks and computes as transformers does",)
    import torch

    from llmtune.kernels.adapters import attach_adapters
    from llmtune.kernels.attention import attach_attention
    from llmtune.kernels.head import attach_loss
    from llmtune.kernels.layers import attach_layers

    refused = [attach_attention(model), attach_loss(model, chunk_rows=CHUNK_ROWS)]
    if torch.device(device).type == "cuda":
        from llmtune.kernels.liger import attach_liger

        if model.device.type != "cuda":  # one that is quantised was loaded there, and cannot be moved
            model.to(device)
        refused.append(attach_liger(model))
    adapters = attach_adapters(model) if hasattr(model, "peft_config") else None
    reasons = adapters.reasons if adapters is not None and adapters.num_left else ()
    return (*(reason for reason in refused if reason is not None), *reasons, *attach_layers(model))
