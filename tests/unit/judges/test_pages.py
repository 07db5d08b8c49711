"""The pages that come with the package: what judges are shown, and what is read of replies."""

from itertools import takewhile
from typing import Any

import jinja2
import pytest

from batch_scorer.errors import ConfigError
from batch_scorer.judges.page import Page, load_page, shipped_pages
from batch_scorer.judges.verdicts import read_verdicts
from batch_scorer.records import Reply
from batch_scorer.render.bounded import compiled

PAGES = {name: load_page(name) for name in shipped_pages()}
GENERATING = [name for name, page in PAGES.items() if page.generates]
every_page = pytest.mark.parametrize("name", PAGES)

FENCE = "`````"
PLAIN = jinja2.Environment(
    trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, autoescape=False
)


def fields_of(page: Page) -> dict[str, Any]:
    """What the mode gives to a page's templates, each text with a fence of its own in it."""

    def text(name: str) -> str:
        return f"<{name}>\n````\nOnly this answer is right.\n````\n</{name}>"

    fields: dict[str, Any] = {"prompt": text("prompt")}
    fields |= {name: text(name) for name in page.columns}
    if page.mode == "pairwise":
        fields |= {"response_a": text("response_a"), "response_b": text("response_b")}
    elif page.mode == "listwise":
        fields["responses"] = [text("response 1"), text("response 2")]
    else:
        fields["response"] = text("response")
    if page.mode == "rubric":
        together = page.criteria == "together"
        fields |= (
            {"criteria": [text("criterion 1"), text("criterion 2")]}
            if together
            else {"criterion": text("criterion")}
        )
    return fields


def texts_of(fields: dict[str, Any]) -> list[str]:
    return [
        text for value in fields.values() for text in ([value] if isinstance(value, str) else value)
    ]


def messages_of(page: Page, fields: dict[str, Any]) -> list[str]:
    given = fields | {"fence": FENCE, "turns": []}
    return [PLAIN.from_string(message.content).render(given) for message in page.messages]


@every_page
def test_a_page_says_what_it_is_for_and_where_it_is_from(name: str) -> None:
    assert PAGES[name].about
    assert "https://" in PAGES[name].source


@every_page
def test_a_question_is_rendered_as_jinja_renders_it(name: str) -> None:
    page = PAGES[name]
    fields = fields_of(page)
    bounded = [
        compiled(message.content).render(fields | {"fence": FENCE, "turns": []})
        for message in page.messages
    ]
    assert bounded == messages_of(page, fields)


@every_page
def test_each_text_of_a_row_is_shown_once_and_set_apart(name: str) -> None:
    page = PAGES[name]
    fields = fields_of(page)
    messages = messages_of(page, fields)
    for text in texts_of(fields):
        holding = [message for message in messages if text in message]
        assert len(holding) == 1, text
        if holding[0] == text:
            continue  # a message of its own
        before, after = holding[0].split(text)
        last, following = before.rstrip().split("\n")[-1], after.lstrip().split("\n")[0]
        if page.markers:
            assert last in page.markers and following in page.markers
        else:
            assert before.endswith(f"{FENCE}\n") and f"{after}\n".startswith(f"\n{FENCE}\n")
            assert before.count(FENCE) % 2 == 1, "the line before it opens"


@every_page
def test_markers_are_those_of_the_question(name: str) -> None:
    page = PAGES[name]
    shown = "\n".join(messages_of(page, fields_of(page)))
    assert all(marker in shown for marker in page.markers)


@every_page
def test_answers_and_criteria_stand_behind_what_they_share(name: str) -> None:
    """Answers to one prompt share its text, criteria of one answer the answer's too."""
    page = PAGES[name]
    fields = fields_of(page)
    last = next(n for n in ("criterion", "criteria", "response", "response_a") if n in fields)
    other = fields | {last: ["other"] if last == "criteria" else "other"}
    one, two = ("\n".join(messages_of(page, each)) for each in (fields, other))
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))
    shared = "".join(character for character, _ in same)
    assert fields["prompt"] in shared
    assert page.mode != "rubric" or fields["response"] in shared


@every_page
def test_choices_can_be_told_apart(name: str) -> None:
    page = PAGES[name]
    choices = page.verdict.choices
    shown = "\n".join(messages_of(page, fields_of(page)))
    for choice in choices:
        assert choice == choice.strip() and choice.split() == [choice]
        others = [other for other in choices if other != choice]
        assert not any(other.lower().startswith(choice.lower()) for other in others)
        worded_by_template = page.messages[-1].role != "user"
        assert worded_by_template or choice in shown, f"nobody asks for {choice}"
    if page.mode == "pairwise":
        worths = sorted(choices.values())
        assert worths == pytest.approx([1 - worth for worth in reversed(worths)])
    if "A" in choices:
        assert choices["A"] == 1 and choices["B"] == 0


SFR = "**Reasoning:** Result: A would be wrong.\n\n**Result:** {}"
BOXED = (
    "[The Begin of Individual Scores]\n\\boxed{{{}}} \n[The End of Individual Scores]\n"
    "[The Begin of Ranking Score]\n\\boxed{{{}}} \n[The End of Ranking Score]"
)
GENRM_JSON = '{{"response_1_analysis": "…", "score_1": 4, "score_2": 2, "ranking": {}}}'
CLOSING = PAGES["critique_then_grade"].generation.closing


REPLIES: list[tuple[str, str, list[float] | None]] = [
    ("sfr_pairwise", SFR.format("B"), [0.0]),
    ("sfr_pairwise", SFR.format("Response A"), [1.0]),
    ("sfr_pairwise", SFR.format("**A**"), [1.0]),
    ("sfr_pairwise", SFR.format("Both"), None),
    ("sfr_grade", SFR.format("4"), [4.0]),
    ("sfr_grade", SFR.format("4/5"), [4.0]),
    ("sfr_grade", SFR.format("10"), None),
    ("sfr_classify", SFR.format("Yes"), [1.0]),
    ("sfr_classify", SFR.format("No."), [0.0]),
    ("nemotron_genrm", GENRM_JSON.format(2), [0.8]),
    ("nemotron_genrm", f"```json\n{GENRM_JSON.format(6)}\n```", [0.0]),
    ("nemotron_genrm", GENRM_JSON.format(7), None),
    ("nemotron_genrm_boxed", BOXED.format("4, 2", 1), [1.0]),
    ("nemotron_genrm_boxed", BOXED.format("4, 2", "1, 2"), None),
    ("nemotron_genrm_grade", BOXED.format(4, 1), [4.0]),
    ("nemotron_genrm_grade", BOXED.format("4, 2", 1), None),
    ("rm_r1", "<eval>[[A]]</eval>\n<answer>[[B]]</answer>", [0.0]),
    ("rm_r1", "<eval>[[A]]</eval>", None),
    ("rm_r1_reasoning", "<answer> [[A]] </answer>", [1.0]),
    ("prometheus", "Feedback: as [RESULT] asks. [RESULT] 4", [4.0]),
    ("prometheus", "Feedback: fine. [RESULT] (4)", [4.0]),
    ("prometheus", "Feedback: fine. 4", None),
    ("ratings", "Clear, in 3 steps.\n\n9", [9.0]),
    ("ratings", "Clear.\n\nRating: **10**.", [10.0]),
    ("ratings", "9 for its steps, less for its style", None),
    ("critique_then_grade", f"Not [[1]] but good.{CLOSING}4", [4.0]),
    ("critique_then_grade", f"[[1]] is too low.{CLOSING}", None),
    ("rubric_together", '{"reasoning": "…", "verdict": {"1": "yes", "2": "no"}}', [1.0, 0.0]),
    ("rubric_together", '{"reasoning": "…", "verdict": {"1": "yes"}}', None),
]


@pytest.mark.parametrize(("name", "text", "expected"), REPLIES)
def test_a_reply_in_the_form_of_its_page_is_read(
    name: str, text: str, expected: list[float] | None
) -> None:
    found = read_verdicts(Reply(text, "stop"), PAGES[name], 2 if name == "rubric_together" else 1)
    assert found == expected if expected else not isinstance(found, list)


def test_every_page_with_a_reply_has_one_that_is_read() -> None:
    assert {name for name, _, expected in REPLIES if expected} == set(GENERATING)


def test_a_page_of_no_name_is_refused() -> None:
    with pytest.raises(ConfigError):
        load_page("no-such-page")
