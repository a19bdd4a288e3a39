"""``qaa compare`` in several processes, as ``torchrun`` and ``accelerate launch`` start them.

Process 0 prepares, announces the plan and writes the report. Every process runs what nobody has run or claimed. A claim
is a lock on one byte of a file, which the system lifts when its holder ends, however that happens.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import CompareError

PAUSE = 0.2  # seconds between two looks at what another process has to finish

_PLAN = "qaa/plan"  # a key of the launcher's store
_PLACE = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE NODE_RANK MASTER_ADDR MASTER_PORT"
_PREFIXES = ("ROLE_", "TORCHELASTIC_", "ACCELERATE_")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a launcher; alone without one."""

    rank: int = 0
    world: int = 1
    local: int = 0
    store: Any = None

    @classmethod
    def join(cls) -> Ranks:
        """Reads the launcher's variables and removes them: every training is one of a single process."""
        try:
            rank, world, local = (
                int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
            )
            ranks = cls(rank, world, local, _store() if world > 1 else None)
        except (ValueError, RuntimeError) as error:
            raise CompareError(f"expected the variables of torchrun or accelerate launch, received: {error}") from None
        for name in [n for n in os.environ if n in _PLACE.split() or n.startswith(_PREFIXES)]:
            del os.environ[name]
        if rank > 0:
            os.environ["TQDM_DISABLE"] = "1"  # bars of several processes overwrite one another
        return ranks

    def announce(self, plan: Any) -> None:
        """Tells the other processes what they wait for; None: there will be nothing."""
        if self.store is not None:
            self.store.set(_PLAN, pickle.dumps(plan))

    def announced(self) -> Any:
        """What process 0 announces."""
        plan = None
        try:
            while not self.store.check([_PLAN]):  # not `get`, during which no signal is handled
                time.sleep(PAUSE)
            plan = pickle.loads(self.store.get(_PLAN))
        except RuntimeError:  # the store has ended with process 0
            pass
        if plan is None:
            raise CompareError(f"expected process 0 to prepare the comparison, received its end in process {self.rank}")
        return plan

    def claims(self, path: Path) -> Claims:
        """The claims that the processes have on pieces of work, by way of this file."""
        return Claims(path if self.world > 1 else None)

    def see_one_gpu(self, device: str) -> str:
        """The name that trainings have for their only GPU; another device as it is.

        A GPU without a number is that of the process's place on its machine. With several in sight, the ``Trainer``
        would spread every batch over them.
        """
        if not device.startswith("cuda"):
            return device
        import torch

        count = torch.cuda.device_count()
        index = int(device.partition(":")[2] or self.local % count)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index]
        return "cuda"


class Claims:
    """Pieces of work by number, each held by one process at most; all are free where there is one process."""

    def __init__(self, path: Path | None) -> None:
        self._stream = open(path, "a+b") if path else None  # noqa: SIM115, held as long as the process lives

    @contextmanager
    def claim(self, number: int, wait: bool = False) -> Iterator[bool]:
        """Whether the piece is ours, as long as the context lasts."""
        if self._stream is None:
            yield True
            return
        import fcntl

        try:
            fcntl.lockf(self._stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._stream, fcntl.LOCK_UN, 1, number)


def _store() -> Any:
    """The launcher's store of keys and values."""
    try:
        import fcntl  # noqa: F401
    except ImportError:  # Windows
        raise CompareError("expected one process on a system without file locks, received several") from None
    from torch.distributed.rendezvous import rendezvous

    return next(rendezvous("env://"))[0]
