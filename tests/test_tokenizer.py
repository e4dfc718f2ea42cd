"""tokenizer.py: the small worlds, image files, and VQGAN's conventions."""
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tokenizer import (VQGAN, read_captions, read_image, shapes, shapes_names, to_float, to_uint8,
                       world)


# -------------------------------------------------------------------- the shapes world
def weights(images):
    """How much each pixel differs from the background, that of the corner. -> (N, H, W)"""
    x = to_float(images)
    return (x - x[:, :, :1, :1]).abs().sum(1)


def test_objects_are_within_three_pixels_of_the_centre_on_a_grey_background_that_varies():
    """Centres of mass are compared per axis, with 0.05 pixels for rounding."""
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
    """A smoke run has 480 images. Their recorded mean tells whether other numbers are drawn."""
    cfg = types.SimpleNamespace(dataset=dataset, smoke=True)
    splits = [world(cfg, split) for split in ("train", "phi", "judge", "test")]
    assert all(len(images) == len(conditions) == 480 for images, conditions, _ in splits)
    means = [images.double().mean().item() for images, _, _ in splits]
    assert means == pytest.approx(recorded, abs=1e-3)
    for _, conditions, names in splits:
        if dataset == "shapes":
            assert names == shapes_names() and conditions.tolist() == [i % 24 for i in range(480)]
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
    """Captions from the web can contain Unicode's line separators."""
    (tmp_path / "captions.txt").write_bytes("\ufeffa dog\r\n\n a\u2028cat \n\x0bé\n".encode())
    assert read_captions(tmp_path / "captions.txt") == ["a dog", "a\u2028cat", "é"]


# -------------------------------------------------------------------- image files
@pytest.mark.parametrize("mode, transparency", [
    ("RGBA", None), ("LA", None), ("L", 0), ("RGB", (0, 0, 0)), ("P", 0),
    ("P", bytes([0] + 255 * [255]))])
def test_what_is_transparent_is_white_not_the_hidden_colour(mode, transparency, tmp_path):
    """An alpha channel, a palette with transparency and PNG's tRNS all lie on white."""
    image = Image.fromarray(np.array([[0, 200]], np.uint8)).convert(mode)
    if transparency is None:
        image.putalpha(Image.fromarray(np.array([[0, 255]], np.uint8)))
        image.save(tmp_path / "image.png")
    else:
        image.save(tmp_path / "image.png", transparency=transparency)
    assert read_image(tmp_path / "image.png")[:, 0].tolist() == 3 * [[255, 200]]
    # Half transparent is half white.
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
def test_every_code_is_the_nearest_to_itself_and_is_trained():
    vq = VQGAN(K=128, d=16)
    assert torch.equal(vq.nearest(vq.E), torch.arange(128))
    assert vq.E is vq.quantize.embedding.weight


def test_with_l2norm_embeddings_and_codes_have_length_1():
    torch.manual_seed(0)
    net = VQGAN(K=10, d=6, ch=4, ch_mult=(1, 2), z_channels=8, image_size=16, l2norm=True).eval()
    x = 2 * torch.rand(3, 3, 16, 16) - 1
    e = net.embed(x)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(3, 64))
    torch.testing.assert_close(net.E.norm(dim=-1), torch.ones(10))
    # The nearest code is then the one with the smallest angle.
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
