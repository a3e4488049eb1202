"""The report: tables equal the records, the page stands alone, unfinished and damaged runs."""

from __future__ import annotations

import csv
import hashlib
import html
import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from nacre import report
from nacre.errors import CheckpointError
from nacre.report.canvas import LIGHT
from nacre.report.charts import draw_bits, draw_loss, draw_resources, smooth
from nacre.report.page import chain
from nacre.train.files import write_json

PNG = b"\x89PNG\r\n\x1a\n"
CHARTS = ["bits-per-byte.png", "loss.png", "resources.png"]
TABLES = ["ledger.csv", "ledger.tex", "stages.csv", "stages.tex"]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class RunBuilder:
    """Writes the files of a run as training does, with the numbers of a small real one."""

    def __init__(self, path: Path, stages: int = 3, steps: int = 40, lora: int | None = 3) -> None:
        self.path, self.steps, self.lora = path, steps, lora
        self.batch = 8192
        self.records: list[dict[str, Any]] = []
        self.random = np.random.default_rng(0)
        path.mkdir(parents=True)
        self.plan = {
            "name": "small <english> & co",
            "seed": 0,
            "from": None,
            "stages": [
                {
                    "add_blocks": 3,
                    "tokens": steps * self.batch,
                    "lora": {"rank": 8, "alpha": 16.0} if stage == lora else None,
                }
                for stage in range(1, stages + 1)
            ],
        }
        self.write_plan()
        run = {
            "name": self.plan["name"],
            "seed": 0,
            "plan": digest("plan"),
            "versions": {"nacre": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
            "machine": {
                "system": "Linux-6.1",
                "processor": "AMD EPYC",
                "device": "cpu",
                "accelerator": None,
                "threads": 2,
            },
            "fingerprints": {
                "tokenizer": digest("tokenizer"),
                "corpora": {"default": digest("corpus")},
                "substrate": digest("substrate"),
            },
        }
        (path / "run.json").write_text(json.dumps(run))

    def write_plan(self) -> None:
        (self.path / "plan.yaml").write_text(yaml.safe_dump(self.plan, sort_keys=False))

    def log(self, line: dict[str, Any]) -> None:
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def scores(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "perplexity": float(np.exp(loss)), "bits_per_byte": loss / 2.42}

    def loss(self, stage: int, part: float) -> float:
        floor = 3.3 + 1.1 / stage
        start = 8.32 if stage == 1 else floor + 0.35
        return floor + (start - floor) * float(np.exp(-part * (9 if stage == 1 else 4)))

    def train(self, stage: int, steps: int | None = None) -> None:
        every = max(1, self.steps // 10)
        for step in range((self.steps if steps is None else steps) + 1):
            loss, tokens = self.loss(stage, step / self.steps), step * self.batch
            if step:
                noise = float(self.random.normal(0, 0.08))
                self.log(
                    {"stage": stage, "loss": loss + noise - 0.03, "lr": 1e-3, "grad_norm": 0.4}
                    | {"step": step, "tokens": tokens, "tokens_per_second": 21000.0}
                )
            if step % every == 0 and step < self.steps:
                scores = self.scores(loss)
                self.log({"stage": stage, "step": step, "tokens": tokens, "validation": scores})

    def finish(self, stage: int) -> dict[str, Any]:
        """Train a stage to its end and write its record."""
        self.train(stage)
        depth = 3 * stage
        below = self.records[-1] if self.records else None
        frozen = below["frozen"] | below["weights"] if below else {"embed": digest("substrate")}
        frozen = {name: value for name, value in frozen.items() if name != "head"}
        blocks = [f"layers.{i}.weight" for i in range(depth - 3, depth)]
        adapters: list[str] = []
        merge = None
        if stage == self.lora:
            adapters = [f"layers.{i}.lora_{x}" for i in range(depth - 3) for x in "AB"]
            frozen = {"embed": digest("substrate")}
            merge = {
                "largest_logit_difference": 1.9e-06,
                "loss_before": 3.9,
                "loss_after": 3.9,
                "adapters": len(adapters) // 2,
                "loss_difference": 2.4e-07,
            }
        weights = {name: digest(name) for name in blocks} | {"head": digest(f"head {stage}")}
        if merge:
            weights |= {f"layers.{i}.weight": digest(f"merged {i}") for i in range(depth - 3)}
        record = {
            "stage": stage,
            "depth": depth,
            "new_blocks": 3,
            "active_parameters": 3_412_992 + (200_000 if merge else 0),
            "total_parameters": 2_097_152 + 2_364_416 * stage,
            "tokens": self.steps * self.batch,
            "seconds": 71.25 + 9 * stage,
            "tokens_per_second": 21_345.6 - 900 * stage,
            "peak_memory_bytes": 812_345_344 + 61_000_000 * stage,
            "trunk_mode": "whole" if merge else "recompute",
            "validation": self.scores(self.loss(stage, 1.0)),
            "trainable": [*blocks, "head", *adapters],
            "frozen": frozen,
            "weights": weights,
            "lora": {"rank": 8, "alpha": 16.0, "merge": merge} if merge else None,
            "parent": below["fingerprint"] if below else None,
            "fingerprint": digest(f"stage {stage}"),
        }
        folder = self.path / "stages" / f"{stage:02d}"
        folder.mkdir(parents=True)
        record |= {"growth": []}
        write_json(folder / "stage.json", record)
        write_json(folder / "config.json", {"num_hidden_layers": record["depth"]})
        self.records.append(record)
        return record


class Page(HTMLParser):
    """What a page loads, and the text of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [v for k, v in attrs if k in ("src", "srcset", "href", "data") and v]
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        self.cell = tag in ("td", "th") or (self.cell and tag == "code")
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.cell = self.cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.cell:
            self.tables[-1][-1][-1] += data


def read_page(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


@pytest.fixture
def run(tmp_path: Path) -> RunBuilder:
    """Return a finished run of three stages, without a report."""
    builder = RunBuilder(tmp_path / "run")
    for stage in (1, 2, 3):
        builder.finish(stage)
    return builder


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunBuilder, Path]:
    """Return such a run and its report's page; for tests that only read."""
    builder = RunBuilder(tmp_path_factory.mktemp("report") / "run")
    for stage in (1, 2, 3):
        builder.finish(stage)
    return builder, report.write(builder.path)


def test_the_tables_say_what_the_records_say(run: RunBuilder) -> None:
    rows = report.stage_table(run.records)
    assert ", ".join(rows[0]) == (
        "stage, depth, active, total, tokens, bits/byte, perplexity, tokens/s, peak memory, seconds"
    )
    for row, record in zip(rows, run.records, strict=True):
        assert (row["stage"], row["depth"]) == (str(record["stage"]), str(record["depth"]))
        assert float(row["bits/byte"]) == round(record["validation"]["bits_per_byte"], 4)
        assert float(row["perplexity"]) == round(record["validation"]["perplexity"], 2)
        assert row["tokens/s"] == f"{record['tokens_per_second']:,.0f}"
        assert float(row["seconds"]) == round(record["seconds"], 1)
    assert list(rows[0].values())[2:5] == ["3.4M", "4.5M", "327.7K"]
    assert [row["peak memory"] for row in rows] == ["873 MB", "934 MB", "995 MB"]
    assert report.stage_table([]) == []


def test_the_page_shows_the_same_tables(
    reported: tuple[RunBuilder, Path],
) -> None:
    run, index = reported
    page = read_page(index)
    stages, ledger = page.tables
    rows = report.stage_table(run.records)
    assert stages == [list(rows[0]), *[list(row.values()) for row in rows]]
    rows = report.ledger_table(run.records)
    assert ledger == [list(rows[0]), *[list(row.values()) for row in rows]]


def test_the_ledger_table(run: RunBuilder) -> None:
    first, second, third = report.ledger_table(run.records)
    assert (first["trained"], first["parent"], first["as below"]) == (
        "3 new blocks",
        "nothing",
        "–",
    )
    assert second["frozen tensors"] == "4"
    assert second["as below"] == "4 of 4"
    assert second["parent"] == run.records[0]["fingerprint"][:12] == first["fingerprint"]
    assert third["trained"] == "3 new blocks + LoRA rank 8"
    assert third["LoRA merge"] == "6 adapters, logits within 1.9e-06, loss +2.4e-07"
    assert third["trainable tensors"] == str(len(run.records[2]["trainable"]))


def test_a_ledger_that_does_not_fit_is_shown(run: RunBuilder) -> None:
    assert chain(report.load_run(run.path)).startswith("Every frozen tensor has the hash")
    record = run.records[1]
    record["frozen"]["layers.0.weight"] = digest("something else")
    write_json(run.path / "stages" / "02" / "stage.json", record)
    text = chain(report.load_run(run.path))
    assert "The ledgers do not fit together: at stage 2 1 of 4 frozen tensors differ" in text
    assert report.ledger_table(run.records)[1]["as below"] == "3 of 4"
    record["parent"] = digest("another run")
    assert report.ledger_table(run.records)[1]["parent"].endswith("(not the stage below)")


def test_the_files_of_a_report(
    reported: tuple[RunBuilder, Path],
) -> None:
    run, index = reported
    assert index == run.path / "report" / "index.html"
    vectors = [name.replace(".png", ".svg") for name in CHARTS]
    assert {path.name for path in index.parent.iterdir()} == {
        *CHARTS, *vectors, *TABLES, "index.html",
    }  # fmt: skip
    assert all((index.parent / name).read_bytes().startswith(PNG) for name in CHARTS)
    for name in vectors:
        root = ElementTree.parse(index.parent / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not list(root.iter("{http://www.w3.org/2000/svg}text")), "it needs no font"


def test_the_tables_beside_the_page(reported: tuple[RunBuilder, Path]) -> None:
    run, index = reported
    with (index.parent / "stages.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, run.records, strict=True):
        assert float(row["bits/byte"]) == record["validation"]["bits_per_byte"]
        assert int(row["peak memory"]) == record["peak_memory_bytes"]
        assert int(row["active"]) == record["active_parameters"]
    with (index.parent / "ledger.csv").open(encoding="utf-8", newline="") as file:
        ledger = list(csv.DictReader(file))
    assert [row["fingerprint"] for row in ledger] == [r["fingerprint"] for r in run.records]
    assert [row["parent"] for row in ledger] == ["", *(r["fingerprint"] for r in run.records[:2])]
    latex = (index.parent / "stages.tex").read_text(encoding="utf-8").splitlines()
    cells = list(report.stage_table(run.records)[2].values())
    assert latex[-3] == " & ".join(cells) + r" \\"


def test_the_page_stands_alone(
    reported: tuple[RunBuilder, Path],
) -> None:
    _, index = reported
    text = index.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.loads) == 12
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert page.tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base"})
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[\w+/=]+", "", text))
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text
    assert "$" not in re.sub(r"base64,[\w+/=]+", "", text)


def test_the_page_holds_plan_versions_and_machine_escaped(
    reported: tuple[RunBuilder, Path],
) -> None:
    run, index = reported
    assert "<english>" not in index.read_text(encoding="utf-8")
    page = read_page(index)
    assert chain(report.load_run(run.path)) in words(page)
    assert (run.path / "plan.yaml").read_text().strip() in page.text
    for part in ("small <english> & co", "2.13.0+cpu", "AMD EPYC", digest("corpus"), "Linux-6.1"):
        assert part in page.text
    alt = html.unescape(index.read_text(encoding="utf-8"))
    assert "stage by stage: " + ", ".join(
        f"{record['validation']['bits_per_byte']:.3f}" for record in run.records
    ) in alt  # fmt: skip


def test_rewriting_gives_the_same_bytes_and_drops_the_old(run: RunBuilder) -> None:
    folder = report.write(run.path).parent
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "stale.png").write_bytes(b"old")
    report.write(run.path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_failed_report_leaves_the_old_one(
    run: RunBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = report.write(run.path)
    before = index.read_bytes()

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(CheckpointError, match="report: cannot be written: No space left"):
        report.write(run.path)
    assert index.read_bytes() == before
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_the_loss_chart_draws_every_number_once(run: RunBuilder) -> None:
    files = report.load_run(run.path)
    ax = draw_loss(files, files.views(), LIGHT, True).axes[0]
    raw, mean, held_out = ax.lines[0], ax.lines[1], ax.lines[2]
    losses = [m["loss"] for m in files.metrics if m["stage"] == 1 and "loss" in m]
    np.testing.assert_array_equal(raw.get_ydata(), losses)
    assert len(np.asarray(mean.get_ydata())) == len(losses)
    assert np.asarray(held_out.get_ydata())[-1] == run.records[0]["validation"]["loss"]
    assert np.asarray(held_out.get_xdata())[-1] == run.records[0]["tokens"]
    labels = [text.get_text() for text in ax.texts]
    assert [label for label in labels if label.startswith("depth")] == [
        "depth 3", "depth 6", "depth 9",
    ]  # fmt: skip
    assert any(label.startswith("↑ up to 8.3") for label in labels), "what is cut off is said"
    assert f"held-out\n{run.records[2]['validation']['loss']:.3f}" in labels


def test_the_other_charts_draw_the_records(run: RunBuilder) -> None:
    files = report.load_run(run.path)
    bits = draw_bits(files, files.views(), LIGHT, True).axes[0].lines[0].get_ydata()
    expected = [record["validation"]["bits_per_byte"] for record in run.records]
    np.testing.assert_array_equal(bits, expected)
    parameters, memory = draw_resources(files, files.views(), LIGHT, False).axes
    heights = [bar.get_height() for bar in parameters.patches]  # pyright: ignore
    names = ("active_parameters", "total_parameters")
    assert heights == [record[name] for name in names for record in run.records]
    peaks = [bar.get_height() for bar in memory.patches]  # pyright: ignore
    assert peaks == [record["peak_memory_bytes"] for record in run.records]
    assert parameters.get_ylim()[0] == memory.get_ylim()[0] == 0


def test_stages_follow_each_other_on_the_token_axis(run: RunBuilder) -> None:
    views = report.load_run(run.path).views()
    tokens = run.records[0]["tokens"]
    assert [(view.start, view.end) for view in views] == [
        (0, tokens), (tokens, 2 * tokens), (2 * tokens, 3 * tokens),
    ]  # fmt: skip
    assert views[1].training[0, 0] == tokens + run.batch
    assert [view.lora for view in views] == [False, False, True]


def test_a_run_with_some_stages(tmp_path: Path) -> None:
    run = RunBuilder(tmp_path / "run")
    run.finish(1)
    run.train(2, steps=25)
    page = read_page(report.write(run.path))
    text = words(page)
    assert (
        "not finished: 1 of 3 stages done. Stage 2 has read 204,800 of its 327,680 tokens" in text
    )
    assert f"nacre grow --resume --out {run.path}" in text
    assert len(page.tables[0]) == 2
    files = report.load_run(run.path)
    views = files.views()
    assert [(view.depth, view.finished) for view in views] == [(3, True), (6, False)]
    ax = draw_bits(files, views, LIGHT, True).axes[0]
    assert not np.array_equal(*ax.collections[0].get_facecolors()), "the running stage is hollow"  # pyright: ignore
    loss = draw_loss(files, views, LIGHT, True).axes[0]
    assert "running" in [label.get_text() for label in loss.texts]


@pytest.mark.parametrize("steps", [0, 5])
def test_a_run_whose_first_stage_still_runs(tmp_path: Path, steps: int) -> None:
    run = RunBuilder(tmp_path / "run")
    run.train(1, steps=steps)
    page = read_page(report.write(run.path))
    text = words(page)
    assert "0 of 3 stages done" in text
    assert text.count("No stage has finished yet.") == 2
    assert page.tables == []
    assert sorted(path.name for path in (run.path / "report").glob("*.png")) == CHARTS


def test_depth_over_a_checkpoint_is_known_from_the_first_record(tmp_path: Path) -> None:
    run = RunBuilder(tmp_path / "run")
    run.plan["from"] = "somewhere/else"
    run.write_plan()
    run.train(1, steps=3)
    assert report.load_run(run.path).depth(1) is None
    report.write(run.path)
    record = run.finish(1)
    record["depth"] = 15
    write_json(run.path / "stages" / "01" / "stage.json", record)
    files = report.load_run(run.path)
    assert [files.depth(stage) for stage in (1, 2, 3)] == [15, 18, 21]


def test_a_torn_last_line_is_left_out(run: RunBuilder) -> None:
    whole = report.load_run(run.path)
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 3, "loss": 3.6, "st')
    assert report.load_run(run.path).metrics == whole.metrics


def test_a_run_that_diverged_is_still_reported(run: RunBuilder) -> None:
    nan = float("nan")
    run.log({"stage": 3, "loss": nan, "step": 41, "tokens": 41 * run.batch})
    run.records[2]["validation"] = {"loss": nan, "perplexity": nan, "bits_per_byte": nan}
    write_json(run.path / "stages" / "03" / "stage.json", run.records[2])
    page = read_page(report.write(run.path))
    assert page.tables[0][3][5:7] == ["nan", "nan"]


def test_what_is_no_run(tmp_path: Path, run: RunBuilder) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder; name the --out folder"):
        report.write(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(
        CheckpointError, match=r"is no run \(plan.yaml is missing\); name the --out"
    ):
        report.write(tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"this is one stage; name its run: {run.path}"):
        report.write(run.path / "stages" / "01")


def test_a_run_with_nothing_to_show(tmp_path: Path) -> None:
    run = RunBuilder(tmp_path / "run")
    with pytest.raises(CheckpointError, match="nothing to report yet: no stage has finished"):
        report.write(run.path)
    assert not (run.path / "report").exists()


def test_damaged_files_are_named(run: RunBuilder) -> None:
    for text, message in (("stages: [", "is not valid YAML"), ("name: x\n", "it has no stages")):
        (run.path / "plan.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=f"plan.yaml: .*{message}"):
            report.write(run.path)
    run.write_plan()
    (run.path / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"run\.json: no such file"):
        report.write(run.path)
    (run.path / "stages" / "02" / "stage.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"02/stage\.json: cannot be read"):
        report.write(run.path)


def test_sixteen_stages_and_ten_thousand_steps_in_five_seconds(tmp_path: Path) -> None:
    run = RunBuilder(tmp_path / "run", stages=16, steps=625, lora=5)
    for stage in range(1, 17):
        run.finish(stage)
    start = time.process_time()
    page = read_page(report.write(run.path))
    assert time.process_time() - start < 5
    assert len(page.tables[0]) == 17


def test_the_names_of_many_stages_stand_apart(tmp_path: Path) -> None:
    run = RunBuilder(tmp_path / "run", stages=12, steps=20)
    for stage in range(1, 13):
        run.finish(stage)
    files = report.load_run(run.path)
    figure = draw_loss(files, files.views(), LIGHT, True)
    ax = figure.axes[0]
    figure.draw_without_rendering()
    named = [text for text in ax.texts if re.search(r"^(depth )?\d+$", text.get_text())]
    assert [text.get_text() for text in named] == [str(3 * stage) for stage in range(1, 13)]
    boxes = [text.get_window_extent() for text in named]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    assert ax.lines[2].get_marker() == "None", "132 points would touch"


def test_a_report_of_a_run_needs_no_torch() -> None:
    check = "import sys, nacre.report; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_smooth_is_the_mean_of_what_is_near() -> None:
    values = np.array([1.0, 2.0, 6.0, np.nan, 4.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 3.0, 4.0, 5.0, 4.0])
    np.testing.assert_allclose(smooth(values, 1), values)
    assert np.isnan(smooth(np.array([np.nan]), 5)).all()


def test_a_stage_that_is_another_is_named(run: RunBuilder) -> None:
    record = run.records[0] | {"stage": 3}
    write_json(run.path / "stages" / "01" / "stage.json", record)
    with pytest.raises(CheckpointError, match=r"01/stage\.json: damaged: it is of stage 3"):
        report.write(run.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": ...}, "lacks 'parent'"),
        ({"lora": {"merge": {}}}, "lacks 'lora.rank'"),
        ({"lora": {"rank": 2, "merge": {"adapters": 1}}}, "lacks 'lora.merge.largest_logit_diff"),
        ({"under": "x"}, "'under': input should be a valid integer"),
    ],
)
def test_a_record_of_another_kind_is_named(
    change: dict[str, Any], message: str, run: RunBuilder
) -> None:
    record = run.records[0] | change
    record = {key: value for key, value in record.items() if value is not ...}
    write_json(run.path / "stages" / "01" / "stage.json", record)
    with pytest.raises(CheckpointError, match=rf"01/stage\.json: damaged: {message}"):
        report.write(run.path)


@pytest.mark.parametrize("stages", [[{"add_blocks": 3}], [{"add_blocks": 3}, 5, 5], [{}] * 9])
def test_a_plan_of_another_run_is_named(stages: list[Any], run: RunBuilder) -> None:
    (run.path / "plan.yaml").write_text(yaml.safe_dump({"stages": stages}))
    with pytest.raises(CheckpointError, match=r"plan\.yaml: is not the plan of this run"):
        report.write(run.path)
