"""The limits of the page and the API, each with its flag."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from yivl.errors import YiVLError


def _limit(default: float, about: str, *programs: str, may_be_zero: bool = False) -> Any:
    return field(default=default, metadata={"about": about, "programs": programs, "may_be_zero": may_be_zero})


@dataclass(frozen=True)
class Limits:
    """Limits and their defaults. Source: ours.

    Raises:
        YiVLError: If a limit is not above 0, or below 0 where 0 turns something off.
    """

    max_tokens: int = _limit(2048, "tokens of an answer", "api", "web")
    max_image_bytes: int = _limit(20 * 2**20, "bytes of an image", "api", "web")
    max_image_pixels: int = _limit(50_000_000, "pixels of an image", "api", "web")
    max_decoding: int = _limit(2, "image files decoded at a time", "api", "web")
    max_queue: int = _limit(64, "requests in the queue", "api", "web")
    max_images: int = _limit(8, "images of a request", "api")
    max_body_bytes: int = _limit(64 * 2**20, "bytes of a request", "api")
    max_total_bytes: int = _limit(
        512 * 2**20,
        "bytes of all requests that are received or answered at a time; in memory, about twice that",
        "api",
    )
    max_choices: int = _limit(4, "answers to a request (n)", "api")
    max_batch: int = _limit(8, "answers generated in one batch", "api", "web")
    prefill_chunk: int = _limit(
        256,
        "prompt positions, image patches included, that are computed between two tokens of running answers",
        "api",
        "web",
    )
    max_cache_bytes: int = _limit(
        4 * 2**30,
        "bytes of keys and values kept for later requests with the same prefix; 0 keeps none",
        "api",
        "web",
        may_be_zero=True,
    )
    max_seconds: float = _limit(600.0, "seconds of a request, the time in the queue included", "api")
    max_receive_seconds: float = _limit(120.0, "seconds that a client has to send a request", "api")
    max_encoded_images: int = _limit(16, "images whose vision features are kept for later requests", "api", "web")
    shutdown_seconds: int = _limit(20, "seconds that answers have to finish when the server is stopped", "api")
    max_sessions: int = _limit(64, "conversations kept", "web")

    def __post_init__(self) -> None:
        for one in fields(self):
            value, may_be_zero = getattr(self, one.name), one.metadata["may_be_zero"]
            if value < 0 or (value == 0 and not may_be_zero):
                expected = "at least 0" if may_be_zero else "more than 0"
                raise YiVLError(f"{one.name}={value}; expected {expected}")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser, program: str) -> None:
        """Add the flags of ``program``: ``api`` or ``web``."""
        group = parser.add_argument_group("limits")
        for one in fields(Limits):
            if program in one.metadata["programs"]:
                group.add_argument(
                    f"--{one.name.replace('_', '-')}",
                    type=type(one.default),
                    default=one.default,
                    help=f"{one.metadata['about']} (default: %(default)s)",
                )

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace) -> "Limits":
        """Return the limits of the parsed flags."""
        given = vars(arguments)
        return cls(**{one.name: given[one.name] for one in fields(cls) if one.name in given})
