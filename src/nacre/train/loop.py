"""The training loop of one stage. Monolithic training is a stage whose trunk is empty.

`setup` builds what a stage needs, `train` runs it, `train_step` is one optimizer step. Evaluation,
metrics and saved states hang on the loop from outside, as hooks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from nacre import processes
from nacre.data.loader import Batch, Loader, LoaderState, validation_batches
from nacre.data.shards import TokenStore
from nacre.errors import DivergedError
from nacre.growth.outputs import Outputs, numbered
from nacre.growth.plan import Stage, Training
from nacre.growth.trunk import release_memory
from nacre.models import stock
from nacre.train import sharding
from nacre.train.device import PeakMemory, forward_windows, micro_batches
from nacre.train.loss import Objective
from nacre.train.state import SavedState

MOST_SKIPPED = 10  # steps in a row that may be left out
COMPILED_FROM = 1000  # steps of a stage; compiling takes tens of seconds, whatever the model
WSD_DECAY = 0.2  # the last part of a WSD schedule, in which the learning rate falls to zero


def learning_rate(step: int, steps: int, training: Training, peak: float) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `steps`.

    Linear warm-up over `training.warmup` of the stage, then cosine to a tenth of the peak, WSD
    (constant, then linear to zero over the last fifth; Hu et al. 2024), or constant.
    """
    warm = max(1, round(training.warmup * steps))
    if step < warm:
        return peak * ((step + 1) / warm)
    if training.schedule == "constant":
        return peak
    if training.schedule == "cosine":
        done = (step - warm) / max(1, steps - warm)
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
    return peak * min(1.0, (steps - step) / max(1.0, WSD_DECAY * steps))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices decay; vectors (norms, biases) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


@dataclass
class Progress:
    """Where a stage stands; plain data, saved with its state."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0
    cursor: LoaderState | None = None
    peak_memory_bytes: int = 0
    skipped: int = 0  # steps in a row that were left out
    history: list[tuple[int, float]] = field(default_factory=list)
    end: int | None = None  # the last step, if `budget: auto` has decided

    def notice(self, loss: float) -> None:
        """Count evaluations without improvement, and keep tokens and loss (nats) of each."""
        self.history.append((self.tokens, loss))
        self.stale = 0 if loss < self.best else self.stale + 1
        self.best = min(self.best, loss)

    def record(self) -> dict[str, Any]:
        """Return the progress as plain JSON; a loss that was never measured is null."""
        return asdict(self) | {"best": self.best if math.isfinite(self.best) else None}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Progress:
        """Read back what `record` returned; other keys are left out."""
        values: dict[str, Any] = {f.name: record[f.name] for f in fields(cls)}
        values["best"] = math.inf if record["best"] is None else record["best"]
        values["history"] = [(tokens, loss) for tokens, loss in record["history"]]
        return cls(**values)


@dataclass
class StageRun:
    """Everything that the loop of one stage holds."""

    model: PreTrainedModel
    stage: Stage
    training: Training
    store: TokenStore
    accelerator: Accelerator
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    loader: Loader
    planned_steps: int
    context: int
    byte_lengths: np.ndarray
    memory: PeakMemory
    outputs: Outputs | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def steps(self) -> int:
        """How many steps the stage takes: those planned, or fewer if it was cut short."""
        end = self.progress.end
        return self.planned_steps if end is None else min(end, self.planned_steps)

    def cut_short(self) -> None:
        """End the stage as soon as its schedule allows: a WSD schedule still decays."""
        decays = self.training.schedule == "wsd"
        self.progress.end = math.ceil(self.progress.step / (1 - WSD_DECAY * decays))

    @property
    def finished(self) -> bool:
        """True when the tokens are spent or patience is at its end."""
        patience = self.stage.patience
        return self.progress.step >= self.steps or (
            patience is not None and self.progress.stale >= patience
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.loader.batch_size * self.context

    @property
    def trunk_mode(self) -> str:
        """How the trunk runs, see `Objective`."""
        objective = self.accelerator.unwrap_model(self.objective)
        assert isinstance(objective, Objective)
        return objective.trunk_mode

    def batches(self) -> Generator[tuple[Batch, LoaderState, torch.Tensor | None]]:
        """Yield what the stage reads: windows, state and, if they are stored, trunk outputs."""
        if self.outputs is None:
            return ((batch, state, None) for batch, state in self.loader)
        pinned = self.accelerator.device.type == "cuda"
        return self.outputs.stream(self.loader, pin_memory=pinned)

    def held_out(self) -> Iterator[tuple[Batch, torch.Tensor | None, bool]]:
        """Yield this process's part of the first `validation_tokens` of the held-out text.

        Each batch comes with the trunk's output, if that is stored, and whether it counts: see
        `processes.share`.
        """
        batches = validation_batches(
            self.store,
            context=self.context,
            batch_size=forward_windows(self.training, self.context),
            limit_tokens=self.training.validation_tokens,
        )
        for (first, batch), counts in processes.share(numbered(batches)):
            below_BTD = self.outputs.held_out(first, batch) if self.outputs else None
            yield batch, below_BTD, counts

    def end_training(self) -> None:
        """Free what training alone needs, the optimizer's state: the run can still be evaluated."""
        self.optimizer.state.clear()
        self.accelerator.free_memory()

    def close(self) -> None:
        """Let go of the files that are read."""
        if self.outputs is not None:
            self.outputs.close()

    def state(self) -> dict[str, torch.Tensor]:
        """Return the tensors to continue from, by name: weights, Adam's moments, random states."""
        tensors = {name: generator.get_rng_state() for name, generator in self._random().items()}
        for name, parameter in self.trained_weights().items():
            tensors[f"weight.{name}"] = parameter.detach()
            for kind, value in self.optimizer.state[parameter].items():
                tensors[f"{kind}.{name}"] = value
        return tensors

    def _random(self) -> dict[str, Any]:
        """Return what this process draws from, by the name of its saved state.

        Weights and data are drawn on the CPU, dropout on the device.
        """
        name, device = f"random.{processes.rank()}", self.accelerator.device
        found: dict[str, Any] = {name: torch.random}
        if device.type != "cpu":
            found[f"{name}.{device.type}"] = torch.get_device_module(device)
        return found

    def restore(self, saved: SavedState) -> None:
        """Continue from a saved state of this stage, on whatever device and however many processes.

        What was not drawn from then is drawn from as it is.
        """
        for parameter in self.trained_weights().values():
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
        random = {name: each for name, each in self._random().items() if saved.holds(name)}
        tensors = {
            name: tensor
            for name, tensor in self.state().items()
            if name in random or not name.startswith("random.")
        }
        saved.read(tensors)
        for name, generator in random.items():
            generator.set_rng_state(tensors[name])
        self.progress = Progress.from_record(saved.progress)
        self.loader = Loader(
            self.store,
            "train",
            context=self.context,
            batch_size=self.loader.batch_size,
            seed=self.loader.seed,
            start=self.progress.cursor,
            part=self.loader.part,
        )

    def trained_weights(self) -> dict[str, torch.Tensor]:
        """Return what trains, by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


Hook = Callable[[StageRun, dict[str, Any]], None]


def setup(
    model: PreTrainedModel,
    stage: Stage,
    training: Training,
    store: TokenStore,
    accelerator: Accelerator,
    *,
    objective: nn.Module,
    outputs: Outputs | None = None,
    context: int,
    seed: int,
    byte_lengths: np.ndarray,
    cursor: LoaderState | None,
) -> StageRun:
    """Build the optimizer and the loader of a stage around its objective (called as `Objective`).

    `outputs` are those of the trunk if the objective does not run it.
    """
    if training.gradient_checkpointing:
        # transformers 5.2x has renamed the method and warns of the old name.
        rename = getattr(model, "activation_checkpointing_enable", None)
        (rename or model.gradient_checkpointing_enable)({"use_reentrant": False})
    objective.to(accelerator.device)
    planned_steps = stage.steps(training.batch_tokens)
    if compiles(training, accelerator.device, planned_steps):
        for block in stock.find_parts(model).blocks:
            block.compile()
        if isinstance(objective, Objective):
            objective.compiled = True
    if sharding.shards(training):
        sharding.shard(objective, model, training)
        release_memory()  # the parts that others keep
    elif processes.count() > 1:
        sharding.leave_frozen_alone(objective)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, training.weight_decay),
        lr=training.lr,
        betas=training.betas,
        fused=accelerator.device.type in ("cpu", "cuda"),
    )
    prepared = accelerator.prepare_model(objective, evaluation_mode=sharding.is_sharded(objective))
    optimizer = accelerator.prepare_optimizer(optimizer)
    if processes.count() > 1:  # what is random in a step is another thing in each
        torch.manual_seed(torch.initial_seed() + processes.rank())
    loader = Loader(
        store,
        "train",
        context=context,
        batch_size=training.batch_tokens // context,
        seed=seed,
        start=cursor,
        part=(processes.rank(), processes.count()),
    )
    return StageRun(
        model=model,
        stage=stage,
        training=training,
        store=store,
        accelerator=accelerator,
        objective=prepared,
        optimizer=optimizer,
        loader=loader,
        planned_steps=planned_steps,
        context=context,
        byte_lengths=byte_lengths,
        memory=PeakMemory(accelerator.device),
        outputs=outputs,
    )


def compiles(training: Training, device: torch.device, steps: int) -> bool:
    """Tell whether a stage's blocks and head are compiled: if the plan says so, or by itself.

    By itself on CUDA, in stages long enough to win back what compiling takes.
    """
    pays = device.type == "cuda" and steps >= COMPILED_FROM
    return training.compile == "on" or (training.compile == "auto" and pays)


def uncompiled(run: StageRun) -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run as they are, without compiling them anew.

    That would take seconds for every mode and shape that is not the training's.
    """
    if not compiles(run.training, run.accelerator.device, run.planned_steps):
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def train(run: StageRun, hooks: Sequence[Hook]) -> None:
    """Train a stage to its end; after every optimizer step each hook sees its metrics."""
    progress = run.progress
    run.objective.train()
    with closing(run.batches()) as batches:
        while not run.finished:
            started = time.perf_counter()
            batch, cursor, below_BTD = next(batches)
            metrics = train_step(run, batch, below_BTD)
            progress.step += 1
            progress.tokens += run.batch_tokens
            progress.cursor = cursor
            elapsed = time.perf_counter() - started
            progress.seconds += elapsed
            progress.peak_memory_bytes = max(progress.peak_memory_bytes, run.memory.read())
            metrics |= {
                "step": progress.step,
                "tokens": progress.tokens,
                "tokens_per_second": run.batch_tokens / elapsed,
                "peak_memory_bytes": progress.peak_memory_bytes,
            }
            for hook in hooks:
                hook(run, metrics)


def train_step(
    run: StageRun, batch: np.ndarray, below_BTD: torch.Tensor | None = None
) -> dict[str, Any]:
    """Run one optimizer step on `batch` (int64 `[B, T + 1]`), in micro-batches if so configured.

    Of several processes each has its part of the batch; the metrics are those of all. `below_BTD`
    is the trunk's output for it, if that is stored. A step that is not finite is left out if the
    plan says so: its metrics say why and have no loss. Raises `DivergedError` if not, or after
    `MOST_SKIPPED` in a row.
    """
    accelerator, optimizer, training = run.accelerator, run.optimizer, run.training
    lr = learning_rate(run.progress.step, run.steps, training, training.lr)
    for group in optimizer.param_groups:
        group["lr"] = lr
    total = torch.zeros((), device=accelerator.device)
    micro = micro_batches(training, run.context)
    tokens_B = torch.from_numpy(batch).tensor_split(micro)
    below_B = [None] * micro if below_BTD is None else below_BTD.tensor_split(micro)
    for ids, below in zip(tokens_B, below_B, strict=True):
        with accelerator.accumulate(run.objective):
            loss = run.objective(*on_device(ids, below, accelerator.device))
            accelerator.backward(loss)
            total += loss.detach() / micro
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = accelerator.clip_grad_norm_(trained, training.clip)
    assert norm is not None
    norm = float(processes.whole(norm))
    (loss_sum,) = processes.total(total.item(), device=accelerator.device)
    loss_sum /= processes.count()
    if not (math.isfinite(loss_sum) and math.isfinite(norm)):
        said = f"loss {loss_sum}, gradient norm {norm}"
        if training.nonfinite == "stop" or run.progress.skipped >= MOST_SKIPPED:
            raise DivergedError(
                f"step {run.progress.step + 1}: {said}: training "
                f"diverged; lower training.lr (now {training.lr:g}) or training.clip"
            )
        optimizer.zero_grad()
        run.progress.skipped += 1
        return {"skipped": said, "lr": lr}
    optimizer.step()
    optimizer.zero_grad()
    run.progress.skipped = 0
    return {"loss": loss_sum, "lr": lr, "grad_norm": norm}


def on_device(
    windows: torch.Tensor, below_BTD: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return ids, targets (int64 `[B, T]`) and trunk outputs of windows (`[B, T + 1]`)."""
    windows = windows.to(device)
    if below_BTD is not None:
        below_BTD = below_BTD.to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:], below_BTD


@torch.no_grad()
def evaluate(run: StageRun) -> dict[str, float]:
    """Return held-out loss (nats a token), perplexity and bits per byte.

    The same windows are read every time: the first `validation_tokens` of the held-out split.
    """
    nats, tokens, text_bytes = 0.0, 0, 0
    device = run.accelerator.device
    objective = run.accelerator.unwrap_model(run.objective)
    objective.eval()
    with uncompiled(run):
        for batch, below_BTD, counts in run.held_out():
            ids = torch.from_numpy(batch)
            loss = objective(*on_device(ids, below_BTD, device))
            if counts:
                targets = batch[:, 1:]
                nats += loss.item() * targets.size
                tokens += targets.size
                text_bytes += int(run.byte_lengths[targets].sum())
    objective.train()
    sharding.let_go(objective)
    return scores(*processes.total(nats, tokens, text_bytes, device=device))


def scores(nats: float, tokens: float, text_bytes: float) -> dict[str, float]:
    """Return loss (nats a token), perplexity and bits per byte from sums over a text."""
    loss = nats / tokens
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": nats / math.log(2) / max(1, text_bytes),
    }
