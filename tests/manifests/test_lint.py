"""Each rule of cluster/lint.py with a manifest that breaks it, and no other."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import lint
from cluster.lint import RULES, findings, load
from tests.helpers.program import REPOSITORY

FIXTURES = Path(__file__).parent / "fixtures"
BROKEN = sorted((FIXTURES / "lint").glob("*.yaml"))


def clean(name: str) -> dict[str, Any]:
    [document] = load((FIXTURES / "clean" / name).read_text())
    return document


def broken(file: Path) -> dict[str, Any]:
    """The document of a fixture: one of its own, or a clean one with `change` applied. A change
    without `to` takes the key away."""
    fixture = yaml.safe_load(file.read_text())
    if "document" in fixture:
        document: dict[str, Any] = fixture["document"]
        return document
    document = clean(fixture["manifest"])
    for change in fixture["change"]:
        *way, last = change["at"]
        place: Any = document
        for step in way:
            place = place[step]
        if "to" in change:
            place[last] = change["to"]
        else:
            del place[last]
    return document


@pytest.mark.parametrize("name", ["rayjob.yaml", "cronjob.yaml"])
def test_the_clean_manifests_break_no_rule(name: str) -> None:
    assert findings([clean(name)]) == []


def test_every_rule_has_a_fixture_and_a_reason() -> None:
    assert {file.stem for file in BROKEN} == set(RULES)
    assert all(check.__doc__ for check in RULES.values())


@pytest.mark.parametrize("file", BROKEN, ids=lambda file: file.stem)
def test_a_fixture_breaks_its_rule_and_no_other(file: Path) -> None:
    assert {finding.rule for finding in findings([broken(file)])} == {file.stem}


@pytest.mark.parametrize("file", BROKEN, ids=lambda file: file.stem)
def test_a_rule_survives_what_is_no_manifest(file: Path) -> None:
    """Wrong shapes are for the schema to find; the lint must not fall over them."""
    for key, value in (("spec", None), ("spec", []), ("metadata", "text"), ("rules", "text")):
        findings([broken(file) | {key: value}])


def test_a_manifest_inside_a_string_is_looked_at() -> None:
    job = broken(FIXTURES / "lint" / "token-auth.yaml")
    settings = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "night"}}
    [finding] = findings([settings | {"data": {"rayjob.yaml": yaml.safe_dump(job)}}])
    assert finding.rule == "token-auth"
    assert finding.where.startswith("ConfigMap/night data.rayjob.yaml > RayJob/clean spec.")


@pytest.mark.parametrize(
    ("place", "value", "rule"),
    [
        # A controller's rule has more than one side.
        ("suspend", True, None),
        ("clusterSelector", {"ray.io/cluster": "other"}, "cluster-selector"),
        ("backoffLimit", 4, "few-retries"),
        ("runtimeEnvYAML", "{", "runtime-env"),
        ("runtimeEnvYAML", "env_vars: {HF_TOKEN: x}", "no-secrets"),
        ("metadata", {"api_key": "x"}, "no-secrets"),
        ("entrypoint", "batch-scorer score --config c.yaml --trust-remote-code", "no-remote-code"),
        (
            "entrypoint",
            "batch-scorer score --config c.yaml --output=s3://b/`date`",
            "stable-output",
        ),
        (
            "entrypoint",
            "batch-scorer score --config c.yaml --output s3://b/fixed --workers 8",
            None,
        ),
    ],
)
def test_other_ways_to_break_a_rule(place: str, value: Any, rule: str | None) -> None:
    job = clean("rayjob.yaml")
    job["spec"][place] = value
    assert {finding.rule for finding in findings([job])} == ({rule} if rule else set())


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PASSWORD"])
def test_names_that_mean_a_secret(name: str) -> None:
    job = clean("cronjob.yaml")
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    container["env"] = [{"name": name, "value": "x"}]
    assert [finding.rule for finding in findings([job])] == ["no-secrets"]
    container["env"] = [{"name": name, "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]
    assert findings([job]) == []


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "RAY_AUTH_TOKEN_PATH", "KEYBOARD"])
def test_names_that_only_sound_like_one(name: str) -> None:
    job = clean("cronjob.yaml")
    [container] = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    container["env"] = [{"name": name, "value": "x"}]
    assert findings([job]) == []


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="'replicas' stands twice"):
        load("spec:\n  replicas: 1\n  replicas: 2\n")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve
def test_the_lists_are_those_of_ray() -> None:
    from ray.runtime_env import RuntimeEnv
    from ray.scripts.scripts import start

    flags = {option.lstrip("-") for given in start.params for option in given.opts}
    assert flags > lint.START_PARAMS
    assert RuntimeEnv.known_fields > lint.RUNTIME_ENV


def test_as_a_program(tmp_path: Path) -> None:
    def run(*files: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, REPOSITORY / "cluster" / "lint.py", *files],
            capture_output=True,
            text=True,
            check=False,
        )

    wrong, unreadable = tmp_path / "wrong.yaml", tmp_path / "unreadable.yaml"
    wrong.write_text(yaml.safe_dump(broken(FIXTURES / "lint" / "deadlines.yaml")))
    unreadable.write_text("a: [")
    right = FIXTURES / "clean" / "rayjob.yaml"
    assert run(right).returncode == 0
    found = run(right, wrong)
    assert found.returncode == 1
    assert found.stdout == (
        f"{wrong}: RayJob/clean spec: deadlines: preRunningDeadlineSeconds is not set\n"
    )
    assert run(unreadable).returncode == 2
