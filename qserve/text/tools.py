"""Tool calls: the forms in which models write them, a call read as it arrives, and a grammar that forces calls.

A form is data; one parser reads all of them. Knows no HTTP, no tokens and no schema but as JSON.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qserve.text.pieces import Part, PieceReader, count_held


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFormat:
    """How a family of models writes calls: begin, opening, head, arguments, tail, between, head, ..., closing."""

    name: str
    signs: tuple[str, ...]  # a template that holds one of them speaks this form
    begin: str = ""  # the marker before a call, or before all of them
    opening: str = ""
    head: str = '{"name": "%s", "arguments": '
    tail: str = "}"
    between: str = "\n"
    closing: str = ""
    end: str = ""  # the marker behind, without the blanks around it
    is_bare: bool = False  # whether calls need no marker: a text that begins with JSON may be one
    id_length: int | None = None  # of a call's id, where templates insist


# Looked up from the top; a template that shows no sign gets the last.
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        name="hermes",
        signs=("<tool_call>",),
        begin="<tool_call>",
        opening="\n",
        between="\n</tool_call>\n<tool_call>\n",
        closing="\n</tool_call>",
        end="</tool_call>",
    ),
    ToolFormat(
        name="mistral-args",
        signs=("[ARGS]",),
        begin="[TOOL_CALLS]",
        head="%s[ARGS]",
        tail="",
        between="[TOOL_CALLS]",
        id_length=9,
    ),
    ToolFormat(
        name="mistral",
        signs=("[TOOL_CALLS]",),
        begin="[TOOL_CALLS]",
        opening="[",
        between=", ",
        closing="]",
        id_length=9,
    ),
    ToolFormat(
        name="llama3",
        signs=("<|python_tag|>", '"parameters": '),
        begin="<|python_tag|>",
        head='{"name": "%s", "parameters": ',
        between="; ",
        is_bare=True,
    ),
    ToolFormat(name="json", signs=("",), is_bare=True),
)


def find_tool_format(template: str) -> ToolFormat:
    """The form that a chat template teaches its model."""
    return next(form for form in TOOL_FORMATS if any(sign in template for sign in form.signs))


_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
_NAMED = re.compile(r"([\w.-]+)\s*(?:\[CALL_ID\]\w*\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_NAME_SO_FAR = re.compile(r"[\w.-]+\s*(?:\[[\w\]]*\s*){0,2}")
# An object whose first key no call has, or that has none.
_NO_CALL = re.compile(r'\{\s*(?:"(?!(?:name|type|function|id|arguments|parameters)")[^"]*"|[^\s"])')
_FENCE = re.compile(r"\s*(?:```(?:json)?\s*)?(?=[{\[])")
_FENCE_SO_FAR = re.compile(r"`{1,2}|```j?s?o?n?\s*")
_BETWEEN = " \t\r\n,;]`"
_PUNCTUATION = _BETWEEN + "["


class _JsonEnd:
    """Finds where an object ends that comes in pieces, given how many of its braces are open already."""

    def __init__(self, *, depth: int = 0) -> None:
        self._depth = depth
        self._is_string = False
        self._is_escaped = False

    def find(self, text: str) -> int | None:
        """The place behind the last brace; None while it is still to come."""
        for place, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_string:
                self._is_escaped = character == "\\"
                self._is_string = character != '"'
            elif character == '"':
                self._is_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place + 1
        return None


class CallParser(PieceReader):
    """Tells calls from text as it arrives.

        text --begin--> calls --a head--> arguments --last brace--> closing --last brace--> calls --end--> text

    What turns out to be no call is text after all. Blanks are text only when text follows them.
    """

    def __init__(self, form: ToolFormat, *, names: frozenset[str]) -> None:
        self._form = form
        self._names = names
        self._is_marked = False  # whether a marker stood before the calls
        self._passed: str | None = ""  # what stood before them, and is text if they are none; None once there is one
        self._end = _JsonEnd()
        self._has_tail = False
        self.num_calls = 0
        super().__init__()

    def _first_state(self) -> Callable[[bool], bool]:
        return self._read_start if self._form.is_bare else self._read_text

    def _read_start(self, is_end: bool) -> bool:
        """Nothing but blanks and a fence may stand before a call that has no marker."""
        start = self._buffer.lstrip()
        if fence := _FENCE.match(self._buffer):
            self._passed, self._buffer = fence[0], self._buffer[fence.end() :]
            self._state = self._read_calls
        elif (not start or _FENCE_SO_FAR.fullmatch(start)) and not is_end:
            return False
        else:
            self._state = self._read_text
        return True

    def _read_text(self, is_end: bool) -> bool:
        begin = self._form.begin
        before, marker, after = self._buffer.partition(begin) if begin else (self._buffer, "", "")
        if marker:
            self._add_text(before.rstrip())
            self._buffer, self._is_marked, self._passed = after, True, begin
            self._state = self._read_calls
            return True
        held = 0 if is_end else count_held(self._buffer, begin)
        text, self._buffer = self._buffer[: len(self._buffer) - held], self._buffer[len(self._buffer) - held :]
        if text.strip() or not self.num_calls:
            self._add_text(text)
        return False

    def _read_calls(self, is_end: bool) -> bool:
        begin, end = self._form.begin, self._form.end
        rest = self._buffer.lstrip(_BETWEEN)
        if end and rest.startswith(end):
            self._buffer, self._state = rest.removeprefix(end), self._read_text
            return True
        if begin and rest.startswith(begin):
            self._buffer, self._is_marked, self._passed = rest.removeprefix(begin), True, begin
            return True
        if not is_end and any(marker.startswith(rest) for marker in (begin, end)):
            return False  # a part of a marker, or nothing at all
        rest = rest.lstrip(_PUNCTUATION)
        if not rest and not is_end:
            return False
        if not rest and self._passed is None:
            self._buffer = ""
            return False
        if rest.startswith("{"):
            return self._read_object(rest, is_end=is_end)
        if self._is_marked and (named := _NAMED.match(rest)):
            return self._open(rest, named, has_tail=False)
        if self._is_marked and not is_end and _NAME_SO_FAR.fullmatch(rest):
            return False
        return self._give_up()

    def _read_object(self, rest: str, *, is_end: bool) -> bool:
        head = _HEAD.match(rest)
        if head and self._is_known(head[1]):
            return self._open(rest, head, has_tail=True)
        if head or _NO_CALL.match(rest):
            return self._give_up()
        length = _JsonEnd().find(rest)
        if length is None:
            return self._give_up() if is_end else False
        call = _as_call(rest[:length])
        if call is None or not self._is_known(call[0]):
            return self._give_up()
        name, arguments = call
        self._parts.append(Part(kind="call", text=arguments, index=self.num_calls, name=name))
        self.num_calls += 1
        self._buffer, self._passed = rest[length:], None
        return True

    def _is_known(self, name: str) -> bool:
        return self._is_marked or name in self._names

    def _open(self, rest: str, head: re.Match[str], *, has_tail: bool) -> bool:
        self._parts.append(Part(kind="call", text="", index=self.num_calls, name=head[1]))
        self.num_calls += 1
        self._buffer, self._passed = rest[head.end() :], None
        self._end, self._has_tail = _JsonEnd(), has_tail
        self._state = self._read_arguments
        return True

    def _read_arguments(self, is_end: bool) -> bool:
        length = self._end.find(self._buffer)
        size = len(self._buffer) if length is None else length
        if size:
            self._parts.append(Part(kind="call", text=self._buffer[:size], index=self.num_calls - 1))
        self._buffer = self._buffer[size:]
        if length is None:
            return False
        self._end = _JsonEnd(depth=1)
        self._state = self._read_closing if self._has_tail else self._read_calls
        return True

    def _read_closing(self, is_end: bool) -> bool:
        """What stands behind the arguments in the same object is of no interest."""
        length = self._end.find(self._buffer)
        self._buffer = "" if length is None else self._buffer[length:]
        if length is not None:
            self._state = self._read_calls
        return length is not None

    def _give_up(self) -> bool:
        """It is no call: what was passed is text, and the rest is read as text is, up to the next marker."""
        if self._passed is None:
            self._buffer = self._buffer.lstrip(_PUNCTUATION)
        self._add_text(self._passed or "")
        self._passed, self._is_marked, self._state = "", False, self._read_text
        return True

    def _add_text(self, text: str) -> None:
        if text:
            self._parts.append(Part(kind="text", text=text))


def _as_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a whole object, whatever the order of its keys."""
    try:
        call = json.loads(text)
    except ValueError:
        return None
    inner = call.get("function")
    call = {**call, "name": inner} if isinstance(inner, str) else inner if isinstance(inner, dict) else call
    name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
    if not isinstance(name, str) or not name:
        return None
    return name, arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def call_grammar(
    form: ToolFormat,
    schemas: Mapping[str, Mapping[str, Any]],
    *,
    is_single: bool,
    special_ids: Mapping[str, int],
    is_forced: bool = True,
    thought_end: str | None = None,
) -> str:
    """Lark for a text that is calls and nothing else, of these names and with arguments under these schemas.

    Where reasoning is open already, it may go on up to its end. A text that is not forced to be calls may be text, or
    text and then calls where these have a marker; but what calls there are must be these.
    """
    calls = [
        " ".join(
            [*_literal(form.head % name, special_ids), f"%json {_spaced(schema)}", *_literal(form.tail, special_ids)]
        )
        for name, schema in schemas.items()
    ]
    begin = [] if form.is_bare else _literal(form.begin, special_ids)
    more = "" if is_single else f"({' '.join([*_literal(form.between, special_ids), 'call'])})*"
    run = [*_literal(form.opening, special_ids), "call", more, *_literal(form.closing, special_ids)]
    rules = [f"call: {' | '.join(calls)}", "ANY: /(.|\\n)*/"]
    start = [*begin, *run]
    if not is_forced and form.is_bare:
        start = ["(", *run, r"| /[^\s{\[`](.|\n)*/ )"]
    elif not is_forced:
        rules.append(_up_to("text", form.begin, special_ids))
        start = ["( ANY | text", *run, r"/\s*/ )"]
    if thought_end is not None:
        rules.append(_up_to("thought", thought_end, special_ids))
        start = [r"thought /\s*/", *start]
    return "\n".join([f"start: {' '.join(start)}", *rules])


def _up_to(rule: str, marker: str, special_ids: Mapping[str, int]) -> str:
    """A rule for any text and the marker that ends it, the first one that comes."""
    if marker in special_ids:
        return f"{rule}: ANY <[{special_ids[marker]}]>"
    return f"{rule}[lazy]: ANY {json.dumps(marker)}"


def _spaced(schema: Mapping[str, Any]) -> str:
    """The blanks that templates print, and no others: a small model may go on with blanks for ever."""
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return json.dumps({**schema, "x-guidance": spacing})


def _literal(text: str, special_ids: Mapping[str, int]) -> list[str]:
    """Text for Lark; a special token in it can be written in no other way than as its id."""
    found = [token for token in special_ids if token and token in text]
    pieces = re.split(f"({'|'.join(map(re.escape, found))})", text) if found else [text]
    return [f"<[{special_ids[piece]}]>" if piece in found else json.dumps(piece) for piece in pieces if piece]


def explain_tools(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages for a template that knows no tools: they stand in the system message, calls and results in the text."""
    plain = [_without_calls(message) for message in messages]
    if not tools:
        return plain
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    text = (
        "You may call functions. To call one, answer with nothing but a JSON object that holds its name and its "
        f'arguments: {{"name": ..., "arguments": {{...}}}}. These are the functions:\n{functions}'
    )
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _without_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"The function's result: {message.get('content')}"}
    calls = message.get("tool_calls")
    if not calls:
        return message
    written = [json.dumps(call["function"], ensure_ascii=False) for call in calls]
    return {"role": message["role"], "content": "\n".join([message.get("content") or "", *written]).strip()}
