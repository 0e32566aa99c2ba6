"""A folder in the ``-hf`` format is used as it is: equal to the checkpoint that ``from-hf`` writes."""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model
from PIL import Image
from support.golden import CHECKPOINT, ROOT
from support.hf import SINCE_4_52, WITHOUT_VISION_MODEL, export_as_llamafactory, load_llava, rename_weights
from support.models import wide_checkpoint
from support.training import flags, losses, train, weights, write_rows
from transformers import AutoTokenizer

from yivl.checkpoint import download
from yivl.checkpoint.folder import read_config
from yivl.checkpoint.hub import check_whole
from yivl.checkpoint.loading import LoadedModel, load_model, load_processors
from yivl.command_line import EMBEDDED_MODEL
from yivl.errors import CheckpointError
from yivl.export.hf import from_hf, to_hf
from yivl.export.model_card import publish
from yivl.export.sglang import to_sglang
from yivl.inference.chat import Chat
from yivl.model.modeling import YiVLForCausalLM
from yivl.train import merge
from yivl.train.__main__ import main


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "golden-hf"
    to_hf(CHECKPOINT, folder)
    return folder


def edited(source: Path, target: Path, **fields: Any) -> Path:
    """Copy a folder and change fields of its ``config.json``; ``None`` removes one."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | fields
    kept = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def parsed(files: Mapping[str, bytes]) -> dict[str, Any]:
    return {name: json.loads(content) if name.endswith(".json") else content for name, content in files.items()}


def assert_equal(found: LoadedModel, wanted: LoadedModel) -> None:
    """Two loaded models with the same weights, settings and processors."""
    expected, weights = wanted.model.state_dict(), found.model.state_dict()
    assert weights.keys() == expected.keys()
    for key, value in expected.items():
        assert weights[key].dtype == value.dtype
        assert torch.equal(weights[key], value), key
    without = dict.fromkeys(("_name_or_path", "transformers_version", "use_cache"))
    assert found.model.config.to_dict() | without == wanted.model.config.to_dict() | without
    settings = [model.model.generation_config.to_dict() | without for model in (found, wanted)]
    assert settings[0] == settings[1]
    assert parsed(found.tokenizer.files) == parsed(wanted.tokenizer.files)
    assert found.image_processor.clip_processor.to_dict() == wanted.image_processor.clip_processor.to_dict()
    assert found.image_processor.aspect_ratio == wanted.image_processor.aspect_ratio


@pytest.mark.parametrize("recorded", [True, False], ids=["ours", "as the port"])
@pytest.mark.parametrize("source", [CHECKPOINT, Path(EMBEDDED_MODEL)], ids=["golden", "embedded"])
def test_it_loads_as_the_converted_checkpoint(source: Path, recorded: bool, tmp_path: Path) -> None:
    to_hf(source, tmp_path / "hf")
    if not recorded:  # Yi-VL-6B-hf has no published.json
        (tmp_path / "hf/published.json").unlink()
    from_hf(tmp_path / "hf", tmp_path / "back")
    found, wanted = (load_model(tmp_path / name, device="cpu") for name in ("hf", "back"))
    assert_equal(found, wanted)
    image, original = ROOT / "images/cat.jpg", Chat(load_model(source, device="cpu"))
    for question in ("What is in this image?", "图中有什么？ ### <image> <|im_end|>"):
        answers = []
        for chat in (Chat(found), Chat(wanted), original):
            chat.reset()
            answers.append(chat.ask(question, image, temperature=0, max_new_tokens=24))
        assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("names", [{}, SINCE_4_52, WITHOUT_VISION_MODEL], ids=["5", "in memory", "older"])
def test_an_export_of_llamafactory_loads_once_it_has_a_tokenizer_model(
    hf: Path, names: dict[str, str], tmp_path: Path, loaded: LoadedModel
) -> None:
    folder = export_as_llamafactory(hf, tmp_path / "export")
    if names:
        rename_weights(folder, names)
    with pytest.raises(CheckpointError, match=r"export: no tokenizer.model .* from-hf --like$"):
        load_model(folder, device="cpu")
    shutil.copyfile(Path(EMBEDDED_MODEL) / "tokenizer.model", folder / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not the tokenizer of .*export; take that of"):
        load_model(folder, device="cpu")
    shutil.copyfile(CHECKPOINT / "tokenizer.model", folder / "tokenizer.model")
    found, image = load_model(folder, device="cpu"), Image.radial_gradient("L")
    assert all(torch.equal(found.model.state_dict()[key], value) for key, value in loaded.model.state_dict().items())
    for text in ("\n### Human: ###", "<image><pad> <|im_end|>", "图中有什么？"):  # ### is a special token there
        ids = loaded.tokenizer(text).input_ids
        assert found.tokenizer(text).input_ids == ids
        assert found.tokenizer.decode(ids, skip_special_tokens=True) == loaded.tokenizer.decode(
            ids, skip_special_tokens=True
        )
    answers = [Chat(model).ask("What is it?", image, temperature=0, max_new_tokens=12) for model in (found, loaded)]
    assert answers[0] == answers[1]


def test_an_export_under_transformers_4_loads_as_it_is(hf: Path, tmp_path: Path, loaded: LoadedModel) -> None:
    """It holds ``tokenizer.model``, and declares the stop string a special token in ``tokenizer_config.json``."""
    folder = Path(shutil.copytree(hf, tmp_path / "export"))
    (folder / "published.json").unlink()
    path, stop = folder / "tokenizer_config.json", loaded.tokenizer.convert_tokens_to_ids("###")
    config = json.loads(path.read_text())
    config["added_tokens_decoder"][str(stop)] = config["added_tokens_decoder"]["7"] | {"content": "###"}
    config |= {"additional_special_tokens": ["###"], "padding_side": "left", "image_token": "<image>"}
    path.write_text(json.dumps(config))
    found = load_model(folder, device="cpu")
    text = "\n### Human: <image><pad> ### <|im_end|>"
    assert found.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert found.tokenizer.all_special_ids == loaded.tokenizer.all_special_ids
    answers = [
        Chat(model).ask("图中有什么？", Image.radial_gradient("L"), temperature=0, max_new_tokens=12)
        for model in (found, loaded)
    ]
    assert answers[0] == answers[1]


def test_a_hub_id_is_downloaded_loaded_and_converted(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    repository = tmp_path / "models--someone--tiny-yi-vl-hf"
    shutil.copytree(hf, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(download, "snapshot_download", lambda *a, **k: snapshot_download(*a, **k, cache_dir=tmp_path))
    found = load_model("someone/tiny-yi-vl-hf", device="cpu")
    assert found.name == "tiny-yi-vl-hf"
    from_hf("someone/tiny-yi-vl-hf", tmp_path / "back")
    for model in (found, load_model(tmp_path / "back", device="cpu")):
        assert all(torch.equal(model.model.state_dict()[key], v) for key, v in loaded.model.state_dict().items())


def test_the_model_class_reads_it_too(hf: Path, loaded: LoadedModel) -> None:
    model = YiVLForCausalLM.from_pretrained(hf, dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert model.name_or_path == str(hf)
    wanted = loaded.model.state_dict()
    assert all(torch.equal(value, wanted[key].half()) for key, value in model.state_dict().items())
    config, tokenizer, _ = load_processors(hf)
    assert (config.vocab_size, len(tokenizer)) == (1024, 1024)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantized_weights_are_those_of_the_checkpoint(bits: str, tmp_path: Path) -> None:
    folder = wide_checkpoint(tmp_path / "wide")
    to_hf(folder, tmp_path / "hf")
    ids = torch.randint(3, 1000, (1, 8))
    with torch.inference_mode():
        wanted, found = (
            load_model(path, device="cpu", **{bits: True}).model(input_ids=ids).logits
            for path in (folder, tmp_path / "hf")
        )
    assert torch.equal(wanted, found)


def test_the_projector_tells_a_yi_vl_without_its_mark(hf: Path, tmp_path: Path) -> None:
    """The first commits of Yi-VL-6B-hf do not have the mark."""
    folder = edited(hf, tmp_path / "unmarked", is_yi_vl_derived_model=None)
    assert read_config(folder).mm_projector_type == "mlp2x_gelu_Norm"
    rename_weights(folder, {f"multi_modal_projector.linear_{number}.": f"other.{number}." for number in (3, 4)})
    with pytest.raises(CheckpointError, match="unmarked: another LLaVA; the projector of Yi-VL has four layers"):
        read_config(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_token_index": 900}, r"model.embed_tokens|not the tokenizer of"),
        ({"text_config": {}}, "the weights do not fit config.json"),
        ({"vision_config": 3}, "config.json: vision_config is 3; expected an object"),
        ({"vision_feature_select_strategy": "all"}, "config.json: vision_feature_select_strategy is 'all'; expected"),
        ({"vision_feature_layer": [-2, -3]}, r"config.json: vision_feature_layer is \[-2, -3\]; expected an integer"),
    ],
)
def test_a_bad_configuration_is_one_line(hf: Path, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_model(edited(hf, tmp_path / "bad", **change), device="cpu")


def test_an_image_token_of_no_number_is_one_line(hf: Path, tmp_path: Path) -> None:
    folder = edited(hf, tmp_path / "bad")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"image_token_index": None}))
    with pytest.raises(CheckpointError, match=r"config.json: image_token_index is None; expected an integer"):
        load_processors(folder)


def test_a_tokenizer_json_without_a_bpe_vocabulary_is_one_line(hf: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(hf, tmp_path / "hf")) / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"] = [["<unk>", 0.0]]  # of a Unigram model
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer.json: no vocabulary of a BPE model; download it again$"):
        load_processors(path.parent)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"control_symbols": ["###"], "eos_id": 3}, id="end of text"),
        pytest.param({}, id="stop string"),
    ],
)
def test_a_tokenizer_of_another_family_is_refused_without_a_tokenizer_json(
    change: dict[str, Any], hf: Path, tmp_path: Path
) -> None:
    """As Llama 2, whose vocabulary is smaller than that of Yi."""
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    (folder / "tokenizer.json").unlink()
    assert len(load_processors(folder)[1]) == 1024
    (tmp_path / "other").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a small text about other words"] * 9),
        model_prefix=str(tmp_path / "other/tokenizer"),
        model_type="bpe",
        vocab_size=40,
        minloglevel=2,
        **change,
    )
    with pytest.raises(CheckpointError, match=r"tokenizer.model: not the tokenizer of .*hf; take that of the Yi model"):
        from_hf(folder, tmp_path / "back", like=tmp_path / "other")


def test_training_on_it_is_training_on_the_checkpoint_and_saves_the_published_format(hf: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.json")
    logs = [
        train(tmp_path / name, data, model_name_or_path=path, max_steps=1, unfreeze_mm_vision_tower=True)
        for name, path in (("from-hf", hf), ("from-published", CHECKPOINT))
    ]
    assert losses(logs[0]) == losses(logs[1])
    found, wanted = (weights(tmp_path / name) for name in ("from-hf", "from-published"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    names = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("from-hf", "from-published")]
    assert names[0] == names[1]
    for name in ("tokenizer.model", "tokenizer_config.json"):
        one, other = (json_or_bytes(tmp_path / run / name) for run in ("from-hf", "from-published"))
        assert one == other
    assert load_model(tmp_path / "from-hf", device="cpu").model.config.mm_vision_tower.startswith("./vit/")


def json_or_bytes(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


@pytest.mark.parametrize("bits", [16, 4], ids=["LoRA", "QLoRA"])
def test_an_adapter_is_trained_on_it_loaded_on_it_and_merged(
    bits: int, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = hf
    if bits == 4:
        wide_checkpoint(tmp_path / "wide")
        to_hf(tmp_path / "wide", base := tmp_path / "wide-hf")
    data = write_rows(tmp_path / "rows.json")
    run = {"max_steps": 1, "lora_enable": True, "bits": bits}
    train(tmp_path / "adapter", data, model_name_or_path=base, **run)
    assert json_or_bytes(tmp_path / "adapter/adapter_config.json")["base_model_name_or_path"] == str(base)
    adapted = load_model(tmp_path / "adapter", device="cpu", merge_adapter=True).model.state_dict()
    arguments = ["--model-path", base, "--lora-path", tmp_path / "adapter", "--save-model-path", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    merge.main()
    merged = load_model(tmp_path / "merged", device="cpu").model.state_dict()
    assert all(torch.equal(merged[key], value) for key, value in adapted.items())
    assert (tmp_path / "merged/vit").is_dir()
    from_hf(base, tmp_path / "converted")
    again = load_model(tmp_path / "adapter", model_base=tmp_path / "converted", device="cpu", merge_adapter=True)
    assert all(torch.equal(again.model.state_dict()[key], value) for key, value in adapted.items())


def test_a_dry_run_and_a_frozen_vit_of_its_own(hf: Path, tmp_path: Path) -> None:
    data, vit = write_rows(tmp_path / "rows.json"), next((CHECKPOINT / "vit").iterdir())
    main(flags(tmp_path / "out", data, model_name_or_path=hf, lora_enable=True, vision_tower=vit, dry_run=True))
    assert not (tmp_path / "out").exists()


def test_it_is_exported_as_the_checkpoint_is(hf: Path, tmp_path: Path) -> None:
    to_sglang(hf, tmp_path / "one")
    to_sglang(CHECKPOINT, tmp_path / "other")
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    for name in ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"):
        assert json_or_bytes(tmp_path / "one" / name) == json_or_bytes(tmp_path / "other" / name)


def test_an_export_for_sglang_is_converted(tmp_path: Path, loaded: LoadedModel) -> None:
    to_sglang(CHECKPOINT, tmp_path / "sglang")
    to_hf(tmp_path / "sglang", tmp_path / "hf")
    found, text = load_model(tmp_path / "hf", device="cpu"), "\n### Human: <image> 图中有什么？"
    assert all(torch.equal(found.model.state_dict()[key], value) for key, value in loaded.model.state_dict().items())
    assert found.tokenizer(text).input_ids == loaded.tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").convert_tokens_to_ids("<image>") == 1024
    from_hf(tmp_path / "hf", tmp_path / "back")
    assert load_processors(tmp_path / "back")[0].vocab_size == 1024


def test_a_download_of_it_is_whole_and_an_upload_is_refused(hf: Path, tmp_path: Path) -> None:
    check_whole(hf)
    with pytest.raises(CheckpointError, match="golden-hf: in the -hf format; upload it with `hf upload`, or use"):
        publish(hf, "someone/yi-vl-hf", private=True)
    shutil.copytree(hf, tmp_path / "partial")
    (tmp_path / "partial/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged, truncated or a git-lfs pointer"):
        check_whole(tmp_path / "partial")


def test_an_adapter_of_transformers_llava_is_named(hf: Path, tmp_path: Path) -> None:
    """As LLaMA-Factory writes one."""
    llava = load_llava(hf)
    targets = [name for name, module in llava.named_modules() if name.endswith("language_model.layers.0.mlp.up_proj")]
    get_peft_model(llava, LoraConfig(r=2, target_modules=targets)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"an adapter of transformers' LLaVA; merge it .*llamafactory-cli export"):
        load_model(tmp_path / "adapter", model_base=hf, device="cpu")
