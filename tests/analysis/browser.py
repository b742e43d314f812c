"""A headless Chromium that writes down what it asks of any network; tests skip where it is not installed."""

from __future__ import annotations

import json
import shutil
import time
from typing import Any

import pytest


class Browser:
    """Selenium's driver, and what the tests of the page ask of it again and again."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def __getattr__(self, name: str) -> Any:
        return getattr(self.driver, name)

    def open(self, address: str) -> None:
        """Open a page afresh, and wait until all of it is drawn."""
        self.driver.get("about:blank")
        self.logs()
        self.driver.get(address)
        self.wait_ready()

    def wait_ready(self, seconds: float = 60) -> str:
        """Wait until the page has drawn what its state says; returns that state, its link."""
        script = "const { ready } = document.documentElement.dataset; return ready && ready === toHash() && ready"
        return str(self.wait(script, seconds))  # before it has drawn once there may be nothing to make a link of

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Wait until a script gives something true, and return that."""
        stop = time.monotonic() + seconds
        while not (found := self.driver.execute_script(script)):
            assert time.monotonic() < stop, f"not so within {seconds} s: {script}"
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        return str(self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector))

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def logs(self) -> tuple[list[str], list[str]]:
        """The console's errors and warnings, and the addresses asked for, since the last call."""
        console = [e["message"] for e in self.driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
        asked = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.append(message["params"]["request"]["url"])
        return console, asked

    def width(self, pixels: int) -> None:
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False},
        )


def start_browser(width: int = 1280, height: int = 900) -> Browser:
    """Start one, or skip the test and say what is missing."""
    selenium = pytest.importorskip(
        "selenium.webdriver", reason="selenium is not installed: pip install 'pairscope[dev]'"
    )
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium or chromedriver here: apt install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    # no sandbox: it needs rights that root in a container lacks; no name is resolved: nothing may be asked for
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--hide-scrollbars",
                 f"--window-size={width},{height}", "--force-device-scale-factor=1", "--lang=en-US",
                 "--host-resolver-rules=MAP * ~NOTFOUND"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = Browser(selenium.Chrome(options=options, service=selenium.ChromeService(driver)))
    found.width(width)
    return found


def press(browser: Browser, keys: str) -> None:
    """Type keys into the page, one after the other, each when the one before is drawn."""
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(browser.driver).send_keys(key).perform()
        browser.wait_ready()


def point(browser: Browser, row: int, column: int, *, click: bool = False) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    x, y = browser.execute_script(
        "grid.canvas.scrollIntoView({block: 'center'}); const b = grid.canvas.getBoundingClientRect();"
        "return [grid.gutter + (arguments[1] + 0.5) * grid.cellWidth - grid.scroller.scrollLeft - b.width / 2,"
        "(S.data.rows - 1 - arguments[0] + 0.5) * grid.cellHeight - b.height / 2]", row, column)  # fmt: skip
    chain = ActionChains(browser.driver).move_to_element_with_offset(browser.find("#grid"), round(x), round(y))
    (chain.click() if click else chain).perform()
    browser.wait_ready()


def choose(browser: Browser, picker: str, text: str | int) -> None:
    from selenium.webdriver.support.ui import Select

    found = Select(browser.find(f"#{picker}"))
    found.select_by_index(text) if isinstance(text, int) else found.select_by_visible_text(text)
    browser.wait_ready()
