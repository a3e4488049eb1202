"""Set up a stage's trunk: decide how it runs, reduce its precision, store its outputs if wanted.

What comes out is the stage's objective, the stored outputs if there are any, and a record of what
was decided, measured and made. `nacre.growth.trunk` says what the modes are.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from nacre import processes
from nacre.data.loader import Batch, Loader, LoaderState
from nacre.data.shards import TokenStore
from nacre.errors import CheckpointError, ConfigError, Problem
from nacre.growth import choice, outputs, trunk
from nacre.growth.cache import Dtype, build_seconds, drop, read_identity
from nacre.growth.choice import Choice, Reader, size
from nacre.growth.outputs import Identities, Outputs, Reading, Windows
from nacre.growth.plan import Plan
from nacre.growth.trunk import RecomputedTrunk
from nacre.models import stock
from nacre.train.device import forward_windows
from nacre.train.loss import Objective, head_loss
from nacre.train.observer import Observer

logger = logging.getLogger(__name__)

CACHE = "cache"
STORED: dict[torch.dtype, Dtype] = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LOSES: dict[torch.dtype, tuple[Dtype, ...]] = {
    torch.float32: ("bf16", "fp8"),
    torch.bfloat16: ("fp8",),
}
"""Which stored dtypes do not hold every output of a trunk."""


@dataclass(frozen=True)
class Engine:
    """How a stage computes: its objective, stored trunk outputs or None, and what to record."""

    objective: Objective
    outputs: Outputs | None
    record: dict[str, Any]


def reading(plan: Plan, index: int, store: TokenStore, start: LoaderState | None) -> Reading:
    """Return what stage `index` reads of a store, from the position `start`."""
    training, context = plan.training, plan.model.context
    batch = training.batch_tokens // context
    loader = Loader(store, "train", context=context, batch_size=batch, seed=plan.seed, start=start)
    count = plan.stages[index].steps(training.batch_tokens) * batch
    windows = forward_windows(training, context)
    return Reading(loader, loader.position, count, windows, training.validation_tokens)


@dataclass(frozen=True)
class StageTrunk:
    """The trunk under stage `index`, before anything of it is moved, cast or stored.

    `hashes` are those of every frozen tensor; `trains` says that the trunk itself trains, `exact`
    what `stock.splits_exactly` says; `begun` that the stage continues from a saved state.
    """

    plan: Plan
    index: int
    model: PreTrainedModel
    depth: int
    hashes: Mapping[str, str]
    read: Reading
    out: Path
    accelerator: Accelerator
    observer: Observer
    trains: bool
    exact: bool
    begun: bool

    @property
    def asked(self) -> str:
        """The mode that the plan asks for."""
        return self.plan.stages[self.index].trunk or self.plan.trunk.mode

    @property
    def folder(self) -> Path:
        """Where the stage's cache is, or would be."""
        return self.out / CACHE / f"{self.index + 1:02d}"

    @property
    def dtype(self) -> torch.dtype:
        """What the trunk computes in."""
        bf16 = self.accelerator.mixed_precision == "bf16"
        return torch.bfloat16 if bf16 else torch.float32

    def fingerprint(self, depth: int) -> str:
        """Return what identifies the outputs of the first `depth` blocks."""
        weights = self.plan.trunk.weights
        return trunk.fingerprint(self.model, self.hashes, depth, self.dtype, weights)

    @cached_property
    def wanted(self) -> Identities:
        """What the stage's cache holds, or would hold."""
        asked = self.plan.trunk.cache_dtype
        stored = STORED[self.dtype] if asked == "auto" else asked
        width = self.model.config.get_text_config().hidden_size
        fingerprint = self.fingerprint(self.depth)
        return outputs.identities(self.read, fingerprint, self.depth, width, stored)

    def set_up(self) -> Engine:
        """Return the stage's engine; caches of the run that it does not use are dropped.

        Raises `ConfigError` when a cache is demanded that cannot be or does not fit.
        """
        self._check_ahead()
        if self.trains or not self.exact:
            return self._in_one_piece()
        trunk.reduce_precision(self.model, self.depth, self.dtype)
        self.model.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]
        if self.depth == 0:
            return self._recomputed({"mode": "recompute", "reason": "no block is frozen below"})
        quantized = self.plan.trunk.weights != "auto"
        plain = self.loss_below(self._run_held_out()) if quantized else None
        trunk.reduce_precision(self.model, self.depth, self.dtype, self.plan.trunk.weights)
        chosen = processes.on_main(self.decide)
        if chosen.mode == "cache" and self.wanted.train.dtype in LOSES[self.dtype]:
            plain = self.loss_below(self._run_held_out()) if plain is None else plain
        self.observer.note(f"trunk of {self.depth} blocks: {chosen.mode} ({chosen.reason})")
        record = chosen.record() | {"dtype": STORED[self.dtype], "weights": self.plan.trunk.weights}
        stored = None
        if chosen.mode == "cache":
            record["cache"] = self.store_outputs()
            stored = Outputs(self.folder, self.wanted, self.read)
        if plain is not None:
            held_out = self._read_held_out(stored) if stored else self._run_held_out()
            record["loss_difference"] = self.loss_below(held_out) - plain
            change = f"{record['loss_difference']:+.5f} nats a token"
            self.observer.note(f"trunk in lower precision: the model below changes by {change}")
        if stored is None:
            return self._recomputed(record)
        drop_caches(self.out, keep=self.folder)
        trunk.unload(self.model, self.depth)
        return Engine(Objective(self.model, self.depth, mode="cache", exact=True), stored, record)

    def _recomputed(self, record: dict[str, Any]) -> Engine:
        drop_caches(self.out)
        objective = Objective(self.model, self.depth, mode="recompute", exact=True)
        return Engine(objective, None, record)

    def _in_one_piece(self) -> Engine:
        drop_caches(self.out)
        self.model.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]
        objective = Objective(self.model, self.depth, mode="whole", exact=self.exact)
        reason = "the trunk trains" if self.trains else "the decoder does not split exactly in two"
        return Engine(objective, None, {"mode": "whole", "reason": reason})

    def decide(self) -> Choice:
        """Choose the mode: what the plan says, how the stage began, or what measuring says."""
        if self.asked == "recompute":
            return Choice("recompute", "the plan says so")
        if read_identity(self.folder / outputs.TRAIN) == self.wanted.train:
            return Choice("cache", "this stage has one")
        needed = self.wanted.bytes
        if self.asked == "cache":
            self._check_fits(self.index, needed)
            return Choice("cache", "the plan says so")
        if self.begun:
            return Choice("recompute", "as the stage began")
        rereads = self.read.count > len(self.read.windows())
        readers = self.later_readers()
        return choice.choose(readers, needed, self.allowed, self._measure, rereads=rereads)

    @property
    def allowed(self) -> int:
        """The bytes of disk that a cache may take."""
        limit = self.plan.trunk.cache_disk
        return shutil.disk_usage(self.out).free // 2 if limit is None else limit

    def _check_fits(self, index: int, needed: int) -> None:
        if needed > self.allowed:
            message = (
                f"{size(self.allowed)}, but the cache of stage {index + 1} takes {size(needed)}"
            )
            fix = "raise it, free some disk, or use trunk.mode: auto"
            raise ConfigError(Problem("trunk.cache_disk", message, fix))

    def _check_ahead(self) -> None:
        """Refuse now what a later stage could not do: train nothing that is then thrown away."""
        trunk.require_torchao(self.plan.trunk.weights)
        for number, windows in self._ahead():
            if self._asked_by(number) != "cache":
                continue
            if not self.exact:
                message = f"cache, but a {type(self.model).__name__} does not split exactly in two"
                raise ConfigError(Problem("trunk.mode", message, "use auto: the model runs whole"))
            if number > self.index:
                self._check_fits(number, self.wanted.bytes_of(len(windows)))

    def _asked_by(self, number: int) -> str:
        this = self.plan.stages[number]
        return "recompute" if this.lora else this.trunk or self.plan.trunk.mode

    def _ahead(self) -> Iterator[tuple[int, Windows]]:
        """Yield this stage and the later ones up to other data, with the windows they read."""
        plan, loader, position = self.plan, self.read.loader, self.read.first
        for number in range(self.index, len(plan.stages)):
            if plan.sources_of(plan.stages[number]) != plan.sources_of(plan.stages[self.index]):
                return
            count = plan.stages[number].steps(plan.training.batch_tokens) * loader.batch_size
            yield number, loader.distinct(position, count)
            position = 0 if plan.data.order == "restart" else position + count

    def _measure(self) -> choice.Rates:
        windows = self.read.windows()[: self.read.batch_windows]
        ids_BT = torch.from_numpy(self.read.loader.gather(windows)[:, :-1])
        return choice.measure(
            RecomputedTrunk(self.model, self.depth),
            ids_BT.to(self.accelerator.device),
            self.wanted.train,
            self.folder.parent,
        )

    def later_readers(self) -> list[Reader]:
        """Return this stage and those after it whose windows its cache would hold."""
        plan, loader = self.plan, self.read.loader
        held = outputs.slots_of(self.read.windows(), loader.windows) >= 0
        held_out = self.read.held_out_windows()
        below = self._below()
        stored, depth = below.depth if below else 0, self.depth
        if below:
            below.close()
        added = self.plan.stages[self.index].add_blocks
        blocks = len(stock.find_parts(self.model).blocks) - added
        readers: list[Reader] = []
        for number, windows in self._ahead():
            this = plan.stages[number]
            moves_trunk = number > self.index and this.trunk_depth(blocks) < blocks
            if self._asked_by(number) == "recompute" or moves_trunk or not held[windows].all():
                break
            steps = this.steps(plan.training.batch_tokens)
            evaluations = 2 + (steps - 1) // plan.training.evaluate_every
            passes = steps * loader.batch_size + evaluations * held_out
            records = len(windows) + held_out
            readers.append(Reader(depth, passes, records, cached_below=stored))
            blocks += this.add_blocks
            stored, depth = depth, blocks
        return readers

    def store_outputs(self) -> dict[str, Any]:
        """Make or complete the stage's cache; return what it took, earlier tries included."""
        below = self._below()
        start = below.depth if below else 0
        view = RecomputedTrunk(self.model, self.depth, start)
        windows = self.wanted.train.windows
        self.observer.phase("Trunk outputs", windows + self.wanted.held_out.windows)
        said = outputs.build(
            self.folder, self.wanted, self.read, view, below, self.accelerator.device,
            self.observer.advance,
        )  # fmt: skip
        if below:
            below.close()
        for line in said:
            self.observer.note(line)
        return {
            "dtype": self.wanted.train.dtype,
            "bytes": self.wanted.bytes,
            "windows": windows,
            "from_depth": start,
            "seconds": sum(
                build_seconds(self.folder / p) for p in (outputs.TRAIN, outputs.HELD_OUT)
            ),
        }

    def _below(self) -> outputs.Below | None:
        """Open the cache of the stage below if this stage's can be made from it."""
        folder = self.out / CACHE / f"{self.index:02d}"
        try:
            return outputs.find_below(folder, self.wanted, self.read, self.fingerprint)
        except CheckpointError as error:
            logger.warning("%s; the whole trunk is run instead", error)
            return None

    def _read_held_out(self, stored: Outputs) -> Iterable[tuple[Batch, torch.Tensor]]:
        for first, batch in outputs.numbered(self.read.held_out()):
            yield batch, stored.held_out(first, batch)

    def _run_held_out(self) -> Iterable[tuple[Batch, torch.Tensor]]:
        view = RecomputedTrunk(self.model, self.depth)
        device = self.accelerator.device
        for batch in self.read.held_out():
            yield batch, view(torch.from_numpy(batch[:, :-1]).to(device))

    @torch.no_grad()
    def loss_below(self, held_out: Iterable[tuple[Batch, torch.Tensor]]) -> float:
        """Return the held-out loss (nats a token) of the model without the stage's new blocks.

        With them where it trains blocks of the trunk again: these have no head of their own.
        """
        head = stock.find_parts(self.model).head
        this = self.plan.stages[self.index]
        plain = this.train == "crown" and not this.under
        norm = stock.upper(self.model, self.depth, self.depth if plain else None)
        nats, tokens = 0.0, 0
        for batch, below_BTD in held_out:
            inputs = below_BTD.to(self.accelerator.device, head.weight.dtype)
            targets_N = torch.from_numpy(batch[:, 1:]).flatten().to(inputs.device)
            h_BTD = norm(inputs_embeds=inputs, use_cache=False).last_hidden_state
            loss = head_loss(h_BTD.flatten(0, 1), head.weight, head.bias, targets_N)
            nats += loss.item() * len(targets_N)
            tokens += len(targets_N)
        return nats / tokens


def drop_caches(out: Path, keep: Path | None = None) -> None:
    """Remove the caches of a run, but the one to `keep`; of several processes the first does."""
    if not processes.is_main():
        return
    folder = out / CACHE
    for cache in sorted(folder.iterdir()) if folder.exists() else []:
        if cache != keep:
            for part in (outputs.TRAIN, outputs.HELD_OUT):
                drop(cache / part)
            shutil.rmtree(cache)
    if folder.exists() and keep is None:
        folder.rmdir()
