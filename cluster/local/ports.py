"""Free ports, for servers that may look for theirs at the same moment."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_ports(firsts: range, shifts: tuple[int, ...] = (0,)) -> Iterator[range]:
    """The ports between one of `firsts` and the next, free on every address and by every shift.

    The first itself stays bound meanwhile, which keeps others off the rest until the servers have
    bound their own. Raises RuntimeError where none of the rows is free.
    """
    for first in firsts:
        ports = range(first + 1, first + firsts.step)
        with socket.socket() as claim:
            try:
                claim.bind(("127.0.0.1", first))
            except OSError:
                continue
            if all(_is_free(port + shift) for port in ports for shift in shifts):
                yield ports
                return
    raise RuntimeError(f"no {firsts.step - 1} free ports in a row in {firsts}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
