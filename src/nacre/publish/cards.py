"""The cards of what goes to the hub, made from the ledger, the plan and the kept evaluations.

Nothing in them names a folder of the machine: of a source that is a path only its last part is
said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from nacre import composition, config, hub
from nacre import tokenizer as tokenizers
from nacre.composition.card import card as composition_card
from nacre.evaluate import results
from nacre.folders import PLAN
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.report import scores
from nacre.report.tables import stage_table
from nacre.substrate import Substrate
from nacre.train import files, schema
from nacre.train.card import model_card

NO_LICENCE = "No licence is stated: ask before you use it."


class CardRecord(schema.CostedRecord):
    """`stage.json` of a stage, as its card reads it."""

    substrate: str | None  # pyright: ignore[reportGeneralTypeIssues]


def stage_card(stage: Path, load: str, licence: str | None) -> str:
    """Return the card of a stage; of one that stands in its run also lineage and data."""
    record = files.read_shaped(stage / files.RECORD, CardRecord)
    run = stage.resolve().parent.parent
    about: dict[str, Any] = {}
    sections: list[str] = []
    if (run / PLAN).is_file():
        plan = plans.parse(config.read_yaml(run / PLAN), where=str(run / PLAN))
        plan_about, data = _data(plan, record)
        about |= plan_about
        below = [files.read_stage(each) for each in files.stages(run)]
        sections += [_lineage([r for r in below if r["stage"] <= record["stage"]], plan), data]
    sections += [*_results(stage), *_licence(licence)]
    return model_card(record, load=load, about=_front(about, licence), sections=sections)


def composed_card(target: Path, load: str, licence: str | None) -> str:
    """Return the card of a composition."""
    record = composition.read_record(target)
    if trained := record.get("trained"):
        sources = [_public(source) for source in trained["sources"]]
        record = record | {"trained": trained | {"sources": sources}}
    sections = [*_results(target), *_licence(licence)]
    return composition_card(record, load=load, about=_front({}, licence), sections=sections)


def substrate_card(target: Path, load: str, licence: str | None) -> str:
    """Return the card of a substrate."""
    substrate = Substrate.load(target)
    recipe = ", ".join(f"{key} {value}" for key, value in substrate.source.items())
    return f"""---
library_name: nacre
tags: [nacre, frozen-embeddings]
{_front({}, licence)}---

# A frozen substrate: {len(substrate.tokens):,} tokens, {substrate.width} dimensions

A row for each token, a pure function of the recipe ({recipe}); nothing of it was trained unless
the recipe says `trained`. Fingerprint `{substrate.fingerprint}`.

{_joined(_licence(licence))}```python
import nacre

substrate = nacre.from_pretrained({load})
```
"""


def tokenizer_card(target: Path, load: str, licence: str | None) -> str:
    """Return the card of a tokenizer."""
    tokenizer = tokenizers.load(target)
    return f"""---
library_name: transformers
tags: [nacre, tokenizer]
{_front({}, licence)}---

# A tokenizer of {len(tokenizer):,} tokens

Models over one vocabulary can be composed. Fingerprint `{tokenizers.fingerprint(tokenizer)}`.

{_joined(_licence(licence))}```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({load})
```
"""


def _front(about: Mapping[str, Any], licence: str | None) -> str:
    """Return further lines of a card's front matter."""
    fields = ({"license": licence} if licence else {}) | dict(about)
    return yaml.safe_dump(fields, sort_keys=False) if fields else ""


def _licence(licence: str | None) -> list[str]:
    return [] if licence else [NO_LICENCE]


def _joined(sections: Sequence[str]) -> str:
    return "".join(f"{section}\n\n" for section in sections)


def _lineage(records: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    rows = [
        row | {"fingerprint": f"`{record['fingerprint'][:16]}`"}
        for row, record in zip(stage_table(records), records, strict=True)
    ]
    start = "a new model on its substrate"
    if plan.start_from is not None:
        start = f"the checkpoint `{_public(plan.start_from)}`"
    return f"""## Lineage

Grown stage by stage from {start}; what a stage trained stays frozen in the next.

{_table(rows)}"""


def _data(plan: Plan, record: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return what the front matter says of a stage's data and base, and the section on its data."""
    read = [plan.sources_of(stage) for stage in plan.stages[: record["stage"]]]
    names = list(dict.fromkeys(source for sources in read for source in sources))
    about: dict[str, Any] = {}
    if datasets := [_hub_name(name) for name in names if name.startswith(hub.PREFIX)]:
        about["datasets"] = datasets
    if str(plan.start_from).startswith(hub.PREFIX):
        about["base_model"] = _hub_name(str(plan.start_from))
    listed = "\n".join(f"- `{_public(name)}`" for name in names)
    return (
        about,
        f"""## Data

{listed}

Of this, {plan.data.holdout:.0%} is held out: the losses above are of it. Fingerprint of the corpus:
`{record["corpus"]}`.""",
    )


def _public(source: str) -> str:
    """Return what may be said of a source: a name on the hub, or the last part of a path."""
    return source if source.startswith(hub.PREFIX) else Path(source).name


def _hub_name(source: str) -> str:
    return source.removeprefix(hub.PREFIX).partition(":")[0]


def _results(target: Path) -> list[str]:
    """Return the section on a checkpoint's kept evaluations, the newest of each; or none."""
    model = scores.Model(target.name, results.fingerprint(target), depth=None)
    found = [scored.record for scored in scores.load([results.home(target)], [model])]
    if not found:
        return []
    rows = [
        {
            "task": " ".join(filter(None, (record["task"], record["subset"]))),
            "metric": record["metric"],
            "value": _number(record["value"]),
            "95% interval": " to ".join(map(_number, record["interval"] or ())) or "none",
            "chance": "none" if record["chance"] is None else _number(record["chance"]),
            "n": f"{record['n']:,}",
            "settings": _settings(record),
        }
        for record in found
    ]
    return [f"## Results\n\nEvaluated with nacre; intervals are bootstrapped.\n\n{_table(rows)}"]


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _settings(record: Mapping[str, Any]) -> str:
    """Return a task's version and settings in short: of a fingerprint its beginning."""
    said = {"version": record["version"], **record["settings"]}
    shown = {key: value for key, value in said.items() if value is not None}
    return ", ".join(f"{key} {str(value)[:12]}" for key, value in shown.items())


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(c.replace('|', '&#124;') for c in line)} |" for line in lines)
