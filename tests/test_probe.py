"""Before step 1: what is measured, what it changes, what is rehearsed; and what later runs learn from it."""

from __future__ import annotations

import json
import random
import re
import resource
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tuning import ROWS, SignalAt, evaluations, events, history, losses, tune, weights

from llmtune import FineTuner, Plan
from llmtune.config import load_config
from llmtune.data import pass_width
from llmtune.errors import CheckpointError, ConfigError, LlmtuneError, ModelError, OutputError, PlanError, Preempted
from llmtune.finetuner import facts
from llmtune.planning.correction import (
    MEMORY_RANGE,
    NO_CORRECTION,
    SECONDS_RANGE,
    Correction,
    Experience,
    correction,
    experience,
)
from llmtune.planning.measurement import Measurement, Pass
from llmtune.planning.memory import USABLE_SHARE
from llmtune.planning.replan import AFTER_A_PASS, OVER_BEFORE, THERE_BEFORE, budget_after, formula_of, replan
from llmtune.runs import RunDirectory
from llmtune.training.meter import MemoryMeter, is_out_of_memory
from llmtune.training.probe import largest_rows, untouched
from llmtune.training.rehearsal import PREFIX
from llmtune.training.trainer import UpdateTrainer

Model = Callable[[str], Path]
Change = Callable[[Any], None]
LONGEST = 64  # padded tokens of the longest of ROWS


@pytest.fixture
def changed_model(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """``changed_model(change)``: every model that is loaded from now on is handed to ``change`` first."""
    from llmtune import models

    real = models.load_for_training

    def use(change: Change) -> None:
        def load(*args: Any, **kwargs: Any) -> Any:
            model = real(*args, **kwargs)
            change(model)
            return model

        monkeypatch.setattr(models, "load_for_training", load)

    return use


class ShortMemory:
    """Memory runs out in the backward pass of the second of two layers, above so many tokens."""

    def __init__(self, tokens: int, error: Exception | None = None) -> None:
        self.tokens = tokens
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.passes: list[int] = []

    def __call__(self, model: Any) -> None:
        layer = model.get_base_model().model.layers[1]
        layer.register_full_backward_hook(self._backward)

    def _backward(self, module: Any, grad_input: Any, grad_output: Any) -> None:
        tokens = grad_output[0].shape[0] * grad_output[0].shape[1]
        self.passes.append(tokens)
        if tokens > self.tokens:
            raise self.error


def plans_of(run_dir: Path) -> list[Plan]:
    run = RunDirectory.open(run_dir)
    return [Plan.from_json(run.read_json(path.name)) for path in run.plans]


def left_behind(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.rglob("*") if path.name.startswith((PREFIX, ".staging-"))]


# --- a probed run is the run it would have been -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"dropout": 0.2}, {"method": "full"}, pytest.param({"dropout": 0.2, "packing": True}, marks=pytest.mark.slow)],
)
def test_a_probed_run_is_to_the_bit_the_unprobed_one(family_model: Model, tmp_path: Path, how: dict[str, Any]) -> None:
    how = how | {"max_steps": 4}  # into the second epoch
    tune(family_model("llama"), tmp_path / "probed", **how)
    tune(family_model("llama"), tmp_path / "plain", probe=False, **how)
    assert history(tmp_path / "probed") == history(tmp_path / "plain")
    assert evaluations(tmp_path / "probed") == evaluations(tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights(tmp_path / "probed").items())
    assert [len(plans_of(tmp_path / name)) for name in ("probed", "plain")] == [2, 1]


def test_what_was_measured_is_the_plan_that_is_trained_by(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "run")
    before, plan = plans_of(tmp_path / "run")
    assert before.measured is None
    measured = plan.measured
    assert measured is not None
    assert [one.worst for one in measured.passes] == [True, False]  # the largest, and a typical one
    assert measured.passes[0].tokens == 8 * LONGEST
    assert 0 < measured.passes[1].tokens <= measured.passes[0].tokens
    assert measured.longest_tokens == LONGEST
    assert dict(plan.choices()) == dict(before.choices())  # it fitted, so nothing had to change
    assert plan.time.basis == "measured"
    assert plan.time.step_seconds == measured.step_seconds
    assert sum(plan.memory.terms.values()) == plan.memory.peak_bytes >= measured.passes[0].peak_bytes
    assert (
        plan.memory.terms["gradients"]
        == measured.gradient_bytes
        == sum(4 * tensor.numel() for tensor in weights(tmp_path / "run").values())
    )
    told = [(event["event"], event.get("file")) for event in RunDirectory.open(tmp_path / "run").events()]
    assert told[:4] == [("run_started", None), ("plan", "plan.json"), ("plan", "plan-2.json"), ("evaluation", None)]
    for event in events(tmp_path / "run", "evaluation") + events(tmp_path / "run", "checkpoint_saved"):
        assert event["seconds"] > 0


def test_each_rehearsal_is_told_once(family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune(family_model("llama"), tmp_path / "run", max_steps=1)
    said = capsys.readouterr().err
    for line in ("probe: the largest pass", "probe: the typical pass", "rehearsed: evaluation of", "rehearsed: saving"):
        assert said.count(line) == 1
    assert said.count("rehearsed: loading it again") == said.count("rehearsed: merging a copy") == 1
    assert left_behind(tmp_path / "run") == []


def test_a_resumed_run_is_not_probed(
    family_model: Model, tmp_path: Path, changed_model: Callable[[Change], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "run", callbacks=[SignalAt(2)])
    in_force = plans_of(tmp_path / "run")[-1]
    capsys.readouterr()
    memory = ShortMemory(10**9)
    changed_model(memory)
    FineTuner.resume(tmp_path / "run", ROWS)
    assert "probe:" not in capsys.readouterr().err
    assert len(plans_of(tmp_path / "run")) == 2
    assert len(memory.passes) == sum(passes_of(in_force, tmp_path / "run", step) for step in range(3, 7))
    assert events(tmp_path / "run", "plan")[-1]["file"] == "plan-2.json"


def passes_of(plan: Plan, run_dir: Path, step: int) -> int:
    """Forward passes of an update of ``ROWS``, cut anew here."""
    from transformers import AutoTokenizer

    from llmtune.data import encode, epoch_order, micro_batches, split

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "adapter")
    data, _ = split(encode(ROWS, tokenizer, cache_dir=run_dir.parent / "tokens"), 0.1, 42)
    epoch, place = divmod(step - 1, 3)
    rows = epoch_order(data.parts, 42, epoch)[8 * place : 8 * place + 8]
    cut = micro_batches(
        data.lengths,
        [int(row) for row in rows],
        token_budget=plan.token_budget.value,
        max_rows=plan.micro_batch_size.value,
        pad_multiple=plan.pad_multiple.value,
        pass_overhead_tokens=plan.pass_overhead_tokens.value,
    )
    return len(list(cut))


# --- when memory is short ---------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "cublas", "python"],
)
def test_out_of_memory_in_the_probe_makes_passes_smaller_and_keeps_the_batch(
    family_model: Model, tmp_path: Path, changed_model: Callable[[Change], None], error: Exception
) -> None:
    tune(family_model("llama"), tmp_path / "whole")
    memory = ShortMemory(300, error)
    changed_model(memory)
    assert tune(family_model("llama"), tmp_path / "run").status == "finished"
    before, plan = plans_of(tmp_path / "run")
    budget = plan.token_budget
    assert before.token_budget.value > 300 >= budget.value >= LONGEST
    assert budget.source == "measured"
    assert f"{budget.value:,} instead of {before.token_budget.value:,}" in budget.reason
    assert "ran out of memory" in budget.reason
    assert plan.global_batch_size == before.global_batch_size
    assert plan.accumulation.value > 1  # 8 rows of at most 64 tokens no longer go at once
    assert plan.measured is not None
    assert [one.ran_out for one in plan.measured.passes] == [True, False]  # two passes, no more
    assert memory.passes[:2] == [one.tokens for one in plan.measured.passes]
    assert max(memory.passes[1:]) <= 300  # and none ran out in training
    steps = events(tmp_path / "run", "step")
    assert [step["global_batch_size"] for step in steps] == [8, 8, 7] * 2
    assert np.abs(np.subtract(losses(tmp_path / "run"), losses(tmp_path / "whole"))).max() < 2e-6
    assert RunDirectory.open(tmp_path / "run").latest_plan()["choices"]["token_budget"]["value"] == budget.value


@pytest.mark.fault
def test_where_not_one_row_fits_the_plan_is_refused_and_tried_anew_the_next_time(
    family_model: Model, tmp_path: Path, changed_model: Callable[[Change], None]
) -> None:
    memory = ShortMemory(8)
    changed_model(memory)
    with pytest.raises(
        PlanError, match=r"one row of 64 padded tokens.*memory ran out at [\d.]+ [MG]iB, .*\(loaded .*\)\. "
    ) as no:
        tune(family_model("llama"), tmp_path / "run", token_budget=100)
    assert no.value.exit_code == 4
    assert len(memory.passes) == 2
    run = RunDirectory.open(tmp_path / "run")
    assert (run.run["status"], run.run["exit_code"]) == ("failed", 4)
    assert len(list((run.path / "failures").glob("*.txt"))) == 1
    assert left_behind(run.path) == []
    assert [event["event"] for event in run.events()] == ["run_started", "plan", "run_failed"]
    memory.tokens, memory.passes = 10**9, []
    assert tune(family_model("llama"), tmp_path / "run", token_budget=100).status == "finished"
    assert [plan.measured is not None for plan in plans_of(tmp_path / "run")] == [False, False, True]


@pytest.mark.fault
def test_memory_that_others_have_taken_is_seen_before_step_1(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prediction fits, the process is larger than any prediction knows."""
    from llmtune import Hardware

    ballast = bytearray(b"x") * 2**30
    real = facts.detect(tmp_path)
    small = Hardware.from_json(real.to_json() | {"ram_available_bytes": 2**30, "cgroup_limit_bytes": None})
    monkeypatch.setattr(facts, "detect", lambda path: small)
    with pytest.raises(PlanError, match=r"padded tokens, forward and backward: needs .* GiB, 1\.0 GiB are free"):
        tune(family_model("llama"), tmp_path / "run")
    assert len(ballast) == 2**30


# --- what one pass says about another: pure ---------------------------------------------------------------------------


def plan_of(tmp_path: Path, **changes: Any) -> tuple[Any, Plan]:
    from llmtune.finetuner import rows
    from llmtune.planning import make_plan

    config = load_config({"model": "builtin:tiny", "global_batch_size": 8, "output.root": str(tmp_path)} | changes)
    inputs = rows.inputs_of(config, ROWS)
    machine = facts.machine_of(config)
    model = facts.model_of(config, machine, inputs, download=False)
    data = facts.data_of(config, model, inputs)
    request = facts.plan_request(config, machine, model, data, processes=1)
    return request, make_plan(request)


@pytest.fixture(scope="module")
def request_and_plan(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Plan]:
    return plan_of(tmp_path_factory.mktemp("plan"))


def limited(plan: Plan, usable: int) -> Plan:
    """The plan with so many bytes for loaded things, gradients and passes."""
    later = sum(size for name, size in plan.memory.terms.items() if name in AFTER_A_PASS)
    free = int((usable + later) / USABLE_SHARE) + 2
    return replace(plan, memory=replace(plan.memory, free_bytes=free, total_bytes=2 * free))


def a_pass(tokens: int, peak: int, *, budget: int | None = None, worst: bool = True, ran_out: bool = False) -> Pass:
    return Pass(
        worst=worst,
        token_budget=budget or tokens,
        rows=1,
        tokens=tokens,
        peak_bytes=peak,
        seconds=0.5,
        ran_out=ran_out,
    )


def measurement(passes: Sequence[Pass], *, loaded: int, longest: int = LONGEST) -> Measurement:
    return Measurement(
        device="cpu",
        parameters=10**6,
        passes=tuple(passes),
        loaded_bytes=loaded,
        loaded_tensor_bytes=loaded,
        gradient_bytes=0,
        longest_tokens=longest,
        predicted_bytes=10**6,
        predicted_pass_bytes=10**6,
        predicted_step_seconds=1.0,
        update_tokens=1000.0,
        update_passes=4.0,
        optimizer_seconds=0.1,
        evaluation_seconds=2.0,
        save_seconds=1.0,
        result_bytes=100,
    )


@hypothesis_settings(deadline=None)
@given(
    per_token=st.integers(1_000, 10**7),
    constant=st.integers(0, 10**8),
    loaded=st.integers(10**6, 10**10),
    longest=st.integers(1, 100).map(lambda n: 8 * n),
    room_tokens=st.integers(1, 2000),
)
def test_whatever_memory_is_like_two_passes_settle_it(
    request_and_plan: tuple[Any, Plan], per_token: int, constant: int, loaded: int, longest: int, room_tokens: int
) -> None:
    """Memory that grows with tokens from some constant: at most two passes, and what is settled on does fit."""
    plan = request_and_plan[1]
    planned = plan.token_budget.value
    longest = min(longest, planned)
    needs = lambda tokens: loaded + constant + per_token * tokens  # noqa: E731
    usable = needs(room_tokens)
    plan = limited(plan, usable)
    passes = [a_pass(planned, needs(planned))]
    budget = budget_after(plan, longest=longest, base_bytes=loaded, passes=passes)
    if budget is not None and budget != planned:
        passes.append(a_pass(budget, needs(budget)))
        budget = budget_after(plan, longest=longest, base_bytes=loaded, passes=passes)
    if budget is None:
        assert needs(longest) > 0.99 * usable or longest + 8 > CAREFUL * room_tokens
    else:
        assert longest <= budget <= planned
        assert needs(budget) <= usable + 8 * per_token


CAREFUL = 0.9  # of the tokens that would fit, at least; what is settled on keeps clear of the edge


@given(room=st.integers(0, 10**9), ran_out=st.booleans(), peak=st.integers(10**6, 10**9))
def test_a_row_that_does_not_fit_cannot_be_made_smaller(
    request_and_plan: tuple[Any, Plan], room: int, ran_out: bool, peak: int
) -> None:
    plan = limited(request_and_plan[1], room)
    found = budget_after(plan, longest=LONGEST, base_bytes=0, passes=[a_pass(LONGEST, peak, ran_out=ran_out)])
    assert found == (None if ran_out or peak > room + 2 else LONGEST)


def test_after_two_passes_that_ran_out_rows_go_one_at_a_time(request_and_plan: tuple[Any, Plan]) -> None:
    plan = limited(request_and_plan[1], 10**9)
    passes = [a_pass(1024, 10**8, ran_out=True), a_pass(512, 10**8, ran_out=True)]
    assert budget_after(plan, longest=LONGEST, base_bytes=0, passes=passes[:1]) == 512
    assert budget_after(plan, longest=LONGEST, base_bytes=0, passes=passes) == LONGEST


@pytest.mark.parametrize("peak", [10**9 - 10**6, 10**9, 10**9 + 1])
def test_a_pass_that_takes_nothing_to_be_seen_does_not_make_budgets_larger(
    request_and_plan: tuple[Any, Plan], peak: int
) -> None:
    """What is there before it is too much already; it works in memory that the process had."""
    plan, base = limited(request_and_plan[1], 9 * 10**8), 10**9
    first = a_pass(512, peak, budget=1024)
    assert budget_after(plan, longest=LONGEST, base_bytes=base, passes=[first]) == LONGEST
    for second in (a_pass(512, peak, budget=LONGEST), a_pass(LONGEST, peak)):
        assert budget_after(plan, longest=LONGEST, base_bytes=base, passes=[first, second]) is None


def test_of_two_passes_of_one_shape_the_later_one_counts() -> None:
    cold, warm = a_pass(512, 1), replace(a_pass(512, 1, worst=False), seconds=0.2)
    other = replace(a_pass(128, 1, worst=False), seconds=0.3)
    assert measurement([cold, warm], loaded=0).step_seconds == pytest.approx(1000 * 0.2 / 512 + 0.1)
    assert measurement([cold, other], loaded=0).step_seconds == pytest.approx(1000 * 0.8 / 640 + 0.1)
    ran_out = replace(cold, ran_out=True)
    assert measurement([ran_out, other], loaded=0).step_seconds == pytest.approx(1000 * 0.3 / 128 + 0.1)
    assert measurement([ran_out], loaded=0).step_seconds is None


def test_the_new_plan_says_both_numbers_and_adds_up(request_and_plan: tuple[Any, Plan]) -> None:
    request, plan = request_and_plan
    planned = plan.token_budget.value
    plan = limited(plan, 600 * 10**6)
    measured = measurement([a_pass(planned, 900 * 10**6), a_pass(296, 500 * 10**6)], loaded=100 * 10**6)
    new = replan(request, plan, measured)
    assert (new.token_budget.value, new.token_budget.source) == (296, "measured")
    assert f"296 instead of {planned:,}" in new.token_budget.reason
    assert "858.3 MiB" in new.token_budget.reason  # what the planned budget took
    assert (new.accumulation.value, new.accumulation.source) == (4, "measured")
    assert sum(new.memory.terms.values()) == new.memory.peak_bytes
    assert new.memory.terms["forward and backward"] == 400 * 10**6
    assert new.memory.fits
    step = 1000 * (0.5 + 0.5) / (planned + 296) + 0.1  # passes of two shapes
    assert new.time.step_seconds == pytest.approx(step)
    assert new.time.terms["training"] == pytest.approx(step * plan.updates.value)
    assert new.time.total_seconds == pytest.approx(sum(new.time.terms.values()))
    assert new.time.low_seconds < new.time.total_seconds < new.time.high_seconds
    unchanged = {name for name, choice in plan.choices() if choice == dict(new.choices())[name]}
    assert {name for name, _ in plan.choices()} - unchanged == {"token_budget", "accumulation"}
    assert Plan.from_json(json.loads(json.dumps(new.to_json()))) == new
    assert replan(request, plan, measured) == new


def test_a_refusal_names_terms_and_the_nearest_plans(tmp_path: Path) -> None:
    request, plan = plan_of(tmp_path, method="lora", activation_checkpointing=False)
    measured = measurement([a_pass(LONGEST, 900 * 2**20)], loaded=200 * 2**20)
    plan = limited(replace(plan, token_budget=replace(plan.token_budget, value=LONGEST)), 10**8)
    message = r"one row of 64 .*: needs 9\d\d\.\d MiB.*\(loaded 200\.0 MiB, forward and backward 700\.0 MiB, optimizer"
    with pytest.raises(PlanError, match=message) as no:
        replan(request, plan, measured)
    offered = dict(re.findall(r"(--.*?) \(([\d.]+) MiB\)", str(no.value)))
    assert all(float(size) < 900 for size in offered.values())


def test_plans_of_before_the_probe_load_again(request_and_plan: tuple[Any, Plan]) -> None:
    plan = request_and_plan[1]
    document = plan.to_json()
    del document["measured"]
    assert Plan.from_json(document) == plan


def test_every_term_of_a_prediction_is_before_in_or_after_a_pass(request_and_plan: tuple[Any, Plan]) -> None:
    names = set(request_and_plan[1].memory.terms)
    assert names & THERE_BEFORE >= {"weights", "adapter"}
    assert names - THERE_BEFORE - OVER_BEFORE - AFTER_A_PASS >= {"gradients", "activations", "logits"}
    assert "optimizer" in AFTER_A_PASS & names


@hypothesis_settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    token_budget=st.integers(1, 200),
    max_rows=st.integers(1, 8),
    pad_multiple=st.sampled_from([1, 8, 64]),
)
def test_no_pass_is_larger_than_the_one_that_is_probed(
    lengths: list[int], token_budget: int, max_rows: int, pad_multiple: int
) -> None:
    import itertools

    def size(rows: Sequence[int]) -> int:
        return len(rows) * pass_width(max(lengths[row] for row in rows), len(rows), pad_multiple)

    found = largest_rows(
        np.array(lengths, dtype=np.int32),
        token_budget=token_budget,
        max_rows=max_rows,
        pad_multiple=pad_multiple,
        packing=False,
    )
    possible = (
        rows
        for count in range(1, max_rows + 1)
        for rows in itertools.combinations(range(len(lengths)), count)
        if count == 1 or size(rows) <= token_budget
    )
    assert size(found) == max(size(rows) for rows in possible)
    assert len(found) == len(set(found)) <= max_rows
    packed = largest_rows(
        np.array(lengths, dtype=np.int32),
        token_budget=token_budget,
        max_rows=max_rows,
        pad_multiple=1,
        packing=True,
    )
    total = sum(lengths[row] for row in packed)
    assert total <= token_budget or packed == [int(np.argmax(lengths))]
    assert len(packed) == len(set(packed)) <= max_rows


# --- rehearsals -------------------------------------------------------------------------------------------------------


def refused(
    error: type[LlmtuneError], message: str, model: Path, run_dir: Path, **how: Any
) -> pytest.ExceptionInfo[LlmtuneError]:
    """The run ends before step 1 with this error, tells it in its account and leaves nothing else."""
    with pytest.raises(error, match=message) as caught:
        tune(model, run_dir, **how)
    run = RunDirectory.open(run_dir)
    assert (run.run["status"], run.run["exit_code"]) == ("failed", error.exit_code)
    assert events(run_dir, "step") == []
    assert left_behind(run_dir) == []
    assert run.final is None
    return caught


def test_a_metric_that_fails_is_told_before_step_1(family_model: Model, tmp_path: Path) -> None:
    def mine(answers: Sequence[str], references: Sequence[str]) -> float:
        assert len(answers) == len(references) == 2
        raise ZeroDivisionError("nothing to divide by")

    def words(answers: Sequence[str], references: Sequence[str]) -> Any:
        return "good"

    how = {"metrics": {"mine": mine, "words": words}, "max_new_tokens": 4, "metric_rows": 2}
    message = r"metrics: 2 problems. 'mine' raised ZeroDivisionError: nothing to divide by.*'words' raised ValueError"
    refused(ConfigError, message, family_model("llama"), tmp_path / "run", **how)
    (trace,) = (tmp_path / "run" / "failures").glob("*.txt")
    assert "test_probe.py" in trace.read_text()  # the user's own line


@pytest.mark.fault
def test_a_result_that_cannot_be_written_is_told_before_step_1(
    family_model: Model, tmp_path: Path, changed_model: Callable[[Change], None]
) -> None:
    """Once the model is loaded, files may not grow beyond 100 kB: the tokenizer does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    changed_model(lambda model: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1])))
    try:
        message = r"cannot be written to .*run.*lost its result.*--output"
        refused(OutputError, message, family_model("llama"), tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_off(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])


def drop_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, file, metadata={"format": "pt"})


def add_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | {"stranger.weight": torch.zeros(2)}, file, metadata={"format": "pt"})


def lose_the_base(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "./nowhere"}))


def lose_the_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("method", "damage", "message"),
    [
        ("lora", flip_a_bit, r"1 weights of adapter_model.safetensors differ from those in memory"),
        ("lora", cut_off, r"adapter_model.safetensors cannot be read"),
        ("lora", drop_a_weight, r"1 weights are missing in adapter_model.safetensors"),
        ("lora", add_a_weight, r"1 weights of adapter_model.safetensors are not the model's \(stranger.weight"),
        ("lora", lose_the_base, r"adapter_config.json does not lead to its base model.*nowhere"),
        ("lora", lose_the_template, r"its tokenizer is another one"),
        ("full", flip_a_bit, r"1 weights of model.safetensors differ from those in memory"),
        ("full", cut_off, r"the model cannot be loaded"),
        ("full", drop_a_weight, r"1 missing weights"),
        ("full", add_a_weight, r"1 unexpected weights \(stranger.weight"),
    ],
)
def test_a_result_that_does_not_come_back_is_told_before_step_1(
    family_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    real = UpdateTrainer.save_final

    def save(self: UpdateTrainer, directory: Path) -> None:
        real(self, directory)
        damage(directory)

    monkeypatch.setattr(UpdateTrainer, "save_final", save)
    refused(CheckpointError, message, family_model("llama"), tmp_path / "run", method=method)


def adapted(model: Any, name: str) -> Any:
    return next(module for path, module in model.named_modules() if path.endswith(name) and hasattr(module, "lora_A"))


def merges_nothing(model: Any) -> None:
    for path, module in model.named_modules():
        if path.endswith("v_proj") and hasattr(module, "lora_A"):
            module.merge = types.MethodType(lambda self, **kwargs: self.merged_adapters.append("default"), module)


def has_no_number(model: Any) -> None:
    for path, module in model.named_modules():
        if path.endswith("v_proj") and hasattr(module, "lora_A"):
            module.get_base_layer().weight.data[0, 0] = float("nan")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (merges_nothing, r"v_proj computes something else once merged: 0\.\d"),
        (has_no_number, r"v_proj: ValueError: NaNs detected in the merged weights"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_told_before_step_1(
    family_model: Model, tmp_path: Path, changed_model: Callable[[Change], None], fault: Change, message: str
) -> None:
    changed_model(fault)
    how = {"evaluate.base": False}
    caught = refused(ModelError, message, family_model("llama"), tmp_path / "run", **how)
    assert "Nothing was trained" in str(caught.value)
    assert "q_proj" not in str(caught.value)  # those that can be merged are not named


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_merging_a_copy_leaves_the_model_alone(family_model: Model, quantization: str | None) -> None:
    from llmtune.config import RunConfig
    from llmtune.evaluation.merge import check_merge
    from llmtune.models import load_for_training, locate

    location = locate(RunConfig().model.model_copy(update={"id": str(family_model("qwen2"))}))
    model = load_for_training(
        location,
        precision="bf16",
        method="lora" if quantization is None else "qlora",
        quantization=quantization,
        rank=4,
        alpha=8,
        dropout=0.1,
        targets=("all-linear",),
        device="cpu",
    ).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    state = torch.get_rng_state()
    assert check_merge(model) == ()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert adapted(model, "q_proj").training


# --- the tools --------------------------------------------------------------------------------------------------------


def test_nothing_of_a_block_is_left_in_the_model_or_the_dice() -> None:
    class Remembers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("longest", torch.ones(3))
            self.seen = 4
            self.weight = torch.nn.Parameter(torch.ones(2))

    model = Remembers().eval()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    buffer = model.longest
    with untouched(model):
        model.train()
        model.longest = torch.zeros(3)
        buffer.zero_()
        model.seen = 99
        model.weight.grad = torch.ones(2)
        torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(model.longest, torch.ones(3))
    assert (model.seen, model.training, model.weight.grad) == (4, False, None)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


@pytest.mark.parametrize("kernel_keeps_it", [True, False])
def test_the_peak_of_a_block_is_its_own(monkeypatch: pytest.MonkeyPatch, kernel_keeps_it: bool) -> None:
    from llmtune.training import meter as module

    meter, size = MemoryMeter(torch.device("cpu")), 200 * 2**20
    held = torch.ones(size // 4)
    del held
    if not kernel_keeps_it:
        monkeypatch.setattr(module, "_reset_high_water", lambda: False)
    elif not module._reset_high_water():
        pytest.skip("this system does not let a process reset its peak (/proc/self/clear_refs)")
    before = meter.used()
    with meter.counting():
        held = torch.ones(size // 8)
        for _ in range(20):  # long enough for the sampling thread to come by
            held.add_(1)
        del held
    assert 0.9 * size / 2 <= meter.peak() - before <= 1.5 * size / 2


def test_an_error_of_another_kind_is_no_shortage_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))


# --- what is learned from runs ----------------------------------------------------------------------------------------

EXPERIENCES = st.builds(
    Experience,
    device=st.sampled_from(["Xeon", "T4"]),
    precision=st.sampled_from(["bf16", "fp32"]),
    quantization=st.sampled_from([None, "nf4"]),
    parameters=st.integers(10**6, 10**10),
    memory=st.floats(0.01, 100),
    seconds=st.floats(0.01, 100),
)
WANTED = {"device": "Xeon", "precision": "bf16", "quantization": None}


@given(experiences=st.lists(EXPERIENCES, max_size=12), parameters=st.integers(10**6, 10**10))
def test_corrections_are_sane_and_rest_on_what_is_alike(experiences: list[Experience], parameters: int) -> None:
    found = correction(experiences, parameters=parameters, **WANTED)
    assert MEMORY_RANGE[0] <= found.memory <= MEMORY_RANGE[1]
    assert SECONDS_RANGE[0] <= found.seconds <= SECONDS_RANGE[1]
    alike = [
        one
        for one in experiences
        if (one.device, one.precision, one.quantization) == ("Xeon", "bf16", None)
        and one.parameters <= 4 * parameters
        and parameters <= 4 * one.parameters
    ]
    assert (found == NO_CORRECTION) == (not alike)
    assert correction(alike, parameters=parameters, **WANTED) == found  # the others do not matter
    if alike:
        count = "one earlier run" if len(alike) == 1 else f"{min(len(alike), 5)} earlier runs"
        assert found.reason.startswith(count)


@given(one=EXPERIENCES, count=st.integers(1, 9))
def test_runs_that_agree_are_believed_within_limits(one: Experience, count: int) -> None:
    asked = {"device": one.device, "precision": one.precision, "quantization": one.quantization}
    found = correction([one] * count, parameters=one.parameters, **asked)
    assert found.memory == min(max(one.memory, MEMORY_RANGE[0]), MEMORY_RANGE[1])
    assert found.seconds == min(max(one.seconds, SECONDS_RANGE[0]), SECONDS_RANGE[1])
    assert Experience.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_a_run_teaches_the_formulas_and_not_what_mended_them(request_and_plan: tuple[Any, Plan]) -> None:
    """What a corrected prediction missed by is measured against the formula again, or factors would pile up."""
    plan = request_and_plan[1]
    applied = Correction(memory=2.0, seconds=3.0, basis="runs", reason="")
    plain, mended = formula_of(plan, NO_CORRECTION), formula_of(plan, applied)
    assert mended.pass_bytes == pytest.approx(plain.pass_bytes / 2, abs=1)
    assert mended.step_seconds == pytest.approx(plain.step_seconds / 3)
    measured = measurement([a_pass(1000, 3 * 10**6)], loaded=10**6)
    learned = experience(measured, precision="bf16", quantization=None, step_seconds=2.5, peak_bytes=None)
    assert (learned.memory, learned.seconds) == (2.0, 2.5)
    more = experience(measured, precision="bf16", quantization=None, step_seconds=None, peak_bytes=5 * 10**6)
    assert (more.memory, more.seconds) == (4.0, pytest.approx(0.6))


def test_a_second_run_uses_what_the_first_one_measured(
    family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request, _ = plan_of(tmp_path, model=str(family_model("llama")), precision="fp32")
    assert request.correction == NO_CORRECTION
    tune(family_model("llama"), tmp_path / "first", max_steps=3)
    document = RunDirectory.open(tmp_path / "first").run
    steps = events(tmp_path / "first", "step")
    assert document["measured"]["steps"] == 3
    assert document["measured"]["training_seconds"] == pytest.approx(sum(step["step_seconds"] for step in steps))
    assert document["measured"]["memory_bytes"] == max(step["memory_bytes"] for step in steps)
    learned = Experience.from_json(document["experience"])
    plan = plans_of(tmp_path / "first")[-1]
    assert plan.measured is not None
    assert learned.seconds == pytest.approx(document["measured"]["step_seconds"] / plan.measured.predicted_step_seconds)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    (tmp_path / "llmtune.db").unlink(missing_ok=True)  # nothing rests on the store
    capsys.readouterr()
    tune(family_model("llama"), tmp_path / "second", max_steps=1)
    assert capsys.readouterr().err.count("predictions: one earlier run here with a model of similar size took") == 1
    (tmp_path / "second" / "run.json").unlink()
    request, _ = plan_of(tmp_path, model=str(family_model("llama")), precision="fp32")
    assert request.correction.basis == "runs"
    assert request.correction.reason.startswith("one earlier run here")
    assert request.correction.seconds == min(max(learned.seconds, SECONDS_RANGE[0]), SECONDS_RANGE[1])
    other, _ = plan_of(tmp_path, model=str(family_model("llama")), precision="bf16")
    assert other.correction == NO_CORRECTION


@pytest.mark.slow
def test_two_processes_probe_together(tmp_path: Path) -> None:
    import sys

    from test_distributed import train

    from llmtune.hardware import accelerate_config_path

    data = tmp_path / "lamps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", str(accelerate_config_path("cpu_ddp"))]
    probed = train(data, tmp_path / "probed", *launcher)
    assert probed.returncode == 0, probed.stderr
    plain = train(data, tmp_path / "plain", *launcher, extra=("--set", "train.probe=false"))
    assert plain.returncode == 0, plain.stderr
    assert history(tmp_path / "probed") == history(tmp_path / "plain")
    assert probed.stderr.count("probe: the largest pass") == 1
    assert probed.stderr.count("rehearsed: loading it again") == 1
    (_, plan) = plans_of(tmp_path / "probed")
    assert plan.measured is not None
    assert len(plan.measured.passes) == 2
    assert left_behind(tmp_path / "probed") == []
