"""Bytes are counted of rejected replies too, whatever these claim."""

import pytest

from fedlora.core.types import LocalPlan, TrainJob, Update
from fedlora.server.training_round import begin
from fedlora.techniques.lora.payload import LowRankPayload
from tests.fakes import Mean
from tests.fedlora.server.test_rounds import CLIENTS, SETTING


@pytest.mark.parametrize("claim", [float("nan"), float("inf"), -5.0, "many", None])
def test_a_claim_that_is_no_number_of_bytes_counts_as_none(claim):

    method = Mean()
    state = method.init_state(SETTING)
    start = LowRankPayload(method.client_start(state, method.enlist(state, CLIENTS[0])))
    job = TrainJob(3, 1, CLIENTS[0], start, LocalPlan())
    account = begin(method, state, [job], 1, "float32").account
    honest = Update(CLIENTS[0], start, 5, {})
    wrong = Update(CLIENTS[0], start, 5, {"exchanged_up": claim, "exchanged_down": claim})
    assert account.up(wrong) == account.up(honest) > 0
    assert account.down(wrong) == account.down(honest) > 0
