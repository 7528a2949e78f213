"""Answers to held-out prompts: same prompt, same greedy decoding for base and tuned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmtune.data import EncodedDataset
from llmtune.evaluation.flaws import Flaw, flaw_of

# Rows generated together. Decoding is bound by reading weights, so rows are nearly free until memory is short.
ROWS_AT_ONCE = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What precedes an answer, as the model saw it in training (token ids), and the answer it should give."""

    input_ids: tuple[int, ...]
    text: str
    reference: str
    reference_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A greedy answer: its text and its token ids without the stop token.

    ``stopped``: whether it ended with a stop token; ``limit``: most new tokens that it could have.
    """

    text: str
    ids: tuple[int, ...]
    stopped: bool
    limit: int

    def flaw(self, prompt: Prompt) -> Flaw | None:
        """Return what is wrong with it as an answer to ``prompt``; None where nothing is."""
        return flaw_of(
            self.ids,
            prompt.reference_ids,
            text=self.text,
            reference_text=prompt.reference,
            stopped=self.stopped,
            limit=self.limit,
        )


def prompts_of(data: EncodedDataset, tokenizer: Any, count: int) -> list[Prompt]:
    """The first ``count`` rows that have a prompt, up to their last answer."""
    prompts: list[Prompt] = []
    for row in range(len(data)):
        if len(prompts) == count:
            break
        encoded = data[row]
        supervised = np.flatnonzero(encoded.supervised)
        if len(supervised) == 0 or supervised[0] == 0:
            continue  # plain text has no prompt
        breaks = np.flatnonzero(np.diff(supervised) > 1)
        start = int(supervised[breaks[-1] + 1] if len(breaks) else supervised[0])
        ids = encoded.input_ids
        prompts.append(
            Prompt(
                input_ids=tuple(int(i) for i in ids[:start]),
                text=tokenizer.decode(ids[:start], skip_special_tokens=True).strip(),
                reference=tokenizer.decode(ids[start : supervised[-1] + 1], skip_special_tokens=True).strip(),
                reference_ids=tuple(int(i) for i in ids[start : supervised[-1] + 1]),
            )
        )
    return prompts


def answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    device: torch.device | str,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[str]:
    """Return the texts of `answers_to`."""
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "device": device, "rows_at_once": rows_at_once}
    return [given.text for given in answers_to(model, tokenizer, prompts, **how)]


@torch.no_grad()
def answers_to(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    device: torch.device | str,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[Answer]:
    """Return greedy continuations up to the stop token, in the order of ``prompts``; ``rows_at_once`` together."""
    was_training = model.training
    model.eval()
    answers: list[Answer] = []
    stops = stop_token_ids(model, tokenizer)
    try:
        for start in range(0, len(prompts), rows_at_once):
            group = prompts[start : start + rows_at_once]
            width = max(len(prompt.input_ids) for prompt in group)
            ids = torch.full((len(group), width), tokenizer.pad_token_id, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, prompt in enumerate(group):
                ids[row, width - len(prompt.input_ids) :] = torch.tensor(prompt.input_ids)
                mask[row, width - len(prompt.input_ids) :] = 1
            generated = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=stops,
            )
            new = generated[:, width:].tolist()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            answers += [_answer(ids, text.strip(), stops, max_new_tokens) for ids, text in zip(new, texts, strict=True)]
    finally:
        model.train(was_training)
    return answers


def _answer(new: list[int], text: str, stops: Sequence[int], limit: int) -> Answer:
    """One answer of a batch: what follows its first stop token is padding."""
    end = next((at for at, token in enumerate(new) if token in stops), len(new))
    return Answer(text=text, ids=tuple(new[:end]), stopped=end < len(new), limit=limit)


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's stop token and those the model's own generation settings add to it."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return sorted({tokenizer.eos_token_id, *listed})


@contextmanager
def as_base(model: Any) -> Iterator[Any]:
    """The same model with its adapter switched off; a model without an adapter is passed through."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield model
    else:
        yield model
