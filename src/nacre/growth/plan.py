"""A plan: the whole growth as data. No model is built here and no file is read but the plan's.

A plan is a tuple of stages over one substrate, one tokenizer, one model shape and one corpus.
Monolithic (end-to-end) training is a plan with one stage.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    Field,
    PositiveFloat,
    PositiveInt,
)

from nacre.config import Section, override, read_yaml, validate
from nacre.errors import ConfigError, Problem, nearest
from nacre.substrate import SubstrateRecipe, check_recipe
from nacre.substrate.table import EFFECTIVE
from nacre.untrusted import LARGEST_DEPTH, is_path

_SUFFIX = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
LARGEST_COUNT = 10**18
LARGEST_SIZE = 2**24
"""Of one side of a weight, and of a context: far above those of any model."""


def _count(value: object) -> object:
    """Read `1.5M`, `20k`, `3e6` or a plain number as a whole number."""
    if not isinstance(value, str):
        return value
    pattern = r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([kmbt]?)"
    match = re.fullmatch(pattern, value.strip().lower())
    if match is None:
        raise ValueError("expected a number such as 500k, 1.5M or 2_000_000")
    number = Decimal(match[1].replace("_", "")) * _SUFFIX[match[2]]
    if number != number.to_integral_value():
        raise ValueError("expected a whole number")
    return int(number)


def _trained(value: object) -> object:
    """Read what a stage trains: `crown`, `all`, or blocks as `{blocks: 0-2}`, kept as `0-2`."""
    if isinstance(value, Mapping):
        named = cast("Mapping[str, object]", value)
        value = named["blocks"] if list(named) == ["blocks"] else dict(named)
    span = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", str(value))
    if span is not None and int(span[1]) <= int(span[2] or span[1]):
        return str(value)
    if value not in ("crown", "all"):
        raise ValueError("expected crown, all, or blocks from the lowest up such as {blocks: 0-2}")
    return value


def _place(value: str) -> str:
    if not is_path(value.removeprefix("hf:")):
        raise ValueError("is not the path of a file or a name")
    return value


Place = Annotated[str, AfterValidator(_place)]
Count = Annotated[int, BeforeValidator(_count), Field(gt=0, le=LARGEST_COUNT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Size = Annotated[int, Field(gt=0, le=LARGEST_SIZE)]
Blocks = Annotated[int, Field(ge=0, le=LARGEST_DEPTH)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class SubstrateSource(Section, SubstrateRecipe):
    """How to make the substrate, or a saved one to stand on as it is."""

    path: Place | None = Field(
        default=None, description="a folder that `nacre substrate build` wrote"
    )

    @property
    def recipe(self) -> SubstrateRecipe:
        """The recipe alone."""
        return SubstrateRecipe(**self.model_dump(include=set(SubstrateRecipe.model_fields)))


class Tokenizer(Section):
    """Where the tokenizer comes from: built from the corpus, or an existing one."""

    path: Place | None = Field(
        default=None, description="a tokenizer folder, or hf:NAME; none: build one"
    )
    size: Annotated[int, Field(ge=512, le=131_072)] = 4096
    alphabet: Literal["corpus", "bmp"] = "corpus"


class Data(Section):
    """What is read, and how much of it is held out."""

    sources: tuple[str, ...] = Field(default=("default",), min_length=1)
    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.02
    errors: Literal["strict", "replace"] = "strict"
    order: Literal["continue", "restart"] = Field(
        default="continue",
        description="where a stage starts to read: where the one below stopped, or from the start",
    )


class Model(Section):
    """The shape of every block. Heads and MLP width follow from the width unless given."""

    family: Literal["llama", "gpt_neox"] = "llama"
    width: Annotated[int, Field(ge=8, le=65_536)] = 256
    heads: Size | None = None
    mlp: Size | None = None
    context: Annotated[int, Field(ge=8, le=LARGEST_SIZE)] = 256

    @property
    def head_count(self) -> int:
        """Attention heads: as given, else heads of 64 channels (of 32 below a width of 256).

        Where these do not divide the width into even parts, the next smaller number that does.
        """
        wanted = max(1, self.width // (64 if self.width >= 256 else 32))
        fitting = (n for n in range(wanted, 0, -1) if self.width % (2 * n) == 0)
        return self.heads or next(fitting, 1)

    @property
    def mlp_width(self) -> int:
        """MLP width: as given, else 4x (`gpt_neox`), or 8/3 rounded up to a multiple of 64."""
        if self.mlp:
            return self.mlp
        return 4 * self.width if self.family == "gpt_neox" else -(-self.width * 8 // 3 // 64) * 64


Schedule = Literal["cosine", "wsd", "constant"]


class Training(Section):
    """How a stage is trained; a stage may override learning rate, schedule and warm-up."""

    batch_tokens: Count = Field(default=4096, description="tokens per optimizer step")
    micro_batch_tokens: Count | None = Field(
        default=None, description="tokens per forward pass; default: all"
    )
    lr: PositiveFloat = 1e-3
    schedule: Schedule = "wsd"
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    clip: PositiveFloat = 1.0
    nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="a step whose loss or gradient is not finite: end, or leave out"
    )
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    shard: Literal["none", "crown", "all"] = Field(
        default="none", description="what several processes hold a part of each, instead of all"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="compile blocks and head; auto: on CUDA, in stages of 1,000 steps or more",
    )
    evaluate_every: PositiveInt = Field(default=50, description="steps between evaluations")
    validation_tokens: Count = 32_768
    save_every: PositiveInt = Field(default=200, description="steps between saved states")

    @property
    def forward_tokens(self) -> int:
        """The most tokens of one forward pass."""
        return self.micro_batch_tokens or self.batch_tokens

    def forward_windows(self, context: int, processes: int) -> int:
        """Return the windows of one forward pass: each process runs its part in equal passes."""
        share = self.batch_tokens // context // processes
        most = min(share, max(1, self.forward_tokens // context))
        return next(windows for windows in range(most, 0, -1) if share % windows == 0)


HOW = ("shard", "micro_batch_tokens", "gradient_checkpointing", "compile")
"""Fields of `training` that change no step but for the order in which it is summed."""

TrunkMode = Literal["auto", "recompute", "cache"]


class Trunk(Section):
    """How the frozen blocks under a stage run, see `nacre.growth.trunk`."""

    mode: TrunkMode = Field(
        default="auto", description="run it for every batch, read its outputs, or what is cheaper"
    )
    weights: Literal["auto", "int8", "fp8"] = Field(
        default="auto", description="their precision; auto: that of training"
    )
    cache_dtype: Literal["auto", "fp32", "bf16", "fp8"] = Field(
        default="auto", description="of cached outputs; auto: as they come, nothing is lost"
    )
    cache_disk: ByteSize | None = Field(
        default=None, description="the most a cache may take; default: half of what is free"
    )


class Lora(Section):
    """Low-rank adaptation of the whole trunk during a stage, merged at its end (Hu et al. 2021)."""

    rank: Size = 16
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0


class Stage(Section):
    """One growth step: add blocks (or none), train the crown (and LoRA over the trunk), freeze.

    `train` re-opens blocks besides the crown for this stage: some of the trunk while the others
    stay frozen (block-coordinate training, as BAdam, Luo et al. 2024), or all of it. `under` puts
    new blocks under the last ones, which go on training (a global head, as SegProp).
    """

    add_blocks: Blocks = 0
    under: Blocks = Field(
        default=0, description="how many of the last blocks stay above the new ones and train on"
    )
    tokens: Count
    budget: Literal["tokens", "auto"] = Field(
        default="tokens", description="auto: end before, when a new stage is foretold to gain more"
    )
    init: Literal["random", "copy", "zero"] = "random"
    train: Annotated[str, BeforeValidator(_trained)] = Field(
        default="crown", description="crown, all, or {blocks: 0-2}: what of the trunk trains too"
    )
    lora: Lora | None = None
    lr: PositiveFloat | None = None
    schedule: Schedule | None = None
    warmup: Fraction | None = None
    sources: tuple[str, ...] | None = Field(default=None, min_length=1)
    trunk: TrunkMode | None = Field(default=None, description="default: the plan's trunk.mode")
    patience: PositiveInt | None = Field(
        default=None, description="end the stage after this many evaluations without improvement"
    )

    @property
    def reopened(self) -> range:
        """The blocks of the trunk, from 0, that `train` names."""
        if not self.train[0].isdecimal():
            return range(0)
        first, _, last = self.train.partition("-")
        return range(int(first), int(last or first) + 1)

    def steps(self, batch_tokens: int) -> int:
        """Return the optimizer steps of the stage if nothing ends it early."""
        return max(1, round(self.tokens / batch_tokens))

    def trunk_depth(self, depth: int) -> int:
        """Return how many of the `depth` blocks below form the stage's trunk.

        Those are the blocks under the lowest that trains: no gradient reaches them.
        """
        if self.train == "all":
            return 0
        return max(0, min(depth - self.under, self.reopened.start if self.reopened else depth))


class Plan(Section):
    """The whole growth as data."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = "unnamed"
    seed: Seed = 0
    start_from: Place | None = Field(default=None, alias="from", description="a checkpoint to grow")
    substrate: SubstrateSource = SubstrateSource()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    model: Model = Model()
    training: Training = Training()
    trunk: Trunk = Trunk()
    stages: tuple[Stage, ...]

    @property
    def depth(self) -> int:
        """Blocks that this plan adds over all stages."""
        return sum(stage.add_blocks for stage in self.stages)

    def sources_of(self, stage: Stage) -> tuple[str, ...]:
        """Return what a stage reads: its own sources, else the plan's."""
        return stage.sources or self.data.sources

    def training_of(self, stage: Stage) -> Training:
        """Return how a stage is trained: the plan's `training` with what is the stage's own."""
        own = {name: getattr(stage, name) for name in ("lr", "schedule", "warmup")}
        given = {name: value for name, value in own.items() if value is not None}
        return self.training.model_copy(update=given)

    def identity(self, stages: int | None = None) -> dict[str, Any]:
        """Return what decides the run's weights, as plain JSON; of its first `stages` if given.

        The name does not count, nor what only says how a step is computed (`HOW`), nor how a trunk
        runs where it gives the same outputs either way: unless a cache keeps fewer bits than the
        trunk computes.
        """
        data = self.model_dump(mode="json", by_alias=True, exclude={"name"})
        data["stages"] = data["stages"][:stages]
        del data["trunk"]["cache_disk"]
        for name in HOW:
            del data["training"][name]
        if self.trunk.cache_dtype in ("auto", "fp32"):
            del data["trunk"]["mode"]
            for stage in data["stages"]:
                del stage["trunk"]
        return data

    def fingerprint(self, stages: int | None = None) -> str:
        """Return the SHA-256 (hex) of `identity`."""
        data = json.dumps(self.identity(stages), sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()


def recipes(folder: str = "") -> dict[str, Path]:
    """Return the plans that come with nacre, by name, or what is in a `folder` of the recipes."""
    packaged = Path(str(resources.files("nacre"))) / "recipes"
    root = packaged if packaged.is_dir() else Path(__file__).parents[3] / "recipes"
    return {path.stem: path for path in sorted((root / folder).glob("*.yaml"))}


def find(source: str | Path, kind: str, folder: str = "") -> Path:
    """Return the file of a plan, or of another `kind`: the one named, or a recipe of `folder`.

    A name without a suffix that is no file is that of a recipe. Raises `ConfigError` if there is
    none of that name.
    """
    path, name = Path(source), str(source)
    if not is_path(name):
        raise ConfigError(Problem(kind, f"{name[:100]!r} is no path of a file"))
    if path.is_dir() and (path / f"{kind}.yaml").exists():
        fix = f"its {kind} is {path / f'{kind}.yaml'}"
        raise ConfigError(Problem(kind, f"{source} is a folder, not a {kind}", fix))
    if path.suffix or (path.exists() and not path.is_dir()):
        return path
    known = recipes(folder)
    if name not in known:
        hint = nearest(name, known) or f"recipes: {', '.join(known)}"
        raise ConfigError(Problem(kind, f"no file or recipe named {name!r}", hint))
    return known[name]


def load(source: str | Path, settings: Sequence[str] = ()) -> Plan:
    """Read a plan from a file or, by its name, from the recipes; apply `KEY=VALUE` settings.

    Of a recipe that is to grow a checkpoint, what the checkpoint decides is left out. Raises
    `ConfigError` with every problem of the plan at once.
    """
    path = find(source, "plan")
    data = read_yaml(path)
    given = override(data, settings)
    if path != Path(source) and given.get("from") is not None:
        given = override(_grown_from_a_checkpoint(data), settings)
    return parse(given, where=str(source))


def _grown_from_a_checkpoint(recipe: Mapping[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in recipe.items() if k not in ("substrate", "tokenizer", "model")}
    context = {k: v for k, v in recipe.get("model", {}).items() if k == "context"}
    return kept | ({"model": context} if context else {})


def parse(data: Mapping[str, Any], where: str = "plan") -> Plan:
    """Build a plan from plain data. Raises `ConfigError` with every problem at once."""
    return validate(Plan, data, check=problems, stand_in=_stand_in, where=where)


def _stand_in(location: tuple[str | int, ...]) -> object:
    """Return something valid for a required part that is missing or wrong; None for others."""
    stage = {"add_blocks": 1, "tokens": LARGEST_COUNT}
    if location == ("stages",):
        return [stage]
    if location[0] == "stages" and len(location) == 2:
        return stage
    return LARGEST_COUNT if location[0] == "stages" and location[-1] == "tokens" else None


def problems(plan: Plan) -> list[Problem]:
    """Return what single fields cannot show: combinations that cannot be built or trained."""
    found = _shape_problems(plan) if plan.start_from is None else []
    found += _batch_problems(plan)
    if not plan.stages:
        fix = "e.g. - {add_blocks: 2, tokens: 1M}"
        found.append(Problem("stages", "a plan needs at least one stage", fix))
    if plan.depth > LARGEST_DEPTH:
        message = f"add {plan.depth:,} blocks in all, a model may have {LARGEST_DEPTH:,}"
        found.append(Problem("stages", message, "add fewer"))
    for index, stage in enumerate(plan.stages):
        field = f"stages[{index}]"
        below = tuple(f"stages[{earlier}]" for earlier in range(index))
        trunk = plan.start_from is not None or any(s.add_blocks for s in plan.stages[:index])
        if stage.add_blocks == 0 and not trunk:
            message = "adds no blocks, but there is no trunk yet"
            fix = "the first stage must add blocks"
            found.append(Problem(field, message, fix, involves=(*below, "from")))
        elif stage.add_blocks == 0 and stage.lora is None and stage.train == "crown":
            fix = "set add_blocks, or lora: {rank: 16} or train: all to readjust the trunk"
            found.append(Problem(field, "adds no blocks and has no lora", fix))
        found += _reopening_problems(plan, index, 0 if plan.start_from is None else None)
        if stage.budget == "auto" and plan.training_of(stage).schedule == "cosine":
            message = "auto, but a cosine has to know its end"
            fix = "use schedule: wsd or constant"
            rests_on = ("training.schedule", f"{field}.schedule")
            found.append(Problem(f"{field}.budget", message, fix, involves=rests_on))
        batch = plan.training.batch_tokens
        if stage.tokens < batch:
            message = f"{stage.tokens} is less than one batch of {batch}"
            fix = "raise tokens or lower training.batch_tokens"
            involves = ("training.batch_tokens",)
            found.append(Problem(f"{field}.tokens", message, fix, involves=involves))
    return found


def reopening_problems(plan: Plan, start: int) -> list[Problem]:
    """Return what stages ask of blocks that are not there, in a plan that grows `start` blocks."""
    return [p for index in range(len(plan.stages)) for p in _reopening_problems(plan, index, start)]


def _reopening_problems(plan: Plan, index: int, start: int | None) -> list[Problem]:
    """Return what is wrong with `train`, `under`, `lora` and `trunk` of a stage.

    `start` is the depth of what the plan grows, None where that has not been read yet.
    """
    stage, field = plan.stages[index], f"stages[{index}]"
    below = tuple(f"stages[{earlier}]" for earlier in range(index))
    added = sum(earlier.add_blocks for earlier in plan.stages[:index])
    depth = None if start is None else start + added
    found: list[Problem] = []
    if stage.under and not stage.add_blocks:
        fix = "set add_blocks, or re-open the last blocks with train: {blocks: ...}"
        found.append(Problem(f"{field}.under", "there are no new blocks to go under any", fix))
    elif depth is not None and stage.under > depth:
        message = f"{stage.under}, but there are {depth} blocks below"
        found.append(Problem(f"{field}.under", message, f"at most {depth}", involves=below))
    if depth is not None and depth > 0 and stage.reopened and stage.reopened[-1] >= depth:
        message = f"blocks {stage.train}, but those below are 0 to {depth - 1}"
        fix = "new blocks train anyway"
        found.append(Problem(f"{field}.train", message, fix, involves=below))
    if stage.lora is not None and stage.train != "crown":
        message = f"{stage.train}, but lora adapts blocks that stay frozen"
        found.append(Problem(f"{field}.train", message, "leave train or lora out"))
    if stage.trunk == "cache" and stage.lora is not None:
        message = "cache, but the adapters of lora change the trunk, so it has to run"
        found.append(Problem(f"{field}.trunk", message, "leave trunk or lora out"))
    elif stage.trunk == "cache" and depth and not stage.trunk_depth(depth):
        message = "cache, but no block stays frozen under those that train"
        fix = "leave trunk out"
        found.append(Problem(f"{field}.trunk", message, fix, involves=below))
    return found


def _batch_problems(plan: Plan) -> list[Problem]:
    found: list[Problem] = []
    batch, context = plan.training.batch_tokens, plan.model.context
    if batch % context:
        message = f"{batch} is not a multiple of model.context ({context})"
        fix = f"nearest: {max(1, round(batch / context)) * context}"
        fix += ", or a shorter model.context" if context > batch else ""
        found.append(Problem("training.batch_tokens", message, fix, involves=("model.context",)))
    micro = plan.training.micro_batch_tokens
    if micro is not None and (micro % context or batch % micro):
        message = f"{micro} must be a multiple of model.context and divide training.batch_tokens"
        involves = ("model.context", "training.batch_tokens")
        found.append(
            Problem("training.micro_batch_tokens", message, f"e.g. {context}", involves=involves)
        )
    return found


_PLACES = {"width": "model.width", "tokens": "tokenizer.size"}


def _shape_problems(plan: Plan) -> list[Problem]:
    model, found = plan.model, list[Problem]()
    field, involves = ("model.heads", ("model.width",)) if model.heads else ("model.width", ())
    if model.width % model.head_count:
        divisors = [n for n in range(1, model.width + 1) if model.width % n == 0]
        close = min(divisors, key=lambda n: abs(n - model.head_count))
        message = f"{model.head_count} does not divide model.width ({model.width})"
        found.append(Problem(field, message, f"nearest that does: {close}", involves=involves))
    elif (model.width // model.head_count) % 2:
        message = f"gives an odd head size, {model.width // model.head_count}"
        fix = "rotary positions need an even one: change model.heads or model.width"
        found.append(Problem(field, message, fix, involves=involves))
    if plan.substrate.path is None:
        known = plan.tokenizer.path is None
        try:
            check_recipe(plan.substrate.recipe, plan.tokenizer.size if known else 1, model.width)
        except ConfigError as error:
            rests_on = ("substrate", "model.width", "tokenizer")
            found += [
                replace(problem, field=_PLACES.get(problem.field, problem.field), involves=rests_on)
                for problem in error.problems
            ]
    return found


def warnings(plan: Plan) -> list[str]:
    """Return one sentence for every option that has no effect in this plan."""
    found: list[str] = []
    substrate = plan.substrate
    if plan.start_from is not None:
        decided = [("substrate", name) for name in _changed(substrate)]
        decided += [("tokenizer", name) for name in _changed(plan.tokenizer) if name != "path"]
        decided += [("model", name) for name in _changed(plan.model) if name != "context"]
        found += [f"{a}.{b} has no effect with from: the checkpoint decides" for a, b in decided]
    elif substrate.path is not None:
        unused = [name for name in _changed(substrate) if name != "path"]
        found += [f"substrate.{name} has no effect with substrate.path" for name in unused]
    else:
        unused = [name for name in _changed(substrate) if name not in EFFECTIVE[substrate.kind]]
        kind = f"substrate.kind: {substrate.kind}"
        found += [f"substrate.{name} has no effect with {kind}" for name in unused]
    if plan.tokenizer.path is not None and plan.start_from is None:
        unused = [name for name in _changed(plan.tokenizer) if name != "path"]
        found += [f"tokenizer.{name} has no effect with tokenizer.path" for name in unused]
    for index, stage in enumerate(plan.stages):
        field = f"stages[{index}]"
        trunk = index > 0 or plan.start_from is not None
        steps = stage.steps(plan.training.batch_tokens)
        evaluations = max(0, steps - 1) // plan.training.evaluate_every
        if stage.lora is not None and not trunk:
            found.append(f"{field}.lora has no effect: there is no trunk to adapt yet")
        if stage.init == "copy" and not trunk:
            found.append(f"{field}.init: copy has no effect: there is no block to copy yet")
        if stage.train != "crown" and not trunk:
            found.append(f"{field}.train has no effect: there is no trunk to re-open yet")
        if stage.trunk is not None and not trunk:
            found.append(f"{field}.trunk has no effect: there is no trunk yet")
        if stage.init != "random" and stage.add_blocks == 0:
            found.append(f"{field}.init has no effect without add_blocks")
        if stage.budget == "auto" and evaluations < 4:
            found.append(
                f"{field}.budget: auto has no effect: the stage ends after {evaluations} "
                "evaluations, and 4 are needed to tell"
            )
        if stage.patience is not None and stage.patience >= evaluations:
            found.append(
                f"{field}.patience has no effect: the stage ends after {evaluations} evaluations"
            )
    return found


def _changed(section: BaseModel) -> list[str]:
    """Return the names of the fields that are not at their defaults, in order of declaration."""
    fields = type(section).model_fields
    return [name for name in fields if getattr(section, name) != fields[name].default]
