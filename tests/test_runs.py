"""Whole runs of every script: stopped, killed and resumed, on one and two processes, copied out, and all that users do wrong.

Workers are those that a user gets by default, but where a test says otherwise: on a CPU a quarter of the cores.
"""
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
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
HOW = dict(one=[sys.executable], two=TORCHRUN)  # processes
SMALL = "--device cpu --recipe demo --data {photos} --image-size 16 --patch-size 4 --batch-size 16 --log-every 1 --epochs 4 "
TINY = SMALL + "--width 16 --heads 2 --depth 2 "
LABELS = "--mixup 0.8 --cutmix 1 --erasing 0.5 --randaugment 9 --drop-path 0.3 --smoothing 0.1 --labels 48 --micro-batch 8"
# Every method, 12 steps of 3 an epoch; {files} holds a teacher and a classifier.
COMMANDS = {
    "mae": ("mae", TINY + "--micro-batch 8"),
    "dmae": ("mae", TINY + "--teacher {files}/teacher/encoder.pth"),
    "moco_v3": ("moco_v3", TINY + "--hidden 32 --projection 8 --blur 1"),
    "tinymim": ("tinymim", TINY + "--micro-batch 8 --teacher {files}/teacher/encoder.pth"),
    "tinymim study": ("tinymim", TINY + "--micro-batch 8 --teacher {files}/teacher/encoder.pth --target qk block "
                      "--mask-ratio 0.5 --mim-weight 1"),
    "g2sd": ("g2sd", TINY + "--micro-batch 8 --teacher {files}/teacher/last.pth"),
    "g2sd specific": ("g2sd", SMALL.replace("demo", "demo-specific").replace("--patch-size 4 ", "") + LABELS
                      + " --stage specific --init {files}/teacher/encoder.pth --teacher {files}/classes/model.pth"),
    "finetune": ("finetune", TINY + LABELS + " --clip-grad 1 --eval-every 2"),
}
SCRIPTS = sorted({script for script, _ in COMMANDS.values()})


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, str]:
    """A folder of labelled photographs, and one with a teacher and a classifier trained on them for a step."""
    photos, files = (tmp_path_factory.mktemp(name) for name in ("photos", "files"))
    rng = np.random.RandomState(0)
    for split, number in (("train", 24), ("val", 5)):
        for name in ("a", "b"):
            (photos / split / name).mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.randint(0, 256, (72, 80, 3), np.uint8)).save(photos / split / name / f"{i}.jpg")
    found = dict(photos=str(photos), files=str(files))
    words = TINY.format(**found).replace("--epochs 4", "--epochs 1") + "--workers 0 --out "
    mae.main((words + f"{files}/teacher").split())
    finetune.main((words + f"{files}/classes --labels 48").split())
    return found


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not multiprocessing.active_children()


def words_of(name: str, places: dict[str, str], *more: str) -> list[str]:
    return [*COMMANDS[name][1].format(**places).split(), *" ".join(more).split()]


def run(name: str, places: dict[str, str], *more: str) -> None:
    importlib.import_module(COMMANDS[name][0]).main(words_of(name, places, *more))


def command(name: str, places: dict[str, str], *more: str) -> list[str]:
    return [str(ROOT / f"{COMMANDS[name][0]}.py"), *words_of(name, places, *more)]


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]


def losses(out: str) -> list[float]:
    return [record["loss"] for record in records(out) if "loss" in record]


def assert_same_state(one: str, other: str) -> None:
    a, b = (torch.load(Path(out, "last.pth"), weights_only=True) for out in (one, other))
    assert a["step"] == b["step"]
    for name, value in a["model"].items():  # the buffers of BatchNorm included
        assert torch.equal(value, b["model"][name]), name
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][i][name])) for name, value in state.items())


def at_step(number: int, act, monkeypatch) -> None:
    """Something happens before this step of a run in this process."""
    rate, steps = vit.cosine, []

    def cosine(*values):
        steps.append(0)
        if len(steps) == number:
            act()
        return rate(*values)
    monkeypatch.setattr(vit, "cosine", cosine)


def stop(number: int = signal.SIGTERM):
    return lambda: os.kill(os.getpid(), number)


# ---- stopped and resumed

@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_stopped_in_mid_epoch_and_resumed_equals_an_unbroken_one(name, places, monkeypatch):
    """Two workers, then none, in one part of the run and in the other."""
    run(name, places, "--workers 2 --out whole")
    with monkeypatch.context() as patch:
        at_step(8, stop(), patch)
        with pytest.raises(SystemExit) as stopped:
            run(name, places, "--out parts")
    assert stopped.value.code == 128 + signal.SIGTERM
    assert torch.load("parts/last.pth", weights_only=True)["step"] == 8  # of 3 an epoch
    assert losses("parts") == losses("whole")[:8]
    run(name, places, "--workers 0 --out parts --resume")
    assert_same_state("whole", "parts")
    assert losses("parts") == losses("whole") and len(losses("whole")) == 12
    handed = "model.pth" if name in ("finetune", "g2sd specific") else "encoder.pth"
    assert all(torch.equal(x, y) for x, y in zip(*(torch.load(f"{out}/{handed}", weights_only=True)["model"].values() for out in ("whole", "parts"))))


def test_a_record_is_written_before_what_is_saved_also_between_two_records(places, monkeypatch):
    run("mae", places, "--log-every 5 --out whole")
    with monkeypatch.context() as patch:
        at_step(7, stop(), patch)
        with pytest.raises(SystemExit):
            run("mae", places, "--log-every 5 --out parts")
    run("mae", places, "--log-every 5 --out parts --resume")
    assert_same_state("whole", "parts")
    (five, ten, twelve), rest = ([r for r in records(out) if "loss" in r] for out in ("whole", "parts"))
    assert [r["step"] for r in (five, ten, twelve)] == [5, 10, 12] and [r["step"] for r in rest] == [5, 7, 10, 12]
    assert rest[0]["loss"] == five["loss"] and rest[3]["loss"] == twelve["loss"]
    assert (2 * rest[1]["loss"] + 3 * rest[2]["loss"]) / 5 == pytest.approx(ten["loss"], rel=1e-12)


def test_ctrl_c_is_status_130_and_leaves_a_checkpoint_and_a_second_one_leaves_at_once(places, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at_step(3, stop(signal.SIGINT), patch)
        with pytest.raises(SystemExit) as stopped:
            run("mae", places, "--out a")
    assert stopped.value.code == 130 and torch.load("a/last.pth", weights_only=True)["step"] == 3
    told = capfd.readouterr().err
    assert "stopping at the next look" in told and "saved; --resume continues" in told
    at_step(3, lambda: [stop(signal.SIGINT)(), stop(signal.SIGINT)()], monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run("mae", places, "--out b")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


KILLS = [("mae", "one", 2), *(pytest.param(name, how, kills, marks=pytest.mark.slow) for name in COMMANDS for how, kills in (("one", 20), ("two", 5)))]


@pytest.mark.parametrize("name, how, kills", KILLS)
def test_a_run_killed_at_random_moments_ends_like_an_unbroken_one(name, how, kills, places):
    words = [*HOW[how], *command(name, places, "--epochs 20 --save-minutes 0")]  # 60 steps
    subprocess.run([*words, "--out", "whole"], check=True, capture_output=True)
    rng = random.Random(0)
    for _ in range(kills):
        process = begun([*words, "--out", "parts", "--resume"])
        seen = torch.load("parts/last.pth", weights_only=True)["step"] if Path("parts/last.pth").exists() else 0
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:  # let it come a little further, then kill it anywhere
            lines = Path("parts/log.jsonl").read_text().splitlines() if Path("parts/log.jsonl").exists() else []
            if len(lines) > seen + 40 // kills:
                break
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        for number in processes_of(process) if how == "two" else [process.pid]:
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        process.wait()
    subprocess.run([*words, "--out", "parts", "--resume"], check=True, capture_output=True)
    assert_same_state("whole", "parts")
    assert losses("parts") == losses("whole")


# ---- several processes

STILL = {"finetune": "--mixup 0 --cutmix 0 --drop-path 0 --erasing 0", "g2sd specific": "--mixup 0 --cutmix 0 --drop-path 0 --erasing 0",
         "tinymim": "--drop-path 0", "tinymim study": "--drop-path 0"}  # without what is drawn process by process


@pytest.fixture(scope="module")
def on_two_processes(places, tmp_path_factory) -> Path:
    """Where two processes have run every command, one after the other, and k-NN, its answer in `votes`."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [(COMMANDS[name][0], words_of(name, places, STILL.get(name, ""), "--workers 1 --out", name.replace(" ", "-")))
            for name in COMMANDS if name != "mae"]
    jobs.append(("finetune", f"--device cpu --data {places['photos']} --init finetune/model.pth --protocol knn".split()))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "all.py").write_text(f"""import importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
dist.init_process_group("gloo")
dist.init_process_group = lambda *values, **options: None  # once for all
for script, words in json.load(open("jobs.json")):
    importlib.import_module(script).main(words)
""")
    done = subprocess.run([*TORCHRUN, "all.py"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "votes").write_text(done.stdout.splitlines()[-1])
    return folder


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "mae"])
def test_two_processes_have_the_losses_of_one(name, places, on_two_processes, capsys):
    run(name, places, STILL.get(name, ""), "--out one")
    two = str(on_two_processes / name.replace(" ", "-"))
    assert losses(two) == pytest.approx(losses("one"), rel=1e-5) and len(losses("one")) == 12
    assert [r["top1"] for r in records("one") if "top1" in r] == [r["top1"] for r in records(two) if "top1" in r]
    if name == "finetune":
        capsys.readouterr()
        finetune.main(f"--device cpu --data {places['photos']} --init {two}/model.pth --protocol knn".split())
        assert capsys.readouterr().out.strip() == (on_two_processes / "votes").read_text()


def test_a_run_may_go_from_one_process_to_two_with_default_workers(places, monkeypatch):
    run("mae", places, "--out one")
    with monkeypatch.context() as patch:
        at_step(5, stop(), patch)
        with pytest.raises(SystemExit):
            run("mae", places, "--out two")
    subprocess.run([*TORCHRUN, *command("mae", places, "--out two --resume")], check=True, capture_output=True)
    assert losses("two") == pytest.approx(losses("one"), rel=1e-5) and len(losses("two")) == 12


def hear_all() -> None:
    """The tests themselves may run under nohup or in the background, where these are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def begun(words: list[str], stdout: int | None = None, **environment: str) -> subprocess.Popen:
    """A program that leads a session and hands a mark on to all that it starts; those of torchrun lead sessions of their own."""
    mark = f"{os.getpid()}.{time.time()}"
    process = subprocess.Popen(words, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=hear_all,
                               env={**os.environ, **environment, "TEST_MARK": mark})
    process.mark = f"TEST_MARK={mark}".encode()
    return process


def processes_of(process: subprocess.Popen) -> list[int]:
    """What still runs of a program and of all that it has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found += [int(folder.name)] * (process.mark in (folder / "environ").read_bytes().split(b"\0"))
    return found


def started(words: list[str], steps: int = 4, out: str = "a") -> subprocess.Popen:
    """A program that has done some steps."""
    process = begun(words)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline and not (Path(out, "log.jsonl").exists() and len(Path(out, "log.jsonl").read_text().splitlines()) >= steps):
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("to", ["one process", "torchrun"])
def test_two_processes_stop_together_at_a_signal(to, places):
    process = started([*TORCHRUN, *command("mae", places, "--epochs 9000 --out a")])
    try:
        children = subprocess.run(["ps", "-ww", "--ppid", str(process.pid), "-o", "pid=,args="], capture_output=True, text=True).stdout
        ranks = [int(line.split()[0]) for line in children.splitlines() if "mae.py" in line]
        assert len(ranks) == 2, children
        os.kill(ranks[1] if to == "one process" else process.pid, signal.SIGTERM)
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert "saved; --resume continues" in process.stderr.read()
    assert torch.load("a/last.pth", weights_only=True)["step"] >= 4


# ---- every way out: within ten seconds, and no process is left

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_ends_it(number, places):
    process = started([sys.executable, *command("mae", places, "--epochs 9000 --workers 2 --out a")])
    os.killpg(process.pid, number)  # as a terminal or a scheduler does it: workers get it, too
    assert process.wait(10) == 128 + number
    assert not processes_of(process) and "saved; --resume continues" in process.stderr.read()
    assert torch.load("a/last.pth", weights_only=True)["step"] >= 4


@pytest.mark.parametrize("how", ["one", "two"])
def test_a_loss_that_is_not_finite_ends_all_processes_and_is_never_saved(how, places):
    words = command("mae", places, "--blr 1e30 --warmup-epochs 0 --save-minutes 0 --out a") + ["--workers", "2"]
    begin = time.time()
    process = begun([*HOW[how], *words])
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and told.count("step 2: loss nan at learning rate") + told.count("step 2: loss inf at learning rate") == 1 and "--blr" in told, told
    assert not processes_of(process) and time.time() - begin < 45
    for file in Path("a").glob("*.pth"):
        assert all(v.isfinite().all() for v in torch.load(file, weights_only=True)["model"].values())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_loss_that_is_not_finite_ends_every_script(name, places, capfd):
    with pytest.raises(SystemExit) as left:
        run(name, places, "--blr 1e30 --min-lr 1e30 --warmup-epochs 0 --workers 2 --out a")
    assert left.value.code == 1 and not multiprocessing.active_children()
    assert "is saved is from before. A lower --blr" in capfd.readouterr().err and not Path("a/last.pth").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_an_exception_in_the_loop_leaves_no_worker_and_gives_the_signals_back(name, places, monkeypatch):
    def fail():
        assert len(multiprocessing.active_children()) == 2
        raise ZeroDivisionError("in the loop")
    before = signal.getsignal(signal.SIGTERM)
    at_step(3, fail, monkeypatch)
    with pytest.raises(ZeroDivisionError) as kept:
        run(name, places, "--workers 2 --out a")
    assert not multiprocessing.active_children() and kept.tb is not None  # also while the error is held
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_full_disk_leaves_the_last_checkpoint_says_so_and_ends(places):
    code = (f"import resource, signal, sys; sys.path.insert(0, {str(ROOT)!r}); import mae, vit; "
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); vit.launch(mae.main)")
    run("mae", places, "--epochs 1 --out a")
    before = Path("a/last.pth").read_bytes()
    process = begun([sys.executable, "-c", code, *words_of("mae", places, "--epochs 1 --workers 2 --out a --resume")])
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and "cannot be written" in told and "Traceback" not in told
    assert Path("a/last.pth").read_bytes() == before and not list(Path("a").glob("*.new")) and not processes_of(process)


@pytest.mark.parametrize("way", ["end of the program", "exception", "os._exit"])
def test_an_abandoned_iterator_does_not_keep_the_program(way):
    code = f"""if True:
        import argparse, os, sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        from vit import *
        args = argparse.Namespace(workers=2, device="cpu", micro_batch=8)
        batches = in_order(Views(shapes(500, 0), CentreCrop((32, 32))), args, World(0, 1, torch.device("cpu"), "fp32"))
        next(batches)
        print("first", flush=True)
        def main():
            {dict([("exception", "1 / 0"), ("os._exit", "sys.exit(3)")]).get(way, "pass")}
        main() if {way == "exception"} else launch(main)"""
    process = begun([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == "first\n"
    told = process.communicate(timeout=10)[1]
    assert process.returncode == {"end of the program": 0, "exception": 1, "os._exit": 3}[way]
    assert not processes_of(process) and ("ZeroDivisionError" in told) == (way == "exception") and "Exception ignored" not in told


def test_killed_minus_nine_the_workers_leave_by_themselves(places):
    process = started([sys.executable, *command("mae", places, "--epochs 9000 --workers 2 --out a")])
    process.kill()
    process.wait()
    deadline = time.time() + 15  # torch's workers look after their parent every five seconds
    while processes_of(process) and time.time() < deadline:
        time.sleep(0.2)
    assert not processes_of(process)


# ---- in and out

@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_and_vit_alone_in_a_folder_work_without_a_warning(script, places, tmp_path):
    for name in (script, "vit"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    name = next(name for name in COMMANDS if COMMANDS[name][0] == script)
    strict = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-W", "error::FutureWarning"]
    done = subprocess.run([*strict, f"{script}.py", *words_of(name, places, "--epochs 1 --warmup-epochs 0.1")], capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr
    assert Path(f"runs/{script}-demo", "model.pth" if script == "finetune" else "encoder.pth").exists()


def test_scripts_in_another_folder_can_be_imported_without_a_warning(tmp_path):
    for name in (*SCRIPTS, "vit"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import sys; sys.path.insert(0, '.'); import {', '.join(SCRIPTS)}; print({', '.join(f'{name}.__file__' for name in SCRIPTS)})"
    done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [f"{tmp_path}/{name}.py" for name in SCRIPTS] and not done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_option_with_the_values_of_one_recipe(script, capsys):
    module = importlib.import_module(script)
    for recipe in module.RECIPES:
        stage = ["--stage", "specific"] if recipe.endswith("-specific") else []
        with pytest.raises(SystemExit) as stopped:
            module.main([*stage, "--recipe", recipe, "--help"])
        told = " ".join(capsys.readouterr().out.split())
        assert stopped.value.code == 0 and f"images per update, on all processes together [{module.RECIPES[recipe]['batch_size']}]" in told


def test_what_a_run_writes(places):
    run("mae", places, "--epochs 5 --out a")
    assert {file.name for file in Path("a").iterdir()} == {"args.json", "lock", "log.jsonl", "last.pth", "encoder.pth", "reconstruction.png",
                                                         "pictures"}
    file = torch.load("a/encoder.pth", weights_only=True)
    assert set(file["config"]) >= {"image_size", "patch_size", "channels", "width", "depth", "heads", "last_heads", "mlp_ratio", "act",
                                   "qkv_bias", "positions", "pool", "classes", "mean", "std"}
    network = vit.ViT(**file["config"])
    assert vit.load_encoder(network, file["model"], file["config"]) == []
    assert records("a")[1].keys() >= {"step", "epoch", "loss", "lr", "images_per_s", "waiting", "eta_s"}
    assert any("masked_mse" in record for record in records("a"))


def test_an_untrained_network_is_no_better_than_a_constant(places):
    run("mae", places, "--epochs 0 --out a")
    args = Namespace(**torch.load("a/last.pth", weights_only=True)["args"])
    score = mae.save_reconstructions(mae.build(args, None), vit.open_images(args), args,
                                     vit.World(0, 1, torch.device("cpu"), "fp32"), Path("a/x.png"))
    assert score["masked_mse"] > score["baseline_mse"]


def test_accumulation_gives_the_losses_of_the_whole_batch(places):
    run("mae", places, "--micro-batch 16 --out whole")
    run("mae", places, "--micro-batch 4 --out parts")
    assert losses("parts") == pytest.approx(losses("whole"), rel=1e-5)


def test_dmae_learns_from_a_teacher_that_stays_out_of_its_files(places):
    run("dmae", places, "--out encoder")
    run("dmae", places, "--out last --teacher", f"{places['files']}/teacher/last.pth")
    assert_same_state("encoder", "last")
    state = torch.load("last/last.pth", weights_only=True)["model"]
    assert {name.split(".")[0] for name in state} == {"encoder", "mask_token", "decoder_pos_embed", "decoder_embed", "decoder_blocks",
                                                      "decoder_norm", "decoder_pred", "adapters"}
    record = next(record for record in records("last") if "loss" in record)
    assert record["loss"] == pytest.approx(record["reconstruction"] + record["attention"], rel=1e-6)
    run("mae", places, "--epochs 0 --patch-size 8 --width 24 --heads 3 --out coarse")
    with pytest.raises(vit.InputError, match="patches"):
        run("mae", places, "--teacher coarse/encoder.pth --out b")


def test_a_folder_holds_one_run(places):
    run("mae", places, "--epochs 0")
    assert Path("runs/mae-demo/encoder.pth").exists()
    for words in ("", "--out runs/mae-demo", "--resume runs/mae-demo --out b"):
        if "--resume" in words:
            run("mae", places, "--epochs 0 --out b --seed 1")
        with pytest.raises(vit.InputError, match="holds a run already: continue it by --out"):
            run("mae", places, "--epochs 0", words)


def test_resume_takes_a_folder_or_a_file_and_may_write_elsewhere(places, monkeypatch):
    run("mae", places, "--out whole")
    with monkeypatch.context() as patch:
        at_step(4, stop(), patch)
        with pytest.raises(SystemExit):
            run("mae", places, "--out a")
    shutil.copytree("a", "b")
    shutil.copytree("a", "c")
    run("mae", places, "--resume a")
    run("mae", places, "--resume b/last.pth")
    run("mae", places, "--resume c --out d")
    for out in ("a", "b", "d"):
        assert_same_state("whole", out)
    assert torch.load("c/last.pth", weights_only=True)["step"] == 4


@pytest.mark.parametrize("script", ["mae", "moco_v3", "finetune"])
def test_every_recipe_cuts_its_batch_for_every_size_of_network(script):
    module, world = importlib.import_module(script), vit.World(0, 1, torch.device("cpu"), "fp32")
    for recipe in module.RECIPES:
        if not recipe.endswith("-linear"):  # which needs a file
            for model in vit.SIZES:
                args = module.parse_args(["--recipe", recipe, "--model", model])
                args = args[0] if script == "finetune" else args
                assert vit.parts_of_batch(args, world) == (1 if script == "moco_v3" else -(-args.batch_size // vit.MICRO_BATCH[model]))


def test_resume_is_refused_where_it_would_not_continue(places, capfd):
    run("mae", places, "--epochs 1 --out a")
    for words, match in (("--out a --resume --epochs 2", "epochs 1.0 -> 2.0"), ("--out a --resume --seed 1", "seed 0 -> 1"),
                         ("--out a --resume --batch-size 8", "batch_size 16 -> 8"), ("--resume nowhere", "nowhere/last.pth: no such file")):
        with pytest.raises(vit.InputError, match=match):
            run("mae", places, "--epochs 1", words)
    with pytest.raises(vit.InputError, match="a/last.pth is no checkpoint of finetune.py"):
        run("finetune", places, "--resume a")
    Path("a/last.pth").write_bytes(Path("a/last.pth").read_bytes()[:5000])
    with pytest.raises(vit.InputError, match="a/last.pth: not a readable checkpoint"):
        run("mae", places, "--epochs 1 --out a --resume")
    run("mae", places, "--epochs 1 --out new --resume")
    assert "no checkpoint in new: a new run starts" in capfd.readouterr().err


@pytest.mark.parametrize("words, message", [
    ("--data nowhere", "nowhere: No such file"), ("--mask-ratio 1", "mask ratio 1.0"), ("--image-size 18", "multiple of the patch size"),
    ("--batch-size 32000 --micro-batch 32000", "48 images, less than one batch"), ("--batch-size 20 --micro-batch 7", "--batch-size 20"),
    ("--decoder 96 1 5", "cannot be divided"), ("--teacher nothing.pth", "nothing.pth: no such file"), ("--precision fp16", "needs a GPU"),
    ("--heads 5", "cannot be divided"), ("--out args.json/x", "cannot be written"), ("--device cuda", "finds 0 GPUs")])
def test_bad_input_is_one_clear_line(words, message, places):
    Path("args.json").write_text("{}")
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(vit.InputError, match=message):
        run("mae", places, "--epochs 1", words)


@pytest.mark.parametrize("words", ["--mask 0.5", "--unknown 1", "--epochs -1", "--batch-size 0", "--model gigantic", "--epochs nan", "--crop-min 2",
                                   "--mask-ratio -1", "--mlp-ratio -1", "--act swish", "--decoder 96 1", "--decoder 96 1 0", "--seed -1",
                                   "--seed 4294967296", "--epochs inf", "--batch-size 1.5"])
def test_flags_that_do_not_exist_or_make_no_sense_end_with_status_2(words, places, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("mae", places, words)
    assert stopped.value.code == 2 and "error: " in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    ("--eval", "need --init"), ("--protocol linear", "need --init"), ("--labels 100000", "48 labelled"),
    ("--init {files}/teacher/encoder.pth --width 32", "has 16"), ("--init {files}/teacher/encoder.pth --eval", "is no classifier but an encoder"),
    ("--init {files}/teacher/encoder.pth --protocol linear --labels 48 --batch-size 20 --micro-batch 10", "BatchNorm")])
def test_bad_input_for_finetune_is_one_clear_line(words, message, places):
    with pytest.raises(vit.InputError, match=message):
        finetune.main(f"--device cpu --data {places['photos']} --recipe demo {words.format(**places)}".split())


def test_an_environment_without_its_processes_is_refused_in_one_line(places, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(vit.InputError, match="^WORLD_SIZE=2 in the environment: .* by torchrun"):
        run("mae", places)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_gpu_trains_in_every_precision(name, precision, places):
    run(name, places, f"--device cuda --precision {precision} --epochs 20 --out a")
    assert losses("a")[-1] < losses("a")[0]
