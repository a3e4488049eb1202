"""Write the text that the study `khop` trains on: python benchmarks/studies/khop.py [FILE]."""

import json
import sys
from pathlib import Path

from nacre.evaluate import probes

DOCUMENTS = 400_000

if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/khop-1.jsonl")
    with target.open("w") as file:
        for text in probes.text("khop-1", seed=0, count=DOCUMENTS):
            file.write(json.dumps({"text": text}) + "\n")
