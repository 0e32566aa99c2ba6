"""Prompts, ids, labels and decodings of InternVL-Chat-V1-2: those of the original, or a row of docs/fidelity.md."""

import builtins
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden_internvl import CHECKPOINT, GOLDEN, golden_json

from yivl.conversation import HERMES_2, YI_VL, Control, ImageSlot, Piece, PromptTemplate, RolePieces, Turn, prompt_text
from yivl.data.encoding import Encoder
from yivl.data.rows import parse_row
from yivl.errors import CheckpointError
from yivl.inference.detokenization import Detokenizer
from yivl.model.internvl_configuration import InternVLConfig
from yivl.tokenization import (
    YiTokenizer,
    add_image_tokens,
    check_vocabulary,
    encode_turns,
    load_tokenizer,
    stop_id,
    tokenize,
    tokenizer_image_token,
)

PROMPTS = golden_json("prompts")
CASES = {case["id"]: case for case in PROMPTS["prompts"]}
IDS = PROMPTS["special_ids"]
CONTEXT = "<IMG_CONTEXT>"
EMPTY = {"empty_question", "empty_answer_in_history"}
"""An empty message has no ``<|im_end|>`` in the original."""
TYPED = {"literal_specials", "literal_img_tokens"}
"""Control tokens in a question become their ids in the original."""
TEMPLATES = {"Yi-VL": YI_VL, "Hermes-2": HERMES_2}


@pytest.fixture(scope="module")
def tokenizer() -> YiTokenizer:
    return load_tokenizer(CHECKPOINT)


def messages_of(case: dict[str, Any]) -> list[RolePieces]:
    """Return the messages of a case; as many tags as it has images are image slots."""
    tiles = iter(case["images_per_tag"])
    messages: list[RolePieces] = []
    for index, text in enumerate(case["messages"]):
        role = (HERMES_2.user, HERMES_2.assistant)[index % 2]
        if text is None:
            messages.append((role, None))
            continue
        first, *rest = text.split("<image>")
        content: list[Piece] = [first]
        for part in rest:
            content += ["<image>" if (number := next(tiles, None)) is None else ImageSlot(number), part]
        messages.append((role, content))
    return messages


def expanded(ids: list[int]) -> list[int]:
    """Return the ids of the original, in which an image has as many ids as features."""
    return [new for token in ids for new in ([IDS[CONTEXT]] * PROMPTS["num_image_token"] if token == -200 else [token])]


def text_of(pieces: list[Piece]) -> str:
    return prompt_text(pieces).replace("<image_placeholder>", CONTEXT * PROMPTS["num_image_token"])


def test_the_template_is_that_of_the_original(tokenizer: YiTokenizer) -> None:
    assert HERMES_2.system == PROMPTS["system_message"]
    assert stop_id(HERMES_2, tokenizer) == IDS[PROMPTS["sep"]]
    assert HERMES_2.stop_strings == ()  # the original never uses its stop_str


@pytest.mark.parametrize("name", CASES)
def test_prompt_equals_the_original(name: str, tokenizer: YiTokenizer) -> None:
    case = CASES[name]
    pieces = HERMES_2.render(messages_of(case), case["system_message"])
    assert (text_of(pieces) == case["prompt"]) is (name not in EMPTY)
    ids = expanded(tokenize(pieces, tokenizer))
    assert (ids == case["input_ids"]) is (name not in EMPTY | TYPED)


@pytest.mark.parametrize("name", CASES)
def test_a_call_of_the_tokenizer_parses_control_tokens_as_the_original(name: str, tokenizer: YiTokenizer) -> None:
    case = CASES[name]
    assert tokenizer(case["prompt"], add_special_tokens=False).input_ids == case["input_ids"]
    assert tokenizer_image_token(case["prompt"], tokenizer) == case["input_ids"]
    if case["tokens"] is not None:
        assert tokenizer.convert_ids_to_tokens(case["input_ids"]) == case["tokens"]


@pytest.mark.parametrize("name", sorted(EMPTY))
def test_an_empty_message_is_a_finished_one(name: str) -> None:
    case = CASES[name]
    pieces = HERMES_2.render(messages_of(case), case["system_message"])
    headers = prompt_text(pieces).split("<|im_start|>")[1:]
    assert all(text.endswith("<|im_end|>") for text in headers[:-1])
    assert len(headers) == 1 + len(case["messages"])


def test_typed_control_tokens_have_the_ids_of_text(tokenizer: YiTokenizer) -> None:
    for name in sorted(TYPED):
        (question, _) = CASES[name]["messages"]
        ids = tokenizer.text_ids(question)
        assert not set(ids) & set(IDS.values())
        assert tokenizer.decode(ids) == question


MARKERS = [*IDS, "<image>", "<image_placeholder>", "###"]
TEXT = st.lists(st.one_of(st.sampled_from(MARKERS), st.text(max_size=6)), max_size=6).map("".join)


@settings(max_examples=200, deadline=None)
@given(question=TEXT, answer=TEXT, system=TEXT, num_images=st.integers(0, 2))
def test_text_adds_no_control_token_and_no_image(
    question: str, answer: str, system: str, num_images: int, tokenizer: YiTokenizer
) -> None:
    def control(turn: Turn, system: str) -> list[int]:
        ids = tokenize(HERMES_2.render(HERMES_2.messages([turn, Turn("a")]), system), tokenizer)
        return [token for token in ids if token < 0 or token in IDS.values()]

    assert control(Turn(question, answer, num_images), system) == control(Turn("a", "b", num_images), "c")


@pytest.mark.parametrize("name", ["en_image", "zh_image", "en_three_turns_image", "zh_two_turns"])
def test_the_turns_of_a_chat_give_the_ids_of_the_original(name: str, tokenizer: YiTokenizer) -> None:
    case = CASES[name]
    texts = [text and text.removeprefix("<image>\n") for text in case["messages"]]
    turns = [
        Turn(question, answer, number)
        for question, answer, number in zip(texts[::2], texts[1::2], [*case["images_per_tag"], 0, 0, 0], strict=False)
    ]
    assert expanded(tokenize(HERMES_2.render(HERMES_2.messages(turns)), tokenizer)) == case["input_ids"]


def test_each_image_of_a_turn_is_on_a_line_of_its_own() -> None:
    (_, question), _ = HERMES_2.messages([Turn("Which?", num_images=2)])
    assert prompt_text(question or []) == "<image_placeholder>\n<image_placeholder>\nWhich?"
    (_, question), _ = YI_VL.messages([Turn("Which?", num_images=2)])
    assert prompt_text(question or []) == "<image_placeholder><image_placeholder>\nWhich?"


@pytest.mark.parametrize(("message", "system"), [(None, HERMES_2.system), ("Be brief.", "Be brief."), ("", "")])
def test_the_system_message_of_the_file_replaces_that_of_the_template(message: str | None, system: str) -> None:
    fields = json.loads((CHECKPOINT / "config.json").read_text()) | {"system_message": message}
    template = InternVLConfig.from_published(fields).prompt_template
    assert template == replace(HERMES_2, system=system)
    begins = f"<|im_start|>system\n{system}<|im_end|>"
    assert prompt_text(template.render([])) == begins
    assert prompt_text(template.render([], "Other.")) == "<|im_start|>system\nOther.<|im_end|>"


@pytest.mark.parametrize("case", PROMPTS["decode"], ids=range(len(PROMPTS["decode"])))
def test_decoding_equals_the_original(case: dict[str, Any], tokenizer: YiTokenizer) -> None:
    assert tokenizer.decode(case["ids"]) == case["decode"]
    assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decode_skip_special"]


def test_the_same_ids_are_skipped_as_in_the_original(tokenizer: YiTokenizer) -> None:
    assert sorted(tokenizer.all_special_ids) == PROMPTS["skipped_when_decoding"]
    assert all(tokenizer.control_id(token) == index for token, index in IDS.items())


@settings(max_examples=500, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(0, 660), st.sampled_from([*IDS.values(), 293, 185, 201, 249])), max_size=20))
def test_decoding_token_by_token_equals_decoding_in_one_go(ids: list[int], tokenizer: YiTokenizer) -> None:
    detokenizer, text = Detokenizer(tokenizer), ""
    for index, token in enumerate(ids):
        text += detokenizer.add(token)
        whole = tokenizer.decode(ids[: index + 1], skip_special_tokens=True)
        assert whole.startswith(text)
        assert set(whole[len(text) :]) <= {"\N{REPLACEMENT CHARACTER}", " "}
    assert text + detokenizer.flush() == tokenizer.decode(ids, skip_special_tokens=True)


# Training.

RECORDS = {record["id"]: record for record in golden_json("train_preprocess")["max_length_2048"]}
ROWS = {row["id"]: row for row in map(json.loads, (GOLDEN / "training/data.jsonl").read_text().splitlines())}
MASKED = {"empty_answer", "empty_answer_then_turn", "empty_question_text"}
"""Records with an empty message, on which the original computes no loss."""
LITERAL = {"literal_unk", "literal_im_end_in_answer", "literal_role_in_answer"}
"""Records with a control token in an answer, on which the original computes no loss."""
OTHER_IDS = {"image_tag_in_second_turn", "literal_context_token_in_text"}
"""The place of the image, and a typed ``<IMG_CONTEXT>``, differ."""
INVALID = {"ends_with_human", "text_with_literal_tag", "two_human_turns", "fewer_tags_than_images"}
"""Refused by ``parse_row``, see data/test_meta_files.py."""


def encoded_row(name: str, tokenizer: YiTokenizer) -> tuple[list[int], list[int]]:
    """Return ids and labels of a record, with an id for every feature of an image."""
    row = parse_row(ROWS[name], name, GOLDEN / "images")
    encoded = encode_turns(row.turns, tokenizer, HERMES_2, row.system, row.questions)
    ids = expanded(encoded.input_ids)
    pairs = zip(encoded.input_ids, encoded.is_target, strict=True)
    flags = [flag for token, flag in pairs for _ in expanded([token])]
    return ids, [token if flag else -100 for token, flag in zip(ids, flags, strict=True)]


WELL_FORMED = RECORDS.keys() - MASKED - LITERAL - OTHER_IDS - INVALID


@pytest.mark.parametrize("name", [name for name in RECORDS if name in WELL_FORMED and "error" not in RECORDS[name]])
def test_ids_and_labels_equal_the_original(name: str, tokenizer: YiTokenizer) -> None:
    record = RECORDS[name]
    assert encoded_row(name, tokenizer) == (record["input_ids"], record["labels"])


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("literal_unk", ["The token is <unk> here.<|im_end|>"]),
        ("literal_im_end_in_answer", ["one<|im_end|>two<|im_end|>"]),
        ("literal_role_in_answer", ["one<|im_end|><|im_start|>assistant\ntwo<|im_end|>"]),
        ("empty_answer", ["<|im_end|>"]),
        ("empty_answer_then_turn", ["<|im_end|>", "A bridge.<|im_end|>"]),
        ("empty_question_text", ["Hello!<|im_end|>"]),
    ],
)
def test_what_the_original_masks_is_trained_answer_by_answer(
    name: str, texts: list[str], tokenizer: YiTokenizer
) -> None:
    assert RECORDS[name]["all_labels_masked"]
    ids, labels = encoded_row(name, tokenizer)
    spans, begin = [], None
    for index, label in enumerate([*labels, -100]):
        if label != -100 and begin is None:
            begin = index
        elif label == -100 and begin is not None:
            spans.append(ids[begin:index])
            begin = None
    assert [span[-1] for span in spans] == [IDS["<|im_end|>"]] * len(texts)
    assert [tokenizer.decode(span[:-1]) + "<|im_end|>" for span in spans] == texts
    assert all(not set(span[:-1]) & set(IDS.values()) for span in spans)


def test_records_that_the_original_cannot_read_are_trained(tokenizer: YiTokenizer) -> None:
    for name in ("system_role", "literal_img_end"):
        assert "error" in RECORDS[name]
        ids, labels = encoded_row(name, tokenizer)
        assert labels[-1] == ids[-1] == IDS["<|im_end|>"]
    ids, _ = encoded_row("system_role", tokenizer)
    assert ids == tokenize(HERMES_2.render(HERMES_2.messages([Turn("Hi.", "Hello.")]), "Be brief."), tokenizer)


def test_a_typed_context_token_is_no_image(tokenizer: YiTokenizer) -> None:
    record = RECORDS["literal_context_token_in_text"]
    ids, labels = encoded_row("literal_context_token_in_text", tokenizer)
    assert IDS[CONTEXT] in record["input_ids"]
    assert IDS[CONTEXT] not in ids
    targets = [label for label in labels if label != -100]
    assert targets == [label for label in record["labels"] if label != -100]


def encoder(tokenizer: YiTokenizer, template: PromptTemplate) -> Encoder:
    processor: Any = None  # no image is read
    return Encoder(tokenizer, processor, PROMPTS["num_image_token"], 2048, template)


@pytest.mark.parametrize("name", ["two_images", "tag_in_middle", "long_before_image", "text_en_two_turns"])
def test_the_encoder_knows_the_length_of_the_original(name: str, tokenizer: YiTokenizer) -> None:
    row, encode = parse_row(ROWS[name], name), encoder(tokenizer, HERMES_2)
    assert encode.sequence_length(row) == len(RECORDS[name]["input_ids"])
    assert expanded(encode.encode_text(row).input_ids) == RECORDS[name]["input_ids"]


class NoPixels:
    """Stands for an image processor."""

    def resize(self, images: list[Any]) -> torch.Tensor:
        return torch.zeros(len(images))


SHORT = {record["id"]: record for record in golden_json("train_preprocess")["max_length_128"]}


@pytest.mark.parametrize("name", [name for name in SHORT if name in WELL_FORMED and SHORT[name].get("supervised")])
def test_a_truncated_row_is_that_of_the_original(name: str, tokenizer: YiTokenizer) -> None:
    processor: Any = NoPixels()
    encode = Encoder(tokenizer, processor, PROMPTS["num_image_token"], 128, HERMES_2)
    sample = encode(parse_row(ROWS[name], name, GOLDEN / "images"))
    labels = [int(label) for token, label in zip(sample.input_ids, sample.labels, strict=True) if token != -200]
    record = SHORT[name]
    assert expanded(sample.input_ids.tolist()) == record["input_ids"]
    assert labels == [
        label for token, label in zip(record["input_ids"], record["labels"], strict=True) if token != IDS[CONTEXT]
    ]
    assert (sample.sequence_length, len(sample.pixels)) == (len(record["labels"]), sum(record["image_flags"]))


def test_stored_lengths_depend_on_the_template(tokenizer: YiTokenizer) -> None:
    templates = (YI_VL, HERMES_2, replace(HERMES_2, system=PROMPTS["release_system_message"]))
    fingerprints = [encoder(tokenizer, template).fingerprint for template in templates]
    assert len(set(fingerprints)) == 3
    assert fingerprints[1] == encoder(load_tokenizer(CHECKPOINT), HERMES_2).fingerprint


# The folder of the tokenizer.


def folder_without_image_tokens(target: Path) -> Path:
    """Write the tokenizer as it is before training: without the nine tokens, as that of Nous-Hermes-2-Yi-34B."""
    target.mkdir()
    shutil.copyfile(CHECKPOINT / "tokenizer.model", target / "tokenizer.model")
    config, special = (
        json.loads((CHECKPOINT / name).read_text()) for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    tokens = config.pop("additional_special_tokens")
    decoder = config["added_tokens_decoder"]
    config["added_tokens_decoder"] = {
        index: token for index, token in decoder.items() if token["content"] not in tokens
    }
    del special["additional_special_tokens"]
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    (target / "special_tokens_map.json").write_text(json.dumps(special))
    return target


def test_the_nine_tokens_are_added_as_the_training_program_of_the_original_does(
    tmp_path: Path, tokenizer: YiTokenizer
) -> None:
    before = load_tokenizer(folder_without_image_tokens(tmp_path / "before"))
    with pytest.raises(CheckpointError, match="the tokenizer has no token '<img>'"):
        tokenize(HERMES_2.render(HERMES_2.messages([Turn("a", num_images=1)])), before)
    after = add_image_tokens(before)
    after.save_pretrained(tmp_path / "after")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert json.loads((tmp_path / "after" / name).read_text()) == json.loads((CHECKPOINT / name).read_text()), name
    assert after.added_ids == tokenizer.added_ids
    for case in CASES.values():
        assert after(case["prompt"]).input_ids == case["input_ids"]
    assert add_image_tokens(after) is after
    assert len(before) == 640


def test_a_saved_tokenizer_has_the_same_files_and_ids(tmp_path: Path, tokenizer: YiTokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    saved = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert saved == {name: (CHECKPOINT / name).read_bytes() for name in saved}
    assert len(saved) == 4
    loaded = load_tokenizer(tmp_path)
    for case in CASES.values():
        assert loaded(case["prompt"]).input_ids == case["input_ids"]


@pytest.mark.parametrize("legacy", [True, False, None])
def test_ids_do_not_depend_on_legacy_nor_ask_for_remote_code(
    legacy: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    folder = tmp_path / "folder"
    shutil.copytree(CHECKPOINT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("legacy")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({} if legacy is None else {"legacy": legacy})))
    changed = load_tokenizer(folder)
    for case in CASES.values():
        assert changed(case["prompt"]).input_ids == case["input_ids"]
        assert changed.decode(case["input_ids"]) == load_tokenizer(CHECKPOINT).decode(case["input_ids"])


def test_the_vocabulary_includes_added_tokens(tokenizer: YiTokenizer) -> None:
    check_vocabulary(CHECKPOINT, tokenizer, 649)
    with pytest.raises(CheckpointError, match="the tokenizer has the id 648; expected less than vocab_size, 648"):
        check_vocabulary(CHECKPOINT, tokenizer, 648)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(max_examples=100, deadline=None)
@given(pairs=st.lists(st.tuples(TEXT, TEXT, st.integers(0, 2)), min_size=1, max_size=3))
def test_training_ids_before_an_answer_equal_the_inference_prompt(
    template: PromptTemplate, pairs: list[tuple[str, str, int]], tokenizer: YiTokenizer
) -> None:
    turns = [Turn(*pair) for pair in pairs]
    encoded = encode_turns(turns, tokenizer, template)
    starts = [i for i, flag in enumerate(encoded.is_target) if flag and not encoded.is_target[i - 1]]
    assert len(starts) == len(turns)
    for index, start in enumerate(starts):
        asked = [*turns[:index], replace(turns[index], answer=None)]
        assert encoded.input_ids[:start] == tokenize(template.render(template.messages(asked)), tokenizer)


def test_control_tokens_of_a_template_are_pieces_of_their_own() -> None:
    pieces = HERMES_2.render([(HERMES_2.user, ["<|im_end|>"]), (HERMES_2.assistant, None)])
    assert pieces.count(Control("<|im_end|>")) == 2  # of the system message and of the question
    assert "<|im_end|>" in pieces
