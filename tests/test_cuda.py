"""A training step at full size without a GPU, on torch's fake tensors, and a smoke run with one.

Fake tensors have a shape, a type and a device, but no numbers. Without a GPU, no gradient passes
through those of "cuda". So "cpu" stands for the GPU here, and "meta" for the host, where every
tensor is made that names no device.
"""
import copy
import json
import math

import pytest
import torch
from bench import random_networks
from conftest import in_process
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import drift
import fpd
import train

GPU, HOST = "cpu", "meta"
aten = torch.ops.aten
# On a GPU the matrices of a product must have one type, which fake tensors do not check.
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)


class Rehearsal(TorchDispatchMode):
    """Checks every kernel of a step, those of the backward pass included. Where a GPU's host would
    have to wait, at .item() or nonzero, torch itself raises an error, because there are no numbers.
    """
    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        out = kernel(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            # torch 2.9's checkpoint makes an empty tensor.
            if isinstance(x, torch.Tensor) and x.numel():
                assert x.device.type == GPU, f"{kernel} makes a tensor that is not on the GPU"
        if kernel.overloadpacket in PRODUCTS:
            dtypes = {x.dtype for x in args if isinstance(x, torch.Tensor)}
            assert len(dtypes) == 1, f"{kernel} multiplies {dtypes}"
        return out


@pytest.mark.slow
@pytest.mark.parametrize("dataset, flags", [("imagenet", []), ("laion", ["--lift-chunk", "32"])])
def test_rehearsal(dataset, flags, monkeypatch, tmp_path):
    """Devices, types and shapes of a step fit, and the host never waits for the GPU. The step is
    that of train.distil without its log, which needs numbers."""
    if dataset == "laion":
        (tmp_path / "captions.txt").write_text("a dog")
        flags = [*flags, "--captions", str(tmp_path / "captions.txt")]
    cfg = train.parse(["--dataset", dataset, *flags])
    with torch.device(HOST):
        vqgan, teacher, phi = random_networks(dataset)
    # The first and the last layer of each transformer stand for the equal ones between them.
    layers = [teacher.transformer.layers] if dataset == "imagenet" else [
        teacher.blocks, vqgan.encoder.transformer, vqgan.decoder.transformer]
    for equal in layers:
        del equal[1:-1]
    parts = [copy.deepcopy(teacher), copy.deepcopy(teacher), teacher, vqgan.bfloat16(), phi]
    in_drift, in_decoder = set(), set()

    def distances(X, Y, original=drift.distances):
        in_drift.update((x.dtype, torch.is_autocast_enabled(GPU)) for x in (X, Y))
        return original(X, Y)

    def after_module(module, inputs, output):
        if isinstance(output, torch.Tensor):
            in_decoder.add((output.dtype, torch.is_autocast_enabled(GPU)))

    monkeypatch.setattr(drift, "distances", distances)
    # A module's fake tensors take the place of its real ones, which cannot change into them.
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device(HOST):
        for part in parts:
            part.to_empty(device=GPU).eval().requires_grad_(False)
        student, ema, teacher, vqgan, phi = parts
        student.requires_grad_(True)
        for module in vqgan.decoder.modules():
            module.register_forward_hook(after_module)
        opt = torch.optim.AdamW(student.parameters(), lr=cfg.lr, fused=True)
        c = torch.zeros(cfg.batch, dtype=torch.long, device=GPU)
        if dataset == "laion":
            c = torch.zeros(cfg.batch, 155, 768, device=GPU)
        generator = torch.Generator(GPU)
        lift = fpd.Lift(vqgan, phi, cfg)
        with Rehearsal():
            with torch.autocast(GPU, torch.bfloat16):
                loss, logs, images = fpd.fpd_step(student, teacher, lift, vqgan.E, c, cfg,
                                                  generator)
            gradient, = torch.autograd.grad(loss, images)
            images.backward(gradient)
            norm = torch.nn.utils.clip_grad_norm_(student.parameters(), train.CLIP)
            opt.step()
            train.update_ema(ema, student, cfg.ema)
    assert images.shape == gradient.shape == (cfg.batch, 3, 256, 256)
    assert in_drift == {(torch.float32, False)} and in_decoder == {(torch.bfloat16, False)}
    assert all(x.shape == () and x.dtype == torch.float32 for x in (loss, norm, *logs.values()))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in student.parameters())
    assert not any(p.requires_grad for part in parts[1:] for p in part.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_a_run_on_a_gpu(tmp_path, monkeypatch):
    """A smoke run and its pictures. CUDA itself raises an error if the second step has to wait."""
    steps = []

    def fpd_step(*args, original=fpd.fpd_step):
        steps.append(args)
        torch.cuda.set_sync_debug_mode("error" if len(steps) == 2 else "default")
        try:
            return original(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(fpd, "fpd_step", fpd_step)
    for line in ("train.py --smoke --gpus 1", "sample.py --class 3 --n 2",
                 "sample.py --class 3 --n 2 --teacher --steps 4"):
        done = in_process(line, tmp_path)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "shapes-smoke"
    for line in (run / "log.jsonl").open():
        assert all(math.isfinite(value) for value in json.loads(line).values())
    saved = torch.load(run / "checkpoint.pt", weights_only=True, map_location="cpu")
    assert all(x.isfinite().all() for x in saved["ema"].values())
    assert len(steps) == 4
