"""Fixtures shared by all tests: the golden vectors and the golden model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for the network

import pytest
import torch
from support.golden import CHECKPOINT

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.image_processing import ImageProcessor
from yivl.inference.chat import Chat


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
