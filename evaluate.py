"""evaluate.py - the scores: FID, Inception Score, precision and recall, GenEval's rules, the exact scorer of scenes (Sec. 4).

    images (N, 3, H, W) uint8  -- extract, e.g. Inception -->  features (N, D), logits (N, C)
    features of generated images --+-- statistics --> mu, sigma --> frechet_distance       "FID" only with Inception's features
    reference (folder or .npz) ----+-- precision_recall (distances between single features)
    logits of generated images ------- inception_score

    python evaluate.py                                                  the small worlds: the table of the newest run, its own judge
    python evaluate.py --reference VIRTUAL_imagenet256_labeled.npz      imagenet: FID and the others of teacher and student, 50,000 images
    python evaluate.py --reference FILE --folder DIR                    the same scores of a folder of PNGs
    python evaluate.py --geneval --prompts FILE                         laion: the images of GenEval; with --detections FILE, their scores

Every metric is computed in float64 and follows one official implementation, named in its docstring; tests/golden holds their numbers.

    N images   D feature width   C classes   k neighbours   mu (D,), sigma (D, D): mean and covariance of features
"""
import hashlib
import json
import re
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import scipy.ndimage
import torch
from PIL import Image
from tqdm import tqdm

import fpd
from models import INCEPTION, find_inception, load_inception
from sample import (Parser, batches, check_seed, check_writable, generate, load_models,
                    model_arguments, run_command, sheet, shown, tell_cut, tokens, write_json, write_whole)
from tokenizer import COLOURS, RELATIONS, SHAPES, TAGS, paint, parse_caption, read_image, to_float, to_uint8, world


# ------------------------------------------------------------------------------------------------ tables as text
# How keys are called at the head of a column, where not by themselves
HEADS = dict(fd="FD", fid="FID", inception_score="IS", inception_score_std="+-", precision="prec.", accuracy="acc.", ms_per_image="ms/image")


def text_table(rows, *keys):
    """Rows, a list of dicts -> text: a line of heads, then the rows. Of the keys, those that some row has; numbers with two digits."""
    keys = [key for key in keys if any(row.get(key) is not None for row in rows)]
    lines = [[HEADS.get(key, key) for key in keys]] + [
        ["" if (x := row.get(key)) is None else f"{x:.2f}" if isinstance(x, float) else str(x) for key in keys] for row in rows]
    widths = [f"{'<' if key in ('model', 'method', 'table', 'row') else '>'}{max(map(len, x))}" for key, x in zip(keys, zip(*lines))]
    return "\n".join("  ".join(f"{x:{width}}" for x, width in zip(line, widths)).rstrip() for line in lines)


def models_of(run, steps):
    """The rows of a table -> [(name, network, its steps; 0: the student's single pass), ...]"""
    return [("teacher", run.teacher, T) for T in steps] + [("student", run.student, 0)] * (run.student is not None)


# ------------------------------------------------------------------------------------------------ the scores
def to_matrix(x, name, rows):
    """A numpy array or a tensor of any device -> (N, D) float64 array, N >= rows, all finite; ValueError otherwise."""
    x = np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x, dtype=np.float64)
    if x.ndim != 2 or len(x) < rows:
        raise ValueError(f"{name} should be a matrix of at least {rows} rows, one for each image, got shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} have values that are not finite")
    return x


def statistics(features):
    """Features (N, D) -> mu (D,), sigma (D, D) float64: mean and unbiased covariance. N < D is legal, but biases the FID upwards."""
    features = to_matrix(features, "features", rows=2)
    # float64 before the mean, too: a float32 sum over 50,000 rows loses digits that the difference of two means needs
    return features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def check_statistics(mu, sigma, name):
    mu, sigma = np.asarray(mu, dtype=np.float64), np.asarray(sigma, dtype=np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{name}: a mean (D,) and a covariance (D, D) belong together, got shapes {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{name}: the mean or the covariance has values that are not finite")
    return mu, sigma


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^1/2): the FID, when the features are Inception's (Heusel et al. 2017).

    mu (D,), sigma (D, D), symmetric, singular or not   returns a float, 0 for equal statistics up to rounding (so maybe -1e-14)
    """
    mu1, sigma1 = check_statistics(mu1, sigma1, "first statistics")
    mu2, sigma2 = check_statistics(mu2, sigma2, "second statistics")
    if mu1.shape != mu2.shape:
        raise ValueError(f"the two statistics come from different features: {len(mu1)} and {len(mu2)} wide")
    # With sigma1 = A A^T, sigma1 sigma2 and the symmetric A^T sigma2 A have the same eigenvalues but for zeros, and the trace of
    # the root is the sum of their roots. Any A does. This one is Cholesky's with pivoting: it ends at the rank of sigma1 where the
    # plain form would fail, and the noise in the null space, whose root is large (1e-16 becomes 1e-8), never gets in.
    lower, pivot, rank, _ = scipy.linalg.lapack.dpstrf(sigma1, lower=1)        # sigma1[pivot][:, pivot] = lower lower^T
    A = np.zeros((len(mu1), rank))
    A[pivot - 1] = np.tril(lower)[:, :rank]                                    # LAPACK counts from 1
    roots = np.sqrt(scipy.linalg.eigh(A.T @ sigma2 @ A, eigvals_only=True).clip(0)) if rank else np.zeros(0)
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * roots.sum())


def inception_score(logits, splits=10):
    """exp of the mean KL(p(class | image) || p(class)), per split, as torch-fidelity computes it (Salimans et al. 2016).

    logits (N, C), N >= splits; the official score takes Inception's with path="legacy"
    returns mean and (population) standard deviation over the splits
    """
    logits = to_matrix(logits, "logits", rows=splits)
    N = len(logits)
    order = np.random.RandomState(2020).permutation(N)                         # official; else a sorted list would give 10 narrow splits
    scores = []
    for i in range(splits):
        rows = torch.from_numpy(logits[order[i * N // splits:(i + 1) * N // splits]])          # (n, C)
        log_p = rows.log_softmax(1)
        log_q = log_p.logsumexp(0) - np.log(len(rows))                         # (C,) log of the mean; finite where the mean underflows
        scores.append((log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def distances(x, y):
    """Euclidean, x (n, D), y (m, D) float64 -> (n, m) float32.

    Computed in float64 and rounded at the end, as scikit-learn does for float32 features: a distance that occurs twice, as somebody's
    radius and again in the other set, then compares as equal rather than by its last bit.
    """
    squared = x.pow(2).sum(1)[:, None] + y.pow(2).sum(1)[None, :] - 2 * x @ y.T
    return squared.clamp_(min=0).sqrt_().float()


def radii(x, k, block):
    """Distance of every row of x (N, D) to its k-th neighbour among the other rows, (N,)."""
    found = []
    for start in tqdm(range(0, len(x), block), "radii", leave=False):
        d = distances(x[start:start + block], x)                               # (block, N)
        d[torch.arange(len(d)), torch.arange(start, start + len(d))] = torch.inf               # nobody is his own neighbour
        found.append(d.kthvalue(k, dim=1).values)
    return torch.cat(found)


def precision_recall(real, fake, k=3, block=1000):
    """Share of fakes inside the manifold of real images, and of reals inside the fakes' (Kynkaanniemi et al. 2019, code of prdc).

    real (N, D), fake (M, D)   features, numpy or torch; a set's manifold is the union of balls that reach to each point's k-th neighbour
    block                      rows of the distance matrix at a time: memory is block x max(N, M), never N x M
    returns                    precision, recall
    """
    real, fake = (torch.from_numpy(to_matrix(x, name, rows=k + 1)) for x, name in ((real, "real features"), (fake, "fake features")))
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake features differ in width: {real.shape[1]} and {fake.shape[1]}")
    real_radius, fake_radius = radii(real, k, block), radii(fake, k, block)
    fake_inside, real_inside = torch.zeros(len(fake), dtype=torch.bool), []
    for start in tqdm(range(0, len(real), block), "precision and recall", leave=False):
        d = distances(real[start:start + block], fake)                         # (block, M)
        fake_inside |= (d < real_radius[start:start + block, None]).any(0)     # strictly inside: on the sphere is out
        real_inside.append((d < fake_radius).any(1))
    return fake_inside.double().mean().item(), torch.cat(real_inside).double().mean().item()


# ------------------------------------------------------------------------------------------------ features and references
def collect(images, extract, batch=50):
    """Run a feature network over many images. -> features (N, D), logits (N, C), float32 arrays.

    images    (N, 3, H, W) uint8; or a list of files, which are read batch by batch, or an iterator of such batches (sample.batches):
              50,000 pictures need not fit in memory
    extract   images (B, 3, H, W) uint8 -> features (B, D), logits (B, C); e.g. an Inception
    """
    features, logits = [], []
    if isinstance(images, (list, torch.Tensor)):
        chunks = (images[start:start + batch] for start in tqdm(range(0, len(images), batch), "features", leave=False))
    else:
        chunks = images
    for chunk in chunks:
        if isinstance(chunk, list):
            files, chunk = chunk, [read_image(file) for file in chunk]
            if len({image.shape for image in chunk}) > 1:
                raise ValueError(f"the images from {files[0]} on differ in size")
            chunk = torch.stack(chunk)
        f, l = extract(chunk)
        features.append(f.detach().float().cpu())
        logits.append(l.detach().float().cpu())
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def reference(path, extract, batch=50):
    """What to compare with: a folder of PNGs (also in subfolders), or a .npz with mu and sigma, or with ADM's arr_0 (N, H, W, 3) uint8.

    extract   as in `collect`; ready-made mu and sigma must come from the same network and path, which nobody can check here
    returns   mu (D,), sigma (D, D), features (N, D) float32 or None where there are no images. ADM's files have both kinds: then mu
              and sigma, which are of the whole training set, are kept and the images give the features alone
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.rglob("*.png"))
        if len(files) < 2:
            raise ValueError(f"reference {path}: {len(files)} .png files in this folder, at least 2 are needed")
        features, _ = collect(files, extract, batch)
        return *statistics(features), features
    if path.suffix != ".npz":
        raise ValueError(f"reference {path} should be a folder of PNGs or a .npz file" + ("" if path.exists() else ", and it does not exist"))
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in ("mu", "sigma", "arr_0") if key in file.files}
    except Exception as error:                                                 # zip, zlib, numpy: each has its own way to say "damaged"
        raise ValueError(f"reference {path} cannot be read as .npz ({type(error).__name__}: {error})") from error
    if "arr_0" not in arrays and not {"mu", "sigma"} <= arrays.keys():
        raise ValueError(f"reference {path} should hold mu and sigma, or images as arr_0; of these it has {sorted(arrays)}")
    features, images = None, arrays.get("arr_0")
    if images is not None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) < 2:
            raise ValueError(f"reference {path}: arr_0 should be (N, H, W, 3) uint8, got {images.shape} {images.dtype}")
        features, _ = collect(torch.from_numpy(images).permute(0, 3, 1, 2), extract, batch)
    if {"mu", "sigma"} <= arrays.keys():
        return *check_statistics(arrays["mu"], arrays["sigma"], f"reference {path}"), features
    return *statistics(features), features


# ------------------------------------------------------------------------------------------------ scenes: an exact scorer
AREAS = torch.tensor([2.835, 2.822, 1.572, 2.258])                             # of SHAPES at radius 1 (tests measure them)
TURNS = torch.linspace(-.2, .2, 5)                                             # more than scenes turn: decoded edges are less exact


def scene_objects(image):
    """What is on a picture of the scenes world, read off its pixels. (3, H, W) uint8 -> list of dict, the clearest object first.

    shape, colour   names of SHAPES and COLOURS         box   left, top, right, bottom pixel
    fit             0 to 1, how well it covers the shape's drawing of equal centre and area; below 0.7 nothing is an object
    """
    x = to_float(image)
    border = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    ground = border.median(1).values[:, None, None]                            # (3, 1, 1)
    palette = torch.tensor(list(COLOURS.values()))
    regions, n = scipy.ndimage.label((x - ground).abs().amax(0) > 0.35)        # touching objects are one region, and fit no shape
    covers, found = [], []
    for k, (rows, columns) in enumerate(scipy.ndimage.find_objects(regions), 1):
        inside = torch.from_numpy(regions == k)
        if inside.sum() < 16:                                                  # half of the smallest object
            continue
        names = torch.cdist(x[:, inside].T, palette).argmin(1)                 # (pixels,)
        index = int(names.mode().values)
        hue = x[:, inside][:, names == index].median(1).values[:, None, None]  # this object's: hues vary
        cover = (1 - (x - hue).norm(dim=0) / (ground - hue).norm()).clamp(0, 1)                # (H, W), part of each pixel that it fills
        covers.append(cover * torch.from_numpy(scipy.ndimage.binary_dilation(regions == k)))
        found.append(dict(shape=None, colour=list(COLOURS)[index], box=(columns.start, rows.start, columns.stop - 1, rows.stop - 1)))
    if not found:
        return []
    cover, n, m = torch.stack(covers), len(found), len(SHAPES) * len(TURNS)    # (n, H, W)
    area, axis = cover.sum((1, 2)), torch.arange(x.shape[1]) + 0.5
    centre = torch.stack([(cover * axis).sum((1, 2)), (cover * axis[:, None]).sum((1, 2))], 1) / area[:, None]       # (n, 2) x, y
    shape = torch.arange(len(SHAPES)).repeat_interleave(len(TURNS))            # (m,)
    drawn = paint(torch.zeros(n * m, 1, *x.shape[1:]), shape.repeat(n), torch.ones(n * m, 1), centre.repeat_interleave(m, 0),
                  (area[:, None] / AREAS[shape]).sqrt().flatten(), TURNS.repeat(n * len(SHAPES))).view(n, m, *x.shape[1:])
    fits = torch.minimum(drawn, cover[:, None]).sum((2, 3)) / torch.maximum(drawn, cover[:, None]).sum((2, 3))       # (n, m)
    for thing, fit, best in zip(found, *fits.max(1)):
        thing |= dict(shape=SHAPES[shape[best]], fit=float(fit))
    return sorted((thing for thing in found if thing["fit"] >= 0.7), key=lambda thing: -thing["fit"])


def scene_correct(image, caption):
    """Does a picture (3, H, W) uint8 show what its caption says? By GenEval's rules: of what is counted there must be just so many; else
    more things may be there, and the place is that of the clearest ones (`relative_position`)."""
    wanted, objects = parse_caption(caption), scene_objects(image)
    groups = [[thing for thing in objects if thing["shape"] == shape and colour in (None, thing["colour"])] for colour, shape in wanted["objects"]]
    if wanted["tag"] == "counting":
        return len(groups[0]) == len(groups)
    return all(groups) and (wanted["relation"] is None or wanted["relation"] in relative_position(groups[0][0]["box"], groups[1][0]["box"]))


def tag_shares(results):
    """Pairs (tag, correct?) -> {tag: share that is correct, for those of TAGS that occur, "overall": mean of these shares}."""
    groups = {tag: [correct for other, correct in results if other == tag] for tag in TAGS}
    shares = {tag: sum(group) / len(group) for tag, group in groups.items() if group}
    return shares | dict(overall=sum(shares.values()) / len(shares))


def scene_scores(images, captions):
    """Share of the pictures (N, 3, H, W) uint8 that show what their captions say -> dict as of `tag_shares`."""
    return tag_shares([(parse_caption(caption)["tag"], scene_correct(image, caption)) for image, caption in zip(images, captions, strict=True)])


# ------------------------------------------------------------------------------------------------ the table of a small world
def spread(images, labels):
    """How much the images of one class differ, read off the pixels of the shapes world. -> dict of four standard deviations.

    images (N, 3, H, W) uint8, labels (N,). The ground is the median colour of the border; the object is what differs from it
    by more than 45 of 255 in some channel. Measured: "ground" (grey level / 255), "size" (root of the object's area, pixels),
    "x" and "y" (its centre, pixels): the standard deviation within each class, averaged over the classes.
    """
    x = images.float()
    border = torch.cat([x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]], 2)                # (N, 3, 4 side)
    ground = border.median(2).values                                                               # (N, 3)
    is_object = ((x - ground[:, :, None, None]).abs().amax(1) > 45).float()                        # (N, H, W)
    area, axis = is_object.sum((1, 2)).clamp(min=1), torch.arange(x.shape[-1]) + 0.5
    values = torch.stack([ground.mean(1) / 255, area.sqrt(), (is_object * axis).sum((1, 2)) / area,
                          (is_object * axis[:, None]).sum((1, 2)) / area], 1)                      # (N, 4)
    within = torch.stack([values[labels == label].std(0) for label in labels.unique()]).mean(0)    # (4,)
    return dict(zip(("ground", "size", "x", "y"), within.tolist()))


@torch.no_grad()
def judged(judge, images):
    """The judge's features and logits of (N, 3, H, W) uint8 images, as `collect` does."""
    device = judge.head.weight.device
    return collect(images, lambda chunk: judge(to_float(chunk).to(device)), batch=200)


def judge_metrics(run, images, labels, n):
    """How images are scored in a world of classes -> function (images (N, 3, H, W) uint8, labels (N,)) -> a row's numbers."""
    real_features, _ = judged(run.judge, images)
    real_statistics, real_spread = statistics(real_features), spread(images, labels)

    def metrics(fake, label):
        features, logits = judged(run.judge, fake)
        row = dict(fd=frechet_distance(*real_statistics, *statistics(features)))
        if len(fake) >= 10:                                                    # a folder may have fewer real ones for 10 splits
            row["inception_score"] = inception_score(logits)[0]
        row["precision"], row["recall"] = precision_recall(real_features[:n], features)
        row["accuracy"] = float((logits.argmax(1) == label.numpy()).mean())
        if run.cfg.dataset == "shapes":                                        # whose pixels `spread` can read
            spreads = {k: v / real_spread[k] for k, v in spread(fake, label).items()}
            row |= dict(spread=sum(spreads.values()) / 4, spreads=spreads)
        return row
    return metrics


def scorer(run, real, n):
    """What is asked of a small world's models, and how their answers are scored. run, real: see `report`

    returns   labels (n,) or n captions, balanced; the condition c (n, ...) of either; function (images (n, 3, H, W), the first) -> numbers
    """
    images, told = real
    asked = [told[i % len(told)] for i in range(n)] if run.text else torch.arange(n) % len(run.names)
    return asked, run.text.encode(asked) if run.text else asked, scene_scores if run.text else judge_metrics(run, images, told, n)


def score(run, model, steps, asked, c, metrics):
    """The numbers of one model's images, seed 0. steps = 0: the student's single pass. asked, c, metrics: as of `scorer`"""
    return metrics(generate(model, run.tokenizer, c, run.cfg, steps, seed=0, progress="score"), asked)


def headline(row):
    return f"{100 * row['overall']:.0f} %" if "overall" in row else f"FD {row['fd']:.1f}"


def report(run, real, folder, n=960, seed=0, steps=(16, 8, 4, 2, 1)):
    """The paper's Table 2 in miniature, or Table 1's with captions: the teacher in 16 ... 1 steps and the student in one.

    run      namespace of cfg, names, tokenizer, teacher, student, judge, text, step (sample.load_run)
    real     images (N, 3, H, W) uint8, labels (N,) or captions (list of N str): real ones that nothing was trained on
    n, seed  images per row, classes or kinds of captions balanced, and their seed
    returns  the content of report.json; prints the table and writes report.json and report.png
    """
    (images, told), (asked, c, metrics) = real, scorer(run, real, n)
    rows, pictures, (examples, captions) = [], [], shown(run)

    def measure(name, step_count, fake, what, ms):
        rows.append(dict(model=name, steps=step_count) | metrics(fake, what) | dict(ms_per_image=ms))
        firsts = range(len(captions)) if run.text else [int((what == k).float().argmax()) for k in examples]   # the first image of each class
        pictures.append((f"{name} {step_count or ''}  {headline(rows[-1])}", fake[list(firsts)]))
    with torch.no_grad():
        x = to_float(images[:n]).to(run.tokenizer.E.device)
        decoded = torch.cat([run.tokenizer.decode(run.tokenizer.E[run.tokenizer.encode(part)]) for part in x.split(60)])
    floor = slice(n) if run.text else slice(-n, None)                          # other real images than those that each row is compared with
    measure("real", None, images[floor], told[floor], None)
    measure("round trip", None, to_uint8(decoded).cpu(), told[:n], None)       # what the tokenizer alone costs
    for name, model, step_count in models_of(run, steps):
        generate(model, run.tokenizer, c[:min(60, n // 4)], run.cfg, step_count, seed)      # warm-up, not timed
        begin = time.perf_counter()
        fake = generate(model, run.tokenizer, c, run.cfg, step_count, seed, progress=f"{name} {step_count or 1}")
        measure(name, step_count or 1, fake, asked, 1000 * (time.perf_counter() - begin) / n)
    scored_by = dict(scorer="exact, from the pixels (evaluate.scene_objects)") if run.text else dict(
        reference=f"{len(images)} real images not trained on", features="the judge's (not the FID Inception's), 96 wide",
        spread="standard deviation within a class of ground, size, x, y, relative to real images")
    protocol = dict(dataset=run.cfg.dataset, images=n, seed=seed, labels="balanced", student_steps=run.step, guidance=run.cfg.guidance,
                    confidence_noise=run.cfg.confidence_noise, init_mask=run.cfg.init_mask, temperature=run.cfg.temperature,
                    **scored_by, batch=60, device=str(run.tokenizer.E.device), versions=dict(torch=torch.__version__, numpy=np.__version__))
    return write_report(folder, protocol, rows, table, pictures, captions)


def write_report(folder, protocol, rows, table, pictures, captions):
    """report.json and, where there are pictures (rows of a `sheet`), report.png; prints the table, a function of the content. -> the content"""
    content = dict(protocol=protocol, rows=rows)
    write_json(Path(folder) / "report.json", content)
    if pictures:
        sheet(pictures, captions).save(Path(folder) / "report.png")
    print(table(content))
    return content


def table(content):
    """report.json's content -> text."""
    p, is_exact = content["protocol"], "scorer" in content["protocol"]
    what = "share of images that show what the caption says" if is_exact else f"FD in features of the judge, reference {p['reference']}"
    keys = (*TAGS, "overall") if is_exact else ("fd", "inception_score", "precision", "recall", "accuracy", "spread")
    return (f"{p['dataset']}: {p['images']} images a row, seed {p['seed']}, {what}\n"
            + text_table(content["rows"], "model", "steps", *keys, "ms_per_image"))


def means(scores):
    """Scores of several seeds, list of dict -> dict of the means of their numbers, over the seeds that have them."""
    known = {key: [score[key] for score in scores if isinstance(score.get(key), float)] for key in scores[0]}
    return {key: sum(values) / len(values) for key, values in known.items() if values}


def ablation_table(content):
    """report.json's content, as of train.ablate -> text. scores: of each seed, as of `score`"""
    p, rows = content["protocol"], []
    first = "overall" if "overall" in content["rows"][0]["scores"][0] else "fd"
    for row in content["rows"]:
        mean, values = means(row["scores"]), [score[first] for score in row["scores"]]
        spans = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
        rows.append(row | mean | {first: f"{mean[first]:.2f}{spans}"})
    others = TAGS if first == "overall" else ("recall", "accuracy", "precision")
    return (f"{p['dataset']}{', smoke: nothing was learnt' * p['smoke']}: {p['images']} images a row, seed 0; mean (smallest to largest) of "
            f"{p['seeds']} students, {p['base']['steps']} steps each; paper: its GenEval score, overall\n"
            + text_table(rows, "table", "row", first, *others, "seconds_per_step", "paper"))


# ------------------------------------------------------------------------------------------------ the table of ImageNet (Table 2)
def scores(features, logits, target):
    """Features (N, 2048), logits (N, 1008) of the Inception and a `reference` -> the numbers of a row; no precision without real images.

    "fd" is what every report of ours has; it may be called "fid", too, since the features are the Inception's.
    """
    mu, sigma, real = target
    fd = frechet_distance(mu, sigma, *statistics(features))
    score, deviation = inception_score(logits)
    row = dict(fd=fd, fid=fd, inception_score=score, inception_score_std=deviation)
    if real is not None:
        row["precision"], row["recall"] = precision_recall(real, features, k=3)
    return row


def rows_of_models(run, target, extract, steps, n, seed, batch):
    """A row for the teacher in each of `steps` and one for the student, and their pictures: images go straight into features."""
    rows, pictures, labels = [], [], torch.arange(n) % len(run.names)             # every class equally often
    for name, model, step_count in models_of(run, steps):
        spent = []
        examples = generate(model, run.tokenizer, shown(run)[0], run.cfg, step_count, seed)             # a warm-up, too
        images = batches(model, run.tokenizer, labels, run.cfg, step_count, seed, batch, f"{name} {step_count or 1}", spent)
        row = dict(model=name, steps=step_count or 1, **scores(*collect(images, extract), target))
        rows.append(row | dict(ms_per_image=1000 * sum(spent) / n))
        pictures.append((f"{name} {row['steps']}  FID {row['fid']:.1f}", examples))
    return rows, pictures


def official_report(args, run, folder, device):
    """FID, IS, precision and recall with the FID Inception, of a run, of public networks or of a folder of PNGs. Writes `folder`/report.json.

    args     of the command line: reference, images, seed, steps, batch, inception_weights, inception_path, folder
    run      as of sample.load_models; None for args.folder
    returns  the content of report.json; prints the table
    """
    path = find_inception(args.inception_weights)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    protocol = dict(images=args.images, seed=args.seed, features=f"FID Inception, 2048 wide, {path.name} (sha256 {sha}...)",
                    inception_path=args.inception_path, inception_score="10 splits", precision_recall="k = 3", batch=args.batch,
                    device=str(device), versions=dict(torch=torch.__version__, numpy=np.__version__))
    warnings = [] if args.images >= 2048 else [f"{args.images} images are fewer than the 2048 features: the FID is biased upwards, and "
                                               "comparable with nothing"]
    if sha != INCEPTION[-12:-4]:
        warnings.append(f"the Inception's weights are not the published ones ({INCEPTION})")
    if args.folder:
        files = sorted(Path(args.folder).rglob("*.png"))
        if len(files) < args.images:
            raise ValueError(f"--folder {args.folder} has {len(files)} .png files, fewer than the {args.images} asked for with --images")
        files = [files[i * len(files) // args.images] for i in range(args.images)]           # not the first, which may be of a few classes
        protocol |= dict(folder=str(Path(args.folder).absolute()))
    else:
        cfg, n_classes = run.cfg, len(run.names)
        protocol |= dict(dataset=cfg.dataset, labels="balanced" if args.images % n_classes == 0 else f"the {n_classes} classes in turn",
                         student=args.student or (args.run and str(args.run)), student_steps=run.step, guidance=cfg.guidance, temperature=1.0,
                         confidence_noise=cfg.confidence_noise, init_mask=cfg.init_mask, student_temperature=cfg.temperature)
        warnings += ["a smoke run: the weights are random"] if cfg.smoke else []
    extract = partial(load_inception(path).to(device), path=args.inception_path)
    target = reference(args.reference, extract, args.batch)
    if len(target[0]) != 2048 or (target[2] is not None and len(target[2]) < 4):             # now, not after hours
        raise ValueError(f"reference {args.reference} should have a mean of 2048 values and at least 4 images, if any")
    count = "mu and sigma only: no precision, no recall" if target[2] is None else f"{len(target[2])} images"
    protocol["reference"] = f"{Path(args.reference).absolute()} ({count})"
    if target[2] is not None and len(target[2]) < 2048:
        warnings.append(f"the reference has {len(target[2])} images, fewer than the 2048 features")
    if warnings:
        protocol["warning"] = "; ".join(warnings)
    if args.folder:
        row = dict(model="folder", steps=None, **scores(*collect(files, extract, args.batch), target))
        return write_report(folder, protocol, [row], official_table, [], [])
    rows, pictures = rows_of_models(run, target, extract, args.steps, args.images, args.seed, args.batch)
    return write_report(folder, protocol, rows, official_table, pictures, shown(run)[1])


def official_table(content):
    """report.json's content -> text: the protocol, then the columns of Table 2."""
    return "\n".join([f"{key}: {value}" for key, value in content["protocol"].items()] + [text_table(
        content["rows"], "model", "steps", "fid", "inception_score", "inception_score_std", "precision", "recall", "ms_per_image")])


# ------------------------------------------------------------------------------------------------ GenEval (Ghosh et al. 2023; Table 1)
# 553 captions, each with the objects, counts, colours and places that its images must show, and the rules of the official scorer. Its
# detector, Mask2Former Swin-S with CLIP ViT-L/14 for the colours, is not here: the user's own plugs in as a file (`read_detections`).
OBJECT_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SAMPLE = re.compile(r"(?:^|/)(\d+)/samples/(\d+)\.png$")                       # number of the prompt, number of the image


def read_jsonl(path, what, fits):
    """A file of JSON objects, one a line, each of which `fits` -> list of dicts. ValueError names the line that is not `what`."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    objects = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="backslashreplace").rstrip().split("\n"), 1):
        try:
            objects.append(json.loads(line))
            good = fits(objects[-1])
        except KeyError as error:
            raise ValueError(f"{path}, line {number} has no {error}") from error
        except (ValueError, TypeError, AttributeError):                        # not JSON, or a value of another type than expected
            good = False
        if not good:
            raise ValueError(f"{path}, line {number} is not {what}: {line[:100]!r}")
    return objects


def read_prompts(path):
    """evaluation_metadata.jsonl of https://github.com/djghosh13/geneval, or a file like it -> list of dicts.

    {"tag", "prompt": caption, "include": [{"class", "count"}, ...], "exclude": [{"class", "count"}, ...]}: an image must meet every clause
    of include, which may have a "color" and a "position" [relation, index of an earlier clause], and none of exclude, which may be absent.
    """
    def fits(prompt):
        tag, include, caption, exclude = prompt["tag"], prompt["include"], prompt["prompt"], prompt.get("exclude", [])
        places = [(i, *clause["position"]) for i, clause in enumerate(include) if "position" in clause]
        return (tag in TAGS and isinstance(caption, str) and include and all(clause.get("color", "red") in OBJECT_COLORS for clause in include)
                and all(isinstance(clause["class"], str) and clause["count"] >= 1 for clause in include + exclude)
                and all(relation in RELATIONS and 0 <= target < i for i, relation, target in places))
    return read_jsonl(path, "a prompt of GenEval", fits)


def read_detections(path):
    """One line for each image, also where nothing was seen (an empty list) -> list of dicts.

    {"image": "00000/samples/0000.png", "detections": [{"class": "dog", "box": [x0, y0, x1, y1], "confidence": 0.9, "color": "red"}, ...]}
    image        its path, of which the last three parts count       box     left, top, right, bottom in pixels, y downwards
    class        as the prompts spell it: COCO's names, but "computer mouse", "computer keyboard", "tv remote"
    confidence   in [0, 1], all objects above 0.3                    color   one of OBJECT_COLORS; only needed where a prompt asks for one
    """
    def fits(line):
        return SAMPLE.search(line["image"]) and all(
            isinstance(d["class"], str) and len(d["box"]) == 4 and np.isfinite(d["box"]).all() and d["box"][0] <= d["box"][2]
            and d["box"][1] <= d["box"][3] and 0 <= d["confidence"] <= 1 and d.get("color") in (None, *OBJECT_COLORS)
            for d in line["detections"])
    return read_jsonl(path, "an image with its detections", fits)


def iou(a, b):
    """Intersection over union of two boxes x0, y0, x1, y1 that include their last pixel."""
    def area(x0, y0, x1, y1):
        return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)
    both = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return both / (area(*a) + area(*b) - both)


def relative_position(a, b):
    """Where box a is, seen from box b -> those of RELATIONS that hold: none, one or two."""
    a, b = (np.asarray(box, dtype=np.float64).reshape(2, 2) for box in (a, b))                 # (corner, axis)
    offset = a.mean(0) - b.mean(0)                                             # of the centres
    beyond = np.sign(offset) * (abs(offset) - 0.1 * (a[1] - a[0] + b[1] - b[0])).clip(0)
    if (abs(beyond) < 1e-3).all():
        return []
    dx, dy = beyond / np.linalg.norm(offset)                                   # norm of the whole offset: near boxes reach 0.5 nowhere
    return [relation for relation, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds]


def kept_objects(detections, tag, max_overlap=1.0):
    """Detections of an image -> {class: those that count, the most confident first}.

    max_overlap   an object whose IoU with a more confident one of its class is as large is dropped; at the official 1.0 none is
    """
    threshold, kept = 0.9 if tag == "counting" else 0.3, {}
    found = sorted((d for d in detections if d["confidence"] > threshold), key=lambda d: d["confidence"])
    for d in found[::-1]:                                                      # of equal ones the later first, as official
        same = kept.setdefault(d["class"], [])
        if len(same) < 16 and (max_overlap == 1 or all(iou(d["box"], other["box"]) < max_overlap for other in same)):
            same.append(d)
    return kept


def verdict(objects, prompt):
    """Do an image's objects, as of `kept_objects`, show what the prompt asks for? -> bool, and the official words for what is wrong."""
    reasons, groups = [], []                                                   # groups: the objects of each clause, None where it fails
    for clause in prompt["include"]:
        name, count, color = clause["class"], clause["count"], clause.get("color")
        relation, target = clause.get("position", (None, None))
        found, fault = objects.get(name, [])[:count], None                     # colour and place of the most confident ones alone
        colors = [d.get("color") for d in found]
        if len(found) < count:
            fault = f"expected {name}>={count}, found {len(found)}"
        elif color and None in colors:
            raise ValueError(f"a {name} was detected without a color, but {prompt['prompt']!r} asks for one")
        elif color and colors.count(color) < count:
            seen = ", ".join(f"{colors.count(c)} {c}" for c in OBJECT_COLORS if c in colors)
            fault = f"expected {color} {name}>={count}, found {colors.count(color)} {color}; and {seen}"
        elif relation and groups[target] is None:
            fault = f"no target for {name} to be {relation}"
        elif relation:                                                         # of every object to every target
            places = [relative_position(d["box"], other["box"]) for d in found for other in groups[target]]
            wrong = [" and ".join(place) for place in places if relation not in place]
            fault = f"expected {name} {relation} target, found {wrong[0]} target" if wrong else None
        groups.append(None if fault else found)
        reasons += [fault] if fault else []
    for clause in prompt.get("exclude", []):
        found = objects.get(clause["class"], [])
        if len(found) >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {len(found)}")
    return not reasons, "\n".join(reasons)


def geneval_scores(detections, prompts, max_overlap=1.0):
    """The official rules on two files, of `read_detections` and of `read_prompts`. max_overlap: see `kept_objects`.

    returns   {tag: share of correct images, ..., "overall": mean of these shares, "images": how many, "prompts": how many}
    ValueError unless every prompt has the same number of images and every image one line: without the empty ones the score would rise
    """
    prompts, results = read_prompts(prompts), {}                               # results: (prompt, number) -> correct?
    for line in read_detections(detections):
        image = index, _ = tuple(int(part) for part in SAMPLE.search(line["image"]).groups())
        if index >= len(prompts) or image in results:
            raise ValueError(f"{detections}: {line['image']} has {'a second line' if image in results else 'no prompt'}")
        results[image], _ = verdict(kept_objects(line["detections"], prompts[index]["tag"], max_overlap), prompts[index])
    n = 1 + max(number for _, number in results)
    missing = [f"{i:05d}/samples/{j:04d}.png" for i in range(len(prompts)) for j in range(n) if (i, j) not in results]
    if missing:
        raise ValueError(f"{detections} has no line for {len(missing)} images, such as {missing[0]}; one without detections needs a line, too")
    shares = tag_shares([(prompts[index]["tag"], correct) for (index, _), correct in results.items()])
    return shares | dict(images=len(results), prompts=len(prompts))


def geneval_table(scores, detector):
    """`geneval_scores` -> text. It names what made the detections: with any but the official detector they are not a model's GenEval."""
    return (f"GenEval rules, detections by {detector}: {scores['images']} images of {scores['prompts']} prompts\n"
            + text_table([scores], *TAGS, "overall"))


def geneval_images(prompts, source, out, make, n=4):
    """The images of every prompt (evaluate.read_prompts), in the folders that GenEval's scorer reads. Those that are there are not made again.

    OUT/00000/metadata.jsonl   the line of prompt 0              OUT/00000/samples/0000.png ...   its n images
    source    the file that the prompts are from
    make      (caption, numbers of the images wanted, number of the prompt) -> (len(numbers), 3, H, W) uint8. It should draw an image
              from the seed and these two numbers alone, whichever others are wanted with it
    """
    def is_complete(path):
        try:
            return read_image(path) is not None
        except ValueError:
            return False
    folders = [Path(out) / f"{index:05d}" for index in range(len(prompts))]
    for folder, prompt in zip(folders, prompts):                               # all of them before the first image
        path, text = folder / "metadata.jsonl", json.dumps(prompt)
        if path.exists() and path.read_text() != text:
            raise ValueError(f"{path} has another prompt than {source}: {out} was made for another file")
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda new: new.write_text(text))
    for index, (prompt, folder) in enumerate(zip(tqdm(prompts, "images"), folders)):
        files = [folder / "samples" / f"{i:04d}.png" for i in range(n)]
        wanted = [i for i in range(n) if not is_complete(files[i])]
        if wanted:
            images = make(prompt["prompt"], wanted, index)
            assert images.shape[:2] == (len(wanted), 3) and images.dtype == torch.uint8, (images.shape, images.dtype)
            for i, image in zip(wanted, images):
                write_whole(files[i], Image.fromarray(image.permute(1, 2, 0).numpy()).save)


# ------------------------------------------------------------------------------------------------ the command
def geneval(args, device):
    """--geneval: the images of all prompts, or with --detections their scores."""
    if not args.prompts:
        raise ValueError("--geneval needs --prompts FILE: evaluation_metadata.jsonl of https://github.com/djghosh13/geneval")
    if args.detections:
        print(geneval_table(geneval_scores(args.detections, args.prompts), args.detector))
        return
    if args.reference or args.folder:
        raise ValueError("--geneval and --reference or --folder exclude each other: GenEval looks at its own prompts alone")
    if args.steps is not None and (len(args.steps) != 1 or args.steps[0] < 1):
        raise ValueError(f"--geneval draws with one model: the student, or the teacher in the one number of --steps, got {args.steps}")
    prompts = read_prompts(args.prompts)                                       # now, not after the networks are loaded
    captions = [prompt["prompt"] for prompt in prompts]
    steps = args.steps[0] if args.steps else 0
    run = load_models(args, device, teacher=steps > 0)
    model = run.teacher if steps else run.student
    if run.text is None or model is None:
        raise ValueError("--geneval needs a run with captions" if run.text is None else "--dataset laion alone is the teacher: add --steps 16")
    if steps > model.L:
        raise ValueError(f"--steps should be between 1 and {model.L}, got {steps}")
    out = args.out or f"{args.run or '.'}/geneval"
    check_writable(out)
    if run.cfg.dataset == "scenes":
        run.text.encode(captions)                                              # words that it does not know, before the first folder
    tell_cut(run.text, captions)

    def make(caption, numbers, index):
        c = run.text.encode([caption] * len(numbers)).to(device)
        z = tokens(model, c, [g for i in numbers for g in fpd.generators(args.seed, 1000 * index + i, 1, device)], run.cfg, steps)
        return to_uint8(run.tokenizer.decode(run.tokenizer.E[z], c)).cpu()
    with torch.no_grad():
        geneval_images(prompts, args.prompts, out, make)
    print(f"{out}: 4 images of each prompt | {f'teacher, {steps} steps' if steps else 'student, 1 step'} | seed {args.seed} | next: a detector's "
          "findings, then evaluate.py --geneval --prompts FILE --detections FILE")


def main():
    parser = Parser(description="The table of a run: the teacher in 16 ... 1 steps, the student in 1. imagenet: FID against --reference.")
    parser.add_argument("--images", type=int, help="images per row; 960, with --reference 50000, if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="*", help="rows of the teacher; 16 8 4 2 1, with --reference 16 8 4 2, if not given")
    parser.add_argument("--batch", type=int, default=50, help="with --reference: images at a time")
    parser.add_argument("--reference", help="imagenet: a folder of PNGs, or a .npz with mu and sigma, or ADM's with images")
    parser.add_argument("--folder", help="with --reference: score the PNGs of this folder in place of a run")
    parser.add_argument("--inception-weights", metavar="FILE", help=f"{INCEPTION}, else looked for in weights/")
    parser.add_argument("--inception-path", choices=["pytorch-fid", "legacy"], default="pytorch-fid", help="how images are resized and scaled")
    parser.add_argument("--geneval", action="store_true", help="with --prompts: 4 images of each prompt into --out, by the student, or by the "
                        "teacher in --steps N; with --detections as well: score them by GenEval's rules")
    parser.add_argument("--prompts", metavar="FILE", help="GenEval's evaluation_metadata.jsonl")
    parser.add_argument("--out", metavar="DIR", help="where --geneval puts the images; RUN/geneval if not given")
    parser.add_argument("--detections", metavar="FILE", help="what a detector saw on the images, see `read_detections`")
    parser.add_argument("--detector", default="an unnamed detector", help="its name, for the table")
    model_arguments(parser)
    args = parser.parse_args()
    check_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.geneval:
        return geneval(args, device)
    for name, needs in dict(prompts="geneval", out="geneval", detections="geneval", inception_weights="reference").items():
        if getattr(args, name) and not getattr(args, needs):
            raise ValueError(f"--{name.replace('_', '-')} goes with --{needs}")
    args.images = args.images if args.images is not None else 50_000 if args.reference else 960
    args.steps = args.steps if args.steps is not None else (16, 8, 4, 2) if args.reference else (16, 8, 4, 2, 1)
    least = 10 if args.reference else 48
    if args.images < least or args.batch < 1:
        raise ValueError(f"--images should be at least {least} and --batch 1, got {args.images} and {args.batch}")
    if args.folder and not args.reference:
        raise ValueError("--folder needs --reference: what to compare the images with")
    if args.folder:
        return official_report(args, None, ".", device)
    run = load_models(args, device, teacher=len(args.steps) > 0)
    if not (run.student or args.steps):
        raise ValueError("nothing to score: --dataset imagenet alone is the public teacher, and --steps names none of its rows")
    if any(not 1 <= T <= run.tokenizer.L for T in args.steps):
        raise ValueError(f"--steps should be between 1 and {run.tokenizer.L}, got {args.steps}")
    if run.cfg.dataset == "laion":
        raise ValueError("laion has no reference to compare with: --geneval --prompts FILE makes the images that GenEval scores")
    if run.cfg.dataset == "imagenet" and not args.reference:
        raise ValueError("imagenet needs --reference FILE: a folder of PNGs, or a .npz with mu and sigma, or ADM's with images")
    if run.cfg.dataset != "imagenet" and args.reference:
        raise ValueError(f"--reference is for imagenet; {args.run} is a run of {run.cfg.dataset} and has its own judge")
    folder = args.run or "."
    check_writable(folder)
    if args.reference:
        return official_report(args, run, folder, device)
    report(run, world(run.cfg, "test")[:2], args.run, args.images, args.seed, args.steps)


if __name__ == "__main__":
    run_command(main)
