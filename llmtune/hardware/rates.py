"""Measures how fast this machine multiplies matrices, moves numbers and writes to disk; takes about a second.

The best of a few tries counts: it is what the machine can do, and other programs can only take away from it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.hardware.detection import existing_parent
from llmtune.hardware.device import DeviceChoice
from llmtune.hardware.facts import DTYPES, Hardware, Rates, Speed
from llmtune.hardware.tensor_float import tf32_products

if TYPE_CHECKING:
    import torch

CACHE_FILE = "rates.json"
_FORMAT = 2

# Widths of square weights and rows of input. CPU: those of models that are trained there. Accelerators: large enough
# that a launch of 10 microseconds does not count.
_SHAPES = {"cpu": ((512, 512), (512, 1024), (256, 2048)), "accelerator": ((8192, 4096), (8192, 8192))}
# fp32 numbers of a tensor that stays in a CPU's caches, and of one that the system has to hand out new each time.
_KEPT_NUMBERS, _FRESH_NUMBERS = 2**20, 2**23
_ACCELERATOR_NUMBERS = 2**27
_FEWEST_TRIES, _TRY_SECONDS = 3, 0.04
# From here on a measurement says more about other programs than about the machine.
BUSY_SHARE = 0.25
_NOTEWORTHY = 0.1  # differences in the share of busy cores below this are the clock's own
_DISK_BYTES, _DISK_BLOCK, _DISK_SECONDS = 64 * 2**20, 16 * 2**20, 1.0


def with_rates(hardware: Hardware, device: DeviceChoice, cache: Path, *, disk_path: Path | str = ".") -> Hardware:
    """``hardware`` with the rates of ``device``: those it has, those noted in ``cache``, else measured now and noted.

    What was noted while other programs took much of the machine is measured again; the less disturbed one stays.

    Args:
        hardware: This machine.
        device: What will train.
        cache: Folder of rebuildable things.
        disk_path: Where the run will write.
    """
    if hardware.rates is not None and hardware.rates.device == device.name:
        return hardware
    rates = cached_rates(hardware, device, cache)
    if rates is None or rates.busy_share > BUSY_SHARE:
        measured = measure_rates(hardware, device, disk_path=disk_path)
        note_rates(hardware, device, measured, cache)
        rates = measured if rates is None or measured.busy_share < rates.busy_share else rates
    return replace(hardware, rates=rates)


def cached_rates(hardware: Hardware, device: DeviceChoice, cache: Path) -> Rates | None:
    """What was measured on this very machine with this torch, read without torch; None where nothing was."""
    from pydantic import TypeAdapter, ValidationError

    found = _noted(cache / CACHE_FILE).get(_signature(hardware, device))
    try:
        return TypeAdapter(Rates).validate_json(json.dumps(found))
    except ValidationError:
        return None


def note_rates(hardware: Hardware, device: DeviceChoice, rates: Rates, cache: Path) -> None:
    """Keep what was measured for later plans, unless an earlier measurement was disturbed less by other programs.

    Where the folder cannot be written, later plans measure again.
    """
    earlier = cached_rates(hardware, device, cache)
    if earlier is not None and earlier.busy_share < rates.busy_share - _NOTEWORTHY:
        return
    file = cache / CACHE_FILE
    noted = _noted(file) | {_signature(hardware, device): asdict(rates)}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{CACHE_FILE}-", dir=cache)
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"format_version": _FORMAT, "rates": noted}, out, indent=1, sort_keys=True)
        os.replace(name, file)
    except OSError:
        return


def _noted(file: Path) -> dict[str, Any]:
    """Measurements by signature; none where the file is missing, damaged or of another version."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(document, dict) or document.get("format_version") != _FORMAT:
        return {}
    rates = document.get("rates")
    return rates if isinstance(rates, dict) else {}


def _signature(hardware: Hardware, device: DeviceChoice) -> str:
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "none"
    names = [accelerator.name for accelerator in hardware.accelerators]
    return json.dumps([device.name, hardware.cpu.model, hardware.cpu.usable_cores, names, torch_version])


def measure_rates(hardware: Hardware, device: DeviceChoice, *, disk_path: Path | str = ".") -> Rates:
    """Measure ``device``: each precision it has in hardware, on a CPU with one thread and with all usable ones.

    Args:
        hardware: This machine.
        device: What will train.
        disk_path: Where runs will be written; a temporary file is written beside it and removed.
    """
    import torch  # noqa: F401  before the clock starts

    before, started = _busy_seconds(), time.perf_counter()
    if device.type == "cpu":
        speeds = _more_threads_are_no_slower([_cpu_speed(hardware, n) for n in sorted({1, hardware.cpu.usable_cores})])
    else:
        speeds = (_accelerator_speed(hardware, device),)
    op_seconds, busy, seconds = _op_seconds(device), _busy_seconds(), time.perf_counter() - started
    return Rates(
        device=device.name,
        speeds=speeds,
        op_seconds=op_seconds,
        disk_write_bytes_per_second=disk_write_rate(disk_path),
        busy_share=_share_taken((busy - before) / seconds, hardware.cpu.usable_cores),
    )


def _busy_seconds() -> float:
    """CPU time that all other programs of the machine have used so far."""
    import psutil

    all_cores = psutil.cpu_times()
    idle = all_cores.idle + getattr(all_cores, "iowait", 0.0)
    # User time holds that of guests already (Linux, proc(5)).
    doubled = getattr(all_cores, "guest", 0.0) + getattr(all_cores, "guest_nice", 0.0)
    return float(sum(all_cores) - idle - doubled) - time.process_time()


def _share_taken(others: float, usable: int) -> float:
    """Share of the usable cores that is missing when other programs keep ``others`` cores busy."""
    missing = usable - max(0.0, (os.cpu_count() or usable) - others)
    return min(1.0, max(0.0, missing / usable))


def _more_threads_are_no_slower(speeds: Sequence[Speed]) -> tuple[Speed, ...]:
    """Each speed at least that with fewer threads; where it was measured below, other programs had the cores."""
    found = [speeds[0]]
    for speed in speeds[1:]:
        fewer = found[-1]
        found.append(
            replace(
                speed,
                matmul={name: max(rate, fewer.matmul[name]) for name, rate in speed.matmul.items()},
                memory_bytes_per_second=max(speed.memory_bytes_per_second, fewer.memory_bytes_per_second),
                fresh_bytes_per_second=max(speed.fresh_bytes_per_second, fewer.fresh_bytes_per_second),
            )
        )
    return tuple(found)


def _cpu_speed(hardware: Hardware, threads: int) -> Speed:
    precisions = ["bf16", "fp32"] if hardware.cpu.amx or hardware.cpu.avx512_bf16 else ["fp32"]
    with _threads(threads):
        return Speed(
            threads=threads,
            matmul={name: _matmul_rate(name, "cpu", _SHAPES["cpu"]) for name in precisions},
            memory_bytes_per_second=_memory_rate(_KEPT_NUMBERS, "cpu"),
            fresh_bytes_per_second=_memory_rate(_FRESH_NUMBERS, "cpu"),
        )


def _accelerator_speed(hardware: Hardware, device: DeviceChoice) -> Speed:
    facts = next(a for a in hardware.accelerators if a.index == device.index)
    memory = _memory_rate(_ACCELERATOR_NUMBERS, str(device))
    return Speed(
        threads=1,
        matmul={name: _matmul_rate(name, str(device), _SHAPES["accelerator"]) for name in facts.precisions},
        memory_bytes_per_second=memory,
        fresh_bytes_per_second=memory,  # torch keeps freed memory and hands it out again
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _matmul_rate(precision: str, device: str, shapes: tuple[tuple[int, int], ...]) -> float:
    """FLOP/s over several shapes of ``[rows, width] x [width, width]``, each weighted by its arithmetic."""
    import torch

    dtype = getattr(torch, DTYPES[precision])
    flops = seconds = 0.0
    with tf32_products(precision == "tf32"):
        for rows, width in shapes:
            values = torch.rand(rows, width, device=device).to(dtype)
            weights = torch.rand(width, width, device=device).to(dtype)
            flops += 2 * rows * width * width
            seconds += _best_seconds(partial(torch.nn.functional.linear, values, weights), device)
    return flops / seconds


def _memory_rate(numbers: int, device: str) -> float:
    """Bytes per second of a product of two fp32 tensors: two are read, one is written."""
    import torch

    values = torch.ones(numbers, device=device)
    return 12 * numbers / _best_seconds(lambda: values * values, device)


def _op_seconds(device: DeviceChoice) -> float:
    """Seconds that one small operation takes to be launched."""
    import torch

    value = torch.ones(8, device=str(device))
    count = 500

    def launch() -> None:
        for _ in range(count):
            value + value

    return _best_seconds(launch, str(device)) / count


def _best_seconds(work: Callable[[], torch.Tensor | None], device: str) -> float:
    work()  # the first call compiles kernels and wakes the device
    _wait(device)
    best, tries, begun = float("inf"), 0, time.perf_counter()
    while tries < _FEWEST_TRIES or time.perf_counter() - begun < _TRY_SECONDS:
        started = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - started)
        tries += 1
    return best


def _wait(device: str) -> None:
    """Until the device has done what it was given; a CPU has done it already."""
    import torch

    if device != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def disk_write_rate(path: Path | str) -> float | None:
    """Bytes per second written to the disk of ``path`` and synchronised; None where nothing can be written.

    Writes 64 MiB, or less where that would take more than a second, to a temporary file that is removed.
    """
    block = os.urandom(_DISK_BLOCK)  # a disk that compresses would be too fast with zeros
    try:
        with tempfile.TemporaryFile(dir=existing_parent(path)) as file:
            written, started = 0, time.perf_counter()
            while written < _DISK_BYTES and time.perf_counter() - started < _DISK_SECONDS:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
                written += len(block)
            return written / (time.perf_counter() - started)
    except OSError:
        return None
