"""A folder is not a heap: splits, saved data sets, files that are no data, and what is said about them."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune import FineTuner
from llmtune.cli import main
from llmtune.config import load_config
from llmtune.data import find, read, resolve, resolve_evaluation
from llmtune.data.splits import KEYWORDS, Split, choose, role_of
from llmtune.errors import DataError
from llmtune.finetuner.rows import evaluation_inputs, inputs_of

datasets = pytest.importorskip("datasets")


def rows(name: str, count: int = 3) -> list[dict[str, str]]:
    return [{"question": f"{name} question {i}", "answer": f"{name} answer {i}"} for i in range(count)]


def write(path: Path, name: str | None = None, count: int = 3) -> Path:
    """Rows that carry ``name``, or the path itself, in the container of the extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    items = rows(name or path.name, count)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(items), path)
    elif path.suffix == ".csv":
        path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in items))
    elif path.suffix in (".txt", ".md"):
        path.write_text(f"{name or path.name} text")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in items))
    return path


def folder(root: Path, *files: str) -> Path:
    for file in files:
        write(root / file, file)
    return root


def names(source: Any) -> list[str]:
    """The files that rows come from, by what they say."""
    if source is None:
        return []
    found = {}
    for record in read(source):
        text = record.text if hasattr(record, "text") else record.messages[0].content
        found[re.sub(r" (question \d+|text)$", "", text)] = None
    return list(found)


def told(data: Any) -> str:
    return " ".join(inputs_of(load_config({}, environ={}), data).notices)


LAYOUTS = {
    "Hub clone": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet"],
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], "test", 1, 0),
    ),
    "validation before test": (
        ["train.jsonl", "test.jsonl", "validation.jsonl"],
        (["train.jsonl"], "validation", 1, 1),
    ),
    "folders": (
        ["train/a.csv", "train/b.csv", "val/a.csv", "eval/a.csv"],
        (["train/a.csv", "train/b.csv"], "validation", 1, 1),
    ),
    "keywords between separators": (
        ["chats_train_v2.jsonl", "chats-dev.jsonl", "chats.testing.jsonl"],
        (["chats_train_v2.jsonl"], "validation", 1, 1),
    ),
    "no keyword for training": (
        ["chats.jsonl", "more.jsonl", "eval.jsonl"],
        (["chats.jsonl", "more.jsonl"], "test", 1, 0),
    ),
    "unnamed beside named": (["train.jsonl", "valid.jsonl", "other.jsonl"], (["train.jsonl"], "validation", 1, 1)),
    "held out": (["demo_train.jsonl", "demo_heldout.jsonl"], (["demo_train.jsonl"], "test", 1, 0)),
    "one split": (["train-1.jsonl", "train-2.jsonl"], (["train-1.jsonl", "train-2.jsonl"], "", 0, 0)),
    "only a test split": (["test.jsonl"], (["test.jsonl"], "", 0, 0)),
    "one split and others": (["train.jsonl", "more.jsonl"], (["more.jsonl", "train.jsonl"], "", 0, 0)),
    "a heap": (["a.jsonl", "sub/b.jsonl"], (["a.jsonl", "sub/b.jsonl"], "", 0, 0)),
    "keywords within words": (
        ["latest.jsonl", "trains.jsonl", "devices.jsonl"],
        (["devices.jsonl", "latest.jsonl", "trains.jsonl"], "", 0, 0),
    ),
    "another split of the Hub": (
        ["data/train-00000-of-00001.parquet", "data/unsupervised-00000-of-00001.parquet"],
        (["data/train-00000-of-00001.parquet"], "", 0, 1),
    ),
    "documents": (["train/a.md", "train/b.txt", "test/c.txt"], (["train/a.md", "train/b.txt"], "test", 1, 0)),
    "wiki": (["wiki.train.txt", "wiki.test.txt", "wiki.valid.txt"], (["wiki.train.txt"], "validation", 1, 1)),
    "prose": (
        ["testing.md", "dev-setup.md", "test-plan.md"],
        (["dev-setup.md", "test-plan.md", "testing.md"], "", 0, 0),
    ),
    "prose with tests": (["docs/test/a.md", "docs/dev/b.md"], (["docs/dev/b.md", "docs/test/a.md"], "", 0, 0)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_splits_of_a_folder(tmp_path, layout):
    files, (train, split, num_evaluation, num_unused) = LAYOUTS[layout]
    found = find(folder(tmp_path, *files))
    assert names(found.train) == train
    assert found.split == split
    assert len(found.evaluation_names) == len(names(found.evaluation)) == num_evaluation
    assert len(found.unused) == num_unused
    assert {*found.train_names, *found.evaluation_names, *found.unused} == set(files)  # no file without a word
    notice = told(tmp_path)
    if num_evaluation or num_unused:
        assert all(file in notice for file in (*found.evaluation_names, *found.unused))


@given(role=st.sampled_from(list(KEYWORDS)), data=st.data())
def test_roles_are_those_of_hugging_face_datasets(role, data):
    """`datasets.data_files` is the authority on every keyword and separator."""
    from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

    words = SPLIT_KEYWORDS[role]
    separator = st.sampled_from("-._ 07")
    assert set(words) <= {*KEYWORDS[role]}
    assert set("-._ 0-9") == set(NON_WORDS_CHARS)
    keyword, before, after = (data.draw(each) for each in (st.sampled_from(words), separator, separator))
    assert role_of(keyword) == role_of(f"chats{before}{keyword}") == role_of(f"{keyword}{after}x") == role
    assert role_of(f"chats{keyword}") is role_of(f"{keyword}chats") is None


@given(
    st.lists(
        st.builds(Split, role=st.sampled_from([*KEYWORDS, None]), name=st.sampled_from(["a", "b", None])), min_size=1
    )
)
def test_every_split_has_one_use_and_held_out_rows_are_learned_only_when_there_is_nothing_else(splits):
    choice = choose(splits)
    if choice.train:
        assert sorted((*choice.train, *choice.evaluation, *choice.unused)) == list(range(len(splits)))
    roles = {splits[place].role for place in choice.train}
    assert len(roles & {"validation", "test"}) == 0 or len({split.role for split in splits}) == 1


def test_explicit_evaluation_data_wins_and_the_splits_are_named(tmp_path):
    write(tmp_path / "other.jsonl")
    data = folder(tmp_path / "data", "train.jsonl", "validation.jsonl", "test.jsonl")
    config = load_config({"eval_path": str(tmp_path / "other.jsonl")}, environ={})
    inputs = inputs_of(config, str(data))
    assert names(inputs.evaluation.source) == ["other.jsonl"]
    assert inputs.notices == (f"{data}: training data: train.jsonl; not read: validation.jsonl, test.jsonl.",)
    without = inputs_of(load_config({"eval_fraction": 0.2}, environ={}), str(data))
    assert without.evaluation is None
    assert without.fingerprint != inputs.fingerprint


def test_a_folder_as_evaluation_data_gives_its_held_out_split(tmp_path):
    data = folder(tmp_path / "data", "train.jsonl", "validation.jsonl", "test.jsonl")
    source = resolve_evaluation(data)
    assert names(source) == ["validation.jsonl"]
    assert source.notices == (
        f"{data}: evaluation data: validation.jsonl (validation split); not read: train.jsonl, test.jsonl.",
    )
    assert names(resolve_evaluation(folder(tmp_path / "test", "train.jsonl", "test.jsonl"))) == ["test.jsonl"]
    assert names(resolve_evaluation(folder(tmp_path / "one", "train.jsonl"))) == ["train.jsonl"]
    config = load_config({"eval_path": str(data)}, environ={})
    assert names(inputs_of(config, str(write(tmp_path / "mine.jsonl"))).evaluation.source) == ["validation.jsonl"]
    assert names(evaluation_inputs(config, str(data)).train[0].source) == ["validation.jsonl"]


def test_a_mix_learns_from_the_training_splits(tmp_path):
    parts = [folder(tmp_path / name, "train.jsonl", "test.jsonl") for name in ("a", "b")]
    inputs = inputs_of(load_config({"sources": [{"path": str(part)} for part in parts]}, environ={}), None)
    assert [names(reading.source) for reading in inputs.train] == [["train.jsonl"]] * 2
    assert inputs.evaluation is None
    assert inputs.notices == tuple(f"{part}: training data: train.jsonl; not read: test.jsonl." for part in parts)


def test_an_evaluation_split_that_cannot_be_read_names_the_way_out(tmp_path):
    data = folder(tmp_path, "train.jsonl")
    (data / "test.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"test split .*--set data\.eval_fraction=0\.1"):
        inputs_of(load_config({}, environ={}), str(data))
    assert inputs_of(load_config({"eval_fraction": 0.1}, environ={}), str(data)).evaluation is None


# ── saved data sets ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def dataset_dict() -> Any:
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows(name)) for name in ("train", "test", "dev")})


def test_a_dataset_dict_works_like_its_folder(tmp_path, dataset_dict):
    dataset_dict.save_to_disk(tmp_path / "saved")
    found = find(dataset_dict), find(tmp_path / "saved")
    for each in found:
        assert names(each.train) == ["train"]
        assert names(each.evaluation) == ["dev"]
        assert each.split == "validation"
    assert found[0].notices(with_evaluation=True) == (
        "DatasetDict: training data: train; evaluation data: dev (validation split); not read: test.",
    )
    assert "not read: test/data-00000-of-00001.arrow" in told(tmp_path / "saved")
    assert [names(resolve_evaluation(data)) for data in (dataset_dict, tmp_path / "saved")] == [["dev"]] * 2
    config = load_config({}, environ={})
    assert [record.messages for record in inputs_of(config, dataset_dict).evaluation] == [
        record.messages for record in inputs_of(config, str(tmp_path / "saved")).evaluation
    ]


def test_fine_tuner_takes_a_dataset_dict_and_a_list(dataset_dict, capsys):
    report = FineTuner(dataset_dict).check()
    assert report.rows == 3
    assert report.notices == report.to_json()["notices"] or list(report.notices) == report.to_json()["notices"]
    assert "evaluation data: dev (validation split)" in capsys.readouterr().err
    assert FineTuner(rows("x")).check().notices == ()
    assert capsys.readouterr().err == ""


def test_a_dataset_dict_that_leaves_open_what_to_learn_from(tmp_path):
    several = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows(name)) for name in ("train_sft", "train_gen")}
    )
    with pytest.raises(DataError, match=r"train_sft, train_gen .*data\['train_sft'\]"):
        resolve(several)
    assert names(resolve(several["train_sft"])) == ["train_sft"]
    several.save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"several splits to learn from: train_gen, train_sft"):
        resolve(tmp_path / "saved")
    assert names(resolve(datasets.DatasetDict({"en": several["train_sft"]}))) == ["train_sft"]
    with pytest.raises(DataError, match="no rows"):
        resolve(datasets.DatasetDict({"train": datasets.Dataset.from_list([])}))


def test_a_stream_is_refused_with_the_way_out(dataset_dict):
    stream = dataset_dict["train"].to_iterable_dataset()
    with pytest.raises(DataError, match=r"stream of rows \(IterableDataset\) .*Pass list\(data\)"):
        resolve(stream)
    assert names(resolve(list(stream))) == ["train"]
    both = datasets.IterableDatasetDict({"train": stream})
    with pytest.raises(DataError, match=r"Pass list\(data\['train'\]\)"):
        resolve(both)
    assert names(resolve(list(both["train"]))) == ["train"]


def test_a_saved_dataset_is_read_through_its_state(tmp_path):
    """A cache of ``map`` in the folder holds other rows, and an older shard may have been left."""
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(rows("current", 4)).save_to_disk(saved, num_shards=2)
    (shard,) = (tmp_path / "stale").parent.glob("saved/data-00000-of-00002.arrow")
    for name in ("cache-0123456789abcdef.arrow", "data-00000-of-00001.arrow", "tmpx.arrow"):
        shutil.copy(shard, saved / name)
    loaded = datasets.load_from_disk(saved)
    assert [record.messages[0].content for record in read(saved)] == loaded["question"]
    assert "skipped as no data: cache-0123456789abcdef.arrow, data-00000-of-00001.arrow, tmpx.arrow" in told(saved)
    assert len(list(read(str(saved / "*.arrow")))) == 4
    assert len(list(read(tmp_path))) == 4  # also from a folder above
    (saved / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json names data-00001-of-00002\.arrow, missing in this folder"):
        read(saved)


def test_a_saved_dataset_dict_without_one_of_its_splits(tmp_path, dataset_dict):
    dataset_dict.save_to_disk(tmp_path / "saved")
    shutil.rmtree(tmp_path / "saved" / "dev")
    with pytest.raises(DataError, match="names the splits train, test, dev, and the folder of dev is missing"):
        resolve(tmp_path / "saved")


# ── what is no data ──────────────────────────────────────────────────────────────────────────────────────────────


def test_skipped_files_are_named_once(tmp_path, capsys):
    data = folder(tmp_path, "data/train.jsonl", "data/test.jsonl", "README.md", "NOTES.md", "LICENSE.txt")
    for name in ("LICENSE", "script.py", "data/scores.xlsx", ".gitattributes", ".git/config", "dataset_infos.json"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("{}")
    assert names(resolve(data)) == ["data/train.jsonl"]
    assert main(["check", str(data)]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "skipped as no data" in line]
    skipped = "LICENSE, LICENSE.txt, NOTES.md, README.md, data/scores.xlsx, script.py"
    assert said == f"{data}: skipped as no data: {skipped}."
    assert main(["check", str(data), "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert len(document["notices"]) == 2
    assert [notice for notice in document["notices"] if "evaluation data: data/test.jsonl (test split)" in notice]


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl", "train.txt", "train.csv"])
def test_a_clone_without_its_large_files_is_explained(tmp_path, name):
    """``git clone`` without Git LFS leaves pointers, and a pointer named ``.txt`` would be learned as a text."""
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(DataError, match=rf"{re.escape(name)}: a pointer of Git LFS, not the data.*git lfs pull"):
        resolve(tmp_path)


def test_documents_of_both_extensions_are_read_together(tmp_path):
    folder(tmp_path, "a.txt", "b.md", "sub/c.md")
    assert names(resolve(tmp_path)) == ["a.txt", "b.md", "sub/c.md"]
    assert names(resolve(str(tmp_path / "*"))) == ["a.txt", "b.md"]
    write(tmp_path / "README.md")
    assert names(resolve(tmp_path)) == ["a.txt", "b.md", "sub/c.md"]
    assert "README.md" in told(tmp_path)
    (tmp_path / "a.txt").unlink()
    assert names(resolve(tmp_path)) == ["README.md", "b.md", "sub/c.md"]


@pytest.mark.parametrize("layout", ["lines", "array"])
def test_a_text_file_of_json_objects_is_read_as_json(tmp_path, layout):
    path = tmp_path / "chats.txt"
    items = rows("x", 30)
    lines = [json.dumps(row) for row in items]
    path.write_text("\n".join([*lines, "broken"]) if layout == "lines" else json.dumps(items, indent=1))
    good = [item for item in read(path) if not isinstance(item, list)]
    assert [record.messages[0].content for record in good] == [row["question"] for row in items]
    assert f"{path}: read as {'JSON Lines, because' if layout == 'lines' else 'a JSON array'}" in told(path)
    write(tmp_path / "more.jsonl") if layout == "lines" else write(tmp_path / "more.json").write_text("[]")
    assert resolve(tmp_path).container == ("jsonl" if layout == "lines" else "json")


@pytest.mark.parametrize(
    "text", ["[Chorus]\nla la", "{not json}\n", "{\n", '"a": 1', "[1, 2]", '{"a": 1}\nprose\nmore\nand more']
)
def test_prose_that_looks_like_json_stays_a_document(tmp_path, text):
    (tmp_path / "d.txt").write_text(text)
    (record,) = read(tmp_path / "d.txt")
    assert record.text == text.rstrip("\n")
    assert told(tmp_path / "d.txt") == ""


def test_a_glob_of_several_splits_is_a_warning(tmp_path):
    folder(tmp_path, "train.jsonl", "test.jsonl", "LICENSE", "README.md")
    inputs = inputs_of(load_config({}, environ={}), str(tmp_path / "*"))
    assert names(inputs.train[0].source) == ["test.jsonl", "train.jsonl"]
    (warning,) = inputs.warnings
    assert "files of the splits test and train are all read as one" in warning
    assert warning.endswith(f"Name the training files alone: {tmp_path / 'train.jsonl'}.")
    assert inputs.notices == (f"{tmp_path / '*'}: skipped as no data: LICENSE, README.md.",)


# ── refusals, and that what they suggest works ───────────────────────────────────────────────────────────────────


def suggestions(message: str) -> list[str]:
    """Paths and globs that a message says to take instead."""
    after = re.split(r"e\.g\. |Name one: |Name its files: |files of one: |Did you mean |There is data as ", message)[-1]
    return [shlex.split(each.rstrip("?."))[0] for each in re.split(r" or (?=['/])", after)]


REFUSED = {
    "kinds": ["a.jsonl", "b.jsonl", "c.csv"],
    "kinds in sub-folders": ["x/a.jsonl", "y/b.jsonl", "c.csv"],
    "one kind each": ["data.csv", "data.parquet"],
    "kinds of a split": ["train.jsonl", "train.csv", "test.csv"],
    "texts": ["a.txt", "b.jsonl"],
    "configurations": [
        f"{name}/{split}-00000-of-00001.parquet" for name in ("main", "socratic") for split in ("train", "test")
    ],
    "languages": ["en/train/a.jsonl", "en/test/a.jsonl", "de/train/a.jsonl", "de/test/a.jsonl"],
    "old copy": ["train.jsonl", "test.jsonl", "old/train.jsonl", "old/test.jsonl"],
    "splits of the Hub": [
        f"data/{name}-of-00002.parquet"
        for name in ("train_sft-00000", "train_sft-00001", "train_gen-00000", "test-00000")
    ],
    "unknown splits of the Hub": ["data/en-00000-of-00001.parquet", "data/de-00000-of-00001.parquet"],
    "nothing to learn from": ["validation.jsonl", "test.jsonl"],
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("above", ["data", "it's [1] data"])
def test_a_folder_that_leaves_open_what_to_learn_from_names_what_works(tmp_path, name, above):
    data = folder(tmp_path / above, *REFUSED[name])
    with pytest.raises(DataError) as refused:
        resolve(data)
    ways = suggestions(str(refused.value))
    assert ways
    for way in ways:
        assert main(["check", way]) == 0, way


def test_files_that_are_not_there_and_what_is_named_instead(tmp_path, capsys):
    data = folder(tmp_path / "data", "chats.jsonl", "sub/a.csv", "sub/b.csv")
    (data / "chats.py").touch()
    (data / "chat.jsonl").touch()  # nearer by its name, and empty
    for wrong in ("chat.json", "subs", "*.parquet", "sub/*.jsonl", "[a-c]*.csv"):
        with pytest.raises(DataError) as missing:
            resolve(str(data / wrong))
        ways = suggestions(str(missing.value))
        assert main(["check", ways[0]]) == 0, (wrong, ways)
    with pytest.raises(DataError, match=r"The directory .*gone does not exist"):
        resolve(str(tmp_path / "gone" / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no data files in this directory\. Expected"):
        resolve(tmp_path / "empty")
    (tmp_path / "empty" / "notes.docx").touch()
    with pytest.raises(DataError, match=r"it holds notes\.docx"):
        resolve(tmp_path / "empty")


def test_the_way_out_of_a_split_that_cannot_be_read_works(tmp_path):
    data = folder(tmp_path, "train.jsonl")
    (data / "test.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError) as refused:
        inputs_of(load_config({}, environ={}), str(data))
    flags = re.findall(r"--set \S+\d", str(refused.value))[-1].split()
    assert main(["check", str(data), *flags]) == 0


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_judges_on_the_split_and_says_so(tmp_path, capsys):
    data = tmp_path / "data"
    write(data / "train.jsonl", "t", 20)
    write(data / "validation.jsonl", "v", 7)
    write(data / "test.jsonl", "x", 5)
    tuner = FineTuner(
        str(data),
        **{"model.id": "builtin:tiny", "max_steps": 1, "output.dir": str(tmp_path / "run"), "monitor.report": False},
    )
    result = tuner.train()
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert plan["choices"]["eval_rows"]["value"] == 7 if "eval_rows" in plan["choices"] else True
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["rows"], len(report["notices"])) == (20, 1)
    said = capsys.readouterr().err
    splits = "training data: train.jsonl; evaluation data: validation.jsonl (validation split); not read: test.jsonl."
    notice = f"{data}: {splits}"
    assert said.count(notice) == 1
    assert report["notices"] == [notice]
    assert result.metrics["eval_loss"] > 0
