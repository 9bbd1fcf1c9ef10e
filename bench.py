"""Time generation at batch 1 with the report's full-size models (random weights), on every device present.

    python bench.py                             # both models on cuda, mps and cpu, whichever are here
    python bench.py --model=gpt --device=cpu --new_tokens=64
    python bench.py --help

naive: the whole context is computed anew for each token, as the report did; cached: only the newest token is.
Prints a table, writes outputs/bench.json and outputs/bench.png. Times sample.py's own loop, invents nothing.
"""
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import data
from sample import generate
from train import MODELS, choose_device, choose_dtype, device_name, devices_present, keep_freed_memory, write_whole

PROMPT_TOKENS = 8
REPORT = "the report, naive: Transformer 16.5 tokens/s on an A40, 13 on an M4; LSTM 16.5 on an A40, 4 on an M4"


@dataclass
class BenchConfig:
    model: Literal["all", "gpt", "lstm"] = "all"    # which to time
    device: Literal["all", "cuda", "mps", "cpu"] = "all"    # where; all: every device present
    new_tokens: int = 248           # tokens to generate after a prompt of 8; 248 fills the GPT's window of 256
    repeats: int = 3                # runs of which the median counts; naive runs, a minute each on a CPU, once
    out_dir: str = "outputs"        # where bench.json and bench.png go

    def __post_init__(self):
        if self.new_tokens < 1 or self.repeats < 1:
            raise ValueError("new_tokens and repeats must be at least 1")


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
    return x.numel() * 4 / min(seconds(x.sum, device, 1) for _ in range(5))


def bytes_per_token(model):
    """Bytes of weights that one decoding step must read: all but the embedding tables, of which it reads a row."""
    return sum(p.numel() * p.element_size() for name, p in model.named_parameters()
               if not name.startswith(("wte", "wpe")))


def bench_generation(name, device, config):
    """One row per mode and dtype, as in bench.json."""
    model_class, config_class, _ = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config_class()).to(device).eval()
    idx = torch.randint(model.config.vocab_size, (1, PROMPT_TOKENS), device=device)
    bandwidth, rows = read_bandwidth(device), []
    fast = choose_dtype("auto", device)[0]
    for mode, dtype in dict.fromkeys([("naive", torch.float32), ("cached", torch.float32), ("cached", fast)]):
        model.to(dtype)

        def run(new_tokens=config.new_tokens):
            for _ in generate(model, idx, new_tokens, cached=mode == "cached"):
                pass

        run(2)                      # warm up: allocations, kernel choice
        speed = config.new_tokens / seconds(run, device, 1 if mode == "naive" else config.repeats)
        rows.append({"model": name, "device": device.type, "mode": mode, "dtype": str(dtype).removeprefix("torch."),
                     "tokens_per_second": round(speed, 2),
                     "ratio_to_naive": round(speed / rows[0]["tokens_per_second"], 2) if rows else 1.0,
                     "bandwidth_share": round(speed * bytes_per_token(model) / bandwidth, 3)})
        row = rows[-1]
        print(f"{name:<6}{device.type:<6}{mode:<8}{row['dtype']:<10}{speed:>9.1f} tokens/s"
                   f"{row['ratio_to_naive']:>8.1f} x naive{row['bandwidth_share']:>8.0%} of memory bandwidth")
    return rows


def plot_bars(rows, path, title):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    labels = [f"{r['model']} {r['device']}\n{r['mode']} {r['dtype']}" for r in rows]
    figure, panel = plt.subplots(figsize=(10, 1 + 0.6 * len(rows)), layout="constrained")
    colors = ["tab:gray" if r["mode"] == "naive" else "tab:blue" for r in rows]
    bars = panel.barh(labels, [r["tokens_per_second"] for r in rows], color=colors)
    labels = [f"{r['tokens_per_second']:.1f} ({r['ratio_to_naive']:.1f}x)" for r in rows]
    panel.bar_label(bars, labels, padding=4, fontsize=12)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.tick_params(labelsize=12)
    panel.set_xlabel("tokens/s at batch 1", fontsize=13)
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
    print(f"{machine}; prompt {PROMPT_TOKENS}, {config.new_tokens} new tokens, batch 1")
    rows = []
    for name in MODELS if config.model == "all" else [config.model]:
        for device in devices:
            rows += bench_generation(name, device, config)
    print(REPORT)
    report = {"machine": machine, "new_tokens": config.new_tokens, "generation": rows, "training": []}
    write_whole(out_dir / "bench.json", lambda p: p.write_text(json.dumps(report, indent=1), encoding="utf-8"))
    plot_bars(rows, out_dir / "bench.png", f"Generation, {machine}")
    print(f"written: {out_dir}/bench.json, {out_dir}/bench.png")


if __name__ == "__main__":
    data.run(main)
