"""Flags, model loading and error handling shared by all programs.

No library is imported at module level: ``--help`` and wrong flags must not wait for PyTorch.
"""

import argparse
import dataclasses
import errno
import importlib.util
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from yivl.parser import Parser as Parser

if TYPE_CHECKING:
    from PIL.Image import Image

    from yivl.checkpoint.loading import LoadedModel
    from yivl.inference.chat import Chat

logger = logging.getLogger(__name__)

RELEASED_MODEL = "01-ai/Yi-VL-6B"
"""Hub id. Source: 01-ai/Yi, VL/single_inference.py, the default of ``--model-path``."""

EMBEDDED_MODEL = str(Path(__file__).parent / "tiny" / "assets" / "yi-vl-tiny")
"""The small model in the package, trained on drawn images (docs/tiny.md)."""

EXTRAS: Final = {
    "": "PIL accelerate google huggingface_hub numpy prompt_toolkit safetensors sentencepiece torch tqdm transformers",
    "train": "aiohttp datasets deepspeed matplotlib open_clip peft tensorboard torchvision yaml",
    "quantization": "bitsandbytes",
    "serve": "fastapi gradio prometheus_client uvicorn",
    "export": "gguf jinja2",
}
"""The modules that each extra of setup.py installs; "" is the installation without extras."""

# Errors of the system that a message alone explains. The others may come from a bug and keep their traceback.
_NO_PERMISSION: Final = (errno.EACCES, errno.EPERM, errno.EROFS)
_WRONG_PATH: Final = (errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


def make_parser(description: str | None, *, prog: str | None = None) -> Parser:
    """Return a parser with the model flags."""
    parser = Parser(prog=prog, description=description)
    add_model_flags(parser)
    return parser


def add_checkpoint_flags(parser: argparse.ArgumentParser, *, must_name_model: bool = False) -> Any:
    """Add the flags that name a checkpoint, the embedded model by default, and return their argument group."""
    group = parser.add_argument_group("model")
    kinds = "checkpoint folder, LoRA adapter folder, hub id, or modelscope:ID"
    group.add_argument(
        "--model-path",
        "--model_name_or_path",
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
        help="precision (default: that of the checkpoint; float32 products where a CPU has no others)",
    )
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", action="store_true", help="quantize the language model to 4 bits")
    bits.add_argument("--load-8bit", action="store_true", help="quantize the language model to 8 bits")
    group.add_argument(
        "--attn-implementation",
        default="sdpa",
        choices=("sdpa", "eager", "flash_attention_2"),
        help="attention kernels (default: %(default)s)",
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the decoding step at the start, which pays for long use"
    )


def add_image_flags(parser: argparse.ArgumentParser, about: str) -> None:
    """Add the flags for the image of the first question; ``about`` is the help of ``--image-file``."""
    parser.add_argument("--image-file", "--image", help=about)
    parser.add_argument("--allow-remote", action="store_true", help="accept http(s) addresses as images")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flag of LLaVA that chooses a prompt."""
    parser.add_argument(
        "--conv-mode", default="mm_default", choices=("mm_default",), help="the checkpoint decides the prompt"
    )


def add_sampling_flags(parser: argparse.ArgumentParser, *, top_p: float, max_new_tokens: int) -> None:
    """Add the sampling flags, with the defaults that differ between the reference scripts."""
    group = parser.add_argument_group("answer")
    group.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default: %(default)s)")
    group.add_argument(
        "--top-p", type=float, default=top_p, help="probability mass sampled from (default: %(default)s)"
    )
    group.add_argument("--top-k", type=int, default=50, help="tokens sampled from, 0 is all (default: %(default)s)")
    group.add_argument("--num-beams", type=int, default=1, help="beam search (default: %(default)s)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="(default: %(default)s)")
    group.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="length in tokens (default: %(default)s)"
    )
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


def utf8(argument: str) -> str:
    """Return an argument of the command line, its bytes read as UTF-8 where the locale could not read them."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def check_inputs(arguments: argparse.Namespace) -> tuple[dict[str, Any], "Image | None"]:
    """Return the fields of ``Sampling`` and the image; call it before ``load``, which takes longer to fail.

    Raises:
        YiVLError: If a value is out of range, the image cannot be used, or there is no output to print answers to.
    """
    from yivl.errors import YiVLError
    from yivl.image_processing import load_image
    from yivl.inference.sampling import Sampling

    if sys.stdout is None:  # the shell closed it with >&-; Python would drop the answer silently
        raise YiVLError("stdout: closed, so that no answer can be printed; redirect it to a file")
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = dataclasses.asdict(Sampling(**{name: getattr(arguments, name) for name in names}))
    if arguments.image_file is None:
        return sampling, None
    return sampling, load_image(os.path.expanduser(arguments.image_file), allow_remote=arguments.allow_remote)


def load(arguments: argparse.Namespace) -> "LoadedModel":
    """Return the model of the flags.

    Raises:
        YiVLError: If it cannot be loaded.
    """
    log_to_stderr()
    if arguments.model_path == EMBEDDED_MODEL:
        logger.info(
            "this is the small model of the package, which knows only drawn images like images/cats.jpg; "
            "for the released model: --model-path %s",
            RELEASED_MODEL,
        )

    from yivl.checkpoint.loading import load_model

    if arguments.compile:  # before the model, which takes longer to fail
        from yivl.inference.compilation import check_compiler, compile_decoding

        check_compiler()
    loaded = load_model(
        arguments.model_path,
        device=arguments.device,
        dtype=arguments.dtype,
        model_base=arguments.model_base,
        load_in_4bit=arguments.load_4bit,
        load_in_8bit=arguments.load_8bit,
        attn_implementation=arguments.attn_implementation,
    )
    return compile_decoding(loaded) if arguments.compile else loaded


def load_chat(arguments: argparse.Namespace) -> "Chat":
    """Return a new conversation with the model of the flags."""
    loaded = load(arguments)

    from yivl.inference.chat import Chat

    return Chat(loaded, allow_remote=arguments.allow_remote)


def log_to_stderr() -> None:
    """Log to stderr: of libraries only errors, and progress bars only in a terminal."""
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    set_log_level(logging.INFO)
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
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it logs that there is no CUDA
    transformers_logging.set_verbosity_error()
    warnings.simplefilter("ignore", FutureWarning)  # of one library about another
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def set_log_level(level: int) -> None:
    """Set the level of the package's own log lines."""
    for name in ("yivl", "__main__"):
        logging.getLogger(name).setLevel(level)


def run(
    main: Callable[[], None], *, less_memory: str = "try --load-4bit, a smaller checkpoint, or --device cpu"
) -> None:
    """Run a program: a user-facing error is one line on stderr; exit code 2 for wrong input, 1 for lack of resources.

    Args:
        main: The program.
        less_memory: What to do if memory runs out.
    """
    from yivl.errors import YiVLError

    # On H100 and newer GPUs, PyTorch prefers cuDNN's attention, which builds a plan for every new length: a fraction of
    # a second, and memory for good. Lengths of prompts and of decoding steps are always new. PyTorch reads it once.
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    _open_closed_streams()
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
    except BrokenPipeError:  # the reader of our output has left: Python must not write to it again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = f"not enough memory; {less_memory}" if is_out_of_memory(error) else _explain(error)
        if message is None:
            raise
        _fail(message, 1)


def _open_closed_streams() -> None:
    """Connect closed standard streams to the null device.

    Otherwise the next file that is opened, such as a checkpoint, would take the place of one and receive what libraries
    print. ``sys.stdin`` and ``sys.stdout`` stay ``None``, by which a program knows; ``sys.stderr`` must not be, for
    libraries.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (open to the end)


def require(module: str) -> None:
    """Check that an optional module is installed.

    Raises:
        YiVLError: If it is not; names the extra that installs it.
    """
    from yivl.errors import YiVLError

    if message := _missing(module):
        raise YiVLError(message)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; PyTorch's CPU allocator, cuBLAS and cuDNN have no exception type."""
    text = str(error).lower()
    said = ("out of memory", "can't allocate memory", "_status_alloc_failed")  # of cuBLAS and cuDNN
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(words in text for words in said))


def _explain(error: Exception) -> str | None:
    """Return one line about an error that is not a bug: a full disk, a path of the user, a missing extra."""
    if isinstance(error, ModuleNotFoundError):
        return _missing(str(error.name))
    filename = getattr(error, "filename", None)
    if "No space left on device" in str(error):  # safetensors has an exception of its own
        return f"{filename or 'output'}: {getattr(error, 'strerror', None) or 'No space left on device'}"
    if not isinstance(error, OSError) or not isinstance(filename, str | os.PathLike):
        return None
    if error.errno in _NO_PERMISSION or (error.errno in _WRONG_PATH and _is_argument(Path(filename))):
        return f"{filename}: {error.strerror}"
    return None


def _is_argument(file: Path) -> bool:
    """Return whether the command line names a file, a folder it is in, or a file below it."""
    values = [value for argument in sys.argv[1:] for value in (argument, argument.partition("=")[2]) if value]
    paths = [Path(os.path.abspath(os.path.expanduser(value))) for value in values]
    file = Path(os.path.abspath(file))
    return any(file.is_relative_to(path) or path.is_relative_to(file) for path in paths)


def _missing(module: str) -> str | None:
    """Return how to install a dependency of ours, or ``None`` if it is installed or not ours."""
    package = module.partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if package in modules.split()), None)
    if extra is None or importlib.util.find_spec(package) is not None:
        return None
    fix = f"pip install 'yivl[{extra}]'" if extra else "run ./scripts/setup.sh, then use .venv/bin/python"
    return f"{package} is not installed for {sys.executable}; {fix}"


def _fail(message: str, code: int) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201 (the one line the user sees)
    sys.exit(code)
