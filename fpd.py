"""fpd.py - Fixed-Point Distillation: the paper's Sec. 3.1 to 3.4, in its order.

z_init --student--> logits --sample--> draft z_hat --mask a share r--> z_masked --teacher--> z_ref
 (almost all masked)  |     (Eq. 4)      |                              (M_r)     (Eq. 5)      |
                      |                  | E[z_hat], straight-through (Eq. 8)         E[z_ref] |
                      |                  +--> decoder --> Phi --> X --+                        |
                      |                        drift loss (Eq. 6, 7) -+- Y <-- Phi <-- decoder +
                      +<--------------- gradient -------------+

The student has converged when its drafts have the distribution of their own refinements, for every
r: a fixed point (Eq. 3). `fpd_step` is one step towards it; `fixed_point` gets there without
training.
With `fpd_step` the method is complete. Below it: the teachers' own samplers, the optional GAN, and,
for comparison, Di[M]O and SDTT.

    B drafts   L tokens each   K codes (mask id = K)   d code width  c condition   E (K, d) codebook
    r share of masked positions   is_masked (B, L) bool, True = masked   guidance s: u + s (c - u)
    generator: one torch.Generator for the batch, or a list of B, one per image (then image i does
    not depend on its batch).
"""
import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import tokenizer as tok
from drift import drift_loss
from models import Discriminator, MaskGen, load_discriminator


# ---------------------------------------------------------------- randomness
def generators(seed, first, n, device):
    """One generator per image, so that an image does not depend on the batch it is drawn in."""
    if not 0 <= seed < 4294:
        # a CPU's generator takes 32 bits: seed 2^26 would give the images of seed 0
        raise ValueError(f"seeds are 0 to 4293, not {seed}")
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
    if temperature <= 0:
        raise ValueError(f"the temperature is {temperature}, and should be above 0")
    logits = logits.float()
    return (logits / temperature + gumbel(logits.shape, generator, logits.device)).argmax(-1)


# ---------------------------------------------------------------- masking (Sec. 3.1)
def gamma(t):
    """gamma of Eq. 1, the teachers' "arccos": the share of masked positions at time t, from
    gamma(0) = 1 to gamma(1) = 0. Our t runs with sampling, the paper's runs the other way."""
    return torch.arccos(t) / (math.pi / 2)


def masked_positions(rank, r):
    """Mask a share r (B,) of the positions, given in a random order. -> (B, L), True = masked

    rank (B, L): the place of each position in that order. The count is exact, max(1, round(r L)),
    so that every image is refined at the r that was drawn; in Eq. 1 it is exact on average only.
    """
    n = (r * rank.shape[1]).round().clamp(min=1)                    # (B,), never none
    return rank < n[:, None]


def remask(z, r, mask_id, generator):
    """M_r of Eq. 5: mask a share r of each draft at random (Eq. 1).

    z (B, L), r (B,) -> z_masked (B, L), is_masked (B, L) bool
    """
    rank = uniform(z.shape, generator, z.device).argsort(1).argsort(1)  # a random order, (B, L)
    is_masked = masked_positions(rank, r.to(z.device))
    return z.masked_fill(is_masked, mask_id), is_masked


def sample_ratio(B, low, high, generator, device="cpu"):
    """r ~ pi of Eq. 5: the teacher's training law arccos(u) 2/pi, cut to [low, high]. -> (B,)"""
    # arccos decreases, so the bounds of u are those of r in reverse order
    u_low, u_high = math.cos(high * math.pi / 2), math.cos(low * math.pi / 2)
    return gamma(u_low + (u_high - u_low) * uniform((B,), generator, device))


# ---------------------------------------------------------------- the teacher (Sec. 3.1)
def guided_logits(model, z, c, s):
    """Guidance u + s (c - u), from one pass over the doubled batch. -> (B, L, K) float32"""
    if s == 1:                                                      # no guidance, no second half
        return model(z, c).float()
    drop = torch.arange(2 * len(z), device=z.device) >= len(z)      # True: the unconditional half
    logits = model(torch.cat([z, z]), torch.cat([c, c]), drop).float()
    cond, uncond = logits.chunk(2)
    return uncond + s * (cond - uncond)


# ---------------------------------------------------------------- the fixed point (Sec. 3.2)
def init_tokens(B, L, K, r_init, generator, device="cpu"):
    """z_init of Eq. 4: a share r_init of mask ids, the rest uniform random codes. -> (B, L)

    This is the only noise that the student's network sees; its tokens are drawn afterwards.
    """
    codes = (uniform((B, L), generator, device) * K).long()
    if r_init == 0:
        return codes
    r = torch.full((B,), float(r_init), device=device)
    return remask(codes, r, K, generator)[0]


@torch.no_grad()
def refine(teacher, z_masked, c, s, generator):
    """T_phi^r of Eq. 5: the teacher fills the masked positions of z_masked (B, L), guidance s.

    Masked tokens are sampled, not maximised, because Eq. 3 is about distributions. All are filled,
    although Sec. 3.1's operator masks some again, because the result is decoded.   -> z_ref (B, L)
    """
    logits = guided_logits(teacher, z_masked, c, s)                 # (B, L, K)
    return torch.where(z_masked == teacher.K, draw(logits, 1.0, generator), z_masked)


def local_correction(teacher, z, c, cfg, generator):
    """The operator of Eq. 3: mask a share r ~ pi of z (B, L), and let the teacher fill it again.

    -> z_ref (B, L), is_masked (B, L)
    """
    r = sample_ratio(len(z), *cfg.remask, generator, z.device)
    z_masked, is_masked = remask(z, r, teacher.K, generator)        # M_r
    z_ref = refine(teacher, z_masked, c, cfg.refine_guidance, generator)    # T_phi^r
    return z_ref, is_masked


def fixed_point(teacher, z, c, cfg, generator, rounds):
    """Tokens z (B, L) after `rounds` of Eq. 3's operator, near its fixed point. -> (B, L)

    This is the distribution that the student is trained towards. It needs no training: started from
    samples of the teacher, it shows within seconds what a perfect student would draw.
    """
    for _ in range(rounds):
        z, _ = local_correction(teacher, z, c, cfg, generator)
    return z


# ---------------------------------------------------------------- the lift (Sec. 3.3)
class Lift:
    """E[z] -> images -> features (Sec. 3.3): decoder, then Phi; one X (B, F, D) for each block.

    Both are frozen, yet gradients pass. cfg: blocks, grid (F = grid^2 positions), space, and
    lift_chunk: so many images are lifted at a time, and the backward pass computes them once more.
    That saves memory and is exact, since neither decoder nor Phi mixes the images of a batch.
    """
    def __init__(self, tokenizer, phi, cfg):
        self.tokenizer, self.phi, self.cfg = tokenizer, phi, cfg

    def in_chunks(self, f, *inputs):
        """[f of the first lift_chunk rows of the inputs, f of the next ones, ...]"""
        n = self.cfg.lift_chunk
        if n is None:
            return [f(*inputs)]
        parts = zip(*(x.split(n) for x in inputs))
        return [checkpoint(f, *part, use_reentrant=False) for part in parts]

    def decode(self, e, c):
        """Code embeddings (B, L, d), condition (B, ...) -> images (B, 3, H, W).

        No clamp, which would stop the gradient. The decoder runs in the precision of its own
        weights: under autocast its norms would be float32, with copies before and after each of
        them, a quarter of a training step's time on a GPU.
        """
        dtype = next(self.tokenizer.decoder.parameters()).dtype
        if c.is_floating_point():                                   # text states, not labels
            c = c.to(dtype)
        with torch.autocast(e.device.type, enabled=False):
            return torch.cat(self.in_chunks(self.tokenizer.decode, e.to(dtype), c))

    def features(self, images):
        """Images (B, 3, H, W) -> list of X (B, F, D)."""
        return [torch.cat(X) for X in zip(*self.in_chunks(self.maps, images))]

    def maps(self, images):
        grid = self.cfg.grid
        if self.cfg.space == "pixel":                               # Table 4a: nothing learned
            side = images.shape[-1] // grid                         # a remainder is cut off
            pixels = images[..., :grid * side, :grid * side]
            return [F.unfold(pixels, side, stride=side).transpose(1, 2)]    # (B, F, 3 side^2)
        X = []
        for m in self.phi.maps(images, self.cfg.blocks):            # (B, D, h, w)
            # standardised, so that every location has the same weight
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
    # in float32, because bfloat16 would give codes that are near each other the same gradient
    with torch.autocast(logits.device.type, enabled=False):
        # The mean code, at temperature 1 whatever that of the draft: in a colder softmax a nearly
        # certain token would get nearly no gradient, right or wrong
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
    # draft (Eq. 4): one pass over an almost fully masked canvas
    z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, c.device)   # (B, L)
    logits = student(z_init, c)                                     # (B, L, K)
    z_hat, e = straight_through(logits, E, generator, cfg.temperature,    # (B, L), (B, L, d)
                                soft=cfg.estimator == "soft")
    # refinement (Eq. 5): mask a part of the draft, let the frozen teacher fill it in
    with torch.no_grad():
        source = z_hat
        if cfg.draft_source == "random":                                   # Table 3b
            source = init_tokens(B, student.L, K, 0, generator, c.device)
        z_ref, is_masked = local_correction(teacher, source, c, cfg, generator)   # (B, L)
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
    with torch.no_grad():                                           # a collapse is seen here first
        logs["entropy"] = entropy(logits)
        is_used = torch.zeros(K, device=c.device).scatter_(0, z_hat.flatten(), 1.0)     # (K,)
        logs["codes_used"] = is_used.sum()
        # share of the masked tokens that the teacher replaced
        logs["changed"] = (z_ref != source).float().sum() / is_masked.sum()
    return loss, logs, images


# ---------------------------------------------------------------- T-step samplers (Sec. 3.1)
# The teachers as their authors sample them. No training step of FPD needs this.
def reveal_counts(L, steps):
    """How many of L tokens the official MaskGIT sampler fixes in each step -> `steps` ints, sum L.

    At least 1 each, until all are fixed: with nearly as many steps as tokens, the last steps have
    nothing left to do (0).
    """
    if steps == 1:
        return [L]                                                  # official: a division by zero
    v = gamma(torch.linspace(1, 0, steps))
    counts = (v / v.sum() * L).round().clamp(min=1).long()
    counts[-1] += L - counts.sum()
    # the table overshoots with many steps, and the sampler stops early
    total = counts.cumsum(0).clamp(max=L)
    return total.diff(prepend=total.new_zeros(1)).tolist()


@torch.no_grad()
def sample_maskgit(teacher, c, steps, generator, s=1.0, temperature=1.0, noise=4.5):
    """The official MaskGIT sampler: T steps of "predict all, keep the most confident" (Sec. 3.1).

    teacher      a MaskGIT; c (B,) labels
    s            guidance of the last step. It ramps up linearly from 1 (none) in the first step, so
                 a single step has none
    temperature  divides the logits before a token is drawn
    noise        Gumbel noise on the confidence, falls linearly to 0
    returns      z (B, L), codes only
    """
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                      # all masked: z_T of Sec. 3.1
    for i, count in enumerate(reveal_counts(L, steps)):
        ramp = i / max(1, steps - 1)
        logits = guided_logits(teacher, z, c, 1 + (s - 1) * ramp)
        tokens = draw(logits, temperature, generator)               # (B, L)
        logits = logits / temperature                               # (B, L, K)
        confidence = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        confidence = confidence + noise * (1 - ramp) * gumbel((B, L), generator, c.device)
        confidence = confidence.masked_fill(z < K, -math.inf)       # what is fixed stays fixed
        chosen = confidence.topk(count, dim=1).indices              # (B, count)
        z = z.scatter(1, chosen, tokens.gather(1, chosen))
    return z


def remask_counts(L, steps):
    """How many of L tokens the official MaskGen sampler masks again after each step.

    -> list of `steps` ints, falling to 0 in the last
    """
    counts = [L]                                                    # before the first step
    for ratio in gamma(torch.arange(1, steps) / steps).tolist():
        # at least one is revealed, and one left for the next step
        counts.append(max(1, min(counts[-1] - 1, math.floor(L * ratio))))
    return counts[1:] + [0]


@torch.no_grad()
def sample_maskgen(teacher, c, steps, generator, s=13.0, noise=2.0, ramp="cosine"):
    """The official MaskGen sampler: T steps of "predict all, mask the least confident again".

    teacher   a MaskGen; c (B, rows, W) text
    s         guidance of the last step. It ramps up from 2 (from s if that is less), along half a
              "cosine" wave or "linear". Officially one less, since they write c + g (c - u): their
              guidance_scale 12 is our 13, and their ramp from 1 is ours from 2
    noise     Gumbel noise on the choice of a token and on the confidence, falls linearly to 0: the
              last step takes the likeliest tokens
    returns   z (B, L), codes only
    """
    ramps = {"cosine": lambda t: (1 - math.cos(math.pi * t)) / 2, "linear": lambda t: t}
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                      # all masked: z_T of Sec. 3.1
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
    """The teacher's own sampler, MaskGen's or MaskGIT's. -> z (B, L)"""
    sampler = sample_maskgen if isinstance(teacher, MaskGen) else sample_maskgit
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

    (B, 3, H, W) -> the same shape. Real images and drafts are augmented alike, so that the
    discriminator cannot learn a small set of real images by heart. Officially the augmentation
    comes after each network's input normalisation; for DeiT, colours then vary half as much.
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


def row_mean(logits, f):
    """Mean of f over images and logits, then over the networks, which count alike. -> ()

    logits: list of (B, n). The official losses are sums over images and networks, B * len(logits)
    times as large: lambda would then depend on B.
    """
    return torch.stack([f(x.float()).mean() for x in logits]).mean()


def gan_loss(fake):
    """L_gan of the student (Sec. 3.4, hinge): high logits for its drafts. list of (B, n) -> ()"""
    return row_mean(fake, lambda x: -x)


def discriminator_loss(real, fake):
    """Hinge loss of the discriminator: real logits above 1, the drafts' below -1. -> ()"""
    return row_mean(real, lambda x: F.relu(1 - x)) + row_mean(fake, lambda x: F.relu(1 + x))


def gan_step(discriminator, opt, images, real, seen, generator):
    """One step of the discriminator on drafts and real images, then its gradient for the student.

    images, real   (B, 3, H, W), drafts and real images
    opt, seen      the discriminator's optimiser, and how many drafts it has seen before
    returns        d L_gan / d images (B, 3, H, W); logs: logits of real images and drafts, its loss
    """
    # The blur falls from 2 pixels of 256 to 0, so that shapes come before texture, as officially
    sigma = 2.0 * images.shape[-1] / 256 * max(0.0, 1 - seen / 300_000)

    def logits(x):
        return discriminator(blur(x, sigma), lambda x: diff_augment(x, generator))

    discriminator.train()
    discriminator.discriminators.requires_grad_(True)
    # in two calls, so that each has its own batch statistics
    on_real = logits(real)
    on_drafts = logits(images.detach())
    loss = discriminator_loss(on_real, on_drafts)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    # for the student's gradient, nothing need be kept of the heads
    discriminator.discriminators.requires_grad_(False)
    drafts = images.detach().requires_grad_()
    gradient, = torch.autograd.grad(gan_loss(logits(drafts)), drafts)
    logs = dict(gan_real=row_mean(on_real, lambda x: x), gan_fake=row_mean(on_drafts, lambda x: x),
                gan_loss=loss)
    return gradient, {key: value.detach() for key, value in logs.items()}


class Gan:
    """The discriminator, its optimiser and its real images (Sec. 3.4).

    Nothing else in the distillation sees a real image. Which ones a step takes follows from the
    seed and the step.   .trained: what a checkpoint has to hold
    """
    def __init__(self, cfg, parts, device):
        self.cfg, self.size = cfg, parts.tokenizer.image_size
        torch.manual_seed(cfg.seed)                                 # of the random discriminator
        if cfg.dataset in ("imagenet", "laion") and not cfg.smoke:
            self.images = tok.image_files(cfg.data)
            discriminator = load_discriminator(parts.feature_files, self.size, device)
        else:
            discriminator = Discriminator({"phi": parts.phi}, self.size, width=16).to(device)
            if cfg.dataset in ("imagenet", "laion"):                # --smoke: any of their size
                self.images = tok.shapes(torch.arange(240) % 24, 0, size=self.size)
            else:
                self.images, _, _ = tok.world(cfg, "train")
        # as in StyleGAN-XL; the paper names no settings of its discriminator
        opt = torch.optim.Adam(discriminator.discriminators.parameters(), lr=2e-3,
                               betas=(0.0, 0.99))
        self.discriminator, self.opt = discriminator, opt
        self.trained = dict(discriminator=discriminator, discriminator_opt=opt)

    def real(self, n, seen):
        """The n real images of the step that begins with `seen`. -> (n, 3, H, W) in [-1, 1]"""
        generator = torch.Generator().manual_seed(self.cfg.seed * 1_000_003 + seen)
        images = []
        while len(images) < n:
            image = self.images[torch.randint(len(self.images), (), generator=generator)]
            try:
                is_file = isinstance(image, Path)
                images.append(tok.read_image(image, self.size) if is_file else image)
            except ValueError as error:
                tqdm.write(f"skipped: {error}")
        return tok.to_float(torch.stack(images))

    def add(self, gradient, images, step, generator):
        """Adds the GAN's gradient to the drift loss's, both at the decoded drafts (B, 3, H, W).

        The paper's sum is L_total = L_drift + lambda L_gan. Here lambda is chosen in every step
        such that the GAN's gradient is gan_weight times as large as the drift's: a weight then
        means the same for every network.   -> the sum, logs
        """
        seen = (step - 1) * len(images)                             # drafts before this step
        real = self.real(len(images), seen).to(images)
        gan, logs = gan_step(self.discriminator, self.opt, images, real, seen, generator)
        scale = self.cfg.gan_weight * gradient.norm() / gan.norm().clamp(min=1e-12)
        logs["gan_scale"] = scale                                   # lambda of the paper's sum
        return gradient + scale * gan, logs


# ---------------------------------------------------------------- for comparison (Table 2)
# The paper's method ends above. What follows are two other methods, over the same networks.
class DiMO:
    """Di[M]O (Zhu et al. 2025): token-level matching on the student's drafts.

    It needs the distribution of the drafts' masked tokens, given the visible ones. An auxiliary
    network learns it from the drafts, because the student sees z_init only. The student's logits
    then get the gradient of KL(teacher, auxiliary) with respect to the auxiliary's logits, past the
    sampling, the decoder and Phi.   .trained: for the checkpoint
    """
    def __init__(self, cfg, parts):
        self.cfg, self.teacher = cfg, parts.teacher
        self.auxiliary = copy.deepcopy(parts.teacher).requires_grad_(True)
        # never slower than the student that it follows
        self.opt = torch.optim.AdamW(self.auxiliary.parameters(), lr=cfg.lr, weight_decay=0.0)
        self.trained = dict(auxiliary=self.auxiliary, auxiliary_opt=self.opt)

    def step(self, student, c, step, generator):
        """c (B, ...) -> loss (), whose value is KL(teacher, auxiliary) per masked token, as in the
        released configuration; logs. The caller runs backward; the auxiliary takes its step here.
        """
        cfg, B, K = self.cfg, len(c), student.K
        z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, c.device)
        logits = student(z_init, c).float() / cfg.temperature       # (B, L, K)
        z_hat = draw(logits, 1.0, generator)                        # (B, L)
        r = sample_ratio(B, 0, 1, generator, c.device)              # as in the teacher's training
        z_masked, is_masked = remask(z_hat, r, K, generator)
        with torch.no_grad():
            log_p = guided_logits(self.teacher, z_masked, c, cfg.refine_guidance).log_softmax(-1)
            q = self.auxiliary(z_masked, c).float()                 # (B, L, K)
        # autocast keeps the weights that it cast under no_grad, and they would get no gradient
        torch.clear_autocast_cache()
        q.requires_grad_()
        kl = F.kl_div(q.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
        divergence = (kl * is_masked).sum() / is_masked.sum()       # mean over what is masked
        gradient, = torch.autograd.grad(divergence, q)
        # the bracket is 0: `gradient` goes to the student's logits as it is
        loss = divergence.detach() + (gradient * (logits - logits.detach())).sum()
        # the auxiliary: the teacher's own training (Eq. 2), with drafts in place of data
        r = sample_ratio(B, 0, 1, generator, c.device)
        z_masked, is_masked = remask(z_hat, r, K, generator)
        surprise = F.cross_entropy(self.auxiliary(z_masked, c).float().transpose(1, 2), z_hat,
                                   reduction="none")                # (B, L)
        auxiliary_loss = (surprise * is_masked).sum() / is_masked.sum()
        # a resumed run may have another one than its saved state
        self.opt.param_groups[0]["lr"] = cfg.lr
        self.opt.zero_grad(set_to_none=True)
        auxiliary_loss.backward()
        self.opt.step()
        return loss, dict(auxiliary_loss=auxiliary_loss.detach(), entropy=entropy(logits.detach()))


class SDTT:
    """SDTT (Deschenaux and Gulcehre 2024): one step of the student learns two of the teacher's.

    Four rounds of equal length, 16 -> 8 -> 4 -> 2 -> 1 steps; after each round the student becomes
    the teacher of the next.   .trained: for the checkpoint
    """
    def __init__(self, cfg, parts):
        self.cfg, self.original = cfg, parts.teacher
        self.teacher = copy.deepcopy(parts.teacher)
        self.trained = dict(sdtt_teacher=self.teacher)

    def step(self, student, c, step, generator):
        """c (B, ...) -> loss (), KL(student, teacher) per masked token, their default; logs."""
        cfg, teacher = self.cfg, self.teacher
        B, L, K = len(c), student.L, student.K
        now = 4 * (step - 1) // cfg.steps                           # round 0 .. 3
        if now > 4 * (step - 2) // cfg.steps >= 0:
            teacher.load_state_dict(student.state_dict())
        steps = 8 >> now                                            # that the student shall take
        s = cfg.refine_guidance if now == 0 else 1                      # later, guidance is learnt
        with torch.no_grad():
            if steps > 1:
                # theirs are training images, ours samples of the teacher in 4 steps
                z = sample_teacher(self.original, c, 4, generator, cfg.sample_guidance,
                                   cfg.confidence_noise)            # (B, L)
            else:
                z = torch.zeros(B, L, dtype=torch.long, device=c.device)    # all will be masked
            t = (uniform((B,), generator, c.device) * steps).floor()    # step 0 .. steps - 1
            rank = uniform(z.shape, generator, c.device).argsort(1).argsort(1)
            is_masked = masked_positions(rank, gamma(t / steps))    # (B, L)
            # after half of the step
            still_masked = masked_positions(rank, gamma((t + 0.5) / steps))
            z_masked = z.masked_fill(is_masked, K)
            first = guided_logits(teacher, z_masked, c, s)          # (B, L, K)
            halfway = torch.where(is_masked & ~still_masked, draw(first, 1.0, generator), z_masked)
            second = guided_logits(teacher, halfway, c, s)
            target = torch.where(still_masked[..., None], second, first)
        logits = student(z_masked, c).float()                       # (B, L, K)
        kl = F.kl_div(target.log_softmax(-1), logits.log_softmax(-1), log_target=True,
                      reduction="none").sum(-1)                     # (B, L)
        loss = (kl * is_masked).sum() / is_masked.sum()
        return loss, dict(entropy=entropy(logits.detach()))
