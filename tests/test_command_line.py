"""The entry scripts as a user runs them: output, exit codes, one line for every user-facing error."""

import errno
import fcntl
import io
import json
import logging
import os
import pty
import re
import runpy
import select
import shlex
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, GOLDEN, ROOT
from support.models import ARCHITECTURES, talkative_checkpoint

from yivl import command_line
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import YiVLError
from yivl.image_processing import load_image
from yivl.inference.chat import Chat
from yivl.serve.terminal import HELP, Terminal

PHOTO = GOLDEN / "images/photo_rgb.jpg"
MODEL = ("--model-path", str(CHECKPOINT))
ANSWER = ("--temperature", "0", "--max-new-tokens", "12")
QUESTION = "你好，图片里有什么"


def run(script: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True, input=stdin, check=False
    )


each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> str:
    answer = Chat(loaded).ask(QUESTION, PHOTO, temperature=0, max_new_tokens=12)
    assert answer
    return answer


def run_inside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, *arguments: str
) -> tuple[int, str, str]:
    """Run an entry script in this process, which spares the imports; return exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    main, code = runpy.run_path(str(ROOT / script))["main"], 0
    try:
        command_line.run(main)
    except SystemExit as error:
        code = int(str(error.code))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@each_architecture
def test_single_inference_prints_in_the_format_of_the_reference(
    architecture: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ARCHITECTURES[architecture]
    expected = Chat(load_model(folder, device="cpu")).ask(QUESTION, PHOTO, temperature=0, max_new_tokens=12)
    assert expected
    flags = ("--image-file", str(PHOTO), "--question", QUESTION, "--conv-mode", "mm_default", "--num_beams", "1")
    arguments = ("--model-path", str(folder), *flags, "--top_p", "1.0", *ANSWER)
    printed = f"----------\nquestion: {QUESTION}\noutputs: {expected}\n----------\n"
    result = run("single_inference.py", *arguments)
    assert (result.returncode, result.stdout) == (0, printed), result.stderr
    assert run_inside(monkeypatch, capsys, "single_inference.py", *arguments, "--stream")[:2] == (0, printed)


def test_single_inference_prints_json(
    expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--image", str(PHOTO), "--question", QUESTION, *ANSWER, "--json")
    code, out, _ = run_inside(monkeypatch, capsys, "single_inference.py", *MODEL, *arguments)
    fields = json.loads(out)
    assert code == 0
    assert fields["question"] == QUESTION
    assert fields["outputs"] == expected
    assert fields["model"] == "checkpoint"
    assert 0 < fields["new_tokens"] <= 12
    assert fields["finish_reason"] in ("stop", "length")
    assert fields["prompt_tokens"] > 16
    assert 0 < fields["seconds_to_first_token"] <= fields["seconds"]


def test_the_flags_reach_the_model(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = {
        "device": "cpu",
        "dtype": "bfloat16",
        "attn-implementation": "eager",
        "model-base": "b",
        "temperature": "2",
    }
    flags |= {"seed": "3", "top-k": "5", "top-p": "0.7", "num-beams": "2", "repetition-penalty": "1.5"}
    flags |= {"max-new-tokens": "7", "model-path": "m", "question": "q"}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    seen: dict[str, Any] = {}

    def spy(model_path: str, **loading: Any) -> LoadedModel:
        seen.update(loading, model_path=model_path)
        return loaded

    monkeypatch.setattr("yivl.checkpoint.loading.load_model", spy)
    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    monkeypatch.setattr(sys, "argv", ["single_inference.py", *arguments, "--load-8bit", "--allow-remote"])
    parsed = runpy.run_path(str(ROOT / "single_inference.py"))["parse_args"]()
    sampling, image = command_line.check_inputs(parsed)
    chat = command_line.load_chat(parsed)
    assert seen == {
        "model_path": "m",
        "model_base": "b",
        "device": "cpu",
        "dtype": "bfloat16",
        "attn_implementation": "eager",
        "load_in_4bit": False,
        "load_in_8bit": True,
    }
    assert chat.allow_remote
    assert image is None
    assert sampling == {
        "temperature": 2.0,
        "top_p": 0.7,
        "top_k": 5,
        "num_beams": 2,
        "repetition_penalty": 1.5,
        "max_new_tokens": 7,
        "seed": 3,
    }


@each_architecture
def test_eight_bits_answer_quietly(architecture: str) -> None:
    flags = ("--model-path", str(ARCHITECTURES[architecture]), "--load-8bit", "--image-file", str(PHOTO))
    result = run("single_inference.py", *flags, "--question", QUESTION, *ANSWER)
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines() == [line for line in result.stderr.splitlines() if "ViT tensors" in line]
    assert re.search(r"^outputs: .+$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "program", ["single_inference.py", "cli.py", "web_demo.py", "scripts/convert.py", "yivl.serve.api"]
)
def test_flags_are_parsed_before_anything_heavy_is_imported(program: str) -> None:
    run = "run_path" if program.endswith(".py") else "run_module"
    code = f"""
import runpy, sys
from yivl import command_line
for flag, code in {{"--help": 0, "--no-such-flag": 2}}.items():
    sys.argv = ["program", flag]
    try:
        runpy.{run}("{program}", run_name="__main__")
    except SystemExit as leave:
        assert leave.code == code
    else:
        raise AssertionError("the program has not ended")
assert not {{"torch", "transformers", "PIL", "numpy", "gradio", "fastapi", "uvicorn"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stderr == "error: unknown flag --no-such-flag; --help lists the flags\n"


WRONG_INPUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no image": (("--image-file", "nothing.jpg"), "error: nothing.jpg: no such file"),
    "not an image": (("--image-file", "setup.py"), "error: setup.py: not a readable image; use JPEG"),
    "an address": (
        ("--image-file", "http://127.0.0.1:9/x.jpg"),
        "error: http://127.0.0.1:9/x.jpg: remote images are disabled; download the file or pass --allow-remote",
    ),
    "no model": (("--model-path", "no/such"), "error: no/such: no such folder"),
    "no layout": (("--model-path", "tests"), "error: tests/config.json: no such file"),
    "temperature": (("--temperature", "-1"), "error: temperature=-1.0; expected 0 .greedy. or at least 0.001"),
    "base without adapter": (("--model-base", "x"), "error: .*: no adapter_config.json"),
    "no such device": (("--device", "gpu"), "error: device='gpu'; expected auto, cpu, mps, cuda"),
    "no mps": (("--device", "mps"), "error: device='mps': PyTorch finds no such device"),
    "no flash attention": (("--attn-implementation", "flash_attention_2"), "error: flash_attention_2 needs"),
    "compiling other attention": (("--compile", "--attn-implementation", "eager"), "error: --compile needs sdpa"),
    "too long": (("--question", "word " * 5000), "error: the conversation takes"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_is_one_line_and_exit_code_2(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments, message = WRONG_INPUTS[case]
    code, out, err = run_inside(monkeypatch, capsys, "single_inference.py", *MODEL, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.match(message, err)


def test_wrong_input_is_one_line_on_stderr_of_the_process() -> None:
    result = run("single_inference.py", *MODEL, "--image-file", "nothing.jpg")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: nothing.jpg: no such file\n"


@pytest.mark.parametrize(
    "arguments", [("--temprature", "1"), ("--temp", "1"), ("--json", "--stream"), ("--top_p", "a")]
)
def test_wrong_usage_is_exit_code_2(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run_inside(monkeypatch, capsys, "single_inference.py", *MODEL, *arguments)
    assert code == 2
    assert re.fullmatch(r"error: .*; --help lists the flags\n", err)


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            "not enough memory; ",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the docs"),
            "not enough memory; ",
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), "not enough memory; "),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "not enough memory; "),
        (MemoryError("out/7b: the GPUs are too small for the quantized model"), "not enough memory; "),
        (OSError(errno.ENOSPC, "No space left on device"), "output: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a"), "out/a: No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "output: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/out"), "/root/out: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "/mnt/out"), "/mnt/out: Read-only file system"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "setup.py/a"), "setup.py/a: Not a directory"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "gguf is not installed for "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_user_facing_error_is_one_line(
    error: BaseException, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "argv", ["program", "--output_dir=setup.py/a/b", "x"])
    with pytest.raises(SystemExit) as caught:
        command_line.run(raising(error))
    assert caught.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("given", [None, "0"])
def test_attention_of_cudnn_is_not_preferred_unless_the_user_says_so(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCH_CUDNN_SDPA_DEPRIORITIZED"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    command_line.run(lambda: None)
    assert os.environ[name] == (given or "1")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        OSError("a bug"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/usr/lib/library/table.json"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "/usr/lib/library"),
        ConnectionError("a bug"),
        OSError(errno.EBADF, "Bad file descriptor"),
        ModuleNotFoundError("No module named 'yivl.nothing'", name="yivl.nothing"),
        ModuleNotFoundError("No module named 'library'", name="library"),
        ModuleNotFoundError("No module named 'torch.nothing'", name="torch.nothing"),
    ],
    ids=str,
)
def test_a_bug_keeps_its_traceback(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "--output_dir=out/a"])
    with pytest.raises(type(error)) as caught:
        command_line.run(raising(error))
    assert caught.value is error


@pytest.mark.parametrize(
    ("module", "fix"),
    [
        ("bitsandbytes", "pip install 'yivl[quantization]'"),
        ("deepspeed", "pip install 'yivl[train]'"),
        ("gradio", "pip install 'yivl[serve]'"),
        ("gguf", "pip install 'yivl[export]'"),
        ("torch", "run ./scripts/setup.sh"),
    ],
)
def test_a_missing_dependency_names_the_extra_that_installs_it(
    module: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command_line.require(module)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(YiVLError, match=re.escape(fix)):
        command_line.require(module)


def test_the_extras_are_the_groups_of_the_requirements() -> None:
    distributions = metadata.packages_distributions()
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    groups = dict(re.findall(r"^# \[(\w+)\].*\n((?:[^#\n].*\n)+)", text, re.MULTILINE))
    assert len(groups) == len(command_line.EXTRAS)
    for extra, group in groups.items():
        required = {re.split("[<>=]", line)[0].lower().replace("_", "-") for line in group.splitlines()}
        modules = command_line.EXTRAS["" if extra == "core" else extra].split()
        provided = {name.lower().replace("_", "-") for module in modules for name in distributions[module]}
        assert required <= provided, extra


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"set -o pipefail; {sys.executable} single_inference.py --model-path {CHECKPOINT} --stream | true"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "error" not in result.stderr.lower()
    assert "Traceback" not in result.stderr
    assert result.returncode == 0


@pytest.mark.parametrize(
    ("architecture", "human", "assistant"), [("Yi-VL", "Human", "Assistant"), ("InternVL", "user", "assistant")]
)
def test_cli_in_a_pipe_prints_the_published_dialogue(architecture: str, human: str, assistant: str) -> None:
    """A byte of another encoding in a question is replaced."""
    folder = ARCHITECTURES[architecture]
    command = [sys.executable, "cli.py", "--model-path", str(folder), "--image-file", str(PHOTO), *ANSWER]
    typed = f"{QUESTION}\n\n".encode() + b"caf\xe9\n/exit\n"
    result = subprocess.run(command, cwd=ROOT, capture_output=True, input=typed, check=False)
    assert result.returncode == 0, result.stderr
    chat = Chat(load_model(folder, device="cpu"))
    first = chat.ask(QUESTION, PHOTO, temperature=0, max_new_tokens=12)
    second = chat.ask("caf\N{REPLACEMENT CHARACTER}", temperature=0, max_new_tokens=12)
    dialogue = [(human, QUESTION), (assistant, first), (human, ""), (human, "caf\N{REPLACEMENT CHARACTER}")]
    dialogue += [(assistant, second), (human, "/exit")]
    assert result.stdout.decode() == "".join(f"{role}: {text}\n" for role, text in dialogue) + "exit...\n"


def test_cli_without_input_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{sys.executable} cli.py --model-path {CHECKPOINT} <&-"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "exit...\n")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert run_inside(monkeypatch, capsys, "cli.py", *MODEL)[:2] == (0, "exit...\n")


def test_a_closed_output_is_one_line() -> None:
    for program in ("single_inference.py", "cli.py"):
        command = f"{sys.executable} {program} --model-path {CHECKPOINT} < /dev/null >&-"
        result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr == "error: stdout: closed, so that no answer can be printed; redirect it to a file\n"


def test_a_locale_without_chinese_changes_no_question(loaded: LoadedModel) -> None:
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "single_inference.py", *MODEL, *ANSWER, "--json", "--question", QUESTION]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, check=True, env=os.environ | ascii_only)
    answer = Chat(loaded).ask(QUESTION, temperature=0, max_new_tokens=12)
    printed = json.loads(result.stdout.decode("ascii"))
    assert (printed["question"], printed["outputs"]) == (QUESTION, answer)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    image = os.fsencode(tmp_path) + b"/\xff\xe9.jpg"
    with open(image, "wb") as file:
        file.write(PHOTO.read_bytes())
    command = [sys.executable, "single_inference.py", *MODEL, *ANSWER, "--question", "hi", "--image-file"]
    assert subprocess.run([*command, image], cwd=ROOT, capture_output=True, check=False).returncode == 0
    missing = subprocess.run([*command, image + b"x"], cwd=ROOT, capture_output=True, check=False)
    assert missing.returncode == 2
    assert missing.stderr.endswith(b"\\udcff\\udce9.jpgx: no such file\n")


def test_ctrl_c_in_the_middle_of_an_answer_is_exit_code_130(tmp_path: Path) -> None:
    folder = talkative_checkpoint(tmp_path / "talkative")
    flags = ("--model-path", str(folder), "--max-new-tokens", "3900", "--question", "你好")
    terminal = PseudoTerminal("single_inference.py", *flags)
    try:
        terminal.wait_for("outputs: ")
        terminal.type("\x03")
        terminal.wait_for("^C")
        assert terminal.process.wait() == 130
        assert "Traceback" not in terminal.screen
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)


def test_a_full_disk_is_one_line() -> None:
    command = f"{sys.executable} single_inference.py --model-path {CHECKPOINT} --stream --max-new-tokens 5 > /dev/full"
    result = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "error: output: No space left on device" in result.stderr


def test_cli_commands(tmp_path: Path, loaded: LoadedModel) -> None:
    saved = tmp_path / "chat.json"
    lines = [
        f'/image "{PHOTO}"',
        QUESTION,
        "a question \\",
        "in two lines",
        '"""/a block \\',
        "",
        '  of lines"""',
        '"""',
        '"""',
        "/retry",
        f"/save {saved}",
        "/params temperature=1.5 top_k=3 seed=7",
        "/params seed=none",
        "/params colour=1",
        "/params top_k=many",
        "/params top_p=9",
        "/image nothing.png",
        "/image",
        "/dance",
        "/system Be brief.",
        "/system",
        "/retry",
        "/save",
        f"/save {tmp_path}/no/folder.json",
        "/save ~no-such-user/chat.json",
        "/save a\0b",
        "/clear",
        "/help",
        '"""without an end',
    ]
    result = run("cli.py", *MODEL, *ANSWER, stdin="\n".join(lines))
    assert result.returncode == 0, result.stderr
    chat = Chat(loaded)
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    chat.ask(QUESTION, PHOTO, **sampling)
    chat.ask("a question \nin two lines", **sampling)
    chat.ask("/a block \\\n\n  of lines", **sampling)
    conversation = json.loads(saved.read_text())
    assert [turn["answer"] for turn in conversation["turns"]] == [turn.answer for turn in chat.turns]
    assert conversation["turns"][0]["num_images"] == 1
    assert conversation["sampling"]["temperature"] == 0
    for expected_line in (
        f"{PHOTO} (320x213 pixels) goes with the next question",
        f"saved 3 turns to {saved}",
        "temperature=1.5 top_p=0.8 top_k=3 num_beams=1 repetition_penalty=1.0 max_new_tokens=12 seed=7\n",
        "max_new_tokens=12 seed=None\n",
        "a new conversation, without images",
        "error: unknown parameter colour",
        "error: top_k=many: expected a number",
        "error: top_p=9.0; expected above 0 and at most 1",
        "error: nothing.png: no such file",
        "error: /image needs a path",
        "error: unknown command /dance; /help lists them",
        "Human: /system\nBe brief.\n",
        "error: there is no question to answer again",
        "error: /save needs a file name",
        "no/folder.json: cannot be written",
        "error: ~no-such-user/chat.json: cannot be written (No such file or directory)",
        "error: a\0b: cannot be written (embedded null byte)",
        HELP,
        'error: the question has no closing """\nexit...\n',
    ):
        assert expected_line in result.stdout


class PseudoTerminal:
    """A program in a terminal of its own, typed to and read from as a person would."""

    def __init__(self, *command: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 200, 0, 0))  # no line of a test is wrapped
        environment = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
            preexec_fn=self._prepare,
        )
        os.close(slave)
        self.screen = ""

    @staticmethod
    def _prepare() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ignored where a shell runs the tests in the background

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until the text appears after what was waited for before; at its end the program closes the terminal."""
        while text not in self.screen:
            self._read()
        self.screen = self.screen.split(text, 1)[1]

    def wait_for_more(self) -> None:
        """Read until anything is printed after what was waited for before."""
        while not self.screen:
            self._read()

    def _read(self) -> None:
        readable, _, _ = select.select([self.master], [], [], 120)
        assert readable, f"nothing was printed for two minutes after {self.screen!r}"
        try:
            raw = os.read(self.master, 65536).decode(errors="replace")
        except OSError as error:  # Linux reports the end of a terminal as an input error
            raise AssertionError(f"the program has ended: {self.screen!r}") from error
        self.screen += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", raw)


def test_cli_in_a_terminal_stops_an_answer_with_ctrl_c_and_leaves_with_ctrl_d(tmp_path: Path) -> None:
    folder = talkative_checkpoint(tmp_path / "talkative")
    terminal = PseudoTerminal("cli.py", "--model-path", str(folder), "--max-new-tokens", "3900")
    try:
        terminal.wait_for("Human:")
        terminal.type("你好\r")
        terminal.wait_for("Assistant: ")
        terminal.wait_for_more()
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        terminal.wait_for("Human:")
        terminal.type("half a question\x03")  # Ctrl-C at the prompt drops the line
        terminal.wait_for("Human:")
        terminal.type("/params max_new_tokens=5\r")
        terminal.wait_for("max_new_tokens=5 ")
        terminal.wait_for("Human:")
        terminal.type("\x1b[A")  # arrow up: the history
        terminal.wait_for("/params max_new_tokens=5")
        terminal.type("\r")
        terminal.wait_for("max_new_tokens=5 seed=None")  # Enter draws the line again, "Human:" included
        terminal.wait_for("Human:")
        terminal.type("\x04")
        terminal.wait_for("exit...")
        assert terminal.process.wait() == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)


def test_cli_in_a_terminal_completes_paths_and_takes_blocks(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(PHOTO.read_bytes())
    terminal = PseudoTerminal("cli.py", *MODEL, *ANSWER)
    try:
        terminal.wait_for("Human:")
        terminal.type(f"/image {tmp_path}/a\t")
        terminal.wait_for(" folder/")
        terminal.type("\t")
        terminal.wait_for("photo.jpg")
        terminal.type("\r")
        terminal.wait_for("goes with the next question")
        terminal.wait_for("Human:")
        terminal.type('"""first\r')
        terminal.wait_for("...")
        terminal.type('second"""\r')
        terminal.wait_for("Assistant: ")
        terminal.wait_for("Human:")
        terminal.type(f"/save {folder}/chat.json\r")
        terminal.wait_for("saved 1 turns")
        (turn,) = json.loads((folder / "chat.json").read_text())["turns"]
        assert (turn["question"], turn["num_images"]) == ("first\nsecond", 1)
        terminal.wait_for("Human:")  # before it, Ctrl-D is lost as the terminal changes its mode
        terminal.type("\x04")
        terminal.wait_for("exit...")
        assert terminal.process.wait() == 0
    finally:
        if terminal.process.poll() is None:
            terminal.process.send_signal(signal.SIGKILL)


def test_ctrl_c_while_an_image_is_encoded_does_not_exit(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, output = iter(["hello", "/exit now"]), io.StringIO()
    chat = Chat(loaded)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat, "encode", interrupt)
    terminal = Terminal(chat, {}, image=load_image(PHOTO), read_line=lambda _: next(lines), output=output)
    terminal.run()
    assert output.getvalue() == "\nexit...\n"
    assert len(terminal.pending_images) == 1


def test_errors_are_value_errors() -> None:
    assert issubclass(YiVLError, ValueError)


@pytest.mark.parametrize(("closed", "stderr"), [("<&- >&-", "error: this is stderr\n"), ("<&- >&- 2>&-", "")])
def test_files_are_not_opened_in_the_place_of_closed_streams(closed: str, stderr: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    code = f"""
import os, sys
from yivl import command_line
from yivl.errors import YiVLError
def main():
    with open({str(file)!r}, "wb") as file:
        os.write(1, b"of a library")
        print("ours", flush=True)
        sys.stderr.isatty()
        file.write(b"weights")
    raise YiVLError("this is stderr")
command_line.run(main)
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        f"{shlex.join(command)} {closed}", shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr, file.read_bytes()) == (2, stderr, b"weights")
