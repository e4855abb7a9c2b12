"""A hub of data sets on this machine: what huggingface_hub asks of the real one, served from a folder."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def data_hub(repository: str, folder: Path) -> Iterator[str]:
    """The address of a hub whose only data set, `repository`, is the files in `folder`."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    tree = [{"type": "file", "path": name, "oid": "0", "size": (folder / name).stat().st_size} for name in names]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            prefix = f"/datasets/{repository}/resolve/main/"
            if path == f"/api/datasets/{repository}/tree/main":
                self.answer(json.dumps(tree).encode())
            elif path.startswith(prefix) and path.removeprefix(prefix) in names:
                self.answer((folder / path.removeprefix(prefix)).read_bytes())
            else:
                self.answer(b"", 404)

        do_HEAD = do_GET

        def answer(self, body: bytes, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is logged."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
