"""Packs a folder of images into one file of pixels: decoded once, they are read many times faster than JPEGs.

Every image is made smaller until its shorter side has --side pixels, its aspect kept; none is made larger. The file
then stands wherever a folder does: names, splits, classes (but for empty ones) and all that follows are the same.

Run    python pack.py photos                                   -> photos-256.pixels and its index, photos-256.pixels.npz
       python pack.py photos --side 160 --out /fast/photos.pixels
       python mae.py --data photos-256.pixels
Writes the pixels, uint8 h w 3, of one image after the other in the order of their names; and an index of the names,
       heights and widths, and of size and time of each image's file.
The same command again continues what was interrupted. After the end it compares the folder with what was packed.
Use    from vit import open_folder; open_folder("photos-256.pixels", "train", labels=True).open(0)
"""
import argparse
import ctypes
import fcntl
import multiprocessing
import os
import shlex
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from vit import TORN, Folder, Help, Images, InputError, PackedFolder, count, end_processes, launch, say, write_file

BETWEEN = 1000  # images between two moments at which all is on disk


@dataclass
class Shrunk(Dataset):
    """Images as uint8 h w 3, the shorter side at most `side` pixels; why, where one cannot be read."""
    images: Images
    side: int

    def __getitem__(self, i: int) -> np.ndarray | str:
        try:
            image = self.images.open(i)
        except InputError as error:
            return str(error)
        scale = min(1, self.side / min(image.shape[1:]))
        size = [round(old * scale) for old in image.shape[1:]]
        image = v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)
        return np.ascontiguousarray(image.permute(1, 2, 0))


def made_by_others(images: Shrunk, first: int, last: int, workers: int) -> Iterator[np.ndarray | str]:
    """Those from `first` on, made by other processes."""
    loader = DataLoader(images, batch_size=None, sampler=range(first, last), num_workers=workers, prefetch_factor=16,
                        collate_fn=lambda item: item, worker_init_fn=start_worker, multiprocessing_context="fork")
    at_a_death = signal.getsignal(signal.SIGCHLD)  # torch's handler would raise an error wherever the program is
    try:
        items = iter(loader)
        signal.signal(signal.SIGCHLD, at_a_death)
        yield from items
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise InputError("a process that decodes images was ended by the system, for want of memory? Try fewer "
                         "--workers; the same command continues") from None
    finally:
        end_processes(multiprocessing.active_children())


def start_worker(number: int) -> None:
    """Signals from a terminal reach all processes, but the main one decides what follows; workers end with it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for kind in (signal.SIGINT, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def look_at(folder: str) -> tuple[Images, np.ndarray]:
    """The images of a folder; and size in bytes and time in nanoseconds of each file, M 2. Raises InputError if there
    are none."""
    images = Folder(folder).images()
    if not len(images):
        raise InputError(f"{folder}: no images in it")
    paths = [os.path.join(folder, os.fsdecode(name)) for name in images.items.tolist()]
    found = [os.stat(path) if os.path.exists(path) else os.lstat(path) for path in paths]  # dead links are told later
    return images, np.array([(file.st_size, file.st_mtime_ns) for file in found])


def compare(index: Path, images: Images, files: np.ndarray, side: int, out: Path) -> None:
    """Raises InputError if the folder has changed since its index was written, or if that is of another side."""
    again = f"to pack the folder again, remove {out}*"
    try:
        with np.load(index) as before:
            before_side = int(before["side"])
            old, new = (dict(zip(names.tolist(), map(tuple, about.tolist()), strict=True))
                        for names, about in ((before["names"], before["files"]), (images.items, files)))
    except TORN as error:
        raise InputError(f"{index} is damaged ({error}); {again}") from None
    if before_side != side:
        raise InputError(f"{index} is of --side {before_side}; give another --out, or {again}")
    changed = {"new": new.keys() - old.keys(), "gone": old.keys() - new.keys(),
               "changed": {name for name in old.keys() & new.keys() if old[name] != new[name]}}
    if told := [f"{len(names)} {what} ({os.fsdecode(min(names))})" for what, names in changed.items() if names]:
        raise InputError(f"the images have changed since {index} was written: {', '.join(told)}; {again}")


def pack(images: Images, files: np.ndarray, side: int, out: Path, workers: int) -> None:
    """Writes `out` and its index. Until the end the pixels are in OUT.part. After them is written, in OUT.part.sizes,
    which images are done: height and width of each, 0 and 0 if it cannot be read."""
    part, sizes, begun, index = (Path(f"{out}{suffix}") for suffix in (".part", ".part.sizes", ".part.npz", ".npz"))
    with open(part, "ab") as pixels:
        try:
            fcntl.lockf(pixels, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(pixels.fileno()), os.stat(part)):
                raise BlockingIOError  # it has just been finished
        except (BlockingIOError, PermissionError, FileNotFoundError):
            raise InputError(f"{part} is being written by another process") from None
        if begun.exists():
            compare(begun, images, files, side, out)
        else:  # what else is there is of something else
            pixels.truncate(0), sizes.unlink(missing_ok=True)
            write_file(partial(np.savez, names=images.items, files=files, side=side), begun)
        with open(sizes, "ab") as finished:
            done = np.fromfile(sizes, np.int32, 2 * (sizes.stat().st_size // 8)).reshape(-1, 2).tolist()
            if part.stat().st_size < (written := sum(3 * h * w for h, w in done)):
                raise InputError(f"{part} is shorter than {sizes} says; to pack the folder again, remove {out}*")
            pixels.truncate(written), finished.truncate(8 * len(done))
            fill(Shrunk(images, side), done, pixels, finished, workers, out)
        write_file(partial(np.savez, names=images.items, files=files, side=side, sizes=np.array(done, np.int32)), index)
        part.rename(out)
        begun.unlink(), sizes.unlink()


def fill(images: Shrunk, done: list, pixels: BinaryIO, finished: BinaryIO, workers: int, out: Path) -> None:
    """Writes what is not in `done` yet: the pixels, and then, every now and then, which images they are."""
    total, since, broken = len(images.images), len(done), sum(h == 0 for h, w in done)
    with closing(made_by_others(images, len(done), total, workers)) as source:
        for made in tqdm(source, "packing", total, initial=len(done), disable=None):
            if isinstance(made, str):
                say(f"warning: {made}; it is left out")
                broken += 1
                done.append((0, 0))
            else:
                pixels.write(made)
                done.append(made.shape[:2])
            if len(done) % BETWEEN == 0 or len(done) == total:
                for file, more in ((pixels, b""), (finished, np.array(done[since:], np.int32))):
                    file.write(more)
                    file.flush()
                    os.fsync(file.fileno())
                since = len(done)
            if broken > max(2, total / 100) or broken == total:
                raise InputError(f"{broken} of {len(done)} images cannot be read; when they are mended, remove {out}* "
                                 "and pack the folder again")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage="%(prog)s DIR [--option value] ...", description=__doc__,
                                     formatter_class=Help, allow_abbrev=False)
    parser.add_argument("folder", metavar="DIR", help="folder of images, as --data takes it")
    parser.add_argument("--side", type=count, default=256, help="pixels of the shorter side, at most")
    parser.add_argument("--out", help="the file; else DIR-SIDE.pixels")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=count, default=cores, help="processes that decode images")
    args = parser.parse_args(argv)
    args.out = Path(args.out or os.path.relpath(f"{os.path.abspath(args.folder)}-{args.side}.pixels"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    images, files = look_at(args.folder)
    index = Path(f"{args.out}.npz")
    if args.out.exists():
        PackedFolder(str(args.out))  # an InputError if it is no whole one
        compare(index, images, files, args.side, args.out)
        return say(f"{args.out} has all {len(images)} images of {args.folder}")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        # A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that is at least twice the side.
        pack(replace(images, enough=2 * args.side), files, args.side, args.out, args.workers)
    except OSError as error:
        raise InputError(f"{args.out} cannot be written: {error}; the same command continues") from None
    say(f"{args.out}: {args.out.stat().st_size / 1e9:.3g} GB; for every script --data {shlex.quote(str(args.out))}")


if __name__ == "__main__":
    launch(main)
