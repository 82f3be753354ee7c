"""A stand-in of the Hugging Face Hub's HTTP API: one folder on this machine as the files of a dataset or a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(folder: Path, repo: str, kind: str = "datasets"):
    """The endpoint's address; `kind`: datasets or models."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(folder, repo, kind))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(folder: Path, repo: str, kind: str) -> type[BaseHTTPRequestHandler]:
    base, files = f"/api/{kind}/{repo}", ("" if kind == "models" else f"/{kind}") + f"/{repo}/resolve/main/"

    def entry(path: Path) -> dict:
        name = str(path.relative_to(folder))
        oid = hashlib.sha1(path.read_bytes() if path.is_file() else name.encode()).hexdigest()
        return {"type": "file" if path.is_file() else "directory", "oid": oid, "path": name,
                **({"size": path.stat().st_size} if path.is_file() else {})}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, data: bytes = b"", **headers: str) -> None:
            self.send_response_only(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def go(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
            if path in (base, f"{base}/revision/main", f"{base}/revision/{SHA}"):
                self.answer(200, json.dumps({"id": repo, "sha": SHA, "private": False, "siblings": []}).encode())
            elif path.startswith(f"{base}/tree/main"):
                place = folder / path.removeprefix(f"{base}/tree/main").strip("/")
                deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
                found = sorted(place.rglob("*") if deep else place.glob("*"))
                if not place.is_dir():
                    return self.answer(404, X_Error_Code="EntryNotFound")
                self.answer(200, json.dumps([entry(p) for p in found]).encode())
            elif path == f"{base}/paths-info/main":
                wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
                self.answer(200, json.dumps([entry(folder / p) for p in wanted if (folder / p).exists()]).encode())
            elif path.startswith(files):
                self.send_file(folder / path.removeprefix(files))
            else:
                self.answer(404, X_Error_Code="RepoNotFound")

        def send_file(self, place: Path) -> None:
            if not place.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound")
            data, wanted = place.read_bytes(), self.headers.get("Range")
            if not wanted:
                return self.answer(200, data, X_Repo_Commit=SHA, ETag='"x"')
            first, last = wanted.removeprefix("bytes=").split("-")
            part = data[int(first):int(last or len(data)) + 1]
            self.answer(206, part, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}", X_Repo_Commit=SHA)

        do_GET = do_HEAD = do_POST = go

        def log_message(self, *_) -> None:
            pass

    return Handler
