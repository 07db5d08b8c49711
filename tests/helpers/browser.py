"""A headless Chromium with one tab, driven through its DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_START_TIMEOUT_S = 120
_MOST_BYTES = 1 << 28


def chromium() -> str:
    """The browser's program; raises where there is none."""
    for name in _NAMES:
        if found := shutil.which(name):
            return found
    raise FileNotFoundError(f"no {' or '.join(_NAMES)} here: on Debian, apt-get install chromium")


@dataclass
class Tab:
    """`events` are all that the browser has told of the tab, oldest first."""

    socket: aiohttp.ClientWebSocketResponse
    session: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; raises where the browser refuses it."""
        number = next(self._numbers)
        body = {"id": number, "method": method, "params": parameters}
        await self.socket.send_json(body | ({"sessionId": self.session} if self.session else {}))
        while (told := await self._next()).get("id") != number:
            pass
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        result: dict[str, Any] = told["result"]
        return result

    async def _next(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(await self.socket.receive_str())
        if "method" in told:
            self.events.append(told)
        return told

    async def wait_for(self, method: str) -> None:
        """Until the browser has told this, since the last time that events were cleared."""
        while not any(event["method"] == method for event in self.events):
            await self._next()

    async def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    async def open(self, url: str) -> None:
        self.events.clear()
        await self.call("Page.navigate", url=url)
        await self.wait_for("Page.loadEventFired")

    async def press(self, key: str) -> None:
        codes = {"Tab": (9, ""), "Enter": (13, "\r")}
        code, text = codes[key]
        for kind in ("keyDown", "keyUp"):
            given = {"text": text} if text and kind == "keyDown" else {}
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
                **given,
            )

    async def screenshot(self) -> bytes:
        """PNG of the whole page."""
        taken = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(taken["data"])


@asynccontextmanager
async def browser_tab() -> AsyncIterator[Tab]:
    """A tab of a browser of its own, which is gone afterwards."""
    with TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as folder:
        process = await asyncio.create_subprocess_exec(
            *(chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--remote-debugging-port=0"),
            *(f"--user-data-dir={folder}", "about:blank"),
            stdout=DEVNULL,
            stderr=DEVNULL,
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                url = await _address(Path(folder) / "DevToolsActivePort")
            async with (
                aiohttp.ClientSession() as client,
                client.ws_connect(url, max_msg_size=_MOST_BYTES) as socket,
            ):
                tab = Tab(socket)
                made = await tab.call("Target.createTarget", url="about:blank")
                target = made["targetId"]
                attached = await tab.call("Target.attachToTarget", targetId=target, flatten=True)
                tab.session = attached["sessionId"]
                for part in ("Page", "Runtime", "Network", "Log"):
                    await tab.call(f"{part}.enable")
                yield tab
        finally:
            process.kill()
            await process.wait()


async def _address(file: Path) -> str:
    """Where the browser listens, once it has written so."""
    while not (file.exists() and len(lines := file.read_text().split()) == 2):
        await asyncio.sleep(0.05)
    port, path = lines
    return f"ws://127.0.0.1:{port}{path}"
