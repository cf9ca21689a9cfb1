"""TLS settings: what a context of them trusts, and how each wrong file is said."""

from __future__ import annotations

import ssl
from pathlib import Path

import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from agent.errors import UsageError
from agent.sinks.tls import TlsSettings


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEM files, good ones and wrong ones, by the names that the tests below use."""
    place = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    ours, others = authority.issue_cert("a.example"), authority.issue_cert("b.example")
    key = serialization.load_pem_private_key(ours.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    chain = ours.cert_chain_pems[0].bytes()
    contents = {
        "ca": authority.cert_pem.bytes(),
        "both": ours.private_key_and_cert_chain_pem.bytes(),
        "certificate": chain,
        "key": ours.private_key_pem.bytes(),
        "others_key": others.private_key_pem.bytes(),
        "encrypted": encrypted,
        "both_encrypted": encrypted + chain,
        "empty": b"",
        "junk": b"no PEM at all\n",
        "torn": authority.cert_pem.bytes()[:200] + b"\n-----END CERTIFICATE-----\n",
    }
    for name, content in contents.items():
        (place / name).write_bytes(content)
        (place / name).chmod(0o600)
    (place / "directory").mkdir()
    return place


def settings(files: Path, **names: str) -> TlsSettings:
    return TlsSettings(**{setting: str(files / name) for setting, name in names.items()})


def subjects(context: ssl.SSLContext) -> list[object]:
    return [certificate["subject"] for certificate in context.get_ca_certs()]


@pytest.mark.parametrize(
    "names", [{}, {"ca": "ca"}, {"certificate": "both"}, {"certificate": "certificate", "key": "key"}]
)
def test_the_peer_and_its_name_are_always_verified(files: Path, names: dict[str, str]) -> None:
    context = settings(files, **names).context()
    assert context.verify_mode == ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_there_is_no_setting_against_it() -> None:
    assert TlsSettings.__struct_fields__ == ("ca", "certificate", "key", "server_name")


def test_an_own_authority_is_the_only_one(files: Path) -> None:
    assert len(subjects(settings(files, ca="ca").context())) == 1


def test_without_one_the_systems_are_trusted(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files / "ca"))
    context = TlsSettings().context()
    assert subjects(settings(files, ca="ca").context())[0] in subjects(context)


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"ca": "absent"}, 'ca "{}/absent": No such file or directory: expected a PEM file that can be read'),
        ({"ca": "directory"}, 'ca "{}/directory": Is a directory: expected a PEM file that can be read'),
        ({"ca": "empty"}, 'ca "{}/empty": no certificate in it: expected a PEM file of certificates'),
        ({"ca": "junk"}, 'ca "{}/junk": no certificate in it: expected a PEM file of certificates'),
        ({"ca": "torn"}, 'ca "{}/torn": no certificate in it: expected a PEM file of certificates'),
        ({"ca": "key"}, 'ca "{}/key": no certificate in it: expected a PEM file of certificates'),
        (
            {"certificate": "absent"},
            'certificate "{}/absent": No such file or directory: expected a PEM file that can be read',
        ),
        (
            {"certificate": "certificate", "key": "absent"},
            'key "{}/absent": No such file or directory: expected a PEM file that can be read',
        ),
        (
            {"certificate": "certificate"},
            'certificate "{}/certificate": no certificate with a private key in it: '
            "expected PEM of a certificate and its private key",
        ),
        (
            {"certificate": "certificate", "key": "junk"},
            'certificate "{0}/certificate", key "{0}/junk": no certificate with a private key in it: '
            "expected PEM of a certificate and its private key",
        ),
        (
            {"certificate": "certificate", "key": "others_key"},
            'key "{0}/others_key": its private key is not that of certificate "{0}/certificate"',
        ),
        (
            {"certificate": "certificate", "key": "encrypted"},
            'key "{}/encrypted": its private key is encrypted: expected a key without a password',
        ),
        (
            {"certificate": "both_encrypted"},
            'certificate "{}/both_encrypted": its private key is encrypted: expected a key without a password',
        ),
    ],
)
def test_a_wrong_file_is_one_line(files: Path, names: dict[str, str], line: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(files, **names).context()
    assert str(caught.value) == line.format(files)


def test_a_private_key_that_everybody_may_read_is_noticed(files: Path, tmp_path: Path) -> None:
    for name in ("both", "certificate", "key"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
        (tmp_path / name).chmod(0o644)
    assert settings(files, certificate="both").notices() == []
    assert settings(files, ca="ca").notices() == []
    for names, secret in (
        ({"certificate": "both"}, "both"),
        ({"certificate": "certificate", "key": "key"}, "key"),
    ):
        assert settings(tmp_path, **names).notices() == [
            f'"{tmp_path}/{secret}" holds a secret and is world-readable, mode 0644: expected 0600'
        ]
    (tmp_path / "key").chmod(0o600)
    assert settings(tmp_path, certificate="certificate", key="key").notices() == []


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ({"key": "/x"}, "certificate: the certificate that key belongs to"),
        ({"verify": False}, "unknown field `verify`"),
        ({"ca": 1}, "Expected `str`, got `int` - at `\\$.ca`"),
    ],
)
def test_settings_that_are_wrong(tree: dict[str, object], reason: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(tree, TlsSettings)
