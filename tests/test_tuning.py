"""Training what mixes experts: the loss is the composition's, only what should moves, it helps."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WITHOUT_NACRE, Build, Command
from test_composed import compose as composed
from test_composed import mixed
from test_trained import shaken
from torch.nn import functional
from transformers import LlamaForCausalLM

import nacre
from nacre import composition
from nacre import tokenizer as tokenizers
from nacre.composition import tuning
from nacre.composition.tuning import Mixture, Tuning
from nacre.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    FingerprintError,
    NacreError,
)
from nacre.growth import ledger
from nacre.growth import plan as plans
from nacre.models import stock
from nacre.models.composed import TRAINED_FILE, ComposedConfig, ComposedForCausalLM
from nacre.models.rules import Rule
from nacre.train import checkpoint
from nacre.train.files import read_record
from nacre.train.grow import grow

TEXT = {"low": "abcdefghijklm ", "high": "zyxwvutsrqpon "}
"""Two languages, of different letters."""


@dataclass
class Place:
    """Experts of two languages, and text of both."""

    root: Path
    low: Path
    high: Path
    tuning: Tuning


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("tuned")
    for name, line in TEXT.items():
        (root / f"{name}.txt").write_text((line * 6 + "\n") * 150)
    both = tuple(str(root / f"{name}.txt") for name in TEXT)
    letters = list(TEXT.values())
    tokenizers.build(letters, 512).save_pretrained(root / "tokenizer")
    for name in TEXT:
        settings = [
            "training={batch_tokens: 256, validation_tokens: 256, precision: fp32, lr: 1e-2}",
            f"data.sources=[{root / f'{name}.txt'}]",
            f"tokenizer.path={root / 'tokenizer'}",
            "stages=[{add_blocks: 1, tokens: 8192}]",
        ]
        grow(plans.load("tiny", settings), root / name)
    options = Tuning(sources=both, tokens=8192, batch_tokens=256, validation_tokens=512, lr=1e-2)
    return Place(root, root / "low", root / "high", options)


def mix_text(place: Place, out: Path, mix: str, **options: Any) -> dict[str, Any]:
    return nacre.compose([place.low, place.high], out, mix, tuning=place.tuning, **options)


# --- the loss ---


def rules() -> list[Rule]:
    return [
        Rule("mean-logits"),
        Rule("mean-probs"),
        Rule("weighted", weights=(1.0, 3.0, 0.0)),
        Rule("weighted", "logits", weights=(1.0, 3.0, 0.5)),
        Rule("posterior", floor=0.1, prior=(0.2, 0.5, 0.3)),
        Rule("posterior", "logits"),
        Rule("fixed-share", switch=0.2),
        Rule("gate"),
        Rule("adapter", rank=3, candidates=5),
        Rule("adapter", rank=0),
    ]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: json.dumps(rule.as_json()))
def test_the_loss_is_that_of_the_composition(
    rule: Rule, pico: Build, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "chunk_rows", lambda vocabulary, device: 21)
    model = composed([pico("llama", seed=s) for s in (1, 2)] + [pico("gpt_neox", 3, seed=3)], rule)
    if model.mixer is not None:
        shaken(model.mixer)
    logits = mixed(model, ids[:, :-1])
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    model.requires_grad_(False)
    heads = model.mixer is None
    wanted = model.trained_tensors(heads)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    loss = Mixture(model)(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    playing = {f"heads.{model.expert_names[expert]}." for expert in model.playing}
    for name, parameter in wanted.items():
        moves = not heads or any(name.startswith(prefix) for prefix in playing)
        assert (parameter.grad is not None and bool(parameter.grad.any())) == moves, name
    own = {id(parameter) for parameter in wanted.values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


@pytest.mark.parametrize("rule", [Rule("mean-logits"), Rule("gate"), Rule("adapter", rank=2)])
def test_gradients_are_those_of_the_plain_loss(rule: Rule, pico: Build, ids: torch.Tensor) -> None:
    model = composed([pico("llama", seed=1), pico("llama", 3, seed=2)], rule)
    if model.mixer is not None:
        shaken(model.mixer)
    wanted = model.requires_grad_(False).trained_tensors(heads=model.mixer is None)
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    Mixture(model)(ids[:, :-1], ids[:, 1:]).backward()
    found = {name: parameter.grad.clone() for name, parameter in wanted.items()}
    hidden = [h_BTD.detach() for h_BTD in model.hidden(ids[:, :-1])]
    logits = [model.logits(expert, h_BTD) for expert, h_BTD in enumerate(hidden)]
    if rule.name == "adapter":
        output = model.mixer(logits)
    elif rule.name == "gate":
        parts = torch.stack([one.log_softmax(-1) for one in logits])
        output = (model.mixer(hidden)[..., None] + parts).logsumexp(0)
    else:
        output = sum(logits) / 2
    plain = functional.cross_entropy(output.flatten(0, 1), ids[:, 1:].flatten())
    gradients = torch.autograd.grad(plain, list(wanted.values()))
    for (name, gradient), expected in zip(found.items(), gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7, msg=name)


# --- training ---


@pytest.mark.parametrize(
    ("mix", "heads", "what"),
    [("gate", False, "gate"), ("adapter", False, "adapter"), ("mean-logits", True, "heads")],
)
def test_training_helps_and_leaves_the_experts_alone(
    mix: str, heads: bool, what: str, place: Place, tmp_path: Path
) -> None:
    files = {path: path.read_bytes() for path in place.root.rglob("*.safetensors")}
    record = mix_text(place, tmp_path / "out", mix, tune_heads=heads)
    trained = record["trained"]
    assert trained["what"] == what
    before, after = (trained["validation"][when]["loss"] for when in ("before", "after"))
    assert after < before - 0.3
    assert all(path.read_bytes() == content for path, content in files.items())
    stages = {name: read_record(place.root / name / "stages" / "01") for name in TEXT}
    for name, stage in stages.items():
        hashes = stage["frozen"] | stage["weights"]
        kept = [n for n in hashes if not (heads and n.startswith("lm_head."))]
        assert trained["experts"][name] == ledger.fingerprint(hashes, kept)
        if not heads:
            assert trained["experts"][name] == stage["fingerprint"]
    width, vocabulary = 32, record["vocabulary"]
    sizes = {
        "gate": 2 * 2 * width + 2,
        "adapter": 2 * vocabulary + 3 * 16 * vocabulary,
        "heads": 2 * width * vocabulary,
    }
    assert trained["parameters"] == sizes[what]
    prefix = "heads." if heads else "mixer."
    assert all(name.startswith(prefix) for name in trained["trainable"])

    model = nacre.load_composition(tmp_path / "out")
    assert model.trained_tensors(heads).keys() == set(trained["trainable"])
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    assert not torch.equal(mixed(model, ids), mixed(untrained(place, mix), ids))
    for name, expert in zip(model.expert_names, model.experts, strict=True):
        own = checkpoint.load_model(place.root / name / "stages" / "01")
        same = torch.equal(own(ids).logits, expert(ids).logits)
        assert same != heads
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Trained after the experts: {what}" in card
    assert f"{what} trained on 8,192 tokens" in "\n".join(composition.summary(record))


def untrained(place: Place, mix: str) -> Any:
    models = [checkpoint.load_model(place.root / name / "stages" / "01") for name in TEXT]
    experts = [{"name": name} for name in TEXT]
    config = ComposedConfig(experts, {"name": mix}, models[0].config.vocab_size, 32)
    return ComposedForCausalLM(config, models)


def test_a_gate_follows_the_language(place: Place, tmp_path: Path) -> None:
    mix_text(place, tmp_path / "out", "gate")
    model = nacre.load_composition(tmp_path / "out")
    tokenizer = tokenizers.load(tmp_path / "out")
    for expert, line in enumerate(TEXT.values()):
        ids = tokenizer(line, return_tensors="pt").input_ids
        log_weights_EBT = model(input_ids=ids).log_weights
        assert log_weights_EBT is not None
        assert log_weights_EBT[expert].exp().mean() > 0.7


def test_training_repeats_with_its_seed(place: Place, tmp_path: Path) -> None:
    records = [mix_text(place, tmp_path / name, "gate") for name in ("one", "two")]
    assert records[0]["trained"]["sha256"] == records[1]["trained"]["sha256"]


def test_heads_are_tuned_in_place_and_given_back(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.low, place.high], out, "mean-logits")
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    before = mixed(nacre.load_composition(out), ids)
    record = nacre.tune_heads(out, place.tuning)
    again = composition.tune(out, place.tuning)
    assert record["trained"]["sha256"] == again["trained"]["sha256"]
    assert not torch.equal(mixed(nacre.load_composition(out), ids), before)
    shutil.copytree(place.low / "stages" / "01", tmp_path / "third")
    stage = tmp_path / "third" / "stage.json"
    stage.write_text(stage.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    record = nacre.add_expert(tmp_path / "third", out)
    assert "the heads that were tuned together are the experts' own again" in record["notes"]
    assert not (out / TRAINED_FILE).exists()
    nacre.remove_expert("third", out)
    assert torch.equal(mixed(nacre.load_composition(out), ids), before)


def test_a_trained_rule_goes_with_its_experts(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mix_text(place, out, "gate")
    shutil.copytree(place.low / "stages" / "01", tmp_path / "third")
    stage = tmp_path / "third" / "stage.json"
    stage.write_text(stage.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    record = nacre.add_expert(tmp_path / "third", out)
    assert record["mix"] == Rule().as_json()
    assert any(note.startswith("gate was trained for other experts") for note in record["notes"])
    assert nacre.load_composition(out).mixer is None


def test_a_trained_bundle_loads_where_nacre_is_not_installed(place: Place, tmp_path: Path) -> None:
    mix_text(place, tmp_path / "bundle", "adapter", bundle=True)
    ids = [[5, 6, 7, 8]]
    expected = mixed(nacre.load_composition(tmp_path / "bundle"), torch.tensor(ids))
    program = f"""{WITHOUT_NACRE}
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "bundle")!r}, trust_remote_code=True)
torch.save(model(torch.tensor({ids})).logits, {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, cwd=tmp_path)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


# --- the command ---


def test_the_command_trains_reports_and_says_so(
    place: Place, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    text = ["--data", place.root / "low.txt", "--data", place.root / "high.txt"]
    how = ["--tokens", "4096", "--lr", "0.01"]
    code, said, shown = command(
        "compose", place.low, place.high, "--mix", "gate", *text, *how, "--out", out, "--json"
    )
    assert code == 0
    assert "Train the gate ..." in shown
    record = json.loads(said)
    assert record["trained"]["tokens"] == 4096
    assert record["trained"]["lr"] == 0.01
    code, said, shown = command("compose", place.low, place.high, "--out", tmp_path / "plain")
    assert code == 0
    code, said, shown = command("compose", "--tune", "heads", *text, *how, tmp_path / "plain")
    assert code == 0
    assert "heads trained on 4,096 tokens" in shown
    code, said, shown = command(
        "compose", place.low, place.high, "--tune", "heads", *text, *how,
        "--out", tmp_path / "new", "--quiet",
    )  # fmt: skip
    assert (code, said, shown) == (0, "", "")
    assert nacre.load_composition(tmp_path / "new").rule == Rule()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tune", "gate"], "--tune: 'gate' is not heads (for a gate or an adapter: --mix gate"),
        (["--tokens", "5k"], "--tokens: nothing is trained without text (name it with --data)"),
        (["--lr", "1"], "--lr: nothing is trained without text (name it with --data)"),
        (["--mix", "gate"], "--data: none, but gate is trained"),
        (["--data", "x.txt"], "--data: nothing is trained under fixed-share"),
        (
            ["--mix", "gate", "--data", "x.txt", "--tokens", "many"],
            "training: tokens: expected a number such as 500k",
        ),
        (["--mix", "gate", "--data", "x.txt", "--lr", "-1"], "training: lr: "),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, place: Place, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    code, _, shown = command("compose", place.low, place.high, "--out", out, *arguments)
    assert code == 2
    assert message in shown
    assert not out.exists()


def test_tuning_in_place_goes_alone(place: Place, tmp_path: Path, command: Command) -> None:
    nacre.compose([place.low, place.high], tmp_path / "out")
    code, _, shown = command("compose", "--tune", "heads", "--mix", "gate", tmp_path / "out")
    assert code == 2
    assert "--mix: does not go with --tune alone (compose anew for that)" in shown
    code, _, shown = command("compose", "--tune", "heads", tmp_path / "out")
    assert code == 2
    assert "--data: none, but heads are trained" in shown


# --- refusals ---


def test_what_was_trained_must_be_there_and_the_same(place: Place, tmp_path: Path) -> None:
    mix_text(place, tmp_path / "out", "gate")
    file = tmp_path / "out" / TRAINED_FILE
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FingerprintError, match=r"trained.safetensors of .*compose and train again"):
        nacre.load_composition(tmp_path / "out")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"trained.safetensors is missing; restore it"):
        nacre.load_composition(tmp_path / "out")


def test_tensors_of_other_experts_are_refused(pico: Build) -> None:
    model = composed([pico("llama", seed=1), pico("llama", seed=2)], Rule("gate"))
    with pytest.raises(ValueError, match=r"trained.safetensors is not of these experts"):
        model.load_trained({"mixer.bias": torch.zeros(3)})


@pytest.mark.parametrize(
    ("mix", "options", "message"),
    [
        ("gate", {}, "--data: none, but gate is trained (name text of all the experts' kinds)"),
        ("posterior", {"tune_heads": True}, "--data: none, but heads are trained"),
        ("posterior", {"tuning": True}, "--data: nothing is trained under posterior (use --mix"),
        (
            "entropy",
            {"tuning": True, "tune_heads": True},
            "--tune heads: does not go with entropy (heads are tuned under: mean-logits,",
        ),
        ("gate", {"tuning": True, "tune_heads": True}, "--tune heads: does not go with gate"),
        (
            "adapter",
            {"tuning": True, "rank": 0},
            "--set rank: 0 makes a dense adapter of",
        ),
        ("adapter", {"tuning": True}, "--set rank: 16 makes an adapter of"),
        (
            "gate",
            {"tuning": {"tokens": 100}},
            "--tokens: 100 is less than one batch of 256 tokens (train longer)",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_weight_is_read(
    mix: str,
    options: dict[str, Any],
    message: str,
    place: Place,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda folder: pytest.fail("weights are read"))
    monkeypatch.setattr("nacre.models.trained.LARGEST_ADAPTER", 1000)
    given = dict(options)
    if changes := options.get("tuning"):
        changes = {} if changes is True else changes
        given["tuning"] = place.tuning.model_copy(update=changes)
    with pytest.raises(ConfigError) as caught:
        nacre.compose([place.low, place.high], tmp_path / "out", mix, **given)
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mix", "heads", "error", "message"),
    [
        ("gate", False, ConfigError, "--mix: gate: reads hidden states, and those of gpt2 cannot"),
        ("mean-logits", True, CheckpointError, "heads: expert 'gpt2' does not end in its head"),
    ],
)
def test_experts_that_do_not_split(
    mix: str,
    heads: bool,
    error: type[NacreError],
    message: str,
    place: Place,
    tmp_path: Path,
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tokenizers.load(place.root / "tokenizer")
    special = {f"{name}_token_id": None for name in ("bos", "eos", "pad")}
    shape = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = GPT2Config(vocab_size=len(tokenizer), **shape, **special)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(error) as caught:
        nacre.compose(
            [place.low, tmp_path / "gpt2"], tmp_path / "out", mix,
            tuning=place.tuning, tune_heads=heads,
        )  # fmt: skip
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_has_no_trace(place: Place, tmp_path: Path) -> None:
    mix_text(place, tmp_path / "out", "adapter")
    with pytest.raises(ConfigError, match=r"--weights-trace: .* is mixed by an adapter, which has"):
        nacre.trace(tmp_path / "out", "abc")


def test_text_that_cannot_be_used_is_refused_before_any_weight_is_read(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load_model", lambda folder: pytest.fail("weights are read"))
    (tmp_path / "short.txt").write_text("abc\nabc\n")
    for name, message in (("no.txt", "there is no such file"), ("short.txt", "give more text")):
        options = place.tuning.model_copy(update={"sources": (str(tmp_path / name),)})
        with pytest.raises(DataError, match=message):
            nacre.compose([place.low, place.high], tmp_path / "out", "gate", tuning=options)
        assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_refused_before_training(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(tuning, "train", lambda *_: pytest.fail("it trains"))
    (tmp_path / "file").write_text("in the way")
    text = ["--data", place.root / "low.txt", "--tokens", "4096"]
    code, _, shown = command(
        "compose", place.low, place.high, "--mix", "gate", *text, "--out", tmp_path / "file" / "out"
    )
    assert code == 2
    assert "Not a directory" in shown


def test_training_that_diverges_says_what_to_lower(place: Place, tmp_path: Path) -> None:
    wild = place.tuning.model_copy(update={"lr": 1e30})
    with pytest.raises(DivergedError, match=r"training diverged; lower --lr \(now 1e\+30\)|finite"):
        nacre.compose([place.low, place.high], tmp_path / "out", "adapter", tuning=wild)
    assert not (tmp_path / "out").exists()


def test_tied_heads_are_tuned_apart_from_the_embedding(place: Place, tmp_path: Path) -> None:
    tokenizer = tokenizers.load(place.root / "tokenizer")
    for seed, name in enumerate(("one", "two")):
        config = stock.llama_config(len(tokenizer), 32, 2, 64, 32, 1)
        config.tie_word_embeddings = True
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = [tmp_path / "one", tmp_path / "two"]
    nacre.compose(folders, tmp_path / "out", "mean-logits", tuning=place.tuning, tune_heads=True)
    model = nacre.load_composition(tmp_path / "out")
    for folder, parts in zip(folders, model.parts, strict=True):
        own = stock.find_parts(checkpoint.load_model(folder))
        assert torch.equal(parts.embedding.weight, own.embedding.weight)
        assert not torch.equal(parts.head.weight, own.head.weight)


def test_what_else_stands_in_the_folder_stays(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.low, place.high], out)
    shutil.copytree(place.low / "stages" / "01", out / "mine" / "third")
    stage = out / "mine" / "third" / "stage.json"
    stage.write_text(stage.read_text().replace('"fingerprint": "', '"fingerprint": "0'))
    (out / "notes.txt").write_text("keep me")
    nacre.add_expert(out / "mine" / "third", out)
    model = nacre.load_composition(out)
    assert model.expert_names == ["low", "high", "third"]
    assert (out / "notes.txt").read_text() == "keep me"
    nacre.remove_expert("third", out)
    nacre.tune_heads(out, place.tuning)
    assert (out / "mine" / "third" / "config.json").is_file()
    assert (out / TRAINED_FILE).stat().st_mode == (out / "config.json").stat().st_mode
    nacre.add_expert(out / "mine" / "third", out)
    assert not (out / TRAINED_FILE).exists()
