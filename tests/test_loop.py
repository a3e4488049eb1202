"""The loop's arithmetic, one step against plain PyTorch, and evaluation against the stock loss."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from nacre import tokenizer as tokenizers
from nacre.data.loader import validation_batches
from nacre.data.shards import TokenStore
from nacre.errors import ConfigError, DivergedError
from nacre.growth.plan import Plan, Stage, Training
from nacre.growth.stage import freeze_below
from nacre.growth.trunk import release_memory
from nacre.models import stock
from nacre.train import checkpoint
from nacre.train import state as states
from nacre.train.device import (
    PeakMemory,
    accelerating,
    bf16_is_fast,
    cpu_features,
    default_device,
    micro_batches,
)
from nacre.train.engine import reading
from nacre.train.loop import (
    MOST_SKIPPED,
    Progress,
    StageRun,
    compiles,
    evaluate,
    learning_rate,
    parameter_groups,
    scores,
    setup,
    train_step,
)
from nacre.train.loss import Objective


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@given(steps=st.integers(1, 500), warmup=st.floats(0, 0.9))
def test_learning_rate_stays_between_zero_and_its_peak(
    schedule: str, steps: int, warmup: float
) -> None:
    training = Training.model_validate({"schedule": schedule, "warmup": warmup})
    rates = [learning_rate(step, steps, training, 0.01) for step in range(steps)]
    assert all(0 < rate <= 0.01 for rate in rates)
    warm = max(1, round(warmup * steps))
    assert rates[:warm] == sorted(rates[:warm])
    assert rates[warm:] == sorted(rates[warm:], reverse=True)


def test_learning_rate_of_each_schedule() -> None:
    def at(schedule: str, step: int) -> float:
        training = Training.model_validate({"schedule": schedule, "warmup": 0.1})
        return learning_rate(step, 100, training, 1.0)

    assert [at("constant", step) for step in (0, 4, 9, 10, 99)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert [at("wsd", step) for step in (10, 80, 90)] == [1.0, 1.0, 0.5]
    assert at("wsd", 99) == pytest.approx(0.05)
    assert at("cosine", 10) == pytest.approx(1.0)
    assert at("cosine", 55) == pytest.approx(0.55)
    assert at("cosine", 99) == pytest.approx(0.1, abs=1e-3)


def test_micro_batches() -> None:
    assert micro_batches(Training(batch_tokens=4096), 256) == 1
    assert micro_batches(Training(batch_tokens=4096, micro_batch_tokens=1024), 256) == 4


def test_scores() -> None:
    found = scores(nats=math.log(2) * 80, tokens=40, text_bytes=20)
    assert found["loss"] == pytest.approx(2 * math.log(2))
    assert found["perplexity"] == pytest.approx(4)
    assert found["bits_per_byte"] == pytest.approx(4)


def test_progress_counts_evaluations_without_improvement() -> None:
    progress = Progress()
    for loss in (3.0, 2.0, 2.5, 2.0):
        progress.notice(loss)
    assert (progress.best, progress.stale) == (2.0, 2)
    assert Progress.from_record(progress.record()) == progress
    assert Progress.from_record(Progress().record()) == Progress()


def test_norms_and_biases_do_not_decay(pico) -> None:
    model = pico("gpt_neox")
    freeze_below(model, 1)
    decayed, plain = parameter_groups(model, 0.1)
    assert all(p.ndim >= 2 and p.requires_grad for p in decayed["params"])
    assert all(p.ndim < 2 and p.requires_grad for p in plain["params"])
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    trained = sum(p.requires_grad for p in model.parameters())
    assert len(decayed["params"]) + len(plain["params"]) == trained


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_objective_is_the_stock_loss(pico, ids: torch.Tensor, family: str) -> None:
    model = pico(family, depth=3)
    freeze_below(model, 2)
    exact = stock.splits_exactly(model, 2)
    assert exact == (family in ("llama", "gpt_neox"))
    objective = Objective(model, 2, mode="recompute" if exact else "whole", exact=exact)
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    reference = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = objective(ids[:, :-1], ids[:, 1:])
    loss.backward()
    torch.testing.assert_close(loss, expected)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, reference[name], msg=name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its compiler itself does
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_blocks_give_the_same_step_and_share_their_code(pico, ids: torch.Tensor) -> None:
    from torch._dynamo.utils import counters

    model = pico("llama", depth=6)
    freeze_below(model, 4)
    objective = Objective(model, 4, mode="recompute", exact=True)
    losses, gradients = [], []
    counters.clear()
    for compiled in (False, True):
        if compiled:
            for block in stock.find_parts(model).blocks:
                block.compile()
        loss = objective(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
    assert 0 < counters["stats"]["unique_graphs"] < 6, "not one for every block"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns of what its compiler itself does
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_an_evaluation_compiles_nothing(tiny_run: Path) -> None:
    from torch._dynamo.utils import counters

    found = {}
    for choice in ("off", "on"):
        training = Training(batch_tokens=256, precision="fp32", compile=choice)
        run = open_run(tiny_run, training, Stage(add_blocks=1, tokens=5120))
        train_step(run, next(iter(run.loader))[0])
        graphs = counters["stats"]["unique_graphs"]
        found[choice] = evaluate(run)["loss"]
        assert counters["stats"]["unique_graphs"] == graphs
    assert graphs > 0
    assert found["on"] == pytest.approx(found["off"], rel=1e-5)


def test_long_stages_are_compiled_on_cuda_unless_the_plan_says_otherwise() -> None:
    found = [
        (choice, kind, steps)
        for choice in ("auto", "on", "off")
        for kind in ("cpu", "cuda")
        for steps in (999, 1000)
        if compiles(Training(compile=choice), torch.device(kind), steps)
    ]
    always = [("on", kind, steps) for kind in ("cpu", "cuda") for steps in (999, 1000)]
    assert found == [("auto", "cuda", 1000), *always]


def open_run(tiny_run: Path, training: Training, stage: Stage) -> StageRun:
    model = checkpoint.load_model(tiny_run / "stages" / "02")
    freeze_below(model, 1)
    return setup(
        model,
        stage,
        training,
        TokenStore.open(tiny_run / "data" / "01"),
        Accelerator(gradient_accumulation_steps=micro_batches(training, 32)),
        objective=Objective(model, 1, mode="recompute", exact=True),
        context=32,
        seed=0,
        byte_lengths=tokenizers.byte_lengths(tokenizers.load(tiny_run / "tokenizer")),
        cursor=None,
    )


def test_micro_batches_give_the_same_step(tiny_run: Path) -> None:
    after = []
    for micro in (256, 64):
        training = Training(batch_tokens=256, micro_batch_tokens=micro, precision="fp32", warmup=0)
        run = open_run(tiny_run, training, Stage(add_blocks=1, tokens=5120))
        batch, _ = next(iter(run.loader))
        metrics = train_step(run, batch)
        after.append((metrics["loss"], metrics["grad_norm"], run.trained_weights()))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-5)
    assert after[0][1] == pytest.approx(after[1][1], rel=1e-4)
    for name, weight in after[0][2].items():
        torch.testing.assert_close(weight, after[1][2][name], rtol=1e-3, atol=1e-5)


def test_evaluation_and_caches_take_as_many_windows_at_once_as_training(
    tiny_run: Path, tiny_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(batch_tokens=256, validation_tokens=1024)
    run = open_run(tiny_run, training, Stage(add_blocks=1, tokens=5120))
    assert max(len(batch) for batch, _, _ in run.held_out()) == 8
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert micro_batches(training, 32) == 1
    assert max(len(batch) for batch, _, _ in run.held_out()) == 4
    assert reading(tiny_plan, 0, run.store, None).batch_windows == 4


def test_a_step_moves_what_trains_and_nothing_else(tiny_run: Path) -> None:
    run = open_run(tiny_run, Training(batch_tokens=256), Stage(add_blocks=1, tokens=5120))
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    batch, _ = next(iter(run.loader))
    train_step(run, batch)
    trained = run.trained_weights().keys()
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in trained), name
    assert {id(p) for g in run.optimizer.param_groups for p in g["params"]} == {
        id(p) for p in run.trained_weights().values()
    }, "optimizer state only for what trains"


def test_a_step_that_is_not_finite_is_left_out_if_the_plan_says_so(tiny_run: Path) -> None:
    training = Training(batch_tokens=256, nonfinite="skip", precision="fp32")
    run = open_run(tiny_run, training, Stage(add_blocks=1, tokens=5120))
    batch, _ = next(iter(run.loader))
    head = stock.find_parts(run.model).head.weight
    good = head.detach().clone()
    with torch.no_grad():
        head[0, 0] = math.nan
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    for step in range(MOST_SKIPPED):
        metrics = train_step(run, batch)
        assert metrics["skipped"] == "loss nan, gradient norm nan"
        assert "loss" not in metrics
        assert run.progress.skipped == step + 1
    for name, tensor in run.model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(DivergedError, match="training diverged"):
        train_step(run, batch)
    run.optimizer.zero_grad()
    with torch.no_grad():
        head.copy_(good)
    assert "loss" in train_step(run, batch)
    assert run.progress.skipped == 0


def test_evaluation_is_the_stock_model_on_the_held_out_text(tiny_run: Path) -> None:
    training = Training(batch_tokens=256, validation_tokens=1024, precision="fp32")
    run = open_run(tiny_run, training, Stage(add_blocks=1, tokens=5120))
    found = evaluate(run)
    tokenizer = tokenizers.load(tiny_run / "tokenizer")
    nats, count, size = 0.0, 0, 0
    with torch.no_grad():
        batches = validation_batches(run.store, context=32, batch_size=1, limit_tokens=1024)
        for window in batches:
            ids = torch.from_numpy(window)
            logits = run.model(ids[:, :-1].to(run.model.device)).logits[0].double()
            nats -= logits.log_softmax(-1)[np.arange(32), ids[0, 1:]].sum().item()
            count += 32
            size += len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    assert count == 1024
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=5e-3)


class Gpu:
    """The random state of a GPU, in the place of torch.cuda."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = torch.arange(16, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.state.clone())
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def set(self, state: torch.Tensor) -> None:
        self.state = state.clone()


@pytest.mark.parametrize(("wrote", "resumes"), [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_what_was_drawn_from_is_drawn_from_again(
    wrote: str, resumes: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws on the device; a run may go on on another one."""
    gpu = Gpu(monkeypatch)
    run = open_run(tiny_run, Training(batch_tokens=256), Stage(add_blocks=1, tokens=5120))
    train_step(run, next(iter(run.loader))[0])

    def on(kind: str) -> None:
        monkeypatch.setattr(run, "accelerator", SimpleNamespace(device=torch.device(kind)))

    on(wrote)
    progress = {"stage": 3, "processes": 1, **run.progress.record()}
    states.save(tmp_path / "state", run.state(), progress)
    drawn, before = torch.rand(3), gpu.state.clone()
    gpu.state = before + 1
    on(resumes)
    saved = states.load(tmp_path / "state")
    assert saved is not None
    run.restore(saved)
    assert torch.equal(torch.rand(3), drawn)
    assert torch.equal(gpu.state, before) == (wrote == resumes)


def test_peak_memory_sees_an_allocation_and_forgets_it() -> None:
    release_memory()  # of tests before: an allocation could be served from it
    memory = PeakMemory(torch.device("cpu"))
    start = memory.read()
    block = torch.ones(64_000_000)
    assert memory.read() - start > 150_000_000
    del block
    assert memory.read() - start > 150_000_000, "the peak stays"
    memory.reset()
    assert memory.read() - start < 150_000_000


def test_bf16_follows_the_processor() -> None:
    assert bf16_is_fast(torch.device("cpu")) == any(cpu_features().values())


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    message = r"processes: 4 on a machine of 1 GPU \(start one for each GPU, or set ACCELERATE_USE"
    with pytest.raises(ConfigError, match=message), accelerating(Training(), 32):
        pass


def test_a_model_is_asked_on_the_gpu_unless_accelerate_is_kept_off_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert default_device() == torch.device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert default_device() == torch.device("cpu")
