"""FlashAttention without a GPU: what its functions are called with, and that the results are those of SDPA."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import flash_attention
from support.flash_attention import Call
from support.golden import CHECKPOINT, GOLDEN
from transformers.utils import is_flash_attn_2_available

from yivl.checkpoint import support
from yivl.checkpoint.loading import LoadedModel, load_model, read_small_files
from yivl.checkpoint.support import check_support
from yivl.command_line import EMBEDDED_MODEL
from yivl.errors import YiVLError
from yivl.inference.chat import Chat, answer_batch
from yivl.inference.decoding import supports
from yivl.inference.engine import Engine
from yivl.model.attention import register_packed_sdpa
from yivl.model.modeling import YiVLForCausalLM
from yivl.train.arguments import parse_arguments
from yivl.train.parameters import enable_gradient_checkpointing, upcast_trainable_params

FLASH = "flash_attention_2"
CATS = GOLDEN.parent.parent / "images/cats.jpg"
# Three rows packed into one sequence: an image between text, text alone, an image first. 16 patches each.
ROWS = [[294, 332, -200, 725, 19], [1, 5, 9, 300, 301, 302, 17], [-200, 748, 12]]
LENGTHS = [20, 7, 18]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    return flash_attention.install(monkeypatch)


def half_precision(attention: str, folder: str | Path = CHECKPOINT) -> YiVLForCausalLM:
    return YiVLForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation=attention).eval()


def packed_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[token for row in ROWS for token in row]])
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(ids < 0, -100),
        "row_lengths": torch.tensor([len(row) for row in ROWS]),
        "images": torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1)),
    }


def test_packed_rows_are_told_apart_by_their_ends(calls: list[Call]) -> None:
    model = half_precision(FLASH)
    fused = model.fuse(**packed_batch())
    assert fused.position_ids[0].tolist() == [position for length in LENGTHS for position in range(length)]
    assert fused.attention_mask is None
    calls.clear()
    model(**packed_batch())
    num_vision, num_layers = model.config.num_vision_layers, model.config.num_hidden_layers
    vision, decoder = calls[:num_vision], calls[num_vision:]
    assert {(call.is_causal, call.ends) for call in vision} == {(False, None)}
    assert len(decoder) == num_layers
    for call in decoder:
        assert call.is_causal
        assert call.ends == call.key_ends == [0, 20, 27, 45]
        assert call.longest == (20, 20)
        assert call.query[0] == call.key[0] == 45


@pytest.mark.parametrize("is_mixed", [False, True], ids=["weights in bfloat16", "mixed precision"])
def test_packed_rows_have_the_loss_and_gradients_of_packed_sdpa(calls: list[Call], is_mixed: bool) -> None:
    """In mixed precision the rotary embeddings leave queries and keys in float32, and values in bfloat16."""
    found = {}
    for name in (FLASH, register_packed_sdpa()):
        model = half_precision(name).train()
        if is_mixed:
            upcast_trainable_params(model)
        enable_gradient_checkpointing(model, language_model=True, vision_tower=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            loss = model(**packed_batch(), num_items_in_batch=40).loss
        loss.backward()
        gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
        found[name] = loss.detach(), gradients
    assert calls
    (loss, gradients), (expected_loss, expected) = found.values()
    torch.testing.assert_close(loss, expected_loss, atol=0, rtol=1e-3)
    assert gradients.keys() == expected.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(value, expected[key], atol=2e-2 * float(expected[key].abs().max()), rtol=0)


@pytest.fixture(scope="module")
def trained() -> LoadedModel:
    """The small model of the package, whose answers do not depend on the rounding of an attention kernel."""
    return load_model(EMBEDDED_MODEL, device="cpu", dtype="float32")


def with_flash(loaded: LoadedModel) -> LoadedModel:
    model = half_precision(FLASH, EMBEDDED_MODEL)
    assert not supports(model)
    return LoadedModel(model, loaded.tokenizer, loaded.image_processor, loaded.name)


def test_answers_alone_and_in_a_padded_batch_are_those_of_sdpa(calls: list[Call], trained: LoadedModel) -> None:
    questions = ["What is in this image?", "图里有什么？", "How many cats are there?"]
    images = [CATS, CATS, CATS]
    greedy: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    expected = [Chat(trained).ask(question, CATS, **greedy) for question in questions]
    loaded = with_flash(trained)
    calls.clear()
    assert answer_batch(loaded, questions, images, **greedy) == expected
    assert {call.query[1] == call.key[1] for call in calls if call.ends is None and call.query[1] > 1} == {True}
    steps = [call for call in calls if call.ends == [0, 1, 2, 3]]
    assert steps
    for call in steps:  # one query per row; keys without the padding on the left
        assert call.key_ends is not None
        assert call.key_ends[-1] == call.key[0]
        assert call.longest is not None
        assert call.longest[0] == 1
    assert Chat(loaded).ask(questions[0], CATS, **greedy) == expected[0]
    assert Chat(loaded).ask(questions[0], CATS, num_beams=2, **greedy) == Chat(trained).ask(
        questions[0], CATS, num_beams=2, **greedy
    )


def test_a_prompt_in_parts_ends_at_the_last_key(calls: list[Call], trained: LoadedModel) -> None:
    state = Chat(trained).begin("What is in this image?", CATS, temperature=0, max_new_tokens=8)
    loaded = with_flash(trained)
    expected = Chat(trained).ask("What is in this image?", CATS, temperature=0, max_new_tokens=8)
    engine = Engine(loaded)
    prefill = engine.start(state)
    calls.clear()
    while (text := engine.advance(prefill, 7)) is None:
        pass
    assert all(call.key[1] >= call.query[1] and call.is_causal for call in calls)
    assert {call.query[1] for call in calls} > {7}
    while len(engine):
        ((_, piece),) = engine.step()
        text += piece
    assert text == expected


def test_what_has_no_kernels_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    config, *_ = read_small_files(CHECKPOINT)
    with pytest.raises(YiVLError, match="flash_attention_2 needs the flash-attn package and a GPU"):
        check_support(config, FLASH)
    monkeypatch.setattr(support, "is_flash_attn_2_available", lambda: True)
    check_support(config, FLASH, dtype=torch.bfloat16)
    with pytest.raises(YiVLError, match="needs the flash-attn package and a GPU; use --attn-implementation sdpa"):
        load_model(CHECKPOINT, device="cpu", dtype="bfloat16", attn_implementation="flash_attention_2")
    with pytest.raises(YiVLError, match="flash_attention_2 has no kernels for float32; use --dtype bfloat16"):
        load_model(CHECKPOINT, device={"": "meta"}, attn_implementation="flash_attention_2")
    given = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--attn_implementation", FLASH]
    with pytest.raises(YiVLError, match=re.escape(f"{FLASH}: has no kernels for float32; add --bf16 True")):
        parse_arguments(given)
    for precision in ("--bf16", "--fp16"):
        assert parse_arguments([*given, precision, "True"]).model.attn_implementation == FLASH


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
def test_the_package_itself_has_the_loss_and_answers_of_sdpa(trained: LoadedModel) -> None:
    batch = {name: value.to("cuda") for name, value in packed_batch().items()}
    losses = [half_precision(name).to("cuda")(**batch).loss for name in (FLASH, register_packed_sdpa())]
    torch.testing.assert_close(*losses, atol=0, rtol=2e-3)
    loaded = load_model(EMBEDDED_MODEL, device="cuda", dtype="bfloat16", attn_implementation="flash_attention_2")
    questions = ["What is in this image?", "图里有什么？"]
    greedy: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12}
    expected = [Chat(trained).ask(question, CATS, **greedy) for question in questions]
    assert answer_batch(loaded, questions, [CATS, CATS], **greedy) == expected
