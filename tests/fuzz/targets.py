"""What is fuzzed: everything that reads a file which somebody else may have written.

A target makes inputs and reads them as the library does. A `NacreError` is a refusal; any other
error is a crash.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutation
import torch
import yaml

from nacre import composition, config, folders, tokenizer_files
from nacre import study as studies
from nacre import tokenizer as tokenizers
from nacre.data import TokenStore, corpus, shards, tokenize
from nacre.errors import CheckpointError, ConfigError, Problem
from nacre.evaluate import benchmarks, parallel, results
from nacre.growth import budget, ledger
from nacre.growth import plan as plans
from nacre.growth.cache import manifest
from nacre.models import stock
from nacre.report import files as report_files
from nacre.report import tables as report_tables
from nacre.substrate import Substrate, SubstrateRecipe
from nacre.train import checkpoint, files, folder, foreign, metrics, schema, state, verify
from nacre.untrusted import as_object, parse_json

TEXT = "A pearl grows layer by layer, and each layer is thin. 12 shells lie under water.\n"


@dataclass(frozen=True)
class Target:
    """`make` draws an input, `read` takes it; `weight` is its share of a campaign."""

    make: Callable[[random.Random], Any]
    read: Callable[[Any], object]
    weight: float = 1.0


def file_target(
    path: Path, make: mutation.Mutate, read: Callable[[], object], weight: float = 1.0
) -> Target:
    """Return a target whose inputs are what a file holds; others find there what was before."""

    def write_and_read(data: bytes) -> None:
        before = path.read_bytes() if path.exists() else None
        path.write_bytes(data)
        try:
            read()
        finally:
            if before is None:
                path.unlink()
            else:
                path.write_bytes(before)

    return Target(make, write_and_read, weight)


def json_target(path: Path, sound: Any, read: Callable[[], object], weight: float = 1.0) -> Target:
    """Return a target whose inputs are JSON, made from a sound document."""
    return file_target(path, lambda draw: mutation.as_json(draw, sound), read, weight)


def make_all(root: Path) -> dict[str, Target]:
    """Return every target by name; their files are in `root`."""
    return {
        **_plans(root / "plans"),
        **_tokenizers(root / "tokenizer"),
        **_checkpoints(root / "stages" / "01"),
        **_runs(root / "run"),
        **_compositions(root / "composition"),
        **_questions(root / "questions"),
    }


# --- plans, studies, settings ---


def _plans(root: Path) -> dict[str, Target]:
    root.mkdir(parents=True)
    plan = yaml.safe_load(PLAN)
    study = yaml.safe_load(STUDY)
    path = root / "plan.yaml"

    def read_plan(data: dict[str, Any]) -> None:
        parsed = plans.parse(data)
        plans.warnings(parsed)
        parsed.fingerprint()

    def read_study(data: dict[str, Any]) -> None:
        studies.parse(data).runs(root)

    return {
        "plan": Target(lambda draw: mutation.mapping(draw, plan), read_plan, 3),
        "plan, priced": Target(
            lambda draw: mutation.mapping(draw, plan),
            lambda data: budget.estimate(plans.parse(data)), 0.1,
        ),
        "plan.yaml": file_target(
            path, lambda draw: mutation.raw(draw, PLAN.encode()),
            lambda: plans.parse(config.read_yaml(path)), 0.5,
        ),
        "settings": Target(
            lambda draw: mutation.raw(draw, draw.choice(SETTINGS)).decode("utf-8", "replace"),
            lambda text: plans.parse(config.override(plan, [text])), 0.5,
        ),
        "study": Target(lambda draw: mutation.mapping(draw, study), read_study, 0.7),
        "study.yaml": file_target(
            path, lambda draw: mutation.raw(draw, STUDY.encode()),
            lambda: studies.parse(config.read_yaml(path)), 0.3,
        ),
    }  # fmt: skip


PLAN = """\
name: tiny
seed: 1
substrate: {kind: code, bits: 16}
tokenizer: {size: 512}
data: {sources: [default], holdout: 0.02}
model: {family: llama, width: 32, heads: 2, context: 32}
training: {batch_tokens: 256, lr: 3e-3, schedule: wsd, betas: [0.9, 0.95]}
trunk: {mode: cache, cache_disk: 1GB}
stages:
  - {add_blocks: 1, tokens: 2k}
  - &s {add_blocks: 1, tokens: 2_000, init: zero, budget: auto}
  - {<<: *s, under: 1, train: {blocks: 0-1}}
  - {tokens: 1e4, lora: {rank: 2}}
"""

STUDY = """\
name: two
seeds: [0, 1]
budgets: [1, 2.5]
baseline: whole
plan: {tokenizer: {size: 512}, model: {width: 32, heads: 2, context: 32},
       training: {batch_tokens: 256}}
arms:
  whole: {about: at once, stages: [{add_blocks: 2, tokens: 2048}]}
  grown: {budgets: [1], stages: [{add_blocks: 1, tokens: 1024}, {add_blocks: 1, tokens: 1024}]}
claims: [{arm: grown, at: flops, at_most: 1.1, budget: 1}]
"""

SETTINGS = (
    b"model.width=64", b"stages.0.tokens=1.5M", b"stages.1.lora={rank: 4}", b"data.sources=[a, b]",
    b"trunk.cache_disk=10GB", b"training.betas=[0.9, 0.99]", b"name=x",
)  # fmt: skip


# --- tokenizers ---


def _tokenizers(root: Path) -> dict[str, Target]:
    tokenizers.build([TEXT] * 20, 512).save_pretrained(root)
    definition, settings = root / "tokenizer.json", root / "tokenizer_config.json"
    whole, said = definition.read_bytes(), settings.read_bytes()
    sound = json.loads(whole)

    def read() -> None:
        tokenizer = tokenizers.load(root)
        tokenizers.token_strings(tokenizer)
        tokenizers.byte_lengths(tokenizer)
        tokenizers.fingerprint(tokenizer)

    def read_definition(data: bytes) -> None:
        settings.write_bytes(said)
        definition.write_bytes(data)
        read()

    def read_settings(data: bytes) -> None:
        definition.write_bytes(whole)
        settings.write_bytes(data)
        read()

    def check(data: bytes) -> None:
        try:
            tokenizer_files.check_definition(as_object(parse_json(data)))
        except ValueError as error:
            raise ConfigError(Problem("tokenizer", str(error))) from None

    short = {**sound, "model": {**sound["model"], "vocab": {"a": 0, "b": 1}, "merges": []}}
    parts = {**short, "normalizer": NORMALIZER, "decoder": DECODER, "post_processor": TEMPLATE,
             "padding": PADDING}  # fmt: skip
    return {
        "tokenizer.json": Target(
            lambda draw: mutation.as_json(draw, draw.choice((sound, parts))), read_definition, 0.04
        ),
        "tokenizer_config.json": Target(
            lambda draw: mutation.as_json(draw, json.loads(said)), read_settings, 0.04
        ),
        "tokenizer parts": Target(lambda draw: mutation.as_json(draw, parts), check, 1),
    }


NORMALIZER = {"type": "Sequence", "normalizers": [
    {"type": "NFC"}, {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]}  # fmt: skip
DECODER = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]}  # fmt: skip
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}
PADDING = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
           "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}  # fmt: skip


# --- checkpoints ---


def make_stage(root: Path, seed: int) -> None:
    """Write a stage of one block over the small tokenizer, with a ledger."""
    root.mkdir(parents=True)
    tokenizer = tokenizers.build([TEXT] * 20, 512)
    torch.manual_seed(seed)
    model = stock.build(stock.FAMILIES["llama"](len(tokenizer), 16, 1, 16, 16, 1))
    checkpoint.save_weights(model, root, [(1, 1)])
    tokenizer.save_pretrained(root)
    hashes = {name: ledger.tensor_hash(tensor) for name, tensor in model.state_dict().items()}
    files.write_json(root / files.RECORD, record(hashes, tokenizers.fingerprint(tokenizer)))


def record(hashes: dict[str, str], tokenizer: str) -> dict[str, Any]:
    return {
        "stage": 1, "depth": 1, "new_blocks": 1, "total_parameters": 100, "active_parameters": 50,
        "tokens": 256, "seconds": 1.5, "tokens_per_second": 100.0, "peak_memory_bytes": 1000,
        "flops": 1e9, "trunk_mode": "none", "init": "random", "train": "crown", "under": 0,
        "validation": {"loss": 5.1, "perplexity": 160.0, "bits_per_byte": 3.0},
        "history": [[0, 6.2], [256, 5.1]], "growth": [[1, 1]], "parent": None, "plan": "0" * 64,
        "cursor": {"position": 8, "seed": 0, "context": 32, "split": "train", "store": "0" * 64},
        "substrate": "1" * 64, "tokenizer": tokenizer, "corpus": "2" * 64,
        "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "merge": {"adapters": 7,
            "largest_logit_difference": 1e-6, "loss_difference": 0.0}},
        "trainable": ["lm_head.weight"], "trunk": {"mode": "none", "cache": None},
        "frozen": {}, "weights": hashes, "fingerprint": ledger.fingerprint(hashes),
    }  # fmt: skip


def _checkpoints(root: Path) -> dict[str, Target]:
    make_stage(root, 0)
    configuration = json.loads((root / "config.json").read_text())
    index = json.loads((root / checkpoint.INDEX).read_text())
    stage = json.loads((root / files.RECORD).read_text())
    shard = root / "head.safetensors"
    sound = shard.read_bytes()
    whole_config, whole_index = (
        (root / name).read_bytes() for name in ("config.json", checkpoint.INDEX)
    )

    def whole() -> None:
        (root / "config.json").write_bytes(whole_config)
        (root / checkpoint.INDEX).write_bytes(whole_index)
        shard.write_bytes(sound)

    def read_config(data: bytes) -> None:
        whole()
        (root / "config.json").write_bytes(data)
        checkpoint.load_config(root)

    def load_configured(data: bytes) -> None:
        whole()
        (root / "config.json").write_bytes(data)
        checkpoint.load_model(root)

    def read_index(data: bytes) -> None:
        whole()
        (root / checkpoint.INDEX).write_bytes(data)
        foreign.check_folder(root)
        foreign.stored_in(foreign.shards(root))

    def read_shard(data: bytes) -> None:
        shard.write_bytes(data)
        foreign.read_header(shard)

    def load_shard(data: bytes) -> None:
        whole()
        shard.write_bytes(data)
        checkpoint.load_model(root)

    def read_record(data: bytes) -> None:
        (root / files.RECORD).write_bytes(data)
        files.read_record(root)
        files.read_stage(root)

    return {
        "config.json": Target(lambda draw: mutation.as_json(draw, configuration), read_config, 0.5),
        "config.json, loaded": Target(
            lambda draw: mutation.as_json(draw, configuration), load_configured, 0.02
        ),
        "shard index": Target(lambda draw: mutation.as_json(draw, index), read_index),
        "safetensors header": Target(lambda draw: _damaged(draw, sound), read_shard),
        "safetensors, loaded": Target(lambda draw: _damaged(draw, sound), load_shard, 0.02),
        "ledger": Target(lambda draw: mutation.as_json(draw, stage), read_record, 2),
    }


# --- runs: stores, states, metrics, caches, substrates, evaluations ---


def _runs(root: Path) -> dict[str, Target]:
    root.mkdir(parents=True)
    return {**_stores(root), **_states(root), **_lines(root), **_tables(root), **_reports(root)}


def _stores(root: Path) -> dict[str, Target]:
    (root / "a.txt").write_text(TEXT * 30)
    (root / "b.txt").write_text(TEXT[::-1] * 5)
    tokenizer = tokenizers.build([TEXT] * 20, 512)
    store = root / "store"
    tokenize([str(root / "a.txt"), str(root / "b.txt")], tokenizer, store, holdout=0.3)
    sound = json.loads((store / "store.json").read_text())

    def read() -> None:
        found = TokenStore.open(store)
        found.verify()

    def read_documents(data: bytes) -> None:
        (store / "train.documents").write_bytes(data)
        found = shards.fingerprint(store, sound["tokenizer"])
        about = json.loads(json.dumps(sound)) | {"fingerprint": found}
        about["counts"]["train"]["documents"] = len(data) // 8 - 1
        (store / "store.json").write_text(json.dumps(about))
        read()

    begins = (store / "train.documents").read_bytes()
    return {
        "token store": json_target(store / "store.json", sound, read),
        "token store, documents": Target(lambda draw: mutation.raw(draw, begins), read_documents),
    }


def _states(root: Path) -> dict[str, Target]:
    place = root / "state"
    tensors = {"weight.a": torch.ones(3, 2), "step.a": torch.tensor(7.0)}
    progress = {
        "stage": 1, "step": 3, "tokens": 768, "seconds": 1.0, "best": 5.0, "stale": 0,
        "cursor": {"position": 8, "seed": 0, "context": 32, "split": "train", "store": "0" * 64},
        "peak_memory_bytes": 0, "history": [[0, 6.0]], "end": None, "skipped": 0, "processes": 1,
    }  # fmt: skip
    state.save(place, tensors, progress | dict.fromkeys(set(state.PROGRESS) - progress.keys()))
    written = json.loads((place / state.RECORD).read_text())
    (shard,) = place.glob("*.safetensors")
    sound = shard.read_bytes()

    def read() -> None:
        saved = state.SavedState(place, state.check(place))
        saved.read({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})

    def read_progress(data: bytes) -> None:
        """Read a changed record, its own hash set right where it has one."""
        shard.write_bytes(sound)
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            changed = json.loads(data)
            rest = {key: value for key, value in changed.items() if key != "sha256"}
            changed["sha256"][state.RECORD] = state.progress_hash(rest)
            data = json.dumps(changed).encode()
        (place / state.RECORD).write_bytes(data)
        read()

    def read_shard(data: bytes) -> None:
        shard.write_bytes(data)
        hashes = written["sha256"] | {shard.name: hashlib.sha256(data).hexdigest()}
        (place / state.RECORD).write_text(json.dumps(written | {"sha256": hashes}))
        read()

    return {
        "saved state": Target(lambda draw: mutation.as_json(draw, written), read_progress),
        "saved state, tensors": Target(lambda draw: _damaged(draw, sound), read_shard, 0.3),
    }


def _damaged(draw: random.Random, sound: bytes) -> bytes:
    """Return a file of safetensors with a changed header, or any changed bytes."""
    length = struct.unpack("<Q", sound[:8])[0]
    header, data = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    if draw.random() < 0.3:
        return mutation.raw(draw, sound)
    text = mutation.as_json(draw, header)
    claimed = len(text) if draw.random() < 0.9 else draw.choice((0, 1, 10**10, 2**63, 2**64 - 1))
    return struct.pack("<Q", claimed) + text + data


def _lines(root: Path) -> dict[str, Target]:
    line = {
        "checkpoint": "a", "fingerprint": "0" * 64, "task": "lm", "version": "1", "settings": {},
        "metric": "bits_per_byte", "subset": "", "value": 1.5, "n": 3, "interval": [1.4, 1.6],
        "chance": None, "corrected": None, "nacre": "0.1.0", "commit": None, "date": "2026-01-01",
    }  # fmt: skip
    metric = {
        "stage": 1,
        "step": 1,
        "tokens": 256,
        "loss": 6.0,
        "lr": 1e-3,
        "tokens_per_second": 9.0,
    }
    scored = {
        "stage": 1,
        "step": 1,
        "tokens": 256,
        "validation": {"loss": 6.0, "bits_per_byte": 3.0},
    }

    def several(*sound: Any) -> mutation.Mutate:
        return lambda draw: b"\n".join(mutation.as_json(draw, draw.choice(sound)) for _ in range(3))

    def read_metrics() -> None:
        metrics.read_metrics(root, schema.MetricLine)
        metrics.read_metrics(root)
        verify.check_metrics(root)

    evaluations = root / results.FILE
    return {
        "evaluations.jsonl": file_target(
            evaluations, several(line), lambda: results.read(evaluations)
        ),
        "metrics.jsonl": file_target(root / folders.METRICS, several(metric, scored), read_metrics),
        "run.json": json_target(
            root / folders.RUN,
            {"fingerprints": {"tokenizer": "0" * 64, "substrate": "1" * 64, "corpora": {"a": "2"}}},
            lambda: folder.check_parts(
                root, {"tokenizer": "0" * 64, "substrate": "1" * 64, "corpora": {"a": "2"}}
            ),
        ),
    }


def _reports(root: Path) -> dict[str, Target]:
    """A finished stage of a run, its plan and its metrics, as a report reads them."""
    run = root / "reported"
    make_stage(run / "stages" / "01", 0)
    (run / folders.RUN).write_text("{}")
    metric = {
        "stage": 1,
        "step": 1,
        "tokens": 256,
        "loss": 6.0,
        "lr": 1e-3,
        "tokens_per_second": 9.0,
    }
    held_out = {"loss": 6.0, "perplexity": 400.0, "bits_per_byte": 3.0}
    scored = {"stage": 1, "step": 1, "tokens": 256, "validation": held_out}
    plan = {"stages": [{"add_blocks": 1, "tokens": 256}, {"add_blocks": 1, "tokens": 256}]}
    stage = json.loads((run / "stages" / "01" / files.RECORD).read_text())
    whole = {
        folders.PLAN: plan, folders.METRICS: metric, f"stages/01/{files.RECORD}": stage,
    }  # fmt: skip

    def make(draw: random.Random) -> dict[str, bytes]:
        changed = draw.choice(list(whole))
        return {
            name: mutation.as_json(draw, sound) if name == changed else json.dumps(sound).encode()
            for name, sound in whole.items()
        } | {"more": json.dumps(scored).encode()}

    def read(contents: dict[str, bytes]) -> None:
        for name in whole:
            (run / name).write_bytes(contents[name])
        with (run / folders.METRICS).open("ab") as file:
            file.write(b"\n" + contents["more"] + b"\n")
        found = report_files.load_run(run)
        report_tables.stage_table(found.records)
        report_tables.ledger_table(found.records)
        found.views()

    return {"report": Target(make, read, 0.5)}


def _tables(root: Path) -> dict[str, Target]:
    cache, substrate = root / "cache", root / "substrate"
    cache.mkdir()
    identity = {"trunk": "0" * 64, "depth": 1, "corpus": "1" * 64, "order": "2" * 64, "windows": 4,
                "context": 4, "width": 8, "dtype": "fp32"}  # fmt: skip
    listed = {"format": 1, "identity": identity, "segment_windows": 2, "segments": {"0": "3" * 64}}
    Substrate.build(SubstrateRecipe(kind="code", bits=4), ["a", "b", b"\x00"], 8).save(substrate)
    about = json.loads((substrate / "substrate.json").read_text())
    rows = (substrate / "substrate.safetensors").read_bytes()

    def read_cache() -> None:
        try:
            manifest.read_manifest(cache)
        except manifest.Unreadable as error:
            raise CheckpointError(str(error)) from None

    return {
        "trunk cache": json_target(cache / manifest.MANIFEST, listed, read_cache),
        "substrate": json_target(
            substrate / "substrate.json", about, lambda: Substrate.load(substrate), 0.5
        ),
        "substrate rows": file_target(
            substrate / "substrate.safetensors",
            lambda draw: mutation.raw(draw, rows),
            lambda: Substrate.load(substrate), 0.5,
        ),
    }  # fmt: skip


# --- compositions ---


COMPARED = {
    "texts": "3" * 64, "settings": {"context": 32, "stride": 16, "resamples": 2000},
    "rows": [{
        "kind": "all", "name": "all texts", "documents": 3, "bytes": 99, "composition": 2.0,
        "experts": {"one": 1.9, "two": 3.0}, "best": "one", "difference": 0.1,
        "interval": [0.05, 0.15], "outcome": "worse", "verdict": "worse than its best expert (one)",
    }],
}  # fmt: skip


def _compositions(root: Path) -> dict[str, Target]:
    for name in ("one", "two"):
        make_stage(root / name, seed=len(name) + ord(name[0]))
    made = root / "made"
    composition.compose([root / "one", root / "two"], made, mix="posterior", decay=0.9)
    configuration = json.loads((made / "config.json").read_text())
    described = json.loads((made / "composition.json").read_text()) | {"report": COMPARED}
    files.write_json(made / "composition.json", described)
    sound = {name: (made / name).read_bytes() for name in ("config.json", "composition.json")}

    def read(name: str, data: bytes) -> None:
        for other, content in sound.items():
            (made / other).write_bytes(content)
        (made / name).write_bytes(data)
        record = composition.read_record(made)
        composition.verify(made)
        composition.summary(record)
        composition.card.card(record)

    def read_whole(data: bytes) -> None:
        for other in sound:
            (made / other).write_bytes(data)
        results.fingerprint(made)

    def draw_both(draw: random.Random) -> bytes:
        experts = zip(configuration["experts"], described["experts"], strict=True)
        whole = {**configuration, **described, "experts": [one | other for one, other in experts]}
        both = mutation.document(draw, whole)
        return json.dumps(both).encode()

    return {
        "composition": Target(
            lambda draw: mutation.as_json(draw, described),
            lambda data: read("composition.json", data),
        ),
        "composition, config": Target(
            lambda draw: mutation.as_json(draw, configuration),
            lambda data: read("config.json", data),
        ),
        "composition, both": Target(draw_both, read_whole, 0.3),
    }


# --- benchmarks, parallel text, corpora ---

SQUAD = {"data": [{"title": "a", "paragraphs": [{"context": "b c", "qas": [
    {"question": "q?", "answers": [{"text": "b"}, {"text": "c"}]},
    {"question": "r?", "answers": [], "is_impossible": True},
]}]}]}  # fmt: skip
ARC = {"question": {"stem": "q?", "choices": [{"label": "A", "text": "x"},
       {"label": "B", "text": "y"}]}, "answerKey": "A"}  # fmt: skip
HELLASWAG = {"activity_label": "a", "ctx_a": "b [c] d", "ctx_b": "e", "endings": ["f", "g [h]"],
             "label": 0}  # fmt: skip
TABLE = "en\tru\nday\tдень\n\t\nnight\tночь\n"
MMLU = b'what?,a,b,c,d,A\n"two ""lines""\n",e,f,g,h,D\n'
PAIR = {"sentence_good": "a b.", "sentence_bad": "b a.", "UID": "order"}


def _questions(root: Path) -> dict[str, Target]:
    root.mkdir(parents=True)
    documents = {
        "dev-v1.1.json": SQUAD, "ARC-Easy-Test.jsonl": ARC, "dev_rand_split.jsonl": ARC,
        "hellaswag_val.jsonl": HELLASWAG, "lambada_test.jsonl": {"text": "one two three"},
        "blimp.jsonl": PAIR,
    }  # fmt: skip
    texts = {"anatomy_test.csv": MMLU, "lambada_test_plain_text.txt": b"one two three\nfour five\n"}
    found: dict[str, Target] = {}
    for number, (name, sound) in enumerate([*documents.items(), *texts.items()]):
        place = root / str(number)
        place.mkdir()

        def read(place: Path = place) -> None:
            for benchmark in benchmarks.find(place).values():
                benchmarks.read(benchmark)

        def make(draw: random.Random, sound: Any = sound) -> bytes:
            is_text = isinstance(sound, bytes)
            return mutation.raw(draw, sound) if is_text else mutation.as_json(draw, sound)

        found[name] = file_target(place / name, make, read)
    table, lines, corpus_file = root / "table", root / "lines", root / "a.jsonl"
    for place in (table, lines):
        place.mkdir()

    def read_parallel(place: Path) -> None:
        for text in parallel.find(place).values():
            parallel.read(text)

    (lines / "en-ru.ru").write_text("раз\nдва\n")
    found["en-ru.tsv"] = file_target(
        table / "x.tsv", lambda draw: mutation.raw(draw, TABLE.encode()),
        lambda: read_parallel(table),
    )  # fmt: skip
    found["en-ru.en"] = file_target(
        lines / "en-ru.en", lambda draw: mutation.raw(draw, b"one\ntwo\n"),
        lambda: read_parallel(lines),
    )  # fmt: skip
    found["corpus.jsonl"] = json_target(
        corpus_file, {"text": "a b c", "n": 1}, lambda: list(corpus.read([str(corpus_file)]))
    )
    return found
