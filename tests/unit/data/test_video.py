"""Videos: evenly spread frames; damaged ones are skipped and never kill the process."""

import pytest

from tests.unit.data.samples import mp4
from vlm_dist.data.media.video import decode_video, keep_frames, repeat_last_frame, sample_indices, scale_clip
from vlm_dist.errors import SkipSample


def levels(clip):
    """The numbers of the frames, read from their grey levels."""
    return [round((float(frame.mean()) - 10) / 8) for frame in clip.frames]


def test_frames_are_spread_evenly_and_are_those_that_the_metadata_names():
    clip = decode_video(mp4(num_frames=16, fps=4), num_frames=4)
    assert clip.indices == (0, 4, 8, 12)
    assert levels(clip) == [0, 4, 8, 12]
    assert clip.metadata == {
        "fps": 4.0,
        "total_num_frames": 16,
        "frames_indices": [0, 4, 8, 12],
        "duration": 4.0,
        "height": 48,
        "width": 64,
    }


def test_a_short_clip_gives_each_of_its_frames_once():
    clip = decode_video(mp4(num_frames=5), num_frames=8)
    assert levels(clip) == [0, 1, 2, 3, 4]
    longer = repeat_last_frame(clip, 7)
    assert levels(longer) == [0, 1, 2, 3, 4, 4, 4]
    assert longer.indices == (0, 1, 2, 3, 4, 4, 4)
    assert repeat_last_frame(clip, 3) is clip


def test_only_the_first_seconds_of_a_long_clip_are_looked_at():
    clip = decode_video(mp4(num_frames=16, fps=4), num_frames=4, max_duration=2.0)
    assert levels(clip) == [0, 2, 4, 6]
    assert clip.metadata["duration"] == 2.0
    assert levels(decode_video(mp4(num_frames=16, fps=4), num_frames=4, max_duration=60)) == [0, 4, 8, 12]


@pytest.mark.parametrize("length", [0, 10, 300, 2000, -500])
def test_a_cut_video_is_skipped_and_the_process_lives(length):
    data = mp4(num_frames=24, width=256, height=192)
    with pytest.raises(SkipSample) as caught:
        decode_video(data[:length], num_frames=8)
    assert caught.value.null_class == "decode"


def test_sampling_never_repeats_a_frame():
    for available in range(1, 40):
        for wanted in range(1, 20):
            indices = sample_indices(available, wanted)
            assert len(indices) == len(set(indices)) == min(available, wanted)
            assert 0 <= indices[0] <= indices[-1] < available


def test_thinned_and_scaled():
    clip = decode_video(mp4(num_frames=8), num_frames=8)
    assert keep_frames(clip, 4).indices == (0, 2, 4, 6)
    assert keep_frames(clip, 9) is clip
    assert scale_clip(clip, 0.5).frames.shape == (8, 24, 32, 3)
    assert scale_clip(clip, 1.0) is clip
