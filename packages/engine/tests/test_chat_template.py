"""ChatTemplate: the same prompt as Transformers, errors typed, nothing reachable but the conversation."""

import re
from datetime import datetime
from typing import Any

import pytest

from octavo_engine.errors import CorruptModelFile, InvalidRequest
from octavo_engine.text.chat_template import ChatTemplate
from octavo_engine.weights.source import GGUFSource

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = """{{ bos_token }}{%- for message in messages %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
  {%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'] | trim + ' [/INST]' }}
  {%- else %}
    {{- ' ' + message['content'] + ' ' + eos_token }}
  {%- endif %}
{%- endfor %}"""
TOOLS = """{%- if tools is not none %}
    {%- for tool in tools %}
{{ tool | tojson(indent=2) }}
    {% endfor %}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- set ns.last = loop.index %}
    {%- if message.role == "system" %}{% continue %}{% endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</tool_call>
        {%- endfor %}
    {%- elif message.content is string %}
{{ message.content }}
    {%- else %}
        {%- for part in message.content %}
{{ part.text }}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
last={{ ns.last }} {{ documents is none }} {{ enable_thinking | default(true) }}"""
GENERATION = """{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
{{ message.content }}
    {% endif %}
{% endfor %}"""
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "tools": TOOLS, "generation": GENERATION}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

CHAT = [
    {"role": "user", "content": "  What is <b>1 & 2</b>? 'é' 日本 "},
    {"role": "assistant", "content": "three"},
    {"role": "user", "content": "thanks\n"},
]
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds <two> & more", "parameters": {"type": "object"}},
}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": "é<"}}}]}


@pytest.fixture(scope="session")
def transformers_tokenizer() -> Any:
    """Any tokenizer of Transformers: it brings the rendering."""
    transformers = pytest.importorskip("transformers", reason="Transformers is the oracle")
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL)


@pytest.mark.parametrize("add_generation_prompt", [True, False], ids=["prompt", "no-prompt"])
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    ("messages", "options"),
    [
        (CHAT, {}),
        (CHAT[:1], {"tools": [TOOL, TOOL]}),
        (CHAT, {"enable_thinking": False}),
    ],
    ids=["chat", "tools", "kwargs"],
)
def test_prompt_equals_transformers(
    transformers_tokenizer: Any, name: str, messages: Any, options: dict[str, Any], add_generation_prompt: bool
) -> None:
    expected = transformers_tokenizer.apply_chat_template(
        messages,
        chat_template=TEMPLATES[name],
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **options,
    )
    template = ChatTemplate(TEMPLATES[name], SPECIAL)
    assert template.render(messages, add_generation_prompt=add_generation_prompt, **options) == expected


def test_tool_calls_equal_transformers(transformers_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "no"}, CHAT[0], CALL]
    expected = transformers_tokenizer.apply_chat_template(messages, chat_template=TOOLS, tokenize=False, tools=[TOOL])
    assert ChatTemplate(TOOLS, SPECIAL).render(messages, [TOOL], False) == expected
    assert '<tool_call>{"name": "add", "arguments": {"a": 1, "b": "é<"}}</tool_call>' in expected


def test_arguments_in_json_text_are_printed_as_the_object() -> None:
    as_text = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1, "b": "é<"}'}}]}
    template = ChatTemplate(TOOLS)
    assert template.render([as_text]) == template.render([CALL])


def test_arguments_that_are_no_json_are_refused() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]}
    with pytest.raises(InvalidRequest, match="tool call arguments: expected JSON"):
        ChatTemplate(TOOLS).render([call])


@pytest.mark.model
def test_demo_template_equals_transformers(demo_source: GGUFSource, transformers_demo: Any) -> None:
    template = demo_source.chat_template()
    assert template is not None
    for messages in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT]):
        expected = transformers_demo.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template.render(messages) == expected
    assert expected.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_parts_are_joined_for_a_template_that_takes_strings() -> None:
    template = ChatTemplate(CHATML)
    assert not template.takes_parts
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    joined = template.render([{"role": "user", "content": "one\ntwo"}])
    assert template.render([{"role": "user", "content": parts}]) == joined


def test_parts_are_left_to_a_template_that_takes_them() -> None:
    template = ChatTemplate(TOOLS)
    assert template.takes_parts
    assert "one" in template.render([{"role": "user", "content": [{"type": "text", "text": "one"}]}])


def test_template_that_would_print_a_list_gets_a_string() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    assert template.render([{"role": "user", "content": [{"type": "text", "text": "one"}]}]) == "one"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, 5])
def test_part_that_is_no_text_is_refused(part: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[0\]: expected a part of type text") as caught:
        ChatTemplate(CHATML).render([{"role": "user", "content": [part]}])
    assert (caught.value.param, caught.value.code) == ("messages", "unsupported_content")


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (LLAMA2, CHAT[1:], "refuses these messages: Conversation roles must alternate"),
        (CHATML, [{"role": "user", "content": None}], "cannot handle these messages: TypeError"),
        ("{{ messages[0].content.x.y }}", CHAT, "refuses these messages: .* has no attribute 'x'"),
        ("{{ 1 // 0 }}", CHAT, "cannot handle these messages: ZeroDivisionError"),
        (CHATML, [{"content": "x"}], r"messages\[0\]: expected an object with a role"),
        (CHATML, ["x"], r"messages\[0\]: expected an object with a role"),
    ],
    ids=["raised", "no-content", "undefined", "arithmetic", "no-role", "no-object"],
)
def test_errors_of_a_template_are_the_requests(source: str, messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        ChatTemplate(source).render(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{% set ns = namespace(_x=1) %}",
        "{{ cycler.__init__.__globals__.os }}",
        "{% for i in range(999999999) %}{% endfor %}",
    ],
)
def test_template_cannot_reach_beyond_the_conversation(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source).render(CHAT)


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(CorruptModelFile, match="chat template, line 2: "):
        ChatTemplate("a\n{% if %}")


def test_reserved_variables_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="variable 'messages' is reserved"):
        ChatTemplate(CHATML).render(CHAT, messages=[])


def test_tool_calls_that_are_no_list_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"messages\[0\].tool_calls must be a list, got 5"):
        ChatTemplate(CHATML).render([{"role": "assistant", "content": "x", "tool_calls": 5}])


def test_variables_go_before_special_tokens() -> None:
    assert ChatTemplate("{{ bos_token }}", SPECIAL).render([], bos_token="X") == "X"


def test_time_is_the_present() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}").render([])
    assert re.fullmatch(r"\d{4}", text)
    assert abs(int(text) - datetime.now().year) <= 1


def test_messages_are_not_modified() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    ChatTemplate(CHATML).render([message])
    assert message == {"role": "user", "content": [{"type": "text", "text": "x"}]}
