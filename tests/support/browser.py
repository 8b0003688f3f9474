"""Headless Chromium for tests of the demo page."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

WAIT = 900  # seconds after which a test that hangs fails
DESKTOP, PHONE = (1280, 900), (390, 844)  # CSS pixels
MAX_BYTES = 150_000  # of a screenshot
# Stop all visible clips at the same moment; false as long as one of them is not loaded.
PAUSE_CLIPS = """
const clips = [...document.querySelectorAll("video")].filter((clip) => clip.offsetParent !== null);
if (!clips.every((clip) => clip.readyState >= 2)) return false;
for (const clip of clips) { clip.pause(); clip.currentTime = clip.duration / 3; }
return true;
"""
# Without the first three Chromium does not start as root or without a screen; the others keep it off the network, and
# the last one makes sure of it: a page that needs another server fails.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)  # fmt: skip


def programs() -> tuple[str, str]:
    """Paths of the browser and its driver; skips the test where there is none."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip(
            "NO BROWSER: chromium and chromedriver are not installed (apt-get install chromium chromium-driver)"
        )
    return browser, driver


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser with an empty profile."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
    browser, driver = programs()
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={DESKTOP[0]},{DESKTOP[1]}"):
            options.add_argument(flag)
        started = webdriver.Chrome(options, webdriver.ChromeService(driver))
        started.set_page_load_timeout(WAIT)
        started.set_script_timeout(WAIT)
        try:
            yield Browser(started)
        finally:
            started.quit()


class Browser:
    """A selenium driver with the few actions that the tests need. Elements are named by CSS selectors."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.requested: set[str] = set()

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait until a condition is true, and return its value."""
        from selenium.common import exceptions  # noqa: PLC0415
        from selenium.webdriver.support.ui import WebDriverWait  # noqa: PLC0415

        # The page replaces elements while it works, and covers them while it loads.
        passing = [exceptions.StaleElementReferenceException, exceptions.ElementClickInterceptedException]
        try:
            return WebDriverWait(self.driver, WAIT, 0.2, ignored_exceptions=passing).until(lambda _: condition())
        except exceptions.TimeoutException:
            raise AssertionError(f"waited for {what}; the page shows: {self.find('body').text}") from None

    def all(self, selector: str) -> list[Any]:
        """All elements that a selector names."""
        return self.driver.find_elements("css selector", selector)

    def find(self, selector: str) -> Any:
        """The first visible element, as soon as there is one."""
        return self.until(lambda: next((e for e in self.all(selector) if e.is_displayed()), None), selector)

    def text(self, selector: str) -> str:
        """Visible text of an element."""
        return self.find(selector).text

    def click(self, selector: str) -> None:
        """Press a button, as soon as it is enabled."""

        def press() -> bool:
            element = self.find(selector)
            if not element.is_enabled() or element.get_attribute("disabled") is not None:
                return False
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            element.click()
            return True

        self.until(press, f"{selector} to be enabled")

    def write(self, selector: str, text: str) -> None:
        """Replace the text of a field, as a person types it."""
        field = self.find(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.clear()
        field.send_keys(text)
        self.until(lambda: field.get_attribute("value") == text, f"{selector} to contain {text}")

    def served_file(self, selector: str) -> Path:
        """Path of the file of this machine that an image or a clip shows."""
        return served_path(self.find(selector).get_attribute("src"))

    def watch(self, selector: str) -> None:
        """From now on, keep every text that an element shows, for [`seen`]."""
        self.driver.execute_script(
            "const at = document.querySelector(arguments[0]); window.seen = [];"
            "const keep = () => window.seen.push([at.textContent, at.querySelectorAll('img.ov-preview').length]);"
            "new MutationObserver(keep).observe(at, {childList: true, subtree: true, characterData: true});",
            selector,
        )

    def seen(self) -> list[tuple[str, int]]:
        """Texts since [`watch`], each with the number of previews beside it."""
        return [(text, count) for text, count in self.driver.execute_script("return window.seen")]

    def hosts(self) -> set[str]:
        """Hosts of all requests since the start."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.requested.add(message["params"]["request"]["url"])
        web = (urlsplit(url) for url in self.requested)
        return {str(url.hostname) for url in web if url.scheme not in ("data", "blob", "chrome", "about")}

    def size(self, width: int, height: int) -> None:
        """Give the page a size in CSS pixels, also one below the smallest of a window."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def screenshot(self, name: str, folder: Path) -> None:
        """Write what desktop and phone show into `name-desktop.png` and `name-phone.png`."""
        for device, (width, height) in {"desktop": DESKTOP, "phone": PHONE}.items():
            self.size(width, height)
            self.driver.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
            self.driver.execute_async_script("setTimeout(arguments[0], 700)")  # transitions of gradio's layout
            whole = self.driver.execute_script("return document.documentElement.scrollHeight")
            self.size(width, min(max(height, whole), 2 * height))
            self.until(lambda: self.driver.execute_script(PAUSE_CLIPS), "all clips to be loaded")
            self.driver.execute_async_script("setTimeout(arguments[0], 300)")
            image = Image.open(BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
            path = folder / f"{name}-{device}.png"
            image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
            assert path.stat().st_size < MAX_BYTES, path
        self.size(*DESKTOP)


def served_path(address: str) -> Path:
    """Path of the file of this machine that gradio serves at an address."""
    return Path("/" + unquote(urlsplit(address).path).partition("file=")[2].lstrip("/"))


def screenshot_folder(otherwise: Path) -> Path:
    """Folder of the environment variable that `make screenshots` sets, else another one."""
    named = os.environ.get("OMNI_VIDEO_SCREENSHOTS")
    folder = Path(named) if named else otherwise
    folder.mkdir(parents=True, exist_ok=True)
    return folder
