"""drift.py - the multi-bandwidth drift loss (Sec. 3.3, Eq. 6 and 7).

drafts' features       X (B, F, D) --+
                                     +--> V_h for each bandwidth h (Eq. 6) --> loss (Eq. 7)
refinements' features  Y (B, F, D) --+

Nothing here depends on tokens, images or the teacher: X and Y are two clouds of particles. Only
particles of the same index in F are compared: a position of the grid or, for classes, a pair
(class, position). `python drift.py` draws Eq. 6 and tests which form of it is 0 at a fixed point.

    B drafts   C refinements   F positions   D feature width   V the drift   h a bandwidth
"""
import cmath
import math

import torch
from PIL import Image, ImageDraw, ImageFont


def distances(X, Y):
    """Euclidean distances of the particles of each position. X (F, B, D), Y (F, C, D) -> (F, B, C)

    The lower bound of 1e-8 is that of the official drifting code. It does not hide rounding: in
    float32, a particle can be up to 1e-2 of the mean distance away from itself.
    """
    # |x - y|^2 = x^2 + y^2 - 2 x y, whose only expensive part is one batched matrix product.
    x2 = X.pow(2).sum(-1)[:, :, None]                               # (F, B, 1)
    y2 = Y.pow(2).sum(-1)[:, None, :]                               # (F, 1, C)
    return (x2 + y2 - 2 * X @ Y.transpose(1, 2)).clamp(min=1e-8).sqrt()


def double_softmax(exponents):
    """The "doubly-normalized softmax" of Sec. 3.3: over the targets and over the particles.

    The first decides which targets (or negatives) move a particle, and the second keeps one target
    from moving all particles.   exponents (F, B, C) -> root of the softmaxes' product, (F, B, C)
    """
    return (exponents.softmax(2) * exponents.softmax(1)).sqrt()


def drift(X, Y, bandwidths, joint=True, self_negative=False, own_target=False):
    """Where the drafts should move: V_h of Eq. 6, for each bandwidth h.

        V_h(X_i) = sum_j a+_ij (Y_j - X_i) - sum_j a-_ij (X_sigma(j) - X_i)                  Eq. 6
        loss = sum_h 1 / Z_h mean_i |X_i - sg(X_i + V_h(X_i))|^2                             Eq. 7

    Refinements attract, and drafts repel each other, so that they do not gather. X_sigma(j), in the
    paper a shift of the batch, is every draft, X_i itself only with self_negative (see FORMS).
    The Laplace kernel falls more slowly than a Gaussian, so distant targets still count. A small h
    moves only the drafts that are near a target, and a large h moves all of them.

    X (B, F, D)      features of the drafts
    Y (C, F, D)      features of the refinements; C may differ from B if own_target
    bandwidths       the set H of all h, each in units of the mean distance
    joint            True: attraction and repulsion share one normalisation and have equal weight
                     (Deng et al. 2026). False: each has its own, as Eq. 6 is printed
    self_negative    whether X_i is one of its own negatives. X_i does not push itself, but takes
                     its share of the softmax, and so weakens all other negatives
    own_target       whether Y_i, the refinement of X_i, is one of the targets of X_i
    returns          list of V_h (B, F, D), one for each h, float32, without gradient

    By default X_i is compared only with particles that are independent of it. V is then 0 on
    average, as `drift_at_rest` measures, if (X_i, Y_i) and (Y_i, X_i) have the same distribution.
    """
    B = X.shape[0]
    if B < 2 and not self_negative:
        raise ValueError("drift needs at least 2 drafts: a single draft has no negatives")
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
        # In bfloat16, the distances to all particles of a neighbourhood would round to one number.
        dtype = torch.promote_types(X.dtype, torch.float32)
        X = X.detach().to(dtype).transpose(0, 1)                    # (F, B, D)
        Y = Y.detach().to(dtype).transpose(0, 1)                    # (F, C, D)
        d_neg, d_pos = distances(X, X), distances(X, Y)             # (F, B, B), (F, B, C)
        # The unit is the mean distance, so that an h means the same in every feature space.
        unit = torch.cat([d_neg, d_pos], 2).mean().clamp(min=1e-3)
        d_neg, d_pos = d_neg / unit, d_pos / unit
        # An excluded pair is moved 100 units apart, where its affinity underflows to 0.
        own = 100 * torch.eye(B, dtype=dtype, device=X.device)
        if not self_negative:
            d_neg = d_neg + own
        if not own_target:
            d_pos = d_pos + own
        drifts = []
        for h in bandwidths:
            # a+ and a- are the affinities, made from the kernel exp(-distance / h).
            if joint:
                a = double_softmax(-torch.cat([d_neg, d_pos], 2) / h)
                a_neg, a_pos = a[..., :B], a[..., B:]
                # Each side is multiplied by the sum of the other, so that both sums are equal. X_i
                # then cancels in Eq. 6, and V_i = sum_j sum_k a+_ij a-_ik (Y_j - X_k).
                sum_neg, sum_pos = a_neg.sum(2, keepdim=True), a_pos.sum(2, keepdim=True)
                a_neg, a_pos = a_neg * sum_pos, a_pos * sum_neg
            else:
                a_neg, a_pos = double_softmax(-d_neg / h), double_softmax(-d_pos / h)
            # Eq. 6: sum_j a+_ij (Y_j - X_i) and sum_j a-_ij (X_j - X_i).
            attract = a_pos @ Y - a_pos.sum(2, keepdim=True) * X    # (F, B, D)
            repel = a_neg @ X - a_neg.sum(2, keepdim=True) * X      # (F, B, D)
            drifts.append((attract - repel).transpose(0, 1))        # (B, F, D)
    return drifts


def rms(V, scale):
    """Z_h of Eq. 7: the RMS of V, or 1e-4 of the features' scale where V is a rounding error."""
    return torch.maximum(V.pow(2).mean().sqrt(), 1e-4 * scale)


def drift_loss(X, Y, bandwidths, **form):
    """Squared distance from the drafts' features to where the drift would move them (Eq. 7).

    X (B, F, D)   features of the drafts; the only input that carries gradient
    Y (C, F, D)   features of the refinements; constants
    bandwidths    the set H of all h
    form          joint, self_negative and own_target of `drift`
    returns       loss (), float32; logs: "rms_<h>", the RMS of the drift, and, where each draft
                  has one refinement, "cos_<h>", the drift's mean cosine with Y - X
    The loss is sum_h RMS(V_h), and its gradient -2 / X.numel() * sum_h V_h / RMS(V_h): gradient
    descent moves X along the drift, and all bandwidths have the same strength. In place of the
    squared norm of Eq. 7, a sum over D, we take the mean: blocks of every width weigh the same.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    scale = X.detach().std().clamp(min=1e-3)
    loss, logs = 0.0, {}
    for h, V in zip(bandwidths, drift(X, Y, bandwidths, **form)):   # V (B, F, D)
        Z = rms(V, scale)
        loss = loss + (X - (X + V).detach()).pow(2).mean() / Z      # Eq. 7, where .detach() is sg
        logs[f"rms_{h:g}"] = Z
        if X.shape == Y.shape:
            logs[f"cos_{h:g}"] = torch.cosine_similarity(V, (Y - X).detach(), dim=2).mean()
    return loss, logs


# ---------------------------------------------------------------- Eq. 6 in a picture
# Is a draft's own refinement among its targets, is the draft itself among its negatives, and are
# both sides normalised together or apart? The negatives of Eq. 6 are "cyclic in-batch shifts".
# One fixed shift only reorders the batch, so X_i is in the sum over j; in the sum over all shifts
# except 0 it is not. The paper does not say which it means. "Eq. 6 as printed" here includes it.
FORMS = {
    "target, not negative, joint (the official drifting code)": dict(own_target=True),
    "target, not negative, apart": dict(own_target=True, joint=False),
    "target, negative, apart (Eq. 6 as printed; default for captions)":
        dict(own_target=True, self_negative=True, joint=False),
    "target, negative, joint": dict(own_target=True, self_negative=True),
    "neither, joint (default for classes)": {}}


def drift_at_rest(rho, bandwidths, batches=60, **form):
    """The component of V along X at a known fixed point, where it should be 0, in units of X.

    X is Gaussian, and Y = rho X + noise has the same distribution, as a refinement of X does when
    Eq. 3 holds. Above 0 the drafts spread, below 0 they gather.   -> mean and standard error, (H,)
    """
    generator, along = torch.Generator().manual_seed(0), []
    for _ in range(batches):
        X, noise = (torch.randn(16, 64, 8, generator=generator) for _ in range(2))
        drifts = drift(X, rho * X + (1 - rho ** 2) ** 0.5 * noise, bandwidths, **form)
        along.append(torch.stack([(V * X).mean() / X.pow(2).mean() for V in drifts]))
    along = torch.stack(along)                                      # (batches, H)
    return along.mean(0), along.std(0) / batches ** 0.5


def draw_drift(bandwidths):
    """The drift for each h, and the sum of V_h / Z_h, along which Eq. 7 moves X. -> PIL image"""
    generator, side = torch.Generator().manual_seed(0), 1230
    angle = 2 * math.pi * torch.arange(40)[:, None] / 40
    ring = torch.cat([angle.cos(), -angle.sin()], 1)                # (40, 2); y points down
    X = ring * (1 + 0.3 * angle.cos()) + 0.05 * torch.randn(40, 2, generator=generator)
    Y = X + ring * (0.5 - 0.4 * angle.sin())                        # outside X, by less at the top
    drifts = [V[:, 0] for V in drift(X[:, None], Y[:, None], bandwidths)]   # (40, 2) each
    panels = [(f"h = {h:g}", V) for h, V in zip(bandwidths, drifts)]
    panels.append(("all: sum of V_h / Z_h", sum(V / rms(V, X.std()) for V in drifts)))
    # Everything is drawn three times as large and then scaled down, so that lines are smooth.
    picture = Image.new("RGB", (side * len(panels), 1390), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(66)
    for i, (title, V) in enumerate(panels):
        pen.text((side * i + 615, 50), title, "black", font, anchor="mm")
        # The longest arrow is equally long in every panel.
        places = torch.stack([X, Y, X + 0.6 * V / V.norm(dim=1).max()], 1)  # (40, 3, 2)
        places = 280 * places + torch.tensor([side * i + 555, 615])
        for start, target, tip in places.tolist():
            length, turn = cmath.polar(complex(*start).conjugate() - complex(*tip).conjugate())
            pen.regular_polygon((target, 14), 24, outline="orangered", width=6)
            pen.regular_polygon((start, 13), 24, 0, "navy")
            pen.line(start + tip, "navy", 8)
            pen.regular_polygon((tip, length / 5), 3, math.degrees(turn) + 90, "navy")
    pen.text((side, 1290), "drafts X, which move along V_h", "navy", font)
    pen.text((side * 2 + 100, 1290), "refinements Y, the targets", "orangered", font)
    return picture.resize((410 * len(panels), 463), Image.Resampling.LANCZOS).quantize(32)


def main():
    print(f"{'component of V along X at a known fixed point':64}   h = 0.05    0.2    0.5")
    for name, form in FORMS.items():
        mean, _ = drift_at_rest(0.95, (0.05, 0.2, 0.5), **form)
        print(f"{name:64}   " + "   ".join(f"{component:+z.3f}" for component in mean))
    draw_drift((0.02, 0.05, 0.2)).save("drift.png")


if __name__ == "__main__":
    main()
