"""The run directory survives what happens to directories, and the store finds every run."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.errors import ConfigError, OutputError, RunNotFoundError
from llmtune.runs import RunDirectory, RunStore, choose_directory, derive_name, number, redact
from llmtune.runs.events import EventLog

IDENTITY = {"data": "d1", "model": "builtin:tiny", "config": "c1"}
RECORD_KEYS = ["name", "dir", "status", "model", "data", "preset", "started", "finished", "steps", "best"]


def make(path: Path, **fields: object) -> RunDirectory:
    run = RunDirectory.create(path, identity=IDENTITY)
    run.update_run(**fields)
    return run


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


# ---------------------------------------------------------------------- making a directory


def test_create_makes_parents_and_a_planned_run(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "b" / "r", identity=IDENTITY)
    assert run.created_here
    assert run.run["status"] == "planned"
    assert run.run["identity"] == IDENTITY
    assert not RunDirectory.create(run.path, identity=IDENTITY).created_here


def test_another_identity_is_refused_with_both_named(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path / "r", identity=IDENTITY)
    with pytest.raises(OutputError, match=r"data d1.*data d2.*\(data differs\)") as caught:
        RunDirectory.create(tmp_path / "r", identity=IDENTITY | {"data": "d2"})
    assert "--output" in str(caught.value)


def test_a_file_in_the_way_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match=r"choose another --output"):
            RunDirectory.create(path, identity=IDENTITY)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="may write"):
        RunDirectory.create(tmp_path / "r", identity=IDENTITY)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that refuses directories")
def test_a_file_system_that_refuses_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write to the run directory /proc/llmtune"):
        RunDirectory.create("/proc/llmtune", identity=IDENTITY)


def test_discard_leaves_nothing_of_this_process_and_everything_else(tmp_path: Path) -> None:
    fresh = RunDirectory.create(tmp_path / "runs" / "r", identity=IDENTITY)
    fresh.checkpoints.mkdir()
    fresh.discard()
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "notes.txt").write_text("mine")
    beside = RunDirectory.create(tmp_path, identity=IDENTITY)
    beside.event("run_started", 0)
    beside.discard()
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]

    kept = RunDirectory.create(tmp_path / "kept", identity=IDENTITY)
    RunDirectory.create(tmp_path / "kept", identity=IDENTITY).discard()
    assert kept.run["status"] == "planned"


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match=r"has no run\.json"):
        RunDirectory.open(tmp_path)
    with pytest.raises(RunNotFoundError, match="does not exist"):
        RunDirectory.open(tmp_path / "none")


def test_names_are_short_and_readable() -> None:
    assert derive_name(data_name="data/Orders.jsonl", model_id="builtin:tiny", identity_hash="3f9a1cffff") == (
        "orders-tiny-3f9a1c"
    )
    assert derive_name(data_name="a b.csv", model_id="Org/Some-1.1B_x", identity_hash="0123456") == (
        "a-b-some-1.1b_x-012345"
    )
    assert derive_name(data_name="../ü", model_id="/models/m/", identity_hash="0123456") == "m-012345"


def test_the_same_command_continues_and_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    def choose(identity: dict[str, str] = IDENTITY) -> str:
        return choose_directory(tmp_path, "r", identity).name

    assert choose() == "r"
    first = make(tmp_path / "r", status="preempted")
    assert choose() == "r"
    assert choose(IDENTITY | {"config": "c2"}) == "r-2"
    first.update_run(status="finished")
    assert choose() == "r-2"
    make(tmp_path / "r-2", status="running")
    assert choose() == "r-2"
    (tmp_path / "r-3").write_text("a file")
    assert choose(IDENTITY | {"config": "c2"}) == "r-4"


# ---------------------------------------------------------------------- documents


def test_documents_are_atomic_and_valid_whatever_the_numbers(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    run.write_json("data_report.json", {"a": math.nan, "b": [math.inf, -math.inf], "c": Path("x"), "d": "\ud800"})
    assert run.read_json("data_report.json") == {"a": "nan", "b": ["inf", "-inf"], "c": "x", "d": "\ud800"}
    before = run.read_json("data_report.json")
    with pytest.raises(TypeError):
        run.write_json("data_report.json", {"a": object()})
    assert run.read_json("data_report.json") == before
    assert [p.name for p in run.path.iterdir() if p.name.endswith(".tmp")] == []


def test_a_full_disk_is_explained_and_keeps_the_old_document(tmp_path: Path) -> None:
    run = make(tmp_path / "r", model="m")
    done = python(
        """
        import resource, sys
        from llmtune.errors import OutputError
        from llmtune.runs import RunDirectory
        run = RunDirectory.open(sys.argv[1])
        run.event("run_started", 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        for attempt in (lambda: run.write_json("run.json", {"x": "y" * 5000}),
                        lambda: run.event("incident", 1, text="y" * 5000)):
            try:
                attempt()
            except OutputError as error:
                print(error)
        run.event("step", 2, loss=1.0)
        """,
        run.path,
    )
    out, err = done.communicate()
    assert done.returncode == 0, err
    assert out.count("cannot write to the run directory") == 2
    assert run.run["model"] == "m"
    assert [(e["event"], e["step"]) for e in run.events()] == [("run_started", 0), ("step", 2)]
    assert [p.name for p in run.path.iterdir() if p.name.endswith(".tmp")] == []


def test_status_sets_the_times(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    assert run.run["started"] is None
    started = run.update_run(status="running")["started"]
    assert started.endswith("Z")
    assert run.update_run(status="preempted")["finished"] is not None
    again = run.update_run(status="running")
    assert (again["started"], again["finished"]) == (started, None)
    with pytest.raises(AssertionError):
        run.update_run(status="done")


def test_status_json_has_the_keys_of_the_contract(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    run.write_status(state="running", step=3, of=10, eta_seconds=1.5, loss=math.nan, last_checkpoint=run.checkpoints)
    status = run.read_json("status.json")
    assert {"state", "step", "of", "eta_seconds", "loss", "last_checkpoint", "status", "exit_code"} <= set(status)
    assert status["loss"] == "nan"


def test_plans_are_numbered_and_the_last_is_in_force(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    assert run.latest_plan() is None
    names = [run.add_plan({"n": n}).name for n in range(1, 12)]
    assert names[:3] == ["plan.json", "plan-2.json", "plan-3.json"]
    assert run.latest_plan() == {"n": 11}
    assert [path.name for path in run.plans] == names


def test_missing_and_damaged_documents_are_named(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    with pytest.raises(RunNotFoundError, match=r"environment\.json is missing"):
        run.read_json("environment.json")
    (run.path / "run.json").write_text("{")
    with pytest.raises(RunNotFoundError, match=r"run\.json cannot be read"):
        _ = run.run


def test_failures_have_a_report_and_a_traceback(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    for _ in range(2):
        try:
            raise ValueError("with hf_" + "a" * 30)
        except ValueError as error:
            report = run.write_failure(error, kind="Out of memory!", cause="c", evidence={"x": math.inf}, remedy="r")
    assert report.name == "0002-out-of-memory.json"
    document = json.loads(report.read_text())
    assert {"kind", "cause", "evidence", "remedy", "time"} <= set(document)
    trace = (report.parent / document["traceback"]).read_text()
    assert "ValueError" in trace
    assert "aaaa" not in trace + report.read_text()


def test_final_is_whichever_result_exists(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    assert run.final is None
    run.model.mkdir()
    assert run.final == run.model


# ---------------------------------------------------------------------- events


def test_events_have_time_event_step_and_only_known_names(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    run.event("step", 1, loss=0.5)
    (event,) = run.events()
    assert list(event) == ["time", "event", "step", "loss"]
    assert event["time"].endswith("Z")
    with pytest.raises(AssertionError):
        run.event("stepp", 1)


def test_the_last_line_of_a_step_counts(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    for step, loss in [(1, 1.0), (2, 2.0), (3, 3.0), (2, 2.5)]:
        run.event("step", step, loss=loss)
    run.event("evaluation", 2, eval_loss=9.0)
    assert [(e["step"], e["loss"]) for e in run.steps()] == [(1, 1.0), (2, 2.5), (3, 3.0)]
    assert [e["eval_loss"] for e in run.evaluations()] == [9.0]


@given(cut=st.integers(min_value=0, max_value=400), junk=st.sampled_from([b"", b"\x00\x00\x00", b"[1, 2", b"{}"]))
@settings(max_examples=60, deadline=None)
def test_a_log_cut_anywhere_loses_at_most_the_torn_line(
    tmp_path_factory: pytest.TempPathFactory, cut: int, junk: bytes
) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    log = EventLog(path)
    for step in range(4):
        log.append("step", step, {"loss": step / 3})
    content = path.read_bytes()
    cut = min(cut, len(content))
    path.write_bytes(content[:cut] + junk)
    whole = content[:cut].count(b"\n")
    assert len(list(EventLog(path))) >= whole
    EventLog(path).append("step", 9, {"loss": 9.0})
    steps = [event["step"] for event in EventLog(path)]
    assert steps[:whole] == list(range(whole))
    assert steps[-1] == 9
    assert path.read_bytes().endswith(b"\n")


def test_a_killed_writer_leaves_a_log_that_reads_and_continues(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    writer = python(
        """
        import sys
        from llmtune.runs import RunDirectory
        run = RunDirectory.open(sys.argv[1])
        with run.lock():
            step = 0
            while True:
                step += 1
                run.event("step", step, loss=1.0, text="x" * 2000)
                if step == 50:
                    print("ready", flush=True)
        """,
        run.path,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    assert run.is_live
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert not run.is_live
    steps = [event["step"] for event in run.steps()]
    assert len(steps) >= 50
    assert steps == list(range(1, len(steps) + 1))
    with run.lock():  # what the dead process held does not count
        run.event("step", len(steps) + 1, loss=1.0)
    assert len(run.steps()) == len(steps) + 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def written_form(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, list):
        return [written_form(item) for item in value]
    if isinstance(value, dict):
        return {key: written_form(item) for key, item in value.items()}
    return value


@given(value=json_values)
@settings(max_examples=100, deadline=None)
def test_events_round_trip(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    log = EventLog(tmp_path_factory.mktemp("log") / "events.jsonl")
    log.append("incident", 7, {"value": value})
    (event,) = log
    assert event["value"] == written_form(value)
    assert b"NaN" not in log.path.read_bytes() or "NaN" in repr(value)


@pytest.mark.parametrize(
    ("text", "value"), [("inf", math.inf), ("-inf", -math.inf), (3, 3.0), (None, None), ("x", None)]
)
def test_numbers_are_read_back(text: object, value: float | None) -> None:
    assert number(text) == value
    assert math.isnan(number("nan") or 0.0)


# ---------------------------------------------------------------------- secrets, locks


def test_secrets_are_hidden_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "sesame-42")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-ish")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("SOME_TOKEN", "1")
    assert redact("1 sesame-42 false-ish /home/me/token") == "1 [redacted] false-ish /home/me/token"
    assert redact("use hf_transfer, not hf_" + "Ab1" * 11) == "use hf_transfer, not [redacted]"
    assert redact("postgresql://me:pw@host/db") == "postgresql://me:[redacted]@host/db"
    run = make(tmp_path / "r", command="train --key sesame-42")
    run.event("incident", 0, text=["sesame-42"])
    run.write_environment({"env": {"MY_API_KEY": "sesame-42"}})
    assert not [p for p in run.path.iterdir() if p.is_file() and b"sesame" in p.read_bytes()]


def test_a_second_process_is_refused_with_the_holder_named(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    with run.lock():
        other = python(
            """
            import sys
            from llmtune.errors import OutputError
            from llmtune.runs import RunDirectory
            run = RunDirectory.open(sys.argv[1])
            assert run.is_live
            try:
                with run.lock():
                    print("got it")
            except OutputError as error:
                print(error)
            """,
            run.path,
        )
        out, err = other.communicate()
    assert f"process {os.getpid()} on " in out, err
    assert "since 20" in out
    assert not run.is_live


def test_the_lock_is_free_after_an_error_inside(tmp_path: Path) -> None:
    run = make(tmp_path / "r")
    with pytest.raises(ValueError, match="x"), run.lock():
        raise ValueError("x")
    with run.lock():
        assert run.is_live
        with pytest.raises(OutputError, match="in use"), run.lock():
            pass


# ---------------------------------------------------------------------- the store


def test_runs_lists_the_keys_of_the_contract(tmp_path: Path) -> None:
    store = RunStore(root=tmp_path)
    best = {"metric": "eval_loss", "value": 0.5, "step": 4}
    run = make(tmp_path / "r", model="builtin:tiny", data="d.jsonl", preset="quality", steps=4, best=best)
    store.index(run.path)
    (record,) = store.runs()
    assert list(record.to_json()) == RECORD_KEYS
    assert record.best == best
    assert record.dir == str(tmp_path / "r")
    run.update_run(status="finished")
    assert [r.status for r in store.runs()] == ["finished"]
    assert store.runs(status="failed") == []
    assert len(store.runs(status="finished", model="TINY")) == 1


def test_listing_where_nothing_is_makes_nothing(tmp_path: Path) -> None:
    assert RunStore(root=tmp_path / "runs").runs() == []
    assert list(tmp_path.iterdir()) == []


def test_vanished_runs_are_dropped_and_outside_runs_kept(tmp_path: Path) -> None:
    store = RunStore(root=tmp_path / "runs")
    gone, outside = make(tmp_path / "runs" / "gone"), make(tmp_path / "elsewhere")
    store.index(gone.path)
    store.index(outside.path)
    gone.discard()
    assert [record.name for record in store.runs()] == ["elsewhere"]
    assert [record.name for record in store.rebuild()] == ["elsewhere"]


@pytest.mark.parametrize("content", [b"", b"no database at all" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_index_is_made_again(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    store = RunStore(root=tmp_path)
    store.index(make(tmp_path / "a").path)
    store.index(make(tmp_path / "b").path)
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"llmtune.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "llmtune.db").write_bytes(content)
    assert [record.name for record in RunStore(root=tmp_path).runs()] == ["a", "b"]
    if content:
        assert "No run is lost" in capsys.readouterr().err


def test_a_missing_index_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    assert [record.name for record in RunStore(root=tmp_path).runs()] == ["a"]


def test_an_index_of_another_version_is_made_again(tmp_path: Path) -> None:
    import sqlite3

    make(tmp_path / "a")
    connection = sqlite3.connect(tmp_path / "llmtune.db")
    connection.execute("CREATE TABLE runs (dir TEXT)")
    connection.close()
    assert [record.name for record in RunStore(root=tmp_path).runs()] == ["a"]


def test_a_run_that_cannot_be_read_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{")
    assert [record.name for record in RunStore(root=tmp_path).runs()] == ["a"]
    assert "run.json cannot be read" in capsys.readouterr().err


def test_several_processes_index_at_once(tmp_path: Path) -> None:
    code = """
        import sys
        from llmtune.runs import RunDirectory, RunStore
        worker, root = sys.argv[1:]
        sys.stdin.read()
        for n in range(6):
            run = RunDirectory.create(f"{root}/w{worker}-{n}", identity={"n": str(n)})
            run.update_run(status="running", steps=n)
            RunStore(root=root).index(run.path)
            run.update_run(status="finished")
            RunStore(root=root).index(run.path)
            RunStore(root=root).runs()
    """
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), str(worker), str(tmp_path)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for worker in range(3)
    ]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.close()
        worker.stdin = None
    for worker in workers:
        _, error = worker.communicate()
        assert worker.returncode == 0, error.decode()
    records = RunStore(root=tmp_path).runs()
    assert len(records) == 18
    assert {record.status for record in records} == {"finished"}


def test_find_takes_a_directory_a_name_or_a_unique_prefix(tmp_path: Path) -> None:
    store = RunStore(root=tmp_path)
    for name in ("orders-tiny-3f9a1c", "orders-tiny-3f9a1c-2", "chats-tiny-aa0000"):
        make(tmp_path / name)
    assert store.find(tmp_path / "chats-tiny-aa0000").name == "chats-tiny-aa0000"
    assert store.find("orders-tiny-3f9a1c").name == "orders-tiny-3f9a1c"
    assert store.find("ch").name == "chats-tiny-aa0000"
    with pytest.raises(RunNotFoundError, match=r"2 runs: .*3f9a1c.*3f9a1c-2"):
        store.find("orders")
    with pytest.raises(RunNotFoundError, match="Did you mean 'chats-tiny-aa0000'"):
        store.find("chat-tiny-aa0000")
    with pytest.raises(RunNotFoundError, match="neither"):
        store.find("")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("not a url", "no database URL"),
        ("mysql://me:sesame@host/db", "expected e.g. sqlite"),
        ("postgresql+nodriver://me:sesame@host/db", "LLMTUNE_STORE"),
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
    ],
)
def test_an_address_that_cannot_be_used_is_named_without_its_password(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        RunStore(url, root=tmp_path).runs()
    assert "sesame" not in str(caught.value)


def test_a_store_elsewhere_holds_the_same_runs(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "a")
    store = RunStore(f"sqlite:///{tmp_path}/team.db", root=tmp_path / "runs")
    assert [record.name for record in store.runs()] == ["a"]
    (tmp_path / "notes.txt").write_text("not a database, and not ours to move" * 10)
    with pytest.raises(ConfigError, match="no SQLite database"):
        RunStore(f"sqlite:///{tmp_path}/notes.txt", root=tmp_path / "runs").runs()
    assert (tmp_path / "notes.txt").exists()
