"""What is chosen: each rule where it applies and where it does not, and what would change it."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

from machines import (
    SEVEN_B,
    gpu,
    machine,
    planned,
    problems,
    refused,
    request_for,
    stats,
)

from llmtune.config import load_config
from llmtune.data import DataStats
from llmtune.planning import Plan, choose_model, make_plan
from llmtune.planning.correction import Correction
from llmtune.planning.model_choice import contenders
from llmtune.presets import Preset, find_entry
from llmtune.units import GIB

# ------------------------------------------------------------------ what would change it


def test_more_or_less_memory_changes_what_it_says():
    request = request_for("Qwen/Qwen3-8B", hardware=machine(gpu("NVIDIA RTX", 14)))
    plan = make_plan(request)
    assert (plan.fits, plan.method.value) == (True, "qlora")
    gib = float(re.search(r"lora from ([\d.]+) GiB free", plan.method.changes)[1])

    def method(free: float) -> str:
        return make_plan(replace(request, device=replace(request.device, free_bytes=int(free * GIB)))).method.value

    assert (method(gib - 0.1), method(gib + 0.1)) == ("qlora", "lora")


def test_presets_say_what_other_goals_have():
    changes = planned(preset="highspeed").learning_rate.changes
    level = Preset.load("tinyllama").level("quality", "medium")
    assert f"{level.learning_rate:g} with --preset quality" in changes
    assert "changes: " in str(planned())


def test_choices_of_earlier_plans_load():
    document = planned().to_json()
    for choice in document["choices"].values():
        del choice["changes"]
    assert all(choice.changes == "" for _, choice in Plan.from_json(document).choices())


def test_what_earlier_runs_have_shown_is_said_where_it_decided():
    hardware = machine(gpu("NVIDIA RTX", 18))
    plain = request_for(SEVEN_B, hardware=hardware)
    showed = Correction(memory=3.0, seconds=1.0, basis="runs", reason="3 runs here took 3 times the memory")
    before, after = make_plan(plain), make_plan(replace(plain, correction=showed))
    assert (before.method.value, after.method.value) == ("lora", "qlora")
    assert after.method.source == "measured"
    assert after.method.reason.endswith("lora by the formulas alone, but 3 runs here took 3 times the memory")
    assert before.seed == after.seed


# ------------------------------------------------------------------ the adapter follows data and model


def supervised(tokens: int, rows: int = 2_000) -> DataStats:
    return replace(stats(rows), supervised_tokens=tokens, tokens=2 * tokens)


def test_rank_grows_with_the_data_and_stays_within_bounds():
    level = Preset.load("tinyllama").level("quality", "large")
    ranks = [planned(data=supervised(10**power, 50_000)).rank for power in range(4, 12)]
    values = [rank.value for rank in ranks]
    assert values == sorted(values)
    assert values[0] >= 8
    assert max(values) == 4 * level.rank
    assert ranks[-1].source == "derived"
    assert "bits" in ranks[-1].reason
    assert planned(data=supervised(10**11, 50_000), rank=5).rank.value == 5


def test_varied_text_asks_for_more_rank():
    request = request_for(data=supervised(30_000_000, 50_000))
    plain, unknown, varied = (make_plan(replace(request, complexity=c)).rank.value for c in (0.0, None, 1.0))
    assert plain <= unknown <= varied
    assert plain < varied


def test_a_handful_of_rows_gets_a_small_adapter():
    plan = planned(SEVEN_B, data=supervised(2_000, 100))
    assert (plan.rank.value, plan.rank.source) == (8, "derived")
    assert plan.alpha.value / plan.rank.value == 2
    assert "forgets less" in plan.rank.reason


def test_dropout_follows_how_often_rows_are_seen():
    once = planned(epochs=1)
    assert (once.dropout.value, once.dropout.source) == (0.0, "derived")
    assert planned(epochs=2).dropout.source == "preset"
    often = planned(SEVEN_B, data=supervised(5_000, 100), epochs=5)
    assert (often.dropout.value, often.patience.value) == (0.1, 2)
    assert planned(SEVEN_B, data=supervised(50_000_000, 100), epochs=5).patience.value == 3


def test_without_held_out_rows_there_are_no_more_than_three_epochs():
    with_rows, without = planned(preset="bestaccuracy"), planned(preset="bestaccuracy", eval_rows=0)
    assert (with_rows.epochs.value, without.epochs.value) == (5, 3)
    assert "overfitting would not be seen" in without.epochs.reason
    assert planned(preset="bestaccuracy", eval_rows=0, epochs=7).epochs.value == 7


# ------------------------------------------------------------------ evaluations, saves and the machine


def test_early_stopping_can_be_switched_off():
    off = planned(patience="off").patience
    assert (off.value, off.source) == (None, "user")
    assert off.reason == "you set evaluate.patience=off: the run goes to its end"
    assert planned(patience=5).patience.value == 5
    assert planned().patience.value == 3


def test_a_large_evaluation_set_is_evaluated_less_often():
    few, many = planned(eval_rows=100), planned(eval_rows=50_000)
    assert few.evaluate_every_steps.value < many.evaluate_every_steps.value
    assert "keeps it at about 10 %" in many.evaluate_every_steps.reason
    assert many.evaluate_every_steps.value <= many.updates.value


def test_slow_updates_are_saved_every_twenty_minutes():
    plan = planned(SEVEN_B, hardware=machine(ram=64), data=stats(20_000))
    assert plan.save_every_steps.value * plan.time.step_seconds <= 20 * 60
    assert (plan.save_every_steps.value + 1) * plan.time.step_seconds > 20 * 60
    assert "a crash costs" in plan.save_every_steps.reason


def test_saves_that_would_take_longer_than_training_are_rarer():
    plan = planned("Qwen/Qwen3-8B", method="full", hardware=machine(gpu("NVIDIA B200", 190)))
    assert plan.save_every_steps.value > plan.evaluate_every_steps.value  # as often, by the preset
    assert "5 % of the time" in plan.save_every_steps.reason


def test_compilation_pays_only_for_few_shapes_and_long_runs():
    same = stats(2_000_000, mean=256, longest=256)
    assert planned(data=same, token_budget=4096).compile.value is True
    assert "take about" in planned(data=same).compile.reason
    short = planned(data=replace(same, rows=64, tokens=64 * 256, supervised_tokens=32 * 256))
    assert short.compile.value is False
    assert "shapes, and each is compiled anew" in planned().compile.reason
    assert planned("Qwen/Qwen3-8B", data=same, method="qlora").compile.value is False


def test_a_loader_gets_workers_only_where_a_gpu_would_wait():
    assert planned().num_workers.value == 0
    assert planned(hardware=machine()).num_workers.value == 0
    tiny = planned("builtin:tiny", data=stats(longest=500), global_batch_size=2000)
    share = float(re.search(r"([\d.e-]+) % of a step", tiny.num_workers.reason)[1])
    assert tiny.num_workers.value == (2 if share > 5 else 0)
    assert (planned().pin_memory.value, planned(hardware=machine()).pin_memory.value) == (True, False)


def test_small_optimizers_only_where_memory_asks():
    roomy = planned(SEVEN_B, method="full", hardware=machine(gpu("NVIDIA B200", 180)))
    tight = planned(SEVEN_B, method="full", hardware=machine(gpu("NVIDIA H100", 100)))
    assert (roomy.fits, roomy.optimizer.value) == (True, "adamw_torch_fused")
    assert (tight.fits, tight.optimizer.value) == (True, "adamw_bnb_8bit")
    assert "adamw_torch_fused from" in tight.optimizer.changes
    assert tight.disk_bytes < roomy.disk_bytes


def test_paged_optimizers_and_offload_need_a_device_of_their_own():
    (paged,) = problems(hardware=machine(), optimizer="paged_adamw_8bit")
    assert paged.endswith("which needs an NVIDIA or AMD GPU (CUDA); expected adamw_bnb_8bit")
    (offload,) = problems(hardware=machine(), activation_offload=True)
    assert "no memory beside that of the cpu" in offload
    assert planned(optimizer="paged_adamw_8bit").optimizer.value == "paged_adamw_8bit"
    plan = planned(activation_offload=True)
    assert (plan.activation_offload.value, plan.checkpoint_every.value) == (True, 2)


def test_recomputing_nothing_contradicts_recomputing_some():
    found = problems(activation_checkpointing=False, checkpoint_every=2, activation_offload=True)
    assert [text.split(":")[0] for text in found] == ["train.checkpoint_every", "train.activation_offload"]
    plan = planned(checkpoint_every=4)
    assert (plan.activation_checkpointing.value, plan.activation_checkpointing.source) == (True, "derived")


def test_idle_gpus_are_told_with_the_command_that_uses_them():
    eight = machine(*(gpu("NVIDIA H100", 80, index=i) for i in range(8)))
    (notice,) = [text for text in planned(SEVEN_B, hardware=eight).notices if "GPUs" in text]
    assert notice.startswith("8 GPUs are here and this plan uses one.")
    command = '"$(llmtune accelerate-config ddp)" --num_processes 8 -m llmtune train DATA --model mistralai/'
    assert command in notice
    assert not any("GPUs" in text for text in planned(SEVEN_B, hardware=eight, processes=8).notices)
    assert not any("GPUs" in text for text in planned(SEVEN_B).notices)


# ------------------------------------------------------------------ the nearest plans


def test_the_nearest_plans_lose_little_first():
    long_rows = stats(50_000, mean=700, longest=6_000)
    plan = planned(SEVEN_B, hardware=machine(gpu("NVIDIA RTX", 15)), data=long_rows, method="lora")
    assert not plan.fits
    assert 2 <= len(plan.closest) <= 5
    assert plan.closest[0].loses == "4-bit base weights"
    assert refused(plan).count("--model") <= 1
    rows = [near for near in plan.closest if "drops" in near.loses]
    assert all(re.fullmatch(r"drops about [\d,]+ rows", near.loses) for near in rows)


def test_settings_that_stand_in_the_way_are_given_back_together():
    asked = {"method": "full", "micro_batch_size": 64, "optimizer": "adamw_torch"}
    plan = planned(SEVEN_B, hardware=machine(gpu("NVIDIA RTX", 4)), **asked)
    assert not plan.fits
    assert plan.closest
    auto = "--set train.micro_batch_size=auto --set train.optimizer=auto --method auto"
    assert plan.closest[0].flags.startswith(auto)


# ------------------------------------------------------------------ the catalogue's best


def test_the_order_of_the_catalogue_is_an_experts():
    names = [entry.id for entry in contenders(gated=False)]
    assert names.index("Qwen/Qwen3-14B") < names.index("Qwen/Qwen2.5-14B-Instruct") < names.index("Qwen/Qwen3-8B")
    assert names.index("Qwen/Qwen3-4B") < names.index("microsoft/Phi-4-mini-instruct")
    assert names.index("Qwen/Qwen3-0.6B") < names.index("TinyLlama/TinyLlama-1.1B-Chat-v1.0")
    assert names.index("TinyLlama/TinyLlama-1.1B-Chat-v1.0") < names.index("microsoft/phi-2")
    assert "Qwen/Qwen2.5-3B-Instruct" not in names  # its licence is for research
    assert not any(find_entry(name).gated for name in names)
    assert any(entry.gated for entry in contenders(gated=True))


def test_gated_models_need_a_token():
    def plan_of(entry):
        return make_plan(request_for(entry.id, data=stats(estimated=True)), alternatives=False)

    def twelve_or_less(entry):
        return 0 if entry.parameters < 13e9 else 10**9

    assert choose_model(plan_of, twelve_or_less)[0].id == "Qwen/Qwen3-8B"
    assert choose_model(plan_of, twelve_or_less, gated=True)[0].id == "mistralai/Mistral-Nemo-Instruct-2407"


def test_a_model_too_large_for_one_gpu_is_spread_over_all():
    eight = machine(*(gpu("NVIDIA H100", 80, index=i) for i in range(8)), ram=2000)
    plan = planned("Qwen/Qwen3-8B", hardware=eight, method="full", targets=["q_proj", "v_proj"])
    (spread,) = [near for near in plan.closest if "fsdp2" in near.flags]
    words = shlex.split(spread.flags.partition("llmtune train ")[2])
    assert words[0] == "DATA"
    assert words[words.index("--model") + 1] == "Qwen/Qwen3-8B"
    again = load_config({}, settings=[word for word in words if "=" in word], environ={})
    assert (again.train.method, again.adapter.targets) == ("full", ("q_proj", "v_proj"))
    assert spread.peak_bytes < plan.memory.peak_bytes
