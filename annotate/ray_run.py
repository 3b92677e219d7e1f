"""Running shards on Ray: actors pulled by one queue in the driver.

Ray restarts and retries nothing on its own. All policy is here: a shard that fails or loses its
worker is charged an attempt, a dead worker is replaced, and a shard that used up its attempts is
set aside. Storage, not the driver, decides who was first, so work done twice does no harm.
"""

import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from ..storage.errors import TokenLabelError
from .signals import sigterm_interrupts
from .worker import Receipt, Run, ShardWorker

__all__ = ["Quarantined", "run_on_ray"]

_ATTEMPTS = 3
_IN_FLIGHT = 2  # shards given to a worker: the next one waits at its door
_OBJECT_STORE_BYTES = 100 * 1024 * 1024  # receipts are small


@dataclass(frozen=True)
class Quarantined:
    """A shard that failed on every attempt, and the last reason."""

    shard: int
    reason: str


class _Worker:
    """The actor. Building the annotator is a call of its own, so that its errors arrive whole."""

    def __init__(self, run: Run, search_path: list[str]) -> None:
        sys.path[:] += [entry for entry in search_path if entry not in sys.path]
        self._run = run
        self._shards: ShardWorker | None = None

    def annotate_shard(self, shard: int) -> Receipt:
        if self._shards is None:
            self._shards = ShardWorker(self._run)
        return self._shards.annotate_shard(shard)


@dataclass
class _Slot:
    """A worker and the shards given to it, oldest first: that one is running."""

    actor: Any  # an actor handle: Ray types the methods of actors by the class alone
    shards: deque[int] = field(default_factory=deque)


def run_on_ray(run: Run, shards: Sequence[int], workers: int) -> Iterator[Receipt | Quarantined]:
    """Annotate shards with a number of Ray workers on this machine.

    Yields a receipt for every committed shard as it arrives, and `Quarantined` for each that
    could not be finished.

    Raises:
        TokenLabelError: what no other attempt would mend, such as a full disk.
    """
    started = not ray.is_initialized()
    if started:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Without an address Ray would join whatever cluster it finds.
        ray.init(
            address="local",
            num_cpus=max(workers, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_OBJECT_STORE_BYTES,
        )
    try:
        with sigterm_interrupts():  # only now: starting Ray sets a handler of its own
            yield from _Pool(run, workers).annotate(shards)
    finally:
        if started:
            ray.shutdown()


class _Pool:
    def __init__(self, run: Run, workers: int) -> None:
        self._actor_class = ray.remote(
            num_cpus=1,
            num_gpus=1 if run.device.startswith("cuda") else 0,
            max_restarts=0,
            max_task_retries=0,
        )(_Worker)
        self._arguments = (ray.put(run), sys.path)
        self._workers = workers

    def _hire(self) -> _Slot:
        return _Slot(self._actor_class.remote(*self._arguments))

    def annotate(self, shards: Sequence[int]) -> Iterator[Receipt | Quarantined]:
        queue = deque(shards)
        attempts: Counter[int] = Counter()
        slots = [self._hire() for _ in range(min(self._workers, len(queue)))]
        running: dict[Any, tuple[_Slot, int]] = {}
        while queue or running:
            for slot in slots:
                while queue and len(slot.shards) < _IN_FLIGHT:
                    shard = queue.popleft()
                    slot.shards.append(shard)
                    running[slot.actor.annotate_shard.remote(shard)] = (slot, shard)
            finished, _ = ray.wait(list(running), num_returns=1)
            slot, shard = running.pop(finished[0])
            try:
                receipt: Receipt = ray.get(finished[0])
                slot.shards.remove(shard)
                yield receipt
                continue
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, TokenLabelError):
                    raise error.cause from None
                reason = f"{type(error.cause).__name__}: {error.cause}"
                slot.shards.remove(shard)
                charged = shard
            except ray.exceptions.RayActorError:
                # Everything given to the dead worker comes back; only the oldest was running.
                reason = "its worker died (out of memory, killed, or a crash in native code)"
                charged = slot.shards.popleft()
                queue.extendleft(reversed(slot.shards))
                running = {ref: held for ref, held in running.items() if held[0] is not slot}
                slots = [self._hire() if other is slot else other for other in slots]
            attempts[charged] += 1
            if attempts[charged] < _ATTEMPTS:
                queue.append(charged)
            else:
                yield Quarantined(charged, reason)
