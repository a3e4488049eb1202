"""What stops a running stage from outside: signals, and too little memory."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

import torch

from nacre.errors import NacreError
from nacre.growth.plan import Plan


class Interrupted(NacreError):
    """A signal stopped a stage, and its state was saved; `nacre` ends with `EXIT_CODE`."""

    EXIT_CODE = 3


class OutOfMemory(NacreError):
    """A step of training needs more memory than there is."""


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
def memory_advice(plan: Plan, number: int) -> Iterator[None]:
    """Turn an allocation that failed into one message that says what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        said = str(error)
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "can't allocate memory" not in said and "not enough memory" not in said:
            raise
        training = plan.training
        micro = training.micro_batch_tokens or training.batch_tokens
        advice = [f"lower training.micro_batch_tokens (now {micro})"]
        if not training.gradient_checkpointing:
            advice.append("set training.gradient_checkpointing: true")
        raise OutOfMemory(
            f"stage {number} needs more memory than there is: {' or '.join(advice)}, and continue "
            "with --resume; nacre plan says what every stage takes"
        ) from None
