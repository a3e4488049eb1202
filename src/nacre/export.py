"""A checkpoint for other engines: one file of weights, ONNX, GGUF.

The first is made here; the others by the tools of those formats, which a user has or has not. What
tools of the time of transformers 4 look for has the name that they know.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nacre import composition
from nacre.errors import CheckpointError, ConfigError, NacreError, Problem, nearest
from nacre.train import checkpoint, foreign
from nacre.train.files import new_folder, read_json, write_json

TOKENIZER = "tokenizer_config.json"
SMALL_FILES = (".json", ".txt", ".model", ".jinja", ".md")
FORMER_NAMES = {"rope_theta": ("rope_theta", "rotary_emb_base"),
                "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct")}  # fmt: skip
"""Before transformers 5 these stood beside `rope_parameters`; which of two depends on the class."""

FORMER_TENSORS = {"gpt_neox": {"lm_head.": "embed_out."}}
"""What transformers 5 calls otherwise in memory than in a file, by the type of model."""


class ExportError(NacreError):
    """The tool of a format refused a checkpoint."""


def export(
    source: str | Path, out: str | Path, target: str, *, converter: str | Path | None = None
) -> dict[str, Any]:
    """Write a stage, or any Hugging Face folder, to the folder `out` in the form `target`.

    `single`: a Hugging Face folder with one file of weights, bit for bit the same. `onnx`: by
    optimum's command, if it is installed. `gguf`: by llama.cpp's `converter`
    (convert_hf_to_gguf.py). A run means its newest stage. Returns the files and their bytes. Raises
    ConfigError before anything is written, CheckpointError for what cannot be read and ExportError
    with the last line of what a tool said.
    """
    path, folder = Path(checkpoint.newest(source)), Path(out)
    problems = _problems(path, folder, target, converter)
    if problems:
        raise ConfigError(problems)
    checkpoint.load_config(path)
    with new_folder(folder) as partial:
        TARGETS[target](path, partial, converter)
        files = {
            file.relative_to(partial).as_posix(): file.stat().st_size
            for file in sorted(partial.rglob("*"))
            if file.is_file()
        }
    return {"checkpoint": str(path), "as": target, "folder": str(folder), "files": files}


def _problems(path: Path, out: Path, target: str, converter: str | Path | None) -> list[Problem]:
    problems: list[Problem] = []
    if target not in TARGETS:
        fix = nearest(target, TARGETS) or f"there are: {', '.join(TARGETS)}"
        problems.append(Problem("--as", f"{target!r} is no format", fix))
    if composition.is_composition(path):
        fix = "export its experts one by one; --bundle makes a folder that loads without nacre"
        problems.append(Problem("CKPT", f"{path} is a composition", fix))
    elif not checkpoint.has_weights(path):
        fix = "name a stage, a run or a Hugging Face folder"
        problems.append(Problem("CKPT", f"{path} holds no weights in safetensors", fix))
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        problems.append(Problem("--to", f"{out} is not empty", "name a new folder"))
    if target == "onnx" and _optimum() is None:
        fix = "pip install 'optimum[onnx]', in an environment of its own if it asks for one"
        problems.append(Problem("--as", "onnx is made by optimum-cli, which is not here", fix))
    if target == "gguf" and converter is None:
        fix = "clone llama.cpp and add --converter llama.cpp/convert_hf_to_gguf.py"
        problems.append(Problem("--as", "gguf is made by llama.cpp's own converter", fix))
    if converter is not None and target != "gguf":
        problems.append(Problem("--converter", f"has no effect with --as {target}", "leave it out"))
    if converter is not None and not Path(converter).is_file():
        fix = "it is convert_hf_to_gguf.py in a clone of llama.cpp"
        problems.append(Problem("--converter", f"there is no file {converter}", fix))
    return problems


def _single(path: Path, out: Path, _: Any = None) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as shard:
                tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from None
    config = read_json(path / "config.json")
    for now, former in FORMER_TENSORS.get(config["model_type"], {}).items():
        tensors = {_renamed(name, now, former): tensor for name, tensor in tensors.items()}
    save_file(tensors, out / foreign.WEIGHTS, metadata={"format": "pt"})
    for file in sorted(path.iterdir()):
        if file.suffix in SMALL_FILES and file.name != foreign.INDEX:
            shutil.copyfile(file, out / file.name)
    write_json(out / "config.json", _former_names(config) | config)
    if (out / TOKENIZER).exists():
        settings = read_json(out / TOKENIZER)
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
            write_json(out / TOKENIZER, settings)


def _renamed(name: str, now: str, former: str) -> str:
    return former + name.removeprefix(now) if name.startswith(now) else name


def _former_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return fields that transformers 4 and tools of its time look for."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "default":
        return {}
    place = 1 if config["model_type"] == "gpt_neox" else 0
    return {names[place]: rope[key] for key, names in FORMER_NAMES.items() if key in rope}


def _onnx(path: Path, out: Path, _: Any = None) -> None:
    task = "text-generation-with-past"
    command = [str(_optimum()), "export", "onnx", "--model", str(_whole(path, out)), "--task", task]
    _run("optimum-cli", [*command, str(out)])
    shutil.rmtree(out / "whole")


def _gguf(path: Path, out: Path, converter: Any) -> None:
    command = [sys.executable, str(Path(converter).resolve()), str(_whole(path, out))]
    _run(Path(converter).name, [*command, "--outfile", str(out / "model.gguf"), "--outtype", "f32"])
    shutil.rmtree(out / "whole")


TARGETS: dict[str, Callable[[Path, Path, Any], None]] = {
    "single": _single,
    "onnx": _onnx,
    "gguf": _gguf,
}


def _whole(path: Path, out: Path) -> Path:
    """Return a folder inside `out` with the checkpoint as one file, for another tool."""
    (out / "whole").mkdir()
    _single(path, out / "whole")
    return out / "whole"


def _optimum() -> str | None:
    """Return optimum's command: beside this Python, else on the path."""
    beside = Path(sys.executable).with_name("optimum-cli")
    return str(beside) if beside.is_file() else shutil.which("optimum-cli")


def _run(name: str, command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise ExportError(f"{name} failed: {lines[-1] if lines else 'it said nothing'}")
