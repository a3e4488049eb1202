"""Records of a trunk cache: one window of the trunk's output as bytes.

fp32 and bf16 are kept as they are; fp8 is T fp32 scales, then T x D numbers in float8_e4m3fn;
little-endian.

Shapes: B records, T positions, D width, R bytes of a record; `h_BTD`, `records_BR`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Dtype: TypeAlias = Literal["fp32", "bf16", "fp8"]

DECODED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}

_LARGEST = 448.0  # of float8_e4m3fn


def record_bytes(context: int, width: int, dtype: Dtype) -> int:
    """Return the bytes of one record: T x D numbers, and for fp8 an fp32 scale a token."""
    return context * {"fp32": 4 * width, "bf16": 2 * width, "fp8": width + 4}[dtype]


def encode(h_BTD: Tensor, dtype: Dtype) -> Tensor:
    """Return `records_BR`, uint8, contiguous, on the device of `h_BTD` (any float dtype).

    fp8 divides each token by its scale, amax / 448 (1 for a token of zeros, at least 2^-126).
    Raises ValueError for a number that is not finite or not so in `dtype`.
    """
    if dtype != "fp8":
        stored_BTD = h_BTD.to(DECODED[dtype]).contiguous()
        if stored_BTD.numel():
            _check_finite(torch.stack(torch.aminmax(stored_BTD)))
        return stored_BTD.view(torch.uint8).flatten(1)
    h_BTD = h_BTD.float()
    amax_BT1 = h_BTD.abs().amax(dim=-1, keepdim=True)
    _check_finite(amax_BT1)
    scale_BT1 = (amax_BT1 / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    scale_BT1 = scale_BT1.masked_fill(amax_BT1 == 0, 1.0)
    values_BTD = (h_BTD / scale_BT1).to(torch.float8_e4m3fn)
    return torch.cat(
        [scale_BT1.view(torch.uint8).flatten(1), values_BTD.view(torch.uint8).flatten(1)], dim=1
    )


def decode(
    records_BR: Tensor, context: int, width: int, dtype: Dtype, out: Tensor | None = None
) -> Tensor:
    """Return `h_BTD` of encoded records: fp32 for fp32, bf16 for bf16 and fp8.

    fp32 and bf16 come back bit for bit. fp8 is off by at most (1/28 + 1/256) of the token's amax:
    half a step of float8_e4m3fn at the top (16 of 448), and the rounding to bf16. A number is off
    by at most (1/16 + 1/256) of itself or amax / 2^18, whichever is larger. Both hold for tokens
    with amax of at least 448 x 2^-126.
    """
    if dtype != "fp8":
        h_BTD = records_BR.view(DECODED[dtype]).view(-1, context, width)
        return h_BTD if out is None else out.copy_(h_BTD)
    scale_BT1 = records_BR[:, : 4 * context].clone(memory_format=torch.contiguous_format)
    scale_BT1 = scale_BT1.view(torch.float32).unsqueeze(-1)
    values_BTD = records_BR[:, 4 * context :].view(torch.float8_e4m3fn)
    if out is None:
        out = values_BTD.new_empty(len(records_BR), context, width, dtype=torch.bfloat16)
    values_BTD = values_BTD.to(torch.bfloat16).view(-1, context, width)
    return torch.mul(values_BTD, scale_BT1, out=out)


def _check_finite(extremes: Tensor) -> None:
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError("the trunk's output has numbers that are not finite")
