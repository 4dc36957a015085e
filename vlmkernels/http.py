"""An HTTP client for JSON that limits the time and the size of replies and retries requests after transient errors."""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPException
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
T = TypeVar("T")

CONNECTION_ERRORS = (OSError, HTTPException)  # raised if the server is unreachable or the reply breaks off


class RequestError(RuntimeError):
    """A request failed for good. The message names the URL and the reason."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Does not follow redirects, which could send the body and the API key to another host."""

    def redirect_request(self, *args: Any) -> None:
        return None


class JSONClient:
    """Sends JSON over HTTP. Redirects are not followed.

    Args:
        timeout: maximum seconds of a request, including its reply. Checked after each read, so a read that stalls can add up to
            ``timeout`` seconds more.
        max_bytes: maximum size of a reply.
        retries: maximum number of retries after a connection error, a transient status or an invalid reply.
        backoff: retry n, counted from 0, waits ``backoff * 2**n`` seconds.
        is_transient: returns whether a request that failed with this HTTP status is retried.
        api_key_env: environment variable whose value, if it is set, is sent as a bearer token.
        use_proxies: whether to use the proxies that the environment sets.
    """

    def __init__(
        self,
        *,
        timeout: float,
        max_bytes: int,
        retries: int,
        backoff: float,
        is_transient: Callable[[int], bool],
        api_key_env: str,
        use_proxies: bool = True,
    ):
        self.timeout, self.max_bytes, self.retries, self.backoff = timeout, max_bytes, retries, backoff
        self.is_transient, self.api_key_env = is_transient, api_key_env
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(None if use_proxies else {}))

    def send(self, url: str, body: Any = None, timeout: float | None = None) -> bytes:
        """Send one request, without retries: a POST of ``body`` as JSON, or a GET if it is None.

        Raises:
            OSError, HTTPException: the request failed, timed out or got an error status (``urllib.error.HTTPError``).
            RequestError: the reply has more than ``max_bytes``.
        """
        timeout = self.timeout if timeout is None else timeout
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        deadline, parts, size = time.monotonic() + timeout, [], 0
        with self._opener.open(request, timeout=timeout) as response:
            # The socket's timeout applies to each read, so a server that keeps sending single bytes would never exceed it.
            while part := response.read1(2**20):
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"timed out: the reply was incomplete after {timeout:g} s")
                if size > self.max_bytes:
                    raise RequestError(f"the reply of {url} must have at most {self.max_bytes} bytes, got {size} or more")
            if response.length:  # read1 does not raise if the connection breaks
                raise HTTPException(f"the connection broke {response.length} bytes before the end of the reply")
        return b"".join(parts)

    def request(
        self, url: str, body: Any, parse: Callable[[bytes], T], before_attempt: Callable[[int], None] | None = None
    ) -> T:
        """Send a request, retry it after transient errors, and return ``parse(reply)``.

        Args:
            url, body: see ``send``.
            parse: parses the reply. The request is retried if it raises ValueError.
            before_attempt: called before each attempt with its number, counted from 0. Its exceptions are not retried.

        Raises:
            RequestError: an error is not transient, or the last retry failed.
        """
        cause: Exception
        for attempt in range(self.retries + 1):
            if before_attempt is not None:
                before_attempt(attempt)
            try:
                return parse(self.send(url, body))
            except urllib.error.HTTPError as error:
                transient, reason, cause = self.is_transient(error.code), _describe(error), error
            except (*CONNECTION_ERRORS, ValueError) as error:
                transient, reason, cause = True, f"{type(error).__name__}: {error}", error
            if not transient or attempt == self.retries:
                count = f" ({attempt + 1} requests)" if attempt else ""
                raise RequestError(f"request to {url} failed with {reason}{count}") from cause
            logger.warning("request to %s failed with %s; retrying", url, reason)
            time.sleep(self.backoff * 2**attempt)
        raise AssertionError("unreachable")


def _describe(error: urllib.error.HTTPError) -> str:
    """Return the status and message of an error reply: ``error.message`` of the OpenAI API, else the start of the body."""
    status, content = f"{error.code} {error.reason}", ""
    with suppress(*CONNECTION_ERRORS):
        content = error.read(2000).decode(errors="replace")
    with suppress(ValueError, TypeError, KeyError):
        content = str(json.loads(content)["error"]["message"])
    return f"{status}: {content[:500]}" if content else status
