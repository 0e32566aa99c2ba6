"""Network namespaces on one bridge: nodes with addresses and host names of their own, on one Linux machine."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

HOSTS = Path("/etc/netns")
"""``ip netns exec`` mounts the files of ``/etc/netns/NAME`` over those of ``/etc``. Source: ip-netns(8)."""


def unavailable() -> str | None:
    """Return why this machine cannot create network namespaces, or ``None``."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (iproute2)"
    probe = f"yivl-probe-{os.getpid()}"
    created = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if created.returncode:
        return f"network namespaces are not permitted here: {created.stderr.strip()}"
    _ip("netns", "del", probe)
    return None


class Network:
    """Nodes ``node0``, ``node1``, ... with the addresses 10.77.0.1, 10.77.0.2, ... while the context is open."""

    def __init__(self, num_nodes: int) -> None:
        self.nodes = range(num_nodes)
        self._prefix = f"yivl-{os.getpid()}"
        self._bridge = f"{self._prefix}-bridge"
        self._started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Network":
        try:
            self._create()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for node in self.nodes:
            self.kill(node)
            _delete(self._name(node))
            shutil.rmtree(HOSTS / self._name(node), ignore_errors=True)
        _delete(self._bridge)
        with suppress(OSError):  # others may use it
            HOSTS.rmdir()

    def start(
        self, node: int, command: Sequence[str], environment: Mapping[str, str], output: IO[str], *, before: str = ""
    ) -> "subprocess.Popen[str]":
        """Start a program on a node.

        Args:
            node: Its number.
            command: The program and its arguments.
            environment: Its variables.
            output: File for stdout and stderr.
            before: Shell commands that run first, in a mount namespace of the program.
        """
        shell = f'echo node{node} > /proc/sys/kernel/hostname; {before}\nexec "$@"'
        inside = ["ip", "netns", "exec", self._name(node), "unshare", "--uts", "bash", "-ec", shell, "-", *command]
        process = subprocess.Popen(inside, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        self._started.append(process)
        return process

    def kill(self, node: int) -> None:
        """Kill all processes of a node; its kernel closes their connections."""
        listed = subprocess.run(["ip", "netns", "pids", self._name(node)], capture_output=True, text=True, check=False)
        for pid in listed.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def signal_launchers(self, number: signal.Signals) -> None:
        """Send a signal to the first program of every node."""
        for process in self._started:
            process.send_signal(number)
        self._started.clear()

    def set_link(self, node: int, *, up: bool) -> None:
        """Connect a node to the bridge or disconnect it; its connections stay open, without an answer."""
        _ip("-n", self._bridge, "link", "set", f"port{node}", "up" if up else "down")

    def _name(self, node: int) -> str:
        return f"{self._prefix}-{node}"

    def _create(self) -> None:
        _ip("netns", "add", self._bridge)
        _ip("-n", self._bridge, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._bridge, "link", "set", "bridge", "up")
        addresses = "".join(f"10.77.0.{node + 1} node{node}\n" for node in self.nodes)
        for node in self.nodes:
            name, port = self._name(node), f"port{node}"
            _ip("netns", "add", name)
            _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self._bridge)
            _ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            _ip("-n", self._bridge, "link", "set", port, "master", "bridge")
            self.set_link(node, up=True)
            (HOSTS / name).mkdir(parents=True)
            (HOSTS / name / "hosts").write_text(f"127.0.0.1 localhost\n{addresses}", encoding="utf-8")


def _delete(name: str) -> None:
    # In a session of its own: a signal to the process group of this program must not interrupt it.
    command = ["ip", "netns", "del", name]
    subprocess.run(command, capture_output=True, check=False, start_new_session=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
