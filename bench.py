"""Time generation with the report's full-size models (random weights), on every device present.

    python bench.py                             # both models on cuda, mps and cpu, whichever are here
    python bench.py --model=gpt --device=cpu --new_tokens=64
    python bench.py --device=cuda --batch_size=32
    python bench.py --help

naive: the whole context is computed anew for each token, as the report did; cached: only the newest token is; graph:
that in one launch. Prints a table, writes outputs/bench.json and outputs/bench.png. Times sample.py's own loop.
"""
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from sample import generate, to_dtype
from train import MODELS, choose_device, choose_dtype, device_name, devices_present, keep_freed_memory, write_whole

PROMPT_TOKENS = 8
REPORT = "the report, naive: Transformer 16.5 tokens/s on an A40, 13 on an M4; LSTM 16.5 on an A40, 4 on an M4"


@dataclass
class BenchConfig:
    model: Literal["all", "gpt", "lstm"] = "all"    # which to time
    device: Literal["all", "cuda", "mps", "cpu"] = "all"    # where; all: every device present
    new_tokens: int = 248           # tokens to generate after a prompt of 8; 248 fills the GPT's window of 256
    batch_size: int = 1             # sequences at once; tokens/s counts all of them
    repeats: int = 3                # runs of which the median counts
    out_dir: str = "outputs"        # where bench.json and bench.png go

    def __post_init__(self):
        if self.new_tokens < 2:     # the first comes with the prompt's pass and is not timed
            raise ValueError("new_tokens must be at least 2")
        if min(self.repeats, self.batch_size) < 1:
            raise ValueError("repeats and batch_size must be at least 1")


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


def plot_bars(rows, path, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = [f"{r['model']} {r['device']}\n{r['mode']} {r['dtype']}" for r in rows]
    figure, panel = plt.subplots(figsize=(10, 1 + 0.6 * len(rows)), layout="constrained")
    colors = [{"naive": "tab:gray", "cached": "tab:blue", "graph": "tab:green"}[r["mode"]] for r in rows]
    bars = panel.barh(labels, [r["tokens_per_second"] for r in rows], color=colors)
    labels = [f"{r['tokens_per_second']:.1f} ({r['ratio_to_naive']:.1f}x)" for r in rows]
    panel.bar_label(bars, labels, padding=4, fontsize=12)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.tick_params(labelsize=12)
    panel.set_xlabel("tokens/s", fontsize=13)
    panel.set_title(title, fontsize=13)
    write_whole(path, lambda p: figure.savefig(p, dpi=100, format="png"))
    plt.close(figure)


def main(argv):
    config = data.configure(BenchConfig, data.parse_args(argv, __doc__, BenchConfig))
    devices = [choose_device(d) for d in (devices_present() if config.device == "all" else [config.device])]
    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    keep_freed_memory()
    machine = "; ".join(device_name(d) for d in devices) + f"; torch {torch.__version__}"
    print(f"{machine}; prompt {PROMPT_TOKENS}, {config.new_tokens} new tokens, batch {config.batch_size}")
    rows = []
    for name in MODELS if config.model == "all" else [config.model]:
        for device in devices:
            rows += bench_generation(name, device, config)
    print(REPORT)
    report = {"machine": machine, "new_tokens": config.new_tokens, "batch_size": config.batch_size,
              "generation": rows, "training": []}
    write_whole(out_dir / "bench.json", lambda p: p.write_text(json.dumps(report, indent=1), encoding="utf-8"))
    plot_bars(rows, out_dir / "bench.png", f"Generation at batch {config.batch_size}, {machine}")
    print(f"written: {out_dir}/bench.json, {out_dir}/bench.png")


if __name__ == "__main__":
    data.run(main)
