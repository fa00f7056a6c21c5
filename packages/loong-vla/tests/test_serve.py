"""A policy server under honest clients, hostile ones, slow ones and many; and the client of the docs against it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import websockets
from policy_tiny import make_dataset, make_run
from websockets.asyncio.client import ClientConnection, connect

from loong_core.errors import RunError
from loong_vla.lerobot.layout import Dataset
from loong_vla.policy import Observation, Policy, load_policy
from loong_vla.serve import Limits, PolicyServer, is_loopback
from loong_vla.wire import pack, unpack

TOKEN = "correct horse".replace(" ", "-")
PAGE = Path(__file__).parents[3] / "docs" / "robot-policies.md"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = make_run(tmp_path_factory.mktemp("runs") / "a", dataset).folder
    return found


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(folder)


class Slow:
    """A policy whose actions take as long as a test wants, and say which observation they are of."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self.go, self.busy, self.most = policy, threading.Event(), 0, 0
        self.acted: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def act_on_one(self, observation: Observation, **settings: Any) -> np.ndarray:
        self.busy += 1
        self.most = max(self.most, self.busy)
        assert self.go.wait(30)
        self.busy -= 1
        self.acted.append(float(observation.state[0]))
        if observation.task == "break":
            raise RuntimeError("secret")
        return np.full((8, 7), observation.state[0], np.float32)


def observed(value: float = 0.25) -> dict[str, np.ndarray]:
    return {
        "observation.state": np.full(8, value, np.float32),
        "observation.images.front": np.full((24, 32, 3), 60, np.uint8),
        "observation.images.wrist": np.full((20, 20, 3), 160, np.uint8),
    }


def request(value: float = 0.25, **header: Any) -> bytes:
    return pack({"type": "act", "protocol": 1, "task": "push", **header}, observed(value))


def serving(policy: Any, talk: Callable[[str, PolicyServer], Awaitable[None]], **limits: Any) -> None:
    """Run `talk(url, server)` against a server, which is stopped afterwards."""

    async def main() -> None:
        server = PolicyServer(policy, TOKEN, Limits(**limits))
        port = await server.start("127.0.0.1", 0)
        try:
            await talk(f"ws://127.0.0.1:{port}", server)
        finally:
            await server.stop()

    asyncio.run(asyncio.wait_for(main(), 60))


def joined(url: str, token: str = TOKEN) -> connect:
    return connect(url, additional_headers={"Authorization": f"Bearer {token}"}, compression="deflate", proxy=None)


async def ask(client: ClientConnection, frame: bytes | str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    await client.send(frame)
    return unpack(await client.recv())


def test_it_answers_as_the_policy_does(policy: Policy) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as client:
            assert not client.protocol.extensions, "a small frame must not unfold into a large one"
            greeting, _ = unpack(await client.recv())
            assert greeting["type"] == "policy" and greeting["protocol"] == 1 and greeting["family"] == "pi05"
            assert greeting["inputs"]["observation.state"] == {"kind": "state", "dtype": "F32", "shape": [8]}
            assert greeting["inputs"]["observation.images.front"]["shape"] == [24, 32, 3]
            assert greeting["outputs"]["action"]["shape"] == [8, 7]
            header, tensors = await ask(client, request(id="a", seed=3))
            assert header.pop("seconds") > 0
            assert header == {"type": "actions", "protocol": 1, "id": "a"}
            np.testing.assert_array_equal(tensors["action"], policy.act({**observed(), "task": "push"}, seed=3))
            header, other = await ask(client, request(0.5, id=7, seed=3, steps=2))
            assert header["id"] == 7 and (other["action"] != tensors["action"]).any()

    serving(policy, talk)


EVIL = {
    "bad_frame": [
        "text",
        b"",
        b"\1\2",
        struct.pack("<I", 2**31),
        request()[:-1],
        request()[:40],
        pack({"type": "act", "protocol": 1}) + b"\xff" * 30,
        b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.",
    ],
    "bad_protocol": [pack({}), request(protocol=2), request(protocol=True), request(protocol="1")],
    "bad_request": [
        request(type="run"),
        request(code="import os"),
        request(seed=-1),
        request(seed=1.5),
        request(seed=True),
        request(seed=2**64),
        request(steps=0),
        request(steps=10**6),
        request(id=[1]),
        request(id="x" * 201),
    ],
    "bad_observation": [
        pack({"type": "act", "protocol": 1}),
        request(float("nan")),
        request(float("inf")),
        request(task=5),
        request(task="a" * 20_000),
        pack({"type": "act", "protocol": 1}, {**observed(), "more": np.zeros(1)}),
        pack({"type": "act", "protocol": 1}, {**observed(), "observation.state": np.zeros((8, 1))}),
        pack({"type": "act", "protocol": 1}, {**observed(), "observation.state": np.full(8, 1e300)}),
        pack({"type": "act", "protocol": 1}, {**observed(), "observation.images.front": np.zeros((24, 32, 3))}),
        pack({"type": "act", "protocol": 1}, {**observed(), "observation.images.front": np.zeros((0, 9, 3), np.uint8)}),
        pack(
            {"type": "act", "protocol": 1}, {**observed(), "observation.images.front": np.zeros((1, 9999, 3), np.uint8)}
        ),
    ],
}


def test_wrong_messages_are_refused_and_harm_nobody(policy: Policy) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as client:
            await client.recv()
            expected = (await ask(client, request(seed=1)))[1]["action"]
            for code, frames in EVIL.items():
                for number, frame in enumerate(frames):
                    header, tensors = await ask(client, frame)
                    assert (header["type"], header["code"]) == ("error", code), (code, number, header)
                    assert header["message"] and not tensors
            np.testing.assert_array_equal((await ask(client, request(seed=1)))[1]["action"], expected)

    serving(policy, talk)


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xe4"]
)
def test_without_the_token_nobody_gets_in(policy: Policy, given: str | None) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        headers = {} if given is None else {"Authorization": given}
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with connect(url, additional_headers=headers, proxy=None):
                pass
        assert caught.value.response.status_code == 401
        assert TOKEN not in str(caught.value.response.body)
        async with joined(url) as client:
            await client.recv()

    serving(policy, talk)
    with pytest.raises(RunError, match="needs a token"):
        PolicyServer(policy, "")


def test_large_frames_end_the_connection_of_their_sender_alone(policy: Policy) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as honest, joined(url) as client:
            await honest.recv()
            await client.recv()
            await client.send(b"\0" * 20_001)
            with pytest.raises(websockets.ConnectionClosedError) as caught:
                await client.recv()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1009
            assert (await ask(honest, request(seed=1)))[0]["type"] == "actions"

    serving(policy, talk, frame=20_000)


def test_one_at_a_time_few_wait_the_rest_is_refused(policy: Policy) -> None:
    slow = Slow(policy)

    async def talk(url: str, server: PolicyServer) -> None:
        clients = [await joined(url) for _ in range(4)]
        for client in clients:
            await client.recv()
        for number, client in enumerate(clients[:3]):
            await client.send(request(float(number)))
            await asyncio.sleep(0.1)
        header, _ = await ask(clients[3], request(9.0))
        assert header["code"] == "busy" and "2 observations are waiting" in header["message"]
        slow.go.set()
        for number, client in enumerate(clients[:3]):
            assert unpack(await client.recv()).tensors["action"][0, 0] == number
        assert (await ask(clients[3], request(9.0)))[0]["type"] == "actions"
        for client in clients:
            await client.close()

    serving(slow, talk, waiting=2)
    assert slow.most == 1 and slow.acted == [0, 1, 2, 9]


def test_whoever_waits_too_long_is_told(policy: Policy) -> None:
    slow = Slow(policy)

    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as first, joined(url) as second, joined(url) as third:
            for client in (first, second, third):
                await client.recv()
            await first.send(request(1.0))
            await asyncio.sleep(0.05)
            await third.send(request(3.0))
            await asyncio.sleep(0.05)
            await third.close()  # gone, but its observation still waits
            header, _ = await ask(second, request(2.0))
            assert header["code"] == "timeout"
            slow.go.set()
            assert unpack(await first.recv()).tensors["action"][0, 0] == 1
            assert (await ask(second, request(4.0)))[1]["action"][0, 0] == 4

    serving(slow, talk, patience=0.4)
    assert 2 not in slow.acted and slow.most == 1


def test_failures_of_the_policy_are_not_told_in_detail(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    slow = Slow(policy)
    slow.go.set()

    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as client:
            await client.recv()
            header, _ = await ask(client, request(task="break", id=3))
            assert header["code"] == "internal" and header["id"] == 3 and "secret" not in header["message"]
            assert (await ask(client, request(2.0)))[0]["type"] == "actions"

    serving(slow, talk)
    assert "secret" in caplog.text


def test_clients_that_stop_in_mid_frame_are_let_go(policy: Policy) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as client:
            await client.recv()
            client.transport.write(b"\x82\xfe\x10\x00\0\0\0\0half of a frame")
            began = time.monotonic()
            await asyncio.wait_for(client.wait_closed(), 10)
            assert time.monotonic() - began < 5
        await left(server)

    serving(policy, talk, silence=0.2)


def test_there_is_room_for_so_many_clients(policy: Policy) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as one, joined(url) as two:
            await one.recv()
            await two.recv()
            with pytest.raises(websockets.InvalidStatus) as caught:
                async with joined(url):
                    pass
            assert caught.value.response.status_code == 503
        await left(server)
        async with joined(url) as three:
            await three.recv()

    serving(policy, talk, connections=2)


def test_half_open_connections_end(policy: Policy) -> None:
    """Somebody connects and never asks for anything; somebody speaks no HTTP."""

    async def talk(url: str, server: PolicyServer) -> None:
        for words in (
            b"",
            b"GET / HTTP/1.1\r\nHost: a\r\n",
            b"\xff\xfe\0\0\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 9999,
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
            writer.write(words)
            await asyncio.wait_for(_drained(reader), 10)
            writer.close()
        async with joined(url) as client:
            await client.recv()

    serving(policy, talk, handshake=0.3)


async def left(server: PolicyServer) -> None:
    """Wait until the server has noticed that all clients are gone."""
    deadline = time.monotonic() + 10
    while server._open:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def _drained(reader: asyncio.StreamReader) -> None:
    try:
        while await reader.read(4096):
            pass
    except ConnectionError:
        pass


def test_a_server_that_stops_answers_what_is_under_way(policy: Policy) -> None:
    slow = Slow(policy)

    async def talk(url: str, server: PolicyServer) -> None:
        async with joined(url) as client, joined(url) as idle:
            await client.recv()
            await idle.recv()
            await client.send(request(5.0))
            await asyncio.sleep(0.1)
            stopping = asyncio.create_task(server.stop())
            await asyncio.sleep(0.1)
            slow.go.set()
            assert unpack(await client.recv()).tensors["action"][0, 0] == 5
            await stopping
            with pytest.raises(websockets.ConnectionClosedOK) as caught:
                await idle.recv()
            assert caught.value.rcvd is not None and caught.value.rcvd.code == 1001
        with pytest.raises(OSError):
            async with joined(url):
                pass

    serving(slow, talk)


def test_addresses() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "robot.local", "")))


def test_a_port_that_is_taken(policy: Policy) -> None:
    async def talk(url: str, server: PolicyServer) -> None:
        other = PolicyServer(policy, TOKEN)
        with pytest.raises(RunError, match="cannot listen on 127.0.0.1"):
            await other.start("127.0.0.1", int(url.rpartition(":")[2]))
        await other.stop()

    serving(policy, talk)


def test_the_client_of_the_docs(folder: Path, tmp_path: Path) -> None:
    """`loong serve` as a program, the script of the page as another, and the end by a signal."""
    environment = {**os.environ, "LOONG_SERVE_TOKEN": "a-token-from-outside"}
    words = [sys.executable, "-m", "loong_core", "serve", str(folder), "--port", "0", "--backend", "cpu", "--json"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(words, stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line, server.stderr and server.stderr.read()
        told = json.loads(line)
        assert told["url"].startswith("ws://127.0.0.1:") and told["token"] == "a-token-from-outside"
        blocks = re.findall(r"```python title=\"robot.py\"\n(.*?)```", PAGE.read_text(), re.DOTALL)
        assert len(blocks) == 1
        (tmp_path / "robot.py").write_text(blocks[0])
        client = [sys.executable, "robot.py", told["url"]]
        done = subprocess.run(client, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "(8, 7)" in done.stdout and "error" not in done.stdout
        wrong = {**environment, "LOONG_SERVE_TOKEN": "another-token"}
        done = subprocess.run(client, capture_output=True, text=True, cwd=tmp_path, env=wrong, timeout=120)
        assert done.returncode != 0 and "401" in done.stderr
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=60)
        assert server.returncode == 0 and "Traceback" not in errors, errors
    finally:
        server.kill()
        server.communicate()
