"""Under which names this server is asked. Knows headers; knows no route."""

import re

from server.settings import Settings, is_loopback

__all__ = ["Hosts"]

_MAX_CACHED = 10_000


class Hosts:
    """Which Host headers are answered: a name that an attacker points at this machine is not."""

    def __init__(self, settings: Settings) -> None:
        self._names = {name.lower() for name in (settings.host, *settings.allowed_hosts)}
        self._any = "*" in settings.allowed_hosts
        self._known: set[bytes] = set()

    def allowed(self, header: bytes) -> bool:
        """Whether requests with this Host header are answered."""
        if self._any or header in self._known:
            return True
        name = _host_name(header.decode("latin-1").lower())
        if name not in self._names and not is_loopback(name):
            return False
        if len(self._known) < _MAX_CACHED:
            self._known.add(header)
        return True


def _host_name(host: str) -> str:
    """`[::1]:8000` as `::1`, `localhost:8000` as `localhost`."""
    bracketed = re.fullmatch(r"\[([0-9a-f:.]+)\](:\d*)?", host)
    if bracketed:
        return bracketed.group(1)
    name, colon, port = host.partition(":")
    return name.removesuffix(".") if not colon or port.isdigit() else ""
