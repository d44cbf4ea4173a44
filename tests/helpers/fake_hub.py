"""A hub on this machine: repositories are made and commits taken, as far as uploading asks for it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_stands_for_one"


@dataclass
class Hub:
    """What a hub was given.

    Attributes:
        address: for HF_ENDPOINT.
        made: what repositories were asked for.
        commits: of each, its summary and files (path -> content), in order.
        strangers: requests without the token.
    """

    address: str = ""
    made: list[dict[str, Any]] = field(default_factory=list)
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that runs within the block; every file is taken with its commit (none by LFS)."""
    kept = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._known():
                return
            if self.path == "/api/whoami-v2":
                self._say({"name": "me", "type": "user", "orgs": [], "auth": {}})
            elif self.path.startswith("/api/models/me/adapter"):
                self._say({"id": "me/adapter", "sha": "0" * 40, "siblings": [], "private": True, "tags": []})
            else:
                self._say({"error": "Entry not found"}, 404)

        def do_HEAD(self) -> None:
            self._say({}, 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if not self._known():
                return
            if self.path == "/api/repos/create":
                kept.made.append(json.loads(body))
                self._say({"url": f"{kept.address}/me/adapter", "id": "me/adapter", "name": "me/adapter"})
            elif self.path == "/api/validate-yaml":
                self._say({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                self._say({"files": [{"path": entry["path"], **regular} for entry in files]})
            elif "/commit/" in self.path:
                lines = [json.loads(line) for line in body.splitlines() if line]
                files = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                [summary] = [line["value"]["summary"] for line in lines if line["key"] == "header"]
                kept.commits.append((summary, files))
                url = f"{kept.address}/me/adapter/commit/{len(kept.commits):040d}"
                self._say({"success": True, "commitUrl": url, "commitOid": f"{len(kept.commits):040d}"})
            else:
                self._say({"error": f"no {self.path} here"}, 404)

        def _known(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}" or "/api/" not in self.path:
                return True
            kept.strangers.append(self.path)
            self._say({"error": "Invalid username or password."}, 401)
            return False

        def _say(self, value: dict[str, Any], status: int = 200) -> None:
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
