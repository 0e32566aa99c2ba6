"""Conversion to and from the ``-hf`` format is lossless, and transformers' own LLaVA agrees."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.golden import CHECKPOINT, ROOT
from support.hf import SINCE_4_52, WITHOUT_VISION_MODEL, export_as_llamafactory, load_llava, rename_weights
from transformers import AutoProcessor, AutoTokenizer, LlamaTokenizer, LlavaForConditionalGeneration

from yivl.checkpoint.loading import load_model
from yivl.command_line import EMBEDDED_MODEL
from yivl.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from yivl.errors import CheckpointError
from yivl.export.hf import from_hf, to_hf
from yivl.export.sglang import to_sglang
from yivl.inference.chat import Chat
from yivl.tokenization import load_tokenizer

IDS = 1024  # of the golden vocabulary


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "golden-hf"
    to_hf(CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="module")
def llava(hf: Path) -> LlavaForConditionalGeneration:
    return load_llava(hf)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_names_and_configuration_are_those_of_the_port(hf: Path) -> None:
    weights = load_file(hf / "model.safetensors")
    assert {key.split(".")[0] for key in weights} == {"language_model", "multi_modal_projector", "vision_tower"}
    assert sorted(key for key in weights if key.startswith("multi_modal_projector")) == [
        f"multi_modal_projector.linear_{number}.{kind}" for number in (1, 2, 3, 4) for kind in ("bias", "weight")
    ]
    assert "vision_tower.vision_model.pre_layrnorm.weight" in weights
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in weights
    assert weights["language_model.lm_head.weight"].shape == (1088, 64)  # 1,024 ids and two, to a multiple of 64
    config = read(hf / "config.json")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    wanted = {"image_token_index": IDS, "pad_token_id": IDS + 1, "is_yi_vl_derived_model": True, "ignore_index": -100}
    wanted |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    assert {key: config[key] for key in wanted} == wanted
    text = config["text_config"]
    assert (text["vocab_size"], text["num_key_value_heads"], text["rope_theta"]) == (1088, 2, 5e6)
    assert config["vision_config"]["hidden_act"] == "gelu"


def test_new_rows_are_copies_of_the_unknown_token(hf: Path) -> None:
    weights = load_file(hf / "model.safetensors")
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert (weights[key][IDS:] == weights[key][0]).all()


def test_logits_are_those_of_transformers_own_llava(chat: Chat, llava: LlavaForConditionalGeneration) -> None:
    pixel_values = torch.randn(2, 3, 56, 56)
    tokens = torch.randint(3, IDS, (2, 12))
    ours = torch.cat([tokens[:, :5], torch.full((2, 1), IMAGE_TOKEN_INDEX), tokens[:, 5:]], dim=1)
    slots = torch.full((2, chat.loaded.model.config.num_patches), llava.config.image_token_index)
    theirs = torch.cat([tokens[:, :5], slots, tokens[:, 5:]], dim=1)
    with torch.inference_mode():
        wanted = llava(input_ids=theirs, pixel_values=pixel_values).logits[..., :IDS]
        logits = chat.loaded.model(input_ids=ours, images=pixel_values).logits
        text_only = llava(input_ids=tokens).logits[..., :IDS]
        text_logits = chat.loaded.model(input_ids=tokens).logits
    assert logits.shape == wanted.shape
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(text_logits, text_only, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "text",
    ["What is in the picture?", "图中有什么？\n", "  two  blanks ### end", "1,024 + 3.5 🐱", "<unk> <|im_end|>", ""],
)
def test_tokenizer_ids_are_equal(hf: Path, text: str) -> None:
    ours, theirs = load_tokenizer(CHECKPOINT), AutoTokenizer.from_pretrained(hf)
    assert theirs(text).input_ids == ours(text).input_ids
    assert theirs.convert_tokens_to_ids(["<image>", "<pad>"]) == [IDS, IDS + 1]
    assert theirs.pad_token_id == IDS + 1
    # Transformers 5.6, and LLaMA-Factory with it, build the tokenizer by this class.
    assert LlamaTokenizer.from_pretrained(hf)(text).input_ids == ours(text).input_ids


def test_the_processor_gives_prompt_and_pixels_of_a_chat(
    chat: Chat, hf: Path, llava: LlavaForConditionalGeneration
) -> None:
    processor = AutoProcessor.from_pretrained(hf, backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "图中有几只猫？"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.radial_gradient("L").convert("RGB").resize((56, 56))  # square: the port crops, we pad
    batch = processor(images=image, text=prompt, return_tensors="pt")
    reply = chat.begin("图中有几只猫？", image)
    patches = chat.loaded.model.config.num_patches
    spread = [token for id in reply.input_ids for token in ([IDS] * patches if id == IMAGE_TOKEN_INDEX else [id])]
    assert batch["input_ids"][0].tolist() == spread
    torch.testing.assert_close(batch["pixel_values"], chat.loaded.image_processor([image]), atol=1e-6, rtol=0)
    with torch.inference_mode():
        tokens = llava.generate(**batch, do_sample=False, max_new_tokens=8)[0, len(spread) :]
    chat.reset()
    assert chat.ask("图中有几只猫？", image, temperature=0, max_new_tokens=8) == chat.loaded.tokenizer.decode(
        tokens, skip_special_tokens=True
    )


def test_generation_in_transformers_ends_at_the_stop_string(tmp_path: Path) -> None:
    to_hf(EMBEDDED_MODEL, tmp_path / "hf")
    settings = read(tmp_path / "hf/generation_config.json")
    stop = load_tokenizer(EMBEDDED_MODEL).convert_tokens_to_ids("###")
    assert settings["eos_token_id"] == [2, stop]
    assert "max_length" not in settings
    processor = AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    content = [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    image = Image.open(ROOT / "images/cat.jpg").convert("RGB").resize((192, 192))
    batch = processor(images=image, text=prompt, return_tensors="pt")
    llava = load_llava(tmp_path / "hf")
    tokens = llava.generate(**batch.to(dtype=llava.dtype), do_sample=False, max_new_tokens=64)
    answer = tokens[0, batch["input_ids"].shape[1] :].tolist()
    assert answer.count(stop) == 1
    assert answer[-1] == stop
    chat = Chat(load_model(EMBEDDED_MODEL, device="cpu"))
    wanted = chat.ask("What is in this image?", image, temperature=0, max_new_tokens=64)
    assert processor.decode(answer[:-1]).strip() == wanted


def test_a_later_turn_of_the_template_is_that_of_a_chat(hf: Path) -> None:
    from yivl.conversation import YI_VL, Turn, prompt_text

    turns = [Turn("a", "b", num_images=1), Turn("c")]
    prompt = prompt_text(YI_VL.render(YI_VL.messages(turns)))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert said == prompt.replace(DEFAULT_IMAGE_TOKEN, "<image>")
    own = tokenizer.apply_chat_template([{"role": "system", "content": "Be short."}, messages[2]], tokenize=False)
    assert own == "Be short.\n\n### Human: c\n### "


@pytest.mark.parametrize("source", [CHECKPOINT, Path(EMBEDDED_MODEL)], ids=["golden", "embedded"])
def test_there_and_back_nothing_is_lost(source: Path, tmp_path: Path) -> None:
    to_hf(source, tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back")
    before, after = load_model(source, device="cpu"), load_model(tmp_path / "back", device="cpu")
    wanted, found = before.model.state_dict(), after.model.state_dict()
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        assert value.dtype == found[key].dtype
        assert torch.equal(value, found[key]), key
    for name in ("config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if not (source / name).is_file():
            continue
        old, new = read(source / name), read(tmp_path / "back" / name)
        # How a saved configuration differs from a published one is the business of saving: test_saving.py.
        for key in old.keys() - {"_name_or_path", "use_cache", "transformers_version"}:
            assert new[key] == old[key], f"{name}: {key}"
    old, new = read(source / "generation_config.json"), read(tmp_path / "back/generation_config.json")
    # Of transformers, about the origin of the fields.
    assert all(new.get(key) == old[key] for key in old.keys() - {"transformers_version", "_from_model_config"})
    assert new.keys() <= old.keys()
    assert (source / "tokenizer.model").read_bytes() == (tmp_path / "back/tokenizer.model").read_bytes()
    assert after.image_processor.clip_processor.to_dict() == before.image_processor.clip_processor.to_dict()


def test_there_and_back_starting_from_the_other_side_nothing_is_lost(hf: Path, tmp_path: Path) -> None:
    from_hf(hf, tmp_path / "published")
    to_hf(tmp_path / "published", tmp_path / "again")
    before, after = load_file(hf / "model.safetensors"), load_file(tmp_path / "again/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "processor_config.json"):
        assert (hf / name).read_text(encoding="utf-8") == (tmp_path / "again" / name).read_text(encoding="utf-8"), name


def test_what_transformers_saves_comes_back_too(
    chat: Chat, llava: LlavaForConditionalGeneration, hf: Path, tmp_path: Path
) -> None:
    llava.save_pretrained(tmp_path / "hf")
    AutoProcessor.from_pretrained(hf, backend="pil").save_pretrained(tmp_path / "hf")
    assert not (tmp_path / "hf/preprocessor_config.json").exists()  # version 5 has one file for all of a processor
    shutil.copyfile(hf / "tokenizer.model", tmp_path / "hf/tokenizer.model")
    from_hf(tmp_path / "hf", tmp_path / "back")
    again = Chat(load_model(tmp_path / "back", device="cpu"))
    question, image = "What is it?", Image.radial_gradient("L")
    wanted = chat.ask(question, image, temperature=0, max_new_tokens=12)
    assert again.ask(question, image, temperature=0, max_new_tokens=12) == wanted


@pytest.mark.parametrize("spelling", ["since 4.52", "without vision_model"])
def test_later_spellings_of_names_are_read(hf: Path, tmp_path: Path, spelling: str) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(hf, folder)
    rename_weights(folder, SINCE_4_52 if spelling == "since 4.52" else WITHOUT_VISION_MODEL)
    from_hf(folder, tmp_path / "back")
    wanted, found = (load_model(path, device="cpu").model.state_dict() for path in (CHECKPOINT, tmp_path / "back"))
    assert all(torch.equal(wanted[key], found[key]) for key in wanted)


@pytest.mark.parametrize("like", ["published", "hf"])
@pytest.mark.parametrize("spelling", ["on disk", "since 4.52"])
def test_an_export_of_llamafactory_comes_back_with_the_files_of_another_folder(
    hf: Path, tmp_path: Path, like: str, spelling: str
) -> None:
    folder = export_as_llamafactory(hf, tmp_path / "export")
    files = ["Modelfile", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    files += ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    if spelling == "since 4.52":
        rename_weights(folder, SINCE_4_52)
    from_hf(folder, tmp_path / "back", like=CHECKPOINT if like == "published" else hf)
    before, after = load_model(CHECKPOINT, device="cpu"), load_model(tmp_path / "back", device="cpu")
    wanted, found = before.model.state_dict(), after.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"):
        versions = {"transformers_version": ""}
        assert read(tmp_path / "back" / name) | versions == read(CHECKPOINT / name) | versions
    assert (tmp_path / "back/tokenizer.model").read_bytes() == (CHECKPOINT / "tokenizer.model").read_bytes()
    assert after.image_processor.clip_processor.size == before.image_processor.clip_processor.size


@pytest.mark.parametrize(
    ("like", "said"),
    [
        ("nowhere", "nowhere: no such folder; --like takes a local folder"),
        (Path(EMBEDDED_MODEL), "tokenizer.model: not the tokenizer of .*hf; take that of the Yi model"),
        (ROOT / "images", r"images: no tokenizer.model .* or give another --like$"),
    ],
)
def test_a_folder_that_is_not_like_it_is_refused(hf: Path, like: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        from_hf(hf, tmp_path / "back", like=like)
    assert not (tmp_path / "back").exists()


def broken(hf: Path, folder: Path, what: str) -> Path:
    shutil.copytree(hf, folder)
    config = read(folder / "config.json")
    weights = load_file(folder / "model.safetensors")
    if what == "no tokenizer.model":
        (folder / "tokenizer.model").unlink()
    elif what == "a published folder":
        config = read(CHECKPOINT / "config.json")
    elif what == "a missing tensor":
        del weights["multi_modal_projector.linear_4.bias"]
    elif what == "another shape":
        weights["multi_modal_projector.linear_3.weight"] = torch.zeros(2, 2)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no tokenizer.model", r"no tokenizer.model .*; copy that of the Yi-VL checkpoint there, or .* --like$"),
        ("a published folder", "config.json: not the -hf format of a Yi-VL model .*text_config"),
        ("a missing tensor", r"the weights do not fit config.json: missing model.mm_projector.4.bias$"),
        ("another shape", r"model.mm_projector.3.weight is \[2, 2\], expected \[64, 64\]"),
    ],
)
def test_a_broken_folder_is_one_clear_line_and_nothing_is_written(
    hf: Path, tmp_path: Path, what: str, said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        from_hf(broken(hf, tmp_path / "hf", what), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_another_projector_has_no_hf_form(tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    config = read(CHECKPOINT / "config.json") | {"mm_projector_type": "mlp2x_gelu"}
    (tmp_path / "model/config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="mm_projector_type='mlp2x_gelu'; other programs read only"):
        to_hf(tmp_path / "model", tmp_path / "hf")


@pytest.mark.parametrize("convert", [to_hf, from_hf, to_sglang])
def test_a_conversion_does_not_replace_its_source(convert: Callable[[Path, Path], None], tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINT, tmp_path / "models/yi")
    for target in (tmp_path / "models/yi", tmp_path / "models"):
        with pytest.raises(CheckpointError, match="is or contains"):
            convert(tmp_path / "models/yi", target)
    assert (tmp_path / "models/yi/pytorch_model-00001-of-00002.bin").is_file()


def test_a_conversion_replaces_an_earlier_one(tmp_path: Path) -> None:
    for _ in range(2):
        to_hf(CHECKPOINT, tmp_path / "hf")
        from_hf(tmp_path / "hf", tmp_path / "back")
    assert (tmp_path / "back/vit").is_dir()
