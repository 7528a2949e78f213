"""The same small run with nothing of ours: ``transformers.Trainer`` and ``peft`` as their documentation uses them."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

LIMIT = 2


def stock_trainer(model: str, output: Path, callbacks: list[Any], *, steps: int, save_steps: int, **how: Any) -> Any:
    """A Trainer that saves every ``save_steps`` and keeps two checkpoints.

    Args:
        model: Directory of the base model.
        output: Where checkpoints go.
        callbacks: Added last.
        steps: Updates.
        save_steps: Updates between saves.
        **how: ``rank`` of the adapter.
    """
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from tuning import ROWS

    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    lora = LoraConfig(r=how.get("rank", 4), lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [tokenizer(f"{row['question']} {row['answer']}", truncation=True, max_length=64) for row in ROWS]
    arguments = transformers.TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=8,
        max_steps=steps,
        learning_rate=1e-3,
        save_steps=save_steps,
        save_total_limit=LIMIT,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = transformers.Trainer(
        model=get_peft_model(base, lora),
        args=arguments,
        train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def train_stock(model: str, output: Path, callbacks: list[Any], *, steps: int, resume: bool) -> dict[str, Any]:
    """Train or continue, and return what came out."""
    trainer = stock_trainer(model, output, callbacks, steps=steps, save_steps=2)
    trainer.train(resume_from_checkpoint=True if resume else None)
    digest = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
    logged = [(log["step"], log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]
    return {"history": logged, "weights": digest.hexdigest()}


def stock_save_seconds(model: str, output: Path, *, steps: int, rank: int) -> list[float]:
    """Seconds of each save and of forcing its files to disk, which the Trainer itself leaves out."""
    trainer = stock_trainer(model, output, [], steps=steps, save_steps=2, rank=rank)
    seconds: list[float] = []
    usual = trainer._save_checkpoint

    def timed(model: Any, trial: Any) -> None:
        began = time.perf_counter()
        usual(model, trial)
        folder = output / f"checkpoint-{trainer.state.global_step}"
        for path in [*folder.iterdir(), folder, output]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        seconds.append(time.perf_counter() - began)

    trainer._save_checkpoint = timed
    trainer.train()
    return seconds
