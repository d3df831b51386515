"""The baseline: what one writes first. A Flask view that asks the model's server and passes on what it says.

    gunicorn -k gevent -w 1 bench.naive_proxy:app

No queue, no database, no sign-in, no log; who reconnects has lost the answer, and a stop is the client's going away.
MODEL_URL is the model's server.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import requests
from flask import Flask, Response, request

app = Flask(__name__)


@app.post("/chat")
def chat() -> Response:
    """Server-sent events, one a token."""
    body = {"model": request.json["model"], "messages": request.json["messages"], "stream": True}
    answer = requests.post(f"{os.environ['MODEL_URL']}/api/chat", json=body, stream=True, timeout=(5, 60))

    def events() -> Iterator[str]:
        with answer:
            for line in answer.iter_lines(chunk_size=None):
                said = json.loads(line)
                if said["done"]:
                    yield 'event: done\ndata: {"reason": "stop"}\n\n'
                else:
                    yield f"data: {json.dumps({'content': said['message']['content']})}\n\n"

    return Response(events(), mimetype="text/event-stream")


@app.get("/healthz")
def healthz() -> str:
    """It is there."""
    return "ok"
