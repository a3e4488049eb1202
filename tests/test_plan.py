from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from nacre import config
from nacre.errors import ConfigError
from nacre.growth import plan as plans
from nacre.growth.plan import Plan, Stage

STAGE = {"add_blocks": 1, "tokens": "1M"}


def make(**parts: Any) -> Plan:
    return plans.parse({"stages": [STAGE], **parts})


def messages(**parts: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(**parts)
    return [str(problem) for problem in caught.value.problems]


# --- numbers ---


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("1.5M", 1_500_000),
        ("1.5m", 1_500_000),
        (" 20 k ", 20_000),
        ("2_000_000", 2_000_000),
        ("3e6", 3_000_000),
        ("1.1e+4", 11_000),
        ("68.9B", 68_900_000_000),
        ("2T", 2 * 10**12),
        (4096, 4096),
        (4096.0, 4096),
    ],
)
def test_a_count_may_have_a_suffix(written: object, number: int) -> None:
    assert make(stages=[{"add_blocks": 1, "tokens": written}]).stages[0].tokens == number


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("1.5X", "expected a number such as 500k, 1.5M or 2_000_000, got '1.5X'"),
        ("-5k", "expected a number such as 500k, 1.5M or 2_000_000, got '-5k'"),
        ("", "expected a number such as 500k, 1.5M or 2_000_000, got ''"),
        ("1.M", "expected a number such as 500k, 1.5M or 2_000_000, got '1.M'"),
        ("1e999", "expected a number such as 500k, 1.5M or 2_000_000, got '1e999'"),
        ("300.5", "expected a whole number, got '300.5'"),
        ("1.0005k", "expected a whole number, got '1.0005k'"),
        (300.5, "expected a whole number, got 300.5"),
        (0, "input should be greater than 0, got 0"),
        ("1e30", "input should be less than or equal to 1000000000000000000, got '1e30'"),
        (True, "true, false, yes and no are not allowed here, got True"),
        (None, "expected a whole number, got None"),
        (math.inf, "expected a finite number, got inf"),
    ],
)
def test_nonsense_is_no_count(written: object, message: str) -> None:
    found = messages(stages=[{"add_blocks": 1, "tokens": written}])
    assert found == [f"stages[0].tokens: {message}"]


@pytest.mark.parametrize(("written", "choice"), [("on", "on"), ("off", "off"), ("true", "on")])
def test_words_that_yaml_reads_as_booleans_are_words_where_they_are_allowed(
    written: str, choice: str
) -> None:
    given = yaml.safe_load(
        f"stages: [{{add_blocks: 1, tokens: 8k}}]\ntraining: {{compile: {written}}}"
    )
    assert plans.parse(given).training.compile == choice


# --- derived sizes ---


@pytest.mark.parametrize(
    ("width", "heads"), [(1024, 16), (256, 4), (128, 4), (32, 1), (100, 2), (300, 3), (66, 1)]
)
def test_heads_follow_from_the_width(width: int, heads: int) -> None:
    assert make(model={"width": width}).model.head_count == heads


@given(st.integers(4, 2000).map(lambda half: 2 * half))
def test_any_even_width_needs_nothing_else(width: int) -> None:
    model = make(model={"width": width}).model
    assert width % (2 * model.head_count) == 0


def test_mlp_width() -> None:
    assert make(model={"width": 1024}).model.mlp_width == 2752  # ceil(8192 / 3 / 64) * 64
    assert make(model={"width": 24}).model.mlp_width == 64
    assert make(model={"width": 1024, "family": "gpt_neox"}).model.mlp_width == 4096
    assert make(model={"width": 1024, "mlp": 100}).model.mlp_width == 100


@pytest.mark.parametrize(
    ("options", "trunk"),
    [
        ({}, 6),
        ({"train": "all"}, 0),
        ({"train": {"blocks": "2-3"}}, 2),
        ({"train": {"blocks": 4}}, 4),
        ({"train": "0-5"}, 0),
        ({"add_blocks": 2, "under": 2}, 4),
        ({"add_blocks": 2, "under": 5, "train": {"blocks": 3}}, 1),
    ],
)
def test_a_trunk_ends_under_the_lowest_block_that_trains(options: dict, trunk: int) -> None:
    assert Stage(tokens=1, **options).trunk_depth(6) == trunk


def test_a_stage_may_have_a_schedule_of_its_own() -> None:
    own = {"lr": 0.5, "schedule": "constant", "warmup": 0.0}
    plan = plans.parse({"training": {"clip": 3.0}, "stages": [STAGE, STAGE | own]})
    assert plan.training_of(plan.stages[0]) == plan.training
    training = plan.training_of(plan.stages[1])
    assert training.model_dump() == plan.training.model_dump() | own


def test_depth_is_what_the_stages_add() -> None:
    stages = [{"add_blocks": 2, "tokens": "1M"}, {"tokens": "1M", "lora": {}}, STAGE]
    assert make(stages=stages).depth == 3


# --- problems ---


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"modle": {}}, "modle: unknown key (did you mean 'model'?)"),
        ({"model": {"widht": 1}}, "model.widht: unknown key (did you mean 'width'?)"),
        (
            {"stages": [{**STAGE, "lora": {"ran": 3}}]},
            "stages[0].lora.ran: unknown key (did you mean 'rank'?)",
        ),
        ({"substrate": {"fond": "x"}}, "substrate.fond: unknown key (did you mean 'font'?)"),
        ({"form": "x"}, "form: unknown key (did you mean 'from'?)"),
        (
            {"stages": []},
            "stages: a plan needs at least one stage (e.g. - {add_blocks: 2, tokens: 1M})",
        ),
        ({"stages": None}, "stages: expected a list, got None"),
        (
            {"model": {"width": 100, "heads": 3}},
            "model.heads: 3 does not divide model.width (100) (nearest that does: 2)",
        ),
        (
            {"model": {"width": 96, "heads": 32}},
            "model.heads: gives an odd head size, 3 "
            "(rotary positions need an even one: change model.heads or model.width)",
        ),
        (
            {"model": {"width": 33}},
            "model.width: gives an odd head size, 33 "
            "(rotary positions need an even one: change model.heads or model.width)",
        ),
        (
            {"stages": [{"add_blocks": 1, "tokens": 255}]},
            "stages[0].tokens: 255 is less than one batch of 4096 "
            "(raise tokens or lower training.batch_tokens)",
        ),
        (
            {"training": {"batch_tokens": 1000}},
            "training.batch_tokens: 1000 is not a multiple of model.context (256) (nearest: 1024)",
        ),
        (
            {"training": {"batch_tokens": 10}},
            "training.batch_tokens: 10 is not a multiple of model.context (256) "
            "(nearest: 256, or a shorter model.context)",
        ),
        (
            {"training": {"micro_batch_tokens": 300}},
            "training.micro_batch_tokens: 300 must be a multiple of model.context and divide "
            "training.batch_tokens (e.g. 256)",
        ),
        (
            {"training": {"micro_batch_tokens": 768}},
            "training.micro_batch_tokens: 768 must be a multiple of model.context and divide "
            "training.batch_tokens (e.g. 256)",
        ),
        (
            {"training": {"micro_batch_tokens": 8192}},
            "training.micro_batch_tokens: 8192 must be a multiple of model.context and divide "
            "training.batch_tokens (e.g. 256)",
        ),
        (
            {"stages": [{"tokens": "1M", "lora": {}}]},
            "stages[0]: adds no blocks, but there is no trunk yet "
            "(the first stage must add blocks)",
        ),
        (
            {"stages": [{"tokens": "1M"}]},
            "stages[0]: adds no blocks, but there is no trunk yet "
            "(the first stage must add blocks)",
        ),
        (
            {"stages": [STAGE, {"tokens": "1M"}]},
            "stages[1]: adds no blocks and has no lora "
            "(set add_blocks, or lora: {rank: 16} or train: all to readjust the trunk)",
        ),
        (
            {"training": {"schedule": "cosine"}, "stages": [{**STAGE, "budget": "auto"}]},
            "stages[0].budget: auto, but a cosine has to know its end "
            "(use schedule: wsd or constant)",
        ),
        (
            {"stages": [STAGE, {"tokens": "1M", "train": {"blocks": "2-0"}}]},
            "stages[1].train: expected crown, all, or blocks from the lowest up such as "
            "{blocks: 0-2}, got {'blocks': '2-0'}",
        ),
        (
            {"stages": [STAGE, {"tokens": "1M", "train": {"blocks": "0-1"}}]},
            "stages[1].train: blocks 0-1, but those below are 0 to 0 (new blocks train anyway)",
        ),
        (
            {"stages": [STAGE, {"tokens": "1M", "train": "all", "lora": {}}]},
            "stages[1].train: all, but lora adapts blocks that stay frozen "
            "(leave train or lora out)",
        ),
        (
            {"stages": [STAGE, {"tokens": "1M", "train": "all", "trunk": "cache"}]},
            "stages[1].trunk: cache, but no block stays frozen under those that train "
            "(leave trunk out)",
        ),
        (
            {"stages": [STAGE, {**STAGE, "under": 2}]},
            "stages[1].under: 2, but there are 1 blocks below (at most 1)",
        ),
        (
            {"stages": [STAGE, {"tokens": "1M", "lora": {}, "under": 1}]},
            "stages[1].under: there are no new blocks to go under any "
            "(set add_blocks, or re-open the last blocks with train: {blocks: ...})",
        ),
        (
            {"from": "x", "stages": [{"tokens": "1M"}]},
            "stages[0]: adds no blocks and has no lora "
            "(set add_blocks, or lora: {rank: 16} or train: all to readjust the trunk)",
        ),
        (
            {"model": {"width": 8192}},
            "model.width: 8192 is more than the 4096 numbers a glyph row can have "
            "(substrate.kind: code has no such limit)",
        ),
        (
            {"model": {"width": 8192}, "tokenizer": {"path": "x"}},
            "model.width: 8192 is more than the 4096 numbers a glyph row can have "
            "(substrate.kind: code has no such limit)",
        ),
        (
            {"substrate": {"kind": "code", "bits": 8}},
            "substrate.bits: 8 bits number 256 tokens, the vocabulary has 4,096 (use at least 12)",
        ),
        (
            {"substrate": {"kind": "code", "bits": 12}},
            "model.width: 256 is not a multiple of the 12 bits of the code "
            "(the nearest that are: 252 or 264)",
        ),
        (
            {"substrate": {"font": "/none.ttf"}},
            "substrate.font: /none.ttf: no such file (give the path of a .ttf or .otf file)",
        ),
        (
            {"substrate": {"seed": True}},
            "substrate.seed: true, false, yes and no are not allowed here, got True",
        ),
        (
            {"substrate": {"kind": "glyf"}},
            "substrate.kind: input should be 'glyph', 'code', 'random' or 'trained', got 'glyf' "
            "(did you mean 'glyph'?)",
        ),
        (
            {"model": {"family": "lama"}},
            "model.family: input should be 'llama' or 'gpt_neox', got 'lama' "
            "(did you mean 'llama'?)",
        ),
        (
            {"tokenizer": {"size": 100}},
            "tokenizer.size: input should be greater than or equal to 512, got 100",
        ),
        (
            {"training": {"lr": math.nan}},
            "training.lr: expected a finite number, got nan",
        ),
        ({"training": {"lr": -1}}, "training.lr: input should be greater than 0, got -1"),
        ({"training": {"warmup": 1}}, "training.warmup: input should be less than 1, got 1"),
        ({"training": {"betas": [0.9]}}, "training.betas[1]: is required"),
        (
            {"data": {"sources": []}},
            "data.sources: tuple should have at least 1 item after validation, not 0, got []",
        ),
        ({"data": {"sources": "a.txt"}}, "data.sources: expected a list, got 'a.txt'"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1"),
        ({"stages": [{**STAGE, "lora": 5}]}, "stages[0].lora: expected a mapping of keys to "
         "values, got 5"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_message(parts: dict, message: str) -> None:
    assert messages(**parts) == [message]


def test_five_mistakes_are_five_lines_of_one_message() -> None:
    data = {
        "modle": {},
        "model": {"width": 100, "heads": 3, "context": 32},
        "training": {"batch_tokens": 1000, "lr": "fast"},
        "stages": [{"add_blocks": 1}],
    }
    with pytest.raises(ConfigError) as caught:
        plans.parse(data, where="my.yaml")
    assert str(caught.value).splitlines() == [
        "my.yaml: 5 problems",
        "  - training.lr: expected a number, got 'fast'",
        "  - stages[0].tokens: is required",
        "  - modle: unknown key (did you mean 'model'?)",
        "  - model.heads: 3 does not divide model.width (100) (nearest that does: 2)",
        "  - training.batch_tokens: 1000 is not a multiple of model.context (32) (nearest: 992)",
    ]


@pytest.mark.parametrize(
    "parts",
    [
        {"model": {"width": "x", "heads": 3}},
        {"model": {"context": "x"}, "training": {"batch_tokens": 100, "micro_batch_tokens": 7}},
        {"training": {"batch_tokens": "x"}, "stages": [{"add_blocks": 1, "tokens": 100}]},
        {"stages": [{"add_blokcs": 1, "tokens": "1M"}, {"tokens": "1M", "lora": {}}]},
        {"substrate": {"kind": "code", "bits": "x"}, "model": {"width": 1001, "heads": 7.5}},
        {"stages": ["x", {"tokens": "1M", "lora": {}}]},
        {"form": "x", "stages": "x"},
    ],
)
def test_a_mistake_does_not_draw_others_after_it(parts: dict) -> None:
    wrong = (
        "width",
        "context",
        "batch_tokens",
        "add_blokcs",
        "bits",
        "heads",
        "stages[0]",
        "form",
        "stages",
    )
    assert all(text.split(":")[0].endswith(wrong) for text in messages(**parts))
    assert not any("does not divide" in text or "multiple" in text for text in messages(**parts))
    assert not any("no trunk" in text for text in messages(**parts))


def test_a_saved_substrate_is_not_judged_by_the_recipe() -> None:
    make(substrate={"path": "saved"}, model={"width": 8192})


def test_a_plan_that_grows_a_checkpoint_may_begin_with_lora() -> None:
    plan = make(**{"from": "x", "stages": [{"tokens": "1M", "lora": {}}]})
    assert plan.start_from == "x"


# --- files, recipes, settings ---


def test_load_reads_a_file_and_applies_settings(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("stages: [{add_blocks: 2, tokens: 40k}]\n")
    plan = plans.load(path, ["model.width=128", "stages.0.tokens=1M", "training.lr=3e-4"])
    assert (plan.model.width, plan.stages[0].tokens, plan.training.lr) == (128, 10**6, 3e-4)
    with pytest.raises(ConfigError, match=rf"^{path}: model\.widht: unknown key"):
        plans.load(path, ["model.widht=128"])


def test_load_finds_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a run that has a recipe's name
    assert plans.load("tiny") == plans.load(plans.recipes()["tiny"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinny", "plan: no file or recipe named 'tinny' (did you mean 'tiny'?)"),
        ("none.yaml", "none.yaml: no such file"),
    ],
)
def test_load_of_an_unknown_name(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plans.load(name)
    assert str(caught.value) == message


def test_a_run_is_no_plan_but_holds_one(run: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        plans.load(run)
    assert str(caught.value) == f"plan: {run} is a folder, not a plan (its plan is {run}/plan.yaml)"


def test_an_unlike_name_lists_the_recipes() -> None:
    with pytest.raises(ConfigError, match=r"recipes: paper-16-code, .*, small, tiny\)"):
        plans.load("zzzzzz")


def test_the_recipes_are_there() -> None:
    arms = {f"paper-{shape}-{kind}" for shape in ("9x3", "mono") for kind in
            ("glyph", "code", "trained")}  # fmt: skip
    assert set(plans.recipes()) == {"tiny", "small", "paper-abs-6", "paper-16-code"} | arms


@pytest.mark.parametrize("name", plans.recipes())
def test_every_recipe_is_a_plan_without_dead_options(name: str) -> None:
    plan = plans.load(name)
    assert plan.name == name
    assert plans.warnings(plan) == []
    read = {s for sources in (plan.data, *plan.stages) for s in sources.sources or ()}
    assert all("@" in source for source in read if source.startswith("hf:")), "a part, not all"


def test_paper_recipes_say_what_the_papers_say() -> None:
    for name in ("glyph", "code", "trained"):
        grown, whole = plans.load(f"paper-9x3-{name}"), plans.load(f"paper-mono-{name}")
        assert [stage.add_blocks for stage in grown.stages] == [3, 3, 3]
        assert [stage.add_blocks for stage in whole.stages] == [9]
        assert sum(s.tokens for s in grown.stages) == whole.stages[0].tokens
        same = {"substrate", "tokenizer", "model", "data", "training"}
        assert grown.model_dump(include=same) == whole.model_dump(include=same)
        assert (grown.model.width, grown.model.heads, grown.model.context) == (1024, 32, 1024)
        assert (grown.model.mlp_width, grown.tokenizer.size) == (4096, 65_536)
        assert grown.substrate.kind == name
    series = plans.load("paper-abs-6")
    assert [stage.add_blocks for stage in series.stages] == [1] * 6
    assert [stage.lora is not None for stage in series.stages] == [False] * 4 + [True] * 2
    assert (series.model.width, series.model.heads) == (4096, 32)
    assert series.tokenizer.size == 131_072
    long = plans.load("paper-16-code")
    assert (long.depth, sum(stage.tokens for stage in long.stages)) == (16, 68_900_000_000)
    assert [stage.add_blocks for stage in long.stages if stage.lora] == [0]


# --- warnings ---


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, []),
        (
            {"substrate": {"kind": "code", "fit": "vocabulary", "seed": 3}},
            [
                "substrate.fit has no effect with substrate.kind: code",
                "substrate.seed has no effect with substrate.kind: code",
            ],
        ),
        (
            {"substrate": {"bits": 16}},
            ["substrate.bits has no effect with substrate.kind: glyph"],
        ),
        (
            {"substrate": {"path": "x", "kind": "code"}},
            ["substrate.kind has no effect with substrate.path"],
        ),
        (
            {"tokenizer": {"path": "x", "size": 600, "alphabet": "bmp"}},
            [
                "tokenizer.size has no effect with tokenizer.path",
                "tokenizer.alphabet has no effect with tokenizer.path",
            ],
        ),
        (
            {"from": "x", "model": {"width": 64, "context": 64}, "tokenizer": {"path": "x"}},
            ["model.width has no effect with from: the checkpoint decides"],
        ),
        (
            {"from": "x", "substrate": {"kind": "code"}, "tokenizer": {"size": 600}},
            [
                "substrate.kind has no effect with from: the checkpoint decides",
                "tokenizer.size has no effect with from: the checkpoint decides",
            ],
        ),
        (
            {"stages": [{**STAGE, "lora": {}, "init": "copy"}]},
            [
                "stages[0].lora has no effect: there is no trunk to adapt yet",
                "stages[0].init: copy has no effect: there is no block to copy yet",
            ],
        ),
        (
            {"stages": [{**STAGE, "train": "all"}]},
            ["stages[0].train has no effect: there is no trunk to re-open yet"],
        ),
        (
            {"stages": [STAGE, {"tokens": "1M", "lora": {}, "init": "zero"}]},
            ["stages[1].init has no effect without add_blocks"],
        ),
        (
            {"stages": [{"add_blocks": 1, "tokens": 4096 * 101, "patience": 2}]},
            ["stages[0].patience has no effect: the stage ends after 2 evaluations"],
        ),
        ({"stages": [{"add_blocks": 1, "tokens": 4096 * 101, "patience": 1}]}, []),
        (
            {"stages": [{"add_blocks": 1, "tokens": 4096 * 101, "budget": "auto"}]},
            [
                "stages[0].budget: auto has no effect: the stage ends after 2 evaluations, and 4 "
                "are needed to tell"
            ],
        ),
    ],
)
def test_an_option_without_effect_is_named(parts: dict, expected: list[str]) -> None:
    assert plans.warnings(make(**parts)) == expected


def test_a_resolved_plan_warns_as_little_as_the_plan_it_came_from(tmp_path: Path) -> None:
    plan = make(stages=[STAGE, {"tokens": "1M", "lora": {}}])
    config.write_yaml(plan, tmp_path / "plan.yaml")
    assert plans.warnings(plans.load(tmp_path / "plan.yaml")) == plans.warnings(plan) == []


# --- fingerprint, round trip, junk ---


def changes() -> list[str]:
    return [
        "seed=1",
        "from=x",
        "substrate.kind=code",
        "substrate.seed=1",
        "tokenizer.size=600",
        "data.holdout=0.1",
        "data.sources=[x]",
        "model.width=128",
        "training.lr=1",
        "training.save_every=7",
        "stages.0.add_blocks=2",
        "stages.0.tokens=2M",
        "stages.1.lora.rank=3",
        "stages.1.init=copy",
        "stages.1.under=1",
        "stages.1.schedule=constant",
        "stages.1.budget=auto",
        "stages.1.sources=[x]",
        "stages.1.patience=3",
    ]


TWO = {"stages": [STAGE, {"add_blocks": 1, "tokens": "1M", "lora": {}}]}


def test_a_fingerprint_is_of_everything_but_the_name() -> None:
    plain = plans.parse(TWO).fingerprint()
    assert plans.parse({**TWO, "name": "other"}).fingerprint() == plain
    others = {plans.parse(config.override(TWO, [change])).fingerprint() for change in changes()}
    assert len(others | {plain}) == len(changes()) + 1


def test_how_a_step_is_computed_does_not_count() -> None:
    plain = plans.parse(TWO).fingerprint()
    for change in (
        "micro_batch_tokens=256", "gradient_checkpointing=true", "compile=off", "shard=crown",
    ):  # fmt: skip
        other = plans.parse(config.override(TWO, [f"training.{change}"]))
        assert other.fingerprint() == plain, change


def test_a_fingerprint_of_the_first_stages_leaves_out_the_later_ones() -> None:
    one, two = make(), plans.parse(TWO)
    assert two.fingerprint(1) == one.fingerprint(1) == one.fingerprint()
    assert two.fingerprint(2) == two.fingerprint() != two.fingerprint(1)
    later = plans.parse(config.override(TWO, ["stages.1.tokens=2M"]))
    assert later.fingerprint(1) == two.fingerprint(1)


def test_equal_plans_written_differently_have_one_fingerprint() -> None:
    stages = [{"tokens": 10**6, "add_blocks": 1, "init": "random"}]
    assert make(stages=stages).fingerprint() == make().fingerprint()


@pytest.mark.parametrize("change", changes())
def test_dump_and_load_give_the_same_plan(tmp_path: Path, change: str) -> None:
    plan = plans.parse(config.override(TWO, [change]))
    config.write_yaml(plan, tmp_path / "plan.yaml")
    again = plans.load(tmp_path / "plan.yaml")
    assert again == plan
    assert again.fingerprint() == plan.fingerprint()


FIELDS = sorted(
    {name for kind in (Plan, plans.SubstrateSource, plans.Tokenizer, plans.Data, plans.Model,
                       plans.Training, plans.Lora, plans.Stage) for name in kind.model_fields}
    | {"from", "x"}
)  # fmt: skip
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 5000)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["1M", "code", "zero", "trained", "1e9", "gpt_neox", "1_", "²", "٣k"])
    | st.dates()
    | st.binary(max_size=2)
)
KEYS = st.sampled_from(FIELDS) | st.text(max_size=3) | st.integers() | st.none() | st.booleans()
JUNK = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=6)
        | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6)
    ),
    max_leaves=15,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS) | KEYS, JUNK, max_size=8))
def test_junk_is_a_plan_or_a_config_error(data: dict) -> None:
    found: list[str] = []
    try:
        plans.warnings(plans.parse(data))
    except ConfigError as error:
        found = list(map(str, error.problems))
    assert len(found) == len(set(found))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | JUNK.map(lambda junk: yaml.dump(junk)))
def test_any_text_is_a_mapping_or_a_config_error(tmp_path_factory: Any, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "junk.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = ""
    try:
        assert isinstance(config.read_yaml(path), dict)
    except ConfigError as error:
        message = str(error)
    assert not message or message.startswith(str(path))


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_setting_is_taken_or_refused(setting: str) -> None:
    with contextlib.suppress(ConfigError):
        plans.parse(config.override({"stages": [STAGE]}, [setting]))


@pytest.mark.parametrize("text", ["x" * 300, "a\0b", "a/" * 3000])
def test_what_is_no_path_is_refused(text: str) -> None:
    stages = [{"add_blocks": 1, "tokens": "1M"}]
    given = {"from": text, "tokenizer": {"path": f"hf:{text}"}, "substrate": {"path": text}}
    with pytest.raises(ConfigError) as caught:
        plans.parse({"stages": stages, **given})
    said = {problem.field: problem.message for problem in caught.value.problems}
    assert said.keys() == {"from", "tokenizer.path", "substrate.path"}
    assert all(message.startswith("is not the path of a file") for message in said.values())
    with pytest.raises(ConfigError, match=r"^plan: .* is no path of a file$"):
        plans.load(text)


def test_sizes_have_bounds() -> None:
    stages = [{"add_blocks": 600, "tokens": "1M"}, {"add_blocks": 600, "tokens": "1M"}]
    with pytest.raises(ConfigError, match="stages: add 1,200 blocks in all, a model may have 1,02"):
        plans.parse({"stages": stages})
    huge = {"heads": 2**25, "mlp": 10**18, "context": 10**30}
    with pytest.raises(ConfigError) as caught:
        plans.parse({"seed": 2**63, "model": huge, "stages": stages[:1]})
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"seed", "model.heads", "model.mlp", "model.context"}


def test_a_recipe_that_grows_a_checkpoint_leaves_out_what_that_decides(tmp_path: Path) -> None:
    plan = plans.load("small", ["from=x", "model.width=64"])
    assert plans.warnings(plan) == ["model.width has no effect with from: the checkpoint decides"]
    assert plan.model.context == plans.load("small").model.context == 256
    own = tmp_path / "own.yaml"
    own.write_text(plans.find("small", "plan").read_text(encoding="utf-8"), encoding="utf-8")
    said = "model.heads has no effect with from: the checkpoint decides"
    assert plans.warnings(plans.load(own, ["from=x"])) == [said]


@pytest.mark.parametrize(
    ("micro", "processes", "windows"),
    [(None, 1, 96), (None, 16, 6), (4, 1, 4), (4, 16, 3), (4, 32, 3), (4, 96, 1), (96, 96, 1)],
)
def test_a_process_runs_its_part_of_a_batch_in_equal_passes(
    micro: int | None, processes: int, windows: int
) -> None:
    tokens = micro and micro * 256
    training = plans.Training(batch_tokens=96 * 256, micro_batch_tokens=tokens)
    assert training.forward_windows(256, processes) == windows


def test_a_stage_reads_its_own_sources_else_the_plans() -> None:
    stages = [
        {"add_blocks": 1, "tokens": 8192},
        {"add_blocks": 1, "tokens": 8192, "sources": ["b"]},
    ]
    plan = plans.parse({"data": {"sources": ["a"]}, "stages": stages})
    assert [plan.sources_of(stage) for stage in plan.stages] == [("a",), ("b",)]
