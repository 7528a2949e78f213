"""What a preset is made of: how a family is recognised, its training levels, its catalogue of models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

GOALS = ("highspeed", "quality", "bestaccuracy")
SIZES = ("small", "medium", "large")
METHODS = ("lora", "qlora", "full")

# Rows below which a data set is small, and below which it is medium. llmtune: chosen; a thousand rows are what a person
# writes by hand (LIMA, arXiv:2305.11206, tunes on 1,000), ten thousand are a collected set (Dolly has 15,000).
SMALL_BELOW_ROWS = 1_000
MEDIUM_BELOW_ROWS = 10_000

# The names of transformers' SchedulerType that need no further argument and no metric.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


def dataset_size(num_rows: int) -> str:
    """The size class of a data set with this many training rows: ``small``, ``medium`` or ``large``."""
    if num_rows < SMALL_BELOW_ROWS:
        return "small"
    return "medium" if num_rows < MEDIUM_BELOW_ROWS else "large"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The widths and counts of a decoder-only transformer, enough to plan without its weights.

    Attributes:
        hidden: Width of the residual stream.
        kv_heads: Key and value heads; fewer than ``heads`` under grouped-query attention.
        head_dim: Width of one head; ``heads * head_dim`` may differ from ``hidden``.
        mlp_width: Inner width of the MLP.
        vocabulary: Rows of the embedding, padding rows included.
        gated_mlp: Three matrices per MLP (gate, up, down) instead of two.
        tied_head: The output head shares the embedding's weights.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocabulary: int
    gated_mlp: bool
    tied_head: bool

    @property
    def matrix_parameters(self) -> int:
        """Weights of all matrices; norms and biases, below half a percent of a model, are left out."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        mlp = self.hidden * self.mlp_width * (3 if self.gated_mlp else 2)
        return self.layers * (attention + mlp) + self.vocabulary * self.hidden * (1 if self.tied_head else 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogueEntry:
    """One model that ``model="auto"`` can choose, known without a download.

    Attributes:
        id: Hub id, or ``builtin:tiny``.
        parameters: Exact count, a tied head counted once.
        context: Longest sequence in tokens.
        licence: SPDX id, or the name of the licence where it has none.
        gated: The Hub asks for an accepted licence and a token.
        instruct: Tuned to follow instructions; False for a base model.
        minimum_memory_bytes: Method -> least device memory; how it was derived stands in ``source``.
        released: Year and month in which it came out, as its announcement says: ``2025-04``.
        bytes_per_token: UTF-8 bytes of English text per token of its tokenizer.
        source: Where these facts come from.
    """

    id: str
    family: str
    model_type: str
    architecture: str
    parameters: int
    context: int
    licence: str
    gated: bool
    instruct: bool
    minimum_memory_bytes: Mapping[str, int]
    shape: ModelShape
    released: str
    bytes_per_token: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """The training numbers for one goal and one size of data. Learning rates are for LoRA adapters; see `RateRule`.

    Attributes:
        epochs: Passes over the training data.
        learning_rate: Peak of the schedule.
        alpha: The adapter's output is scaled by ``alpha / rank``.
        dropout: Probability on the adapter's input.
        warmup_ratio: Share of the updates spent warming up.
        evals_per_epoch: Evaluations per pass over the data.
        saves_per_epoch: Checkpoints per pass over the data.
        sources: Name of the number -> where it comes from.
    """

    epochs: float
    learning_rate: float
    rank: int
    alpha: int
    dropout: float
    schedule: str
    warmup_ratio: float
    weight_decay: float
    evals_per_epoch: float
    saves_per_epoch: float
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateRule:
    """How the learning rates of a family's levels are carried over to models of other widths.

    Attributes:
        hidden: Width that the rates of the levels are for.
        exponent: The rate is multiplied by ``(hidden / width of the model) ** exponent``.
        source: Where the exponent comes from.
    """

    hidden: int
    exponent: float
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recognition:
    """How a family is told from others.

    Attributes:
        names: Regular expressions, matched without case against the last part of a model's id or path.
        architectures: Class names in ``config.architectures``.
        model_types: ``config.model_type``.
        name_required: Architecture and model type are shared with other families, so they are not enough.
    """

    names: tuple[str, ...]
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    name_required: bool

    def allows(self, model_type: str | None, architecture: str | None) -> bool:
        """Whether a model of this type and architecture can be of the family at all; unknown ones can."""
        if architecture is not None:
            return architecture in self.architectures
        return model_type is None or model_type in self.model_types

    def matches_name(self, name: str) -> bool:
        """Whether the last part of ``name`` is one of the family's."""
        last = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        return any(re.search(pattern, last, re.IGNORECASE) for pattern in self.names)
