"""The transcript, against a model so simple that it cannot be wrong: one string and two numbers."""

from __future__ import annotations

from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from webapp.streams.events import MESSAGE, THINKING
from webapp.streams.log import Append
from workers.transcript import Transcript

SESSION = UUID(int=7)
EPOCH = 3
pieces = st.text(st.sampled_from("ab\u0301שׁ👩\u200d𝔘"), max_size=5)


def sent(transcript: Transcript) -> list[tuple[str, int, str]]:
    """What would be appended next: kind, start and text of each."""
    return [(one.kind, one.start, one.text) for one in transcript.unacknowledged(SESSION, EPOCH)]


class TranscriptMachine(RuleBasedStateMachine):
    """Any order of what the upstream, the log and the checkpoints do to a transcript."""

    def __init__(self) -> None:
        super().__init__()
        self.transcript = Transcript()
        self.text = ""
        self.thinking_length = 0
        self.acknowledged = 0

    @initialize(thinking=pieces, content=pieces, data=st.data(), earlier=st.booleans())
    def begin(self, thinking: str, content: str, data: st.DataObject, earlier: bool) -> None:
        if earlier:
            self.text, self.thinking_length = thinking + content, len(thinking)
            self.acknowledged = data.draw(st.integers(0, len(self.text)))
            self.transcript.preload(self.text, self.thinking_length, self.acknowledged)

    @rule(thinking=pieces, content=pieces)
    def add(self, thinking: str, content: str) -> None:
        if len(self.text) > self.thinking_length:
            thinking = ""
        assert self.transcript.add(thinking, content) == bool(thinking or content)
        self.text += thinking + content
        self.thinking_length += len(thinking)

    @rule(thinking=pieces.filter(bool))
    @precondition(lambda self: len(self.text) > self.thinking_length)
    def late_thinking_is_dropped(self, thinking: str) -> None:
        assert not self.transcript.add(thinking, "")

    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.acknowledged = data.draw(st.integers(self.acknowledged, len(self.text)))
        self.transcript.acknowledge(self.acknowledged)

    @rule(data=st.data())
    def acknowledge_what_was_sent(self, data: st.DataObject) -> None:
        if appends := self.transcript.unacknowledged(SESSION, EPOCH):
            self.acknowledged = data.draw(st.sampled_from(appends)).end
            self.transcript.acknowledge(self.acknowledged)

    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        self.acknowledged = data.draw(st.integers(0, len(self.text)))
        self.transcript.rewind(self.acknowledged)

    @rule(data=st.data())
    def look_between(self, data: st.DataObject) -> None:
        start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(self.text))] * 2)))
        assert self.transcript.between(start, end) == self.text[start:end]

    @invariant()
    def the_text_is_the_models(self) -> None:
        assert self.transcript.text == self.text
        assert self.transcript.length == len(self.text)
        assert self.transcript.thinking_length == self.thinking_length
        assert self.transcript.acknowledged == self.acknowledged

    @invariant()
    def what_is_sent_next_is_the_rest_in_order_and_by_kind(self) -> None:
        cut = max(self.acknowledged, self.thinking_length)
        expected = [
            (THINKING, self.acknowledged, self.text[self.acknowledged : cut]),
            (MESSAGE, cut, self.text[cut:]),
        ]
        assert sent(self.transcript) == [one for one in expected if one[2]]


TestAnyOrder = TranscriptMachine.TestCase
TestAnyOrder.settings = settings(max_examples=120, stateful_step_count=25, deadline=None)


def test_thinking_after_the_first_content_is_neither_counted_nor_sent() -> None:
    transcript = Transcript()
    transcript.add("let me think", "")
    transcript.add("", "So")
    assert not transcript.add("wait", "")
    assert transcript.add("no", " it is")
    assert (transcript.text, transcript.thinking_length) == ("let me thinkSo it is", 12)
    assert sent(transcript) == [(THINKING, 0, "let me think"), (MESSAGE, 12, "So it is")]


def test_appends_name_their_session_and_epoch() -> None:
    transcript = Transcript()
    transcript.add("", "x")
    assert transcript.unacknowledged(SESSION, EPOCH) == [Append(SESSION, EPOCH, 0, MESSAGE, "x")]


def test_an_acknowledgement_inside_a_piece_sends_the_rest_of_it() -> None:
    transcript = Transcript()
    transcript.add("", "e\u0301tat")
    transcript.acknowledge(1)
    assert sent(transcript) == [(MESSAGE, 1, "\u0301tat")]


def test_a_log_that_was_lost_gets_everything_again_in_one_piece_of_each_kind() -> None:
    transcript = Transcript()
    transcript.add("hm", "")
    for piece in ("a", "b", "c"):
        transcript.add("", piece)
        transcript.acknowledge(transcript.length)
    assert sent(transcript) == []
    transcript.rewind(0)
    assert sent(transcript) == [(THINKING, 0, "hm"), (MESSAGE, 2, "abc")]


@given(st.lists(st.tuples(pieces, pieces), max_size=8), st.integers(1, 4))
def test_writing_it_out_in_any_portions_gives_the_whole(chunks: list[tuple[str, str]], portion: int) -> None:
    transcript, log, thinking = Transcript(), "", ""
    for chunk in chunks:
        transcript.add(*chunk)
        if len(log) % portion == 0:
            for append in transcript.unacknowledged(SESSION, EPOCH):
                assert append.start == len(log)
                log += append.text
                thinking += append.text if append.kind == THINKING else ""
                transcript.acknowledge(append.end)
    log += "".join(append.text for append in transcript.unacknowledged(SESSION, EPOCH))
    assert log == transcript.text
    assert thinking == log[: len(thinking)]


def test_what_was_seen_outlives_a_lost_log() -> None:
    """A Redis that was emptied is sent all again; what it once had acknowledged counts as seen all the same."""
    transcript = Transcript()
    transcript.add("", "abcdef")
    transcript.acknowledge(4)
    transcript.rewind(0)
    assert (transcript.acknowledged, transcript.seen) == (0, 4)


class TestThinkingAgain:
    """Another attempt, of which there is thinking and no answer: the model begins to think anew."""

    def taken_over(self, thinking: str) -> Transcript:
        transcript = Transcript()
        transcript.preload(thinking, len(thinking), len(thinking))
        transcript.think_again()
        return transcript

    def test_what_there_is_already_is_left_out(self) -> None:
        transcript = self.taken_over("h0 h1\u0301")
        assert [transcript.add(piece, "") for piece in ("h0 ", "h1", "\u0301 h2", " h3")] == [False, False, True, True]
        assert transcript.add("", "t0")
        assert (transcript.text, transcript.thinking_length) == ("h0 h1\u0301 h2 h3t0", 12)

    def test_an_answer_that_comes_sooner_is_whole(self) -> None:
        transcript = self.taken_over("h0 h1 ")
        assert not transcript.add("h", "")
        assert transcript.add("0", "t0 ")
        assert transcript.add("late", "t1")
        assert (transcript.text, transcript.thinking_length) == ("h0 h1 t0 t1", 6)
