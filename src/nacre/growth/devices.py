"""What plans can be estimated for: accelerators by their data sheets, and how many of them.

Rates are peaks of one device: bf16 products without sparsity, memory, and what it can send to
others, in one direction. `here` is this machine; `nacre.bench.here` measures it.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from nacre.errors import ConfigError, Problem, nearest

HERE = "here"
_GB, _TB, _TFLOP = 1e9, 1e12, 1e12
_NVME = 3 * _GB
_RESERVED = 1_500_000_000


@dataclass(frozen=True)
class Device:
    """One accelerator: what it computes, holds, moves and sends.

    Attributes:
        flops: bf16 products, dense, FLOP/s.
        memory: bytes.
        bandwidth: of that memory, bytes/s.
        link: to the other devices of its node, bytes/s sent.
        node: devices that share a node.
        network: between nodes, bytes/s sent, for each device.
        disk: storage, bytes/s read or written, for each device.
        reserved: bytes that a process holds before a model is there.
        source: where the figures are from.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    link: float = 0.0
    node: int = 1
    network: float = 0.0
    disk: float = _NVME
    reserved: int = _RESERVED
    source: str = ""


DEVICES = {
    device.name: device
    for device in (
        Device("A100", 312 * _TFLOP, 80 * _GB, 2.039 * _TB, 300 * _GB, 8, 25 * _GB,
               source="NVIDIA A100 80GB SXM data sheet; DGX A100: 200 Gb/s a GPU"),
        Device("H100", 989 * _TFLOP, 80 * _GB, 3.35 * _TB, 450 * _GB, 8, 50 * _GB,
               source="NVIDIA H100 SXM data sheet; DGX H100: 400 Gb/s a GPU"),
        Device("H200", 989 * _TFLOP, 141 * _GB, 4.8 * _TB, 450 * _GB, 8, 50 * _GB,
               source="NVIDIA H200 SXM data sheet; DGX H200: 400 Gb/s a GPU"),
        Device("B200", 2250 * _TFLOP, 180 * _GB, 8 * _TB, 900 * _GB, 8, 50 * _GB,
               source="NVIDIA DGX B200 data sheet: 400 Gb/s a GPU"),
        Device("L40S", 362 * _TFLOP, 48 * _GB, 0.864 * _TB, 32 * _GB, 8, 12.5 * _GB,
               source="NVIDIA L40S data sheet, PCIe 4.0 x16; 100 Gb/s a GPU is assumed"),
        Device("RTX4090", 165.2 * _TFLOP, 24 * _GB, 1.008 * _TB, 32 * _GB, 8, 3.125 * _GB,
               source="NVIDIA Ada white paper, fp32 accumulation, PCIe 4.0 x16; "
               "25 Gb/s a GPU is assumed"),
        Device("MI300X", 1307.4 * _TFLOP, 192 * _GB, 5.3 * _TB, 448 * _GB, 8, 50 * _GB,
               source="AMD Instinct MI300X data sheet, seven links of 64 GB/s; "
               "400 Gb/s a GPU is assumed"),
    )
}  # fmt: skip
"""The devices that are known, by name."""

LINK_EFFICIENCY = 0.8
"""The share of a link's peak that collectives reach; nccl-tests report 0.8 to 0.95."""


@dataclass(frozen=True)
class Cluster:
    """`count` devices of one kind."""

    device: Device
    count: int = 1

    @property
    def link(self) -> float:
        """Bytes/s at which a device sends in a ring over all of them; 0 for a single one.

        Between nodes a ring is as fast as all network ports of a node together allow.
        """
        if self.count == 1:
            return 0.0
        device = self.device
        slowest = device.link
        if self.count > device.node:
            slowest = min(slowest, device.node * device.network)
        return LINK_EFFICIENCY * slowest

    @property
    def title(self) -> str:
        """The cluster in words, as `parse` reads it."""
        return f"{self.count}x{self.device.name}" if self.count > 1 else self.device.name

    def record(self) -> dict[str, Any]:
        """Return the cluster as plain data."""
        return {"count": self.count, "link_bytes_per_second": self.link, **asdict(self.device)}


def parse(text: str) -> tuple[str, int]:
    """Return name and number of what `64xH200`, `H200` or `here` names.

    Raises `ConfigError` for a device that is not known, none at all, or several of `here`.
    """
    match = re.fullmatch(r"(?:([0-9]{1,9})\s*[x×])?\s*(.*)", text.strip(), re.IGNORECASE)
    assert match is not None
    count, asked = int(match[1] or 1), re.sub(r"[\s_-]", "", match[2]).upper()
    known = {name.upper(): name for name in (*DEVICES, HERE)}
    if asked not in known:
        hints = (nearest(asked, known), f"known: {', '.join(known.values())}")
        message = f"unknown device {match[2]!r}" if asked else f"{text!r} names no device"
        raise ConfigError(Problem("--devices", message, " ".join(filter(None, hints))))
    if count == 0:
        raise ConfigError(Problem("--devices", f"{text!r} is none", "at least 1"))
    if known[asked] == HERE and count > 1:
        message = f"{text!r}, but {HERE} is this one machine"
        raise ConfigError(Problem("--devices", message, f"say {HERE}, or a device by name"))
    return known[asked], count
