"""Rows token by token: the texts add up to the row, what is learned is marked, foreign text stays text."""

from __future__ import annotations

import io
import json
import os
import re
from functools import partial
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from factories import tiny_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_data_support import KINDS, LLAMA2, tokenizer

from llmtune.cli import main
from llmtune.cli.program import commands
from llmtune.console import speaker
from llmtune.data import ChatEncoder, read
from llmtune.data.preview import PreviewRow, PreviewToken, preview, token_texts
from llmtune.errors import DataError, OutputError
from llmtune.reporting.preview import render_preview, visible, write_preview

commands()  # all of them, in the order of the help, before one module is imported alone
cli_preview = import_module("llmtune.cli.preview")

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'& \u202e"
ROWS = [
    {"messages": [{"role": "user", "content": "Where to?\n\nSay it."}, {"role": "assistant", "content": "Köln 🙂\n"}]},
    {"messages": [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE[:50]}]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "robot", "content": "ho"}]},
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
]


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("LLMTUNE_")]:
        monkeypatch.delenv(name)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    yield
    speaker.quiet = speaker.muted = False


def shown(*arguments: str) -> int:
    return main(["preview", "rows.jsonl", "--model", "builtin:tiny", *arguments])


def decoder(tokenizer: Any) -> Any:
    return partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)


def taken_apart(**options: int) -> list[PreviewRow]:
    return preview(read("rows.jsonl"), ChatEncoder(tiny_tokenizer()), **options)


def on_terminal(rows: list[PreviewRow], **settings: Any) -> str:
    settings = {"force_terminal": True, "width": 60, "soft_wrap": True, "_environ": {}} | settings
    console = Console(file=io.StringIO(), highlight=False, **settings)
    console.print(cli_preview._Display(rows))
    return console.file.getvalue()


# ---------------------------------------------------------------------- texts of tokens


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60))
@example(text="  a  b\n\n🙂 日本 \ufffd</s>[INST] Lima [/INST] Lima </s><s> x")
@example(text="\ufffd")
def test_the_texts_add_up_to_the_decoded_row(kind: str, text: str) -> None:
    decode, ids = decoder(tokenizer(kind)), tokenizer(kind)(text)["input_ids"]
    assert "".join(token_texts(decode, ids)) == decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_ids_add_up_even_where_they_are_no_text(kind: str, data: st.DataObject) -> None:
    decode = decoder(tokenizer(kind))
    ids = data.draw(st.lists(st.integers(0, len(tokenizer(kind)) - 1), max_size=30))
    assert "".join(token_texts(decode, ids)) == decode(ids)


def test_a_character_belongs_to_the_last_of_its_tokens() -> None:
    found = tiny_tokenizer()
    assert token_texts(decoder(found), found("é🙂")["input_ids"]) == ["", "é", "", "", "🙂"]


def test_a_text_is_read_in_its_place() -> None:
    found = tokenizer("metaspace")
    texts = token_texts(decoder(found), found("Lima Lima")["input_ids"])
    assert texts[0][:1] == "L"
    assert any(text.startswith(" L") for text in texts[1:])


# ---------------------------------------------------------------------- rows


def test_what_is_learned_is_the_answer_and_its_end() -> None:
    first, *_ = taken_apart()
    assert first.supervised_text == "Köln 🙂\n<|eos|>"
    assert "".join(token.text for token in first.tokens if token.supervised) == first.supervised_text
    assert [token.text for token in first.tokens if token.special][-3:] == ["<|eos|>", "<|assistant|>", "<|eos|>"]
    assert 0 < first.supervised_share < 1


def test_template_whitespace_is_shown_where_it_is_learned() -> None:
    turns = [{"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima"}]
    (row,) = preview(read([{"messages": turns}]), ChatEncoder(tokenizer("metaspace"), LLAMA2))
    assert row.supervised_text == "Lima </s>"
    assert "".join(token.text for token in row.tokens if token.supervised) == " Lima </s>"


def test_rows_begin_at_the_line_and_bad_ones_tell_why() -> None:
    bad, good = taken_apart(line=3, rows=5)
    assert (bad.line, bad.tokens, bad.supervised_text, good.line) == (3, (), "", 4)
    assert "unknown role 'robot'" in bad.problems[0].problem
    with pytest.raises(DataError, match=r"rows.jsonl: there is no row at line 5"):
        taken_apart(line=5)


def test_preference_data_are_refused() -> None:
    with pytest.raises(DataError, match="judgements"):
        preview(read([{"prompt": "a", "chosen": "b", "rejected": "c"}]), ChatEncoder(tiny_tokenizer()))


# ---------------------------------------------------------------------- the command


def test_json_has_the_keys_of_the_contract(capsys) -> None:
    assert shown("--json", "--rows", "4") == 0
    document = json.loads(capsys.readouterr().out)
    assert [(row["file"], row["line"]) for row in document["rows"]] == [("rows.jsonl", line) for line in (1, 2, 3, 4)]
    decode = decoder(tiny_tokenizer())
    for row in document["rows"]:
        assert row.keys() >= {"file", "line", "tokens", "supervised_text"}
        assert all(token.keys() == {"id", "text", "supervised"} for token in row["tokens"])
        ids = [token["id"] for token in row["tokens"]]
        assert "".join(token["text"] for token in row["tokens"]) == decode(ids)
        assert row["supervised_text"] == decode([token["id"] for token in row["tokens"] if token["supervised"]])
        assert row["num_tokens"] == len(ids)
    assert document["rows"][2]["problems"][0].keys() == {"file", "line", "field", "problem", "hint"}
    assert document["rows"][1]["supervised_text"] == HOSTILE[:50] + "<|eos|>"


def test_without_colours_brackets_mark_what_is_learned(capsys) -> None:
    assert shown("--line", "4") == 0
    out = capsys.readouterr().out
    assert "rows.jsonl:4  9 tokens, 4 supervised (44 %)" in out
    assert "<|bos|>│<|user|>│one│<|eos|>│<|assistant|>⟦t│w│o│<|eos|>⟧" in out
    assert "\x1b" not in out


def test_rows_that_cannot_be_encoded_tell_why_and_end_with_3(capsys) -> None:
    assert shown("--line", "3", "--rows", "1") == DataError.exit_code
    out = capsys.readouterr().out
    assert "rows.jsonl:3  cannot be encoded" in out
    assert "messages[1].role: unknown role 'robot'" in out
    assert shown("--line", "3", "--rows", "1", "--json") == DataError.exit_code
    assert json.loads(capsys.readouterr().out)["rows"][0]["tokens"] == []
    assert shown("--line", "3", "--rows", "2") == 0
    assert shown("--line", "99") == DataError.exit_code
    assert shown("--rows", "0") == 2


def test_a_page_instead_of_the_terminal(capsys) -> None:
    assert shown("--html", "rows.html") == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "3 rows written to rows.html\n")
    assert shown("--html", "nowhere/rows.html") == OutputError.exit_code
    assert "nowhere/rows.html cannot be written" in capsys.readouterr().err


# ---------------------------------------------------------------------- on a terminal


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_shades_mark_what_is_learned() -> None:
    out = on_terminal(taken_apart(line=4), color_system="256")
    assert "⟦" not in out
    assert "│" not in out
    backgrounds = re.findall(r"48;5;(\d+)m([^\x1b]+)", out.partition("rows.jsonl")[2])
    learned = {shade for shade, text in backgrounds if text in ("t", "w", "o")}
    given = {shade for shade, text in backgrounds if text in ("one", "<|user|>", "<|assistant|>")}
    assert len(learned) == 2
    assert not learned & given
    assert "".join(text for _, text in backgrounds) == "<|bos|><|user|>one<|eos|><|assistant|>two<|eos|>"


@pytest.mark.parametrize(
    "settings", [{"color_system": "256", "no_color": True}, {"color_system": "standard"}, {"color_system": None}]
)
def test_brackets_where_there_are_too_few_colours(settings: dict[str, Any]) -> None:
    assert "⟦t│w│o│<|eos|>⟧" in plain(on_terminal(taken_apart(line=4), **settings))


def test_lines_are_kept_and_folded_to_the_width() -> None:
    lines = plain(on_terminal(taken_apart(rows=2), color_system="256", width=40)).splitlines()
    assert "<|bos|><|user|>Where to?↵" in lines
    assert "↵" in lines
    assert "Say it.<|eos|><|assistant|>K◦öln ◦◦🙂↵" in lines
    first = next(index for index, line in enumerate(lines) if line.startswith("rows.jsonl:2"))
    row = lines[first + 1 :]
    assert [len(line) for line in row[:-1]] == [40] * (len(row) - 1)
    assert "'& ◦◦⟨U+202E⟩<|eos|>" in "".join(row)


def long_row() -> PreviewRow:
    tokens = (PreviewToken(id=i, text=f"{i} ", supervised=i >= 900) for i in range(2 * cli_preview.MOST_TOKENS))
    return PreviewRow(file="rows.jsonl", line=1, tokens=tuple(tokens))


def test_a_long_row_is_clipped_in_the_middle_and_says_so() -> None:
    out = on_terminal([long_row()], force_terminal=False)
    half, last = cli_preview.MOST_TOKENS // 2, 2 * cli_preview.MOST_TOKENS - 1
    assert f"{half - 1} \n… {cli_preview.MOST_TOKENS:,} tokens left out here, 0 of them supervised; --html" in out
    assert f"⟦{2 * cli_preview.MOST_TOKENS - half} │" in out
    assert f"│{last} ⟧" in out
    assert len(long_row().to_json()["tokens"]) == 2 * cli_preview.MOST_TOKENS


# ---------------------------------------------------------------------- the page


class Page(HTMLParser):
    """The tokens of each row of a page, and all its tags and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[tuple[str, str, str]]] = []
        self._token: tuple[str, str] | None = None
        self._text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "article":
            self.rows.append([])
        elif tag == "span" and "title" in found:
            self._token, self._text = (found["title"] or "", found.get("class") or ""), ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._token is not None:
            self.rows[-1].append((*self._token, self._text))
            self._token = None

    def handle_data(self, data: str) -> None:
        self._text += data


def test_the_page_has_every_token() -> None:
    rows = [*taken_apart(rows=4), long_row()]
    found = Page(render_preview(rows, model="builtin:tiny")).rows
    assert [len(row) for row in found] == [len(row.tokens) for row in rows]
    for row, tokens in zip(rows, found, strict=True):
        for token, (title, style, text) in zip(row.tokens, tokens, strict=True):
            assert title == f"id {token.id}"
            assert style.split() == ["s"] * token.supervised + ["x"] * token.special
            assert text == visible(token.text)


def test_the_page_is_one_file_and_foreign_text_stays_text(tmp_path: Path) -> None:
    token = PreviewToken(id=1, text=f"{HOSTILE}\x00\x1b[31m", supervised=True)
    odd = PreviewRow(file=HOSTILE[:50], line=1, tokens=(token,), supervised_text=token.text)
    path = write_preview([*taken_apart(rows=4), odd], tmp_path / "rows.html", model=HOSTILE[:50])
    html = path.read_text(encoding="utf-8")
    found = Page(html)
    assert {"script", "img", "link", "iframe"} & set(found.tags) == set()
    assert {"src", "href", "onerror"} & {name for name, _ in found.attributes} == set()
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\(", html)
    assert not re.search("[\x00\x1b\u202e]", html)
    assert "unknown role &#39;robot&#39;" in html
    assert "prefers-color-scheme: dark" in html
    assert list(tmp_path.glob(".*")) == []


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\x00b\u200bc\td\ne\u00a0f") == "a⟨U+0000⟩b⟨U+200B⟩c⇥d\ne\u00a0f"
    assert visible("👩\u200d🚀 n\u200cm") == "👩\u200d🚀 n\u200cm"
