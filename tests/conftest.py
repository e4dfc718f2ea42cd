"""What the tests share: the import path, and access to golden/, recorded outputs of the official
code of every pretrained network.

No weights are stored there. Every weight is generated from its official key, so a network that
loads the official key names strictly can be checked at full size:
case.weights() -> load -> case.inputs -> case.check(name, output).
"""
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
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Most of the time is a single thread's: two processes of one thread each (pytest -n 2) are faster
# than one of two. Set before numpy and torch read it, and for what tests start, too
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# no test may reach the network; read when the hub is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(ROOT))
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; leave out with -m 'not slow'")
    if config.getoption("dist", "no") == "load":
        # Half of the list for each process; who is done takes over from the other's end. So most
        # files stay in one process, and what a file prepares for its tests is prepared once
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items):
    """Slow tests first: nobody waits for one that begins last."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


# ---------------------------------------------------------------- commands of the README
def command_line(line):
    """"train.py --smoke", or a list of its words -> what a process is started with."""
    script, *arguments = line.split(" ") if isinstance(line, str) else line
    return [sys.executable, str(ROOT / script), *arguments]


def in_process(line, cwd):
    """Run a command of the README in a folder of its own, without a new process, which takes
    seconds to import everything. -> CompletedProcess with text output."""
    from sample import run_command
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
                # as Python does when sys.exit gets a text
                err.write(code)
                code = 1
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def refused(done, *words):
    """A mistake of the user's ends with words about it, and without a traceback."""
    assert done.returncode in (1, 2), done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr[-2000:]
    assert all(word in done.stderr for word in words), done.stderr


@pytest.fixture(scope="session")
def smoke_runs(tmp_path_factory):
    """-> function: name of a dataset -> a folder with one smoke run of it, and what the run said.
    One run serves all files; see `own_copy`."""
    # here: most tests do without
    import evaluate
    import train
    # the teacher's many rows are the slowest part
    report = functools.partial(evaluate.report, steps=(2,))
    sample_grid = train.sample_grid

    @functools.cache
    def run(dataset):
        folder = tmp_path_factory.mktemp("run")
        with pytest.MonkeyPatch.context() as patch:
            # whole runs, also where the first test to ask has `no_pictures`
            patch.setattr(evaluate, "report", report)
            patch.setattr(train, "sample_grid", sample_grid)
            done = in_process(f"train.py --dataset {dataset} --smoke", folder)
        assert done.returncode == 0, done.stderr[-2000:]
        return folder, done
    return run


@pytest.fixture
def no_pictures(smoke_runs, monkeypatch):
    """Runs without sample sheets and report, where they are not what is tested: most of the time
    goes there. (`smoke_runs` comes first, to keep what is replaced here.)"""
    import evaluate
    import train
    monkeypatch.setattr(evaluate, "report", lambda *args, **kwargs: None)
    monkeypatch.setattr(train, "sample_grid", lambda *args: None)


def own_copy(tmp_path_factory, run):
    """A new folder with all that `smoke_runs` have made there: tests may write into it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(run[0], folder, dirs_exist_ok=True)
    return folder


# ---------------------------------------------------------------- golden/
def official_normal(seed, shape):
    random, drawn = np.random.RandomState(seed), np.empty(math.prod(shape), np.float32)
    # in pieces, which stay in the processor's cache
    for piece in np.split(drawn, range(1 << 14, drawn.size, 1 << 14)):
        piece[:] = random.standard_normal(piece.size)
    return torch.from_numpy(drawn.reshape(shape))


def quick_normal(seed, shape):
    """Where no recorded output is repeated."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def golden_fill(manifest, fill_xor=0, tied=(), nonfloat_keys=(), normal=official_normal):
    """The rule that made the weights. manifest: key -> shape; -> a state dict of float32 tensors.

    tied            key -> the key whose storage, hence value, it shares
    nonfloat_keys   integer buffers, which stay as constructed: they are left out
    """
    def fill(key):
        shape, last = manifest[key], key.rsplit(".", 1)[-1]
        v = normal((zlib.crc32(key.encode()) ^ fill_xor) & 0xffffffff, shape)
        if len(shape) >= 2:
            # keeps activations near 1 through all layers
            v *= ((2 if len(shape) == 4 else 1) / np.prod(shape[1:])) ** 0.5
        elif last == "running_var":
            v = 1 + 0.1 * v.abs()
        elif last == "weight":
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        return v
    keys = [key for key in manifest if key not in nonfloat_keys and key not in tied]
    # numpy draws without holding the interpreter's lock
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        state = dict(zip(keys, pool.map(fill, keys)))
    return state | {key: state[source] for key, source in dict(tied).items()}


class Case:
    """One recorded case. .info: its json; .inputs: name -> array; an input that the json only
    describes in words is not among them."""
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
                # a recipe is a numpy expression, or else a sentence
                try:
                    self.inputs[key] = eval(entry["recipe"], names)
                except SyntaxError:
                    pass

    def weights(self, normal=official_normal):
        info = self.info
        return golden_fill(info["manifest"], info["fill_xor"], info.get("tied", ()),
                           set(info.get("nonfloat_keys", ())), normal)

    def check(self, name, value, atol=2e-4):
        """Does this tensor or array equal the recorded output? Large ones were stored thinned out,
        with the mean and std of the whole."""
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


def official_files(folder, full=False):
    """Write the three files of the imagenet setting as their authors ship them, with generated
    weights -> {part: path}.

    full=False   sizes of the tiny cases: MaskGIT (16 tokens, K = 32, 10 classes, 4 heads), VQGAN
                 (32 pixels, K = 48), a DINOv3 of width 192
    full=True    the real sizes, 1.4 GB: MaskGIT-256, VQGAN f16-1024 with its loss networks, DINOv3
                 ViT-B/16; to be loaded without options, and not the weights of the recorded cases
    """
    # here: most tests do without timm
    from models import import_timm
    if full:
        maskgit = load_case("maskgit_transformer", "full256")
        vqgan = load_case("taming_vqgan", "full_f16_1024")
        backbone = "vit_base_patch16_dinov3.lvd1689m"
        normal = quick_normal
    else:
        maskgit = load_case("maskgit_transformer", "tiny")
        vqgan = load_case("taming_vqgan", "tiny")
        backbone = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"
        normal = official_normal
    files = {"maskgit": Path(folder) / "MaskGIT_ImageNet_256.pth",
             "vqgan": Path(folder) / "last.ckpt",
             "backbone": Path(folder) / f"{backbone}.safetensors"}
    write_maskgit(files["maskgit"], maskgit.weights(normal))
    write_lightning(files["vqgan"], vqgan.weights(normal))
    net = import_timm().create_model(backbone, num_classes=0)
    manifest = {key: list(value.shape) for key, value in net.state_dict().items()}
    save_file(golden_fill(manifest, normal=normal), files["backbone"])
    return files


def write_maskgit(path, state):
    """With the optimizer's moments; the real file has two for every weight."""
    moments = {"exp_avg": torch.zeros_like(state["pos_emb"])}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save({"iter": 7, "global_epoch": 3, "model_state_dict": OrderedDict(state),
                "optimizer_state_dict": optimizer}, path)


def write_lightning(path, state):
    """Lightning pickles classes of its own. These come from a module that is gone when the file is
    read, as Lightning will be."""
    extra = json.loads((GOLDEN / "taming_vqgan" / "checkpoint_extra_keys.json").read_text())
    zeros = {key: torch.zeros(shape) for key, shape in extra["extra_keys"].items()}
    gone = types.ModuleType("gone_lightning")
    exec("class ModelCheckpoint: pass\nclass AttributeDict(dict): pass", gone.__dict__)
    sys.modules[gone.__name__] = gone
    try:
        parameters = gone.AttributeDict(lr=4.5e-6)
        parameters.callback = gone.ModelCheckpoint()
        callback = {"best_model_score": np.float64(0.5), "dirpath": Path("logs")}
        torch.save({"epoch": 1, "global_step": 2, "pytorch-lightning_version": "1.0.8",
                    "hyper_parameters": parameters, "callbacks": {gone.ModelCheckpoint: callback},
                    "state_dict": OrderedDict(state) | zeros}, path)
    finally:
        del sys.modules[gone.__name__]
