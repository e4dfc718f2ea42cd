"""train.py - the whole run, from nothing to a one-step student and its report.

    prepare (once, cached)   images -> tokenizer (VQGAN) -> teacher (MaskGIT, Eq. 2);   images -> Phi, judge
    distil                   student = copy of the teacher; fpd.fpd_step (Eq. 3 to 8), AdamW, EMA
    leave                    runs/<name>/: config.json, log.jsonl, samples/, checkpoint.pt, report.json, report.png

    python train.py                                   # the shapes world on a CPU
    python train.py --dataset folder --data DIR       # your own images, one subfolder per class
    python train.py --smoke                           # under a minute: proves the set-up, learns nothing
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
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import evaluate
import fpd
import sample
import tokenizer as tok
from models import ConvNet, MaskGIT

FORMAT = 1                                                                       # of checkpoint.pt


@dataclasses.dataclass
class Config:
    """Every setting, written once. Defaults are the paper's where it has one (Sec. 4.1); SMALL says what the small worlds change."""
    # what runs
    dataset: str = "shapes"           # shapes | folder
    data: str = ""                    # folder: the directory with one subfolder of images per class
    anywhere: bool = False            # shapes: objects anywhere on the canvas, the hard world, in place of near its centre
    name: str = ""                    # runs/<name>; made from the settings above when empty
    resume: bool = False              # go on with an interrupted run (the newest, or --name)
    gpus: int = None                  # 0: CPU, 1: one CUDA GPU; 1 where there is one when not given
    smoke: bool = False               # tiny step counts: proves the set-up, learns nothing
    seed: int = 0                     # of the distillation, its samples and its report
    # preparation of the small worlds
    prepare_seed: int = 0             # of tokenizer, Phi, judge and teacher: runs with other --seed share them, as they would official ones
    tokenizer_steps: int = 1000       # VQGAN, batch 32
    classifier_steps: int = 400       # Phi and the judge, batch 64
    teacher_steps: int = 2500         # MaskGIT, batch 64
    # sampling
    guidance: float = 2.0             # the multi-step teacher's, in its last step; 1 = none
    confidence_noise: float = 4.5     # Gumbel noise on the teacher's confidence (the official sampler's r_temp)
    # the method
    init_mask: float = 0.9            # r_init of Sec. 3.2, "nearly fully masked"; stored with the student, who knows no other
    draft_temperature: float = 1.0    # of Eq. 4, in training and sampling
    remask_min: float = 0.1           # pi of Eq. 5: arccos(u) 2/pi between these two
    remask_max: float = 0.9
    teacher_cfg: float = 2.0          # guidance of the refinement (Eq. 5)
    refine_steps: int = 1             # teacher passes of a refinement; 1 in the paper
    bandwidths: tuple = (0.02, 0.05, 0.2)    # H of Eq. 7 (Sec. 4.1)
    affinity: str = "joint"           # joint | apart: attraction and repulsion normalised together or each alone (Eq. 6)
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
    # bookkeeping
    log_every: int = 10
    sample_every: int = 100
    save_every: int = 100


# What the small worlds change, and why: their student is 200 times smaller and trains for minutes, not days
SMALL = dict(lr=3e-4, batch=64, steps=600, warmup=20, decay=0.7, ema=0.98)
SMOKE = dict(tokenizer_steps=4, classifier_steps=4, teacher_steps=4, steps=4, log_every=1, sample_every=2, save_every=2)


def parse(argv=None):
    """Command line -> Config: the paper's defaults, then SMALL, then SMOKE, then what the user typed. Unknown flags stop the run."""
    parser = argparse.ArgumentParser(description="Distil a masked discrete diffusion model into one step (FPD).",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Config):
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        elif f.type is tuple:
            kind = dict(type=float, nargs="+")
        else:
            kind = dict(type=f.type)
        parser.add_argument("--" + f.name.replace("_", "-"), **kind)
    typed = vars(parser.parse_args(argv))
    cfg = Config(**{**SMALL, **(SMOKE if typed.get("smoke") else {}), **typed})
    cfg.bandwidths = tuple(cfg.bandwidths)
    check(cfg)
    return cfg


def check(cfg):
    """ValueError, in one line, for settings that cannot work."""
    def want(ok, text):
        if not ok:
            raise ValueError(text)
    want(cfg.prepare_seed >= 0, f"--prepare-seed should not be negative, got {cfg.prepare_seed}")
    for name, options in dict(dataset=("shapes", "folder"), affinity=("joint", "apart"), estimator=("ste", "soft")).items():
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
    want(cfg.gpus in (None, 0, 1), f"--gpus should be 0 or 1, got {cfg.gpus}")
    want(cfg.gpus != 1 or torch.cuda.is_available(), "--gpus 1: there is no CUDA device here; leave --gpus away to run on the CPU")


# ------------------------------------------------------------------------------------------------ preparation of the small worlds
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


def prepare(cfg, device):
    """Everything that distillation takes as given, trained where it is not there yet. -> namespace of networks, names, and their files.

    A part's file name carries a hash of what it was made from, so a changed setting makes a new file and old runs keep theirs.
    """
    files, made_from = {}, {"dataset": cfg.dataset, "data": cfg.data and str(Path(cfg.data).resolve()), "anywhere": cfg.anywhere,
                            "seed": cfg.prepare_seed, "smoke": cfg.smoke}
    parts = types.SimpleNamespace(names=tok.world(cfg, "test")[2], files=files)

    def cached(part, cls, build, **settings):
        key = json.dumps({**made_from, **settings}, sort_keys=True)
        path = Path("runs/prepared") / f"{cfg.dataset}-{part}-{hashlib.sha256(key.encode()).hexdigest()[:10]}.pt"
        if not path.exists():
            torch.manual_seed(4 * cfg.prepare_seed + len(files))
            network, args = build()
            save(path, dict(args=args, state=network.state_dict(), made_from=key))
        files[part] = str(path)
        setattr(parts, part, sample.load_part(cls, path, device))

    cached("tokenizer", tok.VQGAN, lambda: train_tokenizer(cfg, device), steps=cfg.tokenizer_steps)
    cached("phi", ConvNet, lambda: train_classifier(cfg, device, "phi", 32), steps=cfg.classifier_steps)
    cached("judge", ConvNet, lambda: train_classifier(cfg, device, "judge", 24), steps=cfg.classifier_steps, judge=True)
    cached("teacher", MaskGIT, lambda: train_teacher(cfg, device, parts.tokenizer), steps=cfg.teacher_steps, tokenizer=files["tokenizer"])
    return parts


# ------------------------------------------------------------------------------------------------ distillation
def make_lift(tokenizer, phi, grid=4):
    """E[z] -> features (Sec. 3.3): decoder, Phi, one X (B, F, D) per block. Frozen, but gradients pass. F = grid^2 positions."""
    def lift(e):
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
    picks = torch.cat([torch.randperm(n_classes, generator=generator) for _ in range(-(-G // n_classes))])[:G]
    return picks.repeat_interleave(cfg.per_class)


def learning_rate(step, cfg):
    """Linear warm-up, constant, then a cosine to 0 over the last share cfg.decay of the run."""
    left = (cfg.steps + 1 - step) / max(1, cfg.decay * cfg.steps)                # 1 where the fall begins, 0 after the last step
    return cfg.lr * min(1, step / cfg.warmup) * (1 - math.cos(math.pi * min(1, left))) / 2


def distil(cfg, parts, folder, device):
    """The loop (Fig. 2). Leaves checkpoint.pt, log.jsonl and samples/ in `folder`."""
    student = copy.deepcopy(parts.teacher).requires_grad_(True)                  # dropout stays off: eval mode
    ema = copy.deepcopy(parts.teacher)
    opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=0.0)
    generator = torch.Generator(device).manual_seed(cfg.seed)                    # all randomness of the distillation
    lift, E, start = make_lift(parts.tokenizer, parts.phi), parts.tokenizer.E, 0
    if cfg.resume:
        saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        start = saved["step"]
        student.load_state_dict(saved["student"])
        ema.load_state_dict(saved["ema"])
        opt.load_state_dict(saved["opt"])
        generator.set_state(saved["rng"])

    def checkpoint(step):
        save(folder / "checkpoint.pt", dict(format=FORMAT, step=step, config=dataclasses.asdict(cfg), names=parts.names, parts=parts.files,
                                            student=student.state_dict(), ema=ema.state_dict(), opt=opt.state_dict(), rng=generator.get_state()))

    log, bar, step = open(folder / "log.jsonl", "a"), tqdm(range(start + 1, cfg.steps + 1), "distil", initial=start, total=cfg.steps), start
    try:
        for step in bar:
            for group in opt.param_groups:
                group["lr"] = learning_rate(step, cfg)
            c = draw_classes(len(parts.names), cfg, generator).to(device)        # (B,)
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
            if step % cfg.sample_every == 0 or step == cfg.steps:
                sample_sheet(cfg, parts, ema, folder / "samples" / f"{step:06d}.png")
            if step % cfg.save_every == 0 or step == cfg.steps:
                checkpoint(step)
    except KeyboardInterrupt:
        checkpoint(step - 1)
        print(f"\nstopped; saved. Go on with: python train.py --resume --name {folder.name}")
        sys.exit(130)
    finally:
        log.close()
    return ema


def sample_sheet(cfg, parts, student, path):
    """Teacher in 16 steps, teacher in 1, student in 1: the same labels and captions."""
    n = min(12, len(parts.names))
    c = torch.arange(n) * len(parts.names) // n + torch.arange(n) % 2            # spread over the classes
    c = c % len(parts.names)
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
    tok.world(cfg, "test")                                                           # bad --data should end here, before anything is written
    print(f"run {folder} on {device}, torch {torch.__version__}, python {platform.python_version()}")
    print(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(cfg).items()))
    begin = time.time()
    parts = prepare(cfg, device)
    prepared = time.time()
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(cfg), indent=1))
    distil(cfg, parts, folder, device)
    distilled = time.time()
    images, labels, _ = tok.world(cfg, "test")
    evaluate.report(sample.load_run(folder, device), (images, labels), folder, n=48 if cfg.smoke else 960)
    print(f"minutes: prepare {(prepared - begin) / 60:.1f}, distil {(distilled - prepared) / 60:.1f}, "
          f"report {(time.time() - distilled) / 60:.1f} | pictures: {folder / 'report.png'}, {folder / 'samples'}/")
    if cfg.smoke:
        print("This was a smoke run: the set-up works. Nothing was learnt, the pictures mean nothing.")


if __name__ == "__main__":
    sample.run_command(main)
