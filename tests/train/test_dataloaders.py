"""The order of samples, and batches of them: padded, or packed without attention across samples."""

import json
import random
import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.golden import CHECKPOINT
from support.training import FACTS, IMAGES, conversation, losses, train, weights, write_rows, write_shards
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from yivl.checkpoint.loading import LoadedModel
from yivl.checkpoint.manifest import MANIFEST
from yivl.constants import IGNORE_INDEX
from yivl.conversation import YI_VL
from yivl.data.bad_rows import BadRows
from yivl.data.collator import Collator, normalize_images
from yivl.data.encoding import Encoder, Sample
from yivl.data.rows import RowError, parse_row
from yivl.data.sampler import GROUP_SIZE, BatchSampler, RowDataset
from yivl.data.sources import DataSource
from yivl.errors import CheckpointError, YiVLError
from yivl.model.attention import register_packed_sdpa
from yivl.model.modeling import YiVLForCausalLM
from yivl.train.arguments import DataArguments
from yivl.train.dataloaders import Batches, make_batches, make_eval_loader


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    grouped=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_row_once_and_the_same_number_of_batches_on_every_rank(
    num_rows: int, batch_size: int, world_size: int, grouped: bool, epoch: int
) -> None:
    lengths = [(index * 37) % 101 for index in range(num_rows)] if grouped else None
    groups = [index % 2 for index in range(num_rows)] if grouped else None
    ranks: list[list[list[int]]] = []
    for rank in range(world_size):
        sampler = BatchSampler(
            [num_rows], batch_size, rank=rank, world_size=world_size, lengths=lengths, groups=groups, seed=3
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)
    counts = Counter(index for batches in ranks for batch in batches for index in batch)
    assert counts == Counter(range(num_rows))
    # Only the last batch may be empty, if fewer rows than ranks are left.
    assert all(batch for batches in ranks for batch in batches[:-1])


def order_of_lists(
    sizes: Sequence[int], samples: Sequence[int], size: int, seed: str, lengths: Sequence[int], groups: Sequence[int]
) -> list[list[int]]:
    """Return the global batches of an epoch as lists of Python numbers, which define the order of existing runs."""
    order: list[int] = []
    start = 0
    for source, (number, total) in enumerate(zip(sizes, samples, strict=True)):
        repeats, rest = divmod(total, max(number, 1))
        drawn = random.Random(f"{seed} {source}").sample(range(start, start + number), rest)
        order += [*range(start, start + number)] * repeats + sorted(drawn)
        start += number
    generator = random.Random(seed)
    generator.shuffle(order)
    if not lengths:
        return [order[start : start + size] for start in range(0, len(order), size)]
    by_length: list[int] = []
    remainder: list[int] = []
    for group in sorted(set(groups)):
        members = [index for index in order if groups[index] == group]
        full = len(members) // size * size
        for start in range(0, full, size * GROUP_SIZE):
            part = members[start : min(start + size * GROUP_SIZE, full)]
            by_length += sorted(part, key=lengths.__getitem__, reverse=True)
        remainder += members[full:]
    by_length += sorted(remainder, key=lengths.__getitem__, reverse=True)
    batches = [by_length[start : start + size] for start in range(0, len(order), size)]
    last = [batches.pop()] if len(batches[-1]) < size else []
    generator.shuffle(batches)
    if batches:
        longest = max(range(len(batches)), key=lambda index: max(lengths[row] for row in batches[index]))
        batches[0], batches[longest] = batches[longest], batches[0]
    return batches + last


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([1, 3, 17, 60, 300]), min_size=1, max_size=3),
    weight=st.sampled_from([0.3, 1, 2.5]),
    batch_size=st.integers(1, 4),
    world_size=st.integers(1, 3),
    grouped=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_the_order_of_existing_runs_is_kept(
    sizes: list[int], weight: float, batch_size: int, world_size: int, grouped: bool, epoch: int
) -> None:
    samples = [max(round(size * weight), 1) for size in sizes]
    lengths = [(index * 37) % 11 for index in range(sum(sizes))] if grouped else []
    groups = [index % 3 % 2 for index in range(sum(sizes))]
    expected = order_of_lists(sizes, samples, batch_size * world_size, f"7 {epoch}", lengths, groups)
    for rank in range(world_size):
        sampler = BatchSampler(
            sizes,
            batch_size,
            samples_per_epoch=samples,
            seed=7,
            rank=rank,
            world_size=world_size,
            lengths=np.array(lengths, np.int32) if grouped else None,
            groups=np.array(groups, np.uint8) if grouped else None,
        )
        sampler.set_epoch(epoch)
        assert list(sampler) == [batch[rank::world_size] for batch in expected]


def test_seed_and_epoch_determine_the_order() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchSampler([50], 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    weight=st.floats(0.05, 4),
    limit=st.none() | st.integers(1, 40),
    world_size=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_a_weight_is_whole_repeats_and_a_subsample_without_overlap_across_ranks(
    sizes: list[int], weight: float, limit: int | None, world_size: int, seed: int
) -> None:
    source = DataSource("rows.json", weight=weight, max_rows=limit)
    sizes = [len(source.subset(size, seed)) for size in sizes]
    samples = [source.samples_per_epoch(size) for size in sizes]
    for epoch in range(2):
        counts: Counter[int] = Counter()
        for rank in range(world_size):
            sampler = BatchSampler(sizes, 2, samples_per_epoch=samples, seed=seed, rank=rank, world_size=world_size)
            sampler.set_epoch(epoch)
            counts.update(index for batch in sampler for index in batch)
        start = 0
        for size in sizes:
            seen = [counts[index] for index in range(start, start + size)]
            expected = max(round(size * weight), 1) if size else 0  # in every epoch
            assert sum(seen) == (expected if limit is None else min(expected, limit))
            assert not seen or max(seen) - min(seen) <= 1
            start += size
        assert counts.keys() <= set(range(start))


def batches_of(folder: Path, loaded: LoadedModel, text: str, epochs: Sequence[int]) -> list[list[list[int]]]:
    """Return the token ids of the samples of some epochs of a mixture over sixteen rows."""
    write_rows(folder / "rows.json", [conversation(None, f"question {index}", "a") for index in range(16)])
    (folder / "mix.yaml").write_text(f"- {{data_path: rows.json, {text}}}\n")
    data, training = DataArguments(data_path=str(folder / "mix.yaml")), TrainingArguments(output_dir=str(folder))
    batches = make_batches(data, training, encoder(loaded), BadRows("error", folder / "none"))
    assert batches.sources[0]["rows_per_epoch"] == 8
    found = []
    for epoch in epochs:
        batches.loader.set_epoch(epoch)
        found.append(
            [row[: row.index(0) if 0 in row else None] for b in batches.loader for row in b["input_ids"].tolist()]
        )
    return found


def test_a_weight_below_one_is_another_subsample_in_every_epoch(loaded: LoadedModel, tmp_path: Path) -> None:
    epochs = batches_of(tmp_path, loaded, "weight: 0.5", range(6))
    assert [len(epoch) for epoch in epochs] == [8] * 6
    assert len({str(sorted(epoch)) for epoch in epochs}) > 3
    assert len({str(row) for epoch in epochs for row in epoch}) > 12
    assert batches_of(tmp_path, loaded, "weight: 0.5", [4])[0] == epochs[4]  # the epoch alone determines it


def test_max_rows_is_the_same_subset_in_every_epoch(loaded: LoadedModel, tmp_path: Path) -> None:
    first, second = batches_of(tmp_path, loaded, "max_rows: 8", range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def limited_batches(folder: Path, loaded: LoadedModel, entries: str) -> Batches:
    (folder / "mix.yaml").write_text(entries)
    training = TrainingArguments(output_dir=str(folder), max_steps=2)
    return make_batches(DataArguments(str(folder / "mix.yaml")), training, encoder(loaded), pytest.fail)


def test_the_table_names_sources_and_says_how_many_of_their_rows_a_limit_keeps(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b", "c"):
        write_rows(tmp_path / f"{name}.json", [conversation(None, f"{name}{index}", "a") for index in range(600)])
    both = "- {name: both, data_path: [a.json, b.json], max_rows: 1000, weight: 2}\n"
    batches = limited_batches(tmp_path, loaded, f"{both}- {{name: third, data_path: c.json}}\n")
    header, first, second = batches.mix.splitlines()
    assert header.split() == ["share", "rows", "per", "epoch", "images", "source"]
    assert first.split() == ["62.5%", "1,000", "of", "1,200", "1,000", "0", "both"]
    assert second.split() == ["37.5%", "600", "600", "0", "third"]
    assert len({line.rindex(name) for line, name in zip((first, second), ("both", "third"), strict=True)}) == 1
    assert "are used" not in caplog.text
    limited_batches(tmp_path, loaded, both)
    assert "both: 1,000 of 1,200 rows are used" in caplog.text
    assert "--max_rows_per_source 1200" in caplog.text


def test_the_table_says_how_many_samples_of_tar_shards_a_limit_keeps(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path, 3, 7)
    write_rows(tmp_path / "c.json", [conversation(None, "q", "a")])
    shards = "- {name: laion, data_path: ['0000[01].tar', 00002.tar], max_rows: 10}\n"
    batches = limited_batches(tmp_path, loaded, f"{shards}- {{data_path: c.json}}\n")
    assert batches.mix.splitlines()[1].split() == ["50.0%", "3", "10", "of", "21", "laion"]
    assert "are used" not in caplog.text
    limited_batches(tmp_path, loaded, shards)
    assert "laion: 10 of 21 rows are used" in caplog.text


def test_files_beside_tar_shards_are_counted_and_their_notices_are_logged(
    loaded: LoadedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = write_shards(tmp_path, 1, 7)
    opened = {"conversations": [{"from": "gpt", "value": "Hi."}, *conversation(None, "q", "a")["conversations"]]}
    write_rows(tmp_path / "c.json", [opened] * 6)
    entries = f"- {{data_path: '{shards}'}}\n- {{name: files, data_path: c.json, max_rows: 3}}\n"
    batches = limited_batches(tmp_path, loaded, entries)
    assert batches.mix.splitlines()[2].split() == ["50.0%", "-", "3", "of", "6", "files"]
    assert "3 rows start with an answer, which is dropped" in caplog.text


OLD_FILES = {"source": "a.json", "rows": 4, "rows_per_epoch": 4, "images": 0}
OLD_SHARDS = {"source": "a.tar", "weight": 2, "shards": 3}


@pytest.mark.parametrize(
    ("recorded", "now", "message"),
    [
        (OLD_FILES, {"rows": 8, "rows_per_epoch": 8}, r"rows of new was 4 when it was written, and is 8 now; use"),
        (OLD_FILES | {"rows_found": 9}, {"rows_found": 10}, "rows_found of new was 9 .* and is 10"),
        (OLD_FILES, {"rows_per_epoch": 8}, "rows_per_epoch of new was 4 .* and is 8"),
        (OLD_SHARDS, {"shards": 4}, "shards of new was 3 .* and is 4"),
        (OLD_SHARDS, {"weight": 3}, "weight of new was 2 .* and is 3"),
        (OLD_FILES, {"rows_found": 9}, None),
        (OLD_SHARDS, {"rows": 70}, None),  # earlier versions did not count the rows of files beside shards
    ],
)
def test_a_run_is_resumed_only_with_as_many_rows_at_the_same_weight(
    recorded: dict[str, Any], now: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    (tmp_path / "training_run.json").write_text(json.dumps({"sources": [recorded]}))
    batches = Batches(mock.Mock(), [recorded | now | {"source": "new"}])
    if message is None:
        batches.check_record(tmp_path)
        return
    with pytest.raises(CheckpointError, match=message):
        batches.check_record(tmp_path)


def test_a_run_whose_mixture_was_edited_is_not_resumed(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [conversation(None, f"question {index}", f"{index}") for index in range(9)])
    entry = "- {data_path: rows.json, max_rows: %d}\n"
    (tmp_path / "mix.yaml").write_text(entry % 4)
    train(tmp_path / "out", tmp_path / "mix.yaml", save_steps=1, max_steps=1)
    for text, message in (
        (entry % 8, r"rows of .*rows\.json was 4"),
        (entry % 4 * 2, "had 1 sources .* and has 2 now"),
    ):
        (tmp_path / "mix.yaml").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            train(tmp_path / "out", tmp_path / "mix.yaml", max_steps=2, resume="auto")
    (tmp_path / "mix.yaml").write_text(entry % 4)
    train(tmp_path / "out", tmp_path / "mix.yaml", max_steps=2, resume="auto")


def test_a_run_with_a_weight_below_one_resumes_exactly(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [conversation(None, f"question {index}", f"{index}") for index in range(16)])
    (tmp_path / "mix.yaml").write_text("- {data_path: rows.json, weight: 0.5}\n")
    whole = train(tmp_path / "whole", tmp_path / "mix.yaml", num_train_epochs=3, save_steps=6)
    assert losses(whole)[:4] != losses(whole)[4:8]
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-6", tmp_path / "resumed/checkpoint-6")  # in the middle of epoch 1
    resumed = train(tmp_path / "resumed", tmp_path / "mix.yaml", num_train_epochs=3, save_steps=6, resume="auto")
    assert losses(resumed)[-6:] == losses(whole)[-6:]
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_run_with_limited_tar_shards_resumes_exactly(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", 3, 6)
    rows = write_rows(tmp_path / "rows.json", [conversation(None, f"question {index}", "a") for index in range(9)])
    (tmp_path / "mix.yaml").write_text(
        f"- {{name: shards, data_path: '{shards}', max_rows: 7}}\n- {{data_path: {rows}, max_rows: 4}}\n"
    )
    flags = {"max_steps": 8, "save_steps": 3, "dataloader_num_workers": 2}
    whole = train(tmp_path / "whole", tmp_path / "mix.yaml", **flags)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    resumed = train(tmp_path / "resumed", tmp_path / "mix.yaml", **flags, resume="auto")
    assert losses(resumed)[-5:] == losses(whole)[-5:]
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    (tmp_path / "mix.yaml").write_text(f"- {{name: shards, data_path: '{shards}'}}\n- {{data_path: {rows}}}\n")
    with pytest.raises(CheckpointError, match=r"max_rows_per_source was None .*not the same run"):
        train(
            tmp_path / "resumed",
            tmp_path / "mix.yaml",
            **flags | {"max_steps": 9},
            resume="auto",
            max_rows_per_source=5,
        )


def test_a_run_whose_subsample_was_the_same_in_every_epoch_is_not_resumed(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [conversation(None, f"question {index}", f"{index}") for index in range(8)])
    (tmp_path / "mix.yaml").write_text("- {data_path: rows.json, weight: 0.5}\n")
    train(tmp_path / "out", tmp_path / "mix.yaml", save_steps=1, max_steps=1)
    for folder in (tmp_path / "out", tmp_path / "out/checkpoint-1"):
        record = json.loads((folder / "training_run.json").read_text())
        assert record["sources"][0].pop("subsampled") == "per epoch"
        (folder / "training_run.json").write_text(json.dumps(record))
        (folder / MANIFEST).unlink(missing_ok=True)  # earlier versions wrote none
    with pytest.raises(CheckpointError, match=r"checkpoint-1: the weight of .*rows\.json selected the same rows"):
        train(tmp_path / "out", tmp_path / "mix.yaml", max_steps=2, resume="auto")


def test_a_run_with_a_weight_below_one_may_resume_with_moved_data(tmp_path: Path) -> None:
    ours: list[dict[str, Any]] = [{"source": "new/a.json", "rows": 8, "rows_per_epoch": 4, "subsampled": "per epoch"}]
    batches = Batches(mock.Mock(), ours)
    (tmp_path / "training_run.json").write_text(json.dumps({"sources": [ours[0] | {"source": "old/a.json"}]}))
    batches.check_record(tmp_path)


def test_a_run_whose_epochs_the_limit_did_not_hold_in_is_not_resumed(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [conversation(None, f"question {index}", f"{index}") for index in range(8)])
    (tmp_path / "mix.yaml").write_text("- {data_path: rows.json, weight: 2, max_rows: 8}\n")
    train(tmp_path / "out", tmp_path / "mix.yaml", save_steps=1, max_steps=1)
    path = tmp_path / "out/checkpoint-1/training_run.json"
    record = json.loads(path.read_text())
    assert record["sources"][0].pop("limited") == "per epoch"
    assert record["sources"][0]["rows_per_epoch"] == 8
    path.write_text(json.dumps(record))
    path.with_name(MANIFEST).unlink()  # earlier versions wrote none
    with pytest.raises(CheckpointError, match=r"checkpoint-1: max_rows did not limit the epochs of .*rows\.json"):
        train(tmp_path / "out", tmp_path / "mix.yaml", max_steps=2, resume="auto")


def test_evaluation_data_may_be_limited(loaded: LoadedModel, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.json", [conversation(None, f"question {index}", "a") for index in range(9)])
    (tmp_path / "mix.yaml").write_text("- {data_path: rows.json, max_rows: 4}\n")
    data, training = (
        DataArguments("rows.json", eval_data_path=str(tmp_path / "mix.yaml")),
        TrainingArguments(str(tmp_path)),
    )
    loader = make_eval_loader(data, training, encoder(loaded), pytest.fail)
    assert loader is not None
    assert sum(len(batch["input_ids"]) for batch in loader) == 4


def test_streamed_evaluation_data_is_an_error(loaded: LoadedModel, tmp_path: Path) -> None:
    data, training = DataArguments("rows.json", eval_data_path="shards/*.tar"), TrainingArguments(str(tmp_path))
    with pytest.raises(YiVLError, match=r"^--eval_data_path: shards/\*\.tar: tar shards are streamed without end"):
        make_eval_loader(data, training, encoder(loaded), pytest.fail)


def test_grouped_batches_have_similar_lengths_and_one_modality_and_the_longest_comes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (400,), generator=generator).tolist()
    groups = [int(length > 600) for length in lengths]
    plain, grouped = (list(BatchSampler([400], 8, **kwargs)) for kwargs in ({}, {"lengths": lengths, "groups": groups}))

    def spread(batches: list[list[int]]) -> float:
        return statistics.mean(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches)

    assert spread(grouped) < spread(plain) / 5
    assert sum(len({groups[index] for index in batch}) > 1 for batch in grouped) <= 1
    assert max(lengths) in [lengths[index] for index in grouped[0]]


def encoder(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048, YI_VL)


@pytest.fixture
def samples(loaded: LoadedModel) -> list[Sample]:
    encode = encoder(loaded)
    return [encode(parse_row(conversation(*fact), str(index), IMAGES)) for index, fact in enumerate(FACTS)]


def test_sequence_lengths_are_computed_without_reading_an_image(loaded: LoadedModel, samples: list[Sample]) -> None:
    rows = [parse_row(conversation(*fact), "row", "nowhere") for fact in FACTS]
    assert [encoder(loaded).sequence_length(row) for row in rows] == [sample.sequence_length for sample in samples]


def test_invalid_rows_are_dropped_from_their_batch_and_a_dummy_batch_has_no_labels(samples: list[Sample]) -> None:
    for packing in (False, True):
        collator = Collator(0, packing=packing)
        some, alone = collator([None, samples[0], None]), collator([samples[0]])
        assert torch.equal(some["input_ids"], alone["input_ids"])
        assert torch.equal(some["images"], alone["images"])
        dummy = collator([None, None])
        assert (dummy["labels"] == IGNORE_INDEX).all()
        assert dummy["images"] is None


def test_a_damaged_image_is_skipped_in_workers_and_reported_with_its_row(loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [
        parse_row(conversation("bad.png", "q", "a"), "file row 0", tmp_path),
        parse_row(conversation("missing.png", "q", "a"), "file row 1", tmp_path),
        parse_row(conversation(None, "q", "a"), "file row 2", tmp_path),
    ]
    skip = BadRows("skip", tmp_path / "bad_rows.jsonl")
    dataset: Any = RowDataset(rows, encoder(loaded), skip)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=Collator(0)))
    assert len(batches[0]["input_ids"]) == 1
    assert skip.report().startswith("2 invalid rows were skipped")
    for number, reason in enumerate((": not a", "no such file")):
        assert f"file row {number}: " in skip.report()
        assert reason in skip.report()
    with pytest.raises(RowError, match="file row 0"):
        RowDataset(rows, encoder(loaded), BadRows("error", tmp_path / "none"))[0]


def test_any_reason_of_a_skipped_row_is_reported(tmp_path: Path) -> None:
    """Also one with line separators, and if the last line was cut when the process was killed."""
    skip = BadRows("skip", tmp_path / "bad_rows.jsonl")
    reasons = ["a\u2028b", "c\x85d", "e\nf", "图 \ud83d"]
    for reason in reasons:
        skip(RowError(reason))
    with skip.path.open("a") as file:
        file.write('{"reas')
    report = skip.report()
    assert report.startswith("4 invalid rows were skipped")
    assert all(reason in report for reason in reasons)


def test_workers_reuse_the_memory_of_images(loaded: LoadedModel, tmp_path: Path) -> None:
    data = DataArguments(data_path=str(write_rows(tmp_path / "rows.json")), image_folder=str(IMAGES))
    training = TrainingArguments(output_dir=str(tmp_path), dataloader_num_workers=1)
    loader = make_batches(data, training, encoder(loaded), pytest.fail).loader
    numbers: Any = NumberOfKeptBlocks()
    assert list(DataLoader(numbers, batch_size=None, num_workers=1, worker_init_fn=loader.worker_init_fn)) == [4]


class NumberOfKeptBlocks:
    """A data set of one number: the blocks of memory that Pillow keeps in the process that reads it."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        return int(Image.core.get_blocks_max())  # type: ignore[attr-defined]


@pytest.fixture(params=["sdpa_packed", "sdpa", "eager"])
def packing_model(request: pytest.FixtureRequest) -> YiVLForCausalLM:
    register_packed_sdpa()
    return YiVLForCausalLM.from_pretrained(CHECKPOINT, attn_implementation=request.param).train()


def gradients(model: YiVLForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_packed_samples_have_the_loss_and_gradients_of_separate_samples(
    packing_model: YiVLForCausalLM, samples: list[Sample], loaded: LoadedModel
) -> None:
    targets = sum(int((sample.labels[1:] != IGNORE_INDEX).sum()) for sample in samples)
    separate = torch.zeros(())
    for sample in samples:
        loss = packing_model(
            **normalize_images(Collator(0)([sample]), loaded.image_processor), num_items_in_batch=targets
        ).loss
        loss.backward()
        separate += loss.detach()
    expected = gradients(packing_model)
    batch = normalize_images(Collator(0, packing=True)(samples), loaded.image_processor)
    assert batch["input_ids"].shape[0] == 1
    packed = packing_model(**batch, num_items_in_batch=targets).loss
    packed.backward()
    torch.testing.assert_close(packed.detach(), separate, atol=1e-6, rtol=1e-5)
    found = gradients(packing_model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4)


def test_a_packed_sample_does_not_attend_to_its_neighbors(
    packing_model: YiVLForCausalLM, samples: list[Sample], loaded: LoadedModel
) -> None:
    packing_model.eval()

    def last_logits(rows: list[Sample]) -> torch.Tensor:
        batch = normalize_images(Collator(0, packing=True)(rows), loaded.image_processor)
        with torch.no_grad():
            logits: torch.Tensor = packing_model(**batch | {"labels": None}).logits
        return logits[0, -rows[-1].sequence_length :]

    alone = last_logits([samples[1]])
    for neighbors in ([samples[0]], [samples[2], samples[5]]):
        torch.testing.assert_close(last_logits([*neighbors, samples[1]]), alone, atol=2e-5, rtol=1e-4)


def test_the_end_of_a_packed_sample_does_not_predict_the_first_token_of_the_next(
    packing_model: YiVLForCausalLM, samples: list[Sample], loaded: LoadedModel
) -> None:
    batch = normalize_images(Collator(0, packing=True)(samples[:2]), loaded.image_processor)
    batch["labels"][0, len(samples[0].input_ids)] = 5
    fused = packing_model.fuse(
        batch["input_ids"], batch["images"], labels=batch["labels"], row_lengths=batch["row_lengths"]
    )
    assert fused.labels is not None
    assert fused.labels[0, samples[0].sequence_length] == IGNORE_INDEX


def test_changed_content_behind_the_same_rows_is_refused_on_resume_unless_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def batches(**facts: Any) -> Batches:
        return Batches(mock.Mock(), [{"source": "a.json", "rows": 8}, {"source": "b.json", "rows": 4} | facts])

    def record(sources: Sequence[Any]) -> None:
        (tmp_path / "training_run.json").write_text(json.dumps({"sources": sources}))

    record(batches(fingerprint="1f").sources)
    assert batches(fingerprint="1f", source="moved/b.json").check_record(tmp_path) == []
    assert batches().check_record(tmp_path) == []  # a shard is unavailable for now
    changed = batches(fingerprint="2e", rows=5)
    with pytest.raises(CheckpointError, match=r"the content of b\.json has changed .* add --allow_changed_data True$"):
        changed.check_record(tmp_path)
    assert changed.check_record(tmp_path, allow_changed_data=True) == [1]
    assert caplog.messages == [
        f"{tmp_path}: the content of b.json has changed since it was written; the run continues with the new content"
    ]
    # Another weight or limit is not another content.
    with pytest.raises(CheckpointError, match=r"rows of b\.json was 4 when it was written, and is 5 now"):
        batches(fingerprint="1f", rows=5).check_record(tmp_path, allow_changed_data=True)
    record(batches(fingerprint="1f", weight=1.0).sources)
    with pytest.raises(CheckpointError, match=r"weight of b\.json was 1\.0"):
        batches(fingerprint="2e", weight=2.0).check_record(tmp_path, allow_changed_data=True)
    # An earlier version recorded no fingerprint.
    record(batches().sources)
    batches(fingerprint="1f").check_record(tmp_path)
