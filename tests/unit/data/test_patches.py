"""The fast image processor gives what the model's own gives, bit for bit, and leaves to it what it does not know."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_dist.data.encoding.patches import PatchImages, with_fast_patches
from vlm_dist.data.encoding.quick_processor import quicken


def picture(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def same(one, other):
    assert set(one) == set(other)
    for key in one:
        assert torch.equal(one[key], other[key])
        assert one[key].dtype == other[key].dtype
    return True


@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=3), as_tensor=st.booleans()
)
@settings(max_examples=12, deadline=None)
def test_pictures_of_any_size(processor, sizes, as_tensor):
    fast = with_fast_patches(processor)
    assert isinstance(fast.image_processor, PatchImages)
    pictures = [picture(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    if as_tensor:
        pictures = [torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in pictures]
    try:
        expected = processor.image_processor([pictures], return_tensors="pt")
    except ValueError as error:  # too narrow
        with pytest.raises(ValueError, match=str(error)[:20]):
            fast.image_processor([pictures], return_tensors="pt")
    else:
        assert same(fast.image_processor([pictures], return_tensors="pt"), expected)


def test_the_whole_processor(processor):
    marker = "<|vision_start|><|{}_pad|><|vision_end|>"
    calls = [
        {"text": ["seven"], "text_kwargs": {"return_offsets_mapping": True}},
        {"text": [marker.format("image") + "seven"], "images": [[picture(100, 60)]]},
        {
            "text": [marker.format("image") + "é"] * 2,
            "images": [[picture(100, 60)], [picture(60, 90)]],
            "padding": True,
        },
        {"text": [marker.format("video")], "videos": [np.zeros((4, 56, 84, 3), np.uint8)]},
    ]
    quick = quicken(processor)
    for one in (quick, pickle.loads(pickle.dumps(quick))):
        for call in calls * 2:  # the second time from memory
            again = copy.deepcopy(call)
            ours = one(**call, images_kwargs={"return_tensors": "pt"}, videos_kwargs={"return_tensors": "pt"})
            theirs = processor(**again, images_kwargs={"return_tensors": "pt"}, videos_kwargs={"return_tensors": "pt"})
            assert set(ours) == set(theirs)
            for key, value in theirs.items():
                assert torch.equal(value, ours[key]) if isinstance(value, torch.Tensor) else value == ours[key]


def test_what_a_class_does_itself_is_not_replaced(processor):
    own = copy.copy(processor)
    own.__class__ = type("Own", (type(processor),), {"create_mm_token_type_ids": lambda self, input_ids: "mine"})
    assert quicken(own).create_mm_token_type_ids([[1]]) == "mine"
    assert quicken(processor.tokenizer) is processor.tokenizer


@pytest.mark.parametrize(
    ("image", "arguments"),
    [
        (picture(100, 60).convert("L"), {}),
        (picture(56, 56), {"do_resize": False}),
        (picture(56, 56), {"return_tensors": "np"}),
        (np.array(picture(56, 56)), {}),
    ],
    ids=["grey", "no resizing", "arrays", "an array"],
)
def test_the_rest_is_left_to_the_models_own(processor, image, arguments):
    arguments = {"return_tensors": "pt", **arguments}
    ours = with_fast_patches(processor).image_processor([[image]], **arguments)
    theirs = processor.image_processor([[image]], **arguments)
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


def test_a_processor_that_works_otherwise_is_used_as_it_is(processor):
    other = copy.deepcopy(processor)
    other.image_processor.__class__ = type(
        "Brighter",
        (type(processor.image_processor),),
        {"patchify": lambda self, images, **rest: super(type(self), self).patchify(images + 1, **rest)},
    )
    assert with_fast_patches(other) is other
    assert with_fast_patches("no processor at all") == "no processor at all"
    fast = with_fast_patches(processor)
    assert with_fast_patches(fast) is fast
