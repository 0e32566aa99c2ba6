"""The parser of all programs: spelling, suggestions, and one message for all wrong flags."""

import importlib
import re
import runpy
import sys
from typing import Any

import pytest
from support.golden import ROOT

from yivl.errors import YiVLError
from yivl.parser import Parser


def make_parser() -> Parser:
    parser = Parser(prog="program")
    parser.add_argument("--model-path", "--model_name_or_path")
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--freeze_backbone", action="store_true")
    parser.add_argument("--unfreeze_vision", action="store_true")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--load-4bit", action="store_true")
    parser.add_argument("--load-8bit", action="store_true")
    return parser


@pytest.mark.parametrize(
    "words",
    [
        ["--model-path", "m", "--top-p", "0.5"],
        ["--model_path=m", "--top_p=0.5"],
        ["--model-name-or-path", "m", "--top-p=0.5"],
        ["--model_name_or-path=m", "--top_p", "0.5"],
    ],
)
def test_dashes_and_underscores_are_the_same(words: list[str]) -> None:
    parsed = make_parser().parse_args(words)
    assert (parsed.model_path, parsed.top_p) == ("m", 0.5)


def test_values_keep_their_spelling() -> None:
    assert make_parser().parse_args(["--model-path=a_b-c=--top-p", "--top-p", "-1"]).model_path == "a_b-c=--top-p"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--modelpath", "--model-path"),
        ("--mdoel-path", "--model-path"),
        ("--max_tokens_new", "--max-new-tokens"),
        ("--freeze_bakcbone", "--freeze_backbone"),
        ("--dtyp", "--dtype"),
        ("--freeze_vision", None),  # the opposite of --unfreeze_vision
        ("--min_new_tokens", None),
        ("--top_k", None),
        ("--load-3bit", None),
        ("--load", None),
        ("--max_tokens", None),
    ],
)
def test_a_suggestion_has_the_meaning_of_what_was_typed(typed: str, meant: str | None) -> None:
    suggestion = f" (did you mean {meant}?)" if meant else ""
    with pytest.raises(YiVLError, match=re.escape(f"unknown flag {typed}{suggestion}; --help lists")):
        make_parser().parse_args([typed, "value"])


def test_all_wrong_flags_are_in_one_message() -> None:
    words = ["--nope", "1", "--top-p", "half", "--model-path", "m", "--dtype", "float8", "--topp=1"]
    with pytest.raises(YiVLError) as error:
        make_parser().parse_args(words)
    assert str(error.value) == (
        "unknown flag --nope; unknown flag --topp (did you mean --top_p?); --top_p: invalid float value: 'half'; "
        "--dtype: invalid choice: 'float8' (choose from 'float32', 'bfloat16'); --help lists the flags"
    )


def test_a_refused_flag_is_explained_and_not_shown() -> None:
    parser = make_parser()
    parser.refuse("--debug", "use /save")
    for words in (["--debug"], ["--debug", "True"], ["--debug=1", "--top_p", "x"]):
        with pytest.raises(YiVLError, match="--debug: not supported: use /save; --"):
            parser.parse_args(words)
    assert "debug" not in parser.format_help()


def test_flags_of_a_subcommand_are_checked_too() -> None:
    parser = Parser(prog="program")
    command = parser.add_subparsers(dest="command", required=True).add_parser("convert")
    command.add_argument("source")
    command.add_argument("--dry-run", action="store_true")
    parsed = parser.parse_args(["convert", "a", "--dry_run"])
    assert (parsed.command, parsed.source, parsed.dry_run) == ("convert", "a", True)
    for words, message in (
        (["convert", "a", "--dryrun"], r"unknown flag --dryrun \(did you mean --dry-run\?\); --help"),
        (["convert", "a", "b"], "b: no flag takes this value"),
        (["convert"], "the following arguments are required: source; --help"),
        (["convertt", "a"], "invalid choice: 'convertt'"),
        (["--bogus", "convert", "a"], "unknown flag --bogus"),
        ([], "the following arguments are required: command"),
    ):
        with pytest.raises(YiVLError, match=message):
            parser.parse_args(words)


# What is typed, and what the program reads.
SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "single_inference.py": (
        "--model_name_or_path m --image_file i --query q --conv_mode mm_default --max_new_tokens 3 --load_4bit",
        {"model_path": "m", "image_file": "i", "question": "q", "max_new_tokens": 3, "load_4bit": True},
    ),
    "cli.py": (
        "--model_path m --image-file i --conv-mode mm_default --load-4bit --top_p 0.5",
        {"model_path": "m", "image_file": "i", "load_4bit": True, "top_p": 0.5},
    ),
    "web_demo.py": ("--model_path m --server_port 1 --load_8bit", {"model_path": "m", "server_port": 1}),
    "scripts/convert.py": ("to-gguf m o --dtype float32", {"dtype": "float32"}),
    "scripts/hub.py": ("upload m o --base_model b", {"base_model": "b"}),
    "yivl.eval.__main__": (
        "mmmu --model_name_or_path m --data_path d --output_dir o --batch_size 2",
        {"model_path": "m", "data": "d", "output": "o", "batch_size": 2},
    ),
    "yivl.train.merge": (
        "--model_path a --model_base m --output_dir o",
        {"model_path": "m", "lora_path": "a", "save_model_path": "o"},
    ),
    "yivl.data.check": (
        "--data_path d --model_name_or_path m --image_folder i --model_max_length 9",
        {"data": "d", "model_path": "m", "image_folder": "i", "max_length": 9},
    ),
    "yivl.data.show": ("--data d 3 --model_path m", {"data": "d", "row": 3, "model_path": "m"}),
}


@pytest.mark.parametrize("program", SPELLINGS)
def test_programs_take_the_names_of_llava(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, expected = SPELLINGS[program]
    monkeypatch.setattr(sys, "argv", [program, *words.split()])
    is_script = program.endswith(".py")
    names = runpy.run_path(str(ROOT / program)) if is_script else vars(importlib.import_module(program))
    parsed = vars(names["parse_args"]())
    assert {name: parsed[name] for name in expected} == expected
