"""What a study is begun with, kept in ``study.json``: a continued study decides none of it again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.errors import OutputError
from llmtune.runs import derive_name, is_run
from llmtune.runs.documents import encode, write_atomically
from llmtune.runs.lock import hold
from llmtune.study.space import Dimension

FILE_NAME = "study.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """Everything that must not change between the trials of a study, or when it is continued.

    Attributes:
        identity: What makes this study this study: fingerprints of data, model, configuration and search.
        settings: The configuration every trial starts from, as plain values.
        model: The model that was chosen.
        method: How it is trained.
        defaults: The preset's own value of every searched key; None where the run decides.
        metric: The metric's name in the configuration.
    """

    name: str
    identity: Mapping[str, str]
    settings: Mapping[str, Any]
    sampler: str
    pruner: str
    seed: int
    model: str
    method: str
    space: tuple[Dimension, ...]
    defaults: Mapping[str, float | None]
    metric: str
    greater_is_better: bool

    def to_json(self) -> dict[str, Any]:
        """The document of ``study.json``."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {"space": [dimension.to_json() for dimension in self.space]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Settled:
        """The inverse of ``to_json``."""
        space = tuple(Dimension.from_json(dimension) for dimension in document["space"])
        return cls(**{**document, "space": space})


def study_directory(output: str | None, root: str, identity: Mapping[str, str], data_name: str) -> Path:
    """Where a study lives: as given, else ``studies/<name>`` beside the folder of runs, the same for the same command.

    Raises:
        OutputError: The place is a run directory.
    """
    if output is None:
        key = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()
        name = derive_name(data_name=data_name, model_id=identity["model"], identity_hash=key)
        return Path(root).absolute().parent / "studies" / name
    path = Path(output).absolute()
    if is_run(path):
        raise OutputError(f"{path} holds a run, not a study; choose another --output")
    return path


def read_settled(path: Path, identity: Mapping[str, str]) -> Settled | None:
    """What the study in ``path`` was begun with; None when there is no study.

    Raises:
        OutputError: It cannot be read, or is a study of another identity.
    """
    try:
        document = json.loads((path / FILE_NAME).read_bytes())
        settled = Settled.from_json(document)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path / FILE_NAME} cannot be read: {error!r}. Restore it from a backup, or choose another --output."
        ) from error
    if dict(settled.identity) != dict(identity):
        differing = sorted(key for key in identity if settled.identity.get(key) != identity[key])
        raise OutputError(
            f"{path} holds another study: it has {_spelled(settled.identity)}, this one has {_spelled(identity)} "
            f"({', '.join(differing)} differs). Choose another --output."
        )
    return settled


@contextmanager
def held(path: Path, settled: Settled) -> Iterator[Settled]:
    """Have the study's directory to oneself; makes it where it is missing, and removes it if nothing was tried in it.

    Raises:
        OutputError: Another living process has it, it cannot be written, or holds another study.
    """
    existed = path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write to the study directory {path}: {reason}. Choose an --output that you may write to."
        ) from error
    with hold(path):
        in_force = read_settled(path, settled.identity)
        if in_force is None:
            write_atomically(path / FILE_NAME, encode(settled.to_json(), indent=2))
        try:
            yield in_force or settled
        except BaseException:
            if not existed and not (path / "trials").exists():
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):  # other studies are there
                    path.parent.rmdir()
            raise


def _spelled(identity: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(identity.items()))
