import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tokenlabel.annotate import (
    DenseAnnotator,
    ImageFiles,
    ImageFolder,
    Preprocessing,
    ShardsFailedError,
    Summary,
    annotate,
)
from tokenlabel.annotate.build import timm_annotator
from tokenlabel.storage import TokenLabelError, open_store, verify
from tokenlabel.storage.errors import IncompleteStoreError, PublishError, SettingsError

Digest = Callable[[Path], dict[str, str]]

SMALL: dict[str, Any] = {
    "model": "test_efficientnet",
    "pretrained": False,
    "img_size": 64,
    "batch_size": 2,
    "shard_size": 4,
    "workers": 0,
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten small images in two class folders, with names that trip others up."""
    root = tmp_path / "images"
    generator = np.random.default_rng(0)
    for number in range(10):
        folder = root / ("cats" if number % 2 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"img.v{number} ü.jpg")
    return root


def test_labels_of_real_photographs_are_right_and_faithful(photo_store: Path) -> None:
    store = open_store(photo_store)
    assert len(store) == 20
    assert store["chelsea.jpg"].grid == (9, 9)
    names = store.manifest.class_names
    assert names is not None
    expected = {"chelsea.jpg": "Egyptian cat", "coffee.jpg": "espresso"}
    for key, name in expected.items():
        ids, counts = np.unique(store[key].class_ids[0], return_counts=True)
        assert names[ids[counts.argmax()]] == name
        assert names[store.info(key).pooled[0][0]] == name
    assert 0 < store.statistics.kl_quantization <= 5e-4
    assert 0.1 < store.statistics.kl_full < 0.6
    assert list(verify(photo_store)) == []


def test_the_store_gives_back_the_annotators_distributions(
    photo_store: Path, photos: Path, lite0_checkpoint: Path
) -> None:
    # Image by image and densely, beside the code that annotates.
    annotator = timm_annotator(
        "tf_efficientnet_lite0", checkpoint=lite0_checkpoint, img_size=(288, 288)
    )
    store = open_store(photo_store)
    divergences = []
    for key in ("chelsea.jpg", "Wine_by_Jakkub_Mede.jpg", "rocket.jpg"):
        with Image.open(photos / key) as file:
            pixels = np.asarray(file.convert("RGB").resize((288, 288), Image.Resampling.BICUBIC))
        x = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            cells = annotator.network.locations(annotator.network.features(x))
            scores = annotator.network.classify(cells.flatten(0, 2)).double()
        p = scores.softmax(dim=1).numpy()  # [81, 1000]
        q = store[key].probabilities().reshape(1000, 81).T
        kept = np.full_like(p, 0.0)
        for cell, row in enumerate(p):
            top = np.argsort(-row)[:5]
            kept[cell] = (1 - row[top].sum()) / 995
            kept[cell, top] = row[top]
            stored = store[key].class_ids.reshape(5, 81)[:, cell]
            present = store[key].logits.reshape(5, 81)[:, cell] > 0
            assert list(stored[present]) == list(top[: present.sum()])
        divergences.append((kept * np.log(kept / q)).sum(axis=1).mean())
        full = (p * np.log(p / q)).sum(axis=1).mean()
        assert store.info(key).kl_full == pytest.approx(full, rel=1e-3)
        assert store.info(key).kl_quantization == pytest.approx(divergences[-1], rel=0.05)
    assert np.mean(divergences) <= 5e-4


def test_one_and_two_ray_workers_make_the_same_store(
    photos: Path,
    lite0_checkpoint: Path,
    photo_store: Path,
    tmp_path: Path,
    tree_digest: Digest,
) -> None:
    for workers in (1, 2):
        summary = annotate(
            photos,
            tmp_path / str(workers),
            model="tf_efficientnet_lite0",
            checkpoint=lite0_checkpoint,
            img_size=288,
            batch_size=4,
            shard_size=8,
            workers=workers,
        )
        assert summary.labelled == 20
        assert tree_digest(tmp_path / str(workers)) == tree_digest(photo_store)


def test_a_run_in_this_process_leaves_torchs_threads_as_they_were(
    images: Path, tmp_path: Path
) -> None:
    def threads_of_a_new_thread() -> int:
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(torch.get_num_threads).result()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        annotate(images, tmp_path / "labels", **SMALL)
        assert (torch.get_num_threads(), threads_of_a_new_thread()) == (2, 2)
    finally:
        torch.set_num_threads(before)


def test_running_again_changes_nothing(images: Path, tmp_path: Path, tree_digest: Digest) -> None:
    out = tmp_path / "labels"
    annotate(images, out, **SMALL)
    before = tree_digest(out)
    summary = annotate(images, out, **SMALL)
    assert (summary.already_done, summary.labelled) == (10, 0)
    assert tree_digest(out) == before


def test_a_run_goes_on_where_it_stopped(images: Path, tmp_path: Path, tree_digest: Digest) -> None:
    annotate(images, tmp_path / "whole", **SMALL)

    def stop(done: int, _total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    out = tmp_path / "labels"
    with pytest.raises(TokenLabelError, match="4 images this run labelled are kept"):
        annotate(images, out, progress=stop, **SMALL)
    with pytest.raises(IncompleteStoreError, match="1 of 3 shards"):
        open_store(out)
    assert annotate(images, out, **SMALL).already_done == 4
    assert tree_digest(out) == tree_digest(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "batch_size: 2 in the store, now 3"),
        ({"top_k": 3}, "top_k: 5 in the store, now 3"),
        ({"view": "center"}, "view: stretch in the store, now center"),
        ({"img_size": 96}, r"input_size: \[64, 64\] in the store, now \[96, 96\]"),
        ({"amp": "bf16"}, "amp: none in the store, now bf16"),
        ({"model": "test_resnet"}, "model: test_efficientnet in the store, now test_resnet"),
    ],
)
def test_other_settings_are_refused_by_name(
    images: Path, tmp_path: Path, tree_digest: Digest, change: dict[str, Any], named: str
) -> None:
    annotate(images, tmp_path / "labels", **SMALL)
    before = tree_digest(tmp_path / "labels")
    with pytest.raises(SettingsError, match=named):
        annotate(images, tmp_path / "labels", **(SMALL | change))
    assert tree_digest(tmp_path / "labels") == before


def test_a_changed_source_is_refused_with_what_changed(images: Path, tmp_path: Path) -> None:
    annotate(images, tmp_path / "labels", **SMALL)
    (images / "cats" / "img.v1 ü.jpg").rename(images / "cats" / "new.jpg")
    with pytest.raises(SettingsError, match=r"1 samples gone .*v1.* and 1 new samples .*new\.jpg"):
        annotate(images, tmp_path / "labels", **SMALL)


def test_failed_images_are_recorded_and_the_others_labelled(images: Path, tmp_path: Path) -> None:
    annotate(images, tmp_path / "sound", **SMALL)
    good = (images / "cats" / "img.v1 ü.jpg").read_bytes()
    (images / "cats" / "img.v1 ü.jpg").write_bytes(good[: len(good) // 2])
    (images / "cats" / "img.v3 ü.jpg").write_text("not an image")
    (images / "dogs" / "img.v0 ü.jpg").unlink()
    (images / "dogs" / "img.v0 ü.jpg").symlink_to(tmp_path / "nowhere")
    (images / "dogs" / "img.v2 ü.jpg").write_bytes(b"")
    out = tmp_path / "labels"
    summary = annotate(images, out, **SMALL)
    store = open_store(out)
    assert summary.failures == store.failures
    assert {key: reason.split(";")[0].split("(")[0] for key, reason in store.failures.items()} == {
        "cats/img.v1 ü.jpg": "cannot be decoded: image file is truncated ",
        "cats/img.v3 ü.jpg": "not an image that can be decoded",
        "dogs/img.v0 ü.jpg": "cannot be read: no such file or directory",
        "dogs/img.v2 ü.jpg": "not an image that can be decoded",
    }
    assert len(store) == summary.labelled == 6
    assert list(verify(out)) == []
    # The others are what they are without the failures.
    sound = open_store(tmp_path / "sound")
    for key in store.keys():  # noqa: SIM118 - a store is no mapping
        assert np.array_equal(store[key].class_ids, sound[key].class_ids)
        assert np.array_equal(store[key].logits, sound[key].logits)


def test_class_folders_are_kept(images: Path, tmp_path: Path) -> None:
    annotate(images, tmp_path / "labels", **SMALL)
    store = open_store(tmp_path / "labels")
    assert store.manifest.source["classes"] == ["cats", "dogs"]
    assert store.info("cats/img.v1 ü.jpg").target == "cats"
    assert store.info("dogs/img.v0 ü.jpg").target == "dogs"


def test_exif_rotated_images_are_labelled_upright(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    upright = Image.fromarray(generator.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "images"
    root.mkdir()
    upright.save(root / "upright.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "rotated.png", exif=exif)
    annotate(root, tmp_path / "labels", **SMALL)
    store = open_store(tmp_path / "labels")
    assert np.array_equal(store["rotated.png"].logits, store["upright.png"].logits)
    assert store.info("rotated.png").orientation == 6
    assert store.info("rotated.png").size == (64, 48)


class Coded:
    """An annotator that puts class `ids[r][c]` at row r, column c."""

    def __init__(self, ids: list[list[int]], num_classes: int) -> None:
        self.ids = torch.tensor(ids)
        self.num_classes = num_classes

    def __call__(self, images: Tensor) -> Tensor:
        scores = torch.zeros((self.num_classes, *self.ids.shape))
        scores.scatter_(0, self.ids[None], 20.0)
        return scores.expand(len(images), *scores.shape)


def test_large_class_ids_survive(images: Path, tmp_path: Path) -> None:
    ids = [[0, 2047, 2048], [2049, 21_840, 65_536]]
    annotator = DenseAnnotator.from_callable(Coded(ids, 65_537), Preprocessing((32, 48)), 65_537)
    annotate(images, tmp_path / "labels", **(SMALL | {"model": annotator, "img_size": None}))
    store = open_store(tmp_path / "labels")
    assert store[0].class_ids[0].tolist() == ids
    assert store.read([3]).class_ids[0, 0].tolist() == ids


def test_two_classes_keep_one_entry(images: Path, tmp_path: Path) -> None:
    annotator = DenseAnnotator.from_callable(Coded([[0, 1]], 2), Preprocessing((8, 16)), 2)
    annotate(images, tmp_path / "labels", **(SMALL | {"model": annotator, "img_size": None}))
    found = open_store(tmp_path / "labels")[0]
    assert found.class_ids.shape == (1, 1, 2)
    assert found.probabilities()[:, 0, 1] == pytest.approx([0, 1], abs=1e-6)


def test_views_are_stored_with_each_map(images: Path, tmp_path: Path) -> None:
    for view in ("letterbox", "center"):
        annotate(images, tmp_path / view, **(SMALL | {"view": view}))
        store = open_store(tmp_path / view)
        width, height = store.info(0).size
        x0, y0, x1, y1 = store[0].view.box
        # pixels stay square, to the rounding of a pixel
        assert (x1 - x0) * width == pytest.approx((y1 - y0) * height, rel=0.03)
        assert store.read([0]).boxes[0].tolist() == [x0, y0, x1, y1]


def test_padding_does_not_depend_on_the_images_before(photos: Path, tmp_path: Path) -> None:
    settings = SMALL | {"view": "letterbox", "batch_size": 1}
    annotate(photos, tmp_path / "all", **settings)
    alone = ImageFiles([("sunset", photos / "sunset_by_Aitzol_Berasategi.jpg")])
    annotate(alone, tmp_path / "alone", **settings)
    among = open_store(tmp_path / "all")["sunset_by_Aitzol_Berasategi.jpg"]
    assert np.array_equal(among.logits, open_store(tmp_path / "alone")["sunset"].logits)
    assert np.array_equal(among.class_ids, open_store(tmp_path / "alone")["sunset"].class_ids)


def test_a_dry_run_writes_nothing(images: Path, tmp_path: Path) -> None:
    summary = annotate(images, tmp_path / "labels", dry_run=True, **SMALL)
    assert (summary.samples, summary.settings.num_shards) == (10, 3)
    assert not (tmp_path / "labels").exists()


def test_a_dry_run_refuses_what_a_run_would_refuse(images: Path, tmp_path: Path) -> None:
    annotate(images, tmp_path / "labels", **SMALL)
    with pytest.raises(SettingsError, match="top_k: 5 in the store, now 3"):
        annotate(images, tmp_path / "labels", dry_run=True, **(SMALL | {"top_k": 3}))
    with pytest.raises(SettingsError, match="holds other files"):
        annotate(images, images, dry_run=True, **SMALL)


def test_links_in_circles_are_followed_once(images: Path) -> None:
    before = sorted(key for key, _ in ImageFolder(images).samples())
    (images / "cats" / "up").symlink_to(images)
    (images / "self").symlink_to(images)
    assert sorted(key for key, _ in ImageFolder(images).samples()) == before
    (images / "more").symlink_to(images / "dogs")  # a link that is no circle is followed
    assert len(list(ImageFolder(images).samples())) == len(before) + 5


def test_a_pipe_among_the_images_is_a_failed_image(images: Path, tmp_path: Path) -> None:
    os.mkfifo(images / "dogs" / "pipe.jpg")
    failures = annotate(images, tmp_path / "labels", **SMALL).failures
    assert failures == {"dogs/pipe.jpg": "cannot be read: not a regular file"}


def test_batches_are_never_larger_than_a_shard(images: Path, tmp_path: Path) -> None:
    summary = annotate(images, tmp_path / "labels", **(SMALL | {"batch_size": 10**9}))
    assert summary.settings.batch_size == 4
    assert summary.labelled == 10


def test_bad_input_is_refused_before_work_is_wasted(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "labels"
    empty = tmp_path / "empty"
    empty.mkdir()
    twice = ImageFiles([("a", images / "a.jpg"), ("b", images / "b.jpg"), ("a", images / "c.jpg")])
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (empty, {}, r"empty: no images below this folder; looked for \.jpeg, \.jpg"),
        (tmp_path / "none", {}, "none: no such folder of images"),
        (twice, {}, r"two samples with the key 'a' \(number 0 and 2\)"),
        (images, {"view": "middle"}, "'middle' is none of stretch, letterbox, center"),
        (images, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (images, {"device": "cuda:9"}, "cuda:9"),
        (images, {"device": "abacus"}, "abacus"),
        (images, {"device": "meta"}, "'meta' cannot be used here"),
        (images, {"amp": "int2"}, "'int2' is none of auto, none, bf16, fp16"),
        (images, {"class_names": ["a", "b"]}, "2 class names for 1000 classes"),
        (images, {"model": "nothing"}, "timm has no model 'nothing'"),
    ]
    for source, change, message in cases:
        with pytest.raises(TokenLabelError, match=message) as caught:
            annotate(source, out, **(SMALL | change))
        assert "\n" not in str(caught.value)
    assert not (out / "manifest.json").exists()


def test_a_folder_with_other_files_is_left_alone(images: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"holds other files \('cats'\)"):
        annotate(images, images, **SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(PublishError, match="cannot write here"):
        annotate(images, tmp_path / "file", **SMALL)


class Moody:
    """A source whose reading breaks the worker for one key, as native code would."""

    def __init__(self, root: Path) -> None:
        self.folder = ImageFolder(root)

    def samples(self) -> Iterator[tuple[str, int]]:
        return self.folder.samples()

    def read(self, key: str) -> bytes:
        if key.startswith("dogs/img.v8"):
            os.abort()
        return self.folder.read(key)

    def describe(self) -> dict[str, Any]:
        return self.folder.describe()


def test_a_shard_that_kills_its_worker_is_set_aside_and_the_rest_kept(
    images: Path, tmp_path: Path
) -> None:
    from ray import cloudpickle

    # This module is no import for a worker, so the source travels by value.
    module = __import__("sys").modules[Moody.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        with pytest.raises(ShardsFailedError, match=r"1 of 3 shards failed.*its worker died"):
            annotate(Moody(images), tmp_path / "labels", **(SMALL | {"workers": 2}))
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    store = open_store(tmp_path / "labels", allow_partial=True)
    assert store.committed_shards == 2
    # With the trouble gone the same command finishes the store.
    summary = annotate(images, tmp_path / "labels", **SMALL)
    assert isinstance(summary, Summary)
    assert list(verify(tmp_path / "labels")) == []


def test_moving_a_store_keeps_it_whole(images: Path, tmp_path: Path) -> None:
    annotate(images, tmp_path / "labels", **SMALL)
    shutil.move(tmp_path / "labels", tmp_path / "elsewhere")
    assert list(verify(tmp_path / "elsewhere")) == []
    assert annotate(images, tmp_path / "elsewhere", **SMALL).already_done == 10
