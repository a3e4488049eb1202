"""The page: which controls a tab has, what they call, and how it is served.

Gradio is imported here alone, and only when a page is made. What is slow to import (torch,
transformers, matplotlib) is imported by the first event of a page that is already on the screen.
"""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nacre.errors import ConfigError, Problem, clone_install
from nacre.play.given import Given
from nacre.play.guard import LOOPBACK, Guard
from nacre.play.shown import Shown

PORTS = range(7860, 7880)
SHORTEST_TOKEN = 16
QUIET = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Libraries that would tell others, or the terminal, what they do."""

MOST_WAITING = 64  # events in the queue
AT_ONCE = 4  # events that are worked on


def require_gradio() -> None:
    """Raise `ConfigError` where Gradio is not installed."""
    if find_spec("gradio") is None or find_spec("uvicorn") is None:
        message = "needs Gradio, which is not installed"
        raise ConfigError(Problem("nacre play", message, clone_install("play")))


def application(given: Given, *, token: str = "", loopback: bool = True) -> Guard:
    """Return the whole page as an ASGI application; with a `token` it must be brought."""
    require_gradio()
    os.environ.update(QUIET)
    with _without_stubs():
        import gradio
    from fastapi import FastAPI

    from nacre.play.look import theme
    from nacre.play.page import build

    blocks = build(Shown(given))
    blocks.queue(max_size=MOST_WAITING, default_concurrency_limit=AT_ONCE)
    served = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        path="",
        theme=theme(),
        # Not by `css`, which Gradio rewrites selector by selector.
        head=f"<style>{_asset('style.css')}</style><script>{_asset('map.js')}</script>",
        footer_links=[],
        allowed_paths=[],
        blocked_paths=[str(Path("/"))],
        max_file_size=1,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
    )
    return Guard(served, hosts=LOOPBACK if loopback else (), token=token)


@contextmanager
def _without_stubs() -> Iterator[None]:
    """Keep Gradio from writing a type stub beside each of its modules while it is imported.

    That is almost half of its import, and changes an installed package. It lets a component be
    whose source has no file.
    """
    find = inspect.getfile

    def hidden(found: Any) -> str:
        if getattr(found, "__module__", "").startswith("gradio."):
            raise OSError("no stub is wanted")
        return find(found)

    inspect.getfile = hidden
    try:
        yield
    finally:
        inspect.getfile = find


def _asset(name: str) -> str:
    return resources.files("nacre.play").joinpath(name).read_text(encoding="utf-8")


def listen(host: str, port: int | None) -> socket.socket:
    """Return a listening socket: at `port`, or at the first free one of `PORTS`.

    Raises `ConfigError` for a port that is taken and a host that is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError:
        message = f"{host!r} is no address of this machine"
        raise ConfigError(Problem("--host", message, "127.0.0.1 is the default")) from None
    for tried in PORTS if port is None else (port,):
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((address[0], tried))
        except (OSError, OverflowError):
            found.close()
            continue
        found.listen(64)
        return found
    if port is None:
        taken = f"{PORTS[0]} to {PORTS[-1]} are all taken on {host}"
    else:
        taken = f"{port} cannot be had on {host}"
    raise ConfigError(Problem("--port", taken, "name a free one, from 1024 to 65535"))


def check_access(host: str, token: str | None) -> None:
    """Raise `ConfigError` for a page that others reach without a token, or with a short one."""
    if token is not None and (len(token) < SHORTEST_TOKEN or not _plain(token)):
        message = "is too easy to guess" if _plain(token) else "may hold letters, digits, - and _"
        fix = f"give at least {SHORTEST_TOKEN} of letters, digits, - and _"
        raise ConfigError(Problem("--token", message, fix))
    if token is None and not is_loopback(host):
        message = f"{host} can be reached by others: they need a token"
        fix = "set NACRE_PLAY_TOKEN or --token, or leave --host out and use an ssh tunnel"
        raise ConfigError(Problem("--token", message, fix))


def _plain(token: str) -> bool:
    return token.isascii() and token.replace("-", "").replace("_", "").isalnum()


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach a host."""
    return host in LOOPBACK or host.startswith("127.")


def serve(
    given: Given,
    *,
    host: str = LOOPBACK[0],
    port: int | None = None,
    token: str | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve the page until it is interrupted; `ready` is called with its address once it answers.

    Raises `ConfigError` where Gradio is missing, the address cannot be had, or others could reach
    the page without a token.
    """
    require_gradio()
    check_access(host, token)
    listening = listen(host, port)
    import uvicorn

    app = application(given, token=token or "", loopback=is_loopback(host))
    number = listening.getsockname()[1]
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{number}/" + (f"?token={token}" if token else "")

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready(address)

    settings: dict[str, Any] = {
        "log_level": "warning", "access_log": False, "timeout_graceful_shutdown": 1,
        "timeout_keep_alive": 60,
    }  # fmt: skip
    Server(uvicorn.Config(app, **settings)).run(sockets=[listening])
