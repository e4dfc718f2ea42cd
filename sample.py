"""sample.py - images out: the student in one step (Eq. 4), the teacher in T.

    python sample.py --class 207                    the student of the newest run, one step, a grid as PNG
    python sample.py --class "red circle" --n 64
    python sample.py --class 207 --teacher --steps 16

Image i depends on the seed and on i alone, not on the batch size (every image has its own random generator).
train.py draws its sample sheets and evaluate.py its thousands of images with the functions below.
"""
import argparse
import sys
import types
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import fpd
from models import ConvNet, MaskGIT
from tokenizer import VQGAN, to_uint8


# ------------------------------------------------------------------------------------------------ runs on disk
def load_part(cls, path, device):
    """One prepared network of a small world (train.py, `cached`): rebuilt from its own arguments, frozen."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    part = cls(**saved["args"])
    part.load_state_dict(saved["state"])
    return part.to(device).eval().requires_grad_(False)


def newest_run(runs="runs"):
    """The run whose checkpoint is the newest. ValueError when there is none."""
    found = sorted(Path(runs).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no checkpoint in {runs}/*/ yet: train one with `python train.py` (add --smoke for a quick trial)")
    return found[-1].parent


def load_run(run, device):
    """runs/<name> -> namespace of cfg, names, tokenizer, teacher, phi, judge (None if the world has none), student (its EMA), step."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {run} is not a run, or has not saved yet")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"format", "config", "parts", "names", "ema", "step"} - saved.keys()
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); cut short?") from error
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(sorted(missing))}")
    cfg, parts = types.SimpleNamespace(**saved["config"]), saved["parts"]
    r = types.SimpleNamespace(cfg=cfg, names=saved["names"], step=saved["step"])
    r.tokenizer, r.teacher = load_part(VQGAN, parts["tokenizer"], device), load_part(MaskGIT, parts["teacher"], device)
    r.phi, r.judge = load_part(ConvNet, parts["phi"], device), load_part(ConvNet, parts["judge"], device)
    r.student = load_part(MaskGIT, parts["teacher"], device)                     # same architecture, other weights
    r.student.load_state_dict(saved["ema"])
    return r


# ------------------------------------------------------------------------------------------------ images
def generators(seed, first, n, device):
    """One generator per image: image 1234 is the same picture at batch size 8 and 256 (CPU and GPU streams differ)."""
    return [torch.Generator(device).manual_seed(seed * 1_000_000 + first + i) for i in range(n)]


@torch.no_grad()
def tokens(model, c, generator, cfg, steps):
    """The student's draft (steps = 0) or the teacher's sample in `steps` steps. c: condition of B images -> z (B, L)."""
    if steps == 0:
        return fpd.one_step(model, c, cfg.init_mask, generator, cfg.draft_temperature)
    return fpd.sample(model, c, steps, generator, s=cfg.guidance, noise=cfg.confidence_noise)


@torch.no_grad()
def generate(model, tokenizer, c, cfg, steps, seed=0, batch=60, progress=None):
    """Images for the conditions c (N, ...). steps = 0: the student's single pass. -> (N, 3, H, W) uint8 on the CPU."""
    device, images = tokenizer.E.device, []
    starts = range(0, len(c), batch)
    for start in tqdm(starts, progress, leave=False, disable=progress is None):
        label = c[start:start + batch].to(device)
        z = tokens(model, label, generators(seed, start, len(label), device), cfg, steps)
        images.append(to_uint8(tokenizer.decode(tokenizer.E[z])).cpu())
    return torch.cat(images)


def sheet(rows, captions, zoom=None):
    """A labelled grid. rows: [(title, images (n, 3, H, W) uint8), ...], captions: n strings above the columns -> PIL image."""
    n, _, H, W = rows[0][1].shape
    zoom = zoom or max(1, 96 // W)                                               # small worlds are shown enlarged
    font, left, top, gap = ImageFont.load_default(12), 8 + 7 * max(len(title) for title, _ in rows), 40, 2
    w, h = W * zoom + gap, H * zoom + gap
    picture = Image.new("RGB", (left + n * w, top + len(rows) * h), "white")
    pen = ImageDraw.Draw(picture)
    for i, caption in enumerate(captions):
        pen.multiline_text((left + i * w + 2, 4), caption.replace(" ", "\n", 1), "black", font, spacing=1)
    for j, (title, images) in enumerate(rows):
        pen.text((6, top + j * h + h // 2 - 8), title, "black", font)
        for i, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (left + i * w, top + j * h))
    return picture


# ------------------------------------------------------------------------------------------------ the command
def class_index(text, names):
    """"207" or "red circle" -> label. ValueError names what there is."""
    if text.isdigit() and int(text) < len(names):
        return int(text)
    if text in names:
        return names.index(text)
    some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise ValueError(f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or a name ({some})")


def main():
    parser = argparse.ArgumentParser(description="Sample images from a distilled student or from its teacher.")
    parser.add_argument("--class", dest="label", help="class number or name; without it, all classes in turn")
    parser.add_argument("--run", help="runs/<name>; the newest run if not given")
    parser.add_argument("--n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--teacher", action="store_true", help="the multi-step teacher in place of the student")
    parser.add_argument("--steps", type=int, default=16, help="teacher's steps")
    args = parser.parse_args()
    if args.n < 1 or args.seed < 0:
        raise ValueError(f"--n should be at least 1 and --seed at least 0, got {args.n} and {args.seed}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_run(args.run or newest_run(), device)
    if args.teacher and not 1 <= args.steps <= run.teacher.L:
        raise ValueError(f"--steps should be between 1 and {run.teacher.L}, got {args.steps}")
    c = torch.arange(args.n) % len(run.names) if args.label is None else torch.full((args.n,), class_index(args.label, run.names))
    model, steps = (run.teacher, args.steps) if args.teacher else (run.student, 0)
    images = generate(model, run.tokenizer, c, run.cfg, steps, args.seed, progress="sample")
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    sheet(rows, [""] * columns).save(args.out)
    who = f"teacher, {steps} steps" if args.teacher else f"student, 1 step (trained for {run.step} steps)"
    print(f"{args.out}: {args.n} images | {who} | {'all classes' if args.label is None else run.names[c[0]]} | seed {args.seed}")


def run_command(main):
    """Run a command line: a mistake of the user's ends in one line and exit code 2, not in a traceback."""
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_command(main)
