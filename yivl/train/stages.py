"""The three published training stages, as data."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Final


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Settings of one stage. Every stage trains the ViT and the projector."""

    image_size: int
    """Height and width of the ViT input, in pixels."""
    train_language_model: bool
    global_batch_size: int
    """Samples per optimizer step, over all ranks."""
    learning_rate: float
    max_grad_norm: float
    num_train_epochs: int
    max_rows_per_source: int | None

    def flag_defaults(self) -> dict[str, Any]:
        """Return the defaults of this stage for the flags of ``yivl.train``."""
        flags = asdict(self) | {"unfreeze_mm_vision_tower": True}
        return flags | {"freeze_backbone": not flags.pop("train_language_model")}


# Source: Yi-VL model card, "Training", and Yi technical report (arXiv 2403.04652), section 7.2. They do not state the
# optimizer, warmup, schedule, weight decay and sequence length: those are the defaults of ``arguments``, and ours.
_STAGE_1: Final = Stage(
    image_size=224,
    train_language_model=False,
    global_batch_size=4096,
    learning_rate=1e-4,
    max_grad_norm=0.5,
    num_train_epochs=1,
    max_rows_per_source=None,
)
STAGES: Final = {
    1: _STAGE_1,
    2: replace(_STAGE_1, image_size=448),
    3: Stage(
        image_size=448,
        train_language_model=True,
        global_batch_size=256,
        learning_rate=2e-5,
        max_grad_norm=1.0,
        num_train_epochs=2,
        max_rows_per_source=50_000,
    ),
}
