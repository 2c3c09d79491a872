"""Small random models that vLLM runs on a CPU. No tokenizer, no download.

Weights are drawn with a standard deviation of 0.08: with the usual 0.02 a model of this size says the same
whatever its KV cache holds, and a wrong load goes unseen.
"""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 4096
INITIALIZER_RANGE = 0.08
MAX_TOKENS = 4096


def save_llama(folder: Path, seed: int, *, layers: int = 4, hidden: int = 256) -> Path:
    """Save a Llama with full attention."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder


def save_hybrid(folder: Path, seed: int, window: int = 64) -> Path:
    """Save a Gemma 3 whose layers take turns: sliding window, full attention."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        query_pre_attn_scalar=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INITIALIZER_RANGE,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Gemma3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
