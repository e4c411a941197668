"""Tiny random models of every architecture that is tested."""

from typing import Any

import torch

from mech.models import ChatModel
from tests.tiny_study import make_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1}
WIDE = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48}
GROUPED = {**WIDE, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {
    **SHAPE,
    "intermediate_size": 48,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
"""Attention whose keys and values come from a small common vector."""
SCALED = {"residual_multiplier": 0.3, "logits_scaling": 4.0}


def architectures() -> dict[str, Any]:
    import transformers as t

    return {
        "llama": t.LlamaConfig(**GROUPED),
        "qwen2": t.Qwen2Config(**GROUPED),
        "qwen3": t.Qwen3Config(**GROUPED),
        "gemma2": t.Gemma2Config(**GROUPED, sliding_window=4096, query_pre_attn_scalar=8),
        "gemma3": t.Gemma3TextConfig(**GROUPED, sliding_window=4096, query_pre_attn_scalar=8),
        "seed_oss": t.SeedOssConfig(**GROUPED),
        "mistral-sliding": t.MistralConfig(**GROUPED, sliding_window=8),
        "mixtral": t.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2),
        "olmo2": t.Olmo2Config(**WIDE),
        "glm4": t.Glm4Config(**GROUPED),
        "gpt_neox": t.GPTNeoXConfig(**SHAPE, intermediate_size=48, use_parallel_residual=True),
        "gpt2": t.GPT2Config(n_embd=32, n_layer=3, n_head=4, initializer_range=0.1),
        "afmoe": t.AfmoeConfig(**GROUPED, **EXPERTS, num_experts=3, num_dense_layers=1, sliding_window=4096),
        "bloom": t.BloomConfig(hidden_size=32, n_layer=3, n_head=4, initializer_range=0.1),
        "cohere": t.CohereConfig(**WIDE, logit_scale=0.25),
        "cohere2": t.Cohere2Config(**WIDE, logit_scale=0.25, sliding_window=4096),
        "deepseek_v3": t.DeepseekV3Config(
            **LATENT, **EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1
        ),
        "falcon": t.FalconConfig(**SHAPE, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
        "gpt_oss": t.GptOssConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2, sliding_window=4096),
        "gptj": t.GPTJConfig(n_embd=32, n_layer=3, n_head=4, rotary_dim=4, initializer_range=0.1),
        "granite": t.GraniteConfig(**WIDE, **SCALED, embedding_multiplier=3.0, attention_multiplier=0.2),
        "hyperclovax": t.HyperCLOVAXConfig(**WIDE, **SCALED, use_post_norm=True),
        "llama4": t.Llama4TextConfig(**GROUPED, num_local_experts=2, intermediate_size_mlp=48),
        "minicpm3": t.MiniCPM3Config(**LATENT),
        "mpt": t.MptConfig(
            d_model=32, n_layers=3, n_heads=4, max_seq_len=2048, initializer_range=0.1, use_cache=True
        ),
        "nanochat": t.NanoChatConfig(**WIDE),
        "olmo3": t.Olmo3Config(**WIDE, sliding_window=4096),
        "opt": t.OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.1),
        "phi": t.PhiConfig(**WIDE),
        "phi3": t.Phi3Config(**WIDE),
        "qwen3_moe": t.Qwen3MoeConfig(**GROUPED, **EXPERTS, num_experts=3),
        "recurrent_gemma": t.RecurrentGemmaConfig(**WIDE, logits_soft_cap=1.0),
        "stablelm": t.StableLmConfig(**WIDE, use_parallel_residual=True),
        "starcoder2": t.Starcoder2Config(**WIDE),
    }


NEARSIGHTED = (
    "afmoe",
    "cohere2",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "llama4",
    "mistral-sliding",
    "olmo3",
    "recurrent_gemma",
)
"""Not every layer attends to the whole past."""
OWN_ATTENTION = ("bloom", "falcon", "gptj", "mpt")
"""Attention goes past Hugging Face's registry, or has no positions: rows are padded."""
ODD = ("bloom", "llama4", "mpt")
"""Attention or MLP give something else than what the block adds."""
WITHOUT_A_PART = ("opt", "recurrent_gemma")
"""Its blocks have no attention or MLP by itself."""


def random_model(name: str, like: ChatModel) -> ChatModel:
    """A tiny random model of an architecture; its checkpoint is another's, and names nothing."""
    return made(architectures()[name], like)


def made(config: Any, like: ChatModel) -> ChatModel:
    """A random model of a config."""
    import transformers

    tokenizer = make_tokenizer()
    config.vocab_size, config.pad_token_id, config.bos_token_id = len(tokenizer), 1, 1
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in built.parameters():  # some that a checkpoint would fill are left as memory happens to be
        p.data = torch.where(p.isfinite() & (p.abs() < 1e3), p, 0.1)
    return ChatModel(built, tokenizer, like.checkpoint)
