"""transformers' `Trainer`, step by step: what a user would otherwise run."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from nacre.train.device import bf16_is_fast


def arguments(out: Path, batch: int, device: str, steps: int) -> TrainingArguments:
    """Return the Trainer's defaults, silent, in bf16 where the device is fast in it.

    Making them resets the state that Accelerators share: make them before any Accelerator.
    """
    found = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        max_steps=steps,
        bf16=bf16_is_fast(torch.device(device)),
        use_cpu=device == "cpu",
        dataloader_pin_memory=device != "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    assert found.device.type == torch.device(device).type
    return found


class TrainerSteps(TrainerCallback):
    """One `Trainer.train()` that stops after every step until it is called for the next.

    It runs in a thread of its own, so that other candidates can take turns with it. A call lasts
    from the end of a step to the end of the next; the first one includes what comes before step 1.
    `windows` are int64 `[n, T]`.
    """

    def __init__(
        self, model: PreTrainedModel, arguments: TrainingArguments, windows: torch.Tensor
    ) -> None:
        rows: Any = [{"input_ids": row, "labels": row} for row in windows]
        self.trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[self])
        self.trainer.remove_callback(PrinterCallback)
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.stopping = False
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __call__(self) -> None:
        """Train one step."""
        if not self.thread.is_alive():
            self.thread.start()
        self.asked.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        """End the training and wait for its thread."""
        self.stopping = True
        if self.thread.is_alive():
            self.asked.release()
            self.thread.join()

    def _work(self) -> None:
        self.asked.acquire()
        try:
            self.trainer.train()
        except BaseException as error:
            self.error = error
            self.done.release()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Say that a step is done, and wait until the next is asked for."""
        self.done.release()
        self.asked.acquire()
        control.should_training_stop = self.stopping
