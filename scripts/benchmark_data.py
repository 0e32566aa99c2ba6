"""Benchmark training data: rows in files and in tar shards, made on the spot.

python scripts/benchmark_data.py --max-rows 1000000 --markdown docs/benchmarks.md --chart docs/benchmark-data.png

Files have 1,000 rows and ten times more up to --max-rows; tar shards are 1, 10 and 100. Every measurement is a process
of its own, which starts after the cache exists. Memory is what the data adds to the proportional set size (PSS) of the
process until the first batch. A stream is resumed after 10, 50 and 90 percent of an epoch: by its position, and by
reading all samples before it again, as versions without positions did.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from benchmark_report import replace_section

GOLDEN = Path(__file__).resolve().parents[1] / "tests/golden"
SHARDS = (1, 10, 100)
FRACTIONS = (0.1, 0.5, 0.9)
BATCH_SIZE = 8


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-rows", type=int, default=1_000_000, help="of a file (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=500, help="of a tar shard (default: %(default)s)")
    parser.add_argument("--max-shards", type=int, default=SHARDS[-1], help="(default: %(default)s)")
    parser.add_argument("--shuffle-buffer", type=int, default=1000, help="of streams (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=50, help="to read for samples/s (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="limit of a measurement (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="for files and cache, kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--markdown", type=Path, help="write the table between <!-- data --> and <!-- /data -->")
    parser.add_argument("--chart", type=Path, help="write the chart to this PNG")
    parser.add_argument("--measure", choices=("files", "shards"), help=argparse.SUPPRESS)  # set in a measurement
    parser.add_argument("--data", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure and print one JSON object."""
    arguments = parse_args()
    if arguments.measure:
        measure = measure_files if arguments.measure == "files" else measure_shards
        print(json.dumps(measure(arguments)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        results = measure_all(arguments, arguments.folder or Path(temporary))
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    if arguments.markdown:
        replace_section(arguments.markdown, "data", markdown_table(results))
    if arguments.chart:
        write_chart(arguments.chart, results)


def measure_all(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the measurements of files by number of rows, and of shards by their number."""
    results: dict[str, Any] = {"samples": arguments.samples, "buffer": arguments.shuffle_buffer}
    results |= {"files": {}, "shards": {}}
    rows = 1000
    while rows <= arguments.max_rows:
        path = folder / f"{rows}.jsonl"
        write_rows(path, rows)
        first = run(arguments, "files", str(path), folder)
        again = None if first is None else run(arguments, "files", str(path), folder)
        if first is not None and again is not None:
            again["cold_seconds"] = first["first_batch_seconds"]
        results["files"][rows] = again
        rows *= 10
    for number in SHARDS:
        if number <= arguments.max_shards:
            pattern = write_shards(folder / f"{number} shards", number, arguments.samples)
            results["shards"][number] = run(arguments, "shards", pattern, folder)
    return results


def run(arguments: argparse.Namespace, kind: str, data: str, folder: Path) -> dict[str, Any] | None:
    """Return one measurement in a process of its own; ``None`` if it takes too long."""
    flags = [f"--shuffle-buffer={arguments.shuffle_buffer}", f"--batches={arguments.batches}"]
    flags += [f"--samples={arguments.samples}"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--measure", kind, "--data", data, *flags],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            timeout=arguments.seconds,
        )
    except subprocess.TimeoutExpired:
        print(f"{data}: not measured within {arguments.seconds:g} s", file=sys.stderr)
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_rows(path: Path, count: int) -> None:
    """Write rows of text of 400 to 500 bytes, if the file does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return
    with path.open("w") as file:
        for number in range(count):
            question = {"from": "human", "value": f"Question {number}: what follows from this? " + "word " * 20}
            answer = {"from": "gpt", "value": f"Answer {number}: " + "text " * (30 + number % 20)}
            file.write(json.dumps({"id": number, "conversations": [question, answer]}) + "\n")


def write_shards(folder: Path, number: int, samples: int) -> str:
    """Write tar shards of captioned images of 20 kB, if they do not exist, and return their pattern."""
    from PIL import Image

    pattern = str(folder / f"{{00000..{number - 1:05d}}}.tar")
    if folder.exists():
        return pattern
    folder.mkdir(parents=True)
    data = io.BytesIO()
    Image.open(GOLDEN.parents[1] / "images/coffee.jpg").convert("RGB").resize((320, 240)).save(data, "JPEG", quality=88)
    for shard in range(number):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for place in range(samples):
                name = f"{shard:05d}{place:04d}"
                for suffix, content in (("jpg", data.getvalue()), ("txt", f"A cup of coffee, {name}.".encode())):
                    entry = tarfile.TarInfo(f"{name}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return pattern


def memory() -> int | None:
    """Return the proportional set size of this process in bytes; Linux only."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def open_batches(arguments: argparse.Namespace) -> Any:
    """Return the batches of a training run without data-loading workers."""
    from transformers import TrainingArguments

    from yivl.data.encoding import load_encoder
    from yivl.train.arguments import DataArguments
    from yivl.train.dataloaders import make_batches

    training = TrainingArguments(
        output_dir=str(Path(tempfile.gettempdir(), "unused")),
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=10**9,
        use_cpu=True,
        report_to="none",
    )
    data = DataArguments(data_path=arguments.data, shuffle_buffer=arguments.shuffle_buffer)
    return make_batches(data, training, load_encoder(str(GOLDEN / "checkpoint"), max_length=2048), _fail)


def _fail(error: Exception) -> None:
    raise error


def measure_files(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return memory and times of one file of rows."""
    import datasets  # noqa: F401 (its memory is not that of the data)

    import yivl.train.dataloaders  # noqa: F401

    before, start = memory(), time.perf_counter()
    batches = iter(open_batches(arguments).loader)
    next(batches)
    seconds = time.perf_counter() - start
    after = memory()
    return {
        "first_batch_seconds": seconds,
        "bytes": None if before is None or after is None else after - before,
        "samples_per_second": _rate(batches, arguments.batches),
    }


def measure_shards(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return memory and times of tar shards, and the time to resume after each of ``FRACTIONS``."""
    from yivl.data.stream_position import DataPosition, read_position

    results = measure_files(arguments)
    dataset = open_batches(arguments).loader.dataset
    total = arguments.samples * len(dataset.shards[0])
    reading, by_position = [], []
    stream, start = dataset.open_stream(0), time.perf_counter()
    read, spent = 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for fraction in FRACTIONS:
            count = int(total * fraction)
            while read < count:
                next(stream)
                read += 1
            reading.append(time.perf_counter() - start - spent)
            begin = time.perf_counter()
            DataPosition(dataset.start.layout, [stream.position]).write(Path(folder))
            times = []
            for _ in range(3):
                resumed = open_batches(arguments).loader.dataset
                again = time.perf_counter()
                resumed.start = read_position(Path(folder), resumed.shard_numbers, resumed.seed)
                next(resumed.open_stream(0))
                times.append(time.perf_counter() - again)
            by_position.append(statistics.median(times))
            spent += time.perf_counter() - begin
    return results | {"resume_by_reading_seconds": reading, "resume_seconds": by_position}


def _rate(batches: Any, count: int) -> float:
    start = time.perf_counter()
    number = sum(1 for _ in islice(batches, count))
    return number * BATCH_SIZE / (time.perf_counter() - start)


def markdown_table(results: dict[str, Any]) -> str:
    """Return the tables of files and of shards."""
    lines = [
        "| rows of a file | memory, MB | first batch, s | without the cache, s | samples/s |",
        "|---|---|---|---|---|",
    ]
    for rows, found in results["files"].items():
        if found is None:
            lines.append(f"| {int(rows):,} | not measured: too slow | | | |")
            continue
        numbers = (found["first_batch_seconds"], found["cold_seconds"])
        times = " | ".join(f"{seconds:.1f}" for seconds in numbers)
        lines.append(f"| {int(rows):,} | {_megabytes(found)} | {times} | {found['samples_per_second']:.0f} |")
    lines += ["", f"Tar shards of {results['samples']:,} images each, shuffle buffer {results['buffer']:,}:", ""]
    lines += ["| shards | memory, MB | first batch, s | samples/s | resume at 10, 50, 90 %, s | by reading again, s |"]
    lines += ["|---|---|---|---|---|---|"]
    for number, found in results["shards"].items():
        if found is None:
            lines.append(f"| {number} | not measured: too slow | | | | |")
            continue
        cells = [f"{found['first_batch_seconds']:.1f}", f"{found['samples_per_second']:.0f}"]
        for key in ("resume_seconds", "resume_by_reading_seconds"):
            cells.append(", ".join(f"{seconds:.2f}" for seconds in found[key]))
        lines.append(f"| {number} | {_megabytes(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _megabytes(found: dict[str, Any]) -> str:
    return "–" if found["bytes"] is None else f"{found['bytes'] / 1e6:.0f}"


def write_chart(path: Path, results: dict[str, Any]) -> None:
    """Draw memory and time to the first batch by rows, and the time to resume by the place in the data."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    files = {int(rows): found for rows, found in results["files"].items() if found is not None}
    left.plot(list(files), [(found["bytes"] or 0) / 1e6 for found in files.values()], marker="o")
    left.set(xscale="log", ylim=(0, None), xlabel="rows of a file", ylabel="memory of the data, MB")
    for key, label in (("first_batch_seconds", "cache exists"), ("cold_seconds", "no cache")):
        middle.plot(list(files), [found[key] for found in files.values()], marker="o", label=label)
    middle.set(xscale="log", yscale="log", xlabel="rows of a file", ylabel="time to the first batch, s")
    shards = {int(number): found for number, found in results["shards"].items() if found is not None}
    for number, color in zip(shards, ("tab:blue", "tab:orange", "tab:green"), strict=False):
        read = [int(number * results["samples"] * fraction) for fraction in FRACTIONS]
        for key, style, label in (
            ("resume_by_reading_seconds", "--", f"{number} tars, by reading again"),
            ("resume_seconds", "-", f"{number} tars, by position"),
        ):
            right.plot(read, shards[number][key], style, color=color, marker="o", label=label)
    right.set(xscale="log", yscale="log", xlabel="samples read before", ylabel="time to resume, s")
    right.xaxis.set_minor_formatter(NullFormatter())
    for axes in (middle, right):
        axes.legend(frameon=False, fontsize="small")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
