"""Who works: processes on this machine, or a Dask cluster by its address."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cp_debug.errors import BackendUnavailable, CpdebugError, InputError
from cp_debug.optional import require

if TYPE_CHECKING:
    from distributed import Client, LocalCluster


_QUIET = {"distributed.admin.low-level-log-length": 10}
"""Dask keeps its last messages, tasks included, for its developers: here they are what would grow."""


class ClusterLost(CpdebugError):
    """The scheduler went away and did not come back; everything finished so far is in the log."""

    exit_code = 3


@contextmanager
def local_workers(count: int, *, gpu: bool = False) -> Iterator[Client]:
    """``count`` processes here, one task and one thread each, so that results do not depend on how many they are.

    gpu: one process a GPU at most, each seeing its own, with the resource ``GPU=1``. Raises BackendUnavailable where
    there is no GPU, MissingPackage without Dask.
    """
    require("distributed", "dask")
    import dask
    from distributed import Client

    options: dict[str, Any] = {
        "n_workers": 0,
        "threads_per_worker": 1,
        "processes": True,
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
        "scheduler_kwargs": {"allowed_failures": 0},  # the queue counts the tries: see ``queue``
    }
    devices = _devices() if gpu else 0
    if gpu:
        options["resources"] = {"GPU": 1}
        count = min(count, devices)
    # One task a worker, none waiting behind it: a task that kills its worker then takes no other along.
    with (
        dask.config.set({**_QUIET, "distributed.scheduler.worker-saturation": 1.0}),
        _cluster(devices, options) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        cluster.scale(count)
        client.wait_for_workers(count)
        yield client


def _cluster(devices: int, options: dict[str, Any]) -> LocalCluster:
    from distributed import LocalCluster

    class Pinned(LocalCluster):
        """Worker n sees GPU n alone."""

        def new_worker_spec(self) -> dict[int, dict[str, Any]]:
            ((name, spec),) = super().new_worker_spec().items()
            environment = {"CUDA_VISIBLE_DEVICES": str(name % devices)}
            return {name: {**spec, "options": {**spec["options"], "env": environment}}}

    return (Pinned if devices else LocalCluster)(**options)


def _devices() -> int:
    import torch

    if count := torch.cuda.device_count():
        return count
    raise BackendUnavailable("cuda", "torch sees no CUDA device here", nearest="--cluster with a worker that has GPU=1")


@contextmanager
def remote_workers(address: str) -> Iterator[Client]:
    """The workers of a scheduler, ``tcp://host:8786``. Raises InputError when nothing answers there, MissingPackage."""
    require("distributed", "dask")
    import dask
    from distributed import Client

    with dask.config.set(_QUIET):
        try:
            client = Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            expected = "expected tcp://HOST:PORT"
            raise InputError(f"--cluster: no scheduler answers at {address} ({error}); {expected}") from None
        with client:
            yield client
