"""Keys and masks of secure aggregation, by `cryptography`.

    agreed(a, B) = agreed(b, A)            X25519, RFC 7748
    derived(secret, purpose)               HKDF-SHA256, RFC 5869
    PRG(key)                               ChaCha20's key stream, RFC 8439
    sealed(key, text)                      ChaCha20-Poly1305, RFC 8439

Every derived key serves one purpose in one instance of the protocol and one direction, so the fixed
nonces never meet a key twice.
"""

import hashlib
import os

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlora.secagg.cost import KEY, SECRET
from fedlora.secagg.fixed import Codes

CHUNK = 1 << 18
"""Numbers of a mask that are in memory at once."""


def new_secret() -> bytes:
    """A secret of 128 bits from the operating system."""
    return os.urandom(SECRET)


def derived(secret: bytes, *purpose: str | int) -> bytes:
    """A key of 32 bytes for one purpose.

    Args:
        secret: unknown to others.
        purpose: words and numbers that name it.
    """
    info = "|".join(map(str, ("fedlora secagg", *purpose))).encode()
    return HKDF(SHA256(), KEY, salt=None, info=info).derive(secret)


def public(private: bytes) -> bytes:
    """The public key of a private one, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, other: bytes) -> bytes:
    """The secret that two parties have in common.

    Args:
        private: key of one.
        other: public key of the other.

    Raises:
        ValueError: if the public key is none, or a degenerate one.
    """
    key = X25519PrivateKey.from_private_bytes(private)
    return key.exchange(X25519PublicKey.from_public_bytes(other))


def sealed(key: bytes, text: bytes, context: bytes) -> bytes:
    """A text that only those who have the key can read; the key is used once."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, context)


def opened(key: bytes, box: bytes, context: bytes) -> bytes:
    """The inverse of `sealed`.

    Raises:
        ValueError: if it was sealed with another key, in another context, or changed since.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), box, context)
    except InvalidTag as error:
        raise ValueError("it was sealed for another message, or has been changed") from error


def digest(*parts: bytes) -> bytes:
    """SHA-256 over parts and their lengths."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.digest()


def add_mask(total: Codes, key: bytes, sign: int) -> None:
    """Add a key's mask to codes in place, or subtract it, modulo ``2^b``.

    Args:
        total: ``[D]``, changed.
        key: of the mask, 32 bytes.
        sign: 1 or -1.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    for start in range(0, total.size, CHUNK):
        part = total[start : start + CHUNK]
        mask = np.frombuffer(stream.update(bytes(part.nbytes)), dtype=total.dtype)
        if sign > 0:
            part += mask
        else:
            part -= mask
