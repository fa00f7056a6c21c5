"""The descriptors that cross the plugin boundary: frozen, named, and free of any tensor library.

A plugin author reads this file and `hookspecs.py`. A descriptor says *what* exists and *where* its code lives
(`Ref`, a `"package.module:attribute"` string); the code behind a reference is imported only when a run needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

Ref = str
"""`"package.module:attribute"`, resolved by `loong_core.registry.resolve`."""


# ---------------------------------------------------------------------------------------------------- models
@dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of a Hugging Face mapping: a native role, the HF tensors it is made of, and the verb between them.

    `*` in a name stands for the layer index, `#` for the expert index. `extents` are names of the shape's fields that
    the verb needs, or numbers. Rows are written with the functions of `loong_core.weights` (`copy`, `qkv`, `gate_up`,
    ...), never by hand.
    """

    role: str
    hf: tuple[str, ...]
    verb: str = "copy"
    extents: tuple[str | int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ModelFamily:
    """A model family as data: how its `config.json` is read and how its tensors are laid out.

    `describe(family, config) -> ModelShape` is pure Python and runs on a laptop. `builder(shape, context) -> list of
    modules` runs in a worker. `from_hf` maps loong's field names to dotted paths of the HF `config.json`; `a|b` tries
    both, a trailing `?` marks an optional field. `arch` holds what the family fixes, and defaults of optional fields.
    `presets` are folders-free model sizes: recorded facts of public `config.json` files. `planner` is what
    `parallel.planner: auto` takes for the family (None: what the plugins choose). `sidecars(run, files) -> files` has
    the last word on the files of an exported folder that are not weights: name -> content, config.json among them.
    `single_file`: its public loaders read one model.safetensors and no index, whatever its size. A key of `config.json`
    in its place: so they do where the key is, and elsewhere they read numbered files with an index, even a single one.
    """

    name: str
    hf_architectures: tuple[str, ...]
    describe: Ref
    builder: Ref
    arch: Mapping[str, Any]
    from_hf: Mapping[str, str]
    weights: tuple[Weight, ...]
    task: str = "pretrain"
    presets: Ref | None = None
    planner: str | None = None
    sidecars: Ref | None = None
    single_file: bool | str = False
    summary: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterSpec:
    """One full (unsharded) parameter: its role, its shape, and how parallelism may cut it.

    `axis` is the tensor axis that tensor parallelism cuts (None: replicated); the axis consists of `blocks` equal
    parts that are cut separately (gate and up of a fused SwiGLU input are two blocks). `padded` parameters may be
    grown along `axis` so that the cut is even (vocabularies). `place` says which pipeline stage owns it. A `frozen`
    one is never trained: its builder makes it without gradient, and it takes neither master weight nor moments.
    """

    role: str
    shape: tuple[int, ...]
    axis: int | None = None
    blocks: int = 1
    place: Literal["first", "layer", "last"] = "layer"
    layer: int | None = None
    expert: int | None = None
    padded: bool = False
    init: Literal["normal", "ones", "zeros"] = "normal"
    frozen: bool = False

    @property
    def size(self) -> int:
        """Number of elements of the full parameter."""
        result = 1
        for extent in self.shape:
            result *= extent
        return result


class Divisor(NamedTuple):
    """A divisibility rule a plan must keep: parallel degree `degree` divides `value` (`what` in words)."""

    degree: str
    value: int
    what: str


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a planner must know of a model, without building it.

    `fields` are the family's resolved settings (`hidden`, `heads`, ...). `active_parameters` counts matmul weights a
    token passes (no embedding lookup); `attention_width` is the sum over layers of heads x head size. Activation
    elements are per token and layer: `sharded` ones are divided by tensor parallelism, `replicated` ones only with
    sequence parallelism. `experts_per_token` are those chosen in a layer with experts. `vocabulary` is 0 for models
    without one.
    """

    family: str
    fields: Mapping[str, Any]
    layers: int
    hidden: int
    parameters: tuple[ParameterSpec, ...]
    divisors: tuple[Divisor, ...] = ()
    vocabulary: int = 0
    tied_embeddings: bool = False
    active_parameters: int = 0
    attention_width: int = 0
    activation_sharded: float = 0.0
    activation_replicated: float = 0.0
    experts_per_token: int = 0

    def train_flops(self, tokens: float, context: float) -> float:
        """FLOPs of forward and backward over `tokens` tokens in causal samples of `context` tokens.

        A multiplication and an addition are two. Per token that is 6 for every weight of a matrix product it passes,
        and for attention 6 x width x context: the scores and the sum of values, of which the causal half counts.
        Norms, activations and look-ups are left out. Where samples differ in length, `context` is the length of the
        average token's sample, sum(length^2) / sum(length). Source of the counts: Narayanan et al., 2021, appendix
        (arXiv 2104.04473).
        """
        return tokens * (6.0 * self.active_parameters + 6.0 * self.attention_width * context)

    def recomputed_flops(self, tokens: float, context: float, recompute: str) -> float:
        """FLOPs that `parallel.recompute` adds to `train_flops`: the forward pass of every layer with `full`, nothing
        with `selective`. Embedding and head are never computed again."""
        if recompute != "full":
            return 0.0
        weights = self.active_parameters - self.hidden * self.vocabulary
        return tokens * (2.0 * weights + 2.0 * self.attention_width * context)


# ------------------------------------------------------------------------------------------ tasks and data
class Row(NamedTuple):
    """One record of a data source with the place it came from (`line` counts from 1; 0 = whole file)."""

    fields: Mapping[str, Any]
    file: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one training example is and what is minimised.

    `encoder(recipe) -> callable(Row) -> list of samples`, a sample being a dict of equally long integer arrays
    (`tokens`, and `targets` already shifted, -100 = not counted); tasks on the batches of a source with a `stream` have
    none. `loss(output, batch, context) -> LossSum` runs on the ranks that hold the model's output. `options` is a
    pydantic model. `evaluate(run, engine, data) -> dict of numbers` is called on every rank where an evaluation is due,
    after the held-out loss; what it returns is reported beside `eval_loss`. `generate` is the function behind `loong
    generate` for models of the task, a command as typer takes them whose first argument is the model's folder. `counts`
    is what the loss is a mean over, in words.
    """

    name: str
    encoder: Ref | None = None
    loss: Ref
    options: Ref | None = None
    evaluate: Ref | None = None
    generate: Ref | None = None
    counts: str = "tokens"
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where rows come from, or whole batches.

    `reader(path, options) -> Iterator[Row]`; `check(path, options) -> list of problems` looks at the files without a
    tensor library and without reading all of them. `path` is `data.path` as given: a path, a list of them, or None. A
    reader may yield a `loong_core.data.rows.BadRow` for a record it cannot read. `remedy` is what to do about files
    that `check` finds wrong. `files(path, options) -> list of Path` names the files read (None: every file below
    `path`); the cache of tokenised data is valid as long as they do not change.

    A source of anything but rows of text has a `stream(run, replica) -> loong_core.train.batches.Batches` instead of a
    reader: it makes the batches of data-parallel rank `replica` itself, and nothing is tokenised ahead. Two more
    functions run without a tensor library. `fit(recipe, shape, config) -> list of problems` compares the data with what
    the model expects (its `ModelShape` and config.json), in the parent. `report(path, options, thorough, picture) ->
    dict` is what `loong data inspect` shows, or with `thorough`, which reads everything, `loong data check`: a JSON
    object of `facts` (pairs of name and text), `tables` (each with `columns` and `rows` of texts), `problems` (texts),
    and more that only --json prints; `picture` is where a PNG of the data is wanted, or None.

    `claims(path) -> bool` recognises the source's own data, for commands that are given a bare path.
    """

    name: str
    reader: Ref | None = None
    check: Ref
    files: Ref | None = None
    options: Ref | None = None
    stream: Ref | None = None
    fit: Ref | None = None
    report: Ref | None = None
    claims: Ref | None = None
    remedy: str = ""
    summary: str = ""


# ------------------------------------------------------------------------------------ hardware and numerics
class Probe(NamedTuple):
    """What a backend found: number of devices, bytes of memory of one device, its name, and the reason for zero."""

    devices: int
    memory: int = 0
    device_name: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A kind of hardware.

    `probe() -> Probe` runs in the parent process, never raises and imports no tensor library. `setup(local_rank)
    -> str` runs first in every worker, before anything of megatron-core is imported, and returns the torch device.
    `env` is applied by the launcher; a variable the user set wins. `layer_provider` names a class that satisfies
    megatron-core's `BackendSpecProvider`. `peak_flops(device_name, dtype) -> float` is per device, 0 = unknown.
    A higher `priority` wins `backend: auto`.
    """

    name: str
    device_type: str
    collective: str
    probe: Ref
    setup: Ref
    layer_provider: Ref
    peak_flops: Ref | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    capabilities: frozenset[str] = frozenset()
    priority: int = 0
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class PrecisionPolicy:
    """Number formats of a run. Names are torch dtype names; `needs` are backend capabilities."""

    name: str
    parameters: str
    activations: str
    gradients: str = "float32"
    master: str = "float32"
    optimizer_state: str = "float32"
    matmul: str = "same"
    needs: frozenset[str] = frozenset()
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class OpImpl:
    """One implementation of an op declared in `loong_core.op_declarations`.

    `target` is a plain function with the op's signature. `supports(request) -> None or a reason why not` sees an
    `OpRequest`. Among the ones that can run, the highest `rank` is chosen; equal ranks are an error.
    """

    op: str
    name: str
    target: Ref
    backends: frozenset[str] | None = None
    needs: frozenset[str] = frozenset()
    supports: Ref | None = None
    rank: int = 0


class OpRequest(NamedTuple):
    """What an op implementation is asked to serve: the backend, the run's activation dtype, the plan's degrees, and the
    model's settings (`ModelShape.fields`, and the run's `dropout` among them)."""

    backend: str
    dtype: str
    degrees: Mapping[str, int]
    fields: Mapping[str, Any]


# -------------------------------------------------------------------------------------------- parallelism
@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machines of a run as the launcher sees them. `memory` is bytes per device (0 = unknown)."""

    nodes: int = 1
    devices_per_node: int = 1
    memory: int = 0
    device_name: str = ""
    backend: str = "cpu"
    capabilities: frozenset[str] = frozenset()
    peak_flops: float = 0.0

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.nodes * self.devices_per_node


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """A resolved parallel layout: no `auto` is left. `stages[i]` are the global layer indices of pipeline stage
    `i % pp` in virtual chunk `i // pp`. Estimates are per rank, the largest of all ranks. `env` is what the layout asks
    of the workers' environment: the launcher applies it over that of the backend; a variable the user set wins."""

    planner: str
    world: int
    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1
    dp: int = 1
    stages: tuple[tuple[int, ...], ...] = ((),)
    micro_batch: int = 1
    micro_batches: int = 1
    recompute: Literal["none", "selective", "full"] = "none"
    parameters: int = 0
    parameters_per_rank: tuple[int, ...] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    flops_per_step: float = 0.0
    reasons: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ParallelPlanner:
    """`plan(shape, recipe, cluster, precision) -> ParallelPlan` is pure and raises `RecipeError` with every problem;
    `build(run) -> Engine` runs in a worker (see `loong_core.train.engine`)."""

    name: str
    plan: Ref
    build: Ref
    options: Ref | None = None
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """`load(path, run, engine)` and `save(path, run, engine)` are collective: every rank calls them. Loading before the
    engine has an optimizer brings in weights alone. `check(path) -> list of problems` runs in the parent.
    `claims(path) -> bool` recognises a folder.

    A format that can resume runs has a `store(run)`, which keeps the checkpoints of `run.folder / "checkpoints"`:
    `newest() -> Path | None` (complete and undamaged), `save(engine, state)`, `load(path, engine) -> state` and
    `close()` (everything durable; raises what went wrong in the background). `state` is a JSON object with `step`.
    """

    name: str
    claims: Ref
    check: Ref
    load: Ref
    save: Ref | None = None
    store: Ref | None = None
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class RecipeFolder:
    """A folder of `*.yaml` recipes; `name` is the prefix in `base: <name>:<recipe>`."""

    name: str
    path: Path


RowReader = Callable[[Path, Any], Iterator[Row]]
"""The signature behind `DataSource.reader`."""
