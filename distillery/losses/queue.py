"""Past features of the teacher, which a loss compares a batch with."""

from typing import Any

import torch
from torch import Tensor

from distillery.system import distributed
from distillery.system.errors import UserError


class EmbeddingQueue:
    """Pooled features of the last images that the teacher saw, the same on every rank; the oldest go first.

    All ranks put in their rows together, in the order of the ranks. So one checkpoint holds the queue of all, and its
    content does not depend on how many processes share a batch, only its order, which no loss depends on.

    Args:
        size: rows kept at most.
        width: channels of a row.
        device: where they are kept; size * width * 4 bytes.
    """

    def __init__(self, size: int, width: int, device: torch.device) -> None:
        self._rows = torch.zeros(size, width, device=device)
        self._pushed = 0

    @property
    def rows(self) -> Tensor:
        """What has been put in so far, [K, D] with K <= size; float32."""
        return self._rows[: min(self._pushed, len(self._rows))]

    @property
    def all_rows(self) -> Tensor:
        """As `rows` will be once the queue is full, [size, D]; places not yet put in are zero."""
        return self._rows[:]

    @property
    def is_full(self) -> bool:
        """Whether `rows` grows no more."""
        return self._pushed >= len(self._rows)

    @torch.no_grad()
    def push(self, features: Tensor) -> None:
        """Put in this rank's features [B, D], and those of the other ranks, in the place of the oldest."""
        size = len(self._rows)
        new = distributed.gather_rows(features.float())[-size:]
        # one NaN would spoil every step until its row is replaced
        new = torch.where(new.isfinite(), new, 0.0)
        places = (torch.arange(len(new), device=new.device) + self._pushed) % size
        self._rows.index_copy_(0, places, new)
        self._pushed += len(new)

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"rows": self._rows.clone(), "pushed": self._pushed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what state() gave.

        Raises:
            UserError: it is of another size or width.
        """
        if state["rows"].shape != self._rows.shape:
            raise UserError(
                f"the checkpoint's queue is {list(state['rows'].shape)}, this run's {list(self._rows.shape)}: put "
                "loss_options.similarity_queue.queue_size back"
            )
        self._rows.copy_(state["rows"])
        self._pushed = state["pushed"]
