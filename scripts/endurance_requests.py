"""Endurance of the servers: thousands of valid, malformed and hostile requests from several clients to one API.

python scripts/endurance_requests.py --figure docs/endurance-memory.png

The server runs the golden checkpoint. Every valid question has a known greedy answer, from a request that was sent
alone. ``--short`` sends a few hundred requests. ``scripts/endurance.py`` runs this campaign with the others.
"""

import argparse
import os
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import httpx
from endurance_clients import (
    ALIVE,
    ANSWERED,
    KINDS,
    MODEL,
    NO_5XX,
    OVERLOAD,
    OWN_ANSWER,
    REFUSED,
    ROOT,
    Client,
    Tally,
)
from endurance_page import PAGE_ANSWERS, PAGE_REFUSES, visit
from endurance_report import Outcome

NUM_REQUESTS: Final = {False: 10_000, True: 400}
CLIENTS: Final = 6
PART: Final = 25
"""Requests between two measurements of the memory."""
PAGE_SHARE: Final = 0.15
"""Part of the time that is left for the page."""
ALLOWED_GROWTH: Final = 32
"""MiB between the medians of the second and of the last quarter: less than one large image. Source: ours."""
MIN_POINTS: Final = 8
"""Fewest measurements of the memory that can show a plateau. Source: ours."""
PLATEAU: Final = "the memory of the server reaches a plateau"
CLEAN_LOG: Final = "the logs of the API and of the page have no traceback"


def free_port() -> int:
    """Return a port that nothing listens on, below those that Linux takes for connections, such as the campaign's."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextmanager
def serving(command: list[str], url: str, log: Path) -> Iterator[int]:
    """Start a server in a process of its own and yield its process id."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as stderr:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=stderr, stdout=stderr, env=environment)
    try:
        wait_for(lambda: process.poll() is not None or is_healthy(url))
        if process.poll() is not None:
            raise RuntimeError(f"the server has ended: {log.read_text(encoding='utf-8')}")
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def is_healthy(url: str) -> bool:
    """Return whether the server accepts requests."""
    try:
        return httpx.get(url, timeout=5).is_success
    except httpx.HTTPError:
        return False


def wait_for(state: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for a state.

    Raises:
        TimeoutError: If it is not reached in time.
    """
    end = time.monotonic() + seconds
    while not state():
        if time.monotonic() > end:
            raise TimeoutError("the server did not start")
        time.sleep(0.05)


def resident_mebibytes(pid: int) -> float:
    """Return the resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def send_to_api(end: float, short: bool, tally: Tally, log: Path) -> list[tuple[int, float]]:
    """Send the requests to the API until ``time.monotonic()`` is ``end``; return the resident memory over requests."""
    # Limits that are reached within a campaign: without them the prefixes alone would grow over 10,000 requests.
    limits = ["--max-cache-bytes", str(2**24), "--max-queue", "24", "--max-batch", "8", "--max-encoded-images", "4"]
    url = f"http://127.0.0.1:{free_port()}"
    api = ["-m", "yivl.serve.api", "--model-path", str(MODEL), "--device", "cpu", "--port", url.rpartition(":")[2]]
    memory: list[tuple[int, float]] = []
    with serving([*api, *limits], f"{url}/health", log) as pid:
        client = Client(url, tally)
        client.learn()
        for part in range(NUM_REQUESTS[short] // PART):
            if time.monotonic() > end:
                break
            chance = random.Random(part)
            kinds = chance.choices(list(KINDS), list(KINDS.values()), k=PART)
            with ThreadPoolExecutor(CLIENTS) as pool:
                list(pool.map(client.send, kinds, [random.Random(chance.random()) for _ in kinds]))
            if part % 80 == 3:
                client.burst(48)
            memory.append(((part + 1) * PART, resident_mebibytes(pid)))
        client.check_alive()
    return memory


def run(budget_seconds: float, short: bool, figure: Path | None = None) -> list[Outcome]:
    """Run the campaign.

    Args:
        budget_seconds: Requests are sent until this time is over.
        short: A few hundred requests instead of 10,000.
        figure: File for the figure of the memory over the requests; ``None`` draws none.

    Returns:
        The outcome of each promise.
    """
    end, tally = time.monotonic() + budget_seconds, Tally()
    with tempfile.TemporaryDirectory() as temporary:
        api_log, page_log = Path(temporary) / "api", Path(temporary) / "page"
        memory = send_to_api(end - budget_seconds * PAGE_SHARE, short, tally, api_log)
        page_url = f"http://127.0.0.1:{free_port()}"
        page = [
            "web_demo.py",
            "--model-path",
            str(MODEL),
            "--device",
            "cpu",
            "--server-port",
            page_url.rpartition(":")[2],
        ]
        with serving(page, page_url, page_log):
            visit(page_url, 1 if short else 8, end, tally.add)
        text = api_log.read_text(encoding="utf-8") + page_log.read_text(encoding="utf-8")
    tally.add(CLEAN_LOG, "Traceback" not in text, text[text.find("Traceback") :][:2000])
    if figure is not None:
        draw(memory, figure)
    return [
        *(tally.outcome(promise) for promise in (NO_5XX, ANSWERED, OWN_ANSWER, REFUSED, OVERLOAD)),
        plateau(memory),
        *(tally.outcome(promise) for promise in (ALIVE, PAGE_ANSWERS, PAGE_REFUSES, CLEAN_LOG)),
    ]


def plateau(memory: list[tuple[int, float]]) -> Outcome:
    """Return whether the resident memory over requests grew no more from the second to the last quarter of them."""
    if len(memory) < MIN_POINTS:
        return Outcome(PLATEAU, 0, 0, f"measured {len(memory)} times, which is too seldom")
    values, quarter = [value for _, value in memory], len(memory) // 4
    growth = statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter])
    notes = f"{values[0]:.0f} MiB at first, at most {max(values):.0f}, growth {growth:.0f}"
    return Outcome(PLATEAU, 1, int(growth <= ALLOWED_GROWTH), f"{memory[-1][0]:,} requests; {notes}")


def draw(memory: list[tuple[int, float]], path: Path) -> None:
    """Write the figure of resident memory over requests."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3), layout="constrained")
    axes.plot(*zip(*memory, strict=True))
    axes.set(xlabel="requests", ylabel="resident memory (MiB)", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run the campaign and print its outcomes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few hundred requests")
    parser.add_argument("--minutes", type=float, default=15.0, help="(default: %(default)s)")
    parser.add_argument("--figure", type=Path, help="file for the figure of the memory")
    arguments = parser.parse_args()
    outcomes = run(60 * arguments.minutes, arguments.short, arguments.figure)
    for one in outcomes:
        print(f"{one.held}/{one.tried}  {one.promise}  {one.notes}")
    sys.exit(any(one.held < one.tried or not (one.tried or arguments.short) for one in outcomes))


if __name__ == "__main__":
    main()
