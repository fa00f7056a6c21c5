"""The fork launcher of ranks: results, errors with rank and traceback, timeouts, and a clean test process."""

from __future__ import annotations

import os
import sys
import time

import pytest

from loong_core.testing import ranks
from loong_core.testing.ranks import RankError, run_ranks


def test_results_come_back_in_order_of_rank_and_closures_work():
    offset = {"value": 10}

    def reduce(rank, scale):
        import torch
        import torch.distributed as dist

        tensor = torch.full((3,), float(rank + 1))
        dist.all_reduce(tensor)
        return {"sum": tensor.tolist(), "mine": rank * scale + offset["value"], "world": dist.get_world_size()}

    results = run_ranks(3, reduce, 2, init=True)
    assert [result["mine"] for result in results] == [10, 12, 14]
    assert all(result["sum"] == [6.0, 6.0, 6.0] and result["world"] == 3 for result in results)


def test_ranks_see_the_launchers_environment_and_the_cpu_device():
    def look(rank):
        import torch

        from loong_core.backends import cpu_device

        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "EXTRA")
        values = {name: os.environ[name] for name in names}
        return [values, cpu_device.active(), "megatron.core.optimizer" in sys.modules, torch.get_num_threads()]

    results = run_ranks(2, look, env={"EXTRA": "yes"})
    for rank, (values, active, imported, threads) in enumerate(results):
        assert values["RANK"] == values["LOCAL_RANK"] == str(rank)
        assert values["WORLD_SIZE"] == values["LOCAL_WORLD_SIZE"] == "2"
        assert values["EXTRA"] == "yes"
        assert active and imported and threads == 1
    assert results[0][0]["MASTER_PORT"] == results[1][0]["MASTER_PORT"]


def test_environment_rendezvous_works_too():
    def join(rank):
        import torch.distributed as dist

        dist.init_process_group("gloo")
        return dist.get_rank()

    assert run_ranks(2, join) == [0, 1]


def test_the_test_process_stays_clean():
    import torch

    from loong_core.backends import cpu_device

    before = dict(os.environ)
    run_ranks(2, lambda rank: rank, init=True)
    assert not cpu_device.active()
    assert not torch.distributed.is_initialized()
    assert dict(os.environ) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_error_names_the_rank_and_shows_its_traceback_and_output():
    def fail(rank):
        import torch.distributed as dist

        print(f"about to fail on {rank}")
        if rank == 1:
            raise ValueError("the reason")
        dist.barrier()

    with pytest.raises(RankError) as caught:
        run_ranks(2, fail, init=True)
    text = str(caught.value)
    assert "rank 1 of 2 raised" in text and "ValueError: the reason" in text and "about to fail on 1" in text


def test_a_rank_that_dies_is_named_with_its_code():
    def die(rank):
        if rank == 0:
            os._exit(7)
        time.sleep(60)

    start = time.monotonic()
    with pytest.raises(RankError, match="rank 0 of 2 ended with code 7"):
        run_ranks(2, die)
    assert time.monotonic() - start < 30


def test_a_rank_that_hangs_is_killed_after_the_timeout(tmp_path):
    def hang(rank):
        (tmp_path / str(rank)).write_text(str(os.getpid()))
        if rank == 1:
            time.sleep(600)

    with pytest.raises(RankError, match="rank 1 of 2 was not done"):
        run_ranks(2, hang, timeout=1.0)
    pid = int((tmp_path / "1").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_result_that_is_no_json_is_an_error():
    with pytest.raises(RankError, match="not JSON serializable"):
        run_ranks(1, lambda rank: object())


def test_free_port_is_free():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", ranks.free_port()))
