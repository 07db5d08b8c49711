"""Parsed rows → token ids: of the rows' own sequences, or of a judge's questions about them."""

from dataclasses import replace

from batch_scorer.config import Config
from batch_scorer.models.directory import ModelFacts
from batch_scorer.records import ParsedRows, TokenizedRows
from batch_scorer.render.questions import ask, seeds_of
from batch_scorer.render.renderer import renderer_of


def tokenized(parsed: ParsedRows, config: Config, model: ModelFacts) -> TokenizedRows:
    """Rows as token ids; of a judge, the questions about them. Raises ShardError for an over-long
    row under the `error` policy."""
    renderer = renderer_of(config, model)
    if model.judge is None:
        return renderer.tokenize(parsed)
    asked, questions = ask(parsed, model.judge, config.reasoning)
    rows = renderer.tokenize(asked)
    seeds = seeds_of(rows, questions.votes, model.judge.generation.seed)
    return replace(rows, questions=questions, seeds=seeds, verdicts=questions.verdicts)
