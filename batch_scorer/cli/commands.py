"""The command line. Every setting of `Config` is a flag of the same name; nothing else is.

Heavy imports (torch, ray, transformers) happen inside the commands, so that `--help` answers at
once.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from batch_scorer import logs
from batch_scorer.backends.device import CPU_ENVIRONMENT
from batch_scorer.cli.flags import (
    AsJson,
    ConfigFile,
    Output,
    StoreOptions,
    mapping,
    with_settings,
)
from batch_scorer.config import Config, load_config
from batch_scorer.errors import (
    BatchScorerError,
    ConfigError,
    ExitCode,
    IncompleteError,
    OutputError,
)
from batch_scorer.evaluation import Benchmark
from batch_scorer.version import __version__

if TYPE_CHECKING:
    from batch_scorer.nightly.night import Night
    from batch_scorer.reports.views import Result

app = typer.Typer(
    name="batch-scorer",
    help="Score preference pairs and rollouts with a reward model: shards in, scored shards out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 130
"""What Typer makes of a KeyboardInterrupt, which SIGTERM raises here too."""

_out = Console()
_err = Console(stderr=True)


def main() -> NoReturn:
    """Entry point: errors of ours become one clear message and an exit code."""
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logs.set_up()
    signal.signal(signal.SIGTERM, _stop)
    try:
        # A command that raises typer.Exit has its code returned here.
        code = app(standalone_mode=False)
    except BatchScorerError as error:
        _fail(str(error), error.exit_code)
    except typer.Abort:
        sys.exit(ExitCode.INCOMPLETE)
    except Exception as error:
        # Typer's own usage errors know how to print themselves.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        sys.exit(ExitCode.CONFIG)
    if code == _INTERRUPTED:
        _fail("stopped; run the same command again to go on from here", ExitCode.INCOMPLETE)
    sys.exit(code or ExitCode.DONE)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    if logs.is_json():
        logs.log.error(message)
    else:
        shown = _escape(logs.mask(message))
        _err.print(f"[red]error:[/] {shown}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


_NOT_GIVEN = "(not given)"
_NOT_READ = "(not read)"


@app.command()
@with_settings
def score(config: Config, as_json: AsJson = False) -> None:
    """Score all inputs into the output. Run it again to finish what was interrupted."""
    _score(config, as_json=as_json)


@app.command()
@partial(with_settings, model=_NOT_READ, output="(not written)")
def plan(config: Config, as_json: AsJson = False) -> None:
    """Say what a run would do: files, what their rows are, shards; with --model also how many
    tokens it would compute, and the FLOPs. Writes nothing."""
    from batch_scorer.reports.results import plan_report
    from batch_scorer.runs.preview import look_ahead

    _show(plan_report(look_ahead(config, with_model=config.model != _NOT_READ)), as_json=as_json)


@app.command()
@partial(with_settings, model=_NOT_GIVEN, output="(not written)")
def check(config: Config, as_json: AsJson = False) -> None:
    """Hold the engine against plain Hugging Face: `check MODEL [INPUT...]`. Writes nothing.

    Without INPUT, on the sample of real pairs that comes with this program.
    """
    from batch_scorer.reports.results import check_report
    from batch_scorer.runs.preview import check as run

    if config.model == _NOT_GIVEN:
        model, *inputs = config.inputs
        sample = str(Path(__file__).parents[1] / "data" / "pairs")
        config = config.model_copy(update={"model": model, "inputs": tuple(inputs or [sample])})
    checked = run(config)
    _show(check_report(checked), as_json=as_json)
    checked.report.require()


@app.command()
@with_settings
def nightly(
    config: Config,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Leave out files of earlier days.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Leave out files of later days.")
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Score all again, into a new generation.")
    ] = False,
    max_shards: Annotated[
        int | None, typer.Option(help="Score at most so many shards with each model.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done. Writes nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score what is new since the last time; OUTPUT holds all generations of scores. Run it as
    often as you like."""
    from batch_scorer.nightly.foresee import foresee_night
    from batch_scorer.nightly.night import Night
    from batch_scorer.reports.results import NightlyPlan

    night = Night(_day("since", since), _day("until", until), rescore, max_shards)
    if not dry_run:
        _nightly(config, night, as_json=as_json)
        return
    _show(NightlyPlan(foresee_night(config, night)), as_json=as_json)


def _day(name: str, text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is no date; write 2026-11-21") from None


def _nightly(config: Config, night: "Night", *, as_json: bool) -> None:
    from batch_scorer.nightly.night import run_night
    from batch_scorer.reports.blocks import Line
    from batch_scorer.reports.console import show
    from batch_scorer.reports.progress import progress_listener
    from batch_scorer.reports.results import nightly_report
    from batch_scorer.runs.run import Listener

    say = _err if as_json else _out

    @contextmanager
    def listen(path: str) -> Iterator[Listener]:
        if not logs.is_json():
            show(say, Line(path))
        with progress_listener(say) as listener:
            yield listener

    ended = run_night(config, night, listen)
    _show(nightly_report(ended), as_json=as_json)
    if not ended.is_complete:
        failed = sum(summary.totals["shards_failed"] for summary in ended.summaries)
        raise IncompleteError(
            f"{failed} shards are not scored (reasons above); mend their inputs, and the next "
            "night tries them again"
        )


@app.command()
def drift(output: Output, store_option: StoreOptions = None, as_json: AsJson = False) -> None:
    """Say how scores have moved in the newest night of a nightly OUTPUT."""
    from batch_scorer.nightly.history import newest_drift
    from batch_scorer.storage import ObjectMissing, open_store

    try:
        root = open_store(output, mapping("store_option", store_option) or {})
    except ObjectMissing as error:
        raise OutputError(str(error)) from error
    _show(newest_drift(root), as_json=as_json)


@app.command()
def status(output: Output, store_option: StoreOptions = None, as_json: AsJson = False) -> None:
    """Say how far an output is, or a nightly OUTPUT: its newest generations and last night."""
    from batch_scorer.nightly.history import newest_record
    from batch_scorer.nightly.status import nightly_root, read_nightly_status
    from batch_scorer.runs.status import read_status

    options = mapping("store_option", store_option)
    if (root := nightly_root(output, options)) is not None:
        _show(read_nightly_status(root, options, newest_record(root)), as_json=as_json)
    else:
        _show(read_status(output, options), as_json=as_json)


@app.command()
def verify(output: Output, store_option: StoreOptions = None, as_json: AsJson = False) -> None:
    """Recount and re-hash a scored output from its data."""
    from batch_scorer.outputs.verify import verify as check
    from batch_scorer.reports.results import VerifyReport

    verdict = check(output, mapping("store_option", store_option))
    _show(VerifyReport(output, verdict), as_json=as_json)
    raise typer.Exit(verdict.exit_code)


@app.command()
@partial(with_settings, model=_NOT_GIVEN, output=_NOT_GIVEN)
def evaluate(
    config: Config,
    benchmark: Annotated[
        Benchmark | None,
        typer.Option(help="What the rows are. Default: found from their columns and subsets."),
    ] = None,
    legacy_xstest_weights: Annotated[
        bool,
        typer.Option(
            "--legacy-xstest-weights",
            help="RewardBench with its two xstest weights as before 2024-09-10.",
        ),
    ] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result here too, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute RewardBench 1 or 2, RM-Bench or JudgeBench from scores.

    `evaluate OUTPUT` takes an output that is scored; `evaluate INPUT... --model M --output OUT`
    scores it first, as `score` does.
    """
    from batch_scorer.evaluation.evaluate import (
        JUDGEBENCH_COLUMNS,
        evaluate,
        files_of_plan,
        find_benchmark,
    )
    from batch_scorer.inputs.plan import make_plan

    absent = [name for name in ("model", "output") if getattr(config, name) == _NOT_GIVEN]
    if len(absent) == 1:
        raise ConfigError(f"`{absent[0]}` is needed to score first; or name a scored output alone")
    if absent:
        ignored = config.model_fields_set - {"model", "inputs", "output", "store_options"}
        if len(config.inputs) > 1 or ignored:
            raise ConfigError(
                f"{', '.join(sorted(ignored)) or 'several inputs'}: only for scoring, which needs "
                "--model and --output; otherwise name one scored output"
            )
        output = config.inputs[0]
    else:
        if benchmark is Benchmark.JUDGEBENCH:
            columns = {**JUDGEBENCH_COLUMNS, **config.columns}
            config = config.model_copy(update={"columns": columns})
        # Before hours of scoring rather than after.
        find_benchmark(files_of_plan(make_plan(config)), benchmark)
        _score(config, as_json=as_json, is_last=False)
        output = config.output
    result = evaluate(
        output,
        config.store_options,
        benchmark=benchmark,
        legacy_xstest_weights=legacy_xstest_weights,
    )
    if report is not None:
        try:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(json.dumps(result.to_json()) + "\n")
        except OSError as error:
            raise OutputError(f"{report}: the report cannot be written: {error}") from error
    _show(result, as_json=as_json)


@app.command()
def demo(
    output: Annotated[str, typer.Option(help="Where the scored sample goes.")] = "demo-output",
    as_json: AsJson = False,
) -> None:
    """Score a sample of real preference pairs and rollouts with the embedded reward model."""
    from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory

    say = _err if as_json else _out
    model = build_embedded_model(
        default_embedded_directory(), lambda line: say.print(line, highlight=False)
    )
    sample = Path(__file__).parents[1] / "data"
    config = load_config(
        model=str(model),
        inputs=(str(sample / "pairs"), str(sample / "rollouts")),
        output=output,
        shard_rows=_DEMO_SHARD_ROWS,
    )
    _score(config, as_json=as_json)


_DEMO_SHARD_ROWS = 50
"""Small, so that a laptop shows progress every few seconds."""


@app.command(context_settings={"allow_interspersed_args": False})
def submit(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="A command of this program with its arguments, after a --."
        ),
    ],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS, http://127.0.0.1:8265.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Holds the cluster's token. Default: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, "
            "~/.ray/auth_token.",
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(help="Once a job with this tag has succeeded, it is not run again."),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Leave the job to itself once it is submitted.")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Run a command on a Ray cluster: `submit -- score …`. Follows it; Ctrl-C stops it.

    The settings are checked here first. The config file is read here and travels with the job, as
    does this program.
    """
    from batch_scorer.cli.submit import ADDRESS_VARIABLE, DEFAULT_ADDRESS, Submission, find_token
    from batch_scorer.cli.submit import submit as run

    words = [*command, *(["--config", str(config)] if config else [])]
    submission = Submission(tuple(words), _checked_here(words), tag)
    code = run(
        submission,
        address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS,
        find_token(token_file),
        say=lambda line: _err.print(_escape(line), highlight=False, soft_wrap=True),
        out=sys.stdout,
        wait=not no_wait,
    )
    if code:
        _fail(f"the job ended with exit code {code}; its own words are above", code)


def _checked_here(words: list[str]) -> Path | None:
    """The config file that a command names; raises what the command would for wrong settings."""
    group = typer.main.get_group(app)
    root = group.context_class(group, info_name=app.info.name)
    command = group.get_command(root, words[0])
    if command is None or command.name == submit.__name__:
        raise ConfigError(f"{words[0]}: no command that a cluster can run; see batch-scorer --help")
    settings = command.make_context(words[0], words[1:], parent=root).params
    load = getattr(command.callback, "load", None)
    if load is None:
        return None
    file = Path(settings["config_file"]) if settings["config_file"] else None
    load(**{**settings, "config_file": file})
    return file


def _score(config: Config, *, as_json: bool, is_last: bool = True) -> None:
    """Run and print; with `as_json`, stdout belongs to the last thing that the command does."""
    from batch_scorer.reports.blocks import Line
    from batch_scorer.reports.console import show
    from batch_scorer.reports.progress import progress_listener
    from batch_scorer.reports.results import run_report
    from batch_scorer.runs.run import score as run

    with progress_listener(_err if as_json else _out) as progress:
        summary = run(config, progress)
    if is_last or not as_json:
        _show(run_report(summary), as_json=as_json)
    if not as_json:
        for line in (
            f"The scored shards are in {summary.output}",
            f"Recount them from the data:  {_program()} verify {summary.output}",
        ):
            show(_out, Line(line))
    if not summary.is_complete:
        failed = summary.totals["shards_failed"]
        raise IncompleteError(
            f"{failed} of {summary.totals['shards']} shards are not scored (reasons above); "
            "mend their inputs and run the same command again"
        )


def _show(report: "Result", *, as_json: bool) -> None:
    """Print a command's result: for machines one JSON value, for people lines and tables."""
    from batch_scorer.reports.console import show

    if as_json:
        print(json.dumps(report.to_json()))
    else:
        show(_out, report)


def _program() -> str:
    """How this program was called, so that the next command can be copied."""
    called = sys.argv[0]
    return os.path.relpath(called) if os.access(called, os.X_OK) else "batch-scorer"


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


if __name__ == "__main__":
    main()
