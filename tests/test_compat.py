"""Code that wraps the reference imports ``llava`` from ``compat/VL`` and gets the answers of ``Chat``."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.golden import CHECKPOINT, GOLDEN, ROOT, golden_json

from yivl import constants, conversation, mm_utils
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.inference.chat import Chat

COMPAT = ROOT / "compat"
IMAGES = GOLDEN / "images"

# The steps of vlmeval/vlm/yi_vl.py of VLMEvalKit in its order, with a dtype and a device that may be chosen.
WRAPPER = """
import json
import os
import sys

import torch
from PIL import Image

root, model_path, dtype, *asked = sys.argv[1:]
sys.path.append(os.path.join(root, "VL"))

config_file = os.path.join(model_path, "config.json")
config = json.load(open(config_file))
config["mm_vision_tower"] = os.path.join(model_path, config["mm_vision_tower"])
json.dump(config, open(config_file, "w"))

from llava.mm_utils import get_model_name_from_path, load_pretrained_model
from llava.model.constants import key_info

setattr(torch.nn.Linear, "reset_parameters", lambda self: None)
setattr(torch.nn.LayerNorm, "reset_parameters", lambda self: None)
key_info["model_path"] = model_path
get_model_name_from_path(model_path)
tokenizer, model, image_processor, context_len = load_pretrained_model(model_path, device_map="cpu")

for image_path, question in zip(asked[::2], asked[1::2]):
    from llava.conversation import conv_templates
    from llava.mm_utils import KeywordsStoppingCriteria, expand2square, tokenizer_image_token
    from llava.model.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

    conv = conv_templates["mm_default"].copy()
    conv.append_message(conv.roles[0], DEFAULT_IMAGE_TOKEN + "\\n" + question)
    conv.append_message(conv.roles[1], None)
    input_ids = tokenizer_image_token(conv.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
    image = Image.open(image_path)
    if getattr(model.config, "image_aspect_ratio", None) == "pad":
        means = [int(x * 255) for x in image_processor.image_mean]
        image = expand2square(image, int(sum(means) / 3) if image.mode == "L" else tuple(means))
    image_tensor = image_processor.preprocess(image, return_tensors="pt")["pixel_values"][0]
    stopping_criteria = KeywordsStoppingCriteria([conv.sep], tokenizer, input_ids)
    model = model.to(dtype=getattr(torch, dtype))
    with torch.inference_mode():
        output_ids = model.generate(
            input_ids,
            images=image_tensor.unsqueeze(0).to(dtype=getattr(torch, dtype)),
            stopping_criteria=[stopping_criteria],
            use_cache=True,
            temperature=0.2,
            num_beams=1,
            do_sample=False,
            max_new_tokens=32,
            top_p=None,
        )
    input_token_len = input_ids.shape[1]
    assert (input_ids != output_ids[:, :input_token_len]).sum().item() == 0
    outputs = tokenizer.batch_decode(output_ids[:, input_token_len:], skip_special_tokens=True)[0].strip()
    print(json.dumps(outputs.removesuffix(conv.sep).strip()))
"""

# The steps of swift/model/models/yi.py and swift/template/templates/yi.py of ms-swift.
PIECES = """
import json
import os
import sys

import torch
from PIL import Image
from transformers import AutoTokenizer

local_repo_path, model_dir, image_path, question = sys.argv[1:]
sys.path.append(os.path.join(local_repo_path, "VL"))
from llava.mm_utils import expand2square
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.constants import key_info
from llava.conversation import default_conversation

config = LlavaConfig.from_pretrained(model_dir)
config.mm_vision_tower = os.path.join(model_dir, *config.mm_vision_tower.rsplit("/", maxsplit=2)[-2:])
config.attention_dropout = 0.0
if not hasattr(config, "max_sequence_length"):
    config.max_sequence_length = 2048
tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True, use_fast=False)
key_info["model_path"] = model_dir
model = LlavaLlamaForCausalLM.from_pretrained(
    model_dir, config=config, torch_dtype=config.torch_dtype, trust_remote_code=True, low_cpu_mem_usage=True
)
vision_tower = model.get_vision_tower()
vision_tower.load_model()
vision_tower.to(device=model.device, dtype=config.torch_dtype)
model.resize_token_embeddings(len(tokenizer))

image_processor = model.model.vision_tower.image_processor
image = expand2square(Image.open(image_path), tuple(int(x * 255) for x in image_processor.image_mean))
pixels = image_processor.preprocess([image], return_tensors="pt")["pixel_values"].to(model.dtype)
(stop,) = tokenizer("###", add_special_tokens=False).input_ids
system = default_conversation.system + "\\n\\n"
context = [system, [stop], " Human: ", [-200], "\\n" + question + "\\n", [stop], " Assistant:"]
input_ids = []
for part in context:
    input_ids += part if isinstance(part, list) else tokenizer(part, add_special_tokens=False).input_ids
output_ids = model.generate(
    input_ids=torch.tensor([input_ids]), images=pixels, do_sample=False, max_new_tokens=32, eos_token_id=[2, stop]
)
answer = tokenizer.decode(output_ids[0, len(input_ids):], skip_special_tokens=True)
print(json.dumps({"input_ids": input_ids, "answer": answer.removesuffix("###").strip()}))
"""


def run(script: str, folder: Path, *arguments: object) -> list[Any]:
    """Run a script in another folder and return the JSON lines it prints; it finds ``llava`` by its arguments."""
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def greedy(loaded: LoadedModel, image: str, question: str) -> str:
    return Chat(loaded).ask(question, IMAGES / image, temperature=0, max_new_tokens=32)


ASKED = [("wide_rgb.png", "图片里有什么？"), ("photo_rgb.jpg", "Why do you think so?")]


def test_a_wrapper_of_the_reference_gives_the_recorded_answer_and_those_of_chat(
    tmp_path: Path, loaded: LoadedModel
) -> None:
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "Yi-VL")
    # Such wrappers pad a gray image with one number: the image in RGB, padded in that gray.
    square = mm_utils.expand2square(Image.open(IMAGES / "gray_nonsquare_L.png"), (114, 114, 114))
    square.save(tmp_path / "square.png")
    gray = [(tmp_path / "square.png", "图片里有什么？"), (IMAGES / "gray_nonsquare_L.png", "图片里有什么？")]
    asked = [(IMAGES / image, question) for image, question in ASKED] + gray
    answers = run(WRAPPER, tmp_path, COMPAT, checkpoint, "float32", *(word for pair in asked for word in pair))
    pair = golden_json("generation")["pairs"][1]
    assert answers[0] == pair["stop"]["text_clean"]
    assert answers[:2] == [greedy(loaded, *pair) for pair in ASKED]
    assert answers[2] == answers[3]
    assert answers[2] == greedy(loaded, str(tmp_path / "square.png"), "图片里有什么？")


def test_a_wrapper_that_casts_the_model_gives_the_answers_of_a_model_loaded_in_that_dtype(tmp_path: Path) -> None:
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "Yi-VL")
    asked = [word for image, question in ASKED for word in (IMAGES / image, question)]
    answers = run(WRAPPER, tmp_path, COMPAT, checkpoint, "bfloat16", *asked)
    loaded = load_model(CHECKPOINT, device="cpu", dtype="bfloat16")
    assert answers == [greedy(loaded, *pair) for pair in ASKED]


def test_a_wrapper_that_loads_the_model_in_pieces_gives_the_recorded_answer(tmp_path: Path) -> None:
    pair = golden_json("generation")["pairs"][1]
    (result,) = run(PIECES, tmp_path, COMPAT, CHECKPOINT, IMAGES / pair["image"], "图片里有什么？")
    assert result == {"input_ids": pair["input_ids"], "answer": pair["stop"]["text_clean"]}


def test_a_cast_keeps_the_rotary_frequencies_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(COMPAT / "VL")
    from llava.mm_utils import load_pretrained_model
    from llava.model import LlavaLlamaForCausalLM

    in_pieces = LlavaLlamaForCausalLM.from_pretrained(CHECKPOINT)
    for model in (load_pretrained_model(CHECKPOINT, device_map="cpu")[1], in_pieces):
        exact = model.model.rotary_emb.inv_freq.clone()
        assert not torch.equal(exact.bfloat16().float(), exact)
        cast = model.to(dtype=torch.bfloat16)
        assert cast.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(cast.model.rotary_emb.inv_freq, exact)


def test_the_module_paths_of_the_reference_hold_the_names_of_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(COMPAT / "VL")
    import llava.conversation
    import llava.mm_utils
    import llava.model.constants

    for theirs, ours in (
        (llava.conversation, conversation),
        (llava.mm_utils, mm_utils),
        (llava.model.constants, constants),
    ):
        shared = set(theirs.__all__) - {"SeparatorStyle", "default_conversation", "key_info", "load_pretrained_model"}
        assert shared
        for name in shared:
            assert getattr(theirs, name) is getattr(ours, name)
    assert set(llava.mm_utils.__all__) == set(mm_utils.__all__)
    assert llava.conversation.default_conversation is conversation.conv_templates["mm_default"]
    assert llava.conversation.SeparatorStyle.SINGLE
    assert llava.model.constants.key_info == {"model_path": None}


def test_one_number_is_a_gray_level_to_pad_with() -> None:
    gray = Image.new("L", (4, 2), 7)
    square = mm_utils.expand2square(gray, 114)
    assert square.size == (4, 4)
    assert {square.getpixel((x, y)) for x in range(4) for y in (0, 3)} == {(114, 114, 114)}
    assert {square.getpixel((x, y)) for x in range(4) for y in (1, 2)} == {(7, 7, 7)}
