"""train.py - the whole run, from nothing to a one-step student and its report.

    prepare (once, cached)   images -> tokenizer (VQGAN) -> teacher (MaskGIT, Eq. 2);   images -> Phi, judge
                             imagenet, laion: official files
    distil                   student = copy of the teacher; fpd.fpd_step (Eq. 3 to 8), AdamW, EMA
    leave                    runs/<name>/: config.json, log.jsonl, samples/, checkpoint.pt, report.json, report.png

    python train.py                                   # the shapes world on a CPU
    python train.py --dataset scenes                  # text to image: captions of coloured shapes
    python train.py --dataset folder --data DIR       # your own images, one subfolder per class
    python train.py --dataset imagenet --gpus 1       # the paper's class-conditional run: labels only, no images
    python train.py --dataset laion --captions FILE   # the paper's text-to-image run
    python train.py --dataset imagenet --gpus 4       # four GPUs; or torchrun --nproc-per-node 4 train.py --dataset imagenet
    python train.py --method dimo                     # for comparison: Di[M]O, or sdtt, in place of FPD; with each --dataset
    python train.py --smoke                           # under a minute: proves the set-up, learns nothing; with each --dataset
    python train.py --resume                          # the newest run goes on, with its own settings
    python train.py --ablations 3                     # Tables 3 and 4 in miniature, three seeds; with shapes, scenes, folder
"""
import argparse
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
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
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
import fpd
import sample
import tokenizer as tok
from models import (FEATURE_NETWORKS, Backbone, ConvNet, MaskGen, MaskGIT, TextEncoder, Words,
                    find_backbone, imagenet_names, load_backbone)


@dataclasses.dataclass
class Config:
    """Every setting, written once. Defaults are the paper's where it has one (Sec. 4.1); SMALL says what the small worlds change."""
    # what runs
    dataset: str = "shapes"           # shapes | scenes | folder | imagenet | laion
    data: str = ""                    # folder: the directory with one subfolder of images per class; official networks: real images for the GAN
    captions: str = ""                # laion: the file with one caption per line
    method: str = "fpd"               # fpd | dimo | sdtt: the last two for comparison (Table 2)
    anywhere: bool = False            # shapes: objects anywhere on the canvas, the hard world, in place of near its centre
    name: str = ""                    # runs/<name>; made from the settings above when empty
    resume: bool = False              # go on with an interrupted run (the newest, or --name) and its settings
    gpus: int = None                  # 0: CPU, N: N CUDA GPUs, a process each; 1 where there is one when not given
    smoke: bool = False               # tiny step counts: proves the set-up, learns nothing
    bench: bool = False               # time sampling and a training step, by parts, in place of a run
    ablations: int = 0                # seeds for each row of ABLATIONS, for which the other settings are the base; 0: a single run
    seed: int = 0                     # of the distillation, its samples and its report
    # preparation of the small worlds
    prepare_seed: int = 0             # of tokenizer, Phi, judge and teacher: runs with other --seed share them, as they would official ones
    tokenizer_steps: int = 900        # VQGAN, batch 32
    classifier_steps: int = 400       # Phi and the judge, batch 64
    teacher_steps: int = 1400         # MaskGIT, batch 64
    # official networks of imagenet and laion: a file, else weights/, else the hub
    tokenizer_weights: str = ""       # VQGAN, TA-TiTok
    teacher_weights: str = ""         # MaskGIT, MaskGen
    backbone_weights: str = ""        # Phi
    text_weights: str = ""            # CLIP's text encoder
    deit_weights: str = ""            # the two feature networks of the GAN's discriminator
    efficientnet_weights: str = ""
    backbone: str = "vit_base_patch16_dinov3.lvd1689m"   # any vision transformer of timm (Sec. 4.1: DINOv3 ViT-B/16)
    blocks: tuple = (2, 5, 8, 11)     # of the backbone, whose outputs are compared (Sec. 4.1, Table 4b)
    # sampling
    guidance: float = sample.PUBLIC["imagenet"]["guidance"]                  # the multi-step teacher's, in its last step; 1 = none
    confidence_noise: float = sample.PUBLIC["imagenet"]["confidence_noise"]  # Gumbel noise on its confidence (the official r_temp)
    # the method
    init_mask: float = 0.9            # r_init of Sec. 3.2, "nearly fully masked"; stored with the student, who knows no other
    draft_temperature: float = 1.0    # of Eq. 4, in training
    temperature: float = 1.0          # of Eq. 4, when the student is sampled
    draft: str = "student"            # student | random: what the teacher refines (Table 3b)
    remask_min: float = 0.1           # pi of Eq. 5: arccos(u) 2/pi between these two
    remask_max: float = 0.9
    teacher_cfg: float = 2.0          # guidance of the refinement (Eq. 5)
    refine_steps: int = 1             # passes of that refinement: 1 is the paper's; more: the teacher's sampler goes on (ours)
    space: str = "feature"            # feature | pixel: where drafts and refinements are compared (Table 4a)
    grid: int = 4                     # features are averaged to grid x grid positions; 1 pools them (Table 4b)
    bandwidths: tuple = (0.02, 0.05, 0.2)    # H of Eq. 7 (Sec. 4.1, Table 4a)
    affinity: str = "joint"           # joint | apart: attraction and repulsion normalised together or each alone (Eq. 6)
    own_pair: bool = False            # is a draft among its own negatives, and its refinement among its targets? (Eq. 6 as printed: yes)
    per_class: int = 16               # drafts of one class in a batch; only these are compared with each other
    freeze_text: bool = False         # with captions: the student reads the text as the teacher does, and learns the rest
    estimator: str = "ste"            # ste | soft (Eq. 8, Table 3a)
    gan_weight: float = 0.0           # lambda of Sec. 3.4: the GAN's gradient at the decoded image, relative to the drift's; 0: no GAN
    gan_start: int = 0                # steps without the GAN's gradient at first; the discriminator learns from the beginning
    jeffrey: float = 0.0              # dimo: weight of the reverse KL in its divergence
    label_smoothing: float = 0.1      # dimo: in the auxiliary's training, as in the official teachers'
    # optimisation
    steps: int = 100_000
    batch: int = 32                   # of each process, so N GPUs see N times as many drafts a step (the paper's 32 is not said to be per GPU)
    lr: float = 1e-5
    warmup: int = 100
    decay: float = 0.0                # the last share of the steps over which the learning rate falls to 0; the paper's is constant
    clip: float = 1.0                 # gradient norm
    ema: float = 0.9999
    lift_chunk: int = None            # images lifted at a time and once more in the backward pass: less memory, same gradient; None: all
    # bookkeeping
    log_every: int = 10
    sample_every: int = 1000
    save_every: int = 1000            # of the preparation's trainings, too


# What the small worlds change, and why: their student is 200 times smaller and trains for minutes, not days
SMALL = dict(lr=4e-4, batch=64, steps=320, warmup=20, decay=0.7, ema=0.985, guidance=2.0, confidence_noise=2.0, init_mask=0.95,
             temperature=0.1, blocks=(0, 1, 2, 3), sample_every=80, save_every=50)
# Scenes: what matters is what the caption says, so refinements are more guided. There are 12,000 captions where shapes has 24 classes, most of
# them never met: more of them in a batch, a lower learning rate, more steps, and no change to how text is read
SCENES = {**SMALL, "teacher_steps": 1200, "steps": 1000, "lr": 1.5e-4, "per_class": 8, "confidence_noise": 0.7, "teacher_cfg": 3.0,
          "freeze_text": True}
# What the comparison methods change. Di[M]O: its share of masked tokens. SDTT: one step from an empty canvas
METHODS = {"fpd": {}, "dimo": dict(init_mask=0.6), "sdtt": dict(init_mask=1.0)}
# ... and in the small worlds. Their teachers learn without label smoothing. SDTT: its last round, the one that counts, needs a learning rate;
# without codes in z_init the sampling is its only noise, so it stays warm
SMALL_METHODS = {"fpd": {}, "dimo": dict(draft_temperature=1.0, label_smoothing=0.0),
                 "sdtt": dict(init_mask=1.0, decay=0.25, temperature=1.0)}
LAION = dict(batch=64, guidance=sample.PUBLIC["laion"]["guidance"], confidence_noise=sample.PUBLIC["laion"]["confidence_noise"])   # Sec. 4.1
# What --smoke changes. No decay, which depends on the number of steps: 2 steps and 2 more after --resume are the same as 4
SMOKE = dict(tokenizer_steps=4, classifier_steps=4, teacher_steps=4, steps=4, batch=32, decay=0.0, log_every=1, sample_every=2,
             save_every=2)
# The rows of --ablations: the paper's table, a name, what differs from the base, the paper's GenEval score (overall). Without r = 1 in 3b:
# there nothing of the draft is left, so that both rows would mostly learn the same
ABLATIONS = [("", "FPD, the base", {}, 0.43),
             ("3a", "soft embedding", dict(estimator="soft"), 0.38), ("3a", "soft + GAN", dict(estimator="soft", gan_weight=0.5), 0.42),
             ("3a", "STE + GAN", dict(gan_weight=0.5), 0.45),
             ("3b", "random draft", dict(draft="random"), 0.22),
             ("4a", "pixel space", dict(space="pixel"), 0.21), ("4a", "one bandwidth", dict(bandwidths=(0.05,)), 0.41),
             ("4b", "pooled, grid 1", dict(grid=1), 0.34), ("4b", "shallow blocks", dict(blocks=(0, 1)), 0.35),
             ("4b", "deep blocks", dict(blocks=(2, 3)), 0.42),
             ("2", "Di[M]O", dict(method="dimo", **SMALL_METHODS["dimo"]), None), ("2", "SDTT", dict(method="sdtt", **SMALL_METHODS["sdtt"]), None)]
# What a run was made of: --resume cannot change it
FIXED = ("dataset", "method", "data", "captions", "anywhere", "smoke", "prepare_seed", "tokenizer_steps", "classifier_steps", "teacher_steps",
         "backbone", "blocks", "init_mask")


def parse(argv=None):
    """Command line -> Config: the paper's defaults, then SMALL, SCENES or LAION, then SMOKE, then what the user typed.

    --resume: the settings of the checkpoint, then what the user typed. Unknown flags stop the run.
    """
    parser = sample.Parser(description="Distil a masked discrete diffusion model into one step (FPD).",
                           formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            kind = dict(type=type(f.default[0]), nargs="+")
        else:
            kind = dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **kind)
    typed = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(parser.parse_args(argv)).items()}
    if typed.get("resume"):
        folder = run_folder(Config(name=typed.get("name", ""), resume=True))
        saved = sample.read_checkpoint(folder)
        settings = {**dataclasses.asdict(Config()), **saved["config"], "name": folder.name}
        for key in FIXED + ("steps",) * (settings["method"] == "sdtt"):          # whose rounds are quarters of the run
            if typed.get(key, settings[key]) != settings[key]:
                raise ValueError(f"--resume: --{key.replace('_', '-')} of {folder} is {settings[key]!r} and cannot become {typed[key]!r}")
        unknown = settings.keys() - vars(Config()).keys()
        if unknown:
            raise ValueError(f"--resume: {folder} has settings that this program does not know: {', '.join(sorted(unknown))}")
        if saved["step"] >= typed.get("steps", settings["steps"]):
            raise ValueError(f"--resume: {folder} has done its {saved['step']} steps; --steps N goes further, evaluate.py makes the report")
    else:
        of_dataset = {"imagenet": {}, "laion": LAION, "scenes": SCENES}.get(typed.get("dataset"), SMALL)
        of_method = METHODS if typed.get("dataset") in sample.OFFICIAL else SMALL_METHODS
        settings = {**of_dataset, **of_method.get(typed.get("method"), {})}
        if typed.get("smoke"):
            settings |= SMOKE
    cfg = Config(**{**settings, **typed})
    check(cfg)
    return cfg


def check(cfg):
    """ValueError, in one line, for settings that cannot work."""
    def want(ok, text):
        if not ok:
            raise ValueError(text)

    def each(names, fits, text):
        for name in names.split():
            value = getattr(cfg, name)
            want(value is None or fits(value), f"--{name.replace('_', '-')} {text}, got {value!r}")
    for name in ("seed", "prepare_seed"):
        sample.check_seed(getattr(cfg, name), f"--{name.replace('_', '-')}")
    for name, options in dict(dataset=("shapes", "scenes", "folder", "imagenet", "laion"), method=tuple(METHODS),
                              affinity=("joint", "apart"), estimator=("ste", "soft"), draft=("student", "random"),
                              space=("feature", "pixel")).items():
        each(name, lambda value: value in options, f"should be one of {', '.join(options)}")
    for f in dataclasses.fields(cfg):
        each(f.name, lambda value: all(math.isfinite(x) for x in (value if f.type is tuple else [value]) if isinstance(x, float)), "should be finite")
    each("ablations gpus gan_weight gan_start warmup confidence_noise", lambda x: x >= 0, "should not be negative")
    each("steps tokenizer_steps classifier_steps teacher_steps refine_steps log_every sample_every save_every lift_chunk", lambda x: x >= 1,
         "should be at least 1")
    each("per_class", lambda x: x >= 2, "should be at least 2: a draft's negatives are the other drafts")
    each("batch", lambda x: x >= 2 and x % cfg.per_class == 0, f"should be a multiple of --per-class {cfg.per_class}")
    each("draft_temperature temperature lr clip", lambda x: x > 0, "should be positive")
    each("bandwidths", lambda x: x and min(x) > 0, "should be positive")
    each("decay ema", lambda x: 0 <= x <= 1, "is a share, between 0 and 1")
    each("init_mask", lambda x: 0 < x <= 1, "is a share, between 0 and 1")
    each("label_smoothing", lambda x: 0 <= x < 1, "is a share, below 1")
    want(0 <= cfg.remask_min < cfg.remask_max <= 1, f"--remask-min {cfg.remask_min} and --remask-max {cfg.remask_max}: shares, min below max")
    each("grid", lambda x: 1 <= x <= 32, "should be between 1 and 32, the pixels of the smallest images")
    is_official, started = cfg.dataset in sample.OFFICIAL, int(os.environ.get("WORLD_SIZE", 1))
    needs_files = is_official and not cfg.smoke
    for names, ok, where in (
            ("anywhere", cfg.dataset == "shapes", "--dataset shapes"),
            ("freeze_text", cfg.dataset in ("scenes", "laion"), "captions: --dataset scenes or laion"),
            ("captions", cfg.dataset == "laion" and needs_files, "--dataset laion, and not with --smoke"),
            ("tokenizer_weights teacher_weights backbone_weights text_weights deit_weights efficientnet_weights", needs_files,
             "--dataset imagenet or laion, and not with --smoke"),
            ("deit_weights efficientnet_weights", cfg.gan_weight, "--gan-weight"),
            ("gan_weight", cfg.method == "fpd", "--method fpd"),
            ("data", cfg.dataset == "folder" or (needs_files and cfg.gan_weight),
             "--dataset folder, or with imagenet or laion and --gan-weight, there not with --smoke"),
            ("ablations", not is_official, "--dataset shapes, scenes or folder"),
            ("ablations", max(cfg.gpus or 0, started) <= 1, "one process: --gpus 0 or 1")):
        each(names, lambda value: not value or ok, f"goes with {where}")
    want(not (cfg.ablations and cfg.resume), "--ablations goes on by itself: type the same command again, without --resume")
    want(cfg.dataset != "folder" or cfg.data, "--dataset folder needs --data DIR, one subfolder of images per class")
    want(cfg.dataset != "laion" or cfg.smoke or cfg.captions, "--dataset laion needs --captions FILE, one caption per line")
    want(not cfg.gan_weight or not needs_files or cfg.data, f"--gan-weight with {cfg.dataset} needs --data DIR: real images, at any depth")
    want(cfg.method != "sdtt" or cfg.init_mask == 1, f"--method sdtt begins with everything hidden, --init-mask 1, got {cfg.init_mask}")
    want(is_official or set(cfg.blocks) <= set(range(4)), f"--blocks of the small Phi are 0 to 3, got {cfg.blocks}")
    want((cfg.gpus or 0) <= torch.cuda.device_count(),
         f"--gpus {cfg.gpus}: there are {torch.cuda.device_count()} CUDA devices here; leave --gpus away to run on the CPU")
    want(started == 1 or cfg.gpus in (None, 0, started), f"--gpus {cfg.gpus}, but {started} processes were started; leave --gpus away")


# ------------------------------------------------------------------------------------------------ runs on disk, stopping and going on
def run_folder(cfg):
    """runs/<name>: the one to resume, or a new one. A finished or foreign run is never written into."""
    runs = Path("runs")
    name = cfg.dataset + (f"-{cfg.method}" if cfg.method != "fpd" else "") + ("-anywhere" if cfg.anywhere else "") + ("-smoke" if cfg.smoke else "")
    if cfg.ablations:
        return runs / f"ablations-{name}{'-' if cfg.name else ''}{cfg.name}"     # goes on by itself, see train.ablate
    if cfg.resume:
        folder = runs / cfg.name if cfg.name else sample.newest_run(runs)
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
def launch(n):
    """The same command in `n` processes of this machine, by torchrun; does not return."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


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


def average_gradients(opt, *_):
    """Before a step of `opt`: the mean of all processes' gradients, in place."""
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad /= dist.get_world_size()
            dist.all_reduce(p.grad)


def share_gradients(student, *helpers):
    """-> what the loop calls in place of the student: backward leaves the mean over all processes. Likewise the helpers' own optimisers."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return student
    shared = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    shared.K, shared.L, shared.state_dict = student.K, student.L, student.state_dict
    for helper in helpers:
        if hasattr(helper, "opt"):                                               # of the discriminator, of Di[M]O's auxiliary network
            helper.opt.register_step_pre_hook(average_gradients)
    return shared


# ------------------------------------------------------------------------------------------------ preparation
class Training:
    """The short training of one part, with AdamW, or Muon (Jordan et al. 2024) for some of its matrices, and a one-cycle learning rate.

    Every `save_every` steps and on Ctrl-C all that changes is saved in `file`. The same command goes on from there, to the same result.
    """
    def __init__(self, part, file, save_every):
        self.part, self.file, self.save_every = part, file, save_every

    def steps(self, network, n, lr, weight_decay=0.0, clip=math.inf, also=(), matrices=()):
        """0 ... n - 1, with a bar. clip: gradient norm; also: a tensor and a generator which change as well; matrices: those for Muon"""
        self.parameters, self.clip, of_muon = list(network.parameters()), clip, set(matrices)      # tensors hash by identity
        self.opts = [torch.optim.AdamW([p for p in self.parameters if p not in of_muon], lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)]
        if matrices:                                                             # a step as large as AdamW's would be, twice
            self.opts.append(torch.optim.Muon(matrices, lr=2 * lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        self.scheds = [torch.optim.lr_scheduler.OneCycleLR(opt, opt.param_groups[0]["lr"], total_steps=max(n + 1, 11), pct_start=0.1)
                       for opt in self.opts]                                     # total_steps 10 would divide by 0
        access = [(x.state_dict, x.load_state_dict) for x in (network, *self.opts, *self.scheds)]
        for x in (*also, torch.default_generator, *torch.cuda.default_generators):
            access.append((x.clone, x.copy_) if torch.is_tensor(x) else (x.get_state, x.set_state))
        start = 0
        if self.file.exists():
            try:
                saved = torch.load(self.file, map_location="cpu", weights_only=True)
                for (_, put), state in zip(access, saved["states"], strict=True):
                    put(state)
                start = saved["step"]
            except Exception as error:                                           # damaged, or of another device
                raise ValueError(f"the interrupted training in {self.file} cannot go on here ({type(error).__name__}): "
                                 "remove the file, and it begins anew") from error
            print(f"{self.part}: going on after step {start}")
        self.bar = tqdm(range(start, n), self.part, initial=start, total=n)
        with ctrl_c() as interrupted:
            for step in self.bar:
                yield step
                if interrupted or (step + 1) % self.save_every == 0:
                    save(self.file, dict(step=step + 1, states=[get() for get, _ in access]))
                if interrupted:
                    raise KeyboardInterrupt(f"stopped; saved after step {step + 1} of the {self.part}. Go on with the same command")

    def update(self, loss):
        """One step down the gradient of the loss (). ValueError when either is not finite"""
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        check_finite([(self.scheds[0].last_epoch + 1, dict(loss=loss.detach(), grad_norm=norm))], self.part, self.file)
        for x in (*self.opts, *self.scheds):
            x.step()


@torch.no_grad()
def reseed_codes(vq, e, z, usage, everything=False):
    """Dead codes come back to life where the quantisation error is large; at the start all codes are placed by k-means.

    e (N, d) encoder outputs, z (N,) their codes, usage (K,) decayed counts, changed in place like the codebook
    """
    if everything:
        centres = e[torch.randperm(len(e))[:vq.K]]
        for _ in range(10):
            nearest = torch.cdist(e, centres).argmin(1)
            count = torch.bincount(nearest, minlength=vq.K)[:, None]
            mean = torch.zeros_like(centres).index_add_(0, nearest, e) / count.clamp(min=1)
            centres = torch.where(count > 0, mean, e[torch.randint(len(e), (vq.K,))])
        vq.E.copy_(centres)
        usage.fill_(10)
    dead = usage < 1
    if dead.any():
        error = (e - vq.E[z]).pow(2).sum(1)
        vq.E[dead] = e[torch.multinomial(error, int(dead.sum()), replacement=True)]
        usage[dead] = 10


def train_tokenizer(cfg, device, training):
    """VQGAN on the world's images: L1 + L2 reconstruction, codebook and commitment loss. (At this size it is sharp without a GAN.)"""
    images, _, _ = tok.world(cfg, "train")
    args = dict(K=256) if cfg.dataset == "scenes" else {}                        # several small objects: more kinds of edges
    vq = tok.VQGAN(**args).to(device)
    usage = torch.zeros(vq.K, device=device)
    begin = cfg.tokenizer_steps // 10                                            # a plain autoencoder first: codes need somewhere to go
    for step in training.steps(vq, cfg.tokenizer_steps, 5e-3, also=[usage]):
        x = tok.to_float(images[torch.randint(len(images), (32,))]).to(device)   # (B, 3, 32, 32)
        e = vq.embed(x)                                                          # (B, L, d)
        z = vq.nearest(e)                                                        # (B, L)
        q = vq.E[z]
        usage.mul_(0.95).add_(torch.bincount(z.flatten(), minlength=vq.K))
        y = vq.decode(e if step <= begin else e + (q - e).detach())              # gradient passes the quantiser straight
        reconstruction = (y - x).abs().mean() + (y - x).pow(2).mean()
        loss = reconstruction
        if step > begin:
            loss = loss + (q - e.detach()).pow(2).mean() + 0.25 * (e - q.detach()).pow(2).mean()
        training.update(loss)
        if step == begin or (step > begin and step % 20 == 0 and step < 0.8 * cfg.tokenizer_steps):
            reseed_codes(vq, e.detach().flatten(0, 1), z.flatten(), usage, everything=step == begin)
        if step % 20 == 0:
            training.bar.set_postfix(reconstruction=f"{reconstruction.item():.3f}", codes=int((usage > 1).sum()))
    with torch.no_grad():
        x = tok.to_float(tok.world(cfg, "test")[0][:480])
        z = torch.cat([vq.encode(part.to(device)) for part in x.split(60)])
    print(f"tokenizer: {z.unique().numel()} of {vq.K} codes in use")
    return vq, args


def train_classifier(cfg, device, split, width, training):
    """Phi or the judge: a classifier of the world's classes; of scenes, which of the 24 coloured shapes are there.

    Phi has to paint the image from its last map besides: a classifier forgets what no class depends on, such as the ground and the place, and
    what Phi does not see the drift cannot put right. (DINOv3, which learned without classes, keeps it.)
    """
    images, labels, names = tok.world(cfg, split)
    if cfg.dataset == "scenes":
        images, labels = tok.scene_contents(images, labels)
        names = tok.shapes_names()
    args = dict(num_classes=len(names), width=width)
    net, painter = ConvNet(**args).to(device), nn.Conv2d(4 * width, 3 * 8 ** 2, 1).to(device)    # every place of the last map: 8 x 8 pixels
    for _ in training.steps(nn.ModuleList([net, painter]) if split == "phi" else net, cfg.classifier_steps, 3e-3, weight_decay=0.01):
        i = torch.randint(len(images), (64,))
        x, target = tok.to_float(images[i]).to(device), labels[i].to(device)
        last = net.maps(x)[-1]                                                   # (B, 4 width, 4, 4)
        logits = net.head(last.mean((2, 3)))
        loss = F.binary_cross_entropy_with_logits(logits, target) if cfg.dataset == "scenes" else F.cross_entropy(logits, target)
        if split == "phi":
            loss = loss + 5 * F.mse_loss(F.pixel_shuffle(painter(last), 8), x)
        training.update(loss)
    return net, args


def train_teacher(cfg, device, vq, text, training):
    """MaskGIT or MaskGen on the tokens: predict what is hidden (Eq. 2), the condition dropped for one image in ten so that guidance works."""
    images, c, names = tok.world(cfg, "train")
    with torch.no_grad():
        z = torch.cat([vq.encode(tok.to_float(part).to(device)) for part in images.split(200)])          # (N, L)
    c = text.encode(c) if text else c.to(device)
    args = dict(K=vq.K, L=vq.L) | (dict() if text else dict(num_classes=len(names)))
    teacher = (MaskGen if text else MaskGIT)(**args).to(device)
    sample.set_text(text, teacher)
    generator = torch.Generator(device).manual_seed(cfg.prepare_seed)
    # Muon for what multiplies, not for tables: a better teacher in fewer steps than by AdamW alone (see README)
    matrices = [p for name, p in teacher.named_parameters() if p.ndim == 2 and not name.endswith(("emb.weight", "embeddings.weight", "bias"))]
    for step in training.steps(teacher, cfg.teacher_steps, 2e-3, weight_decay=0.03, clip=1.0, also=[generator], matrices=matrices):
        i = torch.randint(len(z), (64,), device=device)
        z_masked, is_masked = fpd.remask(z[i], fpd.sample_ratio(64, 0, 1, generator, device), vq.K, generator)
        logits = teacher(z_masked, c[i], torch.rand(64, device=device) < 0.1)                      # (B, L, K)
        loss = F.cross_entropy(logits[is_masked], z[i][is_masked])                                       # Eq. 2
        training.update(loss)
        if step % 20 == 0:
            training.bar.set_postfix(loss=f"{loss.item():.3f}")
    return teacher, args


def load_official(cfg, device):
    """The paper's networks: MaskGIT and its VQGAN, or MaskGen, TA-TiTok and CLIP; and DINOv3 as Phi. -> namespace as of `prepare`"""
    parts = types.SimpleNamespace(captions=tok.read_captions(cfg.captions) if cfg.dataset == "laion" else None)
    finders = sample.official_files(cfg.dataset, True, dict(tokenizer=cfg.tokenizer_weights, teacher=cfg.teacher_weights, text=cfg.text_weights))
    finders["phi"] = partial(find_backbone, cfg.backbone, cfg.backbone_weights)
    if cfg.gan_weight:
        parts.real_files = tok.image_files(cfg.data)
        finders |= {cls.part: partial(find_backbone, cls.name, getattr(cfg, f"{cls.part}_weights"), cls.part) for cls in FEATURE_NETWORKS}
    files = sample.find_all(finders)
    for part, path in files.items():
        print(f"loading {part} from {path}", flush=True)
    parts.discriminator_files = {cls.part: files.pop(cls.part) for cls in FEATURE_NETWORKS if cls.part in files}     # of no use to sample.py
    parts.files = {part: str(path.absolute()) for part, path in files.items()}
    sample.load_official(parts, cfg.dataset, files, device)
    parts.phi = sample.frozen(load_backbone(cfg.backbone, files["phi"], cfg.blocks, parts.tokenizer.image_size), device)
    if parts.captions:
        sample.tell_cut(parts.text, parts.captions)
    parts.names = parts.captions[:8] if parts.captions else imagenet_names()
    return parts


def prepare(cfg, device):
    """Everything that distillation takes as given, trained where it is not there yet.

    returns a namespace of networks (text: None without captions), names, captions (those to train with, or None), and their files

    A part's file name carries a hash of what it was made from, so a changed setting makes a new file and old runs keep theirs.
    """
    if cfg.dataset in sample.OFFICIAL and not cfg.smoke:
        return load_official(cfg, device)
    files, made_from = {}, {"dataset": cfg.dataset, "data": cfg.data and str(Path(cfg.data).resolve()), "anywhere": cfg.anywhere,
                            "seed": cfg.prepare_seed, "smoke": cfg.smoke}
    parts = types.SimpleNamespace(names=None, text=None, captions=None, bank=None, files=files)

    def cached(part, build, **settings):
        key = json.dumps({**made_from, **settings, "format": sample.FORMAT}, sort_keys=True)
        path = Path("runs/prepared") / f"{cfg.dataset}-{part}-{hashlib.sha256((part + key).encode()).hexdigest()[:10]}.pt"
        half = Path(f"{path}.partial")
        if not path.exists():
            torch.manual_seed(4 * cfg.prepare_seed + len(files))
            network, args = build(Training(part, half, cfg.save_every))
            save(path, dict(cls=type(network).__name__, args=args, state=network.state_dict(), made_from=key))
        half.unlink(missing_ok=True)                                             # outside of the branch: a kill may have left it behind
        files[part] = str(path)
        setattr(parts, part, sample.load_part(path, device))

    def untrained(cls, **args):
        return lambda training: (cls(**args), args)

    if cfg.dataset in sample.OFFICIAL:                                           # --smoke: the official networks' classes, tiny and untrained
        phi = dict(name="vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", blocks=cfg.blocks, image_size=64)
        cached("phi", untrained(Backbone, **phi), blocks=cfg.blocks)
    if cfg.dataset == "imagenet":
        parts.names = imagenet_names()
        cached("tokenizer", untrained(tok.VQGAN, ch_mult=(1, 1, 2, 2), image_size=64))
        cached("teacher", untrained(MaskGIT, num_classes=1000))
    elif cfg.dataset == "laion":
        cached("text", untrained(TextEncoder, width=64, depth=2, heads=1))
        cached("tokenizer", untrained(tok.TATiTok, K=64, d=8, L=32, width=(64, 64), depth=(2, 2), text=(77, 64), image_size=64))
        cached("teacher", untrained(MaskGen, K=64, L=32, width=64, text_width=64, T=77))
        parts.captions, parts.names = sample.CAPTIONS, sample.CAPTIONS
    else:
        if cfg.dataset == "scenes":
            parts.captions = tok.world_captions(cfg, "train")
            cached("text", untrained(Words, width=128), width=128)
        parts.names = tok.world_names(cfg)
        cached("tokenizer", partial(train_tokenizer, cfg, device), steps=cfg.tokenizer_steps)
        cached("phi", partial(train_classifier, cfg, device, "phi", 32), steps=cfg.classifier_steps)
        if cfg.dataset != "scenes":                                              # which has an exact scorer
            cached("judge", partial(train_classifier, cfg, device, "judge", 24), steps=cfg.classifier_steps)
        cached("teacher", partial(train_teacher, cfg, device, parts.tokenizer, parts.text), steps=cfg.teacher_steps,
               tokenizer=files["tokenizer"], text=files.get("text"))
    sample.set_text(parts.text, parts.teacher)
    return parts


# ------------------------------------------------------------------------------------------------ around the step (Sec. 4.1)
def draw_condition(parts, cfg, generator):
    """The batch's condition: batch / per_class different classes or captions, as far as there are that many, per_class of each. -> (B, ...)"""
    G, n = cfg.batch // cfg.per_class, len(parts.captions or parts.names)
    picks = torch.cat([torch.randperm(n, generator=generator, device=generator.device) for _ in range(-(-G // n))])[:G]
    c = parts.text.encode([parts.captions[i] for i in picks]) if parts.text else picks      # each caption once, however many drafts it gets
    return c.repeat_interleave(cfg.per_class, 0)


def learning_rate(step, cfg):
    """Linear warm-up, constant, then a cosine to 0 over the last share cfg.decay of the run."""
    left = (cfg.steps + 1 - step) / max(1, cfg.decay * cfg.steps)                # 1 where the fall begins, 0 after the last step
    return cfg.lr * min(1, step / max(1, cfg.warmup)) * (1 - math.cos(math.pi * min(1, left))) / 2


@torch.no_grad()
def update_ema(ema, student, decay):
    for p, q in zip(ema.parameters(), student.parameters()):
        p.lerp_(q, 1 - decay)


def memory(student, parts, cfg, half, c):
    """Gigabytes that the distillation should need, an estimate: weights, gradients, Adam and EMA, and what the backward pass keeps.

    The last is counted on one image and on two. Their difference is an image's share; the rest (under autocast, the weights once more as
    bf16) does not grow. Buffers that live for a moment come on top. c: any condition of two images
    """
    E, lift = parts.tokenizer.E, fpd.Lift(parts.tokenizer, parts.phi, dataclasses.replace(cfg, lift_chunk=None))
    networks = [student] * 5 + [parts.teacher, parts.tokenizer, parts.phi]       # student: weights, gradient, two of Adam, EMA
    if parts.text:
        networks.append(parts.text)
    counted = {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}

    def kept(forward, B):
        """Bytes that the backward pass of forward(B) would keep, besides the weights."""
        storages = {}

        def pack(t):
            if t.untyped_storage().data_ptr() not in counted:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t.detach()                                                    # t may be what the graph node made: a cycle, never freed
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), half:
            alive = forward(B)                                                   # else memory would be freed, and counted twice
        del alive
        return sum(storages.values())

    def draft(B):
        return student(torch.full((B, student.L), student.K, device=E.device), c[:B])

    def lifted(B):
        return lift.features(lift.decode(E[torch.zeros(B, student.L, dtype=torch.long, device=E.device)].requires_grad_(), c[:B]))

    (draft1, draft2), (lift1, lift2) = [(kept(f, 1), kept(f, 2)) for f in (draft, lifted)]
    fixed = sum(p.nbytes for network in networks for p in network.parameters()) + 2 * draft1 - draft2 + 2 * lift1 - lift2
    images = cfg.batch * (draft2 - draft1) + min(cfg.batch, cfg.lift_chunk or cfg.batch) * (lift2 - lift1)
    return (fixed + images) / 1e9


# ------------------------------------------------------------------------------------------------ distillation
def go_on(folder, made_with, student, ema, opt, generator, gan, other):
    """--resume: everything as it was in the checkpoint of `folder`. -> its step. ValueError where it cannot go on here"""
    saved, (rank, n_ranks) = sample.read_checkpoint(folder), ranks()
    states = torch.atleast_2d(saved["rng"])                                      # one for each process
    if states[0].shape != generator.get_state().shape:
        raise ValueError(f"--resume: {folder} did not run on {generator.device}, and its random numbers can only go on where they began")
    if len(states) != n_ranks:
        raise ValueError(f"--resume: {folder} ran in {len(states)} processes, which cannot become {n_ranks}: each has its own random numbers")
    for network, part in ((student, "student"), (ema, "ema")):
        sample.fill(network, saved[part], f"{part} of {folder}/checkpoint.pt")
    opt.load_state_dict(saved["opt"])
    generator.set_state(states[rank].clone())                                    # torch refuses a view
    if gan and saved.get("gan"):                                                 # none in a run that began without
        gan.load(saved["gan"])
    if other:
        other.load(saved["method"])
    print(f"going on after step {saved['step']} of {folder}")
    if saved.get("versions", made_with) != made_with:
        print(f"saved with {saved['versions']}, going on with {made_with}: the same to the last bit only if the difference does not matter")
    return saved["step"]


def open_log(path, start):
    """log.jsonl for more rows, without those of steps that were not saved: they come once more."""
    if path.exists():
        rows = path.read_text().splitlines(keepends=True)
        os.truncate(path, sum(map(len, itertools.takewhile(lambda row: json.loads(row)["step"] <= start, rows))))
    return open(path, "a")


def tell(log, bar, row, gan):
    """A step's numbers {term: number} into log.jsonl and beside the bar, and what the GAN has to say about them."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    bar.set_postfix(loss=f"{row['loss']:.3f}", entropy=f"{row['entropy']:.2f}")
    if gan and gan.verdict(row):
        tqdm.write(f"step {row['step']}: {gan.verdict(row)}")


def distil(cfg, parts, folder, device, mark=lambda part: None):
    """The loop (Fig. 2). Leaves checkpoint.pt, log.jsonl (of rank 0's drafts) and samples/ in `folder`.

    mark   is told which part of a step begins, "condition" first (evaluate.py --bench)
    """
    rank, n_ranks = ranks()
    student, ema = copy.deepcopy(parts.teacher).requires_grad_(True), copy.deepcopy(parts.teacher)
    for p in student.text_parameters() if cfg.freeze_text else ():
        p.requires_grad_(False)
    opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(cfg.seed + 1_000_003 * rank)     # all randomness of the distillation; 32 bits count
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")      # all but the drift, which is always float32
    lift, E, start, made_with = fpd.Lift(parts.tokenizer, parts.phi, cfg, mark), parts.tokenizer.E, 0, versions()
    c = draw_condition(parts, cfg, torch.Generator(device).manual_seed(0)).to(device)
    gan = fpd.Gan(cfg, parts, device, rank, n_ranks) if cfg.gan_weight else None
    other = {"dimo": fpd.DiMO, "sdtt": fpd.SDTT}[cfg.method](cfg, parts) if cfg.method != "fpd" else None      # in place of fpd_step
    if not other:                                                                # the estimate knows no other networks
        print(f"memory: about {memory(student, parts, cfg, half, c):.1f} GB at batch {cfg.batch} (an estimate; --lift-chunk N needs less)")
    if cfg.resume:
        start = go_on(folder, made_with, student, ema, opt, generator, gan, other)
    drafting, recent = share_gradients(student, gan, other), []           # recent: steps whose numbers nobody has looked at

    def save_state(step):
        check_finite(recent, "distillation", folder / "checkpoint.pt")
        states = gather(generator.get_state())
        if rank == 0:
            save(folder / "checkpoint.pt", dict(
                format=sample.FORMAT, step=step, config=dataclasses.asdict(cfg), names=parts.names, parts=parts.files,
                student=student.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), rng=torch.stack(states),
                gan=gan.state() if gan else None, method=other.state() if other else None, versions=made_with))
        any_of_all(False)                                                 # where it cannot be written, nobody goes on

    if not cfg.resume:
        save_state(0)                                                            # a disk that is too small is noticed now, not after hours
    log = open(os.devnull, "w") if rank else open_log(folder / "log.jsonl", start)
    bar = tqdm(range(start + 1, cfg.steps + 1), "distil", initial=start, total=cfg.steps, disable=rank > 0)
    with log, ctrl_c() as interrupted:
        for step in bar:
            opt.param_groups[0]["lr"] = learning_rate(step, cfg)
            mark("condition")
            c = draw_condition(parts, cfg, generator).to(device)             # (B, ...)
            mark("student")
            with half:
                if other:
                    loss, logs = other.step(drafting, c, step, generator)
                else:
                    loss, logs, images = fpd.fpd_step(drafting, parts.teacher, lift, E, c, cfg, generator)
            mark("backward")
            if other:
                loss.backward()
            else:
                gradient, = torch.autograd.grad(loss, images)
                if gan:
                    mark("gan")
                    with half:
                        gradient, gan_logs = gan.add(gradient, images, generator)
                    logs |= gan_logs
                    mark("backward")
                images.backward(gradient)                                        # the only one that DistributedDataParallel sees
            mark("update")
            logs["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
            recent.append((step, dict(loss=loss.detach(), **logs)))
            if E.device.type == "cpu" or step % cfg.log_every == 0:              # to look at them, a GPU would have to wait at every step
                check_finite(recent, "distillation", folder / "checkpoint.pt")
            opt.step()
            opt.zero_grad(set_to_none=True)                                      # now, so that they are gone while the next step's graph grows
            update_ema(ema, student, min(cfg.ema, (1 + step) / (10 + step)))  # the ramp forgets the teacher's first drafts
            if step % cfg.log_every == 0:
                tell(log, bar, {"step": step, "loss": loss.item(), **{k: float(v) for k, v in logs.items()}}, gan)
            if step % cfg.sample_every == 0 and rank == 0:
                sample_sheet(cfg, parts, ema, folder / "samples" / f"{step:06d}.png")
            stop = any_of_all(interrupted)                                # all of them after the same step
            if step % cfg.save_every == 0 or step == cfg.steps or stop:
                save_state(step)
            if stop:
                bar.close()
                print(f"\nstopped; saved after step {step}. Go on with: "
                      + ("the same command" if cfg.ablations else f"python train.py --resume --name {folder.name}"))
                sys.exit(0 if rank else 130)                                     # whoever fails first ends the others, even while rank 0 saves
    return ema


def sample_sheet(cfg, parts, student, path):
    """Teacher in 16 steps, teacher in 1, student in 1: the same labels and captions."""
    c, captions = sample.shown(parts)
    rows = [(title, sample.generate(model, parts.tokenizer, c, cfg, steps, seed=cfg.seed))
            for title, model, steps in (("teacher 16", parts.teacher, 16), ("teacher 1", parts.teacher, 1), ("student 1", student, 0))]
    path.parent.mkdir(parents=True, exist_ok=True)
    sample.sheet(rows, captions).save(path)


# ------------------------------------------------------------------------------------------------ ablations (Tables 3 and 4)
def ablation_runs(base, root):
    """The runs of --ablations -> {(name of the row, seed): its Config}. ValueError where one is there already, with other settings."""
    runs = {}
    for seed in range(base.seed, base.seed + base.ablations):                    # all rows with one seed, then with the next
        for _, row, settings, _ in ABLATIONS:
            slug = "-".join(re.sub("[^a-z0-9 ]", "", row.lower()).split())
            cfg = runs[row, seed] = dataclasses.replace(base, **settings, seed=seed, name=f"{root.name}/{slug}-{seed}")
            check(cfg)
            path = root.parent / cfg.name / "config.json"
            settings = dataclasses.asdict(cfg)
            made = json.loads(path.read_text()) if path.exists() else settings
            for key, asked in settings.items():
                had = made.get(key, getattr(Config, key))
                if key != "ablations" and json.dumps(had) != json.dumps(asked):
                    raise ValueError(f"{path.parent} ({row}, seed {seed}) was made with {key} {had}, not {asked}: "
                                     "choose another --name, or remove it")
    return runs


def ablate(base, root, device):
    """Tables 3 and 4 in miniature: every row of ABLATIONS with each seed over the same prepared networks, then their table and pictures.

    base   Config, the settings that the rows share;   root: the folder of their runs, <row>-<seed>/, and of report.json and report.png
    A run that has its score.json is kept, an interrupted one goes on from its checkpoint
    """
    runs, n = ablation_runs(base, root), 48 if base.smoke else 960               # all settings are good, before anything is made
    print(f"{len(runs)} runs. Ctrl-C stops; the same command goes on")
    parts = prepare(base, device)
    parts.cfg = base
    scorer = evaluate.scorer(parts, tok.world(base, "test")[:2], n)              # one for all rows, whose networks differ in the student alone
    for (row, seed), cfg in runs.items():
        folder = root.parent / cfg.name
        if (folder / "score.json").exists():
            continue
        print(f"\n{row}, seed {seed}: {folder}")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        sample.write_json(folder / "config.json", dataclasses.asdict(cfg))
        start, seconds = sample.read_checkpoint(folder)["step"] if (folder / "checkpoint.pt").exists() else 0, None
        if start < cfg.steps:
            begin = time.time()
            distil(dataclasses.replace(cfg, resume=start > 0), parts, folder, device)
            seconds = (time.time() - begin) / (cfg.steps - start)                # sample sheets and all
        run = sample.load_run(folder, device)
        sample.write_json(folder / "score.json", evaluate.score(run, run.student, 0, *scorer) | dict(seconds_per_step=seconds))
    (c, captions), rows, pictures = sample.shown(parts), [], []
    teacher = root.parent / next(iter(runs.values())).name / "teacher.json"      # beside the base, whose settings it depends on
    if not teacher.exists():
        sample.write_json(teacher, {T: evaluate.score(parts, parts.teacher, T, *scorer) for T in (16, 1)})

    def add(table, row, settings, paper, scores, run, model, steps):
        rows.append(dict(table=table, row=row, settings=settings, paper=paper, scores=scores))
        pictures.append((f"{row}  {evaluate.headline(evaluate.means(scores))}", sample.generate(model, run.tokenizer, c, run.cfg, steps, seed=0)))
    for T, score in json.loads(teacher.read_text()).items():
        add("", f"teacher {T}", {}, None, [score], parts, parts.teacher, int(T))
    for table, row, settings, paper in ABLATIONS:
        folders = [root.parent / cfg.name for (other, _), cfg in runs.items() if other == row]
        run = sample.load_run(folders[0], device)
        add(table, row, settings, paper, [json.loads((folder / "score.json").read_text()) for folder in folders], run, run.student, 0)
    protocol = dict(dataset=base.dataset, smoke=base.smoke, images=n, seeds=base.ablations, device=device, torch=torch.__version__,
                    base=dataclasses.asdict(base))
    evaluate.write_report(root, protocol, rows, evaluate.ablation_table, pictures, captions)     # pictures as in Fig. 3


# ------------------------------------------------------------------------------------------------ the bench
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
def bench_sampling(cfg, parts, device):
    """-> rows: ms per image and images per second of the student and of the teacher in 1 to 16 steps, alone and 64 at a time.

    The student is the teacher's network with other weights: its single pass takes as long
    """
    rows = []
    for name, steps in (("teacher", 16), ("teacher", 8), ("teacher", 4), ("teacher", 1), ("student", 0)):
        for n in (1, 64):
            watch, c = Stopwatch(device, "transformer"), sample.shown(parts)[0]
            c = c[torch.arange(n) % len(c)].to(device)
            for _ in range(3 if cfg.smoke else 7):                               # two of them warm up
                watch.mark("transformer")                                        # and the draws of tokens
                z = sample.tokens(parts.teacher, c, fpd.generators(0, 0, n, device), cfg, steps)
                watch.mark("decoder")
                tok.to_uint8(parts.tokenizer.decode(parts.tokenizer.E[z], c)).cpu()
            watch.mark("transformer")
            ms = watch.milliseconds()
            rows.append(dict(model=name, steps=steps or 1, batch=n, images_per_second=1000 * n / ms["total"], ms_per_image=ms["total"] / n,
                             transformer=ms["transformer"] / n, decoder=ms["decoder"] / n))
    return rows


def bench_training(cfg, parts, device):
    """-> rows: ms of a training step of FPD, FPD + GAN and Di[M]O, by parts, and peak memory. The loop is `distil` itself.

    In a row of Di[M]O the auxiliary network's forward and backward passes are a part of their own; the frozen decoder and Phi, which
    it does not need, are in memory all the same.
    """
    rows, public = [], cfg.dataset in sample.OFFICIAL and not cfg.smoke
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


def bench(cfg, parts, folder, device):
    """--bench: prints two tables, of sampling and of a training step; bench.json in `folder`."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    protocol = dict(device=name, dataset=cfg.dataset, sampling="float32, text encoder not counted",
                    training="bfloat16, drift float32" if device == "cuda" else "float32", torch=torch.__version__)
    content = dict(protocol=protocol, sampling=bench_sampling(cfg, parts, device))
    print(protocol)
    print(evaluate.text_table(content["sampling"], "model", "steps", "batch", "ms_per_image", "transformer", "decoder", "images_per_second"))
    content["training"] = bench_training(cfg, parts, device)
    print(f"training step, batch {cfg.batch}, ms; peak_gb is of the {'GPU' if device == 'cuda' else 'process so far'}")
    print(evaluate.text_table(content["training"], "method", "condition", "student", "refinement", "auxiliary", "decode", "lift", "drift",
                              "gan", "backward", "update", "total", "peak_gb"))
    sample.write_json(folder / "bench.json", content)


def main():
    cfg, several = parse(), "RANK" in os.environ
    device = "cuda" if cfg.gpus != 0 and torch.cuda.is_available() else "cpu"
    folder = run_folder(cfg)
    for place in (folder, "runs/prepared"):
        sample.check_writable(place)
    if cfg.dataset == "folder" and len(tok.world(cfg, "test")[0]) < 4:               # bad --data should end here, before anything is written
        raise ValueError(f"--data {cfg.data} has fewer than 40 images; every tenth is kept for the report")
    if (cfg.gpus or 0) > 1 and not several:
        launch(cfg.gpus)
    rank = meet(device)                                                   # after this, `folder` may exist
    print(f"run {folder} on {device}, torch {torch.__version__}, python {platform.python_version()}")
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
    if cfg.ablations:
        return ablate(cfg, folder, device)
    begin = time.time()
    if rank:
        any_of_all(False)                                                 # rank 0 prepares, the others find it done
    parts = prepare(cfg, device)
    if not rank:
        any_of_all(False)
    for part, path in parts.files.items():
        network = getattr(parts, part)
        print(f"{part}: {type(network).__name__}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, {path}")
    prepared = time.time()
    if not rank:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        sample.write_json(folder / "config.json", dataclasses.asdict(cfg))
    if cfg.bench:
        return bench(cfg, parts, folder, device)
    distil(cfg, parts, folder, device)
    if several:
        dist.destroy_process_group()
    if rank:
        return                                                                   # the report is one process's work
    distilled = time.time()
    if cfg.dataset in sample.OFFICIAL:
        print(f"minutes: prepare {(prepared - begin) / 60:.1f}, distil {(distilled - prepared) / 60:.1f} | pictures: {folder / 'samples'}/ | "
              f"scores: python evaluate.py --run {folder} " + ("--reference FILE" if cfg.dataset == "imagenet" else "--geneval --prompts FILE"))
    else:
        images, labels, _ = tok.world(cfg, "test")
        evaluate.report(sample.load_run(folder, device), (images, labels), folder, seed=cfg.seed, n=48 if cfg.smoke else 960)
        print(f"minutes: prepare {(prepared - begin) / 60:.1f}, distil {(distilled - prepared) / 60:.1f}, "
              f"report {(time.time() - distilled) / 60:.1f} | pictures: {folder / 'report.png'}, {folder / 'samples'}/")
    if cfg.smoke:
        print("This was a smoke run: the set-up works. Nothing was learnt, the pictures mean nothing.")


if __name__ == "__main__":
    sample.run_command(main)
