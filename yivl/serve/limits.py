"""The limits of the page and the API, each with its flag."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any

from yivl.errors import YiVLError


def _limit(default: float, about: str, *programs: str) -> Any:
    return field(default=default, metadata={"about": about, "programs": programs})


@dataclass(frozen=True)
class Limits:
    """Limits and their defaults. Source: ours.

    Raises:
        YiVLError: If a limit is not above 0.
    """

    max_tokens: int = _limit(2048, "tokens of an answer", "api", "web")
    max_image_bytes: int = _limit(20 * 2**20, "bytes of an image", "api", "web")
    max_image_pixels: int = _limit(50_000_000, "pixels of an image", "api", "web")
    max_queue: int = _limit(64, "requests in the queue", "api", "web")
    max_images: int = _limit(8, "images of a request", "api")
    max_body_bytes: int = _limit(64 * 2**20, "bytes of a request", "api")
    max_choices: int = _limit(4, "answers to a request (n)", "api")
    max_batch: int = _limit(8, "answers generated in one batch", "api", "web")
    max_seconds: float = _limit(600.0, "seconds of a request, the time in the queue included", "api")
    max_encoded_images: int = _limit(16, "images whose vision features are kept for later requests", "api")
    shutdown_seconds: int = _limit(20, "seconds that answers have to finish when the server is stopped", "api")
    max_sessions: int = _limit(64, "conversations kept", "web")
    max_cache_bytes: int = _limit(4 * 2**30, "bytes of all KV caches kept between turns", "web")

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) <= 0:
                raise YiVLError(f"{one.name}={getattr(self, one.name)}; expected more than 0")

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
