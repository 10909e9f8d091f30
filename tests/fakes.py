"""The smallest honest strategy, for tests of everything around strategies."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.algebra.state import Kept, State
from fedlora.core.payload import Payload
from fedlora.core.types import Client, Factors, Ranks, Setting, Update
from strategies.base import LoRAStrategy


@dataclass(frozen=True, eq=False)
class Mean(LoRAStrategy):
    """Averages the first ``rank`` rows and columns that every client has. No paper."""

    rank: int = 1

    def init_state(self, setting: Setting) -> State:
        state = {"alpha": torch.tensor(setting.alpha, dtype=torch.float64)}
        for m in setting.modules:
            state[f"{m.path}/a"] = torch.linspace(-0.1, 0.1, m.d_in).repeat(self.rank, 1)
            state[f"{m.path}/b"] = torch.zeros(m.d_out, self.rank)
        return state

    def enlist(self, state: State, client: Client) -> Client:
        ranks = Ranks(dict.fromkeys(client.ranks, self.rank))
        return Client(client.id, ranks, client.num_examples, client.tier)

    def client_start(self, state: State, client: Client, kept: Kept | None = None) -> Payload:
        return self.global_update(state)

    def aggregate(self, state: State, updates: Sequence[Update]) -> State:
        new = {"alpha": state["alpha"]}
        for path in updates[0].adapter:
            for part in ("a", "b"):
                tensors = [getattr(u.adapter[path], part) for u in updates]
                new[f"{path}/{part}"] = torch.stack(tensors).mean(dim=0)
        return new

    def global_update(self, state: State, ranks: Ranks | None = None) -> Payload:
        paths = [k[:-2] for k in state if k.endswith("/a")]
        alpha = float(state["alpha"])
        return {p: Factors(state[f"{p}/a"], state[f"{p}/b"], alpha) for p in paths}
