"""Everything a run will do, with a reason for each number. Frozen; written to the run before weights load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmtune.errors import PlanError
from llmtune.models import Download
from llmtune.planning.choice import Choice
from llmtune.planning.measurement import Measurement
from llmtune.planning.memory import MemoryEstimate
from llmtune.planning.timing import TimeEstimate
from llmtune.units import format_bytes, format_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A plan near one that does not fit.

    Attributes:
        flags: What to add to the command, or the command that replaces it.
        loses: What it costs beside time, in words; empty where nothing.
    """

    flags: str
    peak_bytes: int
    total_seconds: float
    loses: str

    def __str__(self) -> str:
        """``--method qlora (11.0 GiB, 4-bit base weights)``."""
        return f"{self.flags} ({format_bytes(self.peak_bytes)}{', ' if self.loses else ''}{self.loses})"

    def to_json(self) -> dict[str, Any]:
        """One entry of ``closest``."""
        return {
            "flags": self.flags,
            "peak_bytes": self.peak_bytes,
            "total_seconds": self.total_seconds,
            "loses": self.loses,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Alternative:
        """The inverse of ``to_json``; plans of earlier versions knew flags and memory alone."""
        before: dict[str, Any] = {"total_seconds": 0.0, "loses": ""}
        return cls(**(before | dict(document)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run, decided. Every field is a ``Choice``, up to ``memory``.

    Attributes:
        processes: Ranks that train together.
        max_length: Longest row, in tokens.
        updates: Optimizer steps of the whole run.
        token_budget: Most padded tokens per forward pass on one device.
        micro_batch_size: Most rows per forward pass on one device.
        packing: Whether rows are laid end to end in one sequence instead of being padded.
        pad_multiple: What rows x width of a pass is a multiple of.
        pass_overhead_tokens: What one more forward pass may cost in padding; None takes the fewest passes.
        accumulation: Forward passes per update on one device, on average (a description, not a setting: one data
            loader item is one update and holds as many micro-batches as its rows need).
        disk_bytes: What the checkpoints that are kept, one being written and the result take on disk.
        checkpoint_every: Every n-th layer is recomputed in the backward pass; 0 where none is.
        activation_offload: Whether what recomputed layers start from waits in host memory.
        sharding: How launch spreads the model over the ranks: ``fsdp2``, ``zero2``, ``zero3``; None copies it to each.
        compile: Whether the decoder layers are compiled.
        pin_memory: Whether batches wait in page-locked host memory.
        download: What has to be fetched from the Hub before the run starts; None where nothing has.
        closest: The nearest plans that fit, where this one does not; the cheapest first.
        optimizer_arguments: Arguments of the optimizer beside learning rate and weight decay.
        schedule_arguments: Arguments of the schedule beside warm-up and length.
        patience: Evaluations without improvement before stopping; None never stops early.
        measured: What the probe found that this plan rests on; None before it.
    """

    model: Choice[str]
    preset: Choice[str]
    data_size: Choice[str]
    method: Choice[str]
    quantization: Choice[str | None]
    precision: Choice[str]
    device: Choice[str]
    processes: Choice[int]
    sharding: Choice[str | None]
    max_length: Choice[int]
    epochs: Choice[float]
    updates: Choice[int]
    global_batch_size: Choice[int]
    token_budget: Choice[int]
    micro_batch_size: Choice[int]
    packing: Choice[bool]
    pad_multiple: Choice[int]
    pass_overhead_tokens: Choice[int | None]
    accumulation: Choice[int]
    activation_checkpointing: Choice[bool]
    checkpoint_every: Choice[int]
    activation_offload: Choice[bool]
    attention: Choice[str]
    compile: Choice[bool]
    optimizer: Choice[str]
    optimizer_arguments: Choice[Mapping[str, Any]]
    learning_rate: Choice[float]
    schedule: Choice[str]
    schedule_arguments: Choice[Mapping[str, Any]]
    warmup_updates: Choice[int]
    weight_decay: Choice[float]
    max_grad_norm: Choice[float]
    rank: Choice[int]
    alpha: Choice[int]
    dropout: Choice[float]
    targets: Choice[tuple[str, ...]]
    evaluate_every_steps: Choice[int]
    save_every_steps: Choice[int]
    keep_checkpoints: Choice[int]
    patience: Choice[int | None]
    threads: Choice[int]
    num_workers: Choice[int]
    pin_memory: Choice[bool]
    seed: Choice[int]
    memory: MemoryEstimate
    time: TimeEstimate
    disk_bytes: int
    disk_free_bytes: int
    fits: bool
    closest: tuple[Alternative, ...]
    notices: tuple[str, ...]
    measured: Measurement | None = None
    download: Download | None = None

    def choices(self) -> Iterator[tuple[str, Choice[Any]]]:
        """Name and choice of every decision, in the order of the fields."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Choice):
                yield field.name, value

    @property
    def autocast(self) -> bool:
        """Whether the forward pass is autocast: full fine-tuning keeps fp32 weights, fp16 needs loss scaling."""
        return self.precision.value == "fp16" or (self.method.value == "full" and self.precision.value == "bf16")

    def to_json(self) -> dict[str, Any]:
        """The document of ``plan --json`` and ``plan.json``."""
        return {
            "choices": {name: choice.to_json() for name, choice in self.choices()},
            "memory": self.memory.to_json(),
            "time": self.time.to_json(),
            "disk_bytes": self.disk_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "download": None if self.download is None else self.download.to_json(),
            "fits": self.fits,
            "closest": [near.to_json() for near in self.closest],
            "notices": list(self.notices),
            "measured": None if self.measured is None else self.measured.to_json(),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_json``."""
        choices: dict[str, Any] = {name: Choice.from_json(c) for name, c in document["choices"].items()}
        return cls(
            **(_before(choices) | choices),
            memory=MemoryEstimate.from_json(document["memory"]),
            time=TimeEstimate.from_json(document["time"]),
            disk_bytes=document["disk_bytes"],
            disk_free_bytes=document["disk_free_bytes"],
            fits=document["fits"],
            closest=tuple(Alternative.from_json(near) for near in document["closest"]),
            notices=tuple(document["notices"]),
            measured=Measurement.from_json(found) if (found := document.get("measured")) else None,
            download=Download(**wanted) if (wanted := document.get("download")) else None,
        )

    def require_fit(self) -> None:
        """Refuse a plan that this machine cannot carry out.

        Raises:
            PlanError: Memory or disk are short; names the terms and the nearest plans that do fit, as ready flags.
        """
        memory = self.memory
        if not self.fits:
            near = "; ".join(str(near) for near in self.closest)
            ways_out = (
                f"Closest that fit: {near}" if near else "Nothing near it fits; name a smaller model with --model"
            )
            raise PlanError(
                f"needs {format_bytes(memory.peak_bytes)}, {format_bytes(memory.free_bytes)} are free on "
                f"{memory.device} ({self._terms()}). {ways_out}."
            )
        if self.disk_bytes > self.disk_free_bytes:
            raise PlanError(
                f"needs {format_bytes(self.disk_bytes)} of disk for {self.keep_checkpoints.value} checkpoints and the "
                f"result, {format_bytes(self.disk_free_bytes)} are free. Free some, choose another disk with --output, "
                "or pass --set save.keep=2."
            )

    def download_shortage(self) -> str | None:
        """Return the message about a disk that cannot hold the weights; None where it can.

        Checkpoints and result count too where they go to the same disk. `plan` warns, `train` refuses to start.
        """
        wanted = self.download
        if wanted is None or wanted.free_bytes is None:
            return None
        needed = wanted.bytes + (self.disk_bytes if wanted.shares_disk else 0)
        if needed <= wanted.free_bytes:
            return None
        beside = f" and {format_bytes(self.disk_bytes)} of checkpoints and result" if wanted.shares_disk else ""
        return (
            f"{format_bytes(wanted.bytes)} of weights{beside} do not fit on the disk of {wanted.directory}: "
            f"{format_bytes(wanted.free_bytes)} are free. Free some (hf cache prune), or put the cache on another disk "
            "with HF_HOME=DIR"
        )

    def require_room_to_download(self) -> None:
        """Refuse a run whose weights would fill the disk.

        Raises:
            PlanError: See `download_shortage`; as for memory, this machine cannot carry out the plan.
        """
        if (shortage := self.download_shortage()) is not None:
            raise PlanError(f"{shortage}.")

    def _terms(self) -> str:
        terms = sorted(self.memory.terms.items(), key=lambda term: -term[1])
        return ", ".join(f"{name} {format_bytes(size)}" for name, size in terms if size)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The plan as table rows: choice, value, source, reason with what would change it."""
        return [(name.replace("_", " "), _shown(c.value), c.source, _why(c)) for name, c in self.choices()]

    def summary(self) -> str:
        """Memory and time in one sentence."""
        memory = self.memory
        return (
            f"Memory: {format_bytes(memory.peak_bytes)} of {format_bytes(memory.free_bytes)} free on {memory.device} "
            f"({self._terms()}). "
            f"Time: about {format_seconds(self.time.total_seconds)} for {self.updates.value} updates."
        )

    def __str__(self) -> str:
        """The plan as an aligned table, with memory and time below it."""
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:3], widths, strict=True)), row[3]]) for row in rows]
        return "\n".join([*lines, "", self.summary(), *self.notices])


def _before(choices: Mapping[str, Choice[Any]]) -> dict[str, Choice[Any]]:
    """How runs went whose plans were written before these were part of a plan: a resumed run goes on as it began."""
    recomputes = choices["activation_checkpointing"].value
    age = "plans of this age"
    return {
        "packing": Choice(False, f"{age} pad rows", "default"),
        "pad_multiple": Choice(8, f"{age} pad rows to multiples of eight", "default"),
        "pass_overhead_tokens": Choice(None, f"{age} take the fewest passes", "default"),
        "sharding": Choice(None, f"{age} do not say", "default"),
        "checkpoint_every": Choice(int(recomputes), f"{age} recompute every layer or none", "default"),
        "activation_offload": Choice(False, f"{age} do not offload", "default"),
        "compile": Choice(False, f"{age} do not compile", "default"),
        "optimizer_arguments": Choice({}, f"{age} take those of transformers", "default"),
        "schedule_arguments": Choice({}, f"{age} take those of transformers", "default"),
        "pin_memory": Choice(choices["device"].value.startswith("cuda"), f"{age} pin for CUDA", "default"),
    }


def _why(choice: Choice[Any]) -> str:
    return f"{choice.reason} · changes: {choice.changes}" if choice.changes else choice.reason


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return ", ".join(str(part) for part in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown_argument(part)}" for name, part in value.items()) or "none"
    return str(value)


def _shown_argument(value: Any) -> str:
    return f"({', '.join(f'{part:g}' for part in value)})" if isinstance(value, tuple | list) else _shown(value)
