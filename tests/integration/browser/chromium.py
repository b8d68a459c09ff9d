"""A tab of headless Chromium, and uvicorn for the pages that are loaded in it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from selenium.webdriver import ChromeOptions, Remote
from selenium.webdriver.chrome.remote_connection import ChromeRemoteConnection
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.command import Command

from tests.servers.process import HOST, POLL_SECONDS, find_binary

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from asgi_uow._asgi import ASGIApp
    from tests.integration.browser.servers import Chromium

FLAGS = """
    --headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync
"""
NOWHERE = f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {HOST}"
"""A page that asks another host for something makes the browser complain."""
DESKTOP, PHONE, SMALL = (1280, 900), (390, 844), (360, 640)

CONTRAST = """
    const light = ([red, green, blue]) => [red, green, blue]
      .map(each => each / 255)
      .map(each => each <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4)
      .reduce((sum, each, place) => sum + each * [.2126, .7152, .0722][place], 0)
    const numbers = color => color.match(/[\\d.]+/g).map(Number)
    const ground = element => {
      const [red, green, blue, opacity = 1] =
        numbers(getComputedStyle(element).backgroundColor)
      if (opacity === 1) return [red, green, blue]
      return element.parentElement ? ground(element.parentElement) : [255, 255, 255]
    }
    return [...document.body.querySelectorAll("*")]
      .filter(each => each.checkVisibility() && !each.closest("script, style"))
      .filter(each => [...each.childNodes]
        .some(({nodeType, data}) => nodeType === Node.TEXT_NODE && data.trim()))
      .map(each => {
        const text = light(numbers(getComputedStyle(each).color))
        const behind = light(ground(each))
        const ratio = (Math.max(text, behind) + .05) / (Math.min(text, behind) + .05)
        return [ratio, `${each.tagName} ${each.className}: ${each.textContent}`]
      })
      .filter(([ratio]) => ratio < 4.5)
"""
"""Texts with less contrast to what is behind them than WCAG asks for."""


@contextmanager
def opened(server: Chromium) -> Generator[Browser]:
    """Open a browser with an empty profile."""
    options = ChromeOptions()
    options.binary_location = find_binary("chromium") or ""
    profile = f"--user-data-dir={server.folder / 'profile'}"
    for flag in (*FLAGS.split(), NOWHERE, profile):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    remote = ChromeRemoteConnection(f"http://{HOST}:{server.port}")
    driver = Remote(remote, options=options)
    try:
        yield Browser(driver)
    finally:
        driver.quit()
        remote.close()  # type: ignore[no-untyped-call]


class Browser:
    """One tab, and what can be seen in it."""

    def __init__(self, driver: Remote) -> None:
        self.driver = driver

    def open(
        self, address: str, size: tuple[int, int] = DESKTOP, *, dark: bool = False
    ) -> None:
        """Load a page as a phone or a desktop shows it."""
        width, height = size
        screen = {"width": width, "height": height, "deviceScaleFactor": 1}
        self._tell("Emulation.setDeviceMetricsOverride", **screen, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self._tell("Emulation.setEmulatedMedia", features=[scheme, still])
        self.driver.get(address)

    def _tell(self, command: str, **parameters: object) -> None:
        what = {"cmd": command, "params": parameters}
        self.driver.execute("executeCdpCommand", what)

    def run(self, script: str, *arguments: object) -> Any:
        """Give what a script returns."""
        return self.driver.execute_script(script, *arguments)

    def run_to_end(self, script: str) -> Any:
        """Give what a script calls its last argument with."""
        return self.driver.execute_async_script(script)

    def top(self, selector: str) -> float:
        """Give how far below the top of the screen an element begins."""
        place = "document.querySelector(arguments[0]).getBoundingClientRect().top"
        return float(self.run(f"return {place}", selector))

    def texts(self, selector: str) -> list[str]:
        """Give the texts of all elements, as one reads them."""
        script = (
            "return [...document.querySelectorAll(arguments[0])].map(x => x.innerText)"
        )
        return [" ".join(text.split()) for text in self.run(script, selector)]

    def text(self, selector: str) -> str:
        """Give the text of the only element."""
        [text] = self.texts(selector)
        return text

    def press(self, selector: str, number: int = 0) -> None:
        """Click on an element, by its place among its like."""
        self.driver.find_elements(By.CSS_SELECTOR, selector)[number].click()

    def keys(self, keys: str) -> None:
        """Press keys where the focus is."""
        self.driver.switch_to.active_element.send_keys(keys)

    @property
    def is_too_wide(self) -> bool:
        """Whether the page scrolls sideways."""
        width = "return document.scrollingElement.scrollWidth > innerWidth"
        return bool(self.run(width))

    @property
    def hard_to_read(self) -> list[object]:
        """Give texts with a contrast below 4.5."""
        return [*self.run(CONTRAST)]

    def complaints(self) -> list[str]:
        """Give what the browser has logged: errors, and what the policy has refused."""
        log = self.driver.execute(Command.GET_LOG, {"type": "browser"})["value"]
        return [entry["message"] for entry in log]


def soon(expected: object, probe: Callable[[], object], within: float = 10.0) -> None:
    """Ask again until the answer is the expected one; fail when time is up."""
    deadline = time.monotonic() + within
    while (actual := probe()) != expected and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    assert expected == actual


@contextmanager
def serving(app: ASGIApp, port: int = 0) -> Generator[str]:
    """Serve an application by uvicorn in a thread; give its address."""
    with socket.create_server((HOST, port)) as listener:
        options: dict[str, Any] = {"log_config": None, "ws": "none", "lifespan": "auto"}
        config = uvicorn.Config(app, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://{HOST}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
