"""The model beyond the golden vectors: batches, padding, caches, precision, compilation."""

import copy
import shutil
from typing import Any

import pytest
import torch
from support.golden import CHECKPOINT, GOLDEN
from transformers import DynamicCache, GenerationConfig, StaticCache

from yivl.checkpoint.folder import read_config
from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.constants import IGNORE_INDEX
from yivl.image_processing import load_image
from yivl.model.modeling import YiVLForCausalLM

PROMPTS = [
    [294, 332, 725, -200, 19, 748, 328, 287, 285, 265, 358, 348, 739],
    [294, 332, 725, 694, 619, 268],
    [294, -200, 725, -200, 694, 619, 268, 583, 375],
]
"""One image; none; two."""


@pytest.fixture(scope="module")
def images(loaded: LoadedModel) -> torch.Tensor:
    names = ("square_rgb.png", "photo_rgb.jpg", "wide_rgb.png")
    return loaded.image_processor([load_image(GOLDEN / "images" / name) for name in names])


def padded(side: str, fill: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, PROMPTS))
    ids, mask = [], []
    for prompt in PROMPTS:
        padding = longest - len(prompt)
        ids.append([fill] * padding + prompt if side == "left" else prompt + [fill] * padding)
        mask.append([0] * padding + [1] * len(prompt) if side == "left" else [1] * len(prompt) + [0] * padding)
    return torch.tensor(ids), torch.tensor(mask)


def last_logits(model: YiVLForCausalLM, prompt: list[int], images: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt]), images=images).logits[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_the_logits_of_single_rows(side: str, loaded: LoadedModel, images: torch.Tensor) -> None:
    ids, mask = padded(side)
    with torch.no_grad():
        logits = loaded.model(ids, images=images, attention_mask=mask).logits
        fused = loaded.model.fuse(ids, images, attention_mask=mask)
    for row, (prompt, own) in enumerate(zip(PROMPTS, [images[:1], None, images[1:]], strict=True)):
        alone = last_logits(loaded.model, prompt, own)
        torch.testing.assert_close(logits[row][fused.attention_mask[row] == 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_generate_the_tokens_of_single_rows(side: str, loaded: LoadedModel, images: torch.Tensor) -> None:
    ids, mask = padded(side)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 1023}
    batch = loaded.model.generate(ids, images=images, attention_mask=mask, **settings)
    assert batch[:, : ids.shape[1]].tolist() == ids.tolist()
    for row, (prompt, own) in enumerate(zip(PROMPTS, [images[:1], None, images[1:]], strict=True)):
        alone = loaded.model.generate(torch.tensor([prompt]), images=own, **settings)
        assert batch[row, ids.shape[1] :].tolist() == alone[0, len(prompt) :].tolist()


def test_images_may_be_a_list_of_single_or_stacked_images(loaded: LoadedModel, images: torch.Tensor) -> None:
    expected = loaded.model.encode_images(images)
    for form in (list(images), [images[:1], images[1:]], [images[0], images[1:]], images[None]):
        torch.testing.assert_close(loaded.model.encode_images(form), expected)
    torch.testing.assert_close(loaded.model.encode_images(images[0]), expected[:1])


def test_an_unmasked_pad_id_is_an_ordinary_token(loaded: LoadedModel) -> None:
    """The reference masks it, in the wrong place after an image: a row of docs/fidelity.md."""
    prompt = torch.tensor([[294, 332, 0, 725, 268]])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    explicit = loaded.model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert loaded.model.generate(prompt, **settings).tolist() == explicit.tolist()


@pytest.mark.parametrize("cached", [3, 18, 20])
def test_a_filled_cache_gives_the_tokens_of_an_empty_one(
    cached: int, loaded: LoadedModel, images: torch.Tensor
) -> None:
    model, prompt = loaded.model, torch.tensor([PROMPTS[0]])
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(prompt, images=images[:1], **settings)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(inputs_embeds=model.fuse(prompt, images[:1]).inputs_embeds[:, :cached], past_key_values=cache)
    assert cache.get_seq_length() == cached
    assert model.generate(prompt, images=images[:1], past_key_values=cache, **settings).tolist() == expected.tolist()


def test_beam_search_sampling_and_penalties_work_with_images(loaded: LoadedModel, images: torch.Tensor) -> None:
    prompt = torch.tensor([PROMPTS[0]])
    output = loaded.model.generate(
        prompt,
        images=images[:1],
        num_beams=3,
        num_return_sequences=2,
        repetition_penalty=1.3,
        do_sample=True,
        max_new_tokens=5,
    )
    assert output.shape == (2, len(PROMPTS[0]) + 5)
    assert output[:, : len(PROMPTS[0])].tolist() == [PROMPTS[0]] * 2


def test_generation_without_a_length_ends_with_the_context(loaded: LoadedModel) -> None:
    model = load_model(CHECKPOINT, device="cpu").model
    model.config.max_position_embeddings = 30
    output = model.generate(torch.tensor([PROMPTS[0]]), images=torch.zeros(1, 3, 56, 56), eos_token_id=1023)
    assert output.shape[1] == 30 - 15  # the image of the prompt takes 15 positions more than its id


@pytest.mark.parametrize("form", ["keyword", "config"])
def test_a_length_is_counted_in_ids(form: str, loaded: LoadedModel, images: torch.Tensor) -> None:
    length = len(PROMPTS[0]) + 7
    config = GenerationConfig(max_length=length, do_sample=False, eos_token_id=1023, pad_token_id=0)
    settings = {"max_length": length, "do_sample": False, "eos_token_id": 1023}
    settings = {"generation_config": config} if form == "config" else settings
    output = loaded.model.generate(torch.tensor([PROMPTS[0]]), images=images[:1], **settings)
    assert output.shape[1] == length


def test_beams_are_those_of_a_search_over_plain_embeddings(loaded: LoadedModel, images: torch.Tensor) -> None:
    model, prompt = loaded.model, torch.tensor([PROMPTS[0]])
    settings: dict[str, Any] = {"num_beams": 4, "do_sample": False, "max_new_tokens": 8, "eos_token_id": 1023}
    beams = model.generate(prompt, images=images[:1], **settings)
    fused = model.fuse(prompt, images[:1])
    with torch.no_grad():
        plain = super(YiVLForCausalLM, model).generate(
            inputs_embeds=fused.inputs_embeds, attention_mask=fused.attention_mask, **settings
        )
    assert beams[0, len(PROMPTS[0]) :].tolist() == plain[0].tolist()
    greedy = model.generate(prompt, images=images[:1], **(settings | {"num_beams": 1}))
    assert beams.tolist() != greedy.tolist()


def test_the_decoding_loop_of_llava_works(loaded: LoadedModel, images: torch.Tensor) -> None:
    """Every step passes images, which are ignored, and a mask that counts ids, which is extended."""
    model, ids = loaded.model, torch.tensor([PROMPTS[0]])
    expected = model.generate(ids, images=images[:1], do_sample=False, max_new_tokens=5, eos_token_id=1023)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        output = model(ids, images=images[:1], attention_mask=mask, use_cache=True)
        tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(4):
            mask = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], dim=1)
            output = model(tokens[-1], images=images[:1], attention_mask=mask, past_key_values=output.past_key_values)
            tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
    assert torch.cat(tokens, dim=1).tolist() == expected[:, ids.shape[1] :].tolist()


def test_prefill_with_an_empty_cache_accepts_images(loaded: LoadedModel, images: torch.Tensor) -> None:
    cache = DynamicCache(config=loaded.model.config)
    prompt = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        logits = loaded.model(prompt, images=images[:1], past_key_values=cache).logits
    torch.testing.assert_close(logits[0], last_logits(loaded.model, PROMPTS[0], images[:1]))
    with pytest.raises(ValueError, match="filled cache"):
        loaded.model(prompt, images=images[:1], past_key_values=cache)


def test_only_the_selected_layers_run(loaded: LoadedModel) -> None:
    tower = loaded.model.get_vision_tower()
    calls = []
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: calls.append(index))
        for index, layer in enumerate(tower.vit.encoder.layers)
    ]
    tower(torch.zeros(1, 3, 56, 56))
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2]


def test_the_class_token_is_kept_with_cls_patch() -> None:
    config = read_config(CHECKPOINT)
    config.mm_vision_select_feature = "cls_patch"
    model = YiVLForCausalLM(config).eval()
    assert config.num_patches == 17
    assert model.encode_images(torch.zeros(2, 3, 56, 56)).shape == (2, 17, 64)
    assert last_logits(model, PROMPTS[0], torch.zeros(1, 3, 56, 56)).shape == (13 + 16, 1024)


def test_prefill_computes_logits_for_the_last_position_only(loaded: LoadedModel, images: torch.Tensor) -> None:
    shapes = []
    hook = loaded.model.lm_head.register_forward_hook(lambda *arguments: shapes.append(arguments[2].shape[:2]))
    loaded.model.generate(torch.tensor([PROMPTS[0]]), images=images[:1], do_sample=False, max_new_tokens=3)
    hook.remove()
    assert shapes == [(1, 1)] * 3


def test_training_computes_logits_only_at_supervised_positions(loaded: LoadedModel, images: torch.Tensor) -> None:
    model = load_model(CHECKPOINT, device="cpu").model.train()
    rows = []
    model.lm_head.register_forward_hook(lambda *arguments: rows.append(arguments[2].shape[0]))
    labels = torch.full((1, len(PROMPTS[0])), IGNORE_INDEX)
    labels[0, -3:] = torch.tensor(PROMPTS[0][-3:])
    output = model(torch.tensor([PROMPTS[0]]), images=images[:1], labels=labels, skip_logits=True)
    output.loss.backward()
    assert output.logits is None
    assert model(torch.tensor([PROMPTS[0]]), images=images[:1], labels=labels).logits is not None  # by default
    assert rows[0] == 3
    assert output.loss > 0


def test_the_loss_is_divided_by_the_tokens_of_the_optimizer_step(loaded: LoadedModel) -> None:
    prompt = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        mean = loaded.model(prompt, labels=prompt).loss
        share = loaded.model(prompt, labels=prompt, num_items_in_batch=10).loss
    torch.testing.assert_close(share, mean * 5 / 10)  # six tokens, five of them are predicted


def test_a_batch_without_labels_has_a_zero_loss_in_the_autograd_graph(loaded: LoadedModel) -> None:
    prompt = torch.tensor([PROMPTS[1]])
    loss = loaded.model(prompt, labels=torch.full_like(prompt, IGNORE_INDEX)).loss
    assert loss.item() == 0
    assert loss.requires_grad


def test_bfloat16_runs_close_to_float32(loaded: LoadedModel, images: torch.Tensor) -> None:
    model = load_model(CHECKPOINT, device="cpu", dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    ours = last_logits(model, PROMPTS[0], images[:1]).float()
    theirs = last_logits(loaded.model, PROMPTS[0], images[:1])
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min() > 0.99


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler (g++)")
def test_a_decoding_step_compiles_without_graph_breaks(loaded: LoadedModel, images: torch.Tensor) -> None:
    model, prompt = loaded.model, torch.tensor([PROMPTS[0]])
    expected = model.generate(prompt, images=images[:1], do_sample=False, max_new_tokens=6, eos_token_id=1023)
    cache = StaticCache(config=model.config, max_cache_len=64)
    step = torch.compile(model.forward, fullgraph=True)
    with torch.no_grad():
        fused = model.fuse(prompt, images[:1])
        logits = model(inputs_embeds=fused.inputs_embeds, past_key_values=cache).logits
        tokens = [logits[:, -1].argmax(-1, keepdim=True)]
        for index in range(5):
            position = torch.tensor([[fused.inputs_embeds.shape[1] + index]])
            logits = step(input_ids=tokens[-1], past_key_values=cache, position_ids=position).logits
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    assert torch.cat(tokens, dim=1).tolist() == expected[:, prompt.shape[1] :].tolist()


def test_a_static_cache_gives_the_same_tokens(loaded: LoadedModel, images: torch.Tensor) -> None:
    prompt, settings = torch.tensor([PROMPTS[0]]), {"do_sample": False, "max_new_tokens": 8}
    expected = loaded.model.generate(prompt, images=images[:1], **settings)
    output = loaded.model.generate(prompt, images=images[:1], cache_implementation="static", **settings)
    assert output.tolist() == expected.tolist()


@pytest.mark.parametrize("trains_vision", [True, False])
def test_text_only_training_gives_trainable_vision_parameters_zero_gradients(
    trains_vision: bool, loaded: LoadedModel
) -> None:
    model = copy.deepcopy(loaded.model).train()
    vision = [*model.get_vision_tower().parameters(), *model.model.mm_projector.parameters()]
    for parameter in vision:
        parameter.requires_grad = trains_vision
    calls: list[int] = []
    model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    prompt = torch.tensor([PROMPTS[1]])
    loss = model(prompt, labels=prompt).loss
    loss.backward()
    torch.testing.assert_close(loss.detach(), loaded.model(prompt, labels=prompt).loss)
    assert len(calls) == trains_vision
    gradients = [parameter.grad for parameter in vision if parameter.grad is not None]
    assert bool(gradients) == trains_vision
    assert not any(gradient.any() for gradient in gradients)


def test_a_text_only_prompt_does_not_run_the_vit(loaded: LoadedModel) -> None:
    calls = []
    hook = loaded.model.get_vision_tower().register_forward_hook(lambda *_: calls.append(1))
    loaded.model.generate(torch.tensor([PROMPTS[1]]), do_sample=False, max_new_tokens=2)
    hook.remove()
    assert calls == []
