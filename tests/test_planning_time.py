"""The prediction of time: its laws, and whose rates it rests on. No test measures seconds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.hardware import Accelerator, Cpu, Hardware, Rates, Speed, choose_device, nominal_rates
from llmtune.models import spec_from_entry
from llmtune.planning import Footprint, TimeEstimate
from llmtune.planning.passes import ACCELERATOR, AMX_CPU, VECTOR_CPU, costs_of
from llmtune.planning.timing import RANGE, Workload, predict_time
from llmtune.presets import find_entry
from llmtune.units import GIB

CPU = Cpu(model="Xeon", physical_cores=2, usable_cores=2, amx=True, avx512_bf16=True)
SPEC = spec_from_entry(find_entry("Qwen/Qwen2.5-0.5B-Instruct"))
FOOTPRINT = Footprint(
    method="lora",
    quantization=None,
    precision="bf16",
    rank=16,
    targets=("all-linear",),
    dropout=0.0,
    tokens=1024,
    width=256,
    packed=False,
    checkpoint_every=0,
    offload=False,
    optimizer="adamw_torch_fused",
    sharding=None,
    processes=1,
)
WORKLOAD = Workload(
    tokens_per_update=4096.0,
    length=256.0,
    scored=1.0,
    micro_batches=4.0,
    updates=100,
    evaluated_tokens=20_000.0,
    evaluation_passes=20.0,
    saves=4,
    save_bytes=100_000_000,
    result_bytes=30_000_000,
    generated_tokens=128.0,
)


def machine(*gpus: str, rates: Rates | None = None, cpu: Cpu = CPU) -> Hardware:
    accelerators = tuple(
        Accelerator(
            index=index,
            name=name,
            kind="cuda",
            total_bytes=24 * GIB,
            free_bytes=24 * GIB,
            compute_capability=(8, 9),
            bf16=True,
            fp16=True,
            tf32=True,
        )
        for index, name in enumerate(gpus)
    )
    return Hardware(
        accelerators=accelerators,
        cpu=cpu,
        ram_total_bytes=24 * GIB,
        ram_available_bytes=20 * GIB,
        cgroup_limit_bytes=None,
        cgroup_used_bytes=None,
        disk_free_bytes=100 * GIB,
        platform="linux-x86_64",
        rates=rates,
    )


def speed(threads: int, factor: float = 1.0) -> Speed:
    return Speed(
        threads=threads,
        matmul={"bf16": 1e12 * factor, "fp32": 1.6e11 * factor},
        memory_bytes_per_second=4e10 * factor,
        fresh_bytes_per_second=7e9 * factor,
    )


def measured(device: str = "Xeon", factor: float = 1.0) -> Rates:
    return Rates(
        device=device,
        speeds=(speed(1, factor), speed(2, 1.8 * factor)),
        op_seconds=1e-6 / factor,
        disk_write_bytes_per_second=3e8,
        busy_share=0.0,
    )


def predicted(
    hardware: Hardware | None = None, *, spec: Any = SPEC, processes: int = 1, **changes: Any
) -> TimeEstimate:
    """The prediction with ``changes`` to footprint or workload, or the named arguments of ``predict_time``."""
    hardware = machine(rates=measured()) if hardware is None else hardware
    own = {name: changes.pop(name) for name in ("correction", "measured") if name in changes}
    workload = {name: changes.pop(name) for name in tuple(changes) if name in Workload.__dataclass_fields__}
    footprint = replace(FOOTPRINT, **changes)
    trained = spec.parameters
    if footprint.method != "full":
        trained = spec.adapter_parameters(footprint.rank, footprint.targets)
    return predict_time(
        spec,
        footprint,
        replace(WORKLOAD, **workload),
        trainable_parameters=trained,
        hardware=hardware,
        device=choose_device(hardware),
        processes=processes,
        **own,
    )


# --- laws -------------------------------------------------------------------------------------------------------------

MACHINES = (machine(), machine(rates=measured()), machine("NVIDIA L4"), machine("something new"))


@settings(max_examples=60, deadline=None)
@given(
    hardware=st.sampled_from(MACHINES),
    method=st.sampled_from(["lora", "qlora", "full"]),
    precision=st.sampled_from(["bf16", "fp16", "tf32", "fp32"]),
    checkpoint_every=st.integers(0, 4),
    tokens=st.floats(8, 1e6),
    passes=st.floats(1, 64),
    updates=st.integers(1, 10_000),
    saves=st.integers(0, 50),
    processes=st.integers(1, 4),
    measured=st.booleans(),
)
def test_terms_add_up_and_the_total_lies_in_its_range(
    hardware: Hardware, method: str, tokens: float, passes: float, **changes: Any
) -> None:
    quantization = "nf4" if method == "qlora" else None
    found = predicted(
        hardware, method=method, quantization=quantization, tokens_per_update=tokens, micro_batches=passes, **changes
    )
    assert math.isclose(sum(found.terms.values()), found.total_seconds)
    assert 0 < found.low_seconds <= found.total_seconds <= found.high_seconds < math.inf
    assert all(seconds > 0 for seconds in found.terms.values())
    assert math.isclose(found.terms["training"], found.step_seconds * changes["updates"])
    assert TimeEstimate.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize("hardware", MACHINES, ids=["cpu", "cpu measured", "L4", "unknown"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_more_work_never_takes_less_time(hardware: Hardware, method: str) -> None:
    few = predicted(hardware, method=method)
    for more in (
        {"tokens_per_update": 5000.0},
        {"length": 2048.0},
        {"micro_batches": 8.0},
        {"updates": 101},
        {"evaluated_tokens": 40_000.0},
        {"saves": 5},
        {"save_bytes": 200_000_000},
        {"result_bytes": 60_000_000},
        {"generated_tokens": 256.0},
        {"checkpoint_every": 1},
        {"precision": "fp32"},
        {"spec": replace(SPEC, shape=replace(SPEC.shape, layers=30))},
        {"spec": replace(SPEC, shape=replace(SPEC.shape, vocabulary=200_000))},
    ):
        assert predicted(hardware, **{"method": method} | more).total_seconds >= few.total_seconds, more


def test_what_an_adapter_adds_costs_time() -> None:
    plain = predicted().step_seconds
    assert predicted(targets=("q_proj", "v_proj")).step_seconds < plain
    assert predicted(rank=64).step_seconds > plain
    assert predicted(dropout=0.05).step_seconds > plain
    assert predicted(method="qlora", quantization="nf4").step_seconds > plain
    assert predicted(method="full").step_seconds < plain * 2


def test_recomputing_every_second_layer_costs_half_of_recomputing_all() -> None:
    none, half, every = (predicted(checkpoint_every=n).step_seconds for n in (0, 2, 1))
    assert math.isclose(half - none, (every - none) / 2, rel_tol=1e-6)


def test_a_small_model_reaches_far_less_of_the_machine_than_a_large_one() -> None:
    """Per unit of arithmetic; what is not arithmetic weighs more the narrower the matrices are."""
    large = spec_from_entry(find_entry("mistralai/Mistral-7B-v0.1"))
    tiny = spec_from_entry(find_entry("builtin:tiny"))
    per_flop = [
        predicted(spec=spec).step_seconds / (spec.block_parameters + spec.head_parameters) for spec in (tiny, large)
    ]
    assert per_flop[0] > 3 * per_flop[1]


# --- whose rates ------------------------------------------------------------------------------------------------------


def test_measured_rates_replace_those_of_data_sheets() -> None:
    assert predicted(machine()).basis == "nominal"
    slow, fast = (predicted(machine(rates=measured(factor=factor))) for factor in (0.5, 1.0))
    assert (slow.basis, fast.basis) == ("calibrated", "calibrated")
    assert math.isclose(slow.step_seconds, 2 * fast.step_seconds)


def test_rates_of_another_device_do_not_count() -> None:
    """A machine whose GPU was measured is asked for a plan on the CPU, and the other way round."""
    with_gpu = machine("NVIDIA L4", rates=measured("Xeon"))
    assert predicted(with_gpu) == predicted(machine("NVIDIA L4"))
    assert predicted(machine(rates=measured("NVIDIA L4"))) == predicted(machine())


def test_the_rates_in_a_doctors_document_are_those_of_the_plan() -> None:
    there = machine(rates=measured(factor=0.25))
    document = json.loads(json.dumps({"hardware": there.to_json(), "versions": {}, "usable": {}, "problems": []}))
    assert predicted(Hardware.from_json(document)) == predicted(there)
    assert predicted(Hardware.from_json(document)).total_seconds > predicted().total_seconds


def test_measured_and_nominal_rates_of_the_same_numbers_predict_the_same() -> None:
    hardware = machine()
    nominal = nominal_rates(hardware, choose_device(hardware))
    assert predicted(replace(hardware, rates=nominal)).total_seconds == predicted(hardware).total_seconds


def test_threads_and_processes_share_the_cores() -> None:
    two, one = predicted().step_seconds, predicted(threads=1).step_seconds
    assert math.isclose(one, 1.8 * two, rel_tol=0.05)
    alone, beside = predicted(threads=1), predicted(threads=1, processes=2)
    assert beside.step_seconds > alone.step_seconds


def test_sharded_weights_travel_between_ranks() -> None:
    hardware = machine("NVIDIA L4", "NVIDIA L4")
    copied = predicted(hardware, processes=2)
    sharded = predicted(hardware, processes=2, sharding="fsdp2")
    assert predicted(hardware).step_seconds < copied.step_seconds < sharded.step_seconds


def test_a_correction_multiplies_the_steps_and_not_the_saves() -> None:
    plain, corrected = predicted(), predicted(correction=2.0)
    assert math.isclose(corrected.step_seconds, 2 * plain.step_seconds)
    assert math.isclose(corrected.terms["evaluation"], 2 * plain.terms["evaluation"])
    assert corrected.terms["saving"] == plain.terms["saving"]
    assert corrected.basis == plain.basis == "calibrated"


def test_the_better_the_basis_the_narrower_the_range() -> None:
    nominal, calibrated, own = predicted(machine()), predicted(), predicted(correction=1.3, measured=True)
    assert [e.basis for e in (nominal, calibrated, own)] == ["nominal", "calibrated", "measured"]
    widths = [e.high_seconds / e.low_seconds for e in (nominal, calibrated, own)]
    assert widths == sorted(widths, reverse=True)
    assert set(RANGE) == {"nominal", "calibrated", "measured"}


def test_a_disk_that_was_not_measured_does_not_stop_the_plan() -> None:
    without = replace(measured(), disk_write_bytes_per_second=None)
    assert 0 < predicted(machine(rates=without)).terms["saving"] < predicted().terms["saving"]


# --- data sheets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "half"),
    [
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 990),
        ("NVIDIA B200", 2250),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX A4000", 76.7),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 80.2),
        ("NVIDIA GeForce RTX 4070 Laptop GPU", 58.3),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("Tesla T4", 65),
        ("AMD Instinct MI300X", 1307),
        ("Apple M3 Max GPU", 14),
        ("Apple M2 GPU", 3.6),
    ],
)
def test_a_device_is_found_by_its_name(name: str, half: float) -> None:
    hardware = machine(name)
    rates = nominal_rates(hardware, choose_device(hardware))
    assert math.isclose(rates.best.matmul["bf16"], 0.8 * half * 1e12)


def test_a_cpu_has_the_costs_that_were_fitted_on_its_kind() -> None:
    vector = replace(CPU, amx=False)
    kinds = [costs_of("cpu", CPU), costs_of("cpu", vector), costs_of("cuda", CPU)]
    assert kinds == [AMX_CPU, VECTOR_CPU, ACCELERATOR]
    assert costs_of("cpu", replace(vector, avx512_bf16=False)) is AMX_CPU
    # Nominal rates are of the kind as well: the same pass is as long to within the range of what is said.
    seconds = [predicted(machine(cpu=cpu)).step_seconds for cpu in (CPU, vector)]
    assert 1 < seconds[1] / seconds[0] < 3


def test_a_cpu_without_bf16_computes_it_in_fp32() -> None:
    old = Cpu(model="old", physical_cores=4, usable_cores=8, amx=False, avx512_bf16=False)
    hardware = machine(cpu=old)
    rates = nominal_rates(hardware, choose_device(hardware))
    assert rates.best.matmul["bf16"] == rates.best.matmul["fp32"]
    assert rates.best.threads == 4  # two threads of one core share its arithmetic
    only_fp32 = replace(speed(1), matmul={"fp32": 1e11})
    slow = replace(measured("old"), speeds=(only_fp32,))
    assert predicted(machine(cpu=old, rates=slow), precision="bf16").basis == "calibrated"
