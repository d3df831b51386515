"""The chunked transfer coding: what comes out is the same however it was cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.chunked import Dechunker, InvalidChunk


def coded(chunks: list[bytes], extension: bytes = b"", trailers: bytes = b"") -> bytes:
    """A body of these chunks."""
    whole = (b"%x%b\r\n%b\r\n" % (len(one), extension, one) for one in chunks)
    return b"".join(whole) + b"0\r\n" + trailers + b"\r\n"


def fed(dechunker: Dechunker, pieces: list[bytes]) -> list[bytes]:
    """What is given out, by what it was given for."""
    return [b"".join(dechunker.feed(piece)) for piece in pieces]


@given(
    chunks=st.lists(st.binary(min_size=1, max_size=40) | st.just(b"\r\n0\r\n\r\n"), max_size=8),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    extension=st.sampled_from([b"", b";name=value", b" ; a"]),
    trailers=st.sampled_from([b"", b"X-Checked: yes\r\n"]),
)
def test_however_it_is_cut(chunks: list[bytes], cuts: list[int], extension: bytes, trailers: bytes) -> None:
    body = coded(chunks, extension, trailers)
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    dechunker = Dechunker()
    pieces = [body[start:stop] for start, stop in itertools.pairwise(places)]
    assert b"".join(fed(dechunker, pieces)) == b"".join(chunks)
    assert dechunker.ended


def test_a_part_of_a_chunk_is_given_out_as_it_comes() -> None:
    dechunker = Dechunker()
    assert fed(dechunker, [b"5\r\nab", b"cd", b"e\r", b"\n3\r\nxyz\r\n"]) == [b"ab", b"cd", b"e", b"xyz"]
    assert not dechunker.ended


@pytest.mark.parametrize("wrong", [b"zz\r\n", b"-5\r\n", b"\r\n", b"1" * 5000, b"2\r\nabcd\r\n0\r\n\r\n"])
def test_what_is_not_the_coding_is_refused_behind_what_came_before(wrong: bytes) -> None:
    data = Dechunker().feed(b"1\r\na\r\n" + wrong)
    assert next(data).startswith(b"a")
    with pytest.raises(InvalidChunk):
        next(data)
