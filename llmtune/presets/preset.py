"""One model family: what it is recognised by, how it is tuned, which models it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from llmtune.errors import ConfigError, did_you_mean
from llmtune.presets.checks import problems_of
from llmtune.presets.facts import GOALS, SIZES, CatalogueEntry, Level, ModelShape, RateRule, Recognition
from llmtune.presets.reading import preset_files, read_preset

GENERIC = "generic"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Everything llmtune knows about tuning one model family.

    Attributes:
        family: Short name, which is also the name of its file.
        lora_targets: Names of the linear modules an adapter sits on, over all architectures of the family, or
            ``("all-linear",)``.
        chat_template: Jinja template for models whose tokenizer brings none; None when it always brings one.
        levels: Goal -> size of the data -> numbers.
        rate: How the learning rates of the levels are carried over to other widths and runs; None where they are taken
            as they stand.
        notice: What a user should know when this preset is used.
    """

    family: str
    title: str
    recognition: Recognition
    lora_targets: tuple[str, ...]
    chat_template: str | None
    levels: Mapping[str, Mapping[str, Level]]
    catalogue: tuple[CatalogueEntry, ...]
    rate: RateRule | None = None
    notice: str | None = None

    @classmethod
    def families(cls) -> tuple[str, ...]:
        """The families that have a preset, ``generic`` last."""
        return tuple(sorted(preset_files(), key=lambda family: (family == GENERIC, family)))

    @classmethod
    def load(cls, family: str) -> Preset:
        """The shipped preset of a family.

        Raises:
            ConfigError: There is no preset of that name.
        """
        if family not in preset_files():
            raise ConfigError("presets", [f"no preset '{family}'{did_you_mean(family, cls.families())}"])
        return _load(family)

    @classmethod
    def from_file(cls, path: str | Path) -> Preset:
        """A preset from a YAML file of the same form as the shipped ones; ``validate`` checks its numbers.

        Raises:
            ConfigError: The file cannot be read, or has unknown, missing or ill-typed entries.
        """
        return cls(**read_preset(Path(path)))

    @classmethod
    def recognise(
        cls,
        model_type: str | None = None,
        architecture: str | None = None,
        name: str | None = None,
        shape: ModelShape | None = None,
    ) -> Preset:
        """The preset of the family a model belongs to: told by name, then shape, architecture, model type.

        A name or shape counts only where architecture and model type, if known, agree with it.

        Returns:
            The family's preset, or the generic one, which carries a notice.
        """
        presets = [cls.load(family) for family in cls.families() if family != GENERIC]
        possible = [preset for preset in presets if preset.recognition.allows(model_type, architecture)]
        if name is not None:
            for preset in possible:
                if preset.recognition.matches_name(name):
                    return preset
        for preset in possible:
            if any(entry.shape == shape for entry in preset.catalogue):
                return preset
        sufficient = [preset for preset in presets if not preset.recognition.name_required]
        for preset in sufficient:
            if architecture in preset.recognition.architectures:
                return preset
        for preset in sufficient:
            if architecture is None and model_type in preset.recognition.model_types:
                return preset
        return cls.load(GENERIC)

    @classmethod
    def is_shared(cls, model_type: str | None, architecture: str | None) -> bool:
        """Return whether only a name or an exact shape tells some family from others of this architecture."""
        named = (cls.load(family).recognition for family in cls.families() if family != GENERIC)
        return any(recognition.name_required and recognition.allows(model_type, architecture) for recognition in named)

    @classmethod
    def custom(cls, requirements: Mapping[str, Any]) -> Preset:
        """A preset made to requirements: a family's, with numbers of its levels replaced and its catalogue filtered.

        Args:
            requirements: ``family`` to start from (generic when not given); any number of a level, such as ``epochs``
                or ``rank``, for every level or only those of ``goal`` and ``size``; ``max_memory`` such as ``8GiB``
                keeps the models that fit, with ``method`` or with any method. A new rank without a new alpha keeps
                their ratio. ``settings`` gives the numbers to ``FineTuner``.

        Raises:
            ConfigError: A requirement is unknown or out of range, or no model of the family fits; all are listed.
        """
        from llmtune.presets.custom import customise

        return customise(requirements)

    def level(self, goal: str, size: str) -> Level:
        """The numbers for a goal (``quality``) and a size of the data (``small``; see ``dataset_size``).

        Raises:
            ConfigError: Goal or size is unknown.
        """
        problems = [
            f"{what} '{given}' is unknown{did_you_mean(given, known)}"
            for what, given, known in (("goal", goal, GOALS), ("size", size, SIZES))
            if given not in known
        ]
        if problems:
            raise ConfigError(f"preset {self.family}", problems)
        return self.levels[goal][size]

    def settings(self, goal: str, size: str) -> dict[str, Any]:
        """The numbers of a level as configuration keys, which is how a preset of your own is used.

            numbers = Preset.custom({"family": "qwen", "rank": 64}).settings("quality", "small")
            FineTuner("data.jsonl", **numbers)

        Learning rates are for adapters. A rate that depends on the model and the run (see `RateRule`) is left to the
        plan, unless it is one of your own. Evaluations and saves per pass are not among them: their keys count updates.

        Raises:
            ConfigError: Goal or size is unknown.
        """
        from llmtune.presets.custom import SETTINGS, SOURCE

        level = self.level(goal, size)
        planned = {"learning_rate"} if self.rate and level.sources["learning_rate"] != SOURCE else set()
        return {key: getattr(level, name) for name, key in SETTINGS.items() if name not in planned}

    def validate(self) -> tuple[bool, list[str]]:
        """Whether the preset can be used, and one sentence per problem."""
        problems = problems_of(self)
        return not problems, problems

    def to_json(self) -> dict[str, Any]:
        """Plain values, as ``llmtune presets FAMILY --json`` prints them."""
        return asdict(self)


@cache
def _load(family: str) -> Preset:
    return Preset(**read_preset(preset_files()[family]))


def catalogue() -> tuple[CatalogueEntry, ...]:
    """Every model of every family."""
    return tuple(entry for family in Preset.families() for entry in Preset.load(family).catalogue)


def find_entry(model_id: str) -> CatalogueEntry | None:
    """The catalogue's entry of a model, or None when it is not catalogued."""
    return next((entry for entry in catalogue() if entry.id == model_id), None)
