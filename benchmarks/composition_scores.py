"""Scores of the composition study: every rule on held-out text, beside experts and one model.

    python benchmarks/composition_scores.py runs/composition [--seeds 0 1 2]

Adds to runs/composition/scores.jsonl what is not there yet, one model and rule a line: bits per
byte of each domain's own text and of documents that mix or switch, for every pair.
Every second document was used to choose options (`--choose` scores these); the others are reported.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import composition_text as text
import torch
from composition import PAIRS

from nacre import composition
from nacre import tokenizer as tokenizers
from nacre.composition.tuning import Tuning
from nacre.evaluate import language
from nacre.models.rules import Rule
from nacre.train import checkpoint

OWN, MIXED = 16, 48  # documents of a domain and of a kind of pair, every second one reported
TUNING_TOKENS = 100_000
CONTEXT = 256
Pair = tuple[str, str]
RULES: dict[str, dict[str, Any]] = {
    "mean-logits": {"name": "mean-logits"},
    "mean-probs": {"name": "mean-probs"},
    "entropy": {"name": "entropy"},
    "posterior, decay 1": {"name": "posterior", "decay": 1.0},
    "posterior, decay 0.9": {"name": "posterior", "decay": 0.9},
    "fixed-share": Rule("fixed-share").as_json(),
    "top-k, k 1": {"name": "top-k", "k": 1},
    "selective": {"name": "selective"},
}
AVERAGED = "weights averaged"
SOME = ("mean-logits", "mean-probs", "posterior, decay 0.9", "fixed-share", AVERAGED)
FEW = ("mean-logits", "posterior, decay 0.9", "fixed-share")


def rules(seed: int, grown: str, domains: Sequence[str]) -> Sequence[str]:
    """Return what is scored of a composition: all of the first pair's rules once, else fewer."""
    if grown == "trunk":
        return ("mean-logits", "fixed-share", AVERAGED) if domains == PAIRS[0] else ("fixed-share",)
    if domains == PAIRS[0]:
        return (*RULES, AVERAGED, *TRAINED) if seed == 0 else SOME
    return FEW if len(domains) == 2 else ("mean-logits", "fixed-share")


TRAINED: dict[str, tuple[str, bool]] = {
    "gate": ("gate", False),
    "adapter": ("adapter", False),
    "mean-logits, heads tuned": ("mean-logits", True),
}


class Study:
    """The texts, and what has been scored on them."""

    def __init__(self, out: Path, choose: bool) -> None:
        self.out = out
        self.tokenizer = tokenizers.load(out / "tokenizer")
        self.file = out / ("choosing.jsonl" if choose else "scores.jsonl")
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {json.loads(line)["key"] for line in lines}
        self.part = slice(0 if choose else 1, None, 2)

    def documents(self, domains: Sequence[str], pairs: Sequence[Pair]) -> dict[str, list[str]]:
        """Return the texts of some domains and of some pairs, by name."""
        folders = {domain: (self.out / "text" / "own" / domain, OWN) for domain in domains}
        for a, b in pairs:
            for kind in ("switches", "mixed"):
                folder = self.out / "text" / "pairs" / f"{a}-{b}" / kind
                folders[f"{a}-{b} {kind}"] = (folder, MIXED)
        return {
            name: [
                p.read_text(encoding="utf-8") for p in sorted(folder.iterdir())[:most][self.part]
            ]
            for name, (folder, most) in folders.items()
        }

    def score(
        self, model: Any, domains: Sequence[str], pairs: Sequence[Pair], /, **about: Any
    ) -> None:
        """Score a model on the texts of some domains and pairs, unless that was done."""
        key = json.dumps(about, sort_keys=True)
        if key in self.done:
            return
        groups = self.documents(domains, pairs)
        texts = [one for documents in groups.values() for one in documents]
        scores = iter(language.score(model, self.tokenizer, texts, stride=CONTEXT))
        found = {name: [next(scores) for _ in documents] for name, documents in groups.items()}
        record = about | {
            "key": key,
            "bits_per_byte": {name: language.bits_per_byte(s) for name, s in found.items()},
            "bytes": {name: sum(one.bytes for one in s) for name, s in found.items()},
        }
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.done.add(key)
        shown = {name: round(value, 3) for name, value in record["bits_per_byte"].items()}
        print(about, shown, flush=True)

    def missing(self, **about: Any) -> bool:
        """Tell whether this was not scored yet."""
        return json.dumps(about, sort_keys=True) not in self.done


def last(run: Path) -> Path:
    return Path(checkpoint.newest(run))


def averaged(runs: Sequence[Path]) -> Any:
    """Return the model whose weights are the mean of the runs' weights."""
    models = [checkpoint.load_model(last(run)) for run in runs]
    with torch.no_grad():
        for name, tensor in models[0].state_dict().items():
            tensor.copy_(torch.stack([model.state_dict()[name] for model in models]).mean(0))
    return models[0]


def compositions(place: Path) -> Iterator[tuple[str, tuple[str, ...], list[Path]]]:
    """Yield how the experts were grown, their domains, and their runs."""
    for grown, suffix in (("apart", ""), ("trunk", "-branch")):
        for domains in (*PAIRS, text.DOMAINS):
            runs = [place / f"{domain}{suffix}" for domain in domains]
            if all(run.exists() for run in runs):
                yield grown, tuple(domains), runs


def score_seed(study: Study, seed: int) -> None:
    """Score all that was grown for a seed."""
    place = study.out / f"seed-{seed}"
    alone = {f"{a}-and-{b}": (a, b) for a, b in PAIRS}
    alone |= {f"{d}{suffix}": text.DOMAINS for d in text.DOMAINS for suffix in ("", "-branch")}
    for name, domains in alone.items():
        about = {"seed": seed, "model": name}
        if (place / name).exists() and study.missing(**about):
            mine = [
                pair for pair in PAIRS if name.partition("-branch")[0] in pair or domains == pair
            ]
            study.score(checkpoint.load_model(last(place / name)), domains, mine, **about)
    for grown, domains, runs in compositions(place):
        about = {"seed": seed, "grown": grown, "experts": list(domains)}
        pairs = [domains] if len(domains) == 2 else []
        with tempfile.TemporaryDirectory() as folder:
            composition.compose(runs, Path(folder) / "composition")
            model = composition.load(Path(folder) / "composition")
        for rule in rules(seed, grown, domains):
            if not study.missing(rule=rule, **about):
                continue
            if rule in TRAINED:
                score_trained(study, runs, domains, rule, about)
            elif rule == AVERAGED:
                study.score(averaged(runs), domains, pairs, rule=rule, **about)
            else:
                model.config.mix = RULES[rule]
                model.arrange()
                study.score(model, domains, pairs, rule=rule, **about)


def score_trained(
    study: Study, runs: Sequence[Path], domains: Sequence[str], name: str, about: dict[str, Any]
) -> None:
    """Train and score a rule that is trained, on the experts' own training text."""
    sources = tuple(str(study.out / "text" / "train" / f"{domain}.jsonl") for domain in domains)
    mix, heads = TRAINED[name]
    tuning = Tuning(sources=sources, tokens=TUNING_TOKENS)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "composition"
        record = composition.compose(runs, out, mix, tuning=tuning, tune_heads=heads)
        print(composition.summary(record)[-1], flush=True)
        study.score(composition.load(out), domains, [domains], rule=name, **about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--choose", action="store_true")
    options = parser.parse_args()
    study = Study(options.out, options.choose)
    for seed in options.seeds:
        score_seed(study, seed)


if __name__ == "__main__":
    main()
