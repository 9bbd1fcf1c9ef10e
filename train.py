"""Train a language model: data/NAME/ -> outputs/transformer/ or outputs/rnn/.

    python train.py                         # the Transformer, on data/plwiki; on mini where nothing is prepared
    python train.py --model=lstm            # the stacked LSTM
    python train.py --recipe=report         # trained as the report did, for comparison
    python train.py --init_from=resume      # go on after a kill, a crash or Ctrl-C
    torchrun --nproc_per_node=8 train.py    # the same run, its batches divided among 8 GPUs
    python train.py [--model=lstm] --help   # every key

Owns the checkpoint: writes ckpt.pt (best) and last.pt (newest), and reads them back.
"""
import ctypes
import fcntl
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from data import UserError, progress_bar
from model_gpt import GPT, CrossEntropy, GPTConfig
from model_lstm import LSTM, LSTMConfig

FORMAT_VERSION = 3      # of the checkpoints; raised when an older one can no longer be read
MODELS = {"gpt": (GPT, GPTConfig, "outputs/transformer"), "lstm": (LSTM, LSTMConfig, "outputs/rnn")}


@dataclass
class TrainConfig:
    model: Literal["gpt", "lstm"] = "gpt"           # which of the two
    dataset: str = ""                   # folder under data/; empty: plwiki where prepared, else mini
    out_dir: str = ""                   # where the results go; empty: outputs/transformer or outputs/rnn
    init_from: Literal["scratch", "resume"] = "scratch"     # resume: go on from out_dir/last.pt
    recipe: Literal["tuned", "report"] = "tuned"    # report: Adam as the report used it, see RECIPES
    # a step
    batch_size: int = 32                # sequences per forward pass, all processes together
    gradient_accumulation_steps: int = 1    # forward passes per step; a step sees the product of the two
    # budget: training ends at whichever comes first
    max_iters: int = 0                  # steps; 0: no limit
    max_minutes: float = 120.0          # minutes, evaluations included, the final test not
    # optimizer
    optimizer: Literal["adamw", "adam"] = "adamw"   # adam: its weight decay is mixed into the gradient
    learning_rate: float = 5e-4         # the highest
    weight_decay: float = 0.1           # pull of the weights towards zero; adamw: matrices only
    beta1: float = 0.9                  # memory of Adam's mean of gradients
    beta2: float = 0.95                 # memory of Adam's mean of squares; 0.999 is PyTorch's
    schedule: Literal["cosine", "constant"] = "cosine"      # cosine: to the end of max_iters, else of max_minutes
    warmup: int = 100                   # steps from zero to learning_rate
    min_lr: float = 5e-5                # where the cosine ends; a tenth of learning_rate is usual
    grad_clip: float = 1.0              # longest gradient, in global norm; 0: no clipping
    # evaluation and logging
    eval_interval: int = 100            # steps between evaluations on train and val
    eval_iters: int = 10                # batches of each in an evaluation, always the same ones
    log_interval: int = 10              # steps between updates of the shown loss
    wandb_log: bool = False             # log to Weights & Biases; WANDB_MODE=offline needs no account
    wandb_project: str = "polish-lm"    # project name there
    wandb_run_name: str = ""            # run name there; empty: chosen by it
    # machine
    seed: int = 1337                    # of the start weights, the order of the data and dropout
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first of these that is there
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of the matrix products
    compile: Literal["auto", "True", "False"] = "auto"      # torch.compile, for the GPT; auto: on CUDA

    def __post_init__(self):
        for key in ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1")
        for key in ("beta1", "beta2"):
            if getattr(self, key) >= 1:
                raise ValueError(f"{key} must be below 1")
        if self.schedule == "cosine" and self.min_lr > self.learning_rate:
            raise ValueError(f"min_lr {self.min_lr} is above learning_rate {self.learning_rate}: lower it too")
        if self.compile == "True" and self.model == "lstm":
            raise ValueError("compile unrolls the LSTM's loop over time, which takes longer than it saves: leave --compile out")
        if not (self.max_minutes or self.max_iters):
            raise ValueError("max_minutes 0 needs max_iters")


# The two recipes. The dataclass defaults are the tuned one; here is all in which the report's differs. Each line
# is a key of its own, so `--recipe=report --optimizer=adamw` measures one change.
RECIPES = {"tuned": {}, "report": {
    "optimizer": "adam",            # decay 0.1 inside the gradient, which Adam then divides by its size
    "beta2": 0.999,
    "schedule": "constant", "warmup": 0,
    "grad_clip": 0.0,
    "dtype": "float32", "compile": "False",
    "fused_attention": False,       # GPT only
    "residual": False,              # LSTM only
}}

# Sizes for the embedded dataset: about three minutes on two CPU cores.
MINI = {"block_size": 128, "max_iters": 500, "learning_rate": 2e-3, "min_lr": 2e-4, "warmup": 50,
        "n_layer": 4, "n_head": 4, "n_embd": 128, "n_hidden": 192}

# Keys that a resumed run may change. Some of them bend the rest of its curve; any other would make it another run.
MAY_CHANGE = {"init_from", "out_dir", "max_iters", "max_minutes", "learning_rate", "min_lr", "warmup", "eval_interval",
              "log_interval", "wandb_log", "wandb_project", "wandb_run_name", "device", "compile"}

# What a run leaves in out_dir and a new one there sets aside. metrics.jsonl goes first: where it is gone, after a kill in
# between, the next start moves the rest (see only_started)
RUN_FILES = ("metrics.jsonl", "learning_curves.png", "test_loss_by_position.json", "transformer_inference_results.json",
             "rnn_inference_results.json", "results.json", "ckpt.pt", "last.pt")
# A line of metrics.jsonl
METRICS = ("step", "tokens_seen", "minutes", "train_loss", "train_perplexity", "val_loss", "val_perplexity", "learning_rate",
           "tokens_per_second")


# ----------------------------------------------------------------------------------------------------------
# Choosing the machine, for train.py, sample.py and bench.py

def devices_present():
    """Of cuda, mps and cpu those that are here, the fastest first."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name in present if present[name]]


def choose_device(name="auto"):
    """"auto", "cuda", "mps" or "cpu" -> torch.device. Raises UserError when it is not there."""
    if name == "auto":
        name = devices_present()[0]
    if name not in devices_present():
        raise UserError(f"--device={name}: there is none here; use --device=cpu")
    if name != "cuda":
        return torch.device(name)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here: lower --nproc_per_node")
    return torch.device("cuda", local_rank)


def choose_dtype(name, device, training=True):
    """-> the torch.dtype of the matrix products, and why. Raises UserError where int8 is not to be had.

    cuda: bfloat16 from Ampere on, else float16. cpu: bfloat16 where the processor multiplies it (AVX512-BF16, AMX);
    elsewhere it would be emulated, slower than float32. mps: float32 to train, float16 to generate.
    """
    if name == "int8" and device.type == "cuda":
        raise UserError("--dtype=int8 is for cpu and mps: leave --dtype out")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "mps" and not training:
        return torch.float16, "half the bytes to read"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU has bfloat16"
        return torch.float16, "this GPU has no bfloat16"
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "this CPU has bfloat16 arithmetic"
    return torch.float32, f"no fast bfloat16 arithmetic on this {device.type}"


def set_matmul_precision(dtype):
    """Where float32 remains beside a half precision, let CUDA round it to TF32's 10 bits; asked for float32, keep it."""
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def keep_freed_memory():
    """On Linux, let malloc keep what it frees: by default each large tensor is handed back to the kernel, which
    zeroes its pages again for the next one, a fifth to a third of a training step on a CPU. Elsewhere: nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0), mallopt(-1, -1)     # M_MMAP_MAX: no tensor in a mapping of its own; M_TRIM_THRESHOLD: never trim


def peak_memory_gb(device):
    """The most memory so far, in GB: what PyTorch held of the GPU's, else this process of the machine's."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} cores"


# ----------------------------------------------------------------------------------------------------------
# Files: written beside and renamed, so that whoever reads, or pulls the plug, finds the old one or the new one

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def write_whole(path, write):
    """Call write(temporary path), then put the file in the place of path."""
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        write(scratch)
        with open(scratch, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:    # torch.save on a full disk: RuntimeError
        scratch.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({first_line(error)}); what was there before is whole") from None


def kinds(tensors):
    """{name: tensor} -> {name: all that must be the same for one tensor to be copied to the other}"""
    return {k: (v.shape, v.dtype, v.layout) for k, v in tensors.items()}


def load_checkpoint(path):
    """The dict that train.py saved at path, on the CPU. Raises UserError when it is missing or not one of ours."""
    if not path.is_file():
        model = "".join(f" --model={m}" for m in MODELS if m != "gpt" and MODELS[m][2] == str(path.parent))
        raise UserError(f"no checkpoint at {path}: run `python train.py{model}` first (on mini: three minutes)")
    try:
        # weights_only: a checkpoint from a stranger must not run code
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if checkpoint.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format {checkpoint.get('format_version')}, this code reads {FORMAT_VERSION}")
        checkpoint["step"], checkpoint["data_sha256"] = int(checkpoint["step"]), str(checkpoint["data_sha256"])
        checkpoint["metrics"] = [{k: row[k] for k in METRICS} for row in checkpoint["metrics"]]
        numbers = [v for row in checkpoint["metrics"] for v in row.values()]
        if not numbers or not all(type(v) in (int, float) and math.isfinite(v) for v in numbers):
            raise ValueError("its metrics are not numbers")
        model_class, config_class, _ = MODELS[checkpoint["config"]["model"]]
        for key, cls in (("config", TrainConfig), ("model_config", config_class)):      # checked as if typed
            typed = data.parse_args([f"--{k}={v}" for k, v in checkpoint[key].items()], "", cls)
            checkpoint[key] = asdict(data.configure(cls, typed))
        weights, config = checkpoint["model"], config_class(**checkpoint["model_config"])
        if config.n_layer > len(weights):
            raise ValueError("it has more layers than weights")
        with torch.device("meta"):      # shapes only: nothing is allocated for a file that does not fit together
            expected = model_class(config).state_dict()
        if kinds(weights) != kinds(expected) or not all(v.is_cpu for v in weights.values()):
            raise ValueError("its weights are not those of its configuration")
        if sum(v.nbytes for v in expected.values()) > path.stat().st_size:
            raise ValueError("it is smaller than its weights")
    except (Exception, UserError) as error:     # a damaged file can raise anything
        raise UserError(f"{path} is damaged or not a checkpoint of this project ({first_line(error)})") from None
    return checkpoint


def identity(checkpoint):
    """All that two checkpoints of one run have in common."""
    fixed = {k: v for k, v in checkpoint["config"].items() if k not in MAY_CHANGE}
    return checkpoint["model_config"], checkpoint["data_sha256"], fixed


def only_started(out_dir):
    """Has the run in out_dir taken its first evaluation and not one step that was saved?"""
    history, last = out_dir / "metrics.jsonl", out_dir / "last.pt"
    if not history.exists() or history.read_bytes().count(b"\n") > 1:
        return False
    try:
        return not last.exists() or load_checkpoint(last)["step"] == 0
    except UserError:
        return False


def claim_folder(out_dir, resumed):
    """Make out_dir this run's own -> the lock, an open file. A new run moves what the last one left to out_dir/previous.

    Raises UserError where another run is writing there.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = open(out_dir / ".lock", "w")         # the system frees it when the program ends, however it does
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {out_dir}: choose another --out_dir") from None
    except OSError:                             # a network folder may know no locks
        pass
    # A command typed too soon must not cost the last run; typed twice neither: a run that only wrote its start would take
    # the place of a better one.
    files = [out_dir / name for name in RUN_FILES if (out_dir / name).exists()]
    moving, previous = out_dir / ".previous.tmp", out_dir / "previous"
    if not resumed and files and not only_started(out_dir):
        moving.mkdir(exist_ok=True)
        for file in files:
            os.replace(file, moving / file.name)
    if moving.exists():     # also where a kill has come between these moves
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(moving, previous)
        print(f"the last run in {out_dir} is now in {previous}")
    return lock


def check_size(model_class, config, device):
    """Raises UserError for a model that this device cannot train, before any of it is allocated: a CPU's system would not
    refuse the memory, but kill the program later."""
    try:
        with torch.device("meta"):
            need = 16 * model_class(config).num_params()        # a weight, its gradient and two moments in float32
    except (RuntimeError, TypeError):                           # sizes beyond 64 bits
        need = math.inf
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2 ** 40
    if need > have:
        raise UserError(f"the model needs {need / 1e9:,.0f} GB to train, here are {have / 1e9:,.0f}: lower --n_layer or --n_embd")


def build_model(checkpoint):
    """The model of a checkpoint, with its weights, in eval mode."""
    model_class, config_class, _ = MODELS[checkpoint["config"]["model"]]
    model = model_class(config_class(**checkpoint["model_config"]))
    model.load_state_dict(checkpoint["model"])
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError("the checkpoint holds weights that are not finite: train again with a lower --learning_rate")
    return model.eval()


def restore(saved, path, model, optimizer, scaler):
    """Put the contents of last.pt into model, optimizer and scaler (None: not float16) -> step, tokens seen, minutes, lost
    steps (in a row, in all) and wandb id. Raises UserError where something does not fit, which else would fail at some later
    step."""
    try:
        state = {}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for i, p in enumerate(parameters if saved["optimizer"]["state"] else ()):      # before the first step it is empty
            moments = saved["optimizer"]["state"][i]
            if kinds(moments) != kinds({"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p}):
                raise ValueError("its optimizer is not of its model")
            # copies: away from the file, and every number in a place of its own, whatever strides the file claims
            state[i] = {k: v.clone(memory_format=torch.contiguous_format) for k, v in moments.items()}
        counts = int(saved["step"]), int(saved["tokens_seen"]), float(saved["minutes"]), *map(int, saved["lost_steps"])
        if not all(0 <= v < 2 ** 48 for v in counts):
            raise ValueError("a number is out of range")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})   # its settings come from the config
        if scaler and saved["loss_scale"]:      # None: the run was not in float16 before
            scale, since = float(saved["loss_scale"]["scale"]), int(saved["loss_scale"]["_growth_tracker"])
            if not (0 < scale < 1e38 and 0 <= since < 2 ** 31):
                raise ValueError("its loss scale is out of range")
            scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": since})
        step, tokens_seen, minutes, in_a_row, lost = counts
        return step, tokens_seen, minutes, (in_a_row, lost), saved["wandb_id"] and str(saved["wandb_id"])
    except Exception as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)})") from None


def plot_curves(metrics, best, path, title):
    """Loss and perplexity on train and val against tokens seen, the line of metrics that is best marked -> a PNG file."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for panel, kind in zip(panels, ("loss", "perplexity")):
        for split, style in (("train", "--"), ("val", "-")):
            panel.plot([m["tokens_seen"] / 1e6 for m in metrics], [m[f"{split}_{kind}"] for m in metrics], style,
                       label=split, linewidth=2)
        panel.plot(best["tokens_seen"] / 1e6, best[f"val_{kind}"], "o", color="black",
                   label=f"best val {best[f'val_{kind}']:.4g}")
        panel.set_xlabel("million tokens seen", fontsize=14)
        panel.set_ylabel("loss, nats per token" if kind == "loss" else "perplexity", fontsize=14)
        panel.tick_params(labelsize=12)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=13)
    panels[1].set_yscale("log")
    figure.suptitle(title, fontsize=15)
    write_whole(path, lambda p: figure.savefig(p, dpi=100, format="png"))
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------
# Optimization

def make_optimizer(model, config):
    if config.optimizer == "adam":
        # As the report: every parameter decays, and the decay passes through Adam's division by the gradient's
        # size. Where gradients are small it is then the decay that is divided up to full step length.
        return torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2),
                                weight_decay=config.weight_decay)
    # Decay apart from the gradient (Loshchilov and Hutter 2019), and on matrices only: shrinking a bias or a
    # layer norm's gain towards zero regularises nothing.
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    # fused: one kernel for all; MPS's, before PyTorch 2.13, would not leave out a step that the scaler leaves out
    fused = groups[0]["params"][0].device.type != "mps"
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def learning_rate_at(config, step, minutes):
    """Linear warmup, then a cosine from learning_rate to min_lr (Loshchilov and Hutter 2017).

    The cosine follows max_iters where it is given: then a step depends on its number alone and can be replayed.
    Otherwise it follows the clock.
    """
    if config.schedule == "constant":
        return config.learning_rate
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = min(1.0, step / config.max_iters if config.max_iters else minutes / config.max_minutes)
    return config.min_lr + (config.learning_rate - config.min_lr) * (1 + math.cos(math.pi * done)) / 2


def share_done(config, step, minutes):
    """How much of the budget is used, 1 at its end."""
    return max(step / config.max_iters if config.max_iters else 0, minutes / config.max_minutes if config.max_minutes else 0)


def perplexity(loss):
    """The number of equally likely tokens that would be as hard to guess; capped, for a diverged loss can be 1000."""
    return math.exp(min(loss, 100.0))


@torch.no_grad()
def evaluate(model, tokens, windows, batch_size, autocast, device, world, progress=False):
    """Mean loss, in nats per token, over the given windows of a split, at each position of a window -> (T,) float64.
    Each process takes its share."""
    model.eval()
    rank, world_size = world
    block_size = model.config.block_size
    total = torch.zeros(block_size + 1, dtype=torch.float64)    # summed loss at each position; number of windows
    mine = windows[rank::world_size]
    for i in progress_bar(range(0, len(mine), batch_size), desc="test", disable=not progress):
        idx, targets = data.get_batch(tokens, mine[i:i + batch_size], block_size, device)
        with autocast:
            logits = model(idx, targets)[0]
        losses = CrossEntropy.apply(logits.flatten(0, 1), targets.flatten()).view_as(targets)
        total[:-1] += losses.sum(dim=0).cpu()
        total[-1] += len(idx)
    if world_size > 1:
        dist.all_reduce(total)
    model.train()
    return total[:-1] / total[-1]


def may_fail(what, call):
    """call(), for Weights & Biases and the picture: whatever goes wrong there must not stop the training."""
    try:
        return call()
    except Exception as error:
        print(f"{what} failed, the run goes on: {first_line(error)}")


def start_wandb(config, model_config, run_id):
    import wandb
    return wandb.init(project=config.wandb_project, name=config.wandb_run_name or None,
                      config={**asdict(config), **asdict(model_config)}, dir=config.out_dir, id=run_id,
                      resume="allow" if run_id else None)


def compiled(model, config, device):
    """model through torch.compile, if that is wanted and works here: it needs a C compiler and, on CUDA, Python's headers."""
    if config.model == "lstm" or config.compile == "False" or config.compile == "auto" and device.type != "cuda":
        return model
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(16, device=device))
        return torch.compile(model)
    except Exception as error:
        if config.compile == "True":
            raise UserError(f"torch.compile does not work here ({first_line(error)}): leave --compile out") from None
        print(f"torch.compile does not work here ({first_line(error)}): the run goes on without it, somewhat slower")
        return model


def outlive_reader(stream):
    """From now on writing to stream never fails: Ctrl-C also ends the tee of `python train.py | tee log`, a lost connection
    the terminal, and the run must still save."""
    for name in ("write", "flush"):
        def safe(*args, call=getattr(stream, name)):    # a default, so that each keeps its own
            try:
                return call(*args)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

        setattr(stream, name, safe)


# ----------------------------------------------------------------------------------------------------------

def main(argv):
    # What to run: the defaults, mini's sizes, the recipe, the command line; or the interrupted run
    first = [a for a in argv if a.split("=")[0] in ("--model", "--init_from", "--out_dir")]     # what decides the rest
    first = data.parse_args(first, "", TrainConfig)
    name, saved = first.get("model", "gpt"), None
    out_dir = Path(first.get("out_dir") or MODELS[name][2])
    if first.get("init_from") == "resume" and "--help" not in argv:
        saved = load_checkpoint(out_dir / "last.pt")
        name = first.get("model", saved["config"]["model"])
    model_class, config_class, _ = MODELS[name]
    keys = data.parse_args(argv, __doc__, TrainConfig, config_class)
    if saved:
        before = {**saved["model_config"], **saved["config"]}
        for key in sorted(keys.keys() - MAY_CHANGE, key=lambda key: key != "model"):
            if keys[key] != before[key]:
                raise UserError(f"the run in {out_dir} has --{key}={before[key]}, not {keys[key]}: leave the key out, "
                                "or start another run with another --out_dir")
        layers = [before]
    else:
        dataset = keys.get("dataset") or ("plwiki" if Path("data/plwiki/meta.json").exists() else "mini")
        recipe = RECIPES[keys.get("recipe", "tuned")]
        layers = [MINI if dataset == "mini" else {}, recipe, keys, {"dataset": dataset}]
    config = data.configure(TrainConfig, *layers, keys if saved else {}, {"out_dir": str(out_dir)})
    rank, world_size = world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    main_process = rank == 0
    if main_process and not saved and config.dataset == "mini" and not keys.get("dataset"):
        print("data/plwiki is not prepared (see data.py): training on the embedded dataset, mini")

    device = choose_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    dtype, reason = choose_dtype(config.dtype, device)
    if world_size > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if device.type == "mps":
            raise UserError("torchrun works with cuda and cpu: --device=cpu")
        # what is on the CPU is exchanged by gloo: the clock of each step need not wait for the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if config.batch_size % world_size:
            raise UserError(f"batch_size {config.batch_size} cannot be divided among {world_size} processes")

    # Data
    if main_process and config.dataset == "mini" and not Path("data/mini/meta.json").exists():
        data.main(["--dataset=mini"])
    if world_size > 1:
        dist.barrier()
    meta, splits = data.load_dataset(config.dataset)
    model_config = data.configure(config_class, {"vocab_size": meta["vocab_size"]}, *layers)
    if model_config.vocab_size < meta["vocab_size"]:
        raise UserError(f"vocab_size {model_config.vocab_size} is below the dataset's {meta['vocab_size']}")
    if saved and saved["data_sha256"] != meta["splits"]["train"]["sha256"]:
        raise UserError(f"data/{config.dataset} has been prepared anew since this run began: it cannot go on")
    T = model_config.block_size
    n_windows = {split: data.n_windows(tokens, T) for split, tokens in splits.items()}
    if min(n_windows.values()) < 1:
        raise UserError(f"data/{config.dataset} is too small: a split holds no window of block_size + 1 = {T + 1} tokens")
    if config.batch_size * config.gradient_accumulation_steps > n_windows["train"]:
        raise UserError(f"batch_size x gradient_accumulation_steps is {config.batch_size * config.gradient_accumulation_steps}, "
                        f"above the {n_windows['train']} windows of training data")
    check_size(model_class, model_config, device)
    # the evaluation windows: always the same, spread over the whole split
    eval_windows = {split: np.unique(np.linspace(0, n - 1, min(n, config.eval_iters * config.batch_size), dtype=int))
                    for split, n in n_windows.items() if split != "test"}
    eval_batch = config.batch_size // world_size
    tokens_per_step = config.batch_size * config.gradient_accumulation_steps * T

    # Model and optimizer
    torch.manual_seed(config.seed)
    set_matmul_precision(dtype)
    model = model_class(model_config).to(device)
    optimizer = make_optimizer(model, config)
    # The scaler leaves out a step whose gradient is not finite; with a fused optimizer nobody waits for the device to know.
    # For float16, whose small gradients would be 0, it also multiplies the loss by a large number, which it seeks; else by 1.
    half = dtype == torch.float16
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0 ** 16 if half else 1.0)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext()
    step, tokens_seen, minutes_before, metrics, lost_steps, run_id, best_val = 0, 0, 0.0, [], (0, 0), None, math.inf
    if saved:
        metrics = saved["metrics"]
        step, tokens_seen, minutes_before, lost_steps, run_id = restore(saved, out_dir / "last.pt", model, optimizer,
                                                                        scaler if half else None)
        if share_done(config, step, minutes_before) >= 1 and metrics[-1]["step"] == step and (out_dir / "results.json").exists():
            if main_process:
                print(f"the run in {out_dir} is finished: {step} steps, {minutes_before:.1f} minutes (see results.json). "
                      "--max_iters or --max_minutes above that go on with it")
            return
        if (out_dir / "ckpt.pt").exists():
            kept = load_checkpoint(out_dir / "ckpt.pt")
            if identity(kept) != identity(saved):
                raise UserError(f"{out_dir}/ckpt.pt is of another run than last.pt: move it away")
            best_val = kept["metrics"][-1]["val_loss"]
            del kept            # a file stays open as long as its contents are held
        elif metrics[-1]["step"] == step:
            metrics.pop()       # evaluate these weights again: they are the best there are
    in_a_row, lost = torch.tensor(lost_steps, device=device)    # steps without a finite gradient: up to now, and in all
    resumed = saved is not None
    del saved
    stepped = compiled(model, config, device)       # the same parameters; between processes, synchronised too
    if world_size > 1:
        stepped = DistributedDataParallel(stepped, broadcast_buffers=False)     # the only one is the GPT's mask

    wandb_run = None
    if main_process:
        lock = claim_folder(out_dir, resumed)
        write_whole(out_dir / "model_summary.txt", lambda p: p.write_text(model.summary() + "\n", encoding="utf-8"))
        print(f"{config.model}: {model.num_params():,} parameters; data/{config.dataset}: "
              f"{meta['splits']['train']['tokens']:,} training tokens; {tokens_per_step:,} tokens a step")
        print(f"{device_name(device)}; {dtype} ({reason}); results in {out_dir}/")
        if resumed:
            print(f"resumed at step {step}, after {minutes_before:.1f} minutes")
        wandb_run = may_fail("wandb", lambda: start_wandb(config, model_config, run_id)) if config.wandb_log else None

    # The first Ctrl-C or SIGTERM finishes the step, saves and scores; a second Ctrl-C ends at once.
    stop = []

    def request_stop(signum, frame):
        stop.append(signum)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if main_process:
            with suppress(OSError):     # not print: a signal can come in the midst of one
                os.write(2, b"\nstopping: this step, then a save and the final test; Ctrl-C ends at once\n")

    handlers = {s: signal.signal(s, request_stop) for s in (signal.SIGINT, signal.SIGTERM)}

    best, saved_at, save_seconds = None, -math.inf, 0.0     # the best weights not yet on disk; the last save, how long it took

    def checkpoint():
        """What ckpt.pt and last.pt have in common. The last line of metrics is, in ckpt.pt, that of its weights."""
        return {"format_version": FORMAT_VERSION, "step": step, "config": asdict(config), "model_config": asdict(model_config),
                "data_sha256": meta["splits"]["train"]["sha256"], "metrics": list(metrics), "model": model.state_dict()}

    def save():
        """Write what a resumed run needs: ckpt.pt where there is a better one, and last.pt."""
        nonlocal best, saved_at, save_seconds
        begin = time.perf_counter()
        (out_dir / "results.json").unlink(missing_ok=True)      # of an earlier end
        if best:
            write_whole(out_dir / "ckpt.pt", lambda p: torch.save(best, p))
            best = None
        newest = {**checkpoint(), "optimizer": optimizer.state_dict(), "loss_scale": scaler.state_dict() if half else None,
                  "tokens_seen": tokens_seen, "minutes": minutes_before + (time.perf_counter() - start) / 60,
                  "lost_steps": [in_a_row.item(), lost.item()], "wandb_id": wandb_run.id if wandb_run else run_id}
        write_whole(out_dir / "last.pt", lambda p: torch.save(newest, p))
        saved_at = time.perf_counter()
        save_seconds = saved_at - begin

    def diverged():
        if best:
            write_whole(out_dir / "ckpt.pt", lambda p: torch.save(best, p))
        return UserError(f"step {step}: the loss or its gradient has stopped being finite. The usual suspect is the learning rate: "
                         f"try --learning_rate={config.learning_rate / 3:.1g} --min_lr={config.min_lr / 3:.1g}. {out_dir} holds "
                         "the weights from before")

    # The loop
    model.train()
    start = mark_time = time.perf_counter()             # mark: the last evaluation's end, for tokens/s
    mark_tokens = tokens_seen
    waiting = training = evaluating = 0.0               # seconds for batches, for whole steps, for evaluations
    bar = progress_bar(total=1.0, initial=min(1.0, share_done(config, step, minutes_before)), desc=config.model, smoothing=0,
                       disable=not main_process, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining} {postfix}")
    while True:
        # every process must decide alike, so they share the clock and the wish to stop
        clock = torch.tensor([minutes_before + (time.perf_counter() - start) / 60, len(stop)], dtype=torch.float64)
        if world_size > 1:
            dist.all_reduce(clock, dist.ReduceOp.MAX)
        minutes, stopping = clock.tolist()
        done = share_done(config, step, minutes)

        # Told to stop, save at once: a resumed run takes the evaluation that was due, and its curve is as if it never stopped.
        # Only where there are no best weights at all yet there must be some to score.
        due = best_val == math.inf or done >= 1 or step % config.eval_interval == 0 and not stopping
        if due and not (metrics and metrics[-1]["step"] == step):
            speed = (tokens_seen - mark_tokens) / (time.perf_counter() - mark_time)
            evaluation_start = time.perf_counter()
            losses = {s: evaluate(model, splits[s], windows, eval_batch, autocast, device, world).mean().item()
                      for s, windows in eval_windows.items()}
            evaluating += time.perf_counter() - evaluation_start
            if not math.isfinite(losses["train"] + losses["val"]):
                raise diverged()                        # before a save
            metrics.append(dict(zip(METRICS, (
                step, tokens_seen, round(minutes, 4), losses["train"], perplexity(losses["train"]), losses["val"],
                perplexity(losses["val"]), learning_rate_at(config, step, minutes), round(speed, 1)))))
            if main_process:
                bar.write(f"step {step}: train {losses['train']:.4f}, val {losses['val']:.4f}, "
                          f"perplexity {perplexity(losses['val']):.2f}, {speed:,.0f} tokens/s")
                write_whole(out_dir / "metrics.jsonl", lambda p: p.write_text(
                    "".join(json.dumps(m) + "\n" for m in metrics), encoding="utf-8"))
                if wandb_run:
                    may_fail("wandb", lambda: wandb_run.log(metrics[-1], step=step))
                if losses["val"] < best_val:
                    best = checkpoint()
                    best["model"] = {k: v.clone() for k, v in best["model"].items()}
                # A full-size last.pt is 1.6 GB: where evaluations are seconds apart, most are not worth a write. Saves take at
                # most a twentieth of the time; both files are written together.
                if not stopping and done < 1 and time.perf_counter() - saved_at >= 20 * save_seconds:
                    save()
            best_val = min(best_val, losses["val"])
            mark_time, mark_tokens = time.perf_counter(), tokens_seen
        if stopping or done >= 1:
            break

        step_start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(config, step, minutes)
        torch.manual_seed(config.seed + step * world_size + rank)   # dropout, too, depends on the step alone
        for micro in range(config.gradient_accumulation_steps):
            batch_start = time.perf_counter()
            windows = data.train_windows(n_windows["train"], step * config.gradient_accumulation_steps + micro,
                                         config.batch_size, config.seed, rank, world_size)
            idx, targets = data.get_batch(splits["train"], windows, T, device)
            waiting += time.perf_counter() - batch_start
            last_micro = micro == config.gradient_accumulation_steps - 1     # processes exchange gradients only then
            with nullcontext() if world_size == 1 or last_micro else stepped.no_sync():
                with autocast:
                    loss = stepped(idx, targets)[1]
                # a loss that is not finite gets a gradient that is not: 1 + 0 * inf is nan
                scaler.scale(loss / config.gradient_accumulation_steps).backward(1 + 0 * loss.detach())
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.grad_clip, norm)
        scaler.step(optimizer)
        scaler.update(None if half else 1.0)
        in_a_row, lost = (in_a_row + 1) * ~norm.isfinite(), lost + ~norm.isfinite()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        tokens_seen += tokens_per_step
        training += time.perf_counter() - step_start
        if step % 10 == 0 and in_a_row >= 10:           # looked at seldom: it means to wait for the device
            raise diverged()
        if main_process and step % config.log_interval == 0:
            speed = (tokens_seen - mark_tokens) / (time.perf_counter() - mark_time)
            bar.set_postfix_str(f"step {step}, loss {loss.item():.3f}, {speed:,.0f} tokens/s, "
                                f"{speed * model.flops_per_token() / 1e12:.2f} TFLOP/s", refresh=False)
        bar.update(max(0.0, min(done, 1.0) - bar.n))
    bar.close()

    # The end: a save, and the best checkpoint is scored on the whole test split
    if main_process:
        save()
        scored = load_checkpoint(out_dir / "ckpt.pt")
        best_row = scored["metrics"][-1]
        model.load_state_dict(scored["model"])
        may_fail("the picture", lambda: plot_curves(metrics, best_row, out_dir / "learning_curves.png",
                                                    f"{config.model}, {config.recipe} recipe, data/{config.dataset}"))
        print(f"the best checkpoint, of step {best_row['step']}, on the whole test split:")
    if world_size > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
    by_position = evaluate(model, splits["test"], np.arange(n_windows["test"]), eval_batch, autocast, device, world,
                           progress=main_process)
    test_loss = by_position.mean().item()
    if main_process:
        results = {"test_loss": test_loss, "test_perplexity": perplexity(test_loss),
                   **{k: best_row[k] for k in ("train_loss", "train_perplexity", "val_loss", "val_perplexity")},
                   "best_step": best_row["step"], "steps": step, "tokens_seen": tokens_seen, "minutes": round(minutes, 2),
                   "tokens_per_second": round(tokens_seen / max(minutes * 60, 1e-9), 1),
                   "lost_steps": lost.item(), "data_wait_share": round(waiting / max(training, 1e-9), 5),
                   "evaluation_share": round(evaluating / max(evaluating + training, 1e-9), 4),
                   "peak_memory_gb": peak_memory_gb(device),
                   "n_params": model.num_params(),
                   "device": device_name(device), "dtype": str(dtype).removeprefix("torch."),
                   "config": {**asdict(config), **asdict(model_config)}}
        write_whole(out_dir / "test_loss_by_position.json", lambda p: p.write_text(
            json.dumps([round(x, 4) for x in by_position.tolist()]), encoding="utf-8"))
        # the last file: with it the run is finished
        write_whole(out_dir / "results.json", lambda p: p.write_text(json.dumps(results, indent=1), encoding="utf-8"))
        print(f"test loss {test_loss:.4f}, perplexity {perplexity(test_loss):.2f}; "
              f"now try: python sample.py --model={config.model}")
        if wandb_run:
            may_fail("wandb", wandb_run.finish)
        lock.close()
    for s, handler in handlers.items():
        signal.signal(s, handler)
    if world_size > 1:
        dist.barrier()      # together, and the model before its process group: else the last to leave can wait for ever
        del stepped
        dist.destroy_process_group()


if __name__ == "__main__":
    outlive_reader(sys.stdout), outlive_reader(sys.stderr)
    data.run(main)
