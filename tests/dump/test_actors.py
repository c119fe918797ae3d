"""The number and size of actors, and their placement on a real Ray cluster with several nodes."""

from __future__ import annotations

import pytest
import ray
from ray.cluster_utils import Cluster

import logitstore
from logitstore.cluster.resources import room
from logitstore.dump.actors import size
from logitstore.dump.plan import DumpPlan
from tests.helpers.dump_jobs import arguments, private_folders
from tests.helpers.tiny import functions, write_jsonl


def plan(**given):
    return DumpPlan(target=None, references={}, made_by={}, **given)


def node(cpus, gpus=0):
    return {"CPU": float(cpus), "memory": 1e9} | ({"GPU": float(gpus)} if gpus else {})


@pytest.mark.parametrize(
    ("nodes", "given", "chosen"),
    [
        ([node(16)], {}, (1, 16, 0)),
        ([node(16)], {"num_actors": 3}, (3, 5, 0)),
        ([node(8), node(8)], {}, (1, 8, 0)),
        ([node(8), node(8)], {"num_actors": 2}, (2, 8, 0)),
        ([node(8), node(8)], {"num_actors": 3}, (3, 4, 0)),
        ([node(1), node(6)], {"num_actors": 3}, (3, 2, 0)),
        ([node(8), node(8)], {"num_actors": 3, "cpus_per_actor": 5}, (3, 5, 0)),
        ([node(0.5)], {}, (1, 1, 0)),
        ([{"memory": 1e9}], {}, (1, 1, 0)),
        ([node(4, 2), node(16)], {}, (2, 1, 1)),
        ([node(4, 2), node(16)], {"gpus_per_actor": 0}, (1, 16, 0)),
        ([node(4, 2)], {"gpus_per_actor": 0.6}, (2, 1, 1)),
        ([node(9, 2)], {"gpus_per_actor": 0.3}, (6, 1, 1 / 3)),
        ([node(4, 2)], {"gpus_per_actor": 0.5}, (4, 1, 0.5)),
        ([node(9, 1)], {"gpus_per_actor": 0.1}, (9, 1, 0.1)),
        ([node(9, 1)], {"gpus_per_actor": 0.1, "cpus_per_actor": 0.1}, (10, 0.1, 0.1)),
        ([node(9, 3), node(9, 3)], {"gpus_per_actor": 2}, (2, 1, 2)),
        ([node(2, 8)], {}, (2, 1, 1)),
        ([node(9, 1), node(9, 1)], {"gpus_per_actor": 2}, (1, 1, 2)),
        ([node(9, 1)], {"num_actors": 4}, (4, 1, 1)),
    ],
)
def test_actor_number_and_size_are_chosen_to_fit_the_nodes(nodes, given, chosen):
    assert size(nodes, plan(**given)) == chosen


def test_room_is_counted_by_node_and_by_gpu():
    assert room([node(8), node(8)], 16, 0) == 0
    assert room([node(8), node(8)], 5, 0) == 2
    assert room([node(8, 2)], 1, 0.6) == 2
    assert room([node(0.3)], 0.1, 0) == 3
    assert room([node(8, 1), node(8)], 1, 1) == 1
    assert room([], 1, 0) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Ray cluster of two nodes on this machine, each declared with eight CPUs and two GPUs."""
    with private_folders(tmp_path_factory.mktemp) as patch:
        shape = {"num_cpus": 8, "num_gpus": 2, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=shape)
        try:
            cluster.add_node(**shape)
            patch.setenv("RAY_ADDRESS", cluster.address)
            ray.init(log_to_driver=False)
            cluster.wait_for_nodes()
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.mark.parametrize(
    ("given", "num"),
    [({}, 4), ({"gpus_per_actor": 0.6}, 4), ({"gpus_per_actor": 0}, 1), ({"gpus_per_actor": 0, "num_actors": 3}, 3)],
    ids=str,
)
def test_all_actors_of_a_chosen_size_are_placed(cluster, given, num):
    class Nobody:
        """An actor without any work, which only takes its resources."""

    found, cpus, gpus = size([node["Resources"] for node in ray.nodes()], plan(**given))
    assert found == num
    actors = [ray.remote(Nobody).options(num_cpus=cpus, num_gpus=gpus).remote() for _ in range(found)]
    try:
        assert ray.get([actor.__ray_ready__.remote() for actor in actors], timeout=60) == [True] * num
    finally:
        for actor in actors:
            ray.kill(actor)


def test_actors_without_room_on_any_node_delay_no_shard(cluster, tiny, tmp_path, caplog):
    """Two of three actors are placed, one on each node, and finish all shards."""
    from logitstore.commands import dump as dump_command

    data = write_jsonl(tmp_path / "data.jsonl", functions(24))
    url = tmp_path / "c.zarr"
    given = ["--num_actors", "3", "--cpus_per_actor", "5", "--gpus_per_actor", "0"]
    summary = dump_command.run(arguments(url, tiny, data, *given))
    assert "3 actors with 5 CPUs and 0 GPUs each were requested, but the cluster has room for 2; waiting" in caplog.text
    store = logitstore.open(url)
    assert summary["shards_done"] == store.num_shards >= 5
    assert logitstore.verify(store) == []
