"""sample.py - images from a trained run: the student in one step (Eq. 4), the teacher in T steps.

    python sample.py --class "red circle"               the newest run; without one tests/student.pt
    python sample.py --class 207                        a run of imagenet: class by number or name
    python sample.py --prompt "two red circles"         a run with captions: scenes, laion
    python sample.py --class 207 --teacher --steps 16   the teacher of the run
    python sample.py --dataset imagenet --class 207     the public teacher, no run needed

Every image has its own random generator, so that image i depends on the seed and on i alone, not on
the batch size. train.py draws its grids of images with these functions, and evaluate.py the images
that it scores.
"""
import argparse
import copy
import dataclasses
import math
import os
import sys
import textwrap
import time
import types
import unicodedata
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from tqdm import tqdm

import fpd
from models import (PROMPTS, PUBLIC, SAMPLING, WEIGHTS, Backbone, ConvNet, MaskGen, MaskGIT,
                    TextEncoder, Words, find_weights, imagenet_names)
from tokenizer import VQGAN, TATiTok, to_uint8

# The student of the README's first run, for those who have no run yet.
STUDENT = Path(__file__).resolve().parent / "tests" / "student.pt"
# The classes of the networks that a checkpoint can hold.
NETWORKS = {cls.__name__: cls for cls in (VQGAN, TATiTok, MaskGIT, MaskGen, ConvNet, Backbone,
                                          Words, TextEncoder)}


# ---------------------------------------------------------------- networks and runs from disk
@dataclasses.dataclass
class Networks:
    """The networks of a run, frozen, and what belongs to them. None: the run does not have it."""
    tokenizer: nn.Module = None
    teacher: nn.Module = None         # not in student.pt
    student: nn.Module = None         # the mean of its weights (EMA)
    phi: nn.Module = None             # not loaded by load_public
    judge: nn.Module = None           # the evaluation classifier of shapes and folder
    text: nn.Module = None            # the text encoder; None means that the conditions are labels
    names: list = None                # class names, or the captions of the example grids
    captions: list = None             # captions to train with; None for labels
    cfg: object = None                # the settings of the run; see train.Config
    step: int = None                  # number of steps that the student was trained
    path: Path = None                 # the checkpoint file
    images: str = ""                  # the fingerprint of the training images, a string
    saved: dict = dataclasses.field(default_factory=dict)    # network -> dict; see load_network


def load_network(saved, device):
    """dict(cls=name of its class, args=, state=), as train.py saves it -> the network, frozen."""
    network = NETWORKS[saved["cls"]](**saved["args"])
    network.load_state_dict(saved["state"])
    return network.to(device).eval().requires_grad_(False)


def set_text(text, model):
    """Give a MaskGen the encoding of "", its "no condition"; text is None for a model of labels."""
    if text is not None:
        model.empty.copy_(text.encode([""])[0, :len(model.empty)])


def load_networks(saved, device):
    """{field of Networks: dict that load_network takes} -> Networks."""
    nets = Networks(saved=saved, **{name: load_network(part, device)
                                    for name, part in saved.items()})
    set_text(nets.text, nets.teacher or nets.student)
    return nets


def load_public(dataset, folder, device):
    """The public networks, from a folder of their files or from the hub -> Networks."""
    networks = {}
    for part, (repo, file, load) in PUBLIC[dataset].items():
        # All repositories of the hub give a safetensors file the same name.
        name = (f"{repo.split('/')[1]}.safetensors" if file.endswith(".safetensors")
                else Path(file).name)
        path = find_weights(folder, name, repo, file)
        print(f"loading {part} from {path}", flush=True)
        networks[part] = load(path).to(device)
    nets = Networks(names=imagenet_names() if dataset == "imagenet" else PROMPTS, **networks)
    # Images are never encoded with these networks. Leaving out TA-TiTok's encoder saves 0.3 GB.
    nets.tokenizer.encoder = None
    set_text(nets.text, nets.teacher)
    return nets


def newest_run(default=None):
    """The folder in runs/ whose checkpoint was written last; if there is none, `default`."""
    found = list(Path("runs").glob("*/checkpoint.pt"))
    if not found and default is None:
        raise ValueError("there is no run yet: python train.py makes one")
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else default


def load_run(path, device, weights=None):
    """A run's folder, its checkpoint or its student.pt -> Networks.

    weights   folder of the public networks' files; None: the one that the run was trained with
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    cfg = types.SimpleNamespace(**saved["config"])
    if saved["parts"]:
        nets = load_networks(saved["parts"], device)
    else:
        nets = load_public(cfg.dataset, weights or cfg.weights, device)
    nets.cfg, nets.step, nets.path = cfg, saved["step"], path
    nets.names, nets.images = saved["names"], saved["images"]
    if nets.teacher is not None:
        nets.student = copy.deepcopy(nets.teacher)
        nets.student.load_state_dict(saved["ema"])
    return nets


def save(path, content):
    """torch.save, but a kill or a full disk leaves the old file as it was."""
    new = path.with_suffix(".tmp")
    torch.save(content, new)
    os.replace(new, path)


def save_student(folder):
    """student.pt: the part of a checkpoint that sample.py needs to draw, in float16."""
    saved = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    parts = {part: x for part, x in saved["parts"].items() if part in ("tokenizer", "text")}
    parts["student"] = saved["parts"]["teacher"] | dict(state=saved["ema"])
    for part, x in parts.items():
        parts[part] = x | dict(state={key: value.half() for key, value in x["state"].items()})
    others = {key: saved[key] for key in ("step", "config", "names", "images")}
    save(folder / "student.pt", others | dict(parts=parts))


def network_arguments(parser):
    """The flags that choose the networks. evaluate.py has them, too."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--run", help="runs/<name>, or the file of a checkpoint (default: the "
                        "newest run; if there is none, sample.py takes tests/student.pt)")
    source.add_argument("--dataset", choices=list(PUBLIC), help="use the public teacher of this "
                        "data set, not a run")
    parser.add_argument("--weights", metavar="DIR", help="folder of the public networks' files "
                        f"(default: the run's, or {WEIGHTS}/); all but Inception's are downloaded "
                        "where they are missing")


def chosen_networks(args, device, default=None):
    """The networks that the flags of `network_arguments` name; without flags those of the newest
    run, or of the file `default`. -> Networks; with --dataset no student, step or path"""
    if args.dataset:
        print(f"no run: the public networks of {args.dataset}")
        nets = load_public(args.dataset, args.weights or WEIGHTS, device)
        nets.cfg = types.SimpleNamespace(dataset=args.dataset, smoke=False,
                                         **SAMPLING[args.dataset])
        return nets
    nets = load_run(args.run or newest_run(default), device, args.weights)
    print(f"run {nets.path}: {nets.cfg.dataset}{', smoke' * nets.cfg.smoke}, {nets.step} steps")
    return nets


# ---------------------------------------------------------------- images
def draw_tokens(model, c, generator, cfg, steps=None):
    """The teacher's sample in `steps` steps or, if steps is None, the student's draft.

    c: the condition of B images -> z (B, L)
    """
    if steps is None:
        return fpd.one_step(model, c, cfg.init_mask, generator, cfg.temperature)
    return fpd.sample_teacher(model, c, steps, generator, cfg.sample_guidance, cfg.confidence_noise)


@torch.no_grad()
def decode(tokenizer, z, c):
    """Tokens z (B, L) and their condition -> images (B, 3, H, W) uint8 on the CPU."""
    return to_uint8(tokenizer.decode(tokenizer.E[z], c)).cpu()


def batches(model, tokenizer, c, cfg, steps=None, seed=0, batch=60, progress=None):
    """Images for the conditions c (N, ...), one batch after the other.

    steps       number of steps of the teacher; None: the student's single pass
    progress    title of the progress bar; None: no bar
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


# ---------------------------------------------------------------- grids of images
def grid_conditions(nets):
    """The conditions of every example grid, always the same -> c (n, ...), n captions.

    With captions these are all of nets.names. Up to 12 classes occur once each; of more classes 12
    are chosen, and 8 of ImageNet's.
    """
    if nets.text is not None:
        return nets.text.encode(nets.names), nets.names
    n_classes = len(nets.names)
    n = min(12, n_classes)
    c = torch.arange(n) * n_classes // n
    if n_classes >= 24:
        # In the shapes world, all even labels are circles or triangles. With 1 added to every other
        # pair of labels, squares and crosses occur as well.
        c = c + torch.arange(n) // 2 % 2
    if n_classes == 1000:
        # Classes that papers often show: golden retriever, otter, lesser panda, geyser, ...
        c = torch.tensor([207, 360, 387, 974, 88, 979, 417, 279])
    return c, [nets.names[i] for i in c]


def image_grid(rows, captions):
    """A labelled grid of images -> PIL image.

    rows        [(title, images (n, 3, H, W) uint8), ...]
    captions    n strings above the columns
    """
    n, _, H, W = rows[0][1].shape
    # Small images are shown enlarged.
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


def step_grid(nets, student, cfg):
    """What fpd.fpd_step does to six drafts -> PIL image.

    The first row has the drafts (Eq. 4). The next one has the same drafts with the positions that
    are masked at r = 0.5 in white; TA-TiTok has no such row, because its tokens belong to no place
    in the image. The third has the refinements (Eq. 5). Two more rows show the same for r = 0.85.
    """
    c, captions = grid_conditions(nets)
    c = c[:6].to(nets.tokenizer.E.device)
    generators = fpd.generators(cfg.seed, 0, len(c), c.device)
    z_hat = draw_tokens(student, c, generators, cfg)                            # (n, L)
    drafts = decode(nets.tokenizer, z_hat, c)                                   # (n, 3, H, W)
    rows = [("draft", drafts)]
    for r in (0.5, 0.85):
        z_masked, is_masked = fpd.remask(z_hat, torch.full((len(c),), r), student.K, generators)
        if not isinstance(nets.tokenizer, TATiTok):
            P = math.isqrt(student.L)
            squares = is_masked.view(-1, 1, P, P).float().cpu()
            squares = F.interpolate(squares, drafts.shape[2:]).bool()           # (n, 1, H, W)
            rows.append((f"masked, r = {r}", drafts.masked_fill(squares, 255)))
        z_ref = fpd.refine(nets.teacher, z_masked, c, cfg.refine_guidance, generators)
        rows.append((f"refined, r = {r}", decode(nets.tokenizer, z_ref, c)))
    return image_grid(rows, captions[:6])


# ---------------------------------------------------------------- the command
def class_index(text, names):
    """"207" or "red circle" -> label. A name has priority over a number, because folders are often
    called 1, 2 or 01, 02."""
    def plain(name):
        # Leading zeros do not count (01). Letters with accents have two spellings in Unicode.
        return unicodedata.normalize("NFC", name).lstrip("0")

    found = [name for name in names if plain(name) == plain(text)]
    if text in names or len(found) == 1:
        return names.index(text if text in names else found[0])
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    alike = [name for name in names if text in name] or names
    raise ValueError(
        f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or a name "
        f"({', '.join(alike[:6])}{', ...' if len(alike) > 6 else ''}). ImageNet's 1,000 classes: "
        "sample.py --dataset imagenet --class 207 (the public teacher, downloads 3 GB), or a run "
        "of train.py --dataset imagenet")


def conditions(nets, label, prompt, n):
    """The condition of --class or --prompt, n times; without them, all classes or example captions
    in turn. -> c (n, ...), its description"""
    if (prompt if nets.text is None else label) is not None:
        raise ValueError("use --class for a run with classes, and --prompt for one with captions")
    if prompt is not None:
        return nets.text.encode([prompt] * n), repr(prompt)
    if nets.text is not None:
        captions = [nets.names[i % len(nets.names)] for i in range(n)]
        return nets.text.encode(captions), "the captions of its example grids"
    if label is not None:
        index = class_index(label, nets.names)
        return torch.full((n,), index), nets.names[index]
    return torch.arange(n) % len(nets.names), "all classes"


def run_command(main):
    """Run a command. Expected errors are printed without a traceback, which `python -X dev` shows;
    Ctrl-C ends with code 130."""
    try:
        main()
    except torch.OutOfMemoryError:
        sys.exit("error: the GPU's memory is full. Train with --lift-chunk 1 or a smaller --batch, "
                 "or end other programs on this GPU")
    except (ValueError, OSError, RuntimeError) as error:
        if sys.flags.dev_mode:
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)


def parse():
    parser = argparse.ArgumentParser(
        description="Sample images from a student or from its teacher.", allow_abbrev=False)
    wanted = parser.add_mutually_exclusive_group()
    wanted.add_argument("--class", dest="label", help="class number or name (default: all in turn)")
    wanted.add_argument("--prompt", help="caption, for a run with captions (default: those "
                        "of its example grids in turn)")
    parser.add_argument("--n", type=int, default=16, help="number of images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    parser.add_argument("--out", default="sample.png", help="PNG file (default: sample.png)")
    parser.add_argument("--teacher", action="store_true",
                        help="draw with the teacher in many steps, not with the student in one")
    parser.add_argument("--steps", type=int, help="number of steps of the teacher (default: 16)")
    network_arguments(parser)
    args = parser.parse_args()
    if not args.out.endswith(".png"):
        # Some formats cannot hold a large grid, which would be noticed only after the sampling.
        parser.error("--out has to end in .png")
    if args.steps is not None and (args.steps < 1 or not (args.teacher or args.dataset)):
        parser.error("--steps has to be 1 or more, and needs --teacher: a student takes one step")
    return args


def main():
    # Read the networks.
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    nets = chosen_networks(args, device, STUDENT)
    model, steps, who = nets.student, None, "student, 1 step"
    if args.teacher or model is None:
        steps = args.steps or 16
        model, who = nets.teacher, f"teacher, {steps} steps"
    if model is None:
        raise ValueError(f"{nets.path} contains the student alone: --teacher needs a checkpoint.pt")

    # Draw the images.
    c, what = conditions(nets, args.label, args.prompt, args.n)
    images = generate(model, nets.tokenizer, c, nets.cfg, steps, args.seed, batch=16,
                      progress="sample")

    # Save the grid.
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    image_grid(rows, [""] * columns).save(args.out)
    print(f"{args.out}: {args.n} images | {who} | {what} | seed {args.seed}")


if __name__ == "__main__":
    run_command(main)
