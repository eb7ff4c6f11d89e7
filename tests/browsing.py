"""Pages in headless Chromium: an error in one, or a request for what is not part of it, fails the test."""

import contextlib
import os
import shutil

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: extra browser")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=found, args=arguments)
        yield launched
        launched.close()


@contextlib.contextmanager
def watched(browser, address, *, allowed=("file:",), **options):
    """A tab with the page, in a context with these options of playwright's.

    Args:
        allowed: what addresses that it asks for may begin with.
    """
    context = browser.new_context(offline=True, **options)
    tab, errors, asked = context.new_page(), [], []
    tab.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda one: asked.append(one.url))
    tab.goto(address)
    yield tab
    context.close()
    assert errors == []
    assert [url for url in asked if not url.startswith(allowed)] == []
