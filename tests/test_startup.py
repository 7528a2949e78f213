"""What happens between the command and the first update, counted: modules, files, processes, waits; never seconds."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtune.collector import importing
from llmtune.training import rehearsal

# What a plan of a catalogued model or a check of data can do without.
LIBRARIES = ("torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes", "optuna", "sqlalchemy")
# Never needed before an update, and each takes a fifth of a second or more. What is not here and heavy all the same
# (torch._dynamo, torch.distributed.tensor, scipy.optimize, and for training datasets, pandas and bitsandbytes) is
# imported by transformers and peft themselves.
NEVER = ("optuna", "matplotlib", "tensorboard", "torch.utils.tensorboard", "sklearn", "tensorflow", "jax", "wandb")
NO_TRAINING = (
    "datasets",
    "pandas",
    "peft",
    "bitsandbytes",
    "transformers.trainer",
    "torch._inductor.compile_fx",
    "sqlalchemy",
)

COUNTING = """
    import json, os, sys
    sys.argv = ["llmtune"]
    seen = {"opened": [], "started": [], "slept": [], "connected": [], "weights": []}

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, os.PathLike)):
            seen["opened"].append(os.fspath(arguments[0]))
        elif event == "subprocess.Popen":
            seen["started"].append([str(part) for part in arguments[1]])
        elif event == "time.sleep":
            seen["slept"].append(arguments[0])
        elif event == "socket.connect":
            seen["connected"].append(repr(arguments[1]))

    sys.addaudithook(note)

    import safetensors
    opening = safetensors.safe_open

    def counted(path, *rest, **named):  # opened by the library without Python's knowledge
        seen["weights"].append(os.fspath(path))
        return opening(path, *rest, **named)

    safetensors.safe_open = counted

    class First:
        \"\"\"Tells at the first update what has happened so far, and ends the process.\"\"\"

        def on_step_begin(self, *_, **__):
            import gc
            seen["modules"] = sorted(sys.modules)
            seen["frozen"] = gc.get_freeze_count()
            sys.__stdout__.write(json.dumps(seen))
            sys.__stdout__.flush()
            os._exit(0)

        def __getattr__(self, name):
            return (lambda *_, **__: None) if name.startswith("on_") else object.__getattribute__(self, name)
"""


def child(code: str) -> str:
    """What a process of its own writes to stdout."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def loaded(code: str, names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that are imported once ``code`` has run."""
    tell = f"\nprint('\\n' + ','.join(name for name in {names!r} if name in sys.modules))"
    return list(filter(None, child("import sys\n" + textwrap.dedent(code) + tell).splitlines()[-1].split(",")))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file of questions and answers."""
    path = tmp_path_factory.mktemp("start") / "rows.jsonl"
    lines = [{"prompt": f"Who keeps lamp {n}?", "completion": f"Keeper {n % 7} keeps it."} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def before_the_first_update(rows: Path) -> dict[str, Any]:
    """What a process that trains, on data that it has never seen, has done when its first update begins."""
    settings = {
        "model.id": "builtin:tiny",
        "train.max_steps": 2,
        "train.device": "cpu",
        "evaluate.num_samples": 0,
        "monitor.report": False,
        "output.root": str(rows.parent / "runs"),
    }
    start = f"\nfrom llmtune import FineTuner\nFineTuner({str(rows)!r}, callbacks=[First()], **{settings!r}).train()"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTUNE_CACHE", str(rows.parent / "empty"))
        found: dict[str, Any] = json.loads(child(textwrap.dedent(COUNTING) + start))
    return found


def test_a_check_imports_no_library_of_training(rows: Path) -> None:
    code = f"from llmtune import FineTuner\nFineTuner({str(rows)!r}).check()"
    assert loaded(code, LIBRARIES) == []


def test_a_plan_of_a_catalogued_model_imports_no_library_of_training(rows: Path) -> None:
    code = f"from llmtune import FineTuner\nFineTuner({str(rows)!r}, model='Qwen/Qwen2.5-0.5B-Instruct').plan()"
    assert loaded(code, LIBRARIES) == []


def test_a_plan_of_a_model_that_is_here_imports_what_reads_a_model_and_no_more(rows: Path) -> None:
    code = f"from llmtune import FineTuner\nFineTuner({str(rows)!r}, model='builtin:tiny').plan()"
    assert loaded(code, ("torch", "transformers", *NEVER, *NO_TRAINING)) == ["torch", "transformers"]


def test_before_the_first_update_nothing_is_imported_that_no_update_needs(
    before_the_first_update: dict[str, Any],
) -> None:
    modules = set(before_the_first_update["modules"])
    assert modules.isdisjoint(NEVER)
    assert {"torch", "transformers.trainer", "peft"} <= modules


def test_weights_are_loaded_once_and_read_once_more_for_their_digest(before_the_first_update: dict[str, Any]) -> None:
    def of_model(paths: list[str]) -> int:
        return sum(Path(path).name == "model.safetensors" for path in paths)

    assert of_model(before_the_first_update["weights"]) == 1
    assert of_model(before_the_first_update["opened"]) == 1


def test_the_data_are_read_a_fixed_number_of_times(before_the_first_update: dict[str, Any]) -> None:
    opened = [Path(path).name for path in before_the_first_update["opened"]]
    # Recognised, checked, tokenised and surveyed, each once, with a second file handle that finds where lines end; and
    # read once for the fingerprint; the beginning is looked at once for the encoding.
    assert opened.count("rows.jsonl") == 4 * 2 + 1 + 1


def test_the_rehearsal_opens_a_small_result_once_for_its_names_and_once_for_its_weights(
    before_the_first_update: dict[str, Any],
) -> None:
    adapters = [path for path in before_the_first_update["weights"] if Path(path).name == "adapter_model.safetensors"]
    assert len(adapters) == 2


def test_weights_to_compare_are_grouped_by_size_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "READ_BYTES", 10)
    tensors = {
        name: torch.zeros(size, dtype=torch.uint8) for name, size in zip("abcdef", (4, 6, 1, 20, 9, 1), strict=True)
    }
    assert [list(group) for group in rehearsal._by_size(tensors)] == [["a", "b"], ["c"], ["d"], ["e", "f"]]
    assert list(rehearsal._by_size({})) == []


def test_other_processes_tell_the_machine_and_the_commit_alone(before_the_first_update: dict[str, Any]) -> None:
    # The first is Python's own: ``platform.platform``.
    assert before_the_first_update["started"] == [["uname", "-p"], ["git", "rev-parse", "HEAD"]]


def test_nothing_sleeps_and_nothing_is_asked_of_the_network(before_the_first_update: dict[str, Any]) -> None:
    assert before_the_first_update["slept"] == []
    assert before_the_first_update["connected"] == []


def test_what_was_imported_is_set_aside_from_the_collector(before_the_first_update: dict[str, Any]) -> None:
    assert before_the_first_update["frozen"] > 100_000


def test_the_collector_rests_while_libraries_are_imported_and_not_after() -> None:
    frozen = gc.get_freeze_count()
    with importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen  # torch was there before: nothing of the user's is set aside


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    try:
        with pytest.raises(ImportError), importing():
            raise ImportError("missing")
        assert not gc.isenabled()
    finally:
        gc.enable()
