"""The command reference: the help of every command as one page. ``python -m llmtune.cli.reference > docs/cli.md``."""

from __future__ import annotations

import sys

from llmtune.cli.app import PROGRAM
from llmtune.cli.program import commands

INTRODUCTION = """\
# Commands

Every command understands `--quiet` and `--debug`; those that return facts understand `--json`. Exit codes are listed
in the README. This page is made from the help texts: `python -m llmtune.cli.reference > docs/cli.md`.
"""

WIDTH = 100


def reference() -> str:
    """The page, in Markdown."""
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    group = commands()
    with group.make_context(PROGRAM, [], resilient_parsing=True, **width) as context:
        sections = [_section(PROGRAM, context.get_help())]
        for name, each in group.commands.items():
            with each.make_context(name, [], parent=context, resilient_parsing=True, **width) as below:
                sections.append(_section(f"{PROGRAM} {name}", below.get_help()))
    return "\n".join([INTRODUCTION, *sections])


def _section(title: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
