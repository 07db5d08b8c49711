"""docs/judges.md lists the shipped pages as they are, and its own pages work."""

import re
from pathlib import Path

import pytest

from batch_scorer.judges.page import Page, load_page, shipped_pages
from batch_scorer.judges.verdicts import read_verdicts
from batch_scorer.models.embedded import load_tokenizer
from batch_scorer.records import Reply
from batch_scorer.render.bounded import compiled

TEXT = (Path(__file__).parents[3] / "docs" / "judges.md").read_text()
FENCED = "{}:\n```\n{}\n```\n"


def listed() -> list[list[str]]:
    """The cells of each row of the table of pages."""
    section = TEXT.split("\n## Which page for which model\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.*) \|$", section, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def may_write(page: Page) -> str:
    generation = page.generation
    if not page.generates:
        return ""
    thinking = f"({generation.thinking_tokens:,}) " if generation.thinking_tokens else ""
    behind = f", then {generation.verdict_tokens}" if generation.closing else ""
    return f"{thinking}{generation.max_tokens:,}{behind}"


def test_the_table_lists_every_page_once() -> None:
    assert sorted(name.strip("`") for name, *_ in listed()) == shipped_pages()


def test_the_table_says_what_pages_add_and_judges_may_write() -> None:
    tokenizer = load_tokenizer()
    nothing = dict.fromkeys(("prompt", "response", "response_a", "response_b", "criterion"), "")
    given = {**nothing, "criteria": ["", ""], "fence": "```"}
    for name, *_, tokens, most in listed():
        page = load_page(name.strip("`"))
        shown = "\n".join(compiled(message.content).render(given) for message in page.messages)
        assert (int(tokens), most) == (len(tokenizer(shown)["input_ids"]), may_write(page)), name


@pytest.fixture
def own_pages(tmp_path: Path) -> list[Page]:
    """The pages that the text shows."""
    pages = []
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```\n", TEXT, re.DOTALL)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block)
        pages.append(load_page(str(file)))
    return pages


def test_the_pages_of_the_text_work(own_pages: list[Page]) -> None:
    reference, order = own_pages
    given = {"prompt": "P", "reference": "F", "response": "R", "fence": "```"}
    shown = compiled(reference.messages[0].content).render(given)
    parts = [("Question", "P"), ("Reference", "F"), ("Answer", "R")]
    assert shown.startswith("".join(FENCED.format(*part) for part in parts))
    shown = compiled(order.messages[0].content).render(given | {"responses": ["X", "Y"]})
    assert FENCED.format("Answer 1", "X") + FENCED.format("Answer 2", "Y") in shown
    reply = Reply("The second is right.\n\n**Ranking:** 2 > 1 > 3", "stop")
    assert read_verdicts(reply, order, 3) == [0.5, 1.0, 0.0]
