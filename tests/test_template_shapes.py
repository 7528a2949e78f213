"""A row is given to a template in the way that the template reads, and the proof is the same in every way.

The templates are written here: one for each construction that published templates have.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_templates import CALL, PLAIN, TOOL_CHAT, TOOLS, TRL, assistant, chat, learned, source, system, user
from test_data_support import CHATML, MARKED, tokenizer
from test_data_support import TOOLS as READS_TOOLS

from llmtune.data import ChatEncoder, Conversation, Encoded, Message, Problem
from llmtune.data.shapes import other_shapes

TOK = tokenizer("byte_level")
END = "<|im_end|>"


def turns(answer: str, *, before: str = "", system: str = "m.content") -> str:
    """A ChatML template: ``before`` all, the expression of a ``system`` message, and the body of an ``answer``."""
    return (
        f"{before}{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' }}}}"
        f"{{% if m.role == 'assistant' %}}{answer}{{% elif m.role == 'system' %}}{{{{ {system} }}}}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


def calling(call: str) -> str:
    """The body of an answer that writes each ``call`` of it after its content."""
    return "{{ m.content or '' }}{% for call in m.tool_calls or [] %}<call>" + call + "</call>{% endfor %}"


AS_JSON = calling("{{ call | tojson }}")
SCHEMAS = "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"


def encode(template: str, *rows: Conversation, supervise: Any = "all") -> Any:
    results = ChatEncoder(TOK, template, supervise=supervise).encode_batch(rows)
    return results[0] if len(rows) == 1 else results


def problem(template: str, row: Conversation, supervise: Any = "all") -> str:
    result = encode(template, row, supervise=supervise)
    assert isinstance(result, Problem), learned(TOK, result)
    return result.problem


def text(result: Any) -> str:
    assert isinstance(result, Encoded), result
    return TOK.decode(result.input_ids)


def answers(template: str, row: Conversation, supervise: Any = "all") -> list[str]:
    result = encode(template, row, supervise=supervise)
    assert isinstance(result, Encoded), result
    return learned(TOK, result)


def with_tools(*names: str, question: str = "time?") -> Conversation:
    tools = tuple({"type": "function", "function": {"name": name, "parameters": {}}} for name in names)
    return chat(user(question), assistant("Noon"), tools=tools)


# ── the place of the tools ───────────────────────────────────────────────────────────────────────────────────────────

PLACES = {
    "variable": turns("{{ m.content }}", before=SCHEMAS),
    "text in the system message": turns(
        "{{ m.content }}", system="m.content + ('[' + m['tools'] + ']' if 'tools' in m and m['tools'] else '')"
    ),
    "text in the system message, joined with ~": turns(
        "{{ m.content }}", system="m.content ~ '[' ~ m.get('tools', '') ~ ']'"
    ),
    "list in the system message": turns(
        "{{ m.content }}", system="m.content + (m.tools | tojson if m.tools is defined else '')"
    ),
    "functions of the system message": turns(
        "{{ m.content }}", system="m.content + (m['functions'] if m['functions'] is defined else '')"
    ),
    "another variable": turns(
        "{{ m.content }}",
        before="{% if xml_tools %}<|im_start|>{% for tool in xml_tools %}{{ tool | string }}{% endfor %}{% endif %}",
    ),
}


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_tools_are_in_the_prompt_wherever_the_template_reads_them(name, with_system):
    row = chat(*([system("Be kind")] if with_system else []), user("what time is it now?"), assistant("Noon"))
    result = encode(PLACES[name], replace(row, tools=TOOLS))
    prompt, _, answer = text(result).rpartition("<|im_start|>assistant\n")
    assert answer == f"Noon{END}\n"
    assert learned(TOK, result) == [f"Noon{END}"]
    assert prompt.count("the time") == 1
    assert re.search("""['"]name['"]: ['"]now['"]""", prompt), prompt
    if "system message" in name:
        assert json.dumps(TOOLS[0]) in prompt
        assert prompt.count("<|im_start|>system") == 1
        assert ("Be kind" in prompt) == with_system
    if not with_system and "variable" not in name:
        without = encode(PLACES[name], row)
        assert not text(without).startswith("<|im_start|>system"), "a row without tools gets no system message"


@pytest.mark.parametrize("supervise", ["all", "last", "text"])
def test_a_template_without_a_place_for_tools_is_refused_by_name(supervise):
    # The name stands in the question, in an earlier answer and in a comment of the template.
    for template in (CHATML, MARKED, "{# tools: now #}" + CHATML):
        row = chat(user("what is now?"), assistant("now"), user("now?"), assistant("now"), tools=TOOLS)
        assert "leaves out" in problem(template, row, supervise)
        assert "the tool 'now' from the prompt" in problem(template, row, supervise)
        bare = replace(row, tools=({"name": "now"},))
        assert "leaves out the tool 'now' from the prompt" in problem(template, bare, supervise)


def test_every_tool_must_be_there_with_its_parameters_and_descriptions():
    only_first = turns("{{ m.content }}", before="{{ tools[:1] | tojson if tools }}")
    assert "leaves out the tool 'then' from the prompt" in problem(only_first, with_tools("now", "then"))
    only_names = turns("{{ m.content }}", before="{{ tools | map(attribute='function.name') | join(' ') if tools }}")
    assert isinstance(encode(only_names, with_tools("now", "then")), Encoded)
    row = chat(user("time?"), assistant("Noon"), tools=TOOLS)
    assert "leaves out 'the time' of the tool 'now'" in problem(only_names, row)
    deep = {"type": "object", "properties": {"spans": {"type": "array", "items": {"properties": {"to": {}}}}}}
    tool = {"type": "function", "function": {"name": "now", "parameters": deep}}
    names_and_first = only_names.replace("'function.name'", "'function.parameters.properties'")
    assert "'to' of the tool 'now'" in problem(
        names_and_first.replace("join(' ')", "map('first') | join(' ') + 'now'"), replace(row, tools=(tool,))
    )


def test_tools_after_the_first_learned_answer_do_not_count():
    # As Mistral's: the tools stand before the last question. Its marks would say nothing about the prompt.
    last_question = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ (tools | tojson if tools and loop.index0 >= messages | length - 2) ~ m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    row = chat(user("a"), assistant("b"), user("c"), assistant("d"), tools=TOOLS)
    for template in (last_question, re.sub(r"\{% (end)?generation %\}", "", last_question)):
        result = encode(template, row)
        assert isinstance(result, Problem)
        assert "supervise=last" in result.hint
        assert answers(template, row, "last") == [f"d{END}"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for t in tools or [] %}{{ t.function.name + (t.function | tojson) }}{% endfor %}", "wrapped"),
        ("{% for t in tools or [] %}{{ t.name + ': ' + t.description + (t.parameters | tojson) }}{% endfor %}", "bare"),
        ("{% for t in tools or [] %}{{ t | tojson }}{% endfor %}", "given"),
    ],
)
def test_schemas_are_wrapped_or_bare_as_the_template_reads_them(template, expected):
    bare = {key: TOOLS[0]["function"][key] for key in ("name", "description", "parameters")}
    wrapped = {"type": "function", "function": bare}
    rows = [chat(user("time?"), assistant("Noon"), tools=(tool,)) for tool in (wrapped, bare)]
    first, second = (text(each) for each in encode(turns("{{ m.content }}", before=template), *rows))
    assert (first == second) == (expected != "given")
    for each, tool in ((first, wrapped), (second, bare)):
        assert json.dumps(bare["parameters"]) in each
        assert expected != "given" or each.startswith(json.dumps(tool))


# ── calls and results ────────────────────────────────────────────────────────────────────────────────────────────────

ONE_CALL = replace(TOOL_CHAT, tools=None)
CALLS = {
    "object": calling('{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}'),
    "items": calling(
        '{"name": "{{ call.function.name }}", "arguments": { {%- for key, value in call.function.arguments | items %}'
        "{{ key | tojson }}: {{ value | tojson }}{{ ', ' if not loop.last }}{% endfor -%} }}"
    ),
    "joined with +": calling("{{ '{\"name\": \"' + call.function.name + '\", \"arguments\": '}}"
                             "{{ call['function']['arguments'] + '}' }}"),
    "joined with ~": calling('{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments }}}'),
    "only without content": calling('{"name": "{{ call.function.name }}", "arguments": {{ "" + '
                                    "call.function.arguments }}}").replace(
        "{{ m.content or '' }}{% for", "{% if m.content is not none %}{{ m.content }}{% else %}{% for"
    ) + "{% endif %}",
}  # fmt: skip
ARGUMENTS = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=5),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(10**20), 10**20)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(CALLS)), ARGUMENTS)
def test_a_call_is_learned_with_its_arguments_however_the_template_writes_it(name, arguments):
    call = {"type": "function", "function": {"name": "now", "arguments": arguments}}
    row = chat(user("time?"), assistant("", tool_calls=(call,)), Message(role="tool", content="noon"), assistant("ok"))
    said, last = answers(turns(CALLS[name]), row)
    assert last == f"ok{END}"
    said = said.removeprefix("<call>").removesuffix(f"</call>{END}")
    assert json.loads(said) == {"name": "now", "arguments": arguments}


LOSSY_CALLS = [
    ("left out", "{{ m.content }}", "leaves out the call of the tool 'now'"),
    ("only the name", calling("{{ call.function.name }}"), "leaves out 'zone' of the call of the tool 'now'"),
    (
        "only the keys",
        calling("{{ call.function.name }}{{ call.function.arguments.keys() | join }}"),
        "leaves out 'UTC'",
    ),
    ("only the arguments", calling("{{ call.function.arguments | tojson }}"), "leaves out the call of the tool 'now'"),
    ("only the first", calling("{{ call | tojson if loop.first }}"), "leaves out"),
    (
        "Python",
        calling("{{ call.function.name ~ (call.function.arguments if call.function.arguments is mapping else '-') }}"),
        "as Python, expected JSON|leaves out 'zone'",
    ),
]


@pytest.mark.parametrize(("name", "answer", "reason"), LOSSY_CALLS, ids=[name for name, *_ in LOSSY_CALLS])
@pytest.mark.parametrize("supervise", ["all", "last", "text"])
def test_a_call_that_loses_anything_is_refused_learned_or_not(name, answer, reason, supervise):
    other = {"type": "function", "function": {"name": "now", "arguments": {"zone": "CET"}}}
    calls = (CALL, other) if name == "only the first" else (CALL,)
    # The name of the tool stands in the question and in the schemas too.
    row = chat(
        user("what is now?"),
        assistant("", tool_calls=calls),
        Message(role="tool", content="noon"),
        assistant("now it is"),
    )
    for tools in (None, TOOLS):
        found = problem(turns(answer, before=SCHEMAS), replace(row, tools=tools), supervise)
        assert re.search(reason, found) or (tools and re.search("leaves out", found)), found


def test_the_refusal_of_the_shape_that_got_furthest_is_reported():
    reads_key = PLACES["text in the system message"]
    row = chat(user("a"), assistant("", tool_calls=(CALL,)), Message(role="tool", content="noon"), assistant("b"))
    result = encode(reads_key, replace(row, tools=TOOLS))
    assert "leaves out the call of the tool 'now'" in result.problem, "not the tools: the system message has them"
    assert "in the model's own form" in result.hint
    joins = turns(CALLS["joined with +"]) + "</s>"
    assert "refuses the row" not in problem(joins.replace("<|im_end|>", "|"), ONE_CALL)


def test_a_call_without_arguments_is_proven_too():
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    row = chat(user("now?"), assistant("", tool_calls=(call,)), Message(role="tool", content="x"), assistant("now"))
    for supervise in ("all", "last"):
        assert "leaves out the call of the tool 'now'" in problem(turns("{{ m.content }}"), row, supervise)
        assert len(answers(turns(CALLS["object"]), row, supervise)) == (2 if supervise == "all" else 1)


def test_bare_calls_are_wrapped_where_the_template_reads_wrapped_calls():
    bare = {"name": "now", "arguments": {"zone": "UTC"}}
    row = chat(user("time?"), assistant("", tool_calls=(bare,)), Message(role="tool", content="noon"), assistant("ok"))
    assert answers(turns(CALLS["object"]), row)[0] == f"<call>{json.dumps(bare)}</call>{END}"
    typed = calling("{{ call['type'] + ' ' + call['function']['name'] + (call.function.arguments | tojson) }}")
    assert answers(turns(typed), row)[0] == f'<call>function now{{"zone": "UTC"}}</call>{END}'


def test_a_result_must_be_written_with_its_name():
    named = replace(ONE_CALL, messages=(user("time?"), assistant("hm"), *ONE_CALL.messages[2:]))
    assert "leaves out the name 'now' of a tool's result" in problem(CHATML, named)
    writes_name = CHATML.replace("m['content']", "(m.name ~ ': ' if m.role == 'tool') ~ m['content']")
    assert "now: noon" in text(encode(writes_name, named))


# Gemma 4's way: the name of a result comes from the call with the same id.
LINKED = turns(calling("{{ call | tojson }}")).replace(
    "{% else %}{{ m.content }}",
    "{% elif m.role == 'tool' %}{% set ns = namespace(name=m.name) %}{% for c in messages[1].tool_calls %}"
    "{% if c.get('id') == m.get('tool_call_id') %}{% set ns.name = c.function.name %}{% endif %}{% endfor %}"
    "{{ ns.name ~ ' says ' ~ m.content }}{% else %}{{ m.content }}",
)
BY_NAME = turns(AS_JSON).replace("{% else %}{{ m.content", "{% else %}{{ (m.name or '') ~ ' says ' ~ m.content")


@pytest.mark.parametrize("template", [LINKED, BY_NAME])
@pytest.mark.parametrize("ids", [(), ("a", "b")])
def test_results_get_the_names_of_their_calls(template, ids):
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in ("now", "then")]
    results = [Message(role="tool", content=content) for content in ("noon", "later")]
    if ids:
        calls = [{**call, "id": each} for call, each in zip(calls, ids, strict=True)]
        results = [replace(result, extra={"tool_call_id": each}) for result, each in zip(results, ids, strict=True)]
        results.reverse()  # the ids say which call they answer
    row = chat(user("time?"), assistant("", tool_calls=tuple(calls)), *results, assistant("ok"))
    whole = text(encode(template, row))
    assert "now says noon" in whole
    assert "then says later" in whole


# ── ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

DEMANDS = (
    "{% if not {id} is defined or {id} | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
)
NINE = turns(
    calling(DEMANDS.replace("{id}", "call.id") + "{{ call | tojson }}"),
).replace(
    "{% else %}{{ m.content",
    "{% elif m.role == 'tool' %}" + DEMANDS.replace("{id}", "m.tool_call_id")
    + "{{ m.tool_call_id + ': ' + m.content }}{% else %}{{ m.content",
)  # fmt: skip
KIMI = turns(calling("{{ call.id }} {{ call.function.arguments | tojson }}"))


def exchange(*results: str | None, ids: tuple[str | None, ...] = (None, None)) -> Conversation:
    calls = [{"type": "function", "function": {"name": "now", "arguments": {"n": n}}} for n in range(len(ids))]
    calls = [call if each is None else {**call, "id": each} for call, each in zip(calls, ids, strict=True)]
    told = [
        Message(role="tool", content=f"answer {n}", extra=None if each is None else {"tool_call_id": each})
        for n, each in enumerate(results)
    ]
    return chat(user("time?"), assistant("", tool_calls=tuple(calls)), *told, assistant("ok"))


@pytest.mark.parametrize(
    ("row", "order"),
    [
        (exchange(None, None), (0, 1)),
        (exchange("call_0", "call_1", ids=("call_0", "call_1")), (0, 1)),
        (exchange("call_1", "call_0", ids=("call_0", "call_1")), (1, 0)),
        (exchange(None, "call_0", ids=("call_0", "call_1")), (0, 1)),
        (exchange("too-long-for-it", None, ids=(None, None)), (0, 1)),
    ],
)
def test_ids_are_made_where_the_template_demands_them_and_results_follow_their_calls(row, order):
    whole = text(encode(NINE, row))
    ids = re.findall(r'"id": "([a-zA-Z0-9]{9})"', whole)
    assert len(set(ids)) == 2
    results = [re.search(rf"([a-zA-Z0-9]{{9}}): answer {n}", whole)[1] for n in range(2)]
    assert results == [ids[n] for n in order]
    assert text(encode(NINE, row)) == whole
    first, last = answers(NINE, row)
    assert ids[0] in first
    assert last == f"ok{END}"


def test_ids_that_are_good_stay_as_they_are():
    row = exchange("abcdefghi", "123456789", ids=("abcdefghi", "123456789"))
    whole = text(encode(NINE, row))
    assert re.findall(r'"id": "([a-zA-Z0-9]{9})"', whole) == ["abcdefghi", "123456789"]
    assert "123456789: answer 1" in whole


def test_ids_that_carry_the_name_of_the_tool():
    first, _ = answers(KIMI, exchange("call_0", "call_1", ids=("call_0", "call_1")))
    assert first == f'<call>functions.now:0 {{"n": 0}}</call><call>functions.now:1 {{"n": 1}}</call>{END}'


# ── marks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# SmolLM3's way: the header and an empty thought are within the marks, and in the generation prompt too.
HEADER_MARKED = (
    "{% set quiet = '/no_think' in messages[0].content %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}"
    "{{ '<think>\n\n</think>\n' if quiet }}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}{% else %}"
    "{{ '<|im_start|>' + m.role + '\n' + (m.content.replace('/no_think', '').replace('/think', '').rstrip() "
    "if m.role == 'system' else m.content) + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ '<think>\n\n</think>\n' if quiet }}{% endif %}"
)


def test_the_header_and_the_empty_thought_of_the_generation_prompt_are_not_learned():
    two = (user("a"), assistant("Lima"), user("b"), assistant("Quito"))
    for first in ((), (system("Be kind /think"),), (system("/no_think"),), (system("Be kind. /no_think"),)):
        assert answers(HEADER_MARKED, chat(*first, *two)) == [f"Lima{END}", f"Quito{END}"]
    thoughtful = chat(user("a"), assistant("<think>\nhm\n</think>\nLima"))
    assert answers(HEADER_MARKED, thoughtful) == [f"<think>\nhm\n</think>\nLima{END}"]


def marked(answer: str, prompt: str) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + answer + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + prompt + "' }}{% endif %}"
    )


HEADER = "<|im_start|>assistant\n"
MARKS = [
    ("the mark begins with the answer", "HEADER{% generation %}{{ m.content + END }}{% endgeneration %}", HEADER, ""),
    ("the prompt supplies the header", "{% generation %}HEADER{{ m.content + END }}{% endgeneration %}", HEADER, ""),
    (
        "the prompt supplies half of the header",
        "{% generation %}HEADER<final>{{ m.content + END }}{% endgeneration %}",
        HEADER,
        "<final>",
    ),
    (
        "a thought of the template is left out of the mark",
        "HEADER<think></think>{% generation %}{{ m.content + END }}{% endgeneration %}",
        HEADER,
        "",
    ),
    (
        "the prompt opens a thought that the text closes at once",
        "HEADER{% generation %}<think></think>{{ m.content + END }}{% endgeneration %}",
        HEADER + "<think>\n",
        "</think>",
    ),
    (
        "the prompt opens a thought that the text does not write",
        "{% generation %}HEADER{{ m.content + END }}{% endgeneration %}",
        HEADER + "<think>\n",
        "",
    ),
    (
        "the text begins another tag than the prompt",
        "{% generation %}HEADER<tool>{{ m.content + END }}{% endgeneration %}",
        HEADER + "<think>\n",
        "<tool>",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "prompt", "before"), MARKS, ids=[name for name, *_ in MARKS])
def test_a_mark_is_cut_to_what_the_generation_prompt_leaves(name, answer, prompt, before):
    answer = answer.replace("HEADER", "{{ '" + HEADER + "' }}").replace("END", f"'{END}'")
    row = chat(system("s"), user("a"), assistant("Lima"), user("b"), assistant("Quito"))
    assert answers(marked(answer, prompt), row) == [f"{before}Lima{END}", f"{before}Quito{END}"]


def test_a_mark_around_a_header_that_no_prompt_supplies_is_refused():
    template = marked(
        "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>' }}{% endgeneration %}", ""
    )
    assert "ignores add_generation_prompt" in problem(template, PLAIN["single"])


def test_a_marked_answer_whose_history_differs_at_inference_is_refused():
    moves = MARKED.replace("{% for", "{{ messages | length }}{% for", 1)
    assert "writes the prompt of an answer differently" in problem(moves, PLAIN["multi"])


def test_a_greeting_is_learned_with_marks_even_where_no_prompt_leads_to_it():
    demands = (
        "{% if messages[0].role not in ['user', 'assistant'] or not messages %}{{ raise_exception('x') }}{% endif %}"
    )
    row = chat(assistant("Hi"), user("a"), assistant("Lima"))
    for template in (MARKED, demands + MARKED):
        assert answers(template, row) == [f"Hi{END}", f"Lima{END}"]
    assert "refuses the row" in problem(demands + HEADER_MARKED, row)


MARKED_BY_TRL = [name for name in TRL if re.search(r"\{%-?\s*generation", source(f"trl/{name}"))]


@pytest.mark.parametrize("name", MARKED_BY_TRL)
def test_marks_of_trl_give_what_is_derived_without_them(name):
    """Whatever can be derived from the generation prompt alone is what the marks give: the marks add nothing to it."""
    from test_chat_templates import chat_tokenizer

    template = source(f"trl/{name}")
    without = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    without = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", without)
    tok = chat_tokenizer(template)
    compared = 0
    for row in (*PLAIN.values(), TOOL_CHAT):
        marked, derived = (ChatEncoder(tok, each).encode_batch([row])[0] for each in (template, without))
        if isinstance(derived, Encoded) and isinstance(marked, Encoded):
            assert learned(tok, marked) == learned(tok, derived)
            compared += 1
    prompts_differ = re.match("deepseek|nemotron", name)
    assert compared or prompts_differ or re.match("glm4moe|gptoss|idefics3|llava|smolvlm|diffusion", name)


# ── switches ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SWITCHING = CHATML.replace("m['content']", "m['content'].replace('/no_think', '').replace('/think', '').rstrip()")


@pytest.mark.parametrize(
    "content",
    ["Be kind /no_think", "/no_think", "/think Be kind", "Be /no_think kind /think", "Be kind. /no_think\n"],
)
@pytest.mark.parametrize("role", ["system", "user"])
def test_switches_that_the_template_takes_out_are_accepted(content, role):
    rest = [user("a")] if role == "system" else []
    row = chat(Message(role=role, content=content), *rest, assistant("Lima"))
    result = encode(SWITCHING, row)
    assert learned(TOK, result) == [f"Lima{END}"]
    assert "think" not in text(result)
    assert content in text(encode(CHATML, row))


@pytest.mark.parametrize(
    ("template", "row"),
    [
        # it takes out more than the switch
        (SWITCHING.replace(".rstrip()", ".replace('kind', '')"), chat(user("Be kind /no_think"), assistant("x"))),
        # it takes out a word that it does not name as a switch
        (CHATML.replace("m['content']", "m['content'].split('/')[0]"), chat(user("a /no_think"), assistant("x"))),
        # it takes out a switch and all that follows
        (
            CHATML.replace("m['content']", "m['content'].split('/no_think')[0]"),
            chat(user("a /no_think b"), assistant("x")),
        ),
        # it writes another word for the switch
        (
            CHATML.replace("m['content']", "m['content'].replace('/no_think', 'quick')"),
            chat(user("a /no_think b"), assistant("x")),
        ),
        # the end of a path is no switch
        (SWITCHING, chat(user("see /usr/think and ./think"), assistant("x"))),
        (SWITCHING, chat(user("see /usr/think /think"), assistant("x"))),
        # an answer is learned as it is
        (SWITCHING, chat(user("a"), assistant("say /no_think"))),
        (SWITCHING, chat(user("a"), assistant("b"), Message(role="tool", content="c /no_think"), assistant("d"))),
    ],
)
def test_anything_else_that_a_template_takes_out_is_refused(template, row):
    assert re.search("leaves out or rewrites|rewrites the assistant", problem(template, row))


# ── stop tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", [END, f" \n{END}", f"{END}\n", f"\n{END} \n"])
@pytest.mark.parametrize("template", [CHATML, MARKED, HEADER_MARKED])
def test_an_answer_that_brings_its_stop_token_gets_no_second(template, ending):
    row = chat(user("a"), assistant(f"Lima{ending}"), user("b"), assistant(f"Quito{ending}"))
    plain = chat(user("a"), assistant("Lima"), user("b"), assistant("Quito"))
    result, expected = encode(template, row, plain)
    assert result.input_ids.tolist() == expected.input_ids.tolist()
    assert result.supervised.tolist() == expected.supervised.tolist()
    given = chat(user("a"), assistant(f"Lima{ending}", supervised=False), user("b"), assistant("Quito"))
    assert answers(template, given) == [f"Quito{END}"]
    whole = encode(template, row, supervise="text")
    assert whole.input_ids.tolist() == expected.input_ids.tolist()


@pytest.mark.parametrize(
    "content",
    [f"a{END}b", f"a{END}{END}", f"a</s>{END}", f"{END}a", END, f" {END}", "a</s>", "a<|im_start|>", f"<s>a{END}"],
)
def test_any_other_special_token_in_an_answer_stays_refused(content):
    assert "special token" in problem(CHATML, chat(user("a"), assistant(content)))


def test_the_stop_token_stays_refused_where_it_is_not_the_end_of_an_answer():
    assert "prompt injection" in problem(CHATML, chat(user(f"a{END}"), assistant("b")))
    assert "special token" in problem(CHATML, chat(user("a"), assistant("b", extra={"reasoning_content": f"c{END}"})))


# ── the order of rows ────────────────────────────────────────────────────────────────────────────────────────────────

PICKY = NINE.replace("{{ call | tojson }}", "{{ call.function.name + call.function.arguments + call.id }}")


def test_encodings_do_not_depend_on_the_rows_before():
    rows = [
        *PLAIN.values(),
        ONE_CALL,
        TOOL_CHAT,
        exchange(None, None),
        exchange("abcdefghi", "123456789", ids=("abcdefghi", "123456789")),
        exchange("call_1", "call_0", ids=("call_0", "call_1")),
        with_tools("now"),
        replace(with_tools("now"), tools=({"name": "now"},)),
        chat(user("a"), assistant(f"Lima{END}")),
    ]
    rows += [replace(row, line=line) for line, row in enumerate(rows)]
    templates = [
        PICKY,
        READS_TOOLS,
        NINE,
        KIMI,
        HEADER_MARKED,
        *PLACES.values(),
        *(turns(each) for each in CALLS.values()),
    ]
    for template in templates:
        alone = [outcome(encode(template, row)) for row in rows]
        encoder = ChatEncoder(TOK, template)
        for seed in range(3):
            order = random.Random(seed).sample(range(len(rows)), len(rows))
            together = encoder.encode_batch([rows[i] for i in order])
            assert [outcome(each) for each in together] == [alone[i] for i in order]
        assert any(isinstance(each, tuple) for each in alone)


def outcome(result: Any) -> Any:
    if isinstance(result, Problem):
        return result.problem
    return result.input_ids.tolist(), result.supervised.tolist()


def test_shapes_come_in_one_order_with_the_fewest_changes_first():
    row = replace(exchange(None, None), tools=({"name": "now"},))
    source = "{{ m['tools'] }} {{ xml_tools }} {{ call.id }}"
    shapes = other_shapes(row, source)
    assert shapes == other_shapes(row, source)
    assert len(set(shapes)) == len(shapes)
    changes = [shape.changes for shape in shapes]
    assert changes == sorted(changes)
    assert changes[0] == 1
    assert other_shapes(PLAIN["multi"], source) == []
    # Names that the template does not mention are not tried.
    assert {shape.place.name for shape in other_shapes(row, CHATML)} == {"tools"}
    assert {shape.place.kind for shape in other_shapes(row, CHATML)} == {"variable"}


def test_the_conversation_is_not_changed_by_its_shapes():
    row = replace(exchange("call_1", "call_0", ids=("call_0", "call_1")), tools=TOOLS)
    before = json.dumps([message.to_template() for message in row.messages])
    for shape in other_shapes(row, PICKY + "m.tools xml_tools"):
        shape.give(row)
    assert json.dumps([message.to_template() for message in row.messages]) == before
    assert row.tools == TOOLS
