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
# # slope_jax in ten minutes
#
# A linear layer whose kernel is N:M sparse from the first step to the last, its masks, its
# double-pruned gradient, and a short training in which low-rank adapters join near the end.
# Everything here runs on a CPU in about a minute.

# %%
import sys

# In Colab only: what to install. Either upload an archive made in a checkout by
#   git archive --prefix=slope_jax/ -o slope_jax.zip HEAD
# or write "git+" and the address you clone the project from.
SOURCE = "slope_jax.zip"

if "google.colab" in sys.modules:
    import subprocess

    subprocess.run([sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import ListedColormap
from matplotlib.ticker import PercentFormatter

from slope_jax import (
    CompressedMatrix,
    Pattern,
    SparseDense,
    TrainState,
    add_adapters,
    decompress,
    explain,
    lazy_adapters,
    masks,
    slope_matmul,
)
from slope_jax.generate import generate, inference_variables
from slope_jax.models import build

BLUE, ORANGE, GREEN, GREY = "#1f5a91", "#d1632a", "#2b8a3e", "#c9ced6"
plt.rcParams |= {
    "figure.dpi": 80,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "legend.frameon": False,
}

# %% [markdown]
# ## 1. A SparseDense by hand
#
# `SparseDense` is `flax.linen.Dense` with two more fields, `sparsity` and `adapter_rank`. Of every 4
# consecutive inputs, an output listens to 2. Only these survivors are a parameter; where they belong
# is written once, at initialisation, in a collection of its own, two bits for each.

# %%
layer = SparseDense(24, sparsity="2:4", kernel_init=jax.nn.initializers.normal(1.0))
x = jax.random.normal(jax.random.key(1), (64, 16))
variables = layer.init(jax.random.key(0), x)

for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    print(f"{jax.tree_util.keystr(path):24} {leaf.shape!s:10} {leaf.dtype}")

# %% [markdown]
# The two together are a `CompressedMatrix`. Decompressed, it is an ordinary (in, out) kernel with
# zeros in it, and the layer computes `x @ kernel + bias`.

# %%
w = CompressedMatrix(
    variables["params"]["kernel"], variables["masks"]["kernel"], Pattern(2, 4), 0, (16, 24)
)
w_r = decompress(w)
print("zeros:", float((w_r == 0).mean()))
print(
    "largest difference from x @ kernel:", float(jnp.abs(layer.apply(variables, x) - x @ w_r).max())
)

# %% [markdown]
# ## 2. Two masks
#
# Sparse tensor cores want N:M groups along the axis that is summed over. The forward product sums
# over inputs, and `mask_r` has its groups there. The gradient of the input sums over *outputs*, so
# for that product the kernel is pruned once more, across: of every 4 consecutive outputs the 2
# largest stay. That is `mask_rc`. (Grey is pruned.)

# %%
mask_r = w_r != 0
mask_rc = masks.double_prune(w_r, "2:4")
fate = mask_r.astype(int) + mask_rc  # 0 pruned, 1 forward only, 2 forward and backward

fig, axes = plt.subplots(1, 3, figsize=(12, 3.2))
limit = 0.8 * float(jnp.abs(w_r).max())
pictures = (
    ("mask_r: 2 of 4 down each column", np.where(mask_r, w_r, np.nan)),
    ("mask_rc: and 2 of 4 along each row", np.where(mask_rc, w_r, np.nan)),
)
for ax, (title, picture) in zip(axes, pictures, strict=False):
    ax.imshow(picture, cmap="RdBu", vmin=-limit, vmax=limit)
    ax.set(title=title)
axes[2].imshow(fate, cmap=ListedColormap([GREY, ORANGE, BLUE]))
axes[2].set(title="orange: left out of the backward pass")
for ax, down, across in zip(axes, (True, True, False), (False, True, True), strict=True):
    ax.set(xlabel="output", xticks=[], yticks=[], facecolor=GREY)
    ax.spines[:].set_visible(True)
    for i in range(4, 16, 4) if down else ():
        ax.axhline(i - 0.5, color="black", linewidth=0.8)
    for j in range(4, 24, 4) if across else ():
        ax.axvline(j - 0.5, color="black", linewidth=0.8)
axes[0].set(ylabel="input")
plt.show()

# %% [markdown]
# How much does the second pruning cost? For a random mask there is a closed form,
# `masks.extra_sparsity`. With $s = N/M$, a group of $M$ outputs has $j$ survivors with binomial
# probability, and loses those beyond $N$:
#
# $$\sum_{j=N+1}^{M} \binom{M}{j}\, s^j (1-s)^{M-j}\, \frac{j-N}{M}$$

# %%
patterns = ("1:2", "2:4", "4:8", "8:16", "1:4", "2:8", "4:16", "1:8", "2:16")
rng = np.random.default_rng(0)
measured = []
for pattern in patterns:
    w_random = jnp.asarray(rng.normal(size=(512, 512)), jnp.float32)
    kept = masks.magnitude_mask(w_random, pattern)
    lost = kept & ~masks.double_prune(w_random * kept, pattern)
    measured.append(float(lost.mean()))
closed = [masks.extra_sparsity(pattern) for pattern in patterns]

fig, ax = plt.subplots(figsize=(8, 3))
ax.bar(patterns, closed, color=GREY, width=0.6, label="closed form")
ax.plot(patterns, measured, "o", color=ORANGE, label="a random 512 x 512 kernel")
ax.set(ylabel="entries lost in dx", ylim=(0, 0.145))
ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
ax.legend(ncols=2, loc="upper right")
plt.show()
print(
    f"largest difference: {100 * max(abs(a - b) for a, b in zip(closed, measured, strict=True)):.3f} points"
)

# %% [markdown]
# ## 3. The double-pruned gradient
#
#     y  = x @ w_r
#     dx = dy @ w_rc.T
#     dw = (x.T @ dy) * mask_r
#
# `dw` exists for survivors alone, so a pruned weight has no gradient, no moments and no way back.
# `dx` is *not* the derivative of `y`: it is an estimate of it, from the weights of `mask_rc`.

# %%
dy = jax.random.normal(jax.random.key(2), (64, 24))
_, pull = jax.vjp(lambda x, values: slope_matmul(x, w.with_values(values)), x, w.values)
dx, dw = pull(dy)

w_rc = w_r * mask_rc
dw_dense = x.T @ dy
dx_true = dy @ w_r.T
np.testing.assert_allclose(dx, dy @ w_rc.T, rtol=1e-5, atol=1e-5)
np.testing.assert_allclose(decompress(w.with_values(dw)), dw_dense * mask_r, rtol=1e-5, atol=1e-4)

fig, axes = plt.subplots(1, 3, figsize=(12, 3.2), width_ratios=(1.3, 1.3, 1))
limit = float(jnp.abs(dw_dense).max())
for ax, title, picture in (
    (axes[0], "x.T @ dy: what a dense layer would store", dw_dense),
    (axes[1], "dw: what is stored", np.where(mask_r, decompress(w.with_values(dw)), np.nan)),
):
    ax.imshow(picture, cmap="RdBu", vmin=-limit, vmax=limit)
    ax.set(title=title, xlabel="output", ylabel="input", xticks=[], yticks=[], facecolor=GREY)
    ax.spines[:].set_visible(True)
ax, ends = axes[2], [float(dx.min()), float(dx.max())]
ax.plot(ends, ends, color="0.7", linewidth=1)
ax.plot(dx.ravel(), dx_true.ravel(), ".", color=GREY, markersize=4, label="dy @ w_r.T (derivative)")
ax.plot(dx.ravel(), (dy @ w_rc.T).ravel(), ".", color=ORANGE, markersize=3, label="dy @ w_rc.T")
ax.set(title="dx against two formulas", xlabel="dx")
ax.legend(loc="upper left", fontsize=9, handletextpad=0.1)
plt.show()

cosine = jnp.vdot(dx, dx_true) / (jnp.linalg.norm(dx) * jnp.linalg.norm(dx_true))
print(f"cosine between dx and the derivative: {float(cosine):.3f}")

# %% [markdown]
# ## 4. A short training, with adapters joining
#
# A small GPT-2 learns the letters of Python's own documentation. It is trained twice with the same
# seed and the same batches: 2:4 sparse, and dense. In the sparse run, low-rank adapters
# `y += (x @ L) @ R` join after 80 % of the steps. (The paper lets them join for the last 1 %; here we
# want to see them.)

# %%
from pydoc_data.topics import topics

text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
tokens = np.frombuffer(text, np.uint8).astype(np.int32)
train_tokens, held_out_tokens = np.split(tokens, [int(0.95 * len(tokens))])
print(f"{len(tokens):,} letters, such as: {text[5000:5060].decode()!r}")

STEPS, JOIN, BATCH, LENGTH, RANK = 400, 320, 16, 64, 4
small = {
    "vocab_size": 128,
    "max_positions": LENGTH,
    "num_layers": 2,
    "hidden_size": 64,
    "mlp_size": 256,
    "num_heads": 2,
}


def batches(tokens, seed, count):
    """(BATCH, LENGTH + 1) windows at random places."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        starts = rng.integers(0, len(tokens) - LENGTH - 1, BATCH)
        yield tokens[starts[:, None] + np.arange(LENGTH + 1)]


held_out = np.concatenate(list(batches(held_out_tokens, 1, 4)))

# %% [markdown]
# Any optax optimizer will do. What keeps moments goes inside `lazy_adapters`, so that adapters get
# step counts of their own; clipping and the schedule go outside.


# %%
@jax.jit
def step(state, block):
    def loss(params):
        logits = state.apply_fn({"params": params, "masks": state.masks}, block[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, block[:, 1:]).mean()

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


@jax.jit
def logits_of(state):
    return state.apply_fn(state.variables, held_out[:, :-1])


def evaluate(state):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_of(state), held_out[:, 1:])
    return float(losses.mean())


tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    lazy_adapters(optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))),
    optax.scale_by_learning_rate(optax.warmup_cosine_decay_schedule(0, 6e-3, 40, STEPS, 3e-4)),
)


def train(sparsity):
    model = build("gpt2-nano", sparsity=sparsity, **small)
    variables = jax.jit(model.init)(jax.random.key(0), held_out[:, :-1])
    state = TrainState.create(apply_fn=model.apply, tx=tx, **({"masks": {}} | variables))
    losses, evals, seen = [], [], {}
    for i, block in enumerate(batches(train_tokens, 0, STEPS)):
        if i == JOIN and sparsity != "dense":
            adapted = build("gpt2-nano", sparsity=sparsity, adapter_rank=RANK, **small)
            seen["before"] = logits_of(state)
            state, seen["layers"] = add_adapters(state, adapted, jax.random.key(7))
            seen["after"] = logits_of(state)
        if i % 40 == 0:
            evals.append((i, evaluate(state)))
        state, value = step(state, block)
        losses.append(value)
    evals.append((STEPS, evaluate(state)))
    return state, np.asarray(jax.device_get(losses)), np.array(evals), seen


dense_state, dense_losses, dense_evals, _ = train("dense")
state, losses, evals, seen = train("2:4")

# %% [markdown]
# `R` is born zero, so at the join nothing jumps: the logits before and after are the same to the bit.

# %%
assert (seen["before"] == seen["after"]).all()
print(f"adapters joined {seen['layers']} linears; logits unchanged to the bit")

# %%
fig, ax = plt.subplots(figsize=(8, 3.6))
ax.axvspan(JOIN, STEPS, color=GREEN, alpha=0.1, linewidth=0)
ax.axvline(JOIN, color=GREEN, linestyle="--")
ax.plot(dense_losses, color=GREY, linewidth=0.8)
ax.plot(losses, color=BLUE, linewidth=0.8, alpha=0.4)
ax.plot(
    *dense_evals.T,
    "o-",
    color="0.5",
    markersize=4,
    label=f"dense, held out ({dense_evals[-1, 1]:.3f})",
)
ax.plot(*evals.T, "o-", color=BLUE, markersize=4, label=f"2:4, held out ({evals[-1, 1]:.3f})")
ax.text(JOIN - 4, 4.5, "adapters join", color=GREEN, ha="right")
ax.set(xlabel="steps", ylabel="loss (nats per letter)")
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# ## 5. What ran, and what was stored
#
# `explain` lists every linear layer: its pattern, what multiplies it and why, and its bytes against
# dense. The first linear after the input and the tied head stay dense, as in the paper.

# %%
adapted = build("gpt2-nano", sparsity="2:4", adapter_rank=RANK, **small)
print(explain(adapted, state.variables, held_out[:, :-1]))

# %% [markdown]
# The survivors are the parameters, so what an optimizer keeps per parameter is half as large too,
# without a line of code for it. Here are the bytes of a real model, from shapes alone: nothing is
# allocated.


# %%
def state_bytes(sparsity):
    """GiB of each part of the state of GPT-2 large in float32 under Adam."""
    model = build("gpt2-large", sparsity=sparsity)
    shapes = jax.eval_shape(model.init, jax.random.key(0), **model.example_inputs())
    moments = jax.eval_shape(optax.scale_by_adam().init, shapes["params"])
    parts = {
        "parameters": shapes["params"],
        "gradients": shapes["params"],
        "Adam's moments": moments,
        "positions": shapes.get("masks", {}),
    }
    return {
        k: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(v)) / 2**30
        for k, v in parts.items()
    }


rows = {name: state_bytes(name) for name in ("dense", "2:4", "1:4")}
fig, ax = plt.subplots(figsize=(8, 2.3))
left = np.zeros(len(rows))
for part, color in zip(rows["dense"], (BLUE, ORANGE, GREY, GREEN), strict=True):
    widths = np.array([row[part] for row in rows.values()])
    ax.barh(list(rows), widths, left=left, color=color, label=part, height=0.6)
    left += widths
for i, total in enumerate(left):
    ax.text(total + 0.1, i, f"{total:.2f} GiB, {total / left[0]:.2f} of dense", va="center")
ax.invert_yaxis()
ax.set(xlabel="GiB, GPT-2 large, embeddings included", xlim=(0, 1.35 * left[0]))
ax.legend(ncols=4, loc="upper center", bbox_to_anchor=(0.45, 1.28), fontsize=9)
plt.show()

# %% [markdown]
# ## 6. What it writes
#
# For generation only survivors, positions and adapters are needed, cast once. A prompt is passed over
# once; then each new letter costs one letter, because keys and values of the earlier ones are kept.

# %%
fast_model, fast = inference_variables(adapted, state.variables)
prompt = jnp.asarray([list(b"The list ")])
new = generate(fast_model, fast, prompt, max_new_tokens=48, temperature=0.6, key=jax.random.key(3))
print(bytes(map(int, prompt[0])).decode() + bytes(map(int, new.tokens[0])).decode())

# %% [markdown]
# ## Where to go from here
#
# - `python -m train.pretrain --model=bert-base` pretrains a 2:4 BERT on text that is on your machine.
# - `python -m train.pretrain --model=gpt2-small --recipe=paper --dry-run` prints the plan of a real run.
# - `python -m train.evaluate --checkpoint=runs/NAME --data=docs --held-out` gives a run's perplexity.
# - `help(SparseDense)`, `help(add_adapters)` and `help(lazy_adapters)` say the rest.
