"""Conversations: roles, contents, structures, and what stands beside them."""

from typing import Any

from tests.corpus.case import Case, Row, file_case, lines

KEY = "m.jsonl"


def said(role: Any, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


USER, ANSWER = said("user", "What is it?"), said("assistant", "It is that.")
SYSTEM = said("system", "Be brief.")


def talk(*messages: Any) -> Row:
    return {"messages": list(messages)}


SOUND = talk(USER, ANSWER)


def beside_sound(*rows: Any) -> bytes:
    """These rows behind two that show what the file is."""
    return lines([SOUND, SOUND, *rows])


def pair(chosen: Any, rejected: Any, **more: Any) -> Row:
    return {"chosen": chosen, "rejected": rejected, **more}


SCORED: dict[str, Row] = {
    "a system message": talk(SYSTEM, USER, ANSWER),
    "many turns": talk(*[USER, ANSWER] * 30),
    "two questions": talk(USER, USER, ANSWER),
    "two answers": talk(USER, ANSWER, ANSWER),
    "role human": talk(said("human", "a"), said("gpt", "b")),
    "a role in capitals": talk(said("User", "a"), said("ASSISTANT", "b")),
    "blanks around a role": talk(said(" user ", "a"), said("assistant\n", "b")),
    "an emoji": talk(USER, said("assistant", "\U0001f600")),
    "a zero": talk(USER, said("assistant", "a\0b")),
    "a special token": talk(USER, said("assistant", "<|im_end|>")),
    "a template's mark": talk(USER, said("assistant", "{{ 7 * 7 }}{% if %}")),
    "a key of no meaning": talk(USER, {**ANSWER, "weight": 1, "id": "x"}),
    "parts of text": talk(USER, said("assistant", [{"type": "text", "text": "a"}])),
    "two parts of text": talk(
        USER, said("assistant", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    ),
    "an empty system message": talk(said("system", ""), USER, ANSWER),
    "a name": talk({**USER, "name": "Ann"}, ANSWER),
    "a key that is null": talk(USER, {**ANSWER, "tool_calls": None, "images": None}),
}

MARKED: dict[str, tuple[Row, str]] = {
    "no messages": (talk(), "empty"),
    "an answer alone": (talk(ANSWER), "bad_structure"),
    "messages that are null": ({"messages": None}, "null_value"),
    "no such key": ({"other": 1}, "null_value"),
    "a message that is null": (talk(USER, None), "null_value"),
    "a message that is a text": (talk(USER, "b"), "bad_structure"),
    "a message that is a list": (talk(USER, ["b"]), "bad_structure"),
    "a message without a role": (talk(USER, {"content": "b"}), "null_value"),
    "a message without content": (talk(USER, {"role": "assistant"}), "null_value"),
    "a role that is null": (talk(USER, said(None, "b")), "null_value"),
    "a role that is a number": (talk(USER, said(7, "b")), "unknown_role"),
    "a blank role": (talk(USER, said(" ", "b"), ANSWER), "unknown_role"),
    "a role of no kind": (talk(USER, said("wizard", "b"), ANSWER), "template_error"),
    "the user last": (talk(USER, ANSWER, USER), "bad_structure"),
    "the system last": (talk(USER, SYSTEM), "bad_structure"),
    "a user alone": (talk(USER), "bad_structure"),
    "content that is null": (talk(USER, said("assistant", None)), "null_value"),
    "an empty answer": (talk(USER, said("assistant", "")), "empty"),
    "a blank answer": (talk(USER, said("assistant", " \n\t")), "empty"),
    "content that is a number": (talk(USER, said("assistant", 7)), "bad_structure"),
    "content that is an object": (talk(USER, said("assistant", {"a": 1})), "bad_structure"),
    "content that is true": (talk(USER, said("assistant", True)), "bad_structure"),
    "an empty list of parts": (talk(USER, said("assistant", [])), "empty"),
    "parts that are texts": (talk(USER, said("assistant", ["a"])), "bad_structure"),
    "a part without text": (talk(USER, said("assistant", [{"type": "text"}])), "bad_structure"),
    "an image": (
        talk(said("user", [{"type": "image", "image": "x"}]), ANSWER), "unsupported_media",
    ),
    "a part of no kind": (
        talk(said("user", [{"type": "smell", "smell": "x"}]), ANSWER), "unsupported_media",
    ),
    "images beside a message": (talk({**USER, "images": ["x"]}, ANSWER), "unsupported_media"),
    "messages that are a text": ({"messages": "hello"}, "bad_structure"),
    "messages that are a number": ({"messages": 7}, "bad_structure"),
    "messages that are an object": ({"messages": {"a": 1}}, "null_value"),
    "messages in a list more": ({"messages": [[USER, ANSWER]]}, "bad_structure"),
    "a text longer than the model": (talk(USER, said("assistant", "tea " * 20_000)), "too_long"),
}  # fmt: skip

SOUND_PAIR = pair([USER, ANSWER], [USER, ANSWER])
PAIRS: dict[str, tuple[list[Row], int, dict[str, int]]] = {
    "one side is null": ([SOUND_PAIR, pair([USER, ANSWER], None)], 1, {"null_value": 1}),
    "both sides are empty": ([SOUND_PAIR, pair([], [])], 1, {"empty": 1}),
    "one side ends with the user": (
        [SOUND_PAIR, pair([USER, ANSWER], [USER])], 1, {"bad_structure": 1},
    ),
    "one side is a text": ([SOUND_PAIR, pair("a", [USER, ANSWER])], 1, {"bad_structure": 1}),
    "other prompts": ([SOUND_PAIR, pair([USER, ANSWER], [said("user", "b"), ANSWER])], 2, {}),
    "equal sides": ([SOUND_PAIR, SOUND_PAIR], 2, {}),
    "a prompt apart": (
        [{"prompt": "a", "chosen": "b", "rejected": "c"}], 1, {},
    ),
    "a prompt apart that is null": (
        [{"prompt": "a", "chosen": "b", "rejected": "c"},
         {"prompt": None, "chosen": "b", "rejected": "c"}], 1, {"null_value": 1},
    ),
    "groups": ([{"prompt": "a", "responses": ["b", "c", "d"]}], 1, {}),
    "an empty group": (
        [{"prompt": "a", "responses": ["b"]}, {"prompt": "a", "responses": []}], 1, {"empty": 1},
    ),
    "a null in a group": (
        [{"prompt": "a", "responses": ["b"]}, {"prompt": "a", "responses": ["c", None]}],
        1, {"null_value": 1},
    ),
    "token ids": ([{"input_ids": [1, 2, 3]}, {"input_ids": [4]}], 2, {}),
    "token ids out of the vocabulary": (
        [{"input_ids": [1, 2]}, {"input_ids": [99999]}, {"input_ids": [-1]}], 1,
        {"bad_token_id": 2},
    ),
    "token ids that are null": (
        [{"input_ids": [1, 2]}, {"input_ids": [1, None]}, {"input_ids": []}], 1,
        {"bad_token_id": 1, "empty": 1},
    ),
    "token ids beyond 64 bits": (
        [{"input_ids": [1, 2]}, {"input_ids": [2**70]}], 1, {"bad_token_id": 1},
    ),
    "empty lists of token ids": (
        [{"input_ids": [1, 2]}, {"input_ids": []}, {"input_ids": []}], 1, {"empty": 2},
    ),
    "a system prompt beside": ([{"prompt": "a", "response": "b", "system_prompt": "c"}], 1, {}),
    "a system beside, which is not read": (
        [{"prompt": "a", "response": "b", "system": None},
         {"prompt": "a", "response": "b", "system": None}], 2, {},
    ),
    "messages in writing": (
        [{"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}],
        1, {},
    ),
}  # fmt: skip

CASES: list[Case] = [
    *(file_case(name, KEY, beside_sound(row), 3) for name, row in SCORED.items()),
    *(
        file_case(f"marked: {name}", KEY, beside_sound(row), 2, marked={reason: 1})
        for name, (row, reason) in MARKED.items()
    ),
    *(
        file_case(f"rows: {name}", KEY, lines(rows), scored, marked=marked)
        for name, (rows, scored, marked) in PAIRS.items()
    ),
    file_case("two formats in one file", KEY, lines([{**SOUND, **SOUND_PAIR}]), 1),
    file_case("text of no style", KEY, lines([{"chosen": "a", "rejected": "b"}]),
              failed="wrong_schema"),
    file_case("a system beside that is read by no setting", KEY,
              lines([{"prompt": "a", "response": "b", "system": "c"}]), failed="wrong_schema"),
    file_case("an over-long row that must not be", KEY,
              beside_sound(talk(USER, said("assistant", "tea " * 20_000))),
              failed="over_length_row", flags=("--over-length", "error")),
    file_case("special text that is marked", KEY,
              beside_sound(talk(USER, said("assistant", "<|im_end|>"))), 2,
              marked={"special_text": 1}, flags=("--special-text", "mark")),
]  # fmt: skip
