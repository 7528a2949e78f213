"""The planner: pure, explained, obedient, and honest about what fits."""

from __future__ import annotations

import json
import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machines import (
    H200,
    LAPTOP,
    LAPTOP_CPU,
    SEVEN_B,
    T4,
    caught_problems,
    gpu,
    machine,
    planned,
    problems,
    refused,
    request_for,
    stats,
)
from memory_plans import footprint

from llmtune.config import load_config
from llmtune.data import DataStats
from llmtune.errors import DataError, PlanError
from llmtune.hardware import Hardware
from llmtune.models import LinearModule, ModelSpec, spec_from_entry
from llmtune.planning import Choice, Plan, PlanRequest, choose_model, make_plan, predict_memory, variants
from llmtune.planning.batching import PACKABLE
from llmtune.planning.memory import USABLE_SHARE, MemoryEstimate
from llmtune.planning.schedule import choose_length
from llmtune.planning.ways import FASTEST_WITHIN, QUANTISED_FASTER, Candidate, search_ways
from llmtune.presets import GOALS, METHODS, SCHEDULES, Preset, catalogue, find_entry
from llmtune.units import GIB


def assert_sound(plan: Plan) -> None:
    for name, choice in plan.choices():
        assert choice.reason.strip(), name
        assert choice.changes == choice.changes.strip()
        assert choice.source != "user" or not choice.changes, name
        assert choice.source in ("user", "preset", "measured", "derived", "default"), name
    assert plan.updates.value >= 1
    assert 1 <= plan.micro_batch_size.value
    assert plan.fits == plan.memory.fits == (plan.memory.peak_bytes <= plan.memory.free_bytes * USABLE_SHARE)
    assert plan.fits or len(plan.closest) <= 5
    assert plan.memory.peak_bytes == sum(plan.memory.terms.values())
    assert math.isfinite(plan.time.total_seconds)
    assert plan.time.total_seconds > 0
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert plan.summary() in str(plan)


# ------------------------------------------------------------------ every preset


def carried_over(request, method, plan):
    """What the preset's rate is multiplied by, written down a second time."""
    factor, rule = (0.1 if method == "full" else 1.0), request.preset.rate
    if rule is None:
        return factor
    factor *= (rule.hidden / max(576, request.spec.shape.hidden)) ** rule.exponent
    factor *= min(1.5, max(0.5, (plan.global_batch_size.value / 32) ** 0.5))
    if method != "full":
        short = min(1.0, max(0.0, 1 - math.log10(plan.updates.value / 100)))
        factor *= (10 + 5 * short) / 10 * (32 / plan.alpha.value) * (plan.rank.value / 16) ** 0.5
    return factor


@pytest.mark.parametrize("family", Preset.families())
def test_every_preset_goal_size_and_method_makes_a_plan(family):
    entry = next(iter(Preset.load(family).catalogue), find_entry(SEVEN_B))
    for goal in GOALS:
        for rows in (300, 5000, 50_000):
            for method in METHODS:
                request = request_for(entry.id, data=stats(rows), preset=goal, method=method)
                request = replace(request, preset=Preset.load(family))
                plan = make_plan(request)
                assert_sound(plan)
                level = request.preset.level(goal, plan.data_size.value)
                assert 8 <= plan.rank.value <= 4 * level.rank or plan.rank.value == level.rank
                assert (plan.rank.value == level.rank) == (plan.rank.source == "preset") or method == "full"
                assert plan.alpha.value / plan.rank.value == level.alpha / level.rank
                expected = level.learning_rate * carried_over(request, method, plan)
                assert plan.learning_rate.value == pytest.approx(expected, rel=0.06)  # told with two digits
                assert plan.epochs.value == level.epochs
                assert make_plan(request) == plan


def test_tinyllama_numbers_are_the_presets():
    plan = planned(preset="highspeed", data=stats(900))
    assert (plan.epochs.value, plan.learning_rate.value, plan.epochs.source) == (2, 1e-3, "preset")
    assert "tinyllama preset, highspeed, small data" in plan.epochs.reason


# ------------------------------------------------------------------ the user's word


ASKED = {
    "epochs": (1.5, "epochs"),
    "learning_rate": (7e-5, "learning_rate"),
    "schedule": ("linear", "schedule"),
    "weight_decay": (0.3, "weight_decay"),
    "optimizer": ("adafactor", "optimizer"),
    "max_grad_norm": (0.5, "max_grad_norm"),
    "global_batch_size": (24, "global_batch_size"),
    "micro_batch_size": (3, "micro_batch_size"),
    "token_budget": (5000, "token_budget"),
    "packing": (True, "packing"),
    "precision": ("fp32", "precision"),
    "activation_checkpointing": (True, "activation_checkpointing"),
    "num_workers": (2, "num_workers"),
    "seed": (7, "seed"),
    "method": ("full", "method"),
    "preset": ("bestaccuracy", "preset"),
    "rank": (5, "rank"),
    "alpha": (11, "alpha"),
    "dropout": (0.2, "dropout"),
    "targets": (("q_proj",), "targets"),
    "max_length": (512, "max_length"),
    "max_steps": (17, "updates"),
    "keep": (5, "keep_checkpoints"),
    "evaluate.every_steps": (9, "evaluate_every_steps"),
    "save.every_steps": (11, "save_every_steps"),
    "patience": (8, "patience"),
}


@pytest.mark.parametrize("key", ASKED)
def test_what_the_user_set_wins_and_says_so(key):
    value, name = ASKED[key]
    choice = getattr(planned(**{key: value}), name)
    assert (choice.value, choice.source) == (value, "user")
    assert "you set" in choice.reason


@pytest.mark.parametrize("key", ["preset", "seed", "max_grad_norm", "keep"])
def test_a_default_that_was_set_is_the_users_too(key):
    name = ASKED[key][1]
    default = getattr(planned(), name)
    assert default.source == "default"
    assert getattr(planned(**{key: default.value}), name) == Choice(
        default.value, getattr(planned(**{key: default.value}), name).reason, "user"
    )


def test_a_rank_of_your_own_keeps_the_ratio():
    level = Preset.load("tinyllama").level("quality", "medium")
    plan = planned(rank=3 * level.rank)
    assert plan.alpha.value == 3 * level.alpha
    assert "ratio" in plan.alpha.reason


def test_max_steps_says_how_many_epochs_that_is():
    plan = planned(data=stats(1000), max_steps=25, global_batch_size=10)
    assert (plan.updates.value, plan.epochs.value) == (25, 0.25)
    assert "100 updates per epoch" in plan.epochs.reason
    both = planned(data=stats(1000), max_steps=25, global_batch_size=10, epochs=3)
    assert both.epochs.value == 0.25
    assert "wins over your train.epochs=3" in both.epochs.reason


def test_full_fine_tuning_says_that_there_is_no_adapter():
    plan = planned(method="full", rank=64)
    assert "not used" in plan.dropout.reason
    assert any("adapter.rank has no effect" in notice for notice in plan.notices)


# ------------------------------------------------------------------ what cannot be


def test_all_contradictions_at_once():
    found = problems(schedule="cosin", optimizer="adamw_torc", max_length=4096, targets=["q_prj", "v_proj"])
    assert len(found) == 4
    assert found[0] == "train.schedule: got 'cosin', did you mean 'cosine'?"
    assert found[1].endswith("did you mean 'adamw_torch'?")
    assert "has no linear module 'q_prj', did you mean 'q_proj'?" in found[2]
    assert "data.max_length: got 4096, but the context of" in found[3]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_that_needs_no_argument_can_be_asked_for(schedule):
    assert planned(schedule=schedule).schedule.value == schedule


def test_constant_has_no_warmup():
    plan = planned(schedule="constant")
    assert plan.warmup_updates.value == 0
    assert "no warm-up" in plan.warmup_updates.reason
    assert "expected train.schedule=constant_with_warmup" in problems(schedule="constant", warmup_ratio=0.1)[0]
    assert planned(schedule="constant", warmup_ratio=0.0).warmup_updates.value == 0


def test_precisions_that_the_machine_does_not_have():
    assert "a CPU trains in bf16 or fp32" in problems(hardware=machine(), precision="fp16")[0]
    assert "Tesla T4 has fp16, fp32" in problems(hardware=T4, precision="bf16")[0]
    assert "a CPU trains in bf16 or fp32" in problems(hardware=machine(), precision="tf32")[0]
    assert "Tesla T4 has fp16, fp32" in problems(hardware=T4, precision="tf32")[0]
    without = machine(replace(gpu("AMD Instinct MI300X", 192), tf32=False))
    assert "AMD Instinct MI300X has bf16, fp16, fp32" in problems(hardware=without, precision="tf32")[0]


def test_head_and_embedding_may_be_targets():
    assert planned(targets=["q_proj", "lm_head"]).targets.value == ("q_proj", "lm_head")


def test_rows_longer_than_the_context():
    with pytest.raises(DataError, match=r"the longest row has 5,000 tokens.*data\.too_long=drop"):
        planned(data=stats(longest=5000))
    plan = planned(data=stats(longest=5000, estimated=True))
    assert plan.max_length.value == 2048
    assert "estimated to be longer" in plan.max_length.reason
    assert any("about 5,000 tokens" in notice for notice in plan.notices)


# ------------------------------------------------------------------ machines


def test_an_h200():
    plan = planned(SEVEN_B, hardware=Hardware.from_json(H200.to_json()))
    assert plan.fits
    assert (plan.method.value, plan.precision.value, plan.device.value) == ("lora", "bf16", "cuda:0")
    assert plan.quantization.value is None
    assert not plan.autocast


def test_a_laptop_with_24_gib():
    plan = planned(SEVEN_B, hardware=Hardware.from_json(LAPTOP.to_json()))
    assert plan.fits
    assert plan.memory.peak_bytes < 24 * GIB
    assert planned(SEVEN_B, hardware=LAPTOP, method="full").fits is False


@pytest.mark.parametrize("method", ["lora", "full"])
def test_tf32_takes_the_memory_of_fp32_and_a_time_between(method):
    how = {"hardware": H200, "method": method, "token_budget": 4096, "activation_checkpointing": False}
    bf16, tf32, fp32 = (planned(precision=name, **how) for name in ("bf16", "tf32", "fp32"))
    assert tf32.precision.source == "user"
    assert not tf32.autocast
    assert tf32.memory.peak_bytes == fp32.memory.peak_bytes
    assert bf16.time.total_seconds < tf32.time.total_seconds < fp32.time.total_seconds
    assert planned(hardware=H200).precision.value == "bf16"


def test_a_t4_computes_in_fp16():
    plan = planned(hardware=Hardware.from_json(T4.to_json()))
    assert plan.fits
    assert plan.precision.value == "fp16"
    assert "no bf16" in plan.precision.reason
    assert plan.autocast


@pytest.mark.parametrize("model", ["google/gemma-2-2b-it", "google/gemma-3-1b-it"])
def test_gemma_is_not_computed_in_fp16(model):
    plan = planned(model, hardware=T4)
    assert plan.precision.value == "fp32"
    assert "leave the range of fp16" in plan.precision.reason
    assert planned(model, hardware=H200).precision.value == "bf16"
    assert planned(model, hardware=T4, precision="fp16").precision.value == "fp16"


def test_cpus():
    assert planned(hardware=machine()).precision.value == "bf16"
    assert planned(hardware=machine(cpu=LAPTOP_CPU)).precision.value == "fp32"
    plan = planned(hardware=machine(), data=stats(longest=300))
    assert plan.token_budget.value == 1024
    assert plan.memory.terms["interpreter"] > 0


def test_processes_on_a_cpu_share_its_memory_and_cores():
    one, two = planned(hardware=machine(ram=32)), planned(hardware=machine(ram=32), processes=2)
    assert two.memory.free_bytes == one.memory.free_bytes // 2
    assert two.time.total_seconds >= 0.9 * one.time.total_seconds
    on_gpus = planned(processes=2)
    assert on_gpus.memory.free_bytes == planned().memory.free_bytes
    assert on_gpus.time.total_seconds < planned().time.total_seconds


def test_the_chosen_gpu_gives_the_rate():
    mixed = machine(gpu("NVIDIA T4", 16, index=0), gpu("NVIDIA H100", 16, index=1))
    slow, fast = planned(hardware=mixed, device="cuda:0"), planned(hardware=mixed, device="cuda:1")
    assert fast.time.total_seconds < slow.time.total_seconds


# ------------------------------------------------------------------ memory: what gives way, and when


def test_less_memory_means_slower_ways_in_order():
    ladder = [planned(SEVEN_B, hardware=machine(gpu("NVIDIA A100", gib))) for gib in range(139, 4, -2)]
    fitting = [plan for plan in ladder if plan.fits]
    seconds = [plan.time.step_seconds for plan in fitting]
    assert all(later >= earlier / (QUANTISED_FASTER * FASTEST_WITHIN) for earlier, later in pairwise(seconds))
    ways = [(p.method.value, p.activation_checkpointing.value) for p in fitting]
    order = list(dict.fromkeys(ways))
    assert order[0] == ("lora", False)
    assert order[-1] == ("qlora", True)
    methods = [method for method, _ in ways]
    assert methods == sorted(methods)  # once quantised, never back
    assert len({plan.token_budget.value for plan in fitting}) >= 2
    assert [plan.fits for plan in ladder] == sorted((plan.fits for plan in ladder), reverse=True)
    assert len(set(str(p.activation_checkpointing) for p in ladder)) >= 3


def test_a_7b_model_does_not_fit_4_gib_and_the_plan_says_so():
    request = request_for(SEVEN_B, hardware=machine(gpu("NVIDIA GTX", 4)))
    plan = make_plan(request)
    assert plan.fits is False
    assert_sound(plan)
    assert "still does not fit" in plan.method.reason
    assert "fits in memory" not in " ".join(choice.reason for _, choice in plan.choices())
    least = replace(request, config=load_config({"method": "qlora", "activation_checkpointing": True}, environ={}))
    assert plan.memory.peak_bytes == make_plan(least).memory.peak_bytes
    assert [near.loses for near in plan.closest] == ["a smaller model"]
    assert f"Closest that fit: {plan.closest[0].flags} (" in refused(plan)


@pytest.mark.parametrize(
    ("gib", "asked", "expected"),
    [
        (8, {"method": "lora"}, "--method qlora"),
        (24, {"method": "full"}, "--method lora"),
        (7, {"micro_batch_size": 64}, "--set train.micro_batch_size=auto"),
        (7, {"token_budget": 100_000}, "--set train.token_budget=auto"),
        (
            28,
            {"activation_checkpointing": False, "method": "lora", "token_budget": 8000},
            "--set train.activation_checkpointing=true",
        ),
        (6, {}, "--set data.max_length=120 --set data.too_long=drop"),
    ],
)
def test_variants_are_flags_that_really_fit(gib, asked, expected):
    data = stats(longest=2000) if not asked else stats()
    request = request_for(SEVEN_B, hardware=machine(gpu("NVIDIA RTX", gib)), data=data, **asked)
    refused_plan = make_plan(request)
    assert refused_plan.fits is False
    found = dict(variants(request))
    assert expected in found, found.keys()
    assert [near.flags for near in refused_plan.closest] == list(found)
    for flags, plan in found.items():
        words = flags.split()
        if words[0] == "--model":
            entry = find_entry(words[1])
            smaller = replace(request, spec=spec_from_entry(entry), preset=Preset.load(entry.family))
            assert make_plan(smaller).fits
            continue
        texts = [f"method={words[1]}"] if words[0] == "--method" else [w for w in words if w != "--set"]
        again = make_plan(replace(request, config=load_config(asked, settings=texts, environ={})))
        assert again.fits
        assert again.memory == plan.memory


def peak(**changes) -> int:
    spec = spec_from_entry(find_entry(SEVEN_B))
    return predict_memory(spec, footprint(**changes), device="cuda:0", total_bytes=1, free_bytes=1).peak_bytes


def test_memory_grows_with_what_takes_memory():
    assert peak(tokens=512) < peak() < peak(tokens=2048)
    assert peak(rank=4) < peak() < peak(rank=64)
    assert peak(checkpoint_every=1) < peak()
    assert peak(method="qlora", quantization="nf4") < peak(method="qlora", quantization="int8") < peak()
    assert peak() < peak(precision="fp32") < peak(method="full", precision="fp32")
    assert peak(targets=("q_proj",)) < peak()


# ------------------------------------------------------------------ batches


def assert_batch_is_exact(plan: Plan) -> None:
    assert plan.micro_batch_size.value <= math.ceil(plan.global_batch_size.value / plan.processes.value)


@pytest.mark.parametrize("rows", [1, 2, 7, 63, 64, 65, 800, 6401, 100_003])
@pytest.mark.parametrize("processes", [1, 3, 16])
def test_awkward_row_counts(rows, processes):
    plan = planned(data=stats(rows), processes=processes)
    assert_sound(plan)
    assert_batch_is_exact(plan)
    batch, per_epoch = plan.global_batch_size.value, math.ceil(rows / plan.global_batch_size.value)
    assert 1 <= batch <= rows
    assert batch >= min(processes, rows)
    assert plan.updates.value == math.ceil(per_epoch * plan.epochs.value)
    assert plan.warmup_updates.value <= plan.updates.value
    assert 1 <= plan.evaluate_every_steps.value <= plan.updates.value
    if plan.updates.value >= 100 and batch < 64 and batch > processes:
        assert math.ceil(rows / (2 * batch)) * plan.epochs.value < 100


def test_the_reason_of_the_batch_is_true():
    assert "leaves 100 updates or more" in planned(data=stats(50_000)).global_batch_size.reason
    assert "fewer than 100 updates anyway" in planned(data=stats(50)).global_batch_size.reason
    assert "there are no more" in planned(data=stats(3)).global_batch_size.reason
    assert "one row for each process" in planned(data=stats(50), processes=12).global_batch_size.reason


def test_an_asked_micro_batch_is_not_cut_by_the_usual_budget():
    plan = planned(hardware=machine(ram=64), data=stats(longest=1001), micro_batch_size=4)
    assert plan.token_budget.value == 4 * 1024
    assert "your train.micro_batch_size" in plan.token_budget.reason
    assert plan.token_budget.source == "derived"


def tokens_of(request: PlanRequest) -> int:
    """Padded tokens of the largest pass that memory is predicted of."""
    return search_ways(request, choose_length(request)).best.footprint.tokens


def test_both_limits_hold_when_both_are_asked_for():
    one = request_for(data=stats(longest=1000), micro_batch_size=4, token_budget=2000)
    assert tokens_of(one) == 2000
    two = replace(one, config=load_config({"micro_batch_size": 1, "token_budget": 2000}, environ={}))
    assert tokens_of(two) == 1000


def test_a_row_above_the_budget_goes_alone_and_is_counted():
    assert tokens_of(request_for(data=stats(longest=2000), token_budget=500)) == 2000
    plan = planned(hardware=machine(ram=64), data=stats(longest=2000))
    assert plan.token_budget.value == 2048
    assert "more tokens than the usual 1,024" in plan.token_budget.reason


def test_without_a_micro_batch_size_the_budget_alone_limits_a_pass():
    plan = planned(hardware=machine(), global_batch_size=64)
    assert (plan.micro_batch_size.value, plan.micro_batch_size.source) == (64, "derived")
    assert "as far as 1,024 tokens hold them" in plan.micro_batch_size.reason
    assert plan.accumulation.value >= math.ceil(64 * 120 / 1024)


def test_widths_and_passes_suit_the_device():
    cpu, gpu_ = planned(hardware=machine()), planned()
    assert (cpu.pad_multiple.value, gpu_.pad_multiple.value) == (64, 8)
    assert "compiled anew" in cpu.pad_multiple.reason
    assert "tensor cores" in gpu_.pad_multiple.reason
    assert cpu.pass_overhead_tokens.value == 64
    # A small model on a fast GPU waits for kernels to be launched; a large one on a slow GPU does not.
    large = planned(SEVEN_B, hardware=LAPTOP)
    assert 0 < large.pass_overhead_tokens.value < gpu_.pass_overhead_tokens.value < 16384


def test_packed_rows_are_not_compiled_for_unless_that_is_asked_for():
    """Rows of one length, for so long that compiling the one shape pays."""
    rows = stats(100_000, mean=256, longest=256)
    assert planned(data=rows).compile.value is True
    packed = planned(data=rows, packing=True)
    assert packed.compile.value is False
    assert "one by one" in packed.compile.reason
    assert planned(data=rows, packing=True, compile=True).compile.value is True


def test_a_cpu_has_kernels_that_are_faster_than_compiled_layers():
    """Rows of one length, for so long that compiling the one shape would pay on a GPU."""
    rows = stats(100_000, mean=256, longest=256)
    found = planned(hardware=machine(), data=rows).compile
    assert found.value is False
    assert "faster than compiled ones" in found.reason
    assert planned(hardware=machine(), data=rows, compile=True).compile.value is True


def test_a_plan_from_before_packing_goes_on_as_it_began():
    document = planned().to_json()
    for name in ("packing", "pad_multiple", "pass_overhead_tokens"):
        del document["choices"][name]
    plan = Plan.from_json(document)
    assert (plan.packing.value, plan.pad_multiple.value, plan.pass_overhead_tokens.value) == (False, 8, None)


@pytest.mark.parametrize(
    ("hardware", "reason", "masked"),
    [
        (machine(), "packed rows took 0.99 to 1.01 times as long", False),
        (H200, "packing was not timed on an accelerator", False),
        (T4, "a mask of its square", True),
    ],
    ids=["cpu", "gpu", "old gpu"],
)
def test_packing_is_off_unless_asked_for(hardware, reason, masked):
    padded = planned(hardware=hardware, token_budget=1024)
    assert (padded.packing.value, padded.packing.source) == (False, "derived")
    assert reason in padded.packing.reason
    assert "masks" not in padded.memory.terms
    packed = planned(hardware=hardware, token_budget=1024, packing=True)
    assert_sound(packed)
    # Where no kernel keeps documents apart, at least one boolean mask of the whole sequence, and one in fp16.
    assert packed.memory.terms.get("masks", 0) >= 3 * 1024**2 * masked
    assert ("masks" in packed.memory.terms) == masked


def test_packing_is_refused_where_it_is_not_proven():
    request = request_for(packing=True)
    (problem,) = caught_problems(replace(request, spec=replace(request.spec, model_type="mamba")))
    assert problem.startswith("train.packing: got true, but ")
    assert "is of type 'mamba'" in problem
    (problem,) = problems(packing=True, trust_remote_code=True)
    assert "its repository's own code" in problem
    unpacked = request_for(packing=False)
    assert make_plan(replace(unpacked, spec=replace(unpacked.spec, model_type="mamba"))).packing.value is False


def test_every_catalogued_model_can_be_packed():
    assert {entry.model_type for entry in catalogue()} <= PACKABLE


def test_max_length_above_the_longest_row_takes_no_memory():
    assert planned(max_length=2048).memory == planned().memory


def test_notices():
    assert any("estimated" in notice for notice in planned(data=stats(estimated=True)).notices)
    plan = planned(eval_rows=0)
    assert any("No rows are held out" in notice for notice in plan.notices)
    assert plan.patience.value is None
    assert planned(preset="highspeed").patience.value is None
    assert planned().patience.value == 3


def test_targets_of_an_unknown_architecture():
    request = request_for()
    linears = (LinearModule(name="c_attn", in_features=8, out_features=8, count=2),)
    spec = replace(request.spec, architecture="GPT2LMHeadModel", model_type="gpt2", linears=linears)
    plan = make_plan(replace(request, spec=spec))
    assert plan.targets.value == ("all-linear",)
    assert "none of the preset's module names" in plan.targets.reason


# ------------------------------------------------------------------ model="auto"


def chosen(hardware: Hardware, data: DataStats, longest: int = 0) -> tuple[str, Choice[str]]:
    def plan_of(entry):
        return make_plan(request_for(entry.id, hardware=hardware, data=data), alternatives=False)

    entry, choice = choose_model(plan_of, lambda entry: longest)
    assert choice.value == entry.id
    return entry, choice


def test_more_memory_never_gives_a_smaller_model():
    data = stats(3000, longest=500, estimated=True)
    found = [chosen(machine(gpu("NVIDIA A100", gib)), data) for gib in (4, 6, 8, 12, 16, 24, 48, 80, 139)]
    sizes = [entry.parameters for entry, _ in found]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert found[-1][0].id == "Qwen/Qwen3-14B"
    assert all(entry.instruct and not entry.gated and entry.family != "tiny" for entry, _ in found)
    assert "would need" in found[0][1].changes


def test_a_slow_machine_gets_a_model_that_ends_in_time():
    entry, choice = chosen(machine(ram=64), stats(500, estimated=True))
    assert "trains within 2 h" in choice.reason
    assert "Qwen/Qwen3-14B would take about" in choice.changes
    slowest, choice = chosen(machine(ram=64), stats(3_000_000, estimated=True))
    assert slowest.parameters < entry.parameters
    assert "the fastest open model that fits; it will take about" in choice.reason


def test_no_model_fits():
    with pytest.raises(PlanError, match=r"no catalogued model fits this machine: .* would need"):
        chosen(machine(ram=0.5), stats(estimated=True))
    with pytest.raises(PlanError, match="context as long as the longest row"):
        chosen(H200, stats(estimated=True), longest=10**7)
    assert chosen(H200, stats(estimated=True), longest=30_000)[0].context >= 30_000


# ------------------------------------------------------------------ for any machine and any data


@st.composite
def requests(draw) -> PlanRequest:
    memory = draw(st.floats(1, 200))
    accelerators = [gpu(draw(st.sampled_from(["NVIDIA H100", "Tesla T4", "?"])), memory, bf16=draw(st.booleans()))]
    hardware = machine(*(accelerators if draw(st.booleans()) else []), ram=draw(st.floats(1, 500)))
    entry = draw(st.sampled_from(catalogue()))
    lengths = sorted(draw(st.lists(st.integers(1, min(entry.context, 8000)), min_size=4, max_size=4)))
    rows = draw(st.integers(1, 200_000))
    data = DataStats(
        rows=rows,
        tokens=rows * lengths[0],
        supervised_tokens=rows,
        length_p50=lengths[0],
        length_p95=lengths[1],
        length_p99=lengths[2],
        length_max=lengths[3],
        estimated=draw(st.booleans()),
    )
    asked = {
        "preset": draw(st.sampled_from(GOALS)),
        "method": draw(st.sampled_from([None, *METHODS])),
        "global_batch_size": draw(st.none() | st.integers(1, 300)),
        "micro_batch_size": draw(st.none() | st.integers(1, 70)),
        "token_budget": draw(st.none() | st.integers(1, 30_000)),
        "max_steps": draw(st.none() | st.integers(1, 10_000)),
        "epochs": draw(st.none() | st.floats(0.01, 20)),
        "rank": draw(st.none() | st.integers(1, 256)),
    }
    eval_rows, processes = draw(st.integers(0, 500)), draw(st.integers(1, 9))
    return request_for(entry.id, hardware=hardware, data=data, processes=processes, eval_rows=eval_rows, **asked)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests())
def test_any_plan_is_sound_and_repeatable(request):
    plan = make_plan(request)
    assert_sound(plan)
    assert plan == make_plan(request)
    train = request.config.train
    for key in ("method", "global_batch_size", "micro_batch_size", "token_budget"):
        asked = getattr(train, key)
        if asked is not None:
            assert (getattr(plan, key).value, getattr(plan, key).source) == (asked, "user")
    assert {field.name for field in fields(Plan)} >= {name for name, _ in plan.choices()}
    for flags, other in variants(request):
        assert flags
        assert other.fits


def test_specs_without_linear_modules_do_not_divide_by_zero():
    request = request_for()
    spec: ModelSpec = replace(request.spec, architecture="Unknown", model_type="unknown", linears=())
    assert_sound(make_plan(replace(request, spec=spec)))


# ------------------------------------------------------------------ laws, for any machine and any data


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    entry=st.sampled_from(catalogue()),
    every=st.integers(0, 3),
    tokens=st.integers(64, 20_000),
    width=st.integers(16, 64),
    rank=st.integers(1, 64),
    method=st.sampled_from(["lora", "full"]),
    more=st.integers(1, 8),
)
def test_memory_is_monotone(entry, every, tokens, width, rank, method, more):
    spec = spec_from_entry(entry)
    deeper = replace(
        spec,
        shape=replace(spec.shape, layers=spec.shape.layers + more),
        linears=tuple(replace(module, count=module.count + more) for module in spec.linears),
        parameters=spec.parameters + more * sum(m.in_features * m.out_features for m in spec.linears),
    )
    least = footprint(method=method, checkpoint_every=every, tokens=tokens, width=width, rank=rank)

    def size(of: ModelSpec, **changes) -> int:
        changed = replace(least, **changes)
        return predict_memory(of, changed, device="cuda:0", total_bytes=1, free_bytes=1).peak_bytes

    # To the last tokens of rows that fill a chunk of logits: shorter rows have more of them, and they predict nothing.
    assert 0.998 * size(spec) <= size(spec, tokens=tokens + more * width)
    assert 0.998 * size(spec) <= size(spec, width=width + more, tokens=tokens * (width + more) // width)
    assert size(spec) <= size(spec, rank=rank + more)
    assert size(spec) <= size(deeper)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), gib=st.floats(1, 200), more=st.floats(1, 4))
def test_more_memory_is_never_slower_and_never_exceeded(request, gib, more):
    def search(free: float) -> tuple[Candidate, MemoryEstimate]:
        device = replace(request.device, free_bytes=int(free * GIB), total_bytes=int(free * GIB))
        found = search_ways(replace(request, device=device), choose_length(request))
        return found.best, found.memory(found.best)

    (less, little), (larger, much) = search(gib), search(gib * more)
    for memory in (little, much):
        assert not memory.fits or memory.peak_bytes <= memory.free_bytes * USABLE_SHARE
    assert much.fits >= little.fits
    if little.fits:
        # Unquantised base weights are taken although they are a little slower.
        assert larger.seconds <= less.seconds * QUANTISED_FASTER * FASTEST_WITHIN


SETTINGS = {
    "train.checkpoint_every": (3, "checkpoint_every"),
    "train.activation_offload": (True, "activation_offload"),
    "train.activation_checkpointing": (True, "activation_checkpointing"),
    "train.compile": (True, "compile"),
    "train.num_workers": (3, "num_workers"),
    "train.threads": (2, "threads"),
    "train.optimizer": ("lion_32bit", "optimizer"),
    "train.method": ("qlora", "method"),
    "train.precision": ("fp32", "precision"),
    "train.weight_decay": (0.3, "weight_decay"),
    "adapter.rank": (3, "rank"),
    "adapter.alpha": (5, "alpha"),
    "adapter.dropout": (0.01, "dropout"),
    "evaluate.every_steps": (2, "evaluate_every_steps"),
    "save.every_steps": (3, "save_every_steps"),
    "evaluate.patience": (9, "patience"),
}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    keys=st.sets(st.sampled_from(sorted(SETTINGS))),
    gib=st.floats(2, 150),
    rows=st.integers(1, 100_000),
    complexity=st.none() | st.floats(0, 1),
)
def test_no_setting_of_the_user_is_ever_changed(keys, gib, rows, complexity):
    asked = {key: SETTINGS[key][0] for key in keys}
    request = request_for(SEVEN_B, hardware=machine(gpu("NVIDIA A100", gib)), data=stats(rows), **asked)
    plan = make_plan(replace(request, complexity=complexity))
    for key in keys:
        value, name = SETTINGS[key]
        assert (getattr(plan, name).value, getattr(plan, name).source) == (value, "user")


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 10**6), batch=st.integers(1, 300), processes=st.integers(1, 9), epochs=st.floats(0.1, 9))
def test_the_global_batch_is_exact(rows, batch, processes, epochs):
    asked = {"global_batch_size": batch, "epochs": epochs}
    plan = make_plan(request_for(data=stats(rows), processes=processes, **asked), alternatives=False)
    assert plan.global_batch_size.value == batch
    assert plan.updates.value == max(1, math.ceil(math.ceil(rows / batch) * epochs))
    assert plan.micro_batch_size.value == math.ceil(batch / processes)
