"""As much of a W&B server as its SDK needs to open a run and send to it, on this machine; it keeps what it is sent."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0123456789abcdef" * 2 + "01234567"


@dataclass
class Sent:
    """What the SDK has sent.

    Args:
        runs: variables of each request that opens or changes a run.
        streams: bodies of the file stream, in order.
        alerts: variables of each alert.
        uploads: bytes of each file, by name.
    """

    runs: list[dict[str, Any]] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def lines(self, file: str) -> list[dict[str, Any]]:
        """The lines of a streamed file: wandb-history.jsonl, wandb-events.jsonl (system metrics)."""
        parts = [body.get("files", {}).get(file, {}).get("content", []) for body in list(self.streams)]
        return [json.loads(line) for part in parts for line in part]

    @property
    def exit_codes(self) -> list[int]:
        """Of the runs that were ended, in order."""
        return [body["exitcode"] for body in self.streams if body.get("complete")]


class Server(ThreadingHTTPServer):
    """The server; `url` goes into WANDB_BASE_URL."""

    daemon_threads = True

    def __init__(self) -> None:
        self.sent = Sent()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client drops its connections at its end; that is no error."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def reply(self, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply({})

    def do_PUT(self) -> None:
        name = self.path.removeprefix("/upload/")
        self.server.sent.uploads[name] = self.rfile.read(int(self.headers["Content-Length"]))
        self.reply({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        sent = self.server.sent
        if "file_stream" in self.path:
            sent.streams.append(json.loads(body))
        if self.path != "/graphql":
            return self.reply({})
        asked = json.loads(body)
        values = asked.get("variables", {})
        data: dict[str, Any] = {}
        if "upsertBucket" in asked["query"]:
            inserted = not any(run.get("name") == values.get("name") for run in sent.runs)
            sent.runs.append(values)
            project = {"id": "P", "name": "tplaunch", "entity": {"id": "E", "name": "e"}}
            bucket = {"id": "Qg==", "name": values["name"], "displayName": "d", "config": "{}", "project": project}
            data = {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        elif "createRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in values["files"]]
            data = {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}
        elif "notifyScriptableRunAlert" in asked["query"]:
            sent.alerts.append(values)
            data = {"notifyScriptableRunAlert": {"success": True}}
        elif "query ArtifactType" in asked["query"]:  # tables are artifacts, too; this server keeps none
            data = {"project": None}
        elif "createArtifact(" in asked["query"]:
            sequence = {"id": "S", "latestArtifact": {"id": "A", "versionIndex": 0}}
            artifact = {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}  # nothing is left to send
            data = {"createArtifact": {"artifact": artifact}}
        elif "viewer" in asked["query"]:
            data = {"viewer": {"id": "V", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        return self.reply({"data": data})

    def log_message(self, format: str, *args: Any) -> None:
        """No access log."""


@contextmanager
def serving() -> Iterator[Server]:
    """A server that answers within the block."""
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
