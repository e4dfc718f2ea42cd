"""evaluate.py - scores and tables (Sec. 4): FID, Inception Score, precision and recall, the exact
scorer of scenes, GenEval's rules.

    images (N, 3, H, W) uint8 -- extract, e.g. Inception -->  features (N, D), logits (N, C)
    features of generated images --+-- statistics --> mu, sigma --> frechet_distance
    reference (folder or .npz) ----+-- precision_recall (distances between single features)
    logits of generated images ------- inception_score

    python evaluate.py                                 the small worlds: the table of the newest run
    python evaluate.py --reference VIRTUAL_imagenet256_labeled.npz --inception-path legacy
                                                       imagenet: FID and the others, 50,000 images
    python evaluate.py --reference FILE --folder DIR   the same scores of a folder of images
    python evaluate.py --geneval --prompts FILE        laion: the images of GenEval; with
                                                       --detections FILE, their scores

Every metric is computed in float64 and follows one official implementation, named in its docstring;
tests/golden holds their numbers. A distance is called FID only where the features are Inception's.

    N images   D feature width   C classes   k neighbours   mu (D,), sigma (D, D): of features
"""
import hashlib
import itertools
import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image
from tqdm import tqdm

import fpd
from models import INCEPTION, WEIGHTS, find_inception, load_inception
from sample import (Parser, batches, check_seed, check_writable, decode, digest, generate,
                    load_models, model_arguments, run_command, sheet, shown, tell_cut, tokens,
                    write_json, write_whole)
from tokenizer import (COLOURS, RELATIONS, SHAPES, TAGS, image_files, paint, parse_caption,
                       read_image, to_float, world, world_names)

# How many rounds of Eq. 3's operator the row "fixed point" has behind it
ROUNDS = 8


# ---------------------------------------------------------------- tables as text
# How keys are called at the head of a column, where not by themselves
HEADS = dict(fd="FD", fid="FID", inception_score="IS", inception_score_std="+-", precision="prec.",
             accuracy="acc.", ms_per_image="ms/image")
# Columns of words, which begin on the left
WORDS = ("model", "method", "table", "row")


def cell(value):
    """None, a number or a word -> text; numbers that are not whole with two digits."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def text_table(rows, *keys):
    """Rows, a list of dicts -> text: a line of heads, then the rows.

    keys    the columns; those that no row has are left out
    """
    keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
    lines = [[HEADS.get(key, key) for key in keys]]
    for row in rows:
        lines.append([cell(row.get(key)) for key in keys])
    for column, key in enumerate(keys):
        width = max(len(line[column]) for line in lines)
        for line in lines:
            text = line[column]
            line[column] = text.ljust(width) if key in WORDS else text.rjust(width)
    return "\n".join("  ".join(line).rstrip() for line in lines)


# ---------------------------------------------------------------- the scores
def to_matrix(x, name, rows):
    """A numpy array or a tensor of any device -> (N, D) float64 array.

    ValueError unless N >= rows and all values are finite
    """
    if torch.is_tensor(x):
        x = x.detach().cpu().double()
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2 or len(x) < rows:
        raise ValueError(f"{name} should be a matrix of at least {rows} rows, one for each image, "
                         f"got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} have values that are not finite")
    return x


def statistics(features):
    """Features (N, D) -> mu (D,), sigma (D, D) float64: mean and unbiased covariance.

    N < D is legal, but biases the FID upwards.
    """
    features = to_matrix(features, "features", rows=2)
    # float64 before the mean, too: a float32 sum over 50,000 rows loses digits that the difference
    # of two means needs
    sigma = np.cov(features, rowvar=False).reshape(features.shape[1], -1)
    return features.mean(0), sigma


def check_statistics(mu, sigma, name):
    """-> mu (D,), sigma (D, D) float64. ValueError where they cannot be a mean and a covariance."""
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{name}: a mean (D,) and a covariance (D, D) belong together, got shapes "
                         f"{mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: the mean or the covariance has values that are not finite")
    # what is called wrong is far beyond the rounding of float32
    if np.abs(sigma - sigma.T).max() > 1e-3 * np.abs(sigma).max():
        raise ValueError(f"{name}: the covariance is not symmetric, so it is none")
    eigenvalues = scipy.linalg.eigvalsh(sigma)
    if eigenvalues[0] < -1e-3 * np.abs(eigenvalues).max():
        raise ValueError(f"{name}: the covariance has negative eigenvalues, down to "
                         f"{eigenvalues[0]:.3g}, so it is none")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2): the FID, when the features are
    Inception's (Heusel et al. 2017).

    mu (D,), sigma (D, D), symmetric, singular or not
    returns a float, 0 for equal statistics up to rounding (so maybe -1e-14)
    """
    mu1, sigma1 = check_statistics(mu1, sigma1, "first statistics")
    mu2, sigma2 = check_statistics(mu2, sigma2, "second statistics")
    if mu1.shape != mu2.shape:
        raise ValueError(f"the two statistics come from different features: {len(mu1)} and "
                         f"{len(mu2)} wide")
    # With sigma1 = A A^T, sigma1 sigma2 and the symmetric A^T sigma2 A have the same eigenvalues
    # but for zeros, and the trace of the root is the sum of their roots. Any A does. This one is
    # Cholesky's with pivoting: it ends at the rank of sigma1 where the plain form would fail, and
    # the noise in the null space, whose root is large (1e-16 becomes 1e-8), never gets in.
    # sigma1[pivot][:, pivot] = lower lower^T; LAPACK counts from 1
    lower, pivot, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)
    A = np.zeros((len(mu1), rank))
    A[pivot - 1] = np.tril(lower)[:, :rank]
    roots = np.zeros(0)
    if rank:
        roots = np.sqrt(scipy.linalg.eigvalsh(A.T @ sigma2 @ A).clip(0))
    distance = np.sum((mu1 - mu2) ** 2)
    return float(distance + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def inception_score(logits, splits=10):
    """exp of the mean KL(p(class | image) || p(class)), per split, as torch-fidelity computes it
    (Salimans et al. 2016).

    logits (N, C), N >= splits; the official score takes Inception's with path="legacy"
    returns mean and (population) standard deviation over the splits
    """
    logits = to_matrix(logits, "logits", rows=splits)
    N = len(logits)
    # official; else a sorted list would give 10 narrow splits
    order = np.random.RandomState(2020).permutation(N)
    scores = []
    for i in range(splits):
        part = order[i * N // splits:(i + 1) * N // splits]
        rows = torch.from_numpy(logits[part])                                     # (n, C)
        log_p = rows.log_softmax(1)
        # (C,) log of the mean; finite where the mean underflows
        log_q = log_p.logsumexp(0) - np.log(len(rows))
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def distances(x, y):
    """Euclidean, x (n, D), y (m, D) float64 -> (n, m) float32.

    Computed in float64 and rounded at the end, as scikit-learn does for float32 features: a
    distance that occurs twice, as somebody's radius and again in the other set, then compares as
    equal rather than by its last bit.
    """
    squared = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None, :] - 2 * x @ y.T
    return squared.clamp_(min=0).sqrt_().float()


def radii(x, k, block):
    """Distance of every row of x (N, D) to its k-th neighbour among the other rows, (N,)."""
    found = []
    for start in tqdm(range(0, len(x), block), "radii", leave=False):
        d = distances(x[start:start + block], x)                                  # (block, N)
        # nobody is his own neighbour
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf
        found.append(d.kthvalue(k, dim=1).values)
    return torch.cat(found)


def precision_recall(real, fake, k=3, block=1000):
    """Share of fakes inside the manifold of real images, and of reals inside the fakes'
    (Kynkaanniemi et al. 2019, code of prdc).

    real (N, D), fake (M, D)   features, numpy or torch; a set's manifold is the union of balls that
                               reach to each point's k-th neighbour
    block     rows of the distance matrix at a time: memory is block x max(N, M), never N x M
    returns   precision, recall
    """
    real = torch.from_numpy(to_matrix(real, "real features", rows=k + 1))
    fake = torch.from_numpy(to_matrix(fake, "fake features", rows=k + 1))
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features differ in width: {real.shape[1]} and "
                         f"{fake.shape[1]}")
    real_radius, fake_radius = radii(real, k, block), radii(fake, k, block)
    fake_inside, real_inside = torch.zeros(len(fake), dtype=torch.bool), []
    for start in tqdm(range(0, len(real), block), "precision and recall", leave=False):
        d = distances(real[start:start + block], fake)                            # (block, M)
        # strictly inside: on the sphere is out
        fake_inside |= (d < real_radius[start:start + block, None]).any(0)
        real_inside.append((d < fake_radius).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def nearest(x, others, block=1000):
    """Distance of every row of x (N, D) to the nearest of others (M, D), (N,)."""
    x, others = torch.from_numpy(x).double(), torch.from_numpy(others).double()
    found = [distances(part, others).min(1).values for part in x.split(block)]
    return torch.cat(found)


def copied_share(fake, held_out, training):
    """Share of fakes that are suspiciously near to an image that was trained on.

    fake, held_out, training (., D)   features: of generated images, of real images that nothing was
                                      trained on, of those that were trained on
    Suspicious is a distance to the nearest training image that only one held-out image in twenty
    has. So images as new as the held-out ones give 0.05, copies 1. (After the authenticity of Alaa
    et al. 2022 and the C_T of Meehan et al. 2020, which also take held-out images as the measure.)
    """
    limit = nearest(held_out, training).quantile(0.05)
    return (nearest(fake, training) <= limit).double().mean().item()


# ---------------------------------------------------------------- features and references
def read_batch(files):
    """Image files -> (B, 3, H, W) uint8. ValueError when they differ in size."""
    images = [read_image(file) for file in files]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"the images from {files[0]} on differ in size")
    return torch.stack(images)


def in_batches(images, batch):
    """(N, 3, H, W) uint8, or a list of files -> batches (B, 3, H, W), with a bar."""
    # closed before an error is printed: on a line of its own
    with tqdm(range(0, len(images), batch), "features", leave=False) as bar:
        for start in bar:
            chunk = images[start:start + batch]
            yield read_batch(chunk) if isinstance(chunk, list) else chunk


def collect(images, extract, batch=50):
    """Run a feature network over many images. -> features (N, D), logits (N, C), float32 arrays.

    images    (N, 3, H, W) uint8; or a list of files, which are read batch by batch, or an iterator
              of such batches: 50,000 pictures need not fit in memory
    extract   images (B, 3, H, W) uint8 -> features (B, D), logits (B, C); e.g. an Inception
    """
    if isinstance(images, (list, torch.Tensor)):
        images = in_batches(images, batch)
    features, logits = [], []
    for chunk in images:
        chunk_features, chunk_logits = extract(chunk)
        features.append(chunk_features.detach().float().cpu())
        logits.append(chunk_logits.detach().float().cpu())
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def read_npz(path):
    """Those of mu, sigma and arr_0 that a .npz holds -> dict of arrays. ValueError"""
    if path.suffix != ".npz":
        missing = "" if path.exists() else ", and it does not exist"
        raise ValueError(f"reference {path} should be a folder of images or a .npz file{missing}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "arr_0") if key in file.files}
    except Exception as error:
        # zip, zlib, numpy: each has its own way to say "damaged"
        raise ValueError(f"reference {path} cannot be read as .npz ({type(error).__name__}: "
                         f"{error})") from error
    if "arr_0" not in arrays and not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"reference {path} should hold mu and sigma, or images as arr_0; of these "
                         f"it has {sorted(arrays)}")
    images = arrays.get("arr_0")
    if images is not None:
        fits = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] == 3
        if not fits or len(images) < 2:
            raise ValueError(f"reference {path}: arr_0 should be (N, H, W, 3) uint8, got "
                             f"{images.shape} {images.dtype}")
    return arrays


def reference(path, extract, batch=50):
    """What to compare with: a folder of images (also in subfolders), or a .npz with mu and sigma,
    or with ADM's arr_0 (N, H, W, 3) uint8.

    extract   as in `collect`; ready-made mu and sigma must come from the same network and path, see
              `mean_is_off`
    returns   mu (D,), sigma (D, D), features (N, D) float32 or None where there are no images.
              ADM's files have both kinds: then mu and sigma, which are of the whole training set,
              are kept and the images give the features alone
    """
    path = Path(path)
    if path.is_dir():
        files = image_files(path, "reference")
        if len(files) < 2:
            raise ValueError(f"reference {path}: {len(files)} image in this folder, at least 2 are "
                             "needed")
        features, _ = collect(files, extract, batch)
        return *statistics(features), features
    arrays, features = read_npz(path), None
    if "arr_0" in arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)
        features, _ = collect(images, extract, batch)
    if {"mu", "sigma"} <= arrays.keys():
        mu, sigma = check_statistics(arrays["mu"], arrays["sigma"], f"reference {path}")
        return mu, sigma, features
    return *statistics(features), features


def mean_is_off(mu, sigma, features):
    """Is the images' mean further from mu than chance explains? Then mu is of other features.

    features (N, D) of images that were drawn from what mu and sigma describe. By chance the square
    of the distance is about tr(sigma) / N, and twice that is rare where many features vary
    """
    distance = np.sum((features.astype(np.float64).mean(0) - mu) ** 2)
    return bool(distance > 2 * np.trace(sigma) / len(features))


# ---------------------------------------------------------------- scenes: an exact scorer
# Of SHAPES at radius 1 (tests measure them)
AREAS = torch.tensor([2.835, 2.822, 1.572, 2.258])
# More than scenes turn: decoded edges are less exact
TURNS = torch.linspace(-.2, .2, 5)


def find_regions(x, ground):
    """What differs from the ground on a picture x (3, H, W) in [-1, 1].

    returns   cover (n, H, W): the part of each pixel that each region fills;
              n dicts of its colour and box
    """
    palette = torch.tensor(list(COLOURS.values()))
    # touching objects are one region, and fit no shape
    regions, _ = scipy.ndimage.label((x - ground).abs().amax(0) > 0.35)
    covers, found = [], []
    for k, (rows, columns) in enumerate(scipy.ndimage.find_objects(regions), 1):
        inside = torch.from_numpy(regions == k)
        # half of the smallest object
        if inside.sum() < 16:
            continue
        names = torch.cdist(x[:, inside].T, palette).argmin(1)                    # (pixels,)
        index = int(names.mode().values)
        # this object's own: hues vary
        hue = x[:, inside][:, names == index].median(1).values[:, None, None]     # (3, 1, 1)
        cover = 1 - (x - hue).norm(dim=0) / (ground - hue).norm()                 # (H, W)
        near = torch.from_numpy(scipy.ndimage.binary_dilation(regions == k))
        covers.append(cover.clamp(0, 1) * near)
        box = (columns.start, rows.start, columns.stop - 1, rows.stop - 1)
        found.append(dict(shape=None, colour=list(COLOURS)[index], box=box))
    return covers, found


def scene_objects(image):
    """What is on a picture of the scenes world, read off its pixels. (3, H, W) uint8 -> list of
    dict, the clearest object first.

    shape, colour   names of SHAPES and COLOURS
    box             left, top, right, bottom pixel
    fit             0 to 1, how well it covers the shape's drawing of equal centre and area; below
                    0.7 nothing is an object
    """
    x = to_float(image)
    border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    ground = border.median(1).values[:, None, None]                               # (3, 1, 1)
    covers, found = find_regions(x, ground)
    if not found:
        return []
    cover, n, m = torch.stack(covers), len(found), len(SHAPES) * len(TURNS)       # (n, H, W)
    area, axis = cover.sum((1, 2)), torch.arange(x.shape[1]) + 0.5
    centre_x = (cover * axis).sum((1, 2)) / area
    centre_y = (cover * axis[:, None]).sum((1, 2)) / area
    centre = torch.stack([centre_x, centre_y], 1)                                 # (n, 2)
    # every shape in every turn, of each region's centre and area
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(TURNS))               # (m,)
    radius = (area[:, None] / AREAS[shape]).sqrt()                                # (n, m)
    canvas = torch.zeros(n * m, 1, *x.shape[1:])
    drawn = paint(canvas, shape.repeat(n), torch.ones(n * m, 1), centre.repeat_interleave(m, 0),
                  radius.flatten(), TURNS.repeat(n * len(SHAPES)))
    drawn = drawn.view(n, m, *x.shape[1:])                                        # (n, m, H, W)
    both = torch.minimum(drawn, cover[:, None]).sum((2, 3))
    fits = both / torch.maximum(drawn, cover[:, None]).sum((2, 3))                # (n, m)
    for thing, fit, best in zip(found, *fits.max(1)):
        thing["shape"], thing["fit"] = SHAPES[shape[best]], float(fit)
    clear = [thing for thing in found if thing["fit"] >= 0.7]
    return sorted(clear, key=lambda thing: -thing["fit"])


def scene_correct(image, caption):
    """Does a picture (3, H, W) uint8 show what its caption says?

    By GenEval's rules: of what is counted there must be just so many; else more things may be
    there, and the place is that of the clearest ones (`relative_position`).
    """
    wanted, objects = parse_caption(caption), scene_objects(image)
    groups = []
    for colour, shape in wanted["objects"]:
        groups.append([thing for thing in objects
                       if thing["shape"] == shape and colour in (None, thing["colour"])])
    if wanted["tag"] == "counting":
        return len(groups[0]) == len(groups)
    if not all(groups):
        return False
    if wanted["relation"] is None:
        return True
    first, second = groups[0][0], groups[1][0]
    return wanted["relation"] in relative_position(first["box"], second["box"])


def tag_shares(results):
    """Pairs (tag, correct?) -> {tag: share that is correct, "overall": mean of these shares}.

    Tags that do not occur are left out.
    """
    shares = {}
    for tag in TAGS:
        group = [correct for other, correct in results if other == tag]
        if group:
            shares[tag] = sum(group) / len(group)
    return shares | dict(overall=sum(shares.values()) / len(shares))


def scene_scores(images, captions):
    """Share of the pictures (N, 3, H, W) uint8 that show what their captions say -> dict as of
    `tag_shares`."""
    return tag_shares([(parse_caption(caption)["tag"], scene_correct(image, caption))
                       for image, caption in zip(images, captions, strict=True)])


# ---------------------------------------------------------------- reports on disk
# What a protocol says that is no setting: where only these differ, the report keeps its file
NO_SETTINGS = ("run", "student_steps", "warning")


def settings_of(protocol):
    """A protocol without NO_SETTINGS, as JSON would give it back."""
    kept = {key: value for key, value in protocol.items() if key not in NO_SETTINGS}
    return json.loads(json.dumps(kept))


def find_report(folder, stem, protocol, made=None):
    """Which file a report goes to, so that none of other settings is lost: <stem>.json, or
    <stem>-2.json, ... where that is another one.

    made      [(model, steps), ...]: the rows to come. A report that has more is another one, too.
              None: its rows are kept by the caller
    returns   the name without suffix, the rows that are there (an empty list: none)
    """
    for i in itertools.count(1):
        name = stem if i == 1 else f"{stem}-{i}"
        path = Path(folder) / f"{name}.json"
        if not path.exists():
            rows = []
            break
        try:
            content = json.loads(path.read_text())
            rows = content["rows"]
            is_same = settings_of(content["protocol"]) == settings_of(protocol)
            names = [(row["model"], row["steps"]) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError, OSError):
            # not a report of ours
            continue
        if is_same and (made is None or set(names) <= set(made)):
            break
    if i > 1:
        print(f"{Path(folder) / stem}.json has other settings and stays; this report: {name}.json")
    return name, rows


def write_report(folder, protocol, rows, table, pictures, captions, name="report"):
    """<name>.json and, where there are pictures (rows of a `sheet`), <name>.png in the folder.

    Prints the table, a function of the content. -> the content
    """
    content = dict(protocol=protocol, rows=rows)
    write_json(Path(folder) / f"{name}.json", content)
    if pictures:
        write_whole(Path(folder) / f"{name}.png", sheet(pictures, captions).save)
    print(table(content))
    return content


def headline(row):
    """A row's first number, for the title of its pictures; "" where it has none."""
    if "overall" in row:
        return f"{100 * row['overall']:.0f} %"
    return f"FD {row['fd']:.1f}" if "fd" in row else ""


# ---------------------------------------------------------------- the table of a small world
def spread(images, labels):
    """How much the images of one class differ, read off the pixels of the shapes world. -> dict of
    four standard deviations.

    images (N, 3, H, W) uint8, labels (N,)
    The ground is the median colour of the border; the object is what differs from it by more than
    45 of 255 in some channel. Measured: "ground" (grey level / 255), "size" (root of the object's
    area, pixels), "x" and "y" (its centre, pixels): the standard deviation within each class,
    averaged over the classes.
    """
    x = images.float()
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)
    ground = border.median(2).values                                              # (N, 3)
    difference = (x - ground[:, :, None, None]).abs().amax(1)
    is_object = (difference > 45).float()                                         # (N, H, W)
    area, axis = is_object.sum((1, 2)).clamp(min=1), torch.arange(x.shape[-1]) + 0.5
    centre_x = (is_object * axis).sum((1, 2)) / area
    centre_y = (is_object * axis[:, None]).sum((1, 2)) / area
    values = torch.stack([ground.mean(1) / 255, area.sqrt(), centre_x, centre_y], 1)    # (N, 4)
    within = torch.stack([values[labels == label].std(0) for label in labels.unique()])
    return dict(zip(("ground", "size", "x", "y"), within.mean(0).tolist()))


@torch.no_grad()
def judged(judge, images):
    """The judge's features and logits of (N, 3, H, W) uint8 images, as `collect` does."""
    device = judge.head.weight.device
    return collect(images, lambda chunk: judge(to_float(chunk).to(device)), batch=200)


@torch.no_grad()
def round_trip(run, images, batch=60):
    """Images (N, 3, H, W) uint8 -> the same as the tokenizer draws them, and as drafts are."""
    drawn = []
    for part in images.split(batch):
        z = run.tokenizer.encode(to_float(part).to(run.tokenizer.E.device))
        drawn.append(decode(run.tokenizer, z, None))
    return torch.cat(drawn)


def judge_metrics(run, images, labels, n):
    """How images are scored in a world of classes -> function (images (N, 3, H, W) uint8, labels
    (N,)) -> a row's numbers.

    images, labels   the real ones to compare with; n: as many for precision and recall
    Fewer than 4 real images have no precision and recall, fewer than 10 images no inception score.
    Of a folder's images also "copies", see `copied_share`: drafts are compared with held-out and
    training images as the tokenizer draws them, for a draft has been through it, too.
    """
    real_features, _ = judged(run.judge, images)
    real_statistics = statistics(real_features)
    if run.cfg.dataset == "folder":
        training, _ = judged(run.judge, round_trip(run, world(run.cfg, "train")[0]))
        held_out, _ = judged(run.judge, round_trip(run, images))
    # whose pixels `spread` can read
    has_spread = run.cfg.dataset == "shapes"
    if has_spread:
        real_spread = spread(images, labels)

    def metrics(fake, label):
        features, logits = judged(run.judge, fake)
        row = dict(fd=frechet_distance(*real_statistics, *statistics(features)))
        if len(fake) >= 10:
            row["inception_score"], _ = inception_score(logits)
        if min(len(images), n, len(fake)) >= 4:
            row["precision"], row["recall"] = precision_recall(real_features[:n], features)
        row["accuracy"] = float((logits.argmax(1) == label.numpy()).mean())
        if run.cfg.dataset == "folder":
            row["copies"] = copied_share(features, held_out, training)
        if has_spread:
            spreads = {key: x / real_spread[key] for key, x in spread(fake, label).items()}
            row |= dict(spread=sum(spreads.values()) / len(spreads), spreads=spreads)
        return row
    return metrics


def score_real(run, real, n):
    """The row "real": what a perfect model would score, from n of the real images or half of them.

    They are compared with the others, never with themselves.
    returns   the row's numbers, how many images were compared with how many others
    """
    images, told = real
    if run.text:
        return scene_scores(images[:n], told[:n]), min(n, len(images)), 0
    m = min(n, len(images) // 2)
    others = len(images) - m
    if m < 2:
        return {}, m, others
    metrics = judge_metrics(run, images[:others], told[:others], n)
    return metrics(images[others:], told[others:]), m, others


def scorer(run, real, n):
    """What is asked of a small world's models, and how their answers are scored.

    run, real   see `report`
    returns     labels (n,) or n captions, in the shares of the real images; the condition c
                (n, ...) of either; function (images (n, 3, H, W), the first) -> numbers
    """
    images, told = real
    places = [i % len(told) for i in range(n)]
    if run.text:
        asked = [told[i] for i in places]
        return asked, run.text.encode(asked), scene_scores
    asked = told[places]
    return asked, asked, judge_metrics(run, images, told, n)


def score(run, model, steps, asked, c, metrics):
    """The numbers of one model's images, seed 0. steps = 0: the student's single pass.

    asked, c, metrics   as of `scorer`
    """
    images = generate(model, run.tokenizer, c, run.cfg, steps, seed=0, progress="score")
    return metrics(images, asked)


def draw(run, name, model, steps, c, seed):
    """A row's images -> z (n, L), images (n, 3, H, W) uint8, milliseconds per image."""
    # a warm-up, not timed
    generate(model, run.tokenizer, c[:min(60, len(c) // 4)], run.cfg, steps, seed)
    drawn = list(batches(model, run.tokenizer, c, run.cfg, steps, seed,
                         progress=f"{name} {steps or 1}"))
    z, images, seconds = zip(*drawn)
    return torch.cat(z), torch.cat(images), 1000 * sum(seconds) / len(c)


@torch.no_grad()
def draw_fixed_point(run, z, c, seed, batch=60):
    """What the paper's objective promises with this teacher and these settings: Eq. 3's fixed
    point, from samples z (n, L) of the teacher. -> images (n, 3, H, W) uint8"""
    device = run.tokenizer.E.device
    images = []
    with tqdm(range(0, len(z), batch), "fixed point", leave=False) as bar:
        for start in bar:
            part = c[start:start + batch].to(device)
            # one for each image, and others than z was sampled with
            generators = fpd.generators(seed, len(z) + start, len(part), device)
            end = fpd.fixed_point(run.teacher, z[start:start + batch], part, run.cfg, generators,
                                  ROUNDS)
            images.append(decode(run.tokenizer, end, part))
    return torch.cat(images)


def first_of_each(images, labels, wanted):
    """The first image of each wanted class -> (len(wanted), 3, H, W); white where there is none."""
    found = []
    for label in wanted:
        places = (labels == label).nonzero()
        blank = torch.full_like(images[0], 255)
        found.append(images[places[0, 0]] if len(places) else blank)
    return torch.stack(found)


def small_protocol(run, real, n, seed):
    """What the numbers of a small world's report depend on."""
    cfg = run.cfg
    fixed_point = (f"{ROUNDS} rounds of Eq. 3 from the teacher's samples of most steps: r from "
                   f"{cfg.remask[0]} to {cfg.remask[1]}, guidance {cfg.teacher_cfg}")
    protocol = dict(dataset=cfg.dataset, images=n, seed=seed, student_steps=run.step,
                    labels="in the shares of the real images", guidance=cfg.guidance,
                    confidence_noise=cfg.confidence_noise, init_mask=cfg.init_mask,
                    temperature=cfg.temperature, fixed_point=fixed_point)
    if run.text:
        protocol["scorer"] = "exact, from the pixels (evaluate.scene_objects)"
    else:
        protocol["reference"] = f"{len(real[0])} real images not trained on"
        protocol["features"] = "the judge's (not the FID Inception's), 96 wide"
    if cfg.dataset == "shapes":
        protocol["spread"] = ("standard deviation within a class of ground, size, x, y, relative "
                              "to real images")
    if cfg.dataset == "folder":
        protocol["copies"] = ("share nearer to a training image than 95 % of the real images not "
                              "trained on are: new images have 0.05, see evaluate.copied_share")
    protocol["device"] = str(run.tokenizer.E.device)
    protocol["versions"] = dict(torch=torch.__version__, numpy=np.__version__)
    return protocol


def what_is_not_scored(run, real, real_row, m, others):
    """In words: what there are too few real images for, and how large the bias is. "" if nothing.

    real_row, m, others   as of `score_real`
    """
    if run.text:
        return ""
    images, labels = real
    notes = []
    missing = [name for label, name in enumerate(run.names) if not (labels == label).any()]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if missing[5:] else "")
        notes.append(f"no real images, so no scores, of {len(missing)} classes: {some}")
    if len(images) < 4:
        notes.append(f"no precision and recall: {len(images)} real images")
    if not real_row:
        notes.append(f"no row 'real': {len(images)} real images are too few to split")
    elif others < 960:
        notes.append(f"few real images raise every FD: even that of {m} real ones against the "
                     f"{others} others is {real_row['fd']:.2f}")
    return "; ".join(notes)


def report(run, real, folder, n=960, seed=0, steps=(16, 8, 4, 2, 1), stem="report"):
    """The paper's Table 2 in miniature, or Table 1's with captions: the teacher in 16 ... 1 steps,
    the fixed point of Eq. 3 (see `draw_fixed_point`) and the student in one step.

    run       namespace of cfg, names, tokenizer, teacher, student, judge, text, step (load_run)
    real      images (N, 3, H, W) uint8, labels (N,) or captions (list of N str): real ones that
              nothing was trained on, every stretch of which has a like mixture of classes
    n, seed   images per row, classes or kinds of captions in the shares of the real ones; their
              seed
    folder, stem   where the report goes, see `find_report`
    returns   the content of report.json; prints the table, writes report.json and report.png
    """
    images, told = real
    asked, c, metrics = scorer(run, real, n)
    real_row, m, others = score_real(run, real, n)
    protocol = small_protocol(run, real, n, seed)
    warning = what_is_not_scored(run, real, real_row, m, others)
    if warning:
        protocol["warning"] = warning
    made = [("real", None), ("round trip", None), ("fixed point", None), ("student", 1)]
    made += [("teacher", T) for T in steps]
    name, _ = find_report(folder, stem, protocol, made)
    rows, pictures, (examples, captions) = [], [], shown(run)

    def add(model, step_count, numbers, drawn, what, ms=None):
        rows.append(dict(model=model, steps=step_count, **numbers, ms_per_image=ms))
        title = f"{model} {step_count or ''}  {headline(numbers)}"
        if run.text:
            pictures.append((title, drawn[:len(captions)]))
        else:
            pictures.append((title, first_of_each(drawn, what, examples)))

    add("real", None, real_row, images, told)
    # what the tokenizer alone costs
    decoded = round_trip(run, images[:n])
    add("round trip", None, metrics(decoded, told[:n]), decoded, told[:n])
    for T in sorted(set(steps), reverse=True):
        z, drawn, ms = draw(run, "teacher", run.teacher, T, c, seed)
        add("teacher", T, metrics(drawn, asked), drawn, asked, ms)
        if T == max(steps):
            drawn_fixed = draw_fixed_point(run, z, c, seed)
    if steps:
        add("fixed point", None, metrics(drawn_fixed, asked), drawn_fixed, asked)
    _, drawn, ms = draw(run, "student", run.student, 0, c, seed)
    add("student", 1, metrics(drawn, asked), drawn, asked, ms)
    return write_report(folder, protocol, rows, table, pictures, captions, name)


def table(content):
    """report.json's content -> text."""
    protocol = content["protocol"]
    if "scorer" in protocol:
        what = "share of images that show what the caption says"
        keys = (*TAGS, "overall")
    else:
        what = f"FD in features of the judge, reference {protocol['reference']}"
        keys = ("fd", "inception_score", "precision", "recall", "accuracy", "spread", "copies")
    lines = [f"{protocol['dataset']}: {protocol['images']} images a row, seed {protocol['seed']}, "
             f"{what}"]
    if "warning" in protocol:
        lines.append(protocol["warning"])
    lines.append(text_table(content["rows"], "model", "steps", *keys, "ms_per_image"))
    return "\n".join(lines)


# ---------------------------------------------------------------- the table of the ablations
def means(scores):
    """Scores of several seeds, list of dict -> dict of the means of their numbers, over the seeds
    that have them."""
    found = {}
    for key in scores[0]:
        values = [score[key] for score in scores if isinstance(score.get(key), float)]
        if values:
            found[key] = sum(values) / len(values)
    return found


def ablation_table(content):
    """report.json's content, as of train.ablate -> text. scores: of each seed, as of `score`"""
    protocol, rows = content["protocol"], []
    if "overall" in content["rows"][0]["scores"][0]:
        first, others = "overall", TAGS
    else:
        first, others = "fd", ("recall", "accuracy", "precision")
    for row in content["rows"]:
        values = [score[first] for score in row["scores"]]
        mean = means(row["scores"])
        text = f"{mean[first]:.2f}"
        if len(values) > 1:
            text += f" ({min(values):.2f} to {max(values):.2f})"
        rows.append(row | mean | {first: text})
    smoke = ", smoke: nothing was learnt" if protocol["smoke"] else ""
    head = (f"{protocol['dataset']}{smoke}: {protocol['images']} images a row, seed 0; mean "
            f"(smallest to largest) of {protocol['seeds']} students, {protocol['base']['steps']} "
            "steps each, SDTT fewer; teacher_passes: of its network, for each image of a batch; "
            "paper: its GenEval score, overall")
    columns = text_table(rows, "table", "row", first, *others, "seconds_per_step",
                         "teacher_passes", "paper")
    return f"{head}\n{columns}"


# ---------------------------------------------------------------- the table of ImageNet (Table 2)
def scores(features, logits, target):
    """Features (N, 2048), logits (N, 1008) of the Inception and a `reference` -> the numbers of a
    row; no precision without real images.

    "fd" is what every report of ours has; it may be called "fid", too, since the features are the
    Inception's.
    """
    mu, sigma, real = target
    fd = frechet_distance(mu, sigma, *statistics(features))
    score, deviation = inception_score(logits)
    row = dict(fd=fd, fid=fd, inception_score=score, inception_score_std=deviation)
    if real is not None:
        row["precision"], row["recall"] = precision_recall(real, features, k=3)
    return row


def official_protocol(args, run, device, path, sha):
    """What the numbers of an official report depend on, and a list of warnings.

    path, sha   of the Inception's weights; the others as of `official_report`
    """
    protocol = dict(images=args.images, seed=args.seed, inception_path=args.inception_path,
                    features=f"FID Inception, 2048 wide, {path.name} (sha256 {sha}...)",
                    inception_score="10 splits", precision_recall="k = 3", device=str(device),
                    versions=dict(torch=torch.__version__, numpy=np.__version__))
    warnings = []
    if args.images < 2048:
        warnings.append(f"{args.images} images are fewer than the 2048 features: the FID is biased "
                        "upwards, and comparable with nothing")
    if sha != INCEPTION[-12:-4]:
        warnings.append(f"the Inception's weights are not the published ones ({INCEPTION})")
    if args.folder:
        return protocol | dict(folder=str(Path(args.folder).absolute())), warnings
    cfg, n_classes = run.cfg, len(run.names)
    labels = "balanced" if args.images % n_classes == 0 else f"the {n_classes} classes in turn"
    protocol |= dict(dataset=cfg.dataset, run=run.path and str(run.path), student=args.student,
                     student_steps=run.step, tokenizer=digest(run.tokenizer), labels=labels,
                     guidance=cfg.guidance, temperature=1.0, confidence_noise=cfg.confidence_noise,
                     init_mask=cfg.init_mask, student_temperature=cfg.temperature)
    if cfg.smoke:
        warnings.append("a smoke run: the weights are random")
    return protocol, warnings


def check_target(args, target, protocol, warnings):
    """A `reference` that cannot be used ends here, not after hours; what it is goes into the
    protocol, what is odd about it into the warnings."""
    mu, sigma, features = target
    if len(mu) != 2048 or (features is not None and len(features) < 4):
        raise ValueError(f"reference {args.reference} should have a mean of 2048 values and at "
                         "least 4 images, if any")
    count = "mu and sigma only: no precision, no recall"
    if features is not None:
        count = f"{len(features)} images"
        if len(features) < 2048:
            warnings.append(f"the reference has {len(features)} images, fewer than the 2048 "
                            "features")
        if mean_is_off(*target):
            warnings.append(f"mu and sigma of {args.reference} do not fit its own images: they "
                            f"were not made with --inception-path {args.inception_path}")
    protocol["reference"] = f"{Path(args.reference).absolute()} ({count})"
    if warnings:
        protocol["warning"] = "; ".join(warnings)
        print(f"warning: {protocol['warning']}")


def folder_files(args):
    """Those files of --folder that are scored: as many as --images says, from all over it."""
    files = image_files(args.folder, "--folder")
    if len(files) < args.images:
        raise ValueError(f"--folder {args.folder} has {len(files)} images, fewer than the "
                         f"{args.images} asked for with --images")
    # not the first, which may be of a few classes
    return [files[i * len(files) // args.images] for i in range(args.images)]


def models_of(run, steps):
    """The rows of a table -> [(name, network, its steps; 0: the student's single pass), ...]"""
    rows = [("teacher", run.teacher, T) for T in steps]
    if run.student is not None:
        rows.append(("student", run.student, 0))
    return rows


def official_report(args, run, folder, stem, device):
    """FID, IS, precision and recall with the FID Inception, of a run, of public networks or of a
    folder of images.

    args           of the command line: reference, images, seed, steps, batch, weights,
                   inception_path, folder
    run            as of sample.load_models; None for args.folder
    folder, stem   where the report goes, see `find_report`
    returns        the content of report.json; prints the table
    """
    files = folder_files(args) if args.folder else None
    path = find_inception(args.weights or WEIGHTS)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    protocol, warnings = official_protocol(args, run, device, path, sha)
    extract = partial(load_inception(path).to(device), path=args.inception_path)
    target = reference(args.reference, extract, args.batch)
    check_target(args, target, protocol, warnings)
    name, rows = find_report(folder, stem, protocol)
    if args.folder:
        features, logits = collect(files, extract, args.batch)
        row = dict(model="folder", steps=None, **scores(features, logits, target))
        return write_report(folder, protocol, [row], official_table, [], [], name)
    rows = keep_rows(rows, run)
    for model, network, steps in models_of(run, args.steps):
        if (model, steps or 1) in [(row["model"], row["steps"]) for row in rows]:
            print(f"{model} {steps or 1}: kept, of {Path(folder) / name}.json")
            continue
        rows.append(row_of_model(args, run, model, network, steps, extract, target))
        # the teacher from most steps to fewest, then the student
        rows.sort(key=lambda row: (row["model"] == "student", -row["steps"]))
        # each when it is done: it took hours
        write_json(Path(folder) / f"{name}.json", dict(protocol=protocol, rows=rows))
    c, captions = shown(run)
    pictures = []
    for row in rows:
        network, steps = run.teacher, row["steps"]
        if row["model"] == "student":
            network, steps = run.student, 0
        if network is not None:
            images = generate(network, run.tokenizer, c, run.cfg, steps, args.seed)
            pictures.append((f"{row['model']} {row['steps']}  FID {row['fid']:.1f}", images))
    return write_report(folder, protocol, rows, official_table, pictures, captions, name)


def keep_rows(rows, run):
    """Those rows of an earlier report that other weights of teacher or student have not outdated.

    Of a network that is not loaded this time they are kept, too
    """
    weights = {}
    for model, network in (("teacher", run.teacher), ("student", run.student)):
        if network is not None:
            weights[model] = digest(network)
    return [row for row in rows if row["weights"] == weights.get(row["model"], row["weights"])]


def row_of_model(args, run, model, network, steps, extract, target):
    """A row of the table: images go straight into features. steps = 0: the student's pass."""
    # every class equally often
    labels, spent = torch.arange(args.images) % len(run.names), []
    generate(network, run.tokenizer, labels[:8], run.cfg, steps, args.seed)       # a warm-up

    def images():
        for _, part, seconds in batches(network, run.tokenizer, labels, run.cfg, steps, args.seed,
                                        args.batch, f"{model} {steps or 1}"):
            spent.append(seconds)
            yield part
    features, logits = collect(images(), extract)
    row = dict(model=model, steps=steps or 1, **scores(features, logits, target))
    return row | dict(ms_per_image=1000 * sum(spent) / args.images, batch=args.batch,
                      weights=digest(network))


def official_table(content):
    """report.json's content -> text: the protocol, then the columns of Table 2."""
    lines = [f"{key}: {value}" for key, value in content["protocol"].items()]
    lines.append(text_table(content["rows"], "model", "steps", "fid", "inception_score",
                            "inception_score_std", "precision", "recall", "ms_per_image"))
    return "\n".join(lines)


# ---------------------------------------------------------------- GenEval (Table 1)
# Ghosh et al. 2023: 553 captions, each with the objects, counts, colours and places that its images
# must show, and the rules of the official scorer. Its detector, Mask2Former Swin-S with CLIP
# ViT-L/14 for the colours, is not here: the user's own plugs in as a file (`read_detections`).
OBJECT_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black",
                 "white")
# Number of the prompt, number of the image
SAMPLE = re.compile(r"(?:^|/)(\d+)/samples/(\d+)\.png$")


def read_jsonl(path, what, fits):
    """A file of JSON objects, one a line, each of which `fits` -> list of dicts.

    ValueError names the line that is not `what`
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    text = Path(path).read_text(encoding="utf-8", errors="backslashreplace")
    objects = []
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        try:
            objects.append(json.loads(line))
            good = fits(objects[-1])
        except KeyError as error:
            raise ValueError(f"{path}, line {number} has no {error}") from error
        except (ValueError, TypeError, AttributeError):
            # not JSON, or a value of another type than expected
            good = False
        if not good:
            raise ValueError(f"{path}, line {number} is not {what}: {line[:100]!r}")
    return objects


def fits_prompt(prompt):
    """Is this what `read_prompts` describes? KeyError, TypeError, ...: no"""
    include, exclude = prompt["include"], prompt.get("exclude", [])
    if prompt["tag"] not in TAGS or not isinstance(prompt["prompt"], str) or not include:
        return False
    for clause in include + exclude:
        if not isinstance(clause["class"], str) or clause["count"] < 1:
            return False
    for i, clause in enumerate(include):
        if clause.get("color", "red") not in OBJECT_COLORS:
            return False
        if "position" in clause:
            relation, target = clause["position"]
            if relation not in RELATIONS or not 0 <= target < i:
                return False
    return True


def read_prompts(path):
    """evaluation_metadata.jsonl of https://github.com/djghosh13/geneval, or a file like it -> list
    of dicts.

    {"tag", "prompt": caption, "include": [{"class", "count"}, ...],
                               "exclude": [{"class", "count"}, ...]}
    An image must meet every clause of include, which may have a "color" and a "position" [relation,
    index of an earlier clause], and none of exclude, which may be absent.
    """
    return read_jsonl(path, "a prompt of GenEval", fits_prompt)


def fits_detection(found):
    """Is this one of the detections that `read_detections` describes? KeyError, ...: no"""
    x0, y0, x1, y1 = found["box"]
    return (isinstance(found["class"], str) and np.isfinite(found["box"]).all()
            and x0 <= x1 and y0 <= y1 and 0 <= found["confidence"] <= 1
            and found.get("color") in (None, *OBJECT_COLORS))


def read_detections(path):
    """One line for each image, also where nothing was seen (an empty list) -> list of dicts.

    {"image": "00000/samples/0000.png",
     "detections": [{"class": "dog", "box": [x0, y0, x1, y1], "confidence": 0.9, "color": "red"},
                    ...]}
    image        its path, of which the last three parts count
    class        as the prompts spell it: COCO's names, but "computer mouse", "computer keyboard",
                 "tv remote"
    box          left, top, right, bottom in pixels, y downwards
    confidence   in [0, 1], all objects above 0.3
    color        one of OBJECT_COLORS; only needed where a prompt asks for one
    """
    def fits(line):
        return SAMPLE.search(line["image"]) and all(map(fits_detection, line["detections"]))
    return read_jsonl(path, "an image with its detections", fits)


def relative_position(a, b):
    """Where box a is, seen from box b -> those of RELATIONS that hold: none, one or two."""
    a = np.asarray(a, dtype=np.float64).reshape(2, 2)                             # (corner, axis)
    b = np.asarray(b, dtype=np.float64).reshape(2, 2)
    # of the centres
    offset = a.mean(0) - b.mean(0)
    sizes = a[1] - a[0] + b[1] - b[0]
    beyond = np.sign(offset) * (abs(offset) - 0.1 * sizes).clip(0)
    if (abs(beyond) < 1e-3).all():
        return []
    # norm of the whole offset: near boxes reach 0.5 nowhere
    dx, dy = beyond / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return [relation for relation, does in zip(RELATIONS, holds) if does]


def kept_objects(detections, tag):
    """Detections of an image -> {class: those that count, the most confident first}."""
    threshold = 0.9 if tag == "counting" else 0.3
    found = [d for d in detections if d["confidence"] > threshold]
    found.sort(key=lambda d: d["confidence"])
    kept = {}
    # of equal ones the later first, as official
    for d in found[::-1]:
        same = kept.setdefault(d["class"], [])
        if len(same) < 16:
            same.append(d)
    return kept


def clause_fault(clause, objects, groups, caption):
    """What is wrong with an image's objects for one clause of include -> its objects, None; or
    None, the official words for what is wrong.

    groups    the objects of the earlier clauses, None where one failed
    """
    name, count, color = clause["class"], clause["count"], clause.get("color")
    relation, target = clause.get("position", (None, None))
    # colour and place of the most confident ones alone
    found = objects.get(name, [])[:count]
    if len(found) < count:
        return None, f"expected {name}>={count}, found {len(found)}"
    if color:
        colors = [d.get("color") for d in found]
        if None in colors:
            raise ValueError(f"a {name} was detected without a color, but {caption!r} asks for one")
        if colors.count(color) < count:
            seen = ", ".join(f"{colors.count(c)} {c}" for c in OBJECT_COLORS if c in colors)
            return None, (f"expected {color} {name}>={count}, found {colors.count(color)} {color}; "
                          f"and {seen}")
    if relation:
        if groups[target] is None:
            return None, f"no target for {name} to be {relation}"
        # of every object to every target
        for d in found:
            for other in groups[target]:
                places = relative_position(d["box"], other["box"])
                if relation not in places:
                    return None, (f"expected {name} {relation} target, found "
                                  f"{' and '.join(places)} target")
    return found, None


def verdict(objects, prompt):
    """Do an image's objects, as of `kept_objects`, show what the prompt asks for?

    returns   bool, and the official words for what is wrong
    """
    reasons, groups = [], []
    for clause in prompt["include"]:
        found, fault = clause_fault(clause, objects, groups, prompt.get("prompt"))
        groups.append(found)
        if fault:
            reasons.append(fault)
    for clause in prompt.get("exclude", []):
        found = objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(found)}")
    return not reasons, "\n".join(reasons)


def known_classes(prompts):
    """The names of all objects that prompts ask for or exclude."""
    known = set()
    for prompt in prompts:
        for clause in prompt["include"] + prompt.get("exclude", []):
            known.add(clause["class"])
    return known


def geneval_scores(detections, prompts):
    """The official rules on two files, of `read_detections` and of `read_prompts`.

    returns   {tag: share of correct images, ..., "overall": mean of these shares,
               "images": how many, "prompts": how many}
    ValueError unless every prompt has the same number of images and every image one line: without
    the empty ones the score would rise. And for a class that no prompt has: it is misspelt, and its
    objects would count as missing
    """
    source, prompts = prompts, read_prompts(prompts)
    known = known_classes(prompts)
    # (prompt, number) -> correct?
    results = {}
    for line in read_detections(detections):
        index, number = (int(part) for part in SAMPLE.search(line["image"]).groups())
        if index >= len(prompts):
            raise ValueError(f"{detections}: {line['image']} has no prompt")
        if (index, number) in results:
            raise ValueError(f"{detections}: {line['image']} has a second line")
        for found in line["detections"]:
            if found["class"] not in known:
                raise ValueError(f"{detections}: {line['image']} has a {found['class']!r}, which "
                                 f"no prompt of {source} has: write classes as the prompts do, and "
                                 "leave others out")
        objects = kept_objects(line["detections"], prompts[index]["tag"])
        results[index, number], _ = verdict(objects, prompts[index])
    n = 1 + max(number for _, number in results)
    missing = []
    for i in range(len(prompts)):
        missing += [f"{i:05d}/samples/{j:04d}.png" for j in range(n) if (i, j) not in results]
    if missing:
        raise ValueError(f"{detections} has no line for {len(missing)} images, such as "
                         f"{missing[0]}; one without detections needs a line, too")
    shares = tag_shares([(prompts[index]["tag"], correct)
                         for (index, _), correct in results.items()])
    return shares | dict(images=len(results), prompts=len(prompts))


def geneval_table(scores, detector):
    """`geneval_scores` -> text. It names what made the detections: with any but the official
    detector they are not a model's GenEval."""
    return (f"GenEval rules, detections by {detector}: {scores['images']} images of "
            f"{scores['prompts']} prompts\n" + text_table([scores], *TAGS, "overall"))


def claim_folder(out, made_with):
    """Write down in the folder what its images are made with. ValueError where there are images of
    other settings, or nobody knows of which."""
    path = Path(out) / "made_with.json"
    if path.exists():
        try:
            had = json.loads(path.read_text())
            names = [key for key in had | made_with if had.get(key) != made_with.get(key)]
        except (ValueError, TypeError, AttributeError, OSError):
            raise ValueError(f"{path} cannot be read: choose another --out") from None
        if names:
            changes = ", ".join(f"{key} {had.get(key)}, not {made_with.get(key)}"
                                for key in names[:3])
            raise ValueError(f"{out} has images that were made with {changes}: choose another "
                             "--out, or remove them")
    elif any(Path(out).glob("*/samples/*.png")):
        raise ValueError(f"{out} has images, and no made_with.json that says of what model: choose "
                         "another --out, or remove them")
    Path(out).mkdir(parents=True, exist_ok=True)
    write_json(path, made_with)


def is_complete(path):
    """Is this the file of an image, and whole?"""
    try:
        read_image(path)
    except ValueError:
        return False
    return True


def geneval_images(prompts, source, out, made_with, make, n=4):
    """The images of every prompt (`read_prompts`), in the folders that GenEval's scorer reads.
    Those that are there are not made again.

    OUT/made_with.json          what they were made with: none of other settings gets in between
    OUT/00000/metadata.jsonl    the line of prompt 0
    OUT/00000/samples/0000.png ...   its n images
    source       the file that the prompts are from
    made_with    dict: the model, its settings and weights
    make         (caption, numbers of the images wanted, number of the prompt) -> (len(numbers), 3,
                 H, W) uint8. It should draw an image from the seed and these two numbers alone,
                 whichever others are wanted with it
    """
    folders = [Path(out) / f"{index:05d}" for index in range(len(prompts))]
    # all is in order before the first image, and before anything is written
    for folder, prompt in zip(folders, prompts):
        path = folder / "metadata.jsonl"
        if path.exists() and path.read_text() != json.dumps(prompt):
            raise ValueError(f"{path} has another prompt than {source}: {out} was made for another "
                             "file")
    claim_folder(out, made_with)
    for folder, prompt in zip(folders, prompts):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        text = json.dumps(prompt)
        write_whole(folder / "metadata.jsonl", lambda new: new.write_text(text))
    with tqdm(prompts, "images") as bar:
        for index, prompt in enumerate(bar):
            files = [folders[index] / "samples" / f"{i:04d}.png" for i in range(n)]
            wanted = [i for i in range(n) if not is_complete(files[i])]
            if not wanted:
                continue
            images = make(prompt["prompt"], wanted, index)
            assert images.shape[:2] == (len(wanted), 3), images.shape
            assert images.dtype == torch.uint8, images.dtype
            for i, image in zip(wanted, images):
                picture = Image.fromarray(image.permute(1, 2, 0).numpy())
                write_whole(files[i], picture.save)


def geneval(args, device):
    """--geneval: the images of all prompts, or with --detections their scores."""
    if args.detections:
        print(geneval_table(geneval_scores(args.detections, args.prompts), args.detector))
        return
    # now, not after the networks are loaded
    prompts = read_prompts(args.prompts)
    captions = [prompt["prompt"] for prompt in prompts]
    steps = args.steps[0] if args.steps else 0
    run = load_models(args, device, teacher=steps > 0)
    if run.text is None:
        raise ValueError("--geneval needs a run with captions")
    model = run.teacher if steps else run.student
    if model is None:
        raise ValueError("--dataset laion alone is the teacher: add --steps 16")
    if steps > model.L:
        raise ValueError(f"--steps should be between 1 and {model.L}, got {steps}")
    out = args.out or (run.path.parent if run.path else Path(".")) / "geneval"
    check_writable(out)
    if run.cfg.dataset == "scenes":
        # words that it does not know, before the first folder
        run.text.encode(captions)
    tell_cut(run.text, captions)
    cfg = run.cfg
    if steps:
        made_with = dict(model="teacher", steps=steps, guidance=cfg.guidance,
                         confidence_noise=cfg.confidence_noise)
    else:
        made_with = dict(model="student", steps=1, init_mask=cfg.init_mask,
                         temperature=cfg.temperature, trained_steps=run.step)
    made_with |= dict(seed=args.seed, weights=digest(model), tokenizer=digest(run.tokenizer),
                      text=digest(run.text))

    def make(caption, numbers, index):
        c = run.text.encode([caption] * len(numbers)).to(device)
        generators = []
        for i in numbers:
            generators += fpd.generators(args.seed, 1000 * index + i, 1, device)
        return decode(run.tokenizer, tokens(model, c, generators, cfg, steps), c)
    geneval_images(prompts, args.prompts, out, made_with, make)
    who = f"teacher, {steps} steps" if steps else "student, 1 step"
    print(f"{out}: 4 images of each prompt | {who} | seed {args.seed} | next: a detector's "
          "findings, then evaluate.py --geneval --prompts FILE --detections FILE")


# ---------------------------------------------------------------- the command
def parse():
    """The command line. ValueError for what cannot be, as far as it is known without the run."""
    parser = Parser(description="The table of a run: the teacher in 16 ... 1 steps, the student in "
                    "1. imagenet: FID against --reference.")
    parser.add_argument("--images", type=int, help="images per row; 960, with --reference 50000, "
                        "if not given")
    parser.add_argument("--seed", type=int, help="if not given, the run's own, for imagenet and "
                        "laion 0")
    parser.add_argument("--steps", type=int, nargs="*", help="rows of the teacher; 16 8 4 2 1, "
                        "with --reference 16 8 4 2, if not given")
    parser.add_argument("--batch", type=int, help="with --reference: images at a time, 50 if not "
                        "given")
    parser.add_argument("--reference", help="imagenet: a folder of images, or a .npz with mu and "
                        "sigma, or ADM's with images")
    parser.add_argument("--folder", help="with --reference: score the images of this folder in "
                        "place of a run")
    parser.add_argument("--inception-path", choices=["pytorch-fid", "legacy"],
                        default="pytorch-fid", help="how images are resized and scaled; ADM's "
                        "reference was made with legacy")
    parser.add_argument("--geneval", action="store_true", help="with --prompts: 4 images of each "
                        "prompt into --out, by the student, or by the teacher in --steps N; with "
                        "--detections as well: score them by GenEval's rules")
    parser.add_argument("--prompts", metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--out", metavar="DIR", help="where --geneval puts the images; RUN/geneval "
                        "if not given")
    parser.add_argument("--detections", metavar="FILE", help="what a detector saw on the images, "
                        "see `read_detections`")
    parser.add_argument("--detector", default="an unnamed detector", help="its name, for the table")
    model_arguments(parser)
    args = parser.parse_args()
    if args.seed is not None:
        check_seed(args.seed)
    needs = dict(prompts="geneval", out="geneval", detections="geneval", batch="reference")
    for name, other in needs.items():
        if getattr(args, name) is not None and not getattr(args, other):
            raise ValueError(f"--{name} goes with --{other}")
    if args.geneval:
        check_geneval(args)
    else:
        check_table(args)
    return args


def check_no_run(args, flag):
    """ValueError where something is said of a run, whose place `flag` takes."""
    for name in ("run", "student", "dataset", "init_mask", "steps", "seed"):
        if getattr(args, name) is not None:
            raise ValueError(f"{flag} takes the place of a run: leave --{name.replace('_', '-')} "
                             "away")


def check_geneval(args):
    """Can these arguments of --geneval be? Fills in what was not given."""
    if not args.prompts:
        raise ValueError("--geneval needs --prompts FILE: evaluation_metadata.jsonl of "
                         "https://github.com/djghosh13/geneval")
    if args.reference or args.folder:
        raise ValueError("--geneval and --reference or --folder exclude each other: GenEval looks "
                         "at its own prompts alone")
    if args.images is not None:
        raise ValueError("--images goes without --geneval, which draws 4 of each prompt")
    if args.detections:
        check_no_run(args, "--detections")
    if args.steps is not None and (len(args.steps) != 1 or args.steps[0] < 1):
        raise ValueError("--geneval draws with one model: the student, or the teacher in the one "
                         f"number of --steps, got {args.steps}")
    args.seed = args.seed or 0


def check_table(args):
    """Can these arguments of a table be? Fills in what was not given and no run knows."""
    if args.folder and not args.reference:
        raise ValueError("--folder needs --reference: what to compare the images with")
    if args.folder:
        check_no_run(args, "--folder")
    least = 10 if args.reference else 48
    if args.reference:
        args.images = 50_000 if args.images is None else args.images
        args.batch = 50 if args.batch is None else args.batch
        args.seed = args.seed or 0
        if args.batch < 1:
            raise ValueError(f"--batch should be at least 1, got {args.batch}")
    if args.images is not None and args.images < least:
        raise ValueError(f"--images should be at least {least}, got {args.images}")
    if args.steps is None:
        args.steps = [16, 8, 4, 2] if args.reference else [16, 8, 4, 2, 1]


def check_run(args, run):
    """Can this run have a table of this kind? ValueError says which it could have."""
    dataset = run.cfg.dataset
    if not (run.student or args.steps):
        raise ValueError("nothing to score: --dataset imagenet alone is the public teacher, and "
                         "--steps names none of its rows")
    if any(not 1 <= T <= run.tokenizer.L for T in args.steps):
        raise ValueError(f"--steps should be between 1 and {run.tokenizer.L}, got {args.steps}")
    if dataset == "laion":
        raise ValueError("laion has no reference to compare with: --geneval --prompts FILE makes "
                         "the images that GenEval scores")
    if dataset == "imagenet" and not args.reference:
        raise ValueError("imagenet needs --reference FILE: a folder of images, or a .npz with mu "
                         "and sigma, or ADM's with images")
    if dataset != "imagenet" and args.reference:
        raise ValueError(f"--reference is for imagenet; {run.path} is a run of {dataset} and has "
                         "its own judge")


def real_images(run):
    """The images of a small world that nothing was trained on, as `report` wants them.

    ValueError where a folder has other classes than the run was trained on
    """
    names = world_names(run.cfg)
    if not run.text and names != run.names:
        raise ValueError(f"{run.cfg.data} has other classes than when {run.path} was trained: "
                         f"{', '.join(sorted(set(names) ^ set(run.names))[:5])}")
    images, told, _ = world(run.cfg, "test")
    return images, told


def main():
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.geneval:
        geneval(args, device)
        return
    if args.folder:
        check_writable(".")
        official_report(args, None, ".", "report", device)
        return
    run = load_models(args, device, teacher=len(args.steps) > 0)
    check_run(args, run)
    folder, stem = Path("."), "report"
    if run.path:
        folder = run.path.parent
        if run.path.name != "checkpoint.pt":
            # a file that somebody was sent: others may lie beside it
            stem = f"{run.path.stem}-report"
    check_writable(folder)
    if args.reference:
        official_report(args, run, folder, stem, device)
        return
    # as train.py makes it, where nothing else is said
    n = args.images
    if n is None:
        n = 48 if run.cfg.smoke else 960
    seed = run.cfg.seed if args.seed is None else args.seed
    report(run, real_images(run), folder, n, seed, args.steps, stem)


if __name__ == "__main__":
    run_command(main)
