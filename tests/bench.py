"""bench.py - what an image and a training step cost, in milliseconds. It is run by hand:

    python tests/bench.py --gan-weight 1                  # the shapes world; flags of train.py
    python tests/bench.py --dataset imagenet --random     # full size, random weights, no files
"""
import dataclasses
import sys
import time
import types
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import evaluate
import fpd
import models
import sample
import tokenizer
import train

# The parts of a step: where a function is found, the part that begins when it is called, and the
# part that begins when it returns, where that is another one. The first call begins a step.
STEP = [(train, "draw_condition", "condition", None)]
PARTS = STEP + [
    (fpd, "fpd_step", "student", "backward"), (fpd, "local_correction", "refinement", None),
    (fpd.Lift, "decode", "decode", None), (fpd.Lift, "features", "lift", None),
    (fpd, "drift_loss", "drift", None), (fpd.Gan, "add", "gan", "backward"),
    (fpd.DiMO, "step", "student", "backward"),
    (torch.nn.utils, "clip_grad_norm_", "update", None)]
# In Di[M]O, what follows the teacher's pass is the training of the auxiliary network.
AUXILIARY = [(fpd, "guided_logits", "refinement", "auxiliary")]


def random_networks(dataset):
    """Tokenizer, teacher and Phi of "imagenet" or "laion" in their released sizes."""
    if dataset == "imagenet":
        vqgan = tokenizer.VQGAN(K=1024, d=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2,
                                attn_levels=(4,), z_channels=256, groups=32, image_size=256)
        maskgit = models.MaskGIT(K=1024, L=256, num_classes=1000, width=768, depth=24, heads=16,
                                 mlp=3072)
        return vqgan, maskgit, models.Backbone()
    maskgen = models.MaskGen(K=8192, L=128, width=1024, depth=16, heads=16, text_width=768, T=77,
                             score_width=256, unused_rows=1001)
    return tokenizer.TATiTok(), maskgen, models.Backbone()


def random_parts(dataset, device):
    """-> what train.prepare returns"""
    vqgan, teacher, phi = (sample.frozen(x, device) for x in random_networks(dataset))
    vqgan.encoder = None
    text, names = None, models.imagenet_names()
    if dataset == "laion":
        text, names = sample.frozen(models.TextEncoder(), device), sample.PROMPTS

    def discriminator(files, image_size, device):
        networks = dict(deit=models.Backbone(models.FEATURE_NETWORKS["deit"], 224),
                        efficientnet=models.EfficientNet())
        return models.Discriminator(networks, image_size).to(device)

    # The GAN needs no files, either.
    fpd.load_discriminator = discriminator
    tokenizer.image_files = lambda folder: tokenizer.shapes(torch.arange(24), 0, size=256)
    return types.SimpleNamespace(tokenizer=vqgan, teacher=teacher, phi=phi, text=text, names=names,
                                 captions=names, saved={}, feature_files={})


def bench_sampling(cfg, parts):
    """-> rows: ms per image, of one alone and of 64. The student's network is the teacher's."""
    rows, (shown, _) = [], sample.sheet_conditions(parts)
    for steps in (16, 8, 4, 1, 0):
        row = dict(model="teacher" if steps else "student", steps=steps or 1)
        for n in (1, 64):
            # The first two batches warm up.
            c = shown[torch.arange((3 if cfg.smoke else 7) * n) % len(shown)]
            batches = sample.batches(parts.teacher, parts.tokenizer, c, cfg, steps, batch=n)
            seconds = [seconds for _, _, seconds in batches][2:]
            row[f"of {n}"] = 1000 * median(seconds) / n
        rows.append(row)
    return rows


def time_steps(cfg, parts, device, functions):
    """Some steps of train.distil -> {part: ms}, medians.

    functions   rows of PARTS. Each is replaced by one that first stops the time of the part before.
                The GPU then finishes its work, for which a real step does not wait
    """
    steps, current = [], None

    def begin(part):
        nonlocal current
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if current:
            name, started = current
            steps[-1][name] = steps[-1].get(name, 0.0) + 1000 * (now - started)
        if part == "condition":
            steps.append({})
        current = part, now

    def replacement(function, before, after):
        def call(*args, **kwargs):
            begin(before)
            result = function(*args, **kwargs)
            if after:
                begin(after)
            return result
        return call

    never = 10 ** 9
    cfg = dataclasses.replace(cfg, steps=4 if cfg.smoke else 9, log_every=never,
                              sample_every=never, save_every=never)
    with ExitStack() as stack:
        for name in ("save", "sample_sheet"):
            stack.enter_context(patch.object(train, name))
        for owner, name, before, after in functions:
            new = replacement(getattr(owner, name), before, after)
            stack.enter_context(patch.object(owner, name, new))
        train.distil(cfg, parts, Path(), device)
    # The first two steps warm up, and the last one reads the numbers for the log.
    return {part: median(step[part] for step in steps[2:-1]) for part in steps[2]}


def bench_training(cfg, parts, device):
    """-> rows: ms of a step by parts, and as a whole, without stops; the GPU's peak memory."""
    rows = []
    methods = [("FPD", "fpd", 0.0), ("FPD + GAN", "fpd", cfg.gan_weight), ("Di[M]O", "dimo", 0.0)]
    for name, method, gan_weight in methods:
        if name == "FPD + GAN" and not gan_weight:
            continue
        cfg = dataclasses.replace(cfg, method=method, gan_weight=gan_weight)
        row = dict(row=name)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row["whole"] = time_steps(cfg, parts, device, STEP)["condition"]
        if device == "cuda":
            row["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
        functions = PARTS + AUXILIARY if method == "dimo" else PARTS
        rows.append(row | time_steps(cfg, parts, device, functions))
    return rows


def main():
    is_random = "--random" in sys.argv
    cfg = train.parse([flag for flag in sys.argv[1:] if flag != "--random"])
    device = "cuda" if cfg.gpus != 0 and torch.cuda.is_available() else "cpu"
    if is_random:
        parts = random_parts(cfg.dataset, device)
    else:
        parts = train.prepare(cfg, device, {})
    print(f"{device}, torch {torch.__version__}; ms per image, sampled in float32")
    print(evaluate.text_table(bench_sampling(cfg, parts), "model", "steps", "of 1", "of 64"))
    print(f"ms of a training step, batch {cfg.batch}")
    print(evaluate.text_table(bench_training(cfg, parts, device), "row", "condition", "student",
                              "refinement", "auxiliary", "decode", "lift", "drift", "gan",
                              "backward", "update", "whole", "peak GB"))


if __name__ == "__main__":
    sample.run_command(main)
