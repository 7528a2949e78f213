"""The shape of a configuration. ``None`` means: decide for me, and tell me why.

Groups follow the life of a run: model, data, train, adapter, evaluate, save, recover, monitor, output.
"""

from __future__ import annotations

import hashlib
import json
import math
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from llmtune.config.aliases import value_of
from llmtune.config.origin import Origin

Goal = Literal["highspeed", "quality", "bestaccuracy"]
Method = Literal["lora", "qlora", "full"]
TooLong = Literal["refuse", "drop", "left", "turns"]
Supervise = Literal["all", "last", "completion", "text"]
Duplicates = Literal["keep", "drop_exact", "drop_near"]
TextRows = Literal["documents", "lines"]
# What switches a setting off, besides YAML's false.
OFF_WORDS = ("off", "no", "none", "false")
NO_SAVES = "an integer {}; checkpoints are what a stopped run continues from, and a large save.every_steps saves rarely"
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]


def _argument(value: Any) -> Any:
    """Convert one argument of an optimizer or a schedule: the text ``1e-4`` of YAML 1.1 becomes a number."""
    if isinstance(value, str):
        number = _number(value)
        return number if isinstance(number, float) and math.isfinite(number) else value
    if isinstance(value, list | tuple):
        parts = [_argument(part) for part in value]
        if all(isinstance(part, int | float) and not isinstance(part, bool) for part in parts):
            return tuple(parts)
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise PydanticCustomError("argument", "a finite number, a text, true or false, or a list of numbers")


Arguments = dict[str, Annotated[Any, BeforeValidator(_argument)]]


class Group(BaseModel):
    """Base of every group: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _as_people_write(cls, value: Any, info: ValidationInfo) -> Any:
        """``auto`` for a key chosen when left out, ``1e-4`` (text in YAML 1.1) for a number, ``a, b`` for a list.

        ``off`` (false in YAML 1.1), ``no`` and ``none`` switch off what can be switched off; the field says which value
        that is, or what to do where it cannot. A switch is not a number, though pydantic would read ``true`` as 1.
        """
        field = cls.model_fields[info.field_name or ""]
        if value == "auto" and field.default is None:
            return None
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if "off" in extra and _is_off(value):
            return extra["off"]
        if "no_off" in extra and (_is_off(value) or (value in (0, "0") and not isinstance(value, bool))):
            raise PydanticCustomError("off", "{expected}", {"expected": extra["no_off"]})
        kinds = kinds_of(field.annotation)
        if kinds & {int, float} and isinstance(value, bool):
            raise PydanticCustomError("number", "a number")
        if kinds & {int, float} and isinstance(value, str):
            return _number(value)
        if tuple in kinds and isinstance(value, str):
            return [part.strip() for part in value.split(",")]
        return value


def kinds_of(annotation: Any) -> set[Any]:
    """The plain types a value of this annotation may have, None left out: ``float | None`` -> ``{float}``."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return {kind for part in get_args(annotation) if part is not NoneType for kind in kinds_of(part)}
    return {get_origin(annotation) or annotation}


def _is_off(value: Any) -> bool:
    return value is False or (isinstance(value, str) and value.strip().lower() in OFF_WORDS)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


class ModelConfig(Group):
    """Which base model, and how it may be fetched."""

    id: str = Field("auto", min_length=1, description="auto, builtin:tiny, a Hub id or a local directory")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    token: SecretStr | None = Field(None, description="Hub access token; HF_TOKEN works too")
    trust_remote_code: bool = Field(False, description="let the model repository run its own Python code")


class SourceConfig(Group):
    """One part of a mix of data."""

    path: str = Field(min_length=1, description="file, directory or glob")
    weight: Annotated[float, Field(gt=0)] = Field(1.0, description="how often each of its rows is seen in one epoch")
    format: str | None = Field(None, description="as data.format, for this part alone")
    columns: dict[str, str] = Field(default_factory=dict, description="as data.columns, for this part alone")


class DataConfig(Group):
    """What to learn from."""

    path: str | None = Field(None, description="training data: file, directory or glob")
    sources: tuple[SourceConfig, ...] = Field((), description="a mix instead of path: a list of path and weight")
    eval_path: str | None = Field(
        None, description="evaluation data; else the split of the data, or a share of its rows"
    )
    format: str | None = Field(None, description="chat, sharegpt, alpaca, prompt_completion, question_answer, text")
    columns: dict[str, str] = Field(default_factory=dict, description="field of the format -> column of the data")
    ignore_columns: tuple[str, ...] = Field((), description="columns to treat as if they were not there")
    text_rows: TextRows = Field(
        "documents", description="a row of a .txt or .md file: the whole file (documents), or each line (lines)"
    )
    max_length: Annotated[int, Field(ge=16)] | None = Field(
        None, description="longest row in tokens", json_schema_extra={"off": None}
    )
    too_long: TooLong = Field(
        "refuse", description="rows longer than max_length: refuse, drop, cut left or whole turns"
    )
    supervise: Supervise = Field("all", description="what is learned: all answers, the last, the completion, all text")
    duplicates: Duplicates = Field(
        "keep", description="rows that repeat another or an evaluation row: keep, drop_exact, drop_near"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="rows that cannot be read or trained on")
    eval_fraction: Share | None = Field(
        None, description="share of rows held out when no eval_path is given", json_schema_extra={"off": 0.0}
    )
    chat_template: str | None = Field(None, description="Jinja file that replaces the tokenizer's chat template")


class TrainConfig(Group):
    """How the weights move."""

    preset: Goal = Field("quality", description="what to aim for")
    method: Method | None = Field(None, description="lora, qlora or full; auto when not given")
    epochs: Annotated[float, Field(gt=0)] | None = Field(None, description="passes over the training data")
    max_steps: Positive | None = Field(None, description="stop after this many updates")
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="peak learning rate")
    schedule: str | None = Field(None, description="constant, linear, cosine, … as in transformers")
    schedule_arguments: Arguments = Field(default_factory=dict, description="arguments of the schedule")
    warmup_ratio: Share | None = Field(
        None, description="share of the updates spent warming up", json_schema_extra={"off": 0.0}
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = Field(
        None, description="decoupled weight decay", json_schema_extra={"off": 0.0}
    )
    optimizer: str | None = Field(None, description="a name of transformers' OptimizerNames")
    optimizer_arguments: Arguments = Field(default_factory=dict, description="arguments of the optimizer")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="gradient norm is clipped to this",
        json_schema_extra={"no_off": "a number > 0; 1e9 never clips"},
    )
    global_batch_size: Positive | None = Field(None, description="examples per update, over all processes")
    micro_batch_size: Positive | None = Field(None, description="most examples per forward pass on one device")
    token_budget: Positive | None = Field(None, description="most padded tokens per forward pass on one device")
    precision: Literal["bf16", "fp16", "tf32", "fp32"] | None = Field(None, description="arithmetic of the base model")
    packing: bool | None = Field(None, description="lay rows end to end in one sequence instead of padding them")
    activation_checkpointing: bool | None = Field(None, description="recompute activations to save memory")
    checkpoint_every: Positive | None = Field(
        None,
        description="recompute only every n-th layer",
        json_schema_extra={"no_off": "an integer >= 1; train.activation_checkpointing=false recomputes no layer"},
    )
    activation_offload: bool | None = Field(None, description="keep what recomputed layers start from in host memory")
    compile: bool | None = Field(None, description="compile the decoder layers")
    probe: bool | None = Field(None, description="measure one forward and backward pass before step 1")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps or xpu")
    num_workers: Annotated[int, Field(ge=0)] | None = Field(
        None, description="data loader processes", json_schema_extra={"off": 0}
    )
    threads: Positive | None = Field(None, description="CPU threads of one process")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(42, description="of order, split, dropout, initialisation")

    @field_validator("optimizer", "schedule", "precision", mode="before")
    @classmethod
    def _by_other_names(cls, value: Any, info: ValidationInfo) -> Any:
        """``AdamW`` for ``adamw_torch_fused``; see `llmtune.config.aliases`."""
        return value_of(f"train.{info.field_name}", value) if isinstance(value, str) else value


class AdapterConfig(Group):
    """The trainable low-rank adapter, and the precision of the frozen base below it."""

    rank: Positive | None = Field(None, description="LoRA rank")
    alpha: Positive | None = Field(None, description="LoRA alpha; the update is scaled by alpha / rank")
    dropout: Share | None = Field(None, description="LoRA dropout", json_schema_extra={"off": 0.0})
    targets: tuple[str, ...] | None = Field(None, min_length=1, description="module names, or all-linear")
    quantization: Literal["nf4", "int8"] = Field("nf4", description="base weights under qlora")


class EvaluateConfig(Group):
    """How the result is judged during and after training."""

    every_steps: Positive | None = Field(
        None,
        description="updates between evaluations",
        json_schema_extra={"no_off": "an integer >= 1; data.eval_fraction=0 trains without evaluations"},
    )
    base: bool = Field(True, description="evaluate the untouched base model before step 1")
    metric: str = Field("eval_loss", description="eval_loss, perplexity or a metric of your own")
    greater_is_better: bool | None = Field(None, description="direction of metric; losses: smaller is better")
    patience: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="stop after this many evaluations without improvement; off (or 0) never stops early",
        json_schema_extra={"off": 0},
    )
    min_delta: Annotated[float, Field(ge=0)] = Field(
        0.0, description="smallest change that counts as improvement", json_schema_extra={"off": 0.0}
    )
    num_samples: Annotated[int, Field(ge=0)] = Field(
        4, description="held-out prompts answered before and after", json_schema_extra={"off": 0}
    )
    max_new_tokens: Positive = Field(128, description="longest generated answer")
    metric_rows: Positive = Field(64, description="held-out rows that user metrics are computed on")


class SaveConfig(Group):
    """Checkpoints."""

    every_steps: Positive | None = Field(
        None, description="updates between checkpoints", json_schema_extra={"no_off": NO_SAVES.format(">= 1")}
    )
    keep: Annotated[int, Field(ge=2)] = Field(
        3,
        description="newest checkpoints kept besides the best one",
        json_schema_extra={"no_off": NO_SAVES.format(">= 2")},
    )
    asynchronous: bool = Field(False, description="write checkpoints in the background, from a copy in host memory")
    compress_optimizer: bool = Field(False, description="keep the optimizer's state compressed (zstd)")


class RecoverConfig(Group):
    """What happens when something goes wrong, and when a run was interrupted."""

    resume: str = Field(
        "auto",
        min_length=1,
        description="auto, never, or the directory of a checkpoint",
        json_schema_extra={"off": "never"},
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="times that a parent process starts a killed or hung training again",
        json_schema_extra={"off": 0},
    )
    skip_budget: Annotated[int, Field(ge=0)] = Field(
        10, description="updates dropped for numbers that are not finite", json_schema_extra={"off": 0}
    )
    rollback_budget: Annotated[int, Field(ge=0)] = Field(
        3, description="times that a run goes back to a checkpoint", json_schema_extra={"off": 0}
    )
    spike_threshold: Annotated[float, Field(gt=0)] = Field(
        8.0,
        description="robust z-score of loss or gradient norm from which on an update counts as a spike",
        json_schema_extra={"no_off": "a number > 0; 1e9 never counts an update as a spike"},
    )
    memory_guard: bool = Field(True, description="on a CPU, split passes before the memory limit is reached")
    hang_seconds: Annotated[float, Field(gt=0)] = Field(
        1800.0,
        description="without a sign of life for so long, a step or a loader counts as hung",
        json_schema_extra={"no_off": "a number > 0; 1e9 never counts a step as hung"},
    )


class MonitorConfig(Group):
    """Who is told."""

    report: bool = Field(True, description="write report.html; it holds its own plotting code, about 5 MB")
    report_to: tuple[str, ...] = Field(
        (), description="trackers of transformers, e.g. tensorboard", json_schema_extra={"off": []}
    )


class OutputConfig(Group):
    """Where results go."""

    dir: str | None = Field(None, description="the run directory; derived from data, model and config if not given")
    root: str = Field("runs", min_length=1, description="folder of derived run directories and of the run store")


class RunConfig(Group):
    """Everything a user can ask of one run. Frozen; unknown keys are refused."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    adapter: AdapterConfig = AdapterConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    save: SaveConfig = SaveConfig()
    recover: RecoverConfig = RecoverConfig()
    monitor: MonitorConfig = MonitorConfig()
    output: OutputConfig = OutputConfig()
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def origin(self) -> Origin:
        """Files and environment that the configuration was loaded from."""
        return self._origin

    def with_origin(self, origin: Origin) -> RunConfig:
        """Return the same configuration with another origin."""
        copy = self.model_copy()
        copy._origin = origin
        return copy

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``run.json`` and YAML; the access token is left out."""
        document = self.model_dump(mode="json")
        del document["model"]["token"]
        return document

    def asked(self) -> dict[str, Any]:
        """Only what was set and differs from the defaults, as nested plain values."""
        document = self.model_dump(mode="json", exclude_defaults=True)
        document.get("model", {}).pop("token", None)
        return {group: values for group, values in document.items() if values}

    def identity_hash(self) -> str:
        """SHA-256 of all that decides the result: not where it is written, not how it resumes, not who watches."""
        document = self.to_json()
        for group in ("output", "recover", "monitor"):
            del document[group]
        for key in ("path", "eval_path"):
            del document["data"][key]
        for key in ("schedule_arguments", "optimizer_arguments"):
            if not document["train"][key]:  # so that a run of a version without them is found again
                del document["train"][key]
        for source in document["data"]["sources"]:
            del source["path"]  # what is in the files decides, see the fingerprint of the data
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
