"""Structured output as clients ask for it: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

Each becomes a grammar's source here, and `LLM.compile` makes grammars of them. With them go the words that a text must
not contain: both are rules about the text, which the engine follows token by token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import from_json

from qserve.api.wire import Wire
from qserve.errors import InvalidRequest
from qserve.llm import LLM
from qserve.text.grammar import (
    Grammar,
    GrammarSource,
    Tag,
    from_choices,
    from_grammar,
    from_json_schema,
    from_regex,
    from_tags,
)

_MAX_BAD_WORDS = 256
_LONGEST_BAD_WORD = 200
_ANY_OBJECT = {"type": "object"}
_PARTS = {"json_schema": ("json_schema",), "structural_tag": ("structures", "triggers")}  # what a type needs


class _NamedSchema(Wire):
    name: str = ""
    wanted: dict[str, Any] = Field(alias="schema")


class _Structure(Wire):
    begin: str = Field(min_length=1)
    wanted: dict[str, Any] = Field({}, alias="schema")
    end: str = ""


class _StructuralTag(Wire):
    """Free text in which what follows a trigger is structured."""

    structures: list[_Structure] = Field(min_length=1)
    triggers: list[str] = Field(min_length=1)


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: _NamedSchema | None = None
    structures: list[_Structure] | None = None
    triggers: list[str] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        needed = _PARTS.get(self.type, ())
        missing = next((name for name in needed if not getattr(self, name)), None)
        if missing is not None:
            raise InvalidRequest(f"A response_format of type {self.type} needs {missing}.", param="response_format")
        others = [name for names in _PARTS.values() for name in names if name not in needed]
        self.refuse(*others, because=f"in a format of type {self.type}", param="response_format.")
        return self

    def source(self, *, special_ids: Mapping[str, int]) -> GrammarSource | None:
        param = "response_format"
        if self.type == "structural_tag":
            return _tag_source(self.structures or [], self.triggers or [], param=param, special_ids=special_ids)
        if self.type == "json_object":
            return from_json_schema(_ANY_OBJECT, param=param)
        if self.type == "json_schema" and self.json_schema is not None:
            return from_json_schema(self.json_schema.wanted, param=param)
        return None


class StructuredOutputs(Wire):
    """vLLM's: one of the first six, and how JSON is spaced."""

    wanted: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def source(self, *, prefix: str, special_ids: Mapping[str, int]) -> GrammarSource:
        """`prefix` is what the fields' names begin with in the request."""
        sources = list(self._sources(prefix, special_ids))
        if len(sources) != 1:
            found = " and ".join(source.param for source in sources) or "none"
            raise InvalidRequest(
                "Exactly one of json, regex, choice, grammar, json_object and structural_tag says what the text must "
                f"look like; there is {found}.",
                param=prefix.rstrip("._"),
            )
        if self.wanted is None and not self.json_object:
            self.refuse(
                "disable_any_whitespace", "whitespace_pattern", because="where no JSON is asked for", param=prefix
            )
        if self.disable_any_whitespace:
            self.refuse("whitespace_pattern", because="beside disable_any_whitespace", param=prefix)
        return sources[0]

    def _sources(self, prefix: str, special_ids: Mapping[str, int]) -> Iterator[GrammarSource]:
        if self.wanted is not None:
            yield self._json_source(self.wanted, param=prefix + "json")
        if self.regex is not None:
            yield from_regex(self.regex, param=prefix + "regex")
        if self.choice is not None:
            yield from_choices(self.choice, param=prefix + "choice")
        if self.grammar is not None:
            yield from_grammar(self.grammar, param=prefix + "grammar")
        if self.json_object:
            yield self._json_source(_ANY_OBJECT, param=prefix + "json_object")
        if self.structural_tag is not None:
            param = prefix + "structural_tag"
            tag = _parse_tag(self.structural_tag, param=param)
            yield _tag_source(tag.structures, tag.triggers, param=param, special_ids=special_ids)

    def _json_source(self, schema: Mapping[str, Any] | str, *, param: str) -> GrammarSource:
        if self.disable_any_whitespace:
            return from_json_schema(schema, param=param, whitespace="")
        if self.whitespace_pattern is not None:
            return from_json_schema(schema, param=param, whitespace=self.whitespace_pattern)
        return from_json_schema(schema, param=param)


def _tag_source(
    structures: Sequence[_Structure], triggers: Sequence[str], *, param: str, special_ids: Mapping[str, int]
) -> GrammarSource:
    tags = [Tag(begin=each.begin, schema=each.wanted, end=each.end) for each in structures]
    return from_tags(tags, triggers=triggers, param=param, special_ids=special_ids)


def _parse_tag(text: str, *, param: str) -> _StructuralTag:
    try:
        return _StructuralTag.model_validate(from_json(text))
    except ValueError as error:
        message = f'{param} must be JSON with "structures" (of "begin", "schema", "end") and "triggers".'
        raise InvalidRequest(message, param=param) from error


def _check_bad_words(value: Any) -> Any:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise ValueError("expected a list of strings")
    if len(value) > _MAX_BAD_WORDS or any(not word.strip() or len(word) > _LONGEST_BAD_WORD for word in value):
        raise ValueError(f"at most {_MAX_BAD_WORDS} words are taken, each of 1 to {_LONGEST_BAD_WORD} characters")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a text must look like and what it must not contain, in the model's tokens."""

    grammar: Grammar | None
    bad_words: tuple[tuple[int, ...], ...]


class StructuredRequest(Wire):
    """What a text must look like, said in at most one of the three ways, and what it must not contain."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1)
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    bad_words: Annotated[list[str], BeforeValidator(_check_bad_words)] = Field([])

    def compile_rules(self, llm: LLM, *, calls: GrammarSource | None = None) -> Rules:
        """With a grammar for calls, if there must be some. May take a second: not for an event loop's thread.

        Raises InvalidRequest for what cannot be followed.
        """
        source = self.grammar_source(llm.tokenizer.special_token_ids, calls=calls)
        return Rules(
            grammar=None if source is None else llm.compile(source), bad_words=llm.encode_words(self.bad_words)
        )

    @property
    def is_structured(self) -> bool:
        """Whether the text must look like something."""
        has_format = self.response_format is not None and self.response_format.type != "text"
        others = (self.structured_outputs, self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        return has_format or any(other is not None for other in others)

    def grammar_source(
        self, special_ids: Mapping[str, int], *, calls: GrammarSource | None = None
    ) -> GrammarSource | None:
        """What the text must look like, if anything is asked for; `special_ids` are the tokenizer's special tokens."""
        sources = [*self._sources(special_ids), *([calls] if calls else [])]
        if len(sources) > 1:
            names = " and ".join(source.param for source in sources)
            message = f"{names} both say what the text must look like: send one of them."
            raise InvalidRequest(message, param=sources[-1].param)
        return sources[0] if sources else None

    def _sources(self, special_ids: Mapping[str, int]) -> Iterator[GrammarSource]:
        of_format = self.response_format and self.response_format.source(special_ids=special_ids)
        if of_format:
            yield of_format
        if self.structured_outputs is not None:
            yield self.structured_outputs.source(prefix="structured_outputs.", special_ids=special_ids)
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
            "whitespace_pattern": self.guided_whitespace_pattern,
        }
        if any(value is not None for value in guided.values()):
            yield StructuredOutputs.model_validate(guided).source(prefix="guided_", special_ids=special_ids)
