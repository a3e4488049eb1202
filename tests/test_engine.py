"""The frozen-trunk engine in whole runs: every mode gives the same model, at its price."""

from __future__ import annotations

import gc
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_forward_hook
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nacre.data import TokenStore
from nacre.data.loader import validation_batches
from nacre.errors import ConfigError
from nacre.growth import ledger
from nacre.growth import plan as plans
from nacre.models import stock
from nacre.train import checkpoint, files
from nacre.train.engine import CACHE
from nacre.train.grow import grow
from nacre.train.loss import Objective
from nacre.train.metrics import read_metrics
from nacre.train.observer import Observer

SENTENCE = """
a shell is laid down one thin layer at a time on ground that never moves and what lies below
stays just as it was while new layers learn
"""
WORDS = SENTENCE.split()
TOKENS = 2560  # of a stage: 80 windows of 32, an epoch and a half of the text
MEASURED = ("tokens_per_second", "peak_memory_bytes")  # of a step: another value every time
BF16 = 0.02  # nats: how far a loss in bf16 may be from that of the other mode
CACHED, RECOMPUTED, RESTART = "trunk.mode=cache", "trunk.mode=recompute", "data.order=restart"
BLOCK = {"add_blocks": 1, "tokens": TOKENS}
LORA = BLOCK | {"lora": {"rank": 2, "alpha": 4}}

Stages = Sequence[dict[str, Any]]


def write_text(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = [" ".join(draw.choices(WORDS, k=draw.randrange(30, 90))) for _ in range(36)]
    path.write_text("\n".join(json.dumps({"text": row}) for row in rows))


class Runs:
    """Makes plans over one small text, and runs each plan once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.done: dict[str, Path] = {}
        write_text(root / "text.jsonl", seed=0)
        write_text(root / "other.jsonl", seed=1)
        self.settings = [
            "training.precision=fp32",
            "training.evaluate_every=4",
            "training.save_every=4",
            f"data.sources=[{root / 'text.jsonl'}]",
            "data.holdout=0.1",
        ]
        first = self.run(RECOMPUTED, stages=[BLOCK | {"tokens": 256}])
        self.settings.append(f"tokenizer.path={first / 'tokenizer'}")
        self.substrate = f"substrate.path={first / 'substrate'}"

    def plan(self, *settings: str, stages: Stages = [BLOCK] * 3) -> plans.Plan:
        data = plans.load("tiny", [*self.settings, *settings]).model_dump(by_alias=True)
        if hasattr(self, "substrate") and data["from"] is None:
            data["substrate"]["path"] = self.substrate.removeprefix("substrate.path=")
        return plans.parse(data | {"stages": list(stages)})

    def run(self, *settings: str, **options: Any) -> Path:
        key = repr((settings, options))
        if key not in self.done:
            out = self.root / f"run-{len(self.done)}"
            grow(self.plan(*settings, **options), out)
            self.done[key] = out
        return self.done[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("engine"))


def records(out: Path) -> list[dict[str, Any]]:
    return [files.read_json(path / files.RECORD) for path in files.stages(out)]


def trunks(out: Path) -> list[dict[str, Any]]:
    return [record["trunk"] for record in records(out)]


def from_depths(out: Path) -> list[int | None]:
    """What each stage's cache was made from: 0 for the whole trunk, None without a cache."""
    return [trunk["cache"]["from_depth"] if "cache" in trunk else None for trunk in trunks(out)]


def fingerprints(out: Path) -> list[str]:
    return [record["fingerprint"] for record in records(out)]


def metrics(out: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in read_metrics(out)
    ]


def assert_same_run(one: Path, two: Path) -> None:
    assert metrics(one) == metrics(two)
    assert fingerprints(one) == fingerprints(two)
    ends = [[record["validation"] for record in records(out)] for out in (one, two)]
    assert ends[0] == ends[1]


def test_the_text_has_what_these_tests_need(runs: Runs) -> None:
    store = TokenStore.open(runs.run(RESTART, CACHED) / "data" / "01")
    windows = (len(store.tokens("train")) - 1) // 32
    assert TOKENS // 32 // 2 < windows < TOKENS // 32, "windows repeat in a stage"
    assert windows % 8, "the last batch that is stored is a short one"
    *_, last = validation_batches(store, context=32, batch_size=8, limit_tokens=2048)
    assert last.shape[1] < 33, "the last held-out window is a short one"


@pytest.mark.parametrize("order", [RESTART, "data.order=continue"])
@pytest.mark.parametrize("micro", ["null", "64"])
def test_cached_and_recomputed_runs_are_the_same(runs: Runs, order: str, micro: str) -> None:
    more = () if micro == "null" else (f"training.micro_batch_tokens={micro}",)
    cached, plain = runs.run(order, CACHED, *more), runs.run(order, RECOMPUTED, *more)
    modes = [[record["trunk_mode"] for record in records(out)] for out in (cached, plain)]
    assert modes == [["recompute", "cache", "cache"], ["recompute"] * 3]
    assert_same_run(cached, plain)


def test_in_bf16_losses_agree_within_the_tolerance(runs: Runs) -> None:
    bf16 = "training.precision=bf16"
    cached, plain = runs.run(RESTART, CACHED, bf16), runs.run(RESTART, RECOMPUTED, bf16)
    assert trunks(cached)[1]["cache"]["dtype"] == "bf16"
    assert "loss_difference" not in trunks(cached)[1], "bf16 holds every output"
    pairs = list(zip(metrics(cached), metrics(plain), strict=True))
    losses = [(a["loss"], b["loss"]) for a, b in pairs if "loss" in a]
    losses += [
        (a["validation"]["loss"], b["validation"]["loss"]) for a, b in pairs if "validation" in a
    ]
    assert len(losses) > 30
    assert max(abs(a - b) for a, b in losses) < BF16
    full = metrics(runs.run(RESTART, RECOMPUTED))
    assert any(a != b for a, b in zip(metrics(plain), full, strict=True)), "it is not fp32"


class Watch(Observer):
    """Sees the caches of a run and counts what goes through each block while one is made."""

    def __init__(self, out: Path) -> None:
        self.out, self.title = out, ""
        self.units: Counter[int] = Counter()
        self.passed: dict[int, Counter[int]] = {}
        self.caches: dict[int, list[str]] = {}
        self.notes: list[str] = []
        self.running: Counter[int] = Counter()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def phase(self, title: str, total: int | None = None) -> None:
        self.title, self.running = title, Counter()

    def stage_started(self, stage: int, stages: int, tokens: int, done: int) -> None:
        self.passed[stage], self.title = self.running, ""
        self.running = Counter()
        here = self.out / CACHE
        self.caches[stage] = sorted(p.name for p in here.iterdir()) if here.exists() else []

    def count(self, module: Any, arguments: Any, output: Any) -> None:
        if type(module) is LlamaDecoderLayer and self.title == "Trunk outputs":
            self.running[module.self_attn.layer_idx] += len(arguments[0])


@pytest.fixture(scope="module")
def watched(runs: Runs) -> tuple[Path, Watch]:
    """A cached growth of four stages, its blocks counted."""
    out = runs.root / "watched"
    watch = Watch(out)
    handle = register_module_forward_hook(watch.count)
    try:
        grow(runs.plan(RESTART, CACHED, stages=[BLOCK] * 4), out, observer=watch)
    finally:
        handle.remove()
    return out, watch


def test_each_cache_is_made_from_the_one_below(watched: tuple[Path, Watch]) -> None:
    out, watch = watched
    assert from_depths(out) == [None, 0, 1, 2]
    store = TokenStore.open(out / "data" / "01")
    held_out = validation_batches(store, context=32, batch_size=8, limit_tokens=2048)
    batches = -(-trunks(out)[1]["cache"]["windows"] // 8)
    windows = 8 * batches + sum(map(len, held_out))
    assert watch.passed[2] == {0: windows}
    assert watch.passed[3] == {1: windows}, "only the new block runs"
    assert watch.passed[4] == {2: windows}


def test_one_cache_at_a_time_and_none_at_the_end(watched: tuple[Path, Watch]) -> None:
    out, watch = watched
    assert watch.caches == {1: [], 2: ["02"], 3: ["03"], 4: ["04"]}
    assert not (out / CACHE).exists()


def test_the_mode_and_its_reason_are_said(watched: tuple[Path, Watch]) -> None:
    out, watch = watched
    assert "trunk of 3 blocks: cache (the plan says so)" in watch.notes
    assert trunks(out)[0] == {"mode": "recompute", "reason": "no block is frozen below"}


def test_a_cache_of_fewer_windows_is_not_gone_on_from(runs: Runs) -> None:
    lengths = [512, 512, TOKENS, 512]
    stages = [BLOCK | {"tokens": tokens} for tokens in lengths]
    cached = runs.run(RESTART, CACHED, stages=stages)
    assert from_depths(cached) == [None, 0, 0, 2]
    assert_same_run(cached, runs.run(RESTART, RECOMPUTED, stages=stages))


def test_a_cache_of_other_text_is_not_gone_on_from(runs: Runs) -> None:
    other = {"add_blocks": 1, "tokens": 512, "sources": [str(runs.root / "other.jsonl")]}
    stages = [BLOCK | {"tokens": 512}] * 2 + [other] * 2
    cached = runs.run(RESTART, CACHED, stages=stages)
    assert from_depths(cached) == [None, 0, 0, 2]
    assert_same_run(cached, runs.run(RESTART, RECOMPUTED, stages=stages))


def test_a_lora_stage_reads_no_cache_and_drops_it(runs: Runs) -> None:
    stages = [BLOCK, BLOCK, LORA, BLOCK, BLOCK]
    stages = [stage | {"tokens": 512} for stage in stages]
    out = runs.root / "lora"
    watch = Watch(out)
    grow(runs.plan(RESTART, CACHED, stages=stages), out, observer=watch)
    assert from_depths(out) == [None, 0, None, 0, 3]
    assert records(out)[2]["trunk_mode"] == "whole"
    assert trunks(out)[2] == {"mode": "whole", "reason": "the trunk trains"}
    assert watch.caches == {1: [], 2: ["02"], 3: [], 4: ["04"], 5: ["05"]}
    assert_same_run(out, runs.run(RESTART, RECOMPUTED, stages=stages))


def alive(kind: type) -> list[Any]:
    """Return what is in memory of exactly this class."""
    gc.collect()
    return [thing for thing in gc.get_objects() if type(thing) is kind]


class Inspect(Observer):
    """Looks at the model of one stage while it trains."""

    def __init__(self, stage: int, look: Callable[[Any, Objective], None]) -> None:
        self.stage, self.look, self.looked = stage, look, 0
        self.before = {id(thing) for thing in alive(LlamaForCausalLM) + alive(Objective)}

    def trained(self, step: dict[str, Any]) -> None:
        if (step["stage"], step["step"]) != (self.stage, 2):
            return
        models, objectives = (
            [thing for thing in alive(kind) if id(thing) not in self.before]
            for kind in (LlamaForCausalLM, Objective)
        )
        (model,) = (m for m in models if m.config.num_hidden_layers == self.stage)
        (objective,) = (o for o in objectives if o.head is model.lm_head)
        self.look(model, objective)
        self.looked += 1


def test_while_the_crown_trains_the_trunk_is_not_in_memory(runs: Runs, tmp_path: Path) -> None:
    def look(model: Any, objective: Objective) -> None:
        parts = stock.find_parts(model)
        assert all(p.is_meta for p in parts.blocks[:2].parameters())
        assert parts.embedding.weight.is_meta
        assert parts.norm is not None
        crown = [parts.blocks[2], parts.norm, parts.head]
        expected = {id(p) for module in crown for p in module.parameters()}
        assert {id(p) for p in objective.parameters()} == expected
        shape = tuple(parts.embedding.weight.shape)
        tensors = [
            t for kind in (torch.Tensor, torch.nn.Parameter) for t in alive(kind) if not t.is_meta
        ]
        tables = [t for t in tensors if tuple(t.shape) == shape and not t.requires_grad]
        rows = checkpoint.load_model(tmp_path / "run" / "stages" / "01").get_input_embeddings()
        assert not any(torch.equal(t.detach().cpu(), rows.weight.detach()) for t in tables)

    inspect = Inspect(3, look)
    stages = [BLOCK | {"tokens": 1024}] * 3
    grow(runs.plan(CACHED, RESTART, stages=stages), tmp_path / "run", observer=inspect)
    assert inspect.looked == 1


def test_in_bf16_the_trunk_is_bf16_in_memory_and_fp32_on_disk(runs: Runs, tmp_path: Path) -> None:
    def look(model: Any, objective: Objective) -> None:
        for parameter in model.parameters():
            expected = torch.float32 if parameter.requires_grad else torch.bfloat16
            assert parameter.dtype == expected
        assert {p.requires_grad for p in objective.parameters()} == {True, False}

    inspect = Inspect(3, look)
    stages = [BLOCK | {"tokens": 512}] * 3
    plan = runs.plan(RECOMPUTED, "training.precision=bf16", stages=stages)
    grow(plan, tmp_path / "run", observer=inspect)
    assert inspect.looked == 1
    first, _, last = (tensors(stage) for stage in files.stages(tmp_path / "run"))
    assert {tensor.dtype for tensor in last.values()} == {torch.float32}
    for name in first:
        if name.startswith(("model.layers.", "model.embed")):
            assert torch.equal(first[name], last[name]), name
    index = files.read_json(tmp_path / "run" / "stages" / "03" / checkpoint.INDEX)
    size = sum(tensor.numel() * 4 for tensor in last.values())
    assert index["metadata"]["total_size"] == size


def tensors(stage: Path) -> dict[str, torch.Tensor]:
    shards = files.read_json(stage / checkpoint.INDEX)["weight_map"]
    found: dict[str, torch.Tensor] = {}
    for name, shard in shards.items():
        with safe_open(stage / shard, "pt") as file:
            found[name] = file.get_tensor(name)
    return found


def test_a_cached_stage_is_a_whole_stock_checkpoint(runs: Runs) -> None:
    cached, plain = runs.run(RESTART, CACHED), runs.run(RESTART, RECOMPUTED)
    ids = torch.arange(64).reshape(2, 32)
    for one, two in zip(files.stages(cached), files.stages(plain), strict=True):
        models = [AutoModelForCausalLM.from_pretrained(stage).eval() for stage in (one, two)]
        with torch.no_grad():
            logits = [model(ids).logits for model in models]
        assert torch.equal(*logits)


def test_what_is_frozen_is_the_same_file_and_what_the_ledger_says(runs: Runs) -> None:
    one, two, three = files.stages(runs.run(RESTART, CACHED))
    assert (three / "substrate.safetensors").samefile(one / "substrate.safetensors")
    assert (three / "blocks-01.safetensors").samefile(one / "blocks-01.safetensors")
    assert (three / "blocks-02.safetensors").samefile(two / "blocks-02.safetensors")
    for stage in (two, three):
        record = files.read_json(stage / files.RECORD)
        hashes = {name: ledger.tensor_hash(tensor) for name, tensor in tensors(stage).items()}
        assert record["frozen"] | record["weights"] == hashes
        assert set(record["trainable"]) == record["weights"].keys()
        assert record["fingerprint"] == ledger.fingerprint(hashes)
    assert "model.embed_tokens.weight" in record["frozen"]
    assert "model.layers.1.mlp.up_proj.weight" in record["frozen"]


class Interrupted(Exception):
    pass


class Stop(Observer):
    """Interrupts the cache of a stage after some windows, or its training at some step."""

    def __init__(self, stage: int, *, windows: int | None = None, step: int | None = None) -> None:
        self.stage, self.windows, self.step = stage, windows, step
        self.builds, self.counted, self.building = 1, 0, False

    def phase(self, title: str, total: int | None = None) -> None:
        self.building = title == "Trunk outputs"
        self.builds += self.building
        self.counted = 0

    def advance(self, units: int) -> None:
        self.counted += units
        at = self.building and self.builds == self.stage
        if at and self.windows is not None and self.counted > self.windows:
            raise Interrupted

    def trained(self, step: dict[str, Any]) -> None:
        if (step["stage"], step["step"]) == (self.stage, self.step):
            raise Interrupted


def interrupt(runs: Runs, out: Path, stop: Stop, *settings: str) -> None:
    with pytest.raises(Interrupted):
        grow(runs.plan(*(settings or (RESTART, CACHED))), out, observer=stop)


@pytest.mark.parametrize(
    "stop",
    [
        Stop(2, windows=0),
        Stop(3, windows=20),
        Stop(3, windows=60),  # the training windows are stored, the held-out ones are not
        Stop(2, step=2),
        Stop(3, step=6),
    ],
    ids=["first windows", "from below", "held-out windows", "before a state", "after a state"],
)
def test_an_interrupted_run_goes_on_to_the_same_model(
    runs: Runs, tmp_path: Path, stop: Stop
) -> None:
    interrupt(runs, tmp_path / "run", stop)
    left = {path.name for path in (tmp_path / "run" / CACHE).iterdir()}
    building = {"02", "03"} if stop.stage == 3 and stop.step is None else {f"{stop.stage:02d}"}
    assert left == building
    grow(None, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", runs.run(RESTART, CACHED))
    assert not (tmp_path / "run" / CACHE).exists()


def test_a_resumed_stage_counts_the_seconds_that_its_cache_took(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupt(runs, out, Stop(3, step=6))
    path = out / CACHE / "03" / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert 0 < manifest["seconds"] < 60
    manifest["seconds"] = 1000.0
    path.write_text(json.dumps(manifest))
    grow(None, out, resume=True)
    assert 1000 < trunks(out)[2]["cache"]["seconds"] < 1060


@pytest.mark.parametrize("part", ["train", "validation"])
def test_a_damaged_segment_is_made_again(runs: Runs, tmp_path: Path, part: str) -> None:
    out = tmp_path / "run"
    interrupt(runs, out, Stop(3, step=6))
    segment = out / CACHE / "03" / part / "segment-00000.bin"
    content = bytearray(segment.read_bytes())
    content[1000] ^= 1
    segment.write_bytes(content)
    watch = Watch(out)
    grow(None, out, resume=True, observer=watch)
    assert any(f"1 damaged segments of {segment.parent}" in note for note in watch.notes)
    assert_same_run(out, runs.run(RESTART, CACHED))


def test_a_damaged_cache_below_is_not_used(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "run"
    interrupt(runs, out, Stop(3, windows=20))
    segment = out / CACHE / "02" / "train" / "segment-00000.bin"
    segment.write_bytes(segment.read_bytes()[:-4])
    grow(None, out, resume=True)
    assert from_depths(out) == [None, 0, 0]
    assert_same_run(out, runs.run(RESTART, CACHED))


@pytest.mark.parametrize(("began", "goes_on"), [(CACHED, RECOMPUTED), (RECOMPUTED, CACHED)])
def test_a_run_may_go_on_in_another_mode(
    runs: Runs, tmp_path: Path, began: str, goes_on: str
) -> None:
    out = tmp_path / "run"
    interrupt(runs, out, Stop(3, step=6), RESTART, began)
    grow(runs.plan(RESTART, goes_on), out, resume=True)
    assert records(out)[2]["trunk_mode"] == goes_on.removeprefix("trunk.mode=")
    assert_same_run(out, runs.run(RESTART, CACHED))
    assert not (out / CACHE).exists()


@pytest.mark.parametrize("limit", ["10kB", "0"])
def test_a_cache_that_does_not_fit_is_refused_before_training(
    runs: Runs, tmp_path: Path, limit: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError) as caught:
        grow(runs.plan(RESTART, CACHED, f"trunk.cache_disk={limit}"), out)
    (problem,) = caught.value.problems
    assert problem.field == "trunk.cache_disk"
    done = trunks(runs.run(RESTART, CACHED))[1]["cache"]
    shown = {"10kB": "10.0KB", "0": "0B"}[limit]
    takes = f"{done['bytes'] / 1000:.1f}KB"
    assert f"{shown}, but the cache of stage 2 takes {takes}" in str(caught.value)
    assert "raise it, free some disk, or use trunk.mode: auto" in str(caught.value)
    assert metrics(out) == []


def test_what_fits_by_a_byte_is_accepted(runs: Runs, tmp_path: Path) -> None:
    stages = [BLOCK | {"tokens": 256}] * 2
    needed = trunks(runs.run(CACHED, stages=stages))[1]["cache"]["bytes"]
    plan = runs.plan(CACHED, f"trunk.cache_disk={needed - 1}", stages=stages)
    with pytest.raises(ConfigError, match="cache_disk"):
        grow(plan, tmp_path / "less")
    grow(runs.plan(CACHED, f"trunk.cache_disk={needed}", stages=stages), tmp_path / "run")


@pytest.mark.parametrize("limit", ["10kB", "0"])
def test_auto_recomputes_what_does_not_fit(runs: Runs, limit: str) -> None:
    stages = [BLOCK | {"tokens": 512}] * 3
    out = runs.run(RESTART, f"trunk.cache_disk={limit}", stages=stages)
    trunk = trunks(out)[1]
    assert trunk["mode"] == "recompute"
    assert trunk["measured"] is None
    assert f"{'10.0KB' if limit == '10kB' else '0B'} are allowed" in trunk["reason"]


def test_auto_measures_and_says_why(runs: Runs) -> None:
    stages = [BLOCK | {"tokens": 512}] * 3
    out = runs.run(RESTART, stages=stages)
    trunk = trunks(out)[1]
    measured = trunk["measured"]
    assert min(measured["block"], measured["write"], measured["read"]) > 0
    cheaper = measured["cache_seconds"] < measured["recompute_seconds"]
    assert trunk["mode"] == ("cache" if cheaper else "recompute")
    assert "for this stage and 1 after it the trunk would take" in trunk["reason"]
    assert fingerprints(out) == fingerprints(runs.run(RESTART, RECOMPUTED, stages=stages))


def test_auto_does_not_count_on_stages_that_recompute(runs: Runs) -> None:
    stages: list[dict[str, Any]] = [BLOCK | {"tokens": 512}] * 3
    stages[2] = stages[2] | {"trunk": "recompute"}
    out = runs.run(RESTART, stages=stages)
    assert trunks(out)[1]["reason"] == "every window is read once, and by this stage alone"
    assert trunks(out)[2]["reason"] == "the plan says so"


def test_a_stage_may_have_a_mode_of_its_own(runs: Runs) -> None:
    stages: list[dict[str, Any]] = [BLOCK | {"tokens": 512} for _ in range(4)]
    stages[1]["trunk"], stages[2]["trunk"] = "cache", "recompute"
    out = runs.run(RESTART, CACHED, stages=stages)
    assert [trunk["mode"] for trunk in trunks(out)] == ["recompute", "cache", "recompute", "cache"]
    assert from_depths(out) == [None, 0, None, 0], "a stage without a cache leaves none"


@pytest.fixture(scope="module")
def gpt2(runs: Runs) -> Path:
    path = runs.root / "gpt2"
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    stock.build(config).save_pretrained(path)
    return path


def test_a_model_that_does_not_split_cannot_be_cached(
    runs: Runs, gpt2: Path, tmp_path: Path
) -> None:
    stages = [{"add_blocks": 1, "tokens": 512}]
    with pytest.raises(ConfigError) as caught:
        grow(runs.plan(CACHED, f"from={gpt2}", stages=stages), tmp_path / "run")
    (problem,) = caught.value.problems
    assert problem.field == "trunk.mode"
    assert "a GPT2LMHeadModel does not split exactly in two" in str(caught.value)
    assert "use auto: the model runs whole" in str(caught.value)
    later = [*stages, stages[0] | {"trunk": "cache"}]
    with pytest.raises(ConfigError, match="does not split"):
        grow(runs.plan(f"from={gpt2}", stages=later), tmp_path / "later")
    assert not files.stages(tmp_path / "later"), "nothing is trained first"


def test_auto_runs_it_whole(runs: Runs, gpt2: Path, tmp_path: Path) -> None:
    stages = [{"add_blocks": 1, "tokens": 512}]
    grow(runs.plan(f"from={gpt2}", stages=stages), tmp_path / "run")
    (trunk,) = trunks(tmp_path / "run")
    assert trunk == {"mode": "whole", "reason": "the decoder does not split exactly in two"}


@pytest.fixture(scope="module")
def foreign(runs: Runs) -> Path:
    """A checkpoint in bf16 whose head is its embedding, as many on the hub are."""
    path = runs.root / "foreign"
    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(path)
    return path


def test_a_foreign_checkpoint_can_be_cached(runs: Runs, foreign: Path) -> None:
    stages = [{"add_blocks": 1, "tokens": 512}] * 2
    cached = runs.run(CACHED, RESTART, f"from={foreign}", stages=stages)
    plain = runs.run(RECOMPUTED, RESTART, f"from={foreign}", stages=stages)
    assert from_depths(cached) == [0, 2]
    assert_same_run(cached, plain)
    base, (one, two) = cached / "base", files.stages(cached)
    for stage in (one, two):
        for shard in ("substrate.safetensors", "blocks-00.safetensors"):
            assert (stage / shard).samefile(base / shard)
    assert not (one / "head.safetensors").samefile(base / "head.safetensors")
    grown, first = tensors(two), AutoModelForCausalLM.from_pretrained(foreign).state_dict()
    for name in first:
        if not name.startswith(("lm_head", "model.norm")):
            assert torch.equal(grown[name], first[name].float()), name
    model = AutoModelForCausalLM.from_pretrained(two)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, grown["lm_head.weight"])


def test_a_base_is_written_once(runs: Runs, foreign: Path, tmp_path: Path) -> None:
    out, stages = tmp_path / "run", [{"add_blocks": 1, "tokens": 512}]
    grow(runs.plan(CACHED, f"from={foreign}", stages=stages), out)
    before = {path: path.stat().st_mtime_ns for path in (out / "base").iterdir()}
    grow(runs.plan(CACHED, f"from={foreign}", stages=stages * 2), out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in (out / "base").iterdir()} == before
    assert len(records(out)) == 2


def test_a_branch_from_a_stage_can_be_cached(runs: Runs) -> None:
    base = files.stages(runs.run(RESTART, CACHED))[1]
    stages = [{"add_blocks": 1, "tokens": 512}]
    cached = runs.run(CACHED, f"from={base}", stages=stages)
    assert from_depths(cached) == [0]
    assert_same_run(cached, runs.run(RECOMPUTED, f"from={base}", stages=stages))
    (stage,) = files.stages(cached)
    for shard in ("substrate.safetensors", "blocks-01.safetensors", "blocks-02.safetensors"):
        assert (stage / shard).samefile(base / shard)
    assert records(cached)[0]["parent"] == files.read_json(base / "stage.json")["fingerprint"]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_a_smaller_cache_loses_is_said(runs: Runs, dtype: str) -> None:
    stages = [BLOCK | {"tokens": 512}] * 3
    out = runs.run(RESTART, CACHED, f"trunk.cache_dtype={dtype}", stages=stages)
    assert from_depths(out) == [None, 0, 1]
    for trunk in trunks(out)[1:]:
        assert trunk["cache"]["dtype"] == dtype
        assert 0 < abs(trunk["loss_difference"]) < {"bf16": 1e-3, "fp8": 1e-2}[dtype]
    assert "loss_difference" not in trunks(out)[0]


def test_nothing_is_said_where_nothing_is_lost(runs: Runs) -> None:
    stages = [BLOCK | {"tokens": 512}] * 2
    for settings in (
        [RESTART, RECOMPUTED],
        [RESTART, CACHED, "trunk.cache_dtype=fp32"],
        [RESTART, RECOMPUTED, "trunk.cache_dtype=fp8"],
    ):
        assert "loss_difference" not in trunks(runs.run(*settings, stages=stages))[1], settings


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("weights", "mode"), [("int8", CACHED), ("int8", RECOMPUTED), ("fp8", CACHED)]
)
def test_eight_bit_weights(runs: Runs, weights: str, mode: str) -> None:
    stages = [BLOCK | {"tokens": 512}] * 3
    out = runs.run(RESTART, mode, f"trunk.weights={weights}", stages=stages)
    for trunk in trunks(out)[1:]:
        assert trunk["weights"] == weights
        assert 0 < abs(trunk["loss_difference"]) < 1e-2
    first, _, last = (tensors(stage) for stage in files.stages(out))
    frozen = [name for name in first if name.startswith(("model.layers.", "model.embed"))]
    assert all(torch.equal(first[name], last[name]) for name in frozen)
    for stage, record in zip(files.stages(out), records(out), strict=True):
        hashes = {name: ledger.tensor_hash(tensor) for name, tensor in tensors(stage).items()}
        assert record["frozen"] | record["weights"] == hashes
