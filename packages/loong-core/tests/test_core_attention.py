"""CoreAttention: context parallelism against one rank (forward and gradients, packed too), and what it refuses."""

from __future__ import annotations

import pytest
import torch

from loong_core.errors import Unsupported
from loong_core.testing.ranks import run_ranks

S, B, H, G, D = 12, 3, 6, 2, 8
SEGMENTS = [[0] * 12, [0] * 5 + [1] * 4 + [-1] * 3, [0] * 2 + [7] * 10]


def build(tp=None, cp=None, dropout=0.0, **settings):
    """A built core attention over the torch op; call it inside a rank."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from loong_core.ops import OPS, OpRequest, bind
    from loong_core.parallel.core_attention import core_attention

    ops = bind(OPS, OpRequest("cpu", "float32", {}, {}), {})
    alone = dist.new_subgroups(1)[0]
    config = TransformerConfig(
        num_layers=1,
        hidden_size=H * D,
        num_attention_heads=H,
        num_query_groups=G,
        kv_channels=D,
        attention_dropout=dropout,
        **settings,
    )
    return core_attention(ops)(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        cp_comm_type="p2p",
        softmax_scale=None,
        pg_collection=ProcessGroupCollection(tp=tp or alone, cp=cp or alone),
    )


def whole_inputs():
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(S, B, heads, D, generator=generator) for heads in (H, G, G, H)]


def reference(segments):
    """Output and gradients of one rank, straight from the op."""
    from loong_core.references.attention import attention

    *inputs, upstream = whole_inputs()
    leaves = [value.requires_grad_() for value in inputs]
    pair = None if segments is None else (segments, segments)
    out = attention(*leaves, scale=D**-0.5, segments=pair)
    return out.detach(), torch.autograd.grad(out, leaves, upstream.reshape(S, B, -1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_context_parallel_ranks_agree_with_one_rank(size, packed):
    segments = torch.tensor(SEGMENTS) if packed else None

    def compute(rank):
        import torch.distributed as dist

        from loong_core.parallel import context

        module = build(cp=dist.group.WORLD)
        mine = context.rows(S, size, rank)
        *inputs, upstream = [value[mine] for value in whole_inputs()]
        leaves = [value.requires_grad_() for value in inputs]
        out = module(*leaves, None if segments is None else segments[:, mine])
        gradients = torch.autograd.grad(out, leaves, upstream.reshape(S // size, B, -1))
        return [part.tolist() for part in (out.detach(), *gradients)]

    results = run_ranks(size, compute, init=True)
    from loong_core.parallel import context

    order = context.gathered_rows(S, size)
    expected = reference(segments)
    for index, wanted in enumerate((expected[0], *expected[1])):
        found = torch.cat([torch.tensor(result[index]) for result in results])
        torch.testing.assert_close(found, wanted[order], rtol=1e-5, atol=1e-6)


def test_packed_samples_equal_the_samples_alone():
    """The second sample of a packed row is what it is in a row of its own."""

    def compute(rank):
        module = build()
        q, k, v, _ = (value[:, :1] for value in whole_inputs())
        packed = module(q, k, v, torch.tensor([[0] * 5 + [1] * 7]))
        return [packed[5:].tolist(), module(q[5:], k[5:], v[5:], None).tolist()]

    packed, alone = run_ranks(1, compute, init=True)[0]
    torch.testing.assert_close(torch.tensor(packed), torch.tensor(alone), rtol=1e-5, atol=1e-6)


def test_dropout_differs_between_tensor_parallel_ranks_and_only_in_training():
    def compute(rank):
        import torch.distributed as dist
        from megatron.core import tensor_parallel

        tensor_parallel.get_cuda_rng_tracker().add("model-parallel-rng", 100 + rank)
        torch.manual_seed(1)
        module = build(tp=dist.group.WORLD, dropout=0.5, tensor_model_parallel_size=2)
        q, k, v, _ = whole_inputs()
        trained = module(q, k, v, None)
        after = torch.rand(2)
        module.eval()
        return [trained.tolist(), module(q, k, v, None).tolist(), after.tolist()]

    first, second = run_ranks(2, compute, init=True)
    assert first[0] != second[0]
    assert first[1] == second[1]
    assert first[2] == second[2], "the default random state must not depend on dropout"


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"window_size": (4, 0)}, "window_size"), ({"softmax_type": "off-by-one"}, "softmax_type")],
)
def test_settings_that_the_op_does_not_compute_are_refused(settings, named):
    def compute(rank):
        try:
            build(**settings)
        except Unsupported as error:
            return str(error)

    assert named in run_ranks(1, compute, init=True)[0]


def test_masks_and_biases_of_other_kinds_are_refused():
    def compute(rank):
        from megatron.core.transformer.enums import AttnMaskType

        module = build()
        q, k, v, _ = whole_inputs()
        texts = []
        for more in ({"attn_mask_type": AttnMaskType.no_mask}, {"attention_bias": torch.zeros(1)}):
            try:
                module(q, k, v, None, **more)
            except Unsupported as error:
                texts.append(str(error))
        return texts

    no_mask, bias = run_ranks(1, compute, init=True)[0]
    assert "no_mask" in no_mask and "bias" in bias
