"""By which addresses a server is asked: further host names, a path below a proxy, and origins of other sites' pages."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finealign.errors import FinealignError

HOST = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:]+")  # a host name, IPv4 or IPv6 address
PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
DEFAULT_PORTS = {"http": "80", "https": "443"}  # which browsers leave out of an origin
ANY = "*"
PREFLIGHT_SECONDS = 600  # for which a browser may remember what it was allowed


@dataclass(frozen=True)
class Addresses:
    """Checked options of the server.

    ``hosts`` are names to answer to besides those of this machine, such as a proxy's. ``root`` is the path that a proxy
    has the server under, as "/birds", or empty. ``origins`` are those whose pages may ask; ``ANY`` among them: all.
    """

    hosts: frozenset[str] = frozenset()
    root: str = ""
    origins: frozenset[str] = frozenset()

    @classmethod
    def from_options(
        cls, allow_hosts: Sequence[str] = (), root_path: str = "", allow_origins: Sequence[str] = ()
    ) -> "Addresses":
        """Check the options as a user gives them. Raises FinealignError, which names the option."""
        return cls(frozenset(map(_host, allow_hosts)), _root(root_path), frozenset(map(_origin, allow_origins)))

    def allow(self, origin: str | None) -> bool:
        """Whether pages of this origin, the value of an Origin header, are named by ``origins``."""
        return origin is not None and (ANY in self.origins or origin.lower() in self.origins)

    def headers(self, origin: str | None) -> dict[str, str]:
        """What every answer tells the browser about other sites' pages. Cookies are never let through."""
        if ANY in self.origins:
            allowed = {"Access-Control-Allow-Origin": ANY}
        else:
            varying = {"Vary": "Origin"} if self.origins else {}
            allowed = {"Access-Control-Allow-Origin": origin} if origin and self.allow(origin) else {}
            allowed |= varying
        if "Access-Control-Allow-Origin" in allowed:
            allowed["Access-Control-Expose-Headers"] = "Retry-After, X-Request-ID"
        return allowed


# What a browser asks before it sends a request of another site's page, and what it is told.
PREFLIGHT_ASKS = "access-control-request-method"
PREFLIGHT_ANSWER = {
    "Access-Control-Allow-Methods": "GET, HEAD, POST",
    "Access-Control-Allow-Headers": "*, Authorization",
    "Access-Control-Allow-Private-Network": "true",
    "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
}


def _host(name: str) -> str:
    if not HOST.fullmatch(name):
        raise FinealignError(
            f"--allow-host {name!r:.200} is no name of a machine. Wanted: a name as birds.example, without "
            "http:// and port."
        )
    return name.lower()


def _root(path: str) -> str:
    stripped = path.rstrip("/")
    if stripped and not PATH.fullmatch(stripped):
        raise FinealignError(
            f"--root-path {path!r:.200} is no path. Wanted: the path below which the proxy has the server, as /birds, "
            "of letters, digits and - . _ ~ between slashes."
        )
    return stripped


def _origin(text: str) -> str:
    if text == ANY:
        return ANY
    matched = ORIGIN.fullmatch(text.lower().removesuffix("/"))
    if matched is None:
        raise FinealignError(
            f"--allow-origin {text!r:.200} is no origin. Wanted: scheme and name, and a port if it has one of its own, "
            "as https://birds.example or http://localhost:3000, without a path; or * for the pages of every site."
        )
    scheme, host, port = matched.groups()
    return f"{scheme}://{host}" + (f":{port}" if port and port != DEFAULT_PORTS.get(scheme) else "")
