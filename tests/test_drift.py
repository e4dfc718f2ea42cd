"""drift.py: equal to the recorded numbers of the official drifting code (golden/drift_loss) and to
Eq. 6 in plain loops, and by default at rest where Eq. 3 holds."""
import math

import numpy as np
import pytest
import torch
from conftest import load_case
from PIL import Image

import drift as drift_module
from drift import distances, double_softmax, drift, drift_at_rest, drift_loss

GOLDEN = load_case("drift_loss", "cases")
# The cases with extra negatives (pos_neg, pos_neg_weighted, single_R, larger) are left out. There
# the official code has weighted images of other classes as negatives, for guidance, whereas the
# only negatives of FPD are the other drafts (Eq. 6).
CASES = [case for case in GOLDEN.info["cases"] if case["C_n"] == 0 and case["C_g"] > 1]
assert len(CASES) == 4
H = (0.02, 0.05, 0.2)
# The targets of the official drifting code do not depend on the particles, so all of them attract
# every particle
PUBLIC = dict(joint=True, self_negative=False, own_target=True)
FORMS = [dict(joint=joint, self_negative=self_negative, own_target=own_target)
         for self_negative, own_target in ((False, True), (True, True), (False, False))
         for joint in (True, False)]

golden = pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])


@pytest.fixture
def floor(monkeypatch):
    """The official code's lower bound of 1e-6 for the product of the two softmaxes, which FPD does
    without."""
    monkeypatch.setattr("drift.double_softmax",
                        lambda logits: double_softmax(logits).clamp(min=1e-3))


every_form = pytest.mark.parametrize("form", FORMS, ids=str)


def clouds(B=6, C=6, F=3, D=8, seed=0, dtype=torch.float64, near=False):
    """X (B, F, D) and Y (C, F, D); near: Y_i is a refinement of X_i, as in training."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(B, F, D, generator=generator, dtype=torch.float64)
    Y = 0.5 + torch.randn(C, F, D, generator=generator, dtype=torch.float64)
    return X.to(dtype), (X + 0.3 * Y if near else Y).to(dtype)


def rms(V):
    return V.pow(2).mean().sqrt()


# ---------------------------------------------------------------- the official numbers
def official(case):
    """-> X (C_g, groups, S), Y (C_p, groups, S), s.

    The official B groups share one scale and are not compared with each other, like our F
    positions. The official code divides the coordinates by s = scale / sqrt(S), so its forces are
    ours / s, and its gradient is ours * s.
    """
    def array(recipe, n):
        seed, scale, shift = recipe
        random = np.random.RandomState(seed)
        values = random.standard_normal((case["B"], n, case["S"])) * scale + shift
        return torch.from_numpy(values.astype(np.float32)).transpose(0, 1)
    X, Y = array(case["gen"], case["C_g"]), array(case["pos"], case["C_p"])
    return X, Y, case["info"]["scale"] / case["S"] ** 0.5


@golden
def test_unit_and_drift_of_each_bandwidth_equal_the_official_scale_and_force(case, floor):
    """The recorded `info` has the mean squared force of each bandwidth, before normalisation."""
    X, Y, s = official(case)
    x, y = X.transpose(0, 1), Y.transpose(0, 1)
    unit = torch.cat([distances(x, x), distances(x, y)], 2).mean()
    assert unit.item() == pytest.approx(case["info"]["scale"], rel=5e-5)
    for h, V in zip(H, drift(X, Y, H, **PUBLIC), strict=True):
        expected = case["info"][f"loss_{h}"]
        assert (V / s).pow(2).mean().item() == pytest.approx(expected, rel=5e-5)


@golden
def test_sum_of_normalised_drifts_equals_the_official_loss(case, floor):
    """The value of the official loss is the mean square of sum_h V_h / RMS(V_h). It cannot fall
    below a constant, whereas ours, sum_h RMS(V_h), can."""
    X, Y, _ = official(case)
    total = torch.zeros_like(X)                                     # (C_g, groups, S)
    for V in drift(X, Y, H, **PUBLIC):
        total = total + V / rms(V)
    expected = GOLDEN.arrays[case["name"] + ".loss"]
    np.testing.assert_allclose(total.pow(2).mean((0, 2)), expected, rtol=1e-5)


@golden
def test_gradient_equals_the_official_gradient(case, floor):
    X, Y, s = official(case)
    X = X.contiguous().requires_grad_()
    drift_loss(X, Y, H, **PUBLIC)[0].backward()
    expected = GOLDEN.arrays[case["name"] + ".grad"]                # (groups, C_g, S)
    np.testing.assert_allclose(X.grad.transpose(0, 1) / s, expected, rtol=0,
                               atol=5e-5 * case["grad_absmax"])


def test_a_lone_draft_is_refused_where_the_official_code_goes_on():
    """Case one_gen, whose force, with a mean square of 1e-6, comes from the lower bound of the
    affinities alone: the only negative of a single particle would be the particle itself."""
    case = next(case for case in GOLDEN.info["cases"] if case["name"] == "one_gen")
    X, Y, _ = official(case)
    with pytest.raises(ValueError, match="at least 2 drafts"):
        drift(X, Y, (0.2,))
    V, = drift(X, Y, (0.2,), self_negative=True, own_target=True)
    assert V.isfinite().all()


# ---------------------------------------------------------------- Eq. 6 the slow way
def slow_drift(X, Y, h, joint, self_negative, own_target):
    """Eq. 6, one pair of particles at a time.

    X (B, F, D), Y (C, F, D) as nested lists of floats -> V, likewise
    """
    B, C, F, D = len(X), len(Y), len(X[0]), len(X[0][0])

    def distance(p, q):
        return max(sum((a - b) ** 2 for a, b in zip(p, q)), 1e-8) ** 0.5

    every = [distance(X[i][f], p[f]) for f in range(F) for i in range(B) for p in X + Y]
    unit = sum(every) / len(every)
    V = [[[0.0] * D for _ in range(F)] for _ in range(B)]
    for f in range(F):
        w_neg, w_pos = [], []
        for i in range(B):
            w_neg.append([math.exp(-distance(X[i][f], X[k][f]) / unit / h) for k in range(B)])
            w_pos.append([math.exp(-distance(X[i][f], Y[j][f]) / unit / h) for j in range(C)])
            if not self_negative:
                w_neg[i][i] = 0.0
            if not own_target:
                w_pos[i][i] = 0.0
        for i in range(B):
            # "doubly normalised": the affinity of a pair is divided by the sum over all targets of
            # the particle, and by the sum over all particles of the target
            row_neg, row_pos = sum(w_neg[i]), sum(w_pos[i])
            if joint:
                row_neg = row_pos = row_neg + row_pos
            column_neg = [sum(w_neg[m][k] for m in range(B)) for k in range(B)]
            column_pos = [sum(w_pos[m][j] for m in range(B)) for j in range(C)]
            a_neg = [math.sqrt(w_neg[i][k] / row_neg * w_neg[i][k] / column_neg[k])
                     for k in range(B)]
            a_pos = [math.sqrt(w_pos[i][j] / row_pos * w_pos[i][j] / column_pos[j])
                     for j in range(C)]
            if joint:
                a_neg, a_pos = [a * sum(a_pos) for a in a_neg], [a * sum(a_neg) for a in a_pos]
            for dim in range(D):
                x = X[i][f][dim]
                attract = sum(a * (Y[j][f][dim] - x) for j, a in enumerate(a_pos))
                repel = sum(a * (X[k][f][dim] - x) for k, a in enumerate(a_neg))
                V[i][f][dim] = attract - repel
    return V


@every_form
@pytest.mark.parametrize("h, C", [(0.05, 5), (0.2, 4), (1.0, 3)])
def test_drift_equals_eq_6_in_plain_loops(form, h, C):
    X, Y = clouds(B=4, C=C if form["own_target"] else 4, F=2, D=3)
    slow = slow_drift(X.tolist(), Y.tolist(), h, **form)
    expected = torch.tensor(slow, dtype=torch.float64)
    V, = drift(X, Y, (h,), **form)
    assert V.shape == X.shape
    torch.testing.assert_close(V, expected, rtol=1e-8, atol=1e-10 * expected.abs().max().item())


# ---------------------------------------------------------------- numbers and their types
@every_form
def test_float32_agrees_with_float64(form):
    """The tolerance is 5e-3 and not 1e-6, because the expanded squares in float32 make the distance
    of a particle to itself about 1e-3 in place of 1e-4."""
    for near in (False, True):
        X, Y = clouds(B=8, C=8, D=32, near=near)
        single = drift(X.float(), Y.float(), (0.05, 0.2), **form)
        for V, V_single in zip(drift(X, Y, (0.05, 0.2), **form), single, strict=True):
            assert V.dtype == torch.float64
            assert rms(V_single - V) < 5e-3 * rms(V)


@every_form
def test_half_precision_features_are_compared_in_float32(form):
    """Inputs in bfloat16 give the same drift as if they had been converted to float32 first, also
    under autocast, as in training."""
    X, Y = clouds(D=32, near=True, dtype=torch.bfloat16)
    expected, = drift(X.float(), Y.float(), (0.2,), **form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        V, = drift(X, Y, (0.2,), **form)
        assert V.dtype == torch.float32 and torch.equal(V, expected)
        loss, _ = drift_loss(X, Y, H, **form)
    assert loss.dtype == torch.float32 and loss.isfinite()


# ---------------------------------------------------------------- the loss (Eq. 7)
@every_form
def test_loss_is_the_sum_of_the_rms_and_its_gradient_the_sum_of_the_normalised_drifts(form):
    X, Y = clouds()
    narrow, wide = drift(X, Y, (0.05, 0.2), **form)
    X.requires_grad_()
    loss, logs = drift_loss(X, Y, (0.05, 0.2), **form)
    loss.backward()
    assert loss.item() == pytest.approx(rms(narrow).item() + rms(wide).item())
    assert logs["rms_0.05"].item() == pytest.approx(rms(narrow).item())
    assert logs["rms_0.2"].item() == pytest.approx(rms(wide).item())
    total = narrow / rms(narrow) + wide / rms(wide)
    torch.testing.assert_close(X.grad, -2 / X.numel() * total)


def test_only_the_drafts_get_gradient():
    X, Y = (x.requires_grad_() for x in clouds())
    loss, logs = drift_loss(X, Y, H)
    loss.backward()
    assert X.grad is not None and Y.grad is None
    assert not any(value.requires_grad for value in (*drift(X, Y, H), *logs.values()))


def test_cosine_is_logged_where_each_draft_has_one_refinement():
    X, Y = clouds()
    logs = drift_loss(X, Y, (0.2,), **PUBLIC)[1]
    assert set(logs) == {"rms_0.2", "cos_0.2"}
    cosine = torch.cosine_similarity(drift(X, Y, (0.2,), **PUBLIC)[0], Y - X, dim=2)
    assert logs["cos_0.2"].item() == pytest.approx(cosine.mean().item())
    assert set(drift_loss(X, Y[:5], (0.2,), **PUBLIC)[1]) == {"rms_0.2"}


@every_form
def test_a_collapsed_batch_gives_finite_numbers(form):
    """All drafts and refinements are equal: there is no drift, and no division by zero."""
    X = torch.ones(4, 2, 8).requires_grad_()
    loss, _ = drift_loss(X, X.detach().clone(), H, **form)
    loss.backward()
    assert loss.item() < 1e-5 and X.grad.isfinite().all()


@every_form
def test_a_bandwidth_does_not_depend_on_the_others(form):
    X, Y = clouds(dtype=torch.float32)
    for h, V in zip(H, drift(X, Y, H, **form), strict=True):
        assert torch.equal(V, drift(X, Y, (h,), **form)[0])


# ---------------------------------------------------------------- the own pair
@pytest.mark.parametrize("rho", [0.95, 0.7])
def test_at_a_fixed_point_only_the_drift_without_the_own_pair_is_at_rest(rho):
    """This is why it is the default: here the targets are made from the drafts.

    If the own refinement is a target and the draft is not its own negative, as when the official
    drifting code is given such pairs, drafts are pushed outwards without end. If it is both, as
    Eq. 6 is printed, they are drawn to their mean.
    """
    def component(**form):
        return torch.stack(drift_at_rest(rho, (0.05, 0.2, 0.5), **form), 1).tolist()

    rest, out = component(), component(own_target=True)
    into = component(joint=False, self_negative=True, own_target=True)
    for (mean, error), (outwards, _), (inwards, _) in zip(rest, out, into, strict=True):
        assert abs(mean) < 4 * error
        assert outwards > 10 * error and outwards > 10 * abs(mean)
        assert inwards < -10 * error and inwards < -10 * abs(mean)


def test_the_command_prints_the_table_and_writes_the_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    drift_module.main()
    header, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and "h = 0.05" in header
    assert rows[-1].split()[-3:] == ["+0.000"] * 3
    with Image.open("drift.png") as picture:
        assert picture.size == (1640, 463)
    assert (tmp_path / "drift.png").stat().st_size < 60_000
