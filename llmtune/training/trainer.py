"""The loop: the one file that touches hooks of ``transformers.Trainer``, but for those of saving (``committing.py``).

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
        save            staged by the Trainer, or copied and written behind; committed by ``saving``; old ones are
                        cleaned up by a callback
    train ends        the best checkpoint's weights are restored

``gradient_accumulation_steps`` stays 1: accumulation, token weighting and ``no_sync`` live in ``training_step``.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from llmtune.data import EncodedDataset, epoch_order
from llmtune.evaluation import RowLosses, Scores, score
from llmtune.kernels.attention import mask_is_needed
from llmtune.kernels.documents import variable_lengths
from llmtune.training.committing import CommittingTrainer
from llmtune.training.continuity import Cursor
from llmtune.training.memory_guard import MemoryGuard, guards
from llmtune.training.meter import free_caches, is_out_of_memory
from llmtune.training.ranks import Ranks
from llmtune.training.recoveries import Recoveries
from llmtune.training.saved_facts import manifest_facts
from llmtune.training.schedules import warm_from_the_first_update
from llmtune.training.shortage import Replays
from llmtune.training.updates import Update, UpdateCollator, UpdateLoader, UpdateSampler

if TYPE_CHECKING:
    from llmtune.training.numerics import NumberGuard


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
        pad_multiple: See `pass_width`.
        pass_overhead_tokens: See `micro_batches`.
        checkpoint_facts: Identity of the run, written to every manifest.
        stop_requested: Whether this process was asked to stop; ranks agree on it once per update.
        recoveries: Decides what is done when memory runs out.
        memory_guard: Whether passes on a CPU are guarded against the kernel.
        asynchronous: Whether checkpoints are written in the background, from a copy in host memory.
        compress_optimizer: Whether they keep the optimizer's state compressed.
        optimizer_arguments: Keyword arguments of the optimizer's class.
    """

    global_batch_size: int
    token_budget: int
    micro_batch_size: int
    packing: bool
    pad_multiple: int
    pass_overhead_tokens: int | None
    checkpoint_facts: Mapping[str, Any]
    stop_requested: Callable[[], bool]
    recoveries: Recoveries
    memory_guard: bool = True
    asynchronous: bool = False
    compress_optimizer: bool = False
    optimizer_arguments: Mapping[str, Any] = field(default_factory=dict)


class UpdateTrainer(CommittingTrainer):
    """A ``transformers.Trainer`` whose data loader yields whole updates.

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
        self._settings = settings
        self.last_update: StepFacts | None = None
        self.recoveries = settings.recoveries
        self._replays = Replays(self, ranks=ranks, data=train_data)
        self._masked = mask_is_needed(model.config)
        self._guard = MemoryGuard(model) if settings.memory_guard and guards(args.device) else None
        self._evaluation_budget: int | None = None  # where it is not that of updates
        self.skipped: set[int] = set()  # updates, counted from 0, whose rows are not learned from
        self.numbers: NumberGuard | None = None
        self.measures: Callable[[], dict[str, float]] | None = None  # the user's metrics, as the model is now
        self.counted: Mapping[str, int] = {}  # metrics that are shares of rows, and of how many
        self.stop_agreed = False
        self.evaluation_seconds = 0.0  # of the latest one
        self.last_scores: Scores | None = None  # of the latest one
        super().__init__(
            args=args,
            ranks=ranks,
            asynchronous=settings.asynchronous,
            compress_optimizer=settings.compress_optimizer,
            model=model,
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

    def set_token_budget(self, token_budget: int, *, evaluation: bool = True) -> None:
        """Cut all updates to come for this budget, and evaluations; which rows an update has stays as it is."""
        if not evaluation:
            self._evaluation_budget = self._evaluation_budget or self._settings.token_budget
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

    # ------------------------------------------------------------------ the optimizer

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """Return the class of the optimizer, and its arguments: the Trainer's, replaced by those of the plan."""
        kind, keywords = super().get_optimizer_cls_and_kwargs(args, model)
        return kind, {**keywords, **self._settings.optimizer_arguments}

    # ------------------------------------------------------------------ one update

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the schedule, with a first learning rate above zero; see ``schedules``."""
        scheduler: Any = self.__dict__.get("lr_scheduler")
        if scheduler is None:
            made = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            scheduler = warm_from_the_first_update(made, warmup=warmup, updates=num_training_steps)
            self.lr_scheduler = scheduler
        return scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: Update, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Accumulate the gradient of one update: the mean loss over its supervised tokens on all ranks.

        Returns:
            This rank's part of that mean times the number of ranks, so that the mean over ranks is the loss.

        Raises:
            RecoveryExhausted: Memory does not hold one row alone.
            TrainingError: Memory ran out where the model is spread over the ranks.
        """
        model.train()
        facts = self._agree(inputs)
        if self.state.global_step in self.skipped:
            model.zero_grad()
            return torch.zeros((), device=self.args.device)
        return self._replays.run(model, inputs, self._ranks.size / max(facts.num_supervised_tokens, 1))

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
        guarded = contextlib.nullcontext() if self._guard is None else self._guard.passing(batch["input_ids"].numel())
        with contextlib.nullcontext() if reduces else self.accelerator.no_sync(model), guarded:
            loss = model(**self._prepare_inputs(self._for_model(batch)), num_items_in_batch=1).loss * scale
            self.accelerator.backward(loss)
        summed: torch.Tensor = loss.detach().float()
        return summed

    def _for_model(self, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """A micro-batch as the model is given it: no mask where none is needed, where documents end on CUDA."""
        given: dict[str, Any] = {
            name: tensor for name, tensor in batch.items() if self._masked or name != "attention_mask"
        }
        if "position_ids" in batch and self.args.device.type == "cuda":
            given |= variable_lengths(batch["position_ids"])
        return given

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

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """The norm before clipping; what is not finite never reaches the optimizer."""
        upstream = super()._clip_grad_norm
        return upstream(model) if self.numbers is None else self.numbers.clip(model, upstream)

    def rows_of(self, step: int) -> list[int]:
        """Row numbers, in the training data, of the update after ``step`` others, over all ranks."""
        batch = self._settings.global_batch_size
        epoch, number = divmod(step, len(self.sampler()))
        order = epoch_order(self._train_data.parts, self.args.seed, epoch)
        return [int(row) for row in order[number * batch : (number + 1) * batch]]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the token counts of the update to its log line."""
        if not math.isfinite(logs.get("loss", 0.0)):
            self._tr_loss.zero_()  # the Trainer subtracts it from itself, which leaves NaN in every later loss
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
        self.last_scores = scores = self.score(data)
        metrics = {
            f"{metric_key_prefix}_loss": scores.loss,
            f"{metric_key_prefix}_perplexity": scores.perplexity,
            f"{metric_key_prefix}_tokens": scores.num_tokens,
        }
        if self.measures is not None:
            own = self.measures() if self._ranks.is_main else {}
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in self._ranks.from_main(own).items()}
        self.evaluation_seconds = time.perf_counter() - began
        self.log(dict(metrics))  # log() adds to what it is given
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score(self, data: EncodedDataset) -> Scores:
        """Loss on ``data``, each rank scoring its share; in smaller passes from then on if memory runs out.

        Raises:
            RecoveryExhausted: Memory does not hold one row alone.
        """
        while True:
            budget = self._evaluation_budget or self._settings.token_budget
            try:
                part = self._score(data, budget)
            except Exception as error:
                if self.is_sharded or not is_out_of_memory(error):
                    raise
                failed = str(error)
            else:
                return self._add_up(part)
            free_caches(self.args.device)
            self._evaluation_budget = self._replays.smaller_evaluation(failed, data, budget)

    @property
    def is_sharded(self) -> bool:
        """Whether the model is spread over the ranks, so that nothing can be done again by one of them."""
        return self._ranks.is_sharded

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """A block of forward passes in which the memory guard looks, if there is one."""
        return contextlib.nullcontext() if self._guard is None else self._guard.watching()

    def _score(self, data: EncodedDataset, token_budget: int) -> Scores:
        with self.watched():
            return score(
                self.model_wrapped if self.is_fsdp_enabled or self.is_deepspeed_enabled else self.model,
                data,
                pad_token_id=self.processing_class.pad_token_id,
                token_budget=token_budget,
                pad_multiple=self._settings.pad_multiple,
                device=self.args.device,
                rank=self._ranks.rank,
                num_ranks=self._ranks.size,
            )

    def _add_up(self, part: Scores) -> Scores:
        if self._ranks.size == 1:
            return part
        own = [part.loss_sum, float(part.num_tokens), float(part.rows is not None)]
        sums = torch.tensor(own, dtype=torch.float64, device=self.args.device)
        loss_sum, tokens, with_rows = self.accelerator.reduce(sums, "sum").tolist()
        rows = self._add_up_rows(part.rows) if part.rows is not None and with_rows == self._ranks.size else None
        return Scores(loss_sum=loss_sum, num_tokens=int(tokens), rows=rows)

    def _add_up_rows(self, part: RowLosses) -> RowLosses:
        """The losses of all rows from those of each rank's share, which are zero elsewhere."""
        own = torch.from_numpy(np.stack([part.losses, part.tokens.astype(np.float64)])).to(self.args.device)
        losses, tokens = self.accelerator.reduce(own, "sum").cpu().numpy()
        return RowLosses(losses=losses, tokens=tokens.astype(np.int64))

    # ------------------------------------------------------------------ saving

    def manifest_facts(self) -> dict[str, Any]:
        """Where the run is, how it does, and which run it is."""
        step, batch = self.state.global_step, self._settings.global_batch_size
        facts = manifest_facts(
            state=self.state,
            args=self.args,
            cursor=Cursor.after(step, parts=self._train_data.parts, seed=self.args.seed, global_batch_size=batch),
            open_incident=self.numbers is not None and self.numbers.is_open(step),
            num_ranks=self._ranks.size,
        )
        return facts | dict(self._settings.checkpoint_facts)
