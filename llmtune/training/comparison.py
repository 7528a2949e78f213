"""Every evaluation of a run beside that of its base model, row by row.

The losses of the base model's rows are kept in the run directory, so that a resumed run still compares with the model
that was there before step 1.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any
from zipfile import BadZipFile

import numpy as np

from llmtune.evaluation import RowLosses, Scores, paired_interval
from llmtune.runs import RunDirectory

BASE_LOSSES = "base_losses.npz"


class BaseComparison:
    """What an ``evaluation`` event says about the rows that were really held out.

    Args:
        run: Keeps the losses of the base model.
        num_rows: Evaluation rows.
        leaked: Numbers of evaluation rows that are also trained on; they are left out.
    """

    def __init__(self, run: RunDirectory, num_rows: int, leaked: Sequence[int]) -> None:
        self._run = run
        self._held_out = np.ones(num_rows, np.bool_)
        self._held_out[np.asarray(leaked, np.int64)] = False
        self._base: RowLosses | None = None

    def facts(self, step: int, scores: Scores | None) -> dict[str, Any]:
        """Return the fields ``num_rows`` and ``held_out`` of the event.

        ``held_out``: rows, tokens, loss, and with the base model's losses ``base_loss`` and ``difference``, the
        interval of tuned minus base. It is left out where the losses of single rows are not known.
        """
        held_out = self._held_out
        facts: dict[str, Any] = {"num_rows": len(held_out)}
        rows = None if scores is None else scores.rows
        if rows is None:
            return facts
        if step == 0:
            self._keep(rows)
        told: dict[str, Any] = {"rows": int(held_out.sum()), "tokens": int(rows.tokens[held_out].sum())}
        told["loss"] = rows.mean(held_out)
        base = self._base_losses() if step else None
        if base is not None and len(base.losses) == len(held_out):
            found = paired_interval(base.losses[held_out], rows.losses[held_out], rows.tokens[held_out])
            told["base_loss"] = base.mean(held_out)
            told["difference"] = None if found is None else found.to_json()
        return facts | {"held_out": told}

    def _keep(self, rows: RowLosses) -> None:
        self._base = rows
        content = io.BytesIO()
        np.savez(content, losses=rows.losses, tokens=rows.tokens)
        self._run.write_bytes(BASE_LOSSES, content.getvalue())

    def _base_losses(self) -> RowLosses | None:
        path = self._run.path / BASE_LOSSES
        if self._base is None and path.is_file():
            try:
                with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                    self._base = RowLosses(losses=arrays["losses"], tokens=arrays["tokens"])
            except (OSError, EOFError, ValueError, KeyError, BadZipFile):
                return None  # a damaged file: the verdict says that there is no interval
        return self._base
