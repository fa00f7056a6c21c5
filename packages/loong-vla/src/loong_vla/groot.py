"""The GR00T policy: a vision-language backbone that is usually frozen, and an action head trained by flow matching.

Autograd never enters what is frozen. What a step computes is worked out on the CPU beforehand (`groot_packing`): no
absent camera, no padding beyond a bucket, no head over words. Sources: GR00T N1 (arXiv 2503.14734), the published
N1.6 and N1.7 models, and the public implementation of N1.7 in LeRobot.

Shape legend: b samples, c cameras, y and x pixels, l rows of the prompt, h action steps, a action size, f width of the
backbone's features, n width of the action head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from loong_core.ops import Ops
from loong_core.parallel.build import BuildContext
from loong_core.train.engine import Batch, LocalParameter
from loong_core.types import ModelShape
from loong_vla.groot_backbone import Language, QwenTower, rotary_angles
from loong_vla.groot_eagle import EagleTower
from loong_vla.groot_head import Diffusion, Embodiments, Memory, Refiner, sinusoids
from loong_vla.groot_packing import Packing, pack, packing_of
from loong_vla.groot_parameters import fused, trained_layer
from loong_vla.images import looked_at

FROZEN = "frozen"
"""Key of a batch with rows [l,b,n] of the language model below its first trained layer (`Groot.frozen_part`)."""


class Groot(nn.Module):
    """The whole policy. Inputs are those of a robot batch; where one carries no packing, it is packed here.

    Parameters are registered by `build`, each at the path that is its role.
    """

    embed: Tensor
    positions: Tensor
    mask_token: Tensor

    def __init__(self, shape: ModelShape, ops: Ops) -> None:
        super().__init__()
        fields = shape.fields
        self.shape = shape
        self.vision = _tower(fields, ops)
        first = (
            0
            if _learns_to_see(fields)
            else next((layer for layer in range(fields["layers"]) if trained_layer(fields, layer)), fields["layers"])
        )
        self.llm = Language(fields, ops, first)
        self.refiner = Refiner(fields, ops)
        self.slots = Embodiments(fields["slots"], fields["embodiments"])
        self.dit = Diffusion(fields, ops)

    def forward(self, batch: Batch) -> Tensor:
        """The velocity [b,h,a] in float32 at x = (1 - time) * noise + time * actions."""
        packing = self._packing(batch)
        memories = self._observed(batch, packing)
        state = self._state(batch, packing)
        time = batch["time"][:, None, None]
        x = (1.0 - time) * batch["noise"] + time * batch["actions"]
        bucket = (batch["time"] * self.shape.fields["time_buckets"]).long()
        return self._velocity(x, bucket, state, memories, packing)

    def target(self, batch: Batch) -> Tensor:
        """What `forward` is trained to give: the velocity from noise to actions, [b,h,a]."""
        return batch["actions"] - batch["noise"]

    @torch.no_grad()
    def sample(self, batch: Batch, steps: int | None = None) -> Tensor:
        """Actions [b,h,a], from the batch's `noise` in `steps` Euler steps (the configuration's number by default).

        What the policy sees is computed once; each step costs the action head alone.
        """
        fields = self.shape.fields
        steps = steps or fields["sampling_steps"]
        packing = self._packing(batch)
        memories, state = self._observed(batch, packing), self._state(batch, packing)
        x = batch["noise"].float()
        for step in range(steps):
            bucket = int(step / steps * fields["time_buckets"])
            at = torch.full(x.shape[:1], bucket, device=x.device)
            x = x + self._velocity(x, at, state, memories, packing) / steps
        return x

    # --------------------------------------------------------------------------------------------- the engine's view
    def frozen_part(self) -> Callable[[Batch], dict[str, Tensor]] | None:
        """What `forward` computes of a batch before anything trained, to be added to it: an engine may do so while it
        trains on another batch. None where something of the tower or of the first layers is trained."""
        most = max(1, len(self.shape.fields["deepstack"]))
        return self._frozen if self.llm.first_trained >= most else None

    @torch.no_grad()
    def _frozen(self, batch: Batch) -> dict[str, Tensor]:
        packing = self._packing(batch)
        return {FROZEN: self.llm.frozen(*self._read(batch, packing, *self._places(packing)))}

    def units(self) -> list[nn.Module]:
        """Blocks in the order of execution, none inside another."""
        return [*self.vision.layers, *self.llm.layers, *self.refiner.layers, *self.dit.layers]

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def local_parameters(self) -> Iterator[LocalParameter]:
        """Every parameter with its role, which is its path; several roles may lie in one tensor (`fused`)."""
        specs = {spec.role: spec for spec in self.shape.parameters}
        owners = _owners(self.shape)
        for name, parameter in self.named_parameters():
            if name not in owners:
                yield LocalParameter(specs[name], parameter)
                continue
            begin = 0
            for role in owners[name]:
                spec = specs[role]
                view = parameter.detach()[begin : begin + spec.shape[0]]
                yield LocalParameter(spec, view, owner=parameter, offset=begin * parameter[0].numel())
                begin += spec.shape[0]

    def packing(self, batch: Batch) -> dict[str, Tensor]:
        """What to add to a batch on the CPU (`loong_vla.groot_packing.pack`), so that the device need not be waited
        for; nothing where it is there already."""
        return {} if packing_of(batch) is not None else pack(batch, self.shape.fields)

    # ------------------------------------------------------------------------------------------------------- parts
    def _packing(self, batch: Batch) -> Packing:
        packing = packing_of(batch) or packing_of(self.packing(batch))
        assert packing is not None
        return packing

    def features(self, batch: Batch, packing: Packing) -> Tensor:
        """What the backbone makes of images and prompt: [l,b,f]."""
        angles, real = self._places(packing)
        if FROZEN in batch:
            return self.llm.trained(batch[FROZEN], angles, real)
        return self.llm(*self._read(batch, packing, angles, real))  # type: ignore[no-any-return]

    def _read(
        self, batch: Batch, packing: Packing, angles: Tensor, real: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
        """What the language model gets: rows [l,b,n] of words and images, `angles`, `real`, and what DeepStack adds."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns_to_see(self.shape.fields)):
            seen, deep = self.vision(looked_at(batch, packing.cameras))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.llm.first_trained == 0):
            words = functional.embedding(batch["tokens"].t(), self.embed)
            x = torch.where(packing.is_image, _placed(seen, packing.seen), words)
            extra = [torch.where(packing.is_image, _placed(one, packing.seen), 0) for one in deep]
        return x, angles, real, extra

    def _places(self, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """How far the heads of every row turn, and which rows are no padding."""
        fields = self.shape.fields
        angles = rotary_angles(packing.positions, fields["head_dim"], fields["rope_base"], fields["rope_sections"])
        return angles, None if packing.real is None else packing.real.to(self.positions.dtype)

    def _observed(self, batch: Batch, packing: Packing) -> list[Memory]:
        features = self.features(batch, packing)
        samples = features.shape[1]
        rows = torch.cat((packing.text_rows, packing.image_rows), dim=1)
        rows = rows * samples + torch.arange(samples, device=features.device)[:, None]
        chosen = features.flatten(0, 1).index_select(0, rows.flatten())
        refined = self.refiner(chosen.unflatten(0, rows.shape), packing.keys)
        text, images = refined.split([packing.text_rows.shape[1], packing.image_rows.shape[1]], dim=1)
        return self.dit.remember(text, images, packing.text, packing.images)

    def _state(self, batch: Batch, packing: Packing) -> Tensor:
        """The state as a row of the action head, [b,1,n]; in training it is left out of some samples."""
        fields = self.shape.fields
        state = batch["state"].to(self.positions.dtype)[:, None]
        inner = functional.relu(self.slots.apply_layer("state_in", state, packing.slots))
        row = self.slots.apply_layer("state_out", inner, packing.slots)
        if not (self.training and fields["state_dropout"]):
            return row
        left_out = torch.rand(row.shape[0], 1, 1, device=row.device) < fields["state_dropout"]
        return torch.where(left_out, self.mask_token if fields["mask_token"] else 0, row)

    def _velocity(self, x: Tensor, bucket: Tensor, state: Tensor, memories: list[Memory], packing: Packing) -> Tensor:
        """x [b,h,a] at time bucket [b] -> [b,h,a] in float32."""
        slots, horizon = self.slots, x.shape[1]
        actions = slots.apply_layer("action_in", x.to(state.dtype), packing.slots)
        time = sinusoids(bucket, actions.shape[-1], actions.dtype).expand(-1, horizon, -1)
        inner = functional.silu(slots.apply_layer("action_time", torch.cat((actions, time), -1), packing.slots))
        actions = slots.apply_layer("action_out", inner, packing.slots) + self.positions[:horizon]
        rows = self.dit(torch.cat((state, actions), dim=1), memories, bucket)[:, 1:]
        inner = functional.relu(slots.apply_layer("decoder_in", rows, packing.slots))
        return slots.apply_layer("decoder_out", inner, packing.slots).float()


def _tower(fields: Mapping[str, Any], ops: Ops) -> QwenTower | EagleTower:
    return QwenTower(fields, ops) if fields["tower"] == "qwen3_vl" else EagleTower(fields, ops)


def _learns_to_see(fields: Mapping[str, Any]) -> bool:
    """Whether anything is trained that images pass before the language model."""
    return bool(fields["tune_visual"])


def _placed(tokens: Tensor, places: Tensor) -> Tensor:
    """Rows of images [i,t,f] at places [l,b] of the prompt: [l,b,f]."""
    return tokens.flatten(0, 1)[places]


def _owners(shape: ModelShape) -> dict[str, list[str]]:
    """Tensor -> roles that lie in it, weights and biases."""
    joined = fused(shape.fields)
    return {
        f"{name}{end}": [f"{role}{end}" for role in roles] for name, roles in joined.items() for end in ("", "_bias")
    }


def build(shape: ModelShape, context: BuildContext) -> list[Groot]:
    """The policy, its parameters uninitialised on the run's device and the frozen ones without gradient."""
    model = Groot(shape, context.ops)
    dtype = getattr(torch, context.precision.parameters)
    specs = {spec.role: spec for spec in shape.parameters}
    owners = _owners(shape)
    joined = {role for roles in owners.values() for role in roles}
    shapes = {role: (spec.shape, spec.frozen) for role, spec in specs.items() if role not in joined}
    for name, roles in owners.items():
        parts = [specs[role] for role in roles]
        if parts:
            rows = sum(spec.shape[0] for spec in parts)
            shapes[name] = ((rows, *parts[0].shape[1:]), parts[0].frozen)
    for path, (extents, frozen) in shapes.items():
        owner, _, name = path.rpartition(".")
        empty = torch.empty(extents, dtype=dtype, device=context.device)
        model.get_submodule(owner).register_parameter(name, nn.Parameter(empty, requires_grad=not frozen))
    return [model]
