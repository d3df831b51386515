"""A real Chromium, and the chat page in it as a person sees it: by what things are called."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests.functional.nodes import Client

WAIT_MILLISECONDS = 15_000
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What axe-core calls a finding that keeps somebody out.
SERIOUS = ("serious", "critical")
WIDE = {"width": 1200, "height": 700}
PHONE = {"width": 390, "height": 844}


@contextmanager
def chromium() -> Iterator[Browser]:
    """The machine's Chromium, or the one that Playwright has installed."""
    expect.set_options(timeout=WAIT_MILLISECONDS)
    installed = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    with sync_playwright() as playwright:
        if not installed and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: install it, or run `playwright install chromium`")
        # In a container there is often no sandbox to be had, and only our own page is opened.
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def quiet_context(browser: Browser, **options: Any) -> Iterator[BrowserContext]:
    """A browser without a past, whose pages' scripts raise nothing, are refused nothing, and ask nobody but us."""
    complaints: list[str] = []
    context = browser.new_context(viewport=options.pop("viewport", WIDE), **options)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    context.set_default_timeout(WAIT_MILLISECONDS)
    context.on("weberror", lambda error: complaints.append(str(error.error)))
    context.on("console", lambda line: complaints.append(line.text) if _is_refusal(line.text) else None)
    context.on("request", lambda request: complaints.append(request.url) if _is_foreign(request.url) else None)
    yield context
    context.close()
    assert complaints == []


def _is_refusal(line: str) -> bool:
    return "Content Security" in line or "TrustedHTML" in line or "TrustedScript" in line


def _is_foreign(url: str) -> bool:
    return urlsplit(url).hostname not in ("127.0.0.1", None)


class ChatPage:
    """The chat page of a server."""

    def __init__(self, page: Page, base_url: str) -> None:
        self.page = page
        self.base_url = base_url
        self.box = page.get_by_role("textbox", name="Message", exact=True)
        self.send = page.get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name=re.compile("Stop"))
        self.question = page.locator('[data-role="user"]').last
        self.answers = page.locator('[data-role="assistant"]')
        self.answer = self.answers.last
        self.content = self.answer.locator(".content")
        self.thinking = self.answer.locator(".thinking")
        self.note = self.answer.locator(".note")
        self.status = page.locator("#announcer")
        self.messages = page.get_by_role("region", name="Messages")

    def sign_in(self, token: str) -> None:
        self.page.goto(f"{self.base_url}/sign-in?token={token}")
        expect(self.box).to_be_visible()

    def open(self, conversation_id: str) -> None:
        self.page.goto(f"{self.base_url}/c/{conversation_id}")

    def ask(self, question: str) -> None:
        self.box.fill(question)
        self.box.press("Enter")

    def await_token(self, index: int) -> None:
        """Wait until the scripted upstream's token of this number is on the page."""
        expect(self.content).to_contain_text(f"t{index} ")

    def expect_ended(self, note: str | re.Pattern[str]) -> None:
        expect(self.note).to_have_text(note)
        expect(self.send).to_be_visible()
        expect(self.stop).to_be_hidden()

    def expect_complete(self) -> None:
        expect(self.answer).to_have_attribute("data-state", "completed")
        expect(self.note).to_be_hidden()
        expect(self.send).to_be_visible()

    def action(self, name: str, answer: Locator | None = None) -> Locator:
        """A button under an answer, by default the last."""
        return (answer or self.answer).get_by_role("button", name=name, exact=True)

    def copied(self) -> str:
        """The last answer's text as the page has it: what its Copy button puts into the clipboard."""
        self.page.evaluate("navigator.clipboard.writeText('')")
        button = self.answer.locator('[data-action="copy"]')
        button.click()
        expect(button).to_have_text("Copied")
        text: str = self.page.evaluate("navigator.clipboard.readText()")
        return text

    def screen(self) -> str:
        """The last answer as it is laid out, as markup, with its code in colour."""
        expect(self.content.locator("pre > code:not([data-coloured])")).to_have_count(0)
        return self.content.inner_html()

    def expect_saved(self, client: Client) -> dict[str, Any]:
        """What is on the screen is what is in the database: to the character, and laid out as it will be to whoever
        comes later. Returns the message."""
        message = client.messages(self.conversation_id)[-1]
        assert self.copied() == message["content"]
        screen = self.screen()
        self.page.reload()
        expect(self.answer).to_have_attribute("data-state", message["status"].lower())
        assert self.screen() == screen
        return message

    def expect_accessible(self) -> None:
        """axe-core finds nothing that keeps somebody out."""
        found = Axe().run(self.page).response["violations"]
        serious = [(one["id"], [node["html"] for node in one["nodes"]]) for one in found if one["impact"] in SERIOUS]
        assert serious == []

    def expect_no_sideways_scroll(self) -> None:
        width = self.page.viewport_size["width"]  # type: ignore[index]
        assert self.page.evaluate("document.documentElement.scrollWidth") <= width

    @property
    def conversation_id(self) -> str:
        return urlsplit(self.page.url).path.removeprefix("/c/")


def text_of(element: Locator) -> str:
    """The text to the character; what Playwright compares has its white space put in order."""
    text: str = element.evaluate("element => element.textContent")
    return text
