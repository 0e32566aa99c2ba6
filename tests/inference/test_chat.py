"""Chat: turns, key-value cache, sampling, stop strings, limits."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.golden import CHECKPOINT, GOLDEN
from support.models import ARCHITECTURES, load_golden

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.constants import STOP_STRING
from yivl.conversation import Turn
from yivl.errors import ContextLengthError, ImageError, YiVLError
from yivl.inference.chat import Chat
from yivl.inference.sampling import AnswerText, Sampling

PHOTO = GOLDEN / "images/photo_rgb.jpg"
WIDE = GOLDEN / "images/wide_rgb.png"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
QUESTIONS = ["What is this?", "你好，图片里有什么", "Tell me a story", "And now?"]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    """Tests must not modify it."""
    return load_golden(request.param)


def test_streamed_pieces_join_to_the_answer(loaded: LoadedModel) -> None:
    for question in QUESTIONS:
        streamed, asked = Chat(loaded), Chat(loaded)
        pieces = list(streamed.stream(question, PHOTO, temperature=0, max_new_tokens=40))
        assert "".join(pieces) == asked.ask(question, PHOTO, temperature=0, max_new_tokens=40)
        assert streamed.last_answer is not None
        assert streamed.last_answer.text == "".join(pieces)
        assert streamed.turns == asked.turns


def test_an_answer_arrives_in_more_than_one_piece(chat: Chat) -> None:
    assert len([piece for piece in chat.stream("hello", temperature=0, max_new_tokens=30) if piece]) > 3


@pytest.mark.parametrize("image_turn", [0, 1])
def test_reusing_the_cache_changes_no_answer(image_turn: int, loaded: LoadedModel) -> None:
    with_cache, without = Chat(loaded), Chat(loaded, reuse_cache=False)
    for index, question in enumerate(QUESTIONS):
        image = PHOTO if index == image_turn else None
        assert with_cache.ask(question, image, **GREEDY) == without.ask(question, image, **GREEDY)
        assert with_cache.last_answer is not None
        assert with_cache.last_answer.cached_tokens > 0 or index == 0
    assert without.last_answer is not None
    assert without.last_answer.cached_tokens == 0


@pytest.mark.parametrize("length", [1, 2])
def test_a_prompt_that_extends_the_cache_exactly_is_answered_right(length: int, loaded: LoadedModel) -> None:
    """One token of answer: the cache ends where the next prompt still agrees with it."""
    with_cache, without = Chat(loaded), Chat(loaded, reuse_cache=False)
    for question in QUESTIONS:
        for chat in (with_cache, without):
            chat.ask(question, temperature=0, max_new_tokens=length)
        assert with_cache.turns == without.turns


def test_a_turn_computes_only_new_positions_and_encodes_no_image_again(chat: Chat) -> None:
    lengths: list[int] = []
    calls: list[int] = []
    model = chat.loaded.model
    hooks = [
        model.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1])),
        model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1)),
    ]
    chat.ask("What is this?", PHOTO, **GREEDY)
    assert chat.last_answer is not None
    assert lengths[0] == chat.last_answer.prompt_tokens
    lengths.clear()
    chat.ask("And now?", **GREEDY)
    for hook in hooks:
        hook.remove()
    assert lengths[0] == chat.last_answer.prompt_tokens - chat.last_answer.cached_tokens
    assert lengths[0] < 0.5 * chat.last_answer.prompt_tokens
    assert set(lengths[1:]) == {1}
    assert calls == [1]


def test_another_image_is_not_answered_from_the_cache_of_the_first(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    chat.ask("What is this?", PHOTO, **GREEDY)
    chat.undo()
    second = chat.ask("What is this?", WIDE, **GREEDY)
    assert second == Chat(loaded).ask("What is this?", WIDE, **GREEDY)


def test_undo_and_reset_and_retry(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    assert chat.undo() is None
    with pytest.raises(YiVLError, match="no question to answer again"):
        chat.retry()
    first = chat.ask("What is this?", PHOTO, **GREEDY)
    chat.ask("And now?", **GREEDY)
    assert "".join(chat.retry(**GREEDY)) == chat.turns[-1].answer
    assert len(chat.turns) == 2
    assert chat.undo() is not None
    assert "".join(chat.retry(**GREEDY)) == first
    chat.reset()
    assert chat.turns == ()
    assert chat.last_answer is None
    assert chat.ask("What is this?", PHOTO, **GREEDY) == first


def test_several_images_in_one_question(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    chat.ask("Compare them.", [PHOTO, WIDE], **GREEDY)
    assert chat.last_answer is not None
    alone = Chat(loaded)
    alone.ask("Compare them.", PHOTO, **GREEDY)
    assert alone.last_answer is not None
    # 16 patches; 9 image tokens, a line break, <img> and </img>.
    added = {16: 16, 9: 12}[loaded.model.config.num_patches]
    assert chat.last_answer.prompt_tokens == alone.last_answer.prompt_tokens + added


def test_a_seed_makes_sampling_repeatable_and_leaves_the_generator_alone(loaded: LoadedModel) -> None:
    before = torch.get_rng_state()
    ask: dict[str, Any] = {"temperature": 2.0, "max_new_tokens": 10}
    answers = {seed: Chat(loaded).ask("hi", seed=seed, **ask) for seed in (1, 2, 3)}
    assert len(set(answers.values())) > 1
    for seed, answer in answers.items():
        assert Chat(loaded).ask("hi", seed=seed, **ask) == answer
    assert torch.equal(torch.get_rng_state(), before)


def test_beam_search_and_repetition_penalty_answer_and_the_conversation_continues(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    beams = chat.ask("What is this?", WIDE, num_beams=4, **GREEDY)
    chat.ask("And now?", **GREEDY)
    greedy = Chat(loaded).ask("What is this?", WIDE, **GREEDY)
    assert beams
    assert beams != greedy
    plain = Chat(loaded).ask("请描述这张图片。", PHOTO, temperature=0, max_new_tokens=30)
    penalized = Chat(loaded).ask("请描述这张图片。", PHOTO, temperature=0, max_new_tokens=30, repetition_penalty=5.0)
    assert penalized != plain


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 1e-40),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("seed", -1),
        ("seed", 2**70),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("num_beams", 0),
        ("repetition_penalty", 0.0),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
    ],
)
def test_sampling_values_out_of_range_are_refused(field: str, value: float, chat: Chat) -> None:
    with pytest.raises(YiVLError, match=f"{field}={value}"):
        chat.ask("hi", **{field: value})


def test_integers_are_accepted_as_floats(loaded: LoadedModel) -> None:
    whole = {"temperature": 2, "repetition_penalty": 2, "top_p": 1, "seed": 1, "max_new_tokens": 4}
    fractions = {
        name: float(value) if name in ("temperature", "repetition_penalty", "top_p") else value
        for name, value in whole.items()
    }
    for beams in (1, 2):
        assert Chat(loaded).ask("hi", **whole, num_beams=beams) == Chat(loaded).ask("hi", **fractions, num_beams=beams)


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_every_sampling_field_reaches_the_library(temperature: float, loaded: LoadedModel) -> None:
    sampling = Sampling(
        temperature=temperature, top_p=0.3, top_k=7, num_beams=2, repetition_penalty=1.5, max_new_tokens=9
    )
    config = sampling.generation_config(loaded.tokenizer, sampling.max_new_tokens, loaded.tokenizer.eos_token_id)
    assert config.do_sample == bool(temperature)
    assert (config.num_beams, config.repetition_penalty, config.max_new_tokens) == (2, 1.5, 9)
    if temperature:
        assert (config.temperature, config.top_p, config.top_k) == (0.5, 0.3, 7)


@pytest.mark.parametrize("loaded", ["Yi-VL"], indirect=True)
def test_the_stop_string_ends_an_answer_and_is_never_shown(loaded: LoadedModel) -> None:
    """Pair p7 of the golden vectors begins with it, where the reference shows it: a row of docs/fidelity.md."""
    chat = Chat(loaded)
    for question in ("What is in this image?", "图片里有什么？", *QUESTIONS):
        for piece in chat.stream(question, GOLDEN / "images/wide_rgb.png", temperature=0, max_new_tokens=32):
            assert "#" not in piece
        assert chat.last_answer is not None
        if chat.last_answer.finish_reason == "stop":
            return
        chat.reset()
    pytest.fail("no answer met the stop string")


def test_a_stop_event_ends_the_answer_and_keeps_its_text(chat: Chat) -> None:
    event = threading.Event()
    pieces = []
    for piece in chat.stream("hello", temperature=0, max_new_tokens=500, stop_event=event):
        pieces.append(piece)
        event.set()
    assert chat.last_answer is not None
    assert chat.last_answer.finish_reason == "cancelled"
    assert chat.last_answer.new_tokens < 20
    assert chat.turns[-1].answer == "".join(pieces)


def test_a_stop_event_ends_a_beam_search(chat: Chat) -> None:
    event, steps = threading.Event(), []
    hook = chat.loaded.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    event.set()
    chat.ask("hello", num_beams=3, temperature=0, max_new_tokens=50, stop_event=event)
    hook.remove()
    assert len(steps) < 5
    assert chat.last_answer is not None
    assert chat.last_answer.finish_reason == "cancelled"


def test_closing_the_stream_stops_the_answer(chat: Chat) -> None:
    pieces = chat.stream("hello", temperature=0, max_new_tokens=500)
    first = next(pieces)
    pieces.close()
    assert chat.turns[-1].answer == first
    assert chat.last_answer is not None
    assert chat.last_answer.finish_reason == "cancelled"
    assert chat.ask("And now?", **GREEDY) is not None


def test_a_conversation_that_does_not_fit_is_refused_before_anything_runs(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    with pytest.raises(ContextLengthError, match=r"takes \d+ positions and the context has 4096"):
        chat.stream("word " * 5000)
    assert chat.turns == ()


def test_an_answer_ends_with_the_context() -> None:
    small = load_model(CHECKPOINT, device="cpu")
    small.model.config.max_position_embeddings = 100
    chat = Chat(small)
    chat.ask("你好", temperature=0, max_new_tokens=500)
    assert chat.last_answer is not None
    assert chat.last_answer.prompt_tokens + chat.last_answer.new_tokens <= 100
    assert chat.last_answer.finish_reason == "length"


def test_an_unusable_image_leaves_the_conversation_unchanged(chat: Chat) -> None:
    chat.ask("What is this?", PHOTO, **GREEDY)
    with pytest.raises(ImageError):
        chat.ask("And this?", GOLDEN / "manifest.json")
    assert len(chat.turns) == 1
    chat.ask("And now?", **GREEDY)
    assert chat.last_answer is not None
    assert chat.last_answer.cached_tokens > 0


def test_an_error_while_generating_reaches_the_caller(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    expected = Chat(chat.loaded).ask("hi", **GREEDY)
    monkeypatch.setattr(chat.loaded.model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="boom"):
        chat.ask("hi", **GREEDY)
    monkeypatch.undo()
    assert chat.turns == ()
    assert chat.ask("hi", **GREEDY) == expected


def test_the_next_question_ends_an_unfinished_answer(loaded: LoadedModel) -> None:
    chat, reference = Chat(loaded), Chat(loaded)
    left = chat.stream("hello", temperature=0, max_new_tokens=500)
    first = next(left)
    answer = chat.ask("And now?", **GREEDY)
    assert list(left) == []
    assert [turn.answer for turn in chat.turns] == [first, answer]
    stopped = reference.stream("hello", temperature=0, max_new_tokens=500)
    next(stopped)
    stopped.close()
    assert reference.ask("And now?", **GREEDY) == answer


def test_a_question_cancelled_before_its_first_token_adds_no_turn(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.ask("What is this?", PHOTO, **GREEDY)
    before = chat.turns

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.loaded.model.lm_head, "forward", interrupt)
    for begin in (lambda: chat.retry(**GREEDY), lambda: chat.stream("And now?", **GREEDY)):
        with pytest.raises(KeyboardInterrupt):
            next(begin())
        assert chat.turns == before


def test_unpaired_surrogates_are_no_error(chat: Chat) -> None:
    assert chat.ask("caf\udce9 \ud83d", **GREEDY) is not None


def test_a_retry_that_fails_keeps_the_old_answer(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat.ask("What is this?", PHOTO, **GREEDY)
    before = chat.turns

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(chat.loaded.model.lm_head, "forward", fail)
    with pytest.raises(RuntimeError, match="boom"):
        list(chat.retry(**GREEDY))
    monkeypatch.undo()
    assert chat.turns == before
    assert "".join(chat.retry(**GREEDY)) == before[0].answer


def test_ctrl_c_in_the_middle_of_a_step_leaves_a_valid_conversation(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, reference = Chat(loaded), Chat(loaded)
    pieces = chat.stream("hello", temperature=0, max_new_tokens=500)
    next(pieces)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        loaded.model.model.layers[2].mlp.up_proj, "forward", interrupt
    )  # layers 0 to 2 hold the new position
    with pytest.raises(KeyboardInterrupt):
        next(pieces)
    monkeypatch.undo()
    stopped = reference.stream("hello", temperature=0, max_new_tokens=500)
    next(stopped)
    stopped.close()
    assert chat.turns == reference.turns
    assert chat.ask("And now?", **GREEDY) == reference.ask("And now?", **GREEDY)


def test_two_conversations_share_a_model(loaded: LoadedModel) -> None:
    first, second = Chat(loaded), Chat(loaded)
    expected = [Chat(loaded).ask("What is this?", image, **GREEDY) for image in (PHOTO, WIDE)]
    threads = [
        threading.Thread(target=chat.ask, args=("What is this?", image), kwargs=GREEDY)
        for chat, image in ((first, PHOTO), (second, WIDE))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [first.turns[0].answer, second.turns[0].answer] == expected


def test_another_system_message_changes_the_prompt(loaded: LoadedModel) -> None:
    chat = Chat(loaded, system="Be brief.")
    chat.ask("hi", **GREEDY)
    default = Chat(loaded)
    default.ask("hi", **GREEDY)
    assert chat.last_answer is not None
    assert default.last_answer is not None
    assert chat.last_answer.prompt_tokens < default.last_answer.prompt_tokens


def test_a_restored_conversation_continues_like_the_original(loaded: LoadedModel) -> None:
    here, there = Chat(loaded), Chat(loaded)
    here.ask("What is this?", PHOTO, **GREEDY)
    there.restore(here.turns, [[PHOTO]])
    assert there.ask("And now?", **GREEDY) == here.ask("And now?", **GREEDY)
    with pytest.raises(ValueError, match="differ in number"):
        there.restore(here.turns, [[], []])
    with pytest.raises(ValueError, match="no answer"):
        there.restore([Turn("hi")], [[]])
    assert there.turns == here.turns


def test_an_encoded_image_serves_several_chats(loaded: LoadedModel) -> None:
    first, second = Chat(loaded), Chat(loaded)
    photo, wide = first.encode(PHOTO), first.encode(WIDE)
    calls: list[int] = []
    hook = loaded.model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    answers = [chat.ask("What is this?", image, **GREEDY) for chat in (first, second) for image in (photo, wide)]
    hook.remove()
    assert calls == []
    assert answers[0] == Chat(loaded).ask("What is this?", PHOTO, **GREEDY)
    assert answers[:2] == answers[2:]


def test_a_retry_during_the_second_answer_asks_the_second_question(loaded: LoadedModel) -> None:
    chat = Chat(loaded)
    chat.ask("What is this?", PHOTO, **GREEDY)
    second = chat.stream("hello", temperature=0, max_new_tokens=500)
    next(second)
    answer = "".join(chat.retry(**GREEDY))
    assert [turn.question for turn in chat.turns] == ["What is this?", "hello"]
    reference = Chat(loaded)
    reference.ask("What is this?", PHOTO, **GREEDY)
    assert answer == reference.ask("hello", **GREEDY)


def test_a_retry_during_the_first_answer_asks_the_first_question(chat: Chat) -> None:
    next(chat.stream("hello", temperature=0, max_new_tokens=500))
    assert "".join(chat.retry(**GREEDY)) == Chat(chat.loaded).ask("hello", **GREEDY)
    assert len(chat.turns) == 1


def test_a_stream_that_never_started_leaves_the_cache(chat: Chat) -> None:
    chat.ask("What is this?", PHOTO, **GREEDY)
    chat.stream("hello", **GREEDY)
    chat.ask("And now?", **GREEDY)
    assert chat.last_answer is not None
    assert chat.last_answer.cached_tokens > 20


PARTS = st.lists(st.sampled_from(["#", "##", "a", "aba", " ", "\n", "\N{REPLACEMENT CHARACTER}", "你", STOP_STRING]))
STOPS = st.lists(st.sampled_from(["ab", "a\n", "##a", "你 ", "bab", "\n\na"]), max_size=2)


def cut(text: str, stops: list[str]) -> str:
    """The answer as a whole: up to the first stop string, without outer whitespace."""
    return text[: min([place for stop in stops if (place := text.find(stop)) >= 0], default=None)].strip()


@given(PARTS, STOPS)
def test_streamed_text_is_never_taken_back_and_is_the_cut_answer(parts: list[str], more: list[str]) -> None:
    stops = [STOP_STRING, *more]
    answer = AnswerText(stops)
    text, shown = "", ""
    for part in parts:
        text += part
        shown += answer.add(part)
        assert answer.is_stopped == any(stop in text for stop in stops)
        assert not any(stop in shown for stop in stops)
        if answer.is_stopped:
            break  # there is no text after it
        held = text.strip()[len(shown) :]
        assert text.strip().startswith(shown)
        assert not held or any(held.strip() in stop or stop.startswith(held.strip()[-1]) for stop in stops)
    shown += answer.end()
    assert shown == answer.text == cut(text, stops)
