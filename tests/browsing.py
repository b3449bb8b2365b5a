"""A headless Chromium for tests of pages; without one they are skipped."""

from __future__ import annotations

import re
import shutil

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt-get install chromium)")


def started_browser():
    """The one of a module, closed behind its tests."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def check_page(browser, path):
    """A page of one file fits a telephone and two sheets, is dark at night, and says what it shows."""
    page_text = path.read_text()
    assert "<script" not in page_text and not re.search(r"""(src|href)=["'](?!#)""", page_text)
    for width in (400, 1280, 1920):
        for scheme in ("light", "dark"):
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, java_script_enabled=True
            )
            page = context.new_page()
            page.goto(f"file://{path}")
            assert page.evaluate("document.documentElement.scrollWidth") == width
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, paper[4:-1].split(","))) < 200) == (scheme == "dark")
            small = page.evaluate(
                "Math.min(...[...document.querySelectorAll('svg text')].map(one =>"
                " one.getBoundingClientRect().height).filter(height => height > 0))"
            )
            assert small >= 11  # pixels, of the smallest text in a figure
            cut = page.evaluate(
                "[...document.querySelectorAll('svg text')].filter(one => {"
                " const [inner, outer] = [one, one.closest('svg')].map(it => it.getBoundingClientRect());"
                " return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1"
                " || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1) })"
                ".map(one => one.textContent)"
            )
            assert not cut  # texts that a figure's edge cuts off: 79 ms of 479
            silent = page.evaluate(
                "[...document.querySelectorAll('figure')].filter(one =>"
                " !one.querySelector('[role=img][aria-label]:not([aria-label=\"\"])')).length"
            )
            assert silent == 0
            context.close()
    page = browser.new_page()
    page.goto(f"file://{path}")
    sheets = len(re.findall(rb"/Type\s*/Page[^s]", page.pdf(prefer_css_page_size=True)))
    page.close()
    assert sheets <= 2
