"""A real HTTP server that speaks as much of the OpenAI-compatible protocol as judge and teacher must, or fails to."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ports import free_port


@dataclass(frozen=True)
class Say:
    """Answer 200 with these words, after `seconds`. `usage` (prompt, completion) tokens, none where None."""

    words: str
    seconds: float = 0.0
    usage: tuple[int, int] | None = (10, 5)
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Status:
    """Answer with a status and a body, JSON or text."""

    status: int
    body: Any = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Drop:
    """Close the connection without an answer."""


@dataclass(frozen=True)
class Hang:
    """Never answer."""


Act = Say | Status | Drop | Hang
#: What to do about a message, and how often it came before.
Script = Callable[[str, int], Act]


@dataclass(frozen=True)
class Seen:
    """A request as the server saw it."""

    time: float
    text: str
    body: dict[str, Any]
    headers: dict[str, str]


class JudgeServer:
    """Listens on a port of its own; `stop` and `start` close it and open the same port again."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.seen: list[Seen] = []
        self.most_in_flight = 0
        self.port = free_port()
        self._in_flight = 0
        self._times: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def texts(self) -> list[str]:
        """The messages in the order in which they came."""
        return [one.text for one in self.seen]

    def start(self) -> None:
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                judge.handle(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that hang up are part of the tests

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def close(self) -> None:
        self._over.set()
        self.stop()

    def handle(self, request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        prompt = body.get("prompt")
        text = body["messages"][-1]["content"] if prompt is None else " ".join(map(str, prompt))
        with self._lock:
            times = self._times[text]
            self._times[text] += 1
            self.seen.append(Seen(time.monotonic(), text, body, {k.lower(): v for k, v in request.headers.items()}))
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            assert request.path == ("/v1/chat/completions" if prompt is None else "/v1/completions")
            act = self.script(text, times)
            if isinstance(act, Say):
                self._over.wait(act.seconds)
            elif isinstance(act, Hang):
                self._over.wait()
        finally:
            # Before the answer goes out: the client sends the next request the moment it has this one's.
            with self._lock:
                self._in_flight -= 1
        if isinstance(act, Say):
            _send(request, Status(200, _completion(act)))
        elif isinstance(act, Status):
            _send(request, act)
        else:
            request.close_connection = True
            request.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(script: Script) -> Iterator[JudgeServer]:
    """A server that is up for the block."""
    server = JudgeServer(script)
    server.start()
    try:
        yield server
    finally:
        server.close()


def _completion(act: Say) -> dict[str, Any]:
    message = {"role": "assistant", "content": act.words}
    reply: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": act.finish_reason}],
    }
    if act.usage is not None:
        sent, received = act.usage
        reply["usage"] = {"prompt_tokens": sent, "completion_tokens": received, "total_tokens": sent + received}
    return reply


def _send(request: BaseHTTPRequestHandler, reply: Status) -> None:
    text = isinstance(reply.body, str)
    content = reply.body.encode() if text else json.dumps(reply.body).encode()
    request.send_response(reply.status)
    request.send_header("Content-Type", "text/html" if text else "application/json")
    request.send_header("Content-Length", str(len(content)))
    for name, value in reply.headers.items():
        request.send_header(name, value)
    request.end_headers()
    request.wfile.write(content)
