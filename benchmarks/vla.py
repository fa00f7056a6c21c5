"""Runs rows of the robot benchmark: loong's recipe as a user starts it, then LeRobot, on the same batches from the same
weights. `vla_pi05.py` and `vla_groot.py` name the rows; benchmarks/README.md says what makes the sides comparable.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from qwen3_moe import Failed, _version, call, device, relative, revision
from report import REACHED, SETTLED
from vla_report import PEER, Side, compare, outcome, side, table
from vla_rows import (
    CONSTANT,
    CURVES,
    PEER_SETTINGS,
    SEED,
    TINY_BACKBONE,
    TINY_GROOT,
    TINY_PI05,
    TINY_SIZES,
    Row,
)

HERE = Path(__file__).resolve().parent
LIBRARIES = ("torch", "triton", "transformers", "av", "loong-core", "loong-vla", "loong-ops")
STATE, ACTION = 8, 7
TIMING = (
    "loong: step_seconds of metrics.jsonl, wall time of a whole step with its data. LeRobot: CUDA events around a "
    "whole step whose batch lies on the device before, processed (host clock on a CPU). Medians of the timed steps. "
    "first_step_seconds: from the start of the program (loong: start-up as it reports it; LeRobot: without imports) to "
    "the end of the first step, compiling included. Memory: the most that torch had allocated during the timed steps."
)


def main(rows: Mapping[str, Row], description: str | None) -> int:
    """Run the rows of the command line; 1 where a side failed other than by being out of memory."""
    options = parse(rows, description)
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.work or Path(tempfile.mkdtemp(prefix="loong-benchmark-"))
    began, results, failed = time.time(), [], False
    for name in options.rows:
        if options.stop_after and time.time() - began > options.stop_after:
            print(f"{name}: not started, {options.stop_after:.0f} s are over", flush=True)
            continue
        try:
            results.append(run(rows[name], options, work, f"{began:.0f}"))
        except Failed as error:
            print(f"{name}: its data could not be made: {error}", flush=True)
            failed = True
    if options.work is None:
        shutil.rmtree(work, ignore_errors=True)
    print(table(results))
    sides = [side for found in results for side in (found.get("loong"), *found.get(PEER, {}).values())]
    wrong = [side for side in sides if side and "error" in side and "out of memory" not in side["error"].lower()]
    return int(failed or bool(wrong))


def run(row: Row, options: argparse.Namespace, work: Path, run_id: str) -> dict[str, Any]:
    """Both sides of one row; the row's result is in its file after each of them."""
    began, folder = time.perf_counter(), work / row.name
    for old in ("runs", "tokenizer"):
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    job = prepare(row, options, work, folder)
    result = describe(row, options, folder, job)
    path = options.out / f"{row.name}.json"
    result |= kept(path, result, options.only)
    say(row, f"data ready after {time.perf_counter() - began:.0f} s, floor {result['work']['floor_ms_790']:.1f} ms")
    names = ["loong"] if options.only != PEER else []
    names += [] if options.only == "loong" or options.world > 1 else [n for n in row.peers if n in options.settings]
    with ThreadPoolExecutor(max(1, len(names) if options.side_by_side else 1)) as pool:
        running = {
            name: pool.submit(measured, row, name, options, folder, job, result["work"], number % 2)
            for number, name in enumerate(names)
        }
        for name, future in running.items():
            side = future.result() | {"run": run_id, "commit": revision(options)}
            if name == "loong":
                result["loong"] = side
            else:
                result.setdefault(PEER, {})[name] = side
            result["comparison"] = compare(result, row)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            say(row, f"{name} {outcome(side)}, {side['seconds']:.0f} s in all")
    return result


def measured(
    row: Row,
    name: str,
    options: argparse.Namespace,
    folder: Path,
    job: Mapping[str, Any],
    work: Mapping[str, Any],
    number: int,
) -> Side:
    """One side, on a device of its own where both run at the same time; what went wrong instead, if something did."""
    began = time.perf_counter()
    where = {"CUDA_VISIBLE_DEVICES": str(number)} if options.side_by_side else {}
    try:
        if name == "loong":
            found = loong(row, options, folder, work, where)
        else:
            found = lerobot(row, name, options, folder, job, work, where)
    except Failed as error:
        found = {"error": relative(str(error), folder)}
    return found | {"seconds": time.perf_counter() - began, "beside_the_other": options.side_by_side}


# ------------------------------------------------------------------------------------------------- a row's work
def prepare(row: Row, options: argparse.Namespace, work: Path, folder: Path) -> dict[str, Any]:
    """Weights, dataset, recipe and batches of a row; returns the job that made them."""
    steps = options.steps + options.warmup if row.name != CURVES else options.curve_steps
    size = TINY_SIZES[row.family] if options.tiny else row.size
    config, backbone = _config(row, options)
    kind = "tiny" if options.tiny else "full"
    # In bfloat16 every weight would begin in the middle of what rounds to it, and small updates would for long change
    # nothing that loong computes with.
    dtype = "float32" if options.precision == "fp32" or row.name == CURVES else "bfloat16"
    weights = {"folder": str(work / f"weights-{row.family}-{kind}-{dtype}"), "family": row.family, "config": config}
    weights |= {"dtype": dtype, "backbone": backbone}
    # No frame is needed twice: decoding must not profit from what it has seen.
    needed = steps * row.batch_of(options.tiny) * options.world
    room = row.frames - config.get("action_horizon", 0)
    episodes = max(2, -(-needed // room))
    dataset = {
        "path": str(work / f"data-{row.family}-{size}-{episodes}x{row.frames}"),
        "episodes": episodes,
        "frames": row.frames,
        "cameras": {name: [size, size] for name in row.cameras},
        "state": STATE,
        "action": ACTION,
        "tasks": [row.task],
        "seed": SEED,
        "episodes_per_file": 8,
    }
    recipe = folder / "recipe.yaml"
    written = _recipe(row, options, folder, weights["folder"], dataset["path"], steps)
    recipe.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    words = [*row.overrides, *options.loong]
    job = {"weights": weights, "dataset": dataset, "recipe": str(recipe), "words": words, "steps": steps}
    job |= {"folder": str(folder), "config": config, "size": size}
    (folder / "work.json").write_text(json.dumps(job), encoding="utf-8")
    call([sys.executable, HERE / "vla_work.py", folder / "work.json"], folder / "work.log", {})
    return job


def _config(row: Row, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The weights' config.json, and that of their backbone where it is no published one."""
    if row.family == "pi05":
        from loong_vla.models.pi05 import presets

        return {**presets()[row.preset], **(TINY_PI05 if options.tiny else {})}, None
    if options.tiny:
        return {"architectures": ["Gr00tN1d7"], "model_type": "Gr00tN1d7", **TINY_GROOT}, TINY_BACKBONE
    from loong_vla.models import groot, groot_n16

    known = {**groot.n17_presets(), **groot_n16.presets()}
    return dict(known[row.preset]), None


def _recipe(
    row: Row, options: argparse.Namespace, folder: Path, weights: str, dataset: str, steps: int
) -> dict[str, Any]:
    """What `loong train` gets."""
    config = {name: value for name, value in row.config.items() if not (options.tiny and name == "backbone_config")}
    batch = row.batch_of(options.tiny)
    return {
        "base": f"loong_vla:{row.recipe}",
        "run": {"name": "run", "dir": str(folder / "runs"), "seed": SEED, "steps": steps},
        "model": {"family": row.family, "weights": weights, **({"config": config} if config else {})},
        "data": {
            "source": "lerobot",
            "path": dataset,
            "tokenizer": {"train": 320},
            "global_batch": batch * options.world,
            "micro_batch": batch,
            "eval": None,
            "options": {"cameras": [*row.cameras, *[None] * row.absent]},
        },
        "parallel": {"recompute": "none"},
        "optim": CONSTANT,
        "backend": options.backend,
        **({"precision": options.precision} if options.precision else {}),
        "launch": {"devices": options.world},
        "checkpoint": {"every": None, "export": None, "resume": "never"},
        "log": {"to": ["jsonl"]},
    }


def describe(row: Row, options: argparse.Namespace, folder: Path, job: Mapping[str, Any]) -> dict[str, Any]:
    """The row's result before anything ran: what is trained, where, with which libraries."""
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    batch = row.batch_of(options.tiny) * options.world
    teraflops = facts.pop("tflop_of_a_sample") * batch
    floor = teraflops * 1e12 / options.world / REACHED * 1e3
    warmup = options.warmup if row.name != CURVES else min(SETTLED, options.curve_steps // 2)
    card, driver = device()
    return {
        "row": row.name,
        "card": card,
        "driver": driver,
        "python": platform.python_version(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "git": revision(options),
        "timing": TIMING,
        "work": {
            **facts,
            "tflop_per_step": teraflops,
            "floor_ms_790": floor,
            "floor_samples_per_second": batch / floor * 1e3,
            "batch": batch,
            "world": options.world,
            "steps": job["steps"],
            "warmup": warmup,
            "seed": SEED,
            "cameras": [len(row.cameras), row.absent],
            "image_size": job["size"],
        },
    }


def kept(path: Path, result: Mapping[str, Any], only: str | None) -> dict[str, Any]:
    """The sides of an earlier run, where not all are run now and the work is the same."""
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = earlier.get("work") == json.loads(json.dumps(result["work"])) and earlier.get("card") == result["card"]
    if not same:
        return {}
    names = [PEER] if only != PEER else ["loong", PEER]
    return {name: earlier[name] for name in names if name in earlier}


# ------------------------------------------------------------------------------------------------ the two sides
def loong(
    row: Row, options: argparse.Namespace, folder: Path, work: Mapping[str, Any], where: Mapping[str, str]
) -> Side:
    """`loong train`, and what it left in its run folder."""
    words = [*row.overrides, *options.loong, f"data.tokenizer={folder / 'tokenizer'}"]
    command = [sys.executable, "-m", "loong_core", "train", folder / "recipe.yaml", *words]
    call(command, folder / "loong.log", dict(where))
    run_folder = folder / "runs" / "run"
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if [step["tokens"] for step in steps] != work["counted"]:
        raise Failed("loong trained on other samples than those written for the peer")
    timed = steps[work["warmup"] :]
    result = side(
        [step["step_seconds"] * 1e3 for step in steps],
        [step["loss"] for step in steps],
        max(step["memory_bytes"] for step in timed),
        work,
    )
    manifest = json.loads((run_folder / "manifest.json").read_text(encoding="utf-8"))
    plan = json.loads((run_folder / "plan.json").read_text(encoding="utf-8"))
    return result | {
        "grad_norm": [step["grad_norm"] for step in steps],
        "lr": [step["lr"] for step in steps],
        "data_ms": statistics.median(step["data_seconds"] * 1e3 for step in timed),
        "data_share": statistics.median(step["data_seconds"] / step["step_seconds"] for step in timed),
        "first_step_seconds": _startup([folder / "loong.log", *sorted((run_folder / "logs").glob("*.log"))]),
        "recipe": yaml.safe_load(relative((folder / "recipe.yaml").read_text(encoding="utf-8"), folder.parent)),
        "overrides": [relative(word, folder) for word in words],
        "ops": {op: choice["name"] for op, choice in manifest["ops"].items()},
        "layout": {name: plan[name] for name in ("dp", "micro_batch", "recompute", "options") if name in plan},
    }


def _startup(logs: Sequence[Path]) -> float | None:
    """Seconds up to the end of the first step, as loong says itself."""
    for path in logs:
        if path.is_file() and (found := re.search(r"start-up ([\d.]+) s", path.read_text(errors="replace"))):
            return float(found[1])
    return None


def lerobot(
    row: Row,
    name: str,
    options: argparse.Namespace,
    folder: Path,
    job: Mapping[str, Any],
    work: Mapping[str, Any],
    where: Mapping[str, str],
) -> Side:
    """LeRobot with one of its settings, in its own interpreter."""
    out = folder / f"peer-{name}.json"
    out.unlink(missing_ok=True)
    settings = PEER_SETTINGS[name]
    if options.precision == "fp32" and "dtype" in settings:
        settings = {**settings, "dtype": "float32"}
    given = {
        "family": row.family,
        "weights": job["weights"]["folder"],
        "batches": str(folder / "batches.safetensors"),
        "config": job["config"],
        "settings": settings,
        "cameras": len(row.cameras),
        "absent": row.absent,
        "size": job["size"],
        "state": STATE,
        "action": ACTION,
        "steps": work["steps"],
        "warmup": work["warmup"],
        "seed": SEED,
        "device": "cuda" if options.backend == "cuda" else "cpu",
        "lr": work["lr"],
        "out": str(out),
    }
    (folder / f"peer-{name}-job.json").write_text(json.dumps(given), encoding="utf-8")
    path = os.pathsep.join([str(part.absolute()) for part in options.peer_path])
    # LeRobot needs another transformers than loong: its folders alone, where they are named.
    variables = {**where, "HF_HUB_OFFLINE": "1", **({"PYTHONPATH": path} if path else {})}
    variables |= {} if path else {"PYTHONPATH": ""}
    command = [options.peer_python, HERE / "vla_peer.py", folder / f"peer-{name}-job.json"]
    call(command, folder / f"peer-{name}.log", variables)
    found = json.loads(out.read_text(encoding="utf-8"))
    result = side(found.pop("ms"), found.pop("loss"), found.pop("memory_bytes"), work)
    return result | {"grad_norm": found.pop("norm"), **found}


def say(row: Row, text: str) -> None:
    """A line of progress."""
    print(f"{row.name}: {text}", flush=True)


def parse(rows: Mapping[str, Row], description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(rows), help="comma separated; all: " + ", ".join(rows))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, one JSON a row")
    parser.add_argument("--world", type=int, default=1, help="GPUs, for loong alone")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a row")
    parser.add_argument("--warmup", type=int, default=6, help="steps before them: graphs are captured in the third")
    parser.add_argument("--curve-steps", type=int, default=60, help=f"steps of {CURVES}")
    parser.add_argument("--only", choices=["loong", PEER], help="one side; the other stays as the file has it")
    parser.add_argument(
        "--settings",
        default=",".join(PEER_SETTINGS),
        help="LeRobot's, of those that a row has: " + ", ".join(PEER_SETTINGS),
    )
    parser.add_argument("--side-by-side", action="store_true", help="two sides at the same time, on a GPU each")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="start no further row after so long")
    parser.add_argument("--work", type=Path, help="folder for data, weights, runs and logs; left in place")
    parser.add_argument("--loong", action="append", default=[], metavar="KEY=VALUE", help="a recipe override")
    python = os.environ.get("LOONG_LEROBOT_PYTHON", sys.executable)
    parser.add_argument("--peer-python", default=python, help="an interpreter with LeRobot (LOONG_LEROBOT_PYTHON)")
    parser.add_argument("--peer-path", type=Path, action="append", default=[], help="a folder with LeRobot's packages")
    parser.add_argument("--revision", help="commit to record, where this is a copy without a repository")
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", help="a precision policy; by default the recipe's")
    parser.add_argument("--tiny", action="store_true", help="small layers and small images, to try the script")
    options = parser.parse_args()
    options.rows = [name for name in options.rows.split(",") if name]
    options.settings = options.settings.split(",")
    if unknown := [name for name in options.rows if name not in rows]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(rows)}")
    if unknown := [name for name in options.settings if name not in PEER_SETTINGS]:
        parser.error(f"no settings {', '.join(unknown)}; there are {', '.join(PEER_SETTINGS)}")
    if options.side_by_side and options.world != 1:
        parser.error("--side-by-side gives each side one GPU: it goes with --world 1")
    options.out, options.work = options.out.absolute(), options.work and options.work.absolute()
    return options
