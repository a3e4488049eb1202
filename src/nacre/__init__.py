"""Grow language models layer by layer on a frozen substrate; combine experts by their outputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from nacre.version import VERSION

if TYPE_CHECKING:
    from nacre.composition import Tuning, compose
    from nacre.composition import add as add_expert
    from nacre.composition import load as load_composition
    from nacre.composition import remove as remove_expert
    from nacre.composition import tune as tune_heads
    from nacre.doctor import examine
    from nacre.evaluate.run import evaluate as evaluate_checkpoints
    from nacre.export import export as export_checkpoint
    from nacre.generation import Sampling, generate, generate_at_depths, trace
    from nacre.growth.budget import estimate
    from nacre.growth.plan import Plan
    from nacre.growth.plan import load as load_plan
    from nacre.growth.plan import parse as parse_plan
    from nacre.listing import read as list_folder
    from nacre.publish import from_pretrained, push_to_hub
    from nacre.report import write as write_report
    from nacre.study import load as load_study
    from nacre.study import read_results
    from nacre.study import run as run_study
    from nacre.substrate import Substrate, SubstrateRecipe
    from nacre.tokenizer import build as build_tokenizer
    from nacre.tokenizer import token_strings
    from nacre.train.grow import grow
    from nacre.train.observer import Observer

__version__ = VERSION

_PUBLIC = {
    "Observer": ("nacre.train.observer", "Observer"),
    "Plan": ("nacre.growth.plan", "Plan"),
    "Sampling": ("nacre.generation", "Sampling"),
    "Substrate": ("nacre.substrate", "Substrate"),
    "SubstrateRecipe": ("nacre.substrate", "SubstrateRecipe"),
    "Tuning": ("nacre.composition", "Tuning"),
    "add_expert": ("nacre.composition", "add"),
    "build_tokenizer": ("nacre.tokenizer", "build"),
    "compose": ("nacre.composition", "compose"),
    "estimate": ("nacre.growth.budget", "estimate"),
    "evaluate_checkpoints": ("nacre.evaluate.run", "evaluate"),
    "examine": ("nacre.doctor", "examine"),
    "export_checkpoint": ("nacre.export", "export"),
    "from_pretrained": ("nacre.publish", "from_pretrained"),
    "generate": ("nacre.generation", "generate"),
    "generate_at_depths": ("nacre.generation", "generate_at_depths"),
    "grow": ("nacre.train.grow", "grow"),
    "list_folder": ("nacre.listing", "read"),
    "load_composition": ("nacre.composition", "load"),
    "load_plan": ("nacre.growth.plan", "load"),
    "load_study": ("nacre.study", "load"),
    "parse_plan": ("nacre.growth.plan", "parse"),
    "push_to_hub": ("nacre.publish", "push_to_hub"),
    "read_results": ("nacre.study", "read_results"),
    "remove_expert": ("nacre.composition", "remove"),
    "run_study": ("nacre.study", "run"),
    "token_strings": ("nacre.tokenizer", "token_strings"),
    "trace": ("nacre.generation", "trace"),
    "tune_heads": ("nacre.composition", "tune"),
    "write_report": ("nacre.report", "write"),
}

__all__ = [
    "Observer",
    "Plan",
    "Sampling",
    "Substrate",
    "SubstrateRecipe",
    "Tuning",
    "add_expert",
    "build_tokenizer",
    "compose",
    "estimate",
    "evaluate_checkpoints",
    "examine",
    "export_checkpoint",
    "from_pretrained",
    "generate",
    "generate_at_depths",
    "grow",
    "list_folder",
    "load_composition",
    "load_plan",
    "load_study",
    "parse_plan",
    "push_to_hub",
    "read_results",
    "remove_expert",
    "run_study",
    "token_strings",
    "trace",
    "tune_heads",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `import nacre` alone loads no torch."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nacre' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
