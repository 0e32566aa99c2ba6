"""What a visitor of the page or a client of the API may ask for: the one place for limits."""

import argparse
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from yivl.errors import YiVLError


def _limit(default: float, about: str, *programs: str) -> Any:
    return field(default=default, metadata={"about": about, "programs": programs})


@dataclass(frozen=True)
class Limits:
    """Every number is a flag of the programs it concerns. All defaults are ours.

    Raises:
        YiVLError: If one is not above 0.
    """

    max_tokens: int = _limit(2048, "tokens of an answer", "api", "web")
    max_image_bytes: int = _limit(20 * 2**20, "bytes of a picture", "api", "web")
    max_image_pixels: int = _limit(50_000_000, "pixels of a picture", "api", "web")
    max_queue: int = _limit(64, "requests that may wait", "api", "web")
    max_images: int = _limit(8, "pictures of a request", "api")
    max_body_bytes: int = _limit(64 * 2**20, "bytes of a request", "api")
    max_choices: int = _limit(4, "answers to a request (n)", "api")
    max_batch: int = _limit(8, "answers generated in one batch", "api", "web")
    max_seconds: float = _limit(600, "seconds a request may take, waiting included", "api")
    max_encoded_images: int = _limit(16, "encoded pictures that are kept for requests that show them again", "api")
    shutdown_seconds: int = _limit(20, "seconds that running answers have to finish when the server is stopped", "api")
    max_sessions: int = _limit(64, "conversations that are kept", "web")
    max_cache_bytes: int = _limit(4 * 2**30, "bytes of keys and values that are kept between turns, of all", "web")

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) <= 0:
                raise YiVLError(f"{one.name}={getattr(self, one.name)}; expected more than 0")

    @staticmethod
    def add_flags(parser: argparse.ArgumentParser, program: str) -> None:
        """Add a flag for each limit of ``program``: ``api`` or ``web``."""
        group = parser.add_argument_group("limits")
        for one in fields(Limits):
            assert one.default is not MISSING
            if program in one.metadata["programs"]:
                group.add_argument(
                    f"--{one.name.replace('_', '-')}",
                    type=type(one.default),
                    default=one.default,
                    help=f"{one.metadata['about']} (default: %(default)s)",
                )

    @classmethod
    def from_flags(cls, arguments: argparse.Namespace) -> "Limits":
        """Return the limits that the flags of a program set."""
        given = vars(arguments)
        return cls(**{one.name: given[one.name] for one in fields(cls) if one.name in given})
