"""What judges write, and what is read of it: a verdict that is there, or the reason for none."""

import json
import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batch_scorer.errors import RowReason
from batch_scorer.judges.page import Generation, Page
from batch_scorer.judges.pattern import last_group, pattern_problem
from batch_scorer.judges.verdicts import read_verdicts
from batch_scorer.records import Reply, RowError

NONE, RANGE = RowReason.NO_VERDICT, RowReason.VERDICT_OUT_OF_RANGE


def page(mode: str = "pointwise", criteria: str = "each", **verdict: Any) -> Page:
    rule = {"by": "pattern" if "pattern" in verdict else "json", **verdict}
    messages = [{"role": "user", "content": "{{ prompt }}"}]
    return Page.model_validate(
        {"about": "x", "mode": mode, "criteria": criteria, "messages": messages, "verdict": rule}
    )


def read(text: str, asked: Page, count: int = 1) -> list[float] | RowReason:
    found = read_verdicts(Reply(text, "stop"), asked, count)
    return found.reason if isinstance(found, RowError) else found


GRADE = page(pattern=r"(?i)grade:\s*(\d+)", low=1, high=5)
LOOSE = page(pattern=r"(?i)\bgrade\W*?:\W*?(-?[\d./]+)", low=1, high=5)
BRACKETS = page("pairwise", pattern=r"\[\[([^\[\]]*)\]\]", choices={"A": 1, "B": 0, "C": 0.5})
BARE = page("pairwise", pattern=r"(?i)verdict:\W*(A|B|tie)", choices={"A": 1, "B": 0, "tie": 0.5})
LAST_WORD = page(pattern=r"(\S+?)\.?\s*\z", low=1, high=10)
RESULT = page(pattern=r"\[RESULT\]\s*(\S+)", low=1, high=5)
BOXED = page(pattern=r"\\boxed\{([^{}]*)\}", low=1, high=6)
ANSWER = page("pairwise", pattern=r"<answer>\s*\[\[(\w+)\]\]\s*</answer>", choices={"A": 1, "B": 0})
YES = page(pattern=r"\*\*Result:\*\*\s*(\S+)", choices={"Yes": 1, "No": 0})


@pytest.mark.parametrize(
    ("asked", "text", "expected"),
    [
        (GRADE, "Grade: 4", [4.0]),
        (GRADE, "GRADE:4", [4.0]),
        (GRADE, "Grade: 2. On second thought, grade: 5", [5.0]),
        (GRADE, "Grade: 4.", [4.0]),
        (GRADE, "Grade: 4.5", [4.5]),
        (GRADE, "Grade: 4/5", [4.0]),
        (GRADE, "Grade: 4/10", NONE),
        (GRADE, "Grade: 4-5", NONE),
        (GRADE, "Grade: 4,5", NONE),
        (GRADE, "Grade: 4+", NONE),
        (GRADE, "Grade: 4%", NONE),
        (GRADE, "Grade: 4th", NONE),
        (GRADE, "Grade: 10", RANGE),
        (GRADE, "Grade: 0", RANGE),
        (GRADE, "Grade: 55", RANGE),
        (GRADE, "Grade: 1e400", RANGE),
        (GRADE, "Grade: " + "9" * 5000, RANGE),
        (GRADE, "Grade: four", NONE),
        (GRADE, "Four of five.", NONE),
        (LOOSE, "**Grade:** 4", [4.0]),
        (LOOSE, "Grade: **4**", [4.0]),
        (LOOSE, "**Grade: 4/5**", [4.0]),
        (LOOSE, "Grade: -4", RANGE),
        (LOOSE, "Grade: ...", NONE),
        (BRACKETS, "[[A]]", [1.0]),
        (BRACKETS, "[[ **B** ]]", [0.0]),
        (BRACKETS, "I first thought [[A]], but my verdict is [[B]].", [0.0]),
        (BRACKETS, "Neither wins: [[C]]", [0.5]),
        (BRACKETS, "It is [[A]]. Not [[D]].", NONE),
        (BRACKETS, "[[A", NONE),
        (BRACKETS, "[[a]]", NONE),
        (BRACKETS, "[[]]", NONE),
        (BRACKETS, "A", NONE),
        (BARE, "Verdict: A", [1.0]),
        (BARE, "**Verdict:** **B**", [0.0]),
        (BARE, "Verdict: tie", [0.5]),
        (BARE, "Verdict: A's answer", [1.0]),
        (BARE, "Verdict: Both are good", NONE),
        (BARE, "Verdict: A/B", NONE),
        (BARE, "Verdict: A+", NONE),
        (LAST_WORD, "Clear and right.\n\n9", [9.0]),
        (LAST_WORD, "Clear and right.\n\n**10**\n", [10.0]),
        (LAST_WORD, "Rating: 7/10.", [7.0]),
        (LAST_WORD, "Rating: 11", RANGE),
        (LAST_WORD, "9 is what I give it", NONE),
        (RESULT, "Feedback: good [RESULT] 4", [4.0]),
        (RESULT, "Feedback: a [RESULT] 1 is too low. [RESULT] 3", [3.0]),
        (RESULT, "Feedback: good [RESULT] (4)", NONE),
        (BOXED, r"\boxed{3}", [3.0]),
        (BOXED, r"\boxed{ 6 }", [6.0]),
        (BOXED, r"\boxed{7}", RANGE),
        (BOXED, r"\boxed{3, 4}", NONE),
        (ANSWER, "<eval>…</eval>\n<answer>[[B]]</answer>", [0.0]),
        (ANSWER, "<answer>[[B]]", NONE),
        (YES, "**Reasoning:** It is.\n\n**Result:** Yes", [1.0]),
        (YES, "**Result:** **No**", [0.0]),
        (YES, "**Result:** Yes.", NONE),
        (YES, "**Result:** Not", NONE),
        (GRADE, "Grade: \udc804", NONE),
        (GRADE, "Grade: \x004", [4.0]),
        (LAST_WORD, "Grade: ٤", NONE),
    ],
)
def test_a_verdict_in_a_text(asked: Page, text: str, expected: object) -> None:
    assert read(text, asked) == expected


def test_a_choice_stands_before_a_number() -> None:
    both = page(pattern=r"Grade: (\S+)", choices={"5": 1.0, "n/a": 0.0}, low=1, high=5)
    assert read("Grade: 5", both) == [1.0]
    assert read("Grade: n/a", both) == [0.0]
    assert read("Grade: 4", both) == [4.0]


GRADES = page("listwise", pattern=r"(?s)\[\[(.*?)\]\]", low=1, high=10)
PLACES = page("listwise", pattern=r"(?m)^Ranking:(.*)$", ranks=True)
TOGETHER = page("rubric", "together", pattern=r"(?s)Verdicts:(.*)", choices={"yes": 1.0, "no": 0.0})


@pytest.mark.parametrize(
    ("asked", "text", "count", "expected"),
    [
        (GRADES, "[[8, 7.5, 10]]", 3, [8.0, 7.5, 10.0]),
        (GRADES, "[[8 7 9]]", 3, [8.0, 7.0, 9.0]),
        (GRADES, "[[\n8\n7\n]]", 2, [8.0, 7.0]),
        (GRADES, "[[**8**, 7/10]]", 2, [8.0, 7.0]),
        (GRADES, "[[8]]", 1, [8.0]),
        (GRADES, "[[8, 7]]", 3, NONE),
        (GRADES, "[[8, 7, 9, 1]]", 3, NONE),
        (GRADES, "[[8,, 9]]", 2, NONE),
        (GRADES, "[[8,, 9]]", 3, NONE),
        (GRADES, "[[8, 11]]", 2, RANGE),
        (GRADES, "[[]]", 1, NONE),
        (PLACES, "Ranking: 3, 1, 2", 3, [0.0, 1.0, 0.5]),
        (PLACES, "Ranking: 3 > 1 > 2", 3, [0.5, 0.0, 1.0]),
        (PLACES, "Ranking: [3] > [1] > [2]", 3, [0.5, 0.0, 1.0]),
        (PLACES, "Ranking: 3>1>2", 3, [0.5, 0.0, 1.0]),
        (PLACES, "Ranking: 1", 1, [1.0]),
        (PLACES, "Ranking: 1, 1, 2", 3, NONE),
        (PLACES, "Ranking: 1, 2, 4", 3, NONE),
        (PLACES, "Ranking: 0, 1, 2", 3, NONE),
        (PLACES, "Ranking: 1, 2", 3, NONE),
        (PLACES, "Ranking: 1 > 2 = 3", 3, NONE),
        (PLACES, "Ranking: 1 > 2, 3", 3, NONE),
        (PLACES, "Ranking: 1 > > 3", 3, NONE),
        (PLACES, "Ranking: 1.0, 2", 2, NONE),
        (PLACES, "Ranking: A > B", 2, NONE),
        (TOGETHER, "Verdicts: yes, no, yes", 3, [1.0, 0.0, 1.0]),
        (TOGETHER, "Verdicts:\nyes\nno\n", 2, [1.0, 0.0]),
        (TOGETHER, "Verdicts: yes, no", 3, NONE),
        (TOGETHER, "Verdicts: yes, maybe", 2, NONE),
    ],
)
def test_several_verdicts_in_a_text(asked: Page, text: str, count: int, expected: object) -> None:
    assert read(text, asked, count) == expected


ONE = page(low=1, high=5)
LETTER = page("pairwise", choices={"A": 1, "B": 0})
NUMBERED = page("pairwise", choices={"1": 1, "2": 0})
LIST = page("listwise", low=1, high=5)
PLACE_LIST = page("listwise", ranks=True)
CRITERIA = page("rubric", "together", choices={"yes": 1, "no": 0})


@pytest.mark.parametrize(
    ("asked", "text", "count", "expected"),
    [
        (ONE, '{"verdict": 4}', 1, [4.0]),
        (ONE, ' {"reasoning": "so", "verdict": "4"} \n', 1, [4.0]),
        (ONE, '{"verdict": 4.5}', 1, [4.5]),
        (ONE, '{"verdict": 4e0}', 1, [4.0]),
        (ONE, '{"verdict": "**4**"}', 1, [4.0]),
        (ONE, '{"verdict": 6}', 1, RANGE),
        (ONE, '{"verdict": -1}', 1, RANGE),
        (ONE, '{"verdict": 1e999}', 1, RANGE),
        (ONE, '{"verdict": ' + "9" * 5000 + "}", 1, RANGE),
        (ONE, '{"verdict": true}', 1, NONE),
        (ONE, '{"verdict": null}', 1, NONE),
        (ONE, '{"verdict": NaN}', 1, NONE),
        (ONE, '{"verdict": Infinity}', 1, NONE),
        (ONE, '{"verdict": 4, "x": NaN}', 1, NONE),
        (ONE, '{"verdict": [4]}', 1, NONE),
        (ONE, '{"verdict": {"value": 4}}', 1, NONE),
        (ONE, '{"grade": 4}', 1, NONE),
        (ONE, '{"verdict": 4, "verdict": 5}', 1, NONE),
        (ONE, '{"verdict": 4, "x": {"a": 1, "a": 2}}', 1, NONE),
        (ONE, '{"verdict": 4, "x": ' + "[" * 50 + "]" * 50 + "}", 1, [4.0]),
        (ONE, '{"verdict": 4, "x": ' + "[" * 100 + "]" * 100 + "}", 1, NONE),
        (ONE, '{"verdict": 4, "x": "' + "[" * 100 + '"}', 1, [4.0]),
        (ONE, '{"verdict": 4, "x": "' + "a" * (1 << 20) + '"}', 1, NONE),
        (ONE, '{"verdict": 4', 1, NONE),
        (ONE, '{"verdict": 4,}', 1, NONE),
        (ONE, "{'verdict': 4}", 1, NONE),
        (ONE, "[4]", 1, NONE),
        (ONE, "4", 1, NONE),
        (ONE, 'So:\n```json\n{"verdict": 4}\n```\nDone.', 1, [4.0]),
        (ONE, '```json\n{"verdict": 2}\n```\n```json\n{"verdict": 4}\n```', 1, [4.0]),
        (ONE, '```json\n{"verdict": 4}', 1, [4.0]),
        (ONE, '```JSON {"verdict": 4}```', 1, [4.0]),
        (ONE, '```json\n{"verdict": 4} {"verdict": 5}\n```', 1, NONE),
        (ONE, '{"verdict": 2}\n```json\n[4]\n```', 1, NONE),
        (ONE, '{"verdict": 2}\n```JSON\n[4]\n```', 1, NONE),
        (ONE, '```json\n{"verdict": 4}\n```\nand not {"verdict": 2}', 1, [4.0]),
        (ONE, '```\n{"verdict": 4}\n```', 1, [4.0]),
        (ONE, 'First {"verdict": 2}, then {"verdict": 4}.', 1, [4.0]),
        (ONE, r'For \frac{1}{2} and {x, y}: {"verdict": 4} \text{ok}', 1, [4.0]),
        (ONE, 'A "}" in {"reasoning": "as } or {", "verdict": 4} is text', 1, [4.0]),
        (ONE, 'First {"verdict": 2}, then {"verdict": 4,}', 1, NONE),
        (ONE, 'First {"verdict": 2}, then {"verdict": 4', 1, NONE),
        (ONE, 'Ends in {"outer": {"verdict": 4}, oops}', 1, NONE),
        (ONE, 'Ends in {outer: {"verdict": 4}}', 1, NONE),
        (ONE, 'Ends in {"outer": {"verdict": 4}', 1, NONE),
        (LETTER, '{"verdict": "A"}', 1, [1.0]),
        (LETTER, '{"verdict": "**B**"}', 1, [0.0]),
        (LETTER, '{"verdict": "C"}', 1, NONE),
        (LETTER, '{"verdict": 1}', 1, NONE),
        (NUMBERED, '{"verdict": 1}', 1, [1.0]),
        (NUMBERED, '{"verdict": "2"}', 1, [0.0]),
        (NUMBERED, '{"verdict": true}', 1, NONE),
        (LIST, '{"verdict": [4, 5]}', 2, [4.0, 5.0]),
        (LIST, '{"verdict": [4]}', 2, NONE),
        (LIST, '{"verdict": [4, 5, 1]}', 2, NONE),
        (LIST, '{"verdict": 4}', 1, NONE),
        (LIST, '{"verdict": [4, false]}', 2, NONE),
        (LIST, '{"verdict": [4, 6]}', 2, RANGE),
        (LIST, '{"verdict": {"1": 4, "2": 5}}', 2, NONE),
        (PLACE_LIST, '{"verdict": [3, 1, 2]}', 3, [0.0, 1.0, 0.5]),
        (PLACE_LIST, '{"verdict": [1, 1, 2]}', 3, NONE),
        (PLACE_LIST, '{"verdict": "3 > 1 > 2"}', 3, NONE),
        (CRITERIA, '{"verdict": {"1": "yes", "2": "no"}}', 2, [1.0, 0.0]),
        (CRITERIA, '{"verdict": {"2": "no", "1": "yes"}}', 2, [1.0, 0.0]),
        (CRITERIA, '{"verdict": {"1": "yes"}}', 2, NONE),
        (CRITERIA, '{"verdict": {"1": "yes", "2": "no", "3": "no"}}', 2, NONE),
        (CRITERIA, '{"verdict": {"1": "yes", "1": "no", "2": "no"}}', 2, NONE),
        (CRITERIA, '{"verdict": {"01": "yes", "2": "no"}}', 2, NONE),
        (CRITERIA, '{"verdict": {"1": true, "2": false}}', 2, NONE),
        (CRITERIA, '{"verdict": ["yes", "no"]}', 2, NONE),
        (
            CRITERIA,
            '{"verdict": [{"criterion": 2, "verdict": "no"},'
            ' {"criterion": "1", "verdict": "yes", "why": "so"}]}',
            2,
            [1.0, 0.0],
        ),
        (
            CRITERIA,
            '{"verdict": [{"criterion": 1, "verdict": "no"}, {"criterion": 1, "verdict": "yes"}]}',
            2,
            NONE,
        ),
        (CRITERIA, '{"verdict": [{"criterion": 1, "verdict": "no"}, {"criterion": 2}]}', 2, NONE),
        (
            CRITERIA,
            '{"verdict": [{"criterion": 1, "verdict": "no"}, {"criterion": 1, "verdict": "yes"},'
            ' {"criterion": 2, "verdict": "no"}]}',
            2,
            NONE,
        ),
    ],
)
def test_verdicts_in_an_object(asked: Page, text: str, count: int, expected: object) -> None:
    assert read(text, asked, count) == expected


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("Grade: 4", "length", generated_tokens=9), RowReason.CUT_OFF),
        (Reply("Grade: 4", "error", detail="503"), RowReason.ENGINE_ERROR),
        (Reply("", "length", reasoning="Grade: 4"), RowReason.CUT_OFF),
        (Reply("", "stop", reasoning="Grade: 4"), NONE),
        (Reply(" \n", "stop"), NONE),
    ],
)
def test_a_verdict_that_was_not_given_in_the_end_does_not_count(
    reply: Reply, reason: RowReason
) -> None:
    found = read_verdicts(reply, GRADE, 1)
    assert isinstance(found, RowError) and found.reason == reason


def test_an_error_of_the_engine_keeps_what_failed() -> None:
    found = read_verdicts(Reply("", "error", detail="HTTP 503"), GRADE, 1)
    assert found == RowError(RowReason.ENGINE_ERROR, "HTTP 503")


@pytest.mark.parametrize(
    "by", [{"pattern": r"(?i)grade:? (\d)"}, {"key": "grade"}], ids=["text", "json"]
)
def test_what_the_page_puts_into_a_reply_and_what_stands_before_is_no_verdict(
    by: dict[str, str],
) -> None:
    closing = "\nGrade 1 to 5 as {grade: …}: "
    asked = page(**by, low=1, high=5).model_copy(
        update={"begins": "Grade 5?", "generation": Generation(closing=closing)}
    )
    critique = 'Grade 5? {"grade": 2}, grade: 2'
    assert read(critique + closing, asked) == NONE
    assert read(f'{critique}{closing}{{"grade": 4}}, grade: 4', asked) == [4.0]
    begun = asked.model_copy(update={"generation": Generation()})
    assert read("Grade 5?", begun) == NONE


def test_a_probability_is_in_no_reply() -> None:
    asked = page(by="probability", choices={"Yes": 1, "No": 0})
    with pytest.raises(ValueError, match="probability"):
        read_verdicts(Reply("Yes", "stop"), asked, 1)


@pytest.mark.parametrize(
    "pattern", ["(a", "grade", r"(?=a)(b)", r"(a)\1", "(a{1000}){1000}", "(\udc80)"]
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str) -> None:
    assert pattern_problem(pattern)
    with pytest.raises(ValueError, match="pattern"):
        page(pattern=pattern, low=1, high=5)


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"(\d)", "145", "145"),
        (r"(\d)", "14 5", "5"),
        (r"(\d)", "0.5", "0.5"),
        (r"(\d)", "-5", "-5"),
        (r"(\d)", "A-5", "A-5"),
        (r"(\d) points", "15 points", "15"),
        (r"(\d)\d", "15", "1"),
        (r"x(y)?", "x", ""),
        (r"(x)|y", "xy", ""),
        (r"(é)", "café", "café"),
        (r"z", "a", None),
        (r"z", "\0a\1b\2", None),
        (r"(A)", "A \0B\1C\2", "A"),
    ],
)
def test_words_and_numbers_are_found_whole(pattern: str, text: str, found: str | None) -> None:
    asked = pattern if "(" in pattern else f"({pattern})"
    assert last_group(asked, text) == found


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000 + "!",
        "[[" * 100_000,
        "{" * 100_000,
        '{"a":' * 50_000,
        '{"}":[' * 50_000,
        '{"a":1} ' * 30_000,
        '{"a":"' * 50_000,
        "```json" * 30_000,
        "```json\n" + "[" * 100_000,
        '{"verdict":' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"x":' * 500 + "1" + "}" * 500,
        " " * 200_000 + "x",
        "," * 100_000,
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.timeout(60)  # of what would take hours
def test_hostile_replies_come_to_an_end(text: str) -> None:
    bad = page(pattern=r"((?:a+)+)$", low=1, high=5)
    for asked in (bad, GRADES, PLACES, TOGETHER, ONE, LIST, CRITERIA):
        assert read(text, asked, 2) == NONE


ASKED = [
    *(GRADE, LOOSE, BRACKETS, BARE, LAST_WORD, RESULT, BOXED, ANSWER, YES),
    *(GRADES, PLACES, TOGETHER, ONE, LETTER, NUMBERED, LIST, PLACE_LIST, CRITERIA),
]
# Texts of the parts that parsers look for, so that many come close to a verdict.
PIECES = st.sampled_from(
    [
        *("Grade: ", "Verdict: ", "Verdicts:", "Ranking:", "**Result:** ", "[RESULT] ", "\\boxed{"),
        *("[[", "]]", "<answer>", "</answer>", "{", "}", "[", "]", '"verdict"', '"1"', '"2"', ": "),
        *(", ", " > ", "\n", "```json", "```", "A", "B", "yes", "no", "1", "2", "10", "4.5", "NaN"),
    ]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, PIECES, st.text(max_size=3))).map("".join))


def may_be_worth(value: float, asked: Page, count: int) -> bool:
    rule = asked.verdict
    if rule.ranks:
        return any(math.isclose(value, place / max(count - 1, 1)) for place in range(count))
    in_range = rule.low is not None and rule.high is not None and rule.low <= value <= rule.high
    return value in rule.choices.values() or in_range


@given(TEXTS, st.sampled_from(ASKED), st.integers(1, 3))
@example("Grade: \ud800", GRADE, 1)
def test_any_text_has_verdicts_that_may_be_or_a_reason(text: str, asked: Page, count: int) -> None:
    if not asked.asks_for_several:
        count = 1
    found = read_verdicts(Reply(text, "stop"), asked, count)
    if isinstance(found, RowError):
        assert found.reason in (NONE, RANGE) and found.detail
        return
    assert len(found) == count
    assert all(math.isfinite(value) and may_be_worth(value, asked, count) for value in found)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.text())
def test_a_well_formed_object_reads_as_it_was_written(grades: list[int], reasoning: str) -> None:
    text = json.dumps({"reasoning": reasoning, "verdict": grades})
    assert read(text, LIST, len(grades)) == grades
    assert read(f"I think:\n```json\n{text}\n```", LIST, len(grades)) == grades
    assert read(f"I think: {text} That is all.", LIST, len(grades)) == grades
    together = page("rubric", "together", low=1, high=5)
    named = {str(number): grade for number, grade in enumerate(grades, 1)}
    text = json.dumps({"reasoning": reasoning, "verdict": named})
    assert read(text, together, len(grades)) == grades


@given(st.integers(1, 12).flatmap(lambda count: st.permutations(range(1, count + 1))))
def test_places_and_an_order_say_the_same(places: list[int]) -> None:
    order = sorted(range(1, len(places) + 1), key=lambda answer: places[answer - 1])
    by_place = read(f"Ranking: {', '.join(map(str, places))}", PLACES, len(places))
    assert not isinstance(by_place, RowReason)
    worth = [1 - (place - 1) / max(len(places) - 1, 1) for place in places]
    assert by_place == pytest.approx(worth)
    if len(places) > 1:
        assert read(f"Ranking: {' > '.join(map(str, order))}", PLACES, len(places)) == by_place
    assert read(json.dumps({"verdict": places}), PLACE_LIST, len(places)) == by_place
