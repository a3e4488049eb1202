"""Which requests the page answers: from whom, to which paths, how large, how often.

An ASGI wrapper around everything that is served, so nothing behind it can forget a check. Files are
not served at all, other sites cannot call it or frame it, and the browser is told to load nothing
from elsewhere.
"""

from __future__ import annotations

import hmac
import html
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY = 64 * 1024  # bytes of a request
PER_MINUTE = 240  # requests that make the server work, from one address
COOKIE = "nacre-play"
LOOPBACK = ("127.0.0.1", "localhost", "::1")

SERVED = ("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt")
SERVED_UNDER = (
    "/assets/", "/static/", "/svelte/", "/gradio_api/queue/", "/gradio_api/heartbeat/",
    "/gradio_api/startup-events", "/gradio_api/info", "/gradio_api/reset", "/gradio_api/cancel",
)  # fmt: skip
"""What the page needs of Gradio. Its uploads, files, proxies and other doors stay shut."""

POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "frame-ancestors 'none'",
        "form-action 'self'",
        "base-uri 'self'",
        "object-src 'none'",
    ]
)
"""Gradio's own scripts stand in the page and compile functions; nothing comes from elsewhere."""

HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
]


class Guard:
    """Passes on the requests that may pass; others get a status and a sentence.

    `hosts` are the names under which the page may be called (none: any, for a server that others
    reach); with a `token` a visitor must bring it once, as `?token=`, and is known by a cookie.
    """

    def __init__(self, app: App, *, hosts: Collection[str] = LOOPBACK, token: str = "") -> None:
        self.app = app
        self.hosts = hosts
        self.token = token
        self.seen: dict[str, deque[float]] = defaultdict(deque)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on what the server says of itself."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        headers = {
            key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]
        }
        refusal = self.refuse(scope, headers)
        if refusal is not None:
            await _say(send, *refusal)
        elif self.token and _given(scope) is not None:
            await _welcome(send, scope["path"], self.token)
        else:
            await self.app(scope, _limited(receive), _with_headers(send))

    def refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return status and words for a request that may not pass, None for one that may."""
        path, method = scope["path"], scope["method"]
        host = _host(headers.get("host", ""))
        if self.hosts and host not in self.hosts:
            return 403, f"This page is only for this machine; it is not called {host!r}."
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            return 403, "Another site may not ask this page for anything."
        if method not in ("GET", "HEAD", "POST"):
            return 405, f"{method} means nothing here."
        if self.token and not self._known(scope, headers):
            return 401, "This page needs its token: open the address that `nacre play` printed."
        if (path not in SERVED and not path.startswith(SERVED_UNDER)) or ".." in path:
            return 404, "There is nothing here."
        if not headers.get("content-length", "0").isdecimal():
            return 400, "The size of the request is no number."
        if int(headers.get("content-length", "0")) > LARGEST_BODY:
            return 413, f"The request is too large ({LARGEST_BODY // 1024} KiB at most)."
        if method == "POST" and self._too_often(str((scope.get("client") or ("?",))[0])):
            return 429, f"Too many requests ({PER_MINUTE} a minute at most): wait a little."
        return None

    def _known(self, scope: Scope, headers: dict[str, str]) -> bool:
        shown = _given(scope)
        if shown is None:
            try:
                morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
            except CookieError:
                return False
            shown = morsel.value if morsel else ""
        return hmac.compare_digest(shown.encode(), self.token.encode())

    def _too_often(self, client: str) -> bool:
        now = time.monotonic()
        times = self.seen[client]
        while times and times[0] < now - 60:
            times.popleft()
        if len(times) >= PER_MINUTE:
            return True
        times.append(now)
        if len(self.seen) > 1000:  # forget those who have gone
            self.seen = defaultdict(deque, {c: t for c, t in self.seen.items() if t[-1] > now - 60})
        return False


def _host(header: str) -> str:
    """Return the name in a Host header, without its port."""
    return urlsplit(f"//{header}").hostname or ""


def _given(scope: Scope) -> str | None:
    """Return the token in the address, if there is one."""
    found = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token")
    return found[0] if found else None


def _limited(receive: Receive) -> Receive:
    """Stop reading a body that is longer than it said, or said nothing."""
    read = 0

    async def limited() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        return {"type": "http.disconnect"} if read > LARGEST_BODY else message

    return limited


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            ours = {name for name, _ in HEADERS}
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in ours]
            message["headers"] = [*kept, *HEADERS]
        await send(message)

    return sending


async def _welcome(send: Send, path: str, token: str) -> None:
    """Give the visitor a cookie and take the token out of the address."""
    cookie = f"{COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/"
    headers = [(b"location", path.encode("latin-1")), (b"set-cookie", cookie.encode())]
    await send({"type": "http.response.start", "status": 303, "headers": [*headers, *HEADERS]})
    await send({"type": "http.response.body", "body": b""})


async def _say(send: Send, status: int, words: str) -> None:
    body = (
        '<!doctype html><html lang="en"><meta name="color-scheme" content="light dark">'
        "<title>nacre</title><body style='font:1.1rem system-ui;margin:4rem auto;max-width:36rem'>"
        f"<h1 style='font-size:1.3rem'>nacre</h1><p>{html.escape(words)}</p></html>"
    ).encode()
    headers = [(b"content-type", b"text/html; charset=utf-8"), *HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
