"""sample.py - a trained run, read from disk, and images out of it: the student in one step (Eq. 4),
the teacher in T.

    python sample.py --class 207                        the newest run, or tests/student.pt
    python sample.py --prompt "two red circles"         of a run with captions: scenes, laion
    python sample.py --class 207 --teacher --steps 16   the teacher of the run
    python sample.py --dataset imagenet --class 207     the public teacher, no run needed

Image i depends on the seed and on i alone, not on the batch size: every image has its own random
generator. train.py draws its sheets and evaluate.py its thousands of images with these functions.
"""
import argparse
import copy
import math
import sys
import textwrap
import time
import types
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import fpd
from models import (OFFICIAL, PROMPTS, PUBLIC, WEIGHTS, Backbone, ConvNet, MaskGen, MaskGIT,
                    TextEncoder, Words, find_weights, imagenet_names)
from tokenizer import VQGAN, TATiTok, to_uint8

# The student of the README's first run, for those who have no run yet
STUDENT = Path(__file__).resolve().parent / "tests" / "student.pt"
# The classes of the networks that a checkpoint can hold
PARTS = {cls.__name__: cls for cls in (VQGAN, TATiTok, MaskGIT, MaskGen, ConvNet, Backbone, Words,
                                       TextEncoder)}


# ---------------------------------------------------------------- networks and runs from disk
def load_part(part, device):
    """dict(cls=name of its class, args=, state=), as train.py saves it -> the network, frozen."""
    network = PARTS[part["cls"]](**part["args"])
    network.load_state_dict(part["state"])
    return network.to(device).eval().requires_grad_(False)


def set_text(text, model):
    """Give a MaskGen the encoding of "", its "no condition"; text is None for a model of labels."""
    if text is not None:
        model.empty.copy_(text.encode([""])[0, :len(model.empty)])


def load_parts(parts, device):
    """{part: dict as of load_part} -> namespace of the networks, None where there is none."""
    networks = {name: load_part(part, device) for name, part in parts.items()}
    run = types.SimpleNamespace(**dict(text=None, judge=None, teacher=None) | networks)
    set_text(run.text, run.teacher or run.student)
    return run


def load_official(dataset, folder, device):
    """The public networks, from a folder of their files or from the hub.

    -> namespace of tokenizer, teacher, text (None for imagenet), names; phi and judge are None
    """
    networks = dict(text=None, phi=None, judge=None)
    for part, (repo, file, load) in OFFICIAL[dataset].items():
        name = Path(file).name
        if name.endswith(".safetensors"):
            # the hub's repositories all call that file alike
            name = f"{repo.split('/')[1]}.safetensors"
        path = find_weights(folder, name, repo, file)
        print(f"loading {part} from {path}", flush=True)
        networks[part] = load(path).to(device)
    # no image is encoded, which saves 0.8 GB of TA-TiTok
    networks["tokenizer"].encoder = None
    set_text(networks["text"], networks["teacher"])
    names = imagenet_names() if dataset == "imagenet" else PROMPTS
    return types.SimpleNamespace(**networks, names=names)


def newest_run(default=None):
    """The folder in runs/ whose checkpoint was written last; if there is none, `default`."""
    found = list(Path("runs").glob("*/checkpoint.pt"))
    if not found and default is None:
        raise ValueError("there is no run yet: python train.py makes one")
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else default


def load_run(path, device, weights=None):
    """A run's folder, its checkpoint or its student.pt -> namespace of networks and settings.

    cfg, step    settings; how many steps the student was trained
    path         the checkpoint file, from which all of it comes, but for official networks
    names        of the classes; of a run with captions, those of its sheets
    images       the fingerprint of what it was trained on
    tokenizer, teacher, phi, judge, text    networks; student.pt has only the first and the last,
                 and there the teacher is None
    student      the mean of its weights (EMA)
    weights      the folder of official files; None: the one that the run was trained with
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    cfg = types.SimpleNamespace(**saved["config"])
    if saved["parts"]:
        run = load_parts(saved["parts"], device)
    else:
        run = load_official(cfg.dataset, weights or cfg.weights, device)
    run.cfg, run.step, run.path, run.names = cfg, saved["step"], path, saved["names"]
    run.images = saved["images"]
    if run.teacher is not None:
        run.student = copy.deepcopy(run.teacher)
        run.student.load_state_dict(saved["ema"])
    return run


def model_arguments(parser):
    """The flags that say which networks; shared with evaluate.py."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="runs/<name>, or the file of a checkpoint; by default the "
                        "newest run; sample.py: or else tests/student.pt")
    source.add_argument("--dataset", choices=list(OFFICIAL), help="in place of a run: the public "
                        "teacher")
    parser.add_argument("--weights", metavar="DIR", help="folder of official files; by default the "
                        f"run's own, or {WEIGHTS}/. What is not there comes from the hub")


def load_models(args, device, default=None):
    """What `model_arguments` say, else the newest run, else the file `default` -> namespace as of
    load_run; with --dataset its student, step and path are None."""
    if args.dataset:
        print(f"no run: the public networks of {args.dataset}")
        run = load_official(args.dataset, args.weights or WEIGHTS, device)
        run.cfg = types.SimpleNamespace(**PUBLIC[args.dataset], dataset=args.dataset, smoke=False)
        run.student = run.step = run.path = None
        return run
    path = args.run or newest_run(default)
    run = load_run(path, device, args.weights)
    print(f"run {path}: {run.cfg.dataset}, {run.step} steps")
    return run


# ---------------------------------------------------------------- images
@torch.no_grad()
def draw_tokens(model, c, generator, cfg, steps):
    """The student's draft (steps = 0) or the teacher's sample in `steps` steps. c: condition of B
    images -> z (B, L)"""
    if steps == 0:
        return fpd.one_step(model, c, cfg.init_mask, generator, cfg.temperature)
    return fpd.sample_teacher(model, c, steps, generator, cfg.sample_guidance, cfg.confidence_noise)


@torch.no_grad()
def decode(tokenizer, z, c):
    """Tokens z (B, L) and their condition -> images (B, 3, H, W) uint8 on the CPU."""
    return to_uint8(tokenizer.decode(tokenizer.E[z], c)).cpu()


def batches(model, tokenizer, c, cfg, steps, seed=0, batch=60, progress=None):
    """Images for the conditions c (N, ...), one batch after the other.

    steps       of the teacher; 0: the student's single pass
    progress    title of the progress bar, or None for no bar
    yields      z (B, L), images (B, 3, H, W) uint8 on the CPU, and the seconds that both took
    """
    device = tokenizer.E.device
    starts = range(0, len(c), batch)
    for start in tqdm(starts, progress, leave=False) if progress else starts:
        begin = time.perf_counter()
        part = c[start:start + batch].to(device)
        generators = fpd.generators(seed, start, len(part), device)
        z = draw_tokens(model, part, generators, cfg, steps)
        images = decode(tokenizer, z, part)
        yield z, images, time.perf_counter() - begin


def generate(*args, **kwargs):
    """All images of `batches` at once, (N, 3, H, W) uint8 on the CPU."""
    return torch.cat([images for _, images, _ in batches(*args, **kwargs)])


# ---------------------------------------------------------------- sheets
def grid_conditions(run):
    """The conditions of every sheet, always the same. -> c (n, ...), n captions

    Of captions: all that the run keeps. Of classes: each once, or 12 that are spread over all.
    """
    if run.text is not None:
        return run.text.encode(run.names), run.names
    n_classes = len(run.names)
    n = min(12, n_classes)
    c = torch.arange(n) * n_classes // n
    if n_classes >= 24:
        # every other pair is moved by one, so that all shapes of the shapes world occur
        c = c + torch.arange(n) // 2 % 2
    if n_classes == 1000:
        # ImageNet's classes that papers show: golden retriever, otter, lesser panda, geyser, ...
        c = torch.tensor([207, 360, 387, 974, 88, 979, 417, 279])
    return c, [run.names[i] for i in c]


def image_grid(rows, captions):
    """A labelled grid of images. -> PIL image

    rows        [(title, images (n, 3, H, W) uint8), ...]
    captions    n strings above the columns
    """
    n, _, H, W = rows[0][1].shape
    # small worlds are shown enlarged
    zoom = max(1, 96 // W)
    w, h = W * zoom + 2, H * zoom + 2
    left = 8 + 7 * max(len(title) for title, _ in rows)
    wrapped = [textwrap.wrap(caption, max(8, w // 7), max_lines=5, placeholder=" ...")
               for caption in captions]
    top = 10 + 15 * max(len(lines) for lines in wrapped)
    picture = Image.new("RGB", (left + n * w, top + len(rows) * h), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(12)
    for i, lines in enumerate(wrapped):
        pen.multiline_text((left + i * w + 2, 4), "\n".join(lines), "black", font, spacing=1)
    for j, (title, images) in enumerate(rows):
        pen.text((6, top + j * h + h // 2 - 8), title, "black", font)
        for i, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy())
            tile = tile.resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (left + i * w, top + j * h))
    return picture


def step_grid(parts, student, cfg):
    """What fpd.fpd_step does to six drafts. -> PIL image with these rows: the drafts (Eq. 4); in
    white what r = 0.5 masks of them, but for TA-TiTok, whose tokens have no place; what the teacher
    makes of the rest (Eq. 5); the same for r = 0.85."""
    c, captions = grid_conditions(parts)
    c = c[:6].to(parts.tokenizer.E.device)
    generators = fpd.generators(cfg.seed, 0, len(c), c.device)
    z_hat = draw_tokens(student, c, generators, cfg, 0)                         # (n, L)
    drafts = decode(parts.tokenizer, z_hat, c)                                  # (n, 3, H, W)
    rows = [("draft", drafts)]
    for r in (0.5, 0.85):
        z_masked, is_masked = fpd.remask(z_hat, torch.full((len(c),), r), student.K, generators)
        if not isinstance(parts.tokenizer, TATiTok):
            P = math.isqrt(student.L)
            squares = is_masked.view(-1, 1, P, P).float().cpu()
            squares = F.interpolate(squares, drafts.shape[2:]).bool()           # (n, 1, H, W)
            rows.append((f"masked, r = {r}", drafts.masked_fill(squares, 255)))
        z_ref = fpd.refine(parts.teacher, z_masked, c, cfg.refine_guidance, generators)
        rows.append((f"refined, r = {r}", decode(parts.tokenizer, z_ref, c)))
    return image_grid(rows, captions[:6])


# ---------------------------------------------------------------- the command
def class_index(text, names):
    """"207" or "red circle" -> label. Names go first: folders are often called 1, 2 or 01, 02."""
    def plain(name):
        # without the zeros of 01; letters with accents are one character or two, by the system
        return unicodedata.normalize("NFC", name).lstrip("0")

    found = [name for name in names if plain(name) == plain(text)]
    if text in names or len(found) == 1:
        return names.index(text if text in names else found[0])
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    alike = [name for name in names if text in name] or names
    some = ", ".join(alike[:6]) + (", ..." if len(alike) > 6 else "")
    raise ValueError(f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or "
                     f"a name ({some})")


def conditions(run, label, prompt, n):
    """What --class or --prompt asks for, n times, or all that the run knows in turn. -> c (n, ...),
    what to call it"""
    if label is not None and run.text is not None:
        raise ValueError("this run draws captions: use --prompt")
    if prompt is not None and run.text is None:
        raise ValueError("this run draws classes: use --class")
    if prompt is not None:
        return run.text.encode([prompt] * n), repr(prompt)
    if run.text is not None:
        captions = [run.names[i % len(run.names)] for i in range(n)]
        return run.text.encode(captions), "the captions of its sheets"
    if label is not None:
        index = class_index(label, run.names)
        return torch.full((n,), index), run.names[index]
    return torch.arange(n) % len(run.names), "all classes"


def run_command(main):
    """Run a command line: what a user can mend ends in one line, Ctrl-C in code 130."""
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full: take a smaller --batch, train.py also with "
                 "--lift-chunk 1, or end other programs on this GPU")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)


def parse():
    parser = argparse.ArgumentParser(
        description="Sample images from a distilled student or from its teacher.",
        allow_abbrev=False)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--class", dest="label",
                        help="class number or name; without it, all classes in turn")
    wanted.add_argument("--prompt", help="what to draw, for a run with captions; without it, the "
                        "captions of its sheets in turn")
    parser.add_argument("--n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--teacher", action="store_true",
                        help="the multi-step teacher in place of the student")
    parser.add_argument("--steps", type=int, help="the teacher's steps, 16 by default")
    model_arguments(parser)
    args = parser.parse_args()
    if not args.out.endswith(".png"):
        # others hold no large grids, which would be found out after the drawing
        parser.error("--out should end in .png")
    if args.steps is not None and (args.steps < 1 or not (args.teacher or args.dataset)):
        parser.error("--steps is 1 or more, and goes with --teacher: a student takes one step")
    return args


def main():
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_models(args, device, STUDENT)
    model, steps, who = run.student, 0, "student, 1 step"
    if args.teacher or model is None:
        steps = 16 if args.steps is None else args.steps
        model, who = run.teacher, f"teacher, {steps} steps"
    if model is None:
        raise ValueError(f"{run.path} holds a student alone")
    c, what = conditions(run, args.label, args.prompt, args.n)
    images = generate(model, run.tokenizer, c, run.cfg, steps, args.seed, batch=16,
                      progress="sample")
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    image_grid(rows, [""] * columns).save(args.out)
    print(f"{args.out}: {args.n} images | {who} | {what} | seed {args.seed}")


if __name__ == "__main__":
    run_command(main)
