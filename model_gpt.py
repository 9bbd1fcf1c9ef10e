"""GPT-2-style Transformer language model (Radford et al. 2019), tokens -> logits.

Pure PyTorch: no files, no training code. Read it beside model_lstm.py: same order, same names; Block is where they differ,
attention here and recurrence there, and so is the state.

    model = GPT(GPTConfig())                     # the report's model: 134,367,744 parameters
    logits, loss = model(idx, targets)           # training
    logits, state = model.step(idx, state)       # generation, a few tokens at a time

Dimensions: B sequences, T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """Sizes of the model; the defaults are the report's."""
    block_size: int = 256           # most tokens the model sees at once (its context)
    vocab_size: int = 32000         # number of token ids; train.py takes it from the data
    n_layer: int = 12               # Transformer blocks
    n_head: int = 12                # attention heads per block; must divide n_embd
    n_embd: int = 768               # channels
    dropout: float = 0.0            # share of activations dropped in training; 0 is usual below one epoch
    fused_attention: bool = True    # scaled_dot_product_attention; False: the same sums by hand

    def __post_init__(self):
        for key, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{key} must be at least 1")
        if self.block_size > 2 ** 14:
            raise ValueError(f"block_size {self.block_size} is above 16384: the mask takes its square of bytes")
        if self.n_layer > 1000:
            raise ValueError(f"n_layer {self.n_layer} is above 1000")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be 0 or more and below 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


def on_host(t):
    """Can the program look at t's value without waiting for a device?"""
    return t.device.type == "cpu"


class CrossEntropy(torch.autograd.Function):
    """Cross entropy, in nats, of logits (N, V) against targets (N,) -> (N,): F.cross_entropy for a large vocabulary.

    In float32, since a softmax over 32,000 terms loses too much in half precision, but a few rows at a time: of the
    whole there are never more than the logits and their gradient, in the dtype they came in, where autograd would hold
    four or five copies, two of them in float32. The backward pass computes the softmax again from one number per row.
    """

    @staticmethod
    def forward(ctx, logits, targets):
        ctx.rows = 64 if on_host(logits) else 4096      # 8 MB of float32, which a CPU's cache holds; few launches on a GPU
        losses = torch.cat([F.cross_entropy(rows.float(), target, reduction="none")
                            for rows, target in zip(logits.split(ctx.rows), targets.split(ctx.rows))])      # (N,)
        log_sum = losses + logits.gather(1, targets[:, None])[:, 0]     # the softmax's denominator: loss = log_sum - logit
        ctx.save_for_backward(logits, targets, log_sum)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        logits, targets, log_sum = ctx.saved_tensors
        d = torch.empty_like(logits)
        for out, rows, target, ls, dl in zip(*(t.split(ctx.rows) for t in (d, logits, targets, log_sum, d_loss))):
            p = (rows.float() - ls[:, None]).exp_()                     # softmax
            p[torch.arange(len(p), device=p.device), target] -= 1
            out.copy_(p.mul_(dl[:, None]))
        return d, None


def manual_attention(q, k, v, mask):
    """Softmax(q k^T / sqrt(hs)) v (Vaswani et al. 2017), written out.

    q (B, nh, T, hs); k and v (B, nh, S, hs); mask (T, S), True where a query may look, None: anywhere.
    Returns (B, nh, T, hs).
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))        # (B, nh, T, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))           # a token must not see its future
    return scores.softmax(dim=-1) @ v                               # each row: a weighted mean of the values


def fused_attention(q, k, v, mask):
    """The same as manual_attention, without ever storing the (T, S) scores (Dao et al. 2022)."""
    if mask is not None and mask.size(0) == mask.size(1):      # the plain triangle: the kernel skips half of it
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class CausalSelfAttention(nn.Module):
    """Each token gathers from itself and the tokens before it, in n_head independent ways."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.attention = fused_attention if config.fused_attention else manual_attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)   # q, k and v in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, mask, cache=None, positions=None):
        """x (B, T, C) -> (B, T, C). cache (2, B, nh, S, hs): this block's keys and values, to which x's are added
        at `positions`; mask (T, S) says which of them x may look at."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is None:
            q, k, v = heads                                                     # each (B, nh, T, hs)
        else:
            heads = heads.to(cache.dtype)
            q, (k, v) = heads[0], cache.index_copy_(3, positions, heads[1:])    # k and v (B, nh, S, hs)
        y = self.attention(q, k, v, mask)
        y = y.transpose(1, 2).reshape(B, T, C).to(x.dtype)                      # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Each token on its own: widen four times, bend, narrow."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # GPT-2's tanh approximation of GELU (Hendrycks and Gimpel 2016)
        x = F.gelu(self.c_fc(x), approximate="tanh")
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of x and added back to it."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask, cache=None, positions=None):
        x = x + self.attn(self.ln_1(x), mask, cache, positions)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token and position embeddings, n_layer blocks, a linear head over the vocabulary (not tied)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        mask = torch.ones(config.block_size, config.block_size, dtype=torch.bool).tril()
        self.register_buffer("mask", mask, persistent=False)    # mask[i, j]: may token i look at token j?
        self._init_weights()

    def _init_weights(self):
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # GPT-2's 0.02; the 2 * n_layer branches that add to the residual stream are scaled so
                # that its variance does not grow with depth
                branch = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer) if branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def _hidden(self, idx, state=None):
        """idx (B, T) -> (B, T, C) just before the head. Without a state idx starts the text, with one it goes on: then x looks
        at S keys, those of the cache and its own."""
        T = S = idx.size(1)
        caches, positions = [None] * len(self.blocks), slice(T)
        if state is not None:
            caches, pos = state
            positions = pos + torch.arange(T, device=pos.device)
            # A GPU's queue would have to drain before we could look at pos, and a captured graph needs shapes that
            # never change: there x looks at the whole cache, its empty part masked. A CPU leaves that part out.
            S = int(pos) + T if on_host(pos) else self.config.block_size
            caches = caches[..., :S, :]
        if max(S, T) > self.config.block_size:
            raise ValueError(f"{max(S, T)} tokens do not fit in block_size {self.config.block_size}")
        x = self.wte(idx) + self.wpe.weight[positions]
        x = F.dropout(x, self.config.dropout, self.training)
        mask = None if T == 1 and state is not None and on_host(pos) else self.mask[positions, :S]
        for block, cache in zip(self.blocks, caches):
            x = block(x, mask, cache, positions)
        return self.ln_f(x)

    def forward(self, idx, targets=None):
        """idx and targets (B, T) int64, T <= block_size (else ValueError) -> (logits, loss).

        With targets: logits (B, T, V) and the mean cross entropy in nats per token.
        Without: logits (B, 1, V) for the last position, and None.
        """
        x = self._hidden(idx)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, CrossEntropy.apply(logits.flatten(0, 1), targets.flatten()).mean()

    def init_state(self, batch_size):
        """An empty KV cache, allocated once: keys and values (n_layer, 2, B, nh, block_size, hs), and how many tokens
        it holds, a number on the device. All zeros: zeroing a state empties it."""
        c, w = self.config, self.wte.weight
        shape = (c.n_layer, 2, batch_size, c.n_head, c.block_size, c.n_embd // c.n_head)
        dtype = torch.promote_types(w.dtype, torch.float32) if on_host(w) else w.dtype     # CPU kernels: faster so
        return torch.zeros(shape, dtype=dtype, device=w.device), torch.zeros((), dtype=torch.int64, device=w.device)

    @torch.no_grad()
    def step(self, idx, state):
        """Consume idx (B, T), T >= 1 new tokens; return logits (B, V) after the last, and the state, written in place.

        ValueError when it cannot hold T more tokens (see `window`); on a GPU only the caller can know.
        """
        x = self._hidden(idx, state)
        state[1].add_(idx.size(1))
        return self.lm_head(x[:, -1]), state

    @property
    def window(self):
        """Most tokens one state can hold: there are only block_size learned positions."""
        return self.config.block_size

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating point operations to train on one token, forward and backward.

        6 per weight that multiplies (all but the embeddings, which are looked up, and the vectors): 2 in the
        forward pass, 4 in the backward; and 12 * C * T per layer for the scores and the weighted sum, the
        masked half included (Chowdhery et al. 2022, PaLM, appendix B).
        """
        c = self.config
        weights = [p for p in self.parameters() if p.dim() == 2 and p is not self.wte.weight and p is not self.wpe.weight]
        return 6 * sum(p.numel() for p in weights) + 12 * c.n_layer * c.n_embd * c.block_size

    def summary(self):
        """The layers and their parameters, as the text of model_summary.txt."""
        rows = [(name, sum(p.numel() for p in part.parameters())) for name, part in self.named_children()]
        rows.append(("total", self.num_params()))
        return "\n".join([repr(self.config), repr(self), *(f"{n:<8}{k:>13,} parameters" for n, k in rows)])
