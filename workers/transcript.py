"""The text of a session while a worker runs it: all of it, and how much of it the log has acknowledged."""

from __future__ import annotations

from uuid import UUID

from webapp.streams.events import MESSAGE, THINKING
from webapp.streams.log import Append


class Transcript:
    """Thinking, then content, counted in code points. Kept as pieces, joined when somebody asks."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._acknowledged_pieces = 0
        self.length = 0
        self.thinking_length = 0
        self.acknowledged = 0
        self.seen = 0
        """How far any reader may have come: what was ever acknowledged, also by a Redis that has lost it since."""

    def add(self, thinking: str, content: str) -> bool:
        """Take what arrived; thinking after the first content is dropped. Returns whether anything was taken."""
        if self.length > self.thinking_length:
            thinking = ""
        for piece in (thinking, content):
            if piece:
                self._pieces.append(piece)
                self.length += len(piece)
        self.thinking_length += len(thinking)
        return bool(thinking or content)

    def preload(self, text: str, thinking_length: int, acknowledged: int) -> None:
        """Begin with the text of earlier attempts."""
        self._pieces, self.length, self.thinking_length = [text], len(text), thinking_length
        self.seen = len(text)
        self.rewind(acknowledged)

    def rewind(self, acknowledged: int) -> None:
        """Take the log's word for how much it has: everything beyond is sent again."""
        text = self.text
        self._pieces = [text[:acknowledged], text[acknowledged:]]
        self._acknowledged_pieces = 1
        self.acknowledged = acknowledged

    def acknowledge(self, end: int) -> None:
        """The log has the text up to `end`, which is where some piece ends, or not."""
        self.seen = max(self.seen, end)
        position, index = self.acknowledged, self._acknowledged_pieces
        while position < end and index < len(self._pieces):
            position += len(self._pieces[index])
            index += 1
        if position == end:
            self.acknowledged, self._acknowledged_pieces = end, index
        else:
            self.rewind(end)

    def unacknowledged(self, session_id: UUID, epoch: int) -> list[Append]:
        """What the log does not have yet: one append for each kind."""
        text = "".join(self._pieces[self._acknowledged_pieces :])
        thinking = text[: max(0, self.thinking_length - self.acknowledged)]
        content = text[len(thinking) :]
        appends = []
        if thinking:
            appends.append(Append(session_id, epoch, self.acknowledged, THINKING, thinking))
        if content:
            appends.append(Append(session_id, epoch, self.acknowledged + len(thinking), MESSAGE, content))
        return appends

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    def between(self, start: int, end: int) -> str:
        """The code points (start, end]. Costs by its own length where `start` is near the end."""
        pieces: list[str] = []
        position = self.length
        for piece in reversed(self._pieces):
            if position <= start:
                break
            pieces.append(piece)
            position -= len(piece)
        return "".join(reversed(pieces))[max(0, start - position) : max(0, end - position)]
