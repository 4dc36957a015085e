"""The JSON client against a server that is slow, breaks off replies or redirects."""

import threading
import time
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmkernels.http import JSONClient, RequestError


class Handler(BaseHTTPRequestHandler):
    """Replies to /<case>; counts the requests in ``server.seen``."""

    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(307 if self.path == "/redirect" else 200)
        self.send_header("Location", "/ok")
        self.send_header("Content-Length", "8")
        self.end_headers()
        for part in {"/broken": ["[1"], "/slow": [" "] * 6 + ["[]"]}.get(self.path, ["[1, 2  ]"]):
            self.wfile.write(part.encode())
            self.wfile.flush()
            time.sleep(0.05 * (self.path == "/slow"))

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # errors of clients that gave up
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def client(**options):
    defaults = {"timeout": 5, "max_bytes": 100, "retries": 2, "backoff": 0.001, "api_key_env": ""}
    return JSONClient(**{**defaults, "is_transient": lambda status: status == 503, **options})


def test_the_timeout_covers_the_whole_reply(server):
    """Each byte arrives within the timeout, but the reply does not."""
    with pytest.raises(TimeoutError, match=r"the reply was incomplete after 0.12 s"):
        client(timeout=0.12).send(f"{server.url}/slow")
    assert client().send(f"{server.url}/slow") == b"      []"


def test_a_reply_that_breaks_off_is_retried(server):
    with pytest.raises(HTTPException, match="the connection broke 6 bytes before the end of the reply"):
        client().send(f"{server.url}/broken")
    attempts = []
    with pytest.raises(RequestError, match=r"/broken failed with HTTPException: .* \(3 requests\)"):
        client().request(f"{server.url}/broken", None, bytes, attempts.append)
    assert attempts == [0, 1, 2]
    assert len(server.seen) == 4


def test_redirects_and_long_replies_are_final(server):
    with pytest.raises(RequestError, match="/redirect failed with 307 Temporary Redirect"):
        client().request(f"{server.url}/redirect", None, bytes)
    with pytest.raises(RequestError, match="/ok must have at most 4 bytes, got 8 or more"):
        client(max_bytes=4).request(f"{server.url}/ok", None, bytes)
    assert server.seen == ["/redirect", "/ok"]
