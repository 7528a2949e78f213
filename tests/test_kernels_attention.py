"""Attention: left-out masks change nothing, documents do not see each other, gradients are those of torch's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import FAMILIES, WITHOUT_SDPA, family_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from llmtune.kernels import attention, cpu_attention
from llmtune.kernels.attention import (
    NAME,
    attach_attention,
    attend,
    detach_attention,
    mask_is_needed,
)
from llmtune.kernels.cpu_attention import CausalAttention
from llmtune.kernels.documents import Documents, variable_lengths
from llmtune.planning.batching import PACKABLE

KINDS = ("sdpa", "eager", NAME)
TAKEN = [family for family in FAMILIES if family not in WITHOUT_SDPA]
VARIANTS = [*TAKEN, "mistral window", "phi3 window", "qwen2 window", "gemma3_text window"]
LENGTHS = (11, 3, 1, 17, 2, 11)
VOCABULARY = 256
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACK = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def model_of(variant: str, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    family, _, window = variant.partition(" ")
    if window:  # shorter than the longest rows here
        changes |= {"sliding_window": 5}
        if family == "qwen2":
            changes |= {"use_sliding_window": True, "max_window_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = family_config(family, vocab_size=VOCABULARY, **changes)
        first = "sdpa" if kind == NAME else kind
        model = AutoModelForCausalLM.from_config(config, attn_implementation=first, dtype=dtype)
        for parameter in model.parameters():  # large enough for attention to matter
            parameter.data.mul_(3) if parameter.dim() > 1 else None
    model.config.use_cache = False
    if kind == NAME:
        assert attach_attention(model) is None
    assert model.config._attn_implementation == kind
    return model.eval()


def rows_of(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str = "right") -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    ones = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad(rows, batch_first=True, padding_side=side),
        "attention_mask": pad(ones, batch_first=True, padding_side=side),
    }


def packed(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return {"input_ids": torch.cat(rows)[None], "position_ids": positions[None]}


def learn(model: Any, real: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [tokens, vocabulary] where ``real``, and the gradient of a loss on them that has every token in it."""
    model.zero_grad()
    logits = model(**inputs).logits[real]
    cross_entropy(logits.float(), inputs["input_ids"][real].roll(-1)).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(left: tuple[Any, dict[str, Any]], right: tuple[Any, dict[str, Any]]) -> float:
    """The largest difference of logits or gradients, each over the largest of its own kind."""
    assert left[1].keys() == right[1].keys()
    largest = max(float(tensor.abs().max()) for tensor in right[1].values())
    gradients = max(float((left[1][name] - tensor).abs().max()) for name, tensor in right[1].items()) / largest
    return max(gradients, float((left[0] - right[0]).abs().max() / right[0].abs().max()))


class Watch(TorchDispatchMode):
    """Which operators ran, and the most numbers that one tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(func.overloadpacket)
        made = result if isinstance(result, tuple | list) else (result,)
        self.largest = max([self.largest, *(tensor.numel() for tensor in made if isinstance(tensor, torch.Tensor))])
        return result

    def count(self, packet: Any) -> int:
        return self.calls.count(packet)


# ------------------------------------------------------------------ right padding needs no mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_padded_on_the_right_need_no_mask(variant: str, kind: str) -> None:
    model, batch = model_of(variant, kind), padded(rows_of(*LENGTHS))
    real = batch["attention_mask"].bool()
    assert not mask_is_needed(model.config)
    masked = learn(model, real, **batch)
    del batch["attention_mask"]
    for use_cache in (False, True):
        assert apart(learn(model, real, use_cache=use_cache, **batch), masked) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_padded_on_the_left_need_one(variant: str, kind: str) -> None:
    model, batch = model_of(variant, kind), padded(rows_of(*LENGTHS), side="left")
    real = batch["attention_mask"].bool()
    masked = learn(model, real, **batch)
    del batch["attention_mask"]
    assert apart(learn(model, real, **batch), masked) > 1e-3


def test_which_models_need_their_mask() -> None:
    assert mask_is_needed(family_config("llama", is_causal=False))
    assert mask_is_needed(family_config("llama", output_router_logits=True))
    assert mask_is_needed(family_config("llama", is_encoder_decoder=True))
    assert not mask_is_needed(family_config("llama"))


@pytest.mark.parametrize("kind", ["sdpa", NAME])
def test_without_a_mask_the_flash_kernel_runs_on_grouped_heads(kind: str) -> None:
    model, batch = model_of("llama", kind), padded(rows_of(*LENGTHS))
    real, calls = batch["attention_mask"].bool(), []
    for inputs in (batch, {"input_ids": batch["input_ids"]}):
        with Watch() as watch:
            learn(model, real, **inputs)
        calls.append((watch.count(FLASH), watch.count(torch.ops.aten._unsafe_view)))
    (masked, masked_copies), (free, copies) = calls
    assert masked == free == model.config.num_hidden_layers
    assert masked_copies > copies  # keys and values repeated for every head


# ------------------------------------------------------------------ the backward pass


def states_of(
    rows: int, heads: int, key_heads: int, tokens: int, width: int, dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    """Queries, keys and values as a layer hands them over, and a gradient: [rows, heads, tokens, width]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(rows, tokens, count, width, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, key_heads, key_heads, heads)
    ]


def reference(states: list[torch.Tensor], scale: float, bounds: tuple[int, ...]) -> list[torch.Tensor]:
    """Output and gradients in fp64, with a dense mask."""
    query, key, value, gradient = (state.double() for state in states)
    leaves = [state.requires_grad_() for state in (query, key, value)]
    number = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    mask = (number[:, None] == number) & torch.ones(len(number), len(number), dtype=torch.bool).tril()
    output = scaled_dot_product_attention(*leaves, attn_mask=mask, scale=scale, enable_gqa=True)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def ours(states: list[torch.Tensor], scale: float, bounds: tuple[int, ...]) -> list[torch.Tensor]:
    leaves = [state.detach().requires_grad_() for state in states[:3]]
    output = CausalAttention.apply(*leaves, scale, bounds)
    return [output.detach(), *torch.autograd.grad(output, leaves, states[3])]


def errors(these: list[torch.Tensor], those: list[torch.Tensor]) -> list[float]:
    """Of each tensor, over its norm or the last one's: what a lone token's query gets is zero but for rounding."""
    least = those[-1].norm()
    return [float((a.double() - b).norm() / b.norm().clamp(min=least)) for a, b in zip(these, those, strict=True)]


@contextmanager
def cut_small(block: int, scores: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "_BLOCK", block)
        patch.setattr(cpu_attention, "_SCORES", scores)
        yield


@contextmanager
def cpu(*, amx: bool, fewest: int = 0) -> Iterator[None]:
    """With AMX only the way back goes in blocks; without it both do, of documents of any length here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attention, "_vector_bf16", lambda: not amx)
        patch.setattr(cpu_attention, "_SHORTEST", fewest)
        patch.setattr(cpu_attention, "_FEWEST", fewest)
        yield


@pytest.fixture(params=[True, False], ids=["amx", "vector"])
def amx(request: pytest.FixtureRequest) -> Iterator[bool]:
    with cpu(amx=request.param):
        yield request.param


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    rows=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 2), (7, 1)]),
    width=st.sampled_from([8, 16, 20, 24]),  # factors of the scores that are powers of two, and that are not
    block=st.sampled_from([1, 7, 16, 128]),
    scores=st.sampled_from([1, 2000, 2**20]),
    amx=st.booleans(),
)
def test_outputs_and_gradients_in_blocks(
    lengths: list[int], rows: int, heads: tuple[int, int], width: int, block: int, scores: int, amx: bool
) -> None:
    """bf16 keeps eight bits: 2 ** -8 is one rounding. The bound is five of them, for a chain of six."""
    bounds = tuple(accumulate(lengths, initial=0))
    states = states_of(rows, *heads, bounds[-1], width, torch.bfloat16)
    assert cpu_attention.backward_in_blocks(states[0], states[1], bounds)
    with cut_small(block, scores), cpu(amx=amx):
        mine = ours(states, width**-0.5, bounds)
    assert max(errors(mine, reference(states, width**-0.5, bounds))) < 5 * 2**-8


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("block", [128, 2])
def test_gradients_are_as_close_as_torchs(block: int) -> None:
    for width in (64, 80):
        states = states_of(2, 6, 2, 300, width, torch.bfloat16)
        exact, bounds = reference(states, width**-0.5, (0, 300)), (0, 300)
        leaves = [state.detach().requires_grad_() for state in states[:3]]
        output = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        theirs = [output.detach(), *torch.autograd.grad(output, leaves, states[3])]
        with cut_small(block, 2**20):
            result = ours(states, width**-0.5, bounds)
        for mine, their in zip(errors(result, exact), errors(theirs, exact), strict=True):
            assert mine < max(3.5 * their, 2**-8)


@pytest.mark.usefixtures("amx")
def test_large_scores_do_not_overflow() -> None:
    """What lies above the diagonal is exponentiated before it is dropped."""
    states = states_of(1, 3, 1, 50, 16, torch.bfloat16)
    states[1][:, :, 1:] *= 200  # the first query's row of scores is far above its only own
    mine = ours(states, 0.25, (0, 50))
    assert all(bool(tensor.isfinite().all()) for tensor in mine)
    assert max(errors(mine[:1], reference(states, 0.25, (0, 50))[:1])) < 2**-6


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_document_has_the_numbers_it_has_alone(dtype: torch.dtype) -> None:
    bounds = tuple(accumulate((13, 200, 1, 40), initial=0))
    states = states_of(1, 6, 2, bounds[-1], 16, dtype)
    together = ours(states, 0.25, bounds)
    assert max(errors(together, reference(states, 0.25, bounds))) < (1e-6 if dtype == torch.float32 else 2**-6)
    for start, end in pairwise(bounds):
        part = [state[:, :, start:end] for state in states]
        for whole, alone in zip(together, ours(part, 0.25, (0, end - start)), strict=True):
            assert torch.equal(whole[:, :, start:end], alone)
    other = [state.clone() for state in states]
    for state in other:
        state[:, :, : bounds[1]] = 9.0  # the first document's
    again = ours(other, 0.25, bounds)
    assert all(torch.equal(a[:, :, bounds[1] :], b[:, :, bounds[1] :]) for a, b in zip(together, again, strict=True))
    merged = ours(other, 0.25, (0, *bounds[2:]))  # the check sees a border that is missing
    assert not torch.equal(together[0][:, :, bounds[1] : bounds[2]], merged[0][:, :, bounds[1] : bounds[2]])


def test_a_gradient_without_memory_of_its_own() -> None:
    states = states_of(1, 2, 1, 9, 8, torch.float32)
    leaves = [state.requires_grad_() for state in states[:3]]
    CausalAttention.apply(*leaves, 0.5, (0, 4, 9)).sum().backward()
    exact = reference([*(state.detach() for state in states[:3]), torch.ones_like(states[3])], 0.5, (0, 4, 9))
    assert max(errors([leaf.grad for leaf in leaves], exact[1:])) < 1e-6


@pytest.mark.usefixtures("amx")
def test_what_is_saved_is_what_torch_saves() -> None:
    """Queries, keys, values, output, and one fp32 number per query and head; never a score."""

    def saved(run: Callable[..., torch.Tensor], states: list[torch.Tensor]) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = run(*states)
        assert kept.requires_grad
        return sum(sizes.values())

    rows, heads, key_heads, tokens, width = 2, 6, 2, 96, 16
    states = [state.requires_grad_() for state in states_of(rows, heads, key_heads, tokens, width, torch.bfloat16)[:3]]
    mine = saved(lambda q, k, v: CausalAttention.apply(q, k, v, 0.25, (0, tokens)), states)
    documents = saved(lambda q, k, v: CausalAttention.apply(q, k, v, 0.25, (0, 30, tokens)), states)
    theirs = saved(lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), states)
    assert mine == documents == theirs == rows * tokens * (2 * width * 2 * (heads + key_heads) + 4 * heads)


def test_which_passes_go_in_blocks(amx: bool) -> None:
    """bf16, and with AMX backward up to a length and never forward; the rest is torch's kernel's."""
    module = torch.nn.Module()
    longest = cpu_attention._LONGEST
    for dtype, tokens, key_heads, back in (
        (torch.bfloat16, 64, 1, True),
        (torch.bfloat16, longest, 1, True),
        (torch.bfloat16, longest + 1, 1, not amx),
        (torch.bfloat16, longest, 3, not amx),
        (torch.float32, 64, 1, False),
    ):
        states = states_of(1, 3, key_heads, tokens, 8, dtype)
        module.num_key_value_groups = 3 // key_heads
        leaves = [state.requires_grad_() for state in states[:3]]
        with Watch() as watch:
            output, _ = attend(module, *leaves, None, scaling=0.5)
            products = watch.count(torch.ops.aten.bmm)
            output.backward(states[3].transpose(1, 2))
        forward = dtype == torch.bfloat16 and not amx
        assert (watch.count(FLASH), products > 0) == (0 if forward else 1, forward)
        assert (watch.count(FLASH_BACK), watch.count(torch.ops.aten.bmm) > products) == (0 if back else 1, back)
        if back:
            assert watch.largest <= max(2 * 3 * tokens * 128, 3 * tokens * 10)  # never all scores of a long row


@pytest.mark.parametrize(("rows", "tokens", "blocks"), [(16, 64, True), (16, 63, False), (3, 64, False)])
def test_few_queries_are_left_to_torchs_kernel(rows: int, tokens: int, blocks: bool) -> None:
    """Without AMX, and where nothing needs a gradient: 9 heads are 2,048 queries and more from four rows of 64 on."""
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    with cpu(amx=False, fewest=64), pytest.MonkeyPatch.context() as patch, Watch() as watch:
        patch.setattr(cpu_attention, "_FEWEST", 2048)
        attend(module, *states_of(rows, 9, 3, tokens, 8, torch.bfloat16)[:3], None, scaling=0.5)
    assert (watch.count(FLASH), watch.count(torch.ops.aten.bmm) > 0) == (0 if blocks else 1, blocks)


# ------------------------------------------------------------------ packed rows


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_rows_are_the_rows_alone(variant: str) -> None:
    model, rows = model_of(variant, NAME), rows_of(*LENGTHS)
    batch = packed(rows)
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    mine = learn(model, real, **batch)
    detach_attention(model)
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits[0] for row in rows])
    assert float((mine[0] - alone).abs().max() / alone.abs().max()) < 1e-6
    assert apart(mine, learn(model, real, **batch)) < 1e-6  # by transformers' dense mask
    del batch["position_ids"]
    assert apart(learn(model, real, **batch), mine) > 1e-3  # the check sees contamination


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_neighbour_changes_nothing(dtype: torch.dtype) -> None:
    model, rows = model_of("llama", NAME, dtype), rows_of(30, 40, 20)
    with torch.no_grad():
        before = model(**packed(rows)).logits[0]
        after = model(**packed([rows_of(30, seed=1)[0], *rows[1:]])).logits[0]
    assert torch.equal(before[30:], after[30:])
    assert not torch.equal(before[:30], after[:30])


@pytest.mark.parametrize("variant", ["llama", "mistral window"])
def test_no_tensor_of_the_square_of_a_packed_row(variant: str) -> None:
    """Rows no longer than the window need no mask; a longer one is masked as ever."""
    tokens, largest = [5] * 120, {}
    for kind in ("sdpa", NAME):
        model, batch = model_of(variant, kind), packed(rows_of(*tokens))
        with Watch() as watch:
            learn(model, torch.ones_like(batch["input_ids"], dtype=torch.bool), **batch)
        largest[kind] = watch.largest
        assert (watch.count(FLASH) == len(tokens) * model.config.num_hidden_layers) is (kind == NAME)
    assert largest["sdpa"] >= sum(tokens) ** 2
    assert largest[NAME] == sum(tokens) * VOCABULARY  # the logits


def test_every_model_type_that_may_be_packed_is_proven_here() -> None:
    assert set(TAKEN) == attention.PACKABLE_TYPES
    assert set(FAMILIES) == PACKABLE


def test_several_packed_rows_in_a_batch_keep_their_mask() -> None:
    model = model_of("llama", NAME)
    first, second = packed(rows_of(9, 5)), packed(rows_of(4, 10))
    batch = {name: torch.cat([tensor, second[name]]) for name, tensor in first.items()}
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    mine = learn(model, real, **batch)
    detach_attention(model)
    assert apart(mine, learn(model, real, **batch)) < 1e-6


@pytest.mark.parametrize(
    "others",
    [
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"or_mask_function": lambda batch, head, query, key: key < 3},
        {"allow_is_causal_skip": False},
        {},
    ],
    ids=["padded on the left", "a prefix seen by all", "asked for", "plain"],
)
def test_masks_of_a_row_that_is_not_packed(others: dict[str, Any]) -> None:
    """They let through what transformers' let through, whether as a mask or as documents."""
    from transformers.masking_utils import create_causal_mask

    model = model_of("llama", NAME)
    arguments = {"inputs_embeds": torch.zeros(1, 6, 32), "past_key_values": None, "attention_mask": None} | others
    mine = create_causal_mask(model.config, **arguments)
    detach_attention(model)
    theirs = create_causal_mask(model.config, **arguments)
    if theirs is None:
        assert mine is None
    else:
        assert torch.equal(mine.mask() if isinstance(mine, Documents) else mine, theirs)
    assert isinstance(mine, Documents) is ("allow_is_causal_skip" in others)
    model.config.model_type = "falcon"  # computes with its mask
    attach_attention(model)
    assert not isinstance(create_causal_mask(model.config, **arguments), Documents)


def documents_of(lengths: tuple[int, ...], window: int | None = None) -> Documents:
    continues = torch.ones(sum(lengths) - 1, dtype=torch.bool)
    continues[[end - 1 for end in accumulate(lengths[:-1])]] = False
    return Documents(continues=continues, window=window, make_mask=lambda: torch.ones(1, 1, 1, 1, dtype=torch.bool))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9).map(tuple).filter(lambda these: sum(these) > 1))
def test_bounds_of_documents(lengths: tuple[int, ...]) -> None:
    documents = documents_of(lengths)
    assert documents.bounds() == tuple(accumulate(lengths, initial=0))
    assert documents.longest() == max(lengths)
    assert documents.cumulated().tolist() == list(documents.bounds())
    assert documents.cumulated().dtype == torch.int32
    assert documents.mask() is documents.mask()
    told = variable_lengths(torch.cat([torch.arange(length) for length in lengths])[None])
    assert torch.equal(told["cu_seq_lens_q"], documents.cumulated())
    assert torch.equal(told["cu_seq_lens_k"], documents.cumulated())
    assert told["max_length_q"] == told["max_length_k"] == max(lengths)


# On a CPU, documents longer than a window are masked before they come to a kernel: those say how long they are not.
@pytest.mark.parametrize(("window", "given_bounds"), [(None, False), (None, True), (5, True)])
def test_what_the_kernel_for_variable_lengths_is_given(
    monkeypatch: pytest.MonkeyPatch, window: int | None, given_bounds: bool
) -> None:
    """The kernel runs on CUDA alone: here, its contract, with attention written out in its place."""
    from torch.nn.attention import varlen

    def written_out(query: Any, key: Any, value: Any, **others: Any) -> torch.Tensor:
        assert others["cu_seq_q"] is others["cu_seq_k"]
        assert others["cu_seq_q"].dtype == torch.int32
        assert others["max_q"] == others["max_k"] == max(LENGTHS)
        assert others["enable_gqa"] == (query.shape[1] != key.shape[1])
        left, right = others["window_size"]
        parts = []
        for start, end in pairwise(others["cu_seq_q"].tolist()):
            index = torch.arange(end - start)
            behind = index[:, None] - index
            mask = (behind >= -right) & ((behind <= left) | (left == -1))
            part = [state[start:end].transpose(0, 1)[None] for state in (query, key, value)]
            mixed = scaled_dot_product_attention(*part, attn_mask=mask, scale=others["scale"], enable_gqa=True)
            parts.append(mixed[0].transpose(0, 1))
        return torch.cat(parts)

    model, batch = model_of("mistral window" if window else "llama", "sdpa"), packed(rows_of(*LENGTHS))
    real = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    dense = learn(model, real, **batch)
    assert attach_attention(model) is None
    monkeypatch.setattr(varlen, "varlen_attn", written_out)
    monkeypatch.setattr(attention, "takes", lambda *states: False)
    monkeypatch.setattr(attention, "_suits_varlen", lambda *states: True)
    if window:
        monkeypatch.setattr(Documents, "longest", lambda self: 0)
    if given_bounds:
        batch |= variable_lengths(batch["position_ids"])
        monkeypatch.setattr(Documents, "cumulated", None)  # nobody asks the device
    assert apart(learn(model, real, **batch), dense) < 1e-6


# ------------------------------------------------------------------ everything else is as it was


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_the_same(variant: str) -> None:
    """Prompts padded on the left, a cache, then one token at a time."""
    model, batch = model_of(variant, "sdpa"), padded(rows_of(9, 4, 12), side="left")
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 2, "eos_token_id": None}
    theirs = model.generate(**batch, **settings)
    assert attach_attention(model) is None
    assert torch.equal(model.generate(**batch, **settings), theirs)
    with torch.no_grad():
        mine = model(**batch).logits
        detach_attention(model)
        assert torch.equal(mine, model(**batch).logits)


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", ["padded", "packed"])
def test_a_pass_in_bf16(way: str, recomputed: bool) -> None:
    """Same logits as ``sdpa``, same gradient within rounding, same bits when done twice or recomputed."""
    rows = rows_of(30, 12, 25)
    inputs = packed(rows) if way == "packed" else {"input_ids": padded(rows)["input_ids"]}
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    exact = learn(model_of("llama", "sdpa", torch.float32), real, **inputs)
    theirs = learn(model_of("llama", "sdpa", torch.bfloat16), real, **inputs)
    model = model_of("llama", NAME, torch.bfloat16)
    mine = learn(model, real, **inputs)
    if recomputed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    again = learn(model, real, **inputs)
    assert torch.equal(mine[0], again[0])
    assert all(torch.equal(mine[1][name], gradient) for name, gradient in again[1].items())
    assert apart(mine, exact) < 1.5 * apart(theirs, exact)


def test_under_autocast() -> None:
    inputs = packed(rows_of(30, 12, 25))
    real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    results = []
    for kind in (NAME, "sdpa"):
        model = model_of("llama", kind)
        with torch.autocast("cpu", dtype=torch.bfloat16), Watch() as watch:
            results.append(learn(model, real, **inputs))
        assert (watch.count(FLASH_BACK) == 0) is (kind == NAME)
    assert apart(*results) < 3e-2


def test_dropped_attention_goes_to_sdpa() -> None:
    module = torch.nn.Module()
    module.num_key_value_groups = 1
    states = [state.requires_grad_() for state in states_of(1, 2, 2, 12, 8, torch.bfloat16)[:3]]
    with Watch() as watch:
        attend(module, *states, None, dropout=0.5)
    assert watch.count(FLASH) == 0
    documents = documents_of((5, 7))
    with Watch() as watch:
        attend(module, *states, documents, dropout=0.5)
    assert watch.count(FLASH) == 0
    assert documents._mask is not None


# ------------------------------------------------------------------ attaching


def test_attached_twice_and_detached() -> None:
    model = model_of("llama", NAME)
    assert attach_attention(model) is None
    assert model.config._attn_implementation == NAME
    detach_attention(model)
    detach_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_the_reason_why_not() -> None:
    assert attach_attention(model_of("llama", "eager")) == "the model's attention is eager, and only sdpa is replaced"
    dropping = attach_attention(model_of("llama", "sdpa", attention_dropout=0.1))
    assert dropping == "the model drops 10% of its attention"
    other = model_of("llama", "sdpa", is_causal=False)
    assert "not causal" in str(attach_attention(other))
    assert other.config._attn_implementation == "sdpa"
    own = model_of("llama", "sdpa")
    own._can_set_attn_implementation = lambda: False
    assert attach_attention(own) == "LlamaForCausalLM computes attention by itself"


def test_an_adapted_model_and_what_is_saved_of_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = model_of("llama", "sdpa")
    plain.save_pretrained(tmp_path / "before")
    model = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert attach_attention(model) is None
    batch = packed(rows_of(9, 5))
    with Watch() as watch, torch.no_grad():
        model(**batch)
    assert watch.count(FLASH) == 2 * model.config.num_hidden_layers
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "after")
    assert (tmp_path / "after/config.json").read_text() == (tmp_path / "before/config.json").read_text()
    assert NAME not in (tmp_path / "adapter/adapter_config.json").read_text()
