"""What is trained to see whether llmtune learns what an fp32 Trainer learns: rows, models, and ids of the rows."""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from peers.common import IGNORED
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmtune.builtin import corpus, demo_heldout_path, demo_train_path, tiny_path

CHECKED = 100  # besides the first update and the last one
CONTEXT = 1024
# Of a decoder with 49.4 M parameters and the vocabulary of builtin:tiny, whose tokenizer knows every byte.
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 14, "num_attention_heads": 8}
TASKS = {
    "words": "text of arithmetic word problems from the embedded corpus (not GSM8K)",
    "answers": "arithmetic word problems as conversations, answers learned (embedded corpus, not GSM8K)",
    "prose": "paragraphs of the docstrings of Python's standard library (not GSM8K)",
    "demo": "rows of llmtune demo",
}
Tokens = dict[str, list[int]]  # ``input_ids`` and ``labels`` of one row


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is trained, for one seed or many.

    Attributes:
        model: ``tiny`` (LoRA on the embedded model) or ``50m`` (all weights of a random one).
        task: What the rows are, in words.
        train: Rows as llmtune reads them; a multiple of ``batch``, so that updates are whole.
        heldout: Rows both results are scored on.
        learning_rate: Peak; None takes llmtune's own.
        changes: Further settings of llmtune.
    """

    model: str
    task: str
    train: Sequence[Mapping[str, Any]]
    heldout: Sequence[Mapping[str, Any]]
    steps: int
    batch: int
    learning_rate: float | None
    threads: int
    changes: Mapping[str, Any]

    @property
    def method(self) -> str:
        return "lora" if self.model == "tiny" else "full"

    @property
    def checked(self) -> list[int]:
        """Updates whose gradients are compared."""
        return sorted({1, min(CHECKED, self.steps), self.steps})


def word_problems(seed: int) -> Iterator[dict[str, str]]:
    """Endless arithmetic word problems of the corpus, with worked answers that end as those of GSM8K do."""
    rng = Random(seed)
    while True:
        question, answer, result = corpus._sum(rng)
        yield {"question": question, "answer": f"{answer}\n#### {result}"}


def paragraphs() -> list[str]:
    """What people have written into the standard library: paragraphs of 80 to 1,200 characters, in one random order."""
    library, found = Path(sysconfig.get_path("stdlib")), set()
    for file in library.glob("**/*.py"):
        if not {"site-packages", "test", "tests"} & set(file.parts):
            with suppress(SyntaxError, UnicodeDecodeError):  # examples of such for lib2to3
                found |= _documented(ast.parse(file.read_bytes()))
    ordered = sorted(text for text in found if 80 <= len(text) <= 1200)
    Random(0).shuffle(ordered)
    return ordered


def _documented(tree: ast.Module) -> set[str]:
    """Paragraphs of all docstrings, each in one line."""
    owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    texts = [ast.get_docstring(owner) or "" for owner in owners]
    return {" ".join(paragraph.split()) for text in texts for paragraph in text.split("\n\n")}


def rows_of(task: str, count: int, heldout: int) -> tuple[list[Any], list[Any]]:
    """Rows of an embedded task: at most ``count`` to train on, and ``heldout`` others."""
    if task == "demo":
        files = demo_train_path(), demo_heldout_path()
        train, others = ([json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files)
        return train[:count], others[:heldout]
    if task == "prose":
        written = [{"text": text} for text in paragraphs()]
        return written[heldout:][:count], written[:heldout]
    made = islice(word_problems(1), count), islice(word_problems(2), heldout)
    if task == "words":
        return as_text(made[0]), as_text(made[1])
    return as_chat(made[0]), as_chat(made[1])


def as_text(rows: Iterable[Mapping[str, str]]) -> list[Any]:
    """Questions and answers as documents: every token is learned."""
    return [{"text": f"{row['question']}\n{row['answer']}"} for row in rows]


def as_chat(rows: Iterable[Mapping[str, str]]) -> list[Any]:
    """The same as conversations, of which the answers are learned."""
    asked = ([{"role": "user", "content": r["question"]}, {"role": "assistant", "content": r["answer"]}] for r in rows)
    return [{"messages": messages} for messages in asked]


def read_rows(path: Path) -> list[Any]:
    """The user's own JSON lines, as text."""
    return as_text(json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip())


def build_model(directory: Path, seed: int) -> Path:
    """Random fp32 weights of the 50M model, with the tokenizer of ``builtin:tiny``."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_path())
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        num_key_value_heads=SIZES["num_attention_heads"],
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES,
    )
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def encode(rows: Sequence[Mapping[str, Any]], tokenizer: Any) -> list[Tokens]:
    """Ids and labels by transformers alone; the first token is predicted by nothing and has no label."""
    found = []
    for row in rows:
        if "messages" in row:
            said = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
            ids, learned = said["input_ids"], said["assistant_masks"]
        else:
            ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
            learned = [1] * len(ids)
        found.append(tokens_of(ids, learned))
    return found


def tokens_of(ids: Sequence[int], learned: Sequence[int]) -> Tokens:
    labels = [token if counts else IGNORED for token, counts in zip(ids, learned, strict=True)]
    return {"input_ids": list(ids), "labels": [IGNORED, *labels[1:]]}
