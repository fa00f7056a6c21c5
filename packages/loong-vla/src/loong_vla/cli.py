"""Commands of loong-vla beside `loong generate`; nothing heavy is imported before one runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

TOKEN = "LOONG_SERVE_TOKEN"
"""Environment variable with a server's token: words of a command line can be read by every user of a machine."""


def serve(
    folder: Annotated[Path, typer.Argument(help="A run folder, a checkpoint, or a policy's folder.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 8765,
    token: Annotated[
        str | None, typer.Option(envvar=TOKEN, help="What clients must know; a random one by default.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Dataset of the robot, where the policy does not know it.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; a random one by default.")] = None,
    backend: Annotated[str, typer.Option(help="Hardware backend.")] = "auto",
    connections: Annotated[int, typer.Option(min=1, help="Clients at a time.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Observations that may wait for their turn.")] = 8,
    patience: Annotated[float, typer.Option(min=0.01, help="Seconds that one may wait.")] = 10.0,
    largest: Annotated[int, typer.Option(min=1, help="MiB of the largest message.")] = 32,
    json_: Annotated[bool, typer.Option("--json", help="Print the address as a line of JSON.")] = False,
) -> None:
    """Serve a policy to robots over a websocket, until interrupted.

    \b
    Examples:
      loong serve runs/demo
      LOONG_SERVE_TOKEN=... loong serve runs/demo/hf --host 0.0.0.0 --port 8765
    """
    import asyncio
    import json
    import secrets
    import sys

    from loong_core.cli import output
    from loong_core.errors import UserError
    from loong_vla import serve as serving
    from loong_vla.generate import facts
    from loong_vla.policy import load_policy

    if token is not None and not _travels(token):
        raise UserError("--token: 8 to 200 ASCII characters without blanks are needed.")
    token = token or secrets.token_urlsafe(24)
    seed = secrets.randbelow(2**63) if seed is None else seed
    policy = load_policy(folder, dataset=dataset, backend=backend, seed=seed)
    policy.warm_up()

    def ready(found: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        address = f"ws://{shown}:{found}"
        if json_:
            output.say(json.dumps({"url": address, "token": token, "protocol": serving.PROTOCOL, "seed": seed}))
            return
        output.pairs([*facts(policy).items(), ("address", address), ("token", token)])
        output.say("\nCtrl-C ends it.")

    if not serving.is_loopback(host):
        sys.stderr.write(
            f"warning: {host} can be reached from other machines, and messages are not encrypted. An SSH tunnel to a "
            "server on 127.0.0.1 is safer.\n"
        )
    limits = serving.Limits(frame=largest * 2**20, connections=connections, waiting=waiting, patience=patience)
    asyncio.run(serving.run(policy, host, port, token, limits, ready))


def _travels(token: str) -> bool:
    """Whether a token can stand in a header of HTTP, and is long enough not to be guessed at once."""
    return 8 <= len(token) <= 200 and token.isascii() and token.isprintable() and " " not in token
