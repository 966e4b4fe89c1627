"""A real Chromium without a window, driven by chromedriver's own protocol (W3C WebDriver): no package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver (apt-get install chromium chromium-driver)"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1300,1000", "--force-device-scale-factor=1"),
)
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Unusable(Exception):
    """Chromium is installed and does not start."""


class Browser:
    """One session. Elements inside shadow roots are reached by :meth:`run`, with ``deep(selector)`` defined in its script."""

    def __init__(self, address: str, profile: str) -> None:
        options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self._base = f"{address}/session"
        self._base += "/" + self._ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, content, {"Content-Type": "application/json"}, method=method)
        with _OPENER.open(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def open(self, page: Path, *, dark: bool = False, ready: str = "return document.body.dataset.ready !== undefined") -> None:
        """Open a file from disk, and wait until the page says that it is ready."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.cdp("Emulation.setEmulatedMedia", {"features": scheme})
        self._ask("POST", "/url", {"url": page.resolve().as_uri()})
        self.wait(ready)

    def cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a script."""
        return self._ask("POST", "/execute/sync", {"script": _DEEP + script, "args": list(arguments)})

    def wait(self, script: str, *arguments: Any, seconds: float = 10) -> None:
        """Until a script returns something true; AssertionError with what the console says if it does not."""
        waiting = "const [own, given, most, done] = arguments, f = new Function(own), until = performance.now() + most;"
        waiting += (
            "const look = () => f(...given) ? done(true) : performance.now() > until ? done(false) : setTimeout(look, 20);"
        )
        found = self._ask(
            "POST", "/execute/async", {"script": f"{waiting} look();", "args": [_DEEP + script, arguments, 1000 * seconds]}
        )
        assert found, f"never true: {script}\n{self.console()}"

    def point_at(self, x: float, y: float) -> None:
        """Move the mouse there, in pixels of the window."""
        moves = [{"type": "pointerMove", "duration": 0, "x": round(own_x), "y": round(y)} for own_x in (x - 3, x)]
        actions = [{"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": moves}]
        self._ask("POST", "/actions", {"actions": actions})

    def drag(self, begin: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one place, release at another."""
        moves: list[dict[str, Any]] = [{"type": "pointerMove", "duration": 0, "x": round(begin[0]), "y": round(begin[1])}]
        moves += [{"type": "pointerDown", "button": 0}]
        moves += [
            {"type": "pointerMove", "duration": 100, "x": round(end[0]), "y": round(end[1])},
            {"type": "pointerUp", "button": 0},
        ]
        self._ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": moves}]})

    def console(self) -> list[str]:
        """What the console has said since it was last asked: messages, errors and refusals of the page's policy."""
        return [f"{entry['level']}: {entry['message']}" for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def screenshot(self, *, whole: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        if not whole:
            return base64.b64decode(self._ask("GET", "/screenshot"))
        return base64.b64decode(self.cdp("Page.captureScreenshot", {"captureBeyondViewport": True})["data"])

    def close(self) -> None:
        self._ask("DELETE", "")


_DEEP = """
const deep = (selector, root = document) => [...root.querySelectorAll("*")].flatMap((element) =>
  [...(element.matches(selector) ? [element] : []), ...(element.shadowRoot ? deep(selector, element.shadowRoot) : [])]);
"""


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with a profile of its own; whatever happens, its processes end with the block."""
    assert DRIVER is not None
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver,
    ):
        assert driver.stdout is not None
        try:
            found = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
            port = next((match[1] for match in found if match), None)
            try:
                own = Browser(f"http://127.0.0.1:{port}", profile)
            except (OSError, ValueError) as error:  # no port, or no session: another version, a sandbox
                raise Unusable(f"chromium does not start here: {error}") from error
            try:
                yield own
            finally:
                own.close()
        finally:
            driver.terminate()
