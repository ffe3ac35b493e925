"""Several processes: joining them, and which of them speaks and writes."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

import jax
from absl import logging

from minigpt5_jax.training.meeting import COORDINATOR, COUNT, NUMBER, DistributedError, meet

AUTO = "auto"
"""The address that leaves all three to JAX: no variable says that a Cloud TPU machine is one of several."""

JOIN_SECONDS = 60  # that JAX has to join processes that are all there


def initialize(environ: Mapping[str, str] = os.environ, *, timeout_s: int = 300) -> bool:
    """Join the processes of a run if the environment asks for several; call before any other JAX call.

    Either all of ``COORDINATOR_ADDRESS`` (host:port), ``NUM_PROCESSES`` and ``PROCESS_ID`` are set, or the
    first alone to ``auto``, or a scheduler JAX knows has started more than one process; anything else is a
    single process.

    Args:
      timeout_s: to wait for each other.

    Returns:
      Whether processes were joined.

    Raises:
      DistributedError: some of the three are missing or no numbers, a process does not come, or two of them
        have one number.  Of processes that a scheduler started JAX itself ends those that wait in vain.
    """
    arguments = _explicit(environ)
    if arguments is None and not _scheduled(environ):
        return False
    if arguments:
        meet(*arguments.values(), timeout_s=timeout_s)
    try:
        within = JOIN_SECONDS if arguments else timeout_s
        jax.distributed.initialize(**(arguments or {}), initialization_timeout=within)
    except (RuntimeError, ValueError) as error:
        remedy = (
            f"check that {COORDINATOR} is reachable from every host and that as many processes as announced "
            "were started"
        )
        if arguments == {}:
            remedy = (
                f"{COORDINATOR}={AUTO} is for Cloud TPU machines and schedulers that JAX knows; elsewhere "
                f"set {COORDINATOR}, {COUNT} and {NUMBER}, or none of them for one process"
            )
        raise DistributedError(f"cannot join the processes of this run ({error}); {remedy}") from error
    # What JAX says when it aborts is enough: Python's stacks of all threads are fifty lines more.
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    logging.info(
        "process %d of %d, %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
    )
    return True


def main_process() -> bool:
    """Whether this process writes metrics, images and messages."""
    return jax.process_index() == 0


def _explicit(environ: Mapping[str, str]) -> dict[str, object] | None:
    """Arguments from the three variables, or None where none of them is set."""
    given = {name: environ.get(name, "") for name in (COORDINATOR, COUNT, NUMBER)}
    if not any(given.values()):
        return None
    if given == {COORDINATOR: AUTO, COUNT: "", NUMBER: ""}:
        return {}
    if missing := [name for name, value in given.items() if not value]:
        raise DistributedError(
            f"{', '.join(missing)} not set, but {COORDINATOR}, {COUNT}, {NUMBER} go together"
        )
    if not (given[COUNT].isdigit() and given[NUMBER].isdigit() and int(given[NUMBER]) < int(given[COUNT])):
        raise DistributedError(
            f"{NUMBER}={given[NUMBER]!r} must be a number from 0 to {COUNT} - 1, {COUNT}={given[COUNT]!r}"
        )
    return {
        "coordinator_address": given[COORDINATOR],
        "num_processes": int(given[COUNT]),
        "process_id": int(given[NUMBER]),
    }


def _scheduled(environ: Mapping[str, str]) -> bool:
    """Whether a scheduler that JAX can ask started several processes (inside ``srun``, ``mpirun``, a pod)."""
    hosts = environ.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    counts = [environ.get(name, "1") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    return max(hosts, *map(int, counts)) > 1
