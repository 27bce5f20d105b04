"""The messages of a chat, put together from what other protocols send in items or blocks.

Neighbours of one role become one message, for many templates want the turns to alternate. What an assistant thinks,
says and calls in one turn is one message too.
"""

from typing import Any

from qserve.errors import InvalidRequest

_BETWEEN = "\n\n"


class Conversation:
    """Grows turn by turn."""

    def __init__(self) -> None:
        self._turns: list[dict[str, Any]] = []
        self._call_ids: set[str] = set()

    @property
    def messages(self) -> list[dict[str, Any]]:
        """Each with a text, if only an empty one: many templates go wrong without."""
        return [{"content": "", **turn} for turn in self._turns]

    def instruct(self, text: str) -> None:
        self._add("system", text)

    def ask(self, text: str) -> None:
        self._add("user", text)

    def say(self, text: str) -> None:
        self._turn(before=("tool_calls",))
        self._add("assistant", text)

    def think(self, text: str) -> None:
        turn = self._turn(before=("content", "tool_calls"))
        turn["reasoning_content"] = turn.get("reasoning_content", "") + text

    def call(self, call_id: str, name: str, arguments: Any) -> None:
        function = {"name": name, "arguments": arguments}
        self._turn().setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self._call_ids.add(call_id)

    def answer(self, call_id: str, text: str) -> None:
        """The result of a call; it must be known which."""
        if call_id not in self._call_ids:
            raise InvalidRequest(f"There is a result of the call {call_id[:80]!r}, but no such call.", param="messages")
        self._turns.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def _add(self, role: str, text: str) -> None:
        last = self._turns[-1] if self._turns else None
        if last is None or last["role"] != role:
            self._turns.append({"role": role, "content": text})
        else:
            last["content"] = last["content"] + _BETWEEN + text if last.get("content") else text

    def _turn(self, *, before: tuple[str, ...] = ()) -> dict[str, Any]:
        """The assistant's turn, a new one where the last has what must come after."""
        if not self._turns or self._turns[-1]["role"] != "assistant" or self._turns[-1].keys() & set(before):
            self._turns.append({"role": "assistant"})
        return self._turns[-1]
