"""The main job: grow a model stage by stage, from text to stock checkpoints.

`grow` reads like the job: claim the folder, make the parts (tokenizer, tokens, substrate), then run
the stages. Everything that a user can get wrong is checked before the first step is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, set_seed

from nacre import config, processes
from nacre import tokenizer as tokenizers
from nacre.data import corpus
from nacre.data.loader import LoaderState
from nacre.data.shards import TokenStore
from nacre.errors import CheckpointError, ConfigError, NacreError, Problem, nearest
from nacre.folders import PLAN, RUN
from nacre.growth import budget, ledger, stage
from nacre.growth import plan as plans
from nacre.growth.plan import Plan, Stage
from nacre.growth.trunk import release_memory
from nacre.models import stock
from nacre.train import checkpoint, files, folder, sharding, state
from nacre.train.device import TIMEOUT, accelerating
from nacre.train.engine import StageTrunk, drop_caches, reading
from nacre.train.hooks import asked_to_stop, hooks, report_validation, steps_of
from nacre.train.interruption import (
    Interrupted,
    lost_processes,
    memory_advice,
    smaller_steps,
    stop_signals,
)
from nacre.train.loop import StageRun, setup, train
from nacre.train.metrics import rewind_metrics
from nacre.train.observer import Observer
from nacre.train.parts import Parts, make_parts, source_sets
from nacre.train.record import Below, certify_merge, plain_cost, save_stage, stage_record
from nacre.train.state import SavedState


def grow(
    plan: Plan | None,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    trackers: Sequence[str] = (),
    timeout: timedelta = TIMEOUT,
    observer: Observer | None = None,
) -> list[dict[str, Any]]:
    """Grow a model by a plan into the folder `out`; return the record of every stage.

    `resume` continues an interrupted run from its saved state, or adds the stages that `plan` has
    beyond it. `trackers` are names that Accelerate knows. Several processes that a launcher started
    work on one run: each waits `timeout` for the others in a step. Raises a `NacreError` for
    whatever a user can mend, before anything expensive where that is possible.
    """
    out, observer = Path(out), observer or Observer()
    if processes.is_main():
        plan = folder.claim(out, plan, resume=resume, overwrite=overwrite)
        check(plan, out, trackers, overwrite=overwrite and not resume)
    elif plan is None:
        plan = plans.parse(config.read_yaml(out / PLAN), where=str(out / PLAN))
    assert plan is not None
    with (
        folder.held(out),
        accelerating(plan.training, plan.model.context, out, trackers, timeout) as accelerator,
    ):
        processes.on_main(lambda: folder.make(out, plan, overwrite=overwrite and not resume))
        try:
            grow_stages(plan, out, accelerator, observer, resume=resume)
        except NacreError:
            if processes.is_main() and not resume and not (out / RUN).exists():
                folder.remove(out)  # nothing was trained: the mended plan finds an empty place
            raise
    return [files.read_json(path / files.RECORD) for path in files.stages(out)]


def grow_stages(
    plan: Plan, out: Path, accelerator: Accelerator, observer: Observer, *, resume: bool
) -> None:
    """Make the parts of a run in the folder `out`, or open them, and run the stages that remain."""
    parts = processes.on_main_first(lambda: make_parts(plan, out, observer))
    release_memory()  # what making them took is no stage's
    if resume:
        folder.check_parts(out, parts.fingerprints)
    left = range(len(files.stages(out)), len(plan.stages))
    known = (out / RUN).exists()
    if processes.is_main() and (left or not known):
        before = files.read_run(out) if known else {}
        record = folder.start_record(plan, parts.fingerprints, accelerator.device, before)
        files.write_json(out / RUN, record)
    accelerator.init_trackers("trackers")
    for index in left:
        run_stage(plan, index, out, parts, accelerator, observer)
    drop_caches(out)
    accelerator.end_training()


def check(plan: Plan, out: Path, trackers: Sequence[str] = (), *, overwrite: bool = False) -> None:
    """Check all that can be checked before any work: trackers, sources, parts given, disk."""
    windows, count = plan.training.batch_tokens // plan.model.context, processes.count()
    if windows % count:
        message = (
            f"{windows} windows of {plan.model.context}, not to be shared by {count} processes"
        )
        fix = f"use a multiple of {count * plan.model.context}, or another number of processes"
        raise ConfigError(Problem("training.batch_tokens", message, fix))
    for tracker in trackers:
        known = [str(name) for name in LoggerType if name != LoggerType.ALL]
        if tracker not in known:
            hint = nearest(tracker, known) or f"known: {', '.join(known)}, none"
            raise ConfigError(Problem("--track", f"unknown tracker {tracker!r}", hint))
        if tracker not in map(str, get_available_trackers()):
            message = f"{tracker} is not installed"
            raise ConfigError(Problem("--track", message, f"pip install {tracker}"))
    if plan.tokenizer.path is not None:
        tokenizers.load(plan.tokenizer.path)
    text_bytes = sum(corpus.check(sources).total_bytes or 0 for sources in source_sets(plan))
    base = None
    if plan.start_from is not None:
        known = None if overwrite else folder.base_of(plan, out)
        base = checkpoint.load_config(known or checkpoint.newest(plan.start_from))
        with growable(plan):
            stock.count_parameters(base)
        found = plans.reopening_problems(plan, base.get_text_config().num_hidden_layers)
        if found:
            raise ConfigError(found)
        positions = stock.positions(base)
        if positions is not None and plan.model.context > positions:
            message = f"{plan.model.context}, but {plan.start_from} has {positions} positions"
            fix = f"use at most {positions}: --set model.context={positions}"
            raise ConfigError(Problem("model.context", message, fix))
    # A token takes 2 or 4 bytes and stands for about as many; its store is written twice.
    folder.check_disk(out, plan, base, extra=2 * text_bytes, overwrite=overwrite)


@contextmanager
def growable(plan: Plan) -> Iterator[None]:
    """Turn what a foreign model class raises into the one message that it cannot be grown."""
    try:
        yield
    except (
        ValueError, AttributeError, TypeError, LookupError, ArithmeticError, RuntimeError
    ) as error:  # fmt: skip
        if plan.start_from is None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(Problem("from", f"{plan.start_from} cannot be grown: {reason}")) from None


def run_stage(
    plan: Plan, index: int, out: Path, parts: Parts, accelerator: Accelerator, observer: Observer
) -> None:
    """Run one stage, from the checkpoint below it to its own."""
    this, number = plan.stages[index], index + 1
    below = processes.on_main(lambda: find_below(index, out, parts.base))
    start = start_stage(plan, index, parts, below)
    model, adapted = start.model, start.adapted
    frozen = ledger.frozen_hashes(model)
    check_inherited(frozen, below)

    store = parts.stores[plan.sources_of(this)]
    cursor = next_cursor(plan, below, store)
    saved = saved_state(out, number, observer)
    set_up = StageTrunk(
        plan=plan,
        index=index,
        model=model,
        depth=start.trunk_depth,
        hashes=frozen,
        read=reading(plan, index, store, cursor),
        out=out,
        accelerator=accelerator,
        observer=observer,
        trains=adapted is not None or start.embedding_trains,
        exact=start.exact,
        begun=saved is not None,
    ).set_up()
    resident = ledger.frozen_hashes(model)
    run = setup(
        model,
        this,
        plan.training_of(this),
        store,
        accelerator,
        objective=set_up.objective,
        outputs=set_up.outputs,
        context=plan.model.context,
        seed=plan.seed,
        byte_lengths=tokenizers.byte_lengths(parts.tokenizer),
        cursor=cursor,
    )
    restore(run, out, number, saved)
    observer.stage_started(
        number, len(plan.stages), run.steps * run.batch_tokens, run.progress.tokens
    )
    before = steps_of(files.stages(out)[:index], run.batch_tokens)
    if run.progress.step == 0:
        start = report_validation(run, out, number, observer, before)
        run.progress.history = [(0, start["loss"])]
    plain = plain_cost(plan, number, parts)
    memory = memory_advice(f"stage {number}", smaller_steps(plan))
    with stop_signals() as stop, memory, lost_processes(out):
        train(run, hooks(number, out, observer, below, plain.flops_per_token, stop, before))

    ledger.verify_frozen(model, resident)
    trained: dict[str, Any] = {
        "active_parameters": sum(p.numel() for p in run.trained_weights().values()),
        "trainable": stage.trainable_names(model),
        "lora": None,
    }
    run.end_training()
    if sharding.is_sharded(set_up.objective):
        whole = start_stage(plan, index, parts, below) if processes.is_main() else None
        processes.wait()
        sharding.put_together(run.trained_weights(), whole.model if whole else None)
        if whole is not None:
            model, adapted = whole.model, whole.adapted
    if adapted is not None and (processes.is_main() or not sharding.shards(plan.training)):
        trained["lora"] = certify_merge(adapted, this, run)
    record = stage_record(plan, number, run, parts, below, plain, set_up.record) | trained
    run.close()
    processes.on_main(lambda: save_stage(out, record, model, below, stage.plain_names(frozen)))
    observer.stage_finished(files.read_json(files.stages(out)[-1] / files.RECORD))
    if number < len(plan.stages) and (asked := asked_to_stop(stop, accelerator.device)):
        raise Interrupted(
            f"stopped by {asked} after stage {number}, which is finished: continue with "
            f"nacre grow --resume --out {out}"
        )


def find_below(index: int, out: Path, base: str | Path | None) -> Below | None:
    """Return what stage `index` stands on: the stage before, the checkpoint `base`, or nothing.

    A checkpoint that nacre did not grow is first rewritten in nacre's form, into `base`.
    """
    if index:
        path = files.stages(out)[index - 1]
    elif base is not None:
        grown = (Path(base) / files.RECORD).exists()
        path = base if grown else import_base(base, out / "base")
    else:
        return None
    return Below(Path(path), files.read_record(Path(path)))


def import_base(source: str | Path, target: Path) -> Path:
    """Write a foreign checkpoint as stage 0 of a run: sharded, with the hash of every tensor."""
    if not (target / files.RECORD).exists():
        model = checkpoint.load_model(source)
        stock.untie(model)
        hashes = {name: ledger.tensor_hash(tensor) for name, tensor in model.state_dict().items()}
        growth = [(0, len(stock.find_parts(model).blocks))]
        with files.new_folder(target) as partial:
            checkpoint.save_weights(model, partial, growth)
            record = {"stage": 0, "from": str(source), "growth": growth, "frozen": {},
                      "weights": hashes, "fingerprint": ledger.fingerprint(hashes)}  # fmt: skip
            files.write_json(partial / files.RECORD, record)
    return target


@dataclass(frozen=True)
class Start:
    """A stage's model before its first step; what trains is chosen, adapters are attached."""

    model: PreTrainedModel
    adapted: PeftModel | None
    trunk_depth: int
    exact: bool
    embedding_trains: bool


def start_stage(plan: Plan, index: int, parts: Parts, below: Below | None) -> Start:
    """Return the model that stage `index` trains; the same every time."""
    this = plan.stages[index]
    seed = (plan.seed + 1_000_003 * (index + 1)) % 2**32
    set_seed(seed)
    with growable(plan):
        model, depth_below = start_model(plan, this, parts, below, seed)
        trunk_depth = this.trunk_depth(depth_below)
        exact = stock.splits_exactly(model, trunk_depth)
    substrate = parts.substrate
    embedding_trains = below is None and substrate is not None and substrate.trainable
    adapted = stage.choose_trainable(
        model, this, depth_below=depth_below, seed=seed, train_embedding=embedding_trains
    )
    return Start(model, adapted, trunk_depth, exact, embedding_trains)


def start_model(
    plan: Plan, this: Stage, parts: Parts, below: Below | None, seed: int
) -> tuple[PreTrainedModel, int]:
    """Return the model with this stage's blocks added, and how many blocks it had before."""
    if below is not None:
        model = checkpoint.load_model(below.path)
        stock.untie(model)
        depth_below = len(stock.find_parts(model).blocks)
        if this.add_blocks:
            stage.add_blocks(model, this.add_blocks, this.init, seed, this.under)
        return model, depth_below
    assert parts.substrate is not None
    tokenizer = parts.tokenizer
    shape = budget.model_config(plan, len(tokenizer), this.add_blocks)
    shape.eos_token_id = tokenizers.end_of_document(tokenizer)
    shape.pad_token_id = tokenizer.pad_token_id
    model = stock.build(shape)
    rows = torch.tensor(parts.substrate.rows)
    with torch.no_grad():
        stock.find_parts(model).embedding.weight.copy_(rows)
    if this.init == "zero":
        stock.zero_outputs(model, list(stock.find_parts(model).blocks))
    model.generation_config = GenerationConfig(
        eos_token_id=shape.eos_token_id, pad_token_id=shape.pad_token_id
    )
    return model, 0


def next_cursor(plan: Plan, below: Below | None, store: TokenStore) -> LoaderState | None:
    """Return where the stage below stopped reading, if this stage reads the same stream."""
    if plan.data.order == "restart":
        return None
    cursor = below.record.get("cursor") if below else None
    stream = {"store": store.fingerprint, "seed": plan.seed, "context": plan.model.context}
    return cursor if cursor and stream.items() <= cursor.items() else None


def check_inherited(frozen: Mapping[str, str], below: Below | None) -> None:
    """Refuse a checkpoint whose frozen tensors are not the ones its ledger recorded."""
    if below is None:
        return
    recorded = below.record["frozen"] | below.record["weights"]
    damaged = [n for n, h in stage.plain_names(frozen).items() if recorded.get(n) != h]
    if damaged:
        raise CheckpointError(
            f"{below.path}: {len(damaged)} tensors are not what its ledger recorded, first "
            f"{damaged[0]}; restore the folder or grow that stage again"
        )


def saved_state(out: Path, number: int, observer: Observer) -> SavedState | None:
    """Return the saved state of stage `number`, if that is what was running."""
    saved = processes.on_main(lambda: state.load(out / "state"))
    if saved is None or saved.progress["stage"] != number:
        return None
    if saved.damaged:
        at = f"step {saved.progress['step']} of stage {number}"
        observer.warn(f"{saved.damaged}; the run goes on from the state before it, {at}")
    return saved


def restore(run: StageRun, out: Path, number: int, saved: SavedState | None) -> None:
    """Continue from the saved state of this stage, if there is one; drop later metrics."""
    if saved is not None:
        run.restore(saved)
    if processes.is_main():
        rewind_metrics(out, number, run.progress.step)
