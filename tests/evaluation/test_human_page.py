"""The page of the study in a real browser, as raters use it: keys, going back, keeping, saving."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from browser import UNLABELLED, open_browser
from human_study import study_in
from minigpt5_jax.evaluation.human.answers import merge

pytest.importorskip("selenium", reason="no selenium: pip install -e '.[test]'")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

NO_STORAGE = """
Object.defineProperty(window, "localStorage", {get() { throw new DOMException("no", "SecurityError") }})
"""


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return study_in(tmp_path_factory.mktemp("study"), completion_code="C0DE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the browser lives: its profile, and in ``saved`` what it downloads."""
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def browser(folder):
    with open_browser(folder) as driver:
        yield driver


def address(study: Path, rater: str = "") -> str:
    return (study / "page/index.html").as_uri() + (f"?rater={rater}" if rater else "")


def press(browser, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def title(browser) -> str:
    return browser.find_element(By.TAG_NAME, "h1").text


def click(browser, selector: str) -> None:
    browser.find_element(By.CSS_SELECTOR, selector).click()


def saved(folder: Path, rater: str) -> dict:
    path, end = folder / "saved" / f"answers_{rater}.json", time.monotonic() + 20
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.05)
    return json.loads(path.read_text())


def test_a_study_is_answered_by_keys_and_goes_on_after_closing(study, browser, folder):
    made, key = study
    rater = next(iter(key["raters"]))
    screens = key["raters"][rater]
    browser.get(address(made, rater))
    click(browser, "button[type=submit]")
    total = len(screens)
    assert title(browser) == f"Item 1 of {total}" and browser.execute_script(UNLABELLED) == []
    loaded = "return [...document.images].map(i => i.complete && i.naturalWidth > 0)"
    assert browser.execute_script(loaded) == [True] * 4, "two scenes and two answers"
    texts = [e.text for e in browser.find_elements(By.CSS_SELECTOR, ".option .text")]
    item = key["items"][screens[0]["item"]]
    sides = item["options"][::-1] if screens[0]["exchanged"] else item["options"]
    marks = {"ours": "by A", "other": "by B", "truth": "true end", "shuffled": "true end"}
    assert all(marks[side] in text for side, text in zip(sides, texts, strict=True))
    assert "<b>&amp;</b>" in browser.find_element(By.CSS_SELECTOR, ".scenes").text, "texts are no HTML"

    press(browser, "1", Keys.ENTER)
    assert title(browser) == f"Item 1 of {total}", "two questions are open"
    assert "Please answer: Which image" in browser.find_element(By.ID, "said").text
    press(browser, "3", "2", Keys.ENTER)
    assert title(browser) == f"Item 2 of {total}"
    press(browser, Keys.BACKSPACE)
    chosen = browser.find_elements(By.CSS_SELECTOR, "input[type=radio]:checked")
    assert [radio.get_attribute("value") for radio in chosen] == ["1", "tie", "2"]
    browser.find_element(By.ID, "comment").send_keys("so 123 it is")
    click(browser, "#next")
    browser.get(address(made, rater))  # closed, and opened again
    click(browser, "button[type=submit]")
    assert (
        title(browser) == f"Item 2 of {total}" and not browser.find_element(By.ID, "warning").is_displayed()
    )
    for _ in screens[1:]:
        press(browser, "1", "2", "3", Keys.ENTER)
    assert title(browser) == "Thank you" and "C0DE" in browser.find_element(By.ID, "screen").text
    click(browser, "#save")
    found = saved(folder, rater)
    assert found["study_sha256"] == key["study_sha256"] and found["rater"] == rater
    first = found["items"][0]
    assert first["answers"] == {"continuity": "1", "quality": "tie", "coherence": "2"}
    assert first["comment"] == "so 123 it is" and first["left_is"] is None and first["seconds"] >= 0
    assert all(
        item["answers"] == {"continuity": "1", "quality": "2", "coherence": "tie"}
        for item in found["items"][1:]
    )
    assert merge(made, [folder / "saved"])["missing"] == 0
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_without_storage_the_page_warns_and_works(study, browser, folder):
    made, key = study
    rater = list(key["raters"])[1]
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_STORAGE})
    browser.get(address(made))
    browser.find_element(By.ID, "rater").send_keys("nobody", Keys.ENTER)
    assert "not of this study" in browser.find_element(By.ID, "said").text
    browser.find_element(By.ID, "rater").clear()
    browser.find_element(By.ID, "rater").send_keys(f" {rater.upper()} ", Keys.ENTER)
    assert "does not let the page store anything" in browser.find_element(By.ID, "warning").text
    for _ in key["raters"][rater]:
        for label in browser.find_elements(By.CSS_SELECTOR, ".choices label:nth-child(3)"):
            label.click()
        click(browser, "#next")
    click(browser, "#save")
    items = saved(folder, rater)["items"]
    assert {value for item in items for value in item["answers"].values()} == {"tie"}
    browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(study, browser, width):
    made, key = study
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address(made, list(key["raters"])[2]))
    click(browser, "button[type=submit]")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    targets = browser.find_elements(By.CSS_SELECTOR, ".choices label, button")
    assert len(targets) == 11 and all(target.size["height"] >= 44 for target in targets), (
        "big enough to touch"
    )
