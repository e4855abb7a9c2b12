"""A server in threads that answers like SGLang's control plane, or like a broken one."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OK = {"success": True, "message": "Success"}


class RecordedServer:
    """Answers each path with what `answers` holds for it (status, JSON or text), and notes what it was sent.

    `once` goes before `answers`, one of it at a time; paths in `hung` are answered after `hang_s`."""

    def __init__(self, hang_s: float = 1.0) -> None:
        self.answers: dict[str, tuple[int, Any]] = {}
        self.once: dict[str, list[tuple[int, Any]]] = {}
        self.hung: set[str] = set()
        self.received: list[tuple[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []  # of the monotonic clock
        self._closing = threading.Event()
        recorded = self

        class Handler(BaseHTTPRequestHandler):
            def _answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path = self.path.strip("/")
                recorded.received.append((path, json.loads(body) if body else None))
                recorded.headers.append(dict(self.headers))
                recorded.times.append(time.monotonic())
                if path in recorded.hung:
                    recorded._closing.wait(hang_s)
                waiting = recorded.once.get(path)
                status, content = waiting.pop(0) if waiting else recorded.answers.get(path, (200, OK))
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                with suppress(OSError):  # whom it hung for has gone
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_POST = _answer

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.received]

    def close(self) -> None:
        self._closing.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


def checksum(engine: str) -> tuple[int, Any]:
    """The answer of a server whose weights have this checksum."""
    return 200, OK | {"ranks": [{"checksums": {"a": "1"}}], "per_engine_checksum": engine}


@contextmanager
def two_with_weights(version: int, hang_s: float) -> Iterator[list[RecordedServer]]:
    """Two servers that report the same weights, of `version`."""
    made = [RecordedServer(hang_s=hang_s), RecordedServer(hang_s=hang_s)]
    for server in made:
        server.answers["model_info"] = (200, {"weight_version": str(version)})
        server.answers["weights_checker"] = checksum("5e")
    try:
        yield made
    finally:
        for server in made:
            server.close()
