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
# # One round of FlexLoRA, by hand
#
# **Question.** Clients of a federation train LoRA adapters of unequal rank. What does FlexLoRA's
# server compute from them, what does a client of small rank lose when it gets the result, and what
# would averaging the factors have given instead?
#
# **Answer, on the tiny model and sixteen clients.** The server's update is the exact average of
# what the clients trained, up to rounding. A client of rank 15 gets nearly all of it; a client of
# rank 1 loses about two fifths of its norm, exactly the Eckart-Young tail, and yet keeps more than
# half of the improvement on unseen clients' text. Averaging zero-padded factors instead is off by
# more than a quarter of the update's norm.
#
# Everything here is the library's own code, called by hand in the order in which a run calls it.
# No network is needed. The first execution tokenises the data into the cache of fedlora
# (`FEDLORA_CACHE`, else `~/.cache/fedlora`), which takes a few seconds; nothing else is written.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")

from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import PercentFormatter

from fedlora.algebra.linalg import (
    average,
    exactness_gap,
    normalize,
    spectra,
    truncation_error,
)
from fedlora.core.cache import cache_root
from fedlora.core.types import (
    EvaluateJob,
    EvaluatePlan,
    LocalPlan,
    Ranks,
    Setting,
    TrainJob,
)
from fedlora.data import Sotu, TokenStore, prepare
from fedlora.engine.sequential import Sequential
from fedlora.evaluation.summary import summarise
from fedlora.models.spec import Tiny
from fedlora.population.ranks import FRACTIONS, RankDistribution
from fedlora.population.sampling import Population, enroll
from strategies.flexlora import FlexLoRA
from strategies.heterolora import HeteroLoRA

SEED = 0
COLOURS = {"T1": "#0072B2", "T2": "#D55E00", "T3": "#009E73", "T4": "#CC79A7"}
GREY = "#8a8f98"
plt.rcParams |= {
    "figure.dpi": 110,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9e9ee",
    "legend.frameon": False,
}

# %% [markdown]
# ## The population
#
# 1,600 clients, each a run of one president's consecutive passages. A client's *tier* says which
# rank it can hold in attention and MLP layers. The paper's four tiers hold ranks 8, 30, 30/200 and
# 200 on a model of 1.3 billion parameters; here they are scaled to the same fraction of the tiny
# model's parameters. The five distributions differ in how many clients are in which tier.

# %%
model = Tiny().resolved()
info = model.describe()
store = TokenStore(prepare(Sotu(), model.tokenizer(), model.tokenizer_id(), cache_root()))
ranks = RankDistribution(distribution="uniform")
roster = enroll(Population(), ranks, store.clients, info.modules, info.parameters, SEED)
setting = Setting(info.modules, info.parameters, ranks.alpha, roster.clients, SEED)
tiers = ranks.resolve(info.modules, info.parameters)
pattern = {c.tier: c.ranks for c in roster.clients}
label = {
    t.name: f"{t.name}: {t.attention if t.attention == t.mlp else f'{t.attention}/{t.mlp}'}"
    for t in tiers
}
print(f"{info.parameters:,} parameters, {len(info.modules)} adapted linear layers")
print(f"{len(roster.clients):,} clients, {len(roster.trainable):,} of them train, {label}")

# %%
fig, axes = plt.subplots(1, 5, figsize=(11, 2.7), sharey=True, layout="constrained")
for ax, distribution in zip(axes, FRACTIONS, strict=True):
    choice = RankDistribution(distribution=distribution)
    members = enroll(Population(), choice, store.clients, info.modules, info.parameters, SEED)
    counts = [members.tier_counts().get(t, 0) for t in COLOURS]
    bars = ax.bar(list(label.values()), counts, color=list(COLOURS.values()), width=0.7)
    ax.bar_label(bars, fontsize=8, color="#555", padding=2)
    ax.set_title(distribution.replace("_", " "), fontsize=10)
    ax.tick_params(axis="x", labelsize=8, rotation=40)
    ax.grid(axis="x", visible=False)
axes[0].set_ylabel("clients")
axes[0].set_ylim(0, 1800)
fig.supxlabel("tier: LoRA rank (attention/MLP where they differ)", fontsize=9)
plt.show()

# %% [markdown]
# ## One client's training
#
# This is what one client's first training example looks like. Then the client trains: the frozen
# base stays as it is, `B = 0` at the start, so its first loss is the base model's. To see
# something in a single round it trains four epochs instead of the one of
# `conf/client/adamw.yaml`.

# %%
engine = Sequential().open(model.load(torch.device("cpu")), store)
strategy = FlexLoRA()
state = strategy.init_state(setting)
plan = LocalPlan(epochs=4, lr=2e-3)

# four clients of each tier, spread over the century
cohort = sorted(
    (
        roster.clients[i]
        for tier in COLOURS
        for i in [i for i in roster.trainable if roster.clients[i].tier == tier][::70][:4]
    ),
    key=lambda client: client.id,
)
client = next(c for c in cohort if c.tier == "T4")
example = store.example(client.id, "train", 0)
tokenizer = model.tokenizer()
held = store.clients[client.id]
print(
    f"client {client.id}, {label[client.tier]}, {held.name}: {held.num_train} training examples\n"
)
print(
    tokenizer.decode(example.input_ids[: example.prompt_tokens], skip_special_tokens=True), end=""
)
print(tokenizer.decode(example.input_ids[example.prompt_tokens :], skip_special_tokens=True))

# %%
payload = strategy.technique.payload  # factors by module, as they travel
jobs = [TrainJob(SEED, 1, c, payload(strategy.client_start(state, c)), plan) for c in cohort]
update = next(iter(engine.train([j for j in jobs if j.client == client])))
{name: round(value, 3) for name, value in update.metrics.items()}

# %%
measured = {
    (split, name): next(
        iter(
            engine.evaluate(
                [EvaluateJob(SEED, 1, client, adapter, EvaluatePlan(split=split, generate=False))]
            )
        )
    ).scalars["loss_response"]
    for split in ("train", "test")
    for name, adapter in (("before", None), ("after", update.payload))
}
for (split, name), loss in measured.items():
    print(f"client {client.id}, {split} text, {name} training: {loss:.3f} nats per response token")

# %% [markdown]
# ## The round
#
# All sixteen clients do the same, each at its own rank. The returned factors differ in shape
# between clients, so there is no average of `A` or of `B` to take.

# %%
updates = list(engine.train(jobs))
path = "model.layers.0.mlp.down_proj"
for u in updates:
    a, b = u.adapter[path].a, u.adapter[path].b
    print(
        f"client {u.client.id:4d}  {label[u.client.tier]:9s}  n = {u.num_examples}  "
        f"A {tuple(a.shape)!s:10s} B {tuple(b.shape)!s:10s} "
        f"first loss {u.metrics['loss_first']:.3f}  moved by {u.metrics['delta_norm']:.2f}"
    )

# %% [markdown]
# ## Aggregation
#
# The server averages the products, $W = \sum_k p_k\, s_k B_k A_k$ with $s_k = \alpha / r_k$ and
# $p_k = n_k / \sum_j n_j$, and decomposes each layer's $W = U S V^\top$.
#
# The singular values show the ranks of the population (dashed lines). All clients start from the
# same `A`, of which a client of rank $r$ holds the first $r$ rows, and a short training moves `A`
# little. So one direction is supported by all clients, a second by three tiers, those up to 15 by
# one tier in attention and two in the MLP, and beyond there is only what training did to `A`.
# Smaller ranks also push harder on the few directions they have, for their scale $\alpha / r$ is
# larger.

# %%
state = strategy.aggregate(state, updates)
whole = payload(strategy.global_update(state))
s = spectra(whole)

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), sharey=True, layout="constrained")
for ax, kind, part in zip(axes, ("attention", "MLP"), ("q_proj", "down_proj"), strict=True):
    for layer in range(4):
        values = next(v for p, v in s.items() if f"layers.{layer}." in p and p.endswith(part))
        ax.semilogy(
            range(1, len(values[:40]) + 1),
            values[:40],
            "o-",
            markersize=3,
            linewidth=1,
            color=plt.cm.viridis(layer / 4),
            label=f"layer {layer}",
        )
    for r in sorted({t.attention if kind == "attention" else t.mlp for t in tiers}):
        ax.axvline(r + 0.5, color=GREY, linewidth=0.8, linestyle="--")
    ax.set_title(f"W of {part} ({kind})")
    ax.set_xlabel("index")
axes[0].set_ylabel("singular value")
axes[0].legend()
plt.show()

# %% [markdown]
# ## Redistribution
#
# A client of rank $r$ starts the next round from $B = U_{:r} S_{:r} / s_r$, $A = V_{:r}^\top$. All
# starts are prefixes of one decomposition: the smaller client's `A` is the top of the larger
# one's, and its `B` differs only by the scale.

# %%
starts = {
    tier: payload(strategy.client_start(state, replace(client, ranks=pattern[tier])))
    for tier in COLOURS
}
largest = starts["T4"][path]
for tier, adapter in starts.items():
    f = adapter[path]
    same_a = torch.equal(f.a, largest.a[: f.rank])
    same_b = torch.allclose(f.scale * f.b, largest.scale * largest.b[:, : f.rank], atol=1e-8)
    print(
        f"{label[tier]:9s} A {tuple(f.a.shape)!s:10s} ‖A‖ {f.a.norm():.3f}   "
        f"B {tuple(f.b.shape)!s:10s} ‖B‖ {f.b.norm():.4f}   ‖s B A‖ {f.delta().norm():.4f}   "
        f"prefix of T4: A {same_a}, s B {same_b}"
    )

# %% [markdown]
# ## What truncation loses
#
# Eckart and Young: no matrix of rank $r$ is closer to $W$ than $T_r(W)$, and the distance is
# $\sqrt{\sum_{i>r} \sigma_i^2}$. The line is that formula, over all layers together; the points
# are measured on the adapters that the tiers really get.

# %%
curve = {
    r: truncation_error(s, [Ranks({m.path: min(r, m.max_rank) for m in info.modules})])
    for r in range(1, 21)
}
norm = sum(float(f.delta().norm() ** 2) for f in whole.values()) ** 0.5
lost = {
    tier: sum(float((whole[p].delta() - f.delta()).norm() ** 2) for p, f in adapter.items()) ** 0.5
    for tier, adapter in starts.items()
}
predicted = truncation_error(s, list(pattern.values()))

fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
tails = [next(iter(error.values())) for error in curve.values()]
ax.plot(list(curve), tails, color=GREY, label="Eckart-Young tail, same rank in all layers")
for tier, error in lost.items():
    r = sum(pattern[tier].values()) / len(pattern[tier])
    ax.plot(r, error / norm, "o", color=COLOURS[tier], markersize=8, label=label[tier])
    print(
        f"{label[tier]:9s} measured {error / norm:.6f}   tail {predicted[pattern[tier].label]:.6f}"
    )
ax.set_xlabel("rank (mean over layers)")
ax.set_ylabel("‖W − T(W)‖ / ‖W‖")
ax.set_title("Share of the update's norm that a tier does not get")
ax.set_ylim(0, None)
ax.set_xticks([1, 5, 10, 15, 20])
ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
ax.legend()
plt.show()

# %% [markdown]
# ## Does it matter?
#
# The loss of each tier's start on the test text of twenty clients that never train. T3 spends its
# parameters where they count: with rank 2 in attention and 15 in the MLP it is close to T4.

# %%
unseen = [roster.clients[i] for i in roster.groups["unseen_random"]][::8]
test = EvaluatePlan(generate=False)
candidates = {"base": None} | {label[t]: a for t, a in starts.items()} | {"whole W": whole}
losses = {
    name: summarise(
        list(engine.evaluate([EvaluateJob(SEED, 1, c, adapter, test) for c in unseen]))
    )["loss_response_weighted"]
    for name, adapter in candidates.items()
}

fig, ax = plt.subplots(figsize=(6.5, 3), layout="constrained")
gains = [losses["base"] - loss for name, loss in losses.items() if name != "base"]
bars = ax.barh(list(losses)[1:], gains, color=[*COLOURS.values(), GREY], height=0.65)
ax.bar_label(bars, fmt="%.3f", padding=4, color="#555", fontsize=9)
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.tick_params(axis="y", length=0)
ax.margins(x=0.12)
ax.set_xlabel(f"improvement over the base model's {losses['base']:.3f} nats per response token")
ax.set_title("One round, sixteen clients: gain on unseen clients")
plt.show()

# %% [markdown]
# ## What averaging the factors would have given
#
# FedAvg and FedIT average `A` and `B` each by itself. For clients of one rank that misses the
# average of products by $s \sum_k p_k (B_k - \bar B)(A_k - \bar A)$: little in the first round, as
# all clients start from the same `A`, and more the longer they train. At unequal ranks the factors
# must be made equal first. HeteroLoRA pads them with zeros, and then a row that few clients hold
# is diluted by the zeros of the others, on both sides of the product. The same sixteen updates,
# three rules:

# %%
weights = [u.num_examples for u in updates]
of_t4 = [u for u in updates if u.client.tier == "T4"]
p_t4 = normalize([u.num_examples for u in of_t4])
mean_t4 = {p: average([u.adapter[p] for u in of_t4], p_t4) for p in of_t4[0].adapter}
padding = HeteroLoRA(weights="examples", prune=False)
padded = payload(padding.global_update(padding.aggregate(padding.init_state(setting), updates)))
gaps = {
    "FlexLoRA:\naverage of products": exactness_gap(updates, weights, whole)["relative"],
    "average of factors,\nthe four clients of T4": exactness_gap(
        of_t4, [u.num_examples for u in of_t4], mean_t4
    )["relative"],
    "average of zero-padded\nfactors (HeteroLoRA)": exactness_gap(updates, weights, padded)[
        "relative"
    ],
}

fig, ax = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
bars = ax.barh(list(gaps), list(gaps.values()), color=["#0072B2", GREY, "#D55E00"], height=0.6)
texts = [f"{gap:.1g}" if gap < 1e-3 else f"{gap:.2f}" for gap in gaps.values()]
ax.bar_label(bars, texts, padding=4, color="#555", fontsize=9)
ax.set_xscale("log")
ax.set_xlim(1e-8, 10)
ax.invert_yaxis()
ax.grid(axis="y", visible=False)
ax.tick_params(axis="y", length=0)
ax.set_xlabel("‖global update − average of what clients trained‖ / ‖that average‖")
ax.set_title("Exactness gap")
plt.show()

# %% [markdown]
# An exact average is not always the better one: zero-padding shrinks what few clients agree
# on, which can be a useful regulariser. On these unseen clients:

# %%
loss_padded = summarise(
    list(engine.evaluate([EvaluateJob(SEED, 1, c, padded, test) for c in unseen]))
)["loss_response_weighted"]
print(f"base model               {losses['base']:.3f} nats per response token")
print(f"zero-padded factors      {loss_padded:.3f}")
print(f"FlexLoRA, whole update   {losses['whole W']:.3f}")

# %% [markdown]
# One cohort, one round and one seed: an illustration of the algebra, not a comparison of methods.
# For that, `python -m simulations.run -m strategy=flexlora,heterolora,fedit seed=0,1,2`.
