"""Where a server listens. Nothing heavy is imported here: replicas ask before anything is loaded."""

from __future__ import annotations

import socket

from melinoe.errors import MelinoeError
from melinoe.serving.settings import ServeSettings


def bind(settings: ServeSettings) -> socket.socket:
    """A socket at the settings' host and port.

    Raises:
        MelinoeError: another program is there, or the machine has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise MelinoeError(
            f"cannot listen at {settings.host}:{settings.port}",
            got=error.strerror or str(error),
            next_step="choose another --port, or 0 for any",
        ) from None
    listening.set_inheritable(True)
    return listening
