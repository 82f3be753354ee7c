"""MLflow's webhook as a bell: a signed delivery wakes the watcher, which then polls the requests itself.

It refuses a body above 64 KiB (413) or without a length (411), and a delivery that came before (409).  A timestamp five
minutes off gets 401.  So does a signature other than HMAC-SHA256 of "id.timestamp.body" under the shared secret, which
is compared in constant time.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY_BYTES = 64 << 10
OLD_S = 300.0  # of a timestamp: a replayed delivery is old, and two clocks may differ by minutes
TIMEOUT_S = 5.0  # for a client that sends slowly


class DeliveryCheck:
    """Checks deliveries; remembers the ids of accepted ones for as long as their timestamps are accepted."""

    def __init__(self, secret: str, clock: Callable[[], float] = time.time):
        if len(secret) < 16:
            raise ValueError("the webhook's secret is shorter than 16 characters: make one with `openssl rand -hex 32`")
        self._secret, self._clock, self._seen, self._lock = secret.encode(), clock, {}, threading.Lock()

    def status(self, headers: Mapping[str, str], body: bytes) -> int:
        """The HTTP status of the answer; 200 wakes the watcher."""
        delivery, stamp = headers.get("X-MLflow-Delivery-Id") or "", headers.get("X-MLflow-Timestamp") or ""
        given = (headers.get("X-MLflow-Signature") or "").encode()
        signed = hmac.new(self._secret, f"{delivery}.{stamp}.".encode() + body, hashlib.sha256).digest()
        if not hmac.compare_digest(given, b"v1," + base64.b64encode(signed)) or not delivery:
            return 401
        now = self._clock()
        if not stamp.isdecimal() or len(stamp) > 12 or abs(now - int(stamp)) > OLD_S:
            return 401
        with self._lock:
            # a clock may be ahead by OLD_S and its delivery valid for OLD_S more: remember twice that
            self._seen = {k: t for k, t in self._seen.items() if now - t <= 2 * OLD_S}
            if delivery in self._seen:
                return 409
            self._seen[delivery] = now
        return 200


def serve(host: str, port: int, secret: str, wake: threading.Event) -> ThreadingHTTPServer:
    """Listens in a thread; `.shutdown()` ends it. Raises ValueError for a short secret."""
    check = DeliveryCheck(secret)

    class Handler(BaseHTTPRequestHandler):
        timeout = TIMEOUT_S

        def do_POST(self):  # noqa: N802
            length = self.headers.get("Content-Length") or ""
            if not length.isdecimal():
                return self._answer(411)
            if len(length) > 9 or int(length) > BODY_BYTES:
                return self._answer(413)
            body = self.rfile.read(int(length))
            status = check.status(self.headers, body) if len(body) == int(length) else 400
            if status == 200:
                wake.set()
            self._answer(status)

        def _answer(self, status: int) -> None:
            self.close_connection = True
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass  # the default writes every request to stderr

    server = ThreadingHTTPServer((host, port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="webhook", daemon=True).start()
    return server
