"""fpd.py - Fixed-Point Distillation: the method of Sec. 3.1 to 3.4, and what it is compared with.

z_init --student--> logits --sample--> draft z_hat --mask a share r--> z_masked --teacher--> z_ref
 (almost all masked)  |     (Eq. 4)      |                              (M_r)     (Eq. 5)      |
                      |                  | E[z_hat], straight-through (Eq. 8)         E[z_ref] |
                      |                  +--> decoder --> Phi --> X --+                        |
                      |                        drift loss (Eq. 6, 7) -+- Y <-- Phi <-- decoder +
                      +<--------------- gradient -------------+

The few random codes in z_init are the student's latent noise: without them all drafts of a
condition would have the same logits, and the tokens of a draft would be independent of each other.

The student has converged when its drafts have the distribution of their own refinements: a fixed
point (Eq. 3). The paper states this for every r. With a teacher that fills masked tokens
independently of each other it can hold only on average over r ~ pi, which is what we train for.
`fpd_step` gives the loss of one step towards it; `fixed_point` gets near it without training.

With `fpd_step` the method is complete. Below it are the teachers' own samplers, the optional GAN,
Di[M]O and SDTT for comparison, and an example that can be computed by hand (`python fpd.py`).

    B drafts   L tokens each   K codes (mask id = K)   d code width  c condition   E (K, d) codebook
    r share of masked positions   is_masked (B, L) bool   guidance s: uncond + s (cond - uncond)
    generator: one torch.Generator, or one for each image, so that no image depends on its batch
"""
import copy
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.checkpoint import checkpoint

from drift import drift_loss


# ---------------------------------------------------------------- randomness
def generators(seed, first, n, device):
    """One generator per image, so that an image does not depend on the batch it is drawn in."""
    if not 0 <= seed < 4294:
        # A CPU's generator uses only 32 bits of its seed, and 4294 million is nearly 2^32.
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
    """One token per position, sampled from logits (B, L, K) / temperature. -> z (B, L)"""
    if temperature <= 0:
        raise ValueError(f"the temperature has to be above 0, not {temperature}")
    logits = logits.float()
    return (logits / temperature + gumbel(logits.shape, generator, logits.device)).argmax(-1)


# ---------------------------------------------------------------- masking (Sec. 3.1)
def gamma(t):
    """gamma of Eq. 1, the teachers' "arccos" schedule: the share of masked positions at time t.

    It falls from gamma(0) = 1 to gamma(1) = 0. Our t rises during sampling, the paper's falls.
    """
    return torch.arccos(t) / (math.pi / 2)


def masked_positions(rank, r):
    """Mask a share r (B,) of the positions: the first in a random order. -> (B, L), True = masked

    rank (B, L) is the place of each position in that order. The number of masked positions is
    exactly max(1, round(r L)), so that every image has the r that was drawn for it. In Eq. 1, where
    each position is masked independently, it is r L only on average.
    """
    n = (r * rank.shape[1]).round().clamp(min=1)                    # (B,), at least one
    return rank < n[:, None]


def remask(z, r, mask_id, generator):
    """M_r of Eq. 5: mask a share r of each draft at random (Eq. 1).

    z (B, L), r (B,) -> z_masked (B, L), is_masked (B, L) bool
    """
    rank = uniform(z.shape, generator, z.device).argsort(1).argsort(1)  # a random order, (B, L)
    is_masked = masked_positions(rank, r.to(z.device))
    return z.masked_fill(is_masked, mask_id), is_masked


# ---------------------------------------------------------------- the teacher (Sec. 3.1)
def guided_logits(model, z, c, s):
    """Classifier-free guidance uncond + s (cond - uncond), from one pass over the doubled batch.

    z (B, L), c (B, ...) -> logits (B, L, K), float32
    """
    if s == 1:                                                      # no guidance: one pass over z
        return model(z, c).float()
    drop = torch.arange(2 * len(z), device=z.device) >= len(z)      # True: the unconditional half
    logits = model(torch.cat([z, z]), torch.cat([c, c]), drop).float()
    cond, uncond = logits.chunk(2)
    return uncond + s * (cond - uncond)


# ---------------------------------------------------------------- the fixed point (Sec. 3.2)
def init_tokens(B, L, K, r_init, generator, device="cpu"):
    """z_init of Eq. 4: a share r_init of mask ids, the rest uniform random codes. -> (B, L)

    These codes are the only noise that the student's network sees.
    """
    codes = (uniform((B, L), generator, device) * K).long()
    if r_init == 0:
        return codes
    r = torch.full((B,), float(r_init), device=device)
    return remask(codes, r, K, generator)[0]


def refine(teacher, z_masked, c, s, generator):
    """T_phi^r of Eq. 5: the teacher fills the masked positions of z_masked (B, L), guidance s.

    Tokens are sampled, because Eq. 3 is about distributions. The operator of Sec. 3.1 masks some of
    them again; here all stay, because the result is decoded.   -> z_ref (B, L)
    """
    logits = guided_logits(teacher, z_masked, c, s)                 # (B, L, K)
    return torch.where(z_masked == teacher.K, draw(logits, 1.0, generator), z_masked)


def sample_ratio(B, low, high, generator, device="cpu"):
    """r ~ pi of Eq. 5: gamma(u), u uniform, as in the teacher's training; truncated to [low, high].

    The paper does not give pi. To try another one, change only this function. The row "fixed point"
    of the reports then moves, too. Only the column "by hand" of `python fpd.py` assumes this pi.
    -> (B,)
    """
    # gamma decreases, so the bounds of u are those of r in reverse order.
    u_low, u_high = math.cos(high * math.pi / 2), math.cos(low * math.pi / 2)
    return gamma(u_low + (u_high - u_low) * uniform((B,), generator, device))


def local_correction(teacher, z, c, cfg, generator):
    """The operator of Eq. 3: mask a share r ~ pi of z (B, L), and let the teacher fill it in again.

    -> z_ref (B, L), is_masked (B, L)
    """
    r = sample_ratio(len(z), *cfg.remask, generator, z.device)
    z_masked, is_masked = remask(z, r, teacher.K, generator)        # M_r
    return refine(teacher, z_masked, c, cfg.refine_guidance, generator), is_masked      # T_phi^r


def fixed_point(teacher, z, c, cfg, generator, rounds):
    """Tokens z (B, L) after `rounds` of Eq. 3's operator, near its fixed point. -> (B, L)

    The student is trained towards this distribution, which can be computed before any training,
    from samples of the teacher. It is a reference, not a bound: it keeps temperature 1 and the
    refinement's guidance, while the student has its own temperature and learns through Phi.
    """
    for _ in range(rounds):
        z, _ = local_correction(teacher, z, c, cfg, generator)
    return z


# ---------------------------------------------------------------- the lift (Sec. 3.3)
class Lift:
    """E[z] -> images -> features (Sec. 3.3): decoder, then Phi; one X (B, F, D) for each block.

    Both are frozen, but gradients pass through them. Of cfg it reads blocks, space, grid (F is
    grid^2) and lift_chunk: gradient checkpointing in chunks of that many images, for less memory.
    The gradient is the same, because neither network mixes images.
    """
    def __init__(self, tokenizer, phi, cfg):
        self.tokenizer, self.phi, self.cfg = tokenizer, phi, cfg

    def in_chunks(self, f, *inputs):
        """f of the first lift_chunk rows of the inputs, f of the next ones, ... -> list"""
        n = self.cfg.lift_chunk
        if n is None:
            return [f(*inputs)]
        parts = zip(*(x.split(n) for x in inputs))
        return [checkpoint(f, *part, use_reentrant=False) for part in parts]

    def decode(self, e, c):
        """Code embeddings (B, L, d), condition (B, ...) -> images (B, 3, H, W).

        The images are not clamped, because a clamp stops the gradient. The decoder runs in the
        precision of its own weights. Under autocast its norms would be float32, and the copies
        before and after each of them would take a quarter of a training step on a GPU.
        """
        dtype = next(self.tokenizer.decoder.parameters()).dtype
        c = c.to(dtype) if c.is_floating_point() else c             # text states, or labels
        with torch.autocast(e.device.type, enabled=False):
            return torch.cat(self.in_chunks(self.tokenizer.decode, e.to(dtype), c))

    def features(self, images):
        """Images (B, 3, H, W) -> list of X (B, F, D)."""
        return [torch.cat(X) for X in zip(*self.in_chunks(self.chunk_features, images))]

    def chunk_features(self, images):
        """Features of one chunk of images (B, 3, H, W) -> list of X (B, F, D)."""
        grid = self.cfg.grid
        if self.cfg.space == "pixel":                               # Table 4a: raw pixels
            side = images.shape[-1] // grid                         # a remainder is cut off
            pixels = images[..., :grid * side, :grid * side]
            return [F.unfold(pixels, side, stride=side).transpose(1, 2)]    # (B, F, 3 side^2)
        X = []
        for m in self.phi.maps(images, self.cfg.blocks):            # (B, D, h, w)
            # Every position is standardised, so that all of them have the same weight.
            m = F.layer_norm(m.permute(0, 2, 3, 1), m.shape[1:2]).permute(0, 3, 1, 2)
            X.append(F.adaptive_avg_pool2d(m, grid).flatten(2).transpose(1, 2))     # (B, F, D)
        return X


def per_class_groups(X, n):
    """Fold the G classes of a batch into the position axis: only drafts of one class are compared.

    Deng et al. (2026) compare within a class, too. (G n, F, D) -> (n, G F, D)
    """
    return X.unflatten(0, (-1, n)).transpose(0, 1).flatten(1, 2)


# ---------------------------------------------------------------- the student (Sec. 3.4)
def straight_through(logits, E, generator, temperature=1.0, soft=False):
    """Sample the draft (Eq. 4), with hard codes forward and soft gradients backward (Eq. 8).

    logits (B, L, K) of the student; E (K, d); temperature of the draft, by which logits are divided
    soft      e is e_soft, the mixture of all codes (Table 3a). In the paper the teacher gets this
              mixture, too; here it gets the sampled tokens z_hat
    returns   z_hat (B, L), the draft, and e (B, L, d), bit for bit E[z_hat] unless soft
    """
    logits, E = logits.float(), E.float()
    z_hat = draw(logits, temperature, generator)                    # Eq. 4, z_hat ~ p_theta
    # This is float32, because bfloat16 would give codes that are near each other the same gradient.
    with torch.autocast(logits.device.type, enabled=False):
        # The mean code, at temperature 1 whatever the draft's temperature is: in a colder softmax
        # a token that is nearly certain would get almost no gradient, whether right or wrong.
        e_soft = logits.softmax(-1) @ E                             # (B, L, d)
    if soft:
        return z_hat, e_soft
    # Eq. 8: the bracket is 0, and its gradient is that of e_soft. Written this way, e equals
    # E[z_hat] bit for bit. The other common order, e_soft + (E[z_hat] - e_soft).detach(), rounds.
    return z_hat, E[z_hat] + (e_soft - e_soft.detach())


@torch.no_grad()
def one_step(student, c, r_init, generator, temperature=1.0):
    """The draft alone (Eq. 4), as in inference. c (B, ...) -> z_hat (B, L)"""
    z_init = init_tokens(len(c), student.L, student.K, r_init, generator, c.device)
    return draw(student(z_init, c), temperature, generator)


def entropy(logits):
    """Mean entropy of the tokens' distributions, in nats. (..., K) -> ()"""
    p = logits.float().softmax(-1)
    return -(p * p.clamp(min=1e-20).log()).sum(-1).mean()


def fpd_step(student, teacher, lift, E, c, cfg, generator):
    """One training step up to the loss (Sec. 3.2 to 3.4). The caller runs the backward pass.

    student, teacher  MaskGIT or MaskGen, (B, L), (B, ...) -> (B, L, K); the teacher is frozen
    lift              a Lift: E[z] -> images -> features (Sec. 3.3)
    E (K, d)          the tokenizer's codebook
    c (B, ...)        condition, labels or text, in groups of cfg.per_class equal ones. Only drafts
                      of one group are compared, or the whole batch if per_class is None
    cfg               has the fields per_class, init_mask, temperature, estimator, draft_source,
                      remask, refine_guidance, bandwidths, affinity and own_pair of train.Config
    returns           loss (); logs, 0-dim tensors; images (B, 3, H, W), the decoded drafts, through
                      which all of the gradient passes

    Other networks can be used. A teacher is called with z, c and drop (B,) bool, True = without c,
    and has .K and .L. A tokenizer has .E, .decode(e, c) and .decoder, in whose precision it is run.
    Phi has .maps(images, blocks) -> list of (B, D, h, w).
    """
    B, K = len(c), student.K
    n = cfg.per_class or B                                          # drafts that are compared
    # 1. Draft (Eq. 4): one pass over an almost fully masked sequence.
    z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, c.device)   # (B, L)
    logits = student(z_init, c)                                     # (B, L, K)
    z_hat, e = straight_through(logits, E, generator, cfg.temperature,    # (B, L), (B, L, d)
                                soft=cfg.estimator == "soft")
    # 2. Refine (Eq. 5): mask a part of the draft, and let the frozen teacher fill it in.
    with torch.no_grad():
        source = (z_hat if cfg.draft_source == "student" else       # Table 3b
                  init_tokens(B, student.L, K, 0, generator, c.device))
        z_ref, is_masked = local_correction(teacher, source, c, cfg, generator)   # (B, L)
        # 3. Lift both (Sec. 3.3): the refinements are constants, the drafts carry the gradient.
        Y = lift.features(lift.decode(E[z_ref], c))                 # list of (B, F, D)
    images = lift.decode(e, c)                                      # (B, 3, H, W)
    X = lift.features(images)                                       # list of (B, F, D)
    # 4. Drift (Eq. 6, 7): one term for each block.
    loss, logs = 0.0, {}
    for x, y in zip(X, Y):
        block_loss, block_logs = drift_loss(
            per_class_groups(x, n), per_class_groups(y, n), cfg.bandwidths,
            joint=cfg.affinity == "joint", self_negative=cfg.own_pair, own_target=cfg.own_pair)
        loss = loss + block_loss
        for name, value in block_logs.items():
            logs[name] = logs.get(name, 0.0) + value / len(X)
    # A collapse shows in these numbers first.
    with torch.no_grad():
        logs["entropy"] = entropy(logits)
        is_used = torch.zeros(K, device=c.device).scatter_(0, z_hat.flatten(), 1.0)     # (K,)
        logs["codes_used"] = is_used.sum()
        # The share of the masked tokens that the teacher replaced by others.
        logs["changed"] = (z_ref != source).float().sum() / is_masked.sum()
    return loss, logs, images


# ---------------------------------------------------------------- T-step samplers (Sec. 3.1)
# These are the samplers of the teachers' authors. No training step of FPD needs them.
def reveal_counts(L, steps):
    """How many of L tokens the official MaskGIT sampler fixes in each step -> `steps` ints, sum L.

    Every step fixes at least one token until none is left, so the last counts can be 0.
    """
    if steps == 1:
        return [L]                                                  # the official code divides by 0
    v = gamma(torch.linspace(1, 0, steps))
    counts = (v / v.sum() * L).round().clamp(min=1).long()
    counts[-1] += L - counts.sum()
    # With many steps the counts before the last exceed L, and the official sampler stops early.
    total = counts.cumsum(0).clamp(max=L)
    return total.diff(prepend=total.new_zeros(1)).tolist()


@torch.no_grad()
def sample_maskgit(teacher, c, steps, generator, s=1.0, temperature=1.0, noise=4.5):
    """The official MaskGIT sampler: T steps of "predict all, keep the most confident" (Sec. 3.1).

    teacher      a MaskGIT; c (B,) labels
    s            guidance of the last step. It rises linearly from 1, and a single step has none
    temperature  by which the logits are divided
    noise        Gumbel noise on the confidence; the noise falls linearly to 0
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
        confidence = confidence.masked_fill(z < K, -math.inf)       # fixed tokens are not chosen
        chosen = confidence.topk(count, dim=1).indices              # (B, count)
        z = z.scatter(1, chosen, tokens.gather(1, chosen))
    return z


def remask_counts(L, steps):
    """How many of L tokens the official MaskGen sampler masks again after each step.

    -> list of `steps` ints, the last of which is 0
    """
    counts = [L]                                                    # before the first step
    for ratio in gamma(torch.arange(1, steps) / steps).tolist():
        # At least one token is revealed, and one is left for the next step.
        counts.append(max(1, min(counts[-1] - 1, math.floor(L * ratio))))
    return counts[1:] + [0]


@torch.no_grad()
def sample_maskgen(teacher, c, steps, generator, s=13.0, noise=2.0):
    """The official MaskGen sampler: T steps of "predict all, mask the least confident again".

    teacher   a MaskGen; c (B, rows, W) text
    s         guidance of the last step. It rises from min(2, s) along half a cosine wave. The
              official code writes cond + g (cond - uncond), so its g is s - 1: its guidance 12,
              which rises from 1, is our 13, which rises from 2
    noise     Gumbel noise on the choice of a token and on the confidence. It falls linearly to 0:
              the last step takes the likeliest tokens
    returns   z (B, L), codes only
    """
    B, L, K = len(c), teacher.L, teacher.K
    z = torch.full((B, L), K, device=c.device)                      # all masked: z_T of Sec. 3.1
    for i, count in enumerate(remask_counts(L, steps)):
        t = (i + 1) / steps                                         # a single step: no noise
        weight = min(2, s) + (s - min(2, s)) * (1 - math.cos(math.pi * t)) / 2
        logits = guided_logits(teacher, z, c, weight)
        logits = logits / (0.5 + 0.8 * (1 - t))                     # (B, L, K), sharper each step
        noisy = logits + noise * (1 - t) * gumbel(logits.shape, generator, c.device)
        tokens = noisy.argmax(-1)                                   # (B, L)
        confidence = logits.gather(-1, tokens[..., None])[..., 0]
        confidence = confidence + noise * (1 - t) * gumbel((B, L), generator, c.device)
        confidence = torch.where(z == K, confidence, math.inf)      # fixed tokens stay
        z = torch.where(z == K, tokens, z)
        z.scatter_(1, confidence.topk(count, dim=1, largest=False).indices, K)
    return z


def sample_teacher(teacher, c, steps, generator, s, noise):
    """The teacher's own sampler: MaskGen's for text states c, MaskGIT's for labels. -> z (B, L)"""
    sampler = sample_maskgen if c.is_floating_point() else sample_maskgit
    return sampler(teacher, c, steps, generator, s=s, noise=noise)


# ---------------------------------------------------------------- the GAN (Sec. 3.4), optional
def axis_of(size, shift, centre):
    """One axis, `size` pixels long, of `diff_augment`: which pixels it moves and cuts out.

    shift, centre (B, 1) in [0, 1) -> three (B, size): the pixel to read; is it padding; is it cut
    """
    limit = int(size / 8 + 0.5)                                     # an eighth of the side
    hole = int(size / 5 + 0.5)                                      # a fifth of the side
    position = torch.arange(size, device=shift.device)
    moved = position + (shift * (2 * limit + 1)).long() - limit
    source = moved.clamp(0, size - 1)
    start = (centre * (size + 1 - hole % 2)).long() - hole // 2     # may lie beyond the border
    return source, moved != source, (position >= start) & (position < start + hole)


def diff_augment(images, generator):
    """DiffAugment (Zhao et al. 2020): colour, translation and cutout, drawn anew for each image.

    (B, 3, H, W) -> the same shape. It keeps the discriminator from learning the real images by
    heart. The official code applies it to each network's normalised input, where the same change
    of colour is half as strong for DeiT.
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

    The kernel ends at floor(3 sigma) pixels, and the images are padded with zeros.
    """
    radius = math.floor(3 * sigma)
    if radius < 1:
        return images
    x = torch.arange(-radius, radius + 1, device=images.device)
    kernel = torch.exp2(-(x / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(images.dtype).expand(3, 1, -1)  # (3, 1, 2 radius + 1)
    images = F.conv2d(images, kernel[..., None], padding=(radius, 0), groups=3)
    return F.conv2d(images, kernel[:, :, None], padding=(0, radius), groups=3)


def network_mean(logits, f):
    """Mean of f over images and logits, then over the networks, which have equal weight. -> ()

    logits: list of (B, n), one per network. The official losses are sums: lambda would depend on B.
    """
    return torch.stack([f(x.float()).mean() for x in logits]).mean()


def gan_loss(fake):
    """L_gan of the student (Sec. 3.4, hinge): its drafts' logits should be high. -> ()"""
    return network_mean(fake, lambda x: -x)


def discriminator_loss(real, fake):
    """Hinge loss: logits of real images should be above 1, those of drafts below -1. -> ()"""
    return (network_mean(real, lambda x: F.relu(1 - x))
            + network_mean(fake, lambda x: F.relu(1 + x)))


def gan_step(discriminator, opt, images, real, seen, generator, autocast):
    """One step of the discriminator on drafts and real images, then its gradient for the student.

    images, real   (B, 3, H, W), drafts and real images
    opt, seen      the discriminator's optimiser, and how many drafts it has seen before
    autocast       the context in which networks run; backward passes and steps are outside it
    returns        d L_gan / d images (B, 3, H, W); logs: logits of real images and drafts, its loss
    """
    # As in StyleGAN-XL's code, a blur that falls to 0: shapes are learnt first, and then texture.
    sigma = 2.0 * images.shape[-1] / 256 * max(0.0, 1 - seen / 300_000)

    def discriminate(x):
        with autocast:
            return discriminator(blur(x, sigma), lambda x: diff_augment(x, generator))

    # Two calls, so that real images and drafts have their own batch statistics.
    on_real = discriminate(real)
    on_drafts = discriminate(images.detach())
    loss = discriminator_loss(on_real, on_drafts)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    drafts = images.detach().requires_grad_()
    gradient, = torch.autograd.grad(gan_loss(discriminate(drafts)), drafts)
    logs = dict(gan_real=network_mean(on_real, lambda x: x),
                gan_fake=network_mean(on_drafts, lambda x: x), gan_loss=loss)
    return gradient, {key: value.detach() for key, value in logs.items()}


# ---------------------------------------------------------------- for comparison (Table 2)
# The paper's method ends above. These are two other methods, on the same networks.
class DiMO:
    """Di[M]O (Zhu et al. 2025): token-level matching on the student's drafts.

    It needs the distribution of a draft's masked tokens, given the visible ones. The student sees
    z_init only, so an auxiliary network learns this distribution from the drafts. The gradient of
    KL(teacher, auxiliary) with respect to the auxiliary's logits is applied directly to the
    student's logits. Nothing is propagated back through the sampling, and neither decoder nor Phi
    is needed. The attribute `trained` is what a checkpoint has to hold.
    """
    def __init__(self, cfg, nets):
        self.cfg, self.teacher = cfg, nets.teacher
        self.auxiliary = copy.deepcopy(nets.teacher).requires_grad_(True)
        # A constant learning rate, so that it never learns more slowly than the student.
        self.opt = torch.optim.AdamW(self.auxiliary.parameters(), lr=cfg.lr, weight_decay=0.0)
        self.trained = dict(auxiliary=self.auxiliary, auxiliary_opt=self.opt)

    def step(self, student, c, step, generator, autocast):
        """One step of the auxiliary, and the student's loss. The caller runs its backward pass.

        c (B, ...), autocast: the context in which networks run -> loss (), whose value is
        KL(teacher, auxiliary) per masked token, as in the released configuration; logs
        """
        cfg, B, K = self.cfg, len(c), student.K
        z_init = init_tokens(B, student.L, K, cfg.init_mask, generator, c.device)
        with autocast:
            logits = student(z_init, c)                             # (B, L, K)
        logits = logits.float() / cfg.temperature
        z_hat = draw(logits, 1.0, generator)                        # (B, L)
        r = gamma(uniform((B,), generator, c.device))               # as in the teacher's training
        z_masked, is_masked = remask(z_hat, r, K, generator)
        with torch.no_grad(), autocast:
            log_p = guided_logits(self.teacher, z_masked, c, cfg.refine_guidance).log_softmax(-1)
            q = self.auxiliary(z_masked, c).float()                 # (B, L, K)
        q.requires_grad_()
        kl = F.kl_div(q.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
        divergence = (kl * is_masked).sum() / is_masked.sum()       # mean over masked tokens
        gradient, = torch.autograd.grad(divergence, q)
        # The bracket is 0, and its gradient is 1: the student's logits get `gradient` as it is.
        loss = divergence.detach() + (gradient * (logits - logits.detach())).sum()
        # The auxiliary is trained like the teacher (Eq. 2), with drafts in place of data.
        r = gamma(uniform((B,), generator, c.device))
        z_masked, is_masked = remask(z_hat, r, K, generator)
        with autocast:
            predicted = self.auxiliary(z_masked, c)                 # (B, L, K)
        cross_entropy = F.cross_entropy(predicted.float().transpose(1, 2), z_hat, reduction="none")
        auxiliary_loss = (cross_entropy * is_masked).sum() / is_masked.sum()
        self.opt.zero_grad(set_to_none=True)
        auxiliary_loss.backward()
        self.opt.step()
        return loss, dict(auxiliary_loss=auxiliary_loss.detach(), entropy=entropy(logits.detach()))


class SDTT:
    """SDTT (Deschenaux and Gulcehre 2024): one step of the student learns two of the teacher's.

    There are four rounds of equal length, 16 -> 8 -> 4 -> 2 -> 1 steps. After each of them the
    student becomes the next teacher. The attribute `trained` is what a checkpoint has to hold.
    """
    def __init__(self, cfg, nets):
        self.cfg, self.original = cfg, nets.teacher
        self.teacher = copy.deepcopy(nets.teacher)
        self.trained = dict(sdtt_teacher=self.teacher)

    def step(self, student, c, step, generator, autocast):
        """The student's loss. The caller runs the backward pass.

        c (B, ...), autocast: the context in which networks run -> loss (), KL(student, teacher) per
        masked token, which is the authors' default; logs
        """
        cfg, teacher = self.cfg, self.teacher
        B, L, K = len(c), student.L, student.K
        current = 4 * (step - 1) // cfg.steps                       # round 0 .. 3
        if step > 1 and current > 4 * (step - 2) // cfg.steps:      # a later round begins
            teacher.load_state_dict(student.state_dict())
        steps = 8 >> current                                        # the student's after this round
        s = cfg.refine_guidance if current == 0 else 1              # later teachers have learnt it
        with torch.no_grad(), autocast:
            if steps > 1:
                # The authors mask training images; we have none, and sample the teacher in 4 steps.
                z = sample_teacher(self.original, c, 4, generator, cfg.sample_guidance,
                                   cfg.confidence_noise)            # (B, L)
            else:
                z = torch.zeros(B, L, dtype=torch.long, device=c.device)    # all will be masked
            t = (uniform((B,), generator, c.device) * steps).floor()    # step 0 .. steps - 1
            rank = uniform(z.shape, generator, c.device).argsort(1).argsort(1)
            # What is masked before the step, and after half of it.
            is_masked = masked_positions(rank, gamma(t / steps))    # (B, L)
            still_masked = masked_positions(rank, gamma((t + 0.5) / steps))
            z_masked = z.masked_fill(is_masked, K)
            first = guided_logits(teacher, z_masked, c, s)          # (B, L, K)
            halfway = torch.where(is_masked & ~still_masked, draw(first, 1.0, generator), z_masked)
            second = guided_logits(teacher, halfway, c, s)
            target = torch.where(still_masked[..., None], second, first)
        with autocast:
            logits = student(z_masked, c)                           # (B, L, K)
        logits = logits.float()
        kl = F.kl_div(target.log_softmax(-1), logits.log_softmax(-1), log_target=True,
                      reduction="none").sum(-1)                     # (B, L)
        loss = (kl * is_masked).sum() / is_masked.sum()
        return loss, dict(entropy=entropy(logits.detach()))


# ---------------------------------------------------------------- two tokens: `python fpd.py`
# The method on an example that can be computed by hand. An "image" is a pair of tokens x, y of 8
# codes each, and the data are a checkerboard: half of the 64 pairs never occur. A model is judged
# by the share of its samples that are such impossible pairs.
# - The teacher is exact. It gives p(x | y), p(y | x), p(x) and p(y), but, like every masked
#   diffusion model, it fills tokens that are masked together independently of each other. In two
#   steps it is right; in one step it draws from p(x) p(y), and half of its samples are impossible.
# - It can teach all the same, because it sees what is left of the draft. Let m be the probability
#   that r masks both tokens. With probability 1 - m the refinement is a possible pair, otherwise it
#   is a sample of p(x) p(y). So the fixed point of Eq. 3, on average over r ~ pi, is
#   (1 - m) p(x, y) + m p(x) p(y), in which the share of impossible pairs is m / 2.
# - The student, too, draws both tokens independently of each other. Only the random code in z_init
#   can couple them, because both depend on it. With z_init all masked its tokens are independent,
#   so that it cannot have the data's joint distribution: in the table it stays at one half.
# - At this fixed point the drift of "Eq. 6 as printed" is not 0 (see drift.py): the student of the
#   last row does not end there. The default form does.
PAIR = dict(init_mask=0.5, temperature=1.0, estimator="ste", draft_source="student",
            remask=(0.1, 0.9), refine_guidance=1.0, bandwidths=(0.02, 0.05, 0.2), affinity="joint",
            own_pair=False, per_class=None)
# Code k is the point at angle 2 pi k / 8. On a line the middle codes could not win: the gradient of
# a logit (Eq. 8) is a dot product with its code, which is largest at one of the two ends.
ANGLE = 2 * math.pi * torch.arange(8) / 8
POINTS = torch.stack([ANGLE.cos(), ANGLE.sin()], 1)                 # the codebook E, (8, 2)
# Decoder and Phi are the identity: one block, one position, and features (B, F = 1, D = 4).
IDENTITY = SimpleNamespace(decode=lambda e, c: e.flatten(1), features=lambda x: [x[:, None]])


class LogitTable:
    """A model without a network: logits (9, 9, 2, 8) of both tokens, for all 9 x 9 inputs."""
    K, L = 8, 2

    def __init__(self, probabilities):
        self.logits = probabilities.log()

    def __call__(self, z, c, drop=None):
        return self.logits[z[:, 0], z[:, 1]]                        # (B, 2, 8)


def checkerboard():
    """The data p(x, y) (8, 8), a checkerboard of 2 x 2 squares, and the exact teacher."""
    square = torch.arange(8) // 2
    p = (square[:, None] + square + 1) % 2 / 32
    # p(x | y) and p(y | x) for each input, up to a factor. The last row is for a masked token.
    x_given_y = torch.cat([p.T, p.sum(1)[None]])[None, :].expand(9, 9, 8)
    y_given_x = torch.cat([p, p.sum(0)[None]])[:, None].expand(9, 9, 8)
    table = torch.stack([x_given_y, y_given_x], 2)                  # (9, 9, 2, 8)
    return p, LogitTable(table / table.sum(-1, keepdim=True))


def both_masked(low, high):
    """m, the probability of r > 3/4, so that round(2 r) is 2, for the r of `sample_ratio`."""
    # P(r > a) is proportional to cos(a pi / 2) - cos(high pi / 2).
    end, part, whole = (math.cos(a * math.pi / 2) for a in (high, min(0.75, high), low))
    return (part - end) / (whole - end)


def train_pair(teacher, cfg, seed=0, steps=700):
    """A student of two tokens, trained with the unchanged `fpd_step` and AdamW. -> LogitTable"""
    # The student begins as the teacher, but all of its logits are finite.
    student = LogitTable(teacher.logits.exp() + 1e-3)
    opt = torch.optim.AdamW([student.logits.requires_grad_()], weight_decay=0.0)
    generator, c = torch.Generator().manual_seed(seed), torch.zeros(128, dtype=torch.long)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.05 * min(1, 2 * (1 - step / steps))
        loss, _, _ = fpd_step(student, teacher, IDENTITY, POINTS, c, cfg, generator)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return student


def joint_distribution(z):
    """How often each pair of tokens occurs in z (n, 2). -> (8, 8), sum 1"""
    return torch.bincount(8 * z[:, 0] + z[:, 1], minlength=64).view(8, 8) / len(z)


def draw_joints(panels):
    """Heat maps on one scale. panels: name, share, distribution (8, 8) of each -> PIL image"""
    side, font = 192, ImageFont.load_default(25)
    picture = Image.new("L", ((side + 50) * len(panels), 350), 255)
    pen, darkest = ImageDraw.Draw(picture), max(joint.max() for _, _, joint in panels)
    for i, (name, share, joint) in enumerate(panels):
        left = (side + 50) * i + 25
        pen.text((left + side / 2, 36), name, 0, font, anchor="mm", align="center")
        tile = Image.fromarray((255 - 255 * joint / darkest).byte().numpy())
        picture.paste(tile.resize((side, side), Image.Resampling.NEAREST), (left, 72))
        pen.rectangle((left, 72, left + side, 72 + side), outline=128)
        pen.text((left + side / 2, 286), f"{share:.3f}", 0, font, anchor="mm")
    pen.text((picture.width / 2, 328), "row: token x    column: token y    "
             "below: share of pairs that never occur in the data", 96, font, anchor="mm")
    return picture


def main():
    p, teacher = checkerboard()
    m = both_masked(*PAIR["remask"])
    generator, c = torch.Generator().manual_seed(0), torch.zeros(20_000, dtype=torch.long)
    rows = [("data", 0, p),
            ("teacher,\n2 steps", 0, joint_distribution(sample_maskgit(teacher, c, 2, generator))),
            ("teacher,\n1 step", 0.5, joint_distribution(sample_maskgit(teacher, c, 1, generator))),
            ("fixed point,\nexact", m / 2, (1 - m) * p + m * p.sum(1, keepdim=True) * p.sum(0))]
    for name, by_hand, changes in (
            ("student,\n1 step", m / 2, {}),
            ("student,\nr up to 0.7", both_masked(0.1, 0.7) / 2, dict(remask=(0.1, 0.7))),
            ("student, z_init\nall masked", 0.5, dict(init_mask=1.0)),
            ("student, Eq. 6\nas printed", m / 2, dict(own_pair=True, affinity="apart"))):
        cfg = SimpleNamespace(**PAIR | changes)
        z_hat = one_step(train_pair(teacher, cfg), c, cfg.init_mask, generator)
        rows.append((name, by_hand, joint_distribution(z_hat)))
    print("share of impossible pairs        by hand   measured")
    for name, by_hand, joint in rows:
        print(f"{' '.join(name.split()):30} {by_hand:9.3f} {joint[p == 0].sum():10.3f}")
    panels = [(name, joint[p == 0].sum(), joint) for name, _, joint in rows]
    draw_joints(panels[:1] + panels[2:]).save("fpd.png")


if __name__ == "__main__":
    torch.set_num_threads(1)            # more would only slow down such small tensors
    main()
