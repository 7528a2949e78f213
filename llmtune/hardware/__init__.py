"""Facts about the machine: what it has, which device a run takes, what is usable, how to launch on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.hardware.accelerate_configs import (
    accelerate_config_names,
    accelerate_config_path,
    launch_sharding,
    launch_shortfall,
)
from llmtune.hardware.datasheet import nominal_rates
from llmtune.hardware.detection import detect
from llmtune.hardware.device import DeviceChoice, choose_device
from llmtune.hardware.facts import DTYPES, Accelerator, Cpu, Hardware, Rates, Speed
from llmtune.hardware.processes import follow_parent, undisturbed
from llmtune.hardware.rates import cached_rates, measure_rates, note_rates, with_rates
from llmtune.hardware.tensor_float import tf32_products
from llmtune.hardware.threads import yield_cores

if TYPE_CHECKING:
    from llmtune.hardware.doctor import Diagnosis, Problem, diagnose
    from llmtune.hardware.probes import Usable

__all__ = [
    "DTYPES",
    "Accelerator",
    "Cpu",
    "DeviceChoice",
    "Diagnosis",
    "Hardware",
    "Problem",
    "Rates",
    "Speed",
    "Usable",
    "accelerate_config_names",
    "accelerate_config_path",
    "cached_rates",
    "choose_device",
    "detect",
    "diagnose",
    "follow_parent",
    "launch_sharding",
    "launch_shortfall",
    "measure_rates",
    "nominal_rates",
    "note_rates",
    "tf32_products",
    "undisturbed",
    "with_rates",
    "yield_cores",
]


def __getattr__(name: str) -> object:
    if name in ("Diagnosis", "Problem", "Usable", "diagnose"):  # for doctor alone
        from llmtune.hardware import doctor

        return getattr(doctor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
