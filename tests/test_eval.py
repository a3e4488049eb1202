"""`nacre eval`: runs, compositions, foreign folders; what was done is not done again; refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Build, Command
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

import nacre
from nacre import composition
from nacre import tokenizer as tokenizers
from nacre.errors import CheckpointError, ConfigError, DataError, FingerprintError, NacreError
from nacre.evaluate import language, results, tasks
from nacre.evaluate.run import evaluate
from nacre.evaluate.tasks import FAMILIES, Options
from nacre.models import stock
from nacre.report.tables import short_name
from nacre.train import checkpoint
from nacre.train.observer import Observer

TEXTS = {
    "en/novels/a.txt": "It was the best of times, it was the worst of times.",
    "en/novels/b.txt": "It was the age of wisdom, it was the age of foolishness.",
    "en/notes/c.txt": "There were a king with a large jaw and a queen with a plain face.",
    "ru.txt": "Все счастливые семьи похожи друг на друга.",
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    for name, content in TEXTS.items():
        path = tmp_path / "heldout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return tmp_path / "heldout"


@pytest.fixture
def mine(run: Path, tmp_path: Path) -> Path:
    """A run of one's own to write results into: three stages of one block, context 32."""
    return shutil.copytree(run, tmp_path / "runs" / "tiny")


def by_name(records: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], Any]:
    return {
        (Path(r["checkpoint"]).name, r["task"], r["subset"], r["metric"]): r["value"]
        for r in records
    }


# --- what is scored ---


def test_a_run_means_every_stage(mine: Path, texts: Path) -> None:
    found = evaluate([mine], ["lm", "copy,brackets"], data=texts, limit=100)
    folders = [str(mine / "stages" / f"0{stage}") for stage in (1, 2, 3)]
    assert list(dict.fromkeys(record["checkpoint"] for record in found)) == folders
    subsets = ("en/notes", "en/novels", "all of en", "ru", "")
    scores = [("lm", s, m) for s in subsets for m in ("bits_per_byte", "perplexity")]
    scores += [("copy", "", "accuracy"), ("brackets", "", "accuracy")]
    for folder in folders:
        own = [record for record in found if record["checkpoint"] == folder]
        assert [(r["task"], r["subset"], r["metric"]) for r in own] == scores
        assert {record["fingerprint"] for record in own} == {results.fingerprint(Path(folder))}
    assert results.read(mine / "evaluations.jsonl") == found
    assert evaluate([mine / "stages" / "03", mine], ["copy"], limit=100)[0] == found[-2]


def test_scores_of_texts_are_those_by_hand(mine: Path, texts: Path) -> None:
    stage = mine / "stages" / "02"
    found = evaluate([stage], data=texts, context=16, stride=4)
    scores = language.score(
        checkpoint.load_model(stage), tokenizers.load(stage), list(TEXTS.values()),
        context=16, stride=4,
    )  # fmt: skip
    values = by_name(found)
    parts = {"en/novels": scores[:2], "all of en": scores[:3], "ru": scores[3:], "": scores}
    for subset, chosen in parts.items():
        nats = sum(score.nats for score in chosen)
        bits = nats / math.log(2) / sum(score.bytes for score in chosen)
        perplexity = math.exp(nats / sum(score.tokens for score in chosen))
        assert values["02", "lm", subset, "bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert values["02", "lm", subset, "perplexity"] == pytest.approx(perplexity, rel=1e-5)
    documents = language.read_documents(texts)
    for record in found:
        assert record["settings"] == {
            "texts": language.fingerprint(documents), "context": 16, "stride": 4,
        }  # fmt: skip
        assert record["chance"] is record["corrected"] is None
        assert (record["interval"] is None) == (record["n"] == 1)
    all_bits = next(r for r in found if (r["subset"], r["metric"]) == ("", "bits_per_byte"))
    interval = language.interval([scores[i] for i in (2, 0, 1, 3)])
    assert all_bits["interval"] == pytest.approx(interval, rel=1e-5)
    assert all_bits["interval"][0] < all_bits["value"] < all_bits["interval"][1]


def test_compositions_and_foreign_folders_are_scored(
    mine: Path, texts: Path, tmp_path: Path
) -> None:
    both, foreign = tmp_path / "both", tmp_path / "foreign"
    nacre.compose(
        [mine / "stages" / "01", mine / "stages" / "03"], both, "weighted", weights=[0, 1]
    )
    checkpoint.load_model(mine / "stages" / "03").save_pretrained(foreign)
    tokenizers.load(mine / "stages" / "03").save_pretrained(foreign)
    found = evaluate([both, foreign, mine / "stages" / "03"], ["lm,copy"], data=texts, limit=50)
    values = by_name(found)
    scores = sorted({key[1:] for key in values})
    assert len(scores) == 11
    for score in scores:
        same = [values[folder, *score] for folder in ("both", "foreign", "03")]
        assert same == pytest.approx([same[0]] * 3, rel=1e-5, abs=1e-4)
    assert results.read(both / "evaluations.jsonl") == found[:11]
    assert results.read(foreign / "evaluations.jsonl") == found[11:22]
    assert len({record["fingerprint"] for record in found}) == 3


def test_a_limit_counts_documents_of_a_domain_and_examples(mine: Path, texts: Path) -> None:
    found = evaluate([mine / "stages" / "01"], ["lm", "copy"], data=texts, limit=1)
    counts = {(r["task"], r["subset"]): r["n"] for r in found}
    assert counts == {
        ("lm", "en/notes"): 1, ("lm", "en/novels"): 1, ("lm", "all of en"): 2, ("lm", "ru"): 1,
        ("lm", ""): 3, ("copy", ""): 1,
    }  # fmt: skip


def test_the_context_is_the_models_up_to_2048(texts: Path, pico: Build) -> None:
    (task,) = tasks.prepare(["lm"], Options(data=texts))
    (chosen,) = tasks.prepare(["lm"], Options(data=texts, context=4000))
    config, tokenizer = pico("llama").config, tokenizers.build(TEXTS.values(), 512)
    assert task.settings(config, tokenizer) | {"texts": ""} == {
        "texts": "", "context": 32, "stride": 16,
    }  # fmt: skip
    config.max_position_embeddings = 8192
    assert task.settings(config, tokenizer)["context"] == 2048
    assert task.settings(config, tokenizer)["stride"] == 1024
    assert chosen.settings(config, tokenizer)["context"] == 4000


def test_bits_per_byte_are_those_of_lm_eval(tmp_path: Path) -> None:
    """The rolling log-likelihood of a stock model on texts that fit its window."""
    generator = np.random.default_rng(0)
    words = " ".join(TEXTS.values()).split()
    texts = [" ".join(generator.choice(words, size)) for size in (3, 20, 50)]
    texts += ["Ünïcode 🙂 水", "  two  spaces\n\nand lines\n"]
    tokenizer = tokenizers.build(TEXTS.values(), 512)
    model = stock.build(stock.gpt_neox_config(len(tokenizer), 64, 4, 256, 512, 2))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for number, text in enumerate(texts):
        path = tmp_path / "texts" / str(number) / "text.txt"
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer: Any = HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=2)
        requests = [
            Instance("loglikelihood_rolling", {}, (text,), number)  # pyright: ignore
            for number, text in enumerate(texts)
        ]
        nats = [-found for found in peer.loglikelihood_rolling(requests, disable_tqdm=True)]
    values = by_name(evaluate([tmp_path / "model"], data=tmp_path / "texts"))
    sizes = [len(text.encode()) for text in texts]
    expected = [n / math.log(2) / size for n, size in zip(nats, sizes, strict=True)]
    expected.append(sum(nats) / math.log(2) / sum(sizes))
    names = [str(number) for number in range(len(texts))] + [""]
    found = [values["model", "lm", name, "bits_per_byte"] for name in names]
    assert found == pytest.approx(expected, abs=1e-4)


# --- what was done ---


def spoil(run: Path) -> None:
    for shard in run.glob("stages/*/*.safetensors"):
        shard.unlink()
        shard.write_bytes(b"spoiled")


def test_what_was_done_is_read_and_no_weights(mine: Path, texts: Path) -> None:
    first = evaluate([mine], ["lm,copy"], data=texts, limit=20)
    kept = (mine / "evaluations.jsonl").read_bytes()
    spoil(mine)
    assert evaluate([mine], ["lm,copy"], data=texts, limit=20, context=32) == first
    assert evaluate([mine / "stages" / "02"], ["copy"], limit=20) == [first[21]]
    assert (mine / "evaluations.jsonl").read_bytes() == kept
    moved = mine.rename(mine.with_name("moved"))
    (record, *_) = evaluate([moved], ["copy"], limit=20)
    assert record["checkpoint"] == str(moved / "stages" / "01"), "where it is now"
    for other in ({"limit": 21}, {"limit": 20, "again": True}):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            evaluate([moved], ["copy"], **other)
    (texts / "ru.txt").write_text("Другой текст.", encoding="utf-8")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        evaluate([moved], data=texts, limit=20)
    assert (moved / "evaluations.jsonl").read_bytes() == kept


def test_only_what_is_new_is_run(mine: Path, texts: Path, tmp_path: Path) -> None:
    watch, out = Watch(), tmp_path / "results.jsonl"
    stage = mine / "stages" / "01"
    evaluate([stage], ["copy"], limit=20, out=out)
    evaluate([stage], ["copy,induction"], limit=20, out=out, observer=watch)
    assert watch.phases == [[f"{stage}: induction", 20, 20]]
    assert watch.notes == [f"{stage}: done before, not run again: copy ({out})"]
    assert [record["task"] for record in results.read(out)] == ["copy", "induction"]
    evaluate([stage], ["copy"], limit=20, out=out, again=True)
    assert [record["task"] for record in results.read(out)] == ["copy", "induction", "copy"]
    assert not (mine / "evaluations.jsonl").exists()


def test_what_was_done_is_kept_where_a_later_one_fails(mine: Path) -> None:
    for shard in (mine / "stages" / "03").glob("*.safetensors"):
        shard.unlink()
        shard.write_bytes(b"spoiled")
    with pytest.raises(CheckpointError, match="03: cannot be loaded"):
        evaluate([mine], ["copy"], limit=20)
    assert len(results.read(mine / "evaluations.jsonl")) == 2


class Watch(Observer):
    """Remembers notes, and phases with what was counted in each."""

    def __init__(self) -> None:
        self.phases: list[list[Any]] = []
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    warn = note

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append([title, total, 0])

    def advance(self, units: int) -> None:
        self.phases[-1][2] += units


def test_progress_is_counted(mine: Path, texts: Path) -> None:
    watch, stage = Watch(), mine / "stages" / "01"
    evaluate([stage], ["lm,copy"], data=texts, limit=30, observer=watch)
    tokens = sum(map(len, language.encode(tokenizers.load(stage), list(TEXTS.values()))))
    assert watch.phases == [[f"{stage}: lm", tokens, tokens], [f"{stage}: copy", 30, 30]]


def test_one_model_is_in_memory_at_a_time(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Any]] = []
    load: Callable[..., PreTrainedModel] = composition.load_any

    def loading(folder: Path) -> PreTrainedModel:
        assert not any(model() for model in seen)
        model = load(folder)
        seen.append(weakref.ref(model))
        return model

    monkeypatch.setattr(composition, "load_any", loading)
    evaluate([mine], ["copy,modular"], limit=5)
    assert len(seen) == 3


# --- which tasks ---


def test_families_and_names_and_what_is_the_default(texts: Path) -> None:
    def named(*asked: str, **options: Any) -> list[str]:
        return [task.name for task in tasks.prepare(asked, Options(**options))]

    every = ["copy", "induction", *(f"khop-{hops}" for hops in range(1, 7)), "brackets", "modular"]
    assert named() == named("probes") == every
    assert named(data=texts) == ["lm"]
    assert named("copy, lm", "probes", "copy", data=texts)[:3] == ["copy", "lm", "induction"]
    assert list(FAMILIES) == ["lm", "probes", "benchmarks", "translation", "paper"]


def test_benchmarks_of_a_folder_are_tasks(mine: Path, texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    (folder / "blimp").mkdir(parents=True)
    pairs = [{"sentence_good": f"It was {w}.", "sentence_bad": f"{w} was It."} for w in "abcd"]
    (folder / "blimp" / "order.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rows = [f"What is {word}?,a,b,c,d,{word.upper()}" for word in "abcd"]
    (folder / "anatomy_test.csv").write_text("\n".join(rows))

    def named(*asked: str, **options: Any) -> list[str]:
        return [task.name for task in tasks.prepare(asked, Options(data_dir=folder, **options))]

    assert named() == named("benchmarks") == ["blimp", "mmlu"]
    assert named(data=texts) == ["lm", "blimp", "mmlu"]
    assert named("mmlu,copy") == ["mmlu", "copy"]
    watch, stage = Watch(), mine / "stages" / "02"
    found = evaluate([stage], ["blimp", "mmlu"], data_dir=folder, limit=3, observer=watch)
    assert watch.phases == [[f"{stage}: blimp", 3, 3], [f"{stage}: mmlu", 3, 3]]
    assert watch.notes == [
        f"{stage}: 12 of 12 requests of mmlu are longer than the context of 32 tokens: their "
        "beginning was cut off"
    ]
    parts = [(r["task"], r["subset"], r["metric"], r["n"], r["chance"]) for r in found]
    assert parts == [
        ("blimp", "", "acc", 3, 0.5), ("blimp", "order", "acc", 3, 0.5),
        ("mmlu", "", "acc", 3, 0.25), ("mmlu", "anatomy", "acc", 3, 0.25),
    ]  # fmt: skip
    for record in found:
        low, high = record["interval"]
        assert low <= record["value"] <= high
        assert record["corrected"] == pytest.approx(
            (record["value"] - record["chance"]) / (1 - record["chance"])
        )
        assert record["settings"].keys() == {"questions", "limit"}
    spoil(mine)
    assert evaluate([stage], ["mmlu"], data_dir=folder, limit=3) == found[2:]
    for change in ({"limit": 2}, {"limit": 3}):
        with pytest.raises(CheckpointError, match="cannot be loaded"):
            evaluate([stage], ["mmlu"], data_dir=folder, **change)
        (folder / "anatomy_test.csv").write_text("\n".join(reversed(rows)))


def test_benchmarks_that_cannot_be_scored(mine: Path, tmp_path: Path) -> None:
    path = tmp_path / "bench" / "anatomy_test.csv"
    path.parent.mkdir()
    path.write_text("What?,a,b,c,d,A\nWho?,a\n")
    spoil(mine)  # nothing is loaded

    def wrong(*asked: str, **options: Any) -> str:
        return refused(NacreError, [mine], asked, **options)

    assert wrong("benchmarks") == (
        "--tasks benchmarks: needs files of questions (name their folder with --data-dir)"
    )
    assert wrong("copy", data_dir=path.parent) == (
        "--data-dir: no task of copy reads it (add benchmarks or translation or paper to --tasks)"
    )
    assert wrong("arc_easy", "mmlu", data_dir=path.parent) == (
        f"--tasks: {path.parent} holds no arc_easy (leave --data-dir out to fetch what lm-eval "
        "knows)"
    )
    assert wrong(data_dir=path.parent).startswith(f"{path}, line 2: it has 2 fields; ")
    assert wrong(data_dir=path).startswith(f"{path}: is no folder; ")
    (tmp_path / "empty").mkdir()
    assert wrong(data_dir=tmp_path / "empty") == (
        f"{tmp_path / 'empty'}: holds no benchmark that nacre knows; keep the files' original "
        "names (dev-v1.1.json, anatomy_test.csv, ARC-Easy-Test.jsonl, blimp/*.jsonl, en-ru.tsv; "
        "all are in docs/evaluation.md)"
    )
    path.write_text("What?,a,b,c,d,A\n")
    words = json.dumps({"text": f"It was {'the-best-of-times-' * 20}"})
    (path.parent / "lambada_test.jsonl").write_text(words)
    stage = mine / "stages" / "01"
    assert wrong(data_dir=path.parent).startswith(
        f"{stage}: lambada_openai: an answer in {path.parent / 'lambada_test.jsonl'}, line 1 is "
    )


def refused(error: type[NacreError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        evaluate(*arguments, **options)
    return str(caught.value)


def test_tasks_and_options_that_do_not_exist_or_fit(mine: Path, texts: Path) -> None:
    def wrong(*asked: str, **options: Any) -> str:
        return refused(ConfigError, [mine], asked, **options)

    assert wrong("khop2") == "--tasks: there is no task 'khop2' (did you mean 'khop-2'?)"
    assert wrong("lm") == "--tasks lm: needs texts (name their folder with --data)"
    assert wrong("copy", data=texts, stride=3) == (
        "2 problems\n"
        "  - --data: no task of copy reads it (add lm to --tasks)\n"
        "  - --stride: no task of copy reads it (add lm to --tasks)"
    )
    assert wrong("copy", limit=0) == "--limit: 0 is not 1 or more (leave it out)"
    stage = mine / "stages" / "01"
    assert wrong(data=texts, context=33, stride=40) == (
        f"{stage}: context: 33 is not 1 to 32 (leave it out for the model's own)"
    )
    said = wrong()
    assert said.startswith(f"{stage}: 5 problems\n  - khop-2: reads 35 tokens before an answer, ")
    assert "  - khop-6: reads 99 tokens before an answer, the model at most 32 (leave it" in said
    assert not (mine / "evaluations.jsonl").exists()


def test_texts_that_cannot_be_read(mine: Path, tmp_path: Path) -> None:
    none = tmp_path / "none"
    assert refused(DataError, [mine], data=none).startswith(f"{none}: there is no such folder; ")


def test_checkpoints_that_are_none(mine: Path, tmp_path: Path, pico: Build) -> None:
    def wrong(*checkpoints: Path) -> str:
        return refused(CheckpointError, [mine, *checkpoints], ["copy"])

    assert refused(ConfigError, [], ["copy"]) == (
        "checkpoints: there are none (name stages, runs, compositions or Hugging Face folders)"
    )
    assert wrong(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    assert wrong(tmp_path) == f"{tmp_path}: holds no model (config.json is missing)"
    begun, pickled = tmp_path / "begun", tmp_path / "pickled"
    begun.mkdir()
    shutil.copy(mine / "plan.yaml", begun)
    assert wrong(begun).startswith(f"{begun}: this run has no finished stage yet; ")
    pico("llama").save_pretrained(pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert wrong(pickled) == (
        f"{pickled}: holds no weights in safetensors; save it again with safe serialization"
    )
    assert not (mine / "evaluations.jsonl").exists(), "everything is checked first"


def test_a_stage_with_another_tokenizer(mine: Path) -> None:
    stage = mine / "stages" / "01"
    before = tokenizers.fingerprint(tokenizers.load(stage))
    tokenizers.build(["another text"], 600).save_pretrained(stage)
    found = tokenizers.fingerprint(tokenizers.load(stage))
    assert refused(FingerprintError, [stage], ["copy"]) == (
        f"the tokenizer in {stage} does not match: expected {before[:12]} (stage.json), found "
        f"{found[:12]} (restore the tokenizer's files in {stage})"
    )


def test_files_for_results_that_cannot_be(mine: Path, tmp_path: Path) -> None:
    def wrong(out: Path) -> str:
        return refused(ConfigError, [mine], ["copy"], out=out)

    fix = "(name a file in a folder of your own)"
    assert wrong(tmp_path) == f"--out: {tmp_path} is a folder {fix}"
    gone = tmp_path / "gone" / "x.jsonl"
    assert wrong(gone) == f"--out: there is no folder {gone.parent} {fix}"
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text("{\n")
    assert "damaged.jsonl, line 1: damaged" in refused(
        CheckpointError, [mine], ["copy"], out=damaged
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to(mine: Path) -> None:
    mine.chmod(0o500)
    said = refused(ConfigError, [mine], ["copy"])
    mine.chmod(0o700)
    assert said.startswith(f"--out: {mine} cannot be written to (name a file in a folder")


def test_a_model_without_finite_scores(mine: Path, texts: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    model: Any = checkpoint.load_model(mine / "stages" / "01")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained(broken)
    tokenizers.load(mine / "stages" / "01").save_pretrained(broken)
    said = refused(CheckpointError, [broken], data=texts)
    assert said.startswith(f"{broken} gives no finite likelihood for {texts}")
    assert refused(CheckpointError, [broken], ["copy"]).startswith(
        f"{broken} gives no likelihood for copy (nan): "
    )
    assert not (broken / "evaluations.jsonl").exists()


# --- the command line ---


def test_the_command_shows_a_table_and_says_what_was_done(
    command: Command, mine: Path, texts: Path
) -> None:
    arguments = ("eval", mine, "--tasks", "lm", "--tasks", "copy", "--data", texts, "--limit", 20)
    code, out, err = command(*map(str, arguments))
    assert code == 0, err
    assert f"{mine / 'stages' / '02'}: copy ..." in err
    lines = [line.strip() for line in out.splitlines()]
    assert next(line for line in lines if line).split() == [
        "score", "n", "chance", "01", "02", "03",
    ]  # fmt: skip
    values = by_name(evaluate([mine], ["lm,copy"], data=texts, limit=20))
    shown = [f"{values[stage, 'lm', '', 'bits_per_byte']:.3f}" for stage in ("01", "02", "03")]
    assert f"lm bits per byte 4 {' '.join(shown)}" in [" ".join(line.split()) for line in lines]
    assert any(line.startswith("copy accuracy") and " 0.100 " in line for line in lines)
    code, again, err = command(*map(str, arguments))
    assert (code, again) == (0, out)
    kept = mine / "evaluations.jsonl"
    assert f"{mine / 'stages' / '03'}: done before, not run again: lm, copy ({kept})\n" in err
    code, printed, err = command(*map(str, arguments), "--json", "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(printed) == {"results": results.read(kept)}
    assert command(*map(str, arguments), "--again", "--quiet")[0] == 0
    assert len(results.read(kept)) == 2 * 33


def test_mistakes_are_one_message(command: Command, mine: Path) -> None:
    code, out, err = command("eval", str(mine), "--tasks", "cpoy")
    assert (code, out) == (2, "")
    assert err == "error: --tasks: there is no task 'cpoy' (did you mean 'copy'?)\n"


def test_columns_are_called_by_the_end_of_their_paths_that_differs() -> None:
    folders = ["runs/a/stages/01", "runs/b/stages/01", "runs/b/stages/02", "/x/both", "both"]
    assert [short_name(folder, folders) for folder in folders] == [
        "a/stages/01", "b/stages/01", "02", "x/both", "both",
    ]  # fmt: skip


def test_the_public_name() -> None:
    assert nacre.evaluate_checkpoints is evaluate
