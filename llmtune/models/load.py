"""Weights, tokenizer and adapter into memory, as the plan says."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.errors import ModelError
from llmtune.hardware import DTYPES
from llmtune.models.adapter_files import require_plain_adapter
from llmtune.models.locate import ModelLocation

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Words, digits, spaces, line breaks, other scripts: what tokenizers treat differently.
_PROBE = "Hello, world! It costs 12,345.60\n\n  naïve ÄÖÜ 日本語 🙂\tend "


def require_lasting(tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> None:
    """Prove that the tokenizer saved with the result is the one that is trained with, chat template included.

    Args:
        tokenizer: As it was loaded.
        trust_remote_code: Whether the user lets its repository run code of its own; unsaid, transformers would ask.

    Raises:
        ModelError: Saved and loaded again it writes prompts or token ids differently.
    """
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        again = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    probe = _PROBE + "".join(tokenizer.all_special_tokens)
    problems = []
    if again.chat_template != tokenizer.chat_template:
        problems.append("it has another chat template, so prompts would not be as in training")
    if again(probe)["input_ids"] != tokenizer(probe)["input_ids"]:
        problems.append("it gives other token ids, so the model would not read what it has learned")
    if problems:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} is not the same once saved and loaded again: "
            f"{'; '.join(problems)}. Nothing was trained. Update transformers, or use another copy of the model."
        )


def load_tokenizer(location: ModelLocation, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The model's fast tokenizer, with a padding token that is not the stop token wherever one can be had.

    Args:
        location: The model.
        chat_template: Jinja text that replaces the tokenizer's own template.

    Raises:
        ModelError: The repository has no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location.source, **location.load_arguments())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(f"model '{location.id}': its tokenizer cannot be loaded: {_sentence(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"model '{location.id}': only a slow tokenizer is available, and supervision needs character offsets; "
            "install 'llmtune[sentencepiece]' so that it can be converted"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model '{location.id}': its tokenizer names no eos token, so an answer could never end")
    vocabulary = location.config.get_text_config().vocab_size
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        # Padding is masked by position, never by token id, so sharing an id with eos cannot mask the stop token.
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


def load_for_training(
    location: ModelLocation,
    *,
    precision: str,
    method: str,
    quantization: str | None,
    rank: int,
    alpha: int,
    dropout: float,
    targets: Sequence[str],
    device: str,
) -> PreTrainedModel | PeftModel:
    """The base model with what will be trained attached to it.

    Base weights are held in ``precision`` for lora; so they are for qlora but for the matrices of the layers, which are
    held in 4 or 8 bits; and in fp32 for full fine-tuning (updates smaller than a bf16 step would be lost). Adapter
    weights are fp32 masters.

    Raises:
        ModelError: The weights cannot be loaded, or no module matches ``targets``.
    """
    import torch

    dtype = torch.float32 if method == "full" else getattr(torch, DTYPES[precision])
    model = _load_base(location, dtype=dtype, quantization=quantization, device=device)
    if method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules="all-linear" if "all-linear" in targets else list(targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=location.source,
        revision=location.revision,
    )
    try:
        adapted = get_peft_model(model, lora)
    except ValueError as error:
        raise ModelError(f"model '{location.id}': no adapter can be attached: {error}") from None
    # A set is saved in another order by each process; a run and its resumption write the same file.
    adapted.peft_config["default"].target_modules = sorted(lora.target_modules)
    return adapted


def _load_base(
    location: ModelLocation, *, dtype: torch.dtype, quantization: str | None, device: str
) -> PreTrainedModel:
    import torch

    arguments: dict[str, Any] = location.load_arguments() | {"dtype": dtype}
    if quantization is not None:
        arguments |= {"quantization_config": quantization_config(quantization, dtype), "device_map": {"": device}}
    model = _from_pretrained(location.id, location.source, arguments)
    if quantization is not None:
        _keep_differentiable(model)
        # Norms, embedding and head give what passes between layers its precision: bf16, as without quantisation. What
        # models made in bf16 add up there can leave the range of fp16, so then it is fp32; for answering too.
        _hold_rest_in(model, torch.float32 if dtype == torch.float16 else dtype)
    return model


def _keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit layers in the one format that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks a 4-bit weight for good at its first forward in evaluation
    mode. The packed kernel cuts the graph, so that training after an evaluation would silently lose the gradients of
    all earlier layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _hold_rest_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What is not quantised in ``dtype``; on a CPU copied out of the file, which stays mapped while it is used."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype, copy=parameter.device.type == "cpu")


def _from_pretrained(model_id: str, source: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """The model with all its weights; upstream would fill what is missing with random numbers and go on."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **arguments)
    except (
        OSError,
        EOFError,
        ValueError,
        RuntimeError,
        ImportError,
        KeyError,
        SafetensorError,
        UnpicklingError,
    ) as error:
        if "out of memory" in str(error).lower():
            raise
        raise ModelError(f"model '{model_id}': its weights cannot be loaded: {_sentence(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"model '{model_id}': {len(missing)} of its weights are missing ({', '.join(missing[:3])}, …); its files "
            "are incomplete or of another architecture. Fetch the model again"
        )
    return model


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> Any:
    """bitsandbytes settings: NF4 with double quantisation (QLoRA, arXiv:2305.14314), or LLM.int8()."""
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def load_tuned(
    location: ModelLocation,
    *,
    adapter_dir: Path | None,
    model_dir: Path | None,
    precision: str,
    quantization: str | None,
    device: str,
) -> PreTrainedModel | PeftModel:
    """A finished run's model, ready to answer: base plus adapter, or the fully tuned model.

    The base keeps the precision it was trained against, so that what is evaluated is what was trained.
    """
    import torch

    dtype = getattr(torch, DTYPES[precision])
    if model_dir is not None:
        trust = location.trust_remote_code
        arguments = {"dtype": torch.float32, "trust_remote_code": trust, "use_safetensors": True}
        return _from_pretrained(location.id, str(model_dir), arguments).to(device).eval()
    base = _load_base(location, dtype=dtype, quantization=quantization, device=device)
    if adapter_dir is not None:
        from peft import PeftModel

        require_plain_adapter(adapter_dir)
        base = PeftModel.from_pretrained(base, str(adapter_dir))
    return (base if quantization is not None else base.to(device)).eval()
