"""Tools of others on what nacre writes: lm-eval's own command, PEFT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import nacre

TASK = """
task: cloze
dataset_path: json
dataset_kwargs: {data_files: {test: cloze.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: text
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["stage", "composition"])
def test_lm_eval_s_own_command(tiny_run: Path, tmp_path: Path, what: str) -> None:
    pytest.importorskip("lm_eval")
    stages = [tiny_run / "stages" / number for number in ("01", "02")]
    model, options = stages[1], ""
    if what == "composition":
        model, options = tmp_path / "both", ",trust_remote_code=True"
        nacre.compose(stages, model, names=["low", "high"], bundle=True)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "cloze.yaml").write_text(TASK)
    rows = [{"text": "The function", "choices": [" a", " q"], "answer": n % 2} for n in range(4)]
    (tmp_path / "cloze.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={model},dtype=float32{options}", "--tasks", "cloze",
        "--include_path", "task", "--device", "cpu", "--output_path", "results",
    ]  # fmt: skip
    own = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["cloze"]["acc,none"] == 0.5


# PEFT asks transformers by a name that it is about to give up.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_trains_adapters_on_a_stage(tiny_run: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_run / "stages" / "02")
    settings = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [name for name, weight in adapted.named_parameters() if weight.grad is not None]
    assert trained
    assert all("lora_" in name for name in trained)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
