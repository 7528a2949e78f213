"""Contract over real chat templates: what is learned is the rendered answer and its stop token, or the row is refused.

The templates are those that ship with `trl` and those in ``chat_templates``. What each one must give is written down
here and compared with the decoded tokens; nothing of the implementation is asked for it.
"""

from __future__ import annotations

import copy
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_tokenizers import KINDS, chat_tokenizer, from_sentencepiece, package_data
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data import ChatEncoder, Conversation, Encoded, Message, Problem
from llmtune.presets import Preset

HERE = Path(__file__).parent / "chat_templates"
OURS = sorted(path.stem for path in HERE.glob("*.jinja"))


def _trl_names() -> list[str]:
    try:
        return sorted(path.stem for path in package_data("trl", "chat_templates").glob("*.jinja"))
    except pytest.skip.Exception:
        return []


TRL = _trl_names()


@cache
def source(name: str) -> str:
    folder, _, stem = name.rpartition("/")
    return ((package_data("trl", "chat_templates") if folder else HERE) / f"{stem}.jinja").read_text()


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str, **more: Any) -> Message:
    return Message(role="assistant", content=content, **more)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def chat(*messages: Message, tools: Any = None) -> Conversation:
    return Conversation(messages=messages, tools=tools, file="d.jsonl", line=1)


CALL = {"type": "function", "id": "call12345", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
ZONE = {"type": "object", "properties": {"zone": {"type": "string", "description": "z"}}, "required": ["zone"]}
TOOLS = ({"type": "function", "function": {"name": "now", "description": "the time", "parameters": ZONE}},)
PLAIN = {
    "single": chat(user("What?"), assistant("Lima")),
    "multi": chat(user("What?"), assistant("Lima"), user("And?"), assistant("Quito")),
    "system": chat(system("Be kind"), user("What?"), assistant("Lima"), user("And?"), assistant("Quito")),
    "spaces": chat(user(" What? "), assistant("  Lima \n\n"), user("And?\n"), assistant("\n Quito\t")),
    "short": chat(user("."), assistant("0"), user("\n?"), assistant("a")),
    "unicode": chat(user("é 日本?"), assistant("🙂 née e\u0301"), user("x"), assistant("日\u00a0本")),
    "markers": chat(
        user("say [INST] assistant:"), assistant("</tool_call> [/INST] user:"), user("<|"), assistant("|>")
    ),
    "repeated": chat(user("Lima"), assistant("Lima"), user("Lima"), assistant("Lima"), user("a"), assistant("a")),
}
TOOL_CHAT = chat(
    user("time?"),
    assistant("", tool_calls=(CALL,)),
    Message(role="tool", content="noon", name="now", extra={"tool_call_id": "call12345"}),
    assistant("It is noon"),
    tools=TOOLS,
)

# Per family of templates (the longest name that fits): the text that the model writes before the content, before the
# content of the last answer where that differs, and the stop token.
EMPTY = "<think>\n\n</think>\n\n"
CLOSED = "\n</think>\n\n"  # the generation prompt has opened the thought
WRITES: dict[str, tuple[str, str | None, str]] = {
    "cohere": ("", None, "<|END_OF_TURN_TOKEN|>"),
    "cohere2": ("", None, "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek_r1_distill_training": ("", None, "<\uff5cend▁of▁sentence\uff5c>"),
    "deepseekv3_training": ("", None, "<\uff5cend▁of▁sentence\uff5c>"),
    "diffusion_gemma": ("", None, "<turn|>"),
    "gemma": ("", None, "<end_of_turn>"),
    "gemma4": ("", None, "<turn|>"),
    "glm4moe_training": ("\n<think></think>\n", None, "<|user|>"),
    "gptoss": ("<|channel|>final<|message|>", None, "<|return|>"),
    "lfm2": ("", None, "<|im_end|>"),
    "llama2": (" ", None, "</s>"),
    "llama3": ("", None, "<|eot_id|>"),
    "mistral": (" ", None, "</s>"),
    "mistral_tekken": ("", None, "</s>"),
    "muse_glimmer": (" to=user<|message|>", None, "<|eot|>"),
    # the generation prompt opens a thought, the text closes it at once
    "nemotron": ("</think>", None, "<|im_end|>"),
    "phi3": ("", None, "<|end|>"),
    "qwen2_5": ("", None, "<|im_end|>"),
    "qwen2_5_vl_training": ("", None, "<|im_end|>"),
    "qwen3": ("", EMPTY, "<|im_end|>"),
    "qwen3_training": (EMPTY, None, "<|im_end|>"),
    "qwen3_instruct_2507": ("", None, "<|im_end|>"),
    "qwen3_vl": ("", None, "<|im_end|>"),
    "qwen3_5_nothink": ("", None, "<|im_end|>"),
    "qwen3_5_nothink_training": ("", None, "<|im_end|>"),
    "qwen3_5_think": (CLOSED, None, "<|im_end|>"),
    "qwen3_6": (CLOSED, None, "<|im_end|>"),
    "qwen3_8": (CLOSED, None, "<|im_end|>"),
    "zephyr": ("", None, "</s>"),
}
# gpt-oss closes earlier answers with another token than the last; its training variant marks it all the same.
EARLIER_STOP = {"gptoss_training": "<|end|>"}

PROMPT_DIFFERS = "writes the prompt of an answer differently once the answer follows: "
LEFT_OUT = "leaves out or rewrites the text of role|rewrites the assistant's text"
# Templates that no conversation of plain text can be learned with, and what they do.
REFUSED = {
    # the generation prompt opens a thought that the template does not write before an answer
    "deepseek_r1_distill": rf"{PROMPT_DIFFERS}'[<think]*>\\n' becomes",
    "deepseekv3": rf"{PROMPT_DIFFERS}'[<think]*>\\n' becomes",
    "nemotron_3_nano": rf"{PROMPT_DIFFERS}'\\n' becomes ['\"]</think>",
    "nemotron_3_super": rf"{PROMPT_DIFFERS}'\\n' becomes ['\"]</think>",
    "nemotron_3_ultra": rf"{PROMPT_DIFFERS}'\\n' becomes ['\"]</think>",
    "nemotron_3_5_lightning": rf"{PROMPT_DIFFERS}'\\n' becomes ['\"]</think>",
    # an answer ends where the next turn begins
    "glm4moe": "leaves no stop token after the assistant's text",
    # vision templates that read lists of parts
    "idefics3": LEFT_OUT,
    "idefics3_training": LEFT_OUT,
    "smolvlm": LEFT_OUT,
    "smolvlm_training": LEFT_OUT,
    "llava_next": "refuses the row: 'str object' has no attribute",
    "llava_next_training": "refuses the row: 'str object' has no attribute",
}
# Templates that write earlier answers in another way than the last: only the last can be learned.
LAST_ONLY = {
    "gptoss": r"leaves no stop token .*<\|end\|>.* follows one, '<\|return\|>' the last",
    "qwen3_5_nothink": PROMPT_DIFFERS,
    "qwen3_5_think": PROMPT_DIFFERS,
    "qwen3_6": PROMPT_DIFFERS,
}
NO_SYSTEM = "System role not supported"


def stem(name: str) -> str:
    return name.rpartition("/")[2]


def writes(name: str) -> tuple[str, str, str]:
    family = max((known for known in WRITES if stem(name).startswith(known)), key=len, default=None)
    if family is None:
        pytest.fail(f"{name} is new: write down what it writes")
    opening, last, stop = WRITES[family]
    return opening, opening if last is None else last, stop


def learned(tok: Any, encoded: Encoded) -> list[str]:
    """The supervised tokens decoded, cut where the mask has gaps."""
    where = np.flatnonzero(encoded.supervised)
    pieces = np.split(where, np.flatnonzero(np.diff(where) > 1) + 1)
    return [tok.decode(encoded.input_ids[piece], clean_up_tokenization_spaces=False) for piece in pieces if len(piece)]


def rendered(tok: Any, template: str, conversation: Conversation, **more: Any) -> Any:
    return tok.apply_chat_template(
        [message.to_template() for message in conversation.messages],
        tools=list(conversation.tools) if conversation.tools else None,
        chat_template=template,
        **more,
    )


def assert_learned(name: str, tok: Any, conversation: Conversation, encoded: Encoded, count: int) -> None:
    """The last ``count`` answers are learned, each as the template must write it, and nothing else."""
    opening, last_opening, stop = writes(name)
    # SentencePiece writes a space as ▁, and so reads ▁ as a space; it drops the space before what it decodes first.
    whole = rendered(tok, source(name), conversation, tokenize=False).replace("▁", " ")
    opening, last_opening, stop = (text.replace("▁", " ") for text in (opening, last_opening, stop))
    answers = [message for message in conversation.messages if message.role == "assistant"][-count:]
    texts = [text.replace("▁", " ") for text in learned(tok, encoded)]
    assert len(texts) == count
    at = 0
    for message, text in zip(answers, texts, strict=True):
        last = message is answers[-1]
        closing = stop if last else EARLIER_STOP.get(stem(name), stop)
        before = last_opening if last else opening
        assert text.lstrip().startswith(before.strip()), (text, before)
        assert text.endswith(closing)
        content = text.lstrip()[len(before.strip()) : -len(closing)]
        assert content.strip() == message.content.replace("▁", " ").strip()
        found = whole.find(text.lstrip(), at)
        assert found >= at, "the run is a piece of the rendered text, in its order"
        at = found + len(text.lstrip())
    assert rendered(tok, source(name), conversation)["input_ids"] == encoded.input_ids.tolist()


def encode(name: str, conversation: Conversation, kind: Any = "byte_level", supervise: Any = "all") -> Any:
    return ChatEncoder(chat_tokenizer(source(name), kind), source(name), supervise=supervise).encode_batch(
        [conversation]
    )[0]


def assert_handled_or_refused(name: str, case: str, kind: Any = "byte_level") -> None:
    conversation, tok, short = PLAIN[case], chat_tokenizer(source(name), kind), stem(name)
    answers = sum(message.role == "assistant" for message in conversation.messages)
    result = encode(name, conversation, kind)
    if short in REFUSED:
        assert isinstance(result, Problem)
        assert re.search(REFUSED[short], result.problem), result
        assert "--set data.chat_template=FILE" in result.hint
        assert isinstance(encode(name, conversation, kind, "last"), Problem)
        return
    if case == "system" and re.fullmatch("gemma(_training)?", short):
        assert isinstance(result, Problem)
        assert NO_SYSTEM in result.problem
        return
    if answers > 1 and (short in LAST_ONLY or (case == "system" and short in ("mistral_v3", "mistral_tekken"))):
        assert isinstance(result, Problem)
        # The last question gets the system prompt that an earlier one had when it was the last.
        assert re.search(LAST_ONLY.get(short, PROMPT_DIFFERS), result.problem), result
        assert "--set data.supervise=last" in result.hint
        last = encode(name, conversation, kind, "last")
        assert isinstance(last, Encoded), last
        assert_learned(name, tok, conversation, last, 1)
        return
    assert isinstance(result, Encoded), result
    assert_learned(name, tok, conversation, result, answers)


@pytest.mark.parametrize("name", [f"trl/{name}" for name in TRL])
def test_templates_of_trl(name):
    for case in PLAIN:
        assert_handled_or_refused(name, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OURS)
def test_templates_from_published_formats(name, kind):
    if name == "mistral_tekken" and kind != "byte_level":
        pytest.skip("tekken is byte-level")
    for case in PLAIN:
        assert_handled_or_refused(name, case, kind)


# Family, first token, end of text, the end of a prompt, and its beginning with a system message.
LAYOUTS: dict[str, tuple[str, str | None, str, str, str]] = {
    "llama 2": ("llama", "<s>", "</s>", " [/INST]", "<s>[INST] <<SYS>>\nBe kind\n<</SYS>>\n\nWhat? [/INST]"),
    "llama 3": (
        "llama",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>",
    ),
    "smollm2": (
        "llama",
        "<|endoftext|>",
        "<|endoftext|>",
        "\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>",
    ),
    "smollm3": (
        "llama",
        None,
        "<|end_of_text|>",
        "\n<|im_start|>assistant\n",
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>",
    ),
    "another llama": ("llama", "<bos>", "<eos>", "\n\nAssistant:", "<bos>System: Be kind\n\nUser: What?"),
    "gemma": (
        "gemma",
        "<bos>",
        "<eos>",
        "<end_of_turn>\n<start_of_turn>model\n",
        "<bos><start_of_turn>user\nBe kind\n\nWhat?",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_templates_of_presets_for_base_models_are_proven(layout, kind):
    family, bos, eos, prompt, opening = LAYOUTS[layout]
    template = Preset.load(family).chat_template
    special = "<|im_start|><|im_end|><|start_header_id|><|end_header_id|><|eot_id|><start_of_turn><end_of_turn>"
    tok = copy.deepcopy(chat_tokenizer(special, kind))
    tok.add_special_tokens({"eos_token": eos, "bos_token": bos or eos})
    if bos is None:
        tok.bos_token = None
    asked = rendered(tok, template, chat(system("Be kind"), user("What?")), tokenize=False, add_generation_prompt=True)
    assert asked.startswith(opening)
    assert asked.endswith(prompt)
    for name, conversation in PLAIN.items():
        encoded = ChatEncoder(tok, template, supervise="all").encode_batch([conversation])[0]
        assert isinstance(encoded, Encoded), (name, encoded)
        answers = [message.content.strip() for message in conversation.messages if message.role == "assistant"]
        texts = learned(tok, encoded)
        assert [text.endswith(eos) for text in texts] == [True] * len(answers)
        assert [text.removesuffix(eos).strip().replace("▁", " ") for text in texts] == answers
        assert rendered(tok, template, conversation)["input_ids"] == encoded.input_ids.tolist()
    # A prompt after a system message alone, and an answer after it, are one text too.
    alone = chat(system("Be kind"), assistant("Lima"))
    prompted = rendered(tok, template, chat(system("Be kind")), tokenize=False, add_generation_prompt=True)
    assert rendered(tok, template, alone, tokenize=False).startswith(prompted)


def test_every_expectation_is_about_a_template_that_exists():
    assert {"qwen2_5", "qwen3", "llama2", "llama3", "zephyr", "phi3", "mistral_v1", "mistral_v3", "gemma"} <= set(OURS)
    if TRL:
        assert {*REFUSED, *LAST_ONLY, *EARLIER_STOP} <= {*TRL, *OURS}
        assert all(any(name.startswith(family) for name in (*TRL, *OURS)) for family in WRITES)


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", OURS)
def test_ways_to_supervise(name):
    if name == "gemma":
        conversation = chat(user("a1"), assistant("b1"), user("a2"), assistant("b2"), user("a3"), assistant("b3"))
    else:
        conversation = chat(system("s"), user("a1"), assistant("b1"), user("a2"), assistant("b2"))
    tok = chat_tokenizer(source(name))
    for supervise in ("last", "completion"):
        encoded = encode(name, conversation, supervise=supervise)
        assert_learned(name, tok, conversation, encoded, 1)
    whole = encode(name, conversation, supervise="text")
    assert whole.supervised.all()
    assert tok.decode(whole.input_ids) == rendered(tok, source(name), conversation, tokenize=False)


def test_the_completion_is_every_answer_after_the_last_question():
    plain = chat(user("0"), assistant("old"), user("1"), assistant("one"), assistant("two"))
    tools = chat(user("0"), assistant("old"), *TOOL_CHAT.messages, tools=TOOLS)
    cases = [("qwen2_5", plain), ("llama3", plain)]
    cases += [("trl/qwen3", tools), ("trl/lfm2_v2", tools), ("trl/lfm2_v2_training", tools)] if TRL else []
    for name, conversation in cases:
        tok = chat_tokenizer(source(name))
        texts = {
            mode: learned(tok, encode(name, conversation, supervise=mode)) for mode in ("all", "completion", "last")
        }
        assert texts["all"][1:] == texts["completion"]
        assert texts["completion"][1:] == texts["last"]
        assert len(texts["all"]) == 3


def test_weights_are_respected_whatever_is_supervised():
    first, second = assistant("one", supervised=False), assistant("two")
    for messages, expected in (
        ((user("a"), first, user("b"), second), {"all": 1, "last": 1, "completion": 1}),
        ((user("a"), second, user("b"), first), {"all": 1, "last": 0, "completion": 0}),
    ):
        for mode, count in expected.items():
            for name in ("llama3", *(["trl/llama3_training"] if TRL else [])):
                tok = chat_tokenizer(source(name))
                assert learned(tok, encode(name, chat(*messages), supervise=mode)) == ["two<|eot_id|>"] * count


# ── thoughts and tools ───────────────────────────────────────────────────────────────────────────────────────────

THOUGHT = "<think>\nhm, well\n</think>\n\nQuito"


@pytest.mark.parametrize("name", [*OURS, *(f"trl/{name}" for name in TRL)])
def test_no_reasoning_is_lost_without_a_word(name):
    if stem(name) in ("idefics3", "smolvlm", "llava_next"):
        return
    tok = chat_tokenizer(source(name))
    thoughtful = [assistant(THOUGHT)]
    thoughtful += [assistant("Quito", extra={key: "hm, well"}) for key in ("reasoning_content", "thinking")]
    for message in thoughtful:
        for messages in (
            (user("a"), assistant("b"), user("c"), message),
            (user("c"), message, user("a"), assistant("b")),
        ):
            for mode in ("all", "last"):
                result = encode(name, chat(*messages), supervise=mode)
                if isinstance(result, Problem):
                    continue  # what it says is tested below and above
                supervised = messages if mode == "all" else messages[-1:]
                prompts = rendered(tok, source(name), chat(*messages), tokenize=False)
                found = [text for text in learned(tok, result) if "Quito" in text]
                assert len(found) == (message in supervised)
                for text in found:
                    assert text.count("hm, well") == 1, (text, prompts)
                    assert not re.search(r"</think>\s*<think>", text)


@pytest.mark.parametrize(
    ("name", "message", "text", "hint"),
    [
        (
            "qwen3",
            assistant(THOUGHT),
            "strips the reasoning of an answer once the conversation goes on",
            "supervise=last",
        ),
        ("qwen3", assistant("Quito", extra={"reasoning_content": "hm"}), "strips the reasoning", "supervise=last"),
        ("trl/lfm2_2_5", assistant(THOUGHT), "strips the reasoning of an answer, 'hm, well'", "supervise=last"),
        (
            "llama3",
            assistant("Quito", extra={"thinking": "hm"}),
            "strips the reasoning of an answer, 'hm'",
            "chat_template",
        ),
        (
            "trl/qwen3_8",
            assistant(THOUGHT),
            "a thought of its own before the one in the content",
            "'reasoning_content'",
        ),
    ],
)
def test_lost_reasoning_is_named_with_the_way_out(name, message, text, hint):
    if name.startswith("trl/") and not TRL:
        pytest.skip("trl is not installed")
    earlier = encode(name, chat(user("c"), message, user("a"), assistant("b")))
    assert text in earlier.problem
    assert hint in earlier.hint
    if "supervise=last" in hint:
        assert earlier.field == "messages[1]"
        assert isinstance(encode(name, chat(user("c"), message, user("a"), assistant("b")), supervise="last"), Encoded)


TOOL_CALLS = {
    "diffusion_gemma": "ignores add_generation_prompt",
    "diffusion_gemma_training": "marks 3 answers, the row has 2",
    "glm4moe": "leaves no stop token",
    "lfm2": "leaves out the call of the tool 'now'",
    "lfm2_training": "leaves out the call of the tool 'now'",
    "nemotron_3_nano": PROMPT_DIFFERS,
    "nemotron_3_super": PROMPT_DIFFERS,
    "nemotron_3_ultra": PROMPT_DIFFERS,
    "nemotron_3_5_lightning": PROMPT_DIFFERS,
}


@pytest.mark.parametrize("name", [*OURS, *(f"trl/{name}" for name in TRL)])
def test_tools(name):
    result, tok = encode(name, TOOL_CHAT), chat_tokenizer(source(name))
    if "tools" not in source(name):
        assert re.search("leaves out ('the time' of )?the tool 'now' from the prompt|refuses the row", result.problem)
    elif stem(name) in TOOL_CALLS:
        assert TOOL_CALLS[stem(name)] in result.problem
    else:
        assert isinstance(result, Encoded), result
        call, answer = learned(tok, result)
        assert "now" in call
        assert "UTC" in call
        assert "noon" not in call
        assert "It is noon" in answer
        special = tok.convert_ids_to_tokens(sorted(tok.added_tokens_decoder))
        for text in (call, answer):
            assert text.endswith(tuple(special)), "a stop token ends it"


def test_a_call_that_the_template_drops_is_named():
    # DeepSeek's distilled models: calls are written only where there is no content, and there always is.
    template = source("llama3")
    row = chat(user("a"), assistant("b", tool_calls=(CALL,)))
    result = ChatEncoder(chat_tokenizer(template), template).encode_batch([row])[0]
    assert "leaves out the call of the tool 'now'" in result.problem


@pytest.mark.skipif(not TRL, reason="trl is not installed")
def test_messages_that_a_template_leaves_out_are_named():
    row = chat(user("a"), assistant("b"), Message(role="tool", content="noon"), assistant("c"))
    result = encode("trl/phi3", row)
    assert "leaves out or rewrites the text of role 'tool' 'noon'" in result.problem
    assert result.field == "messages[2].content"


# ── any conversation ─────────────────────────────────────────────────────────────────────────────────────────────

PIECES = [
    " ",
    "\n",
    "\t",
    "Lima",
    "a",
    "e\u0301",
    "日本",
    "🙂",
    "\u00a0",
    ":",
    "assistant",
    "user",
    "system",
    "|>",
    "<|",
]
PIECES += ["[INST]", "[/INST]", "<<SYS>>", "<think>", "</think>", "<tool_call>", "<s>", "</s>", "<|im_end|>", "<|end|>"]
PIECES += ["<|im_start|>", "<|eot_id|>", "<end_of_turn>", "<|user|>", "<0x0A>", "▁", "{{ x }}", "\\n", "None", "\x00"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=6)
TURN = TEXT.map("".join).filter(lambda text: bool(text.strip()))
CONVERSATIONS = st.builds(
    lambda first, turns: chat(
        *([system(first)] if first else []), *(m for q, a in turns for m in (user(q), assistant(a)))
    ),
    st.none() | TURN,
    st.lists(st.tuples(TURN, TURN), min_size=1, max_size=4),
)
ODD = ("<think>", "</think>")


def without_stop_tokens(conversation: Conversation, special: list[str]) -> Conversation:
    """The conversation that is learned: an answer that brings its stop token is learned without."""
    messages = []
    for message in conversation.messages:
        text = message.content.rstrip()
        token = max((token for token in special if text.endswith(token)), key=len, default=None)
        if message.role == "assistant" and token is not None:
            message = assistant(text.removesuffix(token).rstrip())
        messages.append(message)
    return chat(*messages)


def assert_proven_or_refused(name: str, kind: Any, conversation: Conversation, supervise: Any) -> None:
    tok = chat_tokenizer(source(name), kind)
    result = encode(name, conversation, kind, supervise)
    special = tok.convert_ids_to_tokens(sorted(tok.added_tokens_decoder))
    answers = sum(message.role == "assistant" for message in conversation.messages)
    if isinstance(result, Encoded):
        conversation = without_stop_tokens(conversation, special)
    texts = [message.content for message in conversation.messages]
    odd = any(mark in text for mark in ODD for text in texts)
    if isinstance(result, Encoded):
        count = 1 if supervise == "last" else answers
        if not odd:
            assert_learned(name, tok, conversation, result, count)
            return
        # Templates take such answers apart in their own ways: what follows the thought is there, and a stop token.
        said = [message.content for message in conversation.messages if message.role == "assistant"][-count:]
        for content, text in zip(said, learned(tok, result), strict=True):
            assert content.rpartition("</think>")[2].replace("▁", " ").strip() in text.replace("▁", " ")
        assert int(result.input_ids[result.supervised][-1]) in tok.added_tokens_decoder
        return
    assert (result.file, result.line) == ("d.jsonl", 1)
    assert result.problem
    assert result.hint
    if any(token in text for token in special for text in texts):
        return
    reasons = [REFUSED.get(stem(name)), LAST_ONLY.get(stem(name)) if supervise == "all" and answers > 1 else None]
    if texts != [message.content for message in conversation.messages if message.role != "system"]:
        reasons.append(NO_SYSTEM if "gemma" in name else PROMPT_DIFFERS if "mistral" in name else None)
    if kind in ("metaspace_always", "metaspace_legacy"):
        # A space is put after every special token, so also after one that the template writes inside an answer.
        reasons.append("the supervised tokens read")
    if odd:
        reasons.append("rewrites|strips the reasoning|a thought of its own|writes the prompt")
    assert any(reason and re.search(reason, result.problem) for reason in reasons), result


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(OURS), st.sampled_from(KINDS), CONVERSATIONS, st.sampled_from(["all", "last"]))
def test_any_conversation_is_proven_or_refused(name, kind, conversation, supervise):
    assert_proven_or_refused(name, "byte_level" if name == "mistral_tekken" else kind, conversation, supervise)


@pytest.mark.slow
@settings(max_examples=6000, deadline=None)
@given(
    st.sampled_from([*OURS, *(f"trl/{name}" for name in TRL)]),
    st.sampled_from(KINDS),
    CONVERSATIONS,
    st.sampled_from(["all", "last"]),
)
def test_any_conversation_with_any_template_is_proven_or_refused(name, kind, conversation, supervise):
    assert_proven_or_refused(name, "byte_level" if name == "mistral_tekken" else kind, conversation, supervise)


# ── the marks of trl's training templates ────────────────────────────────────────────────────────────────────────

NAMES_WITH_REFERENCE = [name for name in TRL if f"{name}_training" in TRL]
# What the marks add before the answer as we derive it. None: nothing can be derived, see REFUSED.
REFERENCE_ADDS = {
    # The generation prompt of Qwen2.5 ends with the line break that the marks begin with; it is never generated.
    "qwen2_5": "\n",
    # The header is in the generation prompt; the marks cover it.
    "gptoss": "<|start|>assistant",
    "muse_glimmer": "<|start|>assistant",
}
# The training variant writes another text than the original: an (empty) thought before every answer, where the
# original writes it before the last, or already in the generation prompt.
REFERENCE_WRITES_MORE = {"qwen3", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6", "qwen3_8"}


@pytest.mark.parametrize("name", NAMES_WITH_REFERENCE)
def test_derived_masks_are_those_that_trl_marks(name):
    """Differences that all have in common: the marks go on after the stop token, to a line break or, with Phi-3's

    last answer, to the end-of-text token. A model stops at the stop token, so that nothing after it is generated.
    """
    if name in REFUSED:
        return
    training = source(f"trl/{name}_training")
    tok = chat_tokenizer(training)
    for case, conversation in PLAIN.items():
        derived = encode(f"trl/{name}", conversation, supervise="last" if name in LAST_ONLY else "all")
        if isinstance(derived, Problem):
            assert (name, case) == ("gemma", "system")
            continue
        text, marks = _marked(tok, training, conversation)
        reference = [text[start:end] for start, end in marks]
        texts = learned(chat_tokenizer(source(f"trl/{name}")), derived)
        assert len(reference) >= len(texts)
        for mine, marked in zip(reversed(texts), reversed(reference), strict=False):
            marked = marked.removesuffix(f"\n{tok.eos_token}").removesuffix("\n")
            if name in REFERENCE_WRITES_MORE:
                gap = re.compile(r"\s*(<think>)?\s*</think>\s*")
                assert gap.sub("", mine, count=1).strip() == gap.sub("", marked, count=1).strip()
            else:
                assert REFERENCE_ADDS.get(name, "") + mine == marked


def _marked(tok: Any, template: str, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
    """The text and the ranges marked in it. (Not from `apply_chat_template`: what it makes of the ranges leaves out

    every answer that begins with a space that the tokenizer's offsets leave out.)
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, marks = render_jinja_template(
        conversations=[[message.to_template() for message in conversation.messages]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tok.special_tokens_map,
    )
    joined: list[tuple[int, int]] = []
    for start, end in marks[0]:  # Phi-3 and Gemma mark what closes an answer by itself
        begin = joined.pop()[0] if joined and joined[-1][1] == start else start
        joined.append((begin, end))
    return texts[0], joined


# ── Mistral and Llama-2 with their own tokenizers ────────────────────────────────────────────────────────────────

MISTRAL = {
    "mistral_v1": ("tokenizer.model.v1", "InstructTokenizerV1"),
    "mistral_v2": ("mistral_instruct_tokenizer_240216.model.v2", "InstructTokenizerV2"),
    "mistral_v3": ("mistral_instruct_tokenizer_240323.model.v3", "InstructTokenizerV3"),
    "mistral_tekken": ("tekken_240718.json", "InstructTokenizerV3"),
}
EXCHANGES = [
    ("hi", "Lima"),
    ("  two  spaces ", "\n leading line break, é 日本 🙂"),
    ("日本\n\n", "a  b\tc"),
    ("[/INST] quoted", "1. one\n2. two  "),
]


def _tekken(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.mistral.tokenizer import MistralConverter

    backend = MistralConverter(str(path)).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("mistral_v2", "mistral_tekken") else ())
        for name in MISTRAL
    ],
)
def test_ids_are_those_of_mistral_common(name, with_system, turns):
    """Where the two differ, and rightly so:

    - v3 takes spaces from the end of an answer (`rstrip(" ")`), as our template does; v1 and the question keep theirs;
    - mistral-common never reads special tokens in a text, so that ``[/INST]`` in a v3 question is plain text there; a
      tokenizer of transformers would read the token, and the row is refused (tested below);
    - of an empty question v3 makes no token, our template the space that SentencePiece puts before every text;
    - the space of SentencePiece is written by our templates, for tokenizers that put one before the first piece only;
      templates on the Hub rely on conversions that put one before every piece instead, and write none.
    """
    file, version = MISTRAL[name]
    path = package_data("mistral_common", "data") / file
    from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
    from mistral_common.protocol.instruct.request import InstructRequest
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    tekken = "tekken" in name
    reference = getattr(instruct, version)(
        Tekkenizer.from_file(str(path)) if tekken else SentencePieceTokenizer(str(path))
    )
    tok = _tekken_once(path) if tekken else from_sentencepiece(path, "first")
    template = source("mistral_v3" if name == "mistral_v2" else name)
    plain_inst = name == "mistral_v1"
    exchanges = [exchange for exchange in EXCHANGES if plain_inst or "[/INST]" not in exchange[0]]
    for start in range(len(exchanges) - turns + 1):
        chosen = exchanges[start : start + turns]
        prompt = "Be kind.\n " if with_system else None
        request = InstructRequest(
            messages=[m for q, a in chosen for m in (UserMessage(content=q), AssistantMessage(content=a))],
            system_prompt=prompt,
        )
        messages = [message for q, a in chosen for message in (user(q), assistant(a))]
        row = chat(*([system(prompt)] if prompt else []), *messages)
        moves = with_system and turns > 1 and not plain_inst
        refused = ChatEncoder(tok, template).encode_batch([row])[0]
        assert isinstance(refused, Problem) == moves
        result = ChatEncoder(tok, template, supervise="last" if moves else "all").encode_batch([row])[0]
        assert isinstance(result, Encoded), result
        assert result.input_ids.tolist() == reference.encode_instruct(request).tokens
        # What is learned is what mistral-common encodes for the answers.
        expected = [
            reference.encode_assistant_message(AssistantMessage(content=answer), is_before_last_user_message=False)
            for _, answer in (chosen[-1:] if moves else chosen)
        ]
        assert [ids for piece in expected for ids in piece] == result.input_ids[result.supervised].tolist()


@cache
def _tekken_once(path: Path) -> Any:
    return _tekken(path)


def test_a_special_token_of_mistral_in_a_question_is_refused():
    path = package_data("mistral_common", "data") / MISTRAL["mistral_v3"][0]
    encoder = ChatEncoder(from_sentencepiece(path, "first"), source("mistral_v3"))
    result = encoder.encode_batch([chat(user("a [/INST] b"), assistant("c"))])[0]
    assert result.field == "messages[0].content"
    assert "special token '[/INST]'" in result.problem


LLAMA2_ENVIRONMENT = "LLMTUNE_TEST_LLAMA2_TOKENIZER"


def _spm_models() -> list[Any]:
    llama2 = os.environ.get(LLAMA2_ENVIRONMENT)
    reason = f"{LLAMA2_ENVIRONMENT} names no tokenizer.model"
    return [
        pytest.param("mistral_v1", id="mistral_v1"),
        pytest.param(llama2, id="llama2", marks=pytest.mark.skipif(not llama2, reason=reason)),
    ]


@pytest.mark.parametrize("scheme", ["first", pytest.param("always", marks=pytest.mark.slow), "legacy"])
@pytest.mark.parametrize("model", _spm_models())
def test_prefix_spaces_of_llama2(model, scheme):
    """Ids as Meta's reference code writes them: every exchange is one text, ``[INST] … [/INST] … ``, between <s> and

    </s>; the answer's first token brings the space that stands before it.
    """
    path = package_data("mistral_common", "data") / "tokenizer.model.v1" if model == "mistral_v1" else Path(model)
    pieces = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    tok = from_sentencepiece(path, scheme)
    answers = ["Lima", "l", "1 + 1", "- a list\n- of two", "é", "🙂", "日本", "'quoted'", "  deep", "\nbreak"]
    exchanges = [(f"question {n}?", answer) for n, answer in enumerate(answers)]
    row = chat(*(message for q, a in exchanges for message in (user(q), assistant(a))))
    # A tokenizer that puts its space before the first piece only needs it written after the <s>.
    template = source("llama2") if scheme != "first" else source("llama2").replace("'[INST] '", "' [INST] '")
    encoded = ChatEncoder(tok, template).encode(row)
    texts = [f"[INST] {question} [/INST] {answer.strip()} " for question, answer in exchanges]
    expected = [[pieces.bos_id(), *pieces.encode(text), pieces.eos_id()] for text in texts]
    assert encoded.input_ids.tolist() == [index for exchange in expected for index in exchange]
    runs = learned(tok, encoded)
    assert [run.lstrip() for run in runs] == [f"{answer.strip()} </s>" for answer in answers]
    prompts = [[pieces.bos_id(), *pieces.encode(f"[INST] {question} [/INST]")] for question, _ in exchanges]
    mask = [index >= len(prompt) for prompt, ids in zip(prompts, expected, strict=True) for index in range(len(ids))]
    assert encoded.supervised.tolist() == mask
