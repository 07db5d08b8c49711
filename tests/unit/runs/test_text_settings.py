"""The settings of the text, from the job to what the output remembers."""

import json
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batch_scorer.config import Config, load_config
from batch_scorer.errors import ConfigError, ModelError, OutputError
from batch_scorer.nightly.foresee import foresee_night
from batch_scorer.nightly.night import Night, run_night
from batch_scorer.runs import derive
from batch_scorer.runs.run import score
from tests.helpers.tiny import TEMPLATE

DATED = "Now: {{ strftime_now('%d %b %Y %H:%M') }}\n" + TEMPLATE
ROWS = [{"prompt": "What is 2+2?", "response": "It is 4."}] * 3


class Clock(datetime):
    """A clock that stands where a test puts it."""

    day = 1

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return datetime(2026, 11, cls.day, 23, 59, tzinfo=tz)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> type[Clock]:
    monkeypatch.setattr(derive, "datetime", Clock)
    monkeypatch.setattr(Clock, "day", 1)
    return Clock


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path) -> Config:
    add(tmp_path / "in" / "a.parquet")
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    return load_config(
        model=str(tiny_model), inputs=(str(tmp_path / "in"),), output=str(tmp_path / "out"),
        chat_template=str(template), backend="fake", use_ray=False,
    )  # fmt: skip


def add(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(ROWS), file)


def scores(folder: Path) -> set[float]:
    """The fake engine's scores are a hash of the token ids: equal scores, equal ids."""
    found: set[float] = set()
    for file in folder.rglob("*.parquet"):
        if not any(part.startswith("_") for part in file.relative_to(folder).parts):
            found.update(pq.read_table(file)["score"].to_pylist())
    return found


def claimed_text(folder: Path) -> dict[str, Any]:
    (claim,) = folder.rglob("run.json")
    text: dict[str, Any] = json.loads(claim.read_text())["fingerprint"]["text"]
    return text


def test_a_resumed_output_keeps_the_date_of_its_first_day(
    config: Config, clock: type[Clock], tmp_path: Path
) -> None:
    score(config)
    assert claimed_text(tmp_path / "out")["date"] == "2026-11-01T00:00:00"
    clock.day = 2
    add(tmp_path / "in" / "b.parquet")
    summary = score(config)
    assert summary.totals["rows_scored"] == 6
    assert len(scores(tmp_path / "out")) == 1
    other = score(config.model_copy(update={"output": str(tmp_path / "new")}))
    assert other.is_complete and claimed_text(tmp_path / "new")["date"] == "2026-11-02T00:00:00"
    assert scores(tmp_path / "new") != scores(tmp_path / "out")


def test_the_date_can_be_set_and_another_one_is_refused(
    config: Config, clock: type[Clock], tmp_path: Path
) -> None:
    dated = config.model_copy(update={"template_date": datetime(2024, 7, 26)})
    score(dated)
    clock.day = 2
    score(config)  # leaves the date open: as it was begun
    other = dated.model_copy(update={"template_date": datetime(2024, 7, 27)})
    with pytest.raises(OutputError, match=r"text\.date: 2024-07-26T0"):
        score(other)


def test_a_template_without_a_date_does_not_remember_one(
    config: Config, clock: type[Clock], tmp_path: Path
) -> None:
    score(config.model_copy(update={"chat_template": None}))
    assert claimed_text(tmp_path / "out")["date"] is None


def test_later_nights_keep_the_date(config: Config, clock: type[Clock], tmp_path: Path) -> None:
    first = run_night(config, Night())
    clock.day = 2
    add(tmp_path / "in" / "b.parquet")
    prospect = foresee_night(config, Night())
    second = run_night(config, Night())
    assert first.record and second.record
    assert second.record.latest == first.record.latest == {"main": prospect.path}
    assert second.summary is not None and second.summary.totals["rows"] == 6
    assert len(scores(tmp_path / "out" / "generations")) == 1


def test_a_new_generation_has_the_date_of_the_one_before(
    config: Config, clock: type[Clock], tmp_path: Path
) -> None:
    run_night(config, Night())
    clock.day = 2
    changed = run_night(config.model_copy(update={"max_tokens": 500}), Night())
    assert changed.summary is not None and changed.summary.totals["rows_scored"] == 3
    assert len(scores(tmp_path / "out" / "generations")) == 1
    folders = list((tmp_path / "out" / "generations" / "main").iterdir())
    assert len(folders) == 2
    assert {claimed_text(folder)["date"] for folder in folders} == {"2026-11-01T00:00:00"}


def test_a_templates_file_is_known_by_what_it_holds(config: Config, tmp_path: Path) -> None:
    score(config)
    copy = tmp_path / "copy.jinja"
    copy.write_text(DATED)
    score(config.model_copy(update={"chat_template": str(copy)}))
    copy.write_text("X" + DATED)
    with pytest.raises(OutputError, match=r"text\.template: "):
        score(config.model_copy(update={"chat_template": str(copy)}))


def test_a_template_that_is_not_there_is_refused(config: Config) -> None:
    with pytest.raises(ModelError, match=r"'gone\.jinja' is neither a file nor a template"):
        score(config.model_copy(update={"chat_template": "gone.jinja"}))


def test_a_template_that_cannot_be_read_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"chat_template: .*bad.jinja: not readable"):
        score(config.model_copy(update={"chat_template": str(tmp_path / "bad.jinja")}))


def test_the_settings_reach_the_text(config: Config) -> None:
    model = derive.look_at_model(
        config.model_copy(
            update={
                "template_arguments": {"b": 1, "a": True},
                "system_prompt": "Be kind.",
                "step_separator": "|",
                "eos": "append",
                "reasoning": "drop",
            }
        )
    )
    prompt = model.prompt
    assert prompt.template == DATED and prompt.arguments == '{"a": true, "b": 1}'
    assert (prompt.system, prompt.step_separator) == ("Be kind.", "|")
    assert (prompt.bos, prompt.eos, prompt.reasoning) == ("auto", "append", "drop")


def test_another_model_in_the_same_folder_has_its_own_template(
    tiny_model: Path, tmp_path: Path
) -> None:
    """One program scores a training's checkpoints, each saved over the one before."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = load_config(model=str(folder), inputs=("in",), output="out", device="cpu")
    before = derive.derive(config, derive.look_at_model(config))
    template = folder / "chat_template.jinja"
    template.write_text(
        template.read_text().replace("message['content']", "'new' + message['content']")
    )
    after = derive.derive(config, derive.look_at_model(config))
    assert before.probe and after.probe
    assert "new" in after.probe.texts[0] and "new" not in before.probe.texts[0]
