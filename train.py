"""train.py - the whole run, from nothing to a one-step student and its report.

    prepare (once, kept)  images -> tokenizer (VQGAN) -> teacher (MaskGIT, Eq. 2)
                          images -> Phi, judge;   imagenet, laion: official files
    distil                student = copy of the teacher; fpd.fpd_step (Eq. 3 to 8), AdamW, EMA
    report                runs/<name>/: config.json, log.jsonl, samples/, samples.gif,
                          step.png, checkpoint.pt, student.pt, report.json, report.png

    python train.py                                  # the shapes world on a CPU
    python train.py --dataset imagenet --gpus 1      # the paper's class-conditional run
"""
import argparse
import copy
import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import types
from pathlib import Path

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
from models import (BACKBONE, FEATURE_NETWORKS, WEIGHTS, Backbone, ConvNet, MaskGen, MaskGIT,
                    TextEncoder, Words, find_backbone, imagenet_names, load_backbone)


# --------------------------------------------------------------------------------- settings
@dataclasses.dataclass
class Config:
    """Every setting, written once. Defaults are the paper's where it has one (Sec. 4.1). SMALL and
    CAPTIONS say what the small worlds change."""
    # what runs
    dataset: str = "shapes"           # shapes | scenes | folder | imagenet | laion
    data: str = ""                    # folder: a subfolder per class; imagenet, laion: the GAN's
    captions: str = ""                # laion: the file with one caption per line
    method: str = "fpd"               # fpd | dimo | sdtt: the last two for comparison (Table 2)
    name: str = ""                    # runs/<name>; when empty, of dataset, method, smoke
    resume: bool = False              # an interrupted run (the newest, or --name) goes on
    gpus: int = None                  # 0: CPU; 1: one GPU; not given: a GPU if there is one
    smoke: bool = False               # tiny step counts: proves the set-up, learns nothing
    ablations: int = 0                # seeds for each row of ABLATIONS; 0: a single run
    seed: int = 0                     # of the distillation, its samples and its report
    # preparation of the small worlds: once, shared by all seeds
    tokenizer_steps: int = 600        # VQGAN, batch 32
    classifier_steps: int = 200       # Phi and the judge, batch 64
    teacher_steps: int = 1200         # MaskGIT or MaskGen, batch 64
    # official networks of imagenet and laion
    weights: str = WEIGHTS            # folder of their files, which else come from the hub
    blocks: tuple = (2, 5, 8, 11)     # of Phi, whose outputs are compared (Table 4b)
    # sampling of the teacher; by default as the public MaskGIT is sampled
    sample_guidance: float = 4.0             # in the last step
    confidence_noise: float = 4.5     # their r_temp
    # the method
    init_mask: float = 0.9            # r_init of Sec. 3.2; stored with the student
    temperature: float = 1.0          # of Eq. 4, in training and after it
    draft_source: str = "student"            # student | random: what is refined (Table 3b)
    remask: tuple = (0.1, 0.9)        # pi of Eq. 5: arccos(u) 2/pi between these two shares
    refine_guidance: float = 2.0          # guidance of the refinement (Eq. 5)
    space: str = "feature"            # feature | pixel: where drafts are compared (Table 4a)
    grid: int = 4                     # features are averaged to grid x grid; 1 pools (Table 4b)
    bandwidths: tuple = (0.02, 0.05, 0.2)    # H of Eq. 7 (Table 4a)
    affinity: str = "joint"           # joint | apart: how attraction and repulsion are normalised
    own_pair: bool = False            # X_i, Y_i among X_i's negatives, targets (Eq. 6)
    per_class: int = 16               # drafts of one class in a batch: only these are compared;
                                      # 1: the whole batch is, of whatever class
    estimator: str = "ste"            # ste | soft (Eq. 8, Table 3a)
    gan_weight: float = 0.0           # lambda of Sec. 3.4, in units of the drift; 0: no GAN
    # optimisation
    steps: int = 100_000
    batch: int = 32                   # of each process under torchrun
    lr: float = 1e-5
    decay: float = 0.0                # last share of the steps in which lr falls to 0
    ema: float = 0.9999
    lift_chunk: int = None            # images lifted at a time: less memory, same gradient
    # bookkeeping
    log_every: int = 10
    sample_every: int = 1000
    save_every: int = 1000


# The values that a setting can have, where they are few
CHOICES = dict(dataset=("shapes", "scenes", "folder", "imagenet", "laion"),
               method=("fpd", "dimo", "sdtt"), gpus=(0, 1), draft_source=("student", "random"),
               space=("feature", "pixel"), affinity=("joint", "apart"), estimator=("ste", "soft"))
# The student's gradient is clipped to this norm
CLIP = 1.0
# Steps in which the student's learning rate rises
WARMUP = 20
# What the small worlds change: their student is 200 times smaller and trains for minutes. Drafts
# sampled at temperature 1 are patchwork there, because each token is drawn on its own
SMALL = dict(batch=64, steps=320, lr=1.5e-4, decay=0.7, ema=0.985, temperature=0.3,
             per_class=32, sample_guidance=2.0, blocks=(0, 1, 2, 3), sample_every=80, save_every=50)
# Captions: most occur once per batch, so a draft's own refinement is its only target, the whole
# batch is compared, and Eq. 6 is used as printed. MaskGen's sampler has a noise of its own
CAPTIONS = dict(own_pair=True, affinity="apart", per_class=1, confidence_noise=2.0)
DATASETS = {"shapes": SMALL, "scenes": SMALL | CAPTIONS, "folder": SMALL, "imagenet": {},
            "laion": CAPTIONS | dict(batch=64, sample_guidance=13.0)}                  # Sec. 4.1
# Di[M]O has its own share of masked tokens, SDTT begins with an empty canvas, and neither compares
# drafts with each other. SDTT's last round is the one that counts, so lr falls in it alone; its
# canvas holds no codes, so sampling at temperature 1 is its only noise
METHODS = {"fpd": {}, "dimo": dict(init_mask=0.6, temperature=1.0, per_class=1),
           "sdtt": dict(init_mask=1.0, temperature=1.0, per_class=1, decay=0.25)}
# No decay in a smoke run, because it depends on the number of steps: 2 steps and 2 more after
# --resume are then the same as 4
SMOKE = dict(tokenizer_steps=4, classifier_steps=4, teacher_steps=4, steps=4, batch=32, decay=0.0,
             log_every=1, sample_every=2, save_every=2)
# The rows of --ablations: the paper's table, a name, what differs from the base, the paper's
# GenEval score (overall). r = 1 of Table 3b is left out, since nothing of the draft is left there.
# With the GAN a batch has more classes, because the discriminator's real images are of all classes
ABLATIONS = [
    ("", "FPD, the base", {}, 0.43),
    ("3a", "soft embedding", dict(estimator="soft"), 0.38),
    ("3a", "soft + GAN", dict(estimator="soft", gan_weight=0.5, per_class=16), 0.42),
    ("3a", "STE + GAN", dict(gan_weight=0.5, per_class=16), 0.45),
    ("", "16 drafts of a class", dict(per_class=16), None),
    ("", "without the own pair", dict(own_pair=False), None),
    ("3b", "random draft", dict(draft_source="random"), 0.22),
    ("4a", "pixel space", dict(space="pixel"), 0.21),
    ("4a", "one bandwidth", dict(bandwidths=(0.05,)), 0.41),
    ("4b", "pooled, grid 1", dict(grid=1), 0.34),
    ("4b", "shallow blocks", dict(blocks=(0, 1)), 0.35),
    ("4b", "deep blocks", dict(blocks=(2, 3)), 0.42),
    ("2", "Di[M]O", dict(method="dimo", **METHODS["dimo"]), None),
    ("2", "SDTT", dict(method="sdtt", **METHODS["sdtt"]), None)]
# What a run was made of: --resume cannot change it
FIXED = ("dataset", "method", "captions", "smoke", "tokenizer_steps", "classifier_steps",
         "teacher_steps", "blocks", "init_mask")


def parse(argv=None):
    """Command line -> Config: the paper's defaults, those of data set and method, what was typed;
    with --resume the settings of the checkpoint, then what was typed."""
    parser = argparse.ArgumentParser(
        description="Distil a masked discrete diffusion model into one step (FPD). --dataset "
        "folder trains on your own images, of each the centre square at 32 x 32 pixels; --data "
        "has a subfolder for each class.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        if field.type is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif field.type is tuple:
            parser.add_argument(flag, type=type(field.default[0]), nargs="+")
        else:
            parser.add_argument(flag, type=field.type, choices=CHOICES.get(field.name))
    typed = vars(parser.parse_args(argv))
    typed = {name: tuple(x) if isinstance(x, list) else x for name, x in typed.items()}
    if typed.get("resume"):
        folder = Path("runs", typed["name"]) if "name" in typed else sample.newest_run()
        settings = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True,
                              mmap=True)["config"] | dict(name=folder.name)
        # SDTT's rounds are quarters of the run
        fixed = FIXED + ("steps",) if settings["method"] == "sdtt" else FIXED
        for name in fixed:
            if typed.get(name, settings[name]) != settings[name]:
                parser.error(f"--resume cannot change {name}, {settings[name]!r} in {folder}")
    else:
        settings = DATASETS[typed.get("dataset", "shapes")] | METHODS[typed.get("method", "fpd")]
        if typed.get("smoke"):
            settings = settings | SMOKE
    cfg = Config(**settings | typed)
    # what would otherwise give something else without an error
    if cfg.batch % cfg.per_class:
        parser.error(f"--batch {cfg.batch} is no multiple of --per-class {cfg.per_class}")
    if bool(cfg.data) != (cfg.dataset == "folder") and cfg.dataset not in sample.OFFICIAL:
        parser.error("--dataset folder and --data DIR go together")
    if cfg.gan_weight and cfg.method != "fpd":
        parser.error("--gan-weight goes with --method fpd")
    if cfg.method == "sdtt" and cfg.init_mask != 1:
        parser.error("--method sdtt begins with everything masked: --init-mask 1")
    if "RANK" in os.environ and (cfg.gan_weight or cfg.method != "fpd" or cfg.ablations):
        parser.error("several processes train FPD without the GAN, and nothing else")
    return cfg


# --------------------------------------------------------------------------------- trainings
class Muon(torch.optim.Optimizer):
    """Steps along matrices with equal singular values (Jordan et al. 2024), in float32.

    torch.optim.Muon works in bfloat16, which most CPUs only emulate: the teacher's minutes would
    become half an hour. Nor does it take the filters of a convolution.
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
                # the factor makes a step as large as AdamW's
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


class Optimiser:
    """Muon for weight matrices and filters, AdamW for embeddings, norms and biases; one cycle of
    the learning rate. With AdamW alone a part needs twice as many steps.

    clip    largest norm of the gradient
    """
    # name endings of 2-D parameters that are lookup tables or biases, not matrices
    TABLES = ("emb.weight", "embedding.weight", "embeddings.weight", "bias")

    def __init__(self, network, steps, lr, weight_decay=0.0, clip=math.inf):
        self.parameters, self.clip = list(network.parameters()), clip
        matrices, others = [], []
        for name, p in network.named_parameters():
            is_matrix = p.ndim in (2, 4) and not name.endswith(self.TABLES)
            (matrices if is_matrix else others).append(p)
        self.opts = [torch.optim.AdamW(others, lr, betas=(0.9, 0.95), weight_decay=weight_decay),
                     Muon(matrices, 2 * lr, weight_decay)]
        # with 10 steps or fewer the schedule would divide by 0
        total = max(steps + 1, 11)
        self.scheds = [torch.optim.lr_scheduler.OneCycleLR(opt, opt.param_groups[0]["lr"],
                                                           total_steps=total, pct_start=0.1)
                       for opt in self.opts]

    def update(self, loss):
        """One step down the gradient of the loss (). ValueError when it is not finite"""
        if not loss.isfinite():
            raise ValueError(f"the loss of a training is {loss.item()}")
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        for x in (*self.opts, *self.scheds):
            x.step()


@torch.no_grad()
def reseed_codes(vq, e, z, usage, everything=False):
    """Move unused codes to where the quantisation error is large.

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


def train_tokenizer(vq, steps, cfg, device):
    """VQGAN on the world's images: L1 + L2 reconstruction, codebook and commitment loss. At this
    size it is sharp without a GAN."""
    images, _, _ = tok.world(cfg, "train")
    usage = torch.zeros(vq.K, device=device)
    # first tenth without quantisation, so that k-means has encoder outputs to place the codes by
    begin = steps // 10
    optimiser = Optimiser(vq, steps, 5e-3)
    bar = tqdm(range(steps), "tokenizer")
    for step in bar:
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
        optimiser.update(loss)
        is_time = step > begin and step % 20 == 0 and step < 0.8 * steps
        if step == begin or is_time:
            reseed_codes(vq, e.detach().flatten(0, 1), z.flatten(), usage, step == begin)
        if step % 20 == 0:
            bar.set_postfix(reconstruction=f"{reconstruction.item():.3f}",
                            codes=int((usage > 1).sum()))


def train_classifier(net, steps, cfg, device, split):
    """Phi or the judge: a classifier of the world's classes; of scenes, of the shapes that occur.

    Phi also learns to paint, from every position of its last map, that position's own pixels and
    the whole image in small. A classifier forgets what no class depends on, such as the background,
    and the drift cannot correct what Phi does not see. Since drafts are compared position by
    position, all positions only make the same choice if each of them sees what the others show.
    (DINOv3, which learned without classes and by attention, sees both.)   split "phi" | "judge"
    """
    images, labels, _ = tok.world(cfg, split)
    loss_of = F.cross_entropy
    if cfg.dataset == "scenes":
        # which of the 24 coloured shapes, where the caption names every colour
        objects = [tok.parse_caption(caption)["objects"] for caption in labels]
        named = [i for i, pairs in enumerate(objects) if all(colour for colour, _ in pairs)]
        classes = [(colour, shape) for colour in tok.COLOURS for shape in tok.SHAPES]
        labels = torch.tensor([[float(pair in objects[i]) for pair in classes] for i in named])
        images = images[named]
        loss_of = F.binary_cross_entropy_with_logits
    width = net.stem.out_channels
    # its own 8 x 8 pixels, and the 32 x 32 of the image as 8 x 8
    painter = nn.Conv2d(4 * width, 2 * 3 * 8 ** 2, 1).to(device)
    trained = nn.ModuleList([net, painter]) if split == "phi" else net
    optimiser = Optimiser(trained, steps, 3e-3, weight_decay=0.01)
    for _ in tqdm(range(steps), split):
        i = torch.randint(len(images), (64,))
        x, target = tok.to_float(images[i]).to(device), labels[i].to(device)
        last = net.maps(x)[-1]                                                  # (B, D, 4, 4)
        loss = loss_of(net.head(last.mean((2, 3))), target)
        if split == "phi":
            own, whole = painter(last).chunk(2, 1)                              # (B, 192, 4, 4)
            small = F.avg_pool2d(x, 4).flatten(1)[:, :, None, None]             # (B, 192, 1, 1)
            loss = loss + 5 * F.mse_loss(F.pixel_shuffle(own, 8), x)
            loss = loss + 5 * (whole - small).pow(2).mean()
        optimiser.update(loss)


def train_teacher(teacher, steps, cfg, device, vq, text):
    """MaskGIT or MaskGen on the tokens: predict what is masked (Eq. 2). The condition is dropped
    for one image in ten, so that guidance works."""
    images, c, _ = tok.world(cfg, "train")
    with torch.no_grad():
        z = torch.cat([vq.encode(tok.to_float(part).to(device)) for part in images.split(200)])
    c = c.to(device) if text is None else text.encode(c)                        # (N, ...)
    sample.set_text(text, teacher)
    generator = torch.Generator(device).manual_seed(0)
    optimiser = Optimiser(teacher, steps, 2e-3, weight_decay=0.03, clip=1.0)
    bar = tqdm(range(steps), "teacher")
    for step in bar:
        i = torch.randint(len(z), (64,), device=device)
        r = fpd.sample_ratio(64, 0, 1, generator, device)                       # (B,)
        z_masked, is_masked = fpd.remask(z[i], r, vq.K, generator)              # (B, L)
        logits = teacher(z_masked, c[i], torch.rand(64, device=device) < 0.1)   # (B, L, K)
        loss = F.cross_entropy(logits[is_masked], z[i][is_masked])              # Eq. 2
        optimiser.update(loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


# --------------------------------------------------------------------------------- preparation
# The networks of --smoke with imagenet and laion: the official ones' classes, tiny, random weights
TINY_PHI = (Backbone, dict(name="vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", image_size=64))
TINY = {
    "imagenet": {
        "phi": TINY_PHI,
        "tokenizer": (tok.VQGAN, dict(ch_mult=(1, 1, 2, 2), image_size=64)),
        "teacher": (MaskGIT, dict(num_classes=1000))},
    "laion": {
        "phi": TINY_PHI,
        "text": (TextEncoder, dict(width=64, depth=2, heads=1)),
        "tokenizer": (tok.TATiTok, dict(K=64, d=8, L=32, width=(64, 64), depth=(2, 2),
                                        text=(77, 64), image_size=64)),
        "teacher": (MaskGen, dict(K=64, L=32, width=64, text_width=64, T=77))}}


def save(path, content):
    """torch.save that neither a kill nor a full disk can leave half done."""
    new = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(content, new)
    os.replace(new, path)


def prepared(part, seed, network, args, train, steps, cfg, device, saved, *others, before=""):
    """A part of a small world: its file in runs/prepared/, trained first where it is not there.

    part, seed     its name; of its random weights and its training
    network, args  its class and their arguments
    train, others  function (network, steps, cfg, device, *others), which trains it
    before         file of the part that the training depends on
    saved          {part: dict(cls=, args=, state=, file=)} as of sample.load_part: what is there is
                   taken (--resume), what is not is added
    The file's name carries a hash of settings, images and the source of `network` and `train`.
    """
    if part not in saved:
        key = [seed, args, cfg.dataset, cfg.smoke, steps, tok.fingerprint(cfg, times=True), before,
               inspect.getsource(network), inspect.getsource(train)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
        path = Path("runs/prepared", f"{cfg.dataset}-{part}-{digest}.pt")
        if path.exists():
            print(f"{part}: {path} is there")
        else:
            print(f"{part}: training for {steps} steps")
            torch.manual_seed(seed)
            model = network(**args).to(device)
            train(model, steps, cfg, device, *others)
            path.parent.mkdir(parents=True, exist_ok=True)
            save(path, dict(cls=network.__name__, args=args, state=model.state_dict(),
                            file=path.name))
        saved[part] = torch.load(path, map_location="cpu", weights_only=True)
    return sample.load_part(saved[part], device)


def prepare(cfg, device, saved):
    """Everything that distillation takes as given, trained where it is not there yet.

    saved     what the checkpoint of the run to resume holds of its parts, or {}
    returns   namespace of the networks tokenizer, teacher, phi, judge (None for captions) and text
              (None for labels); names; captions to train with; saved and images, for the checkpoint
    """
    if cfg.dataset in sample.OFFICIAL:
        return official_parts(cfg, device, saved)
    _, conditions, names = tok.world(cfg, "train")
    parts = types.SimpleNamespace(text=None, judge=None, captions=None, names=names, saved=saved,
                                  images=tok.fingerprint(cfg))
    # Codes have length 1. Else those of the dark, middle and light background lie on one line, and
    # the gradient of Eq. 8, which is linear in the codes, never raises the one between two others.
    # Several small objects have more kinds of edges, and need more codes
    vq, n_classes, seed = dict(l2norm=True), len(names), 0
    if cfg.dataset == "scenes":
        words = dict(width=128)
        saved["text"] = dict(cls="Words", args=words, state=Words(**words).state_dict())
        parts.text, parts.captions = sample.load_part(saved["text"], device), conditions
        vq, n_classes, seed = dict(l2norm=True, K=256), len(tok.shapes_names()), 1
    rest = (cfg, device, saved)
    parts.tokenizer = prepared("tokenizer", seed, tok.VQGAN, vq, train_tokenizer,
                               cfg.tokenizer_steps, *rest)
    parts.phi = prepared("phi", seed + 1, ConvNet, dict(num_classes=n_classes, width=32),
                         train_classifier, cfg.classifier_steps, *rest, "phi")
    # scenes needs no judge: its scorer is exact
    if parts.text is None:
        parts.judge = prepared("judge", 2, ConvNet, dict(num_classes=n_classes, width=24),
                               train_classifier, cfg.classifier_steps, *rest, "judge")
    size = dict(K=parts.tokenizer.K, L=parts.tokenizer.L)
    network = MaskGen
    if parts.text is None:
        network, size["num_classes"] = MaskGIT, n_classes
    parts.teacher = prepared("teacher", 3, network, size, train_teacher, cfg.teacher_steps, *rest,
                             parts.tokenizer, parts.text, before=saved["tokenizer"]["file"])
    sample.set_text(parts.text, parts.teacher)
    return parts


def official_parts(cfg, device, saved):
    """The paper's networks: MaskGIT and its VQGAN, or MaskGen, TA-TiTok and CLIP; DINOv3 as Phi. As
    of `prepare`; with --smoke those of TINY; with the GAN also feature_files, for
    models.load_discriminator."""
    if cfg.smoke:
        for seed, (part, (network, args)) in enumerate(TINY[cfg.dataset].items()):
            torch.manual_seed(seed)
            saved[part] = dict(cls=network.__name__, args=args, state=network(**args).state_dict())
        parts = sample.load_parts(saved, device)
        parts.captions = parts.names = imagenet_names() if parts.text is None else sample.PROMPTS
    else:
        parts = sample.load_official(cfg.dataset, cfg.weights, device)
        path = find_backbone(BACKBONE, cfg.weights)
        parts.phi = load_backbone(path, parts.tokenizer.image_size).to(device)
        if cfg.gan_weight:
            parts.feature_files = {part: find_backbone(name, cfg.weights)
                                   for part, name in FEATURE_NETWORKS.items()}
        if parts.text is not None:
            parts.captions = tok.read_captions(cfg.captions)
            parts.names = parts.captions[:8]
    parts.saved, parts.images = saved, ""
    return parts


# --------------------------------------------------------------------------------- distillation
def draw_condition(parts, cfg, generator):
    """The batch's condition: per_class times each of batch / per_class classes or captions, drawn
    without replacement as far as there are that many. -> (B, ...)"""
    groups = cfg.batch // cfg.per_class
    n = len(parts.names if parts.text is None else parts.captions)
    rounds = [torch.randperm(n, generator=generator, device=generator.device)
              for _ in range(math.ceil(groups / n))]
    c = torch.cat(rounds)[:groups]                                              # (G,)
    if parts.text is not None:
        # a caption is read once, however many drafts it gets
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


def distil(cfg, parts, folder, device):
    """The loop. It leaves checkpoint.pt, log.jsonl, samples/ and pictures in `folder`.

    Under torchrun every process draws its own conditions and drafts and compares them among
    themselves; gradients are averaged, and rank 0 writes.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    # shapes stay the same from step to step: cuDNN benchmarks its convolution algorithms once
    torch.backends.cudnn.benchmark = device == "cuda"
    student = copy.deepcopy(parts.teacher).requires_grad_(True)
    ema = copy.deepcopy(parts.teacher)
    opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=0.0,
                            fused=True if device == "cuda" else None)
    seed = cfg.seed + 1_000_003 * rank
    generator = torch.Generator(device).manual_seed(seed)
    trained = dict(student=student, ema=ema, opt=opt)
    gan, baseline = None, None
    if cfg.gan_weight:
        gan = fpd.Gan(cfg, parts, device)
        trained |= gan.trained
    if cfg.method != "fpd":
        baseline = {"dimo": fpd.DiMO, "sdtt": fpd.SDTT}[cfg.method](cfg, parts)
        trained |= baseline.trained
    # where the GPU has bfloat16, networks run in it, the decoder's weights too; the drift does not
    is_half = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device, torch.bfloat16, enabled=is_half)
    tokenizer = copy.deepcopy(parts.tokenizer).to(torch.bfloat16) if is_half else parts.tokenizer
    lift = fpd.Lift(tokenizer, parts.phi, cfg)

    def save_checkpoint(step):
        states = {name: x.state_dict() for name, x in trained.items()}
        save(folder / "checkpoint.pt",
             dict(step=step, config=dataclasses.asdict(cfg), names=parts.names, parts=parts.saved,
                  images=parts.images, rng=generator.get_state(), **states))

    start = 0
    if cfg.resume:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        start = saved["step"]
        for name, x in trained.items():
            # a run that began without the GAN can go on with it
            if name in saved:
                x.load_state_dict(saved[name])
        generator.manual_seed(seed + start)
        if rank == 0:
            generator.set_state(saved["rng"])
    elif rank == 0:
        (folder / "log.jsonl").unlink(missing_ok=True)
        sample_grid(cfg, parts, ema, folder, 0)
        save_checkpoint(0)
    model = student
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
        model.K, model.L = student.K, student.L
    # Ctrl-C and a scheduler's signal: the step under way is finished and saved (torchrun's
    # processes would not stop after the same step, and simply end)
    signals = () if dist.is_initialized() else (signal.SIGINT, signal.SIGTERM)
    received = []
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number))
                for number in signals}
    bar = tqdm(range(start + 1, cfg.steps + 1), "distil", initial=start, total=cfg.steps)
    for step in bar:
        opt.param_groups[0]["lr"] = learning_rate(step, cfg)
        c = draw_condition(parts, cfg, generator)                               # (B, ...)
        if baseline:
            with autocast:
                loss, logs = baseline.step(model, c, step, generator)
            loss.backward()
        else:
            with autocast:
                loss, logs, images = fpd.fpd_step(model, parts.teacher, lift, parts.tokenizer.E,
                                                  c, cfg, generator)            # Eq. 4 to 8
            # the backward pass stops at the decoded drafts, where the GAN's gradient is scaled by
            # that of the drift (Sec. 3.4), and then goes on through decoder and student
            gradient, = torch.autograd.grad(loss, images)                       # (B, 3, H, W)
            if gan:
                with autocast:
                    gradient, gan_logs = gan.add(gradient, images, step, generator)
                logs |= gan_logs
            images.backward(gradient)
        logs["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        opt.step()
        # at once, so that the gradients are gone while the next step's graph grows
        opt.zero_grad(set_to_none=True)
        # EMA with a ramp, so that the teacher's weights, its first ones, are soon forgotten
        update_ema(ema, student, min(cfg.ema, (1 + step) / (10 + step)))
        is_saved = step % cfg.save_every == 0 or step == cfg.steps or received
        if step % cfg.log_every == 0 or is_saved:
            # reading the numbers waits for the GPU, so not in every step
            numbers = {name: x.item() for name, x in dict(loss=loss, **logs).items()}
            for name, x in numbers.items():
                if not math.isfinite(x):
                    raise ValueError(f"{name} is {x} at step {step}: the run stops, and "
                                     f"{folder}/checkpoint.pt stays as it was before")
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", entropy=f"{numbers['entropy']:.2f}")
        if rank:
            continue
        if step % cfg.log_every == 0:
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(dict(step=step, **numbers)) + "\n")
        if step % cfg.sample_every == 0:
            sample_grid(cfg, parts, ema, folder, step)
        if is_saved:
            save_checkpoint(step)
        if received:
            how = "the same command" if cfg.ablations else f"train.py --resume --name {folder.name}"
            print(f"\nstopped after step {step}. Go on with: {how}")
            sys.exit(128 + received[0])
    for number, handler in handlers.items():
        signal.signal(number, handler)


def sample_grid(cfg, parts, ema, folder, step):
    """samples/: teacher in 16 steps and in 1, student in 1, of the same labels or captions.
    samples.gif: the sheets one after the other. step.png: one step of the training, now."""
    c, captions = sample.grid_conditions(parts)
    rows = []
    for title, model, steps in (("teacher 16", parts.teacher, 16), ("teacher 1", parts.teacher, 1),
                                ("student 1", ema, 0)):
        images = sample.generate(model, parts.tokenizer, c, cfg, steps, seed=cfg.seed)
        rows.append((title, images))
    sample.step_grid(parts, ema, cfg).save(folder / "step.png")
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    sample.image_grid(rows, captions).save(samples / f"{step:06d}.png")
    frames = []
    for file in sorted(samples.glob("*.png")):
        frame = Image.open(file).convert("RGB")
        frame.thumbnail((720, frame.height))
        ImageDraw.Draw(frame).text((6, 4), f"step {int(file.stem)}", "black")
        frames.append(frame.quantize(128, dither=Image.Dither.NONE))
    frames[0].save(folder / "samples.gif", save_all=True, append_images=frames[1:], duration=600,
                   loop=0)


# --------------------------------------------------------------------------------- ablations
def teacher_passes(cfg):
    """Passes of the teacher's network for each image of a batch in a run; guidance takes two."""
    guided = 1 if cfg.refine_guidance == 1 else 2
    if cfg.method == "sdtt":
        # a canvas in 4 steps, of which MaskGIT's first is without guidance, in three of the four
        # rounds; two steps as the target in each round, guided in the first
        canvas = 8 if cfg.dataset == "scenes" else 7
        return round(cfg.steps * (3 * canvas + 2 * guided + 2 + 2 + 2) / 4)
    return cfg.steps * guided


def ablation_rows(base):
    """Those rows of ABLATIONS that differ from `base`, and the base itself -> a list like it. With
    per_class 1 the whole batch is compared, and no row changes that."""
    rows = []
    for table, row, settings, paper in ABLATIONS:
        changed = {name: value for name, value in settings.items()
                   if getattr(base, name) != value and (name != "per_class" or base.per_class > 1)}
        if changed or not settings:
            rows.append((table, row, changed, paper))
    return rows


def ablate(base, parts, root, device):
    """Tables 3 and 4 in miniature: every row with each seed, over the same networks.

    base   Config, the settings that the rows share
    root   the folder of their runs, <row>-<seed>/, and of report.json and report.png
    A row that has its score.json is kept."""
    n = 48 if base.smoke else 960
    parts.cfg = base
    scorer = evaluate.scorer(parts, tok.world(base, "test")[:2], n)
    rows, pictures, (c, captions) = [], [], sample.grid_conditions(parts)
    for table, row, settings, paper in ablation_rows(base):
        scores = []
        for seed in range(base.seed, base.seed + base.ablations):
            slug = "-".join(re.sub("[^a-z0-9 ]", "", row.lower()).split())
            name = f"{slug}-{seed}"
            folder = root / name
            cfg = dataclasses.replace(base, **settings, seed=seed, name=f"{root.name}/{name}")
            if cfg.method == "sdtt":
                # it asks the teacher as often as the base does, in four rounds of equal length
                steps = cfg.steps * teacher_passes(base) / teacher_passes(cfg)
                cfg.steps = max(4, 4 * round(steps / 4))
            # a row that is there counts only for these settings and networks
            files = {part: x.get("file") for part, x in parts.saved.items()}
            made_with = json.dumps(dataclasses.asdict(cfg) | dict(ablations=0, parts=files))
            folder.mkdir(exist_ok=True)
            config = folder / "config.json"
            if config.exists() and config.read_text() != made_with:
                raise ValueError(f"{folder} was made with other settings or networks: choose "
                                 "another --name, or remove it")
            config.write_text(made_with)
            if not (folder / "score.json").exists():
                print(f"\n{row}, seed {seed}: {folder}")
                distil(cfg, parts, folder, device)
                run = sample.load_run(folder, device)
                score = evaluate.score(run, run.student, 0, *scorer)
                (folder / "score.json").write_text(json.dumps(score, indent=1))
            scores.append(json.loads((folder / "score.json").read_text()))
        run = sample.load_run(root / f"{slug}-{base.seed}", device)
        title = f"{row}  {evaluate.headline(evaluate.means(scores))}"
        pictures.append((title, sample.generate(run.student, run.tokenizer, c, run.cfg, 0)))
        rows.append(dict(table=table, row=row, settings=settings, paper=paper,
                         teacher_passes=teacher_passes(cfg), scores=scores))
    for steps in (1, 16):
        scores = [evaluate.score(parts, parts.teacher, steps, *scorer)]
        rows.insert(0, dict(table="", row=f"teacher {steps}", settings={}, paper=None,
                            teacher_passes=None, scores=scores))
        images = sample.generate(parts.teacher, parts.tokenizer, c, base, steps)
        pictures.insert(0, (f"teacher {steps}  {evaluate.headline(scores[0])}", images))
    protocol = dict(dataset=base.dataset, smoke=base.smoke, images=n, seeds=base.ablations,
                    device=device, torch=torch.__version__, base=dataclasses.asdict(base))
    evaluate.write_report(root, protocol, rows, evaluate.ablation_table, pictures, captions)


# --------------------------------------------------------------------------------- the command
def save_student(folder):
    """student.pt: of a checkpoint, only what sample.py draws with, as float16."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    parts = {part: x for part, x in saved["parts"].items() if part in ("tokenizer", "text")}
    parts["student"] = saved["parts"]["teacher"] | dict(state=saved["ema"])
    for part, x in parts.items():
        parts[part] = x | dict(state={key: value.half() for key, value in x["state"].items()})
    kept = {key: saved[key] for key in ("step", "config", "names", "images")}
    save(folder / "student.pt", kept | dict(parts=parts))


def new_folder(cfg):
    """runs/<name>: the one to resume, or made here; without --name the next one that is free."""
    if cfg.resume:
        return Path("runs", cfg.name)
    method = "" if cfg.method == "fpd" else cfg.method
    parts = (cfg.dataset, method, "smoke" if cfg.smoke else "")
    name = cfg.name or "-".join(filter(None, parts))
    if cfg.ablations:
        # rows that are there are kept
        folder = Path("runs", f"ablations-{name}")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    for i in itertools.count(1):
        folder = Path("runs", name if i == 1 else f"{name}-{i}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if cfg.name:
                raise


def main():
    cfg = parse()
    device = "cuda" if cfg.gpus or (cfg.gpus is None and torch.cuda.is_available()) else "cpu"
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()
    changed = [f"{field.name}={getattr(cfg, field.name)}" for field in dataclasses.fields(cfg)
               if getattr(cfg, field.name) != field.default]
    print(f"{device}, torch {torch.__version__}; settings (all: config.json): {' '.join(changed)}")
    if device == "cuda" and cfg.lift_chunk is None and cfg.dataset in sample.OFFICIAL:
        # measured on an H200: 30.1 GB for imagenet, 48.8 GB for laion; 14.9 GB in pieces of 8
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < (36 if cfg.dataset == "imagenet" else 54):
            cfg.lift_chunk = 8
            print(f"{free:.0f} GB of GPU memory are free: --lift-chunk 8")
    begin = time.time()
    saved = {}
    if cfg.resume:
        checkpoint = torch.load(Path("runs", cfg.name, "checkpoint.pt"), map_location="cpu",
                                weights_only=True, mmap=True)
        saved, step = checkpoint["parts"], checkpoint["step"]
        if checkpoint["images"] != tok.fingerprint(cfg):
            raise ValueError(f"--data {cfg.data}: not the images that the run was trained on")
        was = learning_rate(step, Config(**checkpoint["config"]))
        now = learning_rate(step + 1, cfg)
        if step > WARMUP and now > 1.01 * was:
            print(f"the learning rate rises from {was:.1e} to {now:.1e}: it now falls later")
    parts = prepare(cfg, device, saved)
    folder = new_folder(cfg) if rank == 0 or cfg.resume else None
    minutes = f"minutes: prepare {(time.time() - begin) / 60:.1f}"
    if cfg.ablations:
        ablate(cfg, parts, folder, device)
        return
    if rank == 0:
        print(f"{folder}: distilling for {cfg.steps} steps")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    begin = time.time()
    distil(cfg, parts, folder, device)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank:
        return
    minutes += f", distil {(time.time() - begin) / 60:.1f}"
    if cfg.dataset not in sample.OFFICIAL:
        begin = time.time()
        run = sample.load_run(folder, device)
        evaluate.report(run, tok.world(cfg, "test")[:2], folder)
        minutes += f", report {(time.time() - begin) / 60:.1f}"
        save_student(folder)
    print(f"{minutes}\nthe pictures are in {folder}/; then try: python sample.py --run {folder}")
    if cfg.smoke:
        print("The set-up works. Nothing was learnt in a smoke run, and its pictures mean nothing.")


if __name__ == "__main__":
    sample.run_command(main)
