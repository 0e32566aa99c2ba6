"""Layers of flags, the published stage below the configuration files below the command line, and their merge."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

TYPED: Final = "the command line"

ADAPTER_FLAGS: Final = ("lora_r", "lora_alpha", "lora_dropout", "lora_vision_tower", "use_dora", "use_rslora")
"""Flags that need ``lora_enable``."""
# The second of a pair makes the first void, unless the first comes from a higher layer.
_EXCLUSIVE: Final = (("warmup_steps", "warmup_ratio"), ("num_train_epochs", "max_steps"))


class Origin(NamedTuple):
    """Where the value of a flag comes from; a higher rank wins."""

    rank: int
    name: str
    """``TYPED``, a configuration file, or ``--stage N``."""


class Layer(NamedTuple):
    """Flags of one origin."""

    name: str
    flags: Mapping[str, Any]


def merge_layers(layers: Sequence[Layer]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """Return the flags of all layers, of which later ones win, and the origin of each."""
    given: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for rank, layer in enumerate(layers):
        given |= layer.flags
        origins |= dict.fromkeys(layer.flags, Origin(rank, layer.name))
    ranks = {name: origin.rank for name, origin in origins.items()}
    void = [one for other, one in _EXCLUSIVE if other in given and one in given and ranks[other] > ranks[one]]
    if not given.get("lora_enable"):  # adapters that a configuration describes and a later flag disables
        void += [name for name in ADAPTER_FLAGS if name in given and ranks[name] < ranks.get("lora_enable", 0)]
    for name in void:
        del given[name], origins[name]
    return given, origins
