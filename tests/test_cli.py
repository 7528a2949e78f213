"""The command line as a user meets it: exit codes, one message per error, JSON on stdout, light start."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.builtin import demo_heldout_path, demo_train_path
from llmtune.cli import main
from llmtune.cli.program import INTERRUPTED, PIPE_CLOSED, commands
from llmtune.console import speaker
from llmtune.hardware import detect
from llmtune.runs import RunDirectory

COMMANDS = (
    *("train", "resume", "plan", "demo", "init", "check", "preview", "runs", "show", "report"),
    *("checkpoints", "verify-resume", "eval", "chat", "study", "doctor", "presets", "accelerate-config"),
)
HEAVY = ("torch", "transformers", "datasets", "peft", "optuna", "accelerate", "sqlalchemy", "plotly", "numpy", "rich")
GOOD = '{"prompt": "a", "completion": "b"}\n'
ROWS = "".join(f'{{"prompt": "number {i}", "completion": "{i} it is"}}\n' for i in range(40))
CHAT = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
UNANSWERED = '{"messages": [{"role": "user", "content": "hi"}]}\n'
TINY = ("--model", "builtin:tiny", "--max-steps", "1")


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LLMTUNE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path.parent / f"{tmp_path.name}-cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    yield
    speaker.quiet = speaker.muted = False


@pytest.fixture
def rows() -> str:
    Path("rows.jsonl").write_text(ROWS)
    return "rows.jsonl"


def program(*arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llmtune", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **settings,
    )


# ---------------------------------------------------------------------- help and start


def test_the_commands_are_those_of_the_contract():
    assert sorted(commands().commands) == sorted(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example:\n    {'accelerate launch' if name == 'accelerate-config' else f'llmtune {name}'}" in text
    assert "--quiet" in text
    assert "--debug" in text


def test_without_arguments_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "Commands:" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom llmtune.cli import main\n"
        "assert main(['--help']) == 0 and main(['train', '--help']) == 0\n"
        f"sys.stderr.write(','.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""


def test_module_and_version():
    done = program("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("llmtune ")


# ---------------------------------------------------------------------- bad input: one message, right code, no debris


def _files() -> None:
    Path("empty.jsonl").touch()
    Path("rows.jsonl").write_text(ROWS)
    Path("odd.jsonl").write_text('{"foo": 1}\n')
    Path("mixed.jsonl").write_text(GOOD + CHAT)
    Path("file").touch()
    Path("folder").mkdir()
    Path("good.yaml").write_text("environments: {dev: {epochs: 1}, prod: {epochs: 3}}\n")
    Path("bad.yaml").write_text("train: {learing_rate: 1.0e-4}\ndata: {max_length: -1}\n")


BAD_INPUT = {
    "no command": (["trian"], 2, ["no such command 'trian'", "did you mean 'train'"]),
    "no option": (["train", "rows.jsonl", "--prest", "quality"], 2, ["--prest", "did you mean --preset"]),
    "a key as an option": (["train", "rows.jsonl", "--lr", "1e-4"], 2, ["--lr", "--set train.learning_rate=VALUE"]),
    "another toolkit's option": (
        ["train", "rows.jsonl", "--gradient-accumulation-steps", "4"],
        2,
        ["--gradient-accumulation-steps", "give train.global_batch_size"],
    ),
    "no global option": (["--bogus"], 2, ["no such option --bogus"]),
    "no value": (["train", "rows.jsonl", "--seed"], 2, ["--seed", "requires an argument"]),
    "no number": (["train", "rows.jsonl", "--seed", "x"], 2, ["--seed"]),
    "two data": (["train", "rows.jsonl", "rows.jsonl"], 2, ["unexpected extra argument"]),
    "no data": (["check"], 2, ["DATA"]),
    "missing file": (["train", "row.jsonl"], 3, ["row.jsonl: no such file", "'rows.jsonl'"]),
    "missing evaluation file": (["plan", "rows.jsonl", "--eval-data", "no.jsonl"], 3, ["no.jsonl: no such file"]),
    "empty file": (["check", "empty.jsonl"], 3, ["empty.jsonl: the file is empty"]),
    "unknown format": (["check", "odd.jsonl"], 3, ["odd.jsonl:1", "'foo'", "data.columns.prompt"]),
    "wrong format name": (["check", "rows.jsonl", "--format", "chatt"], 2, ["chatt"]),
    "unknown preset": (["train", "rows.jsonl", "--preset", "fast"], 2, ["train.preset: got 'fast'", "highspeed"]),
    "unknown method": (["plan", "rows.jsonl", "--method", "lra"], 2, ["train.method: got 'lra'", "qlora"]),
    "unknown key": (["train", "rows.jsonl", "--set", "epoch=3"], 2, ["epoch: unknown key", "did you mean 'epochs'"]),
    "no key": (["train", "rows.jsonl", "--set", "epochs"], 2, ["--set", "expected key=value"]),
    "negative steps": (["train", "rows.jsonl", "--max-steps", "-1"], 2, ["train.max_steps: got -1", ">= 1"]),
    "negative and zero": (
        ["train", "rows.jsonl", "--set", "epochs=-1", "--set", "rank=0"],
        2,
        ["2 problems", "train.epochs: got -1", "adapter.rank: got 0"],
    ),
    "bad file": (
        ["train", "rows.jsonl", "--config", "bad.yaml"],
        2,
        ["bad.yaml", "did you mean 'learning_rate'", "data.max_length: got -1"],
    ),
    "no config file": (["train", "--config", "no.yaml"], 2, ["no.yaml", "no such file"]),
    "no environment": (
        ["train", "rows.jsonl", "--config", "good.yaml", "--env", "prd"],
        2,
        ["--env: got 'prd'", "expected dev or prod", "did you mean 'prod'"],
    ),
    "no environments": (["plan", "rows.jsonl", "--env", "dev"], 2, ["--env: got 'dev'", "--config"]),
    "no hardware file": (["plan", "rows.jsonl", "--hardware", "no.json"], 2, ["no.json", "llmtune doctor --json"]),
    "unknown run": (["show", "orders-tiny"], 2, ["no run 'orders-tiny'", "llmtune runs"]),
    "folder without run": (["resume", "folder"], 2, ["no run 'folder'", "no run.json"]),
    "unknown status": (["runs", "--status", "finishd"], 2, ["did you mean 'finished'"]),
    "unknown accelerate config": (["accelerate-config", "cpu_dd"], 2, ["did you mean 'cpu_ddp'"]),
    "unknown family": (["presets", "qwem"], 2, ["did you mean 'qwen'"]),
    "unknown sampler": (["study", "rows.jsonl", "--sampler", "tpa"], 2, ["tpa", "did you mean 'tpe'"]),
    "no trials": (["study", "rows.jsonl", "--trials", "0"], 2, ["--trials"]),
    "fix into itself": (["check", "rows.jsonl", "--fix", "rows.jsonl", "--quiet"], 2, ["--fix", "new .jsonl file"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case, capsys):
    _files()
    before = sorted(os.listdir())
    arguments, code, fragments = BAD_INPUT[case]
    assert main(arguments) == code
    _is_one_message(capsys.readouterr().err, fragments)
    assert sorted(os.listdir()) == before


def test_every_command_with_a_configuration_takes_several_and_an_environment():
    group = commands()
    taking = {
        name: {option: one for one in command.params for option in one.opts}
        for name, command in group.commands.items()
        if any("--config" in one.opts for one in command.params)
    }
    assert taking.keys() >= {"train", "plan", "check", "preview", "study", "verify-resume"}
    assert all(options["--config"].multiple and "--env" in options for options in taking.values())


def test_the_file_that_decided_is_named(rows, capsys):
    Path("a.yaml").write_text("data: {path: rows.jsonl, format: chat}\nenvironments: {dev: {format: alpaca}}\n")
    Path("b.yaml").write_text("data: {format: prompt_completion}\n")
    assert main(["check", "--config", "a.yaml", "--config", "b.yaml", "--env", "dev"]) == 0
    said = capsys.readouterr().err
    chain = "prompt_completion of b.yaml replaces alpaca of a.yaml (environments.dev) and chat of a.yaml"
    assert f"data.format: {chain}" in said


SLOW_BAD_INPUT = {
    "mixed formats": (["train", "mixed.jsonl", *TINY], 3, ["mixed.jsonl:2", "prompt/completion"]),
    "no model directory": (["train", "rows.jsonl", "--model", "./nowhere"], 2, ["'./nowhere': no such directory"]),
    "not a model": (["train", "rows.jsonl", "--model", "folder"], 2, ["folder", "config.json"]),
    "not causal": (["train", "rows.jsonl", "--model", "bert"], 2, ["BertForMaskedLM", "not a causal language model"]),
    "hub unreachable": (["train", "rows.jsonl", "--model", "org/model"], 2, ["HF_HUB_OFFLINE", "builtin:tiny"]),
    "no builtin": (["plan", "rows.jsonl", "--model", "builtin:huge"], 2, ["the only builtin model is 'builtin:tiny'"]),
    "output is a file": (["train", "rows.jsonl", *TINY, "--output", "file"], 2, ["file", "another --output"]),
    "no checkpoint": (["train", "rows.jsonl", *TINY, "--resume", "nowhere"], 2, ["--resume: got 'nowhere'"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_BAD_INPUT)
def test_bad_input_that_is_seen_after_loading_the_libraries(case):
    from transformers import BertConfig

    _files()
    BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=99,
        architectures=["BertForMaskedLM"],
    ).save_pretrained("bert")
    before = sorted(os.listdir())
    arguments, code, fragments = SLOW_BAD_INPUT[case]
    done = program(*arguments, "--json", "--quiet")
    assert done.returncode == code
    assert done.stdout == ""
    _is_one_message(done.stderr, fragments)
    assert sorted(os.listdir()) == before


@pytest.mark.slow
@pytest.mark.skipif(bool(detect().accelerators), reason="this machine has an accelerator")
def test_a_gpu_that_is_not_there(rows):
    done = program("train", rows, *TINY, "--set", "device=cuda")
    assert done.returncode == 2
    _is_one_message(done.stderr, ["HardwareError", "device 'cuda' was asked for and is not there"])
    assert os.listdir() == [rows]


def _is_one_message(stderr: str, fragments: list[str]) -> None:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert re.match(r"[A-Z]\w+Error: ", lines[0])
    for fragment in fragments:
        assert fragment in lines[0]


# ---------------------------------------------------------------------- defects, interruptions, closed pipes


@pytest.fixture
def broken(monkeypatch):
    """Lets the command that lists runs end in an exception."""

    def end_in(error: BaseException) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr("llmtune.runs.RunStore.runs", fail)

    return end_in


def test_a_defect_names_the_file_with_the_traceback(broken, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken(ZeroDivisionError("by zero"))
    assert main(["runs"]) == 1
    error = capsys.readouterr().err
    named = re.search(r"\S+llmtune-traceback-\S+\.txt", error)
    assert named
    assert "ZeroDivisionError: by zero" in Path(named[0]).read_text()
    assert "Traceback" not in error


@pytest.mark.parametrize("flag", ["option", "environment"])
def test_debug_shows_the_traceback(flag, capsys, monkeypatch):
    if flag == "environment":
        monkeypatch.setenv("LLMTUNE_DEBUG", "1")
    assert main(["show", "nothing", *(["--debug"] if flag == "option" else [])]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interruption_outside_training(broken, capsys):
    broken(KeyboardInterrupt())
    assert main(["runs"]) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_is_gone_is_no_error(form):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "llmtune", "presets", "tiny", *form],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert done.returncode == PIPE_CLOSED
    assert done.stderr == ""


# ---------------------------------------------------------------------- facts


def _json(capsys, *arguments: str, code: int = 0):
    assert main([*arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_check_json(rows, capsys):
    document = _json(capsys, "check", rows)
    assert document.keys() >= {"format", "rows", "bytes", "problems", "statistics"}
    assert (document["format"], document["rows"], document["problems"]) == ("prompt_completion", 40, [])


def test_check_reports_problems_with_code_3(capsys):
    Path("chats.jsonl").write_text(CHAT + UNANSWERED * 25)
    document = _json(capsys, "check", "chats.jsonl", code=3)
    assert len(document["problems"]) == 25
    assert document["problems"][0].keys() == {"file", "line", "field", "problem", "hint"}
    assert main(["check", "chats.jsonl"]) == 3
    shown = capsys.readouterr().out
    assert "chats.jsonl:2" in shown
    assert "and 5 more problems" in shown


def test_check_fix_writes_the_good_rows(capsys):
    Path("chats.jsonl").write_text(CHAT + UNANSWERED)
    assert main(["check", "chats.jsonl", "--fix", "clean.jsonl"]) == 0
    assert "1 good rows" in capsys.readouterr().err
    assert json.loads(Path("clean.jsonl").read_text())["messages"][1]["content"] == "ho"
    assert Path("clean.quarantine.jsonl").exists()
    assert main(["check", "clean.jsonl"]) == 0


def test_check_fix_without_a_good_row_is_a_data_error():
    Path("chats.jsonl").write_text(UNANSWERED)
    assert main(["check", "chats.jsonl", "--fix", "clean.jsonl", "-q"]) == 3


def test_columns_can_be_named(capsys):
    Path("own.jsonl").write_text('{"ask": "a", "tell": "b"}\n')
    columns = ("--set", "data.columns.prompt=ask", "--set", "data.columns.completion=tell")
    assert _json(capsys, "check", "own.jsonl", *columns)["format"] == "prompt_completion"


def test_presets_json(capsys):
    listed = _json(capsys, "presets")
    assert {"tinyllama", "phi", "mistral", "qwen", "tiny", "generic"} <= {preset["family"] for preset in listed}
    assert _json(capsys, "presets", "tinyllama")["problems"] == []


def test_presets_shows_numbers_with_their_sources(capsys):
    assert main(["presets", "tinyllama"]) == 0
    shown = capsys.readouterr().out
    assert "bestaccuracy, large data" in shown
    assert "learning_rate" in shown


def test_a_preset_of_ones_own_is_validated(capsys):
    text = Path(__file__).parents[1].joinpath("presets/tiny.yaml").read_text()
    Path("mine.yaml").write_text(text.replace("epochs: [3, few_rows]", "epochs: [-3, few_rows]"))
    assert main(["presets", "mine.yaml"]) == 2
    assert "epochs: got -3" in capsys.readouterr().err


def test_accelerate_config_prints_the_path_alone(capsys):
    assert main(["accelerate-config", "cpu_ddp"]) == 0
    path = Path(capsys.readouterr().out.removesuffix("\n"))
    assert path.is_file()
    assert {"name": "cpu_ddp", "path": str(path)} in _json(capsys, "accelerate-config")


def test_runs_show_and_report(capsys):
    run = RunDirectory.create("runs/orders-tiny", identity={"data": "d", "model": "m", "config": "c"})
    run.update_run(status="failed", model="builtin:tiny", data="orders.jsonl", preset="quality")
    (record,) = _json(capsys, "runs")
    keys = {"name", "dir", "status", "model", "data", "preset", "started", "finished", "steps", "best"}
    assert record.keys() == keys
    assert _json(capsys, "runs", "--status", "finished") == []
    assert [found["name"] for found in _json(capsys, "runs", "--rebuild", "--model", "tiny")] == ["orders-tiny"]
    assert _json(capsys, "show", "ord")["status"] == "failed"
    assert main(["show", "runs/orders-tiny"]) == 0
    assert "llmtune resume" in capsys.readouterr().out
    assert main(["report", "orders-tiny"]) == 0
    assert Path(capsys.readouterr().out.strip()) == Path("runs/orders-tiny/report.html").absolute()
    assert main(["runs"]) == 0
    assert "orders-tiny" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eval", "chat"])
def test_a_run_without_result_cannot_be_used(name, capsys):
    RunDirectory.create("runs/orders-tiny", identity={"data": "d", "model": "m", "config": "c"})
    assert main([name, "orders-tiny"]) == 6
    assert "llmtune resume" in capsys.readouterr().err


def test_quiet_is_understood_on_both_sides_of_the_command(capsys):
    for arguments in (["--quiet", "runs"], ["runs", "--quiet"], ["-q", "runs"], ["runs", "-q"]):
        assert main(arguments) == 0
        assert capsys.readouterr().err == ""
    assert main(["runs"]) == 0
    assert "no runs" in capsys.readouterr().err


def test_no_colour_outside_a_terminal():
    done = program("presets", "nothing")
    assert "\x1b" not in done.stdout + done.stderr
    done = program("presets", env=os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color"})
    assert done.stdout
    assert "\x1b" not in done.stdout + done.stderr


# ---------------------------------------------------------------------- slow: planning and training for real


@pytest.mark.slow
def test_doctor_json():
    done = program("doctor", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout).keys() == {"hardware", "versions", "usable", "problems", "settings"}
    Path("machine.json").write_text(done.stdout)
    Path("rows.jsonl").write_text(ROWS)
    planned = program("plan", "rows.jsonl", "--model", "builtin:tiny", "--hardware", "machine.json", "--json")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.slow
def test_plan_json(rows):
    done = program("plan", rows, "--model", "builtin:tiny", "--set", "epochs=2", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() >= {"choices", "memory", "time", "fits"}
    assert document["choices"]["epochs"].keys() == {"value", "reason", "source", "changes"}
    assert document["choices"]["epochs"]["source"] == "user"
    memory = {"device", "total_bytes", "free_bytes", "peak_bytes", "tensor_peak_bytes", "terms"}
    assert document["memory"].keys() >= memory
    assert document["time"].keys() >= {"step_seconds", "total_seconds"}
    dry = program("train", rows, "--model", "builtin:tiny", "--set", "epochs=2", "--dry-run")
    assert dry.returncode == 0
    assert "learning rate" in dry.stdout
    assert os.listdir() == [rows]


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_shown_and_ends_with_4(rows):
    machine = detect().to_json() | {"accelerators": [], "ram_available_bytes": 2**20, "cgroup_limit_bytes": None}
    Path("small.json").write_text(json.dumps(machine | {"cgroup_used_bytes": None}))
    done = program("plan", rows, "--model", "builtin:tiny", "--hardware", "small.json", "--json")
    assert done.returncode == 4
    assert json.loads(done.stdout)["fits"] is False
    assert "PlanError: needs" in done.stderr


@pytest.mark.slow
def test_check_with_a_model_counts_tokens(rows):
    document = json.loads(program("check", rows, "--model", "builtin:tiny", "--json").stdout)
    assert document["supervision"]["stop_token_supervised"] is True
    assert 0 < document["supervised_tokens"] < document["tokens"]


@pytest.mark.slow
def test_train_then_use_the_result():
    Path("held_out.jsonl").write_text("".join(demo_heldout_path().read_text().splitlines(keepends=True)[:8]))
    data = ("--eval-data", "held_out.jsonl", "--model", "builtin:tiny", "--preset", "highspeed")
    short = ("--max-steps", "6", "--set", "evaluate.every_steps=3", "--set", "max_new_tokens=8")
    done = program("train", str(demo_train_path()), *data, *short, "--output", "run", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() >= {"run_dir", "adapter_dir", "status", "metrics", "incidents"}
    assert result["metrics"].keys() >= {"train_loss", "eval_loss", "perplexity", "base_eval_loss"}
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]
    assert "\x1b" not in done.stderr
    verdict = json.loads(program("eval", "run", "--json").stdout)
    assert verdict["eval_loss"] == pytest.approx(result["metrics"]["eval_loss"], rel=2e-2)
    once = json.loads(program("chat", "run", "--once", "Hello", "--max-new-tokens", "4", "--json").stdout)
    assert once["prompt"] == "Hello"
    piped = program("chat", "run", "--max-new-tokens", "4", input="one\n\ntwo\n")
    assert len(piped.stdout.splitlines()) == 2
    again = program("resume", "run", "--quiet")
    assert again.returncode == 0
    assert "llmtune chat" in again.stdout


@pytest.mark.slow
def test_demo_in_json():
    done = program("demo", "--output", "run", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["metrics"]["eval_loss"] < result["metrics"]["base_eval_loss"]
    assert result["metrics"].keys() >= {"exact_match", "base_exact_match"}
    assert result["samples"][0].keys() == {"prompt", "reference", "base", "tuned", "right"}
    assert (len(result["samples"]), result["verdict"]["rows"]) == (64, 80)


@pytest.mark.slow
def test_study_json():
    Path("held_out.jsonl").write_text("".join(demo_heldout_path().read_text().splitlines(keepends=True)[:8]))
    data = (str(demo_train_path()), "--eval-data", "held_out.jsonl", "--model", "builtin:tiny")
    short = ("--trials", "2", "--sampler", "random", "--set", "max_steps=2", "--set", "evaluate.every_steps=1")
    done = program("study", *data, *short, "--output", "study", "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document.keys() >= {"study", "trials", "best", "default", "improvement"}
    assert document["trials"] == 2
