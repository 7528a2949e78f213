"""Commands that tell of the machine and of what ships with llmtune: doctor, presets, accelerate-config."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.options import Json
from llmtune.console import speaker
from llmtune.units import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmtune.hardware import Rates
    from llmtune.presets import Preset
    from llmtune.registry import Availability

Family = Annotated[
    str | None, typer.Argument(metavar="FAMILY", help="A family such as qwen, or a preset file of your own (.yaml).")
]
ConfigName = Annotated[str | None, typer.Argument(metavar="NAME", help="Which configuration; all when not given.")]


@command("doctor", example="llmtune doctor\nllmtune doctor --json > this-machine.json")
def doctor(as_json: Json = False) -> None:
    """Show what this machine can do.

    Hardware, how fast it was measured to be, versions, what is usable, what is missing and the command that mends it.
    The last table lists every optimizer, schedule and tracker, and what each of them needs.
    """
    from llmtune.config import cache_dir
    from llmtune.hardware import choose_device, diagnose
    from llmtune.registry import usable_settings

    found = diagnose(cache=cache_dir())
    settings = usable_settings(choose_device(found.hardware).type)
    if as_json:
        listed = {
            key: {name: {"available": one.available, "why": one.why} for name, one in names.items()}
            for key, names in settings.items()
        }
        speaker.emit(found.to_json() | {"settings": listed})
        return
    speaker.show(found.hardware.describe())
    speaker.show(
        f"{format_bytes(found.hardware.usable_ram_bytes)} of RAM usable now, "
        f"{format_bytes(found.hardware.disk_free_bytes)} of disk free here"
    )
    if (rates := found.hardware.rates) is not None:
        speaker.table("Measured", ("what", "rate"), _rates(rates, on_cpu=not found.hardware.accelerators))
    speaker.table("Versions", ("package", "version"), list(found.versions.items()))
    usable = [(name, "yes" if item.available else "no", item.why) for name, item in found.usable.items()]
    speaker.table("Usable", ("what", "usable", "why"), usable)
    speaker.table("Settings", ("key", "usable", "names, and what they need"), _settings(settings))
    for item in found.problems:
        speaker.show(f"! {item.problem}\n  mend: {item.fix}")
    if not found.problems:
        speaker.show("No problems found.")


def _settings(settings: Mapping[str, Mapping[str, Availability]]) -> list[tuple[str, str, str]]:
    """Return the rows of a table; names that need the same share a row."""
    rows = []
    for key, names in settings.items():
        alike: dict[tuple[bool, str], list[str]] = {}
        for name, one in names.items():
            alike.setdefault((one.available, one.needs if one.available else one.why), []).append(name)
        for (available, needs), listed in alike.items():
            said = f"{', '.join(listed)}: {needs}" if needs else ", ".join(listed)
            rows.append((key, "yes" if available else "no", said))
    return rows


def _rates(rates: Rates, *, on_cpu: bool) -> list[tuple[str, str]]:
    rows = []
    for speed in rates.speeds:
        threads = f", {speed.threads} thread{'s' * (speed.threads != 1)}" if on_cpu else ""
        rows += [
            (f"{precision} matrix products{threads}", f"{rate / 1e12:.2f} TFLOP/s")
            for precision, rate in speed.matmul.items()
        ]
        rows.append((f"memory{threads}", f"{speed.memory_bytes_per_second / 1e9:.0f} GB/s"))
    disk = rates.disk_write_bytes_per_second
    return [*rows, ("disk, written and synchronised", f"{disk / 1e6:.0f} MB/s" if disk else "not writable")]


@command("presets", example="llmtune presets\nllmtune presets qwen")
def presets(family: Family = None, as_json: Json = False) -> None:
    """List, show and validate presets.

    With FAMILY every number is shown with its source. Exit code 2 when a preset is not valid.
    """
    from llmtune.errors import ConfigError
    from llmtune.presets import Preset

    if family is None:
        found = [Preset.load(name) for name in Preset.families()]
    else:
        found = [Preset.from_file(family) if family.endswith((".yaml", ".yml")) else Preset.load(family)]
    problems = {preset.family: preset.validate()[1] for preset in found}
    if as_json:
        documents = [preset.to_json() | {"problems": problems[preset.family]} for preset in found]
        speaker.emit(documents if family is None else documents[0])
    elif family is None:
        rows = [(p.family, len(p.catalogue), "no" if problems[p.family] else "yes", p.title) for p in found]
        speaker.table("", ("family", "models", "valid", "title"), rows)
    else:
        _show(found[0])
    bad = [f"{name}: {problem}" for name, listed in problems.items() for problem in listed]
    if bad:
        raise ConfigError("presets", bad)


def _show(preset: Preset) -> None:
    speaker.show(f"{preset.family}: {preset.title}")
    if preset.notice:
        speaker.show(preset.notice)
    speaker.show(f"LoRA targets: {', '.join(preset.lora_targets)}")
    models = [
        (
            e.id,
            format_count(e.parameters),
            e.context,
            e.licence,
            "gated" if e.gated else "open",
            ", ".join(f"{method} {format_bytes(size)}" for method, size in e.minimum_memory_bytes.items()),
        )
        for e in preset.catalogue
    ]
    speaker.table("Models", ("id", "parameters", "context", "licence", "access", "least memory"), models)
    for goal, sizes in preset.levels.items():
        for size, level in sizes.items():
            rows = [(name, getattr(level, name), source) for name, source in level.sources.items()]
            speaker.table(f"{goal}, {size} data", ("number", "value", "source"), rows)


@command(
    "accelerate-config",
    example='accelerate launch --config_file "$(llmtune accelerate-config ddp)" -m llmtune train chats.jsonl',
)
def accelerate_config(name: ConfigName = None, as_json: Json = False) -> None:
    """Find a configuration for accelerate.

    Lists those that ship with llmtune; with NAME prints only the path of one, for accelerate launch.
    """
    from llmtune.hardware import accelerate_config_names, accelerate_config_path

    if name is not None:
        path = str(accelerate_config_path(name))
        speaker.emit({"name": name, "path": path}) if as_json else speaker.show(path)
        return
    paths = [(each, str(accelerate_config_path(each))) for each in accelerate_config_names()]
    if as_json:
        speaker.emit([{"name": each, "path": path} for each, path in paths])
    else:
        for each, path in paths:  # no table: it would break long paths on a narrow terminal
            speaker.show(f"{each:18}{path}")
