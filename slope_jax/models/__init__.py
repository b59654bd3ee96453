"""BERT and GPT-2 with N:M sparse linears, by name or from a Hugging Face folder."""

from slope_jax.models.attention import AttentionPath, attention_path
from slope_jax.models.bert import Bert, BertConfig, BertOutput
from slope_jax.models.config import REMAT_POLICIES, Linear, Segment, TransformerConfig
from slope_jax.models.gpt2 import GPT2, GPT2Config
from slope_jax.models.hf import from_hf, load_hf
from slope_jax.models.registry import VARIANTS, build, count_parameters, variant_config
from slope_jax.models.stack import stack_layers, unstack_layers

__all__ = [
    "GPT2",
    "REMAT_POLICIES",
    "VARIANTS",
    "AttentionPath",
    "Bert",
    "BertConfig",
    "BertOutput",
    "GPT2Config",
    "Linear",
    "Segment",
    "TransformerConfig",
    "attention_path",
    "build",
    "count_parameters",
    "from_hf",
    "load_hf",
    "stack_layers",
    "unstack_layers",
    "variant_config",
]
