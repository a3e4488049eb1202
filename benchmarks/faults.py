"""The long fault campaign: python benchmarks/faults.py [FAULTS] [SEED] > docs/results/faults.txt

Growths of three stages (plain, cached trunk, adapters) are killed, get disk errors, short writes
and flipped bits at points drawn at random, one fault after the other until each has ended. What
must come out, every time, is the model of the run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

import torch
from injection import BUG, DONE, KINDS, attempt, draw_fault, flip, hashes, short_plan

from nacre.train.grow import grow
from nacre.train.verify import verify


def main(faults: int, seed: int) -> None:
    torch.set_num_threads(1)
    draw, survived, lost = random.Random(seed), Counter[str](), Counter[str]()
    started, growths, done = time.perf_counter(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        plan = short_plan()
        grow(plan, Path(folder) / "whole")
        expected = hashes(Path(folder) / "whole")
        while done < faults:
            out, met = Path(folder) / f"run-{growths}", list[str]()
            growths += 1
            while True:
                kind = draw.choice(KINDS)
                ended = attempt(plan, out, draw_fault(draw, kind))
                if kind == "bit flip" and flip(out, draw) is None:
                    kind = "kill at a step"
                if ended == DONE:
                    break
                met.append(kind if ended != BUG else f"{kind}: an error without a message")
                done += 1
            whole = hashes(out) == expected and not any(each.wrong for each in verify(out))
            (survived if whole else lost).update(met)
            shutil.rmtree(out)
    print(f"{done} faults in {growths} growths, {time.perf_counter() - started:.0f} s")
    for kind in sorted(set(survived) | set(lost)):
        print(f"{kind:24} survived {survived[kind]:4}  lost {lost[kind]:4}")


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    main(given[0] if given else 300, given[1] if len(given) > 1 else 0)
