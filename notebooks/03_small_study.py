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
# # A small study, from YAML to figure
#
# **Question.** Two methods, several seeds: which one is better, by how much, and is that more than
# chance? How is such a comparison written down so that others can repeat it?
#
# **Answer.** A study is one YAML file: words of every run, axes, seeds, metrics, and a reference.
# `fedlora study` does what is missing and writes tables with intervals, a page and figures. Runs of
# one seed share clients, batches and cohorts, so that methods are compared seed by seed. Here three
# seeds of two methods, six runs of seconds; a second start does nothing again.
#
# No network is needed. All files go to a temporary folder. docs/studies.md has every key.

# %%
import os
import tempfile
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import pyarrow.parquet as pq
from IPython.display import Markdown

from simulations.study.__main__ import main
from simulations.study.plan import plan
from simulations.study.results import recorded
from simulations.study.runner import progress_of
from simulations.study.spec import read_study
from simulations.study.statistics import difference, estimate

folder = Path(tempfile.mkdtemp(prefix="fedlora-study-"))
os.environ["FEDLORA_OUTPUT"] = str(folder)
COLOURS = {"fedit": "#0072B2", "flexlora": "#D55E00"}

# %% [markdown]
# ## The file
#
# `base` are words of every run, as `fedlora run` takes them. Each axis has levels, and a level is
# one word or several that belong together: here FedIT, which can only train the smallest rank of
# its clients, and FlexLoRA, whose clients train their own. Metrics are numbers of the evaluations,
# or of the analyses of the rounds, as here the effective rank of the global update.

# %%
text = """\
base: experiment=smoke evaluate=loss evaluate.first=false ranks=uniform rounds=2 client.lr=5e-3
axes:
  method:
    fedit: strategy=fedit
    flexlora: strategy=flexlora
seeds: [0, 1, 2]
metrics: {loss_response_weighted: lower, spectrum/effective_rank: higher}
reference: {method: fedit}
"""
file = folder / "ranks.yaml"
file.write_text(text)
study = read_study(str(file))
for one in plan(study):
    print(one.name)

# %% [markdown]
# ## Doing it
#
# From a shell: `fedlora study ranks.yaml --jobs 2`. Every run is a process of its own; a study that
# is killed goes on where it stopped. The same command again finds everything done.

# %%
assert main([str(file), "--jobs", "2"]) == 0

# %%
assert main([str(file), "--jobs", "2"]) == 0  # nothing is left to do

# %% [markdown]
# ## What it found
#
# The folder has the table for a paper (LaTeX), for a README (Markdown), for a program (CSV and
# Parquet), the page `report.html`, and the command of every run.

# %%
place = folder / "study-ranks"
print(*sorted(p.name for p in place.iterdir()), sep="\n")
Markdown((place / "table.md").read_text())

# %% [markdown]
# ## Paired by seed
#
# Seeds differ in their clients and data, often by more than methods do. Since runs of one seed
# share both, the difference is taken seed by seed, and its interval is narrower than those of the
# two means suggest. These are the library's functions on the recorded runs; the table has the same
# numbers.

# %%
runs = [recorded(one.run, one.folder) for one in progress_of(plan(study), place)]
metric = "loss_response_weighted"
final = {
    method: {
        one.run.seed: one.curve("round", metric)[1][-1]
        for one in runs
        if dict(one.run.cell)["method"] == method
    }
    for method in COLOURS
}
for method, values in final.items():
    e = estimate(values)
    print(f"{method:9s} {e.mean:.3f}  [{e.low:.3f}, {e.high:.3f}] over {len(values)} seeds")
apart = difference(final["flexlora"], final["fedit"])
assert apart is not None
d = apart.estimate
print(f"difference {d.mean:+.4f}  [{d.low:+.4f}, {d.high:+.4f}]  p = {apart.p:.2g}")

fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.2), layout="constrained")
for seed in study.seeds:
    pair = [final[m][seed] for m in COLOURS]
    axes[0].plot(list(COLOURS), pair, "o-", color="#8a8f98", linewidth=1)
    axes[0].annotate(f"seed {seed}", (1.04, pair[1]), fontsize=8, color="#555")
for i, (method, values) in enumerate(final.items()):
    axes[0].plot(
        i, estimate(values).mean, "_", color=COLOURS[method], markersize=40, markeredgewidth=3
    )
axes[0].set_title("The pairs", loc="left", fontweight="bold")
axes[0].set_ylabel("nats per response token")
axes[0].set_xlim(-0.4, 1.5)
for one in runs:
    method = dict(one.run.cell)["method"]
    x, y = one.curve("round", "spectrum/effective_rank")
    axes[1].plot(x, y, "o-", color=COLOURS[method], label=method if one.run.seed == 0 else "")
axes[1].set_title("Effective rank of the global update", loc="left", fontweight="bold")
axes[1].set_xticks([1, 2])
axes[1].set_xlabel("round")
axes[1].legend(frameon=False)
plt.show()

# %% [markdown]
# Three seeds and two rounds of a tiny model decide nothing; the interval says so better than a
# sentence could. The study of BANKING77 (`conf/study/banking77.yaml`) is the same file, longer.
#
# Every row can be analysed further, in pandas or, as here, in pyarrow:

# %%
rows = pq.read_table(place / "results.parquet")
means = rows.group_by(["method", "round"]).aggregate([(metric, "mean"), (metric, "stddev")])
for row in means.sort_by([("round", "ascending"), ("method", "ascending")]).to_pylist():
    print(f"round {row['round']}  {row['method']:9s} {row[f'{metric}_mean']:.4f}")

# %%
import shutil

shutil.rmtree(folder)  # the study of this notebook
