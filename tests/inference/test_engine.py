"""Replies that are decoded together are what each would be alone."""

import threading
from typing import Any

import pytest
import torch
from support.golden import GOLDEN

from yivl.checkpoint.loading import LoadedModel
from yivl.errors import YiVLError
from yivl.inference.chat import Chat
from yivl.inference.engine import Engine, _pad_left, answer_batch

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


def test_replies_join_and_leave_while_others_go_on(loaded: LoadedModel) -> None:
    """Lengths, pictures, settings and moments of joining differ; longer prompts join shorter ones and the reverse."""
    asked: list[tuple[int, str, Any, dict[str, Any]]] = [
        (0, "hi", None, {"temperature": 0, "max_new_tokens": 25}),
        (0, "What is this?", PHOTO, {"temperature": 0, "max_new_tokens": 3}),
        (4, "Tell me a long story about all of these pictures, please.", [WIDE, PHOTO], {"temperature": 0, "seed": 1}),
        (5, "图片里有什么？", WIDE, {"temperature": 1.5, "seed": 3, "top_p": 0.9, "max_new_tokens": 20}),
        (5, "图片里有什么？", WIDE, {"temperature": 1.5, "seed": 4, "top_k": 5, "max_new_tokens": 20}),
        (40, "And now?", None, {"temperature": 0, "max_new_tokens": 5, "repetition_penalty": 3.0}),
    ]
    for fields in asked:
        fields[3].setdefault("max_new_tokens", 10)
    batch = Engine(loaded)
    replies, streamed = {}, dict.fromkeys(range(len(asked)), "")
    sizes = set()
    for step in range(60):
        pieces = batch.step()
        for index, (start, question, image, sampling) in enumerate(asked):
            if start == step:
                replies[index] = Chat(loaded).begin(question, image, **sampling)
                pieces += batch.add([replies[index]])
        for index, reply in replies.items():
            streamed[index] += "".join(piece for owner, piece in pieces if owner is reply)
        sizes.add(len(batch))
    assert len(batch) == 0
    assert max(sizes) >= 4
    for index, (_, question, image, sampling) in enumerate(asked):
        alone = Chat(loaded)
        assert alone.ask(question, image, **sampling) == replies[index].text == streamed[index]
        assert alone.last_answer is not None
        assert alone.last_answer.finish_reason == replies[index].finish_reason
        assert alone.last_answer.prompt_tokens == len(replies[index].keys)


def test_padding_is_let_go_of_with_the_row_that_needed_it(loaded: LoadedModel) -> None:
    batch = Engine(loaded)
    short = Chat(loaded).begin("hi", temperature=0, max_new_tokens=6)
    long = Chat(loaded).begin("hi", [PHOTO] * 8, temperature=0, max_new_tokens=2)
    batch.add([short, long])
    assert batch._cache is not None
    assert batch._cache.get_seq_length() == len(long.keys)
    batch.step()
    assert long.finish_reason == "length"
    assert batch._cache.get_seq_length() == len(short.keys) + 1


def test_an_event_stops_one_reply_and_no_other(loaded: LoadedModel) -> None:
    event = threading.Event()
    stopped = Chat(loaded).begin("hello", temperature=0, max_new_tokens=30, stop_event=event)
    other = Chat(loaded).begin("What is this?", PHOTO, **GREEDY)
    batch = Engine(loaded)
    batch.add([stopped, other])
    event.set()
    while len(batch):
        batch.step()
    assert (stopped.finish_reason, len(stopped.new_ids)) == ("cancelled", 2)
    assert other.text == Chat(loaded).ask("What is this?", PHOTO, **GREEDY)


def test_further_stop_strings_end_a_reply_and_are_not_shown(loaded: LoadedModel) -> None:
    whole = Chat(loaded).ask("hello", temperature=0, max_new_tokens=30)
    middle = whole[len(whole) // 2 :][:3]
    reply = Chat(loaded).begin("hello", temperature=0, max_new_tokens=30, stops=["never said", middle])
    batch = Engine(loaded)
    pieces = batch.add([reply])
    while len(batch):
        pieces += batch.step()
    assert reply.finish_reason == "stop"
    assert "".join(piece for _, piece in pieces) == reply.text == whole[: whole.index(middle)].strip()


@pytest.mark.parametrize("where", ["model", "cache", "sampler"])
def test_a_prompt_that_fails_joins_nothing(where: str, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Engine(loaded)
    reply = Chat(loaded).begin("hello", **GREEDY)
    batch.add([reply])
    other = Chat(loaded).begin("What is this?", PHOTO, **GREEDY)
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
        batch.add([other])
    monkeypatch.undo()
    assert len(batch) == 1
    while len(batch):
        batch.step()
    assert reply.text == Chat(loaded).ask("hello", **GREEDY)


def test_steps_in_a_batch_leave_the_global_generator_alone(loaded: LoadedModel) -> None:
    before = torch.get_rng_state()
    answers = answer_batch(loaded, ["hi", "hi"], temperature=2.0, seed=5, max_new_tokens=8)
    assert answers[0] == answers[1] == Chat(loaded).ask("hi", temperature=2.0, seed=5, max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), before)
