"""The file that an export writes: whole, or not there. What was there before stays until the new one is durable.

with target("model.safetensors", force=True) as temporary:
    ...                         # write the file `temporary`
# here it has been synced and renamed
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from harness.checkpoint.commit import sync_directory
from harness.checkpoint.space import explain, preflight
from harness.errors import InputMissing, StorageError, UsageError


@contextmanager
def target(path: Path, size: int, *, force: bool) -> Iterator[Path]:
    """A name beside `path` to write to. `size`: about how many bytes that will be.

    Raises UsageError where `path` is there and `force` is not given, InputMissing where its directory is not there,
    StorageError where it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
    try:
        _check(path, force)
        preflight(path.parent, size, files=1)
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _check(path, force)
        os.rename(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        what, hint = explain(error) or (error.strerror or str(error), None)
        raise StorageError(f"{path} was not written: {what}", hint=hint) from error
    finally:
        with suppress(OSError):  # there may be none, and where nothing can be written, nothing can be removed
            temporary.unlink()


def _check(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise InputMissing(f"there is no directory {path.parent} to write {path.name} into")
    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} is there already", hint="give --force to replace it, or another name")
