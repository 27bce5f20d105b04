"""Text to packed tokens: every kind of file, and what is wrong with some."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.errors import UsageError
from tests.tiny import make_tokenizer
from training.data import load_tokenizer, read_documents, read_text, windows


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return load_tokenizer(directory)


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_every_kind_of_file(tokenizer: Any, tmp_path: Path) -> None:
    stories = write(tmp_path / "a.txt", "one\n<|endoftext|>\ntwo\n\nthree\n<|endoftext|>\n")
    assert list(read_documents(stories, tokenizer)) == ["one", "two\n\nthree"]
    records = [{"text": "one"}, "two", {"messages": [{"role": "user", "content": "Hello"}]}]
    lines = write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    chat = "<|im_start|>user\nHello<|im_end|>\n"
    assert list(read_documents(lines, tokenizer)) == ["one", "two", chat]
    assert list(read_documents(write(tmp_path / "c.json", json.dumps(records)), tokenizer)) == ["one", "two", chat]


def test_documents_are_packed_with_the_end_of_text_between(tokenizer: Any, tmp_path: Path) -> None:
    first = write(tmp_path / "a.txt", "one two\n<|endoftext|>\nthree")
    second = write(tmp_path / "b.jsonl", json.dumps({"text": "höher"}))
    text = read_text([first, second], tokenizer)
    assert tokenizer.decode(text.tokens) == "one two<|im_end|>three<|im_end|>höher<|im_end|>"
    assert text.num_bytes == len("one twothreehöher".encode())
    assert set(text.files) == {"a.txt", "b.jsonl"}
    assert text.identity == read_text([first, second], tokenizer).identity
    assert text.identity != read_text([second, first], tokenizer).identity


def test_a_part_of_the_text(tokenizer: Any, tmp_path: Path) -> None:
    whole = read_text([write(tmp_path / "a.txt", "word " * 200)], tokenizer)
    part = read_text([tmp_path / "a.txt"], tokenizer, max_tokens=len(whole.tokens) // 2)
    assert torch.equal(part.tokens, whole.tokens[: len(part.tokens)])
    assert part.num_bytes == pytest.approx(whole.num_bytes / 2, rel=0.05)


def test_windows_overlap_by_one() -> None:
    found = windows(torch.arange(10), 4)
    assert found.tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    with pytest.raises(UsageError, match="has 4 tokens; a window of 4 needs one more"):
        windows(torch.arange(4), 4)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", '{"text": "one"}\n{"texts": "two"}', r"record 2, holds texts; expected text, or messages"),
        ("a.jsonl", '{"text": ', r"is no JSONL"),
        ("a.json", "[1]", r"record 1, holds int"),
        ("a.txt", "\n", r"no text was found in a\.txt"),
    ],
)
def test_what_holds_no_text_is_refused(tokenizer: Any, tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_text([write(tmp_path / name, text)], tokenizer)


def test_what_is_not_there_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_text([tmp_path / "a.txt"], tokenizer)
    with pytest.raises(UsageError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_saved_datasets(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="an optional library")
    some = datasets.Dataset.from_dict({"text": ["one", "two"]})
    other = datasets.Dataset.from_dict({"text": ["three"]})
    some.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"train": some, "test": other}).save_to_disk(str(tmp_path / "split"))
    datasets.DatasetDict({"test": other}).save_to_disk(str(tmp_path / "other"))
    for name in ("plain", "split"):
        assert list(read_documents(tmp_path / name, tokenizer)) == ["one", "two"]
    assert list(read_documents(tmp_path / "other" / "test", tokenizer)) == ["three"]
    text = read_text([tmp_path / "split"], tokenizer)
    assert {"split/train/state.json", "split/test/state.json"} <= set(text.files)
    with pytest.raises(UsageError, match="has no split train; name the directory of one"):
        read_text([tmp_path / "other"], tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="was not saved by `datasets`"):
        read_text([tmp_path / "empty"], tokenizer)
