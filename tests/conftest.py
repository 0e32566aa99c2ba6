"""Fixtures shared by all tests."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: tests do not use the network

import pytest
import torch
from support.golden import CHECKPOINT

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.image_processing import ImageProcessor
from yivl.inference.chat import Chat


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are small: more threads only add synchronization


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    """The golden checkpoint in float32. Tests must not modify it."""
    return load_model(CHECKPOINT, device="cpu")


@pytest.fixture
def chat(loaded: LoadedModel) -> Chat:
    return Chat(loaded)


@pytest.fixture
def square_loaded(loaded: LoadedModel) -> LoadedModel:
    """The golden model with the preprocessing of the reference ``cli.py``: no padding."""
    processor = ImageProcessor(loaded.image_processor.clip_processor, "square")
    return LoadedModel(loaded.model, loaded.tokenizer, processor, loaded.name)
