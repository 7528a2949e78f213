"""The optimizer's state kept compressed (zstd): about as large as the adapter twice over, and read only by a resume."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmtune.checkpoints.places import STAGING_PREFIX

# As the Trainer calls it; what FSDP and DeepSpeed write in shards stays as it is.
OPTIMIZER = "optimizer.pt"
COMPRESSED = f"{OPTIMIZER}.zst"


def compress_optimizer(checkpoint: Path) -> None:
    """Replace ``optimizer.pt``, if it is there, by ``optimizer.pt.zst``."""
    plain = checkpoint / OPTIMIZER
    if plain.is_file():
        import pyarrow as pa

        with plain.open("rb") as source, pa.output_stream(str(checkpoint / COMPRESSED), compression="zstd") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        plain.unlink()


@contextmanager
def expanded(checkpoint: Path, *, beside: Sequence[str]) -> Iterator[Path]:
    """A directory with ``optimizer.pt`` of a checkpoint that keeps it compressed, and the files named ``beside`` it."""
    import pyarrow as pa

    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix=f"{STAGING_PREFIX}expanded-") as name:
        whole = Path(name)
        for other in beside:
            shutil.copyfile(checkpoint / other, whole / other)
        with (
            pa.input_stream(str(checkpoint / COMPRESSED), compression="zstd") as source,
            (whole / OPTIMIZER).open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        yield whole
