"""What a plan is made from: the machine, the model and the data, gathered once per run."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config import RunConfig, cache_dir
from llmtune.console import speaker
from llmtune.data import DataReport, DataStats, EncodedDataset, Source, check, encode, estimate_stats, resolve, split
from llmtune.errors import ConfigError, DataError
from llmtune.hardware import DeviceChoice, Hardware, choose_device, detect
from llmtune.models import ModelLocation, ModelSpec, load_tokenizer, locate, preset_of, read_spec, spec_from_entry
from llmtune.planning import Choice, Plan, PlanRequest, choose_model, make_plan
from llmtune.presets import CatalogueEntry, Preset, find_entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Held out when no evaluation data is given: a tenth, and never more rows than give a steady mean.
EVAL_FRACTION, MOST_EVAL_ROWS = 0.1, 500
# Bytes of English text per token of a 32k vocabulary, where neither tokenizer nor catalogue knows better.
USUAL_BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a run happens."""

    hardware: Hardware
    device: DeviceChoice


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model a run starts from; ``location`` and ``tokenizer`` are None while only its catalogue entry is known."""

    spec: ModelSpec
    preset: Preset
    choice: Choice[str]
    location: ModelLocation | None
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is learned from and judged on; the rows are None while only estimates are known."""

    train: EncodedDataset | None
    eval: EncodedDataset | None
    stats: DataStats
    eval_rows: int
    fingerprint: str


def machine_of(config: RunConfig, hardware: Hardware | None = None) -> Machine:
    """This machine, or the one described by ``hardware``, and the device that will train."""
    hardware = hardware or detect(config.output.dir or config.output.root)
    return Machine(hardware=hardware, device=choose_device(hardware, config.train.device))


def sources_of(config: RunConfig, data: Any) -> tuple[Source, Source | None]:
    """Training and evaluation data, found but not read.

    Raises:
        DataError: There is nothing to train on.
    """
    if data is None and config.data.path is None:
        raise DataError("no data was given; pass a file, a directory or a glob: llmtune train DATA")
    train = resolve(config.data.path if data is None else data)
    return train, resolve(config.data.eval_path) if config.data.eval_path else None


def check_data(config: RunConfig, source: Source) -> DataReport:
    """Read every row and collect every problem; nothing is tokenised."""
    return check(source, format=config.data.format, columns=config.data.columns)


def model_of(config: RunConfig, machine: Machine, source: Source, *, download: bool) -> Model:
    """The model that was asked for, or the best one for this machine and data.

    Args:
        config: What the user asked.
        machine: Where it will train.
        source: Training data; its size decides what is feasible.
        download: Whether files may be fetched. Without, a catalogued model is described by its entry.
    """
    choice = Choice(config.model.id, "you set model.id", "user")
    wanted = config.model
    if wanted.id == "auto":
        entry, choice = _choose_entry(config, machine, source)
        wanted = wanted.model_copy(update={"id": entry.id})
    if not download and not _is_here(wanted.id) and (known := find_entry(wanted.id)) is not None:
        return Model(
            spec=spec_from_entry(known), preset=Preset.load(known.family), choice=choice, location=None, tokenizer=None
        )
    location = locate(wanted)
    preset = preset_of(location)
    tokenizer = load_tokenizer(location, _chat_template(config))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = preset.chat_template
    spec = read_spec(location, preset.family)
    return Model(spec=spec, preset=preset, choice=choice, location=location, tokenizer=tokenizer)


def data_of(config: RunConfig, model: Model, train: Source, evaluation: Source | None) -> Data:
    """Encoded rows and their statistics; estimates where the model's tokenizer is not at hand."""
    fingerprint = combined_fingerprint(train, evaluation)
    if model.tokenizer is None:
        entry = find_entry(model.spec.id)
        stats = _estimated(config, train, entry.bytes_per_token if entry else USUAL_BYTES_PER_TOKEN, model.spec.context)
        share = _eval_share(config, stats.rows)
        return Data(train=None, eval=None, stats=stats, eval_rows=int(stats.rows * share), fingerprint=fingerprint)
    rows = _encode(config, model, train, "training data")
    if evaluation is not None:
        held_out: EncodedDataset | None = _encode(config, model, evaluation, "evaluation data")
    elif (share := _eval_share(config, len(rows))) > 0:
        rows, held_out = split(rows, share, config.train.seed)
    else:
        held_out = None
    eval_rows = len(held_out) if held_out is not None else 0
    return Data(train=rows, eval=held_out, stats=rows.stats, eval_rows=eval_rows, fingerprint=fingerprint)


def _estimated(config: RunConfig, source: Source, bytes_per_token: float, context: int) -> DataStats:
    too_long = config.data.max_length or context if config.data.too_long == "drop" else None
    return estimate_stats(
        source,
        bytes_per_token=bytes_per_token,
        format=config.data.format,
        columns=config.data.columns,
        max_length=too_long,
    )


def combined_fingerprint(train: Source, evaluation: Source | None) -> str:
    """SHA-256 that changes when training or evaluation data change."""
    parts = [train.fingerprint, evaluation.fingerprint if evaluation else "held out"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def plan_of(config: RunConfig, machine: Machine, model: Model, data: Data, *, processes: int) -> Plan:
    """The plan of these facts."""
    return make_plan(plan_request(config, machine, model, data, processes=processes))


def plan_request(config: RunConfig, machine: Machine, model: Model, data: Data, *, processes: int) -> PlanRequest:
    """The facts in the form the planner takes."""
    return PlanRequest(
        config=config,
        hardware=machine.hardware,
        device=machine.device,
        spec=model.spec,
        preset=model.preset,
        stats=data.stats,
        eval_rows=data.eval_rows,
        processes=processes,
        model_choice=model.choice,
    )


def _choose_entry(config: RunConfig, machine: Machine, source: Source) -> tuple[CatalogueEntry, Choice[str]]:
    """The best catalogue entry for this data, which is read once and scaled to each entry's tokens."""
    read = _estimated(config, source, USUAL_BYTES_PER_TOKEN, sys.maxsize)
    eval_rows = int(read.rows * _eval_share(config, read.rows))

    def stats_of(entry: CatalogueEntry) -> DataStats:
        scale = USUAL_BYTES_PER_TOKEN / entry.bytes_per_token
        counts = ("tokens", "supervised_tokens", "length_p50", "length_p95", "length_p99", "length_max")
        return replace(read, **{name: round(getattr(read, name) * scale) for name in counts})

    def plan(entry: CatalogueEntry) -> Plan:
        model = Model(
            spec=spec_from_entry(entry),
            preset=Preset.load(entry.family),
            choice=Choice(entry.id, "candidate", "derived"),
            location=None,
            tokenizer=None,
        )
        data = Data(train=None, eval=None, stats=stats_of(entry), eval_rows=eval_rows, fingerprint="")
        return plan_of(config, machine, model, data, processes=1)

    drops = config.data.too_long == "drop"
    return choose_model(plan, lambda entry: 0 if drops else stats_of(entry).length_max)


def _is_here(model_id: str) -> bool:
    """Whether the model's configuration and tokenizer are on this disk already."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if model_id.startswith("builtin:") or Path(model_id).is_dir():
        return True
    try:
        names = ("config.json", "tokenizer_config.json")
        return all(isinstance(try_to_load_from_cache(model_id, name), str) for name in names)
    except HFValidationError:
        return False


def _chat_template(config: RunConfig) -> str | None:
    if config.data.chat_template is None:
        return None
    path = Path(config.data.chat_template)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("data.chat_template", [f"{path} cannot be read: {error}; expected a Jinja file"]) from None


def _encode(config: RunConfig, model: Model, source: Source, what: str) -> EncodedDataset:
    with speaker.progress(f"tokenising {what}", None) as bar:
        return encode(
            source,
            model.tokenizer,
            format=config.data.format,
            columns=config.data.columns,
            max_length=config.data.max_length or model.spec.context,
            too_long=config.data.too_long,
            on_bad_row=config.data.on_bad_row,
            cache_dir=cache_dir() / "tokens",
            progress=_rows_done(bar.update),
        )


def _rows_done(update: Callable[[float], None]) -> Callable[[int], None]:
    return lambda rows: update(rows)


def _eval_share(config: RunConfig, rows: int) -> float:
    if config.data.eval_fraction is not None:
        return config.data.eval_fraction
    return min(EVAL_FRACTION, MOST_EVAL_ROWS / max(rows, 1))
