"""Tiny transformers checkpoints, and the decoder on one or several ranks loaded from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BASE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "vocab_size": 131}


@dataclass
class Checkpoint:
    """A folder that transformers wrote, with what stands in it, and the model it was written from."""

    model: Any
    config: dict[str, Any]
    tensors: dict[str, Any]


def checkpoint(kind: str, folder: Path, **settings: Any) -> Checkpoint:
    """A random float32 model of `transformers.<kind>Config`, biases and norms random too, saved to `folder`."""
    import torch
    import transformers
    from safetensors.torch import load_file

    config = getattr(transformers, f"{kind}Config")(**{**BASE, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1)
    model.save_pretrained(folder)
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return Checkpoint(model, json.loads((folder / "config.json").read_text()), tensors)


def build(
    family: Any,
    config: dict[str, Any],
    dropout: float = 0.0,
    device: str = "cpu",
    dispatch: str = "auto",
    **degrees: Any,
) -> Any:
    """(chunks, shape, context) of this rank under a layout; process groups are made anew."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from loong_core import ops
    from loong_core.parallel.build import BuildContext
    from loong_core.parallel.torch_layers import TorchLayerProvider
    from loong_core.precision import POLICIES
    from loong_core.types import OpRequest, ParallelPlan
    from loong_llm.decoder import build as build_decoder
    from loong_llm.shape import describe

    shape = describe(family, config)
    world = dist.get_world_size()
    plan = ParallelPlan(planner="megatron", world=world, **{"stages": (tuple(range(shape.layers)),), **degrees})
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tp,
        pipeline_model_parallel_size=plan.pp,
        virtual_pipeline_model_parallel_size=plan.vpp if plan.vpp > 1 else None,
        context_parallel_size=plan.cp,
        expert_model_parallel_size=plan.ep,
        expert_tensor_parallel_size=plan.etp,
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    request = OpRequest(backend="cpu", dtype="float32", degrees={}, fields={})
    bound = ops.bind(ops.OPS, request, {}, frozenset())
    stages = range(groups.pp.rank(), plan.pp * plan.vpp, plan.pp)
    context = BuildContext(
        plan=plan,
        precision=next(policy for policy in POLICIES if policy.name == "fp32"),
        ops=bound,
        layers=TorchLayerProvider(bound),
        groups=groups,
        device=device,
        chunks=tuple(plan.stages[stage] for stage in stages),
        first=tuple(stage == 0 for stage in stages),
        last=tuple(stage == plan.pp * plan.vpp - 1 for stage in stages),
        dropout=dropout,
        dispatch=dispatch,
    )
    return build_decoder(shape, context), shape, context


def cut(spec: Any, full: Any, groups: Any) -> Any:
    """This rank's part of a full tensor."""
    from loong_core.weights import shard

    group = groups.tp if spec.expert is None else groups.expt_tp
    return shard(full, group.rank(), group.size(), spec.axis, spec.blocks, spec.padded)


def full_tensor(family: Any, fields: Any, spec: Any, tensors: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """(the native tensor that `spec` describes, the names of the HF tensors it was made of)."""
    from loong_core.weights import VERBS, WeightMap

    for row in WeightMap(family.weights).candidates(spec):
        if all(name in tensors for name in row.hf):
            parts = [tensors[name] for name in row.hf]
            if row.verb == "stack":
                parts = [part[spec.expert] for part in parts]
            return VERBS[row.verb].pack(parts, fields), row.hf
    raise AssertionError(f"no row makes {spec.role}")


def load(family: Any, chunks: Any, shape: Any, context: Any, tensors: dict[str, Any]) -> set[str]:
    """Copy HF tensors into this rank's parameters; returns the names that were used."""
    used: set[str] = set()
    for chunk in chunks:
        for parameter in chunk.local_parameters():
            spec = parameter.spec
            full, names = full_tensor(family, shape.fields, spec, tensors)
            assert tuple(full.shape) == spec.shape, spec
            parameter.tensor.data.copy_(cut(spec, full, context.groups))
            used.update(names)
    return used


def reference_gradients(model: Any) -> dict[str, Any]:
    """HF gradients by tensor name; experts keep transformers' own fused layout."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions of this file."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return SimpleNamespace(
        checkpoint=checkpoint,
        build=build,
        cut=cut,
        full_tensor=full_tensor,
        load=load,
        reference_gradients=reference_gradients,
    )
