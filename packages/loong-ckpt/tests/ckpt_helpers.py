"""A model in memory behind the engine's protocol, cut as megatron-core cuts it, for tests that need no training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from loong_core.precision import POLICIES
from loong_core.recipe import Recipe
from loong_core.train.engine import LocalParameter
from loong_core.types import ModelFamily, ModelShape, ParallelPlan, ParameterSpec
from loong_core.weights import padded_extent, unshard
from loong_llm.models.llama import LLAMA
from loong_llm.models.qwen2 import QWEN2
from loong_llm.models.qwen3 import QWEN3
from loong_llm.models.qwen3_moe import QWEN3_MOE
from loong_llm.shape import describe

FAMILIES: dict[str, ModelFamily] = {family.name: family for family in (LLAMA, QWEN2, QWEN3, QWEN3_MOE)}
TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "head_dim": 8}


class MemoryEngine:
    """Holds this rank's parameters. Ranks are ordered as megatron orders them: tp, then ep inside dp, then pp."""

    def __init__(
        self, shape: ModelShape, plan: ParallelPlan, rank: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self.plan, self.rank = shape, plan, rank
        self.stage = rank // (plan.tp * plan.dp)
        self.expert_rank = rank // plan.etp % plan.ep
        self.changed = 0
        self.held = [LocalParameter(spec, torch.full(self._extents(spec), 7.0, dtype=dtype)) for spec in self._specs()]
        self.groups = self._groups()

    def _specs(self) -> Iterable[ParameterSpec]:
        experts = self.shape.fields.get("experts") or 1
        for spec in self.shape.parameters:
            stage = {"first": 0, "last": self.plan.pp - 1}.get(spec.place)
            if stage is None:
                stage = next(i for i, layers in enumerate(self.plan.stages) if spec.layer in layers) % self.plan.pp
            mine = spec.expert is None or spec.expert // (experts // self.plan.ep) == self.expert_rank
            if stage == self.stage and mine:
                yield spec

    def _parts(self, spec: ParameterSpec) -> int:
        return self.plan.tp if spec.expert is None else self.plan.etp

    def _extents(self, spec: ParameterSpec) -> list[int]:
        extents = list(spec.shape)
        if spec.axis is not None:
            size = self._parts(spec)
            extent = padded_extent(extents[spec.axis], size, spec.blocks) if spec.padded else extents[spec.axis]
            assert extent % size == 0, spec
            extents[spec.axis] = extent // size
        return extents

    def _groups(self) -> dict[int, Any]:
        """Tensor-parallel groups by degree: consecutive ranks."""
        groups: dict[int, Any] = {}
        for size in {self.plan.tp, self.plan.etp} - {1}:
            for first in range(0, self.plan.world, size):
                group = dist.new_group(list(range(first, first + size)))
                if first <= self.rank < first + size:
                    groups[size] = group
        return groups

    def parameters(self) -> Iterable[LocalParameter]:
        return iter(self.held)

    def gather(self, parameter: LocalParameter) -> torch.Tensor | None:
        spec, size = parameter.spec, self._parts(parameter.spec)
        replica = self.rank // size % (self.plan.dp * self.plan.tp // size)
        if spec.expert is not None:
            replica = replica // self.plan.ep
        if replica:
            return None
        parts = [parameter.tensor]
        if size > 1 and spec.axis is not None:
            parts = [torch.empty_like(parameter.tensor) for _ in range(size)]
            dist.all_gather(parts, parameter.tensor.contiguous(), group=self.groups[size])
        if self.rank % size:
            return None
        return unshard(parts, spec.axis, spec.blocks, spec.shape[spec.axis] if spec.padded else None)

    def weights_changed(self) -> None:
        self.changed += 1

    def save_state(self, folder: Path) -> None:
        """One file per rank: enough for tests that save and load under one layout."""
        from safetensors.torch import save_file

        save_file({p.spec.role: p.tensor.contiguous() for p in self.held}, folder / f"rank-{self.rank}.safetensors")

    def load_state(self, folder: Path, optimizer: bool = True) -> None:
        from safetensors.torch import load_file

        for role, tensor in load_file(folder / f"rank-{self.rank}.safetensors").items():
            next(p for p in self.held if p.spec.role == role).tensor.copy_(tensor)

    def forget(self) -> None:
        for parameter in self.held:
            parameter.tensor.fill_(7.0)


def make_plan(world: int = 1, **degrees: int) -> ParallelPlan:
    """A plan over `world` ranks with two layers, one per stage if there are two stages."""
    tp, pp, ep = (degrees.get(name, 1) for name in ("tp", "pp", "ep"))
    stages = ((0, 1),) if pp == 1 else ((0,), (1,))
    etp = degrees.get("etp", 1 if ep > 1 else tp)
    return ParallelPlan(planner="test", world=world, tp=tp, pp=pp, ep=ep, etp=etp, dp=world // (tp * pp), stages=stages)


def make_run(
    family: str,
    config: dict[str, Any],
    folder: Path,
    plan: ParallelPlan | None = None,
    rank: int = 0,
    precision: str = "fp32",
    **sections: Any,
) -> Any:
    """What `loong_core.train.run.Run` holds, as far as checkpoints look at it."""
    plan = plan or make_plan()
    policy = next(policy for policy in POLICIES if policy.name == precision)
    folder.mkdir(parents=True, exist_ok=True)
    return SimpleNamespace(
        recipe=Recipe.model_validate({"precision": precision, **sections}),
        folder=folder,
        plan=plan,
        family=FAMILIES[family],
        config=config,
        shape=describe(FAMILIES[family], config),
        precision=policy,
        device="cpu",
        rank=rank,
        world=plan.world,
        step=0,
        notes=[],
        is_main=rank == 0,
    )


def engine_for(run: Any) -> MemoryEngine:
    dtype = getattr(torch, run.precision.parameters)
    return MemoryEngine(run.shape, run.plan, run.rank, dtype)


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any) -> Any:
    """A random transformers model saved by transformers itself; returns its config.json as a dict."""
    import transformers

    kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}[family]
    settings = TINY | (EXPERTS if family == "qwen3_moe" else {}) | changes
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    return json.loads((folder / "config.json").read_text())


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name
