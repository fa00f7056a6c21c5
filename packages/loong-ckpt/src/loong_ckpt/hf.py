"""Hugging Face folders, in and out: every rank reads and writes only what its own parameters need.

Loading decides from names and shapes which tensors make which parameter, then streams one parameter at a time.
Saving lays out the files beforehand (`export.py`), so that every rank writes its tensors straight into place.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from loong_ckpt import files, ranks
from loong_ckpt.export import SHARD_BYTES, ExportPlan, TensorWriter, plan_export, torch_dtype
from loong_ckpt.hf_folder import CONFIG, SINGLE, HFFolder, check, claims, listed, open_folder
from loong_ckpt.mapping import Assignment, assign
from loong_ckpt.read import Reader
from loong_ckpt.source import companions, source_of
from loong_core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from loong_core.train.engine import Engine
    from loong_core.train.run import Run
    from loong_core.types import ParameterSpec

__all__ = ["check", "claims", "load", "save"]


# ------------------------------------------------------------------------------------------------ loading
def load(path: Path, run: Run, engine: Engine) -> None:
    """Fill the engine's parameters from the folder. Collective.

    Each tensor is converted to its parameter's dtype. A model whose head is its embedding may come with a stored head
    if that equals the embedding byte by byte. Raises `CheckpointError` on every rank if a parameter has no tensors, a
    tensor no parameter (or two), or if shapes, dtypes or files are wrong.
    """

    def fill() -> None:
        folder = open_folder(path)
        found = assign(run.shape, run.family.weights, folder.tensors, path)
        _fill(folder, found, run, engine)

    ranks.together(fill, run)
    _require_complete(run, engine, path)
    engine.weights_changed()


def _fill(folder: HFFolder, found: Assignment, run: Run, engine: Engine) -> None:
    import torch

    with Reader(folder, run.shape.fields) as reader, torch.no_grad():
        if run.rank == 0:
            _require_equal_copies(reader, found, folder.path)
        for parameter in engine.parameters():
            spec = parameter.spec
            rank, size = ranks.tensor_cut(spec, run.plan, run.rank)
            row = found.rows[spec.role]
            stored = torch_dtype(folder.tensors[row.hf[0]].dtype)
            # Master weights take what a float32 checkpoint holds beyond the parameters' precision.
            dtype = torch.float32 if stored == torch.float32 else parameter.tensor.dtype
            part = reader.part(spec, row, rank, size, dtype)
            assert part.shape == parameter.tensor.shape, (spec.role, part.shape, parameter.tensor.shape)
            parameter.assign(part)


def _require_equal_copies(reader: Reader, found: Assignment, path: Path) -> None:
    for copy, original in found.copies.items():
        if not reader.same(copy, original):
            raise CheckpointError(
                f"{path}: config.json says that {copy} is {original} (tie_word_embeddings), but the stored tensors "
                f"differ. Set model.config: {{tie_word_embeddings: false}} to train them apart, or remove {copy}."
            )


def _require_complete(run: Run, engine: Engine, path: Path) -> None:
    """Every parameter of the shape was filled on at least one rank."""
    counts = ranks.role_counts([parameter.spec.role for parameter in engine.parameters()], run)
    unset = [role for role, count in counts.items() if not count]
    if unset:
        raise CheckpointError(f"{path}: no rank holds these parameters, so they were not loaded: {listed(unset)}.")


# ------------------------------------------------------------------------------------------------- saving
def save(path: Path, run: Run, engine: Engine, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a folder that plain transformers opens. Collective.

    Names, layout (experts one by one or in one tensor) and dtypes of tensors are those of the checkpoint the run
    started from; after random initialisation the family's first names and the run's parameter dtype. Files are at most
    `shard_bytes` large unless one tensor is larger. The result does not depend on the parallel layout. An existing
    export at `path` is replaced once the new one is complete; any other non-empty folder is refused.
    """
    final = Path(path)
    temporary = files.staging(final)
    with files.explained("The export", final):
        source = source_of(run)
        plan = plan_export(run, source, shard_bytes)

    def begin() -> None:
        with files.explained("The export", final):
            _require_replaceable(final)
            files.recover(final)
            files.fresh(temporary)
            for name, content in companions(run, source).items():
                (temporary / name).write_bytes(content)
            plan.create(temporary)
            if plan.unused and source is not None and claims(source.folder):
                plan.fill_unused(temporary, open_folder(source.folder))

    ranks.together(begin, run, only_main=True)
    _write_tensors(temporary, plan, run, engine, final)

    def finish() -> None:
        with files.explained("The export", final):
            files.sync_tree(temporary)
            files.commit(temporary, final)

    ranks.together(finish, run, only_main=True)


def _write_tensors(temporary: Path, plan: ExportPlan, run: Run, engine: Engine, final: Path) -> None:
    """Write this rank's share. A rank that fails goes on gathering, because the others wait for its parts."""
    order = {spec.role: position for position, spec in enumerate(run.shape.parameters)}
    problem: BaseException | None = None
    written: list[str] = []
    with TensorWriter(temporary, plan, run.shape.fields) as writer:
        for parameter in sorted(engine.parameters(), key=lambda parameter: order[parameter.spec.role]):
            full = engine.gather(parameter)
            if full is None:
                continue
            written.append(parameter.spec.role)
            if problem is None:
                problem = ranks.attempt(partial(_put, writer, parameter.spec, full, final))
        if problem is None:
            problem = ranks.attempt(lambda: _flush(writer, final))
    ranks.agree(problem, run)
    counts = ranks.role_counts(written, run)
    if wrong := [role for role, count in counts.items() if count != 1]:
        raise CheckpointError(
            f"{final}: not exported, because these parameters were not written exactly once: {listed(wrong)}."
        )


def _put(writer: TensorWriter, spec: ParameterSpec, full: Tensor, final: Path) -> None:
    with files.explained("The export", final):
        writer.put(spec, full)


def _flush(writer: TensorWriter, final: Path) -> None:
    with files.explained("The export", final):
        writer.flush()


def _require_replaceable(final: Path) -> None:
    """Only an earlier export, or an empty folder, may be replaced."""
    if not final.exists():
        return
    if not final.is_dir():
        raise CheckpointError(f"{final} is a file; an export needs a folder name. Choose another output.")
    exported = (final / CONFIG).is_file() and any(final.glob(f"{SINGLE.partition('.')[0]}*.safetensors"))
    if any(final.iterdir()) and not exported:
        raise CheckpointError(f"{final} holds something else than an export; it is left alone. Choose another output.")
