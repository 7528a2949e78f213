"""RMSNorm in blocks of rows: transformers' numbers, less kept, transformers' own forward where it must be."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from factories import family_config
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from llmtune.kernels import attach_kernels, layers
from llmtune.kernels.layers import FEWEST_VALUES, RmsNorm, attach_layers, detach_layers
from llmtune.planning.memory import paths

EPS = 1e-5
# How many norms a layer of each family has.
NORMS = {"llama": 2, "mistral": 2, "qwen2": 2, "qwen3": 4, "phi3": 2, "phi": 0}


def norm_of(width, dtype=torch.float32, *, trained=False, kind=LlamaRMSNorm):
    norm = kind(width, eps=EPS).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm.requires_grad_(trained)


def drawn(*shape, dtype=torch.float32, seed=0):
    """Rows of very different sizes."""
    draws = torch.Generator().manual_seed(seed)
    sizes = 10 ** (4 * torch.rand((*shape[:-1], 1), generator=draws) - 3)
    return (torch.randn(shape, generator=draws) * sizes).to(dtype)


def passed(norm, x, dy):
    """Output, gradient of the input, gradient of the weight."""
    norm.zero_grad()
    x = x.detach().requires_grad_()
    y = norm(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, norm.weight.grad


def by_rows(one, other):
    """The largest distance of two rows, as a share of the other's length."""
    one, other = one.double(), other.double()
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp_min(1e-30)).max())


def rounded_once(x, weight):
    """The norm in fp32, as wide as the wider of both in the end."""
    wide = x.float()
    normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normal * weight.float()).to(torch.promote_types(x.dtype, weight.dtype))


def is_ours(y):
    return type(y.grad_fn).__name__ == "RmsNormBackward"


def model_of(family, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, hidden_size=64, **changes)).to(dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    model.config.use_cache = False
    return model.train()


def of_model(model, seed=3):
    """Loss, logits, and gradients by name, for more tokens than are left to transformers."""
    ids = torch.randint(3, 3000, (8, 160), generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 700, 96), (1, 128, 576), (2, 130, 9, 64)])
def test_numbers_are_those_of_transformers(shape, dtype, trained):
    norm = norm_of(shape[-1], dtype, trained=trained)
    x, dy = drawn(*shape, dtype=dtype), torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    theirs = passed(norm, x, dy)
    assert attach_layers(norm) == ()
    assert is_ours(norm(x.requires_grad_()))
    ours = passed(norm, x, dy)
    assert torch.equal(ours[0], rounded_once(x.detach(), norm.weight))
    # What transformers rounds twice is at most one step away.
    torch.testing.assert_close(ours[0], theirs[0], rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)
    assert by_rows(ours[1], theirs[1]) <= (2**-7 if dtype == torch.bfloat16 else 1e-6)
    assert ours[1].dtype == dtype
    assert (ours[2] is not None) == trained
    if trained:
        assert by_rows(ours[2], theirs[2]) <= (2**-6 if dtype == torch.bfloat16 else 1e-6)


def reference(x, weight, dy):
    """Gradients in fp64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * weight
    return torch.autograd.grad(y, (x, weight), dy.double())


@hypothesis_settings(max_examples=30)
@given(
    rows=st.integers(1, 40),
    width=st.integers(2, 70),
    values=st.integers(1, 400),
    wide=st.booleans(),
    mixed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_gradients_are_near_the_truth_however_rows_are_cut(rows, width, values, wide, mixed, seed):
    dtype = torch.float32 if wide else torch.bfloat16
    x, dy = drawn(rows, width, dtype=dtype, seed=seed), drawn(rows, width, seed=seed + 100)
    weight = drawn(1, width, seed=seed + 200)[0].to(torch.float32 if mixed else dtype)
    dy = dy.to(weight.dtype)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers, "BLOCK_VALUES", values)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = RmsNorm.apply(*leaves, EPS)
        ours = torch.autograd.grad(y, leaves, dy)
        again = torch.autograd.grad(RmsNorm.apply(*leaves, EPS), leaves, dy)
    assert all(torch.equal(one, other) for one, other in zip(ours, again, strict=True))
    norm = LlamaRMSNorm(width, eps=EPS)
    norm.weight = torch.nn.Parameter(weight)
    assert torch.equal(y, rounded_once(x, weight))
    torch.testing.assert_close(y, norm(x), rtol=0 if wide else 2**-7, atol=0)  # of the same dtype, too
    scale = (dy.double() * weight.double()).norm(dim=-1, keepdim=True)
    factor = torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + EPS)
    truth = reference(x, weight, dy)
    # Where nearly all of the gradient cancels, rounding is a share of what was there before it did.
    bound = (2**-8 if dtype == torch.bfloat16 else 2e-6) * scale * factor
    assert bool(((ours[0].double() - truth[0]).norm(dim=-1, keepdim=True) <= bound + 1e-30).all())
    bound = (dy.double() * x.double() * factor).abs().sum(0) * (2e-6 if weight.dtype == torch.float32 else 2**-8)
    assert bool(((ours[1].double() - truth[1]).abs() <= bound + 1e-30).all())


def test_a_gradient_that_lies_otherwise_in_memory_is_read_as_it_is():
    norm, x = norm_of(64, trained=True), drawn(2, 150, 9, 64)
    dy = torch.randn(2, 9, 150, 64, generator=torch.Generator().manual_seed(2))

    def turned():
        norm.zero_grad()
        leaf = x.clone().requires_grad_()
        norm(leaf.transpose(1, 2).transpose(1, 2)).transpose(1, 2).backward(dy)
        return leaf.grad, norm.weight.grad

    theirs = turned()
    attach_layers(norm)
    assert all(by_rows(one, other) <= 1e-6 for one, other in zip(turned(), theirs, strict=True))
    across = drawn(1, 64, 1200).transpose(1, 2)  # rows whose values lie far apart
    expected = type(norm).forward(norm, across)
    torch.testing.assert_close(norm(across.requires_grad_()), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", [family for family in NORMS if NORMS[family]])
def test_a_model_is_as_transformers_computes_it(family):
    model = model_of(family)
    theirs = of_model(model)
    assert attach_layers(model) == ()
    ours = of_model(model)
    assert torch.equal(ours[0], theirs[0])
    for name, gradient in theirs[1].items():
        assert by_rows(ours[1][name].flatten()[None], gradient.flatten()[None]) <= 3e-6, name
    again = of_model(model)
    model.activation_checkpointing_enable(every_n_layers=1)
    recomputed = of_model(model)
    for other in (again, recomputed):
        assert all(torch.equal(gradient, other[1][name]) for name, gradient in ours[1].items())
    assert detach_layers(model) == 2 * NORMS[family] + 1
    assert torch.equal(of_model(model)[1]["model.norm.weight"], theirs[1]["model.norm.weight"])


def test_under_autocast_types_are_those_of_transformers():
    model = model_of("qwen3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = of_model(model)
        attach_layers(model)
        ours = of_model(model)
    assert by_rows(ours[0], theirs[0]) <= 2**-6
    assert ours[0].dtype == theirs[0].dtype
    for name, gradient in theirs[1].items():
        assert ours[1][name].dtype == torch.float32
        assert by_rows(ours[1][name].flatten()[None], gradient.flatten()[None]) <= 2**-6, name


# ------------------------------------------------------------------ what is kept


@pytest.mark.parametrize(
    ("dtype", "trained", "theirs", "ours"),
    [
        (torch.bfloat16, False, 4, 2),
        (torch.bfloat16, True, 6, 2),
        (torch.float32, False, 4, 4),
        (torch.float32, True, 8, 4),
    ],
)
def test_bytes_kept_per_value(dtype, trained, theirs, ours):
    width, rows = 64, 2048
    norm, x = norm_of(width, dtype, trained=trained), drawn(rows, width, dtype=dtype).requires_grad_()

    def kept():
        storages: dict[int, int] = {}

        def keep(tensor):
            if tensor.data_ptr() != norm.weight.data_ptr():
                storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = norm(x)  # alive, so that no memory is used twice
        assert y.shape == x.shape
        return sum(storages.values())

    assert kept() == theirs * rows * width + 4 * rows
    attach_layers(norm)
    assert kept() == ours * rows * width + 4 * rows


def test_plans_count_with_the_numbers_of_the_kernel():
    assert paths.BLOCK_VALUES == layers.BLOCK_VALUES
    assert paths.FEWEST_VALUES == layers.FEWEST_VALUES


# ------------------------------------------------------------------ who is attached, and when


@pytest.mark.parametrize("family", NORMS)
def test_norms_of_every_family_are_attached(family):
    model = model_of(family)
    names = list(model.state_dict())
    assert attach_layers(model) == attach_layers(model) == ()
    assert list(model.state_dict()) == names
    assert detach_layers(model) == (2 * NORMS[family] + 1 if NORMS[family] else 0)
    assert detach_layers(model) == 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_attaching_kernels_attaches_norms():
    model = model_of("llama")
    assert attach_kernels(model, device="cpu") == ()
    assert detach_layers(model) == 5


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Gemma2RMSNorm, "computes something else"),  # times 1 + weight
        (type("GatedRMSNorm", (LlamaRMSNorm,), {"forward": lambda self, x, gate: x * gate}), "no plain RMSNorm"),
        (type("PairRMSNorm", (LlamaRMSNorm,), {"forward": lambda self, x: (x, x)}), "computes something else"),
    ],
)
def test_what_is_no_plain_norm_is_left_and_named(kind, why):
    norm = norm_of(64, kind=kind)
    (sentence,) = attach_layers(torch.nn.ModuleList([norm, copy.deepcopy(norm)]))
    assert sentence.startswith(f"2 layers: {kind.__name__} ")
    assert why in sentence
    assert "forward" not in vars(norm)


def test_a_norm_that_upstream_rounds_once_is_the_same_to_the_bit():
    norm = norm_of(64, torch.bfloat16, kind=Olmo2RMSNorm)  # multiplied before it is rounded
    x = drawn(2048, 64, dtype=torch.bfloat16)
    theirs = norm(x)
    assert attach_layers(norm) == ()
    ours = norm(x)
    assert "forward" in vars(norm)
    assert torch.equal(ours, theirs)


def test_a_norm_with_more_than_a_weight_or_another_forward_is_left():
    with_bias = norm_of(64)
    with_bias.bias = torch.nn.Parameter(torch.zeros(64))
    assert "other parts than a weight and an epsilon" in attach_layers(with_bias)[0]
    wrapped = norm_of(64)
    wrapped.forward = lambda x: x
    assert "forward of another library" in attach_layers(wrapped)[0]
    assert detach_layers(wrapped) == 0
    assert "forward" in vars(wrapped)
    assert attach_layers(torch.nn.RMSNorm(64)) != ()  # whose epsilon is not given
    assert attach_layers(torch.nn.LayerNorm(64)) == ()


def test_attaching_draws_nothing_and_changes_nothing():
    norm = norm_of(64, trained=True).train()
    before, state = norm.weight.clone(), torch.get_rng_state()
    attach_layers(norm)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(norm.weight, before)
    assert isinstance(norm.weight, torch.nn.Parameter)
    assert norm.weight.requires_grad
    assert norm.training


@pytest.mark.parametrize("how", ["few", "fp16", "argument", "fp64", "subclass"])
def test_other_calls_go_to_the_modules_own_forward(how):
    norm = norm_of(64)
    attach_layers(norm)
    rows = FEWEST_VALUES // 64
    x = drawn(rows - (how == "few"), 64).requires_grad_()
    if how in ("fp16", "fp64"):
        x = x.detach().to(torch.float16 if how == "fp16" else torch.float64).requires_grad_()
        norm.to(x.dtype)
    if how == "subclass":
        x = x.detach().as_subclass(type("Own", (torch.Tensor,), {}))
    y = norm(hidden_states=x) if how == "argument" else norm(x)
    assert torch.equal(y, type(norm).forward(norm, x))
    assert not is_ours(y)


def test_values_decide_and_evaluation_takes_the_same_path():
    norm, x = norm_of(64), drawn(FEWEST_VALUES // 64, 64).requires_grad_()
    attach_layers(norm)
    expected = norm(x)
    assert is_ours(expected)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)
    with torch.inference_mode():
        assert torch.equal(norm(x), expected)


def test_tensors_without_values_pass():
    from torch._subclasses.fake_tensor import FakeTensorMode

    norm = norm_of(64)
    attach_layers(norm)
    meta = copy.deepcopy(norm).to("meta")
    y = meta(torch.empty(2, 1024, 64, device="meta", requires_grad=True))
    y.sum().backward()
    assert y.shape == (2, 1024, 64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = norm(torch.empty(2, 1024, 64, requires_grad=True))
        assert y.shape == (2, 1024, 64)
        assert not is_ours(y)
    fresh = norm_of(64).to("meta")
    assert attach_layers(fresh) == ()  # the proof has weights of its own


def test_a_compiled_graph_has_the_modules_own_forward():
    norm, x = norm_of(64), drawn(FEWEST_VALUES // 64, 64)
    expected = norm(x)
    attach_layers(norm)
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    assert torch.equal(torch.compile(norm, backend=note, fullgraph=True)(x), expected)
    (graph,) = graphs
    assert "rsqrt" in graph.code


def test_hooks_of_a_norm_are_called():
    norm, x = norm_of(64), drawn(FEWEST_VALUES // 64, 64).requires_grad_()
    attach_layers(norm)
    seen = []
    norm.register_forward_hook(lambda module, args, output: seen.append(output))
    assert norm(x) is seen[0]
    assert is_ours(seen[0])


def test_copies_have_a_forward_of_their_own():
    model, x = torch.nn.ModuleList([norm_of(64, trained=True)]), drawn(FEWEST_VALUES // 64, 64)
    attach_layers(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin[0](x), model[0](x))
        torch.nn.init.ones_(twin[0].weight)
        y = twin[0](x)
        y.sum().backward()
        assert is_ours(y)
        assert twin[0].weight.grad is not None
        assert model[0].weight.grad is None
        assert detach_layers(twin) == 1
    assert detach_layers(model) == 1


def test_a_traced_model_knows_which_norms_are_plain():
    from llmtune.models.trace import is_plain_norm, trace_activations

    config = family_config("qwen3", hidden_size=64, num_attention_heads=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    traced = trace_activations(model)
    assert traced is not None
    # Two norms of the stream, four heads of 16 and two of keys; the last norm is outside.
    assert {stage.normed for stage in traced.layer.values()} == {64 + 64 + 64 + 32}
    assert {stage.normed for stage in traced.outside.values()} == {64}
    # Those that upstream rounds once are taken too, and reckoned at what upstream keeps, which is more.
    known = {LlamaRMSNorm: (True, True), Gemma2RMSNorm: (False, False)} | dict.fromkeys(
        (Olmo2RMSNorm, torch.nn.RMSNorm), (False, True)
    )
    for kind, (plain, taken) in known.items():
        norm = kind(64, eps=EPS)
        assert (is_plain_norm(norm), attach_layers(norm) == ()) == (plain, taken)
