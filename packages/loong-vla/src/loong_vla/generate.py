"""`loong generate` for policies: what it would do at a frame of a dataset, beside what was done. No tensor library is
imported before the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from loong_vla.policy import Policy


def generate(
    folder: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or a policy's folder.")],
    dataset: Annotated[
        Path | None, typer.Option(help="LeRobot dataset to observe; the one it was trained on by default.")
    ] = None,
    episode: Annotated[int, typer.Option(min=0, help="Number of the episode.")] = 0,
    frame: Annotated[int, typer.Option(min=0, help="Number of the frame in it.")] = 0,
    task: Annotated[str | None, typer.Option(help="Another instruction than the episode's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise that actions are made of.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help="Steps of the flow's integration.")] = None,
    backend: Annotated[str, typer.Option(help="Hardware backend.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let a policy act on one observation of a dataset, and show what was recorded there.

    \b
    Examples:
      loong generate runs/demo --episode 3 --frame 20
      loong generate runs/demo/hf --dataset data/kitchen --json
    """
    from loong_core.cli import output
    from loong_core.errors import DataError
    from loong_vla.lerobot.layout import open_dataset
    from loong_vla.lerobot.video import FrameReader
    from loong_vla.open_policy import dataset_of
    from loong_vla.policy import load_policy, recorded, recorded_actions

    data = open_dataset(dataset) if dataset is not None else dataset_of(folder)
    if data is None:
        raise DataError(f"`{folder}` names no dataset that is there. Name one: --dataset.")
    policy = load_policy(folder, dataset=data.root, backend=backend)
    with FrameReader(data, policy.settings.tolerance) as reader:
        observation = recorded(policy, data, reader, episode, frame)
    if task is not None:
        observation = observation._replace(task=task)
    actions = policy.act_on_one(observation, seed=seed, steps=steps)
    truth = recorded_actions(policy, data, episode, frame)
    if json_:
        output.as_json(
            {
                "policy": str(folder),
                "family": policy.family,
                "dataset": str(data.root),
                "episode": episode,
                "frame": frame,
                "task": observation.task,
                "seed": seed,
                "names": list(policy.action_names),
                "actions": actions.tolist(),
                "recorded": truth.tolist(),
            }
        )
        return
    output.say(f'episode {episode}, frame {frame}: "{observation.task}"\n')
    output.table(("step", *policy.action_names), rows(actions))
    output.say("\nrecorded there, and the mean absolute error\n")
    output.table(("step", *policy.action_names), [*rows(truth), _errors(actions, truth)])


def rows(actions: np.ndarray) -> list[list[str]]:
    """Lines of a table: the number of the step, then its action."""
    return [[f"+{number}", *(f"{value:.4f}" for value in action)] for number, action in enumerate(actions.tolist())]


def _errors(actions: np.ndarray, truth: np.ndarray) -> list[str]:
    return ["error", *(f"{value:.4f}" for value in abs(actions[: len(truth)] - truth).mean(0).tolist())]


def facts(policy: Policy) -> dict[str, Any]:
    """A policy in words, for people."""
    cameras = ", ".join(f"{name} {size[0]} x {size[1]}" for name, size in policy.cameras.items())
    return {
        "policy": policy.family,
        "state": f"{policy.settings.state}, {policy.processing.robot.state} numbers",
        "cameras": cameras,
        "actions": f"{policy.horizon} x {len(policy.action_names)}: {', '.join(policy.action_names)}",
    }
