"""Events: positions that compare as Redis IDs do, and one encoding, byte for byte."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webapp.errors import InvalidCursor
from webapp.streams.events import (
    COMMENT,
    DONE,
    DONE_SEQ,
    MESSAGE,
    PHASE,
    RECONNECT,
    SESSION,
    START,
    THINKING,
    LogEntry,
    Position,
    SentEvent,
    decode_events,
    done_position,
    encode_event,
    encode_json_event,
    phase_data,
)

offsets = st.integers(0, 10**15 - 1)
sequences = st.integers(0, DONE_SEQ)
positions = st.builds(Position, offsets, sequences)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

# Each is a text whose code points, UTF-16 units, bytes and visible signs differ in number.
COMBINING = "e\u0301\u0323o\u0308"
FAMILY = "👩‍👩‍👧‍👦🇮🇸"
HEBREW = "שָׁלוֹם"
ASTRAL = "𝔘𝔫"


class TestPosition:
    @given(positions)
    def test_what_is_sent_is_read_again(self, position: Position) -> None:
        assert Position.parse(str(position)) == position

    @given(positions, positions)
    def test_positions_compare_by_offset_and_then_by_number(self, one: Position, other: Position) -> None:
        assert (one < other) == ((one.offset, one.seq) < (other.offset, other.seq))

    @given(offsets, st.integers(0, DONE_SEQ - 1))
    def test_done_stands_behind_everything_at_its_offset(self, offset: int, seq: int) -> None:
        assert Position(offset, seq) < done_position(offset) < Position(offset + 1, 0)

    def test_redis_takes_the_number_of_done(self) -> None:
        assert DONE_SEQ == 2**32 - 1 < 2**64

    @pytest.mark.parametrize(
        "garbled",
        [
            "",
            "7",
            "-",
            "7-",
            "-7",
            "7-0-0",
            "-1-0",
            "+7-0",
            " 7-0",
            "7-0 ",
            "7-0\n",
            "7 - 0",
            "7.0-0",
            "0x7-0",
            "7_0-0",
            "٧-٠",
            "７-０",
            "7\u20110",
            "1" * 16 + "-0",
            f"7-{DONE_SEQ + 1}",
            "7-99999999999",
            "null",
            "🙂",
            "\x00",
            "7-0\x00",
        ],
    )
    def test_what_is_not_ours_is_refused(self, garbled: str) -> None:
        with pytest.raises(InvalidCursor) as caught:
            Position.parse(garbled)
        assert (caught.value.code, caught.value.status) == ("invalid_cursor", 400)
        assert "\n" not in caught.value.detail

    def test_a_long_cursor_is_not_repeated_whole(self) -> None:
        with pytest.raises(InvalidCursor) as caught:
            Position.parse("x" * 100_000)
        assert len(caught.value.detail) < 300

    @given(st.text())
    def test_any_text_is_a_position_or_refused(self, cursor: str) -> None:
        try:
            position = Position.parse(cursor)
        except InvalidCursor:
            return
        assert position >= START


class TestEncoding:
    @pytest.mark.parametrize(
        ("entry", "expected"),
        [
            pytest.param(
                LogEntry(Position(5, 0), MESSAGE, text="Hello"),
                b'id: 5-0\ndata: {"content":"Hello"}\n\n',
                id="message",
            ),
            pytest.param(
                LogEntry(Position(3, 0), THINKING, text="Hm…"),
                'id: 3-0\nevent: thinking\ndata: {"content":"Hm…"}\n\n'.encode(),
                id="thinking",
            ),
            pytest.param(
                LogEntry(Position(3, 1), PHASE, data=b'{"phase":"GENERATING","attempt":2}'),
                b'id: 3-1\nevent: phase\ndata: {"phase":"GENERATING","attempt":2}\n\n',
                id="phase",
            ),
            pytest.param(
                LogEntry(done_position(12), DONE, data=b'{"status":"COMPLETED"}'),
                b'id: 12-4294967295\nevent: done\ndata: {"status":"COMPLETED"}\n\n',
                id="done",
            ),
            pytest.param(
                LogEntry(Position(7, 0), MESSAGE, text='\n\r\t"\\\u2028'),
                'id: 7-0\ndata: {"content":"\\n\\r\\t\\"\\\\\u2028"}\n\n'.encode(),
                id="what would end a line",
            ),
        ],
    )
    def test_each_event_of_the_log(self, entry: LogEntry, expected: bytes) -> None:
        assert entry.encode() == expected

    def test_an_event_without_a_position_has_no_id(self) -> None:
        assert encode_json_event(SESSION, {"model": "m"}) == b'event: session\ndata: {"model":"m"}\n\n'
        assert encode_event(PHASE, phase_data("QUEUED", 1, 0)) == (
            b'event: phase\ndata: {"phase":"QUEUED","attempt":1,"position":0}\n\n'
        )

    def test_a_place_in_the_queue_is_told_only_where_there_is_one(self) -> None:
        assert phase_data("LOADING", 3) == b'{"phase":"LOADING","attempt":3}'

    def test_the_comment_is_one_to_every_parser(self) -> None:
        assert COMMENT.startswith(b":")
        assert COMMENT.endswith(b"\n\n")

    def test_several_in_one_piece_are_told_apart_again(self) -> None:
        whole = (
            RECONNECT
            + encode_json_event(SESSION, {"model": "a: b"})
            + COMMENT
            + LogEntry(Position(9, 0), MESSAGE, text=f"\n\n{FAMILY}").encode()
            + encode_event(DONE, b"{}", done_position(9))
        )
        assert list(decode_events(whole)) == [
            SentEvent(SESSION, {"model": "a: b"}, None),
            SentEvent(MESSAGE, {"content": f"\n\n{FAMILY}"}, "9-0"),
            SentEvent(DONE, {}, f"9-{DONE_SEQ}"),
        ]
        assert list(decode_events(COMMENT)) == []

    @given(texts.filter(bool))
    def test_a_text_is_one_line_of_json_whatever_it_holds(self, text: str) -> None:
        *head, data, empty, end = LogEntry(Position(len(text), 0), MESSAGE, text=text).encode().split(b"\n")
        assert (len(head), empty, end) == (1, b"", b"")
        assert b"\r" not in data
        assert json.loads(data.removeprefix(b"data: ")) == {"content": text}


class TestLogEntry:
    @pytest.mark.parametrize(
        ("code", "kind", "text", "data"),
        [
            (b"t", THINKING, HEBREW, b""),
            (b"c", MESSAGE, FAMILY, b""),
            (b"p", PHASE, "", b"{}"),
            (b"d", DONE, "", b"{}"),
        ],
    )
    @pytest.mark.parametrize("as_dict", [False, True])
    def test_it_is_read_as_redis_gives_it(self, code: bytes, kind: str, text: str, data: bytes, as_dict: bool) -> None:
        value = text.encode() or data
        entry = LogEntry.from_redis(b"20-3", {code: value} if as_dict else [code, value])
        assert entry == LogEntry(Position(20, 3), kind, text, data)
        assert entry.is_text == (kind in (THINKING, MESSAGE))

    def test_its_start_is_counted_in_code_points(self) -> None:
        assert LogEntry(Position(10, 0), MESSAGE, text=COMBINING).start == 10 - 5
        assert LogEntry(Position(10, 0), MESSAGE, text=ASTRAL).start == 10 - 2
        assert LogEntry(Position(10, 1), PHASE, data=b"{}").start == 10

    @pytest.mark.parametrize("text", [COMBINING, FAMILY, HEBREW, ASTRAL, "plain"])
    def test_it_is_cut_at_every_code_point(self, text: str) -> None:
        whole = LogEntry(Position(100 + len(text), 0), MESSAGE, text=text)
        for cut in range(len(text)):
            rest = whole.after(100 + cut)
            assert rest == LogEntry(whole.position, MESSAGE, text=text[cut:])
            assert rest.start == 100 + cut

    def test_what_lies_before_it_changes_nothing(self) -> None:
        entry = LogEntry(Position(10, 0), MESSAGE, text=COMBINING)
        assert entry.after(5) is entry
        assert entry.after(0) is entry

    def test_an_event_without_text_is_not_cut(self) -> None:
        entry = LogEntry(Position(10, 1), PHASE, data=b"{}")
        assert entry.after(10) is entry

    @given(st.lists(texts.filter(bool), max_size=6), st.data())
    def test_entries_cut_anywhere_give_the_rest_of_the_text(self, pieces: list[str], data: st.DataObject) -> None:
        whole, end, entries = "".join(pieces), 0, []
        for piece in pieces:
            end += len(piece)
            entries.append(LogEntry(Position(end, 0), MESSAGE, text=piece))
        cursor = data.draw(st.integers(0, len(whole)))
        rest = [entry.after(cursor).text for entry in entries if entry.position.offset > cursor]
        assert "".join(rest) == whole[cursor:]
