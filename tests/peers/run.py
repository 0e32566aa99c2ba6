"""Run third-party tools on exports of the small model and print a table of the results (docs/interop.md).

python tests/peers/run.py WORK [PEER...]

Needs the environment of this package with all extras, a package registry and 15 GB, without the evaluation kits, in the
folder WORK, which keeps an environment for each peer. Greedy answers are compared with those of ``Chat``, on square
images: others are cropped by the -hf processor and padded by this package.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PROGRAMS: Final = Path(__file__).parent / "programs"
CHECKPOINT: Final = ROOT / "yivl/tiny/assets/yi-vl-tiny"

QUESTIONS: Final = (
    "What is in this image?",
    "Describe the image in detail.",
    "How many animals are there?",
    "What does the sign say?",
    "Is there a dog?",
    "图中有什么？",
    "牌子上写着什么？",
    "图中有几只动物？",
    "What is on the left?",
)
FOLLOW_UP: Final = "What color is the floor?"

VLMEVALKIT: Final = "ms-vlmeval==0.0.20"
"""VLMEvalKit on the registry, packaged by ModelScope."""
PACKAGES: Final = {
    "transformers-4.57": ("transformers==4.57.6", "torch", "torchvision", "accelerate", "sentencepiece", "protobuf"),
    # It imports torchaudio, which must fit torch; neither says so to pip.
    "llamafactory": ("llamafactory==0.9.5", "torch==2.11.*", "torchaudio==2.11.*", "torchvision==0.26.*"),
    "clients": ("openai==2.54.0", "litellm==1.106.2", "langchain-openai==1.7.3"),
    "lmms-eval": ("lmms_eval==0.7.3",),
    "vlmevalkit-api": (VLMEVALKIT,),
}
"""Requirements by environment."""
SHORTER: Final = (
    "per_device_train_batch_size=4",
    "gradient_accumulation_steps=1",
    "num_train_epochs=2",
    "learning_rate=1e-3",
    "logging_steps=1",
    "preprocessing_num_workers=1",
    "bf16=false",
    "report_to=none",
)
"""Changes to the LoRA recipe, for a few steps of a small model on a CPU."""


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    peer: str
    version: str
    ran: str
    equal: int
    asked: int
    note: str = ""

    def __str__(self) -> str:
        result = f"{self.equal} of {self.asked} answers equal{self.note}"
        return f"| {self.peer} | {self.version} | {self.ran} | {result} |"


@dataclass(frozen=True)
class Work:
    """The folder of a run."""

    folder: Path

    def path(self, name: str) -> Path:
        """Return a path in the folder, whose parent exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def run(self, *command: object, **environment: str) -> None:
        """Run a command; what it prints goes to ``log.txt``."""
        with self.path("log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {' '.join(map(str, command))}\n")
            log.flush()
            names = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
            subprocess.run(
                list(map(str, command)), cwd=self.folder, env=names, stdout=log, stderr=subprocess.STDOUT, check=True
            )

    def environment(self, name: str) -> Path:
        """Return the folder of the programs of an environment, made at first use."""
        folder = self.path(f"environments/{name}")
        installed, wanted = folder / "installed.txt", " ".join(PACKAGES[name])
        if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
            self.run(sys.executable, "-m", "venv", folder)
            self.run(folder / "bin/python", "-m", "pip", "install", *PACKAGES[name], PYTHONPATH="")
            installed.write_text(wanted, encoding="utf-8")
        return folder / "bin"

    def ask(self, python: str | Path, program: str, *arguments: object) -> tuple[str, list[str]]:
        """Return version and answers of a program, whose last argument is the file it writes."""
        result = self.path("result.json")
        result.unlink(missing_ok=True)
        # The environment of the tool; only code that imports this package gets it.
        own = {} if python == sys.executable else {"PYTHONPATH": ""}
        self.run(python, PROGRAMS / program, *arguments, result, **own)
        written = json.loads(result.read_text(encoding="utf-8"))
        return written["version"], written["answers"]

    def cases(self) -> Path:
        """Write the images, padded to a square, and three questions about each; return the file of the questions."""
        from PIL import Image

        from yivl.mm_utils import expand2square

        path, cases = self.path("cases.json"), []
        for index, source in enumerate(sorted((ROOT / "images").glob("*.jpg"))):
            image = self.path(f"images/{source.stem}.png")
            expand2square(Image.open(source).convert("RGB"), (122, 116, 104)).save(image)
            asked = QUESTIONS[index % 3 :: 3]
            cases += [{"image": str(image), "question": question, "follow_up": FOLLOW_UP} for question in asked]
        path.write_text(json.dumps(cases, ensure_ascii=False), encoding="utf-8")
        return path

    def export(self) -> Path:
        """Return a float32 copy of the small model in the -hf format: in bfloat16 near ties differ between versions."""
        from yivl.checkpoint.loading import load_model
        from yivl.checkpoint.saving import save_checkpoint

        loaded, source = load_model(CHECKPOINT, device="cpu", dtype="float32"), self.path("float32")
        processor = loaded.image_processor.clip_processor
        save_checkpoint(loaded.model, source, tokenizer=loaded.tokenizer, image_processor=processor)
        self.run(sys.executable, ROOT / "scripts/convert.py", "to-hf", source, self.path("hf"))
        return self.path("hf")


def answers_of_chat(
    cases: Path, model: Path = CHECKPOINT, dtype: str = "float32", *, follow: bool = False
) -> list[str]:
    """Return the answers of this package; with ``follow`` each twice, then that to the next turn."""
    from yivl import Chat

    chat, answers = Chat.from_pretrained(model, "cpu", dtype), []
    for case in json.loads(cases.read_text(encoding="utf-8")):
        chat.reset()
        answers.append(chat.ask(case["question"], case["image"], temperature=0, max_new_tokens=64))
        if follow:
            answers += [answers[-1], chat.ask(case["follow_up"], temperature=0, max_new_tokens=64)]
    return answers


def line(peer: str, version: str, ran: str, found: Sequence[str], wanted: Sequence[str], note: str = "") -> Line:
    """Return the line of one comparison; the first differences go to stderr."""
    different = [(theirs, ours) for theirs, ours in zip(found, wanted, strict=True) if theirs != ours]
    for theirs, ours in different[:3]:
        print(f"{peer}: {theirs!r}; Chat: {ours!r}", file=sys.stderr)
    return Line(peer, version, ran, len(wanted) - len(different), len(wanted), note)


def transformers_main(work: Work) -> Iterator[Line]:
    """Ask the -hf folder with transformers as installed for this package."""
    yield ask_transformers(work, sys.executable)


def transformers_457(work: Work) -> Iterator[Line]:
    """Ask the -hf folder with an older transformers."""
    yield ask_transformers(work, work.environment("transformers-4.57") / "python")


def ask_transformers(work: Work, python: str | Path) -> Line:
    """Ask the -hf folder with the transformers of an environment."""
    cases = work.cases()
    version, answers = work.ask(python, "ask_transformers.py", work.export(), cases)
    return line("transformers", version, "`to-hf`, projector replaced", answers, answers_of_chat(cases))


def llamafactory(work: Work) -> Iterator[Line]:
    """Chat with the -hf folder; train, merge and convert back."""
    programs, cases, model = work.environment("llamafactory"), work.cases(), work.export()
    version, answers = work.ask(programs / "python", "ask_llamafactory.py", model, cases)
    yield line("LLaMA-Factory", version, "`to-hf`, chat", answers, answers_of_chat(cases))

    world, data, adapter, exported = map(work.path, ("world", "data", "lora", "llamafactory-export"))
    for folder in (data, adapter, exported):
        shutil.rmtree(folder, ignore_errors=True)
    numbers = ("--first", 5_000_000, "--number", 64)
    work.run(sys.executable, "-m", "yivl.tiny.world", "dialogues", "--json", "--output_dir", world, *numbers)
    convert, cli = (sys.executable, ROOT / "scripts/convert.py"), programs / "llamafactory-cli"
    recipe = ("--model-path", model, "--image-folder", world)
    work.run(*convert, "to-llamafactory", world / "rows.json", data, *recipe)
    work.run(cli, "train", data / "rows_lora.yaml", f"output_dir={adapter}", *SHORTER, PYTHONPATH="")
    merge = ("--model_name_or_path", model, "--adapter_name_or_path", adapter, "--export_dir", exported)
    work.run(cli, "export", *merge, "--template", "yi_vl", PYTHONPATH="")
    history = json.loads((adapter / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    back = work.path("back")
    work.run(*convert, "from-hf", exported, back, "--like", CHECKPOINT)
    _, answers = work.ask(programs / "python", "ask_llamafactory.py", exported, cases)
    note = f"; loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps"
    ran = "`to-llamafactory`, its LoRA recipe, merged, `from-hf`"
    yield line("LLaMA-Factory", version, ran, answers, answers_of_chat(cases, back), note)


def vlmevalkit(work: Work) -> Iterator[Line]:
    """Ask a copy of the checkpoint, since the wrapper edits its config.json."""
    package, model, cases = work.path("environments/vlmevalkit"), work.path("vlmevalkit-model"), work.cases()
    if not (package / "vlmeval/vlm/yi_vl.py").is_file():
        install = ("-m", "pip", "install", "--no-deps", "--target", package, VLMEVALKIT)
        work.run(sys.executable, *install, PYTHONPATH="")
    shutil.rmtree(model, ignore_errors=True)
    shutil.copytree(CHECKPOINT, model)
    version, answers = work.ask(sys.executable, "ask_vlmevalkit.py", package, ROOT / "compat", model, cases)
    wanted = answers_of_chat(cases, dtype="bfloat16")
    yield line("VLMEvalKit", f"ms-vlmeval {version}", "`compat/`, its `vlm/yi_vl.py` unmodified", answers, wanted)


@contextmanager
def api(work: Work) -> Iterator[str]:
    """Serve the small model; gives the address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "yivl.serve.api", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    names = os.environ | {"YIVL_API_KEY": "secret", "OMP_NUM_THREADS": "1"}
    with work.path("server.txt").open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=names, stdout=log, stderr=log)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except urllib.error.URLError:
                if server.poll() is not None:
                    raise
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait()


def clients(work: Work) -> Iterator[Line]:
    """Ask the API whole, streamed, and in a second turn."""
    python, cases = work.environment("clients") / "python", work.cases()
    wanted = answers_of_chat(cases, follow=True)
    with api(work) as url:
        for peer, name in (("openai", "openai"), ("litellm", "litellm"), ("LangChain", "langchain")):
            version, answers = work.ask(python, "ask_api.py", name, url, cases)
            yield line(peer, version, "API: whole, streamed, second turn", answers, wanted)


def lmms_eval(work: Work) -> Iterator[Line]:
    """Ask the API with lmms-eval, with a task on local data: the hub is not needed."""
    yield ask_kit(work, "lmms-eval", "lmms-eval", "ask_lmms_eval.py", "lmms_eval")


def vlmevalkit_api(work: Work) -> Iterator[Line]:
    """Ask the API with VLMEvalKit, with a data set of our own."""
    yield ask_kit(work, "vlmevalkit-api", "VLMEvalKit", "ask_vlmevalkit_api.py", "ms-vlmeval")


def ask_kit(work: Work, environment: str, peer: str, program: str, package: str) -> Line:
    """Ask the API with an evaluation kit."""
    python, cases = work.environment(environment) / "python", work.cases()
    with api(work) as url:
        version, answers = work.ask(python, program, url, cases)
    return line(peer, f"{package} {version}", "API: a data set of our own", answers, answers_of_chat(cases))


PEERS: Final[dict[str, Callable[[Work], Iterator[Line]]]] = {
    "transformers": transformers_main,
    "transformers-4.57": transformers_457,
    "llamafactory": llamafactory,
    "vlmevalkit": vlmevalkit,
    "clients": clients,
    "lmms-eval": lmms_eval,
    "vlmevalkit-api": vlmevalkit_api,
}


def main(arguments: Sequence[str]) -> int:
    """Print the table; return 1 if an answer differs or a command fails."""
    if not arguments or (unknown := set(arguments[1:]) - PEERS.keys()):
        wrong = f"unknown peer {', '.join(sorted(unknown))}; " if arguments else ""
        print(f"{wrong}usage: run.py WORK [{'|'.join(PEERS)}...]", file=sys.stderr)
        return 2
    work = Work(Path(arguments[0]).resolve())
    print("| peer | version | what ran | result |\n|---|---|---|---|")
    good = True
    for name in arguments[1:] or PEERS:
        try:
            for result in PEERS[name](work):
                print(result, flush=True)
                good &= result.equal == result.asked
        except subprocess.CalledProcessError as error:
            print(f"{name}: {error.cmd[0]} failed; see the end of {work.path('log.txt')}", file=sys.stderr)
            return 1
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
