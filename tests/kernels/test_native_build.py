"""Compiling: once, by whoever is first, and in words where it cannot be."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qserve.errors import UsageError
from qserve.kernels import build
from qserve.kernels.build import KernelsUnavailable, Variant, build_library, choose_variant, supported_variants

TINY = Variant(name="tiny")


@pytest.fixture
def small_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in a moment, in place of the kernels."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", sources)
    return sources


def test_the_best_variant_that_the_processor_can_run_comes_first() -> None:
    everything = frozenset().union(*(variant.cpu_flags for variant in build.VARIANTS))
    assert [variant.name for variant in supported_variants(everything)] == ["amx", "avx512", "avx2", "portable"]
    assert [variant.name for variant in supported_variants(frozenset({"avx2", "fma", "f16c"}))] == ["avx2", "portable"]
    assert [variant.name for variant in supported_variants(frozenset())] == ["portable"]


def test_a_variant_that_cannot_run_is_refused() -> None:
    with pytest.raises(UsageError, match="'z80' cannot run on this processor"):
        choose_variant("z80")


def test_no_compiler_is_told_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelsUnavailable, match="looked for: no-such-compiler"):
        build_library(TINY, cache=tmp_path)


def test_a_compiler_that_fails_is_quoted(small_sources: Path, tmp_path: Path) -> None:
    (small_sources / "two.cpp").write_text("not C++\n")
    with pytest.raises(KernelsUnavailable, match=r"two\.cpp"):
        build_library(TINY, cache=tmp_path / "cache", progress=lambda line: None)
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_many_at_once_compile_once(small_sources: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(build_library, TINY, cache=tmp_path / "cache", progress=lines.append) for _ in range(4)]
        paths = {future.result() for future in futures}
    assert len(paths) == 1
    assert len(lines) == 1
    assert "1 files, once" in lines[0]


def test_changed_sources_compile_again(small_sources: Path, tmp_path: Path) -> None:
    first = build_library(TINY, cache=tmp_path / "cache", progress=lambda line: None)
    (small_sources / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    assert build_library(TINY, cache=tmp_path / "cache", progress=lambda line: None) != first


def test_the_compiler_may_be_named(small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\necho called >> {tmp_path}/calls\nexec {build.find_compiler()} "$@"\n')
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(wrapper))
    build_library(TINY, cache=tmp_path / "cache", progress=lambda line: None)
    assert (tmp_path / "calls").exists()


def test_what_was_compiled_needs_no_compiler(
    small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_library(TINY, cache=tmp_path / "cache", progress=lambda line: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build_library(TINY, cache=tmp_path / "cache") == made
