"""Checks of the fields of JSON files by annotations: types, and validators of values; messages of one line.

``yivl.files.schema`` has the annotations.
"""

import os
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError

from yivl.errors import CheckpointError, YiVLError

Number = int | float
Validator = Callable[[Any], None]

_LONGEST_REASON: Final = 500  # characters of a message of a library
_NAMES: Final = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    NoneType: "null",
    dict: "an object",
    list: "a list",
    Any: "anything",
}


def within(low: float, high: float, length: int | None = None) -> Validator:
    """Return a validator of a number, or of each number of a list or an object; a list has ``length`` of them."""

    def check(value: Any) -> None:
        numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if length is not None and isinstance(value, list) and len(value) != length:
            raise ValueError(f"{length} of them")
        # Also NaN is not within limits. Values of other types are the other types of a union.
        if not all(low <= number <= high for number in numbers if isinstance(number, int | float)):
            raise ValueError(f"{low:,} to {high:,}")

    return check


def one_of(*names: str) -> Validator:
    """Return a validator of a text."""

    def check(value: Any) -> None:
        if isinstance(value, str) and value not in names:
            raise ValueError(f"one of {', '.join(names)}")

    return check


def file_names(value: Any) -> None:
    """Check that all values of an object are names of files in the folder of the file, and none a path."""
    for name in value.values() if isinstance(value, dict) else ():
        is_name = name and PurePosixPath(name).name == name and not {"\\", "\0"} & set(name) and name != ".."
        if not is_name or len(name) > 255:
            raise ValueError(f"names of files in the same folder, not {reprlib.repr(name)}")


def known_activation(value: Any) -> None:
    """Check that transformers has an activation function of the name."""
    from transformers.activations import ACT2FN

    if isinstance(value, str) and value not in ACT2FN:
        raise ValueError("an activation function of transformers, such as silu or gelu")


def known_rope(value: Any) -> None:
    """Check that transformers computes rotary position embeddings of the type."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if isinstance(value, str) and value not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ValueError(f"one of default, {', '.join(ROPE_INIT_FUNCTIONS)}")


def empty(value: Any) -> None:
    """Check that an object has no fields."""
    if value:
        raise ValueError("without fields")


def short(value: Any) -> None:
    """Check that a text may be a path or a name."""
    if isinstance(value, str) and (len(value) > 1_024 or "\0" in value):
        raise ValueError("at most 1,024 characters")


def check_fields(source: str | os.PathLike[str], fields: Mapping[str, Any], schema: Any) -> None:
    """Check the known fields of an object.

    Args:
        source: File of the object, for the error.
        fields: The object.
        schema: A ``TypedDict``; validators are the metadata of its annotations.

    Raises:
        CheckpointError: If a required field is missing, or a field has a wrong type or value.
    """
    for name, annotation in get_type_hints(schema, include_extras=True).items():
        annotation = get_args(annotation)[0] if get_origin(annotation) is NotRequired else annotation
        if name in fields:
            check_value(source, name, fields[name], annotation)
        elif name in schema.__required_keys__:
            raise CheckpointError(f"{source}: no {name}; expected {_describe(annotation)}")


@contextmanager
def library_errors(source: str | os.PathLike[str]) -> Iterator[None]:
    """Raise what a library says about the content of a file as a ``CheckpointError`` in one line.

    Libraries raise errors of any type for values they do not expect. Errors of the system and lack of memory are left.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        # A check of all fields together names them itself; the library puts the name of the check in front.
        told = error.__cause__ if isinstance(error, StrictDataclassClassValidationError) else error
        reason = " ".join(str(told or error).split()) or type(error).__name__
        kind = "" if isinstance(error, YiVLError | StrictDataclassError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{source}: {kind}{reason[:_LONGEST_REASON]}") from error


def check_value(source: str | os.PathLike[str], name: str, value: Any, annotation: Any) -> None:
    """Check the type and the value of one field; the arguments are those of ``check_fields``.

    Raises:
        CheckpointError: If the field has a wrong type or value.
    """
    base, *validators = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
    try:
        type_validator(name, value, base)
        for validator in validators:
            validator(value)
    except TypeError as error:
        raise CheckpointError(f"{source}: {name} is {reprlib.repr(value)}; expected {_describe(annotation)}") from error
    except ValueError as error:
        expected = f"{_describe(annotation)}, {error}"
        raise CheckpointError(f"{source}: {name} is {reprlib.repr(value)}; expected {expected}") from error


def _describe(annotation: Any) -> str:
    """Return the name of a type in the words of JSON."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case None:
            return _NAMES[annotation]
        case kind if kind is Annotated:
            return _describe(arguments[0])
        case kind if kind is Literal:
            return "one of " + ", ".join(map(str, arguments))
        case kind if kind in (Union, UnionType):
            names = dict.fromkeys(map(_describe, arguments))
            return " or ".join(name for name in names if name != "an integer" or "a number" not in names)
        case kind if kind is list and arguments != (Any,):
            return f"a list, each item {_describe(arguments[0])}"
        case kind if kind is dict and arguments[1] is not Any:
            return f"an object, each value {_describe(arguments[1])}"
        case kind:
            return _NAMES[kind]
