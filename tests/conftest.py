"""Fixtures shared by all tests: the golden vectors and the golden model."""

import json
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network

import numpy as np
import pytest
import torch

from yivl.generation import Chat
from yivl.image_processing import ImageProcessor
from yivl.model.loading import LoadedModel, load_model

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINT = GOLDEN / "checkpoint"


def golden_json(name: str) -> Any:
    return json.loads((GOLDEN / "expected" / f"{name}.json").read_text(encoding="utf-8"))


def golden_arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "expected" / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """The golden checkpoint in float32; tests leave it as they found it."""
    return load_model(CHECKPOINT, device="cpu")


@pytest.fixture
def chat(loaded: LoadedModel) -> Chat:
    return Chat(loaded)


@pytest.fixture
def square_loaded(loaded: LoadedModel) -> LoadedModel:
    """The golden model with the pixels of the release's ``cli.py``: no padding."""
    processor = ImageProcessor(loaded.image_processor.clip_processor, "square")
    return LoadedModel(loaded.model, loaded.tokenizer, processor, loaded.name)
