"""A picture is the same to a model's processor as pixels and as Pillow has it."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.samples import jpeg
from tests.unit.families.zoo import CHECKPOINTS
from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.labels import RenderedText
from vlm_dist.data.media.images import as_pil, decode_image
from vlm_dist.errors import SkipSample
from vlm_dist.families import family_for

FAMILIES = sorted(set(CHECKPOINTS) - {"mllama"})


@functools.cache
def processor_of(name):
    return CHECKPOINTS[name].build()[1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(64, 48), (333, 200), (3, 3), (1, 40), (4, 2)])  # small ones look like channels
def test_tensors_and_pillow_pictures_give_the_same(name, size):
    made, checkpoint = processor_of(name), CHECKPOINTS[name]
    family = family_for(checkpoint.name, checkpoint.processor_class)
    text = RenderedText(family.image_marker or made.image_token)
    answer = "a" if family.answer_argument else None
    pixels = decode_image(jpeg(*size))
    found = []
    for picture in (pixels, as_pil(pixels)):
        encoder = Encoder(made, family)
        encoder.choose_picture_form(text.text)
        try:
            found.append(encoder.encode(text, [picture], answer=answer))
        except SkipSample as skip:
            found.append(skip.null_class)
    ours, pillows = found
    if isinstance(ours, str):
        assert ours == pillows == "bad_sample" and min(size) < 5  # too thin for it, in either form
        return
    assert ours.tokens.keys() == pillows.tokens.keys() and ours.visual.keys() == pillows.visual.keys()
    for key, value in (ours.tokens | ours.visual).items():
        assert torch.equal(value, (pillows.tokens | pillows.visual)[key]), key


def test_a_processor_that_may_know_pillow_alone_gets_that(processor, monkeypatch):
    seen = []

    class Old:
        """As in the repositories of models that bring their own code."""

        def __getattr__(self, name):
            if name == "backend":
                raise AttributeError
            return getattr(processor.image_processor, name)

        def __call__(self, images, **options):
            return processor.image_processor(images, **options)

    class OldProcessor:
        image_processor = Old()

        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, images=None, **arguments):
            seen.append([type(one) for one in images[0]])
            return processor(images=images, **arguments)

    encoder = Encoder(OldProcessor(), family_for("qwen2_vl"))
    encoder.encode(RenderedText(processor.image_token), [decode_image(jpeg(60, 40))])
    assert seen[-1] == [Image.Image]
    assert np.asarray(as_pil(decode_image(jpeg(60, 40)))).shape == (40, 60, 3)
