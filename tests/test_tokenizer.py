"""tokenizer.py: the shapes world, image files of every kind, and the VQGAN's conventions."""
import math
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tokenizer import (COLOURS, SHAPES, VQGAN, folder, paint, read_image, shapes, shapes_names,
                       signed_distance, to_float, to_uint8)

NAMES = shapes_names()


# -------------------------------------------------------------------- the shapes world
def weights(images):
    """How much each pixel differs from the ground, which the top left corner shows.

    (N, 3, H, W) uint8 -> (N, H, W)
    """
    x = to_float(images)
    return (x - x[:, :, :1, :1]).abs().sum(1)


def centres(images):
    """Centre of mass of the object, in pixels from the middle of the canvas. -> (N, 2) x, y"""
    w = weights(images)
    S = w.shape[-1]
    axis = torch.arange(S) + 0.5 - S / 2
    return torch.stack([w.sum(1) @ axis, w.sum(2) @ axis], 1) / w.sum((1, 2))[:, None]


def test_class_names_are_colour_and_shape_colour_by_colour():
    assert len(NAMES) == len(set(NAMES)) == 24
    assert NAMES[0] == "red circle" and NAMES[3] == "red cross"
    assert NAMES[4] == "green circle" and NAMES[23] == "magenta cross"
    assert NAMES == [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.mark.parametrize("anywhere", [False, True])
def test_shapes_are_uint8_and_follow_from_the_seed(anywhere):
    labels = torch.arange(50) % 24
    images = shapes(labels, 3, anywhere)
    assert images.shape == (50, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images, shapes(labels, 3, anywhere))
    assert not torch.equal(images, shapes(labels, 4, anywhere))
    # place, size, hue ... vary from image to image
    assert images.flatten(1).unique(dim=0).shape[0] == 50
    assert shapes(labels, 3, anywhere, size=16).shape == (50, 3, 16, 16)


def test_shapes_do_not_touch_the_global_random_state():
    before = torch.get_rng_state()
    shapes(torch.arange(24), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_objects_are_within_three_pixels_of_the_centre_unless_they_may_be_anywhere():
    """Measured on the pictures, per axis; 0.05 px for rounding to pixels."""
    labels = torch.arange(2400) % 24
    default, anywhere = centres(shapes(labels, 0)), centres(shapes(labels, 0, anywhere=True))
    assert 2.8 < default.abs().max() < 3.05
    # 16 px less the radius
    assert 6 < anywhere.abs().max() < 10
    assert default.mean(0).abs().max() < 0.15 and anywhere.mean(0).abs().max() < 0.4


@pytest.mark.parametrize("anywhere", [False, True])
def test_objects_leave_the_corners_free(anywhere):
    """The measurements here take the corner for the ground."""
    images = shapes(torch.arange(2400) % 24, 0, anywhere)
    corners = images[:, :, ::31, ::31].flatten(2)                                 # (N, 3, 4)
    assert (corners == corners[:, :, :1]).all()


def test_every_colour_is_recognised_by_the_mean_colour_of_the_object():
    """In 1200 images, so that the second chunk of 1024 has the right labels too.

    Jitter included, the nearest palette colour is always right.
    """
    labels = torch.arange(1200) % 24
    images = shapes(labels, 1)
    inside = weights(images)
    inside = (inside > 0.9 * inside.amax((1, 2), keepdim=True))[:, None]         # no smooth edges
    mean = (to_float(images) * inside).sum((2, 3)) / inside.sum((2, 3))          # (N, 3)
    nearest = torch.cdist(mean, torch.tensor(list(COLOURS.values()))).argmin(1)
    assert torch.equal(nearest, labels // 4)


def test_ground_is_grey_and_varies():
    corner = shapes(torch.arange(200) % 24, 0)[:, :, 0, 0].int()
    assert (corner.amax(1) - corner.amin(1) == 0).all()
    assert corner.max() - corner.min() > 100 and corner.unique().numel() > 10


def test_every_shape_has_the_area_of_its_geometry():
    """Signed distance, negative inside, at size 1: circle of radius .95, square of side 1.68,
    triangle of inradius .55, cross of 2 x .68."""
    axis = (torch.arange(800) + 0.5) / 200 - 2
    x, y = axis.expand(4, 800, 800), axis[:, None].expand(4, 800, 800)
    inside = signed_distance(torch.arange(4), x, y) < 0
    areas = inside.float().sum((1, 2)) / 200 ** 2
    expected = [math.pi * 0.95 ** 2, 1.68 ** 2, 27 ** 0.5 * 0.55 ** 2, 2 * 2 * 0.68 - 0.68 ** 2]
    assert areas.tolist() == pytest.approx(expected, rel=0.01)
    # the triangle points up: it widens downwards
    rows = inside[2].float().sum(1)
    assert (rows[rows > 0].diff() >= 0).all()


def test_paint_puts_the_colour_inside_and_keeps_the_canvas_outside():
    canvas = torch.full((1, 3, 32, 32), -0.5)
    square, colour = torch.tensor([1]), torch.tensor([[1.0, 0.0, -1.0]])
    centre, radius = torch.tensor([[20.0, 10.0]]), torch.tensor([5.0])
    painted = paint(canvas, square, colour, centre, radius, torch.zeros(1))
    assert painted[0, :, 10, 20].tolist() == [1.0, 0.0, -1.0]                    # centre is x, y
    assert painted[0, :, 20, 10].tolist() == [-0.5] * 3
    assert (canvas == -0.5).all()


# -------------------------------------------------------------------- numbers
def test_all_256_values_survive_the_way_to_float_and_back():
    x = torch.arange(256, dtype=torch.uint8)
    assert to_float(x).min() == -1 and to_float(x).max() == 1
    assert torch.equal(to_uint8(to_float(x)), x)


def test_values_outside_are_clipped_and_half_precision_is_fine():
    assert to_uint8(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0])).tolist() == [0, 0, 128, 255, 255]
    assert to_uint8(torch.tensor([-1.0, 1.0]).bfloat16()).tolist() == [0, 255]


# -------------------------------------------------------------------- image files
def colour_at(image, x, y):
    return image[:, y, x].tolist()


def test_a_grey_image_becomes_three_equal_channels(tmp_path):
    Image.fromarray(np.full((8, 8), 77, np.uint8)).save(tmp_path / "grey.png")
    image = read_image(tmp_path / "grey.png", 8)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and (image == 77).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "1", "CMYK", "P"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    assert Image.open(path).mode == mode
    assert (read_image(path, 8) == 255).all()


def test_what_is_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (8, 8), (10, 20, 30, 128)).save(tmp_path / "image.png")
    expected = [round(value * 128 / 255 + 255 * 127 / 255) for value in (10, 20, 30)]
    assert colour_at(read_image(tmp_path / "image.png", 8), 4, 4) == expected


def with_one_transparent_colour(kind):
    """-> image of two pixels, black and 200; black is transparent in each mode's own way."""
    grey = Image.fromarray(np.array([[0, 200]], np.uint8))
    alpha = Image.fromarray(np.array([[0, 255]], np.uint8))
    if kind in ("RGBA", "LA"):
        image = grey.convert(kind)
        image.putalpha(alpha)
        return image, {}
    if kind == "I;16":
        return Image.fromarray(np.array([[0, 200 << 8]], np.uint16)), dict(transparency=0)
    image = grey.convert(kind.removesuffix(" alphas"))
    transparency = {"L": 0, "RGB": (0, 0, 0), "P": 0, "P alphas": bytes([0] + 255 * [255])}
    return image, dict(transparency=transparency[kind])


@pytest.mark.parametrize("kind, suffix", [
    ("RGBA", "png"), ("LA", "png"), ("L", "png"), ("RGB", "png"), ("P", "png"), ("P alphas", "png"),
    ("I;16", "png"), ("RGBA", "webp"), ("P", "gif"), ("RGBA", "tif"), ("LA", "tif")])
def test_what_is_transparent_is_white_not_the_hidden_colour(kind, suffix, tmp_path):
    """Alpha channel, palette with transparency, PNG's tRNS: all lie on white ground."""
    image, options = with_one_transparent_colour(kind)
    if suffix == "webp":
        # the colours below transparent pixels too
        options = dict(lossless=True, exact=True)
    image.save(tmp_path / f"image.{suffix}", **options)
    assert read_image(tmp_path / f"image.{suffix}")[:, 0].tolist() == 3 * [[255, 200]]


def test_the_transparent_colour_of_a_16_bit_png(tmp_path):
    """Two pixels of 3 x 16 bits, the first of the transparent colour; Pillow cannot write it."""
    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    row = struct.pack(">6H", 300, 600, 900, 256 * 10, 256 * 20, 256 * 30)
    (tmp_path / "image.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"tRNS", struct.pack(">3H", 300, 600, 900))
        + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))
    image = read_image(tmp_path / "image.png")
    assert colour_at(image, 0, 0) == [255, 255, 255] and colour_at(image, 1, 0) == [10, 20, 30]


@pytest.mark.parametrize("values", [
    np.array([[0, 0.5, 1]], np.float32), np.array([[0, 128, 255]], np.float32),
    np.array([[0, 128, 255]], np.int32), np.array([[0, 2 ** 20, 2 ** 30]], np.int32)])
def test_pixels_of_other_ranges_are_refused_rather_than_black(values, tmp_path):
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(ValueError, match=r"image.tif cannot .* \(its .* save it with 8 or 16 bits"):
        read_image(tmp_path / "image.tif")


def tiff(path, bits, row, sample_format):
    """A TIFF of one row of grey pixels, as microscopes write them and Pillow cannot."""
    tags = {256: (4, 2), 257: (4, 1), 258: (3, bits), 259: (3, 1), 262: (3, 1), 273: (4, 0),
            277: (3, 1), 278: (4, 1), 279: (4, len(row)), 339: (3, sample_format)}
    tags[273] = (4, 8 + 2 + 12 * len(tags) + 4)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, (kind, value) in tags.items():
        data += struct.pack("<HHII", tag, kind, 1, value)
    path.write_bytes(data + struct.pack("<I", 0) + row)


def test_twelve_bits_use_the_whole_range(tmp_path):
    """Two pixels, 4095 and 2048, packed into three bytes."""
    tiff(tmp_path / "image.tif", 12, b"\xff\xf8\x00", 1)
    assert read_image(tmp_path / "image.tif")[0, 0].tolist() == [255, 128]


def test_pixels_below_zero_are_refused(tmp_path):
    tiff(tmp_path / "image.tif", 16, struct.pack("<2h", -1000, 3000), 2)
    with pytest.raises(ValueError, match="image.tif cannot .* pixels below zero"):
        read_image(tmp_path / "image.tif")


def test_palette_indices_become_their_colours(tmp_path):
    image = Image.fromarray(np.ones((8, 8), np.uint8), mode="L").convert("P")
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "image.gif")
    assert colour_at(read_image(tmp_path / "image.gif", 8), 4, 4) == [200, 100, 50]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_grey_keeps_its_range(suffix, tmp_path):
    """PIL's own conversion would clip everything above 255 to white."""
    values = np.repeat(np.array([[0, 255, 256, 32768, 65535]], np.uint16), 5, axis=0)
    Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    assert read_image(tmp_path / f"image.{suffix}", 5)[0, 2].tolist() == [0, 0, 1, 128, 255]


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


@pytest.mark.parametrize("width, height", [(96, 32), (32, 96)])
def test_the_centre_square_is_kept(width, height, tmp_path):
    image = Image.new("RGB", (width, height), "red")
    left, top = (width - 32) // 2, (height - 32) // 2
    image.paste("lime", (left, top, left + 32, top + 32))
    image.save(tmp_path / "image.png")
    for size in (8, 32, 64):
        square = read_image(tmp_path / "image.png", size)
        assert square.shape == (3, size, size)
        for x in (size // 2, 1, size - 2):
            assert colour_at(square, x, x) == [0, 255, 0]


def test_what_is_no_image_is_named_in_the_error(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    (tmp_path / "folder.png").mkdir()
    for name in ("text.png", "empty.jpg", "cut.png", "folder.png", "missing.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name, 8)


# -------------------------------------------------------------------- folders of images
def fill(directory, colour, *files):
    directory.mkdir(parents=True)
    for file in files:
        Image.new("RGB", (10, 10), colour).save(directory / file)


# a folder of fewer than 40 images is refused
MANY = [f"x{i}.png" for i in range(20)]


def test_a_folder_has_one_class_per_subfolder_sorted_by_name(tmp_path):
    fill(tmp_path / "zebra", (3, 3, 3), "a.png", *MANY)
    fill(tmp_path / "a red  apple", (1, 1, 1), "b.png", "UPPER CASE.PNG", "c.bmp", *MANY)
    fill(tmp_path / "m", (2, 2, 2), "d.webp", "e.gif", *MANY)
    (tmp_path / "m" / "notes.txt").write_text("not an image, and not called one")
    fill(tmp_path / ".hidden", (9, 9, 9), "f.png")
    (tmp_path / "readme.txt").write_text("beside the class folders")
    for data in (tmp_path, str(tmp_path)):
        images, labels, names = folder(data, size=8)
        assert names == ["a red  apple", "m", "zebra"]
        assert labels.tolist() == 23 * [0] + 22 * [1] + 21 * [2] and labels.dtype == torch.long
        assert images.shape == (66, 3, 8, 8) and images.dtype == torch.uint8
        # (webp is lossy)
        assert ((images[:, :, 4, 4].int() - (labels[:, None] + 1)).abs() <= 2).all()


def test_an_empty_class_folder_is_named(tmp_path):
    fill(tmp_path / "full", "red", "a.png")
    fill(tmp_path / "nothing here", "red")
    (tmp_path / "nothing here" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images in class folder 'nothing here'"):
        folder(tmp_path)


def test_a_folder_without_subfolders_is_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    with pytest.raises(ValueError, match="no subfolders.*one subfolder of images for each class"):
        folder(tmp_path)


def test_what_is_not_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for data in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(ValueError, match="is not a folder"):
            folder(data)


def test_a_broken_image_in_a_folder_is_named(tmp_path):
    fill(tmp_path / "class", "red", "a.png", *MANY)
    fill(tmp_path / "other", "red", *MANY)
    (tmp_path / "class" / "broken.png").write_text("not an image")
    with pytest.raises(ValueError, match="broken.png"):
        folder(tmp_path)


# -------------------------------------------------------------------- VQGAN
@pytest.fixture(scope="module")
def vq():
    """32 x 32 pixels, f = 4; sizes given, so that these tests do not depend on the small worlds'
    defaults."""
    torch.manual_seed(0)
    net = VQGAN(K=128, d=16, ch=8, ch_mult=(1, 2, 2), z_channels=16, groups=4, image_size=32)
    return net.eval()


def test_the_codebook_has_k_rows_of_width_d_and_an_image_l_tokens(vq):
    assert vq.K == 128 and vq.L == 64 and vq.E.shape == (128, 16)
    # not a copy: training moves it
    assert vq.E is vq.quantize.embedding.weight


@pytest.mark.parametrize("image_size, ch_mult, L", [
    (32, (1, 2, 2), 64), (16, (1, 2), 64), (32, (1, 1, 2, 2), 16), (8, (1,), 64)])
def test_images_become_tokens_and_tokens_images(image_size, ch_mult, L):
    net = VQGAN(K=10, d=6, ch=4, ch_mult=ch_mult, z_channels=8, image_size=image_size,
                attn_levels=(len(ch_mult) - 1,)).eval()
    x = 2 * torch.rand(3, 3, image_size, image_size) - 1
    with torch.no_grad():
        z = net.encode(x)
        y = net.decode(net.E[z])
    assert net.L == L and z.shape == (3, L) and z.dtype == torch.long
    assert z.min() >= 0 and z.max() < 10
    assert y.shape == x.shape and net.encode(y).shape == (3, L)


def test_nearest_is_the_code_with_the_smallest_distance(vq):
    generator = torch.Generator().manual_seed(0)
    e = torch.randn(5, 64, 16, generator=generator) * 16 ** -0.5
    distance = torch.cdist(e.double().flatten(0, 1), vq.E.double(),
                           compute_mode="donot_use_mm_for_euclid_dist")
    brute_force = distance.argmin(1)
    assert torch.equal(vq.nearest(e), brute_force.view(5, 64))
    assert brute_force.unique().numel() > 30


def test_a_code_is_its_own_nearest_code(vq):
    z = torch.arange(128).view(2, 64)
    assert torch.equal(vq.nearest(vq.E[z]), z)


def test_with_l2norm_embeddings_and_codes_have_length_1():
    torch.manual_seed(0)
    net = VQGAN(K=10, d=6, ch=4, ch_mult=(1, 2), z_channels=8, image_size=16, l2norm=True).eval()
    x = 2 * torch.rand(3, 3, 16, 16) - 1
    e = net.embed(x)
    torch.testing.assert_close(e.norm(dim=-1), torch.ones(3, 64))
    torch.testing.assert_close(net.E.norm(dim=-1), torch.ones(10))
    # the nearest is the one with the smallest angle
    assert torch.equal(net.encode(x), (e @ net.E.T).argmax(-1))
    # the length of a row of the weight is no part of the code
    E = net.E.detach().clone()
    with torch.no_grad():
        net.quantize.embedding.weight.mul_(torch.rand(10, 1) + 0.5)
    torch.testing.assert_close(net.E, E)


def test_encode_is_the_nearest_code_of_the_embedding(vq):
    x = to_float(shapes(torch.arange(4), 0))
    assert vq.embed(x).shape == (4, 64, 16)
    assert torch.equal(vq.encode(x), vq.nearest(vq.embed(x)))


def test_images_do_not_see_each_other(vq):
    x = to_float(shapes(torch.arange(4), 0))
    with torch.no_grad():
        torch.testing.assert_close(vq.embed(x)[2:3], vq.embed(x[2:3]), rtol=1e-4, atol=1e-5)
        e = vq.E[vq.encode(x)]
        torch.testing.assert_close(vq.decode(e)[2:3], vq.decode(e[2:3]), rtol=1e-4, atol=1e-5)


def test_tokens_are_in_raster_order():
    """With convolutions that pass everything on, token 8 i + j is the pixel in row i, column j, on
    the way in and out."""
    net = VQGAN(d=3, z_channels=3, ch=4, ch_mult=(1,), image_size=8)
    net.encoder = net.decoder = net.quant_conv = net.post_quant_conv = nn.Identity()
    x = torch.randn(2, 3, 8, 8)
    e = net.embed(x)
    assert torch.equal(e[1, 8 * 5 + 2], x[1, :, 5, 2])
    assert torch.equal(net.decode(e), x)


def test_gradient_passes_the_decoder_to_every_token(vq):
    """Frozen or not: this is the way by which the loss reaches the student (Sec. 3.4)."""
    e = torch.randn(2, 64, 16, requires_grad=True)
    vq.decode(e).pow(2).sum().backward()
    assert e.grad.isfinite().all() and e.grad.abs().amax(-1).min() > 0


def test_images_are_not_clamped():
    """A clamp would stop the gradient of a pixel that is out of range, instead of bringing it
    back."""
    torch.manual_seed(0)
    net = VQGAN(K=4, d=4, ch=4, ch_mult=(1,), z_channels=4, image_size=8)
    with torch.no_grad():
        net.decoder.conv_out.bias.fill_(5.0)
        assert net.decode(net.E[torch.zeros(1, 64, dtype=torch.long)]).mean() > 2
