"""Calls and reasoning told from text, in every form and however the text is cut."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qserve.text.detokenizer import make_detokenizer
from qserve.text.grammar import GrammarCompiler, from_grammar
from qserve.text.pieces import Part, PieceReader
from qserve.text.reasoning import ReasoningCounter, ReasoningFormat, ReplyParser, find_reasoning_format
from qserve.text.tokenizer import Tokenizer
from qserve.text.tools import TOOL_FORMATS, CallParser, call_grammar, explain_tools, find_tool_format

NAMES = frozenset({"get_weather", "add"})
PARIS = '{"city": "Paris {[\\"}"}'
FORMS = {form.name: form for form in TOOL_FORMATS}


def join(parts: list[Part]) -> dict[str, Any]:
    """What a client puts together: text, reasoning, and calls by their number."""
    calls: dict[int, list[str]] = {}
    for part in parts:
        if part.kind == "call":
            call = calls.setdefault(part.index, ["", ""])
            call[0] += part.name or ""
            call[1] += part.text
    texts = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("text", "reasoning")}
    return {**texts, "calls": [(name, json.loads(arguments)) for name, arguments in calls.values()]}


def read(reader: PieceReader, *pieces: str) -> dict[str, Any]:
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return join(parts + reader.finish())


def parse(form: str, text: str) -> dict[str, Any]:
    return read(CallParser(FORMS[form], names=NAMES), text)


WEATHER = ("get_weather", {"city": 'Paris {["}'})
ADD = ("add", {"a": 1})
CASES: list[tuple[str, str, str, list[Any]]] = [
    ("hermes", f'<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', "", [WEATHER]),
    (
        "hermes",
        f'Let me see.\n<tool_call>{{"name":"get_weather","arguments":{PARIS}}}</tool_call>\n'
        '<tool_call>\n{"arguments": {"a": 1}, "name": "add"}\n</tool_call>\n',
        "Let me see.",
        [WEATHER, ADD],
    ),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call> so', " so", [ADD]),
    ("hermes", "a < b <tool_ca", "a < b <tool_ca", []),
    ("hermes", "<tool_call>nonsense", "<tool_call>nonsense", []),
    ("hermes", '<tool_call>{"x": 1}</tool_call>', '<tool_call>{"x": 1}</tool_call>', []),
    ("hermes", "  plain text\n", "  plain text\n", []),
    ("mistral", f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {PARIS}}}]', "", [WEATHER]),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}, "id": "abcdefghi"}}, '
        '{"name": "add", "arguments": {"a": 1}}]',
        "",
        [WEATHER, ADD],
    ),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a": 1}}] and text', "and text", [ADD]),
    ("mistral-args", f'[TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]add{{"a": 1}}', "", [WEATHER, ADD]),
    ("mistral-args", "[TOOL_CALLS]get_weather[CALL_ID]abc[ARGS]" + PARIS, "", [WEATHER]),
    ("llama3", f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [WEATHER]),
    (
        "llama3",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {PARIS}}}; '
        '{"name": "add", "parameters": {"a": 1}}',
        "",
        [WEATHER, ADD],
    ),
    ("llama3", '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    ("llama3", "<|python_tag|>import os", "<|python_tag|>import os", []),
    ("json", f'```json\n{{"name": "get_weather", "arguments": {PARIS}}}\n```', "", [WEATHER]),
    ("json", '[{"name": "add", "arguments": {"a": 1}}, {"function": {"name": "add"}}]', "", [ADD, ("add", {})]),
    ("json", '{"answer": 42} is it', '{"answer": 42} is it', []),
    ("json", "[1] see there", "[1] see there", []),
    ("json", "```json\nfoo\n```", "```json\nfoo\n```", []),
    ("json", '{"name": "add", "arguments"', '{"name": "add", "arguments"', []),
    ("json", '{"name": "Anna", "age": 3}', '{"name": "Anna", "age": 3}', []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_and_text(form: str, text: str, content: str, calls: list[Any]) -> None:
    assert parse(form, text) == {"text": content, "reasoning": "", "calls": calls}


@settings(max_examples=300, deadline=None)
@given(case=st.sampled_from(CASES), data=st.data())
def test_cuts_make_no_difference(case: tuple[str, str, str, list[Any]], data: st.DataObject) -> None:
    form, text, _, _ = case
    text = text[: data.draw(st.integers(0, len(text)))]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, cut = (CallParser(FORMS[form], names=NAMES) for _ in range(2))
    parts = [*whole.feed(text), *whole.finish()]
    others = [part for piece in pieces for part in cut.feed(piece)] + cut.finish()

    def told(parts: list[Part]) -> tuple[str, list[tuple[int, str, str]]]:
        calls = [(p.index, p.name or "", p.text) for p in parts if p.kind == "call"]
        indices = sorted({index for index, _, _ in calls})
        joined = [
            (i, "".join(n for j, n, _ in calls if i == j), "".join(t for j, _, t in calls if i == j)) for i in indices
        ]
        return "".join(p.text for p in parts if p.kind == "text"), joined

    assert told(parts) == told(others)


def test_arguments_leave_as_they_arrive() -> None:
    parser = CallParser(FORMS["hermes"], names=NAMES)
    pieces = ['<tool_call>\n{"name": "add', '", "arguments": ', '{"a"', ": 1", "}}\n</tool_call>"]
    found = [[(part.name, part.text) for part in parser.feed(piece)] for piece in pieces]
    assert found == [[], [], [("add", ""), (None, '{"a"')], [(None, ": 1")], [(None, "}")]]


def test_a_template_shows_its_form() -> None:
    assert find_tool_format("... <tool_call> ...").name == "hermes"
    assert find_tool_format("[TOOL_CALLS]").name == "mistral"
    assert find_tool_format("[TOOL_CALLS][ARGS]").name == "mistral-args"
    assert find_tool_format("<|python_tag|>").name == "llama3"
    assert find_tool_format("messages").name == "json"


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def takes(lark: str, text: str, tokenizer: Tokenizer) -> bool:
    """Whether a text can be written, whole, under a grammar."""
    compiler = GrammarCompiler(tokenizer, vocabulary_size=tokenizer.vocabulary_size)
    end = tokenizer.special_token_ids["<|im_end|>"]
    constraint = compiler.compile(from_grammar(lark, param="tools")).start(stop_ids=frozenset({end}))
    for token_id in [*tokenizer.encode(text), end]:
        place, bit = divmod(token_id, 8)
        if constraint.is_finished or not constraint.allowed()[place] >> bit & 1:
            return constraint.is_finished and token_id == end
        constraint.accept(token_id)
    return True


@pytest.mark.parametrize("form", TOOL_FORMATS, ids=lambda form: form.name)
class TestGrammar:
    def written(self, form: Any, *names: str, argument: str = "1") -> str:
        calls = [form.head % name + f'{{"a": {argument}}}' + form.tail for name in names]
        begin = "" if form.is_bare else form.begin
        text: str = begin + form.opening + form.between.join(calls) + form.closing
        return text

    def test_forced(self, form: Any, byte_level: Tokenizer) -> None:
        schemas = {"add": SCHEMA, "sub": SCHEMA}
        one, many = (call_grammar(form, schemas, is_single=single, special_ids={}) for single in (True, False))
        single, double = self.written(form, "sub"), self.written(form, "add", "sub")
        assert [takes(one, text, byte_level) for text in (single, double)] == [True, False]
        assert [takes(many, text, byte_level) for text in (single, double)] == [True, True]
        for text in ("Hello", self.written(form, "mul"), self.written(form, "add", argument='"x"')):
            assert not takes(many, text, byte_level)
        found = read(CallParser(form, names=frozenset(schemas)), double)
        assert found == {"text": "", "reasoning": "", "calls": [("add", {"a": 1}), ("sub", {"a": 1})]}

    def test_strict(self, form: Any, byte_level: Tokenizer) -> None:
        lark = call_grammar(form, {"add": SCHEMA}, is_single=False, special_ids={}, is_forced=False)
        good, bad = self.written(form, "add"), self.written(form, "add", argument='"x"')
        assert [takes(lark, text, byte_level) for text in ("Hello { you", good, bad)] == [True, True, False]
        if not form.is_bare:
            assert [takes(lark, "So: " + text, byte_level) for text in (good, bad)] == [True, False]

    def test_after_reasoning(self, form: Any, byte_level: Tokenizer) -> None:
        lark = call_grammar(form, {"add": SCHEMA}, is_single=True, special_ids={}, thought_end="</think>")
        assert takes(lark, "well {</think>\n" + self.written(form, "add"), byte_level)
        assert not takes(lark, "well</think>\nno", byte_level)

    def test_special_tokens_stand_as_their_ids(self, form: Any) -> None:
        lark = call_grammar(form, {"add": SCHEMA}, is_single=True, special_ids={"[TOOL_CALLS]": 7, "[ARGS]": 8})
        assert ("<[7]>" in lark) == form.name.startswith("mistral")
        assert ("<[8]>" in lark) == (form.name == "mistral-args")


THINK = ReasoningFormat(begin="<think>", end="</think>")


@pytest.mark.parametrize("is_open", [True, False])
@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("<think>\nWell, \n\n</think>\n\nYes <b>\n", "Well,", "Yes <b>\n"),
        ("<think></think>Yes", "", "Yes"),
        ("<think>cut short </thi", "cut short </thi", ""),
    ],
)
def test_reasoning(is_open: bool, text: str, reasoning: str, answer: str) -> None:
    text = text.removeprefix("<think>") if is_open else text
    for pieces in ([text], list(text)):
        reader = ReplyParser(reasoning=THINK, is_open=is_open, calls=None)
        assert read(reader, *pieces) == {"text": answer, "reasoning": reasoning, "calls": []}


def test_without_reasoning_all_is_answer() -> None:
    text = "What <think> means\n"
    for pieces in ([text], list(text)):
        assert read(ReplyParser(reasoning=THINK, is_open=False, calls=None), *pieces)["text"] == text


def test_reasoning_and_then_a_call() -> None:
    text = '<think>I call "<tool_call>".</think>\n<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    for pieces in ([text], list(text)):
        calls = CallParser(FORMS["hermes"], names=NAMES)
        found = read(ReplyParser(reasoning=THINK, is_open=False, calls=calls), *pieces)
        assert found == {"text": "", "reasoning": 'I call "<tool_call>".', "calls": [ADD]}


@pytest.mark.parametrize(
    ("is_open", "text", "counted"),
    [
        (False, "<think>One two</think>Three", "<think>One two</think>"),
        (False, "\n<think></think>\n\nThree", "\n<think></think>"),
        (True, "One\u00e9</think> Three <think>x</think>", "One\u00e9</think>"),
        (True, "One </thin", "One </thin"),
        (False, "Three <think>x</think>", ""),
        (False, "", ""),
    ],
)
def test_reasoning_tokens_are_those_up_to_its_end(
    byte_level: Tokenizer, is_open: bool, text: str, counted: str
) -> None:
    """Counted alike in whatever portions the tokens come; those of the end's marker are counted whole."""
    ids = byte_level.encode(text, add_special_tokens=False)
    ends = [len(byte_level.decode(ids[:number])) for number in range(len(ids) + 1)]
    expected = next(number for number, end in enumerate(ends) if end >= len(counted))
    for size in (1, 2, 5, 100):
        counter = ReasoningCounter(THINK, is_open=is_open, detokenizer=make_detokenizer(byte_level))
        for start in range(0, len(ids), size):
            counter.take(ids[start : start + size])
        assert counter.num_reasoning_tokens == expected


def test_a_template_shows_its_reasoning() -> None:
    assert find_reasoning_format("{{ '</think>' }}") == THINK
    assert find_reasoning_format("plain") is None


def test_tools_are_explained_to_templates_that_know_none() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    history: list[dict[str, Any]] = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]
    system, user, assistant, result = explain_tools(history, tools)
    assert '{"name": "add", "parameters": {}}' in system["content"]
    assert user == history[0]
    assert json.loads(assistant["content"]) == {"name": "add", "arguments": {"a": 1}}
    assert result == {"role": "user", "content": "The function's result: 3"}
    merged = explain_tools([{"role": "system", "content": "Be brief."}, *history], tools)
    assert merged[0]["content"].startswith("Be brief.\n\n")
    assert len(merged) == 4
