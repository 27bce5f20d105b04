"""Grammars as sets of tokens: what is allowed leads to texts of the grammar, and all of them can be written."""

import json
import random
import re

import pytest

from qserve.errors import InvalidRequest
from qserve.text.grammar import (
    Grammar,
    GrammarCompiler,
    GrammarConstraint,
    GrammarSource,
    Tag,
    from_choices,
    from_grammar,
    from_json_schema,
    from_regex,
    from_tags,
)
from qserve.text.tokenizer import Tokenizer

END = frozenset({2})
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}


def compile_(tokenizer: Tokenizer, source: GrammarSource) -> Grammar:
    return GrammarCompiler(tokenizer, vocabulary_size=tokenizer.vocabulary_size).compile(source)


def allowed_ids(constraint: GrammarConstraint, size: int) -> list[int]:
    bits = int.from_bytes(constraint.allowed(), "little")
    assert bits >> size == 0
    return [token_id for token_id in range(size) if bits >> token_id & 1]


def walk(grammar: Grammar, tokenizer: Tokenizer, *, seed: int = 0, max_tokens: int = 300) -> str:
    """A text of the grammar, token by token at random."""
    random_ = random.Random(seed)
    constraint = grammar.start(stop_ids=END)
    text = b""
    for _ in range(max_tokens):
        token_id = random_.choice(allowed_ids(constraint, tokenizer.vocabulary_size))
        if token_id in END:
            break
        constraint.accept(token_id)
        text += tokenizer.token_bytes(token_id)
        if constraint.is_finished:
            break
    return text.decode()


def can_write(grammar: Grammar, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokens that the tokenizer itself would take are allowed, and then the end."""
    constraint = grammar.start(stop_ids=END)
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        if token_id not in allowed_ids(constraint, tokenizer.vocabulary_size):
            return False
        constraint.accept(token_id)
    return constraint.is_finished or 2 in allowed_ids(constraint, tokenizer.vocabulary_size)


@pytest.mark.parametrize("pattern", ["[a-f]{2,5}-(\\d{3}|none)", "naïve|東京|🙂", 'a/b"c\\\\', "(ab?)*c"])
def test_regex(tokenizer: Tokenizer, pattern: str) -> None:
    is_plain = pattern in ("[a-f]{2,5}-(\\d{3}|none)", "(ab?)*c")
    if not (is_plain or tokenizer.is_byte_level or tokenizer.has_byte_tokens):
        pytest.skip("this tokenizer cannot write these characters")
    grammar = compile_(tokenizer, from_regex(pattern, param="p"))
    for seed in range(5):
        assert re.fullmatch(pattern, walk(grammar, tokenizer, seed=seed))


def test_choices_are_literal(byte_level: Tokenizer) -> None:
    choices = ["a.b", '"', "\\d", "é\n", "x y", "xyz", ""]
    grammar = compile_(byte_level, from_choices(choices, param="p"))
    assert {walk(grammar, byte_level, seed=seed) for seed in range(60)} == set(choices)
    assert all(can_write(grammar, byte_level, choice) for choice in choices)
    assert not can_write(grammar, byte_level, "x")


def test_json_of_a_schema(tokenizer: Tokenizer) -> None:
    grammar = compile_(tokenizer, from_json_schema({**SCHEMA, "additionalProperties": False}, param="p", whitespace=""))
    for seed in range(5):
        found = json.loads(walk(grammar, tokenizer, seed=seed))
        assert list(found) == ["a"]
        assert found["a"] <= 99


@pytest.mark.parametrize("text", ['{"a": 1}', '{"a":1, "b": [1, {"c": null}]}', '{\n  "a": 1,\r\n\t"b": "é"\n}', "{}"])
def test_json_as_people_write_it(byte_level: Tokenizer, text: str) -> None:
    assert can_write(compile_(byte_level, from_json_schema({"type": "object"}, param="p")), byte_level, text)


@pytest.mark.parametrize("text", ["[]", '{"a":' + " " * 70 + "1}", '{"a": 1}\n', "{a: 1}", '{"a": 1'])
def test_what_is_no_object_or_endless_blanks(byte_level: Tokenizer, text: str) -> None:
    assert not can_write(compile_(byte_level, from_json_schema({"type": "object"}, param="p")), byte_level, text)


def test_lark_and_gbnf(byte_level: Tokenizer) -> None:
    lark = compile_(byte_level, from_grammar('start: "a" start "b" | ""', param="p"))
    gbnf = compile_(byte_level, from_grammar('root ::= "a" root "b" | ""', param="p"))
    for grammar in (lark, gbnf):
        assert can_write(grammar, byte_level, "aaabbb")
        assert not can_write(grammar, byte_level, "aabbb")
        assert not can_write(grammar, byte_level, "aab")


def test_a_special_token_is_written_by_its_name_alone(byte_level: Tokenizer) -> None:
    named = compile_(byte_level, from_grammar("start: <|im_start|> /a/", param="p")).start(stop_ids=END)
    assert allowed_ids(named, 512) == [1]
    free = compile_(byte_level, from_grammar("start: /(.|\\n)*/", param="p")).start(stop_ids=END)
    assert not {0, 1} & set(allowed_ids(free, 512))


def test_tags_in_free_text(byte_level: Tokenizer) -> None:
    tags = [Tag(begin="<f=a>", schema=SCHEMA, end="</f>"), Tag(begin="<f=b>", schema={"enum": [1]}, end="")]
    grammar = compile_(byte_level, from_tags(tags, triggers=["<f="], param="p", special_ids={}))
    assert can_write(grammar, byte_level, 'Free <f text <f=a>{"a": 1}</f> and <f=b>1 on')
    assert not can_write(grammar, byte_level, "<f=c>")
    assert not can_write(grammar, byte_level, "<f=b>2")
    assert not can_write(grammar, byte_level, "<f=a>")


def test_a_trigger_that_is_a_special_token(byte_level: Tokenizer) -> None:
    tag = Tag(begin="<|im_start|>", schema={"enum": [7]}, end="!")
    ids = byte_level.special_token_ids
    source = from_tags([tag], triggers=["<|im_start|>"], param="p", special_ids=ids)
    constraint = compile_(byte_level, source).start(stop_ids=END)
    for text in ("hi", "<|im_start|>", "7!", "bye"):
        for token_id in byte_level.encode(text, add_special_tokens=False):
            assert token_id in allowed_ids(constraint, 512)
            constraint.accept(token_id)


@pytest.mark.parametrize("triggers", [["<x"], ["<f", ""], ["<f", "<y"]])
def test_tags_that_do_not_fit_their_triggers(triggers: list[str]) -> None:
    tags = [Tag(begin="<f>", schema={}, end="")]
    with pytest.raises(InvalidRequest) as refused:
        from_tags(tags, triggers=triggers, param="there", special_ids={})
    assert refused.value.param == "there"


class TestConstraint:
    def test_stop_ids_are_allowed_exactly_where_the_text_may_end(self, byte_level: Tokenizer) -> None:
        """One of them is a letter that the text may go on with elsewhere."""
        a, b = (byte_level.encode(letter)[0] for letter in "ab")
        constraint = compile_(byte_level, from_regex("(a[bc])+", param="p")).start(stop_ids=frozenset({2, b}))
        seen = []
        for letter in ("a", "c", "a", "c"):
            seen.append({2, b} & set(allowed_ids(constraint, 512)))
            constraint.accept(byte_level.encode(letter)[0])
        assert seen == [set(), set(), {2, b}, set()]
        assert a in allowed_ids(constraint, 512)

    def test_constraints_of_one_grammar_are_apart(self, byte_level: Tokenizer) -> None:
        grammar = compile_(byte_level, from_regex("ab", param="p"))
        first, second = grammar.start(stop_ids=END), grammar.start(stop_ids=END)
        first.accept(byte_level.encode("ab")[0])
        assert first.allowed() != second.allowed()
        assert second.allowed() == grammar.start(stop_ids=END).allowed()

    def test_the_end(self, byte_level: Tokenizer) -> None:
        constraint = compile_(byte_level, from_choices(["a", "ab"], param="p")).start(stop_ids=END)
        a, b = (byte_level.encode(letter)[0] for letter in "ab")
        constraint.accept(a)
        assert not constraint.is_finished
        assert allowed_ids(constraint, 512) == [2, b]
        constraint.accept(b)
        assert constraint.is_finished

    def test_a_token_that_was_not_allowed_is_a_dead_end(self, byte_level: Tokenizer) -> None:
        constraint = compile_(byte_level, from_regex("ab", param="p")).start(stop_ids=END)
        constraint.accept(byte_level.encode("z")[0])
        assert not constraint.is_finished
        assert allowed_ids(constraint, 512) == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (lambda: from_regex("(", param="p"), "unclosed group"),
        (lambda: from_regex("a(?=b)", param="p"), "look-around"),
        (lambda: from_regex("(a{1000}){1000}", param="p"), "too many"),
        (lambda: from_regex("(" * 60_000 + ")" * 60_000, param="p"), "regex"),
        (lambda: from_json_schema({"type": "thing"}, param="p"), "thing"),
        (lambda: from_json_schema({"$ref": "http://127.0.0.1:9/"}, param="p"), "127.0.0.1"),
        (lambda: from_json_schema({"$ref": "#"}, param="p"), "no text"),
        (lambda: from_json_schema('{"a":' * 300 + "1" + "}" * 300, param="p"), "recursion"),
        (lambda: from_json_schema("{", param="p"), "JSON"),
        (lambda: from_grammar("", param="p"), "Empty"),
        (lambda: from_grammar("start: other", param="p"), "other"),
        (lambda: from_grammar("root ::= " + "(" * 5000, param="p"), "compiled"),
        (lambda: from_grammar("start: " + "(" * 60_000, param="p"), "nested"),
        (lambda: from_choices(["x" * 200_000], param="p"), "200"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_words(byte_level: Tokenizer, source: object, words: str) -> None:
    assert callable(source)
    with pytest.raises(InvalidRequest, match=words) as refused:
        compile_(byte_level, source())
    assert refused.value.param == "p"
    assert len(str(refused.value)) < 600


def test_a_grammar_that_is_asked_for_again_is_not_compiled_again(byte_level: Tokenizer) -> None:
    compiler = GrammarCompiler(byte_level, vocabulary_size=512)
    assert compiler.compile(from_regex("a+", param="p")) is compiler.compile(from_regex("a+", param="p"))


@pytest.mark.parametrize("size", [504, 520])
@pytest.mark.parametrize(
    "source",
    [
        from_json_schema(SCHEMA, param="p"),
        from_json_schema({"type": "object"}, param="p"),
        from_regex("([a-c]{1,3} ){2}|\u00e9+", param="p"),
        from_choices(["yes", "yesterday", "no"], param="p"),
        from_grammar('start: /a+/ <[3]> start | "b"', param="p"),
        from_grammar("start: /(.|\\n)*/", param="p"),
    ],
)
def test_a_token_alone_is_allowed_exactly_where_its_bit_is_set(
    byte_level: Tokenizer, source: GrammarSource, size: int
) -> None:
    """Every token of the vocabulary, those that stand for nothing among them, all along some texts."""
    grammar = GrammarCompiler(byte_level, vocabulary_size=size).compile(source)
    for seed in range(4):
        random_ = random.Random(seed)
        constraint = grammar.start(stop_ids=frozenset({2, 70}))
        for _ in range(12):
            singly = [token_id for token_id in range(size) if constraint.find_allowed([token_id]) is not None]
            assert constraint.find_allowed(range(size)) == next(iter(singly), None)
            assert singly == allowed_ids(constraint, size)
            assert singly == [token_id for token_id in range(size) if constraint.find_allowed([token_id]) is not None]
            going_on = sorted(set(singly) - {2, 70})
            if not going_on:
                break
            constraint.accept(random_.choice(going_on))


def test_what_must_come_and_what_may(byte_level: Tokenizer) -> None:
    """All along a text: what must come is the one thing that may; of a guess is left what may come, token by token."""
    grammar, text = compile_(byte_level, from_choices(["abcdef! abc", "abcdef? ab"], param="p")), "abcdef! abc"
    constraint, ids = grammar.start(stop_ids=END), byte_level.encode("abcdef! abc", add_special_tokens=False)
    num_forced = 0
    for place, token_id in enumerate(ids):
        before = constraint.allowed()
        forced, rest = constraint.correct([]), ids[place:]
        num_forced += len(forced)
        assert text.startswith(byte_level.decode([*ids[:place], *forced]))
        for number, each in enumerate(forced):
            assert allowed_ids(constraint.supposing(forced[:number]), 512) == [each]
        if not forced:
            assert constraint.correct([*rest, 5]) == rest
            assert constraint.correct([rest[0], 2]) == rest[:1]
        assert constraint.supposing([5]).allowed() == bytes(64)
        assert constraint.allowed() == before
        constraint.accept(token_id)
    assert num_forced > 0
    assert constraint.is_finished


@pytest.mark.parametrize("size", [500, 512, 520])
def test_a_model_with_other_rows_than_the_tokenizer_has_tokens(byte_level: Tokenizer, size: int) -> None:
    grammar = GrammarCompiler(byte_level, vocabulary_size=size).compile(from_regex("(.|\\n)+", param="p"))
    ids = allowed_ids(grammar.start(stop_ids=END), size)
    assert ids
    assert max(ids) < min(size, 512)
