"""How Hugging Face names what each family holds: configuration fields and tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from slope_jax.models.hf_rope import read_rope


class Source(NamedTuple):
    """Where one parameter comes from.

    Attributes:
      path: of the parameter, single layers ("layers_3", "attention", "qkv", "kernel").
      names: tensors, joined along the output axis.
      transpose: whether they are (out, in), as `torch.nn.Linear` has them.
      vocabulary: the parameter's axis that counts tokens, and is padded; None has none.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    transpose: bool = False
    vocabulary: int | None = None


class Family(NamedTuple):
    """One "model_type" of config.json.

    Attributes:
      fields: ours -> (theirs, what Transformers takes where it is absent).
      fixed: their fields that our models do not vary -> the values that fit.
      dropout: their field of the probability after attention and MLP; None has none.
      outside: parameters outside the layers; layer: those of layer i.
      tied: copies that some files hold of tensors that the model ties -> the originals; of LLaMA and
        Mistral, where `tied_head` is true.
      optional: heads of ours that a folder may leave out, in order: each but the first only where
        those before it are left out as well.
      finish: (config.json, fields so far) -> fields, for what is more than a name.
    """

    fields: dict[str, tuple[str, Any]]
    fixed: dict[str, tuple]
    dropout: str | None
    outside: list[Source]
    layer: Callable[[int], list[Source]]
    tied: dict[str, str]
    finish: Callable[[dict, dict], dict]
    optional: tuple[str, ...] = ()


def _linear(path: str, *names: str, transpose: bool = True, bias: bool = True) -> list[Source]:
    kernel = Source((*path.split("/"), "kernel"), tuple(f"{n}.weight" for n in names), transpose)
    if not bias:
        return [kernel]
    return [kernel, Source((*path.split("/"), "bias"), tuple(f"{n}.bias" for n in names))]


def _norm(path: str, name: str, bias: bool = True) -> list[Source]:
    scale = Source((*path.split("/"), "scale"), (f"{name}.weight",))
    return [scale, Source((*path.split("/"), "bias"), (f"{name}.bias",))] if bias else [scale]


def _table(name: str, tensor: str, vocabulary: int | None = None) -> Source:
    return Source(("embeddings", name, "embedding"), (tensor,), vocabulary=vocabulary)


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


_BERT = Family(
    fields={
        "vocab_size": ("vocab_size", 30522),
        "max_positions": ("max_position_embeddings", 512),
        "hidden_size": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_size": ("intermediate_size", 3072),
        "type_vocab_size": ("type_vocab_size", 2),
        "norm_epsilon": ("layer_norm_eps", 1e-12),
    },
    fixed={
        "hidden_act": ("gelu",),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    dropout="hidden_dropout_prob",
    outside=[
        _table("token", "embeddings.word_embeddings.weight", vocabulary=0),
        _table("position", "embeddings.position_embeddings.weight"),
        _table("token_type", "embeddings.token_type_embeddings.weight"),
        *_norm("embeddings/norm", "embeddings.LayerNorm"),
        *_linear("pooler", "pooler.dense"),
        *_linear("mlm/transform", "cls.predictions.transform.dense"),
        *_norm("mlm/norm", "cls.predictions.transform.LayerNorm"),
        Source(("mlm", "bias"), ("cls.predictions.bias",), vocabulary=0),
        *_linear("nsp", "cls.seq_relationship"),
    ],
    layer=_bert_layer,
    tied={
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    finish=lambda raw, fields: fields,
    optional=("nsp", "pooler"),
)


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


def _finish_gpt2(raw: dict, fields: dict) -> dict:
    return fields | {"mlp_size": fields["mlp_size"] or 4 * fields["hidden_size"]}


_GPT2 = Family(
    fields={
        "vocab_size": ("vocab_size", 50257),
        "max_positions": ("n_positions", 1024),
        "hidden_size": ("n_embd", 768),
        "num_layers": ("n_layer", 12),
        "num_heads": ("n_head", 12),
        "mlp_size": ("n_inner", None),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
        "tie_word_embeddings": (True,),
    },
    dropout="resid_pdrop",
    outside=[
        _table("token", "wte.weight", vocabulary=0),
        _table("position", "wpe.weight"),
        *_norm("norm", "ln_f"),
    ],
    layer=_gpt2_layer,
    tied={"lm_head.weight": "wte.weight"},
    finish=_finish_gpt2,
)


def _opt_layer(i: int) -> list[Source]:
    ours, theirs = f"layers_{i}", f"decoder.layers.{i}"
    parts = (f"{theirs}.self_attn.{part}_proj" for part in "qkv")
    return [
        *_linear(f"{ours}/attention/qkv", *parts),
        *_linear(f"{ours}/attention/output", f"{theirs}.self_attn.out_proj"),
        *_norm(f"{ours}/attention_norm", f"{theirs}.self_attn_layer_norm"),
        *_linear(f"{ours}/mlp/up", f"{theirs}.fc1"),
        *_linear(f"{ours}/mlp/down", f"{theirs}.fc2"),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.final_layer_norm"),
    ]


def _finish_opt(raw: dict, fields: dict) -> dict:
    hidden = fields["hidden_size"]
    projected = raw.get("word_embed_proj_dim", hidden)
    if projected != hidden:
        raise ValueError(
            f"word_embed_proj_dim={projected} differs from hidden_size={hidden}; our opt does not project"
            " its embeddings, as OPT-350m alone does: give another OPT"
        )
    return fields | {"norm_epsilon": 1e-5}  # torch's default, which Transformers relies on


_OPT = Family(
    fields={
        "vocab_size": ("vocab_size", 50272),
        "max_positions": ("max_position_embeddings", 2048),
        "hidden_size": ("hidden_size", 768),
        "num_layers": ("num_hidden_layers", 12),
        "num_heads": ("num_attention_heads", 12),
        "mlp_size": ("ffn_dim", 3072),
    },
    fixed={
        "activation_function": ("relu",),
        "do_layer_norm_before": (True,),
        "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
        "enable_bias": (True,),
        "tie_word_embeddings": (True,),
    },
    dropout="dropout",
    outside=[
        _table("token", "decoder.embed_tokens.weight", vocabulary=0),
        _table("position", "decoder.embed_positions.weight"),
        *_norm("norm", "decoder.final_layer_norm"),
    ],
    layer=_opt_layer,
    tied={"lm_head.weight": "decoder.embed_tokens.weight"},
    finish=_finish_opt,
)


def _llama_layer(i: int) -> list[Source]:
    ours, theirs = f"layers_{i}", f"layers.{i}"
    parts = (f"{theirs}.self_attn.{part}_proj" for part in "qkv")
    gate_up = (f"{theirs}.mlp.{part}_proj" for part in ("gate", "up"))
    return [
        *_linear(f"{ours}/attention/qkv", *parts, bias=False),
        *_linear(f"{ours}/attention/output", f"{theirs}.self_attn.o_proj", bias=False),
        *_norm(f"{ours}/attention_norm", f"{theirs}.input_layernorm", bias=False),
        *_linear(f"{ours}/mlp/gate_up", *gate_up, bias=False),
        *_linear(f"{ours}/mlp/down", f"{theirs}.mlp.down_proj", bias=False),
        *_norm(f"{ours}/mlp_norm", f"{theirs}.post_attention_layernorm", bias=False),
    ]


def _finish_llama(raw: dict, fields: dict) -> dict:
    heads, width = fields["num_heads"], fields["hidden_size"]
    if heads < 1:
        raise ValueError(f"num_attention_heads={heads} must be positive; copy or download it again")
    head_dim = raw.get("head_dim")
    if head_dim is None and width % heads:
        raise ValueError(
            f"hidden_size={width} is not a multiple of num_attention_heads={heads}, and there is no"
            " head_dim; copy or download it again"
        )
    fields = fields | {
        "num_kv_heads": fields["num_kv_heads"] or heads,
        "head_dim": None if head_dim == width / heads else head_dim,
        "tied_head": bool(raw.get("tie_word_embeddings", False)),
    }
    return fields | read_rope(raw)


_LLAMA = Family(
    fields={
        "vocab_size": ("vocab_size", 32000),
        "max_positions": ("max_position_embeddings", 2048),
        "hidden_size": ("hidden_size", 4096),
        "num_layers": ("num_hidden_layers", 32),
        "num_heads": ("num_attention_heads", 32),
        "num_kv_heads": ("num_key_value_heads", None),
        "mlp_size": ("intermediate_size", 11008),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
    },
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "tie_word_embeddings": (False, True),
    },
    dropout=None,
    outside=[
        _table("token", "embed_tokens.weight", vocabulary=0),
        *_norm("norm", "norm", bias=False),
        Source(("lm_head", "kernel"), ("lm_head.weight",), transpose=True, vocabulary=1),
    ],
    layer=_llama_layer,
    tied={"lm_head.weight": "embed_tokens.weight"},
    finish=_finish_llama,
)
_MISTRAL = _LLAMA._replace(
    fields=_LLAMA.fields
    | {
        "max_positions": ("max_position_embeddings", 131_072),
        "num_kv_heads": ("num_key_value_heads", 8),
        "mlp_size": ("intermediate_size", 14336),
        "window": ("sliding_window", 4096),
    },
)

FAMILIES = {"bert": _BERT, "gpt2": _GPT2, "opt": _OPT, "llama": _LLAMA, "mistral": _MISTRAL}
