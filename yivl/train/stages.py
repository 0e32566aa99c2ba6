"""The three published training stages: the defaults of ``--stage``."""

from collections.abc import Mapping
from typing import Any, Final

# Source: Yi-VL model card, "Training", and Yi technical report (arXiv 2403.04652), section 7.2. They do not state the
# optimizer, warmup, schedule, weight decay and sequence length: those are the defaults of ``arguments``, and ours.
_STAGE_1: Final[Mapping[str, Any]] = {
    "image_size": 224,
    "unfreeze_mm_vision_tower": True,
    "freeze_backbone": True,
    "global_batch_size": 4096,
    "learning_rate": 1e-4,
    "max_grad_norm": 0.5,
    "num_train_epochs": 1,
}
STAGES: Final[Mapping[int, Mapping[str, Any]]] = {
    1: _STAGE_1,
    2: {**_STAGE_1, "image_size": 448},
    3: {
        "image_size": 448,
        "unfreeze_mm_vision_tower": True,
        "global_batch_size": 256,
        "learning_rate": 2e-5,
        "max_grad_norm": 1.0,
        "num_train_epochs": 2,
        "max_rows_per_source": 50_000,
    },
}
