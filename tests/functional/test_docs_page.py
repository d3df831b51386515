"""The page at /docs in a real browser: whole without any other server, and under its own strict policy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, Route, expect, sync_playwright

from tests.functional.nodes import Client, Stack

WAIT_MILLISECONDS = 15_000
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "sqlite"


@pytest.fixture(scope="module")
def stack_workers() -> int:
    return 0


@pytest.fixture
def page(stack: Stack) -> Iterator[Page]:
    """A page that reaches our server alone; at the end nothing was asked of another, refused, or raised."""
    installed = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    complaints: list[str] = []

    def only_ours(route: Route) -> None:
        if route.request.url.startswith(stack.url()):
            route.continue_()
        else:
            complaints.append(f"asked for {route.request.url}")
            route.abort()

    with sync_playwright() as playwright:
        if not installed and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: install it, or run `playwright install chromium`")
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1200, "height": 1600})
        context.route(re.compile(r"^https?:"), only_ours)
        page = context.new_page()
        page.set_default_timeout(WAIT_MILLISECONDS)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
        yield page
        browser.close()
    assert complaints == []


def test_it_shows_every_call_and_makes_one_with_a_token(stack: Stack, client: Client, page: Page) -> None:
    document = client.call("GET", "/openapi.json")
    page.goto(f"{stack.url()}/docs")
    calls = page.locator(".opblock")
    expect(calls).to_have_count(sum(len(operations) for operations in document["paths"].values()))
    shown = {tuple(one.split()[:2]) for one in page.locator(".opblock-summary").all_inner_texts()}
    expected = {(method.upper(), path) for path, operations in document["paths"].items() for method in operations}
    assert {(method, path.replace("\u200b", "")) for method, path in shown} == expected

    page.get_by_role("button", name="Authorize").first.click()
    dialog = page.locator(".modal-ux")
    dialog.get_by_role("textbox").fill(stack.user("tester"))
    dialog.get_by_role("button", name="Apply credentials").click()
    dialog.get_by_role("button", name="Close").last.click()

    call = page.locator("#operations-Conversations-post_api_conversations")
    call.locator(".opblock-summary-control").click()
    call.get_by_role("button", name="Try it out").click()
    call.locator("textarea").fill('{"title": "by the page"}')
    call.get_by_role("button", name="Execute").click()
    expect(call.locator(".live-responses-table tbody .response-col_status")).to_contain_text("201")
    expect(call.locator(".live-responses-table tbody")).to_contain_text('"title": "by the page"')
    assert [one["title"] for one in client.call("GET", "/api/conversations")["items"]] == ["by the page"]
