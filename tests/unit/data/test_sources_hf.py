"""Hugging Face sources: undecoded media by row, whatever column holds them."""

import io
import pickle
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from PIL import Image

from vlm_dist.data.lengths.estimate import estimate_num_tokens
from vlm_dist.data.sources import open_source
from vlm_dist.data.sources.arrow import ArrowSource
from vlm_dist.errors import DataError, SkipSample


@pytest.fixture(autouse=True)
def offline_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets.disable_progress_bars()


def png(side):
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (side % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def pictures():
    rows = {
        "image": [{"bytes": png(28 * (i + 1)), "path": None} for i in range(5)],
        "question": [f"q{i}" for i in range(5)],
        "label": list(range(5)),
    }
    features = datasets.Features(
        {"image": datasets.Image(), "question": datasets.Value("string"), "label": datasets.Value("int64")}
    )
    return datasets.Dataset.from_dict(rows, features=features)


def hf(**settings):
    return SimpleNamespace(type="hf", **settings)


def check(source):
    assert len(source) == 5
    assert source.columns == ("image", "question", "label")
    assert source.read(3).fields == {"image": png(112), "question": "q3", "label": 3}
    lengths = estimate_num_tokens(source.facts(np.arange(5)))
    assert (np.diff(lengths) > 0).all()
    assert pickle.loads(pickle.dumps(source)).read(4).fields["image"] == png(140)


def test_a_saved_data_set(tmp_path, pictures):
    pictures.save_to_disk(tmp_path / "saved")
    source = open_source(hf(path=str(tmp_path / "saved")), tmp_path / "index")
    check(source)
    assert str(source.origin(3)).startswith("saved/")
    assert list((tmp_path / "index" / "hf").iterdir())


def test_a_saved_dictionary_needs_a_split_that_it_has(tmp_path, pictures):
    datasets.DatasetDict({"train": pictures, "test": pictures.select([0])}).save_to_disk(tmp_path / "saved")
    check(open_source(hf(path=str(tmp_path / "saved"), split="train")))
    with pytest.raises(DataError, match=r"no split 'validation'.*train, test"):
        open_source(hf(path=str(tmp_path / "saved"), split="validation"))


def test_a_parquet_file(tmp_path, pictures):
    pictures.to_parquet(tmp_path / "rows.parquet")
    check(open_source(hf(path=str(tmp_path / "rows.parquet"))))
    check(open_source(hf(data_files=str(tmp_path / "*.parquet"), name="my label", split="train")))


def test_the_index_is_used_again(tmp_path, pictures, monkeypatch):
    pictures.save_to_disk(tmp_path / "saved")
    first = open_source(hf(path=str(tmp_path / "saved")), tmp_path / "index")
    monkeypatch.setattr("vlm_dist.data.sources.media.MediaColumns.facts_of", None)
    again = open_source(hf(path=str(tmp_path / "saved")), tmp_path / "index")
    assert again.manifest_hash == first.manifest_hash
    assert again.read(0).fields == first.read(0).fields


def test_a_list_of_images(pictures):
    features = datasets.Features({"images": [datasets.Image()], "text": datasets.Value("string")})
    rows = {"images": [[{"bytes": png(28), "path": None}] * 2, []], "text": ["a", "b"]}
    source = ArrowSource("lists", datasets.Dataset.from_dict(rows, features=features))
    assert source.read(0).fields["images"] == [png(28), png(28)]
    assert source.read(1).fields["images"] == []


def test_a_folder_of_images(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(png(28 + i))
    (folder / "metadata.csv").write_text("file_name,answer\n" + "".join(f"{i}.png,a{i}\n" for i in range(3)))
    source = open_source(hf(name="imagefolder", data_files=str(folder / "*")))
    assert {(source.read(i).fields["image"], source.read(i).fields["answer"]) for i in range(3)} == {
        (png(28 + i), f"a{i}") for i in range(3)
    }


def test_a_column_of_paths_needs_media_root(tmp_path):
    (tmp_path / "a.png").write_bytes(png(28))
    rows = datasets.Dataset.from_dict({"image_path": ["a.png", "a.png"], "answer": ["x", "y"]})
    rows.save_to_disk(tmp_path / "saved")
    settings = hf(path=str(tmp_path / "saved"), media_root=tmp_path)
    assert open_source(settings).read(1).fields == {"image_path": png(28), "answer": "y"}
    with pytest.raises(DataError, match="media_root is not set"):
        open_source(hf(path=str(tmp_path / "saved")))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="none of the 2 media files"):
        open_source(settings)


def test_a_file_that_disappears_is_skipped(tmp_path):
    (tmp_path / "a.png").write_bytes(png(28))
    rows = datasets.Dataset.from_dict({"image": ["a.png"]})
    source = ArrowSource("x", rows, media_root=tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(SkipSample, match="does not exist"):
        source.read(0)


def test_renames_and_limits(pictures):
    source = ArrowSource("x", pictures, renames={"picture": "image"}, max_samples=2)
    assert len(source) == 2
    assert set(source.read(1).fields) == {"picture", "question", "label"}
    assert source.shard_sizes == [2]


def test_a_streamed_data_set_is_refused(pictures):
    with pytest.raises(DataError, match=r"IterableDataset.*vlm-dist shards build --from hf"):
        ArrowSource("x", pictures.to_iterable_dataset())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "./nothing"}, "there is no ./nothing"),
        ({"name": "no-such-owner/no-such-data"}, "cannot load the data set 'no-such-owner/no-such-data'.*network"),
        ({}, "needs path"),
        ({"data_files": __file__ + "*"}, "no ending"),
        ({"data_files": {"train": ["nothing.parquet", "none/*.parquet"]}}, "there is no nothing.parquet and 1 more"),
        ({"path": "train.parquet"}, "there is no train.parquet"),
        ({"path": "tests/nothing"}, "there is no tests/nothing"),
        ({"path": "data/tables/*.parquet"}, "there is no data/tables/.*folder data/tables does not.*data_files"),
    ],
)
def test_data_that_is_not_there(settings, message):
    with pytest.raises(DataError, match=message):
        open_source(hf(**settings))


def test_paths_of_a_builder_lead_nowhere_but_into_the_data_set(tmp_path):
    """An imagefolder's own pictures need no media_root; a path that somebody wrote into a column does."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(28))
    source = open_source(hf(name="imagefolder", data_files=str(folder / "*.png")))
    assert source.read(0).fields["image"] == png(28)
    (tmp_path / "secret.png").write_bytes(png(56))
    features = datasets.Features({"image": datasets.Image()})
    for path in (str(tmp_path / "secret.png"), "../secret.png", str(folder / ".." / "secret.png")):
        rows = datasets.Dataset.from_dict({"image": [{"bytes": None, "path": path}]}, features=features)
        with pytest.raises(DataError, match=r"neither in the data set's own folder .* set media_root"):
            ArrowSource("x", rows, folders=[folder])
    rows = datasets.Dataset.from_dict({"image": [str(tmp_path / "secret.png")]}, features=features)
    assert ArrowSource("x", rows, media_root=tmp_path).read(0).fields["image"] == png(56)


def test_other_values_of_the_same_length_are_other_data(tmp_path):
    def hash_of(labels):
        dataset = datasets.Dataset.from_dict({"question": ["q"] * 4, "label": labels})
        dataset.save_to_disk(tmp_path / "".join(labels))
        return open_source(hf(path=str(tmp_path / "".join(labels))), tmp_path / "index").manifest_hash

    assert hash_of(["3", "3", "5", "5"]) != hash_of(["5", "7", "3", "3"])
