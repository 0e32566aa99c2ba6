"""Expansion and merging equal a slow, literal loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from yivl.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from yivl.model.fusion import PaddingSide, expand_placeholders, merge_features, position_ids_from_mask

ROW = st.lists(st.sampled_from([5, 6, 7, IMAGE_TOKEN_INDEX]), min_size=1, max_size=8)


def expand_slowly(
    rows: list[list[int]], num_patches: int, side: PaddingSide
) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Ids, mask and labels (a label is 100 + the index of its id), one row and one id at a time."""
    expanded, labels = [], []
    for row in rows:
        ids: list[int] = []
        targets: list[int] = []
        for index, token in enumerate(row):
            if token == IMAGE_TOKEN_INDEX:
                ids += [token] * num_patches
                targets += [IGNORE_INDEX] * num_patches
            else:
                ids.append(token)
                targets.append(100 + index)
        expanded.append(ids)
        labels.append(targets)
    longest = max(map(len, expanded))

    def pad(values: list[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return values + padding if side == "right" else padding + values

    return (
        [pad(ids, 0) for ids in expanded],
        [pad([1] * len(ids), 0) for ids in expanded],
        [pad(targets, IGNORE_INDEX) for targets in labels],
    )


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=4),
    num_patches=st.integers(1, 4),
    side_before=st.sampled_from(["left", "right"]),
    side_after=st.sampled_from(["left", "right"]),
)
def test_fusion_equals_a_literal_loop(
    rows: list[list[int]], num_patches: int, side_before: PaddingSide, side_after: PaddingSide
) -> None:
    longest = max(map(len, rows))
    padding = [[IMAGE_TOKEN_INDEX] * (longest - len(row)) for row in rows]  # the ids at padding must not matter
    targets = [[100 + index for index in range(len(row))] for row in rows]
    real = [[1] * len(row) for row in rows]

    def pad(values: list[list[int]], fill: list[list[int]]) -> torch.Tensor:
        pairs = zip(values, fill, strict=True)
        return torch.tensor([a + b if side_before == "right" else b + a for a, b in pairs])

    zeros = [[0] * len(row) for row in padding]
    expanded = expand_placeholders(
        pad(rows, padding),
        num_patches,
        attention_mask=pad(real, zeros),
        labels=pad(targets, zeros),
        padding_side=side_after,
    )
    ids, mask, labels = expand_slowly(rows, num_patches, side_after)
    assert expanded.input_ids.tolist() == ids
    assert expanded.attention_mask.tolist() == mask
    assert expanded.labels is not None
    assert expanded.labels.tolist() == labels

    num_images = sum(row.count(IMAGE_TOKEN_INDEX) for row in rows)
    features = torch.arange(1.0, 1 + num_images * num_patches * 2).reshape(num_images, num_patches, 2)
    merged = merge_features(expanded.input_ids, torch.zeros(*expanded.input_ids.shape, 2), features)
    remaining = iter(features.reshape(-1, 2).tolist())
    for row_ids, row_merged in zip(ids, merged.tolist(), strict=True):
        for token, embedding in zip(row_ids, row_merged, strict=True):
            assert embedding == (next(remaining) if token == IMAGE_TOKEN_INDEX else [0.0, 0.0])


@pytest.mark.parametrize(("placeholders", "images"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_different_numbers_of_placeholders_and_images_are_refused(placeholders: int, images: int) -> None:
    ids = torch.tensor([[5] + [IMAGE_TOKEN_INDEX] * 3 * placeholders])
    with pytest.raises(ValueError, match=f"{placeholders} image placeholders but {images} images"):
        merge_features(ids, torch.zeros(*ids.shape, 2), torch.zeros(images, 3, 2))


def test_positions_count_real_tokens_and_are_one_at_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert position_ids_from_mask(mask).tolist() == [[1, 1, 0, 1], [0, 1, 2, 1]]
