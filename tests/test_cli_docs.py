"""The command reference is the help texts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmtune.cli import main
from llmtune.cli.program import commands
from llmtune.cli.reference import reference

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def test_the_page_is_up_to_date():
    hint = "run: python -m llmtune.cli.reference > docs/cli.md"
    assert PAGE.read_text(encoding="utf-8") == reference(), hint


def test_the_module_prints_the_page():
    done = subprocess.run(
        [sys.executable, "-m", "llmtune.cli.reference"], capture_output=True, text=True, encoding="utf-8", check=True
    )
    assert done.stdout == reference()


@pytest.mark.parametrize("name", list(commands().commands))
def test_the_page_says_what_help_says(name, capsys):
    assert main([name, "--help"]) == 0
    words = capsys.readouterr().out.split()
    page = PAGE.read_text(encoding="utf-8")
    section = page.partition(f"## llmtune {name}\n")[2].partition("\n## ")[0]
    assert section.replace("```text", "").replace("```", "").split() == words
