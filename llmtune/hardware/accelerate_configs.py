"""The shipped configurations for ``accelerate launch``, and what a launch has set for its processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmtune.errors import ConfigError, LlmtuneError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]

# Set per rank by MPI launchers (Intel MPI, MPICH; Open MPI; MVAPICH), which accelerate follows instead of WORLD_SIZE.
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def accelerate_config_names() -> tuple[str, ...]:
    """Names of the shipped configurations, sorted."""
    return tuple(sorted(path.stem for path in _directory().glob("*.yaml")))


def accelerate_config_path(name: str) -> Path:
    """The file to pass to ``accelerate launch --config_file``.

    Raises:
        ConfigError: No configuration of that name is shipped.
    """
    names = accelerate_config_names()
    if name not in names:
        raise ConfigError("accelerate-config", [f"'{name}': no such configuration{did_you_mean(name, names)}"])
    return _directory() / f"{name}.yaml"


def _directory() -> Path:
    """Inside the package in a wheel; beside it in a checkout or an editable install."""
    for directory in (_PACKAGE / "accelerate_configs", _PACKAGE.parent / "accelerate_configs"):
        if directory.is_dir():
            return directory
    raise LlmtuneError(f"{_PACKAGE}: the shipped accelerate configurations are missing; reinstall llmtune")


def launch_shortfall(environ: Mapping[str, str]) -> str | None:
    """A warning when ``accelerate launch`` was asked for several processes and started one; None when all is well.

    The trace: accelerate exports ``MASTER_PORT`` for a launch of several processes, and a launch that really starts
    them sets ``WORLD_SIZE`` in each. accelerate 1.15 sets the first alone for ``--cpu --num_processes 2`` and for
    ``distributed_type: MULTI_CPU``.
    """
    if "MASTER_PORT" not in environ or "WORLD_SIZE" in environ or any(name in environ for name in _MPI_SIZES):
        return None
    return (
        "the launch asked for several processes (MASTER_PORT is set) but this is the only one (WORLD_SIZE is not set): "
        "accelerate starts one process for '--cpu --num_processes N' and for 'distributed_type: MULTI_CPU'. For N on "
        'the CPU use: accelerate launch --config_file "$(llmtune accelerate-config cpu_ddp)" --num_processes N '
        "-m llmtune train ... To run one process on purpose, unset MASTER_PORT."
    )


def launch_sharding(environ: Mapping[str, str]) -> str | None:
    """How this launch spreads the model over its ranks: ``fsdp2``, ``zero2``, ``zero3``; None where each has it whole.

    Read from what ``accelerate launch`` exports (accelerate 1.15, utils/launch.py).
    """
    if environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return "fsdp2"
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        return f"zero{stage}" if stage in ("2", "3") else None
    return None
