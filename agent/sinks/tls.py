"""TLS for sinks: whom to trust, and who we are.

A peer that a sink connects to is always verified; there is no setting to leave that out, so nothing is ever sent to one
that failed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from agent.errors import UsageError
from agent.sinks.secret import exposure

if TYPE_CHECKING:
    import ssl


class TlsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sink's section `tls`.

    Attributes:
        ca: a PEM file of the only authorities to trust; "" trusts the system's.
        certificate: the client's own certificate with its chain, a PEM file; "" has none.
        key: the certificate's private key, a PEM file; "" where it is in the certificate's file.
        server_name: the name that the peer's certificate must hold; "" is the host of the address.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""
    server_name: str = ""

    def __post_init__(self) -> None:
        if self.key and not self.certificate:
            raise ValueError("certificate: the certificate that key belongs to")

    def context(self) -> ssl.SSLContext:
        """What these settings make of a connection: TLS 1.2 at least, a verified peer and host name.

        Raises:
            UsageError: a file can't be read, or doesn't hold what it should.
        """
        import ssl  # takes 1 MB of memory and 10 ms, which an agent without TLS doesn't pay

        for setting, path in (("ca", self.ca), ("certificate", self.certificate), ("key", self.key)):
            _check_readable(setting, path)
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except ssl.SSLError:
            raise UsageError(f'ca "{self.ca}": no certificate in it', "a PEM file of certificates") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate:
            _load_certificate(context, self.certificate, self.key)
        return context

    def notices(self) -> list[str]:
        """What is worth a warning: a private key that everybody may read. After `context`, which has seen the file."""
        path = self.key or self.certificate
        return exposure(path) if path else []


class ServerTlsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section `tls` of a sink that is asked. Its files are read when the sink opens, and not again.

    Attributes:
        certificate: the server's own certificate with its chain, a PEM file.
        key: the certificate's private key, a PEM file; "" where it is in the certificate's file.
        client_ca: a PEM file of authorities: only clients with a certificate of theirs are served; "" serves all.
    """

    certificate: str
    key: str = ""
    client_ca: str = ""

    def __post_init__(self) -> None:
        if not self.certificate:
            raise ValueError("certificate: a PEM file")

    def context(self) -> ssl.SSLContext:
        """What these settings make of a connection: TLS 1.2 at least.

        Raises:
            UsageError: a file can't be read, or doesn't hold what it should.
        """
        import ssl

        files = (("certificate", self.certificate), ("key", self.key), ("client_ca", self.client_ca))
        for setting, path in files:
            _check_readable(setting, path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION  # so that whoever sends has nothing to read first
        _load_certificate(context, self.certificate, self.key)
        if self.client_ca:
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError:
                what = f'client_ca "{self.client_ca}": no certificate in it'
                raise UsageError(what, "a PEM file of certificates") from None
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def notices(self) -> list[str]:
        """What is worth a warning: a private key that everybody may read. After `context`, which has seen the file."""
        return exposure(self.key or self.certificate)


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    import ssl

    setting, path = ("key", key) if key else ("certificate", certificate)

    def refuse_password() -> str:
        # Without this, OpenSSL asks on the terminal and waits.
        raise UsageError(f'{setting} "{path}": its private key is encrypted', "a key without a password")

    try:
        context.load_cert_chain(certificate, key or None, password=refuse_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise UsageError(
                f'{setting} "{path}": its private key is not that of certificate "{certificate}"'
            ) from None
        files = f'certificate "{certificate}"' + (f', key "{key}"' if key else "")
        raise UsageError(f"{files}: {_pem_fault(error)}", "PEM of a certificate and its private key") from None


def _check_readable(setting: str, path: str) -> None:
    """OpenSSL's own errors don't say which of the files they mean."""
    if not path:
        return
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UsageError(f'{setting} "{path}": {error.strerror}', "a PEM file that can be read") from None


def _pem_fault(error: ssl.SSLError) -> str:
    return error.reason.lower().replace("_", " ") if error.reason else "no certificate with a private key in it"
