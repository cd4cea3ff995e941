"""One background thread that writes in order, holds the caller back, and passes on its failures."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType


class BackgroundWriter:
    """Runs submitted calls one after the other on a daemon thread.

    At most ``max_pending`` calls are unfinished at a time: ``submit`` waits for room, so memory stays
    bounded. After the first failure nothing more is run (a later file must not be committed over a hole): the
    failure is raised by every later ``submit`` and ``flush``, and by ``close`` if nobody has seen it yet.
    """

    def __init__(self, max_pending: int = 4) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, not {max_pending}")
        self._max_pending = max_pending
        self._queue: deque[Callable[[], object]] = deque()
        self._running = self._closed = self._delivered = False
        self._failure: BaseException | None = None
        self._trace: TracebackType | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    @property
    def pending(self) -> int:
        """Calls that are not finished yet."""
        with self._changed:
            return len(self._queue) + self._running

    def submit(self, task: Callable[[], object]) -> None:
        """Queue ``task``, waiting for room; raises the first failure if there is one."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the writer is closed")
            self._changed.wait_for(lambda: self._failure or len(self._queue) + self._running < self._max_pending)
            self._raise_failure()
            self._queue.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="artifact-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self) -> None:
        """Wait until everything that was submitted is done; raises the first failure if there is one."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._running)
            self._raise_failure()

    def close(self) -> None:
        """Finish what was submitted and end the thread; raises a failure that nobody has seen yet."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if not self._delivered:
            self._raise_failure()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._delivered = True  # do not hide the error that is already on its way
        self.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self._delivered = True
            raise self._failure.with_traceback(self._trace)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue:
                    return
                task = self._queue.popleft()
                self._running = True
            failure: BaseException | None = None
            try:
                task()
            except BaseException as error:
                failure = error
            del task  # frees the tensors that it held before the next wait
            with self._changed:
                self._running = False
                if failure is not None:
                    self._failure, self._trace = failure, failure.__traceback__
                    self._queue.clear()
                self._changed.notify_all()
