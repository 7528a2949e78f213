"""``python -m llmtune``: the same program as ``llmtune``, for ``accelerate launch -m llmtune …``."""

from __future__ import annotations

import sys

from llmtune.cli import main

if __name__ == "__main__":
    sys.exit(main())
