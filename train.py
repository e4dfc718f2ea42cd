"""train.py - the whole run, from nothing to a one-step student and its report.

    prepare (once, cached)   images -> tokenizer (VQGAN) -> teacher (MaskGIT, Eq. 2);   images -> Phi, judge;   imagenet: official files
    distil                   student = copy of the teacher; fpd.fpd_step (Eq. 3 to 8), AdamW, EMA
    leave                    runs/<name>/: config.json, log.jsonl, samples/, checkpoint.pt, report.json, report.png

    python train.py                                   # the shapes world on a CPU
    python train.py --dataset folder --data DIR       # your own images, one subfolder per class
    python train.py --dataset imagenet --gpus 1       # the paper's class-conditional run: labels only, no images
    python train.py --smoke                           # under a minute: proves the set-up, learns nothing; with each --dataset
    python train.py --resume                          # the newest run goes on, with its own settings
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
import signal
import sys
import time
import types
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import evaluate
import fpd
import sample
import tokenizer as tok
from models import Backbone, ConvNet, MaskGIT, find_backbone, load_backbone, load_maskgit


@dataclasses.dataclass
class Config:
    """Every setting, written once. Defaults are the paper's where it has one (Sec. 4.1); SMALL says what the small worlds change."""
    # what runs
    dataset: str = "shapes"           # shapes | folder | imagenet
    data: str = ""                    # folder: the directory with one subfolder of images per class
    anywhere: bool = False            # shapes: objects anywhere on the canvas, the hard world, in place of near its centre
    name: str = ""                    # runs/<name>; made from the settings above when empty
    resume: bool = False              # go on with an interrupted run (the newest, or --name) and its settings
    gpus: int = None                  # 0: CPU, 1: one CUDA GPU; 1 where there is one when not given
    smoke: bool = False               # tiny step counts: proves the set-up, learns nothing
    seed: int = 0                     # of the distillation, its samples and its report
    # preparation of the small worlds
    prepare_seed: int = 0             # of tokenizer, Phi, judge and teacher: runs with other --seed share them, as they would official ones
    tokenizer_steps: int = 900        # VQGAN, batch 32
    classifier_steps: int = 400       # Phi and the judge, batch 64
    teacher_steps: int = 2000         # MaskGIT, batch 64
    # official networks of imagenet: a file, else weights/, else the hub
    tokenizer_weights: str = ""       # VQGAN
    teacher_weights: str = ""         # MaskGIT
    backbone_weights: str = ""        # Phi
    backbone: str = "vit_base_patch16_dinov3.lvd1689m"   # any vision transformer of timm (Sec. 4.1: DINOv3 ViT-B/16)
    blocks: tuple = (2, 5, 8, 11)     # of the backbone, whose outputs are compared (Sec. 4.1, Table 4b)
    # sampling
    guidance: float = sample.PUBLIC["guidance"]                  # the multi-step teacher's, in its last step; 1 = none
    confidence_noise: float = sample.PUBLIC["confidence_noise"]  # Gumbel noise on its confidence (the official sampler's r_temp)
    # the method
    init_mask: float = 0.9            # r_init of Sec. 3.2, "nearly fully masked"; stored with the student, who knows no other
    draft_temperature: float = 1.0    # of Eq. 4, in training and sampling
    remask_min: float = 0.1           # pi of Eq. 5: arccos(u) 2/pi between these two
    remask_max: float = 0.9
    teacher_cfg: float = 2.0          # guidance of the refinement (Eq. 5)
    far: float = 0.0                  # share of drafts with r = 1, refined in refine_steps passes (ours; see README)
    refine_steps: int = 1             # teacher passes of a refinement; 1 in the paper
    bandwidths: tuple = (0.02, 0.05, 0.2)    # H of Eq. 7 (Sec. 4.1)
    affinity: str = "joint"           # joint | apart: attraction and repulsion normalised together or each alone (Eq. 6)
    own_target: bool = True           # is a draft's own refinement among the targets of its drift? (Eq. 6)
    pull: bool = False                # ours: besides the drift, a force straight to the own refinement, weighted 1 - r
    crowd: float = 1.0                # ... and the weight of the drift beside that force
    self_negative: bool = False       # is a draft among its own negatives? (Eq. 6)
    per_class: int = 16               # drafts of one class in a batch; only these are compared with each other
    estimator: str = "ste"            # ste | soft (Eq. 8, Table 3a)
    # optimisation
    steps: int = 100_000
    batch: int = 32
    lr: float = 1e-5
    warmup: int = 100
    decay: float = 0.0                # the last share of the steps over which the learning rate falls to 0; the paper's is constant
    clip: float = 1.0                 # gradient norm
    ema: float = 0.9999
    lift_chunk: int = None            # images lifted at a time and once more in the backward pass: less memory, same gradient; None: all
    # bookkeeping
    log_every: int = 10
    sample_every: int = 1000
    save_every: int = 1000


# What the small worlds change, and why: their student is 200 times smaller and trains for minutes, not days
SMALL = dict(lr=6e-4, batch=64, steps=300, warmup=20, decay=0.7, ema=0.98, guidance=2.0, confidence_noise=2.0, init_mask=0.95,
             far=0.25, refine_steps=4, own_target=False, pull=True, crowd=1.25, sample_every=50, save_every=50)
# What --smoke changes. No decay, which depends on the number of steps: 2 steps and 2 more after --resume are the same as 4
SMOKE = dict(tokenizer_steps=4, classifier_steps=4, teacher_steps=4, steps=4, batch=32, decay=0.0, log_every=1, sample_every=2, save_every=2)
# What a run was made of: --resume cannot change it
FIXED = ("dataset", "data", "anywhere", "smoke", "prepare_seed", "tokenizer_steps", "classifier_steps", "teacher_steps", "backbone", "blocks",
         "init_mask")


def parse(argv=None):
    """Command line -> Config: the paper's defaults, then SMALL (not for imagenet), then SMOKE, then what the user typed.

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
        for key in FIXED:
            if typed.get(key, settings[key]) != settings[key]:
                raise ValueError(f"--resume: --{key.replace('_', '-')} of {folder} is {settings[key]!r} and cannot become {typed[key]!r}")
        if saved["step"] >= typed.get("steps", settings["steps"]):
            raise ValueError(f"--resume: {folder} has done its {saved['step']} steps; --steps N goes further, evaluate.py makes the report")
    else:
        settings = {**({} if typed.get("dataset") == "imagenet" else SMALL), **(SMOKE if typed.get("smoke") else {})}
    cfg = Config(**{**settings, **typed})
    check(cfg)
    return cfg


def check(cfg):
    """ValueError, in one line, for settings that cannot work."""
    def want(ok, text):
        if not ok:
            raise ValueError(text)
    want(cfg.prepare_seed >= 0, f"--prepare-seed should not be negative, got {cfg.prepare_seed}")
    for name, options in dict(dataset=("shapes", "folder", "imagenet"), affinity=("joint", "apart"), estimator=("ste", "soft")).items():
        want(getattr(cfg, name) in options, f"--{name} should be one of {', '.join(options)}, got {getattr(cfg, name)!r}")
    want(cfg.seed >= 0, f"--seed should not be negative, got {cfg.seed}")
    for name in ("steps", "tokenizer_steps", "classifier_steps", "teacher_steps", "refine_steps", "log_every", "sample_every", "save_every"):
        want(getattr(cfg, name) >= 1, f"--{name.replace('_', '-')} should be at least 1, got {getattr(cfg, name)}")
    want(cfg.per_class >= 2, f"--per-class should be at least 2: a draft's negatives are the other drafts; got {cfg.per_class}")
    want(cfg.batch >= 2 and cfg.batch % cfg.per_class == 0, f"--batch should be a multiple of --per-class {cfg.per_class}, got {cfg.batch}")
    want(0 < cfg.init_mask <= 1, f"--init-mask is a share, between 0 and 1, got {cfg.init_mask}")
    want(0 <= cfg.remask_min < cfg.remask_max <= 1, f"--remask-min {cfg.remask_min} and --remask-max {cfg.remask_max}: shares, min below max")
    want(cfg.draft_temperature > 0, f"--draft-temperature should be positive, got {cfg.draft_temperature}")
    want(cfg.bandwidths and min(cfg.bandwidths) > 0, f"--bandwidths should be positive, got {cfg.bandwidths}")
    want(cfg.dataset != "folder" or cfg.data, "--dataset folder needs --data DIR, one subfolder of images per class")
    for part in ("tokenizer", "teacher", "backbone"):
        want((cfg.dataset == "imagenet" and not cfg.smoke) or not getattr(cfg, f"{part}_weights"),
             f"--{part}-weights goes with --dataset imagenet, and not with --smoke")
    want(cfg.lift_chunk is None or cfg.lift_chunk >= 1, f"--lift-chunk should be at least 1, got {cfg.lift_chunk}")
    want(cfg.gpus in (None, 0, 1), f"--gpus should be 0 or 1, got {cfg.gpus}")
    want(cfg.gpus != 1 or torch.cuda.is_available(), "--gpus 1: there is no CUDA device here; leave --gpus away to run on the CPU")


# ------------------------------------------------------------------------------------------------ preparation
def schedule(parameters, lr, steps, weight_decay=0.0):
    """AdamW with a one-cycle learning rate: the short trainings of the preparation. -> optimiser, scheduler"""
    opt = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    return opt, torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps + 1, pct_start=0.1)


def update(loss, opt, sched, parameters=()):
    opt.zero_grad(set_to_none=True)
    loss.backward()
    if parameters:
        nn.utils.clip_grad_norm_(parameters, 1.0)
    opt.step()
    sched.step()


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


def train_tokenizer(cfg, device):
    """VQGAN on the world's images: L1 + L2 reconstruction, codebook and commitment loss. (At this size it is sharp without a GAN.)"""
    images, _, _ = tok.world(cfg, "train")
    args = {}
    vq = tok.VQGAN(**args).to(device)
    opt, sched = schedule(vq.parameters(), 5e-3, cfg.tokenizer_steps)
    usage = torch.zeros(vq.K, device=device)
    begin = cfg.tokenizer_steps // 10                                            # a plain autoencoder first: codes need somewhere to go
    bar = tqdm(range(cfg.tokenizer_steps), "tokenizer")
    for step in bar:
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
        update(loss, opt, sched)
        if step == begin or (step > begin and step % 20 == 0 and step < 0.8 * cfg.tokenizer_steps):
            reseed_codes(vq, e.detach().flatten(0, 1), z.flatten(), usage, everything=step == begin)
        if step % 20 == 0:
            bar.set_postfix(reconstruction=f"{reconstruction.item():.3f}", codes=int((usage > 1).sum()))
    with torch.no_grad():
        x = tok.to_float(tok.world(cfg, "test")[0][:480])
        z = torch.cat([vq.encode(part.to(device)) for part in x.split(60)])
    print(f"tokenizer: {z.unique().numel()} of {vq.K} codes in use")
    return vq, args


def train_classifier(cfg, device, split, width):
    """Phi or the judge: a classifier of the world's classes."""
    images, labels, names = tok.world(cfg, split)
    args = dict(num_classes=len(names), width=width)
    net = ConvNet(**args).to(device)
    opt, sched = schedule(net.parameters(), 3e-3, cfg.classifier_steps, 0.01)
    for _ in tqdm(range(cfg.classifier_steps), split):
        i = torch.randint(len(images), (64,))
        update(F.cross_entropy(net(tok.to_float(images[i]).to(device))[1], labels[i].to(device)), opt, sched)
    return net, args


def train_teacher(cfg, device, vq):
    """MaskGIT on the tokens: predict what is hidden (Eq. 2), the class dropped for one image in ten so that guidance works."""
    images, labels, names = tok.world(cfg, "train")
    with torch.no_grad():
        z = torch.cat([vq.encode(tok.to_float(part).to(device)) for part in images.split(200)])          # (N, L)
    labels = labels.to(device)
    args = dict(K=vq.K, L=vq.L, num_classes=len(names))
    teacher = MaskGIT(**args).to(device)
    opt, sched = schedule(teacher.parameters(), 2e-3, cfg.teacher_steps, 0.03)
    generator = torch.Generator(device).manual_seed(cfg.prepare_seed)
    bar = tqdm(range(cfg.teacher_steps), "teacher")
    for step in bar:
        i = torch.randint(len(z), (64,), device=device)
        z_masked, is_masked = fpd.remask(z[i], fpd.sample_ratio(64, 0, 1, generator, device), vq.K, generator)
        logits = teacher(z_masked, labels[i], torch.rand(64, device=device) < 0.1)                      # (B, L, K)
        loss = F.cross_entropy(logits[is_masked], z[i][is_masked])                                       # Eq. 2
        update(loss, opt, sched, list(teacher.parameters()))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return teacher, args


def load_official(cfg, device):
    """The paper's networks: MaskGIT, its VQGAN, and DINOv3 as Phi. -> namespace as of `prepare`"""
    files = sample.find_all({"tokenizer": partial(sample.official, "tokenizer", cfg.tokenizer_weights),
                             "teacher": partial(sample.official, "teacher", cfg.teacher_weights),
                             "phi": partial(find_backbone, cfg.backbone, cfg.backbone_weights or None)})
    for part, path in files.items():
        print(f"loading {part} from {path}", flush=True)
    parts = types.SimpleNamespace(names=sample.imagenet_names(), files={part: str(path.absolute()) for part, path in files.items()})
    parts.tokenizer = sample.frozen(tok.load_vqgan(files["tokenizer"]), device)
    parts.teacher = sample.frozen(load_maskgit(files["teacher"]), device)
    sample.check_fit(parts.teacher, parts.tokenizer)
    parts.phi = sample.frozen(load_backbone(cfg.backbone, files["phi"], cfg.blocks, parts.tokenizer.image_size), device)
    return parts


def prepare(cfg, device):
    """Everything that distillation takes as given, trained where it is not there yet. -> namespace of networks, names, and their files.

    A part's file name carries a hash of what it was made from, so a changed setting makes a new file and old runs keep theirs.
    """
    if cfg.dataset == "imagenet" and not cfg.smoke:
        return load_official(cfg, device)
    files, made_from = {}, {"dataset": cfg.dataset, "data": cfg.data and str(Path(cfg.data).resolve()), "anywhere": cfg.anywhere,
                            "seed": cfg.prepare_seed, "smoke": cfg.smoke}
    parts = types.SimpleNamespace(names=sample.imagenet_names() if cfg.dataset == "imagenet" else tok.world(cfg, "test")[2], files=files)

    def cached(part, cls, build, **settings):
        key = json.dumps({**made_from, **settings}, sort_keys=True)
        path = Path("runs/prepared") / f"{cfg.dataset}-{part}-{hashlib.sha256(key.encode()).hexdigest()[:10]}.pt"
        if not path.exists():
            torch.manual_seed(4 * cfg.prepare_seed + len(files))
            network, args = build()
            save(path, dict(args=args, state=network.state_dict(), made_from=key))
        files[part] = str(path)
        setattr(parts, part, sample.load_part(cls, path, device))

    def untrained(cls, **args):
        return cls(**args), args

    if cfg.dataset == "imagenet":                                                # --smoke: the official networks' classes, tiny and untrained
        cached("tokenizer", tok.VQGAN, lambda: untrained(tok.VQGAN, ch_mult=(1, 1, 2, 2), image_size=64))
        cached("phi", Backbone, lambda: untrained(Backbone, name="vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m", image_size=64))
        cached("teacher", MaskGIT, lambda: untrained(MaskGIT, num_classes=1000))
        return parts
    cached("tokenizer", tok.VQGAN, lambda: train_tokenizer(cfg, device), steps=cfg.tokenizer_steps)
    cached("phi", ConvNet, lambda: train_classifier(cfg, device, "phi", 32), steps=cfg.classifier_steps)
    cached("judge", ConvNet, lambda: train_classifier(cfg, device, "judge", 24), steps=cfg.classifier_steps, judge=True)
    cached("teacher", MaskGIT, lambda: train_teacher(cfg, device, parts.tokenizer), steps=cfg.teacher_steps, tokenizer=files["tokenizer"])
    return parts


# ------------------------------------------------------------------------------------------------ distillation
def make_lift(tokenizer, phi, chunk=None, grid=4):
    """E[z] -> features (Sec. 3.3): decoder, Phi, one X (B, F, D) per block. Frozen, but gradients pass. F = grid^2 positions.

    chunk   images at a time, nothing kept but their features: the backward pass computes the rest again. Exact, since neither decoder
            nor Phi looks at more than one image. None: all at once
    """
    def lift(e):
        if chunk is None:
            return lift_all(e)
        return [torch.cat(block) for block in zip(*(checkpoint(lift_all, part, use_reentrant=False) for part in e.split(chunk)))]

    def lift_all(e):
        images = tokenizer.decode(e)                                             # (B, 3, H, W); no clamp: it would stop the gradient
        X = []
        for m in phi.maps(images):                                               # (B, D, h, w)
            m = F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]).permute(0, 3, 1, 2)        # every location weighs the same
            X.append(F.adaptive_avg_pool2d(m, grid).flatten(2).transpose(1, 2))  # (B, F, D)
        return X
    return lift


def save(path, content):
    """Whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def draw_classes(n_classes, cfg, generator):
    """The batch's condition: batch / per_class different classes, as far as there are that many, per_class of each. -> (B,)"""
    G = cfg.batch // cfg.per_class
    picks = torch.cat([torch.randperm(n_classes, generator=generator, device=generator.device) for _ in range(-(-G // n_classes))])[:G]
    return picks.repeat_interleave(cfg.per_class)


def learning_rate(step, cfg):
    """Linear warm-up, constant, then a cosine to 0 over the last share cfg.decay of the run."""
    left = (cfg.steps + 1 - step) / max(1, cfg.decay * cfg.steps)                # 1 where the fall begins, 0 after the last step
    return cfg.lr * min(1, step / cfg.warmup) * (1 - math.cos(math.pi * min(1, left))) / 2


def memory(student, parts, cfg, half):
    """Gigabytes that the distillation should need, an estimate: weights, gradients, Adam and EMA, and what the backward pass keeps.

    The last is counted on one image and on two. Their difference is an image's share; the rest (the weights, as bf16 under autocast,
    too) does not grow. Buffers that live for a moment come on top.
    """
    E, lift = parts.tokenizer.E, make_lift(parts.tokenizer, parts.phi)

    def kept(forward, B):
        """Bytes that the backward pass of forward(B) would keep."""
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), half:
            alive = forward(B)                                                   # else memory would be freed, and counted twice
        del alive
        return sum(storages.values())

    def draft(B):
        z = torch.full((B, student.L), student.K, device=E.device)
        return student(z, z[:, 0] * 0)

    def lifted(B):
        return lift(E[torch.zeros(B, student.L, dtype=torch.long, device=E.device)].requires_grad_())

    (draft1, draft2), (lift1, lift2) = [(kept(f, 1), kept(f, 2)) for f in (draft, lifted)]
    networks = [student] * 5 + [parts.teacher, parts.tokenizer, parts.phi]       # student: weights, gradient, two of Adam, EMA
    fixed = sum(p.nbytes for network in networks for p in network.parameters()) + 2 * draft1 - draft2 + 2 * lift1 - lift2
    images = cfg.batch * (draft2 - draft1) + min(cfg.batch, cfg.lift_chunk or cfg.batch) * (lift2 - lift1)
    return (fixed + images) / 1e9


def distil(cfg, parts, folder, device):
    """The loop (Fig. 2). Leaves checkpoint.pt, log.jsonl and samples/ in `folder`."""
    student = copy.deepcopy(parts.teacher).requires_grad_(True)                  # dropout stays off: eval mode
    ema = copy.deepcopy(parts.teacher)
    opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(cfg.seed)                    # all randomness of the distillation
    half = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")      # all but the drift, which is always float32
    lift, E, start = make_lift(parts.tokenizer, parts.phi, cfg.lift_chunk), parts.tokenizer.E, 0
    print(f"memory: about {memory(student, parts, cfg, half):.1f} GB at batch {cfg.batch} (estimate; --lift-chunk N needs less, more slowly)")
    if cfg.resume:
        saved = sample.read_checkpoint(folder)
        start = saved["step"]
        if saved["rng"].shape != generator.get_state().shape:
            raise ValueError(f"--resume: {folder} did not run on {device}, and its random numbers can only go on where they began")
        student.load_state_dict(saved["student"])
        ema.load_state_dict(saved["ema"])
        opt.load_state_dict(saved["opt"])
        generator.set_state(saved["rng"])

    def save_state(step):
        save(folder / "checkpoint.pt", dict(
            format=sample.FORMAT, step=step, config=dataclasses.asdict(cfg), names=parts.names, parts=parts.files,
            student=student.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), rng=generator.get_state()))

    interrupted, before = [], signal.getsignal(signal.SIGINT)

    def interrupt(number, frame):
        """Ctrl-C: the step is finished first, so that what is saved is whole. A second Ctrl-C does not wait."""
        interrupted.append(number)
        signal.signal(signal.SIGINT, before)

    log, bar = open(folder / "log.jsonl", "a"), tqdm(range(start + 1, cfg.steps + 1), "distil", initial=start, total=cfg.steps)
    signal.signal(signal.SIGINT, interrupt)
    try:
        for step in bar:
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, cfg)
            c = draw_classes(len(parts.names), cfg, generator).to(device)        # (B,)
            with half:
                loss, logs = fpd.fpd_step(student, parts.teacher, lift, E, c, cfg, generator)
            opt.zero_grad(set_to_none=True)
            loss.backward()
            logs["grad_norm"] = nn.utils.clip_grad_norm_(student.parameters(), cfg.clip)
            opt.step()
            decay = min(cfg.ema, (1 + step) / (10 + step))                       # the ramp forgets the teacher's first drafts
            with torch.no_grad():
                for p, q in zip(ema.parameters(), student.parameters()):
                    p.lerp_(q, 1 - decay)
            if step % cfg.log_every == 0:
                row = {"step": step, "loss": loss.item(), **{k: float(v) for k, v in logs.items()}}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix(loss=f"{row['loss']:.3f}", entropy=f"{row['entropy']:.2f}")
                if not torch.isfinite(loss):
                    raise ValueError(f"the loss is {row['loss']} at step {step}: {row}; the last good state is {folder / 'checkpoint.pt'}")
            if step % cfg.sample_every == 0:
                sample_sheet(cfg, parts, ema, folder / "samples" / f"{step:06d}.png")
            if step % cfg.save_every == 0 or step == cfg.steps or interrupted:
                save_state(step)
            if interrupted:
                bar.close()
                print(f"\nstopped; saved after step {step}. Go on with: python train.py --resume --name {folder.name}")
                sys.exit(130)
    finally:
        log.close()
        signal.signal(signal.SIGINT, before)
    return ema


def sample_sheet(cfg, parts, student, path):
    """Teacher in 16 steps, teacher in 1, student in 1: the same labels and captions."""
    c = sample.shown_classes(cfg, len(parts.names))
    rows = [(title, sample.generate(model, parts.tokenizer, c, cfg, steps, seed=cfg.seed))
            for title, model, steps in (("teacher 16", parts.teacher, 16), ("teacher 1", parts.teacher, 1), ("student 1", student, 0))]
    path.parent.mkdir(parents=True, exist_ok=True)
    sample.sheet(rows, [parts.names[i] for i in c]).save(path)


def run_folder(cfg):
    """runs/<name>: the one to resume, or a new one. A finished or foreign run is never written into."""
    runs = Path("runs")
    if cfg.resume:
        folder = runs / cfg.name if cfg.name else sample.newest_run(runs)
        if not (folder / "checkpoint.pt").is_file():
            raise ValueError(f"--resume: there is no {folder / 'checkpoint.pt'}")
        return folder
    if cfg.name:
        if (runs / cfg.name).exists():
            raise ValueError(f"runs/{cfg.name} exists already: add --resume to go on with it, or choose another --name")
        return runs / cfg.name
    name = cfg.dataset + ("-anywhere" if cfg.anywhere else "") + ("-smoke" if cfg.smoke else "")
    numbered = (runs / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in numbered if not folder.exists())


def main():
    cfg = parse()
    device = "cuda" if cfg.gpus != 0 and torch.cuda.is_available() else "cpu"
    folder = run_folder(cfg)
    if cfg.dataset != "imagenet" and len(tok.world(cfg, "test")[0]) < 4:             # bad --data should end here, before anything is written
        raise ValueError(f"--data {cfg.data} has fewer than 40 images; every tenth is kept for the report")
    print(f"run {folder} on {device}, torch {torch.__version__}, python {platform.python_version()}")
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
    begin = time.time()
    parts = prepare(cfg, device)
    for part, path in parts.files.items():
        network = getattr(parts, part)
        print(f"{part}: {type(network).__name__}, {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, {path}")
    prepared = time.time()
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    distil(cfg, parts, folder, device)
    distilled = time.time()
    if cfg.dataset == "imagenet":
        print(f"minutes: prepare {(prepared - begin) / 60:.1f}, distil {(distilled - prepared) / 60:.1f} | pictures: {folder / 'samples'}/ | "
              f"scores: python evaluate.py --run {folder} --reference FILE")
    else:
        images, labels, _ = tok.world(cfg, "test")
        evaluate.report(sample.load_run(folder, device), (images, labels), folder, seed=cfg.seed, n=48 if cfg.smoke else 960)
        print(f"minutes: prepare {(prepared - begin) / 60:.1f}, distil {(distilled - prepared) / 60:.1f}, "
              f"report {(time.time() - distilled) / 60:.1f} | pictures: {folder / 'report.png'}, {folder / 'samples'}/")
    if cfg.smoke:
        print("This was a smoke run: the set-up works. Nothing was learnt, the pictures mean nothing.")


if __name__ == "__main__":
    sample.run_command(main)
