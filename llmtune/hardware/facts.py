"""What a machine is, as frozen facts that can be written to JSON and read back on another machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt, MinLen

from llmtune.errors import ConfigError, did_you_mean
from llmtune.units import format_bytes

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

NonNegative = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Le(1)]
Rate = Annotated[float, Gt(0), Lt(math.inf)]  # what is measured is above zero and finite

# What torch calls the numbers of a precision; products of TF32 are of fp32 numbers.
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "tf32": "float32", "fp32": "float32"}

_STRICT = {"extra": "forbid", "strict": True}  # read by pydantic: no unknown keys, no "12" for 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One GPU or similar device; ``index`` is what torch calls it (``cuda:<index>``, ROCm included).

    ``free_bytes`` is what was free when it was looked at. ``compute_capability`` is NVIDIA's, None elsewhere.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    index: NonNegative
    name: str
    kind: Literal["cuda", "rocm", "mps", "xpu"]
    total_bytes: NonNegative
    free_bytes: NonNegative
    compute_capability: tuple[int, int] | None
    bf16: bool
    fp16: bool
    tf32: bool

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those it computes in hardware; fp32 comes last."""
        return (*(name for name in ("bf16", "fp16", "tf32") if getattr(self, name)), "fp32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processor. ``usable_cores`` counts logical CPUs that affinity and the cgroup quota leave to this process.

    ``amx`` and ``avx512_bf16`` say whether bf16 matrix products run in hardware.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    model: str
    physical_cores: Positive
    usable_cores: Positive
    amx: bool
    avx512_bf16: bool

    @property
    def vector_bf16(self) -> bool:
        """Whether bf16 products run in vector registers, for want of AMX."""
        return self.avx512_bf16 and not self.amx


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a device was measured to do with this many CPU threads.

    Attributes:
        matmul: Precision -> FLOP/s of matrix products.
        memory_bytes_per_second: Read and written by operations on numbers that are in use: in a CPU's caches, in an
            accelerator's memory.
        fresh_bytes_per_second: The same for large tensors, whose memory the system of a CPU hands out anew each time.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    threads: Positive
    matmul: Mapping[str, Rate]
    memory_bytes_per_second: Rate
    fresh_bytes_per_second: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What this machine was measured to do.

    Attributes:
        device: What was measured: the name of the CPU or of the accelerator.
        speeds: With one CPU thread and with all usable ones, in that order; one entry for an accelerator.
        op_seconds: To launch one small operation.
        disk_write_bytes_per_second: Written and synchronised to the disk of runs; None where nothing could be written.
        busy_share: Share of the usable cores that other programs took meanwhile; the rates are low by about as much.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    device: str
    speeds: Annotated[tuple[Speed, ...], MinLen(1)]
    op_seconds: Rate
    disk_write_bytes_per_second: Rate | None
    busy_share: Share

    @property
    def best(self) -> Speed:
        """With all threads."""
        return self.speeds[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """What the machine is, at one moment.

    ``cgroup_limit_bytes`` is the memory limit that binds first, None without one; ``cgroup_used_bytes`` is what counts
    against it already, less the file cache that the kernel gives back under pressure. ``rates`` is None
    where nothing was measured. ``can_compile``: what ``torch.compile`` calls is there. ``heap_leaves_holes``: see
    `llmtune.heap`; of the process that looked.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    accelerators: tuple[Accelerator, ...]
    cpu: Cpu
    ram_total_bytes: NonNegative
    ram_available_bytes: NonNegative
    cgroup_limit_bytes: NonNegative | None
    cgroup_used_bytes: NonNegative | None
    disk_free_bytes: NonNegative
    platform: str
    rates: Rates | None = None
    can_compile: bool = False
    heap_leaves_holes: bool = False

    @property
    def usable_ram_bytes(self) -> int:
        """Bytes of RAM this process may still take: available RAM, or what the cgroup leaves if that is less."""
        if self.cgroup_limit_bytes is None:
            return self.ram_available_bytes
        left = max(0, self.cgroup_limit_bytes - (self.cgroup_used_bytes or 0))
        return min(self.ram_available_bytes, left)

    @property
    def precision_support(self) -> tuple[str, ...]:
        """Precisions that run in hardware on every accelerator (on the CPU where there is none); fp32 comes last."""
        if self.accelerators:
            first, *others = (accelerator.precisions for accelerator in self.accelerators)
            return tuple(name for name in first if all(name in other for other in others))
        return ("bf16", "fp32") if self.cpu.amx or self.cpu.avx512_bf16 else ("fp32",)

    def describe(self) -> str:
        """One line for people: ``2 cores Intel Xeon (AMX), 23.5 GiB RAM, no accelerator``."""
        cores = min(self.cpu.physical_cores, self.cpu.usable_cores)
        model = re.sub(r"\((R|TM|r|tm)\)|\b(CPU|Processor)\b|@.*$", "", self.cpu.model)
        model = " ".join(model.split()) or "CPU"
        matrix = " (AMX)" if self.cpu.amx else " (AVX512-BF16)" if self.cpu.avx512_bf16 else ""
        ram = f"{format_bytes(self.ram_total_bytes)} RAM"
        if self.cgroup_limit_bytes is not None and self.cgroup_limit_bytes < self.ram_total_bytes:
            ram = f"{format_bytes(self.cgroup_limit_bytes)} of {ram} (cgroup limit)"
        parts = [f"{cores} core{'s' * (cores != 1)} {model}{matrix}", ram]
        if not self.accelerators:
            parts.append("no accelerator")
        seen = [f"{a.name} {format_bytes(a.total_bytes)}" for a in self.accelerators]
        for text in dict.fromkeys(seen):
            parts.append(f"{seen.count(text)} x {text}" if seen.count(text) > 1 else text)
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON document; the inverse of `from_json`."""
        document: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], *, where: str = "hardware") -> Hardware:
        """Read the document of `to_json`, or that of ``llmtune doctor --json``, which holds it under ``hardware``.

        Args:
            document: The parsed JSON.
            where: Named in the error; a file name for instance.

        Raises:
            ConfigError: Lists every missing, unknown or unusable key at once.
        """
        from pydantic import TypeAdapter, ValidationError

        if isinstance(document, Mapping) and isinstance(document.get("hardware"), Mapping):
            document = document["hardware"]
        # Strict JSON mode takes a list for a tuple, which strict Python mode does not.
        text = json.dumps(dict(document) if isinstance(document, Mapping) else document, default=repr)
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise ConfigError(where, [_sentence(detail) for detail in error.errors()]) from None

    @classmethod
    def from_file(cls, path: Path | str) -> Hardware:
        """Read a JSON file that ``llmtune doctor --json`` wrote on the machine to plan for.

        Raises:
            ConfigError: The file cannot be read, is no JSON, or holds other keys or values.
        """
        mend = "expected the output of 'llmtune doctor --json' on the machine to plan for"
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(str(path), [f"cannot be read ({error.strerror}); {mend}"]) from None
        except ValueError as error:  # no UTF-8, or no JSON
            raise ConfigError(str(path), [f"is no JSON ({error}); {mend}"]) from None
        return cls.from_json(document, where=str(path))


# Which class a key belongs to, by a part of its path; the innermost first.
_OWNERS: tuple[tuple[str, type], ...] = (
    ("speeds", Speed),
    ("rates", Rates),
    ("accelerators", Accelerator),
    ("cpu", Cpu),
)


def _sentence(detail: ErrorDetails) -> str:
    """One problem that pydantic found, in our words."""
    place = detail["loc"]
    key = ".".join(map(str, place)) or "the document"
    if detail["type"] == "unexpected_keyword_argument":
        owner = next((kind for part, kind in _OWNERS if part in place[:-1]), Hardware)
        return f"{key}: unknown key{did_you_mean(str(place[-1]), [field.name for field in fields(owner)])}"
    expected = detail["msg"].removeprefix("Input should be ").removeprefix("an object ")
    if detail["type"] == "missing":
        return f"{key}: missing (see 'llmtune doctor --json')"
    return f"{key}: got {json.dumps(detail['input'])[:60]}, expected {expected}"
