"""A finished run opened again: evaluate it against its base model, ask it something."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.config import RunConfig, load_config
from llmtune.console import speaker
from llmtune.data import EncodedDataset, Leakage
from llmtune.errors import CheckpointError, ConfigError, DataError, ModelError
from llmtune.finetuner import facts
from llmtune.finetuner.rows import evaluation_inputs, inputs_of, tell_reading
from llmtune.finetuner.training_rows import TrainingRows
from llmtune.hardware import tf32_products
from llmtune.models import ModelLocation, load_tuned, locate, read_spec
from llmtune.planning import Choice, Plan
from llmtune.presets import Preset
from llmtune.reporting import Verdict as Judgement
from llmtune.reporting.verdict import Evidence, judge
from llmtune.runs import RunDirectory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmtune.evaluation import Prompt, RowLosses
    from llmtune.evaluation.flaws import Flaw


# Held-out prompts that both models answer, so that a verdict knows whether answers end; more where a run had more.
ANSWERS = 16
# Answers get so many times the tokens of the longest reference, which tells long from endless; at most so many.
ROOM_FOR_ANSWERS, MOST_ANSWER_TOKENS = 4, 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Base and tuned model on the same rows; losses in nats per supervised token, None where no row is held out.

    Attributes:
        run_dir: The run.
        rows: Rows that the losses are of: those that were not trained on.
        tokens: Their supervised tokens.
        leakage: Rows that were trained on; None where the run does not know its training rows any more.
        judgement: Whether the tuned model is better, and what that rests on.
    """

    run_dir: Path
    rows: int
    tokens: int
    base_loss: float | None
    loss: float | None
    leakage: Leakage | None
    judgement: Judgement

    @property
    def text(self) -> str:
        """The verdict in a few sentences."""
        if self.leakage is not None:
            return self.judgement.text
        return (
            f"{self.judgement.text} Whether these rows were trained on is not known: {self.run_dir} was made by a "
            "version that did not keep its training rows, and its data has changed since."
        )

    @property
    def kind(self) -> str:
        """The verdict in one word, see `llmtune.reporting.Verdict`."""
        return self.judgement.kind

    @property
    def base_perplexity(self) -> float | None:
        """``exp`` of the base model's loss."""
        return _perplexity(self.base_loss)

    @property
    def perplexity(self) -> float | None:
        """``exp`` of the tuned model's loss."""
        return _perplexity(self.loss)

    def to_json(self) -> dict[str, Any]:
        """The document of ``eval --json``."""
        judgement = self.judgement.to_json()
        return {
            "run_dir": str(self.run_dir),
            "rows": self.rows,
            "tokens": self.tokens,
            "base": {"loss": self.base_loss, "perplexity": self.base_perplexity},
            "tuned": {"loss": self.loss, "perplexity": self.perplexity},
            "base_eval_loss": self.base_loss,
            "base_perplexity": self.base_perplexity,
            "eval_loss": self.loss,
            "perplexity": self.perplexity,
            "interval": judgement["interval"],
            "verdict": self.text,
            "kind": self.kind,
            "answers": judgement["answers"],
            "leakage": None if self.leakage is None else self.leakage.to_json(),
        }


def _perplexity(loss: float | None) -> float | None:
    from llmtune.evaluation import perplexity_of

    return None if loss is None else perplexity_of(loss)


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
        """Where the base model is; of a Hub model the commit that the run was trained on."""
        recorded = self.run.run.get("base_model") or {}
        update = {"id": self.plan.model.value} | ({"revision": commit} if (commit := recorded.get("commit")) else {})
        return locate(self.config.model.model_copy(update=update))

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

    def evaluate(self, data: str | None = None, *, answers: int | None = None) -> Verdict:
        """Compare base and tuned model on the run's held-out rows, or on other data of yours.

        Rows that the run was trained on are left out of losses and verdict.

        Args:
            data: Evaluation data; the rows that the run held out when None.
            answers: Prompts that both models answer; when None as many as the run's samples and at least `ANSWERS`,
                or none where the run wanted no samples.

        Raises:
            ModelError: The base model is not the one that the run was trained on.
            DataError: The data cannot be used, or the run's own has changed since.
        """
        rows = self._held_out() if data is None else self._encode(data)
        training = self._training_rows()
        leakage = None if training is None else training.leakage(rows)
        clean = np.ones(len(rows), np.bool_)
        if leakage is not None:
            clean[leakage.leaked_rows] = False
        evidence = Evidence(base_loss=None, loss=None, rows=0, leaked=len(rows))
        if clean.any():
            evidence = self._compare(rows, clean, self._num_answers(answers), is_held_out=leakage is not None)
        return Verdict(
            run_dir=self.run.path,
            rows=evidence.rows or 0,
            tokens=evidence.tokens or 0,
            base_loss=evidence.base_loss,
            loss=evidence.loss,
            leakage=leakage,
            judgement=judge(evidence),
        )

    def _compare(
        self, rows: EncodedDataset, clean: NDArray[np.bool_], num_answers: int, *, is_held_out: bool
    ) -> Evidence:
        """Losses and answers of both models. All rows are scored, in the passes of training; the clean ones count."""
        from llmtune.evaluation import AnswerCheck, paired_interval, prompts_of

        prompts = prompts_of(rows.select(np.flatnonzero(clean)), self.tokenizer, num_answers)
        with self._arithmetic():
            tuned, after = self._measure(self.model, rows, prompts)
            with self._base() as model:
                base, before = self._measure(model, rows, prompts)
        losses = base.losses[clean], tuned.losses[clean], tuned.tokens[clean]
        return Evidence(
            base_loss=base.mean(clean),
            loss=tuned.mean(clean),
            rows=int(clean.sum()),
            tokens=int(losses[2].sum()),
            interval=paired_interval(*losses),
            answers=AnswerCheck.of(zip(before, after, strict=True)) if prompts else None,
            leaked=int((~clean).sum()),
            is_held_out=is_held_out,
        )

    def _measure(self, model: Any, rows: EncodedDataset, prompts: list[Prompt]) -> tuple[RowLosses, list[Flaw | None]]:
        """The losses of all rows, and what is wrong with the answer to each prompt."""
        from llmtune.evaluation import answers_to, score

        scores = score(
            model,
            rows,
            pad_token_id=self.tokenizer.pad_token_id,
            token_budget=self.plan.token_budget.value,
            pad_multiple=self.plan.pad_multiple.value,
            device=self._device,
            one_by_one=True,
        )
        assert scores.rows is not None
        longest = max((len(prompt.reference_ids) for prompt in prompts), default=0)
        limit = max(self.config.evaluate.max_new_tokens, min(ROOM_FOR_ANSWERS * longest, MOST_ANSWER_TOKENS))
        given = answers_to(model, self.tokenizer, prompts, max_new_tokens=limit, device=self._device)
        return scores.rows, [each.flaw(prompt) for prompt, each in zip(prompts, given, strict=True)]

    @contextmanager
    def _base(self) -> Iterator[Any]:
        """The base model: the tuned one with its adapter off, or the base loaded as training loaded it."""
        from llmtune.evaluation import as_base

        if self.plan.method.value == "full":
            yield self._load(tuned=False)
        else:
            with as_base(self.model) as model:
                yield model

    def _num_answers(self, asked: int | None) -> int:
        wanted = self.config.evaluate.num_samples
        return asked if asked is not None else max(wanted, ANSWERS) if wanted else 0

    def _training_rows(self) -> TrainingRows | None:
        """The rows that were trained on, as the run has kept them; of an older run, from its data if unchanged."""
        kept = TrainingRows.load(self.run)
        if kept is not None:
            return kept
        try:
            inputs = inputs_of(self.config, self._data)
            if inputs.fingerprint != self.run.run["data_fingerprint"]:
                return None
            train = facts.data_of(self.config, self._model_facts(), inputs).train
        except (DataError, ConfigError):
            return None
        assert train is not None
        return TrainingRows.of(train)

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

        threads = torch.get_num_threads()
        precision = self.plan.precision.value
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        autocast = torch.autocast(torch.device(self._device).type, dtype=dtype, enabled=self.plan.autocast)
        torch.set_num_threads(self.plan.threads.value)  # sums depend on how they are split
        try:
            with tf32_products(precision == "tf32"), autocast:
                yield
        finally:
            torch.set_num_threads(threads)

    def _load(self, *, tuned: bool) -> Any:
        from llmtune.kernels import attach_kernels

        full = self.plan.method.value == "full"
        if not (tuned and full):
            self._require_base()
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

    def _require_base(self) -> None:
        """Prove that the base model is the one that the run was trained on: every byte of its files is read.

        Raises:
            ModelError: It is another one.
        """
        recorded = self.run.run.get("base_model")
        if recorded is None:
            speaker.warn(f"{self.run.path} does not say which base model it was trained on, so that is not checked")
            return
        held, now = recorded["files"], facts.base_of(self.location).files
        differing = sorted(name for name in held.keys() | now.keys() if held.get(name) != now.get(name))
        if not differing:
            return
        raise ModelError(
            f"{self.location.source} is not the base model that {self.run.path} was trained on: {', '.join(differing)} "
            "differ. The result belongs to the weights of then, so nothing is compared or answered with these. Put "
            "those files back (run.json has their SHA-256 under base_model.files), or train again on this model with "
            "another --output"
        )

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
