"""Requests that are decoded together get the answers that each gets alone."""

import copy
import dataclasses
import threading
from typing import Any

import pytest
import torch
from support.golden import GOLDEN
from support.models import ARCHITECTURES, load_golden
from torch.utils._python_dispatch import TorchDispatchMode

from yivl.checkpoint.loading import LoadedModel
from yivl.errors import CheckpointError, NonFiniteError, YiVLError
from yivl.inference.chat import Chat, GenerationState, answer_batch
from yivl.inference.engine import Engine, _pad_left, finish_together
from yivl.inference.kv_cache import PrefixStore
from yivl.inference.sampling import Sampler, Sampling

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
QUESTIONS = ["What is this?", "你好，图片里有什么", "Tell me a story", "And now?"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """Tests must not modify it."""
    return load_golden(request.param)


def test_a_batch_gives_the_answers_of_single_questions(loaded: LoadedModel) -> None:
    images = [PHOTO, None, WIDE, PHOTO]
    batch = answer_batch(loaded, QUESTIONS, images, **GREEDY)
    assert batch == [Chat(loaded).ask(q, image, **GREEDY) for q, image in zip(QUESTIONS, images, strict=True)]
    assert answer_batch(loaded, QUESTIONS[2:], **GREEDY) == [Chat(loaded).ask(q, **GREEDY) for q in QUESTIONS[2:]]
    assert answer_batch(loaded, []) == []
    with pytest.raises(ValueError, match="4 questions but 1 images"):
        answer_batch(loaded, QUESTIONS, [PHOTO])
    with pytest.raises(YiVLError, match="num_beams=1"):
        answer_batch(loaded, QUESTIONS, num_beams=2)


def test_requests_join_and_leave_between_the_steps_of_others(loaded: LoadedModel) -> None:
    """Lengths, images, settings and joining times differ; longer prompts join shorter ones and the reverse."""
    asked: list[tuple[int, str, Any, dict[str, Any]]] = [
        (0, "hi", None, {"temperature": 0, "max_new_tokens": 25}),
        (0, "What is this?", PHOTO, {"temperature": 0, "max_new_tokens": 3}),
        (4, "Tell me a long story about all of these images, please.", [WIDE, PHOTO], {"temperature": 0, "seed": 1}),
        (5, "图片里有什么？", WIDE, {"temperature": 1.5, "seed": 3, "top_p": 0.9, "max_new_tokens": 20}),
        (5, "图片里有什么？", WIDE, {"temperature": 1.5, "seed": 4, "top_k": 5, "max_new_tokens": 20}),
        (40, "And now?", None, {"temperature": 0, "max_new_tokens": 5, "repetition_penalty": 3.0}),
    ]
    for fields in asked:
        fields[3].setdefault("max_new_tokens", 10)
    engine = Engine(loaded)
    states, streamed = {}, dict.fromkeys(range(len(asked)), "")
    sizes = set()
    for step in range(60):
        pieces = engine.step()
        for index, (start, question, image, sampling) in enumerate(asked):
            if start == step:
                states[index] = Chat(loaded).begin(question, image, **sampling)
                pieces.append((states[index], engine.add(states[index])))
        for index, state in states.items():
            streamed[index] += "".join(piece for owner, piece in pieces if owner is state)
        sizes.add(len(engine))
    assert len(engine) == 0
    assert max(sizes) >= 4
    for index, (_, question, image, sampling) in enumerate(asked):
        alone = Chat(loaded)
        assert alone.ask(question, image, **sampling) == states[index].text == streamed[index]
        assert alone.last_answer is not None
        assert alone.last_answer.finish_reason == states[index].finish_reason
        assert alone.last_answer.prompt_tokens == len(states[index].keys)


def test_padding_is_dropped_with_the_row_that_needed_it(loaded: LoadedModel) -> None:
    engine = Engine(loaded)
    short = Chat(loaded).begin("hi", temperature=0, max_new_tokens=6)
    long = Chat(loaded).begin("hi", [PHOTO] * 8, temperature=0, max_new_tokens=2)
    for request in (short, long):
        engine.add(request)
    assert engine._cache is not None
    assert engine._cache.get_seq_length() == len(long.keys)
    engine.step()
    assert long.finish_reason == "length"
    assert engine._cache.get_seq_length() == len(short.keys) + 1


def test_a_stop_event_ends_one_request_and_no_other(loaded: LoadedModel) -> None:
    event = threading.Event()
    stopped = Chat(loaded).begin("hello", temperature=0, max_new_tokens=30, stop_event=event)
    other = Chat(loaded).begin("What is this?", PHOTO, **GREEDY)
    engine = Engine(loaded)
    for request in (stopped, other):
        engine.add(request)
    event.set()
    while len(engine):
        engine.step()
    assert (stopped.finish_reason, len(stopped.new_ids)) == ("cancelled", 2)
    assert other.text == Chat(loaded).ask("What is this?", PHOTO, **GREEDY)


def test_additional_stop_strings_end_an_answer_and_are_not_shown(loaded: LoadedModel) -> None:
    whole = Chat(loaded).ask("hello", temperature=0, max_new_tokens=30)
    middle = whole[len(whole) // 2 :][:3]
    state = Chat(loaded).begin("hello", temperature=0, max_new_tokens=30, stops=["never said", middle])
    engine = Engine(loaded)
    text = engine.add(state)
    while len(engine):
        text += "".join(piece for _, piece in engine.step())
    assert state.finish_reason == "stop"
    assert text == state.text == whole[: whole.index(middle)].strip()


@pytest.mark.parametrize("where", ["model", "cache", "sampler"])
def test_a_request_whose_prefill_fails_does_not_join(
    where: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loaded)
    state = Chat(loaded).begin("hello", **GREEDY)
    engine.add(state)
    other = Chat(loaded).begin("What is this?", WIDE, **GREEDY)
    calls: list[int] = []

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    def fail_in_the_second(states: torch.Tensor, length: int) -> torch.Tensor:
        calls.append(length)
        return _pad_left(states, length) if len(calls) < 7 else fail()  # type: ignore[return-value]

    if where == "model":
        monkeypatch.setattr(loaded.model.lm_head, "forward", fail)
    elif where == "cache":  # memory runs out in the second of its layers
        monkeypatch.setattr("yivl.inference.engine._pad_left", fail_in_the_second)
    else:
        monkeypatch.setattr(other.sampler, "propose", fail)
    with pytest.raises(RuntimeError, match="boom"):
        engine.add(other)
    monkeypatch.undo()
    assert len(engine) == 1
    while len(engine):
        engine.step()
    assert state.text == Chat(loaded).ask("hello", **GREEDY)


def test_steps_in_a_batch_leave_the_global_generator_alone(loaded: LoadedModel) -> None:
    before = torch.get_rng_state()
    answers = answer_batch(loaded, ["hi", "hi"], temperature=2.0, seed=5, max_new_tokens=8)
    assert answers[0] == answers[1] == Chat(loaded).ask("hi", temperature=2.0, seed=5, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)


def complete(engine: Engine, *states: GenerationState) -> None:
    for state in states:
        engine.add(state)
    while len(engine):
        engine.step()


@pytest.mark.parametrize("num_others", [0, 2])
def test_a_turn_reuses_the_keys_and_values_of_the_turns_before(num_others: int, loaded: LoadedModel) -> None:
    """The store must hold what its keys say: a stale one gave later turns the keys of other tokens."""
    chat, reference = Chat(loaded), Chat(loaded, reuse_cache=False)
    engine = Engine(loaded, PrefixStore(2**30))
    lengths: list[int] = []
    hook = loaded.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    for index, question in enumerate(QUESTIONS):
        state = chat.begin(question, WIDE if index == 0 else None, **GREEDY)
        others = [Chat(loaded).begin("hi", PHOTO, temperature=0, max_new_tokens=5 + 20 * i) for i in range(num_others)]
        lengths.clear()
        complete(engine, state, *others)
        chat.finish(state)
        assert chat.last_answer is not None
        assert lengths[0] == chat.last_answer.prompt_tokens - chat.last_answer.cached_tokens
        assert chat.last_answer.cached_tokens > 20 or index == 0
        assert state.text == reference.ask(question, WIDE if index == 0 else None, **GREEDY)
        assert reference.last_answer is not None
        assert reference.last_answer.cached_tokens == 0
    hook.remove()
    assert chat.turns == reference.turns


def test_requests_share_the_image_of_another_one_that_still_runs(loaded: LoadedModel) -> None:
    image = Chat(loaded).encode(PHOTO)
    engine = Engine(loaded, PrefixStore(2**30))
    states = [Chat(loaded).begin(question, image, **GREEDY) for question in QUESTIONS]
    equal_content = Chat(loaded).begin(QUESTIONS[0], PHOTO, **GREEDY)  # its own features: nothing says they are equal
    complete(engine, *states, equal_content)
    before_image = states[0].keys.index(-image.serial)
    assert states[0].num_cached == 0
    assert all(state.num_cached >= before_image + len(image.features) for state in states[1:])
    assert equal_content.num_cached == before_image
    for state in (*states, equal_content):
        assert state.text == Chat(loaded).ask(state.turn.question, PHOTO, **GREEDY)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_computed_in_parts_between_the_steps_of_others_gets_its_answer(
    chunk: int, loaded: LoadedModel
) -> None:
    running = Chat(loaded).begin("hello", temperature=0, max_new_tokens=30)
    state = Chat(loaded).begin("What is this?", WIDE, **GREEDY)
    engine = Engine(loaded, PrefixStore(2**30))
    engine.add(running)
    prefill = engine.start(state)
    while engine.advance(prefill, chunk) is None:
        assert 0 < prefill.num_remaining < len(state.keys)
        engine.step()
    while len(engine):
        engine.step()
    assert state.text == Chat(loaded).ask("What is this?", WIDE, **GREEDY)
    assert running.text == Chat(loaded).ask("hello", temperature=0, max_new_tokens=30)


def test_a_store_without_memory_is_emptied_and_the_requests_continue(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(loaded, PrefixStore(2**30))
    complete(engine, Chat(loaded).begin("hello", **GREEDY))
    assert engine.prefixes.num_bytes > 0

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("yivl.inference.kv_cache._copy", fail)
    state = Chat(loaded).begin("What is this?", WIDE, **GREEDY)
    complete(engine, state)
    assert engine.prefixes.num_bytes == 0
    monkeypatch.undo()
    assert state.text == Chat(loaded).ask("What is this?", WIDE, **GREEDY)


def test_begin_edit_replaces_the_turn_and_those_after_it(loaded: LoadedModel) -> None:
    chat, reference = Chat(loaded), Chat(loaded)
    for question in QUESTIONS[:3]:
        chat.ask(question, WIDE if question == QUESTIONS[0] else None, **GREEDY)
    state = chat.begin_edit(0, "What colors are there?", **GREEDY)
    assert len(chat.turns) == 3
    finish_together(loaded, [state])
    chat.finish(state)
    assert state.text == reference.ask("What colors are there?", WIDE, **GREEDY)
    assert chat.turns == reference.turns
    "".join(chat.edit(0, "And now?", **GREEDY))
    assert chat.last_answer is not None
    assert chat.last_answer.cached_tokens > 20  # the system message and the image


def test_a_request_that_is_removed_keeps_its_answer_and_its_prefix(loaded: LoadedModel) -> None:
    chat, other = Chat(loaded), Chat(loaded).begin("What is this?", WIDE, **GREEDY)
    state = chat.begin("hello", temperature=0, max_new_tokens=500)
    engine = Engine(loaded, PrefixStore(2**30))
    for request in (state, other):
        engine.add(request)
    engine.step()
    engine.remove([state])
    chat.finish(state)
    assert len(engine) == 1
    assert chat.last_answer is not None
    assert (chat.last_answer.finish_reason, chat.last_answer.new_tokens) == ("cancelled", 2)
    following = chat.begin("And now?", **GREEDY)
    engine.add(following)
    assert following.num_cached >= len(state.keys)
    while len(engine):
        engine.step()
    assert other.text == Chat(loaded).ask("What is this?", WIDE, **GREEDY)


def test_a_failed_step_leaves_the_stored_prefixes_valid(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    chats, references = [[Chat(loaded, reuse_cache=reuse) for _ in range(2)] for reuse in (True, False)]
    engine = Engine(loaded, PrefixStore(2**30))
    for chat, reference in zip(chats, references, strict=True):
        state = chat.begin("What is this?", WIDE, **GREEDY)
        complete(engine, state)
        chat.finish(state)
        assert state.text == reference.ask("What is this?", WIDE, **GREEDY)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    for chat in chats:
        engine.add(chat.begin("hello", **GREEDY))
    engine.step()
    monkeypatch.setattr(
        loaded.model.model.layers[2].mlp.up_proj, "forward", fail
    )  # layers 0 to 2 hold the new position
    with pytest.raises(RuntimeError, match="boom"):
        engine.step()
    monkeypatch.undo()
    engine.clear()
    for chat, reference in zip(chats, references, strict=True):
        state = chat.begin("And now?", **GREEDY)
        complete(engine, state)
        assert state.num_cached > 20
        assert state.text == reference.ask("And now?", **GREEDY)


@pytest.fixture
def damaged(loaded: LoadedModel) -> LoadedModel:
    """The model, of which the embedding of the first token it answers to "hi" is damaged."""
    state = Chat(loaded).begin("hi", **GREEDY)
    Engine(loaded).add(state)
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[state.new_ids[0]] = torch.nan
    return dataclasses.replace(loaded, model=model)


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 0, "top_p": 0.5}, {"num_beams": 2}],
    ids=str,
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_end_an_answer_with_an_error(loaded: LoadedModel, value: float, sampling: Any) -> None:
    model = copy.deepcopy(loaded.model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = value
    chat = Chat(dataclasses.replace(loaded, model=model))
    with pytest.raises(NonFiniteError, match=r"checkpoint: the logits are NaN or infinite; download"):
        chat.ask("hi", **(GREEDY | sampling))
    assert not chat.turns
    assert issubclass(NonFiniteError, CheckpointError)  # exit code 2


def test_one_damaged_embedding_ends_the_request_that_needs_it(loaded: LoadedModel, damaged: LoadedModel) -> None:
    expected = Chat(loaded).ask("What is this?", PHOTO, **GREEDY)
    prefixes = PrefixStore(2**30)
    engine = Engine(damaged, prefixes)
    bad, good = Chat(damaged).begin("hi", **GREEDY), Chat(damaged).begin("What is this?", PHOTO, **GREEDY)
    engine.add(bad)
    engine.add(good)
    while len(engine):
        engine.step()
    assert (bad.finish_reason, type(bad.error)) == ("error", NonFiniteError)
    assert (good.text, good.error) == (expected, None)
    assert prefixes.take([*bad.keys, *bad.new_ids, 5])[1] <= len(bad.keys)  # nothing that is not finite is reused
    with pytest.raises(NonFiniteError):
        finish_together(damaged, [Chat(damaged).begin("hi", **GREEDY)])
    with pytest.raises(NonFiniteError):
        Chat(damaged).ask("hi", **GREEDY)


class Transfers(TorchDispatchMode):
    """Counts the values that a GPU would have to wait for."""

    num_single = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_single += func in (torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_token_and_its_check_are_one_transfer(temperature: float, value: float | None) -> None:
    """``tolist`` copies both at once; ``int``, ``if`` and ``math.isfinite`` would copy single values."""
    logits = torch.randn(1, 100, generator=torch.Generator().manual_seed(0))
    settings = Sampling(temperature=temperature, top_k=0, seed=1)
    expected = int(logits.argmax())
    if temperature:
        probabilities = (logits / temperature).softmax(-1)
        expected = int(torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1)))
    if value is not None:
        logits[0, 7] = value
    sampler = Sampler(settings, [1], torch.device("cpu"))
    with Transfers() as transfers:
        is_finite, token = sampler.propose(logits).tolist()
    assert is_finite == (value is None)
    assert value is not None or token == expected
    assert not transfers.num_single
