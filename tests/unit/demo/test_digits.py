"""The demo's data: held-out digits stay held out, clips show what their answer says."""

import io
import json
import tarfile

import decord
import numpy as np
import pytest

from vlm_dist.demo.digits import DIGITS_PER_CLIP, FRAMES_PER_DIGIT, build_digit_data, encode_clip, split_digits


def samples(directory):
    found = {}
    for shard in sorted(directory.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return build_digit_data(tmp_path_factory.mktemp("digits"), num_train_clips=6, num_heldout_clips=4)


def test_split_is_complete_and_disjoint():
    train, heldout = split_digits()
    assert (len(train.labels), len(heldout.labels)) == (1500, 297)
    seen = {picture.tobytes() for picture in train.pictures}
    assert not any(picture.tobytes() in seen for picture in heldout.pictures)
    assert np.bincount(heldout.labels, minlength=10).min() >= 20  # so that guessing one digit stays near chance


def test_shards_hold_what_is_promised(data):
    assert data.num_samples == {"images-train": 1500, "images-heldout": 297, "clips-train": 6, "clips-heldout": 4}
    for name, count in data.num_samples.items():
        found = samples(data.directory / name)
        assert len(found) == count
        media = "png" if name.startswith("images") else "mp4"
        assert all(set(sample) == {media, "json"} for sample in found.values())


def test_clip_shows_the_digits_of_its_answer(data):
    _, heldout = split_digits()
    for sample in samples(data.directory / "clips-heldout").values():
        digits = [int(digit) for digit in json.loads(sample["json"])["answer"].split()]
        reader = decord.VideoReader(io.BytesIO(sample["mp4"]), num_threads=1)
        frames = reader.get_batch(range(len(reader))).asnumpy().astype(np.float32)
        assert len(frames) == DIGITS_PER_CLIP * FRAMES_PER_DIGIT
        for position, digit in enumerate(digits):
            frame = frames[position * FRAMES_PER_DIGIT]
            errors = [np.abs(frame - picture).mean() for picture in heldout.pictures]
            assert min(errors) < 10  # of 255: h264 is lossy
            assert heldout.labels[int(np.argmin(errors))] == digit


def test_same_seed_same_shards(data, tmp_path):
    again = build_digit_data(tmp_path, num_train_clips=6, num_heldout_clips=4)
    for name in data.num_samples:
        for shard in (data.directory / name).glob("*.tar"):  # indexes hold the tars' times
            assert (again.directory / name / shard.name).read_bytes() == shard.read_bytes(), shard.name


def test_clip_is_h264():
    train, _ = split_digits()
    assert b"avc1" in encode_clip(train.pictures[:2])
