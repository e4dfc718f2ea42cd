"""fpd.py: masks, draws, the teacher's sampler, the straight-through estimator and one training
step, on networks of a few hundred weights."""
import copy
import math

import pytest
import torch
from torch import nn

import fpd
import train
from drift import drift
from fpd import generators
from models import ConvNet, MaskGIT
from tokenizer import VQGAN

SCHEDULES = ("arccos", "cosine", "linear", "square", "root")
K, L, CLASSES = 8, 16, 3


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(seed=0):
    """A MaskGIT whose random weights are large enough for the class and every token to matter."""
    torch.manual_seed(seed)
    net = MaskGIT(K=K, L=L, num_classes=CLASSES, width=16, depth=1, heads=2, mlp=32)
    for p in net.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


class Recorder:
    """A teacher that remembers what it was shown."""
    def __init__(self, net):
        self.net, self.K, self.L, self.seen = net, net.K, net.L, []

    def __call__(self, z, *args, **kind):
        self.seen.append(z.clone())
        return self.net(z, *args, **kind)


class Constant:
    """A teacher that answers with the same logits (L, K) whatever it is shown."""
    def __init__(self, logits):
        self.logits, self.L, self.K = logits, *logits.shape

    def __call__(self, z, *args, **kind):
        return self.logits.expand(len(z), -1, -1)


def chi_square(counts, p):
    """Of observed counts and expected probabilities, both (n,); n - 1 degrees of freedom."""
    expected = counts.sum() * p
    return ((counts - expected) ** 2 / expected).sum().item()


# of 5, 7, 8 and 15 degrees of freedom: exceeded in one case of a thousand
CHI_SQUARE_5, CHI_SQUARE_7, CHI_SQUARE_8, CHI_SQUARE_15 = 20.5, 24.3, 26.1, 37.7


# ---------------------------------------------------------------- randomness
def test_draws_have_the_frequencies_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    for temperature in (0.5, 1.0, 3.0):
        z = fpd.draw(logits.expand(100, 300, 6), temperature, gen())
        counts = torch.bincount(z.flatten(), minlength=6)
        assert chi_square(counts, (logits / temperature).softmax(0)) < CHI_SQUARE_5


def test_temperature_divides_the_logits():
    logits = torch.randn(3, 5, 7, generator=gen(1))
    assert torch.equal(fpd.draw(logits, 4.0, gen()), fpd.draw(logits / 4, 1.0, gen()))
    assert torch.equal(fpd.draw(logits, 1e-6, gen()), logits.argmax(-1))


def test_positions_and_images_are_drawn_independently():
    z = fpd.draw(torch.zeros(2000, 2, 4), 1.0, gen())
    for a, b in ((z[:, 0], z[:, 1]), (z[1:, 0], z[:-1, 0])):
        counts = torch.bincount(4 * a + b, minlength=16)
        assert chi_square(counts, torch.full((16,), 1 / 16)) < CHI_SQUARE_15


def test_with_one_generator_per_image_an_image_does_not_depend_on_its_batch():
    five = fpd.uniform((5, 4, 3), generators(7, 0, 5, "cpu"), "cpu")
    third = fpd.uniform((1, 4, 3), generators(7, 2, 1, "cpu"), "cpu")
    assert torch.equal(five[2:3], third)
    assert five.flatten(1).unique(dim=0).shape[0] == 5


# ---------------------------------------------------------------- masking
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_falls_from_all_hidden_to_none(schedule):
    gamma = fpd.mask_ratio(torch.linspace(0, 1, 101), schedule)
    assert gamma[0].item() == pytest.approx(1, abs=1e-6)
    assert gamma[-1].item() == pytest.approx(0, abs=1e-6)
    assert (gamma.diff() < 0).all()


def test_schedules_halfway():
    halfway = [fpd.mask_ratio(torch.tensor(0.5), schedule).item() for schedule in SCHEDULES]
    assert halfway == pytest.approx([2 / 3, 0.5 ** 0.5, 0.5, 0.75, 1 - 0.5 ** 0.5])


def test_arccos_is_the_default_schedule():
    assert fpd.mask_ratio(torch.tensor(0.3)) == fpd.mask_ratio(torch.tensor(0.3), "arccos")


def test_an_unknown_schedule_is_named_together_with_those_there_are():
    with pytest.raises(ValueError, match="cubic.*arccos.*cosine.*linear.*square.*root"):
        fpd.mask_ratio(torch.tensor(0.5), "cubic")


def test_remask_hides_exact_counts_and_leaves_the_rest():
    z = torch.randint(K, (6, L), generator=gen())
    before = z.clone()
    r = torch.tensor([0.0, 0.01, 0.25, 0.5, 0.7, 1.0])
    z_masked, is_masked = fpd.remask(z, r, K, gen())
    # never none
    assert is_masked.dtype == torch.bool and is_masked.sum(1).tolist() == [1, 1, 4, 8, 11, 16]
    assert (z_masked[is_masked] == K).all() and torch.equal(z_masked[~is_masked], z[~is_masked])
    assert torch.equal(z, before)


def test_remask_hides_every_position_equally_often():
    z, r = torch.zeros(4000, L, dtype=torch.long), torch.full((4000,), 0.25)
    is_masked = fpd.remask(z, r, K, gen())[1]
    assert chi_square(is_masked.sum(0).float(), torch.full((L,), 1 / L)) < CHI_SQUARE_15
    # of 1820 ways to hide 4 of 16
    assert is_masked.unique(dim=0).shape[0] > 1500


@pytest.mark.parametrize("r_init, hidden", [(0.0, 0), (0.3, 5), (0.6, 10), (0.9, 14), (1.0, 16)])
def test_z_init_has_exactly_its_share_of_mask_ids_and_codes_elsewhere(r_init, hidden):
    z = fpd.init_tokens(500, L, K, r_init, gen())
    assert z.shape == (500, L) and z.dtype == torch.long
    assert ((z == K).sum(1) == hidden).all()
    assert z.min() >= 0 and z.max() <= K
    if hidden < L:
        counts = torch.bincount(z[z < K], minlength=K).float()
        assert chi_square(counts, torch.full((K,), 1 / K)) < CHI_SQUARE_7


def test_z_init_differs_from_image_to_image():
    """It is the only noise that the student gets besides its own draws (Sec. 3.2)."""
    assert fpd.init_tokens(100, L, K, 0.9, gen()).unique(dim=0).shape[0] == 100


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.1, 0.9), (0.0, 0.5), (0.6, 0.7)])
def test_sampled_ratios_follow_arccos_cut_to_the_interval(low, high):
    """P(arccos(u) 2/pi <= x) = 1 - cos(pi x / 2).

    Kolmogorov-Smirnov: n^1/2 times the largest gap stays below 1.95 in 999 cases of 1000.
    """
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


def test_sampled_ratios_on_the_whole_interval_are_the_teachers_training_distribution():
    u = fpd.uniform((1000,), gen(3), "cpu")
    r = fpd.sample_ratio(1000, 0.0, 1.0, gen(3))
    torch.testing.assert_close(r, torch.arccos(u) * 2 / math.pi)
    mean = fpd.sample_ratio(100_000, 0.0, 1.0, gen()).mean().item()
    assert mean == pytest.approx(2 / math.pi, abs=0.003)


# ---------------------------------------------------------------- the teacher
def test_guidance_is_u_plus_s_times_c_minus_u_and_one_is_none():
    net, c = tiny(), torch.tensor([0, 1, 2, 1])
    z = torch.randint(K + 1, (4, L), generator=gen())
    cond, uncond = net(z, c), net(z, c, torch.ones(4, dtype=torch.bool))
    assert torch.equal(fpd.guided_logits(net, z, c, 1), cond)
    assert torch.equal(fpd.guided_logits(net, z, c, 1.0), cond)
    for s in (0.0, 0.5, 2.0, 7.5):
        guided = fpd.guided_logits(net, z, c, s)
        torch.testing.assert_close(guided, uncond + s * (cond - uncond), rtol=1e-4, atol=1e-4)
    # the class matters, else this test says nothing
    assert (cond - uncond).abs().max() > 0.1


def test_without_guidance_the_unconditional_half_is_not_computed():
    teacher, c = Recorder(tiny()), torch.tensor([0, 1, 2])
    z = torch.full((3, L), K)
    fpd.guided_logits(teacher, z, c, 1.0)
    fpd.guided_logits(teacher, z, c, 2.0)
    assert [len(seen) for seen in teacher.seen] == [3, 6]


@pytest.mark.parametrize("per_image", [False, True])
def test_refinement_fills_what_is_hidden_and_keeps_the_rest(per_image):
    teacher, c = tiny(), torch.arange(6) % CLASSES
    z = torch.randint(K, (6, L), generator=gen())
    z_masked, is_masked = fpd.remask(z, torch.tensor([0.0, 0.1, 0.5, 0.7, 0.9, 1.0]), K, gen())
    before = z_masked.clone()
    generator = generators(0, 0, 6, "cpu") if per_image else gen()
    z_ref = fpd.refine(teacher, z_masked, c, 2.0, generator)
    assert torch.equal(z_ref[~is_masked], z[~is_masked])
    assert z_ref.dtype == torch.long and z_ref.min() >= 0 and z_ref.max() < K
    assert torch.equal(z_masked, before)


def test_refinement_samples_the_teachers_distribution():
    """Eq. 3 speaks of distributions: the argmax would not leave one invariant."""
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0]).expand(L, 6)
    z_masked, c = torch.full((2000, L), 6), torch.zeros(2000, dtype=torch.long)
    z_ref = fpd.refine(Constant(logits), z_masked, c, 1.0, gen())
    counts = torch.bincount(z_ref.flatten(), minlength=6)
    assert chi_square(counts, logits[0].softmax(0)) < CHI_SQUARE_5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tokens, most", [(16, 11), (64, 25), (256, 65), (1024, 130)])
def test_reveal_counts_are_positive_and_sum_to_all_tokens(schedule, tokens, most):
    for steps in range(1, most + 1):
        counts = fpd.reveal_counts(tokens, steps, schedule)
        assert len(counts) == steps and sum(counts) == tokens and min(counts) >= 1


@pytest.mark.parametrize("tokens", [16, 64, 256])
def test_reveal_counts_end_in_zeros_when_rounding_up_has_used_all_tokens(tokens):
    for steps in range(1, tokens + 1):
        counts = fpd.reveal_counts(tokens, steps)
        fixed = [n for n in counts if n]
        assert min(counts) >= 0 and sum(counts) == tokens
        assert counts == fixed + [0] * (steps - len(fixed))


def test_one_step_reveals_everything():
    assert all(fpd.reveal_counts(256, 1, schedule) == [256] for schedule in SCHEDULES)


@pytest.mark.parametrize("steps", [-1, 0, 65, 1000])
def test_a_number_of_steps_that_cannot_be_is_named(steps):
    with pytest.raises(ValueError, match=f"between 1 and the 64 tokens.*got {steps}"):
        fpd.reveal_counts(64, steps)
    with pytest.raises(ValueError, match="between 1 and the 16 tokens"):
        fpd.sample(tiny(), torch.tensor([0]), 0, gen())


@pytest.mark.parametrize("s", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 16])
def test_sampled_images_are_codes_only_and_do_not_depend_on_their_batch(steps, s):
    teacher, c = tiny(), torch.tensor([0, 1, 2, 0, 1])
    five = fpd.sample(teacher, c, steps, generators(3, 0, 5, "cpu"), s=s)
    assert five.shape == (5, L) and five.dtype == torch.long and five.min() >= 0 and five.max() < K
    for i in range(5):
        one = fpd.sample(teacher, c[i:i + 1], steps, generators(3, i, 1, "cpu"), s=s)
        assert torch.equal(one[0], five[i])
    assert five.unique(dim=0).shape[0] == 5


def test_the_sampler_fixes_the_scheduled_number_of_tokens_and_never_revisits_one():
    teacher = Recorder(tiny())
    z = fpd.sample(teacher, torch.tensor([0, 1]), 6, gen())
    shown = [0] + torch.tensor(fpd.reveal_counts(L, 6)).cumsum(0).tolist()
    assert [(seen < K).sum(1).tolist() for seen in teacher.seen] == [[n, n] for n in shown[:-1]]
    for seen in teacher.seen:
        assert torch.equal(seen[seen < K], z[seen < K])


def test_guidance_ramps_up_from_none_so_a_single_step_has_none():
    teacher, c = Recorder(tiny()), torch.tensor([0, 1, 2])
    fpd.sample(teacher, c, 4, gen(), s=3.0)
    # no unconditional half in the first step
    assert [len(seen) for seen in teacher.seen] == [3, 6, 6, 6]
    logits = fpd.guided_logits(teacher, torch.full((3, L), K), c, 1.0)
    assert torch.equal(fpd.sample(teacher, c, 1, gen(), s=3.0), fpd.draw(logits, 1.0, gen()))


def test_without_confidence_noise_the_surest_tokens_come_first():
    """Position p has p + 1 equally likely codes, a confidence of -log(p + 1) whichever is drawn:
    positions are revealed in order."""
    logits = torch.where(torch.arange(8) <= torch.arange(8)[:, None], 0.0, -1e9)    # (L, K), both 8
    teacher = Recorder(Constant(logits))
    fpd.sample(teacher, torch.tensor([0]), 4, gen(), noise=0.0)
    shown = [0] + torch.tensor(fpd.reveal_counts(8, 4)).cumsum(0).tolist()
    for seen, n in zip(teacher.seen, shown):
        assert torch.equal(seen[0] < 8, torch.arange(8) < n)


def test_confidence_noise_changes_the_order():
    logits = torch.where(torch.arange(8) <= torch.arange(8)[:, None], 0.0, -1e9)
    teacher = Recorder(Constant(logits))
    fpd.sample(teacher, torch.zeros(500, dtype=torch.long), 4, gen(), noise=4.5)
    # how often each position was revealed in the first step
    first = (teacher.seen[1] < 8).float().mean(0)
    # the surest more often, the least sure not never
    assert first[0] > first[7] > 0.02


# ---------------------------------------------------------------- the student
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_straight_through_is_hard_forward_and_soft_backward(temperature):
    """Teacher and decoder see real codes, not nearly-codes; the logits get the gradient of
    softmax(logits) @ E (Eq. 8), however cold the draft is: else a sure token would get none."""
    E = 3 * torch.randn(K, 4, generator=gen())
    logits = (5 * torch.randn(2, L, K, generator=gen(1))).requires_grad_()
    z_hat, e = fpd.straight_through(logits, E, gen(), temperature)
    assert z_hat.shape == (2, L) and e.shape == (2, L, 4)
    # bit for bit
    assert torch.equal(e, E[z_hat])
    weight = torch.randn(e.shape, generator=gen(2))
    hard, = torch.autograd.grad(e.mul(weight).sum(), logits)
    e_soft = logits.softmax(-1) @ E
    soft, = torch.autograd.grad(e_soft.mul(weight).sum(), logits)
    torch.testing.assert_close(hard, soft)
    assert hard.abs().max() > 1e-3


def test_a_code_between_two_others_gets_no_gradient_unless_codes_have_length_1():
    """Why the small worlds' codes do: the gradient of Eq. 8 is linear in the codes. Where dark,
    middle and light lie on one line, what pushes an undecided token along it raises dark or light,
    never middle."""
    tones = torch.tensor([-1.0, 0.0, 1.0])
    line = torch.stack([tones, torch.zeros(3)], 1)                                  # (3, 2)
    circle = torch.stack([tones, torch.tensor([0.0, 1.0, 0.0])], 1)
    for E, is_raised in ((line, False), (circle, True)):
        logits = torch.zeros(1, 1, 3, requires_grad=True)
        _, e = fpd.straight_through(logits, E, gen())
        for push in torch.randn(5, 2, generator=gen(1)):
            gradient, = torch.autograd.grad((e * push).sum(), logits, retain_graph=True)
            dark, middle, light = gradient.flatten().tolist()
            assert abs(dark) > 0.01 and abs(light) > 0.01
            assert (abs(middle) > 0.01) == is_raised


def test_the_soft_estimator_returns_the_mixture_of_codes():
    """The other row of Table 3a."""
    E = torch.randn(K, 4, generator=gen())
    logits = torch.randn(2, L, K, generator=gen(1), requires_grad=True)
    z_hat, e = fpd.straight_through(logits, E, gen(), 0.7, soft=True)
    torch.testing.assert_close(e, logits.softmax(-1) @ E)
    assert e.requires_grad
    # the same draft
    assert torch.equal(z_hat, fpd.straight_through(logits, E, gen(), 0.7)[0])


def test_drafts_have_the_students_distribution_at_the_draft_temperature():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -3.0])
    z_hat, _ = fpd.straight_through(logits.expand(100, 300, 6), torch.eye(6), gen(), 2.0)
    counts = torch.bincount(z_hat.flatten(), minlength=6)
    assert chi_square(counts, (logits / 2).softmax(0)) < CHI_SQUARE_5


def test_straight_through_is_exact_under_autocast():
    E = torch.randn(K, 4, generator=gen())
    logits = torch.randn(2, L, K, generator=gen(1)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_hat, e = fpd.straight_through(logits, E, gen())
    assert torch.equal(e, E[z_hat])


def test_one_step_images_are_codes_only_and_do_not_depend_on_their_batch():
    student, c = tiny(), torch.tensor([0, 1, 2, 0, 1])
    five = fpd.one_step(student, c, 0.9, generators(3, 0, 5, "cpu"))
    assert five.shape == (5, L) and five.min() >= 0 and five.max() < K
    for i in range(5):
        one = fpd.one_step(student, c[i:i + 1], 0.9, generators(3, i, 1, "cpu"))
        assert torch.equal(one[0], five[i])


def test_one_step_shows_the_student_what_training_showed_it():
    student = Recorder(tiny())
    fpd.one_step(student, torch.zeros(4, dtype=torch.long), 0.6, gen())
    assert len(student.seen) == 1 and ((student.seen[0] == K).sum(1) == 10).all()


# ---------------------------------------------------------------- one training step
def test_only_drafts_of_one_class_are_compared():
    """Two classes of three drafts become positions of their own: the drift of each is the drift of
    its class alone."""
    X, Y = torch.randn(6, 2, 5, generator=gen()), torch.randn(6, 2, 5, generator=gen(1))
    x, y = fpd.per_class_groups(X, 3), fpd.per_class_groups(Y, 3)
    assert x.shape == (3, 4, 5)
    for group in range(2):
        for i in range(3):
            assert torch.equal(x[i, 2 * group:2 * group + 2], X[3 * group + i])
    # shuffles the second class's targets: same distances
    other = Y.clone()
    other[3:] = Y[3:].roll(1, 0)
    V = drift(x, fpd.per_class_groups(other, 3), 0.2)
    torch.testing.assert_close(V[:, :2], drift(x, y, 0.2)[:, :2])
    # one class: nothing to fold
    assert torch.equal(fpd.per_class_groups(X, 6), X)


class Lift(fpd.Lift):
    """Remembers the code embeddings that it decodes: in a step those of the refinements first, then
    those of the drafts."""
    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def decode(self, e, c):
        self.seen.append(e.detach())
        return super().decode(e, c)


class System:
    """Everything that fpd_step needs, tiny and frozen; only the student learns."""
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


SETTINGS = [{}, dict(estimator="soft"), dict(affinity="apart"), dict(own_pair=True),
            dict(affinity="apart", own_pair=True), dict(teacher_cfg=1.0), dict(per_class=8),
            dict(per_class=2), dict(per_class=1), dict(bandwidths=(0.1,)), dict(init_mask=1.0),
            dict(temperature=0.5), dict(remask=(0.0, 1.0))]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_gives_a_finite_loss_and_only_the_student_gets_gradient(settings):
    system = System(**settings)
    # even then: the refinement is a constant
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
        # batch statistics of Phi included
        for name, value in net.state_dict().items():
            assert torch.equal(value, state[name])

    for value in logs.values():
        assert value.ndim == 0 and value.isfinite() and not value.requires_grad
    assert 0 < logs["entropy"] < math.log(K) + 1e-5
    assert 1 <= logs["codes_used"] <= K and 0 <= logs["changed"] <= 1
    for h in system.cfg.bandwidths:
        assert logs[f"rms_{h:g}"] > 0 and -1 <= logs[f"cos_{h:g}"] <= 1


def test_all_of_the_gradient_passes_through_the_decoded_drafts():
    """So that the GAN's can be added there: the loop stops at the images and goes on from them."""
    gradients = []
    for halfway in (False, True):
        system = System()
        loss, _, images = system.step()
        if halfway:
            images.backward(torch.autograd.grad(loss, images)[0])
        else:
            loss.backward()
        gradients.append([p.grad for p in system.student.parameters()])
    assert all(torch.equal(whole, parts) for whole, parts in zip(*gradients, strict=True))


def test_the_loss_is_the_sum_of_the_logged_rms_over_bandwidths_and_blocks():
    loss, logs, _ = System().step()
    total = sum(logs[f"rms_{h:g}"].item() for h in (0.02, 0.05, 0.2))
    # 4 blocks, logged as means
    assert loss.item() == pytest.approx(4 * total, rel=1e-5)


def test_all_randomness_of_a_step_comes_from_its_generator():
    losses = [System().step(seed)[0].item() for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def same_code(e, E):
    """Which of the codes E (K, d) the embeddings e (B, L, d) are, bit for bit. -> (B, L, K) bool"""
    return (e[:, :, None] == E).all(-1)


def test_the_decoder_sees_codes_with_ste_and_mixtures_without():
    for estimator in ("ste", "soft"):
        system = System(estimator=estimator)
        system.step()
        # the refinement first, then the draft
        refinement, draft = system.lift.seen
        assert same_code(refinement, system.vq.E).any(-1).all()
        assert same_code(draft, system.vq.E).any(-1).all() == (estimator == "ste")


def test_the_teacher_sees_the_draft_with_a_part_hidden():
    """Student-driven refinement (Table 3b): what is visible to the teacher are the student's own
    tokens."""
    system = System()
    system.teacher = Recorder(system.teacher)
    system.step()
    # one pass; guidance doubles the batch
    seen, = system.teacher.seen
    z = seen[:8]
    z_hat = same_code(system.lift.seen[1], system.vq.E).float().argmax(-1)
    hidden = (z == K).sum(1)
    assert ((z == z_hat) | (z == K)).all() and hidden.min() >= 1 and hidden.max() <= round(0.9 * L)


@pytest.mark.parametrize("guidance, half", [(1.0, 1), (2.0, 2)])
def test_a_step_is_in_the_papers_order_with_one_pass_of_the_teacher(guidance, half):
    """Draft, refinement, lift of both (Eq. 4, 5 and Sec. 3.3); guidance doubles the teacher's
    batch."""
    system = System(teacher_cfg=guidance)
    order = []

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
    assert order == [("student", 8), ("teacher", half * 8)] + lift + lift


def test_every_setting_of_the_method_reaches_its_place():
    """init_mask, temperature, remask, teacher_cfg: seen from the networks' side."""
    system = System(init_mask=0.5, temperature=1e-6, remask=(0.5, 0.6), teacher_cfg=3.0)
    system.student, system.teacher = Recorder(system.student), Recorder(system.teacher)
    system.step()
    z_init, = system.student.seen
    assert ((z_init == K).sum(1) == 8).all()
    # cold: the surest codes
    surest = system.student.net(z_init, system.c).argmax(-1)
    assert torch.equal(system.lift.seen[1], system.vq.E[surest])
    # one pass, doubled by the guidance
    z_masked, = system.teacher.seen
    hidden = (z_masked == K).sum(1)
    assert len(hidden) == 16 and hidden.min() >= 8 and hidden.max() <= 10


def test_the_four_forms_of_the_drift_and_the_grouping_are_different_losses():
    every = [dict(affinity="joint", own_pair=False), dict(affinity="joint", own_pair=True),
             dict(affinity="apart", own_pair=False), dict(affinity="apart", own_pair=True),
             dict(per_class=8), dict(per_class=2)]
    losses = {System(**settings).step()[0].item() for settings in every}
    assert len(losses) == 6


def test_one_draft_of_each_class_is_compared_with_the_whole_batch():
    """--per-class 1, the paper's in-batch negatives: the same as one group of eight."""
    loss, whole = (System(per_class=n).step()[0] for n in (1, 8))
    assert torch.equal(loss, whole)


def test_lifted_features_are_sixteen_positions_of_four_blocks_and_pass_gradient():
    system = System()
    e = torch.randn(3, L, 4, generator=gen(), requires_grad=True)
    X = system.lift.features(system.lift.decode(e, system.c[:3]))
    assert [tuple(x.shape) for x in X] == [(3, 16, 4), (3, 16, 8), (3, 16, 8), (3, 16, 16)]
    for x in X:
        gradient, = torch.autograd.grad(x.pow(2).sum(), e, retain_graph=True)
        # every token is felt
        assert gradient.abs().amax(-1).min() > 0


def test_a_student_that_equals_its_refinements_has_nothing_to_learn():
    """Eq. 3 in the simplest world: both networks know a single image. The loss is zero, up to
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


# ---------------------------------------------------------------- the fixed point of Eq. 3
class Pair:
    """A teacher of two tokens that knows its distribution p (3, 3): what a hidden token is, given
    the other one or nothing."""
    K, L = 3, 2

    def __init__(self, p):
        self.p = p

    def __call__(self, z, c, *args, **kind):
        # (K + 1, K): a row for each value of the other token, 3 = hidden
        first = torch.cat([self.p.T, self.p.sum(1)[None]])
        second = torch.cat([self.p, self.p.sum(0)[None]])
        return torch.stack([first[z[:, 1]], second[z[:, 0]]], 1).log()


JOINT = torch.tensor([[0.30, 0.05, 0.05], [0.05, 0.20, 0.05], [0.02, 0.03, 0.25]])


def pairs_after(teacher, z, rounds, **settings):
    """How often each pair of tokens occurs after `rounds` of Eq. 3's operator, (9,)."""
    cfg = train.Config(teacher_cfg=1.0, **settings)
    z = fpd.fixed_point(teacher, z, torch.zeros(len(z), dtype=torch.long), cfg, gen(), rounds)
    return torch.bincount(3 * z[:, 0] + z[:, 1], minlength=9)


def test_the_chain_of_eq_3_converges_to_a_teachers_distribution_with_exact_conditionals():
    """Half of two tokens hidden: each round draws one of them given the other, a Gibbs sampler. It
    starts from one pair alone."""
    teacher, z = Pair(JOINT), torch.zeros(4000, 2, dtype=torch.long)
    short = pairs_after(teacher, z, 1, remask=(0.1, 0.5))
    long = pairs_after(teacher, z, 40, remask=(0.1, 0.5))
    assert chi_square(long, JOINT.flatten()) < CHI_SQUARE_8 < chi_square(short, JOINT.flatten())


def test_one_pass_from_nothing_knows_no_pairs():
    """With r = 1 nothing is visible: a single pass draws both tokens alone."""
    teacher, z = Pair(JOINT), torch.zeros(4000, 2, dtype=torch.long)
    alone = (JOINT.sum(1)[:, None] * JOINT.sum(0)).flatten()
    counts = pairs_after(teacher, z, 1, remask=(0.99, 1.0))
    assert chi_square(counts, alone) < CHI_SQUARE_8 < chi_square(counts, JOINT.flatten())


def test_independent_tokens_are_right_for_every_r():
    p = torch.tensor([0.5, 0.3, 0.2])[:, None] * torch.tensor([0.1, 0.6, 0.3])
    z = torch.zeros(4000, 2, dtype=torch.long)
    counts = pairs_after(Pair(p), z, 30, remask=(0.0, 1.0))
    assert chi_square(counts, p.flatten()) < CHI_SQUARE_8


def test_a_decoder_in_bfloat16_is_as_near_to_float32_as_autocast_is():
    """On a GPU the decoder's weights are bfloat16, and autocast is off within it: pictures and
    gradients come no farther from float32 than with float32 weights under autocast."""
    def decoded(dtype, is_lifted, autocast):
        system = System()
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
