"""fpd.py - Fixed-Point Distillation: the paper's Sec. 3.1 to 3.4, in its order.

z_init --student--> logits --sample--> draft z_hat --hide a share r--> z_masked --teacher--> z_ref
 (almost all hidden)  |     (Eq. 4)      |                              (M_r)     (Eq. 5)      |
                      |                  | E[z_hat], straight-through (Eq. 8)         E[z_ref] |
                      |                  +--> decoder --> Phi --> X --+                        |
                      |                        drift loss (Eq. 6, 7) -+- Y <-- Phi <-- decoder +
                      +<--------------- gradient -------------+

The student is right when its drafts have the distribution of their own refinements, for every r:
a fixed point (Eq. 3). `fpd_step` is one step towards it; `fixed_point` goes there by itself.
With `fpd_step` the method is complete. Below it: the teachers' own samplers, the optional GAN, and,
for comparison, Di[M]O and SDTT.

    B drafts   L tokens each   K codes (mask id = K)   d code width  c condition   E (K, d) codebook
    r share of hidden positions   is_masked (B, L) bool, True = hidden   guidance s: u + s (c - u)
    generator: one torch.Generator for the batch, or a list of B, one per image (then image i does
    not depend on its batch). Nothing in a training step makes the host wait for a GPU.
"""
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tokenizer as tok
from drift import drift_loss
from models import ConvNet, Discriminator, load_discriminator


# ---------------------------------------------------------------- randomness
def generators(seed, first, n, device):
    """One generator per image: image 1234 is the same picture at batch size 8 and 256.

    (The streams of CPU and GPU differ.)
    """
    return [torch.Generator(device).manual_seed(seed * 1_000_000 + first + i) for i in range(n)]


def uniform(shape, generator, device):
    """Uniform numbers of `shape` (B, ...) from one generator, or row i from generator[i]."""
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device).to(device)
    rows = [torch.rand(shape[1:], generator=g, device=g.device) for g in generator]
    return torch.stack(rows).to(device)


def gumbel(shape, generator, device):
    """Standard Gumbel noise: argmax(logits + gumbel) is a sample of softmax(logits)."""
    exponential = -uniform(shape, generator, device).clamp(min=1e-20).log()
    return -exponential.log()


def draw(logits, temperature, generator):
    """One token per position. logits (B, L, K), the temperature divides -> z (B, L)."""
    logits = logits.float()
    return (logits / temperature + gumbel(logits.shape, generator, logits.device)).argmax(-1)


# ---------------------------------------------------------------- masking (Sec. 3.1)
def mask_ratio(t, schedule="arccos"):
    """gamma of Eq. 1: the share of hidden positions.

    Our t runs the other way than the paper's, with sampling: from 0 (all hidden) to 1 (none)
    """
    schedules = {"arccos": lambda t: torch.arccos(t) / (math.pi / 2),
                 "cosine": lambda t: torch.cos(t * math.pi / 2),
                 "linear": lambda t: 1 - t,
                 "square": lambda t: 1 - t ** 2,
                 "root": lambda t: 1 - t.sqrt()}
    if schedule not in schedules:
        raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(schedules)}")
    return schedules[schedule](t)


def random_order(shape, generator, device):
    """A random order of the positions of each image: the rank of every position. -> (B, L) long"""
    return uniform(shape, generator, device).argsort(1).argsort(1)


def hide(order, r):
    """The first positions of an order (B, L), a share r (B,) of them. -> (B, L) bool, True = hidden

    The count is exact, max(1, round(r L)), where Eq. 1 tosses a coin for each position: every image
    is then refined at the r that was drawn. A smaller share of one order lies within a larger one.
    """
    n = (r * order.shape[1]).round().clamp(min=1)                   # (B,), never none
    return order < n[:, None]


def remask(z, r, mask_id, generator):
    """M_r of Eq. 5: hide a share r of each draft (Eq. 1).

    z (B, L), r (B,) -> z_masked (B, L), is_masked (B, L)
    """
    is_masked = hide(random_order(z.shape, generator, z.device), r.to(z.device))
    return z.masked_fill(is_masked, mask_id), is_masked


def sample_ratio(B, low, high, generator, device="cpu"):
    """r ~ pi of Eq. 5: the teacher's training law arccos(u) 2/pi, cut to [low, high]. -> (B,)"""
    # by the inverse of its cumulative distribution
    u_low, u_high = math.cos(high * math.pi / 2), math.cos(low * math.pi / 2)
    return mask_ratio(u_low + (u_high - u_low) * uniform((B,), generator, device), "arccos")


# ---------------------------------------------------------------- the teacher (Sec. 3.1)
def guided_logits(model, z, c, s):
    """u + s (c - u), from one pass over the doubled batch; s = 1 needs no unconditional half.

    -> (B, L, K) float32
    """
    if s == 1:
        return model(z, c).float()
    drop = torch.arange(2 * len(z), device=z.device) >= len(z)      # True: the unconditional half
    logits = model(torch.cat([z, z]), torch.cat([c, c]), drop).float()
    cond, uncond = logits.chunk(2)
    return uncond + s * (cond - uncond)


# ---------------------------------------------------------------- the fixed point (Sec. 3.2)
def init_tokens(B, L, K, r_init, generator, device="cpu"):
    """z_init of Eq. 4: a share r_init of mask ids, the rest uniform random codes. -> (B, L)

    It is the only noise that the student gets: which positions are visible, and their codes.
    """
    codes = (uniform((B, L), generator, device) * K).long()
    if r_init == 0:
        return codes
    r = torch.full((B,), float(r_init), device=device)
    return remask(codes, r, K, generator)[0]


@torch.no_grad()
def refine(teacher, z_masked, c, s, generator):
    """T_phi^r of Eq. 5: the teacher fills the hidden positions of z_masked (B, L), guidance s.

    Visible tokens stay. Every hidden position is sampled, not maximised: Eq. 3 is of distributions.
    And all are filled, in one pass: the result has to be decoded.   -> z_ref (B, L), codes only
    """
    logits = guided_logits(teacher, z_masked, c, s)                 # (B, L, K)
    return torch.where(z_masked == teacher.K, draw(logits, 1.0, generator), z_masked)


def correct(teacher, z, c, cfg, generator):
    """The operator of Eq. 3, T_phi^r after M_r: hide a share r ~ pi of z (B, L), let it be refined.

    -> z_ref (B, L), is_masked (B, L)
    """
    r = sample_ratio(len(z), *cfg.remask, generator, z.device)
    z_masked, is_masked = remask(z, r, teacher.K, generator)        # M_r
    z_ref = refine(teacher, z_masked, c, cfg.teacher_cfg, generator)    # T_phi^r
    return z_ref, is_masked


def fixed_point(teacher, z, c, cfg, generator, rounds):
    """Tokens z (B, L) after `rounds` of Eq. 3's operator: near its fixed point. -> (B, L)

    That is the distribution which the student is asked to draw. No training is needed to see it:
    from samples of the teacher it shows in seconds what pi and guidance promise.
    """
    for _ in range(rounds):
        z, _ = correct(teacher, z, c, cfg, generator)
    return z


# ---------------------------------------------------------------- the lift (Sec. 3.3)
class Lift:
    """E[z] -> images -> features (Sec. 3.3): decoder, then Phi; one X (B, F, D) for each block.

    Both are frozen, yet gradients pass. cfg: blocks, grid (F = grid^2 positions), space, and
    lift_chunk: that many images at a time, nothing kept but what comes out, and the backward pass
    computes the rest again. Exact, since neither decoder nor Phi looks at more than one image.
    mark: is told which part of a step begins (train.py --bench)
    """
    def __init__(self, tokenizer, phi, cfg, mark=lambda part: None):
        self.tokenizer, self.phi, self.cfg, self.mark = tokenizer, phi, cfg, mark

    def in_chunks(self, f, *inputs):
        """f, which returns a list of tensors, on `lift_chunk` rows of the inputs at a time."""
        n = self.cfg.lift_chunk
        if n is None:
            return f(*inputs)
        parts = zip(*(x.split(n) for x in inputs))
        results = [checkpoint(f, *part, use_reentrant=False) for part in parts]
        return [torch.cat(pieces) for pieces in zip(*results)]

    def decode(self, e, c):
        """Code embeddings (B, L, d), condition (B, ...) -> images (B, 3, H, W).

        No clamp: it would stop the gradient.
        """
        self.mark("decode")
        return self.in_chunks(self.decoded, e, c)[0]

    def decoded(self, e, c):
        """In the precision of the decoder's own weights: under autocast its norms would be float32,
        with copies before and after each, a quarter of a training step's time on a GPU."""
        dtype = next(self.tokenizer.decoder.parameters()).dtype
        with torch.autocast(e.device.type, enabled=False):
            c = c.to(dtype) if c.is_floating_point() else c         # text, not labels
            return [self.tokenizer.decode(e.to(dtype), c)]

    def features(self, images):
        """Images (B, 3, H, W) -> list of X (B, F, D)."""
        self.mark("lift")
        X = self.in_chunks(self.maps, images)
        self.mark("drift")
        return X

    def maps(self, images):
        grid = self.cfg.grid
        if self.cfg.space == "pixel":                               # Table 4a: nothing learned
            side = images.shape[-1] // grid                         # what is left over stays out
            pixels = images[..., :grid * side, :grid * side]
            return [F.unfold(pixels, side, stride=side).transpose(1, 2)]    # (B, F, 3 side^2)
        maps = self.phi.maps(images)
        if isinstance(self.phi, ConvNet):                           # a Backbone chooses itself
            maps = [maps[block] for block in self.cfg.blocks]
        X = []
        for m in maps:                                              # (B, D, h, w)
            # every location weighs the same
            m = F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]).permute(0, 3, 1, 2)
            X.append(F.adaptive_avg_pool2d(m, grid).flatten(2).transpose(1, 2))     # (B, F, D)
        return X


def per_class_groups(X, n):
    """Fold the classes of a batch into the position axis: only drafts of one class are compared.

    As in the drifting paper (Deng et al. 2026). (G n, F, D) -> (n, G F, D)
    """
    return X.unflatten(0, (-1, n)).transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------- the student (Sec. 3.4)
def straight_through(logits, E, generator, temperature=1.0, soft=False):
    """Hard codes forward, soft gradients backward (Eq. 8).

    logits (B, L, K) of the student; E (K, d); temperature of the draft (divides)
    soft      feed the decoder the mixture e_soft instead, the other row of Table 3a
    returns   z_hat (B, L), the sampled draft, and e (B, L, d): E[z_hat] bit for bit unless soft
    """
    logits, E = logits.float(), E.float()
    z_hat = draw(logits, temperature, generator)                    # Eq. 4, z_hat ~ p_theta
    # in float32: in bfloat16, codes that are near each other would get the same gradient
    with torch.autocast(logits.device.type, enabled=False):
        # the mean code. At temperature 1, also of colder drafts: a token that is nearly sure would
        # get nearly no gradient, right or wrong
        e_soft = logits.softmax(-1) @ E                             # (B, L, d)
    if soft:
        return z_hat, e_soft
    # Eq. 8: the bracket is exactly 0, its gradient is that of e_soft. The other common order,
    # e_soft + (E[z_hat] - e_soft).detach(), rounds
    e = E[z_hat] + (e_soft - e_soft.detach())
    return z_hat, e


def one_step(student, c, r_init, generator, temperature=1.0):
    """An image's tokens in one pass (Eq. 4), as at inference. c (B, ...) -> z_hat (B, L)."""
    z_init = init_tokens(len(c), student.L, student.K, r_init, generator, c.device)
    return draw(student(z_init, c), temperature, generator)


def entropy(logits):
    """Of the distributions of tokens, in nats per token. (..., K) -> ()"""
    p = logits.float().softmax(-1)
    return -(p * p.clamp(min=1e-20).log()).sum(-1).mean()


def codes_used(z_hat, K):
    """How many of the K codes occur in the drafts (B, L). -> ()"""
    used = torch.zeros(K, device=z_hat.device)
    return used.scatter_(0, z_hat.flatten(), 1.0).sum()


def fpd_step(student, teacher, lift, E, c, cfg, generator):
    """One training step up to the loss (Sec. 3.2 to 3.4). The caller runs backward.

    student, teacher  MaskGIT or MaskGen, (B, L), (B, ...) -> (B, L, K); the teacher is frozen
    lift              a Lift: E[z] -> images -> features (Sec. 3.3)
    E (K, d)          the tokenizer's codebook
    c (B, ...)        condition, labels or text, in runs of cfg.per_class equal ones. Only the
                      drafts of a run are compared; if per_class is 1, all of the batch
    returns           loss (); logs (dict of 0-dim tensors); images (B, 3, H, W), the decoded
                      drafts, through which all of the gradient passes
    """
    B, K = len(c), student.K
    n = B if cfg.per_class == 1 else cfg.per_class                  # drafts that are compared
    # draft (Eq. 4): one pass over an almost hidden canvas
    z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, c.device)   # (B, L)
    logits = student(z_init, c)                                     # (B, L, K)
    z_hat, e = straight_through(logits, E, generator, cfg.temperature,    # (B, L), (B, L, d)
                                soft=cfg.estimator == "soft")
    # refinement (Eq. 5): hide a part of the draft, let the frozen teacher fill it in
    with torch.no_grad():
        source = z_hat
        if cfg.draft == "random":                                   # Table 3b
            source = init_tokens(B, student.L, K, 0, generator, c.device)
        z_ref, is_masked = correct(teacher, source, c, cfg, generator)  # (B, L)
        Y = lift.features(lift.decode(E[z_ref], c))                 # targets are constants
    # lift the draft (Sec. 3.3), with gradient
    images = lift.decode(e, c)                                      # (B, 3, H, W)
    X = lift.features(images)                                       # list of (B, F, D)
    # drift (Eq. 6, 7), one term for each block
    loss, logs = 0.0, {}
    for x, y in zip(X, Y):
        block_loss, block_logs = drift_loss(
            per_class_groups(x, n), per_class_groups(y, n), cfg.bandwidths,
            joint=cfg.affinity == "joint", self_negative=cfg.own_pair, own_target=cfg.own_pair)
        loss = loss + block_loss
        for name, value in block_logs.items():
            logs[name] = logs.get(name, 0.0) + value / len(X)
    with torch.no_grad():                                           # a collapse shows here first
        logs["entropy"] = entropy(logits)
        logs["codes_used"] = codes_used(z_hat, K)
        # share of the hidden tokens that the teacher replaced
        logs["changed"] = (z_ref != source).float().sum() / is_masked.sum()
    return loss, logs, images


# ---------------------------------------------------------------- T-step samplers (Sec. 3.1)
# The teachers as their authors sample them: what one step is compared with. No training step of FPD
# needs them.
def check_steps(steps, L):
    if not 1 <= steps <= L:
        raise ValueError(f"steps must be between 1 and the {L} tokens of an image, got {steps}")


def reveal_counts(L, steps, schedule="arccos"):
    """How many of L tokens the official MaskGIT sampler fixes in each step -> `steps` ints, sum L.

    At least 1 each, until all are fixed: with nearly as many steps as tokens, the last steps have
    nothing left to do (0).
    """
    check_steps(steps, L)
    if steps == 1:
        return [L]                                                  # official: a division by zero
    v = mask_ratio(torch.linspace(1, 0, steps), schedule)
    counts = (v / v.sum() * L).round().clamp(min=1).long()
    counts[-1] += L - counts.sum()
    # the table overshoots with many steps, and the sampler stops early
    total = counts.cumsum(0).clamp(max=L)
    return total.diff(prepend=total.new_zeros(1)).tolist()


@torch.no_grad()
def sample(teacher, c, steps, generator, s=1.0, temperature=1.0, noise=4.5, schedule="arccos"):
    """The official MaskGIT sampler: T steps of "predict all, keep the most confident" (Sec. 3.1).

    teacher      a MaskGIT; c (B,) labels
    s            guidance of the last step. It ramps up linearly from 1 (none) in the first step, so
                 a single step has none
    temperature  divides the logits before a token is drawn
    noise        Gumbel noise on the confidence, falls linearly to 0
    returns      z (B, L), codes only
    """
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                      # all hidden: z_T of Sec. 3.1
    for i, count in enumerate(reveal_counts(L, steps, schedule)):
        ramp = i / max(1, steps - 1)
        logits = guided_logits(teacher, z, c, 1 + (s - 1) * ramp)
        logits = logits / temperature                               # (B, L, K)
        tokens = draw(logits, 1.0, generator)                       # (B, L)
        confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        confidence = confidence + noise * (1 - ramp) * gumbel((B, L), generator, c.device)
        confidence = confidence.masked_fill(z < K, -math.inf)       # what is fixed stays fixed
        chosen = confidence.topk(count, dim=1).indices              # (B, count)
        z = z.scatter(1, chosen, tokens.gather(1, chosen))
    return z


def remask_counts(L, steps):
    """How many of L tokens the official MaskGen sampler hides again after each step.

    -> list of `steps` ints, falling to 0 in the last
    """
    check_steps(steps, L)
    counts = [L]                                                    # before the first step
    for ratio in mask_ratio(torch.arange(1, steps) / steps).tolist():
        # at least one is revealed, and one left for the next step
        counts.append(max(1, min(counts[-1] - 1, math.floor(L * ratio))))
    return counts[1:] + [0]


@torch.no_grad()
def sample_maskgen(teacher, c, steps, generator, s=13.0, noise=2.0, ramp="cosine"):
    """The official MaskGen sampler: T steps of "predict all, hide the least confident again".

    teacher   a MaskGen; c (B, rows, W) text
    s         guidance of the last step. It ramps up from 2 (from s if that is less), along half a
              "cosine" wave or "linear". Officially one less, since they write c + g (c - u): their
              guidance_scale 12 is our 13, and their ramp from 1 is ours from 2
    noise     Gumbel noise on the choice of a token and on the confidence, falls linearly to 0: the
              last step takes the likeliest tokens
    returns   z (B, L), codes only
    """
    ramps = {"cosine": lambda t: (1 - math.cos(math.pi * t)) / 2, "linear": lambda t: t}
    if ramp not in ramps:
        raise ValueError(f"unknown ramp {ramp!r}; there are {', '.join(ramps)}")
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                      # all hidden: z_T of Sec. 3.1
    for i, count in enumerate(remask_counts(L, steps)):
        t = (i + 1) / steps                                         # a single step: no noise
        weight = min(2, s) + (s - min(2, s)) * ramps[ramp](t)
        logits = guided_logits(teacher, z, c, weight)
        logits = logits / (0.5 + 0.8 * (1 - t))                     # (B, L, K), ever sharper
        noisy = logits + noise * (1 - t) * gumbel(logits.shape, generator, c.device)
        tokens = noisy.argmax(-1)                                   # (B, L)
        confidence = logits.gather(-1, tokens[..., None])[..., 0]
        confidence = confidence + noise * (1 - t) * gumbel((B, L), generator, c.device)
        confidence = torch.where(z == K, confidence, math.inf)      # what is fixed stays fixed
        z = torch.where(z == K, tokens, z)
        z.scatter_(1, confidence.topk(count, dim=1, largest=False).indices, K)
    return z


def sample_teacher(teacher, c, steps, generator, s, noise):
    """The teacher's own sampler: MaskGen, which has an empty caption, or MaskGIT. -> z (B, L)"""
    sampler = sample_maskgen if hasattr(teacher, "empty") else sample
    return sampler(teacher, c, steps, generator, s=s, noise=noise)


# ---------------------------------------------------------------- the GAN (Sec. 3.4), optional
def axis_of(size, shift, centre):
    """DiffAugment along one axis of `size` pixels: what it moves, and what it cuts out.

    shift, centre (B, 1) in [0, 1) -> source, outside, in_hole, all (B, size): the pixel that lands
    here, whether none does, and whether the hole covers it
    """
    most = int(size / 8 + 0.5)                                      # an eighth, either way
    hole = int(size / 5 + 0.5)                                      # a fifth of the side
    at = torch.arange(size, device=shift.device)
    moved = at + (shift * (2 * most + 1)).long() - most
    source = moved.clamp(0, size - 1)
    start = (centre * (size + 1 - hole % 2)).long() - hole // 2     # at the border it is cut off
    return source, moved != source, (at >= start) & (at < start + hole)


def diff_augment(images, generator):
    """DiffAugment (Zhao et al. 2020): colour, translation, cutout, drawn per image.

    (B, 3, H, W) -> the same shape; the gradient passes. The discriminator sees real images and
    drafts only so: a small set of real ones cannot be learned by heart. Ours are in [-1, 1] here;
    officially each network's input normalisation comes first, which makes the colours that DeiT
    sees vary half as much.
    """
    B, C, H, W = images.shape
    u = uniform((B, 7), generator, images.device)
    brightness, saturation, contrast = u[:, :3, None, None, None].unbind(1)     # (B, 1, 1, 1) each
    x = images + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (0.5 + contrast) * (x - mean)
    row, no_row, hole_row = axis_of(H, u[:, 3:4], u[:, 5:6])        # (B, H) each
    column, no_column, hole_column = axis_of(W, u[:, 4:5], u[:, 6:7])   # (B, W) each
    x = x.gather(2, row[:, None, :, None].expand(B, C, H, W))
    x = x.gather(3, column[:, None, None, :].expand(B, C, H, W))
    outside = no_row[:, :, None] | no_column[:, None, :]            # (B, H, W)
    hole = hole_row[:, :, None] & hole_column[:, None, :]
    return x.masked_fill((outside | hole)[:, None], 0.0)


def blur_sigma(seen, image_size=256, fade=300_000):
    """Width of the blur, in pixels, once the discriminator has seen so many images.

    It falls to 0, so that shapes come before texture. Officially from 2 pixels of 256; images of 32
    pixels are as good as unblurred from the beginning.
    """
    return 2.0 * image_size / 256 * max(0.0, 1 - seen / fade)


def blur(images, sigma):
    """Images (B, 3, H, W) blurred with the kernel 2^-(x / sigma)^2.

    It is cut off at floor(3 sigma) pixels; zeros stand beyond the border.
    """
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    x = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp2(-(x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype).expand(3, 1, -1)  # (3, 1, 2 radius + 1)
    images = F.conv2d(images, kernel[..., None], padding=(radius, 0), groups=3)
    return F.conv2d(images, kernel[:, :, None], padding=(0, radius), groups=3)


def gan_logits(discriminator, images, generator, sigma=0.0):
    """What the discriminator says to images (B, 3, H, W), real or drafts, as in training.

    -> list of (B, n), one for each feature network. Real images and drafts come in two calls: each
    has its own batch statistics. sigma: of `blur_sigma`
    """
    return discriminator(blur(images, sigma), lambda x: diff_augment(x, generator))


def row_mean(logits, f):
    """Mean of f over images and logits, then over the networks, which count alike. -> ()"""
    return torch.stack([f(x.float()).mean() for x in logits]).mean()


def gan_loss(fake):
    """L_gan of the student (Sec. 3.4, hinge): high logits for its drafts. list of (B, n) -> ()

    The official loss is the sum over images and networks, len(fake) * B times this one (also
    below): lambda would depend on B.
    """
    return row_mean(fake, lambda x: -x)


def discriminator_loss(real, fake):
    """Hinge loss of the discriminator: real logits above 1, the drafts' below -1. -> ()"""
    return row_mean(real, lambda x: F.relu(1 - x)) + row_mean(fake, lambda x: F.relu(1 + x))


def gan_step(discriminator, opt, images, real, seen, generator):
    """One step of the discriminator on drafts and real images, then what it tells the student.

    images, real   (B, 3, H, W), drafts and real images
    opt, seen      the discriminator's optimiser, and how many drafts it has seen before
    returns        d L_gan / d images (B, 3, H, W); logs: logits of real images and drafts, its loss
    """
    sigma, drafts = blur_sigma(seen, images.shape[-1]), images.detach()
    discriminator.train().requires_grad_(True)
    on_real = gan_logits(discriminator, real, generator, sigma)
    on_drafts = gan_logits(discriminator, drafts, generator, sigma)
    loss = discriminator_loss(on_real, on_drafts)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    discriminator.requires_grad_(False)
    drafts.requires_grad_(True)
    students_loss = gan_loss(gan_logits(discriminator, drafts, generator, sigma))
    gradient, = torch.autograd.grad(students_loss, drafts)
    logs = dict(gan_real=row_mean(on_real, lambda x: x), gan_fake=row_mean(on_drafts, lambda x: x),
                gan_loss=loss)
    return gradient, {key: value.detach() for key, value in logs.items()}


class Gan:
    """The discriminator, its optimiser and its real images (Sec. 3.4).

    Nothing else in the distillation sees a real image. Which ones come next follows from the seed,
    the process (rank) and how many were seen, so that files are read while a step is under way.
    """
    def __init__(self, cfg, parts, device, rank=0, processes=1):
        self.size, self.weight = parts.tokenizer.image_size, cfg.gan_weight
        self.seed, self.rank, self.processes, self.device = cfg.seed, rank, processes, device
        torch.manual_seed(cfg.seed)                                 # the random discriminator's
        if hasattr(parts, "real_files"):                            # official networks
            self.images = parts.real_files
            self.discriminator = load_discriminator(parts.discriminator_files, self.size, device)
        else:
            if cfg.dataset in ("shapes", "scenes", "folder"):
                self.images = tok.world(cfg, "train")[0]
            else:                                                   # --smoke: any of their size
                self.images = tok.shapes(torch.arange(240) % 24, 0, size=self.size)
            networks = {"phi": parts.phi}
            self.discriminator = Discriminator(networks, self.size, width=16).to(device)
        heads = self.discriminator.discriminators.parameters()
        # as in StyleGAN-XL; the paper names no settings of its discriminator
        self.opt = torch.optim.Adam(heads, lr=2e-3, betas=(0.0, 0.99))
        self.seen = 0                                               # drafts, of all processes
        self.reader, self.ahead = ThreadPoolExecutor(1), None       # the next step's real images

    def read(self, n, seen):
        """The n real images of the step that begins with `seen`. -> (n, 3, H, W) in [-1, 1]"""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + seen + self.rank * n)
        picks = torch.randint(len(self.images), (n,), generator=generator).tolist()
        images = [self.images[i] for i in picks]
        images = [tok.read_image(x, self.size) if isinstance(x, Path) else x for x in images]
        images = tok.to_float(torch.stack(images))
        return images.pin_memory() if self.device == "cuda" else images     # copied without a wait

    def real(self, n):
        """This step's real images (n, 3, H, W); the next step's are read meanwhile."""
        now = self.ahead or self.reader.submit(self.read, n, self.seen)
        self.ahead = self.reader.submit(self.read, n, self.seen + n * self.processes)
        return now.result()

    def add(self, gradient, images, generator):
        """Adds the GAN's gradient to the drift loss's, both at the decoded drafts (B, 3, H, W).

        The GAN's is brought to `gan_weight` times the size of the drift's: lambda of Sec. 3.4 then
        means the same for every network. -> the sum, logs
        """
        real = self.real(len(images)).to(images, non_blocking=True)
        gan, logs = gan_step(self.discriminator, self.opt, images, real, self.seen, generator)
        self.seen += len(images) * self.processes                   # all teach the same one
        share = self.weight * gradient.norm() / gan.norm().clamp(min=1e-12)
        logs["gan_scale"] = share                                   # lambda of the paper's sum
        return gradient + share * gan, logs

    def state(self):
        return dict(heads=self.discriminator.state_dict(), opt=self.opt.state_dict(),
                    seen=self.seen)

    def load(self, state):
        self.discriminator.load_state_dict(state["heads"])
        self.opt.load_state_dict(state["opt"])
        self.seen, self.ahead = state["seen"], None

    @staticmethod
    def verdict(logs):
        """A discriminator that no longer helps, in words, or None.

        Hinge: the logits of real images want to be above 1, those of drafts below -1.
        """
        if logs["gan_real"] > 1 and logs["gan_fake"] < -1:
            return ("the discriminator wins: it tells every draft from every real image; "
                    "a smaller --gan-weight may help")
        if abs(logs["gan_real"] - logs["gan_fake"]) < 0.02:
            return "the discriminator is lost: real images and drafts look the same to it"


# ---------------------------------------------------------------- for comparison: Di[M]O (Table 2)
# Here the paper's method ends. What follows are two other methods, over the same networks.
def masked_mean(x, is_masked):
    """Mean of x (B, L) over the hidden positions. -> ()"""
    return (x * is_masked).sum() / is_masked.sum()


def dimo_step(student, teacher, auxiliary, opt, c, cfg, generator):
    """One training step of Di[M]O (Zhu et al. 2025): token-level matching on the student's drafts.

    What a teacher of these drafts would answer to a partly hidden one, the student cannot say: it
    knows z_init alone. So the auxiliary learns it from the drafts. Where teacher and auxiliary
    disagree, measured by KL(teacher, auxiliary) as in its released configuration, the student's
    logits of the same positions are pushed as the auxiliary's should be. No gradient passes a
    sampled token, a decoder or Phi. The caller runs backward.

    auxiliary, opt   a copy of the teacher, and its own optimiser: both take a step here
    returns          loss (), whose value is the divergence per hidden token; logs
    """
    B, K, device = len(c), student.K, c.device
    z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, device)
    logits = student(z_init, c).float() / cfg.temperature     # (B, L, K)
    z_hat = draw(logits, 1.0, generator)                            # (B, L)

    def hide_some():
        """r as in the teacher's training."""
        return remask(z_hat, sample_ratio(B, 0, 1, generator, device), K, generator)

    z_masked, is_masked = hide_some()
    with torch.no_grad():
        log_p = guided_logits(teacher, z_masked, c, cfg.teacher_cfg).log_softmax(-1)  # (B, L, K)
        q = auxiliary(z_masked, c).float()
    # autocast keeps weights that it cast under no_grad, and they would get no gradient below
    torch.clear_autocast_cache()
    q.requires_grad_()
    kl = F.kl_div(q.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)   # (B, L)
    divergence = masked_mean(kl, is_masked)
    gradient, = torch.autograd.grad(divergence, q)
    # the bracket is 0: `gradient` goes to the student's logits as it is
    loss = divergence.detach() + (gradient * (logits - logits.detach())).sum()
    # the auxiliary: the teacher's own training (Eq. 2), with drafts in place of data
    z_masked, is_masked = hide_some()
    surprise = F.cross_entropy(auxiliary(z_masked, c).float().transpose(1, 2), z_hat,
                               reduction="none")                    # (B, L)
    auxiliary_loss = masked_mean(surprise, is_masked)
    opt.zero_grad(set_to_none=True)
    auxiliary_loss.backward()
    opt.step()
    logs = dict(auxiliary_loss=auxiliary_loss.detach(), entropy=entropy(logits.detach()),
                codes_used=codes_used(z_hat, K))
    return loss, logs


class DiMO:
    """Di[M]O's auxiliary network and its optimiser (`dimo_step`)."""
    def __init__(self, cfg, parts):
        self.cfg, self.teacher = cfg, parts.teacher
        self.auxiliary = copy.deepcopy(parts.teacher).requires_grad_(True)
        # never slower than the student that it follows
        self.opt = torch.optim.AdamW(self.auxiliary.parameters(), lr=cfg.lr, weight_decay=0.0)

    def step(self, student, c, step, generator):
        return dimo_step(student, self.teacher, self.auxiliary, self.opt, c, self.cfg, generator)

    def state(self):
        return dict(auxiliary=self.auxiliary.state_dict(), opt=self.opt.state_dict())

    def load(self, state):
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.opt.load_state_dict(state["opt"])


# ---------------------------------------------------------------- for comparison: SDTT (Table 2)
def sdtt_target(teacher, z, c, now, middle, s, generator):
    """What two of the teacher's steps say to the positions that one step of the student fills.

    z (B, L)   codes, of which the share `now` (B,) is hidden at first, and `middle` (B,) still
               after the teacher's first step
    returns    z_masked (B, L), is_masked (B, L), logits (B, L, K): at the positions revealed first
               those of the first step, else of the second
    """
    order = random_order(z.shape, generator, z.device)
    is_masked, still = hide(order, now), hide(order, middle)        # (B, L) each
    z_masked = z.masked_fill(is_masked, teacher.K)
    first = guided_logits(teacher, z_masked, c, s)
    halfway = torch.where(is_masked & ~still, draw(first, 1.0, generator), z_masked)
    second = guided_logits(teacher, halfway, c, s)
    return z_masked, is_masked, torch.where(still[..., None], second, first)


def sdtt_step(student, teacher, z, c, steps, s, generator):
    """One training step of SDTT (Deschenaux and Gulcehre 2024). The caller runs backward.

    One of the student's `steps` learns two of the teacher's, which takes twice as many.
    z (B, L)  images' tokens; with steps = 1 everything is hidden, and they do not matter
    s         guidance of the teacher
    returns   loss (), KL(student, teacher) per hidden token, their default; logs
    """
    with torch.no_grad():
        t = (uniform((len(z),), generator, z.device) * steps).floor()  # (B,), step 0 .. steps - 1
        now, middle = mask_ratio(t / steps), mask_ratio((t + 0.5) / steps)
        z_masked, is_masked, target = sdtt_target(teacher, z, c, now, middle, s, generator)
    logits = student(z_masked, c).float()                           # (B, L, K)
    kl = F.kl_div(target.log_softmax(-1), logits.log_softmax(-1), log_target=True,
                  reduction="none").sum(-1)                         # (B, L)
    return masked_mean(kl, is_masked), dict(entropy=entropy(logits.detach()))


class SDTT:
    """SDTT's teacher of the round (`sdtt_step`).

    Four rounds of equal length, 16 -> 8 -> 4 -> 2 -> 1 steps; after each, the student becomes it.
    """
    def __init__(self, cfg, parts):
        self.cfg, self.original = cfg, parts.teacher
        self.teacher, self.round = copy.deepcopy(parts.teacher), 0

    def step(self, student, c, step, generator):
        cfg, now = self.cfg, 4 * (step - 1) // self.cfg.steps
        if now > self.round:
            self.teacher.load_state_dict(student.state_dict())
            self.round = now
        if now < 3:
            # SDTT's own canvases are training data, ours the teacher's samples in 4 steps
            z = sample_teacher(self.original, c, 4, generator, cfg.guidance, cfg.confidence_noise)
        else:
            # all of it will be hidden
            z = torch.zeros(len(c), student.L, dtype=torch.long, device=c.device)
        # after the first round the guidance is learnt
        s = cfg.teacher_cfg if now == 0 else 1
        return sdtt_step(student, self.teacher, z, c, 8 >> now, s, generator)

    def state(self):
        return dict(teacher=self.teacher.state_dict(), round=self.round)

    def load(self, state):
        self.teacher.load_state_dict(state["teacher"])
        self.round = state["round"]
