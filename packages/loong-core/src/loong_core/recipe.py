"""The recipe: every key a user may set, with its type, default and meaning. Reading and merging is `recipe_load.py`.

`None` for a key of type `X | Auto` never occurs; `"auto"` does until `planner.plan` and the registry resolved it.
A resolved recipe (no `base`, no `auto`) is itself a valid recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

Auto = Literal["auto"]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Unknown keys are errors; values are not coerced from text that means something else."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunSection(Section):
    name: str = "run"
    """Name of the run folder."""
    dir: Path = Path("runs")
    """Folder that holds run folders."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, sample order and dropout."""
    steps: PositiveInt = 1000
    """Number of optimizer steps of the whole run."""
    deterministic: bool = False
    """Use deterministic kernels only."""


class ModelSection(Section):
    family: str | None = None
    """Model family; may be omitted when a config.json names an architecture that a family claims."""
    weights: Path | None = None
    """Hugging Face folder, or native checkpoint, to start from. null: random weights."""
    config: str | dict[str, Any] | None = None
    """For random weights: a config.json, a folder that holds one, a preset of the family, or its keys in place.
    With `weights`: keys (a mapping) that replace those of the folder's config.json."""
    freeze: list[str] = []
    """Patterns (fnmatch) of roles that are not trained."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on attention probabilities and on both residual branches."""


class TaskSection(Section):
    name: str | None = None
    """Task; null takes the family's own."""
    options: dict[str, Any] = {}
    """Settings of the task."""


class EvalSection(Section):
    path: Path | list[Path] | None = None
    """Held-out data of the same source; null takes `fraction` of the training data away."""
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of samples that is held out when `path` is null."""
    every: PositiveInt | None = None
    """Evaluate every so many steps; null: only at the end."""
    batches: PositiveInt = 8
    """Global batches per evaluation."""


class TrainTokenizer(Section):
    train: Annotated[int, Field(ge=260)]
    """Vocabulary size of a byte-level BPE tokenizer that is trained on the data at the start."""


class DataSection(Section):
    source: str = "jsonl"
    """Data source: text, jsonl, parquet, or a plugin's."""
    path: Path | list[Path] | None = None
    """Files or folders."""
    tokenizer: Path | TrainTokenizer | None = None
    """Tokenizer folder; null takes the one of `model.weights`; `{train: 4096}` trains one."""
    seq_len: PositiveInt = 2048
    """Tokens per row of a batch."""
    pack: bool = True
    """Put several samples in one row, without attention between them. false: one sample per row, padded."""
    balance: bool = True
    """Within each global batch, move samples between packed rows so that attention costs every rank the same."""
    shuffle: bool = True
    """Shuffle samples, anew in every epoch. false: file order."""
    global_batch: PositiveInt = 8
    """Rows per optimizer step, over all ranks."""
    micro_batch: PositiveInt = 1
    """Rows per forward pass of one data-parallel replica."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used: stop and name it, or leave it out and count it."""
    eval: EvalSection | None = None
    """Held-out evaluation."""
    cache: Path | None = None
    """Folder of tokenised data; null: `.cache` in `run.dir`."""
    options: dict[str, Any] = {}
    """Settings of the source."""


class ParallelSection(Section):
    planner: str = "auto"
    """Planner, which also builds the engine."""
    tp: PositiveInt | Auto = 1
    """Tensor parallel degree."""
    sp: bool | Auto = "auto"
    """Sequence parallelism (auto: on where tp > 1)."""
    pp: PositiveInt | Auto = 1
    """Pipeline parallel degree."""
    vpp: PositiveInt | None = None
    """Virtual pipeline chunks per stage."""
    layout: list[int] | None = None
    """Layers of each stage, first chunk of all stages first; null: as even as possible."""
    cp: PositiveInt | Auto = 1
    """Context parallel degree."""
    ep: PositiveInt | Auto = 1
    """Expert parallel degree."""
    etp: PositiveInt | None = None
    """Tensor parallel degree inside experts; null: tp for dense models, 1 with experts."""
    recompute: Literal["none", "selective", "full"] | Auto = "auto"
    """Activation recomputation: selective gathers other ranks' tokens for experts again instead of keeping them, full
    computes whole layers again (auto: none where the memory estimate fits, else selective, else full)."""
    components: dict[str, Any] = {}
    """Layouts of single components of a composed model."""
    options: dict[str, Any] = {}
    """Settings of the planner."""


class OptimSection(Section):
    name: Literal["adamw"] = "adamw"
    """Optimizer."""
    lr: NonNegative = 1e-5
    """Peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay; not applied to biases and norms."""
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """Shape of the learning rate after warm-up."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the schedule."""


class CheckpointSection(Section):
    every: PositiveInt | None = 500
    """Save every so many steps, and at the end; null: no native checkpoints."""
    keep: PositiveInt | None = 3
    """Checkpoints to keep; null: all."""
    async_: bool = Field(default=True, alias="async")
    """Write in the background."""
    resume: Literal["auto", "never"] | Path = "auto"
    """auto: continue the run folder's newest complete checkpoint; never; or a checkpoint folder."""
    export: Literal["hf"] | None = "hf"
    """Export at the end, to `hf/` in the run folder."""


class LogSection(Section):
    every: PositiveInt = 1
    """Report to the console every so many steps; metrics.jsonl holds every step."""
    to: list[str] = ["console", "jsonl"]
    """Where to report: console, jsonl, tensorboard."""
    profile: PositiveInt | None = None
    """Profile this step: a table of its work and a trace, in `logs/` of the run folder; null: none."""


class LaunchSection(Section):
    devices: PositiveInt | Auto = "auto"
    """Workers on this machine (auto: every accelerator; 1 on the cpu backend)."""
    nodes: PositiveInt = 1
    """Machines."""
    rendezvous: str | None = None
    """host:port of the first machine, for several machines."""


class Recipe(Section):
    """A whole run."""

    base: str | None = None
    """Recipe to start from: `package:name`, or a file next to this one. One level only."""
    run: RunSection = RunSection()
    """Identity and length."""
    model: ModelSection = ModelSection()
    """What is trained."""
    task: TaskSection = TaskSection()
    """What is minimised."""
    data: DataSection = DataSection()
    """On what."""
    parallel: ParallelSection = ParallelSection()
    """Over how many devices, and how."""
    precision: str = "bf16"
    """Precision policy."""
    ops: dict[str, str] = {}
    """Op -> implementation; omitted ops take the best that runs here."""
    backend: str = "auto"
    """Hardware backend."""
    optim: OptimSection = OptimSection()
    """Optimizer and learning rate."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Saving, resuming, exporting."""
    log: LogSection = LogSection()
    """Reporting."""
    launch: LaunchSection = LaunchSection()
    """Processes."""
