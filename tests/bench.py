"""Speed, as ratios of two ways to do the same in one run, because machines are noisy. By hand, some minutes:

    python tests/bench.py                      generated images
    python tests/bench.py --quick              less of everything, a minute
    python tests/bench.py --data /imagenet     files of your own
    python tests/bench.py --json speed.json    the numbers, too

Textbook means, as in the official codes: images cropped, made floats and normalised one by one by Pillow and torchvision; attention
written out as two products and a softmax; AdamW parameter by parameter.
"""
import argparse
import collections.abc
import gc
import importlib
import json
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pack  # noqa: E402
import vit  # noqa: E402
from mae import MaskedAutoencoder  # noqa: E402
from moco_v3 import BLUR, NUMBERS, SOLARIZE, TwoViews, recolour_views  # noqa: E402
from vit import Attention, Images, Views, ViT, open_folder, random_crop, relation, shapes  # noqa: E402

found: dict[str, dict[str, float]] = {}  # what is printed, for --json


def show(title: str, values: dict[str, float], unit: str = "images/s") -> None:
    first = next(iter(values.values()))
    print(title)
    for name, value in values.items():
        print(f"  {name:<64} {value:12,.1f} {unit:<9} x {value / first:.2f}", flush=True)
    found[title] = values


def rates(images: int, rounds: int, **ways: Callable[[], object]) -> dict[str, float]:
    """Images per second of CPU time of each way: the best of some rounds in which all take turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.process_time()
            way()
            best[name] = min(best[name], time.process_time() - start)
    return {name: images / seconds for name, seconds in best.items()}


# ---- images, on one core

def generate(folder: Path, number: int) -> None:
    """Smooth photographs of ImageNet's usual size; every tenth is for evaluation."""
    rng = np.random.default_rng(0)
    for i in range(number):
        path = folder / ("val" if i % 10 == 9 else "train") / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def textbook_view(side: int, smallest: float) -> v2.Compose:
    return v2.Compose([v2.RandomResizedCrop(side, (smallest, 1), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
                       v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def batches_of(views: Callable[[int], object], number: int) -> Callable[[], object]:
    return lambda: [default_collate([views(i) for i in range(first, min(first + 50, number))]) for first in range(0, number, 50)]


def input_pipeline(folder: str, packed: str, number: int, rounds: int) -> None:
    """All CPU work of a worker, from what is on disk to a batch."""
    whole, small = (open_folder(data, "train", False) for data in (folder, packed))
    some = np.linspace(0, len(whole) - 1, min(number, len(whole))).astype(int)
    whole, small = replace(whole.subset(some), enough=4 * 224), small.subset(some)
    paths, theirs = [os.path.join(whole.root, os.fsdecode(bytes(name))) for name in whole.items], textbook_view(224, 0.2)

    def ours(images: Images, augment: float = 0.0):
        views = Views(images, random_crop((224, 224), 0.2, augment), 0, numbers=196)
        return batches_of(lambda i: views[0, i], len(some))
    show(f"{len(some)} photographs to 224 pixels, one core", rates(len(some), rounds, **{
        "JPEG, textbook": batches_of(lambda i: theirs(Image.open(paths[i]).convert("RGB")), len(some)), "JPEG, ours": ours(whole),
        "packed, ours": ours(small), "packed, ours, with RandAugment": ours(small, 9.0)}))
    seconds = {}
    for name, way, files in (("JPEG, ours", ours(whole), paths), ("packed, ours", ours(small), [packed])):
        for state in ("from the disk", "from memory"):
            vit.mapped.cache_clear()  # pages that are mapped stay in memory
            for path in files * (state == "from the disk"):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.monotonic()
            way()
            seconds[f"{name}, {state}"] = time.monotonic() - start
    show("the same by the clock", {name: len(some) / value for name, value in seconds.items()})
    items = shapes(500, 0)
    views, theirs = Views(items, random_crop((32, 32), 0.6), 0, numbers=64), textbook_view(32, 0.6)
    show("500 images in memory to 32 pixels, one core", rates(500, rounds, **{
        "textbook": batches_of(lambda i: theirs(Image.fromarray(items.items[i])), 500), "ours": batches_of(lambda i: views[0, i], 500)}))


def moco_views(side: int, rounds: int) -> None:
    """Two views of each image with all colours and blur, normalised, on one core."""
    images, pictures = shapes(128, 0, side), [Image.fromarray(picture) for picture in shapes(128, 0, side).items]
    views, normalize = Views(images, TwoViews(random_crop((side, side), 0.08)), 0, 2 * NUMBERS), ViT(side, side // 4).normalize
    blur = v2.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(np.random.uniform(0.1, 2))))
    crop = v2.Compose([v2.RandomResizedCrop(side, (0.08, 1.0), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip()])
    colours = [v2.Compose([
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), v2.RandomGrayscale(0.2), v2.RandomApply([blur], BLUR[i]),
        v2.RandomSolarize(128, SOLARIZE[i]), v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])
        for i in (0, 1)]
    pixels, numbers, *_ = default_collate([views[0, i] for i in range(128)])
    pixels = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format).div_(255)

    def ours():
        pixels, numbers, *_ = default_collate([views[0, i] for i in range(128)])
        pixels = pixels.movedim(-1, -3).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        return recoloured(pixels, numbers)

    def recoloured(pixels: torch.Tensor, numbers: torch.Tensor):
        return [normalize(view) for view in recolour_views(pixels.clone(), numbers, 2.0)]
    show(f"128 images to two views of {side} pixels, one core", rates(256, rounds, **{
        "textbook": lambda: [torch.stack([colours[i](crop(picture)) for picture in pictures]) for i in (0, 1)], "ours": ours}), "views/s")
    show(f"colours and blur of 256 views of {side} pixels, one core", rates(256, rounds, **{
        "textbook": lambda: [torch.stack([colours[i](picture) for picture in pictures]) for i in (0, 1)],
        "ours": lambda: recoloured(pixels, numbers)}), "views/s")


# ---- whole training steps, by the scripts themselves

METHODS = {"mae": "mae", "mae --teacher": "mae --teacher {teacher}/encoder.pth", "moco_v3": "moco_v3",
           "tinymim": "tinymim --teacher {teacher}/encoder.pth", "g2sd": "g2sd --model tiny --teacher {teacher}/last.pth",
           "finetune": "finetune --eval-every 999"}


@contextmanager
def textbook():
    """Attention written out, and AdamW parameter by parameter."""
    def attention(self: Attention, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split_heads(x)
        return self.proj((relation(q, k).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))
    fused, adamw = Attention.forward, torch.optim.AdamW
    Attention.forward = attention
    torch.optim.AdamW = lambda groups, **options: adamw(groups, **{**options, "fused": False, "foreach": False})
    try:
        yield
    finally:
        Attention.forward, torch.optim.AdamW = fused, adamw


def train(words: str, place: str, out: str) -> dict:
    """The record of the fastest step but for the first two, of a run by one of the scripts, without what it says."""
    script, *rest = shlex.split(words)
    none = dict(new=lambda *_: {})  # a long run makes few pictures and evaluations
    with patch("mae.save_reconstructions", **none), patch.object(vit.Run, "evaluate", **none), \
            open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        importlib.import_module(script).main([*rest, "--out", f"{place}/{out}"])
    gc.collect()
    return fastest(f"{place}/{out}")


def fastest(out: str) -> dict:
    records = [record for record in map(json.loads, open(f"{out}/log.jsonl")) if "images_per_s" in record]
    return max(records[2:], key=lambda record: record["images_per_s"], default={})


def of_a_large_product(device: str) -> float:
    """Operations per second of the product of two large matrices, the most that a network can hope for."""
    side, kind = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, seconds = torch.rand(side, side, dtype=kind, device=device), []
    for _ in range(10):
        start = time.monotonic()
        (a @ a)[0, 0].item()
        seconds.append(time.monotonic() - start)
    return 2 * side ** 3 / min(seconds)


def training_steps(place: str, packed: str, device: str, steps: int, rounds: int) -> None:
    """Each method with its own recipe, images included; the first steps are not counted. Utilisation is the share of
    what a large matrix product reaches in the same run."""
    images, possible = len(open_folder(packed, "train", False)), of_a_large_product(device)
    for recipe, batch, sizes in (("imagenet", 4, "--image-size 224"), ("cifar", 16, "--image-size 36")):
        batch = batch if device == "cpu" else 512
        common = (f"--data {packed} --recipe {recipe} --device {device} --batch-size {batch} --micro-batch {batch} {sizes} --workers 1 "
                  "--log-every 1 --save-minutes 999 --warmup-epochs 0.001 --epochs ")
        some, one = (number * batch / images for number in (steps, 1))
        train(f"mae {common} 0 --model tiny", place, f"teacher-{recipe}")
        for name, words in METHODS.items():
            words, best = f"{words.format(teacher=f'{place}/teacher-{recipe}')} {common}", {}
            out = f"{recipe} {name}".replace(" ", "-")
            with FlopCounterMode(display=False) as counted:
                train(f"{words} {one}", place, out)
            flops = counted.get_total_flops() / batch
            for turn in range(rounds):
                for way in ("textbook", "ours"):
                    with textbook() if way == "textbook" else open(os.devnull):
                        record = train(f"{words} {some}", place, f"{out}-{way}-{turn}")
                    best[way] = max(best.get(way, 0), record["images_per_s"])
            memory = f", {record['memory_gib']} GiB" if device == "cuda" else ""
            show(f"{name}, recipe {recipe}, batch {batch}, {device}, waiting {record['waiting']:.2f}, {flops / 1e9:.2f} GFLOP an image, "
                 f"utilisation {best['ours'] * flops / possible:.0%}{memory}", best)


def beside_the_official(folder: str, device: str, rounds: int) -> None:
    """A training step of MAE ViT-Tiny beside the official model with the same weights, images and masks."""
    sys.path.insert(0, folder)
    np.float, sys.modules["torch._six"] = float, SimpleNamespace(container_abcs=collections.abc)  # gone since it was written
    theirs = importlib.import_module("models_mae").MaskedAutoencoderViT(
        embed_dim=192, depth=12, num_heads=12, decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3,
        norm_layer=vit.layer_norm, norm_pix_loss=True).to(device)
    ours = MaskedAutoencoder(ViT(224)).to(device)
    theirs.load_state_dict({name.removeprefix("encoder."): x for name, x in ours.state_dict().items()})
    losses, best, images = {}, {}, torch.rand(8, 3, 224, 224, device=device)
    optimizers = [torch.optim.AdamW(theirs.parameters()), torch.optim.AdamW(ours.parameters(), fused=True)]
    for _ in range(3 * rounds):
        for name, model, optimizer in (("official", theirs, optimizers[0]), ("ours", ours, optimizers[1])):
            torch.manual_seed(0)
            start = time.monotonic()
            loss = model(images)[0] if model is theirs else model(images)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.setdefault(name, loss.item())
            best[name] = max(best.get(name, 0), len(images) / (time.monotonic() - start))
    show(f"MAE ViT-Tiny, first loss {losses['official']:.5f}, ours {losses['ours']:.5f}, batch 8, {device}", best)


def processes(place: str, packed: str, steps: int) -> None:
    """One process against two, with as many images for each; their fastest step, in which no picture is made."""
    images, best = len(open_folder(packed, "train", False)), {}
    for number in (1, 2):
        words = (f"--data {packed} --recipe imagenet --device cpu --image-size 224 --batch-size {8 * number} --workers 0 --log-every 1 "
                 f"--epochs {steps * 8 * number / images} --warmup-epochs 0.001 --out {place}/processes-{number}")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", str(ROOT / "mae.py"), *words.split()]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        best[f"{number} of one thread"] = fastest(f"{place}/processes-{number}")["images_per_s"]
    show("mae, processes", best)


def steadiness(place: str, steps: int) -> None:
    """Memory and open files of a long run with workers, early and late."""
    seen, look = [], vit.Run.look

    def watch(run, step, *values, **options):
        if step in (run.last // 4, run.last):
            seen.append((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, len(os.listdir("/proc/self/fd"))))
        return look(run, step, *values, **options)
    vit.Run.look = watch
    train(f"mae --width 32 --depth 2 --heads 2 --workers 2 --device cpu --log-every {steps} --epochs {steps * 64 / 20000}", place, "steady")
    vit.Run.look = look
    show(f"memory after {steps // 4} and {steps} steps", dict(zip(("early", "late"), (memory for memory, _ in seen), strict=True)), "MiB")
    show("open files", dict(zip(("early", "late"), (float(files) for _, files in seen), strict=True)), "")


def listing(place: str, folders: int) -> None:
    """Empty files in as many folders as ImageNet has, 1,281 in each; seconds until a run knows them."""
    for folder in range(folders):
        os.makedirs(f"{place}/many/train/{folder:04}")
        for i in range(1281):
            os.close(os.open(f"{place}/many/train/{folder:04}/image_{i:08}.jpg", os.O_CREAT | os.O_WRONLY))
    start = time.monotonic()
    images = open_folder(f"{place}/many", "train", True)
    seconds = time.monotonic() - start
    show(f"to list {len(images):,} files", {"seconds": seconds}, "s")
    show("their names and labels", {"MiB": (images.items.nbytes + images.labels.nbytes) / 2**20}, "MiB")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images with train/")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--official", metavar="DIR", help="clone of facebookresearch/mae; it needs timm 0.3.2")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    rounds, threads = (5 if args.quick else 25), torch.get_num_threads()
    with tempfile.TemporaryDirectory() as place:
        if args.data is None:
            generate(Path(place, "photos"), 120 if args.quick and args.device == "cpu" else 600)
        data, packed = args.data or f"{place}/photos", f"{place}/photos.pixels"
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            pack.main([data, "--out", packed])
        torch.set_num_threads(1)
        input_pipeline(data, packed, 60 if args.quick else 100, rounds)
        for side in (32, 64):
            moco_views(side, rounds)
        torch.set_num_threads(threads)
        training_steps(place, packed, args.device, 5 if args.quick else 10, 1 if args.quick else 3)
        if args.official:
            beside_the_official(args.official, args.device, 2 if args.quick else 8)
        processes(place, packed, 20 if args.quick else 30)
        steadiness(place, 200 if args.quick else 2000)
        listing(place, 20 if args.quick else 1000)
    if args.json:
        args.json.write_text(json.dumps(dict(torch=torch.__version__, device=args.device, **found), indent=1))


if __name__ == "__main__":
    main()
