"""Keys and certificates of a deployment: who the server is, and who each silo is.

    fedlora keys FOLDER --host flower.example.org --silo hospital-a --silo hospital-b

writes into FOLDER

    ca.crt       the authority's certificate; every silo, and whoever calls ``flwr``, gets a copy
    server.pem   the SuperLink's certificate, for the host names and addresses given
    server.key   its key
    NAME         the key of a silo (ECDSA, NIST P-384, OpenSSH), for this silo alone
    NAME.pub     its public half, which the server registers

The authority's own key is used once and is not kept: with another server or host everything is
made anew. A silo can make its pair itself (``ssh-keygen -t ecdsa -b 384 -N "" -f NAME``) and hand
over NAME.pub alone; that is the better way where it has ssh-keygen.
"""

import argparse
import datetime
import ipaddress
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedlora.silo.card import NAME

DAYS = 365
"""How long certificates are valid, unless told otherwise."""


def main(words: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser("fedlora keys", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where they are written; made if need be")
    parser.add_argument(
        "--host", action="append", default=[], help="host name or address of the SuperLink"
    )
    parser.add_argument("--silo", action="append", default=[], help="name of a silo")
    parser.add_argument("--days", type=int, default=DAYS, help="validity of the certificates")
    given = parser.parse_args(words)
    try:
        made = write_keys(given.folder, given.host, given.silo, given.days)
    except ValueError as error:
        print(f"fedlora keys: {error}", file=sys.stderr)
        return 2
    for path in made:
        print(path)
    return 0


def write_keys(
    folder: Path, hosts: Sequence[str], silos: Sequence[str], days: int = DAYS
) -> list[Path]:
    """Write the files of `simulations.tools.keys`; the paths of all of them.

    Nothing that exists is overwritten: silos that have their keys would be locked out.

    Args:
        folder: made if need be.
        hosts: names and addresses by which the SuperLink is reached; empty: no certificates.
        silos: names.
        days: validity of the certificates.

    Raises:
        ValueError: one sentence, before anything is written.
    """
    if not hosts and not silos:
        raise ValueError("name the SuperLink by --host, or a silo by --silo")
    for name in silos:
        if not NAME.fullmatch(name):
            raise ValueError(f"--silo {name!r} must be up to 64 letters, digits and any of '_.-'")
    for host in hosts:
        _general(host)
    if days < 1:
        raise ValueError(f"--days {days} must be at least 1")
    server = ["ca.crt", "server.pem", "server.key"] if hosts else []
    if clash := {*server} & {*silos, *(f"{s}.pub" for s in silos)}:
        raise ValueError(f"--silo {min(clash)!r} is the name of a file of the server")
    paths = [folder / name for name in [*server, *(f for s in silos for f in (s, f"{s}.pub"))]]
    if there := [p for p in paths if p.exists()]:
        raise ValueError(f"{there[0]} exists, and keys are not overwritten: use another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if hosts:
        _write_certificates(folder, hosts, days)
    for name in silos:
        key = ec.generate_private_key(ec.SECP384R1())
        _write(folder / name, _private(key, PrivateFormat.OpenSSH), secret=True)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        _write(folder / f"{name}.pub", public + b" " + name.encode() + b"\n")
    return paths


def _write_certificates(folder: Path, hosts: Sequence[str], days: int) -> None:
    """An authority, and a server's certificate for some hosts."""
    authority, key = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedlora authority")])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    names = x509.SubjectAlternativeName([_general(host) for host in hosts])
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    root = _builder(issuer, issuer, authority, days).add_extension(
        x509.BasicConstraints(ca=True, path_length=0), critical=True
    )
    server = _builder(subject, issuer, key, days).add_extension(
        x509.BasicConstraints(ca=False, path_length=None), critical=True
    )
    server = server.add_extension(names, critical=False).add_extension(uses, critical=False)
    issued = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    server = server.add_extension(issued, critical=False)
    for name, certificate in (("ca.crt", root), ("server.pem", server)):
        signed = certificate.sign(authority, hashes.SHA384())
        _write(folder / name, signed.public_bytes(Encoding.PEM))
    _write(folder / "server.key", _private(key, PrivateFormat.PKCS8), secret=True)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(minutes=5))  # clocks differ
    builder = builder.not_valid_after(now + datetime.timedelta(days=days))
    own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return builder.add_extension(own, critical=False)


def _general(host: str) -> x509.GeneralName:
    """A host as a certificate names it.

    Raises:
        ValueError: if it is neither an address nor a name.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not host.isascii() or any(c.isspace() or c in ":/" for c in host):
            raise ValueError(f"--host {host!r} is neither a host name nor an address") from None
        return x509.DNSName(host)


def _private(key: ec.EllipticCurvePrivateKey, how: PrivateFormat) -> bytes:
    return key.private_bytes(Encoding.PEM, how, NoEncryption())


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Write a new file; a secret one for its owner alone."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600 if secret else 0o644), "wb") as file:
        file.write(content)


if __name__ == "__main__":
    sys.exit(main())
