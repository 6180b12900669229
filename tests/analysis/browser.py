"""A real browser, told what to do over its own pipe: Chromium's DevTools protocol, and nothing to install for it."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from analysis.page.static_figures import browser

CHROMIUM = browser()
BASH = shutil.which("bash")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    "--disable-component-update --remote-debugging-pipe --hide-scrollbars"
).split()
PATIENCE_S = 90


class Browser:
    """One browser and one page of it, `width` by 900 pixels, in the light or the dark scheme."""

    def __init__(self, profile: Path):
        (to_read, self._to_write), (self._from_read, from_write) = os.pipe(), os.pipe()
        # It reads its orders from file 3 and answers on file 4.
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{from_write}'
        self._process = subprocess.Popen(
            [str(BASH), "-c", command, str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, from_write), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read), os.close(from_write)
        self._asked, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []
        page = next(of for of in self._ask("Target.getTargets")["targetInfos"] if of["type"] == "page")
        attached = self._ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **about: Any) -> dict[str, Any]:
        return self._ask(method, self._session, **about)

    def _ask(self, method: str, session: str | None = None, **about: Any) -> dict[str, Any]:
        self._asked += 1
        order = {"id": self._asked, "method": method, "params": about} | ({"sessionId": session} if session else {})
        os.write(self._to_write, json.dumps(order).encode() + b"\0")
        while True:
            said = self._next()
            if said.get("id") == self._asked:
                assert "error" not in said, said["error"]
                return said["result"]
            self.events.append(said)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._from_read, 1 << 16)
            assert read, "the browser ended"
            self._rest += read
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def open(self, page: Path, width: int = 1400, scheme: str = "light") -> None:
        """Show a page of figures until all of them are drawn; `events` are of this page alone from here on."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events = []
        self.ask("Page.navigate", url=page.resolve().as_uri())
        self.wait_until("performance.getEntriesByName('all drawn').length > 0")

    def wait_until(self, condition: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def evaluate(self, expression: str) -> Any:
        """Of the page, as its own policy does not forbid to the one at the controls."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """What the page wrote to the console, threw, or was denied."""
        self.evaluate("0")  # what is on its way arrives before the answer
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"])[:500] for event in self.events if event.get("method") in kinds]

    def loaded(self) -> list[str]:
        """The addresses it asked for, besides what it holds itself."""
        asked = [
            of["params"]["request"]["url"] for of in self.events if of.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def close(self) -> None:
        self._ask("Browser.close")
        self._process.wait(PATIENCE_S)
        os.close(self._to_write), os.close(self._from_read)
