"""TLS before a server that has none: certificates of one's own, and a proxy that ends TLS as Redis or Postgres would."""

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_SSL_REQUEST = bytes.fromhex(
    "0000000804d2162f"
)  # https://www.postgresql.org/docs/current/protocol-message-formats.html


class Authority:
    """Signs certificates.

    Args:
        folder: where its files go.
        name: of its files.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self._file = folder / f"{name}.pem"
        certificate = (
            self._builder(self._name)
            .public_key(self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    @property
    def file(self) -> str:
        """The authority's own certificate."""
        return str(self._file)

    def _builder(self, subject: x509.Name) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
        )

    def context_for(self, host: str) -> ssl.SSLContext:
        """Return a server's context, with a certificate for a host's name or address."""
        key = ec.generate_private_key(ec.SECP256R1())
        try:
            name: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
        except ValueError:
            name = x509.DNSName(host)
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]))
            .public_key(key.public_key())
            .add_extension(x509.SubjectAlternativeName([name]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        path = self._folder / f"{host}.server.pem"
        path.write_bytes(
            certificate.public_bytes(serialization.Encoding.PEM)
            + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@asynccontextmanager
async def tls_before(url: str, context: ssl.SSLContext, *, postgres: bool = False) -> AsyncIterator[int]:
    """Serve TLS on a port of loopback, and pass what comes on to the server of ``url`` in plain; yields the port."""
    target = urlsplit(url)
    links: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        links.add(task)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            if postgres:
                assert await reader.readexactly(8) == _SSL_REQUEST, "the client began in plain text"
                writer.write(b"S")
                await writer.drain()
                await writer.start_tls(context)
            from_server, to_server = await asyncio.open_connection(target.hostname, target.port)
            try:
                await asyncio.gather(_pump(reader, to_server), _pump(from_server, writer))
            finally:
                to_server.close()
        writer.close()
        links.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=None if postgres else context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for link in list(links):
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()
