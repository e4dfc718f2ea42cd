"""What the tests share: the import path, and access to golden/, recorded outputs of the official code of every pretrained network.

No weights are stored there. Every weight is generated from its official key, so a network that loads the official key names
strictly can be checked at full size: case.weights() -> load -> case.inputs -> case.check(name, output).
"""
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(2)
GOLDEN = Path(__file__).parent / "golden"


def golden_fill(manifest, fill_xor=0, tied=(), nonfloat_keys=()):
    """The rule that made the weights. manifest: key -> shape; returns a state dict of float32 tensors.

    tied            key -> the key whose storage, hence value, it shares
    nonfloat_keys   integer buffers, which stay as constructed: they are left out
    """
    state = {}
    for key, shape in manifest.items():
        if key in nonfloat_keys or key in tied:
            continue
        seed = (zlib.crc32(key.encode()) ^ fill_xor) & 0xffffffff
        v = np.random.RandomState(seed).standard_normal(shape)
        v = torch.from_numpy(np.asarray(v, dtype=np.float32))
        last = key.rsplit(".", 1)[-1]
        if len(shape) >= 2:                                            # keeps activations near 1 through all layers
            v *= ((2 if len(shape) == 4 else 1) / np.prod(shape[1:])) ** 0.5
        elif last == "running_var":
            v = 1 + 0.1 * v.abs()
        elif last == "weight":
            v = 1 + 0.1 * v
        else:
            v = 0.1 * v
        state[key] = v
    return state | {key: state[source] for key, source in dict(tied).items()}


class Case:
    """One recorded case. .info: its json; .inputs: name -> array; an input that the json only describes in words is not among them."""
    def __init__(self, component, name):
        self.info = json.loads((GOLDEN / component / f"{name}.json").read_text())
        npz = GOLDEN / component / f"{name}.npz"
        self.arrays = dict(np.load(npz)) if npz.exists() else {}
        self.inputs = {}
        for key, entry in self.info.get("inputs", {}).items():
            if "npz" in entry:
                self.inputs[key] = self.arrays[entry["npz"]]
            else:
                try:                                                   # a recipe is a numpy expression, or else a sentence
                    names = {"RandomState": np.random.RandomState, "uint8": np.uint8, "float32": np.float32}
                    self.inputs[key] = eval(entry["recipe"], names)
                except SyntaxError:
                    pass

    def weights(self):
        info = self.info
        return golden_fill(info["manifest"], info["fill_xor"], info.get("tied", ()), set(info.get("nonfloat_keys", ())))

    def check(self, name, value, atol=2e-4):
        """Does this tensor or array equal the recorded output? Large ones were stored thinned out, with the mean and std of the whole."""
        entry = self.info["outputs"][name]
        value = np.asarray(value.detach().cpu() if torch.is_tensor(value) else value)
        assert list(value.shape) == entry["shape"], f"{name}: shape {value.shape}, recorded {entry['shape']}"
        stored = self.arrays[entry["npz"]]
        thinned = value if entry["stride"] == 1 else value.reshape(-1)[::entry["stride"]]
        if value.dtype.kind in "iub":
            np.testing.assert_array_equal(thinned, stored.reshape(thinned.shape), err_msg=name)
            return
        np.testing.assert_allclose(thinned, stored.reshape(thinned.shape), rtol=0, atol=atol, err_msg=name)
        for what in ("mean", "std"):
            if what in entry:
                assert abs(getattr(value.astype(np.float64), what)() - entry[what]) <= atol, f"{name}: {what} of the whole array"


def load_case(component, name):
    return Case(component, name)
