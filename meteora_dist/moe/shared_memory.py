"""Memory that the processes of one machine share, and semaphores in it. Linux only.

The memory has no name in any file system: it is gone with the last process that maps it, however that ends. A process
opens another's by way of ``/proc``, which works on one machine, between processes that see each other and run as one
user. Everywhere else opening fails, and so tells that there is nothing to share.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import time
import weakref
from typing import NamedTuple

SPIN_S = 0.0005
"""How long a wait keeps asking, and lets others run in between, before it sleeps: a sleeper wakes up late."""

CACHE_LINE = 64
"""Bytes that processors move together; two that write to one hold each other up."""


class Address(NamedTuple):
    """Where other processes find a segment: whole numbers, so that ranks can tell each other by a tensor.

    Attributes:
        pid: The process that made it.
        fd: The file it is in that process.
        token: A random number, as another process may have that pid on another machine.
    """

    pid: int
    fd: int
    token: int

    @property
    def name(self) -> str:
        """What the kernel calls the file."""
        return f"meteora-{self.token:x}"


class Segment:
    """A piece of shared memory, and who lives among its users.

    Attributes:
        memory: Its bytes, zeros at first. Pages that nobody writes take no memory.
        address: Where others find it; good for as long as the process that made it holds it.
    """

    def __init__(self, fd: int, nbytes: int, address: Address) -> None:
        """Maps an open file; ``create`` and ``open`` are the ways to get one."""
        self._fd = fd
        weakref.finalize(self, os.close, fd)
        self.memory = mmap.mmap(fd, nbytes)
        self.address = address

    @classmethod
    def create(cls, nbytes: int) -> Segment:
        """Makes a segment.

        Raises:
            OSError: This system has no such memory.
        """
        if not hasattr(os, "memfd_create"):
            raise OSError(errno.ENOSYS, "no anonymous files here")
        token = secrets.randbits(62)
        fd = os.memfd_create(Address(0, 0, token).name)
        os.ftruncate(fd, nbytes)
        return cls(fd, nbytes, Address(os.getpid(), fd, token))

    @classmethod
    def open(cls, address: Address, nbytes: int) -> Segment:
        """Opens a segment of another process.

        Raises:
            OSError: It cannot be reached from here.
        """
        path = f"/proc/{address.pid}/fd/{address.fd}"
        if os.readlink(path) != f"/memfd:{address.name} (deleted)":
            raise OSError(errno.ENOENT, "another file, of another process", path)
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC), nbytes, address)

    def enter(self, user: int) -> None:
        """Declares this process to be user number ``user``, until it ends or lets go of the segment.

        Raises:
            OSError: Another process is.
        """
        # The kernel drops a lock with its process, however that ends.
        fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, user)

    def has(self, user: int) -> bool:
        """Whether another process is user number ``user``."""
        try:
            self.enter(user)
        except OSError:
            return True
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, user)
        return False


class Semaphores:
    """POSIX semaphores at the start of a segment.

    What was written before a ``post`` is there for whoever has waited for it, on every processor: POSIX has semaphores
    order memory, which plain stores do not.
    """

    BYTES = CACHE_LINE
    """Room for each, enough for a ``sem_t`` on any Linux."""

    def __init__(self, segment: Segment, count: int) -> None:
        """Views the first ``count`` of a segment.

        Raises:
            OSError: The C library cannot wait by a monotonic clock.
        """
        self._functions = _functions()
        start = ctypes.addressof(ctypes.c_char.from_buffer(segment.memory))
        self._places = [ctypes.c_void_p(start + number * self.BYTES) for number in range(count)]
        # The places are good for as long as the memory is mapped.
        self._segment = segment

    def create(self) -> None:
        """Makes all of them, at zero: one process does, before any other uses them.

        Raises:
            OSError: The C library has none that processes share.
        """
        for place in self._places:
            _check(self._functions.init(place, 1, 0))

    def post(self, number: int) -> None:
        """Lets one wait end."""
        _check(self._functions.post(self._places[number]))

    def wait(self, number: int, seconds: float) -> bool:
        """Waits for a post, and uses it up; False when none came in time."""
        place, functions = self._places[number], self._functions
        now = time.monotonic()
        until, spin_until = now + seconds, now + SPIN_S
        while functions.trywait(place):
            if time.monotonic() > spin_until:
                return self._sleep(place, until)
            os.sched_yield()
        return True

    def _sleep(self, place: ctypes.c_void_p, until: float) -> bool:
        moment = _Timespec(int(until), int(until % 1 * 1e9))
        while self._functions.clockwait(place, time.CLOCK_MONOTONIC, ctypes.byref(moment)):
            if ctypes.get_errno() == errno.ETIMEDOUT:
                return False
            if ctypes.get_errno() != errno.EINTR:
                _check(-1)
        return True


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Functions(NamedTuple):
    init: ctypes._NamedFuncPointer
    post: ctypes._NamedFuncPointer
    trywait: ctypes._NamedFuncPointer
    clockwait: ctypes._NamedFuncPointer


def _functions() -> _Functions:
    # The calls let go of the interpreter's lock, so that a wait holds up no other thread.
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        functions = _Functions(libc.sem_init, libc.sem_post, libc.sem_trywait, libc.sem_clockwait)
    except AttributeError as error:
        raise OSError(errno.ENOSYS, str(error)) from error
    functions.init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
    functions.post.argtypes = functions.trywait.argtypes = [ctypes.c_void_p]
    functions.clockwait.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec)]
    return functions


def _check(status: int) -> None:
    if status:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
