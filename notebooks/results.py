# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Does it learn? The curves
#
# Drawn from the records that `python -m experiments` wrote into `benchmarks/results`: nothing is
# computed here, and your own records of the same groups join the pictures.
# [docs/accuracy.md](../docs/accuracy.md) says how the runs were made.

# %%
import statistics

import matplotlib.pyplot as plt

from benchmarks.report_accuracy import by_variant, in_order, mean_and_deviation
from benchmarks.tables import records

found = records("accuracy-gpt2-methods")
rows = in_order(
    "gpt2-methods",
    [row for record in found for row in record["results"] if "error" not in row],
)
for record in found:
    print(record["device"], record["date"], f"commit {record['commit'][:10]}")

# %% [markdown]
# ## Held-out loss by step
#
# The mean over the seeds; the band is from the lowest to the highest of them.

# %%
figure, axis = plt.subplots(figsize=(8, 4.5))
for variant, runs in by_variant(rows).items():
    steps = [step for step, _ in runs[0]["curve"] if step > 0]
    if not steps:
        continue
    losses = [[dict(map(tuple, run["curve"]))[step] for run in runs] for step in steps]
    (line,) = axis.plot(steps, [statistics.fmean(x) for x in losses], label=variant)
    axis.fill_between(
        steps, [min(x) for x in losses], [max(x) for x in losses], color=line.get_color(), alpha=0.2
    )
axis.set(xlabel="step", ylabel="nats a token", xscale="log")
if rows:
    axis.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Perplexity at the end
#
# On books that share no author with those trained on; a dot is a seed. Fewer dots are fewer runs.

# %%
variants = by_variant(rows)
figure, axis = plt.subplots(figsize=(8, 3.5))
for place, (variant, runs) in enumerate(variants.items()):
    values = [run["perplexity"]["books"] for run in runs]
    mean, deviation = mean_and_deviation(values)
    spread = "" if deviation is None else f" ± {deviation:.2f}"
    print(f"{variant:40} {mean:7.2f}{spread}  ({len(runs)} seeds)")
    axis.plot(values, [place] * len(values), "o", color="#2f6f9f", alpha=0.7)
axis.set_yticks(range(len(variants)), list(variants))
axis.set(xlabel="perplexity, books", xscale="log")
axis.invert_yaxis()
plt.show()
