"""Attention with a cache of keys: a prompt, then token by token, by one operator, beside torch's."""

import sys
import time

import torch

import bitblas

HEADS, HEADS_KV, DIM, PROMPT, TOKENS = 8, 2, 64, 256, 32


def by_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The same in float64, its mask written out."""
    queries, keys = q.shape[1], k.shape[1]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    heads = (x.double().transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True)
    return out.transpose(1, 2)


def main() -> int:
    """Show it; the exit status says whether everything was as it should be."""
    torch.manual_seed(0)
    # sizes that are not given are open: the same operator takes prompts and tokens, and caches of any length
    config = bitblas.FlashAttenConfig(heads=HEADS, heads_kv=HEADS_KV, dim=DIM, is_causal=True)
    began = time.perf_counter()
    op = bitblas.FlashAtten(config)
    print(f"kernels {op.origin} in {time.perf_counter() - began:.2f} s")

    length = PROMPT + TOKENS
    q = torch.randn(1, length, HEADS, DIM, dtype=torch.float16)
    k, v = torch.randn(2, 1, length, HEADS_KV, DIM, dtype=torch.float16)
    parts = [op(q[:, :PROMPT], k[:, :PROMPT], v[:, :PROMPT])]
    for end in range(PROMPT + 1, length + 1):  # a new query sees all keys until now, which are read where they lie
        parts.append(op(q[:, end - 1 : end], k[:, :end], v[:, :end]))
    expected = by_torch(q, k, v)
    error = float((torch.cat(parts, 1) - expected).abs().max() / expected.abs().max())
    at_once = float((op(q, k, v) - expected).abs().max() / expected.abs().max())
    right = max(error, at_once) <= 2e-3
    print(f"a prompt of {PROMPT} and {TOKENS} tokens: error {error:.1e}, all at once {at_once:.1e}: ", end="")
    print("right" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
