"""A judge over HTTP that scores answers 1 to 10 by their length, and may end itself after so many answers:
`python judge_server.py PORT [LIMIT]`."""

from __future__ import annotations

import itertools
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LIMIT = int(sys.argv[2]) if len(sys.argv) > 2 else None
ANSWERED = itertools.count()


class Handler(BaseHTTPRequestHandler):
    """The two requests of the chat-completions protocol that a judge answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.reply({"object": "list", "data": [{"id": "judge", "object": "model"}]})

    def do_POST(self) -> None:
        if next(ANSWERED) == LIMIT:
            os._exit(0)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        score = 1 + len(asked["messages"][-1]["content"]) % 10
        message = {"role": "assistant", "content": f"Score: {score}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
        body = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice],
            "usage": usage,
        }
        self.reply(body)

    def reply(self, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


if __name__ == "__main__":
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
