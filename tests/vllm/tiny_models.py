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
    """Save an Olmo 3 whose layers take turns: sliding window, full attention.

    Not a Gemma: its tied embeddings make a random one repeat a token whatever its KV cache holds.
    """
    import torch
    from transformers import Olmo3Config, Olmo3ForCausalLM

    torch.manual_seed(seed)
    config = Olmo3Config(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INITIALIZER_RANGE,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    Olmo3ForCausalLM(config).to(torch.float32).save_pretrained(folder)
    return folder
