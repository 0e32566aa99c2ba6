"""The repository: import order, documentation that is true, scripts that are sound."""

import ast
import functools
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from support.documents import code_blocks
from support.golden import ROOT

import yivl

DOCUMENTS = [path for place in (".", "docs", "images", "compat") for path in ROOT.glob(f"{place}/*.md")]

# A package imports only from its left; packages of one layer do not import each other.
LAYERS = (
    ("constants", "errors"),
    ("parser",),
    ("command_line",),
    ("files",),
    ("conversation", "image_processing"),
    ("tokenization",),
    ("model",),
    ("checkpoint",),
    ("inference",),
    ("mm_utils",),
    ("data",),
    ("train",),
    ("eval", "serve"),
    ("export",),
    ("tiny",),
)
# Imports inside functions that point to the right, each with its reason.
DEFERRED = {
    ("command_line", "*"): "flags are parsed before anything heavy is imported",
    (
        "model.modeling",
        "checkpoint",
    ): "from_pretrained and save_pretrained keep the library's names",
}


def package_of(module: str) -> str:
    return module.split(".")[1]


def layer_of(module: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package_of(module) in layer)


def imports_of(path: Path, *, deferred: bool) -> set[str]:
    """Return the modules of yivl that a file imports at its top, or inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if node not in tree.body] if deferred else tree.body
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "yivl":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                is_module = (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()
                found.add(name if is_module else node.module)
    return {name for name in found if name != "yivl"}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "yivl").rglob("*.py")
        if path.name != "__init__.py"
    }


def test_packages_import_only_from_their_left() -> None:
    checked = 0
    for module, path in modules().items():
        for is_deferred in (False, True):
            for imported in imports_of(path, deferred=is_deferred):
                checked += 1
                if package_of(imported) == package_of(module) or layer_of(imported) < layer_of(module):
                    continue
                place = module.removeprefix("yivl.")
                allowed = {(place, package_of(imported)), (package_of(module), "*")} & DEFERRED.keys()
                assert is_deferred, f"{module} imports {imported}"
                assert allowed, f"{module} imports {imported} inside a function"
    assert checked > 100


def test_imports_have_no_cycles() -> None:
    graph = {module: imports_of(path, deferred=False) for module, path in modules().items()}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert len(order) > 80


def test_packages_without_names_of_their_own_import_nothing() -> None:
    for path in (ROOT / "yivl").rglob("__init__.py"):
        if path.parent.name != "yivl":
            assert not imports_of(path, deferred=False), path


def test_no_test_file_imports_another() -> None:
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            imported += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in imported:
                assert name.split(".")[-1] not in names | {"conftest"}, f"{path} imports {name}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, yivl, yivl.command_line; assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_package_has_its_public_names() -> None:
    assert yivl.Chat.__module__ == "yivl.inference.chat"
    assert {name for name in yivl.__all__ if getattr(yivl, name)} == set(yivl.__all__)
    with pytest.raises(AttributeError, match="module 'yivl' has no attribute 'Chatt'"):
        yivl.Chatt  # noqa: B018 (the attribute is the test)


# What answers a question needs none of these; a command that does names the extra that brings it.
EXTRAS = {
    "torchvision",
    "open_clip",
    "datasets",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "gradio",
    "fastapi",
    "gguf",
    "matplotlib",
}


def test_the_core_answers_a_question() -> None:
    """Run as in an installation without extras: imports of their packages fail."""
    script = f"""
import importlib.abc, importlib.util, runpy, sys
extras = {EXTRAS!r}
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in extras:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split('.')[0] in extras else find_spec(name, *rest)
sys.argv = 'single_inference.py --temperature 0 --image-file images/cats.jpg --question'.split() + ['Is there a dog?']
runpy.run_path('single_inference.py', run_name='__main__')
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "outputs: No.\n" in result.stdout


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_row_of_the_ledger_names_a_test_that_exists() -> None:
    rows = [
        line
        for line in (ROOT / "docs/fidelity.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| behavior")
    ]
    assert len(rows) > 40
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        file, test = cells[4].strip("`").split("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), cells[4]


def test_the_first_command_of_the_readme_prints_what_the_readme_shows() -> None:
    setup, command = code_blocks(ROOT / "README.md", "bash")[0].split(" && ")
    assert (ROOT / setup).is_file()
    program, *arguments = shlex.split(command)
    assert program == ".venv/bin/python"
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == code_blocks(ROOT / "README.md", "text")[0]


def test_the_conversations_of_the_readme_are_real() -> None:
    _, *conversations = code_blocks(ROOT / "README.md", "text")
    assert len(conversations) == 2
    for said in conversations:
        questions = re.findall(r"^Human: (.*)$", said, re.MULTILINE)
        assert len(questions) >= 3
        command = [sys.executable, "cli.py", "--image-file", "images/cats.jpg", "--temperature", "0"]
        lines = "".join(f"{question}\n" for question in questions)
        talked = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, check=True)
        assert talked.stdout == f"{said}exit...\n"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = next(block for block in code_blocks(ROOT / "README.md", "bash") if "pytest" in block).strip()
    setup, test = command.split(" && ")
    ci = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert setup in ci
    assert test in ci


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/inference.md"], ids=lambda path: path.name)
def test_python_in_the_documents_runs(path: Path) -> None:
    blocks = code_blocks(path, "python")
    assert blocks
    for block in blocks:
        result = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout


PROGRAMS = [
    ["single_inference.py"],
    ["cli.py"],
    ["web_demo.py"],
    ["-m", "yivl.serve.api"],
    ["-m", "yivl.train"],
    ["-m", "yivl.train.merge"],
    ["-m", "yivl.data.check"],
    ["-m", "yivl.data.prepare"],
    ["-m", "yivl.data.show"],
    *(["-m", "yivl.eval", benchmark] for benchmark in ("rows", "mmmu", "cmmmu")),
    ["-m", "yivl.tiny.world"],
    ["-m", "yivl.tiny.recipe"],
    ["-m", "yivl.tiny.recipe", "clip"],
    *([f"scripts/benchmark_{what}.py"] for what in ("inference", "peers", "quantization", "serving", "training")),
    *([f"scripts/gpu_report{part}.py"] for part in ("", "_checks", "_inference", "_programs", "_training")),
    ["scripts/endurance.py"],
    *(["scripts/convert.py", command] for command in ("from-hf", "to-gguf", "to-llamafactory")),
    *(["scripts/hub.py", command] for command in ("upload", "download", "card")),
]
HEAVY = ("torch", "transformers", "fastapi", "gradio", "datasets")


@functools.cache
def run_program(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a program; stderr lists what it imported."""
    command = [sys.executable, "-X", "importtime", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_help_and_wrong_flags_import_nothing_heavy(program: list[str]) -> None:
    for flag, code in (("--help", 0), ("--no-such-flag", 2)):
        result = run_program(*program, flag)
        assert result.returncode == code, result.stderr[-2000:]
        imported = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines() if "|" in line}
        assert "argparse" in imported
        assert not imported & set(HEAVY)


def test_every_flag_in_the_documentation_exists() -> None:
    helps = "".join(run_program(*program, "--help").stdout for program in PROGRAMS)
    flags = set(re.findall(r"--[a-z0-9][a-z0-9_-]*", helps))
    assert len(flags) > 100
    for path in DOCUMENTS:
        # Commands of img2dataset, SGLang, VLMEvalKit and lmms-eval have flags of their own.
        text = re.sub(
            r"^(?:img2dataset|python -m (?:sglang\w*\.\w+|vlmeval\.run|lmms_eval)) (.*\\\n)*.*$",
            "",
            path.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
        for flag in re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9_-]*", text):
            assert flag in flags, f"{flag} in {path.name}"


def test_the_console_command_is_installed() -> None:
    command = Path(sys.executable).with_name("yivl-api")
    printed = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--allow-remote-images" in printed


def test_the_hardware_tables_are_what_the_dry_run_estimates() -> None:
    command = [sys.executable, "scripts/hardware_table.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for table, page in zip(printed.split("\n\n"), ("training.md", "internvl.md"), strict=True):
        assert table.strip() in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_every_shell_script_parses_and_passes_shellcheck() -> None:
    scripts = [*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch"), ROOT / ".ci/run"]
    assert len(scripts) >= 12
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        text = script.read_text(encoding="utf-8")
        assert "set -euo pipefail" in text
    subprocess.run([Path(sys.executable).with_name("shellcheck"), "-x", *scripts], cwd=ROOT, check=True)


def test_setup_refuses_an_unknown_extra() -> None:
    result = subprocess.run(
        ["scripts/setup.sh", "train", "prod"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "error: unknown extra prod; expected train, quantization, serve, export, all or dev\n"


def test_extras_are_the_groups_of_the_requirements() -> None:
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base"]
    with TemporaryDirectory() as folder:
        subprocess.run([*command, folder], cwd=ROOT, check=True)
        written = Path(folder, "yivl.egg-info/requires.txt").read_text(encoding="utf-8")
    core, *groups = re.split(r"\n\[(.+)\]\n", f"\n{written}")
    extras = {name: set(text.split()) for name, text in zip(groups[::2], groups[1::2], strict=True)}
    assert {"train", "quantization", "serve", "export", "all", "dev"} <= extras.keys()
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(core.split()) | extras["all"]) == sum(bool(line) and not line.startswith("#") for line in lines)
    assert "deepspeed" not in core
    assert extras["all"] < extras["dev"]
