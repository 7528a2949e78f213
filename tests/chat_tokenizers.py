"""Tokenizers of every kind that chat models use, built here for any set of special tokens."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from test_data_support import tokenizer

# byte-level BPE; SentencePiece's BPE with its space before the first piece, before every piece, and as Llama-2's
# first conversion did it (a normaliser, before every piece).
Kind = Literal["byte_level", "metaspace", "metaspace_always", "metaspace_legacy"]
KINDS: tuple[Kind, ...] = ("byte_level", "metaspace", "metaspace_always", "metaspace_legacy")
_SPECIAL = re.compile(
    r"<[|\uff5c][^<>{}'\" \n]*?[|\uff5c]>|<\|[a-z_]+>|<[a-z_]+\|>|<(?:start|end)_of_[a-z]+>|\[gMASK\]|<sop>"
)
_EOS = {
    "<|im_end|>": "<|im_end|>",
    "<|eot_id|>": "<|eot_id|>",
    "<|end|>": "<|endoftext|>",
    "<|END_OF_TURN_TOKEN|>": "<|END_OF_TURN_TOKEN|>",
    "end▁of▁sentence": "<\uff5cend▁of▁sentence\uff5c>",
}


@cache
def chat_tokenizer(source: str, kind: Kind = "byte_level") -> Any:
    """A tokenizer with the special tokens that the chat template ``source`` writes."""
    from transformers import PreTrainedTokenizerFast

    eos = next((eos for mark, eos in _EOS.items() if mark in source), "</s>")
    special = dict.fromkeys(["<s>", eos, "<pad>", *_SPECIAL.findall(source)])
    special.pop('<|"|>', None)  # Gemma-4's quotation mark
    special.pop("<|user|>" if "message.role + '|>" in source else None, None)  # Zephyr writes its roles as plain text
    backend = _plain(kind)
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos, pad_token="<pad>")


def _plain(kind: Kind) -> Any:
    """The backend of the shared test tokenizers without their special tokens."""
    import json

    from tokenizers import Tokenizer, pre_tokenizers

    document = json.loads(tokenizer("metaspace" if kind == "metaspace_always" else kind).backend_tokenizer.to_str())
    document["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(document))
    if kind == "metaspace_always":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    return backend


def package_data(package: str, folder: str) -> Path:
    """A folder of an installed package, without importing the package; skips where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / folder


@cache
def from_sentencepiece(path: Path, scheme: Literal["first", "always", "legacy"]) -> Any:
    """A fast tokenizer of a SentencePiece BPE model.

    ``scheme``: where the space before a piece of text goes: before the ``first`` piece only, or before every piece
    between special tokens (``always``; ``legacy`` by way of a normaliser).
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    ids = range(pieces.get_piece_size())
    vocabulary = {pieces.id_to_piece(i): i for i in ids}
    special = [pieces.id_to_piece(i) for i in ids if pieces.is_control(i) or pieces.is_unknown(i)]
    scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in ids if not pieces.is_byte(i)}
    merges = generate_merges(vocabulary, scores, skip_tokens=special)
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
