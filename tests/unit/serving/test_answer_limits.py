"""A server that sends without end is given up after a bounded number of bytes, whatever it was asked."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from minpro_megatron.records import ServerAddress
from minpro_megatron.serving.answer_limits import MAX_INFO_BYTES
from minpro_megatron.serving.control import ControlError, ServerControl
from minpro_megatron.serving.health import Health, ask, ask_to_generate, overlaps_scheduling

PIECE = b" " * 65536
SOCKET_BUFFERS = 16 << 20  # what the system takes from the sender beyond what is read


class Endless:
    """Answers every GET with white space, until the other side closes the connection or 256 MB are sent."""

    def __init__(self) -> None:
        self.sent = 0
        endless = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                try:
                    while endless.sent < 256 << 20:
                        self.wfile.write(PIECE)
                        endless.sent += len(PIECE)
                except OSError:
                    return

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def endless() -> Iterator[Endless]:
    server = Endless()
    yield server
    server.close()


def control(url: str) -> ServerControl:
    return ServerControl(ServerAddress(index=0, url=url, tensor_parallel=1), timeout_s=20, vocabulary_size=27)


def model_info(url: str) -> str:
    with pytest.raises(ControlError) as caught:
        control(url).model_info()
    return str(caught.value)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (lambda url: ask(url, {}, 20), Health.SILENT),
        (lambda url: ask_to_generate(url, {}, 20), Health.SILENT),
        (lambda url: overlaps_scheduling(url, {}, 20), None),
        (model_info, f"more than {MAX_INFO_BYTES} bytes"),
    ],
    ids=["health", "health_generate", "server_info", "model_info"],
)
def test_an_endless_answer_is_given_up(endless: Endless, question: Callable, answer: object) -> None:
    found = question(endless.url)
    assert answer in found if isinstance(answer, str) else found is answer
    assert endless.sent < SOCKET_BUFFERS
