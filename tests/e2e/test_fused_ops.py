"""A whole model with every op fused has the gradients of the references, parameter by parameter, in fp32.

On a CPU the kernels run under Triton's interpreter; on a CUDA device as they are. The products that compute in
bfloat16 alone are compared with Transformer Engine's: neither may be much farther from fp32 than the other.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

FUSED = (
    "rms_norm",
    "residual_rms_norm",
    "linear_cross_entropy",
    "rotary_qkv",
    "swiglu",
    "route",
    "experts",
    "sum_of_squares",
    "sum_parts",
    "adamw",
)
PRODUCTS = ("linear", "gated_mlp")
TOLERANCE = 1e-3
COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
MOE = {
    "moe_intermediate_size": 24,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
    "mlp_only_layers": [1],
    "tie_word_embeddings": False,
}
SHAPES = {
    "moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", **COMMON, **MOE},
    "dense_tied": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **COMMON, "tie_word_embeddings": True},
    "biased": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **COMMON, "tie_word_embeddings": False},
}
SCRIPT = """
import json, sys
from pathlib import Path
folder, recipes = Path(sys.argv[1]), json.loads(sys.argv[2])
if next(iter(recipes.values()))["backend"] == "cpu":
    from loong_core.testing.interpreter import interpret
    interpret()
from safetensors.torch import save_file
from loong_core.testing import tiny
from loong_ops import quack_linear, quack_products
quack_products.FEWEST = quack_linear.NARROWEST = 0  # these models are so small that cuBLAS would stand in for QuACK
for name, recipe in recipes.items():
    run, engine = tiny.start(recipe, folder)
    for _ in range(1 if recipe["backend"] == "cpu" else 2):  # again, with buffers that hold the first gradient
        losses = [engine.forward_backward(tiny.batches(run, 0), 0)["loss"]]
    found = {f"0.{p.spec.role}": p.gradient.detach().float().cpu().clone() for p in engine.parameters()}
    norm = engine.step(1e-3)
    for parameter in engine.parameters():  # nothing of a step's gradients may reach the next one
        parameter.gradient.fill_(float("nan"))
    losses.append(engine.forward_backward(tiny.batches(run, 1), 1)["loss"])
    found |= {f"1.{p.spec.role}": p.gradient.detach().float().cpu().clone() for p in engine.parameters()}
    engine.close()
    save_file(found, folder / f"{name}.safetensors")
    choices = {op: choice.name for op, choice in run.ops.choices.items()}
    (folder / f"{name}.json").write_text(json.dumps({"losses": losses, "norm": norm, "ops": choices}))
"""


def train(folder: Path, recipes: dict[str, dict], backend: str) -> Path:
    """All recipes in one process: starting one takes longer than training."""
    # On a card fp32 shall mean it: Transformer Engine would multiply in TF32, whose rounding is not what is compared.
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if backend == "cpu" else {"NVIDIA_TF32_OVERRIDE": "0"})
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder), json.dumps(recipes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def train_all(folder: Path, backend: str) -> Path:
    """Every shape with the references and with the kernels."""
    from loong_core.testing import tiny

    recipes = {
        f"{shape}-{ops}": tiny.settings(
            config["model_type"], config, backend=backend, ops=dict.fromkeys(FUSED, ops), data={"micro_batch": 2}
        )
        for shape, config in SHAPES.items()
        for ops in ("torch", "triton")
    }
    return train(folder, recipes, backend)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_all(tmp_path_factory.mktemp("cpu"), "cpu")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from loong_core.backends import cuda

    if cuda.probe().devices == 0:
        pytest.skip("needs a CUDA device")
    return train_all(tmp_path_factory.mktemp("cuda"), "cuda")


@pytest.fixture(scope="module")
def multiplied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense shapes with Transformer Engine's products and with QuACK's, beside fp32."""
    from loong_core.backends import cuda
    from loong_core.testing import tiny

    if cuda.probe().devices == 0:
        pytest.skip("needs a CUDA device")
    if importlib.util.find_spec("quack") is None:
        pytest.skip("needs QuACK")
    recipes = {
        f"{shape}-{name}-{precision}": tiny.settings(
            SHAPES[shape]["model_type"],
            SHAPES[shape],
            backend="cuda",
            precision=precision,
            ops=dict.fromkeys(FUSED, "torch") | dict.fromkeys(PRODUCTS, name),
            data={"micro_batch": 2},
        )
        for shape in ("dense_tied", "biased")
        for name, precision in (("torch", "fp32"), *itertools.product(("torch", "quack"), ("bf16", "bf16_gradients")))
    }
    return train(tmp_path_factory.mktemp("products"), recipes, "cuda")


def compare(folder: Path, shape: str) -> None:
    exact, found = (load_file(folder / f"{shape}-{ops}.safetensors") for ops in ("torch", "triton"))
    plain, fused = (json.loads((folder / f"{shape}-{ops}.json").read_text()) for ops in ("torch", "triton"))
    assert {fused["ops"][op] for op in FUSED} == {"triton"} and {plain["ops"][op] for op in FUSED} == {"torch"}
    assert found.keys() == exact.keys()
    for role, gradient in exact.items():
        assert (found[role] - gradient).norm() <= TOLERANCE * gradient.norm().clamp(min=1e-8), role
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert fused["norm"] == pytest.approx(plain["norm"], rel=1e-4)


KEPT = """
import json, sys
from pathlib import Path
from loong_core.testing.interpreter import interpret
interpret()
import torch
from loong_core.testing import tiny

def kept(recipe, layers):
    recipe["model"]["config"]["num_hidden_layers"] = layers
    run, engine = tiny.start(recipe, Path(sys.argv[1]), optimizer=False)
    model, batch = engine.modules[0], tiny.batches(run)[0]
    owned = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = {}  # Tensors are held on to: a freed storage's address would be given out again.

    def note(tensor):
        if (address := tensor.untyped_storage().data_ptr()) not in owned:
            held[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(batch)
    engine.close()
    size = sum(tensor.untyped_storage().nbytes() for tensor in held.values())
    return size / 4 / batch["tokens"].numel(), run.shape.activation_sharded + run.shape.activation_replicated

recipe = json.loads(sys.argv[2])
few, described = kept(recipe, 1)
many, _ = kept(recipe, 3)
print(json.dumps([described, (many - few) / 2]))
"""


@pytest.mark.parametrize("shape", ["moe", "dense_tied", "biased"])
def test_described_activations_are_what_fused_ops_keep(shape: str, tmp_path: Path) -> None:
    from loong_core.testing import tiny

    sizes = {"hidden_size": 64, "intermediate_size": 192, "moe_intermediate_size": 32, "mlp_only_layers": []}
    config = SHAPES[shape] | {name: size for name, size in sizes.items() if name in SHAPES[shape]}
    ops = dict.fromkeys(FUSED, "triton")
    recipe = tiny.settings(config["model_type"], config, ops=ops, data={"micro_batch": 2})
    command = [sys.executable, "-W", "ignore", "-c", KEPT, str(tmp_path), json.dumps(recipe)]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    described, kept = json.loads(done.stdout.splitlines()[-1])
    assert 0.75 < described / kept < 1.1, (described, kept)


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_gradients_under_the_interpreter(shape: str, interpreted: Path) -> None:
    compare(interpreted, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_gradients_on_a_gpu(shape: str, compiled: Path) -> None:
    compare(compiled, shape)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", ["dense_tied", "biased"])
@pytest.mark.parametrize("kind", ["quack-bf16", "quack-bf16_gradients", "torch-bf16_gradients"])
def test_gradients_of_products_on_a_gpu(kind: str, shape: str, multiplied: Path) -> None:
    names = [f"{shape}-{name}" for name in ("torch-fp32", "torch-bf16", kind)]
    exact, upstream, found = (load_file(multiplied / f"{name}.safetensors") for name in names)
    wanted, _, report = (json.loads((multiplied / f"{name}.json").read_text()) for name in names)
    assert {report["ops"][op] for op in PRODUCTS} == {kind.partition("-")[0]}
    assert found.keys() == exact.keys()
    for role, gradient in exact.items():
        allowed = 2 * (upstream[role] - gradient).norm() + 5 * TOLERANCE * gradient.norm()
        assert (found[role] - gradient).norm() <= allowed, role
    assert report["losses"] == pytest.approx(wanted["losses"], rel=1e-2)
