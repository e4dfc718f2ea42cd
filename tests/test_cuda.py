"""One CUDA GPU, rehearsed without one, and what can be tested only on one.

The rehearsal runs `train.distil` at full size on torch's fake tensors: every kernel is checked for
device, type and shape, nothing is computed and no memory is taken. What it counts on the way: the
memory that the GPU would need, and how often the host would wait for it. Each has a process of its
own, since it changes torch for good: this file is also the program that starts them,

    python tests/test_cuda.py                 # all of REHEARSALS -> a line of JSON for each
"""
import ctypes
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import traceback
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, finished_run, in_process
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fpd
import models
import sample
import tokenizer
import train

# torch's backward pass asks for CUDA's streams, also of fake tensors. A build for the CPU alone has
# none: this gives it one stream that does nothing.
NO_CARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
const c10::DeviceType CUDA = c10::DeviceType::CUDA;
const c10::Device card(CUDA, 0);
const c10::Stream stream(c10::Stream::DEFAULT, card);
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
};
struct Guard : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const noexcept override { return CUDA; }
  c10::Device exchangeDevice(c10::Device) const noexcept override { return card; }
  c10::Device getDevice() const noexcept override { return card; }
  void setDevice(c10::Device) const noexcept override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};
namespace at::detail {
const CUDAHooksInterface& getCUDAHooks() { static Hooks hooks; return hooks; }
}
extern "C" void no_card() {
  static Guard guard;
  c10::impl::DeviceGuardImplRegistrar(CUDA, &guard);
}
"""


aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)
COPYING = (aten._to_copy.default, aten.copy_.default)
# of matrices, whose types fake tensors do not compare
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


# ------------------------------------------------------------------- the rehearsal: a card of paper
class Generator(torch.Generator):
    """torch has none of a GPU that is not there. This one is of the CPU, and says "cuda"."""
    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.pretended = torch.device(device)
        return generator

    @property
    def device(self):
        return self.pretended

    def get_state(self):
        return torch.zeros(16, dtype=torch.uint8)


def without_generator(draw):
    """torch.rand and the like, for fake tensors: nothing is drawn."""
    def fake(*args, generator=None, **kwargs):
        return draw(*args, **kwargs)
    return fake


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """The kernels that a GPU would use; torch itself would take the one for every device."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if q.ndim != 4:
        with torch.autocast("cuda", enabled=False):
            return aten._scaled_dot_product_attention_math(q, k, v)[0]
    if attn_mask is None and q.dtype == torch.bfloat16:
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal,
                                                        scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:3], k.shape[2])
    return aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p,
                                                        is_causal, scale=scale)[0]


def moved(network, where):
    """Module.to, which puts the new tensors in the place of the old ones: fake ones cannot."""
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(p.to(where), p.requires_grad)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = x.to(where)
    return network


def pretend():
    """From now on this process has a GPU that computes nothing."""
    ctypes.CDLL(os.environ["NO_CARD"]).no_card()
    # a kernel of the GPU: without it, torch would take four others and their memory
    global library
    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", lambda gradient, x: None, "CUDA")
    # else the backward pass would look for the GPU's own thread
    torch.autograd.set_multithreading_enabled(False)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation=True: True
    torch.Generator = Generator
    for name in ("rand", "randint", "randperm"):
        setattr(torch, name, without_generator(getattr(torch, name)))
    F.scaled_dot_product_attention = attention
    # its kernel is unknown to the fake tensors of torch 2.9
    torch.backends.mha.set_fastpath_enabled(False)
    # torch's own draws again until every value is within bounds: for ever, where there is none
    torch.nn.init.trunc_normal_ = lambda tensor, *args, **kwargs: tensor
    torch.nn.Module.to = moved
    # a card of 24 GB, by which train.fit_to_card chooses; a storage's address only tells it apart
    torch.cuda.mem_get_info = lambda: (23.4e9, 25e9)
    torch.cuda.memory_reserved = lambda: 0
    torch.UntypedStorage.data_ptr = lambda storage: storage._cdata
    # else a copied network would be of another make than the original
    FakeTensorMode.__deepcopy__ = lambda self, memo: self


def all_of(indices):
    """Indices with masks -> numbers in place of each mask, as many as if it chose everything."""
    numbers = []
    for x in indices:
        if x is not None and x.dtype == torch.bool:
            numbers += [torch.zeros(x.numel(), dtype=torch.long, device=x.device)] * x.ndim
        else:
            numbers.append(x)
    return numbers


def tensors(values):
    """All tensors among a kernel's arguments or results, which may be lists of them."""
    found = []
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors(value)
    return found


class Counter(TorchDispatchMode):
    """Sees every kernel that would run.

    step, part   of train.distil, as its `mark` tells; step 0 is before the first
    live, peak   bytes on the GPU now, and the most there were
    waits        where the host would wait for the GPU: [(step, part, kernel, "file:line"), ...]
    """
    def __init__(self):
        super().__init__()
        self.step, self.part, self.known = 0, "", {}
        self.live, self.peak, self.waits = 0, 0, []

    def mark(self, part):
        self.step += part == "condition"
        self.part = part

    def wait(self, kernel):
        frame = sys._getframe()
        while frame.f_back and Path(frame.f_code.co_filename).parent != ROOT:
            frame = frame.f_back
        line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits.append((self.step, self.part, str(kernel), line))

    def keep(self, tensor):
        """Count the memory of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.live += self.known[key]
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, key)

    def free(self, key):
        self.live -= self.known.pop(key)

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        devices = {x.device.type for x in tensors(args)}
        if kernel in PRODUCTS:
            dtypes = {x.dtype for x in tensors(args)}
            assert len(dtypes) == 1, f"{kernel} of {dtypes}"
        if kernel is aten._local_scalar_dense.default:
            # a number is read. There is none; 1 is "yes" as well
            if devices == {"cuda"}:
                self.wait(kernel)
            return 1.0 if args[0].is_floating_point() else 1
        if kernel.overloadpacket in INDEXING and "cuda" in devices:
            if "cpu" in devices or any(x is not None and x.dtype == torch.bool for x in args[1]):
                self.wait(kernel)
                args = (args[0], all_of(args[1]), *args[2:])
        if kernel is aten.bincount.default and "cuda" in devices:
            self.wait(kernel)
            return torch.zeros(args[2], dtype=torch.long, device="cuda")
        out = kernel(*args, **kwargs)
        for x in tensors(out):
            devices.add(x.device.type)
            if x.device.type == "cuda":
                self.keep(x)
        if kernel in COPYING and devices == {"cpu", "cuda"}:
            if not kwargs.get("non_blocking") and True not in args[2:]:
                self.wait(kernel)
        return out


# ---------------------------------------------------------------------------- what is rehearsed
def shapes_world():
    """The small world's networks."""
    return tokenizer.VQGAN(), models.MaskGIT(), models.ConvNet()


def wide_world():
    """Small networks for images of 256 pixels, which the GAN's discriminator looks at."""
    vqgan = tokenizer.VQGAN(K=64, ch=32, ch_mult=(1, 1, 1, 1, 1), image_size=256)
    return vqgan, models.MaskGIT(K=64, L=256), models.ConvNet()


def imagenet_world():
    """MaskGIT-256, VQGAN f16-1024, DINOv3 ViT-B/16; the sizes are those of golden/."""
    vqgan = tokenizer.VQGAN(K=1024, d=256, ch=128, ch_mult=(1, 1, 2, 2, 4), blocks=2,
                            attn_levels=(4,), z_channels=256, groups=32, image_size=256)
    vqgan.encoder = None
    maskgit = models.MaskGIT(K=1024, L=256, num_classes=1000, width=768, depth=24, heads=16,
                             mlp=3072)
    return vqgan, maskgit, models.Backbone()


def laion_world():
    """TA-TiTok bl128, MaskGen-L, DINOv3 ViT-B/16 and CLIP's text encoder."""
    tatitok = tokenizer.TATiTok()
    tatitok.encoder = None
    maskgen = models.MaskGen(K=8192, L=128, width=1024, depth=16, heads=16, text_width=768, T=77,
                             score_width=256, unused_rows=1001)
    return tatitok, maskgen, models.Backbone(), models.TextEncoder()


def parts_of(world):
    """-> what train.prepare returns, on the GPU that is not there."""
    with torch.device("cuda"):
        networks = [network.eval().requires_grad_(False) for network in world()]
    parts = types.SimpleNamespace(**dict(zip(("tokenizer", "teacher", "phi", "text"), networks)))
    parts.captions, parts.files, parts.saved = None, {}, {}
    if len(networks) == 4:
        parts.captions = [f"a photo of {n} dogs" for n in range(100)]
        parts.names = parts.captions[:8]
    else:
        parts.text, parts.names = None, [str(n) for n in range(parts.teacher.num_classes)]
    return parts


def discriminator(files, image_size, device):
    """In place of StyleGAN-XL's from files: the same networks."""
    # it is made on the CPU and moved, which fake tensors cannot
    with torch.device(device), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda x: x)
        networks = {cls.name: cls() for cls in models.FEATURE_NETWORKS}
        return models.Discriminator(networks, image_size)


def distil(world, flags):
    """One step of train.distil, or more, and images of official teachers -> a Counter.

    flags: as of train.py.
    The first step leaves behind what AdamW keeps, so that the next ones need more memory: it is
    added to the peak.
    """
    saved = []
    train.save = lambda path, content: saved.append(counter.live)
    train.check_finite = lambda recent, stage, good: recent.clear()
    train.open_log = lambda run, start: open(os.devnull, "w")
    fpd.load_discriminator = discriminator
    fpd.Gan.real = lambda self, n: torch.zeros(n, 3, self.size, self.size, device="cuda")
    cfg = train.parse(["--steps", "1", *flags])
    with FakeTensorMode(), Counter() as counter:
        parts = parts_of(world)
        parts.real_files = parts.discriminator_files = []
        train.distil(cfg, parts, Path("runs/none"), "cuda", counter.mark)
        # images are drawn outside of the steps, where the host may wait
        counter.step = 0
        if cfg.dataset in sample.OFFICIAL:
            draw_images(parts, cfg)
    counter.peak += saved[1] - saved[0]
    return counter


def draw_images(parts, cfg):
    """Sampler and decoder, in float32: nothing but devices and types can go wrong."""
    c = parts.text.encode(parts.names) if parts.text else torch.arange(8)
    for steps in (2, 0):
        images = sample.generate(parts.teacher, parts.tokenizer, c, cfg, steps)
        assert images.shape == (8, 3, 256, 256) and images.dtype == torch.uint8


def inception():
    """FID's network, by both paths -> a Counter"""
    with FakeTensorMode(), Counter() as counter:
        with torch.device("cuda"):
            network = models.Inception().eval()
        images = torch.zeros(8, 3, 256, 256, dtype=torch.uint8)
        for path in ("pytorch-fid", "legacy"):
            features, logits = network(images, path)
            assert features.device.type == logits.device.type == "cuda"
    return counter


# The longest first: nobody waits for one that begins last
REHEARSALS = {
    "laion": lambda: distil(laion_world, ["--dataset", "laion", "--captions", __file__,
                                          "--lift-chunk", "64"]),
    "gan": lambda: distil(wide_world, ["--gan-weight", "0.5"]),
    "imagenet": lambda: distil(imagenet_world, ["--dataset", "imagenet"]),
    "shapes": lambda: distil(shapes_world, []),
    # the second of two steps is in another of its rounds
    "sdtt": lambda: distil(shapes_world, ["--method", "sdtt", "--steps", "2"]),
    "dimo": lambda: distil(shapes_world, ["--method", "dimo"]),
    "inception": inception,
}


def rehearse(name):
    """-> what is printed of it"""
    try:
        counter = REHEARSALS[name]()
    except Exception:
        return dict(name=name, error=traceback.format_exc())
    return dict(name=name, peak=counter.peak / 1e9, waits=counter.waits)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """-> {name in REHEARSALS: what its process says}"""
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("the GPU that is not there is made with a C++ compiler, on Linux")
    folder, torch_folder = tmp_path_factory.mktemp("no_card"), Path(torch.__file__).parent
    source, library = folder / "no_card.cpp", folder / "no_card.so"
    source.write_text(NO_CARD)
    subprocess.run(["c++", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include", source,
                    "-o", library, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
                    f"-Wl,-rpath,{torch_folder}/lib"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library), "NO_CARD": str(library),
                   "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # a pool would wait for ever for a process that crashed
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True,
                          text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {one["name"]: one for one in said}


# ------------------------------------------------------------------------------ without a GPU
@pytest.mark.slow
@pytest.mark.parametrize("name", REHEARSALS)
def test_rehearsal(rehearsal, name):
    """Every kernel finds its tensors on the GPU, with types that fit; no step waits for the GPU."""
    said = rehearsal[name]
    assert "error" not in said, said["error"]
    assert [wait for wait in said["waits"] if wait[0] > 0] == []


@pytest.mark.slow
def test_memory(rehearsal):
    """GB at the most, counted: ImageNet's paper settings fit a card of 24 GB."""
    assert rehearsal["imagenet"]["peak"] < 22


# ------------------------------------------------------------------------------ with a GPU
@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A smoke run of shapes on the GPU -> its folder."""
    line = "train.py --smoke --gpus 1 --batch 32"
    return finished_run(tmp_path_factory, line, in_process)[0]


@needs_gpu
def test_a_run_on_the_gpu(small_run, smoke_runs):
    """It leaves what a run on the CPU leaves: finite numbers under the same keys; samples."""
    run, on_cpu = small_run / "runs/shapes-smoke", smoke_runs("shapes")[0] / "runs/shapes-smoke"
    rows, expected = ([json.loads(line) for line in (folder / "log.jsonl").open()]
                      for folder in (run, on_cpu))
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    saved, other = (torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
                    for folder in (run, on_cpu))
    assert saved.keys() == other.keys() and saved["ema"].keys() == other["ema"].keys()
    assert all(torch.isfinite(value).all() for value in saved["ema"].values())
    for words in ("--n 2 --out student.png", "--n 2 --teacher --steps 4 --out teacher.png"):
        done = in_process(f"sample.py --class 3 {words}", small_run)
        assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize("flags", [[], ["--method", "dimo"], ["--method", "sdtt"],
                                   ["--gan-weight", "0.5"]])
def test_the_gpu_is_never_waited_for(small_run, flags, monkeypatch):
    """CUDA's own word on it, in the second step of three: only after the third is the log read."""
    monkeypatch.chdir(small_run)
    monkeypatch.setattr(train, "sample_sheet", lambda *args: None)
    cfg = train.parse(["--smoke", "--batch", "32", "--steps", "3", "--log-every", "3",
                       "--save-every", "3", "--name", f"waits{len(flags)}", *flags])
    parts, step = train.prepare(cfg, "cuda"), 0

    def mark(part):
        nonlocal step
        step += part == "condition"
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
    train.distil(cfg, parts, small_run / "runs/shapes-smoke", "cuda", mark)
    assert step == 3


if __name__ == "__main__":
    # fake tensors import it at their first use: now, once for all
    import torch._dynamo
    # forks of this process, which has imported everything; two of them run at a time
    with multiprocessing.get_context("fork").Pool(2, pretend, maxtasksperchild=1) as pool:
        for said in pool.imap_unordered(rehearse, REHEARSALS):
            print(json.dumps(said))
