"""Features from video: the right frames at the right seconds, whole files or none, and one line for what is wrong."""

import json
import os
import resource
import shutil
import struct
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, wait
from fractions import Fraction
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

av = pytest.importorskip("av")
try:
    import torchvision
except (ImportError, RuntimeError) as error:  # not installed, or built for another PyTorch
    torchvision, WHY = None, f"torchvision cannot be imported: {error}"
else:
    WHY = ""
needs_torchvision = pytest.mark.skipif(torchvision is None, reason=WHY)

from selfdetr import video  # noqa: E402
from selfdetr.data import DataError, TimeGrid, load_dataset, read_annotations  # noqa: E402
from selfdetr.data.releases import read_settings  # noqa: E402
from selfdetr.inference import detect  # noqa: E402
from selfdetr.model import ModelConfig, SelfDETR  # noqa: E402
from selfdetr.video import Extractor, VideoError, _Header, extract, extract_videos, find_videos, read_frames  # noqa: E402

HEIGHT, WIDTH = 32, 48
NTSC = Fraction(30000, 1001)


def grey(value, height=HEIGHT, width=WIDTH):
    return np.full((height, width, 3), value, dtype=np.uint8)


def write(path, frames, fps=25, codec="mpeg4", times=None, sound=False, container=None):
    "A video; `times` in seconds where the rate is not constant."
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = frames[0].shape[:2]
        stream.bit_rate = 2_000_000
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if sound:
            audio = out.add_stream("pcm_s16le", rate=8000)
            audio.layout = "mono"
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            wave.sample_rate, wave.pts = 8000, 0
            out.mux(audio.encode(wave))
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = round(1000 * times[number]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return Path(path)


def flashes(path, frames, bright, **how):
    return write(path, [grey(255 if i in bright else 0) for i in range(frames)], **how)


def plain(frames):  # (frames, 3, height, width) uint8 -> (3, frames, height, width)
    return (frames.float() / 255).transpose(0, 1)


class Brightest(nn.Module):
    "The brightest moment of a snippet, twice: as if there were two channels."
    def forward(self, clips):
        return clips.mean(dim=(1, 3, 4)).amax(dim=1)[:, None].repeat(1, 2)


def make(half=False, name="brightest"):
    return Extractor(Brightest(), plain, name=name, weights="none", half=half)


def wanted_steps(frames, snippet, stride):
    return max(0, (frames - snippet) // stride + 1)


def extract_all(places, folder, extractor=None, **options):
    return extract_videos(find_videos(places), folder, extractor or make(), progress=False, **options)


@pytest.fixture
def films(tmp_path):
    "A folder of three good videos."
    folder = tmp_path / "films"
    folder.mkdir()
    for number, name in enumerate(("a.mp4", "b.mkv", "c.avi")):
        flashes(folder / name, 40 + 10 * number, {20})
    for name in ("notes.txt", "._a.mp4"):  # neither is taken for a video
        (folder / name).write_text("no video")
    return folder


# Time: a flash at a known second is in the right steps.

@pytest.mark.parametrize("codec, suffix, fps", [
    ("mpeg4", "mp4", NTSC), ("libx264", "mp4", 25), ("libx264", "mkv", NTSC), ("ffv1", "mkv", 25),
    ("mpeg2video", "ts", NTSC), ("mpeg4", "avi", 25)])
def test_a_flash_is_in_the_steps_that_look_at_it(tmp_path, codec, suffix, fps):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    flash, frames = 61, 100
    path = flashes(tmp_path / f"film.{suffix}", frames, {flash}, fps=fps, codec=codec)
    for stride in (4, 8, 16):
        grid = TimeGrid(float(fps), stride, 16)
        features, number = extract(path, make(), grid)
        assert number == frames and features.shape == (wanted_steps(frames, 16, stride), 2)
        seen = np.flatnonzero(features[:, 0] > 0.5)
        assert seen.tolist() == [i for i in range(len(features)) if i * stride <= flash < i * stride + 16]
        seconds = (flash + 0.5) / float(fps)  # the middle of its time on screen
        assert (np.abs(grid.to_seconds(seen) - seconds) < 8 / float(fps)).all()
        assert abs(grid.to_steps(seconds) - seen.mean()) <= 0.5


@pytest.mark.parametrize("fps", [5, 12, 25, 30, 60])
def test_another_frame_rate_keeps_the_seconds(tmp_path, fps):
    path = flashes(tmp_path / "film.mp4", 90, range(30, 45), fps=30)  # bright from 1.0 to 1.5 seconds
    bright = np.array([frame.mean() > 128 for frame in read_frames(path, fps)])
    assert len(bright) == 3 * fps
    times = np.arange(len(bright)) / fps
    assert np.array_equal(bright, (times >= 1 - 0.25 / 30) & (times < 1.5 - 0.25 / 30))
    features, _ = extract(path, make(), TimeGrid(fps, 1, 2))
    seen = TimeGrid(fps, 1, 2).to_seconds(np.flatnonzero(features[:, 0] > 0.5))
    assert abs(seen.min() - 1) <= 1 / fps + 0.25 / 30 and abs(seen.max() - 1.5) <= 1 / fps + 0.25 / 30


def test_frames_at_uneven_times_are_shown_for_as_long_as_they_were(tmp_path):
    times = [i / 30 for i in range(30)] + [1 + i / 10 for i in range(20)]  # thirty a second, then ten
    path = flashes(tmp_path / "film.mkv", 50, range(30, 35), fps=30, codec="ffv1", times=times)
    bright = [frame.mean() > 128 for frame in read_frames(path, 30)]
    assert 88 <= len(bright) <= 91 and np.flatnonzero(bright).tolist() == list(range(30, 45))


@settings(max_examples=60)
@given(gaps=st.lists(st.floats(0.001, 0.3), min_size=0, max_size=30), fps=st.floats(2, 70), begin=st.floats(-1, 100))
def test_at_rate_is_what_is_on_screen(gaps, fps, begin):
    times = np.concatenate([[0.0], np.cumsum(gaps)])
    interval = float(np.mean(gaps)) if gaps else 0.04
    shown = list(video._at_rate(((begin + time, i) for i, time in enumerate(times)), fps, interval))
    for slot, number in enumerate(shown):
        assert times[number] <= slot / fps + interval / 4 + 1e-6
        assert number + 1 == len(times) or times[number + 1] > slot / fps + interval / 4 - 1e-6
    assert abs(len(shown) / fps - (times[-1] + 0.75 * interval)) <= 1 / fps + 1e-6


@settings(max_examples=30)
@given(fps=st.sampled_from([10, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 119.88]), frames=st.integers(1, 3000),
       digits=st.sampled_from([3, 4, 9]))
def test_rounded_time_stamps_neither_double_nor_drop_a_frame(fps, frames, digits):
    timed = ((round(i / fps, digits), i) for i in range(frames))
    assert list(video._at_rate(timed, fps, 1 / fps)) == list(range(frames))


# Steps: as many as there are whole snippets, and what is in them.

@settings(max_examples=80)
@given(frames=st.integers(0, 90), snippet=st.integers(1, 20), stride=st.integers(1, 24), batch=st.integers(1, 9))
def test_snippets_of_every_length(frames, snippet, stride, batch):
    pictures = [torch.full((3, 1, 1), i) for i in range(frames)]
    batches = list(video._snippets(iter(pictures), snippet, stride, batch))
    assert all(len(each) == batch for each in batches[:-1])
    found = [clip[0, :, 0, 0].tolist() for each in batches for clip in each]
    steps = wanted_steps(frames, snippet, stride)
    assert found == [list(range(i * stride, i * stride + snippet)) for i in range(steps)]


@pytest.mark.parametrize("frames", [15, 16, 17, 19, 20, 31, 32])
def test_steps_and_duration_of_short_videos(tmp_path, frames):
    path = flashes(tmp_path / "film.mp4", frames, {3})
    if frames < 16:
        with pytest.raises(VideoError, match=r"film\.mp4: has 15 frames at 25 a second, less than a snippet of 16"):
            extract(path, make(), TimeGrid(25, 4, 16))
        return
    extract_all([path], tmp_path / "data")
    entry = video.read_video_entries(tmp_path / "data")["film"]
    assert entry["steps"] == wanted_steps(frames, 16, 4) and entry["duration"] == frames / 25


def test_the_size_of_a_batch_changes_nothing(tmp_path):
    path = flashes(tmp_path / "film.mp4", 60, {9, 33})
    one, many = (extract(path, make(), TimeGrid(25, 4, 16), batch)[0] for batch in (1, 7))
    assert np.allclose(one, many, atol=1e-6)


def test_nothing_is_kept_of_a_long_video(tmp_path, monkeypatch):
    drawn = count()
    endless = (torch.full((3, 1, 1), next(drawn)) for _ in count())
    first = next(video._snippets(endless, snippet=16, stride=4, batch=3))
    assert len(first) == 3 and next(drawn) == 16 + 2 * 4  # no frame more than the batch needs

    most = {}
    for frames in (60, 240):
        path, alive, peak = flashes(tmp_path / f"{frames}.mp4", frames, {3}), [], [0]

        def watched(frame, alive=alive, peak=peak, upright=video._upright):
            picture = upright(frame)
            alive.append(None)
            weakref.finalize(picture, alive.pop)
            peak[0] = max(peak[0], len(alive))
            return picture

        with monkeypatch.context() as patch:
            patch.setattr(video, "_upright", watched)
            extract(path, make(), TimeGrid(25, 4, 16))
        most[frames] = peak[0]
    assert 1 <= most[60] == most[240] <= 3


# Pictures: colours, sizes, rotation, sound.

def test_pictures_come_back_as_they_were_even_with_odd_sides(tmp_path):
    random = np.random.default_rng(0)
    pictures = list(random.integers(0, 256, (20, 45, 67, 3), dtype=np.uint8))
    path = write(tmp_path / "film.mkv", pictures, codec="ffv1", sound=True)
    assert np.array_equal(list(read_frames(path)), pictures)


def turn(path, degrees):
    "Write a rotation into the track header of an .mp4, as a phone does."
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    place = data.find(b"tkhd") + 4 + 4 + 20 + 16  # version and flags; times, track and duration; layer and volume
    a, b, c, d = (65536 * value for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotation_is_applied(tmp_path, degrees):
    picture = grey(0)
    picture[:16, :24] = 255  # the upper left quarter
    path = write(tmp_path / "film.mp4", [picture] * 3)
    turn(path, degrees)
    frame = next(read_frames(path))
    assert np.abs(frame.astype(int) - np.rot90(picture, -degrees // 90)).mean() < 8  # clockwise


@needs_torchvision
def test_a_frame_is_prepared_as_the_whole_clip_would_be():
    prepare = torchvision.models.get_model_weights("r3d_18").DEFAULT.transforms()
    extractor = Extractor(Brightest(), prepare)
    clip = np.random.default_rng(0).integers(0, 256, (4, 50, 70, 3), dtype=np.uint8)
    whole = prepare(torch.from_numpy(clip).permute(0, 3, 1, 2))
    assert torch.equal(torch.stack([extractor.frame(picture) for picture in clip], dim=1), whole)


# Damage: one video's trouble is its own.

def spoil(kind, path, good):
    if kind == "text":
        path.write_text("not a video")
    elif kind == "empty":
        path.touch()
    elif kind == "cut short":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif kind == "sound only":
        with av.open(str(path), "w") as out:
            audio = out.add_stream("pcm_s16le", rate=8000)
            audio.layout = "mono"
            wave = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            wave.sample_rate, wave.pts = 8000, 0
            out.mux([*audio.encode(wave), *audio.encode(None)])
    else:
        flashes(path, 8, {3})


@pytest.mark.parametrize("kind, says", [
    ("text", "copy it again, or convert it"), ("empty", "copy it again, or convert it"), ("cut short", "copy it again"),
    ("sound only", "no video stream; leave it out"), ("short", "8 frames at 25 a second")])
def test_a_bad_video_is_named_and_the_others_are_done(films, tmp_path, kind, says, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (100, HEIGHT, WIDTH, 3), dtype=np.uint8)
    good = write(tmp_path / "good.mkv", list(noise), codec="ffv1")
    spoil(kind, films / "aa_bad.mkv", good)
    done, failed = extract_all([films], tmp_path / "data")
    assert done == ["a", "b", "c"] and list(failed) == [films / "aa_bad.mkv"]
    message = failed[films / "aa_bad.mkv"]
    assert message.startswith(f"{films / 'aa_bad.mkv'}: ") and says in message and "\n" not in message
    assert sorted(path.name for path in (tmp_path / "data" / "features").iterdir()) == ["a.npy", "b.npy", "c.npy"]
    assert set(video.read_video_entries(tmp_path / "data")) == {"a", "b", "c"}


def test_a_codec_that_nobody_knows(tmp_path):
    path = flashes(tmp_path / "film.mkv", 20, {3}, codec="ffv1")
    path.write_bytes(path.read_bytes().replace(b"FFV1", b"QQQ1"))
    with pytest.raises(VideoError, match="convert it with ffmpeg"):
        next(read_frames(path))


# Names and streams: a name is only a name, and a cover is not the video.

NAMES = ["a%03d.png", "*.mp4", "-", "concat:x.mp4", "http:.mp4", "pipe:0.mp4", "file:x.mp4", "data:,x.mp4",
         "subfile,,start,0,end,9,,:x.mp4", "x.sdp", "x.m3u8", "async:cache:x.mp4", "tab\tx.mp4"]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_a_name_changes_how_a_file_is_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    good = flashes(Path("good.mp4"), 20, {3})
    for number in range(3):  # what a pattern would find
        write(f"a{number:03d}.png", [grey(90)], codec="mpeg4", container="mp4")
    good.rename(name)
    assert [frame.mean() > 128 for frame in read_frames(name)] == [i == 3 for i in range(20)]


PLAYLISTS = {
    "concat": "ffconcat version 1.0\nfile good.ts\n",
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:0.8,\ngood.ts\n#EXT-X-ENDLIST\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
           "a=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("text", PLAYLISTS.values(), ids=PLAYLISTS)
@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list.sdp", "list.ffconcat"])
def test_a_file_opens_no_other_file(tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    flashes(Path("good.ts"), 20, {3}, codec="mpeg2video")
    Path(name).write_text(text)
    begin = time.monotonic()
    with pytest.raises(VideoError, match=r"list\.\w+: cannot be decoded .*convert it with ffmpeg"):
        list(read_frames(name))
    assert time.monotonic() - begin < 5  # sdp: the network was not waited for


def test_what_is_no_file_is_not_opened(films, tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    done, failed = extract_all([films / "a.mp4", tmp_path / "pipe.mp4"], tmp_path / "data")
    assert done == ["a"] and "is a pipe or a device" in failed[tmp_path / "pipe.mp4"]


def mix(path, streams, cover=None):
    "A file of streams (codec, frames); the number of the one, if any, that is marked as a cover."
    with av.open(str(path), "w") as out:
        made = [out.add_stream(codec, rate=25) for codec, _ in streams]
        for number, (stream, (codec, _)) in enumerate(zip(made, streams)):
            stream.height, stream.width = HEIGHT, WIDTH
            stream.pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
            if number == cover:
                stream.disposition = av.stream.Disposition.attached_pic
        for stream, (_, frames) in sorted(zip(made, streams), key=lambda each: len(each[1][1])):
            for value in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(grey(value), format="rgb24")))
        for stream in made:
            out.mux(stream.encode(None))
    return path


FILM = ("mpeg4", [255 if i == 7 else 0 for i in range(30)])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, streams, cover", [
    ("covr.mp4", [("mjpeg", [90]), FILM], 0),  # the atom of iTunes
    ("unmarked.mp4", [("png", [90]), FILM], None),
    ("unmarked.avi", [("mjpeg", [90]), FILM], None),
    ("unmarked.mkv", [("mjpeg", [90]), FILM], None),  # states no number of frames
    ("picture.wmv", [("mjpeg", [90]), ("wmv2", FILM[1])], None),
    ("last.mkv", [FILM, ("mjpeg", [90])], None),
    ("two covers.mp4", [("png", [90]), ("mjpeg", [20]), FILM], None),
])
def test_a_still_picture_is_not_taken_for_the_video(tmp_path, name, streams, cover):
    frames = [frame.mean() for frame in read_frames(mix(tmp_path / name, streams, cover))]
    assert len(frames) == 30 and [i for i, light in enumerate(frames) if light > 128] == [7]


@pytest.mark.parametrize("name, streams, cover", [
    ("one.mp4", [("png", [90])], None), ("two.mkv", [("mjpeg", [90]), ("mjpeg", [20])], None)])
def test_only_still_pictures_are_no_video(tmp_path, name, streams, cover):
    path = mix(tmp_path / name, streams, cover)
    for read in (lambda: next(read_frames(path)), lambda: extract(path, make(), TimeGrid(25, 1, 1))):
        with pytest.raises(VideoError, match="holds only still pictures, such as a cover; leave it out"):
            read()


@pytest.mark.parametrize("name", ["two.mp4", "two.mkv"])
def test_it_is_said_which_of_several_videos_is_taken(tmp_path, name):
    other = ("mpeg4", [200] * 30)
    path = mix(tmp_path / name, [("mjpeg", [90]), FILM, other])
    with pytest.warns(UserWarning, match=rf"{name}: has 2 videos in it; stream 1 is taken.* -map 0:2") as said:
        frames = [frame.mean() for frame in read_frames(path)]
    assert len(said) == 1 and [i for i, light in enumerate(frames) if light > 128] == [7]


def test_only_bad_videos_write_nothing(tmp_path):
    (tmp_path / "bad.mp4").write_text("not a video")
    done, failed = extract_all([tmp_path], tmp_path / "data")
    assert done == [] and len(failed) == 1 and not (tmp_path / "data").exists()


def test_videos_of_other_rates(tmp_path):
    for name, fps in {"a": 30, "b": NTSC, "c": 60}.items():
        flashes(tmp_path / f"{name}.mp4", int(2 * fps), {int(fps)}, fps=fps)
    done, failed = extract_all([tmp_path], tmp_path / "data")
    assert done == ["a", "b"] and "has 60 frames a second, the folder 30; give --fps" in failed[tmp_path / "c.mp4"]
    assert read_settings(tmp_path / "data")["fps"] == 30
    assert extract_all([tmp_path], tmp_path / "data", fps=30.0)[0] == ["c"]
    for name in "abc":  # all flash at one second
        seen = np.flatnonzero(np.load(tmp_path / "data" / "features" / f"{name}.npy")[:, 0] > 0.5)
        assert seen.tolist() == [4, 5, 6, 7]  # frames 16 to 32, ..., 28 to 44: those with frame 30


def test_a_rate_or_length_that_no_header_states(films, tmp_path, monkeypatch):
    assert video._choose_rate({Path("x"): _Header(0.0, 0.0)}, None, None)[1] == {
        Path("x"): "x: does not state its frame rate; give --fps"}
    monkeypatch.setattr(video, "_read_header", lambda *video: _Header(25.0, 0.0))
    assert len(extract_all([films], tmp_path / "data")[0]) == 3
    monkeypatch.setattr(video, "_read_header", lambda *video: _Header(0.0, 0.0))
    assert len(extract_all([films], tmp_path / "other", fps=25.0)[0]) == 3
    with pytest.raises(VideoError, match="give --fps"):
        next(read_frames(films / "a.mp4"))


# Resuming: complete videos are left alone, anything else is done again.

def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "features").iterdir()}


def test_a_second_run_does_only_what_is_missing(films, tmp_path):
    data = tmp_path / "data"
    assert extract_all([films / "a.mp4", films / "b.mkv"], data)[0] == ["a", "b"]
    before = stamps(data)
    part = data / "features" / ".c.npy.0123.part"
    part.write_bytes(b"left by a run that was stopped")
    os.utime(part, (time.time() - 7200,) * 2)
    assert extract_all([films], data) == (["c"], {})
    assert {name: stamps(data)[name] for name in before} == before and not list(data.rglob("*.part"))
    (data / "features" / "a.npy").unlink()
    whole = (data / "features" / "b.npy").read_bytes()
    (data / "features" / "b.npy").write_bytes(whole[:-8])
    video._write_json(data / "videos.json", {"database": {
        name: entry for name, entry in video.read_video_entries(data).items() if name != "c"}})
    assert extract_all([films], data)[0] == ["a", "b", "c"]
    assert (data / "features" / "b.npy").read_bytes() == whole
    assert extract_all([films], data, overwrite=True)[0] == ["a", "b", "c"]


def test_an_interrupted_run_leaves_whole_files_only(films, tmp_path, monkeypatch):
    real = video.read_frames

    def stop_in_b(path, fps):
        for number, frame in enumerate(real(path, fps)):
            if Path(path).stem == "b" and number == 30:
                raise KeyboardInterrupt
            yield frame

    with monkeypatch.context() as patch:
        patch.setattr(video, "read_frames", stop_in_b)
        with pytest.raises(KeyboardInterrupt):
            extract_all([films], tmp_path / "data")
    assert list(stamps(tmp_path / "data")) == ["a.npy"] and set(video.read_video_entries(tmp_path / "data")) == {"a"}
    assert extract_all([films], tmp_path / "data")[0] == ["b", "c"]


def test_a_folder_has_features_of_one_kind(films, tmp_path):
    data = tmp_path / "data"
    extract_all([films], data)
    for other in ({"stride": 8}, {"snippet": 8}, {"fps": 5.0}, {"extractor": make(half=True)},
                  {"extractor": make(name="other")}):
        with pytest.raises(DataError, match="give another folder, or --overwrite with all of its videos"):
            extract_all([films], data, **other)
        with pytest.raises(DataError, match="--overwrite with all"):
            extract_all([films / "a.mp4"], data, overwrite=True, **other)
    assert extract_all([films], data, stride=8, overwrite=True)[0] == ["a", "b", "c"]
    assert read_settings(data)["stride"] == 8 and extract_all([films], data, stride=8) == ([], {})


def test_old_features_stay_until_new_ones_can_be_made(films, tmp_path):
    data = tmp_path / "data"
    extract_all([films], data)
    before, settings = stamps(data), read_settings(data)
    with pytest.raises(DataError, match="sixteen: cannot take 8 snippets of 8 frames"):
        extract_all([films], data, Extractor(nn.Conv3d(3, 2, (16, 1, 1)), plain, "sixteen"), snippet=8, overwrite=True)
    assert stamps(data) == before and read_settings(data) == settings


@pytest.mark.parametrize("moment, turns, overwrite", [("extract", [True], False), ("_claim_folder", [True], False),
                                                      ("extract", [False, True], True)])  # one video is done
def test_of_two_runs_with_other_settings_one_is_refused(films, tmp_path, monkeypatch, moment, turns, overwrite):
    real, turn, data, others = getattr(video, moment), iter(turns), tmp_path / "data", []

    def meanwhile(*given):
        result = real(*given)
        if next(turn, False):  # the other run ends, or waits for this one
            others.append(pool.submit(extract_all, [films], data, stride=8, overwrite=overwrite))
            wait(others, timeout=0.5 if moment == "_claim_folder" else 60)
        return result

    monkeypatch.setattr(video, moment, meanwhile)
    with ThreadPoolExecutor(1) as pool, pytest.raises(DataError, match="has features with stride ., these would have"):
        extract_all([films], data, overwrite=overwrite)
        others[0].result()
    entries, stride = video.read_video_entries(data), read_settings(data)["stride"]
    made = {path.stem: len(np.load(path)) for path in (data / "features").iterdir()}
    assert made == {name: wanted_steps(entries[name]["frames"], 16, stride) for name in "abc"}


def test_runs_may_share_a_folder(films, tmp_path):
    copies = [shutil.copy(films / "a.mp4", tmp_path / f"v{i}.mp4") for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: extract_all([path], tmp_path / "data"), copies))
    assert len(video.read_video_entries(tmp_path / "data")) == 24 and not list(tmp_path.rglob("*.part"))


def test_two_runs_that_write_one_video_leave_it_whole(tmp_path, monkeypatch):
    real = os.replace

    def write_again(part, path):
        monkeypatch.setattr(os, "replace", real)
        video._save_features(tmp_path, "v", np.ones((3, 2), np.float32), 28, 25.0)  # the other run, meanwhile
        real(part, path)

    monkeypatch.setattr(os, "replace", write_again)
    (tmp_path / "features").mkdir()
    video._save_features(tmp_path, "v", np.zeros((3, 2), np.float32), 28, 25.0)
    assert not np.load(tmp_path / "features" / "v.npy").any() and not list(tmp_path.rglob("*.part"))


def test_a_folder_that_is_full_is_named(tmp_path):
    (tmp_path / "features").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        for write in (lambda: video._save_features(tmp_path, "v", np.zeros((30, 2), np.float32), 28, 25.0),
                      lambda: video._write_json(tmp_path / "videos.json", {"database": "x" * 200})):
            with pytest.raises(OSError, match=r"v.* cannot be written \(File too large\); make room there"):
                write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.rglob("*")] == ["features"]


def test_half_precision(films, tmp_path):
    extract_all([films], tmp_path / "half", make(half=True))
    extract_all([films], tmp_path / "full")
    half, full = (np.load(tmp_path / name / "features" / "a.npy") for name in ("half", "full"))
    assert half.dtype == np.float16 and full.dtype == np.float32 and np.allclose(half, full, atol=1e-3)

    class Huge(Brightest):
        def forward(self, clips):
            return 1e6 * super().forward(clips)

    with pytest.raises(VideoError, match=r"a\.mp4: has NaN or infinite values.*leave out --half"):
        extract(films / "a.mp4", Extractor(Huge(), plain, half=True), TimeGrid(25, 4, 16))


# Networks.

CHANNELS = {"mc3_18": 512, "mvit_v1_b": 768, "mvit_v2_s": 768, "r2plus1d_18": 512, "r3d_18": 512, "s3d": 1024,
            "swin3d_b": 1024, "swin3d_s": 768, "swin3d_t": 768}


@needs_torchvision
@pytest.mark.parametrize("name", CHANNELS)
def test_networks_of_torchvision_without_their_heads(name):
    with torch.device("meta"):  # shapes alone, nothing is computed
        network, prepare, weights = video._torchvision_network(name, "none")
        out = network.eval()(torch.zeros(2, 3, 16, *prepare.crop_size))
    assert out.shape == (2, CHANNELS[name]) and weights == "random"


@needs_torchvision
def test_weights_are_loaded_without_unpickling(monkeypatch):
    asked, donor = [], torchvision.models.get_model("r3d_18")

    def fetch(url, **options):
        asked.append((url, options))
        return donor.state_dict()

    monkeypatch.setattr(sys.modules["torchvision.models._api"], "load_state_dict_from_url", fetch)
    network, _, name = video._torchvision_network("r3d_18", "DEFAULT")
    assert name == "KINETICS400_V1" and asked[0][1]["weights_only"] is True and asked[0][1]["check_hash"] is True
    assert torch.equal(network.stem[0].weight, donor.stem[0].weight) and isinstance(network.fc, nn.Identity)

    def offline(url, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(sys.modules["torchvision.models._api"], "load_state_dict_from_url", offline)
    with pytest.raises(DataError, match=r"no route to host\); fetch them .*/checkpoints/r3d_18-.*\.pth"):
        video._torchvision_network("r3d_18", "KINETICS400_V1")


def test_random_weights_are_the_same_every_time_and_said_aloud(hub, capsys):
    before = torch.get_rng_state()
    one, two = (video.make_extractor(f"hub:{hub}:small", "none", "cpu") for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.network[0].weight, two.network[0].weight) and "RANDOM WEIGHTS" in capsys.readouterr().err
    clips = torch.rand(2, 3, 16, 224, 224)
    assert one(clips).shape == (2, 4) and not one.network.training
    assert not any(weight.requires_grad for weight in one.network.parameters())


@pytest.mark.parametrize("spec, weights, says", [
    ("{hub}:large", "none", "torch.hub cannot load it"), ("{hub}:small", "DEFAULT", "ValueError: no weights here"),
    (":small", "none", "write hub:owner/repo:model"), ("nobody/nothing:", "none", "write hub:owner/repo:model")])
def test_networks_that_torch_hub_does_not_give(hub, spec, weights, says):
    with pytest.raises(DataError, match=says):
        video._hub_network(f"hub:{spec.format(hub=hub)}", weights)


def test_a_repository_is_not_trusted_unasked(monkeypatch):
    def load(repo, model, **options):
        assert repo == "owner/repo:branch" and options["source"] == "github" and "trust_repo" not in options
        raise EOFError  # what input() raises where there is no terminal

    monkeypatch.setattr(torch.hub, "load", load)
    with pytest.raises(DataError, match="asks whether you trust owner/repo:branch; run this once in a terminal"):
        video._hub_network("hub:owner/repo:branch:model", "DEFAULT")


def test_a_snippet_that_a_network_cannot_take(films, tmp_path):
    extractor = Extractor(nn.Conv3d(3, 2, (16, 1, 1)), plain, name="sixteen")
    with pytest.raises(DataError, match="sixteen: cannot take 8 snippets of 8 frames .* change --snippet") as caught:
        extract_all([films], tmp_path / "data", extractor, snippet=8)
    assert not isinstance(caught.value, VideoError)  # every video would fail in the same way


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "a\x1bb", "a\\b"])
def test_a_name_that_no_data_set_may_have_is_refused(tmp_path, name):
    (tmp_path / f"{name}.mp4").touch()
    for place in (tmp_path, tmp_path / f"{name}.mp4"):
        with pytest.raises(DataError, match="is no name inside the folder") as caught:
            find_videos([place])
        assert "\n" not in str(caught.value)


# What is asked for, and what is missing.

@needs_torchvision
@pytest.mark.parametrize("height, width", [(48, 64), (300, 257), (256, 256)])
def test_other_networks_get_what_mvit_v2_s_gets(height, width):
    frames = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wanted = torchvision.models.get_model_weights("mvit_v2_s").DEFAULT.transforms()(frames)
    assert torch.equal(video._as_pytorchvideo(frames), wanted)


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_before_a_network_is_loaded(monkeypatch, device):
    monkeypatch.setattr(video, "_torchvision_network", None)
    with pytest.raises(DataError, match=f"device '{device}'"):
        video.make_extractor("r3d_18", device=device)


def test_a_length_that_is_stated_wrongly(films, tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_read_headers", lambda videos: ({p: _Header(25.0, 0.1) for p in videos.values()}, {}))
    assert len(extract_videos(find_videos([films]), tmp_path / "data", make())[0]) == 3  # the bar runs over its end


def test_without_the_extra(monkeypatch, films):
    for name in ("av", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"av cannot be imported .*pip install 'selfdetr\[video\]'"):
        next(read_frames(films / "a.mp4"))
    with pytest.raises(ImportError, match=r"torchvision cannot be imported .*pip install 'selfdetr\[video\]'"):
        video.make_extractor("r3d_18", "none", "cpu")


# The whole way.

def test_from_video_to_detections(tmp_path):
    films, data = tmp_path / "films", tmp_path / "data"
    films.mkdir()
    for name, frames in {"a.mp4": 90, "b.mkv": 100, "c.avi": 110}.items():
        flashes(films / name, frames, range(15, 25))
    extract_all([films], data)
    entries = video.read_video_entries(data)
    for name, entry in entries.items():
        entry["subset"] = "test" if name == "c" else "training"
        entry["annotations"] = [{"label": "flash", "segment": [0.6, 1.0]}]
    video._write_json(data / "annotations.json", {"database": entries})
    dataset = load_dataset(data)
    grid = TimeGrid(25, 4, 16)
    assert dataset.classes == ("flash",) and dataset.channels == 2 and not any(dataset.report.values())
    assert {v.name: (v.grid, v.duration) for v in dataset.videos} == {
        "a": (grid, 3.6), "b": (grid, 4.0), "c": (grid, 4.4)}
    assert [v.fps for v in read_annotations(data).videos] == [25.0] * 3
    torch.manual_seed(0)
    size = dict(dim=16, heads=2, hidden=16, queries=5, norm_groups=4, encoder_layers=1, decoder_layers=1)
    model = SelfDETR(ModelConfig(channels=2, classes=1, **size))
    features, frames = extract(films / "c.avi", make(), grid)
    found = detect(model, features, grid, dataset.classes)
    assert len(found) and set(found.label) == {"flash"} and (found.end > found.start).all()
    assert found.start.min() >= 0 and found.end.max() <= frames / 25 + 1e-6
    from_folder = detect(model, dataset.features("c"), dataset.videos[2].grid, dataset.classes)
    assert np.allclose(found[["start", "end", "score"]], from_folder[["start", "end", "score"]], atol=1e-5)
    assert json.loads((data / "dataset.json").read_text()) == read_settings(data)
