"""TA-TiTok: equal to recorded outputs of the official code (golden/), the border to our own
conventions, and what a wrong file says."""
import zipfile

import numpy as np
import pytest
import torch
from conftest import load_case
from safetensors.torch import save_file

import tokenizer
from tokenizer import TATiTok, load_tatitok


def load_case_tatitok(name):
    """-> case, its network, its inputs as tensors; the image taken from the official [0, 1] to our
    [-1, 1]."""
    case = load_case("tatitok_vq", name)
    config = case.info["config"]
    sizes, vq_model = config["model_sizes"].values(), config["model"]["vq_model"]
    head_width, = {size["width"] // size["heads"] for size in sizes}
    image_size = config["dataset"]["preprocessing"]["crop_size"]
    model = load_tatitok(case.weights(), image_size, head_width, vq_model["use_l2_norm"])
    assert (model.K, model.L) == (vq_model["codebook_size"], vq_model["num_latent_tokens"])
    x = {}
    for key, value in case.inputs.items():
        x[key] = torch.from_numpy(value.astype(np.int64) if value.dtype.kind in "iu" else value)
    return case, model, x["image"] * 2 - 1, x["tokens"], x["text_guidance"]


@pytest.fixture(scope="module")
def tiny():
    return load_case_tatitok("tiny")


# -------------------------------------------------------------------- the official network
@pytest.mark.parametrize("name", [
    "tiny", "tiny_l2norm", pytest.param("full_bl128", marks=pytest.mark.slow)])
@torch.no_grad()
def test_tatitok_equals_the_official_network(name):
    """Tolerance 5e-5, in the official [0, 1]: a wrong LayerNorm epsilon or GELU changes the image
    by 7e-4 or more, float32 against
    float64 by 5e-6. Every nearest code must be the same."""
    case, model, images, tokens, text = load_case_tatitok(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    e = model.embed(images)                                            # (B, L, d)
    case.check("z", e.transpose(1, 2).unsqueeze(2), atol=5e-5)
    z = model.encode(images)
    assert torch.equal(z, model.nearest(e))
    case.check("indices", z.unsqueeze(1).to(torch.int16))
    case.check("decoded", (model.decode(model.E[tokens], text) + 1) / 2, atol=5e-5)


# -------------------------------------------------------------------- the interface
@torch.no_grad()
def test_only_the_last_rows_of_the_condition_are_read(tiny):
    """MaskGen's states come before the decoder's text, all in one tensor."""
    _, model, _, tokens, text = tiny
    y = model.decode(model.E[tokens], text)
    longer = torch.cat([torch.randn(3, 8, 20), text], 1)
    assert torch.equal(model.decode(model.E[tokens], longer), y)
    # and in their order
    rolled = model.decode(model.E[tokens], text.roll(1, 1))
    assert (rolled - y).abs().amax((1, 2, 3)).min() > 0.01


@pytest.mark.parametrize("name", ["tiny", "tiny_l2norm"])
def test_straight_through_embeddings_enter_the_decoder(name):
    """What the student hands over (Eq. 8) has the value of E[z] and decodes to the same image; the
    gradient reaches every token."""
    _, model, _, tokens, text = load_case_tatitok(name)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*tokens.shape, model.K, generator=generator, requires_grad=True)
    e_soft = logits.softmax(-1) @ model.E
    e = model.E[tokens] + (e_soft - e_soft.detach())
    y = model.decode(e, text)
    assert torch.equal(e, model.E[tokens])
    # without gradient, torch has a fused attention
    torch.testing.assert_close(y, model.decode(model.E[tokens], text), atol=2e-5, rtol=0)
    y.square().mean().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().amax(-1).min() > 0
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["tiny", "tiny_l2norm"])
def test_a_code_is_its_own_nearest_code(name):
    _, model, *_ = load_case_tatitok(name)
    z = torch.arange(model.K)
    assert torch.equal(model.nearest(model.E), z)
    assert torch.equal(model.nearest(3 * model.E), z) == model.l2norm


def test_images_are_not_clamped(tiny):
    _, model, _, tokens, text = tiny
    y = model.decode(model.E[tokens], text)
    assert y.min() < -1.1 and y.max() > 1.1


def test_random_weights():
    """As --smoke builds it, at other sizes than any file's: images become tokens, tokens images,
    and all weights learn."""
    torch.manual_seed(0)
    model = TATiTok(K=30, d=4, L=9, width=(32, 48), depth=(1, 2), patch=4, text=(5, 12),
                    image_size=16, head_width=16)
    images, text = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 5, 12)
    z = model.encode(images)
    assert z.shape == (2, 9) and z.dtype == torch.long and z.min() >= 0 and z.max() < 30
    assert model.E.shape == (30, 4)
    y = model.decode(model.E[z] + model.embed(images), text)
    assert y.shape == images.shape
    y.square().mean().backward()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_both_tokenizers_are_called_alike(tiny):
    vq = tokenizer.VQGAN(K=5, d=4, ch=4, ch_mult=(1,), z_channels=4, image_size=8)
    e = vq.E[torch.zeros(2, 64, dtype=torch.long)]
    assert torch.equal(vq.decode(e, torch.tensor([3, 4])), vq.decode(e))
    for name in ("E", "K", "L", "image_size", "encode", "decode", "embed", "nearest"):
        assert hasattr(tiny[1], name), name


@pytest.mark.parametrize("shape", [(3, 6, 20), (3, 7, 21), (2, 7, 20), (3,), None])
def test_wrong_conditions(tiny, shape):
    _, model, _, tokens, _ = tiny
    got = "no text" if shape is None else "a text"
    with pytest.raises(ValueError, match="6 tokens with a text of 7 rows or more, of width 20, "
                                         f"got .*{got}"):
        model.decode(model.E[tokens], None if shape is None else torch.zeros(shape))


def test_wrong_image_and_token_sizes(tiny):
    _, model, _, tokens, text = tiny
    with pytest.raises(ValueError, match=r"32 x 32 pixels, got \(64, 32\)"):
        model.encode(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match=r"decodes 6 tokens .* got tokens of shape \(3, 5, 12\)"):
        model.decode(model.E[tokens[:, :5]], text)


# -------------------------------------------------------------------- reading files
def test_both_kinds_of_file_load(tiny, tmp_path):
    state = tiny[0].weights()
    save_file(state, tmp_path / "model.safetensors")
    torch.save(state, tmp_path / "tatitok_bl128_vq.bin")
    for file in ("model.safetensors", "tatitok_bl128_vq.bin"):
        model = load_tatitok(tmp_path / file, 32, head_width=16)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options, words", [
    (dict(image_size=64), "16 patches of 8 x 8 pixels, not of 64 x 64"),
    (dict(image_size=31), "not of 31 x 31"),
    (dict(head_width=64), r"widths \[64, 96\] should be multiples of 64")])
def test_sizes_that_do_not_fit_the_file(tiny, options, words):
    with pytest.raises(ValueError, match=words) as error:
        load_tatitok(tiny[0].weights(), **(dict(image_size=32, head_width=16) | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault, words", [
    ("missing file", "no such file"), ("cut", "cannot be read as weights"),
    ("missing key", "decoder.mask_token is missing$"),
    ("unknown key", "surprise is unknown$"),
    ("shape", r"decoder.ffn.0.weight has shape \(190, 96, 1, 1\) instead of \(192, 96, 1, 1\)$"),
    ("nan", "decoder.ln_pre.bias has values that are not finite"), ("empty", "it is empty"),
    ("VQGAN", "key latent_tokens is missing"),
    ("no patch", "16 patches of 0 x 0 pixels"), ("no width", r"widths \[0, 96\]"),
    ("dimensions", "latent_tokens has shape .* 2 dimensions")])
def test_wrong_files(tiny, tmp_path, fault, words):
    state = tiny[0].weights()
    src = tmp_path / "model.safetensors"
    if fault == "cut":
        save_file(state, src)
        src.write_bytes(src.read_bytes()[:-30])
    elif fault != "missing file":
        src = {"VQGAN": load_case("taming_vqgan", "tiny").weights(), "empty": {}}.get(fault, state)
    if fault == "missing key":
        del state["decoder.mask_token"]
    changes = {"unknown key": {"surprise": torch.zeros(1)},
               "shape": {"decoder.ffn.0.weight": torch.zeros(190, 96, 1, 1)},
               "nan": {"decoder.ln_pre.bias": torch.full((96,), float("nan"))},
               "no patch": {"encoder.patch_embed.weight": torch.zeros(64, 3, 0, 0)},
               "no width": {"encoder.class_embedding": torch.zeros(1, 0)},
               "dimensions": {"latent_tokens": torch.zeros(6)}}
    state |= changes.get(fault, {})
    with pytest.raises(ValueError, match=words) as error:
        load_tatitok(src, 32, head_width=16)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500, str(error.value)


def read_error(src):
    """What the reader of weights says, in one line, of a file or state dict that it refuses."""
    with pytest.raises(ValueError) as error:
        tokenizer.read_weights(src, "the net")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


FOREIGN = {
    "pointer.bin": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git LFS"),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "pointer of git LFS"),
    "page.safetensors": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    "page.pth": (b"<html><head>404</head></html>", "a web page"),
    "model.safetensors.index.json": (b'{"metadata": {"total_size": 1}}', "JSON text"),
    "model.pt.gz": (b"\x1f\x8b\x08\x00 and so on, and on", "packed by gzip"),
    "model.h5": (b"\x89HDF\r\n\x1a\n and so on, and on", "HDF5"),
    "words.pt": (b"Entry not found", "neither a safetensors nor a torch file")}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_something_else_are_called_by_their_name(name, tmp_path):
    content, words = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    assert f"{name} cannot be read as weights: it is " in read_error(tmp_path / name)
    assert words in read_error(tmp_path / name)


def test_wrong_suffixes(tmp_path):
    """The content tells what a file is; a torch file with the other suffix is said to be one."""
    state = {"a.weight": torch.randn(3, 4)}
    save_file(state, tmp_path / "model.pt")
    found = tokenizer.read_weights(tmp_path / "model.pt", "the net")
    assert found.keys() == state.keys() and torch.equal(found["a.weight"], state["a.weight"])
    for is_new in (True, False):
        torch.save(state, tmp_path / "model.safetensors", _use_new_zipfile_serialization=is_new)
        assert "it is a torch file; its name should" in read_error(tmp_path / "model.safetensors")


def test_cut_files_and_other_archives(tmp_path):
    state = {"weight": torch.randn(100, 100)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        whole = path.read_bytes()
        for n in (20, len(whole) // 2, len(whole) - 30):
            path.write_bytes(whole[:n])
            assert "it is cut short" in read_error(path), n
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("model.safetensors", whole)
    assert "zip archive, but not one of torch's" in read_error(tmp_path / "b.pt")


FOUR = torch.tensor([[1.0, 0.0], [-2.0, 0.5]])


@pytest.mark.parametrize("kind, convert", {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "other float8": lambda x: x.to(torch.float8_e5m2),
    "quantised": lambda x: torch.quantize_per_tensor(x, 0.5, 0, torch.qint8),
    "sparse": lambda x: x.to_sparse(), "rows": lambda x: x.to_sparse_csr()}.items())
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*quantiz")
def test_tensors_of_rare_kinds_become_ordinary_ones(kind, convert, tmp_path):
    torch.save({"weight": convert(FOUR), "other": FOUR}, tmp_path / "x.pt")
    found = tokenizer.read_weights(tmp_path / "x.pt", "the net")["weight"]
    assert found.dtype == torch.float32 and found.layout == torch.strided
    assert torch.equal(found, FOUR)
    assert torch.equal(tokenizer.load_strictly(linear(), {"weight": found}, "it").weight, FOUR)


@pytest.mark.parametrize("value", [torch.empty(2, 2, device="meta"),
                                   torch.zeros(2, 2, dtype=torch.uint8).view(torch.bits8)])
def test_tensors_without_numbers_are_named(value):
    assert "weight is a tensor of a kind that cannot be read here" in read_error({"weight": value})


def test_not_finite_in_eight_bits():
    value = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    assert "weight has values that are not finite" in read_error({"weight": value})


def linear():
    return torch.nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_codes_of_a_quantised_network_do_not_pass_for_weights(dtype):
    state = tokenizer.read_weights({"weight": torch.ones(2, 2, dtype=dtype)}, "the net")
    with pytest.raises(ValueError, match=f"weight has numbers of type {dtype} instead of floats"):
        tokenizer.load_strictly(linear(), state, "the net")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.",
                                    "_orig_mod.module.", "module.module."])
def test_what_wrappers_put_before_every_key_is_taken_off(tiny, prefix):
    state = tiny[0].weights()
    wrapped = {prefix + key: value for key, value in state.items()}
    for src in (wrapped, {"state_dict": wrapped}):
        model = load_tatitok(src, 32, head_width=16)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    # only where it is before every key
    mixed = {"module.a": FOUR, "b": FOUR}
    assert tokenizer.read_weights(mixed, "the net").keys() == mixed.keys()


def test_another_prefix_is_named(tiny):
    state = {f"model.net.{key}": value for key, value in tiny[0].weights().items()}
    with pytest.raises(ValueError, match="weight is missing.*; all of .* begin with 'model.net.'"):
        load_tatitok(state, 32, head_width=16)
    with pytest.raises(ValueError, match="weight is missing; all .* with 'model.' .the first of 2"):
        tokenizer.load_strictly(linear(), {"model.weight": FOUR}, "the net")
    # the prefix of the network's own keys is none
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="key 0.bias is missing$"):
        tokenizer.load_strictly(net, {"0.weight": FOUR}, "the net")
