"""sample.py - images out: the student in one step (Eq. 4), the teacher in T.

    python sample.py --class 207                                           the student of the newest run, one step, a grid as PNG
    python sample.py --class "red circle" --n 64
    python sample.py --prompt "two red circles"                            of a run with captions: scenes, laion
    python sample.py --class 207 --teacher --steps 16                      the teacher of the newest run, or the public one if there is no run
    python sample.py --class 207 --teacher --steps 8 --dataset imagenet    the public one in any case
    python sample.py --class 207 --student pytorch_model.bin --init-mask 0.6       a MaskGIT student of others (Di[M]O), no run needed

Image i depends on the seed and on i alone, not on the batch size (every image has its own random generator).
train.py draws its sample sheets and evaluate.py its thousands of images with the functions below.
Also here, what the commands share: networks and runs on disk (load_run, save, write_json), one process for each GPU (launch), tables as text
(text_table), time and memory (Stopwatch, bench).
"""
import argparse
import copy
import dataclasses
import itertools
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import types
import zipfile
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import fpd
from models import (CLIP_FILE, CLIP_REPO, Backbone, ConvNet, MaskGen, MaskGIT, TextEncoder, Words, find_weights, imagenet_names, load_maskgen,
                    load_maskgit, load_text_encoder)
from tokenizer import SUFFIXES, VQGAN, TATiTok, load_strictly, load_tatitok, load_vqgan, read_image, read_weights, to_uint8

FORMAT = 2                                                                       # of checkpoint.pt
# The paper's public networks on the Hugging Face hub: repository, file, loader
OFFICIAL = {"imagenet": {"tokenizer": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/VQGAN/last.ckpt", load_vqgan),
                         "teacher": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth", load_maskgit)},
            "laion": {"tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors", load_tatitok),
                      "teacher": ("turkeyju/generator_maskgen_vq_l", "model.safetensors", load_maskgen),
                      "text": (CLIP_REPO, CLIP_FILE, load_text_encoder)}}
PARTS = (VQGAN, TATiTok, MaskGIT, MaskGen, ConvNet, Backbone, Words, TextEncoder)    # what a prepared network can be
# What is drawn of the public MaskGen when nobody says what
CAPTIONS = ["a photo of a dog", "a red car next to a blue house", "three green apples on a wooden table", "a lighthouse at sunset",
            "a bowl of soup", "a small boat on a lake in the mountains", "an astronaut riding a horse", "a yellow bird above a white fence"]
# How the public networks are sampled where no run says it. MaskGIT: the teacher with the settings that Di[M]O's code has for it (their w = 3
# is our guidance 4), a student with Di[M]O's share of masked tokens. MaskGen: its authors' configuration (their guidance 12 is our 13)
PUBLIC = {"imagenet": dict(guidance=4.0, confidence_noise=4.5, init_mask=0.6, temperature=1.0),
          "laion": dict(guidance=13.0, confidence_noise=2.0, init_mask=0.6, temperature=1.0)}


# ------------------------------------------------------------------------------------------------ networks from disk
def frozen(network, device):
    return network.to(device).eval().requires_grad_(False)


def fill(network, state, what):
    """A network of ours gets the weights that we saved for it. ValueError in one line unless keys and shapes are its own and all values finite."""
    return load_strictly(network, read_weights(state, what), what)


def load_part(path, device):
    """One prepared network (train.py, `cached`): rebuilt from the name of its class and its own arguments, frozen."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        part, state = {cls.__name__: cls for cls in PARTS}[saved["cls"]](**saved["args"]), saved["state"]
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path}, which train.py prepared for this run, cannot be read ({type(error).__name__}): without it, train.py "
                         "prepares it anew") from error
    return frozen(fill(part, state, str(path)), device)


def official_files(dataset, teacher, given):
    """The official networks that draw images -> {part: function that finds its file}, for `find_all`: the user's own, else weights/, else the hub.

    teacher: is it needed?   given: {part: the user's own file}
    """
    def find(part):
        repo, file, _ = OFFICIAL[dataset][part]
        return find_weights(part, given.get(part), file, repo, f"{repo.split('/')[1]}.safetensors" if file.endswith(".safetensors") else None)
    if given.get("text") and "text" not in OFFICIAL[dataset]:
        raise ValueError(f"--text-weights goes with --dataset laion: there is no text in {dataset}")
    return {part: partial(find, part) for part in OFFICIAL[dataset] if teacher or part != "teacher"}


def load_official(r, dataset, files, device, student=None):
    """Official networks into the namespace r: tokenizer, teacher and text as far as there are files, and student, a file or a state dict.

    None where there is none. ValueError when one cannot be read or they do not belong together
    """
    def load(part, src):
        return frozen(OFFICIAL[dataset][part][2](src), device)
    r.tokenizer = load("tokenizer", files["tokenizer"])
    r.tokenizer.encoder = None                                                   # nothing is encoded: 0.8 GB less of TA-TiTok
    r.teacher = load("teacher", files["teacher"]) if "teacher" in files else None
    r.student = load("teacher", student) if student else None
    r.text = load("text", files["text"]) if "text" in files else None
    K, L = r.tokenizer.K, r.tokenizer.L
    for model in filter(None, (r.student, r.teacher)):
        if (model.K, model.L) != (K, L):
            raise ValueError(f"the transformer answers with {model.L} tokens of {model.K} codes, the tokenizer has {L} of {K}")
        set_text(r.text, model)
    return r


def set_text(text, model):
    """Give a transformer the encoding of the empty caption, which stands for "no condition". text None: it is not of text; nothing to do"""
    if text:
        model.empty.copy_(text.encode([""])[0, :len(model.empty)])


def find_all(finders):
    """{part: function without arguments} -> {part: its result}. One ValueError, with a line for each part that is missing."""
    found, missing = {}, []
    for part, find in finders.items():
        try:
            found[part] = find()
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError("\n".join(missing))
    return found


# ------------------------------------------------------------------------------------------------ runs on disk
def newest_run(runs="runs"):
    """The run whose checkpoint is the newest. ValueError when there is none."""
    found = sorted(filter(Path.is_file, Path(runs).glob("*/checkpoint.pt")), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no checkpoint in {runs}/*/ yet: train one with `python train.py` (add --smoke for a quick trial)")
    return found[-1].parent


def run_folder(cfg):
    """runs/<name>: the one to resume, or a new one. A finished or foreign run is never written into."""
    runs = Path("runs")
    name = cfg.dataset + (f"-{cfg.method}" if cfg.method != "fpd" else "") + ("-anywhere" if cfg.anywhere else "") + ("-smoke" if cfg.smoke else "")
    if cfg.ablations:
        return runs / f"ablations-{name}{'-' if cfg.name else ''}{cfg.name}"     # goes on by itself, see train.ablate
    if cfg.resume:
        folder = runs / cfg.name if cfg.name else newest_run(runs)
        if not (folder / "checkpoint.pt").is_file():
            raise ValueError(f"--resume: there is no {folder / 'checkpoint.pt'}")
        return folder
    if cfg.name:
        if Path(cfg.name).name != cfg.name or cfg.name in ("..", "prepared"):
            raise ValueError(f"--name {cfg.name} cannot be the name of a folder in runs/; choose another")
        begun = {".config.json", "config.json", "samples", "checkpoint.pt.tmp"}      # what a run leaves that was killed before its first save
        if {path.name for path in (runs / cfg.name).glob("*")} - begun:
            raise ValueError(f"runs/{cfg.name} exists already: add --resume to go on with it, or choose another --name")
        return runs / cfg.name
    numbered = (runs / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in numbered if not folder.exists())


def read_checkpoint(run):
    """runs/<name> -> what train.py saved there. Weights are mapped, not read: asking for the configuration alone costs nothing."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {run} is not a run, or has not saved yet")
    kinds = dict(format=int, config=dict, names=list, parts=dict, student=dict, ema=dict, opt=dict, rng=torch.Tensor, step=int)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        wrong, made = [key for key, kind in kinds.items() if not isinstance(saved.get(key), kind)], saved.get("format")
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is cut short, or another program's") from error
    if isinstance(made, int) and made != FORMAT:                                 # first: another format may have other keys
        raise ValueError(f"{path} has format {made}, {'newer' if made > FORMAT else 'older'} than {FORMAT}, which this program reads; it was "
                         f"made with git revision {saved.get('versions', {}).get('git', 'unknown')}")
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: {', '.join(wrong)} should be in it")
    return saved


def load_run(run, device, teacher=True, given=None):
    """runs/<name> -> namespace of cfg, names, step, tokenizer, teacher, phi, judge, text (None where there is none), student (its EMA).

    names     of the classes; of a run with captions, those of its sheets
    teacher   False: not needed, so that an official teacher's file need not be there
    given     {"tokenizer": FILE, "teacher": FILE, "text": FILE}: where official files are now, if not where the run found them
    """
    saved, given = read_checkpoint(run), given or {}
    cfg, parts = types.SimpleNamespace(**saved["config"]), saved["parts"]
    r = types.SimpleNamespace(cfg=cfg, names=saved["names"], step=saved["step"], teacher=None, phi=None, judge=None, text=None)
    if cfg.dataset in OFFICIAL and not cfg.smoke:
        found = {part: path for part, path in parts.items() if Path(path).is_file()}
        return load_official(r, cfg.dataset, find_all(official_files(cfg.dataset, teacher, found | given)), device, saved["ema"])
    if given:
        raise ValueError(f"--{min(given)}-weights is for imagenet and laion, and {run} is a run of {cfg.dataset}{', smoke' * cfg.smoke}")
    for part, path in parts.items():
        setattr(r, part, load_part(path, device))
    set_text(r.text, r.teacher)
    r.student = fill(copy.deepcopy(r.teacher), saved["ema"], f"{run}/checkpoint.pt")   # same architecture, other weights
    return r


def load_public(dataset, student_file, teacher, given, init_mask, device):
    """The public networks, without any run -> namespace like load_run's; step None, no student unless its file is named."""
    files = find_all(official_files(dataset, teacher, given))
    cfg = types.SimpleNamespace(**PUBLIC[dataset], dataset=dataset, smoke=False)
    cfg.init_mask = cfg.init_mask if init_mask is None else init_mask
    r = types.SimpleNamespace(cfg=cfg, names=imagenet_names() if dataset == "imagenet" else CAPTIONS, step=None, phi=None, judge=None)
    return load_official(r, dataset, files, device, student_file)


# ------------------------------------------------------------------------------------------------ stopping and going on
@contextmanager
def ctrl_c():
    """with ctrl_c() as pressed: Ctrl-C only fills that list, so that the step under way is finished and what is saved is whole.

    A second Ctrl-C does not wait. One that came too late for the loop stops the program where the block ends.
    """
    pressed, before = [], signal.getsignal(signal.SIGINT)

    def note(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def tensors(content):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(content):
        yield content
    elif isinstance(content, (dict, list)):
        for x in content.values() if isinstance(content, dict) else content:
            yield from tensors(x)


def save(path, content):
    """Whole, finite and readable, or not at all: only what was forced to the disk and read back takes the old file's place. OSError"""
    path, new = Path(path), Path(f"{path}.tmp")
    if not all(torch.isfinite(t).all() for t in tensors(content)):
        raise ValueError(f"{path} would have held numbers that are NaN or infinite; it was left as it is")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(new, map_location="cpu", weights_only=True, mmap=True)
        with zipfile.ZipFile(new) as written:                                    # torch.load does not look at the checksums
            if written.testzip():
                raise OSError("what was written cannot be read back")
        os.replace(new, path)
    except Exception as error:
        raise OSError(f"{path} could not be written, and was left as it is: {str(error).splitlines()[0]}") from error
    finally:
        new.unlink(missing_ok=True)


def write_whole(path, write):
    """write(path), but whole or not at all: to a file beside it, ".<name>", which then takes its place."""
    path = Path(path)
    new = path.with_name(f".{path.name}")                                        # by the suffix PIL knows the format, and GenEval's scorer images
    write(new)
    os.replace(new, path)


def write_json(path, content):
    """What JSON can hold, whole or not at all."""
    write_whole(path, lambda new: new.write_text(json.dumps(content, indent=1)))


def versions():
    """What a checkpoint was made with: python, torch, numpy and the git revision, "-dirty" if changed since, "unknown" outside of git."""
    git = subprocess.run("git --no-optional-locks describe --always --dirty --abbrev=40 --exclude='*'", shell=True, cwd=Path(__file__).parent,
                         capture_output=True, text=True).stdout.strip()
    return dict(python=platform.python_version(), torch=str(torch.__version__), numpy=version("numpy"), git=git or "unknown")


def check_finite(recent, stage, good):
    """ValueError with the first step and term that is NaN or infinite. recent: list of (step, {term: number}), emptied when all is well

    stage   of the run, in words;   good: the file where its last good state would be
    """
    for step, terms in recent:
        for term, value in terms.items():
            if not math.isfinite(value):
                last = f"{good}, step {torch.load(good, weights_only=True, mmap=True)['step']}" if Path(good).exists() else "there is none yet"
                raise ValueError(f"{stage}: {term} is {float(value)} at step {step}; the last good checkpoint: {last}")
    recent.clear()


# ------------------------------------------------------------------------------------------------ several processes, one for each GPU
# Each draws its own conditions and drafts, and compares them among themselves alone: drafts of different classes never meet in the drift
# anyway (per_class), and DistributedDataParallel's mean of the gradients is that of the mean of the losses. Only two numbers are of a
# process's own batch that would be of all drafts in one large batch: the unit of distance and the RMS of the drift.
def launch(main, n):
    """`n` processes of a program's `main` on this machine; ends as they end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.start_processes(worker, (main, n, port), n, join=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                                 # Ctrl-C reaches them without us
    try:
        while not processes.join():
            pass
    except mp.ProcessExitedException as stop:                                    # it has said why
        sys.exit(stop.exit_code)


def worker(rank, main, n, port):
    """Process `rank` of `launch`, with the environment that torchrun would give it."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        run_command(main)
    except KeyboardInterrupt:
        sys.exit(130)


def ranks():
    """-> the rank of this process, 0 when it is alone, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def meet(device):
    """Join the processes that `launch` or torchrun started, if any. -> this one's rank. Only rank 0 speaks and writes."""
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))                 # "cuda" is this one from now on
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(hours=1))
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.SIG_IGN)                             # rank 0 decides
    return ranks()[0]


def any_of_all(flag):
    """Does any process say so? Waits for all of them; on the host, so that no GPU has to wait."""
    if dist.is_initialized():
        flag = torch.tensor(int(bool(flag)))
        try:
            dist.all_reduce(flag)
        except RuntimeError:                                                     # one of them has failed, and said why; now we are ended, too
            time.sleep(60)
            sys.exit(1)
    return bool(flag)


def gather(x):
    """[x of rank 0, x of rank 1, ...]"""
    everything = [x] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(everything, x)
    return everything


# ------------------------------------------------------------------------------------------------ images
@torch.no_grad()
def batches(model, tokenizer, c, cfg, steps, seed=0, batch=60, progress=None, spent=None):
    """Images for the conditions c (N, ...), one batch (B, 3, H, W) uint8 on the CPU after the other. steps = 0: the student's single pass.

    spent: a list that gets the seconds of each batch
    """
    device = tokenizer.E.device
    for start in tqdm(range(0, len(c), batch), progress, leave=False, disable=progress is None):
        begin, part = time.perf_counter(), c[start:start + batch].to(device)
        z = fpd.tokens(model, part, fpd.generators(seed, start, len(part), device), cfg, steps)
        images = to_uint8(tokenizer.decode(tokenizer.E[z], part)).cpu()
        if spent is not None:
            spent.append(time.perf_counter() - begin)
        yield images


def generate(*args, **kwargs):
    """All images of `batches` at once, (N, 3, H, W) uint8 on the CPU."""
    return torch.cat(list(batches(*args, **kwargs)))


def shown(run):
    """The conditions of every sheet, always the same: of captions, all that the run keeps; of classes, some, spread over them; of
    ImageNet, eight that papers show. -> c (n, ...), n captions, n <= 12"""
    if run.text:
        return run.text.encode(run.names), run.names
    n_classes = len(run.names)
    n = min(12, n_classes)
    c = (torch.arange(n) * n_classes // n + torch.arange(n) // 2 % 2) % n_classes       # all shapes and colours of the shapes world
    if n_classes == 1000:
        c = torch.tensor([207, 360, 387, 974, 88, 979, 417, 279])                # golden retriever, otter, lesser panda, geyser, macaw, ...
    return c, [run.names[i] for i in c]


def models_of(run, steps):
    """The rows of a table -> [(name, network, its steps; 0: the student's single pass), ...]"""
    return [("teacher", run.teacher, T) for T in steps] + [("student", run.student, 0)] * (run.student is not None)


def sheet(rows, captions):
    """A labelled grid. rows: [(title, images (n, 3, H, W) uint8), ...], captions: n strings above the columns -> PIL image."""
    n, _, H, W = rows[0][1].shape
    zoom = max(1, 96 // W)                                                       # small worlds are shown enlarged
    font, left, gap = ImageFont.load_default(12), 8 + 7 * max(len(title) for title, _ in rows), 2
    w, h = W * zoom + gap, H * zoom + gap
    wrapped = [textwrap.wrap(caption, max(8, w // 7), max_lines=5, placeholder=" ...") for caption in captions]
    top = 10 + 15 * max(len(lines) for lines in wrapped)
    picture = Image.new("RGB", (left + n * w, top + len(rows) * h), "white")
    pen = ImageDraw.Draw(picture)
    for i, lines in enumerate(wrapped):
        pen.multiline_text((left + i * w + 2, 4), "\n".join(lines), "black", font, spacing=1)
    for j, (title, images) in enumerate(rows):
        pen.text((6, top + j * h + h // 2 - 8), title, "black", font)
        for i, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (left + i * w, top + j * h))
    return picture


def geneval_images(prompts, source, out, make, n=4):
    """The images of every prompt (evaluate.read_prompts), in the folders that GenEval's scorer reads. Those that are there are not made again.

    OUT/00000/metadata.jsonl   the line of prompt 0              OUT/00000/samples/0000.png ...   its n images
    source    the file that the prompts are from
    make      (caption, numbers of the images wanted, number of the prompt) -> (len(numbers), 3, H, W) uint8. It should draw an image
              from the seed and these two numbers alone, whichever others are wanted with it
    """
    def is_complete(path):
        try:
            return read_image(path) is not None
        except ValueError:
            return False
    folders = [Path(out) / f"{index:05d}" for index in range(len(prompts))]
    for folder, prompt in zip(folders, prompts):                               # all of them before the first image
        path, text = folder / "metadata.jsonl", json.dumps(prompt)
        if path.exists() and path.read_text() != text:
            raise ValueError(f"{path} has another prompt than {source}: {out} was made for another file")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda new: new.write_text(text))
    for index, (prompt, folder) in enumerate(zip(tqdm(prompts, "images"), folders)):
        files = [folder / "samples" / f"{i:04d}.png" for i in range(n)]
        wanted = [i for i in range(n) if not is_complete(files[i])]
        if wanted:
            images = make(prompt["prompt"], wanted, index)
            assert images.shape[:2] == (len(wanted), 3) and images.dtype == torch.uint8, (images.shape, images.dtype)
            for i, image in zip(wanted, images):
                write_whole(files[i], Image.fromarray(image.permute(1, 2, 0).numpy()).save)


# ------------------------------------------------------------------------------------------------ tables and speed
# How keys are called at the head of a column, where not by themselves
HEADS = dict(fd="FD", fid="FID", inception_score="IS", inception_score_std="+-", precision="prec.", accuracy="acc.", ms_per_image="ms/image")


def text_table(rows, *keys):
    """Rows, a list of dicts -> text: a line of heads, then the rows. Of the keys, those that some row has; numbers with two digits."""
    keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
    lines = [[HEADS.get(key, key) for key in keys]] + [
        ["" if (x := row.get(key)) is None else f"{x:.2f}" if isinstance(x, float) else str(x) for key in keys] for row in rows]
    widths = [f"{'<' if key in ('model', 'method', 'table', 'row') else '>'}{max(map(len, x))}" for key, x in zip(keys, zip(*lines))]
    return "\n".join("  ".join(f"{x:{width}}" for x, width in zip(line, widths)).rstrip() for line in lines)


class Stopwatch:
    """Seconds of the parts of something done several times. mark(part): one part ends, this one begins; the part `first` begins a new round."""
    def __init__(self, device, first):
        self.device, self.first, self.rounds, self.part = device, first, [], None

    def mark(self, part):
        if self.device == "cuda":
            torch.cuda.synchronize()                                             # kernels run on while Python is further
        now = time.perf_counter()
        if self.part:
            self.rounds[-1][self.part] = self.rounds[-1].get(self.part, 0.0) + now - self.begin
        if part == self.first:
            self.rounds.append({})
        self.part, self.begin = part, now

    def milliseconds(self, warm_up=2):
        """{part: median over the rounds}, and "total"; without the first rounds, and the last, which nothing has ended."""
        rounds = [r | dict(total=sum(r.values())) for r in self.rounds[warm_up:-1]]
        return {part: 1000 * median(r[part] for r in rounds) for part in rounds[0]}


@torch.no_grad()
def bench_sampling(run, device, batch):
    """-> rows: ms per image and images per second of the student and of the teacher in 1 to 16 steps, alone and `batch` at a time."""
    rows = []
    for name, model, steps in models_of(run, (16, 8, 4, 1) if run.teacher else ()):
        for n in sorted({1, batch}):
            watch, c = Stopwatch(device, "transformer"), shown(run)[0]
            c = c[torch.arange(n) % len(c)].to(device)
            for _ in range(3 if run.cfg.smoke else 7):                           # two of them warm up
                watch.mark("transformer")                                        # and the draws of tokens
                z = fpd.tokens(model, c, fpd.generators(0, 0, n, device), run.cfg, steps)
                watch.mark("decoder")
                to_uint8(run.tokenizer.decode(run.tokenizer.E[z], c)).cpu()
            watch.mark("transformer")
            ms = watch.milliseconds()
            rows.append(dict(model=name, steps=steps or 1, batch=n, images_per_second=1000 * n / ms["total"],
                             **{part: ms[key] / n for part, key in dict(ms_per_image="total", transformer="transformer", decoder="decoder").items()}))
    return rows


def bench_training(distil, cfg, parts, device):
    """-> rows: ms of a training step of FPD, FPD + GAN and Di[M]O, by parts, and peak memory. The loop is train.distil itself.

    In a row of Di[M]O the auxiliary network's forward and backward passes are a part of their own; the frozen decoder and Phi, which
    it does not need, are in memory all the same.
    """
    rows, public = [], cfg.dataset in OFFICIAL and not cfg.smoke
    for name, settings in {"FPD": dict(), "FPD + GAN": dict(gan_weight=cfg.gan_weight or 1.0), "Di[M]O": dict(method="dimo")}.items():
        if public and "gan_weight" in settings and not cfg.gan_weight:
            print("FPD + GAN: left out, only a run with --gan-weight knows its real images")
            continue
        watch = Stopwatch(device, "condition")

        def hook(module, inputs):                                                # student and auxiliary are copies of the teacher, hook included
            if module is parts.teacher:
                watch.mark("refinement")
            elif watch.part == "refinement":
                watch.mark("auxiliary")
        handle = parts.teacher.register_forward_pre_hook(hook)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        never = dict(sample_every=10 ** 9, save_every=10 ** 9, log_every=10 ** 9, resume=False)
        this = dataclasses.replace(cfg, **{**dict(method="fpd", gan_weight=0.0), **settings, **never}, steps=4 if cfg.smoke else 9)
        with tempfile.TemporaryDirectory() as folder:
            distil(this, parts, Path(folder), device, watch.mark)
        handle.remove()
        rows.append(dict(method=name, **watch.milliseconds(), peak_gb=peak_gb(device)))
    return rows


def peak_gb(device):
    """Most memory at once: of the GPU since its count was reset; without one, of the process since it began."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource                                                              # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def bench(args, device):
    """--bench: prints two tables, of sampling and of a training step; bench.json in the run's folder."""
    import train                                                               # which imports this file
    run = load_models(args, device, teacher=True)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    content = dict(protocol=dict(device=name, dataset=run.cfg.dataset, sampling="float32, text encoder not counted", training="bfloat16, drift "
                   "float32" if device == "cuda" else "float32", torch=torch.__version__), sampling=bench_sampling(run, device, args.batch))
    print(content["protocol"])
    print(text_table(content["sampling"], "model", "steps", "batch", "ms_per_image", "transformer", "decoder", "images_per_second"))
    if args.run:                                                               # else there are no settings to train with
        cfg, parts = train.Config(**{**vars(train.Config()), **vars(run.cfg)}), run
        if cfg.dataset in OFFICIAL and not cfg.smoke:
            parts = run = None                                                 # now with Phi
            parts = train.load_official(cfg, device)
        else:
            parts.captions, parts.files = run.names if run.text else None, {}
        content["training"] = rows = bench_training(train.distil, cfg, parts, device)
        print(f"training step, batch {cfg.batch}, ms; peak_gb is of the {'GPU' if device == 'cuda' else 'process so far'}")
        print(text_table(rows, "method", "condition", "student", "refinement", "auxiliary", "decode", "lift", "drift", "gan", "backward", "update",
                         "total", "peak_gb"))
    write_json(Path(args.run or ".") / "bench.json", content)


# ------------------------------------------------------------------------------------------------ the command
class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become a ValueError, for `run_command`; no guessing at shortened flags."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def run_command(main):
    """Run a command line. No tracebacks: a mistake of the user's ends in one line (one for each missing part) and code 2, Ctrl-C in 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}")
        sys.exit(130)


def model_arguments(parser):
    """The flags that say which networks; shared with evaluate.py."""
    parser.add_argument("--run", help="runs/<name>; the newest run if not given")
    parser.add_argument("--student", metavar="FILE", help="in place of a run: a one-step MaskGIT of others, e.g. Di[M]O's pytorch_model.bin")
    parser.add_argument("--init-mask", type=float, help="with --student: its share of masked tokens, 0.6 if not given")
    parser.add_argument("--dataset", choices=list(OFFICIAL), help="in place of a run: the public teacher; with --student, which kind it is")
    for part in ("tokenizer", "teacher", "text"):
        parser.add_argument(f"--{part}-weights", metavar="FILE", help=f"official networks: file of the {part}, else weights/, else the hub")


def load_models(args, device, teacher, public=False):
    """What `model_arguments` say -> namespace as of load_run. args.run: from now on the run that it is, None for public networks

    teacher   is it needed?
    public    where there is no run at all, the public teacher of ImageNet takes its place
    """
    given = {part: getattr(args, f"{part}_weights") for part in ("tokenizer", "teacher", "text") if getattr(args, f"{part}_weights")}
    if args.run and (args.student or args.dataset):
        raise ValueError(f"--run and --{'student' if args.student else 'dataset'} exclude each other")
    if args.init_mask is not None and not args.student:
        raise ValueError("--init-mask goes with --student; a run knows its own")
    if args.init_mask is not None and not 0 < args.init_mask <= 1:
        raise ValueError(f"--init-mask is a share, between 0 and 1, got {args.init_mask}")
    no_run_at_all = not args.run and not any(Path("runs").glob("*/checkpoint.pt"))
    if args.student or args.dataset or (no_run_at_all and public):
        return load_public(args.dataset or "imagenet", args.student, teacher, given, args.init_mask, device)
    args.run = args.run or newest_run()
    return load_run(args.run, device, teacher, given)


def class_index(text, names):
    """"207" or "red circle" -> label. ValueError names what there is."""
    if text in names:                                                            # first: folders are often called 1, 2, 3
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise ValueError(f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or a name ({some})")


def tell_cut(text, captions):
    """Say which captions are longer than CLIP reads, and what is lost: of five at most. Other encoders read all that they know."""
    if isinstance(text, TextEncoder):
        for caption, lost in itertools.islice(text.cut_captions(captions).items(), 5):
            print(f"caption longer than 77 tokens: {caption[:40]!r}... loses its end, {lost[:60]!r}")


def check_seed(seed, flag="--seed"):
    if not 0 <= seed < 2 ** 32:                                                  # `generators` makes larger numbers of it, of 64 bits
        raise ValueError(f"{flag} should be between 0 and {2 ** 32 - 1}, got {seed}")


def check_writable(folder):
    """ValueError where a folder, there or to be made, cannot be written into: before the work is done, not after it."""
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{folder} cannot be written into: {there} is {'read-only' if there.is_dir() else 'not a folder'}")


def condition(run, label, prompt, n):
    """What --class or --prompt asks for, n times, or all that the run knows in turn. -> c (n, ...), what to call it"""
    if run.text and label is not None or not run.text and prompt is not None:
        raise ValueError("this run draws captions: use --prompt" if run.text else "this run draws classes: use --class")
    if run.text:
        captions = [prompt if prompt is not None else run.names[i % len(run.names)] for i in range(n)]
        tell_cut(run.text, captions)
        return run.text.encode(captions), repr(prompt) if prompt is not None else "the captions of its sheets"
    if label is None:
        return torch.arange(n) % len(run.names), "all classes"
    return torch.full((n,), class_index(label, run.names)), run.names[class_index(label, run.names)]


def main():
    parser = Parser(description="Sample images from a distilled student or from its teacher.")
    parser.add_argument("--class", dest="label", help="class number or name; without it, all classes in turn")
    parser.add_argument("--prompt", help="what to draw, for a run with captions; without it, the captions of its sheets in turn")
    parser.add_argument("--n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--teacher", action="store_true", help="the multi-step teacher in place of the student")
    parser.add_argument("--steps", type=int, help="teacher's steps, 16 if not given")
    model_arguments(parser)
    args = parser.parse_args()
    if args.n < 1:
        raise ValueError(f"--n should be at least 1, got {args.n}")
    check_seed(args.seed)
    if args.steps is not None and not args.teacher:
        raise ValueError("--steps goes with --teacher: a student takes one step")
    if args.teacher and args.student:
        raise ValueError("--teacher and --student exclude each other")
    if args.dataset and not args.teacher and not args.student:
        raise ValueError(f"--dataset {args.dataset} is for the public networks: add --teacher, or --student FILE")
    if args.prompt is not None and args.label is not None:
        raise ValueError("--prompt and --class exclude each other")
    if Path(args.out).is_dir() or Path(args.out).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {args.out} should be a picture to be made, such as sample.png ({', '.join(sorted(SUFFIXES))})")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such folder")
    check_writable(Path(args.out).parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_models(args, device, teacher=args.teacher, public=args.teacher)
    model, steps = (run.teacher, 16 if args.steps is None else args.steps) if args.teacher else (run.student, 0)
    if args.teacher and not 1 <= steps <= model.L:
        raise ValueError(f"--steps should be between 1 and {model.L}, got {steps}")
    c, what = condition(run, args.label, args.prompt, args.n)
    images = generate(model, run.tokenizer, c, run.cfg, steps, args.seed, batch=16, progress="sample")
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    sheet(rows, [""] * columns).save(args.out)
    trained = f"trained for {run.step} steps" if run.step is not None else f"{args.student}, init-mask {run.cfg.init_mask:g}"
    who = f"teacher, {steps} steps" if args.teacher else f"student, 1 step ({trained})"
    print(f"{args.out}: {args.n} images | {who} | {what} | seed {args.seed}")
    if run.cfg.smoke:
        print("This is a smoke run: its weights are random or nearly so, the picture means nothing.")


if __name__ == "__main__":
    run_command(main)
