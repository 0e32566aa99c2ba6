"""The compiled decoding step: equal to the model, compiled once, and clear about what it needs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, GOLDEN
from support.models import ARCHITECTURES, load_golden
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.utils import fresh_cache

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import YiVLError
from yivl.inference import compilation
from yivl.inference.chat import Chat, GenerationState
from yivl.inference.compilation import check_compiler, compile_decoding
from yivl.inference.engine import Engine
from yivl.inference.kv_cache import ROOM

WIDE = GOLDEN / "images/wide_rgb.png"
REQUESTS = [("What is this?", WIDE), ("hello", None), ("Tell me a long story about all of this.", WIDE), ("你好", None)]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """A model whose compiled code no other test runs."""
    return load_golden(request.param)


@pytest.fixture(scope="module")
def compiled(loaded: LoadedModel) -> LoadedModel:
    """The golden model with a compiled step, which fails where it would run without the compiled code."""
    try:
        check_compiler()
    except YiVLError as error:
        pytest.skip(str(error))
    set_stance, stances, lines = torch.compiler.set_stance, list[str](), list[str]()

    def fail_on_recompile(stance: str) -> Any:
        stances.append(stance)
        return set_stance("fail_on_recompile")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "set_stance", fail_on_recompile)
        patch.setattr(compilation.logger, "info", lambda line, *values: lines.append(line % values))
        before = counters["stats"]["unique_graphs"]
        model = compile_decoding(loaded)
    assert stances == ["eager_on_recompile"]
    assert len(lines) == 1
    assert lines[0].startswith("compiled the decoding step in ")
    # For one row and for several: a layer, whichever of the four, and the head.
    assert counters["stats"]["unique_graphs"] - before == 4
    assert not counters["graph_break"]
    return model


def answers(loaded: LoadedModel, num_requests: int) -> list[str]:
    """Return the answers to requests of different lengths, which join and leave at different steps."""
    engine, states = Engine(loaded), list[GenerationState]()
    for index, asked in enumerate(REQUESTS[:num_requests]):
        states.append(Chat(loaded).begin(*asked, temperature=0, max_new_tokens=6 + 4 * index))
        engine.add(states[-1])
        engine.step()
    while len(engine):
        engine.step()
    return [state.text for state in states]


@pytest.mark.parametrize("num_requests", [1, 2, 4])
def test_a_compiled_step_gives_the_answers_of_the_model_for_any_number_of_rows(
    num_requests: int, compiled: LoadedModel, loaded: LoadedModel
) -> None:
    assert answers(compiled, num_requests) == answers(loaded, num_requests)


def test_a_compiled_step_serves_all_lengths(compiled: LoadedModel, loaded: LoadedModel) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_new_tokens": ROOM + 50}  # another buffer in the middle
    chat = Chat(compiled)
    assert chat.ask("hello", **greedy) == Chat(loaded).ask("hello", **greedy)
    assert chat.last_answer is not None
    assert chat.last_answer.finish_reason == "stop" or chat.last_answer.new_tokens > ROOM


def test_another_model_would_be_noticed(compiled: LoadedModel) -> None:
    """So that the tests above can fail."""
    other = load_model(CHECKPOINT, device="cpu", dtype="bfloat16")
    other = dataclasses.replace(other, decoding_functions=compiled.decoding_functions)
    with pytest.raises(RuntimeError, match="recompile"):
        answers(other, 1)


def test_without_a_compiler_the_error_names_the_fix() -> None:
    with (
        config.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(YiVLError, match=r"install g\+\+, set CXX to a compiler, or leave out --compile"),
    ):
        check_compiler()


def test_a_compiler_that_fails_is_one_line(loaded: LoadedModel, tmp_path: Path) -> None:
    """For example one without the headers of Python."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ]\n')
    compiler.chmod(0o755)
    with (
        config.patch({"cpp.cxx": (str(compiler),)}),
        fresh_cache(),
        pytest.raises(YiVLError, match=r"^--compile: PyTorch cannot compile on this machine .*; leave out --compile$"),
    ):
        compile_decoding(loaded)
