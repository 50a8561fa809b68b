"""Checkpoints written beside training: it waits for a copy in host memory and no longer.

Every rank writes what it holds in a thread of its own. The thread of rank 0 then waits until all parts are there and
makes a checkpoint of them; so a rank that dies, or a disk that is full, at any moment leaves the last good one.
"""

from __future__ import annotations

import copy
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data2vec.core.checkpoints import checkpoint
from data2vec.core.checkpoints.pieces import Piece
from data2vec.core.distributed.ranks import Ranks
from data2vec.core.errors import CheckpointError

_POLL_SECONDS = 0.02
_PATIENCE_SECONDS = 1800.0  # that rank 0 waits for the parts of the others


class Saver:
    """Saves the checkpoints of a run, one at a time.

    Args:
        folder: of all checkpoints of the run; every rank must see it.
        ranks: who trains.
        keep: how many checkpoints stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._failure: CheckpointError | None = None
        self._number = 0

    def last_good(self) -> str:
        """Say from which checkpoint a run can be continued."""
        good = checkpoint.latest(self.folder)
        return f"The last good checkpoint is {good}." if good else "No checkpoint had been saved."

    def start(
        self,
        update: int,
        tensors: Mapping[str, Mapping[str, Tensor | Piece]],
        state: Mapping[str, Any],
        local: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> None:
        """Copy the tensors and write them in the background; waits for the previous checkpoint first.

        Args:
            update: applied updates.
            tensors: what this rank holds.
            state: what is no tensor and the same on every rank.
            local: what is no tensor and this rank's own.
            best: see :func:`data2vec.core.checkpoints.checkpoint.commit`.

        Raises:
            CheckpointError: the previous one could not be written, on this rank or on another (``PeerError``).
        """
        self.finish()
        self._number += 1
        # New for each attempt: what an earlier process left under the same name would look like a part of this one.
        (started,) = self.ranks.sum([float(time.time_ns() // 1000) if self.ranks.first else 0.0])
        writing = checkpoint.unfinished(self.folder, f"{update}-{int(started)}-{self._number}")
        copied = {kind: {name: _copy(value) for name, value in values.items()} for kind, values in tensors.items()}
        self._thread = threading.Thread(
            target=self._write,
            args=(writing, update, copied, copy.deepcopy(dict(state)), copy.deepcopy(dict(local)), best),
            daemon=True,
        )
        self._thread.start()

    def _write(
        self,
        writing: Path,
        update: int,
        tensors: Mapping[str, Mapping[str, Tensor | Piece]],
        state: Mapping[str, Any],
        local: Mapping[str, Any],
        best: bool,
    ) -> None:
        rank, world = self.ranks.rank, self.ranks.world
        try:
            checkpoint.write_part(writing, tensors, local, rank=rank, world=world)
            if rank > 0:
                return
            if self._wait_for_parts(writing, world):
                checkpoint.commit(writing, update, state, world=world, keep=self.keep, best=best)
            else:
                shutil.rmtree(writing, ignore_errors=True)
        except CheckpointError as error:
            self._failure = checkpoint.failure(self.folder, update, error, writing)
        except Exception as error:  # else it would be lost with the thread, and no checkpoint written any more
            self._failure = CheckpointError(f"the checkpoint of update {update} was not written: {error!r}")

    def _wait_for_parts(self, writing: Path, world: int) -> bool:
        until = time.monotonic() + _PATIENCE_SECONDS
        while not checkpoint.parts_written(writing, world):
            if self._abandoned.wait(_POLL_SECONDS):  # what the others wrote before they ended counts
                return checkpoint.parts_written(writing, world)
            if time.monotonic() > until:
                raise CheckpointError(
                    f"the parts of other ranks do not appear in {writing}; train.folder must be a folder that all "
                    "hosts share"
                )
        return True

    @property
    def failed(self) -> CheckpointError | None:
        """The reason why the last checkpoint could not be written here, as soon as it is known."""
        return self._failure

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete on every rank.

        Raises:
            CheckpointError: it could not be written, on this rank or on another (``PeerError``).
        """
        if self.ranks.world == 1:
            self._join()
            self.ranks.agree(self._taken())
            return
        if self._number == 0:
            return
        if not self.ranks.first:
            self._join()
        # Rank 0 waits for files, which never come where another rank has failed: first hear whether one has.
        self.ranks.agree(self._failure if not self.ranks.first else None)
        self._join()
        self.ranks.agree(self._taken())

    def abandon(self) -> None:
        """Stop waiting for other ranks: one of them has failed."""
        self._abandoned.set()
        self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _taken(self) -> CheckpointError | None:
        failure, self._failure = self._failure, None
        return failure


def _copy(value: Tensor | Piece) -> Tensor | Piece:
    """In host memory, and not what training goes on to change."""
    if isinstance(value, Piece):
        return Piece(_host(value.values), value.start, value.shape)
    return _host(value)


def _host(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.device.type == "cpu" else tensor.cpu()
