"""The house itself: import order, documents that hold what they say, scripts that are sound."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.documents import code_blocks
from support.golden import ROOT

DOCUMENTS = [path for place in (".", "docs", "images", "compat") for path in ROOT.glob(f"{place}/*.md")]

# A module imports only from its left; parts of one layer may import each other.
LAYERS = (
    ("constants", "errors", "command_line"),  # command_line imports the rest only when a program runs
    ("conversation", "image_processing"),
    ("tokenization",),
    ("model", "checkpoint", "inference"),
    ("data",),
    ("mm_utils", "serve", "train", "eval"),
    ("export", "tiny"),
)


def layer_of(module: str) -> int:
    part = module.split(".")[1]
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imports_of(path: Path) -> set[str]:
    """Modules of yivl imported at the top of a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "yivl" else [node.module]
            found.update(name for name in names if name.startswith("yivl."))
    return found


def test_modules_import_only_from_their_left() -> None:
    checked = 0
    for path in (ROOT / "yivl").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module.endswith("__init__"):
            assert not imports_of(path), f"{module} imports something"
            continue
        for imported in imports_of(path):
            assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"
            checked += 1
    assert checked > 30


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, yivl, yivl.command_line; assert not {'torch', 'transformers', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_every_row_of_the_ledger_names_a_test_that_exists() -> None:
    rows = [
        line
        for line in (ROOT / "docs/fidelity.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and not line.startswith("| behaviour")
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


def test_every_flag_the_documents_name_exists() -> None:
    programs = ["single_inference.py", "cli.py", "web_demo.py"]
    programs += [f"scripts/benchmark_{what}.py" for what in ("inference", "serving", "training")]
    modules = ["yivl.train", "yivl.train.merge", "yivl.data.check", "yivl.data.show", "yivl.tiny.world"]
    modules += ["yivl.tiny.recipe", "yivl.serve.api"]
    commands = [["-m", "yivl.eval", benchmark] for benchmark in ("rows", "mmmu", "cmmmu")]
    commands += [["scripts/convert.py", "to-gguf"], ["scripts/convert.py", "to-llamafactory"]]
    commands += [["scripts/hub.py", command] for command in ("upload", "download", "card")]
    flags: set[str] = set()
    for program in [*([name] for name in programs), *(["-m", name] for name in modules), *commands]:
        command = [sys.executable, *program, "--help"]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        flags.update(re.findall(r"--[a-z0-9][a-z0-9_-]*", printed))
    assert len(flags) > 100
    for path in DOCUMENTS:
        for flag in re.findall(r"(?<![\w-])--[a-z0-9][a-z0-9_-]*", path.read_text(encoding="utf-8")):
            assert flag in flags, f"{flag} in {path.name}"


def test_the_console_command_is_installed() -> None:
    command = Path(sys.executable).with_name("yivl-api")
    printed = subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout
    assert "--allow-remote-images" in printed


def test_the_hardware_table_is_what_the_dry_run_estimates() -> None:
    command = [sys.executable, "scripts/hardware_table.py"]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert table in (ROOT / "docs/training.md").read_text(encoding="utf-8")


def test_every_shell_script_parses_and_passes_shellcheck() -> None:
    scripts = [*ROOT.glob("scripts/**/*.sh"), *ROOT.glob("scripts/**/*.sbatch"), ROOT / ".ci/run"]
    assert len(scripts) >= 12
    for script in scripts:
        subprocess.run(["bash", "-n", str(script)], check=True)
        text = script.read_text(encoding="utf-8")
        assert "set -euo pipefail" in text
    subprocess.run([Path(sys.executable).with_name("shellcheck"), "-x", *scripts], cwd=ROOT, check=True)


def test_set_up_refuses_an_unknown_argument() -> None:
    result = subprocess.run(["scripts/setup.sh", "prod"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "error: unknown argument prod; expected nothing or 'dev'\n"
