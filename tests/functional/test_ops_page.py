"""The operations page in a real browser, over the whole system."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Literal
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    Locator,
    Page,
    StorageState,
    ViewportSize,
    expect,
)

from tests.functional.browsing import PHONE, SERIOUS, quiet_context
from tests.functional.nodes import Client, Stack
from tests.services import wait_until
from tests.upstream import UpstreamProcess, expected_text

# Far longer than a test: they end when they are stopped.
ENDLESS = "name=endless,pace=100,tokens=20000"
SLOW = "name=slow,pace=10,tokens=20000"
CHARTS = ("Streams", "Tokens a second", "Terminations", "Stop timings", "First token", "Partial lengths")
WIDE = {"width": 1440, "height": 1000}
SCHEMES: tuple[tuple[Literal["light", "dark"], str], ...] = (
    ("light", ""),
    ("dark", ""),
    ("dark", "light"),
    ("light", "dark"),
)
"""What the system prefers, and what was chosen on the page in its place; empty: nothing."""
LIGHT_LINE, DARK_LINE = (11, 114, 133), (69, 184, 200)


@pytest.fixture(scope="module")
def signed_in(browser: Browser, module_stack: Stack) -> StorageState:
    """What a browser holds in which `olga`, an operator, has signed in."""
    token = module_stack.cli("users", "create", "olga", "--operator").split()[-1]
    with quiet_context(browser) as context:
        page = context.new_page()
        page.goto(f"{module_stack.url()}/ops")
        page.get_by_label("Token").fill(token)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Operations")).to_be_visible()
        assert page.url == f"{module_stack.url()}/ops"
        return context.storage_state()


@pytest.fixture
def page(browser: Browser, signed_in: StorageState) -> Iterator[Page]:
    """A page of `olga`, which complains of nothing."""
    with quiet_context(browser, viewport=WIDE, storage_state=signed_in) as context:
        page = context.new_page()
        page.clock.install()
        yield page


class OpsPage:
    """The page as a person sees it: by what things are called."""

    def __init__(self, page: Page, stack: Stack) -> None:
        self.page = page
        self.url = f"{stack.url()}/ops"
        self.trouble = page.locator(".ops-trouble").first
        self.streams = page.get_by_role("table", name="Streams that have not ended").locator("tbody tr")
        self.workers = page.get_by_role("table", name="Workers").locator("tbody tr")
        self.endings = page.get_by_role("table", name="The last streams that ended").locator("tbody tr")

    def open(self) -> None:
        self.page.goto(self.url)
        expect(self.page.get_by_text(re.compile(r"^Updated \d\d:\d\d:\d\d$"))).to_be_visible()

    def hurry(self) -> None:
        """Let the page's own clock jump ahead, so that what it does again and again is due now."""
        self.page.clock.fast_forward(10_000)

    def stream(self, session_id: str) -> Locator:
        return self.streams.filter(has=self.page.get_by_title(session_id))

    def ending(self, session_id: str) -> Locator:
        return self.endings.filter(has=self.page.get_by_title(session_id))

    def figure(self, name: str) -> Locator:
        return self.page.locator("dl div", has=self.page.get_by_text(name, exact=True)).locator("dd").first

    def chart(self, name: str) -> Locator:
        return self.page.get_by_role("img", name=re.compile(f"^{name}: "))


def number_in(cell: Locator) -> float:
    """The number that a cell begins with; -1, where there is none yet."""
    found = re.match(r"[\d,.]+", cell.inner_text())
    return float(found[0].replace(",", "")) if found else -1.0


@pytest.fixture
def ops(stack: Stack, page: Page) -> OpsPage:
    """The page, open, as the operator `olga` sees it; `client` is another user, `tester`."""
    ops = OpsPage(page, stack)
    ops.open()
    return ops


def test_a_stream_appears_grows_and_is_stopped(
    stack: Stack, ops: OpsPage, client: Client, upstream: UpstreamProcess
) -> None:
    session = client.post_message("Tell me about sluices", model=ENDLESS)
    reader = client.follow(session["sessionId"])
    row = ops.stream(session["sessionId"])
    user, model, phase, age, length, rate, viewers = (row.locator("th, td").nth(index) for index in range(7))
    expect(user).to_have_text("tester")
    expect(model).to_have_text(ENDLESS)
    expect(phase).to_have_text("generating")
    expect(viewers).to_have_text("1")
    expect(rate).to_have_text(re.compile(r"^\d+(\.\d)?/s$"))
    # 100 tokens a second of some five characters each, however busy the machine
    assert 50 < number_in(rate) < 2000
    before = number_in(length), number_in(age)
    wait_until(lambda: number_in(length) > before[0] and number_in(age) > before[1], what="it grows by itself")
    expect(ops.figure("Active streams")).to_have_text("1")
    expect(ops.figure("Readers")).to_have_text("1")
    expect(ops.figure("Workers")).to_have_text("1")
    wait_until(lambda: number_in(ops.figure("Tokens a second")) > 20, what="tokens are counted")
    expect(ops.workers.locator("td").nth(0)).to_have_text("alive")
    expect(ops.workers.locator("td").nth(1)).to_have_text("1")

    button = row.get_by_role("button", name="Stop the stream: tester")
    assert button.evaluate("button => { button.click(); return button.textContent; }") == "stopping…"
    ending = ops.ending(session["sessionId"])
    expect(ending).to_be_visible()
    message = client.message(session)
    assert (message["status"], message["reason"]) == ("TERMINATED", "admin")
    assert expected_text(ENDLESS).content.startswith(message["content"])
    cells = ending.locator("th, td").all_inner_texts()
    assert cells[1:6] == ["tester", ENDLESS, "admin", "olga", f"{message['length']:,}"]
    assert all(re.fullmatch(r"\d+(\.\d)? (ms|s)", cell) for cell in cells[6:9]), cells
    expect(ops.page.get_by_role("status")).to_have_text(
        f"Stopped the stream of tester: {message['length']:,} characters kept"
    )
    expect(row).to_contain_text(f"kept {message['length']:,}")
    assert client.stream(session["sessionId"])["terminatedBy"] == "olga"
    assert reader.wait_until_done()["reason"] == "admin"
    assert reader.text == message["content"]
    upstream.wait_until(lambda records: records[-1].outcome == "disconnected")
    expect(ops.figure("Active streams")).to_have_text("0")
    expect(ops.figure("Stop p99")).to_have_text(re.compile(r"^\d+(\.\d)? (ms|s)$"))
    expect(ops.chart("Terminations")).to_have_attribute("aria-label", re.compile(r"admin \d+"))


def test_rows_are_written_over_and_the_focus_stays(stack: Stack, page: Page, client: Client) -> None:
    sessions = [client.post_message("Tell me", model=SLOW) for _ in range(3)]
    ops = OpsPage(page, stack)
    ops.open()
    expect(ops.streams).to_have_count(3)
    oldest, middle, newest = (ops.stream(one["sessionId"]) for one in sessions)
    middle.evaluate("row => { row.marked = true; }")
    middle.get_by_role("button").focus()
    before = number_in(middle.locator("td").nth(3))
    client.terminate(sessions[2]["sessionId"])
    ops.hurry()
    expect(newest).to_have_count(0)
    expect(middle.get_by_role("button")).to_be_focused()
    wait_until(lambda: number_in(middle.locator("td").nth(3)) > before, what="the row is written over")
    assert middle.evaluate("row => row.marked")

    client.terminate(sessions[1]["sessionId"])
    ops.hurry()
    expect(middle).to_have_count(0)
    expect(oldest.get_by_role("button")).to_be_focused()
    client.terminate(sessions[0]["sessionId"])
    ops.hurry()
    expect(page.get_by_text("No stream is running.")).to_be_visible()
    expect(page.get_by_role("region", name="Live streams")).to_be_focused()


def test_who_is_no_operator_is_refused_and_told_why(stack: Stack, browser: Browser) -> None:
    with quiet_context(browser) as context:
        page = context.new_page()
        page.goto(f"{stack.url()}/sign-in?token={stack.user('tester')}")
        expect(page.get_by_role("textbox", name="Message")).to_be_visible()
        answer = page.goto(f"{stack.url()}/ops")
        assert answer is not None
        assert answer.status == 403
        expect(page.get_by_text("sluicegate users operator tester")).to_be_visible()


def test_a_role_that_is_taken_away_ends_the_page(stack: Stack, ops: OpsPage) -> None:
    stack.cli("users", "operator", "olga", "--revoke")
    try:
        ops.hurry()
        expect(ops.page.get_by_role("heading", name="For operators")).to_be_visible()
    finally:
        stack.cli("users", "operator", "olga")


def test_a_server_that_is_away_is_said_and_come_back_to(stack: Stack, ops: OpsPage) -> None:
    stack.web.kill()
    ops.hurry()
    expect(ops.trouble).to_have_text("Sluicegate cannot be reached, trying again")
    expect(ops.figure("Workers")).to_have_text("1")  # what was known last
    stack.web.restart()
    ops.hurry()
    expect(ops.trouble).to_be_hidden()
    expect(ops.page.get_by_role("status")).to_have_text("Sluicegate answers again")


def test_it_can_be_read_by_all_in_light_and_dark_wide_and_narrow(stack: Stack, page: Page, client: Client) -> None:
    session = client.post_message("Tell me about sluices", model=ENDLESS)
    wait_until(lambda: client.stream(session["sessionId"])["phase"] == "GENERATING", what="a worker has it")
    ops = OpsPage(page, stack)
    ops.open()
    row = ops.stream(session["sessionId"])
    expect(row).to_contain_text("/s")
    expect(ops.chart("Streams")).to_have_attribute("aria-label", re.compile("active 1, queued 0"))
    for size, (scheme, theme) in product((WIDE, PHONE), SCHEMES):
        page.set_viewport_size(ViewportSize(width=size["width"], height=size["height"]))
        page.emulate_media(color_scheme=scheme)
        page.evaluate("theme => { document.documentElement.dataset.theme = theme; }", theme)
        expect(ops.chart("Partial lengths").locator("canvas")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        for chart in CHARTS:
            canvas = ops.chart(chart).locator("canvas")  # a chart that is drawn anew has none for a moment
            wait_until(
                lambda c=canvas, w=size["width"]: (box := c.bounding_box()) and 250 < box["width"] < w, 10, chart
            )
        button = wait_until(row.get_by_role("button").bounding_box)
        assert button["x"] + button["width"] <= size["width"]  # to be had without scrolling
        line, other = (LIGHT_LINE, DARK_LINE) if (theme or scheme) == "light" else (DARK_LINE, LIGHT_LINE)
        wait_until(
            lambda lines=(line, other): [one in colours_in(ops.chart("Streams")) for one in lines] == [True, False],
            10,
            f"the colours of {scheme}, {theme}",
        )
        if not theme:
            found = Axe().run(page).response["violations"]
            assert [(one["id"], one["nodes"]) for one in found if one["impact"] in SERIOUS] == []
    row.get_by_role("button").press("Enter")
    expect(ops.ending(session["sessionId"])).to_contain_text("olga")
    ops.hurry()
    expect(row).to_have_count(0)


def colours_in(chart: Locator) -> set[tuple[int, ...]]:
    """Those that the chart's canvas has, where they cover."""
    code = """canvas => {
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      const found = new Set();
      for (let at = 0; at < data.length; at += 4) if (data[at + 3] === 255) found.add(data.slice(at, at + 3).join());
      return [...found];
    }"""
    return {tuple(map(int, one.split(","))) for one in chart.locator("canvas").evaluate(code)}


def test_a_page_that_is_not_seen_asks_nothing(ops: OpsPage) -> None:
    hide = "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true}); "
    hide += "document.dispatchEvent(new Event('visibilitychange')); }"
    ops.page.evaluate(hide, True)
    ops.page.wait_for_load_state("networkidle")
    asked: list[str] = []
    ops.page.on("request", lambda request: asked.append(request.url))
    ops.hurry()
    ops.page.evaluate("fetch('/healthz')")  # which is behind all that was asked before it
    assert [urlsplit(one).path for one in asked] == ["/healthz"]
    with ops.page.expect_response(lambda answer: answer.url.endswith("/api/operations")):
        ops.page.evaluate(hide, False)


def test_the_window_is_chosen_and_kept_and_links_lead_elsewhere(ops: OpsPage) -> None:
    with ops.page.expect_response(lambda answer: "minutes=1440" in answer.url):
        ops.page.get_by_role("radio", name="24 h").check()
    ops.page.reload()
    expect(ops.page.get_by_role("radio", name="24 h")).to_be_checked()
    links = ops.page.get_by_role("navigation", name="Elsewhere").get_by_role("link")
    found = {one.inner_text(): one.get_attribute("href") for one in links.all()}
    assert found == {"Chat": "/", "Flower": "http://127.0.0.1:5555/", "API": "/docs", "Metrics": "/metrics"}
