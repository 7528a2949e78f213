"""The command line: parse, call, print. What a command does is told by the packages below."""

from __future__ import annotations

from llmtune.cli.program import main

__all__ = ["main"]
