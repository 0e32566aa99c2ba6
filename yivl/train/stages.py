"""The three published training stages, as data."""

from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage trains, and how. Every stage trains the ViT and the projector."""

    image_size: int
    """Side of the square ViT input, in pixels."""
    train_language_model: bool
    global_batch_size: int
    """Rows of one optimizer step, over all processes."""
    learning_rate: float
    max_grad_norm: float
    num_train_epochs: int
    max_rows_per_source: int | None

    def flag_defaults(self) -> dict[str, Any]:
        """Return the defaults this stage gives to the flags of ``yivl.train``; a flag that is typed wins."""
        return {
            "image_size": self.image_size,
            "freeze_backbone": not self.train_language_model,
            "unfreeze_mm_vision_tower": True,
            "global_batch_size": self.global_batch_size,
            "learning_rate": self.learning_rate,
            "max_grad_norm": self.max_grad_norm,
            "num_train_epochs": self.num_train_epochs,
            "max_rows_per_source": self.max_rows_per_source,
        }


# Source: Yi-VL model card, "Training", and Yi technical report (arXiv 2403.04652), section 7.2. They state nothing
# about optimizer, warmup, schedule, weight decay and length: those are the defaults of ``arguments``, and ours.
STAGES: Final = {
    1: Stage(
        image_size=224,
        train_language_model=False,
        global_batch_size=4096,
        learning_rate=1e-4,
        max_grad_norm=0.5,
        num_train_epochs=1,
        max_rows_per_source=None,
    ),
    2: Stage(
        image_size=448,
        train_language_model=False,
        global_batch_size=4096,
        learning_rate=1e-4,
        max_grad_norm=0.5,
        num_train_epochs=1,
        max_rows_per_source=None,
    ),
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
