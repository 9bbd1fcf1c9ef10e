"""GPT-2-style Transformer language model (Radford et al. 2019), tokens -> logits.

Pure PyTorch: no files, no training code. Read it beside model_lstm.py: same order, same names. They differ in
Block (attention here, recurrence there) and so in the state that generation carries.

    model = GPT(GPTConfig())                     # the report's size: 134,367,744 parameters
    logits, loss = model(idx, targets)           # training
    logits, state = model.step(idx, state)       # generation, a few tokens at a time

Dimensions: B sequences, T tokens, S keys (of these T and those before; on a GPU also empty ones, masked),
C = n_embd channels, nh heads of hs = C / nh channels, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The Transformer's settings. Sizes default to the report's, switches to the tuned recipe's."""
    block_size: int = 256           # most tokens the model sees at once (its context)
    vocab_size: int = 32000         # number of token ids; taken from the dataset
    n_layer: int = 12               # Transformer blocks
    n_head: int = 12                # attention heads per block; must divide n_embd
    n_embd: int = 768               # channels
    dropout: float = 0.0            # dropout probability (embeddings, branches); 0 below one epoch
    fused_attention: bool = True    # scaled_dot_product_attention, where faster; False: by hand

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1")
        if self.n_layer > 1000 or not 0 <= self.dropout < 1:
            raise ValueError("n_layer must be at most 1000, and dropout 0 or more and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


def manual_attention(q, k, v, mask):
    """softmax(q k^T / sqrt(hs) + mask) v (Vaswani et al. 2017), written out.

    q (B, nh, T, hs); k and v (B, nh, S, hs); mask (T, S) from causal_mask. Returns (B, nh, T, hs).
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))        # (B, nh, T, S)
    return (scores + mask).softmax(dim=-1) @ v                      # each row: a weighted mean of the values


def fused_attention(q, k, v, mask):
    """Same result as manual_attention, by PyTorch's kernels. Most of them never store the (T, S) scores (Dao
    et al. 2022)."""
    # with AVX512-BF16 the kernel's backward is slow, but by hand the scores of long windows would fill memory
    if q.is_cpu and q.dtype == torch.bfloat16 and mask.size(1) <= 512:
        return manual_attention(q, k, v, mask)
    if mask.size(0) == mask.size(1):    # T = S, so no past: the kernel skips the masked half
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def causal_mask(positions, S, dtype):
    """The (T, S) mask added to the scores: -inf where key s comes after the query at positions[t], else 0."""
    future = torch.arange(S, device=positions.device) > positions[:, None]
    return torch.zeros(future.shape, dtype=dtype, device=future.device).masked_fill_(future, -math.inf)


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it, in n_head independent ways."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.attention = fused_attention if config.fused_attention else manual_attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)   # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, mask, positions, cache):
        """x (B, T, C) -> (B, T, C). cache (2, B, nh, S, hs) holds this block's keys and values; those of x
        are written into it at positions (T,). It is None where x has no past, as in training: then S = T."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is None:
            q, k, v = qkv                                                       # each (B, nh, T, hs)
            y = self.attention(q, k, v, mask)
        else:
            qkv = qkv.to(cache.dtype)
            k, v = cache.index_copy_(3, positions, qkv[1:])                     # each (B, nh, S, hs)
            y = self.attention(qkv[0], k, v, mask).to(x.dtype)
        y = y.transpose(1, 2).reshape(B, T, C)                                  # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Each token on its own: widen fourfold, a nonlinearity, narrow."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")        # as GPT-2 (Hendrycks and Gimpel 2016)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of x and added back to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, positions, cache):
        x = x + self.attn(self.ln_1(x), mask, positions, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a linear head over the vocabulary (not tied)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.window = config.block_size     # most tokens a state can hold: one per learned position
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's 0.02. The 2 * n_layer branches that add to the residual stream start smaller, so
                # that its variance at the end is the same for any depth.
                branch = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def _hidden(self, idx, state=None):
        """idx (B, T) -> the head's input (B, T, C). With a state, idx continues where the state ends."""
        T = S = idx.size(1)                     # S: how many keys x looks at
        caches, pos = [None] * len(self.blocks), 0
        if state is not None:
            *caches, pos = state
            S = keys_in_use(pos, T, self.config.block_size)
            caches = [cache[..., :S, :] for cache in caches]
        if max(S, T) > self.config.block_size:
            raise ValueError(f"{max(S, T)} tokens do not fit in block_size {self.config.block_size}")
        positions = pos + torch.arange(T, device=idx.device)
        x = F.dropout(self.wte(idx) + self.wpe(positions), self.config.dropout, self.training)
        mask = causal_mask(positions, S, x.dtype if state is None else caches[0].dtype)
        for block, cache in zip(self.blocks, caches):
            x = block(x, mask, positions, cache)
        return self.ln_f(x)

    def forward(self, idx, targets=None, reduction="mean"):
        """idx and targets (B, T) int64 -> (logits, loss). With targets: logits (B, T, V), detached, and the
        cross entropy in nats: the mean per token, or with reduction="none" the loss of each token (B, T).
        Without: logits (B, 1, V) for the last position, and None. Raises ValueError where T > block_size."""
        x = self._hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        # in float32: a softmax over 32,000 terms loses too much in half precision
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        # detached: the logits are only to look at, training uses the loss
        return logits.detach(), loss if reduction == "mean" else loss.view_as(targets)

    def init_state(self, batch_size):
        """An empty KV cache, allocated once: keys and values (2, B, nh, block_size, hs) for each layer, then
        how many tokens they hold, a 0-dim tensor on the device. Zeroing all of it empties it again."""
        c, w = self.config, self.wte.weight
        shape = (2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype = torch.promote_types(w.dtype, torch.float32) if w.is_cpu else w.dtype    # faster on a CPU
        caches = [torch.zeros(shape, dtype=dtype, device=w.device) for _ in self.blocks]
        return *caches, torch.zeros((), dtype=torch.int64, device=w.device)

    @torch.no_grad()
    def step(self, idx, state):
        """Consume idx (B, T), T >= 1 new tokens -> logits (B, V) after the last, and the state, written in
        place. Raises ValueError if T more do not fit (see `window`); on a GPU the caller must check this."""
        x = self._hidden(idx, state)
        state[-1].add_(idx.size(1))
        return self.lm_head(x[:, -1]), state

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating point operations to train on one token. Each weight in a matrix product costs 2 forward
        and 4 backward (Kaplan et al. 2020, section 2.1). Embeddings, which are looked up, and vectors are
        left out. Attention adds 12 * C * T per layer for the scores and the weighted sum, including the
        masked half (Chowdhery et al. 2022, PaLM, appendix B)."""
        c = self.config
        weights = [p for n, p in self.named_parameters() if p.dim() == 2 and not n.startswith(("wte", "wpe"))]
        return 6 * sum(p.numel() for p in weights) + 12 * c.n_layer * c.n_embd * c.block_size

    def summary(self):
        """The layers and their parameters, as the text of model_summary.txt."""
        rows = [(name, sum(p.numel() for p in part.parameters())) for name, part in self.named_children()]
        rows.append(("total", self.num_params()))
        return "\n".join([repr(self.config), repr(self), *(f"{n:<8}{k:>13,} parameters" for n, k in rows)])


def keys_in_use(pos, T, block_size):
    """How many cached keys a step of T tokens reads: on a CPU those in use, on a GPU all, the empty ones
    masked. On a GPU, reading pos would force a host sync, and a captured graph needs fixed shapes."""
    return int(pos) + T if pos.is_cpu else block_size
