"""torchtune's recipe ``lora_finetune_single_device`` with the settings of its configurations, on a CPU in bf16."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from common import Conversation, read_job, read_rows, versions

TALK, JOB = Conversation(), read_job()

import torch  # noqa: E402
import torchtune  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

torch.set_num_threads(JOB["threads"])
HF = json.loads((Path(JOB["model"]) / "config.json").read_text(encoding="utf-8"))
NAMES = {"self_attn.o_proj": "attn.output_proj", "mlp.gate_proj": "mlp.w1", "mlp.down_proj": "mlp.w2"}
NAMES |= {"mlp.up_proj": "mlp.w3"} | {f"self_attn.{each}_proj": f"attn.{each}_proj" for each in "qkv"}


class Rows(torch.utils.data.Dataset[dict[str, list[int]]]):
    """The rows as its data sets give them; a component of the configuration."""

    def __init__(self, tokenizer: Any) -> None:
        self._rows = read_rows(JOB)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": self._rows[index]["input_ids"], "labels": self._rows[index]["labels"]}


class Tokenizer:
    """What the recipe asks of one."""

    pad_id = HF["pad_token_id"]


class Log:
    """A metric logger that is told of every update."""

    def log_config(self, config: Any) -> None:
        """Nothing."""

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        """One update is over."""
        TALK.update_done(float(payload["loss"]))


def component(name: str, **settings: Any) -> dict[str, Any]:
    """A piece of its configuration."""
    return {"_component_": name, **settings}


def model() -> dict[str, Any]:
    """The model's shape in torchtune's words."""
    llama = HF["model_type"] == "llama"
    return component(
        f"torchtune.models.{'llama3_2.lora_llama3_2' if llama else 'qwen2.lora_qwen2'}",
        lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=HF["vocab_size"],
        num_layers=HF["num_hidden_layers"],
        num_heads=HF["num_attention_heads"],
        num_kv_heads=HF["num_key_value_heads"],
        embed_dim=HF["hidden_size"],
        max_seq_len=JOB["longest"],
        intermediate_dim=HF["intermediate_size"],
        norm_eps=HF["rms_norm_eps"],
        rope_base=int(HF["rope_parameters"]["rope_theta"]),
        tie_word_embeddings=True,
        lora_rank=JOB["rank"],
        lora_alpha=JOB["alpha"],
        **({"scale_factor": 1} if llama else {}),
    )


def configuration() -> Any:
    """As ``llama3_2/1B_lora_single_device.yaml`` has it, but for what every side shares."""
    rows = min(4, JOB["most_rows"])
    return OmegaConf.create(
        {
            "model": model(),
            "tokenizer": component("__main__.Tokenizer"),
            "checkpointer": component(
                "torchtune.training.FullModelHFCheckpointer",
                checkpoint_dir=JOB["model"],
                checkpoint_files=["model.safetensors"],
                output_dir=JOB["work"],
                model_type="LLAMA3_2" if HF["model_type"] == "llama" else "QWEN2",
            ),
            "resume_from_checkpoint": False,
            "dataset": component("__main__.Rows"),
            "seed": JOB["seed"],
            "shuffle": False,
            "batch_size": rows,
            "gradient_accumulation_steps": JOB["batch"] // rows,
            "optimizer": component("torch.optim.AdamW", fused=True, weight_decay=0.0, lr=JOB["learning_rate"]),
            "lr_scheduler": component("__main__.constant"),
            "loss": component("torchtune.modules.loss.CEWithChunkedOutputLoss"),
            "epochs": 1,
            "max_steps_per_epoch": JOB["steps"],
            "clip_grad_norm": 1.0,
            "compile": False,
            "metric_logger": component("__main__.Log"),
            "log_every_n_steps": 1,
            "output_dir": JOB["work"],
            "device": "cpu",
            "dtype": "bf16",
            "enable_activation_checkpointing": False,
            "enable_activation_offloading": False,
        }
    )


def constant(optimizer: Any, **_: Any) -> Any:
    """A schedule that does nothing."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def copy_first_values(network: torch.nn.Module) -> None:
    """Give every A the values of the file."""
    first, weights = load_file(JOB["adapter"]), dict(network.named_parameters())
    with torch.no_grad():
        for name, value in first.items():
            _, layer, place = name.split(".", 2)
            weights[f"layers.{layer}.{NAMES[place]}.lora_a.weight"].copy_(value)


def main() -> None:
    """Run the recipe, which is a file beside the package and not a part of it."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = module.LoRAFinetuneRecipeSingleDevice(configuration())
    recipe.setup(configuration())
    copy_first_values(recipe._model)
    collate = recipe._dataloader.collate_fn

    def counted(batch: list[dict[str, list[int]]]) -> Any:
        # Without loader processes a batch is made when it is asked for: none belongs to a later update.
        TALK.tokens += sum(len(row["tokens"]) for row in batch)
        TALK.supervised += sum(label >= 0 for row in batch for label in row["labels"][1:])
        return collate(batch)

    recipe._dataloader.collate_fn = counted
    TALK.ready(versions("torch", "torchtune", "torchao"))
    recipe.train()


main()
