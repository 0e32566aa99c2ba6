"""Configuration files of a run: a flat YAML mapping of flag names to values."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yivl import command_line
from yivl.errors import YiVLError
from yivl.files.yaml_files import parse_nodes, read_nodes, value_of
from yivl.train.flags import JSON
from yivl.train.layers import Layer


def read_run_config(source: str, parser: command_line.Parser) -> Layer:
    """Return the flags in a YAML file, or in the text of a mapping in braces.

    Keys are names of flags, with dashes or underscores. Values are read as on the command line, so that ``1e-5`` is a
    number and ``no`` a word; a key without a value is left out.

    Raises:
        YiVLError: If the file cannot be read, or a key or value is wrong; names the file, line and key of each.
    """
    command_line.require("yaml")
    import yaml

    name = "the script" if source.startswith("{") else source
    try:
        root = parse_nodes(source, name) if source.startswith("{") else read_nodes(Path(source).expanduser())
    except YiVLError as error:
        raise YiVLError(f"--config {error}") from error
    if root is not None and not isinstance(root, yaml.MappingNode):
        raise YiVLError(f"{name}: expected a mapping of flags to values, such as learning_rate: 1e-5")
    found: dict[str, Any] = {}
    wrong = []
    for key, node in root.value if root is not None else ():
        if node.tag.endswith(":null"):
            continue
        try:
            if not isinstance(key, yaml.ScalarNode):
                raise YiVLError("a key is no name of a flag")
            given = _read_flag(key.value, node, parser)
            if repeated := given.keys() & found.keys():
                raise YiVLError(f"{repeated.pop()} is given twice")
            found |= given
        except YiVLError as error:
            wrong.append(f"line {key.start_mark.line + 1}, {error}")
    if wrong:
        raise YiVLError(f"{name}: {'; '.join(wrong)}")
    return Layer(name, found)


def _read_flag(key: Any, node: Any, parser: command_line.Parser) -> dict[str, Any]:
    import json

    import yaml

    flags = {option: action for action in parser._actions for option in action.option_strings}
    action = flags.get(parser.as_declared(f"--{key}"))
    if action is not None and action.dest in ("help", "config"):
        raise YiVLError(f"{key}: not allowed in a configuration")
    value = node.value
    if not isinstance(node, yaml.ScalarNode):
        if action is not None and action.metavar != JSON:
            raise YiVLError(f"{key}: expected one value")
        try:
            value = json.dumps(value_of(node, key))
        except (TypeError, ValueError) as error:  # a date, for example; keys of several types
            raise YiVLError(str(error) if isinstance(error, YiVLError) else f"{key}: expected JSON values") from error
    try:
        return vars(parser.parse_args([f"--{key}={value}"]))
    except YiVLError as error:
        text = str(error).replace("; --help lists the flags", "").replace("unknown flag", "unknown key")
        raise YiVLError(re.sub(r"--(?=\w)", "", text)) from error


def run_config_text(flags: Mapping[str, Any]) -> str:
    """Return flags as the text of a configuration, without those that have no value."""
    import yaml

    given = {name: value for name, value in flags.items() if value is not None}
    text: str = yaml.safe_dump(given, sort_keys=False, allow_unicode=True, width=1_000)
    return f"# The flags of this run: python -m yivl.train --config FILE --output_dir OUT\n{text}"
