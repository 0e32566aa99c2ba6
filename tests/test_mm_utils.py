"""Code written against the reference implementation runs on this package."""

import base64

import pytest
import torch
from PIL import Image
from support.golden import CHECKPOINT, GOLDEN, golden_arrays, golden_json

from yivl.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from yivl.conversation import conv_templates
from yivl.mm_utils import (
    KeywordsStoppingCriteria,
    expand2square,
    get_model_name_from_path,
    load_image_from_base64,
    load_pretrained_model,
    process_images,
    tokenizer_image_token,
)


def test_the_calls_of_the_reference_give_its_answer() -> None:
    """The order of calls of 01-ai/Yi, VL/single_inference.py."""
    pair = golden_json("generation")["pairs"][1]
    question = "图片里有什么？"
    tokenizer, model, image_processor, context_length = load_pretrained_model(
        str(CHECKPOINT), device_map="cpu", torch_dtype=torch.float32
    )
    assert context_length == 4096
    conversation = conv_templates["mm_default"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question}")
    conversation.append_message(conversation.roles[1], None)
    input_ids = tokenizer_image_token(
        conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt"
    ).unsqueeze(0)
    assert input_ids[0].tolist() == pair["input_ids"]
    with Image.open(GOLDEN / "images" / pair["image"]) as image:
        square = expand2square(image, tuple(int(x * 255) for x in image_processor.image_mean))
    pixels = image_processor.preprocess(square, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, golden_arrays("features")["p1__pixel_values"], atol=1e-5, rtol=0)
    criteria = KeywordsStoppingCriteria([conversation.sep], tokenizer, input_ids)
    with torch.inference_mode():
        output_ids = model.generate(
            input_ids,
            images=pixels.unsqueeze(0),
            do_sample=False,
            num_beams=1,
            stopping_criteria=[criteria],
            max_new_tokens=32,
            use_cache=True,
        )
    assert (input_ids != output_ids[:, : input_ids.shape[1]]).sum() == 0
    outputs = tokenizer.batch_decode(output_ids[:, input_ids.shape[1] :], skip_special_tokens=True)[0].strip()
    assert outputs.removesuffix(conversation.sep).strip() == pair["stop"]["text_clean"]


def test_the_quantization_flags_work() -> None:
    _, model, _, _ = load_pretrained_model(CHECKPOINT, load_8bit=True, device_map="cpu")
    assert model.is_quantized


def test_process_images_follows_the_configuration() -> None:
    _, model, image_processor, _ = load_pretrained_model(CHECKPOINT, device_map="cpu")
    recorded = golden_arrays("image_pixels")
    with Image.open(GOLDEN / "images/wide_rgb.png") as image:
        for aspect_ratio, key in (("pad", "wide_rgb__single_inference"), ("square", "wide_rgb__cli")):
            model.config.image_aspect_ratio = aspect_ratio
            pixels = process_images([image], image_processor, model.config)
            torch.testing.assert_close(pixels[0], recorded[key], atol=1e-5, rtol=0)


def test_gray_images_are_padded_where_the_reference_crashes() -> None:
    with Image.open(GOLDEN / "images/gray_nonsquare_L.png") as image:
        square = expand2square(image, (122, 116, 104))
    assert square.mode == "RGB"
    assert square.getpixel((0, 0)) == (122, 116, 104)


@pytest.mark.parametrize(
    ("path", "name"),
    [("01-ai/Yi-VL-6B", "Yi-VL-6B"), ("out/run/checkpoint-7/", "run_checkpoint-7")],
)
def test_model_names(path: str, name: str) -> None:
    assert get_model_name_from_path(path) == name


def test_base64_images() -> None:
    data = base64.b64encode((GOLDEN / "images/photo_rgb.jpg").read_bytes()).decode()
    assert load_image_from_base64(data).size == (320, 213)


def test_constants() -> None:
    assert (IMAGE_TOKEN_INDEX, IGNORE_INDEX, DEFAULT_IMAGE_TOKEN) == (-200, -100, "<image_placeholder>")
