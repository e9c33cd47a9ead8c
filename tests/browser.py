"""A headless Chromium spoken to over a pipe: opens a page, moves the pointer, takes screenshots, collects complaints.

Chrome DevTools Protocol: JSON messages that end in a zero
byte, on file descriptors 3 (to it) and 4 (from it)."""
import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """One page in one browser. `complaints` holds console errors and warnings, uncaught errors and network requests."""
    def __init__(self, width: int = 1280, height: int = 900, dark: bool = False):
        self.complaints, self.number, self.unread = [], 0, b""
        self.profile = tempfile.mkdtemp()
        to_read, self.write_end = os.pipe()
        self.read_end, to_write = os.pipe()
        # The shell gives the browser's ends of the pipes the numbers that it wants.
        start = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 "--remote-debugging-pipe", "--disable-background-networking", "--no-first-run",
                 f"--user-data-dir={self.profile}"]
        self.process = subprocess.Popen(["bash", "-c", start, "bash", CHROMIUM, *flags,
                                         "about:blank"],
                                        pass_fds=(to_read, to_write), stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.session = None
        target = next(t for t in self.ask("Target.getTargets")["targetInfos"]
                      if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.resize(width, height)

    def ask(self, method: str, **params) -> dict:
        """Send one command and return its result. Events that come before it are looked through."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            got = self.receive()
            if got.get("id") == self.number:
                assert "error" not in got, f"{method}: {got['error']}"
                return got["result"]
            self.note(got)

    def receive(self, seconds: float = 60) -> dict:
        while b"\0" not in self.unread:
            ready, _, _ = select.select([self.read_end], [], [], seconds)
            assert ready, "the browser is silent"
            part = os.read(self.read_end, 1 << 20)
            assert part, "the browser ended"
            self.unread += part
        message, self.unread = self.unread.split(b"\0", 1)
        return json.loads(message)

    def note(self, event: dict) -> None:
        """Keep what a page without errors and without network does not say."""
        method, p = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(p["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning", "assert"):
            self.complaints.append(str([a.get("value") for a in p["args"]]))
        elif method == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"):
            self.complaints.append(p["entry"]["text"])
        elif method == "Network.requestWillBeSent" and not p["request"]["url"].startswith(("file:", "data:", "about:")):
            self.complaints.append(f"request to {p['request']['url']}")

    def resize(self, width: int, height: int) -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=False)

    def open(self, path: Path, fragment: str = "") -> None:
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=f"file://{path}{fragment}")
        for _ in range(200):
            if self.run("document.readyState === 'complete' && location.href !== 'about:blank'"):
                break
            time.sleep(0.05)
        self.settle()

    def run(self, expression: str):
        """The value of a JavaScript expression. Raises AssertionError if it throws."""
        got = self.ask("Runtime.evaluate", expression=expression, returnByValue=True,
                       awaitPromise=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def settle(self) -> None:
        """Wait for two frames, and for the charts, which follow when the pointer rests."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => "
                 "setTimeout(done, 150))))")

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the pointer over a place in an element, given in shares of its width and height."""
        box = self.run(f"(e => {{ e.scrollIntoView({{block: 'center'}}); const b = "
                       "e.getBoundingClientRect(); "
                       f"return [b.x, b.y, b.width, b.height]; }})(document.querySelector({json.dumps(selector)}))")
        self.ask("Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + x * box[2],
                 y=box[1] + y * box[3])
        self.settle()

    def press(self, key: str) -> None:
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key,
                 text=key if len(key) == 1 else "")
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.settle()

    def screenshot(self, path: Path, whole: bool = True) -> None:
        got = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(got["data"]))

    def close(self) -> None:
        os.close(self.write_end)
        os.close(self.read_end)
        self.process.terminate()
        self.process.wait(20)
        shutil.rmtree(self.profile, ignore_errors=True)
