"""Drives Chromium over a pipe (the DevTools protocol) as a person would, with the scripts of pages
switched off.
"""

import base64
import fcntl
import itertools
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pages import CHROMIUM, OPTIONS

KEYS = {"Tab": 9, "Enter": 13}

# JavaScript that returns the lowest contrast of any text with its background, and that text.
CONTRAST = """(() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = parts(colour).map((x) => x / 255)
      .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let lowest = [21, ""];
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || e.closest("svg, style")) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => x - y);
    const contrast = (b + 0.05) / (a + 0.05);
    if (contrast < lowest[0]) lowest = [contrast, texts.currentNode.data];
  }
  return lowest;
})()"""


class Browser:
    """A browser with one page; a context manager."""

    def __init__(self, directory: Path):
        # Chromium reads from descriptor 3 and writes to 4, so ours must have other numbers.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for pair in (os.pipe(), os.pipe())
                for end in pair]  # fmt: skip
        theirs = ends[0], ends[3]
        self.process = subprocess.Popen(
            [CHROMIUM, *OPTIONS, f"--user-data-dir={directory}", "--remote-debugging-pipe"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=(3, 4), start_new_session=True,
            preexec_fn=lambda: (os.dup2(theirs[0], 3), os.dup2(theirs[1], 4)),
        )  # fmt: skip
        for end in theirs:
            os.close(end)
        self.writing, self.reading = open(ends[1], "wb", 0), open(ends[2], "rb", 0)  # noqa: SIM115
        self.numbers, self.unread = itertools.count(1), b""
        self.session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Log", "Runtime"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setScriptExecutionDisabled", value=True)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self.session = {}
        self.ask("Browser.close")
        self.process.wait(60)
        self.writing.close()
        self.reading.close()

    # --- the protocol ---

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.unread:
            read = self.reading.read(1 << 16)
            assert read, "chromium has ended"
            self.unread += read
        message, _, self.unread = self.unread.partition(b"\0")
        return json.loads(message)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | self.session
        self.writing.write(json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    # --- a person ---

    def after_loading(self, act: Callable[[], object]) -> None:
        """Do `act` and block until a page has been loaded."""
        self.events = [e for e in self.events if e.get("method") == "Log.entryAdded"]
        act()
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.read())

    def open(self, url: str) -> None:
        self.after_loading(lambda: self.ask("Page.navigate", url=url))

    def appearance(self, width: int, scheme: str) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900,
                 deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", features=[feature])

    def press(self, key: str) -> None:
        pressed = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **pressed, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def type(self, text: str) -> None:
        self.ask("Input.insertText", text=text)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression of the test's, evaluated in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    @property
    def complaints(self) -> list[str]:
        """The browser's errors and warnings, such as violations of the page's security policy."""
        entries = [e["params"]["entry"] for e in self.events if e.get("method") == "Log.entryAdded"]
        return [entry["text"] for entry in entries]

    def picture(self, file: Path) -> None:
        shown = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shown["data"]))
