"""Secrets: named in the configuration by their place, read when a sink opens, shown nowhere."""

from __future__ import annotations

import os
import re
from typing import NoReturn

import msgspec

from agent.errors import UsageError

_BYTES_MAX = 64 << 10
_CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"  # systemd.exec(5)

FileIdentity = tuple[int, int, int]


class Secret:
    """A text that only `reveal` shows: not a log, an error, a repr, a pickle or an encoder.

    Attributes:
        notices: what is worth a warning about the place that it was read from.
        identity: of the file that it was read from; None without a file.
    """

    __slots__ = ("_text", "identity", "notices")

    def __init__(self, text: str, notices: list[str] | None = None, identity: FileIdentity | None = None) -> None:
        self._text = text
        self.notices = notices or []
        self.identity = identity

    def reveal(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return "***"

    def __format__(self, specification: str) -> str:
        return "***"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not copied or pickled")


class SecretSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a secret is read from: one of three places. The secret itself never stands in the configuration.

    Attributes:
        file: a file that holds it, with or without a line feed at its end.
        env: an environment variable.
        credential: the name of a systemd credential (LoadCredential= of the unit).
    """

    file: str = ""
    env: str = ""
    credential: str = ""

    def __post_init__(self) -> None:
        given = [name for name in ("file", "env", "credential") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"{given[1] if given else 'file'}: exactly one of file, env and credential")
        if "=" in self.env:
            raise ValueError("env: the name of an environment variable")
        if "/" in self.credential or self.credential in (".", ".."):
            raise ValueError('credential: a name without "/"')

    @property
    def place(self) -> str:
        """Where it is read from, as errors name it."""
        return next(f'{name} "{value}"' for name in ("file", "env", "credential") if (value := getattr(self, name)))

    def read(self) -> Secret:
        """The secret, as it is now at its place.

        Raises:
            UsageError: there is none, or none that can be used; it names the place, never what is there.
        """
        if self.env:
            # A variable's bytes that are no UTF-8 come as surrogates, and go back to what they were.
            return Secret(self._checked(os.environ.get(self.env, "").encode(errors="surrogateescape")))
        path = self._path()
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                content = file.read(_BYTES_MAX + 1)
        except OSError as error:
            raise UsageError(f"{self.place}: {error.strerror}", "a file with a secret that can be read") from None
        return Secret(self._checked(content), exposure(path, status.st_mode), _identity(status))

    def changed_since(self, secret: Secret) -> bool:
        """Whether the file is another, or written again, since the secret was read from it."""
        if secret.identity is None:
            return False
        try:
            return _identity(os.stat(self._path())) != secret.identity
        except OSError:  # somebody is just about to put a new one there
            return True

    def _path(self) -> str:
        if self.file:
            return self.file
        directory = os.environ.get(_CREDENTIALS_VARIABLE, "")
        if not directory:
            raise UsageError(
                f"{self.place}: ${_CREDENTIALS_VARIABLE} is not set", f"LoadCredential={self.credential}: in the unit"
            )
        return os.path.join(directory, self.credential)

    def _checked(self, content: bytes) -> str:
        """The content as text without its line end; its bytes are in no error."""
        if not content:
            raise UsageError(f"{self.place}: it is {'not set or ' if self.env else ''}empty", "a secret")
        if len(content) > _BYTES_MAX:
            raise UsageError(f"{self.place}: it is too long", f"a secret of at most {_BYTES_MAX} bytes")
        content = content.removesuffix(b"\n").removesuffix(b"\r")
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise UsageError(f"{self.place}: it is not UTF-8", "a secret") from None
        if not text or not text.isprintable():
            raise UsageError(f"{self.place}: it is not one line of printable text", "a secret")
        return text


class BasicSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A user's name and where the password is."""

    user: str
    password: SecretSettings

    def __post_init__(self) -> None:
        if not self.user or re.search(r"[:\0-\x1f\x7f]", self.user):
            raise ValueError('user: a name without ":" and control characters')


def exposure(path: str, mode: int | None = None) -> list[str]:
    """A warning about a file with a secret that everybody on this host may read or write, else nothing."""
    mode = os.stat(path).st_mode if mode is None else mode
    if mode & 0o007 == 0:
        return []
    return [f'"{path}" holds a secret and is world-readable, mode {mode & 0o777:04o}: expected 0600']


def _identity(status: os.stat_result) -> FileIdentity:
    return (status.st_dev, status.st_ino, status.st_mtime_ns)
