"""Tiny random models, one a family, and a tiny tokenizer, for tests that need a whole checkpoint.

`save_tiny("llama-gqa", directory)` writes config, safetensors and tokenizer.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

__all__ = ["FAMILIES", "MOE_FAMILIES", "VOCABULARY", "save_tiny", "tiny_config", "tiny_model", "tiny_tokenizer"]

VOCABULARY = 128
_SPECIAL = ["<unk>", "<s>", "</s>"]
_CORPUS = [
    "The river runs past the old mill and into the sea.",
    "She counted the boats in the harbour, then counted them again.",
    "In the morning the rain had stopped and the streets were bright.",
    "A model is small when every part of it has a reason to be there.",
]


def _shape(**changes: Any) -> dict[str, Any]:
    """The settings that all families share; a wide initialisation keeps the logits of a tiny model far from uniform."""
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return shape | changes


def _llama_gqa() -> PreTrainedConfig:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return LlamaConfig(**_shape(rope_parameters=scaling, tie_word_embeddings=True))


def _opt() -> PreTrainedConfig:
    shape = _shape(ffn_dim=128, word_embed_proj_dim=64, init_std=0.1, tie_word_embeddings=True)
    for name in ("intermediate_size", "num_key_value_heads", "initializer_range"):
        del shape[name]
    return OPTConfig(**shape)


def _gemma3() -> PreTrainedConfig:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    shape = _shape(num_hidden_layers=4, head_dim=16, sliding_window=8, layer_types=kinds, tie_word_embeddings=True)
    return Gemma3TextConfig(**shape, query_pre_attn_scalar=16, final_logit_softcapping=30.0)


def _mixtral() -> PreTrainedConfig:
    return MixtralConfig(**_shape(num_local_experts=4, num_experts_per_tok=2))


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(**_shape(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32))


def _qwen2_moe() -> PreTrainedConfig:
    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 64}
    return Qwen2MoeConfig(**_shape(num_experts=4, num_experts_per_tok=2, **sizes))


def _deepseek_v3() -> PreTrainedConfig:
    """The first layer is dense, and the router chooses among groups of experts."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    shape = _shape(num_key_value_heads=4, first_k_dense_replace=1, moe_intermediate_size=32)
    return DeepseekV3Config(**shape, **experts, **ranks)


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama-mha": lambda: LlamaConfig(**_shape(num_key_value_heads=4)),
    "llama-gqa": _llama_gqa,
    "opt": _opt,
    "mistral": lambda: MistralConfig(**_shape(sliding_window=8)),
    "qwen2": lambda: Qwen2Config(**_shape(tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3Config(**_shape(head_dim=16)),
    "gemma3": _gemma3,
    "phi3": lambda: Phi3Config(**_shape()),
    "mixtral": _mixtral,
    "qwen3-moe": _qwen3_moe,
    "qwen2-moe": _qwen2_moe,
    "olmoe": lambda: OlmoeConfig(**_shape(num_experts=4, num_experts_per_tok=2)),
    "deepseek-v3": _deepseek_v3,
}
MOE_FAMILIES = ["mixtral", "qwen3-moe", "qwen2-moe", "olmoe", "deepseek-v3"]
FAMILIES = [family for family in _CONFIGS if family not in MOE_FAMILIES]


def tiny_config(family: str) -> PreTrainedConfig:
    """The config of a tiny model: hidden size 64, 3 or 4 layers, 128 tokens."""
    return _CONFIGS[family]()


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of a family of `FAMILIES` or `MOE_FAMILIES`, in eval mode; the global RNG is not moved.

    Norms and biases (those of routers are buffers) are random too, so that forgetting one changes the logits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.dim() == 1:
                    tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of at most 128 tokens with <s> and </s>; printable ASCII text survives a round trip."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = [chr(code) for code in range(33, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def save_model(model: PreTrainedModel, directory: Path, **save_kwargs: Any) -> Path:
    """Save a model and `tiny_tokenizer()`; `save_kwargs` go to `save_pretrained` (e.g. max_shard_size)."""
    model.save_pretrained(directory, **save_kwargs)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def save_tiny(family: str, directory: Path, **save_kwargs: Any) -> Path:
    """`save_model` of `tiny_model(family)`."""
    return save_model(tiny_model(family), directory, **save_kwargs)
