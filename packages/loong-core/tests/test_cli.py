"""The command line: exit codes, JSON, plain errors, and a start that imports no tensor library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loong_core import cli

HEAVY = ("torch", "numpy", "transformers", "megatron", "pydantic", "rich", "yaml")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "vocab_size": 300, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128, "hidden_act": "silu", "tie_word_embeddings": True, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "LOONG_PLUGINS", "LOONG_PLUGIN_FILES", "LOONG_DEBUG"):
        monkeypatch.delenv(name, raising=False)


def recipe() -> str:
    model = {"family": "qwen3", "config": CONFIG}
    Path("r.json").write_text(json.dumps({"model": model, "data": {"path": "absent", "seq_len": 64}}))
    return "r.json"


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loong_core", *words],
        capture_output=True, text=True, env={**os.environ, **variables}, timeout=120, check=False,
    )  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    code = (
        f"import sys; from loong_core import cli; cli.run(['--help']); print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_planning_imports_no_tensor_library() -> None:
    pytest.importorskip("loong_llm", reason="needs a real model family")
    code = f"import sys; from loong_core import cli; cli.run(['plan', {recipe()!r}]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == "False"


COMMANDS = ["train", "plan", "doctor", "plugins", "models", "recipes", "schema", "data inspect", "new model"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*command.split(), "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Example" in text and text.count(f"loong {command}") >= 2
    if command in ("train", "plan"):
        assert "[overrides]" in text


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train"], "Missing argument"),
        (["doctor", "--jsno"], "--json"),
        (["plan", "absent.yaml"], "error: The recipe absent.yaml does not exist."),
        (["recipes", "no_such_recipe"], "error: There is no recipe 'no_such_recipe'"),
        (["schema", "--out", "no/such/file"], "error: no/such/file cannot be written"),
    ],
)
def test_wrong_words_are_exit_code_2(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(words) == 2
    captured = capsys.readouterr()
    assert part in captured.err and "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize("command", ["plugins", "models", "recipes", "doctor", "schema"])
def test_json_is_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run([command] if command == "schema" else [command, "--json"])
    found = json.loads(capsys.readouterr().out)
    if command == "doctor":
        assert code == (1 if found["problems"] else 0) and found["backends"]["cpu"]["devices"] == 1
    else:
        assert code == 0 and (found or command == "recipes")


def test_plan_as_json_and_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("loong_llm", reason="needs a real model family")
    words = [recipe(), "parallel.pp=2", "parallel.tp=2", "launch.nodes=2", "launch.devices=4", "backend=cuda"]
    assert cli.run(["plan", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world"], found["pp"], found["tp"], found["dp"], found["stages"]) == (8, 2, 2, 2, [[0, 1], [2, 3]])
    assert found["cluster"]["backend"] == "cuda" and found["ops"]["attention"]["reason"]
    assert found["recipe"]["parallel"]["sp"] is True and found["flops_per_step"] > 0
    assert len(found["parameters_per_rank"]) == 2 and found["memory"]["total"] > 0
    assert cli.run(["plan", *words]) == 0
    text = capsys.readouterr().out
    for part in ("2 x 4 cuda", "tp 2 with sequence parallelism, pp 2", "0-1", "2-3", "attention", "parallel.sp = true"):
        assert part in text


@pytest.mark.parametrize(("tp", "queues"), [(1, None), (2, "1")])
def test_workers_get_the_environment_of_the_plan(tp: int, queues: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("loong_llm", reason="needs a real model family")
    from loong_core import launch
    from loong_core.backends import cpu
    from loong_core.cli import train

    found: list[dict[str, str]] = []

    def noted(command: list[str], variables: dict[str, str], escalate: bool) -> int:
        found.append(variables)
        return 0

    monkeypatch.setattr(launch, "_supervise", noted)
    monkeypatch.setattr(train, "_prepare_data", lambda *_: 0)
    monkeypatch.delitem(
        cpu.ENVIRONMENT, "CUDA_DEVICE_MAX_CONNECTIONS"
    )  # the backend's own; here the plan's is looked for
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    Path("absent").write_text('{"text": "hello"}\n')
    words = [recipe(), "data.tokenizer={train: 300}", "launch.devices=2", f"parallel.tp={tp}", "backend=cpu"]
    assert cli.run(["train", *words]) == 0
    assert found[0].get("CUDA_DEVICE_MAX_CONNECTIONS") == queues


def test_a_plan_needs_config_json_only(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("loong_llm", reason="needs a real model family")
    Path("hf").mkdir()
    Path("r.json").write_text(json.dumps({"model": {"weights": "hf"}, "data": {"seq_len": 64}}))
    assert cli.run(["plan", "r.json"]) == 2 and "config.json" in capsys.readouterr().err
    Path("hf/config.json").write_text("{")
    assert cli.run(["plan", "r.json"]) == 2 and "not valid JSON" in capsys.readouterr().err
    Path("hf/config.json").write_text(json.dumps(CONFIG))
    assert cli.run(["plan", "r.json"]) == 0
    assert "`loong train` will refuse" in capsys.readouterr().out
    Path("hf/config.json").unlink()
    Path("hf").rmdir()
    assert cli.run(["plan", "r.json"]) == 2 and "hf does not exist" in capsys.readouterr().err


def test_a_resolved_recipe_resolves_to_itself(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("loong_llm", reason="needs a real model family")
    assert cli.run(["plan", recipe(), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["recipe"]
    assert "auto" not in [first["parallel"][name] for name in first["parallel"]] + [first["backend"]]
    Path("again.json").write_text(json.dumps(first))
    assert cli.run(["plan", "again.json", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == first


BROKEN = """
from loong_core import hookimpl
@hookimpl
def loong_backend():
    return []
"""


def test_a_broken_plugin_stops_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("broken_one.py").write_text(BROKEN)
    monkeypatch.setenv("LOONG_PLUGIN_FILES", "broken_one.py")
    assert cli.run(["plugins", "--json"]) == 0
    found = {item["name"]: item for item in json.loads(capsys.readouterr().out)["plugins"]}
    assert found["core"]["error"] is None and "cpu" in found["core"]["provides"]["backends"]
    assert "Did you mean loong_backends?" in found["broken_one"]["error"]
    assert cli.run(["plugins"]) == 0 and "broken_one" in capsys.readouterr().out
    assert cli.run(["doctor"]) == 1 and "plugin broken_one" in capsys.readouterr().out
    assert cli.run(["recipes", "nothing"]) == 2 and "broken_one" in capsys.readouterr().err


def test_two_owners_of_one_name_are_reported_not_raised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("second_cpu.py").write_text(
        "from loong_core import hookimpl\nfrom loong_core.backends.cpu import BACKEND\n"
        "@hookimpl\ndef loong_backends():\n    return [BACKEND]\n"
    )
    monkeypatch.setenv("LOONG_PLUGIN_FILES", "second_cpu.py")
    assert cli.run(["plugins", "--json"]) == 0
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "'core'" in problem and "'second_cpu'" in problem
    assert cli.run(["plan", recipe()]) == 2
    assert "second_cpu" in capsys.readouterr().err


def test_a_fault_of_ours_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("loong_core.recipe_load.shipped", fail)
    assert cli.run(["recipes"]) == 1
    error = capsys.readouterr().err
    assert "loong itself failed: ZeroDivisionError: oops" in error and "Traceback" not in error
    monkeypatch.setenv("LOONG_DEBUG", "1")
    assert cli.run(["recipes"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_pipes_narrow_consoles_and_ascii() -> None:
    Path("größe.yaml").write_text("# Größe\nrun: {nme: ü}\n", encoding="utf-8")
    result = shell("plan", "größe.yaml", PYTHONIOENCODING="ascii", COLUMNS="20", NO_COLOR="1", TERM="dumb")
    assert result.returncode == 2 and "gr??e.yaml:2: `run.nme`" in result.stderr and "\x1b" not in result.stderr
    closed = subprocess.Popen(
        [sys.executable, "-m", "loong_core", "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert closed.stdout is not None and closed.stderr is not None
    closed.stdout.close()
    assert b"Traceback" not in closed.stderr.read()
    closed.stderr.close()
    closed.wait(timeout=60)


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    from loong_core.plugins import core_version

    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"loong-core {core_version()}"
