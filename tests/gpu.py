"""What only a GPU can show, by one command and in one table. By hand:

    python tests/gpu.py            every script in bf16, fp16 and fp32, eager and compiled; then tests/bench.py
    python tests/gpu.py --quick    in bf16 alone, compiled only where the network is tiny

Ends with status 1 if a check failed, 2 if there is no GPU.
"""
import argparse
import gc
import importlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
import mae  # noqa: E402
import vit  # noqa: E402
from tests import bench  # noqa: E402
from tests.test_runs import COMMANDS, STILL, TINY, TORCHRUN, losses  # noqa: E402

# 30 steps of 16 images at rates at which these are enough to learn something; every step is a record.
COMMON = "--device cuda --epochs 10 --warmup-epochs 1 --workers 2 "
SIZES = {"tiny": COMMON + "--blr 4e-2", "224 px": COMMON + "--recipe imagenet --blr 1e-2 --image-size 224 "
         "--patch-size 16 --width 192 --heads 12 --depth 12 --mlp-ratio 4"}
SHORT = "--epochs 2 --warmup-epochs 0.5"
# How far losses may be apart, relatively, by rounding alone: the first six of two ways to compute the same.
NEAR = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 5e-2}
folder, failed = tempfile.TemporaryDirectory(prefix="gpu"), []  # it goes with the program
place = Path(folder.name)


def check(name: str, how: Callable[..., str], *given) -> None:
    """A line of the table: what was checked, what came out, seconds."""
    start = time.monotonic()
    try:
        told = how(*given)
    except Exception as error:
        failed.append(name)
        told = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:100]
    print(f"{name:<40} {told:<64} {time.monotonic() - start:7.1f}", flush=True)
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def make_files() -> str:
    """Photographs of two classes, darker and brighter ones; for each size a teacher and a classifier."""
    rng = np.random.RandomState(0)
    for i in range(29):
        for name, low in (("dark", 0), ("bright", 100)):
            path = place / "photos" / ("train" if i < 24 else "val") / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(low, low + 156, (5, 6, 3), np.uint8)).resize((80, 72)).save(path)
    for size in SIZES:
        for main, out in ((mae.main, "teacher"), (finetune.main, "classes --labels 48")):
            with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
                main(filled(f"{TINY} {SIZES[size]} --epochs 1 --out {{files}}/{out}", size))
    return f"{len(list(place.glob('photos/*/*/*')))} photographs, teachers, classifiers"


def filled(text: str, size: str) -> list[str]:
    return text.format(photos=place / "photos", files=place / size[:3]).split()


def command(name: str, size: str, *more: str) -> list[str]:
    words = filled(" ".join([COMMANDS[name][1], SIZES[size], *more]), size)
    return [word for word in words if name != "g2sd specific" or word not in ("--width", "192")]  # --init has it


def train(name: str, size: str, *more: str, quiet: bool = False, stop: int = 0, out: Path | None = None) -> list[float]:
    """Losses of a run in this process. quiet: a wait in the body of a step, where no look is, is a RuntimeError, but
    for the first steps, in which kernels are tried out. stop: the step that a signal comes in."""
    out, steps, told = out or Path(tempfile.mkdtemp(dir=place)), vit.Run.steps, io.StringIO()

    def watched(self, batches):
        for step in steps(self, batches):
            if step == stop:
                os.kill(os.getpid(), signal.SIGTERM)
            torch.cuda.set_sync_debug_mode("error" if quiet and step > 3 else "default")
            yield step
            torch.cuda.set_sync_debug_mode("default")
    with patch.object(vit.Run, "steps", watched), redirect_stderr(told), redirect_stdout(told):
        try:
            importlib.import_module(COMMANDS[name][0]).main([*command(name, size, *more), "--out", str(out)])
        except SystemExit as end:
            if end.code != 128 + signal.SIGTERM:
                raise AssertionError(told.getvalue().strip().splitlines()[-1]) from None
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return losses(str(out))


def near(some: list[float], others: list[float], limit: float, first: int = 6) -> str:
    apart = max(abs(x - y) / abs(y) for x, y in zip(some[:first], others[:first], strict=True))
    assert apart <= limit, f"losses are {apart:.1e} apart, more than {limit:.0e}"
    return f"losses {apart:.1e} apart (at most {limit:.0e})"


def learns(name: str, size: str, precision: str) -> str:
    """A loss that is not finite would have ended the run."""
    found = train(name, size, STILL.get(name, ""), f"--precision {precision}")
    first, last = np.mean(found[:5]), np.mean(found[-10:])
    assert last < first, f"the loss does not fall: {first:.4g} -> {last:.4g}"
    return f"loss {first:.4g} -> {last:.4g}"


def alike(name: str, size: str, precision: str, other: str, limit: float, first: int = 6) -> str:
    """The same run with another option, without what is drawn step by step: its first losses."""
    words = (STILL.get(name, ""), SHORT, f"--precision {precision}")
    return near(train(name, size, *words, other), train(name, size, *words), limit, first)


def never_waits(name: str, *more: str) -> str:
    none = dict(new=lambda *_: {})  # evaluations and pictures may wait: a run makes few of them
    with patch.object(vit.Run, "evaluate", **none), patch.object(mae, "save_reconstructions", **none):
        steps = len(train(name, "tiny", *more, quiet=True))
    assert steps == 30, f"the run ended after {steps} of 30 steps"
    return "none in 27 of 30 steps"


def wait_is_found() -> str:
    """What `never_waits` says of a step with an .item()."""
    try:
        with patch.object(vit.Run, "add", lambda self, loss: loss.item()):
            never_waits("mae")
    except RuntimeError as error:
        assert "synchroniz" in str(error), error
        return str(error).splitlines()[0][:60]
    raise AssertionError("an .item() in a step was not found")


def kernels(name: str, precision: str) -> str:
    """That AdamW is fused, and which attention torch chose."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        train(name, "224 px", SHORT, f"--precision {precision} --epochs 1 --workers 0")
    names = {event.key.removeprefix("aten::") for event in seen.key_averages()}
    assert "_fused_adamw_" in names, "AdamW is not fused"
    attention = {key for key in names if key.startswith("_scaled_dot_product") and not key.endswith("backward")}
    assert attention and not any("math" in key for key in attention), f"attention by {attention or 'none'}"
    return "fused AdamW; " + ", ".join(sorted(key.removeprefix("_scaled_dot_product_") for key in attention))


def resumed(name: str, precision: str) -> str:
    """Stopped by a signal in step 8 of 12 and continued; some kernels add in any order."""
    words, out = (STILL.get(name, ""), f"--epochs 4 --precision {precision}"), Path(tempfile.mkdtemp(dir=place))
    before, after = train(name, "tiny", *words, stop=8, out=out), train(name, "tiny", *words, "--resume", out=out)
    assert (len(before), len(after)) == (8, 12), f"{len(before)} steps before, {len(after)} after it"
    return near(after, train(name, "tiny", *words), NEAR[precision], first=12)


def several(name: str, processes: int) -> str:
    words, out = (STILL.get(name, ""), SHORT, "--precision fp32"), Path(tempfile.mkdtemp(dir=place))
    script = [str(ROOT / f"{COMMANDS[name][0]}.py"), *command(name, "tiny", *words), "--out", str(out)]
    ended = subprocess.run([*TORCHRUN[:-1], f"--nproc_per_node={processes}", *script], capture_output=True, text=True)
    assert ended.returncode == 0, next((x for x in ended.stderr.splitlines() if ".py: " in x), ended.stderr[-80:])
    return near(losses(str(out)), train(name, "tiny", *words), NEAR["fp32"])


def memory(script: str, size: str) -> str:
    """Of two steps of the model in bf16 with as many images of 224 pixels as vit.MICRO_BATCH says."""
    rows, words = vit.MICRO_BATCH[size], ["--recipe", "imagenet", "--model", size]
    model = mae.build(mae.parse_args(words), None) if script == "mae" else \
        finetune.build(*finetune.parse_args(words), 1000)[0]
    optimizer = torch.optim.AdamW(model.cuda().parameters(), fused=True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(torch.rand(rows, 3, 224, 224, device="cuda"))
        (out["loss"] if script == "mae" else out.float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated()
    assert peak < 80e9, f"{peak / 2**30:.1f} GiB for {rows} images"
    return f"{peak / 2**30:.1f} GiB for {rows} images"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    if not torch.cuda.is_available():
        print("tests/gpu.py: torch finds no GPU here", file=sys.stderr)
        return 2
    gpus, precisions = torch.cuda.device_count(), ["bf16"] if quick else ["bf16", "fp16", "fp32"]
    processes = max(n for n in (1, 2, 4, 8) if n <= gpus)
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {gpus} x {torch.cuda.get_device_name()}\n")
    print(f"{'check':<40} {'result':<64} {'seconds':>7}")
    check("files", make_files)
    check("an .item() in a step is found", wait_is_found)
    for name in COMMANDS:
        for precision in precisions:
            check(f"{name}, {precision}: waits", never_waits, name, f"--precision {precision}")
            check(f"{name}, {precision}: kernels", kernels, name, precision)
            for size in SIZES:
                check(f"{name}, {precision}, {size}: learns", learns, name, size, precision)
                if size == "tiny" or not quick:
                    check(f"{name}, {precision}, {size}: compiled", alike, name, size, precision, "--compile",
                          NEAR[precision])
        for size in SIZES:
            check(f"{name}, {size}: as on the CPU", alike, name, size, "fp32", "--device cpu", 1e-4, 1)
        check(f"{name}: resumed", resumed, name, "bf16" if quick else "fp16")
        check(f"{name}: {processes} by torchrun (NCCL), one without", several, name, processes)
    for script in ("mae", "finetune"):
        for model in ("tiny", "small", "base", "large", "huge"):
            check(f"peak memory, {script} {model}", memory, script, model)
    print(f"failed: {len(failed)}", *failed, sep="\n  ")
    sys.argv[1:] = ["--quick"] * quick
    bench.main()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
