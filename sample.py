"""sample.py - images out: the student in one step (Eq. 4), the teacher in T.

    python sample.py --class 207                                           the student of the newest run, one step, a grid as PNG
    python sample.py --class "red circle" --n 64
    python sample.py --class 207 --teacher --steps 16                      the teacher of the newest run, or the public one if there is no run
    python sample.py --class 207 --teacher --steps 8 --dataset imagenet    the public one in any case
    python sample.py --class 207 --student pytorch_model.bin --init-mask 0.6       a MaskGIT student of others (Di[M]O), no run needed

Image i depends on the seed and on i alone, not on the batch size (every image has its own random generator).
train.py draws its sample sheets and evaluate.py its thousands of images with the functions below.
"""
import argparse
import copy
import sys
import types
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import fpd
from models import ConvNet, MaskGIT, import_timm, load_maskgit
from tokenizer import VQGAN, find_weights, load_vqgan, to_uint8

FORMAT = 1                                                                       # of checkpoint.pt
HUB = "llvictorll/Maskgit-pytorch"                                               # on the Hugging Face hub: the paper's public networks
OFFICIAL = {"tokenizer": "pretrained_maskgit/VQGAN/last.ckpt", "teacher": "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth"}
# How the public networks are sampled where no run says it: the teacher with the settings that Di[M]O's code has for it (their w = 3
# is our guidance 4), the student with Di[M]O's share of masked tokens
PUBLIC = dict(guidance=4.0, confidence_noise=4.5, init_mask=0.6, draft_temperature=1.0)


# ------------------------------------------------------------------------------------------------ networks from disk
def frozen(network, device):
    return network.to(device).eval().requires_grad_(False)


def load_part(cls, path, device):
    """One prepared network (train.py, `cached`): rebuilt from its own arguments, frozen."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        part = cls(**saved["args"])
        part.load_state_dict(saved["state"])
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path}, which train.py prepared for this run, cannot be read ({type(error).__name__})") from error
    return frozen(part, device)


def official(part, given=None):
    """Path of the official "tokenizer" or "teacher": the user's own file, else weights/, else the hub."""
    return find_weights(part, given or None, OFFICIAL[part], HUB)


def find_all(finders):
    """{part: function without arguments} -> {part: its result}. One ValueError, with a line for each part that is missing."""
    found, missing = {}, []
    for part, find in finders.items():
        try:
            found[part] = find()
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError("\n".join(missing))
    return found


def imagenet_names():
    """The 1000 class names in the order of the labels, "tench" ... "golden retriever" (207) ... Namesakes carry their number, "crane 134"."""
    import_timm()
    from timm.data import ImageNetInfo
    info = ImageNetInfo()
    names = [info.index_to_description(i).split(",")[0] for i in range(1000)]    # the first of several synonyms
    return [f"{name} {i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


# ------------------------------------------------------------------------------------------------ runs on disk
def newest_run(runs="runs"):
    """The run whose checkpoint is the newest. ValueError when there is none."""
    found = sorted(Path(runs).glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no checkpoint in {runs}/*/ yet: train one with `python train.py` (add --smoke for a quick trial)")
    return found[-1].parent


def read_checkpoint(run):
    """runs/<name> -> what train.py saved there. Weights are mapped, not read: asking for the configuration alone costs nothing."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {run} is not a run, or has not saved yet")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = {"format", "config", "names", "parts", "student", "ema", "opt", "rng", "step"} - saved.keys()
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}); cut short?") from error
    if missing:
        raise ValueError(f"{path} is not a checkpoint of train.py: it has no {', '.join(sorted(missing))}")
    if saved["format"] != FORMAT:
        raise ValueError(f"{path} has format {saved['format']}, this program reads format {FORMAT}")
    return saved


def load_run(run, device, teacher=True, given=None):
    """runs/<name> -> namespace of cfg, names, step, tokenizer, teacher, phi, judge (None where there is none), student (its EMA).

    teacher   False: not needed, so that an official teacher's file need not be there
    given     {"tokenizer": FILE, "teacher": FILE}: where official files are now, if not where the run found them
    """
    saved, given = read_checkpoint(run), {part: file for part, file in (given or {}).items() if file}
    cfg, parts = types.SimpleNamespace(**saved["config"]), saved["parts"]
    r = types.SimpleNamespace(cfg=cfg, names=saved["names"], step=saved["step"], teacher=None, phi=None, judge=None)
    if cfg.dataset == "imagenet" and not cfg.smoke:
        def where(part):
            return official(part, given.get(part) or (parts[part] if Path(parts[part]).is_file() else None))
        files = find_all({part: partial(where, part) for part in ("tokenizer", "teacher")[:1 + teacher]})
        r.tokenizer = frozen(load_vqgan(files["tokenizer"]), device)
        r.teacher = frozen(load_maskgit(files["teacher"]), device) if teacher else None
        r.student = frozen(load_maskgit(saved["ema"]), device)
        check_fit(r.student, r.tokenizer)
        return r
    if given:
        raise ValueError(f"--{min(given)}-weights is for imagenet, and {run} is a run of {cfg.dataset}{', smoke' if cfg.smoke else ''}")
    r.tokenizer, r.teacher = load_part(VQGAN, parts["tokenizer"], device), load_part(MaskGIT, parts["teacher"], device)
    if cfg.dataset != "imagenet":
        r.phi, r.judge = load_part(ConvNet, parts["phi"], device), load_part(ConvNet, parts["judge"], device)
    r.student = copy.deepcopy(r.teacher)                                         # same architecture, other weights
    r.student.load_state_dict(saved["ema"])
    return r


def load_public(student_file, teacher, given, init_mask, device):
    """The public networks, without any run -> namespace like load_run's; step None, no student unless its file is named."""
    files = find_all({part: partial(official, part, given[part]) for part in ("tokenizer", "teacher")[:1 + teacher]})
    cfg = types.SimpleNamespace(**PUBLIC, dataset="imagenet", smoke=False)
    cfg.init_mask = cfg.init_mask if init_mask is None else init_mask
    r = types.SimpleNamespace(cfg=cfg, names=imagenet_names(), step=None, teacher=None, student=None, phi=None, judge=None)
    r.student = frozen(load_maskgit(student_file), device) if student_file else None
    r.teacher = frozen(load_maskgit(files["teacher"]), device) if teacher else None
    r.tokenizer = frozen(load_vqgan(files["tokenizer"]), device)
    for model in filter(None, (r.student, r.teacher)):
        check_fit(model, r.tokenizer)
    return r


def check_fit(model, tokenizer):
    """ValueError when a transformer and a tokenizer do not belong together."""
    if (model.K, model.L) != (tokenizer.K, tokenizer.L):
        raise ValueError(f"the transformer answers with {model.L} tokens of {model.K} codes, the tokenizer has {tokenizer.L} of {tokenizer.K}")


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
def batches(model, tokenizer, c, cfg, steps, seed=0, batch=60, progress=None):
    """Images for the conditions c (N, ...), one batch (B, 3, H, W) uint8 on the CPU after the other. steps = 0: the student's single pass."""
    device = tokenizer.E.device
    for start in tqdm(range(0, len(c), batch), progress, leave=False, disable=progress is None):
        label = c[start:start + batch].to(device)
        z = tokens(model, label, generators(seed, start, len(label), device), cfg, steps)
        yield to_uint8(tokenizer.decode(tokenizer.E[z])).cpu()


def generate(*args, **kwargs):
    """All images of `batches` at once, (N, 3, H, W) uint8 on the CPU."""
    return torch.cat(list(batches(*args, **kwargs)))


def shown_classes(cfg, n_classes):
    """The labels of every sheet, always the same: spread over the classes; for ImageNet, eight that papers show. -> (n,), n <= 12"""
    if cfg.dataset == "imagenet":
        return torch.tensor([207, 360, 387, 974, 88, 979, 417, 279])             # golden retriever, otter, lesser panda, geyser, macaw, ...
    n = min(12, n_classes)
    return (torch.arange(n) * n_classes // n + torch.arange(n) // 2 % 2) % n_classes    # all shapes and colours of the shapes world


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
class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become a ValueError, for `run_command`; no guessing at shortened flags."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def run_command(main):
    """Run a command line: a mistake of the user's ends in one line (one for each missing part) and exit code 2, not in a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def model_arguments(parser):
    """The flags that say which networks; shared with evaluate.py."""
    parser.add_argument("--run", help="runs/<name>; the newest run if not given")
    parser.add_argument("--student", metavar="FILE", help="in place of a run: a one-step MaskGIT of others, e.g. Di[M]O's pytorch_model.bin")
    parser.add_argument("--init-mask", type=float, help=f"with --student: its share of masked tokens, {PUBLIC['init_mask']} if not given")
    parser.add_argument("--dataset", choices=["imagenet"], help="in place of a run: the public teacher")
    for part in OFFICIAL:
        parser.add_argument(f"--{part}-weights", metavar="FILE", help=f"imagenet: file of the official {part}, else weights/, else the hub")


def load_models(args, device, student, teacher):
    """What `model_arguments` say -> namespace as of load_run. student, teacher: which of the two the caller is going to use."""
    given = {part: getattr(args, f"{part}_weights") for part in OFFICIAL}
    if args.run and (args.student or args.dataset):
        raise ValueError(f"--run and --{'student' if args.student else 'dataset'} exclude each other")
    if args.init_mask is not None and not args.student:
        raise ValueError("--init-mask goes with --student; a run knows its own")
    if args.init_mask is not None and not 0 < args.init_mask <= 1:
        raise ValueError(f"--init-mask is a share, between 0 and 1, got {args.init_mask}")
    no_run_at_all = not args.run and not any(Path("runs").glob("*/checkpoint.pt"))
    if args.student or args.dataset or (no_run_at_all and not student):
        return load_public(args.student, teacher, given, args.init_mask, device)
    return load_run(args.run or newest_run(), device, teacher, given)


def class_index(text, names):
    """"207" or "red circle" -> label. ValueError names what there is."""
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    if text in names:
        return names.index(text)
    some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise ValueError(f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or a name ({some})")


def main():
    parser = Parser(description="Sample images from a distilled student or from its teacher.")
    parser.add_argument("--class", dest="label", help="class number or name; without it, all classes in turn")
    parser.add_argument("--n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--teacher", action="store_true", help="the multi-step teacher in place of the student")
    parser.add_argument("--steps", type=int, default=16, help="teacher's steps")
    model_arguments(parser)
    args = parser.parse_args()
    if args.n < 1 or args.seed < 0:
        raise ValueError(f"--n should be at least 1 and --seed at least 0, got {args.n} and {args.seed}")
    if args.teacher and args.student:
        raise ValueError("--teacher and --student exclude each other")
    if args.dataset and not args.teacher and not args.student:
        raise ValueError("--dataset imagenet is for the public networks: add --teacher, or --student FILE")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such folder")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_models(args, device, student=not args.teacher, teacher=args.teacher)
    model, steps = (run.teacher, args.steps) if args.teacher else (run.student, 0)
    if args.teacher and not 1 <= args.steps <= model.L:
        raise ValueError(f"--steps should be between 1 and {model.L}, got {args.steps}")
    c = torch.arange(args.n) % len(run.names) if args.label is None else torch.full((args.n,), class_index(args.label, run.names))
    images = generate(model, run.tokenizer, c, run.cfg, steps, args.seed, batch=16, progress="sample")
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    sheet(rows, [""] * columns).save(args.out)
    trained = f"trained for {run.step} steps" if run.step is not None else f"{args.student}, init-mask {run.cfg.init_mask:g}"
    who = f"teacher, {steps} steps" if args.teacher else f"student, 1 step ({trained})"
    print(f"{args.out}: {args.n} images | {who} | {'all classes' if args.label is None else run.names[c[0]]} | seed {args.seed}")
    if run.cfg.smoke:
        print("This is a smoke run: its weights are random or nearly so, the picture means nothing.")


if __name__ == "__main__":
    run_command(main)
