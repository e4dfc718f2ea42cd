"""Files of pretrained weights: all formats in which they are shipped load, nothing in them is run,
wrong ones are refused, and a missing one is named."""
import json
import os
import pickle
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (GOLDEN, TINY, TINY_BACKBONE, check_frozen, filled, in_process, load_case,
                      load_network, refused)
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import models
from tokenizer import load_vqgan, read_weights


def same(state, expected):
    return all(torch.equal(value, expected[key]) for key, value in state.items())


# ---------------------------------------------------------------- formats
def maskgit_file(path, state):
    """MaskGIT's file also has the optimiser's moments, two for every weight."""
    optimiser = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"iter": 7, "model_state_dict": state, "optimizer_state_dict": optimiser}, path)


def lightning_file(path, state):
    """Lightning pickles classes of its own. Those here come from a module that is gone when the
    file is read, as Lightning will be. The file also holds the networks of the VQGAN's loss."""
    extra = json.loads((GOLDEN / "taming_vqgan" / "checkpoint_extra_keys.json").read_text())
    zeros = {key: torch.zeros(shape) for key, shape in extra["extra_keys"].items()}
    gone = types.ModuleType("gone_lightning")
    exec("class ModelCheckpoint: pass\nclass AttributeDict(dict): pass", gone.__dict__)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, gone.__name__, gone)
        parameters = gone.AttributeDict(lr=4.5e-6)
        parameters.callback = gone.ModelCheckpoint()
        callback = {"best_model_score": np.float64(0.5), "dirpath": Path("logs")}
        torch.save({"epoch": 1, "hyper_parameters": parameters, "state_dict": state | zeros,
                    "callbacks": {gone.ModelCheckpoint: callback}}, path)


def torch_file(path, state):
    torch.save(state, path)


def safetensors_file(path, state, without=None):
    """A safetensors file may hold a table that is used twice under one name alone."""
    save_file({key: value for key, value in state.items() if key != without}, path)


@pytest.mark.parametrize("component, write, suffix", [
    ("maskgit_transformer", maskgit_file, "pth"), ("taming_vqgan", lightning_file, "ckpt"),
    ("tatitok_vq", safetensors_file, "safetensors"), ("tatitok_vq", torch_file, "bin"),
    ("maskgen_vq", torch_file, "bin"),
    ("maskgen_vq", partial(safetensors_file, without="lm_head.weight"), "safetensors"),
    ("maskgen_vq", partial(safetensors_file, without="embeddings.weight"), "safetensors")])
def test_files_load_as_they_are_shipped(component, write, suffix, tmp_path):
    """No random number is drawn."""
    state, path = load_case(component, "tiny").weights(), tmp_path / f"weights.{suffix}"
    write(path, state)
    before = torch.get_rng_state()
    network = load_network(component, path, **TINY[component])
    assert torch.equal(torch.get_rng_state(), before)
    own = network.state_dict()
    assert same(own, state) and own.keys() >= state.keys() - {"lm_head.weight"}
    if component == "maskgen_vq":
        # No file has the empty caption, which must not be left as whatever the memory held.
        assert torch.equal(network.empty, torch.zeros(8, 24))


def test_a_backbone_loads_without_the_classifier_of_its_file(tmp_path):
    state = filled(models.Backbone(TINY_BACKBONE, 64).net)
    save_file(state | {"head.weight": torch.ones(1)}, tmp_path / "backbone.safetensors")
    backbone = models.load_backbone(tmp_path / "backbone.safetensors", 64, TINY_BACKBONE)
    assert same(check_frozen(backbone).net.state_dict(), state)


def test_inert_reader_returns_the_same_tensors(tmp_path):
    """All kinds of numbers, views of one storage, empty and 0-dim tensors, parameters."""
    base = torch.arange(24.).view(4, 6)
    state = {"base": base, "view": base[1:, ::2], "half": base.half(), "bfloat16": base.bfloat16(),
             "long": torch.tensor(7), "empty": base[:0], "bool": base > 3,
             "parameter": nn.Parameter(base.double())}
    torch.save({"state_dict": state, "other": types.SimpleNamespace(a=1)}, tmp_path / "x.ckpt")
    found = read_weights(tmp_path / "x.ckpt")
    assert found.keys() == state.keys() and same(found, state)
    assert all(found[key].dtype == value.dtype for key, value in state.items())


# ---------------------------------------------------------------- what is refused
def test_weights_with_other_keys_or_of_another_network_are_refused():
    """They would give wrong images and no error."""
    state, own = load_case("maskgit_transformer", "tiny").weights(), "first_layer.2.weight"
    missing = {key: value for key, value in state.items() if key != own}
    for wrong, words in ((missing, own), (state | {"surprise": torch.zeros(1)}, "surprise"),
                         (state | {own: state[own][:5]}, own), ({"conv.bias": state[own]}, own)):
        with pytest.raises(RuntimeError, match=words):
            load_network("maskgit_transformer", wrong, **TINY["maskgit_transformer"])


class Malicious:
    """Unpickling it normally runs a command that creates a file."""
    def __init__(self, marker):
        self.command = f"echo ran > '{marker}'"

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_file_is_ever_run(tmp_path):
    marker, path, sizes = tmp_path / "marker", tmp_path / "last.ckpt", TINY["taming_vqgan"]
    state = load_case("taming_vqgan", "tiny").weights()
    pickle.loads(pickle.dumps(Malicious(marker)))
    # The danger is real.
    assert marker.exists()
    marker.unlink()
    for content in (Malicious(marker), {"state_dict": Malicious(marker)},
                    {"state_dict": state | {"quant_conv.bias": Malicious(marker)}}):
        # In torch's format and in its old one
        for is_zip in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=is_zip)
            with pytest.raises((AttributeError, RuntimeError, TypeError)):
                load_vqgan(path, **sizes)
    path.write_bytes(pickle.dumps(Malicious(marker), 2))
    with pytest.raises(RuntimeError):
        load_vqgan(path, **sizes)
    # Beside honest weights it stays inert.
    torch.save({"callbacks": Malicious(marker), "state_dict": state}, path)
    assert same(load_vqgan(path, **sizes).state_dict(), state) and not marker.exists()


def test_towers_without_quickgelu_are_refused(monkeypatch):
    """Some releases of open_clip build GELU and only warn. Every text would be slightly wrong."""
    tower = type(models.TextEncoder(width=16, depth=1, heads=1).tower)
    monkeypatch.setattr("open_clip.transformer.TextTransformer",
                        lambda act_layer, **sizes: tower(act_layer=nn.GELU, **sizes))
    with pytest.raises(ValueError, match="QuickGELU"):
        models.TextEncoder(width=16, depth=1, heads=1)


def test_timm_is_imported_beside_a_torchvision_that_does_not_fit(monkeypatch):
    """Importing torchvision then ends in a RuntimeError, and what it lacks is declared."""
    models.import_timm()
    declared = []

    def find_spec(name, *_):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.delitem(sys.modules, "torchvision")
    monkeypatch.setattr(sys, "meta_path", [types.SimpleNamespace(find_spec=find_spec)])
    monkeypatch.setattr(torch.library, "define", lambda name, _: declared.append(name))
    assert models.import_timm().__name__ == "timm"
    assert declared == ["torchvision::nms", "torchvision::qnms"]


# ---------------------------------------------------------------- where files are looked for
def test_files_come_from_the_folder_else_from_the_hub(tmp_path, monkeypatch):
    repo, file = "llvictorll/Maskgit-pytorch", "pretrained_maskgit/VQGAN/last.ckpt"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: f"hub/{repo}/{file}")
    assert models.find_weights(tmp_path, "last.ckpt", repo, file) == Path("hub", repo, file)
    (tmp_path / "last.ckpt").touch()
    found = models.find_weights(tmp_path, "last.ckpt", repo, file)
    assert found == tmp_path / "last.ckpt"


@pytest.mark.parametrize("line, file, repo", [
    ("train.py --dataset imagenet", "pretrained_maskgit/VQGAN/last.ckpt",
     "llvictorll/Maskgit-pytorch"),
    ("sample.py --dataset laion", "model.safetensors", "turkeyju/tokenizer_tatitok_bl128_vq")])
def test_a_missing_file_is_named_with_its_repository_and_place(line, file, repo, tmp_path):
    """The command has begun nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    refused(in_process(line, tmp_path), file, repo, "weights/", "--weights")
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


@pytest.mark.parametrize("name, repo", [
    (models.BACKBONE, f"timm/{models.BACKBONE}"),
    (models.FEATURE_NETWORKS["deit"], "timm/deit_base_distilled_patch16_224.fb_in1k"),
    (models.FEATURE_NETWORKS["efficientnet"], "timm/tf_efficientnet_lite0.in1k")])
def test_networks_of_timm_are_found_by_their_names(tmp_path, name, repo):
    with pytest.raises(ValueError, match=f"model.safetensors of repository {repo} "):
        models.find_backbone(name, tmp_path)
