"""evaluate.py - the scores: FID, Inception Score, precision and recall (Sec. 4).

    images (N, 3, H, W) uint8  -- extract, e.g. Inception -->  features (N, D), logits (N, C)
    features of generated images --+-- statistics --> mu, sigma --> frechet_distance       "FID" only with Inception's features
    reference (folder or .npz) ----+-- precision_recall (distances between single features)
    logits of generated images ------- inception_score

    python evaluate.py                                                  the small worlds: the table of the newest run, its own judge
    python evaluate.py --reference VIRTUAL_imagenet256_labeled.npz      imagenet: FID and the others of teacher and student, 50,000 images
    python evaluate.py --reference FILE --folder DIR                    the same scores of a folder of PNGs

Every metric is computed in float64 and follows one official implementation, named in its docstring; tests/golden holds their numbers.

    N images   D feature width   C classes   k neighbours   mu (D,), sigma (D, D): mean and covariance of features
"""
import hashlib
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

from sample import Parser, batches, generate, load_models, model_arguments, newest_run, run_command, sheet, shown_classes
from tokenizer import load_strictly, read_weights, source_name, to_float, to_uint8, world


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


# ------------------------------------------------------------------------------------------------ the FID Inception (Szegedy et al. 2015)
# Google's network of 2015-12-05 as ported to PyTorch, under its key names. Every mixed block is a list of branches, which all see its
# input and whose outputs are concatenated; a branch is a list of steps: a pool, a convolution (name, channels, kernel, stride = 1), or
# a list of two convolutions with the same input, concatenated as well.
pool = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)      # TensorFlow averages without the padding
pool_7c = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)            # a slip of the original in its last block, now part of FID
shrink = partial(F.max_pool2d, kernel_size=3, stride=2)


def block_a(width):
    return [[("branch1x1", 64, 1)],
            [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
            [pool, ("branch_pool", width, 1)]]


def block_c(c):
    row, column = (1, 7), (7, 1)
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, row), ("branch7x7_3", 192, column)],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, column), ("branch7x7dbl_3", c, row), ("branch7x7dbl_4", c, column),
             ("branch7x7dbl_5", 192, row)],
            [pool, ("branch_pool", 192, 1)]]


def block_e(pool):
    row, column = (1, 3), (3, 1)
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, row), ("branch3x3_2b", 384, column)]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), [("branch3x3dbl_3a", 384, row), ("branch3x3dbl_3b", 384, column)]],
            [pool, ("branch_pool", 192, 1)]]


BLOCKS = {                                                                     # output: channels, side
    "Mixed_5b": block_a(32), "Mixed_5c": block_a(64), "Mixed_5d": block_a(64),                 # 256, 288, 288 x 35
    "Mixed_6a": [[("branch3x3", 384, 3, 2)], [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)],
                 [shrink]],                                                                    # 768 x 17
    "Mixed_6b": block_c(128), "Mixed_6c": block_c(160), "Mixed_6d": block_c(160), "Mixed_6e": block_c(192),    # 768 x 17
    "Mixed_7a": [[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                 [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)), ("branch7x7x3_4", 192, 3, 2)],
                 [shrink]],                                                                    # 1280 x 8
    "Mixed_7b": block_e(pool), "Mixed_7c": block_e(pool_7c)}                                   # 2048 x 8


class Conv(nn.Module):
    """Convolution without bias, BatchNorm, ReLU. padding=None: "same" with stride 1, none with stride 2."""
    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        padding = ("same" if stride == 1 else 0) if padding is None else padding
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)                              # eps is not torch's default

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, h', w'), from a table like those above."""
    def __init__(self, c_in, branches):
        super().__init__()
        self.branches, self.c_out = [], 0
        for branch in branches:
            steps, c = [], c_in                                                # c: channels on the way along the branch
            for step in branch:
                if not callable(step):
                    convs = step if isinstance(step, list) else [step]
                    for name, *shape in convs:
                        self.add_module(name, Conv(c, *shape))
                    step, c = [name for name, *_ in convs], sum(channels for _, channels, *_ in convs)
                steps.append(step)
            self.branches.append(steps)
            self.c_out += c

    def forward(self, x):
        outputs = []
        for steps in self.branches:
            y = x
            for step in steps:
                y = step(y) if callable(step) else torch.cat([getattr(self, name)(y) for name in step], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def resize_tensorflow1(x, size):
    """Bilinear, source coordinate = i * in / out without the half pixel, no antialiasing. (B, C, H, W) float -> (B, C, size, size)."""
    def neighbours(n):
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (n / size)   # float32, like the original: the last bits count here
        low = at.long()
        return low, (low + 1).clamp(max=n - 1), at - low
    low, high, share = neighbours(x.shape[3])
    x = x[..., low] * (1 - share) + x[..., high] * share                       # (B, C, H, size)
    low, high, share = neighbours(x.shape[2])
    return x[:, :, low] * (1 - share[:, None]) + x[:, :, high] * share[:, None]


class Inception(nn.Module):
    """The feature network of FID and of the Inception Score, eval mode only.

    forward(images (B, 3, H, W) uint8) -> features (B, 2048), logits (B, 1008). The two paths are not interchangeable:
    path "pytorch-fid"   torch's bilinear resize to 299, [-1, 1]
         "legacy"        TensorFlow 1's resize and scaling, logits without bias: torch-fidelity, DiMO and the ADM references
    """
    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Conv(3, 32, 3, stride=2), Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Conv(64, 80, 1), Conv(80, 192, 3, padding=0)
        c = 192
        for name, branches in BLOCKS.items():
            self.add_module(name, Block(c, branches))
            c = getattr(self, name).c_out
        self.fc = nn.Linear(c, 1008)

    @torch.no_grad()
    def forward(self, images, path="pytorch-fid"):
        if images.dtype != torch.uint8:
            raise ValueError(f"Inception wants uint8 images: rounding to 8 bits is part of the score; got {images.dtype}")
        x = images.to(self.fc.weight.device).float()
        if path == "pytorch-fid":
            x = 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
        elif path == "legacy":
            x = (resize_tensorflow1(x, 299) - 128) / 128
        else:
            raise ValueError(f"path should be 'pytorch-fid' or 'legacy', got {path!r}")
        x = shrink(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))              # (B, 64, 73, 73)
        x = shrink(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))                  # (B, 192, 35, 35)
        for name in BLOCKS:
            x = getattr(self, name)(x)
        features = x.mean((2, 3))                                              # (B, 2048)
        return features, F.linear(features, self.fc.weight, self.fc.bias if path == "pytorch-fid" else None)


def load_inception(src):
    """The FID Inception, frozen, from pt_inception-2015-12-05-6726825d.pth (releases of mseitzer/pytorch-fid; torch-fidelity's is equal).

    src: a path or a state dict; keys must match exactly, but num_batches_tracked may be absent. ValueError in one line otherwise.
    """
    torch.backends.cudnn.allow_tf32 = False                                    # its 10 bits would move the score
    model, what = Inception(), "the FID Inception"
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}    # of no use here
    return load_strictly(model, read_weights(src, what) | counters, source_name(src, what)).requires_grad_(False)


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
            files, chunk = chunk, [read_png(file) for file in chunk]
            if len({image.shape for image in chunk}) > 1:
                raise ValueError(f"the images from {files[0]} on differ in size")
            chunk = torch.stack(chunk)
        f, l = extract(chunk)
        features.append(f.detach().float().cpu())
        logits.append(l.detach().float().cpu())
    return torch.cat(features).numpy(), torch.cat(logits).numpy()


def read_png(path):
    """File -> (3, H, W) uint8, never resized or cropped."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


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


def report(run, real, folder, n=960, seed=0, steps=(16, 8, 4, 2, 1)):
    """The paper's Table 2 in miniature: the teacher in 16 ... 1 steps and the student in one. Writes report.json and report.png.

    run      namespace of cfg, names, tokenizer, teacher, student, judge, step (sample.load_run)
    real     images (N, 3, H, W) uint8, labels (N,): real images that nothing was trained on
    n, seed  images per row, classes balanced, and their seed
    returns  the content of report.json; prints the table
    """
    images, labels = real
    c = torch.arange(n) % len(run.names)
    real_features, _ = judged(run.judge, images)
    real_statistics, real_spread = statistics(real_features), spread(images, labels)
    rows, shown, examples = [], [], shown_classes(run.cfg, len(run.names))
    def measure(name, step_count, fake, label, ms):
        features, logits = judged(run.judge, fake)
        precision, recall = precision_recall(real_features[:n], features)
        row = dict(model=name, steps=step_count, fd=frechet_distance(*real_statistics, *statistics(features)))
        if len(fake) >= 10:                                                    # a folder may have fewer real ones for 10 splits
            row["inception_score"] = inception_score(logits)[0]
        row |= dict(precision=precision, recall=recall, accuracy=float((logits.argmax(1) == label.numpy()).mean()))
        if run.cfg.dataset == "shapes":                                        # whose pixels `spread` can read
            spreads = {k: v / real_spread[k] for k, v in spread(fake, label).items()}
            row |= dict(spread=sum(spreads.values()) / 4, spreads=spreads)
        rows.append(row | dict(ms_per_image=ms))
        firsts = [int((label == k).float().argmax()) for k in examples]        # the first image of each class that is shown
        shown.append((f"{name} {step_count or ''}  FD {rows[-1]['fd']:.1f}", fake[firsts]))
    with torch.no_grad():
        x = to_float(images[:n]).to(run.tokenizer.E.device)
        decoded = torch.cat([run.tokenizer.decode(run.tokenizer.E[run.tokenizer.encode(part)]) for part in x.split(60)])
    measure("real", None, images[-n:], labels[-n:], None)                      # the floor: other real images, as many as each row has
    measure("round trip", None, to_uint8(decoded).cpu(), labels[:n], None)     # what the tokenizer alone costs
    for name, model, step_count in [("teacher", run.teacher, T) for T in steps] + [("student", run.student, 0)]:
        generate(model, run.tokenizer, c[:min(60, n // 4)], run.cfg, step_count, seed)      # warm-up, not timed
        begin = time.perf_counter()
        fake = generate(model, run.tokenizer, c, run.cfg, step_count, seed, progress=f"{name} {step_count or 1}")
        measure(name, step_count or 1, fake, c, 1000 * (time.perf_counter() - begin) / n)
    protocol = dict(dataset=run.cfg.dataset, images=n, seed=seed, labels="balanced", student_steps=run.step, guidance=run.cfg.guidance,
                    confidence_noise=run.cfg.confidence_noise, init_mask=run.cfg.init_mask, draft_temperature=run.cfg.draft_temperature,
                    reference=f"{len(images)} real images not trained on", features="the judge's (not the FID Inception's), 96 wide",
                    spread="standard deviation within a class of ground, size, x, y, relative to real images", batch=60,
                    device=str(run.tokenizer.E.device), versions=dict(torch=torch.__version__, numpy=np.__version__))
    content = dict(protocol=protocol, rows=rows)
    folder = Path(folder)
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    sheet(shown, [run.names[i] for i in examples]).save(folder / "report.png")
    print(table(content))
    return content


def cell(row, key, width, digits=2):
    """A number of a table; blank where there is none."""
    return " " * width if row.get(key) is None else f"{row[key]:>{width}.{digits}f}"


def table(content):
    """report.json's content -> text."""
    p = content["protocol"]
    lines = [f"{p['dataset']}: {p['images']} images a row, seed {p['seed']}, FD in features of the judge, reference {p['reference']}",
             f"{'model':<11}{'steps':>6}{'FD':>9}{'IS':>7}{'prec.':>7}{'recall':>8}{'acc.':>7}{'spread':>8}{'ms/image':>10}"]
    columns = dict(fd=9, inception_score=7, precision=7, recall=8, accuracy=7, spread=8, ms_per_image=10)
    lines += [f"{row['model']:<11}{row['steps'] or '':>6}" + "".join(cell(row, *column) for column in columns.items())
              for row in content["rows"]]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the table of ImageNet (Table 2)
INCEPTION = "pt_inception-2015-12-05-6726825d.pth"                             # ends in the beginning of its own sha256


def find_inception(given):
    """Path of the FID Inception's weights: the user's own, else weights/. They are on GitHub, not on the hub."""
    if given and not Path(given).is_file():
        raise ValueError(f"--inception-weights {given}: no such file")
    path = Path(given or f"weights/{INCEPTION}")
    if not path.is_file():
        raise ValueError(f"no weights for inception: put the file {INCEPTION} of https://github.com/mseitzer/pytorch-fid (release fid_weights) "
                         f"at {path}, or name it with --inception-weights")
    return path


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


def timed(images, spent):
    """The same batches; `spent` gets the seconds that making each one takes, without what is done with it."""
    begin = time.perf_counter()
    for chunk in images:
        spent.append(time.perf_counter() - begin)
        yield chunk
        begin = time.perf_counter()


def rows_of_models(run, target, extract, steps, n, seed, batch):
    """A row for the teacher in each of `steps` and one for the student, and their pictures: images go straight into features."""
    rows, shown, labels = [], [], torch.arange(n) % len(run.names)             # every class equally often
    models = [("teacher", run.teacher, T) for T in steps] + ([("student", run.student, 0)] if run.student else [])
    for name, model, step_count in models:
        spent = []
        examples = generate(model, run.tokenizer, shown_classes(run.cfg, len(run.names)), run.cfg, step_count, seed)   # a warm-up, too
        images = batches(model, run.tokenizer, labels, run.cfg, step_count, seed, batch, progress=f"{name} {step_count or 1}")
        row = dict(model=name, steps=step_count or 1, **scores(*collect(timed(images, spent), extract), target))
        rows.append(row | dict(ms_per_image=1000 * sum(spent) / n))
        shown.append((f"{name} {row['steps']}  FID {row['fid']:.1f}", examples))
    return rows, shown


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
                         confidence_noise=cfg.confidence_noise, init_mask=cfg.init_mask, draft_temperature=cfg.draft_temperature)
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
        rows, shown = [dict(model="folder", steps=None, **scores(*collect(files, extract, args.batch), target))], []
    else:
        rows, shown = rows_of_models(run, target, extract, args.steps, args.images, args.seed, args.batch)
    content = dict(protocol=protocol, rows=rows)
    (Path(folder) / "report.json").write_text(json.dumps(content, indent=1))
    if shown:
        sheet(shown, [run.names[i] for i in shown_classes(run.cfg, len(run.names))]).save(Path(folder) / "report.png")
    print(official_table(content))
    return content


def official_table(content):
    """report.json's content -> text: the protocol, then the columns of Table 2."""
    lines = [f"{key}: {value}" for key, value in content["protocol"].items()]
    lines += [f"{'model':<11}{'steps':>6}{'FID':>9}{'IS':>9}{'+-':>7}{'prec.':>7}{'recall':>8}{'ms/image':>10}"]
    columns = dict(fid=9, inception_score=9, inception_score_std=7, precision=7, recall=8, ms_per_image=10)
    lines += [f"{row['model']:<11}{row['steps'] or '':>6}" + "".join(cell(row, *column) for column in columns.items())
              for row in content["rows"]]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the command
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
    model_arguments(parser)
    args = parser.parse_args()
    args.images = args.images if args.images is not None else 50_000 if args.reference else 960
    args.steps = args.steps if args.steps is not None else (16, 8, 4, 2) if args.reference else (16, 8, 4, 2, 1)
    least = 10 if args.reference else 48
    if args.images < least or args.seed < 0 or args.batch < 1:
        raise ValueError(f"--images should be at least {least}, --batch 1 and --seed 0, got {args.images}, {args.batch} and {args.seed}")
    if args.folder and not args.reference:
        raise ValueError("--folder needs --reference: what to compare the images with")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.folder:
        return official_report(args, None, ".", device)
    public = args.student or args.dataset
    args.run = args.run or (None if public else newest_run())
    run = load_models(args, device, student=not args.dataset, teacher=len(args.steps) > 0)
    if not (run.student or args.steps):
        raise ValueError("nothing to score: --dataset imagenet alone is the public teacher, and --steps names none of its rows")
    if any(not 1 <= T <= run.tokenizer.L for T in args.steps):
        raise ValueError(f"--steps should be between 1 and {run.tokenizer.L}, got {args.steps}")
    if run.cfg.dataset == "imagenet" and not args.reference:
        raise ValueError("imagenet needs --reference FILE: a folder of PNGs, or a .npz with mu and sigma, or ADM's with images")
    if run.cfg.dataset != "imagenet" and args.reference:
        raise ValueError(f"--reference is for imagenet; {args.run} is a run of {run.cfg.dataset} and has its own judge")
    if args.reference:
        official_report(args, run, "." if public else args.run, device)
    else:
        report(run, world(run.cfg, "test")[:2], args.run, args.images, args.seed, args.steps)


if __name__ == "__main__":
    run_command(main)
