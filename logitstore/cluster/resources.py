"""Joins a Ray cluster. Computes the CPUs and GPUs of a worker, and how many workers the cluster has room for."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def join_cluster() -> None:
    """Joins the Ray cluster of the submitted job or the one at RAY_ADDRESS; without either, starts a local cluster.

    Does nothing if this process has already joined a cluster.

    Raises:
        ValueError: No cluster answers at RAY_ADDRESS.
    """
    import ray

    if ray.is_initialized():
        return
    try:
        ray.init(logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ValueError(
            f"RAY_ADDRESS must be the address of a running cluster, got RAY_ADDRESS={os.environ.get('RAY_ADDRESS')} "
            f"({error}); start that cluster, or unset RAY_ADDRESS to use this machine alone"
        ) from error


def room(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """Returns the number of actors that nodes can hold when they are empty. An actor is never split over nodes.

    Args:
        nodes: For each node, its number of CPUs under the key "CPU" and its number of GPUs under the key "GPU".
        cpus: CPUs of an actor, above 0.
        gpus: GPUs of an actor; a fraction is a share of a single GPU.
    """
    num = 0
    for node in nodes:
        here = times(cpus, node.get("CPU", 0))
        if gpus:
            # A fraction must fit on a single GPU, so the leftovers of several GPUs do not add up.
            num_gpus = int(node.get("GPU", 0))
            here = min(here, num_gpus * times(gpus, 1) if gpus <= 1 else times(gpus, num_gpus))
        num += here
    return num


def times(part: float, whole: float) -> int:
    """Returns the number of times that `part` fits into `whole`."""
    return int(whole / part + 1e-6)  # 1e-6 makes up for float rounding: 0.3 / 0.1 is just below 3.


def worker_resources(num_workers: int, *, use_gpus: bool) -> tuple[dict[str, float], int]:
    """Chooses the resources of each training worker: a GPU if the cluster has GPUs, otherwise a share of its CPUs.

    Args:
        num_workers: Number of workers.
        use_gpus: Whether workers may have GPUs.

    Returns:
        CPUs and GPUs of each worker, under the keys "CPU" and "GPU", and the largest number of workers that fit on the
        cluster's nodes when the nodes are empty. This largest number assumes one CPU per worker, and also one GPU per
        worker if workers get GPUs.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = float(use_gpus and any(node.get("GPU", 0) >= 1 for node in nodes))
    most = room(nodes, 1.0, gpus)
    if gpus:
        return {"CPU": 1.0, "GPU": 1.0}, most
    # Each worker gets the largest number of CPUs with which all workers fit, or 1 if not all workers fit.
    largest = int(max(node.get("CPU", 0) for node in nodes))
    shares = (float(cpus) for cpus in range(largest, 0, -1) if room(nodes, cpus, 0) >= num_workers)
    return {"CPU": next(shares, 1.0)}, most
