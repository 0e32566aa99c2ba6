"""Fixtures shared by all tests."""

import os
import shutil
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: tests do not use the network
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="yivl-tests-")  # before datasets is imported

# Programs that tests start find the tools of this environment, such as ninja, as training does.
os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])

import pytest
import torch
from huggingface_hub import constants
from support.golden import CHECKPOINT
from support.hub import TOKEN, Hub

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.image_processing import ImageProcessor
from yivl.inference.chat import Chat


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # the tensors are small: more threads only add synchronization


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Iterator[None]:
    """Else programs that later tests start take themselves for ranks of a run in this process."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    assert not torch.distributed.is_initialized()
    assert {name: os.environ.get(name) for name in names} == before


@pytest.fixture(autouse=True)
def _default_tf32() -> Iterator[None]:
    """Training sets what ``--tf32`` says for its process."""
    yield
    torch.backends.fp32_precision, torch.backends.cudnn.allow_tf32 = "none", True


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


@pytest.fixture
def server() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The server, as the hub that the library in this process talks to."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    address_of_a_file = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address_of_a_file)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage is not that of this server
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return server
