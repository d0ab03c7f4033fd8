"""A page in headless Chromium, driven by the DevTools protocol over two pipes."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a browser; ``events`` has what happened in it since it was opened."""

    def __init__(self, read: int, write: int) -> None:
        self.read, self.write, self.rest, self.n = read, write, b"", 0
        self.events: list[dict[str, Any]] = []
        self.session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        self.n += 1
        session = {"sessionId": self.session} if self.session else {}
        os.write(self.write, json.dumps({"id": self.n, "method": method, "params": params} | session).encode() + b"\0")
        while (message := self._next()).get("id") != self.n:
            self.events.append(message)
        assert "error" not in message, message
        return dict(message["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            received = os.read(self.read, 2**16)
            assert received, "the browser has ended"
            self.rest += received
        text, self.rest = self.rest.split(b"\0", 1)
        return dict(json.loads(text))

    def open(self, url: str) -> None:
        """Load a page completely."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start Chromium; it ends with the block."""
    assert CHROMIUM is not None
    to_child, to_parent = os.pipe(), os.pipe()
    # The browser reads commands from its file 3 and answers in 4: a shell moves the pipes there.
    command = f'exec "$@" 3<&{to_child[0]} 4>&{to_parent[1]}'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            ["bash", "-c", command, "bash", CHROMIUM, *flags], pass_fds=(to_child[0], to_parent[1]),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_child[0])
        os.close(to_parent[1])
        try:
            yield Browser(to_parent[0], to_child[1])
        finally:
            os.close(to_child[1])  # which ends it
            os.close(to_parent[0])
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
