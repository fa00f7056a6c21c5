"""Images: sizes, bars, crops; what augmentation changes and what it leaves. Pixels are compared with LeRobot's in
test_inputs_parity.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from loong_vla.images import DRAWS, Resize, augmented, edge_resize, looked_at, pad_resize, square_resize


def picture(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), np.uint8)


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (64, 48), (10, 64), (31, 17)])
def test_padding_keeps_proportions_and_bars_are_black(rows: int, columns: int) -> None:
    image = np.full((rows, columns, 3), 200, np.uint8)
    found = pad_resize(28, 28)(image, None)
    ratio = max(rows, columns) / 28
    inner = int(rows / ratio), int(columns / ratio)
    assert found.shape == (28, 28, 3) and found.dtype == np.uint8
    assert (found > 0).sum() == inner[0] * inner[1] * 3 and (found[found > 0] == 200).all()
    top = (28 - inner[0]) // 2
    assert (found[:top] == 0).all() and (found[top + inner[0] :] == 0).all()


def test_an_image_of_the_right_size_is_left_alone() -> None:
    image = picture(28, 28)
    assert pad_resize(28, 28)(image, None) is image


@pytest.mark.parametrize("make", [square_resize(32, 32, edge=40, crop=0.9), edge_resize(32, edge=40, crop=0.9)])
def test_constant_images_stay_constant(make: Resize) -> None:
    found = make(np.full((50, 70, 3), 77, np.uint8), None)
    assert (found == 77).all() and min(found.shape[:2]) in (32, 40)


def test_crops_lie_where_they_are_told_to() -> None:
    image = np.zeros((40, 40, 3), np.uint8)
    image[0, 0] = image[-1, -1] = 255
    resize = edge_resize(40, edge=40, crop=0.5)
    assert resize(image, (0.0, 0.0))[:3, :3].max() > 60 and resize(image, (0.0, 0.0))[-3:, -3:].max() == 0
    assert resize(image, (1.0, 1.0))[-3:, -3:].max() > 60 and resize(image, None).max() == 0


def test_letterbox_makes_images_square() -> None:
    assert edge_resize(32, edge=32, crop=None, letterbox=True)(picture(20, 30), None).shape == (32, 32, 3)
    assert edge_resize(32, edge=32, crop=None)(picture(20, 30), None).shape == (32, 48, 3)


def middle_draws(images: int) -> torch.Tensor:
    return torch.full((images, DRAWS), 0.5) * torch.tensor([1.0] * 6 + [0.0])


def test_a_batch_says_whether_its_images_are_changed() -> None:
    images = torch.from_numpy(np.stack([picture(8, 6, seed) for seed in range(4)])).view(2, 2, 8, 6, 3)
    index = torch.tensor([3, 0])
    assert torch.equal(looked_at({"images": images}, index), images.flatten(0, 1)[index])
    draws = middle_draws(4) * torch.linspace(0.5, 1.0, 4)[:, None]
    found = looked_at({"images": images, "augmentation": draws.view(2, 2, DRAWS)}, index)
    torch.testing.assert_close(found, augmented(images.flatten(0, 1)[index], draws[index]))


def test_images_change_alone_and_by_their_own_draws() -> None:
    images = torch.from_numpy(np.stack([picture(16, 12, seed) for seed in range(4)]))
    draws = torch.rand(4, DRAWS, generator=torch.Generator().manual_seed(1)).round(decimals=3)
    draws[..., 6] = 0
    whole = augmented(images, draws)
    assert whole.shape == images.shape and whole.dtype == torch.float32
    assert whole.min() >= -1 and whole.max() <= 1
    for image in range(4):
        cut = slice(image, image + 1)
        torch.testing.assert_close(augmented(images[cut], draws[cut]), whole[cut], rtol=1e-5, atol=1e-5)
    changed = draws.clone()
    changed[2, 3] = 1 - changed[2, 3]
    different = (augmented(images, changed) != whole).flatten(1).any(-1)
    assert different.tolist() == [False, False, True, False]


def test_colours() -> None:
    images = torch.full((1, 8, 8, 3), 100, dtype=torch.uint8)
    draws = middle_draws(1)
    draws[..., 6] = 1.0
    as_seen = images.float() / 127.5 - 1
    torch.testing.assert_close(augmented(images, draws), as_seen)
    draws[..., 3] = 0.0
    torch.testing.assert_close(augmented(images, draws), (as_seen + 1) * 0.7 - 1)


def test_geometry_of_a_turn_and_a_shift() -> None:
    """A spot moves against the crop, and by the angle about the middle; cameras on the hand keep it."""
    images = torch.zeros(1, 101, 101, 3, dtype=torch.uint8)
    images[0, 50, 90] = 255
    draws = middle_draws(1)
    draws[..., 2] = 1.0  # 5 degrees

    def spot(draws: torch.Tensor) -> tuple[float, float]:
        weight = augmented(images, draws)[0, ..., 0] + 1
        rows, columns = torch.meshgrid(torch.arange(101.0), torch.arange(101.0), indexing="ij")
        return float((weight * rows).sum() / weight.sum()), float((weight * columns).sum() / weight.sum())

    row, column = spot(draws)
    reach = 40 / 0.95
    assert abs(column - (50 + reach * np.cos(np.radians(5)))) < 0.5
    assert abs(abs(row - 50) - reach * np.sin(np.radians(5))) < 0.5
    draws[..., 2], draws[..., 1] = 0.5, 1.0  # no turn, the window at the right
    assert abs(spot(draws)[1] - (50 + (40 - 2.525) / 0.95)) < 0.5
    draws[..., 6] = 1.0
    assert spot(draws) == pytest.approx((50.0, 90.0), abs=1e-3)
