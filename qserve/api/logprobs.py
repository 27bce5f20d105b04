"""Log-probabilities in the shapes that OpenAI (completions and chat) and vLLM (prompt_logprobs) gave them."""

from collections.abc import Callable, Sequence
from typing import Any

from qserve.generation import ScoredToken
from qserve.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no infinity


class LogprobWriter:
    """Writes tokens the way one request asked for: as text, or as `token_id:N`, which is never ambiguous."""

    def __init__(self, tokenizer: Tokenizer, *, num_top: int, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._name: Callable[[int], str] = _as_token_id if as_token_ids else tokenizer.token_text

    def completion(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        """Four parallel lists. The first token of an echoed prompt has null for what nothing precedes."""
        return {
            "tokens": [self._name(token.token_id) for token in tokens],
            "token_logprobs": [_number(token.logprobs[0].logprob) if token.logprobs else None for token in tokens],
            "top_logprobs": [self._completion_top(token) for token in tokens],
            "text_offset": [token.text_offset for token in tokens],
        }

    def chat(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        return {"content": [self._chat_token(token) for token in tokens], "refusal": None}

    def prompt(self, tokens: Sequence[ScoredToken]) -> list[dict[str, Any] | None]:
        return [self._prompt_token(token) if token.logprobs else None for token in tokens]

    def _completion_top(self, token: ScoredToken) -> dict[str, float] | None:
        """The chosen token and the most likely ones. Of two that are written alike the more likely one stays."""
        if not token.logprobs:
            return None
        top: dict[str, float] = {}
        for entry in token.logprobs[: self._num_top + 1]:
            name, value = self._name(entry.token_id), _number(entry.logprob)
            top[name] = max(value, top.get(name, value))
        return top

    def _chat_token(self, token: ScoredToken) -> dict[str, Any]:
        chosen, *others = token.logprobs
        top = [self._chat_entry(entry.token_id, entry.logprob) for entry in others[: self._num_top]]
        return {**self._chat_entry(chosen.token_id, chosen.logprob), "top_logprobs": top}

    def _chat_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._name(token_id),
            "logprob": _number(logprob),
            "bytes": list(self._tokenizer.token_bytes(token_id)),
        }

    def _prompt_token(self, token: ScoredToken) -> dict[str, Any]:
        return {
            str(entry.token_id): {
                "logprob": _number(entry.logprob),
                "rank": entry.rank,
                "decoded_token": self._name(entry.token_id),
            }
            for entry in token.logprobs
        }


def _number(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _as_token_id(token_id: int) -> str:
    return f"token_id:{token_id}"
