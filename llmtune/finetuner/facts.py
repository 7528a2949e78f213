"""What a plan is made from: the machine, the model and the data, gathered once per run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from llmtune.collector import importing
from llmtune.config import RunConfig, cache_dir, has_hub_token, load_config
from llmtune.console import quieten_libraries
from llmtune.errors import ConfigError, PlanError
from llmtune.finetuner import rows
from llmtune.finetuner.rows import Data, Inputs
from llmtune.hardware import (
    DeviceChoice,
    Hardware,
    cached_rates,
    choose_device,
    detect,
    launch_sharding,
    with_rates,
)
from llmtune.models import (
    Download,
    ModelLocation,
    ModelSpec,
    download_of,
    load_tokenizer,
    locate,
    preset_of,
    read_spec,
    spec_from_entry,
)
from llmtune.planning import Choice, Plan, PlanRequest, choose_model, make_plan
from llmtune.planning.checks import name_problems
from llmtune.planning.correction import Experience, correction
from llmtune.presets import CatalogueEntry, Preset, find_entry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Bytes of English text per token of a 32k vocabulary, where neither tokenizer nor catalogue knows better.
USUAL_BYTES_PER_TOKEN = 4.0
# What a model and its tokenizer are loaded from; weights in pickles do not count beside safetensors.
LOADED_SUFFIXES = frozenset({".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py"})
# Run directories that are looked into for what they teach about predictions, the newest: 50 take about 2 ms.
RUNS_LEARNED_FROM = 50
# Free memory moves by a few percent between two starts. A model is chosen for whole sixteenths of the device's memory,
# so that such a move seldom changes the choice. llmtune: chosen.
MEMORY_STEPS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a run happens, and what earlier runs there have shown, newest first.

    ``is_here``: whether it is this machine, and not one that was described.
    """

    hardware: Hardware
    device: DeviceChoice
    experiences: tuple[Experience, ...] = ()
    is_here: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The model a run starts from; ``location`` and ``tokenizer`` are None while only its catalogue entry is known."""

    spec: ModelSpec
    preset: Preset
    choice: Choice[str]
    location: ModelLocation | None
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """What is in a base model: its commit where it is the Hub's, and a digest of each file it is loaded from."""

    commit: str | None
    files: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """``base_model`` in ``run.json`` and manifests."""
        return {"commit": self.commit, "files": self.files}


@contextmanager
def reading_base(location: ModelLocation) -> Iterator[Callable[[], BaseModel]]:
    """A block that loads the weights; what it is given returns, once they are here, the content of their files.

    The files of a directory are read meanwhile. Those of the Hub may only come with the weights.
    """
    with ThreadPoolExecutor(max_workers=1) as beside:
        begun = beside.submit(base_of, location) if location.revision is None else None
        yield lambda: base_of(location) if begun is None else begun.result()


def base_of(location: ModelLocation) -> BaseModel:
    """The content of a base model whose files are here; every byte is read, unless the Hub's cache names its hash."""
    directory = Path(location.source)
    if location.revision is not None:
        from huggingface_hub import try_to_load_from_cache

        directory = Path(str(try_to_load_from_cache(location.source, "config.json", revision=location.revision))).parent
    found = sorted(p for p in directory.iterdir() if p.suffix in LOADED_SUFFIXES and p.is_file() and p.name[0] != ".")
    if any(path.suffix == ".safetensors" for path in found):
        found = [path for path in found if path.suffix != ".bin"]
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(_content, found))
    return BaseModel(commit=location.revision, files={p.name: d for p, d in zip(found, digests, strict=True)})


def _content(path: Path) -> str:
    """SHA-256 of a file. The Hub's cache keeps large files under that name: what it has checked is not read again."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and len(blob.name) == 64:
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine_of(config: RunConfig, hardware: Hardware | None = None) -> Machine:
    """This machine as far as it is known without measuring, or the one described by ``hardware``.

    Raises:
        ConfigError: An optimizer, schedule or tracker that a run there could not use; said before data are read.
    """
    found = hardware or detect(config.output.dir or config.output.root)
    device = choose_device(found, config.train.device)
    if problems := name_problems(config, device.type):
        raise ConfigError("configuration", problems)
    if hardware is None:
        found = replace(found, rates=cached_rates(found, device, cache_dir()))
    return Machine(
        hardware=found,
        device=device,
        experiences=experiences(Path(config.output.root)),
        is_here=hardware is None,
    )


def measured(config: RunConfig, machine: Machine) -> Machine:
    """The same machine with the rates of its device, measured now unless they were measured before."""
    place = config.output.dir or config.output.root
    return replace(machine, hardware=with_rates(machine.hardware, machine.device, cache_dir(), disk_path=place))


def experiences(root: Path) -> tuple[Experience, ...]:
    """What the newest runs below ``root`` have shown about predictions, newest first; a damaged run says nothing."""
    found = []
    for path in _newest_runs(root):
        try:
            document = orjson.loads(path.read_bytes())
            found.append(Experience.from_json(document["experience"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return tuple(found)


def _newest_runs(root: Path) -> list[Path]:
    return sorted(root.glob("*/run.json"), key=_changed, reverse=True)[:RUNS_LEARNED_FROM]


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def model_of(config: RunConfig, machine: Machine, inputs: Inputs, *, download: bool) -> Model:
    """The model that was asked for, or the best one for this machine and data.

    Args:
        config: What the user asked.
        machine: Where it will train.
        inputs: The data; its size decides what is feasible.
        download: Whether files may be fetched. Without, a catalogued model is described by its entry.
    """
    choice = Choice(config.model.id, "you set model.id", "user")
    wanted = config.model
    if wanted.id == "auto":
        choice = _begun(config, inputs) or _choose_entry(config, machine, inputs)
        wanted = wanted.model_copy(update={"id": choice.value})
    if not download and not _is_here(wanted.id) and (known := find_entry(wanted.id)) is not None:
        return Model(
            spec=spec_from_entry(known), preset=Preset.load(known.family), choice=choice, location=None, tokenizer=None
        )
    with importing():
        quieten_libraries()
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401  what is needed for all that follows
    location = locate(wanted)
    preset = preset_of(location)
    tokenizer = load_tokenizer(location, _chat_template(config))
    if tokenizer.chat_template is None:
        tokenizer.chat_template = preset.chat_template
    spec = read_spec(location, preset.family)
    return Model(spec=spec, preset=preset, choice=choice, location=location, tokenizer=tokenizer)


def data_of(config: RunConfig, model: Model, inputs: Inputs) -> Data:
    """Encoded rows and their statistics; estimates where the model's tokenizer is not at hand."""
    if model.tokenizer is not None:
        return rows.tokenised(config, inputs, model.tokenizer, model.spec)
    entry = find_entry(model.spec.id)
    bytes_per_token = entry.bytes_per_token if entry else USUAL_BYTES_PER_TOKEN
    found = rows.surveyed(inputs.train)
    return rows.estimate(config, inputs, found, bytes_per_token=bytes_per_token, context=model.spec.context)


def plan_of(config: RunConfig, machine: Machine, model: Model, data: Data, *, processes: int) -> Plan:
    """The plan of these facts."""
    return make_plan(plan_request(config, machine, model, data, processes=processes))


def _download(config: RunConfig, machine: Machine, model: Model) -> Download | None:
    """Return the download that a run of the model needs; None where the weights are on this disk."""
    location = model.location
    return download_of(
        model.spec,
        source=None if location is None else location.source,
        revision=config.model.revision if location is None else location.revision,
        output=config.output.dir or config.output.root,
        is_here=machine.is_here,
    )


def plan_request(
    config: RunConfig, machine: Machine, model: Model, data: Data, *, processes: int, is_candidate: bool = False
) -> PlanRequest:
    """The facts in the form the planner takes; what a mere candidate would download is left out."""
    best = machine.hardware.precision_support[0]  # what the planner takes, unless told otherwise
    learned = correction(
        machine.experiences,
        device=machine.device.name,
        precision=config.train.precision or ("fp32" if best == "tf32" else best),
        quantization=config.adapter.quantization if config.train.method == "qlora" else None,
        parameters=model.spec.parameters,
    )
    return PlanRequest(
        config=config,
        hardware=machine.hardware,
        device=machine.device,
        spec=model.spec,
        preset=model.preset,
        stats=data.stats,
        eval_rows=data.eval_rows,
        complexity=data.complexity,
        processes=processes,
        sharding=launch_sharding(os.environ) if processes > 1 else None,
        model_choice=model.choice,
        download=None if is_candidate else _download(config, machine, model),
        correction=learned,
    )


def _begun(config: RunConfig, inputs: Inputs) -> Choice[str] | None:
    """Return the model that the run of this command was begun with; None where there is no such run.

    Free memory and measured rates differ from start to start. The choice must not: the run would never be found again.
    With ``--output`` the run there is meant, whatever else has changed; without, an unfinished run of the same data and
    configuration.
    """
    if config.recover.resume == "never":
        return None
    named = config.output.dir
    for path in _newest_runs(Path(config.output.root)) if named is None else [Path(named) / "run.json"]:
        try:
            run = orjson.loads(path.read_bytes())
            unfinished = run["status"] != "finished"
            if run["data_fingerprint"] != inputs.fingerprint or not (unfinished or named):
                continue
            begun = load_config(run["config"], environ={}, where=str(path))
        except (OSError, ValueError, KeyError, TypeError, ConfigError):
            continue
        if named or begun.identity_hash() == config.identity_hash():
            reason = f"{path.parent} has begun with it" + (" and is not finished" if unfinished else "")
            return Choice(str(run["model"]), reason, "derived")
    return None


def _steady(machine: Machine) -> Machine:
    """Return the machine with its free memory rounded down, so that the same command makes the same choice."""
    device = machine.device
    step = device.total_bytes // MEMORY_STEPS
    if device.free_bytes < step or step == 0:
        return machine
    return replace(machine, device=replace(device, free_bytes=device.free_bytes // step * step))


def _choose_entry(config: RunConfig, machine: Machine, inputs: Inputs) -> Choice[str]:
    """Return the best catalogue entry for this data; free memory counts in steps, unless nothing fits then."""
    steady = _steady(machine)
    try:
        return _best_entry(config, steady, inputs)
    except PlanError:
        if steady == machine:
            raise
        return _best_entry(config, machine, inputs)


def _best_entry(config: RunConfig, machine: Machine, inputs: Inputs) -> Choice[str]:
    """The best catalogue entry for this data, estimated in each entry's tokens.

    Raises:
        PlanError: Nothing in the catalogue fits.
    """
    found = rows.surveyed(inputs.train)

    def data_for(entry: CatalogueEntry) -> Data:
        return rows.estimate(config, inputs, found, bytes_per_token=entry.bytes_per_token, context=entry.context)

    def plan(entry: CatalogueEntry) -> Plan:
        model = Model(
            spec=spec_from_entry(entry),
            preset=Preset.load(entry.family),
            choice=Choice(entry.id, "candidate", "derived"),
            location=None,
            tokenizer=None,
        )
        request = plan_request(config, machine, model, data_for(entry), processes=1, is_candidate=True)
        return make_plan(request, alternatives=False)

    drops = config.data.too_long != "refuse"
    _, choice = choose_model(
        plan,
        lambda entry: 0 if drops else data_for(entry).stats.length_max,
        gated=config.model.token is not None or has_hub_token(),
    )
    return choice


def _is_here(model_id: str) -> bool:
    """Whether the model's configuration and tokenizer are on this disk already."""
    if model_id.startswith("builtin:") or Path(model_id).is_dir():
        return True
    from huggingface_hub import constants

    if not (Path(constants.HF_HUB_CACHE) / f"models--{model_id.replace('/', '--')}").is_dir():
        return False  # told without loading the client, which takes a tenth of a second
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

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
