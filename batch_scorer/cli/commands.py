"""The commands. Every setting of `Config` is a flag with the same name; nothing else is.

Heavy imports (torch, ray, transformers) happen inside the commands, so that `--help` answers at
once.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Annotated

import typer

from batch_scorer import logs, quarantine
from batch_scorer.cli.decontaminate import decontaminate
from batch_scorer.cli.flags import (
    NEEDED,
    AsJson,
    ConfigFile,
    Output,
    StoreOptions,
    load_settings,
    mapping,
    with_settings,
)
from batch_scorer.cli.help import Command
from batch_scorer.cli.normalize import normalize
from batch_scorer.cli.select import select
from batch_scorer.cli.terminal import err, fail, for_progress, out, program_name, say, show
from batch_scorer.config import (
    Config,
    PartialConfig,
    RewardSettings,
    completed,
    expanded,
    load_config,
    load_partial_config,
)
from batch_scorer.errors import (
    ConfigError,
    ExitCode,
    IncompleteError,
    OutputError,
    StorageError,
)
from batch_scorer.evaluation import Benchmark
from batch_scorer.version import __version__

app = typer.Typer(
    name="batch-scorer",
    help="Score preference pairs and rollouts with a reward model: shards in, scored shards out.",
    no_args_is_help=True,
    epilog="Exit codes: 0 all is committed; 2 a setting, an input, the model or the output is "
    "wrong; 3 some shards are not committed, run the same command again; 4 stored objects are not "
    "the committed ones.",
    pretty_exceptions_enable=False,
)
app.command(cls=Command)(decontaminate)
_DATA = Path(__file__).parents[1] / "data"
"""Real pairs and rollouts, which come with the package."""

_DEMO_SHARD_ROWS = 50
"""Small, so that a laptop shows progress every few seconds."""


@app.command(cls=Command)
@with_settings(*NEEDED)
def score(
    config: Config,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Write a data set's card beside the scores, README.md, from the run's records.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score all inputs into the output. Run it again to resume what was interrupted."""
    _score(config, as_json=as_json)
    if card:
        from batch_scorer.runs.card import write_card

        url = write_card(config.output, config.store_options)
        if not as_json:
            say(out(), f"The card is {url}")


def _score(config: Config, *, as_json: bool) -> None:
    quarantine.prepare()  # it imports while we do
    from batch_scorer.reports.progress import progress_listener
    from batch_scorer.reports.results import run_report
    from batch_scorer.runs.run import score as run

    with progress_listener(for_progress(as_json=as_json)) as progress:
        summary = run(config, progress)
    show(run_report(summary), as_json=as_json)
    if not as_json:
        say(out(), f"The scored shards are in {summary.output}")
        say(out(), f"Check them against their inputs:  {program_name()} verify {summary.output}")
    if config.report:
        _write_beside(summary.output, config, as_json=as_json)
    if not summary.is_complete:
        raise IncompleteError(
            f"{summary.totals['shards_failed']} of {summary.totals['shards']} shards are not "
            "scored (reasons above); fix the inputs and run the same command again"
        )


def _write_beside(output: str, config: Config, *, as_json: bool) -> None:
    """The page that `report` asks for."""
    from batch_scorer.reports.page.write import write_beside

    url = write_beside(output, config.store_options)
    if url and not as_json:
        say(out(), f"The page is {url}")


@app.command(cls=Command)
@with_settings("inputs")
def plan(config: PartialConfig, as_json: AsJson = False) -> None:
    """Show what a run would do: files, what their rows are, shards. Writes nothing.

    With --model also how many tokens it would compute, and the FLOPs.
    """
    quarantine.prepare()
    from batch_scorer.reports.results import plan_report
    from batch_scorer.runs.preview import look_ahead

    show(plan_report(look_ahead(config, with_model=bool(config.model))), as_json=as_json)


@app.command(cls=Command)
@with_settings(
    arguments="MODEL INPUT",
    explained="The model, unless --model or the config file has it; then inputs as for `score`. "
    "Without inputs, the sample of real pairs that comes with this program.",
)
def check(config: PartialConfig, as_json: AsJson = False) -> None:
    """Compare the engine's scores with plain Hugging Face on a sample of rows. Writes nothing."""
    quarantine.prepare()
    from batch_scorer.reports.results import check_report
    from batch_scorer.runs.preview import check as run

    model, *inputs = (config.model, *config.inputs) if config.model else config.inputs or ("",)
    if not model:
        raise ConfigError("`model` is needed")
    sample = [str(_DATA / "pairs")]
    checked = run(config.model_copy(update={"model": model, "inputs": tuple(inputs or sample)}))
    show(check_report(checked), as_json=as_json)
    checked.report.require()


@app.command(cls=Command)
@with_settings(*NEEDED)
def nightly(
    config: Config,
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="Leave out files of earlier days.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Leave out files of later days.")
    ] = None,
    rescore: Annotated[
        bool, typer.Option("--rescore", help="Score everything again, into a new generation.")
    ] = False,
    max_shards: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Score at most N shards; the rest waits for the next run.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done. Writes nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score what is new since the last nightly run. OUTPUT holds all generations of scores.

    Run it as often as you like.
    """
    quarantine.prepare()
    from batch_scorer.nightly.foresee import foresee_night
    from batch_scorer.nightly.night import Night, run_night
    from batch_scorer.reports.progress import progress_listener
    from batch_scorer.reports.results import NightlyPlan, nightly_report
    from batch_scorer.runs.run import Listener

    night = Night(_day("since", since), _day("until", until), rescore, max_shards)
    if dry_run:
        show(NightlyPlan(foresee_night(config, night)), as_json=as_json)
        return
    console = for_progress(as_json=as_json)

    @contextmanager
    def listen(path: str) -> Iterator[Listener]:
        if not logs.is_json():
            say(console, path)
        with progress_listener(console) as listener:
            yield listener

    ended = run_night(config, night, listen)
    show(nightly_report(ended), as_json=as_json)
    if config.report and ended.held_by is None:
        _write_beside(ended.root, config, as_json=as_json)
    if not ended.is_complete:
        failed = ended.summary.totals["shards_failed"] if ended.summary else 0
        raise IncompleteError(
            f"{failed} shards are not scored (reasons above); fix the inputs, and the next nightly "
            "run tries them again"
        )


def _day(name: str, text: str | None) -> date | None:
    try:
        return None if text is None else date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a date like 2026-11-21, got {text!r}") from None


@app.command(cls=Command)
def drift(output: Output, store_option: StoreOptions = None, as_json: AsJson = False) -> None:
    """Show how scores have moved in a nightly OUTPUT's newest run."""
    from batch_scorer.nightly.history import newest_drift
    from batch_scorer.storage import ObjectMissing, open_store

    try:
        root = open_store(expanded(output), mapping("store_options", store_option) or {})
    except ObjectMissing as error:
        raise OutputError(str(error)) from error
    show(newest_drift(root), as_json=as_json)


@app.command(cls=Command)
def status(
    output: Output,
    marked: Annotated[
        bool,
        typer.Option(
            "--marked",
            help="List the rows without a score instead: file, row (from 0), reason, detail. Of a "
            "nightly OUTPUT, those that latest.json points to.",
        ),
    ] = False,
    to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --marked: write them here too, as Parquet."),
    ] = None,
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Show an output's progress, or a nightly OUTPUT's newest generations and last run.

    Of an output of `select`, `normalize` or `decontaminate`, what it was made of, and every count.
    """
    from batch_scorer.derived.state import derived_store, read_derived_status
    from batch_scorer.nightly.history import newest_record
    from batch_scorer.nightly.status import latest_output, nightly_root, read_nightly_status
    from batch_scorer.runs.marked import read_marked
    from batch_scorer.runs.status import read_status

    place, options = expanded(output), mapping("store_options", store_option)
    if to is not None:
        _require_outside(to, place, marked=marked)
    root = nightly_root(place, options)
    if marked:
        scored = place if root is None else latest_output(root)
        found = read_marked(scored, options, name=place)
        if to is not None:
            found.save(to)
        show(found, as_json=as_json)
    elif (derived := derived_store(place, options or {})) is not None:
        show(read_derived_status(*derived), as_json=as_json)
    elif root is None:
        show(read_status(output, options), as_json=as_json)
    else:
        show(read_nightly_status(root, options, newest_record(root)), as_json=as_json)


def _require_outside(file: Path, output: str, *, marked: bool) -> None:
    """Raise ConfigError where `status --to` cannot be meant."""
    if not marked:
        raise ConfigError("--to: only with --marked")
    if "://" not in output and file.resolve().is_relative_to(Path(output).resolve()):
        raise ConfigError("--to: a file in the output would be read as scored rows; name another")


@app.command(cls=Command)
def verify(
    output: Output,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="First list and remove scored shards that no manifest names, whose rows a glob "
            "would read twice.",
        ),
    ] = False,
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Recount an output from its data, and compare every digest with what was committed.

    An output of `select`, `normalize` or `decontaminate` is also made again, where what it was
    made of is still the same.
    """
    from batch_scorer.decontamination.decontaminate import KIND as DECONTAMINATION
    from batch_scorer.decontamination.verify import verify_decontamination
    from batch_scorer.derived.state import derived_store
    from batch_scorer.normalization.normalize import KIND as NORMALIZATION
    from batch_scorer.normalization.verify import verify_normalization
    from batch_scorer.outputs.repair import find_strays, remove
    from batch_scorer.outputs.verify import verify as check
    from batch_scorer.reports.results import VerifyReport
    from batch_scorer.selection.verify import verify_selection

    options = mapping("store_options", store_option) or {}
    if (derived := derived_store(expanded(output), options)) is not None:
        of_kind = {DECONTAMINATION: verify_decontamination, NORMALIZATION: verify_normalization}
        found = of_kind.get(derived[1].kind, verify_selection)(*derived, options)
        show(found, as_json=as_json)
        raise typer.Exit(found.exit_code)
    if repair:
        console = for_progress(as_json=as_json)
        root = expanded(output)
        strays = find_strays(root, options)
        for stray in strays:
            say(console, f"to be removed: {stray.key}: {stray.num_rows:,} rows of {stray.input}")
        removed = len(remove(root, options, strays)) if strays else 0
        say(console, f"removed {removed:,} scored shards")
    verdict = check(output, options)
    show(VerifyReport(output, verdict), as_json=as_json)
    raise typer.Exit(verdict.exit_code)


@app.command(cls=Command)
def doctor(
    url: Annotated[str, typer.Argument(metavar="URL", help="A folder, or a bucket and prefix.")],
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Check that a store keeps what the commit protocol needs of it.

    Writes small objects into a scratch folder below URL, and removes it.
    """
    from batch_scorer.storage import examine

    try:
        found = examine(expanded(url), mapping("store_options", store_option) or {})
    except StorageError as error:
        raise OutputError(str(error)) from error
    show(found, as_json=as_json)
    raise typer.Exit(ExitCode.DONE if found.holds else ExitCode.CONFIG)


@app.command(cls=Command)
@with_settings(
    "inputs",
    arguments="OUTPUT|INPUT",
    explained="One scored output; or, with --model and --output, inputs to score first.",
)
def evaluate(
    config: PartialConfig,
    benchmark: Annotated[
        Benchmark | None,
        typer.Option(
            metavar="NAME",
            help=f"What the rows are: {', '.join(Benchmark)}. Default: detected from their columns "
            "and subsets.",
        ),
    ] = None,
    legacy_xstest_weights: Annotated[
        bool,
        typer.Option(
            "--legacy-xstest-weights",
            help="Weigh RewardBench's two xstest subsets as before 2024-09-10.",
        ),
    ] = False,
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the result here too, as JSON.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compute RewardBench 1 or 2, RM-Bench or JudgeBench from scores, or what any pairs' are worth.

    `evaluate OUTPUT` takes a scored output; `evaluate INPUT... --model M --output OUT` scores the
    inputs first, as `score` does. Of several models it takes the mean of their scores, or with
    --column-prefix NAME_ those of one.
    """
    quarantine.prepare()
    from batch_scorer.evaluation.evaluate import evaluate, evaluate_output
    from batch_scorer.reports.progress import progress_listener

    if config.model or config.output:
        with progress_listener(for_progress(as_json=as_json)) as progress:
            result = evaluate(
                completed(config),
                benchmark=benchmark,
                legacy_xstest_weights=legacy_xstest_weights,
                listeners=[progress],
            )
    else:
        output = _scored_output(config)
        prefix = config.column_prefix if "column_prefix" in config.model_fields_set else None
        result = evaluate_output(
            output, config.store_options, benchmark, legacy_xstest_weights, prefix
        )
    if to is not None:
        result.save(to)
    show(result, as_json=as_json)


def _scored_output(config: PartialConfig) -> str:
    """The one argument of `evaluate`, where nothing is scored; refuses settings of scoring."""
    ignored = config.model_fields_set - {*NEEDED, "store_options", "column_prefix"}
    if len(config.inputs) > 1 or ignored:
        raise ConfigError(
            f"{', '.join(sorted(ignored)) or 'several inputs'}: only for scoring first, which "
            "needs --model and --output; otherwise name one scored output"
        )
    return config.inputs[0]


@app.command(cls=Command)
def report(
    output: Output,
    html: Annotated[
        Path, typer.Option("--html", metavar="FILE", help="Where the page goes, on this machine.")
    ],
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="OTHER",
            help="Compare with another output of the same rows, scored by another model or with "
            "other settings.",
        ),
    ] = None,
    store_option: StoreOptions = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page about a scored OUTPUT: scores, pairs, length, marked rows, cost.

    Of a nightly OUTPUT, about its newest generation and the nights.

    The page asks for nothing outside of itself. Each drawing has its values in a table.
    """
    quarantine.prepare()
    from batch_scorer.reports.page.write import write_page

    options = mapping("store_options", store_option) or {}
    other = None if compare is None else expanded(compare)
    written = write_page(expanded(output), Path(expanded(html)), options, other)
    show(written, as_json=as_json)


app.command(cls=Command)(select)
app.command(cls=Command)(normalize)


@app.command(cls=Command)
def demo(
    output: Annotated[
        str,
        typer.Option(metavar="OUTPUT", help="Where the scored sample goes. Default: demo-output."),
    ] = "demo-output",
    as_json: AsJson = False,
) -> None:
    """Score a sample of real pairs and rollouts with the embedded model; select the best rows.

    Ends with a page about the scores, beside OUTPUT.
    """
    from batch_scorer.models.embedded import build_embedded_model, default_embedded_directory

    console = for_progress(as_json=as_json)
    model = build_embedded_model(default_embedded_directory(), lambda line: say(console, line))
    config = load_config(
        model=model,
        inputs=(str(_DATA / "pairs"), str(_DATA / "rollouts")),
        output=output,
        shard_rows=_DEMO_SHARD_ROWS,
    )
    _score(config, as_json=as_json)
    from batch_scorer.selection.recipe import Selection
    from batch_scorer.selection.select import select as choose

    best = f"{output.rstrip('/')}-best"
    selected = choose([output], best, Selection(best=1, group_by=("prompt",)))
    from batch_scorer.reports.page.write import write_page

    # Beside the output; of one in an object store, here.
    beside = "demo-output" if "://" in config.output else config.output.rstrip("/")
    page = write_page(config.output, Path(f"{beside}.html"), {})
    if not as_json:
        say(out(), "")
        show(selected, as_json=False)
        say(out(), f"The page is {page.file}")


@app.command(cls=Command, context_settings={"allow_interspersed_args": False})
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
            help="The cluster's dashboard. Default: RAY_API_SERVER_ADDRESS if set, otherwise "
            "http://127.0.0.1:8265.",
        ),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Holds the cluster's token. Default: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
            "~/.ray/auth_token, the first there is.",
        ),
    ] = None,
    tag: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Once a job with this tag has succeeded, it is not run again."
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Submit the job and return; do not follow it.")
    ] = False,
    config: ConfigFile = None,
) -> None:
    """Run a command on a Ray cluster: `submit -- score …`. Follows the job; Ctrl-C stops it.

    The settings are checked here first. The config file is read here and travels with the job, as
    do a judge's page, files with reward functions, and this program.
    """
    from batch_scorer.cli.submit import ADDRESS_VARIABLE, DEFAULT_ADDRESS, Submission, find_token
    from batch_scorer.cli.submit import submit as run

    words = [*command, *(["--config", str(config)] if config else [])]
    config_file, page, rewards = _checked_here(words)
    submission = Submission(tuple(words), config_file, tag, page, rewards)
    code = run(
        submission,
        address or os.environ.get(ADDRESS_VARIABLE) or DEFAULT_ADDRESS,
        find_token(Path(expanded(token_file)) if token_file else None),
        say=lambda line: say(err(), line),
        out=sys.stdout,
        wait=not no_wait,
    )
    if code:
        fail(f"the job ended with exit code {code}; see its output above", code)


def _checked_here(
    words: list[str],
) -> tuple[Path | None, Path | None, Mapping[str, RewardSettings]]:
    """The config file that a command names, the file of its judge's page where that is one of this
    machine, and its reward functions where one lies in a file of this machine. Raises what the
    command would for wrong settings or a wrong page."""
    group = typer.main.get_group(app)
    root = group.context_class(group, info_name=app.info.name)
    command = group.get_command(root, words[0])
    if command is None or command.name == submit.__name__:
        raise ConfigError(
            f"{words[0]}: not a command that a cluster can run; see batch-scorer --help"
        )
    values = command.make_context(words[0], words[1:], parent=root).params
    settings = load_settings(words[0], values, elsewhere=True)
    if settings is None:
        load_partial_config(
            elsewhere=True,
            output=values.get("output") or values.get("url"),
            store_options=mapping("store_options", values.get("store_option")),
        )
    if settings is None:
        return None, None, {}
    file, page = values["config_file"], None
    if (judge := settings.judge) is not None:
        from batch_scorer.judges.page import load_page, shipped_pages

        if judge not in shipped_pages() and Path(judge).is_file():  # otherwise it may be there
            page = Path(judge)
            load_page(judge)
    from batch_scorer.cli.submit import file_here

    travels = any(map(file_here, settings.rewards.values()))
    return Path(expanded(file)) if file else None, page, settings.rewards if travels else {}


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit
