"""Configuration: every key from every source, one order of precedence, every problem at once."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llmtune.config import RunConfig, cache_dir, load_config, resolve_key, settable_keys, store_url
from llmtune.config.aliases import ALIASES, HINTS, plain_name
from llmtune.config.aliases import VALUES as OTHER_VALUES
from llmtune.errors import ConfigError

# One value that is not the default for every key: a new key without one fails here.
VALUES = {
    "model.id": "builtin:tiny",
    "model.revision": "v2",
    "model.token": "hf_secret",
    "model.trust_remote_code": True,
    "data.path": "d.jsonl",
    "data.eval_path": "e.jsonl",
    "data.format": "chat",
    "data.columns": {"prompt": "q"},
    "data.ignore_columns": ["a", "b"],
    "data.text_rows": "lines",
    "data.max_length": 512,
    "data.sources": [{"path": "a.jsonl", "weight": 2.0, "format": "chat", "columns": {"messages": "turns"}}],
    "data.too_long": "drop",
    "data.supervise": "last",
    "data.duplicates": "drop_near",
    "data.on_bad_row": "skip",
    "data.eval_fraction": 0.2,
    "data.chat_template": "t.jinja",
    "train.preset": "highspeed",
    "train.method": "qlora",
    "train.epochs": 2.5,
    "train.max_steps": 10,
    "train.learning_rate": 1e-4,
    "train.schedule": "linear",
    "train.schedule_arguments": {"power": 2.0},
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.01,
    "train.optimizer": "adamw_torch",
    "train.optimizer_arguments": {"eps": 1e-6},
    "train.max_grad_norm": 0.3,
    "train.global_batch_size": 32,
    "train.micro_batch_size": 4,
    "train.token_budget": 2048,
    "train.precision": "bf16",
    "train.packing": True,
    "train.activation_checkpointing": True,
    "train.checkpoint_every": 2,
    "train.activation_offload": True,
    "train.compile": True,
    "train.probe": False,
    "train.device": "cpu",
    "train.num_workers": 2,
    "train.threads": 2,
    "train.seed": 7,
    "adapter.rank": 8,
    "adapter.alpha": 16,
    "adapter.dropout": 0.1,
    "adapter.targets": ["q_proj", "v_proj"],
    "adapter.quantization": "int8",
    "evaluate.every_steps": 5,
    "evaluate.base": False,
    "evaluate.metric": "exact_match",
    "evaluate.greater_is_better": True,
    "evaluate.patience": 2,
    "evaluate.min_delta": 0.01,
    "evaluate.num_samples": 1,
    "evaluate.max_new_tokens": 16,
    "evaluate.metric_rows": 8,
    "save.every_steps": 6,
    "save.keep": 4,
    "save.asynchronous": True,
    "save.compress_optimizer": True,
    "recover.resume": "never",
    "recover.restarts": 2,
    "recover.skip_budget": 5,
    "recover.rollback_budget": 1,
    "recover.spike_threshold": 6.5,
    "recover.memory_guard": False,
    "recover.hang_seconds": 60.0,
    "monitor.report": False,
    "monitor.report_to": ["tensorboard"],
    "output.dir": "out",
    "output.root": "all",
}
LEAVES = [key.split(".")[1] for key in VALUES]
SHORT = {key: leaf if LEAVES.count(leaf := key.split(".")[1]) == 1 else key for key in VALUES}


def value_of(config: RunConfig, key: str):
    group, leaf = key.split(".")
    value = getattr(getattr(config, group), leaf)
    if key == "data.sources":
        return [source.model_dump() for source in value]
    return value.get_secret_value() if key == "model.token" else list(value) if isinstance(value, tuple) else value


def load(overrides=None, **kwargs) -> RunConfig:
    return load_config(overrides, **({"environ": {}} | kwargs))


def error(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


def written(tmp_path, document) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


# ------------------------------------------------------------------ every key, every source


def test_every_key_is_covered_and_described():
    assert settable_keys().keys() == VALUES.keys()
    assert all(settable_keys().values())


@pytest.mark.parametrize("key", VALUES)
def test_a_key_can_be_set_from_everywhere(key, tmp_path):
    value, group, leaf = VALUES[key], *key.split(".")
    assert value_of(RunConfig(), key) != value if key != "model.token" else True
    text = value if isinstance(value, str) else json.dumps(value)
    configs = [
        load({key: value}),
        load({SHORT[key]: value}),
        load({group: {leaf: value}}),
        load(settings=[f"{key}={text}"]),
        load(settings=[f"{SHORT[key]}={text}"]),
        load(environ={f"LLMTUNE_{group}_{leaf}".upper(): text}),
        load(file=written(tmp_path, {group: {leaf: value}})),
        load(file=written(tmp_path, {SHORT[key]: value})),
    ]
    if SHORT[key] == leaf:
        configs.append(load(environ={f"LLMTUNE_{leaf}".upper(): text}))
    assert [value_of(config, key) for config in configs] == [value] * len(configs)


@pytest.mark.parametrize("key", VALUES)
def test_auto_means_decide_for_me(key):
    default = value_of(RunConfig(), key) if key != "model.token" else None
    if default is None:
        group, leaf = key.split(".")
        assert getattr(getattr(load({key: "auto"}), group), leaf) is None
        assert load(settings=[f"{key}=auto"]) == RunConfig()


def test_precedence(tmp_path):
    sources = {
        "environ": {"LLMTUNE_EPOCHS": "1"},
        "file": written(tmp_path, {"train": {"epochs": 2}}),
        "overrides": {"epochs": 3},
        "settings": ["epochs=4"],
    }
    for name, expected in reversed([("environ", 1), ("file", 2), ("overrides", 3), ("settings", 4)]):
        assert load(**sources).train.epochs == expected
        del sources[name]
    assert load(**sources).train.epochs is None


def test_none_and_empty_values_say_nothing(tmp_path):
    assert load({"epochs": None}, environ={"LLMTUNE_EPOCHS": ""}) == RunConfig()
    assert load(file=written(tmp_path, "train:\nadapter: {rank: 8}\n")).adapter.rank == 8
    assert load(file=written(tmp_path, "# nothing\n")) == RunConfig()
    assert load({"epochs": None}, environ={"LLMTUNE_EPOCHS": "2"}).train.epochs == 2


def test_bare_values_and_reserved_variables():
    assert load({"model": "builtin:tiny", "output": "out"}).asked() == {
        "model": {"id": "builtin:tiny"},
        "output": {"dir": "out"},
    }
    assert load(environ={"LLMTUNE_MODEL": "a/b"}).model.id == "a/b"
    assert load(environ={"LLMTUNE_STORE": "x", "LLMTUNE_CACHE": "y", "LLMTUNE_DEBUG": "1", "HOME": "z"}) == RunConfig()


def test_columns_are_keys_of_their_own(tmp_path):
    file = written(tmp_path, {"data": {"columns": {"prompt": "a", "completion": "b"}}})
    assert load(file=file, settings=["data.columns.prompt=c"]).data.columns == {"prompt": "c", "completion": "b"}
    assert load(file=file, settings=["columns.system=1"]).data.columns["system"] == "1"
    assert load({"columns": {"input": "x"}}, file=file).data.columns == {"input": "x"}
    given = {"prompt": "q"}
    load({"columns": given}, settings=["columns.completion=a"])
    assert given == {"prompt": "q"}


# ------------------------------------------------------------------ what texts mean


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4"])
def test_small_numbers_in_every_notation(text, tmp_path):
    assert load(settings=[f"learning_rate={text}"]).train.learning_rate == 1e-4
    assert load(environ={"LLMTUNE_LEARNING_RATE": text}).train.learning_rate == 1e-4
    assert load(file=written(tmp_path, f"train: {{learning_rate: {text}}}")).train.learning_rate == 1e-4
    assert load({"learning_rate": text}).train.learning_rate == 1e-4


def test_texts_stay_texts():
    settings = ["output.dir=2024", "revision=1e10", "schedule=null", "data.path=on", "chat_template=2024-01-01"]
    config = load(settings=settings)
    assert (config.output.dir, config.model.revision, config.data.path) == ("2024", "1e10", "on")
    assert (config.train.schedule, config.data.chat_template) == ("null", "2024-01-01")


def test_switches_and_lists():
    assert load(settings=["trust_remote_code=true"]).model.trust_remote_code is True
    assert load(settings=["evaluate.base=no"]).evaluate.base is False
    assert load(settings=["targets=q_proj, v_proj"]).adapter.targets == ("q_proj", "v_proj")
    assert load({"targets": "all-linear"}).adapter.targets == ("all-linear",)
    assert load(settings=["max_steps=1e3"]).train.max_steps == 1000
    assert load(settings=["epochs=null"]).train.epochs is None


SWITCHED_OFF = {
    "data.max_length": None,
    "data.eval_fraction": 0.0,
    "train.warmup_ratio": 0.0,
    "train.weight_decay": 0.0,
    "train.num_workers": 0,
    "adapter.dropout": 0.0,
    "evaluate.patience": 0,
    "evaluate.min_delta": 0.0,
    "evaluate.num_samples": 0,
    "recover.resume": "never",
    "recover.restarts": 0,
    "recover.skip_budget": 0,
    "recover.rollback_budget": 0,
    "monitor.report_to": [],
    "monitor.report": False,
    "evaluate.base": False,
    "train.packing": False,
    "train.probe": False,
}


@pytest.mark.parametrize("key", SWITCHED_OFF)
@pytest.mark.parametrize("off", ["off", "no", "false", "OFF"])
def test_off_switches_off(key, off, tmp_path):
    group, leaf = key.split(".")
    sources = [
        load(settings=[f"{key}={off}"]),
        load({key: off}),
        load({key: False}),
        load(file=written(tmp_path, f"{group}: {{{leaf}: {off}}}\n")),
        load(environ={f"LLMTUNE_{group}_{leaf}".upper(): off}),
    ]
    assert [value_of(config, key) for config in sources] == [SWITCHED_OFF[key]] * len(sources)


@pytest.mark.parametrize("value", ["0", "off", "none", "false"])
def test_patience_can_be_switched_off_and_stays_a_number_otherwise(value):
    assert load(settings=[f"evaluate.patience={value}"]).evaluate.patience == 0
    assert load(settings=[f"evaluate.patience={value}", "patience=4"]).evaluate.patience == 4
    assert load(settings=["patience=auto"]).evaluate.patience is None
    assert "evaluate.patience: got True, expected a number" in error(settings=["patience=on"])
    assert "evaluate.patience: got -1, expected an integer >= 0" in error(settings=["patience=-1"])


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("evaluate.every_steps", "an integer >= 1; data.eval_fraction=0 trains without evaluations"),
        ("save.every_steps", "an integer >= 1; checkpoints are what a stopped run continues from"),
        ("save.keep", "an integer >= 2; checkpoints are what a stopped run continues from"),
        ("train.max_grad_norm", "a number > 0; 1e9 never clips"),
        ("train.checkpoint_every", "train.activation_checkpointing=false recomputes no layer"),
        ("recover.hang_seconds", "a number > 0; 1e9 never counts a step as hung"),
        ("recover.spike_threshold", "a number > 0; 1e9 never counts an update as a spike"),
    ],
)
@pytest.mark.parametrize("off", ["off", "none", "0"])
def test_what_cannot_be_switched_off_says_what_to_do(key, says, off):
    message = error(settings=[f"{key}={off}"])
    assert message.startswith(f"--set: {key}: got ")
    assert f"expected {says}" in message or says in message


def test_a_value_may_hold_an_equals_sign():
    assert load(settings=["data.path=a=b.jsonl"]).data.path == "a=b.jsonl"


# ------------------------------------------------------------------ problems


def test_the_shape_of_the_message(tmp_path):
    file = written(tmp_path, {"train": {"learing_rate": 1e-4}, "data": {"max_length": -1}})
    assert error(file=file) == (
        f"{file}: 2 problems. train.learing_rate: unknown key, did you mean 'learning_rate'? · "
        "data.max_length: got -1, expected an integer >= 16."
    )


def test_each_problem_names_its_source(tmp_path):
    file = written(tmp_path, {"train": {"epochs": -1}, "save": {"keep": 2}})
    message = error(
        {"rank": 0, "prset": "x"},
        file=file,
        settings=["seed=-1", "keep=1"],
        environ={"LLMTUNE_EPOHCS": "1", "LLMTUNE_ADAPTER_DROPOUT": "2"},
        where="FineTuner",
    )
    assert message.startswith("configuration: 7 problems. ")
    for text in (
        "LLMTUNE_EPOHCS: epohcs: unknown key, did you mean 'epochs'?",
        "LLMTUNE_ADAPTER_DROPOUT: adapter.dropout: got 2, expected a number < 1",
        f"{file}: train.epochs: got -1, expected a number > 0",
        "FineTuner: adapter.rank: got 0, expected an integer >= 1",
        "FineTuner: prset: unknown key, did you mean 'preset'?",
        "--set: train.seed: got -1, expected an integer >= 0",
        "--set: save.keep: got 1, expected an integer >= 2",
    ):
        assert text in message


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("epochs", "got 'epochs', expected key=value"),
        ("=3", "got '', expected key=value"),
        ("every_steps=3", "stands in several groups, give one of evaluate.every_steps, save.every_steps"),
        ("train=3", "is a group; give one of its keys, such as 'train.preset'"),
        ("train.epochs.x=3", "'train.epochs' has no keys below it"),
        ("zzz=1", "unknown key, known are model.*, data.*, train.*"),
        ("method=loar", "train.method: got 'loar', expected 'lora', 'qlora' or 'full'"),
        ("epochs=many", "train.epochs: got 'many', expected a number"),
        ("epochs=nan", "train.epochs: got nan, expected a finite number"),
        ("max_steps=2.5", "train.max_steps: got 2.5, expected an integer"),
        ("rank=true", "adapter.rank: got True, expected a number"),
        ("evaluate.base=perhaps", "evaluate.base: got 'perhaps', expected true or false"),
        ("targets=[]", "adapter.targets: got [], expected a list that is not empty"),
        ("targets=3", "adapter.targets: got 3, expected a list"),
        ("data.columns=x", "data.columns: got 'x', expected a mapping"),
        ("model.id=", "model.id: got '', expected a text that is not empty"),
    ],
)
def test_each_mistake_is_explained(setting, says):
    message = error(settings=[setting])
    assert message.startswith("--set: ")
    assert says in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "holds no keys"),
        ("train: {epochs: 1", "is not valid YAML"),
        ("1: 2\n", "holds no keys"),
        ("train: {epochs: 1, epochs: 2}\n", "'epochs' is given twice"),
        ("train: {epochs: 1}\nepochs: 2\n", "train.epochs: is given twice"),
        ("train: 3\n", "train: is a group"),
        ("output: {dir: 2024}\n", "output.dir: got 2024, expected a text; quote it in YAML"),
        ("data: {path: 2024-13-45}\n", "expected a text|not valid YAML"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, says):
    file = written(tmp_path, text)
    message = error(file=file)
    assert message.startswith(f"{file}: ")
    assert any(part in message for part in says.split("|")) or "2024-13-45" in text


def test_files_that_cannot_be_read(tmp_path):
    assert "no such file" in error(file=tmp_path / "none.yaml")
    assert "cannot be read" in error(file=tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in error(file=tmp_path / "x.yaml")


def test_an_overridden_value_is_not_judged(tmp_path):
    assert load({"epochs": 1}, file=written(tmp_path, {"epochs": -1})).train.epochs == 1


def test_resolve_key():
    assert resolve_key("epochs") == resolve_key("train.epochs") == "train.epochs"
    assert resolve_key("columns.prompt") == "data.columns.prompt"
    with pytest.raises(ValueError, match="did you mean"):
        resolve_key("trian.epochs")


# ------------------------------------------------------------------ names of other toolkits

# What people type -> the key that it is read as; a name without one is answered with a hint.
TYPED = {
    "lr": "train.learning_rate",
    "learning-rate": "train.learning_rate",
    "Learning_Rate": "train.learning_rate",
    "train.lr": "train.learning_rate",
    "num_train_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "optim": "train.optimizer",
    "gradient_checkpointing": "train.activation_checkpointing",
    "weight_decay": "train.weight_decay",
    "warmup_ratio": "train.warmup_ratio",
    "max_grad_norm": "train.max_grad_norm",
    "packing": "train.packing",
    "seed": "train.seed",
    "max_steps": "train.max_steps",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "r": "adapter.rank",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "target_modules": "adapter.targets",
    "lora_target_modules": "adapter.targets",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "dataset": "data.path",
    "model_name": "model.id",
    "model_name_or_path": "model.id",
    "output_dir": "output.dir",
    "eval_steps": "evaluate.every_steps",
    "save_steps": "save.every_steps",
    "early_stopping_patience": "evaluate.patience",
    "batch_size": None,
    "per_device_train_batch_size": None,
    "gradient_accumulation_steps": None,
    "warmup_steps": None,
    "save_total_limit": None,
    "logging_steps": None,
    "bf16": None,
    "fp16": None,
    "load_in_4bit": None,
    "load_in_8bit": None,
    "neftune_noise_alpha": None,
    "adam": None,
    "adamw": None,
    "sgd": None,
}


@pytest.mark.parametrize("name", TYPED)
def test_names_that_people_type(name):
    key = TYPED[name]
    if key is not None:
        assert resolve_key(name) == key
        return
    hint = HINTS[name]
    message = error(settings=[f"{name}=1"])
    assert message.rstrip(".") == f"--set: {name}: is not a key of llmtune; {hint}"
    group = error(settings=[f"train.{name}=1"])
    assert hint in group
    assert "did you mean" not in message + group


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_works_from_everywhere(name, tmp_path):
    key = ALIASES[name].key
    value = VALUES[key]
    text = value if isinstance(value, str) else json.dumps(value)
    expected = load({key: value})
    found = {
        "FineTuner": load({name: value}, where="FineTuner"),
        "--set": load(settings=[f"{name}={text}"]),
        "run.yaml": load(file=written(tmp_path, {name: value})),
        "LLMTUNE_": load(environ={f"LLMTUNE_{name}".upper(): text}),
        "LLMTUNE_GROUP": load(environ={f"LLMTUNE_{key.split('.')[0]}_{name}".upper(): text}),
        "group": load({f"{key.split('.')[0]}.{name}": value}),
    }
    for source, config in found.items():
        assert config == expected, source
        (note,) = config.origin.notes
        assert f"is read as {key}" in note
        assert note.endswith(ALIASES[name].remark)
    with pytest.raises(ConfigError, match=f"did you mean '{re.escape(key)}'"):
        load({("data" if key.startswith("adapter") else "adapter") + f".{name}": value})


@pytest.mark.parametrize("name", HINTS)
def test_a_hint_names_keys_that_exist_and_nothing_else(name, tmp_path):
    for message in (
        error({name: 1}),
        error(settings=[f"{name}=1"]),
        error(file=written(tmp_path, {name: 1})),
        error(environ={f"LLMTUNE_{name}".upper(): "1"}),
    ):
        assert HINTS[name] in message
        assert "unknown key" not in message
    for key in re.findall(r"\b(?:" + "|".join(RunConfig.model_fields) + r")\.[a-z_.]*[a-z_]", HINTS[name]):
        assert resolve_key(key) == key


def test_names_of_other_toolkits_hide_no_key_of_ours():
    ours = {*RunConfig.model_fields, *(key.split(".")[1] for key in settable_keys())}
    assert not ours & {*ALIASES, *HINTS}
    assert not ALIASES.keys() & HINTS.keys()
    assert {alias.key for alias in ALIASES.values()} <= settable_keys().keys()
    assert all(plain_name(name) == name for name in [*ALIASES, *HINTS])


def test_a_typing_mistake_in_another_toolkits_name_gets_its_hint():
    assert "did you mean 'adapter.rank'?" in error(settings=["lora_rnak=1"])
    assert HINTS["gradient_accumulation_steps"] in error(settings=["gradient_accumulation_step=1"])


def test_a_limit_of_the_length_says_what_it_does_not_do():
    (note,) = load({"max_seq_length": 512}).origin.notes
    assert note == (
        "command line: max_seq_length is read as data.max_length; rows that are longer are refused, unless "
        "data.too_long says how they are cut or dropped"
    )


def test_values_by_other_names():
    for key, names in OTHER_VALUES.items():
        for name, value in names.items():
            config = load({key: name})
            assert value_of(config, key) == value
            (note,) = config.origin.notes
            assert f"{key}: {name} is read as {value}" in note
            assert config.identity_hash() == load({key: value}).identity_hash()
    assert load({"optimizer": "AdamW"}).train.optimizer == "adamw_torch_fused"
    assert load({"optimizer": "SGD"}).train.optimizer == "sgd"
    assert load({"precision": "BF16"}).train.precision == "bf16"
    (note,) = load({"optimizer": "adam"}).origin.notes
    assert note.endswith("transformers has no Adam with the weight decay in the gradient")
    assert load({"optimizer": "adamw"}, settings=["optimizer=sgd"]).origin.notes == ()


# ------------------------------------------------------------------ several files, and environments in them


def files(tmp_path, **documents) -> list[str]:
    paths = []
    for name, document in documents.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(document))
        paths.append(str(path))
    return paths


def test_later_files_win_and_say_so(tmp_path):
    a, b, c = files(
        tmp_path,
        a={"train": {"epochs": 1, "seed": 7}, "adapter": {"rank": 8}},
        b={"epochs": 3, "rank": 8, "learning_rate": 1e-4},
        c={"train": {"epochs": 4}},
    )
    config = load(file=[a, b])
    assert (config.train.epochs, config.train.seed, config.adapter.rank) == (3, 7, 8)
    assert config.train.learning_rate == 1e-4
    assert config.origin.files == (a, b)
    assert config.origin.notes == (f"train.epochs: 3 of {b} replaces 1 of {a}",)
    assert load(file=[a, b, c]).origin.notes == (f"train.epochs: 4 of {c} replaces 3 of {b} and 1 of {a}",)
    assert load(file=[b, a]).train.epochs == 1
    decided_elsewhere = load({"epochs": 9}, file=[a, b])
    assert (decided_elsewhere.train.epochs, decided_elsewhere.origin.notes) == (9, ())


def test_files_and_flags_keep_their_order_of_precedence(tmp_path):
    a, b = files(tmp_path, a={"epochs": 1, "environments": {"dev": {"epochs": 2}}}, b={"epochs": 3})
    environ = {"LLMTUNE_EPOCHS": "9", "LLMTUNE_SEED": "5"}
    assert load(file=a, environ=environ).train.epochs == 1
    assert load(file=a, env="dev", environ=environ).train.epochs == 2
    assert load(file=[a, b], env="dev", environ=environ).train.epochs == 3
    assert load(file=[b, a], env="dev", environ=environ).train.epochs == 2
    assert load(file=a, env="dev", environ=environ, settings=["epochs=4"]).train.epochs == 4
    assert load(file=a, env="dev", environ=environ).train.seed == 5


ENVIRONMENTS = {
    "train": {"epochs": 3, "seed": 1},
    "environments": {"dev": {"train": {"epochs": 1}, "max_steps": 5}, "test": None, "prod": {"rank": 64}},
}


def test_an_environment_is_put_on_top_of_its_file(tmp_path):
    (file,) = files(tmp_path, run=ENVIRONMENTS)
    plain, dev, test = (load(file=file, env=env) for env in (None, "dev", "test"))
    assert (plain.train.epochs, plain.train.max_steps, plain.adapter.rank) == (3, None, None)
    assert (dev.train.epochs, dev.train.max_steps, dev.train.seed) == (1, 5, 1)
    assert dev.origin.notes == (f"train.epochs: 1 of {file} (environments.dev) replaces 3 of {file}",)
    assert test == plain
    assert (plain.origin.env, dev.origin.env) == (None, "dev")
    assert load(file=file, environ={"LLMTUNE_ENV": "prod"}).adapter.rank == 64
    assert load(file=file, env="dev", environ={"LLMTUNE_ENV": "prod"}).adapter.rank is None


def test_an_environment_that_does_not_exist_is_an_error(tmp_path):
    file, without = files(tmp_path, run=ENVIRONMENTS, without={"epochs": 1})
    assert error(file=file, env="prd") == "--env: got 'prd', expected dev or prod or test, did you mean 'prod'?"
    assert error(file=file, environ={"LLMTUNE_ENV": "x"}) == "LLMTUNE_ENV: got 'x', expected dev or prod or test."
    assert f"{without} has no `environments`" in error(file=without, env="dev")
    assert "no configuration file was given" in error(env="dev")
    assert load(environ={"LLMTUNE_ENV": "dev"}) == RunConfig()  # without files there is nothing to choose from
    assert load(file=[without, file], env="dev").train.max_steps == 5


@pytest.mark.parametrize("env", [None, "dev", "prod"])
def test_every_environment_is_checked_whichever_is_chosen(tmp_path, env):
    wrong = {"dev": {"train": {"epchs": 1}}, "prod": {"ran": 8, "epochs": -1}}
    (file,) = files(tmp_path, run={"environments": wrong})
    message = error(file=file, env=env)
    assert f"{file} (environments.dev): train.epchs: unknown key, did you mean 'epochs'?" in message
    assert f"{file} (environments.prod): ran: unknown key, did you mean 'rank'?" in message
    assert f"{file} (environments.prod): train.epochs: got -1, expected a number > 0" in message
    assert message.count("epochs: got -1") == 1


@pytest.mark.parametrize(
    ("environments", "says"),
    [
        (["dev"], "environments: expected a mapping"),
        ({1: {}}, "environments: expected a mapping"),
        ({"dev": 3}, "environments.dev: got 3, expected a mapping of keys"),
        ({"dev": {"environments": {"x": {}}}}, "environments: unknown key"),
    ],
)
def test_environments_that_are_no_mappings_are_refused(tmp_path, environments, says):
    (file,) = files(tmp_path, run={"environments": environments})
    assert says in error(file=file)


def test_a_token_is_not_named_when_files_disagree(tmp_path):
    a, b = files(tmp_path, a={"token": "hf_first"}, b={"token": "hf_second"})
    config = load(file=[a, b])
    assert config.model.token.get_secret_value() == "hf_second"
    assert config.origin.notes == (f"model.token: a secret of {b} replaces a secret of {a}",)


def test_where_a_configuration_came_from_does_not_make_it_another_one(tmp_path):
    (file,) = files(tmp_path, run={"train": {"epochs": 3}})
    assert load(file=file) == load({"epochs": 3})
    assert load(file=file).identity_hash() == load({"epochs": 3}).identity_hash()
    assert load(file=file).model_copy(update={"train": RunConfig().train}).origin.files == (file,)


# ------------------------------------------------------------------ frozen, secret, comparable


def test_a_configuration_is_frozen_and_closed():
    config = load({"targets": ["q_proj"]})
    with pytest.raises(ValidationError):
        config.train.epochs = 3
    with pytest.raises(ValidationError):
        config.train = None
    with pytest.raises(ValidationError):
        RunConfig.model_validate({"train": {"epochz": 3}})


def test_the_token_is_never_shown():
    config = load({"token": "hf_secret"})
    for text in (repr(config), str(config), json.dumps(config.to_json()), str(config.asked()), f"{config.model}"):
        assert "hf_secret" not in text
    assert config.model.token.get_secret_value() == "hf_secret"
    for message in (
        error({"token": ["hf_secret"]}),
        error({"model": {"token": {"a": "hf_secret"}}}),
        error({"token": 12345}),
        error(settings=["model.token:hf_secret"]),
        error({"model.token": "hf_secret", "epochs": -1}),
    ):
        assert "hf_secret" not in message
        assert "12345" not in message


def test_mistakes_in_a_mix_are_all_told():
    assert error({"sources": [{"paht": "a"}, {"path": "b", "weight": -1}]}) == (
        "command line: 3 problems. data.sources.0.path: is missing · data.sources.0.paht: unknown key, did you mean "
        "'path'? · data.sources.1.weight: got -1, expected a number > 0."
    )


def test_the_identity_is_what_decides_the_result():
    base = load().identity_hash()
    for same in ({"dir": "x"}, {"root": "y"}, {"resume": "never"}, {"report": False}, {"token": "hf"}, {"path": "d"}):
        assert load(same).identity_hash() == base
    source = {"path": "a", "weight": 2.0}
    assert load({"sources": [source]}).identity_hash() == load({"sources": [source | {"path": "b"}]}).identity_hash()
    assert load({"sources": [source]}).identity_hash() != load({"sources": [source | {"weight": 1}]}).identity_hash()
    for other in ({"seed": 1}, {"epochs": 1}, {"model": "a"}, {"rank": 2}, {"columns": {"prompt": "x"}}):
        assert load(other).identity_hash() != base


def test_to_json_is_complete_and_loads_again():
    config = load({key: value for key, value in VALUES.items() if key != "model.token"})
    document = json.loads(json.dumps(config.to_json()))
    assert load(document) == config
    assert {f"{g}.{leaf}" for g, leaves in document.items() for leaf in leaves} == VALUES.keys() - {"model.token"}


NAMES = st.text(min_size=1, max_size=12)
NUMBERS = {
    "train.epochs": st.floats(1e-6, 1e4),
    "train.learning_rate": st.floats(1e-12, 1),
    "train.max_steps": st.integers(1, 10**9),
    "train.seed": st.integers(0, 2**32 - 1),
    "adapter.dropout": st.floats(0, 1, exclude_max=True),
    "data.max_length": st.integers(16, 10**6),
    "evaluate.base": st.booleans(),
    "train.activation_checkpointing": st.booleans(),
    "train.checkpoint_every": st.integers(1, 8),
    "train.activation_offload": st.booleans(),
    "train.compile": st.booleans(),
    "train.probe": st.booleans(),
}
TEXTS = dict.fromkeys(
    ["model.id", "model.revision", "data.path", "data.chat_template", "train.schedule", "output.dir", "output.root"],
    NAMES,
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional=NUMBERS
    | TEXTS
    | {
        "data.columns": st.dictionaries(NAMES, NAMES, max_size=3),
        "adapter.targets": st.lists(NAMES, min_size=1, max_size=3),
        "train.method": st.sampled_from(["lora", "qlora", "full"]),
        "train.preset": st.sampled_from(["highspeed", "quality", "bestaccuracy"]),
    },
)


@settings(max_examples=80, deadline=None)
@given(asked=CONFIGS)
def test_what_was_asked_survives_yaml(asked, tmp_path_factory):
    config = load(asked)
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(yaml.safe_dump(config.asked()), encoding="utf-8")
    again = load(file=path)
    assert again == config
    assert again.identity_hash() == config.identity_hash()


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=30))
def test_any_text_is_a_value_or_one_clear_error(text):
    def message(setting: str) -> str | None:
        try:
            load(settings=[setting])
        except ConfigError as problem:
            return str(problem)
        return None

    for key in ("epochs", "data.path", "targets", "report", "columns", "token"):
        said = message(f"{key}={text}")
        assert said is None or said.startswith("--set: ")


# ------------------------------------------------------------------ places


def test_cache_and_store(monkeypatch, tmp_path):
    for name in ("LLMTUNE_CACHE", "XDG_CACHE_HOME", "LLMTUNE_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "llmtune"
    assert store_url() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_dir()) == "/x/llmtune"
    monkeypatch.setenv("LLMTUNE_CACHE", "/c")
    assert str(cache_dir()) == "/c"
    monkeypatch.setenv("LLMTUNE_STORE", "postgresql://h/d")
    assert store_url() == "postgresql://h/d"
