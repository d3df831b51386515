"""The heart: stream sessions, from the question to the committed answer.

- `lifecycle`: statuses, phases, reasons, and the moves that are allowed; the standard library only.
- `events`: positions, the events of a stream, and their one encoding.
- `keys`: every Redis key.
- `log`, with `lua/`: the token log and its verbs, each one script.
- `rows`: the statements on a session's row, each naming the state that it moves from.
- `manager`: start, claim, terminate, finish; the only writer of a session's status.
- `recovery`: the reaper's work, through the manager.
- `queries`: what is read of sessions: views, receipts, lists.
- `hub`, `follow`: the one reader of logs in a process, and what each of its many followers is sent.
- `ports`: what the manager needs of a queue, and the records that go in and out of it.

Nothing here knows HTTP, Celery, the command line or a worker.
"""
