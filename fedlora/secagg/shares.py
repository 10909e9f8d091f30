"""Shares of a secret, any ``t`` of which recover it and fewer say nothing of it, by `pycryptodome`.

Shamir, "How to Share a Secret", CACM 1979, over GF(2^128): a secret is one block of 16 bytes, as is
a share. Holder ``i``, counted from 1, has the polynomial's value at ``i``.
"""

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

from fedlora.secagg.cost import SHARE


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """One share for each holder, in order.

    Args:
        secret: 16 bytes.
        threshold: ``t``.
        holders: how many there are, at least ``t``.

    Raises:
        ValueError: if there are fewer holders than shares are needed.
    """
    if not 1 < threshold <= holders:
        raise ValueError(f"a secret of {holders} holders cannot need {threshold} shares")
    return [share for _, share in Shamir.split(threshold, holders, secret, ssss=False)]


def combined(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret.

    Args:
        shares: by holder, counted from 1.
        threshold: ``t``; further shares are not looked at.

    Raises:
        ValueError: if there are fewer, or one has another length.
    """
    if len(shares) < threshold:
        raise ValueError(f"{len(shares)} shares are there, {threshold} are needed")
    if any(len(s) != SHARE for s in shares.values()):
        raise ValueError(f"a share has another length than {SHARE} bytes")
    return Shamir.combine(sorted(shares.items())[:threshold], ssss=False)
