"""Suite `head`: loss and gradients of a large head against materialised logits and other fusions.

Shapes: N tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import torch
from torch.nn import functional

from nacre.bench.measure import (
    Effort,
    Row,
    Target,
    compare,
    default_device,
    matrix_rate,
    peak_memory,
    training_dtype,
)

Shape = tuple[int, int, int]
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SHAPES: tuple[Shape, ...] = ((2048, 256, 65_536), (4096, 512, 8192))
TARGETS = {(2048, 256, 65_536): (Target("ratio", 5.0), Target("ratio", 8.0))}
"""Per shape: of time, and of memory, against materialised logits."""

OURS, PLAIN, TORCH, LIGER = "nacre", "fp32 logits", "torch fused", "Liger"
_PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}
_ROWS = (
    512  # of a chunk of torch's fused loss on a CPU: its own choice there, 4, takes 20x the time
)
_REFERENCE_ROWS = 256


def suite(effort: Effort) -> Iterator[Row]:
    """Yield time and peak memory of forward and backward, a row a shape, quantity and peer."""
    device = default_device()
    shapes = ((64, 16, 512),) if effort.quick else SHAPES
    for shape in shapes:
        yield from _rows(shape, device, effort)


def candidates(device: str) -> list[str]:
    """Return the names of the losses that can be compared on this device, ours first."""
    names = [OURS, PLAIN]
    if hasattr(functional, "linear_cross_entropy"):  # from torch 2.13 on
        names.append(TORCH)
    if device.startswith("cuda") and find_spec("liger_kernel"):
        names.append(LIGER)
    return names


def step(name: str, shape: Shape, device: str) -> Callable[[], float]:
    """Make random inputs of a shape (N, D, V); return what computes one loss and its gradients.

    Weights and hidden states are fp32 leaves; products run in bf16 where the device is fast in it.
    The returned function gives the loss (nats).
    """
    loss_of = _losses(device)[name]()
    dtype = training_dtype(device)
    kind = torch.device(device).type

    def once(h_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor) -> float:
        h_ND.grad = weight_VD.grad = None
        with torch.autocast(kind, dtype, enabled=dtype != torch.float32):
            loss = loss_of(h_ND, weight_VD, targets_N)
        loss.backward()
        return loss.item()

    # Code and buffers that a first call loads are not this shape's.
    once(*_leaves((16, 16, 64), device))
    return partial(once, *_leaves(shape, device))


def _rows(shape: Shape, device: str, effort: Effort) -> Iterator[Row]:
    N, D, V = shape
    side = 128 if effort.quick else _PRODUCT_SIDE.get(torch.device(device).type, 1024)
    product = (training_dtype(device), side, side, side, device)
    title = f"{N:,} x {D:,} x {V:,}"
    names = candidates(device)
    effort.say(f"{title}, time")
    steps = {name: step(name, shape, device) for name in names}
    losses: dict[str, float] = {}

    def candidate(name: str) -> None:
        losses[name] = steps[name]()

    rate = matrix_rate(*product)
    seconds = compare(
        {name: partial(candidate, name) for name in names},
        effort.rounds,
        effort.seconds / 6,
        device=device,
    )
    rate = max(rate, matrix_rate(*product))  # a busy moment must not make the limit easy
    steps.clear()
    correct = reference(shape, device)
    errors = {name: abs(loss - correct) for name, loss in losses.items()}
    peaks: dict[str, int] = {}
    for name in names:
        effort.say(f"{title}, memory of {name}")
        peaks[name] = max(1, peak_memory(step, name, shape, device))
    for_time, for_memory = TARGETS.get(shape, (None, None))
    for peer in names[1:]:
        yield Row(
            suite="head",
            case=f"{title}, time",
            unit="s",
            better="lower",
            measured=seconds[OURS].median,
            spread=seconds[OURS].spread,
            rounds=len(seconds[OURS].values),
            peer=seconds[peer].median,
            peer_spread=seconds[peer].spread,
            peer_name=peer,
            limit=6.0 * N * D * V / rate,
            limit_name="three products at the matrix rate",
            target=for_time if peer == PLAIN else None,
            note=f"{title}: loss off fp32 by {errors[OURS]:.0e} ({peer}: {errors[peer]:.0e})",
        )
    for peer in names[1:]:
        yield Row(
            suite="head",
            case=f"{title}, memory",
            unit="B",
            better="lower",
            measured=peaks[OURS],
            peer=peaks[peer],
            peer_name=peer,
            limit=4.0 * (N * D + V * D),
            limit_name="the two gradients in fp32",
            target=for_memory if peer == PLAIN else None,
        )


def reference(shape: Shape, device: str) -> float:
    """Return the loss of `step`'s inputs from fp32 products and an fp64 softmax."""
    h_ND, weight_VD, targets_N = inputs(shape, device)
    total = 0.0
    for start in range(0, len(h_ND), _REFERENCE_ROWS):
        rows = slice(start, start + _REFERENCE_ROWS)
        logits_CV = functional.linear(h_ND[rows], weight_VD).double()
        total += functional.cross_entropy(logits_CV, targets_N[rows], reduction="sum").item()
    return total / len(h_ND)


def inputs(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states fp32 [N, D], weight fp32 [V, D], targets int64 [N]; always the same."""
    N, D, V = shape
    generator = torch.Generator().manual_seed(0)
    h_ND = torch.randn(N, D, generator=generator)
    weight_VD = torch.randn(V, D, generator=generator).mul_(D**-0.5)
    targets_N = torch.randint(0, V, (N,), generator=generator)
    return h_ND.to(device), weight_VD.to(device), targets_N.to(device)


def _leaves(shape: Shape, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h_ND, weight_VD, targets_N = inputs(shape, device)
    return h_ND.requires_grad_(), weight_VD.requires_grad_(), targets_N


def _losses(device: str) -> dict[str, Callable[[], Loss]]:
    """Return, by name, what makes each loss; a fresh process imports only the one it runs."""
    dtype = training_dtype(device)

    def ours() -> Loss:
        from nacre.train.loss import head_loss

        return lambda h_ND, weight_VD, targets_N: head_loss(h_ND, weight_VD, None, targets_N)

    def plain() -> Loss:
        return lambda h_ND, weight_VD, targets_N: functional.cross_entropy(
            functional.linear(h_ND, weight_VD).float(), targets_N
        )

    def torch_fused() -> Loss:
        rows = None if device.startswith("cuda") else _ROWS
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
        return lambda h_ND, weight_VD, targets_N: functional.linear_cross_entropy(
            h_ND.to(dtype), weight_VD.to(dtype), targets_N, options=options
        ).float()

    def liger() -> Loss:
        from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
            liger_fused_linear_cross_entropy,
        )

        return lambda h_ND, weight_VD, targets_N: liger_fused_linear_cross_entropy(
            h_ND.to(dtype), weight_VD.to(dtype), targets_N
        ).float()

    return {OURS: ours, PLAIN: plain, TORCH: torch_fused, LIGER: liger}
