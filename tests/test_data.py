"""Pictures in: every layout and kind of file, the same crops as torchvision, the same batches for any workers."""
import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import vit
from vit import (Batches, Decoder, Files, InputError, Packed, View, World, crop_boxes, in_order, open_folder, open_images, shapes,
                 uniform)

ONE = World(0, 1, torch.device("cpu"))


def picture(side=(80, 70), seed=0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*side[::-1], 3), np.uint8))


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**dict(data="", seed=0, batch_size=8, micro_batch=8, workers=0, device="cpu", precision="fp32"), **changes})


@pytest.fixture
def tree(tmp_path) -> Path:
    """train/ and val/ with classes b, a and c; hidden files, other files, an empty class."""
    for split, count in (("train", 5), ("val", 2)):
        for name in ("b", "a", "c"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(0 if name == "c" else count):
                picture(seed=i).save(folder / f"{i}.png")
            (folder / ".hidden.png").write_bytes(b"x")
            (folder / "notes.txt").write_text("x")
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / ".ipynb_checkpoints" / "0.png").write_bytes(b"x")
    (tmp_path / "train" / "a" / "deeper").mkdir()
    picture().save(tmp_path / "train" / "a" / "deeper" / "UPPER.JPG")
    return tmp_path


def test_labels_are_the_sorted_folders_of_train_and_hidden_things_are_passed_over(tree, capsys):
    train, val = open_folder(str(tree), "train", True), open_folder(str(tree), "val", True)
    assert train.classes == val.classes == ["a", "b", "c"]
    assert np.bincount(train.labels).tolist() == [6, 5] and np.bincount(val.labels).tolist() == [2, 2]
    assert "class c has no images" in capsys.readouterr().err


def test_class_ids_of_val_are_trains_also_if_a_class_is_missing_there(tree):
    for file in (tree / "val/a").iterdir():
        file.unlink()
    (tree / "val/a").rmdir()
    assert set(open_folder(str(tree), "val", True).labels) == {1}
    (tree / "val/z").mkdir()
    with pytest.raises(InputError, match="classes z are in val/ but not in train/"):
        open_folder(str(tree), "val", True)


def test_pre_training_takes_any_tree(tree, tmp_path_factory):
    assert len(open_folder(str(tree), "train", False)) == 11                    # train/ only
    assert len(open_folder(str(tree / "train" / "b"), "train", False)) == 5     # a flat folder
    mixed = tmp_path_factory.mktemp("mixed")
    picture().save(mixed / "0.png")
    (mixed / "x" / "y").mkdir(parents=True)
    picture().save(mixed / "x" / "y" / "1.png")
    assert len(open_folder(str(mixed), "train", False)) == 2


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        open_folder(str(tmp_path / "nothing"), "train", False)
    with pytest.raises(InputError, match="no images .*jpg"):
        open_folder(str(tmp_path), "train", False)
    with pytest.raises(InputError, match="expected val/<class>/<image>"):
        open_folder(str(tmp_path), "val", True)


def test_a_list_of_names_costs_its_bytes():
    names = np.array([f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG".encode() for i in range(100_000)])
    assert names.dtype.kind == "S" and names.nbytes < 40 * len(names)


# ---- crops

def test_crops_are_distributed_as_torchvisions():
    height, width, scale = 60, 100, (0.2, 1.0)
    ours = crop_boxes(uniform((4000, View.NUMBERS), 0, vit.CROPS, 0), height, width, scale)
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(8, scale=scale), [image])[k]
                       for _ in range(4000) for k in ("top", "left", "height", "width")]).reshape(-1, 4)
    for column in range(4):
        assert np.quantile(ours[:, column], [0.1, 0.5, 0.9]) == pytest.approx(np.quantile(theirs[:, column], [0.1, 0.5, 0.9]), abs=3)
    assert (ours >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize("side, box", [((1, 60), (29, 0, 1, 1)), ((3000, 2), (0, 1498, 2, 3))])
def test_crops_of_extreme_pictures_fall_back_to_the_centre(side, box):
    width, height = side
    ours = crop_boxes(np.full((1, View.NUMBERS), 0.5, np.float32), height, width, (0.9, 1.0))[0]
    assert tuple(ours.astype(int)) == box


@pytest.mark.parametrize("size", [(48, 48), (32, 40), (8, 16)])  # larger, the same, smaller
@pytest.mark.parametrize("scale", [(0.08, 1.0), None])
def test_the_packed_view_is_the_crop_of_every_picture(size, scale):
    images = Packed(torch.randint(0, 256, (30, 3, 32, 40), dtype=torch.uint8), None, None)
    view = View(size, scale)
    numbers = uniform((30, View.NUMBERS), 1, vit.CROPS, 0)
    ours = images.look(np.arange(30), numbers, view)
    boxes, flips = view.boxes(numbers, 32, 40).round().astype(int), view.flips(numbers)
    assert 5 < flips.sum() < 25 if scale else not flips.any()
    for i, box in enumerate(boxes.tolist()):
        expected = TF.resized_crop(images.items[i].float() / 255, *box, list(size),
                                   interpolation=v2.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[i], expected.flip(2) if flips[i] else expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape, view", [((32, 32), View((8, 8), centre=0.01)), ((20, 1), View((16, 64))), ((1, 60), View((64, 8)))])
def test_a_view_of_less_than_a_pixel_is_one_pixel(shape, view):
    images = Packed(torch.full((2, 3, *shape), 51, dtype=torch.uint8), None, None)
    seen = images.look(np.arange(2), np.zeros((2, View.NUMBERS), np.float32), view)
    torch.testing.assert_close(seen, torch.full((2, 3, *view.size), 0.2))
    assert min(images.cut(0, view, np.zeros((1, View.NUMBERS))).shape) >= 1


def test_the_centre_view_of_a_packed_picture_of_its_own_size_is_the_picture():
    images = shapes(4, seed=0)
    ours = images.look(np.arange(4), np.zeros((4, View.NUMBERS), np.float32), View((32, 32)))
    torch.testing.assert_close(ours, images.items.float() / 255, atol=1e-5, rtol=0)


def test_the_centre_view_of_a_file_is_resize_and_centre_crop(tmp_path):
    smooth = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 12, 3), np.uint8)).resize((300, 200), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.png")
    images = Files(np.array([b"a.png"]), None, None, str(tmp_path))
    ours = Decoder(images, View((112, 112), centre=0.875)).look(0, np.zeros((1, View.NUMBERS)))
    whole = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)
    expected = TF.center_crop(TF.resize(whole, [128], interpolation=v2.InterpolationMode.BICUBIC, antialias=True), [112, 112])
    assert (ours.int() - expected.int()).abs().float().mean() < 2.0  # of 255: boxes are cut at whole pixels


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path):
    smooth = Image.fromarray(np.random.RandomState(0).randint(0, 256, (12, 12, 3), np.uint8)).resize((1200, 900), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "a.jpg", quality=95)
    images = Files(np.array([b"a.jpg"]), None, None, str(tmp_path))
    view = argparse.Namespace(size=(64, 64), boxes=lambda numbers, h, w: np.array([[100, 200, 700, 800]]))
    part = images.cut(0, view, np.zeros((1, View.NUMBERS)))
    assert max(part.shape[1:]) <= 200
    whole = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).permute(2, 0, 1)
    expected = vit.resize(whole[:, 100:800, 200:1000], (64, 64))
    assert (vit.resize(part, (64, 64)).int() - expected.int()).abs().float().mean() < 1.0


# ---- kinds of files

KINDS = {
    "1.png": lambda: picture().convert("1"), "L.png": lambda: picture().convert("L"), "LA.png": lambda: picture().convert("LA"),
    "P.png": lambda: picture().convert("P"), "RGBA.png": lambda: picture().convert("RGBA"), "CMYK.jpg": lambda: picture().convert("CMYK"),
    "I16.png": lambda: Image.fromarray(np.linspace(0, 65535, 5600).astype(np.uint16).reshape(70, 80)),
    "F.tif": lambda: Image.fromarray(np.linspace(0, 1, 5600).astype(np.float32).reshape(70, 80)),
    "dot.png": lambda: picture((1, 1)), "line.png": lambda: picture((1, 90)), "long.png": lambda: picture((3000, 2)),
}


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    for name, make in KINDS.items():
        make().save(tmp_path / name)
    images = open_folder(str(tmp_path), "train", False)
    assert len(images) == len(KINDS)
    for view in (View((32, 32), scale=(0.2, 1.0)), View((32, 32), centre=0.875)):
        for i in range(len(images)):
            assert Decoder(images, view).look(i, uniform((1, View.NUMBERS), 0, 1, i)).shape == (3, 32, 32)


@pytest.mark.parametrize("name, top", [("I16.png", 65535), ("I.tif", 65535), ("F.tif", 1), ("F255.tif", 255)])
def test_deep_grey_is_scaled_and_a_crop_is_as_bright_as_its_place_in_the_picture(tmp_path, name, top):
    grey = np.linspace(0, top, 5600).reshape(70, 80)
    Image.fromarray(grey.astype(dict(I16=np.uint16, I=np.int32).get(name.split(".")[0], np.float32))).save(tmp_path / name)
    images = open_folder(str(tmp_path), "train", False)

    def part(*box):
        return images.cut(0, argparse.Namespace(size=(32, 32), boxes=lambda *_: np.array([box])), np.zeros((1, View.NUMBERS)))
    whole, dark = part(0, 0, 70, 80), part(0, 0, 10, 80)
    assert len(whole.unique()) > 200 and dark.max() < 40
    assert torch.equal(whole[:, :10], dark)


def broken(folder: Path, name: str) -> None:
    if name == "truncated.jpg":
        picture((200, 200)).save(folder / name)
        (folder / name).write_bytes((folder / name).read_bytes()[:3000])
    elif name == "dangling.jpg":
        (folder / name).symlink_to(folder / "nowhere")
    elif name == "bomb.png":
        header = bytearray()
        Image.new("1", (8, 8)).save(folder / name)
        header += (folder / name).read_bytes()
        header[16:24] = (60000).to_bytes(4, "big") * 2
        import zlib
        header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
        (folder / name).write_bytes(bytes(header))
    else:
        (folder / name).write_bytes({"empty.jpg": b"", "text.jpg": b"hello", "page.jpg": b"<html></html>"}[name])


BROKEN = ["truncated.jpg", "dangling.jpg", "bomb.png", "empty.jpg", "text.jpg", "page.jpg"]


@pytest.mark.parametrize("name", BROKEN)
def test_training_replaces_a_broken_picture_and_says_which_evaluation_refuses(tmp_path, name, capsys):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"good{i}.png")
    broken(tmp_path, name)
    images = open_folder(str(tmp_path), "train", False)
    bad = [i for i in range(4) if images.path(i).endswith(name)][0]
    request = (np.array([bad, (bad + 2) % 4]), np.zeros((2, View.NUMBERS)))
    pixels, index, complaints = Decoder(images, View((32, 32)))[request]
    assert pixels.shape == (2, 3, 32, 32) and index.tolist() == [(bad + 1) % 4, (bad + 2) % 4]
    assert len(complaints) == 1 and name in complaints[0]
    with pytest.raises(InputError, match=name):
        list(in_order(images, View((32, 32)), arguments(), ONE))


def test_a_folder_of_broken_pictures_ends_the_run(tmp_path):
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    images = open_folder(str(tmp_path), "train", False)
    for workers in (0, 1):
        stream = Batches(images, View((32, 32)), arguments(workers=workers), ONE, 0, 1)
        with pytest.raises(InputError, match="50 pictures in a row"):
            next(stream)


def test_small_pictures_are_decoded_once_and_larger_ones_stay_files(tmp_path, capsys):
    for i in range(10):
        picture((32, 24), seed=i).save(tmp_path / f"{i:02d}.png")
    packed = open_images(arguments(data=str(tmp_path)), "train")
    assert isinstance(packed, Packed) and packed.side == 32
    assert torch.equal(packed.items[3], torch.from_numpy(np.array(picture((32, 24), seed=3))).permute(2, 0, 1))
    (tmp_path / "03.png").write_bytes(b"broken")
    assert len(open_images(arguments(data=str(tmp_path)), "train")) == 9 and "03.png" in capsys.readouterr().err
    picture((65, 24)).save(tmp_path / "00.png")
    assert isinstance(open_images(arguments(data=str(tmp_path)), "train"), Files)


# ---- batches

def collect(images, view, args, world=ONE, first=0, last=4):
    stream = Batches(images, view, args, world, first, last)
    return [(pixels, index.tolist()) for pixels, index in stream]


@pytest.fixture
def files(tmp_path):
    for i in range(20):
        picture((70 + i, 90 - i), seed=i).save(tmp_path / f"{i:02d}.jpg")
    return open_folder(str(tmp_path), "train", False)


def test_batches_do_not_depend_on_workers_and_can_be_entered_anywhere(files):
    view = View((32, 32), scale=(0.2, 1.0), randaugment=9.0)
    alone = collect(files, view, arguments())
    for workers in (1, 2):
        for (a, i), (b, j) in zip(alone, collect(files, view, arguments(workers=workers)), strict=True):
            assert torch.equal(a, b) and i == j
    for (a, i), (b, j) in zip(alone[3:], collect(files, view, arguments(), first=3), strict=True):
        assert torch.equal(a, b) and i == j


@pytest.mark.parametrize("store", ["files", "packed"])
@pytest.mark.parametrize("count", [1, 2])
def test_processes_and_parts_divide_the_same_batch(files, store, count):
    images, view = (files if store == "files" else shapes(20, 0)), View((32, 32), scale=(0.2, 1.0), count=count)
    whole = collect(images, view, arguments())
    shares = [collect(images, view, arguments(micro_batch=2), World(rank, 2, ONE.device)) for rank in range(2)]
    for step, (pixels, index) in enumerate(whole):
        parts = [share[2 * step + part] for share in shares for part in range(2)]
        for v in range(count):
            rows = slice(8 * v, 8 * v + 8)
            assert index[rows] == [i for _, part in parts for i in part[2 * v:2 * v + 2]]
            assert torch.equal(pixels[rows], torch.cat([p[2 * v:2 * v + 2] for p, _ in parts]))


def test_an_epoch_takes_every_picture_at_most_once_and_the_next_in_another_order():
    images = shapes(20, 0)
    orders = [i for _, index in collect(images, View((32, 32)), arguments(), last=4) for i in index]
    assert len(set(orders[:16])) == len(set(orders[16:])) == 16 and orders[:16] != orders[16:]


@pytest.mark.parametrize("total", [7, 8, 10])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_picture_once(total, processes):
    seen = [i for rank in range(processes)
            for _, index in in_order(shapes(total, 0), View((32, 32)), arguments(micro_batch=2), World(rank, processes, ONE.device))
            for i in index]
    assert sorted(seen) == list(range(total))


def test_fewer_pictures_than_a_batch_are_refused():
    with pytest.raises(InputError, match="7 images, less than one batch of 8"):
        Batches(shapes(7, 0), View((32, 32)), arguments(), ONE, 0, 1)


@pytest.mark.parametrize("batch, micro, processes", [(7, 8, 2), (10, 4, 1), (1, 8, 2)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers(batch, micro, processes):
    with pytest.raises(InputError, match=f"--batch-size {batch} .*{processes} processes .*--micro-batch {micro}"):
        vit.parts_of_batch(arguments(batch_size=batch, micro_batch=micro), World(0, processes, ONE.device))


def test_shapes_are_the_same_every_time_and_of_ten_kinds():
    a, b = shapes(200, seed=3), shapes(200, seed=3)
    assert torch.equal(a.items, b.items) and np.array_equal(a.labels, b.labels)
    assert set(a.labels) == set(range(10)) and len(a.classes) == 10
    assert not torch.equal(a.items, shapes(200, seed=4).items)


def test_a_data_set_of_torchvision_is_taken_by_its_name(monkeypatch, tmp_path):
    class Known:  # as torchvision's CIFAR10: an array and labels
        classes = ["cat", "dog"]

        def __init__(self, root, train):
            self.data, self.targets = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8), [0, 1] * (2 if train else 1)
    monkeypatch.setattr(vit.datasets, "CIFAR10", Known)
    args = arguments(data="cifar10", data_root=str(tmp_path), download=False)
    train, val = open_images(args, "train", labels=True), open_images(args, "val", labels=True)
    assert (len(train), len(val), train.classes, train.labels.tolist()) == (4, 2, ["cat", "dog"], [0, 1, 0, 1])

    class Lazy:  # as torchvision's Flowers102: PIL images and a list of labels
        classes = ["rose", "lily"]

        def __init__(self, root, split):
            self._labels = {"train": [0, 1], "val": [1], "test": [0]}[split]

        def __len__(self):
            return len(self._labels)

        def __getitem__(self, i):
            return picture(seed=i), self._labels[i]
    monkeypatch.setattr(vit.datasets, "Flowers102", Lazy)
    args.data = "flowers102"
    train, val = open_images(args, "train", labels=True), open_images(args, "val", labels=True)
    assert (len(train), len(val), train.labels.tolist()) == (3, 1, [0, 1, 1])
    (pixels, index), = list(in_order(train, View((32, 32)), arguments(), ONE))
    assert pixels.shape == (3, 3, 32, 32) and index.tolist() == [0, 1, 2]


def test_a_missing_data_set_of_torchvision_says_how_to_get_it(tmp_path):
    args = arguments(data="cifar10", data_root=str(tmp_path), download=False)
    with pytest.raises(InputError, match="--download fetches it"):
        open_images(args, "train")
    assert not os.listdir(tmp_path)
