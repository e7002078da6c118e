"""pack.py: what it writes, that it stands wherever a folder does, and what happens to it on the way."""
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import finetune
import pack
import vit
from tests.test_runs import COMMANDS, ROOT, TORCHRUN, assert_same_state, begun, command, losses, own_folder, places, processes_of, run  # noqa: F401
from vit import InputError, open_folder


def smooth(folder: Path, total: int, size: tuple[int, int], kind: str = "jpg") -> None:
    """Pictures of classes a and b; every fifth is for evaluation."""
    rng = np.random.default_rng(0)
    for i in range(total):
        path = folder / ("val" if i % 5 == 4 else "train") / "ab"[i % 2] / f"{i}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        small.resize((size[0] + i, size[1]), Image.Resampling.BICUBIC).save(path)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_packed_folder_stands_where_the_folder_does_in_every_script(name, places):  # noqa: F811
    """The pictures are smaller than the side, so they are the same: also the losses, to the last bit, on any workers."""
    pack.main([places["photos"], "--out", "photos.pixels", "--workers", "2"])
    run(name, places, "--epochs 2 --out folder")
    run(name, dict(places, photos="photos.pixels"), "--epochs 2 --workers 2 --out packed")
    assert losses("packed") == losses("folder") and len(losses("packed")) == 6
    assert_same_state("folder", "packed")


def test_two_processes_read_one_file(places):  # noqa: F811
    pack.main([places["photos"], "--out", "photos.pixels"])
    run("mae", places, "--out one")
    words = command("mae", dict(places, photos="photos.pixels"), "--workers 1 --out two")
    subprocess.run([*TORCHRUN, *words], check=True, capture_output=True, timeout=120)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)


def test_splits_labels_and_names_are_those_of_the_folder(tmp_path, capfd):
    smooth(tmp_path / "photos", 40, (30, 20), "png")
    pack.main(["photos/", "--side", "20"])
    assert "photos-20.pixels: " in capfd.readouterr().err
    for split, labels, share in (("train", True, 0), ("val", True, 0), ("train", False, 0), ("", False, 0)):
        one, other = (open_folder(data, split, labels, share) for data in ("photos", "photos-20.pixels"))
        assert np.array_equal(one.items, other.items) and one.classes == other.classes and len(one) > 0
        assert (one.labels is None and other.labels is None) or np.array_equal(one.labels, other.labels)
        assert all(torch.equal(one.open(i), other.open(i)) for i in range(len(one)))
    pack.main(["photos/train"])
    for split in ("train", "val"):
        one, other = (open_folder(data, split, True, 0.2) for data in ("photos/train", "photos/train-256.pixels"))
        assert np.array_equal(one.items, other.items) and np.array_equal(one.labels, other.labels)
    with pytest.raises(InputError, match="photos-20.pixels has val/"):
        open_folder("photos-20.pixels", "val", True, 0.2)
    with pytest.raises(InputError, match="no images in photos/train-256.pixels/val/<class>"):
        open_folder("photos/train-256.pixels", "val", True)


def test_a_worker_gets_names_and_places_but_no_pixels(tmp_path):
    smooth(tmp_path / "photos", 40, (300, 200), "png")
    pack.main(["photos", "--side", "128"])
    images = open_folder("photos-128.pixels", "train", True)
    assert len(pickle.dumps(images)) < 5000 < os.path.getsize("photos-128.pixels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.open(0)
    with pytest.raises(TypeError):  # nobody writes through the mapping
        vit.mapped("photos-128.pixels")[:1] = b"x"


def test_a_file_may_be_larger_than_the_memory(tmp_path):
    """As that of ImageNet is: a mapping that could be written to would be refused."""
    with open("/proc/meminfo") as file:
        kib = sum(int(line.split()[1]) for line in file if line.startswith(("MemTotal", "SwapTotal")))
    rows = 2 * 1024 * kib // (3 * 65536)
    with open("large.pixels", "wb") as file:
        file.truncate(3 * rows * 65536 + 12)  # without blocks on the disk
        file.seek(-12, os.SEEK_END)
        file.write(bytes(range(12)))
    np.savez("large.pixels.npz", names=np.array([b"a.png", b"b.png"]), sizes=np.array([(rows, 65536), (2, 2)], np.int32))
    assert open_folder("large.pixels", "train", False).open(1).permute(1, 2, 0).flatten().tolist() == list(range(12))


def test_crops_of_packed_and_of_whole_pictures_are_of_one_size_and_show_the_same(tmp_path):
    """Where they lie is drawn by torchvision as a whole number of pixels, so it differs."""
    smooth(tmp_path / "photos", 20, (640, 480))
    pack.main(["photos", "--side", "240"])
    whole, packed = open_folder("photos", "train", False), open_folder("photos-240.pixels", "train", False)
    assert packed.open(0).shape == (3, 240, 320) and packed.open(0).permute(1, 2, 0).is_contiguous()
    crop = vit.random_crop((64, 64), 0.2).transforms[0]
    for i in range(len(whole)):
        sizes, seen = [], []
        for images in (whole, packed):
            torch.manual_seed(i)
            box = crop.make_params([images.open(i)])
            sizes.append([box[side] * 480 / images.open(i).shape[1] for side in ("height", "width")])
            seen.append(v2.functional.resize(images.open(i), packed.open(i).shape[1:], v2.InterpolationMode.BICUBIC))
        assert sizes[0] == pytest.approx(sizes[1], abs=2.5) and torch.equal(*seen)


def test_an_interrupted_file_is_continued_to_the_same_bytes(tmp_path, monkeypatch):
    smooth(tmp_path / "photos", 600, (200, 150))
    monkeypatch.setattr(pack, "BETWEEN", 50)
    pack.main(["photos", "--out", "whole.pixels", "--side", "60"])
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pack, vit; pack.BETWEEN = 50; vit.launch(pack.main)"
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        process, size = begun([sys.executable, "-c", code, "photos", "--out", "parts.pixels", "--side", "60", "--workers", "2"]), 0
        before = os.path.getsize("parts.pixels.part.sizes") if Path("parts.pixels.part.sizes").exists() else 0
        while process.poll() is None and not (Path("parts.pixels.part.sizes").exists() and os.path.getsize("parts.pixels.part.sizes") > before):
            time.sleep(0.002)
        os.killpg(process.pid, number)
        told = process.communicate(timeout=10)[1]
        deadline = time.time() + 10
        while processes_of(process) and time.time() < deadline:
            time.sleep(0.1)
        assert not processes_of(process) and "Traceback" not in told, told
    assert 0 < os.path.getsize("parts.pixels.part.sizes") and not Path("parts.pixels").exists()
    with open("parts.pixels.part", "ab") as file:  # pixels whose sizes were not written any more
        file.write(b"torn")
    pack.main(["photos", "--out", "parts.pixels", "--side", "60"])
    assert Path("parts.pixels").read_bytes() == Path("whole.pixels").read_bytes() and not list(Path().glob("*.part*"))
    with np.load("parts.pixels.npz") as parts, np.load("whole.pixels.npz") as whole:
        assert all(np.array_equal(parts[name], whole[name]) for name in whole.files)


def test_another_side_and_pixels_that_are_gone_are_told(tmp_path, monkeypatch):
    """What is left of a pack is continued only if it is whole and of the same side."""
    smooth(tmp_path / "photos", 40, (60, 40))
    monkeypatch.setattr(pack, "BETWEEN", 10)
    write_file = pack.write_file

    def full(write, path):
        if path.name == "a.pixels.npz":
            raise OSError("disk full")
        write_file(write, path)
    monkeypatch.setattr(pack, "write_file", full)
    with pytest.raises(InputError, match="disk full; the same command continues"):
        pack.main(["photos", "--out", "a.pixels", "--side", "30"])
    monkeypatch.setattr(pack, "write_file", write_file)
    with pytest.raises(InputError, match="is of --side 30; give another --out, or to pack the folder again, remove a.pixels"):
        pack.main(["photos", "--out", "a.pixels", "--side", "16"])
    pixels = Path("a.pixels.part").read_bytes()
    Path("a.pixels.part").write_bytes(pixels[:-1])
    with pytest.raises(InputError, match="a.pixels.part is shorter than a.pixels.part.sizes says"):
        pack.main(["photos", "--out", "a.pixels", "--side", "30"])
    Path("a.pixels.part").write_bytes(pixels)
    pack.main(["photos", "--out", "a.pixels", "--side", "30"])
    assert Path("a.pixels").read_bytes() == pixels
    with pytest.raises(InputError, match="is of --side 30"):
        pack.main(["photos", "--out", "a.pixels", "--side", "16"])
    for name in ("b.pixels.part", "b.pixels.part.sizes"):  # left by something of which the rest was removed
        Path(name).write_bytes(bytes(800))
    pack.main(["photos", "--out", "b.pixels", "--side", "30"])
    assert Path("b.pixels").read_bytes() == pixels


@pytest.mark.parametrize("whom", ["worker", "main"])
def test_a_process_that_is_killed_takes_the_others_with_it(tmp_path, whom):
    smooth(tmp_path / "photos", 300, (400, 300))
    process = begun([sys.executable, str(ROOT / "pack.py"), "photos", "--side", "60", "--workers", "2"])
    while len(processes_of(process)) < 3:
        time.sleep(0.01)
    os.kill(process.pid if whom == "main" else max(processes_of(process)), signal.SIGKILL)
    told, deadline = process.communicate(timeout=30)[1], time.time() + 15
    while processes_of(process) and time.time() < deadline:
        time.sleep(0.1)
    assert not processes_of(process)
    assert whom == "main" or process.returncode == 2 and "ended by the system" in told and "Traceback" not in told
    pack.main(["photos", "--side", "60"])


def test_a_class_without_a_readable_image_is_a_class_still(tmp_path):
    smooth(tmp_path / "photos", 200, (20, 20), "png")
    Path("photos/train/aa").mkdir()
    Path("photos/train/aa/0.png").write_bytes(b"x")
    pack.main(["photos"])
    assert open_folder("photos-256.pixels", "train", True).classes == ["a", "aa", "b"]


def test_what_was_packed_is_compared_with_the_folder(tmp_path, capfd):
    smooth(tmp_path / "photos", 10, (20, 20), "png")
    pack.main(["photos"])
    before = os.stat("photos-256.pixels").st_mtime_ns
    capfd.readouterr()
    pack.main(["photos"])
    assert "has all 10 images of photos" in capfd.readouterr().err and os.stat("photos-256.pixels").st_mtime_ns == before
    Path("photos/train/a/0.png").rename("photos/train/a/x.png")
    os.utime("photos/train/a/2.png", (1, 1))
    with pytest.raises(InputError, match=r"1 new \(train/a/x.png\), 1 gone \(train/a/0.png\), 1 changed \(train/a/2.png\)"):
        pack.main(["photos"])


def test_pictures_that_cannot_be_read_are_named_and_left_out_and_many_are_an_error(tmp_path, capfd):
    smooth(tmp_path / "photos", 30, (20, 20), "png")
    for i in range(2):
        Path(f"photos/train/a/{2 * i}.png").write_bytes(b"x")
    Path("photos/train/a/2.png").unlink()
    Path("photos/train/a/2.png").symlink_to("nowhere")
    pack.main(["photos"])
    assert capfd.readouterr().err.count("cannot be read") == 2
    assert len(open_folder("photos-256.pixels", "train", True)) == len(open_folder("photos", "train", True)) - 2
    Path("photos/train/a/6.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"3 of \d+ images cannot be read; when they are mended, remove other.pixels"):
        pack.main(["photos", "--out", "other.pixels"])
    assert not Path("other.pixels").exists()


def test_bad_input_is_one_clear_line(tmp_path):
    smooth(tmp_path / "photos", 10, (20, 20), "png")
    Path("empty").mkdir()
    for name in ("folder.pixels", "file.pixels"):
        Path(name).mkdir() if "folder" in name else Path(name).write_bytes(b"mine")
        with pytest.raises(InputError, match=f"{name}: no folder, and no file of pack.py"):
            pack.main(["photos", "--out", name])
    for words, told in ((["nowhere"], "nowhere: No such file"), (["empty"], "empty: no images"), (["photos", "--out", "photos/train/a/0.png/x"], "cannot be written")):
        with pytest.raises(InputError, match=told):
            pack.main(words)
    pack.main(["photos"])
    whole = Path("photos-256.pixels").read_bytes()
    Path("photos-256.pixels").write_bytes(whole[:-1])
    with pytest.raises(InputError, match=f"it has {len(whole) - 1} bytes, its index says {len(whole)}"):
        open_folder("photos-256.pixels", "train", True)
    Path("photos-256.pixels").write_bytes(whole)
    Path("photos-256.pixels.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match="no file of pack.py with its index"):
        pack.main(["photos"])
    with pytest.raises(InputError, match="no folder, and no file of pack.py"):
        open_folder("photos-256.pixels", "train", True)


def test_predictions_of_a_packed_folder_have_the_names_of_its_files(places, capfd):  # noqa: F811
    pack.main([places["photos"], "--out", "photos.pixels"])
    capfd.readouterr()
    tables = []
    for data in (places["photos"], "photos.pixels"):
        finetune.main(["--device", "cpu", "--init", f"{places['files']}/classes/model.pth", "--predict", data])
        tables.append(capfd.readouterr().out)
    assert tables[0] == tables[1] and "train/a/0.jpg\t" in tables[0]
