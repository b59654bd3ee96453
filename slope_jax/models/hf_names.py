"""How Hugging Face names what our models hold: configuration fields and tensors."""

import re
from typing import Any, NamedTuple

from slope_jax.models.config import TransformerConfig


class Source(NamedTuple):
    """Where one parameter comes from.

    Attributes:
      path: of the parameter, single layers ("layers_3", "attention", "qkv", "kernel").
      names: tensors, joined along the output axis.
      transpose: whether they are (out, in), as `torch.nn.Linear` has them.
      vocabulary: whether the first axis counts tokens, and is padded.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    transpose: bool = False
    vocabulary: bool = False


# Our field -> theirs, and the values that our models fix. An absent key takes Transformers' default.
_FIELDS = {
    "bert": {
        "vocab_size": ("vocab_size", 30522),
        "max_positions": ("max_position_embeddings", 512),
        "hidden_size": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_size": ("intermediate_size", 3072),
        "type_vocab_size": ("type_vocab_size", 2),
        "norm_epsilon": ("layer_norm_eps", 1e-12),
    },
    "gpt2": {
        "vocab_size": ("vocab_size", 50257),
        "max_positions": ("n_positions", 1024),
        "hidden_size": ("n_embd", 768),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "mlp_size": ("n_inner", None),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
    },
}
_FIXED = {
    "bert": {
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
}
_DROPOUT = {"bert": "hidden_dropout_prob", "gpt2": "resid_pdrop"}

# Copies that some files hold of tensors that the model ties.
TIED = {
    "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.weight": "wte.weight",
}
# Constants that older files store as tensors: causal masks and the numbers 0, 1, 2, ...
_BUFFERS = re.compile(r"(.*\.)?(attn\.(masked_)?bias|embeddings\.(position|token_type)_ids)")


def is_buffer(name: str) -> bool:
    return _BUFFERS.fullmatch(name) is not None


def canonical(name: str) -> str:
    """The name without the model's prefix, and with today's names of the norm's parameters."""
    name = re.sub(r"^(bert|transformer)\.", "", name)
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name).replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )


def read_config(raw: dict[str, Any], family: str) -> dict[str, Any]:
    """Our configuration fields from the content of config.json.

    Raises:
      ValueError: it describes another family, or a variation that our models do not have.
    """
    if raw.get("model_type", family) != family:
        raise ValueError(
            f"config.json: model_type is {raw['model_type']!r}, but the model is a {family}"
        )
    other = [
        f"{key}={raw[key]!r} (ours: {' or '.join(map(repr, values))})"
        for key, values in _FIXED[family].items()
        if key in raw and raw[key] not in values
    ]
    if other:
        raise ValueError(f"config.json: our {family} does not have {', '.join(other)}")
    fields = {ours: raw.get(*theirs) for ours, theirs in _FIELDS[family].items()}
    fields["mlp_size"] = fields["mlp_size"] or 4 * fields["hidden_size"]
    return fields


def dropout(raw: dict[str, Any], family: str) -> float:
    """The probability after attention and MLP."""
    return raw.get(_DROPOUT[family], 0.1)


def sources(config: TransformerConfig, family: str) -> list[Source]:
    """Every parameter of a dense model with single layers."""
    layer = _bert_layer if family == "bert" else _gpt2_layer
    layers = [source for i in range(config.num_layers) for source in layer(i)]
    return [*(_BERT if family == "bert" else _GPT2), *layers]


def _linear(path: str, *names: str, transpose: bool = True) -> list[Source]:
    return [
        Source((*path.split("/"), "kernel"), tuple(f"{n}.weight" for n in names), transpose),
        Source((*path.split("/"), "bias"), tuple(f"{n}.bias" for n in names)),
    ]


def _norm(path: str, name: str) -> list[Source]:
    return [
        Source((*path.split("/"), "scale"), (f"{name}.weight",)),
        Source((*path.split("/"), "bias"), (f"{name}.bias",)),
    ]


def _table(name: str, tensor: str, vocabulary: bool = False) -> Source:
    return Source(("embeddings", name, "embedding"), (tensor,), vocabulary=vocabulary)


_BERT = [
    _table("token", "embeddings.word_embeddings.weight", vocabulary=True),
    _table("position", "embeddings.position_embeddings.weight"),
    _table("token_type", "embeddings.token_type_embeddings.weight"),
    *_norm("embeddings/norm", "embeddings.LayerNorm"),
    *_linear("pooler", "pooler.dense"),
    *_linear("mlm/transform", "cls.predictions.transform.dense"),
    *_norm("mlm/norm", "cls.predictions.transform.LayerNorm"),
    Source(("mlm", "bias"), ("cls.predictions.bias",), vocabulary=True),
    *_linear("nsp", "cls.seq_relationship"),
]

_GPT2 = [
    _table("token", "wte.weight", vocabulary=True),
    _table("position", "wpe.weight"),
    *_norm("norm", "ln_f"),
]


def _bert_layer(i: int) -> list[Source]:
    ours, theirs = f"layers_{i}", f"encoder.layer.{i}"
    attention = f"{theirs}.attention.self"
    return [
        *_linear(
            f"{ours}/attention/qkv",
            *(f"{attention}.{part}" for part in ("query", "key", "value")),
        ),
        *_linear(f"{ours}/attention/output", f"{theirs}.attention.output.dense"),
        *_norm(f"{ours}/attention_norm", f"{theirs}.attention.output.LayerNorm"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
        *_linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.output.LayerNorm"),
    ]


def _gpt2_layer(i: int) -> list[Source]:
    # Transformers' Conv1D stores (in, out), as Flax does.
    ours, theirs = f"layers_{i}", f"h.{i}"
    return [
        *_linear(f"{ours}/attention/qkv", f"{theirs}.attn.c_attn", transpose=False),
        *_linear(f"{ours}/attention/output", f"{theirs}.attn.c_proj", transpose=False),
        *_norm(f"{ours}/attention_norm", f"{theirs}.ln_1"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.mlp.c_fc", transpose=False),
        *_linear(f"{ours}/mlp/down", f"{theirs}.mlp.c_proj", transpose=False),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.ln_2"),
    ]
