"""BERT, GPT-2, OPT, LLaMA and Mistral with N:M sparse linears, by name or from a Hugging Face folder."""

from slope_jax.models.attention import AttentionPath, attention_path, decode_path
from slope_jax.models.bert import Bert, BertConfig, BertOutput
from slope_jax.models.cache import init_cache
from slope_jax.models.config import REMAT_POLICIES, Linear, Segment, TransformerConfig
from slope_jax.models.decoder import Decoder, DecoderConfig
from slope_jax.models.gpt2 import GPT2, GPT2Config
from slope_jax.models.hf import from_hf, load_hf
from slope_jax.models.hf_export import export_hf
from slope_jax.models.llama import Llama, LlamaConfig
from slope_jax.models.opt import OPT, OPTConfig
from slope_jax.models.registry import VARIANTS, build, count_parameters, variant_config
from slope_jax.models.rope import RopeScaling
from slope_jax.models.stack import stack_layers, unstack_layers
from slope_jax.models.torch_export import export_semi_structured, semi_structured
from slope_jax.models.wanda import prune_wanda

__all__ = [
    "GPT2",
    "OPT",
    "REMAT_POLICIES",
    "VARIANTS",
    "AttentionPath",
    "Bert",
    "BertConfig",
    "BertOutput",
    "Decoder",
    "DecoderConfig",
    "GPT2Config",
    "Linear",
    "Llama",
    "LlamaConfig",
    "OPTConfig",
    "RopeScaling",
    "Segment",
    "TransformerConfig",
    "attention_path",
    "build",
    "count_parameters",
    "decode_path",
    "export_hf",
    "export_semi_structured",
    "from_hf",
    "init_cache",
    "load_hf",
    "prune_wanda",
    "semi_structured",
    "stack_layers",
    "unstack_layers",
    "variant_config",
]
