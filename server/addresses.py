"""Under which names this server is asked, and by whom: Host headers, and what proxies say. Knows no route."""

import re
from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from server.settings import PREFIX, Settings, is_loopback

__all__ = ["Hosts", "Proxies"]

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


class Proxies:
    """What the proxies before this server say of a request: the client's address, and the prefix that they cut off.

    Only proxies of `trusted_proxies` are believed; everybody else may have written such a header, too.
    """

    def __init__(self, settings: Settings) -> None:
        self._any = "*" in settings.trusted_proxies
        self._networks = [ip_network(name) for name in settings.trusted_proxies if name != "*"]
        self._known: dict[str, bool] = {}

    def are_trusted(self, address: str) -> bool:
        """Whether a connection from this address comes from a proxy of ours."""
        known = self._known.get(address)
        if known is None:
            known = self._any or self._is_inside(address)
            if len(self._known) < _MAX_CACHED:
                self._known[address] = known
        return known

    def client(self, headers: Mapping[bytes, bytes], address: str) -> str:
        """The address of the client: the last one that no proxy of ours has added."""
        for named in reversed(headers.get(b"x-forwarded-for", b"").decode("latin-1").split(",")):
            try:
                client = str(ip_address(named.strip()))
            except ValueError:
                break  # some proxies write a port or `unknown`
            if not self.are_trusted(client):
                return client
            address = client
        return address

    def prefix(self, headers: Mapping[bytes, bytes]) -> str | None:
        """The path that a proxy has cut off, if it says one that can be one."""
        sent = headers.get(b"x-forwarded-prefix", b"").decode("latin-1").strip().rstrip("/")
        return sent if PREFIX.fullmatch(sent) else None

    def _is_inside(self, address: str) -> bool:
        try:
            parsed = ip_address(address)
        except ValueError:
            return False
        parsed = getattr(parsed, "ipv4_mapped", None) or parsed
        return any(parsed in network for network in self._networks)
