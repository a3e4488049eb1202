"""What every command shares: the app, the screen, options that mean the same, how errors end."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from nacre.errors import ConfigError, FirstFailed, NacreError

app = typer.Typer(
    name="nacre",
    help="Grow language models layer by layer on a frozen substrate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

screen = Console(stderr=True)

DISK_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""What a folder that cannot be written, or a full disk, says."""

TORCHAO = {"torchao": "Failed to load", "torch.utils._pytree": "%s is an Enum subclass"}
"""Who warns while torchao is imported, and how the warning begins."""

PlanArgument = Annotated[str, typer.Argument(help="A plan file, or the name of a recipe.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the plan.")
]
Sources = Annotated[
    list[str] | None,
    typer.Option("--data", help="File, folder, glob, URL, hf:NAME or `default`; repeatable."),
]
ErrorPolicy = Annotated[
    str, typer.Option("--errors", help="Text that is not UTF-8: `strict` refuses, `replace`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can mend becomes one message and exit code 2.

    Idle OpenMP threads wait instead of spinning, unless OMP_WAIT_POLICY says otherwise: a spinning
    thread that shares its core with another program holds up every product of two threads.
    """
    if sys.platform == "win32":
        fail("nacre runs on Linux and macOS, not on Windows; use it in WSL, which is Linux")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_torchao()
    try:
        app(args=arguments, prog_name="nacre")
    except NacreError as error:
        if isinstance(error, FirstFailed) or (isinstance(error, ConfigError) and not is_main()):
            sys.exit(2)  # the first of several processes says it
        fail(str(error), getattr(error, "EXIT_CODE", 2))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'the disk'}: {error.strerror}")


def is_main() -> bool:
    """Tell whether this is the first of the processes that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error and exit with a code."""
    screen.print("[bold red]error:[/]" if code == 2 else "[yellow]stopped:[/]", end=" ")
    screen.print(message, highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def emit(data: Any) -> None:
    """Print JSON on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and advice off the screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def quiet_torchao() -> None:
    """Keep what torchao says while it is imported off the screen.

    transformers imports it with every model where it is installed. It warns of its parts for other
    devices than this one, and torch of how it registers its types.
    """
    for name in TORCHAO:
        logging.getLogger(name).addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(TORCHAO[record.name])


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Return a stage record without its long lists of hashes."""
    return {k: v for k, v in record.items() if k not in ("frozen", "weights", "trainable")}
