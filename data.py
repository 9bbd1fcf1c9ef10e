"""Text -> tokens -> batches. Prepares data/NAME/ once; train.py then reads its uint16 token files.

    python data.py                                             # plwiki as in the report: 100,000 HIGH documents
    python data.py --dataset=mini                              # a small synthetic corpus, no download
    python data.py --dataset=novels --source=FILE --tokenizer=train     # your own .jsonl, .jsonl.zst or .txt
    python data.py --help

Knows nothing of models. Also holds what every script needs first: UserError and the --key=value parser.
"""
import dataclasses
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
import threading
import typing
from array import array
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

progress_bar = partial(tqdm, leave=False, mininterval=0.5 if sys.stderr.isatty() else 20)     # seldom in a log file
FORMAT_VERSION = 1      # of data/NAME/; raised when an older folder can no longer be read
SPLITS = ("train", "val", "test")


@dataclass
class DataConfig:
    dataset: str = "plwiki"         # name of the folder under data/: plwiki, mini, or your own with --source
    source: str = ""                # a local .jsonl, .jsonl.zst (SpeakLeash layout) or .txt file
    tokenizer: str = "speakleash/Bielik-4.5B-v3"    # a hub name, a folder, or train
    vocab_size: int = 32000         # entries of a trained tokenizer (--tokenizer=train); at most 65536
    n_docs: int = 0                 # documents to take, from the front; 0: all (plwiki: 100000, as the report)
    quality: typing.Literal["HIGH", "MEDIUM", "LOW", "ALL"] = "HIGH"    # documents without a label are kept
    seed: int = 1337                # decides which documents go to train, val and test; and mini's text

    def __post_init__(self):
        if not 512 <= self.vocab_size <= 65536:
            raise ValueError(f"vocab_size {self.vocab_size} must be 512 to 65536: a token is stored in 16 bits")


# What differs from the defaults above for the two datasets that need no --source.
PRESETS = {"plwiki": {"n_docs": 100_000}, "mini": {"tokenizer": "train", "vocab_size": 2048}}


# ----------------------------------------------------------------------------------------------------------
# The command line, for every script: dataclass fields are the keys, their trailing comments the help.

class UserError(SystemExit):
    """A mistake the user can mend. Raised anywhere, it ends the program with one line and exit code 1."""

    def __init__(self, message):
        super().__init__(f"error: {message}")


def parse_args(argv, doc, *classes):
    """['--key=value', ...] -> {key: value}, typed as the fields of the dataclasses; --help prints them.

    Raises UserError for an unknown key (the nearest is named), a malformed argument or a wrong value.
    """
    fields = {f.name: f for cls in classes for f in dataclasses.fields(cls)}
    if "--help" in argv or "-h" in argv:
        print(doc + "\nKeys, with their defaults:")
        for cls in classes:
            comments = dict(re.findall(r"^    (\w+): .*?  +# (.*)$", inspect.getsource(cls), re.M))
            print(f"\n{cls.__name__}")
            for f in dataclasses.fields(cls):
                print(f"  --{f.name}={f.default}".ljust(32), comments[f.name])
        sys.exit(0)
    values = {}
    for arg in argv:
        key, equals, text = arg.removeprefix("--").partition("=")
        if not arg.startswith("--") or not equals:
            raise UserError(f"{arg!r} is not of the form --key=value (see --help)")
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            raise UserError(f"unknown key --{key}" + (f", did you mean --{near[0]}?" if near else " (see --help)"))
        values[key] = _convert(key, text, fields[key].type)
    return values


def _convert(key, text, kind):
    choices = typing.get_args(kind)
    if kind is bool:
        choices = ("True", "False")
    if choices:
        text = text.capitalize() if text.capitalize() in choices else text     # true, false
        if text not in choices:
            raise UserError(f"--{key}={text}: must be one of {', '.join(choices)}")
        return text == "True" if kind is bool else text
    if kind is str:
        return text
    try:
        value = kind(text)
    except ValueError:
        raise UserError(f"--{key}={text}: must be {'a whole number' if kind is int else 'a number'}") from None
    if not 0 <= value < 2 ** 63:     # no key here means anything below zero; also refuses nan and inf
        raise UserError(f"--{key}={text}: must be a finite number, 0 or more")
    return value


def configure(cls, *layers):
    """cls(**keys), where a later layer {key: value} wins over an earlier one and keys of other classes are
    passed over. Raises UserError with the message of the ValueError by which cls refuses its values."""
    names = {f.name for f in dataclasses.fields(cls)}
    try:
        return cls(**{k: v for layer in layers for k, v in layer.items() if k in names})
    except ValueError as error:
        raise UserError(str(error)) from None


def run(main):
    """main(arguments) as a program. What is no mistake of the program's own ends it in one line: Ctrl-C, SIGTERM, a
    reader that went away (| head), a file or disk that fails, too little memory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # an exit like any other: temporary files are removed
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os._exit(0)
    except OSError as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate" not in str(error):
            raise
        sys.exit("error: out of memory: lower --batch_size, --block_size or --num_samples")


# ----------------------------------------------------------------------------------------------------------
# Documents: a local file, SpeakLeash's plwiki, or mini.

def read_documents(path, quality="ALL"):
    """Yield the text of each non-blank document of a .jsonl, .jsonl.zst or .txt file, with a progress bar.

    JSON lines are SpeakLeash's: {"text": ..., "meta": {"quality": ..., ...}}; meta may be missing. A .txt has
    no borders between documents: it is cut at line ends into pieces of about 2,000 characters.
    Raises UserError, which names the line, for anything else.
    """
    import zstandard
    path, n, found = Path(path), 0, False
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    if not path.name.endswith((".jsonl", ".jsonl.zst", ".txt")):
        raise UserError(f"{path}: the name must end in .jsonl, .jsonl.zst or .txt")
    file = open(path, "rb")
    stream = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    text = io.TextIOWrapper(stream if path.suffix == ".zst" else file, encoding="utf-8-sig", newline="")
    unit = "part" if path.suffix == ".txt" else "line"
    pieces = iter(lambda: "".join(text.readlines(2000)), "") if path.suffix == ".txt" else text
    with file, progress_bar(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as bar:
        try:
            for n, piece in enumerate(pieces, 1):
                bar.update(file.tell() - bar.n)
                if path.suffix != ".txt" and piece.strip():
                    record = json.loads(piece)
                    label = (record.get("meta") or {}).get("quality", quality)
                    piece = record["text"] if quality in ("ALL", label) else ""
                if piece.strip():
                    found = True
                    yield piece.encode("utf-8", "replace").decode()     # JSON can spell half a character
        except zstandard.ZstdError as error:
            raise UserError(f"{path} is not a zstd file, or a damaged one ({error})") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, after {unit} {n}: not UTF-8 ({error.reason})") from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(f'{path}, line {n}: not {{"text": "...", "meta": {{...}}}}') from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {n}: not JSON ({error})") from None
    if not found:
        raise UserError(f"{path} holds no document" + (f" of quality {quality}" if quality != "ALL" else ""))


def reachable(url, seconds=4):
    """True if any server answers at url within `seconds`. In a thread of its own, for a name lookup knows no
    time limit, and the clients below would retry for half a minute or wait for ever."""
    import requests
    answers = []

    def ask():
        try:
            answers.append(requests.head(url, timeout=seconds))
        except requests.RequestException:
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def fetch_plwiki(folder):
    """Download SpeakLeash's plwiki (870 MB) into folder, once; return the path of its .jsonl.zst."""
    from speakleash import Speakleash
    instead = "pass --source=FILE with a copy of plwiki.jsonl.zst, or use --dataset=mini"
    if not reachable(Speakleash.get_url("pl")):
        raise UserError(f"SpeakLeash cannot be reached: {instead}")
    try:
        dataset = Speakleash(str(folder)).get("plwiki")
        whole, path = dataset.check_file() if dataset else (False, "")
    except OSError as error:        # every exception of requests is one
        raise UserError(f"the download of plwiki broke off ({error}): run again, or {instead}") from None
    if not whole:
        raise UserError(f"SpeakLeash gave no whole plwiki: run again, or {instead}")
    return path


# ----------------------------------------------------------------------------------------------------------
# mini: a synthetic Polish encyclopaedia. Invented facts, real grammar: every noun is declined, every adjective,
# participle, past tense and numeral agrees, so that a model must learn endings and not a list of sentences.

CASES = ("nom", "gen", "dat", "acc", "ins", "loc")      # the cases an article uses: all but the vocative
# Genders: m, f, n; M for a man or an animal, whose accusative is the genitive; p for names that exist only in the plural.
ADJECTIVE = {"m": "y ego emu y ym ym", "M": "y ego emu ego ym ym", "f": "a ej ej ą ą ej", "n": "e ego emu e ym ym",
             "p": "e ych ym e ymi ych"}
PAST = {"m": "", "M": "", "f": "a", "n": "o", "p": "y"}     # był, była, było, były
TREES = ("dęb lip buk sosn jodł grab klon jawor cis brzoz olch wierzb jesion kalin malin wiśni topol akacj modrzewi "
         "jarzębin leszczyn orzech wiąz jałowc").split()
STEMS = [tree.capitalize() for tree in TREES] + ("Jan Adam Piotr Bogdan Wilk Sokoł Kruk Orł Bobr Lis Tur Bor Gaj Rak "
         "Stanisław Bolesław Mirosław Stefan Roman Julian Dzik Piask Chmiel Rad Borzym Zdzisław Kasztel").split()
# A row is a gender, a stem and the endings of six cases; "-" is no ending, and "+" a stem that is filled in.
TOWNS = ("m + ów owa owowi ów owem owie|m + owiec owca owcowi owiec owcem owcu|"
         "f + ówka ówki ówce ówkę ówką ówce|n + owo owa owu owo owem owie|"
         "p + owice owic owicom owice owicami owicach|f + owina owiny owinie owinę owiną owinie|"
         "n + owsko owska owsku owsko owskiem owsku")
SITES = ("f gór a y ze ę ą ze|m l as asu asowi as asem esie|m mo st stu stowi st stem ście|"
         "n pol e a u e em u|f dolin a y ie ę ą ie|m brzeg - u owi - iem u|m dw ór oru orowi ór orem orze|"
         "p łąk i - om i ami ach")
RIVERS = ("f + ówka ówki ówce ówkę ówką ówce|f + ownica ownicy ownicy ownicę ownicą ownicy|"
          "f + owianka owianki owiance owiankę owianką owiance")
LANDS = "f + owszczyzna owszczyzny owszczyźnie owszczyznę owszczyzną owszczyźnie"
BUILDINGS = ("m zam ek ku kowi ek kiem ku|m kości ół oła ołowi ół ołem ele|m młyn - a owi - em ie|"
             "f wież a y y ę ą y|m ratusz - a owi - em u|n muzeum - - - - - -|f bibliote ka ki ce kę ką ce|"
             "p mur y ów om y ami ach|n schronisk o a u o iem u|f latarni a - - ę ą -|f szko ła ły le łę łą le|"
             "m pałac - u owi - em u")
PLANTS = ("f mię ta ty cie tę tą cie|f róż a y y ę ą y|f koniczyn a y ie ę ą ie|f turzyc a y y ę ą y|"
          "m dzwon ek ka kowi ek kiem ku|m mak - u owi - iem u|m fioł ek ka kowi ek kiem ku|"
          "m pow ój oju ojowi ój ojem oju|n pros o a u o em ie|n ziel e a u e em u")
BIRDS = ("f sikor a y ze ę ą ze|f mew a y ie ę ą ie|f kacz ka ki ce kę ką ce|f czapl a i i ę ą i|"
         "f sow a y ie ę ą ie|f jaskół ka ki ce kę ką ce|M dro zd zda zdowi zda zdem ździe|"
         "M or zeł ła łowi ła łem le|M bocian - a owi a em ie")
EVENTS = ("f bitw a y ie ę ą ie|p targ i ów om i ami ach|m festyn - u owi - em ie|"
          "m zj azd azdu azdowi azd azdem eździe|f wystaw a y ie ę ą ie|n świę to ta tu to tem cie")
PLACES = "n miasto|f wieś|f osada|n miasteczko|m gród|f osada rybacka|f wieś letniskowa|n miasto portowe|n uzdrowisko"
PRAISE = "piękn star mał spokojn zielon słynn bogat cich urocz zadban zamożn gościnn malownicz wielk".split()
KINDS = ("leśn poln górsk błotn wodn pospolit drobn wonn czerwon biał żółt złot nadmorsk łąkow karpack mazursk dzik czarn "
         "srebrn jesienn wiosenn nocn północn skaln").split()
REGIONS = "śląsk mazowieck kujawsk pomorsk podlask łódzk lubelsk opolsk wielkopolsk małopolsk mazursk karkonosk".split()
MONTHS = "stycznia lutego marca kwietnia maja czerwca lipca sierpnia września października listopada grudnia".split()
CENTURIES = "XII XIII XIV XV XVI XVII XVIII XIX".split()
MEN = "Jan Adam Stefan Roman Julian Marian Stanisław Bolesław Wacław Mirosław Bogdan Damian Władysław Czesław".split()
WOMEN = "Ann Helen Iren Halin Janin Karolin Katarzyn Justyn Paulin Krystyn Regin Malwin Ewelin Sabin".split()
JOBS = ("malarz malarzem malarka malarką|pisarz pisarzem pisarka pisarką|lekarz lekarzem lekarka lekarką|nauczyciel "
        "nauczycielem nauczycielka nauczycielką|fotograf fotografem fotografka fotografką|botanik botanikiem botaniczka "
        "botaniczką|rzeźbiarz rzeźbiarzem rzeźbiarka rzeźbiarką|architekt architektem architektka architektką|śpiewak "
        "śpiewakiem śpiewaczka śpiewaczką|podróżnik podróżnikiem podróżniczka podróżniczką|poeta poetą poetka poetką")


class Word:
    """A noun or noun phrase: its gender and six cases. f"{word}" is the nominative, f"{word:gen}" the genitive."""

    def __init__(self, gender, forms):
        self.gender, self.forms = gender, list(forms)

    def __format__(self, case):
        return self.forms[CASES.index(case or "nom")]

    def __add__(self, other):           # both words decline
        return Word(self.gender, (f"{a} {b}" for a, b in zip(self.forms, other.forms)))

    def past(self, verb):               # został, została, zostało, zostały
        return verb + PAST[self.gender]

    def verb(self, singular, plural):   # leży, leżą
        return plural if self.gender == "p" else singular

    def adjective(self, stem):          # wielki, wielkiego: y and e soften after k and g
        soft = {"y": "i", "e": "ie"} if stem[-1] in "kg" else {}
        return Word(self.gender, (stem + soft.get(e[0], e[0]) + e[1:] for e in ADJECTIVE[self.gender].split()))


def is_few(n):
    """2, 3, 4, 22, ... take the plural; 5, 12, 25, ... the genitive plural and a singular verb."""
    return n % 10 in (2, 3, 4) and n % 100 not in (12, 13, 14)


def count(n, one, few, many):
    """Polish numerals: 1 rok, 2 lata, 5 lat."""
    return f"{n:,} {one if n == 1 else few if is_few(n) else many}".replace(",", " ")


def z(phrase):
    """The preposition z, which is ze before an awkward pair of consonants."""
    return ("ze " if phrase[0] in "SZŚ" and phrase[1] not in "aeiouyąęó" else "z ") + phrase


def write_mini(seed, n_docs=30_000):
    """Yield n_docs short articles; the same seed gives the same text."""
    rng = random.Random(seed)
    pick = rng.choice

    def noun(table, filled=""):
        gender, stem, *endings = pick(table.split("|")).split()
        return Word(gender, (stem.replace("+", filled) + e.strip("-") for e in endings))

    def town():
        if rng.random() < 0.2:          # Dębowa Góra
            site = noun(SITES)
            phrase = site.adjective(pick(TREES) + "ow") + site
            return Word(site.gender, map(str.title, phrase.forms))
        name = noun(TOWNS, pick(STEMS))
        if rng.random() < 0.4:          # Stare Bukowice
            return name.adjective(pick(["Now", "Star", "Wielk", "Mał", "Górn", "Doln"])) + name
        return name

    def person():
        gender, stem, endings = pick([("M", pick(MEN), ["", "a", "owi", "a", "em", "ie"]),
                                      ("f", pick(WOMEN), ["a", "y", "ie", "ę", "ą", "ie"])])
        first = Word(gender, (stem + e for e in endings))
        return first + first.adjective(pick(STEMS) + "owsk")

    def river():
        return noun(RIVERS, pick(STEMS))

    def species(table=PLANTS + "|" + BIRDS):
        name = noun(table)
        return name + name.adjective(pick(KINDS))

    def building():
        name = noun(BUILDINGS)
        return name.adjective(pick(PRAISE)) + name

    def job(who, case):
        forms = pick(JOBS.split("|")).split()
        return forms[2 * (who.gender == "f") + (case == "ins")]

    def what(table):                    # piękne miasto, cicha wieś
        gender, name = pick(table.split("|")).split(" ", 1)
        return f"{Word(gender, []).adjective(pick(PRAISE))} {name}"

    def region():
        return f"w województwie {Word('n', []).adjective(pick(REGIONS)):loc}"

    def year(first=1050, last=1990):
        return f"{rng.randint(first, last)} roku"

    def date(*years):
        return f"{rng.randint(1, 28)} {pick(MONTHS)} {year(*years)}"

    # An article is a list of slots; each slot offers a few sentences, of which one is taken.
    def about_town():
        t, x, y, who, b, n = town(), town(), town(), person(), building(), rng.randint(2, 90000)
        return [[f"{t} to {what(PLACES)} {region()}.", f"{t} – {what(PLACES)} nad {river():ins}."],
                [f"W {year()} {'mieszkały' if is_few(n) else 'mieszkało'} tam {count(n, 'osoba', 'osoby', 'osób')}.",
                 f"{t} {t.verb('liczy', 'liczą')} {count(n, 'dom', 'domy', 'domów')}."],
                [f"Pierwsza wzmianka o {t:loc} pochodzi z {year()}.",
                 f"{t} {t.past('otrzymał')} prawa miejskie w {year()}.",
                 f"W {pick(CENTURIES)} wieku {t} {t.past('należał')} do {person():gen}."],
                [f"Droga prowadzi stąd do {x:gen} przez {y:acc}.",
                 f"Mieszkańcy {x:gen} pomogli {t:dat} po pożarze.",
                 f"{t} {t.verb('sąsiaduje', 'sąsiadują')} {z(f'{x:ins}')}."],
                [f"W {t:loc} {b.verb('znajduje', 'znajdują')} się {b} z {pick(CENTURIES)} wieku.",
                 f"Podróżni chwalą {b:acc}."],
                [f"Tutaj {who.past('urodził')} się {job(who, 'nom')} {who}.", f"Rośnie tu {species(PLANTS)}."]]

    def about_land():
        t, x, who = noun(LANDS, pick(STEMS)), town(), person()
        return [[f"{t} to {what('m kraj|f kraina|m region|f ziemia')}."],
                [f"Przez {t:acc} płynie {river()}.", f"{z(f'{t:gen}')} {who.past('pochodził')} {who}."],
                [f"Stolicą {t:gen} {x.verb('jest', 'są')} {x}.", f"W {t:loc} {x.verb('leży', 'leżą')} {x}."],
                [f"Żyje tam {species(BIRDS)}, a na łąkach rośnie {species(PLANTS)}.",
                 f"O {t:loc} {who.past('pisał')} {who}."],
                [f"Dawniej {t} należała do {town():gen}.",
                 f"Wiosną {t} słynie z {pick(['kwiatów', 'targów', 'pieśni', 'miodu', 'lnu'])}."]]

    def about_person():
        p, q, t, n, born = person(), person(), town(), rng.randint(31, 99), rng.randint(1050, 1890)
        return [[f"{p} – {p.adjective('polsk')} {job(p, 'nom')}.", f"{p} {p.past('był')} {job(p, 'ins')}."],
                [f"{p.past('Urodził')} się {date(born, born)} w {t:loc}.", f"{p.past('Pochodził')} {z(f'{t:gen}')}."],
                [f"W {year(born + 15, born + 30)} {p.past('wyjechał')} do {town():gen}.",
                 f"{p.past('Studiował')} w {town():loc}, gdzie {p.past('poznał')} {q:acc}."],
                [f"Przez wiele lat {p.past('przyjaźnił')} się {z(f'{q:ins}')}.",
                 f"List do {p:gen} {q.past('napisał')} {q}.", f"{q} {q.past('poświęcił')} {p:dat} książkę."],
                [f"{p.past('Opisał')} {species():acc}.", f"{p.past('Interesował')} się {species():ins}.",
                 f"{p.past('Namalował')} {t:acc}."],
                [f"{p.past('Zmarł')} {date(born + n, born + n)}.",
                 f"{p.past('Przeżył')} {count(n, 'rok', 'lata', 'lat')}."]]

    def about_river():
        r, x, t, n = river(), river(), town(), rng.randint(3, 400)
        return [[f"{r} to rzeka {region()}, dopływ {x:gen}.", f"{r} to {what('f rzeka')}, która wpada do {x:gen}."],
                [f"Ma {count(n, 'kilometr', 'kilometry', 'kilometrów')} długości."],
                [f"Wypływa koło {t:gen}.", f"Nad {r:ins} {t.verb('leży', 'leżą')} {t}."],
                [f"Płynie przez {town():acc}.", f"Za {town():ins} przyjmuje wody {river():gen}."],
                [f"W dolinie {r:gen} można spotkać {species():acc}.", f"Most na {r:loc} zbudowano w {year()}."]]

    def about_species():
        table = pick([PLANTS, BIRDS])
        s, other, who, n, t = species(table), species(table), person(), rng.randint(2, 90), town()
        return [[f"{s} to gatunek, który {who.past('opisał')} {who}.", f"{s} występuje nad {river():ins}."],
                [f"W {year()} naliczono w {t:loc} {count(n, 'okaz', 'okazy', 'okazów')}."],
                [f"Pierwszy opis {s:gen} powstał w {t:loc}.", f"O {s:loc} opowiada się w {t:loc} wiele legend.",
                 f"{s} {s.past('został')} {s.adjective('objęt')} ochroną w {year()}."],
                [f"W herbie {t:gen} można zobaczyć {s:acc}.", f"Łatwo pomylić {s:acc} {z(f'{other:ins}')}.",
                 f"{s} jest {s.adjective('podobn')} do {other:gen}."]]

    def about_building():
        b, t, who = building(), town(), person()
        return [[f"{b} w {t:loc} {b.verb('pochodzi', 'pochodzą')} z {pick(CENTURIES)} wieku.",
                 f"{b} w {t:loc} {b.past('został')} {b.adjective('zbudowan')} w {year()}."],
                [f"Pieniądze na {b:acc} {who.past('dał')} {who}.", f"Plany {b:gen} {who.past('narysował')} {who}."],
                [f"Obok {b:gen} rośnie {species(PLANTS)}.", f"Przed {b:ins} gniazduje {species(BIRDS)}."],
                [f"O {b:loc} wspomina list {z(f'{town():gen}')}.", 
                 f"Dzięki {b:dat} {t} {t.past('stał')} się {t.adjective('sławn')}.",
                 f"Wielu turystów podziwia {b:acc}."]]

    def about_event():
        e, t, who, n = noun(EVENTS), town(), person(), rng.randint(2, 9000)
        return [[f"{e} w {t:loc} {e.past('odbył')} się {date()}."],
                [f"W {e:loc} {who.past('wziął') if who.gender == 'M' else 'wzięła'} udział {who}.",
                 f"Po {e:loc} zbudowano {building():acc}."],
                [f"Przed {e:ins} przyjechało {count(n * 10, '', '', 'gości')} {z(f'{town():gen}')}."],
                [f"Pamięć o {e:loc} trwa do dziś.", f"Dzięki {e:dat} świat poznał {t:acc}."]]

    kinds = [about_town, about_town, about_person, about_person, about_river, about_species, about_building,
             about_land, about_event]
    for _ in range(n_docs):
        first, *rest = pick(kinds)()
        slots = [first] + [slot for slot in rest if rng.random() < 0.85]
        sentences = [pick(slot) for slot in slots]
        yield " ".join(s[0].upper() + s[1:] for s in sentences)


# ----------------------------------------------------------------------------------------------------------
# Tokenizers. transformers takes seconds to import, so only the functions that need it do.

def train_tokenizer(texts, vocab_size):
    """Learn a Llama-style BPE (Sennrich et al. 2016) of vocab_size entries from an iterable of texts.

    <unk>, <s>, </s>, then 256 byte tokens to which any unseen character falls back, then the merges. A space is
    the mark ▁ at the front of a word; decoding gives the text back unchanged. The vocabulary is learned from
    all splits: it only fixes the units, which both models share.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    first = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]

    def tokenizer(vocab, merges):
        tok = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        # merges stay within a word, a run of signs (both of at most 50: a megabyte without a space must not be one), or a digit
        words = Regex(r"▁?\p{L}{1,50}|▁?[^\p{L}\p{N}\s▁]{1,50}|\p{N}|\s|▁{1,50}")
        tok.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
        return tok

    def sample():       # the trainer keeps every distinct word in memory; more text would hardly change the merges
        size = 0
        for part in itertools.chain.from_iterable(map(cut, texts)):
            yield part
            size += len(part)
            if size > 50_000_000:
                return

    draft = tokenizer({}, [])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(first), min_frequency=2,
                                  limit_alphabet=min(1000, vocab_size - len(first)))
    draft.train_from_iterator(sample(), trainer)
    learned = json.loads(draft.to_str())["model"]
    by_id = sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {token: i for i, token in enumerate(first + [t for t in by_id if t not in first])}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(vocab, [tuple(m) for m in learned["merges"]]),
                                   unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def load_tokenizer(name):
    """The tokenizer of a folder or a hub name; without a network, from the hub's local cache. Never runs code from
    there. Raises UserError that says what to type instead."""
    instead = "pass --tokenizer=FOLDER or --tokenizer=train, or use --dataset=mini"
    local = Path(name).is_dir()
    offline = local or not reachable(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if offline:     # set before the import, or the hub's client would wait and retry
        os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer
    try:
        tok = AutoTokenizer.from_pretrained(name, local_files_only=offline, trust_remote_code=False)
    except Exception as error:      # a damaged or foreign file can raise anything
        if offline and not local:
            raise UserError(f"the tokenizer {name!r} is not on this machine and the hub cannot be reached: "
                            f"{instead}") from None
        reason = str(error).strip().split("\n")[0]
        advice = "" if local else " Log in (`hf auth login`) and accept its licence on the hub, or"
        raise UserError(f"cannot load the tokenizer {name!r} ({reason}).{advice} {instead}") from None
    if tok.bos_token_id is None or tok.eos_token_id is None:
        raise UserError(f"the tokenizer {name!r} has no <s> and </s>")
    if len(tok) > 65536:
        raise UserError(f"the tokenizer {name!r} has {len(tok):,} entries; a token is stored in 16 bits, so 65536 "
                        "is the most")
    return tok


def encode(tok, texts):
    """Token ids of each text, without <s> and </s>; such marks inside a text are ordinary characters."""
    return tok(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"]


# ----------------------------------------------------------------------------------------------------------
# Preparation: documents -> data/NAME/{train,val,test}.bin, meta.json, tokenizer/

def cut(text, most=100_000):
    """Yield text in parts of at most so many characters: a tokenizer needs some 200 bytes of memory for each character of
    a text. A cut takes the place of a space, for which the ▁ at the front of the next part will stand (a tokenizer that
    puts none there loses that space)."""
    start = 0
    while len(text) - start > most:
        end = text.rfind(" ", start + most // 2, start + most)
        yield text[start:start + most if end < 0 else end]
        start = start + most if end < 0 else end + 1
    yield text[start:]


def in_batches(texts, characters=500_000):
    """Lists of (number of the text, a part of it), about that many characters together: what is held in memory at once."""
    batch, size = [], 0
    for n, text in enumerate(texts):
        for part in cut(text):
            batch.append((n, part))
            size += len(part)
            if size >= characters:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def assign_splits(hashes):
    """Hash of each document (uint64) -> its split (0 train, 1 val, 2 test), or -1 for all but the first of
    identical documents. Ranked by hash, the lowest tenth is val and the next is test: a document's split
    depends on seed and text, never on the order or speed of the workers."""
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    is_first = np.append(True, ranked[1:] != ranked[:-1])
    del ranked                          # 5 GB can hold 16 million short documents, 130 MB of hashes
    first = order[is_first]
    if len(first) < 3:
        raise UserError(f"{len(first)} different documents cannot be split into train, val and test")
    tenth = max(1, round(len(first) / 10))
    split = np.full(len(hashes), -1, dtype=np.int8)
    split[first] = 0
    split[first[:tenth]], split[first[tenth:2 * tenth]] = 1, 2
    return split


def dataset_folder(name):
    """data/name. Raises UserError for a name that could lead out of data/."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UserError(f"--dataset={name}: a name of letters, digits, '.', '_' and '-'")
    return Path("data") / name


def prepare(config):
    """Write data/NAME/ as the DataConfig says. It appears whole or not at all; an older one is replaced."""
    target = dataset_folder(config.dataset)
    source, trained = config.source, config.tokenizer == "train"
    names = {p.name for p in target.iterdir()} if target.exists() else set()
    yours = names - ({"meta.json", "tokenizer", ".DS_Store", *(f"{s}.bin" for s in SPLITS)} if "meta.json" in names else set())
    if yours:
        raise UserError(f"{target} holds {min(yours)}, and would be replaced: move it away, or choose another --dataset name")
    if not source and config.dataset not in PRESETS:
        raise UserError(f"--dataset={config.dataset} needs --source=FILE (.jsonl, .jsonl.zst or .txt)")
    tok = None if trained else load_tokenizer(config.tokenizer)     # fails in seconds, before any download
    if not source and config.dataset == "plwiki":
        source = fetch_plwiki(target.parent / "speakleash")

    def documents():
        texts = read_documents(source, config.quality) if source else write_mini(config.seed)
        return itertools.islice(texts, config.n_docs or None)

    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{config.dataset}-") as scratch:
        if trained:
            print(f"training a tokenizer of {config.vocab_size:,} entries")
            tok = train_tokenizer(documents(), config.vocab_size)
        new, raw = Path(scratch) / "new", Path(scratch) / "tokens"
        new.mkdir()
        try:
            tok.save_pretrained(new / "tokenizer")
        except Exception as error:      # its own kind of exception, where the disk is full
            raise UserError(f"cannot write the tokenizer ({error})") from None

        # All documents go to one file; where each goes from there is known only after the last.
        hashes, lengths = array("Q"), array("I")

        def hashed():
            for text in documents():
                key = hashlib.blake2b(text.encode(), digest_size=8, salt=config.seed.to_bytes(8, "little"))
                hashes.append(int.from_bytes(key.digest(), "little"))
                lengths.append(0)
                yield text

        with open(raw, "wb") as out:
            for batch in in_batches(hashed()):
                for (d, _), ids in zip(batch, encode(tok, [part for _, part in batch])):
                    out.write(np.array(ids, dtype="<u2").tobytes())
                    lengths[d] += len(ids)
        bos, eos = np.array([tok.bos_token_id, tok.eos_token_id], dtype="<u2")
        split, starts, splits = assign_splits(np.frombuffer(hashes, np.uint64)), np.cumsum(lengths) - lengths, {}
        for k, name in enumerate(SPLITS):
            digest, members = hashlib.sha256(), np.flatnonzero(split == k)
            with open(raw, "rb") as tokens, open(new / f"{name}.bin", "wb") as out:
                for d in members:
                    tokens.seek(2 * int(starts[d]))
                    piece = bos.tobytes() + tokens.read(2 * lengths[d]) + eos.tobytes()
                    digest.update(piece)
                    out.write(piece)
                splits[name] = {"documents": len(members), "tokens": out.tell() // 2, "sha256": digest.hexdigest()}
        meta = {"format_version": FORMAT_VERSION, "dataset": config.dataset, "source": source or config.dataset,
                "quality": config.quality, "seed": config.seed, "tokenizer": config.tokenizer,
                "vocab_size": len(tok), "splits": splits}
        (new / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False), encoding="utf-8")
        old = Path(scratch) / "old"
        try:
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:           # a Ctrl-C between the two, also
            if old.exists() and not target.exists():
                old.rename(target)
            raise
    for name, s in splits.items():
        print(f"{target}/{name}.bin: {s['documents']:,} documents, {s['tokens']:,} tokens")
    return meta


# ----------------------------------------------------------------------------------------------------------
# Loading: data/NAME/ -> token memmaps -> batches

def load_dataset(name):
    """-> meta.json as a dict, and {"train" | "val" | "test": uint16 memmap}. Raises UserError when the folder is
    missing, or when a file is not the one that meta.json describes."""
    folder = dataset_folder(name)
    if not (folder / "meta.json").is_file():
        source = "" if name in PRESETS else " --source=FILE"
        raise UserError(f"{folder} is not prepared: run `python data.py --dataset={name}{source}` first")
    splits = {}
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {meta['format_version']}, this code reads {FORMAT_VERSION}")
        if type(meta["vocab_size"]) is not int or not 0 < meta["vocab_size"] <= 65536:
            raise ValueError("vocab_size is not 1 to 65536")
        for split in SPLITS:
            tokens = splits[split] = np.memmap(folder / f"{split}.bin", dtype="<u2", mode="r")
            facts = {"tokens": len(tokens), "sha256": hashlib.sha256(tokens).hexdigest()}
            if facts.items() - meta["splits"][split].items():
                raise ValueError(f"{split}.bin is not the file that was prepared")
            if tokens.max() >= meta["vocab_size"]:
                raise ValueError(f"{split}.bin holds a token id above the vocabulary of {meta['vocab_size']}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}): prepare it again") from None
    return meta, splits


def n_windows(tokens, block_size):
    """How many windows of block_size + 1 tokens a split holds; neighbours share one token, which is the last
    target of one and the first input of the next, so that each token is predicted once."""
    return (len(tokens) - 1) // block_size


@lru_cache(maxsize=2)       # two, because one batch can end an epoch and begin the next
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def train_windows(n, step, batch_size, seed, rank=0, world_size=1):
    """Which of n windows are the batch of a step: consecutive entries of one permutation per epoch, so that none
    comes twice in an epoch. A pure function of its arguments: any step can be replayed. Each rank gets its equal
    part of the same batch."""
    part = batch_size // world_size
    positions = step * batch_size + rank * part + np.arange(part)
    return [_permutation(n, seed, int(p // n))[p % n] for p in positions]


def get_batch(tokens, windows, block_size, device):
    """Windows by number -> idx and targets (B, T) int64 on device, targets[:, t] being the token after idx[:, t]."""
    rows = np.stack([tokens[w * block_size:(w + 1) * block_size + 1] for w in map(int, windows)])
    batch = torch.from_numpy(rows.astype(np.int64))
    if torch.device(device).type == "cuda":     # from pinned memory the copy runs beside the computation
        batch = batch.pin_memory().to(device, non_blocking=True)
    else:
        batch = batch.to(device)
    return batch[:, :-1], batch[:, 1:]


def main(argv):
    keys = parse_args(argv, __doc__, DataConfig)
    prepare(configure(DataConfig, PRESETS.get(keys.get("dataset", DataConfig.dataset), {}), keys))


if __name__ == "__main__":
    run(main)
