"""LoRA in the base's precision: PEFT's numbers, nothing stale, nothing kept without need, PEFT where it must be."""

from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llmtune.config import ModelConfig
from llmtune.kernels.adapters import FEWEST_ROWS, attach_adapters, detach_adapters, draw_mask, kept_share
from llmtune.kernels.masters import MasterCopy
from llmtune.models import load_for_training, locate

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "phi": ("q_proj", "fc1"),
    "qwen2": ("q_proj", "down_proj"),
}
BF16 = 2.0**-8


@pytest.fixture
def adapted(family_model):
    """``adapted(family)``: a model as a run loads it, with adapters that do something."""

    def load(family, *, precision="fp32", dropout=0.0, targets=("all-linear",), quantization=None):
        torch.manual_seed(0)
        model = load_for_training(
            locate(ModelConfig(id=str(family_model(family)))),
            precision=precision,
            method="lora" if quantization is None else "qlora",
            quantization=quantization,
            rank=4,
            alpha=6,
            dropout=dropout,
            targets=targets,
            device="cpu",
        )
        give_values(model)
        model.config.use_cache = False
        return model.train()

    return load


def give_values(model):
    """B starts at zero, so that an adapter that is forgotten would not be noticed."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)


def batch(rows=8, width=20, seed=1):
    return torch.randint(3, 3000, (rows, width), generator=torch.Generator().manual_seed(seed))


def passed(model, ids, seed=7, *, scale=1.0):
    """Logits, and the gradients of everything that is trained."""
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(input_ids=ids, labels=ids)
    (output.loss * scale).backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def distance(one, other):
    """How far apart, as a share of ``other``."""
    one, other = one.detach().double(), other.detach().double()
    return float((one - other).norm() / other.norm())


def cosine(one, other):
    return float(torch.nn.functional.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def identical(one, other):
    return torch.equal(one[0], other[0]) and all(torch.equal(g, other[1][n]) for n, g in one[1].items())


def pair(dtype=torch.float32, *, bias=False, sizes=(24, 40), rank=4, wrapped=torch.nn.Linear, **lora):
    """A model of one layer with PEFT's own arithmetic, and a copy of it with ours."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("layer", wrapped(*sizes, bias=bias))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["layer"], **lora)
    theirs = get_peft_model(model.to(dtype), config, autocast_adapter_dtype=False)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    give_values(theirs)
    ours = copy.deepcopy(theirs)
    attach_adapters(ours)
    return theirs, ours


def layer_of(model):
    return model.base_model.model.layer


def backward(model, x, dy, seed=3):
    """Output, gradient of the input, gradients of what is trained by name."""
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy.to(y.dtype))
    return y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("targets", ["all", "two"])
@pytest.mark.parametrize("family", TARGETS)
def test_fp32_is_as_peft_computes_it(adapted, family, targets):
    targets = ("all-linear",) if targets == "all" else TARGETS[family]
    model, ids = adapted(family, targets=targets), batch()
    theirs = passed(model, ids)
    facts = attach_adapters(model)
    ours = passed(model, ids)
    adapters = sum("lora_A" in name for name in theirs[1])
    assert (facts.num_attached, facts.num_left, facts.reasons) == (adapters, 0, ())
    assert distance(ours[0], theirs[0]) < 1e-6
    # Roundings of two layers and a head; of one layer see below.
    assert max(distance(ours[1][name], gradient) for name, gradient in theirs[1].items()) < 3e-6
    assert not identical(ours, theirs)  # it is another computation


@pytest.mark.parametrize("family", TARGETS)
def test_bf16_is_as_near_to_fp32_as_peft_is(adapted, family):
    """Both round; what counts is how far each is from the same weights in fp32."""
    model, ids = adapted(family, precision="bf16"), batch()
    exact = passed(copy.deepcopy(model).float(), ids)
    theirs = passed(model, ids)
    attach_adapters(model)
    ours = passed(model, ids)
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())
    assert distance(ours[0], exact[0]) < 1.5 * distance(theirs[0], exact[0])
    together = [torch.cat([g[1][n].flatten() for n in exact[1]]) for g in (ours, theirs, exact)]
    assert cosine(together[0], together[2]) > 0.999
    assert distance(together[0], together[2]) < 1.5 * distance(together[1], together[2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_gradients_of_a_bf16_layer_point_where_those_of_fp32_do(bias, p):
    _, ours = pair(torch.bfloat16, bias=bias, lora_dropout=p, sizes=(96, 160))
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 64, 96, generator=generator).bfloat16()
    dy = torch.randn(4, 64, 160, generator=generator).bfloat16()
    exact = copy.deepcopy(ours).float()
    expected, found = backward(exact, x.float(), dy.float()), backward(ours, x, dy)
    assert distance(found[0], expected[0]) < BF16
    assert distance(found[1], expected[1]) < BF16
    for name, gradient in expected[2].items():
        assert found[2][name].dtype == torch.float32
        assert cosine(found[2][name], gradient) >= 0.9999


@given(
    leading=st.lists(st.integers(1, 5), max_size=3),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 9),
    bias=st.booleans(),
)
@hypothesis_settings(max_examples=30, deadline=None)
def test_every_shape_is_as_peft_computes_it(leading, sizes, rank, bias):
    theirs, ours = pair(bias=bias, sizes=sizes, rank=rank)
    x, dy = torch.randn(*leading, sizes[0]), torch.randn(*leading, sizes[1])
    expected, found = backward(theirs, x, dy), backward(ours, x, dy)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_a_transposed_input_and_gradient_are_read_as_they_lie():
    theirs, ours = pair()
    x, dy = torch.randn(24, 7, 3).permute(2, 1, 0), torch.randn(40, 7, 3).permute(2, 1, 0)
    expected, found = backward(theirs, x, dy), backward(ours, x, dy)
    assert max(distance(found[i], expected[i]) for i in (0, 1)) < 1e-6
    assert max(distance(found[2][name], gradient) for name, gradient in expected[2].items()) < 1e-6


def test_an_input_without_gradient_gets_none():
    theirs, ours = pair()
    x = torch.randn(5, 24)
    for model in (theirs, ours):
        model.zero_grad()
        model(x).square().sum().backward()
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert distance(parameter.grad, dict(theirs.named_parameters())[name].grad) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_lay_in_memory_before_does_not_matter(dtype, monkeypatch):
    _, model = pair(dtype)
    x, dy = torch.randn(FEWEST_ROWS, 24).to(dtype), torch.randn(FEWEST_ROWS, 40).to(dtype)
    expected = backward(model, x, dy)
    dirty = []
    monkeypatch.setattr(torch, "empty_like", lambda t: dirty.append(1) or torch.full_like(t, math.nan))
    found = backward(model, x, dy)
    assert dirty
    assert torch.equal(found[1], expected[1])


def test_same_seed_same_bits(adapted):
    model, ids = adapted("llama", precision="bf16", dropout=0.1), batch()
    attach_adapters(model)
    assert identical(passed(model, ids), passed(model, ids))
    assert not identical(passed(model, ids), passed(model, ids, seed=8))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_gives_the_same_bits(adapted, precision):
    model, ids = adapted("llama", precision=precision, dropout=0.1), batch()
    attach_adapters(model)
    kept = passed(model, ids)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert identical(passed(model, ids), kept)


def test_smaller_pieces_add_up(adapted):
    model, ids = adapted("qwen2"), batch(rows=4)
    attach_adapters(model)
    _, whole = passed(model, ids)
    parts = [passed(model, piece, scale=len(piece) / len(ids))[1] for piece in (ids[:1], ids[1:2], ids[2:])]
    for name, gradient in whole.items():
        assert distance(sum(part[name] for part in parts), gradient) < 2e-6


# ------------------------------------------------------------------ dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_zeroes_values_of_the_input_and_scales_the_rest(dtype):
    """The mask is drawn first; the rest is the textbook's formula, differentiated by autograd."""
    _, model = pair(dtype, lora_dropout=0.25)
    layer, x, dy = layer_of(model), torch.randn(2, 70, 24).to(dtype), torch.randn(2, 70, 40).to(dtype)
    found = backward(model, x, dy)
    torch.manual_seed(3)
    mask = draw_mask(x, 0.75)
    exact = x.double().requires_grad_()
    a, b = (m["default"].weight.detach().to(dtype).double().requires_grad_() for m in (layer.lora_A, layer.lora_B))
    y = exact @ layer.base_layer.weight.double().t() + 2 * ((exact * mask / 0.75) @ a.t()) @ b.t()
    y.backward(dy.double())
    near = 1e-6 if dtype == torch.float32 else 2 * BF16
    gradients = list(found[2].values())
    pairs = [(found[0], y), (found[1], exact.grad), (gradients[0], a.grad), (gradients[1], b.grad)]
    assert max(distance(one, other) for one, other in pairs) < near


@given(p=st.floats(0.001, 0.95), shape=st.tuples(st.integers(1, 90), st.integers(1, 90)), seed=st.integers(0, 2**31))
@hypothesis_settings(max_examples=60, deadline=None)
def test_as_many_are_kept_as_is_said(p, shape, seed):
    x = torch.empty(*shape)
    torch.manual_seed(seed)
    kept = kept_share(p, x)
    assert abs(kept - (1 - p)) <= 2**-17
    drawn = torch.stack([draw_mask(x, kept) for _ in range(40)])
    count = drawn.numel()
    deviation = math.sqrt(kept * (1 - kept) * count)
    assert abs(int(drawn.sum()) - kept * count) < 6 * deviation + 1  # one in 10⁹ by chance


def test_masks_are_independent_of_each_other_and_of_the_place():
    torch.manual_seed(0)
    x = torch.empty(500, 40)
    one, other = draw_mask(x, 0.5).double() - 0.5, draw_mask(x, 0.5).double() - 0.5
    sigma = 0.25 / math.sqrt(x.numel())
    assert abs(float((one * other).mean())) < 5 * sigma
    for lag in (1, 2, 3, 4, 40):
        flat = one.flatten()
        assert abs(float((flat[lag:] * flat[:-lag]).mean())) < 5 * sigma
    assert float((one.mean(0)).abs().max()) < 5 * 0.5 / math.sqrt(500)


def test_dropout_is_off_where_the_model_is_evaluated(adapted):
    model, ids = adapted("llama", dropout=0.5), batch()
    model.eval()
    expected = model(input_ids=ids).logits
    attach_adapters(model)
    state = torch.get_rng_state()
    assert distance(model(input_ids=ids).logits, expected) < 1e-6
    assert torch.equal(torch.get_rng_state(), state)


def test_what_dropout_draws_comes_from_the_global_state_alone(adapted):
    model, ids = adapted("llama", dropout=0.3), batch()
    attach_adapters(model)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = model(input_ids=ids).logits
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(model(input_ids=ids).logits, first)


# ------------------------------------------------------------------ copies of the masters


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
}


class PastAutograd(torch.optim.Optimizer):
    """Writes into memory as compiled optimizers do: torch counts no version."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.detach().numpy()[:] += 0.5


def step(kind):
    def change(parameter):
        parameter.grad = torch.ones_like(parameter)
        (PastAutograd([parameter]) if kind == "past" else OPTIMIZERS[kind]([parameter])).step()

    return change


def without_gradient(write):
    def change(parameter):
        with torch.no_grad():
            write(parameter)

    return change


def replace_storage(parameter):
    parameter.data = parameter.data + 0.5


def replace_twice(parameter):
    """The second storage may get the address that the first one had."""
    parameter.data = torch.full_like(parameter, 0.25)
    parameter.data = torch.full_like(parameter, 1.25 + float(parameter.detach().sum().abs()))


def load_state(parameter):
    module = torch.nn.Module()
    module.weight = parameter
    module.load_state_dict({"weight": parameter.detach() + 0.5})


CHANGES = {
    **{kind: step(kind) for kind in (*OPTIMIZERS, "past")},
    "add_": without_gradient(lambda p: p.add_(0.5)),
    "copy_": without_gradient(lambda p: p.copy_(p + 0.5)),
    "detached": lambda p: p.detach().mul_(1.5).add_(0.1),
    "part": without_gradient(lambda p: p[0].fill_(3.0)),
    "init": lambda p: torch.nn.init.normal_(p),
    "storage": replace_storage,
    "twice": replace_twice,
    "load_state_dict": load_state,
}


@given(changes=st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_no_change_of_a_master_is_missed(changes):
    torch.manual_seed(0)
    master, copied = torch.nn.Parameter(torch.randn(3, 5)), MasterCopy()
    for change in changes:
        before = copied.of(master, torch.bfloat16)
        content = before.clone()
        assert copied.of(master, torch.bfloat16) is before  # cast once
        CHANGES[change](master)
        after = copied.of(master, torch.bfloat16)
        assert torch.equal(after, master.detach().bfloat16())
        assert torch.equal(before, content)  # what a backward pass may still need stays as it was


@pytest.mark.parametrize("change", CHANGES)
def test_no_change_is_missed_by_a_layer(change):
    _, model = pair(torch.bfloat16)
    x = torch.randn(FEWEST_ROWS, 24).bfloat16()
    before = model(x)
    master = layer_of(model).lora_B["default"].weight
    CHANGES[change](master)
    after = model(x)
    fresh = copy.deepcopy(model)  # has cast nothing yet
    assert torch.equal(fresh(x), after)
    assert not torch.equal(before, after)


def test_another_dtype_or_shape_is_another_copy():
    master, copied = torch.nn.Parameter(torch.randn(4, 6)), MasterCopy()
    assert copied.of(master, torch.float32).data_ptr() == master.data_ptr()  # nothing to cast
    assert copied.of(master, torch.bfloat16).dtype == torch.bfloat16
    assert copied.of(master, torch.float16).dtype == torch.float16
    copied.of(master, torch.bfloat16)
    master.data = master.data.view(6, 4)
    assert torch.equal(copied.of(master, torch.bfloat16), master.detach().bfloat16())


def test_evaluation_sees_what_autograd_does_not():
    master, copied = torch.nn.Parameter(torch.randn(4, 6)), MasterCopy()
    copied.of(master, torch.bfloat16)
    master.data.add_(1)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            assert torch.equal(copied.of(master, torch.bfloat16), master.bfloat16())


def test_a_backward_pass_uses_the_values_of_its_forward_pass():
    _, model = pair(torch.bfloat16)
    x, dy = torch.randn(FEWEST_ROWS, 24).bfloat16(), torch.randn(FEWEST_ROWS, 40).bfloat16()
    expected = backward(model, x, dy)[1]
    x = x.requires_grad_()
    y = model(x)
    without_gradient(lambda p: p.add_(1))(layer_of(model).lora_B["default"].weight)
    model(x.detach())  # casts anew
    y.backward(dy)
    assert torch.equal(x.grad, expected)


def test_a_run_of_updates_is_that_of_peft(adapted):
    model, ids = adapted("llama"), batch()
    ours = copy.deepcopy(model)
    attach_adapters(ours)
    for each in (model, ours):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.05)
        for _ in range(4):
            passed(each, ids)
            optimizer.step()
    expected = dict(model.named_parameters())
    assert all(distance(p, expected[n]) < 1e-5 for n, p in ours.named_parameters())


# ------------------------------------------------------------------ what is kept and what is computed


@contextlib.contextmanager
def saving():
    """Storages that autograd keeps inside this block, by address: their bytes."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_only_the_input_the_low_rank_product_and_a_mask_are_kept(p):
    from peft import LoraConfig, get_peft_model

    rows, rank = 160, 4
    model = torch.nn.ModuleDict({name: torch.nn.Linear(32, 40, bias=False) for name in ("q", "k", "v")})
    names = list(model)
    lora = LoraConfig(r=rank, lora_dropout=p, target_modules=names)
    model = get_peft_model(model.to(torch.bfloat16), lora, autocast_adapter_dtype=True)
    attach_adapters(model)
    layers = [model.base_model.model[name] for name in names]
    x = torch.randn(rows, 32).bfloat16().requires_grad_()
    with saving() as kept:
        outputs = [layer(x) for layer in layers]
    standing = {w.untyped_storage().data_ptr() for layer in layers for w in copies_and_weights(layer)}
    kept = {address: nbytes for address, (nbytes, _) in kept.items() if address not in standing}
    assert kept.pop(x.untyped_storage().data_ptr()) == rows * 32 * 2  # once for all three
    expected = [rows * rank * 2] * 3 + ([rows * 32] * 3 if p else [])
    assert sorted(kept.values()) == sorted(expected)
    del outputs


def copies_and_weights(layer):
    name = "default"
    a, b = vars(layer)["_adapter_copies"][name]
    masters = layer.lora_A[name].weight, layer.lora_B[name].weight
    return [layer.base_layer.weight, *(c.of(m, torch.bfloat16) for c, m in zip((a, b), masters, strict=True))]


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_no_product_is_computed_twice(p):
    rows, (width, out), rank = 160, (24, 40), 4
    _, model = pair(torch.bfloat16, lora_dropout=p)
    x = torch.randn(rows, width).bfloat16().requires_grad_()
    base, low = 2 * rows * width * out, 2 * rows * rank * (width + out)
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    assert forward.get_total_flops() == base + low
    with FlopCounterMode(display=False) as both:
        y.sum().backward()
    assert both.get_total_flops() == base + 2 * low  # of the base's weight there is no gradient


# ------------------------------------------------------------------ PEFT where it must be


def two_adapters(model):
    from peft import LoraConfig

    model.add_adapter("other", LoraConfig(r=2, target_modules=["layer"], lora_alpha=3))
    give_values(model)


def half_masters(model):
    for part in (layer_of(model).lora_A, layer_of(model).lora_B):
        part.to(torch.bfloat16)


SITUATIONS = {
    "disabled": lambda m: layer_of(m).enable_adapters(False),
    "merged": lambda m: m.merge_adapter(),
    "several": lambda m: (two_adapters(m), m.base_model.set_adapter(["default", "other"])),
    "weight trained": lambda m: layer_of(m).base_layer.weight.requires_grad_(True),
    "bias trained": lambda m: layer_of(m).base_layer.bias.requires_grad_(True),
    "no cast": lambda m: setattr(layer_of(m), "cast_input_dtype_enabled", False),
    "fp16": lambda m: None,
    "half masters": half_masters,
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_is_not_covered_is_left_to_peft(situation):
    dtype = {"half masters": torch.bfloat16, "fp16": torch.float16}.get(situation, torch.float32)
    theirs, ours = pair(dtype, bias=True)
    torch.manual_seed(2)
    SITUATIONS[situation](theirs)
    torch.manual_seed(2)
    SITUATIONS[situation](ours)
    x, dy = torch.randn(FEWEST_ROWS, 24).to(dtype), torch.randn(FEWEST_ROWS, 40).to(dtype)
    with FlopCounterMode(display=False) as expected_flops:
        expected = backward(theirs, x, dy)
    with FlopCounterMode(display=False) as flops:
        found = backward(ours, x, dy)
    assert flops.get_total_flops() == expected_flops.get_total_flops()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    for name, gradient in expected[2].items():
        assert (found[2][name] is None) if gradient is None else torch.equal(found[2][name], gradient)


def test_who_listens_inside_a_layer_hears_what_is_there(adapted):
    """As a diagnosis does, which looks for the first module whose output is not finite."""
    model, ids = adapted("llama", precision="bf16"), batch()
    expected = passed(model, ids)
    attach_adapters(model)
    ours = passed(model, ids)
    heard = set()
    hooks = [m.register_forward_hook(lambda *_, name=n: heard.add(name)) for n, m in model.named_modules()]
    assert identical(passed(model, ids), expected)
    assert sum("lora_A.default" in name for name in heard) == sum("base_layer" in name for name in heard) == 14
    for hook in hooks:
        hook.remove()
    assert identical(passed(model, ids), ours)
    assert not identical(ours, expected)


def test_unmerged_enabled_and_switched_back_it_is_ours_again():
    _, model = pair()
    x = torch.randn(5, 24)
    expected = model(x)
    with model.disable_adapter():
        assert distance(model(x), expected) > 0.01
    model.merge_adapter()
    assert distance(model(x), expected) < 1e-6
    model.unmerge_adapter()
    assert distance(model(x), expected) < 1e-6
    two_adapters(model)
    expected = model(x)
    model.set_adapter("other")
    switched = model(x)
    assert distance(switched, expected) > 0.01
    detach_adapters(model)
    assert distance(model(x), switched) < 1e-6
    model.set_adapter("default")
    assert distance(model(x), expected) < 1e-6


@pytest.mark.parametrize(("rows", "peft"), [(FEWEST_ROWS - 1, True), (FEWEST_ROWS, False)])
def test_few_rows_in_bf16_are_left_to_peft(rows, peft):
    theirs, ours = pair(torch.bfloat16, sizes=(64, 96), rank=16)
    x, dy = torch.randn(rows, 64).bfloat16(), torch.randn(rows, 96).bfloat16()
    expected, found = backward(theirs, x, dy), backward(ours, x, dy)
    assert torch.equal(found[1], expected[1]) is peft
    assert distance(found[1], expected[1]) < BF16


def test_rows_with_adapters_of_their_own_are_left_to_peft():
    theirs, ours = pair()
    theirs.eval()
    ours.eval()
    x = torch.randn(3, 24)
    names = ["default", "__base__", "default"]
    assert torch.equal(layer_of(ours)(x, adapter_names=names), layer_of(theirs)(x, adapter_names=names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_peft_has_it(dtype):
    theirs, ours = pair(dtype)
    x, dy = torch.randn(FEWEST_ROWS, 24).to(dtype), torch.randn(FEWEST_ROWS, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = backward(theirs, x, dy), backward(ours, x, dy)
    assert found[0].dtype == expected[0].dtype == torch.bfloat16
    if dtype == torch.float32:  # autocast would cast what we would not
        assert torch.equal(found[0], expected[0])
    assert distance(found[0], expected[0]) < BF16
    assert all(cosine(found[2][name], gradient) > 0.9999 for name, gradient in expected[2].items())


@pytest.mark.parametrize(
    ("lora", "said"),
    [({"use_dora": True}, "Dora"), ({"lora_bias": True}, "bias"), ({"use_rslora": True}, None)],
    ids=["dora", "bias", "rslora"],
)
def test_variants_are_left_to_peft(lora, said):
    theirs, ours = pair(bias=True, **lora)
    facts = attach_adapters(ours)
    assert (facts.num_attached, facts.num_left) == ((1, 0) if said is None else (0, 1))
    assert said is None or (said in facts.reasons[0] and facts.reasons[0].startswith("1 layer: "))
    x, dy = torch.randn(5, 24), torch.randn(5, 40)
    assert distance(backward(ours, x, dy)[0], backward(theirs, x, dy)[0]) < 1e-6


def test_embeddings_and_other_layers_are_left_to_peft():
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.ModuleDict({"e": torch.nn.Embedding(9, 8), "c": Conv1D(8, 8), "l": torch.nn.Linear(8, 8)})
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["e", "c", "l"]))
    facts = attach_adapters(model)
    assert (facts.num_attached, facts.num_left) == (1, 2)
    assert sorted(reason.split(": ")[1] for reason in facts.reasons) == [
        "an adapter of kind Embedding is computed by PEFT",
        "an adapter on Conv1D is computed by PEFT",
    ]


def test_a_model_without_adapters_has_nothing_to_attach_to():
    facts = attach_adapters(torch.nn.Linear(3, 4))
    assert (facts.num_attached, facts.num_left, facts.reasons) == (0, 0, ())


# ------------------------------------------------------------------ on the model as a whole


def test_names_copies_and_saving_stay_those_of_peft(adapted, tmp_path, family_model):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, ids = adapted("llama", precision="bf16"), batch()
    names = set(model.state_dict())
    attach_adapters(model)
    assert attach_adapters(model).num_attached == 14  # again is the same as once
    assert set(model.state_dict()) == names
    model.eval()
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)
    base = AutoModelForCausalLM.from_pretrained(family_model("llama"), dtype=torch.bfloat16)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    assert distance(stock(input_ids=ids).logits, expected) < 4 * BF16
    attach_adapters(stock)
    assert torch.equal(stock(input_ids=ids).logits, expected)


def test_a_copy_of_a_model_has_arithmetic_of_its_own():
    _, model = pair(torch.bfloat16)
    x = torch.randn(FEWEST_ROWS, 24).bfloat16()
    expected = model(x)
    other = copy.deepcopy(model)
    without_gradient(lambda p: p.zero_())(layer_of(other).lora_B["default"].weight)
    assert torch.equal(other(x), layer_of(other).base_layer(x))
    assert torch.equal(model(x), expected)


def test_detached_it_is_peft_again(adapted):
    model, ids = adapted("phi"), batch()
    expected = passed(model, ids)
    attach_adapters(model)
    attached = {name for module in model.modules() for name in vars(module)}
    assert detach_adapters(model) == len(expected[1]) // 2
    assert identical(passed(model, ids), expected)
    assert "_adapter_copies" in attached - {name for module in model.modules() for name in vars(module)}
    assert detach_adapters(model) == 0


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantised_base_in_fp32_it_is_as_peft_computes_it(adapted, quantization):
    model, ids = adapted("llama", quantization=quantization), batch()
    theirs = passed(model, ids)
    facts = attach_adapters(model)
    assert (facts.num_attached, facts.num_left) == (14, 0)
    ours = passed(model, ids)
    assert distance(ours[0], theirs[0]) < 1e-6
    together = [torch.cat([g[1][n].flatten() for n in theirs[1]]) for g in (ours, theirs)]
    assert cosine(*together) > 1 - 1e-9
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantised_base_in_bf16_it_is_as_near_to_fp32_as_peft_is(adapted, quantization):
    model, ids = adapted("llama", precision="bf16", quantization=quantization), batch()
    wide = copy.deepcopy(model).float()  # the same quantised matrices, all else in fp32
    for module in wide.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    exact, theirs = passed(wide, ids), passed(model, ids)
    facts = attach_adapters(model)
    assert (facts.num_attached, facts.num_left) == (14, 0)
    ours = passed(model, ids)
    assert distance(ours[0], exact[0]) < 1.5 * distance(theirs[0], exact[0])
    together = [torch.cat([g[1][n].flatten() for n in exact[1]]) for g in (ours, theirs, exact)]
    assert distance(together[0], together[2]) < 1.5 * distance(together[1], together[2])
    assert cosine(together[0], together[1]) > 0.999
    assert cosine(together[0], together[2]) > 0.999
    assert all(gradient.dtype == torch.float32 for gradient in ours[1].values())


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_layer_is_traced_on_tensors_without_values(p):
    from torch._subclasses.fake_tensor import FakeTensorMode

    _, model = pair(torch.bfloat16, lora_dropout=p)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 80, 24, dtype=torch.bfloat16, requires_grad=True)
        y = model(x)
        y.sum().backward()
    assert (y.shape, y.dtype) == ((2, 80, 40), torch.bfloat16)
    assert x.grad.shape == x.shape
    assert {g.grad.dtype for g in model.parameters() if g.requires_grad} == {torch.float32}


# torch makes an instance of Function itself while it traces one.
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_compiled_layer_is_one_graph(adapted, p):
    model = adapted("llama", precision="bf16", dropout=p, targets=("q_proj", "down_proj"))
    attach_adapters(model)
    decoder = model.get_base_model().model
    x = torch.randn(4, 40, 32).bfloat16().requires_grad_()
    about = {"position_embeddings": decoder.rotary_emb(x, torch.arange(40)[None]), "attention_mask": None}
    compiled = torch.compile(decoder.layers[0], backend="eager", fullgraph=True)
    master = decoder.layers[0].mlp.down_proj.lora_B["default"].weight
    for _ in range(2):
        found = compiled(x, **about)
        found.sum().backward()
        assert master.grad is not None
        if p == 0:
            assert torch.equal(found, decoder.layers[0](x, **about))
        without_gradient(lambda p: p.add_(1))(master)  # a graph that is there casts anew
    torch._dynamo.reset()
