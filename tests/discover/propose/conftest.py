"""An OpenAI-compatible server that says what a test has written for it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest

Step = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Script:
    """What the server answers to the next questions, in order, and what it was asked."""

    url: str
    models: list[str] = field(default_factory=lambda: ["inventor", "other"])
    key: str = ""  # that it asks for; none if empty
    steps: list[Step] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    over: Event = field(default_factory=Event)

    def says(self, content: str | None, usage: tuple[int, int] | None = (100, 50)) -> None:
        body: dict[str, Any] = {"model": "inventor-2", "choices": [{"message": {"content": content}}]}
        if usage:
            body["usage"] = dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))
        self.sends(200, body)

    def sends(self, status: int, body: object, **headers: str) -> None:
        self.steps.append(lambda handler: send(handler, status, body, **headers))

    def refuses(self, status: int, message: str, **headers: str) -> None:
        self.sends(status, {"error": {"message": message}}, **headers)

    def stalls(self) -> None:
        self.steps.append(lambda handler: self.over.wait(30))

    def drips(self) -> None:
        """Blanks without an end, which keep the connection alive."""

        def drip(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            handler.send_header("Content-Type", "application/json")
            handler.end_headers()
            while not self.over.wait(0.05):
                handler.wfile.write(b" ")

        self.steps.append(drip)


def send(handler: BaseHTTPRequestHandler, status: int, body: object, **headers: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


class Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            send(self, 404, {"error": {"message": "nothing here"}})
        elif self.allowed():
            send(self, 200, {"object": "list", "data": [{"id": name} for name in self.script.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        self.script.asked.append(body)
        try:
            step = self.script.steps.pop(0) if self.script.steps else lambda h: send(h, 500, b"the script is over")
            step(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up, as some tests want it to

    def allowed(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.script.keys.append(given)
        if self.script.key and given != self.script.key:
            send(self, 401, {"error": {"message": f"wrong key: {given}", "code": "invalid_api_key"}})
            return False
        return True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """A server on this machine, that asks for no key, and a client that waits little before it tries anew."""
    monkeypatch.setattr("sartor.discover.propose.endpoint.BACKOFF", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    handler = type("Scripted", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.script = Script(f"http://127.0.0.1:{server.server_port}/v1")
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield handler.script
    handler.script.over.set()
    server.shutdown()
    server.server_close()
