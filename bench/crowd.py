"""The people of a chaos run: they ask, read, drop out, come back and stop, as is planned, and keep what they saw.

One asyncio loop serves all of them. They speak to a web process that they choose by chance, and go to another one when
it does not answer. What they were sent is kept for the audit, which alone decides whether it was right.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench import schedule, wire
from bench.schedule import Load, ReaderPlan, StreamPlan
from bench.seen import Seen, Stop, Stream

HEAD_SECONDS: Final = 5.0
"""That a web process has for beginning its answer to a reader; a frozen one does not."""
START_SECONDS: Final = 15.0
STOP_SECONDS: Final = 16.0
"""Longer than a terminate call may wait for a worker without Redis."""
SILENCE_SECONDS: Final = 12.0
"""Without even a comment line, after which a reader goes elsewhere."""
RETRY_SECONDS: Final = (0.1, 1.0)
"""Between two tries: anything in between, so that not all come back at once."""
GIVE_UP_SECONDS: Final = 60.0


class Way:
    """How one client reaches the system: by a web process chosen by chance, and by the next once that fails it."""

    def __init__(self, urls: Sequence[str], seed: str) -> None:
        self._draw = random.Random(seed)
        self._urls = urls
        self._at = self._draw.randrange(len(urls))

    @property
    def url(self) -> str:
        """Where to ask now."""
        return self._urls[self._at]

    async def elsewhere(self) -> None:
        """Wait a little, then ask the next one."""
        await asyncio.sleep(self._draw.uniform(*RETRY_SECONDS))
        self._at = (self._at + 1) % len(self._urls)


class Crowd:
    """All streams of a run. `run` is its life; the other methods may be called from any thread."""

    def __init__(self, web_urls: Sequence[str], token: str, seed: int, load: Load) -> None:
        self.streams: list[Stream] = []
        self.unexpected: list[str] = []
        """Answers that no fault excuses: another status than those that say "try again"."""
        self.refusals = 0
        self.ending = False
        self._web_urls = list(web_urls)
        self._headers = {"Authorization": f"Bearer {token}"}
        self._seed = seed
        self._load = load
        self._over = asyncio.Event()
        self._give_up_at = math.inf
        """When nobody waits any longer for what does not end; the audit says what that is."""
        self._late: list[asyncio.Task[None]] = []
        """Of streams that have ended: readers that are still to be told so."""

    def _way(self, name: str) -> Way:
        return Way(self._web_urls, f"{self._seed}/{name}")

    def active(self) -> list[Stream]:
        """Accepted, and not known to have ended."""
        return [one for one in self.streams if one.accepted_at and not one.ended_at]

    # -- the run -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep every slot at a stream until `finish` is called, then stop what runs and see it to its end."""
        await asyncio.gather(*(self._slot(slot) for slot in range(self._load.slots)))
        await self._end_when_done(self._late)

    def finish(self) -> None:
        """Begin nothing any more, and stop what runs; call it in the loop's thread."""
        self.ending = True
        self._give_up_at = time.monotonic() + GIVE_UP_SECONDS
        self._over.set()

    async def look_again(self, streams: Sequence[Stream]) -> None:
        """Long after the end: read each once more, come back with the id of `done`, and ask for the receipt."""
        places = asyncio.Semaphore(8)

        async def look(stream: Stream) -> None:
            async with places, asyncio.timeout(GIVE_UP_SECONDS):
                way, seen = self._way(f"{stream.plan.name}/again"), Seen(ReaderPlan(0.0))
                stream.readers.append(seen)
                await self._follow(stream, seen, way)
                path = f"/api/streams/{stream.session_id}/events"
                answer = await self._once(way, "GET", path, None, {"Last-Event-ID": str(seen.last_id)}, HEAD_SECONDS)
                if answer != (204, None):
                    self.unexpected.append(f"{stream.plan.name} with the id of `done`: {answer}, and not 204")
                await self._ask_to_stop(stream, way)

        await self._end_when_done([asyncio.create_task(look(one)) for one in streams])

    async def _end_when_done(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        if tasks:
            await asyncio.wait(tasks, timeout=GIVE_UP_SECONDS)
        await self._end(tasks)

    async def _slot(self, slot: int) -> None:
        for plan in schedule.streams(self._seed, slot, self._load):
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._over.wait(), plan.pause_seconds)
            if self.ending:
                return
            await self._see_through(plan)

    async def _see_through(self, plan: StreamPlan) -> None:
        stream = Stream(plan, time.monotonic())
        self.streams.append(stream)
        way = self._way(plan.name)
        tasks = []
        if plan.as_response and plan.readers:
            seen = Seen(plan.readers[0])
            stream.readers.append(seen)
            tasks.append(asyncio.create_task(self._read_response(stream, seen, way)))
            await self._until(lambda: bool(stream.accepted_at) or tasks[0].done())
        if not stream.accepted_at and not await self._start(stream, way):
            await self._end(tasks)
            self.streams.remove(stream)
            return
        stream.progress_at = stream.accepted_at
        for number, reader in enumerate(plan.readers):
            if number or not tasks:
                tasks.append(asyncio.create_task(self._arrive(stream, reader, f"{plan.name}/{number}")))
        tasks += [
            asyncio.create_task(self._stop(stream, self._way(f"{plan.name}/stop {n}"))) for n in range(plan.stoppers)
        ]
        await self._end_of(stream, tasks)

    async def _end_of(self, stream: Stream, tasks: list[asyncio.Task[None]]) -> None:
        """Until the stream has ended; the slot does not wait until its readers have all of it."""
        way = self._way(stream.plan.name)
        while not stream.ended_at and time.monotonic() < self._give_up_at:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stream.over.wait(), 1.0)
            if not stream.watching and not stream.ended_at:
                await self._look(stream, way)
        self._late = [task for task in self._late if not task.done() or task.exception()] + tasks

    async def _end(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """End tasks that may still run; what one failed with is somebody's defect."""
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                self.unexpected.append(repr(outcome))

    async def _look(self, stream: Stream, way: Way) -> None:
        """Nobody reads it: ask how it is, now and then."""
        answer = await self._once(way, "GET", f"/api/streams/{stream.session_id}", None, {}, HEAD_SECONDS)
        if answer is None:
            await way.elsewhere()
        elif answer[1]["status"] != "ACTIVE":
            stream.end()

    async def _until(self, condition: Any) -> None:
        while not condition():
            await asyncio.sleep(0.02)

    # -- asking --------------------------------------------------------------------------------

    def _message(self, stream: Stream) -> tuple[dict[str, Any], dict[str, str]]:
        body: dict[str, Any] = {"content": f"message {stream.plan.name}", "model": stream.plan.model}
        if "thinking=" in stream.plan.model:
            body["think"] = True
        return body, {"Idempotency-Key": f"{self._seed}/{stream.plan.name}"}

    async def _start(self, stream: Stream, way: Way) -> bool:
        """Ask until it is accepted; the key keeps an answer that was lost from making two of it."""
        body, key = self._message(stream)
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while time.monotonic() < deadline:
            answer = await self._once(
                way, "POST", "/api/stream-message", body, key | {"Accept": "application/json"}, START_SECONDS
            )
            if answer is not None and answer[0] == 202:
                self._accepted(stream, answer[1]["sessionId"])
                return True
            await way.elsewhere()
        self.unexpected.append(f"{stream.plan.name} was not accepted for {GIVE_UP_SECONDS:g} s")
        return False

    @staticmethod
    def _accepted(stream: Stream, session_id: str) -> None:
        if stream.session_id not in ("", session_id):
            raise AssertionError(f"{stream.plan.name} was accepted as {stream.session_id} and as {session_id}")
        stream.session_id = session_id
        stream.accepted_at = stream.accepted_at or time.monotonic()

    async def _once(
        self, way: Way, method: str, path: str, body: Any, headers: dict[str, str], timeout_seconds: float
    ) -> tuple[int, Any] | None:
        """One call at one web process; None where it was not answered, or with "try again"."""
        try:
            async with wire.request(
                way.url,
                method,
                path,
                self._headers | headers,
                body,
                timeout_seconds=timeout_seconds,
            ) as response:
                data = await response.body(timeout_seconds)
                if self._is_refusal(response.status, method, path, data):
                    return None
                return response.status, json.loads(data) if data else None
        except wire.BROKEN:
            return None

    def _is_refusal(self, status: int, method: str, path: str, data: bytes) -> bool:
        if status < 300:
            return False
        self.refusals += 1
        if status != 503:
            self.unexpected.append(f"{method} {path}: {status} {data[:300].decode(errors='replace')}")
        return True

    # -- stopping ------------------------------------------------------------------------------

    async def _stop(self, stream: Stream, way: Way) -> None:
        """One caller; at the end of the run everybody stops what is left."""
        plan = stream.plan
        wait_seconds = None if plan.stop_seconds is None else stream.accepted_at + plan.stop_seconds - time.monotonic()
        waits = [asyncio.create_task(self._over.wait()), asyncio.create_task(stream.over.wait())]
        await asyncio.wait(waits, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
        await self._end(waits)
        if stream.ended_at and plan.stop_seconds is None:
            return
        await self._ask_to_stop(stream, way)

    async def _ask_to_stop(self, stream: Stream, way: Way) -> None:
        """One terminate call, repeated until it is answered."""
        stop = Stop(time.monotonic())
        stream.stops.append(stop)
        while stop.receipt is None and time.monotonic() < stop.asked_at + GIVE_UP_SECONDS:
            body = {"sessionId": stream.session_id}
            answer = await self._once(way, "POST", "/api/terminate-stream", body, {}, STOP_SECONDS)
            if answer is not None and answer[0] == 200:
                stop.receipt, stop.answered_at = answer[1], time.monotonic()
                stream.end()
            else:
                await way.elsewhere()

    # -- reading -------------------------------------------------------------------------------

    async def _read_response(self, stream: Stream, seen: Seen, way: Way) -> None:
        """Read the answer to the POST itself; where it breaks, go on as any reader does."""
        body, headers = self._message(stream)
        headers |= {"Accept": "text/event-stream"}
        stream.watching += 1
        try:
            await self._connect(stream, seen, way, "POST", "/api/stream-message", body, headers, START_SECONDS)
            if not stream.accepted_at and not await self._start(stream, way):
                return
            await self._follow(stream, seen, way)
        finally:
            stream.watching -= 1

    async def _arrive(self, stream: Stream, plan: ReaderPlan, name: str) -> None:
        """Come when it is planned, stay until `done` or until it is planned to leave."""
        arrives_at = stream.accepted_at + plan.arrives_seconds
        while not stream.ended_at and (left := arrives_at - time.monotonic()) > 0:  # who would be late comes at once
            await asyncio.sleep(min(left, 0.5))
        seen = Seen(plan)
        stream.readers.append(seen)
        stream.watching += 1
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._follow(stream, seen, self._way(name)), plan.leaves_seconds)
        finally:
            stream.watching -= 1

    async def _follow(self, stream: Stream, seen: Seen, way: Way) -> None:
        """Until `done`, over as many connections as it takes, each from behind the last id."""
        while seen.done is None:
            headers = {"Accept": "text/event-stream"}
            if seen.last_id:
                headers["Last-Event-ID"] = seen.last_id
            path = f"/api/streams/{stream.session_id}/events"
            await self._connect(stream, seen, way, "GET", path, None, headers, HEAD_SECONDS)
            if seen.done is None:
                await way.elsewhere()

    async def _connect(
        self,
        stream: Stream,
        seen: Seen,
        way: Way,
        method: str,
        path: str,
        body: Any,
        headers: dict[str, str],
        head_seconds: float,
    ) -> None:
        """One connection, to its end, however it ends."""
        seen.came_at = seen.came_at or time.monotonic()
        with contextlib.suppress(*wire.BROKEN):
            async with wire.request(
                way.url, method, path, self._headers | headers, body, timeout_seconds=head_seconds
            ) as response:
                if response.status != 200:
                    self._is_refusal(response.status, method, path, await response.body(head_seconds))
                    return
                seen.connections += 1
                self._accepted(stream, response.headers["x-stream-session-id"])
                with _dropping(stream, seen, response):
                    await self._take_all(stream, seen, response)

    @staticmethod
    async def _take_all(stream: Stream, seen: Seen, response: wire.Response) -> None:
        first = True
        async for name, identity, data in response.events(SILENCE_SECONDS):
            seen.take(name, identity, data, first=first)
            if not first:
                stream.progress_at = time.monotonic()
            if name == "done":
                stream.end()
            first = False


@contextlib.contextmanager
def _dropping(stream: Stream, seen: Seen, response: wire.Response) -> Iterator[None]:
    """Break the connection at the moments that the reader's plan names."""
    loop, moment = asyncio.get_running_loop(), time.monotonic()
    waits = [stream.accepted_at + after - moment for after in seen.plan.drops_seconds]
    handles = [loop.call_later(wait, response.abort) for wait in waits if wait > 0]
    try:
        yield
    finally:
        for handle in handles:
            handle.cancel()
