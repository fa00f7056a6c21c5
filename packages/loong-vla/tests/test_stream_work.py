"""What a batch shows, which decides how much arithmetic its step takes."""

from __future__ import annotations

from typing import Any

import torch

from loong_vla.making import seen_in


def batch(cameras: list[list[int]], tokens: list[int]) -> dict[str, Any]:
    mask = torch.arange(30)[None] < torch.tensor(tokens)[:, None]
    return {"camera_mask": torch.tensor(cameras).bool(), "token_mask": mask, "tokens": torch.zeros(len(tokens), 30)}


def test_padding_and_absent_cameras_are_no_work() -> None:
    seen = seen_in([batch([[1, 0], [1, 1]], [7, 9]), batch([[1, 1]], [2])], {})
    assert seen.images == 5 / 3 and seen.text == 6


def test_image_tokens_in_the_prompt_are_no_text() -> None:
    seen = seen_in([batch([[1, 0], [1, 1]], [11, 21])], {"tower": "qwen3_vl", "image_tokens": 4})
    assert seen.images == 1.5 and seen.text == 10
