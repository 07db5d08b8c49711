"""The module ladder: imports run one way, heavy libraries stay in their places."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "batch_scorer"

LADDER = (
    "errors",
    "logs",
    "failpoints",
    "records",
    "isolation",
    "config",
    "fingerprint",
    "storage",
    "formats",
    "models",
    "render",
    "packing",
    "backends",
    "columns",
    "commits",
    "metrics",
    "telemetry",
    "lease",
    "manifest",
    "generations",
    "plan",
    "reuse",
    "shard",
    "work",
    "session",
    "estimate",
    "parity",
    "trial",
    "pipeline",
    "run",
    "verify",
    "evaluation",
    "reports",
    "nights",
    "nightly",
    "submit",
    "cli",
)

HEAVY = {
    "torch": {"backends", "models"},
    "transformers": {"backends", "models", "render"},
    "ray": {"pipeline", "session", "submit", "telemetry"},
    "vllm": {"backends"},
}


def _module(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_module_imports_only_what_stands_above_it(file: Path) -> None:
    here = _module(file)
    for name in _imports(file):
        parts = name.split(".")
        if parts[0] != "batch_scorer" or len(parts) < 2 or parts[1] == "__version__":
            continue
        assert LADDER.index(parts[1]) <= LADDER.index(here), f"{here} imports {parts[1]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_heavy_libraries_stay_in_their_places(file: Path) -> None:
    for name in _imports(file):
        allowed = HEAVY.get(name.split(".")[0])
        assert allowed is None or _module(file) in allowed, f"{file.name} imports {name}"


def test_every_module_has_its_place_in_the_ladder() -> None:
    assert {_module(file) for file in FILES} == set(LADDER)


@pytest.mark.parametrize("arguments", [["--help"], ["score", "--help"], ["--version"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['batch-scorer', *{arguments!r}]\n"
        "from batch_scorer.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"loaded = sorted({set(HEAVY)!r} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_stages_are_loaded_without_torch() -> None:
    """A worker that dies while it imports torch must have been counted, so that Ray's restarts
    end; and the workers that read and commit need none of it."""
    code = (
        "import sys, batch_scorer.pipeline\n"
        "loaded = sorted({'torch', 'transformers', 'vllm'} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
