"""One growth step, one verb a function: add blocks, freeze what is below, attach and merge LoRA.

Each verb changes a stock decoder in place. What may train afterwards is exactly what
`trainable_names` returns; the ledger records it and proves that the rest did not move.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nacre.errors import ConfigError, Problem
from nacre.growth.plan import Lora, Stage
from nacre.models import stock


def add_blocks(
    model: PreTrainedModel,
    count: int,
    init: Literal["random", "copy", "zero"],
    seed: int,
    under: int = 0,
) -> None:
    """Add `count` blocks to the model: on top, or under its last `under` blocks.

    `random` draws them from `seed` (arXiv 2507.07129). `copy` copies the `count` blocks just
    below, over and over if there are fewer (G_stack, Du et al. 2024). `zero` copies them too and
    zeroes their output projections, so that the logits do not change (LLaMA Pro, Wu et al. 2024).
    Raises `ConfigError` for a model whose blocks do not become the identity that way, or that has
    fewer than `under`.
    """
    old = list(stock.find_parts(model).blocks)
    if under > len(old):
        raise ConfigError(_too_many("under", under, len(old)))
    before_BTV = _probe(model) if init == "zero" else None
    with drawing(seed):
        new = stock.add_blocks(model, count, under)
    if init != "random" and old:
        sources = (old[: len(old) - under] or old)[-count:]
        for index, block in enumerate(new):
            stock.copy_weights(sources[index % len(sources)], block)
    if before_BTV is not None:
        stock.zero_outputs(model, new)
        if not torch.equal(_probe(model), before_BTV):
            message = f"zero does not preserve the logits of a {type(model).__name__}"
            raise ConfigError(Problem("init", message, "use init: copy or init: random"))


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Draw new weights from a seed, and leave the random state as it was.

    They are drawn on the CPU, wherever the model is: no other device is asked for its state.
    """
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        yield


@torch.no_grad()
def _probe(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a few tokens in evaluation mode, `[B, T, V]`."""
    training = model.training
    model.eval()
    try:
        vocabulary = model.config.get_text_config().vocab_size
        ids_BT = torch.arange(16, device=model.device).reshape(2, 8) % vocabulary
        return model(input_ids=ids_BT, use_cache=False).logits
    finally:
        model.train(training)


def freeze_below(
    model: PreTrainedModel,
    depth: int,
    *,
    embedding: bool = True,
    reopened: Collection[int] = (),
) -> None:
    """Freeze everything but the blocks from `depth` on, the `reopened`, norm and head.

    Without `embedding` that trains too.
    """
    parts = stock.find_parts(model)
    model.requires_grad_(False)
    trained = [*parts.blocks[depth:], parts.head, parts.norm]
    trained += [parts.blocks[index] for index in reopened]
    if not embedding:
        trained.append(parts.embedding)
    for module in trained:
        if module is not None:
            module.requires_grad_(True)


def attach_lora(model: PreTrainedModel, depth: int, lora: Lora, seed: int) -> PeftModel:
    """Attach low-rank adapters to every linear layer of the first `depth` blocks (Hu et al. 2021).

    The adapters train besides whatever trained before. The model's own forward runs with them; keep
    the returned wrapper for `merge_lora`.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parts = stock.find_parts(model)
    targets = [
        f"{parts.blocks_name}.{index}.{name}"
        for index in range(depth)
        for name, _ in stock.linear_layers(parts.blocks[index])
    ]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with drawing(seed), warnings.catch_warnings():
        # PEFT asks transformers 5 by the name that it had in 4.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    for parameter in trainable:
        parameter.requires_grad_(True)
    return adapted


@dataclass(frozen=True)
class MergeCertificate:
    """How far merging the adapters moved the model on a held-out batch (fp32, evaluation mode)."""

    largest_logit_difference: float
    loss_before: float
    loss_after: float
    adapters: int

    def record(self) -> dict[str, Any]:
        """Return the certificate as plain data."""
        return asdict(self) | {"loss_difference": self.loss_after - self.loss_before}


@torch.no_grad()
def merge_lora(adapted: PeftModel, ids_BT: torch.Tensor) -> MergeCertificate:
    """Merge all adapters into their layers in fp32, in place, and certify the result on `ids_BT`.

    Afterwards the model consists of stock modules again. Raises `ValueError` if a merged weight is
    not finite.
    """
    model = adapted.get_base_model()
    model.eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.float()
    adapters = sum(isinstance(module, LoraLayer) for module in model.modules())
    before = model(input_ids=ids_BT, use_cache=False).logits.float()
    adapted.merge_and_unload(safe_merge=True)
    if hasattr(model, "peft_config"):
        del model.peft_config
    after = model(input_ids=ids_BT, use_cache=False).logits.float()
    return MergeCertificate(
        largest_logit_difference=(after - before).abs().max().item(),
        loss_before=_next_token_loss(before, ids_BT),
        loss_after=_next_token_loss(after, ids_BT),
        adapters=adapters,
    )


def _next_token_loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    return functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()
    ).item()


def choose_trainable(
    model: PreTrainedModel,
    stage: Stage,
    *,
    depth_below: int,
    seed: int,
    train_embedding: bool = False,
) -> PeftModel | None:
    """Decide what trains in a stage that found `depth_below` blocks; it has added its own.

    Returns the LoRA wrapper, if the stage has one. `train_embedding` is for the `trained` substrate
    in its first stage. Raises `ConfigError` for a stage that re-opens blocks that are not there.
    """
    lowest = 0 if stage.train == "all" else depth_below - stage.under
    reopened = stage.reopened if depth_below else range(0)
    if reopened and reopened[-1] >= depth_below:
        raise ConfigError(_too_many("train", f"blocks {stage.train}", depth_below))
    freeze_below(model, lowest, embedding=not train_embedding, reopened=reopened)
    if stage.lora is None or lowest == 0:
        return None
    return attach_lora(model, lowest, stage.lora, seed)


def _too_many(field: str, value: object, depth: int) -> Problem:
    message = f"{value}, but there are {depth} blocks below"
    return Problem(f"stages: {field}", message, "they are numbered from 0")


def trainable_names(model: nn.Module) -> list[str]:
    """Return the names of everything that may train, sorted."""
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def plain_names(hashes: Mapping[str, str]) -> dict[str, str]:
    """Return tensor hashes under the names that the tensors have when no adapter is attached."""
    return {name.replace(".base_layer.", "."): value for name, value in hashes.items()}
