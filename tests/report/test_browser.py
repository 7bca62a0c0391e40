"""The report in a real browser: curves are drawn, filters work, a response opens, nothing is said on the console."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pekoe.report.history import read_history
from pekoe.report.page import render
from tests.report.conftest import HOSTILE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
CHROMIUM = shutil.which("chromium")


@pytest.fixture
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no browser: the command chromium is absent (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_it_is_drawn_and_answers(browser: Any, run_dir: Path, scheme: str, width: int):
    file = run_dir / "report.html"
    file.write_text(render([read_history(run_dir, decode=lambda tokens: f"<{tokens[0]}>")]), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message) or dialog.dismiss())
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(file.as_uri())
    page.wait_for_selector("#timeline .barlayer path", state="attached")
    curves = page.locator("#charts > div").count()
    assert curves == page.locator("#charts .scatterlayer").count() >= 8
    assert page.locator("#count").inner_text() == "2 of 2 groups"
    page.select_option("select[name=label]", "fault")
    assert page.locator("#count").inner_text() == "1 of 2 groups"
    page.locator("#groups button").first.click()
    assert page.locator(".sample").count() == 2
    shown = page.locator("#group").inner_text()
    assert HOSTILE in shown  # the problem's name, as text
    assert 'reference answer: {"target":24}' in shown
    assert page.locator("#groups .question").first.inner_text() == "1+6="
    assert page.evaluate("document.getElementById('group').getBoundingClientRect().top < innerHeight")
    assert "<2><3>" in page.locator(".sample pre").first.inner_text()
    page.select_option("select[name=label]", "")
    page.fill("input[name=text]", "1+6")
    page.fill("input[name=shortest]", "5")
    assert page.locator("#count").inner_text() == "1 of 2 groups"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert said == []
