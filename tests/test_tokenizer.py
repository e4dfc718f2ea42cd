"""tokenizer.py: the shapes world, image files, VQGAN's conventions, and files of weights."""
import os
import pickle
import types

import numpy as np
import pytest
import torch
from conftest import load_case
from PIL import Image
from torch import nn

from tokenizer import (VQGAN, load_vqgan, read_captions, read_image, read_weights,
                       shapes, shapes_names, to_float, to_uint8, world)

NAMES = shapes_names()


# -------------------------------------------------------------------- the shapes world
def weights(images):
    """How much each pixel differs from the background, that of the corner. -> (N, H, W)"""
    x = to_float(images)
    return (x - x[:, :, :1, :1]).abs().sum(1)


def test_objects_are_within_three_pixels_of_the_centre_on_a_grey_background_that_varies():
    """Centres of mass, per axis; 0.05 px for rounding to pixels."""
    images = shapes(torch.arange(2400) % 24, 0)
    assert len(images.flatten(1).unique(dim=0)) == 2400
    w, axis = weights(images), torch.arange(32) - 15.5
    centres = torch.stack([w.sum(1) @ axis, w.sum(2) @ axis]) / w.sum((1, 2))     # (2, N) x, y
    assert 2.8 < centres.abs().max() < 3.05 and centres.mean(1).abs().max() < 0.15
    corners = images[:, :, ::31, ::31].flatten(2).int()                           # (N, 3, 4)
    assert (corners == corners[:, :1, :1]).all()
    assert corners.max() - corners.min() > 100 and corners.unique().numel() > 10


@pytest.mark.parametrize("dataset, recorded", [
    ("shapes", [118.0158, 120.3392, 123.775, 118.1074]),
    ("scenes", [45.0389, 45.3274, 44.6601, 45.0598])])
def test_every_split_of_a_world_is_drawn_once_and_for_all(dataset, recorded):
    """480 images with --smoke; their mean, recorded, tells if other numbers are drawn."""
    cfg = types.SimpleNamespace(dataset=dataset, smoke=True)
    splits = [world(cfg, split) for split in ("train", "phi", "judge", "test")]
    assert all(len(images) == len(conditions) == 480 for images, conditions, _ in splits)
    means = [images.double().mean().item() for images, _, _ in splits]
    assert means == pytest.approx(recorded, abs=1e-3)
    for _, conditions, names in splits:
        if dataset == "shapes":
            assert names == NAMES and conditions.tolist() == [i % 24 for i in range(480)]
        else:
            assert names == splits[3][1][:12]


# -------------------------------------------------------------------- numbers, captions
def test_all_256_values_survive_the_way_to_float_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert to_float(x).min() == -1 and to_float(x).max() == 1
    assert torch.equal(to_uint8(to_float(x)), x)
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 1.0]).bfloat16()).tolist() == [0, 255]


def test_a_caption_ends_at_line_ends_only(tmp_path):
    """Captions from the web hold Unicode's line separators."""
    (tmp_path / "captions.txt").write_bytes("\ufeffa dog\r\n\n a\u2028cat \n\x0bé\n".encode())
    assert read_captions(tmp_path / "captions.txt") == ["a dog", "a\u2028cat", "é"]


# -------------------------------------------------------------------- image files
@pytest.mark.parametrize("mode, transparency", [
    ("RGBA", None), ("LA", None), ("L", 0), ("RGB", (0, 0, 0)), ("P", 0),
    ("P", bytes([0] + 255 * [255]))])
def test_what_is_transparent_is_white_not_the_hidden_colour(mode, transparency, tmp_path):
    """Alpha channel, palette with transparency, PNG's tRNS: all lie on a white background."""
    image = Image.fromarray(np.array([[0, 200]], np.uint8)).convert(mode)
    if transparency is None:
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        image.save(tmp_path / "image.png")
    else:
        image.save(tmp_path / "image.png", transparency=transparency)
    assert read_image(tmp_path / "image.png")[:, 0].tolist() == 3 * [[255, 200]]
    # What is half transparent is half white.
    Image.new("RGBA", (8, 8), (10, 20, 30, 128)).save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png")[:, 4, 4].tolist() == [132, 137, 142]


@pytest.mark.parametrize("number, suffix", [
    (np.uint16, "png"), (np.uint16, "tif"), (np.float32, "tif"), (np.int32, "tif")])
def test_more_than_8_bits_are_refused_rather_than_clipped(number, suffix, tmp_path):
    Image.fromarray(np.array([[0, 1, 255]], number)).save(tmp_path / f"image.{suffix}")
    with pytest.raises(ValueError, match=f"image.{suffix} cannot .*more than 8 bits"):
        read_image(tmp_path / f"image.{suffix}")


def test_exif_turns_are_applied(tmp_path):
    """Orientation 6, a phone held upright: stored with its left half red, to be shown with the red
    half on top."""
    stored = Image.new("RGB", (32, 32), "blue")
    stored.paste("red", (0, 0, 16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "image.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "image.jpg", 32).int()
    assert (image[0, :12] > 200).all() and (image[2, :12] < 60).all()
    assert (image[0, 20:] < 60).all() and (image[2, 20:] > 200).all()


def test_the_centre_square_is_kept(tmp_path):
    image = Image.new("RGB", (96, 32), "red")
    image.paste("lime", (32, 0, 64, 32))
    image.save(tmp_path / "image.png")
    square = read_image(tmp_path / "image.png", 8)
    assert square.shape == (3, 8, 8)
    assert square[:, [4, 1, 6], [4, 1, 6]].T.tolist() == 3 * [[0, 255, 0]]


# -------------------------------------------------------------------- VQGAN
def test_nearest_is_the_code_with_the_smallest_distance():
    torch.manual_seed(0)
    vq = VQGAN(K=128, d=16)
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(5, 64, 16, generator=generator) * 16 ** -0.5
    distance = torch.cdist(e.double().flatten(0, 1), vq.E.double(),
                           compute_mode="donot_use_mm_for_euclid_dist")
    brute_force = distance.argmin(1)
    assert torch.equal(vq.nearest(e), brute_force.view(5, 64))
    assert brute_force.unique().numel() > 30
    assert torch.equal(vq.nearest(vq.E), torch.arange(128))
    # The codebook is not a copy: training moves it.
    assert vq.E is vq.quantize.embedding.weight


def test_with_l2norm_embeddings_and_codes_have_length_1():
    torch.manual_seed(0)
    net = VQGAN(K=10, d=6, ch=4, ch_mult=(1, 2), z_channels=8, image_size=16, l2norm=True).eval()
    x = 2 * torch.rand(3, 3, 16, 16) - 1
    e = net.embed(x)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(3, 64))
    torch.testing.assert_close(net.E.norm(dim=-1), torch.ones(10))
    # The nearest code is the one with the smallest angle.
    assert torch.equal(net.encode(x), (e @ net.E.T).argmax(-1))


def test_tokens_are_in_raster_order():
    """With convolutions that pass everything on, token 8 i + j is the pixel in row i, column j, on
    the way in and out."""
    net = VQGAN(d=3, z_channels=3, ch=4, ch_mult=(1,), image_size=8)
    net.encoder = net.decoder = net.quant_conv = net.post_quant_conv = nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    e = net.embed(x)
    assert torch.equal(e[1, 8 * 5 + 2], x[1, :, 5, 2])
    assert torch.equal(net.decode(e), x)


# -------------------------------------------------------------------- files of weights
TINY_VQGAN = dict(K=48, d=16, ch=32, ch_mult=(1, 2), blocks=1, attn_levels=(1,), z_channels=32,
                  image_size=32)


@pytest.fixture(scope="module")
def state():
    return load_case("taming_vqgan", "tiny").weights()


class Malicious:
    """Unpickling it normally runs a command that creates a file."""
    def __init__(self, marker):
        self.command = f"echo ran > '{marker}'"

    def __reduce__(self):
        return os.system, (self.command,)


def test_nothing_in_a_file_is_ever_run(state, tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "last.ckpt"
    pickle.loads(pickle.dumps(Malicious(marker)))
    # The danger is real.
    assert marker.exists()
    marker.unlink()
    for content in (Malicious(marker), {"state_dict": Malicious(marker)},
                    {"state_dict": state | {"quant_conv.bias": Malicious(marker)}}):
        # torch's format and its old one
        for is_zip in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=is_zip)
            with pytest.raises((AttributeError, RuntimeError, TypeError)):
                load_vqgan(path, **TINY_VQGAN)
    path.write_bytes(pickle.dumps(Malicious(marker), 2))
    with pytest.raises(RuntimeError):
        load_vqgan(path, **TINY_VQGAN)
    # Beside honest weights it stays inert. Those of the loss are left out, and no random number is
    # drawn.
    torch.save({"callbacks": Malicious(marker),
                "state_dict": state | {"loss.weight": torch.ones(1)}}, path)
    before = torch.get_rng_state()
    net = load_vqgan(path, **TINY_VQGAN)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), before) and not marker.exists()


def test_inert_reader_returns_the_same_tensors(tmp_path):
    """All kinds of numbers, views of one storage, empty and 0-dim tensors, parameters."""
    base = torch.arange(24.).view(4, 6)
    state = {"base": base, "view": base[1:, ::2], "half": base.half(), "bfloat16": base.bfloat16(),
             "long": torch.tensor(7), "empty": base[:0], "bool": base > 3,
             "parameter": nn.Parameter(base.double())}
    torch.save({"state_dict": state, "other": types.SimpleNamespace(a=1)}, tmp_path / "x.ckpt")
    found = read_weights(tmp_path / "x.ckpt")
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
