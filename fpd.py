"""fpd.py - Fixed-Point Distillation (Sec. 3.1 to 3.4): masking, the multi-step sampler, the lift, one training step and what it needs around it.

Below them the GAN, and a step of two other methods, for comparison.

z_init --student--> logits --sample--> draft z_hat --hide a share r--> z_masked --teacher, one pass--> refinement z_ref
 (almost all mask)    |     (Eq. 4)      |   E[z_hat], gradients by straight-through (Eq. 8)             (Eq. 5)   |
                      |                  +--> decoder --> Phi --> X --+                                            |
                      +<----- gradient -------------------------------+-- drift loss (Eq. 6, 7) <-- Y <-- E[z_ref] +

The student is right when its drafts have the distribution of their own refinements, for every r: a fixed point (Eq. 3).

    B drafts   L tokens each   K codes (mask id = K)   d code width   c condition   E codebook (K, d)
    r share of hidden positions     is_masked (B, L) bool, True = hidden     guidance s: u + s (c - u), 1 = none
    generator: one torch.Generator for the batch, or a list of B, one per image (then image i does not depend on its batch)
"""
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import tokenizer as tok
from drift import drift_loss
from models import ConvNet, Discriminator, load_discriminator


# ------------------------------------------------------------------------------------------------ randomness
def generators(seed, first, n, device):
    """One generator per image: image 1234 is the same picture at batch size 8 and 256 (CPU and GPU streams differ)."""
    return [torch.Generator(device).manual_seed(seed * 1_000_000 + first + i) for i in range(n)]


def uniform(shape, generator, device):
    """Uniform numbers of `shape` (B, ...) from one generator, or row i from generator[i]."""
    if isinstance(generator, torch.Generator):
        return torch.rand(shape, generator=generator, device=generator.device).to(device)
    return torch.stack([torch.rand(shape[1:], generator=g, device=g.device) for g in generator]).to(device)


def gumbel(shape, generator, device):
    """Standard Gumbel noise: argmax(logits + gumbel) is a sample of softmax(logits)."""
    return -(-uniform(shape, generator, device).clamp(min=1e-20).log()).clamp(min=1e-20).log()


def draw(logits, temperature, generator):
    """One token per position. logits (B, L, K), the temperature divides -> z (B, L)."""
    logits = logits.float()
    return (logits / temperature + gumbel(logits.shape, generator, logits.device)).argmax(-1)


# ------------------------------------------------------------------------------------------------ masking (Sec. 3.1)
def mask_ratio(t, schedule="arccos"):
    """gamma of Eq. 1: share of hidden positions, as t (tensor in [0, 1]) goes from 0 (all hidden) to 1 (none)."""
    schedules = {"arccos": lambda t: torch.arccos(t) / (math.pi / 2), "cosine": lambda t: torch.cos(t * math.pi / 2),
                 "linear": lambda t: 1 - t, "square": lambda t: 1 - t ** 2, "root": lambda t: 1 - t.sqrt()}
    if schedule not in schedules:
        raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(schedules)}")
    return schedules[schedule](t)


def hidden(shape, generator, device, *shares):
    """One random order of the positions, of which each share hides the first ones. -> a mask (B, L), True = hidden, for each r (B,)

    The counts are exact, max(1, round(r L)), where Eq. 1 tosses a coin per position; MaskGIT was trained with exact counts.
    """
    rank = uniform(shape, generator, device).argsort(1).argsort(1)
    return [rank < (r * shape[1]).round().clamp(min=1)[:, None].to(device) for r in shares]      # Eq. 1; never none, and a smaller r within a larger


def remask(z, r, mask_id, generator):
    """M_r of Eq. 5: hide a share r of each draft. z (B, L), r (B,) -> z_masked (B, L), is_masked (B, L)."""
    is_masked, = hidden(z.shape, generator, z.device, r)
    return z.masked_fill(is_masked, mask_id), is_masked


def init_tokens(B, L, K, r_init, generator, device="cpu"):
    """z_init of Eq. 4: a share r_init of mask ids, the rest uniform random codes, the only noise that the student gets. -> (B, L)."""
    codes = (uniform((B, L), generator, device) * K).long().clamp(max=K - 1)
    if r_init == 0:
        return codes
    return remask(codes, torch.full((B,), float(r_init)), K, generator)[0]


def sample_ratio(B, low, high, generator, device="cpu"):
    """r ~ pi of Eq. 5: the teacher's own training distribution arccos(u) 2/pi, cut to [low, high]. -> (B,)"""
    u_low, u_high = math.cos(high * math.pi / 2), math.cos(low * math.pi / 2)    # inverse of the cumulative distribution
    return mask_ratio(u_low + (u_high - u_low) * uniform((B,), generator, device), "arccos")


# ------------------------------------------------------------------------------------------------ the teacher
def guided_logits(model, z, c, s, **kind):
    """u + s (c - u), from one pass over the doubled batch. s = 1 needs no unconditional half. -> (B, L, K) float32."""
    if s == 1:
        return model(z, c, **kind).float()
    drop = torch.arange(2 * len(z), device=z.device) >= len(z)                   # True: the unconditional half
    cond, uncond = model(torch.cat([z, z]), torch.cat([c, c]), drop, **kind).float().chunk(2)
    return uncond + s * (cond - uncond)


@torch.no_grad()
def refine(teacher, z_masked, c, s, generator, passes=1, noise=0.0):
    """T_phi^r of Eq. 5: the teacher fills the hidden positions of z_masked (B, L) with guidance s. Visible tokens stay. -> z_ref (B, L)

    Every hidden position is sampled, not maximised: Eq. 3 speaks of distributions.
    passes   1 is the paper's single refinement. More (ours): the teacher's sampler goes on from z_masked. After each pass
             but the last, the least confident tokens are hidden again; noise: Gumbel noise on the confidence, falls to 0
    """
    z, n_hidden = z_masked, (z_masked == teacher.K).sum(1)                       # (B,)
    for i in range(passes):
        logits = guided_logits(teacher, z, c, s)                                 # (B, L, K)
        tokens = draw(logits, 1.0, generator)                                    # (B, L)
        filled = torch.where(z == teacher.K, tokens, z)
        if i == passes - 1:
            return filled
        confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        confidence = confidence + noise * (1 - i / (passes - 1)) * gumbel(z.shape, generator, z.device)
        confidence = torch.where(z == teacher.K, confidence, math.inf)           # what is fixed is never revisited
        n_left = (n_hidden * mask_ratio(torch.tensor((i + 1) / passes)).item()).round()
        rank = confidence.argsort(1).argsort(1)                                  # 0: the least confident
        z = torch.where(rank < n_left[:, None], teacher.K, filled)


def correct(teacher, z, c, cfg, generator):
    """The operator of Eq. 3, T_phi^r after M_r, with r ~ pi: tokens z (B, L) -> z_ref (B, L), is_masked (B, L)."""
    r = sample_ratio(len(z), cfg.remask_min, cfg.remask_max, generator, z.device)          # (B,), r ~ pi
    z_masked, is_masked = remask(z, r, teacher.K, generator)                     # M_r
    return refine(teacher, z_masked, c, cfg.teacher_cfg, generator, cfg.refine_steps, cfg.confidence_noise), is_masked


def fixed_point(teacher, z, c, cfg, generator, rounds=8):
    """Tokens z (B, L) after `rounds` of Eq. 3's operator: near its fixed point, which is what the student is asked to draw. -> (B, L)

    No student and no training: from samples of the teacher it shows in seconds what pi, guidance and passes promise.
    """
    for _ in range(rounds):
        z, _ = correct(teacher, z, c, cfg, generator)
    return z


def reveal_counts(L, steps, schedule="arccos"):
    """How many of L tokens the official MaskGIT sampler fixes in each step -> list of `steps` ints with sum L.

    At least 1 each, until all are fixed: with nearly as many steps as tokens, the last steps have nothing left to do (0).
    """
    if not 1 <= steps <= L:
        raise ValueError(f"steps must be between 1 and the {L} tokens of an image, got {steps}")
    if steps == 1:
        return [L]                                                               # the official formula divides by zero here
    v = mask_ratio(torch.linspace(1, 0, steps), schedule)
    counts = (v / v.sum() * L).round().clamp(min=1).long()
    counts[-1] += L - counts.sum()
    total = counts.cumsum(0).clamp(max=L)                                        # the table overshoots then, and the sampler stops early
    return total.diff(prepend=total.new_zeros(1)).tolist()


@torch.no_grad()
def sample(teacher, c, steps, generator, s=1.0, temperature=1.0, noise=4.5, schedule="arccos", replay=None):
    """The official MaskGIT sampler: T steps of "predict all, keep the most confident" (Sec. 3.1). -> z (B, L), codes only.

    teacher      any of our MaskGIT; c (B,) labels; generator: as everywhere, one or one per image
    s            guidance of the last step. It ramps up linearly from 1 (none) in the first step, so a single step has none
    temperature  divides the logits before a token is drawn       noise: Gumbel noise on the confidence, falls linearly to 0
    replay       tests: [(tokens (B, L), gumbel (B, L)), ...] per step, recorded over K + 1 columns, in place of the draws
    """
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                                   # all hidden: z_T of Sec. 3.1
    is_fixed = torch.zeros(B, L, dtype=torch.bool, device=c.device)
    for i, count in enumerate(reveal_counts(L, steps, schedule)):
        ramp = i / max(1, steps - 1)
        logits = guided_logits(teacher, z, c, 1 + (s - 1) * ramp, mask_column=replay is not None) / temperature
        if replay is None:
            tokens, g = draw(logits, 1.0, generator), gumbel((B, L), generator, c.device)
        else:
            tokens, g = replay[i]
        confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] + noise * (1 - ramp) * g
        confidence = confidence.masked_fill(is_fixed, -math.inf)                 # what is fixed is never revisited
        rows = torch.arange(B, device=c.device)[:, None]
        chosen = confidence.topk(count, dim=1).indices                           # (B, count)
        z[rows, chosen], is_fixed[rows, chosen] = tokens[rows, chosen], True
    return z.clamp(max=K - 1)                                                    # only a replay can hold the mask id


def remask_counts(L, steps):
    """How many of L tokens the official MaskGen sampler hides again after each step -> list of `steps` ints, falling to 0 in the last."""
    if not 1 <= steps <= L:
        raise ValueError(f"steps must be between 1 and the {L} tokens of an image, got {steps}")
    counts = [L]                                                                 # before the first step
    for ratio in mask_ratio(torch.arange(1, steps) / steps).tolist():
        counts.append(max(1, min(counts[-1] - 1, math.floor(L * ratio))))        # at least one is revealed, and one left for the next step
    return counts[1:] + [0]


@torch.no_grad()
def sample_maskgen(teacher, c, steps, generator, s=13.0, noise=2.0, ramp="cosine"):
    """The official MaskGen sampler: T steps of "predict all, hide the least confident again" (Sec. 3.1). -> z (B, L), codes only.

    teacher      any of our MaskGen; c (B, rows, W) text; generator: as everywhere, one or one per image
    s            guidance of the last step. It ramps up from 2 (from s if that is less), along half a "cosine" wave or "linear". Officially one
                 less, since they write c + g (c - u): their guidance_scale 12 is our 13, and their ramp from 1 is ours from 2
    noise        Gumbel noise on the choice of a token and on the confidence, falls linearly to 0: the last step takes the likeliest tokens
    """
    ramps = {"cosine": lambda t: (1 - math.cos(math.pi * t)) / 2, "linear": lambda t: t}
    if ramp not in ramps:
        raise ValueError(f"unknown ramp {ramp!r}; there are {', '.join(ramps)}")
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                                   # all hidden: z_T of Sec. 3.1
    for i, count in enumerate(remask_counts(L, steps)):
        t = (i + 1) / steps                                                      # never 0; a single step has guidance s, and no noise
        weight = min(2, s) + (s - min(2, s)) * ramps[ramp](t)
        logits = guided_logits(teacher, z, c, weight) / (0.5 + 0.8 * (1 - t))    # (B, L, K), sharper from step to step
        tokens = (logits + noise * (1 - t) * gumbel(logits.shape, generator, c.device)).argmax(-1)
        confidence = logits.gather(-1, tokens[..., None])[..., 0] + noise * (1 - t) * gumbel((B, L), generator, c.device)
        confidence = torch.where(z == K, confidence, math.inf)                   # what is fixed is never revisited
        z = torch.where(z == K, tokens, z)
        z.scatter_(1, confidence.topk(count, dim=1, largest=False).indices, K)
    return z


def sample_teacher(teacher, c, steps, generator, s, noise):
    """The teacher's own sampler: `sample_maskgen` for MaskGen, which has an empty caption, `sample` for MaskGIT. -> z (B, L)"""
    return (sample_maskgen if hasattr(teacher, "empty") else sample)(teacher, c, steps, generator, s=s, noise=noise)


# ------------------------------------------------------------------------------------------------ the lift (Sec. 3.3)
class Lift:
    """E[z] -> images -> features (Sec. 3.3): decoder, then Phi, one X (B, F, D) per block. Both are frozen, yet gradients pass.

    cfg: blocks, grid (F = grid^2 positions), space, and lift_chunk: images at a time, nothing kept but what comes out: the backward
    pass computes the rest again. Exact, since neither decoder nor Phi looks at more than one image. None: all at once
    """
    def __init__(self, tokenizer, phi, cfg, mark=lambda part: None):
        self.tokenizer, self.phi, self.cfg, self.mark = tokenizer, phi, cfg, mark

    def in_chunks(self, f, *inputs):
        """f, which returns a list of tensors, on `lift_chunk` rows of the inputs at a time."""
        n = self.cfg.lift_chunk
        if n is None:
            return f(*inputs)
        return [torch.cat(x) for x in zip(*(checkpoint(f, *part, use_reentrant=False) for part in zip(*(x.split(n) for x in inputs))))]

    def decode(self, e, c):
        """Code embeddings (B, L, d), condition (B, ...) -> images (B, 3, H, W); no clamp: it would stop the gradient."""
        self.mark("decode")
        return self.in_chunks(lambda e, c: [self.tokenizer.decode(e, c)], e, c)[0]

    def features(self, images):
        """Images (B, 3, H, W) -> list of X (B, F, D)."""
        self.mark("lift")
        X = self.in_chunks(self.maps, images)
        self.mark("drift")
        return X

    def maps(self, images):
        grid, X = self.cfg.grid, []
        if self.cfg.space == "pixel":                                            # Table 4a: the pixels of each position, nothing learned
            side = images.shape[-1] // grid                                      # what is left over at the far borders stays out
            pixels = images[..., :grid * side, :grid * side]
            return [F.unfold(pixels, side, stride=side).transpose(1, 2)]         # one block (B, F, 3 side^2)
        maps = self.phi.maps(images)
        if isinstance(self.phi, ConvNet):                                        # a Backbone chooses its blocks itself
            maps = [maps[block] for block in self.cfg.blocks]
        for m in maps:                                                           # (B, D, h, w)
            m = F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]).permute(0, 3, 1, 2)        # every location weighs the same
            X.append(F.adaptive_avg_pool2d(m, grid).flatten(2).transpose(1, 2))  # (B, F, D)
        return X


# ------------------------------------------------------------------------------------------------ the student
def straight_through(logits, E, generator, temperature=1.0, soft=False):
    """Hard codes forward, soft gradients backward (Eq. 8).

    logits (B, L, K) of the student; E (K, d); temperature of the draft (divides; 1 in the paper)
    soft: feed the decoder the mixture e_soft instead, the other row of Table 3a
    returns z_hat (B, L) long, the sampled draft, and e (B, L, d), equal to E[z_hat] bit for bit unless soft
    """
    logits = logits.float() / temperature
    z_hat = draw(logits, 1.0, generator)                                         # Eq. 4: z_hat ~ p_theta(. | z_init, c)
    e_soft = logits.softmax(-1) @ E.float()                                      # (B, L, d), the codebook's mean under the student
    if soft:
        return z_hat, e_soft
    e = E.float()[z_hat] + (e_soft - e_soft.detach())                            # Eq. 8: the bracket is exactly 0, its gradient is e_soft's.
    return z_hat, e                                                              # (e_soft + (E[z] - e_soft).detach() would round.)


def one_step(student, c, r_init, generator, temperature=1.0):
    """An image's tokens in one pass (Eq. 4), as at inference. c: condition of B images -> z_hat (B, L)."""
    z_init = init_tokens(len(c), student.L, student.K, r_init, generator, c.device)
    return draw(student(z_init, c), temperature, generator)


def per_class_groups(X, n):
    """Fold the classes of a batch into the position axis, so that only drafts of one class are compared. (G n, F, D) -> (n, G F, D)"""
    B, F_, D = X.shape
    return X.reshape(B // n, n, F_, D).transpose(0, 1).reshape(n, B // n * F_, D)


def entropy(logits):
    """Of the distributions of tokens, in nats per token. (..., K) -> ()"""
    p = logits.float().softmax(-1)
    return -(p * p.clamp(min=1e-20).log()).sum(-1).mean()


def codes_used(z_hat, K):
    """How many of the K codes occur in the drafts (B, L). -> ()"""
    return torch.bincount(z_hat.flatten(), minlength=K).gt(0).sum().float()


def fpd_step(student, teacher, lift, E, c, cfg, generator):
    """One training step up to the loss (Sec. 3.2 to 3.4). The caller runs backward.

    student, teacher  MaskGIT or MaskGen, (B, L), (B, ...) -> (B, L, K); the teacher is frozen
    lift              a Lift: .decode(e (B, L, d), c) -> images, .features(images) -> list of X (B, F, D), one per block (Sec. 3.3)
    E (K, d)          the tokenizer's codebook;   c (B, ...) condition, labels or text, in runs of cfg.per_class equal ones
    returns           loss (), logs (dict of 0-dim tensors), images (B, 3, H, W): the decoded drafts, through which all of the gradient passes
    """
    B, K, device = len(c), student.K, c.device
    # draft (Eq. 4): one pass over an almost hidden canvas
    z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, device)      # (B, L)
    logits = student(z_init, c)                                                  # (B, L, K)
    z_hat, e = straight_through(logits, E, generator, cfg.draft_temperature, cfg.estimator == "soft")
    # refinement (Eq. 5): hide part of the draft, let the frozen teacher fill it in
    with torch.no_grad():
        source = z_hat if cfg.draft == "student" else init_tokens(B, student.L, K, 0, generator, device)    # Table 3b: random tokens
        z_ref, is_masked = correct(teacher, source, c, cfg, generator)           # (B, L)
        Y = lift.features(lift.decode(E[z_ref], c))                              # targets are constants
    images = lift.decode(e, c)
    X = lift.features(images)
    # lifted drift (Eq. 6, 7), one term per block
    loss, logs, n = 0.0, {}, cfg.per_class
    for x, y in zip(X, Y):
        block_loss, block_logs = drift_loss(per_class_groups(x, n), per_class_groups(y, n), cfg.bandwidths,
                                            joint=cfg.affinity == "joint", self_negative=cfg.own_pair, own_target=cfg.own_pair)
        loss = loss + block_loss
        for name, value in block_logs.items():
            logs[name] = logs.get(name, 0.0) + value / len(X)
    with torch.no_grad():                                                        # these show a collapse before the pictures do
        logs["entropy"] = entropy(logits)
        logs["codes_used"] = codes_used(z_hat, K)
        logs["changed"] = (z_ref != z_hat).float().sum() / is_masked.sum()       # share of hidden tokens that the teacher replaced
    return loss, logs, images


# ------------------------------------------------------------------------------------------------ around the step (Sec. 4.1)
# ------------------------------------------------------------------------------------------------ the GAN (Sec. 3.4), optional
def diff_augment(images, generator):
    """DiffAugment (Zhao et al. 2020): colour, translation, cutout, drawn per image. The gradient passes. (B, 3, H, W) -> the same shape.

    The discriminator sees real images and drafts only so: a small set of real ones cannot be learned by heart. Ours are in [-1, 1] here;
    officially each network's input normalisation comes first, which makes the colours that DeiT sees vary half as much.
    """
    B, C, H, W = images.shape
    u = uniform((B, 7), generator, images.device)
    brightness, saturation, contrast = u[:, :3, None, None, None].unbind(1)      # (B, 1, 1, 1) each
    x = images + brightness - 0.5
    grey = x.mean(1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (0.5 + contrast) * (x - mean)
    source, outside, in_hole = [], [], []
    for size, shift, centre in ((H, u[:, 3:4], u[:, 5:6]), (W, u[:, 4:5], u[:, 6:7])):      # all (B, size) below
        most, hole, at = int(size / 8 + 0.5), int(size / 5 + 0.5), torch.arange(size, device=images.device)
        moved = at + (shift * (2 * most + 1)).long() - most                      # up to an eighth of the side, either way
        start = (centre * (size + 1 - hole % 2)).long() - hole // 2              # a fifth of the side; at the border it is cut off
        source.append(moved.clamp(0, size - 1))
        outside.append(moved != source[-1])
        in_hole.append((at >= start) & (at < start + hole))
    x = x.gather(2, source[0][:, None, :, None].expand(B, C, H, W)).gather(3, source[1][:, None, None].expand(B, C, H, W))
    empty = outside[0][:, :, None] | outside[1][:, None] | (in_hole[0][:, :, None] & in_hole[1][:, None])
    return x.masked_fill(empty[:, None], 0.0)


def blur_sigma(seen, image_size=256, fade=300_000):
    """Width of the blur, in pixels, once the discriminator has seen so many images: it falls to 0, so that shapes come before texture.

    Officially from 2 pixels of 256; images of 32 pixels are as good as unblurred from the beginning.
    """
    return 2.0 * image_size / 256 * max(0.0, 1 - seen / fade)


def blur(images, sigma):
    """Images (B, 3, H, W) blurred with the kernel 2^-(x / sigma)^2, cut off at floor(3 sigma) pixels; zeros beyond the border."""
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    kernel = torch.exp2(-(torch.arange(-radius, radius + 1, device=images.device) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype).expand(3, 1, -1)           # (3, 1, 2 radius + 1), per colour
    images = F.conv2d(images, kernel[..., None], padding=(radius, 0), groups=3)
    return F.conv2d(images, kernel[:, :, None], padding=(0, radius), groups=3)


def gan_logits(discriminator, images, generator, sigma=0.0):
    """What the discriminator says to images (B, 3, H, W), real or drafts, as in training. -> list of (B, n), one per feature network.

    Real images and drafts in two calls: each has its own batch statistics. sigma: `blur_sigma`
    """
    return discriminator(blur(images, sigma), lambda x: diff_augment(x, generator))


def row_mean(logits, f):
    """Mean over images and feature networks of each row's mean of f: the networks count alike, however many logits they have. -> ()"""
    return torch.stack([f(x.float()).mean() for x in logits]).mean()


def gan_loss(fake):
    """L_gan of the student (Sec. 3.4, hinge): high logits for its drafts. fake: list of (B, n) -> ()

    The official loss is the sum over images and networks, so `len(fake) * B` times this one (also below): lambda would depend on B.
    """
    return row_mean(fake, lambda x: -x)


def discriminator_loss(real, fake):
    """Hinge loss of the discriminator: real logits above 1, the drafts' below -1. Two lists of (B, n) -> ()"""
    return row_mean(real, lambda x: F.relu(1 - x)) + row_mean(fake, lambda x: F.relu(1 + x))


def gan_step(discriminator, opt, images, real, seen, generator):
    """One step of the discriminator on drafts and real images (B, 3, H, W), then what it tells the student.

    opt      the discriminator's optimiser;   seen: how many drafts it has seen before
    returns  d L_gan / d images (B, 3, H, W), logs: logits of real images and drafts, and the discriminator's loss
    """
    sigma, drafts = blur_sigma(seen, images.shape[-1]), images.detach()
    discriminator.train().requires_grad_(True)
    on_real, on_drafts = (gan_logits(discriminator, x, generator, sigma) for x in (real, drafts))
    loss = discriminator_loss(on_real, on_drafts)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    discriminator.requires_grad_(False)
    drafts.requires_grad_(True)
    gradient, = torch.autograd.grad(gan_loss(gan_logits(discriminator, drafts, generator, sigma)), drafts)
    logs = dict(gan_real=row_mean(on_real, lambda x: x), gan_fake=row_mean(on_drafts, lambda x: x), gan_loss=loss)
    return gradient, {key: value.detach() for key, value in logs.items()}


class Gan:
    """The discriminator, its optimiser and its real images (Sec. 3.4). Nothing else in the distillation sees a real image."""
    def __init__(self, cfg, parts, device, processes=1):
        self.size, self.processes = parts.tokenizer.image_size, processes
        torch.manual_seed(cfg.seed)                                              # of what is random in the discriminator
        if hasattr(parts, "real_files"):                                         # official networks: read when they are needed
            self.images = parts.real_files
            self.discriminator = load_discriminator(parts.discriminator_files, self.size, device)
        else:                                                                    # --smoke of the official networks: any images of their size
            is_small_world = cfg.dataset in ("shapes", "scenes", "folder")
            self.images = tok.world(cfg, "train")[0] if is_small_world else tok.shapes(torch.arange(240) % 24, 0, size=self.size)
            self.discriminator = Discriminator({"phi": parts.phi}, self.size, width=16).to(device)
        self.opt = torch.optim.Adam(self.discriminator.discriminators.parameters(), lr=2e-4, betas=(0.0, 0.99))
        self.seen, self.weight, self.start = 0, cfg.gan_weight, cfg.gan_start

    def real(self, n, generator):
        """n random real images (n, 3, H, W) in [-1, 1]."""
        picks = torch.randint(len(self.images), (n,), generator=generator, device=generator.device).tolist()
        return tok.to_float(torch.stack([tok.read_image(x, self.size) if isinstance(x, Path) else x for x in (self.images[i] for i in picks)]))

    def add(self, gradient, images, generator):
        """gradient: of the drift loss at the decoded drafts, images (B, 3, H, W) -> the same with the GAN's added, logs.

        The GAN's is brought to `gan_weight` times the size of the drift's: lambda of Sec. 3.4 then means the same for every network.
        """
        gan, logs = gan_step(self.discriminator, self.opt, images, self.real(len(images), generator).to(images), self.seen, generator)
        batch = len(images) * self.processes                                     # every process's drafts teach the same discriminator
        self.seen += batch
        share = self.weight * gradient.norm() / gan.norm().clamp(min=1e-12) if self.seen > self.start * batch else 0.0
        logs["gan_scale"] = torch.as_tensor(share)                               # lambda as it stands in the paper's sum
        return gradient + share * gan, logs

    def state(self):
        return dict(heads=self.discriminator.state_dict(), opt=self.opt.state_dict(), seen=self.seen)

    def load(self, state):
        self.discriminator.load_state_dict(state["heads"])
        self.opt.load_state_dict(state["opt"])
        self.seen = state["seen"]

    @staticmethod
    def verdict(logs):
        """A discriminator that no longer helps, in words, or None. Hinge: real logits want to be above 1, drafts' below -1."""
        if logs["gan_real"] > 1 and logs["gan_fake"] < -1:
            return "the discriminator wins: it tells every draft from every real image; a smaller --gan-weight or a later --gan-start may help"
        if abs(logs["gan_real"] - logs["gan_fake"]) < 0.02:
            return "the discriminator is lost: real images and drafts look the same to it"


# ------------------------------------------------------------------------------------------------ comparison methods (Sec. 2.2, Table 2)
def jeffrey(teacher_logits, auxiliary_logits, beta):
    """Di[M]O's generalised Jeffrey divergence (1 - beta) KL(p, q) + beta KL(q, p), teacher p, auxiliary q. Two (..., K) -> (...)

    beta = 0, the forward KL, is what its released configuration has: it keeps every mode of the teacher. 1 is the reverse, which seeks one.
    """
    log_p, log_q = teacher_logits.log_softmax(-1), auxiliary_logits.log_softmax(-1)
    return (((1 - beta) * log_p.exp() - beta * log_q.exp()) * (log_p - log_q)).sum(-1)


def dimo_step(student, teacher, auxiliary, opt, c, cfg, generator):
    """One training step of Di[M]O (Zhu et al. 2025): token-level distribution matching on the student's own drafts. The caller runs backward.

    What a teacher of these drafts would answer to a partly hidden one, the student cannot say: it knows z_init alone. So the auxiliary
    learns it from the drafts. Where teacher and auxiliary disagree, the student's logits of the same positions are pushed as the
    auxiliary's should be. No gradient passes a sampled token, a decoder or Phi.

    auxiliary, opt   a copy of the teacher, and its own optimiser: both take a step here
    returns          loss (), whose value is the divergence per hidden token, and logs (dict of 0-dim tensors)
    """
    B, K, device = len(c), student.K, c.device
    logits = student(init_tokens(B, student.L, K, cfg.init_mask, generator, device), c).float() / cfg.draft_temperature     # (B, L, K)
    z_hat = draw(logits, 1.0, generator)                                         # (B, L)
    z_masked, is_masked = remask(z_hat, sample_ratio(B, 0, 1, generator, device), K, generator)     # r as in the teacher's training
    with torch.no_grad():
        p = guided_logits(teacher, z_masked, c, cfg.teacher_cfg)[is_masked]      # (N, K), of the N hidden positions
        q = auxiliary(z_masked, c).float()[is_masked]
    divergence = jeffrey(p, q.requires_grad_(), cfg.jeffrey).mean()
    gradient, = torch.autograd.grad(divergence, q)
    answers = logits[is_masked]
    loss = divergence.detach() + (gradient * (answers - answers.detach())).sum()  # the bracket is 0: `gradient` goes to the logits as it is
    # the auxiliary: the teacher's own training (Eq. 2), with drafts in place of data
    z_masked, is_masked = remask(z_hat, sample_ratio(B, 0, 1, generator, device), K, generator)
    auxiliary_loss = F.cross_entropy(auxiliary(z_masked, c).float()[is_masked], z_hat[is_masked], label_smoothing=cfg.label_smoothing)
    opt.zero_grad(set_to_none=True)
    auxiliary_loss.backward()
    opt.step()
    return loss, dict(auxiliary_loss=auxiliary_loss.detach(), entropy=entropy(logits.detach()), codes_used=codes_used(z_hat, K))


def sdtt_target(teacher, z, c, now, middle, s, generator):
    """What two of the teacher's steps say to the positions that one step of the student has to fill.

    z (B, L) codes, of which the share `now` (B,) is hidden at first and `middle` (B,) after the teacher's first step
    returns  z_masked (B, L), is_masked (B, L), logits (B, L, K): at the positions revealed first those of the first step, else of the second
    """
    is_masked, still = hidden(z.shape, generator, z.device, now, middle)
    z_masked = z.masked_fill(is_masked, teacher.K)
    first = guided_logits(teacher, z_masked, c, s)
    halfway = torch.where(is_masked & ~still, draw(first, 1.0, generator), z_masked)
    second = guided_logits(teacher, halfway, c, s)
    return z_masked, is_masked, torch.where(still[..., None], second, first)


def sdtt_step(student, teacher, z, c, steps, s, generator):
    """One training step of SDTT (Deschenaux and Gulcehre 2024): one of the student's `steps` learns two of the teacher's, which takes twice
    as many. The caller runs backward.

    z (B, L)  images' tokens; with steps = 1 everything is hidden, and they do not matter;   s: guidance of the teacher
    returns   loss (): KL(student, teacher) per hidden token, their default; logs (dict of 0-dim tensors)
    """
    with torch.no_grad():
        t = (uniform((len(z),), generator, z.device) * steps).floor()            # (B,), the student's steps 0 .. steps - 1
        z_masked, is_masked, target = sdtt_target(teacher, z, c, mask_ratio(t / steps), mask_ratio((t + 0.5) / steps), s, generator)
    logits = student(z_masked, c).float()[is_masked]                             # (N, K), of the N hidden positions
    loss = F.kl_div(target[is_masked].log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="batchmean")
    return loss, dict(entropy=entropy(logits.detach()))


class DiMO:
    """Di[M]O's auxiliary network and its optimiser (`dimo_step`)."""
    def __init__(self, cfg, parts):
        self.cfg, self.teacher, self.auxiliary = cfg, parts.teacher, copy.deepcopy(parts.teacher).requires_grad_(True)
        self.opt = torch.optim.AdamW(self.auxiliary.parameters(), lr=cfg.lr, weight_decay=0.0)     # never slower than the student it follows

    def step(self, student, c, step, generator):
        return dimo_step(student, self.teacher, self.auxiliary, self.opt, c, self.cfg, generator)

    def state(self):
        return dict(auxiliary=self.auxiliary.state_dict(), opt=self.opt.state_dict())

    def load(self, state):
        self.auxiliary.load_state_dict(state["auxiliary"])
        self.opt.load_state_dict(state["opt"])


class SDTT:
    """SDTT's teacher of the round (`sdtt_step`). Four rounds of equal length, 16 -> 8 -> 4 -> 2 -> 1 steps: after each, the student becomes it."""
    def __init__(self, cfg, parts):
        self.cfg, self.original, self.teacher, self.round = cfg, parts.teacher, copy.deepcopy(parts.teacher), 0

    def step(self, student, c, step, generator):
        now, cfg = 4 * (step - 1) // self.cfg.steps, self.cfg
        if now > self.round:
            self.teacher.load_state_dict(student.state_dict())
            self.round = now
        if now < 3:                                                              # theirs are training data; ours, the first teacher's samples
            z = sample_teacher(self.original, c, 4, generator, cfg.guidance, cfg.confidence_noise)
        else:
            z = torch.zeros(len(c), student.L, dtype=torch.long, device=c.device)          # all of it will be hidden
        s = cfg.teacher_cfg if now == 0 else 1                                   # afterwards the guidance is learnt
        return sdtt_step(student, self.teacher, z, c, 8 >> now, s, generator)

    def state(self):
        return dict(teacher=self.teacher.state_dict(), round=self.round)

    def load(self, state):
        self.teacher.load_state_dict(state["teacher"])
        self.round = state["round"]
