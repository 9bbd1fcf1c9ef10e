"""Text -> tokens -> batches. Prepares data/NAME/ once; train.py then reads its uint16 token files.

    python data.py                                  # plwiki as in the report: 100,000 documents
    python data.py --dataset=mini                   # a small synthetic corpus, no download
    python data.py --dataset=books --source=FILE --tokenizer=train  # a .jsonl, .jsonl.zst or .txt
    python data.py --help

Knows nothing about models. Also parses every script's command line. mini's grammar is an appendix.
"""
import argparse
import difflib
import hashlib
import inspect
import io
import itertools
import json
import os
import random
import re
import signal
import sys
import tempfile
import typing
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

# A closed stream (`2>&-`) is None in Python, and any write to it would fail.
sys.stdout, sys.stderr = (s or open(os.devnull, "w", errors="replace") for s in (sys.stdout, sys.stderr))
# seconds between two updates: a log file needs few
progress_bar = partial(tqdm, leave=False, mininterval=0.5 if sys.stderr.isatty() else 20)
FORMAT_VERSION = 2      # of data/NAME/; raised when an older folder can no longer be read
SPLITS = ("train", "val", "test")
BY_TENTHS = ("train",) * 8 + ("val", "test")            # of a document's hash, or of a text's length
LONGEST_PART = 25_000   # characters of a text encoded at once; 64 of these parts are held in memory
LONGEST_LINE = 100_000_000      # characters: a .jsonl is read a line at a time


@dataclass
class DataConfig:
    """What to prepare."""
    dataset: str = "plwiki"         # folder under data/: plwiki, mini, or a name of yours
    source: str = ""                # a local .jsonl, .jsonl.zst (SpeakLeash layout) or .txt file
    tokenizer: str = "speakleash/Bielik-4.5B-v3"    # hub name, folder, or train: a new one (mini)
    vocab_size: int = 32000         # entries of a new tokenizer, at most 65536; mini: 2048
    n_docs: int = 0                 # take only the first n; 0: all. Default for plwiki: 100000
    quality: typing.Literal["HIGH", "MEDIUM", "LOW", "ALL"] = "HIGH"    # unlabelled ones stay too
    seed: int = 1337                # of the split into train, val and test, and of mini's text


# Defaults of these two datasets where they differ from those above.
PRESETS = {"plwiki": {"n_docs": 100_000}, "mini": {"tokenizer": "train", "vocab_size": 2048}}


# ----------------------------------------------------------------------------------------------------
# The story: documents -> data/NAME/{train,val,test}.bin, meta.json, tokenizer/

def prepare(config):
    """Write data/NAME/ as config says, completely or not at all; an older one is set aside. A .jsonl of any
    size takes no more memory than one batch of its text; a .txt is read whole. Raises UserError."""
    target, source = dataset_folder(config.dataset), config.source
    if not source and config.dataset not in PRESETS:
        raise UserError(f"--dataset={config.dataset} needs --source=FILE (.jsonl, .jsonl.zst or .txt)")
    if source and not (Path(source).is_file() and source.endswith((".jsonl", ".jsonl.zst", ".txt"))):
        raise UserError(f"--source={source}: no such .jsonl, .jsonl.zst or .txt file")
    if not 512 <= config.vocab_size <= 65536:
        raise UserError("vocab_size must be 512 to 65536: a token is stored in 16 bits")
    if any(target.glob("*")) and not (target / "meta.json").exists():
        raise UserError(f"{target} holds files that are no dataset's: choose another --dataset, or move them")
    # before the download, so that a tokenizer that cannot be loaded fails at once
    tok = None if config.tokenizer == "train" else load_tokenizer(config.tokenizer)
    if not source and config.dataset == "plwiki":
        source = fetch_plwiki(target.parent / "speakleash")

    def documents(left_out):
        texts = read_documents(source, config.quality, left_out) if source else mini_articles(config.seed)
        return itertools.islice(texts, config.n_docs or None)

    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{config.dataset}-") as staging:
        new = Path(staging) / "new"
        if tok is None:
            print(f"training a tokenizer of {config.vocab_size:,} entries")
            tok = train_tokenizer(documents(Counter()), config.vocab_size)
            if len(tok) < config.vocab_size:
                print(f"it has {len(tok):,}: the text has no more pieces that occur twice")
        tok.save_pretrained(new / "tokenizer")      # which makes both folders
        left_out = Counter()
        parts = parts_of(documents(left_out), config.seed, by_place=source.endswith(".txt"))
        splits = write_splits(parts, tok, new)
        vocab_size = 1 + max(tok.get_vocab().values())      # more than len(tok) where ids are skipped
        meta = {"format_version": FORMAT_VERSION, **vars(config), "source": source or config.dataset,
                "vocab_size": vocab_size, "splits": splits}
        (new / "meta.json").write_text(json.dumps(meta, indent=1))      # as ASCII: a file's name can be odd
        set_aside(target)
        new.rename(target)
    for why, n in left_out.items():
        print(f"left out: {n:,} {why}")
    for name, s in splits.items():
        print(f"{target}/{name}.bin: {s['documents']:,} documents, {s['tokens']:,} tokens")


def write_splits(parts, tok, folder):
    """Encode parts (split, text, opens, closes) into folder/{split}.bin, with <s> before a part that opens a
    document and </s> after one that closes it -> {split: {"documents", "characters", "tokens", "sha256"}}."""
    facts = {s: {"documents": 0, "characters": 0, "tokens": 0, "sha256": hashlib.sha256()} for s in SPLITS}
    with ExitStack() as stack:
        files = {split: stack.enter_context(open(folder / f"{split}.bin", "wb")) for split in SPLITS}
        while batch := list(itertools.islice(parts, 64)):
            for (split, text, opens, closes), ids in zip(batch, encode(tok, [part[1] for part in batch])):
                ids = [tok.bos_token_id] * opens + ids + [tok.eos_token_id] * closes    # a bool is 0 or 1
                raw = np.array(ids, dtype="<u2").tobytes()
                files[split].write(raw)
                facts[split]["documents"] += opens
                facts[split]["characters"] += len(text) + (not opens)   # and the space where it was cut
                facts[split]["tokens"] += len(ids)
                facts[split]["sha256"].update(raw)
    for split, fact in facts.items():
        fact["sha256"] = fact["sha256"].hexdigest()
        if fact["tokens"] < 2:
            raise UserError(f"too little text: none is left for {split}. Take more, --quality=ALL, or a "
                            ".txt, which is cut by its length")
    return facts


def parts_of(texts, seed, by_place):
    """Texts -> (split, part of a text, opens, closes). A text's hash decides its split: identical documents
    share one, and the order of the source does not matter. With by_place the position decides, as in nanoGPT:
    the first 80 % of a text are train, then 10 % val, 10 % test. Its parts are then small, about a 200th."""
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
        tenth, done = int.from_bytes(digest, "little") % 10, 0
        longest = min(LONGEST_PART, max(100, len(text) // 200)) if by_place else LONGEST_PART
        parts = list(cut(text, longest))
        for i, part in enumerate(progress_bar(parts, desc="encoding", disable=not by_place)):
            if by_place:
                tenth = 10 * done // max(1, len(text))
            yield BY_TENTHS[tenth], part, i == 0, i == len(parts) - 1
            done += len(part)


def cut(text, most=LONGEST_PART):
    """Yield text in parts of at most `most` characters. A cut drops a space, which comes back as the ▁ that
    the tokenizer puts at the front of the next part. (A tokenizer that puts none there loses the space; a
    text without spaces gains one.)"""
    start = 0
    while len(text) - start > most:
        end = text.rfind(" ", start + most // 2, start + most)
        yield text[start:start + most if end < 0 else end]
        start = start + most if end < 0 else end + 1
    yield text[start:]


def dataset_folder(name):
    """data/name. Raises UserError for a name that could lead out of data/."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) or name in ("previous", "speakleash"):
        raise UserError(f"--dataset={name}: choose another name, of letters, digits, '.', '_' and '-'")
    return behind_link(Path("data") / name)


def behind_link(folder):
    """folder, or its target if it is a link, so that what is put beside it lands beside the real folder."""
    return Path(os.path.realpath(folder)) if folder.is_symlink() else folder


def set_aside(folder):
    """Rename folder, where there is one, to previous/NAME-DATE-TIME beside it; nothing is deleted."""
    if folder.exists():
        aside = folder.parent / "previous" / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        print(f"what was in {folder} is now in {aside}")


# ----------------------------------------------------------------------------------------------------
# Documents: a local file, or SpeakLeash's plwiki

def read_documents(path, quality, left_out):
    """Yield the texts of a .jsonl or .jsonl.zst file, or a .txt as one text, with a progress bar. Counts what
    it skips in left_out. JSON lines are SpeakLeash's: {"text": ..., "meta": {"quality": ..., ...}}; meta may
    be missing. Raises UserError for any other line, with its number, or for another format or encoding."""
    import zstandard
    path, file = Path(path), open(path, "rb")
    # If the last frame of a .zst is cut off, its reader just stops. So we append a frame of our own, with a
    # line that is a single NUL: a stream that ends without it was cut off.
    packed, ours = path.suffix == ".zst", iter([zstandard.compress(b"\n\0")])
    raw = SimpleNamespace(read=lambda size: file.read(size) or next(ours, b""))
    unpacked = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
    stream = io.TextIOWrapper(unpacked if packed else file, encoding="utf-8-sig", newline="")
    with file, progress_bar(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as bar:
        try:
            if path.suffix == ".txt":
                bar.close()     # encoding has a bar of its own
                yield stream.read()
                return
            for n, line in enumerate(iter(partial(stream.readline, LONGEST_LINE), "\0" if packed else ""), 1):
                bar.update(file.tell() - bar.n)
                if not line:
                    raise zstandard.ZstdError("it is cut off")
                if len(line) == LONGEST_LINE:
                    raise ValueError(f"longer than {LONGEST_LINE:,} characters")
                if line.isspace():
                    continue
                record = json.loads(line)
                text, label = record["text"], (record.get("meta") or {}).get("quality")
                if not text.strip():
                    left_out["blank documents"] += 1
                elif quality not in ("ALL", label or quality):
                    left_out[f"documents of quality {label}"] += 1
                else:
                    yield text.encode("utf-8", "replace").decode()      # JSON can spell a lone surrogate
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is not a zstd file, or a damaged one ({error})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 ({error.reason}): if it is in cp1250, say, convert it by "
                            f"`iconv -f cp1250 -t utf-8 {path} > NEW`") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as why:
            raise UserError(f'{path}, line {n}: not {{"text": "...", "meta": {{...}}}} but '
                            f"{line[:60].strip()} ({why})") from None


def reachable(url):
    """True if any server answers at url in four seconds. The clients below would wait much longer."""
    import requests
    with suppress(requests.RequestException):
        requests.head(url, timeout=4)
        return True
    return False


def fetch_plwiki(folder):
    """Download SpeakLeash's plwiki (870 MB) into folder, once -> the path of its .jsonl.zst, or UserError."""
    import requests
    from speakleash import Speakleash
    with suppress(requests.RequestException, AttributeError):       # get gives None for a name it lacks
        if reachable(Speakleash.get_url("pl")):
            whole, path = Speakleash(str(folder)).get("plwiki").check_file()
            if whole:
                return path
    raise UserError("SpeakLeash cannot be reached, or plwiki came incomplete: run again, pass --source=FILE, "
                    f"a copy of plwiki.jsonl.zst (an earlier download is in {folder}), or use --dataset=mini")


# ----------------------------------------------------------------------------------------------------
# Tokenizers. transformers takes seconds to import, so only the functions that need it do.

def train_tokenizer(texts, vocab_size):
    """Train a Llama-style BPE (Sennrich et al. 2016) on texts of all splits, since it only fixes the units:
    <unk>, <s>, </s>, 256 bytes (to spell rare characters), the other characters and the merges. A space
    becomes a ▁ at the front of a word. Decoding restores the text, unless it contains a ▁ itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # merges stay within a word or a run of symbols (up to 50: some texts have no spaces); digits stay single
    words = Regex(r"▁?\p{L}{1,50}|▁?[^\p{L}\p{N}\s▁]{1,50}|\p{N}|\s|▁{1,50}")
    tok.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                     decoders.Strip(" ", 1, 0)])
    # used elsewhere it puts <s> in front, as the report's does; encode below leaves that to its caller
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", first.index("<s>"))])
    # the trainer keeps every distinct word; more text would hardly change the merges
    excerpt = itertools.islice(itertools.chain.from_iterable(map(cut, texts)), 30_000)
    tok.train_from_iterator(excerpt, BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, limit_alphabet=min(1000, vocab_size - len(first)),
        special_tokens=first, show_progress=False))
    plain = {**json.loads(tok.to_str()), "added_tokens": []}    # so a text's "<0x41>" stays six characters
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
                                   unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def load_tokenizer(name):
    """Load a tokenizer by folder or Hugging Face name; without a network, from the local cache. Never runs
    code that comes with it. Raises UserError, which says what to type instead."""
    offline = Path(name).is_dir() or not reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if offline:     # set before the import, or the hub's client would wait and retry
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer, logging
    logging.set_verbosity_error()
    try:
        tok = AutoTokenizer.from_pretrained(name, local_files_only=offline, trust_remote_code=False)
        if not hasattr(tok, "backend_tokenizer") or None in (tok.bos_token_id, tok.eos_token_id):
            raise ValueError("it has no tokenizer.json, or no <s> and </s>")
        if (highest := max(tok.get_vocab().values())) > 65535:
            raise ValueError(f"it has ids up to {highest:,}, but tokens are stored in 16 bits")
    except (KeyboardInterrupt, SystemExit):     # SystemExit: SIGTERM, see run
        raise
    except BaseException as error:  # a damaged or foreign file can raise anything, even a Rust panic
        raise UserError(
            f"cannot load the tokenizer {name!r} ({first_line(error)}). One from the hub needs the network, "
            "and may need `hf auth login` and a licence accepted; SentencePiece's format needs `pip install "
            "sentencepiece`. Or pass --tokenizer=FOLDER, --tokenizer=train or --dataset=mini") from None
    return tok


def encode(tok, texts):
    """Token ids of each text, without <s> and </s>; such marks inside a text are ordinary characters. Raises
    UserError where the tokenizer cannot."""
    try:
        return tok(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    except (KeyboardInterrupt, SystemExit):     # SystemExit: SIGTERM, see run
        raise
    except BaseException as error:          # a Rust panic is no Exception
        raise UserError(f"the tokenizer fails on a text ({first_line(error)}): choose another") from None


# ----------------------------------------------------------------------------------------------------
# Loading: data/NAME/ -> token memmaps -> batches

def load_dataset(name):
    """-> meta.json as a dict, and {"train" | "val" | "test": uint16 memmap}. Raises UserError where the
    folder is missing, or a file is not the one that meta.json describes."""
    folder, splits = dataset_folder(name), {}
    if not (folder / "meta.json").is_file():
        source = "" if name in PRESETS else " --source=FILE"
        raise UserError(f"{folder} is not prepared: run `python data.py --dataset={name}{source}` first")
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {meta['format_version']}, this code reads {FORMAT_VERSION}")
        for split in SPLITS:
            splits[split] = np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r")
            if hashlib.sha256(splits[split]).hexdigest() != meta["splits"][split]["sha256"]:
                raise ValueError(f"{split}.bin is not the file that was prepared")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}): prepare it again") from None
    return meta, splits


def count_windows(tokens, block_size):
    """How many windows of block_size + 1 tokens a split holds; neighbours share one token, which is the last
    target of one and the first input of the next, so that no token is predicted twice."""
    return (len(tokens) - 1) // block_size


@lru_cache(maxsize=2)       # two, because one batch can end an epoch and begin the next
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def train_windows(n, step, batch_size, seed, rank=0, world_size=1):
    """The windows (of n) in the batch of a step: consecutive entries of one permutation per epoch, so none
    repeats within an epoch. A pure function of its arguments, so any step can be replayed. Each rank gets an
    equal share of the same batch."""
    share = batch_size // world_size
    positions = step * batch_size + rank * share + np.arange(share)
    return [_permutation(n, seed, int(p // n))[p % n] for p in positions]


def get_batch(tokens, windows, block_size, device):
    """Windows by number -> idx and targets (B, T) int64 on device: targets are the tokens after idx."""
    rows = np.stack([tokens[w * block_size:(w + 1) * block_size + 1] for w in windows])
    batch = torch.from_numpy(rows.astype(np.int64))
    if torch.device(device).type == "cuda":     # pinned, the copy can overlap with computation
        batch = batch.pin_memory().to(device, non_blocking=True)
    else:                                       # MPS would go on reading batch after it has been freed
        batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]


# ----------------------------------------------------------------------------------------------------
# The command line, for every script: dataclass fields are the keys, their trailing comments the help

class UserError(Exception):
    """A mistake the user can fix. Raised anywhere, it ends the program with one line and exit code 1."""


def first_line(error):
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def whole_number(text):
    """Also '1e3'."""
    if not float(text).is_integer():
        raise ValueError
    return int(text) if text.isdecimal() else int(float(text))


def true_or_false(text):
    return ("false", "true").index(text.lower()) == 1


def parse_args(argv, doc, *configs):
    """['--key=value', '--key', 'value', ...] -> {key: value} for the keys given, typed as in the config
    dataclasses. --help prints doc and the source of these dataclasses. Raises UserError for an unknown key,
    suggesting the nearest, or a value of the wrong type."""
    if {"-h", "--help"} & set(argv):
        classes = (inspect.getsource(c).partition("\n\n    def ")[0] for c in configs)
        print(doc, *classes, sep="\n\n", flush=True)
        sys.exit()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False,
                                     argument_default=argparse.SUPPRESS)
    kinds = {f.name: f.type for config in configs for f in fields(config)}
    # a shell leaves the ~ of --key=~/x as it is
    read = {int: whole_number, bool: true_or_false, float: float, str: os.path.expanduser}
    for key, kind in kinds.items():
        parser.add_argument(f"--{key}", type=read.get(kind), choices=typing.get_args(kind) or None)
    try:
        values, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error} (see --help)".removeprefix("argument ")) from None
    if unknown:
        key = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(key.removeprefix("--"), kinds, 1)
        instead = f", did you mean --{near[0]}?" if near else ": keys are --key=value, see --help"
        raise UserError(f"unknown key {key}{instead}")
    return vars(values)


def configure(config_class, *layers):
    """config_class(**keys), where a later layer {key: value} wins over an earlier one and keys of other
    classes are passed over. Raises UserError for a value that is not of its field's type (a layer may come
    from a file), is out of range, or is refused by the class."""
    known = {f.name: f for f in fields(config_class)}
    keys = {k: v for layer in layers for k, v in layer.items() if k in known}
    for key, value in keys.items():
        kind, choices = known[key].type, typing.get_args(known[key].type)
        if value is None and known[key].default is None:
            continue
        if (value not in choices) if choices else (type(value) is not kind):    # not shown: it can be huge
            raise UserError(f"--{key}: must be {' or '.join(choices) or kind.__name__}")
        if kind in (int, float) and not 0 <= value < 2 ** 63:       # nothing here means anything below zero
            raise UserError(f"--{key}={value}: must be a finite number, 0 or more")
    try:
        return config_class(**keys)
    except ValueError as error:
        raise UserError(str(error)) from None


def run(main):
    """Run main(arguments) as a program. It ends without a traceback on Ctrl-C, SIGTERM, SIGHUP, a reader that
    went away (| head), a failing file or disk, or too little memory."""
    for signum in signal.SIGTERM, signal.SIGHUP:
        if signal.getsignal(signum) != signal.SIG_IGN:      # under nohup, SIGHUP stays ignored
            signal.signal(signum, lambda n, _: sys.exit(128 + n))   # a normal exit, so staging is removed
    # a terminal may have no Polish letters (stderr escapes them); a log file should be up to date
    sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(141)       # as the shell reports a program that SIGPIPE ended
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}".replace("\n", " "))
    except Exception as error:      # libraries have no class for too little memory or a full disk
        known = "(out of|allocate|enough) memory|overflowed|os error|Invalid buffer size|ALLOC_FAILED"
        if not (isinstance(error, MemoryError) or re.search(known, str(error))):
            raise
        sys.exit(f"error: {first_line(error)}: lower --batch_size or --num_samples, or free space on disk")


def main(argv):
    keys = parse_args(argv, __doc__, DataConfig)
    prepare(configure(DataConfig, PRESETS.get(keys.get("dataset", DataConfig.dataset), {}), keys))


# ----------------------------------------------------------------------------------------------------
# mini: a synthetic Polish encyclopaedia. Invented facts, real grammar: nouns are declined; adjectives, past
# tenses and numerals agree with them, so that a model must learn endings and not a list of sentences.

CASES = "nom gen dat acc ins loc".split()       # all but the vocative
# Genders: m, f, n; M for a man or an animal, whose accusative is the genitive; p for plurals.
PAST = {"m": "", "M": "", "f": "a", "n": "o", "p": "y"}                     # był, była, było, były
ADJECTIVE = {"m": "y ego emu y ym ym", "M": "y ego emu ego ym ym", "f": "a ej ej ą ą ej",
             "n": "e ego emu e ym ym", "p": "e ych ym e ymi ych"}           # nowy, nowego, nowemu, ...
# A row is a gender and the endings of six cases. A noun takes the first row whose nominative it ends in.
NOUNS = [row.split() for row in (
    "f ka ki ce kę ką ce|f na ny nie nę ną nie|f wa wy wie wę wą wie|m ów owa owowi ów owem owie|"
    "m ek ka kowi ek kiem ku|m iec ca cowi iec cem cu|M an ana anowi ana anem anie|"
    "M ław ława ławowi ława ławem ławie|n wo wa wu wo wem wie|n ko ka ku ko kiem ku|"
    "p ice ic icom ice icami icach|p mury murów murom mury murami murach").split("|")]
STEMS = ("Dęb Lip Buk Sosn Jodł Grab Klon Jawor Cis Brzoz Olch Wierzb Jesion Kalin Malin Wiśni Topol "
         "Akacj Jarzębin Leszczyn Orzech Jałowc Modrzewi Wiąz Jan Adam Piotr Bogdan Wilk Sokoł Kruk "
         "Orł Bobr Lis Stefan Roman Julian Bor Gaj Dzik Piask Chmiel Rad Tur").split()
LEXICON = {     # what an article may name: nouns, and the stems of adjectives, of which one follows the noun
    "town": ([stem + end for stem in STEMS for end in ("ów", "owo", "ówka", "owina", "owiec", "owice")],
             "Now Star Wielk Mał Górn Doln".split()),
    "river": ([stem + "owianka" for stem in STEMS], "Biał Czarn Wielk Mał".split()),
    "who": ("Jan Stefan Roman Julian Stanisław Wacław Czesław Anna Helena Ewa Monika".split(),
            [stem + "owsk" for stem in STEMS]),
    "species": ("sroka kaczka wrona sowa mewa bocian dzwonek fiołek".split(),
                "leśn poln górsk wodn drobn biał żółt złot łąkow karpack dzik czarn srebrn".split()),
    "place": ("wioska mieścina miasteczko uzdrowisko gródek".split(), "śląsk mazowieck pomorsk".split()),
    "building": ("biblioteka kapliczka kościółek opactwo mury".split(), "drewnian miejsk".split())}
ARTICLES = """
{town} to {place}. | {town} – {place} nad {river:ins}.
W {later} roku mieszkał{past} tam {n} {people}. | W {later} roku stał{past} tam {n} {homes}.
Pierwsza wzmianka o {town:loc} pochodzi z {year} roku. | {town} należał{town.past} do {who:gen}.
Mieszkańcy {town2:gen} pomogli {town:dat}. | {town} był{town.past} większ{town.adj} niż {town2}.
Podróżni chwalą {building:acc}. | Występuje tu {species}. | Urodził{who.past} się tam {who}.

{who} urodził{who.past} się w {town:loc}. | {who} mieszkał{who.past} nad {river:ins}.
W {year} roku poznał{who.past} {who2:acc}. | Opiekował{who.past} się {who2:ins}.
Opisał{who.past} {species:acc}. | Zajmował{who.past} się {species:ins}. | Opuścił{who.past} {town:acc}.
{who2} poświęcił{who2.past} {who:dat} wiersz. | Książkę o {who:loc} napisał{who2.past} {who2}.

{species} występuje nad {river:ins}. | {species} to gatunek, który opisał{who.past} {who}.
Pierwszy opis {species:gen} powstał w {town:loc}. | {species:acc} chronił{who.past} {who}.
{species} jest chronion{species.adj} od {later} roku. | {who} poświęcił{who.past} {species:dat} wiersz.
Przed {building:ins} można spotkać {species:acc}. | O {species:loc} krąży w {town:loc} wiele legend.

{building} w {town:loc} został{building.past} zbudowan{building.adj} w {year} roku.
Pieniądze na {building:acc} dał{who.past} {who}. | Plany {building:gen} narysował{who.past} {who}.
Obok {building:gen} występuje {species}. | O {building:loc} pisał{who2.past} {who2}.
Dzięki {building:dat} {town} stał{town.past} się sławn{town.adj}. | W {town2:loc} takich nie ma.
""".strip().split("\n\n")       # an article takes one sentence from each line; {town2} is a second town


class Word:
    """A noun and an adjective. f"{word}" is nominative, f"{word:gen}" genitive."""

    def __init__(self, noun, adjective):
        gender, *endings = next(row for row in NOUNS if noun.endswith(row[1]))
        self.past, self.adj = PAST[gender], ADJECTIVE[gender][0]        # stał-o, sławn-e
        stem, pairs = noun.removesuffix(endings[0]), zip(endings, ADJECTIVE[gender].split())
        forms = [f"{stem}{ending} {adjective}{agreeing}" for ending, agreeing in pairs]
        self.forms = [form.replace("ky", "ki").replace("ke", "kie") for form in forms]  # not wielky

    def __format__(self, case):
        return self.forms[CASES.index(case or "nom")]


def mini_articles(seed, n_docs=30_000):
    """Yield n_docs short articles; the same seed gives the same text."""
    rng = random.Random(seed)
    for _ in range(n_docs):
        words = {name + i: Word(*map(rng.choice, row)) for name, row in LEXICON.items() for i in ("", "2")}
        n, year = rng.randint(2, 90_000), rng.randint(1050, 1890)
        # 22 domy stały, but 25 domów stało: 2, 3, 4, 22, ... take the plural; 5, 12, ... its genitive
        few = n % 10 in (2, 3, 4) and n % 100 not in (12, 13, 14)
        words |= {"n": n, "year": year, "later": year + rng.randint(31, 99)}
        words |= zip(("past", "people", "homes"), ("y", "osoby", "domy") if few else ("o", "osób", "domów"))
        lines = rng.choice(ARTICLES).splitlines()
        sentences = [rng.choice(line.split(" | ")).format(**words) for line in lines]
        yield " ".join(s[0].upper() + s[1:] for s in sentences)


if __name__ == "__main__":
    run(main)
