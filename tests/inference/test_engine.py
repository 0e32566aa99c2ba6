"""Requests that are decoded together get the answers that each gets alone."""

import threading
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, GOLDEN

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import YiVLError
from yivl.inference.chat import Chat, GenerationState, answer_batch
from yivl.inference.engine import Engine, _pad_left, decode, finish_together, native_matrix_vector

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
QUESTIONS = ["What is this?", "你好，图片里有什么", "Tell me a story", "And now?"]


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
        monkeypatch.setattr(other.sampler, "choose", fail)
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
def test_a_chat_reuses_the_keys_and_values_of_an_answer_from_a_shared_engine(
    num_others: int, loaded: LoadedModel
) -> None:
    """The cache must hold what its labels say: a stale one gave later turns the keys of other tokens."""
    chat, reference = Chat(loaded), Chat(loaded, reuse_cache=False)
    lengths: list[int] = []
    hook = loaded.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    for index, question in enumerate(QUESTIONS):
        state = chat.begin(question, WIDE if index == 0 else None, **GREEDY)
        others = [Chat(loaded).begin("hi", PHOTO, temperature=0, max_new_tokens=5 + 20 * i) for i in range(num_others)]
        lengths.clear()
        complete(Engine(loaded), state, *others)
        chat.finish(state)
        assert chat.last_answer is not None
        assert lengths[0] == chat.last_answer.prompt_tokens - chat.last_answer.cached_tokens
        assert chat.last_answer.cached_tokens > 20 or index == 0
        assert state.text == reference.ask(question, WIDE if index == 0 else None, **GREEDY)
    hook.remove()
    assert chat.turns == reference.turns


def test_a_chat_that_alternates_between_streams_and_a_shared_engine_answers_right(loaded: LoadedModel) -> None:
    chat, reference = Chat(loaded), Chat(loaded, reuse_cache=False)
    for index, question in enumerate(QUESTIONS * 2):
        if index % 2:
            state = chat.begin(question, **GREEDY)
            finish_together(loaded, [state])
            chat.finish(state)
        else:
            chat.ask(question, **GREEDY)
        reference.ask(question, **GREEDY)
        assert chat.last_answer is not None
        assert chat.last_answer.cached_tokens > 20 or index == 0
    assert chat.turns == reference.turns


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
    assert chat.last_answer is not None
    assert chat.last_answer.cached_tokens > 20  # the system message and the image


def test_a_request_that_is_removed_keeps_its_answer_and_its_cache(loaded: LoadedModel) -> None:
    chat, other = Chat(loaded), Chat(loaded).begin("What is this?", WIDE, **GREEDY)
    state = chat.begin("hello", temperature=0, max_new_tokens=500)
    engine = Engine(loaded)
    for request in (state, other):
        engine.add(request)
    engine.step()
    engine.remove([state])
    chat.finish(state)
    assert len(engine) == 1
    assert chat.last_answer is not None
    assert (chat.last_answer.finish_reason, chat.last_answer.new_tokens) == ("cancelled", 2)
    chat.ask("And now?", **GREEDY)
    assert chat.last_answer.cached_tokens >= len(state.keys)
    while len(engine):
        engine.step()
    assert other.text == Chat(loaded).ask("What is this?", WIDE, **GREEDY)


def test_after_a_failed_step_every_chat_computes_its_cache_again(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats, references = [[Chat(loaded, reuse_cache=reuse) for _ in range(2)] for reuse in (True, False)]
    for chat, reference in zip(chats, references, strict=True):
        assert chat.ask("What is this?", WIDE, **GREEDY) == reference.ask("What is this?", WIDE, **GREEDY)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    engine = Engine(loaded)
    for chat in chats:
        engine.add(chat.begin("hello", **GREEDY))
    engine.step()
    monkeypatch.setattr(loaded.model.model.layers[2], "forward", fail)  # layers 0 and 1 hold the new position by then
    with pytest.raises(RuntimeError, match="boom"):
        engine.step()
    monkeypatch.undo()
    engine.clear()
    for chat, reference in zip(chats, references, strict=True):
        assert chat.ask("And now?", **GREEDY) == reference.ask("And now?", **GREEDY)
        assert chat.turns == reference.turns
        assert chat.last_answer is not None
        assert chat.last_answer.cached_tokens == 0


def test_the_cache_of_a_single_request_is_never_copied(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    engine = Engine(loaded)
    places = set()
    for question in ("hi", "And now?"):
        state = chat.begin(question, temperature=0, max_new_tokens=4)
        engine.add(state)
        while len(engine):
            assert engine._cache is not None
            places.add(engine._cache.layers[0].keys.data_ptr())
            engine.step()
        chat.finish(state)
    assert len(places) == 1


def test_kernels_come_back_when_the_last_user_leaves() -> None:
    with native_matrix_vector:
        native_matrix_vector.__enter__()
        assert not torch.backends.mkldnn.enabled
        native_matrix_vector.__exit__()
        assert not torch.backends.mkldnn.enabled
    assert torch.backends.mkldnn.enabled


def test_the_cpu_decoding_kernels_change_no_numbers() -> None:
    """Decoding steps (explicit mask, native matrix-vector kernels) against one pass over the whole sequence."""
    loaded = load_model(CHECKPOINT, device="cpu", dtype="bfloat16")
    state = Chat(loaded).begin("What is this?", WIDE, temperature=0, max_new_tokens=8)
    steps: list[torch.Tensor] = []
    uses_onednn: list[bool] = []
    hook = loaded.model.lm_head.register_forward_hook(lambda *arguments: steps.append(arguments[2][:, -1]))
    switch = loaded.model.lm_head.register_forward_hook(lambda *_: uses_onednn.append(torch.backends.mkldnn.enabled))
    assert "".join(decode(loaded, state)) == state.text
    hook.remove()
    switch.remove()
    ids = torch.tensor([state.input_ids + state.new_ids])
    with torch.no_grad():
        fused = loaded.model.fuse(ids, image_features=state.features.clone() if state.features is not None else None)
        whole = loaded.model(inputs_embeds=fused.inputs_embeds).logits[0]
    expected = whole[len(state.keys) - 1 : -1].float()
    torch.testing.assert_close(torch.cat(steps).float(), expected, atol=0.25, rtol=0.05)  # bfloat16 rounding
    assert uses_onednn == [True] + [False] * (len(steps) - 1)
    assert torch.backends.mkldnn.enabled
