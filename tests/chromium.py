"""Headless Chromium over its DevTools pipe: what a page rendered, logged and asked the network for."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
PATIENCE = 60.0  # seconds for any answer; a loaded machine starts a browser slowly


class Browser:
    """One tab. requests: the URLs that were asked for. complaints: errors, warnings and exceptions of the console."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._buffer, self._count = commands, answers, b"", 0
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._events: list[str] = []
        target = self._ask("Target.createTarget", {"url": "about:blank"}, session=None)["targetId"]
        attached = self._ask("Target.attachToTarget", {"targetId": target, "flatten": True}, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._ask(f"{domain}.enable")

    def open(self, path: Path, width: int = 1200, dark: bool = False) -> None:
        """Loads a file in a window of that width and waits until it has loaded."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", {"features": [scheme]})
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self._ask("Emulation.setDeviceMetricsOverride", metrics)
        self._events.clear()
        self._ask("Page.navigate", {"url": path.resolve().as_uri()})
        while "Page.loadEventFired" not in self._events:
            self._note(self._read())

    def evaluate(self, expression: str) -> Any:
        """The JSON value of a JavaScript expression, a promise awaited."""
        question = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self._ask("Runtime.evaluate", question)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def dom(self) -> str:
        return str(self.evaluate("document.documentElement.outerHTML"))

    def screenshot(self, path: Path) -> bytes:
        """The whole page as a PNG, not only what fits the window."""
        answer = self._ask("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
        content = base64.b64decode(answer["data"])
        path.write_bytes(content)
        return content

    def _ask(
        self, method: str, parameters: dict[str, Any] | None = None, session: str | None = "own"
    ) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer["error"])
                return dict(answer["result"])
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        """The next message; they end with a zero byte."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"Chromium has not answered for {PATIENCE:.0f} s"
            piece = os.read(self._answers, 1 << 20)
            assert piece, "Chromium has ended"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        method, details = event.get("method", ""), event.get("params", {})
        self._events.append(method)
        if method == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(details["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(details["args"]))
        elif method == "Log.entryAdded" and details["entry"]["level"] in ("error", "warning"):
            self.complaints.append(details["entry"]["text"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A fresh Chromium with `profile`, a folder that does not exist yet, as its user data; ended afterwards."""
    assert PROGRAM is not None
    profile.mkdir()
    hears, says = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4; only a shell can place them there safely.
    command = f'exec "$0" "$@" 3<&{hears[0]} 4>&{says[1]}'
    switches = [*SWITCHES, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", command, PROGRAM, *switches],
        pass_fds=(hears[0], says[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for descriptor in (hears[0], says[1]):
        os.close(descriptor)
    try:
        yield Browser(hears[1], says[0])
    finally:
        process.kill()
        process.wait()
        for descriptor in (hears[1], says[0]):
            os.close(descriptor)
