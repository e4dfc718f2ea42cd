"""sample.py - a trained run, read from disk, and images out of it: the student in one step (Eq. 4),
the teacher in T.

    python sample.py --class 207                           the newest run's student, a grid as PNG
    python sample.py --class "red circle" --n 64
    python sample.py --prompt "two red circles"            of a run with captions: scenes, laion
    python sample.py --run runs/shapes                     of this run, or of a checkpoint file that
                                                           somebody was sent
    python sample.py --class 207 --teacher --steps 16      the teacher of the newest run, or the
                                                           public one if there is no run
    python sample.py --teacher --dataset imagenet          the public one in any case
    python sample.py --student pytorch_model.bin           a MaskGIT student of others (Di[M]O), no
                     --init-mask 0.6 --class 207           run needed

Image i depends on the seed and on i alone, not on the batch size: every image has its own random
generator. train.py draws its sheets and evaluate.py its thousands of images with these functions.
"""
import argparse
import copy
import hashlib
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
from models import (CLIP_FILE, CLIP_REPO, WEIGHTS, Backbone, ConvNet, MaskGen, MaskGIT, TextEncoder,
                    Words, find_weights, imagenet_names, load_maskgen, load_maskgit,
                    load_text_encoder)
from tokenizer import (SUFFIXES, VQGAN, TATiTok, load_strictly, load_tatitok, load_vqgan,
                       read_weights, to_uint8)

# Of checkpoint.pt: raised when what it holds changes; of its settings, see train.saved_settings
FORMAT = 4
# The paper's public networks on the Hugging Face hub: repository, file, loader
MASKGIT_REPO = "llvictorll/Maskgit-pytorch"
OFFICIAL = {
    "imagenet": {
        "tokenizer": (MASKGIT_REPO, "pretrained_maskgit/VQGAN/last.ckpt", load_vqgan),
        "teacher": (MASKGIT_REPO, "pretrained_maskgit/MaskGIT/MaskGIT_ImageNet_256.pth",
                    load_maskgit)},
    "laion": {
        "tokenizer": ("turkeyju/tokenizer_tatitok_bl128_vq", "model.safetensors", load_tatitok),
        "teacher": ("turkeyju/generator_maskgen_vq_l", "model.safetensors", load_maskgen),
        "text": (CLIP_REPO, CLIP_FILE, load_text_encoder)}}
# How they are sampled where no run says it. MaskGIT: the teacher with the settings that Di[M]O's
# code has for it (their w = 3 is our guidance 4), a student with Di[M]O's share of masked tokens.
# MaskGen: its authors' configuration (their guidance 12 is our 13)
PUBLIC = {"imagenet": dict(guidance=4.0, confidence_noise=4.5, init_mask=0.6, temperature=1.0),
          "laion": dict(guidance=13.0, confidence_noise=2.0, init_mask=0.6, temperature=1.0)}
# What is drawn of the public MaskGen when nobody says what
CAPTIONS = ["a photo of a dog", "a red car next to a blue house",
            "three green apples on a wooden table", "a lighthouse at sunset", "a bowl of soup",
            "a small boat on a lake in the mountains", "an astronaut riding a horse",
            "a yellow bird above a white fence"]
# What a network can be that train.py prepared
PARTS = {cls.__name__: cls for cls in (VQGAN, TATiTok, MaskGIT, MaskGen, ConvNet, Backbone, Words,
                                       TextEncoder)}


# ---------------------------------------------------------------- networks from disk
def frozen(network, device):
    return network.to(device).eval().requires_grad_(False)


def fill(network, state, what):
    """A network of ours gets the weights that we saved for it; what: how messages call them.

    ValueError in one line unless keys and shapes are its own and all values finite
    """
    return load_strictly(network, read_weights(state, what), what)


def read_part(path):
    """The file of a network that train.py prepared -> dict(cls=its class's name, args=, state=).

    ValueError when it cannot be read
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # any exception: a damaged file can make the unpickler raise what it likes
        raise ValueError(f"{path}, which train.py prepared, cannot be read "
                         f"({type(error).__name__}): remove it, and train.py prepares it anew"
                         ) from error


def load_part(part, device, what):
    """A network as of `read_part`, rebuilt from its class and arguments, frozen.

    what    how messages call it   ValueError in one line when it is none of ours
    """
    try:
        network = PARTS[part["cls"]](**part["args"])
        state = part["state"]
    except Exception as error:
        # any exception: arguments of another program's class
        raise ValueError(f"{what} is no network that train.py prepared "
                         f"({type(error).__name__})") from error
    return frozen(fill(network, state, what), device)


def file_digest(path):
    """The first 16 hex digits of a file's SHA-256."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 22):
            found.update(block)
    return found.hexdigest()[:16]


def digest(network):
    """A network's weights in 12 hex digits: equal for equal weights, on any device."""
    found = hashlib.sha256()
    for key, value in network.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def official_name(repo, file):
    """What a file of the hub is called in a folder of official files."""
    # model.safetensors says too little
    return f"{repo.split('/')[1]}.safetensors" if file.endswith(".safetensors") else Path(file).name


def official_files(dataset, teacher, weights):
    """The official networks that draw images -> {part: function that finds its file}.

    The functions are for `find_all`
    teacher    is it needed?
    weights    the folder to look in before the hub; ValueError where it is none
    """
    # weights/ itself need not be there: the hub may have all
    if weights != WEIGHTS and not Path(weights).is_dir():
        raise ValueError(f"--weights {weights} is not a folder")
    return {part: partial(find_weights, part, weights, official_name(repo, file), repo, file)
            for part, (repo, file, _) in OFFICIAL[dataset].items() if teacher or part != "teacher"}


def find_all(finders):
    """{part: function without arguments} -> {part: its result}.

    One ValueError, with a line for each part that is missing
    """
    found, missing = {}, []
    for part, find in finders.items():
        try:
            found[part] = find()
        except ValueError as error:
            missing.append(str(error))
    if missing:
        raise ValueError("\n".join(missing))
    return found


def load_official(r, dataset, files, device, student=None):
    """Official networks into the namespace r: tokenizer, teacher, text as far as there are files.

    student    None, or a file or a state dict, which becomes r.student
    A network without a file is None. ValueError when one cannot be read or they do not belong
    together
    """
    def load(part, src):
        if not src:
            return None
        _, _, loader = OFFICIAL[dataset][part]
        return frozen(loader(src), device)

    r.tokenizer = load("tokenizer", files["tokenizer"])
    # nothing is encoded: 0.8 GB less of TA-TiTok
    r.tokenizer.encoder = None
    r.teacher = load("teacher", files.get("teacher"))
    r.student = load("teacher", student)
    r.text = load("text", files.get("text"))
    K, L = r.tokenizer.K, r.tokenizer.L
    for model in (r.student, r.teacher):
        if model is None:
            continue
        if (model.K, model.L) != (K, L):
            raise ValueError(f"the transformer answers with {model.L} tokens of {model.K} codes, "
                             f"the tokenizer has {L} of {K}")
        set_text(r.text, model)
    return r


def set_text(text, model):
    """Give a transformer the encoding of the empty caption, which stands for "no condition".

    text    None: the model is not one of captions, and there is nothing to do
    """
    if text:
        model.empty.copy_(text.encode([""])[0, :len(model.empty)])


# ---------------------------------------------------------------- runs from disk
def newest_run(runs="runs"):
    """The run that was saved last, as its checkpoint says: a copy is not newer than its original.

    A checkpoint that cannot be read is left out, unless there is no other. ValueError when there
    is none
    """
    found, damaged = [], None
    for path in sorted(Path(runs).glob("*/checkpoint.pt")):
        if not path.is_file():
            continue
        try:
            saved = read_checkpoint(path)["saved"]
        except ValueError as error:
            damaged = damaged or error
            continue
        found.append((saved, path.parent))
    if not found and damaged:
        raise damaged
    if not found:
        raise ValueError(f"no checkpoint in {runs}/*/ yet: train one with `python train.py` "
                         "(add --smoke for a quick trial)")
    # of equal times, as of a copy, the last name
    return max(found)[1]


def checkpoint_path(run):
    """A folder runs/<name>, or a checkpoint file wherever it lies -> the file. ValueError"""
    path = Path(run)
    if path.is_file():
        return path
    if not (path / "checkpoint.pt").is_file():
        raise ValueError(f"there is no file {path / 'checkpoint.pt'}: {run} is not a run, or has "
                         "not saved yet")
    return path / "checkpoint.pt"


def read_checkpoint(run):
    """A run, see `checkpoint_path` -> what train.py saved there. ValueError when it is none.

    Weights are mapped, not read: asking for the configuration alone costs nothing.
    """
    path = checkpoint_path(run)
    kinds = dict(format=int, saved=float, step=int, config=dict, names=list, parts=dict,
                 student=dict, ema=dict, opt=dict, rng=torch.Tensor)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
        made = content.get("format")
    except Exception as error:
        # any exception: a damaged file can make the unpickler raise what it likes
        raise ValueError(f"{path} cannot be read as a checkpoint ({type(error).__name__}): it is "
                         "cut short, or another program's") from error
    # before the keys: another format may have others
    if isinstance(made, int) and made != FORMAT:
        age = "newer" if made > FORMAT else "older"
        revision = content.get("versions", {}).get("git", "unknown")
        raise ValueError(f"{path} has format {made}, {age} than {FORMAT}, which this program "
                         f"reads; it was made with git revision {revision}")
    if wrong:
        raise ValueError(f"{path} is not a checkpoint of train.py: {', '.join(wrong)} should be "
                         "in it")
    return content


def load_run(run, device, teacher=True, weights=None):
    """A run, see `checkpoint_path` -> namespace of its networks and settings.

    cfg, step    settings; how long the student was trained
    path         the checkpoint file, from which all of it comes, but for official networks
    names        of the classes; of a run with captions, those of its sheets
    tokenizer, teacher, phi, judge, text    networks, None where there is none
    student      the mean of its weights (EMA)

    teacher      False: not needed, so that an official teacher's file need not be there
    weights      of official networks, see `find_files_of_run`
    """
    path, saved = checkpoint_path(run), read_checkpoint(run)
    cfg = types.SimpleNamespace(**saved["config"])
    r = types.SimpleNamespace(cfg=cfg, step=saved["step"], path=path, names=saved["names"],
                              teacher=None, phi=None, judge=None, text=None)
    if cfg.dataset in OFFICIAL and not cfg.smoke:
        files = find_files_of_run(path, cfg.dataset, saved["parts"], teacher, weights)
        return load_official(r, cfg.dataset, files, device, saved["ema"])
    # a smoke run of imagenet needs none either, but evaluate.py can want the Inception's for it
    if weights and cfg.dataset not in OFFICIAL:
        raise ValueError(f"--weights is for imagenet and laion, and {run} is a run of "
                         f"{cfg.dataset}")
    for name, part in saved["parts"].items():
        setattr(r, name, load_part(part, device, f"{name} of {path}"))
    set_text(r.text, r.teacher)
    # the same architecture with other weights
    r.student = fill(copy.deepcopy(r.teacher), saved["ema"], f"student of {path}")
    return r


def find_files_of_run(path, dataset, parts, teacher, weights):
    """The official files of the run in `path` -> {part: file}.

    parts      {part: dict(file=where it was, sha256=its `file_digest`)}
    teacher    is it needed?
    weights    the folder to look in, not where they were; None: where they were, else in weights/
    ValueError when one is missing or another than the run was made with
    """
    finders = official_files(dataset, teacher, weights or WEIGHTS)
    if not weights:
        finders |= {part: partial(Path, parts[part]["file"]) for part in finders
                    if Path(parts[part]["file"]).is_file()}
    files = find_all(finders)
    for part, file in files.items():
        found, expected = file_digest(file), parts[part]["sha256"]
        if found != expected:
            repo, name, _ = OFFICIAL[dataset][part]
            raise ValueError(f"{file} is not the {part} that {path} was made with (its SHA-256 "
                             f"begins with {found}, not {expected}); put the right file at "
                             f"DIR/{official_name(repo, name)} and add --weights DIR")
    return files


def load_public(dataset, student_file, teacher, weights, init_mask, device):
    """The public networks, without any run -> namespace like load_run's; path and step are None,
    and there is no student unless its file is named."""
    files = find_all(official_files(dataset, teacher, weights))
    cfg = types.SimpleNamespace(**PUBLIC[dataset], dataset=dataset, smoke=False)
    if init_mask is not None:
        cfg.init_mask = init_mask
    names = imagenet_names() if dataset == "imagenet" else CAPTIONS
    r = types.SimpleNamespace(cfg=cfg, step=None, path=None, names=names, phi=None, judge=None)
    return load_official(r, dataset, files, device, student_file)


# ---------------------------------------------------------------- images
@torch.no_grad()
def tokens(model, c, generator, cfg, steps):
    """The student's draft (steps = 0) or the teacher's sample in `steps` steps.

    c: condition of B images -> z (B, L)
    """
    if steps == 0:
        return fpd.one_step(model, c, cfg.init_mask, generator, cfg.temperature)
    return fpd.sample_teacher(model, c, steps, generator, cfg.guidance, cfg.confidence_noise)


@torch.no_grad()
def decode(tokenizer, z, c):
    """Tokens z (B, L) and their condition -> images (B, 3, H, W) uint8 on the CPU."""
    return to_uint8(tokenizer.decode(tokenizer.E[z], c)).cpu()


def batches(model, tokenizer, c, cfg, steps, seed=0, batch=60, progress=None):
    """Images for the conditions c (N, ...), one batch after the other.

    steps       of the teacher; 0: the student's single pass
    progress    what the bar says, if there should be one
    yields      z (B, L), images (B, 3, H, W) uint8 on the CPU, and the seconds that both took
    """
    device = tokenizer.E.device
    starts = range(0, len(c), batch)
    # closed before an error is printed: on a line of its own
    with tqdm(starts, progress, leave=False, disable=progress is None) as bar:
        for start in bar:
            begin = time.perf_counter()
            part = c[start:start + batch].to(device)
            z = tokens(model, part, fpd.generators(seed, start, len(part), device), cfg, steps)
            images = decode(tokenizer, z, part)
            yield z, images, time.perf_counter() - begin


def generate(*args, **kwargs):
    """All images of `batches` at once, (N, 3, H, W) uint8 on the CPU."""
    return torch.cat([images for _, images, _ in batches(*args, **kwargs)])


# ---------------------------------------------------------------- sheets
def shown(run):
    """The conditions of every sheet, always the same, at most 12.

    Of captions: all that the run keeps. Of classes: each once, or 12 that are spread over all.
    returns   c (n, ...), n captions
    """
    if run.text:
        return run.text.encode(run.names), run.names
    n_classes = len(run.names)
    n = min(12, n_classes)
    c = torch.arange(n) * n_classes // n
    if n_classes >= 24:
        # every other pair one further: all shapes and colours of the shapes world
        c = c + torch.arange(n) // 2 % 2
    if n_classes == 1000:
        # those that papers show: golden retriever, otter, lesser panda, geyser, macaw, ...
        c = torch.tensor([207, 360, 387, 974, 88, 979, 417, 279])
    return c, [run.names[i] for i in c]


def sheet(rows, captions):
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


# ---------------------------------------------------------------- files written
def write_whole(path, write):
    """write(path), but whole or not at all: to a file beside it, which then takes its place."""
    path = Path(path)
    # ".<name>": by the suffix PIL knows the format, and GenEval's scorer its images
    new = path.with_name(f".{path.name}")
    try:
        write(new)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


def write_json(path, content):
    """What JSON can hold, whole or not at all."""
    write_whole(path, lambda new: new.write_text(json.dumps(content, indent=1)))


def check_writable(folder):
    """ValueError where a folder, there or to be made, cannot be written into: before the work is
    done, not after it."""
    there = Path(folder).absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{folder} cannot be written into: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{folder} cannot be written into: {there} is read-only")


# ---------------------------------------------------------------- what command lines share
class Parser(argparse.ArgumentParser):
    """Mistakes on the command line become a ValueError, for `run_command`; no guessing at shortened
    flags."""
    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise ValueError(f"{message} (--help lists the flags)")


def run_command(main):
    """Run a command line without tracebacks.

    A mistake of the user's ends in one line (one for each missing part) and code 2, Ctrl-C in 130
    """
    try:
        main()
    except (ValueError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print("error: the GPU has too little free memory; evaluate.py --reference needs less with "
              "a smaller --batch", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped")
        sys.exit(130)


def check_seed(seed):
    """ValueError for seeds of which `fpd.generators` would make numbers of more than 64 bits."""
    if not 0 <= seed < 2 ** 32:
        raise ValueError(f"--seed should be between 0 and {2 ** 32 - 1}, got {seed}")


def model_arguments(parser):
    """The flags that say which networks; shared with evaluate.py."""
    parser.add_argument("--run", help="runs/<name>, or the file of a checkpoint; the newest run if "
                        "not given")
    parser.add_argument("--student", metavar="FILE", help="in place of a run: a one-step MaskGIT "
                        "of others, e.g. Di[M]O's pytorch_model.bin")
    parser.add_argument("--init-mask", type=float, help="with --student: its share of masked "
                        "tokens, 0.6 if not given")
    parser.add_argument("--dataset", choices=list(OFFICIAL), help="in place of a run: the public "
                        "teacher; with --student, which kind it is")
    parser.add_argument("--weights", metavar="DIR", help="folder of official files, which are "
                        "looked for there, then on the hub; if not given, those of a run where it "
                        "found them, then weights/")


def load_models(args, device, teacher, public=False):
    """What `model_arguments` say -> namespace as of load_run. Prints which run it is.

    teacher   is it needed?
    public    where there is no run at all, the public teacher of ImageNet takes its place
    """
    if args.run and args.student:
        raise ValueError("--run and --student exclude each other")
    if args.run and args.dataset:
        raise ValueError("--run and --dataset exclude each other")
    if args.init_mask is not None and not args.student:
        raise ValueError("--init-mask goes with --student; a run knows its own")
    if args.init_mask is not None and not 0 < args.init_mask <= 1:
        raise ValueError(f"--init-mask is a share, between 0 and 1, got {args.init_mask}")
    no_run_at_all = not args.run and not any(Path("runs").glob("*/checkpoint.pt"))
    if args.student or args.dataset or (no_run_at_all and public):
        dataset = args.dataset or "imagenet"
        print(f"no run: the public networks of {dataset}")
        return load_public(dataset, args.student, teacher, args.weights or WEIGHTS,
                           args.init_mask, device)
    path = args.run or newest_run()
    run = load_run(path, device, teacher, args.weights)
    print(f"run {path}: {run.cfg.dataset}, {run.step} steps")
    return run


def class_index(text, names):
    """"207" or "red circle" -> label. ValueError names what there is."""
    # names first: folders are often called 1, 2, 3
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < len(names):
        return int(text)
    some = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
    raise ValueError(f"--class {text!r} is not a class of this run: use 0 to {len(names) - 1}, or "
                     f"a name ({some})")


def tell_cut(text, captions):
    """Say which captions are longer than CLIP reads, five at most, and what is lost.

    Other encoders read all that they know
    """
    if not isinstance(text, TextEncoder):
        return
    for caption, lost in itertools.islice(text.cut_captions(captions).items(), 5):
        print(f"caption longer than 77 tokens: {caption[:40]!r}... loses its end, {lost[:60]!r}")


def condition(run, label, prompt, n):
    """What --class or --prompt asks for, n times, or all that the run knows in turn.

    returns   c (n, ...), what to call it
    """
    if run.text and label is not None:
        raise ValueError("this run draws captions: use --prompt")
    if not run.text and prompt is not None:
        raise ValueError("this run draws classes: use --class")
    if prompt is not None:
        tell_cut(run.text, [prompt])
        return run.text.encode([prompt] * n), repr(prompt)
    if run.text:
        captions = [run.names[i % len(run.names)] for i in range(n)]
        tell_cut(run.text, captions)
        return run.text.encode(captions), "the captions of its sheets"
    if label is not None:
        index = class_index(label, run.names)
        return torch.full((n,), index), run.names[index]
    return torch.arange(n) % len(run.names), "all classes"


# ---------------------------------------------------------------- the command
def parse():
    """The command line. ValueError for what cannot be, as far as it is known without the run."""
    parser = Parser(description="Sample images from a distilled student or from its teacher.")
    parser.add_argument("--class", dest="label",
                        help="class number or name; without it, all classes in turn")
    parser.add_argument("--prompt", help="what to draw, for a run with captions; without it, the "
                        "captions of its sheets in turn")
    parser.add_argument("--n", type=int, default=16, help="how many images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sample.png")
    parser.add_argument("--teacher", action="store_true",
                        help="the multi-step teacher in place of the student")
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
        raise ValueError(f"--dataset {args.dataset} is for the public networks: add --teacher, or "
                         "--student FILE")
    if args.prompt is not None and args.label is not None:
        raise ValueError("--prompt and --class exclude each other")
    if Path(args.out).is_dir() or Path(args.out).suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out {args.out} should be a picture to be made, such as sample.png "
                         f"({', '.join(sorted(SUFFIXES))})")
    if not Path(args.out).absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no such folder")
    check_writable(Path(args.out).parent)
    return args


def main():
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = load_models(args, device, teacher=args.teacher, public=args.teacher)
    if args.teacher:
        model = run.teacher
        steps = 16 if args.steps is None else args.steps
        if not 1 <= steps <= model.L:
            raise ValueError(f"--steps should be between 1 and {model.L}, got {steps}")
        who = f"teacher, {steps} steps"
    else:
        model, steps = run.student, 0
        trained = f"trained for {run.step} steps"
        if run.path is None:
            trained = f"{args.student}, init-mask {run.cfg.init_mask:g}"
        who = f"student, 1 step ({trained})"
    c, what = condition(run, args.label, args.prompt, args.n)
    images = generate(model, run.tokenizer, c, run.cfg, steps, args.seed, batch=16,
                      progress="sample")
    columns = min(8, args.n)
    rows = [("", images[i:i + columns]) for i in range(0, args.n, columns)]
    write_whole(args.out, sheet(rows, [""] * columns).save)
    print(f"{args.out}: {args.n} images | {who} | {what} | seed {args.seed}")
    if run.cfg.smoke:
        print("This is a smoke run: its weights are random or nearly so, the picture means "
              "nothing.")


if __name__ == "__main__":
    run_command(main)
