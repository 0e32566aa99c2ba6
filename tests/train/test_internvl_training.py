"""Training of InternVL-Chat: against the recorded losses and gradients, and from its parts."""

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT as YI_VL
from support.golden import ROOT
from support.golden_internvl import CHECKPOINT, GOLDEN, golden_arrays, golden_json, published_name
from support.internvl_parts import NUM_IMAGE_TOKENS, write_parts
from support.training import IMAGES, VIT, flags, train, weights, write_rows
from transformers.trainer_pt_utils import get_parameter_names

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.conversation import Turn
from yivl.data.collator import Collator, normalize_images
from yivl.data.encoding import Encoder
from yivl.data.rows import Row, parse_row
from yivl.errors import YiVLError
from yivl.inference.chat import Chat
from yivl.tokenization import add_image_tokens, load_tokenizer
from yivl.train.__main__ import main
from yivl.train.arguments import parse_arguments
from yivl.train.initialization import load_start, read_start
from yivl.train.parameters import parameter_groups
from yivl.train.refused import internvl_checks

TRAINING = golden_json("train_batches")
# A record that the original masks as a whole, since a literal control token confuses it (docs/fidelity.md).
MASKED = "literal_unk"
RECORDS = {row["id"]: row for row in map(json.loads, (GOLDEN / "training/data.jsonl").read_text().splitlines())}
LITERAL_TAG = "text_with_literal_tag"
"""A record that is refused, since its tag is text."""
BATCHES = {batch["id"]: batch for batch in TRAINING["batches"] if MASKED not in batch["records"]}


def row_of(fields: dict[str, Any]) -> Row:
    if fields["id"] != LITERAL_TAG:
        return parse_row(fields, fields["id"], GOLDEN / "images")
    question, answer = (message["value"] for message in fields["conversations"])
    return Row((Turn(question, answer),), (), LITERAL_TAG, questions=((question,),))


@pytest.fixture(scope="module")
def golden() -> LoadedModel:
    """The golden checkpoint. Tests must not modify it."""
    return load_model(CHECKPOINT, device="cpu")


def encoder_of(loaded: LoadedModel) -> Encoder:
    config = loaded.model.config
    return Encoder(loaded.tokenizer, loaded.image_processor, config.num_patches, 2048, config.prompt_template)


@pytest.mark.parametrize("name", BATCHES)
def test_records_yield_the_loss_and_the_gradients_of_the_original(name: str, golden: LoadedModel) -> None:
    encoder, model = encoder_of(golden), copy.deepcopy(golden.model).train()
    rows = [row_of(RECORDS[record]) for record in BATCHES[name]["records"]]
    for packing in (False, True):
        model.zero_grad(set_to_none=True)
        batch = normalize_images(Collator(0, packing=packing)([encoder(row) for row in rows]), encoder.image_processor)
        loss = model(**batch, skip_logits=True).loss
        loss.backward()
        assert abs(loss.item() - BATCHES[name]["loss"]) < 1e-4
        expected, arrays = TRAINING["grad_l2_norms"][name], golden_arrays("train_batches")
        found = {published_name(key): parameter.grad for key, parameter in model.named_parameters()}
        assert found.keys() == expected.keys()
        for key, gradient in found.items():
            # Of the original, a batch without images has zero gradients in the ViT, not none (fact 29).
            assert gradient is not None, key
            assert gradient.norm().item() == pytest.approx(expected[key], rel=1e-3, abs=1e-6), key
            if (recorded := arrays.get(f"{name}__grad__{key}")) is not None:
                torch.testing.assert_close(gradient, recorded, atol=1e-4, rtol=1e-3)


def test_lengths_are_those_of_the_samples(golden: LoadedModel) -> None:
    """Those of the original depend on which rows have as many characters."""
    recorded = {record["id"]: record for record in golden_json("train_preprocess")["max_length_2048"]}
    encoder = encoder_of(golden)
    for name in {record for batch in BATCHES.values() for record in batch["records"]}:
        row = row_of(RECORDS[name])
        assert encoder.sequence_length(row) == encoder(row).sequence_length == len(recorded[name]["input_ids"])


def test_a_model_of_parts_is_that_of_its_parts(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    train(tmp_path / "out", write_rows(tmp_path / "rows.json"), **parts.flags, max_steps=1, learning_rate=0)
    found, golden = weights(tmp_path / "out"), weights(CHECKPOINT)
    assert found.keys() == golden.keys()
    vocabulary = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    for key, value in found.items():
        assert value.shape == golden[key].shape
        kept = slice(-NUM_IMAGE_TOKENS if key in vocabulary else None)
        assert torch.equal(value[kept], golden[key][kept]), key
    embeddings, head = (found[key] for key in sorted(vocabulary, reverse=True))
    new = embeddings[-NUM_IMAGE_TOKENS:]
    assert new.std() == pytest.approx(0.02, rel=0.2)  # initializer_range
    assert len(new.unique(dim=0)) == NUM_IMAGE_TOKENS
    mean = head[:-NUM_IMAGE_TOKENS].mean(0).expand(NUM_IMAGE_TOKENS, -1)
    torch.testing.assert_close(head[-NUM_IMAGE_TOKENS:], mean)
    published, saved = (json.loads((folder / "config.json").read_text()) for folder in (CHECKPOINT, tmp_path / "out"))
    for name in ("downsample_ratio", "force_image_size", "pad2square", "ps_version", "select_layer", "template"):
        assert saved[name] == published[name], name
    loaded = load_model(tmp_path / "out", device="cpu")
    assert loaded.tokenizer.control_id("<IMG_CONTEXT>") == golden_json("prompts")["special_ids"]["<IMG_CONTEXT>"]
    assert isinstance(Chat(loaded).ask("What is this?", [IMAGES / "photo_rgb.jpg"], max_new_tokens=4), str)


def test_a_dry_run_of_parts_counts_the_tokens_that_are_added(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parts = write_parts(tmp_path)
    for path in tmp_path.glob("*/model.safetensors"):
        path.unlink()
    with caplog.at_level("INFO"):
        main(flags(tmp_path / "out", write_rows(tmp_path / "rows.json"), **parts.flags, dry_run=True))
    table = next(message for message in caplog.messages if message.startswith("part "))
    counts = [int(line.split()[1].replace(",", "")) for line in table.splitlines()[1:]]
    prefixes = ("vision_model.", "mlp1.", "language_model.")
    golden = weights(CHECKPOINT)
    assert counts == [sum(value.numel() for key, value in golden.items() if key.startswith(name)) for name in prefixes]


def test_tokens_that_the_language_model_has_are_not_added_again(tmp_path: Path) -> None:
    parts = write_parts(tmp_path, image_tokens=True)
    train(tmp_path / "out", write_rows(tmp_path / "rows.json"), **parts.flags, max_steps=1, learning_rate=0)
    found, golden = weights(tmp_path / "out"), weights(CHECKPOINT)
    assert found.keys() == golden.keys()
    assert all(torch.equal(value, golden[key]) for key, value in found.items())


def test_norms_have_no_weight_decay(golden: LoadedModel) -> None:
    model = golden.model
    names = {id(parameter): published_name(name) for name, parameter in model.named_parameters()}
    # What the trainer of transformers passes.
    decayed = get_parameter_names(model, [torch.nn.LayerNorm], [r"bias", r"layernorm", r"(?:^|\.)norm(?:$|\.)"])
    training = parse_arguments(flags(Path("out"), "rows.json", weight_decay=0.05)).training
    groups = parameter_groups(model, training, decayed)
    found = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert found
    assert not [name for name in found if "norm" in name or name.startswith("mlp1.0.") or name.endswith("bias")]


def checkpoint_with(folder: Path, **fields: Any) -> Path:
    """Write the golden checkpoint with other fields in its configuration."""
    shutil.copytree(CHECKPOINT, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def test_layers_after_the_selected_one_are_not_trained(tmp_path: Path) -> None:
    base = checkpoint_with(tmp_path / "base", select_layer=-3)
    start = {"model_name_or_path": base, "unfreeze_mm_vision_tower": True, "freeze_backbone": True}
    rows = write_rows(tmp_path / "rows.json")
    train(tmp_path / "out", rows, **start, max_steps=2, learning_rate=1e-2, warmup_ratio=0)
    before, after = weights(base), weights(tmp_path / "out")
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    unused = re.compile(r"vision_model\.encoder\.layers\.[23]\.")
    vision = {key for key in after if key.startswith(("vision_model.", "mlp1."))}
    assert moved == {key for key in vision if not unused.match(key)}
    adapters = {"lora_enable": True, "lora_vision_tower": True, "freeze_mm_mlp_adapter": True}
    train(
        tmp_path / "lora",
        rows,
        **start | {"unfreeze_mm_vision_tower": False, "freeze_backbone": False} | adapters,
        max_steps=1,
    )
    adapted = {
        key.split(".lora_")[0].split("encoder.layers.")[-1] for key in weights(tmp_path / "lora") if "vision" in key
    }
    linears = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert adapted == {f"{layer}.{name}" for layer in (0, 1) for name in linears}


def test_drop_path_is_that_of_the_run_and_only_while_training(tmp_path: Path) -> None:
    rows, start = write_rows(tmp_path / "rows.json"), {"unfreeze_mm_vision_tower": True, "max_steps": 1}
    dropping = parse_arguments(flags(tmp_path, rows, model_name_or_path=CHECKPOINT, drop_path_rate=0.9, **start)).model
    model = load_start(read_start(dropping), dropping, dtype=torch.float32, packing=False)
    layers = model.get_vision_tower().vit.layers
    assert [layer.drop_path.rate for layer in layers] == pytest.approx([0, 0.3, 0.6, 0.9])
    images = torch.randn(2, 3, 84, 84)
    with torch.no_grad():
        first, second = (model.train().encode_images(images) for _ in range(2))
        assert not torch.equal(first, second)
        assert torch.equal(model.eval().encode_images(images), model.encode_images(images))
    # A checkpoint records the rate of its run, which is no default of the next one.
    base = checkpoint_with(tmp_path / "base", vision_config=_vision_fields(drop_path_rate=0.9))
    next_run = parse_arguments(flags(tmp_path, rows, model_name_or_path=base, **start)).model
    assert read_start(next_run).config.vision_config.drop_path_rate == 0


def _vision_fields(**fields: Any) -> dict[str, Any]:
    published: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())["vision_config"]
    return published | fields


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_ps_version_is_that_of_the_flag_for_a_new_model(version: str, tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    common: dict[str, Any] = {"max_steps": 1, "learning_rate": 0, "save_strategy": "no"}
    train(tmp_path / "out", write_rows(tmp_path / "rows.json"), **parts.flags, **common, ps_version=version)
    assert json.loads((tmp_path / "out/config.json").read_text())["ps_version"] == version
    assert load_model(tmp_path / "out", device="cpu").model.model.mm_projector.transposed == (version == "v1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v2"}, "--ps_version v2: .*checkpoint has another projector or ViT; drop them, or initialize"),
        ({"mm_vision_select_layer": -2}, "--mm_vision_select_layer -2: .* has another projector or ViT"),
        ({"vision_tower": VIT}, "--vision_tower .* has another projector or ViT"),
        ({"model_name_or_path": YI_VL, "ps_version": "v1"}, "--ps_version v1: .* has another projector or ViT"),
        (
            {"model_name_or_path": YI_VL, "drop_path_rate": 0.4, "unfreeze_mm_vision_tower": True},
            "--drop_path_rate 0.4: a CLIP has no stochastic depth; drop it",
        ),
        ({"drop_path_rate": 0.4}, "--drop_path_rate 0.4 has no effect on a frozen ViT; add --unfreeze_mm_vision_tower"),
        (
            {"drop_path_rate": 1.0, "unfreeze_mm_vision_tower": True},
            "--drop_path_rate 1.0: expected at least 0 and less",
        ),
        ({"image_size": 98}, "image size 98 has 7 x 7 patches; expected a multiple of 2"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio='square' has no name in the format of InternVL"),
        ({"parts": True, "mm_projector_type": "linear"}, "mm_projector_type='linear'; expected 'internvl_mlp1'"),
        ({"parts": True, "mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature='cls_patch'; expected"),
        ({"parts": True, "mm_vision_select_layer": -9}, "mm_vision_select_layer=-9 of a ViT with 4 layers"),
        ({"parts": True, "lora_enable": True}, "--lora_enable: .* is a language model without a projector"),
        (
            {"parts": True, "vision_tower": VIT, "ps_version": "v1"},
            "--ps_version v1: a model with the ViT .* has no such",
        ),
        ({"parts": True, "vision_tower": VIT}, r"mlp\.pth: .* a projector of type mlp2x_gelu_Norm"),
    ],
)
def test_flags_of_another_model_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    start = write_parts(tmp_path).flags if "parts" in changes else {"model_name_or_path": CHECKPOINT}
    changes = {name: value for name, value in changes.items() if name != "parts"}
    with pytest.raises(YiVLError, match=message) as error:
        train(tmp_path / "out", write_rows(tmp_path / "rows.json"), **start | changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out/config.json").exists()


def test_a_command_of_the_original_is_explained_in_one_message() -> None:
    """Source: OpenGVLab/InternVL, shell/hermes2_yi34b, 448_res_finetune, and defaults of the program."""
    command = """--vision_path v --mlp_path m --llm_path l --conv_style Hermes-2 --output_dir o --meta_path d
     --force_image_size 448 --drop_path_rate 0.4 --down_sample_ratio 0.5 --pad2square False --freeze_llm False
     --freeze_mlp False --freeze_backbone False --vision_select_layer -1 --max_seq_length 2048 --grad_checkpoint True
     --use_data_resampling False --overwrite_output_dir True --dataloader_num_workers 4 --bf16 True --num_train_epochs 1
     --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --evaluation_strategy no --save_strategy steps
     --save_steps 200 --save_total_limit 3 --learning_rate 1e-5 --weight_decay 0.05 --warmup_ratio 0.03
     --lr_scheduler_type cosine --logging_steps 1 --do_train True --group_by_length True --deepspeed z.json
     --report_to tensorboard --unfreeze_vit_layers 0 --use_fast_tokenizer False --normalize_type imagenet"""
    with pytest.raises(YiVLError) as error:
        parse_arguments(command.split())
    message = str(error.value)
    assert "\n" not in message
    assert "unknown flag" not in message
    assert (
        "--freeze_llm: False is not supported: use --freeze_backbone, which freezes the language model here" in message
    )
    assert message.count("is not supported: use --") == 10
    listed = (ROOT / "docs/internvl.md").read_text(encoding="utf-8").split("Flags of the original")[1].split("## ")[0]
    assert set(internvl_checks()) <= set(re.findall(r"`(\w+)", listed))


def test_flags_of_image_tiles_say_that_there_are_none() -> None:
    values = {
        "dynamic_image_size": ("True", "False"),
        "max_dynamic_patch": ("12", "1"),
        "use_thumbnail": ("True", "False"),
    }
    with pytest.raises(YiVLError) as error:
        parse_arguments([part for name, (other, _) in values.items() for part in (f"--{name}", other)])
    for name, (other, _) in values.items():
        assert f"--{name}: {other} is not supported: an image is one square, without tiles" in str(error.value)
    with pytest.raises(YiVLError, match="--model_name_or_path") as error:
        parse_arguments([part for name, (_, own) in values.items() for part in (f"--{name}", own)])
    assert "tiles" not in str(error.value)


def test_parts_that_are_no_such_parts_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    start = write_parts(tmp_path)
    llm = start.language_model
    fields = json.loads((llm / "config.json").read_text())
    (llm / "model.safetensors").unlink()
    for kind in ("mistral", "qwen2"):
        (llm / "config.json").write_text(json.dumps(fields | {"model_type": kind}))
        with pytest.raises(YiVLError, match=rf"config\.json: model_type is '{kind}'; expected 'llama'"):
            read_start(parse_arguments(flags(tmp_path / "out", "rows.json", **start.flags)).model, weights=False)
    (llm / "config.json").write_text(json.dumps(fields))
    for path in llm.glob("*token*"):  # another name of the same length
        path.write_bytes(path.read_bytes().replace(b"<|im_end|>", b"<|my_end|>"))
    with pytest.raises(YiVLError, match=r"llm: the tokenizer has no token '<\|im_end\|>', which the prompt needs"):
        read_start(parse_arguments(flags(tmp_path / "out", "rows.json", **start.flags)).model, weights=False)


def test_null_in_the_files_of_a_tokenizer_is_nothing(tmp_path: Path) -> None:
    folder = write_parts(tmp_path).language_model
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(fields | {"additional_special_tokens": None}))
    tokenizer = load_tokenizer(folder)
    assert len(add_image_tokens(tokenizer)) == len(tokenizer) + NUM_IMAGE_TOKENS
