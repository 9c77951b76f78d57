"""Headless Chromium, driven by its DevTools protocol through a pair of pipes: no port, no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra.system_packages import program

_ABOVE = 10  # descriptors that do not clash with 3 and 4, which the browser reads and writes
_ANSWER_SECONDS = 30.0


class Browser:
    """One browser with one page. What the page complains of is kept in `complaints`."""

    def __init__(self, folder: Path) -> None:
        self.complaints: list[str] = []
        self._folder, self._number, self._rest = folder, 0, b""
        self._session = ""

    def __enter__(self) -> Self:
        (read_end, self._write), (self._read, write_end) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, _ABOVE) for end in (read_end, write_end)]
        command = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        options += ["--disable-background-networking", "--disable-dev-shm-usage", "--hide-scrollbars"]
        chromium = program("chromium")
        assert chromium, "mark it browser: without Chromium it is skipped"
        self._child = subprocess.Popen(
            ["bash", "-c", command, "browser", chromium, *options, f"--user-data-dir={self._folder}", "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_end, write_end, *theirs):
            os.close(end)
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self.ask(f"{part}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.wait()
        os.close(self._write)
        os.close(self._read)

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call of the protocol, and its answer."""
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < deadline:
            for told in self._messages(deadline):
                if told.get("id") == number:
                    assert "error" not in told, (method, told["error"])
                    return dict(told["result"])
                self._hear(told)
        raise TimeoutError(method)

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Show a file's page, in a window of that size."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        deadline = time.monotonic() + _ANSWER_SECONDS
        while self.run("document.readyState") != "complete" or self.run("location.href") == "about:blank":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.settle()

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def box(self, selector: str, number: int = 0) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the window, after it was scrolled to."""
        found = f"document.querySelectorAll({json.dumps(selector)})[{number}]"
        self.run(f"{found}.scrollIntoView({{block: 'center'}})")
        self.settle()
        left, top, width, height = self.run(
            f"(() => {{ const b = {found}.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; }})()"
        )
        return left, top, width, height

    def click(self, selector: str, number: int = 0) -> None:
        """Click into the middle of an element, as a person does."""
        left, top, width, height = self.box(selector, number)
        self.drag((left + width / 2, top + height / 2), (left + width / 2, top + height / 2))

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press at one place of the window and let go at another."""
        self.point(start)
        self._mouse("mousePressed", start)
        if start != end:
            self.point(((start[0] + end[0]) / 2, end[1]), pressed=True)
            self.point(end, pressed=True)
        self._mouse("mouseReleased", end)
        self.settle()

    def point(self, place: tuple[float, float], *, pressed: bool = False) -> None:
        """Move the pointer."""
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1], buttons=int(pressed))

    def press(self, key: str) -> None:
        """Press one key."""
        text = {"text": key} if len(key) == 1 else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)
        self.settle()

    def picture(self, file: Path, *, whole: bool = True) -> None:
        """A PNG of the page."""
        file.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def _mouse(self, kind: str, place: tuple[float, float]) -> None:
        self.ask("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", buttons=1, clickCount=1)

    def _messages(self, deadline: float) -> list[dict[str, Any]]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0], (
                "the browser is silent"
            )
            received = os.read(self._read, 1 << 20)
            assert received, "the browser has ended"
            self._rest += received
        *whole, self._rest = self._rest.split(b"\0")
        return [json.loads(text) for text in whole]

    def _hear(self, told: dict[str, Any]) -> None:
        method, about = told.get("method"), told.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.complaints.append(str(about["entry"]))
        elif method == "Runtime.consoleAPICalled" and about.get("type") in ("error", "warning", "assert"):
            self.complaints.append(str(about["args"]))
