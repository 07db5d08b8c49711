"""Models that read more than prompt and answer, from rows to columns: the scores are those of the
code that their authors publish, written out here. Bodies and heads are held in `test_matrix.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
)

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, InputError, ParityError, RowReason
from batch_scorer.formats import context
from batch_scorer.models.adapter import Prompt
from batch_scorer.runs.derive import derive, look_at_model, look_at_models
from batch_scorer.runs.preview import check
from batch_scorer.runs.run import score
from tests.helpers.tiny import tiny_reward_model, tiny_tokenizer
from tests.parity.families import Checkpoint, internlm2, matrix, new_body, pairrm, save

pytestmark = pytest.mark.usefixtures("one_thread")

Row = dict[str, Any]

TOLERANCE = 1e-4
LLAMA_3 = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
ASKS_FOR_THE_HEADER = (
    "{{ bos_token }}" + LLAMA_3 + "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
)
ALWAYS_WITH_HEADER = "{{ bos_token }}" + LLAMA_3 + HEADER
REWARD = "[UNUSED_TOKEN_130]"
SPECIAL = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

QUESTIONS = ["What is 1+1?", "Name  a colour.\n", "Who wrote “Faust”?", "Is water wet?"]
GOOD = ["1+1=2", "Green, or\n\nred.", "Goethe did.", "Yes, it is."]
BAD = ["It is 3.", "A dog", "Schiller  did, in 1808.", "No"]
PAIRS: list[Row] = [
    {"prompt": question, "chosen": good, "rejected": bad}
    for question, good, bad in zip(QUESTIONS, GOOD, BAD, strict=True)
]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def talk(*texts: str) -> list[Row]:
    """Turns of user and assistant, the user first."""
    return [(user, assistant)[place % 2](text) for place, text in enumerate(texts)]


# Models


def llama_3_tokenizer(directory: Path, template: str) -> None:
    """Bytes at the ids that they have in Llama-3, and its Yes and No."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in shown] + [chr(256 + n) for n in range(256 - len(shown))]
    words = {"Ye": 300, "No": 2822, "Yes": 9642}
    vocabulary = {letter: place for place, letter in enumerate(letters)} | words
    core = Tokenizer(models.BPE(vocabulary, [("Y", "e"), ("Ye", "s"), ("N", "o")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        additional_special_tokens=[AddedToken(text, special=True) for text in SPECIAL[1:3]],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)


def language_model(directory: Path, template: str) -> Path:
    body = new_body("llama", 9700, max_position_embeddings=2048)
    save(directory, body, "LlamaForCausalLM", {"lm_head.weight": matrix(9700, 64, 10)})
    llama_3_tokenizer(directory, template)
    return directory


@pytest.fixture(scope="module")
def principle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "Llama-3.3-Nemotron-70B-Reward-Principle"
    return language_model(tmp_path_factory.mktemp("principle") / name, ASKS_FOR_THE_HEADER)


@pytest.fixture(scope="module")
def preference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "pair-preference-model-LLaMA3-8B"
    return language_model(tmp_path_factory.mktemp("preference") / name, ALWAYS_WITH_HEADER)


@pytest.fixture(scope="module")
def polar(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    directory = tmp_path_factory.mktemp("polar") / "POLAR-7B"
    made = internlm2(directory, 600, reward_id=385)
    tiny_tokenizer(directory, bos=True)  # of 384 ids
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reward|>", REWARD]})
    assert tokenizer.convert_tokens_to_ids(REWARD) == 385
    tokenizer.save_pretrained(directory)
    return made


@pytest.fixture(scope="module")
def comparer(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    letters = {*"abcdefghijklmnopqrstuvwxyz", *"".join([*QUESTIONS, *GOOD, *BAD, "USERA<>:?"])}
    pieces = ["▁", "▁What", "▁is", "▁the", "water", *sorted(x for x in letters if x.strip())]
    special = [(f"[{name}]", 0.0) for name in ("PAD", "CLS", "SEP", "UNK", "MASK")]
    tokenizer = DebertaV2Tokenizer(
        vocab=special + [(piece, -1.0 - place / 99) for place, piece in enumerate(pieces)]
    )
    marks = ["<|source|>", "<|candidate1|>", "<|candidate2|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    directory = tmp_path_factory.mktemp("pairrm") / "PairRM-hf"
    made = pairrm(directory, *tokenizer.convert_tokens_to_ids(marks))
    tokenizer.save_pretrained(directory)
    return made


# What their authors publish


def polar_score(model: Checkpoint, prompt: list[Row], reference: str, answer: str) -> float:
    """xtuner's RewardModelClient, and the model's own forward pass."""
    tokenizer = AutoTokenizer.from_pretrained(model.model_dir)
    asked = "\n".join(message["content"] for message in prompt)
    text = f"{asked}\n{reference}<|reward|>{asked}\n{answer}{REWARD}"
    return formula_of(model, tokenizer(text)["input_ids"])


def principle_score(model: Path, prompt: list[Row], wanted: str, answer: str) -> float:
    """The card of Llama-3.3-Nemotron-70B-Reward-Principle."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = (
        "Evaluate the response to the previous prompt in terms of whether it satisfies this "
        f"principle: {wanted}. Only answer Yes or No."
    )
    ids = tokenizer.apply_chat_template(
        [*prompt, assistant(answer), user(asked)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )["input_ids"]
    logits = next_logits(model, ids)
    return float(logits[9642] - logits[2822])


PLAIN = (
    "\n{% for message in messages %}{% if loop.index0 % 2 == 0 %}\n\n<turn> user\n"
    " {{ message['content'] }}{% else %}\n\n<turn> assistant\n"
    " {{ message['content'] }}{% endif %}{% endfor %}\n\n\n"
)


def preference_score(model: Path, prompt: list[Row], other: str, answer: str) -> float:
    """The card of pair-preference-model-LLaMA3-8B, in the order in which `answer` is A."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    context = tokenizer.apply_chat_template(prompt, chat_template=PLAIN, tokenize=False)
    asked = f"[CONTEXT] {context} [RESPONSE A] {answer} [RESPONSE B] {other} \n"
    text = tokenizer.apply_chat_template([user(asked)], tokenize=False)
    ids = tokenizer.encode(text.replace(tokenizer.bos_token, ""), add_special_tokens=False)
    logits = next_logits(model, ids)
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "AB")
    return float(logits[a] - logits[b])


def pairrm_score(model: Checkpoint, prompt: list[Row], other: str, answer: str) -> float:
    """PairRM-hf's card: `tokenize_pair` for one question, `tokenize_conv_pair` for several, and
    DebertaV2PairRM's forward pass, in the order in which `answer` stands first."""
    tokenizer = AutoTokenizer.from_pretrained(model.model_dir)
    source, first, second = prompt[0]["content"], answer, other
    if len(prompt) > 1:
        source = (
            "Finish the following coversation in each i-th turn by filling in <Response i> with "
            "your response."
        ) + "\n".join(
            f"USER: {turn['content']}\nAssistant: <Response {n}>"
            for n, turn in enumerate(prompt[0::2], start=1)
        )
        said = [turn["content"] for turn in prompt[1::2]]
        first, second = (
            "\n".join(f"<Response {n}>: {text}" for n, text in enumerate([*said, last], start=1))
            for last in (answer, other)
        )
    ids = tokenizer.encode("<|source|>" + source)
    ids += tokenizer.encode("<|candidate1|>" + first)
    ids += tokenizer.encode("<|candidate2|>" + second)
    return formula_of(model, ids)


@torch.inference_mode()
def formula_of(model: Checkpoint, ids: list[int]) -> float:
    hidden = model.body(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return float(model.formula(hidden, ids))


@torch.inference_mode()
def next_logits(model: Path, ids: list[int]) -> Tensor:
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    logits: Tensor = plain(input_ids=torch.tensor([ids])).logits[0, -1]
    return logits


# From rows to columns


def config_of(model: Path | Checkpoint, folder: Path, rows: list[Row], **settings: Any) -> Config:
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    directory = model if isinstance(model, Path) else model.model_dir
    return load_config(
        model=str(directory),
        inputs=(str(folder / "rows.parquet"),),
        output=str(folder / "out"),
        **({"dtype": "float32", "use_ray": False} | settings),
    )


def scored(model: Path | Checkpoint, folder: Path, rows: list[Row], **settings: Any) -> list[Row]:
    """The rows with their scores; the gate has compared them on its own road."""
    config = config_of(model, folder, rows, **settings)
    score(config)
    found: list[Row] = pq.read_table(folder / "out" / "rows.parquet").to_pylist()
    return found


def assert_close(rows: list[Row], expected: list[tuple[float, float]]) -> None:
    found = np.array([[row["score_chosen"], row["score_rejected"]] for row in rows], np.float32)
    wanted = np.array(expected)
    assert wanted.std() > 0.1, "nothing to tell apart"
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


REFERENCES = ["2", "Green.", "Johann Wolfgang\nGoethe", "It makes wet."]
PRINCIPLES = ["correctness", "brevity", "clear answer", "no repetition"]
SEVERAL = talk("Hello!", "Hi.", "What is water?")


def test_polar_reads_the_reference_and_then_the_answer(polar: Checkpoint, tmp_path: Path) -> None:
    rows = [row | {"reference": text} for row, text in zip(PAIRS, REFERENCES, strict=True)]
    expected = [
        tuple(
            polar_score(polar, [user(row["prompt"])], row["reference"], row[side])
            for side in ("chosen", "rejected")
        )
        for row in rows
    ]
    assert_close(scored(polar, tmp_path, rows), expected)  # type: ignore[arg-type]


def test_a_reference_may_be_turns_like_the_prompt(polar: Checkpoint, tmp_path: Path) -> None:
    """As POLAR's README writes its data."""
    rows = [
        {
            "prompt": prompt,
            "reference": talk("Water", "it is.")[1:] if len(prompt) == 1 else SEVERAL[1:],
            "chosen": [assistant("Wet.")],
            "rejected": [assistant("Dry, mostly.")],
        }
        for prompt in (talk("What is water?"), SEVERAL)
    ]
    expected = [
        (
            polar_score(polar, row["prompt"], reference, "Wet."),
            polar_score(polar, row["prompt"], reference, "Dry, mostly."),
        )
        for row, reference in zip(rows, ("it is.", "Hi.\nWhat is water?"), strict=True)
    ]
    assert_close(scored(polar, tmp_path, rows), expected)


def test_the_principle_is_asked_for_after_the_answer(principle: Path, tmp_path: Path) -> None:
    rows = [row | {"principle": text} for row, text in zip(PAIRS, PRINCIPLES, strict=True)]
    expected = [
        tuple(
            principle_score(principle, [user(row["prompt"])], row["principle"], row[side])
            for side in ("chosen", "rejected")
        )
        for row in rows
    ]
    assert_close(scored(principle, tmp_path, rows), expected)  # type: ignore[arg-type]


def test_one_principle_for_all_rows_is_an_argument(principle: Path, tmp_path: Path) -> None:
    settings = {"template_arguments": {"principle": "correctness"}}
    rows = scored(principle, tmp_path, PAIRS, **settings)
    expected = [
        tuple(
            principle_score(principle, [user(row["prompt"])], "correctness", row[side])
            for side in ("chosen", "rejected")
        )
        for row in PAIRS
    ]
    assert_close(rows, expected)  # type: ignore[arg-type]
    other = {"template_arguments": {"principle": "brevity"}}
    one, two = (config_of(principle, tmp_path, PAIRS, **each) for each in (settings, other))
    digests = {derive(c, look_at_model(c)).fingerprint.digest for c in (one, two)}
    assert len(digests) == 2


TURNS = [
    {"prompt": SEVERAL, "chosen": [assistant("Wet.")], "rejected": [assistant("A dog")]},
    {"prompt": talk("Hello"), "chosen": [assistant("Hi!")], "rejected": [assistant("No")]},
]


@pytest.mark.parametrize("kind", ["text", "turns"])
@pytest.mark.parametrize("family", ["comparer", "preference"])
def test_each_answer_is_compared_with_the_other(
    family: str, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Each in the order in which it stands first, so that the margin is the comparison in both
    orders, as the authors take it."""
    model = request.getfixturevalue(family)
    published: Any = {"comparer": pairrm_score, "preference": preference_score}[family]
    expected = []
    for row in TURNS if kind == "turns" else PAIRS:
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if kind == "turns":
            chosen, rejected = chosen[0]["content"], rejected[0]["content"]
        else:
            prompt = [user(prompt)]
        own = published(model, prompt, rejected, chosen)
        expected.append((own, published(model, prompt, chosen, rejected)))
    rows = scored(model, tmp_path, TURNS if kind == "turns" else PAIRS)
    assert_close(rows, expected)
    for row, (chosen, rejected) in zip(rows, expected, strict=True):
        assert row["margin"] == pytest.approx(chosen - rejected, abs=1e-2)


# Rows and files that lack it


def test_a_row_without_a_reference_is_marked(polar: Checkpoint, tmp_path: Path) -> None:
    rows = [row | {"reference": text} for row, text in zip(PAIRS, REFERENCES, strict=True)]
    rows[1]["reference"], rows[2]["reference"] = None, " "
    found = scored(polar, tmp_path, rows)
    assert [row["score_error"] for row in found] == [None, "null_value", "empty", None]
    assert [row["score_chosen"] is None for row in found] == [False, True, True, False]


def test_the_column_is_found_named_or_missed(polar: Checkpoint, tmp_path: Path) -> None:
    rows = [row | {"gold": text} for row, text in zip(PAIRS, REFERENCES, strict=True)]
    with pytest.raises(InputError, match="by a reference, and no column holds one; pass --column"):
        score(config_of(polar, tmp_path, rows))
    named = scored(polar, tmp_path, rows, columns={"reference": "gold"})
    (tmp_path / "usual").mkdir()
    usual = [{**row, "ground_truth": row["gold"]} for row in rows]
    found = scored(polar, tmp_path / "usual", usual)
    assert [row["score_chosen"] for row in found] == [row["score_chosen"] for row in named]
    (tmp_path / "two").mkdir()
    both = [{**row, "reference": row["gold"]} for row in usual]
    with pytest.raises(InputError, match="reference and ground_truth could both be the reference"):
        score(config_of(polar, tmp_path / "two", both))


def test_other_models_leave_the_column_alone(tmp_path: Path) -> None:
    model = tiny_reward_model(tmp_path / "model")
    rows = [row | {"reference": text} for row, text in zip(PAIRS, REFERENCES, strict=True)]
    assert {row["score_error"] for row in scored(model, tmp_path, rows)} == {None}
    with pytest.raises(ConfigError, match="sequence_classifier models read no reference of a row"):
        look_at_model(config_of(model, tmp_path, rows, columns={"reference": "reference"}))
    assert "beside" not in Prompt().to_json()  # outputs that were begun before it can go on


@pytest.mark.parametrize("family", ["comparer", "preference"])
def test_what_is_no_pair_is_marked(
    family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    answers = [["yes"], ["yes", "no"], ["yes", "no", "well"], ["yes", ""]]
    rows = [{"prompt": "Is it?", "responses": each} for each in answers]
    found = scored(request.getfixturevalue(family), tmp_path, rows)
    reason = RowReason.NOT_A_PAIR.value
    assert [row["score_error"] for row in found] == [reason, None, reason, reason]
    assert [s is None for s in found[1]["scores"]] == [False, False]
    assert found[3]["scores"] == [None, None]


def test_answers_to_different_turns_are_no_pair(preference: Path, tmp_path: Path) -> None:
    rows = [
        {"chosen": talk("Is it?", "yes"), "rejected": talk("Is it so?", "no")},
        {"chosen": talk("Is it?", "yes"), "rejected": talk("Is it?", "no")},
        {"chosen": [{"role": "system", "content": "Be good."}, *talk("Is it?", "yes")],
         "rejected": [{"role": "system", "content": "Be good."}, *talk("Is it?", "no")]},
    ]  # fmt: skip
    found = scored(preference, tmp_path, rows)
    assert [row["score_error"] for row in found] == ["not_a_pair", None, "template_error"]


def test_an_answer_that_spells_a_mark_is_marked(comparer: Checkpoint, tmp_path: Path) -> None:
    rows = [*PAIRS, {"prompt": "Say it", "chosen": "the <|source|> mark", "rejected": "no"}]
    found = scored(comparer, tmp_path, rows)
    assert [row["score_error"] for row in found] == [None] * 4 + ["no_mark"]


# The gate


THOUGHTS = {
    "prompt": talk("Why?"),
    "chosen": [assistant("<think>\nhm\n</think>\n\nBecause.")],
    "rejected": [assistant("No") | {"reasoning_content": "Let me see"}],
}
SPELT = {
    "prompt": talk("Spell"),
    "chosen": [assistant("a <|eot_id|> b")],
    "rejected": [assistant("<|end_header_id|>")],
}


@pytest.mark.parametrize(
    ("settings", "row", "shown"),
    [
        ({}, THOUGHTS, ["hm"]),
        ({"reasoning": "keep"}, THOUGHTS, ["hm", "Let me see"]),
        ({"reasoning": "drop"}, THOUGHTS, []),
        ({"special_text": "literal"}, SPELT, []),
    ],
    ids=["template", "keep", "drop", "literal"],
)
def test_settings_apply_to_the_other_answer_too(
    settings: dict[str, str], row: Row, shown: list[str], preference: Path, tmp_path: Path
) -> None:
    """The gate has each of them in code of its own, so that only both together can be wrong."""
    done = check(config_of(preference, tmp_path, [row], **settings))
    assert done.report.agrees and done.sample.compared == 1
    assert [each for each in ("hm", "Let me see") if each in done.seen.text] == shown
    ids = done.sample.rows.token_ids
    end = AutoTokenizer.from_pretrained(preference).eos_token_id
    assert (ids == end).sum() == 2  # the template's own, of both orders


def test_the_gate_reads_the_reference_itself(
    polar: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row | {"reference": text} for row, text in zip(PAIRS, REFERENCES, strict=True)]
    monkeypatch.setattr(context, "read_beside", lambda value, *_: value.upper())
    with pytest.raises(ParityError, match="token ids are not those of the tokenizer's own call"):
        check(config_of(polar, tmp_path, rows))


def test_models_beside_it_are_not_asked_for_its_reference(
    polar: Checkpoint, tiny_model: Path
) -> None:
    both = {"a": str(polar.model_dir), "b": str(tiny_model)}
    config = load_config(model=both, inputs=("in",), output="out", columns={"reference": "gold"})
    members = look_at_models(config)
    columns = {name: member.config.columns for name, member in members.items()}
    assert columns == {"a": {"reference": "gold"}, "b": {}}
    alone = config.model_copy(update={"model": {"b": {"model": str(tiny_model)}}})
    with pytest.raises(ConfigError, match="none of the models reads a reference"):
        look_at_models(alone)
