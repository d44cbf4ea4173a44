"""A thread that reads experts from disk ahead of their use, between the schedule and the device's copies.

`ReadingEngine` stands where the engine of a device does, and takes copies whose source is a region of a file.
A thread reads that region into a buffer in host memory (pinned, for a GPU), a few pieces at a time side by
side, and hands the copy from there to the device's own engine; so copies and computing are ordered by the
device's events as ever, and the host waits where the reading has not come far enough. Between copies the
thread reads what is used after them, as many modules ahead as there are buffers.

What a read raises is raised where its weights were to be computed with. The next use reads again.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from concurrent import futures
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from fourfold.offloading.engine import CudaEngine
from fourfold.offloading.host import HostMemory
from fourfold.offloading.mapped import MappedFile, Region

STAGES = 2
THREADS = 4
PIECE_BYTES = 8 * 2**20
_ALIGNMENT = 64

Source: TypeAlias = "torch.Tensor | Region"


@dataclass
class _Stage:
    """A buffer in host memory.

    Attributes:
        memory: bytes.
        held: what of which file it holds, and from which byte on.
        copied: events of copies from it.
    """

    memory: torch.Tensor | None = None
    held: list[tuple[Region, int]] = field(default_factory=list)
    copied: list[Any] = field(default_factory=list)

    def has(self, regions: Sequence[Region]) -> bool:
        return all(self.view(region) is not None for region in regions)

    def view(self, wanted: Region) -> torch.Tensor | None:
        """The bytes of a region, as its tensor."""
        for region, at in self.held:
            start = wanted.offset - region.offset
            if region.file is wanted.file and 0 <= start <= region.nbytes - wanted.nbytes:
                assert self.memory is not None
                piece = self.memory[at + start : at + start + wanted.nbytes]
                return piece.view(wanted.dtype).view(wanted.shape)
        return None


@dataclass
class _Job:
    copies: list[tuple[torch.Tensor, Source]]
    after: list[Any]
    done: Future[Any] = field(default_factory=Future)

    @property
    def regions(self) -> list[Region]:
        return [source for _, source in self.copies if isinstance(source, Region)]


class _Reader:
    """What the thread works with. It knows nothing of the engine that it works for, which may be deleted."""

    def __init__(self, inner: Any, memory: HostMemory) -> None:
        self.inner, self.memory = inner, memory
        self.changed = threading.Condition()
        self.jobs: deque[_Job] = deque()
        self.wanted: list[list[Region]] = []
        self.stages = [_Stage() for _ in range(STAGES)]
        self.stopped = False
        self.nbytes = 0
        self._owed: list[Any] = []  # what a copy that failed was to come after, and the next one does
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="fourfold-read")

    def work(self) -> None:
        try:
            while (task := self._task()) is not None:
                if isinstance(task, _Job):
                    self._fill(task)
                else:
                    self._ahead(task)
        finally:
            self.stop()
            self._pool.shutdown(cancel_futures=True)
            for stage in self.stages:  # (their memory goes with this thread)
                while stage.copied:
                    self.inner.finish(stage.copied.pop())

    def _task(self) -> _Job | list[Region] | None:
        """What is to be done next; waits for it. None where nothing is any more."""
        with self.changed:
            while not self.stopped:
                task = self._next()
                if task is not None:
                    return task
                self.changed.wait()
        return None

    def ask(self, job: _Job) -> None:
        with self.changed:
            if self.stopped:  # (nobody would come to it)
                job.done.cancel()
                return
            self.jobs.append(job)
            self.changed.notify_all()

    def _next(self) -> _Job | list[Region] | None:
        """A copy that is asked for; else what is to be read ahead, if a buffer can be spared for it."""
        if self.jobs:
            return self.jobs.popleft()
        if all(self._is_wanted(stage) for stage in self.stages):
            return None
        return next((r for r in self.wanted if not any(s.has(r) for s in self.stages)), None)

    def _is_wanted(self, stage: _Stage) -> bool:
        return any(stage.has(regions) for regions in self.wanted)

    def _fill(self, job: _Job) -> None:
        try:
            regions = job.regions
            stage = next((s for s in self.stages if s.has(regions)), None) if regions else None
            if regions and stage is None:
                stage = self._read(regions)
            copies = []
            for place, source in job.copies:
                if isinstance(source, Region):
                    assert stage is not None
                    view = stage.view(source)
                    assert view is not None
                    copies.append((place, view))
                else:
                    copies.append((place, source))
            event = self.inner.fill(copies, [*self._owed, *job.after])
            self._owed = []
            if stage is not None:
                stage.copied = [event]  # (of one stream: the last one is the end of all)
        except BaseException as error:
            self._owed += job.after
            job.done.set_exception(error)
        else:
            job.done.set_result(event)

    def _ahead(self, regions: list[Region]) -> None:
        try:
            self._read(regions)
        except BaseException:  # whoever asks for it will be told
            with self.changed:
                self.wanted = [other for other in self.wanted if other is not regions]

    def _read(self, regions: list[Region]) -> _Stage:
        """Regions into a buffer: an empty one, or one whose content is not wanted next."""
        with self.changed:
            wanted = list(self.wanted)

        def worth(stage: _Stage) -> int:
            if not stage.held:
                return -2
            numbers = [n for n, regions in enumerate(wanted) if stage.has(regions)]
            return len(wanted) - min(numbers) if numbers else -1

        stage = min(self.stages, key=worth)
        stage.held = []
        while stage.copied:
            self.inner.finish(stage.copied.pop())
        places, total = [], 0
        for region in regions:
            places.append(total)
            total += -(-region.nbytes // _ALIGNMENT) * _ALIGNMENT
        if stage.memory is None or stage.memory.nbytes < total:
            stage.memory = None
            stage.memory = self.memory.empty((total,), torch.uint8)
        whole = memoryview(stage.memory.numpy())
        pieces: list[tuple[MappedFile, memoryview, int]] = []
        for region, at in zip(regions, places, strict=True):
            for start in range(0, region.nbytes, PIECE_BYTES):
                stop = min(start + PIECE_BYTES, region.nbytes)
                pieces.append((region.file, whole[at + start : at + stop], region.offset + start))
        if len(pieces) == 1:
            file, place, offset = pieces[0]
            file.read_into(place, offset)
        else:
            running = [self._pool.submit(f.read_into, place, at) for f, place, at in pieces]
            errors = [future.exception() for future in running]  # (all of them have ended after this)
            for error in errors:
                if error is not None:
                    raise error
        for file in {id(region.file): region.file for region in regions}.values():
            file.check()  # (behind the read: it may have been written over meanwhile)
        stage.held = list(zip(regions, places, strict=True))
        self.nbytes += sum(region.nbytes for region in regions)
        return stage

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            while self.jobs:
                self.jobs.popleft().done.set_exception(CancelledError())  # (`cancel` wakes nobody)
            self.changed.notify_all()


class ReadingEngine:
    """Copies from files to a device, and from host memory as the device's own engine does.

    Args:
        inner: the device's engine.
        memory: where buffers are taken from.
    """

    def __init__(self, inner: Any, memory: HostMemory) -> None:
        self.inner, self._memory = inner, memory
        self._timed, self._waited_seconds = False, 0.0
        self._reader: _Reader | None = None
        self._thread: threading.Thread | None = None
        self._process = 0
        self._closed = False

    def _running(self) -> _Reader:
        """The thread is started when it is first needed, and again in a process that was forked."""
        if self._reader is None or self._process != os.getpid():
            self._reader, self._process = _Reader(self.inner, self._memory), os.getpid()
            self._thread = threading.Thread(target=self._reader.work, name="fourfold-read-ahead", daemon=True)
            self._thread.start()
            weakref.finalize(self, self._reader.stop)
        return self._reader

    @property
    def read_bytes(self) -> int:
        return 0 if self._reader is None else self._reader.nbytes

    @property
    def staged_bytes(self) -> int:
        """Of the buffers in host memory."""
        stages = [] if self._reader is None else self._reader.stages
        return sum(s.memory.nbytes for s in stages if s.memory is not None)

    def fill(self, copies: Iterable[tuple[torch.Tensor, Source]], after: list[Any]) -> Future[Any]:
        """Begin copies after all of ``after``; what is returned ends when the device's copies have begun."""
        job = _Job(list(copies), after)
        self._running().ask(job)
        return job.done

    def ahead(self, wanted: list[list[Region]]) -> None:
        """What is used after all that is asked for, the first one first. It replaces what was said before."""
        reader = self._running()
        with reader.changed:
            reader.wanted = [regions for regions in wanted if regions][:STAGES]
            reader.changed.notify_all()

    def lend(self, memory: torch.Tensor) -> None:
        self.inner.lend(memory)

    def mark(self) -> Any:
        return self.inner.mark()

    def wait(self, filled: Future[Any]) -> None:
        """Let what is computed from now on wait for a copy; the host waits until it was read.

        Raises:
            CheckpointError: what was read is not there, or not what was mapped.
        """
        if not filled.done():
            begun = time.perf_counter()
            futures.wait([filled])
            self._waited_seconds += self._timed * (time.perf_counter() - begun)
        try:
            event = filled.result()
        except (Exception, CancelledError):
            if self._closed:  # (buffers are let go of: nobody computes with them any more)
                return
            raise
        self.inner.wait(event)

    def line(self) -> Hashable:
        """Which line of computing is current: the inner engine's."""
        line: Hashable = self.inner.line()
        return line

    def close(self) -> None:
        """Nothing more is read or copied; what is under way is waited for."""
        self._closed = True
        if self._reader is not None and self._process == os.getpid() and self._thread is not None:
            self._reader.stop()
            if self._thread is not threading.current_thread():
                self._thread.join()

    @property
    def timed(self) -> bool:
        """Whether it is noted how long computing waits: the device for copies, and the host for the disk."""
        return self._timed

    @timed.setter
    def timed(self, value: bool) -> None:
        self._timed = value
        if isinstance(self.inner, CudaEngine):
            self.inner.timed = value

    def waited_ms(self) -> float | None:
        """Since the last call, with ``timed``; waits for the device. None where nothing was read."""
        waited, self._waited_seconds = self._waited_seconds * 1e3, 0.0
        if self._reader is None:
            return None
        return waited + (self.inner.waited_ms() if isinstance(self.inner, CudaEngine) else 0.0)
