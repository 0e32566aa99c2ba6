"""Rows, samples and batches against the recorded preprocessing of the reference, and every invalid row."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import GOLDEN, golden_arrays, golden_json

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import IGNORE_INDEX
from yivl.conversation import YI_VL, Turn
from yivl.data.collator import Collator, normalize_images
from yivl.data.encoding import Encoder, Sample
from yivl.data.rows import RowError, log_notices, parse_row, read_rows
from yivl.errors import CheckpointError
from yivl.tokenization import encode_turns, tokenize

IMAGES = GOLDEN / "images"
RECORDED = {case["id"]: case for case in golden_json("train_preprocess")["dataset"]["model_max_length_2048"]}
RECORDS = {record["id"]: record for record in json.loads((GOLDEN / "training/data.json").read_text(encoding="utf-8"))}

# Rows of docs/fidelity.md: the reference trains on prompts that never occur at inference; here they are errors.
REFUSED = {
    "capitalised_roles": "unknown role 'Human'",
    "placeholder_without_image": "1 image placeholders but 0 images",
    "placeholder_in_answer": "an image placeholder in an answer",
    "single_human_only": "the last question has no answer",
    "two_placeholders_one_turn": "2 image placeholders but 1 images",
    "image_two_turns_two_placeholders": "2 image placeholders but 1 images",
}
# These differ on purpose: a typed "<unk>" stays text, "assistant" is the answering role, an image without a placeholder
# belongs to the first turn, an answer at the start is dropped, and a system message replaces that of Yi-VL.
DIFFERENT = {
    "literal_unk_text_only",
    "literal_unk_image",
    "readme_roles_human_assistant",
    "image_without_placeholder",
    "gpt_first",
    "system_role",
}


def encoder(loaded: LoadedModel, max_length: int = 2048) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, max_length, YI_VL)


def sample_of(name: str, loaded: LoadedModel, max_length: int = 2048) -> Sample:
    return encoder(loaded, max_length)(parse_row(RECORDS[name], name, IMAGES))


@pytest.mark.parametrize("name", sorted(RECORDS.keys() - REFUSED.keys() - DIFFERENT))
def test_ids_equal_the_reference_and_the_loss_is_computed_on_the_answers(name: str, loaded: LoadedModel) -> None:
    sample, recorded = sample_of(name, loaded), RECORDED[name]
    assert sample.input_ids.tolist() == recorded["input_ids"]
    # The reference supervises role headers and two tokens of each question too (docs/fidelity.md); never less.
    supervised = sample.labels != IGNORE_INDEX
    assert (torch.tensor(recorded["labels"])[supervised] == sample.labels[supervised]).all()
    answers = [message["value"] for message in RECORDS[name]["conversations"] if message["from"] == "gpt"]
    shown = loaded.tokenizer.decode([694, *sample.labels[supervised].tolist()])
    assert shown == "".join(f" {answer}\n###" for answer in answers)


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_the_reference_misreads_is_an_error_with_the_reason(name: str) -> None:
    with pytest.raises(RowError, match=f"^{name}: {REFUSED[name]}"):
        parse_row(RECORDS[name], name, IMAGES)


def test_the_published_readme_role_is_the_answering_role(loaded: LoadedModel) -> None:
    sample = sample_of("readme_roles_human_assistant", loaded)
    text = loaded.tokenizer.decode([token for token in sample.input_ids.tolist() if token >= 0])
    assert "### Assistant: There are three cats on a stone floor.\n###" in text
    assert "unknown" not in text


def test_an_image_without_a_placeholder_belongs_to_the_first_turn(loaded: LoadedModel) -> None:
    sample = sample_of("image_without_placeholder", loaded)
    assert len(sample.pixels) == 1
    ids, recorded = sample.input_ids.tolist(), RECORDED["image_without_placeholder"]["input_ids"]
    slot = ids.index(-200)
    # The same text except for the image and the line break after it; the reference encodes the image and drops it.
    assert ids[: slot - 1] == recorded[: slot - 1]
    assert -200 not in recorded


def test_an_answer_at_the_start_is_dropped_with_a_notice(loaded: LoadedModel, caplog: pytest.LogCaptureFixture) -> None:
    row = parse_row(RECORDS["gpt_first"], "a.json row 0", IMAGES)
    assert row.turns == (Turn("What?", "A car.", num_images=1),)
    log_notices([row] * 7 + [parse_row(RECORDS["image_gpt"], "a.json row 1", IMAGES)])
    listed = ", ".join(["a.json row 0"] * 5)
    assert caplog.messages == [f"7 rows start with an answer, which is dropped: {listed} and 2 more"]
    ids, recorded = sample_of("gpt_first", loaded).input_ids.tolist(), RECORDED["gpt_first"]["input_ids"]
    start = next(index for index, (one, other) in enumerate(zip(ids, recorded, strict=False)) if one != other)
    assert ids[start:] == recorded[start + len(recorded) - len(ids) :]  # but for the dropped turn as in the reference


def test_a_system_message_replaces_that_of_yi_vl(loaded: LoadedModel) -> None:
    (turn,) = parse_row(RECORDS["image_gpt"], "row", IMAGES).turns
    said = RECORDS["image_gpt"]["conversations"]
    forms = [
        RECORDS["image_gpt"] | {"conversations": [{"from": "system", "value": "Be brief."}, *said]},
        RECORDS["image_gpt"] | {"system": "Be brief.\n\n"},
    ]
    for fields in forms:
        row = parse_row(fields, "row", IMAGES)
        assert (row.turns, row.system) == ((turn,), "Be brief.")
        sample = encoder(loaded)(row)
        assert sample.input_ids.tolist() == encode_turns([turn], loaded.tokenizer, YI_VL, "Be brief.").input_ids
        assert sample.sequence_length == encoder(loaded).sequence_length(row)
    assert parse_row(forms[0] | {"system": ""}, "row").system == "Be brief."
    assert parse_row(RECORDS["image_gpt"] | {"system": " "}, "row").system is None
    assert parse_row(RECORDS["system_role"], "row", IMAGES).system == "Be brief."


def test_pixels_are_those_of_inference(loaded: LoadedModel) -> None:
    pixels = golden_arrays("image_pixels")
    keys = golden_json("train_preprocess")["pixel_values_of_items"]
    for name in ("image_gpt", "readme_roles_human_assistant", "image_second_turn_zh"):
        expected = pixels[keys[f"{name}__pad"]]
        sample = sample_of(name, loaded)
        assert sample.pixels.dtype == torch.uint8
        pixel_values = loaded.image_processor.normalize(sample.pixels)
        torch.testing.assert_close(pixel_values[0], expected, atol=1e-5, rtol=0)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


@settings(max_examples=200, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 1)), min_size=1, max_size=3))
def test_training_ids_before_an_answer_equal_the_inference_prompt(
    pairs: list[tuple[str, str, int]], loaded: LoadedModel
) -> None:
    turns = [Turn(*pair) for pair in pairs]
    encoded = encode_turns(turns, loaded.tokenizer, YI_VL)
    starts = [i for i, flag in enumerate(encoded.is_target) if flag and not encoded.is_target[i - 1]]
    assert len(starts) == len(turns)
    for index, start in enumerate(starts):
        asked = [*turns[:index], replace(turns[index], answer=None)]
        prompt = tokenize(YI_VL.render(YI_VL.messages(asked)), loaded.tokenizer)
        assert encoded.input_ids[:start] == prompt


def test_a_tokenizer_that_merges_tokens_across_the_answer_boundary_is_an_error(loaded: LoadedModel) -> None:
    class Joining:
        """Merges a colon and the next word into one token."""

        def text_ids(self, text: str) -> list[int]:
            return [ord(character) for character in text.replace(": ", "\N{SNOWMAN}")]

    with pytest.raises(CheckpointError, match="merges text across the boundary of an answer"):
        encode_turns([Turn("a", "b")], Joining(), YI_VL)


@pytest.mark.parametrize("max_length", [200, 112, 96, 90])
def test_a_long_row_is_truncated(max_length: int, loaded: LoadedModel) -> None:
    whole = sample_of("image_second_turn_zh", loaded)
    assert whole.sequence_length == len(whole.input_ids) + 15
    truncated = sample_of("image_second_turn_zh", loaded, max_length)
    assert truncated.sequence_length <= max_length
    assert truncated.input_ids.tolist() == whole.input_ids[: len(truncated.input_ids)].tolist()
    assert len(truncated.pixels) == int((truncated.input_ids == -200).sum())
    if max_length == 96:  # the second turn begins with an image of 16 patches, which does not fit
        assert len(truncated.pixels) == 0


def test_a_row_whose_answers_are_truncated_away_is_an_error(loaded: LoadedModel) -> None:
    with pytest.raises(RowError, match="image_gpt: no answer within the maximum sequence length of 85"):
        sample_of("image_gpt", loaded, max_length=85)


def test_an_unreadable_image_is_reported_with_its_row(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes((IMAGES / "photo_rgb.jpg").read_bytes()[:5000])
    for image, reason in (("missing.jpg", "no such file"), ("broken.jpg", "damaged or truncated")):
        row = parse_row({"image": image, "text": "A caption."}, "a.json row 3", tmp_path)
        with pytest.raises(RowError, match=f"^a.json row 3: .*{image}: {reason}"):
            encoder(loaded)(row)


def test_a_caption_is_the_answer_of_its_image() -> None:
    row = parse_row({"image": "cat.jpg", "text": " A cat. "}, "x", "folder")
    assert row.turns == (Turn("", "A cat.", num_images=1),)
    assert row.images == (Path("folder/cat.jpg"),)


def test_json_and_jsonl_yield_the_same_rows(tmp_path: Path) -> None:
    rows = list(RECORDS.values())
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert [row for _, row in read_rows(tmp_path / "a.json")] == rows
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == rows
    assert next(iter(read_rows(tmp_path / "a.json")))[0] == f"{tmp_path}/a.json row 0"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[{]", r"a\.json: not valid JSON \(Expecting property name.*line 1 column 3"),
        ("a.json", "[1,,]", r"a\.json: not valid JSON"),
        ("a.json", "{}\n{}", r"a\.json: not valid JSON .*; a file with one object per line is named \.jsonl"),
        ("a.json", "{}", r"a\.json: expected a JSON list"),
        ("a.json", '{"mine": {"file_name": "b.json"}}', "declares datasets of LLaMA-Factory and has no rows; give the"),
        ("a.json", "[]", r"a\.json: no rows"),
        ("a.json", "", r"a\.json: no rows"),
        ("a.jsonl", "\n", r"a\.jsonl: no rows"),
    ],
)
def test_an_unreadable_file_is_one_error(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RowError, match=message):
        list(read_rows(tmp_path / name))
    with pytest.raises(RowError, match="cannot be read"):
        list(read_rows(tmp_path / "nothing.json"))


def test_a_row_that_is_no_object_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([1, RECORDS["text_multi_gpt"]]))
    (tmp_path / "a.jsonl").write_text("[\n" + json.dumps(RECORDS["text_multi_gpt"]))
    for name, reason in (
        ("a.json", "row 0: expected a JSON object"),
        ("a.jsonl", r"line 1: not valid JSON \(.*at character 1\); a JSON list is named \.json"),
    ):
        bad, good = read_rows(tmp_path / name)
        with pytest.raises(RowError, match=f"{name} {reason}"):
            parse_row(bad[1], bad[0])
        assert len(parse_row(good[1], good[0]).turns) == 2


def test_trailing_commas_are_ignored_and_strings_are_kept(tmp_path: Path) -> None:
    rows = [{"a": 'b ", ]" \\\\ ,} ... ,...]', "c": [1, {}]}, {"a": "图 ,]"}]
    strict = json.dumps(rows, indent=1, ensure_ascii=False)
    for lenient in (re.sub(r"(?<=[}\]0-9])(?=\n *[}\]])", ",", strict), re.sub(r"\n\]\Z", ",\n  ...\n]", strict)):
        assert lenient != strict
        (tmp_path / "a.json").write_text("\ufeff" + lenient, encoding="utf-8")
        assert [row for _, row in read_rows(tmp_path / "a.json")] == rows
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)[:-1]},}},\n" for row in rows))
    assert [row for _, row in read_rows(tmp_path / "a.jsonl")] == rows


def test_the_mask_keeps_a_real_token_that_equals_the_pad_id() -> None:
    def sample(*ids: int) -> Sample:
        return Sample(torch.tensor(ids), torch.tensor(ids), torch.zeros(0, 2, 2, 3, dtype=torch.uint8), len(ids))

    batch = Collator(pad_token_id=2)([sample(1, 5, 2), sample(1, 2)])  # 2 ends both samples
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[1, 5, 2], [1, 2, IGNORE_INDEX]]
    assert batch["images"] is None


def test_a_batch_has_the_loss_of_its_samples(loaded: LoadedModel) -> None:
    samples = [sample_of(name, loaded) for name in ("image_gpt", "text_multi_gpt", "image_second_turn_zh")]
    collator = Collator(loaded.tokenizer.pad_token_id)

    def collate(samples: list[Sample]) -> dict[str, Any]:
        return normalize_images(collator(samples), loaded.image_processor)

    with torch.no_grad():
        together = loaded.model(**collate(samples)).loss
        alone = [loaded.model(**collate([sample])).loss for sample in samples]
    targets = torch.tensor([(sample.labels != IGNORE_INDEX).sum() for sample in samples])
    torch.testing.assert_close(together, (torch.stack(alone) * targets).sum() / targets.sum())
