"""The recipe of the small model: tokenizer, symbolic images, patch naming, the loop, and the script at smoke scale."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip import CLIP
from support.documents import code_blocks
from support.golden import CHECKPOINT
from support.training import ROOT
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate
from transformers import LlamaForCausalLM

from yivl.checkpoint.vit import read_clip_weights, read_vit_config
from yivl.constants import SYSTEM_PROMPT
from yivl.conversation import YI_VL, Turn
from yivl.data.collator import Collator
from yivl.model.configuration import YiVLConfig
from yivl.model.modeling import YiVLForCausalLM
from yivl.tiny.recipe import clip, naming
from yivl.tiny.recipe.language_model import (
    GRID,
    PatchVocabulary,
    SymbolicScenes,
    answer_logits,
    small_config,
    symbolic_features,
)
from yivl.tiny.recipe.loop import fit
from yivl.tiny.recipe.tokenizer import PATCH_WORDS, token_ids, train_tokenizer
from yivl.tiny.world.language import caption, detail
from yivl.tiny.world.rendering import render
from yivl.tiny.world.scenes import sample_scene
from yivl.tiny.world.words import LANGUAGES
from yivl.tokenization import YiTokenizer, encode_turns, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> YiTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: YiTokenizer) -> PatchVocabulary:
    return PatchVocabulary(tokenizer)


def test_the_tokenizer_has_the_settings_of_yi(tokenizer: YiTokenizer) -> None:
    ours, theirs = tokenizer.sp_model, load_tokenizer(CHECKPOINT).sp_model
    assert [ours.id_to_piece(token) for token in range(265)] == [theirs.id_to_piece(token) for token in range(265)]
    assert ours.encode(SYSTEM_PROMPT, out_type=str)[:3] == ["This", "▁is", "▁a"]
    assert ours.encode("###", out_type=str) == ["###"]
    assert ours.decode(ours.encode("a  b")) == "a  b"
    assert ours.encode("27", out_type=str) == ["2", "7"]
    assert ours.decode(ours.encode("Łódź 颐和园")) == "Łódź 颐和园"  # by byte fallback


def test_every_patch_label_is_a_single_token_in_both_languages(tokenizer: YiTokenizer) -> None:
    ids = [token for word in PATCH_WORDS for token in token_ids(word, tokenizer)]
    assert len(ids) > 2 * 90
    with pytest.raises(ValueError, match="no token"):
        token_ids(type(PATCH_WORDS[-1])("zeppelin", "飞艇"), tokenizer)


@pytest.mark.parametrize("number", range(20))
def test_no_token_crosses_the_boundary_of_an_answer(tokenizer: YiTokenizer, number: int) -> None:
    scene = sample_scene("train", number)
    for language in LANGUAGES:
        for text in (caption(scene, language), detail(scene, language)):
            encoded = encode_turns([Turn("", text, num_images=1)], tokenizer, YI_VL)
            answer = [token for token, wanted in zip(encoded.input_ids, encoded.is_target, strict=True) if wanted]
            assert tokenizer.decode(answer).strip() == f"{text}\n###"


def test_symbolic_features_are_sums_of_word_embeddings(tokenizer: YiTokenizer, vocabulary: PatchVocabulary) -> None:
    torch.manual_seed(0)
    table = torch.randn(tokenizer.sp_model.vocab_size(), 64)
    word, other = PATCH_WORDS[0], PATCH_WORDS[60]
    bags = vocabulary.bags([(word,), (word, other)])
    features = symbolic_features(bags, table, vocabulary)
    assert torch.allclose(features.pow(2).mean(-1).sqrt(), table.pow(2).mean().sqrt(), rtol=1e-4)
    wanted = table[token_ids(word, tokenizer) + token_ids(other, tokenizer)].sum(0)
    assert functional.cosine_similarity(features[1], wanted, dim=0) > 0.9999


def test_bags_replace_the_pixels_of_a_batch(tokenizer: YiTokenizer, vocabulary: PatchVocabulary) -> None:
    scenes, collate = SymbolicScenes(tokenizer, vocabulary), Collator(pad_token_id=0)
    rows = [scenes[16], scenes[17]]
    batch = collate(rows)
    assert batch["images"].shape == (2, GRID**2, len(PATCH_WORDS))
    assert (batch["input_ids"] == -200).sum(1).tolist() == [1, 1]
    assert [int((row.labels != -100).sum()) for row in rows] == (batch["labels"] != -100).sum(1).tolist()
    model = LlamaForCausalLM(small_config()).eval()
    logits, targets = answer_logits(model, batch, vocabulary, 0.0)
    assert len(logits) == len(targets) == int((batch["labels"] != -100).sum())
    # Padding changes nothing: each sample alone has the same logits.
    alone = torch.cat([answer_logits(model, collate([row]), vocabulary, 0.0)[0] for row in rows])
    assert torch.allclose(logits, alone, atol=1e-4)


def small_model() -> YiVLForCausalLM:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision |= {"patch_size": 8, "image_size": 32}
    config = YiVLConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vision_config=vision,
        mm_vision_tower="./vit/small",
        mm_hidden_size=32,
    )
    return YiVLForCausalLM(config).eval()


def test_naming_interpolates_as_the_model_does_at_both_sizes() -> None:
    model = small_model()
    for side in (32, 64):
        pixels = torch.randn(2, 3, side, side)
        with torch.no_grad():
            handle = naming.interpolate_positions(model.get_vision_tower())
            named = model.encode_images(pixels)
            handle.remove()
            if side == 64:
                model.resize_images(64)
            assert torch.allclose(named, model.encode_images(pixels), atol=1e-5)


def test_the_naming_loss_is_lowest_for_the_correct_labels(tokenizer: YiTokenizer, vocabulary: PatchVocabulary) -> None:
    table = torch.randn(tokenizer.sp_model.vocab_size(), 64)
    bags = vocabulary.bags(render(sample_scene("train", 0), 96).patch_labels(6))[None]
    batch = {"bags": bags, "weights": torch.ones(1, 36)}
    right = symbolic_features(bags, table, vocabulary)
    wrong = right.roll(1, dims=1)
    losses = [float(naming.naming_loss(features, batch, table, vocabulary)) for features in (right, wrong)]
    assert losses[0] < 0.5 * losses[1]


class Halves(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([index / 1000, 1.0])}


def test_an_interrupted_phase_resumes_exactly(tmp_path: Path) -> None:
    def train(folder: Path, stop: int | None) -> nn.Module:
        torch.manual_seed(0)
        module = nn.Linear(2, 1)
        done = 0

        def loss_of(rows: dict[str, torch.Tensor]) -> torch.Tensor:
            nonlocal done
            batch = rows["x"]
            done += 1
            if stop is not None and done > stop:
                raise KeyboardInterrupt
            noise = torch.randn(len(batch), 1)
            return (module(batch) - batch[:, :1] / 2 + 0.1 * noise).pow(2).mean()

        fit(module, Halves(), loss_of, folder, steps=12, batch_size=4, learning_rate=1e-2, warmup=2, save_every=5)
        return module

    whole = train(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", 7)
    parts = train(tmp_path / "parts", None)
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_clip_loads_as_a_vision_tower(tmp_path: Path, tokenizer: YiTokenizer) -> None:
    model = CLIP(**clip.MODEL).eval()
    clip.save_clip(model, tmp_path / "clip")
    config = read_vit_config(tmp_path / "clip")
    assert (config.hidden_size, config.num_hidden_layers, config.image_size) == (192, 8, clip.IMAGE_SIZE)
    assert torch.equal(
        read_clip_weights(tmp_path / "clip")["embeddings.patch_embedding.weight"], model.visual.conv1.weight
    )
    scenes = clip.CaptionedScenes(tokenizer, "train")
    batch = default_collate([scenes[index] for index in range(4)])
    assert torch.isfinite(clip.contrastive_loss(model, batch))


@pytest.mark.slow
def test_the_whole_recipe_runs_and_resumes(tmp_path: Path) -> None:
    """Every phase and stage with a few steps, by the script; a second call finds all of it done."""
    environment = {**os.environ, "SMOKE": "1", "OUT": str(tmp_path / "tiny"), "PYTHON": sys.executable, "THREADS": "1"}

    def make() -> str:
        done = subprocess.run(["scripts/train_tiny.sh"], cwd=ROOT, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = make()
    assert "is there" not in first
    report = (tmp_path / "tiny/report.md").read_text(encoding="utf-8")
    for title in ("new combinations", "no image", "stage 2 without 1", "images: presence", "patches at 192: word"):
        assert title in report
    assert json.loads((tmp_path / "tiny/stage3/config.json").read_text())["architectures"] == ["LlavaLlamaForCausalLM"]
    assert (tmp_path / "tiny/losses.png").stat().st_size > 10_000
    second = make()
    assert second.count("is there") == first.count("==")


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(tmp_path: Path) -> None:
    settings, *commands = code_blocks(ROOT / "docs/tutorial.md", "bash")
    sizes = "TRAIN=600 TEST=100 EPOCHS=3 OUT=out/tutorial PORT=8000"
    assert sizes in settings
    few = settings.replace(sizes, f"TRAIN=8 TEST=2 EPOCHS=1 OUT={tmp_path} PORT=8019")
    command = ["bash", "-euo", "pipefail", "-c", few + "".join(commands)]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("before", "after"):
        scores = json.loads((tmp_path / name / "scores.json").read_text(encoding="utf-8"))["scores"]
        assert [one["number"] for one in scores] == [2]
    assert "outputs: " in done.stdout
    assert '"object":"chat.completion"' in done.stdout
