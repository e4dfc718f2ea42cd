"""The comparison methods Di[M]O and SDTT: each step does what its paper says, and trains."""
import contextlib
import copy
import types

import pytest
import torch
from conftest import Recorder, gen
from conftest import tiny_maskgit as tiny
from torch import nn

import fpd
import train

K, L, CLASSES = 8, 16, 3


FLOAT32 = contextlib.nullcontext()


class Table(nn.Module):
    """A network whose logits (L, K) are its weights. They do not depend on its input, so its tokens
    are independent."""
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.L, self.K = logits.shape

    def forward(self, z, c, drop=None):
        self.out = self.logits.expand(len(z), -1, -1).clone()
        if self.out.requires_grad:
            self.out.retain_grad()
        return self.out


def labels(B):
    return torch.arange(B) % CLASSES


def divergence(p, q):
    """KL(p, q) of two distributions, given by logits (..., K). -> (...)"""
    P = torch.distributions.Categorical(logits=p)
    Q = torch.distributions.Categorical(logits=q)
    return torch.distributions.kl_divergence(P, Q)


def make_dimo(teacher, auxiliary, **settings):
    """Di[M]O with these two networks; the auxiliary would start as a copy of the teacher."""
    cfg = train.Config(**dict(method="dimo", refine_guidance=1.0, lr=0.02) | settings)
    method = fpd.DiMO(cfg, types.SimpleNamespace(teacher=auxiliary))
    method.teacher = teacher
    return method


# ---------------------------------------------------------------- Di[M]O
@pytest.mark.parametrize("agree", [False, True])
def test_the_students_logits_get_the_gradient_of_the_auxiliarys(agree):
    """At each masked position that of KL(p, q), which is q - p, for teacher p and auxiliary q, over
    the temperature. It is 0 at visible positions, and where auxiliary and teacher agree."""
    student, teacher = Table(torch.randn(L, K, generator=gen(3))), Recorder(tiny(1))
    method = make_dimo(teacher, tiny(1 if agree else 2), refine_guidance=1.0 if agree else 2.0,
                       temperature=0.5)
    before, c = copy.deepcopy(method.auxiliary), labels(6)
    loss, logs = method.step(student, c, 1, gen(), FLOAT32)
    loss.backward()
    z_masked = teacher.seen[0][:6]
    masked = z_masked == K
    p = fpd.guided_logits(teacher.net, z_masked, c, method.cfg.refine_guidance)
    q = before(z_masked, c).detach()
    expected = (q.softmax(-1) - p.softmax(-1)) * masked[..., None] / masked.sum()
    expected = expected / 0.5
    torch.testing.assert_close(student.out.grad, expected, atol=1e-7, rtol=1e-4)
    assert loss.item() == pytest.approx(divergence(p, q)[masked].mean().item(), abs=1e-6)
    assert (student.out.grad.abs().max() < 1e-7) == agree
    assert all(value.ndim == 0 and not value.requires_grad for value in logs.values())


def test_under_autocast_every_weight_of_the_auxiliary_gets_a_gradient(monkeypatch):
    """The auxiliary's first pass is without gradient, and within one autocast context the weights
    that are cast there would serve the second pass, too. Backward passes run outside of it."""
    method = make_dimo(tiny(1), tiny(2))
    before = copy.deepcopy(method.auxiliary.state_dict())
    is_autocast, backward = [], torch.Tensor.backward

    def watched(loss):
        is_autocast.append(torch.is_autocast_enabled("cpu"))
        backward(loss)
    monkeypatch.setattr(torch.Tensor, "backward", watched)
    method.step(Table(torch.randn(L, K, generator=gen(3))), labels(6), 1, gen(),
                torch.autocast("cpu", torch.bfloat16))
    assert is_autocast == [False]
    for name, p in method.auxiliary.named_parameters():
        assert p.grad is not None
        assert not (name.endswith("weight") and torch.equal(p, before[name])), name


def test_the_auxiliary_learns_the_students_distribution_and_the_student_the_teachers():
    """The teacher's tokens are independent here, so a student can have exactly its distribution."""
    target = torch.randn(L, K, generator=gen(4))
    student, all_masked = Table(torch.zeros(L, K)), torch.full((CLASSES, L), K)
    method = make_dimo(Table(target), tiny(2))
    opt = torch.optim.AdamW(student.parameters(), lr=0.015, weight_decay=0.0)
    before = divergence(target, student.logits.detach()).mean()
    losses = []
    for step in range(1, 151):
        loss, _ = method.step(student, labels(16), step, gen(step), FLOAT32)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert divergence(target, student.logits.detach()).mean() < 0.15 * before
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10]), losses
    auxiliary = method.auxiliary(all_masked, labels(CLASSES)).detach()
    assert divergence(student.logits.detach(), auxiliary).mean() < 0.08
    assert method.trained == dict(auxiliary=method.auxiliary, auxiliary_opt=method.opt)


# ---------------------------------------------------------------- SDTT
def make_sdtt(teacher, steps=8, **settings):
    cfg = train.Config(method="sdtt", steps=steps, refine_guidance=3.0, **settings)
    return fpd.SDTT(cfg, types.SimpleNamespace(teacher=teacher))


def test_the_target_is_what_the_teacher_predicted_when_it_revealed_a_position(monkeypatch):
    """In the third round, each of the student's two steps learns two of the teacher's. At positions
    that the teacher's first step reveals, the target is its prediction, and elsewhere that of the
    second step, whose input holds samples of the first. The loss is KL(student, target)."""
    z, c = torch.randint(K, (32, L), generator=gen(5)), labels(32)
    monkeypatch.setattr(fpd, "sample_teacher", lambda *args: z)
    method, student = make_sdtt(tiny(1)), Recorder(tiny(2))
    method.teacher = Recorder(method.teacher)
    loss, logs = method.step(student, c, 6, gen(), FLOAT32)
    (first, second), (z_masked,) = method.teacher.seen, student.seen
    is_masked, still_masked = first == K, second == K
    assert torch.equal(z_masked, first) and not (still_masked & ~is_masked).any()
    assert torch.equal(second[~is_masked], z[~is_masked])
    # 16 gamma(t), at the beginning and in the middle of the two steps
    counts = torch.stack([is_masked.sum(1), still_masked.sum(1)], 1)
    assert {tuple(n) for n in counts.tolist()} == {(16, 13), (11, 7)}
    target = torch.where(still_masked[..., None], method.teacher.net(second, c),
                         method.teacher.net(first, c))
    expected = divergence(student.net(z_masked, c), target)[is_masked].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert logs["entropy"].isfinite() and not logs["entropy"].requires_grad


def test_rounds_halve_the_steps_and_the_student_becomes_the_teacher(monkeypatch):
    """16 -> 8 -> 4 -> 2 -> 1, in quarters of the run. The images that are partly masked are always
    samples of the first teacher, and guidance is part of the target in the first round only."""
    calls, sampled, guided_logits = [], [], fpd.guided_logits

    def record(model, z, c, s):
        calls.append((s, model.bias[0, 0].item(), (z == K).sum(1).unique().tolist()))
        return guided_logits(model, z, c, s)

    def sample_teacher(teacher, c, *_):
        sampled.append(teacher.bias[0, 0].item())
        return torch.zeros(len(c), L, dtype=torch.long)

    monkeypatch.setattr(fpd, "guided_logits", record)
    monkeypatch.setattr(fpd, "sample_teacher", sample_teacher)
    student, method = tiny(1), make_sdtt(tiny(1))
    start = student.bias[0, 0].item()
    for step in range(1, 9):
        if step == 6:
            # a run that is interrupted in the third round
            state, method = method.trained["sdtt_teacher"].state_dict(), make_sdtt(tiny(1))
            method.trained["sdtt_teacher"].load_state_dict(state)
        method.step(student, labels(64), step, gen(step), FLOAT32)
        # this stands for what the student learns in the step
        student.bias[0, 0] = step
    masked = {steps: sorted({round(fpd.gamma(torch.tensor(t / steps)).item() * L)
                             for t in range(steps)}) for steps in (8, 4, 2, 1)}
    expected = [(3, start, masked[8]), (1, 2, masked[4]), (1, 4, masked[2]), (1, 6, masked[1])]
    # two calls in each step, of which the first has the student's input, and two steps in a round
    assert calls[::4] == calls[2::4] == expected
    assert sampled == [start] * 6
