"""train.py - the whole run, from images to a one-step student and its report.

    prepare (only once)   images -> tokenizer (VQGAN) -> teacher (MaskGIT, Eq. 2)
                          images -> Phi, and the evaluation classifier ("judge")
                          imagenet, laion: the public files
    distil                student = copy of the teacher; fpd.fpd_step (Eq. 4 to 8), AdamW, EMA
    report                runs/<name>/: config.json, log.jsonl, samples/, samples.gif, step.png,
                          checkpoint.pt, student.pt, report.jsonl, report.png

    python train.py                                  # the shapes world on a CPU
    python train.py --dataset imagenet --gpus 1      # the paper's class-conditional run
"""
import argparse
import copy
import dataclasses
import datetime
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
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
from models import (BACKBONE, FEATURE_NETWORKS, SAMPLING, WEIGHTS, Backbone, ConvNet, Discriminator,
                    MaskGen, MaskGIT, TextEncoder, Words, find_backbone, imagenet_names,
                    load_backbone, load_discriminator)


# --------------------------------------------------------------------------------- settings
def option(default, help, group=None):
    """A field of Config: its default, and the text that --help prints. "paper" or "ours" says where
    the default is from. group: the title of the group of settings that begins here."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group))


def int_or_none(text):
    return None if text == "none" else int(text)


@dataclasses.dataclass
class Config:
    """Every setting, written once. `train.py --help` prints all of them, and which data sets and
    methods change a default (SMALL, CAPTIONS and METHODS below). A smoke run also sets SMOKE."""
    dataset: str = option("shapes", "shapes, scenes: drawn by the code; folder: your own images; "
                          "imagenet, laion: the public networks", "what runs")
    data: str = option("", "folder: a subfolder for each class; imagenet, laion: the GAN's images")
    captions: str = option("", "laion: a text file with one caption per line")
    method: str = option("fpd", "fpd: the paper's; dimo, sdtt: for comparison (Table 2)")
    name: str = option("", "folder of the run in runs/ (by default: data set and method)")
    resume: bool = option(False, "go on with an interrupted run, the newest or --name")
    gpus: int = option(None, "0: CPU; 1: GPU (default: 1 if there is one); several GPUs: torchrun")
    smoke: bool = option(False, "a few steps of tiny networks: tests the set-up, learns nothing")
    ablations: int = option(0, "Tables 2 to 4 in miniature, with this many seeds for each row")
    seed: int = option(0, "random seed of the student, its samples and its report, 0 to 4293")

    tokenizer_steps: int = option(600, "training steps of the VQGAN, batch 32",
                                  "preparation of the small worlds: once, shared by all seeds")
    classifier_steps: int = option(200, "steps of Phi and of the evaluation classifier, batch 64")
    teacher_steps: int = option(1200, "training steps of the MaskGIT or MaskGen, batch 64")

    weights: str = option(WEIGHTS, "folder of the public files; missing ones come from the hub",
                          "the teacher and its sampler (models.SAMPLING)")
    sample_guidance: float = option(SAMPLING["imagenet"]["sample_guidance"],
                                    "guidance in the sampler's last step, 1: none")
    confidence_noise: float = option(SAMPLING["imagenet"]["confidence_noise"],
                                     "Gumbel noise on the tokens' confidence; it falls to 0")

    init_mask: float = option(0.9, "r_init, the masked share of z_init; ours", "the method")
    temperature: float = option(1.0, "temperature of the draft (Eq. 4), also after training; ours")
    draft_source: str = option("student", "what is refined: the student's draft, or random codes "
                               "(Table 3b); paper")
    remask: tuple = option((0.1, 0.9), "lowest and highest r of Eq. 5 (fpd.sample_ratio); ours")
    refine_guidance: float = option(2.0, "guidance of the refinement (Eq. 5), 1: none; ours")
    space: str = option("feature", "where drafts are compared (Table 4a); paper")
    blocks: tuple = option((2, 5, 8, 11), "blocks of Phi that are compared (Table 4b); paper")
    grid: int = option(4, "features are averaged to grid x grid positions (Table 4b); paper")
    bandwidths: tuple = option((0.02, 0.05, 0.2), "H of Eq. 7 (Table 4a); paper")
    affinity: str = option("joint", "joint: one normalisation of attraction and repulsion; "
                           "apart: each has its own; ours")
    own_pair: bool = option(False, "a draft is one of its own negatives, and its own refinement "
                            "one of its targets (Eq. 6); ours")
    per_class: int_or_none = option(32, "drafts of a class in a batch; only these are compared; 16 "
                                    "with the GAN; none: the whole batch is compared; ours")
    estimator: str = option("ste", "ste: Eq. 8; soft: the soft embedding (Table 3a); paper")
    gan_weight: float = option(0.0, "weight of the GAN (Sec. 3.4), in units of the drift; 0: none")

    steps: int = option(100_000, "training steps of the student; ours", "optimisation")
    batch: int = option(32, "drafts in a batch, of each process under torchrun; paper")
    lr: float = option(1e-5, "learning rate of AdamW; paper")
    decay: float = option(0.0, "share of the steps, at the end, in which lr falls to 0; ours")
    ema: float = option(0.9999, "decay of the moving average of the student's weights; ours")
    lift_chunk: int_or_none = option(None, "images that are lifted at a time, for less memory; by "
                                     "default all (none), or 8 on a small GPU")

    log_every: int = option(10, "steps between lines of log.jsonl", "bookkeeping")
    sample_every: int = option(1000, "steps between grids of samples")
    save_every: int = option(1000, "steps between checkpoints")


# The values that a setting can have, where they are few.
CHOICES = dict(dataset=("shapes", "scenes", "folder", "imagenet", "laion"),
               method=("fpd", "dimo", "sdtt"), gpus=(0, 1), draft_source=("student", "random"),
               space=("feature", "pixel"), affinity=("joint", "apart"), estimator=("ste", "soft"))
# The student's gradient is clipped to this norm (ours).
CLIP = 1.0
# The number of first steps in which the student's learning rate rises to its value (ours).
WARMUP = 20
# What the small worlds change. Their student is 200 times smaller than MaskGIT and trains for
# minutes. At temperature 1 its drafts would be patchwork, because tokens are drawn independently.
SMALL = dict(batch=64, steps=320, lr=1.5e-4, decay=0.7, ema=0.985, temperature=0.3, per_class=64,
             sample_guidance=2.0, blocks=(0, 1, 2, 3), sample_every=80, save_every=50)
# What captions change. Most captions occur once per batch, so a draft's own refinement is the only
# target with its caption. The whole batch is therefore compared, and Eq. 6 is used as printed.
CAPTIONS = dict(own_pair=True, affinity="apart", per_class=None,
                confidence_noise=SAMPLING["laion"]["confidence_noise"])
DATASETS = {"shapes": SMALL, "scenes": SMALL | CAPTIONS, "folder": SMALL, "imagenet": {},
            "laion": CAPTIONS | SAMPLING["laion"] | dict(batch=64)}
# What the other methods change. Neither compares drafts with each other. Di[M]O has its authors'
# share of masked tokens. SDTT begins with all tokens masked: its only noise is their sampling. Its
# learning rate falls in the last of its four rounds.
METHODS = {"fpd": {}, "dimo": dict(init_mask=0.6, temperature=1.0, per_class=None),
           "sdtt": dict(init_mask=1.0, temperature=1.0, per_class=None, decay=0.25)}
# What the GAN changes, unless the whole batch is compared: its real images have several classes.
WITH_GAN = dict(per_class=16)
# A smoke run has no decay, so that 2 steps, and 2 more after --resume, are the same as 4.
SMOKE = dict(tokenizer_steps=4, classifier_steps=4, teacher_steps=4, steps=4, decay=0.0,
             log_every=1, sample_every=2, save_every=2)
# The only settings that may be typed beside --resume; all others are the checkpoint's.
RESUMABLE = {"resume", "name", "gpus", "data", "weights", "steps", "lift_chunk", "log_every",
             "sample_every", "save_every"}
# The rows of --ablations: the paper's table, a name, what differs from the base, and the paper's
# GenEval score (overall). In the paper's soft rows the teacher sees the mixtures, too; here it sees
# the sampled tokens. Without captions, "STE + GAN" is to be compared with "16 drafts of a class".
ABLATIONS = [
    ("", "FPD, the base", {}, 0.43),
    ("3a", "soft embedding", dict(estimator="soft"), 0.38),
    ("3a", "soft + GAN", dict(estimator="soft", gan_weight=0.5, **WITH_GAN), 0.42),
    ("3a", "STE + GAN", dict(gan_weight=0.5, **WITH_GAN), 0.45),
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


def described_default(name, default):
    """Text for --help: the default of a setting, and which data sets and methods change it."""
    changed = {}
    for key, settings in (DATASETS | METHODS).items():
        if settings.get(name, default) != default:
            changed.setdefault(settings[name], []).append(key)
    values = [] if default in (None, "") else [f"default: {default}"]
    values += [f"{', '.join(keys)}: {'none' if value is None else value}"
               for value, keys in changed.items()]
    return f" [{'; '.join(values)}]" if values else ""


def parse(argv=None):
    """Command line -> Config: its defaults, changed by data set, method and smoke run, and then by
    what was typed. With --resume, the checkpoint's settings replace the defaults."""
    parser = argparse.ArgumentParser(
        description="Distil a masked discrete diffusion model into one step (FPD).",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for field in dataclasses.fields(Config):
        if field.metadata["group"]:
            group = parser.add_argument_group(field.metadata["group"])
        how = dict(type=field.type, choices=CHOICES.get(field.name))
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif field.type is tuple:
            how = dict(type=type(field.default[0]), nargs=2 if field.name == "remask" else "+")
        how["help"] = field.metadata["help"] + described_default(field.name, field.default)
        group.add_argument("--" + field.name.replace("_", "-"), **how)
    typed = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items()}

    step = 0
    if typed.get("resume"):
        folder = Path("runs", typed["name"]) if "name" in typed else sample.newest_run()
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True,
                                mmap=True)
        settings, step = checkpoint["config"] | dict(name=folder.name), checkpoint["step"]
    else:
        settings = DATASETS[typed.get("dataset", "shapes")] | METHODS[typed.get("method", "fpd")]
        if typed.get("gan_weight") and settings.get("per_class", Config.per_class):
            settings = settings | WITH_GAN
        if typed.get("smoke"):
            settings = settings | SMOKE
    cfg = Config(**settings | typed)

    for message, is_wrong in refusals(cfg, typed, step).items():
        if is_wrong:
            parser.error(message)
    return cfg


def refusals(cfg, typed, step):
    """Why a command line is refused -> {message: does it apply?}   typed: the settings that were
    typed; step: how many the run to resume has done"""
    is_public, has_gan, is_sdtt = (cfg.dataset in sample.PUBLIC, bool(cfg.gan_weight),
                                   cfg.method == "sdtt")
    beside = ", ".join("--" + name.replace("_", "-") for name in sorted(RESUMABLE - {"resume"}))
    return {
        f"--resume keeps the run's settings; only these can be given beside it: {beside}":
            cfg.resume and not typed.keys() <= RESUMABLE,
        f"--steps {cfg.steps}: the run has already done {step}": cfg.steps < step,
        "the rounds of sdtt are quarters of --steps, which --resume cannot change":
            cfg.resume and is_sdtt and "steps" in typed,
        "--method sdtt starts fully masked: --init-mask 1": is_sdtt and cfg.init_mask != 1,
        "--init-mask, --remask LOW HIGH, --decay and --ema are shares, from 0 to 1":
            not all(0 <= x <= 1 for x in (cfg.init_mask, *cfg.remask, cfg.decay, cfg.ema))
            or cfg.remask[0] > cfg.remask[1],
        f"--batch {cfg.batch} is not a multiple of --per-class {cfg.per_class}":
            cfg.batch % (cfg.per_class or 1) != 0,
        f"--seed has to be 0 to {4294 - max(1, cfg.ablations)}":
            not 0 <= cfg.seed <= 4294 - max(1, cfg.ablations),
        "--gpus 1: torch sees no GPU": cfg.gpus == 1 and not torch.cuda.is_available(),
        "--name is the name of one folder, without /": Path(cfg.name).name != cfg.name,
        f"runs/{cfg.name} exists already: choose another --name, or --resume":
            cfg.name and Path("runs", cfg.name).exists() and not (cfg.resume or cfg.ablations),
        "--data DIR is for --dataset folder and for the GAN of imagenet and laion, which need it":
            bool(cfg.data) != (cfg.dataset == "folder" or is_public and has_gan),
        "--captions FILE is for --dataset laion, which needs it":
            bool(cfg.captions) != (cfg.dataset == "laion"),
        f"--captions {cfg.captions}: there is no such file":
            cfg.captions and not Path(cfg.captions).is_file(),
        "--ablations are for FPD in shapes, scenes or folder, without a change of their rows":
            cfg.ablations and (is_public or typed.keys() & {"method", "estimator", "gan_weight"}),
        "--gan-weight needs --method fpd": has_gan and cfg.method != "fpd",
        "torchrun works only with --method fpd, without the GAN and without --ablations":
            "RANK" in os.environ and (has_gan or cfg.method != "fpd" or cfg.ablations)}


# --------------------------------------------------------------------------------- training
class Muon(torch.optim.Optimizer):
    """Steps along matrices with equal singular values (Jordan et al. 2024), in float32.

    torch.optim.Muon works in bfloat16, which most CPUs only emulate: the teacher would need half an
    hour in place of minutes. It also does not accept the filters of a convolution.
    """
    def __init__(self, matrices, lr, weight_decay, momentum):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - momentum)
                # A filter is a matrix, too: (out, in, h, w) -> (out, in h w).
                update = p.grad.lerp(state["mean"], momentum).flatten(1)
                direction = orthogonalised(update).view_as(p)
                p.mul_(1 - lr * group["weight_decay"])
                # The factor makes a step as large as AdamW's.
                p.sub_(direction, alpha=0.2 * math.sqrt(max(update.shape)) * lr)


def orthogonalised(G):
    """G (n, m) = U S V^T -> nearly U V^T: five rounds of the Newton-Schulz iteration, after which
    all singular values are about 0.7 to 1.2."""
    if len(G) > G.shape[1]:
        # The smaller of the two Gram matrices is cheaper.
        return orthogonalised(G.T).T
    X = G / G.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = X @ X.T
        X = 3.4445 * X + (2.0315 * gram @ gram - 4.7750 * gram) @ X
    return X


class Optimiser:
    """Muon for weight matrices and filters, AdamW for embeddings, norms and biases, both with a
    one-cycle learning rate. With AdamW alone a network needs twice as many steps. clip: the largest
    norm of the gradient."""
    # Name endings of 2-D parameters that are lookup tables or biases, not matrices.
    TABLES = ("emb.weight", "embedding.weight", "embeddings.weight", "bias")

    def __init__(self, network, steps, lr, weight_decay=0.0, clip=math.inf):
        self.parameters, self.clip = list(network.parameters()), clip
        matrices, others = [], []
        for name, p in network.named_parameters():
            is_matrix = p.ndim in (2, 4) and not name.endswith(self.TABLES)
            (matrices if is_matrix else others).append(p)
        self.opts = [torch.optim.AdamW(others, lr, betas=(0.95, 0.95), weight_decay=weight_decay),
                     Muon(matrices, 2 * lr, weight_decay, momentum=0.95)]
        # The momentum falls from 0.95 to 0.85 while the learning rate rises, and rises again while
        # that falls (Smith and Topin 2019). With 10 steps or fewer this would divide by 0.
        self.scheds = [torch.optim.lr_scheduler.OneCycleLR(
            opt, opt.param_groups[0]["lr"], total_steps=max(steps + 1, 11), pct_start=0.1,
            base_momentum=0.85, max_momentum=0.95) for opt in self.opts]

    def update(self, loss):
        """One step down the gradient of the loss (). RuntimeError if it is not finite."""
        for opt in self.opts:
            opt.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip, error_if_nonfinite=True)
        for x in (*self.opts, *self.scheds):
            x.step()


def train_tokenizer(vq, cfg, device):
    """Train the VQGAN with L1 + L2 reconstruction, codebook and commitment loss. Images this small
    become sharp without the GAN of the original."""
    images, _, _ = tok.world(cfg, "train")
    usage = torch.zeros(vq.K, device=device)
    # The first tenth is without quantisation, so that k-means has encoder outputs to start from.
    steps = cfg.tokenizer_steps
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
        # The gradient passes through the quantiser unchanged.
        y = vq.decode(e if step <= begin else e + (q - e).detach())
        reconstruction = (y - x).abs().mean() + (y - x).pow(2).mean()
        loss = reconstruction
        if step > begin:
            commitment = (e - q.detach()).pow(2).mean()
            loss = loss + (q - e.detach()).pow(2).mean() + 0.25 * commitment
        optimiser.update(loss)
        if step == begin or begin < step < 0.8 * steps and step % 20 == 0:
            tok.reseed_codes(vq, e.detach().flatten(0, 1), z.flatten(), usage, step == begin)
        if step % 20 == 0:
            bar.set_postfix(reconstruction=f"{reconstruction.item():.3f}",
                            codes=int((usage > 1).sum()))


def train_classifier(net, cfg, device, split):
    """Train a classifier of the class or, for scenes, of the coloured shapes in an image.
    split: "judge", the evaluation classifier, or "phi", the feature network of the drift.

    A classifier ignores what no class depends on, such as the background, and the drift cannot
    correct what Phi does not see. So every position of Phi's last map also has to reconstruct its
    own pixels and a thumbnail of the whole image. Drafts are compared position by position, and the
    thumbnail makes the positions agree on one image. (DINOv3 needs no such help: it was trained
    without classes, and its positions attend to each other.)
    """
    images, labels, _ = tok.world(cfg, split)
    loss_of = F.cross_entropy
    if cfg.dataset == "scenes":
        # Labels are captions here. Those with all colours say which of 24 coloured shapes occur.
        objects = [tok.parse_caption(caption)["objects"] for caption in labels]
        named = [i for i, pairs in enumerate(objects) if all(colour for colour, _ in pairs)]
        classes = [(colour, shape) for colour in tok.COLOURS for shape in tok.SHAPES]
        labels = torch.tensor([[float(pair in objects[i]) for pair in classes] for i in named])
        images = images[named]
        loss_of = F.binary_cross_entropy_with_logits
    # For each position its own 8 x 8 pixels, and the whole image reduced to 8 x 8 pixels.
    painter = nn.Conv2d(4 * net.stem.out_channels, 2 * 3 * 8 ** 2, 1).to(device)
    trained = nn.ModuleList([net, painter]) if split == "phi" else net
    optimiser = Optimiser(trained, cfg.classifier_steps, 3e-3, weight_decay=0.01)
    for _ in tqdm(range(cfg.classifier_steps), split):
        i = torch.randint(len(images), (64,))
        x, target = tok.to_float(images[i]).to(device), labels[i].to(device)
        last = net.maps(x)[-1]                                                  # (B, D, 4, 4)
        loss = loss_of(net.head(last.mean((2, 3))), target)
        if split == "phi":
            own, whole = painter(last).chunk(2, 1)                              # (B, 192, 4, 4)
            thumbnail = F.avg_pool2d(x, x.shape[-1] // 8)                       # (B, 3, 8, 8)
            thumbnail = thumbnail.flatten(1)[:, :, None, None]                  # (B, 192, 1, 1)
            loss = loss + 5 * F.mse_loss(F.pixel_shuffle(own, 8), x)
            loss = loss + 5 * (whole - thumbnail).pow(2).mean()
        optimiser.update(loss)


def train_teacher(teacher, cfg, device, vq, text):
    """Train MaskGIT or MaskGen to predict the masked tokens of the images (Eq. 2). The condition is
    dropped for one image in ten, so that guidance works."""
    images, c, _ = tok.world(cfg, "train")
    with torch.no_grad():
        z = torch.cat([vq.encode(tok.to_float(part).to(device)) for part in images.split(200)])
    c = c.to(device) if text is None else text.encode(c)                        # (N, ...)
    sample.set_text(text, teacher)
    generator = torch.Generator(device).manual_seed(0)
    optimiser = Optimiser(teacher, cfg.teacher_steps, 2e-3, weight_decay=0.03, clip=1.0)
    bar = tqdm(range(cfg.teacher_steps), "teacher")
    for step in bar:
        i = torch.randint(len(z), (64,), device=device)
        # The share of masked tokens, gamma(t) at a uniform time t.
        r = fpd.gamma(fpd.uniform((64,), generator, device))                    # (B,)
        z_masked, is_masked = fpd.remask(z[i], r, vq.K, generator)              # (B, L)
        logits = teacher(z_masked, c[i], torch.rand(64, device=device) < 0.1)   # (B, L, K)
        loss = F.cross_entropy(logits[is_masked], z[i][is_masked])              # Eq. 2
        optimiser.update(loss)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


# --------------------------------------------------------------------------------- preparation
# What --smoke uses in place of the public networks: the same Python classes, tiny and untrained.
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


def prepared_folder(cfg):
    """runs/prepared/<dataset>-<hash of settings and images>: the folder of the networks of a small
    world, which all runs with these settings and images share."""
    key = [cfg.smoke, cfg.tokenizer_steps, cfg.classifier_steps, cfg.teacher_steps,
           tok.fingerprint(cfg)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:10]
    return Path("runs", "prepared", f"{cfg.dataset}-{digest}")


def prepared(path, seed, network, args, train, device):
    """A network of a small world: read from its file, or trained and saved if there is no file yet.

    seed            random seed of its first weights and of its training
    network, args   the network's class and its arguments
    train           a function that trains the network it is given
    returns         dict(cls=, args=, state=), which sample.load_network reads
    """
    if path.exists():
        print(f"found {path} (delete {path.parent} after changing the code that makes it)")
    else:
        print(f"{path}: training")
        torch.manual_seed(seed)
        model = network(**args).to(device)
        train(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        sample.save(path, dict(cls=network.__name__, args=args, state=model.state_dict()))
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["args"] != args:
        raise ValueError(f"{path} has other sizes than this code: delete {path.parent}")
    return saved


def small_networks(cfg, n_classes, device):
    """The networks of a small world -> {field of sample.Networks: dict from `prepared`}."""
    # Codes have length 1. Without normalisation the codes of the dark, middle and light background
    # lie on one line. The gradient of a logit (Eq. 8) is a dot product with its code, so one of the
    # two ends always wins over the middle.
    vq, seed, folder, saved = dict(l2norm=True), 0, prepared_folder(cfg), {}
    if cfg.dataset == "scenes":
        words = dict(width=128)
        saved["text"] = dict(cls="Words", args=words, state=Words(**words).state_dict())
        # Several small objects have more kinds of edges than a large one, and need more codes.
        vq, seed, n_classes = dict(l2norm=True, K=256), 1, len(tok.shapes_names())

    saved["tokenizer"] = prepared(folder / "tokenizer.pt", seed, tok.VQGAN, vq,
                                  lambda net: train_tokenizer(net, cfg, device), device)
    saved["phi"] = prepared(folder / "phi.pt", seed + 1, ConvNet,
                            dict(num_classes=n_classes, width=32),
                            lambda net: train_classifier(net, cfg, device, "phi"), device)
    # Scenes needs no evaluation classifier: its scorer finds the objects in the pixels.
    if cfg.dataset != "scenes":
        saved["judge"] = prepared(folder / "judge.pt", 2, ConvNet,
                                  dict(num_classes=n_classes, width=24),
                                  lambda net: train_classifier(net, cfg, device, "judge"), device)

    tokenizer = sample.load_network(saved["tokenizer"], device)
    size, network, text = dict(K=tokenizer.K, L=tokenizer.L), MaskGIT, None
    if cfg.dataset == "scenes":
        network, text = MaskGen, sample.load_network(saved["text"], device)
    else:
        size["num_classes"] = n_classes
    saved["teacher"] = prepared(
        folder / "teacher.pt", 3, network, size,
        lambda net: train_teacher(net, cfg, device, tokenizer, text), device)
    return saved


def public_networks(cfg, device):
    """The paper's networks -> sample.Networks: MaskGIT and its VQGAN, or MaskGen, TA-TiTok and
    CLIP; DINOv3 as Phi. A smoke run uses those of TINY."""
    if cfg.smoke:
        saved = {}
        for seed, (part, (network, args)) in enumerate(TINY[cfg.dataset].items()):
            torch.manual_seed(seed)
            saved[part] = dict(cls=network.__name__, args=args, state=network(**args).state_dict())
        nets = sample.load_networks(saved, device)
        nets.names = imagenet_names()
    else:
        nets = sample.load_public(cfg.dataset, cfg.weights, device)
        path = find_backbone(BACKBONE, cfg.weights)
        nets.phi = load_backbone(path, nets.tokenizer.image_size).to(device)
    if nets.text is not None:
        nets.captions = tok.read_captions(cfg.captions)
        nets.names = nets.captions[:8]
    return nets


def prepare(cfg, device, saved):
    """All networks that distillation needs; those of a small world are trained if necessary. saved:
    the networks in the checkpoint of the run to resume, or {}. -> sample.Networks, no student"""
    if cfg.dataset in sample.PUBLIC:
        nets = public_networks(cfg, device)
    else:
        _, conditions, names = tok.world(cfg, "train")
        nets = sample.load_networks(saved or small_networks(cfg, len(names), device), device)
        nets.names, nets.captions = names, None if nets.text is None else conditions
    nets.cfg, nets.images = cfg, tok.fingerprint(cfg)
    return nets


# --------------------------------------------------------------------------------- distillation
def draw_condition(nets, cfg, generator):
    """The condition of a batch: batch / per_class classes or captions, drawn without replacement
    while they last, each repeated per_class times. -> (B, ...)"""
    repeats = cfg.per_class or 1
    groups = cfg.batch // repeats
    n = len(nets.names if nets.text is None else nets.captions)
    rounds = [torch.randperm(n, generator=generator, device=generator.device)
              for _ in range(math.ceil(groups / n))]
    c = torch.cat(rounds)[:groups]                                              # (G,)
    if nets.text is not None:
        # A caption is encoded once, however many drafts it gets.
        c = nets.text.encode([nets.captions[i] for i in c.tolist()])            # (G, rows, W)
    return c.repeat_interleave(repeats, 0)


def learning_rate(step, cfg):
    """Linear warm-up, constant, then a cosine to 0 over the last share cfg.decay of the run."""
    # 1 where the fall begins, 0 after the last step.
    left = (cfg.steps + 1 - step) / max(1, cfg.decay * cfg.steps)
    return cfg.lr * min(1, step / WARMUP) * (1 - math.cos(math.pi * min(1, left))) / 2


@torch.no_grad()
def update_ema(ema, student, decay):
    torch._foreach_lerp_(list(ema.parameters()), list(student.parameters()), 1 - decay)


class Gan:
    """The discriminator, its optimiser and its real images (Sec. 3.4).

    Nothing else in the distillation sees a real image. Which ones a step takes follows from the
    seed and the step. The attribute `trained` is what a checkpoint has to hold.
    """
    def __init__(self, cfg, nets, device):
        self.cfg, self.size = cfg, nets.tokenizer.image_size
        # The seed has to determine the random weights with which the discriminator's heads begin.
        torch.manual_seed(cfg.seed)
        is_public = cfg.dataset in sample.PUBLIC
        if is_public and not cfg.smoke:
            files = {part: find_backbone(name, cfg.weights)
                     for part, name in FEATURE_NETWORKS.items()}
            self.discriminator = load_discriminator(files, self.size, device)
        else:
            self.discriminator = Discriminator({"phi": nets.phi}, self.size, width=16).to(device)
        self.images = tok.image_files(cfg.data) if is_public else tok.world(cfg, "train")[0]
        # As in StyleGAN-XL; the paper names no settings of its discriminator.
        self.opt = torch.optim.Adam(self.discriminator.discriminators.parameters(), lr=2e-3,
                                    betas=(0.0, 0.99))
        self.trained = dict(discriminator=self.discriminator, discriminator_opt=self.opt)

    def real(self, n, seen):
        """n real images for the step before which the discriminator has seen `seen` drafts
        -> (n, 3, H, W) in [-1, 1]. ValueError if 100 files in a row cannot be read."""
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + seen)
        images, misses = [], 0
        while len(images) < n:
            x = self.images[torch.randint(len(self.images), (), generator=generator)]
            try:
                images.append(tok.read_image(x, self.size) if isinstance(x, Path) else x)
                misses = 0
            except ValueError as error:
                tqdm.write(f"skipped: {error}")
                misses += 1
                if misses == 100:
                    raise
        return tok.to_float(torch.stack(images))

    def gradient(self, loss, images, step, generator, autocast):
        """The discriminator's step, then the gradient of L_total = L_drift + lambda L_gan at the
        decoded drafts images (B, 3, H, W), from which the drift loss () was computed.

        lambda is chosen in every step, such that the GAN's gradient is gan_weight times as large as
        the drift's: a weight then means the same for every network.   -> (B, 3, H, W); logs
        """
        of_drift, = torch.autograd.grad(loss, images)               # (B, 3, H, W)
        seen = (step - 1) * len(images)                             # drafts before this step
        real = self.real(len(images), seen).to(images)
        of_gan, logs = fpd.gan_step(self.discriminator, self.opt, images, real, seen, generator,
                                    autocast)
        scale = self.cfg.gan_weight * of_drift.norm() / of_gan.norm().clamp(min=1e-12)
        logs["gan_scale"] = scale                                   # lambda of the paper's sum
        return of_drift + scale * of_gan, logs


def save_checkpoint(folder, step, cfg, nets, trained, generator):
    """checkpoint.pt: all that sample.py needs to draw images, and --resume to go on."""
    sample.save(folder / "checkpoint.pt",
                dict(step=step, config=dataclasses.asdict(cfg), names=nets.names,
                     parts=nets.saved, images=nets.images, rng=generator.get_state(),
                     log_size=(folder / "log.jsonl").stat().st_size,
                     **{name: x.state_dict() for name, x in trained.items()}))


def load_checkpoint(folder, trained, generator):
    """Fill networks and optimisers from checkpoint.pt -> its step. Lines that were written to
    log.jsonl after it are cut off, because these steps are repeated."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    for name, x in trained.items():
        x.load_state_dict(saved[name])
    if dist.is_initialized() and dist.get_rank():
        # The checkpoint has the generator of rank 0 alone; the others start a new sequence.
        generator.manual_seed(generator.initial_seed() + saved["step"])
    else:
        generator.set_state(saved["rng"])
        os.truncate(folder / "log.jsonl", saved["log_size"])
    return saved["step"]


def finite_numbers(values, step):
    """0-dim tensors -> floats. This waits for the GPU. ValueError if one is not finite."""
    numbers = {name: x.item() for name, x in values.items()}
    for name, x in numbers.items():
        if not math.isfinite(x):
            raise ValueError(f"{name} is {x} at step {step}; the last checkpoint is kept")
    return numbers


def distil(cfg, nets, folder, device):
    """Train the student. It leaves checkpoint.pt, log.jsonl, samples/ and pictures in `folder`.

    Under torchrun every process draws its own conditions and drafts, and compares only these.
    Gradients are averaged, and rank 0 writes the files.
    """
    # ---------------------------------------- set-up: what is trained
    rank = dist.get_rank() if dist.is_initialized() else 0
    student = copy.deepcopy(nets.teacher).requires_grad_(True)
    ema = copy.deepcopy(nets.teacher)
    opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=0.0,
                            fused=True if device == "cuda" else None)
    generator = torch.Generator(device).manual_seed(cfg.seed + 1_000_003 * rank)
    gan = Gan(cfg, nets, device) if cfg.gan_weight else None
    method = {"fpd": None, "dimo": fpd.DiMO, "sdtt": fpd.SDTT}[cfg.method]
    baseline = method(cfg, nets) if method else None
    trained = dict(student=student, ema=ema, opt=opt)
    for other in (gan, baseline):
        trained |= other.trained if other else {}

    # ---------------------------------------- set-up: speed on a GPU
    # If the GPU has bfloat16, networks run in it, and the decoder's weights are kept in it.
    is_half = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    autocast = torch.autocast(device, torch.bfloat16, enabled=is_half)
    tokenizer = copy.deepcopy(nets.tokenizer).to(torch.bfloat16) if is_half else nets.tokenizer
    lift, E = fpd.Lift(tokenizer, nets.phi, cfg), nets.tokenizer.E
    # All steps have the same tensor sizes, so cuDNN searches for its fastest algorithms once.
    torch.backends.cudnn.benchmark = device == "cuda"
    model = student
    if dist.is_initialized():
        model = nn.parallel.DistributedDataParallel(student, gradient_as_bucket_view=True)
        model.K, model.L = student.K, student.L

    # ---------------------------------------- set-up: a new run, or the one to resume
    start = load_checkpoint(folder, trained, generator) if cfg.resume else 0
    if rank == 0:
        teacher_rows = example_rows(nets, cfg)
    if rank == 0 and not cfg.resume:
        (folder / "log.jsonl").write_text("")
        save_checkpoint(folder, 0, cfg, nets, trained, generator)
        sample_grid(cfg, nets, ema, folder, 0, teacher_rows)
    # After Ctrl-C or a scheduler's signal, the step is finished and saved. (Under torchrun the
    # processes would not stop after the same step, so they simply end.)
    received, signals = [], () if dist.is_initialized() else (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, frame: received.append(number))
                for number in signals}
    # A terminal shows a bar; a file gets a line every log_every steps.
    is_terminal = sys.stdout.isatty()
    bar = tqdm(range(start + 1, cfg.steps + 1), "distil", initial=start, total=cfg.steps,
               disable=None if is_terminal else True)

    # ---------------------------------------- the loop
    for step in bar:
        opt.param_groups[0]["lr"] = learning_rate(step, cfg)
        c = draw_condition(nets, cfg, generator)                                # (B, ...)
        if baseline:
            loss, logs = baseline.step(model, c, step, generator, autocast)
        else:
            with autocast:
                loss, logs, images = fpd.fpd_step(model, nets.teacher, lift, E, c, cfg,
                                                  generator)                    # Eq. 4 to 8
        if gan:
            # Both losses depend on the decoded drafts; the backward pass from there on is shared.
            gradient, gan_logs = gan.gradient(loss, images, step, generator, autocast)
            images.backward(gradient)                                           # Sec. 3.4
            logs |= gan_logs
        else:
            loss.backward()
        logs["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        opt.step()
        # Gradients are freed now, before the next step builds its graph.
        opt.zero_grad(set_to_none=True)
        # The EMA's decay begins low, so that the teacher's weights are soon forgotten.
        update_ema(ema, student, min(cfg.ema, (1 + step) / (10 + step)))

        is_logged, is_stopped = step % cfg.log_every == 0, bool(received)
        is_saved = step % cfg.save_every == 0 or step == cfg.steps or is_stopped
        if is_logged or is_saved:
            numbers = finite_numbers(dict(loss=loss, **logs), step)
            bar.set_postfix(loss=f"{numbers['loss']:.3f}", entropy=f"{numbers['entropy']:.2f}")
        if rank:
            continue
        if is_logged:
            with open(folder / "log.jsonl", "a") as log:
                log.write(json.dumps(dict(step=step, **numbers)) + "\n")
            if not is_terminal:
                print(f"step {step} of {cfg.steps}: loss {numbers['loss']:.3f}", flush=True)
        if is_saved:
            save_checkpoint(folder, step, cfg, nets, trained, generator)
        if step % cfg.sample_every == 0:
            sample_grid(cfg, nets, ema, folder, step, teacher_rows)
        if is_stopped:
            how = "the same command" if cfg.ablations else f"train.py --resume --name {folder.name}"
            print(f"\nstopped after step {step}. Go on with: {how}")
            sys.exit(128 + received[0])

    for number, handler in handlers.items():
        signal.signal(number, handler)


def example_rows(nets, cfg):
    """The teacher's rows, with which every grid of samples begins, for sample.image_grid."""
    c, _ = sample.grid_conditions(nets)
    return [(f"teacher {steps}", sample.generate(nets.teacher, nets.tokenizer, c, cfg, steps,
                                                 seed=cfg.seed)) for steps in (16, 1)]


def sample_grid(cfg, nets, ema, folder, step, teacher_rows):
    """samples/: teacher in 16 steps and in 1, student in 1, for the same labels or captions.
    samples.gif: these grids as a film. step.png: sample.step_grid of the present student."""
    c, captions = sample.grid_conditions(nets)
    images = sample.generate(ema, nets.tokenizer, c, cfg, seed=cfg.seed)
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    grid = sample.image_grid([*teacher_rows, ("student 1", images)], captions)
    grid.save(samples / f"{step:06d}.png")
    sample.step_grid(nets, ema, cfg).save(folder / "step.png")
    frames = []
    for file in sorted(file for file in samples.glob("*.png") if file.stem.isdecimal()):
        frame = Image.open(file).convert("RGB")
        frame.thumbnail((720, frame.height))
        ImageDraw.Draw(frame).text((6, 4), f"step {int(file.stem)}", "black")
        frames.append(frame.quantize(128, dither=Image.Dither.NONE))
    frames[0].save(folder / "samples.gif", save_all=True, append_images=frames[1:], duration=600,
                   loop=0)


# --------------------------------------------------------------------------------- ablations
def ablate(base, nets, root, device):
    """Tables 2 to 4 in miniature: every row with each seed, on the same networks. A run that has
    its score.json is not repeated.   base: Config, the settings that the rows share; root: the
    folder of their runs, <row>-<seed>/, and of report.jsonl and report.png
    """
    n = 48 if base.smoke else 960
    scorer = evaluate.scorer(nets, n)
    rows, pictures, (c, captions) = [], [], sample.grid_conditions(nets)
    for table, row, settings, paper in ABLATIONS:
        # If the base compares the whole batch, all rows do. Rows that change nothing are left out.
        is_whole, scores = base.per_class is None, []
        changes = {name: value for name, value in settings.items()
                   if getattr(base, name) != value and not (is_whole and name == "per_class")}
        if not changes and row != ABLATIONS[0][1]:
            continue
        slug = "-".join(re.sub("[^a-z0-9 ]", "", row.lower()).split())
        for seed in range(base.seed, base.seed + base.ablations):
            folder = root / f"{slug}-{seed}"
            cfg = dataclasses.replace(base, **changes, seed=seed, name=f"{root.name}/{folder.name}")
            if cfg.method == "sdtt":
                # A step of SDTT takes about four times as many passes of the teacher as one of FPD.
                cfg.steps = max(4, cfg.steps // 4)
            # A score is reused only with the same settings and networks.
            made_with = json.dumps(dataclasses.asdict(cfg) | dict(
                ablations=0, prepared=prepared_folder(cfg).name))
            folder.mkdir(exist_ok=True)
            file = folder / "score.json"
            if file.exists():
                print(f"found {file} (delete {folder} after changing the code)")
            else:
                print(f"\n{row}, seed {seed}: {folder}")
                distil(cfg, nets, folder, device)
                run = sample.load_run(folder, device)
                score = evaluate.score(run, run.student, None, *scorer)
                file.write_text(json.dumps(dict(score=score, made_with=made_with)))
            kept = json.loads(file.read_text())
            if kept["made_with"] != made_with:
                raise ValueError(f"{folder} was made with other settings or networks: choose "
                                 "another --name, or remove it")
            scores.append(kept["score"])
        run = sample.load_run(root / f"{slug}-{base.seed}", device)
        title = f"{row}  {evaluate.headline(evaluate.means(scores))}"
        pictures.append((title, sample.generate(run.student, run.tokenizer, c, run.cfg)))
        rows.append(dict(table=table, row=row, settings=changes, paper=paper, scores=scores))
    for steps in (1, 16):
        scores = [evaluate.score(nets, nets.teacher, steps, *scorer)]
        rows.insert(0, dict(table="", row=f"teacher {steps}", settings={}, paper=None,
                            scores=scores))
        images = sample.generate(nets.teacher, nets.tokenizer, c, base, steps)
        pictures.insert(0, (f"teacher {steps}  {evaluate.headline(scores[0])}", images))
    protocol = dict(dataset=base.dataset, smoke=base.smoke, images=n, seeds=base.ablations,
                    device=device, torch=torch.__version__, base=dataclasses.asdict(base))
    evaluate.write_report(root, protocol, rows, evaluate.ablation_table, pictures, captions)


# --------------------------------------------------------------------------------- the command
def new_folder(cfg):
    """Make runs/<name>, the run's folder, unless it is resumed; by default with a free name."""
    words = (cfg.dataset, "" if cfg.method == "fpd" else cfg.method, "smoke" if cfg.smoke else "")
    name = cfg.name or "-".join(filter(None, words))
    folder = Path("runs", f"ablations-{name}" if cfg.ablations else name)
    # With --ablations the folder may exist: its finished runs are kept.
    goes_on = cfg.resume or cfg.ablations
    number = itertools.count(2)
    while folder.exists() and not (cfg.name or goes_on):
        folder = Path("runs", f"{name}-{next(number)}")
    folder.mkdir(parents=True, exist_ok=bool(goes_on))
    return folder


def resumed_networks(cfg):
    """The networks in the checkpoint of the run to resume, after a check of its images and of the
    learning rate. -> `saved` of `prepare`"""
    # Not mapped into memory: Windows would then not let the run replace its checkpoint.
    checkpoint = torch.load(Path("runs", cfg.name, "checkpoint.pt"), map_location="cpu",
                            weights_only=True)
    if checkpoint["images"] != tok.fingerprint(cfg):
        raise ValueError(f"--data {cfg.data}: not the images that the run was trained on")
    step = checkpoint["step"]
    before = learning_rate(step, Config(**checkpoint["config"]))
    after = learning_rate(step + 1, cfg)
    if step > WARMUP and after > 1.01 * before:
        print("warning: with more --steps the learning rate rises again, "
              f"from {before:.1e} to {after:.1e}")
    return checkpoint["parts"]


def main():
    # Settings and device.
    cfg = parse()
    device = "cuda" if cfg.gpus or (cfg.gpus is None and torch.cuda.is_available()) else "cpu"
    rank, is_parallel = int(os.environ.get("RANK", 0)), "RANK" in os.environ
    if is_parallel:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=datetime.timedelta(hours=2))
    changed = [f"{field.name}={getattr(cfg, field.name)}" for field in dataclasses.fields(cfg)
               if getattr(cfg, field.name) != field.default]
    print(f"{device}, torch {torch.__version__}; changed settings: {' '.join(changed)}")
    if device == "cuda" and cfg.lift_chunk is None and cfg.dataset in sample.PUBLIC:
        # Measured on an H200: 30.1 GB for imagenet, 48.8 GB for laion; 14.9 GB in chunks of 8.
        free = torch.cuda.mem_get_info()[0] / 1e9
        if free < (36 if cfg.dataset == "imagenet" else 54):
            cfg.lift_chunk = 8
            print(f"{free:.0f} GB of GPU memory is free: --lift-chunk 8")

    # Prepare. Rank 0 does it; the others wait, and then read its files.
    begin = time.time()
    saved = resumed_networks(cfg) if cfg.resume else {}
    if rank:
        dist.barrier()
    nets = prepare(cfg, device, saved)
    if is_parallel and rank == 0:
        dist.barrier()
    folder = new_folder(cfg) if rank == 0 or cfg.resume else None
    minutes = f"minutes: prepare {(time.time() - begin) / 60:.1f}"
    if cfg.ablations:
        ablate(cfg, nets, folder, device)
        return

    # Distil.
    if rank == 0:
        print(f"{folder}: distilling for {cfg.steps} steps")
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    begin = time.time()
    distil(cfg, nets, folder, device)
    if is_parallel:
        dist.destroy_process_group()
    if rank:
        return
    minutes += f", distil {(time.time() - begin) / 60:.1f}"

    # Report.
    if cfg.dataset not in sample.PUBLIC:
        begin = time.time()
        evaluate.report(sample.load_run(folder, device), folder)
        minutes += f", report {(time.time() - begin) / 60:.1f}"
        sample.save_student(folder)
    print(f"{minutes}\nthe pictures are in {folder}/; then try: python sample.py --run {folder}")
    if cfg.smoke:
        print("The set-up works. Nothing was learnt in a smoke run, and its pictures mean nothing.")


if __name__ == "__main__":
    sample.run_command(main)
