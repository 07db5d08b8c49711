"""The module ladder: imports run one way, heavy libraries stay in their places."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "batch_scorer"


def ladder() -> list[str]:
    """Its one place is CONTRIBUTING.md: a line for each step of a row, the names before a gap."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    lines = page.split("```ladder\n")[1].split("```")[0].splitlines()
    return [name for line in lines for name in line.split("  ")[0].split()]


LADDER = ladder()


HEAVY = {
    "torch": {"backends", "models"},
    "transformers": {"backends", "models", "render"},
    "ray": {"pipeline", "runs", "cli"},
    "vllm": {"backends"},
}


def _module(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(file: Path, *, at_top: bool = False) -> set[str]:
    """What a file imports, inside functions too; with `at_top` what it needs to be loaded."""
    names: set[str] = set()
    tree = ast.parse(file.read_text())
    for node in tree.body if at_top else ast.walk(tree):
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
    assert len(LADDER) == len(set(LADDER))
    assert {_module(file) for file in FILES} == set(LADDER)


def test_no_file_imports_itself_through_others() -> None:
    """Inside a folder too: its files have an order."""
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in FILES}
    imports = {
        name: {
            other
            for found in _imports(file, at_top=True)
            for other in (found, found.rpartition(".")[0])
            if other in dotted and other != name
        }
        for name, file in dotted.items()
    }
    TopologicalSorter(imports).prepare()  # raises CycleError with the files


def _named_files(page: Path) -> list[str]:
    """What stands in backticks and looks like a file or a folder of the package."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"`((?:[\w-]+/)*[\w-]+(?:\.py|/))`", text)


@pytest.mark.parametrize(
    ("page", "base"),
    [("CONTRIBUTING.md", "."), ("docs/tour.md", "batch_scorer"), ("tests/README.md", "tests")],
)
def test_files_that_a_page_names_are_there(page: str, base: str) -> None:
    named = _named_files(ROOT / page)
    assert len(named) > 5
    places = (ROOT, ROOT / base, ROOT / base / "helpers", PACKAGE)
    assert [name for name in named if not any((place / name).exists() for place in places)] == []


def test_a_test_file_imports_no_other_test_file() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        imported = {part for name in _imports(file) for part in name.split(".")}
        assert not any(part.startswith("test_") for part in imported), file


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
        "import sys, batch_scorer.pipeline.ray_data\n"
        "loaded = sorted({'torch', 'transformers', 'vllm'} & set(sys.modules))\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
