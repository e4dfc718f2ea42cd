"""drift.py - the multi-bandwidth drift loss (Sec. 3.3, Eq. 6 and 7).

features of the drafts      X (B, F, D) --+
                                          +--> V_h for every bandwidth h (Eq. 6) --> / Z_h, summed --> loss (Eq. 7)
features of refinements     Y (B, F, D) --+

Called by fpd.py. Nothing in here knows about tokens, images or the teacher: X and Y are two clouds of particles.
The particles of one *position* (second axis) see each other, those of different positions never do.

    B particles   F positions   D feature width   h one bandwidth, in units of the mean distance   V the drift
"""
import torch


def distances(X, Y):
    """Euclidean distances between all particles of each position. X (F, B, D), Y (F, C, D) -> (F, B, C).

    A particle's distance to itself is not exactly 0 but rounding, up to about 1e-2 of the mean distance in float32; the floor
    under the root is the official drifting code's.
    """
    # The explicit form (not cdist) has a batched matrix product as its only heavy part, on every device.
    squared = X.pow(2).sum(-1)[:, :, None] + Y.pow(2).sum(-1)[:, None, :] - 2 * X @ Y.transpose(1, 2)
    return squared.clamp(min=1e-8).sqrt()


def double_softmax(logits, floor):
    """sqrt(softmax over the targets x softmax over the particles): the "doubly normalised" affinity. logits (F, B, C)."""
    return (logits.softmax(2) * logits.softmax(1)).clamp(min=floor).sqrt()


def drift(X, Y, h, joint=True, self_negative=False, own_target=False, floor=0.0):
    """Where the drafts should move: V_h of Eq. 6, for one bandwidth.

    X (B, F, D)      features of the drafts; they are also each other's negatives, the X_sigma(j) of Eq. 6
    Y (C, F, D)      features of the refinements; usually C = B
    h                bandwidth of the Laplace kernel exp(-distance / h), in units of the mean distance. Without that
                     unit a value such as 0.02 would mean something else in every feature space
    joint            True: attraction and repulsion share one normalisation and balance each other (Deng et al. 2026).
                     False: each has its own, as Eq. 6 is printed
    self_negative    is X_i one of the negatives of X_i? (It exerts no force, but it takes its share of the affinity.)
    own_target       is Y_i, its own refinement, one of the targets of X_i? With neither, X_i meets only what does not depend
                     on it, and V is 0 on average where the two clouds have one distribution: there Eq. 3 holds
    floor            least value of the product of the two softmaxes; the official drifting code has 1e-6
    returns          V (B, F, D), float32, without gradient
    """
    if X.ndim != 3 or Y.ndim != 3 or X.shape[1:] != Y.shape[1:]:
        raise ValueError(f"drift wants X (B, F, D) and Y (C, F, D), got {tuple(X.shape)} and {tuple(Y.shape)}")
    B = X.shape[0]
    if B < 2 and not self_negative:
        raise ValueError("drift needs at least 2 drafts that are compared with each other: a lone one has no negative")
    if not own_target and len(Y) != B:
        raise ValueError(f"own_target=False needs one refinement per draft, got {B} drafts and {len(Y)} refinements")
    with torch.no_grad(), torch.autocast(X.device.type, enabled=False):
        dtype = torch.promote_types(X.dtype, torch.float32)          # bf16 would round whole neighbourhoods together
        X, Y = X.detach().to(dtype).transpose(0, 1), Y.detach().to(dtype).transpose(0, 1)   # (F, B, D), (F, C, D)
        to_X, to_Y = distances(X, X), distances(X, Y)                                       # (F, B, B), (F, B, C)
        unit = torch.cat([to_X, to_Y], 2).mean().clamp(min=1e-3)     # the mean distance, one number for all positions
        # a+- ~ exp(-|X_i - .| / h): the Laplace kernel of Eq. 6, as logits for the two softmaxes
        l_neg, l_pos = -to_X / unit / h, -to_Y / unit / h
        own = torch.eye(B, dtype=dtype, device=X.device) * 100 / h                          # exp(-100 / h) is 0
        if not self_negative:
            l_neg = l_neg - own
        if not own_target:
            l_pos = l_pos - own
        if joint:
            a = double_softmax(torch.cat([l_neg, l_pos], 2), floor)
            a_neg, a_pos = a[..., :B], a[..., B:]
            # each side is weighted with the total of the other, so that both sum to the same: V is then a weighted
            # mean of differences Y_j - X_k, in which X_i itself cancels
            a_neg, a_pos = a_neg * a_pos.sum(2, keepdim=True), a_pos * a_neg.sum(2, keepdim=True)
        else:
            a_neg, a_pos = double_softmax(l_neg, floor), double_softmax(l_pos, floor)
        attract = a_pos @ Y - a_pos.sum(2, keepdim=True) * X         # Eq. 6, sum_j a+_ij (Y_j - X_i)
        repel = a_neg @ X - a_neg.sum(2, keepdim=True) * X           # Eq. 6, sum_j a-_ij (X_sigma(j) - X_i)
        return (attract - repel).transpose(0, 1)                     # Eq. 6, (B, F, D)


def rms(V, scale):
    """Root mean square of V, but not less than 1e-4 of the features' scale: what is smaller is rounding, not to be blown up."""
    return torch.maximum(V.pow(2).mean().sqrt(), 1e-4 * scale)


def drift_loss(X, Y, bandwidths, **form):
    """Squared distance from the drafts' features to where the drift would move them (Eq. 7).

    X (B, F, D)   features of the drafts; the only input that carries gradient
    Y (C, F, D)   features of the refinements; constants
    bandwidths    the set H; form: the switches of `drift`
    returns       loss (), float32, and logs: "rms_<h>" = RMS of the drift and "cos_<h>" = its cosine with Y - X when they pair up.
                  d loss / d X = -2 / X.numel() * sum_h V_h / RMS(V_h): a descent step is a step along the drift, each
                  bandwidth with the same strength.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    loss, logs, scale = 0.0, {}, X.detach().std().clamp(min=1e-3)
    for h in bandwidths:
        V = drift(X, Y, h, **form)                                    # (B, F, D)
        logs[f"rms_{h:g}"] = rms(V, scale)
        if X.shape == Y.shape:
            logs[f"cos_{h:g}"] = torch.cosine_similarity(V, (Y - X).detach(), dim=2).mean()
        goal = (X + V).detach()                                       # Eq. 7; the paper's sg(.) is .detach() here
        loss = loss + (X - goal).pow(2).mean() / rms(V, scale)        # Eq. 7, the term of h, Z_h = RMS(V_h); its value is RMS(V_h)
    return loss, logs
