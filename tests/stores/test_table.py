"""The table of stores in docs/commit-protocol.md, measured: what each shows of one object."""

from typing import Any

import obstore
from obstore.store import LocalStore, from_url

from tests.helpers.program import REPOSITORY
from tests.helpers.stores import AnyStore


def rows_of_the_table() -> dict[str, list[str]]:
    page = (REPOSITORY / "docs" / "commit-protocol.md").read_text()
    table = page.split("| store | put and head show |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def raw_store(any_store: AnyStore) -> Any:
    """As the client library sees it, without anything of ours between."""
    url, options = any_store.place.url, dict(any_store.place.options)
    if any_store.server is None:
        return LocalStore(url, mkdir=True)
    allow_http = options.pop("allow_http") == "true"
    return from_url(url, config=options, client_options={"allow_http": allow_http})  # type: ignore


def shown(answer: Any) -> str:
    tag = "tag in quotes" if answer["e_tag"].startswith('"') else "tag without quotes"
    return f"{tag}, version" if answer["version"] else tag


def stays(store: Any, key: str, version: str | None) -> str:
    """Whether the deleted object can still be read by those who know its version."""
    if version is None:
        return "nothing stays"
    try:
        obstore.get(store, key, options={"version": version})
    except FileNotFoundError:
        return "nothing stays"
    return "the old version stays"


def test_the_table_shows_what_each_store_shows(any_store: AnyStore) -> None:
    store = raw_store(any_store)
    put = obstore.put(store, "k", b"1")
    head = obstore.head(store, "k")
    (listed,) = [meta for page in obstore.list(store) for meta in page]
    obstore.delete(store, "k")
    assert shown(put) == shown(head)
    measured = [shown(put), shown(listed), stays(store, "k", put["version"])]
    assert rows_of_the_table()[any_store.name] == measured
