"""Answers what arrives while an answer is being computed together, in the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any


class Together:
    """A queue in front of a function of many queries. Lives in one event loop.

    A query that finds nothing under way is answered at once, alone: nothing waits for company. (Ray's own batching closes
    a batch some time after its first query came, also while the batch before it still runs, so that under load most
    batches hold one.)

    Args:
        answer: queries -> answers in the same order; runs in a thread, never twice at once. An exception in the place of
            an answer is raised to who asked.
        most: queries of one call.
    """

    def __init__(self, answer: Callable[[list[Any]], list[Any]], most: int) -> None:
        self._answer, self._most = answer, most
        self._waiting: list[tuple[Any, asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def ask(self, query: Any) -> Any:
        """The answer to a query. Raises what the function raised."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((query, future))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
            batch = [(query, future) for query, future in batch if not future.cancelled()]  # clients that left
            try:
                answers = await asyncio.to_thread(self._answer, [query for query, _ in batch])
            except Exception as error:
                answers = [error] * len(batch)
            for (_, future), answer in zip(batch, answers, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._worker = None
