"""TLS for sinks that connect: whom to trust, and who we are.

The peer is always verified; there is no setting to leave that out, so nothing is ever sent to a peer that failed.
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
            self._load_certificate(context)
        return context

    def notices(self) -> list[str]:
        """What is worth a warning: a private key that everybody may read. After `context`, which has seen the file."""
        path = self.key or self.certificate
        return exposure(path) if path else []

    def _load_certificate(self, context: ssl.SSLContext) -> None:
        import ssl

        setting, path = ("key", self.key) if self.key else ("certificate", self.certificate)

        def refuse_password() -> str:
            # Without this, OpenSSL asks on the terminal and waits.
            raise UsageError(f'{setting} "{path}": its private key is encrypted', "a key without a password")

        try:
            context.load_cert_chain(self.certificate, self.key or None, password=refuse_password)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                raise UsageError(
                    f'{setting} "{path}": its private key is not that of certificate "{self.certificate}"'
                ) from None
            files = f'certificate "{self.certificate}"' + (f', key "{self.key}"' if self.key else "")
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
