"""Which module a layer is made of: the op `gated_mlp` in place of megatron-core's MLP where it can stand for it."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from loong_core.testing.ranks import run_ranks

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
}
LLAMA = {**CONFIG, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": True}
STEPS = 3
PLUGIN = """
from loong_core import OpImpl, hookimpl

@hookimpl
def loong_ops():
    return [OpImpl(op="gated_mlp", name="counted", target="counted_ops:gated_mlp", rank=1)]
"""


def counted_ops() -> types.ModuleType:
    """A module with an implementation that notes its calls and delivers weight gradients as a kernel does."""
    import torch

    from loong_core.parallel.gradient_buffer import buffer_to_fill, mark_added
    from loong_core.references.mlp import gated_mlp as reference

    module: Any = types.ModuleType("counted_ops")
    module.calls = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            module.calls.append(tuple(inputs[0].shape))
            ctx.save_for_backward(*inputs)
            return reference(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            with torch.enable_grad():
                found = list(torch.autograd.grad(reference(*inputs), inputs, gradient))
            for index, weight in enumerate(ctx.saved_tensors[1:], start=1):
                buffer, empty = buffer_to_fill(weight)
                if buffer is not None:
                    (buffer.copy_ if empty else buffer.add_)(found[index])
                    mark_added(weight)
                    found[index] = None
            return tuple(found)

    module.gated_mlp = Counted.apply
    return module


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The implementation, as a plugin brings it."""
    plugin = tmp_path / f"plugin_of_{tmp_path.name}.py"
    plugin.write_text(PLUGIN)
    monkeypatch.setenv("LOONG_PLUGIN_FILES", str(plugin))
    monkeypatch.setitem(sys.modules, "counted_ops", counted_ops())
    return sys.modules["counted_ops"]


def train(recipe: dict[str, Any], folder: Path, op: str) -> dict[str, Any]:
    """Losses and norms of some steps, the last step's gradients, and the shapes of the op's calls."""
    from loong_core.testing import tiny

    calls: list[Any] = sys.modules["counted_ops"].calls  # type: ignore[attr-defined]
    calls.clear()
    run, engine = tiny.start({**recipe, "ops": {"gated_mlp": op}}, folder)
    values = []
    for step in range(STEPS):
        values.append(engine.forward_backward(tiny.batches(run, step), step)["loss"])
        if step < STEPS - 1:  # Asking for parameters gathers them, which the modules are to do.
            values.append(engine.step(1e-2))
    gradients = {p.spec.role: p.gradient.detach().clone() for p in engine.parameters()}
    values.append(engine.step(1e-2))
    values.append(engine.evaluate(tiny.batches(run, STEPS))["loss"])
    names = [name for module in engine.modules for name, _ in module.named_parameters()]
    found = {"values": values, "gradients": gradients, "names": names, "calls": list(calls), "plan": run.plan}
    engine.close()
    return found


def compare(recipe: dict[str, Any], folder: Path) -> list[Any]:
    """[micro-batches of a rank, shapes of calls], after the same training with the reference; in every rank."""
    import torch

    expected, found = (train(recipe, folder, op) for op in ("torch", "counted"))
    assert not expected["calls"] and found["names"] == expected["names"]
    assert found["values"] == pytest.approx(expected["values"], rel=1e-5)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for role, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][role], gradient, rtol=1e-4, atol=1e-6, msg=role)
    return [found["plan"].micro_batches, found["calls"]]


def trained(world: int, folder: Path, config: dict[str, Any], **parallel: Any) -> list[Any]:
    """`compare` in every rank of a layout."""
    from loong_core.testing import tiny

    recipe = tiny.settings(config["model_type"], config, parallel=parallel)
    return run_ranks(world, lambda rank: compare(recipe, folder))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_dense_layer_is_one_op_with_the_same_gradients(recompute: str, counted: Any, tmp_path: Path) -> None:
    ((micro_batches, calls),) = trained(1, tmp_path, CONFIG, recompute=recompute)
    a_pass = CONFIG["num_hidden_layers"] * micro_batches
    assert len(calls) == a_pass * (STEPS * (2 if recompute == "full" else 1) + 1)
    assert {tuple(shape) for shape in calls} == {(16, 1, CONFIG["hidden_size"])}


def test_weights_that_an_op_reads_are_gathered_before_it_runs(counted: Any, tmp_path: Path) -> None:
    options = {"overlap": True, "bucket_size": 1000}  # many buckets, each gathered when a module asks for it
    for _, calls in trained(2, tmp_path, CONFIG, options=options):
        assert calls


@pytest.mark.parametrize(
    ("world", "config", "parallel"),
    [(2, CONFIG, {"tp": 2, "sp": False}), (2, CONFIG, {"tp": 2, "sp": True}), (1, LLAMA, {})],
    ids=["tp2", "tp2-sp", "biased"],
)
def test_cut_or_biased_layers_stay_megatrons(
    world: int, config: dict[str, Any], parallel: dict[str, Any], counted: Any, tmp_path: Path
) -> None:
    assert all(not calls for _, calls in trained(world, tmp_path, config, **parallel))
