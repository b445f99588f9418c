"""A rank's slice on its way from the tensors into the images: who writes takes each image as soon as it is filled.

    copying = Copying(staging.prepare(layout, plan))
    writer: engine.write(path, layout, copying, comm)               # waits for each image, in order
    copier: with copying.failing(): staging.fill(buffers, None, copying.reach)
            copying.end()

So the disk works while the memory is still being copied. It copies and writes nothing itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harness.checkpoint.staging import Image
from harness.errors import HarnessError


class Copying:
    """Images that are handed out in order once they are filled. One thread fills, one or several take.

    `waited`: seconds for which the copy has held up the thread that trains; to be set before `end`.
    """

    def __init__(self, images: Sequence[Image], failure: Exception | None = None) -> None:
        self.images = images
        """All of them, filled or not."""
        self._changed = threading.Condition()
        self._reached, self._ended = 0, False
        self.failure: BaseException | None = failure
        """Why there are no more images."""
        self.waited = 0.0

    def __iter__(self) -> Iterator[Image]:
        """Raises what the copy failed with."""
        for number, image in enumerate(self.images):
            with self._changed:
                while self._reached <= number and self.failure is None:
                    self._changed.wait()
            self.check()
            yield image

    def reach(self, count: int) -> None:
        """The first `count` images are filled."""
        if count > self._reached:
            with self._changed:
                self._reached = count
                self._changed.notify_all()

    def end(self) -> None:
        """No more is copied: all images are filled, but for a failure."""
        with self._changed:
            self._reached, self._ended = len(self.images), True
            self._changed.notify_all()

    def wait(self) -> None:
        """Until `end`, or an interruption."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended)

    def check(self) -> None:
        """Raises what the copy failed with."""
        if self.failure is not None:
            raise self.failure

    def outcome(self) -> tuple[None, None]:
        """`check` as work for `agree.together`."""
        self.check()
        return None, None

    @contextmanager
    def failing(self) -> Iterator[None]:
        """What fails in the block is kept for who takes the images; what interrupts it is raised as well."""
        try:
            yield
        except BaseException as error:
            self._fail(error, end=not isinstance(error, Exception))
            if not isinstance(error, Exception):
                raise

    @contextmanager
    def ending(self) -> Iterator[None]:
        """What is raised in the block is the end of the copy, too: nobody waits for it in vain."""
        try:
            yield
        except BaseException as error:
            self._fail(error, end=True)
            raise

    def _fail(self, error: BaseException, *, end: bool) -> None:
        if not isinstance(error, Exception):
            error = HarnessError(f"it was interrupted ({type(error).__name__})")  # the thread that writes is not
        with self._changed:
            self.failure = self.failure or error
            self._ended = self._ended or end
            self._changed.notify_all()
