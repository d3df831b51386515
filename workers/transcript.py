"""The text of a session while a worker runs it: all of it, and how much of it the log has acknowledged."""

from __future__ import annotations

from uuid import UUID

from webapp.streams.log import Append, appends_of


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
        self._thought_before = 0

    def add(self, thinking: str, content: str) -> bool:
        """Take what arrived; thinking after the first content is dropped. Returns whether anything was taken."""
        known = min(self._thought_before, len(thinking))
        self._thought_before -= known
        thinking = "" if self.length > self.thinking_length else thinking[known:]
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

    def think_again(self) -> None:
        """The model begins its thinking anew: as much of it as there is already is left out."""
        self._thought_before = self.thinking_length

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
        return appends_of(session_id, epoch, text, self.thinking_length, self.acknowledged)

    def everything(self, session_id: UUID, epoch: int) -> list[Append]:
        """All text, for a log that has none: one append for each kind."""
        return appends_of(session_id, epoch, self.text, self.thinking_length)

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
