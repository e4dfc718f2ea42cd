"""fpd.py: draws, masks, refinement, the straight-through estimator, a training step and the lift, on
networks of a few hundred weights; and the two tokens whose fixed point of Eq. 3 is known by hand.

test_official.py compares the samplers with the official ones step by step.
"""
import ast
import copy
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Recorder, gen
from conftest import tiny_maskgit as tiny
from PIL import Image

import fpd
import train
from drift import drift, drift_loss
from fpd import generators
from models import ConvNet
from tokenizer import VQGAN

K, L, CLASSES = 8, 16, 3


def chi_square(counts, p):
    """From observed counts and expected probabilities, both (n,); n - 1 degrees of freedom."""
    expected = counts.sum() * p
    return ((counts - expected) ** 2 / expected).sum().item()


# Exceeded in one case of a thousand, with 5, 7 and 63 degrees of freedom.
CHI_SQUARE_5, CHI_SQUARE_7, CHI_SQUARE_63 = 20.5, 24.3, 103.4


# ---------------------------------------------------------------- randomness
def test_draws_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    for temperature in (0.5, 1.0, 3.0):
        z = fpd.draw(logits.expand(100, 300, 6), temperature, gen())
        counts = torch.bincount(z.flatten(), minlength=6)
        assert chi_square(counts, (logits / temperature).softmax(0)) < CHI_SQUARE_5
    # a division by zero would draw any token
    with pytest.raises(ValueError, match="above 0"):
        fpd.draw(logits[None, None], 0, gen())


# ---------------------------------------------------------------- masking
def test_the_schedule_falls_from_all_masked_to_none():
    gamma = fpd.gamma(torch.linspace(0, 1, 101))
    assert gamma[[0, 50, 100]].tolist() == pytest.approx([1, 2 / 3, 0], abs=1e-6)
    assert (gamma.diff() < 0).all()


def test_remask_masks_exact_counts_and_leaves_the_rest():
    z = torch.randint(K, (6, L), generator=gen())
    before = z.clone()
    r = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.7, 1.0])
    z_masked, is_masked = fpd.remask(z, r, K, gen())
    # at least one is masked, also for r = 0
    assert is_masked.dtype == torch.bool and is_masked.sum(1).tolist() == [1, 1, 4, 8, 11, 16]
    assert (z_masked[is_masked] == K).all() and torch.equal(z_masked[~is_masked], z[~is_masked])
    assert torch.equal(z, before)


@pytest.mark.parametrize("r_init, masked", [(0.0, 0), (0.3, 5), (0.6, 10), (0.9, 14), (1.0, 16)])
def test_z_init_has_exactly_its_share_of_mask_ids_and_codes_elsewhere(r_init, masked):
    z = fpd.init_tokens(500, L, K, r_init, gen())
    assert z.shape == (500, L) and z.dtype == torch.long
    assert ((z == K).sum(1) == masked).all()
    assert z.min() >= 0 and z.max() <= K
    if masked < L:
        # nearly every image has a canvas of its own
        assert len(z.unique(dim=0)) > 450
        counts = torch.bincount(z[z < K], minlength=K).float()
        assert chi_square(counts, torch.full((K,), 1 / K)) < CHI_SQUARE_7


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.1, 0.9), (0.0, 0.5), (0.6, 0.7)])
def test_sampled_ratios_follow_arccos_cut_to_the_interval(low, high):
    """P(arccos(u) 2/pi <= x) = 1 - cos(pi x / 2), by the test of Kolmogorov and Smirnov: in 999
    cases of 1000, n^1/2 times the largest gap is below 1.95."""
    r = fpd.sample_ratio(20_000, low, high, gen()).sort().values.double()
    assert r.min() >= low - 1e-4 and r.max() <= high + 1e-4

    def cumulative(x):
        return 1 - torch.cos(torch.as_tensor(x, dtype=torch.float64) * math.pi / 2)
    expected = (cumulative(r) - cumulative(low)) / (cumulative(high) - cumulative(low))
    n = len(r)
    above = torch.arange(1, n + 1) / n - expected
    below = expected - torch.arange(n) / n
    gap = torch.maximum(above, below).max().item()
    assert gap * n ** 0.5 < 1.95


# ---------------------------------------------------------------- the teacher
def test_guidance_is_u_plus_s_times_c_minus_u_and_one_is_none():
    net, c = tiny(), torch.tensor([0, 1, 2, 1])
    z = torch.randint(K + 1, (4, L), generator=gen())
    cond, uncond = net(z, c), net(z, c, torch.ones(4, dtype=torch.bool))
    assert torch.equal(fpd.guided_logits(net, z, c, 1.0), cond)
    for s in (0.0, 0.5, 2.0, 7.5):
        guided = fpd.guided_logits(net, z, c, s)
        torch.testing.assert_close(guided, uncond + s * (cond - uncond), rtol=1e-4, atol=1e-4)
    # the test is worth something only if the class matters
    assert (cond - uncond).abs().max() > 0.1
    # without guidance, the unconditional half is not computed
    teacher = Recorder(net)
    for s in (1.0, 2.0):
        fpd.guided_logits(teacher, z, c, s)
    assert [len(seen) for seen in teacher.seen] == [4, 8]


def test_refinement_fills_what_is_masked_and_keeps_the_rest():
    teacher, c = tiny(), torch.arange(6) % CLASSES
    z = torch.randint(K, (6, L), generator=gen())
    z_masked, is_masked = fpd.remask(z, torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9, 1.0]), K, gen())
    before = z_masked.clone()
    z_ref = fpd.refine(teacher, z_masked, c, 2.0, generators(0, 0, 6, "cpu"))
    assert torch.equal(z_ref[~is_masked], z[~is_masked])
    assert z_ref.dtype == torch.long and z_ref.min() >= 0 and z_ref.max() < K
    assert torch.equal(z_masked, before)


# ---------------------------------------------------------------- the student
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_straight_through_is_hard_forward_and_soft_backward(temperature):
    """The decoder is given codes bit for bit. The logits get the gradient of softmax(logits) @ E
    (Eq. 8) at temperature 1, whatever the temperature of the draft."""
    E = 3 * torch.randn(K, 4, generator=gen())
    logits = (5 * torch.randn(2, L, K, generator=gen(1))).requires_grad_()
    z_hat, e = fpd.straight_through(logits, E, gen(), temperature)
    assert torch.equal(z_hat, fpd.draw(logits, temperature, gen())) and e.shape == (2, L, 4)
    assert torch.equal(e, E[z_hat])
    weight = torch.randn(e.shape, generator=gen(2))
    hard, = torch.autograd.grad(e.mul(weight).sum(), logits)
    e_soft = logits.softmax(-1) @ E
    soft, = torch.autograd.grad(e_soft.mul(weight).sum(), logits)
    torch.testing.assert_close(hard, soft)
    assert hard.abs().max() > 1e-3


def test_the_soft_estimator_returns_the_mixture_of_codes():
    """This is the other row of Table 3a. The draft is the same."""
    E = torch.randn(K, 4, generator=gen())
    logits = torch.randn(2, L, K, generator=gen(1), requires_grad=True)
    z_hat, e = fpd.straight_through(logits, E, gen(), 0.7, soft=True)
    torch.testing.assert_close(e, logits.softmax(-1) @ E)
    assert e.requires_grad
    assert torch.equal(z_hat, fpd.straight_through(logits, E, gen(), 0.7)[0])


def test_straight_through_is_the_same_under_autocast():
    E = torch.randn(K, 4, generator=gen())
    results = []
    for enabled in (False, True):
        logits = torch.randn(2, L, K, generator=gen(1)).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            z_hat, e = fpd.straight_through(logits, E, gen())
        gradient, = torch.autograd.grad(e.pow(2).sum(), logits)
        assert torch.equal(e, E[z_hat])
        results.append(gradient)
    assert torch.equal(*results)


@pytest.mark.parametrize("s, steps", [(1.0, 0), (3.0, 1), (3.0, 2), (1.0, 16)])
def test_images_of_one_or_more_steps_do_not_depend_on_their_batch(s, steps):
    """Zero steps stand for the student's single pass, one or more for MaskGIT's sampler."""
    network, c = Recorder(tiny()), torch.tensor([0, 1, 2, 0, 1])

    def draw(first, n):
        generator = generators(3, first, n, "cpu")
        if steps == 0:
            return fpd.one_step(network, c[first:first + n], 0.6, generator)
        return fpd.sample_maskgit(network, c[first:first + n], steps, generator, s=s)

    five = draw(0, 5)
    assert five.shape == (5, L) and five.dtype == torch.long and five.min() >= 0 and five.max() < K
    assert five.unique(dim=0).shape[0] == 5
    if steps == 0:
        # one pass over z_init, of which 0.6 are masked, as in training
        assert len(network.seen) == 1 and ((network.seen[0] == K).sum(1) == 10).all()
    for i in range(5):
        assert torch.equal(draw(i, 1)[0], five[i])


def test_the_condition_says_which_sampler_a_teacher_has(monkeypatch):
    for name in ("sample_maskgit", "sample_maskgen"):
        monkeypatch.setattr(fpd, name, lambda *args, name=name, **kind: name)
    labels, text = torch.zeros(2, dtype=torch.long), torch.zeros(2, 5, 8)
    samplers = [fpd.sample_teacher(None, c, 4, gen(), 2.0, 1.0) for c in (labels, text)]
    assert samplers == ["sample_maskgit", "sample_maskgen"]


# ---------------------------------------------------------------- one training step
def test_only_drafts_of_one_class_are_compared():
    """Two classes of three drafts become different positions, so that the drift of each class does
    not depend on the other."""
    X, Y = torch.randn(6, 2, 5, generator=gen()), torch.randn(6, 2, 5, generator=gen(1))
    x, y = fpd.per_class_groups(X, 3), fpd.per_class_groups(Y, 3)
    assert x.shape == (3, 4, 5)
    for group in range(2):
        for i in range(3):
            assert torch.equal(x[i, 2 * group:2 * group + 2], X[3 * group + i])
    # the targets of the second class in another order, which leaves the unit of distance as it is
    other = Y.clone()
    other[3:] = Y[3:].roll(1, 0)
    V_other, = drift(x, fpd.per_class_groups(other, 3), (0.2,))
    V, = drift(x, y, (0.2,))
    torch.testing.assert_close(V_other[:, :2], V[:, :2])
    # a single class stays as it is
    assert torch.equal(fpd.per_class_groups(X, 6), X)


class Lift(fpd.Lift):
    """Keeps the code embeddings that it decodes, in a step those of the refinements first, then
    those of the drafts."""
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def decode(self, e, c):
        self.seen.append(e.detach())
        return super().decode(e, c)


class System:
    """Everything that fpd_step needs, tiny, and frozen except for the student."""
    def __init__(self, **settings):
        self.cfg = train.Config(**dict(batch=8, per_class=4, blocks=(0, 1, 2, 3)) | settings)
        torch.manual_seed(0)
        self.vq = VQGAN(K=K, d=4, ch=4, ch_mult=(1, 2, 2), z_channels=8, groups=2, image_size=16)
        self.vq.eval().requires_grad_(False)
        self.phi = ConvNet(num_classes=CLASSES, width=4).eval().requires_grad_(False)
        self.teacher, self.student = tiny(1), tiny(2).requires_grad_(True)
        self.lift = Lift(self.vq, self.phi, self.cfg)
        self.c = torch.tensor([0, 0, 0, 0, 2, 2, 2, 2])

    def step(self, seed=0):
        return fpd.fpd_step(self.student, self.teacher, self.lift, self.vq.E, self.c, self.cfg,
                            gen(seed))


@pytest.mark.parametrize("settings", [
    {}, dict(estimator="soft"), dict(affinity="apart", own_pair=True), dict(refine_guidance=1.0),
    dict(per_class=None), dict(init_mask=1.0), dict(remask=(0.0, 1.0))], ids=str)
def test_a_step_gives_a_finite_loss_and_only_the_student_gets_gradient(settings):
    system = System(**settings)
    # the refinement is a constant even if the teacher is not frozen
    system.teacher.requires_grad_(True)
    networks = (system.vq, system.phi, system.teacher)
    before = [copy.deepcopy(net.state_dict()) for net in networks]
    loss, logs, images = system.step()
    assert loss.ndim == 0 and loss.isfinite() and loss > 0 and images.shape == (8, 3, 16, 16)
    loss.backward()
    for p in system.student.parameters():
        assert p.grad is not None and p.grad.isfinite().all()
    assert system.student.tok_emb.weight.grad.abs().max() > 0
    for net, state in zip(networks, before):
        assert all(p.grad is None for p in net.parameters())
        # the batch statistics of Phi are among these
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name])
    for value in logs.values():
        assert value.ndim == 0 and value.isfinite() and not value.requires_grad
    assert 0 < logs["entropy"] < math.log(K) + 1e-5
    assert 1 <= logs["codes_used"] <= K and 0 <= logs["changed"] <= 1
    for h in system.cfg.bandwidths:
        assert logs[f"rms_{h:g}"] > 0 and -1 <= logs[f"cos_{h:g}"] <= 1


def test_all_randomness_of_a_step_comes_from_its_generator():
    losses = [System().step(seed)[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("estimator", ["ste", "soft"])
def test_the_teacher_is_given_the_draft_in_part_and_the_decoder_codes(estimator):
    """The refinement is driven by the student (Table 3b): the visible tokens are its draft's. With
    the soft estimator, the decoder is given mixtures of codes for the draft."""
    system = System(estimator=estimator)
    system.teacher = Recorder(system.teacher)
    system.step()
    # whether each embedding equals each of the codes, (B, L, K)
    refinement, draft = ((e[:, :, None] == system.vq.E).all(-1) for e in system.lift.seen)
    assert refinement.any(-1).all() and draft.any(-1).all() == (estimator == "ste")
    # there is one pass, and guidance doubles its batch
    seen, = system.teacher.seen
    z, is_masked = seen[:8], seen[:8] == K
    assert 1 <= is_masked.sum(1).min() and is_masked.sum(1).max() <= round(0.9 * L)
    assert torch.equal(refinement.float().argmax(-1)[~is_masked], z[~is_masked])
    if estimator == "ste":
        assert torch.equal(draft.float().argmax(-1)[~is_masked], z[~is_masked])


def test_a_step_is_in_the_papers_order_with_one_pass_of_the_teacher():
    """The draft comes first, then the refinement, then the lift of both (Eq. 4, 5 and Sec. 3.3).
    Guidance doubles the teacher's batch."""
    system, order = System(refine_guidance=2.0), []

    def watch(name, called):
        def watched(*args, **kind):
            order.append((name, len(args[0])))
            return called(*args, **kind)
        return watched

    system.student.forward = watch("student", system.student.forward)
    system.teacher.forward = watch("teacher", system.teacher.forward)
    system.vq.decode = watch("decode", system.vq.decode)
    system.phi.maps = watch("phi", system.phi.maps)
    system.step()
    lift = [("decode", 8), ("phi", 8)]
    assert order == [("student", 8), ("teacher", 16)] + lift + lift


def test_every_setting_of_the_method_reaches_its_place():
    """init_mask, temperature, remask and refine_guidance, by the inputs of the networks."""
    system = System(init_mask=0.5, temperature=1e-6, remask=(0.5, 0.6), refine_guidance=3.0)
    system.student, system.teacher = Recorder(system.student), Recorder(system.teacher)
    system.step()
    z_init, = system.student.seen
    assert ((z_init == K).sum(1) == 8).all()
    # at a temperature near 0 the likeliest codes are drawn
    likeliest = system.student.net(z_init, system.c).argmax(-1)
    assert torch.equal(system.lift.seen[1], system.vq.E[likeliest])
    z_masked, = system.teacher.seen
    masked = (z_masked == K).sum(1)
    assert len(masked) == 16 and masked.min() >= 8 and masked.max() <= 10


@pytest.mark.parametrize("per_class, n, affinity, own_pair", [
    (4, 4, "joint", False), (8, 8, "joint", True), (None, 8, "apart", False), (4, 4, "apart", True)])
def test_the_settings_of_the_drift_reach_it(per_class, n, affinity, own_pair, monkeypatch):
    """n drafts are compared with each other: with per_class = None those of the whole batch."""
    calls = []

    def record(X, Y, bandwidths, **form):
        calls.append((X.shape[:2], bandwidths, form))
        return drift_loss(X, Y, bandwidths, **form)
    monkeypatch.setattr(fpd, "drift_loss", record)
    System(per_class=per_class, affinity=affinity, own_pair=own_pair, bandwidths=(0.1, 0.3)).step()
    form = dict(joint=affinity == "joint", self_negative=own_pair, own_target=own_pair)
    assert calls == [((n, 8 // n * 16), (0.1, 0.3), form)] * 4


def test_a_random_draft_is_refined_independently_of_the_student():
    """Table 3b. The student's own draft stays what it was, but it is not what is refined."""
    refined, drafts = {}, {}
    for draft in ("random", "student"):
        for seed in (2, 3):
            # with nearly nothing masked, a refinement nearly equals what is refined
            system = System(draft_source=draft, remask=(0.0, 0.01))
            system.student = tiny(seed).requires_grad_(True)
            loss, logs, _ = system.step()
            gradient, = torch.autograd.grad(loss, system.student.bias)
            assert loss.isfinite() and gradient.abs().max() > 0 and logs["changed"] <= 1
            refined[draft, seed], drafts[draft, seed] = system.lift.seen
    assert torch.equal(refined["random", 2], refined["random", 3])
    assert torch.equal(drafts["random", 2], drafts["student", 2])
    # one code in eight agrees by chance
    assert (refined["random", 2] == drafts["random", 2]).all(-1).float().mean() < 0.4
    assert (refined["student", 2] == drafts["student", 2]).all(-1).float().mean() > 0.9


def test_a_student_that_equals_its_refinements_has_nothing_to_learn():
    """Eq. 3 in the simplest case: both networks generate one image only. The loss is zero, up to
    rounding, and no token is changed."""
    system = System()
    with torch.no_grad():
        for net in (system.student, system.teacher):
            net.bias[:, 3] += 1e4
    loss, logs, _ = system.step()
    loss.backward()
    assert loss.item() < 1e-4 and logs["changed"] == 0
    assert logs["codes_used"] == 1 and logs["entropy"] < 1e-6
    assert all(p.grad.abs().max() < 1e-6 for p in system.student.parameters())


# ---------------------------------------------------------------- the lift
def test_lifted_features_are_sixteen_positions_of_four_blocks_and_pass_gradient():
    system = System()
    e = torch.randn(3, L, 4, generator=gen(), requires_grad=True)
    X = system.lift.features(system.lift.decode(e, system.c[:3]))
    assert [tuple(x.shape) for x in X] == [(3, 16, 4), (3, 16, 8), (3, 16, 8), (3, 16, 16)]
    for x in X:
        gradient, = torch.autograd.grad(x.pow(2).sum(), e, retain_graph=True)
        # the features depend on every token
        assert gradient.abs().amax(-1).min() > 0
    # the last map has 2 x 2 locations, each of which is standardised and then repeated
    assert X[3].mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(X[3].std(-1, correction=0), torch.ones(3, 16), atol=1e-2, rtol=0)


def sum_of_rms(logs):
    return sum(logs[f"rms_{h:g}"].item() for h in (0.02, 0.05, 0.2))


def images_of(system):
    z = torch.randint(K, (3, L), generator=gen())
    return system.lift.decode(system.vq.E[z], system.c[:3])         # (3, 3, 16, 16)


def test_blocks_are_picked_by_number():
    every, some = System(), System(blocks=(1, 3))
    whole, part = (system.lift.features(images_of(system)) for system in (every, some))
    assert len(part) == 2 and torch.equal(part[0], whole[1]) and torch.equal(part[1], whole[3])
    # the loss is the sum over bandwidths and blocks, the logs are means over the blocks
    loss, logs, _ = some.step()
    assert loss.item() == pytest.approx(2 * sum_of_rms(logs), rel=1e-5)


def test_a_grid_of_one_pools_the_positions():
    """Table 4b: the single position holds the mean of all."""
    fine, pooled = (system.lift.features(images_of(system))
                    for system in (System(), System(grid=1)))
    for x, y in zip(fine, pooled, strict=True):
        torch.testing.assert_close(x.mean(1, keepdim=True), y)


@pytest.mark.parametrize("grid", [4, 6])
def test_pixel_space_is_the_pixels_of_each_position(grid):
    """Table 4a: one "block" of F = grid^2 positions, each with all of its pixels. Of 16 pixels per
    side, a grid of 6 leaves out the last 4."""
    system = System(space="pixel", grid=grid)
    images, n = images_of(system), 16 // grid
    system.lift.phi = None
    X, = system.lift.features(images)
    assert X.shape == (3, grid ** 2, 3 * n * n)
    for i in range(grid):
        for j in range(grid):
            tile = images[:, :, n * i:n * (i + 1), n * j:n * (j + 1)]
            assert torch.equal(X[:, grid * i + j].view(3, 3, n, n), tile)
    loss, logs, _ = system.step()
    loss.backward()
    assert loss.item() == pytest.approx(sum_of_rms(logs), rel=1e-5)
    assert all(p.grad.isfinite().all() for p in system.student.parameters())


@pytest.mark.parametrize("space", ["feature", "pixel"])
def test_neither_a_stop_at_the_drafts_nor_chunks_change_the_gradient(space):
    """The loop stops the backward pass at the decoded drafts, through which all of the gradient
    passes, and continues from there, so that the GAN's can be added."""
    losses, gradients = [], []
    for chunk, stops in ((None, False), (None, True), (3, True)):
        system = System(space=space, lift_chunk=chunk)
        loss, _, images = system.step()
        if stops:
            images.backward(torch.autograd.grad(loss, images)[0])
        else:
            loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten() for p in system.student.parameters()]))
    whole, stopped, in_chunks = gradients
    assert torch.equal(whole, stopped) and losses[2] == pytest.approx(losses[0], rel=1e-5)
    assert (in_chunks - whole).norm() < 1e-3 * whole.norm()


def test_a_decoder_in_bfloat16_is_as_near_to_float32_as_autocast_is():
    """On a GPU the weights of the decoder are bfloat16, and autocast is off within it. Images and
    gradients are nearly as close to those of float32 as with float32 weights under autocast."""
    def decoded(dtype, is_lifted, autocast):
        system = System(lift_chunk=1)
        system.vq.to(dtype)
        e = torch.randn(2, L, 4, generator=gen(), requires_grad=True)
        decode = system.lift.decode if is_lifted else system.vq.decode
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            images = decode(e, system.c[:2])
        images.float().pow(2).sum().backward()
        return images.detach().float(), e.grad, images.dtype

    image, gradient, _ = decoded(torch.float32, True, False)
    image_autocast, gradient_autocast, _ = decoded(torch.float32, False, True)
    image_bf16, gradient_bf16, dtype = decoded(torch.bfloat16, True, True)
    assert dtype == torch.bfloat16
    assert (image_bf16 - image).norm() < 2 * (image_autocast - image).norm()
    assert (gradient_bf16 - gradient).norm() < 2 * (gradient_autocast - gradient).norm()
    # within Lift.decode, autocast has no effect
    image_again, gradient_again, _ = decoded(torch.float32, True, True)
    assert torch.equal(image_again, image) and torch.equal(gradient_again, gradient)


# ---------------------------------------------------------------- two tokens
DATA, PAIR_TEACHER = fpd.checkerboard()
IMPOSSIBLE = DATA == 0
PRODUCT = DATA.sum(1, keepdim=True) * DATA.sum(0)


def pair_settings(**changes):
    return SimpleNamespace(**fpd.PAIR | changes)


def pairs(p, n=20_000):
    """n samples of a joint distribution p (8, 8). -> z (n, 2)"""
    i = p.flatten().multinomial(n, replacement=True, generator=gen(1))
    return torch.stack([i // 8, i % 8], 1)


def pairs_chi_square(z, p):
    """Between the counts of the pairs z (n, 2) and p (8, 8), all of whose entries are above 0."""
    return chi_square(fpd.joint_distribution(z).flatten() * len(z), p.flatten())


def test_the_teacher_of_two_tokens_is_exact_and_wrong_in_one_step():
    assert DATA.sum() == 1 and IMPOSSIBLE.sum() == 32
    # one token masked: its distribution given the other; both: the marginals
    canvases = torch.tensor([[8, 3], [5, 8], [8, 8]])
    given_y, given_x, neither = PAIR_TEACHER(canvases, None).exp()
    torch.testing.assert_close(given_y[0], DATA[:, 3] / DATA[:, 3].sum())
    torch.testing.assert_close(given_x[1], DATA[5] / DATA[5].sum())
    torch.testing.assert_close(neither, torch.stack([DATA.sum(1), DATA.sum(0)]))
    c = torch.zeros(20_000, dtype=torch.long)
    two_steps, one_step = (fpd.sample_maskgit(PAIR_TEACHER, c, steps, gen()) for steps in (2, 1))
    assert not IMPOSSIBLE[two_steps[:, 0], two_steps[:, 1]].any()
    assert pairs_chi_square(one_step, PRODUCT) < CHI_SQUARE_63


def test_the_share_of_both_masked_is_that_of_sampled_ratios():
    for low, high in ((0.1, 0.9), (0.0, 1.0), (0.5, 0.8)):
        r = fpd.sample_ratio(100_000, low, high, gen())
        share = (fpd.remask(pairs(DATA, 100_000), r, 8, gen())[1].all(1)).float().mean().item()
        assert fpd.both_masked(low, high) == pytest.approx(share, abs=0.006)
    assert fpd.both_masked(0.1, 0.7) == 0


def test_the_fixed_point_by_hand_is_stationary_and_where_the_chain_of_eq_3_leads():
    m, cfg = fpd.both_masked(0.1, 0.9), pair_settings()
    exact = (1 - m) * DATA + m * PRODUCT
    assert exact[IMPOSSIBLE].sum().item() == pytest.approx(m / 2)
    c = torch.zeros(20_000, dtype=torch.long)
    corrected, _ = fpd.local_correction(PAIR_TEACHER, pairs(exact), c, cfg, gen())
    assert pairs_chi_square(corrected, exact) < CHI_SQUARE_63
    # from the teacher's samples in one step, and not after none
    start = fpd.sample_maskgit(PAIR_TEACHER, c, 1, gen())
    end = fpd.fixed_point(PAIR_TEACHER, start, c, cfg, gen(2), rounds=8)
    assert pairs_chi_square(end, exact) < CHI_SQUARE_63 < pairs_chi_square(start, exact)
    # the data are no fixed point, because r masks both tokens now and then
    corrected, _ = fpd.local_correction(PAIR_TEACHER, pairs(DATA), c, cfg, gen())
    assert pairs_chi_square(corrected, exact) < CHI_SQUARE_63


@pytest.mark.slow
@pytest.mark.parametrize("seed, changes, low, high", [
    (0, {}, 0.106, 0.166), (1, {}, 0.106, 0.166),
    (0, dict(init_mask=1.0), 0.47, 0.53),
    (0, dict(own_pair=True, affinity="apart"), 0.25, 0.50)])
def test_a_student_of_two_tokens_ends_where_the_fixed_point_is(seed, changes, low, high):
    """Its share of impossible pairs should be m / 2 = 0.136. Without a code in z_init it stays at
    that of independent tokens, and Eq. 6 as printed does not rest at the fixed point."""
    cfg = pair_settings(**changes)
    student = fpd.train_pair(PAIR_TEACHER, cfg, seed)
    z = fpd.one_step(student, torch.zeros(20_000, dtype=torch.long), cfg.init_mask, gen())
    share = fpd.joint_distribution(z)[IMPOSSIBLE].sum().item()
    assert low < share < high


def test_the_method_imports_nothing_else_of_the_project():
    """drift.py and fpd.py can be copied into another project."""
    for module in (fpd, sys.modules["drift"]):
        tree = ast.parse(Path(module.__file__).read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                     for alias in node.names}
        ours = {file.stem for file in Path(module.__file__).parent.glob("*.py")}
        assert imported & ours <= {"drift"}


def test_the_command_prints_the_table_and_writes_the_picture(tmp_path, monkeypatch, capsys):
    """With students that are not trained, which takes seconds."""
    monkeypatch.chdir(tmp_path)
    train_pair = fpd.train_pair
    monkeypatch.setattr(fpd, "train_pair", lambda teacher, cfg: train_pair(teacher, cfg, steps=1))
    fpd.main()
    _, *rows = capsys.readouterr().out.splitlines()
    by_hand = [row.split()[-2] for row in rows]
    assert by_hand == ["0.000", "0.000", "0.500", "0.136", "0.136", "0.000", "0.500", "0.136"]
    with Image.open("fpd.png") as picture:
        assert picture.width == 7 * 242
    assert (tmp_path / "fpd.png").stat().st_size < 60_000
