"""``model=auto`` stays the same model for the same command, and a plan says what a model that is not here will take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from machines import gpu, machine, planned, request_for

from llmtune import FineTuner, Hardware
from llmtune.data.split import held_out_rows
from llmtune.errors import PlanError
from llmtune.finetuner import account, facts, rows
from llmtune.models import Download, download_of, spec_from_entry
from llmtune.planning import Plan, make_plan
from llmtune.presets import find_entry
from llmtune.runs import RunDirectory
from llmtune.units import GIB

MODEL = "Qwen/Qwen3-0.6B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub, and an empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "lamps.jsonl"
    texts = ({"question": f"Who keeps lamp {n}?", "answer": f"Keeper number {n * n} keeps it."} for n in range(400))
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def with_free(memory: float, free: float) -> Hardware:
    """A machine with one GPU of so much memory, of which so much is free, in GiB."""
    accelerator = replace(gpu("NVIDIA RTX", memory), free_bytes=int(free * GIB))
    return machine(accelerator, ram=64)


def begun(data: Path, plan: Plan, *, output: Path | None = None, status: str = "running", **settings: Any) -> Path:
    """A run directory as ``train`` leaves it that was stopped with this plan."""
    if output is not None:
        settings["output"] = str(output)
    tuner = FineTuner(data, **settings)
    inputs = rows.inputs_of(tuner.config, None)
    run = RunDirectory.create(output or Path("runs") / "begun", identity={"model": plan.model.value})
    account.begin(run, config=tuner.config, plan=plan, fingerprint=inputs.fingerprint, hardware=with_free(24, 20))
    run.update_run(status=status)
    return run.path


# ------------------------------------------------------------------ the choice stays


def test_a_little_more_or_less_free_memory_is_the_same_model(data: Path) -> None:
    for memory in (8, 24, 80):
        step = memory / facts.MEMORY_STEPS
        chosen = {
            FineTuner(data).plan(with_free(memory, 15 * step + share * step)).model.value
            for share in (0.01, 0.3, 0.6, 0.99)
        }
        assert len(chosen) == 1, memory


def test_much_less_free_memory_is_another_model_that_fits(data: Path) -> None:
    roomy, tight = (FineTuner(data).plan(with_free(24, free)) for free in (23, 3))
    assert roomy.fits
    assert tight.fits
    assert find_entry(roomy.model.value).parameters > find_entry(tight.model.value).parameters


def test_a_model_that_fits_without_a_margin_is_still_found(data: Path) -> None:
    """Where nothing fits the whole steps, the exact amount decides."""
    with pytest.raises(PlanError) as refused:
        FineTuner(data).plan(with_free(24, 0.1))
    found = re.search(r"would need ([\d.]+) ([GM])iB free", str(refused.value))
    assert found is not None
    needed = float(found[1]) * (1 if found[2] == "G" else 1 / 1024)
    memory = 0.9 * needed * facts.MEMORY_STEPS  # one step is too little, and two are more than is free
    assert FineTuner(data).plan(with_free(memory, 1.1 * needed)).fits


def test_a_begun_run_keeps_its_model_when_memory_moves(data: Path) -> None:
    first = FineTuner(data).plan(with_free(24, 23))
    path = begun(data, first)
    again = FineTuner(data).plan(with_free(24, 4))
    assert again.model.value == first.model.value
    assert again.model.reason == f"{path.relative_to(Path.cwd())} has begun with it and is not finished"


def test_a_begun_run_with_a_directory_of_its_own_keeps_its_model(data: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "run"
    first = FineTuner(data).plan(with_free(24, 23))
    begun(data, first, output=elsewhere)
    for more in ({}, {"max_steps": 500}, {"learning_rate": 1e-5}):
        again = FineTuner(data, output=str(elsewhere), **more).plan(with_free(24, 4))
        assert again.model.value == first.model.value
    RunDirectory.open(elsewhere).update_run(status="finished")
    assert FineTuner(data, output=str(elsewhere)).plan(with_free(24, 4)).model.value == first.model.value
    fresh = FineTuner(data, output=str(tmp_path / "other")).plan(with_free(24, 4))
    assert fresh.model.value != first.model.value


@pytest.mark.parametrize(
    "change",
    [
        {"status": "finished"},
        {"rank": 4},
        {"resume": "never"},
        {"rows": '{"question": "Who?", "answer": "Nobody at all."}\n'},
    ],
    ids=str,
)
def test_another_command_chooses_anew(data: Path, change: dict[str, Any]) -> None:
    first = FineTuner(data).plan(with_free(24, 23))
    begun(data, first, status=change.pop("status", "running"))
    data.write_text(data.read_text() + change.pop("rows", ""))
    again = FineTuner(data, **change).plan(with_free(24, 4))
    assert again.model.value != first.model.value


def test_plan_and_init_choose_the_same_model(data: Path) -> None:
    from llmtune.wizard import Limits, Wizard

    hardware = with_free(24, 17.3)
    tuner = FineTuner(data)
    inputs = rows.inputs_of(tuner.config, None)
    here = facts.machine_of(tuner.config, hardware)
    wizard = Wizard(machine=here, inputs=inputs, report=rows.check_data(inputs), limits=Limits())
    draft = wizard.draft(tuner.config, "llmtune.yaml")
    assert draft.plan.model.value == tuner.plan(hardware).model.value


# ------------------------------------------------------------------ rows of a model that is not here


@given(st.integers(2, 3_000), st.floats(0.001, 0.9))
def test_as_many_rows_are_held_out_as_in_training(count: int, share: float) -> None:
    contents = np.arange(count, dtype=np.uint64)
    held = held_out_rows(np.arange(count), contents, share, 42)
    assert rows.num_held_out(count, share) == len(held)


@pytest.mark.parametrize("share", [None, 0.25, 0])
def test_a_plan_counts_the_rows_that_training_counts(data: Path, share: float | None) -> None:
    asked = {} if share is None else {"eval_fraction": share}
    estimated = FineTuner(data, model=MODEL, **asked).plan()
    counted = FineTuner(data, model="builtin:tiny", **asked).plan()
    assert any("estimated from bytes" in notice for notice in estimated.notices)
    assert estimated.data_size.reason == counted.data_size.reason
    assert estimated.data_size.reason == f"{400 - round(400 * (0.1 if share is None else share)):,} training rows"


def test_evaluation_data_of_its_own_holds_nothing_out(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "Who keeps the gate?", "answer": "Nobody keeps it."}\n')
    plan = FineTuner(data, model=MODEL, eval_path=str(other)).plan()
    assert plan.data_size.reason == "400 training rows"


# ------------------------------------------------------------------ what has to be downloaded


def cached(cache: Path, **files: str) -> None:
    """Files of the model in a cache laid out as the Hub's client lays it out."""
    repository = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True, exist_ok=True)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        (snapshot / name).write_text(text)


def wanted(output: str = "runs") -> Download | None:
    return download_of(spec_from_entry(find_entry(MODEL)), output=output)


def test_what_is_not_in_the_cache_has_to_be_fetched(cache: Path) -> None:
    parameters = find_entry(MODEL).parameters
    found = wanted()
    assert found is not None
    assert (found.bytes, found.directory, found.shares_disk) == (2 * parameters, str(cache), True)
    assert found.free_bytes
    cached(cache, **{"config.json": "{}"})
    without_weights = wanted()
    assert without_weights is not None
    assert without_weights.bytes == found.bytes
    parts = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "3.safetensors", "d": "4.safetensors"}}
    cached(cache, **{"model.safetensors.index.json": json.dumps(parts), "1.safetensors": ""})
    part = wanted()
    assert part is not None
    assert part.bytes == round(0.75 * 2 * parameters)
    cached(cache, **{f"{n}.safetensors": "" for n in (2, 3, 4)})
    assert wanted() is None


def test_one_file_with_all_weights_is_enough(cache: Path) -> None:
    cached(cache, **{"model.safetensors": ""})
    assert wanted() is None


def test_a_plan_says_what_it_downloads(data: Path, cache: Path) -> None:
    plan = FineTuner(data, model=MODEL).plan()
    (notice,) = [text for text in plan.notices if "downloaded to" in text]
    assert notice.startswith("About 1.1 GiB of weights will be downloaded to ")
    assert str(cache) in notice
    assert plan.to_json()["download"]["bytes"] == 2 * find_entry(MODEL).parameters
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert FineTuner(data, model="builtin:tiny").plan().to_json()["download"] is None
    elsewhere = FineTuner(data, model=MODEL).plan(with_free(24, 23))
    assert elsewhere.download is not None
    assert elsewhere.download.free_bytes is None
    assert not any("free" in text for text in elsewhere.notices if "downloaded" in text)


def test_a_disk_without_room_is_a_warning_in_a_plan_and_ends_training() -> None:
    request = request_for(MODEL)
    plain = planned(MODEL)
    short = Download(bytes=2 * GIB, directory="/cache", free_bytes=GIB, shares_disk=False)
    plan = make_plan(replace(request, download=short))
    (notice,) = [text for text in plan.notices if "/cache" in text]
    assert notice.startswith("2.0 GiB of weights do not fit on the disk of /cache: 1.0 GiB are free.")
    assert notice.endswith("Training would refuse to start.")
    plan.require_fit()
    with pytest.raises(PlanError, match="HF_HOME=DIR") as refused:
        plan.require_room_to_download()
    assert refused.value.exit_code == 4
    room = Download(bytes=2 * GIB, directory="/cache", free_bytes=2 * GIB + plain.disk_bytes, shares_disk=True)
    make_plan(replace(request, download=room)).require_room_to_download()
    with pytest.raises(PlanError, match="of checkpoints and result do not fit"):
        make_plan(replace(request, download=replace(room, bytes=2 * GIB + 1))).require_room_to_download()
