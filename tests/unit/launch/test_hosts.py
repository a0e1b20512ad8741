"""Catches: ranks numbered across hosts without a word, a group that crosses hosts called local, a failed collective
without its operation or group, a host called silent that answers or that could never be asked.
"""

from __future__ import annotations

import socket
import threading
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from lightning_npu_tp.devices.fault_text import may_be_lost_peer
from lightning_npu_tp.errors import ConfigError
from lightning_npu_tp.launch import host_watch
from lightning_npu_tp.launch.host_watch import HostWatch, meet_hosts
from lightning_npu_tp.launch.hosts import Host, crossings, groups_of, hosts_of, name_hosts, ranks_in_words
from lightning_npu_tp.parallel.layout import Layout
from lightning_npu_tp.trainer.explain_collective import about_collective, failed_collective

TWO_HOSTS = hosts_of(["a", "a", "b", "b"])


# --- which ranks lie where ----------------------------------------------------------------------


def test_consecutive_ranks_make_hosts_in_order() -> None:
    assert TWO_HOSTS == (Host("a", (0, 1)), Host("b", (2, 3)))
    assert hosts_of(["b", "a"]) == (Host("b", (0,)), Host("a", (1,)))


def test_ranks_dealt_out_host_by_host_are_refused_with_ranks_and_hosts() -> None:
    with pytest.raises(ConfigError, match=r"host a \(ranks 0 and 2\) has rank 1 of host b in between.*block"):
        hosts_of(["a", "b", "a", "b"])


def test_hosts_of_one_name_are_told_apart_by_their_node_rank() -> None:
    assert name_hosts([(0, "x"), (0, "x"), (1, "x"), (2, "y")]) == ["x [node 0]", "x [node 0]", "x [node 1]", "y"]


def test_ranks_read_as_people_write_them() -> None:
    words = [ranks_in_words(ranks) for ranks in ([3], [0, 2], range(4, 8), [0, 2, 4])]
    assert words == ["rank 3", "ranks 0 and 2", "ranks 4 to 7", "ranks 0, 2, 4"]


def test_groups_are_those_of_the_device_meshes() -> None:
    layout = Layout(data=4, tensor=2, expert=4)
    grid, experts = torch.arange(8).view(4, 2), torch.arange(8).view(2, 4)
    assert groups_of(layout) == {
        "tensor": grid.tolist(),
        "data": grid.T.tolist(),
        "expert": experts.tolist(),
        "expert replica": experts.T.tolist(),
    }


def test_the_summary_says_which_groups_cross_hosts() -> None:
    assert crossings(TWO_HOSTS, Layout(data=2, tensor=2, expert=2)) == [
        "tensor groups inside a host",
        "data groups cross 2 hosts (a, b)",
        "expert groups inside a host",
        "expert replica groups cross 2 hosts (a, b)",
    ]
    four = hosts_of([name for name in "abcd" for _ in range(2)])
    assert crossings(four, Layout(data=8, tensor=1, expert=4)) == [
        "data groups cross 4 hosts (a, b, c, d)",
        "expert groups cross up to 2 of 4 hosts",
        "expert replica groups cross up to 2 of 4 hosts",
    ]
    (tensor, _) = crossings(TWO_HOSTS, Layout(data=1, tensor=4, expert=4))
    assert tensor.startswith("tensor groups cross 2 hosts (a, b)") and "tensor_parallel_size of [1, 2]" in tensor
    assert crossings(hosts_of(["a", "a"]), Layout(data=2, tensor=1, expert=1)) == []


# --- asking the other hosts -----------------------------------------------------------------------


def meet_all(nodes: list[int]) -> list[HostWatch]:
    """`meet_hosts` of every rank, each in a thread, over one store in memory."""
    store = dist.TCPStore("127.0.0.1", 0, len(nodes), True, timedelta(seconds=10), wait_for_workers=False)
    watches: dict[int, HostWatch] = {}

    def meet(rank: int) -> None:
        mine = dist.TCPStore("127.0.0.1", store.port, len(nodes), False, timedelta(seconds=10), wait_for_workers=False)
        environment = SimpleNamespace(
            global_rank=lambda: rank,
            world_size=lambda: len(nodes),
            node_rank=lambda: nodes[rank],
            main_address="127.0.0.1",
            main_port=store.port,
        )
        watches[rank] = meet_hosts(environment, dist.PrefixStore("test", mine))  # type: ignore[arg-type]

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(len(nodes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [watches[rank] for rank in range(len(nodes))]


def test_every_rank_learns_the_hosts_and_a_host_answers_until_its_first_rank_is_gone() -> None:
    watches = meet_all([0, 0, 1, 1])
    try:
        assert {watch.hosts for watch in watches} == {watches[0].hosts} and len(watches[0].hosts) == 2
        assert [str(answer.host.ranks) + answer.state for answer in watches[1].ask()] == ["(2, 3)here"]
        watches[2].close()
        (answer,) = watches[1].ask()
        assert answer.state == "ended"
    finally:
        for watch in watches:
            watch.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name == "host watch" and thread.join(2)]


def test_a_single_host_opens_no_port() -> None:
    watches = meet_all([0, 0])
    assert len(watches[0].hosts) == 1 and watches[0]._listener is None and watches[0].ask() == []


def test_a_host_that_takes_calls_and_says_nothing_is_silent_and_a_stranger_is_no_answer(monkeypatch) -> None:
    host, endpoint = Host("b", (1,)), host_watch._Endpoint
    with socket.create_server(("127.0.0.1", 0)) as mute:
        answer = host_watch._ask_host(host, endpoint("127.0.0.1", mute.getsockname()[1], "token"), 0.2)
    assert answer.state == "silent" and "timed out" in answer.reason
    (watch, other) = meet_all([0, 1])
    try:
        port = watch._listener.getsockname()[1]
        assert host_watch._ask_host(host, endpoint("127.0.0.1", port, "0123456789abcdef"), 1.0).state == "ended"
    finally:
        watch.close()
        other.close()


def test_a_host_that_could_not_be_asked_at_the_start_is_never_called_silent(monkeypatch) -> None:
    monkeypatch.setattr(host_watch, "_ask_host", lambda host, *_: host_watch.Answer(host, "silent", "filtered"))
    watches = meet_all([0, 1])
    try:
        assert [watch.ask() for watch in watches] == [[], []]
    finally:
        for watch in watches:
            watch.close()


# --- what a failed collective is called --------------------------------------------------------------


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


GAVE_UP = "[/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 15000ms for recv operation to complete"


def give_up(*_) -> None:
    """What gloo does when a peer is silent."""
    raise RuntimeError(GAVE_UP)


def explain(error: BaseException, watch: HostWatch | None) -> str | None:
    """What is noted on the error; None if it is no failed collective."""
    collective = failed_collective(error)
    return None if collective is None else about_collective(error, collective, watch)


def failure_of(call) -> BaseException:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def test_operation_group_rank_host_and_silent_host_are_named(alone, monkeypatch) -> None:
    group = dist.new_group([0], group_desc="mesh_data_parallel")
    monkeypatch.setattr(dist.ProcessGroup, "allreduce", give_up)
    error = failure_of(lambda: dist.all_reduce(torch.ones(1), group=group))
    watch = HostWatch(TWO_HOSTS, rank=1)
    answers = [host_watch.Answer(TWO_HOSTS[1], "silent", "No route to host")]
    monkeypatch.setattr(watch, "ask", lambda: answers)
    text = explain(error, watch)
    assert may_be_lost_peer(error) and text is not None
    assert text.startswith(
        "all_reduce over the data group (rank 0) failed on rank 1 of host a: Timed out waiting 15000ms for recv"
    )
    assert "Host b (ranks 2 and 3) is silent, asked once more as well (No route to host)" in text

    answers[:] = [host_watch.Answer(TWO_HOSTS[1], "ended")]
    assert "Host b (ranks 2 and 3) answers, but its processes of this run have ended" in (explain(error, watch) or "")
    answers[:] = [host_watch.Answer(TWO_HOSTS[1], "here")]
    assert "Every host answers" in (explain(error, watch) or "")
    answers[:] = []
    assert "could not be reached at the start either: b (ranks 2 and 3)" in (explain(error, watch) or "")
    assert "All ranks are on this host" in (explain(error, None) or "")


def test_an_operation_waited_for_later_is_still_named_with_its_group(alone) -> None:
    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.group = dist.group.WORLD
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("Connection closed by peer [10.0.0.2]:4711")

    error = failure_of(lambda: Exchange.apply(torch.ones(1, requires_grad=True)).backward())
    text = explain(error, None)
    assert text is not None and text.startswith(
        "the operation waited for in backward over the world group (rank 0) failed: Connection"
    )


def test_ranks_that_never_met_are_told_what_to_look_at() -> None:
    patience = timedelta(seconds=0.1)
    error = failure_of(lambda: next(dist.rendezvous("tcp://127.0.0.1:1", rank=1, world_size=2, timeout=patience)))
    assert (explain(error, None) or "").startswith("The ranks did not meet: The client socket has")


@pytest.mark.parametrize("error", [ValueError(GAVE_UP), RuntimeError("shape mismatch"), RuntimeError(GAVE_UP)])
def test_errors_that_are_no_failed_collective_stay_what_they_are(error) -> None:
    def call() -> None:
        raise error

    # The last one says it timed out, but was never near a process group.
    assert explain(failure_of(call), None) is None
