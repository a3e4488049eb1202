"""Picomodels: 2 blocks, width 32, 2 heads, vocabulary 64; every family that the tests compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    GPT2Config,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from nacre.cli import main
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.models import stock
from nacre.train.grow import grow

VOCABULARY, WIDTH, HEADS, MLP, CONTEXT, DEPTH = 64, 32, 2, 64, 32, 2
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

Build = Callable[..., PreTrainedModel]
Command = Callable[..., tuple[int, str, str]]

WITHOUT_NACRE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nacre":
            raise ImportError("nacre is blocked here")
sys.meta_path.insert(0, Block())
try:
    import nacre
except ImportError:
    pass
else:
    sys.exit("nacre could be imported")
"""
"""How a program begins that runs as if nacre were not installed."""


def family_config(family: str, depth: int = DEPTH) -> PreTrainedConfig:
    """Return the configuration of a picomodel of some family and depth."""
    if family in stock.FAMILIES:
        return stock.FAMILIES[family](VOCABULARY, WIDTH, HEADS, MLP, CONTEXT, depth)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        **NO_SPECIAL,
    }
    if family == "gpt2":
        sizes = {"n_embd": WIDTH, "n_layer": depth, "n_head": HEADS, "n_positions": CONTEXT}
        return GPT2Config(vocab_size=VOCABULARY, **sizes, **NO_SPECIAL)
    if family == "opt":
        return OPTConfig(ffn_dim=MLP, word_embed_proj_dim=WIDTH, **shape)
    if family == "qwen3":
        return Qwen3Config(
            intermediate_size=MLP, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, **shape
        )
    if family == "qwen3_sliding":
        kinds = ["full_attention", "sliding_attention"]
        return Qwen3Config(
            intermediate_size=MLP,
            num_key_value_heads=HEADS,
            head_dim=WIDTH // HEADS,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=[kinds[index % 2] for index in range(depth)],
            **shape,
        )
    assert family == "gemma2"
    return Gemma2Config(
        intermediate_size=MLP, num_key_value_heads=HEADS, head_dim=WIDTH // HEADS, **shape
    )


@pytest.fixture
def pico() -> Build:
    """Build a picomodel by family name: `pico("llama", depth=3, seed=1)`."""

    def build(family: str, depth: int = DEPTH, seed: int = 0) -> PreTrainedModel:
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = stock.build(family_config(family, depth))
            for parameter in model.parameters():  # biases and norms away from zero and one
                parameter.data += 0.02 * torch.randn_like(parameter)
        return model.eval()

    return build


@pytest.fixture
def ids() -> torch.Tensor:
    """Token ids, int64 `[3, 16]`, without padding."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCABULARY, (3, 16), generator=generator)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """What is this small runs fastest on one thread: several mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command of `nacre`; return exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(autouse=True)
def _one_seed() -> Iterator[None]:
    """Start every test from one random state and leave none behind; no other device is woken."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def tiny_plan() -> Plan:
    """The recipe `tiny`: three stages of one block, the last with LoRA; in fp32."""
    return plans.load("tiny", ["training.precision=fp32"])


@pytest.fixture(scope="session")
def tiny_run(tiny_plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole finished run of the recipe `tiny`; tests only read it."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    grow(tiny_plan, out)
    return out


@pytest.fixture
def plan(tiny_plan: Plan) -> Plan:
    """The short name of `tiny_plan`."""
    return tiny_plan


@pytest.fixture
def run(tiny_run: Path) -> Path:
    """The short name of `tiny_run`."""
    return tiny_run
