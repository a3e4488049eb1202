"""What the page shows, made from tiny models without a browser, and which requests it answers."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Build, Command

from nacre import composition, generation
from nacre.errors import CheckpointError, ConfigError
from nacre.generation import Sampling
from nacre.models import stock
from nacre.models.rules import RULES, TRAINED, Rule
from nacre.play import app, chart, compose, given, grow, guard, markup, shown, study, substrate
from nacre.play import run as run_tab
from nacre.play.models import Depths, Mixtures, sample_text
from nacre.play.sampling import draw
from nacre.report.canvas import DARK, LIGHT
from nacre.study.charts import draw_budgets
from nacre.train.folder import held

ROOT = Path(__file__).parent.parent
STYLE = ROOT / "src/nacre/play/style.css"
GREEDY = Sampling(max_new_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def depths(tiny_run: Path) -> Depths:
    return Depths(tiny_run)


@pytest.fixture(scope="module")
def pair(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A composition of the first and the last stage of the tiny run."""
    out = tmp_path_factory.mktemp("pair") / "both"
    stages = [tiny_run / "stages/01", tiny_run / "stages/03"]
    composition.compose(stages, out, "posterior", names=["low", "high"], decay=0.8)
    return out


@pytest.fixture(scope="module")
def mixtures(pair: Path, tiny_run: Path) -> Mixtures:
    return Mixtures(pair, [tiny_run / "stages/02"])


@pytest.fixture
def growth(tmp_path: Path) -> Path:
    """A study's folder with the results of a study of ours."""
    shutil.copy(ROOT / "docs/results/growth.json", tmp_path / "results.json")
    return tmp_path


def test_paths_are_told_apart_by_their_files(tiny_run: Path, pair: Path, growth: Path) -> None:
    found = given.look([growth / "results.json", tiny_run, pair, tiny_run / "stages/02"])
    assert found == given.Given((tiny_run,), (tiny_run / "stages/02",), (pair,), (growth,))
    assert found.model == tiny_run
    assert given.expert_count(found) == 4
    assert given.stage_depths(tiny_run) == [1, 2, 3]
    assert given.stage_depths(tiny_run / "stages/02") == [2]
    firsts = [given.look([path]).first_tab for path in (tiny_run, pair, growth)]
    assert firsts == ["grow", "compose", "study"]
    assert given.look([tiny_run / "stages/01", tiny_run / "stages/02"]).first_tab == "compose"


def test_depths_are_in_the_order_of_the_stages(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").touch()
    for number in range(1, 101):
        stage = tmp_path / f"stages/{number:02d}"
        stage.mkdir(parents=True)
        (stage / "stage.json").write_text(json.dumps({"depth": 2 * number}))
    assert given.stage_depths(tmp_path) == list(range(2, 201, 2))


def test_every_path_that_is_nothing_of_ours_is_said_at_once(tmp_path: Path, tiny_run: Path) -> None:
    (tmp_path / "note.txt").write_text("")
    (tmp_path / "planned").mkdir()
    (tmp_path / "planned/study.yaml").write_text("")
    wrong = [tmp_path / "gone", tmp_path, tmp_path / "note.txt", tmp_path / "planned"]
    with pytest.raises(ConfigError) as error:
        given.look([*wrong, tiny_run, tiny_run])
    said = str(error.value)
    for words in (
        "gone: there is no such folder",
        "holds no run, checkpoint, composition or study",
        "note.txt: is a file",
        "planned: this study has no results yet (write them with `nacre study",
        "is named twice",
    ):
        assert words in said
    with pytest.raises(ConfigError, match="PATH: there is none"):
        given.look([])


def test_one_composition_and_one_study_at_a_time(pair: Path, tmp_path: Path) -> None:
    shutil.copytree(pair, tmp_path / "second")
    with pytest.raises(ConfigError, match="second: is a second composition"):
        given.look([pair, tmp_path / "second"])


def test_depths_hold_what_they_share_once_and_answer_as_they_are(depths: Depths) -> None:
    depths.load_all()
    low, high = depths.model(0), depths.model(1)
    pointers = {name: tensor.data_ptr() for name, tensor in high.named_parameters()}
    shared = [n for n, t in low.named_parameters() if t.data_ptr() == pointers[n]]
    assert "model.embed_tokens.weight" in shared
    assert any(".layers.0." in name for name in shared)
    assert not any("lm_head" in name for name in shared)
    text = "".join(generation.generate(depths.stages[0].folder, "def ", GREEDY))
    *_, last = grow.continue_at(depths, [0], "def ", GREEDY)
    assert last == [text]


def test_depths_of_a_damaged_record_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    record = json.loads((run / "stages/02/stage.json").read_text())
    del record["depth"]
    (run / "stages/02/stage.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"stages/02/stage.json: damaged: lacks 'depth'"):
        Depths(run)


def test_every_depth_takes_turns_and_ends_as_it_would_alone(depths: Depths) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=1.0, seed=3)
    steps = list(grow.continue_at(depths, [0, 1, 2], "def ", sampling))
    assert all(steps[0])  # each depth has begun after the first turn
    for place in range(3):
        *_, alone = grow.continue_at(depths, [place], "def ", sampling)
        assert alone == [steps[-1][place]]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drawing_follows_generate_of_transformers(pico: Build, temperature: float) -> None:
    model, ids_BT = pico("llama"), torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 9, "top_k": 1, "repetition_penalty": 1.3}
    sampling = Sampling(temperature=temperature, top_p=0.9, **options)
    drawn = [each.token for each in draw(model, ids_BT, sampling)]
    expected = model.generate(ids_BT, **sampling.options(), pad_token_id=0)  # pyright: ignore
    assert drawn == expected[0, 3:].tolist()
    assert [e.token for e in draw(model, ids_BT, sampling, stop={drawn[2]})] == drawn[:2]


def test_prompts_that_cannot_be_are_refused_in_words(depths: Depths) -> None:
    def refused(prompt: str) -> str:
        with pytest.raises(ConfigError) as error:
            list(grow.continue_at(depths, [0], prompt, GREEDY))
        return str(error.value)

    assert "The prompt: 4,001 characters are too many (4,000 at most)" in refused("x" * 4001)
    assert "leave no room for new ones (this model reads 32)" in refused("x y " * 200)


def test_a_continuation_ends_where_the_context_does(depths: Depths) -> None:
    ids = depths.tokenizer("def ")["input_ids"]
    sampling = Sampling(max_new_tokens=500, temperature=0)
    steps = list(grow.continue_at(depths, [0], "def ", sampling))
    assert len(steps) <= 32 - len(ids) + 1


def test_losses_are_those_of_one_pass_in_windows_of_the_context(depths: Depths) -> None:
    model, tokenizer = depths.model(2), depths.tokenizer
    context = stock.positions(model.config)
    ids = tokenizer("for name in names: print(name)\n" * 12)["input_ids"]
    assert context is not None
    assert len(ids) > context
    found = grow.read(model, ids, start=1)
    assert len(found.nats) == len(found.likeliest) == len(found.sure) == len(ids)
    whole = torch.tensor([[1, *ids]])
    window = model(whole[:, :context]).logits[0].log_softmax(-1)
    first = -window.gather(-1, whole[0, 1 : context + 1, None])[:, 0]
    torch.testing.assert_close(torch.tensor(found.nats[:context]), first, atol=1e-5, rtol=1e-4)
    begin = context // 2
    after = model(whole[:, begin : begin + context]).logits[0].log_softmax(-1)
    place = context - begin  # the first token that only the second window reads
    expected = -after[place, ids[context]]
    assert found.nats[context] == pytest.approx(float(expected), abs=1e-4)


def test_chunks_of_a_window_change_nothing(depths: Depths, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = depths.tokenizer("for name in names: print(name)\n" * 12)["input_ids"]
    whole = grow.read(depths.model(1), ids, start=1)
    monkeypatch.setattr(grow, "CHUNK", 7)
    chunked = grow.read(depths.model(1), ids, start=1)
    assert chunked.nats == pytest.approx(whole.nats, abs=1e-4)
    assert chunked.likeliest == whole.likeliest


def test_a_text_is_painted_with_its_difference_and_escaped(depths: Depths) -> None:
    text = "<b>if</b>\nx"
    both = grow.losses(depths, 0, text), grow.losses(depths, 2, text)
    shown_html = grow.painted(text, depths.tokenizer, both, (1, 3), "difference")
    spans = re.findall(r'class="token (better|worse)" style="--s:(\d+)%"', shown_html)
    changes = [b - a for a, b in zip(both[0].nats, both[1].nats, strict=True)]
    assert [kind == "better" for kind, _ in spans] == [change < 0 for change in changes]
    sizes = [min(100, round(100 * abs(change) / grow.FAR)) for change in changes]
    assert [int(size) for _, size in spans] == pytest.approx(sizes, abs=1)
    assert "<b>if" not in shown_html
    plain = re.sub(r"<[^>]+>", "", shown_html[shown_html.index('<div class="tokens') :])
    assert plain.startswith("&lt;b&gt;if&lt;/b&gt;↵\nx")
    assert f"{sum(both[1].nats) / math.log(2) / len(text):.3f}" in shown_html
    first = grow.painted(text, depths.tokenizer, both, (1, 3), "first")
    assert first.count('class="token loss"') == len(changes)
    with pytest.raises(ConfigError, match="The text: there is none"):
        grow.losses(depths, 0, "")


def test_the_boxes_begin_with_text_of_the_run(depths: Depths, tiny_run: Path) -> None:
    text = sample_text(tiny_run, depths.tokenizer, 20)
    assert 0 < len(depths.tokenizer(text)["input_ids"]) <= 21
    assert sample_text(tiny_run / "stages", depths.tokenizer, 20) == ""


def test_a_mixture_traces_as_the_command_does(mixtures: Mixtures, pair: Path) -> None:
    names, rule = mixtures.own, mixtures.rule
    *_, traced = compose.continue_mixed(mixtures, names, rule, "def ", GREEDY)
    expected = generation.trace(pair, "def ", GREEDY)
    new = traced.pieces[traced.prompt :]
    assert new == [entry["text"] for entry in expected]
    for shares, entry in zip(traced.shares[traced.prompt :], expected, strict=True):
        assert shares == pytest.approx(list(entry["weights"].values()), abs=1e-5)
    assert traced.shares[0] == []  # nothing foretold the first token
    assert "".join(traced.pieces[: traced.prompt]) == "def "


def test_experts_come_and_go_in_the_page_and_not_on_disk(mixtures: Mixtures, pair: Path) -> None:
    before = (pair / "composition.json").read_bytes()
    assert list(mixtures.experts) == ["low", "high", "tiny"]
    alone = mixtures.model(["tiny"], Rule("mean-probs"))
    *_, traced = compose.continue_mixed(mixtures, ["tiny"], Rule("mean-probs"), "def ", GREEDY)
    assert {tuple(shares) for shares in traced.shares[1:]} == {(1.0,)}
    assert mixtures.model(["tiny"], Rule("mean-probs")) is alone
    assert mixtures.model(["low", "high", "tiny"], Rule()).expert_names == ["low", "high", "tiny"]
    assert (pair / "composition.json").read_bytes() == before


def test_an_expert_is_in_memory_once(pair: Path) -> None:
    mixtures = Mixtures(pair)
    alone = mixtures.model(["high"], Rule("mean-probs")).experts[0]
    inside = mixtures.model(mixtures.own, mixtures.rule).experts[1]
    pointers = {name: tensor.data_ptr() for name, tensor in alone.named_parameters()}
    assert pointers == {name: tensor.data_ptr() for name, tensor in inside.named_parameters()}


def test_mixtures_that_cannot_be_are_refused_in_words(mixtures: Mixtures, tiny_run: Path) -> None:
    with pytest.raises(ConfigError, match="Experts: none is chosen"):
        mixtures.model([], Rule())
    with pytest.raises(ConfigError, match="Rule: gate was trained for"):
        mixtures.model(["low"], Rule("gate"))
    with pytest.raises(ConfigError, match="one expert alone is no composition"):
        Mixtures(None, [tiny_run])
    assert not set(mixtures.rules) & set(TRAINED)


def test_a_run_that_does_not_fit_a_composition_is_left_out_and_said(
    pair: Path, tiny_run: Path, tmp_path: Path
) -> None:
    odd = tmp_path / "odd"
    shutil.copytree(tiny_run / "stages/02", odd)
    settings = json.loads((odd / "config.json").read_text())
    settings["vocab_size"] += 1
    (odd / "config.json").write_text(json.dumps(settings))
    mixtures = Mixtures(pair, [odd])
    assert list(mixtures.experts) == ["low", "high"]
    assert "odd cannot join: vocab_size" in compose.experts(mixtures, ["low"])


def test_a_copy_of_an_expert_does_not_join_it(pair: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run / "stages/01", tmp_path / "copy")
    mixtures = Mixtures(pair, [tmp_path / "copy", tiny_run / "stages/03"])
    assert list(mixtures.experts) == ["low", "high"]
    assert list(mixtures.left_out) == ["copy"]
    assert "are the same expert" in mixtures.left_out["copy"]


def test_rules_take_the_options_they_have_and_weights_that_differ() -> None:
    options = {"decay": 0.5, "k": 2.0, "switch": 0.1}
    assert compose.rule_of("top-k", [1, 1], options) == Rule("top-k", decay=0.5, k=2)
    assert compose.rule_of("posterior", [1, 0.5], {}) == Rule("posterior", prior=(1, 0.5))
    assert compose.rule_of("weighted", [0.2, 0.2], {}) == Rule("weighted", weights=(0.2, 0.2))
    for wrong, words in (
        (("nothing", [1.0], {}), "'nothing' is none"),
        (("weighted", [0.0, 0.0], {}), "weights"),
        (("posterior", [1.0, 1.0], {"decay": 2.0}), "decay"),
    ):
        with pytest.raises(ConfigError, match=words):
            compose.rule_of(*wrong)


def test_tokens_have_the_colour_of_the_expert_that_carried_them() -> None:
    shares = [[], [0.9, 0.1], [0.2, 0.8]]
    traced = compose.Traced(("<en>", "ru"), ["a", "b", "c"], shares, prompt=2)
    painted = compose.painted(traced)
    kinds = re.findall(r'class="token ([^"]+)"', painted)
    assert kinds == ["prompt", "prompt e0", "new e1"]
    assert "&lt;en&gt; <b>20%</b>" in painted
    drawn = compose.posterior(traced)
    assert drawn.count('class="line e0"') == 2  # one a shape
    assert "prompt" in drawn
    assert "&lt;en&gt; 20%" in drawn  # said to those who do not see it
    adapter = compose.Traced(("en", "ru"), ["a", "b"], [[]], prompt=1)
    assert "no weights" in compose.painted(adapter)
    assert compose.posterior(adapter) == ""


def test_a_substrate_is_drawn_searched_and_mapped(tiny_run: Path, pair: Path) -> None:
    table, tokenizer = substrate.load(tiny_run)
    of_stage, _ = substrate.load(tiny_run / "stages/02")
    assert np.array_equal(of_stage.rows, table.rows)
    assert of_stage.recipe == table.recipe
    assert np.array_equal(substrate.load(pair)[0].rows, table.rows)
    drawn = substrate.drawn(table, tokenizer, "A<")
    assert drawn.count("<img") == 2 * drawn.count("<li>") == 4
    assert "U+0041" in drawn
    assert "“&lt;”" in drawn
    assert "U+0065" in substrate.nearest(table, "é")  # e, wherever the vocabulary ends
    with pytest.raises(ConfigError, match="The string: there is none"):
        substrate.nearest(table, "")
    with pytest.raises(ConfigError, match="The text: there is none"):
        substrate.drawn(table, tokenizer, "")
    figure = substrate.map_of(table, "PCA")
    packed = re.search(r'data-map="([^"]*)"', figure)
    assert packed is not None
    data = json.loads(packed[1].replace("&quot;", '"').replace("&#x27;", "'").replace("&amp;", "&"))
    assert {len(data[key]) for key in ("x", "y", "script", "name", "points")} == {len(table.tokens)}
    assert min(data["x"]) >= 0
    assert max(data["y"]) <= 4095
    assert "Latin" in data["scripts"]


def test_rows_that_are_no_pictures_are_said(tiny_run: Path, tmp_path: Path) -> None:
    stage = tmp_path / "foreign"
    shutil.copytree(tiny_run / "stages/01", stage)
    (stage / "substrate.json").unlink()
    table, tokenizer = substrate.load(stage)
    assert "Rows were trained" in substrate.summary(table)
    with pytest.raises(ConfigError, match="trained rows have no picture"):
        substrate.drawn(table, tokenizer, "A")
    with pytest.raises(ConfigError, match="is not in the vocabulary"):
        substrate.nearest(table, "no such token")
    assert "img" not in substrate.nearest(table, "a")


@pytest.mark.parametrize(
    ("token", "script"),
    [("a", "Latin"), (" Ж", "Cyrillic"), ("珠", "Cjk"), ("12", "digits"), ("...", "signs"),
     (" ", "blanks"), (b"\x00", "bytes, special")],
)  # fmt: skip
def test_scripts(token: Any, script: str) -> None:
    assert substrate.script(token) == script


def test_maps_keep_what_differs_most_apart() -> None:
    rows = np.zeros((40, 8), np.float32)
    rows[:20, 3] = 1
    rows[::2, 5] = 0.5
    places = substrate.places(rows, "PCA")
    assert places.shape == (40, 2)
    assert abs(places[:20, 0].mean() - places[20:, 0].mean()) == pytest.approx(1)
    assert abs(places[::2, 1].mean() - places[1::2, 1].mean()) == pytest.approx(1)


def test_a_finished_run_is_shown(tiny_run: Path) -> None:
    page = run_tab.show(tiny_run)
    assert 'class="status finished"' in page
    assert "3 of 3" in page
    assert "peak memory" in page
    assert page.count(">depth 2<") == 4  # in both shapes of both charts
    assert "Every frozen tensor has the hash" in page
    *_, checked = run_tab.check(tiny_run)
    assert "are as recorded" in checked
    assert "lineage of 03" in checked


def test_a_run_is_followed_while_it_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    live = tmp_path / "live"
    shutil.copytree(tiny_run, live)
    shutil.rmtree(live / "stages/03")
    metrics = live / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    third = [line for line in lines if json.loads(line)["stage"] == 3]
    metrics.write_text("".join(lines[: -len(third) + 2]))
    with held(live):
        page, before = run_tab.show(live), run_tab.stamp(live)
        assert 'class="status live"' in page
        assert "left of this stage" in page
        with metrics.open("a") as file:
            file.write("".join(third[2:4]) + third[4][:10])  # a line that is only half written
        assert run_tab.stamp(live) != before
        assert run_tab.show(live) != page
        before = run_tab.stamp(live)
    stopped = run_tab.show(live)  # a moment after it wrote
    assert 'class="status stopped"' in stopped
    assert "nacre grow --resume" in stopped
    assert run_tab.stamp(live) != before


def test_a_run_that_has_not_written_for_long_goes_on_while_it_is_held(
    tiny_run: Path, tmp_path: Path
) -> None:
    live = tmp_path / "live"
    shutil.copytree(tiny_run, live)
    shutil.rmtree(live / "stages/03")
    long_ago = time.time() - 3600
    os.utime(live / "metrics.jsonl", (long_ago, long_ago))
    with held(live):
        assert 'class="status live"' in run_tab.show(live)


def test_runs_without_a_step_and_damaged_ones_are_said(tiny_run: Path, tmp_path: Path) -> None:
    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(tiny_run / "plan.yaml", young)
    assert "nothing to report yet" in run_tab.show(young)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_run, broken)
    shard = broken / "stages/01/head.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()  # other stages may be the same file
    shard.write_bytes(data)
    *_, checked = run_tab.check(broken)
    assert "1 are wrong" in checked
    assert "is not what the ledger recorded" in checked


def test_a_study_is_shown_with_its_verdicts_and_intervals(growth: Path) -> None:
    found = study.read(growth)
    first, whole = study.show(growth)
    assert "Drawing the charts" in first
    assert "<picture>" not in first
    assert whole.count("<picture>") == 2
    assert whole.count('class="verdict ') == len(found["claims"])
    claim = found["claims"][0]
    assert f"{claim['mean']:.3f}" in study.ratios(found)
    assert study.verdicts(found).count(f"</b><span>{claim['arm']}") >= 1
    hollow = sum(each["interval"] is None for each in found["comparisons"])
    assert study.ratios(found).count("hollow") == 2 * hollow + 1  # both shapes, and the legend


def test_an_arm_has_one_colour_in_every_chart(growth: Path) -> None:
    found = study.read(growth)
    arms = ["grow", "stack", "end-to-end"]
    for part in ("runs", "comparisons"):
        found[part] = [each for each in found[part] if each["arm"] in arms]
    found["runs"].sort(key=lambda run: arms.index(run["arm"]))
    for run in found["runs"]:
        if run["arm"] == "grow":
            run["bits_per_byte"] = None  # nothing to draw over budgets
    looks = re.findall(r'class="mark (e\d)', study.ratios(found))
    compared = [c["arm"] for c in found["comparisons"] if c["mean"] is not None]
    assert looks.count("e0") == 2 * compared.count("grow")  # in both shapes
    assert looks.count("e1") == 2 * compared.count("stack")
    drawn = draw_budgets(found)
    assert drawn is not None
    assert [line.get_color() for line in drawn.axes[0].lines] == list(LIGHT.lines[1:3])


def test_damaged_results_are_said(growth: Path) -> None:
    (growth / "results.json").write_text("{}")
    assert "lacks" in "".join(study.show(growth))
    broken = {part: {} for part in study.PARTS}
    (growth / "results.json").write_text(json.dumps(broken))
    assert "damaged" in "".join(study.show(growth))


def test_charts_leave_out_what_is_not_finite_and_fit_the_rest() -> None:
    points = [(float(x), 9.0 if x == 0 else 2.0 + x / 100) for x in range(100)]
    drawn = chart.draw_lines(
        [chart.Line("loss", [*points, (100.0, math.nan)], "training")],
        title="T<", about="a", x_label="x", y_format="{:.2f}".format,
    )  # fmt: skip
    assert "nan" not in drawn
    assert "T&lt;" in drawn
    assert "↑ up to 9.00" in drawn
    assert ">2.99<" in drawn
    assert chart.draw_lines([], title="", about="", x_label="") == ""
    assert chart.round_ticks(0.0, 1.0, 5) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0][:6]
    thin = chart._thinned([(float(x), 0.0) for x in range(5000)])
    assert len(thin) <= chart.MOST + 1
    assert thin[-1][0] == 4999


def test_the_style_sheet_has_the_colours_of_a_report() -> None:
    style = STYLE.read_text()
    for theme, selector in ((LIGHT, ":root"), (DARK, ".dark")):
        inside = style[style.index(f"{selector} {{") :].partition("}")[0]
        found = dict(re.findall(r"--([\w-]+): (#\w{6})", inside))
        named = {
            {"grid": "rule"}.get(name, name).replace("_", "-"): getattr(theme, name)
            for name in (
                "paper",
                "ink",
                "muted",
                "grid",
                "band",
                "training",
                "held_out",
                "memory",
                "faint",
            )
        }
        assert found == named | {f"e{index}": color for index, color in enumerate(theme.lines)}


def test_words_of_the_page_are_escaped() -> None:
    assert markup.notice("<a>\nb") == ('<div class="notice" role="alert">&lt;a&gt;<br>b</div>')
    assert '">' not in markup.token('"><i>', "x", '"><i>', 0.5).partition(">")[2]
    assert markup.token("", "x", "").count("·") == 1
    assert "--s:100%" in markup.token("a", "x", "", 7.0)


def test_a_map_is_made_once_for_all_visitors(tiny_run: Path) -> None:
    page = shown.Shown(given.look([tiny_run]))
    drawn = page.maps["PCA"]()
    assert drawn == substrate.map_of(page.substrate()[0], "PCA")
    assert page.maps["PCA"]() is drawn


def test_what_is_loaded_once_is_loaded_again_after_an_error() -> None:
    calls: list[int] = []

    def make() -> int:
        calls.append(1)
        if len(calls) == 1:
            raise ConfigError([])
        return 7

    once = shown.Once(make)
    with pytest.raises(ConfigError):
        once()
    assert [once(), once(), len(calls)] == [7, 7, 2]


Ask = Callable[..., tuple[int, dict[str, str], str]]


def ask(
    gate: guard.Guard, path: str = "/", method: str = "GET", body: bytes = b"", **more: str
) -> Any:
    """Send one request through a guard; return status, headers and body."""
    path, _, query = path.partition("?")
    headers = {"host": "127.0.0.1:7860"} | {key.replace("_", "-"): more[key] for key in more}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": query.encode(),
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
        "client": ("127.0.0.1", 5),
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(gate(scope, receive, send))
    found = {k.decode(): v.decode() for k, v in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(m.get("body", b"") for m in sent[1:]).decode()


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what was received, or say that the other end has gone."""
    message = await receive()
    body = message.get("body", b"") if message["type"] == "http.request" else b"gone"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_a_page_for_this_machine_answers_this_machine_alone() -> None:
    gate = guard.Guard(behind)
    status, headers, _ = ask(gate)
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["x-frame-options"] == "DENY"
    assert ask(gate, host="evil.example:7860")[0] == 403  # a name that was pointed here
    assert ask(gate, host="localhost:1")[0] == 200
    assert ask(gate, origin="http://evil.example")[0] == 403
    assert ask(gate, origin="http://127.0.0.1:7860")[0] == 200
    assert ask(gate, method="DELETE")[0] == 405


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=/etc/passwd", "/gradio_api/upload", "/gradio_api/proxy=http://a.b/",
     "/gradio_api/call/x", "/file=/etc/passwd", "/docs", "/monitoring", "/login",
     "/assets/../../x", "/gradio_api/component_server"],
)  # fmt: skip
def test_doors_of_gradio_that_the_page_does_not_need_are_shut(path: str) -> None:
    assert ask(guard.Guard(behind), path)[0] == 404


def test_requests_are_limited_in_size_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = guard.Guard(behind)
    join = "/gradio_api/queue/join"
    assert ask(gate, join, "POST", content_length="70000")[0] == 413
    assert ask(gate, join, "POST", content_length="x")[0] == 400
    assert ask(gate, join, "POST", body=b"x" * 70000)[2] == "gone"  # said nothing of its size
    monkeypatch.setattr(guard, "PER_MINUTE", 3)
    gate = guard.Guard(behind)
    assert [ask(gate, join, "POST")[0] for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(gate)[0] == 200


def test_a_page_for_others_needs_its_token() -> None:
    token = "a-token-of-some-length"
    gate = guard.Guard(behind, hosts=(), token=token)
    assert ask(gate, host="lab.example")[0] == 401
    assert ask(gate, "/?token=wrong")[0] == 401
    assert ask(gate, cookie=f"{guard.COOKIE}=wrong")[0] == 401
    status, headers, _ = ask(gate, f"/?token={token}")
    assert (status, headers["location"]) == (303, "/")
    assert "HttpOnly" in headers["set-cookie"]
    assert "SameSite=Strict" in headers["set-cookie"]
    cookie = headers["set-cookie"].partition(";")[0]
    assert ask(gate, cookie=cookie, host="lab.example")[0] == 200


@pytest.mark.parametrize(
    ("host", "token", "words"),
    [("0.0.0.0", None, "0.0.0.0 can be reached by others: they need a token"),
     ("127.0.0.1", "short", "is too easy to guess"),
     ("0.0.0.0", "with spaces in the token", "letters, digits, - and _")],
)  # fmt: skip
def test_access_is_checked_before_anything_starts(host: str, token: str | None, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        app.check_access(host, token)
    app.check_access("127.0.0.1", None)
    app.check_access("0.0.0.0", "a-token-of-some-length")


def test_a_port_that_is_taken_and_a_host_that_is_not_here_are_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port: {number} cannot be had"):
            app.listen("127.0.0.1", number)
    with pytest.raises(ConfigError, match="--host: 'no such host' is no address"):
        app.listen("no such host", None)


def test_without_gradio_one_message_says_what_to_install(
    command: Command, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = lambda name, *rest: None if name == "gradio" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(app, "find_spec", absent)
    code, _, err = command("play", tiny_run)
    assert code == 2
    assert "not installed (in a clone of nacre: pip install -e '.[play]')" in err


def test_what_cannot_be_shown_ends_the_command(command: Command, tmp_path: Path) -> None:
    code, _, err = command("play", tmp_path / "gone")
    assert code == 2
    assert "there is no such folder" in err


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")
@pytest.mark.filterwarnings("ignore")  # Gradio's own, while it is imported
def test_every_option_of_a_rule_that_is_a_number_has_its_control() -> None:
    from nacre.play.tabs.compose import OPTIONS

    numbers = {
        option
        for name, options in RULES.items()
        if name not in TRAINED
        for option in options
        if isinstance(getattr(Rule, option), int | float)
    }
    assert set(OPTIONS) == numbers


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio")
@pytest.mark.filterwarnings("ignore")
def test_no_event_takes_back_what_a_person_typed(tiny_run: Path, pair: Path) -> None:
    """A stream writes its last values twice: by the second time, somebody may have typed."""
    import gradio as gr

    from nacre.play import page
    from nacre.play.shown import Shown

    async def build() -> gr.Blocks:
        return page.build(Shown(given.look([tiny_run, pair])))

    built = asyncio.run(build())  # without a loop that runs, Gradio leaves one open
    into = [fn for fn in built.fns.values() if any(isinstance(o, gr.Textbox) for o in fn.outputs)]
    assert len(into) == 2
    for fn in into:
        assert not fn.types_generator
        assert all(not o.interactive for o in fn.outputs if isinstance(o, gr.Textbox))
