"""What every plugin, backend and op owes, and proof that a run on this backend uses its layer and its op."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
from loong_example_backend import device

from loong_core.testing import BackendContract, OpContract, PluginContract, tiny
from loong_core.testing.ranks import run_ranks

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NORMS_OF_A_FORWARD = 2 * CONFIG["num_hidden_layers"] + 1
BLOCKS = -(-tiny.SEQ_LEN // device.ROWS)


class TestPlugin(PluginContract):
    plugin = "example_backend"


class TestBackend(BackendContract):
    backend = "example_chip"
    family = "llama"
    config: ClassVar = CONFIG
    demonstrations: ClassVar = {"row_blocks": "loong_example_backend.selftest:show_row_blocks"}


class TestRmsNorm(OpContract):
    op = "rms_norm"
    implementation = "example_chip"
    backend = "example_chip"


def test_a_run_uses_the_layer_and_the_op(tmp_path: Path) -> None:
    def losses_and_calls(rank: int, backend: str) -> tuple[list[float], int]:
        from loong_example_backend import kernels

        calls = []
        forward = kernels.RmsNorm.forward
        kernels.RmsNorm.forward = staticmethod(lambda ctx, x, *rest: (calls.append(len(x)), forward(ctx, x, *rest))[1])
        run, engine = tiny.start(tiny.settings("llama", CONFIG, backend=backend), tmp_path)
        losses = []
        for step in range(3):
            losses.append(engine.forward_backward(tiny.batches(run, step), step)["loss"])
            engine.step(1e-2)
        assert max(calls, default=0) <= device.ROWS
        return losses, len(calls)

    (ours, calls), (reference, none) = (run_ranks(1, losses_and_calls, name)[0] for name in ("example_chip", "cpu"))
    assert calls == 3 * tiny.GLOBAL_BATCH * NORMS_OF_A_FORWARD * BLOCKS
    assert none == 0
    assert tiny.worst(ours, reference) < 1e-5


@pytest.mark.parametrize("value", ["0", "many", ""])
def test_no_chip_is_an_answer(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.DEVICES, value)
    assert device.probe().devices == 0
    assert repr(value) in device.probe().reason
