"""What a model writes, at the chat page: as Markdown while it grows, whatever it is, and never as anything else."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

import pytest
from playwright.sync_api import expect
from sqlalchemy import NullPool, create_engine, insert, select

from tests.functional.browsing import ChatPage, text_of
from tests.functional.nodes import Client, Stack
from tests.upstream import expected_text
from webapp.models import Message, new_id

ENDLESS = "pace=40,tokens=2000"
MARKDOWN = "alphabet=markdown,tokens=51,pace=200"
LONG_MARKDOWN = "alphabet=markdown,tokens=400,pace=100"
HOSTILE = "alphabet=hostile,tokens=45,pace=200"
# Whatever could run, load, or be sent.
ACTIVE = "script, img, svg, iframe, object, embed, style, link, form, input, video, audio, math, base, meta"
LONG_LINE_CHARACTERS = 1_000_000
MESSAGES = 1000


@pytest.fixture(scope="module")
def stack_settings() -> Mapping[str, str]:
    return {"SLUICEGATE_DEFAULT_MODEL": ENDLESS}


def repeat_messages(stack: Stack, conversation_id: UUID, count: int) -> None:
    """Have a conversation's messages said again and again, so many in all."""
    columns = [column for column in Message.__table__.c if column.name != "id"]
    with create_engine(stack.environment["DATABASE_URL"], poolclass=NullPool).begin() as connection:
        here = select(*columns).where(Message.conversation_id == conversation_id).order_by(Message.id)
        said = [row._asdict() for row in connection.execute(here)]
        connection.execute(insert(Message), [said[n % len(said)] | {"id": new_id()} for n in range(count)])


def test_markdown_is_laid_out_while_it_grows(chat: ChatPage, client: Client) -> None:
    """And at the end it is what it would have been, had it come whole."""
    session = client.post_message("Everything", model=LONG_MARKDOWN)
    chat.open(session["conversationId"])
    expect(chat.content.locator("h4").first).to_have_text("Part t0")
    expect(chat.content.locator("table td").first).to_have_text("row t15")
    expect(chat.answer).to_have_attribute("data-state", "active")
    expect(chat.content.locator(".hljs-keyword").first).to_have_text("def")
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    assert expected_text(LONG_MARKDOWN).content.startswith(chat.expect_saved(client)["content"])


def test_a_block_of_code_is_copied(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Everything", model=MARKDOWN)
    chat.open(session["conversationId"])
    chat.expect_complete()
    button = chat.content.locator(".copy-code").first
    button.focus()
    button.click()
    expect(button).to_have_text("Copied")
    copied = chat.page.evaluate("navigator.clipboard.readText()")
    assert copied == "def t10(x: int) -> str:\n    return f'{x} t11'  # a comment"
    expect(button).to_have_text("Copy")


def test_hostile_output_does_nothing(chat: ChatPage, client: Client) -> None:
    """Scripts, handlers, addresses that are code, pictures that tell who reads, frames, forms, styles: shown as text.
    The page's fixture sees to it that nothing was refused, and nobody else asked."""
    session = client.post_message("Do your worst", model=HOSTILE)
    chat.open(session["conversationId"])
    chat.await_token(0)
    chat.expect_complete()
    for _ in range(2):
        assert chat.page.evaluate("window.pwned") is None
        assert chat.content.locator(ACTIVE).count() == 0
        schemes = {link.evaluate("link => link.protocol") for link in chat.content.locator("a[href]").all()}
        assert schemes == {"https:"}
        names = chat.content.evaluate(
            "root => [...new Set([...root.querySelectorAll('*')].flatMap((one) => one.getAttributeNames()))]"
        )
        assert not [name for name in names if name.startswith("on") or name in ("style", "id", "src", "srcdoc")]
        expect(chat.content).to_contain_text("<script>window.pwned = 1</script>")
        expect(chat.content).to_contain_text('<img src="x" onerror="window.pwned = 1">')
        message = chat.expect_saved(client)  # and loads the page anew
        assert message["content"] == expected_text(HOSTILE).content


def test_what_turns_text_around_is_shown_and_kept_within(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Turn around", model=HOSTILE)
    chat.open(session["conversationId"])
    chat.expect_complete()
    marks = chat.content.locator(".control")
    assert set(marks.evaluate_all("all => all.map((one) => one.dataset.code)")) >= {"U+202E", "U+202C", "U+2066"}
    assert text_of(marks.first) == "\u202e"
    assert marks.first.evaluate("one => getComputedStyle(one).unicodeBidi") == "isolate"
    assert chat.content.locator("pre .control").count() > 0
    # The characters after an override stand to the right of each other, as they are written.
    order = chat.content.evaluate(
        """root => {
          const mark = [...root.querySelectorAll("p .control")].find((one) => one.dataset.code === "U+202E");
          const range = document.createRange();
          const at = (index) => {
            range.setStart(mark.nextSibling, index);
            range.setEnd(mark.nextSibling, index + 1);
            return range.getBoundingClientRect().left;
          };
          return [0, 1, 2, 3].map(at);
        }"""
    )
    assert order == sorted(order)


def test_a_half_open_fence_is_code_at_once(chat: ChatPage, client: Client) -> None:
    """And stays code, with all that comes after, where it is never closed."""
    model = HOSTILE.replace("tokens=45", "tokens=30") + ",silence_at=15:30"
    session = client.post_message("Never close it", model=model)
    chat.open(session["conversationId"])
    code = chat.content.locator("pre code").last
    expect(code).to_have_text("let half = 'open t14 <script>window.pwned = 1</script>';")
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    assert chat.expect_saved(client)["content"].endswith("</script>';\n")
    expect(code).to_have_text("let half = 'open t14 <script>window.pwned = 1</script>';")


def test_a_line_of_a_megabyte_does_not_hang_the_page(chat: ChatPage, client: Client) -> None:
    model = f"tokens=30,pace=30,long_line_at=10:{LONG_LINE_CHARACTERS}"
    session = client.post_message("Go on and on", model=model)
    chat.open(session["conversationId"])
    chat.await_token(9)
    chat.expect_complete()
    expect(chat.content).to_contain_text("t29")
    chat.box.fill("still there")
    message = client.message(session)
    assert len(message["content"]) > LONG_LINE_CHARACTERS
    assert text_of(chat.content) == message["content"]
    assert chat.copied() == message["content"]


def test_a_reader_who_scrolls_up_is_left_alone(chat: ChatPage, client: Client) -> None:
    session = client.post_message("Much", model="tokens=5000,pace=300")
    chat.open(session["conversationId"])
    box = chat.messages
    chat.await_token(1500)
    assert box.evaluate("box => box.scrollHeight - box.clientHeight - box.scrollTop") < 2

    box.hover()
    chat.page.mouse.wheel(0, -120)
    latest = chat.page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    top = box.evaluate("box => box.scrollTop")
    chat.await_token(2000)
    assert box.evaluate("box => box.scrollTop") == top

    latest.click()
    expect(latest).to_be_hidden()
    chat.stop.click()
    chat.expect_ended("Stopped")


def test_a_selection_survives_what_is_written_on(chat: ChatPage) -> None:
    chat.ask("Tell me about sluices")
    chat.await_token(10)
    select = """root => {
      const text = root.querySelector("p").firstChild;
      getSelection().setBaseAndExtent(text, 0, text, 8);
      return String(getSelection());
    }"""
    selected = chat.content.evaluate(select)
    chat.await_token(60)
    assert chat.page.evaluate("String(getSelection())") == selected
    chat.page.keyboard.press("Escape")  # a click would end it, as anywhere
    chat.expect_ended("Stopped")
    assert chat.page.evaluate("String(getSelection())") == selected


def test_a_long_conversation_is_laid_out_where_one_looks(stack: Stack, chat: ChatPage, client: Client) -> None:
    """A thousand messages: the last is there, few are laid out, and the first is once one goes there."""
    session = client.post_message("The beginning", model=MARKDOWN)
    client.follow(session["sessionId"]).wait_until_done()
    repeat_messages(stack, UUID(session["conversationId"]), MESSAGES - 2)
    chat.open(session["conversationId"])
    expect(chat.page.locator(".message")).to_have_count(MESSAGES)
    expect(chat.answer).to_be_in_viewport()
    assert chat.page.locator(".content .block table").count() < MESSAGES / 5
    chat.messages.hover()
    chat.page.mouse.wheel(0, -1e7)
    first = chat.answers.first
    expect(first.locator("table").first).to_be_visible()
    chat.ask("And one more")
    chat.await_token(5)
    chat.page.keyboard.press("Escape")
    chat.expect_ended("Stopped")
    expect(chat.answer).to_be_in_viewport()
