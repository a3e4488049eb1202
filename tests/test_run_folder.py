"""What a run accepts and refuses: its folder, what it resumes on, what it grows from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nacre.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    FingerprintError,
)
from nacre.folders import METRICS, RUN
from nacre.growth import plan as plans
from nacre.train import checkpoint, files, folder
from nacre.train.grow import grow
from nacre.train.metrics import NewMetrics, append_metrics, rewind_metrics
from nacre.train.observer import Observer


def records(run: Path) -> list[dict]:
    return [files.read_json(path / files.RECORD) for path in files.stages(run)]


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(stage).state_dict()


def test_output_folder_with_another_run(plan: plans.Plan, run: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds a run .*--resume.*--overwrite"):
        grow(plan, run)


def test_output_folder_with_other_files(plan: plans.Plan, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(ConfigError, match="holds files that are not a run's"):
        grow(plan, tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_what_a_run_left_that_died_before_it_had_a_plan_is_no_other_file(
    plan: plans.Plan, tmp_path: Path
) -> None:
    for name in (".plan.yaml.417.partial", ".lock"):
        (tmp_path / name).write_text("")
    assert folder.claim(tmp_path, plan, resume=False, overwrite=False) == plan


def test_new_metrics_are_read_once_and_a_new_file_from_its_beginning(tmp_path: Path) -> None:
    metrics, path = NewMetrics(tmp_path), tmp_path / METRICS
    assert metrics.read() == []
    append_metrics(tmp_path, {"stage": 1, "step": 1})
    with path.open("a") as file:
        file.write('{"stage": 1, "st')
    assert [line["step"] for line in metrics.read()] == [1]
    assert metrics.read() == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert [line["step"] for line in metrics.read()] == [2]
    rewind_metrics(tmp_path, 1, 1)
    append_metrics(tmp_path, {"stage": 1, "step": 2, "again": True})
    assert [line["step"] for line in metrics.read()] == [1, 2]


def test_output_is_a_file(plan: plans.Plan, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        grow(plan, tmp_path / "out")


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run \(name the plan to begin it with"):
        grow(None, tmp_path, resume=True)


def test_resume_begins_what_is_not_there(plan: plans.Plan, tmp_path: Path) -> None:
    assert folder.claim(tmp_path / "run", plan, resume=True, overwrite=False) == plan


def test_a_mistake_does_not_cost_the_run_to_be_overwritten(
    plan: plans.Plan, run: Path, tmp_path: Path
) -> None:
    lost = plan.model_copy(update={"data": plans.Data(sources=(str(tmp_path / "lost.txt"),))})
    before = sorted(run.rglob("*"))
    with pytest.raises(DataError):
        grow(lost, run, overwrite=True)
    assert sorted(run.rglob("*")) == before


def test_a_run_is_not_overwritten_by_what_grows_from_it(plan: plans.Plan, run: Path) -> None:
    before = sorted(run.rglob("*"))
    branch = plan.model_copy(update={"start_from": str(run / "stages" / "02")})
    same = plan.model_copy(update={"tokenizer": plans.Tokenizer(path=f"hf:{run / 'tokenizer'}")})
    for other in (branch, same):
        with pytest.raises(ConfigError, match=r"would delete .*, which this plan reads"):
            grow(other, run, overwrite=True)
    assert sorted(run.rglob("*")) == before


def test_overwriting_a_run(plan: plans.Plan, tmp_path: Path) -> None:
    short = plan.model_copy(update={"stages": plan.stages[:2]})
    grow(short, tmp_path / "run")
    grow(short.model_copy(update={"stages": plan.stages[:1]}), tmp_path / "run", overwrite=True)
    assert len(files.stages(tmp_path / "run")) == 1


def test_missing_data_leaves_no_folder(plan: plans.Plan, tmp_path: Path) -> None:
    lost = plan.model_copy(update={"data": plans.Data(sources=(str(tmp_path / "lost.txt"),))})
    with pytest.raises(DataError, match=r"lost\.txt"):
        grow(lost, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_text_that_is_not_utf8_names_the_place_and_leaves_no_run(
    plan: plans.Plan, tmp_path: Path
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 5000)
    data = plan.model_dump(mode="json", by_alias=True)
    data["data"]["sources"] = [str(tmp_path / "latin.txt")]
    with pytest.raises(DataError, match=r"latin\.txt.* 3\b"):
        grow(plans.parse(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("place", ["a link", "the working folder"])
def test_a_failed_start_says_why_where_the_folder_has_to_stay(
    place: str, plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "short.txt").write_text("A short text. " * 4)
    data = plan.model_dump(mode="json", by_alias=True)
    data["data"]["sources"] = [str(tmp_path / "short.txt")]
    folder_ = tmp_path / "folder"
    folder_.mkdir()
    if place == "a link":
        out = tmp_path / "link"
        out.symlink_to(folder_)
    else:
        out = Path()
        monkeypatch.chdir(folder_)
    with pytest.raises(DataError, match="context is longer than the corpus"):
        grow(plans.parse(data), out)
    assert list(folder_.iterdir()) == []


def test_context_longer_than_the_corpus(plan: plans.Plan, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A short text. " * 4)
    data = plan.model_dump(mode="json", by_alias=True)
    data["data"]["sources"] = [str(tmp_path / "short.txt")]
    with pytest.raises(DataError, match="context is longer than the corpus"):
        grow(plans.parse(data), tmp_path / "run")


def test_too_little_disk(plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"needs about .* GB free"):
        grow(plan, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A folder of a run that holds 1 GB, in two names of one file, and a cache of 5 GB."""
    out = tmp_path / "run"
    for name, size in (("stages/01/blocks-01", 10**9), ("cache/02/train", 5 * 10**9)):
        (out / name).parent.mkdir(parents=True)
        with (out / name).open("wb") as file:
            file.truncate(size)  # on disk it takes nothing
    (out / "stages" / "02").mkdir()
    (out / "stages" / "02" / "blocks-01").hardlink_to(out / "stages" / "01" / "blocks-01")
    return out


@pytest.mark.parametrize("demanded", [True, False])
def test_a_resumed_run_need_not_fit_the_disk_again(
    demanded: bool, half: Path, plan: plans.Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10**9}))
    if demanded:
        trunk = plans.Trunk(mode="cache")
        plan = plan.model_copy(update={"trunk": trunk})
    here = 6 if demanded else 1
    folder.check_disk(half, plan, None, extra=here * 10**9)
    said = rf"1\.00 GB free and {here}\.00 GB of the run are there already \(free some"
    with pytest.raises(ConfigError, match=said):
        folder.check_disk(half, plan, None, extra=(here + 1) * 10**9)


def test_what_is_overwritten_leaves_its_place_unless_it_has_a_name_elsewhere(
    half: Path, plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda _: type("usage", (), {"free": 10**9}))
    folder.check_disk(half, plan, None, extra=6 * 10**9, overwrite=True)
    (tmp_path / "branch").hardlink_to(half / "stages" / "01" / "blocks-01")
    said = r"1\.00 GB free and 5\.00 GB are freed by overwriting \(free some"
    with pytest.raises(ConfigError, match=said):
        folder.check_disk(half, plan, None, extra=6 * 10**9, overwrite=True)


def test_substrate_of_another_tokenizer(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["substrate"] = {"path": str(run / "substrate")}
    data["tokenizer"] = {"size": 520}
    with pytest.raises(FingerprintError, match="build the substrate for this tokenizer"):
        grow(plans.parse(data), tmp_path / "run")


def test_substrate_of_another_width(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["substrate"] = {"path": str(run / "substrate")}
    data["tokenizer"] = {"path": str(run / "tokenizer")}
    data["model"]["width"] = 64
    with pytest.raises(ConfigError, match=r"64, but substrate .* has 32 dimensions"):
        grow(plans.parse(data), tmp_path / "run")


def test_a_checkpoint_that_cannot_be_grown(plan: plans.Plan, tmp_path: Path) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    data = plan.model_dump(mode="json", by_alias=True) | {"from": str(tmp_path / "t5")}
    with pytest.raises((ConfigError, CheckpointError), match="cannot be"):
        grow(plans.parse(data), tmp_path / "run")


def test_a_folder_without_a_model(plan: plans.Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True) | {"from": str(tmp_path)}
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        grow(plans.parse(data), tmp_path / "run")


def hf_folder(tmp_path: Path, tiny_run: Path, config: dict) -> Path:
    """A checkpoint of another class, with a real tokenizer and weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "theirs"
    shutil.copytree(tiny_run / "tokenizer", folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.save_pretrained(folder)
    return folder


GPT2 = {"model_type": "gpt2", "vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2,
        "n_positions": 32, "bos_token_id": 1, "eos_token_id": 1}  # fmt: skip


def grow_from(base: Path, plan: plans.Plan, context: int = 32, init: str = "zero") -> plans.Plan:
    data = plan.model_dump(mode="json", by_alias=True) | {"from": str(base)}
    data["model"] = {"context": context}
    data["training"]["batch_tokens"] = 8 * context
    data["stages"] = [{"add_blocks": 1, "tokens": 8 * context, "init": init}]
    return plans.parse(data)


def test_growing_a_foreign_checkpoint(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    base = hf_folder(tmp_path, run, GPT2)
    (record,) = grow(grow_from(base, plan), tmp_path / "run")
    assert (record["depth"], record["trunk_mode"], record["parent"]) == (
        3,
        "whole",
        files.read_json(tmp_path / "run" / "base" / "stage.json")["fingerprint"],
    )
    before = checkpoint.load_model(base).state_dict()
    after = weights(tmp_path / "run" / "stages" / "01")
    assert torch.equal(
        after["transformer.h.1.mlp.c_fc.weight"], before["transformer.h.1.mlp.c_fc.weight"]
    )
    assert torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"]), "untied, and trained"


class Dies(Observer):
    """Ends a run after its second step."""

    def trained(self, step: dict[str, Any]) -> None:
        if step["step"] == 2:
            raise KeyboardInterrupt


def test_a_run_goes_on_from_the_stage_of_another_run_that_it_began_on(
    plan: plans.Plan, run: Path, tmp_path: Path
) -> None:
    base, out = tmp_path / "base", tmp_path / "run"
    shutil.copytree(run, base)
    for later in ("02", "03"):
        shutil.move(base / "stages" / later, tmp_path / later)
    data = grow_from(base, plan).model_dump(mode="json", by_alias=True)
    data["training"]["save_every"] = 1
    data["stages"][0]["tokens"] *= 3
    begun = plans.parse(data)
    with pytest.raises(KeyboardInterrupt):
        grow(begun, out, observer=Dies())
    shutil.move(tmp_path / "02", base / "stages" / "02")

    stage = base / "stages" / "01"
    record = files.read_json(stage / files.RECORD)
    known = {"named": str(base), "path": str(stage), "fingerprint": record["fingerprint"]}
    assert files.read_run(out)["fingerprints"]["base"] == known
    files.write_json(stage / files.RECORD, record | {"fingerprint": "f" * 64})
    with pytest.raises(FingerprintError) as error:
        grow(None, out, resume=True)
    assert str(error.value) == (
        f"the checkpoint {stage}, which {out} grows, does not match: expected "
        f"{record['fingerprint'][:12]}, found ffffffffffff (restore it, or start a new run in "
        "another --out)"
    )
    files.write_json(stage / files.RECORD, record)
    (grown,) = grow(None, out, resume=True)
    assert (grown["depth"], grown["parent"]) == (2, record["fingerprint"])

    files.write_json(stage / files.RECORD, record | {"fingerprint": "f" * 64})
    data["stages"] *= 2
    assert len(grow(plans.parse(data), out, resume=True)) == 2, "it stands on its own stage now"
    assert files.read_run(out)["fingerprints"]["base"] == known


def test_context_longer_than_the_checkpoints(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    base = hf_folder(tmp_path, run, GPT2)
    with pytest.raises(ConfigError, match=r"model\.context: 64, but .* has 32 positions"):
        grow(grow_from(base, plan, context=64), tmp_path / "run")


def test_an_encoder_cannot_be_grown(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    bert = {"model_type": "bert", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "intermediate_size": 64, "is_decoder": True}  # fmt: skip
    base = hf_folder(tmp_path, run, bert)
    with pytest.raises(ConfigError, match="cannot be grown"):
        grow(grow_from(base, plan, init="random"), tmp_path / "run")


def test_resuming_on_other_text_is_refused(plan: plans.Plan, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The oyster lays down one thin layer at a time.\n\n" * 400)
    data = plan.model_dump(mode="json", by_alias=True)
    data["data"]["sources"] = [str(text)]
    data["stages"] = [{"add_blocks": 1, "tokens": 256}]
    grow(plans.parse(data), tmp_path / "run")
    text.write_text("The pearl is another text.\n\n" * 800)
    data["stages"] *= 2
    with pytest.raises(FingerprintError, match=r"the text of .*text\.txt does not match"):
        grow(plans.parse(data), tmp_path / "run", resume=True)


def test_a_failed_resume_deletes_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / RUN).unlink()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("damaged")
    with pytest.raises(ConfigError):
        grow(None, tmp_path / "run", resume=True)
    assert len(files.stages(tmp_path / "run")) == 3


def test_a_run_keeps_the_machines_and_versions_that_it_was_made_on(plan: plans.Plan) -> None:
    def written(before: dict[str, Any]) -> dict[str, Any]:
        return folder.start_record(plan, {}, torch.device("cpu"), before)

    here = written({})
    assert here["earlier"] == []
    assert written(here) == here
    other = {"versions": here["versions"], "machine": here["machine"] | {"threads": 99}}
    old = here | other
    del old["earlier"]  # as an older nacre wrote it
    assert written(old) == here | {"earlier": [other]}
    assert written(written(old)) == written(old)
    there_again = written(old) | other | {"earlier": [{**other, "machine": here["machine"]}]}
    assert written(there_again) == written(old), "it was here before"


def test_resuming_a_finished_run_leaves_its_record(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    record = files.read_run(run)
    elsewhere = record | {"machine": record["machine"] | {"processor": "another"}}
    files.write_json(tmp_path / "run" / RUN, elsewhere)
    grow(None, tmp_path / "run", resume=True)
    assert files.read_run(tmp_path / "run") == elsewhere


def test_a_resumed_run_keeps_the_record_of_its_first_machine(
    plan: plans.Plan, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stage = plan.stages[0].model_copy(update={"tokens": plan.training.batch_tokens})
    one, two = (plan.model_copy(update={"stages": (stage,) * count}) for count in (1, 2))
    grow(one, out)
    record = files.read_run(out)
    machine = record["machine"] | {"processor": "another"}
    files.write_json(out / RUN, record | {"machine": machine})
    grow(two, out, resume=True)
    found = files.read_run(out)
    assert found["machine"] == record["machine"]
    assert found["earlier"] == [{"versions": record["versions"], "machine": machine}]


def test_a_missing_stage_is_noticed(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "stages" / "02")
    with pytest.raises(CheckpointError, match="stage 2 is missing below stage 3"):
        grow(None, tmp_path / "run", resume=True)


def test_stages_are_in_order_beyond_99(tmp_path: Path) -> None:
    for number in range(1, 102):
        folder_ = tmp_path / "stages" / f"{number:02d}"
        folder_.mkdir(parents=True)
        (folder_ / files.RECORD).write_text("{}")
    assert [int(path.name) for path in files.stages(tmp_path)] == list(range(1, 102))


def test_a_damaged_record(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "stages" / "03" / "stage.json").write_text('{"stage": 3}')
    longer = plan.model_copy(update={"stages": (*plan.stages, plan.stages[0])})
    with pytest.raises(CheckpointError, match="damaged: lacks 'frozen'"):
        grow(longer, tmp_path / "run", resume=True)


def test_a_large_seed(plan: plans.Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True) | {"seed": 5_000_000_000}
    data["stages"] = [{"add_blocks": 1, "tokens": 256}]
    grow(plans.parse(data), tmp_path / "run")


def test_a_batch_that_processes_cannot_share(
    plan: plans.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = r"training\.batch_tokens: 8 windows of 32, not to be shared by 3 processes \(use a mult"
    with pytest.raises(ConfigError, match=said):
        grow(plan, tmp_path / "run")


def test_a_tracker_that_is_not_installed(plan: plans.Plan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aim is not installed"):
        grow(plan, tmp_path / "run", trackers=["aim"])


def test_training_that_diverges_says_so(plan: plans.Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["training"] |= {"lr": 1e30, "clip": 1e30, "warmup": 0.0}
    with pytest.raises(DivergedError, match=r"diverged; lower training\.lr"):
        grow(plans.parse(data), tmp_path / "run")


def test_a_stages_tokenizer_is_its_own(run: Path, tmp_path: Path) -> None:
    one, two, _ = files.stages(run)
    assert not (one / "tokenizer.json").samefile(two / "tokenizer.json"), "users rewrite these"


@pytest.mark.parametrize(
    ("fingerprints", "message"),
    [
        ("/", "'fingerprints': input should be a valid dictionary"),
        ({"tokenizer": 1.5}, "'fingerprints.tokenizer': input should be a valid string"),
        ({"corpora": "a"}, "'fingerprints.corpora': input should be a valid dictionary"),
        ({"corpora": {"a": -1}}, "'fingerprints.corpora.a': input should be a valid string"),
    ],
)
def test_a_run_record_of_another_kind(fingerprints: object, message: str, tmp_path: Path) -> None:
    files.write_json(tmp_path / RUN, {"fingerprints": fingerprints})
    with pytest.raises(CheckpointError, match=rf"run\.json: damaged: {message}"):
        folder.check_parts(tmp_path, {"tokenizer": "a", "substrate": "b", "corpora": {}})
