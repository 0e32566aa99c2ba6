"""Folders of InternVL-Chat-V1-2: reading, saving, adapters, quantization, placement."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from support.golden import CHECKPOINT as YI_VL
from support.golden_internvl import CHECKPOINT, GOLDEN, golden_arrays, golden_json, golden_model, pixels_of
from support.hub import Hub

from yivl.checkpoint import download, projector
from yivl.checkpoint.folder import read_config, read_processors, read_vit_weights
from yivl.checkpoint.format import read_main_weights
from yivl.checkpoint.hub import download as download_repository
from yivl.checkpoint.internvl_format import to_internvl_key
from yivl.checkpoint.loading import empty_model, load_model, load_processors, set_images
from yivl.checkpoint.saving import save_checkpoint
from yivl.checkpoint.support import own_device_map
from yivl.checkpoint.vit_source import resolve_vit
from yivl.constants import IMAGE_TOKEN_INDEX
from yivl.errors import CheckpointError, YiVLError
from yivl.export.gguf import export_gguf
from yivl.export.hf import from_hf, to_hf
from yivl.export.model_card import publish
from yivl.export.sglang import to_sglang
from yivl.image_processing import load_image, set_image_size
from yivl.mm_utils import load_pretrained_model, process_images
from yivl.model.internvl import InternVLChatModel
from yivl.model.internvl_configuration import InternVisionConfig, InternVLConfig
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.packed_linear import Linear4, Linear8, PackedLinear
from yivl.train import merge

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
TURN = golden_json("chat")["chats"][0]["turns"][0]
LORA = golden_json("lora")
PARAMETERS = golden_json("../internvl-chat-v1-2/parameters")
LAST = "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint to break."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_part(folder: Path, part: str, **fields: Any) -> None:
    path = folder / "config.json"
    edit_json(path, **{part: json.loads(path.read_text())[part] | fields})


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def logits_of(model: YiVLForCausalLM) -> torch.Tensor:
    """Return the logits of the first recorded prompt, by the call of the original."""
    with torch.no_grad():
        ids, pixels = torch.tensor([TURN["input_ids"]]), pixels_of(TURN["images"])
        assert isinstance(model, InternVLChatModel)
        model.img_context_token_id = golden_json("prompts")["special_ids"]["<IMG_CONTEXT>"]
        logits: torch.Tensor = model(ids, pixel_values=pixels).logits[0]
        return logits


def prompt_ids() -> torch.Tensor:
    """Return the ids of the first recorded prompt with one placeholder instead of the image tokens."""
    context = golden_json("prompts")["special_ids"]["<IMG_CONTEXT>"]
    ids = TURN["input_ids"]
    first = ids.index(context)
    return torch.tensor([[*ids[:first], IMAGE_TOKEN_INDEX, *(token for token in ids[first:] if token != context)]])


def published_config(**changes: Any) -> InternVLConfig:
    """Return the configuration of the published sizes."""
    fields = json.loads((CHECKPOINT / "config.json").read_text())
    fields["llm_config"] |= {
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64009,
    }
    fields["vision_config"] |= {
        "hidden_size": 3200,
        "intermediate_size": 12800,
        "num_hidden_layers": 45,
        "num_attention_heads": 25,
        "image_size": 448,
    }
    return InternVLConfig.from_published(fields | {"force_image_size": 448, "hidden_size": 7168} | changes)


def test_the_names_and_shapes_in_the_files_are_the_published_ones() -> None:
    weights = {
        to_internvl_key(key): list(value.shape) for key, value in empty_model(published_config()).state_dict().items()
    }
    assert weights == PARAMETERS
    assert len(weights) == 1138


@pytest.mark.parametrize("form", ["shards", "one file", "bin shards"])
def test_the_model_is_that_of_the_files(form: str, folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    if form == "one file":
        save_file(read_main_weights(folder), folder / "model.safetensors", metadata={"format": "pt"})
        index.unlink()
    if form == "bin shards":
        fields = json.loads(index.read_text())
        names = {name: f"pytorch_{name}".replace(".safetensors", ".bin") for name in fields["weight_map"].values()}
        for name, new in names.items():
            torch.save(load_file(folder / name), folder / new)
            (folder / name).unlink()
        index.unlink()
        fields["weight_map"] = {key: names[name] for key, name in fields["weight_map"].items()}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(fields))
    found, wanted = load_model(folder, device="cpu").model, golden_model()
    assert type(found) is InternVLChatModel
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(found.state_dict()[key], value) for key, value in wanted.state_dict().items())
    torch.testing.assert_close(logits_of(found), golden_arrays("logits")["img_en_0__logits"], **TOLERANCE)
    assert found.name_or_path == str(folder)


def test_a_loaded_model_answers_with_the_recorded_tokens() -> None:
    loaded = load_model(CHECKPOINT, device="cpu")
    pixels = loaded.image_processor([load_image(GOLDEN / "images" / name) for name in TURN["images"]])
    ids = prompt_ids()
    output = loaded.model.generate(ids, images=pixels, max_new_tokens=24)  # greedy, and ends at <|im_end|> by itself
    assert output[0, ids.shape[1] :].tolist() == TURN["generated_ids"]
    assert loaded.model.generation_config.eos_token_id == 7


def test_programs_in_the_folder_are_not_run_and_nobody_is_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto_map`` names them: transformers asks on the terminal whether to run them."""

    def refuse(*_: Any) -> str:
        raise AssertionError("asked")

    monkeypatch.setattr("builtins.input", refuse)
    for name in ("configuration_internvl_chat.py", "modeling_internvl_chat.py"):
        (folder / name).write_text("import pathlib\npathlib.Path(__file__).with_suffix('.ran').touch()\n")
    assert type(load_model(folder, device="cpu").model) is InternVLChatModel
    assert not list(folder.glob("*.ran"))


def test_a_saved_checkpoint_is_that_of_the_original(tmp_path: Path) -> None:
    loaded = load_model(CHECKPOINT, device="cpu")
    expected = logits_of(loaded.model)
    clip = loaded.image_processor.clip_processor
    saved = tmp_path / "saved"
    save_checkpoint(loaded.model, saved, tokenizer=loaded.tokenizer, image_processor=clip, max_shard_size="1MB")
    names = {path.name for path in saved.iterdir()}
    assert names == {path.name for path in CHECKPOINT.iterdir()}
    own, published = read_main_weights(saved), read_main_weights(CHECKPOINT)
    assert own.keys() == published.keys()
    assert all(torch.equal(own[key], value) for key, value in published.items())
    for name in ("preprocessor_config.json", "tokenizer_config.json", "added_tokens.json"):
        assert json.loads((saved / name).read_text()) == json.loads((CHECKPOINT / name).read_text())
    config, original = (json.loads((place / "config.json").read_text()) for place in (saved, CHECKPOINT))
    assert original["llm_config"].pop("attn_implementation") == "flash_attention_2"  # a row of docs/fidelity.md
    assert config == original
    again = load_model(saved, device="cpu")
    assert torch.equal(logits_of(again.model), expected)
    assert again.image_processor.clip_processor.to_dict() == clip.to_dict()


def test_saving_in_another_precision_and_over_a_checkpoint(tmp_path: Path) -> None:
    model = load_model(CHECKPOINT, device="cpu", dtype="bfloat16").model
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/README.md").write_text("kept")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/README.md").read_text() == "kept"
    assert json.loads((tmp_path / "saved/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {value.dtype for value in read_main_weights(tmp_path / "saved").values()} == {torch.bfloat16}
    assert not (tmp_path / "saved/vit").exists()


def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(CHECKPOINT, device="cpu")
    saved = Path(shutil.copytree(CHECKPOINT, tmp_path / "saved"))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("yivl.checkpoint.internvl_format.write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_checkpoint(loaded.model, saved, image_processor=loaded.image_processor.clip_processor)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("language_model.model.norm.weight"), r"missing language_model\.model\.norm\.weight$"),
        (lambda w: w.pop("mlp1.1.bias"), r"do not fit config.json: missing mlp1\.1\.bias$"),
        (lambda w: w.update({"vision_model.extra": torch.zeros(1)}), r"unexpected vision_model\.extra$"),
        (lambda w: w.update({"mlp1.0.bias": torch.zeros(3)}), r"mlp1\.0\.bias is \[3\], expected \[192\]$"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(64)}),
            r"unexpected weight model\.norm\.weight; the names",
        ),
        (
            lambda w: w.update({"language_model.model.mm_projector.0.bias": torch.zeros(192)}),
            "stand for the same weight",
        ),
        (
            lambda w: w.update({"mlp1.0.bias": torch.zeros(192, dtype=torch.int8)}),
            r"mlp1\.0\.bias is int\d+, expected a",
        ),
    ],
)
def test_wrong_weights_are_named_as_in_the_files(
    change: Callable[[dict[str, torch.Tensor]], Any], said: str, folder: Path
) -> None:
    edit_weights(folder / LAST, change)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(folder, device="cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_and_shapes_are_compared_before_a_weight_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_weights(folder / LAST, lambda weights: weights.pop("mlp1.1.bias"))
    monkeypatch.setattr("yivl.checkpoint.format.load_file", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match=r"missing mlp1\.1\.bias$"):
        load_model(folder, device="cpu")


def test_both_generations_of_the_published_configuration_are_read(folder: Path) -> None:
    """The first has no ``AutoModelForCausalLM``, and no fields of later versions of InternVL."""
    expected = logits_of(load_model(folder, device="cpu").model)
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for name in ("dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch", "ps_version"):
        del fields[name]
    del fields["auto_map"]["AutoModelForCausalLM"]
    fields["llm_config"]["_name_or_path"] = "01-ai/Yi-34B"
    path.write_text(json.dumps(fields))
    assert torch.equal(logits_of(load_model(folder, device="cpu").model), expected)
    edit_json(path, ps_version="v2")
    assert (logits_of(load_model(folder, device="cpu").model) - expected).abs().max() > 0.1
    del fields["model_type"]
    path.write_text(json.dumps(fields))  # found by its architecture
    assert type(read_config(folder)) is InternVLConfig


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        (None, "select_layer", -9, "mm_vision_select_layer=-9 of a ViT with 4 layers"),
        (None, "select_layer", "x", "select_layer is 'x'; expected an integer"),
        (None, "downsample_ratio", 0, "downsample_ratio is 0; expected a number"),
        (None, "downsample_ratio", 0.7, "downsample_ratio is 0.7; expected one over an integer"),
        (None, "ps_version", "v3", "ps_version is 'v3'; expected text"),
        (None, "template", "internlm2-chat", "template is 'internlm2-chat'; expected 'Hermes-2'"),
        (None, "dynamic_image_size", True, "dynamic_image_size is true"),
        (None, "force_image_size", 2**40, "force_image_size is 1099511627776; expected an integer"),
        (None, "llm_config", None, "no llm_config; this is not an InternVL-Chat checkpoint"),
        (None, "vision_config", 3, "no vision_config; this is not an InternVL-Chat checkpoint"),
        (None, "system_message", 3, "system_message is 3; expected text"),
        ("llm_config", "hidden_size", 2**40, "config.json: llm_config: hidden_size is 1099511627776; expected"),
        ("llm_config", "num_hidden_layers", None, "num_hidden_layers is None; expected"),
        ("llm_config", "model_type", "internlm2", "model_type is 'internlm2'; expected 'llama'"),
        ("llm_config", "quantization_config", {"bits": 4}, "quantization_config is .* expected"),
        ("vision_config", "num_hidden_layers", 10**9, "vision_config: num_hidden_layers is 1000000000; expected"),
        ("vision_config", "norm_type", "layer_norm", "vision_config: norm_type is 'layer_norm'; expected"),
        ("vision_config", "qkv_bias", True, r"config\.json: qkv_bias is True; expected False"),
        ("vision_config", "patch_size", 0, "vision_config: patch_size is 0; expected"),
        ("vision_config", "patch_size", 168, "patch_size is 168; expected at most image_size, 84"),
        ("vision_config", "num_attention_heads", 5, "num_attention_heads is 5; expected a divisor"),
        ("vision_config", "hidden_act", "no_such", "hidden_act is 'no_such'; expected"),
    ],
)
def test_a_field_of_the_configuration_that_is_wrong_is_one_line(
    part: str | None, field: str, value: Any, said: str, folder: Path
) -> None:
    if part is None:
        edit_json(folder / "config.json", **{field: value})
    else:
        edit_part(folder, part, **{field: value})
    with pytest.raises(CheckpointError, match=said) as caught:
        load_model(folder, device="cpu")
    assert "config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preprocessor_of_another_size_is_one_line(folder: Path) -> None:
    edit_json(folder / "preprocessor_config.json", size=56, crop_size=56)
    with pytest.raises(CheckpointError, match="size is 56; expected image_size of the ViT, 84"):
        load_processors(folder)
    edit_json(
        folder / "preprocessor_config.json", size={"height": 84, "width": 84}, crop_size={"height": 84, "width": 84}
    )
    assert load_processors(folder)[2].image_size == 84


@pytest.mark.parametrize(("folder_of", "other"), [(YI_VL, "square"), (YI_VL, "squash"), (CHECKPOINT, "pad")])
def test_another_aspect_ratio_does_not_hide_a_preprocessor_of_another_size(folder_of: Path, other: str) -> None:
    config = read_config(folder_of)
    _, clip = read_processors(folder_of, config)
    size = config.vision_config.image_size
    assert set_images(config, clip, image_aspect_ratio=other).image_size == size
    set_image_size(clip, 28, other)
    with pytest.raises(CheckpointError, match=f"size is 28; expected image_size of the ViT, {size}"):
        set_images(config, clip, image_aspect_ratio="squash" if other == "pad" else "pad")


def test_an_image_size_without_a_grid_of_blocks_is_refused_before_weights_are_read() -> None:
    config, _, processor = load_processors(CHECKPOINT)
    with pytest.raises(CheckpointError, match="image size 98 has 7 x 7 patches; expected a multiple of 2 per side"):
        set_images(config, processor.clip_processor, image_size=98)


def test_pad2square_is_an_aspect_ratio(folder: Path) -> None:
    edit_json(folder / "config.json", pad2square=True)
    config, _, processor = load_processors(folder)
    assert (config.image_aspect_ratio, processor.aspect_ratio) == ("pad", "pad")
    pixels = processor([load_image(GOLDEN / "images/wide_rgb.png")])[0]
    expected = golden_arrays("image_pixels")["wide_rgb__pad2square"]
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)
    assert config.to_published_dict()["pad2square"] is True


def test_the_calls_of_the_model_card() -> None:
    _, model, image_processor, context = load_pretrained_model(CHECKPOINT, device_map="cpu", torch_dtype=torch.bfloat16)
    assert type(model) is InternVLChatModel
    assert (model.dtype, context) == (torch.bfloat16, 4096)
    image = Image.open(GOLDEN / "images/photo_rgb.jpg")
    expected = pixels_of(["photo_rgb.jpg"])
    for pixels in (
        image_processor(images=image.resize((84, 84)), return_tensors="pt").pixel_values,
        image_processor.preprocess(image, return_tensors="pt")["pixel_values"],
        process_images([image], image_processor, model.config),
    ):
        torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


def test_a_hub_id_is_downloaded_and_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--OpenGVLab--InternVL-Chat-V1-2"
    shutil.copytree(CHECKPOINT, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(download, "snapshot_download", lambda *a, **k: snapshot_download(*a, **k, cache_dir=tmp_path))
    loaded = load_model("OpenGVLab/InternVL-Chat-V1-2", device="cpu")
    assert (type(loaded.model), loaded.name) == (InternVLChatModel, "InternVL-Chat-V1-2")


def wrapped(folder: Path) -> Path:
    """Make a checkpoint one that the original saves while it trains with LoRA, of its recorded adapter."""
    adapter = load_file(GOLDEN / "expected/lora_adapter.safetensors")
    weights = read_main_weights(folder)
    names = {re.sub(r"base_model\.model\.|\.base_layer", "", key): key for key in LORA["keys_in_a_saved_checkpoint"]}
    weights = {names.get(key, key): value for key, value in weights.items()} | adapter
    assert {key for key in weights if not key.startswith("vision_model.")} == set(LORA["keys_in_a_saved_checkpoint"])
    for path in folder.glob("model*"):
        path.unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", use_llm_lora=LORA["r"])
    return folder


def test_a_checkpoint_with_an_adapter_inside_is_merged(folder: Path) -> None:
    loaded = load_model(wrapped(folder), device="cpu")
    expected = golden_arrays("lora")["logits_merged"]
    torch.testing.assert_close(logits_of(loaded.model)[-4:], expected, **TOLERANCE)
    assert (expected - golden_arrays("logits")["img_en_0__logits"][-4:]).abs().max() > 0.1
    loaded.model.save_pretrained(folder.parent / "saved")
    assert json.loads((folder.parent / "saved/config.json").read_text())["use_llm_lora"] == 0
    assert read_main_weights(folder.parent / "saved").keys() == read_main_weights(CHECKPOINT).keys()


@pytest.mark.parametrize(
    "change",
    [
        lambda weights, name: weights.pop(name),
        lambda weights, name: weights.update({name: torch.zeros(7, 7)}),
        lambda weights, name: weights.update({name.replace("q_proj", "no_proj"): weights.pop(name)}),
    ],
)
def test_half_an_adapter_inside_is_refused(change: Callable[..., Any], folder: Path) -> None:
    name = "language_model.base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    edit_weights(wrapped(folder) / "model.safetensors", lambda weights: change(weights, name))
    with pytest.raises(CheckpointError, match=r"the adapter of language_model\.model\.layers\.1.*merge_lora\.py"):
        load_model(folder, device="cpu")


def test_the_vit_is_read_without_merging_the_adapter_of_the_language_model(folder: Path) -> None:
    """Of the published model that takes tens of gigabytes; here it is impossible."""
    name = "language_model.base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
    edit_weights(wrapped(folder) / "model.safetensors", lambda weights: weights.pop(name))
    own = golden_model().get_vision_tower().vit.state_dict()
    weights = read_vit_weights(folder, read_config(folder))
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], value) for key, value in own.items())


def test_an_adapter_in_the_vit_is_merged(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    name = "vision_model.base_model.model.encoder.layers.0.attn.qkv"
    down, up = torch.randn(2, 48), torch.randn(144, 2)

    def wrap(weights: dict[str, torch.Tensor]) -> None:
        weights[f"{name}.base_layer.weight"] = weights.pop("vision_model.encoder.layers.0.attn.qkv.weight")
        weights |= {f"{name}.lora_A.default.weight": down, f"{name}.lora_B.default.weight": up}

    edit_weights(path, wrap)
    weight = load_model(folder, device="cpu").model.get_vision_tower().vit.layers[0].attn.qkv.weight
    expected = load_file(CHECKPOINT / path.name)["vision_model.encoder.layers.0.attn.qkv.weight"] + 2 * up @ down
    torch.testing.assert_close(weight, expected)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """The recorded adapter in the folder of peft that training writes."""
    lora = LoraConfig(
        r=LORA["r"],
        lora_alpha=LORA["alpha"],
        target_modules=rf"model\.layers\.\d+\..*\.({'|'.join(LORA['target_modules'])})",
    )
    get_peft_model(golden_model(), lora).save_pretrained(tmp_path / "adapter")
    recorded = load_file(GOLDEN / "expected/lora_adapter.safetensors")
    names = {
        key: key.replace("language_model.base_model.model.", "base_model.model.").replace(".default.", ".")
        for key in recorded
    }
    path = tmp_path / "adapter/adapter_model.safetensors"
    assert set(names.values()) == load_file(path).keys()
    save_file({names[key]: value for key, value in recorded.items()}, path, metadata={"format": "pt"})
    edit_json(tmp_path / "adapter/adapter_config.json", base_model_name_or_path=str(CHECKPOINT))
    return tmp_path / "adapter"


def test_an_adapter_has_the_recorded_logits_beside_the_model_and_merged(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = golden_arrays("lora")
    logits = logits_of(load_model(adapter, device="cpu").model)
    torch.testing.assert_close(logits[-4:], recorded["logits_with_adapter"], **TOLERANCE)
    torch.testing.assert_close(logits.logsumexp(-1), recorded["logsumexp_with_adapter"], **TOLERANCE)
    arguments = ["--model-path", CHECKPOINT, "--lora-path", adapter, "--save-model-path", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    merge.main()
    assert read_main_weights(tmp_path / "merged").keys() == read_main_weights(CHECKPOINT).keys()
    merged = load_model(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(logits_of(merged.model)[-4:], recorded["logits_merged"], **TOLERANCE)


@pytest.mark.parametrize(("bits", "kind"), [(8, Linear8), (4, Linear4)])
def test_quantization_on_a_cpu_leaves_vit_and_projector(bits: int, kind: type[PackedLinear]) -> None:
    model = load_model(CHECKPOINT, device="cpu", load_in_8bit=bits == 8, load_in_4bit=bits == 4).model
    packed = {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    assert all(type(model.get_submodule(name)) is kind for name in packed)
    assert {name.split(".layers.")[0] for name in packed} == {"model"}
    assert len(packed) == 3 * 7
    expected = golden_arrays("logits")["img_en_0__logits"]
    error = (logits_of(model) - expected).norm() / expected.norm()
    assert error < {8: 0.03, 4: 0.5}[bits]
    with pytest.raises(CheckpointError, match="a quantized model cannot be saved"):
        model.save_pretrained("never")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_keep_their_bits_on_a_cpu_without_their_products(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The activations are float32 there, also in InternViT, whose layer scale and class token are no modules."""
    load_model(CHECKPOINT, device="cpu", dtype=dtype).model.save_pretrained(tmp_path / "half")
    for path in (*CHECKPOINT.glob("token*"), *CHECKPOINT.glob("*_*.json")):
        if not (tmp_path / "half" / path.name).exists():
            shutil.copy(path, tmp_path / "half")
    monkeypatch.setattr("yivl.checkpoint.cpu_precision.has_native_bfloat16", lambda: False)
    model = load_model(tmp_path / "half", device="cpu").model
    assert model.lm_head.weight.dtype == getattr(torch, dtype)
    vit = model.get_vision_tower().vit
    assert {vit.embeddings.class_embedding.dtype, vit.layers[0].ls1.dtype} == {torch.float32}
    expected = golden_arrays("logits")["img_en_0__logits"]
    assert (logits_of(model) - expected).norm() / expected.norm() < 0.02


def test_over_several_devices_the_tower_stays_in_one_piece() -> None:
    """The plan of ``device_map="auto"`` for the published model; no GPU is needed for it."""
    model = empty_model(published_config())
    plan = infer_auto_device_map(
        model,
        max_memory={0: "48GB", 1: "48GB"},
        no_split_module_classes=model._no_split_modules,
        dtype=torch.bfloat16,
    )
    assert set(plan.values()) == {0, 1}
    tower = {device for name, device in plan.items() if name.startswith("model.vision_tower")}
    assert tower == {0}
    assert all("layers" not in name.removeprefix("model.layers.") for name in plan)


def test_a_map_of_devices_is_followed() -> None:
    plan = {"model.vision_tower": "cpu", "model.mm_projector": "cpu", "model": "cpu", "lm_head": "cpu"}
    model = load_model(CHECKPOINT, device=plan).model
    torch.testing.assert_close(logits_of(model), golden_arrays("logits")["img_en_0__logits"], **TOLERANCE)


PUBLISHED_MAP: dict[str, Any] = {
    "vision_model": "cpu",
    "mlp1": "cpu",
    "language_model.model.embed_tokens": "cpu",
    "language_model.model.norm": "cpu",
    "language_model.lm_head": "cpu",
} | {f"language_model.model.layers.{index}": "cpu" for index in range(3)}


@pytest.mark.parametrize("plan", [PUBLISHED_MAP, {"vision_model": "cpu", "mlp1": "cpu", "language_model": "cpu"}])
def test_a_map_of_devices_may_have_the_published_names(plan: dict[str, Any]) -> None:
    model = load_model(CHECKPOINT, device=plan).model
    torch.testing.assert_close(logits_of(model), golden_arrays("logits")["img_en_0__logits"], **TOLERANCE)


def test_published_names_keep_their_devices() -> None:
    plan = {"vision_model": 0, "mlp1": 1, "language_model.model": 1, "language_model.lm_head": 2}
    plan |= {"language_model.model.layers.0": 0, "language_model.model.rotary_emb": 2}
    own = own_device_map(plan, golden_model().state_dict(), to_internvl_key)
    assert own.pop("model.vision_tower") == own.pop("model.layers.0") == 0
    assert own.pop("lm_head") == own.pop("model.rotary_emb") == 2
    assert own.keys() == {f"model.{name}" for name in ("mm_projector", "embed_tokens", "norm", "layers.1", "layers.2")}
    assert set(own.values()) == {1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlp1": None}, r"device_map: no device for mlp1\.0; name all modules of the model"),
        (
            {"vision_model.encoder": "meta"},
            "device_map: .*encoder.* another device than the rest of model.vision_tower",
        ),
        (
            {"language_model.model.layers.1.mlp": "meta"},
            "another device than the rest of model.layers.1; give them one",
        ),
    ],
)
def test_a_map_of_devices_that_does_not_fit_is_one_line(change: dict[str, Any], said: str) -> None:
    plan = {name: device for name, device in (PUBLISHED_MAP | change).items() if device is not None}
    with pytest.raises(YiVLError, match=said) as caught:
        load_model(CHECKPOINT, device=plan)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "folder_of"), [(YiVLForCausalLM, CHECKPOINT), (InternVLChatModel, YI_VL)])
def test_a_class_of_another_architecture_is_refused(kind: type[YiVLForCausalLM], folder_of: Path) -> None:
    other = {YiVLForCausalLM: InternVLChatModel, InternVLChatModel: YiVLForCausalLM}[kind]
    said = f"not a checkpoint of {kind.__name__}; use {other.__module__}.{other.__name__}, or yivl.mm_utils.load_pre"
    with pytest.raises(CheckpointError, match=re.escape(said)) as caught:
        kind.from_pretrained(folder_of)
    assert str(folder_of) in str(caught.value)
    assert type(type("Derived", (other,), {}).from_pretrained(folder_of)).__name__ == "Derived"


@pytest.mark.parametrize("kind", [YiVLForCausalLM, InternVLChatModel])
def test_calls_of_the_cards_are_told_the_loader(kind: type[YiVLForCausalLM]) -> None:
    folder = YI_VL if kind is YiVLForCausalLM else CHECKPOINT
    with pytest.raises(
        CheckpointError, match=r"^someone/model: no such folder; for a hub id, use .*load_pretrained_mo"
    ):
        kind.from_pretrained("someone/model")
    with pytest.raises(YiVLError, match=r"^load_in_8bit, use_flash_attn: no argument of from_pretrained; use yivl\.mm"):
        kind.from_pretrained(folder, load_in_8bit=True, use_flash_attn=True, low_cpu_mem_usage=True)


def vit_folder(target: Path, *, prefix: str = "", shards: bool = False) -> Path:
    """Write the ViT of the golden checkpoint as a folder of its own, as InternViT-6B-448px-V1-2."""
    target.mkdir()
    fields = json.loads((CHECKPOINT / "config.json").read_text())["vision_config"]
    (target / "config.json").write_text(json.dumps(fields | {"auto_map": {"AutoModel": "modeling.InternVisionModel"}}))
    shutil.copy(CHECKPOINT / "preprocessor_config.json", target)
    weights = {
        prefix + key.removeprefix("vision_model."): value
        for key, value in read_main_weights(CHECKPOINT).items()
        if key.startswith("vision_model.")
    }
    if shards:
        names = {key: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, key in enumerate(weights)}
        for name in set(names.values()):
            save_file({key: weights[key] for key in weights if names[key] == name}, target / name, {"format": "pt"})
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    else:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(("prefix", "shards"), [("", False), ("vision_model.", False), ("", True)])
def test_a_vit_folder_of_its_own_is_read(prefix: str, shards: bool, tmp_path: Path) -> None:
    source = resolve_vit(str(vit_folder(tmp_path / "InternViT", prefix=prefix, shards=shards)))
    assert isinstance(source.config, InternVisionConfig)
    assert (source.name, source.config.num_hidden_layers, source.config.image_size) == ("InternViT", 4, 84)
    own = golden_model().get_vision_tower().vit.state_dict()
    weights = source.read_weights()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[key], value) for key, value in own.items())
    assert source.clip_processor.image_mean == (0.485, 0.456, 0.406)
    model = InternVLChatModel.from_pretrained(
        CHECKPOINT, vit_weights={key: value + 1 for key, value in weights.items()}
    )
    assert torch.equal(model.get_vision_tower().vit.layers[0].ls1, own["encoder.layers.0.ls1"] + 1)


def test_the_projector_file_of_the_original_is_read(tmp_path: Path) -> None:
    weights = {
        key.removeprefix("mlp1."): value + 1
        for key, value in read_main_weights(CHECKPOINT).items()
        if key.startswith("mlp1.")
    }
    assert weights.keys() == {f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")}
    model = golden_model()
    torch.save(weights, tmp_path / "hermes_2_yi_34b.pth")
    projector.load_projector(model, tmp_path / "hermes_2_yi_34b.pth")
    assert all(torch.equal(model.model.mm_projector.get_parameter(key), value) for key, value in weights.items())
    torch.save(weights | {"0.weight": Path("/")}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"other\.pth: holds more than tensors"):
        projector.load_projector(model, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("export", "said"),
    [
        (to_hf, "mm_projector_type='internvl_mlp1'; other programs read only"),
        (to_sglang, "mm_projector_type='internvl_mlp1'; other programs read only"),
        (partial(export_gguf, dtype="float16"), "mm_projector_type='internvl_mlp1' cannot be exported"),
        (from_hf, r"config.json: not the -hf format of a Yi-VL model"),
    ],
)
def test_programs_that_read_only_llava_get_no_export(export: Callable[..., Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        export(CHECKPOINT, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_yi_vl_format_is_still_found() -> None:
    assert type(load_model(YI_VL, device="cpu").model) is YiVLForCausalLM


@pytest.mark.parametrize(("held", "given"), [(YI_VL, CHECKPOINT), (CHECKPOINT, YI_VL)])
def test_a_repository_keeps_its_architecture(held: Path, given: Path, hub: Hub, tmp_path: Path) -> None:
    publish(Path(shutil.copytree(held, tmp_path / "held")), "someone/chat", private=True)
    with pytest.raises(CheckpointError, match=r"^someone/chat: exists and holds another kind of model"):
        publish(Path(shutil.copytree(given, tmp_path / "given")), "someone/chat", private=True)
    publish(tmp_path / "held", "someone/chat", private=True)


def test_it_is_uploaded_with_its_card_and_downloaded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit")
    publish(folder, "someone/chat", private=True)
    files = hub.repositories["someone/chat"].commits[-1]
    assert files.keys() == {path.name for path in CHECKPOINT.iterdir()} | {"README.md", ".gitattributes"}
    card = files["README.md"].decode()
    assert "A model of the architecture of InternVL-Chat-V1-2" in card
    assert "9 image tokens" in card
    files["modeling_internvl_chat.py"] = b"raise SystemExit"
    download_repository("someone/chat", tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").iterdir()} == files.keys() - {
        "modeling_internvl_chat.py",
        ".gitattributes",
    }
    assert torch.equal(load_model(tmp_path / "again", device="cpu").model.lm_head.weight, golden_model().lm_head.weight)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_vl"}))
    files["config.json"] = (folder / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists and holds another kind of model"):
        publish(Path(shutil.copytree(CHECKPOINT, tmp_path / "other")), "someone/chat", private=True)
