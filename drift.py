"""drift.py - the multi-bandwidth drift loss (Sec. 3.3, Eq. 6 and 7).

drafts' features       X (B, F, D) --+
                                     +--> V_h for each bandwidth h (Eq. 6) --> loss (Eq. 7)
refinements' features  Y (B, F, D) --+

Called by fpd.py. Nothing in here depends on tokens, images or the teacher: X and Y are two clouds
of particles, and only particles at the same position (second axis) are compared.

    B, C particles   F positions   D feature width   V the drift
    h one bandwidth, in units of the mean distance
"""
import torch


def distances(X, Y):
    """Euclidean distances between the particles of each position.

    X (F, B, D), Y (F, C, D) -> (F, B, C)
    The official drifting code has the same lower bound, 1e-8, under the root. The distance of a
    particle to itself is not 0 but a rounding error, in float32 up to about 1e-2 of the mean.
    """
    # |x - y|^2 = x^2 + y^2 - 2 x y, whose only expensive part is one batched matrix product
    x2 = X.pow(2).sum(-1)[:, :, None]                               # (F, B, 1)
    y2 = Y.pow(2).sum(-1)[:, None, :]                               # (F, 1, C)
    return (x2 + y2 - 2 * X @ Y.transpose(1, 2)).clamp(min=1e-8).sqrt()


def double_softmax(logits):
    """The "doubly-normalized softmax" of Sec. 3.3: over the targets and over the particles.

    logits (F, B, C) -> square root of the product of both, (F, B, C)
    """
    return (logits.softmax(2) * logits.softmax(1)).sqrt()


def drift(X, Y, h, joint=True, self_negative=False, own_target=False):
    """Where the drafts should move: V_h of Eq. 6, for one bandwidth.

    X (B, F, D)      features of the drafts. The negatives X_sigma(j) of X_i in Eq. 6 are the other
                     drafts: sigma runs through the cyclic shifts of the batch by 1, ..., B - 1
    Y (C, F, D)      features of the refinements; C may differ from B if own_target
    h                bandwidth of the Laplace kernel exp(-distance / h), in units of the mean
                     distance, so that 0.02 means the same in every feature space
    joint            True: attraction and repulsion share one normalisation and have equal weight
                     (Deng et al. 2026). False: each has its own, as Eq. 6 is printed
    self_negative    whether X_i is one of its own negatives. It exerts no force on itself, but
                     takes its share of the affinities a-
    own_target       whether Y_i, the refinement of X_i, is one of the targets of X_i. Without
                     self_negative and own_target, X_i is compared only with particles that are
                     independent of it. V is then 0 on average where drafts and refinements have
                     the same distribution, that is, where Eq. 3 holds
    returns          V (B, F, D), float32, without gradient
    """
    B = X.shape[0]
    if B < 2 and not self_negative:
        raise ValueError("drift needs at least 2 drafts that are compared with each other: "
                         "a single draft has no negatives")
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
        # in bfloat16, the distances to all particles of a neighbourhood would round to one number
        dtype = torch.promote_types(X.dtype, torch.float32)
        X = X.detach().to(dtype).transpose(0, 1)                    # (F, B, D)
        Y = Y.detach().to(dtype).transpose(0, 1)                    # (F, C, D)
        to_X, to_Y = distances(X, X), distances(X, Y)               # (F, B, B), (F, B, C)
        # the mean distance, one number for all positions
        unit = torch.cat([to_X, to_Y], 2).mean().clamp(min=1e-3)
        # a+- ~ exp(-|X_i - .| / h): the exponents are the logits of the softmaxes
        l_neg, l_pos = -to_X / unit / h, -to_Y / unit / h
        # excluded pairs get 100 extra units of distance: their affinity underflows to 0
        own = torch.eye(B, dtype=dtype, device=X.device) * 100 / h
        if not self_negative:
            l_neg = l_neg - own
        if not own_target:
            l_pos = l_pos - own
        if joint:
            a = double_softmax(torch.cat([l_neg, l_pos], 2))
            a_neg, a_pos = a[..., :B], a[..., B:]
            # Each side is multiplied by the sum of the other, so that both sums are equal. X_i then
            # cancels in Eq. 6, and V_i is a weighted sum of the differences Y_j - X_k
            sum_neg, sum_pos = a_neg.sum(2, keepdim=True), a_pos.sum(2, keepdim=True)
            a_neg, a_pos = a_neg * sum_pos, a_pos * sum_neg
        else:
            a_neg, a_pos = double_softmax(l_neg), double_softmax(l_pos)
        # Eq. 6, sum_j a+_ij (Y_j - X_i) and sum_j a-_ij (X_sigma(j) - X_i)
        attract = a_pos @ Y - a_pos.sum(2, keepdim=True) * X        # (F, B, D)
        repel = a_neg @ X - a_neg.sum(2, keepdim=True) * X          # (F, B, D)
        return (attract - repel).transpose(0, 1)                    # (B, F, D)


def rms(V, scale):
    """Z_h of Eq. 7: the RMS of V. A V below 1e-4 of the features' scale is a rounding error."""
    return torch.maximum(V.pow(2).mean().sqrt(), 1e-4 * scale)


def drift_loss(X, Y, bandwidths, **form):
    """Squared distance from the drafts' features to where the drift would move them (Eq. 7).

    X (B, F, D)   features of the drafts; the only input that carries gradient
    Y (C, F, D)   features of the refinements; constants
    bandwidths    the set H of Eq. 7
    form          joint, self_negative and own_target of `drift`
    returns       loss (), float32; logs: "rms_<h>", the RMS of the drift, and, where each draft
                  has one refinement, "cos_<h>", the drift's mean cosine with Y - X
    The value of the loss is sum_h RMS(V_h), and its gradient is -2 / X.numel() * sum_h V_h /
    RMS(V_h): a step of gradient descent moves the features along the drift, and every bandwidth
    has the same strength. Where Eq. 7 has the squared norm, which is a sum over D, we take the
    mean, so that blocks of every width have the same weight.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    scale = X.detach().std().clamp(min=1e-3)
    loss, logs = 0.0, {}
    for h in bandwidths:
        V = drift(X, Y, h, **form)                                  # (B, F, D)
        Z = rms(V, scale)
        # Eq. 7; the paper's sg(.) is .detach() here
        loss = loss + (X - (X + V).detach()).pow(2).mean() / Z
        logs[f"rms_{h:g}"] = Z
        if X.shape == Y.shape:
            logs[f"cos_{h:g}"] = torch.cosine_similarity(V, (Y - X).detach(), dim=2).mean()
    return loss, logs
