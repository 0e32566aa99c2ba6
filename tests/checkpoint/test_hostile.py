"""Files that were made to break a reader: each is refused by one line that names it, before memory is allocated."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.golden import CHECKPOINT, ROOT

from yivl.checkpoint.conversion import bin_to_safetensors
from yivl.checkpoint.folder import read_config
from yivl.checkpoint.format import read_json, read_shapes, read_weights, weight_files
from yivl.checkpoint.loading import load_model, load_processors
from yivl.checkpoint.vit_source import resolve_vit
from yivl.errors import CheckpointError
from yivl.files.validation import library_errors

VIT = "vit/clip-vit-tiny-random-yi-vl-56"
INDEX = "pytorch_model.bin.index.json"
DEEP = "[" * 100_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint to break."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(load: Callable[[Path], Any], path: Path) -> str:
    """Return the message about a folder; it is one line and names the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_attention_heads", 0, "config.json: num_attention_heads is 0; expected an integer, 1 to 1,024"),
        ("num_attention_heads", -4, "num_attention_heads is -4"),
        ("num_attention_heads", 6, "not a multiple of the number of attention"),
        ("num_key_value_heads", 3, "num_key_value_heads is 3; expected a divisor of num_attention_heads, 4"),
        ("num_key_value_heads", 0, "num_key_value_heads is 0"),
        ("head_dim", 15, "the width of a head is 15; expected an even number"),
        ("hidden_size", 0, "hidden_size is 0"),
        ("hidden_size", 10**12, "hidden_size is 1000000000000; expected an integer, 1 to 131,072"),
        ("hidden_size", True, "hidden_size is True; expected an integer"),
        ("hidden_size", [64], r"hidden_size is [64]; expected an integer"),
        ("num_hidden_layers", 10_000_000, "num_hidden_layers is 10000000; expected an integer, 1 to 1,000"),
        ("intermediate_size", 1e3, "intermediate_size is 1000.0; expected an integer"),
        ("vocab_size", 100, "the tokenizer has the id 1023; expected less than vocab_size, 100"),
        ("vocab_size", None, "vocab_size is None"),
        ("max_position_embeddings", 10**15, "max_position_embeddings is 1000000000000000"),
        ("rms_norm_eps", float("nan"), "rms_norm_eps is nan; expected a number, 0 to 1"),
        ("rope_theta", float("inf"), "rope_theta is inf"),
        ("rope_theta", None, "rope_theta is None; expected a number"),
        ("rope_parameters", None, "rope_parameters is None; expected an object"),
        ("rope_scaling", 3, "rope_scaling is 3; expected an object or null"),
        ("rope_scaling", {"type": "unheard", "factor": 2.0}, "rope_scaling: type is 'unheard'; expected text, one of"),
        ("rope_scaling", {"type": "linear", "factor": 0}, "rope_scaling: factor is 0; expected a number, 1 to"),
        ("rope_scaling", {"type": "linear"}, "config.json: KeyError"),
        ("hidden_act", "unheard", "hidden_act is 'unheard'; expected text, an activation function of transformers"),
        ("hidden_act", 3, "hidden_act is 3; expected text"),
        ("torch_dtype", "os", "torch_dtype is 'os'; expected text or null, one of auto, float64, float32, float16"),
        ("dtype", "int8", "dtype is 'int8'"),
        ("pad_token_id", 10**9, "pad_token_id is 1000000000"),
        ("pad_token_id", 5_000, "pad_token_id is 5000; expected less than vocab_size, 1024"),
        ("eos_token_id", ["a"], "eos_token_id is ['a']"),
        ("num_labels", 10**9, "num_labels is 1000000000"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config is {'quant_method': 'awq'}"),
        ("mm_hidden_size", 0, "mm_hidden_size is 0"),
        ("mm_hidden_size", 64, "mm_hidden_size is 64; expected that of the ViT, 48"),
        ("mm_vision_tower", 3, "mm_vision_tower is 3; expected text or null"),
        ("mm_vision_tower", "a" * 5_000, "expected text or null, at most 1,024 characters"),
        ("mm_vision_select_layer", "last", "mm_vision_select_layer is 'last'"),
        ("mm_projector_type", ["linear"], "mm_projector_type is ['linear']"),
        ("mm_use_im_start_end", "no", "mm_use_im_start_end is 'no'; expected true or false"),
        ("image_aspect_ratio", "anyres", "image_aspect_ratio='anyres'"),
    ],
)
def test_a_field_of_the_configuration(folder: Path, field: str, value: Any, said: str) -> None:
    edit(folder / "config.json", **{field: value})
    assert said in refused(load_processors, folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("hidden_size", 0), ("num_attention_heads", 0), ("num_attention_heads", 7), ("num_hidden_layers", 10**7)),
        *(("patch_size", 0), ("patch_size", 57), ("image_size", 0), ("image_size", [56, 56]), ("num_channels", 4)),
        *(("hidden_act", "unheard"), ("layer_norm_eps", "small"), ("torch_dtype", "os"), ("intermediate_size", 0)),
    ],
)
def test_a_field_of_the_vit(folder: Path, field: str, value: Any) -> None:
    edit(folder / VIT / "config.json", **{field: value})
    assert "config.json: " in refused(load_processors, folder)
    refused(lambda path: resolve_vit(str(path)), folder / VIT)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"size": 0}, "size is 0; expected an integer or an object, each value an integer or null, 1 to 8,192"),
        ({"crop_size": {"height": 0, "width": 0}}, "crop_size is {'height': 0, 'width': 0}"),
        ({"size": 10**9, "crop_size": 10**9}, "size is 1000000000"),
        ({"size": 28, "crop_size": 28}, "size is 28; expected image_size of the ViT, 56"),
        ({"crop_size": {"shortest_edge": 56}}, "preprocessor_config.json: size"),
        ({"image_std": [0, 0, 0]}, "image_std is [0, 0, 0]; expected a list, each item a number, 1e-06 to"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is [0.5, 0.5]; expected a list, each item a number, 3 of them"),
        ({"image_mean": ["a", 1, 1]}, "image_mean is ['a', 1, 1]"),
        ({"rescale_factor": float("nan")}, "rescale_factor is nan"),
        ({"resample": 99}, "resample is 99"),
        ({"do_resize": "yes"}, "do_resize is 'yes'"),
    ],
)
def test_a_field_of_the_preprocessing(folder: Path, fields: dict[str, Any], said: str) -> None:
    edit(folder / VIT / "preprocessor_config.json", **fields)
    message = refused(load_processors, folder)
    assert "preprocessor_config.json: " in message
    assert said in message


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.json", DEEP, "nested too deeply"),
        ("config.json", '{"text_config":' * 980 + "{}" + "}" * 980, "nested too deeply"),
        ("config.json", '{"hidden_size": 64, "hidden_size": 0}', "'hidden_size' is given more than once"),
        (f"{VIT}/config.json", '{"a":' * 100_000, "nested too deeply"),
        (f"{VIT}/preprocessor_config.json", "[1]", "expected a JSON object"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder is [1]; expected an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "tokenizer_config.json: "),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token is 3; expected text or an object or null"),
        ("special_tokens_map.json", "null", "special_tokens_map.json: expected a JSON object"),
        ("added_tokens.json", '{"a": "b"}', "added_tokens.json: its content is {'a': 'b'}; expected an object"),
        ("tokenizer.model", "", "tokenizer.model: not a SentencePiece model"),
    ],
)
def test_a_file_of_another_form(folder: Path, name: str, text: str, said: str) -> None:
    (folder / name).write_text(text)
    assert said in refused(load_processors, folder)


def test_a_cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.model"
    path.write_bytes(path.read_bytes()[:1_000])
    refused(load_processors, folder)


def test_a_file_larger_than_any(folder: Path) -> None:
    os.truncate(folder / "config.json", 2**40)  # sparse: it needs no disk
    assert "larger than" in refused(load_processors, folder)


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": {"a": "b.bin"}, "metadata": []},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": ["b"]}},
        *(
            {"weight_map": {"a": name}}
            for name in ("../outside.bin", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "\0")
        ),
    ],
    ids=str,
)
def test_a_weight_index(folder: Path, index: Any) -> None:
    (folder.parent / "outside.bin").write_bytes((folder / "pytorch_model-00001-of-00002.bin").read_bytes())
    (folder / INDEX).write_text(json.dumps(index))
    assert INDEX in refused(weight_files, folder)
    refused(lambda path: bin_to_safetensors(path, folder.parent / "converted"), folder)
    assert not (folder.parent / "converted").exists()


def test_weights_that_are_no_floating_point_tensors(folder: Path, tmp_path: Path) -> None:
    weights = read_weights(folder / VIT / "pytorch_model.bin")
    save_file({key: value.to(torch.int8) for key, value in weights.items()}, tmp_path / "model.safetensors")
    assert {value.dtype for value in read_shapes(tmp_path / "model.safetensors").values()} == {torch.int64}
    (folder / VIT / "pytorch_model.bin").rename(tmp_path / "whole.bin")
    shutil.copy(tmp_path / "model.safetensors", folder / VIT)
    message = refused(lambda path: load_model(path, device="cpu"), folder)
    assert "embeddings.class_embedding is int8, expected a floating-point dtype" in message
    for content in ([1], {"a": 3}, {3: torch.zeros(1)}, {"a": torch.zeros(2, 2).to_sparse()}, torch.zeros(1)):
        torch.save(content, tmp_path / "other.bin")
        refused(read_weights, tmp_path / "other.bin")
    assert load_file(tmp_path / "model.safetensors").keys() == weights.keys()


def test_an_index_without_what_transformers_needs(folder: Path) -> None:
    fields = json.loads((folder / INDEX).read_text())
    del fields["metadata"]
    (folder / INDEX).write_text(json.dumps(fields))
    assert len(weight_files(folder)) == 2
    bin_to_safetensors(folder, folder.parent / "converted")
    message = refused(lambda path: load_model(path, device="cpu"), folder)
    assert message.endswith(f'{INDEX}: no metadata, which transformers needs; add "metadata": {{}}')


@pytest.mark.parametrize("fields", [{"eos_token_id": {}}, {"pad_token_id": 10**9}], ids=str)
def test_ids_of_the_generation_settings(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder / "generation_config.json", **fields)
    assert "generation_config.json: " in refused(lambda path: load_model(path, device="cpu"), folder)


def test_wrong_sampling_is_left_out_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong: dict[str, Any] = {"temperature": "hot", "top_p": 3, "top_k": -1, "max_length": 0}
    wrong |= {"cache_implementation": "unheard", "watermarking_config": 7}
    edit(folder / "generation_config.json", **wrong, repetition_penalty=1.5)
    model = load_model(folder, device="cpu").model
    said = [record.getMessage() for record in caplog.records if "the setting is ignored" in record.getMessage()]
    assert len(said) == len(wrong)
    for name, line in zip(sorted(wrong), said, strict=True):
        assert line.startswith(f"{folder}/generation_config.json: {name}")
    kept = model.generation_config.to_dict()
    assert kept["repetition_penalty"] == 1.5
    assert all(kept[name] != value for name, value in wrong.items())


def test_null_and_empty_values_of_other_programs_stand_for_absent_fields(folder: Path) -> None:
    before = load_model(folder, device="cpu")
    null = ("attention_bias", "mlp_bias", "mm_use_im_start_end", "mm_use_im_patch_token", "initializer_range")
    edit(folder / "config.json", **dict.fromkeys(null), quantization_config={}, torch_dtype="torch.float16")
    edit(folder / VIT / "config.json", torch_dtype="auto", initializer_factor=None)
    sides = json.loads((folder / VIT / "preprocessor_config.json").read_text())["size"]
    size = {"shortest_edge": sides if isinstance(sides, int) else sides["shortest_edge"], "longest_edge": None}
    edit(folder / VIT / "preprocessor_config.json", size=size, do_rescale=None)
    edit(folder / "special_tokens_map.json", unk_token=None, additional_special_tokens=None)
    after = load_model(folder, device="cpu")
    assert read_config(folder).dtype == torch.float16
    fields = after.model.config.to_published_dict() | {"torch_dtype": "float32"}
    assert fields == before.model.config.to_published_dict()
    assert before.image_processor.clip_processor.to_dict() == after.image_processor.clip_processor.to_dict()
    assert before.tokenizer("<unk> hi</s>")["input_ids"] == after.tokenizer("<unk> hi</s>")["input_ids"]
    edit(folder / "config.json", torch_dtype="auto")
    assert load_model(folder, device="cpu").model.dtype == before.model.dtype


def test_fields_that_would_replace_methods_or_name_code_are_left_out(folder: Path) -> None:
    hostile = {"to_dict": 1, "__class__": "os", "_attn_implementation": "evil/kernel", "attn_implementation": "evil/k"}
    unused = {
        "per_layer_config": {"0": {}},
        "transformers_weights": "../outside",
        "moe_mode": "kept",
        "to_json_string": 0,
    }
    edit(folder / "config.json", **hostile, **unused)
    edit(folder / VIT / "config.json", **hostile)
    edit(folder / "tokenizer_config.json", vocab_file="/nowhere/tokenizer.model", tokenizer_file="/nowhere/a.json")
    config = load_model(folder, device="cpu").model.config
    assert (config.moe_mode, config._attn_implementation) == ("kept", "sdpa_block")
    assert isinstance(config.to_dict(), dict)


def test_links_to_files_elsewhere_are_read_as_in_the_cache_of_the_hub(folder: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    assert load_model(folder, device="cpu").model.num_parameters() > 0


def test_an_error_of_the_system_is_not_an_error_of_the_file() -> None:
    with pytest.raises(MemoryError), library_errors("a.json"):
        raise MemoryError
    with pytest.raises(PermissionError), library_errors("a.json"):
        raise PermissionError(13, "Permission denied", "b.json")
    with pytest.raises(CheckpointError, match=r"^a.json: KeyError: 'x y'$"), library_errors("a.json"):
        raise KeyError("x y")


def test_values_that_are_not_finite_are_read_where_no_schema_is(tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text('{"loss": NaN}')
    assert list(read_json(tmp_path / "trainer_state.json")) == ["loss"]


@pytest.mark.slow
def test_generated_files() -> None:
    command = [sys.executable, str(ROOT / "scripts/endurance_hostile.py"), "--short", "--minutes", "3"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1].replace("'", '"'))
    assert counts["opened"] > 5
    assert counts["refused"] > 15
