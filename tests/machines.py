"""Described machines, data and models, and the requests and plans they make; for tests of the planner."""

from __future__ import annotations

import pytest

from llmtune.config import load_config
from llmtune.data import DataStats
from llmtune.errors import ConfigError, PlanError
from llmtune.hardware import Accelerator, Cpu, Hardware, choose_device
from llmtune.models import spec_from_entry
from llmtune.planning import Choice, Plan, PlanRequest, make_plan
from llmtune.presets import Preset, find_entry
from llmtune.units import GIB

CPU = Cpu(model="Xeon", physical_cores=2, usable_cores=2, amx=True, avx512_bf16=True)
LAPTOP_CPU = Cpu(model="i7", physical_cores=8, usable_cores=16, amx=False, avx512_bf16=False)
SEVEN_B = "mistralai/Mistral-7B-v0.1"


def gpu(name: str, memory: float, *, bf16: bool = True, index: int = 0) -> Accelerator:
    return Accelerator(
        index=index,
        name=name,
        kind="cuda",
        total_bytes=int(memory * GIB),
        free_bytes=int(memory * GIB),
        compute_capability=(9, 0) if bf16 else (7, 5),
        bf16=bf16,
        fp16=True,
        tf32=bf16,
    )


def machine(*accelerators: Accelerator, ram: float = 16, cpu: Cpu = CPU) -> Hardware:
    return Hardware(
        accelerators=accelerators,
        cpu=cpu,
        ram_total_bytes=int(ram * GIB),
        ram_available_bytes=int(ram * GIB),
        cgroup_limit_bytes=None,
        cgroup_used_bytes=None,
        disk_free_bytes=100 * GIB,
        platform="Linux",
        can_compile=True,
    )


H200 = machine(gpu("NVIDIA H200", 139), ram=128)
LAPTOP = machine(gpu("NVIDIA GeForce RTX 3090", 24), ram=32, cpu=LAPTOP_CPU)
T4 = machine(gpu("Tesla T4", 15, bf16=False), ram=13, cpu=LAPTOP_CPU)


def stats(rows: int = 2000, *, mean: int = 120, longest: int = 400, estimated: bool = False) -> DataStats:
    return DataStats(
        rows=rows,
        tokens=rows * mean,
        supervised_tokens=rows * mean // 2,
        length_p50=mean,
        length_p95=min(2 * mean, longest),
        length_p99=min(3 * mean, longest),
        length_max=longest,
        estimated=estimated,
    )


def request_for(
    model: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    *,
    hardware: Hardware = H200,
    data: DataStats | None = None,
    processes: int = 1,
    eval_rows: int = 200,
    **asked,
) -> PlanRequest:
    config = load_config(asked, environ={})
    entry = find_entry(model)
    return PlanRequest(
        config=config,
        hardware=hardware,
        device=choose_device(hardware, config.train.device),
        spec=spec_from_entry(entry),
        preset=Preset.load(entry.family),
        stats=data or stats(),
        eval_rows=eval_rows,
        processes=processes,
        model_choice=Choice(entry.id, "you set model.id", "user"),
    )


def planned(*args, **kwargs) -> Plan:
    return make_plan(request_for(*args, **kwargs))


def caught_problems(request: PlanRequest) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        make_plan(request)
    return caught.value.problems


def problems(**kwargs) -> tuple[str, ...]:
    return caught_problems(request_for(**kwargs))


def refused(plan: Plan) -> str:
    with pytest.raises(PlanError) as caught:
        plan.require_fit()
    return str(caught.value)
