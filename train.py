"""train.py - the whole run, from nothing to a one-step student and its report.

    prepare (once, kept)  images -> tokenizer (VQGAN) -> teacher (MaskGIT, Eq. 2)
                          images -> Phi, judge;   imagenet, laion: official files
    distil                student = copy of the teacher; fpd.fpd_step (Eq. 3 to 8), AdamW, EMA
    leave                 runs/<name>/: config.json, log.jsonl, samples/, samples.gif,
                          checkpoint.pt, report.json, report.png

    python train.py                                  # the shapes world on a CPU
    python train.py --dataset scenes                 # captions of coloured shapes
    python train.py --dataset folder --data DIR      # your own images, one subfolder per class
    python train.py --dataset imagenet --gpus 1      # the paper's class-conditional run
    python train.py --dataset laion --captions FILE  # the paper's text-to-image run
    python train.py --dataset imagenet --gpus 4      # four GPUs, a process each, by torchrun
    python train.py --method dimo                    # for comparison: Di[M]O, or sdtt
    python train.py --smoke                          # under a minute: proves the set-up
    python train.py --resume                         # the newest run goes on
    python train.py --ablations 3                    # Tables 3 and 4 in miniature, three seeds
    python train.py --bench                          # time of a step and of sampling, by parts

From top to bottom: settings; preparation; the distillation; memory of a GPU; signals; the run's
folder and checkpoints; several processes; ablations; the bench; the command.
"""
import argparse
import ast
import copy
import dataclasses
import errno
import functools
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from tqdm import tqdm

import evaluate
import fpd
import sample
import tokenizer as tok
from models import (FEATURE_NETWORKS, WEIGHTS, Backbone, ConvNet, MaskGen, MaskGIT, TextEncoder,
                    Words, find_backbone, imagenet_names, load_backbone)

try:
    import fcntl
except ImportError:
    # Windows has no such locks: two runs that begin in one folder at the same time can collide
    fcntl = None


# --------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Config:
    """Every setting, written once. Defaults are the paper's where it has one (Sec. 4.1).

    SMALL and SCENES say what the small worlds change. --help lists their names.
    """
    # what runs
    dataset: str = "shapes"           # shapes | scenes | folder | imagenet | laion
    data: str = ""                    # folder: a subfolder of images per class; else the GAN's
    captions: str = ""                # laion: the file with one caption per line
    method: str = "fpd"               # fpd | dimo | sdtt: the last two for comparison (Table 2)
    anywhere: bool = False            # shapes: objects anywhere on the canvas, the hard world
    name: str = ""                    # runs/<name>; made from the settings above when empty
    resume: bool = False              # an interrupted run (the newest, or --name) goes on
    gpus: int = None                  # 0: CPU; N: N GPUs, a process each; not given: 1 if any
    smoke: bool = False               # tiny step counts: proves the set-up, learns nothing
    bench: bool = False               # times sampling and a step, by parts, in place of a run
    ablations: int = 0                # seeds for each row of ABLATIONS; 0: a single run
    seed: int = 0                     # of the distillation, its samples and its report
    # preparation of the small worlds: once, shared by all seeds
    tokenizer_steps: int = 600        # VQGAN, batch 32
    classifier_steps: int = 200       # Phi and the judge, batch 64
    teacher_steps: int = 1200         # MaskGIT or MaskGen, batch 64
    # official networks of imagenet and laion
    weights: str = WEIGHTS            # folder of their files, which else come from the hub
    backbone: str = "vit_base_patch16_dinov3.lvd1689m"   # any vision transformer of timm
    blocks: tuple = (2, 5, 8, 11)     # of the backbone, whose outputs are compared (Table 4b)
    # sampling; by default as the public MaskGIT is sampled
    guidance: float = sample.PUBLIC["imagenet"]["guidance"]                  # in the last step
    confidence_noise: float = sample.PUBLIC["imagenet"]["confidence_noise"]  # their r_temp
    # the method
    init_mask: float = 0.9            # r_init of Sec. 3.2; stored with the student
    temperature: float = 1.0          # of Eq. 4, in training and after it
    draft: str = "student"            # student | random: what is refined (Table 3b)
    remask: tuple = (0.1, 0.9)        # pi of Eq. 5: arccos(u) 2/pi between these two shares
    teacher_cfg: float = 2.0          # guidance of the refinement (Eq. 5)
    space: str = "feature"            # feature | pixel: where drafts are compared (Table 4a)
    grid: int = 4                     # features are averaged to grid x grid; 1 pools (Table 4b)
    bandwidths: tuple = (0.02, 0.05, 0.2)    # H of Eq. 7 (Table 4a)
    affinity: str = "joint"           # joint | apart: attraction and repulsion normalised
    own_pair: bool = False            # True: a draft meets itself and its refinement (Eq. 6)
    per_class: int = 16               # drafts of one class in a batch: only these are compared;
                                      # 1: the whole batch is, of whatever class
    estimator: str = "ste"            # ste | soft (Eq. 8, Table 3a)
    gan_weight: float = 0.0           # lambda of Sec. 3.4, in units of the drift; 0: no GAN
    # optimisation
    steps: int = 100_000
    batch: int = 32                   # of each process: N GPUs see N times as many drafts
    lr: float = 1e-5
    decay: float = 0.0                # last share of the steps in which lr falls to 0
    ema: float = 0.9999
    lift_chunk: int = None            # images lifted at a time: less memory, same gradient
    # bookkeeping
    log_every: int = 10
    sample_every: int = 1000
    save_every: int = 1000            # of the preparation's trainings, too


# Of the student's gradient: its norm is cut at this
CLIP = 1.0
# Steps in which the student's learning rate rises
WARMUP = 20
# What an estimate of GPU memory is multiplied with, for what is allocated and not used. On an H200
# ImageNet at batch 32 took 30.1 GB at most, 14.9 with lift_chunk 8, MaskGen-L at batch 64 48.8 GB,
# 31.8 with lift_chunk 16; `memory` without this margin says 29.6, 15.0, 46.5, 31.8
MARGIN = 1.1
# What the small worlds change: their student is 200 times smaller and trains for minutes. Drafts
# sampled at temperature 1 are patchwork: each token is drawn by itself
SMALL = dict(batch=64, steps=320, lr=1.5e-4, decay=0.7, ema=0.985, temperature=0.3,
             per_class=32, guidance=2.0, blocks=(0, 1, 2, 3), sample_every=80, save_every=50)
# Captions: hardly two drafts of a batch have the same one, and all are compared. Mostly a draft's
# own refinement is the only one of its caption, so it counts, and Eq. 6 is as it is printed. With
# 32 drafts of a caption and without the own pair, a student of scenes comes to 0.8 of its teacher.
# MaskGen has a sampler of its own
CAPTIONS = dict(own_pair=True, affinity="apart", per_class=1,
                confidence_noise=sample.PUBLIC["laion"]["confidence_noise"])
SCENES = SMALL | CAPTIONS
LAION = CAPTIONS | dict(batch=64, guidance=sample.PUBLIC["laion"]["guidance"])    # Sec. 4.1
# The methods: Di[M]O has its own share of masked tokens, SDTT begins with an empty canvas, and
# neither compares drafts with each other. SDTT's last round is the one that counts, so lr falls in
# it alone; its canvas holds no codes, so the sampling, at temperature 1, is its only noise
METHODS = {"fpd": {}, "dimo": dict(init_mask=0.6, temperature=1.0, per_class=1),
           "sdtt": dict(init_mask=1.0, temperature=1.0, per_class=1, decay=0.25)}
# --smoke. No decay, which depends on the number of steps: 2 steps and 2 more after --resume are
# the same as 4
SMOKE = dict(tokenizer_steps=4, classifier_steps=4, teacher_steps=4, steps=4, batch=32,
             per_class=16, decay=0.0, log_every=1, sample_every=2, save_every=2)
# The rows of --ablations: the paper's table, a name, what differs from the base, the paper's
# GenEval score (overall). Without r = 1 in 3b: there nothing of the draft is left. A discriminator
# has to see several classes at once: its real images are of all of them. Which of these rows a data
# set has, `ablation_rows` says
ABLATIONS = [
    ("", "FPD, the base", {}, 0.43),
    ("3a", "soft embedding", dict(estimator="soft"), 0.38),
    ("3a", "soft + GAN", dict(estimator="soft", gan_weight=0.5, per_class=16), 0.42),
    ("3a", "STE + GAN", dict(gan_weight=0.5, per_class=16), 0.45),
    ("", "16 drafts of a class", dict(per_class=16), None),
    ("", "without the own pair", dict(own_pair=False), None),
    ("3b", "random draft", dict(draft="random"), 0.22),
    ("4a", "pixel space", dict(space="pixel"), 0.21),
    ("4a", "one bandwidth", dict(bandwidths=(0.05,)), 0.41),
    ("4b", "pooled, grid 1", dict(grid=1), 0.34),
    ("4b", "shallow blocks", dict(blocks=(0, 1)), 0.35),
    ("4b", "deep blocks", dict(blocks=(2, 3)), 0.42),
    ("2", "Di[M]O", dict(method="dimo", **METHODS["dimo"]), None),
    ("2", "SDTT", dict(method="sdtt", **METHODS["sdtt"]), None)]
# What a run was made of: --resume cannot change it
FIXED = ("dataset", "method", "data", "captions", "anywhere", "smoke", "tokenizer_steps",
         "classifier_steps", "teacher_steps", "backbone", "blocks", "init_mask")


def flag(name):
    """A field of Config -> what is typed: "init_mask" -> "--init-mask"."""
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """Command line -> Config: the paper's defaults, those of data set and method, what was typed.

    --resume: the settings of the checkpoint, then what was typed. Unknown flags stop the run.
    """
    parser = sample.Parser(
        description="Distil a masked discrete diffusion model into one step (FPD).",
        argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        if field.type is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction)
        elif field.type is tuple:
            parser.add_argument(flag(field.name), type=type(field.default[0]), nargs="+")
        else:
            parser.add_argument(flag(field.name), type=field.type)
    typed = vars(parser.parse_args(argv))
    for name, value in typed.items():
        if isinstance(value, list):
            typed[name] = tuple(value)
    settings = saved_settings(typed) if typed.get("resume") else default_settings(typed)
    cfg = Config(**{**settings, **typed})
    check(cfg)
    return cfg


def default_settings(typed):
    """What the data set, the method and --smoke that were typed change. -> dict"""
    dataset, method = typed.get("dataset", "shapes"), typed.get("method", "fpd")
    worlds = {"imagenet": {}, "laion": LAION, "scenes": SCENES}
    settings = worlds.get(dataset, SMALL) | METHODS.get(method, {})
    return settings | SMOKE if typed.get("smoke") else settings


def saved_settings(typed):
    """Those of the run to resume. -> dict. ValueError where what was typed does not go with it"""
    folder = run_folder(Config(name=typed.get("name", ""), resume=True))
    saved = sample.read_checkpoint(folder)
    settings = dataclasses.asdict(Config()) | saved["config"] | dict(name=folder.name)
    # SDTT's rounds are quarters of the run
    fixed = FIXED + ("steps",) if settings["method"] == "sdtt" else FIXED
    for name in fixed:
        had, asked = settings[name], typed.get(name, settings[name])
        if asked != had:
            raise ValueError(f"--resume: {flag(name)} of {folder} is {had!r} and cannot become "
                             f"{asked!r}")
    unknown = settings.keys() - vars(Config()).keys()
    if unknown:
        raise ValueError(f"--resume: {folder} has settings that this program does not know: "
                         f"{', '.join(sorted(unknown))}")
    if saved["step"] >= typed.get("steps", settings["steps"]):
        raise ValueError(f"--resume: {folder} has done its {saved['step']} steps; --steps N goes "
                         "further, evaluate.py makes the report")
    return settings


def check(cfg):
    """ValueError, in one line, for settings that cannot work."""
    check_values(cfg)
    check_processes(cfg)
    check_method(cfg)
    check_files(cfg)


def refuse(cfg, name, why):
    """ValueError: "--name why, got its value"."""
    raise ValueError(f"{flag(name)} {why}, got {getattr(cfg, name)!r}")


def check_values(cfg):
    """Each setting by itself: names that exist, numbers within their range."""
    choices = dict(dataset=("shapes", "scenes", "folder", "imagenet", "laion"),
                   method=("fpd", "dimo", "sdtt"), draft=("student", "random"),
                   space=("feature", "pixel"), affinity=("joint", "apart"),
                   estimator=("ste", "soft"))
    for name, known in choices.items():
        if getattr(cfg, name) not in known:
            refuse(cfg, name, f"should be one of {', '.join(known)}")
    sample.check_seed(cfg.seed)
    for name, value in vars(cfg).items():
        for x in value if isinstance(value, tuple) else (value,):
            if isinstance(x, float) and not math.isfinite(x):
                refuse(cfg, name, "should be finite")
    for name in ("ablations", "gan_weight", "confidence_noise"):
        if getattr(cfg, name) < 0:
            refuse(cfg, name, "should not be negative")
    for name in ("steps", "tokenizer_steps", "classifier_steps", "teacher_steps", "log_every",
                 "sample_every", "save_every", "per_class"):
        if getattr(cfg, name) < 1:
            refuse(cfg, name, "should be at least 1")
    for name in ("temperature", "lr"):
        if getattr(cfg, name) <= 0:
            refuse(cfg, name, "should be positive")
    for name in ("decay", "ema"):
        if not 0 <= getattr(cfg, name) <= 1:
            refuse(cfg, name, "is a share, between 0 and 1")
    if not 0 < cfg.init_mask <= 1:
        refuse(cfg, "init_mask", "is a share, between 0 and 1")
    if cfg.gpus is not None and cfg.gpus < 0:
        refuse(cfg, "gpus", "should not be negative")
    if cfg.lift_chunk is not None and cfg.lift_chunk < 1:
        refuse(cfg, "lift_chunk", "should be at least 1")


def check_processes(cfg):
    """GPUs, processes of torchrun, and what runs in place of a single run."""
    asked, there = cfg.gpus or 0, torch.cuda.device_count()
    # by torchrun: on all machines, on this one
    started = int(os.environ.get("WORLD_SIZE", 1))
    started_here = int(os.environ.get("LOCAL_WORLD_SIZE", started))
    if cfg.ablations and cfg.dataset in sample.OFFICIAL:
        refuse(cfg, "ablations", "goes with --dataset shapes, scenes or folder")
    for name in ("ablations", "bench"):
        if getattr(cfg, name) and max(asked, started) > 1:
            refuse(cfg, name, "goes with one process: --gpus 0 or 1")
    if cfg.ablations and cfg.resume:
        raise ValueError("--ablations goes on by itself: type the same command again, without "
                         "--resume")
    if cfg.bench and (cfg.ablations or cfg.resume):
        raise ValueError("--bench is no run: leave --ablations and --resume away")
    if asked > there:
        raise ValueError(f"--gpus {asked}: there are {there} CUDA devices here; leave --gpus away "
                         "to run on the CPU")
    if started > 1 and cfg.gpus not in (None, 0, started):
        raise ValueError(f"--gpus {asked}, but {started} processes were started; leave --gpus "
                         "away")
    if started > 1 and cfg.gpus != 0 and 0 < there < started_here:
        raise ValueError(f"{started_here} processes were started here, but there are {there} CUDA "
                         f"devices: --nproc-per-node {there}, or --gpus 0 for the CPU")


def check_method(cfg):
    """The method's settings: those that are more than one number, or depend on each other."""
    if not cfg.bandwidths or min(cfg.bandwidths) <= 0:
        refuse(cfg, "bandwidths", "should be positive")
    if cfg.batch < 2 or cfg.batch % cfg.per_class:
        refuse(cfg, "batch", f"should be at least 2, and a multiple of --per-class {cfg.per_class}")
    if len(cfg.remask) != 2 or not 0 <= cfg.remask[0] < cfg.remask[1] <= 1:
        refuse(cfg, "remask", "should be two shares, the smaller first")
    if not 1 <= cfg.grid <= 32:
        refuse(cfg, "grid", "should be between 1 and 32, the pixels of the smallest images")
    if cfg.dataset not in sample.OFFICIAL and not set(cfg.blocks) <= {0, 1, 2, 3}:
        raise ValueError(f"--blocks of the small Phi are 0 to 3, got {cfg.blocks}")
    if cfg.gan_weight and cfg.method != "fpd":
        refuse(cfg, "gan_weight", "goes with --method fpd")
    if cfg.method == "sdtt" and cfg.init_mask != 1:
        raise ValueError("--method sdtt begins with everything hidden, --init-mask 1, "
                         f"got {cfg.init_mask}")
    if cfg.anywhere and cfg.dataset != "shapes":
        refuse(cfg, "anywhere", "goes with --dataset shapes")


def check_files(cfg):
    """The user's files: given where they are needed, and only there."""
    needs_files = cfg.dataset in sample.OFFICIAL and not cfg.smoke
    if cfg.weights != Config.weights and not needs_files:
        refuse(cfg, "weights", "goes with --dataset imagenet or laion, and not with --smoke")
    if cfg.captions and (cfg.dataset != "laion" or cfg.smoke):
        refuse(cfg, "captions", "goes with --dataset laion, and not with --smoke")
    if cfg.dataset == "laion" and not cfg.smoke and not cfg.captions:
        raise ValueError("--dataset laion needs --captions FILE, one caption per line")
    if cfg.data and cfg.dataset != "folder" and not (needs_files and cfg.gan_weight):
        refuse(cfg, "data", "goes with --dataset folder, or with imagenet or laion and "
                            "--gan-weight, there not with --smoke")
    if cfg.dataset == "folder" and not cfg.data:
        raise ValueError("--dataset folder needs --data DIR, one subfolder of images per class")
    if cfg.gan_weight and needs_files and not cfg.data:
        raise ValueError(f"--gan-weight with {cfg.dataset} needs --data DIR: real images, "
                         "at any depth")


# --------------------------------------------------------------------------------- preparation
class Muon(torch.optim.Optimizer):
    """Steps along matrices with equal singular values (Jordan et al. 2024), in float32.

    torch.optim.Muon does the same in bfloat16, which most CPUs only emulate: there the teacher's
    minutes would be half an hour. Nor does it take the filters of a convolution.
    """
    def __init__(self, matrices, lr, weight_decay):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - momentum)
                # a filter is a matrix, too: (out, in, h, w) -> (out, in h w)
                update = p.grad.lerp(state["mean"], momentum).flatten(1)
                direction = orthogonalised(update).view_as(p)
                p.mul_(1 - lr * group["weight_decay"])
                # as large as a step of AdamW
                p.sub_(direction, alpha=0.2 * math.sqrt(max(update.shape)) * lr)


def orthogonalised(G):
    """G (n, m) = U S V^T -> nearly U V^T: five rounds of Newton and Schulz bring all singular
    values to 0.7 ... 1.2."""
    if len(G) > G.shape[1]:
        # the smaller of the two Gram matrices
        return orthogonalised(G.T).T
    X = G / G.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.T
        X = 3.4445 * X + (2.0315 * gram @ gram - 4.7750 * gram) @ X
    return X


class Training:
    """The short training of one part: Muon for what multiplies, AdamW for tables and vectors.

    By AdamW alone each needs twice as many steps, and the tokenizer depends more on chance. The
    learning rate has one cycle. Every `save_every` steps, and when a signal asks to stop, all
    that changes is saved in `file`: the same command goes on from there, to the same result.
    """
    # ends of the names of what has two dimensions and multiplies nothing
    TABLES = ("emb.weight", "embedding.weight", "embeddings.weight", "bias")

    def __init__(self, part, file, save_every):
        self.part, self.file, self.save_every, self.bar = part, file, save_every, None

    def steps(self, network, n, lr, weight_decay=0.0, clip=math.inf, also=()):
        """0 ... n - 1, with a bar.

        clip       gradient norm
        also       what changes as well: tensors, generators
        """
        self.parameters, self.clip = list(network.parameters()), clip
        of_muon, of_adam = [], []
        for name, p in network.named_parameters():
            multiplies = p.ndim in (2, 4) and not name.endswith(self.TABLES)
            (of_muon if multiplies else of_adam).append(p)
        # twice as large a step as AdamW's
        self.opts = [torch.optim.AdamW(of_adam, lr, betas=(0.9, 0.95), weight_decay=weight_decay),
                     Muon(of_muon, 2 * lr, weight_decay)]
        # total_steps 10 would divide by 0
        total = max(n + 1, 11)
        self.scheds = [torch.optim.lr_scheduler.OneCycleLR(opt, opt.param_groups[0]["lr"],
                                                           total_steps=total, pct_start=0.1)
                       for opt in self.opts]
        changing = [network, *self.opts, *self.scheds, *also,
                    torch.default_generator, *torch.cuda.default_generators]
        start = self.go_on(changing)
        self.bar = tqdm(range(start, n), self.part, initial=start, total=n)
        with self.bar, stoppable() as received:
            for step in self.bar:
                yield step
                if received or (step + 1) % self.save_every == 0:
                    states = [state_of(x) for x in changing]
                    save(self.file, dict(step=step + 1, states=states))
                if received:
                    stop(received[0], f"stopped; saved after step {step + 1} of the {self.part}. "
                                      "Go on with the same command")

    def go_on(self, changing):
        """An interrupted training: everything as it was in its file. -> the steps that it made"""
        if not self.file.exists():
            return 0
        try:
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
            for x, state in zip(changing, saved["states"], strict=True):
                set_state(x, state)
            step = saved["step"]
        except Exception as error:
            # damaged, or of another device
            raise ValueError(f"the interrupted training in {self.file} cannot go on here "
                             f"({type(error).__name__}): remove the file, and it begins "
                             "anew") from error
        print(f"{self.part}: going on after step {step}")
        return step

    def update(self, loss):
        """One step down the gradient of the loss (). ValueError when either is not finite"""
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        numbers = dict(loss=loss.detach(), grad_norm=norm)
        check_finite([(self.scheds[0].last_epoch + 1, numbers)], self.part, self.file)
        for x in (*self.opts, *self.scheds):
            x.step()


def state_of(x):
    """What is saved of a tensor, a generator, or a network, an optimiser, a schedule."""
    if torch.is_tensor(x):
        return x.clone()
    return x.get_state() if isinstance(x, torch.Generator) else x.state_dict()


def set_state(x, state):
    """The other way round, in place."""
    if torch.is_tensor(x):
        x.copy_(state)
    elif isinstance(x, torch.Generator):
        x.set_state(state)
    else:
        x.load_state_dict(state)


@torch.no_grad()
def reseed_codes(vq, e, z, usage, everything=False):
    """Dead codes come back to life where the quantisation error is large.

    e            (N, d) encoder outputs;   z (N,) their codes
    usage        (K,) decayed counts, changed in place like the codebook
    everything   at the start: all codes are placed by k-means
    """
    codes = vq.quantize.embedding.weight                                        # (K, d)
    if everything:
        centres = e[torch.randperm(len(e))[:vq.K]]                              # (K, d)
        for _ in range(10):
            nearest = torch.cdist(e, centres).argmin(1)                         # (N,)
            count = torch.bincount(nearest, minlength=vq.K)[:, None]
            mean = torch.zeros_like(centres).index_add_(0, nearest, e) / count.clamp(min=1)
            centres = torch.where(count > 0, mean, e[torch.randint(len(e), (vq.K,))])
        codes.copy_(centres)
        usage.fill_(10)
    dead = usage < 1
    if dead.any():
        error = (e - vq.E[z]).pow(2).sum(1)
        codes[dead] = e[torch.multinomial(error, int(dead.sum()), replacement=True)]
        usage[dead] = 10


def train_tokenizer(cfg, device, training):
    """VQGAN on the world's images: L1 + L2 reconstruction, codebook and commitment loss.

    At this size it is sharp without a GAN. -> network, its arguments
    """
    images, _, _ = tok.world(cfg, "train")
    # Codes of length 1: without, the dark, middle and light ground lie on one line. The gradient of
    # Eq. 8 is linear in the codes and never raises the one between two others: it dies out
    args = dict(l2norm=True)
    if cfg.dataset == "scenes":
        # several small objects have more kinds of edges
        args["K"] = 256
    vq = tok.VQGAN(**args).to(device)
    usage = torch.zeros(vq.K, device=device)
    # a plain autoencoder first: codes need somewhere to go
    begin = cfg.tokenizer_steps // 10
    for step in training.steps(vq, cfg.tokenizer_steps, 5e-3, also=[usage]):
        picks = torch.randint(len(images), (32,))
        x = tok.to_float(images[picks]).to(device)                              # (B, 3, 32, 32)
        e = vq.embed(x)                                                         # (B, L, d)
        z = vq.nearest(e)                                                       # (B, L)
        q = vq.E[z]                                                             # (B, L, d)
        usage.mul_(0.95).add_(torch.bincount(z.flatten(), minlength=vq.K))
        # the gradient passes the quantiser straight
        y = vq.decode(e if step <= begin else e + (q - e).detach())
        reconstruction = (y - x).abs().mean() + (y - x).pow(2).mean()
        loss = reconstruction
        if step > begin:
            commitment = (e - q.detach()).pow(2).mean()
            loss = loss + (q - e.detach()).pow(2).mean() + 0.25 * commitment
        training.update(loss)
        is_time = step > begin and step % 20 == 0 and step < 0.8 * cfg.tokenizer_steps
        if step == begin or is_time:
            reseed_codes(vq, e.detach().flatten(0, 1), z.flatten(), usage, step == begin)
        if step % 20 == 0:
            training.bar.set_postfix(reconstruction=f"{reconstruction.item():.3f}",
                                     codes=int((usage > 1).sum()))
    with torch.no_grad():
        x = tok.to_float(tok.world(cfg, "test")[0][:480])
        z = torch.cat([vq.encode(part.to(device)) for part in x.split(60)])
    print(f"tokenizer: {z.unique().numel()} of {vq.K} codes in use")
    return vq, args


def train_classifier(cfg, device, split, width, training):
    """Phi or the judge: a classifier of the world's classes; of scenes, of what is there.

    Phi has to paint besides, from every place of its last map: its own pixels, and the whole image
    in small. A classifier forgets what no class depends on, such as the ground; and since drafts
    are compared place by place, all places make one choice only if each sees what the others show.
    What Phi does not see the drift cannot put right. (DINOv3, which learned without classes and
    whose places look at each other, sees both.)   split "phi" | "judge"
    """
    images, labels, names = tok.world(cfg, split)
    loss_of = F.cross_entropy
    if cfg.dataset == "scenes":
        # which of the 24 coloured shapes
        images, labels = tok.scene_contents(images, labels)
        names = tok.shapes_names()
        loss_of = F.binary_cross_entropy_with_logits
    args = dict(num_classes=len(names), width=width)
    net = ConvNet(**args).to(device)
    # its own 8 x 8 pixels, and the 32 x 32 of the image as 8 x 8
    painter = nn.Conv2d(4 * width, 2 * 3 * 8 ** 2, 1).to(device)
    trained = nn.ModuleList([net, painter]) if split == "phi" else net
    for _ in training.steps(trained, cfg.classifier_steps, 3e-3, weight_decay=0.01):
        i = torch.randint(len(images), (64,))
        x, target = tok.to_float(images[i]).to(device), labels[i].to(device)
        last = net.maps(x)[-1]                                                  # (B, D, 4, 4)
        loss = loss_of(net.head(last.mean((2, 3))), target)
        if split == "phi":
            own, whole = painter(last).chunk(2, 1)                              # (B, 192, 4, 4)
            small = F.avg_pool2d(x, 4).flatten(1)[:, :, None, None]             # (B, 192, 1, 1)
            loss = loss + 5 * F.mse_loss(F.pixel_shuffle(own, 8), x)
            loss = loss + 5 * (whole - small).pow(2).mean()
        training.update(loss)
    return net, args


def train_teacher(cfg, device, vq, text, training):
    """MaskGIT or MaskGen on the tokens: predict what is hidden (Eq. 2).

    The condition is dropped for one image in ten, so that guidance works.
    """
    images, c, names = tok.world(cfg, "train")
    with torch.no_grad():
        z = torch.cat([vq.encode(tok.to_float(part).to(device)) for part in images.split(200)])
    c = text.encode(c) if text else c.to(device)                                # (N, ...)
    args = dict(K=vq.K, L=vq.L)
    if not text:
        args["num_classes"] = len(names)
    teacher = (MaskGen if text else MaskGIT)(**args).to(device)
    sample.set_text(text, teacher)
    generator = torch.Generator(device).manual_seed(0)
    for step in training.steps(teacher, cfg.teacher_steps, 2e-3, weight_decay=0.03, clip=1.0,
                               also=[generator]):
        i = torch.randint(len(z), (64,), device=device)
        r = fpd.sample_ratio(64, 0, 1, generator, device)                       # (B,)
        z_masked, is_masked = fpd.remask(z[i], r, vq.K, generator)              # (B, L)
        logits = teacher(z_masked, c[i], torch.rand(64, device=device) < 0.1)   # (B, L, K)
        loss = F.cross_entropy(logits[is_masked], z[i][is_masked])              # Eq. 2
        training.update(loss)
        if step % 20 == 0:
            training.bar.set_postfix(loss=f"{loss.item():.3f}")
    return teacher, args


# What a prepared part is made by: all of a file, or these of its functions and classes
CODE = {"tokenizer.py": None, "models.py": None,
        "fpd.py": ("uniform", "mask_ratio", "random_order", "hide", "remask", "sample_ratio"),
        "train.py": ("Muon", "orthogonalised", "Training", "reseed_codes", "train_tokenizer",
                     "train_classifier", "train_teacher")}


@functools.cache
def code_digest():
    """Of CODE: of its syntax trees, so that comments, docstrings and line breaks do not count."""
    digest = hashlib.sha256()
    for name, wanted in CODE.items():
        source = Path(__file__).with_name(name).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if wanted and getattr(node, "name", None) not in wanted:
                continue
            for inner in ast.walk(node):
                # a string that stands alone, such as a docstring, does nothing
                if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                    inner.value = ast.Constant(None)
            digest.update(ast.dump(node).encode())
    return digest.hexdigest()


class Prepared:
    """The parts of a run, from their files in runs/prepared/, made where they are not there yet.

    A file's name carries a hash of all that the part depends on: settings, images, the parts that
    it was made with, code. What has changed makes a new file.
    """
    def __init__(self, cfg, device):
        self.cfg, self.device = cfg, device
        self.parts = types.SimpleNamespace(names=None, text=None, captions=None,
                                           files={}, saved={})
        images = tok.folder_digest(cfg.data) if cfg.dataset == "folder" else ""
        self.made_from = dict(dataset=cfg.dataset, images=images, anywhere=cfg.anywhere,
                              smoke=cfg.smoke, code=code_digest(), format=sample.FORMAT)

    def add(self, part, build, **made_from):
        """parts.<part>: a frozen network; .files: where it is; .saved: what was read there.

        build(training) -> network, its arguments;   made_from: what else the part depends on
        """
        parts, key = self.parts, json.dumps({**self.made_from, **made_from}, sort_keys=True)
        digest = hashlib.sha256((part + key).encode()).hexdigest()[:10]
        path = Path("runs/prepared") / f"{self.cfg.dataset}-{part}-{digest}.pt"
        half, lock = Path(f"{path}.partial"), Path(f"{path}.lock")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
            with locked(lock, f"{part}: another run is preparing it; waiting", wait=True):
                if not path.exists():
                    torch.manual_seed(len(parts.files))
                    self.make(Training(part, half, self.cfg.save_every), build, path, key)
        # outside of the branch: a kill may have left them behind
        half.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)
        parts.files[part] = str(path)
        parts.saved[part] = sample.read_part(path)
        setattr(parts, part, sample.load_part(parts.saved[part], self.device, str(path)))

    @staticmethod
    def make(training, build, path, key):
        try:
            network, args = build(training)
        finally:
            # else an error would stand in the bar's line
            if training.bar is not None:
                training.bar.close()
        save(path, dict(cls=type(network).__name__, args=args, state=network.state_dict(),
                        made_from=key))


def prepare(cfg, device):
    """Everything that distillation takes as given, trained where it is not there yet.

    returns   namespace of the networks tokenizer, phi, judge (classes alone), teacher and text
              (None without captions); names; captions (those to train with, or None);
              files {part: path}; saved {part: what the checkpoint holds of it}
    """
    if cfg.dataset in sample.OFFICIAL and not cfg.smoke:
        return load_official(cfg, device)
    prepared = Prepared(cfg, device)
    if cfg.dataset in sample.OFFICIAL:
        add_untrained(prepared, cfg)
    else:
        add_trained(prepared, cfg, device)
    sample.set_text(prepared.parts.text, prepared.parts.teacher)
    return prepared.parts


def prepared_before(cfg, folder, device):
    """--resume: the same as `prepare`, from the run's checkpoint, whatever became of the files.

    ValueError where an own folder of images has other classes by now
    """
    content = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    parts = types.SimpleNamespace(names=content["names"], text=None, captions=None,
                                  files={}, saved=content["parts"])
    for part, saved in parts.saved.items():
        parts.files[part] = f"{folder}/checkpoint.pt"
        setattr(parts, part, sample.load_part(saved, device, f"{part} of {parts.files[part]}"))
    if cfg.dataset == "scenes":
        parts.captions = tok.world_captions(cfg, "train")
    elif cfg.dataset == "laion":
        parts.captions = sample.CAPTIONS
    elif cfg.dataset == "folder" and tok.world_names(cfg) != parts.names:
        raise ValueError(f"--resume: --data {cfg.data} has other classes than {folder} was made "
                         "with")
    sample.set_text(parts.text, parts.teacher)
    return parts


def add_trained(prepared, cfg, device):
    """A small world: images -> tokenizer -> teacher (Eq. 2), and images -> Phi, judge."""
    parts, add = prepared.parts, prepared.add
    parts.names = tok.world_names(cfg)
    if cfg.dataset == "scenes":
        parts.captions = tok.world_captions(cfg, "train")
        add("text", untrained(Words, width=128), width=128)
    add("tokenizer", partial(train_tokenizer, cfg, device), steps=cfg.tokenizer_steps)
    add("phi", partial(train_classifier, cfg, device, "phi", 32), steps=cfg.classifier_steps)
    # scenes has an exact scorer
    if cfg.dataset != "scenes":
        add("judge", partial(train_classifier, cfg, device, "judge", 24),
            steps=cfg.classifier_steps)
    add("teacher", partial(train_teacher, cfg, device, parts.tokenizer, parts.text),
        steps=cfg.teacher_steps, tokenizer=parts.files["tokenizer"], text=parts.files.get("text"))


def add_untrained(prepared, cfg):
    """--smoke of imagenet and laion: the official networks' classes, tiny and untrained."""
    parts, add = prepared.parts, prepared.add
    add("phi", untrained(Backbone, name="vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m",
                         blocks=cfg.blocks, image_size=64), blocks=cfg.blocks)
    if cfg.dataset == "imagenet":
        parts.names = imagenet_names()
        add("tokenizer", untrained(tok.VQGAN, ch_mult=(1, 1, 2, 2), image_size=64))
        add("teacher", untrained(MaskGIT, num_classes=1000))
    else:
        parts.captions, parts.names = sample.CAPTIONS, sample.CAPTIONS
        add("text", untrained(TextEncoder, width=64, depth=2, heads=1))
        add("tokenizer", untrained(tok.TATiTok, K=64, d=8, L=32, width=(64, 64), depth=(2, 2),
                                   text=(77, 64), image_size=64))
        add("teacher", untrained(MaskGen, K=64, L=32, width=64, text_width=64, T=77))


def untrained(cls, **args):
    """-> a function as of Prepared.add"""
    return lambda training: (cls(**args), args)


def load_official(cfg, device):
    """The paper's networks: MaskGIT and its VQGAN, or MaskGen, TA-TiTok and CLIP; DINOv3 as Phi.

    -> namespace as of `prepare`; with the GAN, real_files and discriminator_files besides
    """
    parts = types.SimpleNamespace(captions=None)
    if cfg.dataset == "laion":
        parts.captions = tok.read_captions(cfg.captions)
    finders = sample.official_files(cfg.dataset, True, cfg.weights)
    finders["phi"] = partial(find_backbone, cfg.backbone, cfg.weights)
    if cfg.gan_weight:
        images = tok.image_files(cfg.data)
        for cls in FEATURE_NETWORKS:
            finders[cls.part] = partial(find_backbone, cls.name, cfg.weights, cls.part)
    files = sample.find_all(finders)
    if cfg.gan_weight:
        parts.real_files = readable(images)
    for part, path in files.items():
        print(f"loading {part} from {path}", flush=True)
    # of no use to sample.py
    parts.discriminator_files = {cls.part: files.pop(cls.part) for cls in FEATURE_NETWORKS
                                 if cls.part in files}
    parts.files = {part: str(path.absolute()) for part, path in files.items()}
    parts.saved = {part: dict(file=path, sha256=sample.file_digest(path))
                   for part, path in parts.files.items()}
    sample.load_official(parts, cfg.dataset, files, device)
    phi = load_backbone(cfg.backbone, files["phi"], cfg.blocks, parts.tokenizer.image_size)
    parts.phi = sample.frozen(phi, device)
    if parts.captions:
        sample.tell_cut(parts.text, parts.captions)
    parts.names = parts.captions[:8] if parts.captions else imagenet_names()
    return parts


def readable(files):
    """Those image files that can be read to their end; what is left out is said.

    Each is read once: a damaged one would otherwise end the run at some later step.
    """
    def fault(path):
        try:
            tok.read_image(path)
        except ValueError as error:
            return str(error)
        return None
    with ThreadPoolExecutor() as pool:
        faults = list(tqdm(pool.map(fault, files), "checking images", total=len(files)))
    found = [path for path, said in zip(files, faults) if said is None]
    bad = [said for said in faults if said is not None]
    if not found:
        raise ValueError(f"none of the images can be used: {bad[0]}")
    if bad:
        print(f"{len(bad)} of {len(files)} images are left out: {bad[0]}"
              f"{', ...' if len(bad) > 1 else ''}")
    return found


# --------------------------------------------------------------------------------- distillation
def draw_condition(parts, cfg, generator):
    """The batch's condition: per_class times each of batch / per_class classes or captions.

    Without replacement, as far as there are that many. -> (B, ...)
    """
    groups, n = cfg.batch // cfg.per_class, len(parts.captions or parts.names)
    rounds = [torch.randperm(n, generator=generator, device=generator.device)
              for _ in range(math.ceil(groups / n))]
    c = torch.cat(rounds)[:groups]                                              # (G,)
    if parts.text:
        # each caption is read once, however many drafts it gets
        c = parts.text.encode([parts.captions[i] for i in c.tolist()])          # (G, rows, W)
    return c.repeat_interleave(cfg.per_class, 0)


def learning_rate(step, cfg):
    """Linear warm-up, constant, then a cosine to 0 over the last share cfg.decay of the run."""
    # 1 where the fall begins, 0 after the last step
    left = (cfg.steps + 1 - step) / max(1, cfg.decay * cfg.steps)
    return cfg.lr * min(1, step / WARMUP) * (1 - math.cos(math.pi * min(1, left))) / 2


@torch.no_grad()
def update_ema(ema, student, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - decay)


def computes_bfloat16(device):
    """Is this a GPU that computes with bfloat16, and does not merely act as if it did?"""
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class Distillation:
    """What changes while a student is distilled: all of it is in the checkpoint.

    student, ema   copies of the teacher at first;   opt: AdamW of the student
    generator      all randomness of this process
    half           autocast to bfloat16 where the GPU has it; the drift is float32 in any case
    tokenizer      what lifts the drafts; its weights are then bfloat16 (see fpd.Lift.decoded)
    gan            fpd.Gan, or None
    other          fpd.DiMO or fpd.SDTT, in place of fpd_step, or None
    unread         [(step, {term: 0-dim tensor}), ...] whose numbers nobody has looked at
    """
    def __init__(self, cfg, parts, folder, device):
        self.cfg, self.parts, self.folder, self.unread = cfg, parts, folder, []
        self.rank, self.n_ranks = ranks()
        self.made_with = versions()
        self.student = copy.deepcopy(parts.teacher).requires_grad_(True)
        self.ema = copy.deepcopy(parts.teacher)
        self.opt = torch.optim.AdamW(self.student.parameters(), lr=cfg.lr, weight_decay=0.0,
                                     fused=True if device == "cuda" else None)
        # a CPU's generator reads the lowest 32 bits
        self.seed = cfg.seed + 1_000_003 * self.rank
        self.generator = torch.Generator(device).manual_seed(self.seed)
        is_half = computes_bfloat16(device)
        self.half = torch.autocast(device, torch.bfloat16, enabled=is_half)
        self.tokenizer = parts.tokenizer
        if is_half:
            self.tokenizer = copy.deepcopy(parts.tokenizer).to(torch.bfloat16)
        self.gan, self.other = None, None
        if cfg.gan_weight:
            self.gan = fpd.Gan(cfg, parts, device, self.rank, self.n_ranks)
        if cfg.method != "fpd":
            self.other = {"dimo": fpd.DiMO, "sdtt": fpd.SDTT}[cfg.method](cfg, parts)

    def condition(self, step):
        """Of this process's drafts in this step. -> (B, ...)"""
        generator = self.generator
        if self.parts.text and generator.device.type == "cuda":
            # captions are words: the host has to know which ones without waiting for the GPU
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return draw_condition(self.parts, self.cfg, generator).to(self.generator.device)


def distil(cfg, parts, folder, device, mark=lambda part: None):
    """The loop (Fig. 2). -> the student's EMA

    Leaves checkpoint.pt, log.jsonl (of rank 0's drafts), samples/ and samples.gif in `folder`.
    mark   is told which part of a step begins, "condition" first (see `bench`)
    """
    # shapes stay the same from step to step: a GPU tries its ways to convolve once
    torch.backends.cudnn.benchmark = device == "cuda"
    run = Distillation(cfg, parts, folder, device)
    if cfg.resume:
        start = load_state(run)
    else:
        # a disk that is too small is noticed now, not after hours
        start = 0
        save_state(run, 0)
        if cfg.sample_every <= cfg.steps:
            sample_sheet(run, 0)
    lift = fpd.Lift(run.tokenizer, parts.phi, fit_to_card(run), mark)
    student = share_gradients(run.student, run.gan, run.other)
    print(f"distil: {cfg.steps - start} steps to come, each of {cfg.batch * run.n_ranks} images")
    bar = tqdm(range(start + 1, cfg.steps + 1), "distil", initial=start, total=cfg.steps,
               disable=run.rank > 0)
    with open_log(run, start) as log, bar, stoppable() as received:
        for step in bar:
            run.opt.param_groups[0]["lr"] = learning_rate(step, cfg)
            mark("condition")
            c = run.condition(step)                                             # (B, ...)
            mark("student")
            loss, logs = backward(run, student, lift, c, step, mark)
            mark("update")
            logs["grad_norm"] = nn.utils.clip_grad_norm_(run.student.parameters(), CLIP)
            run.unread.append((step, dict(loss=loss.detach(), **logs)))
            if device == "cpu" or step % cfg.log_every == 0:
                # not at every step: a GPU would have to wait
                numbers = check_finite(run.unread, "distillation", folder / "checkpoint.pt")
            run.opt.step()
            # now, so that they are gone while the next step's graph grows
            run.opt.zero_grad(set_to_none=True)
            # the ramp soon forgets the teacher's weights, with which the mean began
            update_ema(run.ema, run.student, min(cfg.ema, (1 + step) / (10 + step)))
            if step == start + 1:
                begin = time.perf_counter()
            if step % cfg.log_every == 0:
                tell(log, bar, {"step": step, **numbers}, run.gan)
                if start + 10 <= step < start + 10 + cfg.log_every:
                    tell_pace((time.perf_counter() - begin) / (step - start - 1), cfg.steps - step)
            if step % cfg.sample_every == 0:
                sample_sheet(run, step)
            # all processes stop after the same step
            is_stopped = any_of_all(received)
            if step % cfg.save_every == 0 or step == cfg.steps or is_stopped:
                save_state(run, step)
            if is_stopped:
                bar.close()
                again = f"python train.py --resume --name {folder.name}"
                stop(received[0] if received else signal.SIGINT,
                     f"stopped; saved after step {step}. Go on with: "
                     f"{'the same command' if cfg.ablations else again}")
    return run.ema


def backward(run, student, lift, c, step, mark):
    """Forward and backward pass of a step: its gradient is left in the student.

    student   run.student, or what averages its gradients;   c (B, ...) condition
    returns   loss (), logs (dict of 0-dim tensors)
    """
    if run.other:
        with run.half:
            loss, logs = run.other.step(student, c, step, run.generator)
        mark("backward")
        loss.backward()
        return loss, logs
    with run.half:
        loss, logs, images = fpd.fpd_step(student, run.parts.teacher, lift, run.parts.tokenizer.E,
                                          c, run.cfg, run.generator)
    mark("backward")
    # of the drift, at the decoded drafts
    gradient, = torch.autograd.grad(loss, images)                               # (B, 3, H, W)
    if run.gan:
        mark("gan")
        with run.half:
            gradient, gan_logs = run.gan.add(gradient, images, run.generator)
        logs |= gan_logs
        mark("backward")
    # through decoder and student: the one backward pass that DistributedDataParallel sees
    images.backward(gradient)
    return loss, logs


def tell(log, bar, row, gan):
    """A step's numbers {term: number}: into log.jsonl, beside the bar, to the GAN's judgement."""
    log.write(json.dumps(row) + "\n")
    log.flush()
    bar.set_postfix(loss=f"{row['loss']:.3f}", entropy=f"{row['entropy']:.2f}")
    if gan and gan.verdict(row):
        tqdm.write(f"step {row['step']}: {gan.verdict(row)}")


def tell_pace(seconds, left):
    """Said once: a step takes so many seconds, and so many steps are left."""
    minutes = seconds * left / 60
    wait = f"{minutes / 60:.1f} hours" if minutes > 90 else f"{minutes:.1f} minutes"
    tqdm.write(f"{seconds:.2f} s a step: {wait} for the {left} steps to come")


def sample_sheet(run, step):
    """samples/: teacher in 16 steps, in 1, student in 1, of the same labels or captions.

    samples.gif: the sheets one after the other. By rank 0
    """
    if run.rank:
        return
    cfg, parts, path = run.cfg, run.parts, run.folder / "samples" / f"{step:06d}.png"
    c, captions = sample.shown(parts)
    rows = []
    for title, model, steps in (("teacher 16", parts.teacher, 16), ("teacher 1", parts.teacher, 1),
                                ("student 1", run.ema, 0)):
        images = sample.generate(model, parts.tokenizer, c, cfg, steps, seed=cfg.seed)
        rows.append((title, images))
    path.parent.mkdir(parents=True, exist_ok=True)
    sample.write_whole(path, sample.sheet(rows, captions).save)
    animate(run.folder)


def animate(folder, most=40, width=960):
    """samples.gif of the sheets in samples/: `most` at most, evenly chosen, no wider than this."""
    files, frames = (folder / "samples").glob("*.png"), []
    files = sorted((file for file in files if file.stem.isdecimal()), key=lambda f: int(f.stem))
    n = min(most, len(files))
    for i in range(n):
        # the first and the last are always shown
        file = files[i * (len(files) - 1) // max(1, n - 1)]
        with Image.open(file) as sheet:
            frame = sheet.convert("RGB")
        frame.thumbnail((width, frame.height))
        ImageDraw.Draw(frame).text((6, 4), f"step {int(file.stem)}", "black")
        frames.append(frame)
    sample.write_whole(folder / "samples.gif", lambda new: frames[0].save(
        new, save_all=True, append_images=frames[1:], duration=600, loop=0))


# --------------------------------------------------------------------------------- GPU memory
def fit_to_card(run):
    """The settings with the lift_chunk that fits into the GPU's free memory, where none is given.

    None is all images at once: nothing is then computed twice.
    """
    cfg, device = run.cfg, run.generator.device
    # the estimate knows no other networks; the CPU's memory is not counted
    if device.type != "cuda" or run.other:
        return cfg
    c = draw_condition(run.parts, cfg, torch.Generator(device).manual_seed(0)).to(device)
    parts = types.SimpleNamespace(**{**vars(run.parts), "tokenizer": run.tokenizer})

    estimate = memory(run.student, parts, cfg, run.half, c, run.gan)
    # what torch holds already is a part of the estimate
    free = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 1e9
    chunk, who = cfg.lift_chunk, "as asked for"
    if chunk is None:
        chunk, who = choose_chunk(cfg.batch, free, estimate), "chosen: less memory, same gradient"
    needed = estimate(chunk)
    how = "all images are lifted at once" if chunk is None else f"--lift-chunk {chunk}, {who}"
    print(f"memory: about {needed:.1f} GB expected, {free:.1f} GB free: {how}")
    if needed > free:
        print(f"this may be too much: less with a smaller --batch than {cfg.batch}"
              + (", or --lift-chunk 1" if chunk != 1 else ""))
    return dataclasses.replace(cfg, lift_chunk=chunk)


def choose_chunk(batch, free, estimate):
    """The largest lift_chunk (None: all) with which the estimate, in GB, fits into `free` GB."""
    chunks = [None] + [n for n in (16, 8, 4, 2) if n < batch]
    for chunk in chunks:
        if estimate(chunk) <= free:
            return chunk
    return 1


def memory(student, parts, cfg, half, c, gan=None):
    """Gigabytes that the distillation should need: an estimate, made on this device, as a function
    of lift_chunk (None: all images at once). Nothing is counted again for another one.

    It counts weights, Adam, EMA, gradients where they stay, and what the backward pass keeps:
    counted on one image and on two. Their difference is an image's share; the rest (under
    autocast, the weights once more as bfloat16) does not grow.   c: any condition of two images
    """
    E = parts.tokenizer.E
    lift = fpd.Lift(parts.tokenizer, parts.phi, dataclasses.replace(cfg, lift_chunk=None))
    # weights, two of Adam, EMA; DistributedDataParallel's gradients stay, otherwise they are gone
    # when the graph is largest
    networks = [student] * (5 if dist.is_initialized() else 4)
    networks += [parts.teacher, parts.tokenizer, parts.phi]
    if parts.text:
        networks.append(parts.text)
    if gan:
        networks.append(gan.discriminator.eval())

    def draft(B):
        return student(torch.full((B, student.L), student.K, device=E.device), c[:B])

    def lifted(B):
        z = torch.zeros(B, student.L, dtype=torch.long, device=E.device)
        return lift.features(lift.decode(E[z].requires_grad_(), c[:B]))

    def judged(B):
        # as the student's drafts are: with a gradient at the images
        side = parts.tokenizer.image_size
        images = torch.zeros(B, 3, side, side, device=E.device).requires_grad_()
        generator = torch.Generator(E.device).manual_seed(0)
        return fpd.gan_logits(gan.discriminator, images, generator)

    weights = {p.untyped_storage().data_ptr() for net in networks for p in net.parameters()}
    fixed = sum(p.nbytes for net in networks for p in net.parameters())
    for forward in (draft, lifted, judged) if gan else (draft, lifted):
        with half:
            one, two = kept(forward, 1, weights), kept(forward, 2, weights)
        an_image = two - one
        fixed += one - an_image
        if forward is lifted:
            lifted_image = an_image
        else:
            fixed += cfg.batch * an_image

    def estimate(chunk):
        n_lifted = min(cfg.batch, chunk or cfg.batch)
        return (fixed + n_lifted * lifted_image) * MARGIN / 1e9
    return estimate


def kept(forward, B, weights):
    """Bytes that the backward pass of forward(B) would keep, besides storages among `weights`."""
    storages = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in weights:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        # t may be what the graph node made: a cycle, never freed
        return t.detach()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # else memory would be freed, and counted twice
        alive = forward(B)
    del alive
    return sum(storages.values())


# --------------------------------------------------------------------------------- signals
# Ctrl-C; what a scheduler sends before it kills; what a closed terminal sends (not on Windows)
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
         if hasattr(signal, name)]


@contextmanager
def stoppable():
    """with stoppable() as received: Ctrl-C, SIGTERM and SIGHUP only fill that list.

    The step under way is finished, and what is saved is whole. The same signal again does not
    wait. One that came too late for the loop stops the program where the block ends.
    """
    received, before = [], {}

    def note(number, frame):
        received.append(number)
        # torchrun hands on what its processes may have got already
        if "RANK" not in os.environ:
            signal.signal(number, before[number])

    for number in STOPS:
        before[number] = signal.getsignal(number)
        # nohup
        if number == signal.SIGINT or before[number] != signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number in STOPS:
            signal.signal(number, before[number])
    if received:
        stop(received[0])


def stop(number, message="stopped"):
    """End the program as this signal asks for: codes 130, 143 and 129, as a shell has them."""
    print(f"\n{message}")
    # whoever fails first ends the others, even while rank 0 saves
    sys.exit(0 if ranks()[0] else 128 + number)


# --------------------------------------------------------------------------------- files
def run_folder(cfg):
    """runs/<name>: the one to resume, or a new one, not yet made. ValueError where it cannot be.

    A finished or foreign run is never written into.
    """
    runs = Path("runs")
    name = cfg.dataset
    if cfg.method != "fpd":
        name += f"-{cfg.method}"
    if cfg.anywhere:
        name += "-anywhere"
    if cfg.smoke:
        name += "-smoke"
    if cfg.name and (Path(cfg.name).name != cfg.name or cfg.name in ("..", "prepared")):
        raise ValueError(f"--name {cfg.name} cannot be the name of a folder in runs/; choose "
                         "another")
    if cfg.ablations or cfg.bench:
        # no runs: what is there is gone on with, or measured again
        kind = "ablations" if cfg.ablations else "bench"
        return runs / "-".join(filter(None, (kind, name, cfg.name)))
    if cfg.resume:
        folder = runs / cfg.name if cfg.name else sample.newest_run(runs)
        if not (folder / "checkpoint.pt").is_file():
            raise ValueError(f"--resume: there is no {folder / 'checkpoint.pt'}")
        return folder
    if cfg.name:
        # what a run leaves that was killed before its first save
        begun = {".config.json", "config.json", "samples", "checkpoint.pt.tmp"}
        if {path.name for path in (runs / cfg.name).glob("*")} - begun:
            raise ValueError(f"runs/{cfg.name} exists already: add --resume to go on with it, or "
                             "choose another --name")
        return runs / cfg.name
    folder = runs / name
    for i in itertools.count(2):
        if not folder.exists():
            return folder
        folder = runs / f"{name}-{i}"


def check_places(folder):
    """ValueError where a run cannot be written, before the work is done."""
    for place in (Path("runs"), Path("runs/prepared"), folder):
        if place.is_symlink() and not place.exists():
            raise ValueError(f"{place} is a link to {os.readlink(place)}, which is not there")
        sample.check_writable(place)


@contextmanager
def own_folder(cfg):
    """with own_folder(cfg) as folder: the run's, made here; no other run has it or gets it.

    Rank 0 takes it, for all processes. ValueError where another one goes on with it now
    """
    if ranks()[0]:
        any_of_all(False)
        yield gather(None)[0]
        return
    while True:
        folder = run_folder(cfg)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not (cfg.name or cfg.resume or cfg.ablations or cfg.bench):
                # another run was quicker: the next number
                continue
        break
    busy = f"{folder} belongs to a run that is under way: wait for it, or choose another --name"
    with locked(folder, busy):
        any_of_all(False)
        gather(folder)
        try:
            yield folder
        finally:
            # nothing was saved: the name is free again
            with suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()


@contextmanager
def locked(path, busy, wait=False):
    """Only one process at a time is in such a block with this file or folder.

    wait    True: says `busy`, and waits for the other; False: ValueError(busy)
    The lock ends with its process, however that ends
    """
    if fcntl is None:
        yield
        return
    place = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(busy) from None
            print(busy, flush=True)
            fcntl.flock(place, fcntl.LOCK_EX)
        except OSError:
            # a file system without locks, as without fcntl
            pass
        yield
    finally:
        os.close(place)


def tensors(content):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(content):
        yield content
    elif isinstance(content, dict):
        yield from tensors(list(content.values()))
    elif isinstance(content, list):
        for x in content:
            yield from tensors(x)


def save(path, content):
    """Whole, finite and readable, or not at all. OSError, ValueError

    Only what was forced to the disk and read back takes the old file's place.
    """
    path, new = Path(path), Path(f"{path}.tmp")
    if not all(torch.isfinite(t).all() for t in tensors(content)):
        raise ValueError(f"{path} would have held numbers that are NaN or infinite; it was left "
                         "as it is")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(new, map_location="cpu", weights_only=True, mmap=True)
        # torch.load does not look at the checksums
        with zipfile.ZipFile(new) as written:
            if written.testzip():
                raise OSError("what was written cannot be read back")
        os.replace(new, path)
    except Exception as error:
        # the file's own error, which torch hides behind one about positions
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(f"{path} could not be written, and was left as it is: "
                      f"{why(cause)}") from error
    finally:
        new.unlink(missing_ok=True)


def why(error):
    """An error in one line; a full disk in words."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full (No space left on device)"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def versions():
    """What a checkpoint was made with: python, torch, numpy and the git revision.

    The revision ends in "-dirty" if files have changed since; "unknown" outside of git.
    """
    git = subprocess.run(["git", "--no-optional-locks", "describe", "--always", "--dirty",
                          "--abbrev=40", "--exclude=*"],
                         cwd=Path(__file__).parent, capture_output=True, text=True)
    return dict(python=platform.python_version(), torch=str(torch.__version__),
                numpy=version("numpy"), git=git.stdout.strip() or "unknown")


def check_finite(unread, stage, good):
    """The numbers of these steps, read from the device at once. -> those of the last {term: float}

    unread  list of (step, {term: 0-dim tensor}), emptied when all is well
    stage   of the run, in words;   good: the file where its last good state would be
    ValueError names the first step and term that is NaN or infinite
    """
    if not unread:
        return {}
    values = [value.detach().double() for _, terms in unread for value in terms.values()]
    values = iter(torch.stack(values).tolist())
    for step, terms in unread:
        numbers = {term: next(values) for term in terms}
        for term, value in numbers.items():
            if not math.isfinite(value):
                last = "there is none yet"
                if Path(good).exists():
                    saved = torch.load(good, map_location="cpu", weights_only=True, mmap=True)
                    last = f"{good}, step {saved['step']}"
                raise ValueError(f"{stage}: {term} is {value} at step {step}; the last good "
                                 f"checkpoint: {last}")
    unread.clear()
    return numbers


def save_state(run, step):
    """checkpoint.pt of a Distillation after this step, by rank 0 for all processes."""
    file = run.folder / "checkpoint.pt"
    check_finite(run.unread, "distillation", file)
    states = gather(run.generator.get_state())
    if run.rank == 0:
        save(file, dict(
            format=sample.FORMAT, step=step, saved=time.time(), versions=run.made_with,
            config=dataclasses.asdict(run.cfg), names=run.parts.names, parts=run.parts.saved,
            student=run.student.state_dict(), ema=run.ema.state_dict(),
            opt=run.opt.state_dict(), rng=torch.stack(states),
            gan=run.gan.state() if run.gan else None,
            method=run.other.state() if run.other else None))
    # where it cannot be written, nobody goes on
    any_of_all(False)


def load_state(run):
    """--resume: everything as it was in the checkpoint. -> its step. ValueError: not here"""
    folder, saved = run.folder, sample.read_checkpoint(run.folder)
    # one for each process
    states = saved["rng"]
    if states[0].shape != run.generator.get_state().shape:
        raise ValueError(f"--resume: {folder} did not run on {run.generator.device}, and its "
                         "random numbers can only go on where they began")
    if len(states) != run.n_ranks:
        raise ValueError(f"--resume: {folder} ran in {len(states)} processes, which cannot become "
                         f"{run.n_ranks}: each has its own random numbers")
    check_parts(saved, run.parts, folder)
    for network, part in ((run.student, "student"), (run.ema, "ema")):
        sample.fill(network, saved[part], f"{part} of {folder}/checkpoint.pt")
    run.opt.load_state_dict(saved["opt"])
    # torch refuses a view
    run.generator.set_state(states[run.rank].clone())
    # none in a run that began without
    if run.gan and saved["gan"]:
        run.gan.load(saved["gan"])
    if run.other:
        run.other.load(saved["method"])
    print(f"going on after step {saved['step']} of {folder}")
    if saved["versions"] != run.made_with:
        print(f"saved with {saved['versions']}, going on with {run.made_with}: the same to the "
              "last bit only if the difference does not matter")
    return saved["step"]


def check_parts(saved, parts, folder):
    """ValueError where a checkpoint of `folder` was made with other networks than `parts`."""
    for part, had in saved["parts"].items():
        for key in ("made_from", "sha256"):
            if had.get(key) != parts.saved[part].get(key):
                raise ValueError(f"{folder} was made with another {part} than "
                                 f"{parts.files[part]}: bring that one back, or begin anew with "
                                 "another --name")


def open_log(run, start):
    """log.jsonl for more rows, without those of steps that were not saved: they come once more.

    A kill can have cut its last row, and is no reason to stop.
    """
    path = run.folder / "log.jsonl"
    if run.rank:
        return open(os.devnull, "w")
    if path.exists():
        whole = 0
        for row in path.read_bytes().splitlines(keepends=True):
            try:
                step = json.loads(row)["step"]
            except ValueError:
                break
            if step > start or not row.endswith(b"\n"):
                break
            whole += len(row)
        os.truncate(path, whole)
    return open(path, "a")


# --------------------------------------------------------------------------------- processes
# One for each GPU. Each draws its own conditions and drafts, and compares them among themselves
# alone: drafts of different classes do not meet in the drift anyway (unless per_class is 1), and
# DistributedDataParallel's mean of the gradients is that of the mean of the losses. Only two
# numbers are of a process's own batch that would be of all drafts in one large batch: the unit
# of distance and the RMS of the drift.
def launch(n):
    """The same command in `n` processes of this machine, by torchrun; does not return."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def ranks():
    """-> the rank of this process, 0 when it is alone, and how many there are."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def meet(device):
    """Join the processes that torchrun started, if any. Only rank 0 speaks."""
    if "RANK" in os.environ:
        if device == "cuda":
            # "cuda" is this one from now on
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")


def any_of_all(is_so):
    """Does any process say so? Waits for all of them; on the host, so that no GPU has to wait."""
    if not dist.is_initialized():
        return bool(is_so)
    count = torch.tensor(int(bool(is_so)))
    try:
        dist.all_reduce(count)
    except RuntimeError:
        # one of them has failed, and said why; now we are ended, too
        time.sleep(60)
        sys.exit(1)
    return bool(count)


def gather(x):
    """[x of rank 0, x of rank 1, ...]"""
    everything = [x] * ranks()[1]
    if dist.is_initialized():
        dist.all_gather_object(everything, x)
    return everything


def average_gradients(opt, *_):
    """Before a step of `opt`: the mean of all processes' gradients, in place, in one exchange."""
    gradients = [p.grad for group in opt.param_groups for p in group["params"]]
    flat = torch.cat([g.flatten() for g in gradients]) / dist.get_world_size()
    dist.all_reduce(flat)
    for g, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
        g.copy_(mean.view_as(g))


def share_gradients(student, *helpers):
    """-> what the loop calls in place of the student: backward leaves the mean over all processes.

    Likewise the helpers' own optimisers: of the discriminator, of Di[M]O's auxiliary network
    """
    if ranks()[1] == 1:
        return student
    shared = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
    shared.K, shared.L, shared.state_dict = student.K, student.L, student.state_dict
    for helper in helpers:
        if hasattr(helper, "opt"):
            helper.opt.register_step_pre_hook(average_gradients)
    return shared


# --------------------------------------------------------------------------------- ablations
def teacher_passes(cfg):
    """How often a run asks the teacher's network about each image of a batch; guidance: twice."""
    guided = 1 if cfg.teacher_cfg == 1 else 2
    if cfg.method == "sdtt":
        # a canvas in 4 steps, of which MaskGIT's first is without guidance, in three of the four
        # rounds; two steps as the target in each, guided in the first
        canvas = 8 if cfg.dataset == "scenes" else 7
        return round(cfg.steps * (3 * canvas + 2 * guided + 2 + 2 + 2) / 4)
    return cfg.steps * guided


def ablation_rows(base):
    """Those rows of ABLATIONS that differ from `base`, and the base itself -> a list like it.

    With per_class 1 the whole batch is compared, and no row changes that.
    """
    rows = []
    for table, row, settings, paper in ABLATIONS:
        kept = {name: value for name, value in settings.items()
                if getattr(base, name) != value and (name != "per_class" or base.per_class > 1)}
        if kept or not settings:
            rows.append((table, row, kept, paper))
    return rows


def ablation_runs(base, root):
    """The runs of --ablations -> {(name of the row, seed): its Config}.

    ValueError where one is there already, with other settings
    """
    runs = {}
    # all rows with one seed, then with the next
    for seed in range(base.seed, base.seed + base.ablations):
        for _, row, settings, _ in ablation_rows(base):
            slug = "-".join(re.sub("[^a-z0-9 ]", "", row.lower()).split())
            name = f"{root.name}/{slug}-{seed}"
            cfg = dataclasses.replace(base, **settings, seed=seed, name=name)
            if cfg.method == "sdtt":
                # it asks the teacher as often as the base does, in four rounds of equal length
                steps = cfg.steps * teacher_passes(base) / teacher_passes(cfg)
                cfg.steps = max(4, 4 * round(steps / 4))
            runs[row, seed] = cfg
            check(cfg)
            path = root.parent / name / "config.json"
            if not path.exists():
                continue
            made = json.loads(path.read_text())
            for key, asked in dataclasses.asdict(cfg).items():
                had = made.get(key, getattr(Config, key))
                if key != "ablations" and json.dumps(had) != json.dumps(asked):
                    raise ValueError(f"{path.parent} ({row}, seed {seed}) was made with {key} "
                                     f"{had}, not {asked}: choose another --name, or remove it")
    return runs


def ablate(base, root, device):
    """Tables 3 and 4 in miniature: every row with each seed, over the same networks.

    base   Config, the settings that the rows share
    root   the folder of their runs, <row>-<seed>/, and of report.json and report.png
    A run that has its score.json is kept, an interrupted one goes on from its checkpoint
    """
    # all settings are good, before anything is made
    runs, n = ablation_runs(base, root), 48 if base.smoke else 960
    print(f"{len(runs)} runs. Ctrl-C stops; the same command goes on")
    parts = prepare(base, device)
    parts.cfg = base
    for cfg in runs.values():
        folder = root.parent / cfg.name
        if (folder / "checkpoint.pt").exists():
            check_parts(sample.read_checkpoint(folder), parts, folder)
    # one for all rows, whose networks differ in the student alone
    scorer = evaluate.scorer(parts, tok.world(base, "test")[:2], n)
    for (row, seed), cfg in runs.items():
        folder = root.parent / cfg.name
        if (folder / "score.json").exists():
            continue
        print(f"\n{row}, seed {seed}: {folder}")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        sample.write_json(folder / "config.json", dataclasses.asdict(cfg))
        start, seconds = 0, None
        if (folder / "checkpoint.pt").exists():
            start = sample.read_checkpoint(folder)["step"]
        if start < cfg.steps:
            begin = time.time()
            distil(dataclasses.replace(cfg, resume=start > 0), parts, folder, device)
            # sample sheets and all
            seconds = (time.time() - begin) / (cfg.steps - start)
        run = sample.load_run(folder, device)
        score = evaluate.score(run, run.student, 0, *scorer)
        sample.write_json(folder / "score.json", score | dict(seconds_per_step=seconds))
    # beside the base, whose settings it depends on
    teacher = root.parent / next(iter(runs.values())).name / "teacher.json"
    if not teacher.exists():
        sample.write_json(teacher, {T: evaluate.score(parts, parts.teacher, T, *scorer)
                                    for T in (16, 1)})
    ablation_report(base, root, runs, parts, teacher, n, device)


def ablation_report(base, root, runs, parts, teacher, n, device):
    """The table of all scores and, as in Fig. 3, pictures of each row's first student."""
    rows, pictures, (c, captions) = [], [], sample.shown(parts)

    def add(table, row, settings, paper, passes, scores, run, model, steps):
        rows.append(dict(table=table, row=row, settings=settings, paper=paper,
                         teacher_passes=passes, scores=scores))
        title = f"{row}  {evaluate.headline(evaluate.means(scores))}"
        images = sample.generate(model, run.tokenizer, c, run.cfg, steps, seed=0)
        pictures.append((title, images))

    for T, score in json.loads(teacher.read_text()).items():
        add("", f"teacher {T}", {}, None, None, [score], parts, parts.teacher, int(T))
    for table, row, settings, paper in ablation_rows(base):
        of_row = [cfg for (other, _), cfg in runs.items() if other == row]
        folders = [root.parent / cfg.name for cfg in of_row]
        scores = [json.loads((folder / "score.json").read_text()) for folder in folders]
        run = sample.load_run(folders[0], device)
        add(table, row, settings, paper, teacher_passes(of_row[0]), scores, run, run.student, 0)
    protocol = dict(dataset=base.dataset, smoke=base.smoke, images=n, seeds=base.ablations,
                    device=device, torch=torch.__version__, base=dataclasses.asdict(base))
    evaluate.write_report(root, protocol, rows, evaluate.ablation_table, pictures, captions)


# --------------------------------------------------------------------------------- the bench
class Stopwatch:
    """Seconds of the parts of something done several times.

    mark(part): one part ends, this one begins; the part `first` begins a new round.
    """
    def __init__(self, device, first):
        self.device, self.first, self.rounds, self.part = device, first, [], None

    def mark(self, part):
        if self.device == "cuda":
            # kernels run on while Python is further
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.part:
            spent = self.rounds[-1].get(self.part, 0.0)
            self.rounds[-1][self.part] = spent + now - self.begin
        if part == self.first:
            self.rounds.append({})
        self.part, self.begin = part, now

    def milliseconds(self, warm_up=2):
        """{part: median over the rounds}, and "total".

        Without the first rounds, and the last, which nothing has ended.
        """
        rounds = [r | dict(total=sum(r.values())) for r in self.rounds[warm_up:-1]]
        return {part: 1000 * median(r[part] for r in rounds) for part in rounds[0]}


@torch.no_grad()
def bench_sampling(cfg, parts, device):
    """-> rows: ms per image and images per second, alone and 64 at a time.

    Of the student and of the teacher in 1 to 16 steps. The student is the teacher's network with
    other weights: its single pass takes as long
    """
    rows, shown = [], sample.shown(parts)[0]
    models = [("teacher", 16), ("teacher", 8), ("teacher", 4), ("teacher", 1), ("student", 0)]
    for (name, steps), n in itertools.product(models, (1, 64)):
        watch = Stopwatch(device, "transformer")
        c = shown[torch.arange(n) % len(shown)].to(device)
        # two of them warm up
        for _ in range(3 if cfg.smoke else 7):
            # and the draws of tokens
            watch.mark("transformer")
            generators = fpd.generators(0, 0, n, device)
            z = sample.tokens(parts.teacher, c, generators, cfg, steps)         # (B, L)
            watch.mark("decoder")
            sample.decode(parts.tokenizer, z, c)
        watch.mark("transformer")
        ms = watch.milliseconds()
        rows.append(dict(model=name, steps=steps or 1, batch=n,
                         images_per_second=1000 * n / ms["total"], ms_per_image=ms["total"] / n,
                         transformer=ms["transformer"] / n, decoder=ms["decoder"] / n))
    return rows


def bench_training(cfg, parts, device):
    """-> rows: ms of a step of FPD, FPD + GAN and Di[M]O, by parts, and peak memory.

    The loop is `distil` itself. In a row of Di[M]O the auxiliary network's forward and backward
    passes are a part of their own; the frozen decoder and Phi, which it does not need, are in
    memory all the same.
    """
    rows = []
    methods = {"FPD": dict(method="fpd", gan_weight=0.0),
               "FPD + GAN": dict(method="fpd", gan_weight=cfg.gan_weight or 1.0),
               "Di[M]O": dict(method="dimo", gan_weight=0.0)}
    if cfg.dataset in sample.OFFICIAL and not cfg.smoke and not cfg.gan_weight:
        print("FPD + GAN: left out, only a run with --gan-weight knows its real images")
        del methods["FPD + GAN"]
    for name, settings in methods.items():
        watch = Stopwatch(device, "condition")

        def hook(module, inputs):
            # student and auxiliary are copies of the teacher, hook included
            if module is parts.teacher:
                watch.mark("refinement")
            elif watch.part == "refinement":
                watch.mark("auxiliary")
        handle = parts.teacher.register_forward_pre_hook(hook)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        never = 10 ** 9
        timed = dataclasses.replace(cfg, **settings, steps=4 if cfg.smoke else 9, log_every=never,
                                    sample_every=never, save_every=never)
        with tempfile.TemporaryDirectory() as folder:
            distil(timed, parts, Path(folder), device, watch.mark)
        handle.remove()
        rows.append(dict(method=name, **watch.milliseconds(), peak_gb=peak_gb(device)))
    return rows


def peak_gb(device):
    """Most memory at once: of the GPU since its count was reset; else of the process so far, or
    None where the system does not tell."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:
        # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def bench(cfg, folder, device):
    """--bench: prints two tables, of sampling and of a training step; bench.json in `folder`."""
    parts = prepare(cfg, device)
    name, training = f"CPU, {torch.get_num_threads()} threads", "float32"
    if device == "cuda":
        name = torch.cuda.get_device_name()
        if computes_bfloat16(device):
            training = "bfloat16, drift float32"
    protocol = dict(device=name, dataset=cfg.dataset, batch=cfg.batch, training=training,
                    sampling="float32, text encoder not counted", torch=torch.__version__)
    print(protocol)
    content = dict(protocol=protocol, sampling=bench_sampling(cfg, parts, device))
    print(evaluate.text_table(content["sampling"], "model", "steps", "batch", "ms_per_image",
                              "transformer", "decoder", "images_per_second"))
    content["training"] = bench_training(cfg, parts, device)
    print(f"training step, batch {cfg.batch}, ms; peak_gb is of the "
          f"{'GPU' if device == 'cuda' else 'process so far'}")
    print(evaluate.text_table(content["training"], "method", "condition", "student",
                              "refinement", "auxiliary", "decode", "lift", "drift", "gan",
                              "backward", "update", "total", "peak_gb"))
    sample.write_json(folder / "bench.json", content)
    print(f"kept in {folder / 'bench.json'}")


# --------------------------------------------------------------------------------- the command
def main():
    try:
        cfg = parse()
        device = "cuda" if cfg.gpus != 0 and torch.cuda.is_available() else "cpu"
        check_places(run_folder(cfg))
        # bad --data should end here, before anything is written
        if cfg.dataset == "folder" and len(tok.world(cfg, "test")[0]) < 4:
            raise ValueError(f"--data {cfg.data} has too few images: a tenth of each class is "
                             "kept for the report, which needs 4")
    except ValueError:
        if os.environ.get("RANK", "0") != "0":
            # rank 0 says it; torchrun then ends the others
            time.sleep(60)
        raise
    if (cfg.gpus or 0) > 1 and "RANK" not in os.environ:
        launch(cfg.gpus)
    meet(device)
    try:
        with own_folder(cfg) as folder:
            print(f"run {folder} on {device}, torch {torch.__version__}, "
                  f"python {platform.python_version()}")
            print(" ".join(f"{name}={value}" for name, value in vars(cfg).items()))
            if cfg.dataset == "folder":
                print(tok.folder_summary(cfg.data))
            if cfg.ablations:
                ablate(cfg, folder, device)
            elif cfg.bench:
                bench(cfg, folder, device)
            else:
                whole_run(cfg, folder, device)
    except torch.OutOfMemoryError:
        raise ValueError("the GPU's memory is full: add --lift-chunk 1, or a smaller "
                         f"--batch than {cfg.batch} (a multiple of --per-class), or end other "
                         "programs on this GPU") from None
    except OSError as error:
        raise OSError(why(error)) from error
    if dist.is_initialized():
        dist.destroy_process_group()


def whole_run(cfg, folder, device):
    """Prepare, distil, report. Several processes: rank 0 prepares, all distil, rank 0 reports."""
    rank, _ = ranks()
    begin = time.time()
    if rank:
        # rank 0 prepares, the others find it done
        any_of_all(False)
    if cfg.resume and (cfg.smoke or cfg.dataset not in sample.OFFICIAL):
        parts = prepared_before(cfg, folder, device)
    else:
        parts = prepare(cfg, device)
    if not rank:
        any_of_all(False)
    for part, path in parts.files.items():
        network = getattr(parts, part)
        millions = sum(p.numel() for p in network.parameters()) / 1e6
        print(f"{part}: {type(network).__name__}, {millions:.1f} M parameters, {path}")
    prepared = time.time()
    if not rank:
        (folder / "samples").mkdir(exist_ok=True)
        sample.write_json(folder / "config.json", dataclasses.asdict(cfg))
    distil(cfg, parts, folder, device)
    if rank:
        return
    distilled = time.time()
    minutes = (f"minutes: prepare {(prepared - begin) / 60:.1f}, "
               f"distil {(distilled - prepared) / 60:.1f}")
    if cfg.dataset in sample.OFFICIAL:
        scores = "--reference FILE" if cfg.dataset == "imagenet" else "--geneval --prompts FILE"
        print(f"{minutes} | pictures: {folder / 'samples'}/ | scores: python evaluate.py "
              f"--run {folder} {scores}")
    else:
        real, run = tok.world(cfg, "test")[:2], sample.load_run(folder, device)
        evaluate.report(run, real, folder, seed=cfg.seed, n=48 if cfg.smoke else 960)
        print(f"{minutes}, report {(time.time() - distilled) / 60:.1f} | pictures: "
              f"{folder / 'report.png'}, {folder / 'samples.gif'}, {folder / 'samples'}/")
    if cfg.smoke:
        print("This was a smoke run: the set-up works. Nothing was learnt, the pictures mean "
              "nothing.")


if __name__ == "__main__":
    sample.run_command(main)
