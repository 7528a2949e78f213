"""``python -m llmtune``: the same program as ``llmtune``, for ``accelerate launch -m llmtune …``."""

from __future__ import annotations

import sys

from llmtune.heap import restart_with_tuned_heap


def program() -> int:
    """One command in a process of its own; see `llmtune.cli.main`."""
    restart_with_tuned_heap()
    from llmtune.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(program())
