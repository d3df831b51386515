"""The page at /docs in a real browser: whole without any other server, and under its own strict policy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.functional.browsing import quiet_context
from tests.functional.nodes import Client, Stack


@pytest.fixture(scope="module")
def stack_database() -> str:
    return "sqlite"


@pytest.fixture(scope="module")
def stack_workers() -> int:
    return 0


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that reaches our server alone, and whose console says nothing of an error."""
    errors: list[str] = []
    with quiet_context(browser, viewport={"width": 1200, "height": 1600}) as context:
        context.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        yield context.new_page()
    assert errors == []


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
