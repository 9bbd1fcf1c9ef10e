"""Stacked LSTM language model (Hochreiter and Schmidhuber 1997; Gers et al. 2000), tokens -> logits.

Pure PyTorch: no files, no training code. Read it beside model_gpt.py: same order, same names. They differ in
Block (recurrence here, attention there) and so in the state that generation carries.

    model = LSTM(LSTMConfig())                   # the report's size: 131,054,848 parameters
    logits, loss = model(idx, targets)           # training
    logits, state = model.step(idx, state)       # generation, a few tokens at a time

Dimensions: B sequences, T tokens, E = n_embd channels, H = n_hidden units, V vocabulary.
"""
import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class LSTMConfig:
    """The LSTM's settings. Sizes default to the report's, switches to the tuned recipe's."""
    block_size: int = 256           # tokens per training window; the model itself has no limit
    vocab_size: int = 32000         # number of token ids; taken from the dataset
    n_layer: int = 10               # stacked LSTM layers
    n_embd: int = 512               # channels of the token embedding
    n_hidden: int = 1024            # units per layer
    dropout: float = 0.0            # dropout probability (embedding, each layer's output)
    residual: bool = True           # add a layer's input to its output, if as wide; report: False
    cudnn: bool = True              # use cuDNN's recurrence on CUDA; False: our own there too

    def __post_init__(self):
        for key in ("block_size", "vocab_size", "n_layer", "n_embd", "n_hidden"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1")
        if self.n_layer > 1000 or not 0 <= self.dropout < 1:
            raise ValueError("n_layer must be at most 1000, and dropout 0 or more and below 1")


def manual_recurrence(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    """One layer over T steps: the textbook equations. Generation uses it, except for a prompt on cuDNN.

    x (T, B, n_input), h and c (B, H) -> y (T, B, H) and the last h and c. The cell c is at least
    float32: it adds up hundreds of steps, and bfloat16's 8 bits would round small additions away.
    """
    xg, y = F.linear(x, weight_ih, bias_ih), []                         # all T steps in one matmul
    for gates in xg:                                                    # (B, 4H)
        i, f, g, o = (gates + F.linear(h, weight_hh, bias_hh)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()                    # forget some old, add some new
        h = (o.sigmoid() * c.tanh()).to(xg.dtype)                       # show some of it
        y.append(h)
    return torch.stack(y), h, c


class Scan(torch.autograd.Function):
    """The loop of manual_recurrence, in place, with backpropagation through time written by hand.

    Autograd would record a dozen nodes for each of T steps and add T separate (4H, H) products into dW_hh;
    here they are one matmul at the end. Inputs: xg (T, B, 4H), what x and both biases add to the gates;
    w_hh (4H, H); h0 and c0 (B, H). Returns h (T, B, H) and the last c (B, H).
    """

    @staticmethod
    def forward(ctx, xg, w_hh, h0, c0):
        T, (B, H) = len(xg), h0.shape
        gates = torch.empty_like(xg)                                    # (T, B, 4H), activated
        h = xg.new_empty(T + 1, B, H)                                   # h[t] is the state before step t
        c = c0.new_empty(T + 1, B, H)                                   # at least float32, see above
        h[0], c[0] = h0, c0
        times_w_hh = multiplier(w_hh, B)
        for t in range(T):                                              # only what depends on h[t] is here
            torch.add(xg[t], times_w_hh(h[t]), out=gates[t])
            i, f, g, o = gates[t].chunk(4, dim=1)                       # views: written in place
            gates[t, :, :2 * H].sigmoid_()                              # i and f, which lie side by side
            g.tanh_()
            o.sigmoid_()
            torch.addcmul(f * c[t], i, g, out=c[t + 1])
            torch.mul(o, c[t + 1].tanh(), out=h[t + 1])
        ctx.save_for_backward(gates, h, c, w_hh)
        return h[1:], c[T].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dh_out, dc):
        gates, h, c, w_hh = ctx.saved_tensors
        T, B, H = dh_out.shape
        i, f, g, o = gates.chunk(4, dim=2)
        tanh_c = c[1:].tanh()
        # Computed for all steps at once: the derivatives of c_t and h_t with respect to the gates before
        # activation (sigmoid' = s (1 - s), tanh' = 1 - tanh^2), and of h_t with respect to c_t.
        d = torch.empty_like(gates)                                     # the loop makes it d loss / d gate
        di, df, dg, do = d.chunk(4, dim=2)
        torch.mul(g, i * (1 - i), out=di)
        torch.mul(c[:-1], f * (1 - f), out=df)
        torch.mul(i, 1 - g * g, out=dg)
        torch.mul(tanh_c, o * (1 - o), out=do)
        dh_dc = o * (1 - tanh_c * tanh_c)
        dh = torch.zeros_like(dh_out[0])                                # what step t + 1 sends back to h_t
        times_w_hh = multiplier(w_hh.t(), B)
        for t in reversed(range(T)):
            dh = dh + dh_out[t]
            dc = torch.addcmul(dc, dh, dh_dc[t])
            d[t, :, :3 * H].view(B, 3, H).mul_(dc[:, None])             # i, f and g act through c_t
            do[t].mul_(dh)
            dc = dc * f[t]
            dh = times_w_hh(d[t])
        dw_hh = d.flatten(0, 1).t() @ h[:-1].flatten(0, 1)              # one matmul over all T * B rows
        return d, dw_hh, dh, dc


def scan_recurrence(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh):
    """Same result as manual_recurrence, through Scan. Training uses it where cuDNN does not run."""
    xg = F.linear(x, weight_ih, bias_ih + bias_hh)
    y, c = Scan.apply(xg, weight_hh.to(xg.dtype), h.to(xg.dtype), c)
    return y, y[-1], c


# cuDNN wants a layer's weights in one block of memory. Ours are not, and PyTorch would warn at each call.
warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")


def cudnn_recurrence(x, h, c, *weights):
    """Same result as manual_recurrence, in one call of NVIDIA's kernel (Appleyard et al. 2016), which keeps c
    in the same dtype as the rest. In float16, with one layer per call, PyTorch picks a kernel that keeps the
    weights on the chip for all steps (Diamos et al. 2016): more than twice as fast."""
    # cast here: under autocast, torch.lstm would use float16 even where bfloat16 was asked for
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    x, h, cell, *weights = (t.to(dtype) for t in (x, h[None], c[None], *weights))
    with torch.autocast("cuda", enabled=False):
        y, h, cell = torch.lstm(x, (h, cell), weights, has_biases=True, num_layers=1, dropout=0.0,
                                train=torch.is_grad_enabled(), bidirectional=False, batch_first=False)
    return y, h[0], cell[0].to(c.dtype)


def multiplier(weight, batch_size):
    """Return a function x (B, K) -> x weight^T (B, N), for a weight that is used many times. A CPU's kernel
    wants it in tiles. F.linear cuts them anew at every call, which takes longer than multiplying so few rows;
    oneDNN can do it once."""
    if weight.is_cpu and torch.backends.mkldnn.is_available() and (
            weight.dtype == torch.float32 or
            weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        tiles = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), batch_size)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, tiles, None, "none", [], "")
    return lambda x: F.linear(x, weight)


class Block(nn.Module):
    """One LSTM layer, with nn.LSTM's parameters (names, shapes, gate order) and equations."""

    def __init__(self, config, n_input):
        super().__init__()
        H, self.dropout = config.n_hidden, config.dropout
        self.residual = config.residual and n_input == H
        self.weight_ih = nn.Parameter(torch.empty(4 * H, n_input))
        self.weight_hh = nn.Parameter(torch.empty(4 * H, H))
        self.bias_ih = nn.Parameter(torch.empty(4 * H))
        self.bias_hh = nn.Parameter(torch.empty(4 * H))                 # redundant, but the report counts it

    def forward(self, x, h, c, recurrence):
        """x (T, B, n_input), state h and c (B, H) -> y (T, B, H) and the new h and c."""
        y, h, c = recurrence(x, h, c, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        y = F.dropout(y, self.dropout, self.training)
        # The residual path (He et al. 2015) lets the gradient reach every layer. Without it the gradient must
        # pass through the gates of all layers above, and ten layers learn little more than word frequencies.
        return (x + y if self.residual else y), h, c

    def extra_repr(self):
        shapes = [f"{name} {tuple(p.shape)}" for name, p in self.named_parameters()]
        return ", ".join([*shapes, f"residual={self.residual}"])


class LSTM(nn.Module):
    """Token embedding, n_layer LSTM layers, a linear head over the vocabulary (not tied)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.window = math.inf              # most tokens a state can hold: no limit
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        widths = [config.n_embd] + [config.n_hidden] * (config.n_layer - 1)
        self.blocks = nn.ModuleList(Block(config, n_input) for n_input in widths)
        self.lm_head = nn.Linear(config.n_hidden, config.vocab_size)
        bound = 1 / math.sqrt(config.n_hidden)          # nn.LSTM's; wte and lm_head keep PyTorch's own
        for p in self.blocks.parameters():
            nn.init.uniform_(p, -bound, bound)

    def _hidden(self, idx, state, recurrence):
        """idx (B, T) and the state before it -> the head's input (B, T, H), and each layer's new h and c."""
        if self.config.cudnn and idx.is_cuda and idx.size(1) > 1:
            recurrence = cudnn_recurrence       # not for one token: packing the weights would take longer
        # time first: the slice of one step is then one contiguous piece of memory
        x = F.dropout(self.wte(idx.t()), self.config.dropout, self.training)
        new = []
        for block, h, c in zip(self.blocks, *state):
            x, *after = block(x, h, c, recurrence)
            new.append(after)
        return x.transpose(0, 1), new

    def forward(self, idx, targets=None, reduction="mean"):
        """idx and targets (B, T) int64 -> (logits, loss). With targets: logits (B, T, V), detached, and the
        cross entropy in nats: the mean per token, or with reduction="none" the loss of each token (B, T).
        Without: logits (B, 1, V) for the last position, and None."""
        x, _ = self._hidden(idx, self.init_state(len(idx)), scan_recurrence)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        # in float32: a softmax over 32,000 terms loses too much in half precision
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        # detached: the logits are only to look at, training uses the loss
        return logits.detach(), loss if reduction == "mean" else loss.view_as(targets)

    def init_state(self, batch_size):
        """An empty state (h, c), each (n_layer, B, H), c at least float32: all that the model knows of its
        past. Zeroing both empties it again."""
        h = self.wte.weight.new_zeros(self.config.n_layer, batch_size, self.config.n_hidden)
        return h, torch.zeros_like(h, dtype=torch.promote_types(h.dtype, torch.float32))

    @torch.no_grad()
    def step(self, idx, state):
        """Consume idx (B, T), T >= 1 tokens -> logits (B, V) after the last; the state, written in place."""
        x, new = self._hidden(idx, state, manual_recurrence)
        for kept, layers in zip(state, zip(*new)):
            torch.stack(layers, out=kept)
        return self.lm_head(x[:, -1]), state

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Floating point operations to train on one token. Each weight in a matrix product costs 2 forward
        and 4 backward (Kaplan et al. 2020, section 2.1). The embedding, a lookup, and biases are left out."""
        weights = [p for n, p in self.named_parameters() if p.dim() == 2 and not n.startswith("wte")]
        return 6 * sum(p.numel() for p in weights)

    def summary(self):
        """The layers and their parameters, as the text of model_summary.txt."""
        rows = [(name, sum(p.numel() for p in part.parameters())) for name, part in self.named_children()]
        rows.append(("total", self.num_params()))
        return "\n".join([repr(self.config), repr(self), *(f"{n:<8}{k:>13,} parameters" for n, k in rows)])
