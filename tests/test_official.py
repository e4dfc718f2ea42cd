"""The official networks of the imagenet setting: equal to recorded outputs of the official code
(golden/), and safely read from files."""
import math
import os
import pickle
import resource
import types
import zipfile
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import golden_fill, load_case, official_files

import fpd
import models
import tokenizer

SCHEDULES = load_case("maskgit_transformer", "schedules").info
TINY_BACKBONE = "vit_tiny_patch16_dinov3_qkvb.eupe_lvd1689m"


def tensors(case):
    """The inputs of a case, whole numbers as long."""
    found = {}
    for key, value in case.inputs.items():
        is_whole = value.dtype.kind in "iu"
        found[key] = torch.from_numpy(value.astype(np.int64) if is_whole else value)
    return found


def load_case_maskgit(name):
    """-> case, MaskGIT with its weights. The sampler traces use the network of `tiny`."""
    case = load_case("maskgit_transformer", name)
    filled = case if "manifest" in case.info else load_case("maskgit_transformer", "tiny")
    config = case.info["config"]
    model = models.load_maskgit(filled.weights(), config["heads"], config["nclass"])
    assert (model.K, model.num_classes) == (config["codebook_size"], config["nclass"])
    assert model.L == (config["img_size"] // 16) ** 2
    return case, model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return official_files(tmp_path_factory.mktemp("official"))


# ---------------------------------------------------------------- MaskGIT
@pytest.mark.parametrize("name", ["tiny", pytest.param("full256", marks=pytest.mark.slow)])
@torch.no_grad()
def test_maskgit_equals_the_official_network(name):
    """Tolerance 5e-5: a wrong LayerNorm epsilon or GELU changes the logits by 5e-4, float32 against
    float64 by 3e-6."""
    case, model = load_case_maskgit(name)
    assert not model.training
    x = tensors(case)
    z, labels = x["tokens"].flatten(1), x["labels"]
    case.check("logits_cond", model(z, labels, mask_column=True), atol=5e-5)
    case.check("logits_drop", model(z, labels, x["drop_label"], mask_column=True), atol=5e-5)
    # without the column of "mask"
    assert model(z[:1], labels[:1]).shape == (1, model.L, model.K)


@pytest.mark.parametrize("width", [64, 128])
def test_every_layer_begins_by_keeping_the_variance(width):
    model = models.MaskGIT(width=width, mlp=4 * width)
    matrices = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and name != "bias"]
    # the table, two layers at the beginning, four in each of four blocks, one at the end
    assert len(matrices) == 1 + 2 + 4 * 4 + 1
    for name, p in matrices:
        std = 0.02 if name == "tok_emb.weight" else p.shape[1] ** -0.5
        assert p.std().item() == pytest.approx(std, rel=0.05), name


@pytest.mark.parametrize("name", ["sampler_trace", "sampler_trace_hot"])
def test_sampler_repeats_the_official_trace(name, monkeypatch):
    """Step by step: the network's input and the guided logits; and the codes in the end. Official w
    is our s - 1, sm_temp multiplies."""
    case, model = load_case_maskgit(name)
    x, config = tensors(case), case.info["config"]
    B, steps = len(x["labels"]), config["step"]
    seen, guided_logits = [], fpd.guided_logits

    def spy(model, z, c, s):
        seen.append((z.clone(), guided_logits(model, z, c, s)))
        return seen[-1][1]
    monkeypatch.setattr(fpd, "guided_logits", spy)
    # the official draws, which were made over K + 1 columns
    model.forward = partial(model.forward, mask_column=True)
    recorded_tokens, recorded_gumbel = iter(x["sampled_tokens"]), iter(x["gumbel"])
    monkeypatch.setattr(fpd, "draw", lambda *_: next(recorded_tokens))
    monkeypatch.setattr(fpd, "gumbel", lambda *_: next(recorded_gumbel))
    codes = fpd.sample(model, x["labels"], steps, None, s=1 + config["w"],
                       temperature=1 / config["sm_temp"], noise=config["r_temp"],
                       schedule=config["sched_mode"]).clamp(max=model.K - 1)
    before = torch.stack([z for z, _ in seen])
    case.check("codes_before", before.view(steps, B, 4, 4).to(torch.int16))
    case.check("guided_logits", torch.stack([logits for _, logits in seen]), atol=5e-5)
    case.check("final_codes", codes.view(B, 4, 4).to(torch.int16))
    assert fpd.reveal_counts(16, steps) == case.info["token_counts"]


@pytest.mark.parametrize("key", SCHEDULES["adap_sche"])
def test_reveal_counts_equal_the_official_schedule(key):
    official = SCHEDULES["adap_sche"][key]
    side, mode, steps = key.split("/")
    L, steps = int(side) ** 2, int(steps)
    if steps > L:
        with pytest.raises(ValueError, match=f"between 1 and the {L} tokens"):
            fpd.reveal_counts(L, steps, mode)
        return
    counts = fpd.reveal_counts(L, steps, mode)
    assert len(counts) == steps and sum(counts) == L and min(counts) >= 0
    if steps == 1:
        # the official table has NaN there
        assert counts == [L]
    elif official[-1] >= 0:
        assert counts == official
    else:
        # the table overshoots; the sampler fixes what there is and stops
        left = L
        for ours, theirs in zip(counts, official, strict=True):
            assert ours == max(0, min(theirs, left))
            left -= ours


def test_sampler_with_as_many_steps_as_tokens():
    """The last steps have nothing to fix; no token may change any more."""
    _, model = load_case_maskgit("tiny")
    generator = torch.Generator().manual_seed(0)
    z = fpd.sample(model, torch.arange(3), 16, generator, s=2.0, schedule="linear")
    assert z.shape == (3, 16) and z.min() >= 0 and z.max() < model.K


@pytest.mark.parametrize("case", SCHEDULES["get_mask_code"]["cases"], ids=lambda case: case["mode"])
def test_training_mask_equals_the_official_one(case):
    """Ratios and counts. The official code draws the share itself in its modes linear and square,
    so that ours run backwards there."""
    r, L = torch.tensor(case["r"]), 256
    t = {"arccos": r, "cosine": r, "linear": 1 - r, "square": (1 - r.square()).sqrt()}[case["mode"]]
    ratio = fpd.mask_ratio(t, case["mode"])
    np.testing.assert_allclose(ratio, case["val_to_mask"], atol=1e-6)
    z, generator = torch.zeros(len(r), L, dtype=torch.long), torch.Generator().manual_seed(0)
    _, is_masked = fpd.remask(z, ratio, 1024, generator)
    assert is_masked.sum(1).tolist() == case["num_masked"]


# ---------------------------------------------------------------- VQGAN
@pytest.mark.parametrize("name", ["tiny", pytest.param("full_f16_1024", marks=pytest.mark.slow)])
@torch.no_grad()
def test_vqgan_equals_the_official_network(name):
    """Tolerance 5e-5: a wrong epsilon in the group norms changes the image by 2e-4. Every nearest
    code must be the same."""
    case = load_case("taming_vqgan", name)
    config, x = case.info["config"], tensors(case)
    size = config["ddconfig"]["resolution"]
    model = tokenizer.load_vqgan(case.weights(), image_size=size)
    assert (model.K, model.L) == (config["n_embed"], x["codes"][0].numel())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    z_shape = case.info["outputs"]["z"]["shape"]
    e = model.embed(x["image"].float())                                # (B, L, d)
    case.check("z", e.transpose(1, 2).reshape(z_shape), atol=5e-5)
    z = model.nearest(e)
    case.check("indices", z.view(case.info["outputs"]["indices"]["shape"]).to(torch.int16))
    both = model.decode(model.E[torch.cat([x["codes"].flatten(1), z])])
    decoded, reconstruction = both.split([len(x["codes"]), len(z)])
    case.check("decoded", decoded, atol=5e-5)
    case.check("reconstruction", reconstruction, atol=5e-5)


# ---------------------------------------------------------------- the backbone Phi
@pytest.mark.parametrize("name", [TINY_BACKBONE, "test_vit", "vit_base_patch16_dinov3.lvd1689m"])
def test_backbone_maps_are_raw_block_outputs(name):
    """Computed once more from a plain forward pass: four blocks, special tokens dropped, no final
    norm; gradients reach the images."""
    blocks, size = (0, 2, 3, 5) if name == "test_vit" else (2, 5, 8, 11), 64
    backbone = models.Backbone(name, blocks, size).eval()
    generator = torch.Generator().manual_seed(0)
    images = (2 * torch.rand(1, 3, size, size, generator=generator) - 1).requires_grad_()
    maps, outputs = backbone.maps(images), []
    side = size // 16
    assert [tuple(m.shape) for m in maps] == [(1, backbone.net.embed_dim, side, side)] * 4
    for i in blocks:
        backbone.net.blocks[i].register_forward_hook(lambda block, x, y: outputs.append(y))
    config = backbone.net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        backbone.net((images * 0.5 + 0.5 - mean) / std)
    for m, y in zip(maps, outputs, strict=True):
        patches = y[:, backbone.net.num_prefix_tokens:]
        torch.testing.assert_close(m.flatten(2).transpose(1, 2), patches, atol=1e-5, rtol=1e-5)
    sum(m.square().mean() for m in maps).backward()
    assert images.grad.abs().sum() > 0


@torch.no_grad()
def test_dinov3s_rotations_are_made_once_and_are_those_of_every_pass(monkeypatch):
    backbone = models.Backbone(TINY_BACKBONE, image_size=64).eval()
    every_pass = models.import_timm().create_model(TINY_BACKBONE, num_classes=0).eval()
    every_pass.load_state_dict(backbone.net.state_dict())
    rope, made = type(backbone.net.rope), []
    create = rope._create_embed
    monkeypatch.setattr(rope, "_create_embed", lambda *args: made.append(1) or create(*args))
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    maps = backbone.maps(images)
    assert not made
    backbone.net = every_pass
    for m, expected in zip(maps, backbone.maps(images), strict=True):
        assert torch.equal(m, expected)
    assert made


@pytest.mark.parametrize("arguments, words", [
    (("resnet18",), "'resnet18' is not a vision transformer"),
    (("no_such_network",), "no_such_network"),
    ((TINY_BACKBONE, (2, 12)), "blocks 0 to 11"),
    ((TINY_BACKBONE, (5, 2)), "rising"),
    ((TINY_BACKBONE, (2, 5), 250), "16-pixel patches")])
def test_backbone_names_what_is_wrong(arguments, words):
    with pytest.raises(ValueError, match=words):
        models.Backbone(*arguments)


# ---------------------------------------------------------------- reading files
def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)


def test_official_files_load(files):
    """As they are shipped: a .pth with an optimizer, a Lightning checkpoint of classes that do not
    exist here, a .safetensors file."""
    maskgit = models.load_maskgit(files["maskgit"], heads=4, num_classes=10)
    vqgan = tokenizer.load_vqgan(files["vqgan"], image_size=32)
    backbone = models.load_backbone(TINY_BACKBONE, files["backbone"], image_size=64)
    assert (maskgit.K, maskgit.L, vqgan.K, vqgan.L) == (32, 16, 48, 256)
    for key, value in load_case("taming_vqgan", "tiny").weights().items():
        assert torch.equal(vqgan.state_dict()[key], value)
    for module in (vqgan, backbone):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert backbone.maps(torch.zeros(1, 3, 64, 64))[0].shape == (1, 192, 4, 4)


def test_maskgit_prefix_and_bare_state_dict(tmp_path):
    """A Di[M]O generator is a bare state dict; DistributedDataParallel puts "module." before the
    keys."""
    state = load_case("maskgit_transformer", "tiny").weights()
    torch.save(state, tmp_path / "pytorch_model.bin")
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model_state_dict": parallel}, tmp_path / "parallel.pth")
    for file in ("pytorch_model.bin", "parallel.pth"):
        model = models.load_maskgit(tmp_path / file, heads=4, num_classes=10)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_maskgit_heads_and_classes_are_checked():
    # 44 rows: 32 codes, mask, 10 classes, null class
    state = load_case("maskgit_transformer", "tiny").weights()
    for heads, classes, words in ((5, 10, "5 heads do not divide the width 64.* 16"),
                                  (0, 10, "0 heads"), (4, 42, "44 rows")):
        with pytest.raises(ValueError, match=words) as error:
            models.load_maskgit(state, heads, classes)
        one_line(error)
    # as training leaves it
    state["bias"][:, 33:] = 0
    assert models.load_maskgit(state, 4, 10).K == 32
    with pytest.raises(ValueError, match="10 classes, by its bias, instead of 12"):
        models.load_maskgit(state, 4, 12)
    # never trained: nothing to be seen
    state["bias"].zero_()
    assert models.load_maskgit(state, 4, 12).K == 30


LOADERS = {"maskgit": lambda src: models.load_maskgit(src, heads=4, num_classes=10),
           "vqgan": lambda src: tokenizer.load_vqgan(src, 32),
           "backbone": lambda src: models.load_backbone(TINY_BACKBONE, src)}


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("fault, words", [
    ("missing", "no such file"), ("folder", "is a folder"), ("empty", "cannot be read as weights"),
    ("text", "cannot be read as weights"), ("cut", "cannot be read as weights"),
    ("nearly whole", "cannot be read as weights")])
def test_unreadable_files(files, tmp_path, part, fault, words):
    path, data = tmp_path / files[part].name, files[part].read_bytes()
    if fault == "folder":
        path.mkdir()
    elif fault != "missing":
        contents = {"empty": b"", "text": b"version https://git-lfs.github.com/spec/v1\n",
                    "cut": data[:len(data) // 2], "nearly whole": data[:-30]}
        path.write_bytes(contents[fault])
    with pytest.raises(ValueError, match=words) as error:
        LOADERS[part](path)
    assert path.name in str(error.value)
    one_line(error)


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("fault, words", [
    ("missing key", "is missing"), ("unknown key", r"surprise is unknown$"),
    ("shape", r"has shape \(.*\) instead of \(.*\)$"), ("nan", "not finite"), ("inf", "not finite"),
    ("not a tensor", "of type str, where only tensors"), ("nothing", "no state dict: it is empty"),
    ("another network", r"is (missing|unknown)")])
def test_wrong_weights(files, part, fault, words):
    state = tokenizer.read_weights(files[part], part)
    own = {"maskgit": "first_layer.2.weight", "vqgan": "decoder.mid.block_1.conv1.weight",
           "backbone": "blocks.3.attn.proj.weight"}[part]
    if fault == "missing key":
        del state[own]
    elif fault == "unknown key":
        state["surprise"] = torch.zeros(1)
    elif fault == "shape":
        state[own] = state[own][:5]
    elif fault in ("nan", "inf"):
        state[own] = state[own].clone()
        state[own].view(-1)[3] = float(fault)
    elif fault == "not a tensor":
        state[own] = "a string"
    elif fault == "nothing":
        state = {}
    else:
        state = golden_fill({"conv.weight": [3, 3, 3, 3], "conv.bias": [3]})
    with pytest.raises(ValueError, match=words) as error:
        LOADERS[part](state)
    one_line(error)


def test_the_number_of_faults_is_told():
    state = load_case("maskgit_transformer", "tiny").weights()
    for key in ("first_layer.2.bias", "last_layer.0.bias", "last_layer.2.bias"):
        del state[key]
    words = r"key first_layer.2.bias is missing \(the first of 3 faults\)"
    with pytest.raises(ValueError, match=words):
        models.load_maskgit(state, 4, 10)


class Malicious:
    """Unpickling it normally runs a command that creates a file."""
    def __init__(self, marker):
        self.command = f"echo ran > '{marker}'"

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_file_is_harmless(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "last.ckpt"
    pickle.loads(pickle.dumps(Malicious(marker)))
    # the danger is real
    assert marker.exists()
    marker.unlink()

    torch.save(Malicious(marker), path)
    with pytest.raises(ValueError, match=r"no state dict: it is of type \w+\.system") as error:
        tokenizer.load_vqgan(path)
    one_line(error)
    torch.save({"state_dict": Malicious(marker)}, path)
    with pytest.raises(ValueError, match=r"no state dict.*'state_dict', of type \w+\.system"):
        tokenizer.load_vqgan(path)
    # torch's old format; no torch file at all
    torch.save({"state_dict": Malicious(marker)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="cannot be read as weights"):
        tokenizer.load_vqgan(path)
    path.write_bytes(pickle.dumps(Malicious(marker), 2))
    with pytest.raises(ValueError, match="cannot be read as weights"):
        tokenizer.load_vqgan(path)
    # beside honest weights it stays inert: the weights are all that is taken
    state = load_case("taming_vqgan", "tiny").weights()
    torch.save({"callbacks": Malicious(marker), "state_dict": state}, path)
    assert torch.equal(tokenizer.load_vqgan(path, 32).E, state["quantize.embedding.weight"])
    assert not marker.exists()


def test_a_damaged_file_takes_no_memory(tmp_path):
    """A pickle says at which place of a list an object is kept: here far behind the end. The
    unpickler in C would make the list as long."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with zipfile.ZipFile(tmp_path / "last.ckpt", "w") as file:
        file.writestr("x/version", "3\n")
        place = (2 ** 27).to_bytes(4, "little")
        file.writestr("x/data.pkl", b"\x80\x02cgone\nThing\nr" + place + b".")
    with pytest.raises(ValueError, match="no state dict"):
        tokenizer.load_vqgan(tmp_path / "last.ckpt")
    # KiB; a list of 2^28 places would take 2 GiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 20


def test_inert_reader_returns_the_same_tensors(tmp_path):
    """All kinds of numbers, views of one storage, empty and 0-dim tensors, parameters."""
    base = torch.arange(24.).view(4, 6)
    state = {"base": base, "view": base[1:, ::2], "half": base.half(), "bfloat16": base.bfloat16(),
             "long": torch.tensor(7), "empty": base[:0], "bool": base > 3,
             "parameter": torch.nn.Parameter(base.double())}
    torch.save({"state_dict": state, "other": types.SimpleNamespace(a=1)}, tmp_path / "x.ckpt")
    found = tokenizer.read_weights(tmp_path / "x.ckpt", "x")
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key


# ---------------------------------------------------------------- where files are looked for
def test_find_weights_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    question = ("last.ckpt", "llvictorll/Maskgit-pytorch", "pretrained_maskgit/VQGAN/last.ckpt")
    words = ("no weights for vqgan.*"
             "pretrained_maskgit/VQGAN/last.ckpt of repository llvictorll/Maskgit-pytorch.*"
             "weights.last.ckpt.*--weights")
    # offline, see conftest
    with pytest.raises(ValueError, match=words) as error:
        models.find_weights("vqgan", "weights", *question)
    one_line(error)
    # nor a traceback of the hub's
    assert error.value.__suppress_context__
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "last.ckpt").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "last.ckpt").touch()
    assert models.find_weights("vqgan", "weights", *question) == Path("weights/last.ckpt")
    assert models.find_weights("vqgan", "mine", *question) == Path("mine/last.ckpt")
    with pytest.raises(ValueError, match="no weights for vqgan.*other.last.ckpt"):
        models.find_weights("vqgan", "other", *question)


def test_the_hub_is_asked_last(tmp_path, monkeypatch):
    """Its cache, then a question that fails fast when offline, then the download."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def question(url, timeout):
        calls.append(url)

    def download(repo, filename):
        calls.append((repo, filename))
        return "downloaded"
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", question)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    asked = ("vqgan", "weights", "last.ckpt", "some/repo", "a/last.ckpt")
    assert models.find_weights(*asked) == Path("downloaded")
    assert calls[0].endswith("/some/repo/resolve/main/a/last.ckpt")
    assert calls[1:] == [("some/repo", "a/last.ckpt")]
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda repo, filename: "cached")
    assert models.find_weights(*asked) == Path("cached") and len(calls) == 2


def test_backbone_is_found_in_weights(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = (f"model.safetensors of .* timm/{TINY_BACKBONE}.*"
             f"weights.{TINY_BACKBONE}.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        models.find_backbone(TINY_BACKBONE, "weights")
    one_line(error)
    (tmp_path / "weights").symlink_to(files["backbone"].parent)
    found = models.find_backbone(TINY_BACKBONE, "weights")
    backbone = models.load_backbone(TINY_BACKBONE, found, image_size=32)
    assert math.isfinite(backbone.maps(torch.zeros(1, 3, 32, 32))[-1].sum())
