"""Law 10: what is trained here is PEFT's to use, and what PEFT wrote is trained here."""

import peft
import pytest
import torch
from torch.nn import functional

from fedlora.core.types import LocalPlan
from fedlora.data.batches import collate
from fedlora.engine.fused import Fused
from fedlora.engine.sequential import Sequential
from fedlora.models.export import save
from fedlora.techniques.lora.peft import load_peft
from tests.fedlora.engine.world import NETWORKS, FakeStore, distance, examples, job, model
from tests.fedlora.models.networks import adapter, logits

RANKS = (1, 4, 3)
PLAN = LocalPlan(steps=3, batch_size=2, lr=1e-2, dropout=0.2, weight_decay=0.1)
FUSED = Fused(tokens=64, slots=2)


def store():
    return FakeStore({k: examples(5, seed=k) for k in range(len(RANKS))})


def trained(spec, on, starts, plan=PLAN):
    jobs = [job(start, plan, id=k) for k, start in enumerate(starts)]
    return {u.client.id: u for u in spec.open(on, store()).train(jobs)}


@pytest.mark.parametrize("layout", ["ragged", "padded"])
@pytest.mark.parametrize("name", NETWORKS)
def test_peft_computes_what_was_trained(name, layout, tmp_path):
    on = model(name)
    starts = [
        adapter(on.info.modules, lambda i, r=r: r + i % 2, seed=r, alpha=8.0 + r) for r in RANKS
    ]
    done = trained(Fused(tokens=64, slots=2, layout=layout), on, starts)
    assert len(done) == len(RANKS)
    for k, update in done.items():
        assert distance(update.payload, starts[k]) > 0
        folder = tmp_path / str(k)
        save(update.payload, on.info, folder)
        theirs = peft.PeftModel.from_pretrained(NETWORKS[name](), folder).double().eval()
        on.mount(update.payload)
        wanted = logits(on.network)
        on.unmount()
        assert not torch.allclose(wanted, logits(on.network), atol=1e-3)
        torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_peft_wrote_is_where_training_starts(name, tmp_path):
    starts = []
    for r in RANKS:
        config = peft.LoraConfig(
            r=r,
            lora_alpha=9,
            target_modules="all-linear",
            init_lora_weights="gaussian",
            use_rslora=r == 3,
            fan_in_fan_out=name == "gpt2",
        )
        theirs = peft.get_peft_model(NETWORKS[name](), config).double().eval()
        g = torch.Generator().manual_seed(r)
        with torch.no_grad():
            for path, p in theirs.named_parameters():
                if "lora_" in path:
                    p.copy_(0.2 * torch.randn(p.shape, generator=g, dtype=torch.float64))
        theirs.save_pretrained(tmp_path / str(r))
        starts.append((theirs, load_peft(tmp_path / str(r))))
    on = model(name)
    plan = LocalPlan(steps=1, batch_size=5, lr=0.0, dropout=0.0)
    still = trained(FUSED, on, [a for _, a in starts], plan)
    for k, (theirs, _) in enumerate(starts):
        batch = collate(store().examples(k, "train"), "full")
        with torch.no_grad():
            found = theirs(input_ids=batch.inputs, use_cache=False).logits.flatten(0, 1)
        loss = functional.cross_entropy(found[batch.positions], batch.targets)
        assert still[k].metrics["loss"] == pytest.approx(float(loss), rel=1e-12)
    wanted = trained(Sequential(), on, [a for _, a in starts])
    moved = trained(FUSED, on, [a for _, a in starts])
    for k, update in wanted.items():
        assert distance(update.payload, moved[k].payload) < 1e-12
