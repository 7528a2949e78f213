"""litgpt's own loop for ``litgpt finetune_lora`` with its default flags: bf16 throughout, one row per forward pass.

What it divides the loss by differs (each row counts the same); what is compared is the mean over supervised tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common import IGNORED, Conversation, read_job, read_rows, versions

TALK, JOB = Conversation(), read_job()

import lightning  # noqa: E402
import torch  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.data import Alpaca, get_sft_collate_fn  # noqa: E402
from litgpt.finetune import lora  # noqa: E402
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(JOB["threads"])
HF = json.loads((Path(JOB["model"]) / "config.json").read_text(encoding="utf-8"))
LOSSES: list[tuple[float, int]] = []


def config() -> Config:
    """The model's shape in litgpt's words."""
    targets = ("query", "key", "value", "projection", "mlp")
    return Config(
        name="bench",
        block_size=JOB["longest"],
        n_layer=HF["num_hidden_layers"],
        n_head=HF["num_attention_heads"],
        n_query_groups=HF["num_key_value_heads"],
        n_embd=HF["hidden_size"],
        intermediate_size=HF["intermediate_size"],
        vocab_size=HF["vocab_size"],
        padded_vocab_size=HF["vocab_size"],
        rotary_percentage=1.0,
        rope_base=int(HF["rope_parameters"]["rope_theta"]),
        parallel_residual=False,
        bias=False,
        attn_bias=HF["model_type"] == "qwen2",
        norm_class_name="RMSNorm",
        norm_eps=HF["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        lora_r=JOB["rank"],
        lora_alpha=JOB["alpha"],
        lora_dropout=0.0,
        **{f"lora_{target}": True for target in targets},
    )


def weights() -> dict[str, torch.Tensor]:
    """Base weights and first values of the adapters under litgpt's names."""
    base, first = load_file(Path(JOB["model"]) / "model.safetensors"), load_file(JOB["adapter"])
    embedding = base["model.embed_tokens.weight"]
    named = {"transformer.wte.weight": embedding, "lm_head.linear.weight": embedding}
    named["transformer.ln_f.weight"] = base["model.norm.weight"]
    heads = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    places = {"attn.qkv": heads, "attn.proj": ("self_attn.o_proj",), "mlp.fc_1": ("mlp.gate_proj",)}
    places |= {"mlp.fc_2": ("mlp.up_proj",), "mlp.proj": ("mlp.down_proj",)}
    for layer in range(HF["num_hidden_layers"]):
        there, here = f"model.layers.{layer}", f"transformer.h.{layer}"
        named[f"{here}.norm_1.weight"] = base[f"{there}.input_layernorm.weight"]
        named[f"{here}.norm_2.weight"] = base[f"{there}.post_attention_layernorm.weight"]
        for own, theirs in places.items():
            named[f"{here}.{own}.linear.weight"] = torch.cat([base[f"{there}.{each}.weight"] for each in theirs])
            named[f"{here}.{own}.lora_A"] = torch.cat([first[f"layers.{layer}.{each}"] for each in theirs])
            if f"{there}.{theirs[0]}.bias" in base:
                named[f"{here}.{own}.linear.bias"] = torch.cat([base[f"{there}.{each}.bias"] for each in theirs])
    return named


def rows() -> list[dict[str, Any]]:
    """The rows as litgpt's data sets give them."""
    found = []
    for row in read_rows(JOB):
        count = len(row["input_ids"])
        tensors = {name: torch.tensor(ids, dtype=torch.int64) for name, ids in row.items()}
        found.append(tensors | {"token_counts": {"raw": count, "raw_plus_prompt_template": count}})
    return found


def recorded(
    logits: Any, targets: torch.Tensor, *, _original: Any = lora.chunked_cross_entropy, **settings: Any
) -> torch.Tensor:
    """litgpt's loss, with a note of it and of the tokens behind it."""
    loss: torch.Tensor = _original(logits, targets, **settings)
    LOSSES.append((float(loss.detach()), int((targets != IGNORED).sum())))
    return loss


def main() -> None:
    """Train as ``litgpt.finetune.lora.main`` does."""
    fabric = lightning.Fabric(devices=1, accelerator="cpu", precision="bf16-true")
    with fabric.init_module():
        model = GPT(config())
    mark_only_lora_as_trainable(model)
    missing, unexpected = model.load_state_dict(weights(), strict=False)
    if unexpected or any("lora_B" not in name for name in missing):
        raise SystemExit(f"weights do not fit: {[*unexpected, *missing][:3]}")
    model = fabric.setup_module(model)
    plain = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=JOB["learning_rate"], weight_decay=0.0
    )
    optimizer = fabric.setup_optimizers(plain)

    def updated(*_: Any) -> None:
        supervised = sum(number for _, number in LOSSES)
        loss = sum(value * number for value, number in LOSSES) / supervised
        TALK.supervised += supervised
        LOSSES.clear()
        TALK.update_done(loss)

    every = rows()
    loader = torch.utils.data.DataLoader(every, batch_size=1, collate_fn=get_sft_collate_fn(ignore_index=IGNORED))
    validation = torch.utils.data.DataLoader(every[:1], collate_fn=get_sft_collate_fn(ignore_index=IGNORED))
    loaders = fabric.setup_dataloaders(loader, validation)
    began = False

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        nonlocal began
        if not module.training:
            return
        if not began:
            began = True
            LOSSES.clear()  # of the check before training
            plain.register_step_post_hook(updated)
            TALK.ready(versions("torch", "litgpt", "lightning"))
        TALK.tokens += arguments[0].numel()  # one row per pass: no padding

    lora.chunked_cross_entropy = recorded
    model.register_forward_pre_hook(count)
    lora.fit(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.LambdaLR(plain, lambda _: 1.0),
        train_dataloader=loaders[0],
        val_dataloader=loaders[1],
        devices=1,
        checkpoint_dir=Path(JOB["model"]),
        out_dir=Path(JOB["work"]),
        train=TrainArgs(
            save_interval=10**6,
            log_interval=1,
            global_batch_size=JOB["batch"],
            micro_batch_size=1,
            lr_warmup_steps=0,
            epochs=2,
            max_steps=JOB["steps"],
        ),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, max_iters=1, initial_validation=False),
        data=Alpaca(),
    )


main()
