"""The chat page in a real browser, over the whole system: signing in, sending, stopping, going on, keeping order."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import requests
from playwright.sync_api import Browser, Page, expect

from tests.functional.browsing import PHONE, ChatPage, quiet_context, text_of
from tests.functional.nodes import NO_PROXIES, Client, Stack
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text

# Far longer than a test: it ends when it is stopped.
ENDLESS = "pace=40,tokens=2000"


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_DEFAULT_MODEL": ENDLESS}


# Signing in


def test_the_printed_link_signs_in_once(stack: Stack, browser: Browser, page: Page) -> None:
    stack.user("tester")
    token = stack.cli("users", "sign-in", "tester").split("token=")[-1].strip()
    link = f"{stack.url()}/sign-in?token={token}"
    assert requests.get(link, timeout=10, proxies=NO_PROXIES).ok  # as a preview of the link would

    ChatPage(page, stack.url()).sign_in(token)
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

    expect(chat.status).to_have_text("Stopped")
    expect(chat.box).to_be_focused()
    upstream.wait_until(lambda records: records[-1].outcome == "disconnected")

    message = chat.expect_saved(client)
    assert (message["status"], message["reason"]) == ("TERMINATED", "user")
    assert text_of(chat.content) == message["content"]
    assert expected_text(ENDLESS).content.startswith(message["content"])
    chat.expect_ended("Stopped")


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
    assert text_of(chat.question.locator(".content")) == "one\ntwo"


def test_an_answer_is_shown_as_it_is_saved(chat: ChatPage, client: Client) -> None:
    model = "alphabet=mixed,thinking=12,tokens=80,pace=100,nul_at=30"
    session = client.post_message("Everything", model=model)
    chat.open(session["conversationId"])
    chat.expect_complete()
    expect(chat.answer).to_contain_text(model)

    assert (text_of(chat.thinking.locator(".text")), text_of(chat.content)) == expected_text(model)
    chat.expect_saved(client)
    expect(chat.thinking.locator(".text")).to_be_hidden()
    chat.thinking.locator("summary").click()
    expect(chat.thinking.locator(".text")).to_be_visible()


def test_a_failed_answer_says_so(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Fail", model="pace=100,tokens=20,error_at=5")
    chat.open(session["conversationId"])
    chat.expect_ended(re.compile("^Failed: the model’s server reported an error"))
    chat.expect_saved(client)


# Going on, and trying again


def test_a_stopped_answer_goes_on_and_is_given_anew(chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(8)
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    stopped_at = text_of(chat.content)

    chat.action("Continue").click()
    expect(chat.stop).to_be_visible()
    chat.await_token(30)
    assert text_of(chat.content).startswith(stopped_at)
    chat.stop.click()
    chat.expect_ended("Stopped")
    assert expected_text(ENDLESS).content.startswith(chat.expect_saved(client)["content"])
    first = text_of(chat.content)

    chat.action("Retry").click()
    expect(chat.answers).to_have_count(2)
    chat.await_token(3)
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    assert len(chat.expect_saved(client)["content"]) < len(first)
    earlier = chat.answers.first
    expect(earlier.locator(".content")).to_be_hidden()
    expect(chat.action("Retry", earlier)).to_be_hidden()
    chat.action("Show the earlier answer", earlier).click()
    assert text_of(earlier.locator(".content")) == first


def test_a_failed_answer_is_tried_again(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Fail", model="pace=100,tokens=20,error_at=5")
    chat.open(session["conversationId"])
    chat.expect_ended(re.compile("^Failed: the model’s server reported an error"))
    chat.action("Continue").click()
    chat.expect_complete()
    assert chat.expect_saved(client)["content"] == expected_text("tokens=20").content
    expect(chat.action("Continue")).to_be_hidden()


def test_a_time_out_is_named(chat: ChatPage, client: Client) -> None:
    body = {"content": "Fall silent", "model": "tokens=20,silence_at=5:60", "timeouts": {"idleSeconds": 0.5}}
    session = client.call("POST", "/api/stream-message", body, headers={"Accept": "application/json"})
    chat.open(session["conversationId"])
    chat.expect_ended("Timed out: the model fell silent")
    expect(chat.action("Continue")).to_be_visible()
    chat.expect_saved(client)


# The frame


def test_a_narrow_page_folds_the_list_away(browser: Browser, stack: Stack) -> None:
    with quiet_context(browser, viewport=PHONE, has_touch=True, is_mobile=True) as context:
        chat = ChatPage(context.new_page(), stack.url())
        chat.sign_in(stack.user("tester"))
        sidebar = chat.page.get_by_role("navigation", name="Conversations")
        expect(sidebar).to_be_hidden()
        chat.page.get_by_role("button", name="Conversations").tap()
        expect(sidebar).to_be_visible()
        chat.expect_accessible()
        chat.page.get_by_role("link", name="New conversation").tap()
        expect(sidebar).to_be_hidden()
        chat.expect_no_sideways_scroll()

        chat.box.fill("On a phone")
        chat.send.tap()
        chat.await_token(3)
        chat.stop.tap()
        chat.expect_ended("Stopped")
        chat.expect_no_sideways_scroll()
        expect(chat.action("Continue")).to_be_in_viewport()


def test_the_keyboard_alone(chat: ChatPage) -> None:
    """From the top of the page: past the list, ask, stop, go on, and copy."""
    expect(chat.page.get_by_label("Model")).to_be_visible()  # its scripts have run
    skip = chat.page.get_by_role("link", name="Skip to the message box")
    for _ in range(200):  # past every conversation of the list
        chat.page.keyboard.press("Shift+Tab")
        if chat.page.evaluate("document.activeElement.className") == "skip":
            break
    expect(skip).to_be_focused()
    expect(skip).to_be_in_viewport()
    chat.page.keyboard.press("Enter")
    expect(chat.box).to_be_focused()
    chat.page.keyboard.type("By keys")
    chat.page.keyboard.press("Enter")
    chat.await_token(3)
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    chat.action("Continue").focus()
    chat.page.keyboard.press("Enter")
    expect(chat.stop).to_be_visible()
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    expect(chat.box).to_be_focused()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible(browser: Browser, stack: Stack, scheme: str) -> None:
    """axe-core has no serious finding: empty, while an answer is written, and after, in both colour schemes."""
    with quiet_context(browser, color_scheme=scheme) as context:
        chat = ChatPage(context.new_page(), stack.url())
        chat.sign_in(stack.user("tester"))
        expect(chat.page.get_by_role("heading", name="What would you like to ask?")).to_be_visible()
        chat.expect_accessible()
        session = stack.client().post_message("Everything", model="alphabet=markdown,tokens=2000,pace=60,thinking=3")
        chat.open(session["conversationId"])
        expect(chat.content.locator("table").nth(1)).to_be_visible()
        chat.expect_accessible()
        chat.page.keyboard.press("Escape")
        chat.expect_ended("Stopped")
        chat.page.get_by_role("button", name="Members").click()
        chat.expect_accessible()


def test_colours_can_be_chosen_and_stay(chat: ChatPage) -> None:
    def background() -> str:
        found: str = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return found

    light = background()
    chat.page.get_by_label("Colours").select_option("Dark")
    dark = background()
    assert dark != light
    chat.page.reload()
    expect(chat.box).to_be_visible()
    assert background() == dark
    chat.page.get_by_label("Colours").select_option("As the system")
    assert background() == light
    chat.page.reload()
    assert background() == light


# Keeping order


def test_the_model_is_chosen_and_stays_chosen(chat: ChatPage, client: Client, upstream: UpstreamProcess) -> None:
    chat.page.get_by_label("Model").select_option("sluice-large:latest")
    chat.ask("By the large one")
    expect(chat.answer).to_contain_text("sluice-large:latest")
    chat.expect_complete()
    assert client.messages(chat.conversation_id)[-1]["model"] == "sluice-large:latest"
    assert len(upstream.requests("sluice-large:latest")) == 1
    chat.page.reload()
    expect(chat.page.get_by_label("Model")).to_have_value("sluice-large:latest")


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


def test_search_finds_titles_and_words(chat: ChatPage, client: Client) -> None:
    titled = client.post_message("Zephyrs of the north", model="tokens=1")
    said = client.post_message("Something else", model="tokens=1,pace=0")
    client.follow(said["sessionId"]).wait_until_done()
    client.post_message("and a culvert, 100% of it", conversation_id=said["conversationId"], model="tokens=1")
    chat.page.reload()
    links = chat.page.locator("#conversations a")
    search = chat.page.get_by_role("searchbox", name="Search conversations")
    for words, found in (("ZEPHYRS", titled), ("culvert, 100% o", said)):
        search.fill(words)
        expect(links).to_have_count(1)
        expect(links).to_have_attribute("href", f"/c/{found['conversationId']}")
    search.fill("100_")
    expect(chat.page.get_by_text("Nothing has these words in it.")).to_be_visible()
    search.press("Escape")
    expect(search).to_have_value("")
    expect(links.nth(1)).to_be_visible()


def test_members_are_added_changed_and_removed(stack: Stack, chat: ChatPage, client: Client) -> None:
    stack.user("somebody")
    session = client.post_message("Together", model="tokens=1")
    path = f"/api/conversations/{session['conversationId']}/members"
    chat.open(session["conversationId"])
    chat.page.get_by_role("button", name="Members").click()
    dialog = chat.page.get_by_role("dialog", name="Members")
    dialog.get_by_label("Name").fill("nobody-known")
    dialog.get_by_role("button", name="Add").click()
    expect(dialog.get_by_role("alert")).to_contain_text("nobody-known")
    dialog.get_by_label("Name").fill("somebody")
    dialog.get_by_role("button", name="Add").click()
    role = dialog.get_by_label("Role of somebody")
    expect(role).to_have_value("editor")
    role.select_option("viewer")
    expect(dialog.get_by_role("alert")).to_be_hidden()
    expect(role).to_have_value("viewer")

    def members() -> dict[str, str]:
        return {one["name"]: one["role"] for one in client.call("GET", path)["items"]}

    wait_until(lambda: members() == {"somebody": "viewer", "tester": "owner"})
    dialog.get_by_role("button", name="Remove somebody").click()
    expect(role).to_be_hidden()
    assert members() == {"tester": "owner"}


def test_what_is_being_written_survives_a_sign_out_elsewhere(stack: Stack, chat: ChatPage) -> None:
    """The other tab goes to the sign-in page with it, and what was in its box is there again after."""
    other = ChatPage(chat.page.context.new_page(), chat.base_url)
    other.page.goto(chat.base_url)
    other.box.fill("half a thought")
    expect(other.page.get_by_label("Model")).to_be_visible()  # its scripts have run
    chat.page.get_by_role("button", name="Sign out").click()
    expect(chat.page.get_by_label("Token", exact=True)).to_be_visible()
    expect(other.page.get_by_label("Token", exact=True)).to_be_visible()
    other.page.get_by_label("Token", exact=True).fill(stack.user("tester"))
    other.page.get_by_role("button", name="Sign in").click()
    expect(other.box).to_have_value("half a thought")


def test_a_viewer_reads_along_and_may_not_stop(stack: Stack, browser: Browser, client: Client) -> None:
    session = client.post_message("Watch me", model=ENDLESS)
    stack.user("watcher")
    path = f"/api/conversations/{session['conversationId']}/members/watcher"
    client.call("PUT", path, {"role": "viewer"})
    with quiet_context(browser) as context:
        chat = ChatPage(context.new_page(), stack.url())
        chat.sign_in(stack.user("watcher"))
        chat.open(session["conversationId"])
        chat.await_token(5)
        expect(chat.stop).to_be_hidden()
        chat.page.keyboard.press("Escape")
        chat.await_token(30)
        receipt = client.terminate(session["sessionId"])
        expect(chat.note).to_have_text("Stopped")
        assert text_of(chat.content) == receipt["partialResponse"]
        expect(chat.page.get_by_text("You can read this conversation")).to_be_visible()
        expect(chat.action("Continue")).to_be_hidden()
        expect(chat.action("Copy")).to_be_visible()
