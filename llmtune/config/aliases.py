"""Names of other toolkits' settings: aliases of keys of llmtune, and hints for names without an equivalent key.

A name is read as another key only where both mean the same; every such reading is said once. A name that means
something else, or that llmtune has no setting for, is an error whose hint says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Alias:
    """The key that a name is read as.

    Attributes:
        key: The full key.
        remark: What a person should know beside it; empty where both names mean exactly the same.
    """

    key: str
    remark: str = ""


def _named(key: str, names: str, remark: str = "") -> dict[str, Alias]:
    return dict.fromkeys(names.split(), Alias(key=key, remark=remark))


_CUTS = "rows that are longer are refused, unless data.too_long says how they are cut or dropped"

ALIASES: Mapping[str, Alias] = {
    **_named("model.id", "model_name model_name_or_path model_id model_path base_model pretrained_model_name_or_path"),
    **_named("model.token", "hf_token hub_token"),
    **_named("data.path", "dataset dataset_path data_path data_file train_file train_data train_path training_file"),
    **_named(
        "data.eval_path",
        "eval_data eval_dataset eval_file validation_file validation_data validation_path val_data val_file",
    ),
    **_named("data.eval_fraction", "val_set_size val_size eval_size test_size validation_split"),
    **_named(
        "data.max_length",
        "max_seq_length max_seq_len max_sequence_length sequence_length sequence_len seq_length seq_len cutoff_len "
        "model_max_length max_len max_tokens_per_row",
        _CUTS,
    ),
    **_named("train.learning_rate", "lr peak_lr"),
    **_named("train.epochs", "num_train_epochs num_epochs n_epochs max_epochs"),
    **_named("train.max_steps", "num_train_steps num_training_steps train_steps total_steps max_train_steps"),
    **_named("train.schedule", "lr_scheduler_type lr_scheduler lr_schedule scheduler scheduler_type"),
    **_named("train.schedule_arguments", "lr_scheduler_kwargs scheduler_kwargs lr_scheduler_args"),
    **_named("train.optimizer", "optim optimizer_name optimizer_type"),
    **_named("train.optimizer_arguments", "optimizer_kwargs optim_kwargs"),
    **_named("train.max_grad_norm", "gradient_clipping gradient_clip_val clip_grad_norm grad_clip max_gradient_norm"),
    **_named("train.packing", "sample_packing pack_sequences"),
    **_named("train.activation_checkpointing", "gradient_checkpointing use_gradient_checkpointing"),
    **_named("train.compile", "torch_compile"),
    **_named("train.num_workers", "dataloader_num_workers"),
    **_named("train.seed", "random_seed random_state"),
    **_named("adapter.rank", "lora_r lora_rank lora_dim adapter_rank r"),
    **_named("adapter.alpha", "lora_alpha"),
    **_named("adapter.dropout", "lora_dropout"),
    **_named("adapter.targets", "target_modules lora_target_modules lora_target lora_targets lora_modules"),
    **_named("evaluate.every_steps", "eval_steps evaluation_steps eval_every eval_interval eval_freq"),
    **_named("evaluate.metric", "metric_for_best_model"),
    **_named("evaluate.patience", "early_stopping_patience"),
    **_named("save.every_steps", "save_steps checkpoint_steps save_every save_interval"),
    **_named("output.dir", "output_dir out_dir save_dir run_dir"),
}

_UPDATE = "the examples of one update are train.global_batch_size"
_PRECISION = "give train.precision=bf16, fp16, tf32 or fp32; left out, it follows from the device"
_LOG = "every update is logged in events.jsonl; leave it out"
_BEST = "the best checkpoint is kept and is the result wherever rows are held out; leave it out"
_NOT_THERE = "llmtune has no such setting; leave it out"
_LEARNED = "data.supervise says which tokens are learned: all, last, completion or text"
_ATTENTION = "llmtune chooses the attention kernel, and the plan says which; leave it out"
_LAUNCH = "several processes are started with accelerate launch, see llmtune accelerate-config"

HINTS: Mapping[str, str] = {
    **dict.fromkeys(("batch_size", "train_batch_size", "effective_batch_size", "total_batch_size"), _UPDATE),
    **dict.fromkeys(
        (
            "per_device_train_batch_size",
            "per_gpu_train_batch_size",
            "per_device_batch_size",
            "mini_batch_size",
            "device_batch_size",
        ),
        "the most examples of one forward pass are train.micro_batch_size, which memory decides when it is left out; "
        + _UPDATE,
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum_steps", "accumulate_grad_batches"),
        "llmtune derives it from train.global_batch_size, train.micro_batch_size and the number of processes; give "
        "train.global_batch_size",
    ),
    **dict.fromkeys(
        ("per_device_eval_batch_size", "eval_batch_size", "per_gpu_eval_batch_size"),
        "evaluations are cut by train.token_budget as updates are; leave it out",
    ),
    **dict.fromkeys(
        ("warmup_steps", "num_warmup_steps", "warmup_updates", "warmup"),
        "give train.warmup_ratio, the share of the updates: warm-up updates / updates",
    ),
    **dict.fromkeys(
        ("save_total_limit", "max_checkpoints", "keep_checkpoints"),
        "give save.keep, the number of newest checkpoints that are kept besides the best one",
    ),
    **dict.fromkeys(("save_strategy",), "give save.every_steps"),
    **dict.fromkeys(("eval_split",), "give data.eval_path, or data.eval_fraction for a share of the rows"),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval"),
        "give evaluate.every_steps; data.eval_fraction=0 trains without evaluations",
    ),
    **dict.fromkeys(("logging_steps", "logging_strategy", "log_every", "log_interval", "logging_first_step"), _LOG),
    **dict.fromkeys(("logging_dir", "run_name"), "give output.dir, the run directory"),
    **dict.fromkeys(("load_best_model_at_end",), _BEST),
    **dict.fromkeys(
        ("bf16", "fp16", "tf32", "fp32", "pure_bf16", "dtype", "torch_dtype", "mixed_precision", "half"), _PRECISION
    ),
    **dict.fromkeys(
        ("load_in_4bit", "use_4bit", "quantization_bit", "bnb_4bit_quant_type"),
        "give train.method=qlora, which keeps the base weights in 4 bits",
    ),
    **dict.fromkeys(
        ("load_in_8bit", "use_8bit"),
        "give train.method=qlora and adapter.quantization=int8, which keep the base weights in 8 bits",
    ),
    **dict.fromkeys(
        ("finetuning_type", "use_peft", "use_lora", "peft_type", "qlora", "full_finetuning", "tuning_type"),
        "give train.method=lora, qlora or full",
    ),
    **dict.fromkeys(("lora", "peft", "peft_config", "lora_config"), "give adapter: {rank: 16, alpha: 32}"),
    **dict.fromkeys(("training", "trainer", "training_args", "training_arguments"), "give train: {epochs: 3}"),
    **dict.fromkeys(("optim_args",), "give train.optimizer_arguments: {momentum: 0.9}"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "betas"), "give train.optimizer_arguments.betas=[0.9, 0.999]"),
    **dict.fromkeys(("adam_epsilon", "eps", "epsilon"), "give train.optimizer_arguments.eps=1e-8"),
    **dict.fromkeys(("momentum",), "give train.optimizer=sgd and train.optimizer_arguments.momentum=0.9"),
    **dict.fromkeys(
        ("min_lr", "min_lr_rate", "num_cycles", "lr_end", "power", "num_decay_steps"),
        "give it as an entry of train.schedule_arguments, with the train.schedule that has it",
    ),
    **{
        name: f"give train.optimizer={name}"
        for name in ("adam", "adamw", "sgd", "lion", "adafactor", "adamw_8bit", "rmsprop", "adagrad")
    },
    **dict.fromkeys(("data_seed",), "give train.seed, which decides the order of the rows too"),
    **dict.fromkeys(("steps", "iters", "iterations", "max_iters"), "give train.max_steps"),
    **dict.fromkeys(("resume_from_checkpoint", "auto_resume"), "give recover.resume=auto, never or a checkpoint"),
    **dict.fromkeys(("train_on_inputs", "completion_only_loss", "assistant_only_loss", "mask_prompt"), _LEARNED),
    **dict.fromkeys(("dataset_text_field", "text_column", "field"), "give data.columns.text=COLUMN"),
    **dict.fromkeys(("flash_attention", "flash_attn", "use_flash_attention_2", "attn_implementation"), _ATTENTION),
    **dict.fromkeys(("deepspeed", "fsdp", "ddp", "num_gpus", "nproc_per_node", "num_processes"), _LAUNCH),
    **dict.fromkeys(("device_map",), "give train.device"),
    **dict.fromkeys(
        ("group_by_length", "remove_unused_columns", "disable_tqdm", "ddp_find_unused_parameters"),
        "llmtune takes care of it; leave it out",
    ),
    **dict.fromkeys(
        (
            "neftune",
            "neftune_alpha",
            "neftune_noise_alpha",
            "noise_alpha",
            "label_smoothing_factor",
            "use_rslora",
            "use_dora",
            "lora_bias",
            "modules_to_save",
            "init_lora_weights",
            "loraplus_lr_ratio",
            "push_to_hub",
            "hub_model_id",
        ),
        _NOT_THERE,
    ),
}

# Key -> other names of its values, in small letters and with underscores.
VALUES: Mapping[str, Mapping[str, str]] = {
    "train.optimizer": {
        "adamw": "adamw_torch_fused",
        "adam": "adamw_torch_fused",
        "adamw_hf": "adamw_torch",
        "adamw_fused": "adamw_torch_fused",
        "adamw_32bit": "adamw_torch_fused",
        "adamw_bnb": "adamw_bnb_8bit",
        "adamw8bit": "adamw_bnb_8bit",
        "adam_8bit": "adamw_bnb_8bit",
        "adam8bit": "adamw_bnb_8bit",
        "paged_adamw": "paged_adamw_32bit",
        "lion": "lion_32bit",
        "paged_lion": "paged_lion_32bit",
        "stableadamw": "stable_adamw",
    },
    "train.schedule": {
        "cosine_annealing": "cosine",
        "cosine_with_warmup": "cosine",
        "linear_with_warmup": "linear",
        "cosine_with_hard_restarts": "cosine_with_restarts",
        "poly": "polynomial",
        "wsd": "warmup_stable_decay",
        "plateau": "reduce_lr_on_plateau",
    },
    "train.precision": {
        "bfloat16": "bf16",
        "float16": "fp16",
        "half": "fp16",
        "float32": "fp32",
        "float": "fp32",
    },
}

# Values whose other name means something slightly different.
REMARKS: Mapping[tuple[str, str], str] = {
    ("train.optimizer", name): "transformers has no Adam with the weight decay in the gradient"
    for name in ("adam", "adam_8bit", "adam8bit")
}


def plain_name(text: str) -> str:
    """Return a name as it is looked up: small letters, underscores for dashes and blanks."""
    return text.strip().lower().replace("-", "_").replace(" ", "_")


def value_of(key: str, value: str) -> str:
    """Return the value that ``value`` is another name of; the plain name where it is none."""
    name = plain_name(value)
    return VALUES.get(key, {}).get(name, name)
