"""Whole runs: stopped and resumed ones, on one and two processes, in a foreign folder, and with all that users do wrong."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import mae
import vit

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SMALL = "--device cpu --width 16 --heads 2 --depth 2 --batch-size 16 --micro-batch 8 --log-every 1 --workers 0".split()


@pytest.fixture(autouse=True)
def own_folder_and_signals(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def photos(tmp_path) -> str:
    """Labelled pictures that are too large to be packed."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 24), ("val", 5)):
        for name in ("a", "b"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.randint(0, 256, (72, 80, 3), np.uint8)).save(tmp_path / "photos" / split / name / f"{i}.jpg")
    return "photos"


def run(script, *words: str) -> None:
    script.main([*SMALL, *" ".join(words).split()])


def losses(out: str) -> list[float]:
    return [record["loss"] for record in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if "loss" in record]


def assert_same_state(a: str, b: str) -> None:
    first, second = (torch.load(Path(out, "last.pth"), weights_only=True) for out in (a, b))
    assert first["step"] == second["step"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    for i, state in first["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["optimizer"]["state"][i][name]))


def stop_at(step: int, monkeypatch, number=signal.SIGTERM) -> None:
    """The process gets a signal during this step."""
    rate = vit.set_lr

    def set_lr(*arguments):
        stop_at.count += 1
        if stop_at.count == step:
            os.kill(os.getpid(), number)
        rate(*arguments)
    stop_at.count = 0
    for script in (mae, finetune):
        monkeypatch.setattr(script, "set_lr", set_lr)


EVERYTHING = "--mixup 0.8 --cutmix 1 --erasing 0.5 --randaugment 9 --drop-path 0.3 --smoothing 0.1 --clip-grad 1 --labels 48"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("script, options", [(mae, ""), (finetune, EVERYTHING)], ids=["mae", "finetune"])
def test_a_run_stopped_by_sigterm_in_mid_epoch_and_resumed_equals_an_unbroken_one(script, options, workers, photos, monkeypatch):
    command = f"--recipe demo --data {photos} {options} --epochs 4 --batch-size 16 --image-size 16"
    run(script, command, "--out whole")
    with monkeypatch.context() as patch:
        stop_at(8, patch)
        with pytest.raises(SystemExit) as stopped:
            run(script, command, "--out parts")
        assert stopped.value.code == 128 + signal.SIGTERM
    assert 8 <= torch.load("parts/last.pth", weights_only=True)["step"] <= 9   # 3 steps an epoch: inside of one
    run(script, command, f"--out parts --resume --workers {workers}")
    assert_same_state("whole", "parts")
    assert losses("whole") == pytest.approx(losses("parts"), abs=0)


def test_ctrl_c_is_status_130_and_leaves_a_checkpoint(monkeypatch):
    stop_at(3, monkeypatch, signal.SIGINT)
    with pytest.raises(SystemExit) as stopped:
        run(mae, "--epochs 0.1 --out a")
    assert stopped.value.code == 130 and Path("a/last.pth").exists()


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(kills):
    command = [sys.executable, str(ROOT / "mae.py"), *SMALL, "--epochs", "0.048", "--save-minutes", "0"]  # 60 steps
    subprocess.run([*command, "--out", "whole"], check=True, capture_output=True)
    rng = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen([*command, "--out", "parts", "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seen = torch.load("parts/last.pth", weights_only=True)["step"] if Path("parts/last.pth").exists() else 0
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:  # let it come a little further, then kill it anywhere
            lines = Path("parts/log.jsonl").read_text().splitlines() if Path("parts/log.jsonl").exists() else []
            if len(lines) > seen + 40 // kills:
                break
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        process.kill()
        process.wait()
    subprocess.run([*command, "--out", "parts", "--resume"], check=True, capture_output=True)
    assert_same_state("whole", "parts")


@pytest.mark.parametrize("script, options", [
    ("mae.py", "--epochs 0.04"), ("finetune.py", "--epochs 16 --labels 48 --layer-decay 1 --randaugment 9")])
def test_two_processes_have_the_losses_of_one(script, options):
    command = [str(ROOT / script), *SMALL, *options.split()]
    one = subprocess.run([sys.executable, *command, "--out", "one"], capture_output=True, text=True)
    two = subprocess.run([*TORCHRUN, *command, "--out", "two"], capture_output=True, text=True)
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    assert len(losses("one")) >= 48
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)
    if script == "finetune.py":
        assert one.stdout.split()[:2] == two.stdout.split()[:2]  # the same top-1
        neighbours = [str(ROOT / script), *"--device cpu --workers 0 --labels 48 --init one/model.pth --protocol knn".split()]
        votes = [subprocess.run([*start, *neighbours], capture_output=True, text=True).stdout for start in ([sys.executable], TORCHRUN)]
        assert "top1" in votes[0] and votes[0] == votes[1]


def test_a_resumed_run_may_change_the_number_of_processes(monkeypatch):
    run(mae, "--epochs 0.04 --out one")
    stop_at(20, monkeypatch)
    with pytest.raises(SystemExit):
        run(mae, "--epochs 0.04 --out two")
    subprocess.run([*TORCHRUN, str(ROOT / "mae.py"), *SMALL, *"--epochs 0.04 --out two --resume".split()], check=True, capture_output=True)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5)


@pytest.mark.parametrize("to", ["one process", "torchrun"])
def test_two_processes_stop_together_at_a_signal(to, photos):
    """To one of them, or by torchrun to the whole group, in which worker processes decode pictures."""
    data = [] if to == "one process" else ["--data", photos, "--recipe", "demo", "--workers", "1"]
    process = subprocess.Popen([*TORCHRUN, str(ROOT / "mae.py"), *SMALL, "--epochs", "900", "--out", "a", *data], stderr=subprocess.PIPE,
                               text=True)
    deadline = time.time() + 120
    while time.time() < deadline and not (Path("a/log.jsonl").exists() and len(Path("a/log.jsonl").read_text().splitlines()) > 3):
        time.sleep(0.2)
    try:
        children = subprocess.run(["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True).stdout
        ranks = [int(line.split()[0]) for line in children.splitlines() if "mae.py" in line]
        assert len(ranks) == 2, children
        os.kill(ranks[1] if to == "one process" else process.pid, signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert "stopped by SIGTERM and saved" in process.stderr.read()
    assert torch.load("a/last.pth", weights_only=True)["step"] > 3


def test_a_loss_that_is_not_finite_stops_all_and_is_never_saved():
    command = [str(ROOT / "mae.py"), *SMALL, "--blr", "1e30", "--warmup-epochs", "0", "--save-minutes", "0", "--out", "a"]
    done = subprocess.run([*TORCHRUN, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.count("step 2: loss") == 1 and "--blr" in done.stderr
    for file in Path("a").glob("*.pth"):
        assert all(v.isfinite().all() for v in torch.load(file, weights_only=True)["model"].values())


def test_accumulation_gives_the_losses_of_the_whole_batch():
    run(mae, "--epochs 0.03 --micro-batch 16 --out whole")
    run(mae, "--epochs 0.03 --micro-batch 4 --out parts")
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-5)


# ---- in and out

@pytest.mark.parametrize("script", ["mae", "finetune"])
def test_a_script_and_vit_alone_in_a_folder_work_without_a_warning(script, tmp_path):
    for name in (script, "vit"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    strict = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-W", "error::FutureWarning"]
    subprocess.run([*strict, "-c", f"import {script}"], check=True, cwd=tmp_path)
    told = subprocess.run([*strict, f"{script}.py", "--help"], check=True, cwd=tmp_path, capture_output=True, text=True).stdout
    assert "--batch-size" in told and "demo" in told
    done = subprocess.run([*strict, f"{script}.py", *SMALL, "--epochs", "0.02" if script == "mae" else "1"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(tmp_path, f"runs/{script}-demo", "encoder.pth" if script == "mae" else "model.pth").exists()


def test_what_a_run_writes():
    run(mae, "--epochs 0.05 --out a")
    assert {file.name for file in Path("a").iterdir()} == {"args.json", "log.jsonl", "last.pth", "encoder.pth", "reconstruction.png", "pictures"}
    file = torch.load("a/encoder.pth", weights_only=True)
    assert set(file["config"]) >= {"image_size", "patch_size", "channels", "width", "depth", "heads", "last_heads", "mlp_ratio", "act",
                                   "qkv_bias", "pool", "classes", "mean", "std"}
    network = vit.ViT(**{name: value for name, value in file["config"].items() if name not in ("mean", "std")})
    assert vit.load_encoder(network, file["model"], file["config"]) == []
    records = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    assert records[0].keys() >= {"step", "epoch", "loss", "lr", "images_per_s", "waiting", "eta_s"}
    assert any("masked_mse" in record for record in records)


def test_an_untrained_network_is_no_better_than_patch_means():
    run(mae, "--epochs 0 --out a")
    args = torch.load("a/last.pth", weights_only=True)["args"]
    model = mae.build(__import__("argparse").Namespace(**args), None)
    score = mae.save_reconstructions(model, vit.shapes(100, 0), vit.normalizer(args["mean"], args["std"], torch.device("cpu")),
                     __import__("argparse").Namespace(**args), vit.World(0, 1, torch.device("cpu")), Path("a/x.png"))
    assert score["masked_mse"] > score["baseline_mse"]


def test_numbered_folders_and_no_overwriting():
    run(mae, "--epochs 0")
    run(mae, "--epochs 0")
    assert Path("runs/mae-demo-2/encoder.pth").exists()
    with pytest.raises(vit.InputError, match="holds a run already"):
        run(mae, "--epochs 0 --out runs/mae-demo")


def test_dmae_learns_from_a_teacher_that_stays_out_of_its_files():
    run(mae, "--epochs 0.02 --width 24 --heads 3 --out teacher")
    for teacher in ("teacher/encoder.pth", "teacher/last.pth"):
        run(mae, f"--epochs 0.02 --teacher {teacher} --out {teacher.replace('/', '-')}")
    assert_same_state("teacher-encoder.pth", "teacher-last.pth")
    state = torch.load("teacher-last.pth/last.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in state} == {"encoder", "mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks",
                                                      "decoder_norm", "decoder_pred", "adapters"}
    record = json.loads(Path("teacher-last.pth/log.jsonl").read_text().splitlines()[0])
    assert record["loss"] == pytest.approx(record["reconstruction"] + record["attention"], rel=1e-6)
    run(mae, "--epochs 0 --patch-size 8 --width 24 --heads 3 --out coarse")
    with pytest.raises(vit.InputError, match="patches"):
        run(mae, "--teacher coarse/encoder.pth --out b")


def torn(path: str) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:len(data) // 2])


def test_resume_takes_the_previous_checkpoint_if_the_last_is_torn(capsys):
    run(mae, "--epochs 0.02 --save-minutes 0 --out a")
    torn("a/last.pth")
    run(mae, "--epochs 0.02 --save-minutes 0 --out a --resume")
    assert "a/last.pth: not a readable checkpoint" in capsys.readouterr().err
    run(mae, "--epochs 0.02 --out b")
    assert_same_state("a", "b")
    torn("a/last.pth"), torn("a/prev.pth")
    with pytest.raises(vit.InputError, match="no readable checkpoint"):
        run(mae, "--epochs 0.02 --out a --resume")


def test_resume_is_refused_where_it_would_not_continue(capsys):
    run(mae, "--epochs 0.01 --out a")
    for words, match in (("--out a --resume --epochs 0.02", "epochs 0.01 -> 0.02"), ("--out a --resume --seed 1", "seed 0 -> 1"),
                         ("--resume nowhere", "no checkpoint there"), ("--resume", "needs --out")):
        with pytest.raises(vit.InputError, match=match):
            run(mae, "--epochs 0.01", words)
    with pytest.raises(vit.InputError, match="of mae, not of finetune"):
        run(finetune, "--resume a")
    run(mae, "--epochs 0.01 --out new --resume")
    assert "a new run starts" in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so():
    code = ("import resource, sys; sys.path.insert(0, %r); import mae, vit; "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "vit.launch(mae.main)" % str(ROOT))
    run(mae, "--epochs 0.01 --out a")
    before = Path("a/last.pth").read_bytes()
    done = subprocess.run([sys.executable, "-c", code, *SMALL, "--epochs", "0.01", "--out", "a", "--resume"], capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert Path("a/last.pth").read_bytes() == before and not list(Path("a").glob("*.new"))


@pytest.mark.parametrize("words, message", [
    ("--data nowhere", "no such folder"), ("--mask-ratio 1", "mask ratio 1.0"), ("--image-size 34", "multiple of the patch size"),
    ("--batch-size 32000", "less than one batch"), ("--batch-size 50 --micro-batch 7", "--batch-size 50"), ("--decoder 96x1x0", "--decoder 96x1x0"),
    ("--decoder 96x1", "--decoder 96x1"), ("--teacher nothing.pth", "nothing.pth: no such file"), ("--precision fp16", "needs a GPU"),
    ("--heads 5", "cannot be divided"), ("--out args.json/x", "cannot be written"), ("--device cuda", "finds 0 GPUs")])
def test_bad_input_is_one_clear_line(words, message):
    Path("args.json").write_text("{}")
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(vit.InputError, match=message):
        run(mae, "--epochs 0.01 --micro-batch 64", words)


@pytest.mark.parametrize("words", ["--mask 0.5", "--unknown 1", "--epochs -1", "--batch-size 0", "--model gigantic", "--epochs nan", "--crop-min 2",
                                   "--mask-ratio -1", "--mlp-ratio -1", "--act swish"])
def test_flags_that_do_not_exist_or_make_no_sense_end_with_status_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(mae, words)
    assert stopped.value.code == 2 and capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    ("--eval", "need --init"), ("--protocol linear", "need --init"),
    ("--labels 100000", "20000 labelled"), ("--init a/encoder.pth --width 32", "has 16"),
    ("--init a/encoder.pth --eval", "knows 0 classes"), ("--init a/encoder.pth --protocol linear --micro-batch 10", "BatchNorm")])
def test_bad_input_for_finetune_is_one_clear_line(words, message):
    mae.main([*SMALL, "--epochs", "0", "--out", "a"])
    small = [] if "width" in words else ["--depth", "2"]
    with pytest.raises(vit.InputError, match=message):
        finetune.main(["--device", "cpu", *small, *words.split()])


def test_an_environment_without_its_processes_is_refused():
    done = subprocess.run([sys.executable, str(ROOT / "mae.py"), *SMALL], env={**os.environ, "WORLD_SIZE": "2"}, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and "torchrun" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_a_gpu_trains_in_every_precision(precision):
    words = f"--epochs 0.1 --log-every 10 --precision {precision}".split()
    mae.main([*SMALL[2:], "--device", "cuda", "--out", "a", *words])
    assert losses("a")[-1] < losses("a")[0]
