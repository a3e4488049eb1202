"""Fleets: what a file may say, what is refused before anything starts, and jobs that die."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Command

import nacre
from nacre.cli.fleet import read_command
from nacre.errors import ConfigError
from nacre.fleet import cluster, design, jobs, records, runner
from nacre.fleet.jobs import Job
from nacre.fleet.runner import FleetError, Outcome
from nacre.train import files
from nacre.train.interruption import Interrupted
from nacre.train.metrics import read_metrics
from nacre.train.observer import Observer

STEPS = 600  # of an expert that is stopped: it trains longer than a signal takes to reach it
GROW = "grow tiny --track none --set training.precision=fp32"
EXPERT = {"run": f"{GROW} --out runs/{{lang}}", "each": {"lang": ["en", "ru"]}}


@pytest.fixture(autouse=True)
def _in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(**entries: Any) -> list[Job]:
    """Return the jobs of a fleet with these entries; text stands for `run` alone."""
    given = {k: {"run": v} if isinstance(v, str) else v for k, v in entries.items()}
    return jobs.read(design.parse({"jobs": given}), read_command)


def refused(**entries: Any) -> str:
    with pytest.raises(ConfigError) as error:
        read(**entries)
    return str(error.value)


# --- what a file says ---


def test_an_entry_is_a_job_for_every_combination_of_its_values() -> None:
    found = read(
        expert=EXPERT | {"gpus": 0.5, "memory": "2GB"},
        both={"run": "compose {needs} --out 'all of them'", "needs": "expert"},
        score={
            "each": {"lang": ["en", "ru"], "task": ["copy", "khop-1"]},
            "run": "eval {needs} --tasks {task}", "needs": "expert-{lang}",
        },
    )  # fmt: skip
    by_name = {job.name: job for job in found}
    assert by_name["expert-ru"].arguments == (*GROW.split(), "--out", "runs/ru")
    assert by_name["expert-ru"].plan is not None
    assert by_name["both"].arguments == (
        "compose", "runs/en", "runs/ru", "--out", "all of them",
    )  # fmt: skip
    assert by_name["both"].needs == ("expert-en", "expert-ru")
    assert by_name["score-ru-khop-1"].arguments == ("eval", "runs/ru", "--tasks", "khop-1")
    assert by_name["score-ru-khop-1"].needs == ("expert-ru",)
    assert cluster.asked(by_name["expert-en"].takes) == {"CPU": 1, "GPU": 0.5, "memory": 2e9}
    names = [job.name for job in found]
    assert len(names) == 7
    assert all(names.index(need) < names.index(job.name) for job in found for need in job.needs)


def test_braces_that_are_no_place_stay() -> None:
    (job,) = read(a={"run": ["grow", "tiny", "--out", "x", "--set", "stages.0.lora={rank: 2}"]})
    assert job.arguments[-1] == "stages.0.lora={rank: 2}"


def test_a_growth_is_the_one_of_its_plan() -> None:
    (one,), (same,), (other,) = (
        read(a=f"{GROW} --out x {more}") for more in ("", "--set name=other", "--set seed=1")
    )
    assert one.identity == same.identity != other.identity


def test_the_progress_of_a_growth_is_that_of_its_metrics() -> None:
    (job,) = read(a={"run": "grow tiny --out out"})
    assert job.writes is not None
    assert job.plan is not None
    job.writes.mkdir()
    metrics = job.writes / "metrics.jsonl"
    assert runner._trained(job) == 0
    first, second = (stage.tokens for stage in job.plan.stages[:2])
    metrics.write_text(json.dumps({"stage": 2, "tokens": second // 2}) + "\n")
    assert runner._trained(job) == (first + second // 2) / job.tokens
    metrics.write_text(json.dumps({"stage": None}) + "\n")  # damaged: no reason to end a fleet
    assert runner._trained(job) == 0


def test_a_job_is_another_when_what_it_needs_is() -> None:
    after = {"run": "eval {needs} --tasks copy", "needs": "a"}
    one, other = (read(a=f"{GROW} --out x --set seed={seed}", b=after)[1] for seed in (0, 1))
    assert one.arguments == other.arguments
    assert one.identity != other.identity


def test_a_study_is_a_job_for_each_run_and_one_for_its_page(tmp_path: Path) -> None:
    stage = "{add_blocks: 1, tokens: 512}"
    arms = f"{{a: {{stages: [{stage}]}}, b: {{stages: [{stage}, {stage}]}}}}"
    (tmp_path / "s.yaml").write_text(f"baseline: a\nplan: tiny\nseeds: [0, 1]\narms: {arms}\n")
    found = read(abl={"run": "study s.yaml --out abl", "cpus": 2})
    names = [f"abl/{arm}/x1/seed-{seed}" for seed in (0, 1) for arm in "ab"]
    assert [job.name for job in found] == [*names, "abl"]
    assert [job.after for job in found] == [(), (names[0],), (), (names[2],), ()]
    assert found[-1].needs == tuple(names)
    assert found[1].arguments[-1] == "abl/b/x1/seed-0"
    assert found[1].study_folder == Path("abl")
    assert {job.takes.cpus for job in found} == {2}
    again = read(abl={"run": "study s.yaml --out abl --set 'evaluate={tasks: [copy]}'"})
    same = [a.identity == b.identity for a, b in zip(found, again, strict=True)]
    assert same == [True, True, True, True, False]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "jobs.a.run: is required"),
        ({"run": "grow --out 'x"}, "jobs.a.run: no closing quotation, got \"grow --out 'x\""),
        ({"run": []}, "jobs.a.run: value should have at least 1 item"),
        ({"run": "eval x", "cpu": 2}, "jobs.a.cpu: unknown key (did you mean 'cpus'?)"),
        ({"run": "eval x", "cpus": 0}, "jobs.a.cpus: input should be greater than 0, got 0"),
        ({"run": "eval x", "gpus": 1.5}, "jobs.a.gpus: 1.5 is neither whole nor a part of one"),
        ({"run": "eval x", "memory": "much"}, "jobs.a.memory: could not parse value"),
        ({"run": "eval x", "retries": -1}, "jobs.a.retries: input should be greater than or equal"),
        (
            {"run": "eval {x}", "each": {"x": ["en", False]}},
            "fleet: jobs.a.each.x[1]: no, yes, on and off are true or false in YAML: put it in "
            "quotes, got False",
        ),
        ({"run": "eval {x}", "each": {"x": ["a/b"]}}, "jobs.a.each.x[0]: string should match"),
        ({"run": "eval {x}", "each": {"x": []}}, "jobs.a.each.x: tuple should have at least 1"),
        (
            {"run": "eval {x}", "each": {"x": [1, 2, 1]}},
            "jobs.a.each.x: 1 stands there more than once (name each once)",
        ),
        (
            {"run": "eval runs", "each": {"seed": [1, 2]}},
            "jobs.a.each.seed: nothing uses it (write {seed} where it belongs, or leave seed "
            "out)",
        ),
        (
            {"run": "eval {langs}{lang}", "each": {"lang": ["en"]}},
            "jobs.a.run: nothing is called {langs} here (did you mean 'lang'?)",
        ),
        (
            {"run": "eval x", "needs": "b-{lang}"},
            "jobs.a.needs: nothing is called {lang} here (there are: none)",
        ),
        (
            {"run": "eval {needs}", "each": {"needs": ["en"]}},
            "jobs.a.each.needs: is what stands for the outputs of the needed jobs (name the key "
            "differently)",
        ),
        ({"run": "eval {needs}"}, "jobs.a.run: {needs}, but nothing is needed (name the jobs with"),
        (
            {"run": "eval x/{needs}", "needs": "b"},
            "jobs.a.run: {needs} is a part of an argument (it stands for several: write it "
            "alone)",
        ),
        ({"run": "eval x", "needs": "aa"}, "jobs.a.needs: there is no job 'aa' (did you mean 'a'"),
        ({"run": "eval x", "needs": "zz"}, "jobs.a.needs: there is no job 'zz' (jobs: a)"),
        (
            {"run": "eval x", "needs": "a"},
            "jobs: these need each other: a -> a (take one need out)",
        ),
    ],
)  # fmt: skip
def test_what_an_entry_must_not_say(entry: dict[str, Any], message: str) -> None:
    assert message in refused(a=entry)


def test_jobs_have_names_of_their_own() -> None:
    message = refused(**{"a": {"run": "eval {x}", "each": {"x": ["b"]}}, "a-b": "eval y"})
    assert message == (
        "fleet: jobs.a and a-b: more than one job is called 'a-b' (name the entries, or their "
        "values, differently)"
    )


def test_a_file_is_named_with_its_problems(tmp_path: Path, command: Command) -> None:
    code, _, err = command("fleet", "none.yaml")
    assert (code, err) == (2, "error: none.yaml: no such file\n")
    (tmp_path / "f.yaml").write_text("jobs: {}\n")
    code, _, err = command("fleet", "f.yaml")
    assert code == 2
    assert err.startswith("error: f.yaml: jobs: dictionary should have at least 1 item")


def test_recipes_are_found_by_name(command: Command) -> None:
    code, out, _ = command("fleet", "experts", "--list", "--json")
    assert code == 0
    about = json.loads(out)
    assert [job["job"] for job in about] == ["tokenizer", "expert-0", "expert-1", "both", "score"]
    assert about[1]["command"].startswith("nacre grow tiny --tokenizer runs/experts/tokenizer")
    assert about[3]["needs"] == ["expert-0", "expert-1"]
    assert not any(job["done"] for job in about)
    code, _, err = command("fleet", "expert")
    assert (code, err) == (
        2, "error: fleet: no file or recipe named 'expert' (did you mean 'experts'?)\n"
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"^fleet: .* is no path of a file$"):
        design.load("a\0b")


# --- what commands may be jobs ---


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("rm -rf /", "jobs.a.run: No such command 'rm' (nacre --help says what there is)"),
        ("grow tiny --oot x", "jobs.a.run: No such option: --oot"),
        ("grow --help", "jobs.a.run: asks for help (nacre"),
        ("tokenizer", "jobs.a.run: asks for help (nacre"),
        ("generate x", "jobs.a.run: generate cannot be a job (allowed: compose, eval, grow, study"),
        ("grow tiny", "jobs.a.run: --out: is required (name the folder that the job makes)"),
        ("grow none --out x", "jobs.a.plan: no file or recipe named 'none'"),
        ("grow tiny --out x --set model.wdth=2", "jobs.a.model.wdth: unknown key (did you mean"),
        (
            "grow tiny --out x --resume",
            "jobs.a.run: --resume: does not go with a fleet (what was begun goes on by itself)",
        ),
        (
            "grow tiny --out x --overwrite",
            "jobs.a.run: --overwrite: does not go with a fleet (what was begun would be lost when "
            "the job is tried again)",
        ),
        ("compose --add x y --out z", "jobs.a.run: --add: does not go with a fleet (tried again,"),
        ("compose --remove x y --out z", "jobs.a.run: --remove: does not go with a fleet (tried"),
        ("compose x y", "jobs.a.run: --out: is required (name the folder that the job makes)"),
        ("eval x --again", "jobs.a.run: --again: does not go with a fleet (what was scored would"),
        ("study none --out x", "jobs.a.study: no file or recipe named 'none'"),
        (
            "study operators --out x --jobs 2",
            "jobs.a.run: --jobs: does not go with a fleet (each run is a job of its own)",
        ),
        (
            "study operators --out x --no-run",
            "jobs.a.run: --no-run: does not go with a fleet (run nacre study for that)",
        ),
    ],
)
def test_what_cannot_be_a_job(run: str, message: str) -> None:
    assert message in refused(a=run)


def test_a_problem_of_all_jobs_of_an_entry_is_said_once() -> None:
    assert refused(a=EXPERT | {"run": "grow tiny --out runs/{lang} --set seed=-1"}).count("\n") == 0


def test_a_job_that_writes_no_folder_stands_for_none() -> None:
    after = {"run": "eval {needs}", "needs": "score"}
    assert "jobs.more.run: score writes no folder that {needs} could stand for" in refused(
        score="eval x", more=after
    )


# --- what jobs must not do to each other ---


def test_two_jobs_do_not_write_one_folder() -> None:
    seeds = {"run": f"{GROW} --out runs/x --set seed={{seed}}", "each": {"seed": [0, 1]}}
    assert refused(a=seeds) == (
        "jobs.a-1.run: --out: runs/x is also written by a-0 (name a folder of its own)"
    )
    assert refused(a=f"{GROW} --out x", b="tokenizer build --out x/../x/t") == (
        "jobs.b.run: --out: x/../x/t lies in x, which a writes (name a folder of its own)"
    )


def test_a_job_waits_for_what_it_reads() -> None:
    message = "jobs.b: reads runs/en, which expert-en makes, and does not wait (needs: [expert-en])"
    assert refused(expert=EXPERT, b="eval runs/en/stages/01") == message
    assert refused(expert=EXPERT, b=f"{GROW} --from runs/en --out x") == message
    assert refused(expert=EXPERT, b=f"{GROW} --set stages.0.sources=[runs/en] --out x") == message
    waiting = {"run": "compose {needs} --out both", "needs": "expert"}
    read(expert=EXPERT, b=waiting, c={"run": "eval runs/en both", "needs": "b"})


def test_what_stands_in_the_way_is_said_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError) as error:
        runner.check(
            read(
                a=f"{GROW} --out x",
                c="tokenizer build --out f/jobs/c",
                d=f"{GROW} --out y --tokenizer none",
            )
            + read(e="tokenizer build --out x"),
            tmp_path / "f",
        )
    assert str(error.value).splitlines() == [
        "4 problems",
        "  - jobs.a.--out: x holds files that are not a run's (name a new or empty folder)",
        "  - jobs.c.run: --out: f/jobs/c is where the fleet keeps its records (name another "
        "folder)",
        "  - jobs.d.tokenizer: there is no folder 'none' (give a folder that holds tokenizer.json, "
        "or hf:NAME for one from the hub)",
        "  - jobs.e.run: --out: x is not empty, and this job did not make it (name a new folder, "
        "or remove it)",
    ]


def test_the_records_are_a_folder(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(ConfigError, match="--out: f is a file"):
        runner.check(read(a=f"{GROW} --out x"), Path("f"))


# --- how a fleet ends ---


def outcome(job: str, state: Any, said: str = "") -> Outcome:
    return Outcome(job, state, 1, None, Path("log.txt"), said)


def test_the_last_word_of_a_fleet() -> None:
    done, left = outcome("a", "done"), outcome("c", "left out")
    failed = outcome("b", "failed", "error: no text")
    runner.raise_for([done])
    with pytest.raises(FleetError) as error:
        runner.raise_for([done, failed, left])
    assert str(error.value) == (
        "1 of 3 jobs failed, 1 that need them were left out\n  - b: error: no text (log.txt)"
    )
    with pytest.raises(Interrupted) as stop:
        runner.raise_for([done, outcome("d", "stopped")])
    assert str(stop.value) == "1 of 2 jobs are done; the same command goes on"


def test_without_ray_one_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as error:
        runner.run(read(a=f"{GROW} --out x"), tmp_path / "f")
    fix = "in a clone of nacre: pip install -e '.[fleet]'"
    assert str(error.value) == f"fleet: needs the package ray ({fix})"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "ray://head:10001",
            "--address: 'ray://head:10001' is not HOST:PORT (auto finds the cluster of this "
            "machine; without --address a new one is started)",
        ),
        ("127.0.0.1:1", "--address: no cluster at 127.0.0.1:1: [Errno 111] Connection refused ("),
        ("127.0.0.1:99999", "--address: no cluster at 127.0.0.1:99999: "),
    ],
)
def test_an_address_without_a_cluster(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        runner.run(read(a=f"{GROW} --out x"), tmp_path / "f", address=address)
    assert message in str(error.value)


class Listener(Observer):
    """Keeps warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_no_machine_has_is_refused_here_and_waited_for_on_a_cluster() -> None:
    found = read(a={"run": f"{GROW} --out x", "gpus": 2}, b=f"{GROW} --out y")
    there = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    said = "jobs.a: takes 1 CPU, 2 GPU, but no machine has that; the most of each: 4 CPU, 1 GPU"
    with pytest.raises(ConfigError) as error:
        runner.check_resources(found, there, None, Listener())
    assert str(error.value) == f"{said} (lower it, or name --address)"
    listener = Listener()
    runner.check_resources(found, there, "head:6379", listener)
    assert listener.warnings == [
        f"{said}: it waits for one", "jobs.b: takes no gpus, so it grows on processors"
    ]  # fmt: skip


# --- one attempt, as a machine makes it ---


def place(name: str, **job: Any) -> str:
    folder = Path("f/jobs", name).absolute()
    folder.mkdir(parents=True)
    record = {"identity": "1", "nacre": nacre.__version__, "study": None, "writes": None} | job
    (folder / records.JOB).write_text(json.dumps({"name": name, "command": "eval"} | record))
    return str(folder)


def test_machines_that_do_not_share_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SHARE_SECONDS", 0.0)
    here, wrong = socket.gethostname(), f"as it is: {cluster.SHARE}"
    said = cluster.attempt("/none", "1", str(tmp_path), {})
    assert said == f"{here} does not see /none {wrong}"
    assert cluster.attempt(place("a"), "1", "/none", {}) == said
    old = place("b")
    assert cluster.attempt(old, "2", str(tmp_path), {}) == f"{here} does not see {old} {wrong}"
    other = cluster.attempt(place("c", nacre="0.0"), "1", str(tmp_path), {})
    assert other == f"{here} has nacre {nacre.__version__}, the fleet was started by 0.0"


def test_a_users_mistake_ends_a_job_and_what_died_is_tried_again(tmp_path: Path) -> None:
    wrong = place("a", arguments=["eval", "none"])
    assert cluster.attempt(wrong, "1", str(tmp_path), {}) == "error: none: no such folder"
    assert len(records.attempts(Path(wrong))) == 1
    with pytest.raises(cluster.Died) as died:
        cluster.attempt(place("b"), "1", str(tmp_path), {})  # says nothing of arguments
    assert str(died.value) == "ended with exit code 1: KeyError: 'arguments'"


def test_what_looks_after_a_job_imports_no_torch() -> None:
    check = "import sys, nacre.fleet.cluster; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


# --- a cluster, of which a machine dies ---


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of Ray on loopback: two machines, as far as Ray knows, with a core each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # no other address than 127.0.0.1
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray = pytest.importorskip("ray.cluster_utils")
        made = ray.Cluster()
        made.add_node(num_cpus=1, include_dashboard=False)
        made.add_node(num_cpus=1)
        yield made
        made.shutdown()


def when(ready: Callable[[], bool], then: Callable[[], None]) -> threading.Thread:
    """Do something beside the test as soon as it may be done, within ten minutes."""

    def wait() -> None:
        end = time.monotonic() + 600
        while not ready() and time.monotonic() < end:
            time.sleep(0.05)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of seconds on a machine that does nothing else
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_fleet_survives_a_stop_and_the_death_of_a_machine(
    head: Any, tmp_path: Path, command: Command
) -> None:
    grow = f"{GROW} --out {{name}} --set training.save_every=5"
    grow += f" --set 'stages=[{{add_blocks: 1, tokens: {256 * STEPS}}}]'"
    entries = {
        "expert": {"run": grow, "each": {"name": ["a", "b"]}},
        "twins": {"run": "compose {needs} --out twins", "needs": "expert"},
        "score": {"run": "eval {needs} --tasks copy", "needs": "twins"},
    }
    (tmp_path / "f.yaml").write_text(json.dumps({"jobs": entries}))
    fleet = ("fleet", "f.yaml", "--out", "f", "--address", head.address)

    def steps(run: str) -> list[int]:
        return [m["step"] for m in read_metrics(tmp_path / run) if "tokens_per_second" in m]

    thread = when(
        lambda: any((tmp_path / run / "state").exists() for run in "ab"),
        lambda: os.kill(os.getpid(), signal.SIGTERM),
    )
    code, _, err = command(*fleet)
    thread.join()
    assert code == 3, err
    assert "SIGTERM: the jobs that run save their state and end" in err
    assert "0 of 4 jobs are done; the same command goes on" in err
    begun = {run: len(steps(run)) for run in "ab"}
    assert any(0 < count < STEPS for count in begun.values())
    logs = [(tmp_path / "f" / "jobs" / f"expert-{run}" / records.LOG).read_text() for run in "ab"]
    assert any("stopped by SIGTERM after step" in log for log in logs)

    (machine,) = head.worker_nodes
    thread = when(
        lambda: any(len(steps(run)) > begun[run] for run in "ab"),
        lambda: head.remove_node(machine, allow_graceful=False),
    )
    code, out, err = command(*fleet, "--json")
    thread.join()
    found = {job["job"]: job for job in json.loads(out)["jobs"]}
    assert code == 2
    states = {"expert-a": "done", "expert-b": "done", "twins": "failed", "score": "left out"}
    assert {name: job["state"] for name, job in found.items()} == states, err
    assert max(found[f"expert-{run}"]["attempts"] for run in "ab") == 2
    assert "(attempt 2)" in err
    assert steps("a") == steps("b") == list(range(1, STEPS + 1))
    one, other = (files.read_record(tmp_path / run / "stages" / "01") for run in "ab")
    assert one["fingerprint"] == other["fingerprint"]
    assert "are the same expert" in found["twins"]["said"]
    assert found["twins"]["attempts"] == 1, "a mistake is not tried again"
    assert "error: 1 of 4 jobs failed, 1 that need them were left out" in err

    del entries["twins"]
    entries["score"] = {"run": "eval {needs} --tasks copy --limit 1", "needs": "expert-a"}
    (tmp_path / "f.yaml").write_text(json.dumps({"jobs": entries}))
    code, out, err = command(*fleet, "--json")
    found = {job["job"]: job for job in json.loads(out)["jobs"]}
    assert code == 0, err
    attempts = {"expert-a": 0, "expert-b": 0, "score": 1}
    assert {name: job["attempts"] for name, job in found.items()} == attempts
    assert "expert-b: was done before" in err
    assert (tmp_path / "a" / "evaluations.jsonl").exists()
