"""tokenizer.py - images and tokens (Sec. 3.1): where images and captions come from, and what turns
images into codes and back: VQGAN, TA-TiTok.

    shapes() / scenes() / folder()  -->  images (N, 3, H, W)  -- encode -->  z (B, L) codes 0..K-1
                                               ^                                |
                                               |                        E[z] (B, L, d), rows of
                                               |                        the codebook
                                               +------------ decode <-----------+
                                                 (fpd.py's straight-through embeddings enter here)

Images are float in [-1, 1] between functions; datasets are kept as uint8 to save memory.
Imports none of our files. Also here, since every file of ours may import this one: reading files
of pretrained weights.

    B images in the batch   L tokens per image   K codebook entries   d code width
    P = sqrt(L) tokens per side
"""
import functools
import hashlib
import json
import math
import os
import pickle
import random
import re
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

# -------------------------------------------------------------------- images: the shapes world
# RGB in [-1, 1]. Every class is one colour and one shape, in the order of shapes_names().
COLOURS = {"red": (.9, -.75, -.75), "green": (-.7, .5, -.7), "blue": (-.65, -.4, .95),
           "yellow": (.95, .8, -.8), "cyan": (-.8, .8, .9), "magenta": (.85, -.6, .8)}
SHAPES = ("circle", "square", "triangle", "cross")


def shapes_names():
    """The 24 class names, "red circle" ... "magenta cross"; the position is the label."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def signed_distance(shape, x, y):
    """Signed distance (negative inside) from points x, y to a shape of size about 1.

    shape (B,)       index into SHAPES
    x, y (B, H, W)   points, in units of the shape's size
    returns (B, H, W)
    """
    def box(a, b):
        return torch.maximum(x.abs() - a, y.abs() - b)

    circle = (x.square() + y.square()).sqrt() - 0.95
    square = box(0.84, 0.84)
    # equilateral, pointing up before it is turned
    triangle = torch.maximum(x.abs() * 0.866 - y * 0.5, y) - 0.55
    cross = torch.minimum(box(1.0, 0.34), box(0.34, 1.0))
    all_shapes = torch.stack([circle, square, triangle, cross])                   # (4, B, H, W)
    return all_shapes[shape, torch.arange(len(shape))]


def paint(canvas, shape, colour, centre, radius, angle):
    """Draw one object on each canvas, with smooth edges one pixel wide.

    canvas (B, 3, S, S)   in [-1, 1]
    shape (B,)            long, index into SHAPES
    colour (B, 3)         in [-1, 1]
    centre (B, 2)         x, y in pixels
    radius (B,)           pixels
    angle (B,)            radians
    returns               a new (B, 3, S, S)
    """
    S = canvas.shape[-1]
    axis = torch.arange(S) + 0.5
    dx = axis[None, None, :] - centre[:, 0, None, None]
    dy = axis[None, :, None] - centre[:, 1, None, None]
    cos = angle.cos()[:, None, None]
    sin = angle.sin()[:, None, None]
    radius = radius[:, None, None]
    x = (cos * dx + sin * dy) / radius                                            # (B, S, S)
    y = (cos * dy - sin * dx) / radius
    distance = signed_distance(shape, x, y) * radius                              # pixels
    alpha = (0.5 - distance).clamp(0, 1)[:, None]                                 # (B, 1, S, S)
    return canvas * (1 - alpha) + colour[:, :, None, None] * alpha


def ranges(n, generator):
    """-> function (low, high, *shape) -> (n, *shape) numbers between: what varies by image."""
    def between(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)
    return between


def shapes(labels, seed, anywhere=False, size=32):
    """Render the shapes world: one object of a colour and a shape on a plain grey ground.

    labels (N,)   long, index into shapes_names()
    seed          equal labels and seed give equal images
    anywhere      False: object within 3 px of the centre, as photographs are (the default world).
                  True: as far off as it still fits (the hard world)
    Place, size, turn, hue and ground vary from image to image.
    returns (N, 3, size, size) uint8
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()))
    grounds = torch.tensor([-.75, -.1, .55])
    images = torch.empty(len(labels), 3, size, size, dtype=torch.uint8)
    # in chunks: the distance maps are large
    for start in range(0, len(labels), 1024):
        label = labels[start:start + 1024]
        n = len(label)
        between = ranges(n, generator)
        # 10 to 13 px of 32; 7 to 10 where it needs room to move
        if anywhere:
            radius = between(.22, .32) * size
            reach = (size / 2 - radius)[:, None]
        else:
            radius = between(.30, .40) * size
            reach = 3 * size / 32
        centre = size / 2 + between(-1, 1, 2) * reach
        colour = palette[label // len(SHAPES)] + between(-.08, .08, 3)
        tone = grounds[torch.randint(3, (n,), generator=generator)] + between(-.05, .05)
        ground = tone.view(n, 1, 1, 1).expand(n, 3, size, size)
        # turns of up to 11 degrees
        angle = between(-.2, .2)
        image = paint(ground, label % len(SHAPES), colour, centre, radius, angle)
        images[start:start + n] = to_uint8(image)
    return images


# -------------------------------------------------------------------- images: the scenes world
# Captions of GenEval's six kinds (Ghosh et al. 2023), by the names that tag its prompts.
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
# Where the first object is, seen from the second: x to the right, y down.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Centres of so many objects, x, y in quarters of the canvas.
LAYOUTS = {1: [(2, 2)], 2: [(1, 2), (3, 2)], 3: [(1, 1), (3, 1), (2, 3)],
           4: [(1, 1), (3, 1), (1, 3), (3, 3)]}
SCENE_WORDS = ("a", "and", *COUNTS, *COLOURS, *SHAPES, *PLURALS,
               "left", "right", "of", "above", "below")
# "a circle", "a red circle"; two of them with a word between; "three red circles"
ONE = f"a (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
SEVERAL = f"({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(PLURALS)})"
SENTENCE = re.compile(f"{ONE}(?: (and|{'|'.join(RELATIONS)}) {ONE})?|{SEVERAL}")


def parse_caption(text):
    """A caption of the scenes world -> dict(tag, objects, relation): all of the grammar.

    tag        of TAGS, e.g. "a circle" | "a circle and a square" | "three red circles"
               | "a red circle" | "a blue square above a green triangle"
               | "a red circle and a blue square"
    objects    list of 1 to 4 pairs (colour or None where it is not said, shape)
    relation   key of RELATIONS, of the first object to the second, or None
    ValueError names a word that does not exist, or says that the words make no caption
    """
    words = text.lower().split()
    for word in words:
        if word not in SCENE_WORDS:
            raise ValueError(f"scenes does not know the word {word!r}; it knows: "
                             f"{', '.join(SCENE_WORDS)}")
    found = SENTENCE.fullmatch(" ".join(words))
    if found:
        colour, shape, link, colour2, shape2, number, colour_n, plural = found.groups()
        if number:
            objects = [(colour_n, PLURALS[plural])] * COUNTS[number]
            return dict(tag="counting", objects=objects, relation=None)
        first = (colour, shape)
        if not link:
            tag = "colors" if colour else "single_object"
            return dict(tag=tag, objects=[first], relation=None)
        second = (colour2, shape2)
        if first != second:
            both_coloured = colour is not None and colour2 is not None
            none_coloured = colour is None and colour2 is None
            if link in RELATIONS and both_coloured:
                return dict(tag="position", objects=[first, second], relation=link)
            if link == "and" and both_coloured:
                return dict(tag="color_attr", objects=[first, second], relation=None)
            if link == "and" and none_coloured:
                return dict(tag="two_object", objects=[first, second], relation=None)
    raise ValueError(f"scenes knows the words of {text!r}, but not the sentence; it knows such as "
                     "'a circle', 'a circle and a square', 'three red circles', 'a red circle', "
                     "'a blue square above a green triangle', 'a red circle and a blue square'")


def scene_captions(n, seed):
    """n captions (list of str), the six kinds in turn; two objects differ in colour and in shape.

    Equal seeds give equal captions.
    """
    rng = random.Random(seed)
    captions = []
    for i in range(n):
        shape, shape2 = rng.sample(SHAPES, 2)
        colour, colour2 = rng.sample(list(COLOURS), 2)
        number = rng.choice(list(COUNTS))
        plural = rng.choice(list(PLURALS))
        relation = rng.choice(list(RELATIONS))
        kinds = (f"a {shape}",
                 f"a {shape} and a {shape2}",
                 f"{number} {colour} {plural}",
                 f"a {colour} {shape}",
                 f"a {colour} {shape} {relation} a {colour2} {shape2}",
                 f"a {colour} {shape} and a {colour2} {shape2}")
        captions.append(kinds[i % len(kinds)])
    return captions


def scene_places(parsed, is_left):
    """Where objects stand: one in the middle, two in a row or column, more as on dice.

    parsed    list of n dicts, as of parse_caption
    is_left   (n,) whether the first object is left of the second, where the caption says nothing
    returns (n, 4, 2) x, y in quarters of the canvas; zeros behind a caption's last object
    """
    places = torch.zeros(len(parsed), 4, 2)
    for i, scene in enumerate(parsed):
        relation = scene["relation"]
        if relation is None:
            relation = "left of" if is_left[i] else "right of"
        centres = LAYOUTS[len(scene["objects"])]
        if relation in ("above", "below"):
            # a column
            centres = [(y, x) for x, y in centres]
        if relation in ("right of", "below"):
            centres = centres[::-1]
        places[i, :len(centres)] = torch.tensor(centres)
    return places


def scenes(captions, seed, size=32):
    """Render the scenes world: the objects of each caption on a plain dark ground.

    captions   list of N str
    seed       equal captions and seed give equal images
    Who stands left, where it is not said, places, sizes, turns, hues and ground vary, and so do
    colours that are not said. Objects never touch.
    returns (N, 3, size, size) uint8. ValueError as of parse_caption
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()))
    known = list(COLOURS)
    parsed = [parse_caption(caption) for caption in captions]
    images = torch.empty(len(parsed), 3, size, size, dtype=torch.uint8)
    # in chunks: the distance maps are large
    for start in range(0, len(parsed), 1024):
        part = parsed[start:start + 1024]
        n = len(part)
        between = ranges(n, generator)
        place = scene_places(part, torch.randint(2, (n,), generator=generator))   # (n, 4, 2)
        any_colour = torch.randint(len(known), (n, 4), generator=generator)
        centre = size / 4 * place + between(-.015, .015, 4, 2) * size             # (n, 4, 2) pixels
        radius = between(.165, .175, 4) * size                                    # (n, 4)
        angle = between(-.05, .05, 4)
        hue = between(-.03, .03, 4, 3)
        # one dark ground: every tone needs codes of its own
        tone = -.75 + between(-.05, .05)
        image = tone.view(n, 1, 1, 1).repeat(1, 3, size, size)
        for k in range(4):
            # the k-th object of those images that have one
            rows = [i for i in range(n) if len(part[i]["objects"]) > k]
            shape = torch.zeros(len(rows), dtype=torch.long)
            colour = torch.zeros(len(rows), dtype=torch.long)
            for j, i in enumerate(rows):
                said, name = part[i]["objects"][k]
                shape[j] = SHAPES.index(name)
                colour[j] = known.index(said) if said else any_colour[i, k]
            image[rows] = paint(image[rows], shape, palette[colour] + hue[rows, k],
                                centre[rows, k], radius[rows, k], angle[rows, k])
        images[start:start + n] = to_uint8(image)
    return images


def scene_contents(images, captions):
    """Those images whose captions say every colour, and what is on them.

    images (N, ...), captions (list of N str)
    returns   images (n, ...), contents (n, 24) float, 1 where a class of shapes_names is there
    """
    names = shapes_names()
    told = []
    contents = torch.zeros(len(captions), len(names))
    for i, caption in enumerate(captions):
        objects = parse_caption(caption)["objects"]
        if all(colour for colour, _ in objects):
            told.append(i)
            for colour, shape in objects:
                contents[i, names.index(f"{colour} {shape}")] = 1
    return images[told], contents[told]


def read_captions(path):
    """A text file with one caption per line -> list of str, without empty lines.

    ValueError: no such file, not UTF-8, no captions
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--captions {path}: no such file; it should hold one caption per line")
    try:
        # not splitlines, which also ends a line at characters that a web caption may hold
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[:error.start].count(b"\n") + 1
        raise ValueError(f"--captions {path} is not UTF-8: line {line} has the byte "
                         f"{error.object[error.start]:#04x}") from None
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise ValueError(f"--captions {path} has no captions; it should hold one per line")
    return captions


# -------------------------------------------------------------------- images: files
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def to_rgb(image, bits):
    """A Pillow image of any mode -> mode "RGB", on white ground where it is transparent.

    bits    of a grey pixel, where a pixel is a number of more than 8 bits
    ValueError for pixels of which no file says how bright white is
    """
    transparent = image.info.get("transparency")
    if image.mode == "F" or (image.mode.startswith("I") and bits > 16):
        raise ValueError("its pixels are floats or 32-bit numbers, and nothing says which of them "
                         "is white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        # up to 16 bits: Pillow would clip all above 255 to white
        values = np.asarray(image, dtype=np.int64)
        if values.min() < 0:
            raise ValueError("it has pixels below zero; save it with 8 or 16 bits, black as 0")
        image = Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8))
        if transparent is not None:
            # PNG's one colour that is transparent
            image.putalpha(Image.fromarray((values != transparent).astype(np.uint8) * 255))
    elif isinstance(transparent, tuple) and max(transparent) > 255:
        # likewise of a PNG of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(path, size=None):
    """Any image file -> (3, H, W) uint8, EXIF turns applied, on white where it is transparent.

    size    None, or pixels per side: the centre square of the image, scaled to it
    ValueError if the file is no image, or its pixels are floats or 32-bit numbers
    """
    try:
        with Image.open(path) as image:
            bits = 16
            if image.format == "TIFF":
                # the tag BitsPerSample: cameras and microscopes have 12
                bits = image.tag_v2.get(258, (16,))[0]
            image = to_rgb(ImageOps.exif_transpose(image), bits)
    except Exception as error:
        # any exception: a damaged file can make a decoder raise what it likes
        raise ValueError(f"{path} cannot be read as an image "
                         f"({str(error) or type(error).__name__})") from error
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# What an image folder holds, wherever one is read: files with a suffix of SUFFIXES, in capitals or
# not, and folders; links to either are followed. Names that begin with a dot are hidden (._x.png,
# .ipynb_checkpoints, .Trash) and left out, as are all other files; what is left out is counted.
def list_folder(folder):
    """One folder -> its images, its folders (both sorted), and a Counter of the rest by kind.

    ValueError when it cannot be listed
    """
    images, folders, left_out = [], [], Counter()
    try:
        for path in sorted(Path(folder).iterdir()):
            suffix = path.suffix.lower()
            if path.name.startswith("."):
                left_out["hidden folder" if path.is_dir() else "hidden file"] += 1
            elif path.is_dir():
                folders.append(path)
            elif path.is_symlink() and not path.exists():
                left_out["broken link"] += 1
            elif suffix in SUFFIXES and path.is_file():
                images.append(path)
            else:
                left_out[f"{suffix or 'other'} file"] += 1
    except OSError as error:
        raise ValueError(f"{folder} cannot be listed: {error.strerror}") from None
    return images, folders, left_out


def find_images(folder):
    """All images below a folder, however deep.

    Each folder is entered once, so that links that lead back or to the same place do no harm.
    returns   files (sorted list of paths), Counter of what is not used, see `list_folder`
    """
    files, left_out = [], Counter()
    entered, waiting = set(), [Path(folder)]
    while waiting:
        place = waiting.pop()
        if place.resolve() in entered:
            left_out["repeated folder"] += 1
            continue
        entered.add(place.resolve())
        images, folders, others = list_folder(place)
        files += images
        waiting += folders
        left_out += others
    return sorted(files), left_out


def image_files(folder, what="--data"):
    """The files of `find_images`. ValueError when there are none; what: how it calls the folder."""
    files, left_out = find_images(folder)
    if not files:
        raise ValueError(f"{what} {folder}: no images there "
                         f"(looked for {', '.join(sorted(SUFFIXES))}{not_used(left_out)})")
    return files


def not_used(left_out):
    """A Counter of `list_folder` in words: "; not used: 3 hidden files, 1 .txt file", or ""."""
    if not left_out:
        return ""
    kinds = [f"{n} {kind}{'s' if n > 1 else ''}" for kind, n in left_out.most_common(8)]
    return f"; not used: {', '.join(kinds)}{' and others' if len(left_out) > 8 else ''}"


def folder_classes(data):
    """DIR/<class name>/*: the user's own images.

    returns   names (sorted), for each of them the list of its files (sorted), Counter of what is
              not used, see `list_folder`
    ValueError where there are no classes or images, or too few to train and test
    """
    wanted = "it should hold one subfolder of images for each class"
    if not Path(data).is_dir():
        raise ValueError(f"--data {data} is not a folder; {wanted}")
    unsorted, folders, left_out = list_folder(data)
    if unsorted:
        left_out["unsorted image"] = len(unsorted)
    if not folders:
        raise ValueError(f"--data {data} has no subfolders; {wanted}{not_used(left_out)}")
    files = []
    for place in folders:
        found, nested, others = list_folder(place)
        left_out += others
        if nested:
            left_out["nested folder"] += len(nested)
        if not found:
            raise ValueError(f"--data {data}: no images in class folder {place.name!r} (looked "
                             f"for {', '.join(sorted(SUFFIXES))}{not_used(others)})")
        files.append(found)
    names = [place.name for place in folders]
    n = sum(len(found) for found in files)
    if n < 40:
        raise ValueError(f"--data {data} has fewer than 40 images: {n}; classes: {len(names)}")
    if len(names) < 2:
        raise ValueError(f"--data {data} has one class folder, {names[0]!r}; at least 2 are needed")
    for name, found in zip(names, files):
        if len(found) < 2:
            raise ValueError(f"--data {data}: class folder {name!r} has one image; at least 2 are "
                             "needed, one to train on and one for the report")
        if not name.isprintable():
            raise ValueError(f"--data {data}: the name of class folder {name!r} cannot be printed; "
                             "rename it")
    return names, files, left_out


def folder_summary(data):
    """One line on the folder world: "DIR: 1797 images in 10 classes; not used: 3 hidden files"."""
    names, files, left_out = folder_classes(data)
    n = sum(len(found) for found in files)
    return f"{data}: {n} images in {len(names)} classes{not_used(left_out)}"


# one folder in one size is what a run needs; the files' sizes and times are part of what was read
@functools.lru_cache(maxsize=1)
def read_images(files, stamps, size):
    """Files (tuple of paths) -> (N, 3, size, size) uint8, read once in a process.

    stamps   for each file what changes when it does
    """
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    # closed before an error is printed: on a line of its own
    with tqdm(files, "reading images", leave=False) as bar:
        for i, file in enumerate(bar):
            images[i] = read_image(file, size)
    return images


def folder(data, size=32):
    """The images of `folder_classes`, read once in a process: do not write into them.

    returns   images (N, 3, size, size) uint8, labels (N,) long, names
    """
    names, files_of_class, _ = folder_classes(data)
    files, labels, stamps = [], [], []
    for label, found in enumerate(files_of_class):
        for file in found:
            facts = file.stat()
            files.append(file)
            labels.append(label)
            stamps.append((facts.st_size, facts.st_mtime_ns))
    images = read_images(tuple(files), tuple(stamps), size)
    return images, torch.tensor(labels), names


def folder_digest(data, size=32):
    """What a network made from a folder depends on: its images, labels and names. -> 12 digits"""
    images, labels, names = folder(data, size)
    digest = hashlib.sha256(json.dumps([names, labels.tolist()]).encode())
    digest.update(images.numpy())
    return digest.hexdigest()[:12]


def split_folder(labels):
    """Which images are trained on and which are kept for the report.

    Of n images of a class the report has n / 10, but at least one, from all over the class. Their
    order is such that every stretch of it has of each class as large a share as the whole.
    labels (N,) long   returns train, test: indices (long)
    """
    generator = torch.Generator().manual_seed(0)
    train, test, places = [], [], []
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        n, m = len(own), max(1, len(own) // 10)
        kept = ((torch.arange(m) + 0.5) * n / m).long()
        is_kept = torch.zeros(n, dtype=torch.bool)
        is_kept[kept] = True
        train.append(own[~is_kept])
        # names are often in the order of time; no stretch should have one time alone
        test.append(own[kept[torch.randperm(m, generator=generator)]])
        places.append((torch.arange(m) + 0.5) / m)
    order = torch.cat(places).argsort(stable=True)
    return torch.cat(train), torch.cat(test)[order]


# -------------------------------------------------------------------- images: any world
def split_seed(split):
    return ("train", "phi", "judge", "test").index(split)


def split_size(cfg, split):
    """How many images of shapes and scenes are drawn."""
    if cfg.smoke:
        return 480
    return 2400 if split == "test" else 12_000


def world_captions(cfg, split):
    """The captions of scenes, without the images. -> list of str"""
    return scene_captions(split_size(cfg, split), split_seed(split))


def world_names(cfg):
    """The names of the world's classes; of scenes, two captions of each kind."""
    if cfg.dataset == "scenes":
        return world_captions(cfg, "test")[:12]
    if cfg.dataset == "shapes":
        return shapes_names()
    return folder_classes(cfg.data)[0]


def world(cfg, split):
    """Real images of the world. -> images (N, 3, 32, 32) uint8, labels (N,), names

    split   "train" | "phi" | "judge" | "test". shapes, scenes: each is drawn afresh.
            folder: see `split_folder`; "phi" and "judge" are "train"
    scenes: captions, a list of N str, in place of labels
    """
    if cfg.dataset == "shapes":
        names = shapes_names()
        labels = torch.arange(split_size(cfg, split)) % len(names)
        return shapes(labels, split_seed(split), cfg.anywhere), labels, names
    if cfg.dataset == "scenes":
        captions = world_captions(cfg, split)
        return scenes(captions, split_seed(split)), captions, world_names(cfg)
    images, labels, names = folder(cfg.data)
    train, test = split_folder(labels)
    chosen = test if split == "test" else train
    return images[chosen], labels[chosen], names


def to_float(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] -> uint8, values outside are clipped."""
    # + 128 and cut off: the official MaskGIT's rounding
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------- VQGAN (Esser et al. 2021)
# The network of taming-transformers, with its key names, so that the official f16-1024 checkpoint
# loads strictly. The small worlds train the same class with fewer channels. Facts: levels go from
# fine (0) to coarse.
def norm(channels, groups):
    # eps is not torch's default
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Two convolutions, each after norm and SiLU, around a shortcut."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = norm(c_out, groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(x)
        return y + x


class AttnBlock(nn.Module):
    """Single-head self-attention over all places of the map, residual."""
    def __init__(self, c, groups):
        super().__init__()
        self.norm = norm(c, groups)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        y = self.norm(x)
        q = self.q(y).flatten(2).transpose(1, 2)                                  # (B, HW, C)
        k = self.k(y).flatten(2).transpose(1, 2)
        v = self.v(y).flatten(2).transpose(1, 2)
        # scale C^-0.5
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).reshape(B, C, H, W))


class Resample(nn.Module):
    """Encoder: half the size. Decoder: twice the size."""
    def __init__(self, c, up):
        super().__init__()
        self.up = up
        if up:
            self.conv = nn.Conv2d(c, c, 3, padding=1)
        else:
            self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # one zero at right and bottom only
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def level(c_in, c_out, blocks, attention, groups):
    """One resolution: residual blocks, each followed by attention where asked."""
    stage = nn.Module()
    stage.block = nn.ModuleList()
    for i in range(blocks):
        stage.block.append(ResBlock(c_in if i == 0 else c_out, c_out, groups))
    stage.attn = nn.ModuleList()
    if attention:
        for _ in range(blocks):
            stage.attn.append(AttnBlock(c_out, groups))
    return stage


def run_level(stage, x):
    for i, block in enumerate(stage.block):
        x = block(x)
        if len(stage.attn):
            x = stage.attn[i](x)
    return x


def middle(c, groups):
    mid = nn.Module()
    mid.block_1 = ResBlock(c, c, groups)
    mid.attn_1 = AttnBlock(c, groups)
    mid.block_2 = ResBlock(c, c, groups)
    return mid


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, z_channels, H / f, W / f), f = 2^(levels - 1)."""
    def __init__(self, ch, ch_mult, blocks, attn_levels, z_channels, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        c_in = ch
        for i, c_out in enumerate(widths):
            stage = level(c_in, c_out, blocks, i in attn_levels, groups)
            if i < len(widths) - 1:
                stage.downsample = Resample(c_out, up=False)
            self.down.append(stage)
            c_in = c_out
        self.mid = middle(widths[-1], groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, stage in enumerate(self.down):
            x = run_level(stage, x)
            if i < len(self.down) - 1:
                x = stage.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, P, P) -> image (B, 3, f P, f P).

    One residual block a level more than the encoder; up.0 is the finest level.
    """
    def __init__(self, ch, ch_mult, blocks, attn_levels, z_channels, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, c_out in enumerate(widths):
            # what comes in is the next coarser level, or the middle
            c_in = widths[i + 1] if i < len(widths) - 1 else widths[-1]
            stage = level(c_in, c_out, blocks + 1, i in attn_levels, groups)
            if i > 0:
                stage.upsample = Resample(c_out, up=True)
            self.up.append(stage)
        self.norm_out = norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for i, stage in reversed(list(enumerate(self.up))):
            x = run_level(stage, x)
            if i > 0:
                x = stage.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images <-> tokens. The default sizes are the small worlds': 32 x 32 pixels, f = 4, 64 tokens.

    K, d          so many codes of this width
    ch, ch_mult   channels per level
    blocks        residual blocks per encoder level
    attn_levels   levels with attention
    groups        of the group norms (32 in the official network; as many groups as channels would
                  erase brightness in a small one)
    l2norm        encoder outputs and codes have length 1 (ViT-VQGAN, Yu et al. 2022)
    .E (K, d) the codebook   .L tokens per image
    """
    def __init__(self, K=128, d=8, ch=16, ch_mult=(1, 2, 2), blocks=1, attn_levels=(),
                 z_channels=32, groups=4, image_size=32, l2norm=False):
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, blocks, attn_levels, z_channels, groups)
        self.decoder = Decoder(ch, ch_mult, blocks, attn_levels, z_channels, groups)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(K, d)
        self.quant_conv = nn.Conv2d(z_channels, d, 1)
        self.post_quant_conv = nn.Conv2d(d, z_channels, 1)
        self.K, self.l2norm = K, l2norm
        self.L = (image_size // 2 ** (len(ch_mult) - 1)) ** 2
        self.image_size = image_size
        # rows of length about 1
        nn.init.normal_(self.quantize.embedding.weight, std=d ** -0.5)

    @property
    def E(self):
        E = self.quantize.embedding.weight
        return F.normalize(E, dim=-1) if self.l2norm else E

    def embed(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, L, d) before quantisation."""
        e = self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2)
        return F.normalize(e, dim=-1) if self.l2norm else e

    def nearest(self, e):
        """(B, L, d) -> z (B, L): the code with the smallest squared distance."""
        e = e.float()
        E = self.E.float()
        distance = e.pow(2).sum(-1, keepdim=True) - 2 * e @ E.T + E.pow(2).sum(-1)  # (B, L, K)
        return distance.argmin(-1)

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> z (B, L) long, raster order."""
        return self.nearest(self.embed(images))

    def decode(self, e, c=None):
        """Code embeddings (B, L, d) -> images (B, 3, H, W), about [-1, 1], not clamped.

        The condition c is TA-TiTok's; no use here.
        """
        B, L, d = e.shape
        P = math.isqrt(L)
        return self.decoder(self.post_quant_conv(e.transpose(1, 2).reshape(B, d, P, P)))


def load_vqgan(src, image_size=256):
    """The official VQGAN, frozen: taming's f16-1024.

    src          path or state dict, on the hub `pretrained_maskgit/VQGAN/last.ckpt` of
                 llvictorll/Maskgit-pytorch; every size is read off its tensors; keys under "loss."
                 (the training's networks) are left out
    image_size   pixels per side, which no tensor tells; it fixes .L
    ValueError in one line when the file cannot be read or a key or shape is not the VQGAN's
    """
    name = source_name(src, "the VQGAN")
    groups = 32
    state = read_weights(src, "the VQGAN")
    ch = shape_of(state, "encoder.conv_in.weight", 4, name)[0]
    # the finest level at least, so that a foreign file ends here
    levels = max(1, count(state, "encoder.down.{}.block.0.conv1.weight"))
    widths = []
    for i in range(levels):
        widths.append(shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4, name)[0])
    if ch == 0 or any(w == 0 or w % ch or w % groups for w in [ch] + widths):
        raise ValueError(f"{name} does not fit: widths {widths} should be multiples of the first "
                         f"one, {ch}, and of {groups} (group norms)")
    K, d = shape_of(state, "quantize.embedding.weight", 2, name)
    z_channels = shape_of(state, "encoder.conv_out.weight", 4, name)[0]
    blocks = count(state, "encoder.down.0.block.{}.conv1.weight")
    attn_levels = [i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in state]
    # on meta: no memory and no random numbers before the file fits
    with torch.device("meta"):
        model = VQGAN(K, d, ch, [w // ch for w in widths], blocks, attn_levels, z_channels,
                      groups, image_size)
    return load_strictly(model, state, name, ignore_prefix=("loss.",)).requires_grad_(False)


# -------------------------------------------------------------------- TA-TiTok (Kim et al. 2025)
# The tokenizer of MaskGen, with its official key names: two vision transformers, and L tokens that
# have no place in the image. The decoder also reads the text. Facts: TA-TiTok's images are in
# [0, 1]; that ends inside encode and decode.
class ViTBlock(nn.Module):
    """Transformer block with the norm before each half."""
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Module()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.c_proj = nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


def positions(n, width):
    return nn.Parameter(torch.randn(n, width) * width ** -0.5)


class ViT(nn.Module):
    """What encoder and decoder share.

    The sequence: a class token, the patches of the image, L tokens, and what else there is.
    """
    def __init__(self, patches, L, width, depth, head_width):
        super().__init__()
        self.class_embedding = positions(1, width)
        self.positional_embedding = positions(1 + patches, width)
        self.latent_token_positional_embedding = positions(L, width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = nn.ModuleList()
        for _ in range(depth):
            self.transformer.append(ViTBlock(width, width // head_width))

    def forward(self, patches, tokens, *others):
        """patches (B, N, width), tokens (B, L, width), others (B, n, width)
        -> patches and tokens after the last norm."""
        B, N, _ = patches.shape
        L = tokens.shape[1]
        x = torch.cat([self.class_embedding.expand(B, 1, -1), patches], 1)
        x = x + self.positional_embedding                               # (B, 1 + N, width)
        tokens = tokens + self.latent_token_positional_embedding
        x = self.ln_pre(torch.cat([x, tokens, *others], 1))             # (B, 1 + N + L + n, width)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x)
        return x[:, 1:1 + N], x[:, 1 + N:1 + N + L]


class TATiTok(nn.Module):
    """Images <-> L tokens, with the interface of VQGAN; decode reads a text as well.

    The defaults are the sizes of bl128.
    K, d           so many codes of this width
    width, depth   of encoder and decoder
    patch          pixels per side
    text           rows and width of the text states
    head_width     of the attention
    l2norm         encoder outputs and codes are compared at length 1, and .E has rows of length 1
    .E (K, d) what decode expects   .L tokens per image
    """
    def __init__(self, K=8192, d=64, L=128, width=(768, 1024), depth=(12, 24), patch=16,
                 text=(77, 768), image_size=256, head_width=64, l2norm=False):
        super().__init__()
        self.K, self.L, self.image_size, self.l2norm = K, L, image_size, l2norm
        self.side = image_size // patch
        N = self.side ** 2
        self.latent_tokens = positions(L, width[0])
        self.encoder = ViT(N, L, width[0], depth[0], head_width)
        self.decoder = ViT(N, L, width[1], depth[1], head_width)

        self.encoder.patch_embed = nn.Conv2d(3, width[0], patch, stride=patch)
        self.encoder.conv_out = nn.Conv2d(width[0], d, 1)

        self.decoder.mask_token = nn.Parameter(torch.randn(1, 1, width[1]) * width[1] ** -0.5)
        self.decoder.decoder_embed = nn.Linear(d, width[1])
        self.decoder.text_guidance_positional_embedding = positions(text[0], width[1])
        self.decoder.text_guidance_proj = nn.Linear(text[1], width[1])
        self.decoder.ffn = nn.Sequential(nn.Conv2d(width[1], 3 * patch ** 2, 1))
        self.decoder.conv_out = nn.Conv2d(3, 3, 3, padding=1)

        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(K, d)
        nn.init.normal_(self.quantize.embedding.weight, std=d ** -0.5)

    def embed(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, L, d) before quantisation.

        ValueError for another size than image_size
        """
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"this TA-TiTok is for images of {self.image_size} x "
                             f"{self.image_size} pixels, got {tuple(images.shape[2:])}")
        patches = self.encoder.patch_embed((images + 1) / 2)            # (B, width, side, side)
        patches = patches.flatten(2).transpose(1, 2)                              # (B, N, width)
        latent = self.latent_tokens.expand(len(images), -1, -1)
        _, tokens = self.encoder(patches, latent)                                 # (B, L, width)
        e = self.encoder.conv_out(tokens.transpose(1, 2)[:, :, None])             # (B, d, 1, L)
        return e.flatten(2).transpose(1, 2)

    # where all codes have length 1, that of e does not matter
    E, nearest = VQGAN.E, VQGAN.nearest

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> z (B, L) long. The order is learned, not a place."""
        return self.nearest(self.embed(images))

    def decode(self, e, c):
        """Code embeddings and text states -> images (B, 3, H, W), about [-1, 1], not clamped.

        e (B, L, d)           rows of .E
        c (B, >= 77, 768)     whose last 77 rows are CLIP's states after all blocks and the final
                              norm; rows before are not used
        ValueError when e or c has another shape
        """
        decoder, side = self.decoder, self.side
        T = len(decoder.text_guidance_positional_embedding)
        width = decoder.text_guidance_proj.in_features
        fits = c is not None and c.ndim == 3 and c.shape[1] >= T
        if not fits or e.shape[1] != self.L or len(c) != len(e) or c.shape[2] != width:
            text = "no text" if c is None else f"a text of shape {tuple(c.shape)}"
            raise ValueError(f"this TA-TiTok decodes {self.L} tokens with a text of {T} rows or "
                             f"more, of width {width}, got tokens of shape {tuple(e.shape)} "
                             f"and {text}")
        text = decoder.text_guidance_proj(c[:, -T:])                              # (B, T, width)
        text = text + decoder.text_guidance_positional_embedding
        patches = decoder.mask_token.expand(len(e), side ** 2, -1)
        x, _ = decoder(patches, decoder.decoder_embed(e), text)                   # (B, N, width)
        x = decoder.ffn(x.transpose(1, 2).unflatten(2, (side, side)))
        # torch's pixel_shuffle wants the colour before the pixels of a patch
        x = x.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
        x = F.pixel_shuffle(x, self.image_size // side)                           # (B, 3, H, W)
        return 2 * decoder.conv_out(x) - 1


def load_tatitok(src, image_size=256, head_width=64, l2norm=False):
    """The official TA-TiTok with vector quantisation, frozen: bl128.

    src          path or state dict, turkeyju/tokenizer_tatitok_bl128_vq on the hub; every size is
                 read off its tensors, except those two that no tensor tells:
    head_width   of the attention; 64 in all released networks
    l2norm       see TATiTok; in none of them
    ValueError in one line when the file cannot be read, does not fit or is for another image_size
    """
    name = source_name(src, "TA-TiTok")
    state = read_weights(src, "TA-TiTok")
    K, d = shape_of(state, "quantize.embedding.weight", 2, name)
    L = shape_of(state, "latent_tokens", 2, name)[0]
    patches = shape_of(state, "encoder.positional_embedding", 2, name)[0] - 1
    patch = shape_of(state, "encoder.patch_embed.weight", 4, name)[2]
    width, depth = [], []
    for part in ("encoder", "decoder"):
        width.append(shape_of(state, f"{part}.class_embedding", 2, name)[1])
        depth.append(count(state, part + ".transformer.{}.ln_1.weight"))
    if patches * patch ** 2 != image_size ** 2:
        raise ValueError(f"{name} is for images of {patches} patches of {patch} x {patch} pixels, "
                         f"not of {image_size} x {image_size} pixels")
    if any(w == 0 or w % head_width for w in width):
        raise ValueError(f"{name} does not fit: widths {width} should be multiples of "
                         f"{head_width}, the width of a head")
    text = (shape_of(state, "decoder.text_guidance_positional_embedding", 2, name)[0],
            shape_of(state, "decoder.text_guidance_proj.weight", 2, name)[1])
    # on meta: no memory and no random numbers before the file fits
    with torch.device("meta"):
        model = TATiTok(K, d, L, width, depth, patch, text, image_size, head_width, l2norm)
    return load_strictly(model, state, name).requires_grad_(False)


# -------------------------------------------------------------------- files of pretrained weights
def read_weights(src, what):
    """Pretrained weights -> state dict: key -> tensor (CPU).

    The one reader of foreign files here; nothing in a file is ever run.
    src     path of a safetensors or torch file, whatever its suffix; or a dict, e.g. of a file
            already read. The state dict is the dict itself or its entry "state_dict" (Lightning)
            or "model_state_dict" (MaskGIT)
    what    for the messages: "the VQGAN"
    What a wrapper puts before every key ("module.", "_orig_mod.") is taken off. Sparse, quantised
    and 8-bit floating-point tensors come back as ordinary ones.
    ValueError in one line: no such file, cut short, no state dict in it, values not finite, numbers
    of a kind that no network here can hold
    """
    name = source_name(src, what)
    found = src if isinstance(src, dict) else read_file(src)
    for key in ("state_dict", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict):
        raise ValueError(f"{name} has no state dict: it is of type {type(found).__name__}")
    if not found:
        raise ValueError(f"{name} has no state dict: it is empty")
    weights = {}
    for key, value in found.items():
        if not isinstance(key, str) or not torch.is_tensor(value):
            raise ValueError(f"{name} has no state dict: there is {key!r}, of type "
                             f"{type(value).__name__}, where only tensors should be")
        try:
            weights[key] = ordinary(value)
            is_finite = bool(torch.isfinite(weights[key]).all())
        except RuntimeError:
            kind = f"{value.dtype}, {value.layout}, {value.device}".replace("torch.", "")
            raise ValueError(f"{name}: {key} is a tensor of a kind that cannot be read here "
                             f"({kind}); save it as float32") from None
        if not is_finite:
            raise ValueError(f"{name} is damaged: {key} has values that are not finite")
    # DistributedDataParallel's and torch.compile's, in any order
    wrapper = re.match(r"((module|_orig_mod)\.)*", common_prefix(weights)).group()
    return {key.removeprefix(wrapper): value for key, value in weights.items()}


def ordinary(value):
    """A tensor as our networks hold them: dense, neither quantised nor of 8-bit floats."""
    if value.is_quantized:
        return value.dequantize()
    if value.layout != torch.strided:
        return value.to_dense()
    if value.is_floating_point() and value.itemsize == 1:
        return value.float()
    return value


def common_prefix(keys):
    """What all keys begin with, up to a dot; "" in the official files."""
    begin = os.path.commonprefix(list(keys))
    return begin[:begin.rfind(".") + 1]


def name_prefix(keys, wanted):
    """For messages: what all keys begin with, unless the key that was wanted begins so too."""
    prefix = common_prefix(keys)
    if not prefix or wanted.startswith(prefix):
        return ""
    return f"; all of its keys begin with {prefix!r}"


# What downloads turn out to be, by their first bytes.
NO_WEIGHTS = {
    b"version https://git-lfs": "it is a pointer of git LFS; git lfs pull fetches the file",
    b"<": "it is a web page; the link to the file is another one",
    b"{": "it is JSON text; the tensors are in another file",
    b"\x1f\x8b": "it is packed by gzip; unpack it first",
    b"\x89HDF": "it is an HDF5 file (Keras); needed is a safetensors or torch file",
}


def read_file(path):
    """What a safetensors or torch file holds; which of the two it is, its content says.

    Other objects than tensors and containers come back as an Inert of their name.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of weights")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors" or is_safetensors(path):
            from safetensors.torch import load_file
            return load_file(path)
        # the format of torch.save since 1.6
        is_zip = zipfile.is_zipfile(path)
        try:
            # mapped: optimizer states are never read
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError:
            # a training checkpoint with objects of its own, as Lightning's?
            if not is_zip:
                raise
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True,
                              pickle_module=TensorsOnly)
    except Exception as error:
        # any exception: a damaged file can make an unpickler raise what it likes
        reason = why_unreadable(path, error)
    raise ValueError(f"{path} cannot be read as weights: {reason}")


def is_safetensors(path):
    """Whether a file begins as such: a number of 8 bytes, and so many bytes of JSON."""
    with open(path, "rb") as file:
        begin = file.read(9)
    return begin[4:] == b"\0\0\0\0{"


def why_unreadable(path, error):
    """What is wrong with a file, by its content and by what its reader raised. -> str"""
    try:
        with open(path, "rb") as file:
            begin = file.read(100)
        is_zip = zipfile.is_zipfile(path)
        names = zipfile.ZipFile(path).namelist() if is_zip else []
    except (OSError, zipfile.BadZipFile) as reason:
        return str(reason)
    first_line = (str(error).splitlines() or [""])[0][:150]
    cut = "it is cut short (a download that stopped?)"
    if not begin:
        return "it is empty"
    if begin.startswith(b"PK") and not is_zip:
        # a zip's list of contents is at its end
        return cut
    if is_safetensors(path):
        # in the header, or behind it
        is_cut = "invalid header length" in first_line or "incomplete" in first_line
        return cut if is_cut else f"{type(error).__name__}: {first_line}"
    if path.suffix == ".safetensors" and (is_zip or begin.startswith(b"\x80")):
        return "it is a torch file; its name should end in .pt instead of .safetensors"
    if is_zip and not any(name.endswith("data.pkl") for name in names):
        return "it is a zip archive, but not one of torch's; unpack it first"
    if is_zip:
        return f"{type(error).__name__}: {first_line}"
    text = begin.lstrip(b"\xef\xbb\xbf \r\n\t")
    for beginning, reason in NO_WEIGHTS.items():
        if text.startswith(beginning):
            return reason
    return ("it is neither a safetensors nor a torch file, or one from before torch 1.6 that holds "
            "more than tensors")


class Inert:
    """Stands for whatever a file names that is neither tensor nor container.

    It is made, called and filled as the real one would be.
    """
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def ignore(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


class Table(dict):
    """An OrderedDict of the file, without the attributes that a pickle may set."""
    def __setstate__(self, state):
        pass


class TensorsOnly:
    """For torch.load, in place of the module pickle: it knows tensors and OrderedDict.

    Any other global becomes a kind of Inert, so that nothing of the file is called: as safe as
    weights_only=True, which refuses such files as a whole.
    """
    # Python's own unpickler: the one in C takes all memory where a damaged file says so
    class Unpickler(pickle._Unpickler):
        def find_class(self, module, name):
            if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
                return getattr(torch._utils, name)
            if (module, name) == ("collections", "OrderedDict"):
                return Table
            return type(f"{module}.{name}", (Inert,), {})


def source_name(src, what):
    """How messages call a source of weights."""
    return f"{what} ({'a state dict' if isinstance(src, dict) else src})"


def shape_of(state, key, dims, name):
    """Shape of an entry from which a size is read, of so many dimensions.

    ValueError when the state dict is of another network
    """
    if key not in state:
        raise ValueError(f"{name} does not fit: key {key} is missing, and the first of its "
                         f"{len(state)} keys is {next(iter(state))}{name_prefix(state, key)}")
    if state[key].ndim != dims:
        raise ValueError(f"{name} does not fit: {key} has shape {tuple(state[key].shape)}, "
                         f"expected {dims} dimensions")
    return state[key].shape


def count(state, key):
    """How many of key.format(0), key.format(1), ... there are, up to the first that is missing."""
    n = 0
    while key.format(n) in state:
        n += 1
    return n


def load_strictly(model, state, name, ignore_prefix=()):
    """Fill a model from a state dict that has exactly its keys and shapes.

    model           may be on the meta device: it is given memory once everything fits
    state           key -> tensor. BatchNorm's counters may be absent
    ignore_prefix   keys of the state dict that begin so are left out
    name            for the ValueError, which tells the first fault and how many there are
    returns         the model, in eval mode
    """
    own = model.state_dict()
    given = {}
    for key in own:
        # counts batches of the training: of no use in eval mode
        if key.endswith("num_batches_tracked"):
            given[key] = torch.tensor(0)
    for key, value in state.items():
        if not key.startswith(tuple(ignore_prefix)):
            given[key] = value

    # where all keys have a prefix, each of them is a fault, and the first is a key that is missing
    hint = name_prefix([key for key in state if key in given], next(iter(own), ""))
    faults = [f"key {key} is missing{hint}" for key in own if key not in given]
    faults += [f"key {key} is unknown" for key in given if key not in own]
    for key, value in own.items():
        if key in given and given[key].shape != value.shape:
            faults.append(f"{key} has shape {tuple(given[key].shape)} instead of "
                          f"{tuple(value.shape)}")
        elif key in given and value.is_floating_point() and not given[key].is_floating_point():
            # copied, codes of a quantised network would pass for weights
            faults.append(f"{key} has numbers of type {given[key].dtype} instead of floats")
    if faults:
        others = f" (the first of {len(faults)} faults)" if len(faults) > 1 else ""
        raise ValueError(f"{name} does not fit: {faults[0]}{others}")
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device="cpu")
    model.load_state_dict(given)
    return model.eval()
