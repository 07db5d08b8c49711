"""What the image is made of: exact versions, hashes, a base image by digest, and a list of all."""

import json
import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.image.sbom import bill
from tests.helpers.program import REPOSITORY

LOCK = (REPOSITORY / "requirements-tested.txt").read_text()
DOCKERFILE = re.sub(r"\\\n", " ", (REPOSITORY / "cluster" / "image" / "Dockerfile").read_text())


def locked() -> dict[str, tuple[str, list[str]]]:
    """Version and hashes of each package by name, as pip reads the file."""
    entries = re.sub(r" \\\n", " ", LOCK)
    found = {}
    for line in entries.splitlines():
        if not line.startswith("#"):
            pin, *hashes = line.split()
            name, version = pin.split("==")
            found[canonicalize_name(name)] = (version, hashes)
    return found


def test_every_package_of_the_image_has_hashes() -> None:
    assert len(locked()) > 80
    for name, (_, hashes) in locked().items():
        assert hashes, name
        assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", each) for each in hashes), name


def test_the_image_has_the_tested_versions() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    tested = {
        canonicalize_name(name): version
        for name, version in (line.split("==") for line in lines if "==" in line)
    }
    both = locked().keys() & tested.keys()
    assert {name: locked()[name][0] for name in both} == {name: tested[name] for name in both}
    # What the tests never had is torch's CUDA libraries, and what builds our package.
    others = locked().keys() - tested.keys()
    assert {name for name in others if not name.startswith(("nvidia-", "cuda-"))} <= {
        "setuptools",
        "triton",
    }


def test_all_requirements_are_locked() -> None:
    """A new one makes this fail until `make hashes` has run."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for requirement in map(Requirement, needed):
        version, _ = locked()[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_the_image_installs_by_hash_upon_a_digest() -> None:
    assert "pip install --no-cache-dir --require-hashes -r requirements-tested.txt" in DOCKERFILE
    # Our own package brings nothing along, and is built with what is there.
    assert "--no-deps --no-build-isolation ." in DOCKERFILE
    assert re.search(r"^ARG RAY_IMAGE\nFROM \$\{RAY_IMAGE\}$", DOCKERFILE, re.M), "has a default"
    [check] = re.findall(r"^RUN (case \"\$\{RAY_IMAGE\}\".* esac)$", DOCKERFILE, re.M)
    image = "rayproject/ray:2.60.0-py311-gpu"
    for named, code in ((f"{image}@sha256:0", 0), (image, 1), ("", 1)):
        done = subprocess.run(
            ["sh", "-c", check], env={"RAY_IMAGE": named}, check=False, capture_output=True
        )
        assert done.returncode == code, named


def test_the_bill_of_materials_lists_what_is_locked() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "cluster.image.sbom"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    )  # fmt: skip
    document = json.loads(printed.stdout)
    assert document == bill(LOCK)
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    assert document["version"] == 1
    listed = {canonicalize_name(each["name"]): each for each in document["components"]}
    assert len(listed) == len(document["components"])
    assert {name: each["version"] for name, each in listed.items()} == {
        name: version for name, (version, _) in locked().items()
    }
    for name, each in listed.items():
        assert each["type"] == "library"
        assert each["purl"] == each["bom-ref"] == f"pkg:pypi/{name}@{each['version']}"
