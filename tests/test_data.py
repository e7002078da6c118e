"""Images in: every layout and kind of file, torchvision's crops, the same batches for any workers, parts and processes."""
import argparse
import os
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import vit
from vit import (Batches, CentreCrop, Images, InputError, Views, World, in_order, in_random_order, open_folder, open_images,
                 random_crop, shapes)

ONE = World(0, 1, torch.device("cpu"), "fp32")
BICUBIC = v2.InterpolationMode.BICUBIC


def picture(side=(80, 70), seed=0) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (*side[::-1], 3), np.uint8))


def smooth(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (12, 12, 3), np.uint8)).resize((width, height), Image.BICUBIC)


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**dict(data="", seed=0, batch_size=8, micro_batch=8, workers=0, device="cpu", image_size=32, val_share=0.0), **changes})


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
    picture().save(tree / "val/z/0.png")
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
    with pytest.raises(InputError, match="nothing.*No such file or directory; expected a folder"):
        open_folder(str(tmp_path / "nothing"), "train", False)
    with pytest.raises(InputError, match="no images .*jpg"):
        open_folder(str(tmp_path), "train", False)
    with pytest.raises(InputError, match="val.*expected a folder with train/<class>/<image>"):
        open_folder(str(tmp_path), "val", True)
    picture().save(tmp_path / "0.png")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match="no images in .*train/<class>"):
        open_folder(str(tmp_path), "train", True)
    with pytest.raises(InputError, match="no folder, and no file of pack.py"):
        open_folder(str(tmp_path / "0.png"), "train", False)
    (tmp_path / "train/again").symlink_to(".")
    with pytest.raises(InputError, match="again: Too many levels of symbolic links"):
        open_folder(str(tmp_path), "train", False)


def test_a_list_of_names_costs_its_bytes():
    names = np.array([f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG".encode() for i in range(100_000)])
    assert names.dtype.kind == "S" and names.nbytes < 40 * len(names)


# ---- views

@pytest.mark.parametrize("layout", ["h w C", "C h w"])
def test_a_random_crop_is_torchvisions_resized_crop_and_flip(layout):
    image = torch.from_numpy(np.array(picture((300, 200)))).permute(2, 0, 1)
    image = image.contiguous() if layout == "C h w" else image
    theirs = v2.Compose([v2.RandomResizedCrop((64, 64), (0.08, 1.0), interpolation=BICUBIC, antialias=True), v2.RandomHorizontalFlip()])
    for seed in range(20):
        seen = []
        for view in (random_crop((64, 64), 0.08), theirs):
            torch.manual_seed(seed)
            seen.append(view(image))
        assert torch.equal(*seen) and seen[0].shape == (3, 64, 64)


def test_crops_of_an_oblong_input_have_its_aspect():
    boxes = [v2.RandomResizedCrop.make_params(random_crop((32, 96), 0.05).transforms[0], [torch.empty(3, 900, 900)]) for _ in range(200)]
    aspects = [box["width"] / box["height"] for box in boxes]
    assert 0.74 * 3 < min(aspects) < 0.9 * 3 and 1.1 * 3 < max(aspects) < 1.34 * 3


@pytest.mark.parametrize("side", [(300, 200), (200, 300), (37, 91), (224, 224), (1, 60), (3000, 2)])
@pytest.mark.parametrize("part", [0.875, 1.0, 0.01])
def test_the_centre_is_torchvisions_resize_and_centre_crop(side, part):
    image = torch.from_numpy(np.array(picture(side))).permute(2, 0, 1)
    if max(side) / min(side) * 112 / part > 20000:
        pytest.skip("a picture of gigabytes")
    theirs = v2.Compose([v2.Resize(int(112 / part), BICUBIC, antialias=True), v2.CenterCrop(112)])
    assert torch.equal(CentreCrop((112, 112), part)(image), theirs(image))


@pytest.mark.parametrize("size", [(32, 96), (96, 32)])
def test_the_centre_for_an_oblong_input_sees_as_much_as_its_aspect_allows(size):
    columns = torch.arange(0, 240, dtype=torch.uint8).expand(3, 160, 240)
    rows = torch.arange(0, 160, dtype=torch.uint8).view(1, -1, 1).expand(3, 160, 240)
    for ramp, extent, seen in ((columns, 240, min(240, 160 * size[1] / size[0])), (rows, 160, min(160, 240 * size[0] / size[1]))):
        view = CentreCrop(size)(ramp)
        assert view.shape == (3, *size)
        assert int(view.max()) - int(view.min()) == pytest.approx(seen, abs=6) and view.float().mean() == pytest.approx(extent / 2, abs=2)


def test_a_large_jpeg_is_decoded_small_but_never_too_small(tmp_path):
    smooth(1600, 1200).save(tmp_path / "a.jpg", quality=95)
    whole = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).permute(2, 0, 1)
    images = open_images(arguments(data=str(tmp_path), image_size=70))
    assert images.enough == 280 and images.open(0).shape == (3, 300, 400)
    assert open_images(arguments(data=str(tmp_path), image_size=[70, 80])).open(0).shape == (3, 600, 800)
    small = v2.functional.resize(whole, [300, 400], BICUBIC)
    assert (images.open(0).int() - small.int()).abs().float().mean() < 1.0
    assert torch.equal(open_images(arguments(data=str(tmp_path), image_size=400)).open(0), whole)


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
    for view in (random_crop((32, 32), 0.2, 9.0), CentreCrop((32, 32), 0.875)):
        for i in range(len(images)):
            seen, *_ = Views(images, view, 0)[0, i]
            assert seen.shape == (32, 32, 3) and seen.dtype == torch.uint8


@pytest.mark.parametrize("name, top", [("I16.png", 65535), ("I.tif", 65535), ("F.tif", 1), ("F255.tif", 255)])
def test_deep_grey_is_scaled_to_bytes(tmp_path, name, top):
    grey = np.linspace(0, top, 5600).reshape(70, 80)
    Image.fromarray(grey.astype(dict(I16=np.uint16, I=np.int32).get(name.split(".")[0], np.float32))).save(tmp_path / name)
    seen = open_folder(str(tmp_path), "train", False).open(0)
    assert len(seen.unique()) > 200 and seen[:, :10].max() < 40 and seen.max() == 255


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
        header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
        (folder / name).write_bytes(bytes(header))
    else:
        (folder / name).write_bytes({"empty.jpg": b"", "text.jpg": b"hello", "page.jpg": b"<html></html>"}[name])


BROKEN = ["truncated.jpg", "dangling.jpg", "bomb.png", "empty.jpg", "text.jpg", "page.jpg"]


@pytest.mark.parametrize("name", BROKEN)
def test_training_replaces_a_broken_image_and_says_which_evaluation_refuses(tmp_path, name):
    for i in range(3):
        picture(seed=i).save(tmp_path / f"good{i}.png")
    broken(tmp_path, name)
    images = open_folder(str(tmp_path), "train", False)
    bad = [i for i in range(4) if images.items[i].endswith(name.encode())][0]
    training = Views(images, CentreCrop((32, 32)), 0)
    seen, _, number, complaint = training[0, bad]
    assert torch.equal(seen, training[0, (bad + 1) % 4][0]) and number == (bad + 1) % 4 and f"{name}: cannot be read" in complaint
    assert training[0, (bad + 2) % 4][2:] == ((bad + 2) % 4, "")
    for workers in (0, 2):
        with pytest.raises(InputError, match=rf"^{tmp_path}/{name}: cannot be read \(.*\)$"), \
                in_order(Views(images, CentreCrop((32, 32))), arguments(workers=workers), ONE) as batches:
            list(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_warned_of_once_and_counted_each_time(tmp_path, capsys, workers):
    for i in range(160):
        (tmp_path / f"{i:03d}.png").write_bytes(b"") if i % 3 == 0 else picture((8, 8), i).save(tmp_path / f"{i:03d}.png")
    images, args = open_folder(str(tmp_path), "train", False), arguments(workers=workers)
    with in_order(Views(images.subset(np.arange(9)), CentreCrop((8, 8)), 0), args, ONE) as batches:
        assert [len(index) for _, _, index in batches] == [8, 1]
    told = capsys.readouterr().err
    assert [told.count(f"{i:03d}.png: cannot be read") for i in range(9)] == [1, 0, 0] * 3
    with in_order(Views(images, CentreCrop((8, 8)), 0), args, ONE) as batches:
        assert len(list(batches)) == 20 and (batches.replaced, batches.asked) == (54, 160)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_of_broken_images_ends_the_run(tmp_path, workers):
    for i in range(60):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    images = open_folder(str(tmp_path), "train", False)
    with pytest.raises(InputError, match=r"^50 images in a row cannot be read; .*cannot be read \(.*\)$"), \
            in_order(Views(images, CentreCrop((32, 32)), 0), arguments(workers=workers), ONE) as batches:
        next(batches)


# ---- chance and batches

def test_no_two_places_of_chance_coincide():
    """Small numbers, zeros behind them, and numbers of 32 bits: numpy pads seeds with zeros and cuts them into words."""
    some = (0, 1, 2, 2**32 - 1)
    places = [place for purpose, length in ((vit.IMAGE, 3), (vit.ORDER, 2), (vit.STEP, 4), (vit.LABELS, 1), (vit.SHAPES, 1))
              for place in product((purpose,), *[some] * length)]
    assert len({vit.torch_seed(*place) for place in places}) == len(places) > 300
    assert len({np.random.default_rng(place).integers(2**63) for place in places}) == len(places)


def collect(images, view, args, world=ONE, first=0, last=4, numbers=3):
    order = in_random_order(len(images), args, world, first, last)
    with Batches(Views(images, view, args.seed, numbers), order, args, world) as batches:
        return [(pixels, noise, index.tolist()) for pixels, noise, index in batches]


def assert_same(ones, others):
    for (a, n, i), (b, m, j) in zip(ones, others, strict=True):
        assert torch.equal(a, b) and torch.equal(n, m) and i == j


@pytest.fixture
def files(tmp_path):
    for i in range(20):
        picture((70 + i, 90 - i), seed=i).save(tmp_path / f"{i:02d}.jpg")
    return open_folder(str(tmp_path), "train", False)


@pytest.mark.parametrize("store", ["files", "memory"])
def test_batches_do_not_depend_on_workers_and_can_be_entered_anywhere(files, store):
    images, view = (files if store == "files" else shapes(20, 0)), random_crop((32, 32), 0.2, 9.0)
    alone = collect(images, view, arguments())
    for workers in (1, 2):
        assert_same(alone, collect(images, view, arguments(workers=workers)))
    for first in (1, 3):  # 2 steps an epoch
        assert_same(alone[first:], collect(images, view, arguments(workers=2), first=first))
    other = collect(images, view, arguments(seed=1))
    assert not any(torch.equal(a, b) or torch.equal(n, m) for (a, n, _), (b, m, _) in zip(alone, other, strict=True))


@pytest.mark.parametrize("store", ["files", "memory"])
def test_processes_and_parts_divide_the_same_batch(files, store):
    images, view = (files if store == "files" else shapes(20, 0)), random_crop((32, 32), 0.2)
    whole = collect(images, view, arguments())
    ranks = [collect(images, view, arguments(micro_batch=2, workers=2), World(rank, 2, ONE.device, "fp32")) for rank in range(2)]
    for step, (pixels, noise, index) in enumerate(whole):
        parts = [rank[2 * step + part] for rank in ranks for part in range(2)]
        assert index == [i for _, _, part in parts for i in part]
        assert torch.equal(pixels, torch.cat([p for p, _, _ in parts])) and torch.equal(noise, torch.cat([n for _, n, _ in parts]))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_large_part_is_joined_from_requests_of_at_most_128_images(workers, monkeypatch):
    seen, images = [], shapes(700, 0)
    loader = vit.DataLoader

    def watched(views, batch_sampler, **options):
        return loader(views, batch_sampler=(seen.append(len(request)) or request for request in batch_sampler), **options)
    monkeypatch.setattr(vit, "DataLoader", watched)
    batches = collect(images, CentreCrop((32, 32)), arguments(batch_size=300, micro_batch=300, workers=workers), last=2)
    assert [len(index) for *_, index in batches] == [300, 300] and seen == [128, 128, 44] * 2
    for pixels, noise, index in batches:
        assert torch.equal((pixels * 255).round().byte(), torch.from_numpy(images.items[index]).permute(0, 3, 1, 2)) and len(noise) == 300


def test_an_epoch_takes_every_image_at_most_once_and_the_next_in_another_order_with_other_crops():
    images, view = shapes(20, 0), random_crop((32, 32), 0.2)
    batches = collect(images, view, arguments(), last=4)
    orders = [i for *_, index in batches for i in index]
    assert len(set(orders[:16])) == len(set(orders[16:])) == 16 and orders[:16] != orders[16:]
    crops = [{i: pixels[row] for pixels, _, index in batches[at:at + 2] for row, i in enumerate(index)} for at in (0, 2)]
    assert not any(torch.equal(crops[0][i], crops[1][i]) for i in crops[0].keys() & crops[1].keys())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_part_of_one_image_has_the_label_of_this_image(workers):
    """numpy takes a tensor of one element for a plain number."""
    images, world = shapes(17, 0), ONE  # parts of 8, 8 and 1

    class Right(torch.nn.Module):
        def normalize(self, x):
            return x

        def forward(self, x):
            return next(answers)
    answers = (torch.nn.functional.one_hot(torch.from_numpy(labels), 10) * 9.0 for labels in np.split(images.labels, [8, 16]))
    result = vit.evaluate(Right(), images, CentreCrop((32, 32)), arguments(workers=workers, precision="fp32"), world)
    assert result["top1"] == 100 and result["val_images"] == 17


@pytest.mark.parametrize("total", [7, 8, 10])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_every_image_once_and_leaves_the_global_generator_alone(total, processes):
    seen, before = [], torch.get_rng_state()
    for rank in range(processes):
        with in_order(Views(shapes(total, 0), CentreCrop((32, 32))), arguments(micro_batch=2), World(rank, processes, ONE.device, "fp32")) as batches:
            seen += [i for *_, index in batches for i in index.tolist()]
    assert sorted(seen) == list(range(total)) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch, micro, processes", [(7, 8, 2), (10, 4, 1), (1, 8, 2)])
def test_a_batch_that_cannot_be_divided_is_refused_with_the_numbers(batch, micro, processes):
    with pytest.raises(InputError, match=f"--batch-size {batch} .*{processes} processes .*--micro-batch {micro}"):
        vit.parts_of_batch(arguments(batch_size=batch, micro_batch=micro), World(0, processes, ONE.device, "fp32"))


def test_shapes_are_the_same_every_time_and_of_ten_kinds():
    a, b = shapes(200, seed=3), shapes(200, seed=3)
    assert np.array_equal(a.items, b.items) and np.array_equal(a.labels, b.labels)
    assert set(a.labels) == set(range(10)) and len(set(a.classes)) == 10
    assert not np.array_equal(a.items, shapes(200, seed=4).items)


class Known:
    """As torchvision's CIFAR10: an array and labels."""
    classes = ["cat", "dog"]

    def __init__(self, root, train, download):
        self.data, self.targets = np.full((4 if train else 2, 32, 32, 3), 7, np.uint8), [0, 1] * (2 if train else 1)


class Listed:
    """As torchvision's Flowers102, OxfordIIITPet or Imagenette, by the name under which it keeps its files."""
    classes, names = ["rose", "lily"], "_image_files"

    def __init__(self, root, split, download):
        self._labels = {"train": [0, 1], "val": [1], "test": [0], "trainval": [0, 1]}[split]
        files = [Path(root, f"{split}{i}.png") for i in range(len(self._labels))]
        setattr(self, self.names, list(zip(map(str, files), self._labels, strict=True)) if self.names == "_samples" else files)
        for i, file in enumerate(files):
            picture(seed=i).save(file)


def test_data_sets_of_torchvision_are_taken_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(vit.datasets, "CIFAR10", Known)
    args = arguments(data="cifar10", data_root=str(tmp_path), download=False)
    train, val = open_images(args, "train", labels=True), open_images(args, "val", labels=True)
    assert (len(train), len(val), train.classes, train.labels.tolist()) == (4, 2, ["cat", "dog"], [0, 1, 0, 1])
    assert train.open(0).shape == (3, 32, 32)
    for data, known, names, labels in (("flowers102", "Flowers102", "_image_files", [0, 1, 1]), ("pets", "OxfordIIITPet", "_images", [0, 1]),
                                       ("imagenette", "Imagenette", "_samples", [0, 1])):
        monkeypatch.setattr(vit.datasets, known, type(known, (Listed,), dict(names=names)))
        args.data = data
        train = open_images(args, "train", labels=True)
        assert train.labels.tolist() == labels and train.classes == ["rose", "lily"]
        with in_order(Views(train, CentreCrop((32, 32))), args, ONE) as batches:
            (pixels, _, index), = batches
        assert pixels.shape == (len(labels), 3, 32, 32) and index.tolist() == list(range(len(labels)))


@pytest.mark.parametrize("name", vit.TORCHVISION)
def test_torchvision_still_keeps_files_and_labels_where_we_look(name):
    import inspect
    source = inspect.getsource(getattr(vit.datasets, vit.TORCHVISION[name][0]))
    if name == "cifar100":
        assert issubclass(vit.datasets.CIFAR100, vit.datasets.CIFAR10)
    elif name in ("cifar10", "stl10"):
        assert "self.data" in source and ("self.targets" in source or "self.labels" in source)
    else:
        assert "self._samples" in source or ("self._labels" in source and ("self._images " in source or "self._image_files" in source))


def test_a_missing_data_set_of_torchvision_says_how_to_get_it(tmp_path):
    args = arguments(data="cifar10", data_root=str(tmp_path), download=False)
    with pytest.raises(InputError, match="--download fetches it"):
        open_images(args, "train")
    assert not os.listdir(tmp_path)
