"""A headless Chromium for the tests of pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
UNLABELLED = """
const named = e => e.labels?.length || e.getAttribute('aria-label') || e.textContent.trim();
return [...document.querySelectorAll('button, textarea, input:not([type=hidden]), progress, img')]
  .filter(e => e.tagName === 'IMG' ? !e.alt : !named(e)).map(e => e.outerHTML)
"""
"""What a reader of screens cannot name."""


@contextlib.contextmanager
def open_browser(folder: Path) -> Iterator:
    """A Selenium driver; its profile lies in ``folder``, its downloads in ``folder/saved``.  Or a skip."""
    pytest.importorskip("selenium", reason="no selenium: pip install -e '.[test]'")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium with its driver here: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,900")
    for flag in (*flags, f"user-data-dir={folder / 'profile'}"):
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as driver:
        given = {"behavior": "allow", "downloadPath": str(folder / "saved")}
        driver.execute_cdp_cmd("Browser.setDownloadBehavior", given)
        yield driver
