"""bench.py - what an image and a training step cost, in milliseconds. It is run by hand:

    python tests/bench.py --gan-weight 1                  # the shapes world; flags of train.py
    python tests/bench.py --dataset imagenet --random     # full size, random weights, no files

As in train.py, --gan-weight 1 of imagenet needs --data; with --random any folder will do.
"""
import dataclasses
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import fpd
import models
import sample
import tokenizer
import train

# Where a function is found, the part of a step that begins when it is called, and the one that
# begins when it returns, if that is another one. The first one begins a step.
PARTS = [(train, "draw_condition", "condition", None), (fpd, "fpd_step", "student", "backward"),
         (fpd, "local_correction", "refinement", None), (fpd.Lift, "decode", "decode", None),
         (fpd.Lift, "features", "lift", None), (fpd, "drift_loss", "drift", None),
         (train.Gan, "gradient", "gan", "backward"), (fpd.DiMO, "step", "student", "backward"),
         # In Di[M]O, what follows the teacher's pass is the training of the auxiliary network.
         (fpd, "guided_logits", "refinement", "auxiliary"),
         (torch.nn.utils, "clip_grad_norm_", "update", None)]


def random_networks(dataset):
    """Tokenizer, teacher and Phi of "imagenet" or "laion" in their released sizes."""
    if dataset == "imagenet":
        vqgan = tokenizer.VQGAN(K=1024, d=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2,
                                attn_levels=(4,), z_channels=256, groups=32, image_size=256)
        return vqgan, models.MaskGIT(K=1024, L=256, num_classes=1000, width=768, depth=24,
                                     heads=16, mlp=3072), models.Backbone()
    maskgen = models.MaskGen(K=8192, L=128, width=1024, depth=16, heads=16, text_width=768, T=77,
                             score_width=256, unused_rows=1001)
    return tokenizer.TATiTok(), maskgen, models.Backbone()


def frozen(network, device):
    return network.to(device).eval().requires_grad_(False)


def random_prepared(cfg, device):
    """-> what train.prepare returns. The GAN needs no files, either."""
    vqgan, teacher, phi = (frozen(x, device) for x in random_networks(cfg.dataset))
    vqgan.encoder = None
    nets = sample.Networks(tokenizer=vqgan, teacher=teacher, phi=phi, cfg=cfg,
                           names=models.imagenet_names())
    if cfg.dataset == "laion":
        nets.text = frozen(models.TextEncoder(), device)
        nets.captions = nets.names = sample.PROMPTS
    tokenizer.image_files = lambda folder: tokenizer.shapes(torch.arange(24), 0, size=256)
    train.find_backbone = lambda name, folder: None
    train.load_discriminator = lambda files, size, device: models.Discriminator(
        dict(deit=models.Backbone(models.FEATURE_NETWORKS["deit"], 224),
             efficientnet=models.EfficientNet()), size).to(device)
    return nets


def bench_sampling(cfg, nets):
    """-> rows: ms per image, of one alone and of 64. The student's network is the teacher's."""
    rows, (examples, _) = [], sample.grid_conditions(nets)
    for steps in (16, 8, 4, 1, None):
        row = dict(model="teacher" if steps else "student", steps=steps or 1)
        for n in (1, 64):
            c = examples[torch.arange((3 if cfg.smoke else 7) * n) % len(examples)]
            batches = sample.batches(nets.teacher, nets.tokenizer, c, cfg, steps, batch=n)
            # The first two batches warm up.
            row[f"of {n}"] = 1000 * median([seconds for _, _, seconds in batches][2:]) / n
        rows.append(row)
    return rows


def bench_training(cfg, nets, device):
    """-> rows: ms of a step's parts, medians. At the beginning of each, a GPU first finishes its
    work. For the column `whole`, and for the GPU's peak memory, it does not."""
    begun = []                                                      # (part, when it began)

    def begin(part):
        if waits and device == "cuda":
            torch.cuda.synchronize()
        begun.append((part, time.perf_counter()))

    def timed(function, before, after):
        def call(*args, **kwargs):
            begin(before)
            result = function(*args, **kwargs)
            if after:
                begin(after)
            return result
        return call

    for owner, name, before, after in PARTS:
        setattr(owner, name, timed(getattr(owner, name), before, after))
    train.save_checkpoint = train.example_rows = train.sample_grid = lambda *args: None
    rows, methods = [], {"FPD": ("fpd", 0.0), "FPD + GAN": ("fpd", cfg.gan_weight),
                         "Di[M]O": ("dimo", 0.0)}
    if not cfg.gan_weight:
        del methods["FPD + GAN"]
    for name, (method, gan_weight) in methods.items():
        cfg = dataclasses.replace(
            cfg, method=method, gan_weight=gan_weight, steps=4 if cfg.smoke else 9,
            log_every=10 ** 9, sample_every=10 ** 9, save_every=10 ** 9)
        row = dict(row=name)
        for waits in (False, True):
            begun.clear()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with TemporaryDirectory() as folder:
                train.distil(cfg, nets, Path(folder), device)
            steps = []
            for (part, start), (_, end) in pairwise([*begun, begun[-1]]):
                if part == "condition":
                    steps.append(Counter())
                if part == "auxiliary" and method == "fpd":
                    part = "refinement"
                steps[-1][part] += 1000 * (end - start)
            # The first two steps warm up, and the last one reads the numbers for the log.
            if waits:
                row |= {part: median(step[part] for step in steps[2:-1]) for part in steps[2]}
                continue
            row["whole"] = median(step.total() for step in steps[2:-1])
            if device == "cuda":
                row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        rows.append(row)
    return rows


def main():
    cfg = train.parse([flag for flag in sys.argv[1:] if flag != "--random"])
    device = "cuda" if cfg.gpus != 0 and torch.cuda.is_available() else "cpu"
    if "--random" in sys.argv:
        nets = random_prepared(cfg, device)
    else:
        nets = train.prepare(cfg, device, {})
    print(f"{device}, torch {torch.__version__}; ms per image, sampled in float32")
    print(evaluate.text_table(bench_sampling(cfg, nets), "model", "steps", "of 1", "of 64"))
    columns = ("row condition student refinement auxiliary decode lift drift gan backward update "
               "whole").split()
    print(f"ms of a training step, batch {cfg.batch}")
    print(evaluate.text_table(bench_training(cfg, nets, device), *columns, "peak GB"))


if __name__ == "__main__":
    sample.run_command(main)
