"""What stops a running stage from outside: signals, and too little memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from nacre import processes
from nacre.errors import NacreError, one_line
from nacre.growth.plan import Plan

SIGNS_OF_LOSS = ("Connection", "connection", "Timed out", "timed out", "timeout", "Broken pipe")
"""What torch.distributed says, by backend, when it waits in vain."""


ELSEWHERE = "free some, or set ACCELERATE_USE_CPU=1 to leave the GPU"
"""What to do where a model is only asked."""


class Interrupted(NacreError):
    """A signal stopped a run after a step, all of it saved; `nacre` ends with `EXIT_CODE`."""

    EXIT_CODE = 3


class OutOfMemory(NacreError):
    """A step of training, or a model that is asked, needs more memory than there is."""


class LostProcesses(NacreError):
    """Other processes of the run have died, or do not answer."""


@dataclass
class Stop:
    """Whether a signal has asked to stop, and which."""

    requested: str | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Note SIGTERM and SIGINT instead of dying; a second SIGINT ends at once.

    Only the main thread of a process can: in others signals act as before.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stop.requested:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number).name

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def memory_advice(what: str, advice: str = ELSEWHERE) -> Iterator[None]:
    """Turn an allocation that failed into one message: what needed the memory, and what to do."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error)
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in said and "not enough memory" not in said:
            raise
        raise OutOfMemory(f"{what} needs more memory than there is: {advice}") from None


def smaller_steps(plan: Plan) -> str:
    """Say how the steps of a plan take less memory."""
    training = plan.training
    advice = [f"lower training.micro_batch_tokens (now {training.forward_tokens})"]
    if not training.gradient_checkpointing:
        advice.append("set training.gradient_checkpointing: true")
    return (
        f"{' or '.join(advice)}, and continue with --resume; nacre plan says what every stage takes"
    )


@contextlib.contextmanager
def lost_processes(out: Path) -> Iterator[None]:
    """Turn what torch.distributed raises when other processes are gone into one message."""
    try:
        yield
    except RuntimeError as error:
        if processes.count() == 1 or not any(sign in str(error) for sign in SIGNS_OF_LOSS):
            raise
        raise LostProcesses(
            f"the other processes of the run died or do not answer ({one_line(error)}); "
            f"its last state is saved: continue with nacre grow --resume --out {out}"
        ) from None
