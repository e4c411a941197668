"""Tiny random models of every architecture that is tested."""

from typing import Any

import torch

from mech.models import ChatModel
from tests.tiny_study import make_tokenizer

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1}
GROUPED = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8}


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
        "olmo2": t.Olmo2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"}),
        "glm4": t.Glm4Config(**GROUPED),
        "gpt_neox": t.GPTNeoXConfig(**SHAPE, intermediate_size=48, use_parallel_residual=True),
        "gpt2": t.GPT2Config(n_embd=32, n_layer=3, n_head=4, initializer_range=0.1),
    }


def random_model(name: str, like: ChatModel) -> ChatModel:
    """A tiny random model of an architecture; its checkpoint is another's, and names nothing."""
    import transformers

    config = architectures()[name]
    tokenizer = make_tokenizer()
    config.vocab_size, config.pad_token_id, config.bos_token_id = len(tokenizer), 1, 1
    config.eos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    built = transformers.AutoModelForCausalLM.from_config(config).eval()
    return ChatModel(built, tokenizer, like.checkpoint)
