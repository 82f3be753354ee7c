"""What the webhook takes and what it refuses, over real connections."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import threading
import time

import pytest

from audiolm.eval_service.webhook import BODY_BYTES, DeliveryCheck, serve

SECRET = "sixteen letters or more"


@pytest.fixture
def bell():
    """A function that posts and returns the status, and the event."""
    wake = threading.Event()
    server = serve("127.0.0.1", 0, SECRET, wake)

    def post(body=b"{}", delivery="d1", at=None, secret=SECRET, signature=None, length=None) -> int:
        stamp = str(int(time.time() if at is None else at))
        headers = {**signed(body, delivery, stamp, secret), **({"X-MLflow-Signature": signature} if signature else {})}
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        connection.putrequest("POST", "/")
        for k, v in {**headers, "Content-Length": str(len(body)) if length is None else length}.items():
            if v:
                connection.putheader(k, v)
        connection.endheaders(body)
        return connection.getresponse().status

    yield post, wake
    server.shutdown()
    server.server_close()


def signed(body: bytes, delivery: str, stamp: str, secret: str) -> dict[str, str]:
    digest = hmac.new(secret.encode(), f"{delivery}.{stamp}.".encode() + body, hashlib.sha256).digest()
    return {"X-MLflow-Delivery-Id": delivery, "X-MLflow-Timestamp": stamp,
            "X-MLflow-Signature": "v1," + base64.b64encode(digest).decode()}


def test_a_signed_delivery_wakes_once(bell):
    post, wake = bell
    assert post() == 200 and wake.is_set()
    wake.clear()
    assert post() == 409 and not wake.is_set()  # the same again
    assert post(delivery="d2") == 200 and wake.is_set()


def test_what_is_not_from_mlflow_is_refused(bell):
    post, wake = bell
    assert post(secret="another secret, as long") == 401 and post(signature="v1,AAAA") == 401 and post(signature="v2,x") == 401
    assert post(delivery="") == 401 and post(signature="v1,\xe9") == 401
    assert post(at=time.time() - 301) == 401 and post(at=time.time() + 301) == 401 and post(at=time.time() - 290) == 200
    wake.clear()
    assert post(b"x" * 10, length=str(BODY_BYTES + 1)) == 413 and post(length="9" * 30) == 413
    assert post(length="") == 411 and post(length="-1") == 411
    assert not wake.is_set()


def test_an_old_delivery_is_forgotten_only_when_its_timestamp_no_longer_counts():
    now = [1000.0]
    check = DeliveryCheck(SECRET, lambda: now[0])
    first = signed(b"", "a", "1300", SECRET)  # a clock that is five minutes ahead
    assert check.status(first, b"") == 200
    now[0] = 1599.0
    assert check.status(first, b"") == 409
    now[0] = 1601.0
    assert check.status(first, b"") == 401
    with pytest.raises(ValueError, match="shorter than 16 characters"):
        DeliveryCheck("")
