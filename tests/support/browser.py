"""A headless Chromium, spoken to by its own protocol: what a page shows, says and asks for."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")
TIMEOUT_S = 600


def find_browser() -> str | None:
    """Return the path of a Chromium, if this machine has one."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


@dataclass
class Visit:
    """What happened while a page was open.

    Args:
        requests: URLs that the page asked for, itself included.
        complaints: What stood on its console, and what the browser refused.
        answers: Values of the expressions that were evaluated in it.
    """

    requests: list[str]
    complaints: list[str]
    answers: list[Any]


def visit(
    browser: str, page: Path, profile: Path, expressions: list[str], *, width: int = 1100, media: str = "screen"
) -> Visit:
    """Open a file in a window of ``width`` pixels, and evaluate JavaScript expressions in it.

    On paper (``media="print"``) the reader prefers dark pages: the screen's wish, of which paper should know nothing.
    """
    command = [browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = next(m[1] for line in process.stderr if (m := re.match(r"DevTools listening on (\S+)", line)))
        return asyncio.run(asyncio.wait_for(_visit(address, page.as_uri(), expressions, width, media), TIMEOUT_S))
    finally:
        process.kill()
        process.communicate()


async def _visit(address: str, url: str, expressions: list[str], width: int, media: str) -> Visit:
    async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
        talk = _Talk(socket)
        target = (await talk.ask("Target.createTarget", url="about:blank"))["targetId"]
        attached = await talk.ask("Target.attachToTarget", targetId=target, flatten=True)
        talk.session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            await talk.ask(f"{domain}.enable")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        await talk.ask("Emulation.setDeviceMetricsOverride", **size)
        if media == "print":
            dark = [{"name": "prefers-color-scheme", "value": "dark"}]
            await talk.ask("Emulation.setEmulatedMedia", media=media, features=dark)
        await talk.ask("Page.navigate", url=url)
        await talk.until("Page.loadEventFired")
        answers = [
            (await talk.ask("Runtime.evaluate", expression=e, returnByValue=True))["result"].get("value")
            for e in expressions
        ]
    requests = [p["request"]["url"] for name, p in talk.events if name == "Network.requestWillBeSent"]
    noisy = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    return Visit(requests, [str(p) for name, p in talk.events if name in noisy], answers)


class _Talk:
    """Questions, answers, and the events in between."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self.session: str | None = None
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._number = 0

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        await self.socket.send_json(message | ({"sessionId": self.session} if self.session else {}))
        while (answer := await self._next()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return dict(answer["result"])

    async def until(self, event: str) -> None:
        while event not in {name for name, _ in self.events}:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        message: dict[str, Any] = await self.socket.receive_json()
        if "method" in message:
            self.events.append((message["method"], message["params"]))
        return message
