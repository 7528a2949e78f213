"""Loss on supervised rows alone: what `torch` and `transformers` compute, with products, memory and rows counted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from factories import FAMILIES, family_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from llmtune.kernels.head import attach_loss, attached_rows, detach_loss
from llmtune.kernels.loss import supervised_loss

Tensors = dict[str, torch.Tensor]


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    row_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
) -> torch.Tensor:
    logits = (
        torch.nn.functional.linear(hidden, weight, bias).float()
        if weight.dtype != torch.float64
        else (torch.nn.functional.linear(hidden, weight, bias))
    )
    logits = logits * logit_scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    losses = cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    losses = losses + z_loss * logits.logsumexp(1) ** 2
    return (losses if row_weights is None else losses * row_weights).sum()


def random_case(
    rows: int, vocabulary: int, width: int, dtype: torch.dtype, *, seed: int = 0, size: float = 1.0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * size).to(dtype)

    return {
        "hidden": normal(rows, width).requires_grad_(),
        "weight": normal(vocabulary, width).requires_grad_(),
        "bias": normal(vocabulary).requires_grad_(),
        "labels": torch.randint(vocabulary, (rows,), generator=generator),
        "row_weights": torch.rand(rows, generator=generator),
    }


def gradients(loss: torch.Tensor, case: Tensors, factor: float = 0.37) -> list[torch.Tensor]:
    """Of hidden states, weight and bias, those that have one."""
    trained = [case[name] for name in ("hidden", "weight", "bias") if case[name].requires_grad]
    return list(torch.autograd.grad(loss * factor, trained, materialize_grads=True))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> bool:
    """Relative to the largest number, as rounding errors of sums are."""
    return bool(
        (ours.double() - theirs.double()).abs().max() <= tolerance * theirs.double().abs().max().clamp_min(1e-30)
    )


OPTIONS = st.fixed_dictionaries(
    {
        "logit_scale": st.sampled_from([1.0, 0.0625, 3.0]),
        "softcap": st.sampled_from([None, 2.0, 30.0]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 1.0]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
    }
)


# ---------------------------------------------------------------------- the function


@given(
    rows=st.integers(1, 40),
    vocabulary=st.integers(1, 70),
    chunk_rows=st.integers(1, 50),
    options=OPTIONS,
    has_bias=st.booleans(),
    has_row_weights=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_loss_and_gradients_are_those_of_full_logits(
    rows: int,
    vocabulary: int,
    chunk_rows: int,
    options: dict[str, Any],
    has_bias: bool,
    has_row_weights: bool,
    seed: int,
) -> None:
    case = random_case(rows, vocabulary, 12, torch.float64, seed=seed)
    extra = {"bias": case["bias"]} if has_bias else {}
    extra |= {"row_weights": case["row_weights"].double()} if has_row_weights else {}
    given_to = (case["hidden"], case["weight"], case["labels"])
    ours = supervised_loss(*given_to, chunk_rows=chunk_rows, **extra, **options)
    theirs = reference(*given_to, **extra, **options)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12, abs=1e-12)
    for mine, true in zip(gradients(ours, case), gradients(theirs, case), strict=True):
        assert torch.allclose(mine, true, rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    case = random_case(7, 11, 5, torch.float64)
    others = {"weight": case["weight"].detach(), "bias": case["bias"].detach(), "labels": case["labels"]}
    for options in ({}, {"softcap": 3.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 0.01}):
        assert torch.autograd.gradcheck(
            lambda hidden, options=options: supervised_loss(hidden, chunk_rows=3, **others, **options), case["hidden"]
        )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("options", [{}, {"softcap": 20.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-4}])
@pytest.mark.parametrize("work_entries", [1, 2**18])
def test_narrow_numbers(
    dtype: torch.dtype, tolerance: float, options: dict[str, Any], work_entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtune.kernels.loss.WORK_ENTRIES", work_entries)
    monkeypatch.setattr("llmtune.kernels.loss.BLOCK_ENTRIES", 64 * 37)
    case = random_case(100, 301, 64, dtype, size=0.5)
    ours = supervised_loss(chunk_rows=32, **case, **options)
    exact = {name: value.double() if value.is_floating_point() else value for name, value in case.items()}
    theirs = reference(**exact, **options)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance / 10)
    for mine, true in zip(gradients(ours, case), gradients(theirs, case), strict=True):
        assert mine.dtype == dtype
        assert close(mine, true, 2 * tolerance)


def test_what_the_model_is_sure_of_still_has_an_exact_gradient() -> None:
    # 1 - p is lost when p is rounded to bf16 first; it must be taken away from it before that.
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((50, 32), generator=generator).bfloat16()
    labels = torch.arange(20)
    hidden = (weight[labels].float() * 0.6).bfloat16().requires_grad_()
    ours = supervised_loss(hidden, weight, labels)
    wide = hidden.detach().double().requires_grad_()
    theirs = reference(wide, weight.double(), labels)
    (mine,), (true,) = torch.autograd.grad(ours, hidden), torch.autograd.grad(theirs, wide)
    doubt = -torch.expm1(-cross_entropy(wide @ weight.double().T, labels, reduction="none"))
    sure = (doubt < 1e-2) & (doubt > 1e-5)  # below, upstream's fp32 has little left of it as well
    assert sure.sum() > 8
    assert torch.nn.functional.cosine_similarity(mine.double(), true, dim=1)[sure].min() > 0.99
    assert ours.item() == pytest.approx(theirs.item(), rel=0.1)  # bf16 logits


def test_fp16_keeps_small_gradients() -> None:
    case = random_case(16, 5000, 32, torch.float16, size=0.02)
    with torch.no_grad():  # all are sure of label 0, so that each other probability is about 2e-9
        case["hidden"][:, 0], case["weight"][0, 0], case["labels"] = 1.0, 20.0, torch.zeros(16, dtype=torch.int64)
    case["weight"].requires_grad_(False)
    case["bias"].requires_grad_(False)
    exact = {name: value.detach().double() if value.is_floating_point() else value for name, value in case.items()}
    exact["hidden"].requires_grad_()
    scale = 2.0**14
    (mine,) = gradients(supervised_loss(**case), case, factor=scale)
    (true,) = gradients(reference(**exact), exact, factor=scale)
    mine, true = mine[:, 1:], true[:, 1:]  # the first is that of label 0 alone
    assert torch.linalg.norm(mine - true) < 6e-2 * torch.linalg.norm(true)


def test_logits_of_any_size_are_finite() -> None:
    case = random_case(9, 33, 8, torch.float32, size=60.0)
    ours, theirs = supervised_loss(chunk_rows=4, **case), reference(**case)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(ours, case))
    case["hidden"].data[3, 0] = torch.nan
    assert torch.isnan(supervised_loss(chunk_rows=4, **case))


def test_same_inputs_give_the_same_bits_and_pieces_add_up() -> None:
    case = random_case(64, 300, 16, torch.float32)
    whole = gradients(supervised_loss(chunk_rows=7, **case), case)
    again = gradients(supervised_loss(chunk_rows=7, **case), case)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    total = [torch.zeros_like(gradient) for gradient in whole]
    for piece in (slice(0, 10), slice(10, 64)):
        part = case | {name: case[name][piece] for name in ("hidden", "labels", "row_weights")}
        found = gradients(supervised_loss(chunk_rows=7, **part), case)
        total = [one + other for one, other in zip(total, found, strict=True)]
    assert all(close(one, other, 1e-6) for one, other in zip(total, whole, strict=True))


def test_no_rows_have_no_loss_and_zero_gradients() -> None:
    case = random_case(0, 20, 8, torch.float32)
    loss = supervised_loss(**case)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(loss, case))
    assert [gradient.shape for gradient in gradients(supervised_loss(**case), case)] == [(0, 8), (20, 8), (20,)]


def test_a_trained_head_is_differentiated_once_and_says_so() -> None:
    case = random_case(4, 20, 8, torch.float32)
    loss = supervised_loss(**case)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("trains_head", [False, True])
def test_under_autocast_products_are_narrow_and_masters_stay_wide(trains_head: bool) -> None:
    case = random_case(40, 200, 32, torch.float32)
    case["weight"].requires_grad_(trains_head)
    case["bias"].requires_grad_(trains_head)
    narrow = {name: case[name].detach().bfloat16() for name in ("hidden", "weight", "bias")} | {
        name: case[name] for name in ("labels", "row_weights")
    }
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = supervised_loss(**case), reference(**case)
    assert ours.item() == supervised_loss(**narrow).item()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)
    for mine, true in zip(gradients(ours, case), gradients(theirs, case), strict=True):
        assert mine.dtype == torch.float32
        assert close(mine, true, 2e-2)


# ---------------------------------------------------------------------- counts


@contextmanager
def saved_bytes() -> Iterator[Callable[[], int]]:
    """Bytes of distinct storages that a graph keeps."""
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(storages.values())


@pytest.mark.parametrize(("trains_head", "products"), [(False, 2), (True, 3)])
@pytest.mark.parametrize("rows", [0, 1, 100])
def test_products_are_those_of_the_rows_and_none_is_made_twice(trains_head: bool, products: int, rows: int) -> None:
    case = random_case(rows, 300, 24, torch.bfloat16)
    case["weight"].requires_grad_(trains_head)
    with FlopCounterMode(display=False) as forward:
        loss = supervised_loss(case["hidden"], case["weight"], case["labels"], chunk_rows=33)
    with FlopCounterMode(display=False) as backward:
        loss.backward()  # type: ignore[no-untyped-call]
    assert forward.get_total_flops() == products * 2 * rows * 300 * 24
    assert backward.get_total_flops() == 0
    with torch.no_grad(), FlopCounterMode(display=False) as scoring:
        supervised_loss(case["hidden"], case["weight"], case["labels"], chunk_rows=33)
    assert scoring.get_total_flops() == 2 * rows * 300 * 24


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_vocabulary() -> None:
    kept = []
    for vocabulary in (50, 5000):
        case = random_case(60, vocabulary, 24, torch.bfloat16)
        with saved_bytes() as count:
            supervised_loss(case["hidden"], case["weight"].detach(), case["labels"])
        kept.append(count())
    assert kept == [60 * 24 * 2] * 2


class _Largest(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gives."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_logits_of_a_chunk_are_all_that_exists_at_once() -> None:
    case = random_case(200, 3000, 8, torch.bfloat16)
    with _Largest() as largest:
        supervised_loss(case["hidden"], case["weight"].detach(), case["labels"], chunk_rows=25)
    assert largest.numbers == 25 * 3000


# ---------------------------------------------------------------------- inside a model


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family_config(family, **({"vocab_size": 256} | changes))).to(dtype)
    with torch.no_grad():  # a bias of zeros would show nothing
        for name, parameter in model.named_parameters():
            if name.endswith("lm_head.bias"):
                parameter.copy_(torch.linspace(-1, 1, len(parameter)))
    return model


def other(family: str, **changes: Any) -> Any:
    """A tiny model of an architecture that is no preset's."""
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(keys | changes)))


def batch_of(vocabulary: int = 256, *, padded: bool = True) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (3, 17), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.4, ids, -100)
    if not padded:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, 11:] = mask[2, 5:] = 0
    return {"input_ids": ids, "labels": labels.where(mask.bool(), -100), "attention_mask": mask}


def step(model: Any, batch: dict[str, Any]) -> tuple[float, Tensors]:
    """Loss and gradients, from the same random state each time."""
    torch.manual_seed(3)
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


def agree(ours: tuple[float, Tensors], theirs: tuple[float, Tensors], tolerance: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=min(tolerance, 1e-4))
    assert list(ours[1]) == list(theirs[1])
    for name, true in theirs[1].items():
        assert torch.linalg.norm(ours[1][name] - true) <= tolerance * torch.linalg.norm(true) + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_every_family_learns_what_upstream_does(family: str, tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny(family, dtype, tie_word_embeddings=tied)
    batch = batch_of() | {"num_items_in_batch": 4}
    theirs = step(model, batch)
    before = model.state_dict()
    assert attach_loss(model, chunk_rows=4) is None
    assert list(model.state_dict()) == list(before)
    agree(step(model, batch), theirs, tolerance)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0}),
        ("gemma3_text", {"head_dim": 8}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("smollm3", {}),
        ("olmo", {}),
        ("olmo2", {}),
        ("gpt2", {}),
    ],
)
def test_scales_and_bounds_of_other_architectures_are_known(family: str, changes: dict[str, Any]) -> None:
    model, batch = other(family, **changes), batch_of()
    theirs = step(model, batch)
    assert attach_loss(model, chunk_rows=4) is None
    agree(step(model, batch), theirs, 2e-6)


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        ("mixtral", {}, "mixture of experts"),
        ("hyperclovax", {"logits_scaling": 2.0}, "where cross-entropy of its logits would be"),
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}, "does not call its decoder"),
        ("bert-generation", {}, "not a plain linear layer|other parts"),
    ],
)
def test_a_model_that_does_more_keeps_its_own_loss(family: str, changes: dict[str, Any], why: str) -> None:
    model = other(family, **changes)
    forward = model.forward
    reason = attach_loss(model, chunk_rows=4)
    assert reason is not None
    assert torch.tensor([word in reason for word in why.split("|")]).any()
    assert model.forward == forward
    assert attached_rows(model) is None


def test_a_model_that_reads_more_of_its_decoder_keeps_its_own_loss() -> None:
    class Nosy(type(tiny("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs).router_logits

    model = tiny("llama")
    model.__class__ = Nosy
    assert "not that of a decoder with a head" in str(attach_loss(model, chunk_rows=4))


def test_what_happens_in_training_mode_alone_is_found_out() -> None:
    model = tiny("llama")
    upstream = type(model).forward

    class Noisy(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            found = upstream(self, *args, **kwargs)
            found.loss = found.loss * (1.5 if self.training else 1.0)
            return found

    model.__class__ = Noisy
    assert "its loss is" in (attach_loss(model.eval(), chunk_rows=4) or "")


def test_the_proof_leaves_nothing_behind() -> None:
    model = tiny("llama")
    upstream = type(model).forward

    class Drawing(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            torch.rand(())
            return upstream(self, *args, **kwargs)

    model.__class__ = Drawing
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert attach_loss(model, chunk_rows=4) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in model.model.__dict__
    assert all(parameter.grad is None for parameter in model.parameters())


def lora(model: Any, targets: Any = "all-linear", **changes: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"r": 4, "target_modules": targets, "task_type": "CAUSAL_LM", "init_lora_weights": False} | changes
        return get_peft_model(model, LoraConfig(**settings))


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_what_they_did_and_logits_are_not_made(family: str) -> None:
    model = lora(tiny(family), lora_dropout=0.1)
    batch = batch_of() | {"num_items_in_batch": torch.tensor(4)}
    theirs = step(model, batch)
    assert attach_loss(model, chunk_rows=4) is None
    assert model(**batch).logits is None
    agree(step(model, batch), theirs, 2e-6)


def test_checkpointed_layers_learn_the_same() -> None:
    model = lora(tiny("llama"), lora_dropout=0.1)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    theirs = step(model, batch_of())
    assert attach_loss(model, chunk_rows=4) is None
    agree(step(model, batch_of()), theirs, 2e-6)


@pytest.mark.parametrize("changes", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_a_head_with_an_adapter_or_a_copy_keeps_its_own_loss(changes: dict[str, Any]) -> None:
    reason = attach_loss(lora(tiny("llama"), **changes), chunk_rows=4)
    assert reason is not None
    assert "not a plain linear layer" in reason


def test_only_supervised_rows_are_scored() -> None:
    model, batch = tiny("llama"), batch_of()
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)
    assert 0 < supervised < 20
    assert attach_loss(model, chunk_rows=4) is None
    with FlopCounterMode(display=False) as whole:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as decoder:
        model.model(batch["input_ids"], batch["attention_mask"])
    assert whole.get_total_flops() - decoder.get_total_flops() == 2 * 2 * supervised * 256 * 32
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert backward.get_total_flops() == 0
    with torch.no_grad(), FlopCounterMode(display=False) as scoring:
        model(**batch)
    assert scoring.get_total_flops() - decoder.get_total_flops() == 2 * supervised * 256 * 32


def test_a_batch_without_labels_to_learn_has_no_loss_and_still_reaches_all_parameters() -> None:
    model = tiny("llama")
    batch = batch_of() | {"num_items_in_batch": 1}
    batch["labels"] = torch.full_like(batch["labels"], -100)
    theirs = step(model, batch)
    assert attach_loss(model, chunk_rows=4) is None
    ours = step(model, batch)
    assert ours[0] == theirs[0] == 0.0
    assert list(ours[1]) == [name for name, _ in model.named_parameters()]
    assert all(not gradient.any() for gradient in ours[1].values())
    assert torch.isnan(model(**batch_of() | {"labels": batch["labels"]}).loss)  # a mean of nothing, as upstream's


def test_packed_rows_positions_named_by_the_caller_and_evaluation_score_the_same() -> None:
    model, batch = tiny("llama").eval(), batch_of(padded=False)
    flat = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    flat["labels"][0, ::17] = -100  # the first of a row is learned by nobody
    flat["position_ids"] = torch.arange(17).repeat(3)[None]
    flat["use_cache"] = False
    with torch.no_grad():
        expected = float(model(**flat).loss)
        assert attach_loss(model, chunk_rows=4) is None
        ours = model(**flat)
        positions = (flat["labels"][0, 1:] != -100).nonzero().squeeze(1)
        named = model(**flat, supervised_positions=positions)
    assert float(ours.loss) == pytest.approx(expected, rel=1e-6)
    assert torch.equal(named.loss, ours.loss)
    assert not ours.loss.requires_grad


def test_calls_without_labels_and_generation_are_served_as_before() -> None:
    model, batch = tiny("llama").eval(), batch_of(padded=False)
    ids = batch["input_ids"][:1]
    with torch.no_grad():
        logits, text = model(ids).logits, model.generate(ids, max_new_tokens=5, do_sample=False)
        assert attach_loss(model, chunk_rows=4) is None
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), text)
        assert model(ids, labels=ids).logits is None  # by position is by name
        assert model(ids, labels=ids, logits_to_keep=torch.arange(17)).logits is not None
        assert isinstance(model(ids, labels=ids, return_dict=False), tuple)


def test_somebody_who_watches_the_head_gets_to_see_it() -> None:
    model, batch, seen = tiny("llama"), batch_of(), []
    assert attach_loss(model, chunk_rows=4) is None
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    watched = model(**batch).loss
    handle.remove()
    assert seen == [(3, 17, 256)]
    assert watched.item() == pytest.approx(model(**batch).loss.item(), rel=1e-6)
    assert len(seen) == 1


def test_it_can_be_undone_and_done_again_and_copied() -> None:
    model = lora(tiny("llama"))
    causal = model.get_base_model()
    assert attach_loss(model, chunk_rows=4) is None
    assert attach_loss(model, chunk_rows=8) is None
    assert attached_rows(model) == attached_rows(causal) == 8
    twin = copy.deepcopy(model)
    assert twin.get_base_model().forward.__self__ is twin.get_base_model()
    detach_loss(model)
    detach_loss(model)
    assert "forward" not in causal.__dict__
    assert attached_rows(model) is None
    assert model(**batch_of()).logits is not None
    assert twin(**batch_of()).logits is None


def test_autocast_that_is_put_around_it_stays_there() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, batch = tiny("llama"), batch_of()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        theirs = step(accelerator.prepare_model(copy.deepcopy(model)), batch)
        assert attach_loss(model, chunk_rows=4) is None
        agree(step(accelerator.prepare_model(model), batch), theirs, 2e-2)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    around = model.forward
    assert attach_loss(model, chunk_rows=8) is None
    assert attached_rows(model) == 8
    agree(step(model, batch), theirs, 2e-2)
    detach_loss(model)
    assert model.forward == around  # still narrow products, of logits again
    assert model(**batch).logits.dtype == torch.float32
    assert step(model, batch)[0] == theirs[0]
    assert attach_loss(model, chunk_rows=2) is None
    assert model(**batch).logits is None


def test_a_forward_put_on_the_instance_by_another_is_not_passed_by() -> None:
    model = tiny("llama")
    upstream = model.forward
    model.forward = lambda *args, **kwargs: upstream(*args, **kwargs)
    assert attach_loss(model, chunk_rows=4) == "another forward has been put before its own"
    assert model(**batch_of()).logits is not None


def test_a_head_that_is_spread_or_emptied_keeps_its_own_forward() -> None:
    model, batch = tiny("llama"), batch_of()
    assert attach_loss(model, chunk_rows=4) is None

    class Spread(torch.nn.Parameter):
        pass

    model.lm_head.weight = Spread(model.lm_head.weight.detach())
    assert model(**batch).logits is not None
