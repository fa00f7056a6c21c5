"""Qwen3 on this machine's GPUs: loong's shipped recipes beside Megatron-LM, the same tokens and weights, in one run.

    python benchmarks/qwen3_moe.py --rows moe-4k,moe-32k --out benchmarks/results/h200

Every row trains twice: `loong train RECIPE` as a user would, then megatron-core with NVIDIA's settings on the batches
that loong's data code made. Each side runs in processes of its own, so that neither sees the other's memory. A row's
JSON is written as soon as a side is done. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import report
import token_data
import yaml
from rows import CORPUS, ROWS, SEED, TINY_EXPERTS, TINY_LENGTH, TINY_MODEL, Row

HERE = Path(__file__).resolve().parent
LIBRARIES = (
    "torch",
    "triton",
    "megatron-core",
    "transformer-engine",
    "flash-attn-4",
    "quack-kernels",
    "loong-core",
    "loong-llm",
    "loong-ops",
)
# NVLink multicast stays off on both sides; growing segments keep packed rows from fragmenting either one's memory.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
PEER_ENVIRONMENT = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "1",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
}
TIMING = (
    "loong: step_seconds of metrics.jsonl, wall time of a whole step with its data; megatron: CUDA events around a "
    "whole step whose batches lie on the device before (host clock on a CPU). Memory: the most that torch had "
    "allocated on the fullest device during the timed steps. Losses: mean over the counted tokens of the global "
    "batch, without the load-balancing loss."
)


SIDES = ("loong", "megatron")


class Failed(Exception):
    """A side ended with an error; the text is the end of its log."""


# -------------------------------------------------------------------------------------------------- a row's work
def main() -> int:
    """Run the rows of the command line; 1 where a side failed."""
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    work = options.work or Path(tempfile.mkdtemp(prefix="loong-benchmark-"))
    began, results, failed = time.time(), [], False
    for name in options.rows:
        if options.stop_after and time.time() - began > options.stop_after:
            print(f"{name}: not started, {options.stop_after} s are over", flush=True)
            continue
        try:
            results.append(run(ROWS[name], options, work / name, f"{began:.0f}"))
        except Failed as error:
            print(f"{name}: its data could not be made: {error}", flush=True)
            failed = True
    if options.work is None:
        shutil.rmtree(work, ignore_errors=True)
    print(report.table(results))
    sides = [found.get(side) or {} for found in results for side in ("loong", "megatron")]
    return int(failed or any("error" in side for side in sides))


def run(row: Row, options: argparse.Namespace, folder: Path, run_id: str) -> dict[str, Any]:
    """Both sides of one row; the row's result is in its file after each of them."""
    began = time.perf_counter()
    for old in ("runs", "tokenizer"):
        shutil.rmtree(folder / old, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    total, warmup = length(row, options)
    words = overrides(row, options, folder, total)
    call([sys.executable, HERE / "batches.py", row.recipe, folder, total, *words], folder / "batches.log", {})
    result = describe(row, options, folder, words, warmup)
    path = options.out / f"{row.name}.json"
    result |= kept(path, result, options.only)
    say(row, f"data ready after {time.perf_counter() - began:.0f} s, floor {result['work']['floor_ms_790']:.1f} ms")
    sides = [side for side in SIDES if options.only in (None, side)]
    with ThreadPoolExecutor(len(sides) if options.side_by_side else 1) as pool:
        running = {
            pool.submit(measured, row, side, options, folder, words, result["work"], number): side
            for number, side in enumerate(sides)
        }
        for done in as_completed(running):
            side = running[done]
            result[side] = done.result() | {"run": run_id, "commit": revision(options)}
            finished = [result.get(name) for name in SIDES]
            if all(found and "error" not in found for found in finished):
                result["comparison"] = report.compare(*finished)
                result["comparison"]["one_run"] = finished[0]["run"] == finished[1]["run"]
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            say(row, f"{side} {outcome(result[side])}, {result[side]['seconds']:.0f} s in all")
    return result


def measured(
    row: Row, side: str, options: argparse.Namespace, folder: Path, words: list[str], work: dict[str, Any], number: int
) -> dict[str, Any]:
    """One side, on a device of its own where both run at the same time; what went wrong instead, if something did."""
    began = time.perf_counter()
    where = {"CUDA_VISIBLE_DEVICES": str(number)} if options.side_by_side else {}
    try:
        found = {"loong": loong, "megatron": megatron}[side](row, options, folder, words, work, where)
    except Failed as error:
        found = {"error": relative(str(error), folder)}
    return found | {"seconds": time.perf_counter() - began, "beside_the_other": options.side_by_side}


def outcome(side: dict[str, Any]) -> str:
    """One side in words."""
    if "error" in side:
        return "failed: " + side["error"][-2000:]
    return f"{side['median_ms']:.1f} ms, {side['peak_memory_gib']:.1f} GiB, loss {side['loss'][-1]:.4f}"


def length(row: Row, options: argparse.Namespace) -> tuple[int, int]:
    """Steps of a row in all, and how many of them are not timed."""
    if row.documents == "corpus":
        return options.curve_steps, min(report.SETTLED, options.curve_steps // 2)
    return options.steps + options.warmup, options.warmup


def overrides(row: Row, options: argparse.Namespace, folder: Path, steps: int) -> list[str]:
    """What the command line of `loong train` says beside the recipe's name; writes the row's tokens on the way."""
    world, seq_len = options.world, TINY_LENGTH if options.tiny else row.seq_len
    config: dict[str, Any] = {"num_hidden_layers": row.cut(world)}
    if options.tiny:
        config = {**TINY_MODEL, **(TINY_EXPERTS if row.sparse else {})}
    words = [f"run.name={row.name}", f"run.dir={folder / 'runs'}", f"run.seed={SEED}", f"run.steps={steps}"]
    words += [f"model.config.{name}={value}" for name, value in config.items()]
    if row.documents == "corpus":
        # A tiny run reads the benchmark's own sources: the library of Python takes minutes on a small machine.
        words += (
            ["data.source=text", f"data.path={HERE}", "data.options.suffixes=[.py]"] if options.tiny else CORPUS[:1]
        )
        words += ["data.tokenizer={train: 512}"] if options.tiny else CORPUS[1:]
    else:
        vocabulary = TINY_MODEL["vocab_size"] if options.tiny else 151936
        tokens = folder / "tokens.jsonl"
        token_data.write(tokens, row.documents, rows=steps * row.rows * world, seq_len=seq_len, vocabulary=vocabulary)
        words += ["data.source=jsonl", f"data.path={tokens}", "data.shuffle=false"]
    words += [
        f"data.cache={folder / 'cache'}",
        f"data.seq_len={seq_len}",
        f"data.global_batch={row.rows * world}",
        f"data.micro_batch={row.micro_batch}",
        f"backend={options.backend}",
        f"launch.devices={world}",
        "parallel.recompute=none",
        "checkpoint.every=null",
        "checkpoint.export=null",
        "log.to=[jsonl]",
    ]
    words += [f"parallel.ep={world}"] if row.sparse else []
    words += [*row.overrides, *(row.of_several if world > 1 else ())]
    words += [f"precision={options.precision}"] if options.precision else []
    return [*words, *options.loong]


def describe(row: Row, options: argparse.Namespace, folder: Path, words: list[str], warmup: int) -> dict[str, Any]:
    """The row's result before anything ran: what is trained, where, with which libraries."""
    from safetensors.numpy import load_file

    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    batches = load_file(str(folder / "batches.safetensors"))
    config = recipe["model"]["config"]
    work = report.measure(batches, config, warmup, options.world)
    work |= {"world": options.world, "steps": int(batches["tokens"].shape[0]), "warmup": warmup, "seed": SEED}
    work |= {"documents": row.documents, "config": config, "precision": recipe["precision"]}
    work |= {name: recipe["data"][name] for name in ("seq_len", "global_batch")}
    work["optim"] = recipe["optim"]
    card, driver = device()
    versions = {name: found for name in LIBRARIES if (found := _version(name))}
    return {
        "row": row.name,
        "card": card,
        "driver": driver,
        "python": platform.python_version(),
        "versions": versions,
        "git": revision(options),
        "recipe": row.recipe,
        "timing": TIMING,
        "work": work,
    }


def kept(path: Path, result: dict[str, Any], only: str | None) -> dict[str, Any]:
    """The other side of an earlier run, where one side alone is run now and the work is the same."""
    if only is None or not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    other = "megatron" if only == "loong" else "loong"
    same = earlier.get("work") == json.loads(json.dumps(result["work"])) and earlier.get("card") == result["card"]
    return {other: earlier[other]} if same and other in earlier else {}


# ------------------------------------------------------------------------------------------------ the two sides
def loong(
    row: Row,
    options: argparse.Namespace,
    folder: Path,
    words: list[str],
    work: dict[str, Any],
    where: dict[str, str],
) -> report.Side:
    """`loong train`, and what it left in its run folder."""
    run_folder = folder / "runs" / row.name
    tokenizer = folder / "tokenizer"
    words = [*words, *([f"data.tokenizer={tokenizer}"] if tokenizer.is_dir() else [])]
    call([sys.executable, "-m", "loong_core", "train", row.recipe, *words], folder / "loong.log", where)
    steps = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if [step["tokens"] for step in steps] != work["counted_tokens"]:
        raise Failed("loong trained on other tokens than those written for the peer")
    losses = [step.get("lm_loss", step["loss"]) for step in steps]
    memory = max(step["memory_bytes"] for step in steps[work["warmup"] :])
    result = report.side([step["step_seconds"] * 1e3 for step in steps], losses, memory, work["warmup"], work)
    manifest = json.loads((run_folder / "manifest.json").read_text(encoding="utf-8"))
    plan = json.loads((run_folder / "plan.json").read_text(encoding="utf-8"))
    layout = ("tp", "pp", "cp", "ep", "dp", "micro_batch", "micro_batches", "recompute", "options")
    return result | {
        "grad_norm": [step["grad_norm"] for step in steps],
        "data_ms": statistics.median(step["data_seconds"] * 1e3 for step in steps[work["warmup"] :]),
        "command": ["loong", "train", row.recipe, *(relative(word, folder) for word in words)],
        "ops": {op: choice["name"] for op, choice in manifest["ops"].items()},
        "layout": {name: plan[name] for name in layout if name in plan},
    }


def megatron(
    row: Row,
    options: argparse.Namespace,
    folder: Path,
    words: list[str],
    work: dict[str, Any],
    where: dict[str, str],
) -> report.Side:
    """megatron-core on the same batches; with more recomputation only where it would not fit."""
    chosen: dict[str, Any] = {
        "micro_batch": row.peer_micro_batch,
        # Transformer Engine's optimizer: there is none on a CPU.
        "precision_aware": row.precision_aware == "several" and options.world > 1 and options.backend == "cuda",
        "fp32_gradients": row.fp32_gradients,
        "force_balance": False,
        "ep_overlap": False,
        "ep": options.world if row.sparse else 1,
        **options.peer,
    }
    attempts = [chosen.pop("recompute")] if "recompute" in chosen else list(row.recompute)
    attempts = [""] if options.backend == "cpu" else attempts  # its unfused layers recompute nothing
    files = {"recipe": folder / "recipe.yaml", "batches": folder / "batches.safetensors", "out": folder / "peer.json"}
    job = {name: str(path) for name, path in files.items()}
    job |= {"backend": options.backend, "warmup": work["warmup"], "steps": work["steps"], **chosen}
    for number, recompute in enumerate(attempts):
        files["out"].unlink(missing_ok=True)
        (folder / "job.json").write_text(json.dumps(job | {"recompute": recompute}), encoding="utf-8")
        try:
            call(
                [*_python(options.world), HERE / "megatron_peer.py", folder / "job.json"],
                folder / "peer.log",
                PEER_ENVIRONMENT | where,
            )
        except Failed as error:
            if number + 1 == len(attempts) or "out of memory" not in str(error).lower():
                raise
            say(row, f"megatron is out of memory recomputing {recompute or 'nothing'}; trying {attempts[number + 1]}")
            continue
        break
    found = json.loads(files["out"].read_text(encoding="utf-8"))
    result = report.side(found.pop("ms"), found.pop("loss"), found.pop("memory_bytes"), work["warmup"], work)
    settings = {**chosen, "recompute": recompute, "out_of_memory_with": attempts[:number]}
    return result | {"grad_norm": found.pop("norm"), "settings": settings, **found}


def _python(world: int) -> list[str]:
    if world == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]


def call(command: list[Any], log: Path, environment: dict[str, str]) -> None:
    """Run a program with its output in `log`. Raises Failed with the end of the log."""
    words = [str(word) for word in command]
    with log.open("wb") as file:
        variables = {**ENVIRONMENT, **os.environ, **environment}
        done = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=variables, check=False)
    if done.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        # torchrun ends with a summary of its own; the reason stands where a rank says it.
        said = [line for line in text.splitlines() if line.startswith(("[rank", "error:"))]
        hint = "out of memory\n" if "OutOfMemoryError" in text else ""
        reason = "\n".join(said[-40:]) or text[-4000:]
        raise Failed(f"{hint}{reason}\n{log.stem} ended with {done.returncode}")


# ----------------------------------------------------------------------------------------------------- facts
def device() -> tuple[str, str | None]:
    """The card's name and its driver's version, or the processor's name."""
    words = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
        card, _, driver = lines[0].partition(",")
        return card.strip(), driver.strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return platform.machine(), None


def revision(options: argparse.Namespace) -> dict[str, Any] | None:
    """The commit that is measured: by git, or as the command line says where there is no repository."""
    from loong_core.run_folder import git_revision

    return {"revision": options.revision} if options.revision else git_revision(HERE)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def relative(text: str, folder: Path) -> str:
    """A text without this machine's folders."""
    for path, name in ((folder, "."), (HERE, "benchmarks"), (HERE.parent, "."), (sys.prefix, "python")):
        text = text.replace(str(path), name)
    return text


def say(row: Row, text: str) -> None:
    """A line of progress."""
    print(f"{row.name}: {text}", flush=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma separated; all: " + ", ".join(ROWS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, one JSON a row")
    parser.add_argument("--world", type=int, default=1, help="GPUs")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a row")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--curve-steps", type=int, default=200, help="steps of the row `curves`")
    parser.add_argument("--only", choices=["loong", "megatron"], help="one side; the other stays as the file has it")
    parser.add_argument(
        "--side-by-side", action="store_true", help="both sides at the same time, each on a GPU of its own (--world 1)"
    )
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="start no further row after so long")
    parser.add_argument("--work", type=Path, help="folder for data, runs and logs; left in place")
    parser.add_argument("--loong", action="append", default=[], metavar="KEY=VALUE", help="a recipe override")
    parser.add_argument("--peer", action="append", default=[], metavar="KEY=VALUE", help="a setting of the peer (JSON)")
    parser.add_argument("--revision", help="commit to record, where this is a copy without a repository")
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", help="a precision policy; by default the recipe's")
    parser.add_argument("--tiny", action="store_true", help="two small layers and short rows, to try the script")
    options = parser.parse_args()
    options.rows = [name for name in options.rows.split(",") if name]
    if options.side_by_side and options.world != 1:
        parser.error("--side-by-side gives each side one GPU: it goes with --world 1")
    if unknown := [name for name in options.rows if name not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    options.out, options.peer = options.out.absolute(), dict(_setting(word, parser) for word in options.peer)
    options.work = options.work and options.work.absolute()
    return options


def _setting(word: str, parser: argparse.ArgumentParser) -> tuple[str, Any]:
    name, _, text = word.partition("=")
    if name not in ("micro_batch", "recompute", "precision_aware", "force_balance", "ep_overlap"):
        parser.error(f"--peer {word}: settings are micro_batch, recompute, precision_aware, force_balance, ep_overlap")
    return name, text if name == "recompute" else json.loads(text)


if __name__ == "__main__":
    sys.exit(main())
