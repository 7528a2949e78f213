"""The worker's side of the benchmark's conversation: one JSON object per line on stdin, one per line on stdout.

A worker is told its job in a file. It loads its model, says ``{"ready": …}`` and waits. ``{"do": "steps", "n": 2}`` is
answered with what two updates took; ``{"do": "quit"}`` ends the process. Between commands the training waits inside a
callback, so each side runs the loop that its users run.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
IGNORED = -100


def read_job() -> dict[str, Any]:
    """The job named on the command line."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def read_rows(job: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Ids and labels of all rows in the order of training."""
    rows = []
    with open(job["rows"], encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            ids, masked = row["input_ids"], row["masked"]
            rows.append({"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]})
    return rows


def versions(*packages: str) -> dict[str, str]:
    """What is installed of these."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_bytes() -> int:
    """Most memory that was ever resident, as the kernel counts it (VmHWM)."""
    with open("/proc/self/status", encoding="ascii") as file:
        return 1024 * int(next(line for line in file if line.startswith("VmHWM:")).split()[1])


class Conversation:
    """Counts updates and answers when those asked for are done.

    Attributes:
        tokens: Real tokens of the updates since the last answer; whoever sees them adds to it.
        supervised: Tokens of these that count in the loss.
    """

    def __init__(self) -> None:
        # Whatever libraries print goes to stderr; the true stdout belongs to the conversation.
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.tokens = self.supervised = 0
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._left = 0
        self._began = self._previous = 0.0
        self._peak = 0
        # A run may reset what the kernel counts, to measure a part of itself; this keeps the most of before.
        sys.addaudithook(self._before_reset)

    def _before_reset(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith("/clear_refs"):
            self._peak = max(self._peak, peak_bytes())

    def ready(self, installed: dict[str, str], **more: Any) -> None:
        """Loaded; wait for the first command."""
        self._say({"ready": True, "seconds": time.perf_counter() - STARTED, "versions": installed, **more})
        self._wait()

    def update_done(self, loss: float) -> None:
        """One update with this mean loss per supervised token is over."""
        now = time.perf_counter()
        self._seconds.append(now - self._previous)
        self._previous = now
        self._losses.append(loss)
        self._left -= 1
        if self._left == 0:
            self._say(
                {
                    "seconds": now - self._began,
                    "step_seconds": self._seconds,
                    "tokens": self.tokens,
                    "supervised": self.supervised,
                    "losses": self._losses,
                    "peak_bytes": max(self._peak, peak_bytes()),
                }
            )
            self._wait()

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._out, flush=True)

    def _wait(self) -> None:
        line = sys.stdin.readline()
        command = json.loads(line) if line else {"do": "quit"}
        if command["do"] == "quit":
            os._exit(0)  # the training is in the middle; nothing of it is kept
        self._left, self._losses, self._seconds, self.tokens, self.supervised = command["n"], [], [], 0, 0
        self._began = self._previous = time.perf_counter()


def copy_adapter(model: Any, path: str) -> int:
    """Give every A of a peft model the values of the file; B stays zero.

    Raises:
        SystemExit: The model has other adapters than the file.
    """
    import torch
    from safetensors.torch import load_file

    first = load_file(path)
    left = set(first)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            place, found, _ = name.partition(".lora_A.")
            if found:
                key = place[place.index("layers.") :]
                weight.copy_(first[key])
                left.discard(key)
            elif ".lora_B." in name and weight.any():
                raise SystemExit(f"{name} is not zero at the start")
    if left:
        raise SystemExit(f"no adapter on {len(left)} linear maps, such as {sorted(left)[0]}")
    return len(first)


def gate(job: dict[str, Any], talk: Conversation, *packages: str, counts: bool = True) -> Any:
    """A ``TrainerCallback`` that holds a Trainer between commands; it must log every update.

    Args:
        counts: Count tokens as they go through the model; else the logs tell.
    """
    from transformers import TrainerCallback

    class Gate(TrainerCallback):
        """Waits at the beginning, and after each last update that was asked for."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            copied = copy_adapter(kwargs["model"], job["adapter"])
            if counts:
                count_tokens(kwargs["model"], talk)
            talk.ready(versions(*packages), adapters=copied)

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logs = kwargs["logs"]
            if "loss" in logs:
                if not counts:
                    talk.tokens += int(logs["num_tokens"])
                    talk.supervised += int(logs["num_supervised_tokens"])
                talk.update_done(float(logs["loss"]))

    return Gate()


def count_tokens(model: Any, talk: Conversation) -> None:
    """Count what really goes through a model: tokens that are no padding, and those that are learned."""

    def count(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        mask, labels = named.get("attention_mask"), named.get("labels")
        talk.tokens += int(ids.numel() if mask is None or mask.dim() != 2 else mask.sum())
        if labels is not None:
            talk.supervised += int((labels[:, 1:] != IGNORED).sum())

    model.register_forward_pre_hook(count, with_kwargs=True)


def trainer_settings(job: dict[str, Any], pass_rows: int) -> dict[str, Any]:
    """Settings of ``TrainingArguments`` that every side shares: what is learned, and in which order."""
    return {
        "output_dir": job["work"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": pass_rows,
        "gradient_accumulation_steps": job["batch"] // pass_rows,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "seed": job["seed"],
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def in_order(trainer: Any, *, balanced: bool) -> None:
    """Rows in the order of the file; ``balanced`` puts those of like length together, within each update only."""
    import torch

    if balanced:
        from transformers.trainer_pt_utils import BatchRebalanceSampler

        args = trainer.args
        sampler: Any = BatchRebalanceSampler(
            lengths=[len(ids) for ids in trainer.train_dataset["input_ids"]],
            effective_batch_size=args.train_batch_size * args.gradient_accumulation_steps,
            dp_size=1,
            grad_accum=args.gradient_accumulation_steps,
            shuffle=False,
            rank=0,
        )
    else:
        sampler = torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer._get_train_sampler = lambda *_: sampler
