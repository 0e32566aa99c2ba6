"""The golden vectors and the folders of the repository, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
CHECKPOINT = GOLDEN / "checkpoint"


def golden_json(name: str, golden: Path = GOLDEN) -> Any:
    return json.loads((golden / "expected" / f"{name}.json").read_text(encoding="utf-8"))


def golden_arrays(name: str, golden: Path = GOLDEN) -> dict[str, torch.Tensor]:
    with np.load(golden / "expected" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}
