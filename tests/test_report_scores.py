"""Reports of scores: which records count, what is drawn of them, several runs, compositions."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Command
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from test_report import PNG, RunBuilder, digest, read_page, words

from nacre import composition, report
from nacre.errors import CheckpointError, ConfigError, NacreError
from nacre.evaluate import results
from nacre.report import depth, scores
from nacre.report.canvas import LIGHT, spread
from nacre.report.depth_charts import draw_panels, draw_runs
from nacre.report.formats import to_csv
from nacre.report.grid_charts import draw_differences, draw_heat, draw_rows
from nacre.report.scores import Model, Scored

MODELS = [Model("run", f"stage {stage}", 3 * stage, stage, stage == 3) for stage in (1, 2, 3)]
SUBJECTS = [f"subject_{letter}" for letter in "abcdefghi"]


def record(task: str, value: float, subset: str = "", **changes: Any) -> dict[str, Any]:
    chance = changes.get("chance")
    return {
        "checkpoint": "somewhere/else", "fingerprint": "stage 1", "task": task, "version": "1",
        "settings": {"seed": 0}, "metric": "accuracy", "subset": subset, "value": value, "n": 100,
        "interval": [value - 0.05, value + 0.05], "chance": None,
        "corrected": None if chance is None else (value - chance) / (1 - chance),
        "nacre": "0.1.0", "date": "2026-01-01T00:00:00+00:00",
    } | changes  # fmt: skip


def bits(value: float, subset: str = "", **changes: Any) -> dict[str, Any]:
    return record("lm", value, subset, metric="bits_per_byte", **changes)


def scored(*found: dict[str, Any]) -> list[Scored]:
    """Return records as scores of the model that each names, a stage of the run `run`."""
    known = {model.fingerprint: model for model in MODELS}
    return [Scored(known[one["fingerprint"]], one) for one in found]


def benchmark(stage: int) -> list[dict[str, Any]]:
    """Return accuracies of nine subjects and of all: `a` is below chance, `i` the best."""
    common: dict[str, Any] = {"metric": "acc", "chance": 0.25, "fingerprint": f"stage {stage}"}
    found = [
        record("mmlu", 0.2 + 0.02 * place * stage, subject, **common)
        for place, subject in enumerate(SUBJECTS)
    ]
    return [*found, record("mmlu", 0.25 + 0.03 * stage, **common)]


def ends(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


# --- which records count ---


def test_the_newest_record_of_what_is_there_counts(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.jsonl"
    kept = record("copy", 0.3, date="2026-02-02T00:00:00+00:00")
    results.append(file, [kept, record("copy", 0.2)])
    results.append(file, [record("copy", 0.9, fingerprint="gone")])
    other = tmp_path / "other.jsonl"
    results.append(other, [record("copy", 0.4, fingerprint="stage 2")])
    found = scores.load([file, other, file], MODELS)
    assert [(one.model.stage, one.record["value"]) for one in found] == [(1, 0.3), (2, 0.4)]
    assert scores.load([tmp_path / "none.jsonl"], MODELS) == []


def test_only_scores_of_one_variant_are_shared() -> None:
    one, two, three = (Model(name, name, 1) for name in ("a", "b", "c"))
    alike = [Scored(one, record("copy", 0.1)), Scored(two, record("copy", 0.2))]
    others = [
        Scored(two, record("khop-1", 0.2, settings={"seed": 1})),
        Scored(three, record("khop-1", 0.2)),
        Scored(one, record("khop-1", 0.2, version="2")),
        Scored(three, record("copy", 0.2, "part")),
    ]
    assert scores.shared([*alike, *others]) == alike
    assert scores.shared([*alike, *others], of="c") == []
    assert scores.shared([*alike, *others], of="b") == alike


def test_a_variant_that_newer_ones_say_again_is_left_out() -> None:
    late = "2026-03-03T00:00:00+00:00"
    few = record("copy", 0.1, settings={"examples": 10})
    many = record("copy", 0.2, settings={"examples": 99}, date=late)
    assert scores.current(scored(few, many)) == scored(many)
    deeper = few | {"fingerprint": "stage 2"}
    both = scored(few, deeper, many)
    assert scores.current(both) == both
    (group,) = scores.groups(both)
    assert list(group.scores) == ["copy (examples 10)", "copy (examples 99)"]


# --- what belongs together ---


def test_parts_of_a_task_and_tasks_of_a_family_are_groups() -> None:
    found = scored(
        bits(2.0, "en"), record("lm", 9.0, "en", metric="perplexity"), bits(2.1),
        record("khop-1", 0.9), record("khop-2", 0.5), record("copy", 0.7),
        record("arc_easy", 0.4, metric="acc"), record("arc_easy", 0.5, metric="acc_norm"),
    )  # fmt: skip
    groups = {(group.name, group.metric): group for group in scores.groups(found)}
    assert {key: list(group.scores) for key, group in groups.items()} == {
        ("lm", "bits_per_byte"): ["en", "all"],
        ("khop", "accuracy"): ["khop-1", "khop-2"],
        ("copy", "accuracy"): ["copy"],
        ("arc_easy", "acc"): ["arc_easy"],
        ("arc_easy", "acc_norm"): ["arc_easy"],
    }
    assert groups["lm", "bits_per_byte"].overall == "all"
    assert groups["khop", "accuracy"].overall is None


@pytest.mark.parametrize("tasks", [False, True])
def test_more_than_eight_scores_are_a_map(tasks: bool) -> None:
    """Subjects may be subsets of one task, or tasks of their own."""
    found = [one for stage in (1, 2, 3) for one in benchmark(stage)]
    if tasks:
        found = [
            one | {"task": f"mmlu_{one['subset']}" if one["subset"] else "mmlu", "subset": ""}
            for one in found
        ]
    (group,) = scores.groups(scored(*found))
    assert group.many
    assert [line.name for panel in depth.panels([group]) for line in panel.lines] == [
        "mmlu" if tasks else "all"
    ]
    grid = depth.heat(group, MODELS, ["3", "6", "9"])
    names = [f"subject {letter}" for letter in "ihgfedcba"]
    assert grid.rows == ("all", *names)
    np.testing.assert_allclose(grid.values[0], [0.28, 0.31, 0.34])
    np.testing.assert_allclose(grid.values[1], [0.36, 0.52, 0.68])
    np.testing.assert_allclose(grid.corrected[-1], [-0.2 / 3] * 3)
    assert grid.sure[1].tolist() == [True, True, True]
    assert grid.sure[0].tolist() == [False, True, True], "0.28 +- 0.05 holds chance"
    assert not scores.groups(scored(*found[1:9]))[0].many


def test_a_line_holds_the_records_in_the_order_of_the_stages() -> None:
    found = scored(
        record("copy", 0.9, fingerprint="stage 3", chance=0.1, interval=None),
        record("copy", 0.3, fingerprint="stage 1", chance=0.1),
    )
    line = depth.line("copy", found)
    assert (line.name, line.chance) == ("copy", 0.1)
    assert line.depths.tolist() == [3, 9]
    assert line.values.tolist() == [0.3, 0.9]
    np.testing.assert_allclose(line.lows, [0.25, np.nan])
    np.testing.assert_allclose(line.highs, [0.35, np.nan])


def test_runs_beside_each_other_have_a_panel_for_every_score() -> None:
    shallow, deep = Model("a", "a", 3, 1), Model("b", "b", 9, 1)
    found = [
        Scored(model, one)
        for model in (shallow, deep)
        for one in (bits(2.0, "en"), bits(2.1), record("khop-1", 0.9), record("khop-2", 0.5))
    ]
    panels = depth.beside(scores.groups(found), ["a", "b"])
    assert [panel.title for panel in panels] == [
        "lm en: bits per byte", "lm all: bits per byte", "khop-1: accuracy", "khop-2: accuracy",
    ]  # fmt: skip
    assert all([line.name for line in panel.lines] == ["a", "b"] for panel in panels)
    assert [line.depths.tolist() for line in panels[0].lines] == [[3], [9]]


def test_experts_stand_in_rows_by_metric() -> None:
    models = [Model("en", "en", 3), Model("both", "both", None)]
    found = [
        Scored(model, one)
        for model in models
        for one in (bits(2.0, "en"), bits(2.1), record("copy", 0.7), record("khop-1", 0.5))
    ]
    grids = depth.rows(scores.groups(found[:-1]), models)
    assert [(grid.title, grid.rows) for grid in grids] == [
        ("lm: bits per byte (less is better)", ("en", "all")),
        ("accuracy", ("copy", "khop-1")),
    ]
    np.testing.assert_array_equal(grids[1].values, [[0.7, 0.7], [0.5, np.nan]])
    assert grids[0].columns == ("en", "both")


def test_csv_has_every_digit_and_the_settings() -> None:
    value = 0.1 + 0.2
    found = scored(record("copy", value, chance=0.1), bits(2.0, '水, "x"', interval=None))
    rows = list(csv.DictReader(to_csv(scores.long_table(found)).splitlines()))
    assert [row["subset"] for row in rows] == ["", '水, "x"']
    first = rows[0]
    assert (float(first["value"]), float(first["low"])) == (value, value - 0.05)
    assert (first["model"], first["stage"], first["depth"]) == ("run", "1", "3")
    assert json.loads(first["settings"]) == {"seed": 0}
    assert (rows[1]["low"], rows[1]["high"], rows[1]["chance"]) == ("", "", "")


def test_the_table_has_a_column_for_every_model() -> None:
    found = scored(record("copy", 0.5, chance=0.1), record("copy", 0.7, fingerprint="stage 2"))
    (row,) = scores.table(found, lambda model: f"depth {model.depth}")
    assert row == {
        "score": "copy accuracy", "n": "100", "chance": "0.100",
        "depth 3": "0.500 [0.450, 0.550]", "depth 6": "0.700 [0.650, 0.750]",
    }  # fmt: skip


# --- charts ---


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], []),
        ([5.0], [5.0]),
        ([2.0, 8.0, 5.0], [2.0, 8.0, 5.0]),
        ([5.0, 5.0], [4.5, 5.5]),
        ([5.2, 5.0, 8.0], [5.6, 4.6, 8.0]),
        ([0.0, 0.1], [0.0, 1.0]),
        ([10.0, 9.9, 9.8], [10.0, 9.0, 8.0]),
        ([4.0, 4.5, 5.2, 9.0], [3.566667, 4.566667, 5.566667, 9.0]),
    ],
)
def test_labels_are_moved_apart(places: list[float], expected: list[float]) -> None:
    assert spread(places, 1, 0, 10) == pytest.approx(expected)


def test_panels_draw_every_number_interval_and_chance() -> None:
    found = scored(
        *(record("copy", 0.2 * s, fingerprint=f"stage {s}", chance=0.1) for s in (1, 2, 3)),
        *(bits(3 - s / 4, fingerprint=f"stage {s}") for s in (1, 2, 3)),
        *(bits(3 - s / 4, "en", fingerprint=f"stage {s}") for s in (1, 2, 3)),
    )  # fmt: skip
    panels = depth.panels(scores.groups(found))
    copy, lm = draw_panels(panels, LIGHT, True).axes
    values, chance = copy.lines
    np.testing.assert_allclose(np.asarray(values.get_xydata()), [(3, 0.2), (6, 0.4), (9, 0.6)])
    assert set(np.asarray(chance.get_ydata()).tolist()) == {0.1}
    (bars,) = [part for part in copy.collections if isinstance(part, LineCollection)]
    np.testing.assert_allclose(
        np.asarray(bars.get_segments())[:, :, 1], [(0.15, 0.25), (0.35, 0.45), (0.55, 0.65)]
    )
    assert ends(copy) == ["0.600", "chance 0.1"]
    assert ends(lm) == ["all 2.250", "en 2.250"]
    assert len(lm.lines) == 2, "bits per byte have no chance"
    assert copy.get_xticks().tolist() == [3, 6, 9]


def test_a_map_colors_by_chance_and_writes_percent() -> None:
    (group,) = scores.groups(scored(*(one for s in (1, 2, 3) for one in benchmark(s))))
    grid = depth.heat(group, MODELS, ["3", "6", "9"])
    ax = draw_heat(grid, "depth (blocks)", LIGHT, True).axes[1]
    mesh = ax.collections[0]
    np.testing.assert_allclose(np.asarray(mesh.get_array()), grid.corrected)
    low, high = mesh.get_clim()
    assert low == -high
    np.testing.assert_allclose(mesh.to_rgba(0.0)[:3], to_rgb(LIGHT.band), atol=0.01)  # pyright: ignore
    cells = {text.get_position(): text for text in ax.texts}
    assert cells[0.5, 0.52].get_text() == "28"
    weights = [cells[x, 0.52].get_fontproperties().get_weight() for x in (0.5, 2.5)]
    assert weights == ["normal", "bold"]
    assert len(cells) == 30


def test_a_map_without_chance_colors_the_score() -> None:
    found = [bits(2 + place / 10, f"domain {place}") for place in range(9)]
    (group,) = scores.groups(scored(*found))
    ax = draw_heat(depth.heat(group, MODELS[:1], ["3"]), "", LIGHT, False).axes[1]
    assert ax.collections[0].get_clim() == pytest.approx((2.0, 2.8))
    assert ends(ax)[0] == "2.800"


def test_rows_and_differences_draw_the_records() -> None:
    models = [Model("en", "en", 3), Model("both", "both", None)]
    found = [Scored(model, bits(2.0 + n, "en")) for n, model in enumerate(models)]
    ax = draw_rows(depth.rows(scores.groups(found), models), LIGHT, True).axes[0]
    assert [np.asarray(line.get_xdata()).tolist() for line in ax.lines] == [[2.0], [3.0]]
    assert ax.lines[1].get_color() == LIGHT.ink, "the composition stands out"
    assert ends(ax) == ["3.000"]
    row = {"kind": "language", "name": "en", "best": "en", "interval": [0.1, 0.3]}
    rows = [
        row | {"difference": 0.2, "outcome": "worse"},
        row | {"difference": -0.2, "outcome": "better", "interval": None, "kind": "domain"},
    ]
    ax = draw_differences({"rows": rows}, LIGHT, False).axes[0]
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [line.get_color() for line in points] == [LIGHT.held_out, LIGHT.training]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["all of en", "en"]
    assert ends(ax)[:2] == ["+0.200 en", "-0.200 en"]


# --- the report of a run ---


@pytest.fixture
def run(tmp_path: Path) -> RunBuilder:
    """Return a finished run of three stages."""
    return built(tmp_path / "runs" / "one")


def built(path: Path) -> RunBuilder:
    builder = RunBuilder(path)
    for stage in (1, 2, 3):
        builder.finish(stage)
    return builder


def known_as(run: RunBuilder, stage: int) -> str:
    """Return what records of a stage are known by."""
    return results.fingerprint(run.path / "stages" / f"{stage:02d}")


def score(run: RunBuilder, **changes: Any) -> None:
    """Write records of every stage of a run."""
    for stage in run.records:
        known: dict[str, Any] = {"fingerprint": known_as(run, stage["stage"]), **changes}
        value = 0.2 * stage["stage"]
        found = [bits(3 - value, "en", **known), record("copy", value, chance=0.1, **known)]
        subjects = [one | known for one in benchmark(stage["stage"])]
        results.append(run.path / results.FILE, [*found, *subjects])


def test_a_runs_report_shows_its_scores(run: RunBuilder) -> None:
    bare = report.write(run.path)
    assert "All scores" not in read_page(bare).text
    assert not (bare.parent / "scores.csv").exists()
    score(run)
    index = report.write(run.path)
    page = read_page(index)
    assert {path.name for path in index.parent.iterdir()} == {
        "index.html",
        *(f"{chart}.{form}" for form in ("png", "svg") for chart in (
            "loss", "bits-per-byte", "resources", "scores", "map-mmlu-acc"
        )),
        *(f"{name}.{form}" for form in ("csv", "tex") for name in ("stages", "ledger", "scores")),
    }  # fmt: skip
    assert (index.parent / "map-mmlu-acc.png").read_bytes().startswith(PNG)
    assert len(page.loads) == 5 * 4
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    text = index.read_text(encoding="utf-8")
    assert "copy: accuracy: copy 0.200 at depth 3 to 0.600 at depth 9." in text
    assert "highest, subject i 0.680, lowest, subject a 0.200" in text
    table = page.tables[0]
    assert table[0] == ["score", "n", "chance", "depth 3", "depth 6", "depth 9"]
    assert table[2] == [
        "copy accuracy", "100", "0.100",
        "0.200 [0.150, 0.250]", "0.400 [0.350, 0.450]", "0.600 [0.550, 0.650]",
    ]  # fmt: skip
    rows = list(csv.DictReader((index.parent / "scores.csv").read_text().splitlines()))
    assert len(rows) == 3 * 12
    latex = (index.parent / "scores.tex").read_text(encoding="utf-8")
    assert "copy accuracy & 100 & 0.100 & 0.200 [0.150, 0.250] & " in latex
    before = {path.name: path.read_bytes() for path in index.parent.iterdir()}
    report.write(run.path)
    assert {path.name: path.read_bytes() for path in index.parent.iterdir()} == before


def test_what_records_say_is_escaped(run: RunBuilder) -> None:
    score(run)
    known = {"fingerprint": known_as(run, 1)}
    results.append(run.path / results.FILE, [bits(2.0, '<b>"$x', **known)])
    index = report.write(run.path)
    assert "<b>" not in index.read_text(encoding="utf-8")
    assert '<b>"$x' in read_page(index).text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"value": "0.5"}, "value is '0.5'"),
        ({"interval": [0.1]}, r"interval is \[0.1\]"),
        ({"settings": None}, "settings is None"),
        ({"chance": True}, "chance is True"),
    ],
)
def test_damaged_records_are_named(run: RunBuilder, change: dict[str, Any], said: str) -> None:
    results.append(run.path / results.FILE, [record("copy", 0.5), record("copy", 0.5) | change])
    with pytest.raises(CheckpointError, match=rf"jsonl, line 2: damaged: {said}; remove the line"):
        report.write(run.path)
    assert not (run.path / "report").exists()


# --- several runs ---


def test_several_runs_are_drawn_beside_each_other(
    run: RunBuilder, tmp_path: Path, command: Command
) -> None:
    other = built(tmp_path / "elsewhere" / "one")
    score(run)
    score(other, date="2026-02-02T00:00:00+00:00")
    only = record("induction", 0.5, fingerprint=known_as(run, 1))
    results.append(run.path / results.FILE, [only])
    code, out, _ = command("report", run.path, other.path, "--out", tmp_path / "compared", "--json")
    assert code == 0
    assert json.loads(out)["runs"] == [str(run.path), str(other.path)]
    index = Path(json.loads(out)["report"])
    page = read_page(index)
    assert {path.name for path in index.parent.iterdir()} == {
        "index.html", "scores.csv", "scores.tex", "runs.csv", "runs.tex",
        *(f"{chart}.{form}" for form in ("png", "svg") for chart in (
            "scores", "map-mmlu-acc-runs-one", "map-mmlu-acc-elsewhere-one", "bits-per-byte"
        )),
    }  # fmt: skip
    assert page.tables[0][0][3:] == [
        f"{name}, depth {blocks}" for name in ("runs/one", "elsewhere/one") for blocks in (3, 6, 9)
    ]
    assert page.tables[1][1][:3] == ["runs/one", "3", "9"]
    assert "induction" not in page.text, "it is no comparison"
    assert "the same for all of these runs" in words(page)
    again = report.write(run.path, other.path, out=tmp_path / "compared")
    assert again == index


def test_runs_on_other_texts_are_said_to_be_so(run: RunBuilder, tmp_path: Path) -> None:
    other = built(tmp_path / "two")
    about = json.loads((other.path / "run.json").read_text())
    about["fingerprints"]["corpora"] = {"default": digest("another corpus")}
    (other.path / "run.json").write_text(json.dumps(about))
    for one in (run, other):
        score(one)
    page = read_page(report.write(run.path, other.path, out=tmp_path / "out"))
    assert "trained on different texts, so the lines cannot be compared" in words(page)


def test_the_training_of_runs_has_a_line_each(run: RunBuilder) -> None:
    views = report.load_run(run.path).views()
    ax = draw_runs({"one": views, "two": views[:1]}, LIGHT, True).axes[0]
    depths = [text.get_text() for text in ax.texts if text.get_text().isdecimal()]
    assert depths == ["3", "6", "9", "3"]
    points = np.concatenate([view.held_out for view in views])
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), points[:, 0])
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), points[:, 2])
    assert any(text.startswith("↑ up to 3.4") for text in ends(ax)), "what is cut off is said"


def test_runs_that_cannot_be_compared(run: RunBuilder, tmp_path: Path) -> None:
    other, out = built(tmp_path / "two"), tmp_path / "out"
    score(run)
    both = (run.path, other.path)

    def refused(*folders: Path, **options: Any) -> str:
        with pytest.raises(NacreError) as caught:
            report.write(*folders, **{"out": out} | options)
        assert not out.exists()
        return str(caught.value)

    made = f"`nacre eval {other.path} --data DIR` makes"
    assert refused(*both) == f"{other.path}: holds no scores; {made} them"
    results.append(other.path / results.FILE, [record("copy", 0.5, fingerprint="gone")])
    stale = "evaluations.jsonl has no score of what is there now"
    assert refused(*both) == f"{other.path}: {stale}; {made} new ones"
    score(other, settings={"seed": 1})
    assert refused(*both) == (
        f"{run.path}: shares no score with the other runs (the same task, version and settings); "
        f"`nacre eval {run.path} {other.path} --data DIR` scores them alike"
    )
    assert refused(run.path, run.path) == "runs: one is named twice (name each once)"
    nine = [tmp_path / str(number) for number in range(9)]
    assert refused(*nine) == "runs: 9 are too many for one chart (name 8 or fewer)"
    assert refused() == "runs: there are none (name a run, or several)"
    assert "nowhere: no such folder" in refused(run.path, tmp_path / "nowhere")


def test_a_report_replaces_nothing_but_a_report(run: RunBuilder, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("dear")
    said = r"--out: .*taken holds what is no report \(thesis.tex\) \(name a new folder"
    with pytest.raises(ConfigError, match=said):
        report.write(run.path, out=taken)
    (taken / "thesis.tex").rename(taken / "figure.png")
    with pytest.raises(ConfigError, match=r"holds what is no report \(figure.png\)"):
        report.write(run.path, out=taken)
    with pytest.raises(ConfigError, match=r"figure\.png is a file"):
        report.write(run.path, out=taken / "figure.png")
    assert report.write(run.path, out=tmp_path / "new") == tmp_path / "new" / "index.html"
    for name in ("thesis.tex", "drawing.svg"):
        (tmp_path / "new" / name).write_text("dear")
        with pytest.raises(ConfigError, match=rf"holds what is no report \({name}\)"):
            report.write(run.path, out=tmp_path / "new")
        (tmp_path / "new" / name).unlink()
    assert report.write(run.path, out=tmp_path / "new").exists()


# --- compositions ---


@pytest.fixture
def both(tmp_path: Path, tiny_run: Path) -> Path:
    """Return a composition of two stages, of a copy of the run that tests share."""
    copy = tmp_path / "grown"
    shutil.copytree(tiny_run, copy)
    stages = [copy / "stages" / number for number in ("01", "02")]
    composition.compose(stages, tmp_path / "both", names=["en", "ru"])
    return tmp_path / "both"


def fingerprints(both: Path) -> dict[str, str]:
    experts = composition.read_record(both)["experts"]
    places = {one["name"]: both / one["path"] for one in experts} | {"both": both}
    return {name: results.fingerprint(place) for name, place in places.items()}


def test_a_composition_stands_beside_its_experts(both: Path) -> None:
    known = fingerprints(both)
    grown = both.parent / "grown" / results.FILE
    for value, name in ((2.0, "en"), (2.5, "ru"), (1.9, "both")):
        home = both / results.FILE if name == "both" else grown
        found = [bits(value, part, fingerprint=known[name]) for part in ("", "novels")]
        results.append(home, [*found, record(f"only-{name}", 0.5, fingerprint=known[name])])
    index = report.write(both)
    page = read_page(index)
    assert {path.name for path in index.parent.iterdir()} == {
        "index.html", "experts.png", "experts.svg", "experts.csv", "experts.tex",
        "scores.csv", "scores.tex",
    }  # fmt: skip
    assert page.tables[0][0] == ["score", "n", "chance", "en", "ru", "both"]
    assert [row[3][:5] for row in page.tables[0][1:]] == ["2.000", "2.000"]
    assert "only-" not in page.text
    assert [row[0] for row in page.tables[1][1:]] == ["en", "ru"]
    assert "mixed by fixed-share" in words(page)


def test_a_composition_shows_who_lost_what(both: Path) -> None:
    row = {
        "kind": "all", "name": "all texts", "documents": 3, "bytes": 99, "composition": 2.0,
        "experts": {"en": 1.9, "ru": 3.0}, "best": "en", "difference": 0.1,
        "interval": [0.05, 0.15], "outcome": "worse", "verdict": "worse than its best expert (en)",
    }  # fmt: skip
    settings = {"context": 32, "stride": 16}
    record = composition.read_record(both) | {
        "report": {"texts": digest("texts"), "settings": settings, "rows": [row]}
    }
    (both / "composition.json").write_text(json.dumps(record))
    index = report.write(both)
    assert {path.name for path in index.parent.iterdir()} == {
        "index.html", "differences.png", "differences.svg", "differences.csv", "differences.tex",
        "experts.csv", "experts.tex",
    }  # fmt: skip
    with (index.parent / "differences.csv").open(encoding="utf-8", newline="") as file:
        (found,) = csv.DictReader(file)
    assert found["count"] == "3"
    assert (found["difference"], found["difference low"], found["difference high"]) == (
        "0.1", "0.05", "0.15",
    )  # fmt: skip
    assert "+0.100 & +0.050 to +0.150" in (index.parent / "differences.tex").read_text()
    page = read_page(index)
    assert page.tables[0][1] == [
        "all texts", "3", "2.000", "1.900", "3.000", "+0.100", "+0.050 to +0.150",
    ]  # fmt: skip
    assert "all texts: worse than its best expert (en)" in page.text


def test_a_composition_without_a_shared_score(both: Path, run: RunBuilder) -> None:
    known = fingerprints(both)
    results.append(both / results.FILE, [record("copy", 0.5, fingerprint=known["both"])])
    others = {"settings": {"seed": 7}}
    results.append(
        both.parent / "grown" / results.FILE,
        [record("copy", 0.5, fingerprint=known["en"]) | others],
    )
    places = [str(both / f"../grown/stages/{number}") for number in ("01", "02")]
    with pytest.raises(CheckpointError) as caught:
        report.write(both)
    assert str(caught.value) == (
        f"{both}: it and its experts share no score (the same task, version and settings); "
        f"`nacre eval {both} {' '.join(places)} --data DIR --context 32` makes them"
    )
    with pytest.raises(ConfigError, match=f"{both}: is a composition .report it alone"):
        report.write(run.path, both)
    shutil.rmtree(both.parent / "grown" / "stages" / "02")
    with pytest.raises(CheckpointError, match="expert 'ru' is not in"):
        report.write(both)
