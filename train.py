"""Train a language model: data/NAME/ -> outputs/transformer/ or outputs/rnn/.

    python train.py                         # the Transformer, on data/plwiki, else on mini
    python train.py --model=lstm            # the stacked LSTM
    python train.py --recipe=report         # trained as the report did, for comparison
    python train.py --init_from=resume      # go on after a kill, a crash or Ctrl-C
    torchrun --nproc_per_node=8 train.py    # the same run, its batches divided among 8 GPUs
    python train.py --help                  # every key

A run writes to its folder ckpt.pt (the weights with the lowest validation loss), last.pt (the
newest state, to resume from), tokenizer/, model_summary.txt, metrics.jsonl (a line per evaluation)
and, at the end, learning_curves.png and results.json. Losses are in nats per token.
"""
import copy
import ctypes
import fcntl
import json
import math
import os
import pickletools
import platform
import shutil
import signal
import time
import zipfile
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pprint import pformat
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from data import UserError, first_line, progress_bar
from model_gpt import GPT, GPTConfig
from model_lstm import LSTM, LSTMConfig

FORMAT_VERSION = 10     # of the checkpoints; raised when an older one can no longer be read
# key: (class, config, default folder as the report names it)
MODELS = {"gpt": (GPT, GPTConfig, "outputs/transformer"), "lstm": (LSTM, LSTMConfig, "outputs/rnn")}
# The number of processes, and which of them this is: torchrun sets both. Only the first writes and prints.
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0)) if WORLD_SIZE > 1 else 0
IS_MAIN = RANK == 0


@dataclass
class TrainConfig:
    """The run."""
    model: Literal["gpt", "lstm"] = "gpt"           # the model to train
    dataset: str = ""                   # folder in data/; empty: plwiki if prepared, else mini
    out_dir: str = ""                   # of the results; empty: outputs/transformer or outputs/rnn
    init_from: Literal["scratch", "resume"] = "scratch"     # resume: continue from out_dir/last.pt
    recipe: Literal["tuned", "report"] = "tuned"    # report: the report's settings, see RECIPES
    # a step
    batch_size: int = 32                # sequences per forward pass, summed over all processes
    gradient_accumulation_steps: int = 1    # forward passes a step, each of batch_size
    # budget: training ends at whichever comes first
    max_iters: int = 0                  # steps; 0: no limit
    max_minutes: float = 120.0          # with evaluations, without the final test; 0: no limit
    # optimizer
    optimizer: Literal["auto", "muon", "adamw", "adam"] = "auto"    # auto: muon (gpt), adamw (lstm)
    learning_rate: float = 4e-3         # peak of the schedule
    muon_learning_rate: float = None    # peak for matrices that Muon updates; None: learning_rate
    embedding_lr_scale: float = 4.0     # times learning_rate, for the embeddings; not with adam
    weight_decay: float = 0.1           # pull towards zero, of matrices; adam: of every parameter
    beta1: float = 0.9                  # decay rate of Adam's running mean of gradients
    beta2: float = 0.99                 # the same for squared gradients; PyTorch's default is 0.999
    schedule: Literal["cosine", "constant"] = "cosine"  # over max_iters if set, else max_minutes
    warmup_iters: int = 100             # steps of linear warmup to learning_rate
    min_lr: float = None                # final rate of the cosine; None: a tenth of learning_rate
    grad_clip: float = 1.0              # maximum norm of the whole gradient; 0: no clipping
    # evaluation, logging and saving
    eval_interval: int = 100            # steps between evaluations on train and val
    eval_iters: int = 10                # batches per split in an evaluation, always the same ones
    log_interval: int = 10              # steps between reports of the loss (bar, train/loss)
    save_minutes: float = 1.0           # minutes between saves, so what a kill loses; 0: each step
    wandb_log: bool = False             # Weights & Biases; WANDB_MODE=offline needs no account
    wandb_project: str = "polish-lm"    # project name there
    wandb_run_name: str = ""            # run name there; empty: the model and the dataset
    # machine
    seed: int = 1337                    # of the initial weights, the data order and dropout
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first one available
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"   # of matrix products
    compile: bool = None                # use torch.compile (GPT only); None: only on CUDA

    def __post_init__(self):
        for key in "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval":
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1")
        if self.beta1 >= 1 or self.beta2 >= 1:
            raise ValueError("beta1 and beta2 must be below 1")
        if not (self.max_minutes or self.max_iters):
            raise ValueError("max_minutes 0 needs max_iters")


# The two recipes. The dataclass defaults are the tuned one; these are all the settings where the report's
# differs. Each is a key of its own, so `--recipe=report --optimizer=adamw` measures a single change.
RECIPES = {"tuned": {}, "report": {
    "optimizer": "adam",            # adds the weight decay to the gradient, so Adam rescales it too
    "learning_rate": 5e-4, "beta2": 0.999, "embedding_lr_scale": 1.0,
    "schedule": "constant", "warmup_iters": 0, "grad_clip": 0.0,
    "dtype": "float32", "compile": False,
    "fused_attention": False, "residual": False,    # of the GPT, of the LSTM
}}

# Settings for the embedded dataset: a few minutes on two CPU cores. Here Muon suits the LSTM better, too.
MINI = {"block_size": 128, "max_iters": 300, "optimizer": "muon", "learning_rate": 5e-3, "warmup_iters": 50,
        "n_layer": 4, "n_head": 4, "n_embd": 128, "n_hidden": 192}

# Keys that a resumed run may change; any other would make it another run.
MAY_CHANGE = {"init_from", "out_dir", "max_iters", "max_minutes", "learning_rate", "muon_learning_rate",
              "min_lr", "warmup_iters", "eval_interval", "log_interval", "save_minutes", "wandb_log",
              "wandb_project", "wandb_run_name", "device", "compile"}


@dataclass
class State:
    """What a run must remember besides its weights, moments and settings. Saved and restored as a whole."""
    step: int = 0                   # steps taken; determines the next batch and dropout masks
    minutes: float = 0.0            # training time so far, over all resumes; measured against max_minutes
    best_val: float = math.inf      # lowest validation loss, that of ckpt.pt
    metrics: list = field(default_factory=list)     # a dict for each evaluation: the lines of metrics.jsonl
    wandb_id: str = ""              # id of the W&B run, so that a resumed run continues it


class Trainer:
    """One run. To resume one, call restore() before run(). bench.py uses only train_step()."""

    def __init__(self, config, model, splits, facts=None):
        """model: already on its device. splits: {"train" | "val" | "test": tokens}. facts: the "splits" of
        meta.json, which train_step does not need."""
        self.config, self.model, self.splits, self.facts = config, model, splits, facts
        self.state, self.out_dir = State(), Path(config.out_dir)
        self.device, self.block_size = next(model.parameters()).device, model.config.block_size
        self.tokens_per_step = config.batch_size * config.gradient_accumulation_steps * self.block_size
        self.n_windows = {split: data.count_windows(t, self.block_size) for split, t in splits.items()}
        self.dtype, self.reason = choose_dtype(config.dtype, self.device, config.model)
        set_matmul_precision(self.dtype)
        self.autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
        self.optimizers = make_optimizers(model, config, self.dtype)
        # In float16 small gradients underflow to 0, so the loss is scaled up. If a gradient then overflows,
        # train_step skips the update. With any other dtype the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.forward = self.ddp = DistributedDataParallel(model) if WORLD_SIZE > 1 else model
        wanted = self.device.type == "cuda" if config.compile is None else config.compile
        if wanted and config.model == "gpt":    # compiling the LSTM's unrolled loop costs more than it saves
            fault = compile_fault(self.device)
            if fault and IS_MAIN:
                print(f"{fault}: training continues without it, somewhat slower")
            # reduce-overhead: CUDA graphs, which save kernel launches; a fifth faster on an H100. A replay
            # overwrites the last one's gradients, so they cannot be accumulated. Untested with DDP.
            mode = "reduce-overhead" if WORLD_SIZE == config.gradient_accumulation_steps == 1 else None
            self.forward = self.ddp if fault else torch.compile(self.ddp, mode=mode)

        self.best = None                # the best checkpoint, until it is on disk
        self.interrupted = False        # a signal reached this process; self.stopping: it reached any of them
        self.wandb_run = None

    def run(self):
        """The whole run."""
        config, state = self.config, self.state
        if IS_MAIN:
            print(f"{config.model}: {self.model.num_params():,} parameters; data/{config.dataset}: "
                  f"{len(self.splits['train']):,} training tokens; {self.tokens_per_step:,} tokens a step")
            print(f"{device_name(self.device)}; {self.dtype} ({self.reason}); results in {self.out_dir}/")
            if state.metrics:
                print(f"resumed at step {state.step}, after {state.minutes:.1f} minutes")
            if config.wandb_log:
                may_fail("wandb", self.start_wandb)
        for signum in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            if signal.getsignal(signum) != signal.SIG_IGN:      # under nohup, SIGHUP stays ignored
                signal.signal(signum, self.request_stop)
        self.train()
        self.finish()

    def train(self):
        """Take steps until the budget is used up or a signal comes, with evaluations and saves in between."""
        config, state = self.config, self.state
        self.model.train()
        self.mark, self.mark_step = time.perf_counter(), state.step     # tokens/s are counted from here
        self.began, saved_at = self.mark - 60 * state.minutes, -math.inf
        self.bar = progress_bar(total=1.0, initial=min(1.0, share_done(config, state)), desc=config.model,
                                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
                                smoothing=0, disable=not IS_MAIN)
        if not state.metrics:
            self.evaluate_and_log()     # so that there is a best checkpoint from the start
        while self.goes_on():
            # in steps of a thousandth: no ETA is shown before the first, since it would be a guess
            self.bar.update(max(0.0, round(share_done(config, state), 3) - self.bar.n))
            if state.step % config.eval_interval == 0 and state.step > state.metrics[-1]["step"]:
                self.evaluate_and_log()
            if time.perf_counter() - saved_at >= 60 * config.save_minutes:
                self.save()
                saved_at = time.perf_counter()
            self.train_step()
            if state.step % config.log_interval == 0:
                self.log()
        if state.step > state.metrics[-1]["step"] and not self.stopping:    # else the resumed run does it
            self.evaluate_and_log()
        self.save()
        self.bar.close()

    def goes_on(self):
        """Whether to take another step. Processes share clock and signals, so that all decide the same."""
        minutes = (time.perf_counter() - self.began) / 60
        shared = torch.tensor([minutes, self.interrupted], dtype=torch.float64)
        if WORLD_SIZE > 1:
            dist.all_reduce(shared, dist.ReduceOp.MAX)
        self.state.minutes, self.stopping = shared.tolist()
        return not self.stopping and share_done(self.config, self.state) < 1

    def train_step(self):
        """Forward and backward over the batches of one step, clip, update. Batches and dropout masks depend
        only on the step number, the seed and the process, so that they can be reproduced."""
        config, state, n = self.config, self.state, self.config.gradient_accumulation_steps
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * group.get("scale", 1.0) * schedule_at(config, state)
        torch.manual_seed(config.seed + state.step * WORLD_SIZE + RANK)
        self.loss = 0.0                                 # of this process's share of the step
        for i in range(n):
            windows = data.train_windows(self.n_windows["train"], state.step * n + i, config.batch_size,
                                         config.seed, RANK, WORLD_SIZE)
            idx, targets = data.get_batch(self.splits["train"], windows, self.block_size, self.device)
            self.ddp.require_backward_grad_sync = i == n - 1    # exchange gradients once a step
            with self.autocast:
                loss = self.forward(idx, targets)[1]
            self.scaler.scale(loss / n).backward()
            self.loss += loss.detach() / n
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        # in float16 (a host sync) skip all optimizers or none: the scaler would decide for each separately
        overflow = self.scaler.is_enabled() and not norm.isfinite()
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        state.step += 1

    def check_finite(self, *losses):
        """Raises UserError if a weight or one of these losses is not finite, so that such weights are never
        saved. Gradients need no check: a bad one makes weights non-finite at once. Forces a host sync."""
        weights = torch.nn.utils.get_total_norm(self.model.parameters())
        if not all(map(math.isfinite, (weights, *losses))):
            raise UserError(
                f"step {self.state.step}: the loss or a weight is no longer finite. The learning rate is "
                f"probably too high: try --learning_rate={self.config.learning_rate / 3:.1g} (and a lower "
                f"--muon_learning_rate, if you set it). {self.out_dir} holds the last save")

    def evaluate_and_log(self):
        """Measure train and val loss, always on the same windows; keep the best."""
        self.check_finite()             # also waits for the device, so that speed counts finished work only
        config, state, speed = self.config, self.state, self.tokens_per_second()
        most = config.eval_iters * config.batch_size
        row = {"step": state.step, "tokens_seen": state.step * self.tokens_per_step,
               "minutes": round(state.minutes, 4),
               **self.evaluate("train", most)[0], **self.evaluate("val", most)[0],
               "learning_rate": config.learning_rate * schedule_at(config, state),
               "tokens_per_second": round(speed, 1)}
        state.metrics.append(row)
        if row["val_loss"] < state.best_val:
            state.best_val = row["val_loss"]
            self.best = None        # free the last copy before making a new one
            self.best = copy.deepcopy(self.checkpoint()) if IS_MAIN else None
        if IS_MAIN:
            lines = "".join(json.dumps(row) + "\n" for row in state.metrics)
            write_whole(self.out_dir / "metrics.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))
            self.log_wandb({k.replace("val_", "val/"): v for k, v in row.items()})
            self.bar.write(f"step {state.step}: train {row['train_loss']:.4f}, val {row['val_loss']:.4f}, "
                           f"perplexity {row['val_perplexity']:.2f}"
                           + (f", {speed:,.0f} tokens/s" if speed else ""))
        self.mark, self.mark_step = time.perf_counter(), state.step

    @torch.no_grad()
    def evaluate(self, split, most=math.inf):
        """Evaluate a split, or `most` windows spread over it, shared among the processes -> {"SPLIT_loss",
        "SPLIT_perplexity"}, and the mean loss at each position of a window, (T,) float64."""
        self.model.eval()
        n, total = self.n_windows[split], torch.zeros(self.block_size, dtype=torch.float64)
        windows = np.linspace(0, n - 1, min(n, most), dtype=int)
        mine, size = windows[RANK::WORLD_SIZE], self.config.batch_size // WORLD_SIZE
        # if this takes over a second, a progress bar in place of the run's
        for i in progress_bar(range(0, len(mine), size), desc=f"evaluating on {split}", delay=1, position=0,
                              disable=not IS_MAIN):
            idx, targets = data.get_batch(self.splits[split], mine[i:i + size], self.block_size, self.device)
            with self.autocast:
                losses = self.model(idx, targets, reduction="none")[1]
            total += losses.sum(dim=0).cpu()
        if WORLD_SIZE > 1:
            dist.all_reduce(total)
        self.model.train()
        by_position = total / len(windows)
        loss = by_position.mean().item()
        self.check_finite(loss)
        # perplexity: how many equally likely tokens are as hard to guess; capped, as exp(1000) overflows
        return {f"{split}_loss": loss, f"{split}_perplexity": math.exp(min(loss, 100.0))}, by_position

    def tokens_per_second(self):
        """Since the last evaluation."""
        return (self.state.step - self.mark_step) * self.tokens_per_step / (time.perf_counter() - self.mark)

    def log(self):
        """Show the loss of the last step, and the speed."""
        loss = self.loss.item()
        self.check_finite(loss)
        speed = self.tokens_per_second()
        self.bar.postfix = f"step {self.state.step}, loss {loss:.3f}, {speed:,.0f} tokens/s"
        self.log_wandb({"train/loss": loss, "tokens_per_second": speed,
                        "tokens_seen": self.state.step * self.tokens_per_step})

    def checkpoint(self):
        """What ckpt.pt and last.pt share. The last metrics entry in ckpt.pt is the one for its weights."""
        return {"format_version": FORMAT_VERSION, "config": asdict(self.config), "state": asdict(self.state),
                "model_config": asdict(self.model.config), "data_sha256": self.facts["train"]["sha256"],
                "model": self.model.state_dict()}

    def save(self):
        """Write what a resumed run needs: ckpt.pt where there is a better one, and last.pt."""
        self.check_finite()
        if not IS_MAIN:
            return
        (self.out_dir / "results.json").unlink(missing_ok=True)         # out of date once a run resumes
        if self.best:
            write_whole(self.out_dir / "ckpt.pt", lambda p: torch.save(self.best, p))
            self.best = None
        moments = {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                   "scaler": self.scaler.state_dict()}
        write_whole(self.out_dir / "last.pt", lambda p: torch.save({**self.checkpoint(), **moments}, p))

    def restore(self, saved):
        """Restore optimizers, scaler and state from last.pt; the model already has its weights. Raises
        UserError if they do not fit."""
        try:
            for optimizer, before in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(before)
            if saved["scaler"]:
                self.scaler.load_state_dict(saved["scaler"])
        except Exception as error:
            raise UserError(f"{self.out_dir}/last.pt is damaged ({first_line(error)})") from None
        self.state = saved["state"]
        # from ckpt.pt: a kill between the two writes of save() leaves it newer than last.pt
        self.state.best_val = load_checkpoint(self.out_dir / "ckpt.pt")["state"].best_val

    def finish(self):
        """Score the best checkpoint on the whole test split, and write results.json, the last file."""
        state, tokens = self.state, self.state.step * self.tokens_per_step
        if IS_MAIN:
            best = load_checkpoint(self.out_dir / "ckpt.pt")
            row = best["state"].metrics[-1]
            self.model.load_state_dict(best["model"].state_dict())
            may_fail("the picture", lambda: plot_curves(self, row))
            print(f"the best checkpoint, of step {row['step']}, on the whole test split:")
        if WORLD_SIZE > 1:
            for p in self.model.parameters():
                dist.broadcast(p.data, 0)
        test, by_position = self.evaluate("test")
        if not IS_MAIN:
            return
        facts = self.facts["test"]
        bits = test["test_loss"] / math.log(2) * facts["tokens"] / facts["characters"]
        results = {
            **test, "test_bits_per_character": bits,    # comparable across tokenizers, unlike nats per token
            **{k: row[k] for k in ("train_loss", "train_perplexity", "val_loss", "val_perplexity")},
            "best_step": row["step"], "steps": state.step, "tokens_seen": tokens,
            "minutes": round(state.minutes, 2),
            "tokens_per_second": round(tokens / max(state.minutes * 60, 1e-9), 1),
            "peak_memory_gb": peak_memory_gb(self.device), "n_params": self.model.num_params(),
            "device": device_name(self.device), "dtype": str(self.dtype).removeprefix("torch."),
            "config": {**asdict(self.config), **asdict(self.model.config)},
            "optimizers": [type(optimizer).__name__ for optimizer in self.optimizers],
            "test_loss_by_position": [round(x, 4) for x in by_position.tolist()]}
        write_json(self.out_dir / "results.json", results)
        print(f"test loss {test['test_loss']:.4f}, perplexity {test['test_perplexity']:.2f}, {bits:.3f} bits "
              f"per character; now try: python sample.py --out_dir={self.out_dir}")
        if self.wandb_run:
            summary = {k: v for k, v in results.items() if k not in ("config", "test_loss_by_position")}
            # send the last metrics first: they share keys with the summary and would overwrite it
            may_fail("wandb", lambda: self.wandb_run.log({}, commit=True))
            may_fail("wandb", lambda: self.wandb_run.summary.update(summary))
            may_fail("wandb", self.wandb_run.finish)

    def start_wandb(self):
        """Log to Weights & Biases from now on; a resumed run goes on in its run there."""
        import wandb
        config = self.config
        settings = {**asdict(config), **asdict(self.model.config), "device": device_name(self.device),
                    "dtype": str(self.dtype).removeprefix("torch.")}
        self.wandb_run = wandb.init(project=config.wandb_project, config=settings, dir=config.out_dir,
                                    name=config.wandb_run_name or f"{config.model}-{config.dataset}",
                                    id=self.state.wandb_id or None, resume="allow")     # None: a new one
        self.state.wandb_id = self.wandb_run.id

    def log_wandb(self, values):
        if self.wandb_run:
            may_fail("wandb", lambda: self.wandb_run.log(values, step=self.state.step))

    def request_stop(self, signum, frame):
        """On a signal, finish the step, save and run the final test. Ctrl-C after that ends at once."""
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if IS_MAIN:
            with suppress(OSError):     # not print(): the signal may have interrupted one
                os.write(2, b"\nstopping after this step, a save and the final test. "
                            b"Now Ctrl-C ends at once; what has been saved is kept\n")


# ----------------------------------------------------------------------------------------------------
# What Trainer uses: the schedule, the optimizers, and calls that may fail

def schedule_at(config, state):
    """The learning rate as a share of its peak: linear warmup, then constant or a cosine (Loshchilov and
    Hutter 2017) down to min_lr / learning_rate. The cosine starts at step 0, so a long warmup cuts off its
    top. It follows max_iters if that is set, so that a step can be replayed; otherwise the clock."""
    if state.step < config.warmup_iters:
        return (state.step + 1) / config.warmup_iters
    if config.schedule == "constant":
        return 1.0
    done = state.step / config.max_iters if config.max_iters else state.minutes / config.max_minutes
    lowest = 0.1 if config.min_lr is None else config.min_lr / max(config.learning_rate, 1e-30)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * min(1.0, done))) / 2


def share_done(config, state):
    """How much of the budget is used, 1 at its end."""
    return max(state.step / (config.max_iters or math.inf), state.minutes / (config.max_minutes or math.inf))


def make_optimizers(model, config, dtype=torch.float32):
    """-> the list of optimizers, each with the peak of its learning rate."""
    lr, betas, decay = config.learning_rate, (config.beta1, config.beta2), config.weight_decay
    name = {"gpt": "muon", "lstm": "adamw"}[config.model] if config.optimizer == "auto" else config.optimizer
    if name == "adam":
        # As in the report: every parameter decays. The decay is added to the gradient, which Adam divides by
        # its usual size, so where the gradient itself is small, the decay alone takes a full-length step.
        return [torch.optim.Adam(model.parameters(), lr, betas, weight_decay=decay)]
    # A token's row gets a gradient only when the token occurs, so the embeddings tolerate a higher learning
    # rate. The position embeddings, which are few, share it.
    embeddings = [p for n, p in model.named_parameters() if n.startswith(("wte", "wpe"))]
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2] if name == "muon" else []
    rest = [p for p in model.parameters() if all(p is not q for q in embeddings + matrices)]
    # Decoupled weight decay (Loshchilov and Hutter 2019), on matrices only: shrinking a bias or a layer
    # norm's gain towards zero does not regularise the model.
    groups = [{"params": embeddings, "scale": config.embedding_lr_scale},
              {"params": [p for p in rest if p.dim() >= 2]},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr, betas, weight_decay=decay, fused=True)]
    if matrices:
        lr = lr if config.muon_learning_rate is None else config.muon_learning_rate
        # bfloat16 is precise enough for Newton-Schulz, but slow where it is emulated: follow the run's dtype
        dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        optimizers.append(Muon(matrices, lr, decay, dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum (Jordan et al. 2024). A gradient is large in only a few singular directions of
    its matrix; this step moves the matrix by nearly the same amount in all of them.

    It is scaled so that an entry moves by about 0.2 lr, as with AdamW (Liu et al. 2025), so the two can share
    a learning rate. torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does the same, but always in
    bfloat16, which takes 17 times as long on a CPU without bfloat16 arithmetic.
    """

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        shapes = dict.fromkeys(p.shape for p in params)     # a group for each
        super().__init__([{"params": [p for p in params if p.shape == s]} for s in shapes], {"lr": lr})
        self.weight_decay, self.dtype, self.momentum = weight_decay, dtype, momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:     # each as one batch, which saves hundreds of kernel launches
            params, lr = group["params"], group["lr"]
            grads = torch.stack([p.grad for p in params])
            kept = self.state[params[0]]                # the batch's, kept under its first matrix
            if not kept:
                kept["mean"] = torch.zeros_like(grads)
            mean = kept["mean"].lerp_(grads, 1 - self.momentum)
            ahead = grads.lerp(mean, self.momentum)     # Nesterov momentum: look one step ahead
            for p, move in zip(params, orthogonal(ahead.to(self.dtype)).to(ahead.dtype)):
                p.mul_(1 - lr * self.weight_decay).add_(move, alpha=-0.2 * max(p.shape) ** 0.5 * lr)


def orthogonal(x):
    """A batch x (n, rows, columns) of U S V^T -> nearly U V^T. Five Newton-Schulz steps 3.4445 s - 4.7750 s^3
    + 2.0315 s^5 bring each singular value s above 1/500 of the norm to between 0.68 and 1.2."""
    if x.size(1) > x.size(2):
        return orthogonal(x.mT).mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # no singular value above 1
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x


def compile_fault(device):
    """Why torch.compile (it needs a C compiler and Python's headers) does not work here, or "" if it does."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(16, device=device))
    except Exception as error:
        return f"torch.compile does not work here ({first_line(error)})"
    return ""


def may_fail(what, call):
    """call(), for Weights & Biases and the picture: whatever goes wrong there must not stop the training."""
    try:
        call()
    except Exception as error:
        print(f"{what} failed, the run goes on: {first_line(error)}")


@contextmanager
def picture(path, n_panels, width, height, n_rows=1):
    """`with picture(...) as rows:` gives rows of panels to draw on, and then writes them to path."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    with rc_context({"axes.grid": True, "grid.alpha": 0.3, "font.size": 13, "lines.linewidth": 2.5}):
        page = Figure((width, height), layout="constrained")
        yield page.subplots(n_rows, n_panels, squeeze=False)
        write_whole(path, lambda p: page.savefig(p, dpi=90, format="png"))


def plot_curves(trainer, best):
    """Loss and perplexity on train and val against tokens seen; best: the line of metrics to mark."""
    config, metrics = trainer.config, trainer.state.metrics
    million = [m["tokens_seen"] / 1e6 for m in metrics]
    with picture(trainer.out_dir / "learning_curves.png", 2, 12, 5) as (panels,):
        for panel, measure in zip(panels, ("loss", "perplexity")):
            for split, style in (("train", "--"), ("val", "-")):
                panel.plot(million, [m[f"{split}_{measure}"] for m in metrics], style, label=split)
            panel.plot(best["tokens_seen"] / 1e6, best[f"val_{measure}"], "ko",
                       label=f"best val {best[f'val_{measure}']:.4g}")
            panel.set(title=f"{config.model}, {config.recipe} recipe, data/{config.dataset}",
                      xlabel="million tokens seen", ylabel=measure)
            panel.legend()
        panels[1].set_yscale("log")


# ----------------------------------------------------------------------------------------------------
# The machine, for train.py, sample.py and bench.py

def devices_present():
    """Those of cuda, mps and cpu that are available, fastest first."""
    return ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]


def choose_device(name="auto"):
    """"auto", "cuda", "mps" or "cpu" -> torch.device. Raises UserError if there is none, or too few."""
    name = devices_present()[0] if name == "auto" else name
    if name not in devices_present():
        raise UserError(f"--device={name}: there is none here; use --device=cpu")
    n_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))    # on this machine; set by torchrun
    if n_processes > {"cuda": torch.cuda.device_count(), "mps": 1}.get(name, math.inf):
        raise UserError(f"--device={name}: {n_processes} processes need a GPU each: lower --nproc_per_node")
    if name == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if name == "cpu":
        # By default malloc returns each large freed tensor to Linux, which zeroes new pages for the next one:
        # a fifth to a third of a training step. So, where malloc has the option, it keeps freed memory.
        with suppress(AttributeError, OSError, TypeError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-4, 0)      # M_MMAP_MAX: no tensor in a mapping of its own
            mallopt(-1, -1)     # M_TRIM_THRESHOLD: never trim
    return torch.device(name)


def choose_dtype(name, device, model=None):
    """-> the torch.dtype of the matrix products, and why. model: the name of the one to train, or None to
    generate. Raises UserError for int8 on anything but a CPU."""
    if name == "int8" and device.type != "cpu":
        raise UserError("--dtype=int8 needs --device=cpu: leave --dtype out")
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.type == "mps" and not model:
        return torch.float16, "half the bytes to read"
    if device.type == "cuda" and model == "lstm":
        return torch.float16, "cuDNN's fastest kernel needs it"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "this GPU has no bfloat16"
    if device.type == "cuda" or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, f"this {device.type} has bfloat16 arithmetic"
    return torch.float32, f"no fast bfloat16 arithmetic on this {device.type}"


def set_matmul_precision(dtype):
    """If dtype is not float32, let CUDA round the factors of float32 products to TF32's 11 bits."""
    torch.set_float32_matmul_precision("highest" if dtype == torch.float32 else "high")
    torch.backends.cudnn.allow_tf32 = dtype != torch.float32


def peak_memory_gb(device):
    """Peak GPU memory allocated to tensors, in GB, without what CUDA graphs keep for themselves; None on
    other devices."""
    return round(torch.cuda.max_memory_allocated(device) / 1e9, 2) if device.type == "cuda" else None


def device_name(device):
    """For example "NVIDIA A40", or "AMD EPYC 7763 (AVX2), threads: 2"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU, macOS {platform.mac_ver()[0]}"
    name = platform.processor() or platform.machine()
    with suppress(OSError, IndexError):
        name = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}"


# ----------------------------------------------------------------------------------------------------
# Files are written under a temporary name, then renamed: a kill, on Linux even a power cut, leaves them whole

def write_whole(path, write):
    """Call write(temporary path), then rename the file to path. Raises UserError where that fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:                  # each library raises its own when the disk is full
        with suppress(OSError):
            temporary.unlink()
        why = isinstance(error, OSError) and error.strerror or "is the disk full?"
        raise UserError(f"cannot write {path} ({why}); any file that was there is intact") from None


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False)
    write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))


def load_checkpoint(path):
    """-> the dict that Trainer.save wrote to path, its state as a State and its model built, in eval mode.
    Raises UserError if the file is missing or not one of ours. It may come from a stranger, so loading it
    must neither run code nor take more memory than the file has bytes."""
    if not path.is_file():
        if path.with_name("last.pt").is_file():
            raise UserError(f"{path}, with the best weights of this run, is missing: put it back")
        keys = {Path(folder): f"--model={name}" for name, (_, _, folder) in MODELS.items()}
        key = keys.get(path.parent, f"--out_dir={path.parent}")
        raise UserError(f"no checkpoint at {path}: run `python train.py {key}` first")
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise ValueError("it is compressed")    # as torch.save's is not; it could be huge
            calls = {arg for entry in archive.namelist() if entry.endswith("data.pkl")
                     for op, arg, _ in pickletools.genops(archive.read(entry)) if "GLOBAL" in op.name}
        if not calls <= {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}:
            raise ValueError("it holds code")           # weights_only alone lets bytearray(10 ** 11) pass
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"from another version of this project; this one reads format {FORMAT_VERSION}")
        weights = saved["model"].values()
        fit = (w.dtype == torch.float32 and w.is_contiguous() and w.isfinite().all() for w in weights)
        if sum(w.nbytes for w in weights) > size or not all(fit):
            raise ValueError("its weights are not finite, or not stored as train.py stores them")
        saved["config"] = asdict(data.configure(TrainConfig, saved["config"]))
        saved["state"] = data.configure(State, saved["state"])
        model_class, config_class, _ = MODELS[saved["config"]["model"]]
        # Built on the meta device, the model has no memory of its own and takes over the loaded tensors.
        # There normal_ would draw nothing, yet import torch.compile's code, which takes two seconds: skip it.
        with torch.device("meta"), patch("torch.nn.init.normal_"):
            model = model_class(data.configure(config_class, saved["model_config"]))
        model.load_state_dict(saved["model"], assign=True)
    except Exception as error:      # a damaged file can raise anything
        raise UserError(f"{path} is damaged or no checkpoint of this project ({first_line(error)})") from None
    return {**saved, "model": model.eval()}


def lock_folder(out_dir):
    """Keep other runs out of out_dir -> the lock, an open file beside it, released when the file is closed or
    the program ends. Raises UserError if another run holds it."""
    if out_dir.name.strip(".") in ("", "previous") or not str(out_dir).isprintable():
        raise UserError(f"--out_dir={out_dir}: choose another name, in printable characters")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    lock = open(out_dir.with_name(f".{out_dir.name}.lock"), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing to {out_dir}: choose another --out_dir") from None
    except OSError:                             # some network file systems have no locks
        pass
    return lock


def new_folder(out_dir, summary, tokenizer):
    """Start out_dir with model_summary.txt and a copy of the tokenizer, so that it is self-contained. If an
    earlier run used it, that folder is moved to previous/. Raises UserError if it holds other files."""
    if out_dir.exists() and any(not p.name.startswith(".") for p in out_dir.iterdir()):
        if not (out_dir / "model_summary.txt").exists():
            raise UserError(f"{out_dir} holds files that are no run's: choose another --out_dir")
        data.set_aside(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    write_whole(out_dir / "model_summary.txt", lambda p: p.write_text(summary + "\n", encoding="utf-8"))
    shutil.copytree(tokenizer, out_dir / "tokenizer", dirs_exist_ok=True)


def new_run(keys):
    """The settings of a new run, as layers for data.configure; keys: what was typed."""
    dataset = keys.get("dataset") or ("plwiki" if Path("data/plwiki/meta.json").exists() else "mini")
    if dataset == "mini" and not keys.get("dataset") and IS_MAIN:
        print("data/plwiki is not prepared (see data.py): training on the embedded dataset, mini")
    mini = MINI if dataset == "mini" else {}
    return [mini, RECIPES[keys.get("recipe", "tuned")], keys, {"dataset": dataset}]


def main(argv):
    others = pformat({"mini": MINI, "--recipe=report": RECIPES["report"]}, width=100, sort_dicts=False)
    keys = data.parse_args(argv, f"{__doc__}\nDefaults that replace those below:\n{others}\n",
                           TrainConfig, GPTConfig, LSTMConfig)
    out_dir = data.behind_link(Path(keys.get("out_dir") or MODELS[keys.get("model", "gpt")][2]))
    with lock_folder(out_dir) if IS_MAIN else nullcontext():
        start(keys, out_dir)


def start(keys, out_dir):
    """Decide which run this is, and let a Trainer do it."""
    saved = load_checkpoint(out_dir / "last.pt") if keys.get("init_from") == "resume" else None
    name = keys.get("model", saved["config"]["model"] if saved else "gpt")
    model_class, config_class, _ = MODELS[name]
    before = {**vars(saved["model"].config), **saved["config"]} if saved else {}
    for key in keys:
        if key not in vars(TrainConfig()) and key not in vars(config_class()):
            raise UserError(f"unknown key --{key} for the {name} (see --help)")
        if saved and key not in MAY_CHANGE and keys[key] != before.get(key):
            raise UserError(f"the run in {out_dir} has --{key}={before.get(key)}, not {keys[key]}: leave it "
                            "out, or start another run with another --out_dir")
    layers = [before, keys] if saved else new_run(keys)
    config = data.configure(TrainConfig, *layers, {"out_dir": str(out_dir)})

    device = choose_device(config.device)
    if config.dataset == "mini" and not Path("data/mini/meta.json").exists() and IS_MAIN:
        data.main(["--dataset=mini"])
    if WORLD_SIZE > 1:      # all wait here for one another; gloo: goes_on shares the clock without a GPU sync
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    meta, splits = data.load_dataset(config.dataset)
    if saved and saved.get("data_sha256") != meta["splits"]["train"]["sha256"]:
        raise UserError(f"cannot resume: data/{config.dataset} has been prepared anew since this run began")
    model_config = data.configure(config_class, {"vocab_size": meta["vocab_size"]}, *layers)
    if model_config.vocab_size < meta["vocab_size"]:
        raise UserError(f"vocab_size {model_config.vocab_size} is below the dataset's {meta['vocab_size']}")
    n_windows = {split: data.count_windows(t, model_config.block_size) for split, t in splits.items()}
    sequences = config.batch_size * config.gradient_accumulation_steps
    if min(n_windows.values()) < 1 or sequences > n_windows["train"]:
        raise UserError(f"data/{config.dataset} is too small for steps of {sequences} windows of "
                        f"{model_config.block_size} tokens: it holds {n_windows}")
    if config.batch_size % WORLD_SIZE:
        raise UserError(f"batch_size {config.batch_size} is not a multiple of the number of processes")

    torch.manual_seed(config.seed)
    model = saved["model"] if saved else model_class(model_config)
    trainer = Trainer(config, model.to(device), splits, meta["splits"])
    if saved:
        trainer.restore(saved)
    elif IS_MAIN:
        new_folder(out_dir, trainer.model.summary(), data.dataset_folder(config.dataset) / "tokenizer")
    del saved           # and the memory of its moments
    trainer.run()
    if WORLD_SIZE > 1:
        dist.barrier()  # leave together: otherwise the last process can hang
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run(main)
