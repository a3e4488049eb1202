"""Checkpoints for other engines: the same numbers, the tools of the formats, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import Build, Command
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import nacre
from nacre.growth.plan import Plan
from nacre.models import stock
from nacre.train import checkpoint, files

TOOL = """
import json, pathlib, sys
source = pathlib.Path({source})
assert (source / "model.safetensors").is_file() and (source / "tokenizer.json").is_file()
assert not (source / "model.safetensors.index.json").exists()
pathlib.Path({file}).write_text(json.dumps(sys.argv[1:]))
"""


def logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits


def test_single_is_the_same_bit_for_bit(tiny_run: Path, tmp_path: Path, ids: torch.Tensor) -> None:
    done = nacre.export_checkpoint(tiny_run, tmp_path / "one", "single")
    assert done["checkpoint"] == str(tiny_run / "stages" / "03")
    weights = [name for name in done["files"] if name.endswith(".safetensors")]
    assert weights == ["model.safetensors"]
    assert "model.safetensors.index.json" not in done["files"]
    assert torch.equal(logits(tmp_path / "one", ids), logits(tiny_run / "stages" / "03", ids))
    text = "def f(x): return x"
    there, here = (
        AutoTokenizer.from_pretrained(p) for p in (tmp_path / "one", tiny_run / "tokenizer")
    )
    assert there.encode(text) == here.encode(text)
    settings = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # what transformers 4 knows


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_former_names_change_nothing(
    pico: Build, family: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    pico(family).save_pretrained(tmp_path / "in")
    nacre.export_checkpoint(tmp_path / "in", tmp_path / "out", "single")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rotary_emb_base" if family == "gpt_neox" else "rope_theta"] == 10_000
    if family == "gpt_neox":
        assert config["rotary_pct"] == 1.0
    assert torch.equal(logits(tmp_path / "out", ids), logits(tmp_path / "in", ids))


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_tensors_have_the_names_that_transformers_writes(
    pico: Build, family: str, tmp_path: Path, ids: torch.Tensor
) -> None:
    model = pico(family).eval()
    (tmp_path / "stage").mkdir()
    checkpoint.save_weights(model, tmp_path / "stage", [(1, len(stock.find_parts(model).blocks))])
    nacre.export_checkpoint(tmp_path / "stage", tmp_path / "out", "single")
    model.save_pretrained(tmp_path / "stock")
    found, expected = (
        load_file(tmp_path / name / "model.safetensors").keys() for name in ("out", "stock")
    )
    assert found == expected
    with torch.no_grad():
        assert torch.equal(logits(tmp_path / "out", ids), model(input_ids=ids).logits)


def test_a_single_file_is_grown_on(tiny_run: Path, plan: Plan, tmp_path: Path) -> None:
    nacre.export_checkpoint(tiny_run / "stages" / "01", tmp_path / "one", "single")
    more = plan.model_copy(update={"start_from": str(tmp_path / "one"), "stages": plan.stages[1:2]})
    (record,) = nacre.grow(more, tmp_path / "run")
    first = files.read_record(tiny_run / "stages" / "01")
    assert record["parent"] == first["fingerprint"]
    assert first["weights"].keys() & record["frozen"].keys()


@pytest.mark.parametrize("target", ["onnx", "gguf"])
def test_the_tool_of_the_format_gets_a_whole_folder(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    options = {}
    if target == "onnx":
        source = TOOL.format(
            file="sys.argv[-1], 'model.onnx'", source='sys.argv[sys.argv.index("--model") + 1]'
        )
        tool = tmp_path / "optimum-cli"
        tool.write_text(f"#!{sys.executable}\n{source}")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    else:
        tool = tmp_path / "convert_hf_to_gguf.py"
        tool.write_text(
            TOOL.format(file='sys.argv[sys.argv.index("--outfile") + 1]', source="sys.argv[1]")
        )
        options = {"converter": tool}
    done = nacre.export_checkpoint(tiny_run, tmp_path / "out", target, **options)
    assert list(done["files"]) == [f"model.{target}"]
    said = json.loads((tmp_path / "out" / f"model.{target}").read_text())
    assert ("text-generation-with-past" if target == "onnx" else "f32") in said


def test_a_tool_that_fails_is_one_line(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "convert.py").write_text("raise NotImplementedError('unknown pre-tokenizer')")
    code, _, err = command(
        "export", tiny_run, "--to", tmp_path / "out", "--as", "gguf",
        "--converter", tmp_path / "convert.py",
    )  # fmt: skip
    assert code == 2
    assert "convert.py failed: NotImplementedError: unknown pre-tokenizer" in err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported(
    tiny_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    stages = [tiny_run / "stages" / number for number in ("01", "02")]
    nacre.compose(stages, tmp_path / "both", names=["low", "high"])
    (tmp_path / "empty").mkdir()
    for source, options, message in [
        (tiny_run, ("--as", "onx"), "did you mean 'onnx'?"),
        (tiny_run, ("--as", "onnx"), "pip install 'optimum[onnx]'"),
        (tiny_run, ("--as", "gguf"), "--converter llama.cpp/convert_hf_to_gguf.py"),
        (tiny_run, ("--as", "gguf", "--converter", "lost.py"), "there is no file lost.py"),
        (tiny_run, ("--converter", "lost.py"), "has no effect with --as single"),
        (tmp_path / "both", (), "export its experts one by one"),
        (tmp_path / "empty", (), "holds no weights"),
        (tiny_run, ("--to", tmp_path / "both"), "is not empty"),
    ]:
        code, _, err = command("export", source, "--to", tmp_path / "new", *options)
        assert code == 2
        assert message in err
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((stages[0] / "config.json").read_bytes())
    save_file({"a": torch.zeros(2)}, broken / "model.safetensors")
    (broken / "model.safetensors").write_bytes(b"12")
    code, _, err = command("export", broken, "--to", tmp_path / "new")
    assert code == 2
    assert "cannot be read" in err
