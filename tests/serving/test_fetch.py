"""Fetching pictures from an allow-list, against real HTTP servers on this machine's loopback.

Loopback is just what must never be reached; so most tests look at refusals, and those of what is
fetched give the fetcher their own idea of what is public.
"""

import asyncio
import contextlib
import io
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
from PIL import Image

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp (of the serve extras) is not installed")
from aiohttp.abc import AbstractResolver  # noqa: E402

from tokenizer_hf.errors import ImageError  # noqa: E402
from unimodal.serving.fetch import ImageFetcher, is_public  # noqa: E402
from unimodal.serving.limits import Limits  # noqa: E402


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Site(BaseHTTPRequestHandler):
    """Answers by path, and writes down what it was asked."""

    asked: ClassVar[list[tuple[str, dict[str, str]]]] = []
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.asked.append((self.path, dict(self.headers)))
        name = self.path.split("?")[0]
        if name.startswith("/to/"):
            return self.answer(302, b"", Location=self.path.removeprefix("/to/"))
        if name == "/loop":
            return self.answer(302, b"", Location="/loop")
        if name == "/missing":
            return self.answer(404, b"no")
        if name == "/large":
            return self.answer(200, b"x" * 3_000_000)
        if name == "/endless":
            return self.endless()
        if name == "/slow":
            time.sleep(3)
        self.answer(200, png(), **{"Content-Type": "text/html", "Set-Cookie": "a=b"})

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that had enough
            self.wfile.write(body)

    def endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


class Names(AbstractResolver):
    """A name server of ours; a second question may get another answer."""

    def __init__(self, **addresses: list[str]) -> None:
        self.addresses = addresses
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_UNSPEC) -> Any:
        self.asked.append(host)
        answers = self.addresses[host.replace(".", "_")]
        address = answers.pop(0) if len(answers) > 1 else answers[0]
        kind = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [
            {
                "hostname": host,
                "host": address,
                "port": port,
                "family": kind,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
        ]

    async def close(self) -> None:
        pass


def fetcher(port: int, **options: Any) -> ImageFetcher:
    limits = Limits(
        image_hosts=f"images.test:{port},other.test:{port},127.0.0.1:{port}",
        image_fetch_mib=1,
        image_fetch_timeout=2,
        allow_http_images=True,
    )
    names = Names(images_test=["127.0.0.1"], other_test=["127.0.0.1"])
    return ImageFetcher(limits, **{"resolver": names, "allow": lambda _: True, **options})


def fetch(it: ImageFetcher, url: str) -> bytes:
    return asyncio.run(it.fetch(url))


def test_a_picture_is_fetched_with_no_secret_of_ours(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    Site.asked.clear()
    it = fetcher(port)
    parts = [
        {"type": "text", "text": "x"},
        {"type": "image_url", "image_url": {"url": f"http://images.test:{port}/a.png?token=1"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,xx"}},
    ]
    plain = {"role": "user", "content": "x"}
    [message, other] = asyncio.run(it.messages([{"role": "user", "content": parts}, plain]))
    assert message["content"] == [parts[0], {"type": "image", "image": png()}, parts[2]]
    assert other == plain
    [(path, headers)] = Site.asked
    assert path == "/a.png?token=1"
    assert not {"Authorization", "Cookie", "Referer"} & set(headers)
    assert headers["Accept-Encoding"] == "identity"


def test_redirects_within_the_list_are_followed(port: int) -> None:
    assert fetch(fetcher(port), f"http://images.test:{port}/to/http://other.test:{port}/b") == png()
    assert fetch(fetcher(port), f"http://images.test:{port}/to//b") == png()


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/to/http://elsewhere.test/b", "not one that this server fetches from"),
        ("/to/http://127.0.0.1/b", "not one that this server fetches from"),
        ("/to/file:///etc/passwd", "expected https or http"),
        ("/to/http://user:pw@images.test/b", "user or password"),
        ("/loop", "more than 3 redirects"),
        ("/missing", "answered 404"),
        ("/large", "more than 1048576 bytes"),
        ("/endless", "more than 1048576 bytes"),
        ("/slow", "did not come within 2 s"),
    ],
)
def test_answers_that_are_refused(port: int, target: str, expected: str) -> None:
    with pytest.raises(ImageError, match=expected):
        fetch(fetcher(port), f"http://images.test:{port}{target}")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("ftp://images.test/a", "expected https"),
        ("http://images.test/a", "expected https"),
        ("https://images.test:8443/a", "not one that this server fetches from"),
        ("https://evil.test/a", "not one that this server fetches from"),
        ("https://images.test.evil.test/a", "not one that this server fetches from"),
        ("https://evilimages.test/a", "not one that this server fetches from"),
        ("https://images.test@evil.test/a", "user or password"),
        ("https://images.test:443@evil.test/a", "user or password"),
        ("https:///a", "expected https"),
        ("//images.test/a", "expected https"),
        ("https://[images.test/a", "no address|expected https"),
        ("https://127.0.0.1/a", "not one that this server fetches from"),
    ],
)
def test_addresses_that_are_refused(url: str, expected: str) -> None:
    it = ImageFetcher(Limits(image_hosts="images.test, *.cdn.test"))
    with pytest.raises(ImageError, match=expected):
        it.check(url)


def test_hosts_of_the_list() -> None:
    it = ImageFetcher(Limits(image_hosts="images.test, *.cdn.test,ports.test:8443"))
    for url in (
        "https://images.test/a",
        "https://IMAGES.test./a",
        "https://a.cdn.test/a",
        "https://a.b.cdn.test:443/a",
        "https://ports.test:8443/a",
    ):
        assert str(it.check(url)).startswith("https://")
    for url in ("https://cdn.test/a", "https://ports.test/a", "https://xcdn.test/a"):
        with pytest.raises(ImageError):
            it.check(url)


def test_nothing_is_fetched_where_no_host_is_named() -> None:
    with pytest.raises(ImageError, match=r"data:image/png;base64.*--image-hosts"):
        ImageFetcher(Limits()).check("https://images.test/a")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.8",
        "64:ff9b:1::1",
        "198.18.0.1",
        "224.0.0.1",
        "239.1.1.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "fc00::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2001:0:53aa:64c:0:0:80ff:fffe",
        "127.1",
        "0x7f000001",
        "2130706433",
        "localhost",
        "",
    ],
)
def test_addresses_of_the_inside(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1"]
)
def test_addresses_of_the_outside(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "169.254.169.254", "10.1.2.3"]
)
def test_a_name_that_leads_inside_is_refused(port: int, address: str) -> None:
    Site.asked.clear()
    it = fetcher(port, resolver=Names(images_test=[address]), allow=is_public)
    with pytest.raises(ImageError, match="expected a public address"):
        fetch(it, f"http://images.test:{port}/a.png")
    assert Site.asked == []


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "017700000001"])
def test_a_literal_address_of_the_inside_is_refused_though_it_is_listed(
    port: int, host: str
) -> None:
    Site.asked.clear()
    limits = Limits(image_hosts=f"{host}:{port}", allow_http_images=True)
    with pytest.raises(ImageError):
        fetch(ImageFetcher(limits), f"http://{host}:{port}/a.png")
    assert Site.asked == []


def test_a_name_that_changes_its_mind_is_resolved_once(port: int) -> None:
    names = Names(images_test=["127.0.0.1", "192.0.2.1"])
    assert fetch(fetcher(port, resolver=names), f"http://images.test:{port}/a.png") == png()
    assert names.asked == ["images.test"]


def test_a_redirect_is_resolved_and_judged_anew(port: int) -> None:
    # The first name leads to what counts as outside here, the second to what does not.
    names = Names(images_test=["127.0.0.1"], other_test=["127.0.0.2"])
    it = fetcher(port, resolver=names, allow=lambda address: address == "127.0.0.1")
    with pytest.raises(ImageError, match=r"other\.test.*expected a public address"):
        fetch(it, f"http://images.test:{port}/to/http://other.test:{port}/b")


def test_a_host_that_does_not_answer() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    with pytest.raises(ImageError, match="cannot be fetched"):
        fetch(fetcher(free), f"http://images.test:{free}/a.png")
