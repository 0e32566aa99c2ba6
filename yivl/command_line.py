"""What the entry scripts share: flags, loading, and one clear line for every mistake of the user.

Only the standard library is imported at the top, so that ``--help`` answers at once.
"""

import argparse
import dataclasses
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

    from yivl.checkpoint.loading import LoadedModel
    from yivl.inference.chat import Chat

logger = logging.getLogger(__name__)

RELEASED_MODEL = "01-ai/Yi-VL-6B"
"""Source: 01-ai/Yi, VL/single_inference.py, whose default it is."""

EMBEDDED_MODEL = str(Path(__file__).parent / "tiny" / "assets" / "yi-vl-tiny")
"""The small model in the package, which knows a small world of drawn pictures (docs/tiny.md)."""


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the model flags; abbreviations are off, so every spelling means one thing."""
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_flags(parser)
    return parser


def add_checkpoint_flags(parser: argparse.ArgumentParser, *, must_name_model: bool = False) -> Any:
    """Add the flags that name a checkpoint, the embedded model by default, and return their argument group."""
    group = parser.add_argument_group("model")
    kinds = "checkpoint folder in the published layout, LoRA adapter folder, or hub id"
    group.add_argument(
        "--model-path",
        type=os.path.expanduser,
        default=None if must_name_model else EMBEDDED_MODEL,
        required=must_name_model,
        help=kinds if must_name_model else f"{kinds} (default: the small model in the package)",
    )
    group.add_argument("--model-base", type=os.path.expanduser, help="base model of a LoRA adapter in --model-path")
    return group


def add_model_flags(parser: argparse.ArgumentParser, *, must_name_model: bool = False) -> None:
    """Add the flags that ``load`` reads."""
    group = add_checkpoint_flags(parser, must_name_model=must_name_model)
    group.add_argument("--device", default="auto", help="auto, cpu, mps, cuda, cuda:N (default: all GPUs, MPS or CPU)")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="precision of the weights (default: that of the checkpoint)",
    )
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="quantize the language model to 4 bits (nf4)")
    bits.add_argument("--load-8bit", action="store_true", help="quantize the language model to 8 bits (int8)")
    group.add_argument(
        "--attn-implementation",
        default="sdpa",
        choices=("sdpa", "eager", "flash_attention_2"),
        help="attention kernels (default: %(default)s)",
    )


def add_picture_flags(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the flags for a picture of the first question, with ``about`` as the help of ``--image-file``."""
    parser.add_argument("--image-file", "--image", help=about)
    parser.add_argument("--allow-remote", action="store_true", help="accept http(s) addresses as pictures")


def add_sampling_flags(parser: argparse.ArgumentParser, *, top_p: float, max_new_tokens: int) -> None:
    """Add the sampling flags; the defaults that differ between the release's scripts are given."""
    group = parser.add_argument_group("answer")
    group.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default: %(default)s)")
    group.add_argument(
        "--top-p", "--top_p", type=float, default=top_p, help="probability mass sampled from (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=50, help="tokens sampled from, 0 is all (default: %(default)s)")
    group.add_argument("--num-beams", "--num_beams", type=int, default=1, help="beam search (default: %(default)s)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="length in tokens (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


def check_inputs(arguments: argparse.Namespace) -> tuple[dict[str, Any], "Image | None"]:
    """Return the fields of ``Sampling`` and the picture, so that a mistake in them costs no model load.

    Raises:
        YiVLError: If a value is out of range or the picture cannot be used.
    """
    from yivl.image_processing import load_image
    from yivl.inference.sampling import Sampling

    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = dataclasses.asdict(Sampling(**{name: getattr(arguments, name) for name in names}))
    if arguments.image_file is None:
        return sampling, None
    return sampling, load_image(os.path.expanduser(arguments.image_file), allow_remote=arguments.allow_remote)


def load(arguments: argparse.Namespace) -> "LoadedModel":
    """Load the model that the flags describe."""
    log_to_stderr()
    if arguments.model_path == EMBEDDED_MODEL:
        logger.info(
            "this is the small model of the package, which knows only drawn pictures like images/cats.jpg; "
            "the released one: --model-path %s",
            RELEASED_MODEL,
        )

    from yivl.checkpoint.loading import load_model

    return load_model(
        arguments.model_path,
        device=arguments.device,
        dtype=arguments.dtype,
        model_base=arguments.model_base,
        load_in_4bit=arguments.load_4bit,
        load_in_8bit=arguments.load_8bit,
        attn_implementation=arguments.attn_implementation,
    )


def load_chat(arguments: argparse.Namespace) -> "Chat":
    """Load the model that the flags describe and start a conversation with it."""
    loaded = load(arguments)

    from yivl.inference.chat import Chat

    return Chat(loaded, allow_remote=arguments.allow_remote)


def log_to_stderr() -> None:
    """Show our own log lines, and of the libraries only errors; progress bars only in a terminal."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in (
        "accelerate",
        "bitsandbytes",
        "datasets",
        "DeepSpeed",
        "fsspec",
        "gguf",
        "httpx",
        "matplotlib",
        "torch",
    ):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it says that there is no CUDA
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def run(
    main: Callable[[], None], *, less_memory: str = "try --load-4bit, a smaller checkpoint, or --device cpu"
) -> None:
    """Run an entry point: a mistake of the user is one line on stderr and exit code 2, no memory or disk is 1.

    Args:
        main: The program.
        less_memory: What to do where the memory is too small.
    """
    from yivl.errors import YiVLError

    for stream in (sys.stdin, sys.stdout):
        # A terminal that cannot show Chinese, or a question in another encoding, must not end the program.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main()
    except YiVLError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written
        _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    except ModuleNotFoundError as error:
        _fail(f"{error}; run ./scripts/setup.sh and then .venv/bin/python instead of {sys.executable}", 1)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(f"not enough memory; {less_memory}", 1)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell a lack of memory from other errors; PyTorch's CPU allocator has no exception type of its own."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 (the one line the user sees)
    sys.exit(code)
