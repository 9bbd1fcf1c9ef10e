"""Proves the claims of the other files: `python -m pytest test_all.py`. No network, no GPU needed, deterministic."""
import copy
import fcntl
import functools
import gc
import http.server
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from hypothesis import HealthCheck, given, settings, strategies as st

import bench
import data
import model_gpt
import sample
import train
from data import UserError
from model_gpt import GPT, CrossEntropy, GPTConfig, fused_attention, manual_attention
from model_lstm import LSTM, Block, LSTMConfig, Scan, manual_recurrence, multiplier, plain_recurrence
from sample import Int8Weight

HERE = Path(__file__).parent
TINY = {"gpt": {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16},
        "lstm": {"block_size": 16, "vocab_size": 40, "n_layer": 3, "n_embd": 12, "n_hidden": 20}}
# the same as command line keys, for runs on the tiny dataset below
TINY_KEYS = {"gpt": ["--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=32"],
             "lstm": ["--block_size=32", "--n_layer=2", "--n_embd=32", "--n_hidden=32"]}
BOTH = pytest.mark.parametrize("name", ["gpt", "lstm"])
# LONG=1 python -m pytest test_all.py: thirty kills instead of three, also under torchrun, a thousand mutations instead of
# a few dozen, and a source of 5 GB. About an hour.
LONG = bool(os.environ.get("LONG"))


def make(name, seed=0, **changes):
    """A tiny model in eval mode, its weights large enough that outputs differ clearly."""
    torch.manual_seed(seed)
    model_class, config_class, _ = train.MODELS[name]
    model = model_class(config_class(**{**TINY[name], **changes})).eval()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    return model


def tokens(*shape, vocab=40, seed=1):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def command(script, *keys, cwd, env=None, timeout=120):
    """Run a script as a user types it."""
    return subprocess.run([sys.executable, str(HERE / script), *keys], cwd=cwd, env={**os.environ, **(env or {})},
                          capture_output=True, text=True, timeout=timeout)


def refused(result):
    """Assert that a command ended with one clear line and no traceback; return the line."""
    assert result.returncode in (1, 2), result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/tiny prepared from 400 articles, and a short trained run of each model."""
    folder = tmp_path_factory.mktemp("work")
    write_jsonl(folder / "tiny.jsonl", data.write_mini(7, 400))
    back = os.getcwd()
    os.chdir(folder)
    try:
        data.main(["--dataset=tiny", "--source=tiny.jsonl", "--tokenizer=train", "--vocab_size=512"])
        for name in TINY_KEYS:
            train.main([f"--model={name}", "--dataset=tiny", *TINY_KEYS[name], "--max_iters=30", "--batch_size=8",
                        "--eval_interval=10", "--eval_iters=2", "--learning_rate=5e-3", "--warmup=5"])
    finally:
        os.chdir(back)
    return folder


@pytest.fixture
def here(work, monkeypatch):
    """The same folder, as the current one."""
    monkeypatch.chdir(work)
    return work


def write_jsonl(path, texts, **meta):
    path.write_text("".join(json.dumps({"text": t, "meta": {"quality": "HIGH", **meta}}, ensure_ascii=False) + "\n"
                            for t in texts), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- models

def test_parameter_counts_are_the_reports():
    with torch.device("meta"):
        gpt, lstm = GPT(GPTConfig()), LSTM(LSTMConfig())
    assert gpt.num_params() == 134_367_744 and "134,367,744" in gpt.summary()
    assert lstm.num_params() == 131_054_848 and "131,054,848" in lstm.summary()


@BOTH
def test_the_face_of_both_models(name):
    model = make(name)
    idx = tokens(3, 16)
    logits, loss = model(idx[:, :-1], idx[:, 1:])
    assert logits.shape == (3, 15, 40) and logits.dtype == torch.float32
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
    assert torch.allclose(loss, expected)
    last, none = model(idx[:, :-1])
    assert none is None and torch.allclose(last, logits[:, -1:], atol=1e-6)
    assert model.num_params() == sum(p.numel() for p in model.parameters())


def test_gpt_equals_hugging_face():
    """Same weights, zero biases where ours has none: same logits, same gradient of every parameter."""
    from transformers import GPT2Config, GPT2LMHeadModel
    ours, c = make("gpt"), TINY["gpt"]
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c["vocab_size"], n_positions=c["block_size"], n_embd=c["n_embd"],
                                        n_layer=c["n_layer"], n_head=c["n_head"], tie_word_embeddings=False,
                                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).eval()
    pairs = {}      # our name -> theirs; theirs holds Linear weights transposed (Conv1D)
    for n, _ in ours.named_parameters():
        pairs[n] = n if n.startswith("lm_head") else "transformer." + n.replace("blocks.", "h.")
    params = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in params.values():
            p.zero_()
        for n, p in ours.named_parameters():
            conv = n.startswith("blocks") and p.dim() == 2
            params[pairs[n]].copy_(p.t() if conv else p)
    idx = tokens(2, 17)
    logits, loss = ours(idx[:, :-1], idx[:, 1:])
    expected = theirs(idx[:, :-1]).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    loss.backward()
    nn.functional.cross_entropy(expected.flatten(0, 1), idx[:, 1:].flatten()).backward()
    for n, p in ours.named_parameters():
        g = params[pairs[n]].grad
        g = g.t() if n.startswith("blocks") and p.dim() == 2 else g
        assert torch.allclose(p.grad, g, atol=1e-4, rtol=1e-3), n


def test_lstm_equals_nn_lstm():
    """The plain stack against nn.LSTM: outputs, final state, and every gradient, the input's and the state's too."""
    torch.manual_seed(0)
    T, B, E, H, L = 9, 3, 5, 7, 3
    theirs = nn.LSTM(E, H, L).double()
    ours = LSTM(LSTMConfig(n_embd=E, n_hidden=H, n_layer=L, residual=False, vocab_size=11)).double()
    ours.blocks.load_state_dict({f"{k}.{n}": getattr(theirs, f"{n}_l{k}") for k in range(L)
                                 for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
    x = torch.randn(T, B, E, dtype=torch.float64, requires_grad=True)
    state = [torch.randn(L, B, H, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    y, hs, cs = x, [], []
    for block, h, c in zip(ours.blocks, *state):
        y, h, c = block(y, h, c, manual_recurrence)
        hs.append(h), cs.append(c)
    expected, (h, c) = theirs(x, tuple(state))
    weights = [torch.randn_like(t) for t in (expected, h, c)]       # so that all three outputs send gradients back
    got = torch.autograd.grad(sum((a * w).sum() for a, w in zip((y, torch.stack(hs), torch.stack(cs)), weights)),
                              [x, *state, *ours.blocks.parameters()])
    want = torch.autograd.grad(sum((a * w).sum() for a, w in zip((expected, h, c), weights)),
                               [x, *state, *theirs.parameters()])
    for a, b in zip((y, torch.stack(hs), torch.stack(cs), *got), (expected, h, c, *want)):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plain_recurrence_equals_the_scan(dtype):
    """The textbook equations of generation against the in-place ones of training."""
    torch.manual_seed(0)
    T, B, E, H = 9, 3, 5, 7
    block = Block(LSTMConfig(n_hidden=H), E).to(dtype)
    for p in block.parameters():
        nn.init.normal_(p)
    x, h, c = torch.randn(T, B, E).to(dtype), torch.randn(B, H).to(dtype), torch.randn(B, H).to(torch.promote_types(dtype, torch.float32))
    for a, b in zip(*(f(x, h, c, *block.parameters()) for f in (plain_recurrence, manual_recurrence))):
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-12 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_pytorchs_and_keeps_nothing_but_the_logits(dtype):
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(150, 40)).to(dtype).requires_grad_(), torch.randint(40, (150,))  # 64 + 64 + 22 rows
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        losses = CrossEntropy.apply(logits, targets)
    assert torch.allclose(losses, nn.functional.cross_entropy(logits.float(), targets, reduction="none"), atol=1e-6)
    loss, expected = losses.mean(), nn.functional.cross_entropy(logits.float(), targets)
    assert loss.dtype == torch.float32 and torch.allclose(loss, expected, atol=1e-6)
    assert [t.shape for t in kept if t.dim() == 2] == [logits.shape] and sum(t.numel() for t in kept) == 150 * 42
    for scale in (1.0, 1024.0):     # GradScaler's
        got, want = (torch.autograd.grad(scale * x, logits, retain_graph=True)[0] for x in (loss, expected))
        assert got.dtype == dtype and torch.allclose(got, want, atol=1e-7 * scale, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_tiled_weight_multiplies_as_before(dtype):
    torch.manual_seed(0)
    for w in (torch.randn(24, 10).to(dtype), torch.randn(10, 24).to(dtype).t()):
        for rows in (1, 5):
            x = torch.randn(rows, 10).to(dtype)
            assert torch.allclose(multiplier(w, 5)(x), x @ w.t(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


def test_scan_gradcheck():
    torch.manual_seed(0)
    T, B, H = 4, 2, 3
    args = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(T, B, 4 * H), (4 * H, H), (B, H), (B, H)]]
    assert torch.autograd.gradcheck(Scan.apply, args)


def test_lstm_residual_adds_the_identity_and_no_parameter():
    plain, skip = make("lstm", residual=False), make("lstm", residual=True)
    assert plain.num_params() == skip.num_params()
    x, state = torch.randn(4, 2, 20), torch.zeros(2, 20)
    for recurrence in (manual_recurrence, plain_recurrence):
        assert torch.allclose(skip.blocks[1](x, state, state, recurrence)[0], x + plain.blocks[1](x, state, state, recurrence)[0])
    assert not skip.blocks[0].residual      # 12 channels in, 20 out: no identity there


@pytest.mark.parametrize("T, S", [(8, 8), (1, 8), (3, 8)])
def test_manual_equals_fused_attention(T, S):
    torch.manual_seed(0)
    q = torch.randn(2, 3, T, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 3, S, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.ones(S, S, dtype=torch.bool).tril()[S - T:]
    a, b = (f(q, k, v, mask) for f in (manual_attention, fused_attention))
    assert torch.allclose(a, b)
    w = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad((a * w).sum(), (q, k, v)), torch.autograd.grad((b * w).sum(), (q, k, v))):
        assert torch.allclose(x, y)


@BOTH
@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=16))
def test_step_in_any_chunks_equals_forward(name, chunks):
    model, idx = make(name), tokens(2, 16)
    state, t = model.init_state(2), 0
    for chunk in chunks:
        if t == 16:
            break
        logits, state = model.step(idx[:, t:t + chunk], state)
        t = min(t + chunk, 16)
        assert logits.shape == (2, 40)
        assert torch.allclose(logits, model(idx[:, :t])[0][:, -1], atol=1e-4)


@BOTH
def test_a_later_token_never_changes_an_earlier_logit(name):
    model, idx = make(name), tokens(1, 16)
    before = model(idx, idx)[0]
    for j in (5, 15):
        changed = idx.clone()
        changed[0, j] = (changed[0, j] + 1) % 40
        after = model(changed, idx)[0]
        assert torch.equal(before[:, :j], after[:, :j])
        assert not torch.allclose(before[:, j], after[:, j])


def test_gpt_flops_are_those_of_its_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode
    model = make("gpt", fused_attention=False)
    with FlopCounterMode(display=False) as counter:
        model(tokens(1, 16), tokens(1, 16))[1].backward()
    assert counter.get_total_flops() == 16 * model.flops_per_token()


@BOTH
def test_bfloat16_stays_close_to_float32(name):
    model, idx = make(name), tokens(4, 17)
    exact = model(idx[:, :-1], idx[:, 1:])[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
    loss.backward()
    assert loss.dtype == torch.float32 and abs(loss - exact) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_compiled_equals_eager():
    """Through torch.compile's tracing, without its code generator, which needs a compiler on the machine."""
    model, idx = make("gpt"), tokens(2, 17)
    compiled = torch.compile(model, backend="aot_eager")
    losses = [m(idx[:, :-1], idx[:, 1:])[1] for m in (model, compiled)]
    grads = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in losses]
    assert torch.allclose(*losses) and torch.allclose(*grads, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnn_equals_the_scan(dtype):
    """The two recurrences on a GPU, forward and backward, under autocast as train.py runs them."""
    torch.backends.cudnn.allow_tf32 = False
    losses, grads = [], []
    for cudnn in (True, False):
        model, idx = make("lstm", cudnn=cudnn).cuda(), tokens(4, 17).cuda()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            losses.append(model(idx[:, :-1], idx[:, 1:])[1])
        grads.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert torch.allclose(*losses, atol=tolerance)
    for a, b in zip(*grads):
        assert (a - b).norm() <= tolerance * (1 + a.norm())


@BOTH
def test_overfits_a_tiny_batch(name):
    model, idx = make(name).train(), tokens(2, 17)
    for p in model.parameters():
        p.data.mul_(0.25)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05      # it began near ln 40 = 3.7


@pytest.mark.parametrize("name, changes", [("gpt", {"n_head": 5}), ("gpt", {"n_layer": 0}), ("lstm", {"n_hidden": 0}),
                                           ("lstm", {"dropout": 1.0})])
def test_impossible_sizes_are_refused(name, changes):
    with pytest.raises(ValueError):
        train.MODELS[name][1](**changes)


# ---------------------------------------------------------------------------------------------- generation

def continuation(model, idx, n, mode, **settings):
    """(B, n) tokens that generate draws, always with the same seed."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack(list(sample.generate(model, idx, n, generator=generator, mode=mode, **settings)), 1)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"temperature": 0.0}])
def test_all_ways_to_generate_emit_the_same_tokens(name, settings, monkeypatch):
    """naive, cached, and graph, past block_size (16). Without CUDA the graph is played by the captured function itself, the
    GPT's fixed shapes of a device by hiding that a CPU's memory can be read."""
    model, idx = make(name), tokens(2, 5)
    naive = continuation(model, idx, 50, "naive", **settings)
    assert naive.shape == (2, 50)
    assert torch.equal(naive, continuation(model, idx, 50, "cached", **settings))
    monkeypatch.setattr(model_gpt, "on_host", lambda t: False)
    monkeypatch.setattr(sample, "capture", lambda function: function)
    assert torch.equal(naive, continuation(model, idx, 50, "graph", **settings))


@BOTH
def test_a_decode_step_never_looks_at_a_value_on_the_device(name):
    """What makes it fit for a CUDA graph. Tensors on the meta device have no values: a look at one would raise."""
    with torch.device("meta"):
        model, settings = make(name), {"top_k": 5, "top_p": 0.9}
        state, newest = model.init_state(3), torch.zeros(3, 1, dtype=torch.int64)
        logits, new = model.step(newest, state)
        assert all(a is b for a, b in zip(state, new))      # written in place, where the next replay reads it
        assert sample.pick(logits, 0.8, **settings, uniform=torch.rand(3, 1)).shape == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("batch", [1, 3])
@BOTH
def test_a_cuda_graph_emits_the_tokens_of_the_other_ways(name, batch):
    model, idx = make(name).cuda(), tokens(batch, 5).cuda()
    runs = [continuation(model, idx, 50, mode).cpu() for mode in ("graph", "cached", "naive")]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0], continuation(model, idx, 50, "graph").cpu())


@BOTH
def test_a_row_of_a_batch_is_generated_as_if_alone(name):
    model, idx = make(name), tokens(3, 5)
    together = continuation(model, idx, 30, "cached", temperature=0.0)
    for row in range(3):
        assert torch.equal(together[row:row + 1], continuation(model, idx[row:row + 1], 30, "cached", temperature=0.0))


@BOTH
@pytest.mark.parametrize("round_activations", [True, False])      # as on a CPU, as on MPS
def test_int8_weights_are_the_floats_rounded_per_output_channel(name, round_activations, monkeypatch):
    sizes = {"vocab_size": 64, "n_embd": 32, **({"n_hidden": 32} if name == "lstm" else {})}     # tiles of 32, as MPS needs
    model, rounded, idx = make(name, **sizes), make(name, **sizes), tokens(2, 16)
    weights = {f"{n}.{k}": p for n, m in rounded.named_modules() for k, p in m.named_parameters(recurse=False)
               if p.dim() == 2 and not isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for w in weights.values():
            scale = w.abs().amax(1, keepdim=True) / 127
            w.copy_((w / scale).round() * scale)
    if not round_activations:
        monkeypatch.setattr(sample, "Int8Weight", lambda w, round_activations: Int8Weight(w.bfloat16(), False))
    sample.to_dtype(model, torch.int8)
    assert sum(isinstance(w, Int8Weight) for m in model.modules() for w in vars(m).values()) == len(weights) > 5
    with torch.no_grad():
        if not round_activations:       # the kernel multiplies bfloat16 on a CPU
            model.to(torch.bfloat16), rounded.to(torch.bfloat16)
        got, exact = (m.step(idx, m.init_state(2))[0].float() for m in (model, rounded))
    assert (got - exact).norm() < 0.05 * exact.norm() and not torch.equal(got, exact)
    assert torch.equal(continuation(model, idx, 20, "cached"), continuation(model, idx, 20, "cached"))


def test_int8_is_refused_on_cuda_and_mps_generates_in_half_precision():
    with pytest.raises(UserError, match="for cpu and mps"):
        train.choose_dtype("int8", torch.device("cuda"))
    assert train.choose_dtype("auto", torch.device("mps"), training=False)[0] == torch.float16
    assert train.choose_dtype("auto", torch.device("mps"))[0] == torch.float32
    with pytest.raises(TypeError, match="no more than F.linear"):
        torch.mm(torch.ones(2, 2), Int8Weight(torch.ones(2, 2), True))


def test_onednn_is_back_after_each_token():
    stream = sample.generate(make("gpt"), tokens(1, 5), 3)
    for _ in stream:
        assert torch.backends.mkldnn.enabled


@BOTH
def test_generation_past_block_size_is_the_models_own(name):
    """Greedy, beside a reference that knows nothing of caches: the newest half of the window is kept when it is full."""
    model, ids = make(name), tokens(1, 5)[0].tolist()
    got = [int(t) for t in sample.generate(model, torch.tensor([ids]), 40, temperature=0)]
    first = 0
    for token in got:
        if name == "gpt" and len(ids) - first > 16:
            first = len(ids) - 8
        assert token == model(torch.tensor([ids[first:]]))[0][0, -1].argmax()
        ids.append(token)


def test_gpt_state_refuses_more_than_block_size():
    model = make("gpt")
    _, state = model.step(tokens(1, 16), model.init_state(1))
    with pytest.raises(ValueError, match="block_size"):
        model.step(tokens(1, 1), state)
    with pytest.raises(ValueError, match="block_size"):
        model(tokens(1, 17))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.5])
def test_samples_follow_softmax_of_logits_over_temperature(temperature):
    logits = torch.linspace(-2, 2, 20)
    n = 40_000
    drawn = sample.pick(logits.expand(n, 20), temperature, uniform=torch.rand(n, 1, generator=torch.Generator().manual_seed(0)))
    expected = n * (logits / temperature).softmax(0)
    chi_square = ((torch.bincount(drawn, minlength=20) - expected) ** 2 / expected).sum()
    assert chi_square < 43.8        # 19 degrees of freedom, p = 0.001


def test_a_draw_never_leaves_the_vocabulary():
    for logits in (torch.zeros(1, 7), torch.full((1, 7), float("nan"))):
        for uniform in (0.0, 1 - 2 ** -24, 1.0):
            assert 0 <= sample.pick(logits, uniform=torch.tensor([[uniform]])).item() < 7


def test_weights_that_are_not_finite_are_not_sampled_from(here):
    checkpoint = torch.load("outputs/transformer/ckpt.pt", weights_only=True)
    checkpoint["model"]["ln_f.weight"][3] = float("nan")
    Path("out/nan").mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, "out/nan/ckpt.pt")
    with pytest.raises(UserError, match="not finite"):
        sample.main(["--out_dir=out/nan"])


def test_temperature_zero_is_greedy_and_top_k_top_p_cut():
    torch.manual_seed(0)
    logits = torch.randn(1, 50)
    assert sample.pick(logits, 0) == logits.argmax()
    many = logits.expand(2000, 50)
    assert set(sample.pick(many, 1.0, top_k=3).tolist()) == set(logits[0].topk(3).indices.tolist())
    p, order = logits[0].softmax(0).sort(descending=True)
    kept = order[:int((p.cumsum(0) < 0.5).sum()) + 1]       # the fewest likeliest that reach a half
    assert set(sample.pick(many, 1.0, top_p=0.5).tolist()) == set(kept.tolist())


def test_streamed_text_never_breaks_a_character(work):
    tok = data.load_tokenizer(str(work / "data/tiny/tokenizer"))
    text = "Zażółć gęślą jaźń 🦊🇵🇱 — ☃ " * 9 + "🦊"
    for text in (text, "日本語" * 60, "koniec \ufffd"):
        stream = sample.TextStream(tok, [tok.bos_token_id])
        pieces = [stream.push(i) for i in data.encode(tok, [text])[0]]
        assert "".join(pieces) + stream.flush() == text and not any("\ufffd" in p for p in pieces)
        assert len([p for p in pieces if p]) > 0.1 * len(text)      # it did come in pieces


# ---------------------------------------------------------------------------------------------- data

def test_mini_is_reproducible_varied_and_grammatical():
    articles = list(data.write_mini(1, 2000))
    assert articles == list(data.write_mini(1, 2000)) != list(data.write_mini(2, 2000))
    assert len(set(articles)) == 2000
    text = "\n".join(articles)
    assert len(set(re.findall(r"\w+", text))) > 3000
    for wrong in (r"\bz S[tzpk]", r"\bW \d+ roku mieszkało tam \d*[02-9]?[234] osoby", r"\burodził się \w+ka ",
                  r"(?<!1)[234] (lat|osób|kilometrów|okazów|domów)\b", r"[05-9] (lata|osoby|kilometry|okazy|domy)\b"):
        assert not re.search(wrong, text), re.search(wrong, text)
    assert data.count(1, "rok", "lata", "lat") == "1 rok" and data.count(1022, "rok", "lata", "lat") == "1 022 lata"


def test_splits_are_disjoint_whole_and_reproducible(tmp_path, monkeypatch):
    """Identical documents never straddle splits; the number of workers and the order of documents do not matter."""
    monkeypatch.chdir(tmp_path)
    texts = [f"Dokument numer {i}, zawsze inny." for i in range(300)]
    write_jsonl(tmp_path / "a.jsonl", texts + texts[:50])
    keys = ["--source=a.jsonl", "--tokenizer=train", "--vocab_size=512"]
    metas = []
    for name, workers in (("one", "1"), ("two", "2")):
        assert command("data.py", f"--dataset={name}", *keys, cwd=tmp_path, env={"RAYON_NUM_THREADS": workers}).returncode == 0
        meta, splits = data.load_dataset(name)
        metas.append(meta["splits"])
    assert metas[0] == metas[1]
    tok = data.load_tokenizer("data/one/tokenizer")
    documents = {s: [d.strip() for d in tok.decode(t.astype(np.int64)).replace("</s>", "").split("<s>") if d.strip()]
                 for s, t in splits.items()}
    assert {s: len(d) for s, d in documents.items()} == {"train": 240, "val": 30, "test": 30}
    assert sorted(sum(documents.values(), [])) == sorted(texts)
    hashes = np.random.default_rng(0).integers(2 ** 63, size=1000, dtype=np.uint64)
    order = np.random.default_rng(1).permutation(1000)
    assert (data.assign_splits(hashes)[order] == data.assign_splits(hashes[order])).all()


def test_every_document_is_bos_text_eos_and_every_id_is_in_the_vocabulary(here):
    meta, splits = data.load_dataset("tiny")
    tok = data.load_tokenizer("data/tiny/tokenizer")
    assert len(tok) == meta["vocab_size"] == 512
    total = 0
    for split, t in splits.items():
        assert t.dtype == np.uint16 and t.max() < 512
        starts, ends = np.flatnonzero(t == tok.bos_token_id), np.flatnonzero(t == tok.eos_token_id)
        assert len(starts) == meta["splits"][split]["documents"] and starts[0] == 0 and ends[-1] == len(t) - 1
        assert (starts[1:] == ends[:-1] + 1).all()
        total += len(starts)
    assert total == 400


def test_a_tokenizer_of_32000_entries_gives_polish_text_back():
    rng = np.random.default_rng(0)
    syllables = [a + b for a in "b c ć d f g h j k l ł m n ń p r s ś t w z ź ż cz sz rz".split() for b in "aeiouyąęó"]
    words = ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(40_000)] * 3
    tok = data.train_tokenizer((" ".join(words[i:i + 100]) for i in range(0, len(words), 100)), 32_000)
    assert len(tok) == 32_000
    for text in ["Zażółć gęślą jaźń.", "ĄĆĘŁŃÓŚŹŻ ąćęłńóśźż", "emoji 🦊 i flaga 🇵🇱", "  dwie spacje\ti tabulator \n\nkoniec ",
                 " ".join(words[:500]), "literalne <s> i </s> oraz <unk>", "日本語 עברית \u200f", "NUL\x00w środku", "1234,5"]:
        ids = np.array(data.encode(tok, [text])[0], dtype="<u2")
        assert tok.decode(ids.astype(np.int64)) == text
        assert not {tok.bos_token_id, tok.eos_token_id, tok.unk_token_id} & set(ids.tolist())
    assert ids.itemsize == 2 and max(max(r) for r in data.encode(tok, words[:5000])) > 31_000


def test_batches_are_a_permutation_and_replay():
    n, batch = 50, 8
    seen = [w for step in range(25) for w in data.train_windows(n, step, batch, seed=5)]
    for epoch in range(4):      # 25 * 8 = 4 * 50
        assert sorted(seen[epoch * n:(epoch + 1) * n]) == list(range(n))
    assert seen[:n] != seen[n:2 * n] and seen[:n] != [w for s in range(7) for w in data.train_windows(n, s, batch, 6)][:n]
    assert data.train_windows(n, 17, batch, 5) == seen[17 * batch:18 * batch]
    parts = [data.train_windows(n, 17, batch, 5, rank, 4) for rank in range(4)]
    assert sum(parts, []) == seen[17 * batch:18 * batch]
    idx, targets = data.get_batch(np.arange(1000, dtype=np.uint16), [0, 3], 20, "cpu")
    assert idx.tolist() == [list(range(20)), list(range(60, 80))] and torch.equal(targets, idx + 1)


class PlwikiServer:
    """SpeakLeash's layout on 127.0.0.1: speakleash.json, plwiki.manifest, plwiki.jsonl.zst."""

    def __init__(self, folder):
        import zstandard
        lines = "".join(json.dumps({"text": f"{q} artykuł {i}. " + "Treść hasła. " * 9, "meta": {"quality": q, "title": str(i)}},
                                   ensure_ascii=False) + "\n" for i in range(60) for q in ("HIGH", "MEDIUM", "LOW"))
        packed = zstandard.ZstdCompressor().compress(lines.encode())
        (folder / "plwiki.jsonl.zst").write_bytes(packed)
        (folder / "speakleash.json").write_text(json.dumps([{"name": "plwiki"}]))
        (folder / "plwiki.manifest").write_text(json.dumps({"stats": {"documents": 180}, "file_size": len(packed)}))
        handler = functools.partial(QuietHandler, directory=str(folder))
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class HubHandler(QuietHandler):
    """As much of the Hugging Face hub as a tokenizer needs: /OWNER/NAME/resolve/main/FILE out of a folder."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        file = Path(self.directory) / self.path.rsplit("/", 1)[1]
        found = "/resolve/main/" in self.path and file.is_file()
        content = file.read_bytes() if found else b"{}"
        self.send_response(200 if found or self.path == "/" else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Error-Code", "" if found else "EntryNotFound")
        self.send_header("ETag", f'"{len(content):040x}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def test_a_hub_tokenizer_is_fetched_once_and_then_found_offline(work, tmp_path):
    handler = functools.partial(HubHandler, directory=str(work / "data/tiny/tokenizer"))
    keys = ["--dataset=tiny", f"--source={work}/tiny.jsonl"]        # the default tokenizer, speakleash/Bielik-4.5B-v3
    env = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}    # other tests set the last
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = command("data.py", *keys, cwd=tmp_path, env=env)
        server.shutdown()
    assert result.returncode == 0, result.stderr
    first = json.loads((tmp_path / "data/tiny/meta.json").read_text())
    assert first["tokenizer"] == "speakleash/Bielik-4.5B-v3" and first["vocab_size"] == 512
    assert command("data.py", *keys, cwd=tmp_path, env=env).returncode == 0        # the server is gone
    assert json.loads((tmp_path / "data/tiny/meta.json").read_text()) == first


def test_plwiki_through_the_real_speakleash_client(work, tmp_path, monkeypatch):
    from speakleash.config_loader import ConfigLoader
    monkeypatch.chdir(tmp_path)
    (tmp_path / "served").mkdir()
    with PlwikiServer(tmp_path / "served") as server:
        monkeypatch.setattr(ConfigLoader, "load_config", staticmethod(lambda: {"url_datasets_text_pl": server.url}))
        data.main(["--dataset=plwiki", f"--tokenizer={work}/data/tiny/tokenizer", "--n_docs=50"])
    meta, splits = data.load_dataset("plwiki")
    assert [meta["splits"][s]["documents"] for s in data.SPLITS] == [40, 5, 5]
    tok = data.load_tokenizer("data/plwiki/tokenizer")
    text = " ".join(tok.decode(t.astype(np.int64)) for t in splits.values())
    assert text.count("HIGH artykuł") == 50 and "LOW" not in text and "MEDIUM" not in text


def test_unreachable_hub_and_speakleash_are_told_in_one_line_in_time(work, tmp_path):
    """A server that accepts and never answers is the worst case: no refusal, no time limit of the clients' own."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.time()
        line = refused(command("data.py", cwd=tmp_path, env={"HF_ENDPOINT": url, "HF_HOME": str(tmp_path)}))
        assert time.time() - start < 20 and "--tokenizer=" in line and "mini" in line       # 10 s, and as much again on a busy machine
        start = time.time()
        assert not data.reachable(url) and time.time() - start < 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "reachable", lambda url: False)
        with pytest.raises(UserError, match="--source=FILE.*mini"):
            data.fetch_plwiki(tmp_path / "x")
    assert not (tmp_path / "data/plwiki").exists()


def good_line(text="Dokument. "):
    return json.dumps({"text": text * 9, "meta": {"quality": "HIGH"}}).encode() + b"\n"


BAD_SOURCES = {
    "empty.jsonl": (b"", "holds no document"),
    "blank.txt": (b" \n\n", "holds no document"),
    "low.jsonl": (good_line().replace(b"HIGH", b"LOW"), "quality HIGH"),
    "not.jsonl.zst": (b"plain text", "not a zstd file"),
    "broken.jsonl": (good_line() * 4999 + b"{oops\n", "line 5000: not JSON"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1: not JSON"),
    "list.jsonl": (b"[1, 2]\n", "line 1: not {"),
    "notext.jsonl": (good_line() + b'{"meta": {}}\n', "line 2: not {"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: not {"),
    "latin2.txt": ("zażółć".encode("iso-8859-2"), "not UTF-8"),
    "few.jsonl": (good_line() * 9, "cannot be split"),
    "wrong.csv": (b"a,b\n", ".jsonl, .jsonl.zst or .txt"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources_are_refused_and_leave_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = BAD_SOURCES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        data.main(["--dataset=bad", f"--source={name}", "--tokenizer=train", "--vocab_size=512"])
    assert not list(tmp_path.glob("data/*")) and not list(tmp_path.glob("data/.*"))


def test_awkward_documents_survive(tmp_path, monkeypatch):
    """Every document that is not blank comes back as it was, once; marks of control in a text stay text."""
    monkeypatch.chdir(tmp_path)
    awkward = ["", "  \n ", "\t\u2003", "\ufeffBOM na początku", "wiersz\r\nCRLF\n\n", "zero\x00bajt", "</s><s> wewnątrz <unk>",
               "🦊" * 50, "raz", "raz", "\u200fמימין לשמאל\u202e", "  spacje z przodu i z tyłu ", "dolna▁kreska", "ab" * 5_000_000, "słowo " * 50_000]
    lines = [json.dumps({"text": t}) for t in awkward] + ['{"text": "pół znaku \\ud83e tutaj"}']
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8")
    data.main(["--dataset=odd", "--source=a.jsonl", "--tokenizer=train", "--vocab_size=512"])
    meta, splits = data.load_dataset("odd")
    tok = data.load_tokenizer("data/odd/tokenizer")
    # a word of ten million characters is cut with a space, every 100,000
    expected = {" ".join(data.cut(text)) for text in awkward[3:]} - {"dolna▁kreska"} | {"pół znaku ? tutaj", "dolna kreska"}
    assert set(awkward[3:]) - expected == {"ab" * 5_000_000, "dolna▁kreska"}
    ids = np.concatenate(list(splits.values())).astype(np.int64)
    documents = np.split(ids, np.flatnonzero(ids == tok.eos_token_id) + 1)[:-1]
    assert all(d[0] == tok.bos_token_id for d in documents) and len(documents) == len(expected)
    assert {tok.decode(d[1:-1]) for d in documents} == expected
    assert sum(s["documents"] for s in meta["splits"].values()) == len(expected)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.text(alphabet="ab \n", max_size=60), st.integers(2, 20))
def test_a_long_document_is_cut_without_loss(text, most):
    """But for the spaces at which it is cut: in each part's second half, else nowhere."""
    parts, rest = list(data.cut(text, most)), text
    for part in parts[:-1]:
        assert most // 2 <= len(part) <= most
        rest = rest[len(part):]
        assert rest.startswith(" ") or len(part) == most
        rest = rest.removeprefix(" ") if len(part) < most else rest
    assert parts[-1] == rest and len(rest) <= most and bool(rest) == bool(text)


def test_all_of_a_long_document_is_in_one_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"dokument {i} " * 20_000 for i in range(9)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    data.main(["--dataset=long", "--source=a.jsonl", "--tokenizer=train", "--vocab_size=512"])
    meta, splits = data.load_dataset("long")
    assert [s["documents"] for s in meta["splits"].values()] == [7, 1, 1]
    tok = data.load_tokenizer("data/long/tokenizer")
    found = [text for t in splits.values() for text in tok.decode(t.astype(np.int64)).split("</s>")[:-1]]
    assert sorted(text.removeprefix("<s>").strip() for text in found) == sorted(text.strip() for text in texts)


@pytest.mark.skipif(not LONG, reason="half an hour: LONG=1")
def test_a_source_of_5_gb_is_prepared_in_less_than_1_gb(tmp_path):
    """5 GB, spelled in 400 ciphers so that new words keep coming."""
    import resource
    letters = "aąbcćdeęfghijklłmnńoóprsśtuwyzźż"
    articles = "\n".join(data.write_mini(1, 40_000))
    with open(tmp_path / "big.jsonl", "w", encoding="utf-8") as out:
        k = 0
        while out.tell() < 5e9:
            cipher = str.maketrans(letters, "".join(random.Random(k).sample(letters, len(letters))))
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in articles.translate(cipher).split("\n"))
            k += 1
    result = command("data.py", "--dataset=big", "--source=big.jsonl", "--tokenizer=train", "--vocab_size=8192", cwd=tmp_path,
                     timeout=3 * 3600)
    assert result.returncode == 0, result.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 1e9
    (tmp_path / "big.jsonl").unlink()
    shutil.rmtree(tmp_path / "data")


def test_a_killed_preparation_leaves_the_old_dataset_or_none(work, tmp_path):
    write_jsonl(tmp_path / "new.jsonl", data.write_mini(9, 3000))
    for before in (False, True):        # nothing there yet; then an older dataset
        if before:
            shutil.copytree(work / "data/tiny", tmp_path / "data/new")
        process = subprocess.Popen([sys.executable, str(HERE / "data.py"), "--dataset=new", "--source=new.jsonl",
                                    "--tokenizer=train", "--vocab_size=1000"], cwd=tmp_path, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.glob("data/.new-*/tokens")):
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert (tmp_path / "data/new").exists() == before
        assert len(list(tmp_path.glob("data/.new-*"))) == 1
        shutil.rmtree(next(tmp_path.glob("data/.new-*")))
    assert (tmp_path / "data/new/meta.json").read_bytes() == (work / "data/tiny/meta.json").read_bytes()


def test_a_tokenizer_folder_never_runs_its_code(work, tmp_path):
    shutil.copytree(work / "data/tiny/tokenizer", tmp_path / "evil")
    config = json.loads((tmp_path / "evil/tokenizer_config.json").read_text())
    for name in ("PreTrainedTokenizerFast", "EvilTokenizer"):
        config.update(tokenizer_class=name, auto_map={"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]})
        (tmp_path / "evil/tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "evil/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass EvilTokenizer: pass\n")
        try:
            data.load_tokenizer(str(tmp_path / "evil"))
        except UserError:
            pass
        assert not (tmp_path / "ran").exists()


def test_an_interrupt_between_two_renames_leaves_the_old_dataset(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work / "data/tiny", "data/tiny")
    before, rename = Path("data/tiny/meta.json").read_bytes(), Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.main(["--dataset=tiny", f"--source={work}/tiny.jsonl", "--tokenizer=train", "--vocab_size=600"])
    assert Path("data/tiny/meta.json").read_bytes() == before and [p.name for p in Path("data").iterdir()] == ["tiny"]


def test_text_files_are_cut_at_line_ends(tmp_path):
    lines = [f"Wiersz {i} " + "x" * 90 + "\r\n" for i in range(200)]
    (tmp_path / "a.txt").write_text("".join(lines), encoding="utf-8", newline="")
    pieces = list(data.read_documents(tmp_path / "a.txt"))
    assert "".join(pieces) == "".join(lines) and len(pieces) > 5
    assert all(p.endswith("\n") and len(p) < 2200 for p in pieces)


@pytest.mark.parametrize("damage", ["token", "meta", "cut", "vocabulary", "missing", "version"])
def test_damaged_data_folders_are_refused(damage, work, tmp_path, monkeypatch):
    shutil.copytree(work / "data/tiny", tmp_path / "data/tiny")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data/tiny"
    raw, meta = (folder / "val.bin").read_bytes(), json.loads((folder / "meta.json").read_text())
    if damage == "token":
        (folder / "val.bin").write_bytes(b"\xff\xff" + raw[2:])
    elif damage == "cut":
        (folder / "val.bin").write_bytes(raw[:-1])
    elif damage == "missing":
        (folder / "val.bin").unlink()
    elif damage == "meta":
        (folder / "meta.json").write_text("{")
    else:
        meta.update({"vocab_size": 100} if damage == "vocabulary" else {"format_version": 99})
        (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="damaged"):
        data.load_dataset("tiny")


# ---------------------------------------------------------------------------------------------- the command line

@pytest.mark.parametrize("script, keys, message", [
    ("train.py", ["--learning_rat=1e-3"], "did you mean --learning_rate?"),
    ("train.py", ["--n_head=4", "--model=lstm"], "unknown key --n_head"),
    ("train.py", ["--batch_size=0"], "batch_size must be at least 1"),
    ("train.py", ["--batch_size=2.5"], "must be a whole number"),
    ("train.py", ["--learning_rate=nan"], "finite"),
    ("train.py", ["--weight_decay=-1"], "0 or more"),
    ("train.py", ["--wandb_log=maybe"], "must be one of True, False"),
    ("train.py", ["--model=rnn"], "must be one of gpt, lstm"),
    ("train.py", ["--dataset=nothere"], "python data.py --dataset=nothere"),
    ("train.py", ["--dataset=../tiny"], "a name of letters"),
    ("train.py", ["--dataset=tiny", "--vocab_size=7"], "below the dataset's"),
    ("train.py", ["--dataset=tiny", "--block_size=10000"], "too small"),
    ("train.py", ["--dataset=tiny", "--n_head=7"], "n_head"),
    ("train.py", ["--dataset=tiny", "--dtype=int7"], "must be one of"),
    ("train.py", ["--dataset=tiny", "--init_from=resume", "--out_dir=empty"], "no checkpoint"),
    ("train.py", ["--dataset=tiny", "--init_from=resume", "--batch_size=9"], "has --batch_size=8, not 9"),
    ("train.py", ["--init_from=resume", "--out_dir=outputs/transformer", "--model=lstm", "--n_hidden=5"], "has --model=gpt"),
    ("train.py", ["--init_from=resume", "--out_dir=outputs/rnn", "--n_head=5"], "unknown key --n_head"),
    ("train.py", ["--init_from=resume", "--seed=5"], "has --seed=1337, not 5"),
    ("train.py", ["--init_from=resume", "--dataset=mini"], "has --dataset=tiny, not mini"),
    ("train.py", ["--init_from=resume", "--n_layer=3"], "has --n_layer=2, not 3"),
    ("train.py", ["--dataset=tiny", "--learning_rate=1e-5"], "min_lr 5e-05 is above"),
    ("train.py", ["--model=lstm", "--compile=True"], "leave --compile out"),
    ("train.py", ["--dataset=tiny", "--n_layer=1000000000"], "above 1000"),
    ("train.py", ["--dataset=tiny", "--block_size=400000"], "above 16384"),
    ("train.py", ["--dataset=tiny", "--n_embd=120000"], "GB to train"),
    ("train.py", ["--dataset=tiny", "--n_embd=12000000000"], "GB to train"),
    ("train.py", ["--dataset=tiny", "--batch_size=1000000000000"], "windows of training data"),
    ("sample.py", ["--num_samples=10000000"], "at most a million"),
    ("train.py", ["batch_size=3"], "--key=value"),
    ("train.py", ["--batch_size"], "--key=value"),
    ("sample.py", ["--prompt="], "prompt is empty"),
    ("sample.py", ["--top_p=1.5"], "top_p"),
    ("sample.py", ["--temperature=inf"], "finite"),
    ("sample.py", ["--out_dir=empty"], "python train.py"),
    ("sample.py", ["--model=lstm", "--out_dir=outputs/transformer"], "holds a gpt"),
    ("bench.py", ["--device=tpu"], "must be one of"),
    ("data.py", ["--dataset=books"], "needs --source"),
    ("data.py", ["--dataset=x", "--source=nothere.txt", "--tokenizer=train"], "no such file"),
    ("data.py", ["--dataset=x", "--source=tiny.jsonl", "--tokenizer=train", "--vocab_size=70000"], "512 to 65536"),
    ("data.py", ["--dataset=x", "--source=tiny.jsonl", "--tokenizer=outputs"], "cannot load the tokenizer"),
])
def test_mistakes_end_in_one_clear_line(script, keys, message, here, capsys):
    main = {"train.py": train, "sample.py": sample, "bench.py": bench, "data.py": data}[script].main
    before = sorted(p for p in here.rglob("*") if "outputs" not in p.parts)
    with pytest.raises(UserError) as error:
        main(keys)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert sorted(p for p in here.rglob("*") if "outputs" not in p.parts) == before


def test_a_mistake_is_exit_code_1_without_traceback(here):
    assert refused(command("train.py", "--model=transformer", cwd=here)) == \
        "error: --model=transformer: must be one of gpt, lstm"
    if not torch.cuda.is_available():
        assert "there is none here" in refused(command("sample.py", "--device=cuda", cwd=here))


@pytest.mark.parametrize("module, classes", [(data, [data.DataConfig]), (sample, [sample.SampleConfig]),
                                             (bench, [bench.BenchConfig]), (train, [train.TrainConfig, LSTMConfig])])
def test_help_lists_every_key_with_default_and_meaning(module, classes, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(["--model=lstm", "--help"] if module is train else ["--help"])
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for cls in classes:
        for key, default in vars(cls()).items():
            line, = [x for x in lines if x.startswith(f"  --{key}=")]
            assert line.startswith(f"  --{key}={default}") and len(line.split(maxsplit=1)[1]) > 8, line


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.one_of(st.text(max_size=12), st.builds("--{}={}".format, st.sampled_from(
    [f for f in vars(train.TrainConfig())] + ["x"]), st.text(max_size=8)))))
def test_any_arguments_are_parsed_or_refused(argv):
    try:
        values = data.parse_args([a for a in argv if a not in ("-h", "--help")], "", train.TrainConfig)
        data.configure(train.TrainConfig, values)
    except UserError as error:
        assert str(error).startswith("error: ")


# ---------------------------------------------------------------------------------------------- training

def run_tiny(name, out_dir, *keys):
    """Train a tiny model in this process; return its results."""
    train.main([f"--model={name}", "--dataset=tiny", *TINY_KEYS[name], "--batch_size=8", "--eval_interval=4", "--eval_iters=1",
                "--warmup=2", "--dtype=float32", f"--out_dir={out_dir}", *keys])
    return json.loads((Path(out_dir) / "results.json").read_text())


@BOTH
def test_a_run_leaves_what_it_promises(name, here):
    folder = Path(train.MODELS[name][2])
    assert {p.name for p in folder.iterdir()} >= {"ckpt.pt", "last.pt", "model_summary.txt", "metrics.jsonl", "results.json",
                                                  "learning_curves.png"}
    results = json.loads((folder / "results.json").read_text())
    assert {"test_loss", "test_perplexity", "train_loss", "train_perplexity", "val_loss", "val_perplexity", "tokens_seen",
            "minutes", "tokens_per_second", "n_params", "device", "dtype", "config"} <= results.keys()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [m["step"] for m in metrics] == [0, 10, 20, 30]
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] - 0.3
    assert results["tokens_seen"] == 30 * 8 * 32 and results["val_loss"] == min(m["val_loss"] for m in metrics)
    model = train.build_model(train.load_checkpoint(folder / "ckpt.pt"))
    _, splits = data.load_dataset("tiny")
    rows = splits["test"][:(len(splits["test"]) - 1) // 32 * 32 + 1].astype(np.int64)
    with torch.no_grad():       # the whole test split, computed another way
        targets = torch.tensor(rows[1:]).view(-1, 32)
        logits, loss = model(torch.tensor(rows[:-1]).view(-1, 32), targets)
        by_position = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(dim=0)
    assert abs(loss - results["test_loss"]) < 0.02      # the run may have used bfloat16
    assert torch.allclose(by_position, torch.tensor(json.loads((folder / "test_loss_by_position.json").read_text())), atol=0.05)
    assert (folder / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{results['n_params']:,}" in (folder / "model_summary.txt").read_text()


def test_recipes_set_what_they_say(here):
    report = run_tiny("lstm", "out/recipe", "--recipe=report", "--max_iters=1")["config"]
    for key, value in {"optimizer": "adam", "schedule": "constant", "grad_clip": 0, "residual": False, "dtype": "float32"}.items():
        assert report[key] == value
    tuned = run_tiny("gpt", "out/recipe", "--max_iters=1", "--grad_clip=0.5")["config"]
    assert (tuned["optimizer"], tuned["schedule"], tuned["fused_attention"], tuned["grad_clip"]) == ("adamw", "cosine", True, 0.5)
    mixed = run_tiny("gpt", "out/recipe", "--max_iters=1", "--recipe=report", "--optimizer=adamw")["config"]
    assert (mixed["optimizer"], mixed["fused_attention"]) == ("adamw", False)

    model = make("gpt")
    adam = train.make_optimizer(model, train.TrainConfig(optimizer="adam"))
    assert type(adam) is torch.optim.Adam and adam.param_groups[0]["weight_decay"] == 0.1
    assert sum(p.numel() for p in adam.param_groups[0]["params"]) == model.num_params()
    adamw = train.make_optimizer(model, train.TrainConfig())
    assert type(adamw) is torch.optim.AdamW
    assert {(p.dim() >= 2, g["weight_decay"]) for g in adamw.param_groups for p in g["params"]} == {(True, 0.1), (False, 0.0)}

    constant, cosine = train.TrainConfig(schedule="constant"), train.TrainConfig(max_iters=1000, warmup=10)
    assert {train.learning_rate_at(constant, s, m) for s in (0, 500) for m in (0, 99)} == {5e-4}
    rates = [train.learning_rate_at(cosine, s, 0.0) for s in range(1001)]
    assert rates[0] == 5e-5 and rates[9] == 5e-4 and rates[1000] == 5e-5 and rates[10:] == sorted(rates[10:], reverse=True)
    by_clock = train.TrainConfig()
    assert train.learning_rate_at(by_clock, 10 ** 6, 60.0) == pytest.approx((5e-4 + 5e-5) / 2)


def test_gradient_clipping_bounds_the_step(here):
    """Gradients clipped to 1e-9 vanish beside Adam's eps of 1e-8, so the model hardly moves."""
    free = run_tiny("gpt", "out/clip", "--max_iters=8", "--learning_rate=0.05")
    clipped = run_tiny("gpt", "out/clip", "--max_iters=8", "--learning_rate=0.05", "--grad_clip=1e-9")
    assert clipped["test_loss"] != free["test_loss"]
    assert abs(clipped["test_loss"] - np.log(512)) < 0.2


@BOTH
def test_accumulated_batches_equal_one_large_batch(name, here):
    whole = run_tiny(name, "out/whole", "--max_iters=8")
    parts = run_tiny(name, "out/parts", "--max_iters=8", "--batch_size=2", "--gradient_accumulation_steps=4", "--eval_iters=4")
    assert whole["tokens_seen"] == parts["tokens_seen"]
    assert whole["test_loss"] == pytest.approx(parts["test_loss"], abs=1e-4)


TIMINGS = {"minutes", "tokens_per_second", "data_wait_share", "evaluation_share", "peak_memory_gb"}


def all_of_a_run(folder):
    """Everything a finished run leaves that must not depend on how often it was interrupted."""
    results = json.loads((folder / "results.json").read_text())
    config = {k: v for k, v in results.pop("config").items() if k not in ("out_dir", "init_from")}
    last, best = (torch.load(folder / name, weights_only=True) for name in ("last.pt", "ckpt.pt"))
    curve = [{k: v for k, v in m.items() if k not in TIMINGS} for m in last["metrics"]]
    assert [json.loads(line) for line in (folder / "metrics.jsonl").open()] == last["metrics"]
    tensors = [*last["model"].values(), *best["model"].values(),
               *(v for state in last["optimizer"]["state"].values() for v in state.values())]
    numbers = {k: v for k, v in results.items() if k not in TIMINGS}
    return [numbers, config, curve, last["loss_scale"], last["lost_steps"], [last[k] for k in ("step", "tokens_seen")]], tensors


def children(torchrun):
    """The process ids of a torchrun's two workers, the first that of rank 0."""
    pids = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    workers = [int(pid) for pid in pids if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    return workers


@BOTH
@pytest.mark.parametrize("processes", [1, 2] if LONG else [1])
def test_a_run_killed_at_random_moments_ends_as_if_never_killed(name, processes, here):
    """SIGKILL, each time at a random moment after the run has begun to work; then resumed, and killed again. Once more, SIGTERM."""
    kills, rng = 30 if LONG else 3, random.Random(f"{name}{processes}")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    whole, cut = Path(f"out/whole-{name}{processes}"), Path(f"out/cut-{name}{processes}")
    keys = ["--dataset=tiny", *TINY_KEYS[name], "--batch_size=8", "--eval_interval=7", "--eval_iters=1", "--dropout=0.1",
            "--dtype=float32", f"--max_iters={100 * (kills + 1)}", "--learning_rate=3e-3", "--warmup=20"]

    def start(folder):
        again = ["--init_from=resume"] if (folder / "last.pt").exists() else keys
        return subprocess.Popen([sys.executable, "-u", *launcher, str(HERE / "train.py"), f"--model={name}",
                                 f"--out_dir={folder}", *again], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})

    output = start(whole).communicate(timeout=600)[0]
    assert (whole / "results.json").exists(), output
    for kill in range(kills + 1):
        process = start(cut)
        for line in process.stdout:
            if "parameters;" in line:       # from here on it writes
                break
        time.sleep(rng.uniform(0, 0.6))
        assert process.poll() is None, "ended before it could be killed"
        workers = children(process) if processes == 2 else [process.pid]
        for pid in workers if kill == 1 else {process.pid, *workers}:
            os.kill(pid, signal.SIGTERM if kill == 1 else signal.SIGKILL)
        process.communicate()
        assert kill != 1 or process.returncode == 0 and (cut / "results.json").exists()
        for path in cut.glob("*.pt"):       # whatever is there is whole
            train.load_checkpoint(path)
    output = start(cut).communicate(timeout=600)[0]
    assert "resumed at step" in output and "Traceback" not in output
    (facts, tensors), (facts_again, tensors_again) = all_of_a_run(whole), all_of_a_run(cut)
    assert facts == facts_again and len(facts[2]) > 40
    assert len(tensors) == len(tensors_again) and all(map(torch.equal, tensors, tensors_again))
    (cut / "results.json").unlink()         # as if killed in the final test
    output = start(cut).communicate(timeout=600)[0]
    assert all_of_a_run(cut)[0] == facts, output


def test_a_float16_run_resumes_with_its_loss_scale(here):
    keys = ["--dtype=float16", "--schedule=constant", "--eval_interval=3", "--learning_rate=1e-2"]
    run_tiny("gpt", "out/half", *keys, "--max_iters=6")
    run_tiny("gpt", "out/halves", *keys, "--max_iters=3")
    train.main(["--init_from=resume", "--out_dir=out/halves", "--max_iters=6"])
    whole, halves = (torch.load(f"out/{run}/last.pt", weights_only=True) for run in ("half", "halves"))
    assert whole["loss_scale"] == halves["loss_scale"] and whole["loss_scale"]["_growth_tracker"] > 3
    assert all(torch.equal(whole["model"][k], halves["model"][k]) for k in whole["model"])


def test_resuming_a_finished_run_says_so_and_changes_nothing(here, capsys):
    run_tiny("gpt", "out/finished", "--max_iters=4")
    before = {p.name: p.read_bytes() for p in Path("out/finished").iterdir()}
    train.main(["--init_from=resume", "--out_dir=out/finished"])
    assert "is finished: 4 steps" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("out/finished").iterdir()} == before
    last = torch.load("out/finished/last.pt", weights_only=True)        # moments that claim more numbers than the file holds
    for moments in last["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(1).expand(moments["exp_avg"].shape)
    torch.save(last, "out/finished/last.pt")
    train.main(["--init_from=resume", "--out_dir=out/finished", "--max_iters=6"])
    assert json.loads(Path("out/finished/results.json").read_text())["steps"] == 6
    assert not Path("out/finished/previous").exists()


def test_a_resumed_run_keeps_the_best_weights_there_are(here):
    """Also those of a later moment than last.pt, which a diverged run leaves; but not another run's."""
    run_tiny("gpt", "out/best", "--max_iters=4")
    best = torch.load("out/best/ckpt.pt", weights_only=True)
    best["step"] = best["metrics"][-1]["step"] = 1000
    best["metrics"][-1]["val_loss"] = 1.25
    torch.save(best, "out/best/ckpt.pt")
    train.main(["--init_from=resume", "--out_dir=out/best", "--max_iters=8"])
    results = json.loads(Path("out/best/results.json").read_text())
    assert results["best_step"] == 1000 and results["val_loss"] == 1.25 and results["steps"] == 8
    for change in ({"data_sha256": "0"}, {"config": {**best["config"], "seed": 3}}):
        torch.save({**best, **change}, "out/best/ckpt.pt")
        with pytest.raises(UserError, match="of another run"):
            train.main(["--init_from=resume", "--out_dir=out/best", "--max_iters=9"])
    Path("out/best/ckpt.pt").unlink()       # as the message says: then the newest weights are the best there are
    Path("out/best/results.json").unlink()
    train.main(["--init_from=resume", "--out_dir=out/best"])
    assert json.loads(Path("out/best/results.json").read_text())["best_step"] == 8


def test_a_resumed_run_may_change_what_is_not_its_own(here):
    run_tiny("gpt", "out/change", "--max_iters=4")
    changes = {"learning_rate": 1e-3, "min_lr": 1e-4, "eval_interval": 3, "log_interval": 1, "max_iters": 7, "compile": "False",
               "device": "cpu"}
    train.main(["--init_from=resume", "--out_dir=out/change", *(f"--{k}={v}" for k, v in changes.items())])
    results = json.loads(Path("out/change/results.json").read_text())
    assert changes.items() <= results["config"].items() and results["steps"] == 7
    assert [json.loads(m)["step"] for m in Path("out/change/metrics.jsonl").open()] == [0, 4, 6, 7]


def test_a_second_run_in_the_same_folder_is_refused(here):
    run_tiny("gpt", "out/busy", "--max_iters=1")
    before = {p.name: p.read_bytes() for p in Path("out/busy").iterdir()}
    with open("out/busy/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # as a run does
        result = command("train.py", "--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8", "--out_dir=out/busy", cwd=here)
    assert "another run is writing to out/busy" in refused(result)
    assert {p.name: p.read_bytes() for p in Path("out/busy").iterdir()} == before


def test_without_a_c_compiler_a_run_goes_on_uncompiled(here, monkeypatch, tmp_path, capsys):
    keys = ["--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8", "--eval_iters=1", "--max_iters=1", "--out_dir=out/nogcc"]
    result = command("train.py", *keys, "--compile=True", cwd=here, env={"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert "torch.compile does not work here" in refused(result) and "leave --compile out" in refused(result)
    model = make("gpt")
    config = train.TrainConfig(compile="auto")

    def no_compiler(_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert train.compiled(model, config, torch.device("cpu")) is model and not capsys.readouterr().out
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)      # no CUDA needed
    assert train.compiled(model, config, torch.device("cuda")) is model
    assert "Failed to find C compiler" in capsys.readouterr().out


def spoiled_losses(monkeypatch, bad, spoil):
    """From now on train.py's GPT gives spoil(loss) at the training steps in bad."""
    steps = iter(range(10 ** 6))

    class Spoiled(GPT):
        def forward(self, idx, targets=None):
            logits, loss = super().forward(idx, targets)
            return logits, spoil(loss) if self.training and next(steps) in bad else loss

    monkeypatch.setitem(train.MODELS, "gpt", (Spoiled, GPTConfig, "outputs/transformer"))


@pytest.mark.parametrize("recipe", ["tuned", "report"])
@pytest.mark.parametrize("spoil", [lambda loss: loss * float("nan"), lambda loss: loss * float("inf"),
                                   lambda loss: loss + float("inf")])       # the last has a finite gradient
def test_a_loss_that_is_not_finite_never_reaches_the_weights(recipe, spoil, here, monkeypatch):
    spoiled_losses(monkeypatch, range(9), spoil)
    results = run_tiny("gpt", "out/lost", f"--recipe={recipe}", "--max_iters=9", "--learning_rate=1e-2")
    assert results["lost_steps"] == 9 and len({json.loads(m)["val_loss"] for m in Path("out/lost/metrics.jsonl").open()}) == 1
    spoiled_losses(monkeypatch, set(range(1, 400, 2)), spoil)       # many in all, and never ten in a row
    results = run_tiny("gpt", "out/lost", f"--recipe={recipe}", "--max_iters=400", "--learning_rate=3e-3", "--eval_interval=100")
    assert results["lost_steps"] == 200 and results["val_loss"] < (4.5 if recipe == "tuned" else 6)


def test_ten_lost_steps_in_a_row_stop_the_run_and_name_the_learning_rate(here, monkeypatch):
    spoiled_losses(monkeypatch, range(10, 100), lambda loss: loss * float("nan"))
    with pytest.raises(UserError, match=r"learning rate: try --learning_rate=0.003"):
        run_tiny("gpt", "out/diverged", "--max_iters=40", "--learning_rate=1e-2")
    last = train.load_checkpoint(Path("out/diverged/last.pt"))
    assert last["step"] <= 16 and all(v.isfinite().all() for v in last["model"].values())


@pytest.mark.parametrize("keys", [["--learning_rate=1e18"], ["--weight_decay=1e18"]])
def test_an_absurd_step_size_is_stopped_before_it_is_saved(keys, here):
    with pytest.raises(UserError, match="learning rate"):
        run_tiny("gpt", "out/absurd", "--max_iters=100", "--warmup=0", "--grad_clip=0", *keys)
    for name in ("ckpt.pt", "last.pt"):
        assert all(v.isfinite().all() for v in train.load_checkpoint(Path("out/absurd") / name)["model"].values())


def test_an_interrupt_that_ends_the_reader_too_still_saves_and_scores(here):
    """As `python train.py 2>&1 | tee log` and Ctrl-C do."""
    process = subprocess.Popen([sys.executable, "-u", str(HERE / "train.py"), "--dataset=tiny", *TINY_KEYS["gpt"],
                                "--batch_size=8", "--eval_interval=5", "--eval_iters=1", "--out_dir=out/tee"],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 5:"):
            break
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 0
    results = json.loads(Path("out/tee/results.json").read_text())
    assert results["steps"] == train.load_checkpoint(Path("out/tee/last.pt"))["step"] >= 5


def test_two_interrupts_stop_at_once_and_harm_no_file(here):
    process = subprocess.Popen([sys.executable, "-u", str(HERE / "train.py"), "--dataset=tiny", *TINY_KEYS["gpt"],
                                "--batch_size=8", "--eval_interval=5", "--out_dir=out/twice"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        if line.startswith("step 5:"):
            process.send_signal(signal.SIGINT)
        if "Ctrl-C ends at once" in line:
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT and not Path("out/twice/results.json").exists()
    assert train.load_checkpoint(Path("out/twice/last.pt"))["step"] >= 0 and train.load_checkpoint(Path("out/twice/ckpt.pt"))


def test_sigterm_finishes_the_step_saves_and_scores(here):
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8",
                                "--eval_interval=5", "--eval_iters=1", "--out_dir=out/term"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 60
    while not Path("out/term/last.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert Path("out/term/results.json").exists() and "Traceback" not in output
    assert torch.load("out/term/last.pt", weights_only=True)["step"] == json.loads(Path("out/term/results.json").read_text())["steps"]


def test_a_new_run_sets_the_last_ones_checkpoints_aside(here):
    run_tiny("gpt", "out/again", "--max_iters=1")
    first = Path("out/again/ckpt.pt").read_bytes()
    run_tiny("gpt", "out/again", "--max_iters=1", "--seed=5")
    assert Path("out/again/previous/ckpt.pt").read_bytes() == first != Path("out/again/ckpt.pt").read_bytes()
    sample.main(["--out_dir=out/again/previous", "--max_new_tokens=2"])     # a whole run
    assert {p.name for p in Path("out/again/previous").iterdir()} == \
           {p.name for p in Path("out/again").glob("[a-z]*.*")} - {"model_summary.txt"}
    second = Path("out/again/ckpt.pt").read_bytes()
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), "--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8",
                                "--out_dir=out/again"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and Path("out/again/ckpt.pt").exists():
        time.sleep(0.001)
    while process.poll() is None and not Path("out/again/metrics.jsonl").exists():
        time.sleep(0.001)
    process.kill()      # a mistaken start, ended before the next evaluation; the second such must not cost the good run
    process.wait()
    run_tiny("gpt", "out/again", "--max_iters=1")
    assert Path("out/again/previous/ckpt.pt").read_bytes() == second


def test_a_stopped_run_is_set_aside_though_it_was_evaluated_only_once(here):
    process = subprocess.Popen([sys.executable, "-u", str(HERE / "train.py"), "--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8",
                                "--eval_interval=100000", "--out_dir=out/once"], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step 0:"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert "of step 0, on the whole test split" in process.communicate(timeout=60)[0]
    step = train.load_checkpoint(Path("out/once/last.pt"))["step"]
    run_tiny("gpt", "out/once", "--max_iters=1")
    assert train.load_checkpoint(Path("out/once/previous/last.pt"))["step"] == step > 1


def test_setting_aside_is_finished_by_the_next_run_after_a_kill(here, monkeypatch):
    run_tiny("gpt", "out/aside", "--max_iters=1")
    run_tiny("gpt", "out/aside", "--max_iters=2")
    files = {p.name: p.read_bytes() for p in Path("out/aside").glob("[a-z]*.*") if p.name != "model_summary.txt"}
    assert len(files) == 6
    replace = os.replace
    for k in range(len(files) + 1):         # killed before each of the moves in turn
        left = iter(range(k))

        def fails(a, b):
            if next(left, None) is None:
                raise KeyboardInterrupt
            replace(a, b)

        for name, content in files.items():
            (Path("out/aside") / name).write_bytes(content)
        with monkeypatch.context() as m:
            m.setattr(os, "replace", fails)
            with pytest.raises(KeyboardInterrupt):
                train.claim_folder(Path("out/aside"), False)
        gc.collect()                        # frees the lock
        train.claim_folder(Path("out/aside"), False).close()
        assert {p.name: p.read_bytes() for p in Path("out/aside/previous").iterdir()} == files
        assert not Path("out/aside/ckpt.pt").exists() and not Path("out/aside/.previous.tmp").exists()


def test_time_budget_ends_a_run(here):
    results = run_tiny("gpt", "out/time", "--max_minutes=0.03")
    assert 0.03 <= results["minutes"] < 0.2 and results["steps"] > 0


def torchrun(*keys):
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(HERE / "train.py"), *keys], capture_output=True, text=True, timeout=120,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_two_processes_equal_one(here):
    """DistributedDataParallel on gloo, stopped by its step budget and resumed: the same global batches as one process in one
    go, so the same curve to rounding. Only one of the two writes."""
    one = run_tiny("lstm", "out/one", "--max_iters=8", "--schedule=constant", "--gradient_accumulation_steps=2")
    out = torchrun("--model=lstm", "--dataset=tiny", *TINY_KEYS["lstm"], "--batch_size=8", "--eval_interval=4", "--eval_iters=1",
                   "--warmup=2", "--dtype=float32", "--max_iters=4", "--schedule=constant", "--gradient_accumulation_steps=2",
                   "--out_dir=out/two")
    assert out.count("parameters;") == 1 and out.count("step 4: train") == 1
    out = torchrun("--model=lstm", "--init_from=resume", "--max_iters=8", "--out_dir=out/two")
    assert out.count("resumed at step 4") == 1
    two = json.loads(Path("out/two/results.json").read_text())
    assert one["tokens_seen"] == two["tokens_seen"] == 2 * 8 * 8 * 32
    for key in ("train_loss", "val_loss", "test_loss"):
        assert one[key] == pytest.approx(two[key], abs=1e-4)
    curves = [[json.loads(line)["val_loss"] for line in Path(f"out/{run}/metrics.jsonl").open()] for run in ("one", "two")]
    assert len(curves[0]) == 3 and curves[0] == pytest.approx(curves[1], abs=1e-4)


def test_the_time_budget_ends_all_processes_together(here):
    torchrun("--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8", "--eval_iters=1", "--max_minutes=0.03", "--out_dir=out/both")
    results = json.loads(Path("out/both/results.json").read_text())
    assert results["steps"] > 0 and 0.03 <= results["minutes"] < 0.3


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find the processes of a run")
def test_a_signal_to_one_process_stops_all_together(here):
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                                str(HERE / "train.py"), "--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=8",
                                "--eval_interval=5", "--eval_iters=1", "--out_dir=out/together"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.time() + 60
    while not Path("out/together/last.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    os.kill(children(process)[1], signal.SIGTERM)       # not the one that writes
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    assert json.loads(Path("out/together/results.json").read_text())["steps"] == \
        train.load_checkpoint(Path("out/together/last.pt"))["step"]


def test_memory_does_not_grow_over_2000_steps(here):
    peaks = []
    for steps in (200, 2000):
        result = command("train.py", "--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=2", "--eval_interval=100",
                         "--eval_iters=1", f"--max_iters={steps}", "--out_dir=out/memory", cwd=here,
                         env={"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr
        peaks.append(json.loads(Path("out/memory/results.json").read_text())["peak_memory_gb"])
    assert peaks[1] - peaks[0] < 0.02, peaks       # a tenth of a batch's gradients kept per step would be 0.1


def test_slow_saves_are_spaced_out_and_stay_of_one_moment(here, monkeypatch):
    """When a save takes long beside the steps, evaluations go on without one; the last one is always written."""
    saves, write = [], train.write_whole

    def slow(path, function):
        write(path, function)
        if path.suffix == ".pt":
            saves.append(path.name)
            time.sleep(0.2)

    monkeypatch.setattr(train, "write_whole", slow)
    run_tiny("gpt", "out/slow", "--max_iters=30", "--eval_interval=1", "--learning_rate=0.005")
    last, best = (torch.load(f"out/slow/{name}.pt", weights_only=True) for name in ("last", "ckpt"))
    assert len(last["metrics"]) == 31 and 2 <= saves.count("last.pt") <= 6 and last["step"] == 30
    assert best["step"] == min(last["metrics"], key=lambda m: m["val_loss"])["step"]
    results = json.loads(Path("out/slow/results.json").read_text())
    assert results["best_step"] == best["step"] and 0 < results["data_wait_share"] < 0.5 and results["peak_memory_gb"] > 0.1


def wandb_records(raw):
    """The records of a .wandb file, LevelDB's log format: a file header of 7 bytes, then blocks of 32 KiB of pieces, each
    of crc (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last)."""
    assert raw[:4] == b":W&B"
    at, record = 7, b""
    while at + 7 <= len(raw):
        if 32768 - at % 32768 < 7:      # no room for a piece: padding
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(raw[at + 4:at + 6], "little"), raw[at + 6]
        record += raw[at + 7:at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record
            record = b""


def test_an_offline_wandb_run_leaves_a_readable_file(here, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "5ec2e7" * 6 + "cafe")
    run_tiny("gpt", "out/wandb", "--max_iters=4", "--wandb_log=True", "--wandb_run_name=probe")
    file, = Path("out/wandb").rglob("*.wandb")
    from wandb.proto.wandb_internal_pb2 import Record
    deadline, kinds = time.time() + 60, []
    while "exit" not in kinds and time.time() < deadline:       # a process of wandb's own writes it
        kinds, logged = [], []
        for raw in wandb_records(file.read_bytes()):
            record = Record()
            record.ParseFromString(raw)
            kinds.append(record.WhichOneof("record_type"))
            logged += [item.key or ".".join(item.nested_key) for item in record.history.item]
    assert "run" in kinds and logged.count("val_loss") == 2
    assert not any(b"5ec2e75ec2e7" in p.read_bytes() for p in Path("out/wandb").rglob("*") if p.is_file())


def test_a_resumed_run_goes_on_in_the_same_wandb_run(here, monkeypatch):
    import wandb
    calls = []

    class Run:
        id = "abc123"
        log = finish = lambda self, *args, **kwargs: None

    monkeypatch.setattr(wandb, "init", lambda **kwargs: calls.append(kwargs) or Run())
    run_tiny("gpt", "out/same", "--max_iters=4", "--wandb_log=True")
    train.main(["--init_from=resume", "--out_dir=out/same", "--max_iters=8"])
    assert [(c["id"], c["resume"]) for c in calls] == [(None, None), ("abc123", "allow")]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_broken_wandb_never_stops_a_run(broken, here, monkeypatch, capsys):
    import wandb

    class Run:
        id = "x"

        def fail(self, *args, **kwargs):
            raise ConnectionResetError("the line is dead")

        log = fail if broken == "log" else lambda self, *args, **kwargs: None
        finish = fail if broken == "finish" else lambda self: None

    monkeypatch.setattr(wandb, "init", Run().fail if broken == "init" else lambda **kwargs: Run())
    assert run_tiny("gpt", "out/nowandb", "--max_iters=1", "--wandb_log=True")["steps"] == 1
    assert "wandb failed, the run goes on: the line is dead" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "foreign", "version", "model", "size", "layers", "field", "weight",
                                    "step", "metrics", "sparse", "expanded", "code"])
def test_damaged_checkpoints_are_refused(damage, here, tmp_path):
    path, source = tmp_path / "ckpt.pt", Path("outputs/transformer/ckpt.pt")
    checkpoint = torch.load(source, weights_only=True)
    if damage in ("cut", "text", "empty"):
        raw = source.read_bytes()
        path.write_bytes({"cut": raw[:len(raw) // 2], "text": b"ala ma kota", "empty": b""}[damage])
    elif damage == "code":
        torch.save({"format_version": 1, "model": os.system}, path)
    else:
        checkpoint.update({"foreign": {"config": None}, "version": {"format_version": 99}}.get(damage, {}))
        if damage == "model":
            checkpoint["config"]["model"] = "rnn"
        elif damage == "size":
            checkpoint["model_config"]["n_layer"] = 50
        elif damage == "layers":        # as many would take hours to build, even without memory
            checkpoint["model_config"]["n_layer"] = 10 ** 9
        elif damage == "step":
            checkpoint["step"] = torch.zeros(3, 3)
        elif damage == "metrics":
            checkpoint["metrics"][0]["val_loss"] = float("nan")
        elif damage == "sparse":
            checkpoint["model"]["wpe.weight"] = checkpoint["model"]["wpe.weight"].to_sparse()
        elif damage == "expanded":      # a few bytes that claim to be a large model
            checkpoint["model_config"].update(n_embd=2 ** 12, n_layer=40)
            with torch.device("meta"):
                large = GPT(GPTConfig(**checkpoint["model_config"])).state_dict()
            checkpoint["model"] = {k: torch.zeros(1).expand(v.shape) for k, v in large.items()}
        elif damage == "field":
            checkpoint["model_config"]["n_head"] = "four"
        elif damage == "weight":
            checkpoint["model"].popitem()
        torch.save(checkpoint, path)
    with pytest.raises(UserError, match="is damaged or not a checkpoint"):
        train.load_checkpoint(path)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    """A full disk, played by a limit on the size of a file: what torch.save meets then is not an OSError."""
    import resource
    path = tmp_path / "a.pt"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size, write in ((10, lambda p: p.write_text("new" * 100)), (10_000, lambda p: torch.save(torch.zeros(10 ** 6), p))):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with pytest.raises(UserError, match="cannot write .*a.pt"):
                train.write_whole(path, write)
            assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_loads(here):
    """As a command, its files limited to 60 kB: the run's checkpoints, a dataset and a larger tokenizer are above that."""
    write_jsonl(here / "mini.jsonl", data.write_mini(7, 1500))
    data.main(["--dataset=mini", "--source=mini.jsonl", "--tokenizer=train", "--vocab_size=2000"])
    shutil.copytree("outputs/transformer", "out/full", dirs_exist_ok=True)
    limited = "ulimit -f 60; exec \"$0\" \"$@\""        # in blocks of 1024 bytes
    for script, keys, message in (("train.py", ["--init_from=resume", "--max_iters=40", "--out_dir=out/full"], "cannot write"),
                                  ("data.py", ["--dataset=full", "--source=tiny.jsonl", "--tokenizer=data/tiny/tokenizer"],
                                   "File too large"),
                                  ("data.py", ["--dataset=full", "--source=mini.jsonl", "--tokenizer=data/mini/tokenizer"],
                                   "cannot write the tokenizer")):
        result = subprocess.run(["bash", "-c", limited, sys.executable, str(HERE / script), *keys], capture_output=True,
                                text=True, timeout=120)
        assert message in refused(result)
    assert train.load_checkpoint(Path("out/full/last.pt"))["step"] == 30 and train.load_checkpoint(Path("out/full/ckpt.pt"))
    assert not list(Path("out/full").glob(".*.tmp")) and not list(Path("data").glob("*full*")) + list(Path("data").glob(".full*"))


def test_preparing_never_removes_foreign_files(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    keys = ["--dataset=mine", f"--source={work}/tiny.jsonl", "--tokenizer=train", "--vocab_size=512"]
    for prepared in (False, True):
        if prepared:
            shutil.copytree(work / "data/tiny", tmp_path / "data/mine")
            data.main(keys)                 # replaces its own files
        else:
            (tmp_path / "data/mine").mkdir()
        mine = tmp_path / "data/mine" / ("notes.txt" if prepared else "train.bin")
        mine.write_text("moje")
        with pytest.raises(UserError, match=f"holds {mine.name}"):
            data.main(keys)
        assert mine.read_text() == "moje"
        shutil.rmtree(tmp_path / "data/mine")


def test_sampling_refuses_a_dataset_prepared_anew(work, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(work / "outputs", "outputs")
    shutil.copytree(work / "data/tiny", "data/tiny")
    meta = json.loads(Path("data/tiny/meta.json").read_text())
    meta["splits"]["train"]["sha256"] = "0" * 64
    Path("data/tiny/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="not the one that"):
        sample.main(["--model=gpt"])


# ---------------------------------------------------------------------------------------------- fuzz

FUZZ = settings(deadline=None, max_examples=1000 if LONG else 25, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2, 70_000) | st.just(10 ** 12) | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=6)
ODD = [None, -1, 0, 3, 10 ** 12, 2.5, 1e300, float("nan"), "", "x", [], {}, torch.zeros(1), torch.full((3, 3), float("nan"))]


def survives(main, argv, seconds=60):
    """Assert that a command ends well or in one clear line: no other exception, no hang, nothing half-written."""
    def hang(signum, frame):
        raise AssertionError(f"still at work after {seconds} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        main(argv)
    except UserError as error:
        assert str(error).startswith("error: ") and "\n" not in str(error)
    except RuntimeError as error:       # data.run makes one line of this
        assert "allocate" in str(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert not list(Path(".").rglob(".*.tmp"))


@pytest.fixture
def fuzz_here(work, tmp_path, monkeypatch):
    """A copy of the work folder to spoil. A run in it draws no picture, which would take most of the time."""
    shutil.copytree(work / "data/tiny", tmp_path / "data/tiny")
    shutil.copytree(work / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    return tmp_path


@FUZZ
@given(st.text(alphabet=st.characters(), max_size=60), st.sampled_from(["gpt", "lstm"]))
def test_any_prompt_is_continued_or_refused(fuzz_here, prompt, name):
    survives(sample.main, [f"--model={name}", f"--prompt={prompt}", "--max_new_tokens=2"])


@FUZZ
@given(st.sampled_from(["gpt", "lstm"]), st.dictionaries(
    st.sampled_from([k for k in {**vars(train.TrainConfig()), **vars(GPTConfig()), **vars(LSTMConfig())} if k not in
                     ("model", "dataset", "out_dir", "init_from", "max_iters", "wandb_log", "compile", "n_hidden", "cudnn",
                      "residual", "n_head", "fused_attention")]),
    st.sampled_from(["0", "1", "2", "3", "0.5", "1e-9", "1e9", "1000000", "1000000000000", "9223372036854775807", "-1", "nan",
                     "True", "adam", "float16", "bfloat16", "constant", "report", "x", "", "\x00", "½"]), min_size=1, max_size=3))
def test_any_settings_train_or_are_refused(fuzz_here, name, keys):
    survives(train.main, [f"--model={name}", "--dataset=tiny", *TINY_KEYS[name], "--batch_size=4", "--eval_iters=1",
                          "--max_iters=2", *(f"--{k}={v}" for k, v in keys.items())])


@FUZZ
@given(st.data())
def test_any_meta_json_is_used_or_refused(fuzz_here, draw):
    path = fuzz_here / "data/tiny/meta.json"
    original = path.read_text()
    meta = json.loads(original)
    part = draw.draw(st.sampled_from([meta, meta["splits"], meta["splits"]["train"]]))
    key = draw.draw(st.sampled_from(sorted(part)))
    if draw.draw(st.booleans()):
        part[key] = draw.draw(JSON)
    else:
        del part[key]
    try:
        path.write_text(json.dumps(draw.draw(st.sampled_from([meta, meta, meta, meta[key] if key in meta else 0]))))
        survives(train.main, ["--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=4", "--eval_iters=1", "--max_iters=1",
                              "--out_dir=out"])
        survives(sample.main, ["--model=gpt", "--max_new_tokens=2"])
    finally:
        path.write_text(original)


def spoil_bytes(raw, draw):
    """A file cut, or a few bytes of it changed, left out or put in."""
    at, n = draw.draw(st.integers(0, len(raw))), draw.draw(st.integers(1, 9))
    new = draw.draw(st.binary(max_size=9))
    return draw.draw(st.sampled_from([raw[:at], raw[:at] + new + raw[at + len(new):], raw[:at] + raw[at + n:],
                                      raw[:at] + new + raw[at:]]))


@FUZZ
@given(st.data())
def test_any_spoiled_data_folder_is_used_or_refused(fuzz_here, draw):
    path = draw.draw(st.sampled_from(sorted(p for p in (fuzz_here / "data/tiny").rglob("*") if p.is_file())))
    original = path.read_bytes()
    try:
        path.write_bytes(spoil_bytes(original, draw))
        survives(train.main, ["--dataset=tiny", *TINY_KEYS["gpt"], "--batch_size=4", "--eval_iters=1", "--max_iters=1",
                              "--out_dir=out"])
        survives(sample.main, ["--model=gpt", "--max_new_tokens=2"])
    finally:
        path.write_bytes(original)


@functools.cache
def checkpoint_of(path):
    return torch.load(path, weights_only=True)


@FUZZ
@given(st.data())
def test_any_spoiled_checkpoint_is_used_or_refused(fuzz_here, work, draw):
    """Its bytes are changed; or a value anywhere in it is replaced, left out, or renamed."""
    name, file = draw.draw(st.sampled_from(["gpt", "lstm"])), draw.draw(st.sampled_from(["ckpt.pt", "last.pt"]))
    folder = Path(train.MODELS[name][2])
    original = (work / folder / file).read_bytes()
    if draw.draw(st.integers(0, 3)) == 0:
        (folder / file).write_bytes(spoil_bytes(original, draw))
    else:
        part = checkpoint = copy.deepcopy(checkpoint_of(work / folder / file))
        while True:
            key = draw.draw(st.sampled_from(range(len(part)) if type(part) is list else list(part)))
            if type(part[key]) not in (dict, list) or not part[key] or draw.draw(st.integers(0, 5)) == 0:
                break
            part = part[key]
        action = draw.draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
        value = part.pop(key)
        if action == "replace":
            part.insert(key, draw.draw(st.sampled_from(ODD))) if type(part) is list else part.update({key: draw.draw(st.sampled_from(ODD))})
        elif action == "rename" and type(part) is dict:
            part[draw.draw(st.sampled_from(["x", 0, 10 ** 12]))] = value
        torch.save(checkpoint, folder / file)
    survives(sample.main, [f"--model={name}", "--max_new_tokens=2"])
    survives(train.main, [f"--model={name}", "--init_from=resume", "--max_iters=31", "--max_minutes=1"])
    shutil.rmtree(folder)
    shutil.copytree(work / folder, folder)


# ---------------------------------------------------------------------------------------------- as a user types it

def test_train_without_data_makes_mini_and_says_so(tmp_path):
    result = command("train.py", "--max_iters=2", "--eval_iters=1", "--batch_size=4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data/plwiki is not prepared" in result.stdout and (tmp_path / "outputs/transformer/results.json").exists()
    assert json.loads((tmp_path / "data/mini/meta.json").read_text())["vocab_size"] == 2048


@BOTH
def test_sample_streams_text_and_repeats_itself(name, here):
    results = [command("sample.py", f"--model={name}", "--temperature=1.0", "--max_new_tokens=40", cwd=here) for _ in range(2)]
    assert results[0].returncode == 0, results[0].stderr
    lines = [r.stdout.splitlines() for r in results]
    assert lines[0][:-1] == lines[1][:-1] and lines[0][0].startswith("Polska to piękny kraj.")
    assert re.match(rf"\[{name}, tiny, [\d.]+ tokens/s", lines[0][-1])


def test_sample_batch_grid_and_long_prompt(here, capsys):
    sample.main(["--model=gpt", "--num_samples=3", "--max_new_tokens=10"])
    assert capsys.readouterr().out.count("---") == 3
    sample.main(["--model=gpt", "--prompt=" + "rzeka " * 200, "--max_new_tokens=3"])
    assert "newest 32" in capsys.readouterr().err
    sample.main(["--model=lstm", "--grid=True", "--max_new_tokens=5"])
    report = json.loads(Path("outputs/rnn/rnn_inference_results.json").read_text())
    assert {(r["prompt"], r["temperature"]) for r in report["results"]} == \
        {(p, t) for p in sample.GRID_PROMPTS for t in (0.5, 1.0, 1.5)} and len(sample.GRID_PROMPTS) >= 5
    assert all(r["text"].startswith("<s>") for r in report["results"])


def test_sample_takes_the_newest_checkpoint(here, capsys):
    os.utime("outputs/rnn/ckpt.pt")
    sample.main(["--max_new_tokens=2"])
    assert "[lstm, tiny" in capsys.readouterr().out


def test_bench_measures_and_writes(tmp_path, monkeypatch, capsys):
    """The real loop on small stand-ins: the full sizes take minutes."""
    small = {"gpt": functools.partial(GPTConfig, n_layer=2, n_embd=48), "lstm": functools.partial(LSTMConfig, n_layer=2, n_hidden=48)}
    monkeypatch.setattr(bench, "MODELS", {k: (m, small[k], d) for k, (m, _, d) in train.MODELS.items()})
    bench.main(["--device=cpu", "--new_tokens=40", "--repeats=2", f"--out_dir={tmp_path}"])
    report = json.loads((tmp_path / "bench.json").read_text())
    dtypes = [("naive", "float32"), ("cached", "float32"), ("cached", "int8")]
    fast = str(train.choose_dtype("auto", torch.device("cpu"))[0]).removeprefix("torch.")
    assert {(r["model"], r["mode"], r["dtype"]) for r in report["generation"]} == \
        {(m, *kind) for m in small for kind in [*dtypes, ("cached", fast)]}
    for row in report["generation"]:
        assert row["tokens_per_second"] > 0 and row["bandwidth_share"] > 0
        naive = next(r for r in report["generation"] if r["model"] == row["model"])
        assert row["ratio_to_naive"] == pytest.approx(row["tokens_per_second"] / naive["tokens_per_second"], abs=0.01)
    assert (tmp_path / "bench.png").read_bytes()[:4] == b"\x89PNG" and "16.5" in capsys.readouterr().out


def test_bench_times_training_and_keeps_the_generation_rows(tmp_path, monkeypatch, capsys):
    small = {"gpt": functools.partial(GPTConfig, n_layer=1, n_embd=24, vocab_size=100),
             "lstm": functools.partial(LSTMConfig, n_layer=2, n_embd=16, n_hidden=24, vocab_size=100)}
    monkeypatch.setattr(bench, "MODELS", {k: (m, small[k], d) for k, (m, _, d) in train.MODELS.items()})
    keys = ["--device=cpu", "--repeats=1", f"--out_dir={tmp_path}"]
    bench.main(["--new_tokens=4", "--model=gpt", *keys])
    bench.main(["--train=True", "--batch_size=2", *keys])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [r["mode"] for r in report["generation"]][0] == "naive"
    changes = [r["change"] for r in report["training"]]
    assert "report: float32, attention by hand" in changes and "report: nn.LSTM, float32" in changes and len(changes) >= 8
    assert all(r["tokens_per_second"] > 0 and r["tflops"] >= 0 and r["batch_size"] == 2 for r in report["training"])
    assert (tmp_path / "bench_training.png").exists() and "7,852" in capsys.readouterr().out


def test_comparing_runs(here, capsys):
    with pytest.raises(UserError, match="no finished run"):
        bench.main(["--compare=True", "--out_dir=nothere"])
    bench.main(["--compare=True"])
    lines = capsys.readouterr().out.splitlines()
    for name in ("transformer", "rnn"):
        results = json.loads(Path(f"outputs/{name}/results.json").read_text())
        row, = (line.split("|") for line in lines if line.startswith(f"| {name} "))
        assert row[2].strip() == f"{results['tokens_seen']:,}" and float(row[5]) == round(results["val_loss"], 3)
        by_position = json.loads(Path(f"outputs/{name}/test_loss_by_position.json").read_text())
        assert len(by_position) == 32 and np.mean(by_position) == pytest.approx(results["test_loss"], abs=1e-4)
    assert Path("outputs/comparison.png").read_bytes()[:4] == b"\x89PNG"
    shutil.copytree("outputs/rnn", "out/older/rnn")
    Path("out/older/rnn/results.json").write_text(json.dumps({"config": {"model": "lstm", "dataset": "tiny"}}))
    with pytest.raises(UserError, match="of an older version"):
        bench.main(["--compare=True", "--out_dir=out/older"])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak can be forgotten on Linux and CUDA only")
def test_the_peak_of_memory_begins_anew():
    train.keep_freed_memory()
    held = [torch.ones(2 ** 22) for _ in range(40)]
    peak = train.peak_memory_gb(torch.device("cpu"))
    del held
    bench.forget_peak_memory(torch.device("cpu"))
    assert train.peak_memory_gb(torch.device("cpu")) < peak - 0.5


def test_readme_commands_and_keys_exist():
    """What README.md tells a reader to type is parsed by the scripts as they are."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    configs = {"data.py": [data.DataConfig], "sample.py": [sample.SampleConfig], "bench.py": [bench.BenchConfig]}
    blocks = "".join(re.findall(r"```(?:ba)?sh\n(.*?)```", text, re.S))
    shell = 'python() { echo "$*"; }; torchrun() { echo "$*"; }; pip() { :; }\n' + blocks      # bash fills in the variables
    typed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout.splitlines()
    typed += re.findall(r"`(?:python|torchrun) ([^`]+\.py[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
    found = [match.groups() for line in typed for match in re.finditer(r"(\w+\.py)((?: --\S+)*)", line)]
    assert len(found) > 40
    for script, keys in found:
        classes = configs.get(script, [train.TrainConfig, LSTMConfig if "--model=lstm" in keys else GPTConfig])
        if script != "test_all.py":
            data.parse_args([k for k in keys.split() if k not in ("--help", "--node_rank")], "", *classes)
    known = {f.name for classes in [*configs.values(), [train.TrainConfig, GPTConfig, LSTMConfig]] for c in classes for f in fields(c)}
    known |= {"key", "help", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
    assert set(re.findall(r"--(\w+)", text)) <= known
