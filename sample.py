"""Generate text from a trained model: checkpoint + prompt -> text, streamed as it is made.

    python sample.py --temperature=1.0                          # the newest checkpoint
    python sample.py --model=lstm --prompt="W nocy" --num_samples=3
    python sample.py --grid=True            # all prompts at temperatures 0.5, 1.0, 1.5 -> JSON file
    python sample.py --export=FOLDER        # weights, configuration and tokenizer for use elsewhere
    python sample.py --help

Owns the generation loop, which bench.py times as it is. Reads only out_dir, never data/.
"""
import re
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import data
from data import UserError
from model_gpt import GPT
from model_lstm import multiplier
from train import MODELS, choose_device, choose_dtype, compile_fault, device_name, load_checkpoint, \
    set_matmul_precision, write_json, write_whole

GRID_PROMPTS = ("Polska to piękny kraj.", "Dawno temu", "Miasto leży nad rzeką", "W 1920 roku",
                "Najważniejszym dziełem")


@dataclass
class SampleConfig:
    """What to generate."""
    model: Literal["auto", "gpt", "lstm"] = "auto"  # auto: the one with the newest checkpoint
    out_dir: str = ""               # folder of ckpt.pt; empty: outputs/transformer or outputs/rnn
    prompt: str = "W 1920 roku"     # text to continue; empty: a new one
    temperature: float = 1.0        # below 1 safer, above wilder; 0: always the likeliest
    top_k: int = 0                  # draw among the k likeliest tokens only; 0: all
    top_p: float = 1.0              # draw among the likeliest, up to this total probability; 1: all
    max_new_tokens: int = 200       # tokens to generate, fewer where the text ends with </s>
    num_samples: int = 1            # continuations, generated as one batch
    seed: int = 1337                # the same seed gives the same text
    grid: bool = False              # all prompts at all temperatures, written to a JSON file
    export: str = ""                # write the model to this folder for use elsewhere, then exit
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: the first one available
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"   # int8: on cpu only
    compile: bool = False           # torch.compile, on cuda only: faster after some ten seconds

    def __post_init__(self):
        if not (1 <= self.max_new_tokens <= 10 ** 6 and 1 <= self.num_samples <= 10 ** 6):
            raise ValueError("max_new_tokens and num_samples must be 1 to a million")
        if not 1e-6 <= self.top_p <= 1:
            raise ValueError("top_p must be 1e-6 to 1")
        self.prompt = self.prompt.encode("utf-8", "replace").decode()   # it can hold a lone surrogate


@torch.inference_mode()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, generator=None, mode=None):
    """Continue idx (B, T): yield the next ids (B,), max_new_tokens times. The model must be in eval mode.

    mode: "naive" recomputes the whole window for every token, as the report and nanoGPT do. "cached" feeds
    only the newest token to model.step, whose state keeps what it needs of the past. "graph" does so on CUDA
    in one launch per token, and "compiled" with fewer kernels too. None: graph on CUDA, else cached.
    All give the same tokens, up to rounding. generator, on the CPU, decides all draws.
    """
    (B, T), device = idx.shape, idx.device
    mode = mode or ("graph" if device.type == "cuda" else "cached")
    tokens = torch.cat([idx, idx.new_empty(B, max_new_tokens)], dim=1)
    uniforms = torch.rand(max_new_tokens, B, 1, generator=generator).to(device)
    newest, uniform = tokens[:, :1].clone(), uniforms[0].clone()       # inputs of decode, at fixed addresses
    state = () if mode == "naive" else model.init_state(B)

    def advance(step, idx):             # read idx (B, n): newest becomes what follows
        logits = model(idx)[0][:, -1] if mode == "naive" else step(idx, state)[0]
        newest.copy_(pick(logits, uniform, temperature, top_k, top_p)[:, None])

    decode = partial(advance, torch.compile(model.step) if mode == "compiled" else model.step, newest)
    if mode in ("graph", "compiled"):
        decode = capture(decode)        # this runs it, so the state is no longer empty
    first, refill = 0, True             # the window is tokens[:, first:t]; refill: all of it is read
    for t in range(T, T + max_new_tokens):
        uniform.copy_(uniforms[t - T])
        if t - first > model.window:
            # The GPT's positions are used up. Sliding the window by one would change the position of every
            # token in it, so the whole cache would have to be computed again for each new token. Keeping the
            # newest half costs one such pass every block_size / 2 tokens. The LSTM never comes here.
            first, refill = t - max(1, model.window // 2), True
        if refill:
            for part in state:
                part.zero_()            # empties it
            advance(model.step, tokens[:, first:t])
        else:
            decode()
        refill = mode == "naive"        # naive reads the whole window for every token
        tokens[:, t] = newest[:, 0]
        yield tokens[:, t]


def pick(logits, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next token: logits (B, V) -> ids (B,). uniform (B, 1) in [0, 1) decides the draw. Never forces
    a host sync."""
    if temperature < 1e-4:      # greedy: 0, or so small that the division would overflow
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    # CUDA sums a long row in no fixed order; float64 (MPS has none) makes this too small to change a draw
    exact = torch.float64 if logits.is_cuda else torch.float32
    if top_k:
        weakest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < weakest, float("-inf"))
    if top_p < 1:       # nucleus sampling (Holtzman et al. 2020): drop tokens that come after a mass of top_p
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        ordered = ordered.masked_fill(p.cumsum(dim=-1, dtype=exact) - p >= top_p, float("-inf"))
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)
    # Lay the probabilities end to end on a line: a uniform point on it falls on token i with probability p_i.
    # This takes one random number, where torch.multinomial takes one per token id and checks p on the host.
    line = logits.softmax(dim=-1).cumsum(dim=-1, dtype=exact)
    drawn = torch.searchsorted(line, uniform * line[:, -1:], right=True).squeeze(1)
    return drawn.clamp(max=logits.size(-1) - 1)         # NaN logits lead beyond the line's end


def capture(function):
    """function() as a CUDA graph, all its kernels in one launch -> a callable that runs it again on the same
    memory.

    At batch 1 a kernel runs about as long as the CPU takes to launch it, so launches set the pace. function
    must use tensors that stay at the same addresses, and must never read a value on the host.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):       # libraries allocate at their first call, which a capture must not see
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


# ----------------------------------------------------------------------------------------------------
# Faster matrix products on a CPU. A multiplier, as in model_lstm.py, turns a matrix w (N, K) into the
# function x (..., K) -> x w^T (..., N).

class Weight:
    """Replaces a matrix in a model. PyTorch passes F.linear on to any argument with __torch_function__, so
    model.step need not know."""

    def __init__(self, times):
        self.times = times

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not F.linear or kwargs:
            raise TypeError(f"this weight can do no more than F.linear, not {function}")
        x, weight, bias = args          # as nn.Linear and the LSTM's recurrence pass them
        y = weight.times(x)
        return y if bias is None else y + bias


def int8_multiplier(w):
    """Multiply in 8-bit integers. Each output channel n has a scale, s_n = max |w_n| / 127, and the integers
    round(w_n / s_n), half the bytes of bfloat16. The kernel multiplies integers by integers (Jacob et
    al. 2018), so it also quantizes the float32 activations, by their range in each call."""
    scale, zero = w.abs().amax(dim=1).clamp(min=1e-12) / 127, torch.zeros(len(w), dtype=torch.int64)
    if torch.backends.quantized.engine == "none":       # macOS: it has a kernel, and chooses none
        torch.backends.quantized.engine = "qnnpack"
    # PyTorch 2.13 warns that this will be removed; the alternatives it has so far are slower
    warnings.filterwarnings("ignore", message=".*quantize_per_channel")
    q = torch.quantize_per_channel(w, scale.double(), zero, axis=0, dtype=torch.qint8)
    packed = torch.ops.quantized.linear_prepack(q, None)
    # reduce_range: 7 bits for x; 8 overflow where a CPU lacks VNNI
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, reduce_range=True)


def to_dtype(model, dtype):
    """Convert model in place, and for good, to generate by model.step with weights in dtype. On a CPU its
    matrices become Weights, but not the embeddings, of which a token reads a single row."""
    set_matmul_precision(dtype)
    model.to(torch.float32 if dtype == torch.int8 else dtype)
    # For a single row, tiles make a float32 or bfloat16 matrix up to twice as fast as with F.linear.
    times = int8_multiplier if dtype == torch.int8 else partial(multiplier, batch_size=1)
    if next(model.parameters()).device.type == "cpu":
        for module in model.modules():
            for name, w in list(module.named_parameters(recurse=False)):
                if w.dim() == 2 and not isinstance(module, torch.nn.Embedding):
                    delattr(module, name)
                    setattr(module, name, Weight(times(w.detach())))
    return model


# ----------------------------------------------------------------------------------------------------
# Text

def continue_prompt(model, tok, config):
    """Generate and print config.num_samples continuations of the prompt as one batch, streaming a single one.
    Returns a list of token ids for each (what was read of the prompt, then its continuation up to </s>), and
    tokens/s over all after the first token. Raises UserError for another model's tokenizer."""
    # keep the last block_size tokens of a long prompt: neither model was trained on more
    ids = [tok.bos_token_id, *data.encode(tok, [config.prompt])[0]][-model.config.block_size:]
    if max(ids) >= model.config.vocab_size:
        raise UserError("the run folder's tokenizer has more entries than its model: it is from another run")
    idx = torch.tensor([ids] * config.num_samples, device=next(model.parameters()).device)
    generator, rows = torch.Generator().manual_seed(config.seed), []
    decode, shown, held, eos = tok.backend_tokenizer.decode, ids, [], tok.eos_token_id
    stream = config.num_samples == 1
    if stream:
        print(config.prompt, end="", flush=True)
    for next_ids in generate(model, idx, config.max_new_tokens, config.temperature, config.top_k,
                             config.top_p, generator, "compiled" if config.compile else None):
        rows.append(next_ids)
        if len(rows) == 1:
            next_ids.tolist()                           # wait until the prompt has been read
            start = time.perf_counter()
        if stream:
            if next_ids.item() == eos:
                break
            held.append(next_ids.item())
            new = decode(shown + held)[len(decode(shown)):]
            if new and not new.endswith("\ufffd"):      # wait for the rest of a character of several tokens
                print(new, end="", flush=True)
                shown, held = held, []
    new = torch.stack(rows, dim=1).tolist()             # also waits for the device
    speed = config.num_samples * (len(rows) - 1) / (time.perf_counter() - start)
    rows = [ids + row[:[*row, eos].index(eos)] for row in new]              # up to the first </s>, or all
    for i, row in enumerate(rows, 1):       # streamed text only lacks its end of line
        print("" if stream else f"--- {i}\n{tok.decode(row, skip_special_tokens=True)}")
    return rows, speed


def find_run(config):
    """-> the folder of the run that config means, and its checkpoint. Raises UserError."""
    models = MODELS if config.model == "auto" else [config.model]
    paths = [Path(config.out_dir or MODELS[m][2], "ckpt.pt") for m in models]
    path = max(paths, key=lambda p: p.stat().st_mtime if p.exists() else 0)
    checkpoint = load_checkpoint(path)
    name = checkpoint["config"]["model"]
    if config.model not in ("auto", name):
        raise UserError(f"{path} holds a {name}, not a {config.model}: leave --model out")
    if not path.with_name("tokenizer").is_dir():
        raise UserError(f"{path.parent}/tokenizer is missing: copy it there from the folder of its dataset")
    return path.parent, checkpoint


def main(argv):
    config = data.configure(SampleConfig, data.parse_args(argv, __doc__, SampleConfig))
    out_dir, checkpoint = find_run(config)
    tok, device = data.load_tokenizer(str(out_dir / "tokenizer")), choose_device(config.device)
    if config.export:
        return export(checkpoint["model"], tok, Path(config.export))
    fault = config.compile and (compile_fault(device) if device.type == "cuda" else "it needs --device=cuda")
    if fault:
        raise UserError(f"--compile=True: {fault}; leave it out")
    dtype, _ = choose_dtype(config.dtype, device)
    model = to_dtype(checkpoint["model"].to(device), dtype)
    facts = {"model": checkpoint["config"]["model"], "dataset": checkpoint["config"]["dataset"],
             "device": device_name(device), "dtype": str(dtype).removeprefix("torch.")}
    asked, results = [(config.prompt, config.temperature)], []
    if config.grid:         # as in the report's inference file, whose texts keep their <s>
        asked = [(prompt, temperature) for prompt in GRID_PROMPTS for temperature in (0.5, 1.0, 1.5)]
    for prompt, temperature in asked:
        rows, speed = continue_prompt(model, tok, replace(config, prompt=prompt, temperature=temperature))
        print("[{model}, {dataset}, {:.1f} tokens/s, {device}, {dtype}, temperature {}]".format(
            speed, temperature, **facts))
        results += [{"prompt": prompt, "temperature": temperature, "text": tok.decode(row),
                     "new_tokens_per_second": round(speed, 1)} for row in rows]
    if config.grid:
        settings = {k: getattr(config, k) for k in ("top_k", "top_p", "max_new_tokens", "seed")}
        path = out_dir / f"{Path(MODELS[facts['model']][2]).name}_inference_results.json"
        write_json(path, {**facts, "settings": settings, "results": results})
        print(f"[{len(results)} texts in {path}]")


def export(model, tok, folder):
    """Write model.safetensors, config.json, generation_config.json and the tokenizer into folder. The GPT is
    then a GPT-2 for AutoModelForCausalLM.from_pretrained; the LSTM's layers have nn.LSTM's names."""
    from safetensors.torch import save_file
    c, tensors, is_gpt = model.config, {}, isinstance(model, GPT)
    for name, w in model.state_dict().items():
        if not is_gpt:
            name = re.sub(r"blocks\.(\d+)\.(\w+)", r"lstm.\2_l\1", name)
        elif not name.startswith("lm_head"):
            name = "transformer." + name.replace("blocks", "h")
            w = w.t() if ".h." in name and w.dim() == 2 else w      # GPT-2 keeps its matrices as (in, out)
            if ".attn." in name:                                    # and its attention has biases
                tensors[name.replace("weight", "bias")] = torch.zeros(w.size(1))
        tensors[name] = w.contiguous()
    settings = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": c.block_size,
                "n_embd": c.n_embd, "n_layer": c.n_layer, "n_head": c.n_head,
                "activation_function": "gelu_new", "tie_word_embeddings": False, "attn_pdrop": 0.0,
                "embd_pdrop": c.dropout, "resid_pdrop": c.dropout} if is_gpt else vars(c)
    ends = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id}
    facts = {"format": "pt"} if is_gpt else {"format": "pt", "residual": f"{c.residual}: if True, each layer "
                                             "as wide as its input adds this input to its output"}
    tok.save_pretrained(folder)
    write_json(folder / "config.json", {**settings, **ends, "vocab_size": c.vocab_size, "dtype": "float32"})
    write_json(folder / "generation_config.json", {**ends, "do_sample": True})
    write_whole(folder / "model.safetensors", lambda p: save_file(tensors, p, facts))
    print(f"written: {folder}/model.safetensors, with its configuration and tokenizer")


if __name__ == "__main__":
    data.run(main)
