"""What the tests share: the commands of the README, tiny networks, and golden/, recorded outputs of
the official code of every pretrained network (see golden/README.md)."""
import contextlib
import functools
import importlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Most of the work runs in a single thread, so two processes of one thread each (pytest -n 2) are
# faster than one process of two. This is set before numpy and torch read it, and is inherited by
# the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# No test may reach the network. The hub reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; leave out with -m 'not slow'")
    if config.getoption("dist", "no") == "load":
        # Each process gets half of the list, and the one that is done first takes tests from the
        # other's end. Most files then stay in one process, which prepares what they share once.
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items):
    """Slow tests run first, so that none of them begins last and keeps one process waiting."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# ---------------------------------------------------------------- commands of the README
def command_line(line):
    """"train.py --smoke", or a list of its words -> the arguments of a new process."""
    script, *arguments = line.split(" ") if isinstance(line, str) else line
    return [sys.executable, str(ROOT / script), *arguments]


def in_process(line, cwd):
    """Run a command of the README in the folder cwd. No new process is started, because its imports
    would take seconds. -> CompletedProcess with text output"""
    import tokenizer
    from sample import run_command
    # A process reads its folder of images once.
    tokenizer.folder.cache_clear()
    words = command_line(line)
    module = importlib.import_module(Path(words[1]).stem)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", words[1:])
        try:
            run_command(module.main)
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):
                # Python does the same when sys.exit gets a text.
                err.write(code)
                code = 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def refused(done, *words):
    """A command that the user mistyped ends with one line about it, and without a traceback."""
    assert done.returncode in (1, 2), done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr[-2000:]
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory):
    """A function: name of a dataset -> the folder of a smoke run of it, and the finished command.
    All test files share one run of each dataset; see `own_copy`."""
    # These imports stand here because most tests do without them.
    import evaluate
    import train
    # The teacher's many rows are the slowest part of a report.
    report = functools.partial(evaluate.report, steps=(2,))
    sample_grid, example_rows = train.sample_grid, train.example_rows

    @functools.cache
    def run(dataset):
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            # The run is a whole one, even if the first test that asks for it has `no_pictures`.
            patch.setattr(evaluate, "report", report)
            patch.setattr(train, "sample_grid", sample_grid)
            patch.setattr(train, "example_rows", example_rows)
            (folder / "captions.txt").write_text("\n".join(train.sample.PROMPTS))
            more = " --captions captions.txt" if dataset == "laion" else ""
            done = in_process(f"train.py --dataset {dataset} --smoke{more}", folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return folder, done
    return run


@pytest.fixture
def no_pictures(smoke_runs, monkeypatch):
    """Runs make neither sample sheets nor a report, which take most of their time, where a test is
    about something else. (`smoke_runs` is an argument so that it keeps what is replaced here.)"""
    import evaluate
    import train
    monkeypatch.setattr(evaluate, "report", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "sample_grid", lambda *args: None)
    monkeypatch.setattr(train, "example_rows", lambda *args: [])


def own_copy(tmp_path_factory, run):
    """A copy of a folder of `smoke_runs`, into which a test may write."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(run[0], folder, dirs_exist_ok=True)
    return folder


# ---------------------------------------------------------------- tiny networks
TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_maskgit(seed=0, **sizes):
    """A MaskGIT whose random weights are large enough for the class and every token to matter."""
    from models import MaskGIT
    torch.manual_seed(seed)
    net = MaskGIT(**dict(K=8, L=16, num_classes=3, width=16, depth=1, heads=2, mlp=32) | sizes)
    for p in net.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    return net.eval().requires_grad_(False)


class Recorder:
    """A network that keeps the tokens it was given in `seen`."""
    def __init__(self, net):
        self.net, self.K, self.L, self.seen = net, net.K, net.L, []

    def __call__(self, z, *args, **kind):
        self.seen.append(z.clone())
        return self.net(z, *args, **kind)


def fake_run(folder, dataset, names):
    """A run of tiny random networks in folder/runs/a, as sample.load_run returns it."""
    import sample
    from models import ConvNet, MaskGen, MaskGIT, Words
    from tokenizer import VQGAN
    torch.manual_seed(0)
    cfg = types.SimpleNamespace(dataset=dataset, smoke=True, data=str(folder / "data"), seed=0,
                                sample_guidance=2.0, confidence_noise=2.0, init_mask=0.9,
                                temperature=1.0, remask=(0.1, 0.9), refine_guidance=2.0)
    sizes = dict(K=32, L=16, width=16, depth=1, heads=2)
    has_captions = dataset in ("scenes", "laion")
    kind, more = (MaskGen, {}) if has_captions else (MaskGIT, dict(num_classes=len(names), mlp=16))
    networks = dict(tokenizer=VQGAN(K=32, d=4, ch=4, ch_mult=(1, 1, 1, 1), z_channels=4, groups=2),
                    teacher=kind(**sizes, **more), student=kind(**sizes, **more),
                    judge=ConvNet(len(names), width=4))
    if has_captions:
        networks["text"] = Words()
    for network in networks.values():
        network.eval().requires_grad_(False)
    path = folder / "runs" / "a" / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return sample.Networks(**networks, cfg=cfg, step=4, path=path, names=names)


# ---------------------------------------------------------------- golden/
# The sizes of the case `tiny` of each component
TINY = {
    "maskgit_transformer": dict(K=32, L=16, num_classes=10, width=64, depth=2, heads=4, mlp=128),
    "taming_vqgan": dict(K=48, d=16, ch=32, ch_mult=(1, 2), blocks=1, attn_levels=(1,),
                         z_channels=32, image_size=32),
    "maskgen_vq": dict(K=40, L=16, width=64, depth=3, heads=4, text_width=24, T=7, score_width=16,
                       unused_rows=11),
    "tatitok_vq": dict(K=50, d=12, L=6, width=(64, 96), depth=(2, 3), patch=8, text=(7, 20),
                       image_size=32, head_width=16)}


def normal(seed, shape):
    random, drawn = np.random.RandomState(seed), np.empty(math.prod(shape), np.float32)
    # Pieces of this length stay in the processor's cache.
    for piece in np.split(drawn, range(1 << 14, drawn.size, 1 << 14)):
        piece[:] = random.standard_normal(piece.size)
    return torch.from_numpy(drawn.reshape(shape))


def golden_fill(manifest, fill_xor=0, tied=(), nonfloat_keys=()):
    """The rule that made the weights. manifest: key -> shape; -> a state dict of float32 tensors.

    tied            key -> the key whose storage, and therefore value, it shares
    nonfloat_keys   integer buffers, which stay as they were constructed and are left out
    """
    def fill(key):
        shape, last = manifest[key], key.rsplit(".", 1)[-1]
        v = normal((zlib.crc32(key.encode()) ^ fill_xor) & 0xffffffff, shape)
        if len(shape) >= 2:
            # This scale keeps activations near 1 through all layers.
            v *= ((2 if len(shape) == 4 else 1) / np.prod(shape[1:])) ** 0.5
        elif last == "running_var":
            v = 1 + 0.1 * v.abs()
        elif last == "weight":
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        return v
    keys = [key for key in manifest if key not in nonfloat_keys and key not in tied]
    # numpy releases the interpreter's lock while it draws.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        state = dict(zip(keys, pool.map(fill, keys)))
    return state | {key: state[source] for key, source in dict(tied).items()}


def filled(network):
    """A state dict with the keys and shapes of this network, filled by the same rule."""
    return golden_fill({key: list(value.shape) for key, value in network.state_dict().items()})


def check_frozen(network):
    """Every loader hands out its network in eval mode and without gradients. -> the network"""
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    return network


class Case:
    """One recorded case. .info: its json; .inputs: name -> array, without those that the json only
    describes in words; .tensors: the same as tensors, whole numbers as long."""
    def __init__(self, component, name):
        self.info = json.loads((GOLDEN / component / f"{name}.json").read_text())
        npz = GOLDEN / component / f"{name}.npz"
        self.arrays = dict(np.load(npz)) if npz.exists() else {}
        self.inputs = {}
        for key, entry in self.info.get("inputs", {}).items():
            if "npz" in entry:
                self.inputs[key] = self.arrays[entry["npz"]]
            else:
                names = {"RandomState": np.random.RandomState, "uint8": np.uint8,
                         "float32": np.float32}
                # A recipe is a numpy expression or a sentence.
                try:
                    self.inputs[key] = eval(entry["recipe"], names)
                except SyntaxError:
                    pass

    @property
    def tensors(self):
        return {key: torch.from_numpy(x.astype(np.int64) if x.dtype.kind in "iu" else x)
                for key, x in self.inputs.items()}

    def weights(self):
        info = self.info
        return golden_fill(info["manifest"], info["fill_xor"], info.get("tied", ()),
                           set(info.get("nonfloat_keys", ())))

    def check(self, name, value, atol=2e-4):
        """Assert that a tensor or array equals the recorded output. Of large ones, every n-th value
        was recorded, with the mean and standard deviation of the whole."""
        entry = self.info["outputs"][name]
        if torch.is_tensor(value):
            value = value.detach().cpu()
        value = np.asarray(value)
        shape = entry["shape"]
        assert list(value.shape) == shape, f"{name}: shape {value.shape}, recorded {shape}"
        thinned = value if entry["stride"] == 1 else value.reshape(-1)[::entry["stride"]]
        stored = self.arrays[entry["npz"]].reshape(thinned.shape)
        if value.dtype.kind in "iub":
            np.testing.assert_array_equal(thinned, stored, err_msg=name)
            return
        np.testing.assert_allclose(thinned, stored, rtol=0, atol=atol, err_msg=name)
        whole = value.astype(np.float64)
        assert abs(whole.mean() - entry["mean"]) <= atol, f"{name}: mean of the whole array"
        assert abs(whole.std() - entry["std"]) <= atol, f"{name}: std of the whole array"


def load_case(component, name):
    return Case(component, name)


def load_network(component, src, **sizes):
    """A generator or tokenizer by its official loader."""
    import models
    import tokenizer
    loaders = {"maskgit_transformer": models.load_maskgit, "maskgen_vq": models.load_maskgen,
               "taming_vqgan": tokenizer.load_vqgan, "tatitok_vq": tokenizer.load_tatitok}
    return check_frozen(loaders[component](src, **sizes))


def official(component, name, **sizes):
    """A recorded case and its network: that of `tiny` for the traces of a sampler; with the
    loader's own sizes, the released ones, for the cases "full..."."""
    case = load_case(component, name)
    source = load_case(component, "tiny") if name.startswith("sampler") else case
    sizes = {} if name.startswith("full") else TINY[component] | sizes
    return case, load_network(component, source.weights(), **sizes)
