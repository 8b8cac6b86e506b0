"""A hub on this machine: as much of the Hugging Face HTTP interface as reading one dataset of plain files takes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub(name: str, files: dict[str, bytes], asked: list[str]) -> Iterator[str]:
    """Its address. `files` of the dataset `name`, by path; paths that are asked for go to `asked`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            kind, _, inside = path.partition(f"/datasets/{name}")
            if not inside and not path.endswith(f"/datasets/{name}"):
                self.answer(404, b"{}")
            elif kind == "/api":
                self.answer(200, json.dumps(self.told(inside)).encode())
            else:
                found = files.get(inside.split("/", 3)[-1])
                self.answer(200 if found is not None else 404, found or b"{}")

        do_HEAD = do_GET

        def told(self, inside: str) -> Any:
            if not inside.startswith("/tree/"):
                return {"id": name, "sha": REVISION, "siblings": [{"rfilename": path} for path in files]}
            return listed(files, "/".join(inside.split("/")[3:]))

        def answer(self, code: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hash(body)}"')
            self.send_header("X-Repo-Commit", REVISION)
            if code == 404:
                self.send_header("X-Error-Code", "EntryNotFound" if name in self.path else "RepoNotFound")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def listed(files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
    """What stands in a folder, without what is below it."""
    prefix = f"{folder}/" if folder else ""
    inside = [path for path in files if path.startswith(prefix)]
    folders = dict.fromkeys(prefix + path[len(prefix) :].split("/")[0] for path in inside if "/" in path[len(prefix) :])
    own = [path for path in inside if "/" not in path[len(prefix) :]]
    rows: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
    return rows + [{"type": "file", "path": path, "size": len(files[path]), "oid": "1" * 40} for path in own]
