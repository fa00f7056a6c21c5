"""Wrong input, tried as a new user would: each case ends before anything starts, with exit code 2, and says what is
wrong, where, what is allowed and what to do."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from loong_core import cli

pytest.importorskip("loong_llm", reason="these cases need real model families")
pytest.importorskip("loong_ckpt", reason="these cases need a real checkpoint format")

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "vocab_size": 300,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": True,
    "attention_bias": False, "rope_theta": 10000.0,
}  # fmt: skip
RECIPE: dict[str, Any] = {
    "run": {"name": "demo", "dir": "runs", "steps": 2},
    "model": {"family": "qwen3", "config": CONFIG},
    "data": {"source": "jsonl", "path": "data.jsonl", "tokenizer": {"train": 300}, "seq_len": 64},
    "precision": "fp32",
}

Train = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Train:
    """Run `loong train r.yaml ...` in an empty folder; nothing may be started. Returns exit code and problems."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "LOONG_PLUGINS", "LOONG_PLUGIN_FILES", "LOONG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    started: list[str] = []
    monkeypatch.setattr("loong_core.cli.train._prepare_data", lambda *_: started.append("data") or 1)
    Path("data.jsonl").write_text('{"text": "hello"}\n{"text": "world"}\n')

    def run(*words: str, recipe: Any = None, allow_start: bool = False) -> tuple[int, list[str]]:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(recipe or RECIPE, sort_keys=False)
        Path("r.yaml").write_text(text)
        code = cli.run(["train", "r.yaml", *words])
        assert bool(started) == allow_start
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, [
            re.sub(r"^(error: |  \d+\. )", "", line) for line in error.splitlines() if "problems:" not in line
        ]

    return run


def changed(*path: str, value: Any = None, drop: bool = False) -> dict[str, Any]:
    """The recipe with one key set or dropped."""
    recipe = json.loads(json.dumps(RECIPE))
    part = recipe
    for name in path[:-1]:
        part = part.setdefault(name, {})
    if drop:
        part.pop(path[-1])
    else:
        part[path[-1]] = value
    return dict(recipe)


def line_of(key: str) -> str:
    """`r.yaml:<line>` of a key as `train` writes the recipe."""
    return rf"r\.yaml:\d+: .*{re.escape(key)}"


def test_the_recipe_itself_is_right(train: Train) -> None:
    assert train(allow_start=True)[0] == 1  # the data step, replaced above, was reached and failed
    assert not Path("runs/demo").exists()  # and nothing was left behind that would block the next try


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (("rnu",), {}, ["unknown key", "`run`", "Allowed: backend"]),
        (("optim", "lrr"), 1, ["unknown key", "`lr`", "Allowed: betas"]),
        (("data", "eval", "evry"), 1, ["unknown key", "`every`", "Allowed: batches"]),
        (("data", "options", "renam"), {}, ["unknown key", "`rename`"]),
        (("parallel", "options", "overlapp"), True, ["unknown key", "`overlap`"]),
        (("run", "steps"), "many", ["'many' is not allowed", "Allowed: a whole number >= 1"]),
        (("optim", "betas"), 3, ["3 is not allowed", "a list of 2 items"]),
        (("data", "path"), {"a": 1}, ["not allowed", "a path"]),
        (("model", "family"), "qwen_3", ["'qwen_3'", "Did you mean 'qwen3'", "Installed: ", "llama, "]),
        (("parallel", "planner"), "megatrn", ["'megatrn'", "Did you mean 'megatron'", "Installed: megatron"]),
        (("precision",), "fp33", ["'fp33'", "Installed: bf16, bf16_gradients, fp32"]),
        (("backend",), "cpuu", ["'cpuu'", "Did you mean 'cpu'", "Installed: cpu, cuda"]),
        (("task", "name"), "pretran", ["'pretran'", "Did you mean 'pretrain'", "Installed:"]),
        (("data", "source"), "jsnl", ["'jsnl'", "Did you mean 'jsonl'", "Installed:"]),
        (("ops", "atention"), "torch", ["unknown key", "`attention`"]),
        (("ops", "attention"), "torhc", ["'torhc'", "Did you mean 'torch'", "Installed:"]),
        (("log", "to"), ["consol"], ["consol", "console", "jsonl"]),
        (("parallel", "tp"), 4, ["4", "6 attention heads", "allowed here"]),
        (("model", "freeze"), ["no.such.*"], ["no.such.*", "embed"]),
        (("model", "config"), "qwen3-0.7b", ["qwen3-0.7b", "Did you mean", "qwen3-0.6b"]),
        (("model", "config"), {**CONFIG, "hidden_act": "gelu"}, ["hidden_act"]),
        (("data", "tokenizer", "train"), 400, ["400", "vocabulary of 300", "Allowed: 260 to 300"]),
        (("run", "name"), "a/b", ["'a/b'", "run.dir"]),
        (("run", "name"), "..", ["'..'", "Allowed"]),
    ],
)
def test_one_wrong_key(train: Train, path: tuple[str, ...], value: Any, parts: Sequence[str]) -> None:
    code, problems = train(recipe=changed(*path, value=value))
    assert code == 2
    hits = [text for text in problems if re.match(line_of(path[-1]), text)]
    assert any(all(part in text for part in parts) for text in hits), problems


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["parallel.tp=2", "parallel.pp=2", "launch.devices=3"], ["does not divide", "3"]),
        (
            ["parallel.cp=2", "launch.devices=2", "data.seq_len=66"],
            ["data.seq_len = 66", "allowed here multiples of 4"],
        ),
        (["parallel.ep=2", "launch.devices=2"], ["parallel.ep", "expert"]),
        (["parallel.pp=5", "launch.devices=5", "data.global_batch=10"], ["2 layers"]),
        (["data.global_batch=3", "launch.devices=2"], ["data.global_batch = 3"]),
        (["launch.nodes=2"], ["launch.rendezvous"]),
        (["backend=cuda"], ["'cuda' finds no device", "Available here: cpu", "loong doctor"]),
        (["run.steps"], ["Write key=value"]),
        (["log.profile=3"], ["`log.profile`", "ends with step 2"]),
        (["--optim.lr=1"], ["without dashes"]),
    ],
)
def test_wrong_overrides(train: Train, words: list[str], parts: Sequence[str]) -> None:
    if "backend=cuda" in words:
        from loong_core.backends.cuda import probe

        if probe().devices:
            pytest.skip("this machine has a CUDA device, so asking for one is right")
    code, problems = train(*words)
    assert code == 2
    assert any(all(part in text for part in parts) for text in problems), problems
    assert any("override '" in text for text in problems)


def header(tensors: dict[str, int]) -> bytes:
    """A safetensors file of F32 vectors."""
    entries, at = {}, 0
    for name, extent in tensors.items():
        entries[name] = {"dtype": "F32", "shape": [extent], "data_offsets": [at, at + 4 * extent]}
        at += 4 * extent
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({"config.json": None}, ["config.json", "Give the folder"]),
        ({"config.json": b"{broken"}, ["config.json is not valid JSON"]),
        ({"config.json": b"[1]"}, ["config.json", "object"]),
        (
            {"config.json": {**CONFIG, "architectures": ["NoSuchForCausalLM"]}},
            ["NoSuchForCausalLM", "Qwen3ForCausalLM"],
        ),
        ({"model.safetensors": header({"a": 3})[:-1]}, ["model.safetensors", "truncated"]),
        ({"model.safetensors": header({"a": 3}) + b"x"}, ["model.safetensors", "more than"]),
        ({"model.safetensors": b"\x10"}, ["model.safetensors", "too few"]),
        ({"model.safetensors": b"\xff" * 64}, ["model.safetensors", "header"]),
        (
            {"model.safetensors": None, INDEX: {"weight_map": {"a": "model-00002-of-00002.safetensors"}}},
            ["model-00002-of-00002.safetensors", "absent"],
        ),
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, ["pytorch_model.bin", "pickle", "save_pretrained"]),
        ({"model.safetensors": None, "config.json": None, "m.pt": b"x"}, ["m.pt", "pickle", "save_pretrained"]),
        ({"model.safetensors": None}, ["no weights", "model.safetensors"]),
    ],
)
def test_weights_folders(train: Train, files: dict[str, Any], parts: Sequence[str]) -> None:
    Path("hf").mkdir()
    for name, content in {"config.json": CONFIG, "model.safetensors": header({"a": 3}), **files}.items():
        if content is not None:
            (Path("hf") / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    recipe = {**RECIPE, "model": {"weights": "hf"}}
    code, problems = train(recipe=recipe)
    assert code == 2
    assert any(all(part in text for part in parts) and text.startswith("r.yaml:") for text in problems), problems
    assert not any("model.config" in text and "neither" in text for text in problems), problems


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({"weights": "hff"}, ["hff does not exist", "Give the folder"]),
        ({"weights": "Qwen/Qwen3-8B"}, ["Qwen/Qwen3-8B does not exist", "download it first"]),
        ({"weights": "w.bin"}, ["w.bin is a file", "pickle", "save_pretrained"]),
        ({"family": "qwen3"}, ["neither weights nor a config", "model.weights", "qwen3-0.6b"]),
        ({}, ["neither weights nor a config", "model.config"]),
        ({"config": {"hidden_size": 3}}, ["architectures", "model.family"]),
        ({"config": {**CONFIG, "architectures": ["LlamaForCausalLM"]}, "family": "qwen3"}, ["belongs to llama"]),
        ({"config": "data.jsonl"}, ["data.jsonl is not"]),
    ],
)
def test_models(train: Train, model: dict[str, Any], parts: Sequence[str]) -> None:
    Path("w.bin").write_bytes(b"x")
    code, problems = train(recipe={**RECIPE, "model": model})
    assert code == 2
    assert any(all(part in text for part in parts) and text.startswith("r.yaml:") for text in problems), problems


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["d.jsonl", "does not exist"]),
        ("", ["d.jsonl", "empty"]),
        ('{"prompt": 1}\n', ["d.jsonl", "prompt", "`text`"]),
        ("hello\n", ["d.jsonl", "JSON"]),
        ("folder", ["d.jsonl", "no file"]),
    ],
)
@pytest.mark.parametrize("key", ["path", "eval"])
def test_data_files(train: Train, content: str | None, parts: Sequence[str], key: str) -> None:
    if content == "folder":
        Path("d.jsonl").mkdir()
    elif content is not None:
        Path("d.jsonl").write_text(content)
    name = "data.path" if key == "path" else "data.eval.path"
    code, problems = train(recipe=changed("data", *name.split(".")[1:], value="d.jsonl"))
    assert code == 2
    assert any(all(part in text for part in parts) for text in problems), problems
    assert any(text.startswith("r.yaml:") and f"Set {name}" in text for text in problems), problems


def test_no_data_path(train: Train) -> None:
    code, problems = train(recipe=changed("data", "path", drop=True))
    assert code == 2 and any("data.path" in text and text.startswith("r.yaml:") for text in problems), problems


@pytest.mark.parametrize("folder", ["data.jsonl", "data.jsonl/deeper", "/proc/loong"])
def test_an_output_folder_that_cannot_be_written(train: Train, folder: str) -> None:
    code, problems = train(recipe=changed("run", "dir", value=folder))
    assert code == 2
    assert any(re.match(line_of("run.dir"), text) and "Choose another run.dir" in text for text in problems), problems


def hold_the_run() -> Path:
    """Leave the run folder as a start of `RECIPE` does."""
    from loong_core import recipe_load, registry, validate

    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    plugins = registry.open_registry()
    resolved = validate.prepare(recipe_load.load("r.yaml", [], plugins), plugins).recipe
    folder = Path("runs/demo")
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_load.dump(resolved))
    return folder


def test_the_same_run_continues_with_other_steps_and_learning_rate(train: Train) -> None:
    folder = hold_the_run()
    assert train("optim.lr=1", "run.steps=9", "log.every=2", allow_start=True)[0] == 1
    assert (folder / "recipe.yaml").is_file()  # a folder that was there is not taken back


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["model.config.num_hidden_layers=3"],
            ["holds another run", "model.config.num_hidden_layers (2 there, 3 now)"],
        ),
        (["data.seq_len=32", "precision=bf16"], ["data.seq_len", "precision", "Choose another run.name"]),
        (["run.seed=5", "checkpoint.resume=never"], ["run.seed (0 there, 5 now)"]),
        (["checkpoint.resume=never"], ["holds this run already", "checkpoint.resume=auto"]),
    ],
)
def test_a_run_folder_is_not_taken_over(train: Train, words: list[str], parts: Sequence[str]) -> None:
    hold_the_run()
    code, problems = train(*words)
    assert code == 2 and len(problems) == 1
    assert all(part in problems[0] for part in parts), problems


@pytest.mark.parametrize(
    ("saved", "parts"),
    [
        ({**CONFIG, "num_hidden_layers": 1}, ["is of another model", "layers (1 there, 2 here)"]),
        ({**CONFIG, "rope_theta": 77.0}, ["is of another model", "rope"]),
        ({**CONFIG, "architectures": ["Qwen3MoeForCausalLM"]}, ["is of another model: qwen3_moe there, qwen3 here"]),
        ({**CONFIG, "architectures": ["Qwen2ForCausalLM"]}, ["qwen2 there, qwen3 here", "model.weights"]),
        ({**CONFIG, "hidden_size": "x"}, ["is of another model"]),
        (None, ["config.json"]),
    ],
)
def test_a_checkpoint_of_another_model_is_not_continued(
    train: Train, saved: dict[str, Any] | None, parts: Sequence[str]
) -> None:
    folder = Path("elsewhere/step-00000003")
    folder.mkdir(parents=True)
    if saved is not None:
        (folder / "config.json").write_text(json.dumps(saved))
    code, problems = train(f"checkpoint.resume={folder}")
    assert code == 2 and len(problems) == 1, problems
    assert "checkpoint.resume" in problems[0] and all(part in problems[0] for part in parts), problems


def test_a_checkpoint_of_the_same_model_is(train: Train) -> None:
    folder = Path("elsewhere/step-00000003")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "dtype": "float32", "eos_token_id": 0}))
    assert train(f"checkpoint.resume={folder}", allow_start=True)[0] == 1
    assert train("checkpoint.resume=nowhere", allow_start=True)[0] == 2


def test_a_folder_of_other_files(train: Train) -> None:
    Path("runs/demo").mkdir(parents=True)
    Path("runs/demo/thesis.tex").write_text("x")
    code, problems = train()
    assert code == 2 and "holds files that are no run" in problems[0] and "run.name" in problems[0]


def test_all_problems_are_reported_together(train: Train) -> None:
    recipe = """
run: {name: demo, dir: data.jsonl, stepz: 3}
model:
  family: qwen3
  config: {num_hidden_layers: 2, hidden_size: 48, num_attention_heads: 6, num_key_value_heads: 2, head_dim: 8,
           intermediate_size: 64, vocab_size: 300, rms_norm_eps: 1e-6, max_position_embeddings: 99, rope_theta: 1e4}
data: {path: absent.jsonl, seq_len: 64, tokenizer: {train: 300}}
task: {name: sff}
parallel: {tp: 4, planner: megatrn}
precision: fp61
backend: cqu
optim: {lr: fast}
ops: {attention: fastest}
"""
    code, problems = train("launch.devices=4", recipe=recipe)
    assert code == 2
    places = ["r.yaml:2", "r.yaml:2", "r.yaml:7", "r.yaml:8", "r.yaml:9", "r.yaml:9", "r.yaml:10", "r.yaml:11",
              "r.yaml:12", "r.yaml:13"]  # fmt: skip
    for place in places:
        assert any(text.startswith(f"{place}:") for text in problems), (place, problems)
    assert sum(text.startswith("r.yaml:2:") for text in problems) == 2
    assert sum(text.startswith("r.yaml:9:") for text in problems) >= 2


def test_a_misspelt_key_does_not_cause_a_second_complaint(train: Train) -> None:
    recipe = {**RECIPE, "model": {"wieghts": "hf"}}
    code, problems = train(recipe=recipe)
    assert code == 2 and len(problems) == 1 and "Did you mean `weights`" in problems[0], problems


def test_after_bad_rows_the_corrected_data_is_not_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The real data step: it trains a tokenizer into the run folder before it meets the bad row."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "LOONG_PLUGINS", "LOONG_PLUGIN_FILES", "LOONG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    launched: list[Path] = []
    monkeypatch.setattr("loong_core.launch.launch", lambda path, *_: launched.append(path) or 0)
    Path("r.yaml").write_text(yaml.safe_dump(RECIPE))
    Path("data.jsonl").write_text('{"text": "hello"}\n{"text": 5}\n')
    assert cli.run(["train", "r.yaml"]) == 2
    assert "data.jsonl:2" in capfd.readouterr().err
    assert not Path("runs/demo").exists() and not launched
    Path("data.jsonl").write_text('{"text": "hello"}\n{"text": "world"}\n')
    assert cli.run(["train", "r.yaml"]) == 0
    assert launched == [tmp_path / "runs" / "demo" / "recipe.yaml"]
