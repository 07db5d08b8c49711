"""Documents that could drift are held to the code; run this file to rewrite the generated one."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from batch_scorer.config import Config
from batch_scorer.errors import RowReason, ShardReason

ROOT = Path(__file__).parents[2]
SETTINGS = ROOT / "docs" / "settings.md"

_INTRO = """# Settings

One object for the command line, the YAML file and Python: `token_budget` is `--token-budget`,
`token_budget:` and `load_config(token_budget=…)`. A flag goes on top of the file. Unknown names are
refused.

**scores**: enters the fingerprint; another value cannot reuse old scores. **layout**: fixed for an
output once it has been written to. **runtime**: free to change when a run is resumed.
"""


def settings_page() -> str:
    parts = [_INTRO]
    for role in ("scores", "layout", "runtime"):
        parts.append(f"\n## {role}\n")
        for name, field in Config.model_fields.items():
            if Config.roles()[name] == role:
                text = " ".join((field.description or "").split())
                parts.append(f"\n**`{name}`** {_default(field)}  \n{text}\n")
    return "".join(parts)


def _default(field: Any) -> str:
    if field.is_required():
        return "(needed)"
    value = field.default
    choices = [str(getattr(c, "value", c)) for c in _choices(field.annotation)]
    shown = f"default `{getattr(value, 'value', value)}`"
    return f"({shown}; one of {', '.join(f'`{c}`' for c in choices)})" if choices else f"({shown})"


def _choices(kind: Any) -> list[Any]:
    found: list[Any] = []
    for part in (kind, *get_args(kind)):
        if hasattr(part, "__members__"):
            found += list(part)
        elif "Literal" in str(part):
            found += [arg for arg in get_args(part) if isinstance(arg, str)]
    return list(dict.fromkeys(found))


def test_the_settings_page_is_made_from_the_settings() -> None:
    assert SETTINGS.read_text() == settings_page(), "run: python tests/unit/test_docs.py"


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md"])
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_reason_is_explained() -> None:
    text = (ROOT / "docs" / "reasons.md").read_text()
    for reason in (*RowReason, *ShardReason):
        assert f"`{reason.value}`" in text, reason


def test_flags_in_the_documents_exist() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Config.model_fields}
    known |= {"--column", "--store-option", "--no-ray", "--ray", "--config", "--json", "--help"}
    known |= {"--version", "--tiny", "--threads"}
    known |= {"--benchmark", "--legacy-xstest-weights", "--report"}
    other_programs = {"embedded-model.md"}  # its flags are those of a script in examples/
    pages = [page for page in ROOT.glob("docs/*.md") if page.name not in other_programs]
    for page in (*pages, ROOT / "README.md"):
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", page.read_text()):
            assert flag in known, f"{page.name}: {flag}"


if __name__ == "__main__":
    SETTINGS.write_text(settings_page())
