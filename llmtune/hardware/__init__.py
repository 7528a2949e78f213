"""Facts about the machine: what it has, which device a run takes, what is usable, how to launch on it."""

from __future__ import annotations

from llmtune.hardware.accelerate_configs import accelerate_config_names, accelerate_config_path, launch_shortfall
from llmtune.hardware.detection import detect
from llmtune.hardware.device import DeviceChoice, choose_device
from llmtune.hardware.doctor import Diagnosis, Problem, diagnose
from llmtune.hardware.facts import Accelerator, Cpu, Hardware
from llmtune.hardware.probes import Usable
from llmtune.hardware.processes import follow_parent
from llmtune.hardware.threads import yield_cores

__all__ = [
    "Accelerator",
    "Cpu",
    "DeviceChoice",
    "Diagnosis",
    "Hardware",
    "Problem",
    "Usable",
    "accelerate_config_names",
    "accelerate_config_path",
    "choose_device",
    "detect",
    "diagnose",
    "follow_parent",
    "launch_shortfall",
    "yield_cores",
]
