"""Proves the claims of the other files: `python -m pytest test_all.py`. No network, no GPU needed."""
import ast
import copy
import fcntl
import functools
import http.server
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from contextlib import chdir, contextmanager, suppress
from dataclasses import fields, make_dataclass
from pathlib import Path
from unittest import mock

# Before torch is imported, and for every command below: models this small gain nothing from a second
# thread, and beside other work they lose a hundredfold by waiting for it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
import torch.nn as nn
import zstandard
from hypothesis import HealthCheck, example, given, settings, strategies as st

import bench
import data
import model_gpt
import sample
import train
from data import UserError
from model_gpt import GPT, GPTConfig, causal_mask, fused_attention, manual_attention
from model_lstm import LSTM, LSTMConfig, cudnn_recurrence, manual_recurrence, scan_recurrence
from train import State, TrainConfig

HERE = Path(__file__).parent
# LONG=1 python -m pytest -s test_all.py: thirty kills instead of two, also under torchrun, a thousand
# spoiled inputs instead of a few dozen, and a source of 5 GB. About two hours.
LONG = bool(os.environ.get("LONG"))
BOTH = pytest.mark.parametrize("name", ["gpt", "lstm"])
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
QUICK = settings(deadline=None, max_examples=100, derandomize=True, database=None)
TINY = {"gpt": {"block_size": 16, "vocab_size": 40, "n_layer": 2, "n_head": 2, "n_embd": 16},
        "lstm": {"block_size": 16, "vocab_size": 40, "n_layer": 3, "n_embd": 12, "n_hidden": 20}}
# the same as keys, for runs on the tiny dataset below
SIZES = {"gpt": ["--block_size=32", "--n_layer=2", "--n_head=2", "--n_embd=32"],
         "lstm": ["--block_size=32", "--n_layer=2", "--n_embd=24", "--n_hidden=32"]}


def make(name, **changes):
    """A tiny model in eval mode, its weights large enough that outputs differ clearly."""
    torch.manual_seed(0)
    model_class, config_class, _ = train.MODELS[name]
    model = model_class(config_class(**{**TINY[name], **changes})).eval()
    for p in model.parameters():
        p.data.normal_(std=0.4)
    return model


def tokens(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def inputs_and_targets(batch=2):
    idx = tokens(batch, 17)
    return idx[:, :-1], idx[:, 1:]


def close(a, b, tolerance=1e-6):
    return all(torch.allclose(x, y, atol=tolerance, rtol=1e-4) for x, y in zip(a, b, strict=True))


def command(script, *keys, code=0, env={}):
    """Run a script in the current folder, as a user types it -> what it printed, and the errors."""
    result = subprocess.run([sys.executable, str(HERE / script), *keys], env={**os.environ, **env},
                            capture_output=True, text=True, timeout=300)
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    return result.stdout, result.stderr


def refuses(message, call, *args):
    """Assert that a call raises a UserError that matches message."""
    with pytest.raises(UserError, match=message):
        call(*args)


@contextmanager
def at_most(resource_limit, n):
    """Limit what this process and the commands it runs may have. For memory: some machines promise any
    amount, and kill whoever uses it."""
    before = resource.getrlimit(resource_limit)
    resource.setrlimit(resource_limit, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource_limit, before)


def tiny_keys(name, out_dir, *keys):
    """The keys of a run on the tiny dataset; later ones win."""
    return [f"--model={name}", "--dataset=tiny", *SIZES[name], "--batch_size=8", "--eval_interval=4",
            "--eval_iters=1", "--warmup_iters=2", "--device=cpu", "--dtype=float32", f"--out_dir={out_dir}",
            *keys]


def run_tiny(name, out_dir, *keys):
    """Train a tiny model in this process; return its results."""
    train.main(tiny_keys(name, out_dir, *keys))
    return results_of(out_dir)


def resume(out_dir, *keys):
    train.main(["--init_from=resume", f"--out_dir={out_dir}", *keys])
    return results_of(out_dir)


def results_of(folder):
    return json.loads(Path(folder, "results.json").read_text())


def metrics_of(folder):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").open()]


def saved_in(folder, name="last.pt"):
    """A checkpoint of a run, which must be one that loads and is finite."""
    train.load_checkpoint(Path(folder) / name)
    return torch.load(Path(folder) / name, weights_only=True)


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def begin(keys, launcher=(), script="train.py", **options):
    """Start a script beside this process, all that it says in one pipe; ten minutes are its end."""
    process = subprocess.Popen([sys.executable, "-u", *launcher, str(HERE / script), *keys], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    timer = threading.Timer(600, process.kill)
    timer.daemon = True
    timer.start()
    return process


def read_until(process, text):
    """Read what it says up to a line that holds text."""
    assert any(text in line for line in process.stdout), f"it ended without a line that holds {text!r}"


def write_jsonl(path, texts):
    lines = [json.dumps({"text": t, "meta": {"quality": "HIGH"}}, ensure_ascii=False) + "\n" for t in texts]
    Path(path).write_text("".join(lines), encoding="utf-8")


def prepare(dataset, source, *keys):
    data.main([f"--dataset={dataset}", f"--source={source}", "--tokenizer=train", "--vocab_size=512", *keys])


def texts_of(dataset):
    """{split: its documents}, of which each must lie between <s> and </s>, and hold no <unk>."""
    tok, found = data.load_tokenizer(f"data/{dataset}/tokenizer"), {}
    for split, t in data.load_dataset(dataset)[1].items():
        ids = np.array(t, dtype=np.int64)
        parts = np.split(ids, np.flatnonzero(ids == tok.eos_token_id) + 1)[:-1]
        assert all(part[0] == tok.bos_token_id for part in parts) and sum(map(len, parts)) == len(ids)
        assert tok.unk_token_id not in ids
        found[split] = [tok.decode(part[1:-1]) for part in parts]
    return found


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with data/tiny prepared from 400 articles, and a short trained run of each model."""
    folder = tmp_path_factory.mktemp("work")
    with chdir(folder):
        write_jsonl("tiny.jsonl", data.mini_articles(7, 400))
        prepare("tiny", "tiny.jsonl")
        for name in SIZES:
            train.main([f"--model={name}", "--dataset=tiny", *SIZES[name], "--max_iters=30", "--batch_size=8",
                        "--eval_interval=10", "--eval_iters=2", "--learning_rate=5e-3", "--warmup_iters=5"])
    return folder


@pytest.fixture(autouse=True)
def signals_as_usual():
    """A run here leaves its handlers in place; and under nohup, or as a shell's background job, this process
    ignores some signals, and its commands would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in signal.SIGHUP, signal.SIGTERM:
        signal.signal(signum, signal.SIG_DFL)


@pytest.fixture
def here(work, monkeypatch):
    """The same folder, as the current one. Runs in this process draw no picture, which takes longest."""
    monkeypatch.chdir(work)
    monkeypatch.setattr(train, "plot_curves", lambda *_: None)
    return work


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder, as the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def spoilable(here, empty):
    """A copy of the work folder, as the current one, to spoil."""
    shutil.copytree(here / "data", "data")
    shutil.copytree(here / "outputs", "outputs")
    return empty


# ----------------------------------------------------------------------------------------------------
# The models

def test_sizes_are_the_reports_and_impossible_ones_are_refused():
    with torch.device("meta"):
        gpt, lstm = GPT(GPTConfig()), LSTM(LSTMConfig())
    assert gpt.num_params() == 134_367_744 and "134,367,744" in gpt.summary()
    assert lstm.num_params() == 131_054_848 and "131,054,848" in lstm.summary()
    for config_class, changes in ((GPTConfig, {"n_head": 5}), (GPTConfig, {"n_layer": 0}),
                                  (LSTMConfig, {"n_hidden": 0}), (LSTMConfig, {"dropout": 1.0})):
        with pytest.raises(ValueError):
            config_class(**changes)
    model = make("gpt")
    _, state = model.step(tokens(1, 16), model.init_state(1))
    for too_much in (lambda: model.step(tokens(1, 1), state), lambda: model(tokens(1, 17))):
        with pytest.raises(ValueError, match="do not fit in block_size 16"):
            too_much()


@BOTH
def test_forward_gives_causal_logits_and_the_loss_in_bfloat16_too(name):
    """Causal: a later token changes no earlier logit by a single bit."""
    model, (idx, targets) = make(name), inputs_and_targets(3)
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 16, 40) and not logits.requires_grad and loss.requires_grad
    expected = nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    each = model(idx, targets, reduction="none")[1]
    assert each.shape == (3, 16) and close((each, loss), (expected, expected.mean()))
    last, none = model(idx)
    assert none is None and close([last], [logits[:, -1:]])
    changed, _ = model(torch.cat([idx[:, :8], 39 - idx[:, 8:]], dim=1), targets)    # the later tokens alone
    assert torch.equal(changed[:, :8], logits[:, :8]) and not close(changed[:, 8], logits[:, 8])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(idx, targets)[1]
    rounded.backward()
    assert rounded.dtype == torch.float32 and abs(rounded - loss) < 0.05
    assert all(p.grad.isfinite().all() for p in model.parameters())


def outputs_and_gradients(outputs, parameters):
    """The outputs, and gradients to which each of them contributes."""
    generator = torch.Generator().manual_seed(2)
    total = sum((y.double() * torch.randn(y.shape, generator=generator).double()).sum() for y in outputs)
    return [*outputs, *torch.autograd.grad(total, parameters)]


@pytest.mark.parametrize("recurrence, dtype, tolerance", [
    (manual_recurrence, torch.float64, 1e-12), (manual_recurrence, torch.bfloat16, 0.03),
    (scan_recurrence, torch.float64, 1e-12), (scan_recurrence, torch.float32, 1e-5),
    (scan_recurrence, torch.bfloat16, 0.03),
    (cudnn_recurrence, torch.float64, 1e-12), (cudnn_recurrence, torch.float32, 1e-5)])
def test_lstm_equals_nn_lstm(recurrence, dtype, tolerance):
    """The plain stack: outputs, last state, and every gradient, the embedding's and the state's too. cuDNN's
    recurrence on a CPU, where PyTorch plays it."""
    torch.manual_seed(0)
    E, H, L, idx = 5, 7, 3, tokens(3, 9)
    theirs = nn.LSTM(E, H, L).to(dtype)
    ours = LSTM(LSTMConfig(n_embd=E, n_hidden=H, n_layer=L, residual=False, vocab_size=40)).to(dtype)
    ours.blocks.load_state_dict({f"{k}.{n}": getattr(theirs, f"{n}_l{k}") for k in range(L)
                                 for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")})
    h0, c0 = (torch.randn(L, 3, H).to(dtype).requires_grad_() for _ in range(2))
    cell = c0.to(torch.promote_types(dtype, torch.float32))
    y, new = ours._hidden(idx, (h0, cell), recurrence)
    h, c = map(torch.stack, zip(*new))
    assert (y.dtype, h.dtype, c.dtype) == (dtype, dtype, cell.dtype)
    inputs = h0, c0, ours.wte.weight
    got = outputs_and_gradients((y.transpose(0, 1), h, c), [*inputs, *ours.blocks.parameters()])
    h0, c0, wte = inputs = [t.detach().double().requires_grad_() for t in inputs]
    y, (h, c) = theirs.double()(wte[idx.t()], (h0, c0))
    want = outputs_and_gradients((y, h, c), [*inputs, *theirs.parameters()])
    assert all((a - b).norm() <= tolerance * (1 + b.norm()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("T, S", [(8, 8), (1, 8), (3, 8)])
def test_manual_equals_fused_attention(T, S):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (T, S, S))
    mask, seen = causal_mask(torch.arange(S - T, S), S, torch.float64), torch.ones(S, S).tril()[S - T:] == 1
    assert torch.equal(mask == 0, seen) and torch.equal(mask == -torch.inf, ~seen)
    exact, fused, rounded = (outputs_and_gradients([y], (q, k, v)) for y in (
        manual_attention(q, k, v, mask), fused_attention(q, k, v, mask),
        fused_attention(*(t.bfloat16() for t in (q, k, v, mask))).double()))
    assert close(exact, fused)
    assert all((a - b).norm() < 0.03 * b.norm() for a, b in zip(rounded, exact))


@BOTH
@settings(QUICK, max_examples=20)
@given(st.sets(st.integers(1, 15)))
def test_step_in_any_chunks_equals_forward(name, cuts):
    model, idx, t = make(name), tokens(2, 16), 0
    expected, state = model(idx, idx)[0], model.init_state(2)
    for chunk in idx.tensor_split(sorted(cuts), dim=1):
        logits, state = model.step(chunk, state)
        t += chunk.size(1)
        assert logits.shape == (2, 40) and close([logits], [expected[:, t - 1]], 1e-4)


def test_gpt_flops_are_those_of_its_matrix_products():
    from torch.utils.flop_counter import FlopCounterMode
    model = make("gpt", fused_attention=False)
    with FlopCounterMode(display=False) as counter:
        model(tokens(1, 16), tokens(1, 16))[1].backward()
    assert counter.get_total_flops() == 16 * model.flops_per_token()


def test_compiled_equals_eager():
    """Through torch.compile's tracing, without its code generator, which needs a compiler."""
    model, (idx, targets) = make("gpt"), inputs_and_targets()
    losses = [m(idx, targets)[1] for m in (model, torch.compile(model, backend="aot_eager"))]
    assert close(*(outputs_and_gradients([loss], [model.lm_head.weight]) for loss in losses))


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cudnn_equals_the_scan(dtype):
    """The two recurrences on a GPU, forward and backward, under autocast as train.py runs them."""
    torch.backends.cudnn.allow_tf32 = False
    found = []
    for cudnn in (True, False):
        model, (idx, targets) = make("lstm", cudnn=cudnn).cuda(), inputs_and_targets(4)
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            loss = model(idx.cuda(), targets.cuda())[1]
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    assert all((a - b).norm() <= tolerance * (1 + b.norm()) for a, b in zip(*found))


# ----------------------------------------------------------------------------------------------------
# Generation

def continuation(model, idx, n, mode, **settings):
    """(B, n) tokens that generate draws, always with the same seed."""
    generator = torch.Generator().manual_seed(3)
    return torch.stack(list(sample.generate(model, idx, n, generator=generator, mode=mode, **settings)), 1)


@BOTH
@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7},
                                      {"temperature": 0.0}])
def test_all_ways_to_generate_emit_the_same_tokens(name, settings, monkeypatch):
    """naive, cached, and graph, past block_size (16). Without CUDA the graph is played by the captured
    function itself, and the fixed shapes of a GPU by reading the whole cache."""
    model, idx = make(name), tokens(2, 5)
    naive = continuation(model, idx, 50, "naive", **settings)
    assert naive.shape == (2, 50)
    assert torch.equal(naive, continuation(model, idx, 50, "cached", **settings))
    monkeypatch.setattr(model_gpt, "keys_in_use", lambda pos, T, block_size: block_size)
    monkeypatch.setattr(sample, "capture", lambda function: function)
    assert torch.equal(naive, continuation(model, idx, 50, "graph", **settings))


@BOTH
def test_a_decode_step_never_looks_at_a_value_on_the_device(name):
    """So it fits into a CUDA graph. Tensors on the meta device have no values: a look would raise."""
    with torch.device("meta"):
        model = make(name)
        state = model.init_state(3)
        logits, new = model.step(torch.zeros(3, 1, dtype=torch.int64), state)
        assert all(a is b for a, b in zip(state, new))      # written in place, where the next replay reads
        assert sample.pick(logits, torch.rand(3, 1), 0.8, top_k=5, top_p=0.9).shape == (3,)


@CUDA
@pytest.mark.parametrize("batch", [1, 3])
@BOTH
def test_a_cuda_graph_emits_the_tokens_of_the_other_ways(name, batch):
    model, idx = make(name).cuda(), tokens(batch, 5).cuda()
    modes = "graph", "cached", "naive", "graph", "compiled"
    first, *others = [continuation(model, idx, 50, mode) for mode in modes]
    assert all(torch.equal(first, other) for other in others)


@BOTH
def test_generation_past_block_size_is_the_models_own(name):
    """Greedy, each row of a batch beside a reference that knows of no cache and no batch: a full window
    keeps its newest half."""
    model, idx = make(name), tokens(3, 5)
    for ids, row in zip(idx.tolist(), continuation(model, idx, 40, "cached", temperature=0.0).tolist()):
        first = 0
        for token in row:
            if name == "gpt" and len(ids) - first > 16:
                first = len(ids) - 8
            assert token == model(torch.tensor([ids[first:]]))[0][0, -1].argmax()
            ids.append(token)


@pytest.mark.skipif("qnnpack" not in torch.backends.quantized.supported_engines, reason="needs qnnpack")
def test_int8_works_where_pytorch_chose_no_engine(monkeypatch):
    """As on macOS. Here the engine cannot be set to none, so a stand-in says so."""
    with mock.patch("torch.backends.quantized", engine="none") as chosen:
        sample.int8_multiplier(torch.ones(4, 8))
    assert chosen.engine == "qnnpack"
    monkeypatch.setattr(torch.backends.quantized, "engine", "qnnpack")
    w, x = torch.randn(64, 32), torch.randn(1, 3, 32)
    assert (sample.int8_multiplier(w)(x) - x @ w.T).norm() < 0.03 * (x @ w.T).norm()


@BOTH
@pytest.mark.parametrize("dtype, kind, tolerance", [
    (torch.float32, "multiplier", 1e-5), (torch.bfloat16, "multiplier", 0.02),
    (torch.float16, "multiplier", 0.02), (torch.int8, "int8_multiplier", 0.05)])
def test_a_cpus_weights_multiply_as_matrices(name, dtype, kind, tolerance):
    """Those of int8 as the matrices rounded to 255 values per output channel."""
    plain = make(name).to(torch.float32 if dtype == torch.int8 else dtype)
    matrices = [p for m in plain.modules() for p in m.parameters(recurse=False)
                if p.dim() == 2 and not isinstance(m, nn.Embedding)]
    for w in matrices * (dtype == torch.int8):
        scale = w.data.abs().amax(1, keepdim=True) / 127
        w.data = (w.data / scale).round() * scale
    with mock.patch.object(sample, kind, wraps=getattr(sample, kind)) as made:
        ours = sample.to_dtype(make(name), dtype)
    weights = sum(isinstance(w, sample.Weight) for m in ours.modules() for w in vars(m).values())
    assert weights == made.call_count == len(matrices) > 5
    for batch in 1, 3:
        states = plain.init_state(batch), ours.init_state(batch)
        for n in 5, 1, 1:       # the prompt, then single rows
            idx = tokens(batch, n)
            (expected, _), (got, _) = (m.step(idx, s) for m, s in zip((plain, ours), states))
            assert (got - expected).float().norm() < tolerance * expected.float().norm() > 0
    assert torch.equal(continuation(ours, idx, 20, "cached"), continuation(ours, idx, 20, "cached"))


def test_what_each_dtype_means_for_a_device():
    refuses("needs --device=cpu", train.choose_dtype, "int8", torch.device("cuda"))
    assert train.choose_dtype("auto", torch.device("mps"))[0] == torch.float16
    assert train.choose_dtype("auto", torch.device("mps"), "gpt")[0] == torch.float32
    assert train.choose_dtype("auto", torch.device("cuda"), "lstm")[0] == torch.float16
    with pytest.raises(TypeError, match="no more than F.linear"):
        torch.mm(torch.ones(2, 2), sample.Weight(None))
    for dtype, precision in ((torch.bfloat16, "high"), (torch.float32, "highest")):
        model = sample.to_dtype(make("gpt"), dtype)
        assert model.wte.weight.dtype == dtype and torch.get_float32_matmul_precision() == precision


def test_each_process_of_a_torchrun_needs_a_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(train, "devices_present", lambda: ["cuda", "mps"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in "cuda", "mps":
        refuses("2 processes need a GPU each: lower --nproc_per_node", train.choose_device, name)


def test_draws_follow_the_softmax_that_temperature_top_k_and_top_p_leave():
    logits, n = torch.linspace(-2, 2, 20), 40_000
    uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    many = logits[torch.randperm(20, generator=torch.Generator().manual_seed(0))].expand(n, 20)
    for temperature in (0.5, 1.0, 1.5):
        expected = n * (many[0] / temperature).softmax(0)
        drawn = torch.bincount(sample.pick(many, uniform, temperature), minlength=20)
        assert ((drawn - expected) ** 2 / expected).sum() < 43.8    # 19 degrees of freedom, p = 0.001
    assert sample.pick(many[:1], None, 0) == many[0].argmax()
    assert set(sample.pick(many, uniform, top_k=3).tolist()) == set(many[0].topk(3).indices.tolist())
    p, order = many[0].softmax(0).sort(descending=True)
    kept = order[:int((p.cumsum(0) < 0.5).sum()) + 1]       # the fewest likeliest that reach a half
    assert set(sample.pick(many, uniform, top_p=0.5).tolist()) == set(kept.tolist())
    for row in (torch.zeros(1, 7), torch.full((1, 7), float("nan"))):       # never outside the vocabulary
        for edge in (0.0, 1 - 2 ** -24, 1.0):
            assert 0 <= sample.pick(row, torch.tensor([[edge]])).item() < 7


@pytest.mark.parametrize("num_samples", [1, 4])
def test_a_continuation_ends_before_its_end_mark(num_samples, monkeypatch):
    model, ids, tok = make("gpt"), [1, 2, 3], mock.Mock(bos_token_id=1, eos_token_id=-1)   # no token is -1
    tok.backend_tokenizer.decode.return_value = ""
    monkeypatch.setattr(data, "encode", lambda tok, texts: [[2, 3]])
    config = sample.SampleConfig(max_new_tokens=30, num_samples=num_samples)
    free, _ = sample.continue_prompt(model, tok, config)
    assert len(free) == num_samples and all(row[:3] == ids and len(row) == 33 for row in free)
    tok.eos_token_id = eos = free[0][20]
    rows, speed = sample.continue_prompt(model, tok, config)
    assert rows == [row[:row.index(eos, 3)] if eos in row[3:] else row for row in free] and speed > 0
    monkeypatch.setattr(data, "encode", lambda tok, texts: [[2] * 40])      # cut to a context of 16
    tok.eos_token_id = -1
    assert {len(row) for row in sample.continue_prompt(model, tok, config)[0]} == {16 + 30}
    monkeypatch.setattr(data, "encode", lambda tok, texts: [[2, 40]])
    refuses("more entries than its model", sample.continue_prompt, model, tok, config)


def test_streamed_text_never_breaks_a_character(here, monkeypatch, capsys):
    """One that spans several tokens is shown when it is whole; so is the text after bytes that are none."""
    tok, said = data.load_tokenizer("data/tiny/tokenizer"), []
    monkeypatch.setattr(sample, "print", lambda *a, **k: said.extend(a[:1]) or print(*a, **k), raising=False)
    texts = ["Raz zażółć gęślą jaźń 🦊🇵🇱 — ☃ " * 9 + "🦊", "Raz " + "日本語" * 60]
    prompt, *drawn = data.encode(tok, ["Raz", *texts])
    odd = tok.convert_tokens_to_ids(["<0x3A>", "<0xC5>", "▁w", "▁w", "<0x3A>"])
    for ids, text in zip([ids[len(prompt):] for ids in drawn] + [odd], [*texts, "Raz:\ufffd w w:"]):
        ids = iter([*ids, tok.eos_token_id])
        monkeypatch.setattr(sample, "pick", lambda *_: torch.full((1,), next(ids)))
        sample.main(["--prompt=Raz", "--max_new_tokens=900", "--device=cpu", "--out_dir=outputs/rnn"])
        assert capsys.readouterr().out.startswith(text + "\n[lstm") and not list(ids)
    assert "\ufffd" not in "".join(said[:-6]) and "語" in said and "🦊" in said


# ----------------------------------------------------------------------------------------------------
# Data

def test_mini_is_reproducible_varied_and_grammatical():
    articles = list(data.mini_articles(1, 2000))
    assert articles == list(data.mini_articles(1, 2000)) != list(data.mini_articles(2, 2000))
    text = "\n".join(articles)
    assert len(set(articles)) == 2000 and len(set(re.findall(r"\w+", text))) > 2500
    for wrong in r"[{}|:]|  ", r"\w[kg][ye]\b", r"\b(Jan|Roman) \w+owska\b", r"\b(Anna|Ewa) \w+owski\b":
        assert not re.search(wrong, text), re.search(wrong, text)
    counted = re.findall(r"(?:mieszka|sta)ł(\w+) tam (\d+) (\w+)\.", text)
    for ending, n, noun in counted:     # 22 domy stały, but 12 domów stało
        few = n[-1] in "234" and n[-2:-1] != "1"
        assert ending + " " + noun in (("y osoby", "y domy") if few else ("o osób", "o domów"))
    assert len(set(counted)) > 100
    castle, woman = data.Word("kościółek", "śląsk"), data.Word("Anna", "Dębowsk")
    assert f"{castle} - {castle:gen} - {castle:ins}" == \
        "kościółek śląski - kościółka śląskiego - kościółkiem śląskim"
    assert f"{woman:acc}, {woman:dat}" == "Annę Dębowską, Annie Dębowskiej" and woman.past == "a"


def test_a_documents_split_hangs_on_its_text_and_the_seed_alone(empty):
    """Not on the number of workers, nor on its place; identical documents stay, and share a split."""
    texts = [f"Dokument numer {i}, zawsze inny." for i in range(301)] * 2
    write_jsonl("a.jsonl", texts)
    command("data.py", "--dataset=one", "--source=a.jsonl", "--tokenizer=train", "--vocab_size=512",
            env={"RAYON_NUM_THREADS": "1"})
    prepare("many", "a.jsonl")
    (meta, splits), (again, _) = (data.load_dataset(name) for name in ("one", "many"))
    assert meta["splits"] == again["splits"]
    prepare("other", "a.jsonl", "--tokenizer=data/one/tokenizer", "--seed=5")
    counts, other = ({split: Counter(found) for split, found in texts_of(name).items()}
                     for name in ("one", "other"))
    assert counts != other
    assert sum(counts.values(), Counter()) == sum(other.values(), Counter()) == Counter(texts)
    for split, found in counts.items():
        assert set(found.values()) == {2} and meta["splits"][split]["documents"] == found.total()
        assert splits[split].dtype == np.uint16 and splits[split].max() < meta["vocab_size"]
    shares = Counter(part[0] for part in data.parts_of(map(str, range(10_000)), 1, by_place=False))
    assert [shares[split] / 1000 for split in data.SPLITS] == pytest.approx([8, 1, 1], abs=0.1)


def test_a_tokenizer_of_32000_entries_gives_polish_text_back():
    rng = np.random.default_rng(0)
    consonants = "b c ć d f g h j k l ł m n ń p r s ś t w z ź ż cz sz rz".split()
    syllables = [a + b for a in consonants for b in "aeiouyąęó"]
    words = ["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(40_000)] * 3
    tok = data.train_tokenizer((" ".join(words[i:i + 100]) for i in range(0, len(words), 100)), 32_000)
    unseen = "ĄĆĘŁŃ 🦊 🇵🇱 日本語 עברית \u200f\t\n\n NUL\x00w <s> </s> <unk> 1234,5 "
    text = " ".join([*words[:5000], unseen])
    ids = np.array(data.encode(tok, [text])[0], dtype="<u2")
    assert len(tok) == 32_000 and ids.max() > 31_000 and tok.decode(ids.astype(np.int64)) == text
    assert not {tok.bos_token_id, tok.eos_token_id, tok.unk_token_id} & set(ids.tolist())


def test_batches_are_a_permutation_and_replay():
    n, batch = 50, 8
    seen, other = ([w for step in range(25) for w in data.train_windows(n, step, batch, seed)]
                   for seed in (5, 6))
    epochs = [seen[i:i + n] for i in range(0, 4 * n, n)]        # 25 * 8 = 4 * 50
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] and seen != other
    parts = [data.train_windows(n, 17, batch, 5, rank, 4) for rank in range(4)]
    assert data.train_windows(n, 17, batch, 5) == sum(parts, []) == seen[17 * batch:18 * batch]
    numbers = np.arange(1000, dtype=np.uint16)
    idx, targets = data.get_batch(numbers, [0, 3], 20, "cpu")
    assert idx.tolist() == [list(range(20)), list(range(60, 80))] and torch.equal(targets, idx + 1)
    assert [data.count_windows(numbers[:k], 20) for k in (20, 21, 40, 41)] == [0, 1, 1, 2]
    with mock.patch("torch.from_numpy") as made:    # MPS reads late what it is told not to wait for
        data.get_batch(numbers, [0], 20, "mps")
    assert made.return_value.to.call_args == mock.call("mps")


@contextmanager
def served(folder):
    """Serve the files of a folder, whatever path they are asked for under, on this machine alone and as long
    as the block lasts -> the URL. The headers are those of the Hugging Face hub."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path):
            return str(folder / Path(path).name)

        def end_headers(self):
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("X-Error-Code", "EntryNotFound")       # read where the status is 404
            self.send_header("ETag", f'"{Path(self.path).name}"')
            super().end_headers()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def test_a_hub_tokenizer_is_fetched_once_and_then_found_offline(work, empty):
    keys = ["--dataset=tiny", f"--source={work}/tiny.jsonl"]        # the default tokenizer, from the hub
    env = {"HF_HOME": str(empty / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    with served(work / "data/tiny/tokenizer") as env["HF_ENDPOINT"]:
        command("data.py", *keys, env=env)
    first = data.load_dataset("tiny")[0]
    assert first["tokenizer"] == "speakleash/Bielik-4.5B-v3" and first["vocab_size"] == 512
    command("data.py", *keys, env=env)      # the server is gone
    assert data.load_dataset("tiny")[0] == first


def test_plwiki_through_the_real_speakleash_client(work, empty, monkeypatch):
    from speakleash.config_loader import ConfigLoader
    rows = [{"text": f"{quality} artykuł {i}. " + "Treść hasła. " * 9, "meta": {"quality": quality}}
            for i in range(60) for quality in ("HIGH", "MEDIUM", "LOW")]
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packed = zstandard.compress(raw[:999]) + zstandard.compress(raw[999:])
    Path("plwiki.jsonl.zst").write_bytes(packed)
    Path("speakleash.json").write_text('[{"name": "plwiki"}]')
    Path("plwiki.manifest").write_text(json.dumps({"stats": {"documents": 180}, "file_size": len(packed)}))
    with served(empty) as url:
        urls = {"url_datasets_text_pl": f"{url}/"}
        monkeypatch.setattr(ConfigLoader, "load_config", staticmethod(lambda: urls))
        data.main(["--dataset=plwiki", f"--tokenizer={work}/data/tiny/tokenizer", "--n_docs=50"])
        with mock.patch("speakleash.dataset.SpeakleashDataset.check_file", side_effect=OSError(28, "full")):
            with pytest.raises(OSError, match="full"):      # no fault of the network's
                data.fetch_plwiki(empty)
    found = sum(texts_of("plwiki").values(), [])
    assert len(found) == 50 and all(text.startswith("HIGH artykuł") for text in found)


def test_unreachable_hub_and_speakleash_are_told_in_one_line_in_time(empty, monkeypatch):
    """A server that accepts and never answers is the worst case: the clients know no time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url, start = f"http://127.0.0.1:{silent.getsockname()[1]}", time.time()
        _, line = command("data.py", code=1, env={"HF_ENDPOINT": url, "HF_HOME": str(empty)})
        assert re.fullmatch("error: .*--tokenizer=.*mini\n", line) and time.time() - start < 60
    monkeypatch.setattr(data, "reachable", lambda url: False)
    refuses("--source=FILE.*mini", data.fetch_plwiki, empty / "x")
    assert not Path("data/plwiki").exists()


GOOD = json.dumps({"text": "Dokument. " * 9, "meta": {"quality": "HIGH"}}).encode() + b"\n"
BAD_SOURCES = {
    "empty.jsonl": (b"", "too little text"),
    "blank.txt": (b" \n\n", "too little text"),
    "low.jsonl": (GOOD.replace(b"HIGH", b"LOW"), "Take more, --quality=ALL"),
    "not.jsonl.zst": (b"plain text", "not a zstd file"),
    "broken.jsonl": (GOOD * 4999 + b"{oops\n", "line 5000: not {"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "line 1: not {"),
    "frames.jsonl.zst": (zstandard.compress(GOOD * 50) + zstandard.compress(GOOD * 50)[:-9], "damaged one"),
    "notext.jsonl": (GOOD + b'{"content": "kot"}\n', '"meta": {...}} but {"content": "kot"}'),
    "cut.jsonl.zst": (zstandard.compress(GOOD * 50_000)[:-99], "damaged one"),
    "long.jsonl": (GOOD + b" " * 10_000, "longer than 10,000 characters"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: not {"),
    "latin2.txt": ("zażółć".encode("iso-8859-2"), "convert it by `iconv"),
    "few.jsonl": (GOOD * 9, "too little text"),      # identical, so that they share a split
    "short.txt": (b"Dwa.", "too little text"),
    "wrong.csv": (b"a,b\n", ".jsonl, .jsonl.zst or .txt"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
def test_bad_sources_are_refused_and_leave_nothing(name, empty, monkeypatch):
    content, message = BAD_SOURCES[name]
    monkeypatch.setattr(data, "LONGEST_LINE", 10_000 if name == "long.jsonl" else 200_000)
    Path(name).write_bytes(content)
    refuses(re.escape(message), prepare, "bad", name)
    assert not list(Path().glob("data/*"))


def test_awkward_documents_survive(empty):
    """Every document that is not blank comes back as it was; marks of control in a text stay text."""
    endless = "ab" * 5_000_000      # no space: cut every 25,000 characters, and a space put there
    plain = [f"Dokument {i}" for i in range(60)] + [
        "\ufeffBOM na początku", "wiersz\r\nCRLF\n\n", "zero\x00bajt", "</s><s> wewnątrz <unk>",
        "🦊" * 50, "raz", "raz", "\u200fמימין לשמאל\u202e", "  spacje z przodu i z tyłu ",
        "słowo " * 50_000]
    lines = [json.dumps({"text": t}) for t in ["", "  \n ", "\t\u2003", *plain, "dolna▁kreska", endless]]
    lines.append('{"text": "pół znaku \\ud83e tutaj"}')
    Path("a.jsonl").write_text("\ufeff" + "\r\n\n".join(lines), encoding="utf-8", newline="")
    prepare("odd", "a.jsonl")
    expected = [*plain, "dolna kreska", "pół znaku ? tutaj", " ".join(data.cut(endless))]
    assert Counter(sum(texts_of("odd").values(), [])) == Counter(expected)


@pytest.mark.parametrize("between", ["\r\n", " ", " " + "x" * 510 + " "], ids=["lines", "one line", "uneven"])
def test_a_txt_is_one_text_cut_by_its_length(between, empty):
    text = " ".join(f"Wiersz {i}, zażółć gęślą jaźń." for i in range(3000))
    text = text[:len(text) // 2].replace(" Wiersz", between + "Wiersz") + text[len(text) // 2:]
    name = "a\udcb1.txt" if sys.platform == "linux" else "a.txt"       # a file's name can be in any encoding
    Path(name).write_text(text, encoding="utf-8", newline="")
    prepare("book", name)
    meta, splits = data.load_dataset("book")
    assert sum(facts["characters"] for facts in meta["splits"].values()) == len(text)
    tok = data.load_tokenizer("data/book/tokenizer")
    ids = np.concatenate(list(splits.values()))
    assert np.flatnonzero(ids == tok.bos_token_id).tolist() == [0]
    assert np.flatnonzero(ids == tok.eos_token_id).tolist() == [len(ids) - 1]
    parts = [tok.decode(t.astype(np.int64), skip_special_tokens=True) for t in splits.values()]
    shares = [len(part) / len(text) for part in parts]
    assert " ".join(parts) == text and shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


@QUICK
@given(st.text(alphabet="ab \n", max_size=60), st.integers(2, 20))
def test_a_long_document_is_cut_without_loss(text, most):
    """But for the spaces at which it is cut: in each part's second half, else nowhere."""
    *parts, last = data.cut(text, most)
    assert all(most // 2 <= len(part) <= most for part in parts)
    assert len(last) <= most and bool(last) == bool(text)
    assert "".join(part + " " * (len(part) < most) for part in parts) + last == text


@pytest.mark.skipif(not LONG, reason="over an hour: LONG=1")
def test_a_source_of_5_gb_is_prepared_in_less_than_1_gb(empty):
    """5 GB, spelled in 400 ciphers so that new words keep coming."""
    letters, k = "aąbcćdeęfghijklłmnńoóprsśtuwyzźż", 0
    articles = "\n".join(data.mini_articles(1, 40_000))
    with open("big.jsonl", "w", encoding="utf-8") as out:
        while out.tell() < 5e9:
            cipher = str.maketrans(letters, "".join(random.Random(k).sample(letters, len(letters))))
            out.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n"
                           for text in articles.translate(cipher).split("\n"))
            k += 1
    process = subprocess.Popen([sys.executable, str(HERE / "data.py"), "--dataset=big", "--source=big.jsonl",
                                "--tokenizer=train", "--vocab_size=8192"])
    _, status, usage = os.wait4(process.pid, 0)
    x = round(usage.ru_maxrss * 1024 / 1e9, 2)
    print(f"peak {x} GB")
    Path("big.jsonl").unlink()
    shutil.rmtree("data")
    assert status == 0 and x < 1


def test_an_old_dataset_outlives_a_killed_preparation_and_a_whole_one_sets_it_aside(work, empty):
    """Also behind a link; a folder that holds no dataset stays as it is."""
    write_jsonl("new.jsonl", data.mini_articles(9, 4000))
    keys = ["--dataset=new", "--source=new.jsonl", "--tokenizer=train", "--vocab_size=1000"]
    for i, signum in enumerate((signal.SIGKILL, signal.SIGKILL, signal.SIGHUP)):
        if i == 1:          # at first nothing was there; from now on an older dataset
            shutil.copytree(work / "data/tiny", "data/new")
            Path("data/new/notes.txt").write_text("moje")
            older = files_of("data/new")
        process = begin(keys, script="data.py")
        while process.poll() is None and not list(empty.glob("data/.new-*/new/train.bin")):
            time.sleep(0.002)
        process.send_signal(signum)
        assert process.wait() == (129 if i == 2 else -signal.SIGKILL) and Path("data/new").exists() == (i > 0)
        if i < 2:
            shutil.rmtree(next(empty.glob("data/.new-*")))
    assert files_of("data/new") == older and not list(empty.glob("data/.new-*"))
    prepare("new", work / "tiny.jsonl")
    aside, = Path("data/previous").iterdir()
    assert files_of(aside) == older and "notes.txt" not in files_of("data/new")
    Path("data/link").symlink_to("new")
    prepare("link", work / "tiny.jsonl")
    assert Path("data/link").is_symlink() and len(list(Path("data/previous").iterdir())) == 2
    assert data.load_dataset("new")[0]["dataset"] == "link"
    Path("data/mine").mkdir()
    shutil.copy(work / "tiny.jsonl", "data/mine")
    refuses("no dataset's", prepare, "mine", "data/mine/tiny.jsonl")
    assert files_of("data/mine").keys() == {"tiny.jsonl"}


def test_a_tokenizer_folder_never_runs_its_code(work, empty):
    shutil.copytree(work / "data/tiny/tokenizer", "evil")
    config = json.loads(Path("evil/tokenizer_config.json").read_text())
    Path("evil/evil.py").write_text("open('ran', 'w')\nclass EvilTokenizer: pass\n")
    for name in ("PreTrainedTokenizerFast", "EvilTokenizer"):
        config.update(tokenizer_class=name, auto_map={"AutoTokenizer": ["evil.EvilTokenizer"] * 2})
        Path("evil/tokenizer_config.json").write_text(json.dumps(config))
        with suppress(UserError):
            data.load_tokenizer("evil")
        assert not Path("ran").exists()


FOREIGN = {     # tokenizers, each a function that changes a tokenizer.json
    "high": (lambda t: t["model"]["vocab"].update(zzz=70_000), "ids up to 70,000"),
    "hole": (lambda t: t["model"]["vocab"].update(zzz=700), None),
    "no unknown": (lambda t: (t["model"].update(unk_token=None, byte_fallback=False)), None),
    "panic": (lambda t: t["normalizer"].update(type="Precompiled", precompiled_charsmap="AAAA"), "cannot"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_tokenizers_are_used_or_refused(kind, work, empty):
    change, message = FOREIGN[kind]
    shutil.copytree(work / "data/tiny/tokenizer", "foreign")
    tokenizer = json.loads(Path("foreign/tokenizer.json").read_text())
    change(tokenizer)
    Path("foreign/tokenizer.json").write_text(json.dumps(tokenizer))
    write_jsonl("a.jsonl", [*data.mini_articles(7, 300), "zażółć 🦊"])
    if message:
        return refuses(message, prepare, "a", "a.jsonl", "--tokenizer=foreign")
    prepare("a", "a.jsonl", "--tokenizer=foreign")
    meta, splits = data.load_dataset("a")
    assert meta["vocab_size"] == (701 if kind == "hole" else 512) > max(t.max() for t in splits.values())


def test_what_is_left_out_is_counted(empty, capsys):
    rows = [{"text": t, "meta": {"quality": q}} for t in data.mini_articles(7, 100) for q in ("HIGH", "LOW")]
    Path("a.jsonl").write_text("\n".join(json.dumps(row) for row in [*rows, {"text": " "}]) + "\n\n")
    prepare("a", "a.jsonl", "--vocab_size=32000")
    said = capsys.readouterr().out
    assert "left out: 100 documents of quality LOW" in said and "left out: 1 blank documents" in said
    assert re.search(r"it has [\d,]+: the text has no more pieces", said)


@pytest.mark.parametrize("ending", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_while_a_text_is_encoded_is_no_fault_of_the_tokenizer(ending):
    with pytest.raises(type(ending)):
        data.encode(mock.Mock(side_effect=ending), ["Raz"])


@pytest.mark.parametrize("damage", ["token", "cut", "missing", "meta", "version"])
def test_damaged_data_folders_are_refused(damage, spoilable):
    binary, meta_json = Path("data/tiny/val.bin"), Path("data/tiny/meta.json")
    raw, meta = binary.read_bytes(), json.loads(meta_json.read_text())
    {"token": lambda: binary.write_bytes(b"\xff\xff" + raw[2:]), "cut": lambda: binary.write_bytes(raw[:-1]),
     "missing": binary.unlink, "meta": lambda: meta_json.write_text("{"),
     "version": lambda: meta_json.write_text(json.dumps({**meta, "format_version": 99}))}[damage]()
    refuses("damaged", data.load_dataset, "tiny")


# ----------------------------------------------------------------------------------------------------
# The command line

CONFIGS = {data: [data.DataConfig], sample: [sample.SampleConfig], bench: [bench.BenchConfig],
           train: [TrainConfig, GPTConfig, LSTMConfig]}
MISTAKES = [
    (train, "--learning_rat=1e-3", "did you mean --learning_rate?"),
    (train, "--learning=1e-3", "unknown key --learning,"),
    (train, "--two\nlines=1", "unknown key --two\nlines"),
    (train, "--n_head=4 --model=lstm", "unknown key --n_head"),
    (train, "batch_size=3", "did you mean --batch_size?"),
    (train, "--batch_size", "--batch_size"),
    (train, "--batch_size=2.5", "--batch_size"),
    (train, "--batch_size=0", "batch_size must be at least 1"),
    (train, "--wandb_log=maybe", "--wandb_log"),
    (train, "--model=rnn", "--model: invalid choice"),
    (train, "--dataset=nothere", "python data.py --dataset=nothere"),
    (train, "--dataset=../tiny", "of letters"),
    (data, "--dataset=previous --source=tiny.jsonl", "choose another name"),
    (train, "--dataset=tiny --vocab_size=7", "below the dataset's"),
    (train, "--dataset=tiny --block_size=100000000000000", "too small"),
    (train, "--dataset=tiny --n_head=7", "n_head"),
    (train, "--dataset=tiny --n_layer=1000000000", "n_layer must be at most 1000"),
    (train, "--dataset=tiny --max_minutes=0", "max_iters"),
    (train, "--out_dir=.", "--out_dir"),
    (train, "--out_dir=out/previous", "choose another name"),
    (train, "--out_dir=out/new\nline", "printable"),
    (train, "--out_dir=out/\udcff", "printable"),
    (train, "--init_from=resume --out_dir=out/none", "run `python train.py --out_dir=out/none`"),
    (train, "--init_from=resume --batch_size=9", "has --batch_size=8, not 9"),
    (train, "--init_from=resume --out_dir=outputs/transformer --model=lstm", "has --model=gpt, not lstm"),
    (train, "--init_from=resume --out_dir=outputs/rnn --n_head=5", "--n_head"),
    (train, "--init_from=resume --n_layer=3", "has --n_layer=2, not 3"),
    (sample, f"--device={'cuda' if torch.backends.mps.is_available() else 'mps'}", "there is none here"),
    (sample, "--top_p=1.5", "top_p"),
    (sample, "--top_p=1e-50", "top_p"),
    (sample, "--export=tiny.jsonl", "cannot write tiny.jsonl/config.json (Not a directory)"),
    (sample, "--temperature=inf", "finite"),
    (sample, "--compile=True --device=cpu", "needs --device=cuda"),
    (sample, "--out_dir=out/none", "python train.py"),
    (sample, "--model=lstm --out_dir=outputs/transformer", "holds a gpt"),
    (bench, "--device=tpu", "--device: invalid choice"),
    (bench, "--compare=True --out_dir=nothere", "no finished run"),
    (data, "--dataset=books", "needs --source"),
    (data, "--source=~/nothere.txt --tokenizer=train", f"{Path.home()}/nothere.txt: no such .jsonl"),
    (data, "--dataset=x --source=tiny.jsonl --tokenizer=train --vocab_size=70000", "512 to 65536"),
    (data, "--dataset=x --source=tiny.jsonl --tokenizer=outputs", "cannot load the tokenizer"),
]


@pytest.mark.parametrize("script, keys, message", MISTAKES)
def test_mistakes_end_in_one_clear_line(script, keys, message, here):
    def files():
        return {p for p in here.rglob("*") if "out" not in p.relative_to(here).parts and p.suffix != ".lock"}

    before = files()
    refuses(re.escape(message), script.main, keys.split(" "))
    assert files() == before


def test_too_little_memory_or_disk_is_told_in_one_line(here):
    with at_most(resource.RLIMIT_DATA, 2 ** 36):
        line = command("train.py", *tiny_keys("gpt", "out/huge", "--n_embd=1e9", "--n_head=1"), code=1)[1]
    assert re.fullmatch("error: .*memory.*--batch_size.*\n", line)
    for message in ("No space left on device (os error 28)", "Invalid buffer size: 15.62 GiB",
                    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"):
        with mock.patch("sys.exit") as end:
            data.run(mock.Mock(side_effect=RuntimeError(message)))
        assert end.call_args[0][0].startswith(f"error: {message}: lower --batch_size")
    with mock.patch("sys.exit") as end:
        data.run(mock.Mock(side_effect=UserError("--two\nlines")))
    end.assert_called_with("error: --two lines")
    with pytest.raises(RuntimeError):           # a fault of the code keeps its traceback
        data.run(mock.Mock(side_effect=RuntimeError("an illegal memory access was encountered")))


@pytest.mark.parametrize("line, code, said", [
    ("sample.py --prompt=Źdźbło --max_new_tokens=5 <&- 2>&-", 0, "?d?b?o"),
    ("sample.py --prompt=Źdźbło --max_new_tokens=5 >&-", 0, ""),
    ("bench.py --help | true; exit ${PIPESTATUS[0]}", 141, "")])
def test_a_stream_that_is_closed_left_or_without_polish_letters_is_no_traceback(line, code, said, here):
    """bash closes the stream, or its reader goes away; the terminal knows ASCII alone."""
    # buffered, as a user's: the rest of the help waits in the buffer when its reader is gone
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
    done = subprocess.run(["bash", "-c", f"{sys.executable} {HERE}/{line}"], env=env, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == code and not done.stderr and done.stdout.startswith(said)


def test_keys_are_of_their_fields_types():
    for typed, key, value in (
            ("--batch_size=3", "batch_size", 3), ("--batch_size 3", "batch_size", 3),
            ("--max_iters=1e3", "max_iters", 1000), ("--seed=9007199254740993", "seed", 9007199254740993),
            ("--max_minutes=5", "max_minutes", 5.0), ("--wandb_log False", "wandb_log", False),
            ("--compile=True", "compile", True), ("--wandb_run_name=a=b", "wandb_run_name", "a=b")):
        values = data.parse_args(typed.split(), "", TrainConfig)
        assert values == {key: value} and type(values[key]) is type(value)

    # a layer of settings may come from a file, so every value is checked; later layers win
    config = data.configure(TrainConfig, {"batch_size": 4, "seed": 1, "n_head": 7}, {"batch_size": 5})
    assert (config.batch_size, config.seed, config.min_lr) == (5, 1, None)
    for layer in ({"batch_size": "4"}, {"batch_size": 4.0}, {"batch_size": True}, {"learning_rate": None},
                  {"model": "rnn"}, {"model": 3}, {"wandb_log": 1}, {"seed": -1}, {"seed": 2 ** 63},
                  {"max_minutes": float("nan")}, {"max_minutes": float("inf")}, {"grad_clip": -0.5}):
        refuses(f"--{list(layer)[0]}.*: must be", data.configure, TrainConfig, layer)


@pytest.mark.parametrize("script", CONFIGS)
def test_help_lists_every_key_with_default_and_meaning(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert not end.value.code and max(map(len, text.splitlines())) <= 100 and "def " not in text
    for config in CONFIGS[script]:
        for f in fields(config):
            shown = re.findall(rf"^    {f.name}: .*? = (.+?) +# .{{8}}", text, re.M)
            assert f.default in map(ast.literal_eval, shown), f.name


@QUICK
@given(st.lists(st.text(max_size=12) | st.builds(
    "--{}{}{}".format, st.sampled_from([*vars(TrainConfig()), "x"]), st.sampled_from(["=", " "]),
    st.text(max_size=8))))
def test_any_arguments_are_parsed_or_refused(argv):
    with suppress(UserError):
        values = data.parse_args([a for a in argv if a != "--help" and a[:2] != "-h"], "", TrainConfig)
        data.configure(TrainConfig, values)


# ----------------------------------------------------------------------------------------------------
# Training

@BOTH
def test_a_run_leaves_what_it_promises(name, here):
    folder = Path(train.MODELS[name][2])
    results, metrics = results_of(folder), metrics_of(folder)
    assert {p.name for p in folder.iterdir()} == {
        "ckpt.pt", "last.pt", "tokenizer", "model_summary.txt", "metrics.jsonl", "results.json",
        "learning_curves.png"}
    assert results.keys() == {
        "test_loss", "test_perplexity", "test_bits_per_character", "train_loss", "train_perplexity",
        "val_loss", "val_perplexity", "best_step", "steps", "tokens_seen", "minutes", "tokens_per_second",
        "peak_memory_gb", "n_params", "device", "dtype", "optimizers", "config", "test_loss_by_position"}
    assert [m["step"] for m in metrics] == [0, 10, 20, 30]
    assert " ".join(metrics[0]) == ("step tokens_seen minutes train_loss train_perplexity val_loss "
                                    "val_perplexity learning_rate tokens_per_second")
    assert metrics[-1]["val_loss"] < metrics[0]["val_loss"] - 0.3
    assert results["steps"] == 30 and results["tokens_seen"] == 30 * 8 * 32
    assert results["val_loss"] == min(m["val_loss"] for m in metrics)
    assert results["test_perplexity"] == pytest.approx(np.exp(results["test_loss"]))
    model = train.load_checkpoint(folder / "ckpt.pt")["model"]
    ids = torch.tensor(data.load_dataset("tiny")[1]["test"].astype(np.int64))
    n = (len(ids) - 1) // 32 * 32
    with torch.no_grad():       # the whole test split, as one batch
        each = model(ids[:n].view(-1, 32), ids[1:n + 1].view(-1, 32), reduction="none")[1]
    by_position = results["test_loss_by_position"]
    assert abs(each.mean() - results["test_loss"]) < 0.02      # the run may have used bfloat16
    assert close([each.mean(dim=0)], [torch.tensor(by_position)], 0.05)
    assert np.mean(by_position) == pytest.approx(results["test_loss"], abs=1e-4) and saved_in(folder)
    assert results["optimizers"] == ["AdamW"] + ["Muon"] * (name == "gpt")
    characters = sum(map(len, texts_of("tiny")["test"]))
    assert results["test_bits_per_character"] == \
        pytest.approx(results["test_loss"] / np.log(2) * len(ids) / characters)
    assert (folder / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{results['n_params']:,}" in (folder / "model_summary.txt").read_text()
    assert files_of(folder / "tokenizer") == files_of("data/tiny/tokenizer")


def test_recipes_set_what_they_say():
    for keys, expected in (
            ({"recipe": "report"}, {
                "optimizer": "adam", "beta2": 0.999, "schedule": "constant", "grad_clip": 0,
                "dtype": "float32", "compile": False, "fused_attention": False, "residual": False}),
            ({"grad_clip": 0.5}, {"optimizer": "auto", "schedule": "cosine", "beta2": 0.99,
                                  "fused_attention": True, "residual": True, "grad_clip": 0.5}),
            ({"recipe": "report", "optimizer": "adamw"}, {"optimizer": "adamw", "fused_attention": False})):
        layers = train.new_run({**keys, "dataset": "tiny"})
        configs = (vars(data.configure(config_class, *layers)) for config_class in CONFIGS[train])
        assert expected.items() <= dict(item for config in configs for item in config.items()).items()


@BOTH
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_optimizers_are_pytorchs_on_the_parameters_they_should_move(name, optimizer):
    """Adam decays all, as in the report; AdamW the matrices; Muon takes those of the blocks from it."""
    ours, theirs = make(name), make(name)
    start = [p.detach().clone() for p in ours.parameters()]
    config = TrainConfig(model=name, optimizer=optimizer, learning_rate=5e-4, muon_learning_rate=0.02,
                         embedding_lr_scale=3.0)
    matrices = [p for p in theirs.blocks.parameters() if p.dim() == 2]
    groups = [{"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
              {"params": [p for n, p in theirs.named_parameters() if n[:3] in ("wte", "wpe")], "lr": 15e-4},
              {"params": [theirs.lm_head.weight] + matrices * (optimizer == "adamw")}]
    expected = [torch.optim.AdamW(groups, 5e-4, (0.9, 0.99), weight_decay=0.1)]
    if optimizer == "muon":
        expected.append(torch.optim.Muon(matrices, 0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"))
    if optimizer == "adam":
        expected = [torch.optim.Adam(theirs.parameters(), 5e-4, (0.9, 0.99), weight_decay=0.1)]
    # PyTorch's Muon always rounds to bfloat16
    optimizers = train.make_optimizers(ours, config, torch.bfloat16)
    for group in itertools.chain.from_iterable(o.param_groups for o in optimizers):
        group["lr"] *= group.get("scale", 1.0)      # as train_step does
    for model, optimizers in (ours, optimizers), (theirs, expected):
        for _ in range(2):      # later, one bit of a gradient can turn a rounding to bfloat16
            model(*inputs_and_targets())[1].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    for p, q, before in zip(ours.parameters(), theirs.parameters(), start):
        assert (p - q).norm() <= 1e-4 * (q - before).norm() > 0
    values = torch.linalg.svdvals(train.orthogonal(torch.randn(2, 30, 12)))
    assert 0.6 < values.min() and values.max() < 1.3


def test_the_schedule_is_a_warmup_and_a_cosine():
    def rates(steps, minutes=0.0, **keys):
        config = TrainConfig(**{"learning_rate": 5e-4, **keys})
        return [config.learning_rate * train.schedule_at(config, State(step=step, minutes=minutes))
                for step in steps]

    assert rates((0, 9, 10, 999), 99, schedule="constant", warmup_iters=10) == [5e-5, 5e-4, 5e-4, 5e-4]
    cosine = rates(range(1001), max_iters=1000, warmup_iters=10)
    assert cosine[0] == 5e-5 and cosine[9] == 5e-4 and cosine[1000] == pytest.approx(5e-5)  # a tenth
    assert cosine[10:] == sorted(cosine[10:], reverse=True)
    assert rates([999], learning_rate=1e-5, max_iters=999) == pytest.approx([1e-6])
    assert rates([999], min_lr=0.0, max_iters=999) == [0]
    assert rates([10 ** 6], 60.0) == pytest.approx([(5e-4 + 5e-5) / 2])         # by the clock


def test_gradient_clipping_bounds_the_step(here):
    """Gradients clipped to 1e-9 vanish beside Adam's eps of 1e-8, so the model hardly moves."""
    keys = ["--max_iters=8", "--learning_rate=0.05"]
    free, clipped = run_tiny("gpt", "out/free", *keys), run_tiny("gpt", "out/clip", *keys, "--grad_clip=1e-9")
    assert clipped["test_loss"] != free["test_loss"] and abs(clipped["test_loss"] - np.log(512)) < 0.2


@CUDA
@BOTH
def test_a_run_on_cuda_goes_on_and_speaks(name, here, capsys):
    """As typed there: compiled or on cuDNN, in mixed precision; the same seed gives the same text."""
    folder = f"out/cuda-{name}"
    run_tiny(name, folder, "--device=cuda", "--dtype=auto", "--max_iters=20", "--learning_rate=5e-3")
    assert resume(folder, "--max_iters=30")["test_loss"] < np.log(512)
    capsys.readouterr()
    texts = []
    for _ in range(2):
        sample.main([f"--out_dir={folder}", "--max_new_tokens=60", "--num_samples=3"])
        texts.append(capsys.readouterr().out.rsplit("[", 1)[0])
    assert texts[0] == texts[1] and len(texts[0]) > 200


def test_only_steps_of_one_batch_become_a_cuda_graph(monkeypatch):
    monkeypatch.setattr(train, "compile_fault", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda model, mode: mode)
    for n, mode in ((1, "reduce-overhead"), (2, None)):
        config = TrainConfig(compile=True, gradient_accumulation_steps=n, device="cpu")
        assert train.Trainer(config, make("gpt"), {"train": np.arange(99)}).forward == mode


@CUDA
@pytest.mark.parametrize("n", [1, 2])
def test_compiled_steps_on_cuda_are_those_of_the_model(n, here):
    """As a CUDA graph, or not where gradients are accumulated; in float32, with evaluations in between."""
    curves = []
    for compile in (False, True):
        folder = f"out/compile-{n}-{compile}"
        run_tiny("gpt", folder, "--device=cuda", f"--compile={compile}", f"--gradient_accumulation_steps={n}",
                 "--max_iters=12", "--eval_interval=3", "--learning_rate=5e-3")
        curves.append([row["val_loss"] for row in metrics_of(folder)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3) and len(curves[0]) == 5


@BOTH
def test_accumulated_batches_equal_one_large_batch(name, here, monkeypatch):
    shown, log = [], train.Trainer.log
    monkeypatch.setattr(train.Trainer, "log", lambda self: shown.append(self.loss.item()) or log(self))
    keys = "--max_iters=8", "--log_interval=1"
    whole = run_tiny(name, f"out/whole-{name}", *keys)
    parts = run_tiny(name, f"out/parts-{name}", *keys, "--batch_size=2", "--eval_iters=4",
                     "--gradient_accumulation_steps=4")
    assert whole["tokens_seen"] == parts["tokens_seen"]
    assert shown[:len(shown) // 2] == pytest.approx(shown[len(shown) // 2:], abs=1e-4) and len(shown) > 10
    assert whole["test_loss"] == pytest.approx(parts["test_loss"], abs=1e-4)


def test_saves_come_when_due_and_hold_one_moment(here):
    """Before every step, or at the start and the end only; the best weights are those of their step."""
    for minutes, saves in ((0, 9), (1000, 2)):
        folder = f"out/save{minutes}"
        with mock.patch.object(train, "write_whole", wraps=train.write_whole) as write:
            run_tiny("gpt", folder, "--max_iters=8", "--eval_interval=1", "--learning_rate=0.02",
                     f"--save_minutes={minutes}")
        last, best = saved_in(folder)["state"], saved_in(folder, "ckpt.pt")["state"]
        written = [call.args[0].name for call in write.call_args_list]
        assert written.count("last.pt") == saves and last["step"] == 8
        assert best["metrics"][-1] == min(last["metrics"], key=lambda m: m["val_loss"])
        assert best["best_val"] == last["best_val"] == results_of(folder)["val_loss"]


def all_of_a_run(folder):
    """Everything a finished run leaves that must not depend on how often it was interrupted."""
    results, last, best = results_of(folder), saved_in(folder), saved_in(folder, "ckpt.pt")
    assert metrics_of(folder) == last["state"]["metrics"]
    differ = {"minutes", "tokens_per_second", "peak_memory_gb", "out_dir", "init_from", "save_minutes"}
    facts = [{k: v for k, v in part.items() if k not in differ}
             for part in (results.pop("config"), results, last["scaler"], *last["state"]["metrics"])]
    tensors = *last["model"].values(), *best["model"].values(), *moments_of(last)
    return [*facts, last["state"]["step"], last["state"]["best_val"], best["state"]["step"],
            *(hash(t.numpy().tobytes()) for t in tensors)]


def moments_of(last):
    """All tensors of the optimizers in a last.pt."""
    return [v for saved in last["optimizers"] for state in saved["state"].values() for v in state.values()]


def finish(process):
    """Wait for its end, which must be a good one -> what it said since."""
    output = process.communicate()[0]
    assert process.returncode == 0 and "Traceback" not in output, output
    return output


def children(launcher):
    """The process ids of a torchrun's two workers, the first that of rank 0."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    workers = [int(pid) for pid in pids if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    return workers


@BOTH
@pytest.mark.parametrize("processes", [1, 2] if LONG else [1])
def test_a_run_killed_at_random_moments_ends_as_if_never_killed(name, processes, here):
    """SIGKILL, at a random moment after the run has begun to work, often in a save; then resumed, and
    killed again. Once it is SIGTERM, or SIGHUP. With muon, and so two optimizers."""
    kills, rng = 30 if LONG else 2, random.Random(f"{name}{processes}")
    gentle = {"gpt": signal.SIGTERM, "lstm": signal.SIGHUP}[name]
    whole, cut = f"out/never-{name}{processes}", f"out/often-{name}{processes}"
    keys = tiny_keys(name, "", "--eval_interval=7", "--dropout=0.1", "--learning_rate=3e-3",
                     "--optimizer=muon", f"--max_iters={60 * (kills + 1)}", "--max_minutes=0")

    def in_one_go(folder, *keys):
        if processes == 2:
            finish(begin([*keys, f"--out_dir={folder}"], LAUNCHER))
        else:
            train.main([*keys, f"--out_dir={folder}"])

    in_one_go(whole, *keys)
    for kill in range(kills + 1):
        again = ["--init_from=resume"] if Path(cut, "last.pt").exists() else [*keys, "--save_minutes=0"]
        process = begin([*again, f"--out_dir={cut}"], LAUNCHER if processes == 2 else ())
        read_until(process, "parameters;")      # from here on it writes
        # a gentle one is answered by a save once all processes train; before, it ends them at once
        time.sleep(rng.uniform(0, 0.25) + 0.5 * (kill == 1))
        assert process.poll() is None, "ended before it could be killed"
        for pid in children(process) if processes == 2 else [process.pid]:
            os.kill(pid, gentle if kill == 1 else signal.SIGKILL)
        if kill == 1:
            assert finish(process).count("stopping after") == 1 and Path(cut, "results.json").exists()
        else:
            process.communicate()
        for path in Path(cut).glob("*.pt"):     # whatever is there is whole
            saved_in(cut, path.name)
    assert saved_in(cut)["state"]["step"] > 0
    for _ in range(2):      # the second time as if it had been killed in the final test
        in_one_go(cut, "--init_from=resume", "--save_minutes=1")
        assert all_of_a_run(cut) == all_of_a_run(whole) and len(metrics_of(cut)) > 20
        Path(cut, "results.json").unlink()


def test_a_resumed_run_takes_new_settings_keeps_the_best_weights_and_refuses_what_does_not_fit(here):
    """The best also where they are of a later moment than last.pt, as after a kill between two writes."""
    run_tiny("gpt", "out/best", "--max_iters=4")
    path, best = Path("out/best/ckpt.pt"), saved_in("out/best", "ckpt.pt")
    best["state"]["step"] = best["state"]["metrics"][-1]["step"] = 1000
    best["state"]["best_val"] = best["state"]["metrics"][-1]["val_loss"] = 1.25
    torch.save(best, path)
    changes = {"learning_rate": 0.02, "min_lr": 1e-4, "eval_interval": 3, "log_interval": 1, "max_iters": 7,
               "compile": False, "device": "cpu", "save_minutes": 5.0, "warmup_iters": 3}
    results = resume("out/best", *(f"--{k}={v}" for k, v in changes.items()))
    assert changes.items() <= results["config"].items() and results["steps"] == 7
    assert [m["step"] for m in metrics_of("out/best")] == [0, 4, 6, 7]
    assert (results["best_step"], results["val_loss"]) == (1000, 1.25)
    path.unlink()
    refuses("ckpt.pt, with the best weights of this run, is missing", resume, "out/best", "--max_iters=12")
    last = saved_in("out/best")
    for change, message in ({"optimizers": last["optimizers"][:1]}, "is damaged"), \
            ({"data_sha256": "0"}, "prepared anew"):
        torch.save({**last, **change}, "out/best/last.pt")
        refuses(message, resume, "out/best", "--max_iters=12")


def test_without_a_c_compiler_a_run_goes_on_uncompiled(monkeypatch, capsys):
    compiled = mock.Mock(side_effect=RuntimeError("Failed to find C compiler"))     # at the first call
    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    for compile, warned in ((None, False), (True, True)):
        trainer = train.Trainer(TrainConfig(compile=compile), make("gpt"), {"train": np.arange(99)})
        assert trainer.forward is trainer.model
        assert ("Failed to find C compiler" in capsys.readouterr().out) == warned


def spoil_gradients(monkeypatch, bad, forward=GPT.forward):
    """From now on the gradient of the GPT is NaN at the training steps in bad, counted from 0: in wpe alone,
    which one optimizer of several moves."""
    steps = itertools.count()

    def spoiled(self, *args, **kwargs):
        logits, loss = forward(self, *args, **kwargs)
        if self.training and next(steps) in bad:
            loss = loss + (0 * self.wpe.weight.sum()).sqrt()    # the derivative of a root at 0, times 0
        return logits, loss

    monkeypatch.setattr(GPT, "forward", spoiled)


@pytest.mark.parametrize("recipe, save_minutes", [("tuned", 1), ("tuned", 0), ("report", 0)])
def test_a_run_that_is_not_finite_stops_and_spoils_nothing(recipe, save_minutes, here, monkeypatch):
    """Once is enough: it is noticed within log_interval steps, names the learning rate, and never saved."""
    spoil_gradients(monkeypatch, {9})
    folder = f"out/{recipe}{save_minutes}"
    with pytest.raises(UserError, match="step (10|12):.*learning.rate.* --learning_rate=0.003"):
        run_tiny("gpt", folder, f"--recipe={recipe}", f"--save_minutes={save_minutes}", "--max_iters=40",
                 "--learning_rate=1e-2", "--log_interval=3")
    last, metrics = saved_in(folder), metrics_of(folder)
    assert last["state"]["step"] == (0 if save_minutes else 9) and [m["step"] for m in metrics] == [0, 4, 8]
    assert all(v.isfinite().all() for v in moments_of(last))
    best = saved_in(folder, "ckpt.pt")["state"]["metrics"][-1]
    assert best == min(last["state"]["metrics"], key=lambda m: m["val_loss"])
    assert resume(folder, "--max_iters=12", "--learning_rate=1e-3")["steps"] == 12


@pytest.mark.parametrize("key", ["--learning_rate=1e12", "--learning_rate=1e18", "--weight_decay=1e18"])
def test_an_absurd_step_size_is_stopped_before_it_is_saved(key, here):
    refuses("learning rate", run_tiny,
            "gpt", f"out/{key[2:]}", "--max_iters=100", "--warmup_iters=0", "--grad_clip=0", key)
    assert saved_in(f"out/{key[2:]}") and saved_in(f"out/{key[2:]}", "ckpt.pt")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_float16_leaves_out_steps_that_overflow_and_resumes_with_its_scale(optimizer, here, monkeypatch):
    """Each halves the scale of the loss, and moves nothing; after the first there may be no moments yet."""
    keys = ["--dtype=float16", "--schedule=constant", f"--optimizer={optimizer}", "--learning_rate=1e-2"]
    found = []
    for name, steps in (("half", 6), ("halves", 2)):
        folder = f"out/{name}-{optimizer}"
        spoil_gradients(monkeypatch, {0, 1})
        run_tiny("gpt", folder, *keys, f"--max_iters={steps}")
        spoil_gradients(monkeypatch, {})
        resume(folder, "--max_iters=6")
        found.append(saved_in(folder))
    whole, halves = found
    assert whole["scaler"] == halves["scaler"] and whole["scaler"]["scale"] == 2 ** 14
    assert {state["step"].item() for state in whole["optimizers"][0]["state"].values()} == {4}
    assert all(map(torch.equal, moments_of(whole), moments_of(halves)))
    assert all(torch.equal(whole["model"][k], halves["model"][k]) for k in whole["model"])


def begin_quietly(name, out_dir, *keys, **options):
    """Start a run that evaluates and saves at its start alone -> the process, some steps later."""
    process = begin(tiny_keys(name, out_dir, "--eval_interval=100000", *keys), **options)
    read_until(process, "step 0:")
    while process.poll() is None and not Path(out_dir, "last.pt").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    return process


def test_two_interrupts_stop_at_once_and_harm_no_file(here):
    """In a step that takes long, so that there is time for the second."""
    process = begin_quietly("lstm", "out/twice", "--gradient_accumulation_steps=64")
    process.send_signal(signal.SIGINT)
    read_until(process, "Now Ctrl-C ends at once")
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT and not Path("out/twice/results.json").exists()
    assert saved_in("out/twice") and saved_in("out/twice", "ckpt.pt")


def test_a_signal_that_ends_the_reader_too_still_saves_but_an_ignored_one_stays_ignored(here):
    """Ctrl-C in `nohup python train.py 2>&1 | tee log`. nohup ignores SIGHUP, and the run outlives its
    terminal; were it heeded, SIGINT would be the second signal and end the run at once. The save at the start
    is of step 0. SIGTERM and SIGHUP are tested with the killed runs."""
    process = begin_quietly("gpt", "out/tee",
                            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() in (0, 141)       # 141: it met the closed pipe, after the save
    step = saved_in("out/tee")["state"]["step"]
    assert step > 0 and resume("out/tee", f"--max_iters={step + 1}")["steps"] == step + 1


def test_a_new_run_sets_the_last_one_aside_whole_but_no_other_files(here):
    """A mistaken start, ended at once, costs the good run before it nothing."""
    run_tiny("gpt", "out/set/aside", "--max_iters=1")
    first = files_of("out/set/aside")
    with open("out/set/.aside.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)        # as a run does that is at work
        Path("out/link").symlink_to("set/aside")
        for folder, more in (("set/aside", []), ("set/aside", ["--init_from=resume"]), ("link", [])):
            keys = tiny_keys("gpt", f"out/{folder}", "--max_iters=1", *more)
            refuses("another run is writing to .*out/set/aside", train.main, keys)
    assert files_of("out/set/aside") == first
    with mock.patch.object(train.Trainer, "train", side_effect=KeyboardInterrupt):
        with suppress(KeyboardInterrupt):
            run_tiny("gpt", "out/set/aside", "--seed=5")
    run_tiny("gpt", "out/link", "--max_iters=1", "--seed=7")
    one, two = sorted(Path("out/set/previous").iterdir())       # by their times
    assert re.fullmatch(r"aside-\d{8}-\d{6}-\d{6}", one.name) and files_of(one) == first
    assert first.keys() == files_of("out/set/aside").keys() > files_of(two).keys()
    assert Path("out/link").is_symlink() and results_of("out/link")["config"]["seed"] == 7
    assert "model_summary.txt" in files_of(two)     # which even an interrupted start leaves
    sample.main([f"--out_dir={one}", "--max_new_tokens=2"])
    Path("out/set/foreign").mkdir()
    Path("out/set/foreign/notes.txt").write_text("moje")
    refuses("holds files that are no run's", run_tiny, "gpt", "out/set/foreign", "--max_iters=1")
    assert files_of("out/set/foreign") == {"notes.txt": b"moje"}


def test_the_time_budget_ends_two_processes_together_and_their_curve_is_that_of_one(here):
    """DistributedDataParallel on gloo, whose run one process goes on with: the same batches, so the same
    losses to rounding as of one process in one go. Only one of the two writes."""
    keys = ["--schedule=constant", "--learning_rate=1e-4", "--gradient_accumulation_steps=2"]
    out = finish(begin(tiny_keys("lstm", "out/two", "--max_minutes=0.03", *keys), LAUNCHER))
    assert out.count("parameters;") == out.count("step 0: train") == 1
    minutes, steps = (results_of("out/two")[key] for key in ("minutes", "steps"))
    assert 0.03 <= minutes < 0.5 and steps > 0
    two = resume("out/two", f"--max_iters={steps + 4}", "--max_minutes=0")
    one = run_tiny("lstm", "out/one", f"--max_iters={steps + 4}", *keys)
    assert one["tokens_seen"] == two["tokens_seen"] == 2 * (steps + 4) * 8 * 32
    assert one["test_loss_by_position"] == pytest.approx(two["test_loss_by_position"], abs=3e-3)
    first, second = ({m["step"]: m["val_loss"] for m in metrics_of(f"out/{run}")} for run in ("one", "two"))
    assert len(first) > 1 and first == pytest.approx({k: second[k] for k in first}, abs=1e-3)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find a run's processes")
def test_a_signal_to_one_process_stops_all_together(here):
    process = begin(tiny_keys("gpt", "out/together"), LAUNCHER)
    read_until(process, "step 4:")
    os.kill(children(process)[1], signal.SIGTERM)       # not the one that writes
    finish(process)
    assert results_of("out/together")["steps"] == saved_in("out/together")["state"]["step"] >= 4


def test_an_offline_wandb_run_leaves_its_curves_and_results_and_no_key(here):
    import wandb
    runs, init, secret = [], wandb.init, "5ec2e7" * 6 + "cafe"
    with mock.patch.dict(os.environ, WANDB_MODE="offline", WANDB_SILENT="true", WANDB_API_KEY=secret), \
            mock.patch("wandb.init", side_effect=lambda **keys: runs.append(init(**keys)) or runs[0]):
        results = run_tiny("gpt", "out/wandb", "--max_iters=4", "--log_interval=1", "--wandb_log=True",
                           "--wandb_run_name=probe")
    file, = Path("out/wandb").rglob("*.wandb")
    deadline = time.time() + 60     # a process of wandb's own writes it
    while file.read_bytes().count(b"val/loss") < 2 and time.time() < deadline:
        time.sleep(0.1)
    raw = file.read_bytes()
    assert raw.count(b"val/loss") >= 2 and raw.count(b"train/loss") >= 4 and b"probe" in raw
    assert not any(secret[:12].encode() in content for content in files_of("out/wandb").values())
    # the last line of metrics has some of the same keys, and other values
    shown = {(item.key or item.nested_key[0]): item.value_json for item in runs[0]._final_summary.item}
    for key in "tokens_per_second", "minutes", "val_loss", "test_loss":
        assert json.loads(shown[key]) == pytest.approx(results[key])


@pytest.mark.parametrize("broken", ["", "init", "log", "finish"])
def test_a_resumed_run_goes_on_in_its_wandb_run_and_a_broken_one_stops_nothing(broken, here, capsys):
    """Each loss of a step has a key of its own, also where the run is evaluated: W&B keeps the later."""
    run = mock.Mock(id="abc123")
    with mock.patch("wandb.init", return_value=run) as init:
        parts = {"": mock.Mock(), "init": init, "log": run.log, "finish": run.finish}
        parts[broken].side_effect = ConnectionResetError("the line is dead")
        run_tiny("gpt", f"out/wandb-{broken}", "--max_iters=5", "--log_interval=1", "--wandb_log=True")
        assert resume(f"out/wandb-{broken}", "--max_iters=8")["steps"] == 8
    first, again = ((call.kwargs["id"], call.kwargs["resume"]) for call in init.call_args_list)
    assert first == (None, "allow") and again == (None if broken == "init" else "abc123", "allow")
    assert ("wandb failed, the run goes on: the line is dead" in capsys.readouterr().out) == bool(broken)
    calls = run.log.call_args_list
    sent = [(key, call.kwargs["step"]) for call in calls for key in call.args[0] if "loss" in key]
    assert len(sent) == len(set(sent))
    assert [step for key, step in sent if key == "train/loss"] == list(range(1, 9)) * (broken != "init")


# ----------------------------------------------------------------------------------------------------
# Files that are damaged, hostile, or cannot be written

DAMAGES = {     # of a checkpoint, each a function that changes it
    "version": lambda c: c.update(format_version=99),
    "model": lambda c: c["config"].update(model="rnn"),
    "layers": lambda c: c["model_config"].update(n_layer=10 ** 9),      # would take hours to build
    "weight": lambda c: c["model"].popitem(),
    "step": lambda c: c["state"].update(step=torch.zeros(3, 3)),
    "state": lambda c: c.pop("state"),
    "sparse": lambda c: c["model"].update({"wpe.weight": c["model"]["wpe.weight"].to_sparse()}),
    "code": lambda c: c.update(model=Hostile(os.mkdir, "ran")),
    "memory": lambda c: c.update(more=Hostile(bytearray, 10 ** 8)),
    "nested": lambda c: c["config"].update(learning_rate=functools.reduce(lambda v, _: [v, v], range(40), 0)),
    "shared": lambda c: c["model"].update({"lm_head.weight": c["model"]["wte.weight"]}),  # two in one memory
    "a single number": lambda c: c["model"].update({"ln_f.weight": torch.zeros(1).expand(32)}),
    "nan": lambda c: c["model"]["wpe.weight"][3].fill_(float("nan")),
}


class Hostile:
    """Where it is unpickled, function(argument) is called."""
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def zipped_anew(path, method=zipfile.ZIP_STORED, names=0):
    """The same entries: deflated they can unpack to any size; or with further names for the largest, under
    each of which it is read into memory of its own."""
    with zipfile.ZipFile(path) as before, zipfile.ZipFile("anew.zip", "w", method) as after:
        for entry in before.infolist():
            after.writestr(entry.filename, before.read(entry))
        largest = max(after.filelist, key=lambda entry: entry.file_size)
        for i in range(names):
            after.filelist.append(copy.copy(largest))
            after.filelist[-1].filename = f"{largest.filename}{i}"
    return Path("anew.zip").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "compressed", "overlapping", *DAMAGES])
def test_damaged_checkpoints_are_refused(damage, here, tmp_path):
    path, raw = tmp_path / "ckpt.pt", Path("outputs/transformer/ckpt.pt").read_bytes()
    if damage in DAMAGES:
        checkpoint = saved_in("outputs/transformer", "ckpt.pt")
        DAMAGES[damage](checkpoint)
        torch.save(checkpoint, path)
    else:
        path.write_bytes({"cut": raw[:len(raw) // 2], "text": b"ala ma kota", "empty": b"",
                          "compressed": zipped_anew("outputs/transformer/ckpt.pt", zipfile.ZIP_DEFLATED),
                          "overlapping": zipped_anew("outputs/transformer/ckpt.pt", names=200)}[damage])
    refuses("ckpt.pt is damaged" + ".*not finite" * (damage == "nan"), train.load_checkpoint, path)
    assert not Path("ran").exists()


def test_a_full_disk_ends_in_one_line_and_what_was_there_is_whole(here):
    """Played by a limit of 50 kB on files, which checkpoints and tokens exceed."""
    shutil.copytree("outputs/transformer", "out/full", dirs_exist_ok=True)
    before, prepared = files_of("out/full"), ["--dataset=full", "--source=tiny.jsonl"]
    with at_most(resource.RLIMIT_FSIZE, 50_000):
        for main, keys, error, message in (
                (train.main, ["--init_from=resume", "--max_iters=40", "--out_dir=out/full"], UserError,
                 "cannot write out/full/last.pt"),
                (sample.main, ["--model=gpt", "--export=out/away"], UserError, "cannot write out/away/model"),
                (data.main, [*prepared, "--tokenizer=data/tiny/tokenizer"], OSError, "File too large")):
            with pytest.raises(error, match=message):
                main(keys)
    after = files_of("out/full")
    assert after.keys() <= before.keys() and not list(Path("data").glob("*full*"))
    assert after["last.pt"] == before["last.pt"] and after["ckpt.pt"] == before["ckpt.pt"]


# ----------------------------------------------------------------------------------------------------
# Fuzz

FUZZ = settings(deadline=None, max_examples=1000 if LONG else 25, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))
ODD = st.sampled_from([None, -1, 0, 3, 10 ** 12, 2.5, 1e300, float("nan"), "", "x", [], {}, torch.zeros(1),
                       torch.full((3, 3), float("nan"))])
SETTINGS = sorted({**vars(TrainConfig()), **vars(GPTConfig()), **vars(LSTMConfig())}.keys() - {
    "model", "dataset", "out_dir", "init_from", "max_iters", "wandb_log", "compile", "n_hidden", "cudnn",
    "residual", "n_head", "fused_attention"})
VALUES = ["0", "1", "2", "3", "0.5", "1e-9", "1e9", "100000", "1000000000000", "9223372036854775807", "-1",
          "nan", "True", "adam", "float16", "bfloat16", "constant", "report", "x", "", "\x00", "½"]


def survives(main, argv):
    """Assert that a command ends well or in one clear line: nothing else is raised, hangs or is left."""
    # a hang ends all as Ctrl-C does: an assertion could be taken for a fault of the file that is read
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(60)
    shutil.rmtree("out", ignore_errors=True)
    try:
        main(argv)
    except UserError:
        pass
    except RuntimeError as error:       # data.run makes one line of this
        assert re.search("(out of|allocate|enough) memory|overflowed", str(error))
    finally:
        signal.alarm(0)
    assert not list(Path(".").rglob(".*.tmp"))


def spoil_bytes(raw, draw):
    """A file cut, or a few bytes of it changed, left out or put in."""
    at, n = draw(st.integers(0, len(raw))), draw(st.integers(1, 9))
    new = draw(st.binary(max_size=9))
    return draw(st.sampled_from([raw[:at], raw[:at] + new + raw[at + len(new):], raw[:at] + raw[at + n:],
                                 raw[:at] + new + raw[at:]]))


@FUZZ
@given(st.text(alphabet=st.characters(), max_size=60), st.sampled_from(["gpt", "lstm"]))
def test_any_prompt_is_continued_or_refused(spoilable, prompt, name):
    survives(sample.main, [f"--model={name}", f"--prompt={prompt}", "--max_new_tokens=2"])


@FUZZ
@given(st.sampled_from(["gpt", "lstm"]),
       st.dictionaries(st.sampled_from(SETTINGS), st.sampled_from(VALUES), min_size=1, max_size=3))
@example("lstm", {"n_embd": "9223372036854775807"})
def test_any_settings_train_or_are_refused(spoilable, name, keys):
    with at_most(resource.RLIMIT_DATA, 2 ** 36):
        survives(train.main, tiny_keys(name, "out/new", "--batch_size=4", "--max_iters=2",
                                       *(f"--{k}={v}" for k, v in keys.items())))


@FUZZ
@given(st.data())
def test_any_spoiled_dataset_or_tokenizer_is_used_or_refused(spoilable, draws):
    """Not meta.json: what is right there and wrong is the work of a hand."""
    files = sorted([*Path("data/tiny").glob("*.bin"), *Path("outputs/transformer/tokenizer").iterdir()])
    path = draws.draw(st.sampled_from(files))
    original = path.read_bytes()
    try:
        path.write_bytes(spoil_bytes(original, draws.draw))
        survives(train.main, tiny_keys("gpt", "out/new", "--batch_size=4", "--max_iters=1"))
        survives(sample.main, ["--model=gpt", "--max_new_tokens=2"])
    finally:
        path.write_bytes(original)


@FUZZ
@given(st.data())
def test_any_spoiled_checkpoint_is_used_or_refused(spoilable, work, draws):
    """Its bytes are changed; or a value anywhere in ckpt.pt, which can come from a stranger, is replaced,
    left out, or renamed."""
    draw = draws.draw
    name, file = draw(st.sampled_from(["gpt", "lstm"])), draw(st.sampled_from(["ckpt.pt", "last.pt"]))
    path = Path(train.MODELS[name][2]) / file
    bytes_alone = file == "last.pt" or draw(st.integers(0, 3)) == 0
    if bytes_alone:
        path.write_bytes(spoil_bytes((work / path).read_bytes(), draw))
    else:
        part = checkpoint = saved_in(work / path.parent, file)
        while True:
            key = draw(st.sampled_from(range(len(part)) if type(part) is list else list(part)))
            if type(part[key]) not in (dict, list) or not part[key] or draw(st.integers(0, 5)) == 0:
                break
            part = part[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename"]))
        if action == "replace":
            part[key] = draw(ODD)
        elif action == "rename" and type(part) is dict:
            part[draw(st.sampled_from(["x", 0, 10 ** 12]))] = part.pop(key)
        else:
            del part[key]
        torch.save(checkpoint, path)
    survives(sample.main, [f"--model={name}", "--max_new_tokens=2"])
    if bytes_alone:
        survives(train.main, [f"--model={name}", "--init_from=resume", "--max_iters=31", "--max_minutes=1"])
    shutil.rmtree(path.parent)
    shutil.copytree(work / path.parent, path.parent)


# ----------------------------------------------------------------------------------------------------
# As a user types it

def test_train_without_data_makes_mini_and_says_so(empty, monkeypatch, capsys):
    monkeypatch.setattr(data, "mini_articles", functools.partial(data.mini_articles, n_docs=3000))
    train.main(["--max_iters=2", "--eval_iters=1", "--batch_size=4"])
    assert "data/plwiki is not prepared" in capsys.readouterr().out
    config = results_of("outputs/transformer")["config"]
    assert config.items() >= {**train.MINI, "dataset": "mini", "max_iters": 2, "vocab_size": 2048}.items() - \
        {("max_iters", 300), ("n_hidden", 192)}


@BOTH
def test_sample_streams_text_and_repeats_itself(name, work, empty, capsys):
    """From the run's folder alone: data/ is not needed."""
    shutil.copytree(work / "outputs", "outputs")
    keys = [f"--model={name}", "--temperature=1.0", "--max_new_tokens=40", "--device=cpu"]
    said, imports = command("sample.py", *keys, env={"PYTHONPROFILEIMPORTTIME": "1"})
    *text, facts = said.splitlines()
    assert "transformers" in imports and "torch._dynamo" not in imports     # the latter takes two seconds
    assert text[0].startswith("W 1920 roku")
    assert re.match(rf"\[{name}, tiny, [\d.]+ tokens/s", facts)
    sample.main(keys)
    assert capsys.readouterr().out.splitlines()[:-1] == text

    sample.main([f"--model={name}", "--num_samples=3", "--max_new_tokens=10"])
    assert capsys.readouterr().out.count("---") == 3
    sample.main([f"--model={name}", "--grid=True", "--max_new_tokens=5"])
    file, = Path(train.MODELS[name][2]).glob("*_inference_results.json")
    rows = json.loads(file.read_text())["results"]
    assert [(r["prompt"], r["temperature"]) for r in rows] == \
        [(p, t) for p in sample.GRID_PROMPTS for t in (0.5, 1.0, 1.5)] and len(sample.GRID_PROMPTS) >= 5
    assert all(r["text"].startswith("<s>") for r in rows)
    assert capsys.readouterr().out.count("temperature 0.5]\n") == len(sample.GRID_PROMPTS)
    os.utime(f"{train.MODELS[name][2]}/ckpt.pt")        # now it is the newest
    sample.main(["--prompt=", "--max_new_tokens=2"])
    assert f"[{name}, tiny" in capsys.readouterr().out
    shutil.rmtree(f"{train.MODELS[name][2]}/tokenizer")
    refuses("tokenizer is missing", sample.main, [f"--model={name}"])


def export(name, weights):
    """Put weights into a run's best checkpoint, and export it to the folder away."""
    path = Path(train.MODELS[name][2], "ckpt.pt")
    saved = saved_in(path.parent, path.name)
    torch.save({**saved, "model": weights, "model_config": {**saved["model_config"], "dropout": 0.25}}, path)
    sample.main([f"--model={name}", "--export=away"])


@BOTH
def test_an_exported_model_is_the_same_elsewhere(name, spoilable):
    """The GPT in transformers, loaded as any GPT-2: logits, text, and the gradient of every parameter. The
    LSTM layer by layer in nn.LSTM, with the identity added between those of equal width."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer
    ours = train.load_checkpoint(Path(train.MODELS[name][2], "ckpt.pt"))["model"]
    torch.manual_seed(0)
    for p in ours.parameters():
        p.data.normal_(std=0.4)         # so large that outputs differ clearly
    export(name, ours.state_dict())
    tok = AutoTokenizer.from_pretrained("away")
    idx = tok("Dawno temu nad rzeką", return_tensors="pt").input_ids
    assert idx[0, 0] == tok.bos_token_id and (idx[0, 1:] != tok.bos_token_id).all()
    logits, loss = ours(idx, idx)
    if name == "gpt":
        theirs = AutoModelForCausalLM.from_pretrained("away").eval()
        drops = theirs.config.embd_pdrop, theirs.config.resid_pdrop, theirs.config.attn_pdrop
        assert drops == (0.25, 0.25, 0.0)       # to train on as here: transformers' own are 0.1
        expected = theirs(idx).logits
        assert close([logits], [expected], 1e-4)
        greedy = theirs.generate(idx, do_sample=False, max_new_tokens=20, eos_token_id=None)
        assert torch.equal(continuation(ours, idx, 20, "cached", temperature=0), greedy[:, idx.size(1):])
        nn.functional.cross_entropy(expected.flatten(0, 1), idx.flatten()).backward()
        loss.backward()
        export(name, {key: p.grad for key, p in ours.named_parameters()})   # so they get their names there
        gradients = AutoModelForCausalLM.from_pretrained("away").named_parameters()
        for (key, gradient), p in zip(gradients, theirs.parameters(), strict=True):
            # their attention has biases, zero where ours has none
            assert close([gradient], [p.grad], 1e-4) or ".attn." in key and key.endswith("bias")
        return
    with safe_open("away/model.safetensors", "pt") as file:
        assert file.metadata()["residual"].startswith("True: ")
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    x = tensors["wte.weight"][idx]
    for layer in range(ours.config.n_layer):
        weights = {k.removeprefix("lstm.").replace(f"_l{layer}", "_l0"): w for k, w in tensors.items()
                   if k.endswith(f"_l{layer}")}
        lstm = nn.LSTM(x.size(-1), ours.config.n_hidden, batch_first=True)
        lstm.load_state_dict(weights)
        y = lstm(x)[0]
        x = x + y if x.shape == y.shape else y
    assert close([logits], [x @ tensors["lm_head.weight"].t() + tensors["lm_head.bias"]], 1e-4)


@pytest.fixture
def small_bench(monkeypatch):
    """bench.py on small stand-ins: the full sizes take minutes."""
    sizes = {"n_layer": 2, "n_embd": 48, "n_hidden": 48, "vocab_size": 500}     # the GPT uses no n_hidden
    for name, (model_class, config_class, folder) in train.MODELS.items():
        small = make_dataclass("Small", [(k, int, v) for k, v in sizes.items()], bases=(config_class,))
        monkeypatch.setitem(bench.MODELS, name, (model_class, small, folder))


def test_bench_times_generation_and_writes_each_row_as_it_comes(empty, small_bench, capsys):
    with mock.patch.object(bench, "write_json", wraps=bench.write_json) as write:
        bench.main(["--device=cpu", "--new_tokens=40", "--repeats=2"])
    rows = json.loads(Path("outputs/bench.json").read_text())["rows"]
    fast = str(train.choose_dtype("auto", torch.device("cpu"))[0]).removeprefix("torch.")
    ways = {("naive", "float32"), ("cached", "float32"), ("cached", fast), ("cached", "int8")}
    assert {(r["model"], r["mode"], r["dtype"]) for r in rows} == {(m, *w) for m in SIZES for w in ways}
    naive = {r["model"]: r["tokens_per_second"] for r in rows if r["mode"] == "naive"}
    for row in rows:
        assert min(row[k] for k in ("tokens_per_second", "first_token_ms", "bandwidth_share")) > 0
        assert row["ratio"] == pytest.approx(row["tokens_per_second"] / naive[row["model"]], abs=0.01)
    assert Path("outputs/bench.png").read_bytes()[:4] == b"\x89PNG"
    assert capsys.readouterr().out.count("\n|") == len(rows) + 2       # a table, with its head
    assert write.call_count == len(rows)


def test_bench_times_train_step(empty, small_bench):
    train_step = train.Trainer.train_step
    with mock.patch.object(train.Trainer, "train_step", side_effect=train_step, autospec=True) as steps:
        bench.main(["--train=True", "--batch_size=2", "--device=cpu", "--repeats=2"])
    measured = json.loads(Path("outputs/bench_training.json").read_text())["rows"]
    rows = {r["change"]: r for r in measured}
    assert {"report: float32, attention by hand", "report: nn.LSTM, float32"} < rows.keys() and len(rows) > 7
    assert {r["model"] for r in measured} == {"gpt", "lstm"}
    assert bench.mfu(494.5, "NVIDIA H100 80GB HBM3") == 0.5 and bench.mfu(1.0, "NVIDIA RTX A4000") is None
    assert steps.call_count == 3 * len(measured)        # one to warm up, two that count
    for row in measured:
        assert row["tokens_per_second"] > 0 and row["batch_size"] == 2 and row["mfu"] is None
    assert Path("outputs/bench_training.png").exists()


def test_comparing_runs(spoilable, capsys):
    """A table for each dataset, also of runs behind a link; those set aside are passed over, broken ones
    refused."""
    shutil.copytree("outputs/rnn", "elsewhere/other")
    results = results_of("elsewhere/other")
    results["config"]["dataset"] = "books"
    Path("elsewhere/other/results.json").write_text(json.dumps(results))
    Path("outputs/deep").symlink_to(Path("elsewhere").resolve())
    Path("outputs/previous/rnn-1").mkdir(parents=True)
    Path("outputs/previous/rnn-1/results.json").write_text("{}")
    bench.main(["--compare=True"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if " tokens/s " in line] == ["books", "tiny"]
    for name in ("transformer", "rnn", "deep/other"):
        results = results_of(f"outputs/{name}")
        row, = (line.split("|") for line in lines if line.startswith(f"| {name} "))
        assert row[2].strip() == f"{results['tokens_seen']:,}"
        assert [float(x) for x in row[5:7]] == [round(results[k], 3) for k in ("val_loss", "test_loss")]
    assert Path("outputs/comparison.png").read_bytes()[:4] == b"\x89PNG"
    Path("outputs/rnn/results.json").write_text('{"config": {"model": "lstm", "dataset": "tiny"}}')
    refuses("of an older version", bench.main, ["--compare=True"])


@pytest.mark.parametrize("readme", ["README.md", "outputs/README.md"])
def test_readme_commands_and_keys_exist(readme):
    """What a README tells its reader to type is parsed by the scripts as they are."""
    text = (HERE / readme).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```(?:ba)?sh\n(.*?)```", text, re.S))
    shell = 'python() { echo "$*"; }\ntorchrun() { echo "$*"; }\npip() { :; }\n' + blocks
    typed = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    inline = re.findall(r"`(?:python|torchrun) ([^`]+)`", text)
    found = re.findall(r"(\w+)\.py((?: --\S+)*)", "\n".join([typed, *inline]))
    assert len(found) > 12
    for script, keys in found:
        keys = [key for key in keys.split() if key != "--help"]
        if script == "train":
            classes = [TrainConfig, LSTMConfig if "--model=lstm" in keys else GPTConfig]
            data.configure(classes[1], data.parse_args(keys, "", *classes))
        elif script != "test_all":
            data.parse_args(keys, "", *CONFIGS[sys.modules[script]])
    known = {f.name for classes in CONFIGS.values() for config in classes for f in fields(config)}
    known |= {"key", "help", "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
    assert set(re.findall(r"(?<![\w-])--(\w+)", re.sub(r"^pip .*$", "", text, flags=re.M))) <= known
