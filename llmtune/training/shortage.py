"""Out of memory inside an update: the update is done again in smaller pieces, and the run goes on.

A backward pass that dies has written half of its gradients. So all of them are dropped, the random states of the
update's start come back, and all its rows go through the model anew, fewer at a time. The loss of a piece is divided by
the supervised tokens of the whole update, as that of a whole micro-batch is: the gradient is the same. What the update
is made of, how many there are and in which order they come never changes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from llmtune.data import IGNORED, EncodedDataset, padded, pass_width
from llmtune.errors import RecoveryExhausted, TrainingError
from llmtune.kernels.head import attach_loss, attached_rows
from llmtune.training.meter import free_caches, is_out_of_memory
from llmtune.training.recovery import Failure, FailureKind, Remedy
from llmtune.training.updates import Update

if TYPE_CHECKING:
    from llmtune.training.ranks import Ranks
    from llmtune.training.trainer import UpdateTrainer

CAUSE = "memory ran out in a pass"
# Gradients are added up over the ranks in pieces of this size: what DDP's own buckets hold (torch's default, 25 MiB).
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedPass:
    """A pass that ran out of memory: what was in it, and what was said."""

    rank: int
    rows: int
    tokens: int
    row: int
    error: str


class Replays:
    """Does updates, and does them again in smaller pieces where memory runs out."""

    def __init__(self, trainer: UpdateTrainer, *, ranks: Ranks, data: EncodedDataset) -> None:
        self._trainer, self._ranks, self._data = trainer, ranks, data
        # Ranks that all copy the model add up once, after they have agreed that none has failed.
        self._together = ranks.size > 1 and not ranks.is_sharded
        self._limit: int | None = None  # most padded tokens of a pass; None while memory has never run out

    def run(self, model: torch.nn.Module, update: Update, scale: float) -> torch.Tensor:
        """Add up the gradient of ``update``; returns this rank's loss times ``scale``.

        Raises:
            RecoveryExhausted: One row alone does not fit, whatever is done about it; names it.
            TrainingError: Memory ran out where the model is spread over the ranks.
        """
        trainer = self._trainer
        restore_random_states = random_states(trainer.args.device)
        update = self._cut(update)
        while True:
            total, failed = self._attempt(model, update, scale)
            failures = self._told(failed)
            if not failures:
                break
            drop_gradients(model)
            free_caches(trainer.args.device)
            restore_random_states()
            update = self._mend(update, failures)
        if self._together:
            trainer.accelerator.gradient_state._set_sync_gradients(True)
            reduce_gradients(model.parameters(), self._ranks.size)
        if trainer.last_update is not None:
            trainer.last_update = replace(trainer.last_update, micro_batch_size=update.max_rows)
        return total

    def _attempt(self, model: torch.nn.Module, update: Update, scale: float) -> tuple[torch.Tensor, FailedPass | None]:
        """All passes of an update, up to the first that runs out of memory."""
        trainer = self._trainer
        total = torch.zeros((), device=trainer.args.device)
        last = len(update.micro_batches) - 1
        for number, batch in enumerate(update.micro_batches):
            reduces = number == last and not self._together
            failed = None
            try:
                total += trainer.forward_and_backward(model, batch, scale, reduces=reduces)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if self._ranks.is_sharded:
                    raise _over_ranks(error) from error
                failed = _described(error, batch, update.rows[number], self._ranks.rank)
            if failed is not None:  # the error is gone by now, and with it the frames that held activations
                return total, failed
        return total, None

    def _told(self, failed: FailedPass | None) -> list[FailedPass]:
        """What failed on any rank; one small gather where nothing did."""
        trainer = self._trainer
        if not self._together:
            return [] if failed is None else [failed]
        flag = torch.tensor([int(failed is not None)], device=trainer.args.device)
        if int(trainer.accelerator.gather(flag).sum()) == 0:
            return []
        from accelerate.utils import gather_object

        return [one for one in gather_object([failed]) if one is not None]

    def _cut(self, update: Update) -> Update:
        if self._limit is None:
            return update
        collator = self._trainer.collator(self._limit)
        return cut(update, self._limit, pad_token_id=collator.pad_token_id, pad_multiple=collator.pad_multiple)

    def _mend(self, update: Update, failures: Sequence[FailedPass]) -> Update:
        """Apply the next remedy; returns the update as it is cut now."""
        trainer, recoveries = self._trainer, self._trainer.recoveries
        worst = min(failures, key=lambda one: (one.rows > 1, one.tokens, one.rank))
        evidence = {"phase": "step", **asdict(worst)} | self._chunk_evidence()
        failure = _failure("out_of_memory", trainer.state.global_step, evidence)
        remedy = recoveries.decide(failure)
        changes: dict[str, Any]
        if remedy.action == "split" and worst.rows > 1:
            limit = max(1, worst.tokens // 2)
            self._limit = limit if self._limit is None else min(limit, self._limit)
            trainer.set_token_budget(self._limit, evaluation=False)
            update = self._cut(update)
            changes = {"token_budget": self._limit, "accumulation": len(update.micro_batches)}
        elif remedy.action in ("checkpoint_activations", "offload_activations") and _can_recompute(trainer.model):
            offload = remedy.action == "offload_activations"
            recompute(trainer.model, offload=offload)
            changes = {"activation_checkpointing": True, "checkpoint_every": 1}
            changes |= {"activation_offload": True} if offload else {}
        elif remedy.action == "chunk_loss":
            changes = self._shrink_chunks(remedy)
        else:
            raise _too_long(failure, self._data, worst.row, worst.tokens, remedy.reason)
        recoveries.took(failure, remedy, changes)
        return update

    def smaller_evaluation(self, error: str, data: EncodedDataset, token_budget: int) -> int:
        """The token budget to evaluate ``data`` with after ``token_budget`` was too much.

        It is the same one again where a row alone is too much and fewer logits at once may help.

        Raises:
            RecoveryExhausted: One row alone does not fit; names the longest.
        """
        trainer, recoveries = self._trainer, self._trainer.recoveries
        multiple = trainer.collator(1).pad_multiple
        row = int(data.lengths.argmax())
        longest = pass_width(int(data.lengths[row]), 1, multiple)
        rows = 1 if token_budget <= longest else max(2, token_budget // longest)
        evidence = {"phase": "evaluation", "rows": rows, "tokens": token_budget, "error": first_line(error)}
        evidence |= self._chunk_evidence()
        failure = _failure("evaluation_out_of_memory", trainer.state.global_step, evidence)
        remedy = recoveries.decide(failure)
        if remedy.action == "chunk_loss":
            recoveries.took(failure, remedy, self._shrink_chunks(remedy))
            return token_budget
        if remedy.action != "smaller_evaluation":
            raise _too_long(failure, data, row, longest, remedy.reason)
        smaller = longest if token_budget < 3 * longest else token_budget // 2 // multiple * multiple
        recoveries.took(failure, remedy, {"evaluation_token_budget": smaller})
        return smaller

    def _chunk_evidence(self) -> dict[str, int]:
        return {"loss_chunk_rows": attached_rows(self._trainer.model) or 0}

    def _shrink_chunks(self, remedy: Remedy) -> dict[str, Any]:
        attach_loss(self._trainer.model, chunk_rows=int(remedy.changes["loss_chunk_rows"]))
        return dict(remedy.changes)


# ------------------------------------------------------------------ cutting


def cut(update: Update, limit: int, *, pad_token_id: int, pad_multiple: int) -> Update:
    """``update`` with every micro-batch of more than ``limit`` padded tokens cut between its rows; one row stays whole.

    The pieces are padded as passes of their rows are.
    """
    if all(batch["input_ids"].numel() <= limit for batch in update.micro_batches):
        return update
    batches: list[dict[str, torch.Tensor]] = []
    rows: list[tuple[int, ...]] = []
    for batch, numbers in zip(update.micro_batches, update.rows, strict=True):
        if batch["input_ids"].numel() <= limit or len(numbers) == 1:
            batches.append(batch)
            rows.append(numbers)
            continue
        packed = "position_ids" in batch
        lengths = _packed_lengths(batch, len(numbers)) if packed else batch["attention_mask"].sum(dim=1).tolist()
        for start, end in _runs(lengths, limit, pad_multiple, packed=packed):
            if packed:
                piece = _packed_piece(batch, sum(lengths[:start]), sum(lengths[:end]), pad_token_id, pad_multiple)
            else:
                width = pass_width(max(lengths[start:end]), end - start, pad_multiple)
                piece = _padded_piece({name: tensor[start:end] for name, tensor in batch.items()}, width, pad_token_id)
            batches.append(piece)
            rows.append(numbers[start:end])
    return replace(update, micro_batches=batches, rows=tuple(rows), max_rows=max(map(len, rows)))


def _runs(lengths: Sequence[int], limit: int, multiple: int, *, packed: bool) -> list[tuple[int, int]]:
    """Starts and ends of runs of rows, each as long as ``limit`` allows."""
    runs, start = [], 0
    for end in range(1, len(lengths) + 1):
        inside = lengths[start:end]
        width = 0 if packed else pass_width(max(inside), len(inside), multiple)
        tokens = padded(sum(inside), multiple) if packed else len(inside) * width
        if tokens > limit and len(inside) > 1:
            runs.append((start, end - 1))
            start = end - 1
    return [*runs, (start, len(lengths))]


def _packed_lengths(batch: dict[str, torch.Tensor], count: int) -> list[int]:
    """Tokens of each row of a packed sequence; what fills it up begins at 0 as well, and is no row."""
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ends = [*starts[1:], batch["position_ids"].shape[1]]
    return [end - start for start, end in zip(starts, ends, strict=True)][:count]


def _padded_piece(batch: dict[str, torch.Tensor], width: int, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows with as much padding as makes them ``width`` wide, be it less or more than they have."""
    missing = max(0, width - batch["input_ids"].shape[1])
    fill = {"input_ids": pad_token_id, "labels": IGNORED, "attention_mask": 0}
    return {name: F.pad(tensor[:, :width], (0, missing), value=fill[name]) for name, tensor in batch.items()}


def _packed_piece(
    batch: dict[str, torch.Tensor], start: int, end: int, pad_token_id: int, pad_multiple: int
) -> dict[str, torch.Tensor]:
    missing = padded(end - start, pad_multiple) - (end - start)
    fill = {
        "input_ids": torch.full((1, missing), pad_token_id),
        "labels": torch.full((1, missing), IGNORED),
        "position_ids": torch.arange(missing)[None],
    }
    return {name: torch.cat([tensor[:, start:end], fill[name]], dim=1) for name, tensor in batch.items()}


# ------------------------------------------------------------------ what a failure leaves, and what is done about it


def random_states(device: torch.device) -> Callable[[], None]:
    """What puts python's, numpy's, torch's and the device's random states back to what they are now."""
    python, legacy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    backend = None if device.type == "cpu" else getattr(torch, device.type)
    own = None if backend is None else backend.get_rng_state()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(legacy)
        torch.set_rng_state(cpu)
        if backend is not None:
            backend.set_rng_state(own)

    return restore


def drop_gradients(model: torch.nn.Module) -> None:
    """All of them, also those that a dead backward pass has half written."""
    for parameter in model.parameters():
        parameter.grad = None


def reduce_gradients(parameters: Iterable[torch.nn.Parameter], num_ranks: int) -> None:
    """Replace the gradients of all ranks by their mean, in a few large messages.

    A weight that no row of this rank has reached counts as zero: every rank has to send the same weights.
    """
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

    buckets: dict[torch.dtype, list[list[torch.Tensor]]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        of_kind = buckets.setdefault(parameter.grad.dtype, [[]])
        if sum(gradient.nbytes for gradient in of_kind[-1]) >= BUCKET_BYTES:
            of_kind.append([])
        of_kind[-1].append(parameter.grad)
    for bucket in (bucket for of_kind in buckets.values() for bucket in of_kind):
        flat = _flatten_dense_tensors(bucket)  # type: ignore[no-untyped-call]
        torch.distributed.all_reduce(flat)
        flat /= num_ranks
        means = _unflatten_dense_tensors(flat, bucket)  # type: ignore[no-untyped-call]
        for gradient, mean in zip(bucket, means, strict=True):
            gradient.copy_(mean)


def recompute(model: Any, *, offload: bool) -> None:
    """Recompute every layer in the backward pass from now on; ``offload`` keeps what they start from on the host."""
    # transformers 5.23 calls activation checkpointing what was gradient checkpointing before.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    how = {f"{name}_checkpointing_kwargs": {"use_reentrant": False}, "every_n_layers": 1, "offload": offload}
    getattr(model, f"{name}_checkpointing_enable")(**how)


def _can_recompute(model: Any) -> bool:
    return bool(getattr(model, "supports_gradient_checkpointing", False))


def _described(error: Exception, batch: dict[str, torch.Tensor], rows: tuple[int, ...], rank: int) -> FailedPass:
    tokens = batch["input_ids"].numel()
    return FailedPass(
        rank=rank, rows=len(rows), tokens=tokens, row=rows[0], error=first_line(str(error) or type(error).__name__)
    )


def first_line(text: str) -> str:
    """What an error says, in one line for an event."""
    return next(iter(text.strip().splitlines()), "")[:300]


def _failure(kind: FailureKind, step: int, evidence: dict[str, Any]) -> Failure:
    remedy = (
        "Every row has to fit alone: shorten it, choose --set data.max_length, --method qlora or a smaller model, or "
        "free memory and run the same command again, which goes on from the last checkpoint."
    )
    return Failure(kind=kind, cause=CAUSE, step=step, evidence=evidence, remedy=remedy)


def _too_long(failure: Failure, data: EncodedDataset, row: int, tokens: int, reason: str) -> RecoveryExhausted:
    file, line = data.location(row)
    return RecoveryExhausted(failure, f"{file} line {line}, {tokens:,} tokens with padding: {reason}")


def _over_ranks(error: Exception) -> TrainingError:
    return TrainingError(
        f"memory ran out in an update: {first_line(str(error))}. The model is spread over the ranks (FSDP, "
        "DeepSpeed), where ranks are in the middle of their exchanges and an update cannot be done again: live "
        "recovery is for whole models only. Lower --set train.token_budget and run the same command: it goes on from "
        "the last checkpoint"
    )
