"""Measure this package against llama.cpp, transformers and the LLaVA baseline on one random model and one prompt.

python scripts/benchmark_peers.py --shape medium --llama-python ~/llama/bin/python --json peers.json

Every program is a child process with the same number of threads that answers one question about one image. The
programs take turns: each answers once per round, while the others are stopped. Figures are medians over the rounds.
--markdown and --chart write the table and the chart of docs/benchmarks.md.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmark_inference import QUESTIONS, question_ids, rounded
from benchmark_report import markdown_table, replace_section, write_chart
from flops import language_flops, vision_flops
from random_models import GOLDEN, SHAPES, shape_config, write_random_checkpoint

PEERS = (
    *("yivl:auto", "yivl:float32", "yivl:bfloat16", "yivl:8bit", "yivl:4bit"),
    *("yivl:auto+compile", "yivl:float32+compile", "yivl:8bit+compile", "yivl:4bit+compile"),
    *("llama.cpp:f16", "llama.cpp:bf16", "llama.cpp:q8_0", "llama.cpp:q4_0"),
    *("transformers:float32", "transformers:bfloat16", "llava:float32", "llava:bfloat16"),
)
GGUF_DTYPES = {"f16": "float16", "bf16": "bfloat16"}
QUANTIZED = {"q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
FILE_BITS = {"8bit": 8.5, "4bit": 4.5}
"""Bits per weight of llama.cpp: 32 weights share a scale in float16. Source: ggml-common.h, block_q8_0, block_q4_0."""
TOKEN_BITS = {"8bit": 8, "4bit": 5}
"""Bits per weight of yivl.model.packed_linear: a scale for each output; a bfloat16 scale and zero for 32 weights."""
SAME_BITS = {"8bit": "llama.cpp:q8_0", "4bit": "llama.cpp:q4_0"}


class PeerError(Exception):
    """A program that could not be measured; the text is the last line it printed."""


def parse_args() -> argparse.Namespace:
    """Return the parsed flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="medium", help="(default: %(default)s)")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter of llama-cpp-python")
    parser.add_argument("--device", default="cpu", help="of the PyTorch programs (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="length of an answer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each program (default: all CPUs)")
    parser.add_argument("--folder", type=Path, help="keep the models here for further runs (default: temporary)")
    parser.add_argument("--json", type=Path, help="write all figures")
    parser.add_argument("--markdown", type=Path, help="write the table, or replace it in a page that has its section")
    parser.add_argument("--section", default="peers", help="name of the section (default: %(default)s)")
    parser.add_argument("--chart", type=Path, help="write the chart (.png or .svg)")
    arguments = parser.parse_args()
    if shutil.which(arguments.llama_python) is None:
        parser.error(f"--llama-python {arguments.llama_python}: no such program; give the path of a Python interpreter")
    return arguments


def main() -> None:
    """Measure and print one JSON object."""
    arguments = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped children would outlive this process
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.shape
        results = measure(arguments, Models(folder, arguments))
    text = json.dumps(rounded(results), indent=2)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    if arguments.markdown:
        replace_section(arguments.markdown, arguments.section, markdown_table(results))
    if arguments.chart:
        write_chart(arguments.chart, results)


class Models:
    """The random model in the format of every program; a format is written when a program first needs it."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.arguments = folder, arguments
        self.checkpoint = folder / "model"
        if not self.checkpoint.exists():
            import torch

            torch.manual_seed(0)
            write_random_checkpoint(arguments.shape, "bfloat16", self.checkpoint)

    def hf(self) -> Path:
        """Return the ``-hf`` export."""
        from yivl.export.hf import to_hf

        target = self.folder / "hf"
        if not target.exists():
            to_hf(self.checkpoint, target)
        return target

    def gguf(self, form: str) -> tuple[Path, Path]:
        """Return language model and ViT for llama.cpp; with a quantized language model the ViT is in float16."""
        from yivl.export.gguf import export_gguf

        dtype = GGUF_DTYPES.get(form, "float16")
        pair = self.folder / f"model-{dtype}.gguf", self.folder / f"mmproj-model-{dtype}.gguf"
        if not pair[0].exists():
            export_gguf(self.checkpoint, self.folder, dtype=dtype)  # type: ignore[arg-type]
        if form not in QUANTIZED:
            return pair
        target = self.folder / f"model-{form}.gguf"
        if not target.exists():
            part = target.with_suffix(".part")
            job = {"source": str(pair[0]), "target": str(part), "ftype": QUANTIZED[form]}
            Worker("quantize", self.arguments.llama_python, job | {"threads": self.arguments.threads}).close()
            part.rename(target)
        return target, pair[1]


class Worker:
    """A child process with one program; it is stopped (SIGSTOP) whenever another one runs.

    A stopped process cannot take time from the measured one: threads of OpenMP spin for a while after their work.

    Raises:
        PeerError: If the program fails.
    """

    def __init__(self, kind: str, python: str, job: dict[str, Any]) -> None:
        command = [python, str(Path(__file__).with_name("peer_workers.py")), kind, json.dumps(job)]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in close)
        environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"])}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._log}
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.facts = self._read()

    def run(self) -> dict[str, float]:
        """Return the times of one answer."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            lines = self._log.read().split("\n")
            raise PeerError(next((line.strip() for line in reversed(lines) if line.strip()), "no output"))
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)  # returns once it is stopped
        result: dict[str, Any] = json.loads(line)
        return result


def measure(arguments: argparse.Namespace, models: Models) -> dict[str, Any]:
    """Return the figures of all programs."""
    from yivl.tokenization import load_tokenizer

    config = shape_config(arguments.shape)
    ids = question_ids(load_tokenizer(models.checkpoint), config.prompt_template)
    prompt_tokens = len(ids) - 1 + config.num_patches
    job = {name: getattr(arguments, name) for name in ("new_tokens", "threads", "device")}
    job |= {"checkpoint": str(models.checkpoint), "image": str(GOLDEN / "images/photo_rgb.jpg"), "ids": ids}
    job |= {"prompt_tokens": prompt_tokens, "question": QUESTIONS[0]}
    rounds, facts, errors = take_turns(arguments, job, models)
    bounds = medians(rounds.pop("rates"))
    bounds |= {"language_flops": language_flops(config, prompt_tokens), "vision_flops": vision_flops(config)}
    rows = {name: row(name, facts[name], rounds[name], bounds, config, prompt_tokens, models) for name in rounds}
    compare(rows)
    return {
        "machine": {key: facts["rates"][key] for key in facts["rates"] if key != "resident_bytes"},
        "shape": arguments.shape,
        "repeats": arguments.repeats,
        "new_tokens": arguments.new_tokens,
        "prompt_tokens": prompt_tokens,
        "bounds": bounds,
        "peers": rows,
        "errors": errors,
        "rounds": rounds,
    }


def take_turns(
    arguments: argparse.Namespace, job: dict[str, Any], models: Models
) -> tuple[dict[str, list[dict[str, float]]], dict[str, dict[str, Any]], dict[str, str]]:
    """Return the times of every round and the facts of each program and of ``rates``, and why others have none."""
    workers, errors = {}, {}
    with ExitStack() as stack:
        for name in ("rates", *arguments.peers):
            print(f"loading {name}", file=sys.stderr)
            try:
                workers[name] = start(name, job, models)
            except PeerError as error:
                errors[name] = str(error)
            else:
                stack.callback(workers[name].close)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for index in range(arguments.repeats):
            for name, worker in workers.items():
                rounds[name].append(worker.run())
                print(f"round {index + 1} {name}: {rounded(rounds[name][-1])}", file=sys.stderr)
    return rounds, {name: worker.facts for name, worker in workers.items()}, errors


def start(name: str, job: dict[str, Any], models: Models) -> Worker:
    """Return the process of a program that has loaded its model and answered once."""
    kind, _, form = name.partition(":")
    if kind == "llama.cpp":
        gguf, mmproj = models.gguf(form)
        job = job | {"gguf": str(gguf), "mmproj": str(mmproj)}
        return Worker(kind, models.arguments.llama_python, job)
    if kind == "transformers" and "intern_vision" in SHAPES[models.arguments.shape]:
        kind = "transformers-internvl"
    job = job | ({"hf": str(models.hf())} if kind == "transformers" else {})
    return Worker(kind, sys.executable, job | {"form": form})


def medians(rounds: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    rounds = list(rounds)
    return {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}


def row(
    name: str,
    facts: dict[str, Any],
    rounds: list[dict[str, float]],
    bounds: dict[str, float],
    config: Any,
    prompt_tokens: int,
    models: Models,
) -> dict[str, Any]:
    """Return the figures of one program and their ratios to the bounds."""
    kind, form = name.removesuffix("+compile").split(":")
    if kind == "llama.cpp":
        file_bytes, token_bytes = gguf_bytes(models.gguf(form))
        itemsize = 2  # its cache is in float16
    else:
        itemsize = 4 if facts["dtype"] == "float32" else 2
        file_bytes, token_bytes = torch_bytes(config, form, itemsize)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    token_bytes += prompt_tokens * cache
    figures: dict[str, Any] = medians(rounds)
    first = statistics.median(times["encode_s"] + times["prefill_s"] for times in rounds)
    rate = max(bounds["float32"], bounds["bfloat16"])
    return figures | {
        **({"features": facts["features"]} if kind == "llama.cpp" else {"dtype": facts["dtype"]}),
        "first_token_s": first,
        "bytes_per_token": token_bytes,
        "resident_bytes": facts["resident_bytes"],
        "file_bytes": file_bytes,
        "resident_over_file": facts["resident_bytes"] / file_bytes,
        "prefill_over_bound": figures["prefill_s"] / (bounds["language_flops"] / rate),
        "first_token_over_bound": first / ((bounds["language_flops"] + bounds["vision_flops"]) / rate),
        "decode_over_bound": bounds["bandwidth"] / token_bytes / figures["tokens_per_s"],
    }


def torch_bytes(config: Any, form: str, itemsize: int) -> tuple[int, int]:
    """Return the size of a checkpoint in the precision of a program, and the bytes of weights read per token.

    With 4 and 8 bits the decoder layers of the checkpoint count as the blocks of llama.cpp, so that memory is compared
    with the same size, and those read per token as they are stored. Everything else has 16 bits in the checkpoint.
    """
    from yivl.checkpoint.loading import empty_model

    file_bytes = token_bytes = 0.0
    for key, parameter in empty_model(config).named_parameters():
        is_quantized = form in FILE_BITS and key.startswith("model.layers.") and parameter.ndim == 2
        in_file = 2 if form in FILE_BITS else itemsize
        file_bytes += parameter.numel() * (FILE_BITS[form] / 8 if is_quantized else in_file)
        if key.startswith(("model.layers.", "model.norm.", "lm_head.")):
            token_bytes += parameter.numel() * (TOKEN_BITS[form] / 8 if is_quantized else itemsize)
    return int(file_bytes), int(token_bytes)


def gguf_bytes(pair: tuple[Path, Path]) -> tuple[int, int]:
    """Return the size of both files, and the bytes of weights read per token."""
    from gguf import GGUFReader

    tensors = GGUFReader(pair[0]).tensors
    token_bytes = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != "token_embd.weight")
    return sum(path.stat().st_size for path in pair), token_bytes


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Add the ratios to llama.cpp with as many bits: f16, q8_0 or q4_0."""
    for name, figures in rows.items():
        other = (
            name
            if name.startswith("llama.cpp:q")
            else SAME_BITS.get(name.removesuffix("+compile").split(":")[1], "llama.cpp:f16")
        )
        if other in rows:
            figures["prefill_over_llama_cpp"] = figures["prefill_s"] / rows[other]["prefill_s"]
            figures["first_token_over_llama_cpp"] = figures["first_token_s"] / rows[other]["first_token_s"]
            figures["decode_over_llama_cpp"] = figures["tokens_per_s"] / rows[other]["tokens_per_s"]


if __name__ == "__main__":
    main()
