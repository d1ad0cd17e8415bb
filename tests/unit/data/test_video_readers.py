"""All video libraries give the same frames: upright, at the same times, whatever the container."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from tests.unit.data.clips import clip, number_of, song, turned
from vlm_dist.data.index.facts import probe_video
from vlm_dist.data.media import video
from vlm_dist.data.media.containers import container_of, has_leading_frames
from vlm_dist.data.media.video import decode_video
from vlm_dist.data.media.video_readers import AUTO_ORDER, libraries_for, with_pyav
from vlm_dist.errors import ConfigError, DataError, SkipSample

HERE = ("decord", "pyav", "cv2")  # torchcodec needs libraries that not every machine has; its test finds some

EVEN = {
    "one key frame": {"g": "250", "bf": "3"},
    "many key frames": {},
    "open groups": {"codec": "libx265"},
    "vp9 webm": {"codec": "libvpx-vp9", "form": "webm"},
    "av1": {"codec": "libsvtav1"},
    "mpeg4 avi": {"codec": "mpeg4", "form": "avi"},
    "h264 avi": {"form": "avi", "bf": "0"},
    "h264 mkv": {"form": "matroska"},
    "fragments": {"movflags": "frag_keyframe+empty_moov"},
    "transport stream": {"form": "mpegts"},
    "program stream": {"codec": "mpeg2video", "form": "mpeg", "fps": 25},
}
#: What a library says that it cannot read.
REFUSED = {
    ("decord", "av1"),
    ("decord", "transport stream"),
    ("cv2", "av1"),
    ("torchcodec", "transport stream"),
    ("torchcodec", "program stream"),
}


@cache
def even(name: str) -> bytes:
    return clip(**EVEN[name])


def milliseconds(number: int) -> int:
    """Ever longer pauses between frames, with a jump."""
    return number * 20 + number * number // 4 + (1500 if number >= 60 else 0)


@cache
def uneven(form: str) -> bytes:
    return clip(form=form, times=milliseconds)


def shown_at(seconds: float, half: float) -> int:
    """The last frame that begins before this, and half a frame more."""
    return max(number for number in range(120) if milliseconds(number) / 1000 <= seconds + half)


@pytest.mark.parametrize("name", EVEN)
@pytest.mark.parametrize("library", HERE)
def test_frames_are_those_that_the_metadata_names(library, name):
    if (library, name) in REFUSED:
        with pytest.raises(SkipSample):
            decode_video(even(name), num_frames=8, libraries=(library,))
        return
    made = decode_video(even(name), num_frames=8, libraries=(library,))
    assert [number_of(frame) for frame in made.frames] == list(made.indices)
    reference = decode_video(even(name), num_frames=8, libraries=("pyav",))
    if (library, name) != ("cv2", "program stream"):  # where OpenCV counts a few frames less
        assert made.indices == reference.indices == tuple(range(0, 120, 15))
        assert np.abs(made.frames.astype(int) - reference.frames).max() <= 2
        assert (made.fps, made.num_frames) == (pytest.approx(reference.fps), 120)


@pytest.mark.parametrize("form", ["mp4", "matroska"])
@pytest.mark.parametrize("library", HERE)
def test_uneven_frames_are_taken_at_even_times(library, form):
    made = decode_video(uneven(form), num_frames=8, libraries=(library,))
    duration = made.num_frames / made.fps
    assert duration == pytest.approx(milliseconds(119) / 1000, abs=0.15)
    half = 0.5 / made.fps
    for index, frame in zip(made.indices, made.frames, strict=True):
        expected = shown_at(index / made.fps, half)
        # OpenCV takes what lies within half a frame of the time, the others the last of those
        assert abs(number_of(frame) - expected) <= (2 if library == "cv2" else 0), index


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("library", HERE)
def test_videos_of_phones_are_upright(library, degrees):
    lying = decode_video(even("many key frames"), num_frames=2, libraries=("pyav",)).frames
    data = turned(even("many key frames"), degrees)
    upright = decode_video(data, num_frames=2, libraries=(library,)).frames
    expected = np.rot90(lying, -degrees // 90, axes=(1, 2))
    assert upright.shape == expected.shape
    assert np.abs(upright.astype(int) - expected).max() <= 2
    assert probe_video(data)[2:] == (upright.shape[2], upright.shape[1])


@pytest.mark.parametrize("library", HERE)
def test_colours(library):
    red_left = decode_video(even("one key frame"), num_frames=1, libraries=(library,)).frames[0, -20, 20]
    assert red_left[0] > 150 > 100 > red_left[2]
    own = decode_video(even("one key frame"), num_frames=1, libraries=(library,), convert_to_rgb=False).frames[
        0, -20, 20
    ]
    assert own.tolist() == (red_left[::-1] if library == "cv2" else red_left).tolist()


@pytest.mark.parametrize("library", HERE)
def test_more_frames_than_there_are_and_the_first_second(library):
    every = decode_video(clip(num_frames=11), num_frames=99, libraries=(library,))
    assert [number_of(frame) for frame in every.frames] == list(every.indices) == list(range(11))
    first = decode_video(even("many key frames"), num_frames=4, max_duration=1.0, libraries=(library,))
    assert [number_of(frame) for frame in first.frames] == list(first.indices) == [0, 7, 15, 22]


@pytest.mark.parametrize("library", HERE)
def test_damage_is_skipped(library):
    whole = even("many key frames")
    fronted = clip(movflags="faststart")  # the tables are there, the frames are not
    pieces = [whole[: len(whole) * share // 10] for share in range(10)] + [fronted[: len(fronted) // 2]]
    pieces += [even("vp9 webm")[:200], even("mpeg4 avi")[:4000], even("mpeg4 avi")[:20000], song()]
    for data in pieces:
        try:
            made = decode_video(data, num_frames=8, libraries=(library,))
        except SkipSample as skip:
            assert skip.null_class == "decode"
        else:  # all that is asked for is there
            assert [number_of(frame) for frame in made.frames] == list(made.indices)
    with pytest.raises(SkipSample):
        decode_video(pieces[10], num_frames=8, libraries=(library,))
    with pytest.raises(SkipSample):
        decode_video(song(), num_frames=8, libraries=(library,))


@pytest.mark.parametrize("library", HERE)
def test_too_many_pixels_are_refused_before_they_are_decoded(library, monkeypatch):
    data = even("many key frames")
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_FRAME_PIXELS", 15_000)
        with pytest.raises(SkipSample, match="160 x 96 pixels; the limit is 15000"):
            decode_video(data, num_frames=2, libraries=(library,))
    monkeypatch.setattr(video, "MAX_CLIP_PIXELS", 40_000)
    assert len(decode_video(data, num_frames=2, libraries=(library,)).frames) == 2
    with pytest.raises(SkipSample, match="3 frames of 160 x 96 pixels are more than 40000"):
        decode_video(data, num_frames=3, libraries=(library,))


def test_a_playlist_is_no_video(tmp_path):
    """FFmpeg would open what it names."""
    (tmp_path / "secret.mp4").write_bytes(even("many key frames"))
    for text in (
        f"#EXTM3U\n#EXTINF:4,\n{tmp_path}/secret.mp4\n",
        f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
    ):
        for library in HERE:
            with pytest.raises(SkipSample, match="no video of a known kind"):
                decode_video(text.encode(), num_frames=2, libraries=(library,))
        assert probe_video(text.encode()) is None
    with pytest.raises(SkipSample, match="no video of a known kind"):
        decode_video(b"<!DOCTYPE html>" * 100, num_frames=2)


def test_containers_are_told_by_their_first_bytes():
    kinds = {
        "many key frames": "mp4",
        "vp9 webm": "matroska",
        "mpeg4 avi": "avi",
        "transport stream": "mpegts",
        "program stream": "mpeg",
    }
    assert {name: container_of(even(name)) for name in kinds} == kinds
    assert container_of(b"") is None
    assert container_of(song()) == "mp4"


def test_open_groups_of_pictures_are_seen_in_the_tables(tmp_path):
    for name, leads in (("open groups", True), ("many key frames", False), ("one key frame", False)):
        (tmp_path / "a.mp4").write_bytes(even(name))
        with (tmp_path / "a.mp4").open("rb") as stream:
            assert has_leading_frames(stream) is leads, name


def test_the_cost_does_not_grow_with_the_length(monkeypatch):
    decoded = []
    original = with_pyav.PyavReader._timed

    def counted(self, start):
        for item in original(self, start):
            decoded.append(1)
            yield item

    monkeypatch.setattr(with_pyav.PyavReader, "_timed", counted)
    for num_frames in (240, 1000):
        decoded.clear()
        made = decode_video(clip(num_frames=num_frames), num_frames=4, libraries=("pyav",))
        assert [number_of(frame) for frame in made.frames] == list(made.indices)
        assert len(decoded) < 4 * 34


@pytest.mark.parametrize("library", HERE)
def test_two_hundred_clips_leave_nothing_behind(library):
    data, process = even("many key frames"), psutil.Process()
    for _ in range(20):
        decode_video(data, num_frames=4, libraries=(library,))
    before, files, threads = process.memory_info().rss, process.num_fds(), process.num_threads()
    for _ in range(200):
        decode_video(data, num_frames=4, libraries=(library,))
    assert process.memory_info().rss - before < 30e6
    assert process.num_fds() <= files
    assert process.num_threads() <= threads


def test_the_next_library_is_tried_where_one_cannot_open_a_video():
    made = decode_video(even("av1"), num_frames=4, libraries=("decord", "pyav"))
    assert [number_of(frame) for frame in made.frames] == [0, 30, 60, 90]
    with pytest.raises(SkipSample, match=r"decord: .*; cv2: "):
        decode_video(b"\0\0\0\x20ftypisom" + bytes(500), num_frames=4, libraries=("decord", "cv2"))


def test_which_libraries_are_used(monkeypatch):
    assert [name for name in AUTO_ORDER if name != "torchcodec"] == [
        n for n in libraries_for("auto") if n != "torchcodec"
    ]
    assert libraries_for("cv2") == ("cv2",)
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert libraries_for("auto")[-1] == "decord"
    with pytest.raises(
        ConfigError, match=r"opencv-python-headless is not installed; pip install opencv-python-headless"
    ):
        libraries_for("cv2")
    with pytest.raises(DataError, match="videos need pyav"):
        decode_video(even("many key frames"), num_frames=2, libraries=("pyav",))


def test_torchcodec_gives_the_same_frames(tmp_path):
    """In a process of its own that finds FFmpeg's libraries in PyAV's wheel, for want of others."""
    pytest.importorskip("torchcodec")
    folder = Path(av.__file__).parents[1] / "av.libs"
    if not folder.is_dir():
        pytest.skip("PyAV's wheel brings no FFmpeg libraries on this system")
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for library in folder.iterdir():
        (libraries / library.name).symlink_to(library)
        name, _, version = library.name.partition(".so.")
        if name.startswith(("libav", "libsw")):
            plain = libraries / f"{name.rsplit('-', 1)[0]}.so.{version.split('.')[0]}"
            plain.symlink_to(library)
    names = [name for name in EVEN if ("torchcodec", name) not in REFUSED]
    sources = {name: even(name) for name in names} | {"uneven": uneven("mp4"), "turned": turned(even("av1"), 90)}
    for number, data in enumerate(sources.values()):
        (tmp_path / f"{number}.video").write_bytes(data)
    (tmp_path / "99.video").write_bytes(song())
    script = """
import sys
from pathlib import Path
import numpy as np
from vlm_dist.data.media.video import decode_video
from vlm_dist.data.media.video_readers import libraries_for
from vlm_dist.errors import ConfigError, SkipSample
folder = Path(sys.argv[1])
try:
    libraries = libraries_for("torchcodec")
except ConfigError as error:
    sys.exit(f"UNUSABLE {error}")
for path in sorted(folder.glob("*.video")):
    try:
        made = decode_video(path.read_bytes(), num_frames=8, libraries=libraries)
    except SkipSample as skip:
        print(path.stem, "skipped", skip.message)
    else:
        np.savez(path.with_suffix(".npz"), frames=made.frames, indices=made.indices, fps=made.fps)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    if "UNUSABLE" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("99 skipped") and done.stdout.count("\n") == 1
    for number, (name, data) in enumerate(sources.items()):
        made = np.load(tmp_path / f"{number}.npz")
        reference = decode_video(data, num_frames=8, libraries=("pyav",))
        assert tuple(made["indices"]) == reference.indices, name
        if name == "uneven":  # it reckons with a last frame of another length
            times = made["indices"] / made["fps"]
            assert [number_of(frame) for frame in made["frames"]] == [shown_at(t, 0.5 / made["fps"]) for t in times]
            continue
        assert np.abs(made["frames"].astype(int) - reference.frames).max() <= 2, name
        assert float(made["fps"]) == pytest.approx(reference.fps), name


def test_where_another_library_opens_a_video_the_error_says_so():
    with pytest.raises(SkipSample, match=r"decord: .*\. pyav, which is installed, opens it: set video_processing"):
        decode_video(even("av1"), num_frames=2, libraries=("decord",))
    with pytest.raises(SkipSample) as skip:
        decode_video(even("av1")[:300], num_frames=2, libraries=("decord",))
    assert "which is installed" not in skip.value.message
