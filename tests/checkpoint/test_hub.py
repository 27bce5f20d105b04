"""Names of models to directories; the hub's cache is laid out here as huggingface_hub lays it out."""

import shutil
from pathlib import Path

import pytest

from qserve.checkpoint.detect import detect
from qserve.checkpoint.hub import resolve
from qserve.errors import NotACheckpoint
from tests import tiny
from tests.checkpoint.making import bin_checkpoint


def cached(cache: Path, repository: str, source: Path) -> Path:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    return Path(shutil.copytree(source, folder / "snapshots" / commit))


def test_a_path_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


@pytest.mark.parametrize("name", ["/absent/model", "./absent", "absent", "a/b/c", "org/na me"])
def test_neither_a_path_nor_a_repository(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotACheckpoint, match="does not exist"):
        resolve(name)


def test_the_cache_is_used_offline(tmp_path: Path) -> None:
    source = tiny.make_checkpoint(tmp_path / "source")
    snapshot = cached(tmp_path / "cache", "org/name", source)
    found = resolve("org/name", cache=tmp_path / "cache", is_offline=True)
    assert found.samefile(snapshot)
    assert detect(found).config["model_type"] == "llama"


def test_a_cached_model_of_bin_files(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "cache", "org/name", bin_checkpoint(tmp_path / "source", None))
    assert resolve("org/name", cache=tmp_path / "cache", is_offline=True).samefile(snapshot)


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match=r"org/name is no directory here.*cannot be reached"):
        resolve("org/name", cache=tmp_path, is_offline=True)
