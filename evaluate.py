"""evaluate.py - scores and tables (Sec. 4): FID, Inception Score, precision and recall, the
rule-based scorer of scenes, GenEval's rules.

    images (N, 3, H, W) uint8 -- extract, e.g. Inception -->  features (N, D), logits (N, C)
    features of generated images --+-- statistics --> mu, sigma --> frechet_distance
    reference (folder or .npz) ----+-- precision_recall (distances between single features)
    logits of generated images ------- inception_score

FID, IS, precision, recall and GenEval's rules each follow one official implementation, with whose
numbers tests/golden compares them. Accuracy, spread, memorised share and the scorer of scenes are
our own. FID, IS, precision and recall are computed in float64. A distance is called FID only if the
features are Inception's.

    N images   D feature width   C classes   k neighbours   mu (D,), sigma (D, D): of features
"""
import argparse
import hashlib
import itertools
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image
from tqdm import tqdm

import fpd
from models import INCEPTION, WEIGHTS, load_inception
from sample import (PUBLIC, batches, chosen_networks, decode, draw_tokens, generate,
                    grid_conditions, image_grid, network_arguments, run_command)
from tokenizer import (COLOURS, RELATIONS, SHAPES, TAGS, fingerprint, image_files, paint,
                       parse_caption, read_image, to_float, world)

# Number of rounds of Eq. 3's operator for the row "fixed point".
ROUNDS = 8
# Rows of a distance matrix that are computed at a time, so that memory does not grow as N^2.
BLOCK = 1000
# Column headings that differ from the key.
HEADS = dict(fd="FD", fid="FID", inception_score="IS", inception_score_std="+-", precision="prec.",
             accuracy="acc.", ms_per_image="ms/image")


def text_table(rows, *keys):
    """Rows, a list of dicts -> text, a line per row and a column per key that some row has."""
    columns = []
    for key in keys:
        values = [row.get(key) for row in rows]
        if any(value is not None for value in values):
            cells = [HEADS.get(key, key)]
            cells += ["" if value is None else f"{value:.2f}" if isinstance(value, float)
                      else str(value) for value in values]
            # Words are aligned on the left, numbers on the right.
            align = str.ljust if key in ("model", "table", "row") else str.rjust
            columns.append([align(text, max(map(len, cells))) for text in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns))


# ---------------------------------------------------------------- the scores
def statistics(features):
    """Features (N, D) -> mu (D,), sigma (D, D) float64: mean and unbiased covariance."""
    # The sums are in float64: a float32 sum over 50,000 rows would lose digits that the difference
    # of two means needs.
    features = np.asarray(features, dtype=np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2): the FID, when the features are
    Inception's (Heusel et al. 2017). The covariances may be singular; rounding may give -1e-14."""
    # With sigma1 = A A^T, sigma1 sigma2 has the same eigenvalues as the symmetric A^T sigma2 A, and
    # the trace of its root is the sum of their roots.
    values, vectors = scipy.linalg.eigh(sigma1)
    A = vectors * np.sqrt(values.clip(0))
    values = scipy.linalg.eigvalsh(A.T @ sigma2 @ A)
    # If a sigma is singular, some eigenvalues are rounding errors, and their roots are not small:
    # the root of 1e-16 is 1e-8.
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0
    distance = np.sum((mu1 - mu2) ** 2)
    return float(distance + np.trace(sigma1) + np.trace(sigma2) - 2 * np.sqrt(values).sum())


def inception_score(logits, splits=10):
    """For each split, exp of the mean KL(p(class | image) || p(class)), as in torch-fidelity
    (Salimans et al. 2016).

    logits (N, C), N >= splits   for the official score, those of Inception with path="legacy"
    returns   mean and (population) standard deviation over the splits
    """
    logits = torch.as_tensor(logits).double()
    N, scores = len(logits), []
    # The official code shuffles in this way. In a sorted list, a split would have few classes.
    order = np.random.RandomState(2020).permutation(N)
    for i in range(splits):
        part = order[i * N // splits:(i + 1) * N // splits]
        log_p = logits[part].log_softmax(1)                                       # (n, C)
        # The log of the mean of p, (C,). In this form it is finite even if the mean underflows.
        log_q = log_p.logsumexp(0) - np.log(len(part))
        kl = (log_p.exp() * (log_p - log_q)).sum(1)
        scores.append(kl.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def pairwise_distances(x, y):
    """Euclidean distances of x (n, D) and y (m, D), float64 -> (n, m) float32.

    They are rounded to float32 at the end, as by scikit-learn for float32 features. A distance that
    is computed twice, as the radius of a ball and between the sets, is then the same number.
    """
    squared = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None, :] - 2 * x @ y.T
    return squared.clamp_(min=0).sqrt_().float()


def kth_distance(x, others, k):
    """Distance of every row of x (N, D) to its k-th nearest row of others (M, D), (N,)."""
    return torch.cat([pairwise_distances(part, others).kthvalue(k).values
                      for part in tqdm(x.split(BLOCK), "neighbours", leave=False)])


def precision_recall(real, fake, k=3):
    """Share of fakes inside the manifold of the real images, and share of real images inside that
    of the fakes (Kynkaanniemi et al. 2019, code of prdc).

    real (N, D), fake (M, D)   features. The manifold of a set is the union of balls around its
                               points, each of which reaches to the point's k-th neighbour.
    """
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    # A point is not its own neighbour: the nearest of the k + 1 rows is the row itself.
    real_radius, fake_radius = kth_distance(real, real, k + 1), kth_distance(fake, fake, k + 1)
    fake_inside, real_inside = torch.zeros(len(fake), dtype=torch.bool), []
    for part, radius in zip(real.split(BLOCK), real_radius.split(BLOCK)):
        d = pairwise_distances(part, fake)                                        # (BLOCK, M)
        # A point on the surface of a ball is outside.
        fake_inside |= (d < radius[:, None]).any(0)
        real_inside.append((d < fake_radius).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


def memorised_share(fake, held_out, training):
    """Share of fakes that are at least as near to a training image as the nearest 5 % of held-out
    images are. Held-out images give 0.05, copies 1. (After Alaa et al. 2022, Meehan et al. 2020.)

    fake, held_out, training (., D)   features of generated images, of real images that were not
                                      trained on, and of those that were
    """
    fake, held_out, training = (torch.as_tensor(x).double() for x in (fake, held_out, training))
    # If held-out images are equal to training images, the limit would be a rounding error.
    limit = kth_distance(held_out, training, 1).quantile(0.05).clamp(min=1e-4 * training.std())
    return (kth_distance(fake, training, 1) <= limit).double().mean().item()


def collect(images, extract):
    """Features (N, D) and logits (N, C), float32 arrays, of many images.

    images    any iterable of batches (B, 3, H, W) uint8, since 50,000 images need not fit in memory
    extract   a batch -> features (B, D), logits (B, C); e.g. an Inception
    """
    parts = [[x.float().cpu() for x in extract(part)] for part in images]
    features, logits = zip(*parts)
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def read_batches(files, batch):
    """Image files -> their images, in batches (B, 3, H, W) uint8."""
    for start in tqdm(range(0, len(files), batch), "features", leave=False):
        yield torch.stack([read_image(file) for file in files[start:start + batch]])


def reference(path, extract, batch):
    """The reference of the scores: a folder of images (also in subfolders), or a .npz with mu and
    sigma, or with images in arr_0 (N, H, W, 3) uint8, like those of ADM (Dhariwal and Nichol 2021).

    extract   as in `collect`. If the file has mu and sigma, they must have been computed with the
              same network and the same way of resizing.
    returns   mu (D,), sigma (D, D), features (N, D) float32, or None if there are no images. In
              ADM's files mu and sigma are those of the whole training set.
    """
    if Path(path).is_dir():
        features, _ = collect(read_batches(image_files(path), batch), extract)
        return *statistics(features), features
    arrays, features = np.load(path), None
    if "arr_0" in arrays:
        images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2)            # (N, 3, H, W)
        features, _ = collect(tqdm(images.split(batch), "features", leave=False), extract)
    if "mu" in arrays:
        return arrays["mu"], arrays["sigma"], features
    return *statistics(features), features


# ---------------------------------------------------------------- scenes: a rule-based scorer
# The areas of SHAPES at radius 1 (the tests measure them).
AREAS = torch.tensor([2.835, 2.822, 1.572, 2.258])
# The rotations that are tried, in radians. Objects of scenes are turned by at most 0.05, but the
# edges of decoded images are blurred.
TURNS = torch.linspace(-.2, .2, 5)


def background_of(x):
    """Images (..., 3, H, W) -> their background (..., 3, 1, 1), the median colour of the border."""
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)
    return border.median(-1).values[..., None, None]


def area_and_centre(cover):
    """How much of each pixel an object fills (n, H, W) -> area (n,), centre (n, 2) as x, y."""
    area, axis = cover.sum((1, 2)).clamp(min=1), torch.arange(cover.shape[-1]) + 0.5
    x = (cover * axis).sum((1, 2)) / area
    y = (cover * axis[:, None]).sum((1, 2)) / area
    return area, torch.stack([x, y], 1)


def scene_objects(image):
    """Find the objects in an image of the scenes world, by rules about its pixels. (3, H, W) uint8
    -> list of dict, the clearest object first.

    shape, colour   names of SHAPES and COLOURS
    box             left, top, right, bottom pixel
    fit             0.7 to 1, the overlap (intersection / union) of the object and its shape when
                    the shape is drawn with the same centre and area
    """
    x, palette = to_float(image), torch.tensor(list(COLOURS.values()))
    background = background_of(x)
    # Every shape is tried in every rotation.
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(TURNS))               # (m,)
    turn, m = TURNS.repeat(len(SHAPES)), len(shape)
    # Objects that touch are one region, which fits no shape.
    regions, _ = scipy.ndimage.label((x - background).abs().amax(0) > 0.35)
    found = []
    for k, (rows, columns) in enumerate(scipy.ndimage.find_objects(regions), 1):
        inside = torch.from_numpy(regions == k)                                   # (H, W)
        # The objects of scenes have about 44 pixels or more. Much smaller regions are noise.
        if inside.sum() < 16:
            continue
        names = torch.cdist(x[:, inside].T, palette).argmin(1)                    # (pixels,)
        name = int(names.mode().values)
        # The hue is that of this object, because hues vary from object to object.
        hue = x[:, inside][:, names == name].median(1).values[:, None, None]      # (3, 1, 1)
        cover = 1 - (x - hue).norm(dim=0) / (background - hue).norm()             # (H, W)
        cover = cover.clamp(0, 1) * torch.from_numpy(scipy.ndimage.binary_dilation(regions == k))
        area, centre = area_and_centre(cover[None])
        canvas, radius = torch.zeros(m, 1, *cover.shape), (area / AREAS[shape]).sqrt()
        drawn = paint(canvas, shape, torch.ones(m, 1), centre.expand(m, 2), radius, turn)[:, 0]
        both = torch.minimum(drawn, cover).sum((1, 2))                            # (m,)
        fit, best = (both / torch.maximum(drawn, cover).sum((1, 2))).max(0)
        if fit >= 0.7:
            found.append(dict(shape=SHAPES[shape[best]], colour=list(COLOURS)[name], fit=float(fit),
                              box=(columns.start, rows.start, columns.stop - 1, rows.stop - 1)))
    return sorted(found, key=lambda item: -item["fit"])


def scene_correct(image, caption):
    """Does an image (3, H, W) uint8 show what its caption says?

    The rules are GenEval's: the number of objects matters only if the caption counts them, and the
    position is that of the clearest objects (`relative_position`).
    """
    wanted, objects = parse_caption(caption), scene_objects(image)
    # For each object of the caption, the objects of the image that match it.
    groups = [[item for item in objects
               if item["shape"] == shape and colour in (None, item["colour"])]
              for colour, shape in wanted["objects"]]
    if wanted["tag"] == "counting":
        return len(groups[0]) == len(groups)
    if wanted["relation"] is None or not all(groups):
        return all(groups)
    return wanted["relation"] in relative_position(groups[0][0]["box"], groups[1][0]["box"])


def tag_shares(results):
    """Pairs (tag, is_correct) -> {tag: share that is correct, "overall": mean of these shares}."""
    groups = {tag: [] for tag in TAGS}
    for tag, correct in results:
        groups[tag].append(correct)
    shares = {tag: sum(group) / len(group) for tag, group in groups.items() if group}
    return shares | dict(overall=sum(shares.values()) / len(shares))


def scene_scores(images, captions):
    """The share of images (N, 3, H, W) uint8 that show their captions, like `tag_shares`."""
    return tag_shares([(parse_caption(caption)["tag"], scene_correct(image, caption))
                       for image, caption in zip(images, captions, strict=True)])


# ---------------------------------------------------------------- reports
def protocol_of(nets, **more):
    """What a score depends on, to be kept with it. nets: None for images of a folder. -> dict"""
    protocol = dict(dataset="folder", torch=torch.__version__, numpy=np.__version__) | more
    if nets is not None:
        keys = ("dataset", "smoke", "data", "sample_guidance", "confidence_noise", "init_mask",
                "temperature", "remask", "refine_guidance")
        protocol |= {key: getattr(nets.cfg, key, None) for key in keys}
        # The last two parts of the path stay the same when the folder of all runs is moved.
        protocol["run"] = nets.path and "/".join(nets.path.resolve().parts[-2:])
    return protocol


def write_report(folder, protocol, rows, table, pictures, captions):
    """Print the table, add a line to report.jsonl and, with pictures, draw report.png.

    The line contains the protocol. The lines of earlier evaluations stay, and are not read.
    table      dict(protocol=, rows=) -> text;   pictures   rows of an `image_grid`
    """
    content = dict(protocol=protocol, rows=rows)
    print(table(content))
    with open(Path(folder, "report.jsonl"), "a") as file:
        # The line break comes first, so that a line that was cut off does not spoil this one.
        file.write("\n" * (file.tell() > 0) + json.dumps(content))
    if pictures:
        image_grid(pictures, captions).save(Path(folder, "report.png"))


def table(content):
    """A line of report.jsonl -> text."""
    protocol, rows = content["protocol"], content["rows"]
    head = (f"{protocol['dataset']}: {protocol['images']} images a row, seed {protocol['seed']}, "
            f"{protocol['scores']}")
    columns = text_table(rows, "model", "steps", "fd", "fid", "inception_score",
                         "inception_score_std", "precision", "recall", "accuracy", "spread",
                         "memorised", *TAGS, "overall", "ms_per_image")
    return "\n".join(filter(None, [head, protocol["warning"], columns]))


def headline(row):
    """A row's first number, for the title of its images, or "" if it has none."""
    if "overall" in row:
        return f"{100 * row['overall']:.0f} %"
    return f"FD {row['fd']:.1f}" if "fd" in row else ""


# ---------------------------------------------------------------- the table of a small world
def spread(images, labels):
    """Within-class standard deviations of images of the shapes world, averaged over the classes:
    how much images of one class differ. images (N, 3, H, W) uint8, labels (N,) -> (4,)

    The four values are the background's grey level / 255, and the object's size (root of its area),
    x and y in pixels. The object is all pixels that differ from the background by more than 45 of
    255 in a channel.
    """
    x = images.float()
    background = background_of(x)                                                 # (N, 3, 1, 1)
    area, centre = area_and_centre(((x - background).abs().amax(1) > 45).float())
    ground = background.flatten(1).mean(1) / 255
    values = torch.stack([ground, area.sqrt(), *centre.T], 1)                     # (N, 4)
    return torch.stack([values[labels == label].std(0) for label in labels.unique()]).mean(0)


def judged(judge, images):
    """Features and logits of the evaluation classifier, as from `collect`, for (N, 3, H, W) uint8
    images."""
    device = next(judge.parameters()).device
    return collect(tqdm(images.split(200), "features", leave=False),
                   lambda part: judge(to_float(part).to(device)))


def reconstruct(nets, images):
    """Images (N, 3, H, W) uint8 -> the same after encoding and decoding."""
    parts = [to_float(part).to(nets.tokenizer.E.device) for part in images.split(60)]
    return torch.cat([decode(nets.tokenizer, nets.tokenizer.encode(part), None) for part in parts])


def scorer(nets, n):
    """The conditions to sample with in a small world, and a function from images to metrics.

    returns   conditions: labels (n,) or n captions, each as often as in the reference images;
              c (n, ...): the same, encoded for the models;
              metrics: images (N, 3, H, W) uint8, conditions -> dict of numbers
    """
    images, conditions, _ = world(nets.cfg, "test")
    positions = [i % len(images) for i in range(n)]
    if nets.text is not None:
        wanted = [conditions[i] for i in positions]
        return wanted, nets.text.encode(wanted), scene_scores
    real_features, _ = judged(nets.judge, images)
    real_statistics = statistics(real_features)
    if nets.cfg.dataset == "folder":
        # Drafts come out of the decoder, so they are compared with reconstructions.
        training, _ = judged(nets.judge, reconstruct(nets, world(nets.cfg, "train")[0]))
        held_out, _ = judged(nets.judge, reconstruct(nets, images))
    if nets.cfg.dataset == "shapes":
        real_spread = spread(images, conditions)

    def metrics(fake, labels):
        features, logits = judged(nets.judge, fake)
        row = dict(fd=frechet_distance(*real_statistics, *statistics(features)))
        # A small folder may have fewer test images than there are splits and neighbours.
        if min(len(images), len(fake)) >= 10:
            row["inception_score"], _ = inception_score(logits)
            row["precision"], row["recall"] = precision_recall(real_features[:n], features)
        row["accuracy"] = float((logits.argmax(1) == labels.numpy()).mean())
        if nets.cfg.dataset == "folder":
            row["memorised"] = memorised_share(features, held_out, training)
        if nets.cfg.dataset == "shapes":
            row["spread"] = (spread(fake, labels) / real_spread).mean().item()
        return row
    return conditions[positions], conditions[positions], metrics


def score(nets, model, steps, conditions, c, metrics):
    """The numbers of one model's images, seed 0. conditions, c and metrics come from `scorer`.
    steps: number of steps of the teacher; None: the student's single pass."""
    images = generate(model, nets.tokenizer, c, nets.cfg, steps, seed=0, progress="score")
    return metrics(images, conditions)


def draw_timed(nets, name, model, steps, c, seed):
    """A row's images -> z (n, L), images (n, 3, H, W) uint8, milliseconds per image."""
    # The first images are a warm-up, which is not timed.
    generate(model, nets.tokenizer, c[:min(60, len(c) // 4)], nets.cfg, steps, seed)
    z, images, seconds = zip(*batches(model, nets.tokenizer, c, nets.cfg, steps, seed,
                                      progress=name))
    return torch.cat(z), torch.cat(images), 1000 * sum(seconds) / len(c)


def draw_fixed_point(nets, z, c, seed, batch=60):
    """Samples z (n, L) of the teacher after ROUNDS rounds of Eq. 3's operator. They are near the
    fixed point that the student is trained towards. -> images (n, 3, H, W) uint8"""
    images, device = [], z.device
    for start in tqdm(range(0, len(z), batch), "fixed point", leave=False):
        z_part, part = z[start:start + batch], c[start:start + batch].to(device)
        # One generator for each image, different from those that drew z.
        generators = fpd.generators(seed, len(z) + start, len(part), device)
        z_part = fpd.fixed_point(nets.teacher, z_part, part, nets.cfg, generators, ROUNDS)
        images.append(decode(nets.tokenizer, z_part, part))
    return torch.cat(images)


def report(nets, folder, n=None, seed=None, steps=None):
    """The paper's Table 2 in miniature, or Table 1 for captions: the teacher, the fixed point of
    Eq. 3 (see `draw_fixed_point`) and the student in one step.

    nets    from sample.load_run
    n       images per row (default: 960), with each condition as often as in the reference images
    seed    random seed of the images (default: the run's)
    steps   numbers of steps of the teacher (default: 16, 8, 4, 2, 1)
    """
    n = n or (48 if nets.cfg.smoke else 960)
    seed = nets.cfg.seed if seed is None else seed
    steps = (16, 8, 4, 2, 1) if steps is None else steps
    wanted, c, metrics = scorer(nets, n)
    rows, pictures, (examples, captions) = [], [], grid_conditions(nets)

    def add(model, T, drawn, conditions, ms=None):
        numbers = metrics(drawn, conditions)
        rows.append(dict(model=model, steps=T, **numbers, ms_per_image=ms))
        if nets.text is None:
            # The first image of each class, or a white one if there is none.
            white = torch.full_like(drawn[:1], 255)
            drawn = torch.stack([torch.cat([drawn[conditions == x], white])[0] for x in examples])
        pictures.append((f"{model} {T or ''}  {headline(numbers)}", drawn[:len(captions)]))

    # Real images that are not in the reference, as a perfect model would draw them, and their
    # reconstructions, as a perfect teacher would draw them.
    images, conditions, _ = world(nets.cfg, "real")
    images, conditions = images[:n], conditions[:n]
    add("real", None, images, conditions)
    add("reconstruction", None, reconstruct(nets, images), conditions)

    # The teacher with each number of steps, and the fixed point, started from its best samples.
    for T in sorted(set(steps), reverse=True):
        z, drawn, ms = draw_timed(nets, "teacher", nets.teacher, T, c, seed)
        add("teacher", T, drawn, wanted, ms)
        if T == max(steps):
            drawn_fixed = draw_fixed_point(nets, z, c, seed)
    if steps:
        add("fixed point", None, drawn_fixed, wanted)

    # The student.
    _, drawn, ms = draw_timed(nets, "student", nets.student, None, c, seed)
    add("student", 1, drawn, wanted, ms)

    # Print and keep the table.
    scores, warning = "share of images that show what the caption says", ""
    if nets.text is None:
        size = len(world(nets.cfg, "test")[0])
        scores = f"FD in features of the evaluation classifier, {size} reference images"
        if size < 960:
            warning = ("with few reference images every FD is high, even that of the "
                       f"{len(images)} real images: {rows[0]['fd']:.2f}")
    protocol = protocol_of(nets, images=n, seed=seed, steps=steps, rounds=ROUNDS, scores=scores,
                           warning=warning, device=str(nets.tokenizer.E.device))
    write_report(folder, protocol, rows, table, pictures, captions)


# ---------------------------------------------------------------- the table of the ablations
def means(scores):
    """Scores of all seeds, list of dict -> mean of each number, over the seeds that have it."""
    numbers = {key: [score[key] for score in scores if isinstance(score.get(key), float)]
               for key in scores[0]}
    return {key: sum(values) / len(values) for key, values in numbers.items() if values}


def ablation_table(content):
    """A line of report.jsonl from train.ablate -> text. Its scores have one `score` per seed."""
    protocol, rows = content["protocol"], []
    first, *others = "fd", "recall", "spread", "accuracy", "precision"
    if "overall" in content["rows"][0]["scores"][0]:
        first, others = "overall", TAGS
    for row in content["rows"]:
        values, mean = [score[first] for score in row["scores"]], means(row["scores"])
        span = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        rows.append(row | mean | {first: f"{mean[first]:.2f}{span}"})
    head = (f"{protocol['dataset']}: {protocol['images']} images a row, seed 0; mean "
            f"(smallest to largest) of {protocol['seeds']} students, {protocol['base']['steps']} "
            "steps each, SDTT a quarter; paper: its GenEval score, overall\n")
    return head + text_table(rows, "table", "row", first, *others, "paper")


# ---------------------------------------------------------------- the table of ImageNet (Table 2)
def official_report(args, nets, folder, device):
    """FID, IS, precision and recall in features of FID's Inception. The images are drawn by a run
    or by the public networks; if nets is None, they are those in args.folder. Each row is printed
    and kept as soon as it is computed."""
    n, seed = args.images or 50_000, args.seed or 0
    steps = [16, 8, 4, 2] if args.steps is None else args.steps
    if args.folder:
        files = image_files(args.folder)
        n, seed, steps, models = len(files), None, None, [("folder", None, None)]
    else:
        # Every class occurs equally often.
        labels = torch.arange(n) % len(nets.names)
        models = [("teacher", nets.teacher, T) for T in steps]
        if nets.student is not None:
            models.append(("student", nets.student, None))

    # The reference.
    path = Path(args.weights or getattr(nets and nets.cfg, "weights", WEIGHTS), INCEPTION)
    extract = partial(load_inception(path).to(device), path=args.inception_path)
    mu, sigma, real = reference(args.reference, extract, args.batch)

    # Warn of what makes the scores incomparable with published ones.
    count = n if real is None else min(n, len(real))
    warnings = []
    if count < 2048:
        warnings.append(f"{count} images are fewer than the 2048 features, so the FID is biased")
    # The file's name ends in the first digits of its sha256.
    if not hashlib.sha256(path.read_bytes()).hexdigest().startswith(path.stem[-8:]):
        warnings.append(f"{path} does not hold the published weights")
    if real is not None:
        # If they fit, the squared distance of the images' mean from mu is about tr(sigma) / N.
        if np.sum((real.mean(0, dtype=np.float64) - mu) ** 2) > 2 * np.trace(sigma) / len(real):
            warnings.append("mu and sigma do not fit the images beside them: they were made with "
                            "the other --inception-path")
    against = "mu and sigma" if real is None else f"{len(real)} images"
    protocol = protocol_of(
        nets, images=n, seed=seed, steps=steps, folder=args.folder, device=device,
        inception_path=args.inception_path, warning="; ".join(warnings),
        scores=f"FID against {Path(args.reference).resolve()} ({against}), Inception {path.name}")
    print("\n".join(f"{key}: {value}" for key, value in protocol.items()))

    # One row for each model.
    for name, model, T in models:
        if args.folder:
            images = read_batches(files, args.batch)
        else:
            drawn = batches(model, nets.tokenizer, labels, nets.cfg, T, seed, args.batch, name)
            images = (part for _, part, _ in drawn)
        features, logits = collect(images, extract)
        row = dict(model=name, steps=1 if name == "student" else T)
        row["fid"] = frechet_distance(mu, sigma, *statistics(features))
        row["inception_score"], row["inception_score_std"] = inception_score(logits)
        if real is not None:
            row["precision"], row["recall"] = precision_recall(real, features)
        write_report(folder, protocol, [row], table, [], [])


# ---------------------------------------------------------------- GenEval (Table 1)
# GenEval (Ghosh et al. 2023) has 553 captions, each with the objects, counts, colours and positions
# that its images must show. Here are the rules of the official scorer. Its detector, Mask2Former
# Swin-S with CLIP ViT-L/14 for the colours, is not included: the detections, of this or of another
# detector, are read from a file.
OBJECT_COLORS = "red orange yellow green blue purple pink brown black white".split()


def relative_position(a, b):
    """Where box a is, seen from box b -> list of the RELATIONS that hold: none, one or two."""
    a, b = np.asarray([a, b], dtype=np.float64).reshape(2, 2, 2)                  # (corner, axis)
    # The offset of the centres, and the sum of both sizes.
    offset, sizes = a.mean(0) - b.mean(0), a[1] - a[0] + b[1] - b[0]
    beyond = np.sign(offset) * (abs(offset) - 0.1 * sizes).clip(0)
    if (abs(beyond) < 1e-3).all():
        return []
    # This is divided by the norm of the whole offset, so that none holds if the boxes are near.
    dx, dy = beyond / np.linalg.norm(offset)
    holds = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
    return [relation for relation, does in zip(RELATIONS, holds) if does]


def kept_objects(detections, tag):
    """Detections of an image -> {class: list of those that count, the most confident first}."""
    threshold = 0.9 if tag == "counting" else 0.3
    kept = {}
    # Of two equally confident detections the later comes first, as in the official code.
    for detection in sorted(detections, key=lambda detection: detection["confidence"])[::-1]:
        if detection["confidence"] > threshold:
            kept.setdefault(detection["class"], []).append(detection)
    return {name: group[:16] for name, group in kept.items()}


def is_correct(objects, prompt):
    """Do the objects of an image, from `kept_objects`, satisfy the prompt?

    They have to satisfy every clause of "include" and no clause of "exclude". A clause has a class,
    a count and sometimes a color or a position (relation, index of an earlier clause).
    """
    groups = []
    for clause in prompt["include"]:
        # Only the most confident objects decide about colour and position.
        found = objects.get(clause["class"], [])[:int(clause["count"])]
        good = len(found) == clause["count"]
        if "color" in clause:
            good = good and all(item["color"] == clause["color"] for item in found)
        if "position" in clause:
            relation, target = clause["position"]
            # The relation must hold for every pair of object and target, and there must be targets.
            good = good and groups[target] and all(
                relation in relative_position(item["box"], other["box"])
                for item, other in itertools.product(found, groups[target]))
        groups.append(found if good else [])
    return all(groups) and all(len(objects.get(clause["class"], [])) < clause["count"]
                               for clause in prompt.get("exclude", []))


def read_jsonl(path):
    """A file with one JSON object per line -> list of dicts."""
    return [json.loads(line) for line in Path(path).read_text("utf-8-sig").strip().split("\n")]


def geneval_scores(detections, prompts):
    """The official rules, applied to two files -> `tag_shares`, and the numbers of images, prompts.

    prompts      GenEval's evaluation_metadata.jsonl
    detections   one line for each image, with an empty list if nothing was detected:
                 {"image": "00000/samples/0000.png", "detections": [{"class": "dog",
                  "box": [x0, y0, x1, y1], "confidence": 0.9, "color": "red"}, ...]}
                 class as the prompts spell it; box in pixels, y downwards; all objects with a
                 confidence above 0.3; color only where a prompt asks for one
    """
    prompts, lines = read_jsonl(prompts), read_jsonl(detections)
    known = {clause["class"] for prompt in prompts
             for clause in prompt["include"] + prompt.get("exclude", [])}
    n, results = round(len(lines) / len(prompts)), {}
    wanted = set(itertools.product(range(len(prompts)), range(n)))
    for line in lines:
        for item in line["detections"]:
            x0, y0, x1, y1 = item["box"]
            # An object with a misspelt name, or in other units, would count as missing.
            if not (item["class"] in known and item.get("color", "red") in OBJECT_COLORS
                    and 0 <= item["confidence"] <= 1 and x0 <= x1 and y0 <= y1):
                raise ValueError(f"{detections}: {line['image']} has {item}: an unknown class or "
                                 "color, no box, or no confidence in [0, 1]")
        index, _, name = line["image"].split("/")[-3:]
        image = int(index), int(Path(name).stem)
        if image not in wanted:
            raise ValueError(f"{detections}: {line['image']} is none of {n} images of each of "
                             f"{len(prompts)} prompts")
        prompt = prompts[image[0]]
        objects = kept_objects(line["detections"], prompt["tag"])
        results[image] = prompt["tag"], is_correct(objects, prompt)
    # An image without detections needs a line, too. Without the line it would not count as wrong.
    if len(results) < max(len(wanted), len(lines)):
        raise ValueError(f"{detections}: {len(lines)} lines about {len(results)} of {len(wanted)} "
                         f"images; missing (prompt, image): {sorted(wanted - results.keys())[:3]}")
    return tag_shares(results.values()) | dict(images=len(lines), prompts=len(prompts))


def geneval_images(args, nets, out, device):
    """--geneval: four images of every prompt, by the student or by the teacher in --steps, in the
    folders that GenEval's scorer reads. Prompts that have their images already are skipped.

    OUT/protocol.json           the settings that they were drawn with
    OUT/00000/metadata.jsonl    the line of prompt 0;  samples/0000.png ... 0003.png: its images
    """
    prompts, seed = read_jsonl(args.prompts), args.seed or 0
    model, steps, who = nets.student, None, "student, 1 step"
    if args.steps or model is None:
        model, steps = nets.teacher, args.steps[0] if args.steps else 16
        who = f"teacher, {steps} steps"
    protocol = json.dumps(protocol_of(nets, model=who, trained_steps=nets.step, seed=seed,
                                      device=device, prompts=prompts), indent=1)
    path = Path(out) / "protocol.json"
    is_same = path.exists() and path.read_text() == protocol
    if not is_same and any(path.parent.glob("*/samples/*.png")):
        raise ValueError(f"{out} has images of another protocol: choose another --out, or empty it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(protocol)
    for index, prompt in enumerate(tqdm(prompts, "images")):
        samples = path.parent / f"{index:05d}" / "samples"
        files = [samples / f"{i:04d}.png" for i in range(4)]
        if all(file.exists() for file in files):
            continue
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt))
        c = nets.text.encode([prompt["prompt"]] * 4).to(device)
        z = draw_tokens(model, c, fpd.generators(seed, 1000 * index, 4, device), nets.cfg, steps)
        for file, image in zip(files, decode(nets.tokenizer, z, c)):
            # It is written under another name first: if a kill cuts it off, it does not count.
            new = file.with_suffix(".tmp")
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(new, "PNG")
            os.replace(new, file)
    print(f"{out}: 4 images of each prompt | {who} | seed {seed}")


# ---------------------------------------------------------------- the command
def parse():
    parser = argparse.ArgumentParser(
        description="Score a run: the table of a small world; FID and more for imagenet "
        "(--reference); images for GenEval with laion (--geneval).", allow_abbrev=False)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--reference", metavar="FILE", help="imagenet: FID against a folder of "
                      "images, or a .npz with mu and sigma or with images")
    kind.add_argument("--geneval", action="store_true", help="laion: 4 images for each of the "
                      "--prompts (by the teacher with --steps N); with --detections, scores")
    parser.add_argument("--data", metavar="DIR", help="where the run's own images were moved to")
    parser.add_argument("--images", type=int, help="images per row (default: 960; with --reference "
                        "50,000)")
    parser.add_argument("--seed", type=int, help="random seed of the images (default: that of the "
                        "run; with --reference and --geneval 0)")
    parser.add_argument("--steps", type=int, nargs="*", help="numbers of steps of the teacher, one "
                        "row each (default: 16 8 4 2, and 1 in small worlds)")
    parser.add_argument("--batch", type=int, default=50, help="with --reference: number of images "
                        "at a time (default: 50)")
    parser.add_argument("--folder", metavar="DIR", help="with --reference: score these images")
    parser.add_argument("--inception-path", choices=["pytorch-fid", "legacy"],
                        default="pytorch-fid", help="how images are resized for Inception "
                        "(default: pytorch-fid); ADM's references were made with legacy")
    parser.add_argument("--prompts", metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--out", metavar="DIR", help="folder of GenEval's images (default: "
                        "RUN/geneval)")
    parser.add_argument("--detections", metavar="FILE", help="what a detector found in the images")
    parser.add_argument("--detector", default="an unnamed detector",
                        help="name of this detector, for the output")
    network_arguments(parser)
    args = parser.parse_args()
    if args.folder and not args.reference:
        parser.error("--folder needs --reference: what to compare the images with")
    if args.geneval != bool(args.prompts) or args.detections and not args.geneval:
        parser.error("--geneval, --prompts FILE and, for scores, --detections FILE go together")
    if min(args.steps or [1]) < 1 or args.geneval and len(args.steps or []) > 1:
        parser.error("--steps have to be 1 or more; with --geneval, give one number")
    if args.images is not None and args.images < 10:
        parser.error("--images has to be 10 or more: the Inception score is a mean over 10 splits")
    return args


def main():
    args = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.detections:
        scores = geneval_scores(args.detections, args.prompts)
        # Only the official detector gives the GenEval score, so the detector's name is printed.
        print(f"GenEval rules, detections by {args.detector}: {scores['images']} images of "
              f"{scores['prompts']} prompts\n{text_table([scores], *TAGS, 'overall')}")
        return
    nets = None if args.folder else chosen_networks(args, device)
    folder = nets.path.parent if nets and nets.path else Path(".")
    if nets and nets.teacher is None:
        raise ValueError(f"{nets.path} contains the student alone: use a run's checkpoint.pt")
    if nets and (args.geneval and nets.text is None or args.reference and nets.text is not None
                 or nets.cfg.dataset in PUBLIC and not (args.reference or args.geneval)):
        raise ValueError("use --reference for imagenet and other runs of labels, and --geneval "
                         "with --prompts for laion and other runs of captions")
    if args.geneval:
        geneval_images(args, nets, args.out or folder / "geneval", device)
    elif args.reference:
        official_report(args, nets, folder, device)
    else:
        nets.cfg.data = args.data or nets.cfg.data
        if fingerprint(nets.cfg) != nets.images:
            raise ValueError(f"--data {nets.cfg.data}: not the images that the run was trained on")
        report(nets, folder, args.images, args.seed, args.steps)


if __name__ == "__main__":
    run_command(main)
