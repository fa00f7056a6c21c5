"""A policy behind a websocket: robots send observations, one at a time is acted on, few wait, everything has limits.

Loopback and a token unless asked otherwise; no pickle, no compression (a small frame must not become a large one).
The messages are those of `loong_vla.wire`; docs/robot-policies.md describes them for clients in any language.
"""

from __future__ import annotations

import asyncio
import hmac
import http
import ipaddress
import logging
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import websockets
from websockets.asyncio.server import Server, ServerConnection, serve

from loong_core.errors import DataError, RunError
from loong_vla.wire import PROTOCOL, Message, WireError, pack, unpack

if TYPE_CHECKING:
    import numpy as np
    from websockets.http11 import Request, Response

    from loong_vla.policy import Policy

logger = logging.getLogger(__name__)

ACT = "act"
MOST_STEPS = 1000
"""Integration steps a client may ask for."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask of a server. Times are in seconds, sizes in bytes.

    `waiting` observations may queue behind the one that is acted on; more are refused as busy. `patience` is how long
    one may wait in the queue, and how long a client may take to receive an answer. `connections` are clients at a time.
    `silence` is how long a client may leave a ping unanswered, so how long half a frame may be under way.
    """

    frame: int = 32 * 2**20
    connections: int = 16
    waiting: int = 8
    patience: float = 10.0
    silence: float = 20.0
    handshake: float = 10.0


class Refused(Exception):
    """A request without an answer: `code` for programs, the text for people."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class PolicyServer:
    """Serves one policy until `stop`. `act(observation, seed=, steps=)` runs in one thread of its own."""

    def __init__(self, policy: Policy, token: str, limits: Limits | None = None) -> None:
        if not token:
            raise RunError("a policy server needs a token.")
        self._policy, self._token, self._limits = policy, token, limits or Limits()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._turn = asyncio.Lock()
        self._pending = self._answering = 0
        self._ending = False
        self._open: set[ServerConnection] = set()
        self._server: Server | None = None

    # ------------------------------------------------------------------------------------------------- its life
    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, a free one for 0.

        Raises:
            RunError: the address cannot be listened on.
        """
        limits = self._limits
        try:
            self._server = await serve(
                self._talk,
                host,
                port,
                process_request=self._admit,
                max_size=limits.frame,
                max_queue=2,
                compression=None,
                open_timeout=limits.handshake,
                ping_interval=limits.silence,
                ping_timeout=limits.silence,
                close_timeout=5,
                server_header=None,
            )
        except OSError as error:
            reason = error.strerror or error
            raise RunError(f"cannot listen on {host}, port {port}: {reason}. Choose another --port.") from None
        found: int = next(iter(self._server.sockets)).getsockname()[1]
        return found

    async def stop(self) -> None:
        """Take no more, give the answers that are under way, say good-bye (code 1001)."""
        self._ending = True
        if self._server is not None:
            self._server.close(close_connections=False)
            patient_until = time.monotonic() + self._limits.patience
            while self._answering and time.monotonic() < patient_until:
                await asyncio.sleep(0.02)
            await asyncio.gather(*(connection.close(1001) for connection in [*self._open]))
            await self._server.wait_closed()
        await asyncio.get_running_loop().run_in_executor(None, self._worker.shutdown)

    # ------------------------------------------------------------------------------------------------ connections
    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Let in who knows the token, as far as there is room."""
        given = request.headers.get_all("Authorization")
        wanted = f"Bearer {self._token}".encode()
        if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "replace"), wanted):
            return connection.respond(
                http.HTTPStatus.UNAUTHORIZED, "the header `Authorization: Bearer TOKEN` is wrong\n"
            )
        if len(self._open) >= self._limits.connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "too many clients are connected\n")
        return None

    async def _talk(self, connection: ServerConnection) -> None:
        self._open.add(connection)
        try:
            await self._send(connection, pack(self.greeting()))
            async for frame in connection:
                self._answering += 1
                try:
                    await self._send(connection, await self._answer(frame))
                finally:
                    self._answering -= 1
        except websockets.ConnectionClosed:
            pass
        finally:
            self._open.discard(connection)

    async def _send(self, connection: ServerConnection, frame: bytes) -> None:
        """A client that does not take its answer is let go."""
        try:
            await asyncio.wait_for(connection.send(frame), self._limits.patience)
        except TimeoutError:
            connection.transport.abort()

    # --------------------------------------------------------------------------------------------------- messages
    def greeting(self) -> dict[str, Any]:
        """The first message of every connection: what the policy takes and gives."""
        policy = self._policy
        inputs: dict[str, Any] = {
            policy.settings.state: {"kind": "state", "dtype": "F32", "shape": [policy.processing.robot.state]}
        }
        for name, size in policy.cameras.items():
            inputs[name] = {"kind": "image", "dtype": "U8", "shape": [*size, 3]}
        return {
            "type": "policy",
            "protocol": PROTOCOL,
            "family": policy.family,
            "inputs": inputs,
            "outputs": {
                policy.settings.action: {
                    "dtype": "F32",
                    "shape": [policy.horizon, len(policy.action_names)],
                    "names": list(policy.action_names),
                }
            },
            "largest_frame": self._limits.frame,
        }

    async def _answer(self, frame: bytes | str) -> bytes:
        identity: Any = None
        try:
            try:
                message = unpack(frame)
            except WireError as error:
                raise Refused("bad_frame", str(error)) from None
            identity = _identity(message.header)
            actions, seconds = await self._in_turn(self._request(message))
            header = {"type": "actions", "protocol": PROTOCOL, "id": identity, "seconds": round(seconds, 6)}
            return pack(header, {self._policy.settings.action: actions})
        except Refused as refusal:
            code, text = refusal.code, str(refusal)
        except Exception:
            logger.exception("An observation could not be acted on.")
            code, text = "internal", "the server failed; its log says how"
        return pack({"type": "error", "protocol": PROTOCOL, "id": identity, "code": code, "message": text[:2000]})

    def _request(self, message: Message) -> Callable[[], np.ndarray]:
        """What a message asks for, checked, still to be done."""
        header = dict(message.header)
        kind, version = header.pop("type", None), header.pop("protocol", None)
        header.pop("id", None)
        if version != PROTOCOL or isinstance(version, bool):
            raise Refused("bad_protocol", f"protocol {version!r}; this server speaks {PROTOCOL}")
        if kind != ACT:
            raise Refused("bad_request", f"type {kind!r}; known is {ACT!r}")
        task, seed, steps = header.pop("task", ""), header.pop("seed", None), header.pop("steps", None)
        if header:
            raise Refused("bad_request", f"unknown keys: {', '.join(sorted(header))[:200]}")
        if not _natural(seed, 0, 2**63 - 1) or not _natural(steps, 1, MOST_STEPS):
            raise Refused(
                "bad_request", f"seed must be from 0 to 2^63 - 1, steps from 1 to {MOST_STEPS}, or both absent"
            )
        try:
            observation = self._policy.observation({**message.tensors, "task": task})
        except DataError as error:
            raise Refused("bad_observation", " ".join(error.problems)) from None

        def act() -> np.ndarray:
            return self._policy.act_on_one(observation, seed=seed, steps=steps)

        return act

    async def _in_turn(self, act: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
        """Act when it is this one's turn. Returns the actions and the seconds they took."""
        limits = self._limits
        if self._ending:
            raise Refused("closing", "the server is being shut down")
        if self._pending > limits.waiting:
            raise Refused("busy", f"{limits.waiting} observations are waiting already")
        self._pending += 1
        try:
            try:
                await asyncio.wait_for(self._turn.acquire(), limits.patience)
            except TimeoutError:
                raise Refused("timeout", f"not acted on within {limits.patience:g} s") from None
            try:
                began = time.perf_counter()
                found = await asyncio.get_running_loop().run_in_executor(self._worker, act)
                return found, time.perf_counter() - began
            except DataError as error:
                raise Refused("bad_observation", " ".join(error.problems)) from None
            finally:
                self._turn.release()
        finally:
            self._pending -= 1


def _identity(header: dict[str, Any]) -> Any:
    """The client's name of its request, which comes back with the answer."""
    found = header.get("id")
    if found is None or (isinstance(found, str) and len(found) <= 200) or _natural(found, 0, 2**63 - 1):
        return found
    raise Refused("bad_request", "id must be a text of at most 200 characters, or a number from 0 to 2^63 - 1")


def _natural(value: Any, least: int, most: int) -> bool:
    return value is None or (type(value) is int and least <= value <= most)


# --------------------------------------------------------------------------------------------------- as a program
def is_loopback(host: str) -> bool:
    """Whether only this machine can connect."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def run(policy: Policy, host: str, port: int, token: str, limits: Limits, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM; `ready(port)` is called once clients may connect."""
    server = PolicyServer(policy, token, limits)
    logging.getLogger("websockets.server").setLevel(logging.CRITICAL)  # a traceback for every port scan
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    ready(await server.start(host, port))
    await ended.wait()
    await server.stop()
