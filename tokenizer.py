"""tokenizer.py - images and tokens (Sec. 3.1): our own small data sets, and the two networks that
turn images into tokens and back, VQGAN and TA-TiTok.

    shapes() / scenes() / folder()  -->  images (N, 3, H, W)  -- encode -->  z (B, L) codes 0..K-1
                                               ^                                |
                                               |                        E[z] (B, L, d), rows of
                                               |                        the codebook
                                               +------------ decode <-----------+
In training, fpd.py gives decode its straight-through embeddings in place of E[z].

We call our own small data sets "worlds": shapes and scenes are drawn here, folder is the user's
images. The networks take and return float images in [-1, 1]; data sets, files and scores use uint8.
This file imports none of our files. Its last section reads the weights of all public networks.

    B images in the batch   L tokens per image (VQGAN: P x P)   K codes   d width of a code
"""
import functools
import hashlib
import math
import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

# -------------------------------------------------------------------- images: the shapes world
# Every class of this world is one colour and one shape. Colours are RGB in [-1, 1].
COLOURS = {"red": (.9, -.75, -.75), "green": (-.7, .5, -.7), "blue": (-.65, -.4, .95),
           "yellow": (.95, .8, -.8), "cyan": (-.8, .8, .9), "magenta": (.85, -.6, .8)}
SHAPES = ("circle", "square", "triangle", "cross")


def shapes_names():
    """The 24 class names, "red circle" ... "magenta cross"; the label is the index in this list."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def signed_distance(shape, x, y):
    """Signed distance (B, H, W) of points x, y (B, H, W) from shapes of radius about 1, negative
    inside. shape (B,) is an index into SHAPES; x and y are in units of the shape's radius."""
    def box(a, b):
        return torch.maximum(x.abs() - a, y.abs() - b)

    circle = (x.square() + y.square()).sqrt() - 0.95
    square = box(0.84, 0.84)
    # The triangle is equilateral and points up before it is turned.
    triangle = torch.maximum(x.abs() * 0.866 - y * 0.5, y) - 0.55
    cross = torch.minimum(box(1.0, 0.34), box(0.34, 1.0))
    all_shapes = torch.stack([circle, square, triangle, cross])                   # (4, B, H, W)
    return all_shapes[shape, torch.arange(len(shape))]


def paint(canvas, shape, colour, centre, radius, angle):
    """Draw one object on each canvas, with smooth edges one pixel wide.

    canvas (B, 3, S, S)          in [-1, 1]
    shape (B,)                   long, index into SHAPES
    colour (B, 3)                in [-1, 1]
    centre (B, 2), radius (B,)   in pixels; the centre is (x, y)
    angle (B,)                   in radians
    returns                      a new (B, 3, S, S)
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


def between(low, high, shape, generator):
    """Uniform random numbers between low and high."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def shapes(labels, seed, size=32):
    """Render the shapes world: one object per image, on a plain grey background.

    labels (N,)   long, index into shapes_names()
    seed          equal labels and seed give equal images
    Position, size, angle, hue and background vary from image to image.
    returns (N, 3, size, size) uint8
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()))
    tones = torch.tensor([-.75, -.1, .55])
    images = []
    # The distance maps are large, so only 1,024 images are drawn at a time.
    for label in labels.split(1024):
        n = len(label)
        # The radius is 10 to 13 of 32 pixels; the object is at most 3 pixels off the centre.
        radius = between(.30, .40, n, generator) * size
        centre = size / 2 + between(-1, 1, (n, 2), generator) * (3 * size / 32)
        colour = palette[label // len(SHAPES)] + between(-.08, .08, (n, 3), generator)
        tone = tones[torch.randint(3, (n,), generator=generator)] + between(-.05, .05, n, generator)
        canvas = tone.view(n, 1, 1, 1).expand(n, 3, size, size)
        # Objects are turned by up to 11 degrees.
        angle = between(-.2, .2, n, generator)
        images.append(to_uint8(paint(canvas, label % len(SHAPES), colour, centre, radius, angle)))
    return torch.cat(images)


# -------------------------------------------------------------------- images: the scenes world
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
# The direction from the second object to the first: x to the right, y down.
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Centres (x, y) of the objects, in quarters of the canvas. The key is the relation of two objects
# or, for captions without a relation, the number of objects.
LAYOUTS = {"left of": [(1, 2), (3, 2)], "right of": [(3, 2), (1, 2)],
           "above": [(2, 1), (2, 3)], "below": [(2, 3), (2, 1)],
           1: [(2, 2)], 2: [(1, 2), (3, 2)], 3: [(1, 1), (3, 1), (2, 3)],
           4: [(1, 1), (3, 1), (1, 3), (3, 3)]}
SCENE_WORDS = ("a", "and", *COUNTS, *COLOURS, *SHAPES, *PLURALS,
               "left", "right", "of", "above", "below")
# The whole grammar: the six kinds of captions of GenEval (Ghosh et al. 2023). The keys are the tags
# of GenEval's prompts. PATTERNS has a regular expression for each field in braces.
KINDS = {"single_object": "a {shape}",
         "two_object": "a {shape} and a {shape2}",
         "counting": "{number} {colour} {plural}",
         "colors": "a {colour} {shape}",
         "position": "a {colour} {shape} {relation} a {colour2} {shape2}",
         "color_attr": "a {colour} {shape} and a {colour2} {shape2}"}
TAGS = tuple(KINDS)
FIELDS = {"shape": SHAPES, "shape2": SHAPES, "colour": COLOURS, "colour2": COLOURS,
          "number": COUNTS, "plural": PLURALS, "relation": RELATIONS}
PATTERNS = {field: f"({'|'.join(words)})" for field, words in FIELDS.items()}


def parse_caption(text):
    """A caption of the scenes world -> dict(tag, objects, relation).

    tag        one of TAGS
    objects    list of 1 to 4 pairs (colour, shape); colour is None if the caption does not name it
    relation   where the first object is, relative to the second: a key of RELATIONS, or None
    If the text is no such caption, a ValueError names the first unknown word or, if all words are
    known, the text.
    """
    words = text.lower().split()
    sentence = " ".join(words)
    tag = next((tag for tag, kind in KINDS.items()
                if re.fullmatch(kind.format(**PATTERNS), sentence)), None)
    found = re.findall(r"\ba (?:{colour} )?{shape}".format(**PATTERNS), sentence)
    objects = [(colour or None, shape) for colour, shape in found]
    if tag == "counting":
        number, colour, plural = words
        objects = [(colour, PLURALS[plural])] * COUNTS[number]
    elif len(set(objects)) < len(objects):
        # Two equal objects have to be written as a number: "two red circles".
        tag = None
    if tag is None:
        unknown = [word for word in words if word not in SCENE_WORDS]
        raise ValueError(f"scenes does not know {(unknown or [text])[0]!r}; it knows captions such "
                         "as 'a circle and a square', 'three red circles' and 'a blue square above "
                         f"a green triangle', made of the words {', '.join(SCENE_WORDS)}")
    relation = next((relation for relation in RELATIONS if relation in sentence), None)
    return dict(tag=tag, objects=objects, relation=relation)


def scene_captions(n, seed):
    """n captions, a list of str, in which the six kinds take turns. Two objects of a caption differ
    in colour and in shape. Equal seeds give equal captions."""
    rng = random.Random(seed)
    captions = []
    for i in range(n):
        shape, shape2 = rng.sample(SHAPES, 2)
        colour, colour2 = rng.sample(list(COLOURS), 2)
        kind = KINDS[TAGS[i % len(TAGS)]]
        # Every field is drawn, even if the kind does not use it.
        captions.append(kind.format(
            shape=shape, shape2=shape2, colour=colour, colour2=colour2,
            number=rng.choice(list(COUNTS)), plural=rng.choice(list(PLURALS)),
            relation=rng.choice(list(RELATIONS))))
    return captions


def scenes(captions, seed, size=32):
    """Render the scenes world: the objects of each caption on a plain dark background.

    captions   list of N str
    seed       equal captions and seed give equal images
    Positions, sizes, angles, hues and the background vary from image to image. If a caption does
    not name colours, or which object is on the left, these vary as well. Objects never touch.
    returns (N, 3, size, size) uint8. ValueError for captions that parse_caption does not know.
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()))
    images = []
    # The distance maps are large, so only 1,024 images are drawn at a time.
    for start in range(0, len(captions), 1024):
        part = [parse_caption(caption) for caption in captions[start:start + 1024]]
        n = len(part)
        first_is_left = torch.randint(2, (n,), generator=generator)
        # Each object has a random colour, unless its caption names one.
        colour = torch.randint(len(COLOURS), (n, 4), generator=generator)
        shape = torch.full((n, 4), -1)                                  # -1: no such object
        position = torch.zeros(n, 4, 2)                                 # quarters of the canvas
        for i, scene in enumerate(part):
            centres = LAYOUTS[scene["relation"] or len(scene["objects"])]
            if scene["relation"] is None and not first_is_left[i]:
                centres = centres[::-1]
            position[i, :len(centres)] = torch.tensor(centres).float()
            for k, (colour_name, shape_name) in enumerate(scene["objects"]):
                shape[i, k] = SHAPES.index(shape_name)
                if colour_name is not None:
                    colour[i, k] = list(COLOURS).index(colour_name)
        centre = size / 4 * position + between(-.015, .015, (n, 4, 2), generator) * size
        radius = between(.165, .175, (n, 4), generator) * size                    # (n, 4) pixels
        angle = between(-.05, .05, (n, 4), generator)
        hue = palette[colour] + between(-.03, .03, (n, 4, 3), generator)          # (n, 4, 3)
        # The background is always dark, because every further tone would need codes of its own.
        tone = -.75 + between(-.05, .05, n, generator)
        canvas = tone.view(n, 1, 1, 1).repeat(1, 3, size, size)
        for k in range(4):
            has_object = shape[:, k] >= 0                                         # (n,) bool
            objects = [x[has_object, k] for x in (shape, hue, centre, radius, angle)]
            canvas[has_object] = paint(canvas[has_object], *objects)
        images.append(to_uint8(canvas))
    return torch.cat(images)


def read_captions(path):
    """A text file with one caption per line -> list of str, without empty lines."""
    # str.splitlines would also split at rare characters that captions from the web contain.
    lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    return [line.strip() for line in lines if line.strip()]


# -------------------------------------------------------------------- images: files
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def read_image(path, size=None):
    """Any image file -> (3, H, W) uint8, rotated as its EXIF data say, and white where transparent.

    size    pixels per side, to which the centre square of the image is scaled; None: no change
    ValueError for a damaged file, and for more than 8 bits per channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                # Pillow would clip all values above 255 to white.
                raise ValueError(f"more than 8 bits per channel, mode {image.mode}")
            image = ImageOps.exif_transpose(image)
    except Exception as error:
        # Pillow's decoders raise errors of many types, most of which do not name the file.
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def image_files(folder):
    """All images in a folder, at any depth -> sorted list of paths.

    Files and folders whose names begin with a dot (._x.png, .ipynb_checkpoints) are left out. The
    folder itself may be a link. Links to folders below it are not followed, because a link back to
    a folder above would list every image many times.
    """
    paths = [Path(place, name) for place, _, names in os.walk(folder) for name in names]
    images = [path for path in paths if path.suffix.lower() in SUFFIXES
              and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not images:
        raise ValueError(f"no images in {folder}")
    return sorted(images)


@functools.cache
def folder(data, size=32):
    """The user's own images: each subfolder of `data` is a class.

    The folder is read once per process, so that changes made while a network trains have no effect.
    Do not write into the result.
    returns   images (N, 3, size, size) uint8, centre squares; labels (N,) long; the names of the
              classes; a fingerprint, the SHA-256 of images, labels and names
    ValueError for a class with fewer than 3 images: one to train on, two for the scores.
    """
    # If the command is run in this folder, its own folder runs/ is not a class.
    places = [place for place in sorted(Path(data).iterdir()) if place.is_dir()
              and not place.name.startswith(".") and place.resolve() != Path("runs").resolve()]
    classes = {place.name: image_files(place) for place in places}
    counts = {name: len(files) for name, files in classes.items()}
    if len(counts) < 2 or min(counts.values()) < 3:
        raise ValueError(f"--data {data} needs at least 2 subfolders, one per class, with at least "
                         f"3 images each, one to train on and two for the scores; it has {counts}")
    names, n = list(classes), sum(counts.values())
    others = sum(len(found) for place in places for _, _, found in os.walk(place)) - n
    print(f"{data}: {n} images in {len(names)} classes ({', '.join(names[:8])}"
          f"{', ...' if len(names) > 8 else ''}), centre squares at {size} x {size} pixels; "
          f"{others} other files ignored")
    bar = tqdm(sum(classes.values(), []), "reading images", leave=False)
    images = torch.stack([read_image(path, size) for path in bar])
    labels = torch.arange(len(names)).repeat_interleave(torch.tensor(list(counts.values())))
    digest = hashlib.sha256(images.numpy().tobytes() + repr((counts, size)).encode())
    return images, labels, names, digest.hexdigest()


def fingerprint(cfg):
    """The fingerprint of the user's own images, a text. It is "" for all other data sets: their
    images are drawn by this file, or no images are needed."""
    return folder(cfg.data)[3] if cfg.dataset == "folder" else ""


def split_folder(labels):
    """Which images of a folder are trained on, and which are held out.

    A tenth of each class, but at least 2 images, is held out, evenly spaced. One half of it is the
    reference of every score, the other half stands for what a perfect model would draw.
    labels (N,) long   returns dict of indices (long): "train", "test" (the reference), "real"
    """
    generator = torch.Generator().manual_seed(0)
    train, test, real = [], [], []
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        n, m = len(own), max(2, len(own) // 10)
        held_out = ((torch.arange(m) + 0.5) * n / m).long()                       # (m,) of 0..n-1
        train.append(own[~torch.isin(torch.arange(n), held_out)])
        # They are shuffled, because file names often follow the order of time.
        held_out = own[held_out[torch.randperm(m, generator=generator)]]
        test.append(held_out[m // 2:])
        real.append(held_out[:m // 2])
    return dict(train=torch.cat(train), test=interleaved(test), real=interleaved(real))


def interleaved(groups):
    """The indices of several classes, list of (m,) -> (M,), in an order in which every stretch has
    about the same share of each class as the whole."""
    # In the order of these keys, the m indices of a class are spread evenly over the whole.
    keys = torch.cat([(torch.arange(len(group)) + 0.5) / len(group) for group in groups])
    return torch.cat(groups)[keys.argsort(stable=True)]


# -------------------------------------------------------------------- images: any small world
def world(cfg, split):
    """The images of one of our own data sets, a "small world": cfg.dataset is "shapes", "scenes",
    or "folder", which lies in cfg.data.

    split     "train"; "phi" and "judge", for the two classifiers; "test", the reference of every
              score; "real", images that are scored like a model's. In shapes and scenes each split
              has its own seed. `split_folder` divides a folder; its "phi" and "judge" are "train".
    returns   images (N, 3, 32, 32) uint8; conditions: labels (N,), or for scenes a list of N
              captions; names: the class names, or for scenes two example captions of each kind
    """
    if cfg.dataset == "folder":
        images, labels, names, _ = folder(cfg.data)
        chosen = split_folder(labels)["train" if split in ("phi", "judge") else split]
        return images[chosen], labels[chosen], names
    seed = {"train": 0, "phi": 1, "judge": 2, "test": 3, "real": 4}[split]
    n = 480 if cfg.smoke else dict(test=2400, real=960).get(split, 12_000)
    if cfg.dataset == "scenes":
        # "real" has the captions of "test", with other images.
        captions = scene_captions(n, 3 if split == "real" else seed)
        # The names do not depend on the split. They are the first captions of "test".
        return scenes(captions, seed), captions, scene_captions(12, seed=3)
    if cfg.dataset != "shapes":
        raise ValueError(f"{cfg.dataset} has no images here: it is not a small world")
    labels = torch.arange(n) % len(shapes_names())
    return shapes(labels, seed), labels, shapes_names()


def to_float(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] -> uint8; values outside are clipped."""
    # The official MaskGIT rounds in this way: + 128, then the fraction is cut off.
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# -------------------------------------------------------------------- VQGAN (Esser et al. 2021)
# The network of taming-transformers, with its key names, so that the public f16-1024 checkpoint
# loads strictly. The small worlds train the same class with fewer channels. Level 0 has the finest
# resolution. The eps of the group norms is the official 1e-6, not torch's default.
class ResBlock(nn.Module):
    """x + two convolutions of x. A norm and a SiLU come before each convolution."""
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """x + self-attention of x, with a single head, over all positions of the map."""
    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        B, C, H, W = x.shape
        y = self.norm(x)
        # q, k, v (B, HW, C)
        q, k, v = (layer(y).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        # The dot products are scaled by C^-0.5.
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(y.transpose(1, 2).reshape(B, C, H, W))


class Resample(nn.Module):
    """Halves the size of a map in the encoder, or doubles it in the decoder (up=True)."""
    def __init__(self, c, up):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(c, c, 3, padding=1) if up else nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # The official network pads with zeros at the right and at the bottom only.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if the level has it."""
    def __init__(self, c_in, c_out, blocks, attention, groups):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups)
                                   for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(c_out, groups) if attention else nn.Identity()
                                  for _ in range(blocks))

    def forward(self, x):
        for block, attention in zip(self.block, self.attn):
            x = attention(block(x))
        return x


def middle(c, groups):
    """The blocks between the levels and the code, at the coarsest resolution."""
    return nn.Sequential(OrderedDict(block_1=ResBlock(c, c, groups), attn_1=AttnBlock(c, groups),
                                     block_2=ResBlock(c, c, groups)))


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, z_channels, H / f, W / f), where f = 2^(levels - 1)."""
    def __init__(self, ch, ch_mult, blocks, attn_levels, z_channels, groups):
        super().__init__()
        # Level i goes from widths[i] channels to widths[i + 1].
        widths = [ch] + [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i], widths[i + 1], blocks, i in attn_levels, groups)
            is_last = i == len(ch_mult) - 1
            level.downsample = nn.Identity() if is_last else Resample(widths[i + 1], up=False)
            self.down.append(level)
        self.mid = middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level.downsample(level(x))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """(B, z_channels, P, P) -> image (B, 3, f P, f P). Each level has one more residual block than
    in the encoder."""
    def __init__(self, ch, ch_mult, blocks, attn_levels, z_channels, groups):
        super().__init__()
        # Level i goes from widths[i + 1] channels to widths[i].
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i in range(len(ch_mult)):
            level = Level(widths[i + 1], widths[i], blocks + 1, i in attn_levels, groups)
            level.upsample = Resample(widths[i], up=True) if i > 0 else nn.Identity()
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level.upsample(level(x))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images <-> tokens. The default sizes are for the small worlds: 32 x 32 pixels, f = 4, L = 64.

    K, d          number and width of the codes
    ch, ch_mult   level i has ch * ch_mult[i] channels
    blocks        residual blocks per encoder level
    attn_levels   levels with attention
    groups        number of groups of the group norms. With the official 32, a group of the small
                  network would have one channel or less, which erases brightness.
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
        self.K, self.l2norm, self.image_size = K, l2norm, image_size
        self.L = (image_size // 2 ** (len(ch_mult) - 1)) ** 2
        # Rows of the codebook have length about 1.
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
        """(B, 3, H, W) in [-1, 1] -> z (B, L) long. VQGAN's tokens are in raster order."""
        return self.nearest(self.embed(images))

    def decode(self, e, c=None):
        """Code embeddings (B, L, d) -> images (B, 3, H, W), about [-1, 1], not clamped. c is not
        used: it is an argument because TA-TiTok's decode needs the condition."""
        B, L, d = e.shape
        P = math.isqrt(L)
        return self.decoder(self.post_quant_conv(e.transpose(1, 2).reshape(B, d, P, P)))


@torch.no_grad()
def reseed_codes(vq, e, z, usage, everything=False):
    """Move unused codes to where the quantisation error is large.

    e            (N, d) encoder outputs;   z (N,) their codes
    usage        (K,) decayed counts, changed in place like the codebook
    everything   True when quantisation begins: k-means places all codes
    """
    codes = vq.quantize.embedding.weight                                        # (K, d)
    if everything:
        centres = e[torch.randperm(len(e))[:vq.K]]                              # (K, d)
        for _ in range(10):
            nearest = torch.cdist(e, centres).argmin(1)                         # (N,)
            count = torch.bincount(nearest, minlength=vq.K)[:, None]
            mean = torch.zeros_like(centres).index_add_(0, nearest, e) / count.clamp(min=1)
            centres = torch.where(count > 0, mean, e[torch.randint(len(e), (vq.K,))])
        codes.copy_(centres)
        usage.fill_(10)
    dead = usage < 1
    if dead.any():
        error = (e - vq.E[z]).pow(2).sum(1)
        codes[dead] = e[torch.multinomial(error, int(dead.sum()), replacement=True)]
        usage[dead] = 10


def load_vqgan(src, **sizes):
    """The public VQGAN f16-1024, without the networks of its loss. src: see `load_weights`;
    models.PUBLIC names the file. sizes: other sizes, for the tests."""
    public = dict(K=1024, d=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2, attn_levels=(4,),
                  z_channels=256, groups=32, image_size=256)
    return load_weights(without_values(VQGAN, **public | sizes), src, unused="loss.")


# -------------------------------------------------------------------- TA-TiTok (Kim et al. 2025)
# The tokenizer of MaskGen, with its official key names: two vision transformers, and L tokens that
# belong to no position in the image. The decoder also reads the text. The official code has images
# in [0, 1]; embed and decode convert from and to our [-1, 1].
class ViTBlock(nn.Module):
    """Transformer block with a LayerNorm before the attention and before the MLP."""
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


def random_rows(n, width):
    """A parameter (n, width), for a position embedding or for learned tokens."""
    return nn.Parameter(torch.randn(n, width) * width ** -0.5)


class ViT(nn.Module):
    """The transformer of the encoder and of the decoder. Its sequence is a class token, the patches
    of the image, L tokens and, in the decoder, the text."""
    def __init__(self, patches, L, width, depth, head_width):
        super().__init__()
        self.class_embedding = random_rows(1, width)
        self.positional_embedding = random_rows(1 + patches, width)
        self.latent_token_positional_embedding = random_rows(L, width)
        self.ln_pre = nn.LayerNorm(width)
        self.ln_post = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(width, width // head_width) for _ in range(depth))

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
    """Images <-> L tokens. It has the interface of VQGAN, but decode also reads a text. The default
    sizes are for bl128.

    K, d           number and width of the codes
    width, depth   of the transformers, a pair each: encoder, decoder
    patch          pixels per side of a patch
    text           number and width of the text states
    head_width     channels of one attention head
    .E (K, d) the codebook   .L tokens per image
    """
    def __init__(self, K=8192, d=64, L=128, width=(768, 1024), depth=(12, 24), patch=16,
                 text=(77, 768), image_size=256, head_width=64):
        super().__init__()
        self.K, self.L, self.image_size = K, L, image_size
        self.side = image_size // patch
        N = self.side ** 2
        self.latent_tokens = random_rows(L, width[0])
        self.encoder = ViT(N, L, width[0], depth[0], head_width)
        self.decoder = ViT(N, L, width[1], depth[1], head_width)

        self.encoder.patch_embed = nn.Conv2d(3, width[0], patch, stride=patch)
        self.encoder.conv_out = nn.Conv2d(width[0], d, 1)

        self.decoder.mask_token = nn.Parameter(torch.randn(1, 1, width[1]) * width[1] ** -0.5)
        self.decoder.decoder_embed = nn.Linear(d, width[1])
        self.decoder.text_guidance_positional_embedding = random_rows(text[0], width[1])
        self.decoder.text_guidance_proj = nn.Linear(text[1], width[1])
        self.decoder.ffn = nn.Sequential(nn.Conv2d(width[1], 3 * patch ** 2, 1))
        self.decoder.conv_out = nn.Conv2d(3, 3, 3, padding=1)

        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(K, d)
        nn.init.normal_(self.quantize.embedding.weight, std=d ** -0.5)

    @property
    def E(self):
        return self.quantize.embedding.weight

    def embed(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, L, d) before quantisation."""
        patches = self.encoder.patch_embed((images + 1) / 2)            # (B, width, side, side)
        patches = patches.flatten(2).transpose(1, 2)                              # (B, N, width)
        latent = self.latent_tokens.expand(len(images), -1, -1)
        _, tokens = self.encoder(patches, latent)                                 # (B, L, width)
        e = self.encoder.conv_out(tokens.transpose(1, 2)[:, :, None])             # (B, d, 1, L)
        return e.flatten(2).transpose(1, 2)

    nearest, encode = VQGAN.nearest, VQGAN.encode

    def decode(self, e, c):
        """Code embeddings and text states -> images (B, 3, H, W), about [-1, 1], not clamped.

        e (B, L, d)           rows of .E
        c (B, >= 77, 768)     the last 77 rows are CLIP's states after all blocks and the final
                              norm; rows before them are not used
        """
        decoder, side = self.decoder, self.side
        T = len(decoder.text_guidance_positional_embedding)
        text = decoder.text_guidance_proj(c[:, -T:])                              # (B, T, width)
        text = text + decoder.text_guidance_positional_embedding
        patches = decoder.mask_token.expand(len(e), side ** 2, -1)
        x, _ = decoder(patches, decoder.decoder_embed(e), text)                   # (B, N, width)
        x = decoder.ffn(x.transpose(1, 2).unflatten(2, (side, side)))
        # pixel_shuffle expects channels (colour, pixel); the official ones are (pixel, colour).
        x = x.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2)
        x = F.pixel_shuffle(x, self.image_size // side)                           # (B, 3, H, W)
        return 2 * decoder.conv_out(x) - 1


def load_tatitok(src, **sizes):
    """The public TA-TiTok bl128 with vector quantisation. src: see `load_weights`; models.PUBLIC
    names the file. sizes: other sizes, for the tests."""
    return load_weights(without_values(TATiTok, **sizes), src)


# -------------------------------------------------------------------- weights of public networks
def read_weights(src):
    """A file of weights -> state dict: key -> tensor (CPU). Code in a file is never run.

    src   path of a safetensors or torch file, or a dict. The state dict is its whole content, or
          its entry "state_dict" (Lightning) or "model_state_dict" (MaskGIT).
    """
    if isinstance(src, dict):
        content = src
    elif str(src).endswith(".safetensors"):
        content = load_file(src)
    else:
        try:
            # With mmap, unused parts of the file, such as an optimiser's state, are never read.
            content = torch.load(src, map_location="cpu", weights_only=True,
                                 mmap=zipfile.is_zipfile(src))
        except pickle.UnpicklingError:
            # Lightning's checkpoints also contain objects of its own, which weights_only refuses.
            content = torch.load(src, map_location="cpu", weights_only=False, mmap=True,
                                 pickle_module=TensorsOnly)
    for key in ("state_dict", "model_state_dict"):
        content = content.get(key, content)
    return content


class Inert:
    """Replaces every object in a file that is neither a tensor nor a container. It can be called
    and filled like the object itself, but does nothing."""
    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def ignore(self, *args, **kwargs):
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


class TensorsOnly:
    """Replaces the module pickle in torch.load. A file may name any function or class. The three in
    REAL are used. Inert replaces all others, which are therefore never called."""
    REAL = {("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
            ("collections", "OrderedDict")}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if (module, name) in TensorsOnly.REAL:
                return super().find_class(module, name)
            return Inert


def without_values(network, **sizes):
    """A network that has no values yet, for `load_weights`. Drawing random values would take longer
    than reading the file."""
    with torch.device("meta"):
        return network(**sizes)


def load_weights(network, src, unused=()):
    """Load weights into a network -> the network, frozen and in eval mode.

    src      what `read_weights` takes. Its keys and shapes, except for those of `unused` keys, have
             to be exactly those of the network.
    unused   a prefix or a tuple of prefixes: keys that begin with one of them are left out
    """
    if next(network.parameters()).is_meta:
        network.to_empty(device="cpu")
    state = {key: value for key, value in read_weights(src).items() if not key.startswith(unused)}
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)
