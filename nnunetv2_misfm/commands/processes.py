"""The processes of one job that torchrun started, on one machine or several.

The first prepares volumes and plans while the others wait; then all train together. torchrun says which process this
is and where the others are: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.errors import UserError, first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PREPARATION = timedelta(days=7)
_DONE, _FAILED = "done", "failed"


class Processes:
    """This process and the others of its job.

    Attributes:
        rank: number of this process, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.count = int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1
        self._store: Store | None = None

    @property
    def several(self) -> bool:
        """Whether torchrun started more than this one."""
        return self.count > 1

    def first_does(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, plain data, which only the first process does; the others wait for it.

        Raises:
            UserError: in the others, if the first one failed.
        """
        if not self.several:
            return work()
        store = self._rendezvous()
        if self.rank == 0:
            try:
                result = work()
            except BaseException:
                store.set("preparation", json.dumps({"state": _FAILED}))
                raise
            store.set("preparation", json.dumps({"state": _DONE, "result": result}))
            return result
        store.wait(["preparation"], _PREPARATION)
        content = json.loads(store.get("preparation"))
        if content["state"] == _FAILED:
            raise UserError("The first process of this job could not prepare the data; its own message says why.")
        return content["result"]

    @contextmanager
    def training(self, device: str) -> Iterator[None]:
        """A process group over all of them, if there are several.

        Raises:
            UserError: if another process ends or cannot be reached any more.
        """
        if not self.several:
            yield
            return
        import torch.distributed as dist
        from torch._C._distributed_c10d import PrefixStore

        backend = "nccl" if device == "cuda" else "gloo"
        store = PrefixStore("training", self._rendezvous())
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)
        try:
            yield
            dist.barrier()  # a process that leaves early can take the connection from under another one's last message
        except RuntimeError as error:
            if not _lost_connection(error):
                raise
            raise UserError(
                f"Another process of this job ended or cannot be reached any more (noticed by process {self.rank} of "
                f"{self.count}: {first_line(error)}). Its own output says why; exit status -9 "
                f"mostly means that its machine ran out of memory. Continue the run with --c."
            ) from None
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _rendezvous(self) -> Store:
        if self._store is None:
            from torch.distributed.rendezvous import rendezvous

            store, _, _ = next(rendezvous("env://", self.rank, self.count))
            self._store = store
        return self._store


def _lost_connection(error: RuntimeError) -> bool:
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError) or any(
        sign in text for sign in ("gloo", "connection closed", "connection reset", "nccl", "broken pipe")
    )
