from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune import builtin
from llmtune.builtin import corpus, pretrain, tasks

METADATA = json.loads((builtin.tiny_path() / "metadata.json").read_text(encoding="utf-8"))
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Velda."},
    {"role": "user", "content": "Where?\n"},
    {"role": "assistant", "content": "Torvin."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin.tiny_path(), local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(builtin.tiny_path(), local_files_only=True)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def words_of(row: tasks.Row) -> set[str]:
    return set(re.findall(r"\w+", json.dumps(row)))


def test_shipped_files_are_the_ones_the_metadata_describes():
    files = {p.name: sha256(p) for p in builtin.tiny_path().iterdir() if p.name != "metadata.json"}
    assert files == METADATA["files"]


def test_the_scripts_are_the_ones_that_made_the_shipped_model():
    assert pretrain.script_sha256() == METADATA["script_sha256"], "run: python -m llmtune.builtin.pretrain"


def test_the_model_is_small_enough_to_ship():
    assert sum(p.stat().st_size for p in builtin.tiny_path().iterdir()) < 12_000_000


def test_the_package_is_light():
    code = (
        "import sys, llmtune.builtin; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_corpus_is_the_same_every_time():
    first, second = (list(islice(corpus.documents(7), 300)) for _ in range(2))
    assert first == second
    assert first != list(islice(corpus.documents(8), 300))


def test_the_corpus_is_the_one_the_model_was_trained_on():
    assert pretrain.corpus_sha256() == METADATA["corpus_sha256"]


def test_the_corpus_does_not_hold_the_formats_of_the_tuning_tasks():
    text = "\n".join(pretrain.render(d) for d in islice(corpus.documents(), 5000))
    assert '{"' not in text
    assert not re.search(r"ship: |from: ", text)


def test_the_corpus_never_uses_a_heldout_name():
    def words(heldout: bool) -> set[str]:
        return set().union(
            *(words_of(r) for p, rows in tasks.files().items() if ("heldout" in p.name) == heldout for r in rows)
        )

    names = {word for word in words(True) - words(False) if word.istitle()}
    text = "\n".join(pretrain.render(d) for d in islice(corpus.documents(), 5000))
    assert len(names) > 300
    assert not names & set(re.findall(r"\w+", text))


def test_shipped_task_files_are_the_generated_ones():
    for path, rows in tasks.files().items():
        assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows, path
    assert {builtin.demo_train_path(), builtin.demo_heldout_path()} <= set(tasks.files())


@pytest.mark.parametrize("make", [tasks.parcel_row, tasks.log_row])
def test_heldout_rows_ask_about_nothing_that_was_trained_on(make):
    train = set().union(*map(words_of, tasks.make_rows(make, tasks.TRAIN_ROWS, reserved=False, seed=1)))
    for row in tasks.make_rows(make, tasks.HELDOUT_ROWS, reserved=True, seed=2):
        new = words_of(row) - train
        assert sum(word.istitle() for word in new) >= 3, row


def test_heldout_answers_share_no_entity_with_the_training_answers():
    train, heldout = (
        [json.loads(json.loads(line)["messages"][-1]["content"]) for line in path.read_text().splitlines()]
        for path in (builtin.demo_train_path(), builtin.demo_heldout_path())
    )
    for key in ("from", "to", "town"):
        assert not {a[key] for a in train} & {a[key] for a in heldout}


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    "text", ["", "  two  spaces\n\n\tand tabs ", "日本語、中文。", "👩‍🚀🚀 zażółć", "\r\n\x00\x7f", "{'a': 1}"]
)
def test_awkward_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_are_distinct(tokenizer, model):
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(ids)) == 3
    assert None not in ids
    assert ids == [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id]
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 2048


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer):
    name = tokenizer.encode("Velda", add_special_tokens=False)
    for text in (" Velda", '"Velda"', "\nVelda", "(Velda)"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert any(ids[i : i + len(name)] == name for i in range(len(ids))), text


@pytest.mark.parametrize("turns", [1, 3])
def test_the_prompt_is_a_prefix_of_the_full_conversation(tokenizer, turns):
    whole = tokenizer.apply_chat_template(CONVERSATION[: turns + 2], tokenize=False)
    prompt = tokenizer.apply_chat_template(CONVERSATION[: turns + 1], add_generation_prompt=True, tokenize=False)
    assert whole.startswith(prompt)
    assert whole.endswith(tokenizer.eos_token)
    assert whole == pretrain.render([(m["role"], m["content"]) for m in CONVERSATION[: turns + 2]])


def test_the_template_marks_what_the_assistant_says_and_its_stop_token(tokenizer):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(said) == f"Velda.{tokenizer.eos_token}Torvin.{tokenizer.eos_token}"


def test_the_template_refuses_an_unknown_role(tokenizer):
    with pytest.raises(Exception, match="knows the roles system, user and assistant, got wizard"):
        tokenizer.apply_chat_template([{"role": "wizard", "content": "x"}])


def test_the_model_is_a_llama_in_bf16_that_generates(tokenizer, model):
    import torch
    from transformers import LlamaForCausalLM

    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == METADATA["parameters"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Repeat Velda."}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)  # fmt: skip
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "Velda"
