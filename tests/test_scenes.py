"""The scenes world: its grammar, its pictures, the exact scorer that reads them, and its text
encoder."""
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import evaluate
from evaluate import AREAS, scene_correct, scene_objects, scene_scores
from models import Words
from tokenizer import (COLOURS, COUNTS, PLURALS, RELATIONS, SCENE_WORDS, SHAPES, TAGS, paint,
                       parse_caption, scene_captions, scenes, signed_distance,
                       to_float, to_uint8)

CAPTIONS = scene_captions(600, 1)
IMAGES = scenes(CAPTIONS, 1)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def picture(*objects):
    """(colour, shape, x, y) ... in pixels, of radius 5 on a dark background -> (3, 32, 32) uint8"""
    canvas = torch.full((1, 3, 32, 32), -0.75)
    for colour, shape, x, y in objects:
        canvas = paint(canvas, torch.tensor([SHAPES.index(shape)]), torch.tensor([COLOURS[colour]]),
                       torch.tensor([[x, y]]).float(), torch.tensor([5.0]), torch.zeros(1))
    return to_uint8(canvas)[0]


# ---------------------------------------------------------------- the grammar
@pytest.mark.parametrize("text, tag, objects, relation", [
    ("a circle", "single_object", [(None, "circle")], None),
    ("a circle and a square", "two_object", [(None, "circle"), (None, "square")], None),
    ("two magenta crosses", "counting", 2 * [("magenta", "cross")], None),
    ("A  Magenta circle ", "colors", [("magenta", "circle")], None),
    ("a blue square above a green triangle", "position",
     [("blue", "square"), ("green", "triangle")], "above"),
    ("a red cross left of a red circle", "position",
     [("red", "cross"), ("red", "circle")], "left of"),
    ("a red circle and a blue cross", "color_attr", [("red", "circle"), ("blue", "cross")], None)])
def test_every_kind_of_caption(text, tag, objects, relation):
    assert parse_caption(text) == dict(tag=tag, objects=objects, relation=relation)


def say(objects, relation=None):
    """The inverse of parse_caption."""
    phrases = [" ".join(filter(None, ("a", colour, shape))) for colour, shape in objects]
    if len(set(objects)) < len(objects):
        colour, shape = objects[0]
        number = {n: word for word, n in COUNTS.items()}[len(objects)]
        plural = {shape: plural for plural, shape in PLURALS.items()}[shape]
        return f"{number} {colour} {plural}"
    return f" {relation or 'and'} ".join(phrases)


def test_drawn_captions_are_of_the_six_kinds_in_turn_and_say_what_was_parsed():
    assert CAPTIONS[:60] == scene_captions(60, 1) != scene_captions(60, 2)
    for i, caption in enumerate(CAPTIONS):
        parsed = parse_caption(caption)
        assert parsed["tag"] == TAGS[i % 6]
        assert say(parsed["objects"], parsed["relation"]) == caption
        if parsed["tag"] in ("two_object", "position", "color_attr"):
            (colour, shape), (colour2, shape2) = parsed["objects"]
            assert shape != shape2 and (colour is None or colour != colour2)
    # Every word, relation and number is drawn.
    assert set(" ".join(CAPTIONS).split()) == set(SCENE_WORDS)
    assert {parse_caption(c)["relation"] for c in CAPTIONS} == {None, *RELATIONS}
    assert {len(parse_caption(c)["objects"]) for c in CAPTIONS} == {1, 2, 3, 4}


@pytest.mark.parametrize("text, named", [
    ("a red dog", "dog"), ("a circle, a square", "circle,"), ("five red circles", "five"), *(
        (text, text) for text in (
            "", "a", "circle", "a red", "red circle", "two circles", "three red circle",
            "a red circles", "a circle above a square", "a red circle and a square",
            "a circle and a blue square", "a red circle left a blue square",
            "a red circle and a red circle", "a circle and a circle",
            "a circle and a square and a cross"))])
def test_what_is_not_of_the_grammar_is_named(text, named):
    with pytest.raises(ValueError, match=f"does not know '{named}'; it knows"):
        parse_caption(text)


# ---------------------------------------------------------------- the pictures
def test_what_the_caption_does_not_say_varies():
    assert len(scenes(100 * ["a red circle"], 0).flatten(1).unique(dim=0)) == 100
    assert scenes(["a circle"], 0, size=48).shape == (1, 3, 48, 48)


# ---------------------------------------------------------------- the scorer
def wrong(caption, i):
    """A caption of the same kind that the picture of this one does not show. i chooses what is
    wrong."""
    parsed = parse_caption(caption)
    tag, objects, relation = parsed["tag"], parsed["objects"], parsed["relation"]
    (colour, shape), others, k, n = objects[0], objects[1:], i // 6, len(objects)
    shapes = [s for s in SHAPES if s not in {other for _, other in objects}]
    colours = [c for c in COLOURS if c not in {other for other, _ in objects}]
    other_shape = [(colour, shapes[k % len(shapes)])]
    other_colour = [(colours[k % len(colours)], shape)]
    other_number = [m for m in (2, 3, 4) if m != n][k % 2]
    colours_swapped = [(b, s) for (_, s), (b, _) in zip(objects, objects[::-1])]
    kinds = {
        "single_object": [other_shape],
        "two_object": [other_shape + others],
        "colors": [other_shape, other_colour],
        "counting": [n * other_shape, n * other_colour, other_number * [(colour, shape)]],
        "position": [other_shape + others, other_colour + others, objects, objects[::-1]],
        "color_attr": [other_shape + others, other_colour + others, colours_swapped]}
    j = k % len(kinds[tag])
    if tag == "position" and j == 2:
        relation = OPPOSITE[relation]
    return say(kinds[tag][j], relation)


def test_the_scorer_is_right_about_sharp_and_about_soft_and_noisy_pictures(monkeypatch):
    """Another colour, shape, number or relation, colours or sides swapped: at least 99 of 100 are
    called wrong, of every kind. Decoded pictures are neither sharp nor clean: a blur over three
    pixels and 5 of 255 of noise cost next to nothing."""
    # Each picture is read once, for both of its captions.
    monkeypatch.setattr(evaluate, "scene_objects", functools.cache(scene_objects))
    others = [wrong(caption, i) for i, caption in enumerate(CAPTIONS)]
    for caption, other in zip(CAPTIONS, others, strict=True):
        assert caption != other and parse_caption(caption)["tag"] == parse_caption(other)["tag"]
    images = list(IMAGES)
    assert min(scene_scores(images, CAPTIONS).values()) >= 0.99
    assert max(scene_scores(images, others).values()) <= 0.01
    kernel = torch.tensor([0.15, 0.7, 0.15])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    x = F.conv2d(F.pad(to_float(IMAGES[:300]), (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    x = to_uint8(x + 0.04 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    images = list(x)
    assert min(scene_scores(images, CAPTIONS[:300]).values()) >= 0.98
    assert max(scene_scores(images, others[:300]).values()) <= 0.02


def test_images_behind_the_first_chunk_of_1024_show_their_own_captions():
    captions = scene_captions(1060, 5)
    assert scene_scores(scenes(captions, 5)[1020:], captions[1020:])["overall"] == 1


@pytest.mark.parametrize("colour, shape", list(itertools.product(COLOURS, SHAPES)))
def test_objects_are_read_exactly(colour, shape):
    [thing] = scene_objects(picture((colour, shape, 20, 11)))
    assert (thing["colour"], thing["shape"]) == (colour, shape) and 0.95 < thing["fit"] <= 1
    x0, y0, x1, y1 = thing["box"]
    assert abs((x0 + x1 + 1) / 2 - 20) <= 0.5
    assert abs((y0 + y1 + 1) / 2 - 11) <= (2 if shape == "triangle" else 0.5)


def test_every_shape_has_the_area_of_its_geometry():
    """Signed distance, negative inside, at size 1: circle of radius .95, square of side 1.68,
    triangle of inradius .55, cross of 2 x .68."""
    axis = (torch.arange(800) + 0.5) / 200 - 2
    x, y = axis.expand(4, 800, 800), axis[:, None].expand(4, 800, 800)
    inside = signed_distance(torch.arange(4), x, y) < 0
    areas = (inside.sum((1, 2)) / 200 ** 2).tolist()
    assert areas == pytest.approx([math.pi * 0.95 ** 2, 1.68 ** 2, 27 ** 0.5 * 0.55 ** 2,
                                   2 * 2 * 0.68 - 0.68 ** 2], rel=0.01)
    assert areas == pytest.approx(AREAS.tolist(), rel=0.005)
    # The triangle points up: it widens downwards.
    rows = inside[2].float().sum(1)
    assert (rows[rows > 0].diff() >= 0).all()


def test_what_is_no_object():
    assert scene_objects(picture()) == []
    red, blue = picture(("red", "circle", 8, 8)), picture(("blue", "circle", 8, 8))
    # A slice of one; half red, half blue; two grown together
    assert scene_objects(red.where(torch.arange(32) < 6, picture())) == []
    assert scene_objects(red.where(torch.arange(32) < 8, blue)) == []
    assert scene_objects(picture(("red", "square", 8, 8), ("red", "square", 16, 8))) == []


def test_more_than_was_asked_for():
    """As in GenEval: wrong where things are counted, allowed elsewhere."""
    image = picture(("red", "circle", 8, 8), ("red", "circle", 24, 8), ("blue", "square", 8, 24))
    answers = {"a circle": 1, "a red circle": 1, "a circle and a square": 1,
               "a red circle and a blue square": 1, "two red circles": 1, "three red circles": 0,
               "a blue circle": 0, "a triangle": 0, "a red circle above a blue square": 1}
    for caption, right in answers.items():
        assert scene_correct(image, caption) == bool(right), caption
    image = picture(("red", "circle", 8, 8), ("red", "circle", 24, 8), ("red", "circle", 8, 24))
    assert not scene_correct(image, "two red circles") and scene_correct(image, "three red circles")


def test_on_a_diagonal_two_relations_hold():
    def relations(image, first, second):
        return [r for r in RELATIONS if scene_correct(image, f"a {first} {r} a {second}")]
    image = picture(("red", "circle", 8, 8), ("blue", "square", 24, 24))
    assert relations(image, "red circle", "blue square") == ["left of", "above"]
    assert relations(image, "blue square", "red circle") == ["right of", "below"]
    image = picture(("red", "circle", 8, 9), ("blue", "square", 24, 7))
    assert relations(image, "red circle", "blue square") == ["left of"]


# ---------------------------------------------------------------- the words
def test_a_row_says_which_words_there_are_and_how_far_from_it():
    text = Words()
    c = text.encode(["a red circle and a blue square", "a blue circle and a red square", "a circle",
                     "a circle and a square", ""])
    assert c.shape == (5, 13, 128)
    # Rows behind the last word are zeros, and so is the empty caption.
    assert c[2, 3:].eq(0).all() and c[4].eq(0).all()
    a, circle = SCENE_WORDS.index("a"), SCENE_WORDS.index("circle")
    v, T = text.vectors, text.T
    # Row 0 stands before "a", row 1 on it, row 2 on "circle".
    for row in range(3):
        assert torch.allclose(c[2, row], (v[T + 1 - row, a] + v[T + 2 - row, circle]) / 2 ** 0.5)
    # Order and company count, the batch does not.
    assert not torch.equal(c[0, 0], c[1, 0]) and not torch.equal(c[2, 2], c[3, 2])
    assert torch.equal(c[2], text.encode(["A  circle"])[0])
    # The numbers are of the size 1.
    assert torch.allclose(c[0, 1:8].pow(2).mean(), torch.tensor(1.0), atol=0.15)
