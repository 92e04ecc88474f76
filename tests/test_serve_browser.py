"""`serve` in Chromium, without JavaScript: at any width, in both schemes, and by keyboard alone."""

import re

import pytest
from browsing import CONTRAST, Browser
from pages import CHROMIUM
from reports import everything
from serving import TOKEN, Site, serving
from waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]

PAUSED = "SELECT held_by, held_reason FROM pipeline_stages WHERE stage = 'yolo_detect'"


@pytest.fixture(scope="module")
def site(shared_database, tmp_path_factory) -> Site:
    directory = tmp_path_factory.mktemp("serve")
    with serving(shared_database, directory, OPS_TOKEN=TOKEN) as site:
        yield site


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Browser:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def database(shared_database):
    return shared_database.emptied()


def test_pages_fit_and_can_be_read_on_a_phone_and_a_desktop(database, site, browser):
    job = everything(database)
    names = ["/", "/stage/planner", f"/job/{job}", "/search?q=%ED%95%9C", "/login"]
    for width, scheme in ((390, "dark"), (1280, "light")):
        browser.appearance(width, scheme)
        for name in names:
            browser.open(site.url + name)
            root = "document.documentElement"
            seen = browser.value(f"[{root}.clientWidth, {root}.scrollWidth]")
            assert seen[0] == width and seen[1] <= width, (name, seen)
            contrast, words = browser.value(CONTRAST)
            assert contrast >= 4.5, (name, scheme, contrast, words)
            ground = browser.value("getComputedStyle(document.body).backgroundColor")
            assert (int(re.search(r"\d+", ground)[0]) > 128) == (scheme == "light"), ground
            unnamed = "[...document.querySelectorAll('input:not([type=hidden]), button, a')]" \
                ".filter((e) => !(e.textContent.trim() || e.labels?.length)).length"  # fmt: skip
            assert browser.value(unnamed) == 0
    assert browser.complaints == []


FOCUS = "(e => [e.textContent.trim() || e.id, getComputedStyle(e).outlineStyle])" \
    "(document.activeElement)"  # fmt: skip


def go_to(browser: Browser, name: str) -> None:
    """Press Tab until the focus is on what has this text or id; it is always seen."""
    for _ in range(40):
        browser.press("Tab")
        focused, outline = browser.value(FOCUS)
        assert outline != "none", focused
        if focused == name:
            return
    raise AssertionError(f"no Tab leads to {name}")


def test_keyboard_is_enough_to_log_in_and_pause_a_stage(database, site, browser):
    browser.appearance(1280, "light")
    browser.open(site.url + "/stage/yolo_detect?refresh=off")
    go_to(browser, "Skip to the content")
    browser.press("Enter")
    go_to(browser, "Pause…")  # the first one of the content
    browser.after_loading(lambda: browser.press("Enter"))
    for field, text in (("name", "kim"), ("token", TOKEN)):
        go_to(browser, field)
        browser.type(text)
    browser.after_loading(lambda: browser.press("Enter"))
    # The browser moves the focus there once it has drawn the page.
    until(lambda: browser.value("document.activeElement.id") == "reason", "the field has the focus")
    browser.type("새 GPU")
    browser.after_loading(lambda: browser.press("Enter"))
    assert "Pause the stage: done" in browser.value("document.title + document.body.innerText")
    assert tuple(database.row(PAUSED)) == ("kim (serve)", "새 GPU")
    go_to(browser, "Log out")
    browser.after_loading(lambda: browser.press("Enter"))
    go_to(browser, "Log out")  # the link
    go_to(browser, "Log out")  # the button
    browser.after_loading(lambda: browser.press("Enter"))
    assert browser.value("document.body.innerText").count("Log in") == 1
    assert browser.complaints == []


def test_page_refreshes_itself(database, site, browser):
    browser.open(site.url)
    database.add_job(tenant="new")
    browser.after_loading(lambda: None)
    assert browser.value("document.querySelectorAll('#stages td')[1].innerText") == "1"
