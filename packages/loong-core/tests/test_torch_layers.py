"""The plain-torch layer provider: norms (also under sequence parallelism), the duplicated linear, the protocol."""

from __future__ import annotations

import pytest

from loong_core.testing.ranks import run_ranks


def provider():
    """A provider over the torch ops; call it inside a rank."""
    from loong_core.ops import OPS, OpRequest, bind
    from loong_core.parallel.torch_layers import TorchLayerProvider

    return TorchLayerProvider(bind(OPS, OpRequest("cpu", "float32", {}, {}), {}))


def config(**settings):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, **settings)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_norms_equal_torch(normalization, zero_centred, dtype):
    def compute(rank):
        import torch

        norm = provider().layer_norm()(
            config=config(
                normalization=normalization,
                layernorm_zero_centered_gamma=zero_centred,
                params_dtype=getattr(torch, dtype),
            ),
            hidden_size=33,
            eps=1e-3,
        )
        torch.manual_seed(0)
        for parameter in norm.parameters():
            parameter.data.normal_()
        x = torch.randn(4, 2, 33).to(getattr(torch, dtype))
        weight = norm.weight.detach().float() + (1.0 if zero_centred else 0.0)
        if normalization == "RMSNorm":
            expected = torch.nn.functional.rms_norm(x.float(), (33,), weight, 1e-3)
        else:
            expected = torch.nn.functional.layer_norm(x.float(), (33,), weight, norm.bias.detach().float(), 1e-3)
        out = norm(x)
        return [str(out.dtype), ((out.float() - expected).abs().max() / expected.abs().max()).item()]

    found, difference = run_ranks(1, compute, init=True)[0]
    assert found == f"torch.{dtype}"
    assert difference < (1e-6 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize(
    ("implemented", "fused"),
    [((), False), (("rms_norm",), False), (("residual_rms_norm",), False), (("rms_norm", "residual_rms_norm"), True)],
)
def test_a_norm_hands_x_through_where_one_implementation_computes_both_ops(implemented, fused):
    def compute(rank):
        import torch

        from loong_core.ops import OPS, OpRequest, bind
        from loong_core.parallel.torch_layers import TorchLayerProvider
        from loong_core.types import OpImpl

        mine = [OpImpl(op=op, name="mine", target=f"loong_core.references.norm:{op}", rank=5) for op in implemented]
        layers = TorchLayerProvider(bind([*OPS, *mine], OpRequest("cpu", "float32", {}, {}), {}))
        kinds = [layers.layer_norm(rms_norm=True, has_residual=has_residual) for has_residual in (True, False)]
        norm, plain = (kind(config=config(normalization="RMSNorm"), hidden_size=8) for kind in kinds)
        x = torch.arange(24.0).reshape(3, 8)
        out = norm(x)
        normed, residual = out if isinstance(out, tuple) else (out, x)
        same = torch.equal(normed, plain(x)) and torch.equal(residual, x)
        return [isinstance(out, tuple), same, list(norm.state_dict()), list(plain.state_dict())]

    assert run_ranks(1, compute, init=True)[0] == [fused, True, ["weight"], ["weight"]]


def test_another_normalization_is_refused():
    def compute(rank):
        from loong_core.errors import Unsupported

        settings = config()
        settings.normalization = "L2Norm"
        try:
            provider().layer_norm()(config=settings, hidden_size=8)
        except Unsupported as error:
            return str(error)

    assert "L2Norm" in run_ranks(1, compute, init=True)[0]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_norm_and_its_linear_layers_over_two_ranks_equal_one_rank(sequence_parallel):
    """norm -> column-parallel -> row-parallel, with the gradients megatron-core sums over the tensor-parallel ranks."""

    def compute(rank, world):
        import torch
        import torch.distributed as dist
        from megatron.core import parallel_state, tensor_parallel

        parallel_state.initialize_model_parallel(tensor_model_parallel_size=world)
        tensor_parallel.model_parallel_cuda_manual_seed(1)
        parallel = sequence_parallel and world > 1
        settings = config(
            normalization="RMSNorm",
            tensor_model_parallel_size=world,
            sequence_parallel=parallel,
            gradient_accumulation_fusion=False,
        )
        layers = provider()
        norm = layers.layer_norm()(config=settings, hidden_size=32, eps=1e-6)
        more = {"config": settings, "init_method": torch.nn.init.zeros_, "bias": False, "skip_bias_add": False}
        column = layers.column_parallel_linear()(32, 64, gather_output=False, is_expert=False, **more)
        row = layers.row_parallel_linear()(64, 32, input_is_parallel=True, is_expert=False, **more)
        generator = torch.Generator().manual_seed(3)
        weights = [torch.randn(shape, generator=generator) / 8 for shape in ((32,), (64, 32), (32, 64))]
        x = torch.randn(6, 2, 32, generator=generator)
        norm.weight.data.copy_(weights[0])
        column.weight.data.copy_(weights[1].chunk(world, 0)[rank])
        row.weight.data.copy_(weights[2].chunk(world, 1)[rank])
        x = (x.chunk(world, 0)[rank] if parallel else x).clone().requires_grad_()
        out = row(column(norm(x))[0])[0]
        out.square().sum().backward()
        gradient = norm.weight.grad.clone()
        assert norm.weight.sequence_parallel == parallel
        if norm.weight.sequence_parallel:
            dist.all_reduce(gradient)
        return [part.tolist() for part in (out.detach(), x.grad, gradient, column.weight.grad, row.weight.grad)]

    import torch

    def whole(parts, axis):
        return torch.cat([torch.tensor(part) for part in parts], axis)

    one = [torch.tensor(part) for part in run_ranks(1, compute, 1, init=True)[0]]
    two = run_ranks(2, compute, 2, init=True)
    for index in (0, 1):
        found = whole([part[index] for part in two], 0) if sequence_parallel else torch.tensor(two[1][index])
        torch.testing.assert_close(found, one[index], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(two[0][2]), one[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole([part[3] for part in two], 0), one[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole([part[4] for part in two], 1), one[4], rtol=1e-4, atol=1e-5)


def test_the_duplicated_linear_layer():
    def compute(rank):
        import torch

        linear = provider().linear()
        made = [
            linear(5, 3, config=config(), init_method=torch.nn.init.ones_, bias=bias, skip_bias_add=skip)
            for bias, skip in ((True, False), (True, True), (False, False))
        ]
        x = torch.arange(10.0).reshape(2, 5)
        made[0].bias.data.fill_(1.0)
        made[1].bias.data.fill_(1.0)
        return [[out.tolist(), None if bias is None else bias.tolist()] for out, bias in (layer(x) for layer in made)]

    ones = [1.0, 1.0, 1.0]
    assert run_ranks(1, compute, init=True)[0] == [
        [[[11.0] * 3, [36.0] * 3], None],
        [[[10.0] * 3, [35.0] * 3], ones],
        [[[10.0] * 3, [35.0] * 3], None],
    ]


def test_the_provider_has_every_method_of_megatrons_protocol():
    def compute(rank):
        from megatron.core.models.backends import BackendSpecProvider
        from megatron.core.transformer.moe.experts import SequentialMLP

        layers = provider()
        wanted = [name for name in vars(BackendSpecProvider) if not name.startswith("_")]
        missing = [name for name in wanted if not callable(getattr(layers, name, None))]
        return [len(wanted), missing, layers.fuse_layernorm_and_linear(), layers.column_parallel_layer_norm_linear(),
                layers.grouped_mlp_modules(True).func is SequentialMLP, layers.activation_func()]  # fmt: skip

    count, *rest = run_ranks(1, compute, init=True)[0]
    assert count >= 8 and rest == [[], False, None, True, None]
