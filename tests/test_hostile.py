"""Folders made to do harm are refused: nothing of them runs, nothing hangs, nothing fills memory.

All of them are read in one process of its own, which says of each what it raised, how long it took
and how much memory; every test is about one.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import nacre
from nacre.train import checkpoint

SECONDS, BYTES = 5.0, 500 * 2**20

READER = """
import json, resource, sys, time
from pathlib import Path
import torch, transformers
import nacre, nacre.generation, nacre.report
from nacre import composition, config, tokenizer
from nacre.data.shards import TokenStore
from nacre.errors import NacreError
from nacre.evaluate import benchmarks, results
from nacre.growth import plan
from nacre.substrate import Substrate
from nacre.train import checkpoint, files, state, verify
resource.setrlimit(resource.RLIMIT_DATA, (6 * 2**30, 6 * 2**30))
torch.set_num_threads(1)
try:
    checkpoint.load_model(sys.argv[2])  # whatever is imported on the first use
finally:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, call in json.load(open(sys.argv[1])):
    begin, error = time.perf_counter(), None
    try:
        eval(call)
    except NacreError as caught:
        error = str(caught)
    except BaseException as caught:
        error = f"NOT REFUSED {type(caught).__name__}: {caught}"
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = time.perf_counter() - begin
    print(json.dumps([name, error, seconds, (now - most) * 1024]), flush=True)
    most = max(most, now)
"""


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def unlinked(path: Path, data: bytes) -> None:
    """Replace a file that may be a hard link."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


Make = Callable[[Path, Path], None]
"""Takes a whole stage (or another whole thing) and a place outside of it; does harm to it."""

CASES: dict[str, tuple[str, str, Make]] = {}
"""By name: how the thing is read, what is said, and what is done to it."""


def case(call: str, said: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        CASES[make.__name__] = (call, said, make)
        return make

    return register


LOAD = "checkpoint.load_model({!r})"
TOKENIZER = "tokenizer.load({!r})"


# --- weights ---


@case(LOAD, "lacks|no file named|missing")
def a_pickle_instead_of_weights(stage: Path, outside: Path) -> None:
    for path in stage.glob("*.safetensors*"):
        path.unlink()
    (stage / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(outside / "ran")))


@case(LOAD, "is no file in safetensors")
def an_index_that_names_a_pickle(stage: Path, outside: Path) -> None:
    (stage / "x.bin").write_bytes(pickle.dumps(Touch(outside / "ran")))
    index = json.loads((stage / checkpoint.INDEX).read_text())
    edit(stage / checkpoint.INDEX, weight_map=dict.fromkeys(index["weight_map"], "x.bin"))


@case(LOAD, "header")
def a_pickle_by_the_name_of_a_shard(stage: Path, outside: Path) -> None:
    unlinked(stage / "head.safetensors", pickle.dumps(Touch(outside / "ran")))


@case(LOAD, "names other files")
def a_configuration_that_names_the_weights(stage: Path, outside: Path) -> None:
    (outside / "w.safetensors").write_bytes((stage / "head.safetensors").read_bytes())
    edit(stage / "config.json", transformers_weights="../outside/w.safetensors")


@case(LOAD, "holds an adapter")
def an_adapter_of_another_model(stage: Path, outside: Path) -> None:
    adapter = {"base_model_name_or_path": str(outside), "peft_type": "LORA"}
    (stage / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save({"x": torch.ones(1)}, stage / "adapter_model.bin")


@case(LOAD, "is a link out of the folder")
def a_shard_that_is_a_link(stage: Path, outside: Path) -> None:
    (stage / "head.safetensors").rename(outside / "head.safetensors")
    (stage / "head.safetensors").symlink_to(outside / "head.safetensors")


@case("checkpoint.load_config({!r})", "is a link out of the folder")
def a_link_to_a_device(stage: Path, outside: Path) -> None:
    (stage / "generation_config.json").unlink()
    (stage / "generation_config.json").symlink_to("/dev/zero")


@case(LOAD, "header does not fit")
def a_header_that_claims_ten_gigabytes(stage: Path, outside: Path) -> None:
    unlinked(stage / "head.safetensors", header({}, b" " * 100, length=10 * 2**30))


@case(LOAD, "header has 34,")
def a_header_of_many_megabytes(stage: Path, outside: Path) -> None:
    unlinked(stage / "head.safetensors", header({"__metadata__": {"x": "y" * (34 * 10**6)}}))


@case(LOAD, "entry of 'x' is damaged")
def a_shape_without_bytes(stage: Path, outside: Path) -> None:
    entry = {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}
    unlinked(stage / "head.safetensors", header({"x": entry}, b"1234"))


@case(LOAD, "entry of 'x' is damaged")
def a_shape_of_many_numbers(stage: Path, outside: Path) -> None:
    entry = {"dtype": "F32", "shape": [10**19] * 200_000, "data_offsets": [0, 4]}
    unlinked(stage / "head.safetensors", header({"x": entry}, b"1234"))


@case(LOAD, "nested more than 100 deep")
def a_header_nested_without_end(stage: Path, outside: Path) -> None:
    text = b"[" * 10**6
    unlinked(stage / "head.safetensors", struct.pack("<Q", len(text)) + text)


@case(LOAD, "is no file of the folder")
def an_index_that_leaves_its_folder(stage: Path, outside: Path) -> None:
    index = json.loads((stage / checkpoint.INDEX).read_text())
    away = "../outside/head.safetensors"
    edit(stage / checkpoint.INDEX, weight_map=dict.fromkeys(index["weight_map"], away))


@case(LOAD, "values, more than")
def an_index_of_millions_of_nothings(stage: Path, outside: Path) -> None:
    (stage / checkpoint.INDEX).write_text('{"weight_map": [' + "[]," * 10**7 + "[]]}")


# --- configurations ---


@case("checkpoint.load_config({!r})", "num_hidden_layers is 1,000,000,000, at most 1,024")
def a_billion_layers(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", num_hidden_layers=10**9)


@case(LOAD, "describes 1,000 blocks, the files hold")
def more_layers_than_tensors(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", num_hidden_layers=1000)


@case(LOAD, "describes [0-9,]+ weights")
def a_model_that_no_file_holds(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", vocab_size=10**6, hidden_size=4096, intermediate_size=10**6)


@case("checkpoint.load_config({!r})", "num_labels is 1,000,000,000, at most")
def a_billion_labels(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", num_labels=10**9)


@case(LOAD, "bytes of masks")
def masks_of_a_million_positions(stage: Path, outside: Path) -> None:
    config = {"model_type": "gpt_neo", "hidden_size": 8, "num_heads": 1, "vocab_size": 8,
              "num_layers": 2, "attention_types": [[["global", "local"], 1]],
              "max_position_embeddings": 10**6}  # fmt: skip
    (stage / "config.json").write_text(json.dumps(config))
    for path in stage.glob("*.safetensors*"):
        path.unlink()
    many = {f"x{i}": torch.zeros(1) for i in range(4)} | {"y": torch.zeros(10**6, 8)}
    save_file(many, stage / "model.safetensors")


@case("checkpoint.load_config({!r})", "a whole number of 4,000 digits")
def a_width_of_many_digits(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", hidden_size=int("9" * 4000))


@case("checkpoint.load_config({!r})", "nested more than 100 deep")
def a_configuration_nested_without_end(stage: Path, outside: Path) -> None:
    (stage / "config.json").write_text('{"x": ' + "[" * 500 + "]" * 500 + "}")


@case("checkpoint.load_config({!r})", "custom code")
def a_configuration_with_code(stage: Path, outside: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (stage / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto_map}))
    (stage / "evil.py").write_text(f"import os\nos.mkdir({str(outside / 'ran')!r})\n")


@case(LOAD, "asks for 'someone/kernel'")
def attention_from_the_hub(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", attn_implementation="someone/kernel")


@case("checkpoint.load_config({!r})", "'to_dict' is no field")
def a_field_by_the_name_of_a_method(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", to_dict=3)


@case(LOAD, "generation_config.json: num_beams is 1,000,000,000, at most 64")
def a_billion_beams(stage: Path, outside: Path) -> None:
    edit(stage / "generation_config.json", num_beams=10**9)


@case("checkpoint.load_config({!r})", "describes 1,000 blocks of 4,000 experts")
def millions_of_experts(stage: Path, outside: Path) -> None:
    edit(stage / "config.json", num_hidden_layers=1000, num_local_experts=4000)


# --- tokenizers ---


@case(TOKENIZER, "config.json: num_labels is 1,000,000,000, at most")
def a_model_of_billions_beside_a_tokenizer(stage: Path, outside: Path) -> None:
    settings = json.loads((stage / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    (stage / "tokenizer_config.json").write_text(json.dumps(settings))
    edit(stage / "config.json", num_labels=10**9)


@case(TOKENIZER, "has the id 4,294,967,290")
def an_id_of_billions(stage: Path, outside: Path) -> None:
    path = stage / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["far away"] = 4_294_967_290
    path.write_text(json.dumps(data))


@case(TOKENIZER, "has the id 4,294,967,290")
def an_added_id_of_billions(stage: Path, outside: Path) -> None:
    path = stage / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 4_294_967_290, "content": "x"})
    path.write_text(json.dumps(data))


@case(TOKENIZER, "has the id 4,294,967,290")
def a_setting_with_an_id_of_billions(stage: Path, outside: Path) -> None:
    token = {"content": "x", "special": True}
    edit(stage / "tokenizer_config.json", added_tokens_decoder={"4294967290": token})


@case(TOKENIZER, "makes a text more than 256 times longer")
def a_normalizer_that_doubles(stage: Path, outside: Path) -> None:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    edit(stage / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [double] * 60})


@case(TOKENIZER, "makes a text more than 256 times longer")
def a_decoder_that_swells(stage: Path, outside: Path) -> None:
    swell = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10**6}
    edit(stage / "tokenizer.json", decoder=swell)


@case(TOKENIZER, "retry-limit|takes")
def an_expression_that_never_ends(stage: Path, outside: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
             "invert": False}  # fmt: skip
    edit(stage / "tokenizer.json", pre_tokenizer=split)


@case(TOKENIZER, "special tokens around a text")
def a_template_without_measure(stage: Path, outside: Path) -> None:
    token = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    several = {"id": "<|endoftext|>", "ids": [1] * 10**4, "tokens": ["<|endoftext|>"] * 10**4}
    template = {"type": "TemplateProcessing", "single": [token] * 10**4, "pair": [],
                "special_tokens": {"<|endoftext|>": several}}  # fmt: skip
    edit(stage / "tokenizer.json", post_processor=template)


@case(TOKENIZER, "pads to more than")
def a_padding_of_billions(stage: Path, outside: Path) -> None:
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None,
               "pad_id": 0, "pad_type_id": 0, "pad_token": "<|pad|>"}  # fmt: skip
    edit(stage / "tokenizer.json", padding=padding)


@case(TOKENIZER, "names a file of another folder")
def a_tokenizer_of_another_folder(stage: Path, outside: Path) -> None:
    edit(stage / "tokenizer_config.json", tokenizer_file="/dev/zero")


@case(TOKENIZER, "custom code|does not exist or is not currently imported|cannot load")
def a_tokenizer_with_code(stage: Path, outside: Path) -> None:
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    (stage / "config.json").unlink()
    edit(stage / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)
    (stage / "evil.py").write_text(f"import os\nos.mkdir({str(outside / 'ran')!r})\n")


@case(TOKENIZER, "is a link out of the folder")
def a_tokenizer_that_is_a_link(stage: Path, outside: Path) -> None:
    (stage / "tokenizer.json").rename(outside / "secret.json")
    (stage / "tokenizer.json").symlink_to(outside / "secret.json")


# --- ledgers, plans, states, stores, substrates ---


@case("nacre.generation.generate_at_depths({!r} + '/..', 'a').__next__()", "damaged|no model|holds")
def a_ledger_that_is_a_device(stage: Path, outside: Path) -> None:
    (stage / "stage.json").unlink()
    (stage / "stage.json").symlink_to("/dev/zero")


@case("files.read_record(Path({!r}))", "'frozen.x': input should be a valid string")
def a_ledger_of_other_kinds(stage: Path, outside: Path) -> None:
    edit(stage / "stage.json", frozen={"x": 5})


@case("plan.load({!r} + '/plan.yaml')", "has more than 20,000 values")
def a_billion_laughs(stage: Path, outside: Path) -> None:
    lines = ["a0: &a0 [ha, ha]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 40)]
    (stage / "plan.yaml").write_text("\n".join(lines))


@case("plan.load({!r} + '/plan.yaml')", "has more than 20,000 values")
def merges_of_merges(stage: Path, outside: Path) -> None:
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 40)]
    (stage / "plan.yaml").write_text("\n".join(lines))


@case("plan.load({!r} + '/plan.yaml')", "more than the 1,048,576 that are read")
def a_plan_of_many_megabytes(stage: Path, outside: Path) -> None:
    (stage / "plan.yaml").write_text("a: 1\n" * 10**6)


@case("plan.load({!r} + '/plan.yaml')", "add_blocks: input should be less than or equal to 1024")
def a_plan_of_a_billion_blocks(stage: Path, outside: Path) -> None:
    (stage / "plan.yaml").write_text("stages: [{add_blocks: 1000000000, tokens: 1M}]")


@case("plan.load({!r} + '/plan.yaml')", "is no regular file")
def a_plan_that_is_a_pipe(stage: Path, outside: Path) -> None:
    os.mkfifo(stage / "plan.yaml")


@case("Substrate.load({!r})", "damaged")
def a_substrate_of_another_kind(stage: Path, outside: Path) -> None:
    about = {"format": 1, "tokens": ["a"], "recipe": {"kind": "glyph"}, "fingerprint": "x",
             "width": 1e400, "source": {"font": 3}, "report": {}}  # fmt: skip
    (stage / "substrate.json").write_text(json.dumps(about))


@case("benchmarks.read(benchmarks.find({!r} + '/q')['hellaswag'])", "there is no question|label")
def brackets_without_end(stage: Path, outside: Path) -> None:
    (stage / "q").mkdir()
    line = {"activity_label": "a", "ctx_a": "[" * 200_000, "ctx_b": "", "endings": ["a", "b"],
            "label": 0}  # fmt: skip
    lines = [json.dumps(line), json.dumps(line | {"label": 9})]
    (stage / "q" / "hellaswag_val.jsonl").write_text("\n".join(lines))


@case("results.fingerprint(Path({!r}))", "is no regular file|damaged|cannot be read")
def a_foreign_file_that_is_too_large(stage: Path, outside: Path) -> None:
    (stage / "stage.json").unlink()
    with (stage / "notes.txt").open("wb") as file:
        file.truncate(20 * 2**30)


# --- compositions ---

COMPOSED = "composition.load({!r})"


def reference(folder: Path, **fields: Any) -> None:
    """Change the first expert in both files of a composition."""
    for name in ("config.json", "composition.json"):
        data = json.loads((folder / name).read_text())
        data["experts"][0] |= fields
        (folder / name).write_text(json.dumps(data))


@case(COMPOSED, "is a composition itself")
def a_composition_of_itself(folder: Path, outside: Path) -> None:
    reference(folder, path=".", fingerprint=None)


@case(COMPOSED, "is a composition itself")
def a_composition_of_one_that_refers_back(folder: Path, outside: Path) -> None:
    shutil.copytree(folder, outside / "b")
    reference(folder, path=str(outside / "b"), fingerprint=None)
    reference(outside / "b", path=str(folder), fingerprint=None)


@case("results.fingerprint(Path({!r}))", "do not say the same")
def a_record_that_leads_in_a_circle(folder: Path, outside: Path) -> None:
    data = json.loads((folder / "composition.json").read_text())
    data["experts"][0]["path"] = "."
    (folder / "composition.json").write_text(json.dumps(data))


@case(COMPOSED, "is no name of an expert")
def an_expert_that_is_called_by_a_path(folder: Path, outside: Path) -> None:
    reference(folder, name="../../x")


@case(COMPOSED, "it is a bundle, but")
def a_bundle_that_leaves_its_folder(folder: Path, outside: Path) -> None:
    edit(folder / "composition.json", bundled=True)


@case(COMPOSED, "mix: ")
def a_rule_of_another_kind(folder: Path, outside: Path) -> None:
    edit(folder / "composition.json", mix={"name": ["mean-logits"]})


@case(COMPOSED, "'experts.0.path': input should be a valid string")
def an_expert_without_a_place(folder: Path, outside: Path) -> None:
    reference(folder, path=5)


@case(COMPOSED, "custom code|evil")
def an_expert_with_code(folder: Path, outside: Path) -> None:
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (outside / "expert").mkdir()
    (outside / "expert" / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": auto_map})
    )
    (outside / "expert" / "evil.py").write_text(f"import os\nos.mkdir({str(outside / 'ran')!r})\n")
    reference(folder, path=str(outside / "expert"), fingerprint=None)


@case(COMPOSED, "describes [0-9,]+ weights")
def an_expert_that_no_file_holds(folder: Path, outside: Path) -> None:
    recorded = json.loads((folder / "config.json").read_text())["experts"][0]["path"]
    shutil.copytree(recorded, outside / "expert")
    edit(outside / "expert" / "config.json", vocab_size=10**6, hidden_size=4096)
    reference(folder, path=str(outside / "expert"), fingerprint=None)


# --- all of them, in one process ---


@pytest.fixture(scope="module")
def read(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, ...]]:
    """Return by name: error, seconds, bytes, and the place where code would leave its trace."""
    root = tmp_path_factory.mktemp("hostile")
    run, stage = tiny_run, tiny_run / "stages" / "02"
    experts = [run / "stages" / number for number in ("01", "02")]
    nacre.compose(experts, root / "composition", names=["one", "two"])
    calls: list[tuple[str, str]] = []
    for name, (call, _, make) in CASES.items():
        target, outside = root / name / "target", root / name / "outside"
        outside.mkdir(parents=True)
        source = root / "composition" if call == COMPOSED or "circle" in name else stage
        shutil.copytree(source, target, copy_function=shutil.copy)
        if source != stage:
            for number, expert in enumerate(experts):
                for file in ("config.json", "composition.json"):
                    data = json.loads((target / file).read_text())
                    data["experts"][number]["path"] = str(expert)
                    (target / file).write_text(json.dumps(data))
        make(target, outside)
        calls.append((name, call.format(str(target))))
    (root / "calls.json").write_text(json.dumps(calls))
    command = [sys.executable, "-c", READER, str(root / "calls.json"), str(stage)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL,
        timeout=280, check=False,
    )  # fmt: skip
    last = done.stdout[-300:]
    assert done.returncode == 0, f"it died after {last}: {done.stderr[:2000]}"
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    return {name: (*found, root / name / "outside" / "ran") for name, *found in lines}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(name: str, read: dict[str, tuple[Any, ...]]) -> None:
    error, seconds, growth, trace = read[name]
    assert error is not None, "nothing was raised"
    assert not error.startswith("NOT REFUSED"), error
    assert len(error) < 1500
    assert re.search(CASES[name][1], error), error
    assert seconds < SECONDS
    assert growth < BYTES
    assert not trace.exists(), "code of the checkpoint was run"
