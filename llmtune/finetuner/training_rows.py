"""Which rows a run was trained on, kept in its directory, so that other data can be compared with them later.

``training_rows.npz`` holds no text: 144 bytes for each row, 1.4 MB for 10,000 rows. It is written before the first
update and never again. Up to `MOST_COMPARED_ROWS` rows it can tell near duplicates; beyond, exact ones (16 bytes each).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from llmtune.data import EncodedDataset, Leakage, contamination
from llmtune.finetuner.rows import MOST_COMPARED_ROWS
from llmtune.runs import RunDirectory, redact

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILE = "training_rows.npz"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingRows:
    """Fingerprints of training rows.

    Attributes:
        digests: uint64 [rows], see `content_digest`.
        signatures: uint16 [rows, hashes]: the lower half of each number of `signature`, which tells two apart nearly as
            well (1 in 65,536 different ones are equal); None where there are too many rows.
        files: Names of the files.
        file: int32 [rows], the number of each row's file.
        line: uint32 [rows], the line of each row.
    """

    digests: NDArray[np.uint64]
    signatures: NDArray[np.uint16] | None
    files: tuple[str, ...]
    file: NDArray[np.int32]
    line: NDArray[np.uint32]

    @classmethod
    def of(cls, rows: EncodedDataset) -> TrainingRows:
        """Take the fingerprints of encoded rows."""
        files, file, line = rows.places
        return cls(
            digests=rows.digests,
            signatures=_halved(rows.signatures) if len(rows) <= MOST_COMPARED_ROWS else None,
            files=files,
            file=file,
            line=line.astype(np.uint32),
        )

    @classmethod
    def load(cls, run: RunDirectory) -> TrainingRows | None:
        """Read what a run has kept; None where it has kept nothing, or the file is damaged."""
        try:
            with np.load(io.BytesIO((run.path / FILE).read_bytes()), allow_pickle=False) as kept:
                return cls(
                    digests=kept["digests"],
                    signatures=kept["signatures"] if "signatures" in kept else None,
                    files=tuple(kept["file_names"].tolist()),
                    file=kept["file_numbers"],
                    line=kept["lines"],
                )
        except (OSError, EOFError, ValueError, KeyError, BadZipFile):
            return None

    def keep(self, run: RunDirectory) -> None:
        """Write them into the directory of a run.

        Raises:
            OutputError: The disk is full or the place is not writable any more.
        """
        arrays: dict[str, Any] = {"digests": self.digests, "file_numbers": self.file, "lines": self.line}
        arrays["file_names"] = np.array([redact(name) for name in self.files])
        if self.signatures is not None:
            arrays["signatures"] = self.signatures
        content = io.BytesIO()
        np.savez(content, **arrays)
        run.write_bytes(FILE, content.getvalue())

    def leakage(self, evaluation: EncodedDataset) -> Leakage:
        """Return which evaluation rows are among them, with places."""
        near = self.signatures is not None and len(self.digests) + len(evaluation) <= MOST_COMPARED_ROWS
        found = contamination(
            self.digests,
            _widened(self.signatures) if near and self.signatures is not None else None,
            evaluation.digests,
            _widened(_halved(evaluation.signatures)) if near else None,
        )
        return found.located(evaluation.location, lambda row: (self.files[self.file[row]], int(self.line[row])))


def _halved(signatures: NDArray[np.uint8]) -> NDArray[np.uint16]:
    hashes = np.ascontiguousarray(signatures).view("<u4").reshape(len(signatures), -1)
    # A row too short to compare stays all zero, and no other row becomes so.
    return np.where(hashes == 0, 0, np.maximum(hashes & 0xFFFF, 1)).astype(np.uint16)


def _widened(hashes: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """In the form that `contamination` takes: uint8 [rows, bytes]."""
    wide = np.ascontiguousarray(hashes.astype("<u4"))
    return wide.view(np.uint8).reshape(len(hashes), -1)
