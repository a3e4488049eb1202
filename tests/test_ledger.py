from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from nacre.growth import ledger


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(3, 2)
        self.trained = nn.Linear(2, 2, bias=False)
        self.register_buffer("saved", torch.arange(3))
        self.register_buffer("unsaved", torch.arange(3), persistent=False)
        self.frozen.requires_grad_(False)


def test_a_hash_covers_bytes_shape_and_dtype() -> None:
    tensor = torch.tensor([[1.0, 2.0]])
    golden = hashlib.sha256(b"torch.float32 (1, 2) " + tensor.numpy().tobytes()).hexdigest()
    assert ledger.tensor_hash(tensor) == golden
    others = [
        torch.tensor([[1.0, 2.0 + 2**-22]]),
        torch.tensor([1.0, 2.0]),
        tensor.view(torch.int32),
        torch.tensor([[-1.0, 2.0]]),
    ]
    assert golden not in map(ledger.tensor_hash, others)


def test_a_hash_sees_values_not_memory() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    transposed = tensor.t().contiguous().t()
    assert not transposed.is_contiguous()
    assert ledger.tensor_hash(transposed) == ledger.tensor_hash(tensor)
    assert ledger.tensor_hash(nn.Parameter(tensor)) == ledger.tensor_hash(tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.tensor(3), torch.zeros(0, 4), torch.zeros(2, dtype=torch.bfloat16), torch.tensor(True)],
)
def test_any_tensor_can_be_hashed(tensor: torch.Tensor) -> None:
    assert len(ledger.tensor_hash(tensor)) == 64


def test_zero_and_minus_zero_differ() -> None:
    assert ledger.tensor_hash(torch.tensor([0.0])) != ledger.tensor_hash(torch.tensor([-0.0]))


def test_frozen_hashes_cover_all_that_is_saved_and_does_not_train() -> None:
    assert set(ledger.frozen_hashes(Small())) == {"frozen.weight", "frozen.bias", "saved"}


def test_training_passes_and_a_moved_tensor_stops() -> None:
    model = Small()
    before = ledger.frozen_hashes(model)
    model.trained.weight.data += 1
    ledger.verify_frozen(model, before)
    model.frozen.bias.data[1] += 1e-7
    with pytest.raises(ledger.LedgerError, match=r"\(1\): \['frozen\.bias'\]"):
        ledger.verify_frozen(model, before)


def test_a_vanished_tensor_stops() -> None:
    model = Small()
    before = ledger.frozen_hashes(model)
    model.frozen.bias = None
    with pytest.raises(ledger.LedgerError, match=r"frozen\.bias"):
        ledger.verify_frozen(model, before)


def test_a_fingerprint_covers_names_and_values_in_any_order() -> None:
    hashes = {"b": "2", "a": "1"}
    assert ledger.fingerprint(hashes) == hashlib.sha256(b"a 1\nb 2").hexdigest()
    assert ledger.fingerprint({"a": "1", "b": "2"}) == ledger.fingerprint(hashes)
    assert ledger.fingerprint(hashes, ["a"]) == ledger.fingerprint({"a": "1"})
    assert ledger.fingerprint({"a": "1", "c": "2"}) != ledger.fingerprint(hashes)
