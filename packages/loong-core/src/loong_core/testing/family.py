"""The contract of a model family: config, tensors, logits and every gradient are those of the public implementation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from loong_core.errors import UserError
from loong_core.plugins import load
from loong_core.registry import Registry, resolve
from loong_core.testing import tiny
from loong_core.testing.contract import Contract
from loong_core.testing.ranks import run_ranks
from loong_core.weights import WeightMap, shard, unshard, verb_of

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.types import ModelFamily, ModelShape

TENSOR_PARALLEL = (1, 2, 4)
SPLIT_TOLERANCE = 5e-5
"""Relative difference of the loss between one rank and two."""


class FamilyContract(Contract):
    """Set `family` and a tiny `config`: keys of a transformers configuration, `model_type` among them. The sizes must
    let two ranks share heads and key-value heads.

    Override `reference` where transformers knows no such `model_type`. `tolerance` is relative: for logits and loss
    as they are, for gradients per parameter (norm of the difference / norm).
    """

    required: ClassVar[tuple[str, ...]] = ("family", "config")
    family: ClassVar[str]
    config: ClassVar[Mapping[str, Any]]
    tolerance: ClassVar[float] = 1e-4

    @classmethod
    def reference(cls) -> Any:
        """The public model with random weights, a `torch.nn.Module` with `config` and `save_pretrained`."""
        import transformers

        config = transformers.AutoConfig.for_model(**cls.config)
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    @classmethod
    def reopen(cls, folder: Path) -> tuple[Any, Mapping[str, Any]]:
        """The public model from an exported folder, and what was missing or unexpected in it."""
        import transformers

        options = {"attn_implementation": "eager", "local_files_only": True, "output_loading_info": True}
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
        return model, info

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """`hf/`: a checkpoint that the public implementation wrote; `facts.json` and tensors it computed from it."""
        folder = tmp_path_factory.mktemp(cls.family)
        run_ranks(1, _write_reference, cls, folder, megatron=False)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def measured(cls, folder: Path) -> Any:
        """What loong makes of that checkpoint."""
        return run_ranks(1, _measure, cls, folder)[0]

    def test_config_is_read(self, folder: Path) -> None:
        """The shape has the layers, width, vocabulary and number of parameters of the public model."""
        facts, shape = _facts(folder), _shape(self.family, _config(folder))
        found = {
            "layers": shape.layers,
            "hidden": shape.hidden,
            "vocabulary": shape.vocabulary,
            "parameters": sum(spec.size for spec in shape.parameters),
        }
        assert found == {name: facts[name] for name in found}
        roles = [spec.role for spec in shape.parameters]
        assert len(set(roles)) == len(roles), "a role is described twice"
        assert all(divisor.value > 0 for divisor in shape.divisors)

    def test_missing_key_is_named(self, folder: Path) -> None:
        """A config.json without its sizes is an error of the user that names a missing key."""
        family, config = _family(self.family), _config(folder)
        path = family.from_hf["layers"].removesuffix("?").split("|")[0]
        config.pop(path.split(".")[0])
        with pytest.raises(UserError, match=path):
            resolve(family.describe)(family, config)

    def test_every_tensor_is_used_once(self, folder: Path) -> None:
        """Each tensor of the checkpoint makes exactly one parameter, and each parameter is made."""
        names = set(_facts(folder)["tensors"])
        shape, weights = _shape(self.family, _config(folder)), WeightMap(_family(self.family).weights)
        used: dict[str, list[str]] = {}
        for spec in shape.parameters:
            row = next((row for row in weights.candidates(spec) if names.issuperset(row.hf)), None)
            assert row is not None, f"no row of the family makes {spec.role} from the checkpoint's tensors"
            for name in row.hf:
                used.setdefault(name, []).append(spec.role if row.verb != "stack" else row.verb)
        twice = {name: roles for name, roles in used.items() if len(roles) > 1 and set(roles) != {"stack"}}
        assert not twice, f"tensors used twice: {twice}"
        unused = sorted(name for name in names - set(used) if not weights.is_dropped(name))
        assert not unused, f"tensors that no row uses: {unused}"

    def test_packing_is_exact(self, measured: Any) -> None:
        """Tensors -> parameter -> shards on 1, 2 and 4 ranks -> parameter -> tensors: the same bytes."""
        assert not measured["packing"], "\n".join(measured["packing"])

    def test_built_parameters_are_those_described(self, measured: Any) -> None:
        """The built model has the described roles and shapes, no more and no fewer."""
        assert measured["built"] == measured["described"]

    def test_logits(self, measured: Any) -> None:
        """The same logits from the same weights and tokens."""
        assert measured["logits"] <= self.tolerance, f"relative difference {measured['logits']:.1e}"

    def test_loss(self, measured: Any, folder: Path) -> None:
        """The same mean loss, auxiliary losses included."""
        assert measured["loss"] == pytest.approx(_facts(folder)["loss"], rel=self.tolerance)

    def test_gradients(self, measured: Any) -> None:
        """The same gradient of every parameter."""
        wrong = {role: f"{value:.1e}" for role, value in measured["gradients"].items() if not value <= self.tolerance}
        assert not wrong, f"relative differences above {self.tolerance}: {wrong}"

    def test_export_is_byte_equal(self, measured: Any) -> None:
        """What was loaded and is saved has the same tensors, the same bytes and the same config.json."""
        assert not measured["export"], "\n".join(measured["export"])

    def test_export_opens_in_the_public_implementation(self, measured: Any) -> None:
        """Nothing is missing or unexpected, and the logits are those of the original."""
        assert not measured["reopened"], "\n".join(measured["reopened"])

    def test_two_ranks_agree(self, folder: Path, measured: Any) -> None:
        """The loss under tensor parallelism 2 is that of one process."""
        recipe = _recipe(type(self), folder, parallel={"tp": 2})
        for loss in run_ranks(2, _loss, recipe, folder):
            assert loss == pytest.approx(measured["loss"], rel=SPLIT_TOLERANCE)


# ------------------------------------------------------------------------------------------------------- facts
def _family(name: str) -> ModelFamily:
    family: ModelFamily = Registry(load()).get("model_families", name)
    return family


def _shape(name: str, config: Mapping[str, Any]) -> ModelShape:
    family = _family(name)
    shape: ModelShape = resolve(family.describe)(family, config)
    return shape


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "hf" / "config.json").read_text())
    return config


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())
    return facts


def _recipe(suite: type[FamilyContract], folder: Path, **changes: Any) -> dict[str, Any]:
    model = {"config": None, "weights": str(folder / "hf")}
    data = {"micro_batch": tiny.GLOBAL_BATCH}
    return tiny.settings(suite.family, {}, model=model, data=data, **changes)


# ------------------------------------------------------------------------------------------- in the public model
def _write_reference(rank: int, suite: type[FamilyContract], folder: Path) -> None:
    """Random weights everywhere: ones in norms and zeros in biases would hide a missing one."""
    import torch
    from safetensors.torch import save_file

    model = suite.reference().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.ndim == 1))
    model.save_pretrained(folder / "hf")
    path = folder / "hf" / "config.json"
    config = json.loads(path.read_text())
    if claimed := _family(suite.family).hf_architectures:
        config["architectures"] = [claimed[0]]
    path.write_text(json.dumps(config, indent=2))

    batch = _batch(config)
    output = model(batch["tokens"], use_cache=False)
    loss = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), batch["targets"].flatten())
    if output.get("aux_loss") is not None:
        loss = loss + model.config.router_aux_loss_coef * output.aux_loss
    loss.backward()
    tensors = {f"gradient {name}": parameter.grad for name, parameter in model.named_parameters()}
    save_file({"logits": output.logits.detach(), **tensors}, folder / "reference.safetensors")
    facts = {
        "layers": model.config.num_hidden_layers,
        "hidden": model.config.hidden_size,
        "vocabulary": model.config.vocab_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "loss": loss.item(),
        "tensors": sorted(_tensors(folder / "hf")),
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _batch(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """One micro-batch; it depends on the config.json alone. Targets are random, one in five is not counted.

    No token is the padding token: no text contains it, and public embeddings give it no gradient.
    """
    import torch

    vocabulary, padding = config["vocab_size"], config.get("pad_token_id")
    generator = torch.Generator().manual_seed(5)
    shape = (tiny.GLOBAL_BATCH, tiny.SEQ_LEN)
    counted = torch.rand(shape, generator=generator) > 0.2
    tokens = torch.randint(0, vocabulary, shape, generator=generator)
    return {
        "tokens": tokens if padding is None else torch.where(tokens == padding, (padding + 1) % vocabulary, tokens),
        "targets": torch.where(counted, torch.randint(0, vocabulary, shape, generator=generator), -100),
        "positions": torch.arange(tiny.SEQ_LEN).expand(shape).contiguous(),
    }


# ---------------------------------------------------------------------------------------------------- in loong
def _loss(rank: int, recipe: Mapping[str, Any], folder: Path) -> float:
    run, engine = tiny.start(recipe, folder)
    return engine.forward_backward([_batch(run.config)], 0)["loss"]


def _measure(rank: int, suite: type[FamilyContract], folder: Path) -> dict[str, Any]:
    import torch
    from safetensors.torch import load_file

    run, engine = tiny.start(_recipe(suite, folder), folder)
    reference, batch = load_file(folder / "reference.safetensors"), _batch(run.config)
    with torch.no_grad():
        model: Any = engine.modules[0].eval()
        inputs = {name: tensor for name, tensor in batch.items() if name != "targets"}
        logits = model(inputs)[..., : run.shape.vocabulary]
        model.auxiliary_losses()  # read, as the engine does after every forward
    loss = engine.forward_backward([batch], 0)["loss"]
    gradients = {name.removeprefix("gradient "): tensor for name, tensor in reference.items() if " " in name}
    return {
        "packing": _packing_problems(run.family, run.shape, _tensors(folder / "hf")),
        "built": {p.spec.role: list(p.tensor.shape) for p in engine.parameters()},
        "described": {spec.role: list(spec.shape) for spec in run.shape.parameters},
        "logits": float((logits - reference["logits"]).abs().max() / reference["logits"].abs().max()),
        "loss": loss,
        "gradients": _gradient_errors(run, engine, gradients),
        "export": _export_problems(run, engine, folder),
        "reopened": _reopen_problems(suite, folder, reference["logits"], batch),
    }


def _packed(family: ModelFamily, shape: ModelShape, spec: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, Tensor]:
    """(the row that makes a parameter, the parameter in full)."""
    row = next(row for row in WeightMap(family.weights).candidates(spec) if all(name in tensors for name in row.hf))
    parts = [tensors[name][spec.expert] if row.verb == "stack" else tensors[name] for name in row.hf]
    return row, verb_of(row).pack(parts, shape.fields)


def _packing_problems(family: ModelFamily, shape: ModelShape, tensors: Mapping[str, Tensor]) -> list[str]:
    import torch

    problems = []
    for spec in shape.parameters:
        row, full = _packed(family, shape, spec, tensors)
        if tuple(full.shape) != spec.shape:
            problems.append(f"{spec.role}: packed to {tuple(full.shape)}, described as {spec.shape}")
            continue
        for size in TENSOR_PARALLEL:
            if spec.axis is not None and not spec.padded and spec.shape[spec.axis] % (size * spec.blocks):
                continue
            shards = [shard(full, rank, size, spec.axis, spec.blocks, spec.padded) for rank in range(size)]
            extent = spec.shape[spec.axis] if spec.padded and spec.axis is not None else None
            if not torch.equal(unshard(shards, spec.axis, spec.blocks, extent), full):
                problems.append(f"{spec.role}: cut for {size} ranks and put together again, it differs")
        for name, part in zip(row.hf, verb_of(row).unpack(full, shape.fields), strict=True):
            original = tensors[name][spec.expert] if row.verb == "stack" else tensors[name]
            if not torch.equal(part, original):
                problems.append(f"{spec.role}: unpacked, {name} differs")
    return problems


def _gradient_errors(run: Any, engine: Any, gradients: Mapping[str, Tensor]) -> dict[str, float]:
    found = {}
    for parameter in engine.parameters():
        spec = parameter.spec
        exact = _packed(run.family, run.shape, spec, gradients)[1]
        # An engine may leave the division by the number of tokens to its optimizer.
        gradient = parameter.gradient * getattr(engine, "gradient_scale", 1.0)
        own = unshard([gradient], spec.axis, spec.blocks, spec.shape[spec.axis] if spec.padded else None)
        found[spec.role] = float((own - exact).norm() / exact.norm().clamp(min=1e-8))
    return found


def _export_problems(run: Any, engine: Any, folder: Path) -> list[str]:
    import torch

    from loong_core.train.start import format_of

    exporter = format_of(folder / "hf", run.registry)
    if exporter.save is None:
        return [f"the checkpoint format {exporter.name} cannot save"]
    resolve(exporter.save)(folder / "export", run, engine)
    before, after = _tensors(folder / "hf"), _tensors(folder / "export")
    problems = [f"{name} is in one of the two only" for name in sorted(set(before) ^ set(after))]
    for name in sorted(set(before) & set(after)):
        one, two = before[name], after[name]
        if (
            one.dtype != two.dtype
            or one.shape != two.shape
            or not torch.equal(one.view(torch.uint8), two.view(torch.uint8))
        ):
            problems.append(f"{name} differs")
    if (folder / "hf" / "config.json").read_bytes() != (folder / "export" / "config.json").read_bytes():
        problems.append("config.json differs")
    return problems


def _reopen_problems(
    suite: type[FamilyContract], folder: Path, logits: Tensor, batch: Mapping[str, Tensor]
) -> list[str]:
    import torch

    model, info = suite.reopen(folder / "export")
    problems = [f"{what}: {sorted(map(str, names))}" for what, names in info.items() if names]
    with torch.no_grad():
        found = model.float().eval()(batch["tokens"], use_cache=False).logits
    if not torch.allclose(found, logits, rtol=0, atol=1e-5):
        problems.append(f"its logits differ by up to {float((found - logits).abs().max()):.1e}")
    return problems
