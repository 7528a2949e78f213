"""Documentation that is run: the README's commands exist, examples train, benchmarks are up to date."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_of_the_readme_exists_and_every_command_is_in_it() -> None:
    from llmtune.cli.program import commands

    rows = re.findall(r"^\| (`.*?`) \|", README.split("## Commands")[1].split("## What a run")[0], flags=re.MULTILINE)
    named = {re.match(r"(?:llmtune )?([a-z-]+)", code)[1] for row in rows for code in re.findall(r"`([^`]+)`", row)}  # type: ignore[index]
    assert named == set(commands().commands)


def test_every_exit_code_of_the_errors_is_in_the_readme() -> None:
    from llmtune import errors

    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.LlmtuneError)}
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    assert listed == codes | {0}


def test_every_file_the_readme_links_is_there() -> None:
    for target in re.findall(r"\]\(([^)h#][^)]*)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("script", sorted((ROOT / "tests" / "benchmarks").rglob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_asks_for_what_there_is(script: Path) -> None:
    """They run for minutes and by hand; what they import, also late, must not have been renamed meanwhile."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmtune"):
            exec(ast.unparse(node), {})


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_and_its_loss_falls(example: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(example), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
