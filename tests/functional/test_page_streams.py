"""The chat page's streams through whatever happens to the way there: reloads, cuts, restarts, lost workers, other tabs,
other people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.functional.browsing import ChatPage, quiet_context, text_of
from tests.functional.network import Network
from tests.functional.nodes import Client, Stack
from tests.services import HOST, wait_until

# Far longer than a test: it ends when it is stopped.
ENDLESS = "pace=40,tokens=2000"
TABS = 10


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_DEFAULT_MODEL": ENDLESS, "SLUICEGATE_LEASE_SECONDS": "2"}


@pytest.fixture
def network(stack: Stack) -> Iterator[Network]:
    """What lies between browser and server."""
    with Network(int(stack.url().rpartition(":")[2])) as network:
        yield network


def other_page(chat: ChatPage) -> ChatPage:
    """Another tab of the same browser, at the same conversation."""
    other = ChatPage(chat.page.context.new_page(), chat.base_url)
    other.open(chat.conversation_id)
    return other


def await_more(chat: ChatPage) -> None:
    seen = len(text_of(chat.content))
    wait_until(lambda: len(text_of(chat.content)) > seen + 60, 20, "the answer goes on")


def test_a_reload_in_the_middle_goes_on(chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(20)
    chat.page.reload()
    expect(chat.stop).to_be_visible()
    chat.await_token(60)
    chat.stop.click()
    chat.expect_ended("Stopped")
    chat.expect_saved(client)


def test_going_elsewhere_and_back(chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about weirs")
    chat.await_token(5)
    conversation_id = chat.conversation_id
    chat.page.get_by_role("link", name="New conversation").click()
    expect(chat.send).to_be_visible()
    chat.page.get_by_role("link", name="Tell me about weirs").first.click()
    chat.await_token(30)
    assert chat.conversation_id == conversation_id
    chat.stop.click()
    chat.expect_ended("Stopped")
    chat.expect_saved(client)


def test_a_restarted_web_process_is_reconnected_to(stack: Stack, chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    stack.web.kill()
    expect(chat.note).to_have_text("Reconnecting…")
    stack.web.restart()
    expect(chat.note).to_be_hidden()
    await_more(chat)
    chat.stop.click()
    chat.expect_ended("Stopped")
    chat.expect_saved(client)


def test_a_cut_network_is_reconnected_over(stack: Stack, page: Page, network: Network, client: Client) -> None:
    """Cut and back, and a stop that is asked for meanwhile says that it could not be made, and can be made after."""
    chat = ChatPage(page, f"http://{HOST}:{network.port}")
    chat.sign_in(stack.user("tester"))
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    network.cut()
    expect(chat.note).to_have_text("Reconnecting…")
    chat.page.keyboard.press("Escape")
    expect(chat.page.get_by_role("alert")).to_contain_text("It could not be stopped")
    network.mend()
    expect(chat.note).to_be_hidden()
    await_more(chat)
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    chat.expect_saved(client)


def test_a_silent_network_is_noticed_by_who_comes_back(
    stack: Stack, page: Page, network: Network, client: Client
) -> None:
    """A machine that slept has connections that nobody answers any more; its clock has gone on."""
    page.clock.install()  # of the page alone: what is shared among tabs has the true one
    chat = ChatPage(page, f"http://{HOST}:{network.port}")
    # As in a browser that has no shared workers, so that the page's own clock counts.
    page.add_init_script("delete self.SharedWorker")
    chat.sign_in(stack.user("tester"))
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    network.silence()
    seen = text_of(chat.content)
    page.clock.fast_forward(46_000)
    expect(chat.note).to_have_text("Reconnecting…")
    network.speak()
    wait_until(lambda: len(text_of(chat.content)) > len(seen) + 60, 20, "the answer goes on")
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    assert chat.copied() == client.messages(chat.conversation_id)[-1]["content"]


def test_a_killed_worker_is_a_pause(stack: Stack, chat: ChatPage, client: Client) -> None:
    stack.start_recovery()
    chat.ask("Tell me about sluices")
    chat.await_token(10)
    other = stack.start_worker(wait=False)
    stack.worker.container.process.kill()
    other.ready()
    await_more(chat)
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    message = chat.expect_saved(client)
    assert client.stream(message["sessionId"])["attempt"] == 2


def test_two_tabs_see_one_stream_and_either_stops_it(chat: ChatPage, client: Client) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(5)
    second = other_page(chat)
    second.await_token(10)
    second.page.keyboard.press("Escape")
    second.expect_ended("Stopped")
    chat.expect_ended("Stopped")
    assert text_of(chat.content) == text_of(second.content)
    # And an idle tab sees what the other begins.
    chat.ask("And about weirs")
    expect(second.question).to_contain_text("And about weirs")
    second.await_token(3)
    chat.stop.click()
    second.expect_ended("Stopped")
    second.expect_saved(client)


def test_two_people_see_one_stream_and_either_stops_it(stack: Stack, chat: ChatPage, browser: Browser) -> None:
    client = stack.client()
    session = client.post_message("Ours", model="tokens=2,pace=0")
    stack.user("somebody")
    client.call("PUT", f"/api/conversations/{session['conversationId']}/members/somebody", {"role": "editor"})
    with quiet_context(browser) as context:
        theirs = ChatPage(context.new_page(), stack.url())
        theirs.sign_in(stack.user("somebody"))
        theirs.open(session["conversationId"])
        theirs.expect_complete()
        chat.open(session["conversationId"])
        chat.expect_complete()
        chat.ask("Tell us about sluices")
        expect(theirs.question).to_contain_text("Tell us about sluices")
        theirs.await_token(5)
        theirs.page.keyboard.press("Escape")
        theirs.expect_ended("Stopped")
        chat.expect_ended("Stopped")
        assert text_of(chat.content) == text_of(theirs.content)
        assert client.messages(session["conversationId"])[-1]["content"] == text_of(chat.content)


def test_ten_tabs_with_a_stream_each_do_not_hang(stack: Stack, chat: ChatPage, client: Client) -> None:
    """They share one connection: of the browser's six to a server, five are left for everything else."""
    sessions = [client.post_message(f"Tab {number}", model=ENDLESS) for number in range(TABS)]
    tabs = [ChatPage(chat.page.context.new_page(), chat.base_url) for _ in sessions]
    for tab, session in zip(tabs, sessions, strict=True):
        tab.open(session["conversationId"])
    for tab in tabs:
        tab.await_token(20)
    for tab in tabs:
        tab.page.keyboard.press("Escape")
    for tab, session in zip(tabs, sessions, strict=True):
        tab.expect_ended("Stopped")
        assert text_of(tab.content) == client.message(session)["content"]
    assert [client.stream(one["sessionId"])["viewers"] for one in sessions] == [0] * TABS


def test_the_place_in_the_queue_is_shown(stack: Stack, chat: ChatPage, client: Client) -> None:
    """And what waits there can be stopped."""
    stack.worker.container.process.kill()
    client.post_message("First", model=ENDLESS)
    session = client.post_message("Second", model=ENDLESS)
    chat.open(session["conversationId"])
    expect(chat.note).to_have_text("Waiting in the queue, 1 ahead")
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    assert client.message(session)["content"] == ""
    expect(chat.action("Continue")).to_be_visible()
