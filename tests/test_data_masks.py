"""The mask: the supervised tokens decode to the assistant's text and its stop token, or the row is refused."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_support import (
    CHATML,
    GOOD_TEMPLATES,
    KINDS,
    LLAMA2,
    MARKED,
    MARKED_CONTENT,
    PHI3,
    SPECIAL,
    TOOLS,
    ZEPHYR,
    tokenizer,
)

from llmtune.data import ChatEncoder, Conversation, Document, Encoded, Message, Problem
from llmtune.errors import ConfigError, DataError

STOPS = dict.fromkeys(GOOD_TEMPLATES, "<|im_end|>") | {"llama2": "</s>", "zephyr": "</s>"}


def conversation(*turns: str, line: int = 1, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    messages = [Message(role=role, content=turn) for role, turn in zip(roles, turns, strict=False)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages), file="d.jsonl", line=line)


def runs(encoded: Encoded) -> list[list[int]]:
    """The supervised ids, cut where the mask has gaps."""
    where = np.flatnonzero(encoded.supervised)
    pieces = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
    return [encoded.input_ids[piece].tolist() for piece in pieces if len(piece)]


def learned(encoded: Encoded, kind: str) -> list[str]:
    return [tokenizer(kind).decode(run, clean_up_tokenization_spaces=False) for run in runs(encoded)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD_TEMPLATES)
def test_the_answers_and_their_stop_tokens_are_learned_and_nothing_else(name, kind):
    encoder = ChatEncoder(tokenizer(kind), GOOD_TEMPLATES[name])
    encoded = encoder.encode(conversation("What is the capital?", "Lima is the capital", "é?", "日本 🙂\n\n ok"))
    texts = [text.strip() for text in learned(encoded, kind)]
    gap = "<think>\n\n</think>\n\n" if name == "thinking" else ""
    space = " " if name == "llama2" else ""
    stop = STOPS[name]
    assert texts == [f"Lima is the capital{space}{stop}", f"{gap}日本 🙂\n\n ok{space}{stop}"]
    whole = tokenizer(kind).apply_chat_template(
        [
            m.to_template()
            for m in conversation("What is the capital?", "Lima is the capital", "é?", "日本 🙂\n\n ok").messages
        ],
        chat_template=GOOD_TEMPLATES[name],
    )["input_ids"]
    assert encoded.input_ids.tolist() == whole
    assert (encoded.input_ids.dtype, encoded.supervised.dtype) == (np.int32, np.bool_)


@pytest.mark.parametrize("kind", ["metaspace", "metaspace_legacy"])
def test_a_token_across_the_boundary_is_learned_with_its_space(kind):
    encoded = ChatEncoder(tokenizer(kind), LLAMA2).encode(conversation("What?", "Lima"))
    pieces = tokenizer(kind).convert_ids_to_tokens(encoded.input_ids[encoded.supervised].tolist())
    assert "".join(pieces) == "▁Lima▁</s>"
    assert pieces[0].startswith("▁L")


def test_an_answer_that_begins_with_a_line_break_shares_a_token_with_the_template():
    tok = tokenizer("byte_level")
    encoded = ChatEncoder(tok, CHATML).encode(conversation("a", "\nLima"))
    assert learned(encoded, "byte_level") == ["\nLima<|im_end|>"]


def test_whitespace_after_the_stop_token_is_not_learned():
    encoded = ChatEncoder(tokenizer("byte_level"), CHATML).encode(conversation("a", "b"))
    assert encoded.supervised.tolist()[-1] is False
    assert learned(encoded, "byte_level") == ["b<|im_end|>"]


def test_phi3_learns_the_turns_own_stop_token_and_not_the_end_of_the_text():
    encoded = ChatEncoder(tokenizer("byte_level"), PHI3).encode(conversation("a", "b", "c", "b"))
    assert learned(encoded, "byte_level") == ["b<|im_end|>", "b<|im_end|>"]


def test_marks_and_prefixes_agree():
    encoders = [ChatEncoder(tokenizer("byte_level"), template) for template in (CHATML, MARKED, MARKED_CONTENT)]
    chat = conversation("a", "Lima ", "c", "is the", system="Be")
    plain, *marked = [encoder.encode(chat) for encoder in encoders]
    for other in marked:
        assert other.input_ids.tolist() == plain.input_ids.tolist()
        assert other.supervised.tolist() == plain.supervised.tolist()


@pytest.mark.parametrize("template", [CHATML, MARKED, ZEPHYR])
def test_turns_that_are_given_are_not_learned(template):
    first, second = Message(role="assistant", content="no", supervised=False), Message(role="assistant", content="yes")
    messages = (Message(role="user", content="a"), first, Message(role="user", content="b"), second)
    encoded = ChatEncoder(tokenizer("byte_level"), template).encode(Conversation(messages=messages, file="f", line=1))
    assert [text[:3] for text in learned(encoded, "byte_level")] == ["yes"]


def test_an_answer_that_repeats_the_question():
    encoder = ChatEncoder(tokenizer("byte_level"), CHATML)
    encoded = encoder.encode(conversation("yes", "yes", "yes", "im", "yes", "yes"))
    assert learned(encoded, "byte_level") == ["yes<|im_end|>", "im<|im_end|>", "yes<|im_end|>"]


CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "<|im_end|>"}}}
INJECTED = [
    (
        "content",
        Message(role="user", content="a <|im_start|>system"),
        "'user' contains the special token '<|im_start|>'",
    ),
    (
        "content",
        Message(role="system", content="be</s>"),
        "the text of role 'system' contains the special token '</s>'",
    ),
    ("content", Message(role="tool", content="<|im_end|>"), "the text of role 'tool' contains the special token"),
    ("content", Message(role="assistant", content="say <|im_end|> twice"), "the answer contains the special token"),
    ("name", Message(role="user", content="a", name="<pad>"), "contains the special token '<pad>'"),
    ("tool_calls", Message(role="assistant", content="", tool_calls=(CALL,)), "the answer contains the special token"),
    ("reasoning_content", Message(role="assistant", content="a", extra={"reasoning_content": "</s>"}), "the answer"),
]


@pytest.mark.parametrize("supervise", ["all", "text"])
@pytest.mark.parametrize(("field", "message", "text"), INJECTED)
def test_special_tokens_in_a_text_are_refused_by_name_and_place(field, message, text, supervise):
    messages = (*conversation("a", "b", "c").messages[:2], message, *conversation("c", "d").messages)
    chat = Conversation(messages=messages, file="d.jsonl", line=7)
    encoder = ChatEncoder(tokenizer("byte_level"), CHATML + "{# tool_calls #}", supervise=supervise)
    problem = encoder.encode_batch([chat])[0]
    assert isinstance(problem, Problem)
    assert (problem.line, problem.field) == (7, f"messages[2].{field}")
    assert text in problem.problem
    assert "take the token out" in problem.hint


def test_special_tokens_in_the_tools_are_refused_and_other_marks_are_not():
    tools = ({"name": "now", "description": "tells <|im_end|>"},)
    chat = Conversation(messages=conversation("a", "b").messages, tools=tools, file="f", line=1)
    problem = ChatEncoder(tokenizer("byte_level"), TOOLS).encode_batch([chat])[0]
    assert isinstance(problem, Problem)
    assert problem.field == "tools"
    chat = conversation("<think> [INST] <|user|> <0x0A>", "<think>\nhm</think> [/INST] <|assistant|>")
    assert isinstance(ChatEncoder(tokenizer("byte_level"), CHATML).encode(chat), Encoded)


def test_marks_of_reasoning_are_no_injection_in_an_answer_even_where_they_are_special():
    import copy

    tok = copy.deepcopy(tokenizer("byte_level"))
    tok.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]}, replace_extra_special_tokens=False)
    encoder = ChatEncoder(tok, CHATML)
    encoded = encoder.encode(conversation("a", "<think>hm</think>b"))
    assert tok.decode(encoded.input_ids[encoded.supervised]) == "<think>hm</think>b<|im_end|>"
    assert isinstance(encoder.encode_batch([conversation("a <think>", "b")])[0], Problem)


def test_tool_calls_are_learned_with_their_stop_token():
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = (
        Message(role="user", content="time?"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="noon"),
        Message(role="assistant", content="Noon."),
    )
    chat = Conversation(messages=messages, tools=({"name": "now"},), file="f", line=1)
    encoded = ChatEncoder(tokenizer("byte_level"), TOOLS).encode(chat)
    first, second = learned(encoded, "byte_level")
    assert first.startswith('<|call|>{"type": "function"')
    assert first.endswith("}<|im_end|>")
    assert second == "Noon.<|im_end|>"
    without_calls = TOOLS.replace("if m.tool_calls", "if false")
    for template, text in ((CHATML, "out the tool 'now'"), (without_calls, "out the call of the tool 'now'")):
        with pytest.raises(DataError, match=text):
            ChatEncoder(tokenizer("byte_level"), template).encode(chat)


NO_STOP = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
REFUSED = [
    ("no stop token", NO_STOP, "leaves no stop token"),
    ("one stop token at the very end", NO_STOP + "{% if not add_generation_prompt %}</s>{% endif %}", "no stop token"),
    (
        "turns opened but not closed",
        "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% else %}</s>{% endif %}",
        "leaves no stop token",
    ),
    ("ignored generation prompt", CHATML.split("{% if add")[0], "ignores add_generation_prompt"),
    ("thought only in the prompt", CHATML.replace("assistant\n", "assistant\n<think>"), "differently once the answer"),
    (
        "rewritten answer",
        CHATML.replace("m['content'] +", "(m['content'] | upper if m['role'] == 'assistant' else m['content']) +"),
        "rewrites the assistant's text",
    ),
    (
        "rewritten question",
        CHATML.replace("m['content']", "m['content'] | upper"),
        "rewrites the text of role 'system'",
    ),
    (
        "closing that is no token",
        CHATML.replace("<|im_end|>", "<|end|>"),
        "'<|end|>' is none of the tokenizer's special",
    ),
    (
        "closed in two ways",
        CHATML.replace(
            "'<|im_end|>\n'", "('<|im_start|>' if m['role'] == 'assistant' and not loop.last else '<|im_end|>') + '\n'"
        ),
        "follows one, '<|im_end|>' the last)",
    ),
    ("first token twice", "<s><s>" + CHATML, "two beginning-of-text tokens"),
    ("history rewritten", "{{ messages | length }}" + CHATML, "differently once the answer"),
    ("answer left out", MARKED.replace("generation %}{{ m['content']", "generation %}{{ ''"), "rewrites the assistant"),
    ("fewer marks than answers", MARKED.replace("== 'assistant'", "== 'assistant' and loop.last"), "marks 1 answers"),
    ("system refused", GOOD_TEMPLATES["gemma"], "System role not supported"),
    ("alternation demanded", LLAMA2, "must alternate"),
    ("not prepared for the row", CHATML.replace("m['content']", "m['content'] + m['nothing'].x"), "refuses the row"),
]


@pytest.mark.parametrize(("name", "template", "text"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_templates_that_cannot_be_trusted_are_refused_by_name(name, template, text):
    encoder = ChatEncoder(tokenizer("byte_level"), template)
    good, bad = conversation("a", "b"), conversation("a", "bb", "c", "dd", system="Be", line=7)
    result = encoder.encode_batch([good, bad])[1]
    assert isinstance(result, Problem)
    assert (result.file, result.line) == ("d.jsonl", 7)
    assert text in result.problem
    assert "data.chat_template" in result.hint
    with pytest.raises(DataError, match=r"d\.jsonl:7:"):
        encoder.encode(bad)


def test_one_refused_row_does_not_cost_the_others():
    encoder = ChatEncoder(tokenizer("byte_level"), GOOD_TEMPLATES["gemma"])
    results = encoder.encode_batch([conversation("a", "b"), conversation("a", "b", system="x"), conversation("c", "d")])
    assert [isinstance(result, Encoded) for result in results] == [True, False, True]


def test_a_conversation_that_begins_with_the_assistant():
    messages = (Message(role="assistant", content="Hi"), Message(role="user", content="a"))
    chat = Conversation(messages=(*messages, Message(role="assistant", content="b")), file="f", line=3)
    with pytest.raises(
        DataError, match=r"f:3:messages\[0\]: the conversation begins with the assistant.*supervise=last"
    ):
        ChatEncoder(tokenizer("byte_level"), CHATML).encode(chat)
    assert len(runs(ChatEncoder(tokenizer("byte_level"), MARKED).encode(chat))) == 2


def test_text_that_the_tokenizer_cannot_write_is_refused():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "Lima": 2, "user": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    template = "{% for m in messages %}{{ m['content'] + ' </s>' }}{% endfor %}"
    with pytest.raises(DataError, match="no token for some of the text"):
        ChatEncoder(words, template).encode(conversation("a", "Quito"))


def test_settings_of_an_earlier_call_do_not_cut_or_pad_rows():
    import copy

    tok = copy.deepcopy(tokenizer("byte_level"))
    expected = ChatEncoder(tok, CHATML).encode(conversation("a", "b" * 50)).input_ids.tolist()
    tok(["a", "b c"], padding=True, truncation=True, max_length=4)
    assert ChatEncoder(tok, CHATML).encode(conversation("a", "b" * 50)).input_ids.tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
def test_borders_found_by_character_are_those_of_the_offsets(kind):
    from llmtune.data.masks import _Row
    from llmtune.data.spans import Located

    text = "<s>What is\n\n  the capital?</s> Lima 🙂 is  日本\n</s>\n<|im_end|> ab"
    backend = tokenizer(kind).backend_tokenizer
    for end in (match.end() for match in re.finditer(r"</s>|<\|im_end\|>", text)):  # where answers end
        for start in range(end - 1):
            row = _Row(Located(text, ((start, end),)), backend.encode(text, add_special_tokens=False))
            ((first, last),) = row.runs
            row.use_offsets()
            ((exact_first, exact_last),) = row.runs
            assert last == exact_last
            # A space of its own may have lost its width in the offsets.
            between = row.ids[min(first, exact_first) : max(first, exact_first)]
            assert backend.decode(between, skip_special_tokens=False).strip() == "", (text[start:end], between)


def test_an_encoder_can_be_sent_to_another_process():
    import pickle

    encoder = ChatEncoder(tokenizer("byte_level"), CHATML, supervise="last")
    encoder.encode(conversation("a", "b"))
    copied = pickle.loads(pickle.dumps(encoder))
    chat = conversation("a", "b", "c", "d")
    assert copied.supervise == "last"
    assert copied.encode(chat).supervised.tolist() == encoder.encode(chat).supervised.tolist()


def test_plain_rows_are_rendered_as_transformers_does():
    from llmtune.data.rendering import Renderer

    tok = tokenizer("byte_level")
    chat = conversation("a", "b", "c", "d")
    messages = [message.to_template() for message in chat.messages]
    for template in (*GOOD_TEMPLATES.values(), TOOLS):
        for prompt in (False, True):
            ours, _ = Renderer(tok, template).render(messages, None, prompt=prompt)
            assert ours == tok.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )


@pytest.mark.parametrize("extra", [{}, {"thinking": "hm"}, {"reasoning_content": "hm"}, {"odd": np.float32(0.5)}])
def test_rows_with_tools_are_rendered_as_transformers_does(extra):
    from llmtune.data.rendering import Renderer

    tok = tokenizer("byte_level")
    reads_all = TOOLS.replace("m['content']", "m['content'] ~ m.thinking ~ m.reasoning_content ~ m.odd")
    call = {"type": "function", "function": {"name": "now", "arguments": {"zone": ["UTC", 1, None]}}}
    messages = [
        Message(role="user", content="time?", extra=extra).to_template(),
        Message(role="assistant", content="", tool_calls=(call,)).to_template(),
        Message(role="tool", content="noon", name="now").to_template(),
    ]
    for prompt in (False, True):
        for tools in (None, ({"name": "now", "parameters": {}},)):
            ours, _ = Renderer(tok, reads_all).render(messages, tools, prompt=prompt)
            assert ours == tok.apply_chat_template(
                messages,
                chat_template=reads_all,
                tools=None if tools is None else list(tools),
                add_generation_prompt=prompt,
                tokenize=False,
            )


def test_a_tokenizers_template_for_tools_is_used_for_rows_with_tools():
    import copy

    tok = copy.deepcopy(tokenizer("byte_level"))
    tok.chat_template = {"default": CHATML, "tool_use": TOOLS}
    chat = Conversation(messages=conversation("a", "b").messages, tools=({"name": "now"},), file="f", line=1)
    ids = ChatEncoder(tok).encode(chat).input_ids
    assert tok.decode(ids).startswith('<|im_start|>system\n[{"name": "now"}]<|im_end|>')


def test_no_template_is_a_configuration_error_and_broken_jinja_too():
    with pytest.raises(ConfigError, match=r"data\.chat_template=FILE"):
        ChatEncoder(tokenizer("byte_level")).encode(conversation("a", "b"))
    with pytest.raises(ConfigError, match="not valid Jinja"):
        ChatEncoder(tokenizer("byte_level"), "{% for %}").encode(conversation("a", "b"))
    with pytest.raises(ConfigError, match="no character offsets"):
        ChatEncoder(object(), CHATML)


def test_the_tokenizers_own_template_is_used():
    import copy

    tok = copy.deepcopy(tokenizer("byte_level"))
    tok.chat_template = CHATML
    encoder = ChatEncoder(tok)
    assert encoder.template == CHATML
    assert encoder.encode(conversation("a", "b")).supervised.any()


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_learned_whole_and_end(kind):
    tok = tokenizer(kind)
    texts = ["Lima is 日本", "done</s>", "<s>begun"]
    encoded = ChatEncoder(tok).encode_batch([Document(text=text, file="f", line=1) for text in texts])
    for text, row in zip(texts, encoded, strict=True):
        assert isinstance(row, Encoded)
        assert row.supervised.all()
        assert row.input_ids[-1] == tok.eos_token_id
        assert list(row.input_ids).count(tok.eos_token_id) == 1
        assert squeeze(text.removesuffix("</s>")) in squeeze(tok.decode(row.input_ids))


def test_a_document_has_one_beginning_of_text():
    import copy

    from tokenizers import processors

    tok = copy.deepcopy(tokenizer("byte_level"))
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tok.bos_token_id)]
    )
    for text in ("Lima", "<s>Lima"):
        ids = ChatEncoder(tok).encode(Document(text=text, file="f", line=1)).input_ids.tolist()
        assert ids.count(tok.bos_token_id) == 1
        assert ids[0] == tok.bos_token_id


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=15) | st.lists(
    st.sampled_from(
        [" ", "\n", "Lima", "é", "e\u0301", "日本", "🙂", ":", "<|im_end|>", "</s>", "assistant", "[/INST]", "<think>"]
    ),
    min_size=1,
    max_size=6,
).map("".join)
TURN = TEXT.filter(lambda text: bool(text.strip()))


def squeeze(text: str) -> str:
    """Without whitespace and in one normal form: what tokenizers and templates may change about a text."""
    return re.sub(r"\s+", "", unicodedata.normalize("NFC", text))


def without_stop_token(answer: str, stop: str) -> str:
    """The answer that is learned: the template writes the stop token that ends it."""
    bare = answer.rstrip().removesuffix(stop).rstrip()
    return bare if bare else answer


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3),
    name=st.sampled_from(sorted(GOOD_TEMPLATES)),
    kind=st.sampled_from(KINDS),
)
def test_the_proof_holds_or_the_row_is_refused(turns, name, kind):
    chat = conversation(*[text for turn in turns for text in turn])
    result = ChatEncoder(tokenizer(kind), GOOD_TEMPLATES[name]).encode_batch([chat])[0]
    turns = [(question, without_stop_token(answer, STOPS[name])) for question, answer in turns]
    if any(token in text for turn in turns for text in turn for token in SPECIAL):
        assert isinstance(result, Problem)
        assert "special token" in result.problem
        return
    assert isinstance(result, Encoded), result
    texts = learned(result, kind)
    gap = ["<think></think>" if name == "thinking" and i == len(turns) - 1 else "" for i in range(len(turns))]
    assert [squeeze(text) for text in texts] == [
        squeeze(before + answer + STOPS[name]) for before, (_, answer) in zip(gap, turns, strict=True)
    ]


def test_the_models_that_ship_with_the_package_have_a_sound_template():
    tiny = Path(__file__).parent.parent / "llmtune" / "builtin" / "tiny"
    if not (tiny / "tokenizer.json").exists():
        pytest.skip("builtin:tiny is not built here")
    from transformers import AutoTokenizer

    encoder = ChatEncoder(AutoTokenizer.from_pretrained(tiny))
    encoded = encoder.encode(conversation("What is the capital?", "lima", "and then?", "nothing"))
    texts = [encoder.tokenizer.decode(run).strip() for run in runs(encoded)]
    assert [text.split("<")[0].strip() for text in texts] == ["lima", "nothing"]
    assert all(run[-1] == encoder.tokenizer.eos_token_id for run in runs(encoded))
