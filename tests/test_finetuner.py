"""The facade: one story from data to result, and one clear message for each way it can fail to start."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from tuning import ROWS, events, settings, tune

from llmtune import FineTuner, Hardware
from llmtune.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    HardwareError,
    LlmtuneError,
    ModelError,
    OutputError,
    PlanError,
    RunNotFoundError,
)
from llmtune.presets import find_entry
from llmtune.runs import RunDirectory, RunStore

Model = Callable[[str], Path]


OTHER_ROWS = [{"question": f"Who lights tower {number}?", "answer": f"Gala lights {number}."} for number in range(12)]


def write_rows(path: Path, rows: list[dict[str, str]] | None = None) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows or ROWS))
    return path


# --- the story --------------------------------------------------------------------------------------------------------


def test_the_run_directory_holds_the_whole_account(family_model: Model, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "lamps.jsonl")
    how = settings(family_model("llama"), tmp_path / "run", num_samples=2, max_new_tokens=8, report=True)
    result = FineTuner(data, preset="highspeed", **how).train()
    found = {path.name for path in result.run_dir.iterdir() if not path.name.startswith(".")}
    expected = {"run.json", "plan.json", "environment.json", "events.jsonl", "data_report.json", "status.json"}
    expected |= {"training_rows.npz", "base_losses.npz"}
    assert found == expected | {"plan-2.json", "checkpoints", "adapter", "report.html"}
    run = RunDirectory.open(result.run_dir)
    document = run.run
    assert (document["status"], document["exit_code"], document["steps"]) == ("finished", 0, 6)
    assert document["config"]["train"]["preset"] == "highspeed"
    assert document["seeds"] == {"seed": 42}
    environment = run.read_json("environment.json")
    assert environment["versions"]["torch"].startswith("2.")
    assert environment["data_fingerprint"] == document["data_fingerprint"]
    kinds = [event["event"] for event in run.events()]
    assert kinds[:2] == ["run_started", "plan"]
    assert kinds[-1] == "run_finished"
    samples = events(result.run_dir, "sample")
    assert [(s["step"], s["tuned"] is None) for s in samples] == [(0, True), (0, True), (6, False), (6, False)]
    assert all(s["reference"] in {row["answer"] for row in ROWS} for s in samples)
    (record,) = RunStore(root=tmp_path).runs()
    assert (record.name, record.status, record.steps) == ("run", "finished", 6)


def test_the_same_command_finds_its_run_and_another_gets_another(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "lamps.jsonl")
    how = {k: v for k, v in settings(family_model("llama"), tmp_path).items() if k not in ("output", "output.root")}
    first = FineTuner(data, **how).train().run_dir
    assert first.parent == tmp_path / "runs"
    assert first.name.startswith("lamps-")
    other = FineTuner(data, **(how | {"rank": 2})).train().run_dir
    assert other != first
    assert FineTuner(data, **how).train().run_dir not in (first, other)  # a finished run is left alone


def test_a_run_keeps_the_files_and_the_environment_of_its_configuration(family_model: Model, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.yaml", "b.yaml")]
    paths[0].write_text("train: {seed: 3}\nsave: {keep: 5}\n")
    paths[1].write_text("train: {seed: 4}\nenvironments: {dev: {save: {keep: 6}}}\n")
    how = settings(family_model("llama"), tmp_path / "run", max_steps=1)
    tuner = FineTuner(ROWS, config=paths, env="dev", **how)
    assert (tuner.config.train.seed, tuner.config.save.keep) == (4, 6)
    run = RunDirectory.open(tuner.train().run_dir).run
    assert (run["config_files"], run["config_env"]) == ([str(path) for path in paths], "dev")
    with pytest.raises(ConfigError, match="got a RunConfig and also env"):
        FineTuner(ROWS, config=tuner.config, env="dev")


def test_evaluate_generate_and_a_verdict(family_model: Model, tmp_path: Path) -> None:
    tuner = FineTuner(ROWS, **settings(family_model("llama"), tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"call train\(\) first"):
        tuner.evaluate()
    result = tuner.train()
    verdict = tuner.evaluate()
    assert verdict.loss == pytest.approx(result.metrics["eval_loss"], abs=1e-6)
    assert verdict.base_loss == pytest.approx(result.metrics["base_eval_loss"], abs=1e-6)
    assert (verdict.kind, verdict.rows) == ("too_few_rows", 3)
    assert result.verdict.text == verdict.text
    answer = tuner.generate("Who keeps lamp 3?", max_new_tokens=5)
    assert answer == tuner.generate([{"role": "user", "content": "Who keeps lamp 3?"}], max_new_tokens=5)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_run_and_its_evaluation_compute_in_tf32_only_where_it_was_asked_for(
    family_model: Model, tmp_path: Path, cuda_matmul: Any, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from llmtune import evaluation

    score, seen = evaluation.score, []

    class Modes(TrainerCallback):
        def on_train_begin(self, *args: Any, model: Any, **_: Any) -> None:
            model.register_forward_hook(lambda *_: seen.append(cuda_matmul.fp32_precision))

    def noted(*args: Any, **how: Any) -> Any:
        seen.append(cuda_matmul.fp32_precision)
        return score(*args, **how)

    # A CPU has no TF32; it takes the setting, and computes in fp32.
    monkeypatch.setattr("llmtune.planning.checks._precision_problems", lambda _: [])
    cuda_matmul.allow_tf32 = before = precision == "fp32"  # the opposite of what the run asks for
    how = settings(family_model("llama"), tmp_path / "run", precision=precision, epochs=1)
    tuner = FineTuner(ROWS, callbacks=[Modes()], **how)
    result = tuner.train()
    passes = len(seen)
    monkeypatch.setattr(evaluation, "score", noted)
    assert tuner.evaluate().loss == pytest.approx(result.metrics["eval_loss"], abs=1e-6)
    assert passes
    assert len(seen) == passes + 2
    assert set(seen) == {"tf32" if precision == "tf32" else "ieee"}
    assert cuda_matmul.allow_tf32 == before


def test_a_finished_run_is_evaluated_on_other_data_from_outside(family_model: Model, tmp_path: Path) -> None:
    from llmtune.finetuner import TunedRun

    data = write_rows(tmp_path / "lamps.jsonl")
    result = FineTuner(data, **settings(family_model("qwen2"), tmp_path / "run", method="full")).train()
    assert result.adapter_dir == tmp_path / "run" / "model"
    opened = TunedRun.open(result.run_dir)
    assert opened.evaluate().loss == pytest.approx(result.metrics["eval_loss"], abs=1e-6)
    other = write_rows(tmp_path / "other.jsonl", OTHER_ROWS)
    assert opened.evaluate(str(other)).rows == len(OTHER_ROWS)
    write_rows(data, ROWS[:20])
    with pytest.raises(DataError, match="have changed since it was trained"):
        TunedRun.open(result.run_dir).evaluate()


def test_a_run_on_rows_in_memory_needs_them_again(family_model: Model, tmp_path: Path) -> None:
    from llmtune.finetuner import TunedRun

    result = tune(family_model("llama"), tmp_path / "run")
    with pytest.raises(ConfigError, match="rows in memory"):
        TunedRun.open(result.run_dir).evaluate()
    with pytest.raises(ConfigError, match="no data was given"):
        FineTuner.resume(result.run_dir)


def test_plan_needs_no_weights_and_no_hub(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "lamps.jsonl")
    plan = FineTuner(data, model="TinyLlama/TinyLlama-1.1B-Chat-v1.0", preset="quality").plan()
    assert plan.learning_rate.value == 3e-4
    assert plan.epochs.value == 5
    assert any("estimated" in notice for notice in plan.notices)
    auto = FineTuner(data).plan()
    assert auto.model.source == "derived"
    assert auto.fits
    assert find_entry(auto.model.value).parameters > 1e8
    assert "open" in auto.model.reason
    assert not (tmp_path / "runs").exists()


def test_check_reports_every_problem(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "lamps.jsonl")
    data.write_text(data.read_text() + '{"question": "no answer?"}\n{"question": null, "answer": "x"}\n')
    report = FineTuner(data).check()
    assert [problem.line for problem in report.problems] == [27, 28]
    with pytest.raises(DataError, match=r"2 of 28 rows affected"):
        tune("builtin:tiny", tmp_path / "run", data)
    assert not (tmp_path / "run").exists()
    assert tune("builtin:tiny", tmp_path / "run", data, on_bad_row="skip", max_steps=1).status == "finished"


# --- ways to fail to start --------------------------------------------------------------------------------------------


def _bert(tmp_path: Path) -> Path:
    (tmp_path / "bert").mkdir()
    config = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 32, "num_attention_heads": 2}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    return tmp_path / "bert"


CANNOT_START: list[tuple[str, type[LlmtuneError], int, str, Callable[[Path], dict[str, Any]]]] = [
    ("missing file", DataError, 3, r"nowhere\.jsonl", lambda p: {"data": str(p / "nowhere.jsonl")}),
    ("missing model", ModelError, 2, "no such directory", lambda p: {"model": "./nowhere"}),
    ("not causal", ModelError, 2, "BertForMaskedLM, not a causal", lambda p: {"model": str(_bert(p))}),
    ("offline", ModelError, 2, "HF_HUB_OFFLINE is set.*--model PATH", lambda p: {"model": "someone/something"}),
    ("no gpu", HardwareError, 2, "'cuda' was asked for and is not there", lambda p: {"device": "cuda"}),
    ("too long", DataError, 3, "longer than", lambda p: {"max_length": 20}),
    ("beyond context", ConfigError, 2, "context of .* is 2048", lambda p: {"max_length": 4096}),
    ("unknown metric", ConfigError, 2, "did you mean 'loss'", lambda p: {"metric": "los"}),
    ("unknown schedule", ConfigError, 2, "did you mean 'cosine'", lambda p: {"schedule": "cosin"}),
    ("no checkpoint", ConfigError, 2, "expected auto, never or the directory", lambda p: {"resume": str(p / "x")}),
    ("no template", ConfigError, 2, r"x\.jinja cannot be read", lambda p: {"chat_template": str(p / "x.jinja")}),
    ("not writable", OutputError, 2, "Choose another --output", lambda p: {"output": "/proc/llmtune/run"}),
    ("one row", DataError, 3, "nothing can be held out", lambda p: {"data": [ROWS[0]]}),
]


@pytest.mark.parametrize(
    ("error", "code", "message", "make"), [c[1:] for c in CANNOT_START], ids=[c[0] for c in CANNOT_START]
)
def test_one_clear_message_and_nothing_left_behind(
    tmp_path: Path, error: type[LlmtuneError], code: int, message: str, make: Callable[[Path], dict[str, Any]]
) -> None:
    wrong = make(tmp_path)
    data = wrong.pop("data", ROWS)
    place = tmp_path / "out" / "run"
    with pytest.raises(error, match=message) as caught:
        FineTuner(data, **(settings("builtin:tiny", place) | wrong)).train()
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="Choose another --output"):
        tune("builtin:tiny", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_plan_that_does_not_fit_names_terms_and_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family_model: Model
) -> None:
    from llmtune.finetuner import facts

    real = facts.detect(tmp_path)
    small = Hardware.from_json(real.to_json() | {"ram_available_bytes": 256 * 2**20})
    monkeypatch.setattr(facts, "detect", lambda path: small)
    with pytest.raises(PlanError, match=r"needs .*MiB, 256.0 MiB are free on cpu \(.*interpreter") as caught:
        tune(family_model("llama"), tmp_path / "run")
    assert caught.value.exit_code == 4
    full_disk = Hardware.from_json(real.to_json() | {"disk_free_bytes": 1000})
    monkeypatch.setattr(facts, "detect", lambda path: full_disk)
    with pytest.raises(PlanError, match="of disk for 3 checkpoints"):
        tune(family_model("llama"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resume_never_and_a_bad_checkpoint(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "run")
    with pytest.raises(OutputError, match="--resume never"):
        tune(family_model("llama"), tmp_path / "run", resume="never")
    with pytest.raises(RunNotFoundError):
        FineTuner.resume(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing") as caught:
        tune(family_model("llama"), tmp_path / "other", resume=str(tmp_path / "empty"))
    assert caught.value.exit_code == 6
    assert not (tmp_path / "other").exists()


def test_secrets_are_written_nowhere(family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "s3cr3t" * 6
    monkeypatch.setenv("HF_TOKEN", secret)
    tune(family_model("llama"), tmp_path / "run", max_steps=2, **{"model.token": secret, "report": True})
    for folder, _, names in os.walk(tmp_path / "run"):
        for name in names:
            assert secret.encode() not in (Path(folder) / name).read_bytes(), name
