"""Time generation, or training, of the report's full-size models (random weights); compare runs.

    python bench.py                             # both models, on every device present
    python bench.py --model=gpt --device=cpu --new_tokens=64 --out_dir=outputs/short
    python bench.py --device=cuda --batch_size=32 --out_dir=outputs/batch32
    python bench.py --train=True                # training, report's recipe to tuned recipe
    python bench.py --compare=True              # the trained runs under outputs/, side by side
    python bench.py --help

Modes of generation: naive recomputes the whole context for each token, as the report did. cached
computes only the newest token. graph does so in one launch (a CUDA graph), compiled with fused
kernels. Prints a table; writes bench.json (with --train, bench_training.json) and a bar chart. The
code timed is the loop of sample.py and the train_step of train.py, unchanged.
"""
import glob
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from timeit import timeit
from typing import Literal

import numpy as np
import torch
import torch.nn as nn

import data
from data import UserError
from model_gpt import GPT
from model_lstm import LSTM
from sample import generate, to_dtype
from train import MODELS, RECIPES, TrainConfig, Trainer, choose_device, choose_dtype, compile_fault, \
    device_name, devices_present, peak_memory_gb, picture, set_matmul_precision, write_json

PROMPT_TOKENS = 8
# Peak dense bfloat16 TFLOP/s, from NVIDIA's data sheets (the SXM card, if there is one). A training row's MFU
# is the share of this peak that it reaches, even if the row is in float32.
PEAK_TFLOPS = {"A40": 149.7, "A100": 312, "H100": 989, "H200": 989, "RTX 3090": 71, "RTX 4090": 165.2}


@dataclass
class BenchConfig:
    """What to time."""
    model: Literal["all", "gpt", "lstm"] = "all"    # which model
    device: Literal["all", "cuda", "mps", "cpu"] = "all"    # where; all: every device present
    train: bool = False             # time training steps instead of generation
    compare: bool = False           # time nothing: compare the finished runs below out_dir
    new_tokens: int = 248           # after a prompt of 8; 248 fills the GPT's window of 256
    batch_size: int = 0             # sequences at once; 0: 1 to generate, the report's 32 to train
    repeats: int = 3                # timed runs; the median is reported
    out_dir: str = "outputs"        # where the JSON file and the chart go

    def __post_init__(self):
        if self.new_tokens < 2 or self.repeats < 1:     # the first token is timed separately
            raise ValueError("new_tokens must be at least 2, and repeats at least 1")


def seconds(function, device):
    """How long function() takes. A GPU runs asynchronously, so it must be synchronized."""
    synchronize = getattr(torch, device.type).synchronize
    return timeit(lambda: (function(), synchronize()), setup=synchronize, number=1)


# ----------------------------------------------------------------------------------------------------
# Generation

def bench_generation(name, device, config):
    """Yield one row per mode and dtype, as in bench.json."""
    model_class, config_class, _ = MODELS[name]
    prompt = torch.randint(config_class().vocab_size, (config.batch_size, PROMPT_TOKENS), device=device)
    exact, bandwidth, naive = torch.float32, read_bandwidth(device), None
    fast = choose_dtype("auto", device)[0]
    ways = [("naive", exact), ("cached", exact), ("cached", fast)]
    if device.type == "cpu":
        ways.append(("cached", torch.int8))
    if device.type == "cuda":
        ways += [("graph", fast)] if compile_fault(device) else [("graph", fast), ("compiled", fast)]
    for mode, dtype in dict.fromkeys(ways):
        model = model_class(config_class()).to(device).eval()
        # weights read per token: all but the embedding tables, of which it reads only one row each
        n_weights = sum(p.numel() for k, p in model.named_parameters() if not k.startswith(("wte", "wpe")))
        set_matmul_precision(dtype)
        if mode != "naive":             # naive runs the model as it was trained, in float32
            to_dtype(model, dtype)
        first, per_token = token_seconds(model, prompt, config, mode)
        del model                                       # before the next is built: two may not fit
        speed = config.batch_size / per_token
        naive = naive or speed
        share = n_weights * dtype.itemsize / per_token / bandwidth
        yield {"model": name, "device": device.type, "mode": mode, "dtype": str(dtype).removeprefix("torch."),
               "tokens_per_second": round(speed, 2), "ratio": round(speed / naive, 2),
               "first_token_ms": round(1000 * first, 2),
               "bandwidth_share": round(share, 3), "bandwidth_gb_per_second": round(bandwidth / 1e9, 1)}


@lru_cache      # once per device, so that the shares of both models can be compared
def read_bandwidth(device):
    """Memory bandwidth in bytes per second, from summing a gigabyte of float32, which fits no cache."""
    x = torch.ones(2 ** 28, device=device)
    x.sum()
    return x.numel() * 4 / median(seconds(x.sum, device) for _ in range(9))


def token_seconds(model, prompt, config, mode):
    """Seconds to the first token, prompt (and graph capture) included, and seconds per token after it. In
    naive mode a pass takes longer as the context grows, and all 248 of an LSTM take minutes. So one pass at
    the middle length stands for all."""
    first, rest, n = [], [], config.new_tokens - 1
    middle = prompt[:, :1].expand(-1, min(PROMPT_TOKENS + config.new_tokens // 2, model.window))
    for _ in range(1 + config.repeats):         # the first run warms up
        stream = generate(model, prompt, config.new_tokens, mode=mode)
        first.append(seconds(lambda: next(stream), prompt.device))
        if mode == "naive":
            stream, n = generate(model, middle, 1, mode=mode), 1
        rest.append(seconds(lambda: list(stream), prompt.device))
    return median(first[1:]), median(rest[1:]) / n


# ----------------------------------------------------------------------------------------------------
# Training

class TorchLSTM(LSTM):
    """The same model on PyTorch's own nn.LSTM, without skips: what the report's RNN most likely was."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.LSTM(config.n_embd, config.n_hidden, config.n_layer)

    def _hidden(self, idx, state, recurrence):
        return self.blocks(self.wte(idx.t()))[0].transpose(0, 1), None


REPORT, MIXED = RECIPES["report"], {**RECIPES["report"], "dtype": "auto"}
# From the report's recipe to the tuned one: a label, the model's class, and the keys of train.py.
CHANGES = {
    "gpt": [("report: float32, attention by hand", GPT, REPORT),
            ("mixed precision", GPT, MIXED),
            ("fused attention", GPT, {**MIXED, "fused_attention": True}),
            ("torch.compile", GPT, {**MIXED, "fused_attention": True, "compile": True}),
            ("tuned recipe, with Muon", GPT, {})],
    "lstm": [("report: nn.LSTM, float32", TorchLSTM, REPORT),
             ("nn.LSTM, mixed precision", TorchLSTM, MIXED),
             ("by hand, float32", LSTM, {**REPORT, "cudnn": False}),
             ("by hand, mixed precision", LSTM, {**MIXED, "cudnn": False}),
             ("cuDNN, bfloat16", LSTM, {**MIXED, "dtype": "bfloat16"}),
             ("cuDNN layer by layer", LSTM, MIXED),
             ("tuned recipe, with skips", LSTM, {})]}


def bench_training(name, device, config):
    """Yield one row per change, from the report's recipe to the tuned one, as in bench_training.json."""
    first = None
    for label, model_class, keys in CHANGES[name]:
        if label.startswith(("torch.compile", "cuDNN")) and device.type != "cuda":
            continue
        if label == "torch.compile" and compile_fault(device):
            continue
        if device.type == "cuda":
            torch.compiler.reset()      # else the CUDA graphs of the previous row keep their memory
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        model = model_class(data.configure(MODELS[name][1], keys)).to(device)
        settings = data.configure(TrainConfig, keys, {"model": name, "batch_size": config.batch_size})
        n_tokens = config.batch_size * model.config.block_size + 1
        tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=n_tokens)
        trainer = Trainer(settings, model, {"train": tokens})
        trainer.train_step()                            # warm up: compilation, allocations, the moments
        n_steps = 1 if device.type == "cpu" else 10     # on a GPU steps queue up, except in float16
        taken = median(seconds(lambda: [trainer.train_step() for _ in range(n_steps)], device)
                       for _ in range(config.repeats))
        speed = n_steps * trainer.tokens_per_step / taken
        dtype, tflops, first = trainer.dtype, speed * model.flops_per_token() / 1e12, first or speed
        del model, trainer                              # before the next is built: two may not fit
        yield {"model": name, "device": device.type, "change": label, "batch_size": config.batch_size,
               "dtype": str(dtype).removeprefix("torch."), "tokens_per_second": round(speed, 1),
               "ratio": round(speed / first, 2), "tflops": round(tflops, 3),
               "mfu": mfu(tflops, device_name(device)), "peak_memory_gb": peak_memory_gb(device)}


def mfu(tflops, gpu):
    """Model FLOPs utilisation (Chowdhery et al. 2022), the share of the GPU's peak; None where unknown."""
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", gpu)]
    return round(tflops / peaks[0], 3) if peaks else None


# ----------------------------------------------------------------------------------------------------
# Comparing runs

def compare(out_dir):
    """Print a Markdown table of the finished runs in and below out_dir for each dataset, and draw
    comparison.png, see compare_curves. Raises UserError for a run that is damaged or of an older version."""
    runs = {}       # dataset -> [results of a run, with its folder, its curve and its row of the table]
    found = glob.glob("**/results.json", root_dir=out_dir, recursive=True)      # also behind links
    for folder in (Path(name).parent for name in sorted(found)):
        if "previous" in folder.parts:          # set aside by train.py
            continue
        try:
            run = json.loads((out_dir / folder / "results.json").read_text(encoding="utf-8"))
            lines = (out_dir / folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            run |= {"folder": folder, "curve": [json.loads(line) for line in lines]}
            run["row"] = ("| {folder} | {tokens_seen:,} | {tokens_per_second:,.0f} | {peak_memory_gb} | "
                          "{val_loss:.3f} | {test_loss:.3f} | {test_bits_per_character:.3f} |").format(**run)
            runs.setdefault(run["config"]["dataset"], []).append(run)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{out_dir / folder} is damaged, or of an older version ({error}): "
                            "move it away") from None
    if not runs:
        raise UserError(f"no finished run in or below {out_dir}: run `python train.py` first")
    with picture(out_dir / "comparison.png", 3, 21, 7 * len(runs), len(runs)) as rows:
        for (dataset, of_dataset), panels in zip(runs.items(), rows):
            print(f"\n| {dataset} | tokens | tokens/s | peak GB | best val | test | bits per character |\n"
                  "|---|---|---|---|---|---|---|", *(run["row"] for run in of_dataset), sep="\n")
            compare_curves(dataset, of_dataset, panels)
    print(f"written: {out_dir / 'comparison.png'}")


def compare_curves(dataset, runs, panels):
    """Three panels: the validation curves of the Transformers and of the LSTMs (darker is better), and the
    test loss by position of the best of each."""
    from matplotlib import colormaps
    for panel, name, colours in zip(panels, MODELS, ("Blues", "Oranges")):
        mine = sorted((r for r in runs if r["config"]["model"] == name), key=lambda run: run["test_loss"])
        for run, shade in zip(mine, np.linspace(0.9, 0.3, len(mine))):
            million, losses = zip(*((row["tokens_seen"] / 1e6, row["val_loss"]) for row in run["curve"]))
            panel.plot(million, losses, color=colormaps[colours](shade), label=run["folder"].name)
        if mine:
            by_position = mine[0]["test_loss_by_position"]
            ends = [0] + [2 ** k for k in range(20) if 2 ** k < len(by_position)] + [len(by_position)]
            means = [np.mean(by_position[a:b]) for a, b in zip(ends, ends[1:])]
            panels[2].semilogx(ends[1:], means, "o-", color=colormaps[colours](0.9), label=name)
            panel.legend()
        panel.set(title=f"{name}, {dataset}", xlabel="million tokens seen", ylabel="validation loss, nats")
    panels[2].set(title=f"the best of each, {dataset}", ylabel="test loss, nats",
                  xlabel="position in the context (mean since the previous mark)")
    panels[2].legend()


def plot_bars(rows, path, title):
    with picture(path, 1, 10, 1 + 0.6 * len(rows)) as ((panel,),):
        labels = [f"{r['model']} {r['device']}\n{r.get('change') or r['mode']}, {r['dtype']}" for r in rows]
        colors = [{"gpt": "tab:blue", "lstm": "tab:orange"}[r["model"]] for r in rows]
        bars = panel.barh(labels, [r["tokens_per_second"] for r in rows], color=colors)
        panel.bar_label(bars, [f"{r['tokens_per_second']:,.1f} ({r['ratio']:.1f}x)" for r in rows], padding=4)
        panel.invert_yaxis()
        panel.margins(x=0.3)
        panel.set(xlabel="tokens/s", title=title)


def main(argv):
    config = data.configure(BenchConfig, data.parse_args(argv, __doc__, BenchConfig))
    out_dir = Path(config.out_dir)
    if config.compare:
        return compare(out_dir)
    config.batch_size = config.batch_size or (32 if config.train else 1)
    devices = [choose_device(d) for d in (devices_present() if config.device == "all" else [config.device])]
    out_dir.mkdir(parents=True, exist_ok=True)
    machine = "; ".join(device_name(d) for d in devices) + f"; torch {torch.__version__}"
    kind, bench, path = ("training", bench_training, out_dir / "bench_training.json") if config.train else \
                        ("generation", bench_generation, out_dir / "bench.json")
    what = f"{kind} at batch {config.batch_size}"
    print(f"{machine}; {what}" + ("" if config.train else f", {PROMPT_TOKENS} + {config.new_tokens} tokens"))
    rows = []
    for name in MODELS if config.model == "all" else [config.model]:
        for device in devices:
            for row in bench(name, device, config):
                if not rows:                            # a table in Markdown
                    print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
                rows.append(row)
                print("| " + " | ".join(map(str, row.values())) + " |", flush=True)
                # each as it is measured: an error later on loses nothing
                write_json(path, {"machine": machine, "what": what, "rows": rows})
    plot_bars(rows, path.with_suffix(".png"), f"{what.capitalize()}\n{machine}")
    print(f"written: {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    data.run(main)
