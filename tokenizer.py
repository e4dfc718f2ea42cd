"""tokenizer.py - images and tokens (Sec. 3.1): where images and captions come from, and what turns images into codes and back: VQGAN, TA-TiTok.

    shapes() / scenes() / folder()  -->  images (N, 3, H, W)  -- encode -->  z (B, L) codes 0..K-1
                                               ^                                |  E[z] (B, L, d), rows of the codebook
                                               +------------ decode <-----------+  (fpd.py's straight-through embeddings enter here)

Images are float in [-1, 1] between functions; datasets are kept as uint8 to save memory. Imports none of our files.
Also here, since every file of ours may import this one: reading files of pretrained weights.

    B images in the batch   L tokens per image   K codebook entries   d code width   P = sqrt(L) tokens per side
"""
import math
import pickle
import random
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

# ------------------------------------------------------------------------------------------------ images: the shapes world
# RGB in [-1, 1]. Every class is one colour and one shape, in the order of shapes_names().
COLOURS = {"red": (.9, -.75, -.75), "green": (-.7, .5, -.7), "blue": (-.65, -.4, .95),
           "yellow": (.95, .8, -.8), "cyan": (-.8, .8, .9), "magenta": (.85, -.6, .8)}
SHAPES = ("circle", "square", "triangle", "cross")


def shapes_names():
    """The 24 class names, "red circle" ... "magenta cross"; the position in the list is the label."""
    return [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def signed_distance(shape, x, y):
    """Signed distance (negative inside) from points x, y to a shape of size about 1. shape (B,) index into SHAPES, x, y (B, H, W)."""
    def box(a, b):
        return torch.maximum(x.abs() - a, y.abs() - b)
    circle = (x.square() + y.square()).sqrt() - 0.95
    triangle = torch.maximum(x.abs() * 0.866 - y * 0.5, y) - 0.55          # equilateral, pointing up before it is turned
    cross = torch.minimum(box(1.0, 0.34), box(0.34, 1.0))
    return torch.stack([circle, box(0.84, 0.84), triangle, cross]).gather(0, shape.view(1, -1, 1, 1).expand(1, *x.shape))[0]


def paint(canvas, shape, colour, centre, radius, angle):
    """Draw one object on each canvas, with smooth edges one pixel wide.

    canvas (B, 3, S, S) in [-1, 1]   shape (B,) long   colour (B, 3)   centre (B, 2) x, y in pixels   radius (B,) pixels   angle (B,) radians
    returns a new (B, 3, S, S)
    """
    S = canvas.shape[-1]
    axis = torch.arange(S) + 0.5
    dx, dy = axis[None, None, :] - centre[:, 0, None, None], axis[None, :, None] - centre[:, 1, None, None]
    cos, sin, radius = angle.cos()[:, None, None], angle.sin()[:, None, None], radius[:, None, None]
    distance = signed_distance(shape, (cos * dx + sin * dy) / radius, (cos * dy - sin * dx) / radius) * radius   # pixels
    alpha = (0.5 - distance).clamp(0, 1)[:, None]                                                                # (B, 1, S, S)
    return canvas * (1 - alpha) + colour[:, :, None, None] * alpha


def ranges(n, generator):
    """-> function (low, high, *shape) -> (n, *shape) numbers between the two: what varies from image to image."""
    return lambda low, high, *shape: low + (high - low) * torch.rand(n, *shape, generator=generator)


def shapes(labels, seed, anywhere=False, size=32):
    """Render the shapes world: one object of a colour and a shape on a plain grey ground.

    labels (N,) long, index into shapes_names()   seed: equal labels and seed give equal images
    anywhere   False: object within 3 px of the centre, as photographs are (the default world).
               True: as far off as it still fits (the hard world, see README)
    Place, size, turn, hue and ground vary from image to image. returns (N, 3, size, size) uint8
    """
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor(list(COLOURS.values()))
    images = torch.empty(len(labels), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(labels), 1024):                                   # chunks: the distance maps are large
        label = labels[start:start + 1024]
        n, between = len(label), ranges(len(label), generator)
        radius = (between(.22, .32) if anywhere else between(.30, .40)) * size  # 10 to 13 px of 32; 7 to 10 where it needs room to move
        reach = (size / 2 - radius)[:, None] if anywhere else 3 * size / 32
        centre = size / 2 + between(-1, 1, 2) * reach
        colour = palette[label // len(SHAPES)] + between(-.08, .08, 3)
        tone = torch.tensor([-.75, -.1, .55])[torch.randint(3, (n,), generator=generator)] + between(-.05, .05)
        ground = tone.view(n, 1, 1, 1).expand(n, 3, size, size)
        image = paint(ground, label % len(SHAPES), colour, centre, radius, between(-.2, .2))     # turns of up to 11 degrees
        images[start:start + n] = to_uint8(image)
    return images


# ------------------------------------------------------------------------------------------------ images: the scenes world
# Captions of GenEval's six kinds (Ghosh et al. 2023), by the names that its prompts are tagged with.
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {"two": 2, "three": 3, "four": 4}
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}    # where the first object is, x to the right, y down
LAYOUTS = {1: [(2, 2)], 2: [(1, 2), (3, 2)], 3: [(1, 1), (3, 1), (2, 3)], 4: [(1, 1), (3, 1), (1, 3), (3, 3)]}    # centres, x, y in quarters
SCENE_WORDS = ("a", "and", *COUNTS, *COLOURS, *SHAPES, *PLURALS, "left", "right", "of", "above", "below")
ONE = f"a (?:({'|'.join(COLOURS)}) )?({'|'.join(SHAPES)})"
SENTENCE = re.compile(f"{ONE}(?: (and|{'|'.join(RELATIONS)}) {ONE})?|({'|'.join(COUNTS)}) ({'|'.join(COLOURS)}) ({'|'.join(PLURALS)})")


def parse_caption(text):
    """A caption of the scenes world -> dict(tag, objects, relation): the only place that knows the grammar.

    tag        of TAGS:   "a circle" | "a circle and a square" | "three red circles" | "a red circle" | "a blue square above a green triangle"
                          | "a red circle and a blue square"
    objects    list of 1 to 4 pairs (colour or None where it is not said, shape)
    relation   key of RELATIONS, of the first object to the second, or None
    ValueError names a word that does not exist, or says that the words make no caption
    """
    words = text.lower().split()
    for word in words:
        if word not in SCENE_WORDS:
            raise ValueError(f"scenes does not know the word {word!r}; it knows: {', '.join(SCENE_WORDS)}")
    found = SENTENCE.fullmatch(" ".join(words))
    if found:
        colour, shape, link, colour2, shape2, number, colour_n, plural = found.groups()
        if number:
            return dict(tag="counting", objects=[(colour_n, PLURALS[plural])] * COUNTS[number], relation=None)
        if not link:
            return dict(tag="colors" if colour else "single_object", objects=[(colour, shape)], relation=None)
        relation, has_colours = RELATIONS.keys() & {link}, (colour is not None) + (colour2 is not None)
        if (colour, shape) != (colour2, shape2) and (has_colours == 2 or (has_colours == 0 and not relation)):
            return dict(tag="position" if relation else "color_attr" if colour else "two_object",
                        objects=[(colour, shape), (colour2, shape2)], relation=link if relation else None)
    raise ValueError(f"scenes knows the words of {text!r}, but not the sentence; it knows such as 'a circle', 'a circle and a square', 'three red "
                     "circles', 'a red circle', 'a blue square above a green triangle', 'a red circle and a blue square'")


def scene_captions(n, seed):
    """n captions, the six kinds in turn; two objects differ in colour and in shape. Equal seeds give equal captions. -> list of str"""
    rng, captions = random.Random(seed), []
    for i in range(n):
        (shape, shape2), (colour, colour2) = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
        number, plural, relation = rng.choice(list(COUNTS)), rng.choice(list(PLURALS)), rng.choice(list(RELATIONS))
        captions.append((f"a {shape}", f"a {shape} and a {shape2}", f"{number} {colour} {plural}", f"a {colour} {shape}",
                         f"a {colour} {shape} {relation} a {colour2} {shape2}", f"a {colour} {shape} and a {colour2} {shape2}")[i % len(TAGS)])
    return captions


def scenes(captions, seed, size=32):
    """Render the scenes world: the objects of each caption on a plain dark ground: one in the middle, two in a row or column, more as on dice.

    captions (list of N str)   seed: equal captions and seed give equal images
    Who stands left, where it is not said, places, sizes, turns, hues and ground vary, and so do colours that are not said.
    Objects never touch.
    returns (N, 3, size, size) uint8. ValueError as of parse_caption
    """
    generator = torch.Generator().manual_seed(seed)
    palette, known = torch.tensor(list(COLOURS.values())), list(COLOURS)
    parsed = [parse_caption(caption) for caption in captions]
    images = torch.empty(len(parsed), 3, size, size, dtype=torch.uint8)
    for start in range(0, len(parsed), 1024):                                   # chunks: the distance maps are large
        part = parsed[start:start + 1024]
        n, between = len(part), ranges(len(part), generator)
        is_left, place = torch.randint(2, (n,), generator=generator), torch.zeros(n, 4, 2)
        for i, p in enumerate(part):
            x, y = RELATIONS[p["relation"] or ("right of", "left of")[is_left[i]]]
            at = torch.tensor(LAYOUTS[len(p["objects"])])
            at = at.flip(1) if y else at                                        # a column
            place[i, :len(at)] = at.flip(0) if x + y > 0 else at
        colour = torch.randint(len(known), (n, 4), generator=generator)
        centre, radius, angle = size / 4 * place + between(-.015, .015, 4, 2) * size, between(.165, .175, 4) * size, between(-.05, .05, 4)
        hue = between(-.03, .03, 4, 3)
        image = (-.75 + between(-.05, .05)).view(n, 1, 1, 1).repeat(1, 3, size, size)       # one dark ground: every tone needs codes of its own
        for k in range(4):                                                      # the k-th object of the images that have one
            rows = [i for i, p in enumerate(part) if len(p["objects"]) > k]
            said = [part[i]["objects"][k] for i in rows]
            shape = torch.tensor([SHAPES.index(s) for _, s in said], dtype=torch.long)
            chosen = torch.tensor([known.index(c) if c else int(colour[i, k]) for i, (c, _) in zip(rows, said)], dtype=torch.long)
            image[rows] = paint(image[rows], shape, palette[chosen] + hue[rows, k], centre[rows, k], radius[rows, k], angle[rows, k])
        images[start:start + n] = to_uint8(image)
    return images


def scene_contents(images, captions):
    """Those images whose captions say every colour, and what is on them -> images (n, ...), (n, 24) float, 1 where a class of shapes_names is."""
    objects = [parse_caption(caption)["objects"] for caption in captions]
    told = [i for i, known in enumerate(objects) if all(colour for colour, _ in known)]
    contents, names = torch.zeros(len(told), len(COLOURS) * len(SHAPES)), shapes_names()
    for row, i in enumerate(told):
        contents[row, [names.index(f"{colour} {shape}") for colour, shape in objects[i]]] = 1
    return images[told], contents


def read_captions(path):
    """A text file with one caption per line -> list of str, without empty lines. ValueError: no such file, not UTF-8, no captions."""
    if not Path(path).is_file():
        raise ValueError(f"--captions {path}: no such file; it should hold one caption per line")
    try:
        captions = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        line = Path(path).read_bytes()[:error.start].count(b"\n") + 1
        raise ValueError(f"--captions {path} is not UTF-8: line {line} has the byte {error.object[error.start]:#04x}") from None
    if not captions:
        raise ValueError(f"--captions {path} has no captions; it should hold one per line")
    return captions


# ------------------------------------------------------------------------------------------------ images: files
def read_image(path, size=None):
    """Any image file -> (3, H, W) uint8, EXIF turns applied; with a size, its centre square of size x size pixels. ValueError if it is none."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                                      # 16-bit grey: PIL would clip it to white
                image = Image.fromarray((np.asarray(image, dtype=np.int64) >> 8).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
    except Exception as error:                                                  # a damaged file can make a decoder raise anything
        raise ValueError(f"{path} cannot be read as an image ({str(error) or type(error).__name__})") from error
    if size:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


def image_files(data):
    """Paths of all images below a folder, however deep. ValueError when there are none."""
    files = sorted(path for path in Path(data).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"--data {data}: no images there (looked for {', '.join(sorted(SUFFIXES))})")
    return files


def folder_classes(data):
    """DIR/<class name>/*: the user's own images. -> names (sorted), for each of them the files (sorted). ValueError where there are none."""
    if not Path(data).is_dir():
        raise ValueError(f"--data {data} is not a folder; it should hold one subfolder of images for each class")
    names = sorted(p.name for p in Path(data).iterdir() if p.is_dir() and not p.name.startswith("."))
    files = [sorted(f for f in (Path(data) / name).iterdir() if f.suffix.lower() in SUFFIXES) for name in names]
    if not names:
        raise ValueError(f"--data {data} has no subfolders; it should hold one subfolder of images for each class")
    empty = [name for name, found in zip(names, files) if not found]
    if empty:
        raise ValueError(f"--data {data}: no images in class folder {empty[0]!r} (looked for {', '.join(sorted(SUFFIXES))})")
    return names, files


def folder(data, size=32):
    """The images of `folder_classes`. -> images (N, 3, size, size) uint8, labels (N,) long, names."""
    names, files = folder_classes(data)
    images = torch.stack([read_image(f, size) for found in files for f in found])
    labels = torch.tensor([label for label, found in enumerate(files) for _ in found])
    return images, labels, names


def split_seed(cfg, split):
    return 10 * cfg.prepare_seed + ("train", "phi", "judge", "test").index(split)


def world_captions(cfg, split):
    """The captions of scenes, without the images. -> list of str"""
    return scene_captions(480 if cfg.smoke else 2400 if split == "test" else 12_000, split_seed(cfg, split))


def world_names(cfg):
    """The names of the world's classes; of scenes, two captions of each kind."""
    if cfg.dataset == "scenes":
        return world_captions(cfg, "test")[:12]
    return shapes_names() if cfg.dataset == "shapes" else folder_classes(cfg.data)[0]


def world(cfg, split):
    """Real images of the world. split "train" | "phi" | "judge" | "test" -> images (N, 3, 32, 32) uint8, labels (N,), names.

    shapes, scenes: each split is drawn afresh. folder: "test" is every tenth image, the others share the rest.
    scenes: captions, a list of N str, in place of labels.
    """
    if cfg.dataset == "shapes":
        names = shapes_names()
        labels = torch.arange(480 if cfg.smoke else 2400 if split == "test" else 12_000) % len(names)
        return shapes(labels, split_seed(cfg, split), cfg.anywhere), labels, names
    if cfg.dataset == "scenes":
        captions = world_captions(cfg, split)
        return scenes(captions, split_seed(cfg, split)), captions, world_names(cfg)
    images, labels, names = folder(cfg.data)
    is_test = torch.arange(len(images)) % 10 == 9
    chosen = is_test if split == "test" else ~is_test
    return images[chosen], labels[chosen], names


def to_float(images):
    """uint8 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """Float in [-1, 1] -> uint8, values outside are clipped."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)         # + 128 and cut off: the official MaskGIT's rounding


# ------------------------------------------------------------------------------------------------ VQGAN (Esser et al. 2021)
# The network of taming-transformers, with its key names, so that the official f16-1024 checkpoint loads strictly.
# The small worlds train the same class with fewer channels. Facts: levels go from fine (0) to coarse.
def norm(channels, groups):
    return nn.GroupNorm(groups, channels, eps=1e-6)                             # eps is not torch's default


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1, self.conv1 = norm(c_in, groups), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = norm(c_out, groups), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all places of the map, residual."""
    def __init__(self, c, groups):
        super().__init__()
        self.norm, self.q, self.k, self.v, self.proj_out = norm(c, groups), *(nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        B, C, H, W = x.shape
        y = self.norm(x)
        q, k, v = (f(y).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))         # (B, HW, C)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, C, H, W)       # scale C^-0.5
        return x + self.proj_out(y)


class Resample(nn.Module):
    """Encoder: half the size. Decoder: twice the size."""
    def __init__(self, c, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(c, c, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x):
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))                                # one zero at right and bottom only


def level(c_in, c_out, blocks, attention, groups):
    """One resolution: residual blocks, each followed by attention where asked."""
    stage = nn.Module()
    stage.block = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks))
    stage.attn = nn.ModuleList(AttnBlock(c_out, groups) for _ in range(blocks if attention else 0))
    return stage


def run_level(stage, x):
    for i, block in enumerate(stage.block):
        x = block(x)
        if len(stage.attn):
            x = stage.attn[i](x)
    return x


def middle(c, groups):
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = ResBlock(c, c, groups), AttnBlock(c, groups), ResBlock(c, c, groups)
    return mid


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> (B, z_channels, H / f, W / f), f = 2^(levels - 1)."""
    def __init__(self, ch, ch_mult, blocks, attn_levels, z_channels, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip([ch] + widths, widths)):
            stage = level(c_in, c_out, blocks, i in attn_levels, groups)
            if i < len(widths) - 1:
                stage.downsample = Resample(c_out, up=False)
            self.down.append(stage)
        self.mid = middle(widths[-1], groups)
        self.norm_out, self.conv_out = norm(widths[-1], groups), nn.Conv2d(widths[-1], z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for i, stage in enumerate(self.down):
            x = run_level(stage, x)
            if i < len(self.down) - 1:
                x = stage.downsample(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, P, P) -> image (B, 3, f P, f P). One residual block a level more than the encoder; up.0 is the finest level."""
    def __init__(self, ch, ch_mult, blocks, attn_levels, z_channels, groups):
        super().__init__()
        widths = [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = middle(widths[-1], groups)
        self.up = nn.ModuleList()
        for i, (c_in, c_out) in enumerate(zip(widths[1:] + widths[-1:], widths)):
            stage = level(c_in, c_out, blocks + 1, i in attn_levels, groups)
            if i > 0:
                stage.upsample = Resample(c_out, up=True)
            self.up.append(stage)
        self.norm_out, self.conv_out = norm(widths[0], groups), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for i, stage in reversed(list(enumerate(self.up))):
            x = run_level(stage, x)
            if i > 0:
                x = stage.upsample(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(nn.Module):
    """Images <-> tokens. The defaults are the small worlds' tokenizer: 32 x 32 pixels, f = 4, 64 tokens.

    K codes of width d; ch, ch_mult: channels per level; blocks: residual blocks per encoder level; attn_levels: levels with attention;
    groups of the group norms (32 in the official network; as many groups as channels would erase brightness in a small one)
    .E (K, d) the codebook   .L tokens per image
    """
    def __init__(self, K=128, d=8, ch=16, ch_mult=(1, 2, 2), blocks=1, attn_levels=(), z_channels=32, groups=4, image_size=32):
        super().__init__()
        self.encoder = Encoder(ch, ch_mult, blocks, attn_levels, z_channels, groups)
        self.decoder = Decoder(ch, ch_mult, blocks, attn_levels, z_channels, groups)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(K, d)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z_channels, d, 1), nn.Conv2d(d, z_channels, 1)
        self.K, self.L, self.image_size = K, (image_size // 2 ** (len(ch_mult) - 1)) ** 2, image_size
        nn.init.normal_(self.quantize.embedding.weight, std=d ** -0.5)          # rows of length about 1

    @property
    def E(self):
        return self.quantize.embedding.weight

    def embed(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, L, d) before quantisation."""
        return self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2)

    def nearest(self, e):
        """(B, L, d) -> z (B, L): the code with the smallest squared distance."""
        e = e.float()
        E = self.E.float()
        return (e.pow(2).sum(-1, keepdim=True) - 2 * e @ E.T + E.pow(2).sum(-1)).argmin(-1)

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> z (B, L) long, raster order."""
        return self.nearest(self.embed(images))

    def decode(self, e, c=None):
        """Code embeddings (B, L, d) -> images (B, 3, H, W), about [-1, 1], not clamped. The condition c is TA-TiTok's; no use here."""
        B, L, d = e.shape
        P = math.isqrt(L)
        return self.decoder(self.post_quant_conv(e.transpose(1, 2).reshape(B, d, P, P)))


def load_vqgan(src, image_size=256):
    """The official VQGAN, frozen: taming's f16-1024, `pretrained_maskgit/VQGAN/last.ckpt` of llvictorll/Maskgit-pytorch on the hub.

    src          path or state dict; every size is read off its tensors; keys under "loss." (the training's networks) are left out
    image_size   pixels per side, which no tensor tells; it fixes .L
    ValueError in one line when the file cannot be read or a key or shape is not the VQGAN's
    """
    name, groups = source_name(src, "the VQGAN"), 32
    state = read_weights(src, "the VQGAN")
    ch = shape_of(state, "encoder.conv_in.weight", 4, name)[0]
    first = shape_of(state, "encoder.down.0.block.0.conv1.weight", 4, name)[0]
    widths = [first] + [shape_of(state, f"encoder.down.{i}.block.0.conv1.weight", 4, name)[0]
                        for i in range(1, count(state, "encoder.down.{}.block.0.conv1.weight"))]
    if ch == 0 or any(w == 0 or w % ch or w % groups for w in [ch] + widths):
        raise ValueError(f"{name} does not fit: widths {widths} should be multiples of the first one, {ch}, and of {groups} (group norms)")
    K, d = shape_of(state, "quantize.embedding.weight", 2, name)
    with torch.device("meta"):                                                  # no memory and no random numbers before the file fits
        model = VQGAN(K, d, ch, [w // ch for w in widths], blocks=count(state, "encoder.down.0.block.{}.conv1.weight"),
                      attn_levels=[i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.q.weight" in state],
                      z_channels=shape_of(state, "encoder.conv_out.weight", 4, name)[0], groups=groups, image_size=image_size)
    return load_strictly(model, state, name, ignore_prefix=("loss.",)).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ TA-TiTok (Kim et al. 2025)
# The tokenizer of MaskGen, with its official key names: two vision transformers, and L tokens that have no place in the image.
# The decoder also reads the text. Facts: TA-TiTok's images are in [0, 1]; that ends inside encode and decode.
class ViTBlock(nn.Module):
    """Transformer block with the norm before each half."""
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2, self.mlp = nn.LayerNorm(width), nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


def positions(n, width):
    return nn.Parameter(torch.randn(n, width) * width ** -0.5)


class ViT(nn.Module):
    """What encoder and decoder share. The sequence: a class token, the patches of the image, L tokens, and what else there is."""
    def __init__(self, patches, L, width, depth, head_width):
        super().__init__()
        self.class_embedding, self.positional_embedding = positions(1, width), positions(1 + patches, width)
        self.latent_token_positional_embedding = positions(L, width)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ViTBlock(width, width // head_width) for _ in range(depth))

    def forward(self, patches, tokens, *others):
        """patches (B, N, width), tokens (B, L, width), others (B, n, width) -> patches and tokens after the last norm."""
        (B, N, _), L = patches.shape, tokens.shape[1]
        x = torch.cat([self.class_embedding.expand(B, 1, -1), patches], 1) + self.positional_embedding
        x = self.ln_pre(torch.cat([x, tokens + self.latent_token_positional_embedding, *others], 1))    # (B, 1 + N + L + n, width)
        for block in self.transformer:
            x = block(x)
        x = self.ln_post(x)
        return x[:, 1:1 + N], x[:, 1 + N:1 + N + L]


class TATiTok(nn.Module):
    """Images <-> L tokens, with the interface of VQGAN; decode reads a text as well. The defaults are the sizes of bl128.

    K codes of width d; width, depth: of encoder and decoder; patch: pixels per side; text: rows and width of the text states;
    head_width: of the attention; l2norm: encoder outputs and codes are compared at length 1, and .E has rows of length 1
    .E (K, d) what decode expects   .L tokens per image
    """
    def __init__(self, K=8192, d=64, L=128, width=(768, 1024), depth=(12, 24), patch=16, text=(77, 768), image_size=256, head_width=64,
                 l2norm=False):
        super().__init__()
        self.K, self.L, self.image_size, self.side, self.l2norm = K, L, image_size, image_size // patch, l2norm
        self.latent_tokens = positions(L, width[0])
        self.encoder, self.decoder = encoder, decoder = [ViT(self.side ** 2, L, w, n, head_width) for w, n in zip(width, depth)]
        encoder.patch_embed, encoder.conv_out = nn.Conv2d(3, width[0], patch, stride=patch), nn.Conv2d(width[0], d, 1)
        decoder.mask_token, decoder.decoder_embed = nn.Parameter(torch.randn(1, 1, width[1]) * width[1] ** -0.5), nn.Linear(d, width[1])
        decoder.text_guidance_positional_embedding = positions(text[0], width[1])
        decoder.text_guidance_proj = nn.Linear(text[1], width[1])
        decoder.ffn, decoder.conv_out = nn.Sequential(nn.Conv2d(width[1], 3 * patch ** 2, 1)), nn.Conv2d(3, 3, 3, padding=1)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(K, d)
        nn.init.normal_(self.quantize.embedding.weight, std=d ** -0.5)

    @property
    def E(self):
        E = self.quantize.embedding.weight
        return F.normalize(E, dim=-1) if self.l2norm else E

    def embed(self, images):
        """(B, 3, H, W) in [-1, 1] -> (B, L, d) before quantisation. ValueError for another size than image_size."""
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"this TA-TiTok is for images of {self.image_size} x {self.image_size} pixels, got {tuple(images.shape[2:])}")
        patches = self.encoder.patch_embed((images + 1) / 2).flatten(2).transpose(1, 2)
        tokens = self.encoder(patches, self.latent_tokens.expand(len(images), -1, -1))[1]     # (B, L, width)
        return self.encoder.conv_out(tokens.transpose(1, 2)[:, :, None]).flatten(2).transpose(1, 2)

    nearest = VQGAN.nearest                                                     # where all codes have length 1, that of e does not matter

    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> z (B, L) long. The order is learned, not a place in the image."""
        return self.nearest(self.embed(images))

    def decode(self, e, c):
        """Code embeddings (B, L, d), rows of .E, and text states -> images (B, 3, H, W), about [-1, 1], not clamped.

        c   (B, >= 77, 768), whose last 77 rows are CLIP's states after all blocks and the final norm; rows before are not used
        ValueError when e or c has another shape
        """
        T, width = len(self.decoder.text_guidance_positional_embedding), self.decoder.text_guidance_proj.in_features
        if e.shape[1] != self.L or c is None or c.ndim != 3 or c.shape[::2] != (len(e), width) or c.shape[1] < T:
            raise ValueError(f"this TA-TiTok decodes {self.L} tokens with a text of {T} rows or more, of width {width}, got tokens of shape "
                             f"{tuple(e.shape)} and {'no text' if c is None else f'a text of shape {tuple(c.shape)}'}")
        decoder, side = self.decoder, self.side
        text = decoder.text_guidance_proj(c[:, -T:]) + decoder.text_guidance_positional_embedding
        x = decoder(decoder.mask_token.expand(len(e), side ** 2, -1), decoder.decoder_embed(e), text)[0]
        x = decoder.ffn(x.transpose(1, 2).unflatten(2, (side, side))).unflatten(1, (-1, 3))   # (B, pixels of a patch, 3, side, side)
        x = F.pixel_shuffle(x.transpose(1, 2).flatten(1, 2), self.image_size // side)         # torch wants the colour first
        return 2 * decoder.conv_out(x) - 1


def load_tatitok(src, image_size=256, head_width=64, l2norm=False):
    """The official TA-TiTok with vector quantisation, frozen: bl128, turkeyju/tokenizer_tatitok_bl128_vq on the hub.

    src          path or state dict; every size is read off its tensors, except those two that no tensor tells:
    head_width   of the attention; 64 in all released networks
    l2norm       see TATiTok; in none of them
    ValueError in one line when the file cannot be read, does not fit or is for another image_size
    """
    name = source_name(src, "TA-TiTok")
    state = read_weights(src, "TA-TiTok")
    (K, d), (L, _) = shape_of(state, "quantize.embedding.weight", 2, name), shape_of(state, "latent_tokens", 2, name)
    patches, patch = shape_of(state, "encoder.positional_embedding", 2, name)[0] - 1, shape_of(state, "encoder.patch_embed.weight", 4, name)[2]
    width = [shape_of(state, f"{part}.class_embedding", 2, name)[1] for part in ("encoder", "decoder")]
    if patches * patch ** 2 != image_size ** 2:
        raise ValueError(f"{name} is for images of {patches} patches of {patch} x {patch} pixels, not of {image_size} x {image_size} pixels")
    if any(w == 0 or w % head_width for w in width):
        raise ValueError(f"{name} does not fit: widths {width} should be multiples of {head_width}, the width of a head")
    with torch.device("meta"):                                                  # no memory and no random numbers before the file fits
        model = TATiTok(K, d, L, width, [count(state, part + ".transformer.{}.ln_1.weight") for part in ("encoder", "decoder")], patch,
                        (shape_of(state, "decoder.text_guidance_positional_embedding", 2, name)[0],
                         shape_of(state, "decoder.text_guidance_proj.weight", 2, name)[1]), image_size, head_width, l2norm)
    return load_strictly(model, state, name).requires_grad_(False)


# ------------------------------------------------------------------------------------------------ files of pretrained weights
def read_weights(src, what):
    """Pretrained weights -> state dict: key -> tensor (CPU). The one reader of foreign files here; nothing in a file is ever run.

    src     path of a .safetensors or torch file; or a dict, e.g. of a file already read. The state dict is the dict itself or its entry
            "state_dict" (Lightning) or "model_state_dict" (MaskGIT)
    what    for the messages: "the VQGAN"
    ValueError in one line: no such file, cut short, no state dict in it, values that are not finite
    """
    name = source_name(src, what)
    found = src if isinstance(src, dict) else read_file(src)
    for key in ("state_dict", "model_state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
            break
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name} has no state dict: {'it is empty' if found == {} else f'it is of type {type(found).__name__}'}")
    for key, value in found.items():
        if not isinstance(key, str) or not torch.is_tensor(value):
            raise ValueError(f"{name} has no state dict: there is {key!r}, of type {type(value).__name__}, where only tensors should be")
        if not torch.isfinite(value).all():
            raise ValueError(f"{name} is damaged: {key} has values that are not finite")
    return dict(found)


def read_file(path):
    """What a .safetensors or torch file holds. Other objects than tensors and containers come back as an Inert of their name."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}{' is a folder, not a file of weights' if path.is_dir() else ': no such file'}")
    is_zip = zipfile.is_zipfile(path)                                           # the format of torch.save since 1.6
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)    # mapped: optimizer states are never read
        except pickle.UnpicklingError:                                          # a training checkpoint with objects of its own, as Lightning's?
            if not is_zip:
                raise
            return torch.load(path, map_location="cpu", weights_only=False, mmap=True, pickle_module=TensorsOnly)
    except OSError as error:
        reason = error
    except Exception as error:                                                  # a damaged file can make an unpickler raise anything
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"
        with open(path, "rb") as file:
            begin = file.read(2)
        if not begin:
            reason = "it is empty"
        elif not is_zip and path.suffix != ".safetensors":
            reason = ("it is cut short (a download that stopped?)" if begin == b"PK" else
                      "it is no torch file, or one from before torch 1.6 that holds more than tensors")
    raise ValueError(f"{path} cannot be read as weights: {reason}")


class Inert:
    """Stands for whatever a file names that is neither tensor nor container. It is made, called and filled as the real one would be."""
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
    """For torch.load, in place of the module pickle: it knows tensors and OrderedDict. Any other global becomes a kind of Inert, so that
    nothing of the file is called: as safe as weights_only=True, which refuses such files as a whole."""
    class Unpickler(pickle._Unpickler):                                         # the one in C takes all memory where a damaged file says so
        def find_class(self, module, name):
            if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
                return getattr(torch._utils, name)
            return Table if (module, name) == ("collections", "OrderedDict") else type(f"{module}.{name}", (Inert,), {})


def source_name(src, what):
    """How messages call a source of weights."""
    return f"{what} ({'a state dict' if isinstance(src, dict) else src})"


def shape_of(state, key, dims, name):
    """Shape of an entry from which a size is read, of so many dimensions. ValueError when the state dict is of another network."""
    if key not in state:
        raise ValueError(f"{name} does not fit: key {key} is missing, and the first of its {len(state)} keys is {next(iter(state))}")
    if state[key].ndim != dims:
        raise ValueError(f"{name} does not fit: {key} has shape {tuple(state[key].shape)}, expected {dims} dimensions")
    return state[key].shape


def count(state, key):
    """How many of key.format(0), key.format(1), ... there are, up to the first that is missing."""
    n = 0
    while key.format(n) in state:
        n += 1
    return n


def load_strictly(model, state, name, ignore_prefix=()):
    """Fill a model from a state dict that has exactly its keys and shapes -> the model, in eval mode. (BatchNorm's counters may be absent.)

    model           may be on the meta device: it is given memory once everything fits
    ignore_prefix   keys of the state dict that begin so are left out
    name            for the ValueError, which tells the first fault and how many there are
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if not key.startswith(tuple(ignore_prefix))}
    state = {key: torch.tensor(0) for key in own if key.endswith("num_batches_tracked")} | state     # of no use in eval mode
    faults = [f"key {key} is missing" for key in own if key not in state] + [f"key {key} is unknown" for key in state if key not in own]
    faults += [f"{key} has shape {tuple(state[key].shape)} instead of {tuple(value.shape)}" for key, value in own.items()
               if key in state and state[key].shape != value.shape]
    if faults:
        raise ValueError(f"{name} does not fit: {faults[0]}" + (f" (the first of {len(faults)} faults)" if faults[1:] else ""))
    if any(p.is_meta for p in model.parameters()):
        model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model.eval()
