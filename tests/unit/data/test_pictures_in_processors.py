"""A picture is the same to a model's processor as pixels and as Pillow has it."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.unit.data.samples import jpeg
from tests.unit.families.processors import llava, paligemma
from vlm_dist.data.encoding.encode import Encoder
from vlm_dist.data.encoding.labels import RenderedText
from vlm_dist.data.media.images import as_pil, decode_image
from vlm_dist.families import family_for

FAMILIES = {"llava": llava, "paligemma": paligemma, "qwen2_vl": None}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(64, 48), (333, 200), (3, 3), (1, 40), (4, 2)])  # small ones look like channels
def test_tensors_and_pillow_pictures_give_the_same(name, size, processor):
    made = FAMILIES[name]() if FAMILIES[name] else processor
    family = family_for(name)
    if name == "qwen2_vl" and min(size) < 3:
        size = (40, 40)  # it refuses stripes
    encoder = Encoder(made, family)
    pixels = decode_image(jpeg(*size))
    text = RenderedText(family.image_marker or made.image_token)
    answer = "a" if family.answer_argument else None
    ours, pillows = (encoder.encode(text, [one], answer=answer) for one in (pixels, as_pil(pixels)))
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
