"""``llmtune init``: which questions are asked, what their answers lead to, and the file that is left."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune import FineTuner
from llmtune.cli import main
from llmtune.cli.interview import MOST_QUESTIONS, MOST_TRIES, Interview, aligned
from llmtune.cli.program import INTERRUPTED
from llmtune.config import RunConfig, load_config
from llmtune.config.write import Planned, commented_yaml, settings_of
from llmtune.console import speaker
from llmtune.errors import ConfigError, DataError, PlanError
from llmtune.finetuner import facts, rows
from llmtune.hardware import Accelerator, Cpu, Hardware
from llmtune.presets import GOALS, Preset, catalogue, find_entry
from llmtune.units import GIB, format_bytes, format_seconds
from llmtune.wizard.draft import PLANNED, Draft, Wizard, decide, offered
from llmtune.wizard.outlook import Limits, settled
from llmtune.wizard.questions import (
    Option,
    Question,
    data_question,
    file_question,
    goal_question,
    held_out_beside,
    held_out_question,
    long_rows_question,
    model_question,
    neighbours,
)

LAPTOP = Hardware(
    accelerators=(),
    cpu=Cpu(model="a laptop", physical_cores=8, usable_cores=8, amx=False, avx512_bf16=True),
    ram_total_bytes=32 * GIB,
    ram_available_bytes=24 * GIB,
    cgroup_limit_bytes=None,
    cgroup_used_bytes=None,
    disk_free_bytes=500 * GIB,
    platform="linux-x86_64",
)
GPU = Accelerator(
    index=0,
    name="NVIDIA GeForce RTX 4090",
    kind="cuda",
    total_bytes=24 * GIB,
    free_bytes=23 * GIB,
    compute_capability=(8, 9),
    bf16=True,
    fp16=True,
    tf32=True,
)
WORKSTATION = replace(LAPTOP, accelerators=(GPU,))
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"


def chat(*turns: tuple[str, str]) -> str:
    """One row: questions with their answers."""
    said = [line for question, answer in turns for line in (("user", question), ("assistant", answer))]
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}) + "\n"


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LLMTUNE_") and name != "LLMTUNE_CACHE"]:
        monkeypatch.delenv(name)
    yield
    speaker.quiet = speaker.muted = False


@pytest.fixture
def chats() -> str:
    """300 short chats of one turn."""
    Path("chats.jsonl").write_text("".join(chat((f"Who keeps lamp {i}?", f"Keeper {i} does.")) for i in range(300)))
    return "chats.jsonl"


@pytest.fixture
def long_chats() -> str:
    """300 chats of two turns; every hundredth is about 5,000 tokens long."""
    Path("long.jsonl").write_text(
        "".join(
            chat(("Tell me.", "word " * (4000 if i % 100 == 0 else 20)), ("And?", "That is all.")) for i in range(300)
        )
    )
    return "long.jsonl"


def wizard_of(config: RunConfig, hardware: Hardware = LAPTOP, **limits: Any) -> Wizard:
    inputs = rows.inputs_of(config, None)
    return Wizard(
        machine=facts.machine_of(config, hardware),
        inputs=inputs,
        report=rows.check_data(inputs),
        limits=Limits(**limits),
    )


def decided(data: str, answers: list[str], hardware: Hardware = LAPTOP, **settings: Any) -> tuple[Draft, list[str]]:
    """The draft after these answers, and the titles of the questions; Enter where there are no more answers."""
    limits = {name: settings.pop(name) for name in ("max_bytes", "max_seconds") if name in settings}
    config = load_config({"data.path": data, **settings}, environ={})
    wizard, titles, left = wizard_of(config, hardware, **limits), [], iter(answers)

    def ask(question: Question) -> Any:
        titles.append(question.title)
        return question.read(next(left, ""))

    return wizard.draft(decide(wizard.begin(config), ask).config, "llmtune.yaml"), titles


# ---------------------------------------------------------------------- the file

TEXT = st.text(min_size=1, max_size=20)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "data.path": TEXT,
        "data.columns": st.dictionaries(TEXT, TEXT, max_size=2),
        "data.max_length": st.integers(16, 10**6),
        "model.id": TEXT,
        "train.preset": st.sampled_from(GOALS),
        "train.learning_rate": st.floats(1e-12, 1.0),
        "train.schedule": TEXT,
        "train.packing": st.booleans(),
        "adapter.rank": st.integers(1, 10**4),
        "adapter.targets": st.lists(TEXT, min_size=1, max_size=3),
        "output.root": TEXT,
    },
)


def loaded(text: str) -> RunConfig:
    file = Path("loaded.yaml")
    file.write_text(text, encoding="utf-8", newline="")
    return load_config(file=file, environ={})


@given(settings=SETTINGS, said=st.text())
def test_a_file_loads_as_what_was_set_whatever_is_said_in_it(settings: dict[str, Any], said: str) -> None:
    config = load_config(settings, environ={})
    planned = {"train.epochs": Planned(value=2.0, reason=said), "save.keep": Planned(value=3, reason=said)}
    text = commented_yaml(config, header=(said, said), remarks=dict.fromkeys(settings, said), planned=planned)
    assert loaded(text) == config
    assert settings_of(loaded(text)) == settings_of(config)
    opened = loaded(re.sub(r"^  #(epochs|keep):", r"  \1:", text, flags=re.M))
    assert opened == settled(config, {"train.epochs": 2.0, "save.keep": 3})


def test_the_file_says_what_keys_are_for_and_why() -> None:
    config = load_config({"adapter.rank": 8}, environ={})
    planned = {
        "adapter.alpha": Planned(value=16, reason="twice it"),
        "adapter.rank": Planned(value=4, reason="x"),
    }
    assert commented_yaml(
        config, header=("Mine", "All of it"), remarks={"adapter.rank": "custom"}, planned=planned
    ) == (
        "# Mine\n#\n# All of it\n\n"
        "adapter:\n"
        "  # LoRA rank\n  # custom\n  rank: 8\n\n"
        "  # LoRA alpha; the update is scaled by alpha / rank\n  # why: twice it\n  #alpha: 16\n"
    )


def test_a_token_is_never_written() -> None:
    config = load_config({"model.token": "hf_secret", "model.id": "some/model"}, environ={})
    assert "hf_secret" not in commented_yaml(config)
    assert settings_of(config) == {"model.id": "some/model"}


def test_what_equals_the_default_is_written_too_if_it_was_set() -> None:
    config = load_config({"train.preset": "quality"}, environ={})
    assert settings_of(loaded(commented_yaml(config))) == {"train.preset": "quality"}


CASES: dict[str, dict[str, Any]] = {
    "nothing asked": {},
    "everything asked": {"answers": ["1", "", "none"]},
    "another goal": {"answers": ["bestaccuracy", "1", "share"]},
    "a model and numbers": {"model": TINYLLAMA, "rank": 64, "epochs": 1, "schedule": "constant"},
    "full": {"model": "Qwen/Qwen2.5-0.5B-Instruct", "method": "full"},
    "little memory": {"max_bytes": 4 * GIB},
    "little memory on a GPU": {"max_bytes": 6 * GIB, "hardware": WORKSTATION},
    "little time": {"max_seconds": 3600 * 24, "train.preset": "bestaccuracy", "hardware": WORKSTATION},
}


@pytest.mark.parametrize("case", CASES)
def test_the_file_gives_the_plan_that_was_shown_with_and_without_its_hashes(case: str, chats: str) -> None:
    given = dict(CASES[case])
    hardware = given.get("hardware", LAPTOP)
    draft, _ = decided(chats, given.pop("answers", []), **given)
    Path("llmtune.yaml").write_text(draft.text)
    assert load_config(file="llmtune.yaml", environ={}) == draft.config
    assert FineTuner(config="llmtune.yaml").plan(hardware) == draft.plan
    assert draft.plan.fits
    Path("all.yaml").write_text(re.sub(r"^  #(?=\w+: )", "  ", draft.text, flags=re.M))
    keys = settings_of(load_config(file="all.yaml", environ={}))
    assert {"model.id", "train.learning_rate", "train.token_budget", "evaluate.every_steps"} <= set(keys)
    plan = FineTuner(config="all.yaml").plan(hardware)
    before, after = dict(draft.plan.choices()), dict(plan.choices())
    names = set(PLANNED.values()) - {"targets"}
    assert {name for name in names if before[name].value != after[name].value} == set()
    assert set(after["targets"].value) <= set(before["targets"].value)  # those of the family that this model has
    assert plan.memory == draft.plan.memory


def test_only_what_was_decided_is_set(chats: str) -> None:
    quiet = load_config({"data.path": chats}, environ={})
    assert settings_of(wizard_of(quiet).draft(quiet, "x.yaml").config) == {"data.path": chats}
    draft, _ = decided(chats, ["highspeed", "", ""], rank=4)
    assert settings_of(draft.config) == {
        "data.path": chats,
        "train.preset": "highspeed",
        "model.id": draft.plan.model.value,
        "adapter.rank": 4,
    }


def test_replaced_numbers_are_called_custom(chats: str) -> None:
    draft, _ = decided(chats, [], model=TINYLLAMA, rank=64)
    base = Preset.load("tinyllama").level("quality", "small")
    assert f"# custom: the tinyllama preset has {base.rank} for quality on small data\n  rank: 64" in draft.text
    assert "#alpha: 128" in draft.text  # keeps the preset's ratio


# ---------------------------------------------------------------------- limits


@pytest.mark.parametrize("gib", [4, 6, 8, 12, 100])
@pytest.mark.parametrize("hardware", [LAPTOP, WORKSTATION], ids=["laptop", "workstation"])
def test_a_plan_keeps_to_its_memory(hardware: Hardware, gib: int, chats: str) -> None:
    config = load_config({"data.path": chats}, environ={})
    draft = wizard_of(config, hardware, max_bytes=gib * GIB).draft(config, "x.yaml")
    assert draft.plan.memory.peak_bytes <= gib * GIB
    assert f"# custom: keeps the run within {gib}.0 GiB\n  id: {draft.plan.model.value}" in draft.text


def test_a_model_that_does_not_fit_the_memory_is_refused(chats: str) -> None:
    config = load_config({"data.path": chats, "model.id": "Qwen/Qwen2.5-7B-Instruct"}, environ={})
    with pytest.raises(PlanError, match=r"with at most 4.0 GiB of memory: needs .* GiB"):
        wizard_of(config, max_bytes=4 * GIB).draft(config, "x.yaml")


def test_little_time_takes_a_smaller_model(chats: str) -> None:
    config = load_config({"data.path": chats, "train.preset": "bestaccuracy"}, environ={})
    free = wizard_of(config, WORKSTATION).look(config).plan
    limit = free.time.total_seconds / 3
    draft = wizard_of(config, WORKSTATION, max_seconds=limit).draft(config, "x.yaml")
    before, after = find_entry(free.model.value), find_entry(draft.plan.model.value)
    assert before is not None
    assert after is not None
    assert after.parameters < before.parameters
    assert draft.plan.time.total_seconds <= limit
    assert f"# custom: trains within {format_seconds(limit)}\n  id: {after.id}" in draft.text
    # It is the largest that does.
    _, larger = neighbours(after, offered(config, Limits()))
    assert larger is not None
    assert wizard_of(config, WORKSTATION).look(settled(config, {"model.id": larger.id})).plan.time.total_seconds > limit


def test_too_little_time_for_anything_names_ways_out(chats: str) -> None:
    config = load_config({"data.path": chats}, environ={})
    with pytest.raises(PlanError, match=r"at most 1\.0 s are allowed.*--preset highspeed.*max_steps=4\."):
        wizard_of(config, max_seconds=1.0).draft(config, "x.yaml")


def test_models_offered_are_open_and_small_enough() -> None:
    config = load_config({"method": "lora"}, environ={})
    few = offered(config, Limits(max_bytes=8 * GIB))
    assert few
    assert all(entry.minimum_memory_bytes["lora"] <= 8 * GIB and not entry.gated for entry in few)
    assert not any(entry.id.startswith("builtin") for entry in offered(config, Limits()))
    with pytest.raises(ConfigError, match=r"weight_decay: got 2.0, expected a number in \[0, 1\]"):
        offered(load_config({"weight_decay": 2.0}, environ={}), Limits())


# ---------------------------------------------------------------------- which questions, and what they offer


def test_what_is_asked_depends_on_what_is_known(chats: str, long_chats: str) -> None:
    aim, model, judged = (
        "What should the training aim for?",
        "Which model should be trained?",
        "What should the training be judged by?",
    )
    assert decided(chats, [])[1] == [aim, model, judged]
    assert decided(chats, [], preset="quality")[1] == [model, judged]
    assert decided(chats, [], model=TINYLLAMA)[1] == [aim, judged]
    assert decided(chats, [], model=TINYLLAMA, preset="quality", eval_fraction=0.2)[1] == []
    titles = decided(long_chats, [], model=TINYLLAMA)[1]
    assert titles == ["What should be done with rows of more than 2,048 tokens?", aim, judged]
    assert decided(long_chats, [], model=TINYLLAMA, too_long="drop")[1] == [aim, judged]


def test_the_aims_are_shown_with_what_they_take(chats: str) -> None:
    config = load_config({"data.path": chats}, environ={})
    question = goal_question(wizard_of(config).begin(config))
    assert question is not None
    assert [option.name for option in question.options] == list(GOALS)
    assert question.default == "quality"
    for option in question.options:
        plan = FineTuner(chats, preset=option.name).plan(LAPTOP)
        assert format_seconds(plan.time.total_seconds) in option.cells
        assert format_bytes(plan.memory.peak_bytes) in option.cells
        assert plan.model.value.endswith(option.cells[0])


def test_an_aim_that_takes_too_long_cannot_be_chosen(chats: str) -> None:
    config = load_config({"data.path": chats, "model.id": TINYLLAMA}, environ={})
    seconds = {
        goal: wizard_of(config).look(settled(config, {"train.preset": goal})).plan.time.total_seconds for goal in GOALS
    }
    limit = (seconds["highspeed"] + seconds["quality"]) / 2
    question = goal_question(wizard_of(config, max_seconds=limit).begin(config))
    assert question is not None
    assert question.default == "highspeed"
    assert [option.cells[-1] for option in question.options] == ["", "too slow", "too slow"]
    with pytest.raises(ValueError, match=r"quality takes about .*, longer than it may; expected one of highspeed"):
        question.read("2")


def test_models_are_proposed_around_the_chosen_one(chats: str) -> None:
    config = load_config({"data.path": chats, "train.preset": "quality"}, environ={})
    situation = wizard_of(config, WORKSTATION).begin(config)
    question = model_question(situation)
    assert question is not None
    entries = [find_entry(option.name) for option in question.options]
    assert [entry.parameters for entry in entries if entry] == sorted({e.parameters for e in entries if e})
    assert question.default == situation.look(config).plan.model.value
    assert question.read("") == {"model.id": question.default}
    assert question.read(TINYLLAMA) == {"model.id": TINYLLAMA}
    with pytest.raises(ValueError, match="got '9', expected a number up to"):
        question.read("9")


def test_a_model_that_reads_too_little_is_not_taken(long_chats: str) -> None:
    config = load_config({"data.path": long_chats, "train.preset": "quality"}, environ={})
    question = model_question(wizard_of(config, WORKSTATION).begin(config))
    assert question is not None
    assert TINYLLAMA not in [option.name for option in question.options]
    with pytest.raises(ValueError, match=r"TinyLlama.* reads 2,048; expected a model with a longer context"):
        question.read(TINYLLAMA)


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.id) for entry in catalogue()])
def test_neighbours_are_the_next_in_size(entry: Any) -> None:
    entries = catalogue()
    smaller, larger = neighbours(entry, entries)
    sizes = sorted({each.parameters for each in entries})
    at = sizes.index(entry.parameters)
    assert (smaller.parameters if smaller else None) == (sizes[at - 1] if at else None)
    assert (larger.parameters if larger else None) == (sizes[at + 1] if at + 1 < len(sizes) else None)


def test_of_two_models_of_one_size_the_newer_is_proposed() -> None:
    entry = find_entry("Qwen/Qwen3-0.6B")
    assert entry is not None
    smaller, _ = neighbours(entry, catalogue())
    assert smaller is not None
    assert smaller.id == "Qwen/Qwen2.5-0.5B-Instruct"


def test_long_rows_are_counted_and_every_way_out_trains(long_chats: str) -> None:
    config = load_config({"data.path": long_chats, "model.id": TINYLLAMA}, environ={})
    wizard = wizard_of(config)
    question = long_rows_question(wizard.begin(config))
    assert question is not None
    assert [option.name for option in question.options] == ["turns", "left", "drop"]
    assert question.default == "drop"  # three rows of 300
    assert all("3 rows (1.0%)" in option.cells[0] for option in question.options)
    for option in question.options:
        assert option.settings == {"data.max_length": 2048, "data.too_long": option.name}
        assert wizard.look(settled(config, option.settings)).problem is None


def test_rows_that_need_too_much_memory_are_asked_about_too(long_chats: str) -> None:
    config = load_config({"data.path": long_chats, "model.id": "Qwen/Qwen2.5-0.5B-Instruct"}, environ={})
    assert long_rows_question(wizard_of(config).begin(config)) is None
    whole = wizard_of(config).look(config).plan.memory.peak_bytes
    short = wizard_of(config).look(settled(config, {"data.max_length": 64, "data.too_long": "drop"}))
    wizard = wizard_of(config, max_bytes=(whole + short.plan.memory.peak_bytes) // 2)
    question = long_rows_question(wizard.begin(config))
    if question is None:  # checkpointing or a smaller pass made the whole rows fit
        assert wizard.look(config).plan.fits
    else:
        assert "more memory than is free" in question.explanation
        assert wizard.look(settled(config, question.read(""))).plan.fits


@pytest.mark.parametrize(
    ("data", "others", "found"),
    [
        ("train.jsonl", ["train.jsonl", "valid.jsonl", "test.jsonl"], ("valid.jsonl", "test.jsonl")),
        ("chats.jsonl", ["chats.eval.jsonl", "other.eval.jsonl", "eval.csv"], ("chats.eval.jsonl",)),
        ("chats_train.jsonl", ["chats_test.jsonl", "test-results.jsonl", "contest.jsonl"], ("chats_test.jsonl",)),
        ("valid.jsonl", ["test.jsonl"], ()),
        ("chats.jsonl", ["chats-held-out.jsonl"], ("chats-held-out.jsonl",)),
    ],
)
def test_evaluation_data_beside_the_data_is_found_by_name(data: str, others: list[str], found: tuple[str, ...]) -> None:
    assert held_out_beside(data, others) == found


def test_evaluation_data_that_lies_there_is_the_default(chats: str) -> None:
    config = load_config({"data.path": chats}, environ={})
    question = held_out_question(wizard_of(config).begin(config))
    assert question is not None
    assert question.read("") == {}
    assert question.read("none") == {"data.eval_fraction": 0.0}
    assert "30 of 300 rows" in question.options[0].cells[0]
    Path("chats.valid.jsonl").write_text(Path(chats).read_text()[:1000].rpartition("\n")[0] + "\n")
    question = held_out_question(wizard_of(config).begin(config))
    assert question is not None
    assert question.read("") == {"data.eval_path": "chats.valid.jsonl"}
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file"):
        question.read("nowhere.jsonl")


def test_data_that_lies_here_is_proposed_evaluation_data_last() -> None:
    question = data_question(["valid.jsonl", "a.csv", "train.jsonl", "README.md", "b.csv"])
    assert [option.name for option in question.options] == ["train.jsonl", "a.csv", "b.csv", "valid.jsonl"]
    assert question.default == "train.jsonl"
    assert len(data_question(f"{i}.csv" for i in range(99)).options) == 9
    empty = data_question([])
    with pytest.raises(ValueError, match="expected a file, directory or glob"):
        empty.read("")


def test_a_file_that_exists_is_not_the_default() -> None:
    for name in ("llmtune.yaml", "llmtune-2.yaml"):
        Path(name).touch()
    question = file_question(Path("llmtune.yaml"))
    assert question.read("") == {"file": "llmtune-3.yaml"}
    assert question.read("overwrite") == {"file": "llmtune.yaml"}
    assert question.read("mine.yaml") == {"file": "mine.yaml"}
    for wrong in ("llmtune-2.yaml", "nowhere/mine.yaml"):
        with pytest.raises(ValueError, match="expected the name of a new file"):
            question.read(wrong)


# ---------------------------------------------------------------------- answers

FRUIT = Question(
    title="Which fruit?",
    explanation="It will be eaten.",
    options=(
        Option(name="apple", settings={"a": 1}),
        Option(name="pear", settings={"a": 2}),
        Option(name="plum", settings={"a": 3}, problem="is not ripe"),
    ),
    default="pear",
    flag="--fruit",
)


@pytest.mark.parametrize(("text", "settings"), [("", 2), ("1", 1), (" apple ", 1), ("A", 1), ("pe", 2), ("2", 2)])
def test_answers_that_can_be_used(text: str, settings: int) -> None:
    assert FRUIT.read(text) == {"a": settings}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "got '0'"),
        ("4", "got '4'"),
        ("p", "got 'p'"),
        ("fig", "got 'fig'"),
        ("plum", "plum is not ripe"),
        ("²", "got '²'"),
    ],
)
def test_answers_that_cannot_be_used_say_what_is_expected(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        FRUIT.read(text)
    assert "expected one of apple, pear, plum, or a number up to 3" in str(caught.value)


def test_wrong_answers_are_asked_again_a_few_times(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("fig\n7\n1\n"))
    assert Interview(answered=True).ask(FRUIT) == {"a": 1}
    said = capsys.readouterr().err
    assert said.count("expected one of apple, pear, plum") == 2
    assert "> 2  pear" in said
    monkeypatch.setattr(sys, "stdin", io.StringIO("fig\n" * MOST_TRIES))
    with pytest.raises(ConfigError, match=r"'Which fruit\?' could be used; give it with --fruit"):
        Interview(answered=True).ask(FRUIT)


def test_no_more_than_five_questions_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n" * 99))
    interview = Interview(answered=True)
    answers = [interview.ask(FRUIT)["a"] for _ in range(8)]
    assert MOST_QUESTIONS == 5
    assert answers == [1] * 5 + [2] * 3


def test_where_nobody_answers_nothing_is_read(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    assert Interview(answered=False).ask(FRUIT) == {"a": 2}
    assert sys.stdin.read() == "1\n"
    assert capsys.readouterr().err == ""


@given(st.lists(st.lists(st.text("ab ", min_size=1, max_size=30), min_size=2, max_size=4), min_size=1, max_size=4))
def test_aligned_rows_lose_no_word(table: list[list[str]]) -> None:
    lines = list(aligned(table, 80))
    assert "".join(lines).split() != [] or not "".join("".join(row) for row in table).split()
    assert "".join("".join(lines).split()) == "".join("".join("".join(row).split()) for row in table)


# ---------------------------------------------------------------------- the command


def test_a_file_is_written_without_questions_outside_a_terminal(chats: str, capsys: Any) -> None:
    assert main(["init", chats, "--preset", "highspeed"]) == 0
    shown = capsys.readouterr()
    assert "llmtune train --config llmtune.yaml" in shown.out
    assert re.search(r"^memory +.* GiB of .* free on \S+: fits$", shown.out, re.M)
    assert "data: 300 rows" in shown.err
    assert settings_of(load_config(file="llmtune.yaml", environ={})) == {
        "data.path": chats,
        "train.preset": "highspeed",
    }
    assert sorted(os.listdir()) == ["chats.jsonl", "llmtune.yaml"]


def test_a_file_is_not_overwritten_unless_forced(chats: str, capsys: Any) -> None:
    Path("mine.yaml").write_text("train: {epochs: 3}\n")
    assert main(["init", chats, "-o", "mine.yaml"]) == 2
    assert "mine.yaml exists; pass --force" in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "train: {epochs: 3}\n"
    assert main(["init", chats, "-o", "mine.yaml", "--force", "-q"]) == 0
    assert load_config(file="mine.yaml", environ={}).data.path == chats


def test_init_json(chats: str, capsys: Any) -> None:
    assert main(["init", chats, "--set", "epochs=2", "--max-memory", "8GB", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {"file", "config", "plan"}
    assert document["file"] == "llmtune.yaml"
    assert document["plan"]["memory"]["peak_bytes"] <= 8e9
    assert document["config"]["train"]["epochs"] == 2
    config = load_config(document["config"], environ={})
    assert config == load_config(file="llmtune.yaml", environ={})


def test_data_with_problems_are_told_as_check_does(chats: str, capsys: Any) -> None:
    with Path(chats).open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "hi"}]}\n' * 3)
    assert main(["check", chats, "--no-near-duplicates"]) == 3
    told = capsys.readouterr().out
    assert main(["init", chats]) == 3
    assert capsys.readouterr().out == told
    assert "chats.jsonl:303" in told
    assert not Path("llmtune.yaml").exists()
    assert main(["init", chats, "--json"]) == 3
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 3
    assert main(["init", chats, "-q", "--set", "on_bad_row=skip"]) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        ([], 2, ["no data was given"]),
        (["chats.jsonl", "--max-memory", "much", "--max-time", "2 weeks"], 2, ["2 problems", "'much'", "90min or 2h"]),
        (["chats.jsonl", "-o", "no/where.yaml"], 2, ["there is no directory no"]),
        (["chats.jsonl", "-o", "."], 2, ["is a directory"]),
        (["chats.jsonl", "--max-memory", "100MB"], 4, ["with at most 95.4 MiB of memory"]),
        (["chats.jsonl", "--max-time", "1s"], 4, ["at most 1.0 s are allowed"]),
        (["chat.jsonl"], 3, ["chat.jsonl: no such file", "chats.jsonl"]),
        (["chats.jsonl", "--preset", "fast"], 2, ["train.preset: got 'fast'"]),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_nothing(
    arguments: list[str], code: int, fragments: list[str], chats: str, capsys: Any
) -> None:
    assert main(["init", *arguments, "-q"]) == code
    said = capsys.readouterr().err
    assert all(fragment in said for fragment in fragments), said
    assert os.listdir() == [chats]


def test_a_plan_for_another_machine(chats: str, capsys: Any) -> None:
    Path("server.json").write_text(json.dumps(WORKSTATION.to_json()))
    assert main(["init", chats, "--hardware", "server.json", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["plan"]["choices"]["device"]["value"] == "cuda:0"
    assert "NVIDIA GeForce RTX 4090" in Path("llmtune.yaml").read_text()


# ---------------------------------------------------------------------- a real terminal


class Terminal:
    """A program on a pseudo terminal of 80 columns, as a person sees and types it."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update({"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "80"})
            os.execv(sys.executable, [sys.executable, "-m", "llmtune", *arguments])
        self.seen, self._at = "", 0

    def until(self, text: str) -> None:
        """Read on until ``text`` is shown, behind what was waited for before."""
        assert self.shows(text, 120), self.seen
        self._at = self.seen.index(text, self._at) + len(text)

    def shows(self, text: str, seconds: float) -> bool:
        """Whether ``text`` appears within some seconds, behind what was waited for before."""
        deadline = time.monotonic() + seconds
        while text not in self.seen[self._at :]:
            if not select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            self._read()
        return True

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def end(self) -> int:
        """Read all that is left; the exit code."""
        try:
            while True:
                self._read()
        except OSError:  # how Linux tells that the other side has closed
            os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> None:
        assert select.select([self._fd], [], [], 120)[0], f"waits for an answer: {self.seen}"
        part = os.read(self._fd, 65536)
        if not part:
            raise OSError("closed")
        self.seen += part.decode().replace("\r\n", "\n")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    started: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        started.append(Terminal(*arguments))
        return started[-1]

    yield start
    for each in started:
        try:
            os.kill(each.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def test_a_person_answers_at_a_terminal(chats: str, terminal: Callable[..., Terminal]) -> None:
    Path("llmtune.yaml").write_text("# mine\n")
    screen = terminal("init", chats)
    screen.until("Choice [quality]:")
    screen.type("fast\n")
    screen.until("got 'fast', expected one of highspeed")
    screen.until("Choice [quality]:")
    screen.type("1\n")
    screen.until("Which model should be trained?")
    screen.until("]:")
    screen.type("\n")
    screen.until("Choice, or a file [share]:")
    screen.type("none\n")
    screen.until("llmtune.yaml exists")
    screen.until("[llmtune-2.yaml]:")
    screen.type("\n")
    assert screen.end() == 0, screen.seen
    assert "llmtune train --config llmtune-2.yaml" in screen.seen
    asked = screen.seen[screen.seen.index("What should the training aim for?") : screen.seen.index("Choice")]
    assert max(map(len, asked.splitlines())) <= 80
    config = load_config(file="llmtune-2.yaml", environ={})
    assert config.train.preset == "highspeed"
    assert config.data.eval_fraction == 0.0
    assert config.model.id != "auto"
    assert Path("llmtune.yaml").read_text() == "# mine\n"


def test_columns_without_telling_names_are_asked_for(tmp_path: Path, terminal: Callable[..., Terminal]) -> None:
    rows = [{"topic": "sums", "body": f"What is {n} and {n}?", "reply": f"It is {2 * n}."} for n in range(40)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    screen = terminal("init", "sums.jsonl", "--model", "builtin:tiny", "--preset", "highspeed")
    screen.until("Which column is the question?")
    screen.until("[body]:")
    screen.type("\n")
    screen.until("Which column is the answer?")
    screen.until("[reply]:")
    screen.type("reply\n")
    screen.until("Choice, or a file [share]:")
    screen.type("\n")
    assert screen.end() == 0, screen.seen
    assert "not used: topic" in screen.seen
    config = load_config(file="llmtune.yaml", environ={})
    assert config.data.columns == {"prompt": "body", "completion": "reply"}


@pytest.mark.parametrize("key", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_who_stops_finds_nothing_written(key: str, chats: str, terminal: Callable[..., Terminal]) -> None:
    screen = terminal("init", chats)
    screen.until("Choice [quality]:")
    for _ in range(10):  # Python sees a signal that arrives just before it begins to read only when it has read
        screen.type(key)
        if screen.shows("stopped", 5):
            break
    assert screen.end() == INTERRUPTED
    assert screen.seen.rstrip().endswith("stopped; nothing was written")
    assert "Traceback" not in screen.seen
    assert os.listdir() == [chats]


def test_a_pipe_that_says_nothing_is_not_waited_for(chats: str) -> None:
    read, write = os.pipe()  # never written to, never closed while the program runs
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llmtune", "init", chats, "-q"],
            stdin=read,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        os.close(read)
        os.close(write)
    assert done.returncode == 0, done.stderr
    assert Path("llmtune.yaml").exists()


def test_the_wizard_loads_no_training_library(chats: str) -> None:
    code = (
        "import sys\nfrom llmtune.cli import main\n"
        f"assert main(['init', {chats!r}, '--json', '-q']) == 0\n"
        "sys.stderr.write(','.join(n for n in ('torch', 'transformers', 'datasets', 'peft') if n in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
