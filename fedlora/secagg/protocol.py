r"""The protocol: a sum of codes of which nobody but each client knows a summand.

    1 keys      k → server    two public keys                    server → k: its neighbours' keys
    2 shares    k → j         sealed shares of k's key secret and of k's seed, threshold t
    3 vector    y_k = e_k + PRG(seed_k) + Σ_{j>k} PRG(s_kj) - Σ_{j<k} PRG(s_kj)   mod 2^b
    4 unmask    one share of each neighbour: of its seed if its vector arrived, of its key if not
    server      Σ y_k - Σ PRG(seed_k) ± Σ masks with the lost = Σ e_k over those whose vectors came

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017.
``s_kj`` runs over neighbours that finished stage 2; who is lost before it is in no mask. A client
answers each stage of an instance once, and tells the share of one secret of a neighbour, never
both: with ``t`` above half of the holders no server can have both secrets of a client. Secrets come
from the operating system and belong to one instance.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from fedlora.secagg.config import KEYS, SHARES, UNMASK, VECTOR
from fedlora.secagg.cost import KEY, SHARE
from fedlora.secagg.fixed import Codes
from fedlora.secagg.graph import Graph, holders
from fedlora.secagg.masks import (
    add_mask,
    agreed,
    derived,
    digest,
    new_secret,
    opened,
    public,
    sealed,
)
from fedlora.secagg.shares import combined, split


@dataclass(frozen=True)
class Member:
    """A client in one instance: its secrets and what it has been sent. Never leaves the client."""

    id: int
    instance: str
    needed: int
    """``t``."""
    secret: bytes
    """From which its key of masks is made; its shares let others make it."""
    channel: bytes
    """From which its key of the channel is made."""
    seed: bytes
    """From which its own mask is made."""
    stage: str = KEYS
    """The last that it has answered."""
    keys: Mapping[int, bytes] = field(default_factory=dict)
    """Public keys of its neighbours."""
    own: bytes = b""
    """Its own shares of its secrets, which it holds itself."""
    boxes: Mapping[int, bytes] = field(default_factory=dict)
    """Sealed shares of the neighbours that finished stage 2."""

    @staticmethod
    def begin(id: int, instance: str, needed: int) -> "Member":
        """Stage 1: new secrets."""
        return Member(id, instance, needed, new_secret(), new_secret(), new_secret())

    @property
    def public(self) -> bytes:
        """Its public keys, `PUBLIC` bytes."""
        return public(self._mask_key) + public(self._channel_key)

    @property
    def _mask_key(self) -> bytes:
        return mask_key(self.secret, self.instance)

    @property
    def _channel_key(self) -> bytes:
        return derived(self.channel, "channel", self.instance)

    def shared(self, keys: Mapping[int, bytes]) -> tuple["Member", dict[int, bytes]]:
        """Stage 2: sealed shares for each neighbour.

        Args:
            keys: public keys of its neighbours.

        Raises:
            ValueError: if it has done this stage, or the keys are not those of enough others.
        """
        self._require(KEYS)
        everyone = sorted((self.id, *keys))
        known = {self.public, *keys.values()}
        if self.id in keys or len(known) != len(everyone):
            raise ValueError("the server names one key for several clients")
        if len(everyone) < self.needed:
            raise ValueError(f"{len(everyone)} clients would hold shares, {self.needed} are needed")
        if 2 * self.needed <= len(everyone):
            raise ValueError(
                f"the server asks for {self.needed} of {len(everyone)} shares: two groups of "
                "clients could give it both secrets of one, so it must be more than half"
            )
        pairs = zip(
            split(self.secret, self.needed, len(everyone)),
            split(self.seed, self.needed, len(everyone)),
            strict=True,
        )
        texts = {j: of_key + of_seed for j, (of_key, of_seed) in zip(everyone, pairs, strict=True)}
        own = texts.pop(self.id)
        boxes = {
            j: sealed(self._box_key(keys[j], self.id, j), text, self._context(self.id, j))
            for j, text in texts.items()
        }
        return replace(self, stage=SHARES, keys=dict(keys), own=own), boxes

    def masked(self, codes: Codes, boxes: Mapping[int, bytes]) -> tuple["Member", Codes]:
        """Stage 3: its vector.

        Args:
            codes: ``e_k``; not changed.
            boxes: of the neighbours that finished stage 2, sealed for this client.

        Raises:
            ValueError: if it has done this stage, or too few others are left.
        """
        self._require(SHARES)
        if not boxes.keys() <= self.keys.keys():
            raise ValueError("the server names a neighbour that it had not named before")
        if len(boxes) + 1 < self.needed:
            raise ValueError(f"{len(boxes) + 1} clients are left, {self.needed} are needed")
        total = codes.copy()
        add_mask(total, own_mask(self.seed, self.instance), 1)
        for j in boxes:
            key = pair_mask(self._mask_key, self.keys[j][:KEY], self.instance, self.id, j)
            add_mask(total, key, sign(self.id, j))
        return replace(self, stage=VECTOR, boxes=dict(boxes)), total

    def revealed(
        self, survivors: Collection[int], lost: Collection[int]
    ) -> tuple["Member", dict[int, bytes]]:
        """Stage 4: one share of each neighbour and of itself.

        Args:
            survivors: clients whose vectors have arrived, itself among them: shares of their seeds.
            lost: those whose vectors have not: shares of their keys' secrets.

        Raises:
            ValueError: if it has done this stage, or the answer could uncover a vector.
        """
        self._require(VECTOR)
        if both := sorted(set(survivors) & set(lost)):
            raise ValueError(f"the server asks for both secrets of client {both[0]}")
        if self.id not in survivors:
            raise ValueError("the server says that this client's vector has not arrived")
        if not {*survivors, *lost} <= {self.id, *self.boxes}:
            raise ValueError("the server asks for a secret of a client that is no neighbour")
        if len(set(survivors)) < self.needed:
            raise ValueError(
                f"the sum would be of {len(set(survivors))} clients, {self.needed} are needed"
            )
        found = {j: self._pair(j)[SHARE:] for j in survivors} | {
            j: self._pair(j)[:SHARE] for j in lost
        }
        return self.forgotten(), found

    def forgotten(self) -> "Member":
        """The member without secrets, after its last stage."""
        nothing = b""
        return Member(self.id, self.instance, self.needed, nothing, nothing, nothing, UNMASK)

    def _pair(self, owner: int) -> bytes:
        """The two shares that it holds of a client."""
        if owner == self.id:
            return self.own
        key = self._box_key(self.keys[owner], owner, self.id)
        return opened(key, self.boxes[owner], self._context(owner, self.id))

    def _box_key(self, other: bytes, owner: int, holder: int) -> bytes:
        secret = agreed(self._channel_key, other[KEY:])
        return derived(secret, "shares", self.instance, owner, holder)

    def _context(self, owner: int, holder: int) -> bytes:
        return digest(self.instance.encode(), *(str(i).encode() for i in (owner, holder)))

    def _require(self, stage: str) -> None:
        if self.stage != stage:
            raise ValueError(
                f"the server asks for what follows stage {stage}, and this client has done "
                f"{self.stage}: a stage is answered once"
            )


def mask_key(secret: bytes, instance: str) -> bytes:
    """The private key of masks that a secret makes."""
    return derived(secret, "mask key", instance)


def own_mask(seed: bytes, instance: str) -> bytes:
    """The key of a client's own mask."""
    return derived(seed, "own mask", instance)


def pair_mask(private: bytes, other: bytes, instance: str, one: int, two: int) -> bytes:
    """The key of the mask that two clients have in common.

    Args:
        private: key of masks of one of them.
        other: public key of masks of the other.
        instance: of the protocol.
        one, two: their ids.
    """
    return derived(agreed(private, other), "pair mask", instance, min(one, two), max(one, two))


def sign(client: int, other: int) -> int:
    """With which a client adds its mask with another."""
    return 1 if other > client else -1


def unmasked(
    total: Codes,
    graph: Graph,
    keys: Mapping[int, bytes],
    survivors: Collection[int],
    lost: Collection[int],
    told: Mapping[int, Mapping[int, bytes]],
    *,
    instance: str,
    needed: int,
) -> Codes:
    """The sum of the survivors' codes.

    Args:
        total: ``Σ y_k`` over the survivors; not changed.
        graph: of the instance.
        keys: public keys by client.
        survivors: clients whose vectors are in the sum.
        lost: clients that finished stage 2 and sent no vector.
        told: holder -> owner -> share, from stage 4.
        instance: of the protocol.
        needed: ``t``.

    Raises:
        ValueError: if too few shares came for a secret, or they are not those of its owner.
    """

    def secret(owner: int) -> bytes:
        places = {h: n for n, h in enumerate(holders(graph, owner), start=1)}
        found = {places[h]: mine[owner] for h, mine in told.items() if owner in mine}
        return combined(found, needed)

    total = total.copy()
    for k in survivors:
        add_mask(total, own_mask(secret(k), instance), -1)
    for j in lost:
        near = sorted(set(graph[j]) & set(survivors))
        if not near:
            continue
        private = mask_key(secret(j), instance)
        if public(private) != keys[j][:KEY]:
            raise ValueError(f"the shares of client {j} do not make its key")
        for k in near:
            key = pair_mask(private, keys[k][:KEY], instance, k, j)
            add_mask(total, key, -sign(k, j))
    return total
