"""What a chat template leaves out is named; what it writes is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import chat_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_containers import ROWS
from test_data_unread import KEYS, MARK, inserted, places

from llmtune.data import ChatEncoder, Encoded, Problem, encode, read
from llmtune.errors import ConfigError, DataError

# Writes tools, calls, results and reasoning, and of all further keys only 'mood'.
WITH_TOOLS = """
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{%- if message.mood %} ({{ message.mood }}){% endif %}{{ '\\n' }}
{%- if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{- message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


CHATML = """
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tok() -> Any:
    return chat_tokenizer(WITH_TOOLS)


def test_parts_are_named_by_what_this_template_writes(tok: Any, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "What?", "mood": "curious", "name": "Ann", "tone": "low"},
        {"role": "assistant", "content": "Lima", "tool_call_id": "a1"},
    ]
    rows = [{"messages": turns, "topic": "geography"}]
    assert encode(rows, tok, template=WITH_TOOLS, cache_dir=tmp_path).facts.unused == (
        "messages[].name",
        "messages[].tone",
        "topic",
    )
    assert encode(rows, tok, template=CHATML, cache_dir=tmp_path).facts.unused == (
        "messages[].mood",
        "messages[].name",
        "messages[].tone",
        "topic",
    )


def test_the_names_are_kept_with_the_rows_and_do_not_depend_on_the_processes(tok: Any, tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    lines = [row | {name: "x"} for name in ("source", "topic", "author")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines * 40), encoding="utf-8")
    names = ("author", "source", "topic")
    for _ in range(2):  # made, then found again
        assert encode(path, tok, template=CHATML, cache_dir=tmp_path / "one").facts.unused == names
    assert encode(path, tok, template=CHATML, cache_dir=tmp_path / "two", processes=2).facts.unused == names


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=st.sampled_from([s for s in sorted(ROWS) if read(ROWS[s]).format.trainable]), key=KEYS)
def test_a_text_anywhere_is_in_the_rendered_row_or_named_or_the_row_refused(
    tok: Any, data: st.DataObject, shape: str, key: str
) -> None:
    encoder = ChatEncoder(tok, WITH_TOOLS)
    row = data.draw(st.sampled_from(ROWS[shape]))
    place = data.draw(st.sampled_from(places(row)))
    changed = inserted(row, place, key)
    try:
        *_, record = read([*ROWS[shape], changed])
    except (DataError, ConfigError):
        return
    if isinstance(record, list):
        return
    encoded = encoder.encode_batch([record])[0]
    if isinstance(encoded, Problem):
        return
    assert isinstance(encoded, Encoded)
    rendered = tok.decode(encoded.input_ids.tolist())
    told = place[-1] if place[-1] != "+" else key
    names = (*record.unused, *encoded.unwritten)
    assert MARK in rendered or any(str(told) in name or str(place[0]) in name for name in names), (place, key, names)
