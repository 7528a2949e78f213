"""What a run learns from: mixes, duplicates, leakage, skipped rows, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from llmtune import FineTuner
from llmtune.builtin import tiny_path
from llmtune.config import RunConfig, load_config
from llmtune.console import speaker
from llmtune.errors import ConfigError, DataError, ModelError
from llmtune.finetuner import account, rows
from llmtune.models import ModelSpec, locate, read_spec, require_lasting


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    location = locate(RunConfig().model.model_copy(update={"id": "builtin:tiny"}))
    return read_spec(location, "tiny")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))


def question(number: int) -> dict[str, str]:
    return {"question": f"What is said about number {number}?", "answer": f"{number} is said to be lucky."}


def story(number: int, *, end: str = ".") -> dict[str, str]:
    """Long enough for near duplicates: they are told by shingles of three words."""
    words = [f"w{number}x{i}" for i in range(60)]
    return {"question": " ".join(words[:20]), "answer": " ".join(words[20:]) + end}


def written(path: Path, items: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def configured(**keys: Any) -> RunConfig:
    return load_config(keys, environ={})


def places(dataset: Any) -> set[tuple[str, int]]:
    return {dataset.location(i) for i in range(len(dataset))}


def test_a_mix_is_read_with_the_weights_and_formats_of_its_parts(
    tmp_path: Path, tokenizer: Any, spec: ModelSpec
) -> None:
    first = written(tmp_path / "a.jsonl", [question(n) for n in range(40)])
    second = written(tmp_path / "b.jsonl", [{"q": f"say {n}", "a": f"{n}!"} for n in range(30)])
    file = tmp_path / "run.yaml"
    sources = [
        {"path": str(first)},
        {
            "path": str(second),
            "weight": 0.5,
            "format": "prompt_completion",
            "columns": {"prompt": "q", "completion": "a"},
        },
    ]
    file.write_text(yaml.safe_dump({"data": {"sources": sources, "eval_fraction": 0.1}}))
    config = load_config(file=str(file), environ={})
    inputs = rows.inputs_of(config, None)
    assert (inputs.name, inputs.trainable) == ("a-and-1-more", True)
    report = rows.check_data(inputs)
    assert (report.rows, report.format) == (70, "question_answer + prompt_completion")
    data = rows.tokenised(config, inputs, tokenizer, spec)
    assert data.train is not None
    first_part, second_part = data.train.parts
    assert first_part.num_rows + second_part.num_rows + data.eval_rows == 70
    assert data.stats.rows == first_part.num_rows + round(second_part.num_rows / 2 + 1e-9)
    assert inputs.fingerprint != rows.inputs_of(configured(path=str(first)), None).fingerprint


@pytest.mark.parametrize("keys", [{}, {"path": "d.jsonl", "sources": [{"path": "e.jsonl"}]}])
def test_no_data_or_twice_is_a_mistake_of_the_configuration(keys: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"no data was given|both data\.path and data\.sources"):
        rows.inputs_of(configured(**keys), None)


@pytest.mark.parametrize(("policy", "left"), [("keep", 44), ("drop_exact", 42), ("drop_near", 40)])
def test_repeated_rows_stay_or_go_as_was_asked(tokenizer: Any, spec: ModelSpec, policy: str, left: int) -> None:
    items = [story(n) for n in range(40)]
    items += [story(3), story(4), story(5, end=" so."), story(6, end=" yes.")]
    config = configured(duplicates=policy, eval_fraction=0.0)
    inputs = rows.inputs_of(config, items)
    data = rows.tokenised(config, inputs, tokenizer, spec)
    assert data.train is not None
    assert data.duplicates is not None
    assert (len(data.train), data.num_dropped) == (left, 44 - left)
    assert (data.duplicates.exact_rows, data.duplicates.near_rows) == (2, 2)
    assert places(data.train) >= {("rows", line) for line in range(1, 41)}
    kinds = {advice.kind for advice in rows.full_report(rows.check_data(inputs), data).advice}
    assert ("duplicates" in kinds) == (policy == "keep")


def test_near_duplicates_never_lie_on_both_sides(tokenizer: Any, spec: ModelSpec) -> None:
    items = [story(n, end=end) for n in range(30) for end in (" one.", " two.", " three.")]
    config = configured(eval_fraction=0.3)
    data = rows.tokenised(config, rows.inputs_of(config, items), tokenizer, spec)
    assert data.train is not None
    assert data.eval is not None
    sides = [{(line - 1) // 3 for _, line in places(side)} for side in (data.train, data.eval)]
    assert not sides[0] & sides[1]
    assert len(data.eval) > 10


def test_a_long_system_prompt_does_not_make_rows_alike(tokenizer: Any, spec: ModelSpec) -> None:
    system = {"role": "system", "content": " ".join(f"rule{i} says do{i}" for i in range(100))}
    items = [
        {
            "messages": [
                system,
                {"role": "user", "content": story(n)["question"]},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in range(10)
    ]
    config = configured(eval_fraction=0.0)
    inputs = rows.inputs_of(config, items)
    data = rows.tokenised(config, inputs, tokenizer, spec)
    assert data.duplicates is not None
    assert data.duplicates.near_rows == 0
    assert rows.check_data(inputs, near_duplicates=True).duplicates.near_rows == 0


def test_among_very_many_rows_only_exact_repeats_are_looked_for(
    tokenizer: Any, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_COMPARED_ROWS", 20)
    items = [*(story(n) for n in range(30)), story(3), story(5, end=" so.")]
    config = configured(eval_fraction=0.0)
    data = rows.tokenised(config, rows.inputs_of(config, items), tokenizer, spec)
    assert data.duplicates is not None
    assert (data.duplicates.exact_rows, data.duplicates.near_rows) == (1, None)


def test_evaluation_rows_that_are_trained_on_are_told_and_can_be_left_out(
    tmp_path: Path, tokenizer: Any, spec: ModelSpec
) -> None:
    items = [story(n) for n in range(30)]
    held_out = written(tmp_path / "e.jsonl", [story(2), story(7, end=" yes."), story(99)])
    for policy, trained_on in (("keep", 30), ("drop_near", 28)):
        config = configured(eval_path=str(held_out), duplicates=policy)
        inputs = rows.inputs_of(config, items)
        data = rows.tokenised(config, inputs, tokenizer, spec)
        assert data.leakage is not None
        assert data.train is not None
        assert (len(data.leakage.exact_rows), data.leakage.leaked, len(data.train)) == (1, 2, trained_on)
        report = rows.full_report(rows.check_data(inputs), data)
        assert ("leakage" in {advice.kind for advice in report.advice}) == (policy == "keep")
        assert report.to_json()["leakage"]["exact_rows"] == 1


def test_skipped_rows_are_counted_and_listed(
    tokenizer: Any, spec: ModelSpec, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [question(n) for n in range(20)]
    items[4], items[9] = {"question": "a", "answer": ""}, {"question": "<|user|>", "answer": "b"}
    config = configured(on_bad_row="skip", eval_fraction=0.0)
    inputs = rows.inputs_of(config, items)
    report = rows.full_report(rows.check_data(inputs), rows.tokenised(config, inputs, tokenizer, spec))
    # The second one is seen by the tokenizer alone.
    assert (report.bad_rows, [problem.line for problem in report.problems]) == (2, [5, 10])
    speaker.quiet = speaker.muted = False
    account.tell_data(report)
    said = capsys.readouterr().err
    assert "2 of 20 rows are skipped: rows:5:answer: the field 'answer' is empty" in said
    assert "rows:10:messages[0].content" in said or "special token '<|user|>'" in said
    with pytest.raises(DataError, match="special token"):
        rows.tokenised(configured(), inputs, tokenizer, spec)


def test_looking_refuses_nothing(tokenizer: Any, spec: ModelSpec) -> None:
    items = [question(1), question(2), {"question": "long", "answer": "word " * 400}, {"question": "a", "answer": ""}]
    config = configured(max_length=64)
    data = rows.examined(config, rows.inputs_of(config, items), tokenizer, spec)
    assert data.encoded is not None
    found = data.encoded.facts
    assert (len(data.encoded), found.bad_rows, found.too_long, found.supervision.rows_too_long) == (2, 1, 1, 1)


@pytest.mark.parametrize("too_long", ["refuse", "drop", "left", "turns"])
def test_what_truncation_costs_is_told(tokenizer: Any, spec: ModelSpec, too_long: str) -> None:
    turns = [{"role": role, "content": f"{role} says {n} " * 6} for n in range(6) for role in ("user", "assistant")]
    items = [{"messages": turns}, {"messages": turns[:2]}]
    config = configured(max_length=150, too_long=too_long, eval_fraction=0.0)
    inputs = rows.inputs_of(config, items)
    if too_long == "refuse":
        with pytest.raises(DataError, match=r"1 of 2 rows are longer than data\.max_length=150 tokens: rows:1 \("):
            rows.tokenised(config, inputs, tokenizer, spec)
        return
    data = rows.tokenised(config, inputs, tokenizer, spec)
    report = rows.full_report(rows.check_data(inputs), data)
    assert data.train is not None
    assert int(data.train.lengths.max()) <= 150
    assert len(data.train) == (1 if too_long == "drop" else 2)
    assert report.supervision is not None
    assert report.supervision.answer_tokens_lost > 0
    (told,) = [advice for advice in report.advice if advice.kind == "too_long"]
    assert f"{report.supervision.answer_tokens_lost:,} of them of answers" in told.finding


def test_only_the_last_answer_is_learned_where_that_was_asked(tokenizer: Any, spec: ModelSpec) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    counts = {}
    for supervise in ("all", "last", "completion", "text"):
        config = configured(supervise=supervise, eval_fraction=0.0)
        data = rows.tokenised(config, rows.inputs_of(config, [{"messages": turns}]), tokenizer, spec)
        counts[supervise] = data.stats.supervised_tokens, data.stats.tokens
    assert counts["last"] == counts["completion"]
    assert counts["last"][0] < counts["all"][0] < counts["text"][0] == counts["text"][1]


def test_a_tokenizer_that_does_not_last_is_refused(tokenizer: Any) -> None:
    require_lasting(tokenizer)
    forgetful = AutoTokenizer.from_pretrained(tiny_path())

    def save(directory: str) -> None:
        type(forgetful).save_pretrained(forgetful, directory)
        for file in Path(directory).glob("*.jinja"):
            file.write_text(file.read_text() + " ")

    forgetful.save_pretrained = save
    with pytest.raises(ModelError, match="another chat template"):
        require_lasting(forgetful)


def test_the_result_brings_the_template_it_was_trained_with(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    settings = {"model": "builtin:tiny", "chat_template": str(template), "num_samples": 0, "report": False}
    items = [question(n) for n in range(24)]
    result = FineTuner(items, max_steps=1, output=str(tmp_path / "run"), **settings).train()
    assert AutoTokenizer.from_pretrained(result.adapter_dir).chat_template == template.read_text()
    document = json.loads((result.run_dir / "data_report.json").read_text())
    assert {"statistics", "supervision", "duplicates", "advice", "tokens", "num_problems"} <= document.keys()
