"""What a training pass costs, in exact numbers: products, bytes kept for the way back, rows scored by the head.

The parts have tests of their own (``test_kernels_*``); these are of the parts put together, on a Llama whose sizes are
all different, so that no term of a formula can stand for another.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import family_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from tuning import ROWS, evaluations, history, tune

import llmtune.kernels.head as head_module
from llmtune.data import IGNORED
from llmtune.kernels import attach_kernels
from llmtune.kernels.adapters import attach_adapters
from llmtune.kernels.attention import attach_attention

LAYERS, WIDTH, MLP, HEADS, KEY_HEADS, HEAD_WIDTH, VOCABULARY, RANK = 3, 48, 112, 4, 2, 16, 272, 8
QUERY, KEY = HEADS * HEAD_WIDTH, KEY_HEADS * HEAD_WIDTH
LINEARS = {
    "q_proj": (WIDTH, QUERY),
    "k_proj": (WIDTH, KEY),
    "v_proj": (WIDTH, KEY),
    "o_proj": (QUERY, WIDTH),
    "gate_proj": (WIDTH, MLP),
    "up_proj": (WIDTH, MLP),
    "down_proj": (MLP, WIDTH),
}
BLOCKS = LAYERS * sum(a * b for a, b in LINEARS.values())  # N_b: weights of linear maps
ADAPTERS = LAYERS * RANK * sum(a + b for a, b in LINEARS.values())  # N_l
HEAD = VOCABULARY * WIDTH  # N_h
# Nothing before the first layer is trained, so its inputs need no gradient: neither through its linear maps of them nor
# through their adapters.
FIRST_BLOCK = sum(a * b for a, b in (LINEARS["q_proj"], LINEARS["k_proj"], LINEARS["v_proj"]))
FIRST_ADAPTERS = 3 * RANK * WIDTH
ROWS_OF_A_PASS, SEQ = 4, 96
TOKENS = ROWS_OF_A_PASS * SEQ  # more than adapters leave to PEFT, fewer per row than attention cuts into two blocks


def adapted() -> Any:
    """A bf16 base with fp32 adapters that are not zero, as `load_for_training` makes it; nothing attached."""
    from peft import LoraConfig, get_peft_model

    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_HEADS,
        "head_dim": HEAD_WIDTH,
    }
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(family_config("llama", **sizes), dtype=torch.bfloat16)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def batch_of(supervised: int, *, packed: bool = False) -> dict[str, Any]:
    """Rows of which so many positions predict a token that counts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (ROWS_OF_A_PASS, SEQ), generator=generator)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 0] = ids[:, 0]  # predicted by nothing, so it never counts
    places = torch.randperm(ROWS_OF_A_PASS * (SEQ - 1), generator=generator)[:supervised]
    rows, columns = places // (SEQ - 1), 1 + places % (SEQ - 1)
    labels[rows, columns] = ids[rows, columns]
    batch: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if packed:
        labels[:, 0] = IGNORED  # would be predicted by the row before
        batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
        batch["position_ids"] = torch.arange(SEQ).repeat(ROWS_OF_A_PASS)[None]
    return batch | {"num_items_in_batch": 1, "use_cache": False}


# ------------------------------------------------------------------ products


def attention_flops(query: Any, *args: Any, **kwargs: Any) -> int:
    """Two products of queries x keys, whole as torch's counter has it for CUDA; it does not know the CPU's kernel."""
    rows, heads, tokens, width = query
    return 2 * 2 * rows * heads * tokens * tokens * width


def counted(model: Any, batch: dict[str, Any]) -> dict[str, int]:
    """FLOPs of forward and backward pass by torch's counter: of products, and of attention's kernel."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention_flops}) as counter:
        model(**batch).loss.backward()
    of = counter.get_flop_counts()["Global"]
    batched = of.get(torch.ops.aten.bmm, 0)
    flash = of.get(kernel, 0)
    return {"products": counter.get_total_flops() - batched - flash, "flash": flash, "batched": batched}


def of_linears() -> int:
    """``4 N_b + 6 N_l`` per token, less what the first layer does not need."""
    return TOKENS * (4 * BLOCKS + 6 * ADAPTERS - 2 * FIRST_BLOCK - 2 * FIRST_ADAPTERS)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("supervised", [1, 77, ROWS_OF_A_PASS * (SEQ - 1)])
def test_products_of_a_training_pass(supervised: int, packed: bool) -> None:
    model = adapted()
    attach_kernels(model, device="cpu")
    found = counted(model, batch_of(supervised, packed=packed))
    assert found["products"] == of_linears() + 4 * supervised * HEAD
    # Forward in torch's kernel, once in each layer. Backward five products (scores, values, their gradients twice,
    # keys, queries) with two columns more in two of them; never of a pair of tokens in two rows.
    squares = ROWS_OF_A_PASS * SEQ**2
    assert found["flash"] == 4 * LAYERS * squares * QUERY
    assert found["batched"] == 2 * LAYERS * squares * HEADS * (5 * HEAD_WIDTH + 2 * 2)


@pytest.mark.parametrize("supervised", [1, 77])
def test_upstream_scores_every_row_and_computes_nothing_else_more(supervised: int) -> None:
    """The same model without the fast path: so the formula is one of the model, and the head's rows are the saving."""
    found = counted(adapted(), batch_of(supervised))
    assert found["products"] == of_linears() + 4 * TOKENS * HEAD


def test_recomputed_layers_go_forward_once_more_and_the_head_does_not() -> None:
    model = adapted()
    model.activation_checkpointing_enable({"use_reentrant": False})
    attach_kernels(model, device="cpu")
    found = counted(model, batch_of(77))
    # transformers has the embeddings' output ask for a gradient then, so the first layer is as the others.
    assert found["products"] == TOKENS * (6 * BLOCKS + 8 * ADAPTERS) + 4 * 77 * HEAD
    assert found["flash"] == 2 * 4 * LAYERS * ROWS_OF_A_PASS * SEQ**2 * QUERY


def test_an_evaluation_pass_goes_forward_alone() -> None:
    model = adapted().eval()
    attach_kernels(model, device="cpu")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch_of(77))
    assert counter.get_total_flops() == TOKENS * (2 * BLOCKS + 2 * ADAPTERS) + 2 * 77 * HEAD


# ------------------------------------------------------------------ bytes kept for the backward pass


@contextlib.contextmanager
def keeping(model: Any) -> Iterator[dict[str, int]]:
    """Bytes that autograd keeps in this block, by the kind of the innermost module that keeps them first."""
    inside = [""]
    seen: dict[int, torch.Tensor] = {}  # held on to, so that no address is given away twice
    found: dict[str, int] = defaultdict(int)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen[address] = tensor
            found[inside[-1]] += tensor.untyped_storage().nbytes()
        return tensor

    def enter(name: str) -> Any:
        return lambda *_: inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    handles = []
    for name, module in model.named_modules():
        if "base_layer" in name or "lora_" in name:
            continue  # who listens inside an adapted layer sends it to PEFT
        handles.append(module.register_forward_pre_hook(enter(name.rpartition(".")[2])))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def kept(model: Any) -> dict[str, float]:
    """Bytes per token and layer by kind of module: what two rows more add, so no weights and no copies of them."""
    found = []
    for rows in (ROWS_OF_A_PASS, ROWS_OF_A_PASS + 2):
        batch = batch_of(0) | {"labels": None}
        batch["input_ids"] = batch["input_ids"].repeat(2, 1)[:rows]
        with keeping(model) as bytes_of:
            output = model(**batch)
        assert output.logits.requires_grad
        found.append(dict(bytes_of))
    return {kind: (more - found[0].get(kind, 0)) / (2 * SEQ * LAYERS) for kind, more in found[1].items()}


def test_bytes_of_each_kind_of_module() -> None:
    """The rows of the table in ``adapters.py`` and ``attention.py``: inputs once, low-rank products, no score."""
    model = adapted()
    attach_attention(model)
    assert attach_adapters(model).num_left == 0
    found = kept(model)
    low = 2 * RANK
    assert {name: found[name] for name in LINEARS} == {
        "q_proj": 2 * WIDTH + low,  # the first of those that share an input
        "k_proj": low,
        "v_proj": low,
        "o_proj": low,  # its input is attention's output
        "gate_proj": 2 * WIDTH + low,
        "up_proj": low,
        "down_proj": 2 * MLP + low,
    }
    # Queries, keys, values, output in bf16, and one fp32 number per token and head.
    assert found["self_attn"] == 4 * QUERY + 4 * KEY + 4 * HEADS


def test_peft_keeps_what_the_docstring_says_more() -> None:
    peft, ours = adapted(), adapted()
    for model in (peft, ours):
        attach_attention(model)
    assert attach_adapters(ours).num_left == 0
    expected, found = kept(peft), kept(ours)
    assert sum(expected.values()) - sum(found.values()) == 16 * WIDTH + 4 * QUERY + 2 * MLP + 14 * RANK
    # Nothing outside the adapted layers is other than it was.
    assert {kind: expected[kind] for kind in expected if kind not in LINEARS} == {
        kind: found[kind] for kind in found if kind not in LINEARS
    }


# ------------------------------------------------------------------ rows scored by the head


class Scored(TrainerCallback):
    """Rows that the head was multiplied with, in updates and in evaluations; what else calls it does not count."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.updates: list[int] = []
        self.evaluations: list[int] = []
        self._now = 0
        for name in ("supervised_loss", "supervised_losses"):  # of an update, of an evaluation
            patch.setattr(head_module, name, self._counting(getattr(head_module, name)))

    def _counting(self, upstream: Callable[..., Any]) -> Callable[..., Any]:
        def counting(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **how: Any) -> Any:
            assert len(hidden) == len(labels)
            assert not (labels == IGNORED).any()
            self._now += len(hidden)
            return upstream(hidden, weight, labels, **how)

        return counting

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._now = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._now = 0

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.updates.append(self._now)
        self._now = 0

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.evaluations.append(self._now)
        self._now = 0


def supervised_by_upstream(model: Path, rows: list[dict[str, str]]) -> int:
    """Tokens of the answers and their ends, as transformers finds them."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    count = 0
    for row in rows:
        said = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        encoded = tokenizer.apply_chat_template(said, return_dict=True, return_assistant_tokens_mask=True)
        count += sum(encoded["assistant_masks"])
    return count


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_an_epoch_scores_each_supervised_token_once(
    packing: bool, family_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family_model("llama")
    heldout = tmp_path / "heldout.jsonl"
    others = [{"question": f"Who keeps lamp {n}?", "answer": f"Nobody keeps lamp {n}."} for n in (97, 98, 99)]
    heldout.write_text("".join(json.dumps(row) + "\n" for row in others))
    scored = Scored(monkeypatch)
    result = tune(
        model,
        tmp_path / "run",
        callbacks=[scored],
        max_steps=None,
        epochs=2,
        packing=packing,
        precision="bf16",
        token_budget=160,  # several passes per update
        **{"data.eval_path": str(heldout), "evaluate.every_steps": 4, "train.probe": False},
    )
    batches = -(-len(ROWS) // 8)
    assert result.steps == 2 * batches
    expected = supervised_by_upstream(model, ROWS)
    assert sum(scored.updates[:batches]) == sum(scored.updates[batches:]) == expected
    assert scored.updates == [step[5] for step in history(result.run_dir)]
    assert len(scored.evaluations) == len(evaluations(result.run_dir)) >= 2
    assert set(scored.evaluations) == {supervised_by_upstream(model, others)}
