"""Stock `transformers` decoders: build one, find its parts, split it into trunk and crown.

No attention and no MLP is written here. A model of nacre is the class that `transformers` ships,
so anything that loads or runs such a class loads and runs a grown model.

Shapes: B batch, T positions, D width, V vocabulary; `ids_BT`, `h_BTD`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

ROTARY_BASE = 10_000.0
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Names of lists in configurations that have one entry per block."""


def llama_config(
    vocabulary: int, width: int, heads: int, mlp: int, context: int, depth: int
) -> LlamaConfig:
    """Return the modern block: RMSNorm, rotary positions, SwiGLU, no biases, untied head."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=context,
        num_hidden_layers=depth,
        rope_parameters={"rope_type": "default", "rope_theta": ROTARY_BASE},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def gpt_neox_config(
    vocabulary: int, width: int, heads: int, mlp: int, context: int, depth: int
) -> GPTNeoXConfig:
    """Return the block of arXiv 2507.07129: LayerNorm, full rotary, GELU, no attention bias."""
    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=mlp,
        max_position_embeddings=context,
        num_hidden_layers=depth,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROTARY_BASE,
            "partial_rotary_factor": 1.0,
        },
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )


FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": llama_config,
    "gpt_neox": gpt_neox_config,
}


@dataclass(frozen=True)
class Parts:
    """The named parts of a decoder; `*_name` is the part's prefix in the model's state dict."""

    decoder: nn.Module
    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.Module | None
    head: nn.Linear
    embedding_name: str
    blocks_name: str
    norm_name: str
    head_name: str


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model with random weights from a config, on the current default device.

    A head that shares its weight with the input embedding is untied: the embedding is frozen and
    the head trains.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    return AutoModelForCausalLM.from_config(config)


@dataclass(frozen=True)
class Counts:
    """Exact parameter counts of a config's model, by part.

    `block` counts the last block, which new blocks are like, `blocks` all of them, `rest` what is
    none of the named parts (learned positions, say). `adapter` and `adapters` count rank-1 low-rank
    adapters on every linear layer of the last block and of all blocks.
    """

    block: int
    blocks: int
    norm: int
    head: int
    embedding: int
    rest: int
    adapter: int
    adapters: int


def count_parameters(config: PreTrainedConfig) -> Counts:
    """Count the parameters of a config's model; allocates nothing."""
    with torch.device("meta"):
        model = build(config)
    parts = find_parts(model)

    def size(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    def adapter(module: nn.Module) -> int:
        return sum(sum(linear.weight.shape) for _, linear in linear_layers(module))

    named = [parts.blocks, parts.norm, parts.head, parts.embedding]
    return Counts(
        block=size(parts.blocks[-1]),
        blocks=size(parts.blocks),
        norm=size(parts.norm),
        head=size(parts.head),
        embedding=size(parts.embedding),
        rest=size(model) - sum(map(size, named)),
        adapter=adapter(parts.blocks[-1]),
        adapters=adapter(parts.blocks),
    )


def positions(config: PreTrainedConfig) -> int | None:
    """Return the most positions that a model reads, if its configuration says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    """Return the named linear layers inside a module, GPT-2's transposed `Conv1D` included."""
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
    ]


def find_parts(model: PreTrainedModel) -> Parts:
    """Find embedding, blocks, final norm and head of a decoder.

    Raises `ValueError` for a model whose blocks do not stand in exactly one list, or that has no
    input embedding or LM head: such a model cannot be grown.
    """
    names = {id(module): name for name, module in model.named_modules()}
    depth = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    kind = type(model).__name__
    if len(lists) != 1:
        raise ValueError(f"{kind} has {len(lists)} lists of {depth} blocks; one is needed")
    blocks_name, blocks = lists[0]
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    if head is None or not isinstance(embedding, nn.Embedding):
        raise ValueError(f"{kind} has no input embedding or no language-model head")
    decoder_name = blocks_name.rpartition(".")[0]
    decoder = model.get_submodule(decoder_name)
    norm = _last_norm(decoder, blocks)
    return Parts(
        decoder=decoder,
        embedding=embedding,
        blocks=blocks,
        norm=norm,
        head=head,
        embedding_name=names[id(embedding)],
        blocks_name=blocks_name,
        norm_name="" if norm is None else names[id(norm)],
        head_name=names[id(head)],
    )


def _last_norm(decoder: nn.Module, blocks: nn.ModuleList) -> nn.Module | None:
    """Return the decoder's last norm with weights: after its blocks, else before (as in OPT)."""
    norms = [
        (child is blocks, child)
        for child in decoder.children()
        if child is blocks
        or ("norm" in type(child).__name__.lower() and next(child.parameters(), None) is not None)
    ]
    at = next(index for index, (is_blocks, _) in enumerate(norms) if is_blocks)
    found = [child for _, child in norms[at + 1 :] or norms[:at]]
    return found[-1] if found else None


def block_index(parts: Parts, name: str) -> int | None:
    """Return which block a tensor of the state dict belongs to, None if to no block."""
    inside = name.startswith(parts.blocks_name + ".")
    return int(name.removeprefix(parts.blocks_name + ".").split(".")[0]) if inside else None


def untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own where it shares the input embedding's."""
    parts = find_parts(model)
    if parts.head.weight is parts.embedding.weight:
        parts.head.weight = nn.Parameter(parts.embedding.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model._tied_weights_keys = {}
    model.all_tied_weights_keys = {}


def add_blocks(model: PreTrainedModel, count: int, under: int = 0) -> list[nn.Module]:
    """Add `count` freshly initialised blocks of the model's own class; return them.

    They go on top, or under the last `under` blocks. Where blocks are of several kinds (`PER_BLOCK`
    lists in the config), the new ones are of the kinds of the `count` just below, in their order,
    over and over if there are fewer.
    """
    parts = find_parts(model)
    config = model.config.get_text_config()
    depth = len(parts.blocks)
    for name in PER_BLOCK:
        kinds = getattr(config, name, None)
        if kinds and not isinstance(getattr(type(config), name, None), property):
            below = kinds[: depth - under] or kinds
            setattr(config, name, [*kinds, *islice(cycle(below[-count:]), count)])
    config.num_hidden_layers = depth + count
    template = parts.blocks[-1]
    reference = next(template.parameters())
    new: list[nn.Module] = []
    for index in range(depth, depth + count):
        block = type(template)(config, index)
        block.apply(model._init_weights)
        block.to(reference.device, reference.dtype).train(model.training)
        parts.blocks.append(block)
        new.append(block)
    if under:
        _lift(model, parts.blocks, depth - under, depth)
    return new


def _lift(model: PreTrainedModel, blocks: nn.ModuleList, start: int, stop: int) -> None:
    """Move blocks `start` to `stop` to the top, with their entries in the configuration."""
    config = model.config.get_text_config()
    order = [*range(start), *range(stop, len(blocks)), *range(start, stop)]
    for name in PER_BLOCK:
        kinds = getattr(config, name, None)
        if kinds and not isinstance(getattr(type(config), name, None), property):
            setattr(config, name, [kinds[index] for index in order])
    moved = [blocks[index] for index in order]
    for index, block in enumerate(moved):
        blocks[index] = block
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010  (typed as a submodule)


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the weights of one block into another of the same shape."""
    target.load_state_dict(source.state_dict())


def zero_outputs(model: PreTrainedModel, blocks: list[nn.Module]) -> None:
    """Zero the projections through which each block writes to the residual stream.

    The block then returns its input, so the model's logits do not change (as the added blocks of
    LLaMA Pro, Wu et al. 2024).
    """
    width = model.config.get_text_config().hidden_size
    for block in blocks:
        for branch in block.children():
            writers = [layer for _, layer in linear_layers(branch) if _outputs(layer) == width]
            if writers:
                nn.init.zeros_(writers[-1].weight)
                if writers[-1].bias is not None:
                    nn.init.zeros_(writers[-1].bias)


def _outputs(layer: nn.Linear | Conv1D) -> int:
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def lower(model: PreTrainedModel, depth: int) -> nn.Module:
    """Return the trunk: a view of the decoder with its first `depth` blocks and no final norm.

    It shares every weight with the model. Called like the decoder: `(input_ids=ids_BT)` to an
    output whose `last_hidden_state` is `h_BTD`.
    """
    parts = find_parts(model)
    return _view(parts, slice(0, depth), without=(parts.norm,))


def middle(model: PreTrainedModel, start: int, stop: int) -> nn.Module:
    """Return blocks `start` to `stop` alone: a view that turns `(inputs_embeds=h_BTD)` to `h_BTD`.

    `middle` on `lower(model, start)` is `lower(model, stop)`.
    """
    parts = find_parts(model)
    return _view(parts, slice(start, stop), without=(parts.embedding, parts.norm))


def upper(model: PreTrainedModel, depth: int, stop: int | None = None) -> nn.Module:
    """Return the crown's body: a view of the decoder without its embedding and first blocks.

    It shares every weight with the model and is fed the trunk's output: `(inputs_embeds=h_BTD)`.
    `stop` leaves out the blocks from there on too.
    """
    parts = find_parts(model)
    return _view(parts, slice(depth, stop), without=(parts.embedding,))


def splits_exactly(model: PreTrainedModel, depth: int) -> bool:
    """Tell whether the head on the crown on the trunk equals the whole model, bit for bit.

    False for decoders that do something to their input beyond the blocks (learned positions,
    scaled embeddings) or to their logits (soft caps), or whose head is no plain linear layer: these
    must run whole.
    """
    parts = find_parts(model)
    if not isinstance(parts.head, nn.Linear):
        return False
    if any(isinstance(child, nn.Dropout) and child.p > 0 for child in parts.decoder.children()):
        return False  # the crown's view would drop its input a second time
    device = next(model.parameters()).device
    vocabulary = parts.head.weight.shape[0]
    ids_BT = torch.arange(16, device=device).reshape(2, 8) % vocabulary
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=ids_BT, use_cache=False).logits
            h_BTD = lower(model, depth)(input_ids=ids_BT, use_cache=False).last_hidden_state
            h_BTD = upper(model, depth)(inputs_embeds=h_BTD, use_cache=False).last_hidden_state
            return torch.equal(parts.head(h_BTD), whole)
    finally:
        model.train(mode)


def _view(parts: Parts, which: slice, without: tuple[nn.Module | None, ...]) -> nn.Module:
    """Return a shallow copy of the decoder that holds only some of its blocks and parts."""
    decoder = parts.decoder
    view: Any = copy.copy(decoder)
    view.__dict__ = dict(decoder.__dict__)
    view._modules = dict(decoder._modules)
    blocks = nn.ModuleList(list(parts.blocks)[which])
    _replace(view, parts.blocks, blocks)
    for part in decoder.children():
        if any(part is left_out for left_out in without):
            _replace(view, part, nn.Identity())
    config: Any = copy.deepcopy(decoder.config)
    config.num_hidden_layers = len(blocks)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[which]
    view.config = config
    return view


def _replace(owner: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, child in owner._modules.items() if child is old)
    owner._modules[name] = new
