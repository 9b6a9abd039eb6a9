"""Drives a headless Chromium through its DevTools protocol."""

import asyncio
import base64
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


class Page:
    """A tab. errors: the exceptions of its scripts and what its security policy refused."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.errors, self.number = socket, [], 0

    async def send(self, method: str, **parameters: Any) -> dict:
        self.number += 1
        await self.socket.send_json(dict(id=self.number, method=method, params=parameters))
        while True:
            message = await self.socket.receive_json(timeout=60)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(message["params"])
            if message.get("id") == self.number:
                assert "error" not in message, message
                return message["result"]

    async def run(self, script: str) -> Any:
        """The value of an expression, or of its promise."""
        found = await self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, condition: str) -> None:
        """Returns once an expression is true."""
        while not await self.run(f"!!({condition})"):
            await asyncio.sleep(0.05)

    async def open(self, url: str, width: int = 1200, dark: bool = False) -> None:
        for domain in ("Page", "Runtime", "Log", "DOM"):
            await self.send(f"{domain}.enable")
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        await self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = dict(name="prefers-color-scheme", value="dark" if dark else "light")
        await self.send("Emulation.setEmulatedMedia", features=[scheme])
        await self.send("Page.navigate", url=url)
        await self.until(f"location.href.startsWith({url!r}) && document.readyState === 'complete'")

    async def choose_file(self, selector: str, path: Path) -> None:
        root = (await self.send("DOM.getDocument"))["root"]["nodeId"]
        node = await self.send("DOM.querySelector", nodeId=root, selector=selector)
        await self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node["nodeId"])

    async def screenshot(self, path: Path) -> None:
        found = await self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


@asynccontextmanager
async def browser_page():
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        process = subprocess.Popen(
            [BROWSER, *options, "--remote-debugging-port=0", "about:blank"],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # "DevTools listening on ws://127.0.0.1:PORT/devtools/browser/..."
            line = next(line for line in process.stderr if "listening on ws://" in line)
            port = line.split("ws://127.0.0.1:")[1].split("/")[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                    tabs = await answer.json()
                address = next(t for t in tabs if t["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=2**26) as socket:
                    yield Page(socket)
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # its renderers too
            process.wait()
            process.stderr.close()
