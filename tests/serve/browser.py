"""Chromium without a window, driven over its DevTools protocol: JSON through two pipes, no library needed."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_KEYS = {"Enter": ("\r", 13), "Tab": ("", 9), "Escape": ("", 27)}


def find_chromium() -> str | None:
    """The first one on the path; STROP_TEST_CHROMIUM names another."""
    named = os.environ.get("STROP_TEST_CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Browser:
    """A process of Chromium with a profile of its own. Use it as a context manager."""

    def __init__(self, executable: str, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._messages, messages = os.pipe()

        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        options += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--no-sandbox"]
        in_place = f'exec "$0" "$@" 3< /dev/fd/{commands} 4> /dev/fd/{messages}'  # where Chromium expects them
        self._process = subprocess.Popen(
            ["sh", "-c", in_place, executable, *options, "about:blank"],
            pass_fds=(commands, messages),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands)
        os.close(messages)
        self._numbers = itertools.count(1)
        self._received = b""
        self.events: list[dict[str, Any]] = []
        """All that came unasked, oldest first."""

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (self._commands, self._messages):  # it ends with its pipes
            os.close(handle)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command; AssertionError if it failed."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._next()
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def page(self, **media: str) -> "Page":
        """A new one. media: features such as prefers_color_scheme="dark"."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Page(self, target, session, media)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            assert select.select([self._messages], [], [], 60)[0], "Chromium says nothing"
            piece = os.read(self._messages, 1 << 20)
            assert piece, f"Chromium ended with {self._process.poll()}"
            self._received += piece
        message, _, self._received = self._received.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        return parsed


class Page:
    """A tab. Keeps what it logged and what it asked for."""

    def __init__(self, browser: Browser, target: str, session: str, media: dict[str, str]) -> None:
        self._browser, self._target, self._session = browser, target, session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """See Browser.call."""
        return self._browser.call(method, self._session, **params)

    def resize(self, width: int, height: int) -> None:
        """In CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def open(self, url: str) -> None:
        """Goes there and waits until it is loaded."""
        self._load("Page.navigate", url=url)

    def reload(self) -> None:
        """As F5 does; waits until it is loaded."""
        self._load("Page.reload")

    def _load(self, method: str, **params: str) -> None:
        num_loads, end_s = len(self.events("Page.loadEventFired")), time.monotonic() + 60
        self.call(method, **params)
        while len(self.events("Page.loadEventFired")) == num_loads:
            assert time.monotonic() < end_s, f"{method} {params} takes too long"
            time.sleep(0.02)

    def evaluate(self, expression: str) -> Any:
        """The value of some JavaScript, awaited; AssertionError if it throws."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait_for(self, expression: str, timeout_s: float = 60.0) -> Any:
        """The first true value of some JavaScript."""
        end_s = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end_s, (
                f"in vain: {expression}; the page says {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.02)
        return value

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key of the keyboard."""
        text, code = _KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def screenshot(self, path: Path) -> None:
        """As a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of the events of these kinds so far."""
        self._browser.call("Browser.getVersion")  # what happened before has been told before this answer
        mine = [event for event in self._browser.events if event.get("sessionId") == self._session]
        return [event["params"] for event in mine if event["method"] in methods]

    @property
    def complaints(self) -> list[str]:
        """Errors and warnings of the console, uncaught exceptions, and what the browser has against the page."""
        said = [call for call in self.events("Runtime.consoleAPICalled") if call["type"] in ("error", "warning")]
        logged = [event["entry"] for event in self.events("Log.entryAdded")]
        thrown = self.events("Runtime.exceptionThrown")
        return [json.dumps(fact)[:500] for fact in (*said, *logged, *thrown)]

    @property
    def requests(self) -> list[str]:
        """The URLs it asked for."""
        return [event["request"]["url"] for event in self.events("Network.requestWillBeSent")]

    def close(self) -> None:
        """Ends it."""
        self._browser.call("Target.closeTarget", targetId=self._target)
