"""The composition study: experts, alone and combined by every rule, on real text.

    python benchmarks/composition.py runs/composition [--data ../shared/data] [--seeds 0 1 2]

grows for every seed four experts entirely apart and one model on both domains of a pair with the
same total compute; for the first two seeds also four experts on a common trunk. Whatever is
finished is not done again.
`benchmarks/composition_scores.py` then measures, `benchmarks/composition_page.py` writes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import composition_text as text
import yaml

PAIRS = (("en", "ru"), ("en", "zh"), ("en", "code"))
FULL_SEEDS = (0, 1)  # of all arms; others leave out the common trunk and the last pair's one model
VOCABULARY = 8192
STAGE_TOKENS = 360_000  # of an expert; it has two stages
MODEL = {"family": "llama", "width": 192, "heads": 6, "context": 256}
TRAINING = {
    "batch_tokens": 512,
    "lr": 1.2e-3,
    "evaluate_every": 10_000,
    "validation_tokens": 16_384,
}


def stages(tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Return stages of two blocks; the upper ones begin as the identity."""
    return [{"add_blocks": 2, "tokens": n, "init": "zero" if i else "random"}
            for i, n in enumerate(tokens)]  # fmt: skip


def jobs(out: Path, seed: int) -> list[list[tuple[Path, dict[str, Any]]]]:
    """Return what to grow for a seed: rounds of (run, plan); a round needs those before it."""
    place = out / f"seed-{seed}"

    def job(
        name: str, domains: Sequence[str], tokens: Sequence[int], trunk: str | None = None
    ) -> Any:
        plan = {
            "name": name,
            "seed": seed,
            "tokenizer": {"path": str(out / "tokenizer")},
            "data": {"sources": [str(out / "text" / "train" / f"{d}.jsonl") for d in domains]},
            "model": MODEL,
            "training": TRAINING,
            "stages": stages(tokens),
        }
        if trunk:
            plan["from"] = str(place / trunk / "stages" / "01")
            plan["stages"] = [{"add_blocks": 2, "tokens": tokens[0], "init": "zero"}]
        return place / name, plan

    one = STAGE_TOKENS
    full = seed in FULL_SEEDS
    pairs = PAIRS if full else PAIRS[:-1]
    first = [job(f"{a}-and-{b}", (a, b), (2 * one, 2 * one)) for a, b in pairs]
    first += [job("trunk", text.DOMAINS, (one,))] if full else []
    first += [job(domain, (domain,), (one, one)) for domain in text.DOMAINS]
    if not full:
        return [first]
    branches = [job(f"{domain}-branch", (domain,), (one,), "trunk") for domain in text.DOMAINS]
    return [first, branches]


def grow(run: Path, plan: dict[str, Any]) -> None:
    """Grow one model on one thread, or go on where it stopped."""
    if (run / "report" / "index.html").exists():
        return
    path = run.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(plan, sort_keys=False), encoding="utf-8")
    began = (run / "run.json").exists()
    command = [
        sys.executable,
        "-m",
        "nacre",
        "grow",
        str(path),
        "--out",
        str(run),
        "--track",
        "none",
    ]
    with run.with_suffix(".log").open("a") as log:
        subprocess.run(
            [*command, *(["--resume"] if began else ["--overwrite"])],
            check=True, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def prepare(data: Path, out: Path) -> None:
    """Make the text and the tokenizer that all models have."""
    from nacre import tokenizer as tokenizers
    from nacre.data import corpus

    if (out / "text" / "train").exists():
        return
    text.prepare(data, out / "text")
    sources = tuple(str(out / "text" / "all" / f"{d}.jsonl") for d in text.DOMAINS)
    tokenizer = tokenizers.build((d.text for d in corpus.read(sources)), VOCABULARY)
    tokenizer.save_pretrained(out / "tokenizer")
    text.cut(out / "text", lambda texts: [len(ids) for ids in tokenizer(texts).input_ids])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="models grown at the same time")
    options = parser.parse_args()
    prepare(options.data, options.out)
    for seed in options.seeds:
        for together in jobs(options.out, seed):
            with ThreadPoolExecutor(options.jobs) as pool:
                for _ in pool.map(lambda job: grow(*job), together):
                    pass
        print(f"seed {seed}: grown", flush=True)


if __name__ == "__main__":
    main()
