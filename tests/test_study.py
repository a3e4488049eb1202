"""Studies: what is a fair comparison, what is run once, and what the numbers allow to be said."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

from nacre import config
from nacre import study as studies
from nacre.errors import CheckpointError, ConfigError, FingerprintError
from nacre.folders import RUN
from nacre.growth import plan as plans
from nacre.study import charts, page, results, runner
from nacre.study.design import Claim, Evaluation, parse
from nacre.train import files
from nacre.train.folder import held
from nacre.train.metrics import append_metrics, read_metrics

PLAN: dict[str, Any] = {
    "tokenizer": {"size": 512},
    "model": {"width": 32, "heads": 2, "context": 32},
    "training": {
        "batch_tokens": 256, "evaluate_every": 2, "validation_tokens": 512, "precision": "fp32",
    },
}  # fmt: skip
STAGE = {"add_blocks": 1, "tokens": 1024}
ARMS: dict[str, Any] = {
    "whole": {"stages": [{"add_blocks": 2, "tokens": 2048}]},
    "grown": {"stages": [STAGE, STAGE]},
    "grown-zero": {"stages": [STAGE, {**STAGE, "init": "zero"}]},
}


def make(**parts: Any) -> studies.Study:
    return parse({"baseline": "whole", "plan": PLAN, "arms": ARMS} | parts)


# --- what can be compared ---


def test_an_arm_is_the_shared_plan_and_its_own() -> None:
    arms = ARMS | {"fast": {"training": {"lr": 0.5}, "stages": [STAGE], "budgets": [2, 0.5]}}
    study = make(arms=arms, seeds=[3, 4])
    plan = study.plan_of("fast", seed=4, budget=2)
    assert (plan.seed, plan.training.lr, plan.training.batch_tokens) == (4, 0.5, 256)
    assert [stage.tokens for stage in plan.stages] == [2048]
    assert study.budgets_of("fast") == (0.5, 2)
    runs = study.runs(Path("out"))
    assert [(run.seed, run.arm, run.budget) for run in runs[:5]] == [
        (3, "whole", 1), (3, "grown", 1), (3, "grown-zero", 1), (3, "fast", 0.5), (3, "fast", 2),
    ]  # fmt: skip
    assert runs[4].folder == Path("out/fast/x2/seed-3")
    assert len({run.plan.fingerprint() for run in runs}) == len(runs) == 10


def test_budgets_that_yaml_reads_as_text() -> None:
    study = make(arms=ARMS | {"grown": {"stages": [STAGE], "budgets": ["5e-1", 1, "2e-1"]}})
    assert study.budgets_of("grown") == (0.2, 0.5, 1)


def test_a_stage_of_a_small_budget_keeps_one_batch() -> None:
    assert make().plan_of("grown", 0, 0.01).stages[0].tokens == 256


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"seeds": [1, 2, 1]},
            "seeds: 1 stands there more than once (equal seeds give equal runs: name each once)",
        ),
        ({"baseline": "hole"}, "baseline: there is no arm 'hole' (did you mean 'whole'?)"),
        (
            {"claims": [{"arm": "x", "against": "grown"}]},
            "claims[0].arm: there is no arm 'x' (arms: whole, grown, grown-zero)",
        ),
        ({"plan": {"seed": 3}}, "plan.seed: a study has seeds of its own (leave it out)"),
        (
            {"arms": ARMS | {"grown": {"seed": 3, "stages": [STAGE]}}},
            "arms.grown.seed: a study has seeds of its own (leave it out)",
        ),
        (
            {"arms": ARMS | {"grown": {"budgets": [1, 2, 1], "stages": [STAGE]}}},
            "arms.grown.budgets: 1 stands there more than once (name each once, to six digits)",
        ),
        ({"arms": ARMS | {"README.md": {"stages": [STAGE]}}}, "README.md"),
        (
            {"claims": [{"arm": "grown", "budget": 3}]},
            "claims[0].budget: 3, but grown has 1 (name one of those)",
        ),
        ({"arms": {"whole": ARMS["whole"]}}, "arms: dictionary should have at least 2 items"),
        (
            {"arms": ARMS | {"broken": {"stages": [STAGE], "training": {"learning_rate": 1}}}},
            "arms.broken.training.learning_rate: unknown key",
        ),
        (
            {"arms": ARMS | {"broken": {"stages": [STAGE], "budgets": []}}},
            "arms.broken.budgets: ",
        ),
        (
            {"arms": ARMS | {"other": {"stages": [STAGE], "data": {"sources": ["x"]}}}},
            "arms.other.data.sources: ['x'], but the baseline has ['default'] "
            "(arms are compared on one held-out text: make them equal)",
        ),
        (
            {"arms": ARMS | {"other": {"stages": [{**STAGE, "sources": ["x"]}]}}},
            "arms.other.data.sources: ['x'], but the baseline has ['default']",
        ),
        (
            {"arms": ARMS | {"other": {"stages": [{**STAGE, "sources": ["x"]}, STAGE]}}},
            "arms.other.tokenizer: another tokenizer than the baseline's",
        ),
        (
            {
                "plan": PLAN | {"tokenizer": {"path": "t"}},
                "arms": ARMS | {"mix": {"stages": [{**STAGE, "sources": ["x", "default"]}, STAGE]}},
            },
            "arms.mix.stages[0].sources: default is read in another mix than at the end (what is "
            "held out at the end could be trained on: read all of the mix or none)",
        ),
        (
            {"arms": ARMS | {"other": {"stages": [STAGE], "tokenizer": {"size": 600}}}},
            "arms.other.tokenizer: another tokenizer than the baseline's, whose validation_tokens "
            "are another text (name a folder of texts with evaluate.data: bits per byte are "
            "compared there)",
        ),
        (
            {
                "arms": ARMS | {"other": {"stages": [STAGE], "tokenizer": {"size": 600}}},
                "claims": [{"arm": "other", "measure": "loss"}],
                "evaluate": {"data": "texts"},
            },
            "arms.other.tokenizer: another tokenizer than the baseline's: loss is of tokens "
            "(claims about it need measure: bits_per_byte)",
        ),
    ],
)
def test_what_keeps_arms_from_being_compared(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(**parts)
    assert message in str(error.value)


def test_stages_may_differ_in_text_if_the_last_has_the_baselines() -> None:
    mixed = {"stages": [{**STAGE, "sources": ["x"]}, STAGE]}
    study = make(arms=ARMS | {"mixed": mixed}, plan=PLAN | {"tokenizer": {"path": "t"}})
    assert study.plan_of("mixed", 0).stages[0].sources == ("x",)


def test_settings_reach_the_recipe_that_a_study_names(tmp_path: Path) -> None:
    arms = "{a: {stages: &s [{add_blocks: 1, tokens: 512}]}, b: {stages: *s}}"
    file = tmp_path / "study.yaml"
    file.write_text(f"baseline: a\nplan: tiny\narms: {arms}\n")
    study = studies.load(file, ["plan.data.sources=[x]", "arms.b.stages.0.tokens=1024"])
    assert study.plan_of("a", 0).model.width == 32
    assert study.plan_of("a", 0).data.sources == ("x",)
    assert [study.plan_of(arm, 0).stages[0].tokens for arm in "ab"] == [512, 1024]


def test_a_recipe_is_found_by_its_name() -> None:
    assert studies.load("operators", ["seeds=[7]"]).seeds == (7,)
    with pytest.raises(ConfigError, match="no file or recipe named 'operator'"):
        studies.load("operator")


def test_the_folder_of_a_study_is_said_to_hold_it(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").touch()
    with pytest.raises(ConfigError, match=rf"its study is {tmp_path}/study\.yaml"):
        studies.load(tmp_path)


@pytest.mark.parametrize("name", plans.recipes("studies"))
def test_every_recipe_is_a_study_without_dead_options(name: str) -> None:
    study = studies.load(name)
    for arm in study.arms:
        assert plans.warnings(study.plan_of(arm, 0)) == []


# --- what is run ---


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[studies.Study, Path]:
    """A study that was run: one seed, three arms, the last of which shares a stage."""
    study, out = make(), tmp_path_factory.mktemp("studies") / "mini"
    studies.run(study, out, jobs=2)
    return study, out


def test_every_run_is_the_growth_of_its_plan(made: tuple[studies.Study, Path]) -> None:
    study, out = made
    for run in study.runs(out):
        records = [files.read_record(path) for path in files.stages(run.folder)]
        assert [record["tokens"] for record in records] == [s.tokens for s in run.plan.stages]
        assert records[-1]["plan"] == run.plan.fingerprint()


def test_tokenizer_and_tokens_are_made_once_though_runs_begin_side_by_side(
    made: tuple[studies.Study, Path],
) -> None:
    study, out = made
    for name in ("tokenizer/tokenizer.json", "data/01/train.tokens"):
        assert len({(run.folder / name).stat().st_ino for run in study.runs(out)}) == 1


def test_equal_first_stages_are_made_once(made: tuple[studies.Study, Path]) -> None:
    study, out = made
    _, grown, zero = study.runs(out)
    one, other = (files.stages(run.folder)[0] / "head.safetensors" for run in (grown, zero))
    assert one.stat().st_ino == other.stat().st_ino
    lines = [read_metrics(run.folder) for run in (grown, zero)]
    first = [[line for line in each if line["stage"] == 1] for each in lines]
    assert first[0] == first[1] != []
    assert all(any(line["stage"] == 2 for line in each) for each in lines)


def test_a_study_that_was_run_runs_nothing_again(made: tuple[studies.Study, Path]) -> None:
    study, out = made
    times = {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")}
    studies.run(study, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("stage.json")} == times


def test_a_changed_arm_needs_another_folder(made: tuple[studies.Study, Path]) -> None:
    _, out = made
    with pytest.raises(FingerprintError, match="name another --out for the changed study"):
        studies.run(make(plan=PLAN | {"data": {"holdout": 0.03}}), out)


def test_runs_of_a_changed_study_are_not_read_as_its_results(
    made: tuple[studies.Study, Path],
) -> None:
    _, out = made
    with pytest.raises(FingerprintError, match="name another --out"):
        studies.read_results(make(plan=PLAN | {"training": PLAN["training"] | {"lr": 1}}), out)


def test_arms_that_run_their_trunks_otherwise_share_no_stage_on_one() -> None:
    stages = [STAGE, {**STAGE, "trunk": "recompute"}]
    study = make(arms=ARMS | {"other": {"stages": stages}})
    grown, other = study.plan_of("grown", 0), study.plan_of("other", 0)
    assert grown.fingerprint() == other.fingerprint()
    assert runner.common_stages(grown, other) == 1
    assert runner.common_stages(grown, grown) == 2


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [
        ({"tasks": ["nonsense"]}, "there is no task 'nonsense'"),
        ({"tasks": ["copy"], "data": "texts"}, "no task of copy reads it"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_the_first_run(
    evaluate: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(ConfigError) as error:
        studies.run(make(evaluate=evaluate), tmp_path / "out")
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_scores_of_every_stage_stand_in_the_results(
    made: tuple[studies.Study, Path], tmp_path: Path
) -> None:
    study, out = made
    scored = study.model_copy(update={"evaluate": Evaluation(tasks=("copy",), limit=3)})
    studies.evaluate(scored, out)
    found = studies.read_results(scored, out)
    row = next(row for row in found["runs"] if row["arm"] == "grown")
    assert [(score["task"], score["depth"]) for score in row["scores"]] == [
        ("copy", 1),
        ("copy", 2),
    ]
    table = page.score_rows(found["runs"])
    assert {(line["arm"], line["chance"]) for line in table} == {(arm, "0.1") for arm in ARMS}
    assert all(set(line) >= {"depth 1", "depth 2"} for line in table)
    text = studies.write(found, tmp_path).with_name("scores.csv").read_text(encoding="utf-8")
    lines = {line["arm"]: line for line in csv.DictReader(text.splitlines())}
    assert float(lines["grown"]["depth 2"]) == row["scores"][1]["value"]
    assert studies.read_results(study, out)["runs"][0]["scores"] == []


def test_the_page_says_that_runs_were_made_side_by_side_otherwise(
    made: tuple[studies.Study, Path],
) -> None:
    study, out = made
    found = studies.read_results(study, out)
    assert [row["jobs"] for row in found["runs"]] == [[2]] * 3
    assert "side by side" not in page.about(found)
    runner.note_jobs(study.runs(out)[0].folder, 1)
    try:
        found = studies.read_results(study, out)
    finally:
        files.write_json(study.runs(out)[0].folder / runner.JOBS, {"jobs": [2]})
    assert found["runs"][0]["jobs"] == [1, 2]
    assert "(made 1 and 2 side by side: wall-clock does not compare)" in page.about(found)


def test_runs_of_two_machines_are_mixed_also_where_one_run_is_of_both(tmp_path: Path) -> None:
    runs = make().runs(tmp_path)
    here = {"machine": {"threads": 2}, "versions": {"torch": "2.13"}}
    there = here | {"machine": {"threads": 4}}

    def mixed(first: dict[str, Any]) -> bool:
        for run, record in zip(runs, (first, here, here), strict=True):
            run.folder.mkdir(parents=True, exist_ok=True)
            files.write_json(run.folder / RUN, record)
        return results._machine(runs)["mixed"]

    assert not mixed(here)
    assert not mixed(here | {"earlier": []})
    assert mixed(there)
    assert mixed(here | {"earlier": [there]})


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    study = make(arms={key: ARMS[key] for key in ("whole", "grown")})
    broken = study.runs(tmp_path / "out")[0]
    runner.prepare(broken, [])
    (broken.folder / "tokenizer").mkdir()
    (tmp_path / "out" / "study.yaml").touch()
    with pytest.raises(runner.StudyError) as error:
        studies.run(study, tmp_path / "out")
    assert "1 of 2 runs failed\n  - whole, x1, seed 0: " in str(error.value)
    assert [run.arm for run in study.runs(tmp_path / "out") if runner.finished(run)] == ["grown"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_runs_with_their_states_saved(sent: int, tmp_path: Path) -> None:
    stages = {"stages": [{"add_blocks": 1, "tokens": "100M"}]}
    config.write_yaml(make(arms={"whole": stages, "other": stages}), tmp_path / "study.yaml")
    command = [sys.executable, "-m", "nacre", "study", "study.yaml", "--out", "out", "--quiet"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "out" / "whole" / "x1" / "seed-0" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 3
    name = signal.Signals(sent).name
    assert said == f"stopped: {name}: every run has saved its state; the same command goes on\n"
    with held(metrics.parent):  # nobody else writes to it any more
        assert (metrics.parent / "state").is_dir()


@pytest.mark.parametrize("case", ["file", "other"])
def test_a_folder_that_is_no_studys_is_left_alone(case: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if case == "file":
        out.touch()
        message = "is a file (name a folder)"
    else:
        (out / "mine").mkdir(parents=True)
        message = "holds files that are not a study's (name a new or empty folder)"
    with pytest.raises(ConfigError) as error:
        studies.run(make(), out)
    assert message in str(error.value)


def test_no_jobs_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--jobs: 0 is not 1 or more"):
        studies.run(make(), tmp_path / "out", jobs=0)


def test_nothing_run_has_no_results(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run of this study has finished"):
        studies.read_results(make(), tmp_path)


# --- what is found ---


def test_a_runs_costs_are_those_of_its_stages(made: tuple[studies.Study, Path]) -> None:
    study, out = made
    found = studies.read_results(study, out)
    row = next(row for row in found["runs"] if row["arm"] == "grown")
    paths = files.stages(study.runs(out)[1].folder)
    records = [files.read_record(path) for path in paths]
    assert row["tokens"] == 2048
    for cost in ("flops", "seconds"):
        assert row[cost] == pytest.approx(sum(record[cost] for record in records))
    assert row["peak_memory_bytes"] == max(record["peak_memory_bytes"] for record in records)
    assert row["bits_per_byte"] == records[-1]["validation"]["bits_per_byte"]
    tokens = [point["tokens"] for point in row["curve"]]
    assert tokens == sorted(tokens)
    assert tokens[0] == 0
    end = row["curve"][-1]
    assert end == {key: pytest.approx(row[key]) for key in (*results.AXES, "bits_per_byte")}
    assert found["missing"] == []


def test_equal_tokens_compare_run_with_run(made: tuple[studies.Study, Path]) -> None:
    found = studies.read_results(*made)
    bits = {row["arm"]: row["bits_per_byte"] for row in found["runs"]}
    (pair,) = [c for c in found["comparisons"] if (c["arm"], c["at"]) == ("grown", "tokens")]
    assert pair["mean"] == pytest.approx(bits["grown"] / bits["whole"])
    assert pair["interval"] is None
    said = [claim["sentence"] for claim in found["claims"] if claim["at"] == "tokens"]
    assert all("undecided" in s and "one seed says nothing of the spread" in s for s in said)


def test_the_page_is_made_from_the_results_alone(
    made: tuple[studies.Study, Path], tmp_path: Path
) -> None:
    found = studies.read_results(*made)
    page = studies.write(found, tmp_path / "one")
    text = page.read_text(encoding="utf-8")
    assert all(claim["sentence"] in text for claim in found["claims"])
    again = json.loads((tmp_path / "one" / "results.json").read_text(encoding="utf-8"))
    studies.write(again, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert {path.name for path in (tmp_path / "one").iterdir()} == {
        "README.md", "results.json", "budgets.png", "budgets.svg", "curves.png", "curves.svg",
        "arms.csv", "arms.tex", "equal-cost.csv", "equal-cost.tex",
    }  # fmt: skip
    with (tmp_path / "one" / "arms.csv").open(encoding="utf-8", newline="") as file:
        arms = {(row["arm"], float(row["budget"])): row for row in csv.DictReader(file)}
    for run in found["runs"]:  # of one seed: its numbers are the means
        row = arms[run["arm"], run["budget"]]
        assert float(row["bits per byte"]) == pytest.approx(run["bits_per_byte"], rel=1e-12)
        assert float(row["seconds"]) == pytest.approx(run["seconds"], rel=1e-12)
    with (tmp_path / "one" / "equal-cost.csv").open(encoding="utf-8", newline="") as file:
        ratios = {(row["arm"], float(row["budget"])): row for row in csv.DictReader(file)}
    for pair in (each for each in found["comparisons"] if each["at"] == "tokens"):
        assert float(ratios[pair["arm"], pair["budget"]]["equal tokens"]) == pair["mean"]


def test_a_caches_time_comes_before_the_steps_it_serves(tmp_path: Path) -> None:
    score = {"loss": 1.0, "bits_per_byte": 2.0, "perplexity": 3.0, "tokens": 8, "bytes": 9}
    append_metrics(tmp_path, {"stage": 1, "step": 0, "tokens": 0, "validation": score})
    append_metrics(tmp_path, {"stage": 1, "step": 1, "tokens": 50, "tokens_per_second": 10.0})
    append_metrics(tmp_path, {"stage": 1, "step": 1, "tokens": 50, "validation": score})
    record = {"stage": 1, "tokens": 50, "flops": 100.0, "seconds": 5.0, "validation": score}
    run = make().runs(tmp_path)[0]
    points = results.curve(
        dataclasses.replace(run, folder=tmp_path), [record | {"trunk": {"cache": {"seconds": 7.0}}}]
    )
    assert [point["seconds"] for point in points] == [7.0, 12.0, 12.0]


def test_curves_of_different_texts_share_no_chart(made: tuple[studies.Study, Path]) -> None:
    found = studies.read_results(*made)
    assert found["same_text"]
    assert charts.draw_curves(found) is not None
    assert charts.draw_curves(found | {"same_text": False}) is None


def test_between_two_budgets_a_curve_is_straight_in_logarithms() -> None:
    curve = [(100.0, 4.0), (10_000.0, 1.0)]
    assert results.at_cost(curve, 1000.0) == pytest.approx(2.0)
    assert results.at_cost(curve, 10_100.0) == pytest.approx(1.0)
    assert results.at_cost(curve, 99.0) == pytest.approx(4.0)
    assert results.at_cost(curve, 90.0) is None
    assert results.at_cost(curve, 11_000.0) is None
    assert results.at_cost([(100.0, 4.0)], 100.0) == 4.0


@pytest.mark.parametrize("budgets", [(1, 5, 20), (0.5, 1, 5, 20)])
def test_between_three_budgets_a_curve_is_bent(budgets: tuple[float, ...]) -> None:
    parabola = [(x, math.exp(2 - 0.4 * math.log(x) + 0.05 * math.log(x) ** 2)) for x in budgets]
    for cost in (1.0, 2.0, 5.0, 9.0, 20.0):
        expected = math.exp(2 - 0.4 * math.log(cost) + 0.05 * math.log(cost) ** 2)
        assert results.at_cost(parabola, cost) == pytest.approx(expected)
    falling = [(x, 1.5 + 2 * x**-0.4) for x in budgets]
    bent = results.at_cost(falling, 10.0)
    assert bent == pytest.approx(1.5 + 2 * 10**-0.4, rel=2e-3)
    assert results.at_cost(falling[-2:], 10.0) > bent * 1.005


def test_ratios_are_paired_and_their_interval_is_students() -> None:
    whole = results.paired([0.9, 1.0 / 0.9])
    assert whole.mean == pytest.approx(1.0)
    half = 12.706 * abs(math.log(0.9)) * math.sqrt(2) / math.sqrt(2)
    assert whole.interval is not None
    assert whole.interval[1] == pytest.approx(math.exp(half), rel=1e-3)


def rows(arm: str, bits: list[float], seconds: float = 1.0) -> list[dict[str, Any]]:
    costs = dict.fromkeys(results.AXES, seconds)
    return [
        {"arm": arm, "seed": seed, "budget": 1.0, "bits_per_byte": value,
         "peak_memory_bytes": 100 * seconds, "active_parameters": 7, **costs}
        for seed, value in enumerate(bits)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "verdict", "because"),
    [
        ([1.8, 1.81, 1.79], "holds", "0.900 times over 3 seeds, 95% interval 0.888 to 0.912"),
        ([2.2, 2.21, 2.19], "does not hold", "1.100 times over 3 seeds"),
        ([2.2, 1.8, 2.0], "undecided", "95% interval 0.777 to 1.279"),
        ([1.8], "undecided", "0.900 times over 1 seed: one seed says nothing of the spread"),
    ],
)
def test_a_verdict_follows_from_the_interval(bits: list[float], verdict: str, because: str) -> None:
    study = make(seeds=list(range(len(bits))))
    found = [*rows("whole", [2.0] * len(bits)), *rows("grown", bits)]
    decided = results.decide(Claim(arm="grown"), study, found)
    assert decided["verdict"] == verdict
    assert because in decided["sentence"]


def test_a_claim_at_a_cost_that_the_other_was_not_run_at() -> None:
    found = [*rows("whole", [2.0, 2.0]), *rows("grown", [1.0, 1.0], seconds=9.0)]
    decided = results.decide(Claim(arm="grown", at="seconds"), make(), found)
    assert decided["sentence"].endswith("undecided (whole was not run at that cost)")


def test_memory_needs_no_equal_cost() -> None:
    found = [*rows("whole", [2.0, 2.0], seconds=4.0), *rows("grown", [1.0, 1.0])]
    claim = Claim(arm="grown", measure="peak_memory_bytes", at_most=0.5)
    decided = results.decide(claim, make(seeds=[0, 1]), found)
    assert decided["verdict"] == "holds"
    assert decided["sentence"] == (
        "grown (x1) has at most 0.5 times the peak memory of whole: holds "
        "(0.250 times over 2 seeds, 95% interval 0.250 to 0.250)"
    )


def test_a_score_is_shown_to_the_digits_that_it_is_worth() -> None:
    assert str(page.spread([2.5])) == "2.5000"
    assert str(page.spread([2.5, None, 3.5])) == "3.0000 (2.5000 to 3.5000)"
    assert str(page.spread([25_000_000.4, 35_000_000.0])) == "3e+07 (2.5e+07 to 3.5e+07)"


def test_seeds_that_drop_out_leave_a_claim_undecided() -> None:
    slow = rows("grown", [1.9, 2.4], seconds=1.0)
    slow[1]["seconds"] = 1.5
    found = [*rows("whole", [2.0, 2.0]), *slow]
    decided = results.decide(Claim(arm="grown", at="seconds"), make(seeds=[0, 1]), found)
    assert decided["verdict"] == "undecided"
    assert decided["sentence"].endswith("; seed 1: whole was not run at that cost)")


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (9, 2.262), (10, 2.228), (30, 2.042)]
)
def test_students_quantiles(freedom: int, quantile: float) -> None:
    assert results.student(freedom) == pytest.approx(quantile, abs=3e-3)


def test_where_two_arms_cross() -> None:
    found = [
        {"arm": arm, "seed": 0, "budget": budget, "bits_per_byte": bits, "seconds": budget * 100}
        for arm, scores in {"whole": [4.0, 1.0], "grown": [2.0, 2.0]}.items()
        for budget, bits in zip([1.0, 100.0], scores, strict=True)
    ]
    crossed = results.crossing(found, "grown", "whole", "seconds")
    assert crossed["costs"] == [pytest.approx(1000.0)]
    assert page.crossing(crossed) == (
        "grown begins below whole in the mean and crosses it at 1e+03 seconds "
        "(from 100 to 1e+04 seconds, 1 seed)"
    )
    alone = results.crossing(found, "grown", "grown", "seconds")
    assert page.crossing(alone) == (
        "grown is never below grown, on average over 1 seed, between 100 and 1e+04 seconds"
    )
    lower = [{**run, "bits_per_byte": 0.5, "arm": "low"} for run in found[:2]]
    crossed = results.crossing([*found, *lower], "low", "whole", "seconds")
    assert page.crossing(crossed) == (
        "low is always below whole, on average over 1 seed, between 100 and 1e+04 seconds"
    )
    partial = [*found, found[0] | {"seed": 1}]
    assert results.crossing(partial, "grown", "whole", "seconds")["seeds"] == [0]
    assert results.crossing(found, "grown", "absent", "seconds")["below"] == []


def test_one_thread_is_one_thread() -> None:
    machine = {"accelerator": "", "processor": "P", "torch": "2", "transformers": "5", "mixed": 0}
    for threads, said in ((1, "P, 1 thread a run, torch 2"), (2, "P, 2 threads a run, torch 2")):
        found = {"study": {"seeds": [0]}, "runs": [], "missing": []}
        found["machine"] = {**machine, "threads": threads}
        assert said in page.about(found)


# --- the command ---


def test_the_command_reads_what_was_run(
    made: tuple[studies.Study, Path], tmp_path: Path, command: Command
) -> None:
    _, out = made
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({"baseline": "whole", "plan": PLAN, "arms": ARMS}))
    code, printed, _ = command("study", file, "--out", out, "--no-run", "--json")
    assert code == 0
    assert {row["arm"] for row in json.loads(printed)["runs"]} == set(ARMS)
    code, _, said = command("study", file, "--out", out, "--no-run", "--set", "seeds=[5]")
    assert code == 2
    assert "no run of this study has finished; leave --no-run out to make them" in said


def test_a_budget_beyond_all_numbers_is_refused() -> None:
    for own in ({"budgets": [1e308]}, {"claims": [{"arm": "grown", "budget": 1e308}]}):
        with pytest.raises(ConfigError, match=r"less than or equal to 1000000000, got 1e\+308"):
            make(**own)
