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
# # Own data and own method
#
# **Question.** I have records of my own and an idea of my own for the server. What do I write, how
# do I see that it is right, and how does it become a run with records and a report?
#
# **Answer.** A file of JSON lines whose records name their client, a class of a few lines, and a
# YAML file with its `_target_`. Nothing of fedlora is edited: all three lie in a folder of mine.
# Here six clients of very unequal size learn small tasks. The method averages LoRA's factors with
# weights $n_k^\gamma$ instead of $n_k$: at $\gamma = 1/2$ the largest client speaks for a third of
# the average instead of for more than half.
#
# No network is needed. All files go to a temporary folder; `docs/data.md` and `docs/own_method.md`
# say what else there is.

# %%
import warnings

warnings.filterwarnings("ignore", message="IProgress not found")

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

folder = Path(tempfile.mkdtemp(prefix="fedlora-mine-"))
os.environ["FEDLORA_CACHE"] = str(folder / "cache")  # tokens; left alone, ~/.cache/fedlora

from fedlora.core.types import LocalPlan, Setting, TrainJob
from fedlora.data import Jsonl, TokenStore, prepare
from fedlora.engine.sequential import Sequential
from fedlora.models.spec import Tiny
from fedlora.population.ranks import RankDistribution
from fedlora.population.sampling import Population, enroll
from simulations.app.client_app import app
from simulations.app.compose import load
from simulations.app.federate import run
from simulations.app.grid import InProcessGrid
from simulations.reporting.run_folder import read_run
from strategies.fedit import FedIT

SEED = 0
BLUE, ORANGE = "#0072B2", "#D55E00"
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
# ## Records
#
# One JSON object a line: `instruction`, perhaps `input`, and `output`; `client` says whose it is.
# Conversations, labelled texts, CSV, Parquet and folders work as well.

# %%
words = ["union", "peace", "labor", "treaty", "army", "state", "people", "law", "land", "trade"]
tasks = {
    "upper": ("Write the words in upper case.", lambda ws: " ".join(ws).upper()),
    "reverse": ("Write the words in reverse order.", lambda ws: " ".join(ws[::-1])),
    "first": ("Write the first word.", lambda ws: ws[0]),
    "last": ("Write the last word.", lambda ws: ws[-1]),
    "count": ("How many words are there?", lambda ws: str(len(ws))),
    "comma": ("Put commas between the words.", lambda ws: ", ".join(ws)),
}
sizes = {"upper": 96, "reverse": 32, "first": 16, "last": 12, "count": 10, "comma": 10}
records = []
for name, (instruction, answer) in tasks.items():
    for i in range(sizes[name]):
        chosen = [words[(3 * i + step * (1 + i % 4)) % len(words)] for step in range(1, 4 + i % 3)]
        text = {"instruction": instruction, "input": " ".join(chosen), "output": answer(chosen)}
        records.append({"client": name} | text)
file = folder / "records.jsonl"
file.write_text("\n".join(map(json.dumps, records)) + "\n")
print(file.read_text().splitlines()[0])

# %% [markdown]
# The library tokenises them once, into a memory-mapped store, and divides them into training,
# validation and test records of each client. This is what a model sees of the first one.

# %%
model = Tiny().resolved()
source = Jsonl(path=str(file), max_length=64)
store = TokenStore(prepare(source, model.tokenizer(), model.tokenizer_id(), folder / "cache"))
for client in store.clients:
    print(f"{client.name:8s} {client.num_train:3d} training examples")
largest = max(range(len(store.clients)), key=lambda i: store.clients[i].num_train)
example = store.example(largest, "train", 0)
print("\n" + model.tokenizer().decode(example.input_ids, skip_special_tokens=True))

# %% [markdown]
# ## A method
#
# FedIT averages $A$ and $B$ with weights $n_k$. Ours has $n_k^\gamma$, and is FedIT in everything
# else. A method says what one client *adds*, how a sum of that is *absorbed*, and with which
# weights; FedIT has the first two, and the third is ours. The hooks are pure functions: state in,
# state out. The fields of the class are the keys of its YAML, and a value that makes no sense is
# refused in one sentence, before anything is loaded.

# %%
code = '''
from dataclasses import dataclass

from fedlora.algebra.summand import total
from fedlora.core.checks import fraction
from strategies.fedit import FedIT


@dataclass(frozen=True, eq=False, kw_only=True)
class Tempered(FedIT):
    """FedIT with weights n_k ** gamma."""

    gamma: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        fraction("strategy.gamma", self.gamma)

    def reference_weights(self, updates):
        return [u.num_examples**self.gamma for u in updates]

    def aggregate(self, state, updates):
        weights = self.reference_weights(updates)
        starts = [self.technique.payload(self.client_start(state, u.client)) for u in updates]
        changes = [self.adds(state, s, u) for s, u in zip(starts, updates)]
        return self.absorb(state, total(changes, weights), sum(weights))
'''
(folder / "mymethod.py").write_text(code)
(folder / "conf" / "strategy").mkdir(parents=True)
(folder / "conf" / "strategy" / "mine.yaml").write_text(
    "defaults: [fedit, _self_]\n_target_: mymethod.Tempered\ngamma: 0.5\n"
)
sys.path.insert(0, str(folder))  # the command line does this for the working directory
from mymethod import Tempered

try:
    Tempered(gamma=1.5)
except ValueError as error:
    print("refused:", error)

# %% [markdown]
# ## Is it right?
#
# A method is tried by laws, not by examples. All clients train one round, and then:
#
# * at $\gamma = 1$ it is FedIT;
# * the order of the clients does not matter;
# * if all clients send the same, that is the average, whatever the weights;
# * a client that is alone gets its own factors back.
#
# `tests/strategies/test_contract.py` has some fifty such laws and takes a method from any folder
# (`docs/own_method.md`).

# %%
info = model.describe()
ranks = RankDistribution(distribution="homogeneous", rank=4)
people = Population(unseen_fraction=0.0)
roster = enroll(people, ranks, store.clients, info.modules, info.parameters, SEED)
setting = Setting(info.modules, info.parameters, ranks.alpha, roster.clients, SEED)
engine = Sequential().open(model.load(torch.device("cpu")), store)
ours, fedit = Tempered(), Tempered(gamma=1.0)
state, payload = ours.init_state(setting), ours.technique.payload
plan = LocalPlan(steps=4, lr=5e-3)
jobs = [TrainJob(SEED, 1, c, payload(ours.client_start(state, c)), plan) for c in roster.clients]
updates = list(engine.train(jobs))

mean = ours.aggregate(state, updates)
backwards = ours.aggregate(state, updates[::-1])
same = [replace(u, payload=updates[0].payload) for u in updates]
plain = FedIT().aggregate(state, updates)
laws = {
    "gamma = 1 is FedIT": (fedit.aggregate(state, updates), plain),
    "order does not matter": (mean, backwards),
    "equal clients keep what they sent": (
        ours.aggregate(state, same),
        ours.aggregate(state, same[:1]),
    ),
}
for law, (one, other) in laws.items():
    gap = max(float((one[name] - other[name]).abs().max()) for name in one)
    print(f"{law:34s} largest difference {gap:.1e}")
alone = ours.global_update(ours.aggregate(state, updates[:1]))
sent = updates[0].payload
gap = max(float((alone[p].a - sent[p].a).abs().max()) for p in sent)
print(f"{'a client alone gets its own back':34s} largest difference {gap:.1e}")

# %%
total = sum(u.num_examples for u in updates)
tempered = ours.reference_weights(updates)
names = [store.clients[u.client.id].name for u in updates]
at = range(len(names))
fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
ax.bar([i - 0.2 for i in at], [u.num_examples / total for u in updates], 0.38, color=BLUE)
ax.bar([i + 0.2 for i in at], [w / sum(tempered) for w in tempered], 0.38, color=ORANGE)
ax.set_xticks(at, names)
ax.grid(visible=False, axis="x")
ax.set_title("Weight of a client in the average")
ax.legend(["FedIT", "ours, $\\gamma = 1/2$"])
plt.show()

# %% [markdown]
# ## A whole run
#
# From a shell, in the folder with `mymethod.py`:
#
#     fedlora run --config-dir conf strategy=mine data=jsonl data.path=records.jsonl rounds=4
#
# Here the same without Ray, in this process: compose the configuration, run, read the folder back.
# Evaluation is of all clients, and each counts alike in the plain mean.

# %%
words = [
    f"hydra.searchpath=[{folder / 'conf'}]",
    *("data=jsonl", f"data.path={file}", "data.max_length=64", "ranks=homogeneous", "ranks.rank=4"),
    *("population.per_round=6", "population.unseen_fraction=0", "runtime=in_process"),
    *("client.epochs=1", "client.lr=5e-3", "rounds=4", "evaluate=loss", "evaluate.clients=0"),
    *("evaluate.groups=[seen]", "engine=sequential", "report=false", f"output_dir={folder}/runs"),
]
runs = {}
for name in ("fedit", "mine"):
    cfg = load([*words, f"strategy={name}", f"name={name}"])
    place = run(cfg, lambda parts: InProcessGrid(app, parts.runtime.nodes), lambda line: None)
    runs[name] = read_run(place)
    print(sorted(p.name for p in place.iterdir() if p.is_file()))

# %%
losses = {}
for name, finished in runs.items():
    rows = finished.last_clients()["seen"]
    losses[name] = {r["client"]: r["metrics"]["loss_response"] for r in rows}
    record = finished.evaluations[-1]
    print(
        f"{name:6s} mean over clients {record['loss_response']:.3f}, "
        f"of all tokens {record['loss_response_weighted']:.3f} nats"
    )

fig, ax = plt.subplots(figsize=(6.5, 2.8), layout="constrained")
clients = sorted(losses["fedit"])
at = range(len(clients))
for shift, (name, colour) in zip((-0.2, 0.2), (("fedit", BLUE), ("mine", ORANGE)), strict=True):
    ax.bar([i + shift for i in at], [losses[name][c] for c in clients], 0.38, color=colour)
ax.set_xticks(at, [store.clients[c].name for c in clients])
ax.grid(visible=False, axis="x")
ax.set_title("Test loss of each client after four rounds")
ax.set_ylabel("nats per token")
ax.legend(["FedIT", "ours, $\\gamma = 1/2$"])
plt.show()

# %% [markdown]
# A few test records per client, one seed, a model of a hundred thousand parameters: this shows how
# a method becomes a run, not which is better. For that, the next notebook makes a study.

# %%
import shutil

shutil.rmtree(folder)  # records, tokens and runs of this notebook
