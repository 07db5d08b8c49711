"""`batch-scorer doctor URL`: the conformance suite from the command line."""

from pathlib import Path

from tests.helpers.gcs import GcsServer, Lie, gcs_server
from tests.helpers.in_process import run_cli
from tests.helpers.places import Place


def test_a_folder_that_keeps_the_protocol(tmp_path: Path) -> None:
    ended = run_cli("doctor", tmp_path, "--json")
    assert (ended.exit_code, ended.json["holds"], len(ended.json["checks"])) == (0, True, 10)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind


def test_a_store_that_ignores_conditions_exits_with_2(gcs: GcsServer) -> None:
    """`gcs` sets the keys; the store that breaks the promise is another server."""
    with gcs_server(Lie.NO_CONDITIONS) as server:
        place = Place(server.url("doctor"), server.options)
        ended = run_cli("doctor", place.url, *place.flags, "--json")
    assert (ended.exit_code, ended.json["holds"]) == (2, False)
    assert "create" in [check["name"] for check in ended.json["checks"] if check["problem"]]


def test_a_place_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    ended = run_cli("doctor", tmp_path / "nowhere")
    assert (ended.exit_code, ended.error) == (2, f"{tmp_path / 'nowhere'}: no such folder")
