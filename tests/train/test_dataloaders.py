"""The order of rows, and batches of them: padded, or packed without a leak."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.golden import CHECKPOINT
from support.training import FACTS, IMAGES, conversation
from torch.utils.data import DataLoader

from yivl.checkpoint.loading import LoadedModel
from yivl.constants import IGNORE_INDEX
from yivl.data.bad_rows import BadRows
from yivl.data.encoding import Collator, Encoder, Example
from yivl.data.rows import RowError, parse_row
from yivl.data.sampler import BatchSampler, RowDataset
from yivl.model.attention import register_packed_sdpa
from yivl.model.modeling import YiVLForCausalLM


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 4),
    grouped=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_row_once_and_the_same_steps_on_every_process(
    num_rows: int, batch_size: int, world_size: int, grouped: bool, epoch: int
) -> None:
    lengths = [(index * 37) % 101 for index in range(num_rows)] if grouped else None
    groups = [index % 2 for index in range(num_rows)] if grouped else None
    ranks: list[list[list[int]]] = []
    for rank in range(world_size):
        sampler = BatchSampler(
            num_rows, batch_size, rank=rank, world_size=world_size, lengths=lengths, groups=groups, seed=3
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler)
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(batch) <= batch_size for batches in ranks for batch in batches)
    counts = Counter(index for batches in ranks for batch in batches for index in batch)
    assert counts == Counter(range(num_rows))
    # Only the last batch may be empty, where there are fewer rows left than processes.
    assert all(batch for batches in ranks for batch in batches[:-1])


def test_seed_and_epoch_decide_the_order() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        sampler = BatchSampler(50, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)


def test_grouping_puts_similar_lengths_and_one_modality_in_a_batch_the_longest_first() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, 1000, (400,), generator=generator).tolist()
    groups = [int(length > 600) for length in lengths]
    plain, grouped = (list(BatchSampler(400, 8, **kwargs)) for kwargs in ({}, {"lengths": lengths, "groups": groups}))

    def spread(batches: list[list[int]]) -> float:
        return statistics.mean(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in batches)

    assert spread(grouped) < spread(plain) / 5
    assert sum(len({groups[index] for index in batch}) > 1 for batch in grouped) <= 1
    assert max(lengths) in [lengths[index] for index in grouped[0]]


def encoder(loaded: LoadedModel) -> Encoder:
    return Encoder(loaded.tokenizer, loaded.image_processor, loaded.model.config.num_patches, 2048)


@pytest.fixture
def examples(loaded: LoadedModel) -> list[Example]:
    encode = encoder(loaded)
    return [encode(parse_row(conversation(*fact), str(index), IMAGES)) for index, fact in enumerate(FACTS)]


def test_lengths_are_known_without_reading_a_picture(loaded: LoadedModel, examples: list[Example]) -> None:
    rows = [parse_row(conversation(*fact), "row", "nowhere") for fact in FACTS]
    assert [encoder(loaded).num_positions(row) for row in rows] == [example.num_positions for example in examples]


def test_bad_rows_are_left_out_of_their_batch_and_an_empty_batch_has_no_target(examples: list[Example]) -> None:
    for packing in (False, True):
        collator = Collator(0, packing=packing)
        some, alone = collator([None, examples[0], None]), collator([examples[0]])
        assert torch.equal(some["input_ids"], alone["input_ids"])
        assert torch.equal(some["images"], alone["images"])
        nothing = collator([None, None])
        assert (nothing["labels"] == IGNORE_INDEX).all()
        assert nothing["images"] is None


def test_a_corrupt_picture_is_skipped_by_workers_too_and_reported_with_its_row(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [
        parse_row(conversation("bad.png", "q", "a"), "file row 0", tmp_path),
        parse_row(conversation("missing.png", "q", "a"), "file row 1", tmp_path),
        parse_row(conversation(None, "q", "a"), "file row 2", tmp_path),
    ]
    skip = BadRows("skip", tmp_path / "bad_rows.jsonl")
    dataset: Any = RowDataset(rows, encoder(loaded), skip)
    batches = list(DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=Collator(0)))
    assert len(batches[0]["input_ids"]) == 1
    assert skip.report().startswith("2 rows were left out")
    for number, reason in enumerate(("not a picture", "no such file")):
        assert f"file row {number}: " in skip.report()
        assert reason in skip.report()
    with pytest.raises(RowError, match="file row 0"):
        RowDataset(rows, encoder(loaded), BadRows("error", tmp_path / "none"))[0]


@pytest.fixture(params=["sdpa_packed", "sdpa", "eager"])
def packing_model(request: pytest.FixtureRequest) -> YiVLForCausalLM:
    register_packed_sdpa()
    return YiVLForCausalLM.from_pretrained(CHECKPOINT, attn_implementation=request.param).train()


def gradients(model: YiVLForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_packed_rows_give_the_loss_and_gradients_of_separate_rows(
    packing_model: YiVLForCausalLM, examples: list[Example]
) -> None:
    targets = sum(int((example.labels[1:] != IGNORE_INDEX).sum()) for example in examples)
    separate = torch.zeros(())
    for example in examples:
        loss = packing_model(**Collator(0)([example]), num_items_in_batch=targets).loss
        loss.backward()
        separate += loss.detach()
    expected = gradients(packing_model)
    batch = Collator(0, packing=True)(examples)
    assert batch["input_ids"].shape[0] == 1
    packed = packing_model(**batch, num_items_in_batch=targets).loss
    packed.backward()
    torch.testing.assert_close(packed.detach(), separate, atol=1e-6, rtol=1e-5)
    found = gradients(packing_model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=2e-5, rtol=1e-4)


def test_a_packed_row_sees_nothing_of_its_neighbours(packing_model: YiVLForCausalLM, examples: list[Example]) -> None:
    packing_model.eval()

    def last_logits(rows: list[Example]) -> torch.Tensor:
        batch = Collator(0, packing=True)(rows)
        with torch.no_grad():
            logits: torch.Tensor = packing_model(**batch | {"labels": None}).logits
        return logits[0, -rows[-1].num_positions :]

    alone = last_logits([examples[1]])
    for neighbours in ([examples[0]], [examples[2], examples[5]]):
        torch.testing.assert_close(last_logits([*neighbours, examples[1]]), alone, atol=2e-5, rtol=1e-4)


def test_the_end_of_a_packed_row_does_not_predict_the_next_even_if_its_first_token_is_a_target(
    packing_model: YiVLForCausalLM, examples: list[Example]
) -> None:
    batch = Collator(0, packing=True)(examples[:2])
    batch["labels"][0, len(examples[0].input_ids)] = 5
    fused = packing_model.fuse(
        batch["input_ids"], batch["images"], labels=batch["labels"], row_lengths=batch["row_lengths"]
    )
    assert fused.labels is not None
    assert fused.labels[0, examples[0].num_positions] == IGNORE_INDEX
