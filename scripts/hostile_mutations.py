"""Seeded mutations of files: values of JSON and YAML fields by their place, and bytes of any file."""

import copy
import io
import json
import os
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch

DEEP: Final = 100_000
"""Nesting of a hostile document."""

VALUES: Final[tuple[Any, ...]] = (
    *(None, True, False, 0, -1, 1, 3, 7, 0.5, -0.5, 1e9, 10_000_000, 2**31, 2**63, 10**30, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "os", "NaN", "1", "../outside", "../outside/outside.safetensors", "/dev/zero"),
    *(
        "/etc/hostname",
        "\0",
        "\ud800",
        "x" * 5_000,
        "a/b",
        "__class__",
        [],
        [1],
        [[]],
        {},
        {"a": 1},
        [None],
        {"": None},
    ),
)
KEYS: Final = ("to_dict", "__class__", "_attn_implementation", "num_labels", "quantization_config", "auto_map", "dtype")
"""Names of fields that mean something to libraries."""


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Return a JSON document with another value, key or form at a random place."""
    kind = draw.random()
    if kind < 0.06:
        return draw.choice([b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP])
    if kind < 0.12:
        return draw.choice([b"[]", b"[1]", b"null", b"3", b'"text"', b"{}", b"", b"\xff\xfe", b"NaN"])
    value = copy.deepcopy(json.loads(data))
    holder, key = draw.choice(list(_places(value)))
    if kind < 0.16:
        text = json.dumps(value)
        return (text[:-1] + ", " + text[1:]).encode() if text.startswith("{") and len(text) > 2 else b"{"
    if kind < 0.24 and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = draw.choice(VALUES)
    elif kind < 0.34:
        del holder[key]
    elif kind < 0.38:
        holder[key] = _nested(draw.choice([50, 900]))
    elif kind < 0.5 and type(holder[key]) in (int, float):
        holder[key] = draw.choice([-holder[key], holder[key] * 10**6, holder[key] + 1, holder[key] + 0.5])
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(value).encode()


def mutate_lines(data: bytes, draw: random.Random) -> bytes:
    """Return JSON lines, one of them mutated."""
    lines = data.splitlines()
    place = draw.randrange(len(lines))
    lines[place] = mutate_json(lines[place], draw)
    return b"\n".join(lines) + b"\n"


def mutate_bytes(data: bytes, draw: random.Random) -> bytes:
    """Return a file that is cut, has other bits, or has more bytes; half of the places are at its beginning."""
    changed, end = bytearray(data), min(len(data), 600) if draw.random() < 0.5 else len(data)
    match draw.randrange(5):
        case 0:
            return bytes(changed[: draw.randrange(end)])
        case 1 | 2:
            for _ in range(draw.choice([1, 4, 32])):
                changed[draw.randrange(end)] ^= 1 << draw.randrange(8)
        case 3:
            place = draw.randrange(end)
            changed[place:place] = draw.randbytes(draw.choice([1, 8, 4096]))
        case _:
            place = draw.randrange(end)
            changed[place : place + 64] = bytes(len(changed[place : place + 64]))
    return bytes(changed)


def mutate_yaml(data: bytes, draw: random.Random) -> bytes:
    """Return a YAML document of a hostile form, or with another value."""
    bomb = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]\n" for i in range(9))
    forms = (
        *("[" * 3_000, "{a: " * 3_000, "- " * 3_000 + "x", bomb, "&a [*a]", "? [1, 2]\n: 3", "{1: a, b: 2, null: 3}"),
        *("!!python/object/apply:os.system [id]", "a: !!int x", "a: !!timestamp x", "- 1\n- 2", "a: 2020-01-01", "\0"),
        *("a: !!bool x", "a: [2020-01-01]", "<<: 3", "a: *unknown", "%YAML 9.9\n---\na: 1", "a: b: c", "\t- x"),
    )
    lines = data.decode().splitlines()
    place = draw.randrange(len(lines))
    match draw.randrange(4):
        case 0 | 1:
            return draw.choice(forms).encode()
        case 2:
            lines[place] = lines[place].partition(":")[0] + ": " + draw.choice(forms)
        case _:
            lines[place] = lines[place].partition(":")[0] + ": " + json.dumps(draw.choice(VALUES))
    return "\n".join(lines).encode()


def mutate_safetensors(data: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file with another header, other bytes, or values that are not finite."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8 : 8 + size], data[8 + size :]
    match draw.randrange(4):
        case 0:
            return mutate_bytes(data, draw)
        case 1:
            header = mutate_json(header, draw)
            return struct.pack("<Q", len(header)) + header + body
        case 2:
            return struct.pack("<Q", draw.choice([0, 1, 2**27, 2**62, 2**64 - 1])) + data[8:]
        case _:
            start = draw.randrange(0, len(body) - 64, 4)
            return data[: 8 + size] + body[:start] + struct.pack("<f", float("nan")) * 16 + body[start + 64 :]


class Payload:
    """An object whose unpickling would write a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the call that pickle would make."""
        return (os.system, ("touch executed",))


def mutate_pickle(data: bytes, draw: random.Random) -> bytes:
    """Return a ``.bin`` file with code, other objects than tensors, tensors of other kinds, or other bytes."""
    if draw.random() < 0.4 or not zipfile.is_zipfile(io.BytesIO(data)):
        return mutate_bytes(data, draw)
    weights = torch.load(io.BytesIO(data), weights_only=True)
    if not isinstance(weights, dict) or not weights:
        return mutate_bytes(data, draw)
    key = draw.choice(sorted(weights, key=str))
    value = weights[key]
    tensor = value if isinstance(value, torch.Tensor) else torch.zeros(2)
    changes: tuple[Callable[[], Any], ...] = (
        Payload,
        lambda: 3,
        lambda: [tensor],
        lambda: tensor.to(torch.int64),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.half(),
        lambda: torch.full_like(tensor.float(), float("nan")),
        lambda: tensor.to_sparse(),
        lambda: torch.zeros(1).expand(2**20, 2**16),
        lambda: torch.zeros(0),
    )
    changed = draw.choice([weights | {key: draw.choice(changes)()}, [1, 2], weights | {3: tensor}, {}, tensor])
    file = io.BytesIO()
    torch.save(changed, file)
    return file.getvalue()


def _nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the container and the key of every value in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(items):
        yield value, key
        yield from _places(child)
