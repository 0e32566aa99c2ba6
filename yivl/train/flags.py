"""Command-line parsers built from dataclasses and from the source of transformers and torchrun.

Importing those libraries takes seconds, which ``--help`` and a misspelled flag need not wait for.
"""

import argparse
import ast
import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

from yivl.command_line import Parser
from yivl.train.refused import Check

JSON: Final = "JSON"
"""Metavariable of flags whose value is a JSON object."""


class Flag(NamedTuple):
    """A field of a dataclass: the names of its types, its default, and options of ``add_argument``."""

    types: set[str]
    default: Any
    options: dict[str, Any]


def dataclass_flags(dataclass: type) -> dict[str, Flag]:
    """Return the fields of a dataclass that have a help text."""
    return {
        field.name: Flag({kind.__name__ for kind in get_args(field.type) or (field.type,)}, field.default, metadata)
        for field in dataclasses.fields(dataclass)
        if "help" in (metadata := dict(field.metadata))
    }


def transformers_flags() -> dict[str, Flag]:
    """Return the fields of ``transformers.TrainingArguments``, with the choices of enumerations."""
    modules = [_read_source("transformers", file) for file in ("training_args.py", "trainer_utils.py")]
    classes = {node.name: node for module in modules for node in module.body if isinstance(node, ast.ClassDef)}
    flags = {}
    for node in classes["TrainingArguments"].body:
        match node:
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call(keywords=keywords)):
                field = _literals(keywords)
                types = {part.id for part in ast.walk(node.annotation) if isinstance(part, ast.Name)}
                choices = [
                    ast.literal_eval(member.value)
                    for kind in types & classes.keys()
                    for member in classes[kind].body
                    if isinstance(member, ast.Assign)
                ]
                options = ({"choices": choices} if choices else {}) | field.get("metadata", {})
                if types & {"bool", "int", "float", "str"}:  # others cannot be written on a command line
                    flags[name] = Flag(types, field.get("default"), options)
    return flags


def add_flag(group: argparse._ArgumentGroup, name: str, flag: Flag, check: Check | None = None) -> None:
    """Add a flag to a parser; one that is not given is left out of the namespace.

    Besides those of ``add_argument``, ``flag`` may have the option ``aliases``, other names of the flag. ``check`` is
    applied to its value.
    """
    options: dict[str, Any] = {"metavar": "BOOL" if "bool" in flag.types else None} | flag.options
    aliases = options.pop("aliases", ())
    if "dict" in flag.types:  # transformers reads those that may name a file
        options |= {"type": json.loads if "bool" in flag.types else str, "metavar": JSON}
    elif "bool" in flag.types:
        options |= {"type": _to_bool, "nargs": "?", "const": "True"}
    else:
        options["type"] = next((kind for kind in (int, float) if kind.__name__ in flag.types), str)
    if "choices" not in options:
        options["metavar"] = options["metavar"] or options["type"].__name__.upper()
    if check is not None:
        options["type"] = partial(checked, options["type"], check)
    if flag.default not in (None, "") and options.get("help") != argparse.SUPPRESS:
        options["help"] = f"{options.get('help', '')} (default: {flag.default})"
    group.add_argument(f"--{name}", *aliases, dest=name, default=argparse.SUPPRESS, **options)
    if flag.default is True:
        group.add_argument(
            f"--no_{name}", dest=name, action="store_false", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def checked(convert: Callable[[str], Any], check: Check, text: str) -> Any:
    """Return the value of a flag.

    Raises:
        argparse.ArgumentTypeError: If ``text`` is no such value, or ``check`` refuses it.
    """
    try:
        value = convert(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid value: {text!r}") from error
    if reason := check(value):
        raise argparse.ArgumentTypeError(f"{text} is not supported: {reason}")
    return value


def torchrun_parser(prog: str) -> Parser:
    """Return a parser of torchrun's flags, to check them; their values are torchrun's to read."""
    usage = f"{prog} [flags] (-m MODULE | SCRIPT) [flags of the program]"
    parser = Parser(prog=prog, usage=usage, description="Start one process per GPU, as torchrun does.")
    for node in ast.walk(_read_source("torch", "distributed/run.py")):
        match node:
            case ast.Call(func=ast.Attribute(attr="add_argument"), args=names, keywords=keywords):
                symbols = {word.arg: word.value.id for word in keywords if isinstance(word.value, ast.Name)}
                options = {key: value for key, value in _literals(keywords).items() if key in ("help", "choices")}
                if symbols.get("action") == "check_env":  # a switch that an environment variable sets too
                    options["action"] = "store_true"
                if symbols.get("nargs") == "REMAINDER":
                    options["nargs"] = argparse.REMAINDER
                if kind := {"int": int, "float": float}.get(symbols.get("type", "")):
                    options["type"] = kind
                parser.add_argument(*(ast.literal_eval(name) for name in names), **options)
    return parser


def _to_bool(text: str) -> bool:
    is_true = text.lower() in ("yes", "true", "t", "y", "1")
    if not is_true and text.lower() not in ("no", "false", "f", "n", "0"):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: expected True or False")
    return is_true


def _literals(keywords: Sequence[ast.keyword]) -> dict[str, Any]:
    """Return the keyword arguments of a call that are literals; others only the library can evaluate."""
    values = {}
    for keyword in keywords:
        with suppress(ValueError):
            values[str(keyword.arg)] = ast.literal_eval(keyword.value)
    return values


def _read_source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)
    return ast.parse((Path(spec.origin).parent / file).read_text(encoding="utf-8"))
