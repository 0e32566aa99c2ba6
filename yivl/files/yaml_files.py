"""YAML files that users write, read within limits of size and nesting; nothing in them runs."""

from pathlib import Path
from typing import Any, Final

from yivl import command_line
from yivl.errors import YiVLError

MAX_CHARACTERS: Final = 2**20
"""Longest file, in characters. Source: ours."""
MAX_DEPTH: Final = 30
"""Deepest nesting. Source: ours; a mixture has 3 levels, JSON in a run configuration few more."""
MAX_VALUES: Final = 100_000
"""Most values, those of an alias counted wherever it stands: ten aliases of aliases can stand for billions."""


def read_yaml(path: Path) -> Any:
    """Return the values in a YAML file.

    Raises:
        YiVLError: If the file cannot be read, or exceeds the limits.
    """
    root = read_nodes(path)
    return None if root is None else value_of(root, path)


def read_nodes(path: Path) -> Any:
    """Return the root node of the document in a YAML file, or ``None`` if it is empty.

    Raises:
        YiVLError: If the file cannot be read, or exceeds the limits.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
    except (OSError, ValueError) as error:  # not UTF-8, or no name of a file
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise YiVLError(f"{path}: {reason}; give a YAML file") from error
    if len(text) > MAX_CHARACTERS:
        raise YiVLError(f"{path}: more than {MAX_CHARACTERS:,} characters; give a YAML file")
    return parse_nodes(text, path)


def parse_nodes(text: str, source: str | Path) -> Any:
    """Return the root node of the document in a text, or ``None`` if it is empty.

    Args:
        text: YAML.
        source: Of the text, for the error.

    Raises:
        YiVLError: If the text is no YAML, or exceeds the limits.
    """
    command_line.require("yaml")
    import yaml

    too_deep = YiVLError(f"{source}: nested more than {MAX_DEPTH} levels deep")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):  # composing takes the square of the depth
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise too_deep
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise YiVLError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from error
    num_values, nodes = 0, [] if root is None else [(root, 1)]
    while nodes:
        node, depth = nodes.pop()
        num_values += 1
        if depth > MAX_DEPTH:  # an alias in the value it stands for
            raise too_deep
        if num_values > MAX_VALUES:
            raise YiVLError(f"{source}: more than {MAX_VALUES:,} values")
        if not isinstance(node, yaml.ScalarNode):
            parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
            nodes += [(part, depth + 1) for part in parts]
    return root


def value_of(node: Any, source: str | Path) -> Any:
    """Return the values of a node.

    Raises:
        YiVLError: If a value does not fit its tag, or a key is no plain value.
    """
    import yaml

    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise YiVLError(f"{source}: not valid YAML ({' '.join(str(error).split())})") from error
    except Exception as error:  # PyYAML checks no text of an explicit tag: !!int x, !!bool x, !!timestamp x
        line = node.start_mark.line + 1
        raise YiVLError(f"{source}: not valid YAML (a value from line {line} on does not fit its tag)") from error
