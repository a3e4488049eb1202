"""What an estimate says of a plan on a cluster, as plain data; `nacre.growth.scaling` makes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nacre.errors import ConfigError, Problem
from nacre.growth.devices import LINK_EFFICIENCY, Cluster

Layout = Literal["data_parallel", "fsdp2"]
LAYOUTS: dict[Layout, str] = {"data_parallel": "data parallel", "fsdp2": "FSDP2"}
"""How work is laid out over devices, and what it is called."""
Place = Literal["none", "replicated", "sharded", "cached"]
"""Where frozen blocks are, on every device."""

MFU = (0.3, 0.4, 0.5)
"""What published training reaches of a data sheet's peak: little, usual, much."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the peak that training reaches (model FLOPs utilisation), as a range."""

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, mfu: float | None) -> Efficiency:
        """Return the one that is asked for, else the published range."""
        if mfu is None:
            return cls(*MFU)
        if not 0 < mfu <= 1:
            fix = "a share of the peak: above 0, at most 1, e.g. 0.4"
            raise ConfigError(Problem("--mfu", f"{mfu:g} cannot be", fix))
        return cls(mfu, mfu, mfu)


@dataclass(frozen=True)
class StageEstimate:
    """One stage on one cluster. A step's figures are for one device.

    Attributes:
        step_seconds: a step; communication overlaps what it can.
        link_seconds: what a step's communication takes by itself.
        exposed_seconds: what of it nothing overlaps.
        sent_bytes: what a device sends in a step.
        seconds: the stage, at the middle efficiency; `seconds_low` at the high one,
            `seconds_high` at the low one and with nothing overlapped.
        memory_bytes: of a device at most; `fits` leaves a tenth free.
        trunk: where the frozen blocks are.
    """

    stage: int
    depth: int
    tokens: int
    steps: int
    flops: float
    active_parameters: int
    step_seconds: float
    optimizer_seconds: float
    link_seconds: float
    exposed_seconds: float
    sent_bytes: float
    seconds: float
    seconds_low: float
    seconds_high: float
    memory_bytes: int
    fits: bool
    trunk: Place

    @property
    def share(self) -> float:
        """The share of a step that waits for the link, if what can overlap does."""
        return self.exposed_seconds / self.step_seconds

    @property
    def share_not_overlapped(self) -> float:
        """The share of a step that the link takes if nothing overlaps."""
        return self.link_seconds / (self.step_seconds - self.exposed_seconds + self.link_seconds)

    def record(self) -> dict[str, Any]:
        """Return the estimate as plain data."""
        shares = {"share": self.share, "share_not_overlapped": self.share_not_overlapped}
        return asdict(self) | shares


@dataclass(frozen=True)
class RunEstimate:
    """All stages on one cluster."""

    stages: tuple[StageEstimate, ...]

    @property
    def seconds(self) -> float:
        """The whole run, stage after stage."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def seconds_low(self) -> float:
        """The least of it."""
        return sum(stage.seconds_low for stage in self.stages)

    @property
    def seconds_high(self) -> float:
        """The most of it."""
        return sum(stage.seconds_high for stage in self.stages)

    @property
    def memory_bytes(self) -> int:
        """The most that a device holds."""
        return max(stage.memory_bytes for stage in self.stages)

    @property
    def sent_bytes(self) -> float:
        """What a device sends in the whole run."""
        return sum(stage.steps * stage.sent_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage does."""
        return all(stage.fits for stage in self.stages)

    def record(self) -> dict[str, Any]:
        """Return stages and totals as plain data."""
        names = ("seconds", "seconds_low", "seconds_high", "memory_bytes", "sent_bytes", "fits")
        totals = {name: getattr(self, name) for name in names}
        totals["flops"] = sum(stage.flops for stage in self.stages)
        return {"stages": [stage.record() for stage in self.stages], "total": totals}


@dataclass(frozen=True)
class CacheEstimate:
    """A stage's trunk read from a cache, beside running it for every batch.

    The text is as long as the stage's tokens: each is made, written and read once, by this stage.

    Attributes:
        keep_up: bytes/s that each device has to read so that the stage does not wait.
        blocks_even: a trunk of more blocks takes longer to run than its outputs to read.
        passes_even: readings of the same text from which making the cache has paid; None: never.
        recompute_seconds, cache_seconds: what the trunk takes in this stage, one way or the other.
    """

    stage: int
    trunk_depth: int
    made_through: int
    bytes_per_token: int
    disk_bytes: int
    keep_up: float
    blocks_even: float
    passes_even: float | None
    recompute_seconds: float
    cache_seconds: float

    @property
    def cheaper(self) -> Literal["recompute", "cache"]:
        """The mode that takes less time."""
        return "cache" if self.cache_seconds < self.recompute_seconds else "recompute"

    def record(self) -> dict[str, Any]:
        """Return the estimate as plain data."""
        return asdict(self) | {"cheaper": self.cheaper}


@dataclass(frozen=True)
class Estimate:
    """A plan on a cluster: growth and end-to-end training by layout, and the stages' caches.

    `device_tokens` is what a device trains on in a step, `micro_tokens` in one forward pass.
    """

    cluster: Cluster
    efficiency: Efficiency
    precision: str
    tokens: int
    device_tokens: int
    micro_tokens: int
    growth: dict[Layout, RunEstimate]
    end_to_end: dict[Layout, RunEstimate]
    caches: tuple[CacheEstimate, ...]

    def assumptions(self) -> list[str]:
        """Return what the figures rest on, a sentence each."""
        device, mfu = self.cluster.device, self.efficiency
        found = [
            f"{device.name}: {device.flops / 1e12:,.4g} TFLOP/s {self.precision}, "
            f"{device.memory / 1e9:,.0f} GB at {device.bandwidth / 1e9:,.4g} GB/s, "
            f"storage {device.disk / 1e9:,.3g} GB/s ({device.source}).",
            f"Efficiency {mfu.middle:.2f} of that peak"
            + ("" if mfu.low == mfu.high else f", {mfu.low:.2f} to {mfu.high:.2f} in the range")
            + f"; {self.device_tokens:,} tokens a device and step, {self.micro_tokens:,} at once.",
            "Evaluation, checkpoints, tokenizing and failures are not counted; every token of a "
            "stage is read once; a trunk runs for every batch unless the plan asks for a cache.",
        ]
        if self.cluster.count > 1:
            found.insert(
                1,
                f"A ring over {self.cluster.title} sends {self.cluster.link / 1e9:,.4g} GB/s a "
                f"device ({LINK_EFFICIENCY:.0%} of its slowest link), latency not counted. Data "
                "parallel: gradients summed in fp32, the trunk on every device. FSDP2 "
                "(training.shard): weights fetched twice and gradients scattered, in fp32, for "
                "every micro-batch.",
            )
        for layout, run in self.growth.items():
            wide = [str(stage.stage) for stage in run.stages if not stage.fits]
            if wide:
                found.append(
                    f"Too much for a device, {LAYOUTS[layout]}: stage {', '.join(wide)}; lower "
                    "training.micro_batch_tokens, or set training.gradient_checkpointing."
                )
        return found

    def record(self) -> dict[str, Any]:
        """Return everything as plain data, with stable names."""
        return {
            "devices": self.cluster.record(),
            "mfu": asdict(self.efficiency),
            "precision": self.precision,
            "tokens": self.tokens,
            "device_tokens": self.device_tokens,
            "micro_tokens": self.micro_tokens,
            "growth": {name: run.record() for name, run in self.growth.items()},
            "end_to_end": {name: run.record() for name, run in self.end_to_end.items()},
            "caches": [cache.record() for cache in self.caches],
            "assumptions": self.assumptions(),
        }
