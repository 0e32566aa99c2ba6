"""Checkpoint folders, good and bad; adapters, quantization, placement."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support.golden import CHECKPOINT, GOLDEN
from support.models import wide_checkpoint

from yivl.checkpoint import cpu_precision
from yivl.checkpoint.folder import read_config
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.checkpoint.saving import save_checkpoint
from yivl.checkpoint.vit import copy_vit_weights
from yivl.errors import CheckpointError, YiVLError
from yivl.model.clip_vit import ClipViT
from yivl.model.modeling import YiVLForCausalLM
from yivl.model.packed_linear import Linear4, Linear8, PackedLinear

VIT = "vit/clip-vit-tiny-random-yi-vl-56"
PROMPT = torch.tensor([[294, 332, 725, -200, 19, 748]])
IMAGE = torch.linspace(-1, 1, 3 * 56 * 56).reshape(1, 3, 56, 56)


def logits_of(model: YiVLForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT, images=IMAGE).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden checkpoint to break."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "model"))


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_bin(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = torch.load(path, weights_only=True)
    change(weights)
    torch.save(weights, path)


SECOND = "pytorch_model-00002-of-00002.bin"
BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config.json: no such file"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), r"config.json: not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), r"config.json: expected a JSON object"),
    "another model": (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "no mm_vision_tower"),
    "no vit": (lambda f: shutil.rmtree(f / "vit"), rf"{VIT}/config.json: no such file"),
    "no vit weights": (
        lambda f: (f / VIT / "pytorch_model.bin").unlink(),
        f"{VIT}: no weights; expected model.safetensors or",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.model").unlink(), "no tokenizer.model"),
    "a tokenizer that is none": (
        lambda f: (f / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1"),
        "tokenizer.model: not a SentencePiece model, or a git-lfs pointer",
    ),
    "no image processor": (lambda f: (f / VIT / "preprocessor_config.json").unlink(), "preprocessor_config.json"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("pytorch_model*")], "no weights"),
    "a shard is missing": (lambda f: (f / SECOND).unlink(), SECOND),
    "a shard is damaged": (lambda f: (f / SECOND).write_bytes(b"PK\3\4 not a zip"), SECOND),
    "missing key": (lambda f: edit_bin(f / SECOND, lambda w: w.pop("lm_head.weight")), "missing lm_head.weight"),
    "unexpected key": (
        lambda f: edit_bin(f / SECOND, lambda w: w.update({"model.extra": torch.zeros(1)})),
        "unexpected model.extra",
    ),
    "wrong shape": (
        lambda f: edit_bin(f / SECOND, lambda w: w.update({"lm_head.weight": torch.zeros(7, 64)})),
        r"lm_head.weight is \[7, 64\], expected \[1024, 64\]",
    ),
    "vit: missing key": (
        lambda f: edit_bin(
            f / VIT / "pytorch_model.bin", lambda w: w.pop("vision_model.encoder.layers.0.mlp.fc1.bias")
        ),
        "missing encoder.layers.0.mlp.fc1.bias",
    ),
    "vit: wrong shape": (
        lambda f: edit_bin(
            f / VIT / "pytorch_model.bin",
            lambda w: w.update({"vision_model.embeddings.position_embedding.weight": torch.zeros(5, 48)}),
        ),
        r"embeddings.position_embedding.weight is \[5, 48\], expected \[17, 48\]",
    ),
    "no tower named": (lambda f: edit_json(f / "config.json", mm_vision_tower=None), "no mm_vision_tower"),
    "projector type": (
        lambda f: edit_json(f / "config.json", mm_projector_type="qformer"),
        "mm_projector_type='qformer'",
    ),
    "saved by LLaVA's scripts": (
        lambda f: edit_json(f / "config.json", mm_projector_type="linear"),
        r"unexpected model.mm_projector.0.bias",
    ),
    "select layer": (lambda f: edit_json(f / "config.json", mm_vision_select_layer=9), "mm_vision_select_layer=9"),
    "select feature": (
        lambda f: edit_json(f / "config.json", mm_vision_select_feature="cls"),
        "mm_vision_select_feature='cls'",
    ),
    "image tokens": (lambda f: edit_json(f / "config.json", mm_use_im_start_end=True), "mm_use_im_start_end"),
    "aspect ratio": (
        lambda f: edit_json(f / "config.json", image_aspect_ratio="anyres"),
        "image_aspect_ratio='anyres'",
    ),
    "a wrong type": (lambda f: edit_json(f / "config.json", hidden_size="wide"), "config.json: .*hidden_size"),
}


@pytest.mark.parametrize("case", BREAK)
def test_a_bad_checkpoint_is_named_in_one_error(case: str, folder: Path) -> None:
    damage, message = BREAK[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder, device="cpu")
    assert str(folder) in str(caught.value) or "=" in str(caught.value)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("pwned").write_text, ("",))


def test_code_in_a_pickled_file_does_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    edit_bin(folder / VIT / "pytorch_model.bin", lambda weights: weights.update({"vision_model.x": Payload()}))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_model(folder, device="cpu")
    shutil.copyfile(CHECKPOINT / VIT / "pytorch_model.bin", folder / VIT / "pytorch_model.bin")
    edit_bin(folder / SECOND, lambda weights: weights.update({"model.x": Payload()}))
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        load_model(folder, device="cpu")
    assert not (folder / "pwned").exists()


def test_a_missing_folder_that_is_no_hub_model_says_what_to_give() -> None:
    with pytest.raises(CheckpointError, match=r"no such folder, and no model of that name.*\(\w+: .+\)$"):
        load_model("nowhere/at-all")
    with pytest.raises(CheckpointError, match="the model path is empty"):
        load_model("")


def test_a_hub_id_is_downloaded_once_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    """The real download code on a local hub cache: offline it resolves what an earlier download left there."""
    repository = tmp_path / "models--someone--tiny-yi-vl"
    shutil.copytree(CHECKPOINT, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = load_model("someone/tiny-yi-vl", device="cpu")
    assert model.name == "tiny-yi-vl"
    torch.testing.assert_close(logits_of(model.model), logits_of(loaded.model))


def test_equal_vit_copies_are_not_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    vit = torch.load(folder / VIT / "pytorch_model.bin", weights_only=True)
    for shard in folder.glob("pytorch_model-*.bin"):
        edit_bin(
            shard,
            lambda weights: weights.update(
                {
                    key: vit[key.removeprefix("model.vision_tower.vision_tower.")]
                    for key in weights
                    if key.startswith("model.vision_tower.")
                }
            ),
        )
    with caplog.at_level(logging.INFO):
        load_model(folder, device="cpu")
    assert "differ" not in caplog.text


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_a_vit_in_safetensors_loads_under_both_spellings(prefix: str, folder: Path, loaded: LoadedModel) -> None:
    weights = torch.load(folder / VIT / "pytorch_model.bin", weights_only=True)
    renamed = {prefix + key.removeprefix("vision_model."): value.clone() for key, value in weights.items()}
    renamed[prefix + "embeddings.position_ids"] = torch.arange(17)
    save_file(renamed, folder / VIT / "model.safetensors")
    (folder / VIT / "pytorch_model.bin").unlink()
    torch.testing.assert_close(logits_of(load_model(folder, device="cpu").model), logits_of(loaded.model))


def test_main_shards_without_the_vit_load_too(folder: Path, loaded: LoadedModel) -> None:
    for shard in folder.glob("pytorch_model-*.bin"):
        edit_bin(shard, lambda w: [w.pop(key) for key in list(w) if key.startswith("model.vision_tower.")])
    torch.testing.assert_close(logits_of(load_model(folder, device="cpu").model), logits_of(loaded.model))


def test_an_absolute_vision_tower_path_stays_as_it_is(folder: Path, tmp_path: Path, loaded: LoadedModel) -> None:
    shutil.move(folder / VIT, tmp_path / "elsewhere")
    edit_json(folder / "config.json", mm_vision_tower=str(tmp_path / "elsewhere"))
    torch.testing.assert_close(logits_of(load_model(folder, device="cpu").model), logits_of(loaded.model))


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("float16", torch.float16)])
def test_dtype_is_obeyed(dtype: Any, expected: torch.dtype) -> None:
    model = load_model(CHECKPOINT, device="cpu", dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert not model.training


def quantized_names(model: YiVLForCausalLM, kind: type) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kind)}


LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def decoder_linears(num_layers: int) -> set[str]:
    return {f"model.layers.{layer}.{name}" for layer in range(num_layers) for name in LINEARS}


def assert_computes(model: YiVLForCausalLM, exact: YiVLForCausalLM) -> None:
    """Check that a model computes what ``exact``, in float32, does with the same dequantized weights."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            exact.get_submodule(name).weight.data = module.weight
    similarity = torch.nn.functional.cosine_similarity(logits_of(model).float(), logits_of(exact), dim=-1)
    assert similarity.min() > 0.999


@pytest.mark.parametrize(("bits", "kind"), [("load_in_4bit", Linear4), ("load_in_8bit", Linear8)])
def test_quantization_skips_tower_projector_and_lm_head(bits: str, kind: type, tmp_path: Path) -> None:
    model = load_model(CHECKPOINT, device="cpu", **{bits: True}).model
    assert quantized_names(model, kind) == quantized_names(model, PackedLinear) == decoder_linears(4)
    assert model.is_quantized
    exact = load_model(CHECKPOINT, device="cpu").model
    original = exact.get_submodule("model.layers.1.mlp.down_proj").weight.data
    assert_computes(model, exact)
    error = (model.get_submodule("model.layers.1.mlp.down_proj").weight - original).abs().max()
    assert 0 < error < 0.1 * original.abs().max()
    with pytest.raises(ValueError, match="quantized model cannot be saved"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize(("bits", "kind"), [(4, Linear4bit), (8, Linear8bitLt)])
def test_quantization_for_training_is_that_of_bitsandbytes(bits: int, kind: type, tmp_path: Path) -> None:
    folder = wide_checkpoint(tmp_path / "wide")
    model = YiVLForCausalLM.from_pretrained(folder, bits=bits, device_map={"": "cpu"})
    assert quantized_names(model, kind) == decoder_linears(2)
    with pytest.raises(ValueError, match="quantized model cannot be saved"):
        model.save_pretrained(tmp_path / "saved")


def test_a_cast_leaves_quantized_weights_as_they_are() -> None:
    for bits in ("load_in_4bit", "load_in_8bit"):
        model = load_model(CHECKPOINT, device="cpu", **{bits: True}).model
        before = {name: value.clone() for name, value in model.named_buffers()}
        assert logits_of(model.to(torch.bfloat16)).dtype == torch.bfloat16
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_impossible_quantization_is_refused(adapter: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(YiVLError, match="exclude each other"):
        load_model(CHECKPOINT, load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(YiVLError, match="dtype='fp16'; expected one of auto, float32"):
        load_model(CHECKPOINT, dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(YiVLError, match="an adapter is merged into unquantized weights"):
        load_model(adapter[0], model_base=CHECKPOINT, device="cpu", load_in_8bit=True, merge_adapter=True)


@pytest.fixture
def saved_in(tmp_path: Path) -> Callable[[torch.dtype], Path]:
    """The golden checkpoint in another dtype."""

    def save(dtype: torch.dtype) -> Path:
        folder = tmp_path / str(dtype)
        source = load_model(CHECKPOINT, device="cpu", dtype=dtype)
        processor = source.image_processor.clip_processor
        save_checkpoint(source.model, folder, tokenizer=source.tokenizer, image_processor=processor)
        return folder

    return save


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize(
    ("stored", "has_bfloat16", "is_float32"),
    [
        (torch.bfloat16, True, False),
        (torch.bfloat16, False, True),
        (torch.float16, True, True),
        (torch.float16, False, True),
    ],
)
def test_16_bit_weights_are_computed_in_what_the_cpu_has(
    stored: torch.dtype,
    has_bfloat16: bool,
    is_float32: bool,
    bits: int,
    saved_in: Callable[[torch.dtype], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = saved_in(stored)
    monkeypatch.setattr(cpu_precision, "has_native_bfloat16", lambda: has_bfloat16)
    flags = {"load_in_8bit": bits == 8, "load_in_4bit": bits == 4}
    with caplog.at_level(logging.INFO):
        model = load_model(folder, device="cpu", **flags).model
    assert len([line for line in caplog.messages if "this CPU has" in line]) == 1
    computed = torch.float32 if is_float32 else stored
    logits = logits_of(model)
    assert (model.dtype, logits.dtype) == (computed, computed)
    matrices = [model.lm_head, model.model.mm_projector[0], model.get_input_embeddings()]
    assert {module.weight.dtype for module in matrices} == {stored}
    assert {layer.product_dtype for layer in model.modules() if isinstance(layer, PackedLinear)} <= {computed}
    exact = load_model(folder, device="cpu", dtype="float32").model
    assert_computes(model, exact)
    if is_float32 and bits == 16:
        torch.testing.assert_close(logits, logits_of(exact), atol=1e-3, rtol=1e-4)
        weights = exact.state_dict()
        assert all(torch.equal(value.float(), weights.pop(key)) for key, value in model.state_dict().items())
        assert not weights


def test_a_dtype_that_is_asked_for_is_obeyed_where_the_cpu_lacks_it(
    saved_in: Callable[[torch.dtype], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_in(torch.bfloat16)
    monkeypatch.setattr(cpu_precision, "has_native_bfloat16", lambda: False)
    model = load_model(folder, device="cpu", dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert logits_of(model).dtype == torch.bfloat16
    model = load_model(folder, device="cpu", dtype="bfloat16", load_in_8bit=True).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {layer.product_dtype for layer in model.modules() if isinstance(layer, PackedLinear)} == {torch.float32}


def test_a_model_of_16_bit_weights_is_saved_as_it_was(
    saved_in: Callable[[torch.dtype], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_in(torch.bfloat16)
    monkeypatch.setattr(cpu_precision, "has_native_bfloat16", lambda: False)
    model = load_model(folder, device="cpu").model
    assert model.dtype == torch.float32
    save_checkpoint(model, tmp_path / "saved")
    before, after = (
        {key: value for file in path.glob("*.safetensors") for key, value in load_file(file).items()}
        for path in (folder, tmp_path / "saved")
    )
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_the_numbered_cpu_is_the_cpu_and_quantized_layers_stay_there(bits: str) -> None:
    model = load_model(CHECKPOINT, device="cpu:0", **{bits: True}).model
    assert quantized_names(model, PackedLinear)
    with pytest.raises(YiVLError, match="load it with the other device"):
        model.to("meta")


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_an_adapter_goes_on_quantized_layers(bits: str, adapter: tuple[Path, torch.Tensor]) -> None:
    folder, _ = adapter
    model = load_model(folder, model_base=CHECKPOINT, device="cpu", **{bits: True}).model
    assert len(quantized_names(model, PackedLinear)) == len(decoder_linears(4))
    assert_computes(model, load_model(folder, model_base=CHECKPOINT, device="cpu").model)


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A LoRA adapter and a trained projector, and the logits it gives."""
    model = get_peft_model(
        load_model(CHECKPOINT, device="cpu").model,
        LoraConfig(r=4, target_modules=r"model\.layers\.\d+\..*_proj", init_lora_weights=False),
    )
    base = model.get_base_model()
    with torch.no_grad():
        base.model.mm_projector[0].weight += 0.1
    model.save_pretrained(tmp_path / "adapter")
    trained = {f"base_model.model.{k}": v for k, v in base.state_dict().items() if "mm_projector" in k}
    save_file(trained, tmp_path / "adapter/non_lora_trainables.safetensors")
    return tmp_path / "adapter", logits_of(base.eval())


def test_an_adapter_goes_on_its_base_with_all_that_was_trained(
    adapter: tuple[Path, torch.Tensor], loaded: LoadedModel
) -> None:
    folder, expected = adapter
    assert (expected - logits_of(loaded.model)).abs().max() > 0.1
    torch.testing.assert_close(logits_of(load_model(folder, model_base=CHECKPOINT, device="cpu").model), expected)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=str(CHECKPOINT))
    torch.testing.assert_close(logits_of(load_model(folder, device="cpu").model), expected)


def test_non_lora_trainables_of_llava_are_read(adapter: tuple[Path, torch.Tensor]) -> None:
    folder, expected = adapter
    path = folder / "non_lora_trainables.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    torch.testing.assert_close(logits_of(load_model(folder, model_base=CHECKPOINT, device="cpu").model), expected)


def test_a_bad_adapter_is_named(adapter: tuple[Path, torch.Tensor]) -> None:
    folder, _ = adapter
    edit_json(folder / "adapter_config.json", base_model_name_or_path=None)
    edit_json(folder / "adapter_config.json", target_modules=["no_such_layer"])
    with pytest.raises(CheckpointError, match="not an adapter of this base model"):
        load_model(folder, model_base=CHECKPOINT, device="cpu")
    edit_json(folder / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"do not fit this base model: unexpected base_model.*; \d+ more$"):
        load_model(folder, model_base=CHECKPOINT, device="cpu")
    edit_json(folder / "adapter_config.json", target_modules=r"model\.layers\.\d+\..*_proj")
    with pytest.raises(CheckpointError, match="--model-base"):
        load_model(folder, device="cpu")
    save_file({"model.nothing": torch.zeros(1)}, folder / "non_lora_trainables.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.nothing"):
        load_model(folder, model_base=CHECKPOINT, device="cpu")
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json"):
        load_model(CHECKPOINT, model_base=CHECKPOINT, device="cpu")


def test_targets_named_by_their_last_part_leave_the_vit_alone(adapter: tuple[Path, torch.Tensor]) -> None:
    """LLaVA's adapters: ``q_proj`` is also a name in the ViT."""
    folder, expected = adapter
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    edit_json(folder / "adapter_config.json", target_modules=names)
    model = load_model(folder, model_base=CHECKPOINT, device="cpu").model
    torch.testing.assert_close(logits_of(model), expected)
    assert not [name for name, _ in model.get_vision_tower().named_parameters() if "lora" in name]
    with pytest.raises(CheckpointError, match="merge the adapter first"):
        model.save_pretrained(folder.parent / "saved")


def test_over_several_devices_the_tower_stays_in_one_piece() -> None:
    """What ``device_map="auto"`` computes for two GPUs too small for the whole; no GPU is needed for the plan."""
    with torch.device("meta"):
        model = YiVLForCausalLM(read_config(GOLDEN / "yi-vl-34b"))
    plan = infer_auto_device_map(
        model,
        max_memory={0: "40GB", 1: "80GB"},
        no_split_module_classes=model._no_split_modules,
        dtype=torch.bfloat16,
    )
    assert set(plan.values()) == {0, 1}
    tower = {device for name, device in plan.items() if name.startswith("model.vision_tower")}
    assert len(tower) == 1
    assert all("layers" not in name.removeprefix("model.layers.") for name in plan)


def test_a_vit_without_a_place_is_one_clear_line(loaded: LoadedModel) -> None:
    vit = loaded.model.get_vision_tower().vit
    with torch.device("meta"):
        offloaded = ClipViT(vit.config)
    with pytest.raises(CheckpointError, match="the device has no memory for the ViT"):
        copy_vit_weights(offloaded, vit.state_dict(), source="here")


def test_a_gpu_that_is_too_small_keeps_the_vision_modules() -> None:
    with torch.device("meta"):
        model = YiVLForCausalLM(read_config(GOLDEN / "yi-vl-34b"))
    plan = infer_auto_device_map(
        model,
        max_memory={0: "30GB", "cpu": "80GB"},
        no_split_module_classes=model._no_split_modules,
        dtype=torch.bfloat16,
    )
    vision = {device for name, device in plan.items() if "vision_tower" in name or "mm_projector" in name}
    assert vision == {0}
    assert "cpu" in plan.values()
