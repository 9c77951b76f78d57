"""Steps planned ahead by a thread, so that their blocks are asked for, and the next few assembled by others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from functools import partial

from pipeline.data.batch import Batch
from pipeline.data.planner import PlannedStep
from pipeline.data.threads import WorkerThreads

_LOOK_SECONDS = 0.1  # how soon it is noticed that who waits gives up


class Ahead:
    """Batches in the order of their steps.

    It refers to whoever plans and assembles, not to the loader: a loader that nobody refers to any more ends it.

    Args:
        plan: a step's blocks; called step after step in one thread.
        assemble: a planned step's batch; called in several threads.
        first_step: the first one.
        steps: how many are planned ahead.
        workers: threads that assemble; one batch more than that may be ready, or under way.
    """

    def __init__(
        self,
        plan: Callable[[int], PlannedStep],
        assemble: Callable[[PlannedStep], Batch],
        first_step: int,
        steps: int,
        workers: int,
    ) -> None:
        self._plan, self._assemble, self._next, self._steps = plan, assemble, first_step, steps
        self._room = workers + 1
        self._planned: deque[PlannedStep | BaseException] = deque()
        self._batches: deque[Future[Batch]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._workers = WorkerThreads(workers, "latent-batches")
        self._planner = WorkerThreads(1, "latent-plan")
        self._planner.submit(self._run, [])

    def take(self, gives_up: Callable[[], bool] | None = None) -> Batch | None:
        """The next batch, waited for; None once this is closed. Raises what planning or assembling it raised.

        Args:
            gives_up: asked while there is none; None is returned once it says yes, and the batch is still the next one.
        """
        seconds = None if gives_up is None else _LOOK_SECONDS
        with self._changed:
            while not self._batches and not self._closed:
                if gives_up is not None and gives_up():
                    return None
                self._changed.wait(seconds)
            if self._closed:
                return None
            batch = self._batches[0]
        while not batch.done():
            if gives_up is not None and gives_up():
                return None
            wait((batch,), _LOOK_SECONDS)  # which does not tell at once that one was cancelled
        with self._changed:
            if self._batches and self._batches[0] is batch:
                self._batches.popleft()
            self._submit()
        try:
            return batch.result()
        except CancelledError:
            if self._closed:
                return None
            raise

    def stop(self) -> None:
        """Begin nothing more, and let go who waits."""
        with self._changed:
            self._closed = True
            for batch in self._batches:
                batch.cancel()
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """After `stop`, wait that long at most for the threads."""
        self._workers.close(seconds)
        self._planner.close(seconds)

    def _run(self) -> None:
        planned: PlannedStep | BaseException | None = None
        while not isinstance(planned, BaseException):
            with self._changed:
                while len(self._planned) + len(self._batches) >= self._steps and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
            try:
                planned = self._plan(self._next)
            except BaseException as error:
                planned = error  # told when its turn comes
            self._next += 1
            with self._changed:
                self._planned.append(planned)
                self._submit()

    def _submit(self) -> None:
        """Have planned steps assembled, as far as there is room. The lock is held."""
        while self._planned and len(self._batches) < self._room and not self._closed:
            planned, future = self._planned.popleft(), Future[Batch]()
            self._batches.append(future)
            if isinstance(planned, BaseException):
                future.set_exception(planned)
            else:
                self._workers.submit(partial(self._finish, future, planned), [future])
        self._changed.notify_all()

    def _finish(self, future: Future[Batch], planned: PlannedStep) -> None:
        batch = self._assemble(planned)
        if not future.cancelled():
            future.set_result(batch)
