"""A real browser, Chromium by Playwright, and pages in it that nothing may go wrong on unnoticed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.service.process import QUIET_S, Server, server

CHROMIUM = os.environ.get("DDPM_TEST_CHROMIUM") or shutil.which("chromium")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]

Visit = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for longer: while Playwright runs, its event loop is this thread's, and other tests run their own."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: install it, or name one in DDPM_TEST_CHROMIUM")
    with sync_playwright() as playwright:
        it = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield it
        it.close()


@pytest.fixture(scope="module")
def tiny(model_dir: Path) -> Iterator[Server]:
    """A service of the tiny model."""
    with server(model=model_dir) as it:
        yield it


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    """Opens the page of a service. At the end nothing has failed in it, but for what a test expects."""
    opened: list[tuple[str, list[str], list[str], tuple[str, ...]]] = []

    def open_page(it: Server, *, fragment: str = "", expected: tuple[str, ...] = (), **options: object) -> Page:
        context = browser.new_context(**{"reduced_motion": "reduce", **options})  # type: ignore[arg-type]
        context.set_default_timeout(QUIET_S * 1000)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        said: list[str] = []
        asked: list[str] = []
        opened.append((it.url, said, asked, expected))
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(f"{error}\n{error.stack}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{it.url}/{fragment}")
        return page

    yield open_page
    for context in browser.contexts:
        context.close()
    for url, said, asked, expected in opened:
        assert not [text for text in said if not any(part in text for part in expected)], said
        assert not [one for one in asked if not one.startswith((url, "data:", "blob:"))], asked
