"""What stops a growth from outside: signals, another process, too little memory, a full disk."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from nacre import config
from nacre.errors import ConfigError
from nacre.folders import PLAN
from nacre.growth import plan as plans
from nacre.train import checkpoint, files, folder, interruption, state
from nacre.train.grow import grow
from nacre.train.metrics import read_metrics
from nacre.train.observer import Observer


class Sends(Observer):
    """Sends this process a signal after some step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def trained(self, step: dict) -> None:
        if step["step"] == self.step and step["stage"] == 1:
            os.kill(os.getpid(), self.number)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(files.stages(run)[-1]).state_dict()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_ends_as_if_there_was_none(
    number: signal.Signals, plan: plans.Plan, run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(interruption.Interrupted) as stopped:
        grow(plan, out, observer=Sends(number, step=7))
    assert str(stopped.value) == (
        f"stopped by {number.name} after step 7 of stage 1; its state is saved: continue with "
        f"nacre grow --resume --out {out}"
    )
    saved = state.load(out / "state")
    assert saved is not None
    assert saved.progress["step"] == 7
    grow(None, out, resume=True)
    again, whole = weights(out), weights(run)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    steps = [(m["stage"], m["step"]) for m in read_metrics(out) if "lr" in m]
    assert len(steps) == len(set(steps)) == 60


def test_a_signal_in_the_last_step_of_a_stage_stops_before_the_next(
    plan: plans.Plan, tmp_path: Path
) -> None:
    out, steps = tmp_path / "run", 2
    stage = plan.stages[0].model_copy(update={"tokens": steps * plan.training.batch_tokens})
    two, one = (plan.model_copy(update={"stages": (stage,) * count}) for count in (2, 1))
    with pytest.raises(interruption.Interrupted) as stopped:
        grow(two, out, observer=Sends(signal.SIGTERM, step=steps))
    assert str(stopped.value) == (
        "stopped by SIGTERM after stage 1, which is finished: continue with "
        f"nacre grow --resume --out {out}"
    )
    assert len(files.stages(out)) == 1
    grow(None, out, resume=True)
    assert len(files.stages(out)) == 2
    grow(one, tmp_path / "one", observer=Sends(signal.SIGTERM, step=steps))
    assert len(files.stages(tmp_path / "one")) == 1, "nothing was left to stop"


def test_a_second_sigint_leaves_at_once() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruption.stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_ends_with_a_code_of_its_own(plan: plans.Plan, tmp_path: Path) -> None:
    out, file = tmp_path / "run", tmp_path / "plan.yaml"
    longer = plan.model_dump(mode="json", by_alias=True)
    longer["stages"] = [{"add_blocks": 1, "tokens": 10_000_000}]
    config.write_yaml(plans.parse(longer), file)
    command = [sys.executable, "-m", "nacre", "grow", str(file), "--out", str(out), "--quiet"]
    child = subprocess.Popen([*command, "--track", "none"], stderr=subprocess.PIPE, text=True)
    try:
        while not (out / "metrics.jsonl").exists() and child.poll() is None:
            time.sleep(0.1)
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == interruption.Interrupted.EXIT_CODE == 3
    assert "stopped: stopped by SIGTERM after step" in said.replace("\n", " ")
    assert state.load(out / "state") is not None


def test_two_processes_do_not_write_one_run(plan: plans.Plan, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with folder.held(out), pytest.raises(ConfigError) as error:
        grow(plan, out)
    assert str(error.value) == (
        f"--out: another process is writing to {out} (wait until it ends, or stop it)"
    )
    assert not (out / PLAN).exists()
    with folder.held(out):
        pass


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom nacre.train import folder\n"
        "folder.held(Path(sys.argv[1])).__enter__()\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run")], check=False)
    assert done.returncode == -signal.SIGKILL
    with folder.held(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
)
def test_too_little_memory_says_what_to_lower(error: Exception, plan: plans.Plan) -> None:
    advice = interruption.smaller_steps(plan)
    with (
        pytest.raises(interruption.OutOfMemory) as caught,
        interruption.memory_advice("stage 2", advice),
    ):
        raise error
    assert str(caught.value) == (
        "stage 2 needs more memory than there is: lower training.micro_batch_tokens (now 256) or "
        "set training.gradient_checkpointing: true, and continue with --resume; nacre plan says "
        "what every stage takes"
    )


def test_another_error_stays_what_it_is() -> None:
    with pytest.raises(RuntimeError, match="a bug"), interruption.memory_advice("stage 1"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SafetensorError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (SafetensorError("I/O error: Input/output error (os error 5)"), errno.EIO),
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("[enforce fail] . unexpected pos 128 vs 22"), errno.EIO),
    ],
)
def test_a_disk_that_fails_is_the_systems_error(
    error: Exception, code: int, tmp_path: Path
) -> None:
    said = re.escape(os.strerror(code))
    with pytest.raises(OSError, match=said) as caught, files.new_folder(tmp_path / "new"):
        raise error
    assert caught.value.errno == code
    assert caught.value.filename == str(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
