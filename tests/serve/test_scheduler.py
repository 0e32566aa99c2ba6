"""Requests that wait, join and fail while others are answered."""

import copy
import dataclasses
import hashlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest
import torch
from support.golden import GOLDEN

from yivl.checkpoint.loading import LoadedModel
from yivl.errors import NonFiniteError
from yivl.image_processing import load_image
from yivl.inference.chat import Chat, GenerationState
from yivl.inference.engine import Engine
from yivl.serve.api_errors import as_api_error
from yivl.serve.images import ImageEncoder, SentImage
from yivl.serve.limits import Limits
from yivl.serve.scheduler import Cancelled, Event, Request, Scheduler

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}


class Asked:
    """A question to the scheduler, and its events."""

    def __init__(self, loaded: LoadedModel, question: str, images: Sequence[SentImage] = (), **sampling: Any) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        settings = GREEDY | sampling
        self.request = Request(
            images,
            lambda encoded: Chat(loaded).begin(question, encoded, stop_event=self.cancelled, **settings),
            self.events.put,
            self.cancelled,
        )

    def end(self) -> GenerationState | Exception:
        """Wait for the last event and return it."""
        while isinstance(event := self.events.get(timeout=60), str):
            pass
        return event

    def text(self) -> str:
        state = self.end()
        assert isinstance(state, GenerationState)
        return state.text


@contextmanager
def running(loaded: LoadedModel, **limits: Any) -> Iterator[Scheduler]:
    scheduler = Scheduler(loaded, Limits(**limits))
    try:
        yield scheduler
    finally:
        scheduler.close()


@contextmanager
def recorded(module: torch.nn.Module, measure: Callable[[torch.Tensor], int]) -> Iterator[list[int]]:
    """Record a size of the first argument of each forward pass of a module."""
    sizes: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: sizes.append(measure(inputs[0])))
    yield sizes
    hook.remove()


def sent(loaded: LoadedModel, path: Any, copy: int = 0) -> SentImage:
    """Return an image; copies are equal in their pixels but not in their digests."""
    pixel_values = loaded.image_processor([load_image(path)])[0]
    return SentImage(pixel_values, hashlib.sha256(f"{path} {copy}".encode()).digest())


def test_running_answers_get_a_token_between_the_parts_of_a_prompt(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [Chat(loaded).ask("What is this?", image, **GREEDY) for image in (PHOTO, WIDE)]
    expected_first = Chat(loaded).ask("hello", temperature=0, max_new_tokens=60)
    first = Asked(loaded, "hello", max_new_tokens=60)
    others = [Asked(loaded, "What is this?", [sent(loaded, image)]) for image in (PHOTO, WIDE)]
    with (
        running(loaded, prefill_chunk=8, max_cache_bytes=0) as scheduler,
        recorded(loaded.model.model.layers[0], lambda states: states.shape[1]) as lengths,
    ):
        step = scheduler._engine.step
        monkeypatch.setattr(scheduler._engine, "step", lambda: (lengths.append(1), step())[1])
        scheduler.submit([first.request])
        first.events.get(timeout=60)
        scheduler.submit([other.request for other in others])
        assert first.text() == expected_first
        assert [other.text() for other in others] == expected
    assert lengths[0] > 8  # no request waited for a token
    parts = [list(group) for is_part, group in groupby(lengths[1:], lambda length: length > 1) if is_part]
    assert len(parts) > 2
    assert all(sum(part) <= 8 for part in parts)


def test_the_images_of_queued_requests_are_encoded_in_one_batch(loaded: LoadedModel) -> None:
    images = [sent(loaded, PHOTO), sent(loaded, WIDE), sent(loaded, PHOTO)]
    num_patches = loaded.model.config.num_patches
    for chunk, sizes in ((2 * num_patches, [2]), (num_patches, [1, 1]), (1, [1, 1])):
        asked = [Asked(loaded, "What is this?", [image]) for image in images]
        with (
            running(loaded, prefill_chunk=chunk) as scheduler,
            recorded(loaded.model.get_vision_tower(), len) as batches,
        ):
            scheduler.submit([one.request for one in asked])
            answers = [one.text() for one in asked]
        assert batches == sizes
        assert answers == [Chat(loaded).ask("What is this?", image, **GREEDY) for image in (PHOTO, WIDE, PHOTO)]


def test_an_image_that_cannot_be_encoded_fails_its_request_only(loaded: LoadedModel) -> None:
    broken = SentImage(torch.zeros(3, 7, 7), b"broken")
    good = [sent(loaded, PHOTO), sent(loaded, WIDE)]
    asked = [Asked(loaded, "What is this?", [image]) for image in (good[0], broken, good[1])]
    with running(loaded, prefill_chunk=4096) as scheduler:
        scheduler.submit([one.request for one in asked])
        first, failed, last = (one.end() for one in asked)
    assert isinstance(failed, Exception)
    for state, image in ((first, PHOTO), (last, WIDE)):
        assert isinstance(state, GenerationState)
        assert state.text == Chat(loaded).ask("What is this?", image, **GREEDY)


def test_out_of_memory_in_a_prompt_fails_its_request_only_and_empties_the_store(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Chat(loaded).ask("hello", temperature=0, max_new_tokens=60)
    layer = loaded.model.model.layers[1]
    forward = layer.forward

    def fail_in_a_prompt(states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if states.shape[1] > 30:
            raise RuntimeError("CUDA out of memory")
        return forward(states, *arguments, **options)

    with running(loaded) as scheduler:
        earlier, first = Asked(loaded, "And now?"), Asked(loaded, "hello", max_new_tokens=60)
        scheduler.submit([earlier.request])
        earlier.text()
        assert scheduler._engine.prefixes.num_bytes > 0
        scheduler.submit([first.request])
        first.events.get(timeout=60)
        monkeypatch.setattr(layer, "forward", fail_in_a_prompt)
        second = Asked(loaded, "What is this?" * 20, [sent(loaded, PHOTO)])
        scheduler.submit([second.request])
        error = second.end()
        assert isinstance(error, RuntimeError)
        monkeypatch.undo()
        assert first.text() == expected
        again = Asked(loaded, "And now?")
        scheduler.submit([again.request])
        state = again.end()
        assert isinstance(state, GenerationState)
        assert state.num_cached < len(state.keys) - 1
        assert state.text == Chat(loaded).ask("And now?", **GREEDY)


def test_out_of_memory_in_a_prompt_drops_the_stored_prefixes_and_computes_it_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = loaded.model.model.layers[1]
    forward = layer.forward
    failed: list[int] = []
    with running(loaded) as scheduler:
        earlier, asked = Asked(loaded, "And now?"), Asked(loaded, "What is this?", [sent(loaded, PHOTO)])
        scheduler.submit([earlier.request])
        earlier.text()

        def fail_beside_prefixes(states: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if num_bytes := scheduler._engine.prefixes.num_bytes:
                failed.append(num_bytes)
                raise RuntimeError("CUDA out of memory")
            return forward(states, *arguments, **options)

        monkeypatch.setattr(layer, "forward", fail_beside_prefixes)
        scheduler.submit([asked.request])
        state = asked.end()
        monkeypatch.undo()
    assert len(failed) == 1
    assert isinstance(state, GenerationState)
    assert state.num_cached == 0
    assert state.text == Chat(loaded).ask("What is this?", PHOTO, **GREEDY)


def test_a_request_that_is_cancelled_while_its_prompt_is_computed_leaves(loaded: LoadedModel) -> None:
    first = Asked(loaded, "hello", max_new_tokens=60)
    second = Asked(loaded, "What is this?" * 30)
    with running(loaded, prefill_chunk=1, max_cache_bytes=0) as scheduler:
        scheduler.submit([first.request])
        first.events.get(timeout=60)
        scheduler.submit([second.request])
        while not any(one.prefill for one in scheduler._joining):
            threading.Event().wait(0.001)
        second.cancelled.set()
        assert isinstance(second.end(), Cancelled)
        assert first.text() == Chat(loaded).ask("hello", temperature=0, max_new_tokens=60)


def test_a_request_that_is_cancelled_behind_another_one_leaves_and_its_image_is_not_encoded(
    loaded: LoadedModel,
) -> None:
    first = Asked(loaded, "What is this?", [sent(loaded, PHOTO, copy) for copy in range(3)])
    second = Asked(loaded, "What is this?", [sent(loaded, WIDE)])
    with running(loaded, prefill_chunk=2 * loaded.model.config.num_patches) as scheduler:
        batches: list[tuple[int, int]] = []

        def cancel(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            batches.append((len(inputs[0]), scheduler.num_running))
            second.cancelled.set()

        hook = loaded.model.get_vision_tower().register_forward_pre_hook(cancel)
        scheduler.submit([first.request, second.request])
        assert isinstance(second.end(), Cancelled)
        assert first.text()
        hook.remove()
    assert batches == [(2, 2), (1, 1)]


@pytest.mark.parametrize("num_good_events", [0, 1])
def test_a_receiver_that_raises_ends_its_request_only(num_good_events: int, loaded: LoadedModel) -> None:
    first, second, last = (Asked(loaded, "hello", max_new_tokens=60) for _ in range(3))
    received: list[Event] = []

    def fail(event: Event) -> None:
        received.append(event)
        if len(received) > num_good_events:
            raise ValueError("the receiver is gone")

    second.request.on_event = fail
    with running(loaded) as scheduler:
        scheduler.submit([first.request, second.request])
        expected = Chat(loaded).ask("hello", temperature=0, max_new_tokens=60)
        assert first.text() == expected
        scheduler.submit([last.request])
        assert last.text() == expected
        assert (scheduler.num_running, len(scheduler._engine)) == (0, 0)
    assert len(received) == num_good_events + 2
    assert isinstance(received[-1], ValueError)


def test_the_least_recently_used_image_is_encoded_again(loaded: LoadedModel) -> None:
    encoder = ImageEncoder(loaded.model, 2)
    photo, wide, other = sent(loaded, PHOTO), sent(loaded, WIDE), sent(loaded, PHOTO, copy=1)
    first, second, again = encoder.encode([photo, wide, photo])
    assert first is again
    assert first.serial != second.serial
    torch.testing.assert_close(first.features, Chat(loaded).encode(PHOTO).features)
    assert encoder.find(photo) is first
    (third,) = encoder.encode([other])
    assert (encoder.find(wide), encoder.find(photo), encoder.find(other)) == (None, first, third)
    assert third.serial != first.serial


def test_an_image_that_is_kept_is_not_encoded_again_with_new_ones(loaded: LoadedModel) -> None:
    encoder = ImageEncoder(loaded.model, 2)
    photo, wide, other = sent(loaded, PHOTO), sent(loaded, WIDE), sent(loaded, PHOTO, copy=1)
    first, second = encoder.encode([photo, wide])
    with recorded(loaded.model.get_vision_tower(), len) as batches:
        third, again = encoder.encode([other, photo])
        assert encoder.encode([photo]) == [first]
    assert batches == [1]
    assert again is first
    assert third.serial not in (first.serial, second.serial)
    assert (encoder.find(wide), encoder.find(photo), encoder.find(other)) == (None, first, third)


def test_damaged_weights_fail_one_request_and_the_log_names_the_checkpoint(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    first = Chat(loaded).begin("hi", **GREEDY)
    Engine(loaded).add(first)
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[first.new_ids[0]] = torch.nan
    damaged = dataclasses.replace(loaded, model=model)
    expected = Chat(loaded).ask("What is this?", **GREEDY)
    with caplog.at_level(logging.ERROR), running(damaged) as scheduler:
        bad, good = Asked(damaged, "hi"), Asked(damaged, "What is this?")
        scheduler.submit([bad.request, good.request])
        assert good.text() == expected
        error = bad.end()
    assert isinstance(error, NonFiniteError)
    answer = as_api_error(error)
    assert (answer.status, answer.body.type, answer.body.code) == (500, "server_error", "model_error")
    assert "checkpoint" not in answer.body.message
    assert [record.getMessage().partition(": the logits")[0] for record in caplog.records] == [
        f"an answer failed: {loaded.name}"
    ]
    assert "Traceback" not in caplog.text
