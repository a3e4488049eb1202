"""Who lost what: a composition beside its experts, in the record, the card and the command."""

from __future__ import annotations

import io
import json
import math
import shutil
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command
from rich.console import Console
from safetensors.torch import load_file, save_file

import nacre
from nacre import composition, tables
from nacre import tokenizer as tokenizers
from nacre.composition.card import card, report_cells
from nacre.errors import CheckpointError, FingerprintError, NacreError
from nacre.evaluate import experts, language
from nacre.models import stock
from nacre.train import checkpoint, files
from nacre.train.observer import Observer

WORDS = {
    "en": "it was the best of times and worst age wisdom foolishness",
    "ru": "это было лучшее из всех времён и самое злосчастное век мудрости",
}
CONTEXT = 32


def text(language: str, seed: int, words: int = 12) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS[language].split(), words))


@dataclass
class Place:
    """Two experts that know their own language, and texts they have not seen."""

    en: Path
    ru: Path
    texts: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("experts")
    corpus = {name: "\n".join(text(name, seed) for seed in range(1000, 1200)) for name in WORDS}
    tokenizer = tokenizers.build(corpus.values(), 512)
    for number, name in enumerate(WORDS):
        torch.manual_seed(number)
        model = stock.build(stock.gpt_neox_config(len(tokenizer), 32, 2, 64, CONTEXT, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        ids = torch.tensor(language.encode(tokenizer, [corpus[name]])[0])
        ids = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        for step in range(30):
            batch = ids[step % 4 :: 4]
            loss: Any = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for seed in range(6):
        for name in WORDS:
            write(root / "texts" / name / "novels" / f"{seed}.txt", text(name, seed))
        half = f"{text('en', seed, 16)} {text('ru', seed, 16)}"
        write(root / "texts" / "en" / "with-ru" / f"{seed}.txt", half)
    return Place(root / "en", root / "ru", root / "texts")


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def compared(made: Place, out: Path, *rule: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """Compose both experts; return the rows of what `compare` finds, by kind and name."""
    nacre.compose([made.en, made.ru], out, *rule, **options)
    report = experts.compare(out, language.read_documents(made.texts))
    return {f"{row['kind']} {row['name']}": row for row in report["rows"]}


def test_rows_are_domains_languages_of_several_and_all_texts(made: Place, tmp_path: Path) -> None:
    rows = compared(made, tmp_path / "out")
    assert list(rows) == [
        "domain en/novels", "domain en/with-ru", "language en", "domain ru/novels", "all all texts",
    ]  # fmt: skip
    assert [row["documents"] for row in rows.values()] == [6, 6, 12, 6, 18]
    sizes = {path: len(path.read_bytes()) for path in made.texts.rglob("*.txt")}
    assert rows["all all texts"]["bytes"] == sum(sizes.values())
    assert rows["language en"]["bytes"] == sum(
        size for path, size in sizes.items() if path.is_relative_to(made.texts / "en")
    )
    for key in ("bytes", "documents"):
        assert rows["language en"][key] == (
            rows["domain en/novels"][key] + rows["domain en/with-ru"][key]
        )


def test_scores_are_those_of_every_model_by_hand(made: Place, tmp_path: Path) -> None:
    rows = compared(made, tmp_path / "out", "mean-logits")
    tokenizer = tokenizers.load(made.en)
    models = [checkpoint.load_model(path).eval() for path in (made.en, made.ru)]
    nats, size = np.zeros(3), 0
    for path in sorted((made.texts / "ru" / "novels").iterdir()):
        document = path.read_text(encoding="utf-8")
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(document).input_ids]])
        assert ids.shape[1] <= CONTEXT
        with torch.no_grad():
            z_en, z_ru = (model(input_ids=ids[:, :-1]).logits[0].double() for model in models)
        for index, logits in enumerate((z_en, z_ru, (z_en + z_ru) / 2)):
            nats[index] -= logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item()
        size += len(document.encode())
    row = rows["domain ru/novels"]
    en, ru, mean = (nats / size / math.log(2)).tolist()
    assert row["experts"] == pytest.approx({"en": en, "ru": ru}, abs=1e-5)
    assert row["composition"] == pytest.approx(mean, abs=1e-5)
    assert row["difference"] == pytest.approx(mean - ru, abs=1e-5)
    assert row["best"] == "ru"


def test_every_model_is_scored_on_the_device_that_evaluation_uses(
    made: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[str] = []

    def score(model: Any, _: Any, texts: list[str], **options: Any) -> list[Any]:
        devices.append(model.device.type)
        return [language.DocumentScore(1.0, 1, len(text)) for text in texts]

    monkeypatch.setattr(language, "score", score)
    monkeypatch.setattr(composition, "default_device", lambda: torch.device("meta"))
    compared(made, tmp_path / "out")
    assert devices == ["meta"] * 3


def test_a_composition_that_is_worse_is_called_so(made: Place, tmp_path: Path) -> None:
    """The mean of the logits of one that knows a text and one that does not."""
    out = tmp_path / "out"
    rows = compared(made, out, "mean-logits")
    for language_ in WORDS:
        row = rows[f"domain {language_}/novels"]
        assert row["outcome"] == "worse"
        low, high = row["interval"]
        assert 0.1 < low < row["difference"] < high
        assert row["verdict"] == (
            f"worse than its best expert ({language_}): {row['difference']:.3f} bits per byte more "
            f"({low:.3f} to {high:.3f})"
        )
    report = experts.compare(out, language.read_documents(made.texts))
    experts.write_report(out, report)
    said = (out / "README.md").read_text()
    assert "## Who lost what\n" in said
    assert "The composition is worse on:\n\n- en/novels: worse than its best expert (en): " in said
    row = rows["domain ru/novels"]
    cells = [row["composition"], row["experts"]["en"], row["experts"]["ru"]]
    shown = " | ".join(f"{bits:.3f}" for bits in cells)
    assert f"| ru/novels | 6 | {shown} | {row['difference']:+.3f} | +" in said
    assert "| all of en | 12 | " in said


def test_a_composition_that_is_nowhere_worse_is_called_so(made: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([made.en, made.ru], out, "weighted", weights=[1, 0])
    documents = [d for d in language.read_documents(made.texts) if d.domain == "en/novels"]
    report = experts.compare(out, documents)
    assert [row["difference"] for row in report["rows"]] == pytest.approx([0, 0], abs=1e-6)
    verdict = "as good as its best expert (en): less than 0.0005 bits per byte apart"
    assert {row["verdict"] for row in report["rows"]} == {verdict}
    experts.write_report(out, report)
    said = (out / "README.md").read_text()
    assert "On none of these texts is the composition worse than the best expert there.\n" in said
    assert "worse on:" not in said


def test_a_composition_is_better_where_no_expert_knows_all(made: Place, tmp_path: Path) -> None:
    row = compared(made, tmp_path / "out", "posterior", decay=0.8)["domain en/with-ru"]
    assert row["outcome"] == "better"
    low, high = row["interval"]
    assert low < row["difference"] < high < 0
    assert row["verdict"] == (
        f"better than its best expert ({row['best']}) by {-row['difference']:.3f} bits per byte "
        f"({-high:.3f} to {-low:.3f})"
    )


def test_a_table_of_three_experts_fits_80_columns_uncut() -> None:
    row = {
        "documents": 1234, "composition": 1.8, "experts": dict.fromkeys(("en", "ru", "code"), 1.85),
        "difference": -0.05, "interval": [-0.06, -0.04],
    }  # fmt: skip
    kinds = [("domain", "en/novels"), ("language", "en"), ("all", "all texts")]
    cells = report_cells({"rows": [{"kind": kind, "name": name} | row for kind, name in kinds]})
    out = io.StringIO()
    Console(file=out, width=80).print(tables.named_rows(cells))
    assert "all of en 1,234 1.800 1.850 1.850 1.850     -0.050 -0.060 to -0.040" in out.getvalue()


@pytest.mark.parametrize(
    ("difference", "interval", "outcome", "sentence"),
    [
        (0.0123, (0.0081, 0.016), "worse",
         "worse than its best expert (en): 0.012 bits per byte more (0.008 to 0.016)"),
        (-0.031, (-0.04, -0.02), "better",
         "better than its best expert (en) by 0.031 bits per byte (0.020 to 0.040)"),
        (0.01, (-0.002, 0.03), "as good",
         "as good as its best expert (en) within the interval: +0.010 bits per byte, "
         "-0.002 to +0.030"),
        (0.0004, (0.0003, 0.0005), "as good",
         "as good as its best expert (en): less than 0.0005 bits per byte apart"),
        (0.2, None, "worse",
         "worse than its best expert (en): 0.200 bits per byte more (one document: no interval)"),
        (-0.2, None, "better",
         "better than its best expert (en) by 0.200 bits per byte (one document: no interval)"),
    ],
)  # fmt: skip
def test_verdicts(
    difference: float, interval: tuple[float, float] | None, outcome: str, sentence: str
) -> None:
    assert experts.verdict("en", difference, interval) == (outcome, sentence)


def test_one_document_has_no_interval(made: Place, tmp_path: Path) -> None:
    nacre.compose([made.en, made.ru], tmp_path / "out", "mean-logits")
    (row, _) = experts.compare(
        tmp_path / "out", [language.EvalDocument(text("en", 3), "en", "here")]
    )["rows"]
    assert row["interval"] is None
    assert row["verdict"].endswith("(one document: no interval)")


def test_names_with_a_bar_do_not_break_the_table(made: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([made.en, made.ru], out, names=["a|b", "texts"])
    report = experts.compare(out, [language.EvalDocument(text("en", 3), "x|y", "here")])
    said = card(experts.write_report(out, report))
    assert "| texts | count | mixed | a\\|b | texts | difference | 95% interval |" in said
    assert "\n| x\\|y | 1 | " in said


class Watch(Observer):
    """Remembers phases and what was counted in each."""

    def __init__(self) -> None:
        self.phases: list[list[Any]] = []

    def phase(self, title: str, total: int | None = None) -> None:
        self.phases.append([title, total, 0])

    def advance(self, units: int) -> None:
        self.phases[-1][2] += units


def test_the_report_and_its_progress(made: Place, tmp_path: Path) -> None:
    out, watch = tmp_path / "out", Watch()
    before = nacre.compose([made.en, made.ru], out)
    documents = language.read_documents(made.texts)
    report = experts.compare(out, documents, watch)
    assert report["texts"] == language.fingerprint(documents)
    assert report["settings"] == {"context": CONTEXT, "stride": 16, "resamples": 2000}
    tokenizer = tokenizers.load(out)
    tokens = sum(len(tokenizer(d.text).input_ids) for d in documents)
    titles = ["Score the composition", "Score expert en", "Score expert ru"]
    assert watch.phases == [[title, tokens, tokens] for title in titles]
    assert experts.write_report(out, report) == before | {"report": report}
    assert json.loads((out / "composition.json").read_text()) == before | {"report": report}
    assert composition.read_record(out)["report"] == report
    assert not list(out.glob(".*")), "nothing is left under a temporary name"
    again = experts.compare(out, documents)
    assert again == report


def test_bundles_are_compared_alike(made: Place, tmp_path: Path) -> None:
    documents = language.read_documents(made.texts)
    nacre.compose([made.en, made.ru], tmp_path / "one")
    nacre.compose([made.en, made.ru], tmp_path / "two", bundle=True)
    one, two = (experts.compare(tmp_path / name, documents) for name in ("one", "two"))
    assert one == two


def test_one_model_is_in_memory_at_a_time(
    made: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nacre.compose([made.en, made.ru], tmp_path / "out")
    seen: list[weakref.ref[Any]] = []

    def watched(load: Callable[..., Any]) -> Callable[..., Any]:
        def loading(*arguments: Any) -> Any:
            assert not any(model() for model in seen)
            model = load(*arguments)
            seen.append(weakref.ref(model))
            return model

        return loading

    monkeypatch.setattr(checkpoint, "load_model", watched(checkpoint.load_model))
    monkeypatch.setattr(composition, "load", watched(composition.load))
    experts.compare(tmp_path / "out", language.read_documents(made.texts))
    assert len(seen) == 3


# --- refusals ---


def refused(error: type[NacreError], folder: Path) -> str:
    with pytest.raises(error) as caught:
        experts.compare(folder, [language.EvalDocument("It was", "en", "here, line 1")])
    return str(caught.value)


def test_folders_that_cannot_be_compared(made: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refused(CheckpointError, made.en) == (
        f"{made.en}: holds no composition (composition.json is missing); "
        "name the folder of a composition, or make one with `nacre compose`"
    )
    shutil.copytree(made.en, tmp_path / "en")
    nacre.compose([tmp_path / "en", made.ru], out)
    shutil.rmtree(tmp_path / "en")
    assert "expert 'en' is not in" in refused(CheckpointError, out)
    (out / "composition.json").write_text('{"mix": {"name": "posterior"}}')
    assert refused(CheckpointError, out) == (
        f"{out / 'composition.json'}: damaged: lacks 'experts'; compose again"
    )


def test_a_damaged_report_is_refused(made: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([made.en, made.ru], out)
    report = experts.compare(out, [language.EvalDocument(text("en", 3), "en", "here")])
    row = report["rows"][0]
    for damage, said in [
        ({"rows": []}, "'report.rows': list should have at least 1 item"),
        (
            {"rows": [row | {"outcome": "lost"}]},
            "'report.rows.0.outcome': input should be 'better'",
        ),
        ({"rows": [row | {"interval": [0.1]}]}, "'report.rows.0.interval': list should have at"),
        ({"rows": [row | {"experts": {"en": 1.0}}]}, "its report is of other experts"),
        ({"settings": {"context": 32}}, "lacks 'report.settings.stride'"),
    ]:
        record = experts.write_report(out, report)
        files.write_json(out / "composition.json", record | {"report": report | damage})
        with pytest.raises(CheckpointError) as caught:
            composition.read_record(out)
        assert str(caught.value).startswith(f"{out / 'composition.json'}: damaged: {said}")
        files.write_json(out / "composition.json", record)


def test_an_expert_that_changed_is_refused(tmp_path: Path, run: Path) -> None:
    stage = checkpoint.newest(run)
    shutil.copytree(stage, tmp_path / "one")
    shutil.copytree(Path(stage).with_name("01"), tmp_path / "two")
    nacre.compose([tmp_path / "one", tmp_path / "two"], tmp_path / "out")
    record = tmp_path / "one" / "stage.json"
    record.write_text(record.read_text().replace(files.read_json(record)["fingerprint"], "f"))
    assert "expert 'one' of" in refused(FingerprintError, tmp_path / "out")


def test_an_expert_without_finite_scores_is_named(made: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(made.ru, tmp_path / "ru")
    shard = tmp_path / "ru" / "model.safetensors"
    tensors = load_file(shard)
    (head,) = (name for name in tensors if name.startswith(("embed_out", "lm_head")))
    save_file(tensors | {head: tensors[head] * math.nan}, shard, {"format": "pt"})
    nacre.compose([made.en, tmp_path / "ru"], out)
    assert refused(CheckpointError, out) == (
        f"{out}: expert ru gives no finite likelihood for here, line 1 (nan nats): it diverged in "
        "training or its weights are damaged; make it again"
    )


# --- the command line ---


def test_a_report_of_a_composition_that_is_there(
    command: Command, made: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nacre.compose([made.en, made.ru], out, "mean-logits")
    code, printed, said = command("compose", "--report", made.texts, out)
    assert code == 0, said
    assert printed == ""
    assert "Score expert en" in said
    assert "en, ru: mixed by mean-logits" in said
    row = next(
        r for r in composition.read_record(out)["report"]["rows"] if r["name"] == "ru/novels"
    )
    assert f"\nru/novels: {row['verdict']}\n" in said
    line = next(line for line in said.splitlines() if line.strip().startswith("ru/novels  "))
    assert line.split()[:4] == ["ru/novels", "6", f"{row['composition']:.3f}",
                                f"{row['experts']['en']:.3f}"]  # fmt: skip
    assert "nacre generate" in said


def test_a_report_with_a_new_composition_as_json(
    command: Command, made: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, _ = command(
        "compose", made.en, made.ru, "--out", out, "--report", made.texts, "--json"
    )
    assert code == 0
    record = json.loads(printed)
    assert record.pop("composition") == str(out)
    assert record == json.loads((out / "composition.json").read_text())
    documents = language.read_documents(made.texts)
    assert record["report"] == experts.compare(out, documents)


def test_a_change_drops_an_old_report_unless_it_makes_a_new_one(
    command: Command, made: Place, tmp_path: Path
) -> None:
    out, third = tmp_path / "out", tmp_path / "third"
    shutil.copytree(made.ru, third)
    assert command("compose", made.en, made.ru, "--out", out, "--report", made.texts)[0] == 0
    assert command("compose", "--add", third, out)[0] == 0
    assert "report" not in composition.read_record(out)
    assert "Who lost what" not in (out / "README.md").read_text()
    code, _, said = command("compose", "--remove", "ru", out, "--report", made.texts)
    assert code == 0, said
    (row, *_) = composition.read_record(out)["report"]["rows"]
    assert list(row["experts"]) == ["en", "third"]
    code, _, said = command("compose", "--add", made.ru, out, "--report", made.texts)
    assert code == 0, said
    (row, *_) = composition.read_record(out)["report"]["rows"]
    assert list(row["experts"]) == ["en", "third", "ru"]


def test_texts_are_checked_before_anything_is_written(
    command: Command, made: Place, tmp_path: Path
) -> None:
    out, none = tmp_path / "out", tmp_path / "none"
    code, _, said = command("compose", made.en, made.ru, "--out", out, "--report", none)
    assert code == 2
    assert f"{none}: there is no such folder; name one that holds" in said
    assert not out.exists()
    nacre.compose([made.en, made.ru], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for change in (("--remove", "ru"), ("--add", made.ru), ()):
        assert command("compose", *change, out, "--report", none)[0] == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_options_that_do_not_go_with_a_report_alone(
    command: Command, made: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nacre.compose([made.en, made.ru], out)
    code, _, said = command(
        "compose", out, "--report", made.texts, "--mix", "entropy", "--name", "x"
    )
    assert code == 2
    assert "--mix: does not go with --report alone (compose anew for that)" in said
    assert "--name: does not go with --report alone (compose anew for that)" in said
    code, _, said = command("compose", made.en, made.ru, "--report", made.texts)
    assert code == 2
    assert "--out: where to? (name a new folder)" in said
    code, _, said = command("compose", made.en, "--report", made.texts)
    assert code == 2
    assert "holds no composition (composition.json is missing)" in said
