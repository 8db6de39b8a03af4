import json

import pytest
import torch.distributed as dist

from distributed.watchdog import Heartbeat, Watchdog


@pytest.fixture
def dogs():
    """The watchdogs of three ranks in one process, with a common store. They are not started."""
    store = dist.HashStore()
    return [Watchdog(store, rank, 3, timeout=600) for rank in range(3)]


def exchange(dogs, *, alive=(0, 1, 2)):
    """Send a heartbeat from each rank that is alive, and read them as rank 0."""
    for dog in dogs:
        if dog.rank in alive:
            dog.send_heartbeat()
    dogs[0].read_heartbeats()


def test_the_rank_that_has_entered_the_fewest_stages_is_named(dogs):
    for dog in dogs:
        dog.enter_stage("waiting for the data of step 8")
    for dog in (dogs[0], dogs[2]):
        dog.enter_stage("the forward pass of step 8")
    exchange(dogs)
    assert dogs[0].diagnose().startswith(f"rank 1 ({dogs[1].host}) is at waiting for the data of")


def test_among_ranks_in_one_stage_the_one_outside_a_collective_is_named(dogs):
    exchange(dogs)
    for dog in dogs:
        heartbeat = Heartbeat(9, 1, 1, f"rank {dog.rank}", "step 8", "line", dog.rank != 2)
        dog.store.set(dog.keys[dog.rank], json.dumps(heartbeat))
    dogs[0].read_heartbeats()
    assert dogs[0].diagnose() == "rank 2 is at step 8, line"


def test_all_are_named_if_none_is_behind(dogs):
    for dog in dogs:
        dog.enter_stage("the backward pass")
    exchange(dogs)
    assert dogs[0].diagnose().startswith("all ranks are at the backward pass")


def test_a_rank_whose_heartbeats_stop_is_named_first(dogs, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("distributed.watchdog.time.monotonic", lambda: now[0])
    exchange(dogs)
    assert dogs[0].dead_ranks() == ""
    dogs[1].enter_stage("the loss")  # rank 2 is behind, but alive; rank 1 has got further and died
    dogs[0].enter_stage("the loss")
    exchange(dogs)
    now[0] += 3 * dogs[0].interval
    exchange(dogs, alive=(0, 2))
    assert dogs[0].dead_ranks() == (
        f"rank 1 ({dogs[1].host}), last seen at the loss, no longer responds"
    )
    assert dogs[0].diagnose() == dogs[0].dead_ranks()


def test_samples_are_progress_within_a_stage(dogs, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("distributed.watchdog.time.monotonic", lambda: now[0])
    exchange(dogs)
    now[0] = 100.0
    dogs[1].on_sample()
    exchange(dogs)
    progress_at = {rank: seen.progress_at for rank, seen in dogs[0].seen.items()}
    assert progress_at == {0: 0.0, 1: 100.0, 2: 0.0}
