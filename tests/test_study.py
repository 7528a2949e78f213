import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.config import load_config
from llmtune.errors import ConfigError, LlmtuneError, MissingExtraError, OutputError, Preempted
from llmtune.runs import RunDirectory
from llmtune.study import Dimension, Study, StudyResult, TrialRecord, default_space, read_space
from llmtune.study.space import grid

ROWS = [
    {"prompt": f"Say the number {word}.", "completion": f"The number is {word}."}
    for word in ("one", "two", "three", "four", "five", "six")
]
# Two updates per trial, each followed by an evaluation.
SHORT = {
    "model": "builtin:tiny",
    "max_steps": 2,
    "global_batch_size": 2,
    "eval_fraction": 0.3,
    "evaluate.every_steps": 1,
    "save.every_steps": 1,
}
PRESET = {"train.learning_rate": 1e-3, "train.weight_decay": 0.0, "adapter.rank": 16, "adapter.dropout": 0.0}
PLANNED = PRESET | {"adapter.rank": 8}  # so few supervised tokens do not fill the preset's 16


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A study of two trials and the directory it is in."""
    output = tmp_path_factory.mktemp("studies") / "numbers"
    return Study(data, trials=2, output=output, **SHORT).run()


@contextmanager
def stored(study_dir):
    """Optuna's own view of a study, as another program would open it."""
    import optuna

    storage = optuna.storages.RDBStorage(f"sqlite:///{study_dir / 'study.db'}")
    try:
        yield optuna.load_study(study_name=study_dir.name, storage=storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


# ---------------------------------------------------------------------- space


def test_default_space_surrounds_the_preset():
    space = {d.key: d for d in default_space(PRESET, full=False, fixed=[])}
    assert set(space) == set(PRESET)
    assert (space["train.learning_rate"].low, space["train.learning_rate"].high) == pytest.approx((2e-4, 5e-3))
    assert space["train.learning_rate"].log
    assert space["adapter.rank"].choices == (4, 8, 16, 32, 64)
    assert all(space[key].contains(value) for key, value in PRESET.items())


def test_full_fine_tuning_has_no_adapter_to_search():
    space = default_space(PRESET, full=True, fixed=[])
    assert [d.key for d in space] == ["train.learning_rate", "train.weight_decay"]


def test_what_the_user_set_is_not_searched():
    space = default_space(PRESET, full=False, fixed=["adapter.rank", "model.id"])
    assert "adapter.rank" not in [d.key for d in space]
    with pytest.raises(ConfigError, match="nothing is left to search"):
        default_space(PRESET, full=False, fixed=list(PRESET))


def test_space_file_takes_leaves_groups_and_numbers_that_yaml_reads_as_text(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text("learning_rate: {low: 1e-4, high: 1e-2, log: true}\nadapter: {rank: {choices: [8, 16]}}\n")
    rate, rank = read_space(file)
    assert (rate.key, rate.low, rate.high, rate.log) == ("train.learning_rate", 1e-4, 1e-2, True)
    assert (rank.key, rank.choices, rank.integer) == ("adapter.rank", (8, 16), True)


def test_every_problem_of_a_space_is_told_at_once():
    space = {
        "learning_rat": {"low": 1, "high": 2},
        "rank": {"low": 8.5, "high": 4},
        "dropout": {"low": 0, "high": 0.1, "step": 0.01, "log": True},
        "weight_decay": {"lo": 0, "high": 1},
        "warmup_ratio": {"choices": [0.1, 1.5]},
        "schedule": {"choices": ["cosine"]},
        "data.max_length": {"low": 64, "high": 128},
        "epochs": 3,
        "max_grad_norm": {"low": "much", "high": 2},
    }
    with pytest.raises(ConfigError) as caught:
        read_space(space)
    text = str(caught.value)
    for part in (
        "learning_rat: unknown key, did you mean 'learning_rate'?",
        "rank: low: got 8.5, expected less than high (4)",
        "rank: is a whole number",
        "dropout: low: got 0, expected more than 0 with log",
        "dropout: step and log exclude each other",
        "weight_decay: 'lo' is unknown, did you mean 'low'?",
        "warmup_ratio: got 1.5, expected a number < 1",
        "schedule: is no number",
        "data.max_length: all trials share it",
        "epochs: got 3, expected {low",
        "max_grad_norm: low: got 'much', expected a number",
    ):
        assert part in text, part


@pytest.mark.parametrize("text", ["", "- a\n", "{:", "learning_rate: {low: 1, high: .inf}"])
def test_unusable_space_files_are_refused(tmp_path, text):
    file = tmp_path / "space.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"space\.yaml"):
        read_space(file)
    with pytest.raises(ConfigError, match="no such file"):
        read_space(tmp_path / "missing.yaml")


ranges = st.tuples(st.floats(1e-6, 0.5), st.floats(0.51, 1.0), st.booleans()).map(
    lambda t: Dimension(key="train.weight_decay", integer=False, low=t[0], high=t[1], log=t[2])
)
steps = st.tuples(st.integers(1, 50), st.integers(51, 100), st.integers(1, 60)).map(
    lambda t: Dimension(key="adapter.rank", integer=True, low=t[0], high=t[1], step=t[2])
)
choices = st.lists(st.integers(1, 99), min_size=1, unique=True).map(
    lambda values: Dimension(key="adapter.rank", integer=True, choices=tuple(values))
)


@given(st.one_of(ranges, steps, choices))
def test_points_lie_in_the_dimension_and_json_keeps_it(dimension):
    assert all(dimension.contains(point) for point in dimension.points())
    assert Dimension.from_json(json.loads(json.dumps(dimension.to_json()))) == dimension


def test_grid_has_every_combination_once():
    space = read_space({"rank": {"choices": [4, 8]}, "dropout": {"low": 0, "high": 0.1, "step": 0.05}})
    points = grid(space, seed=1)
    assert len(points) == 6
    assert len({tuple(sorted(point.items())) for point in points}) == 6
    assert points == grid(space, seed=1)


# ---------------------------------------------------------------------- arguments and result


def test_arguments_are_refused_together(data):
    with pytest.raises(ConfigError, match=r"did you mean 'tpe'.*known: median, none.*trials: got 0"):
        Study(data, sampler="tpee", pruner="x", trials=0)
    with pytest.raises(ConfigError, match="did you mean 'learning_rate'"):
        Study(data, learing_rate=1)


def test_gaussian_process_sampler_names_the_package_it_needs(data):
    from importlib.util import find_spec

    if find_spec("scipy") is not None:
        pytest.skip("scipy is installed")
    with pytest.raises(MissingExtraError, match="scipy"):
        Study(data, sampler="gp")


@pytest.mark.parametrize(
    ("greater", "default", "best", "improvement"),
    [(False, 2.0, 1.5, 0.25), (True, 0.5, 0.75, 0.5), (False, 2.0, 2.0, 0.0), (False, 0.0, 0.0, None)],
)
def test_improvement_is_positive_when_better(tmp_path, greater, default, best, improvement):
    trials = tuple(
        TrialRecord(number=n, state="complete", value=v, params={}, run_dir=tmp_path, reason=None)
        for n, v in enumerate((default, best))
    )
    result = StudyResult(
        study="s",
        dir=tmp_path,
        metric="m",
        trials=trials,
        best=trials[1],
        default=trials[0],
        greater_is_better=greater,
        config_path=tmp_path / "best.yaml",
    )
    assert result.improvement == improvement
    assert result.to_json()["improvement"] == improvement


# ---------------------------------------------------------------------- real studies


def test_trial_0_is_what_train_would_do(finished):
    assert finished.default.params == PLANNED
    plan = RunDirectory.open(finished.default.run_dir).latest_plan()["choices"]
    assert {key: plan[key.split(".")[1]]["value"] for key in PLANNED} == PLANNED
    assert plan["alpha"]["value"] == 16


def test_result_has_the_keys_of_the_contract(finished):
    document = finished.to_json()
    assert document["study"] == "numbers"
    assert document["trials"] == len(document["trial_list"]) == 2
    assert document["best"]["value"] <= document["default"]["value"]
    assert document["improvement"] >= 0
    assert [trial["state"] for trial in document["trial_list"]] == ["complete", "complete"]
    assert "2 trials" in finished.text
    assert len(finished.rows()) == 2


def test_value_is_the_runs_best_evaluation(finished):
    for trial in finished.trials:
        run = RunDirectory.open(trial.run_dir)
        assert run.run["status"] == "finished"
        assert trial.value == min(event["eval_loss"] for event in run.evaluations())
        assert not run.report.exists()


def test_best_yaml_is_a_configuration_with_the_best_parameters(finished, data):
    config = load_config(file=finished.config_path, environ={})
    assert config.data.path == str(data)
    assert config.model.id == "builtin:tiny"
    assert config.train.method == "lora"
    assert config.train.max_steps == 2
    assert config.output.dir is None
    assert config.evaluate.base
    for key, value in finished.best.params.items():
        group, leaf = key.split(".")
        assert getattr(getattr(config, group), leaf) == value


def test_the_same_command_adds_nothing_to_a_finished_study(finished, data):
    again = Study(data, trials=2, output=finished.dir, **SHORT).run()
    assert again == finished


def test_a_study_of_another_identity_is_refused(finished, data):
    with pytest.raises(OutputError, match=r"holds another study.*config differs"):
        Study(data, trials=2, output=finished.dir, **SHORT | {"max_steps": 3}).run()
    with pytest.raises(OutputError, match="holds a run, not a study"):
        Study(data, trials=2, output=finished.best.run_dir, **SHORT).run()


def test_a_second_process_is_refused(finished, data):
    code = "import sys; from llmtune.runs.lock import hold; from pathlib import Path\n"
    code += "with hold(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(finished.dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match=f"process {other.pid}"):
            Study(data, trials=2, output=finished.dir, **SHORT).run()
        other.communicate("")


def test_a_trial_that_ran_with_other_numbers_is_noticed(finished, tmp_path):
    import shutil

    from llmtune.study.readback import read_back

    copy = tmp_path / "run"
    shutil.copytree(finished.trials[1].run_dir, copy)
    params = finished.trials[1].params
    read_back(RunDirectory.open(copy), params)
    with pytest.raises(LlmtuneError, match=r"train\.learning_rate: asked"):
        read_back(RunDirectory.open(copy), {**params, "train.learning_rate": params["train.learning_rate"] * 1.01})

    adapter = copy / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"lora_alpha": 1}))
    with pytest.raises(LlmtuneError, match=r"adapter\.alpha: asked \d+, adapter has 1"):
        read_back(RunDirectory.open(copy), params)

    events = copy / "events.jsonl"
    events.write_text(events.read_text().replace('"learning_rate": ', '"learning_rate": 1'))
    with pytest.raises(LlmtuneError, match="events have"):
        read_back(RunDirectory.open(copy), params)


def test_nothing_is_left_behind_when_nothing_can_be_tried(data, tmp_path):
    with pytest.raises(ConfigError, match="no rows are held out"):
        Study(data, output=tmp_path / "a" / "b", **SHORT | {"eval_fraction": 0.0}).run()
    with pytest.raises(ConfigError, match="database URL"):
        Study(data, storage="nonsense", output=tmp_path / "a" / "b", **SHORT).run()
    with pytest.raises(ConfigError, match="has no adapter"):
        Study(data, space={"rank": {"choices": [8]}}, method="full", output=tmp_path / "a" / "b", **SHORT).run()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_trial_that_does_not_fit_is_a_result_and_a_grid_ends(data, tmp_path):
    space = {"rank": {"choices": [8, 100_000_000]}}
    result = Study(data, trials=5, sampler="grid", space=space, output=tmp_path / "s", **SHORT).run()
    assert [trial.state for trial in result.trials] == ["complete", "failed"]
    assert "are free on" in result.trials[1].reason
    assert result.best.number == 0


@pytest.mark.slow
def test_best_yaml_trains_to_the_same_value(finished, tmp_path):
    from llmtune import FineTuner

    result = FineTuner(config=finished.config_path, output=str(tmp_path / "run")).train()
    assert result.metrics["eval_loss"] == finished.best.value


@pytest.mark.slow
def test_a_preset_outside_the_space_is_still_trial_0(data, tmp_path):
    space = {"learning_rate": {"low": 1e-4, "high": 5e-4, "log": True}, "rank": {"choices": [2, 4]}}
    result = Study(data, trials=2, space=space, output=tmp_path / "s", **SHORT).run()
    assert result.default.params == {"train.learning_rate": 1e-3, "adapter.rank": PLANNED["adapter.rank"]}
    assert 1e-4 <= result.trials[1].params["train.learning_rate"] <= 5e-4
    assert result.trials[1].params["adapter.rank"] in (2, 4)


@pytest.mark.slow
def test_a_trial_that_falls_behind_is_pruned(data, tmp_path):
    import optuna

    output = tmp_path / "s"
    first = Study(data, trials=1, output=output, **SHORT).run()
    with stored(output) as study:
        for _ in range(5):  # five trials that are better than any can be
            study.add_trial(
                optuna.trial.create_trial(
                    value=0.0,
                    params=study.trials[0].params,
                    distributions=study.trials[0].distributions,
                    intermediate_values={1: 0.0, 2: 0.0},
                    user_attrs=study.trials[0].user_attrs,
                )
            )
    result = Study(data, trials=7, output=output, **SHORT).run()
    pruned = result.trials[6]
    assert pruned.state == "pruned"
    assert pruned.number == 6
    run = RunDirectory.open(pruned.run_dir)
    assert run.run["status"] == "finished"
    assert [event["step"] for event in run.steps()] == [1]
    assert [event["reason"][:6] for event in run.events() if event["event"] == "early_stop"] == ["pruned"]
    assert run.final is not None
    assert result.default.value == first.default.value


@pytest.mark.slow
def test_a_dead_trial_is_continued_with_its_number_parameters_and_decision(data, tmp_path):
    output = tmp_path / "s"
    Study(data, trials=1, output=output, **SHORT).run()
    with stored(output) as study:  # a process that died after its trial was to be pruned
        trial = study.ask({"train.learning_rate": study.trials[0].distributions["train.learning_rate"]})
        rate = trial.params["train.learning_rate"]
        trial.set_user_attr("pruned_at", 1)
    result = Study(data, trials=2, output=output, **SHORT).run()
    assert [trial.number for trial in result.trials] == [0, 1]
    assert result.trials[1].state == "pruned"
    assert result.trials[1].params["train.learning_rate"] == rate
    assert set(result.trials[1].params) == set(PRESET)
    assert len(RunDirectory.open(result.trials[1].run_dir).steps()) == 1


@pytest.mark.slow
def test_a_signal_stops_the_study_and_the_same_command_continues_it(data, tmp_path):
    evaluations = []

    def measure(answers, references):
        evaluations.append(answers)
        if len(evaluations) == 7:  # the first evaluation of trial 1, each begun with a rehearsal
            os.kill(os.getpid(), signal.SIGTERM)
        return 0.0

    settings = SHORT | {"max_steps": 4, "max_new_tokens": 1, "metrics": {"zero": measure}}
    with pytest.raises(Preempted, match=r"stopped in trial 1; 1 of 2 trials are done") as caught:
        Study(data, trials=2, output=tmp_path / "s", **settings).run()
    assert caught.value.exit_code == 75
    result = Study(data, trials=2, output=tmp_path / "s", **settings).run()
    assert [(trial.number, trial.state) for trial in result.trials] == [(0, "complete"), (1, "complete")]
    resumed = [e for e in RunDirectory.open(result.trials[1].run_dir).events() if e["event"] == "run_started"]
    assert resumed[-1]["resumed_from"]


PROGRAM = """
import json, sys
from llmtune.study import Study

if __name__ == "__main__":
    data, output, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    print(json.dumps(Study(data, trials=4, output=output, **settings).run().to_json()))
"""


def _start(tmp_path, data, output):
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, str(program), str(data), str(output), json.dumps(SHORT)]
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    "moment",
    [
        "checkpoints/checkpoint-1",
        pytest.param("run.json", marks=pytest.mark.sweep),
        pytest.param("adapter", marks=pytest.mark.sweep),
    ],
)
def test_fault_58_a_killed_study_ends_with_exactly_its_trials(data, tmp_path, moment):
    process = _start(tmp_path, data, tmp_path / "killed")
    awaited = tmp_path / "killed" / "trials" / "trial-002" / moment
    deadline = time.monotonic() + 120
    while not awaited.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with stored(tmp_path / "killed") as study:
        before = {trial.number: dict(trial.params) for trial in study.trials}
    assert len(before) == 3

    results = {}
    for name in ("killed", "whole"):
        out, err = _start(tmp_path, data, tmp_path / name).communicate(timeout=300)
        results[name] = json.loads(out), err
    killed, whole = results["killed"][0], results["whole"][0]
    assert killed["trials"] == 4
    assert [trial["number"] for trial in killed["trial_list"]] == [0, 1, 2, 3]
    assert {trial["state"] for trial in killed["trial_list"]} == {"complete"}
    assert len(list((tmp_path / "killed" / "trials").glob("trial-*"))) == 4
    for trial in killed["trial_list"]:
        if trial["number"] in before:
            assert before[trial["number"]] == trial["params"]
    assert [t["params"] for t in killed["trial_list"]] == [t["params"] for t in whole["trial_list"]]
    assert [t["value"] for t in killed["trial_list"]] == [t["value"] for t in whole["trial_list"]]
    assert killed["best"]["value"] <= killed["default"]["value"]
