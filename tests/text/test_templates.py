"""Chat templates against transformers' own renderer."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from qserve.errors import BrokenCheckpoint, InvalidRequest, UsageError
from qserve.text.templates import ChatTemplate, load_chat_template
from qserve.text.tokenizer import SpecialTokens
from tests import tiny

SPECIAL = SpecialTokens(bos="<s>", eos="</s>", pad=None)
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hi there "},
    {"role": "assistant", "content": "Hello, 東京"},
]
LLAMA_LIKE = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] not in ['system', 'user', 'assistant'] %}
{{ raise_exception('Unknown role: ' + message['role']) }}
{%- endif %}
{%- if loop.index0 > 5 %}{% break %}{% endif %}
[{{ message['role'] | upper }}] {{ message['content'] | trim }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[ASSISTANT]{% endif %}"""
WITH_EVERYTHING = """{% set ns = namespace(found=false) %}{% for m in messages %}{% set ns.found = true %}
{%- generation %}{{ m.content }}{% endgeneration %}|{% endfor %}{{ ns.found }}{{ messages | tojson }}
{{ dict(a=1) | tojson(indent=2) }}{{ strftime_now('%Y') | length }}{% if tools %}{{ tools | tojson }}{% endif %}
{{ enable_thinking | default(true) }}{{ documents is none }}"""


def theirs(source: str, **options: Any) -> str:
    rendered, _ = render_jinja_template([MESSAGES], chat_template=source, bos_token="<s>", eos_token="</s>", **options)
    return str(rendered[0])


@pytest.mark.parametrize("source", [tiny.CHATML, LLAMA_LIKE, WITH_EVERYTHING])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_are_those_of_transformers(source: str, add_generation_prompt: bool) -> None:
    template = ChatTemplate({"default": source}, SPECIAL)
    ours = template.render(MESSAGES, add_generation_prompt=add_generation_prompt, variables={"enable_thinking": False})
    assert ours == theirs(source, add_generation_prompt=add_generation_prompt, enable_thinking=False)


@pytest.mark.parametrize("source", [tiny.CHATML, LLAMA_LIKE])
@pytest.mark.parametrize("end", ["", " ", "\n\n"])
def test_a_continued_message_stays_open(source: str, end: str) -> None:
    messages = [*MESSAGES[:-1], {"role": "assistant", "content": "Hello," + end}]
    template = ChatTemplate({"default": source}, SPECIAL)
    ours = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    expected, _ = render_jinja_template(
        [messages], chat_template=source, continue_final_message=True, bos_token="<s>", eos_token="</s>"
    )
    assert ours == expected[0]


def test_a_message_that_the_template_changes_cannot_be_continued() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content | upper }}{% endfor %}"}, SPECIAL)
    with pytest.raises(InvalidRequest, match="cannot be continued"):
        template.render(MESSAGES, add_generation_prompt=False, continue_final_message=True)


def test_what_a_template_refuses_is_quoted() -> None:
    template = ChatTemplate({"default": LLAMA_LIKE}, SPECIAL)
    with pytest.raises(InvalidRequest, match="Unknown role: wizard") as raised:
        template.render([{"role": "wizard", "content": "x"}])
    assert raised.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception.__globals__['os'] }}",
        "{{ messages[0].content + none }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox_or_kill_the_server(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate({"default": source}, SPECIAL).render(MESSAGES)


def test_a_template_that_is_not_jinja_is_named() -> None:
    with pytest.raises(BrokenCheckpoint, match="not valid Jinja"):
        ChatTemplate({"default": "{% for %}"}, SPECIAL)


def write_settings(directory: Path, chat_template: object) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": chat_template}))


def test_no_template_is_no_error(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path, SPECIAL) is None
    write_settings(tmp_path, None)
    assert load_chat_template(tmp_path, SPECIAL) is None


def test_templates_by_name(tmp_path: Path) -> None:
    write_settings(tmp_path, [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}])
    template = load_chat_template(tmp_path, SPECIAL)
    assert template is not None
    assert template.render(MESSAGES) == "plain"
    assert template.render(MESSAGES, tools=[{"type": "function"}]) == "tools"


def test_the_file_goes_before_the_settings(tmp_path: Path) -> None:
    write_settings(tmp_path, "old")
    (tmp_path / "chat_template.jinja").write_text("new")
    template = load_chat_template(tmp_path, SPECIAL)
    assert template is not None
    assert template.render(MESSAGES) == "new"


def test_a_file_that_is_given_takes_the_place_of_all(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("the model's own")
    (tmp_path / "other.jinja").write_text("{{ messages[0]['content'] }}!")
    template = load_chat_template(tmp_path, SPECIAL, file=str(tmp_path / "other.jinja"))
    assert template is not None
    assert template.render(MESSAGES[:1]) == f"{MESSAGES[0]['content']}!"
    with pytest.raises(UsageError, match="--chat-template"):
        load_chat_template(tmp_path, SPECIAL, file=str(tmp_path / "missing.jinja"))
