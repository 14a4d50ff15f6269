"""A real browser without a window, steered by the Chrome DevTools Protocol over two pipes.

with Browser.start() as browser:
    page = browser.open(path, width=390, dark=True)
    assert page.evaluate("document.title") == "..."
"""

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu"),
    *("--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", "--disable-extensions"),
)
WAIT_SECONDS = 60.0
Json = dict[str, Any]


def found() -> str | None:
    """Return the browser of this machine; FRAMEBANK_BROWSER names another one."""
    names = [os.environ.get("FRAMEBANK_BROWSER"), *NAMES]
    return next((path for name in names if name and (path := shutil.which(name))), None)


@dataclass
class Browser:
    """A running browser."""

    into: int
    out: int
    buffer: bytes = b""
    number: int = 0
    events: list[Json] = field(default_factory=list)

    @classmethod
    @contextmanager
    def start(cls) -> "Iterator[Browser]":
        path = found()
        assert path
        theirs_in, into = os.pipe()
        out, theirs_out = os.pipe()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            # the protocol's pipes are 3 and 4 of the browser
            shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} 2> /dev/null'
            command = [path, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
            process = subprocess.Popen(
                ["bash", "-c", shell, "bash", *command], pass_fds=(theirs_in, theirs_out)
            )
            os.close(theirs_in)
            os.close(theirs_out)
            browser = cls(into, out)
            try:
                yield browser
            finally:
                browser.send("Browser.close")
                process.wait(WAIT_SECONDS)
                os.close(into)
                os.close(out)

    def send(self, method: str, session: str = "", **params: Any) -> Json:
        """Call a method; return its result. Events that come before it are kept."""
        self.number += 1
        message: Json = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, method: str) -> Json:
        """Return the next event of a name, or the first of those that came already."""
        for event in self.events:
            if event.get("method") == method:
                self.events.remove(event)
                return event
        while (event := self._read()).get("method") != method:
            self.events.append(event)
        return event

    def _read(self) -> Json:
        end = time.monotonic() + WAIT_SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.out], [], [], max(end - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            piece = os.read(self.out, 1 << 20)
            assert piece, "the browser has gone"
            self.buffer += piece
        line, _, self.buffer = self.buffer.partition(b"\0")
        return dict(json.loads(line))

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> "Page":
        """Open a file in a window of this size, and wait until it is there with all its pictures."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        page.send("Emulation.setEmulatedMedia", features=scheme)
        page.resize(width, height)
        page.send("Page.navigate", url=path.absolute().as_uri())
        self.wait_for("Page.loadEventFired")
        return page


@dataclass
class Page:
    """A tab of the browser."""

    browser: Browser
    session: str
    target: str

    def send(self, method: str, **params: Any) -> Json:
        return self.browser.send(method, self.session, **params)

    def resize(self, width: int, height: int = 900) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def evaluate(self, script: str) -> Any:
        """Return what a script of the test gives in the page."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code)

    def complaints(self) -> list[Json]:
        """Return what the console holds: errors, warnings, exceptions, refused requests."""
        return self.events("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")

    def requests(self) -> list[str]:
        """Return the addresses that the page asked for, pictures within itself left out."""
        events = self.events("Network.requestWillBeSent")
        addresses = [event["params"]["request"]["url"] for event in events]
        return [address for address in addresses if not address.startswith("data:")]

    def events(self, *names: str) -> list[Json]:
        own = [e for e in self.browser.events if e.get("sessionId") == self.session]
        return [event for event in own if event["method"] in names]

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        self.browser.send("Target.closeTarget", targetId=self.target)
