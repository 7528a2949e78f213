"""What the speed benchmark runs on: models of real shapes with random weights, rows of real lengths, and the peers.

A case is built once in a directory and read by all sides: the model, a tokenizer of one token per word, the rows as
token ids (peers) and as text that gives the very same ids (llmtune), and the first values of the adapter.
"""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import NormalDist

import numpy as np

PEERS_DIRECTORY = Path(__file__).resolve().parent / "peers"
OWN = "llmtune"
SEED = 42
RANK, ALPHA = 16, 32
# Constant. Random weights learn the frequencies of words within a few updates at this rate.
LEARNING_RATE = 5e-4

# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Sizes of a decoder with tied embeddings; ``type`` is that of its ``config.json``."""

    type: str
    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each linear map of one layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (self.hidden, query),
            "self_attn.k_proj": (self.hidden, key),
            "self_attn.v_proj": (self.hidden, key),
            "self_attn.o_proj": (query, self.hidden),
            "mlp.gate_proj": (self.hidden, self.mlp),
            "mlp.up_proj": (self.hidden, self.mlp),
            "mlp.down_proj": (self.mlp, self.hidden),
        }

    def flops(self, lengths: list[int], supervised: int) -> float:
        """Arithmetic of one LoRA update without recomputation: ``4 N_b + 6 N_l + 4 ρ N_h + 6 q S L`` per token."""
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        weights = self.layers * sum(a * b for a, b in self.linears.values())
        adapter = self.layers * RANK * sum(a + b for a, b in self.linears.values())
        head = 4 * supervised * self.vocabulary * self.hidden
        return tokens * (4 * weights + 6 * adapter) + head + 6 * self.heads * self.head_dim * self.layers * squares


MODELS = {
    "135m": Model(type="llama", hidden=576, mlp=1536, layers=30, heads=9, kv_heads=3, vocabulary=49152),
    "0.5b": Model(type="qwen2", hidden=896, mlp=4864, layers=24, heads=14, kv_heads=2, vocabulary=151936),
    "tiny": Model(type="llama", hidden=64, mlp=192, layers=2, heads=4, kv_heads=2, vocabulary=1024),
}
CONTEXT = 32768

# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Lengths of rows: log-normal through both percentiles and at most ``longest``; ``batch`` rows per update."""

    p50: int
    p95: int
    longest: int
    batch: int

    def lengths(self, count: int) -> list[int]:
        """So many lengths in a fixed random order; they are evenly spaced quantiles, so any number is true to shape."""
        sigma = math.log(self.p95 / self.p50) / NormalDist().inv_cdf(0.95)
        quantiles = (np.random.default_rng(SEED).permutation(count) + 0.5) / count
        drawn = (self.p50 * math.exp(sigma * NormalDist().inv_cdf(q)) for q in quantiles)
        return [min(max(round(length), SHORTEST), self.longest) for length in drawn]


SHORTEST = 8
SHAPES = {
    "alpaca": Shape(p50=83, p95=292, longest=584, batch=16),
    "chat": Shape(p50=167, p95=584, longest=1168, batch=16),
    "long": Shape(p50=1768, p95=7924, longest=8192, batch=4),
    "uniform": Shape(p50=1000, p95=1000, longest=1000, batch=8),
}
# Fixed tokens; the words of the vocabulary come after them.
USER, ASSISTANT, EOS, PAD, UNKNOWN = range(5)
SPECIALS = ("<|user|>", "<|assistant|>", "<|eos|>", "<|pad|>", "<|unknown|>")
LETTERS = string.ascii_lowercase  # tokens that stand in no row: words are merged from them
FIRST_WORD = len(SPECIALS) + len(LETTERS)
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Token ids, and how many of the first ones are not learned."""

    input_ids: list[int]
    masked: int

    @property
    def supervised(self) -> int:
        """Tokens that are predicted and counted in the loss; the first of a row is predicted by nothing."""
        return len(self.input_ids) - max(1, self.masked)

    def text(self) -> dict[str, str]:
        """The row as llmtune reads it."""
        if not self.masked:
            return {"text": _words(self.input_ids[:-1])}
        return {
            "prompt": _words(self.input_ids[1 : self.masked - 1]),
            "completion": _words(self.input_ids[self.masked : -1]),
        }


def _words(ids: list[int]) -> str:
    return "".join(_word(number - FIRST_WORD) for number in ids)


def _word(number: int) -> str:
    """A capital letter and as many small ones as it takes, shorter ones first: no text of words can be read twice."""
    tail, count = "", len(LETTERS)
    while number >= count:
        number, digit = divmod(number - count, count)
        tail = LETTERS[digit] + tail
    return LETTERS[number].upper() + tail


def make_rows(shape: Shape, supervised: float, vocabulary: int, count: int) -> list[Row]:
    """Rows in the order of training: a question and an answer of words, frequent ones more often (Zipf)."""
    rng = np.random.default_rng(SEED)
    weights = 1 / np.arange(1, vocabulary - FIRST_WORD + 1)
    cumulated = np.cumsum(weights / weights.sum())
    rows = []
    for length in shape.lengths(count):
        words = (np.searchsorted(cumulated, rng.random(length)).clip(max=len(weights) - 1) + FIRST_WORD).tolist()
        if supervised >= 1:
            rows.append(Row(input_ids=[*words[:-1], EOS], masked=0))
            continue
        learned = min(max(round(supervised * length), 2), length - 3)  # the answer and its end
        asked = words[: length - learned - 2]
        answer = words[: learned - 1]
        rows.append(Row(input_ids=[USER, *asked, ASSISTANT, *answer, EOS], masked=length - learned))
    return rows


# ── what lies in the directory of a case ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one worker is told; written as JSON.

    Attributes:
        rows: File of ``steps × batch`` rows in the order of training.
        texts: The same as llmtune reads them.
        pass_rows: Rows of a forward pass with the best flags, about `PASS_TOKENS` tokens.
        most_rows: As many at most where a side has a number of its own.
        longest: Tokens of the longest row of this shape.
        masked: Whether a part of each row is not learned.
        work: Empty folder of this worker.
    """

    model: str
    rows: str
    texts: str
    adapter: str
    mode: str
    batch: int
    pass_rows: int
    most_rows: int
    steps: int
    threads: int
    longest: int
    masked: bool
    work: str
    rank: int = RANK
    alpha: int = ALPHA
    learning_rate: float = LEARNING_RATE
    seed: int = SEED

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        return path


def build_model(model: Model, directory: Path) -> Path:
    """Random bf16 weights, the tokenizer, and the first values of the adapter, unless they are there.

    Returns:
        The adapter's file; the model's directory is its parent's ``model``.
    """
    adapter = directory / "adapter.safetensors"
    if adapter.exists():
        return adapter
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model.type,
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    torch.manual_seed(SEED)
    weights = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights.save_pretrained(directory / "model")
    write_tokenizer(model.vocabulary, directory / "model")
    generator = torch.Generator().manual_seed(SEED)
    first = {}
    for layer in range(model.layers):
        for name, (inputs, _) in model.linears.items():
            bound = 1 / math.sqrt(inputs)  # as peft draws A; B begins at zero
            drawn = torch.rand(RANK, inputs, generator=generator) * 2 * bound - bound
            first[f"layers.{layer}.{name}"] = drawn
    save_file(first, adapter)
    return adapter


def write_tokenizer(vocabulary: int, directory: Path) -> None:
    """One token per word with nothing between them, and a chat template.

    Byte pairs, as every tokenizer class of these models has them: a word is a shorter word and one letter.
    """
    words = [_word(number) for number in range(vocabulary - FIRST_WORD)]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, text in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": split,
        "model": {
            "type": "BPE",
            "vocab": {text: number for number, text in enumerate((*SPECIALS, *LETTERS, *words))},
            "merges": [[word[:-1], word[-1]] for word in words if len(word) > 1],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[PAD],
        "unk_token": SPECIALS[UNKNOWN],
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


def write_rows(rows: list[Row], directory: Path, order: Callable[[int], list[int]]) -> tuple[Path, Path]:
    """The rows as ids, in the order of training, and as texts that llmtune's own order brings back into this one.

    Args:
        order: Row numbers in the order in which llmtune takes so many rows.
    """
    ids, texts = directory / "rows.jsonl", directory / "texts.jsonl"
    ids.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")
    placed = dict(zip(order(len(rows)), rows, strict=True))
    texts.write_text("".join(json.dumps(placed[i].text()) + "\n" for i in range(len(rows))), encoding="utf-8")
    return ids, texts


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What pip installs for a driver; peers that need the same packages share one.

    Attributes:
        requirements: Pinned packages; pip finds what these need.
        alone: Installed over them, without what they need.
        removed: Taken out again. Where torch is the one without CUDA, wheels of these for the other one do not load.
    """

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()


_TORCH = "torch==2.13.0"
_HUGGING_FACE = ("transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0", "trl==1.16.0", "datasets==5.2.0")
ENVIRONMENTS: dict[str, Environment] = {
    "hf": Environment(requirements=(_TORCH, *_HUGGING_FACE)),
    # 2026.10.9 is the first that trains on a CPU. It asks for a certifi of the day it appeared, which package indexes
    # may not have yet; in all else it needs what 2026.10.6 does.
    "unsloth": Environment(
        requirements=(_TORCH, "unsloth==2026.10.6", "unsloth_zoo==2026.10.6"),
        alone=("unsloth==2026.10.9", "unsloth_zoo==2026.10.9"),
        removed=("torchvision",),
    ),
    "llamafactory": Environment(requirements=(_TORCH, "llamafactory==0.9.5"), removed=("torchvision", "torchaudio")),
    "litgpt": Environment(requirements=(_TORCH, "litgpt==0.5.13")),
    "soup-cli": Environment(requirements=(_TORCH, "soup-cli==0.77.0", *_HUGGING_FACE)),
    "torchtune": Environment(requirements=(_TORCH, "torchtune==0.6.1", "torchao==0.14.1")),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One line of the table: a driver in ``peers/``, its environment, and the mode that the driver is asked for.

    The environment `OWN` is the one the benchmark itself runs in.
    """

    environment: str
    driver: str
    mode: str
    flags: str


OURS = Peer(environment=OWN, driver="llmtune_run.py", mode="lora", flags="bf16")
PEERS: dict[str, Peer] = {
    "trl": Peer(environment="hf", driver="trl_sft.py", mode="default", flags="SFTTrainer as it comes"),
    "trl-best": Peer(
        environment="hf",
        driver="trl_sft.py",
        mode="best",
        flags="bf16 weights, no checkpointing, batch_rebalance, passes of about 1,024 tokens",
    ),
    "trainer": Peer(environment="hf", driver="hf_trainer.py", mode="default", flags="Trainer with bf16=True"),
    "trainer-fp32": Peer(
        environment="hf", driver="hf_trainer.py", mode="fp32", flags="Trainer in fp32, one row per pass"
    ),
    "unsloth": Peer(
        environment="unsloth", driver="unsloth_sft.py", mode="default", flags="as its notebooks have it, in bf16"
    ),
    "unsloth-best": Peer(
        environment="unsloth",
        driver="unsloth_sft.py",
        mode="best",
        flags="no checkpointing, batch_rebalance, passes of about 1,024 tokens",
    ),
    "llamafactory": Peer(
        environment="llamafactory", driver="llamafactory_sft.py", mode="default", flags="as its examples have it"
    ),
    "litgpt": Peer(environment="litgpt", driver="litgpt_lora.py", mode="default", flags="bf16-true"),
    "soup-cli": Peer(environment="soup-cli", driver="soup_sft.py", mode="default", flags="as it comes"),
    "torchtune": Peer(environment="torchtune", driver="torchtune_lora.py", mode="default", flags="bf16"),
    "qlora": replace(OURS, mode="qlora", flags="llmtune itself on 4-bit weights (NF4)"),
}
REFERENCE = "trainer-fp32"
MOST_ROWS = 8  # per forward pass: the default of Trainer and TRL
PASS_TOKENS = 1024  # of a forward pass with the best flags, the most that still gained on two cores
