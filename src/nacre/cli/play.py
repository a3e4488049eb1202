"""`nacre play`: a page to look at what was made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nacre.cli.console import app, screen


@app.command()
def play(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Runs, checkpoints, a composition, a study."),
    ],
    host: Annotated[
        str, typer.Option(help="Where to listen; another than this needs a token.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    token: Annotated[
        str | None,
        typer.Option(envvar="NACRE_PLAY_TOKEN", help="What a visitor must bring, once."),
    ] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Look at runs, compositions, substrates and studies in a page of your browser.

    nacre play runs/novels

    nacre play runs/en runs/ru

    nacre play runs/growth
    """
    from nacre.play import app as page
    from nacre.play import given

    def ready(address: str) -> None:
        screen.print(f"{address}  (Ctrl+C ends it)", highlight=False, soft_wrap=True)
        if browser:
            import webbrowser

            webbrowser.open(address)

    page.serve(given.look(paths), host=host, port=port, token=token, ready=ready)
