"""Units, errors and the one place that prints."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune import errors
from llmtune.console import Speaker
from llmtune.units import GIB, MIB, format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (2048, "2 KiB"), (5 * MIB, "5.0 MiB"), (13.1 * GIB, "13.1 GiB"), (3 * 1024 * GIB, "3.0 TiB")],
)
def test_bytes_are_written_as_people_read_them(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(0, 10**15))
def test_a_number_of_bytes_reads_back(size: int) -> None:
    assert parse_bytes(size) == parse_bytes(str(size)) == parse_bytes(f"{size} B") == size


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 * GIB), ("24 GB", 24 * 10**9), ("1.5k", 1500), ("8G", 8 * 10**9)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-3GB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 24GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (42, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min"), (97200, "1 d 03 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(950, "950"), (12_345, "12.3k"), (1.1e9, "1.1B"), (3.2e13, "32T")])
def test_counts(count: float, text: str) -> None:
    assert format_count(count) == text


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    assert errors.__doc__ is not None
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.LlmtuneError):
            (line,) = [row for row in errors.__doc__.splitlines() if row.strip(" │├└─").split(" ")[0] == name]
            assert f"exit {cls.exit_code} " in line


def test_all_problems_of_a_configuration_are_in_one_message() -> None:
    error = errors.ConfigError("run.yaml", ["a: unknown key", "b: got -1"])
    assert str(error) == "run.yaml: 2 problems. a: unknown key · b: got -1"
    assert str(errors.ConfigError("run.yaml", ["a: unknown key"])) == "run.yaml: a: unknown key"
    assert "pip install 'llmtune[gp]'" in str(errors.MissingExtraError("scipy", "gp", "--sampler gp"))


def test_a_near_name_is_offered_and_otherwise_the_list() -> None:
    assert errors.did_you_mean("qualty", ["quality", "highspeed"]) == ", did you mean 'quality'?"
    assert errors.did_you_mean("zzz", ["b", "a"]) == "; known: a, b"


def test_what_may_be_said_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Speaker()
    speaker.say("on the way [not markup]")
    speaker.show("a result")
    speaker.emit({"a": [1, 2]})
    out, err = capsys.readouterr()
    assert err == "on the way [not markup]\n"
    assert out.startswith("a result\n")
    assert json.loads(out.removeprefix("a result\n")) == {"a": [1, 2]}
    speaker.quiet = True
    speaker.say("dropped")
    speaker.warn("kept")
    assert capsys.readouterr() == ("", "warning: kept\n")
    speaker.muted = True
    for tell in (speaker.warn, speaker.show, speaker.emit):
        tell("dropped")
    speaker.error("always")
    assert capsys.readouterr() == ("", "always\n")


def test_no_bar_and_no_escape_codes_outside_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    speaker = Speaker()
    assert not speaker.interactive
    with speaker.progress("working", 3) as bar:
        bar.update(2, "note")
    speaker.table("Title", ("name", "why"), [("a", "because " * 40), ("b", None)])
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    assert out.count("because") == 40


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    speaker = Speaker()
    assert speaker.interactive
    with speaker.progress("training", 4) as bar:
        bar.update(3, "loss 1.23")
        speaker.say("evaluation")
    assert any(
        line.strip() == "evaluation"
        for line in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\r", "\n", screen.getvalue()).splitlines()
    )
    assert "training" in screen.getvalue()
    assert "loss 1.23" in screen.getvalue()
