"""Packing: every real row once, in order, and as few others as the buckets ask for."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from loong_vla.packing import PREFIX, Packing, arrange, pack, packing_of, permuted

masks = some.integers(1, 4).flatmap(
    lambda samples: some.tuples(
        *(some.integers(1, 3).flatmap(lambda n: some.lists(rows(n), min_size=samples, max_size=samples)) for _ in "cl")
    )
)


def rows(width: int) -> some.SearchStrategy[list[bool]]:
    return some.lists(some.booleans(), min_size=width, max_size=width)


@settings(max_examples=120, deadline=None)
@given(given_masks=masks, image_tokens=some.integers(1, 3), horizon=some.integers(1, 3), bucket=some.integers(1, 5))
def test_rows_are_those_of_the_samples_in_order(
    given_masks: tuple[list[list[bool]], ...], image_tokens: int, horizon: int, bucket: int
) -> None:
    cameras, valid = (torch.tensor(mask, dtype=torch.bool) for mask in given_masks)
    found = arrange(cameras, valid, image_tokens, horizon, bucket, bucket)
    samples = len(cameras)
    source = labels(found, cameras.shape[1], valid.shape[1], image_tokens)
    packed = [source[row] for row in found.rows.tolist()]
    for sample in range(samples):
        begin, end = found.offsets[sample], found.offsets[sample + 1]
        wanted = [("image", sample, c, p) for c in nonzero(cameras[sample]) for p in range(image_tokens)]
        wanted += [("word", sample, w, 0) for w in nonzero(valid[sample])]
        assert packed[begin:end] == wanted
        assert found.positions[begin:end].tolist() == list(range(len(wanted)))
        assert found.suffix_positions[sample].tolist() == [len(wanted) + step for step in range(horizon)]
        joint = found.joint[found.joint_offsets[sample] : found.joint_offsets[sample + 1]].tolist()
        suffix = range(len(packed) + sample * horizon, len(packed) + (sample + 1) * horizon)
        assert joint == [*range(begin, end), *suffix]
    for order, back in ((found.rows, found.rows_back), (found.joint, found.joint_back)):
        assert sorted(order.tolist()) == list(range(len(order)))
        assert order[back].tolist() == list(range(len(order)))
    longest = cameras.shape[1] * image_tokens + valid.shape[1]
    assert found.offsets.diff().max() <= longest and found.joint_offsets.diff().max() <= longest + horizon
    assert found.offsets[-1] == len(packed) and found.joint_offsets[-1] == len(found.joint)
    horizons = [min(number, samples) * horizon for number in range(2 * samples + 1)]
    assert found.suffix_offsets.tolist() == horizons and len(found.joint_offsets) == len(horizons)
    for chosen, mask in ((found.images, cameras), (found.tokens, valid)):
        assert len(chosen) == min(-(-int(mask.sum()) // bucket) * bucket, mask.numel())


def labels(found: Packing, cameras: int, length: int, image_tokens: int) -> list[tuple[str, int, int, int]]:
    images = [("image", i // cameras, i % cameras, p) for i in found.images.tolist() for p in range(image_tokens)]
    return images + [("word", i // length, i % length, 0) for i in found.tokens.tolist()]


def nonzero(mask: Tensor) -> list[int]:
    return [int(index) for index in mask.nonzero()]


def batch() -> dict[str, Tensor]:
    return {
        "camera_mask": torch.tensor([[True, False], [True, True]]),
        "token_mask": torch.arange(7) < torch.tensor([[2], [5]]),
        "noise": torch.zeros(2, 3, 4),
    }


def test_without_skipping_every_row_is_computed() -> None:
    found = packing_of(pack(batch(), 4, skip_padding=False))
    assert found is not None and len(found.rows) == 2 * (2 * 4 + 7)
    assert found.offsets.tolist() == [0, 6, 19, 28, 30]
    few = packing_of(pack(batch(), 4, token_bucket=4))
    assert few is not None and len(few.rows) == 3 * 4 + 8
    assert few.offsets[2] == 19 and few.offsets.dtype == torch.int32


def test_a_batch_carries_its_packing() -> None:
    assert packing_of(batch()) is None
    packed = {**batch(), **pack(batch(), 4)}
    assert all(name.startswith(PREFIX) for name in packed.keys() - batch().keys())
    assert packing_of(packed) is not None


def test_permuted_rows_have_the_gradient_of_a_gather() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.autograd.gradcheck(lambda x: permuted(x, order, torch.argsort(order)), x)
    assert torch.equal(permuted(x, order, torch.argsort(order)), x[order])
