"""Features, logits and greedy tokens of the reference."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.golden import CHECKPOINT, GOLDEN, golden_arrays, golden_json
from transformers.generation.logits_process import LogitsProcessorList

from yivl.checkpoint.loading import LoadedModel, load_model
from yivl.errors import CheckpointError
from yivl.inference.sampling import Sampling
from yivl.mm_utils import KeywordsStoppingCriteria
from yivl.model.projector import build_projector

GENERATION = golden_json("generation")
PAIRS = GENERATION["pairs"]
WITH_IMAGE = [pair for pair in PAIRS if -200 in pair["input_ids"]]
FEATURES = golden_arrays("features")
LOGITS = golden_arrays("logits")
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def by_id(case: dict[str, Any]) -> str:
    return str(case["id"])


def images_of(pair: dict[str, Any]) -> torch.Tensor | None:
    """A prompt without a placeholder takes no image, although the recording has one."""
    return FEATURES[f"{pair['id']}__pixel_values"][None] if -200 in pair["input_ids"] else None


@pytest.mark.parametrize("pair", WITH_IMAGE, ids=by_id)
def test_tower_and_projector_equal_the_reference(pair: dict[str, Any], loaded: LoadedModel) -> None:
    model = loaded.model
    with torch.no_grad():
        features = model.get_vision_tower()(images_of(pair))
        projected = model.encode_images(images_of(pair))
    torch.testing.assert_close(features[0], FEATURES[f"{pair['id']}__vision_features"], **TOLERANCE)
    torch.testing.assert_close(projected[0], FEATURES[f"{pair['id']}__projected"], **TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pair", PAIRS, ids=by_id)
def test_logits_of_every_recorded_position_equal_the_reference(pair: dict[str, Any], attention: str) -> None:
    model = load_model(CHECKPOINT, device="cpu", attn_implementation=attention).model
    input_ids = torch.tensor([pair["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids, images=images_of(pair), attention_mask=torch.ones_like(input_ids)).logits[0]
    name = pair["id"]
    assert len(logits) == pair["spliced_length"]
    torch.testing.assert_close(logits[pair["logits_start"] :], LOGITS[f"{name}__logits"], **TOLERANCE)
    torch.testing.assert_close(logits.logsumexp(-1), LOGITS[f"{name}__logsumexp"], **TOLERANCE)
    assert logits.argmax(-1).tolist() == LOGITS[f"{name}__argmax"].tolist()


@pytest.mark.parametrize("name", ["p0", "p8"])
def test_spliced_embeddings_equal_the_reference(name: str, loaded: LoadedModel) -> None:
    pair = next(pair for pair in PAIRS if pair["id"] == name)
    with torch.no_grad():
        fused = loaded.model.fuse(torch.tensor([pair["input_ids"]]), images_of(pair))
    torch.testing.assert_close(fused.inputs_embeds[0], FEATURES[f"{name}__inputs_embeds"], **TOLERANCE)


@pytest.mark.parametrize("name", ["p0", "p4"])
def test_hidden_states_equal_the_reference(name: str, loaded: LoadedModel) -> None:
    pair = next(pair for pair in PAIRS if pair["id"] == name)
    with torch.no_grad():
        output = loaded.model(torch.tensor([pair["input_ids"]]), images=images_of(pair), output_hidden_states=True)
    assert len(output.hidden_states) == 5
    for index, hidden in enumerate(output.hidden_states):
        torch.testing.assert_close(hidden[0, -1], FEATURES[f"{name}__hidden_{index}_last_position"], **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("pair", PAIRS, ids=by_id)
def test_greedy_tokens_equal_the_reference(pair: dict[str, Any], use_cache: bool, loaded: LoadedModel) -> None:
    input_ids = torch.tensor([pair["input_ids"]])
    output = loaded.model.generate(
        input_ids, images=images_of(pair), do_sample=False, max_new_tokens=32, use_cache=use_cache
    )
    assert output[0, : input_ids.shape[1]].tolist() == pair["input_ids"]
    assert output[0, input_ids.shape[1] :].tolist() == pair["no_stop"]["ids"]


@pytest.mark.parametrize("pair", PAIRS, ids=by_id)
def test_greedy_tokens_up_to_the_keyword_equal_the_reference(pair: dict[str, Any], loaded: LoadedModel) -> None:
    input_ids, expected = torch.tensor([pair["input_ids"]]), pair["stop"]
    criteria = KeywordsStoppingCriteria([GENERATION["stop_string"]], loaded.tokenizer, input_ids)
    output = loaded.model.generate(
        input_ids, images=images_of(pair), do_sample=False, max_new_tokens=32, stopping_criteria=[criteria]
    )
    new_ids = output[:, input_ids.shape[1] :]
    assert new_ids[0].tolist() == expected["ids"]
    assert loaded.tokenizer.batch_decode(new_ids, skip_special_tokens=True)[0] == expected["text_raw"]


def test_logits_of_every_greedy_step_equal_the_reference(loaded: LoadedModel) -> None:
    pair = PAIRS[0]
    output = loaded.model.generate(
        torch.tensor([pair["input_ids"]]),
        images=images_of(pair),
        do_sample=False,
        max_new_tokens=32,
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(torch.cat(output.logits), LOGITS["p0__step_logits"], **TOLERANCE)


def test_an_image_for_a_prompt_without_a_placeholder_is_refused(loaded: LoadedModel) -> None:
    """The reference ignores it (pair p6): a row of docs/fidelity.md."""
    pair = next(pair for pair in PAIRS if pair["id"] == "p6")
    with pytest.raises(ValueError, match="0 image placeholders but 1 images"):
        loaded.model(torch.tensor([pair["input_ids"]]), images=FEATURES["p6__pixel_values"][None])


@pytest.mark.parametrize("case", GENERATION["stopping_criterion"], ids=lambda case: case["name"])
def test_the_keyword_criterion_answers_as_the_reference(case: dict[str, Any], loaded: LoadedModel) -> None:
    prompt = torch.tensor([[268, 267]])
    criterion = KeywordsStoppingCriteria(["###"], loaded.tokenizer, prompt)
    answers = [
        bool(criterion(torch.cat([prompt, torch.tensor([case["ids"][:length]])], dim=1), None))
        for length in range(1, len(case["ids"]) + 1)
    ]
    assert answers == case["result_after_each_token"]
    assert loaded.tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded"]


def test_the_vit_folder_wins_over_the_main_shards(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    recorded, features = golden_json("precedence"), golden_arrays("precedence")
    with caplog.at_level("INFO"):
        model = load_model(CHECKPOINT, device="cpu").model
    with torch.no_grad():
        ours = model.get_vision_tower()(FEATURES["p0__pixel_values"][None])[0]
    torch.testing.assert_close(ours, features["features_used"], **TOLERANCE)
    assert (ours - features["features_if_main_shards"]).abs().max() > 1
    (message,) = [record.getMessage() for record in caplog.records if "ViT tensors" in record.getMessage()]
    assert message.startswith(f"{recorded['n_vit_tensors']} ViT tensors")


SAMPLING = golden_json("../manifest")["sampling"]


@pytest.mark.parametrize("name", SAMPLING)
def test_sampling_probabilities_equal_the_reference(name: str, loaded: LoadedModel) -> None:
    recorded, settings = golden_arrays("sampling"), SAMPLING[name]
    sampling = Sampling(
        temperature=settings["effective_temperature"],
        top_p=settings["effective_top_p"] or 1.0,
        top_k=settings["effective_top_k"],
    )
    config, _ = loaded.model._prepare_generation_config(
        sampling.generation_config(loaded.tokenizer, 1, loaded.tokenizer.eos_token_id)
    )
    library: LogitsProcessorList = loaded.model._get_logits_processor(generation_config=config, device="cpu")
    for processors in (sampling.logits_processors(), library):  # of sampling, and of beam search
        scores = processors(torch.zeros(1, 1, dtype=torch.long), recorded["logits"][None].clone())
        torch.testing.assert_close(scores.softmax(-1)[0], recorded[f"probs__{name}"], atol=1e-5, rtol=0)


PROJECTORS = golden_json("projectors")


@pytest.mark.parametrize("case", PROJECTORS["types"], ids=lambda case: case["type"])
def test_projector_types_equal_the_reference(case: dict[str, Any]) -> None:
    recorded = load_file(GOLDEN / "expected/projectors.safetensors")
    prefix = f"{case['type']}/state/"
    state = {key.removeprefix(prefix): value for key, value in recorded.items() if key.startswith(prefix)}
    projector = build_projector(case["type"], 48, 64)
    projector.load_state_dict(state, strict=True)
    assert list(projector.state_dict()) == case["state_dict_keys"]
    with torch.no_grad():
        torch.testing.assert_close(projector(recorded["input"]), recorded[f"{case['type']}/output"], **TOLERANCE)


@pytest.mark.parametrize("case", PROJECTORS["unusual_names"], ids=lambda case: case["type"])
def test_an_unknown_projector_type_is_refused_by_name(case: dict[str, Any]) -> None:
    """The reference accepts ``identity_Norm`` and a doubled ``_Norm``: a row of docs/fidelity.md."""
    with pytest.raises(CheckpointError, match=f"mm_projector_type='{case['type']}'"):
        build_projector(case["type"], 48, 64)
