"""The heartbeat between the launchers of a run on several nodes, which notices a node that does not answer.

gloo and NCCL notice a process that ends. A machine that loses power or its network sends nothing, and they wait for it
until ``--ddp_timeout``, which must be long: all ranks wait while rank 0 downloads a model or writes it.
"""

import atexit
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

NODE_TIMEOUT: Final = 60.0
"""Seconds without a heartbeat after which a node is lost. Source: ours; a route that changes takes less."""
_CONNECT: Final = timedelta(hours=1)
"""Time for the node of the store to start; torchrun's rendezvous ends before."""
_GRACE: Final = 10.0
"""Seconds between a closed store and the end of this launcher, if nothing failed."""


@dataclass
class _Node:
    """What this launcher knows about another one."""

    name: str
    beats: int
    heard: float
    """Time of the last heartbeat, as ``time.monotonic`` returns it."""


class Heartbeat:
    """Tells the other nodes that this one is alive, and ends the ranks of this node that wait for a lost one.

    A rank that ends lets torchrun restart the ranks or exit. Without the store, which is on the node of
    ``MASTER_ADDR``, torchrun cannot continue either, and this process exits.
    """

    def __init__(self, host: str, port: int, timeout: float = NODE_TIMEOUT) -> None:
        self.lost: str | None = None
        """The line about the node that was lost last."""
        self._address, self._timeout = (host, port), timeout
        self._nodes: dict[int, _Node] = {}
        self._answered = 0.0
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._beat, self._watch)]

    def __enter__(self) -> "Heartbeat":
        # One thread waits for the store, which may not answer; the other one watches the time.
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=5)
        if any(thread.is_alive() for thread in self._threads):
            atexit.register(os._exit, 1)  # a thread that still waits for the store would abort the exit

    def _beat(self) -> None:
        store = TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=_CONNECT)
        number = store.add("yivl/nodes", 1)
        store.set(f"yivl/name/{number}", socket.gethostname())
        self._answered = time.monotonic()
        try:
            while not self._stopped.wait(min(self._timeout / 6, 5)):
                store.add(f"yivl/beats/{number}", 1)
                for other in set(range(1, store.add("yivl/nodes", 0) + 1)) - {number}:
                    self._hear(store, other)
                self._answered = time.monotonic()
            store.add(f"yivl/ended/{number}", 1)
        except (DistError, RuntimeError):
            # At the end of a run, the node of the store may exit first.
            if not self._stopped.wait(_GRACE):
                self._exit("closed the connection")

    def _hear(self, store: TCPStore, number: int) -> None:
        if store.add(f"yivl/ended/{number}", 0):
            self._nodes.pop(number, None)
            return
        beats = store.add(f"yivl/beats/{number}", 0)
        if number not in self._nodes and beats:
            self._nodes[number] = _Node(store.get(f"yivl/name/{number}").decode(), 0, 0)
        if beats and beats != self._nodes[number].beats:
            self._nodes[number].beats, self._nodes[number].heard = beats, time.monotonic()

    def _watch(self) -> None:
        while not self._stopped.wait(1):
            if self._answered and time.monotonic() - self._answered > self._timeout:
                self._exit(f"has not answered for {self._timeout:.0f} s")
            for node in list(self._nodes.values()):
                if self._answered - node.heard > self._timeout:
                    self._end_ranks(node)

    def _end_ranks(self, node: _Node) -> None:
        """End the ranks that were started before a node was lost; those restarted since do not wait for it."""
        silence = time.monotonic() - node.heard
        waiting = [child for child in psutil.Process().children() if time.time() - child.create_time() > silence]
        if waiting:
            self.lost = _line(node.name, f"has not answered for {self._timeout:.0f} s")
            _report(self.lost)
            _kill(waiting)

    def _exit(self, what: str) -> None:
        _report(_line(f"{self._address[0]} (MASTER_ADDR)", what))
        _kill(psutil.Process().children())
        os._exit(1)  # torchrun may wait for the store in the main thread


def _line(node: str, what: str) -> str:
    return f"error: node {node} {what}; its machine or network failed; resume with --resume auto"


def _report(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun starts a rank as the leader of a process group
        except ProcessLookupError:
            continue
