"""sample.py - images out: the student in one step (Eq. 4), the teacher in T.

    python sample.py --class 207                                           the student of the newest run, one step, a grid as PNG
    python sample.py --class "red circle" --n 64
    python sample.py --prompt "two red circles"                            of a run with captions: scenes, laion
    python sample.py --class 207 --teacher --steps 16                      the teacher of the newest run, or the public one if there is no run
    python sample.py --class 207 --teacher --steps 8 --dataset imagenet    the public one in any case
    python sample.py --class 207 --student pytorch_model.bin --init-mask 0.6       a MaskGIT student of others (Di[M]O), no run needed

Image i depends on the seed and on i alone, not on the batch size (every image has its own random generator).
train.py draws its sample sheets and evaluate.py its thousands of images with the functions below.
Also here, what the commands share: networks and runs on disk (load_run, save, write_json), one process for each GPU (launch), tables as text
(text_table), time and memory (Stopwatch, bench).
"""
import argparse
import copy
import itertools
import json
import os
import sys
import textwrap
import time
import types
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import fpd
from models import (CLIP_FILE, CLIP_REPO, Backbone, ConvNet, MaskGen, MaskGIT, TextEncoder, Words,
                    find_weights, imagenet_names, load_maskgen, load_maskgit, load_text_encoder)
from tokenizer import (SUFFIXES, VQGAN, TATiTok, load_strictly, load_tatitok, load_vqgan,
                       read_weights, to_uint8)

FORMAT = 2                                                                       # of checkpoint.pt
# The paper's public networks on the Hugging Face hub: repository, file, loader
OFFICIAL = {"imagenet": {"tokenizer": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/VQGAN/last.ckpt", load_vqgan),
                         "teacher": ("llvictorll/Maskgit-pytorch", "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth", load_maskgit)},
            "laion": {"tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors", load_tatitok),
                      "teacher": ("turkeyju/generator_maskgen_vq_l", "model.safetensors", load_maskgen),
                      "text": (CLIP_REPO, CLIP_FILE, load_text_encoder)}}
PARTS = (VQGAN, TATiTok, MaskGIT, MaskGen, ConvNet, Backbone, Words, TextEncoder)    # what a prepared network can be
# What is drawn of the public MaskGen when nobody says what
CAPTIONS = ["a photo of a dog", "a red car next to a blue house", "three green apples on a wooden table", "a lighthouse at sunset",
            "a bowl of soup", "a small boat on a lake in the mountains", "an astronaut riding a horse", "a yellow bird above a white fence"]
# How the public networks are sampled where no run says it. MaskGIT: the teacher with the settings that Di[M]O's code has for it (their w = 3
# is our guidance 4), a student with Di[M]O's share of masked tokens. MaskGen: its authors' configuration (their guidance 12 is our 13)
PUBLIC = {"imagenet": dict(guidance=4.0, confidence_noise=4.5, init_mask=0.6, temperature=1.0),
          "laion": dict(guidance=13.0, confidence_noise=2.0, init_mask=0.6, temperature=1.0)}


# ------------------------------------------------------------------------------------------------ networks from disk
def frozen(network, device):
    return network.to(device).eval().requires_grad_(False)


def fill(network, state, what):
    """A network of ours gets the weights that we saved for it. ValueError in one line unless keys and shapes are its own and all values finite."""
    return load_strictly(network, read_weights(state, what), what)


def load_part(path, device):
    """One prepared network (train.py, `cached`): rebuilt from the name of its class and its own arguments, frozen."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        part, state = {cls.__name__: cls for cls in PARTS}[saved["cls"]](**saved["args"]), saved["state"]
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path}, which train.py prepared for this run, cannot be read ({type(error).__name__}): without it, train.py "
                         "prepares it anew") from error
    return frozen(fill(part, state, str(path)), device)


def official_files(dataset, teacher, given):
    """The official networks that draw images -> {part: function that finds its file}, for `find_all`: the user's own, else weights/, else the hub.

    teacher: is it needed?   given: {part: the user's own file}
    """
    def find(part):
        repo, file, _ = OFFICIAL[dataset][part]
        return find_weights(part, given.get(part), file, repo, f"{repo.split('/')[1]}.safetensors" if file.endswith(".safetensors") else None)
    if given.get("text") and "text" not in OFFICIAL[dataset]:
        raise ValueError(f"--text-weights goes with --dataset laion: there is no text in {dataset}")
    return {part: partial(find, part) for part in OFFICIAL[dataset] if teacher or part != "teacher"}


def load_official(r, dataset, files, device, student=None):
    """Official networks into the namespace r: tokenizer, teacher and text as far as there are files, and student, a file or a state dict.

    None where there is none. ValueError when one cannot be read or they do not belong together
    """
    def load(part, src):
        return frozen(OFFICIAL[dataset][part][2](src), device)
    r.tokenizer = load("tokenizer", files["tokenizer"])
    r.tokenizer.encoder = None                                                   # nothing is encoded: 0.8 GB less of TA-TiTok
    r.teacher = load("teacher", files["teacher"]) if "teacher" in files else None
    r.student = load("teacher", student) if student else None
    r.text = load("text", files["text"]) if "text" in files else None
    K, L = r.tokenizer.K, r.tokenizer.L
    for model in filter(None, (r.student, r.teacher)):
        if (model.K, model.L) != (K, L):
            raise ValueError(f"the transformer answers with {model.L} tokens of {model.K} codes, the tokenizer has {L} of {K}")
        set_text(r.text, model)
    return r


def set_text(text, model):
    """Give a transformer the encoding of the empty caption, which stands for "no condition". text None: it is not of text; nothing to do"""
    if text:
        model.empty.copy_(text.encode([""])[0, :len(model.empty)])


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


# ------------------------------------------------------------------------------------------------ runs on disk
def newest_run(runs="runs"):
    """The run whose checkpoint is the newest. ValueError when there is none."""
    found = sorted(filter(Path.is_file, Path(runs).glob("*/checkpoint.pt")), key=lambda p: p.stat().st_mtime)
    if not found:
        raise ValueError(f"no checkpoint in {runs}/*/ yet: train one with `python train.py` (add --smoke for a quick trial)")
    return found[-1].parent


def read_checkpoint(run):
    """runs/<name> -> what train.py saved there. Weights are mapped, not read: asking for the configuration alone costs nothing."""
    path = Path(run) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {run} is not a run, or has not saved yet")
    kinds = dict(format=int, config=dict, names=list, parts=dict, student=dict, ema=dict, opt=dict, rng=torch.Tensor, step=int)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        wrong, made = [key for key, kind in kinds.items() if not isinstance(saved.get(key), kind)], saved.get("format")
    except Exception as error:                                                   # a damaged file can make the unpickler raise anything
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is cut short, or another program's") from error
    if isinstance(made, int) and made != FORMAT:                                 # first: another format may have other keys
        raise ValueError(f"{path} has format {made}, {'newer' if made > FORMAT else 'older'} than {FORMAT}, which this program reads; it was "
                         f"made with git revision {saved.get('versions', {}).get('git', 'unknown')}")
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: {', '.join(wrong)} should be in it")
    return saved


def load_run(run, device, teacher=True, given=None):
    """runs/<name> -> namespace of cfg, names, step, tokenizer, teacher, phi, judge, text (None where there is none), student (its EMA).

    names     of the classes; of a run with captions, those of its sheets
    teacher   False: not needed, so that an official teacher's file need not be there
    given     {"tokenizer": FILE, "teacher": FILE, "text": FILE}: where official files are now, if not where the run found them
    """
    saved, given = read_checkpoint(run), given or {}
    cfg, parts = types.SimpleNamespace(**saved["config"]), saved["parts"]
    r = types.SimpleNamespace(cfg=cfg, names=saved["names"], step=saved["step"], teacher=None, phi=None, judge=None, text=None)
    if cfg.dataset in OFFICIAL and not cfg.smoke:
        found = {part: path for part, path in parts.items() if Path(path).is_file()}
        return load_official(r, cfg.dataset, find_all(official_files(cfg.dataset, teacher, found | given)), device, saved["ema"])
    if given:
        raise ValueError(f"--{min(given)}-weights is for imagenet and laion, and {run} is a run of {cfg.dataset}{', smoke' * cfg.smoke}")
    for part, path in parts.items():
        setattr(r, part, load_part(path, device))
    set_text(r.text, r.teacher)
    r.student = fill(copy.deepcopy(r.teacher), saved["ema"], f"{run}/checkpoint.pt")   # same architecture, other weights
    return r


def load_public(dataset, student_file, teacher, given, init_mask, device):
    """The public networks, without any run -> namespace like load_run's; step None, no student unless its file is named."""
    files = find_all(official_files(dataset, teacher, given))
    cfg = types.SimpleNamespace(**PUBLIC[dataset], dataset=dataset, smoke=False)
    cfg.init_mask = cfg.init_mask if init_mask is None else init_mask
    r = types.SimpleNamespace(cfg=cfg, names=imagenet_names() if dataset == "imagenet" else CAPTIONS, step=None, phi=None, judge=None)
    return load_official(r, dataset, files, device, student_file)


def write_whole(path, write):
    """write(path), but whole or not at all: to a file beside it, ".<name>", which then takes its place."""
    path = Path(path)
    new = path.with_name(f".{path.name}")                                        # by the suffix PIL knows the format, and GenEval's scorer images
    write(new)
    os.replace(new, path)


def write_json(path, content):
    """What JSON can hold, whole or not at all."""
    write_whole(path, lambda new: new.write_text(json.dumps(content, indent=1)))


@torch.no_grad()
def tokens(model, c, generator, cfg, steps):
    """The student's draft (steps = 0) or the teacher's sample in `steps` steps. c: condition of B images -> z (B, L)."""
    if steps == 0:
        return fpd.one_step(model, c, cfg.init_mask, generator, cfg.temperature)
    return fpd.sample_teacher(model, c, steps, generator, cfg.guidance, cfg.confidence_noise)


@torch.no_grad()
def batches(model, tokenizer, c, cfg, steps, seed=0, batch=60, progress=None, spent=None):
    """Images for the conditions c (N, ...), one batch (B, 3, H, W) uint8 on the CPU after the other. steps = 0: the student's single pass.

    spent: a list that gets the seconds of each batch
    """
    device = tokenizer.E.device
    for start in tqdm(range(0, len(c), batch), progress, leave=False, disable=progress is None):
        begin, part = time.perf_counter(), c[start:start + batch].to(device)
        z = tokens(model, part, fpd.generators(seed, start, len(part), device), cfg, steps)
        images = to_uint8(tokenizer.decode(tokenizer.E[z], part)).cpu()
        if spent is not None:
            spent.append(time.perf_counter() - begin)
        yield images


def generate(*args, **kwargs):
    """All images of `batches` at once, (N, 3, H, W) uint8 on the CPU."""
    return torch.cat(list(batches(*args, **kwargs)))


def shown(run):
    """The conditions of every sheet, always the same: of captions, all that the run keeps; of classes, some, spread over them; of
    ImageNet, eight that papers show. -> c (n, ...), n captions, n <= 12"""
    if run.text:
        return run.text.encode(run.names), run.names
    n_classes = len(run.names)
    n = min(12, n_classes)
    c = (torch.arange(n) * n_classes // n + torch.arange(n) // 2 % 2) % n_classes       # all shapes and colours of the shapes world
    if n_classes == 1000:
        c = torch.tensor([207, 360, 387, 974, 88, 979, 417, 279])                # golden retriever, otter, lesser panda, geyser, macaw, ...
    return c, [run.names[i] for i in c]


def sheet(rows, captions):
    """A labelled grid. rows: [(title, images (n, 3, H, W) uint8), ...], captions: n strings above the columns -> PIL image."""
    n, _, H, W = rows[0][1].shape
    zoom = max(1, 96 // W)                                                       # small worlds are shown enlarged
    font, left, gap = ImageFont.load_default(12), 8 + 7 * max(len(title) for title, _ in rows), 2
    w, h = W * zoom + gap, H * zoom + gap
    wrapped = [textwrap.wrap(caption, max(8, w // 7), max_lines=5, placeholder=" ...") for caption in captions]
    top = 10 + 15 * max(len(lines) for lines in wrapped)
    picture = Image.new("RGB", (left + n * w, top + len(rows) * h), "white")
    pen = ImageDraw.Draw(picture)
    for i, lines in enumerate(wrapped):
        pen.multiline_text((left + i * w + 2, 4), "\n".join(lines), "black", font, spacing=1)
    for j, (title, images) in enumerate(rows):
        pen.text((6, top + j * h + h // 2 - 8), title, "black", font)
        for i, image in enumerate(images):
            tile = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((W * zoom, H * zoom), Image.Resampling.NEAREST)
            picture.paste(tile, (left + i * w, top + j * h))
    return picture


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become a ValueError, for `run_command`; no guessing at shortened flags."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def run_command(main):
    """Run a command line. No tracebacks: a mistake of the user's ends in one line (one for each missing part) and code 2, Ctrl-C in 130."""
    try:
        main()
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}")
        sys.exit(130)


def model_arguments(parser):
    """The flags that say which networks; shared with evaluate.py."""
    parser.add_argument("--run", help="runs/<name>; the newest run if not given")
    parser.add_argument("--student", metavar="FILE", help="in place of a run: a one-step MaskGIT of others, e.g. Di[M]O's pytorch_model.bin")
    parser.add_argument("--init-mask", type=float, help="with --student: its share of masked tokens, 0.6 if not given")
    parser.add_argument("--dataset", choices=list(OFFICIAL), help="in place of a run: the public teacher; with --student, which kind it is")
    for part in ("tokenizer", "teacher", "text"):
        parser.add_argument(f"--{part}-weights", metavar="FILE", help=f"official networks: file of the {part}, else weights/, else the hub")


def load_models(args, device, teacher, public=False):
    """What `model_arguments` say -> namespace as of load_run. args.run: from now on the run that it is, None for public networks

    teacher   is it needed?
    public    where there is no run at all, the public teacher of ImageNet takes its place
    """
    given = {part: getattr(args, f"{part}_weights") for part in ("tokenizer", "teacher", "text") if getattr(args, f"{part}_weights")}
    if args.run and (args.student or args.dataset):
        raise ValueError(f"--run and --{'student' if args.student else 'dataset'} exclude each other")
    if args.init_mask is not None and not args.student:
        raise ValueError("--init-mask goes with --student; a run knows its own")
    if args.init_mask is not None and not 0 < args.init_mask <= 1:
        raise ValueError(f"--init-mask is a share, between 0 and 1, got {args.init_mask}")
    no_run_at_all = not args.run and not any(Path("runs").glob("*/checkpoint.pt"))
    if args.student or args.dataset or (no_run_at_all and public):
        return load_public(args.dataset or "imagenet", args.student, teacher, given, args.init_mask, device)
    args.run = args.run or newest_run()
    return load_run(args.run, device, teacher, given)


def class_index(text, names):
    """"207" or "red circle" -> label. ValueError names what there is."""
    if text in names:                                                            # first: folders are often called 1, 2, 3
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise ValueError(f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or a name ({some})")


def tell_cut(text, captions):
    """Say which captions are longer than CLIP reads, and what is lost: of five at most. Other encoders read all that they know."""
    if isinstance(text, TextEncoder):
        for caption, lost in itertools.islice(text.cut_captions(captions).items(), 5):
            print(f"caption longer than 77 tokens: {caption[:40]!r}... loses its end, {lost[:60]!r}")


def check_seed(seed, flag="--seed"):
    if not 0 <= seed < 2 ** 32:                                                  # `generators` makes larger numbers of it, of 64 bits
        raise ValueError(f"{flag} should be between 0 and {2 ** 32 - 1}, got {seed}")


def check_writable(folder):
    """ValueError where a folder, there or to be made, cannot be written into: before the work is done, not after it."""
    there = next(place for place in (Path(folder).absolute(), *Path(folder).absolute().parents) if place.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise ValueError(f"{folder} cannot be written into: {there} is {'read-only' if there.is_dir() else 'not a folder'}")


def condition(run, label, prompt, n):
    """What --class or --prompt asks for, n times, or all that the run knows in turn. -> c (n, ...), what to call it"""
    if run.text and label is not None or not run.text and prompt is not None:
        raise ValueError("this run draws captions: use --prompt" if run.text else "this run draws classes: use --class")
    if run.text:
        captions = [prompt if prompt is not None else run.names[i % len(run.names)] for i in range(n)]
        tell_cut(run.text, captions)
        return run.text.encode(captions), repr(prompt) if prompt is not None else "the captions of its sheets"
    if label is None:
        return torch.arange(n) % len(run.names), "all classes"
    return torch.full((n,), class_index(label, run.names)), run.names[class_index(label, run.names)]


def main():
    parser = Parser(description="Sample images from a distilled student or from its teacher.")
    parser.add_argument("--class", dest="label", help="class number or name; without it, all classes in turn")
    parser.add_argument("--prompt", help="what to draw, for a run with captions; without it, the captions of its sheets in turn")
    parser.add_argument("--n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--teacher", action="store_true", help="the multi-step teacher in place of the student")
    parser.add_argument("--steps", type=int, help="teacher's steps, 16 if not given")
    model_arguments(parser)
    args = parser.parse_args()
    if args.n < 1:
        raise ValueError(f"--n should be at least 1, got {args.n}")
    check_seed(args.seed)
    if args.steps is not None and not args.teacher:
        raise ValueError("--steps goes with --teacher: a student takes one step")
    if args.teacher and args.student:
        raise ValueError("--teacher and --student exclude each other")
    if args.dataset and not args.teacher and not args.student:
        raise ValueError(f"--dataset {args.dataset} is for the public networks: add --teacher, or --student FILE")
    if args.prompt is not None and args.label is not None:
        raise ValueError("--prompt and --class exclude each other")
    if Path(args.out).is_dir() or Path(args.out).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {args.out} should be a picture to be made, such as sample.png ({', '.join(sorted(SUFFIXES))})")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such folder")
    check_writable(Path(args.out).parent)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_models(args, device, teacher=args.teacher, public=args.teacher)
    model, steps = (run.teacher, 16 if args.steps is None else args.steps) if args.teacher else (run.student, 0)
    if args.teacher and not 1 <= steps <= model.L:
        raise ValueError(f"--steps should be between 1 and {model.L}, got {steps}")
    c, what = condition(run, args.label, args.prompt, args.n)
    images = generate(model, run.tokenizer, c, run.cfg, steps, args.seed, batch=16, progress="sample")
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    sheet(rows, [""] * columns).save(args.out)
    trained = f"trained for {run.step} steps" if run.step is not None else f"{args.student}, init-mask {run.cfg.init_mask:g}"
    who = f"teacher, {steps} steps" if args.teacher else f"student, 1 step ({trained})"
    print(f"{args.out}: {args.n} images | {who} | {what} | seed {args.seed}")
    if run.cfg.smoke:
        print("This is a smoke run: its weights are random or nearly so, the picture means nothing.")


if __name__ == "__main__":
    run_command(main)
