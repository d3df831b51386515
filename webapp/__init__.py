"""Sluicegate's web side, and the heart that the workers share with it. This is the map.

What each room is:

- `config` is the only reader of the environment, `errors` the one tree of errors, `views` what callers are
  shown. `models` are the tables, `database` the one way to them, within a `deadline`; `postgres` is how it waits.
- `streams/` is the heart: how a session begins, is written, followed, stopped and ended. It knows neither HTTP
  nor Celery.
- `queue` is the Celery instance, and the queue as the heart sees it. `upstream` asks the model's server what it offers.
- `accounts`, `conversations` and `auth`: users and their tokens, what belongs to whom, and who may do what.
- `calls` is what a user may ask for, with its permissions; `schemas` what requests may hold; `readers` the connection
  that a stream is sent over.
- `operations` is what operators see of everybody's streams, and how they stop one; `history`, how it was.
- `limits` is how often somebody may do what costs something.
- `rest/`, `graphql/` and `pages/` are the faces: they only translate.
- `app` wires all of it; `wsgi` is the application that gunicorn serves, `gunicorn` how it does so.
- `cli/` is the command `sluicegate`; `embedded/` is what `sluicegate up` brings along where nothing is configured.
- `logs`, `metrics` (over `metric_files`), `tracing` and `access` tell whoever runs this what happens, never a text.
- `migrate` sets up what its name says; `heap` tells the garbage collector what stays.

The workers are in the package `workers`, which imports this one and is never imported by it.

In which order to read:

1. `streams/lifecycle.py`: the words: statuses, phases, reasons, and which moves are allowed.
2. `streams/events.py`: what a position is, on which everything else rests.
3. `streams/log.py` with `streams/lua/`: the verbs, and their refusals.
4. `streams/manager.py`, with `streams/rows.py` beside it: start, claim, terminate, finish.
5. `workers/generate.py` and `workers/flusher.py`: from the model to the log.
6. `streams/hub.py` and `streams/follow.py`: from the log to a reader.
7. `streams/recovery.py`: what is done about whatever is over or went wrong.
8. `calls.py`, then `rest/streams.py`: how little is left for HTTP.

`docs/architecture.md` has the glossary and the diagrams, `docs/reliability.md` every fault and every race.
"""
