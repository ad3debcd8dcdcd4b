"""Fetching pictures from an allow-list of hosts, and from nowhere else whatever a message says.

Off by default. Where ``--image-hosts`` names hosts, every hop of every fetch is held to them:

- scheme https (http where ``--allow-http-images``), no user or password in the address, host and
  port on the list;
- the host's name is resolved once, all its addresses must be public, and the connection goes to
  those very addresses: what a name resolves to a moment later does not matter;
- redirects (at most three) are followed by hand, each checked as the first address was;
- no proxy, cookie, netrc entry or header of the environment or of the client is used;
- a limit of bytes, counted as they come (no content encoding is accepted), and one of seconds over
  everything. What the answer says of its type is not believed: Pillow looks at the bytes.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from tokenizer_hf.errors import ImageError
from unimodal.serving.limits import Limits, flag

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Special-purpose ranges of IANA's registries that some versions of Python take for global.
_INSIDE = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "64:ff9b:1::/48", "2001::/23", "3fff::/20", "5f00::/16")
]
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "unimodal"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def is_public(text: str) -> bool:
    """Say whether an IP address may be connected to: globally routable, in every reading of it.

    An IPv6 address that carries an IPv4 address (mapped, compatible, 6to4, Teredo, NAT64) is as
    public as that one.
    """
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if "%" in text:  # an interface of this machine
        return False
    return all(map(_is_global, [address, *_embedded(address)]))


def _is_global(address: Address) -> bool:
    mapped = isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None
    if mapped:  # judged by the address that it carries
        return True
    return address.is_global and not (
        any(address in network for network in _INSIDE)
        or address.is_multicast
        or address.is_reserved
        or address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_unspecified
        or getattr(address, "is_site_local", False)
    )


def _embedded(address: Address) -> list[Address]:
    """The IPv4 addresses that packets to an IPv6 address may end at."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    last = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour]
    found += address.teredo or ()
    found += [last] if address in _NAT64 or int(address) >> 32 == 0 else []
    return [item for item in found if item is not None]


class _PublicResolver(AbstractResolver):
    """Resolves names and refuses any that has an address of the inside."""

    def __init__(self, resolver: AbstractResolver, allow: Callable[[str], bool]) -> None:
        self.resolver = resolver
        self.allow = allow

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self.resolver.resolve(host, port, family)
        _require_allowed(host, [item["host"] for item in found], self.allow)
        return found

    async def close(self) -> None:
        await self.resolver.close()


def _require_allowed(host: str, addresses: Sequence[str], allow: Callable[[str], bool]) -> None:
    refused = [address for address in addresses if not allow(address)]
    if refused or not addresses:
        raise ImageError(
            f"image host {host!r} is {refused[0] if refused else 'nowhere'}, expected a public "
            "address; send the picture as a data URI"
        )


class ImageFetcher:
    """Fetches pictures by https from the hosts of an allow-list.

    Args:
        limits: the hosts, the bytes and the seconds.
        resolver: resolves names; the system's by default.
        allow: says of an IP address whether it may be connected to.
    """

    def __init__(
        self,
        limits: Limits,
        resolver: AbstractResolver | None = None,
        allow: Callable[[str], bool] = is_public,
    ) -> None:
        self.hosts = [
            host.strip().lower() for host in limits.image_hosts.split(",") if host.strip()
        ]
        self.max_bytes = int(limits.image_fetch_mib * 1024 * 1024)
        self.timeout = limits.image_fetch_timeout
        self.schemes = ("https", "http") if limits.allow_http_images else ("https",)
        self.resolver = resolver
        self.allow = allow

    async def messages(self, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return plain messages whose remote pictures are bytes; all are fetched at once.

        Raises:
            ImageError: an address that is refused, or that gives no bytes.
        """
        contents = [message["content"] for message in messages]
        parts = [part for content in contents if not isinstance(content, str) for part in content]
        urls = [url for part in parts if (url := _remote(part)) is not None]
        fetched = dict(zip(urls, await self._all(urls), strict=True)) if urls else {}

        def local(part: dict[str, Any]) -> dict[str, Any]:
            url = _remote(part)
            return part if url is None else {"type": "image", "image": fetched[url]}

        return [
            {**message, "content": [local(part) for part in message["content"]]}
            if isinstance(message["content"], list)
            else message
            for message in messages
        ]

    async def _all(self, urls: Sequence[str]) -> list[bytes]:
        checked = [self.check(url) for url in urls]
        resolver = _PublicResolver(self.resolver or aiohttp.ThreadedResolver(), self.allow)
        connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=8)
        session = aiohttp.ClientSession(
            connector=connector,
            trust_env=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            headers=_HEADERS,
        )
        try:
            async with session, asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._one(session, url)) for url in checked]
        except ExceptionGroup as problems:
            raise problems.exceptions[0] from None
        return [task.result() for task in tasks]

    async def fetch(self, address: str) -> bytes:
        """Fetch one picture.

        Raises:
            ImageError: the address is refused, or gives no bytes in time.
        """
        [data] = await self._all([address])
        return data

    async def _one(self, session: aiohttp.ClientSession, url: URL) -> bytes:
        try:
            async with asyncio.timeout(self.timeout):
                for _ in range(MAX_REDIRECTS + 1):
                    data, target = await self._hop(session, url)
                    if target is None:
                        return data
                    url = self.check(str(target))
        except TimeoutError as error:
            raise ImageError(
                f"picture at {_shown(url)} did not come within {self.timeout:g} s; send it as a "
                "data URI"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error.__cause__, ImageError):
                raise error.__cause__ from None
            raise ImageError(
                f"picture at {_shown(url)} cannot be fetched: {type(error).__name__}; send it as a "
                "data URI"
            ) from error
        raise ImageError(
            f"picture at {_shown(url)} is behind more than {MAX_REDIRECTS} redirects; give the "
            "last address"
        )

    async def _hop(self, session: aiohttp.ClientSession, url: URL) -> tuple[bytes, URL | None]:
        """Return the bytes, or where the answer redirects to."""
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECTS:
                return b"", url.join(URL(answer.headers.get("Location", "")))
            if answer.status != 200:
                raise ImageError(
                    f"picture at {_shown(url)} answered {answer.status}, expected 200; send it as "
                    "a data URI"
                )
            data = bytearray()
            async for piece in answer.content.iter_chunked(64 * 1024):
                data += piece
                if len(data) > self.max_bytes:
                    raise ImageError(
                        f"picture at {_shown(url)} has more than {self.max_bytes} bytes; make it "
                        "smaller"
                    )
            return bytes(data), None

    def check(self, address: str) -> URL:
        """Return an address that may be fetched.

        Raises:
            ImageError: says what about it is refused.
        """
        if not self.hosts:
            raise ImageError(
                f"image_url {address[:60]!r} is no data URI, expected data:image/png;base64,...: "
                f"this server fetches nothing (its flag {flag('image_hosts')} names no hosts)"
            )
        try:
            url = URL(address)
            host, port = (url.raw_host or "").lower().rstrip("."), url.port
        except ValueError as error:
            raise ImageError(f"image_url {address[:60]!r} is no address: {error}") from error
        if url.scheme not in self.schemes or not host:
            raise ImageError(
                f"image_url {address[:60]!r} came, expected {' or '.join(self.schemes)}://, or a "
                "data URI"
            )
        if url.raw_user is not None or url.raw_password is not None:
            raise ImageError("an image_url with a user or password came, expected one without")
        if not self._is_listed(host, port, url.is_default_port()):
            raise ImageError(
                f"image host {host + (f':{port}' if not url.is_default_port() else '')!r} is not "
                f"one that this server fetches from ({', '.join(self.hosts)}); send the picture as "
                "a data URI"
            )
        if _is_address(host):
            _require_allowed(host, [host], self.allow)
        return url

    def _is_listed(self, host: str, port: int | None, is_default: bool) -> bool:
        for listed in self.hosts:
            name, _, wanted = listed.partition(":")
            if (str(port) != wanted) if wanted else not is_default:
                continue
            if name == host or (name.startswith("*.") and host.endswith(name[1:])):
                return True
        return False


def _remote(part: dict[str, Any]) -> str | None:
    """Return the address of an image part that is no data URI and no codes, or None."""
    if part["type"] != "image_url":
        return None
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    return url if isinstance(url, str) and not url.startswith("data:") else None


def _is_address(host: str) -> bool:
    """Say whether a host is an IP address, in any of the ways that a system may read one."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        last = host.rpartition(".")[2]
        return last.isdigit() or last.startswith("0x")
    return True


def _shown(url: URL) -> str:
    """The address as it may stand in a message or log: without its query."""
    return repr(str(url.with_query(None).with_fragment(None))[:200])
