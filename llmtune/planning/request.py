"""The facts a plan is made from, and the few things that every decision reads off them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.config import RunConfig
from llmtune.data import DataStats, pass_width
from llmtune.hardware import DeviceChoice, Hardware
from llmtune.models import Download, ModelSpec
from llmtune.planning.choice import Choice
from llmtune.planning.correction import NO_CORRECTION, Correction
from llmtune.presets import GOALS, Level, Preset, dataset_size

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens of passes are multiples of this, padding included. Tensor cores read pieces of 16 bytes, eight 2-byte values
# (NVIDIA, Matrix Multiplication Background). A CPU's oneDNN compiles about 30 kernels for every new number of tokens in
# a pass, 2 ms each, and keeps 1,024 of them: multiples of 8 up to 1,168 are 146 numbers and were compiled again and
# again. With 64 instead of 8 updates were 1.07 times as fast (1.02 to 1.10; Llama 135M, chat lengths, LoRA on all
# linear layers, two AMX cores, torch 2.13), padding included, and the process 10 % smaller.
PAD_MULTIPLE = {"cpu": 64, "accelerator": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """The facts a plan is made from.

    Attributes:
        eval_rows: Rows of the evaluation set, 0 when there is none.
        processes: Ranks of the launch.
        sharding: How the launch spreads the model over its ranks: ``fsdp2``, ``zero2``, ``zero3``; None for DDP.
        model_choice: How the model was chosen.
        complexity: How varied the training text is, 0 to 1 (`llmtune.data`); None where it was not measured.
        download: What has to be fetched from the Hub before the run starts; None where nothing has.
        correction: What earlier runs on this machine, or a probe, have shown about the predictions.
    """

    config: RunConfig
    hardware: Hardware
    device: DeviceChoice
    spec: ModelSpec
    preset: Preset
    stats: DataStats
    eval_rows: int
    processes: int
    model_choice: Choice[str]
    sharding: str | None = None
    complexity: float | None = None
    download: Download | None = None
    correction: Correction = NO_CORRECTION

    @property
    def size(self) -> str:
        """Size class of the training data."""
        return dataset_size(self.stats.rows)

    @property
    def level(self) -> Level:
        """The preset's numbers for what is aimed at and the size of the data."""
        return self.preset.level(self.config.train.preset, self.size)

    @property
    def rows(self) -> int:
        """Training rows."""
        return max(1, self.stats.rows)

    @property
    def mean_length(self) -> float:
        """Tokens of a row on average."""
        return self.stats.tokens / self.rows

    @property
    def longest(self) -> int:
        """Padded tokens of the longest row that will be trained on."""
        return self.padded(min(self.stats.length_max, self.config.data.max_length or self.spec.context))

    @property
    def equally_long(self) -> bool:
        """Whether all rows have one length, which needs no padding either."""
        return self.stats.tokens == self.rows * self.longest

    def typical_lengths(self, count: int) -> NDArray[np.int32]:
        """Tokens of ``count`` rows that are spread as the data set's are, int32 [count].

        Between the known percentiles lengths rise evenly; the shortest row is the one that gives the known mean.
        """
        stats = self.stats
        known = (0.5, stats.length_p50), (0.95, stats.length_p95), (0.99, stats.length_p99), (1.0, stats.length_max)
        shares, lengths = zip(*known, strict=True)
        above = sum((share - before) * (length + shorter) / 2 for (before, shorter), (share, length) in pairwise(known))
        shortest = min(max(1.0, 4 * (self.mean_length - above) - stats.length_p50), max(1.0, stats.length_p50))
        found = np.interp((np.arange(count) + 0.5) / count, (0.0, *shares), (shortest, *lengths))
        return np.clip(np.rint(found), 1, self.longest).astype(np.int32)

    @property
    def kind(self) -> str:
        """``cpu`` or ``accelerator``."""
        return "cpu" if self.device.type == "cpu" else "accelerator"

    @property
    def has_varlen(self) -> bool:
        """Whether torch has a kernel for rows of many lengths: on NVIDIA's GPUs from Ampere on, which have bf16."""
        found = (one for one in self.hardware.accelerators if one.index == self.device.index)
        return self.device.type == "cuda" and any(one.kind == "cuda" and one.bf16 for one in found)

    @property
    def pad_multiple(self) -> int:
        """What the tokens of passes are multiples of, see `pass_width`."""
        return PAD_MULTIPLE[self.kind]

    def padded(self, length: int, num_rows: int = 1) -> int:
        """Width of a pass of so many rows, the longest of this length."""
        return pass_width(length, num_rows, self.pad_multiple)

    def share(self, global_batch_size: int) -> int:
        """Rows of one update on one process."""
        return math.ceil(global_batch_size / self.processes)

    def was_set(self, key: str) -> bool:
        """Whether somebody set this ``group.leaf``, be it to its default."""
        group, leaf = key.split(".")
        return leaf in getattr(self.config, group).model_fields_set

    def of_preset(self, name: str) -> Choice[Any]:
        """A number of the preset, with the source the preset gives for it, and what it is for other goals."""
        value = getattr(self.level, name)
        where = f"{self.preset.family} preset, {self.config.train.preset}, {self.size} data"
        others = {goal: getattr(self.preset.level(goal, self.size), name) for goal in GOALS}
        changes = ", ".join(
            f"{_number(other)} with --preset {goal}" for goal, other in others.items() if other != value
        )
        return Choice(value, f"{where}: {self.level.sources[name]}", "preset", changes)

    def setting(self, key: str, reason: str) -> Choice[Any]:
        """A setting that has a value of its own: the user's, or the default with its reason."""
        group, leaf = key.split(".")
        value = getattr(getattr(self.config, group), leaf)
        return Choice(value, f"you set {key}", "user") if self.was_set(key) else Choice(value, reason, "default")


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
