"""The loop, and the one file that touches hooks of ``transformers.Trainer``.

What happens, in order::

    train begins      base model evaluated (step 0)
    for each epoch    the sampler's order is a function of (seed, epoch)
      for each item   one update: a list of micro-batches, this rank's share of one global batch
        training_step   ranks add up supervised tokens; each micro-batch: forward with the loss inside the wrapped
                        model, divided by that sum; backward; gradients are reduced on the last one only
        Trainer         clips, steps optimizer and schedule
        on_step_end     watchers note, guards may stop (signal, early stopping)
        log             one line per update, with token counts
        evaluate        token-weighted loss and perplexity, the user's metrics; a new best is always saved
        save            staged by the Trainer, committed by us, old ones cleaned up by a callback
    train ends        the best checkpoint's weights are restored

``gradient_accumulation_steps`` stays 1: accumulation, token weighting and ``no_sync`` live in ``training_step``.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llmtune.checkpoints import commit, step_of
from llmtune.checkpoints.commit import staging_root
from llmtune.data import EncodedDataset
from llmtune.evaluation import Scores, score
from llmtune.training.ranks import Ranks
from llmtune.training.updates import Update, UpdateCollator, UpdateLoader, UpdateSampler


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFacts:
    """Counts of one update over all ranks; ``micro_batch_size`` is the largest forward pass of this one, in rows."""

    num_tokens: int
    num_supervised_tokens: int
    global_batch_size: int
    micro_batch_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSettings:
    """What the loop needs beyond ``TrainingArguments``.

    Attributes:
        global_batch_size: Rows per update over all ranks.
        token_budget: Most padded tokens per forward pass.
        micro_batch_size: Most rows per forward pass.
        packing: Whether rows of an update are laid end to end instead of being padded; evaluation pads.
        pad_multiple: Widths of padded rows are multiples of this.
        pass_overhead_tokens: See `micro_batches`.
        checkpoint_facts: Identity of the run, written to every manifest.
        evaluate: Computes the user's metrics on the model; None when there are none.
        stop_requested: Whether this process was asked to stop; ranks agree on it once per update.
    """

    global_batch_size: int
    token_budget: int
    micro_batch_size: int
    packing: bool
    pad_multiple: int
    pass_overhead_tokens: int | None
    checkpoint_facts: Mapping[str, Any]
    evaluate: Callable[[torch.nn.Module], dict[str, float]] | None
    stop_requested: Callable[[], bool]


class UpdateTrainer(Trainer):
    """A ``transformers.Trainer`` whose data loader yields whole updates and whose saves are committed.

    Args:
        settings: See ``LoopSettings``.
        ranks: The processes of this launch.
        tokenizer: Saved with every checkpoint; names the padding token.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        args: TrainingArguments,
        train_data: EncodedDataset,
        eval_data: EncodedDataset | None,
        tokenizer: Any,
        callbacks: list[TrainerCallback],
        settings: LoopSettings,
        ranks: Ranks,
    ) -> None:
        args._setup_devices  # noqa: B018  the property decides the device; n_gpu is known only afterwards
        args._n_gpu = min(args.n_gpu, 1)  # several visible GPUs in one process would mean DataParallel
        self._train_data, self._eval_data = train_data, eval_data
        self._settings, self._ranks = settings, ranks
        self._committed_to = Path(args.output_dir)
        self._staging: Path | None = None
        self.control: TrainerControl
        self.last_update: StepFacts | None = None
        self.stop_agreed = False
        self.evaluation_seconds = 0.0  # of the latest one
        self.save_seconds = 0.0  # of the latest one
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_data,
            eval_dataset=eval_data,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        if args.torch_compile:  # the decoder layers one by one: alike, so each compilation serves all of them
            self.accelerator.state.dynamo_plugin.use_regional_compilation = True

    def add_first_callback(self, callback: TrainerCallback) -> None:
        """Add a callback that is told before all others, trackers included."""
        self.callback_handler.callbacks.insert(0, callback)

    # ------------------------------------------------------------------ data

    def get_train_dataloader(self) -> UpdateLoader:
        """Items are updates, already sharded over the ranks; accelerate must not shard them again."""
        return UpdateLoader(
            self._train_data,
            self.sampler(),
            self.collator(self._settings.token_budget),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def sampler(self) -> UpdateSampler:
        """Which rows this rank's share of each update has."""
        return UpdateSampler(
            self._train_data.lengths,
            self._train_data.parts,
            global_batch_size=self._settings.global_batch_size,
            seed=self.args.seed,
            rank=self._ranks.rank,
            num_ranks=self._ranks.size,
        )

    def collator(self, token_budget: int) -> UpdateCollator:
        """How rows of an update are cut into forward passes of at most ``token_budget`` padded tokens."""
        settings = self._settings
        return UpdateCollator(
            pad_token_id=self.processing_class.pad_token_id,
            token_budget=token_budget,
            max_rows=settings.micro_batch_size,
            packing=settings.packing,
            pad_multiple=settings.pad_multiple,
            pass_overhead_tokens=settings.pass_overhead_tokens,
        )

    def set_token_budget(self, token_budget: int) -> None:
        """Cut all updates and evaluations to come for this budget; which rows an update has stays as it is."""
        self._settings = replace(self._settings, token_budget=token_budget)
        loader = self.callback_handler.train_dataloader
        if loader is not None:
            loader.collate_fn = self.collator(token_budget)

    def num_examples(self, dataloader: Any) -> int:
        """Rows of one epoch; the loader's own length counts updates."""
        return self._train_data.rows_per_epoch

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero: the plan counts arithmetic; upstream's estimate expects one batch, not a list of them."""
        return 0

    def _get_num_items_in_batch(self, batch_samples: list[Update], device: torch.device) -> None:
        """None: an update counts its own supervised tokens, see ``training_step``."""

    # ------------------------------------------------------------------ one update

    def training_step(
        self, model: torch.nn.Module, inputs: Update, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Accumulate the gradient of one update: the mean loss over its supervised tokens on all ranks.

        Returns:
            This rank's part of that mean times the number of ranks, so that the mean over ranks is the loss.
        """
        model.train()
        facts = self._agree(inputs)
        scale = self._ranks.size / max(facts.num_supervised_tokens, 1)
        total = torch.zeros((), device=self.args.device)
        last = len(inputs.micro_batches) - 1
        for number, batch in enumerate(inputs.micro_batches):
            total += self.forward_and_backward(model, batch, scale, reduces=number == last)
        return total

    def forward_and_backward(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor], scale: float, *, reduces: bool
    ) -> torch.Tensor:
        """One micro-batch: adds its gradients to those that are there, and returns its summed loss times ``scale``.

        Args:
            model: As the Trainer has wrapped it.
            batch: See ``Update.micro_batches``.
            scale: Factor of the loss.
            reduces: Whether gradients are added up over the ranks afterwards.
        """
        # DeepSpeed steps when gradients are marked as complete; DDP reduces outside no_sync.
        self.accelerator.gradient_state._set_sync_gradients(reduces)
        with contextlib.nullcontext() if reduces else self.accelerator.no_sync(model):
            loss = model(**self._prepare_inputs(batch), num_items_in_batch=1).loss * scale
            self.accelerator.backward(loss)
        summed: torch.Tensor = loss.detach().float()
        return summed

    def _agree(self, update: Update) -> StepFacts:
        counts = [
            update.num_supervised_tokens,
            update.num_tokens,
            update.num_rows,
            int(self._settings.stop_requested()),
        ]
        if self._ranks.size > 1:
            gathered = self.accelerator.gather(torch.tensor([counts], device=self.args.device))
            counts = gathered.sum(dim=0).tolist()
        self.stop_agreed = counts[3] > 0
        self.last_update = StepFacts(
            num_supervised_tokens=counts[0],
            num_tokens=counts[1],
            global_batch_size=counts[2],
            micro_batch_size=update.max_rows,
        )
        return self.last_update

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token counts of the update to its log line."""
        if "loss" in logs and self.last_update is not None:
            logs["num_tokens"] = self.last_update.num_tokens
            logs["num_supervised_tokens"] = self.last_update.num_supervised_tokens
        super().log(logs, start_time)

    # ------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Token-weighted loss and perplexity on the evaluation data, and the user's metrics.

        Returns:
            ``eval_loss``, ``eval_perplexity``, ``eval_tokens`` and ``eval_<name>`` for each user metric.
        """
        data = self._eval_data if eval_dataset is None else eval_dataset
        assert data is not None, "evaluation was asked for without evaluation data"
        began = time.perf_counter()
        scores = self.score(data)
        metrics = {
            f"{metric_key_prefix}_loss": scores.loss,
            f"{metric_key_prefix}_perplexity": scores.perplexity,
            f"{metric_key_prefix}_tokens": scores.num_tokens,
        }
        if self._settings.evaluate is not None:
            own = self._settings.evaluate(self.model) if self._ranks.is_main else {}
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._ranks.from_main(own).items()}
        self.evaluation_seconds = time.perf_counter() - began
        self.log(dict(metrics))  # log() adds to what it is given
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, data: EncodedDataset) -> Scores:
        """Loss on ``data``, each rank scoring its share."""
        part = score(
            self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model,
            data,
            pad_token_id=self.processing_class.pad_token_id,
            token_budget=self._settings.token_budget,
            pad_multiple=self._settings.pad_multiple,
            device=self.args.device,
            rank=self._ranks.rank,
            num_ranks=self._ranks.size,
        )
        return self._add_up(part)

    def _add_up(self, part: Scores) -> Scores:
        if self._ranks.size == 1:
            return part
        sums = torch.tensor([[part.loss_sum, float(part.num_tokens)]], dtype=torch.float64, device=self.args.device)
        loss_sum, tokens = self.accelerator.gather(sums).sum(dim=0).tolist()
        return Scores(loss_sum=loss_sum, num_tokens=int(tokens))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = bool(super()._determine_best_metric(metrics, trial))
        if is_best:  # a best step that is not saved cannot be gone back to
            self.control.should_save = True
        return is_best

    # ------------------------------------------------------------------ saving and restoring

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._committed_to)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        began, step = time.perf_counter(), self.state.global_step
        name = f"checkpoint-{step}"
        final = self._committed_to / name
        with self._stage(step) as staging:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(final)
            self._ranks.wait()
            if self._ranks.is_main:
                _point_to_committed(staging / name, self.state.best_model_checkpoint)
                commit(staging / name, final, self._manifest_facts())
            self._ranks.wait()
        self.save_seconds = time.perf_counter() - began

    @contextlib.contextmanager
    def _stage(self, step: int) -> Iterator[Path]:
        self._staging = self._ranks.from_main(staging_root(self._committed_to, step))
        try:
            yield self._staging
        finally:
            if self._ranks.is_main:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None

    def _manifest_facts(self) -> dict[str, Any]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        latest: dict[str, Any] = next((entry for entry in reversed(self.state.log_history) if "eval_loss" in entry), {})
        current = latest if latest.get("step") == self.state.global_step else {}
        return {
            "step": self.state.global_step,
            "metrics": {key: value for key, value in current.items() if key.startswith("eval_")},
            "finite_weights": all(bool(torch.isfinite(p.detach()).all()) for p in trained),
            "num_ranks": self._ranks.size,
            **self._settings.checkpoint_facts,
        }

    def take_up(self, checkpoint: Path) -> None:
        """Load weights and history of a checkpoint without training on.

        For a run that was stopped after its last update: ``train`` would make one update too many.
        """
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def restore_best(self) -> int | None:
        """Load the best checkpoint's weights unless they are the present ones; returns its step, if there is one."""
        best = self.state.best_model_checkpoint
        if best is None:
            return None
        step = step_of(Path(best))
        if step != self.state.global_step:
            self._load_from_checkpoint(best, self.model_wrapped if self.is_fsdp_enabled else None)
        return step

    def save_final(self, directory: Path) -> None:
        """Write adapter or model, and tokenizer with its chat template, loadable by peft or transformers alone."""
        self.save_model(str(directory), _internal_call=True)
        if self._ranks.is_main:
            (directory / "training_args.bin").unlink(missing_ok=True)


def _point_to_committed(staged: Path, best: str | None) -> None:
    """The Trainer wrote the best checkpoint's path while it still lay in the staging folder."""
    path = staged / TRAINER_STATE_NAME
    state = json.loads(path.read_text(encoding="utf-8"))
    state["best_model_checkpoint"] = best
    path.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
