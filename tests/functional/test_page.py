"""The chat page in a real browser, over the whole system."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from tests.functional.nodes import NO_PROXIES, Client, Stack
from tests.services import HOST, LocalProcess, free_port, wait_until
from tests.upstream import UpstreamProcess, expected_text

# Far longer than a test: it ends when it is stopped.
ENDLESS = "pace=40,tokens=2000"
WAIT_MILLISECONDS = 15_000
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

HOSTILE = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1"><b>bold</b> &amp; ${pwned}"""


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_DEFAULT_MODEL": ENDLESS}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
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


class ChatPage:
    """The page as a person sees it: by what things are called."""

    def __init__(self, page: Page, stack: Stack) -> None:
        self.page = page
        self.base_url = stack.url()
        self.box = page.get_by_role("textbox", name="Message")
        self.send = page.get_by_role("button", name="Send")
        self.stop = page.get_by_role("button", name=re.compile("Stop"))
        self.answer = page.locator('[data-role="assistant"]').last
        self.content = self.answer.locator(".content")
        self.thinking = self.answer.locator(".thinking")
        self.note = self.answer.locator(".note")
        self.status = page.get_by_role("status")

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

    @property
    def conversation_id(self) -> str:
        return urlsplit(self.page.url).path.removeprefix("/c/")


def text_of(element: Locator) -> str:
    """The text to the character; what Playwright compares has its white space put in order."""
    return element.evaluate("element => element.textContent")


def last_message(client: Client, chat: ChatPage) -> dict[str, Any]:
    return client.messages(chat.conversation_id)[-1]


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page without a past, whose scripts raise nothing and are refused nothing."""
    context = browser.new_context(viewport={"width": 1200, "height": 700})
    page = context.new_page()
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text) if "Content Security" in line.text else None)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def chat(stack: Stack, page: Page) -> ChatPage:
    """The page, signed in as `tester`, whose API `client` is."""
    chat = ChatPage(page, stack)
    chat.sign_in(stack.user("tester"))
    return chat


# Signing in


def test_the_printed_link_signs_in_once(stack: Stack, browser: Browser, page: Page) -> None:
    stack.user("tester")
    token = stack.cli("users", "sign-in", "tester").split("token=")[-1].strip()
    link = f"{stack.url()}/sign-in?token={token}"
    assert requests.get(link, timeout=10, proxies=NO_PROXIES).ok  # as a preview of the link would

    ChatPage(page, stack).sign_in(token)
    assert token not in page.url

    with browser.new_context() as other:
        second = other.new_page()
        second.goto(link)
        expect(second.get_by_role("alert")).to_be_visible()
        expect(second.get_by_label("Token")).to_be_visible()


def test_a_link_needs_no_script(stack: Stack, browser: Browser) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(f"{stack.url()}/sign-in?token={stack.user('tester')}")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("button", name="Sign out")).to_be_visible()


def test_a_link_does_not_replace_who_is_signed_in_unasked(stack: Stack, chat: ChatPage) -> None:
    chat.page.goto(f"{chat.base_url}/sign-in?token={stack.user('somebody')}")
    chat.page.get_by_role("link", name="Stay signed in as tester").click()
    expect(chat.box).to_be_visible()
    expect(chat.page.get_by_role("navigation")).to_contain_text("tester")


def test_signing_out_and_in_leads_back_to_the_conversation(stack: Stack, chat: ChatPage, client: Client) -> None:
    session = client.post_message("Where was I?", model="tokens=3,pace=0")
    chat.open(session["conversationId"])
    expect(chat.content).to_contain_text("t2 ")
    chat.page.get_by_role("button", name="Sign out").click()
    expect(chat.page.get_by_label("Token")).to_be_visible()

    chat.open(session["conversationId"])
    chat.page.get_by_label("Token").fill(stack.user("tester"))
    chat.page.get_by_role("button", name="Sign in").click()
    expect(chat.content).to_contain_text("t2 ")


def test_pages_tell_nobody_where_they_are_and_run_no_foreign_script(stack: Stack) -> None:
    headers = requests.get(f"{stack.url()}/sign-in?token=x", timeout=10, proxies=NO_PROXIES).headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"


# Sending, watching, stopping


@pytest.mark.parametrize("way", ["button", "escape"])
def test_send_watch_and_stop(way: str, chat: ChatPage, client: Client, upstream: UpstreamProcess) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(10)
    expect(chat.status).to_have_text("Answer started")
    expect(chat.send).to_be_hidden()

    if way == "button":
        chat.stop.click()
    else:
        chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")

    message = last_message(client, chat)
    assert (message["status"], message["reason"]) == ("TERMINATED", "user")
    assert text_of(chat.content) == message["content"]
    assert expected_text(ENDLESS).content.startswith(message["content"])
    expect(chat.status).to_have_text("Stopped")
    expect(chat.box).to_be_focused()
    upstream.wait_until(lambda records: records[-1].outcome == "disconnected")

    chat.page.reload()
    chat.expect_ended("Stopped")
    assert text_of(chat.content) == message["content"]


def test_stop_answers_in_the_same_frame(chat: ChatPage) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(3)
    assert chat.stop.evaluate("button => { button.click(); return button.textContent.trim(); }") == "Stopping…"
    chat.expect_ended("Stopped")


def test_stop_while_the_model_loads(chat: ChatPage, client: Client, upstream: UpstreamProcess) -> None:
    session = client.post_message("Load", model="load_seconds=60")
    upstream.wait_until(len)
    chat.open(session["conversationId"])
    expect(chat.note).to_have_text("Loading the model…")
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    upstream.wait_until(lambda records: records[-1].outcome == "disconnected")


def test_what_is_written_while_an_answer_comes_waits(chat: ChatPage) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(1)
    chat.ask("And about weirs")
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    expect(chat.box).to_have_value("And about weirs")
    chat.box.press("Enter")
    expect(chat.page.locator('[data-role="user"]')).to_have_count(2)
    chat.await_token(1)
    chat.stop.click()
    chat.expect_ended("Stopped")


def test_shift_and_enter_begin_a_new_line(chat: ChatPage, client: Client) -> None:
    chat.box.fill("one")
    chat.box.press("Shift+Enter")
    chat.box.press_sequentially("two")
    chat.box.press("Enter")
    chat.await_token(1)
    assert client.messages(chat.conversation_id)[0]["content"] == "one\ntwo"
    assert text_of(chat.page.locator('[data-role="user"] .content')) == "one\ntwo"


def test_an_answer_is_shown_as_it_is_saved(chat: ChatPage, client: Client) -> None:
    model = "alphabet=mixed,thinking=12,tokens=80,pace=100,nul_at=30"
    session = client.post_message("Everything", model=model)
    chat.open(session["conversationId"])
    chat.expect_complete()
    expect(chat.answer).to_contain_text(model)

    message = last_message(client, chat)
    assert (text_of(chat.thinking.locator(".text")), text_of(chat.content)) == expected_text(model)
    assert text_of(chat.content) == message["content"]
    expect(chat.thinking.locator(".text")).to_be_hidden()
    chat.thinking.locator("summary").click()
    expect(chat.thinking.locator(".text")).to_be_visible()


def test_a_failed_answer_says_so(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Fail", model="pace=100,tokens=20,error_at=5")
    chat.open(session["conversationId"])
    chat.expect_ended(re.compile("^Failed: the model’s server reported an error"))
    assert text_of(chat.content) == last_message(client, chat)["content"]


# Coming and going


def test_reload_in_the_middle_goes_on(chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(20)
    chat.page.reload()
    expect(chat.stop).to_be_visible()
    chat.await_token(60)
    chat.stop.click()
    chat.expect_ended("Stopped")
    assert text_of(chat.content) == last_message(client, chat)["content"]


def test_going_elsewhere_and_back(chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    conversation_id = chat.conversation_id
    chat.page.get_by_role("link", name="New conversation").click()
    expect(chat.send).to_be_visible()
    chat.page.get_by_role("link", name="Tell me about sluices").first.click()
    chat.await_token(30)
    assert chat.conversation_id == conversation_id
    chat.stop.click()
    chat.expect_ended("Stopped")
    assert text_of(chat.content) == last_message(client, chat)["content"]


def test_a_second_page_sees_the_stop(stack: Stack, chat: ChatPage) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    second = ChatPage(chat.page.context.new_page(), stack)
    second.open(chat.conversation_id)
    second.await_token(10)
    chat.stop.click()
    second.expect_ended("Stopped")
    chat.expect_ended("Stopped")
    assert text_of(chat.content) == text_of(second.content)


def test_a_restarted_web_process_is_reconnected_to(stack: Stack, chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    stack.web.stop()
    expect(chat.note).to_have_text("Reconnecting…")
    seen = text_of(chat.content)
    stack.web.restart()
    expect(chat.note).to_be_hidden()
    wait_until(lambda: len(text_of(chat.content)) > len(seen) + 100, what="the answer goes on")
    chat.stop.click()
    chat.expect_ended("Stopped")
    assert text_of(chat.content) == last_message(client, chat)["content"]


def test_a_reader_who_scrolls_up_is_left_alone(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Much", model="tokens=5000,pace=300")
    chat.open(session["conversationId"])
    box = chat.page.get_by_role("region", name="Messages")
    chat.await_token(1500)
    assert box.evaluate("box => box.scrollHeight - box.clientHeight - box.scrollTop") < 2

    box.hover()
    chat.page.mouse.wheel(0, -120)
    latest = chat.page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    top = box.evaluate("box => box.scrollTop")
    chat.await_token(2200)
    assert box.evaluate("box => box.scrollTop") == top

    latest.click()
    expect(latest).to_be_hidden()
    chat.stop.click()
    chat.expect_ended("Stopped")


# Text is text


@pytest.fixture
def echo(stack: Stack, tmp_path: Path) -> Iterator[None]:
    """A worker over the demo model, which repeats a piece of the question, in place of the scripted upstream."""
    port = free_port()
    command = [sys.executable, "-m", "webapp.embedded.demo_model", "--port", str(port), "--tokens-per-second", "500"]
    model = LocalProcess("demo", command, log_path=tmp_path / "demo.log", ready_prompt="listens on")
    model.start()
    model.await_ready()
    stack.worker.container.stop()
    stack.start_worker(settings={"OLLAMA_BASE_URL": f"http://{HOST}:{port}"})
    yield
    model.stop()


@pytest.mark.usefixtures("echo")
def test_hostile_output_is_shown_as_text(chat: ChatPage, client: Client) -> None:
    session = client.post_message(HOSTILE, model="demo")
    chat.open(session["conversationId"])
    chat.expect_complete()
    expect(chat.content).to_contain_text(HOSTILE)
    assert text_of(chat.content) == last_message(client, chat)["content"]
    assert text_of(chat.page.locator('[data-role="user"] .content')) == HOSTILE
    assert chat.page.locator("#messages script, #messages img, #messages b, nav b").count() == 0
    assert chat.page.evaluate("window.pwned") is None
    expect(chat.answer).to_contain_text("demo (no language model)")


# The frame


def test_a_narrow_page_folds_the_list_away(chat: ChatPage) -> None:
    chat.page.set_viewport_size({"width": 390, "height": 844})
    sidebar = chat.page.get_by_role("navigation", name="Conversations")
    expect(sidebar).to_be_hidden()
    chat.page.get_by_role("button", name="Conversations").click()
    expect(sidebar).to_be_visible()
    chat.page.get_by_role("link", name="New conversation").click()
    expect(sidebar).to_be_hidden()
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_rename_and_delete(chat: ChatPage, client: Client) -> None:
    session = client.post_message("A passing thought", model="tokens=3,pace=0")
    chat.open(session["conversationId"])
    chat.page.get_by_role("button", name="Rename").click()
    chat.page.get_by_role("textbox", name="Title").fill("Kept in mind")
    chat.page.keyboard.press("Enter")
    expect(chat.page.get_by_role("heading", name="Kept in mind")).to_be_visible()
    expect(chat.page.get_by_role("link", name="Kept in mind")).to_be_visible()
    assert client.call("GET", f"/api/conversations/{session['conversationId']}")["title"] == "Kept in mind"

    chat.page.get_by_role("button", name="Delete").click()
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chat.page.get_by_role("link", name="Kept in mind")).to_be_hidden()
    assert client.request("GET", f"/api/conversations/{session['conversationId']}").status_code == 404
