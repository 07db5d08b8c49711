"""Jobs on a real cluster: who may submit them, how they are followed, stopped and told apart."""

import json
import signal
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from batch_scorer.cli.submit import Submission
from batch_scorer.storage import ObjectMissing
from cluster.local.local_cluster import Cluster
from cluster.local.seaweed import SECRET_KEY, S3Server
from tests.helpers.in_process import run_cli
from tests.helpers.inputs import pair_rows, pairs, parquet, table_of
from tests.helpers.language_models import random_language_model
from tests.helpers.places import Place, of_input
from tests.helpers.program import Ended, Program, Running, wait_until

pytestmark = pytest.mark.e2e

ROWS = 40
"""One shard each."""
NOWHERE = "http://127.0.0.1:1"


@dataclass(frozen=True)
class Submitter:
    """`batch-scorer submit` against the cluster, with a scoring job that scores by a hash."""

    program: Program
    cluster: Cluster
    place: Place
    job_file: Path

    def start(self, *arguments: object, **environment: str) -> Running:
        ours = {**self.cluster.environment, **environment}
        return self.program.start("submit", *arguments, **ours)

    def run(self, *arguments: object, **environment: str) -> Ended:
        return self.start(*arguments, **environment).wait()

    def asked(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The dashboard's JSON answer."""
        request = urllib.request.Request(
            f"{self.cluster.dashboard}{path}",
            data=json.dumps(body).encode() if body else None,
            headers={
                "Authorization": f"Bearer {self.cluster.token}",
                "Content-Type": "application/json",
            },
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Submitted jobs by submission id, the newest last."""
        jobs = [job for job in self.asked("/api/jobs/") if job["type"] == "SUBMISSION"]
        return {job["submission_id"]: job for job in sorted(jobs, key=lambda j: j["start_time"])}


@pytest.fixture(scope="module")
def submitter(
    module_program: Program,
    cluster: Cluster,
    s3: S3Server,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Submitter:
    place = Place(s3.url("submit"), s3.options)
    (place / "in").write({"rows.parquet": parquet(pairs(ROWS))})
    job_file = tmp_path_factory.mktemp("job") / "job.yaml"
    settings = {
        "model": str(tiny_model), "inputs": [(place / "in").url], "output": (place / "out").url,
        "backend": "fake", "device": "cpu", "shard_rows": 1, "store_options": dict(s3.options),
    }  # fmt: skip
    job_file.write_text(yaml.safe_dump(settings))
    return Submitter(module_program, cluster, place, job_file)


# What is refused before anything is sent.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "train: not a command that a cluster can run"),
        (["submit", "--", "plan"], "submit: not a command that a cluster can run"),
        (["score", "--tokn-budget", "5"], "--token-budget"),
        (["score", "in", "--model", "m"], "`output` is needed"),
        (["score", "in", "--model", "m", "--output", "o", "--dtype", "int4"], "'bfloat16', 'floa"),
        (["score", "--config", "missing.yaml"], "no config file at missing.yaml"),
    ],
)
def test_a_wrong_command_is_refused_here(arguments: list[str], said: str) -> None:
    ended = run_cli("submit", "--address", NOWHERE, "--", *arguments)
    assert ended.exit_code == 2
    assert said in ended.err


def test_an_unknown_setting_of_the_config_file_is_refused_here(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: m\ninputs: in\noutput: out\ntoken_buget: 5\n")
    for arguments in (
        ["--", "score", "--config", file],
        ["--config", file, "--", "score"],
        ["--", "score", f"--config={file}"],
    ):
        ended = run_cli("submit", "--address", NOWHERE, *arguments)
        assert ended.exit_code == 2
        assert ended.error == "unknown setting `token_buget`; did you mean `token_budget`?"


@pytest.mark.parametrize("tag", ["a b", "-x", "x" * 41, "r2", "monday-r3", "a/b"])
def test_a_tag_that_cannot_stand_in_a_name_is_refused(tag: str) -> None:
    ended = run_cli("submit", "--tag", tag, "--", "status", "out")
    assert ended.exit_code == 2
    assert ended.error.startswith(f"tag: {tag!r} cannot be part of a job's name")


def test_a_name_tells_the_command_the_file_and_the_tag(tmp_path: Path) -> None:
    file, copy = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text("model: m\n")
    copy.write_text("model: m\n")
    one = Submission(("score", "--config", str(file)), file)
    assert one.name == Submission(("score", "--config", str(copy)), copy).name
    assert one.entrypoint == "python -m batch_scorer.cli score --config config.yaml"
    tagged = Submission(one.words, file, "2026-11-22")
    assert tagged.name == f"{one.name}-2026-11-22"
    attempts = tagged.attempts()
    assert [next(attempts) for _ in range(3)] == [
        tagged.name, f"{tagged.name}-r2", f"{tagged.name}-r3",
    ]  # fmt: skip
    copy.write_text("model: n\n")
    assert one.name != Submission(one.words, copy).name
    assert one.name != Submission(("score", "--workers", "2", "--config", str(file)), file).name


def test_a_judge_s_page_travels_under_its_name_and_counts_for_the_job_s(tmp_path: Path) -> None:
    page = tmp_path / "better.yaml"
    page.write_text("about: one")
    words = ("score", "--judge", str(page), "--task=judge")
    one = Submission(words, page=page)
    assert one.entrypoint.endswith("--task=judge --judge judges/better.yaml")
    with one.runtime_env() as shipped:
        assert (Path(shipped["working_dir"]) / "judges/better.yaml").read_text() == "about: one"
    page.write_text("about: two")
    assert one.name != Submission(words).name
    other = Submission(words, page=page).name
    page.write_text("about: one")
    assert other != one.name == Submission(words, page=page).name


def test_a_wrong_page_is_refused_here(tmp_path: Path) -> None:
    page = tmp_path / "page.yaml"
    page.write_text("about: it\nmode: pairwise\nmessages: [{role: user, content: a}]\nverdict: {}")
    judging = ["--task", "judge", "--judge", page, "--model", "m", "in", "--output", "out"]
    ended = run_cli("submit", "--address", NOWHERE, "--", "score", *judging)
    assert ended.exit_code == 2
    assert ended.error.startswith(f"{page}: verdict")


# Who may submit.


def test_where_no_cluster_is_the_line_says_so(submitter: Submitter) -> None:
    ended = submitter.run("--address", NOWHERE, "--", "status", "out")
    assert ended.exit_code == 2
    assert ended.error.startswith(f"no Ray Jobs API answers at {NOWHERE}; is the cluster up")
    other = submitter.run("--address", "ray://127.0.0.1:10001", "--", "status", "out")
    assert other.exit_code == 2
    assert other.error.startswith("address: expected the URL of the cluster's dashboard")


def test_without_the_token_or_with_a_wrong_one_nothing_is_submitted(
    submitter: Submitter, tmp_path: Path
) -> None:
    before = submitter.jobs()
    url = submitter.cluster.dashboard
    nobody = {"RAY_AUTH_TOKEN_PATH": "", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
    ended = submitter.run("--", "status", "out", **nobody)
    assert ended.exit_code == 2
    assert ended.error.startswith(f"{url} asks for a token: set RAY_AUTH_TOKEN or")

    wrong = tmp_path / "token"
    wrong.write_text("wrong" * 8)
    ended = submitter.run("--token-file", wrong, "--", "status", "out")
    assert (ended.exit_code, ended.error) == (2, f"{url} refuses the token")

    for content, said in ((None, "the token cannot be read: "), ("", " holds no token")):
        file = tmp_path / "other"
        if content is not None:
            file.write_text(content)
        ended = run_cli("submit", "--token-file", file, "--", "status", "out")
        assert ended.exit_code == 2
        assert said in ended.error
    assert submitter.jobs() == before


# A job's life.


@dataclass(frozen=True)
class Finished:
    """A tagged job that was stopped by both who followed it, and then run to its end."""

    arguments: tuple[object, ...]
    stopped: list[Ended]
    shards_when_stopped: int
    lease_when_stopped: dict[str, Any]
    ended: Ended


@pytest.fixture(scope="module")
def finished(submitter: Submitter) -> Finished:
    output = submitter.place / "out"
    arguments = ("--tag", "night-1", "--", "score", "--config", submitter.job_file, "--json")
    first = submitter.start(*arguments)
    wait_until(lambda: "submitted bs-" in first.said()[1] or first.is_over, "it is submitted")
    second = submitter.start(*arguments)
    wait_until(lambda: "is already running" in second.said()[1] or second.is_over, "it is followed")
    wait_until(lambda: held(output) or first.is_over, "it holds its output")
    first.send(signal.SIGINT)
    second.send(signal.SIGTERM)
    stopped = [first.wait(), second.wait()]
    shards = len(output.shard_keys())
    lease = output.read_json("_batch_scorer/lease.json")
    return Finished(arguments, stopped, shards, lease, submitter.run(*arguments))


def held(output: Place) -> bool:
    """Whether a run has begun to work there."""
    try:
        return bool(output.read_json("_batch_scorer/plan.json"))
    except ObjectMissing:
        return False


def test_the_same_command_meets_its_own_job(submitter: Submitter, finished: Finished) -> None:
    first, second = finished.stopped
    (name,) = [job for job in submitter.jobs() if job.endswith("-night-1")]
    assert f"submitted {name} to {submitter.cluster.dashboard}" in first.err
    assert f"{name} is already running" in second.err
    assert "submitted" not in second.err


def test_ctrl_c_and_sigterm_stop_the_job_which_lets_go_of_its_output(
    submitter: Submitter, finished: Finished
) -> None:
    name = next(job for job in submitter.jobs() if job.endswith("-night-1"))
    for ended in finished.stopped:
        assert ended.exit_code == 3, ended.err
        assert ended.error == f"{name} was stopped; run the same command again to resume"
    assert submitter.jobs()[name]["status"] == "STOPPED"
    assert finished.shards_when_stopped < ROWS
    assert finished.lease_when_stopped["released"]


def test_the_next_attempt_goes_on_and_its_output_comes_here(
    submitter: Submitter, finished: Finished
) -> None:
    ended = finished.ended
    assert ended.exit_code == 0, ended.err + ended.out
    assert "-night-1-r2 to" in ended.err
    assert f"{finished.shards_when_stopped} shards are done" in ended.out
    assert f"{ROWS - finished.shards_when_stopped}/" in ended.out  # the last line of progress
    totals = ended.json
    assert (totals["rows"], totals["rows_scored"], totals["complete"]) == (ROWS, ROWS, True)
    output = submitter.place / "out"
    status = run_cli("status", output.url, *output.flags, "--json")
    assert status.json["state"] == "complete"
    verdict = run_cli("verify", output.url, *output.flags, "--json")
    assert verdict.json["ok"], verdict.out


def test_the_job_was_scored_by_every_node(submitter: Submitter, finished: Finished) -> None:
    assert finished.ended.exit_code == 0
    actors = submitter.asked("/api/v0/actors?limit=1000")["data"]["result"]["result"]
    job = list(submitter.jobs().values())[-1]["job_id"]
    scoring = [a for a in actors if "_ScoreStage" in a["class_name"] and a["job_id"] == job]
    names = {
        node["node_id"]: node["node_name"]
        for node in submitter.asked("/api/v0/nodes")["data"]["result"]["result"]
    }
    assert sorted(names[actor["node_id"]] for actor in scoring) == [
        node.name for node in submitter.cluster.nodes
    ]


def test_a_tag_that_has_succeeded_is_not_run_again(
    submitter: Submitter, finished: Finished
) -> None:
    before = submitter.jobs()
    name = list(before)[-1]
    ended = submitter.run(*finished.arguments)
    assert (ended.exit_code, ended.out) == (0, "")
    assert f"{name} has already succeeded; nothing to do" in ended.err
    assert submitter.jobs() == before


def test_jobs_hold_no_secrets(submitter: Submitter, finished: Finished) -> None:
    jobs = json.dumps(submitter.asked("/api/jobs/"))
    assert "night-1" in jobs
    assert submitter.cluster.token not in jobs
    assert SECRET_KEY not in jobs
    said = finished.ended.out + finished.ended.err
    assert submitter.cluster.token not in said
    assert SECRET_KEY not in said


def test_the_exit_code_of_the_command_is_passed_through(
    submitter: Submitter, finished: Finished
) -> None:
    output = submitter.place / "out"
    output.store.delete(output.shard_keys()[0])
    ended = submitter.run("--", "verify", output.url, *output.flags)
    assert ended.exit_code == 4
    assert "missing" in ended.out
    assert ended.error == "the job ended with exit code 4; see its output above"
    left = submitter.run("--no-wait", "--", "verify", output.url, *output.flags)
    assert left.exit_code == 0
    name = list(submitter.jobs())[-1]
    assert name.endswith("-r2")
    assert f"submitted {name} to" in left.err


def test_the_job_runs_the_package_that_was_shipped(
    submitter: Submitter, finished: Finished
) -> None:
    shipped = next(iter(submitter.jobs().values()))["runtime_env"]
    show = "python -c 'import batch_scorer; print(batch_scorer.__file__)'"
    job = submitter.asked("/api/jobs/", {"entrypoint": show, "runtime_env": shipped})
    name = job["submission_id"]
    wait_until(
        lambda: submitter.asked(f"/api/jobs/{name}")["status"] in ("SUCCEEDED", "FAILED"),
        "the job ends",
    )
    log = submitter.asked(f"/api/jobs/{name}/logs")["logs"]
    assert "/py_modules_files/_ray_pkg_" in log.splitlines()[-1]


def test_a_judge_is_asked_on_the_cluster_by_the_page_of_this_machine(
    submitter: Submitter, tmp_path: Path
) -> None:
    place = submitter.place / "judging"
    (place / "in").write({"a.parquet": parquet(table_of(pair_rows(3)))})
    page = tmp_path / "longer.yaml"
    page.write_text(
        "about: A test.\nmode: pointwise\n"
        "messages: [{role: user, content: '{{ prompt }}|{{ response }}'}]\n"
        "verdict: {by: probability, choices: {A: 1, B: 0}, least_mass: 0}\n"
    )
    model = random_language_model(tmp_path / "model")
    output = place / "out"
    ended = submitter.run(
        "--", "score", "--task", "judge", "--judge", page, "--model", model, (place / "in").url,
        "--output", output.url, *output.flags, "--device", "cpu", "--dtype", "float32",
        "--parity-check", "off", "--no-ray",
    )  # fmt: skip
    assert ended.exit_code == 0, ended.err
    rows = of_input(output.shards(), "a.parquet").to_pylist()
    assert [len(row["judgements"]) for row in rows] == [2, 2, 2]
    assert all(row["score_error"] is None for row in rows)
