"""Hosts for tests: network namespaces of this machine on one bridge; a test can cut them off."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NETWORK = "10.211.7"
PORT = 29_400


def available() -> bool:
    """Tell whether namespaces can be made here: by root, with iproute2, where the system lets."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "nacre-probe"], capture_output=True)
    subprocess.run(["ip", "netns", "delete", "nacre-probe"], capture_output=True)
    return made.returncode == 0


@dataclass
class Host:
    """One namespace with an address on the bridge."""

    number: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"nacre-{self.number}"

    @property
    def link(self) -> str:
        return f"nacre{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number}"

    def torchrun(
        self, arguments: Sequence[str], log: Path, *, hosts: int, restarts: int = 0
    ) -> subprocess.Popen[bytes]:
        """Start one process of a run of `hosts` hosts; the first host is the meeting point."""
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a host that comes later waits in vain
        }
        meeting = f"is_host={self.number == 1},keep_alive_interval=1,keep_alive_max_attempt=3"
        command = [
            "ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run",
            "--nnodes", str(hosts), "--nproc-per-node", "1", "--max-restarts", str(restarts),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NETWORK}.1:{PORT}", "--rdzv-id", "test",
            "--rdzv-conf", meeting, "--local-addr", self.address, "-m", "nacre", *arguments,
        ]  # fmt: skip
        with log.open("ab") as said:
            process = subprocess.Popen(
                command, env=environment, stdout=said, stderr=said, start_new_session=True
            )
        self.started.append(process)
        return process

    def dies(self) -> None:
        """Kill everything that runs on the host at once, and take it off the network."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True)
        for pid in pids.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        for process in self.started:
            process.wait()
        self.is_cut_off()

    def is_cut_off(self) -> None:
        """Let nothing in or out any more, and tell nobody."""
        _ip("link", "set", self.link, "down")


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Give hosts that see each other; the processes left on them are killed at the end."""
    made = [Host(number) for number in range(1, count + 1)]
    try:
        _ip("link", "add", "nacre-bridge", "type", "bridge")
        _ip("link", "set", "nacre-bridge", "up")
        for host in made:
            _ip("netns", "add", host.name)
            peer = ("peer", "name", "eth0", "netns", host.name)
            _ip("link", "add", host.link, "type", "veth", *peer)
            _ip("link", "set", host.link, "master", "nacre-bridge", "up")
            for words in (("addr", "add", f"{host.address}/24", "dev", "eth0"),
                          ("link", "set", "eth0", "up"), ("link", "set", "lo", "up")):  # fmt: skip
                _ip("-n", host.name, *words)
        yield made
    finally:
        for host in made:
            for process in host.started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
            subprocess.run(["ip", "link", "delete", host.link], capture_output=True)
        subprocess.run(["ip", "link", "delete", "nacre-bridge"], capture_output=True)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
