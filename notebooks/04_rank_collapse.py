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
# # Rank collapse, by hand
#
# **Question.** FlexLoRA averages the products of clients of unequal rank and cuts the average to
# each client's rank. What becomes of the directions that only the clients of large rank can hold?
#
# **Answer, on the tiny model and eight clients.** Every round, direction $i$ keeps the share
# $\pi_i$ of the clients whose rank is at least $i$, and loses the rest. Without training it decays
# as $\pi_i^t$, which the server's own code follows to rounding. With training those few clients
# refill what is lost, and the energy of their directions still falls by an order of magnitude in a
# few rounds. Averaging each direction over the clients that cover it (`weighting="covered"`), or
# keeping on the server what no client could be sent (`residual="carry"`), stops the decay.
#
# The effect is described as *rank collapse* in raFLoRA (arXiv:2602.13486). No network is needed.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

from fedlora.algebra.linalg import coverage, normalize, spectra
from fedlora.algebra.spectrum import energy_by_index, index_ranges, mean_ranks, range_label
from fedlora.core.cache import cache_root
from fedlora.core.types import LocalPlan, Setting, TrainJob, Update
from fedlora.data import Sotu, TokenStore, prepare
from fedlora.engine.sequential import Sequential
from fedlora.models.spec import Tiny
from fedlora.population.ranks import RankDistribution
from fedlora.population.sampling import Population, enroll
from strategies.flexlora import FlexLoRA

SEED, ROUNDS = 0, 6
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]
plt.rcParams |= {
    "figure.dpi": 110,
    "font.size": 10,
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
# ## Eight clients of four ranks
#
# Two clients of each tier. A client of tier T3 has a small rank in attention and a large one in the
# MLP, so the share $\pi_i$ of an index is counted module by module:
#
# $$\pi_i = \sum_{k:\ r_k \ge i} p_k .$$

# %%
model = Tiny().resolved()
info = model.describe()
store = TokenStore(prepare(Sotu(), model.tokenizer(), model.tokenizer_id(), cache_root()))
ranks = RankDistribution(distribution="uniform")
roster = enroll(Population(), ranks, store.clients, info.modules, info.parameters, SEED)
setting = Setting(info.modules, info.parameters, ranks.alpha, roster.clients, SEED)
tiers = sorted({c.tier for c in roster.clients})
cohort = sorted(
    (
        roster.clients[i]
        for tier in tiers
        for i in [i for i in roster.trainable if roster.clients[i].tier == tier][:2]
    ),
    key=lambda client: client.id,
)
p = normalize([c.num_examples for c in cohort])
covered = {m.path: coverage(p, [c.ranks[m.path] for c in cohort]) for m in info.modules}
for kind in ("attention", "mlp"):
    module = next(m for m in info.modules if m.kind == kind)
    print(f"{kind:9s} pi_i =", [round(float(x), 2) for x in covered[module.path]])

# %% [markdown]
# ## One round, to have something to lose
#
# All eight train from $W = 0$, and the server averages. All indices up to 15 have energy.

# %%
engine = Sequential().open(model.load(torch.device("cpu")), store)
plan = LocalPlan(steps=3, lr=2e-3, batch_size=2)
flexlora = FlexLoRA()
payload = flexlora.technique.payload
state = flexlora.init_state(setting)
jobs = [TrainJob(SEED, 1, c, payload(flexlora.client_start(state, c)), plan) for c in cohort]
first = flexlora.aggregate(state, list(engine.train(jobs)))
bands = index_ranges(sorted({r for c in cohort for r in c.ranks.values()}))
start = spectra(payload(flexlora.global_update(first)))
for label, share in energy_by_index(start, bands).items():
    print(f"index {label:6s} {share:6.1%} of the energy")

# %% [markdown]
# ## The prediction
#
# Now no client trains: each client sends back what it was sent, $T_{r_k}(W)$, the leading $r_k$
# directions of $W = \sum_i \sigma_i u_i v_i^\top$. The average is
#
# $$\sum_k p_k\, T_{r_k}(W) = \sum_i \Big(\sum_{k:\ r_k \ge i} p_k\Big)\, \sigma_i u_i v_i^\top
#   = \sum_i \pi_i\, \sigma_i u_i v_i^\top .$$
#
# The singular vectors stay, and $\pi_i$ never grows with $i$, so their order stays too: after $t$
# rounds $\sigma_i(t) = \pi_i^t\, \sigma_i(0)$. Index 1, which all clients hold, keeps everything.
# This is FlexLoRA's own `aggregate`, nothing else.

# %%
path = next(m.path for m in info.modules if m.path.endswith("mlp.down_proj"))
idle, measured = first, []
for _ in range(ROUNDS + 1):
    w = spectra(payload(flexlora.global_update(idle)))
    measured.append(w[path][:15])
    still = [Update(c, payload(flexlora.client_start(idle, c)), c.num_examples, {}) for c in cohort]
    idle = flexlora.aggregate(idle, still)
pi = covered[path]
predicted = [pi[: len(measured[0])] ** t * measured[0] for t in range(ROUNDS + 1)]
worst = max(
    float(((m - q[: len(m)]) / q[: len(m)]).abs().max())
    for m, q in zip(measured, predicted, strict=True)
)
print(f"{path}: largest relative error of any singular value in any round: {worst:.1e}")

fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for i, colour in zip((0, 1, 4, 14), COLOURS, strict=True):
    ax.semilogy([float(q[i]) for q in predicted], color=colour, linewidth=4, alpha=0.3)
    ax.semilogy(
        [float(m[i]) if i < len(m) else float("nan") for m in measured],
        "o",
        color=colour,
        markersize=4,
        label=f"index {i + 1}, $\\pi$ = {float(pi[i]):.2f}",
    )
ax.set_title("Nobody trains: measured (points), predicted (bands)")
ax.set_xlabel("round")
ax.set_ylabel("singular value")
fig.legend(loc="outside lower center", ncols=4, fontsize=8)
plt.show()

# %% [markdown]
# ## With training
#
# Clients that train put energy back, each into the directions that it holds. Three rules of the
# server, the same clients, batches and seeds:
#
# * `all`: the average over all clients, FlexLoRA;
# * `covered`: index $i$ is averaged over the clients that have it, so that $\pi_i$ drops out;
# * `carry`: what was cut for a client is added back by the server, the exact average of changes.

# %%
rules = {
    "all": FlexLoRA(),
    "covered": FlexLoRA(weighting="covered"),
    "carry": FlexLoRA(residual="carry"),
}
shares: dict[str, list[dict[str, float]]] = {}
size: dict[str, list[float]] = {}
for name, rule in rules.items():
    state, shares[name], size[name] = rule.init_state(setting), [], []
    for t in range(1, ROUNDS + 1):
        jobs = [TrainJob(SEED, t, c, payload(rule.client_start(state, c)), plan) for c in cohort]
        state = rule.aggregate(state, list(engine.train(jobs)))
        s = spectra(payload(rule.global_update(state)))
        shares[name].append(energy_by_index(s, bands))
        size[name].append(mean_ranks(s)["effective_rank"])
    print(f"{name:8s} effective rank {size[name][0]:.1f} -> {size[name][-1]:.1f}")

# %% [markdown]
# Each row is a range of indices, and its colour the share of the energy $\sum_m \sigma_{m,i}^2$ in
# it. Under `all` the upper rows grow dark: collapse.

# %%
labels = [range_label(*band) for band in bands]
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), sharey=True, layout="constrained")
for ax, (name, found) in zip(axes, shares.items(), strict=True):
    grid = [[max(share[label], 1e-4) for share in found] for label in labels]
    image = ax.imshow(
        grid, origin="lower", aspect="auto", cmap="cividis", norm=LogNorm(1e-3, 1),
        extent=(0.5, ROUNDS + 0.5, -0.5, len(labels) - 0.5),
    )  # fmt: skip
    ax.set_yticks(range(len(labels)), labels)
    ax.set_title(f"weighting {name}" if name != "carry" else "residual carry")
    ax.set_xlabel("round")
    ax.grid(visible=False)
axes[0].set_ylabel("rank index")
fig.colorbar(image, ax=axes, label="share of the energy")
plt.show()

# %% [markdown]
# The energy beyond index 2, which only tiers T3 and T4 hold, beside what the geometric law leaves
# of the first round's: training slows the decay of `all` down, and does not stop it.

# %%
beyond = {
    name: [sum(v for label, v in share.items() if label not in ("1", "2")) for share in found]
    for name, found in shares.items()
}
law = []
for t in range(ROUNDS):
    left = {
        path: covered[path][: len(s)].clamp_min(0) ** t * s[: len(covered[path])]
        for path, s in start.items()
    }
    share = energy_by_index(left, bands)
    law.append(sum(v for label, v in share.items() if label not in ("1", "2")))

fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
for (name, values), colour in zip(beyond.items(), COLOURS, strict=False):
    ax.semilogy(range(1, ROUNDS + 1), values, "o-", markersize=4, color=colour, label=name)
ax.semilogy(range(1, ROUNDS + 1), law, ":", color="#8a8f98", label="$\\pi_i^{2t}$, no training")
ax.set_title("Share of the energy beyond index 2")
ax.set_xlabel("round")
fig.legend(loc="outside lower center", ncols=4, fontsize=8)
plt.show()
for name, values in {**beyond, "geometric law": law}.items():
    print(f"{name:14s} round 1: {values[0]:.3f}   round {ROUNDS}: {values[-1]:.4f}")

# %% [markdown]
# A direction that stays is not yet a direction that helps: `covered` gives much weight to what two
# clients found. Which rule predicts better is a question for a study over seeds
# (`notebooks/03_small_study.py`). In a run the same numbers are recorded every round
# (`analyses.spectrum`, docs/analyses.md) and drawn in its report.
