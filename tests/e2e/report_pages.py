"""Pages of reports as a real browser shows them: `make report-pages`. Needs Chromium."""

import asyncio
import os
import re
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import Tab, browser_tab
from tests.helpers.ensembles import ensemble_output
from tests.helpers.in_process import run_cli
from tests.helpers.nights import nightly_root
from tests.helpers.places import Place
from tests.helpers.scored import scored_output
from tests.helpers.tiny import tiny_reward_model

WIDTHS = (390, 1280, 1920)
SCHEMES = ("light", "dark")
_LEAST_CONTRAST = 4.5
"""WCAG 2.2, level AA, for text of the usual size."""

_COLOURS = """
[...document.querySelectorAll('h1, p, a, summary, dt, dd, td, th, pre, svg text')].map(one => {
  const style = getComputedStyle(one)
  let behind = one, paper = 'rgba(0, 0, 0, 0)'
  while (behind && paper === 'rgba(0, 0, 0, 0)') {
    paper = getComputedStyle(behind).backgroundColor
    behind = behind.parentElement
  }
  return [one.tagName, one instanceof SVGElement ? style.fill : style.color, paper]
})
"""


@dataclass(frozen=True)
class View:
    """The page at one width, in one scheme; `open_width` is that with every table open."""

    events: list[dict[str, Any]]
    title: str
    inner_width: int
    client_width: int
    width: int
    open_width: int
    paper: str
    colours: list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reward_model(tmp_path_factory.mktemp("other") / "other", bos=True)


@pytest.fixture(scope="module", params=["scored", "compared", "nights", "ensemble"])
def page(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    other_model: Path,
) -> Path:
    place = Place(str(tmp_path_factory.mktemp("output")))
    compared: tuple[str, ...] = ()
    if request.param == "nights":
        output, _ = nightly_root(place, tiny_model, other_model)
    elif request.param == "ensemble":
        output, _ = ensemble_output(place)
    else:
        output = scored_output(place, tiny_model, "a")
    if request.param == "compared":
        compared = ("--compare", scored_output(place, other_model, "b").url)
    file = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    ended = run_cli("report", output.url, *compared, "--html", file)
    assert ended.exit_code == 0, ended.err
    return file


@pytest.fixture(scope="module")
def views(page: Path) -> dict[tuple[int, str], View]:
    """All of them in one browser; SCREENSHOTS names a folder for what they look like."""

    async def look() -> dict[tuple[int, str], View]:
        async with browser_tab() as tab:
            return {
                (width, scheme): await _view(tab, page, width, scheme)
                for width, scheme in product(WIDTHS, SCHEMES)
            }

    return asyncio.run(look())


async def _view(tab: Tab, page: Path, width: int, scheme: str) -> View:
    await tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=False,
    )
    feature = {"name": "prefers-color-scheme", "value": scheme}
    await tab.call("Emulation.setEmulatedMedia", features=[feature])
    await tab.open(page.as_uri())
    scroll_width = "document.documentElement.scrollWidth"
    found = View(
        events=[*tab.events],
        title=await tab.evaluate("document.title"),
        inner_width=await tab.evaluate("innerWidth"),
        client_width=await tab.evaluate("document.documentElement.clientWidth"),
        width=await tab.evaluate(scroll_width),
        paper=await tab.evaluate("getComputedStyle(document.body).backgroundColor"),
        colours=await tab.evaluate(_COLOURS),
        open_width=await tab.evaluate(
            "document.querySelectorAll('details').forEach(one => one.open = true), " + scroll_width
        ),
    )
    if folder := os.environ.get("SCREENSHOTS"):
        await tab.open(page.as_uri())
        Path(folder, f"{page.stem}-{width}-{scheme}.png").write_bytes(await tab.screenshot())
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_asks_for_nothing_and_has_no_error(
    width: int, scheme: str, views: dict[tuple[int, str], View], page: Path
) -> None:
    view = views[width, scheme]
    assert view.inner_width == width
    assert max(view.width, view.open_width) <= view.client_width <= width
    requests = [
        event["params"]["request"]["url"]
        for event in view.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    methods = {event["method"] for event in view.events}
    assert not methods & {
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Log.entryAdded",
    }, view.events


def test_markup_in_the_data_is_text(views: dict[tuple[int, str], View], page: Path) -> None:
    html = page.read_text()
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert "compared" in page.name or "&lt;script&gt;document.title=" in html
    assert {view.title.split(" of ")[0] for view in views.values()} == {"Scores"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_text_can_be_read(scheme: str, views: dict[tuple[int, str], View]) -> None:
    view = views[390, scheme]
    assert len(view.colours) > 100
    weak = {each for each in map(tuple, view.colours) if _contrast(*each[1:]) < _LEAST_CONTRAST}
    assert weak == set()
    assert views[390, "light"].paper != views[390, "dark"].paper


def _contrast(ink: str, paper: str) -> float:
    light, dark = sorted((_luminance(ink), _luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_every_table_is_reached_and_opened_by_keys_alone(page: Path) -> None:
    async def walk() -> tuple[set[str], int, set[str]]:
        focused = "document.activeElement"
        async with browser_tab() as tab:
            await tab.open(page.as_uri())
            total = await tab.evaluate("document.querySelectorAll('details').length")
            opened, outlines = set(), set()
            for _ in range(20 + 4 * total):
                await tab.press("Tab")
                outlines.add(await tab.evaluate(f"getComputedStyle({focused}).outlineStyle"))
                if await tab.evaluate(f"{focused}.tagName") == "SUMMARY":
                    await tab.press("Enter")
                    if await tab.evaluate(f"{focused}.parentElement.open"):
                        opened.add(await tab.evaluate(f"{focused}.innerText"))
                if len(opened) == total:
                    break
            return opened, total, outlines

    opened, total, outlines = asyncio.run(walk())
    assert len(opened) == total > 2
    assert outlines == {"solid"}


def test_drawings_have_names_and_tables(page: Path) -> None:
    async def look() -> Any:
        async with browser_tab() as tab:
            await tab.open(page.as_uri())
            return await tab.evaluate(
                "[...document.querySelectorAll('figure')].filter(one => one.querySelector('svg'))"
                ".map(one => [one.querySelector('svg').getAttribute('role'),"
                " one.querySelector('svg').getAttribute('aria-label'),"
                " one.querySelector('h3').innerText, one.querySelectorAll('td').length])"
            )

    figures = asyncio.run(look())
    assert len(figures) > 2
    for role, label, title, cells in figures:
        assert (role, label) == ("img", title)
        assert cells > 1


def test_it_prints(page: Path) -> None:
    async def print_it() -> str:
        async with browser_tab() as tab:
            await tab.open(page.as_uri())
            return str((await tab.call("Page.printToPDF"))["data"])

    assert asyncio.run(print_it()).startswith("JVBERi0")  # %PDF-, in base64
