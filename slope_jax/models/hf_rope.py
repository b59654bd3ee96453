"""Rotary positions as config.json describes them, both ways."""

from typing import Any

from slope_jax.models.rope import RopeScaling

# Their names of what a `RopeScaling` holds, in its order.
_NAMES = {
    "linear": ("factor",),
    "llama3": (
        *("factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    ),
}

# Their names of its fields, where they are others.
SCALING_NAMES = {
    ours: theirs
    for ours, theirs in zip(RopeScaling._fields, _NAMES["llama3"], strict=True)
    if ours != theirs
}


def read_rope(raw: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json.

    Transformers writes "rope_parameters" since version 5, and "rope_theta" and "rope_scaling" before;
    where both are there, it goes by "rope_scaling", and by "original_max_position_embeddings" of the
    config.json itself before that of either.

    Raises:
      ValueError: it is of a kind that our models do not have, or not whole.
    """
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    if (original := raw.get("original_max_position_embeddings")) is not None:
        rope["original_max_position_embeddings"] = original
    theta = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if not isinstance(kind, str) or kind not in _NAMES:
        ours = " or ".join(map(repr, ("default", *_NAMES)))
        raise ValueError(
            f"our models do not have the rotary embedding {kind!r} (ours: {ours}); give a model with one"
            " of these"
        )
    missing = [name for name in _NAMES[kind] if name not in rope]
    if missing:
        raise ValueError(
            f"the rotary embedding {kind!r} lacks {', '.join(missing)}; copy or download it again"
        )
    scaling = RopeScaling(*(rope[name] for name in _NAMES[kind]))
    return {"rope_theta": theta, "rope_scaling": scaling}


def rope_json(theta: float, scaling: RopeScaling | None) -> dict[str, Any]:
    """The entries that `read_rope` reads, as Transformers does since "rope_type" is there (4.43)."""
    if scaling is None:
        return {"rope_theta": theta}
    kind = "linear" if scaling.is_linear else "llama3"
    named = zip(_NAMES[kind], scaling, strict=False)
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **dict(named)}}
