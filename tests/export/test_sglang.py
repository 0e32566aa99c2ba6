"""SGLang's folder, read as its Yi-VL class reads it: every field it asks for, every tensor in its place, same features.

The reading below is that of sgl-project/sglang, python/sglang/srt/models/yivl.py and llava.py, reimplemented in small:
SGLang itself needs a GPU.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.golden import CHECKPOINT
from torch import nn
from transformers import AutoConfig, AutoProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from yivl.checkpoint.loading import load_model
from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.conversation import YI_VL, Turn, prompt_text
from yivl.export.sglang import to_sglang
from yivl.inference.chat import Chat


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sglang") / "Yi-VL-golden"
    to_sglang(CHECKPOINT, folder)
    return folder


class Projector(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        vision, text = config.vision_config.hidden_size, config.text_config.hidden_size
        self.linear_1, self.ln_1 = nn.Linear(vision, text), nn.LayerNorm(text)
        self.linear_2, self.ln_2 = nn.Linear(text, text), nn.LayerNorm(text)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.ln_1(self.linear_1(features))
        return self.ln_2(self.linear_2(nn.functional.gelu(hidden)))


class Reader(nn.Module):
    """The model as SGLang builds it from the configuration, with the weights where it puts them."""

    names = {  # noqa: RUF012 (in order)
        "model.mm_projector.0": "multi_modal_projector.linear_1",
        "model.mm_projector.1": "multi_modal_projector.ln_1",
        "model.mm_projector.3": "multi_modal_projector.linear_2",
        "model.mm_projector.4": "multi_modal_projector.ln_2",
        "model.vision_tower.vision_tower": "vision_tower",
        "vision_tower.vision_model.": "vision_tower.",
    }

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.config = config = AutoConfig.from_pretrained(folder)
        config.vision_config.hidden_size = config.mm_hidden_size
        config.text_config.hidden_size = config.hidden_size
        self.multi_modal_projector = Projector(config)
        # SGLang builds its Llama from the fields at the top.
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        top = {key: fields[key] for key in LlamaConfig().to_dict() | {"rope_theta": 0} if key in fields}
        self.language_model = LlamaForCausalLM(LlamaConfig(**top | {"model_type": "llama"}))
        subfolder = config.mm_vision_tower.replace("./", "")
        self.vision_tower = CLIPVisionModel.from_pretrained(config._name_or_path, subfolder=subfolder)
        before = {key: value.clone() for key, value in self.vision_tower.state_dict().items()}
        unread = dict(self.named_parameters())
        with torch.no_grad():
            for key, value in load_file(folder / "model.safetensors").items():
                name = key
                if "projector" in name or "vision_tower" in name:
                    for ours, theirs in self.names.items():
                        name = name.replace(ours, theirs)
                else:
                    name = f"language_model.{name}"
                unread.pop(name).copy_(value)
        assert not unread, unread.keys()
        # Which copy of the ViT a reader takes makes no difference.
        assert all(torch.equal(value, before[key]) for key, value in self.vision_tower.state_dict().items())
        self.eval()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        hidden = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features: torch.Tensor = self.multi_modal_projector(hidden[self.config.mm_vision_select_layer][:, 1:])
        return features


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    return Reader(folder)


def test_every_field_has_its_true_value(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    published = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config.architectures == ["YiVLForCausalLM"]
    assert config.image_token_index == published["vocab_size"]
    assert config.projector_hidden_act == "gelu"
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(config, name) == getattr(config.text_config, name) == published[name], name
    for name in ("mm_vision_tower", "mm_vision_select_layer", "mm_vision_select_feature", "mm_hidden_size"):
        assert getattr(config, name) == published[name], name
    assert config.image_aspect_ratio == "pad"
    vit = json.loads((CHECKPOINT / published["mm_vision_tower"] / "config.json").read_text(encoding="utf-8"))
    for name in ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "hidden_act", "layer_norm_eps"):
        assert getattr(config.vision_config, name) == vit[name], name
    assert config.vision_config.model_type == "clip_vision_model"


def test_every_tensor_has_its_place_and_features_are_equal(chat: Chat, reader: Reader) -> None:
    pixel_values = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        ours = chat.loaded.model.encode_images(pixel_values)
        torch.testing.assert_close(reader.encode_images(pixel_values), ours, atol=1e-5, rtol=0)


def test_logits_are_equal(chat: Chat, reader: Reader) -> None:
    pixel_values, tokens = torch.randn(1, 3, 56, 56), torch.randint(3, 1024, (1, 10))
    ids = torch.cat([tokens[:, :4], torch.tensor([[IMAGE_TOKEN_INDEX]]), tokens[:, 4:]], dim=1)
    with torch.inference_mode():
        ours = chat.loaded.model(input_ids=ids, images=pixel_values).logits
        embeds = reader.language_model.get_input_embeddings()(tokens)
        fused = torch.cat([embeds[:, :4], reader.encode_images(pixel_values), embeds[:, 4:]], dim=1)
        theirs = reader.language_model(inputs_embeds=fused).logits
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_the_template_gives_the_ids_of_a_chat_with_the_image_at_its_token(chat: Chat, folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder, backend="pil")
    tokenizer, index = processor.tokenizer, AutoConfig.from_pretrained(folder).image_token_index
    content = [{"type": "image"}, {"type": "text", "text": "图中有什么？"}]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    turn = Turn("图中有什么？", num_images=1)
    assert prompt == prompt_text(YI_VL.render(YI_VL.messages([turn])))
    wanted = chat.begin("图中有什么？", torch.zeros(3, 56, 56)).input_ids
    assert tokenizer(prompt).input_ids == [index if id == IMAGE_TOKEN_INDEX else id for id in wanted]
    assert processor.image_processor.crop_size["height"] == 56


def test_the_folder_is_still_a_published_one(chat: Chat, folder: Path) -> None:
    again, wanted = load_model(folder, device="cpu").model.state_dict(), chat.loaded.model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in wanted.items())
