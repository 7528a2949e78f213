"""A finished run opened again: evaluate it against its base model, ask it something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from llmtune.config import RunConfig, load_config
from llmtune.data import EncodedDataset
from llmtune.errors import CheckpointError, ConfigError, DataError
from llmtune.finetuner import facts
from llmtune.finetuner.rows import evaluation_inputs, inputs_of, tell_reading
from llmtune.hardware import tf32_products
from llmtune.models import ModelLocation, load_tuned, locate, read_spec
from llmtune.planning import Choice, Plan
from llmtune.presets import Preset
from llmtune.runs import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Base and tuned model on the same held-out rows; losses in nats per supervised token."""

    run_dir: Path
    rows: int
    tokens: int
    base_loss: float
    base_perplexity: float
    loss: float
    perplexity: float

    @property
    def text(self) -> str:
        """The verdict in one sentence."""
        change = (self.base_loss - self.loss) / self.base_loss if self.base_loss else 0.0
        word = "better" if change > 0.01 else "worse" if change < -0.01 else "no better"
        return (
            f"The tuned model is {word} than its base on {self.rows:,} held-out rows: "
            f"loss {self.base_loss:.4f} -> {self.loss:.4f}, "
            f"perplexity {self.base_perplexity:.2f} -> {self.perplexity:.2f}."
        )

    def to_json(self) -> dict[str, Any]:
        """The document of ``eval --json``."""
        return {
            "run_dir": str(self.run_dir),
            "rows": self.rows,
            "tokens": self.tokens,
            "base_eval_loss": self.base_loss,
            "base_perplexity": self.base_perplexity,
            "eval_loss": self.loss,
            "perplexity": self.perplexity,
            "verdict": self.text,
        }


class TunedRun:
    """The result of a run, loaded when it is first needed. Make one with :meth:`open`.

    Args:
        run: The run directory; it has an adapter or a model.
        config: The configuration the run was started with.
        plan: The plan last in force.
        data: Training rows again, when the run was started on rows in memory.
    """

    def __init__(self, run: RunDirectory, config: RunConfig, plan: Plan, data: Any) -> None:
        self.run, self.config, self.plan = run, config, plan
        self._data = data
        self._device = str(facts.machine_of(config).device)

    @classmethod
    def open(cls, run_dir: str | Path, data: Any = None) -> TunedRun:
        """Open the run in ``run_dir``.

        Raises:
            RunNotFoundError: There is no run.
            CheckpointError: The run has no result yet.
        """
        run = RunDirectory.open(run_dir)
        plan = run.latest_plan()
        if run.final is None or plan is None:
            status = run.run["status"]
            raise CheckpointError(
                f"{run.path} has no result yet (status {status}); finish it with: llmtune resume {run.path}"
            )
        config = load_config(run.run["config"], environ={}, where=str(run.path / "run.json"))
        return cls(run, config, Plan.from_json(plan), data)

    @cached_property
    def location(self) -> ModelLocation:
        """Where the base model is."""
        return locate(self.config.model.model_copy(update={"id": self.plan.model.value}))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as saved with the result, chat template included."""
        from transformers import AutoTokenizer

        trust = self.config.model.trust_remote_code
        return AutoTokenizer.from_pretrained(str(self.run.final), trust_remote_code=trust)

    @cached_property
    def model(self) -> Any:
        """The tuned model in evaluation mode."""
        return self._load(tuned=True)

    def evaluate(self, data: str | None = None) -> Verdict:
        """Loss and perplexity of base and tuned model on the run's held-out rows, or on other data of yours."""
        from llmtune.evaluation import as_base, score

        rows = self._held_out() if data is None else self._encode(data)
        settings: dict[str, Any] = {
            "pad_token_id": self.tokenizer.pad_token_id,
            "token_budget": self.plan.token_budget.value,
            "pad_multiple": self.plan.pad_multiple.value,
            "device": self._device,
        }
        with self._arithmetic():
            tuned = score(self.model, rows, **settings)
            if self.plan.method.value == "full":
                base = score(self._load(tuned=False), rows, **settings)
            else:
                with as_base(self.model) as model:
                    base = score(model, rows, **settings)
        return Verdict(
            run_dir=self.run.path,
            rows=len(rows),
            tokens=tuned.num_tokens,
            base_loss=base.loss,
            base_perplexity=base.perplexity,
            loss=tuned.loss,
            perplexity=tuned.perplexity,
        )

    def generate(self, prompt: str | Sequence[Mapping[str, Any]], *, max_new_tokens: int | None = None) -> str:
        """The tuned model's greedy answer to a prompt (one user turn) or to a list of messages."""
        from llmtune.evaluation import Prompt, answer

        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(rendered, add_special_tokens=False)["input_ids"]
        request = Prompt(input_ids=tuple(ids), text=rendered, reference="")
        limit = max_new_tokens or self.config.evaluate.max_new_tokens
        return answer(self.model, self.tokenizer, [request], max_new_tokens=limit, device=self._device)[0]

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The arithmetic of training, so that the same weights score the same again."""
        import torch

        precision = self.plan.precision.value
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        autocast = torch.autocast(torch.device(self._device).type, dtype=dtype, enabled=self.plan.autocast)
        with tf32_products(precision == "tf32"), autocast:
            yield

    def _load(self, *, tuned: bool) -> Any:
        from llmtune.kernels import attach_kernels

        full = self.plan.method.value == "full"
        model = load_tuned(
            self.location,
            adapter_dir=self.run.adapter if tuned and not full else None,
            model_dir=self.run.model if tuned and full else None,
            precision="fp32" if full else self.plan.precision.value,
            quantization=self.plan.quantization.value,
            device=self._device,
        )
        attach_kernels(model, device=self._device)  # the arithmetic of training: the same weights score the same
        return model

    def _model_facts(self) -> facts.Model:
        preset = Preset.recognise(name=self.plan.model.value)
        return facts.Model(
            spec=read_spec(self.location, preset.family),
            preset=preset,
            choice=Choice(self.plan.model.value, "the run's", "derived"),
            location=self.location,
            tokenizer=self.tokenizer,
        )

    def _encode(self, data: str) -> EncodedDataset:
        # As training data without a split: every row counts.
        whole = self.config.data.model_copy(
            update={"eval_path": None, "eval_fraction": 0.0, "duplicates": "keep", "sources": ()}
        )
        config = self.config.model_copy(update={"data": whole})
        inputs = evaluation_inputs(config, data)
        tell_reading(inputs)
        encoded = facts.data_of(config, self._model_facts(), inputs).train
        assert encoded is not None
        return encoded

    def _held_out(self) -> EncodedDataset:
        if self._data is None and self.config.data.path is None and not self.config.data.sources:
            raise ConfigError("eval", ["this run was started on rows in memory; give the evaluation data again"])
        inputs = inputs_of(self.config, self._data)
        if inputs.fingerprint != self.run.run["data_fingerprint"]:
            raise DataError(
                f"the data of {self.run.path} have changed since it was trained, so its held-out rows are not known "
                "any more; name other data with --eval-data"
            )
        held_out = facts.data_of(self.config, self._model_facts(), inputs).eval
        if held_out is None:
            raise ConfigError("eval", ["this run held no rows out; name evaluation data with --eval-data"])
        return held_out
