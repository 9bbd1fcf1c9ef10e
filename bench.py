"""Time generation, or training, of the report's full-size models (random weights), on every device present; compare runs.

    python bench.py                             # both models on cuda, mps and cpu, whichever are here
    python bench.py --model=gpt --device=cpu --new_tokens=64 --out_dir=outputs/short
    python bench.py --device=cuda --batch_size=32 --out_dir=outputs/batch32
    python bench.py --train=True                # training steps, from the report's recipe to the tuned one
    python bench.py --compare=True              # the trained runs under outputs/, side by side
    python bench.py --help

naive: the whole context is computed anew for each token, as the report did; cached: only the newest token is; graph:
that in one launch. Prints a table, writes outputs/bench.json and a bar chart. Times the generation loop of sample.py, and for
training a step of the same models, loss and optimizers as train.py's.
"""
import ctypes
import gc
import json
import statistics
import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

import data
from data import UserError
from model_gpt import GPT
from model_lstm import LSTM
from sample import generate, to_dtype
from train import MODELS, RECIPES, TrainConfig, choose_device, choose_dtype, device_name, devices_present, keep_freed_memory, \
    make_optimizer, peak_memory_gb, set_matmul_precision, write_whole

PROMPT_TOKENS = 8
REPORT = {"generation": "the report, naive: Transformer 16.5 tokens/s on an A40, 13 on an M4; LSTM 16.5 on an A40, 4 on an M4",
          "training": "the report, on an A40: Transformer 7,852 tokens/s"}


@dataclass
class BenchConfig:
    model: Literal["all", "gpt", "lstm"] = "all"    # which to time
    device: Literal["all", "cuda", "mps", "cpu"] = "all"    # where; all: every device present
    train: bool = False             # time training steps instead of generation
    compare: bool = False           # time nothing: a table and curves of the finished runs in and below out_dir
    new_tokens: int = 248           # tokens to generate after a prompt of 8; 248 fills the GPT's window of 256
    batch_size: int = 0             # sequences at once; tokens/s counts all of them; 0: 1, to train the report's 32
    repeats: int = 3                # runs of which the median counts
    out_dir: str = "outputs"        # where bench.json and bench.png go

    def __post_init__(self):
        if self.new_tokens < 2:     # the first comes with the prompt's pass and is not timed
            raise ValueError("new_tokens must be at least 2")
        if self.repeats < 1:
            raise ValueError("repeats must be at least 1")


def synchronize(device):
    """Wait until the device has done what was asked of it; the clock means nothing before."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def seconds(function, device, repeats):
    """Median time of function() over repeats, after the device has come to rest."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@lru_cache      # once per device, so that the shares of both models can be compared
def read_bandwidth(device):
    """Bytes per second at which the device reads a gigabyte that no cache holds: the sum of a float32 vector."""
    x = torch.ones(2 ** 28, device=device)
    x.sum()
    return x.numel() * 4 / seconds(x.sum, device, 9)


def weights_per_token(model):
    """Weights that one decoding step must read: all but the embedding tables, of which it reads a row."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(("wte", "wpe")))


def naive_seconds(model, prompt, config):
    """Seconds to generate new_tokens naively. A pass depends on the context's length alone and changes little from one
    to the next, so 16 lengths, spread evenly over the window, stand for all: an LSTM's 248 passes take minutes."""
    device, window = prompt.device, min(prompt.size(1) + config.new_tokens, model.window)
    lengths = [prompt.size(1) + int((k + 0.5) * (window - prompt.size(1)) / 16) for k in range(16)]
    context = torch.randint(model.config.vocab_size, (config.batch_size, window), device=device)
    list(generate(model, prompt, 1, mode="naive"))      # warm up: allocations, kernel choice
    return config.new_tokens / 16 * sum(
        seconds(lambda: list(generate(model, context[:, :length], 1, mode="naive")), device, 1) for length in lengths)


def cached_seconds(model, prompt, config, mode):
    """Seconds to generate new_tokens - 1 tokens after the first, which comes with the prompt's pass."""
    times = []
    for _ in range(1 + config.repeats):
        stream = generate(model, prompt, config.new_tokens, mode=mode)
        next(stream)
        times.append(seconds(lambda: [None for _ in stream], prompt.device, 1))
    return statistics.median(times[1:])                 # the first warms up


def bench_generation(name, device, config):
    """One row per mode and dtype, as in bench.json."""
    model_class, config_class, _ = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class()).to(device).eval()
    prompt = torch.randint(model.config.vocab_size, (config.batch_size, PROMPT_TOKENS), device=device)
    bandwidth, n_weights, rows = read_bandwidth(device), weights_per_token(model), []
    fast = choose_dtype("auto", device, training=False)[0]
    best = ("graph", fast) if device.type == "cuda" else ("cached", torch.int8)
    for mode, dtype in dict.fromkeys([("naive", torch.float32), ("cached", torch.float32), ("cached", fast), best]):
        to_dtype(model, dtype)
        if mode == "naive":
            steps = config.new_tokens / naive_seconds(model, prompt, config)
        else:
            steps = (config.new_tokens - 1) / cached_seconds(model, prompt, config, mode)
        speed = steps * config.batch_size
        rows.append({"model": name, "device": device.type, "mode": mode, "dtype": str(dtype).removeprefix("torch."),
                     "tokens_per_second": round(speed, 2),
                     "ratio_to_naive": round(speed / rows[0]["tokens_per_second"], 2) if rows else 1.0,
                     "bandwidth_share": round(steps * n_weights * dtype.itemsize / bandwidth, 3)})
        row = rows[-1]
        print(f"{name:<6}{device.type:<6}{mode:<8}{row['dtype']:<10}{speed:>9.1f} tokens/s"
              f"{row['ratio_to_naive']:>8.1f} x naive{row['bandwidth_share']:>8.0%} of {bandwidth / 1e9:.0f} GB/s", flush=True)
    return rows


class TorchLSTM(LSTM):
    """The same language model on PyTorch's own nn.LSTM, without skips: what the report's RNN most likely was."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.LSTM(config.n_embd, config.n_hidden, config.n_layer)

    def _hidden(self, idx, state):
        return self.blocks(self.wte(idx.t()))[0], None, None


def training_rows(name, device):
    """What to time, from the report's recipe to the tuned one: (label, model class, changes to its config, dtype, recipe of
    the optimizer, compiled)."""
    fast, cuda = choose_dtype("auto", device)[0], device.type == "cuda"
    if name == "gpt":
        rows = [("report: float32, attention by hand", GPT, {"fused_attention": False}, torch.float32, "report", False),
                ("mixed precision", GPT, {"fused_attention": False}, fast, "report", False),
                ("fused attention", GPT, {}, fast, "report", False),
                ("fused AdamW", GPT, {}, fast, "tuned", False)]
        return rows + [("torch.compile", GPT, {}, fast, "tuned", True)] * cuda
    plain = {"residual": False, "cudnn": False}
    return [("report: nn.LSTM, float32", TorchLSTM, {}, torch.float32, "report", False),
            ("nn.LSTM, mixed precision", TorchLSTM, {}, fast, "report", False),
            ("by hand, float32", LSTM, plain, torch.float32, "report", False),
            ("by hand, mixed precision", LSTM, plain, fast, "report", False),
            *[("cuDNN on the same weights", LSTM, {"residual": False}, fast, "report", False)] * cuda,
            ("fused AdamW, skips", LSTM, {}, fast, "tuned", False)]


def training_speed(model, dtype, recipe, compiled, device, config):
    """Tokens per second of a training step: forward, backward, clipping where the recipe has it, optimizer."""
    settings = data.configure(TrainConfig, RECIPES[recipe])
    optimizer, stepped = make_optimizer(model, settings), torch.compile(model) if compiled else model
    idx = torch.randint(model.config.vocab_size, (config.batch_size, model.config.block_size + 1), device=device)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = stepped(idx[:, :-1], idx[:, 1:])[1]
        loss.backward()
        if settings.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()                                              # warm up: compilation, allocations, the optimizer's moments
    return config.batch_size * model.config.block_size / seconds(step, device, config.repeats)


def forget_peak_memory(device):
    """Let peak_memory_gb begin anew, for the next row: on CUDA and Linux; elsewhere it stays the highest so far."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)                    # what keep_freed_memory has kept
            Path("/proc/self/clear_refs").write_text("5")       # the peak := what is held now
        except (AttributeError, OSError):
            pass


def bench_training(name, device, config):
    """One row per change, as in bench.json; the ratio is to the first."""
    rows, (model_class, config_class, _) = [], MODELS[name]
    with torch.device("meta"):
        flops = model_class(config_class()).flops_per_token()
    for label, model_class, changes, dtype, recipe, compiled in training_rows(name, device):
        torch.manual_seed(0)
        set_matmul_precision(dtype)
        forget_peak_memory(device)
        speed = training_speed(model_class(config_class(**changes)).to(device), dtype, recipe, compiled, device, config)
        rows.append({"model": name, "device": device.type, "change": label, "dtype": str(dtype).removeprefix("torch."),
                     "batch_size": config.batch_size, "tokens_per_second": round(speed, 1),
                     "ratio": round(speed / rows[0]["tokens_per_second"], 2) if rows else 1.0,
                     "tflops": round(speed * flops / 1e12, 3), "peak_memory_gb": peak_memory_gb(device)})
        row = rows[-1]
        print(f"{name:<6}{device.type:<6}{label:<36}{row['dtype']:<10}{speed:>11,.0f} tokens/s{row['ratio']:>7.2f}x"
              f"{row['tflops']:>8.2f} TFLOP/s{row['peak_memory_gb']:>7.1f} GB", flush=True)
    return rows


def plot_bars(rows, path, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = [f"{r['model']} {r['device']}\n{r['change'] if 'change' in r else r['mode'] + ' ' + r['dtype']}" for r in rows]
    figure, panel = plt.subplots(figsize=(10, 1 + 0.6 * len(rows)), layout="constrained")
    colors = [{"naive": "tab:gray", "graph": "tab:green"}.get(r.get("mode"), "tab:blue") for r in rows]
    bars = panel.barh(labels, [r["tokens_per_second"] for r in rows], color=colors)
    labels = [f"{r['tokens_per_second']:,.1f} ({r.get('ratio_to_naive', r.get('ratio')):.1f}x)" for r in rows]
    panel.bar_label(bars, labels, padding=4, fontsize=12)
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.tick_params(labelsize=12)
    panel.set_xlabel("tokens/s", fontsize=13)
    panel.set_title(title, fontsize=13)
    write_whole(path, lambda p: figure.savefig(p, dpi=100, format="png"))
    plt.close(figure)


def compare(out_dir):
    """A table (Markdown) of the finished runs in and below out_dir, and out_dir/comparison.png: their validation losses, and
    the test loss at each position of the context. Equal tokens and equal minutes are those of the run that has fewest."""
    runs = []       # (results, curve, test loss by position, folder)
    for path in sorted(p for p in out_dir.rglob("results.json") if p.parent.name != "previous"):    # set aside by train.py
        try:
            metrics = [json.loads(line) for line in (path.parent / "metrics.jsonl").open()]
            curve = {k: [m[k] for m in metrics] for k in ("tokens_seen", "minutes", "val_loss")}
            by_position = json.loads((path.parent / "test_loss_by_position.json").read_text())
            results = json.loads(path.read_text())
            results = {k: results[k] for k in ("config", "tokens_seen", "tokens_per_second", "peak_memory_gb", "val_loss",
                                               "test_loss")}
            runs.append((results, curve, by_position, path.parent))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path.parent} is damaged or of an older version ({error}): move it away") from None
    if not runs:
        raise UserError(f"no finished run in or below {out_dir}: run `python train.py` first")
    if len({r["config"]["dataset"] for r, *_ in runs}) > 1:
        raise UserError(f"the runs in and below {out_dir} are on different datasets: their losses cannot be compared")
    tokens, minutes = (min(curve[k][-1] for _, curve, *_ in runs) for k in ("tokens_seen", "minutes"))
    print(f"| run | tokens | tokens/s | peak GB | val loss at {tokens:,} tokens | at {minutes:.1f} minutes | best val | test |")
    print("|---|---|---|---|---|---|---|---|")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 3, figsize=(21, 7), layout="constrained")
    for name, panel in zip(MODELS, panels):
        for r, curve, by_position, folder in (run for run in runs if run[0]["config"]["model"] == name):
            at_tokens, at_minutes = (np.interp(x, curve[k], curve["val_loss"])
                                     for x, k in ((tokens, "tokens_seen"), (minutes, "minutes")))
            print(f"| {folder.relative_to(out_dir)} | {r['tokens_seen']:,} | {r['tokens_per_second']:,.0f} | {r['peak_memory_gb']} "
                  f"| {at_tokens:.3f} | {at_minutes:.3f} | {r['val_loss']:.3f} | {r['test_loss']:.3f} |")
            panel.plot([n / 1e6 for n in curve["tokens_seen"]], curve["val_loss"], label=folder.name, linewidth=2.5)
            if folder.parent == out_dir:        # not the ablation, a folder deeper
                ends = [0] + [2 ** k for k in range(20) if 2 ** k < len(by_position)] + [len(by_position)]
                mean, = panels[2].semilogx(ends[1:], [np.mean(by_position[a:b]) for a, b in zip(ends, ends[1:])], "o-",
                                           label=folder.name + ", means up to the mark", linewidth=2.5)
                panels[2].semilogx(range(1, len(by_position) + 1), by_position, alpha=0.25, color=mean.get_color())
        panel.set_title(name, fontsize=18)
        panel.set_xlabel("million tokens seen", fontsize=16)
        panel.set_ylabel("validation loss, nats per token", fontsize=16)
    panels[2].set_title("by position", fontsize=18)
    panels[2].set_xlabel("position in the context", fontsize=16)
    panels[2].set_ylabel("test loss, nats per token", fontsize=16)
    for panel in panels:
        panel.tick_params(labelsize=14)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=15)
    write_whole(out_dir / "comparison.png", lambda p: figure.savefig(p, dpi=80, format="png"))
    plt.close(figure)
    print(f"written: {out_dir / 'comparison.png'}")


def main(argv):
    config = data.configure(BenchConfig, data.parse_args(argv, __doc__, BenchConfig))
    if config.compare:
        return compare(Path(config.out_dir))
    config.batch_size = config.batch_size or (32 if config.train else 1)
    devices = [choose_device(d) for d in (devices_present() if config.device == "all" else [config.device])]
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    machine = "; ".join(device_name(d) for d in devices) + f"; torch {torch.__version__}"
    kind, bench, picture = ("training", bench_training, "bench_training.png") if config.train else \
                           ("generation", bench_generation, "bench.png")
    what = f"{kind} at batch {config.batch_size}"
    print(f"{machine}; {what}" + ("" if config.train else f", prompt {PROMPT_TOKENS}, {config.new_tokens} new tokens"))
    rows = []
    for name in MODELS if config.model == "all" else [config.model]:
        for device in devices:
            rows += bench(name, device, config)
    print(REPORT[kind])
    path, report = out_dir / "bench.json", {"machine": machine, "generation": [], "training": []}
    try:                    # the other kind's rows are kept, if they are of this machine
        before = json.loads(path.read_text(encoding="utf-8"))
        report = before if before["machine"] == machine else report
    except (OSError, ValueError, KeyError, TypeError):
        pass
    report[kind] = rows
    write_whole(path, lambda p: p.write_text(json.dumps(report, indent=1), encoding="utf-8"))
    plot_bars(rows, out_dir / picture, f"{what.capitalize()}, {machine}")
    print(f"written: {path}, {out_dir / picture}")


if __name__ == "__main__":
    data.run(main)
