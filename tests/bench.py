"""Speed, as ratios of two ways to do the same in one run, because machines are noisy. Run by hand:

    python tests/bench.py                      generated images
    python tests/bench.py --data /imagenet     files of your own, for the input pipeline
"""
import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mae import MaskedAutoencoder  # noqa: E402
from vit import SIZES, Attention, Images, Views, ViT, open_images, random_crop, relation, shapes  # noqa: E402


def rates(images: int, device: str, rounds: int = 7, **ways: Callable[[], object]) -> dict[str, float]:
    """Images per second of each way: the median over rounds in which all ways take turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name] += [time.perf_counter() - start] if turn else []
    return {name: images / statistics.median(values) for name, values in times.items()}


def show(title: str, found: dict[str, float]) -> None:
    first = next(iter(found.values()))
    print(title)
    for name, rate in found.items():
        print(f"  {name:<52} {rate:10.1f} images/s   x {rate / first:.2f}")


def explicit_attention(self: Attention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = self.split_heads(x)
    return self.proj((relation(q, k).softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2))


def training_steps(device: str) -> None:
    torch.manual_seed(0)
    batch = 256 if device == "cuda" else 16
    model = MaskedAutoencoder(ViT(**SIZES["tiny"])).to(device)
    classifier = ViT(**SIZES["tiny"], pool="mean", classes=1000).to(device)
    pixels = torch.randn(batch, 3, 224, 224, device=device)
    fused = Attention.forward

    def step(network, attention, dtype):
        def run():
            Attention.forward = attention
            with torch.autocast(device, dtype, enabled=dtype is not None):
                out = network(pixels)
            (out["loss"] if isinstance(out, dict) else out.float().square().mean()).backward()
            Attention.forward = fused
        return run
    for name, network in (("MAE ViT-Tiny, 224 pixels, a training step", model), ("classifier ViT-Tiny, 224 pixels, a training step", classifier)):
        ways = {"explicit attention, float32": step(network, explicit_attention, None), "fused attention, float32": step(network, fused, None),
                "fused attention, bfloat16": step(network, fused, torch.bfloat16)}
        if device == "cuda":
            ways["fused attention, bfloat16, compiled"] = step(torch.compile(network), fused, torch.bfloat16)
        show(f"{name}, batch {batch}, {device}", rates(batch, device, **ways))


def textbook(side: int, smallest: float) -> v2.Compose:
    """As in the official code: crop and flip of a PIL image, then floats, normalised, all in the worker."""
    return v2.Compose([v2.RandomResizedCrop(side, (smallest, 1), interpolation=v2.InterpolationMode.BICUBIC), v2.RandomHorizontalFlip(),
                       v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])


def input_pipeline(images: Images, side: int, smallest: float, title: str) -> None:
    """What a worker does for an image, on one core: from a file, or from an array in memory, to a batch."""
    if images.items.ndim == 1:
        paths = [Path(images.root, name.decode()) for name in images.items]
        pictures = (lambda i: Image.open(paths[i]).convert("RGB"))
    else:
        pictures = (lambda i: Image.fromarray(images.items[i]))
    theirs, views, number = textbook(side, smallest), Views(images, random_crop((side, side), smallest), 0, numbers=196), range(len(images))
    show(f"{title}, {len(images)} images to batches of {side} pixels, one core", rates(
        len(images), "cpu", rounds=5,
        **{"PIL, float32, normalised, as in the official code": lambda: default_collate([theirs(pictures(i)) for i in number]),
           "ours: bytes, seeds and masks' noise (floats on the device)": lambda: default_collate([views[0, i] for i in number])}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads")
    training_steps(args.device)
    torch.set_num_threads(1)
    input_pipeline(shapes(2000, 0), 32, 0.6, "in memory")
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            rng = np.random.default_rng(0)
            for i in range(50):  # smooth images of ImageNet's usual size
                small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
                small.resize((500, 375), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=90)
        files = open_images(argparse.Namespace(data=args.data or folder, image_size=224, val_share=0.0))
        some = np.linspace(0, len(files) - 1, min(len(files), 100)).astype(int)
        input_pipeline(files.subset(some), 224, 0.2, f"from {args.data or 'generated JPEGs'}")


if __name__ == "__main__":
    main()
