"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Command
from transformers import LlamaForCausalLM

from nacre.terminal import Display

TINY = ["--set", "training.precision=fp32", "--track", "none"]


def test_help_names_every_command(command: Command) -> None:
    code, out, _ = command("--help")
    assert code == 0
    for command in ("grow", "plan", "generate", "report", "doctor", "substrate", "tokenizer"):
        assert command in out


def test_importing_the_command_line_is_quick() -> None:
    check = "import sys, nacre, nacre.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


@pytest.mark.parametrize("command", ["grow", "plan"])
def test_a_mistake_in_a_plan_is_said_without_torch(command: str) -> None:
    code = f"""
import sys
from nacre.cli import main
sys.argv = ["nacre", "{command}", "small", "--set", "model.widht=64"]
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
sys.exit("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'width'?" in done.stderr


@pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
def test_an_installed_torchao_is_quiet() -> None:
    command = [sys.executable, "-m", "nacre", "plan", "tiny", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_windows_is_refused_before_anything_else(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    code, out, err = command("plan", "lost")
    assert (code, out) == (2, "")
    assert err == (
        "error: nacre runs on Linux and macOS, not on Windows; use it in WSL, which is Linux\n"
    )


def test_threads_wait_without_spinning_unless_told_otherwise(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    command("doctor")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    command("doctor")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_public_names_exist() -> None:
    check = "import nacre; [getattr(nacre, name) for name in nacre.__all__]"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_grow_prints_table_report_and_next_step(command: Command, tmp_path: Path) -> None:
    code, out, err = command(
        "grow", "tiny", "--out", tmp_path / "run", "--set", "stages.2.tokens=512", *TINY
    )
    assert code == 0
    assert out == "", "people read stderr"
    assert "Stage 3/3" in err
    assert "bits per" in err
    assert "peak" in err
    assert str(tmp_path / "run" / "report" / "index.html") in err
    assert (tmp_path / "run" / "report" / "loss.png").exists()
    assert "nacre generate" in err


def test_grow_json(command: Command, tmp_path: Path) -> None:
    code, out, err = command(
        "grow", "tiny", "--out", tmp_path / "run", "--json", "--quiet", *TINY,
        "--set", "stages=[{add_blocks: 1, tokens: 512}]",
    )  # fmt: skip
    assert code == 0
    assert err == ""
    result = json.loads(out)
    assert result["run"] == str(tmp_path / "run")
    assert result["stages"][0]["depth"] == 1
    assert result["stages"][0]["validation"]["bits_per_byte"] > 0


def test_grow_own_text(command: Command, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The oyster lays down one thin layer at a time.\n\n" * 400)
    code, out, _ = command(
        "grow", "tiny", "--data", tmp_path / "text.txt", "--out", tmp_path / "run", *TINY,
        "--json", "--set", "stages=[{add_blocks: 1, tokens: 512}]",
    )  # fmt: skip
    assert code == 0
    assert json.loads(out)["stages"][0]["tokens"] == 512


def test_grow_says_what_has_no_effect(command: Command, tmp_path: Path) -> None:
    _, _, err = command(
        "grow", "tiny", "--out", tmp_path / "run", *TINY,
        "--set", "substrate={kind: code, seed: 3}", "--set", "model.width=36",
        "--set", "stages=[{add_blocks: 1, tokens: 512}]",
    )  # fmt: skip
    assert "substrate.seed has no effect with substrate.kind: code" in err


def test_a_mistake_is_one_message_and_exit_code_2(command: Command, tmp_path: Path) -> None:
    code, out, err = command(
        "grow", "tiny", "--out", tmp_path / "run", "--set", "model.heads=5",
        "--set", "model.widht=9", "--set", "training.lr=fast",
    )  # fmt: skip
    assert code == 2
    assert out == ""
    assert "3 problems" in err
    assert "model.widht: unknown key (did you mean 'width'?)" in err
    assert "model.heads: 5 does not divide model.width (32)" in err
    assert "training.lr" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grow", "smal"), "did you mean 'small'?"),
        (("grow", "lost.yaml"), "no such file"),
        (("grow", "--resume"), "which run?"),
        (("grow", "tiny", "--data", "lost.txt"), "lost.txt"),
        (("grow", "tiny", "--errors", "ignore"), "data.errors"),
        (("grow", "tiny", "--font", "lost.ttf"), "lost.ttf"),
        (("grow", "tiny", "--tokenizer", "lost"), "lost"),
        (("grow", "tiny", "--from", "./lost"), "no such folder"),
        (("grow", "tiny", "--track", "nosuch"), "nosuch"),
        (("plan", "tiny", "--set", "model.width"), "KEY=VALUE"),
        (("generate", "./lost", "x"), "no such folder"),
        (("generate", ".", "x", "--temperature", "-1"), "--temperature"),
        (("generate", ".", "x", "--top-p", "2", "--top-k", "-1"), "2 problems"),
        (("generate", ".", "x", "--seed", "-1", "--temperature", "nan"), "2 problems"),
        (("generate", ".", "x", "--repetition-penalty", "inf"), "--repetition-penalty"),
        (("grow", "tiny", "--data", "📚.txt"), "📚.txt: there is no such file"),
        (("generate", ".", "x", "--depths"), "holds no stages"),
        (("report", "."), "no run"),
        (("substrate", "build", "lost", "--out", "new"), "lost"),
        (("substrate", "show", "a", "--width", "99999"), "4096"),
        (("substrate", "show", "a", "--count", "-1"), "--count"),
        (("substrate", "show", "a", "--png", "lost/a.png"), "there is no folder lost"),
        (("tokenizer", "build", "--size", "100", "--out", "new"), "size"),
        (("tokenizer", "build", "--alphabet", "all", "--out", "new"), "alphabet"),
        (("nosuch",), "No such command"),
        (("grow", "--no-such-option"), "No such option"),
    ],
)
def test_bad_input(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_plan_table_and_json(command: Command) -> None:
    code, out, _ = command("plan", "paper-9x3-glyph")
    assert code == 0
    assert "104.9M" in out
    assert "12,592,128" in out
    said = " ".join(out.split())
    assert "of disk at most. Not in it: the tokens of all text of the sources, 2 or 4" in said
    _, out, _ = command("plan", "paper-9x3-glyph", "--json")
    assert json.loads(out)["stages"][0]["active_parameters"] == 104_887_296


def test_doctor(command: Command) -> None:
    _, out, _ = command("doctor", "--json")
    found = json.loads(out)
    assert found["versions"]["torch"]
    assert isinstance(found["bf16"], bool)
    assert found["disk_free_bytes"] > 0
    code, out, _ = command("doctor")
    assert code == 0
    assert "threads" in out


def test_generate_from_run_stage_and_every_depth(command: Command, tiny_run: Path) -> None:
    few = ("--max-new-tokens", "5")
    code, out, _ = command("generate", tiny_run, "The function", *few)
    assert code == 0
    assert out.startswith("The function")
    _, run_json, _ = command("generate", tiny_run, "The function", *few, "--json")
    third = tiny_run / "stages" / "03"
    _, stage_json, _ = command("generate", third, "The function", *few, "--json")
    assert json.loads(run_json) == json.loads(stage_json)
    _, depths, _ = command("generate", tiny_run, "The function", *few, "--depths", "--json")
    assert [stage["depth"] for stage in json.loads(depths)["stages"]] == [1, 2, 3]
    code, table, _ = command("generate", tiny_run, "The function", *few, "--depths")
    assert "depth 3" in table


def test_generation_is_seeded_and_greedy_is_not_random(command: Command, tiny_run: Path) -> None:
    def text(*options: str) -> str:
        _, out, _ = command("generate", tiny_run, "a", "--max-new-tokens", "12", "--json", *options)
        return json.loads(out)["text"]

    assert text("--seed", "1") == text("--seed", "1")
    assert text("--seed", "1") != text("--seed", "2")
    assert text("--temperature", "0", "--seed", "1") == text("--temperature", "0", "--seed", "2")


def test_generate_with_an_empty_prompt(command: Command, tiny_run: Path) -> None:
    code, _, _ = command("generate", tiny_run, "--max-new-tokens", "3")
    assert code == 0


def test_prompt_that_does_not_fit(command: Command, tiny_run: Path) -> None:
    code, out, _ = command("generate", tiny_run, "a", "--json")
    assert code == 0, "without a number there are as many as fit"
    assert len(json.loads(out)["text"]) > 0
    code, _, err = command("generate", tiny_run, "word " * 40, "--max-new-tokens", "10")
    assert code == 2
    assert "exceed 32" in err


def test_prompt_that_fills_the_context(command: Command, tiny_run: Path) -> None:
    code, _, err = command("generate", tiny_run, "word " * 400, "--max-new-tokens", "1")
    assert code == 2
    assert "--max-new-tokens" not in err, "no number of new tokens would help"


@pytest.mark.parametrize("argument", [["generate"], ["eval", "--tasks", "copy"]])
def test_a_model_that_does_not_fit_into_memory(
    command: Command, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, argument: list[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LlamaForCausalLM, "to", full)
    verb, *options = argument
    code, out, err = command(verb, tiny_run / "stages" / "01", *options, "--json")
    assert (code, out) == (2, "")
    assert "01 needs more memory than there is: free some, or set ACCELERATE_USE_CPU=1" in err


def test_a_folder_that_cannot_be_made(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("grow", "tiny", "--out", tmp_path / "file" / "run", *TINY)
    assert code == 2
    assert f"{tmp_path / 'file' / 'run'}: Not a directory" in err


def test_an_interrupted_run_says_how_to_go_on(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "stage_started", interrupt)
    code, _, err = command("grow", "tiny", "--out", tmp_path / "run", *TINY)
    assert code == 130
    assert f"nacre grow --resume --out {tmp_path / 'run'}" in err


def test_a_resumed_run_is_changed_from_its_own_plan(
    command: Command, tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    code, _, err = command("grow", "--resume", "--out", run, "--set", "stages.0.tokens=100k")
    assert code == 2
    assert "stages[0].tokens was 5120, now 100000" in err


def test_report_again(command: Command, tiny_run: Path) -> None:
    code, out, _ = command("report", tiny_run)
    assert code == 0
    assert Path(out.strip()).exists()
    code, out, _ = command("report", tiny_run, "--json")
    assert code == 0
    assert json.loads(out)["report"] == str(tiny_run / "report" / "index.html")


def test_substrate_build_and_show(command: Command, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "substrate"
    code, out, _ = command(
        "substrate", "build", tiny_run / "tokenizer", "--out", folder, "--width", "32", "--json"
    )
    assert code == 0
    from nacre.substrate import Substrate

    assert json.loads(out)["fingerprint"] == Substrate.load(tiny_run / "substrate").fingerprint
    png = tmp_path / "e.png"
    code, out, _ = command("substrate", "show", "e", "--substrate", folder, "--png", png)
    assert code == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    assert len(out.splitlines()) == 16 // 2 + 8
    code, _, err = command("substrate", "build", tiny_run / "tokenizer", "--out", folder)
    assert code == 2
    assert "is not empty" in err


def test_substrate_build_says_what_has_no_effect(
    command: Command, tiny_run: Path, tmp_path: Path
) -> None:
    code, _, err = command(
        "substrate", "build", tiny_run / "tokenizer", "--out", tmp_path / "s", "--kind", "code",
        "--fit", "vocabulary",
    )  # fmt: skip
    assert code == 0
    assert "--fit has no effect with --kind code" in err


def test_tokenizer_build(command: Command, tmp_path: Path) -> None:
    code, out, _ = command("tokenizer", "build", "--size", "600", "--out", tmp_path / "t", "--json")
    assert code == 0
    assert json.loads(out)["size"] == 600
    from nacre import tokenizer as tokenizers

    assert tokenizers.fingerprint(tokenizers.load(tmp_path / "t")) == json.loads(out)["fingerprint"]


def test_tokenizers_of_much_text_see_every_source(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nacre import tokenizer as tokenizers

    monkeypatch.setattr(tokenizers, "LEARN_FROM", 4000)
    (tmp_path / "a.txt").write_text("It was a bright cold day. " * 200)
    (tmp_path / "b.txt").write_text("Мороз и солнце; день чудесный! " * 200)
    data = ("--data", tmp_path / "a.txt", "--data", tmp_path / "b.txt")
    said = "the tokenizer learns from the first 2000 characters of each source"
    code, _, err = command("tokenizer", "build", *data, "--size", "512", "--out", tmp_path / "t")
    assert code == 0
    assert said in err
    assert "ч" in tokenizers.load(tmp_path / "t").get_vocab()
    code, _, err = command(
        "grow", *data, "--out", tmp_path / "run",
        "--set", "tokenizer.size=512", "--set", "model.width=32", "--set", "model.heads=2",
        "--set", "model.context=32", "--set", "training.batch_tokens=64",
        "--set", "training.validation_tokens=64",
        "--set", 'stages=[{"add_blocks": 1, "tokens": 64}]',
    )  # fmt: skip
    assert code == 0
    assert said in err
    built, grown = (tokenizers.load(tmp_path / name) for name in ("t", "run/tokenizer"))
    assert tokenizers.fingerprint(grown) == tokenizers.fingerprint(built)
