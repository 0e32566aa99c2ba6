"""The same results on a GPU as on the CPU. Without a GPU, the same code runs on the CPU in another form."""

import importlib.util
from typing import Any

import pytest
import torch
from support import golden_internvl
from support.golden import CHECKPOINT, ROOT, golden_arrays, golden_json

from yivl.checkpoint.loading import load_model
from yivl.command_line import EMBEDDED_MODEL
from yivl.inference.chat import Chat, answer_batch
from yivl.inference.compilation import compile_decoding
from yivl.model.attention import register_packed_sdpa
from yivl.model.modeling import YiVLForCausalLM

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PAIRS = golden_json("generation")["pairs"]
FEATURES, LOGITS = golden_arrays("features"), golden_arrays("logits")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""That of the CPU (``test_golden_model``)."""

CATS, OWLS = ROOT / "images/cats.jpg", ROOT / "images/owls.jpg"
QUESTIONS = ["What is in this image?", "图里有什么？", "How many cats are there?", "What color is the cat?"]
IMAGES = [CATS, CATS, CATS, None]
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24}

# Packed rows, and the same rows padded on the right: an image between text, text alone, an image first.
ROWS = [[294, 332, -200, 725, 19], [1, 5, 9, 300, 301, 302, 17], [-200, 748, 12]]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_GPU)])
def device(request: pytest.FixtureRequest) -> str:
    """A device that computes float32 in float32: by default, convolutions are computed in TF32 on a GPU."""
    torch.backends.cudnn.allow_tf32 = False
    return str(request.param)


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """The answers of the small model of the package on the CPU in float32, one conversation at a time."""
    loaded = load_model(EMBEDDED_MODEL, device="cpu", dtype="float32")
    return [Chat(loaded).ask(question, image, **GREEDY) for question, image in zip(QUESTIONS, IMAGES, strict=True)]


def inputs(pair: dict[str, Any], device: str) -> dict[str, Any]:
    ids = torch.tensor([pair["input_ids"]], device=device)
    images = FEATURES[f"{pair['id']}__pixel_values"][None].to(device) if -200 in pair["input_ids"] else None
    return {"inputs": ids, "images": images}


def test_float32_logits_and_greedy_tokens_equal_the_reference(device: str) -> None:
    model = load_model(CHECKPOINT, device=device, dtype="float32").model
    for pair in PAIRS:
        given = inputs(pair, device)
        with torch.no_grad():
            logits = model(given["inputs"], images=given["images"]).logits[0].cpu()
        torch.testing.assert_close(logits[pair["logits_start"] :], LOGITS[f"{pair['id']}__logits"], **TOLERANCE)
        output = model.generate(**given, do_sample=False, max_new_tokens=32)
        assert output[0, len(pair["input_ids"]) :].tolist() == pair["no_stop"]["ids"]


INTERNVL_TURNS = [chat["turns"][0] for chat in golden_internvl.golden_json("chat")["chats"][:2]]


def internvl_logits(model: Any, device: str) -> torch.Tensor:
    """Return the logits of the first recorded prompt of InternVL-Chat, on the CPU."""
    model.img_context_token_id = golden_internvl.golden_json("prompts")["special_ids"]["<IMG_CONTEXT>"]
    pixels = golden_internvl.pixels_of(INTERNVL_TURNS[0]["images"])
    assert pixels is not None
    ids = torch.tensor([INTERNVL_TURNS[0]["input_ids"]], device=device)
    with torch.no_grad():
        logits: torch.Tensor = model(ids, pixel_values=pixels.to(model.device, model.dtype)).logits[0].float().cpu()
        return logits


def test_logits_and_greedy_answers_of_internvl_equal_the_original(device: str) -> None:
    loaded = load_model(golden_internvl.CHECKPOINT, device=device, dtype="float32")
    expected = golden_internvl.golden_arrays("logits")["img_en_0__logits"]
    torch.testing.assert_close(internvl_logits(loaded.model, device), expected, **TOLERANCE)
    for turn in INTERNVL_TURNS:
        images = [ROOT / "tests/golden_internvl/images" / name for name in turn["images"]]
        chat = Chat(loaded)
        assert chat.ask(turn["question"], images, temperature=0, max_new_tokens=24) == turn["response"]
        assert chat.last_answer is not None
        assert chat.last_answer.new_tokens == len(turn["generated_ids"])


@pytest.mark.parametrize(("bits", "tolerance"), [("load_in_8bit", 0.05), ("load_in_4bit", 0.5)])
def test_a_quantized_internvl_is_close_to_the_original(device: str, bits: str, tolerance: float) -> None:
    if device == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    flags: dict[str, Any] = {bits: True}
    model = load_model(golden_internvl.CHECKPOINT, device=device, dtype="bfloat16", **flags).model
    expected = golden_internvl.golden_arrays("logits")["img_en_0__logits"]
    assert (internvl_logits(model, device) - expected).norm() / expected.norm() < tolerance


def test_bfloat16_logits_agree_with_the_reference(device: str) -> None:
    model = load_model(CHECKPOINT, device=device, dtype="bfloat16").model
    for pair in PAIRS:
        given = inputs(pair, device)
        with torch.no_grad():
            logits = model(given["inputs"], images=given["images"]).logits[0].float().cpu()
        expected = LOGITS[f"{pair['id']}__logits"]
        similarity = torch.nn.functional.cosine_similarity(logits[pair["logits_start"] :], expected, dim=-1)
        assert similarity.min() > 0.995


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_in_a_batch_are_those_of_the_cpu_alone(device: str, dtype: Any, answers: list[str]) -> None:
    """The rows of the batch have other lengths, and leave it at different steps."""
    loaded = load_model(EMBEDDED_MODEL, device=device, dtype=dtype)
    assert answer_batch(loaded, QUESTIONS, IMAGES, **GREEDY) == answers


def test_chats_beams_and_samples_are_those_of_the_cpu(device: str, answers: list[str]) -> None:
    """A conversation with several images: later turns reuse the keys and values of earlier ones."""
    loaded = load_model(EMBEDDED_MODEL, device=device, dtype="float32")
    expected = Chat(load_model(EMBEDDED_MODEL, device="cpu", dtype="float32"), reuse_cache=False)
    chat = Chat(loaded)
    for question, image in (*zip(QUESTIONS[:2], IMAGES, strict=False), ("And here?", OWLS)):
        assert chat.ask(question, image, **GREEDY) == expected.ask(question, image, **GREEDY)
    assert chat.last_answer is not None
    assert chat.last_answer.cached_tokens > 0
    assert Chat(loaded).ask(QUESTIONS[0], CATS, **GREEDY | {"num_beams": 2})
    sampled = [Chat(loaded).ask(QUESTIONS[0], CATS, temperature=1.5, seed=4, max_new_tokens=12) for _ in range(2)]
    assert sampled[0] == sampled[1] != ""


@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_quantized_model_answers(device: str, bits: str, answers: list[str]) -> None:
    if device == "cuda" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    loaded = load_model(EMBEDDED_MODEL, device=device, dtype="bfloat16", **{bits: True})  # type: ignore[arg-type]
    found = answer_batch(loaded, QUESTIONS, IMAGES, **GREEDY)
    assert sum(answer == expected for answer, expected in zip(found, answers, strict=True)) >= len(answers) - 1


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_compiled_decoding_gives_the_same_answers(device: str, answers: list[str]) -> None:
    """On the CPU: tests/inference/test_compilation.py."""
    loaded = compile_decoding(load_model(EMBEDDED_MODEL, device=device, dtype="float32"))
    assert answer_batch(loaded, QUESTIONS, IMAGES, **GREEDY) == answers
    assert [Chat(loaded).ask(*asked, **GREEDY) for asked in zip(QUESTIONS, IMAGES, strict=True)] == answers


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_a_model_split_over_gpu_and_cpu_gives_the_same_logits(device: str) -> None:
    names = ("vision_tower", "mm_projector", "embed_tokens", "norm", "rotary_emb")
    plan: dict[str, Any] = {f"model.{name}": 0 for name in names} | {"lm_head": 0}
    plan |= {f"model.layers.{index}": 0 if index % 2 else "cpu" for index in range(4)}
    model = load_model(CHECKPOINT, device=plan).model
    given = inputs(PAIRS[0], device)
    with torch.no_grad():
        logits = model(given["inputs"], images=given["images"]).logits[0].cpu()
    torch.testing.assert_close(logits[PAIRS[0]["logits_start"] :], LOGITS["p0__logits"], **TOLERANCE)


def training_step(model: YiVLForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the loss and the gradients, on the CPU."""
    loss = model.train()(**{name: value.to(model.device) for name, value in batch.items()}, num_items_in_batch=9).loss
    loss.backward()
    gradients = {name: value.grad.cpu() for name, value in model.named_parameters() if value.grad is not None}
    return loss.detach().cpu(), gradients


def test_a_step_over_packed_rows_is_that_over_padded_rows_on_the_cpu(device: str) -> None:
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ROWS], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in ROWS], batch_first=True).long()
    labels = padded.masked_fill((padded < 0) | (mask == 0), -100)
    batch = {"input_ids": padded, "attention_mask": mask, "labels": labels, "images": images}
    expected_loss, expected = training_step(load_model(CHECKPOINT, device="cpu").model, batch)
    model = YiVLForCausalLM.from_pretrained(CHECKPOINT, attn_implementation=register_packed_sdpa()).to(device)
    packed = torch.tensor([[token for row in ROWS for token in row]])
    batch = {"input_ids": packed, "labels": packed.masked_fill(packed < 0, -100), "images": images}
    loss, gradients = training_step(model, batch | {"row_lengths": torch.tensor([len(row) for row in ROWS])})
    torch.testing.assert_close(loss, expected_loss, **TOLERANCE)
    assert gradients.keys() == expected.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(value, expected[name], atol=1e-4 * float(expected[name].abs().max()), rtol=1e-3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)], indirect=True)
def test_memory_that_runs_out_is_recognized(device: str) -> None:
    from yivl.command_line import is_out_of_memory

    with pytest.raises(torch.OutOfMemoryError) as error:
        torch.empty(2**50, dtype=torch.uint8, device=device)
    assert is_out_of_memory(error.value)
