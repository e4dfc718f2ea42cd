"""drift.py - the multi-bandwidth drift loss (Sec. 3.3, Eq. 6 and 7).

drafts' features       X (B, F, D) --+
                                     +--> V_h for each bandwidth h (Eq. 6) --> loss (Eq. 7)
refinements' features  Y (B, F, D) --+

Called by fpd.py. Nothing in here knows about tokens, images or the teacher: X and Y are two clouds
of particles. Particles of one position (second axis) see each other, others never do.

    B particles   F positions   D feature width   V the drift
    h one bandwidth, in units of the mean distance
"""
import torch


def distances(X, Y):
    """Euclidean distances between the particles of each position.

    X (F, B, D), Y (F, C, D) -> (F, B, C)
    The floor under the root is the official drifting code's. A particle's distance to itself is
    rounding: in float32 up to about 1e-2 of the mean distance.
    """
    # |x - y|^2 = x^2 + y^2 - 2 x y: its only heavy part is one batched matrix product
    x2 = X.pow(2).sum(-1)[:, :, None]                               # (F, B, 1)
    y2 = Y.pow(2).sum(-1)[:, None, :]                               # (F, 1, C)
    return (x2 + y2 - 2 * X @ Y.transpose(1, 2)).clamp(min=1e-8).sqrt()


def double_softmax(logits):
    """The "doubly-normalized softmax" of Sec. 3.3: over the targets and over the particles.

    logits (F, B, C) -> root of the two softmaxes' product, (F, B, C)
    """
    return (logits.softmax(2) * logits.softmax(1)).sqrt()


def drift(X, Y, h, joint=True, self_negative=False, own_target=False):
    """Where the drafts should move: V_h of Eq. 6, for one bandwidth.

    X (B, F, D)      features of the drafts; the others are the negatives X_sigma(j) of Eq. 6,
                     "cyclic in-batch shifts": of X by 1, 2, ..., B - 1
    Y (C, F, D)      features of the refinements; usually C = B
    h                bandwidth of the Laplace kernel exp(-distance / h), in units of the mean
                     distance: 0.02 then means the same in every feature space
    joint            True: attraction and repulsion share one normalisation, and balance each other
                     (Deng et al. 2026). False: each has its own, as Eq. 6 is printed
    self_negative    is X_i one of its own negatives? It exerts no force, but has its share of a-
    own_target       is Y_i, its own refinement, one of the targets of X_i? With neither, X_i meets
                     only what does not depend on it, and V is 0 on average where both clouds have
                     one distribution: there Eq. 3 holds
    returns          V (B, F, D), float32, without gradient
    """
    if X.ndim != 3 or Y.ndim != 3 or X.shape[1:] != Y.shape[1:]:
        raise ValueError("drift wants X (B, F, D) and Y (C, F, D), "
                         f"got {tuple(X.shape)} and {tuple(Y.shape)}")
    B = X.shape[0]
    if B < 2 and not self_negative:
        raise ValueError("drift needs at least 2 drafts that are compared with each other: "
                         "a lone one has no negative")
    if not own_target and len(Y) != B:
        raise ValueError("own_target=False needs one refinement per draft, "
                         f"got {B} drafts and {len(Y)} refinements")
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
        # bf16 would round whole neighbourhoods together
        dtype = torch.promote_types(X.dtype, torch.float32)
        X = X.detach().to(dtype).transpose(0, 1)                    # (F, B, D)
        Y = Y.detach().to(dtype).transpose(0, 1)                    # (F, C, D)
        to_X, to_Y = distances(X, X), distances(X, Y)               # (F, B, B), (F, B, C)
        # the mean distance, one number for all positions
        unit = torch.cat([to_X, to_Y], 2).mean().clamp(min=1e-3)
        # a+- ~ exp(-|X_i - .| / h): the Laplace kernel, as logits of the softmaxes
        l_neg, l_pos = -to_X / unit / h, -to_Y / unit / h
        # who is left out is put 100 mean distances further away: an affinity of 0
        own = torch.eye(B, dtype=dtype, device=X.device) * 100 / h
        if not self_negative:
            l_neg = l_neg - own
        if not own_target:
            l_pos = l_pos - own
        if joint:
            a = double_softmax(torch.cat([l_neg, l_pos], 2))
            a_neg, a_pos = a[..., :B], a[..., B:]
            # each side times the sum of the other: both then have the same sum, and V is a weighted
            # sum of differences Y_j - X_k, in which X_i itself cancels
            sum_neg, sum_pos = a_neg.sum(2, keepdim=True), a_pos.sum(2, keepdim=True)
            a_neg, a_pos = a_neg * sum_pos, a_pos * sum_neg
        else:
            a_neg, a_pos = double_softmax(l_neg), double_softmax(l_pos)
        # Eq. 6, sum_j a+_ij (Y_j - X_i) and sum_j a-_ij (X_sigma(j) - X_i)
        attract = a_pos @ Y - a_pos.sum(2, keepdim=True) * X        # (F, B, D)
        repel = a_neg @ X - a_neg.sum(2, keepdim=True) * X          # (F, B, D)
        return (attract - repel).transpose(0, 1)                    # (B, F, D)


def rms(V, scale):
    """Z_h of Eq. 7: root mean square of V. Below 1e-4 of the features' scale V is rounding."""
    return torch.maximum(V.pow(2).mean().sqrt(), 1e-4 * scale)


def drift_loss(X, Y, bandwidths, **form):
    """Squared distance from the drafts' features to where the drift would move them (Eq. 7).

    X (B, F, D)   features of the drafts; the only input that carries gradient
    Y (C, F, D)   features of the refinements; constants
    bandwidths    the set H; form: the switches of `drift`
    returns       loss (), float32; logs: "rms_<h>", RMS of the drift, and, where drafts and
                  refinements pair up, "cos_<h>", its cosine with Y - X
    The loss's value is sum_h RMS(V_h), its gradient -2 / X.numel() * sum_h V_h / RMS(V_h): a
    descent step goes along the drift, equally strong for each bandwidth. The mean is over D as
    well, where Eq. 7 has a squared norm: blocks of any width then weigh the same.
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
