"""The decoder cut over ranks: the parameters `describe` promises, and the gradients of one process of transformers."""

from __future__ import annotations

import pytest

from loong_core.testing.ranks import run_ranks
from loong_llm.models.llama import LLAMA
from loong_llm.models.qwen3 import QWEN3
from loong_llm.models.qwen3_moe import QWEN3_MOE

DENSE = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {**DENSE, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]}
BALANCED = {**EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.9}
MODELS = {
    "llama": (LLAMA, "Llama", {**DENSE, "attention_bias": True, "mlp_bias": True}),
    "qwen3": (QWEN3, "Qwen3", {**DENSE, "tie_word_embeddings": True}),
    "moe": (QWEN3_MOE, "Qwen3Moe", EXPERTS),
    "balanced": (QWEN3_MOE, "Qwen3Moe", BALANCED),
}
LAYOUTS = [
    ("llama", {"tp": 2, "etp": 2}),
    ("llama", {"tp": 2, "etp": 2, "sp": True}),
    ("llama", {"cp": 2}),
    ("qwen3", {"tp": 2, "etp": 2}),
    ("qwen3", {"tp": 2, "etp": 2, "sp": True}),
    ("qwen3", {"tp": 2, "etp": 2, "sp": True, "cp": 2}),
    ("balanced", {"dp": 2}),
    ("balanced", {"ep": 2, "dp": 2}),
    ("balanced", {"ep": 2, "dp": 2, "recompute": "selective"}),
    ("balanced", {"ep": 2, "dp": 2, "dispatch": "weights"}),
    ("balanced", {"ep": 3, "dp": 3, "dispatch": "weights", "recompute": "full"}),
    ("balanced", {"ep": 2, "tp": 2, "sp": True, "cp": 2, "dispatch": "weights"}),
    ("balanced", {"cp": 2}),
    ("balanced", {"cp": 2, "recompute": "full"}),
    ("balanced", {"tp": 2, "sp": True}),
    ("balanced", {"tp": 2, "sp": True, "ep": 2}),
    ("balanced", {"tp": 2, "sp": True, "etp": 2}),
    ("balanced", {"ep": 2, "tp": 2, "sp": True, "cp": 2}),
]


def world_of(degrees):
    """Ranks of a layout."""
    return degrees.get("tp", 1) * degrees.get("cp", 1) * degrees.get("pp", 1) * degrees.get("dp", 1)


def label(layout):
    """`balanced-tp2-sp`."""
    model, degrees = layout
    return f"{model}-{degrees_label(degrees)}"


def degrees_label(degrees):
    """`tp2-sp`."""
    shown = {name: "" if value is True else value for name, value in degrees.items() if name != "stages"}
    return "-".join(f"{name}{value}" for name, value in shown.items()) or "single"


@pytest.mark.parametrize("layout", LAYOUTS, ids=label)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_gradients_do_not_depend_on_the_layout(layout, padded, tiny, tmp_path):
    model, degrees = layout
    family, kind, settings = MODELS[model]
    found = tiny.checkpoint(kind, tmp_path, **settings)

    def compare(rank):
        import torch

        from loong_core.parallel.context import slice_batch
        from loong_core.weights import shard

        chunks, shape, context = tiny.build(family, found.config, **degrees)
        tiny.load(family, chunks, shape, context, found.tensors)
        (decoder,), groups, plan = chunks, context.groups, context.plan
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, shape.vocabulary, (plan.dp, 2, 16), generator=generator)
        mask = torch.arange(16).expand(plan.dp, 2, -1) < (torch.tensor([[16], [9]]) if padded else 16)
        direction = torch.randn(plan.dp, 2, 16, shape.vocabulary, generator=generator) * mask[..., None]

        mine = groups.dp.rank()
        batch = {"tokens": tokens[mine], "positions": torch.arange(16).expand(2, -1), "direction": direction[mine]}
        batch["mask"] = mask[mine]
        if padded:
            batch["segments"] = torch.where(mask[mine], 0, -1)
        batch = slice_batch(batch, plan.cp, groups.cp.rank())
        logits = decoder(batch)
        aligned = shard(batch["direction"], groups.tp.rank(), groups.tp.size(), axis=2, padded=True)
        total = (logits * aligned).sum()
        for loss in decoder.auxiliary_losses().values():
            total = total + loss * batch["mask"].sum()  # as the engine does: weighted with this rank's tokens
        total.backward()

        for row in range(plan.dp):
            attention = mask[row].long() if padded else None
            reference = found.model(tokens[row], attention_mask=attention, use_cache=False)
            expected = (reference.logits * direction[row]).sum()
            if reference.get("aux_loss") is not None:
                expected = expected + reference.aux_loss * found.config["router_aux_loss_coef"] * mask[row].sum()
            expected.backward()
        return worst_gradient(tiny, family, shape, context, decoder, found.model)

    worst = run_ranks(world_of(degrees), compare, init=True)
    assert max(worst) < 1e-4


def worst_gradient(tiny, family, shape, context, decoder, model):
    """The largest relative difference, after the reductions that megatron-core makes at the end of a step."""
    import torch.distributed as dist

    groups, plan = context.groups, context.plan
    gradients = tiny.reference_gradients(model)
    worst = 0.0
    for parameter in decoder.local_parameters():
        spec, gradient = parameter.spec, parameter.gradient.clone()
        partial = plan.sp and getattr(parameter.trained, "sequence_parallel", False)
        if plan.tp > 1 and (partial or spec.role.endswith(("q_norm", "k_norm"))):
            dist.all_reduce(gradient, group=groups.tp)
        dist.all_reduce(gradient, group=groups.dp_cp if spec.expert is None else groups.expt_dp)
        expected = tiny.cut(spec, tiny.full_tensor(family, shape.fields, spec, gradients)[0], groups)
        worst = max(worst, ((gradient - expected).norm() / expected.norm().clamp(min=1e-6)).item())
    return worst


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("qwen3", {}),
        ("qwen3", {"tp": 2, "etp": 2}),
        ("qwen3", {"pp": 2, "stages": ((0,), (1, 2))}),
        ("llama", {"pp": 2, "vpp": 2, "stages": ((0,), (1,), (2,), (3,)), "layers": 4}),
        ("moe", {"ep": 2, "dp": 2}),
        ("moe", {"tp": 2, "sp": True, "etp": 2}),
        ("moe", {"tp": 2, "sp": True, "etp": 1}),
        ("moe", {"pp": 2, "ep": 2, "dp": 2, "stages": ((0, 1), (2,))}),
    ],
    ids=lambda value: value if isinstance(value, str) else degrees_label(value),
)
def test_built_parameters_are_those_described(model, degrees, tiny, tmp_path):
    degrees = dict(degrees)
    family, kind, settings = MODELS[model]
    settings = {**settings, "num_hidden_layers": degrees.pop("layers", 3)}
    config = tiny.checkpoint(kind, tmp_path, **settings).config

    def look(rank):
        from loong_core.types import ParameterSpec
        from loong_core.weights import padded_extent

        chunks, shape, context = tiny.build(family, config, **degrees)
        plan, groups = context.plan, context.groups
        roles = []
        for chunk, stage in zip(chunks, context.chunks, strict=True):
            named = {id(parameter) for parameter in chunk.parameters()}
            listed = {id(parameter.trained) for parameter in chunk.local_parameters()}
            tied = shape.tied_embeddings and chunk.post_process and not chunk.pre_process
            assert len(listed) == len(named) - tied
            for parameter in chunk.local_parameters():
                spec = parameter.spec
                assert isinstance(spec, ParameterSpec)
                size = (groups.tp if spec.expert is None else groups.expt_tp).size()
                extents = list(spec.shape)
                if spec.padded:
                    extents[spec.axis] = padded_extent(extents[spec.axis], size)
                if spec.axis is not None:
                    extents[spec.axis] //= size
                assert tuple(parameter.tensor.shape) == tuple(extents), spec
                assert spec.layer is None or spec.layer in stage
                if spec.expert is not None:
                    count = shape.fields["experts"] // plan.ep
                    assert spec.expert // count == groups.ep.rank()
                roles.append(spec.role)
        assert len(roles) == len(set(roles))
        return roles, sorted(spec.role for spec in shape.parameters)

    results = run_ranks(world_of(degrees), look, init=True)
    held = {role for roles, _ in results for role in roles}
    assert sorted(held) == results[0][1]


def test_the_tied_copy_on_the_last_stage_is_not_listed(tiny, tmp_path):
    config = tiny.checkpoint("Qwen3", tmp_path, **MODELS["qwen3"][2]).config

    def look(rank):
        chunks, _, _ = tiny.build(QWEN3, config, pp=2, stages=((0, 1), (2,)))
        return [
            len(list(chunks[0].parameters())) - len(list(chunks[0].local_parameters())),
            any(p.spec.role == "embed" for p in chunks[0].local_parameters()),
        ]

    assert run_ranks(2, look, init=True) == [[0, True], [1, False]]


def test_dropout_acts_in_training_only_and_spares_the_embedding(tiny, tmp_path):
    def look(rank):
        import torch

        found = tiny.checkpoint("Qwen3", tmp_path, **MODELS["qwen3"][2])
        chunks, shape, context = tiny.build(QWEN3, found.config, dropout=0.5)
        tiny.load(QWEN3, chunks, shape, context, found.tensors)
        batch = {"tokens": torch.arange(16)[None], "positions": torch.arange(16)[None]}
        first, second = chunks[0](batch), chunks[0](batch)
        assert not torch.equal(first, second)
        embedded = chunks[0].embedding(batch["tokens"], batch["positions"])
        assert (embedded != 0).all()
        chunks[0].eval()
        expected = found.model(batch["tokens"], use_cache=False).logits
        torch.testing.assert_close(chunks[0](batch), expected, rtol=0, atol=1e-5)
        return True

    assert run_ranks(1, look, init=True) == [True]


def test_roles_of_parameter_names():
    def look(rank):
        from loong_llm.decoder import role_of

        names = [
            "decoder.layers.1.mlp.experts.up",
            "decoder.layers.0.mlp.experts.down",
            "decoder.layers.0.mlp.linear_fc2.bias",
            "output_layer.weight",
            "decoder.layers.0.mlp.shared_experts.linear_fc1.weight",
        ]
        return [role_of(name, (4, 5)) for name in names]

    assert run_ranks(1, look) == [["layers.5.moe.up.#", "layers.4.moe.down.#", "layers.4.mlp.down_bias", "head", None]]
