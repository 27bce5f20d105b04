"""One generation between tokens and text: what is asked of it, and token events turned into text that is safe to send.

Knows no threads, no event loop and no HTTP: `llm.py` feeds it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from qserve.engine.request import FinishReason, SamplingParams, TokenEvent, TokenLogprob
from qserve.text.detokenizer import make_detokenizer
from qserve.text.grammar import Grammar
from qserve.text.stop import StopStrings
from qserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a generation continues; `text` is what the caller wrote, where it was text."""

    ids: Sequence[int]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """What is asked of a generation. `sampling.stop_token_ids` holds the caller's own; the model's are added here."""

    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    shown_ids: frozenset[int] = frozenset()  # special tokens that are never skipped
    echo: bool = False
    priority: int = 0
    grammar: Grammar | None = None  # what the text must look like

    def skipped_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Tokens that are left out of the text."""
        return tokenizer.special_ids - self.shown_ids if self.skip_special_tokens else frozenset()

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Every token that ends the generation: the caller's own, and the model's unless they are to be ignored."""
        return self.sampling.stop_token_ids | (frozenset() if self.ignore_eos else tokenizer.end_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When a generation ends at the latest, in the event loop's time, and how: with what there is, or with an error."""

    at: float
    is_error: bool


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token's log-probabilities, the token itself first, and where its text begins in the text that is returned.

    The first token of a prompt has nothing before it and so no log-probabilities.
    """

    token_id: int
    text_offset: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """Text that is safe to send, and the tokens made since the delta before. Only the last has a finish reason."""

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[ScoredToken, ...] = ()
    prompt_logprobs: tuple[ScoredToken, ...] = ()  # on the first delta, when they were asked for
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or the caller's stop token that ended it
    num_output_tokens: int = 0  # up to here
    num_cached_tokens: int = 0  # of the prompt
    pooled: tuple[float, ...] = ()  # the sum of the prompt's final hidden states, when it was asked for


class TextAssembler:
    """One request's tokens on their way to text: whole characters, stop strings, log-probabilities with offsets."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, options: GenerationOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._stop_ids = options.stop_ids(tokenizer)
        self._prompt_ids = prompt.ids
        self._detokenizer = make_detokenizer(tokenizer, prompt.ids, skipped=options.skipped_ids(tokenizer))
        self._stops = StopStrings(options.stop, include_in_output=options.include_stop)
        self._prompt_offsets: list[int] = []
        self._prompt_logprobs: list[tuple[TokenLogprob, ...]] = [()]  # nothing comes before the first token
        self._text = self._echo(prompt) if options.echo else ""  # certain, and not sent
        self._num_characters = len(self._text)  # certain so far, sent or not, whatever a stop string cuts off
        self._token_ids: list[int] = []
        self._logprobs: list[ScoredToken] = []
        self._num_output_tokens = 0
        self._num_cached_tokens = 0

    def add(self, event: TokenEvent) -> TextDelta | None:
        """Takes in one event; after a step's last the text that can be sent now, if there is any."""
        self._prompt_logprobs += event.prompt_logprobs
        self._num_cached_tokens = max(self._num_cached_tokens, event.num_cached_tokens)
        finish_reason: FinishReason | None = event.finish_reason
        if event.token_id is None and finish_reason is None:
            return None  # only scores of a part of the prompt; even an echo waits for all of them
        stop_reason: str | int | None = None
        if event.token_id is not None:
            stop_reason = self._add_token(event.token_id, event)
        if finish_reason is not None and self._stops.matched is None:
            self._add_text(self._detokenizer.finish())
            self._text += self._stops.finish()
        if self._stops.matched is not None:
            finish_reason, stop_reason = FinishReason.STOP, self._stops.matched
        if finish_reason is None and (event.has_more or not self._text):
            return None
        return self._take(finish_reason, stop_reason, pooled=event.pooled)

    def cut(self, request_id: str) -> TextDelta | None:
        """The end of a generation that was given no more time; None while scores of the prompt are missing."""
        if self._options.sampling.prompt_logprobs is not None and not self._num_output_tokens:
            return None
        return self.add(TokenEvent(request_id=request_id, finish_reason=FinishReason.LENGTH))

    def _add_token(self, token_id: int, event: TokenEvent) -> int | None:
        """Takes in a token; its id when it is one of the caller's own stop tokens and ends the text."""
        self._num_output_tokens += 1
        self._token_ids.append(token_id)
        # A grammar that is complete ends a text too, and then the last token belongs to it.
        is_stop = event.finish_reason is FinishReason.STOP and token_id in self._stop_ids
        offset = self._num_characters
        if not is_stop or self._options.include_stop:
            piece = self._detokenizer.feed(token_id)
            self._num_characters += len(piece)
            offset = self._find_offset(token_id, piece, before=offset)
            self._add_text(piece)
        if event.logprobs:
            self._logprobs.append(ScoredToken(token_id, offset, event.logprobs))
        is_own = token_id in self._options.sampling.stop_token_ids
        return token_id if is_stop and is_own else None

    def _add_text(self, piece: str) -> None:
        can_stop = self._num_output_tokens > self._options.sampling.min_tokens
        self._text += self._stops.feed(piece, can_stop=can_stop)

    def _find_offset(self, token_id: int, piece: str, *, before: int) -> int:
        """Where a token's text begins, given the text that became certain with it.

        An incomplete character that it ended stands before its own text. A piece of a character begins where the
        character does.
        """
        try:
            own = self._tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return before
        return before + max(len(piece) - len(own), 0)

    def _take(
        self, finish_reason: FinishReason | None, stop_reason: str | int | None, *, pooled: tuple[float, ...]
    ) -> TextDelta:
        delta = TextDelta(
            text=self._text,
            token_ids=tuple(self._token_ids),
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._take_prompt_logprobs(),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=self._num_cached_tokens,
            pooled=pooled,
        )
        self._text, self._token_ids, self._logprobs = "", [], []
        return delta

    def _take_prompt_logprobs(self) -> tuple[ScoredToken, ...]:
        if self._options.sampling.prompt_logprobs is None or not self._prompt_logprobs:
            return ()
        offsets = self._prompt_offsets or [0] * len(self._prompt_ids)
        scored = [ScoredToken(*row) for row in zip(self._prompt_ids, offsets, self._prompt_logprobs, strict=True)]
        self._prompt_logprobs = []
        return tuple(scored)

    def _echo(self, prompt: Prompt) -> str:
        """The prompt's text as it is sent back: what the caller wrote, or else the tokens' text."""
        detokenizer = make_detokenizer(self._tokenizer, skipped=self._options.skipped_ids(self._tokenizer))
        text = ""
        for token_id in prompt.ids:
            piece = detokenizer.feed(token_id)
            self._prompt_offsets.append(self._find_offset(token_id, piece, before=len(text)))
            text += piece
        if prompt.text is not None:
            return prompt.text
        self._detokenizer = detokenizer  # a character that the prompt leaves unfinished is finished by what follows
        return text
