"""Faults 68, 69, 71, 72 and 73 of the catalogue: what is handed over makes us run no code, and secrets stay secret."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import pty
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from tuning import ROWS, SignalAt, settings, tune

from llmtune import FineTuner
from llmtune.checkpoints import read_manifest, verify, write_manifest
from llmtune.errors import LlmtuneError, ModelError, Preempted
from llmtune.runs import RunDirectory
from llmtune.runs.redaction import redactor

pytestmark = pytest.mark.fault
Model = Callable[[str], Path]
ROOT = str(Path(__file__).parents[1])
SIDECARS = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin", "scaler.pt")


class Evil:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def program(*arguments: str, **changes: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | changes
    return subprocess.run(
        [sys.executable, "-m", "llmtune", *arguments],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        timeout=300,
        check=False,
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "lamps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "lamps.jsonl"


@pytest.fixture(scope="module")
def stopped(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 3, with checkpoints 2 and 3."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Preempted):
        tune(family_model("llama"), run, callbacks=[SignalAt(3)])
    return run


@pytest.fixture(scope="module")
def finished(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    tune(family_model("llama"), run, max_steps=2)
    return run


# ---------------------------------------------------------------------- 68: pickles


def sealed_anew(checkpoint: Path, document: dict[str, Any], **more: Any) -> None:
    """Write a manifest that fits what is there, as somebody would who hands over a checkpoint."""
    facts = {key: value for key, value in document.items() if key not in ("files", "format_version", "manifest_sha256")}
    write_manifest(checkpoint, facts, document["files"] | more if more else None)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("name", SIDECARS)
def test_fault_68_a_malicious_pickle_is_not_executed(stopped: Path, tmp_path: Path, name: str, form: str) -> None:
    """The manifest fits, so that it is read: as data, or not at all."""
    import torch

    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    mark = tmp_path / "executed"
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        document = read_manifest(checkpoint)
        target = checkpoint / name
        target.unlink(missing_ok=True)
        if form == "plain":
            target.write_bytes(pickle.dumps(Evil(mark), protocol=2))  # the one that torch does not warn of
        else:
            torch.save({"state": Evil(mark)}, target, _use_new_zipfile_serialization=form == "zip")
        sealed_anew(checkpoint, document)
        assert verify(checkpoint).ok
    if name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with pytest.raises(LlmtuneError) as caught:
            FineTuner.resume(run, ROWS)
        assert caught.value.exit_code in (5, 6)
    else:  # nobody reads it
        assert FineTuner.resume(run, ROWS).status == "finished"
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the pickle would have worked


def test_fault_68_a_malicious_pickle_in_a_result(finished: Path, tmp_path: Path) -> None:
    import torch

    from llmtune.finetuner import TunedRun

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    mark = tmp_path / "executed"
    torch.save(Evil(mark), run / "adapter" / "adapter_model.bin")
    assert TunedRun.open(run, data=ROWS).generate("Who keeps lamp 3?", max_new_tokens=1) is not None
    (run / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        TunedRun.open(run, data=ROWS).generate("Who keeps lamp 3?", max_new_tokens=1)
    assert not mark.exists()


def test_fault_68_a_malicious_pickle_as_a_model(family_model: Model, tmp_path: Path) -> None:
    import torch

    model = tmp_path / "model"
    shutil.copytree(family_model("llama"), model)
    (model / "model.safetensors").unlink()
    torch.save(Evil(tmp_path / "executed"), model / "pytorch_model.bin")
    with pytest.raises(ModelError, match="weights cannot be loaded"):
        tune(model, tmp_path / "run")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------- 69: code of a model's repository


def with_code(family_model: Model, place: Path, *, known: bool) -> Path:
    """A model directory whose Python code leaves a mark when it is imported."""
    shutil.copytree(family_model("llama"), place)
    mark = f"import os\nos.mkdir({str(place.parent / 'executed')!r})\n"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil"):
        (place / f"{name}.py").write_text(mark)
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
    }
    if not known:
        config |= {"model_type": "evil", "architectures": ["EvilForCausalLM"]}
    (place / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((place / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization_evil.EvilTokenizer", None]}
    (place / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return place


def on_a_terminal(command: list[str]) -> tuple[int, str]:
    """Run with a terminal on all three streams, at which nobody types; exit code and all that was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["PYTHONPATH"] = ROOT
        os.execv(command[0], command)
    shown, deadline = b"", time.monotonic() + 240
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 1.0)[0]:
            continue
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how Linux says that the other side is gone
            break
        if not part:
            break
        shown += part
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode(errors="replace")


@pytest.mark.parametrize("terminal", [False, True], ids=["no terminal", "terminal"])
def test_fault_69_foreign_code_is_refused_without_a_question(
    family_model: Model, data: Path, tmp_path: Path, terminal: bool
) -> None:
    model = with_code(family_model, tmp_path / "model", known=False)
    command = ["train", str(data), "--model", str(model), "--output", str(tmp_path / "run")]
    if terminal:
        code, text = on_a_terminal([sys.executable, "-m", "llmtune", *command])
    else:
        done = program(*command)
        code, text = done.returncode, done.stderr.decode()
    assert code == 2, text
    assert "model.trust_remote_code=true" in "".join(text.split("\r\n"))
    assert "[y/N]" not in text
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "terminal", [pytest.param(False, id="no terminal", marks=pytest.mark.sweep), pytest.param(True, id="terminal")]
)
def test_fault_69_where_the_library_has_its_own_code_that_is_used(
    family_model: Model, data: Path, tmp_path: Path, terminal: bool
) -> None:
    model = with_code(family_model, tmp_path / "model", known=True)
    keys = {"max_steps": 1, "num_samples": 0, "report": "false", "evaluate.every_steps": 1}
    flags = [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
    run = tmp_path / "run"
    first = ["train", str(data), "--model", str(model), "--output", str(run), *flags]
    second = ["chat", str(run), "--once", "Who keeps lamp 3?"]
    for command in (first, second):
        if terminal:
            code, text = on_a_terminal([sys.executable, "-m", "llmtune", *command])
        else:
            done = program(*command)
            code, text = done.returncode, done.stderr.decode()
        assert code == 0, text
        assert "[y/N]" not in text
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------------- 71: paths that lead out


def archives(place: Path, outside: Path) -> list[Path]:
    """Archives whose members would be written outside of where they are unpacked."""
    place.mkdir()
    row = json.dumps(ROWS[0]).encode()
    with tarfile.open(place / "evil.tar.gz", "w:gz") as tar:
        for name in ("../outside/escaped", str(outside / "absolute"), "data.jsonl"):
            member = tarfile.TarInfo(name)
            member.size = len(row)
            tar.addfile(member, io.BytesIO(row))
        for name, kind in (("link", tarfile.SYMTYPE), ("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(outside)
            tar.addfile(member)
        member = tarfile.TarInfo("link/through")
        member.size = len(row)
        tar.addfile(member, io.BytesIO(row))
    with zipfile.ZipFile(place / "evil.zip", "w") as archive:
        for name in ("../outside/escaped", str(outside / "absolute"), "data.jsonl"):
            archive.writestr(name, row)
    return [place / "evil.tar.gz", place / "evil.zip"]


def test_fault_71_archives_are_not_unpacked(data: Path, stopped: Path, tmp_path: Path) -> None:
    """Nothing that llmtune reads is an archive to be unpacked: each is refused where it is given."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "work").mkdir()
    tiny = ("--model", "builtin:tiny", "--output", str(tmp_path / "work" / "run"))
    given = list(archives(tmp_path / "given", outside))
    for archive in given:
        commands = (
            ["check", str(archive)],
            ["train", str(data), "--output", str(tmp_path / "work" / "run"), "--model", str(archive)],
            ["train", str(archive), *tiny],
            ["train", str(data), *tiny, "--resume", str(archive)],
            ["train", str(data), *tiny, "--config", str(archive)],
            ["resume", str(archive)],
        )
        for command in commands if archive == given[0] else commands[:2]:
            done = program(*command)
            assert done.returncode in (2, 3), (command, done.stderr)
            assert b"Traceback" not in done.stderr
    assert list(outside.iterdir()) == []
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("name", ["../outside/secret", "/absolute", "link/secret", "sub/../../outside/secret"])
def test_fault_71_a_manifest_that_names_files_elsewhere(stopped: Path, tmp_path: Path, name: str) -> None:
    """Neither believed nor followed, though size and hash of what it names are right."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("mine")
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    checkpoint = run / "checkpoints" / "checkpoint-3"
    if name.startswith("link/"):
        (checkpoint / "link").symlink_to(outside)
    name = str(outside / "secret") if name == "/absolute" else name
    document = read_manifest(checkpoint)
    entry = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
    sealed_anew(checkpoint, document, **{name: entry})
    assert not verify(checkpoint).ok
    assert FineTuner.resume(run, ROWS).status == "finished"
    started = [event for event in RunDirectory.open(run).events() if event["event"] == "run_started"]
    assert started[-1]["resumed_from"] == "checkpoints/checkpoint-2"
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert (outside / "secret").read_text() == "mine"


@pytest.mark.parametrize("name", ["manifest.json", "optimizer.pt", "new"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_fault_71_a_pipe_or_device_in_a_checkpoint_is_not_read(
    stopped: Path, tmp_path: Path, name: str, kind: str
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    shutil.copytree(stopped / "checkpoints" / "checkpoint-3", checkpoint)
    (checkpoint / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(checkpoint / name)
    else:
        try:
            os.mknod(checkpoint / name, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero has no end
        except PermissionError:
            pytest.skip("may not make devices")
    assert not verify(checkpoint).ok


# ---------------------------------------------------------------------- 72: secrets

SECRETS = {
    "argument": "arg-Zq8sesame",
    "environment": "env-Zq8sesame",
    "hub": "hf_" + "Zq8sesame" * 4,
    "password": "pw-Zq8sesame",
}


def bytes_of(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.mark.slow
def as_flag(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_fault_72_secrets_are_in_no_byte_of_output(family_model: Model, data: Path, tmp_path: Path) -> None:
    """A run that ends well, one that fails, and commands that are wrong; with everything that they print and write."""
    work, temporary = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    temporary.mkdir()
    environment = {
        "HF_TOKEN": SECRETS["hub"],
        "WANDB_API_KEY": SECRETS["environment"],
        "LLMTUNE_STORE": f"postgresql+psycopg://me:{SECRETS['password']}@localhost:1/none",
        "TMPDIR": str(temporary),
        "LLMTUNE_CACHE": str(tmp_path / "cache"),
    }
    token = ["--set", f"model.token={SECRETS['argument']}"]
    keys = settings(family_model("llama"), work / "run", max_steps=2)
    del keys["model"], keys["output"]
    flags = [part for key, value in keys.items() for part in ("--set", f"{key}={as_flag(value)}")]
    train = ["train", str(data), "--model", str(family_model("llama")), *flags, *token]
    outputs = []
    for command, store, codes in (
        ([*train, "--output", str(work / "run")], "", (0,)),
        ([*train, "--output", str(work / "stored")], environment["LLMTUNE_STORE"], (0, 2)),
        ([*train, "--output", str(work / "debugged"), "--debug", "--set", "rank=0"], "", (2,)),
        (["train", str(data), *token, "--model", "nobody/nothing", "--debug"], "", (2,)),
        (["train", str(data), "--set", f"model.tokn={SECRETS['argument']}"], "", (2,)),
        (["train", str(data), "--set", f"token:{SECRETS['argument']}"], "", (2,)),
        (["runs", "--json"], environment["LLMTUNE_STORE"], (2,)),
        (["plan", str(data), "--model", str(family_model("llama")), "--json", *token], "", (0,)),
        (["show", str(work / "run"), "--json"], "", (0,)),
        (["doctor", "--json"], "", (0,)),
    ):
        done = program(*command, **(environment | {"LLMTUNE_STORE": store}))
        assert done.returncode in codes, (command, done.stderr)
        outputs.append(done.stdout + done.stderr)
    found = {f"output {number}": text for number, text in enumerate(outputs)}
    for name, content in (found | bytes_of(work) | bytes_of(temporary) | bytes_of(tmp_path / "cache")).items():
        assert b"Zq8sesame" not in content, name
    assert b"[redacted]" in (work / "run" / "run.json").read_bytes()  # the command is there, without its secret


def test_fault_72_secrets_in_what_is_raised(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that fails with a secret in its message: traceback, report, events."""
    monkeypatch.setenv("MY_API_KEY", SECRETS["environment"])

    class Careless(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            url = f"https://me:{SECRETS['password']}@tracker/api?token={SECRETS['argument']}"
            raise RuntimeError(f"{url} said no to {os.environ['MY_API_KEY']} (Authorization: Bearer {SECRETS['hub']})")

    with pytest.raises(LlmtuneError):
        tune(family_model("llama"), tmp_path / "run", callbacks=[Careless()])
    failures = list((tmp_path / "run" / "failures").iterdir())
    assert {path.suffix for path in failures} == {".json", ".txt"}
    for name, content in bytes_of(tmp_path / "run").items():
        assert b"Zq8sesame" not in content, name


@pytest.mark.parametrize(
    ("arguments", "text", "shown"),
    [
        (["--set", "model.token=sesame-1"], "with sesame-1", "with [redacted]"),
        (["--set=token='sesame-1'"], "sesame-1 'sesame-1'", "[redacted] [redacted]"),
        (["--set", "token_budget=123456"], "123456", "123456"),
        ([], "redis://:sesame@host/0", "redis://:[redacted]@host/0"),
        ([], "https://h/x?a=1&api_key=sesame&b=2", "https://h/x?a=1&api_key=[redacted]&b=2"),
        ([], "Authorization: Bearer sesame-sesame", "Authorization: Bearer [redacted]"),
        ([], "the bearer of tokens", "the bearer of tokens"),
    ],
)
def test_fault_72_what_counts_as_a_secret(arguments: list[str], text: str, shown: str) -> None:
    assert redactor({}, arguments)(text) == shown


def test_fault_72_pickled_arguments_are_not_kept(finished: Path) -> None:
    assert not list(finished.rglob("training_args.bin"))


# ---------------------------------------------------------------------- 73: adapters


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"}, "task_type": None},
        {"auto_mapping": {"base_model_class": "Evil", "parent_library": "transformers_evil.x"}},
        {"auto_mapping": "evil_module"},
        {"megatron_config": {"a": 1}, "megatron_core": "evil_module"},
        {"megatron_core": "evil_module"},
    ],
)
def test_fault_73_an_adapter_that_names_a_foreign_module_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    from llmtune.finetuner import TunedRun

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("evil_module", "transformers_evil"):
        (tmp_path / f"{name}.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'executed')!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match="names the module"):
        TunedRun.open(run, data=ROWS).generate("Who keeps lamp 3?", max_new_tokens=1)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_fault_73_an_adapter_configuration_that_cannot_be_read(finished: Path, tmp_path: Path, content: bytes) -> None:
    from llmtune.models.adapter_files import require_plain_adapter

    adapter = tmp_path / "adapter"
    shutil.copytree(finished / "adapter", adapter)
    require_plain_adapter(adapter)
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        require_plain_adapter(adapter)
