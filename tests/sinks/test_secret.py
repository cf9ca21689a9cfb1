"""Secrets: read from their places, said nowhere."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import msgspec
import pytest

from agent.errors import UsageError
from agent.sinks.secret import Secret, SecretSettings

TEXT = "s3cret-Täxt"


def written(path: Path, content: bytes, mode: int = 0o600) -> SecretSettings:
    path.write_bytes(content)
    path.chmod(mode)
    return SecretSettings(file=str(path))


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_a_file_with_or_without_a_line_end(tmp_path: Path, end: bytes) -> None:
    secret = written(tmp_path / "token", TEXT.encode() + end).read()
    assert secret.reveal() == TEXT
    assert secret.notices == []


def test_spaces_belong_to_it(tmp_path: Path) -> None:
    assert written(tmp_path / "token", b" a b \n").read().reveal() == " a b "


def test_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", TEXT)
    settings = SecretSettings(env="TOKEN")
    secret = settings.read()
    assert (secret.reveal(), secret.notices) == (TEXT, [])
    assert not settings.changed_since(secret)


def test_a_systemd_credential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    written(tmp_path / "token", TEXT.encode(), 0o440)
    secret = SecretSettings(credential="token").read()
    assert (secret.reveal(), secret.notices) == (TEXT, [])


def test_it_is_shown_nowhere() -> None:
    secret = Secret(TEXT, ["a notice"])
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>40}", f"{secret!r}", "%s" % secret, f"{[secret]}"]  # noqa: UP031
    assert shown == ["***"] * 6 + ["[***]"]
    for encode in (msgspec.json.encode, msgspec.msgpack.encode, pickle.dumps, copy.copy, copy.deepcopy, vars):
        with pytest.raises(TypeError) as caught:
            encode(secret)  # type: ignore[operator]
        assert TEXT not in str(caught.value)
    with pytest.raises(TypeError):
        msgspec.to_builtins(secret)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty: expected a secret"),
        (b"\n", "it is not one line of printable text: expected a secret"),
        (b"one\ntwo\n", "it is not one line of printable text: expected a secret"),
        (b"one\n\n", "it is not one line of printable text: expected a secret"),
        (b"one\rtwo", "it is not one line of printable text: expected a secret"),
        (b"one\0two", "it is not one line of printable text: expected a secret"),
        (b"one\xfftwo", "it is not UTF-8: expected a secret"),
        (b"x" * 65537, "it is too long: expected a secret of at most 65536 bytes"),
    ],
)
def test_what_cannot_be_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str) -> None:
    settings = written(tmp_path / "token", content)
    with pytest.raises(UsageError) as caught:
        settings.read()
    assert str(caught.value) == f'file "{tmp_path}/token": {reason}'
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        SecretSettings(credential="token").read()
    assert str(caught.value) == f'credential "token": {reason}'


def test_the_longest(tmp_path: Path) -> None:
    assert written(tmp_path / "token", b"x" * 65536).read().reveal() == "x" * 65536


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "it is not set or empty: expected a secret"),
        (b"", "it is not set or empty: expected a secret"),
        (b"one\ntwo", "it is not one line of printable text: expected a secret"),
        (b"one\xfftwo", "it is not UTF-8: expected a secret"),
    ],
)
def test_what_cannot_be_a_secret_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, value: bytes | None, reason: str
) -> None:
    monkeypatch.delenv("TOKEN", raising=False)
    if value is not None:
        monkeypatch.setitem(os.environ, "TOKEN", os.fsdecode(value))
    with pytest.raises(UsageError) as caught:
        SecretSettings(env="TOKEN").read()
    assert str(caught.value) == f'env "TOKEN": {reason}'


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(UsageError) as caught:
            SecretSettings(file=str(path)).read()
        assert str(caught.value) == f'file "{path}": {reason}: expected a file with a secret that can be read'


def test_a_credential_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(UsageError) as caught:
        SecretSettings(credential="token").read()
    expected = 'credential "token": $CREDENTIALS_DIRECTORY is not set: expected LoadCredential=token: in the unit'
    assert str(caught.value) == expected


@pytest.mark.parametrize("mode", [0o604, 0o644, 0o602, 0o666])
def test_a_world_readable_file_is_noticed(tmp_path: Path, mode: int) -> None:
    secret = written(tmp_path / "token", b"text", mode).read()
    assert secret.reveal() == "text"
    assert secret.notices == [
        f'"{tmp_path}/token" holds a secret and is world-readable, mode {mode:04o}: expected 0600'
    ]


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o660])
def test_a_file_for_the_owner_and_a_group_is_not(tmp_path: Path, mode: int) -> None:
    assert written(tmp_path / "token", b"text", mode).read().notices == []


def test_a_change_is_seen(tmp_path: Path) -> None:
    settings = written(tmp_path / "token", b"one")
    secret = settings.read()
    assert not settings.changed_since(secret)
    status = (tmp_path / "token").stat()
    os.utime(tmp_path / "token", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert settings.changed_since(secret)
    secret = settings.read()
    assert not settings.changed_since(secret)
    written(tmp_path / "new", b"two")
    os.utime(tmp_path / "new", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    (tmp_path / "new").rename(tmp_path / "token")
    assert settings.changed_since(secret)
    secret = settings.read()
    (tmp_path / "token").unlink()
    assert settings.changed_since(secret)


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({}, "file: exactly one of file, env and credential"),
        ({"file": "/x", "env": "X"}, "env: exactly one of file, env and credential"),
        ({"file": "/x", "credential": "x"}, "credential: exactly one of file, env and credential"),
        ({"env": "A=B"}, "env: the name of an environment variable"),
        ({"credential": "a/b"}, 'credential: a name without "/"'),
        ({"credential": ".."}, 'credential: a name without "/"'),
        ({"text": "x"}, "unknown field `text`"),
    ],
)
def test_settings_that_are_wrong(tree: dict[str, object], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(tree, SecretSettings)


def test_settings_hold_the_place_only(tmp_path: Path) -> None:
    settings = written(tmp_path / "token", TEXT.encode())
    settings.read()
    assert TEXT not in repr(settings)
    assert msgspec.json.decode(msgspec.json.encode(settings)) == {
        "file": f"{tmp_path}/token",
        "env": "",
        "credential": "",
    }
