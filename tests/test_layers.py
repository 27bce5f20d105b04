"""Imports point one way, and each third-party library has its home: a table, and a walk over the syntax trees."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Who may import whom. The longest name that fits a module is its layer; a layer may always import itself, and `leaves`.
LEAVES = {"qserve", "qserve.errors", "qserve.clock", "qserve.config", "qserve.metrics", "qserve.logs"}
LAYERS: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES},
    "qserve.options": set(),
    "qserve.text": set(),
    "qserve.engine": set(),
    "qserve.engine.request": set(),
    "qserve.quant": set(),
    "qserve.quant.weight": set(),
    "qserve.kernels": {"qserve.quant.weight"},
    "qserve.checkpoint": {"qserve.quant", "qserve.quant.weight"},
    "qserve.device": {"qserve.kernels", "qserve.quant", "qserve.quant.weight", "qserve.engine.request"},
    "qserve.generation": {"qserve.text", "qserve.engine.request"},
    "qserve.llm": {"qserve.generation", "qserve.text", "qserve.engine", "qserve.engine.request"},
    # engine.request is what both sides of the engine say to each other; protocol.py builds its SamplingParams.
    "qserve.api": {"qserve.llm", "qserve.generation", "qserve.text", "qserve.engine.request"},
    "qserve.build": {
        "qserve.llm",
        "qserve.text",
        "qserve.engine",
        "qserve.device",
        "qserve.kernels",
        "qserve.checkpoint",
        "qserve.quant",
        "qserve.quant.weight",
    },
    "qserve.cli": {"qserve.options"},
    "qserve.serve": {"qserve.api", "qserve.llm", "qserve.options", "qserve.build", "qserve.server"},
    "qserve.server": {"qserve.api", "qserve.connection"},
    "qserve.connection": set(),
    "qserve.inspect": {"qserve.build", "qserve.checkpoint", "qserve.kernels", "qserve.quant", "qserve.quant.weight"},
    # A word that is a client too; what it measures in this process, build makes.
    "qserve.bench": {"clients", "qserve.options", "qserve.llm", "qserve.generation", "qserve.engine.request"},
    "training": {"qserve.checkpoint", "qserve.quant", "qserve.quant.weight"},
    "clients": set(),
}

# Where a library may be imported; everything else may be imported anywhere.
HOMES: dict[str, set[str]] = {
    "starlette": {"qserve.api"},
    "pydantic": {"qserve.api"},
    "pydantic_core": {"qserve.api"},
    "uvicorn": {"qserve.server", "qserve.connection"},
    "jinja2": {"qserve.text"},
    "llguidance": {"qserve.text.grammar"},
    "tokenizers": {"qserve.text", "training"},
    "prometheus_client": {"qserve.metrics"},
    "huggingface_hub": {"qserve.checkpoint"},
    "gguf": {"qserve.checkpoint", "training"},
    "torchao": {"qserve.quant", "qserve.checkpoint"},
    "transformers": {
        "qserve.text.tokenizer",
        "qserve.device.fallback",
        "qserve.device.paged_attention",
        "qserve.checkpoint",
        "training",
    },
    "torch": {
        "qserve.quant",
        "qserve.kernels",
        "qserve.checkpoint",
        "qserve.device",
        "qserve.build",
        "qserve.inspect",
        "training",
    },
    "triton": {"qserve.kernels.cuda"},
    "httpx": {"clients"},
}
WITHOUT_TORCH = ["qserve.api.app", "qserve.llm", "qserve.text.tokenizer", "qserve.text.templates", "qserve.engine.loop"]


def modules() -> Iterator[tuple[str, Path]]:
    for package in ("qserve", "training", "clients"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"), path


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every imported module with its line; for `from a import b` both a and a.b, as b may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            own = {name for name, _ in modules()}
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name if name in own else str(node.module)) for name in names)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def layer_of(module: str) -> str:
    return max((layer for layer in LAYERS if is_within(module, layer)), key=len)


def test_imports_point_one_way_and_libraries_are_at_home() -> None:
    faults = []
    for module, path in modules():
        layer = layer_of(module)
        for line, imported in imports(path):
            where = f"{path.relative_to(ROOT)}:{line}: {module} imports {imported}"
            library = imported.partition(".")[0]
            if library in ("qserve", "training", "clients"):
                target = layer_of(imported)
                if target != layer and target not in LAYERS[layer] | LEAVES and not is_within(target, layer):
                    faults.append(f"{where}; {layer} may import {sorted(LAYERS[layer]) or 'only leaves'}")
            elif library in HOMES and not any(is_within(module, home) for home in HOMES[library]):
                faults.append(f"{where}; the home of {library} is {sorted(HOMES[library])}")
    assert not faults, "\n" + "\n".join(faults)


def loaded_by(module: str, libraries: set[str]) -> str:
    code = f"import sys, {module}; print(*sorted({libraries!r} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return ended.stdout.strip()


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_torch_is_not_loaded(module: str) -> None:
    assert loaded_by(module, {"torch", "torchao", "transformers"}) == ""


def test_serving_loads_neither_torchao_nor_transformers() -> None:
    """Importing either takes seconds."""
    assert loaded_by("qserve.build", {"torchao", "transformers"}) == ""
