"""The head's loss against the plain one: value, gradients, memory."""

from __future__ import annotations

import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from nacre.train import loss as losses
from nacre.train.loss import IGNORED, LOGIT_BYTES, chunk_rows, head_loss

CHUNK = losses.CHUNK["cpu"]


def example(rows: int, width: int, vocabulary: int, bias: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(rows * 7919 + vocabulary)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    shift = normal(vocabulary) if bias else None
    return [normal(rows, width), normal(vocabulary, width), shift, targets]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.sampled_from([1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]),
    vocabulary=st.integers(2, 50),
    bias=st.booleans(),
)
def test_equals_the_plain_loss_and_its_gradients(rows: int, vocabulary: int, bias: bool) -> None:
    h, weight, shift, targets = example(rows, 8, vocabulary, bias)
    plain = functional.cross_entropy(functional.linear(h, weight, shift), targets)
    inputs = [tensor for tensor in (h, weight, shift) if tensor is not None]
    expected = torch.autograd.grad(3 * plain, inputs)
    loss = head_loss(h, weight, shift, targets)
    found = torch.autograd.grad(3 * loss, inputs)
    torch.testing.assert_close(loss, plain)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(
    not hasattr(functional, "linear_cross_entropy"), reason="torch has it from 2.13 on"
)
@pytest.mark.parametrize("chunked", [False, True])
def test_equals_the_fused_loss_of_torch(chunked: bool) -> None:
    h, weight, shift, targets = example(3 * CHUNK // 2, 16, 300, bias=True)
    inputs = [tensor for tensor in (h, weight, shift) if tensor is not None]
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256) if chunked else None
    plain = functional.linear_cross_entropy(h, weight, targets, linear_bias=shift, options=options)
    expected = torch.autograd.grad(plain, inputs)
    loss = head_loss(h, weight, shift, targets)
    torch.testing.assert_close(loss, plain)
    for gradient, reference in zip(torch.autograd.grad(loss, inputs), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ignored", [1, CHUNK, CHUNK + 3, 2 * CHUNK])
def test_ignored_targets_do_not_count(ignored: int) -> None:
    h, weight, shift, targets = example(2 * CHUNK, 8, 30, bias=True)
    targets[torch.randperm(2 * CHUNK)[:ignored]] = IGNORED
    inputs = [h, weight, shift]
    loss = head_loss(h, weight, shift, targets)
    found = torch.autograd.grad(loss, inputs)
    if ignored == 2 * CHUNK:
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in found)
        return
    plain = functional.cross_entropy(functional.linear(h, weight, shift), targets)
    expected = torch.autograd.grad(plain, inputs)
    torch.testing.assert_close(loss, plain)
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6)


def test_an_empty_batch_has_no_loss_and_no_gradients() -> None:
    h, weight, _, targets = example(4, 8, 30, bias=False)
    loss = head_loss(h[:0], weight, None, targets[:0])
    loss.backward()
    assert loss.item() == 0
    assert not weight.grad.any()


def test_a_second_backward_pass_is_refused_not_wrong() -> None:
    h, weight, _, targets = example(4, 8, 30, bias=False)
    loss = head_loss(h, weight, None, targets)
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out once"):
        loss.backward()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its compiler itself does
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_loss_is_the_same(bias: bool, dtype: torch.dtype) -> None:
    h, weight, shift, targets = example(CHUNK + 100, 16, 300, bias)
    targets[::7] = losses.IGNORED
    inputs = [tensor for tensor in (h, weight, shift) if tensor is not None]
    found = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        for compiled in (False, True):
            loss = head_loss(h, weight, shift, targets, compiled=compiled)
            found[compiled] = [loss, *torch.autograd.grad(loss, inputs)]
    assert losses._compiled_softmax.cache_info().currsize == 1
    tolerance = (
        {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-5}
    )
    for compiled, plain in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(compiled, plain, **tolerance)


def test_logits_in_memory_are_bounded() -> None:
    for device in ("cpu", "cuda"):
        for vocabulary in (2, 4096, 65_536, 131_072):
            rows = chunk_rows(vocabulary, device)
            assert 1 <= rows <= losses.CHUNK[device]
            assert 4 * rows * vocabulary <= LOGIT_BYTES[device]


def test_bf16_products_stay_near_fp32() -> None:
    h, weight, _, targets = example(700, 64, 1000, bias=False)
    assert h is not None
    assert weight is not None
    assert targets is not None
    weight.data *= 0.05
    plain = functional.cross_entropy(functional.linear(h, weight), targets)
    expected = torch.autograd.grad(plain, [h, weight])
    with torch.autocast("cpu", torch.bfloat16):
        loss = head_loss(h, weight, None, targets)
    found = torch.autograd.grad(loss, [h, weight])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=1e-3)
    for gradient, reference in zip(found, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() / reference.norm() < 1e-2


def test_extreme_logits_stay_finite() -> None:
    h = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0], [-1.0]], requires_grad=True)
    loss = head_loss(h, weight, None, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()


def test_without_gradients() -> None:
    h, weight, _, targets = example(600, 8, 20, bias=False)
    with torch.no_grad():
        loss = head_loss(h, weight, None, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(
        loss, functional.cross_entropy(functional.linear(h, weight), targets)
    )
