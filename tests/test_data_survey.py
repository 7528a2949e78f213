"""The survey: what is known of the rows before there is a tokenizer, and that it is read once."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data import check, read, survey
from llmtune.errors import DataError

CHATS = [
    {
        "messages": [
            {"role": "user", "content": "Why is the sky blue?" * (1 + number % 5)},
            {"role": "assistant", "content": f"Because of scattering, naïvely put. {number}" * (1 + number % 7)},
        ]
    }
    for number in range(120)
]


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_sizes_are_those_of_the_rows():
    found = survey([read(CHATS)])
    for number in (0, 41, 119):
        contents = [message["content"].encode() for message in CHATS[number]["messages"]]
        assert found.text_bytes[number] == sum(map(len, contents))
        assert found.learned_bytes[number] == len(contents[1])
    assert found.fixed_tokens.tolist() == [10] * 120
    assert found.learned_fixed_tokens.tolist() == [1] * 120
    assert found.complexity == check(CHATS).statistics["complexity"]["score"]


def test_bad_rows_are_counted_and_judgements_refused():
    assert survey([read([*CHATS, {"messages": [{"role": "robot", "content": "?"}]}])]).bad_rows == 1
    with pytest.raises(DataError):
        survey([read([{"prompt": "a", "chosen": "b", "rejected": "c"}])])


def test_weights_count_and_parts_keep_their_rows():
    light, heavy = read(CHATS[:20]), read(CHATS[20:30], weight=3.0)
    stats = survey([light, heavy]).stats(bytes_per_token=4.0)
    alone = [survey([part]).stats(bytes_per_token=4.0) for part in (light, read(CHATS[20:30]))]
    assert stats.rows == 20 + 30
    assert stats.tokens == alone[0].tokens + 3 * alone[1].tokens
    assert stats.length_max == max(each.length_max for each in alone)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=60), min_size=1, max_size=12), st.floats(1, 8), st.integers(1, 40))
def test_dropping_long_rows_only_takes_away(texts, bytes_per_token, longest):
    rows = [{"text": f"{text.strip()}."} for text in texts]
    found = survey([read(rows, format="text")])
    whole = found.stats(bytes_per_token=bytes_per_token)
    cut = found.stats(bytes_per_token=bytes_per_token, max_length=longest)
    assert cut.rows + cut.dropped_too_long == whole.rows == len(rows) - found.bad_rows
    assert cut.tokens <= whole.tokens
    assert cut.length_max <= min(longest, whole.length_max)
    assert whole.supervised_tokens == whole.tokens


def test_files_are_read_once(tmp_path):
    path, kept = write(tmp_path / "d.jsonl", CHATS), tmp_path / "surveys"
    seen: list[int] = []

    def look():
        seen.clear()
        return survey([read(path)], cache_dir=kept, progress=seen.append)

    first = look()
    assert seen == [120]
    again = look()
    assert seen == []
    assert again.stats(bytes_per_token=3.7) == first.stats(bytes_per_token=3.7)
    assert again.complexity == first.complexity
    [file] = kept.iterdir()
    file.write_bytes(file.read_bytes()[:200])
    assert look().stats(bytes_per_token=3.7) == first.stats(bytes_per_token=3.7)
    assert seen == [120], "a damaged survey is made anew"
    write(path, CHATS[:50])
    assert look().stats(bytes_per_token=3.7).rows == 50
    assert seen == [50]
    assert survey([read(path, weight=2.0)], cache_dir=kept).stats(bytes_per_token=4.0).rows == 100


def test_a_folder_that_cannot_be_written_loses_nothing(tmp_path):
    path = write(tmp_path / "d.jsonl", CHATS)
    (tmp_path / "taken").write_text("a file where the folder should be")
    assert survey([read(path)], cache_dir=tmp_path / "taken").stats(bytes_per_token=4.0).rows == 120


@pytest.mark.slow
def test_processes_and_chunks_do_not_show(tmp_path):
    path = write(tmp_path / "d.jsonl", CHATS * 4000)  # above what one process does alone
    assert path.stat().st_size > 48 << 20
    whole, [few] = survey([read(path)]), [survey([read(CHATS)])]
    assert whole.text_bytes.tolist() == few.text_bytes.tolist() * 4000
