"""A disk that is full, without filling one."""

import contextlib

import pytest

resource = pytest.importorskip("resource")  # not on Windows


@contextlib.contextmanager
def longest_file(size):
    "No file can be longer than so many bytes: the system refuses to write on, as it does on a full disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
