"""Both sides of the comparison: a run of llmtune that is listened to, and transformers and peft alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from convergence_cases import Study, Tokens, tokens_of
from peers.common import IGNORED, in_order, trainer_settings
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from llmtune import FineTuner
from llmtune.runs import RunDirectory

Tensors = dict[str, torch.Tensor]

# ── our side ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Trained weights at the beginning of an update, and the gradient that it found (up to a factor: clipped)."""

    weights: Tensors
    gradients: Tensors


def trained(model: torch.nn.Module) -> Tensors:
    """Copies of the weights that are trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class Recorder(TrainerCallback):
    """Notes how a run begins, what it is told to do, losses, gradients at some updates, and what it recovered by."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._steps = set(steps)
        self.start: Tensors = {}
        self.args: Any = None
        self.points: dict[int, Point] = {}
        self.losses: list[float] = []
        self.updates: list[list[Tokens]] = []  # rows of each
        self.recoveries: list[str] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.args, self.start = args, trained(kwargs["model"])
        loader = kwargs["train_dataloader"]
        self.updates = list(islice(_updates(loader.dataset, loader.batch_sampler), args.max_steps))
        loader.batch_sampler.set_epoch(0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step + 1
        if step in self._steps:
            model = kwargs["model"]
            gradients = {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}
            self.points[step] = Point(weights=trained(model), gradients=gradients)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(float(kwargs["logs"]["loss"]))


def _updates(dataset: Any, sampler: Any) -> Iterator[list[Tokens]]:
    """The rows of every update to come, as our data loader takes them."""
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        for numbers in sampler:
            rows = [dataset[number][0] for number in numbers]
            yield [tokens_of(row.input_ids.tolist(), row.supervised.tolist()) for row in rows]
        epoch += 1


def _warm_from_one_step(trainer: Trainer, updates: int) -> None:
    """Give a stock Trainer the warm-up of llmtune: 1/w, 2/w … of the peak, where transformers begins at 0."""
    warmup = trainer.args.get_warmup_steps(updates)
    trainer.create_optimizer()
    (formula, *_) = trainer.create_scheduler(updates).lr_lambdas
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
        trainer.optimizer, lambda done: (done + 1) / warmup if done < warmup else formula(done)
    )
    trainer._created_lr_scheduler = False  # else the Trainer makes its own again


def train_ours(study: Study, model: str, seed: int, work: Path) -> tuple[Recorder, Path]:
    """A run as a user has it who fixes the batch, the number of updates and the seed; its record and its result."""
    recorder = Recorder(study.checked)
    settings = {
        "model": model,
        "method": study.method,
        "precision": "bf16",  # where a machine has no unit for it llmtune would take fp32, and nothing would be shown
        "max_steps": study.steps,
        "global_batch_size": study.batch,
        "seed": seed,
        "train.device": "cpu",
        "train.threads": study.threads,
        "adapter.dropout": 0.0,  # each side would drop other values
        "data.eval_fraction": 0.0,
        "evaluate.num_samples": 0,
        "save.every_steps": study.steps,
        "recover.resume": "never",
        "monitor.report": False,
        "output": str(work / "run"),
        "output.root": str(work),
        **study.changes,
    }
    if study.learning_rate is not None:
        settings["learning_rate"] = study.learning_rate
    result = FineTuner(list(study.train), callbacks=[recorder], **settings).train()
    final = RunDirectory.open(result.run_dir).final
    assert final is not None
    recorder.recoveries = [told["action"] for told in result.incidents if told["event"] == "recovery"]
    # A clipped spike leaves rows and updates as they were; after anything else there is nothing to compare.
    clipped = {"incident": ("kind", "spike"), "recovery": ("action", "clip")}
    if any(told.get(name) != value for told in result.incidents for name, value in [clipped[told["event"]]]):
        raise SystemExit(f"seed {seed}: the run had incidents: {result.incidents}")
    return recorder, final


# ── the reference ────────────────────────────────────────────────────────────────────────────────────────────────


class Reference:
    """transformers and peft as their documentation uses them, in fp32.

    Args:
        model: Directory of the base model.
        adapter: A saved adapter whose configuration is taken; None where all weights are trained.
    """

    def __init__(self, model: str, adapter: Path | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self._source, self._adapter = model, adapter
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._collate = DataCollatorForSeq2Seq(self.tokenizer)

    def model(self, weights: Tensors | None = None, *, dtype: torch.dtype = torch.float32) -> Any:
        """A fresh one, with these trained weights, or those of the adapter's file; ``dtype`` is that of the base."""
        base = AutoModelForCausalLM.from_pretrained(self._source, dtype=dtype)
        model = base
        if self._adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(base, str(self._adapter), is_trainable=True)
        if weights is not None:
            give(model, weights)
        return model

    def gradients(self, model: Any, weights: Tensors, rows: Sequence[Tokens], *, autocast: bool = False) -> Tensors:
        """Of the mean loss over the supervised tokens of these rows, at these weights; fp32 unless under autocast."""
        give(model, weights)
        model.zero_grad()
        model.train()
        supervised = sum(label != IGNORED for row in rows for label in row["labels"])
        for row in rows:  # one by one: nothing of padding or masks
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**self._collate([row]), num_items_in_batch=supervised).loss
            loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    @torch.no_grad()
    def loss(self, model: Any, rows: Sequence[Tokens]) -> float:
        """Mean negative log likelihood of all supervised tokens, from logits."""
        model.eval()
        total, count = 0.0, 0
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += float(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="sum"))
            count += int((labels != IGNORED).sum())
        return total / count

    def train(self, start: Tensors, record: Recorder, work: Path, *, bf16: bool = False) -> tuple[list[float], Path]:
        """A Trainer over the rows of ``record``, with its settings; losses, and where the result is."""
        from datasets import Dataset

        args, rows = record.args, [row for update in record.updates for row in update]
        batch = len(record.updates[0])
        assert all(len(update) == batch for update in record.updates)
        job = {"work": str(work), "steps": len(record.updates), "batch": batch, "seed": args.seed}
        same = ("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim")
        same += ("adam_beta1", "adam_beta2", "adam_epsilon")
        # Rows one by one, as in `gradients`: padding would only cost time.
        settings = trainer_settings(job | {"learning_rate": args.learning_rate}, pass_rows=1)
        losses: list[float] = []
        trainer = Trainer(
            model=self.model(start),
            args=TrainingArguments(bf16=bf16, **settings | {name: getattr(args, name) for name in same}),
            train_dataset=Dataset.from_list(rows),
            data_collator=self._collate,
            callbacks=[_Losses(losses)],
        )
        trainer.remove_callback(PrinterCallback)
        _warm_from_one_step(trainer, len(record.updates))
        in_order(trainer, balanced=False)
        trainer.train()
        trainer.save_model(str(work / "final"))
        return losses, work / "final"


class _Losses(TrainerCallback):
    def __init__(self, losses: list[float]) -> None:
        self._losses = losses

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self._losses.append(float(kwargs["logs"]["loss"]))


def give(model: Any, weights: Tensors) -> None:
    """Set the trained weights, all of them."""
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if own.keys() != weights.keys():
        raise SystemExit(f"other weights are trained: {sorted(own.keys() ^ weights.keys())[:3]}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def neighbour(weights: Tensors, seed: int) -> Tensors:
    """The same values with a relative error of half a bf16 step, 2⁻⁹, at random."""
    draw = torch.Generator().manual_seed(seed)
    return {n: w * (1 + 2**-9 * (2 * torch.rand(w.shape, generator=draw) - 1)) for n, w in weights.items()}


def cosine(ours: Tensors, theirs: Tensors) -> float:
    """Between two gradients of all weights together.

    Raises:
        SystemExit: They are not of the same weights.
    """
    if ours.keys() != theirs.keys():
        raise SystemExit(f"gradients of other weights: {sorted(ours.keys() ^ theirs.keys())[:3]}")
    inner = sum(float((ours[n].double() * theirs[n].double()).sum()) for n in ours)
    norms = [sum(float(g.double().square().sum()) for g in side.values()) for side in (ours, theirs)]
    return inner / (norms[0] * norms[1]) ** 0.5 if all(norms) else float(norms[0] == norms[1])


def least_cosine(ours: Tensors, theirs: Tensors) -> tuple[float, str]:
    """The worst of the single weights, and which it is."""
    return min((cosine({n: ours[n]}, {n: theirs[n]}), n) for n in ours)
