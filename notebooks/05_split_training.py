# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Split-federated training
#
# **Question.** A client too weak for the whole model can hold its first blocks and leave the rest
# to the server (SplitLoRA, arXiv:2407.00952). What crosses the cut, is it the same training, and
# what does it cost?
#
# **Answer, on the tiny model of four blocks.** Activations go up and their gradients come down. The
# gradients of all adapters are those of the unsplit model, bit for bit on one machine. A step moves
# two vectors a token, so a round soon sends more than the adapters of plain federated LoRA; eight
# bits a scalar instead of thirty-two change the client's gradient by about a percent, for a quarter
# of the bytes. With a U-shape the labels stay with the client.
#
# No network is needed. `docs/splitlora.md` has the rules, transports and formulas.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")

import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fedlora.core.cache import cache_root
from fedlora.core.types import Factors, LocalPlan
from fedlora.data import Sotu, TokenStore, prepare
from fedlora.models.spec import Tiny
from fedlora.models.stages import Span, Stages
from fedlora.split.batches import pack, pad, step_of
from fedlora.split.loss import sum_loss
from fedlora.techniques.lora.payload import LowRankPayload
from fedlora.wire.rows import Wire
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from simulations.reporting.run_folder import read_run

CUT, RANK, ALPHA = 1, 4, 8.0
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
plt.rcParams |= {
    "figure.dpi": 110,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9e9ee",
    "legend.frameon": False,
}

# %% [markdown]
# ## A model in two parts
#
# The client holds the embeddings and block 0 with its adapters, the server blocks 1 to 3 and the
# head. The parts are views of one model in memory; on two machines each would load its own.

# %%
spec = Tiny().resolved()
model = spec.load(torch.device("cpu"))
store = TokenStore(prepare(Sotu(), spec.tokenizer(), spec.tokenizer_id(), cache_root()))
stages = Stages(model)
client = stages[Span(0, CUT, embeds=True)]
server = stages[Span(CUT, stages.blocks, heads=True)]
whole = stages[Span(0, stages.blocks, embeds=True, heads=True)]
for name, stage in (("client", client), ("server", server)):
    frozen = sum(p.numel() for p in stage.network.parameters())
    print(f"{name}: {frozen:,} frozen parameters, adapters on {len(stage.layers)} linear layers")

# %% [markdown]
# The adapters are in the middle of their training, so that no factor is zero, and the batch is two
# of a client's examples.

# %%
draw = torch.Generator().manual_seed(0)
adapter = {
    m.path: Factors(
        torch.randn(RANK, m.d_in, generator=draw) / m.d_in**0.5,
        0.05 * torch.randn(m.d_out, RANK, generator=draw),
        ALPHA,
    )
    for m in model.info.modules
}
plan = LocalPlan(batch_size=2, dropout=0.0)
examples = [store.example(0, "train", i) for i in range(2)]
step = step_of(examples, [0, 1], plan)
batch = step.batch
print(f"token ids {tuple(batch.inputs.shape)}, {batch.tokens} of them with a loss")

# %% [markdown]
# ## One step, across the cut
#
# 1. The client computes $z$, the activations at the cut, and sends them up without padding.
# 2. The server takes $z$ as a leaf, finishes the forward pass, and computes the loss $L$.
# 3. Its backward pass ends at $\partial L / \partial z$, which goes down.
# 4. The client continues the chain rule from there: `z.backward(gradient)`.

# %%
split = LowRankPayload(adapter).updates(model)
for stage in (client, server):
    stage.mount(split)

z = client.hidden(batch.inputs)  # [b, t, d], 1
sent = pack(z, step.shape).detach()  # [tokens, d]: what crosses the cut
leaf = sent.clone().requires_grad_()
logits = server.logits(pad(leaf, step.shape), batch.positions)  # 2
loss = sum_loss(logits, batch.targets, 0.0).total / batch.tokens
loss.backward()  # 3
assert leaf.grad is not None
pack(z, step.shape).backward(leaf.grad)  # 4

for stage in (client, server):
    stage.mount({})
print(f"loss {loss.item():.4f}; up {tuple(sent.shape)}, down {tuple(leaf.grad.shape)}")

# %% [markdown]
# The same step of the unsplit model, with its own copy of the adapters:

# %%
unsplit = LowRankPayload(adapter).updates(model)
whole.mount(unsplit)
logits = whole.logits(batch.inputs, batch.positions)
together = sum_loss(logits, batch.targets, 0.0).total / batch.tokens
together.backward()
whole.mount({})

pairs = [
    (getattr(split[path], factor).grad, getattr(unsplit[path], factor).grad)
    for path in adapter
    for factor in "ab"
]
print("equal losses:", torch.equal(loss, together))
print("equal gradients, bit for bit:", all(torch.equal(x, y) for x, y in pairs), f"({len(pairs)})")

# %% [markdown]
# ## Fewer bits
#
# What crosses the cut can be rounded. For each format: the bytes of one direction, and how far the
# gradient of the *client's* adapters is from the exact one if activations and gradients are both
# sent in it.

# %%
formats = {
    "fp32": Wire("fp32"),
    "bf16": Wire("bf16"),
    "fp16": Wire("fp16"),
    "int8": Wire("int8"),
    "top 64": Wire("topk", k=64),
}
mine = [path for path in adapter if path in client.layers]
exact = torch.cat([getattr(unsplit[p], f).grad.reshape(-1) for p in mine for f in "ab"])
errors, sizes = {}, {}
for name, wire in formats.items():
    updates = LowRankPayload(adapter).updates(model)
    for stage in (client, server):
        stage.mount(updates)
    z = pack(client.hidden(batch.inputs), step.shape)
    up = wire.encode(z.detach())
    leaf = wire.decode(up).requires_grad_()
    logits = server.logits(pad(leaf, step.shape), batch.positions)
    (sum_loss(logits, batch.targets, 0.0).total / batch.tokens).backward()
    z.backward(wire.decode(wire.encode(leaf.grad)))
    for stage in (client, server):
        stage.mount({})
    found = torch.cat([getattr(updates[p], f).grad.reshape(-1) for p in mine for f in "ab"])
    errors[name] = float((found - exact).norm() / exact.norm())
    sizes[name] = sum(part.nbytes for part in up.values())
    print(
        f"{name:7s} {sizes[name]:7,} bytes up   error of the client's gradient {errors[name]:.1e}"
    )

# %% [markdown]
# ## Rounds
#
# A run of whole rounds: in each step the server takes the rows of all clients in one batch, and at
# the end of the round the clients' adapters are averaged. Beside it plain federated LoRA, whose
# clients hold all four blocks, and the U-shape, whose clients also hold the last block and the
# head, so that no label leaves them.

# %%
folder = Path(tempfile.mkdtemp(prefix="fedlora-split-"))
words = [
    *("ranks=homogeneous", f"ranks.rank={RANK}", "population.clients=12", "population.per_round=4"),
    *("client.steps=4", "client.batch_size=2", "client.lr=5e-3", "data.max_length=128", "rounds=4"),
    *("evaluate=loss", "evaluate.clients=4", "runtime=in_process", "runtime.nodes=1"),
    *("report=false", f"output_dir={folder}"),
]
kinds = {
    "federated": ["strategy=fedit", "engine=sequential"],
    "split": ["strategy=splitlora", f"strategy.cut={CUT}"],
    "split, int8": [
        *("strategy=splitlora", f"strategy.cut={CUT}"),
        *("strategy.activations.kind=int8", "strategy.gradients.kind=int8"),
    ],
    "U-shape": ["strategy=splitlora", f"strategy.cut={CUT}", "strategy.tail=1"],
}
runs = {}
for i, (name, more) in enumerate(kinds.items()):
    cfg = load([*words, *more, f"name=run{i}"])
    place = run(cfg, lambda parts: InProcessGrid(app, parts.runtime.nodes), lambda line: None)
    runs[name] = read_run(place)

# %%
fig, axes = plt.subplots(1, 2, figsize=(10, 3.3), layout="constrained")
for (name, finished), colour in zip(runs.items(), COLOURS, strict=True):
    x, y = next(iter(finished.evaluated("loss_response_weighted").values()))
    style = "--" if name == "U-shape" else "-"
    axes[0].plot(x, y, "o", linestyle=style, markersize=4, color=colour, label=name)
    traffic = {way: sum(finished.series(f"wire/{way}_bytes")[1]) / 2**20 for way in ("up", "down")}
    print(
        f"{name:12s} loss {y[-1]:.3f}   {traffic['up']:.2f} MiB up, {traffic['down']:.2f} MiB down"
    )
    bars = axes[1].bar(name, sum(traffic.values()), color=colour, width=0.6)
    axes[1].bar_label(bars, fmt="%.1f", fontsize=8, color="#555", padding=2)
axes[0].set_title("Loss on unseen clients")
axes[0].set_xticks(x)
axes[0].set_xlabel("round")
axes[0].set_ylabel("nats per response token")
axes[0].legend()
axes[1].set_title("Traffic of four rounds, all clients, MiB")
axes[1].grid(visible=False, axis="x")
axes[1].tick_params(axis="x", labelsize=8)
plt.show()

# %% [markdown]
# The split sends hidden states for every token of every step, plain federated LoRA its adapters
# once a round: more steps a round cost the split more and the other nothing. What a split saves is
# on the client, which computes one block of four and no head:

# %%
for name in ("split", "U-shape"):
    row = runs[name].clients[-1]
    operations, memory = row["client_flops"] / 1e9, row["client_memory"] / 2**20
    print(f"{name:8s} {operations:.2f} GFLOP a round and {memory:.1f} MiB for a client")
shutil.rmtree(folder)  # the runs of this notebook
