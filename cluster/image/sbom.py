"""The packages of the image as a software bill of materials, in CycloneDX 1.5.

    python -m cluster.image.sbom > sbom.json

Read from requirements-tested.txt, which is what the image installs, so it takes no network and no
image. What the base image holds beside it is not listed.
"""

import json
import re
from pathlib import Path
from typing import Any

from batch_scorer.version import __version__

_REPOSITORY = Path(__file__).parents[2]
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)", re.MULTILINE)


def bill(requirements: str) -> dict[str, Any]:
    """The document for the text of a requirements file with exact versions."""
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": _component("batch-scorer", __version__, "application")},
        "components": [
            _component(name, version, "library") for name, version in _PINNED.findall(requirements)
        ],
    }


def _component(name: str, version: str, kind: str) -> dict[str, str]:
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version}"
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl}


if __name__ == "__main__":
    print(json.dumps(bill((_REPOSITORY / "requirements-tested.txt").read_text()), indent=1))
