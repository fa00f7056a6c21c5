"""The Pi0.5 policy: images and a prompt as prefix, noisy actions as suffix, the velocity of the flow as output.

Nothing is computed that nobody reads: no padding (where the batch may be packed), no head over words, no last layer of
the prefix beyond its keys and values. Sources: pi0 (arXiv 2410.24164), pi0.5 (arXiv 2504.16054), and their public
PyTorch implementations in OpenPI and LeRobot. Shape legend: b samples, c cameras, y and x pixels, p tokens of an image,
l prompt tokens, h action tokens, a action size, e width of the expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops
from loong_core.parallel.build import BuildContext
from loong_core.train.engine import Batch, LocalParameter
from loong_core.types import ModelShape
from loong_vla.gemma import JointLayer, Memory, Rows, adaptive_norm, angles
from loong_vla.images import looked_at
from loong_vla.packing import Packing, pack, packing_of, permuted
from loong_vla.siglip import Siglip

FLOAT32 = ("actions", "velocity")
"""Modules that stay in float32 under any precision policy: small, and first and last in touch with the actions."""


class Pi05(nn.Module):
    """The whole policy. Inputs are those of a robot batch; where one carries no packing, it is packed here."""

    def __init__(self, shape: ModelShape, ops: Ops) -> None:
        super().__init__()
        fields = shape.fields
        self.shape = shape
        self.ops = ops
        self.vision = Siglip(fields, ops)
        self.projector = nn.Linear(fields["vision_hidden"], fields["hidden"])
        self.embed = Embedding(fields["vocabulary"], fields["hidden"])
        self.actions = ActionEmbedding(fields)
        last = fields["layers"] - 1
        self.layers = nn.ModuleList(JointLayer(fields, ops, index == last) for index in range(fields["layers"]))
        self.modulation = nn.Linear(fields["expert_hidden"], 3 * fields["expert_hidden"])
        self.velocity = Velocity(fields["expert_hidden"], fields["action_size"])

    def forward(self, batch: Batch) -> Tensor:
        """The velocity [b,h,a] in float32 at x = time * noise + (1 - time) * actions."""
        packing = self._packing(batch)
        time = batch["time"][:, None, None]
        x = time * batch["noise"] + (1.0 - time) * batch["actions"]
        rows = self._rows(batch, packing)
        prefix = self._prefix(batch, packing)
        suffix, condition = self.actions(x, batch["time"], prefix.dtype)
        for layer in self.layers:
            prefix, suffix, _ = layer(prefix, suffix, condition, rows)
        return self._velocity(suffix, condition)

    def target(self, batch: Batch) -> Tensor:
        """What `forward` is trained to give: the velocity from actions to noise, [b,h,a]."""
        return batch["noise"] - batch["actions"]

    @torch.no_grad()
    def sample(self, batch: Batch, steps: int | None = None) -> Tensor:
        """Actions [b,h,a], from the batch's `noise` in `steps` Euler steps (the configuration's number by default).

        The prefix is computed once; each step costs the expert alone.
        """
        steps = steps or self.shape.fields["sampling_steps"]
        packing = self._packing(batch)
        rows = self._rows(batch, packing)
        prefix = self._prefix(batch, packing)
        memories: list[Memory] = []
        for layer in self.layers:
            prefix, _, memory = layer(prefix, None, None, rows)
            memories.append(memory)
        x = batch["noise"]
        for step in range(steps):
            time = torch.full_like(x[:, 0, 0], 1.0 - step / steps)
            suffix, condition = self.actions(x, time, prefix.dtype)
            for layer, memory in zip(self.layers, memories, strict=True):
                _, suffix, _ = layer(prefix, suffix, condition, rows, memory)
            x = x - self._velocity(suffix, condition) / steps
        return x

    # --------------------------------------------------------------------------------------------- the engine's view
    def units(self) -> list[nn.Module]:
        """Blocks in the order of execution, each of one dtype, none inside another."""
        return [*self.vision.layers, self.embed, self.actions, *self.layers, self.velocity]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def local_parameters(self) -> Iterator[LocalParameter]:
        """Every parameter with its role, which is its name without `.weight`, and `_bias` for `.bias`."""
        specs = {spec.role: spec for spec in self.shape.parameters}
        for name, parameter in self.named_parameters():
            role = name.removesuffix(".weight")
            role = f"{role.removesuffix('.bias')}_bias" if role.endswith(".bias") else role
            yield LocalParameter(specs[role], parameter)

    def packing(self, batch: Batch) -> dict[str, Tensor]:
        """What to add to a batch on the CPU (`loong_vla.packing.pack`), so that the device need not be waited for;
        nothing where it is there already."""
        if packing_of(batch) is not None:
            return {}
        return pack(batch, self.shape.fields["image_tokens"], skip_padding=self.shape.fields["skip_padding"])

    # ------------------------------------------------------------------------------------------------------- parts
    def _packing(self, batch: Batch) -> Packing:
        packing = packing_of(batch) or packing_of(self.packing(batch))
        assert packing is not None
        return packing

    def _prefix(self, batch: Batch, packing: Packing) -> Tensor:
        """The packed prefix [r, width]: of every sample the tokens of its cameras, then its prompt."""
        seen = self.projector(self.vision(looked_at(batch, packing.images))).flatten(0, 1)
        words = self.embed(batch["tokens"].flatten().index_select(0, packing.tokens))
        return permuted(torch.cat([seen, words]), packing.rows, packing.rows_back)

    def _rows(self, batch: Batch, packing: Packing) -> Rows:
        fields = self.shape.fields
        turn = {"size": fields["head_dim"], "base": fields["rope_base"]}
        prefix = batch["images"].shape[1] * fields["image_tokens"] + batch["tokens"].shape[1]
        suffix = batch["noise"].shape[1]
        return Rows(
            packing,
            angles(packing.positions, **turn),
            angles(packing.suffix_positions.flatten(), **turn),
            (prefix, suffix, prefix + suffix),
        )

    def _velocity(self, suffix: Tensor, condition: Tensor) -> Tensor:
        # The final norm is modulated as all others are; its gate has nothing to gate.
        epsilon = self.shape.fields["norm_epsilon"]
        normal, _, _ = adaptive_norm(suffix, self.modulation(condition), epsilon, self.ops)
        velocity: Tensor = self.velocity(normal)
        return velocity


class Embedding(nn.Module):
    """Token embeddings times sqrt(width), [t] -> [t, width]. Token 0 is padding: looking it up trains nothing."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocabulary, width))

    def forward(self, tokens: Tensor) -> Tensor:
        return functional.embedding(tokens, self.weight, padding_idx=0) * math.sqrt(self.weight.shape[1])


class ActionEmbedding(nn.Module):
    """x [b,h,a] and time [b] -> action tokens [b,h,e] and the condition of the expert's norms [b,e], in `dtype`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        width = fields["expert_hidden"]
        self.embed = nn.Linear(fields["action_size"], width)
        self.time_in = nn.Linear(width, width)
        self.time_out = nn.Linear(width, width)
        self.periods = fields["shortest_period"], fields["longest_period"]

    def forward(self, x: Tensor, time: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        waves = sinusoids(time, self.time_in.in_features, *self.periods).to(self.embed.weight.dtype)
        condition = functional.silu(self.time_out(functional.silu(self.time_in(waves))))
        return self.embed(x.to(self.embed.weight.dtype)).to(dtype), condition.to(dtype)


class Velocity(nn.Linear):
    """The expert's last hidden states [b,h,e] -> [b,h,a] in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden.to(self.weight.dtype)).float()


def sinusoids(time: Tensor, width: int, shortest: float, longest: float) -> Tensor:
    """time [b] -> [b, width] in float64: sines, then cosines, of periods in geometric progression."""
    steps = torch.linspace(0.0, 1.0, width // 2, dtype=torch.float64, device=time.device)
    phase = time.double()[:, None] * (2.0 * math.pi / (shortest * (longest / shortest) ** steps))
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def build(shape: ModelShape, context: BuildContext) -> list[Pi05]:
    """The policy, its parameters uninitialised on the run's device and the frozen ones without gradient."""
    with torch.device("meta"):
        model = Pi05(shape, context.ops).to(getattr(torch, context.precision.parameters))
        for name in FLOAT32:
            model.get_submodule(name).float()
    model.to_empty(device=context.device)
    for parameter in model.local_parameters():
        parameter.tensor.requires_grad_(not parameter.spec.frozen)
    return [model]
