"""Where the starters of a run meet: a store that one machine keeps at HOST:PORT.

The command on each machine is a starter. The one whose machine has HOST keeps the store, the others
connect to it; torch's rendezvous then numbers the machines through it.
"""

import ipaddress
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple, TypeVar

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]

from mocokit.errors import MocokitError, UserError
from mocokit.files import printable, reason_of

T = TypeVar("T")

WAIT = 600.0  # seconds that a machine waits for the others
ANSWER = 20.0  # seconds in which what listens at HOST:PORT must answer as a starter does
_COMMAND = "mocokit/command"


class Place(NamedTuple):
    """The value of --rdzv."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Meeting(NamedTuple):
    """The store where the starters meet, and the address by which others reach this machine."""

    store: Store
    address: str


def place(text: str) -> Place:
    """HOST:PORT, or [IPv6]:PORT. Raises UserError for anything else."""

    def wrong(why: str) -> UserError:
        return UserError(
            f"--rdzv {printable(text)!r}: {why}; write HOST:PORT, a machine's name or address and "
            "a free port on it, as in host1:29500 or [fd00::1]:29500"
        )

    host, colon, number = text.rpartition(":")
    if not colon:
        raise wrong("it has no port")
    if not re.fullmatch(r"[0-9]{1,5}", number) or not 0 < int(number) < 2**16:
        raise wrong("its port is not a number from 1 to 65535")
    if bracketed := re.fullmatch(r"\[(.*)\]", host):
        host = bracketed[1]
        with suppress(ValueError):
            if "%" not in host:  # a scope, which each machine names in its own way
                return Place(str(ipaddress.IPv6Address(host)), int(number))
        raise wrong("there is no IPv6 address in its brackets")
    if not host:
        raise wrong("it has no host")
    if ":" in host:
        raise wrong("an IPv6 address needs brackets")
    # fullmatch, and no \w: a name that looks right must be right to every resolver.
    if len(host) > 253 or not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?", host):
        raise wrong("its host is neither a name nor an address")
    return Place(host, int(number))


def alone() -> Meeting:
    """The meeting of a machine with itself."""
    wait = timedelta(seconds=60)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=wait)
    return Meeting(store, "localhost")


def meet(where: Place, command: Mapping[str, str], wait: float | None = None) -> Meeting:
    """Keep the store at `where`, if that is this machine and no other starter does; else join it.

    `command` is what must be the same on all machines, by name. Waits for the machine of the store
    for `wait` seconds, by default WAIT. Raises UserError if the host is unknown, if something else
    uses the port, or if the commands differ, and MocokitError if nobody answers.
    """
    addresses = _addresses(where)
    if any(_is_here(address) for address in addresses):
        with suppress(_Taken):
            return Meeting(_keep(where, command), where.host)
        address = where.host  # another starter on this machine keeps it
    else:
        address = _reach(where, WAIT if wait is None else wait)
    return Meeting(_join(where, command), address)


def _addresses(where: Place) -> list[str]:
    try:
        found = socket.getaddrinfo(where.host, where.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"--rdzv {where}: this machine does not know the host ({reason_of(error)}); check the "
            "name, or give its address"
        ) from None
    addresses = [str(entry[4][0]) for entry in found]
    for address in map(ipaddress.ip_address, addresses):
        everybody = str(address) == "255.255.255.255"
        if address.is_unspecified or address.is_multicast or everybody:
            raise UserError(f"--rdzv {where}: no machine has the address {address}; name one's own")
    return addresses


def _is_here(address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False


class _Taken(Exception):
    """Something on this machine listens at the port already."""


def _keep(where: Place, command: Mapping[str, str]) -> Store:
    wait = timedelta(seconds=60)
    try:
        store = TCPStore(*where, is_master=True, wait_for_workers=False, timeout=wait)
    except DistError as error:
        if "EADDRINUSE" in str(error):
            raise _Taken from None
        why = str(error).rpartition("message: ")[2]
        raise UserError(
            f"--rdzv {where}: this machine cannot listen there ({why}); choose another port"
        ) from None
    store.set(_COMMAND, json.dumps(dict(command)))
    return store


def _reach(where: Place, wait: float) -> str:
    """Connect to the machine that keeps the store; the address of this one on the way there."""
    end = time.monotonic() + wait
    while True:
        try:
            with socket.create_connection(where, timeout=max(1.0, min(10.0, wait))) as way:
                return str(way.getsockname()[0])
        except OSError as error:
            if time.monotonic() >= end:
                raise MocokitError(
                    f"nothing answered at {where} for {spoken(wait)} ({reason_of(error)}); start "
                    "the command on the machine that has this address too, and see that no "
                    "firewall closes the port"
                ) from None
        time.sleep(min(0.5, wait / 4))


def _join(where: Place, command: Mapping[str, str]) -> Store:
    try:
        store, theirs = in_time(lambda: _connect(where), ANSWER)
    except (TimeoutError, DistError, ValueError):
        raise UserError(
            f"--rdzv {where}: what listens there is no starter of a run; choose a port that no "
            "other program uses"
        ) from None
    mine = dict(command)
    names = sorted(k for k in theirs.keys() | mine.keys() if theirs.get(k) != mine.get(k))
    if names:
        there = "; ".join(
            f"{k} is {printable(str(theirs.get(k)))} there, {printable(str(mine.get(k)))} here"
            for k in names[:5]
        )
        raise UserError(
            f"--rdzv {where}: another command was given there ({there}); give the same on each "
            "machine, or choose another port for another run"
        )
    return store


def _connect(where: Place) -> tuple[Store, dict[str, str]]:
    wait = timedelta(seconds=60)
    store = TCPStore(*where, is_master=False, wait_for_workers=False, timeout=wait)
    store.wait([_COMMAND], timedelta(seconds=ANSWER / 2))
    theirs = json.loads(store.get(_COMMAND))
    if not isinstance(theirs, dict):
        raise ValueError("not a command")
    return store, theirs


def in_time(work: Callable[[], T], seconds: float) -> T:
    """The result of `work`, or TimeoutError. A signal's handler runs while this waits.

    torch's store waits without end for a program that answers nothing, deaf to signals. Work that
    does not end in time is left behind in its thread.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError
    return results[0]


def interface(address: str) -> str | None:
    """The name of the network interface that has this IPv4 address; None if it is not found."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):
                answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def spoken(seconds: float) -> str:
    """10 minutes, or 3 seconds."""
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
