"""What each optimisation gives: a row of the benchmark with everything on, then with one thing at a time switched off.

    python benchmarks/switches.py --row moe-32k --out benchmarks/results/h200/switches

Every run is `qwen3_moe.py --only loong`, which leaves a JSON of its own; `switches.json` holds the medians. A switch
that cannot run (out of memory is a finding too) is listed with its reason. With `--devices 2` the switches are shared
out over two GPUs, each of which measures everything on for itself: cards differ by a few percent.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BASE = "everything on"
SWITCHES: dict[str, list[str]] = {
    BASE: [],
    "experts by Triton": ["ops.experts=triton"],
    "attention by Transformer Engine": ["ops.attention=transformer_engine"],
    "logits kept": ["ops.linear_cross_entropy=torch"],
    "head by cuBLAS": ["ops.linear_cross_entropy=triton"],
    "linear layers by Transformer Engine": ["ops.linear=torch"],
    "SwiGLU apart from its products": ["ops.gated_mlp=torch"],
    "rotation and head norms in torch": ["ops.rotary_qkv=torch"],
    "router in torch": ["ops.route=torch"],
    "norms by Transformer Engine": ["ops.rms_norm=torch"],
    "residual gradients added apart": ["ops.residual_rms_norm=torch"],
    "AdamW in torch": ["ops.adamw=torch"],
    "norm of the gradients in torch": ["ops.sum_of_squares=torch"],
    "gradients in float32": ["precision=bf16"],
    "one row a micro-batch": ["data.micro_batch=1"],
    "layers computed again": ["parallel.recompute=full"],
}
"""Name -> overrides of the recipe."""


def main() -> int:
    """Run the switches of the command line; 1 where a run with everything on failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", default="moe-32k")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", choices=list(SWITCHES), help="may be repeated; default: all")
    parser.add_argument("--devices", type=int, default=1, help="GPUs that share the switches")
    options, rest = parser.parse_known_args()
    names = [name for name in options.only or SWITCHES if name != BASE]
    shares = [names[device :: options.devices] for device in range(options.devices)]
    with ThreadPoolExecutor(options.devices) as pool:
        run = [pool.submit(measure_all, options, share, device, rest) for device, share in enumerate(shares)]
        devices = [job.result() for job in run]
    (options.out / "switches.json").write_text(json.dumps({"row": options.row, "devices": devices}, indent=1) + "\n")
    for results in devices:
        print(table(results))
    return int(any("error" in results[BASE] for results in devices))


def measure_all(options: argparse.Namespace, names: list[str], device: int, rest: list[str]) -> dict[str, Any]:
    """Everything on, then each of `names`, one after the other on one GPU."""
    where = {"CUDA_VISIBLE_DEVICES": str(device)} if options.devices > 1 else {}
    return {name: measure(options.row, options.out / str(device), name, rest, where) for name in [BASE, *names]}


def measure(row: str, out: Path, name: str, rest: list[str], where: dict[str, str]) -> dict[str, Any]:
    """Median milliseconds and peak memory with one thing switched off, or why it did not run."""
    folder = out / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    words = [word for override in SWITCHES[name] for word in ("--loong", override)]
    command = [sys.executable, str(HERE / "qwen3_moe.py"), "--rows", row, "--only", "loong", "--out", str(folder)]
    subprocess.run([*command, *words, *rest], check=False, env={**os.environ, **where})
    path = folder / f"{row}.json"
    found = json.loads(path.read_text(encoding="utf-8"))["loong"] if path.is_file() else {"error": "no result"}
    if "error" in found:
        return {"error": str(found["error"])[-300:], "overrides": SWITCHES[name]}
    kept = ("median_ms", "peak_memory_gib", "ops", "commit")
    return {key: found[key] for key in kept} | {"overrides": SWITCHES[name]}


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line a switch: milliseconds, how much longer than with everything on, memory."""
    base = results[BASE].get("median_ms")
    lines = [f"{'switched off':34} {'ms':>8} {'longer':>8} {'GiB':>7}"]
    for name, found in results.items():
        ms, memory = found.get("median_ms"), found.get("peak_memory_gib")
        if not isinstance(ms, float) or not isinstance(memory, float):
            lines.append(f"{name:34} {'failed':>8}")
            continue
        longer = f"{ms / base - 1:8.1%}" if isinstance(base, float) else " " * 8
        lines.append(f"{name:34} {ms:8.1f} {longer} {memory:7.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
