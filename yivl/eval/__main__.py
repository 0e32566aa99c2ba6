"""Evaluate the answers of a model.

python -m yivl.eval rows  --data rows.json --image-folder images --group-by kind language --output out/rows
python -m yivl.eval mmmu  --model-path 01-ai/Yi-VL-6B --data MMMU/MMMU --output out/mmmu
python -m yivl.eval cmmmu --model-path 01-ai/Yi-VL-6B --data m-a-p/CMMMU --output out/cmmmu

Every question is a conversation of its own, decoded greedily. The output folder keeps each response: the same command
resumes an interrupted run. Under python -m yivl.train.launch the questions are sharded across ranks. A table is
printed, and written as Markdown, CSV and JSON; MMMU and CMMMU also get a chart and a file for submission.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from yivl import command_line
from yivl.errors import YiVLError
from yivl.eval.benchmarks import cmmmu, mmmu, rows
from yivl.train.cpu_threads import let_idle_threads_sleep

if TYPE_CHECKING:
    from yivl.checkpoint.loading import LoadedModel
    from yivl.eval.benchmarks.benchmark import Benchmark

BENCHMARKS: "Final[Mapping[str, Benchmark]]" = MappingProxyType({"rows": rows, "mmmu": mmmu, "cmmmu": cmmmu})

# Flags that change at most the last bits of the responses: a run may resume with others.
_FREE: Final = ("output", "batch_size", "device", "attn_implementation", "compile", "group_by")


def parse_args() -> argparse.Namespace:
    """Return the benchmark and its flags."""
    parser = command_line.Parser(prog="python -m yivl.eval", description=__doc__)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar=f"{{{','.join(BENCHMARKS)}}}")
    for name, benchmark in BENCHMARKS.items():
        about = (benchmark.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=about, description=about)
        benchmark.add_flags(command)
        command.add_argument("--output", "--output_dir", required=True, help="folder to write to")
        command.add_argument("--batch-size", type=int, default=16, help="questions per batch (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Ask the questions and print the report."""
    arguments = parse_args()
    benchmark = BENCHMARKS[arguments.benchmark]
    let_idle_threads_sleep()
    command_line.log_to_stderr()  # before the imports, which log

    from yivl.eval.runner import answer_questions, fingerprint, join_ranks

    folder = Path(arguments.output).expanduser()
    with join_ranks() as ranks:
        with ranks.agree():
            if arguments.batch_size < 1:
                raise YiVLError(f"--batch-size {arguments.batch_size}: must be at least 1")
            questions = benchmark.read_questions(arguments)
            max_new_tokens = benchmark.max_new_tokens(arguments)
            if max_new_tokens < 1:
                raise YiVLError(f"--max-new-tokens {max_new_tokens}: must be at least 1")
            models = [arguments.model_path, arguments.model_base or _adapter_base(arguments.model_path)]
            settings = {name: value for name, value in vars(arguments).items() if name not in _FREE}
            settings |= {"max_new_tokens": max_new_tokens} | fingerprint(questions, arguments.data, models)
        responses = answer_questions(
            lambda: _load(arguments),
            questions,
            folder,
            settings,
            batch_size=arguments.batch_size,
            max_new_tokens=max_new_tokens,
            ranks=ranks,
        )
    if ranks.rank == 0:
        about = {"benchmark": arguments.benchmark, "data": arguments.data, "model": arguments.model_path}
        print(benchmark.report(arguments, questions, responses).write(folder, about))  # noqa: T201 (the result)


def _load(arguments: argparse.Namespace) -> "LoadedModel":
    """Load the model; under torchrun each rank has a GPU of its own, or shares one with others if there are too few."""
    import torch

    local_rank = os.environ.get("LOCAL_RANK")
    if arguments.device == "auto" and local_rank is not None and torch.cuda.is_available():
        index = int(local_rank) % torch.cuda.device_count()
        arguments = argparse.Namespace(**{**vars(arguments), "device": f"cuda:{index}"})
    return command_line.load(arguments)


def _adapter_base(model_path: str) -> Any:
    """Return the base model that an adapter folder names, if any."""
    from yivl.checkpoint.format import ADAPTER_CONFIG, read_json

    path = Path(model_path).expanduser() / ADAPTER_CONFIG
    return read_json(path).get("base_model_name_or_path") if path.is_file() else None


if __name__ == "__main__":
    command_line.run(main, less_memory="try a smaller --batch-size, --load-4bit, or a smaller checkpoint")
