"""The hub, by a stand-in of its HTTP interface: what goes up, what comes back, what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from conftest import WITHOUT_NACRE, Command
from hub_server import TOKEN, Hub, serving

import nacre
from nacre import hub as client
from nacre.composition import load_any
from nacre.errors import CheckpointError, ConfigError
from nacre.substrate import Substrate
from nacre.train import files

# How the hub's own client sends large files.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A stand-in that the client of this process talks to, logged in, with a cache of its own."""
    with serving() as served:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        for constant, value in {  # the client reads the environment when it is imported
            "ENDPOINT": served.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{served.endpoint}/{{repo_id}}/resolve/{{revision}}/"
            "{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, constant, value)
        client.fetch_grown.cache_clear()
        yield served
        huggingface_hub.close_session()


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def front(card: bytes) -> dict[str, Any]:
    return yaml.safe_load(card.decode().split("---\n")[1])


@pytest.fixture
def bundle(tiny_run: Path, tmp_path: Path) -> Path:
    stages = [tiny_run / "stages" / number for number in ("01", "02")]
    nacre.compose(stages, tmp_path / "both", names=["low", "high"], bundle=True)
    return tmp_path / "both"


def test_the_newest_stage_and_back(hub: Hub, tiny_run: Path, ids: torch.Tensor) -> None:
    sent = nacre.push_to_hub(tiny_run, "pearl/tiny", licence="apache-2.0")
    assert (sent["name"], sent["kind"]) == ("pearl/tiny", "stage")
    tree = hub.repositories["pearl/tiny"].tree()
    stage = tiny_run / "stages" / "03"
    here = {path.name for path in stage.iterdir()}
    assert set(tree) == here | {".gitattributes"}
    assert sent["revisions"] == {"main": sorted(here)}
    assert not hub.repositories["pearl/tiny"].private
    for name in here - {"README.md"}:
        assert tree[name] == (stage / name).read_bytes()
    loaded = nacre.from_pretrained("pearl/tiny")
    assert torch.equal(logits(loaded, ids), logits(load_any(stage), ids))


@pytest.mark.parametrize("field", ["new_blocks", "substrate", "corpus"])
def test_a_stage_whose_record_lacks_what_its_card_says_stays_here(
    tiny_run: Path, tmp_path: Path, field: str
) -> None:
    shutil.copytree(tiny_run / "stages/02", tmp_path / "stage")
    record = json.loads((tmp_path / "stage/stage.json").read_text())
    del record[field]
    (tmp_path / "stage/stage.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"stage.json: damaged: lacks '{field}'"):
        nacre.push_to_hub(tmp_path / "stage", "pearl/tiny")


def test_the_card_says_where_it_comes_from(
    hub: Hub, tiny_run: Path, tmp_path: Path, command: Command
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(tiny_run), str(run)], check=True)
    nacre.evaluate_checkpoints([run / "stages" / "03"], ["copy"], limit=8)
    (score,) = map(json.loads, (run / "evaluations.jsonl").read_text().splitlines())
    stale = score | {"fingerprint": "other", "value": 0.123456}
    with (run / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(stale) + "\n")
    code, _, err = command("push", run, "--to", "pearl/tiny", "--license", "cc-by-4.0")
    assert (code, "stage: main" in err) == (0, True)
    card = hub.repositories["pearl/tiny"].tree()["README.md"]
    record = files.read_record(run / "stages" / "03")
    about = front(card)
    assert about["license"] == "cc-by-4.0"
    assert about["library_name"] == "transformers"
    text = card.decode()
    assert f"| Parameters | {record['total_parameters']:,} |" in text
    assert f"{record['active_parameters']:,}" in text
    for number in (1, 2, 3):
        stage = files.read_record(run / "stages" / f"0{number}")
        assert f"`{stage['fingerprint'][:16]}`" in text, "lineage"
    assert "- `default`" in text, "data"
    assert record["corpus"] in text
    low, high = score["interval"]
    assert f"| copy | accuracy | {score['value']:.4g} | {low:.4g} to {high:.4g} | 0.1 | 8 |" in text
    assert "0.1235" not in text, "a score of other weights"
    assert 'AutoModelForCausalLM.from_pretrained("pearl/tiny")' in text
    assert str(tmp_path) not in text


def test_a_card_names_what_is_on_the_hub_and_no_folder_of_the_machine(
    hub: Hub, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", str(tiny_run), str(run)], check=True)
    plan = yaml.safe_load((run / "plan.yaml").read_text())
    plan["data"]["sources"] = [str(tmp_path / "secret" / "novels"), "hf:some/texts:train"]
    plan["from"] = "hf:some/model"
    (run / "plan.yaml").write_text(yaml.safe_dump(plan))
    nacre.push_to_hub(run, "pearl/tiny")
    card = hub.repositories["pearl/tiny"].tree()["README.md"]
    about = front(card)
    assert about["datasets"] == ["some/texts"]
    assert about["base_model"] == "some/model"
    assert "license" not in about
    assert "No licence is stated" in card.decode()
    assert "- `novels`" in card.decode()
    assert "secret" not in card.decode()


def test_every_stage_has_a_branch_and_shared_shards_go_up_once(hub: Hub, tiny_run: Path) -> None:
    nacre.push_to_hub(tiny_run, "pearl/tiny", stage="all")
    repository = hub.repositories["pearl/tiny"]
    assert set(repository.branches) == {"main", "stage-01", "stage-02", "stage-03"}
    assert set(hub.sent.values()) == {1}
    shards = {path.stat().st_ino for path in tiny_run.glob("stages/*/*.safetensors")}
    assert len(hub.sent) == len(shards)
    assert "blocks-02.safetensors" not in repository.tree("stage-01")
    assert b'revision="stage-01"' in repository.tree("stage-01")["README.md"]
    loaded = nacre.from_pretrained("pearl/tiny", revision="stage-01")
    assert loaded.config.num_hidden_layers == 1
    commits = len(repository.commits)
    nacre.push_to_hub(tiny_run, "pearl/tiny", stage="all")
    assert len(repository.commits) == commits, "nothing is new"


def test_weights_that_are_no_longer_there_go(hub: Hub, tiny_run: Path) -> None:
    nacre.push_to_hub(tiny_run, "pearl/tiny")
    tree = hub.repositories["pearl/tiny"].tree()
    assert "blocks-03.safetensors" in tree
    tree["picture.png"] = b"mine"
    nacre.push_to_hub(tiny_run, "pearl/tiny", stage=1)
    tree = hub.repositories["pearl/tiny"].tree()
    assert "blocks-03.safetensors" not in tree
    assert "picture.png" in tree


def test_what_is_only_a_run_s_does_not_go_up(hub: Hub, tiny_run: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    subprocess.run(["cp", "-a", str(tiny_run / "stages" / "01"), str(stage)], check=True)
    local = (
        "state/progress.json", "cache/a.safetensors", "data/01/tokens.json", "logs/a.txt",
        "trackers/a.json", ".config.json.partial/a.json", "evaluations.jsonl", "out.log",
    )  # fmt: skip
    for name in local:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).write_text("")
    sent = nacre.push_to_hub(stage, "pearl/tiny", private=True)
    expected = sorted(path.name for path in (tiny_run / "stages" / "01").iterdir())
    assert sent["revisions"]["main"] == expected
    assert hub.repositories["pearl/tiny"].private


def test_a_composition_and_back_without_nacre(
    hub: Hub, bundle: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    nacre.push_to_hub(bundle, "pearl/both")
    assert set(hub.sent.values()) == {1}, "shards that experts share are sent once"
    tree = hub.repositories["pearl/both"].tree()
    assert tree["experts/low/substrate.safetensors"] == tree["experts/high/substrate.safetensors"]
    expected = logits(load_any(bundle), ids)
    assert torch.equal(logits(nacre.from_pretrained("pearl/both"), ids), expected)
    program = f"""{WITHOUT_NACRE}
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("pearl/both", trust_remote_code=True)
AutoTokenizer.from_pretrained("pearl/both")
with torch.no_grad():
    torch.save(model(input_ids=torch.load("ids.pt")).logits, "logits.pt")
"""
    torch.save(ids, tmp_path / "ids.pt")
    own = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | own,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    card = tree["README.md"].decode()
    assert 'from_pretrained("pearl/both", trust_remote_code=True)' in card


def test_the_card_of_a_trained_composition_names_no_folder(
    hub: Hub, bundle: Path, tmp_path: Path
) -> None:
    record = json.loads((bundle / "composition.json").read_text())
    scores = {when: {"bits_per_byte": 2.0} for when in ("before", "after")}
    (bundle / "trained.safetensors").write_bytes(b"heads")
    record["trained"] = {
        "what": "heads", "parameters": 1, "tokens": 1, "seconds": 1.0, "lr": 1e-3,
        "validation": scores,
        "sources": [str(tmp_path / "secret" / "texts")],
        "sha256": hashlib.sha256(b"heads").hexdigest(),
    }  # fmt: skip
    (bundle / "composition.json").write_text(json.dumps(record))
    nacre.push_to_hub(bundle, "pearl/both")
    card = hub.repositories["pearl/both"].tree()["README.md"].decode()
    assert "`texts`" in card
    assert "secret" not in card


def test_substrates_and_tokenizers(hub: Hub, tiny_run: Path) -> None:
    for kind in ("substrate", "tokenizer"):
        sent = nacre.push_to_hub(tiny_run / kind, f"pearl/{kind}", licence="mit")
        assert sent["kind"] == kind
        assert front(hub.repositories[f"pearl/{kind}"].tree()["README.md"])["license"] == "mit"
    substrate = Substrate.load(tiny_run / "substrate")
    assert nacre.from_pretrained("pearl/substrate").fingerprint == substrate.fingerprint
    text = "def f(x): return x"
    here = nacre.from_pretrained(tiny_run / "tokenizer")
    assert nacre.from_pretrained("pearl/tokenizer").encode(text) == here.encode(text)


def test_commands_read_what_was_pushed(hub: Hub, tiny_run: Path, command: Command, plan: Any,
                                       tmp_path: Path) -> None:  # fmt: skip
    nacre.push_to_hub(tiny_run, "pearl/tiny")
    here = command("generate", tiny_run, "def", "--max-new-tokens", "4", "--json")
    there = command("generate", "hf:pearl/tiny", "def", "--max-new-tokens", "4", "--json")
    assert here[:2] == there[:2]
    other = tiny_run / "stages" / "01"
    record = nacre.compose(["hf:pearl/tiny", other], tmp_path / "both", bundle=True)
    assert [expert["name"] for expert in record["experts"]] == ["tiny-1", "tiny-2"]
    newest = files.read_record(tiny_run / "stages" / "03")["fingerprint"]
    assert record["experts"][0]["fingerprint"] == newest, "it came with its ledger"
    assert all(path.stat().st_size for path in (tmp_path / "both").rglob("*.safetensors"))
    more = plan.model_copy(update={"start_from": "hf:pearl/tiny", "stages": plan.stages[1:2]})
    (grown,) = nacre.grow(more, tmp_path / "grown")
    assert grown["parent"] == newest
    nacre.push_to_hub(tmp_path / "grown", "pearl/grown")
    assert front(hub.repositories["pearl/grown"].tree()["README.md"])["base_model"] == "pearl/tiny"


def test_what_is_on_the_hub_is_scored(
    hub: Hub, tiny_run: Path, command: Command, tmp_path: Path
) -> None:
    nacre.push_to_hub(tiny_run, "pearl/grown")
    nacre.push_to_hub(tiny_run, "pearl/foreign")
    del hub.repositories["pearl/foreign"].tree()["stage.json"]
    out, local = tmp_path / "scores.jsonl", tiny_run / "stages" / "03"
    asked = ("--tasks", "copy", "--limit", "8", "--out", out, "--json")
    code, said, _ = command("eval", "hf:pearl/grown", "hf:pearl/foreign", local, *asked)
    grown, foreign, here = json.loads(said)["results"]
    assert code == 0
    assert grown["value"] == foreign["value"] == here["value"]
    assert grown["fingerprint"] == here["fingerprint"] != foreign["fingerprint"]
    with pytest.raises(client.HubError, match="pearl/lost: the hub has no such repository"):
        nacre.evaluate_checkpoints(["hf:pearl/lost"], ["copy"])


def test_without_a_token(
    hub: Hub, tiny_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = command("push", tiny_run, "--to", "pearl/tiny")
    assert code == 2
    assert err.count("\n") == 1
    assert "hf auth login" in err
    assert hub.repositories == {}


@pytest.mark.parametrize(
    ("token", "name", "refuse", "message"),
    [
        ("wrong", "pearl/tiny", 0, "hf auth login"),
        (TOKEN, "other/tiny", 0, "no writing here"),
        (TOKEN, "pearl/tiny", 418, "being mended"),
        (TOKEN, "pearl/a b", 0, "a b"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, tiny_run: Path, command: Command, monkeypatch: pytest.MonkeyPatch,
    token: str, name: str, refuse: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    hub.refuse = refuse
    code, _, err = command("push", tiny_run, "--to", name)
    assert code == 2
    assert err.count("\n") == 1
    assert message in err


def test_what_cannot_be_fetched(hub: Hub, tiny_run: Path) -> None:
    with pytest.raises(client.HubError, match="pearl/lost: the hub has no such repository"):
        nacre.from_pretrained("pearl/lost")
    nacre.push_to_hub(tiny_run, "pearl/tiny")
    with pytest.raises(client.HubError, match="no such revision"):
        nacre.from_pretrained("pearl/tiny", revision="stage-09")
    with pytest.raises(ConfigError, match="has no revisions"):
        nacre.from_pretrained(tiny_run / "tokenizer", revision="main")


def test_no_way_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(client.HubError) as refused:
        nacre.from_pretrained("pearl/tiny")
    assert "\n" not in str(refused.value)
    huggingface_hub.close_session()


def test_what_cannot_be_sent(tiny_run: Path, tmp_path: Path, command: Command) -> None:
    stages = [tiny_run / "stages" / number for number in ("01", "02")]
    nacre.compose(stages, tmp_path / "referring", names=["low", "high"])
    (tmp_path / "empty").mkdir()
    for source, options, message in [
        (tmp_path / "lost", (), "there is no folder"),
        (tmp_path / "empty", (), "holds no stage, composition, substrate or tokenizer"),
        (tmp_path / "referring", (), "compose it with --bundle"),
        (tiny_run, ("--stage", "9"), "has no finished stage 9 (1 to 3, or all)"),
        (stages[0], ("--stage", "1"), "is no run"),
        (tiny_run, ("--to", "tiny"), "USER/NAME"),
    ]:
        code, _, err = command("push", source, "--to", "pearl/tiny", *options)
        assert code == 2
        assert message in err
