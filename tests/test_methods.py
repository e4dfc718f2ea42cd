"""The comparison methods, Di[M]O and SDTT: their steps do what their papers say; runs can be
interrupted."""
import copy
import signal
import types

import pytest
import torch
from conftest import in_process, refused
from test_fpd import CLASSES, Constant, K, L, Recorder, System, gen, tiny
from torch import nn

import fpd
import train

CFG = train.Config(teacher_cfg=1.0)


class Table(nn.Module):
    """A student that ignores its input: logits (L, K) are all of its weights, so its tokens are
    independent."""
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.L, self.K = logits.shape

    def forward(self, z, c):
        self.out = self.logits.expand(len(z), -1, -1).clone()
        self.out.retain_grad()
        return self.out


def adam(net, lr=1e-2):
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)


def labels(B):
    return torch.arange(B) % CLASSES


def divergence(p, q):
    """KL(p, q) of two distributions, given by logits (..., K). -> (...)"""
    P = torch.distributions.Categorical(logits=p)
    Q = torch.distributions.Categorical(logits=q)
    return torch.distributions.kl_divergence(P, Q)


# ---------------------------------------------------------------- Di[M]O
def test_the_students_logits_get_the_auxiliarys_gradient():
    """At the hidden positions, per hidden position, q - p: that of KL(p, q), teacher p,
    auxiliary q.

    None at the visible ones, none at all where auxiliary and teacher agree.
    """
    for agree in (False, True):
        student, teacher = Table(torch.randn(L, K, generator=gen(3))), Recorder(tiny(1))
        auxiliary = tiny(1 if agree else 2).requires_grad_(True)
        before, c = copy.deepcopy(auxiliary), labels(6)
        cfg = train.Config(teacher_cfg=1.0 if agree else 2.0)
        loss, logs = fpd.dimo_step(student, teacher, auxiliary, adam(auxiliary), c, cfg, gen())
        loss.backward()
        z_masked = teacher.seen[0][:6]
        hidden = z_masked == K
        p = fpd.guided_logits(teacher.net, z_masked, c, cfg.teacher_cfg)
        q = before(z_masked, c).detach()
        expected = (q.softmax(-1) - p.softmax(-1)) * hidden[..., None] / hidden.sum()
        torch.testing.assert_close(student.out.grad, expected, atol=1e-7, rtol=1e-4)
        assert loss.item() == pytest.approx(divergence(p, q)[hidden].mean().item(), abs=1e-6)
        assert (student.out.grad.abs().max() < 1e-7) == agree
        assert all(p.grad is None for p in teacher.net.parameters())
        for value in logs.values():
            assert value.ndim == 0 and value.isfinite() and not value.requires_grad


def test_under_autocast_the_auxiliarys_weights_all_get_a_gradient():
    """Its first pass is without gradient, and autocast keeps the weights that it has cast there."""
    auxiliary = tiny(2).requires_grad_(True)
    moved = {name: p.clone() for name, p in auxiliary.named_parameters()}
    student = Table(torch.randn(L, K, generator=gen(3)))
    with torch.autocast("cpu", torch.bfloat16):
        fpd.dimo_step(student, tiny(1), auxiliary, adam(auxiliary), labels(6), CFG, gen())
    assert all(p.grad is not None for p in auxiliary.parameters())
    assert not any(torch.equal(p, moved[name]) for name, p in auxiliary.named_parameters()
                   if name.endswith("weight"))


def test_the_auxiliary_learns_the_students_distribution():
    """Of tokens that are independent, at whatever is hidden: also where everything is."""
    student, auxiliary = Table(torch.randn(L, K, generator=gen(3))), tiny(2).requires_grad_(True)
    opt, empty, seen = adam(auxiliary, 0.02), torch.full((CLASSES, L), K), []
    for step in range(81):
        if step % 80 == 0:
            answers = auxiliary(empty, labels(CLASSES)).detach()
            seen.append(divergence(student.logits.detach(), answers).mean().item())
        fpd.dimo_step(student, tiny(1), auxiliary, opt, labels(16), CFG, gen(step))
    assert seen[0] > 0.4 and seen[1] < 0.08, seen


def test_dimo_brings_the_student_to_the_teacher():
    """Teacher of independent tokens: the divergence falls, and the student's distribution becomes
    the teacher's."""
    target = torch.randn(L, K, generator=gen(4))
    teacher, student, auxiliary = Constant(target), Table(torch.zeros(L, K)), tiny(2)
    auxiliary.requires_grad_(True)
    # the slower one is followed
    opt, student_opt = adam(auxiliary, 0.02), adam(student, 0.015)
    before = divergence(target, student.logits.detach()).mean().item()
    losses = []
    for step in range(150):
        loss, _ = fpd.dimo_step(student, teacher, auxiliary, opt, labels(16), CFG, gen(step))
        student_opt.zero_grad()
        loss.backward()
        student_opt.step()
        losses.append(loss.item())
    assert divergence(target, student.logits.detach()).mean().item() < 0.15 * before
    assert sum(losses[-10:]) < 0.4 * sum(losses[:10]), losses


# ---------------------------------------------------------------- SDTT
def test_the_target_is_each_positions_prediction_when_it_was_revealed():
    """Of the first step where that revealed it; of the second everywhere else. What the second sees
    is the first's sample."""
    teacher, z, c = Recorder(tiny(1)), torch.randint(K, (6, L), generator=gen(5)), labels(6)
    now = torch.tensor([1, 1, 0.75, 0.5, 0.5, 0.01])
    middle = torch.tensor([0.5, 0.8, 0.5, 0.5, 0.2, 0.001])
    z_masked, is_masked, target = fpd.sdtt_target(teacher, z, c, now, middle, 1, gen())
    first, second = teacher.seen
    still = second == K
    assert torch.equal(first, z_masked) and torch.equal(is_masked, first == K)
    assert torch.equal(first[~is_masked], z[~is_masked])
    assert is_masked.sum(1).tolist() == [16, 16, 12, 8, 8, 1]
    assert still.sum(1).tolist() == [8, 13, 8, 8, 3, 1]
    assert not (still & ~is_masked).any() and torch.equal(second[~is_masked], z[~is_masked])
    torch.testing.assert_close(target[~still], teacher.net(first, c)[~still])
    torch.testing.assert_close(target[still], teacher.net(second, c)[still])
    # both steps agree
    same = Constant(torch.randn(L, K, generator=gen(6)))
    target = fpd.sdtt_target(same, z, c, now, middle, 1, gen())[2]
    assert torch.equal(target, same.logits.expand(6, L, K))


def test_sdtt_loss_is_the_students_divergence_from_the_target():
    """KL(student, teacher) at the hidden positions: of one step, at all of them. Zero, and no
    gradient, where they agree."""
    target, z = torch.randn(L, K, generator=gen(6)), torch.zeros(4, L, dtype=torch.long)
    for logits in (torch.randn(L, K, generator=gen(7)), target.clone()):
        student = Table(logits)
        loss, logs = fpd.sdtt_step(student, Constant(target), z, labels(4), 1, 1, gen())
        loss.backward()
        p, q = logits.softmax(-1), target.softmax(-1)
        expected = (p * (p.log() - q.log())).sum(-1).mean()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        assert (student.logits.grad.abs().max() < 1e-6) == torch.equal(logits, target)
        assert logs["entropy"].isfinite() and not logs["entropy"].requires_grad


@pytest.mark.parametrize("steps", [1, 4])
def test_sdtt_brings_the_student_to_the_target(steps):
    teacher, student = tiny(1), tiny(2).requires_grad_(True)
    z = torch.randint(K, (16, L), generator=gen(5))
    opt, losses = adam(student), []
    for step in range(60):
        loss, _ = fpd.sdtt_step(student, teacher, z, labels(16), steps, 1, gen(step))
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5]), losses


def test_rounds_halve_the_steps_and_the_student_becomes_the_teacher(monkeypatch):
    """16 -> 8 -> 4 -> 2 -> 1, in quarters of the run. The images of the canvas are always the first
    teacher's; guidance is learnt once."""
    calls, sampled = [], []

    def sdtt_step(student, teacher, z, c, steps, s, generator):
        calls.append((steps, s, teacher.bias[0, 0].item()))

    def sample_teacher(teacher, c, *_):
        sampled.append(teacher.bias[0, 0].item())
        return torch.zeros(len(c), L, dtype=torch.long)

    monkeypatch.setattr(fpd, "sdtt_step", sdtt_step)
    monkeypatch.setattr(fpd, "sample_teacher", sample_teacher)
    student, cfg = tiny(1), train.Config(method="sdtt", steps=8, teacher_cfg=3.0)
    method = fpd.SDTT(cfg, types.SimpleNamespace(teacher=tiny(1)))
    first = student.bias[0, 0].item()
    for step in range(1, 9):
        # an interruption in the third round
        if step == 6:
            state, method = method.state(), fpd.SDTT(cfg, types.SimpleNamespace(teacher=tiny(1)))
            method.load(state)
        method.step(student, labels(2), step, gen())
        # it learns
        student.bias[0, 0] = step
    assert calls == [(8, 3, first), (8, 3, first), (4, 1, 2), (4, 1, 2),
                     (2, 1, 4), (2, 1, 4), (1, 1, 6), (1, 1, 6)]
    # the last round's canvas is empty
    assert sampled == [first] * 6


@pytest.mark.parametrize("method, passes", [("fpd", 2), ("dimo", 2), ("sdtt", 31 / 4)])
def test_the_teachers_passes_are_counted(method, passes):
    """Those that `train.teacher_passes` promises, for each image and step."""
    cfg = train.Config(method=method, steps=4, batch=8, per_class=4)
    system, seen = System(), []
    system.teacher.register_forward_hook(lambda net, args, out: seen.append(len(args[0])))
    if method == "sdtt":
        sdtt = fpd.SDTT(cfg, system)
    auxiliary = tiny(3).requires_grad_(True)
    for step in range(1, cfg.steps + 1):
        if method == "fpd":
            fpd.fpd_step(system.student, system.teacher, system.lift, system.vq.E, system.c, cfg,
                         gen())
        elif method == "dimo":
            fpd.dimo_step(system.student, system.teacher, auxiliary, adam(auxiliary), system.c,
                          cfg, gen())
        else:
            sdtt.step(system.student, system.c, step, gen())
    assert sum(seen) / 8 == train.teacher_passes(cfg) == passes * cfg.steps


# ---------------------------------------------------------------- runs
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The prepared networks in it are shared."""
    return tmp_path_factory.mktemp("methods")


@pytest.mark.parametrize("method", ["dimo", "sdtt"])
def test_an_interrupted_run_goes_on_bit_for_bit(method, folder, monkeypatch):
    """Auxiliary, its optimiser, and the teacher of the round included."""
    monkeypatch.setattr(train.evaluate, "report", lambda *_, **__: None)
    monkeypatch.setattr(train, "sample_sheet", lambda *_: None)
    line = f"train.py --smoke --method {method} --batch 4 --per-class 2 --name {method}"
    assert in_process(line, folder).returncode == 0
    # after step 2
    def interrupt(run, step):
        if step:
            signal.raise_signal(signal.SIGINT)
    monkeypatch.setattr(train, "sample_sheet", interrupt)
    done = in_process(f"{line}-halves", folder)
    assert done.returncode == 130 and "saved after step 2" in done.stdout
    monkeypatch.setattr(train, "sample_sheet", lambda *_: None)
    done = in_process(f"train.py --resume --name {method}-halves", folder)
    assert done.returncode == 0, done.stderr
    runs = folder / "runs"
    whole = torch.load(runs / method / "checkpoint.pt", weights_only=True)
    halves = torch.load(runs / f"{method}-halves" / "checkpoint.pt", weights_only=True)
    network = {"dimo": "auxiliary", "sdtt": "teacher"}[method]
    for a, b in ((whole["student"], halves["student"]), (whole["ema"], halves["ema"]),
                 (whole["method"][network], halves["method"][network])):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(whole["rng"], halves["rng"]) and halves["step"] == 4
    assert whole["config"]["init_mask"] == {"dimo": 0.6, "sdtt": 1.0}[method]
    done = in_process(f"train.py --resume --name {method} --method fpd --steps 8", folder)
    refused(done, "--method", "cannot become 'fpd'")
    # its rounds would begin anew
    if method == "sdtt":
        done = in_process("train.py --resume --name sdtt --steps 8", folder)
        refused(done, "--steps", "cannot become 8")


def test_methods_refuse_what_they_cannot_do(folder):
    refused(in_process("train.py --method ours", folder), "--method", "fpd, dimo, sdtt")
    done = in_process("train.py --method dimo --gan-weight 0.5", folder)
    refused(done, "--gan-weight goes with --method fpd")
    done = in_process("train.py --method sdtt --init-mask 0.9", folder)
    refused(done, "--init-mask 1, got 0.9")
