"""The op `experts` in Triton: its contract, its tiles, its gradient buffers, and that it keeps to its tensors."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

from loong_core.backends import cuda
from loong_core.references.experts import experts as reference
from loong_core.testing.op import OpContract, error
from loong_ops.experts import Config, Tile, config_of, experts

DEVICE = "cuda" if cuda.probe().devices else "cpu"

# Rows that no expert uses are not masked in the products, because nobody reads what comes out of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are not interpreted where there is a CUDA device")
class TestExperts(OpContract):
    op = "experts"
    implementation = "triton"


@pytest.mark.gpu
class TestExpertsOnGpu(OpContract):
    op = "experts"
    implementation = "triton"
    backend = "cuda"
    device = "cuda"
    dtypes = ("float32", "bfloat16", "float16")


def draw(t, k, e, n, f, dtype=torch.float32, seed=0):
    """hidden, up, down, weights and chosen; k different experts a token where there are k."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(t, n, generator=generator),
        torch.randn(e, 2 * f, n, generator=generator) / n**0.5,
        torch.randn(e, n, f, generator=generator) / f**0.5,
        torch.rand(t, k, generator=generator),
    ]
    chosen = torch.rand(t, max(e, k), generator=generator).topk(k).indices % e
    return [tensor.to(dtype).to(DEVICE).requires_grad_() for tensor in tensors], chosen.to(DEVICE)


def gradients(function, tensors, chosen, **more):
    out = function(*tensors, chosen, **more)
    upstream = torch.cos(torch.arange(out.numel(), device=out.device, dtype=torch.float32)).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


def close(found, exact, limit):
    wrong = [error(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(wrong) <= limit, wrong


@pytest.mark.parametrize("group, parts", [(1, 1), (3, 2), (8, 4)])
@pytest.mark.parametrize("n, f", [(48, 40), (37, 33)])  # TMA descriptors; pointers
def test_many_tiles_in_every_dimension(group, parts, n, f):
    tensors, chosen = draw(t=21, k=2, e=3, n=n, f=f)
    config = Config(*[Tile(16, 32, 16, 2, 4, group, parts)] * 6)
    if group > 1:
        config = config._replace(up=Tile(16, 16, 16, 2, 4, group, parts))
    close(gradients(experts, tensors, chosen, _config=config), gradients(reference, tensors, chosen), 1e-5)


def test_a_grid_of_few_programs_splits_groups(monkeypatch):
    monkeypatch.setattr("loong_ops.experts.PROGRAMS", 3)
    tensors, chosen = draw(t=9, k=2, e=2, n=96, f=48)
    config = Config(*[Tile(16, 16, 16, 2, 4, group=5)] * 6)
    close(gradients(experts, tensors, chosen, _config=config), gradients(reference, tensors, chosen), 1e-5)


def test_routing_weights_may_be_wider_than_the_hidden_states():
    (hidden, up, down, _), chosen = draw(t=10, k=2, e=3, n=16, f=8, dtype=torch.bfloat16)
    weights = torch.rand(10, 2, device=DEVICE).requires_grad_()
    found = gradients(experts, [hidden, up, down, weights], chosen)
    assert found[0].dtype == torch.bfloat16 and found[4].dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, up, down, weights)]
    close(found, gradients(reference, wide, chosen), 2e-2)


BUFFERS = pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


@BUFFERS
@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_of_weights_are_added_to_their_buffers(contiguous, dtype, limit):
    tensors, chosen = draw(t=10, k=2, e=5, n=16, f=8)
    exact = gradients(reference, tensors, chosen)
    for parameter in tensors[1:3]:
        whole = torch.full((*parameter.shape, 1 if contiguous else 2), 0.5, device=DEVICE, dtype=dtype)
        parameter.main_grad = whole[..., 0]
    out = experts(*tensors, chosen)
    upstream = torch.cos(torch.arange(out.numel(), device=DEVICE, dtype=torch.float32)).view(out.shape)
    out.backward(upstream)
    for parameter, gradient in zip(tensors[1:3], exact[2:4], strict=True):
        assert parameter.grad_added_to_main_grad
        assert error(parameter.main_grad.float() - 0.5, gradient) < limit
    assert error(tensors[0].grad, exact[1]) < 1e-5


@BUFFERS
@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_of_weights_are_written_into_empty_buffers(contiguous, dtype, limit):
    tensors, chosen = draw(t=10, k=2, e=5, n=16, f=8)
    exact = gradients(reference, tensors, chosen)
    for parameter in tensors[1:3]:
        whole = torch.full((*parameter.shape, 1 if contiguous else 2), math.nan, device=DEVICE, dtype=dtype)
        parameter.main_grad = whole[..., 0]
        parameter.main_grad_empty = True
    for times in (1, 2):
        out = experts(*tensors, chosen)
        out.backward(torch.cos(torch.arange(out.numel(), device=DEVICE, dtype=torch.float32)).view(out.shape))
        for parameter, gradient in zip(tensors[1:3], exact[2:4], strict=True):
            assert error(parameter.main_grad, times * gradient) < limit


def test_gradients_of_bfloat16_weights_are_added_in_float32():
    tensors, chosen = draw(t=8, k=1, e=2, n=16, f=8, dtype=torch.bfloat16)
    for parameter in tensors[1:3]:
        parameter.main_grad = torch.full(parameter.shape, 1000.0, device=DEVICE)
    experts(*tensors, chosen).sum().backward()
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    reference(*wide, chosen).sum().backward()
    for parameter, exact in zip(tensors[1:3], wide[1:3], strict=True):
        # Next to 1000 a bfloat16 number could not tell two gradients apart.
        assert error(parameter.main_grad - 1000.0, exact.grad) < 2e-2


def test_a_second_backward_is_refused():
    tensors, chosen = draw(t=3, k=1, e=2, n=16, f=8)
    out = experts(*tensors, chosen).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        out.backward()


def test_no_tokens():
    tensors, chosen = draw(t=0, k=2, e=3, n=16, f=8)
    out, *found = gradients(experts, tensors, chosen)
    assert out.shape == (0, 16)
    assert all(gradient.shape == tensor.shape for gradient, tensor in zip(found, tensors, strict=True))
    assert not any(gradient.any() for gradient in found)


def test_config_follows_the_problem():
    assert config_of(torch.float32, 10**6, 8, 2048, 768).up.m == 64
    assert config_of(torch.bfloat16, 10**6, 8, 2048, 768).up.m == 128
    assert config_of(torch.bfloat16, 100, 8, 2048, 768).up.m == 64
    assert config_of(torch.bfloat16, 10**6, 8, 2047, 768).up.n == 64


@pytest.mark.parametrize("pairs", [None, 11])
@pytest.mark.parametrize("n, f", [(24, 16), (17, 9)])
def test_kernels_keep_to_their_tensors(within_bounds, n, f, pairs):
    tensors, _ = draw(t=9, k=3, e=2, n=n, f=f)
    chosen = torch.arange(27).view(9, 3) % 5
    if pairs is not None:
        assert int(((chosen == 1) | (chosen == 2)).sum()) == pairs
    gradients(experts, tensors, chosen, first=1, pairs=pairs, _config=Config(*[Tile(16, 16, 16, 2, 4, 2, 1)] * 6))
    assert within_bounds


@pytest.fixture
def within_bounds(monkeypatch):
    """Make the interpreter refuse loads and stores outside of the kernel's arguments; holds the kernels that ran."""
    if DEVICE == "cuda":
        pytest.skip("kernels are not interpreted where there is a CUDA device")
    from triton.runtime import interpreter

    spans, kernels = [], []
    call, builder = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder

    def record(self, *args, **kwargs):
        tensors = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        spans[:] = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors]
        kernels.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    def checked(name):
        access = getattr(builder, name)

        def check(self, pointers, *rest, **more):
            mask = rest[0] if name == "create_masked_load" else rest[1]
            size = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
            mask = mask.data if isinstance(mask, interpreter.TensorHandle) else mask
            used = pointers.data[numpy.broadcast_to(mask.astype(bool), pointers.data.shape)]
            inside = numpy.zeros(used.shape, bool)
            for start, end in spans:
                inside |= (used >= start) & (used + size <= end)
            assert inside.all(), f"{kernels[-1]}: {name} outside of its tensors"
            return access(self, pointers, *rest, **more)

        return check

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(builder, name, checked(name))
    return kernels


@pytest.mark.gpu
@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize("n, f", [(512, 256), (1000, 760), (1001, 129)])
def test_large_tiles_on_gpu(n, f, skewed):
    tensors, chosen = draw(t=3000, k=4, e=16, n=n, f=f, dtype=torch.bfloat16)
    if skewed:
        chosen[: chosen.shape[0] // 2, 0] = 3
    upstream = torch.randn(3000, n, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1)).bfloat16()
    runs = []
    for _ in range(2):
        for tensor in tensors:
            tensor.grad = None
        for tensor in tensors[1:3]:
            tensor.main_grad = torch.full(tensor.shape, 0.25, device=DEVICE)
        out = experts(*tensors, chosen)
        out.backward(upstream)
        runs.append([out, tensors[0].grad, tensors[1].main_grad, tensors[2].main_grad, tensors[3].grad])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
    wide = [tensor.detach().float().requires_grad_() for tensor in tensors]
    exact = reference(*wide, chosen)
    exact.backward(upstream.float())
    for buffer in runs[0][2:4]:
        buffer -= 0.25
    close(runs[0], [exact, *(tensor.grad for tensor in wide)], 2e-2)
