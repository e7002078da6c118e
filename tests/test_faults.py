"""Promises of a run that someone trusts for a week: how it leaves, whose its folder is, what it believes of what it reads.

Real programs, two workers where nothing else is said. Every day each promise once; `-m slow`: all scripts, with and without
workers, on one and two processes.
"""
import fcntl
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finetune
import mae
import vit
from tests.test_runs import (COMMANDS, HOW, ROOT, TORCHRUN, assert_same_state, at_step, begun, command, losses, own_folder, places,  # noqa: F401
                             processes_of, records, run, started, stop, words_of)
from vit import InputError, ViT, read_encoder

LABELLED = ("finetune", "g2sd specific")


def program(name: str, places, *more: str, patch: str = "") -> list[str]:  # noqa: F811
    """A script with something done to it before it starts; a file, as torchrun takes no -c."""
    Path("program.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {COMMANDS[name][0]} as script, vit; {patch}\n"
                                  "if __name__ == '__main__':\n    vit.launch(script.main)")
    return ["program.py", *words_of(name, places, *more)]


def ended(process: subprocess.Popen, status: int | set[int], seconds: float = 10) -> str:
    """What it has said by its end, which comes in time, with this status, and leaves nobody."""
    try:
        told = process.communicate(timeout=seconds)[1]
    finally:
        left = processes_of(process)
        for number in left:
            os.kill(number, signal.SIGKILL)
    assert process.returncode in (status if isinstance(status, set) else {status}), told
    assert not left
    return told


def signal_all(process: subprocess.Popen, number: int) -> None:
    """One to every process, workers and torchrun too, as a scheduler does it."""
    for each in processes_of(process):
        with suppress(ProcessLookupError):
            os.kill(each, number)


def children_of(number: int) -> list[int]:
    return [int(child) for child in subprocess.run(["ps", "--ppid", str(number), "-o", "pid="], capture_output=True, text=True).stdout.split()]


def matrix(*daily: tuple[str, int, str], names=COMMANDS, workers=(2, 0)):  # noqa: ANN201
    """Every script with and without workers, on one and two processes, as `name, workers, how`: slow, but for what is named."""
    cases = [(name, number, how) for name in names for number in workers for how in HOW]
    return pytest.mark.parametrize("name, workers, how", [pytest.param(*case, marks=() if case in daily else pytest.mark.slow) for case in cases])



# ---- 1, 2: ways to leave

@matrix(*((name, 2, "one") for name in ("mae", "finetune", "moco_v3", "tinymim", "g2sd")))
def test_signals_are_one_signal_however_often_they_come(name, workers, how, places):  # noqa: F811
    rare = "--eval-every 9000" if name in LABELLED else ""
    process = started([*HOW[how], *command(name, places, f"--epochs 9000 --workers {workers} --out a", rare)])
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
        signal_all(process, number)
        time.sleep(0.06)
    told = ended(process, {143, 129} if how == "one" else {1, 143, 129})
    assert told.count("stopping at the next look") == 1 and "saved; --resume continues" in told
    assert "Traceback" not in told or how == "two" and "mae.py" not in told.partition("Traceback")[2]  # torchrun has one
    done = records("a")[-1]["step"]
    assert torch.load("a/last.pth", weights_only=True)["step"] == done >= 4


@matrix(("mae", 2, "one"))
def test_a_terminal_that_is_closed_saves_the_run(name, workers, how, places):  # noqa: F811
    process = started([*HOW[how], *command(name, places, f"--epochs 9000 --workers {workers} --out a")])
    process.stderr.close()  # nobody reads any more
    signal_all(process, signal.SIGHUP)
    assert process.wait(10) == 128 + signal.SIGHUP or how == "two"
    assert not processes_of(process) and torch.load("a/last.pth", weights_only=True)["step"] >= 4


@matrix(("mae", 2, "one"))
def test_the_second_ctrl_c_leaves_at_once_without_a_traceback(name, workers, how, places):  # noqa: F811
    slow = "look = vit.Run.look; vit.Run.look = lambda *values, **options: (__import__('time').sleep(1), look(*values, **options))"
    process = started([*HOW[how], *program(name, places, f"--epochs 9000 --workers {workers} --out a --log-every 1", patch=slow)], steps=1)
    signal_all(process, signal.SIGINT), time.sleep(0.1), signal_all(process, signal.SIGINT)
    told = ended(process, 130 if how == "one" else {1, 130, -2})
    assert "Traceback" not in told or how == "two"  # torchrun has one


@pytest.mark.parametrize("patch, status, told", [
    ("vit.cosine = lambda *values: 1 / 0", 1, "ZeroDivisionError"),
    ("import torch; vit.cosine = lambda *values: torch.empty(2 ** 60)", 2, "out of memory: try a smaller --micro-batch"),
    ("vit.cosine = lambda *values: 1e30", 1, "is saved is from before. A lower --blr"),
    ("import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))", 2,
     "last.pth cannot be written")], ids=["exception", "out of memory", "not finite", "file size"])
@matrix(("mae", 2, "one"))
def test_every_failure_ends_the_program_and_leaves_nobody(name, workers, how, patch, status, told, places):  # noqa: F811
    process = begun([*HOW[how], *program(name, places, f"--workers {workers} --out a", patch=patch)])
    said = ended(process, status if how == "one" else 1, seconds=25 if how == "one" else 45)  # with its start
    assert told in said and (said.count("Traceback") == ("ZeroDivisionError" in told) or how == "two")
    assert not Path("a/last.pth").exists()


@matrix(("finetune", 2, "one"), ("finetune", 2, "two"), names=LABELLED)
def test_a_broken_image_in_evaluation_ends_it_with_what_was_learned(name, workers, how, places, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", places["photos"], data], check=True)
    (data / "val/a/3.jpg").write_bytes(b"no picture")
    process = begun([*HOW[how], *command(name, {**places, "photos": str(data)}, f"--epochs 4 --eval-every 2 --workers {workers} --out a")])
    told = ended(process, 2 if how == "one" else 1, seconds=30)
    assert "val/a/3.jpg: cannot be read" in told and torch.load("a/last.pth", weights_only=True)["step"] == 6


def test_an_evaluation_that_was_cut_off_is_made_up_for(places, monkeypatch, capfd):  # noqa: F811
    run("finetune", places, "--out whole")
    evaluate, calls = vit.evaluate, []

    def cut(*values, **options):
        calls.append(0)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*values, **options)
    with monkeypatch.context() as patch:
        patch.setattr(vit, "evaluate", cut)
        with pytest.raises(SystemExit) as left:
            run("finetune", places, "--out a")
    assert left.value.code == 143 and "stopping: all is saved" in capfd.readouterr().err and torch.load("a/last.pth", weights_only=True)["step"] == 6
    run("finetune", places, "--out a --resume")
    run("finetune", places, "--out a --resume")  # and a run that has ended writes nothing twice
    seen = [[(r["step"], r["top1"]) for r in records(out) if "top1" in r] for out in ("whole", "a")]
    assert seen[0] == seen[1] and [step for step, _ in seen[0]] == [6, 12]
    assert_same_state("whole", "a")


def test_processes_agree_on_which_evaluation_was_made(places, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        at_step(7, stop(), patch)
        with pytest.raises(SystemExit):
            run("finetune", places, "--out a")
    assert torch.load("a/last.pth", weights_only=True)["step"] == 6
    with open("a/log.jsonl", "a") as file:  # as if it had been killed right after the evaluation
        file.write(json.dumps(dict(step=6, top1=12.5, top5=100.0, val_loss=1.0, val_images=10)) + "\n")
    subprocess.run([*TORCHRUN, *command("finetune", places, "--out a --resume")], check=True, capture_output=True, timeout=60)
    assert [r["top1"] for r in records("a") if "top1" in r][0] == 12.5 and len(losses("a")) == 12


# ---- 3: waiting for images

@pytest.mark.parametrize("patch, told", [
    ("vit.Batches.patience = 2; import time; vit.v2.RandomHorizontalFlip.forward = lambda *x: time.sleep(99)", "no image for ten minutes"),
    ("import os, signal; vit.v2.RandomHorizontalFlip.forward = lambda *x: os.kill(os.getpid(), signal.SIGBUS)", "ended by the system, for want of memory"),
    ("vit.v2.RandomHorizontalFlip.forward = lambda *x: (_ for _ in ()).throw(RuntimeError('unable to allocate shared memory(shm) for file </x>: No space"
     " left on device (28)'))", "or of shared memory? Try fewer --workers, in a container --shm-size=16g"),
    ("vit.v2.RandomHorizontalFlip.forward = lambda *x: (_ for _ in ()).throw(OSError(24, 'Too many open files'))", "raise `ulimit -n`")], ids=["a dead file system", "shared memory by signal", "shared memory", "descriptors"])
def test_who_waits_for_images_in_vain_is_told_why(patch, told, places):  # noqa: F811
    process = begun([sys.executable, *program("mae", places, "--workers 2 --out a", patch="import os; " + patch)])
    assert told in ended(process, 2, seconds=25)


@matrix(("mae", 2, "one"), workers=(2,))
def test_what_was_learned_before_a_worker_was_lost_is_kept(name, workers, how, places):  # noqa: F811
    process = started([*HOW[how], *command(name, places, f"--epochs 9000 --workers {workers} --out a", "--save-minutes 0" * (how == "two"))])
    trainer = process.pid if how == "one" else next(child for child in children_of(process.pid) if len(children_of(child)) == workers)
    saved = 3 if how == "one" else torch.load("a/last.pth", weights_only=True)["step"]
    os.kill(children_of(trainer)[0], signal.SIGKILL)
    assert "ended by the system" in ended(process, 2 if how == "one" else 1, seconds=20)
    last = torch.load("a/last.pth", weights_only=True)["step"]
    assert last >= saved and (how == "two" or last >= max(record["step"] for record in records("a")) - 1)


def test_a_run_whose_images_cease_logs_what_it_has_learned(places, monkeypatch):  # noqa: F811
    run("mae", places, "--log-every 100 --out whole")
    answer, calls = vit.Batches.answer, []

    def cease(batches):
        calls.append(0)
        if len(calls) == 14:  # in the middle of step 7
            raise InputError("no more")
        return answer(batches)
    with monkeypatch.context() as patch:
        patch.setattr(vit.Batches, "answer", cease)
        with pytest.raises(InputError, match="no more"):
            run("mae", places, "--log-every 100 --out a")
    assert torch.load("a/last.pth", weights_only=True)["step"] == 6
    run("mae", places, "--log-every 100 --out a --resume")
    assert_same_state("whole", "a")
    (before, after), (whole,) = ([r for r in records(out) if "loss" in r] for out in ("a", "whole"))
    assert before["step"] == 6 and (before["loss"] + after["loss"]) / 2 == pytest.approx(whole["loss"], rel=1e-12)


def test_a_reader_who_stops_stops_neither_the_training_nor_a_signal(places):  # noqa: F811
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    process = subprocess.Popen([sys.executable, *command("mae", places, "--epochs 9000 --workers 2 --out a")], stderr=writer)
    deadline = time.time() + 60
    while time.time() < deadline and not (Path("a/log.jsonl").exists() and len(records("a")) > 200):  # some 30 fill the pipe
        time.sleep(0.2)
    process.terminate()
    assert process.wait(15) == 143 and torch.load("a/last.pth", weights_only=True)["step"] >= 200
    os.close(reader), os.close(writer)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small /dev/shm")
@pytest.mark.slow
def test_a_small_shared_memory_is_named(places):  # noqa: F811
    words = " ".join(command("mae", places, "--image-size 224 --patch-size 16 --workers 2 --out a"))
    done = subprocess.run(["unshare", "-m", "bash", "-c", f"mount -t tmpfs -o size=256k tmpfs /dev/shm; {sys.executable} {words}"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and "--shm-size=16g" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_pipe_in_place_of_a_file_is_not_waited_for(places):  # noqa: F811
    os.mkfifo("pipe")
    for words in ("--init pipe", "--teacher pipe"):
        with pytest.raises(InputError, match="no such file"):
            run("mae", places, words)


def test_pipes_and_sockets_are_no_images(places, tmp_path):  # noqa: F811
    (tmp_path / "data").mkdir()
    Image.new("RGB", (8, 8)).save("data/a.png")
    os.mkfifo("data/b.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("data/c.png")
        assert list(vit.find_images("data")) == ["a.png"]


# ---- 4: a folder belongs to one run

def test_a_folder_is_used_by_one_process_at_a_time(places, monkeypatch):  # noqa: F811
    first = started([sys.executable, *command("mae", places, "--epochs 9000 --workers 2 --save-minutes 0 --out a")])
    for words in ("--out a", "--out a --resume", "--resume a"):
        with pytest.raises(InputError, match=f"a is in use by process {first.pid} on "):
            run("mae", places, "--epochs 9000", words)
    os.kill(first.pid, signal.SIGKILL)  # its workers still live for some seconds, but hold nothing
    first.wait()
    at_step(3, stop(), monkeypatch)
    with pytest.raises(SystemExit) as left:
        run("mae", places, "--epochs 9000 --workers 0 --out a --resume")
    assert left.value.code == 143


def test_of_two_that_start_at_once_one_gets_the_folder(places):  # noqa: F811
    both = [subprocess.Popen([sys.executable, *command("mae", places, "--epochs 60 --workers 0 --out a")], stderr=subprocess.PIPE, text=True)
            for _ in range(2)]
    told = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], told
    assert any("a is in use by process" in text or "a holds a run already" in text for text in told)


def test_a_folder_without_a_checkpoint_may_be_used_again_and_one_with_never(places, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.setattr(vit, "cosine", lambda *values: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("mae", places, "--out a")
    run("mae", places, "--epochs 1 --out a")
    run("mae", places, "--epochs 2 --out b")
    before = Path("b/last.pth").read_bytes()
    for words in ("--out b", "--resume a --out b"):
        with pytest.raises(InputError, match="b holds a run already"):
            run("mae", places, "--epochs 1", words)
    Path("b/args.json").unlink()
    with pytest.raises(InputError, match="b holds a run already"):
        run("mae", places, "--epochs 1 --out b")
    assert Path("b/last.pth").read_bytes() == before


def test_a_run_that_goes_on_elsewhere_takes_its_log_along(places, monkeypatch):  # noqa: F811
    run("mae", places, "--out whole")
    with monkeypatch.context() as patch:
        at_step(5, stop(), patch)
        with pytest.raises(SystemExit):
            run("mae", places, "--out a")
    run("mae", places, "--resume a --out b")
    assert losses("b") == losses("whole") and len(losses("a")) == 5


def test_a_folder_that_was_deleted_is_made_again(places, monkeypatch):  # noqa: F811
    at_step(6, lambda: subprocess.run(["rm", "-r", "a"], check=True), monkeypatch)
    run("mae", places, "--save-minutes 0 --out a")
    assert torch.load("a/last.pth", weights_only=True)["step"] == 12 and losses("a")


def test_a_folder_that_was_moved_away_and_given_to_another_run_is_left_to_it(places, monkeypatch):  # noqa: F811
    others = []

    def move():
        Path("a").rename("old")
        others.append(started([sys.executable, *command("mae", places, "--epochs 9000 --seed 1 --out a")]))
    at_step(6, move, monkeypatch)
    with pytest.raises(InputError, match="a is in use by process"):
        run("mae", places, "--save-minutes 0 --out a")
    others[0].terminate()
    ended(others[0], 143)
    assert torch.load("a/last.pth", weights_only=True)["args"]["seed"] == 1
    assert [r["step"] for r in records("a") if "loss" in r] == list(range(1, len(losses("a")) + 1))


def test_the_pictures_of_a_run_are_no_images_of_the_next(places, monkeypatch):  # noqa: F811
    subprocess.run(["cp", "-r", f"{places['photos']}/train/a", "flat"], check=True)
    monkeypatch.chdir("flat")
    here = dict(places, photos=".")
    for words in ("", "--resume", "--out other"):
        run("mae", here, "--epochs 10", words)
    assert Path("runs/mae-demo/pictures").exists() and len(vit.open_folder(".", "train", False)) == 24
    with pytest.raises(InputError, match="a run needs a folder of its own"):
        run("mae", here, "--out .")


def test_a_picture_that_cannot_be_written_costs_no_training(places, capfd):  # noqa: F811
    Path("a").mkdir()
    Path("a/pictures").touch()
    run("mae", places, "--epochs 10 --out a")
    assert "pictures" in capfd.readouterr().err and len(losses("a")) == 30


def test_links_are_not_followed_and_what_a_crash_left_is_cleared(places):  # noqa: F811
    Path("precious").write_text("mine")
    Path("a").mkdir()
    for name in ("log.jsonl", "args.json", "reconstruction.png"):
        Path("a", name).symlink_to(Path("precious").resolve())
    Path("a/last.pth.0123abcd.new").write_bytes(b"half")
    Path("a/lock").symlink_to(Path("precious").resolve())
    with pytest.raises(InputError, match="a cannot be written"):
        run("mae", places, "--epochs 1 --out a")
    Path("a/lock").unlink()
    run("mae", places, "--epochs 1 --out a")
    assert Path("precious").read_text() == "mine" and not list(Path("a").glob("*.new"))


# ---- 5: log and streams

def test_damaged_lines_of_a_log_are_named_and_left_out(places, monkeypatch, capsys):  # noqa: F811
    with monkeypatch.context() as patch:
        at_step(5, stop(), patch)
        with pytest.raises(SystemExit):
            run("g2sd", places, "--out a")
    log = Path("a/log.jsonl")
    lines = log.read_bytes().splitlines(True)
    log.write_bytes(lines[0] + b'{"step": 2, "lo' + lines[2] + b"\xff\xfe\n" + b"[" * 100000 + b"\n" + lines[3] + lines[4] + b'{"step": 6')
    capsys.readouterr()
    run("g2sd", places, "--out a --resume")
    assert "a/log.jsonl: damaged lines [2, 3, 4, 7] are left out" in capsys.readouterr().err
    assert [r["step"] for r in records("a") if "loss" in r] == [1, 4, 5, *range(6, 13)]


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>&1", "2>&1 | head -c 1", *(
    pytest.param(streams, marks=pytest.mark.slow) for streams in ("2>&-", ">&-", ">/dev/full", "2>/dev/full"))])
def test_a_broken_stream_costs_no_training(streams, places):  # noqa: F811
    run("finetune", places, "--out whole")
    words = " ".join(command("finetune", places, "--out a --workers 2"))
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {sys.executable} {words} {streams}"], capture_output=True, text=True)
    lost = streams.startswith(">/dev/full") or "|" in streams  # the result, on stdout
    assert done.returncode == lost and "Exception" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert_same_state("whole", "a")
    assert all(json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines())


def test_results_that_are_lost_are_not_lost_in_silence(places):  # noqa: F811
    words = f"{ROOT}/finetune.py --device cpu --init {places['files']}/classes/model.pth --predict {places['photos']}/val"
    done = subprocess.run(["bash", "-c", f"{sys.executable} {words} > /dev/full"], capture_output=True, text=True)
    assert done.returncode == 1 and "results were lost on their way to stdout: [Errno 28] No space left" in done.stderr


def test_a_run_under_nohup_outlives_its_terminal(places):  # noqa: F811
    process = started(["nohup", sys.executable, *command("mae", places, "--epochs 9000 --workers 2 --out a")])
    os.killpg(process.pid, signal.SIGHUP)
    before = len(records("a"))
    time.sleep(1)
    assert process.poll() is None and len(records("a")) > before
    process.terminate()
    ended(process, 143)


# ---- 6: what is read

def classifier() -> tuple[dict, dict]:
    torch.manual_seed(0)
    network = ViT(image_size=16, patch_size=4, width=16, depth=2, heads=2, classes=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    return network.state_dict(), network.config


WRONG = {name: [None, -1, 0, 10 ** 12, 1e400, float("nan"), "x", [], {}, [1, 2, 3], True, 3.5] for name in classifier()[1]}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_that_does_not_fit_the_weights_is_one_line(name):
    state, config = classifier()
    for value in WRONG[name]:
        if value == config[name] and type(value) is type(config[name]) or name in ("mean", "std") and value == [1, 2, 3]:
            continue
        torch.save(dict(model=state, config={**config, name: value}), "c.pth")
        with pytest.raises(InputError, match="c.pth: ") as error:
            read_encoder("c.pth")
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    for changed in ({k: v for k, v in config.items() if k != name}, {**config, "rope": True}, [1], "x"):
        torch.save(dict(model=state, config=changed), "c.pth")
        with pytest.raises(InputError, match="c.pth: "):
            read_encoder("c.pth")


def test_numbers_that_are_not_finite_are_refused_wherever_they_are_read(places):  # noqa: F811
    run("mae", places, "--epochs 1 --out a")
    for part in ("model", "optimizer"):
        file = torch.load("a/last.pth")
        tensor = file["model"]["encoder.norm.bias"] if part == "model" else file["optimizer"]["state"][3]["exp_avg"]
        tensor.view(-1)[1] = float("inf")
        torch.save(file, f"{part}.pth")
        with pytest.raises(InputError, match=f"{part}.pth: {part}.*is not finite"):
            run("mae", places, f"--epochs 1 --resume {part}.pth --out {part}")
    for words in ("--init model.pth", "--teacher model.pth"):
        with pytest.raises(InputError, match="model.pth: model.encoder.norm.bias is not finite"):
            run("mae", places, words, "--out c")
    state, config = classifier()
    state["head.bias"][0] = float("nan")
    torch.save(dict(model=state, config=config), "model.pth")
    with pytest.raises(InputError, match="model.head.bias is not finite"):
        finetune.main(f"--init model.pth --eval --data {places['photos']} --device cpu".split())
    with pytest.raises(InputError, match="an empty path: no such file"):
        mae.main(["--init", "", "--device", "cpu"])


def test_weights_that_make_no_network_are_one_line():
    state, config = classifier()
    for name, value in (("patch_embed.proj.weight", torch.zeros(0, 3, 4, 4)), ("last_heads", torch.ones(3)), ("pos_embed", torch.zeros(1, 1, 16)),
                        ("cls_token", torch.empty(1, 1, 16, device="meta")), ("head.bias", torch.eye(3).to_sparse())):
        torch.save({**state, name: value}, "c.pth")
        with pytest.raises(InputError, match="c.pth: "):
            ViT.from_file("c.pth", heads=2)
    for classes in (["a", "a", "b"], "abc", [1, 2, 3], ["a", "b"], [None] * 3):
        torch.save(dict(model=state, config=config, classes=classes), "c.pth")
        with pytest.raises(InputError, match="c.pth: its classes are not 3 different names"):
            vit.classes_of("c.pth", config)


def test_a_damaged_checkpoint_is_one_line(places):  # noqa: F811
    run("mae", places, "--epochs 1 --out a")
    good = torch.load("a/last.pth")
    cases = [{k: v for k, v in good.items() if k != gone} for gone in ("args", "step", "model", "optimizer", "scaler")]
    cases += [{**good, key: value} for key in ("args", "step", "model", "optimizer", "scaler") for value in (None, 3, "x", [1], {"a": 1})]
    cases += [{**good, "step": step} for step in (-5, 10 ** 6, 1e30, 2.7)]
    cases += [{**good, "optimizer": {**good["optimizer"], "param_groups": []}}, {**good, "model": {**good["model"], "encoder.norm.bias": torch.zeros(3)}}]
    for number, case in enumerate(cases):
        torch.save(case, "bad.pth")
        try:
            run("mae", places, f"--epochs 1 --resume bad.pth --out {number}")
            assert case["step"] in (0, 1, 2, 3) or case.get("scaler") != good["scaler"], case.keys()  # which is not used without fp16
        except InputError as error:
            assert "bad.pth" in str(error) or "settings differ" in str(error), error


def test_a_run_is_not_continued_on_other_images_or_from_another_teacher(places, tmp_path):  # noqa: F811
    subprocess.run(["cp", "-r", places["photos"], "photos"], check=True), subprocess.run(["cp", "-r", places["files"], "files"], check=True)
    mine = dict(photos="photos", files="files")
    run("dmae", mine, "--epochs 1 --out a")
    Path("photos").rename("moved"), Path("files").rename("elsewhere")
    moved = dict(photos="moved", files="elsewhere")
    run("dmae", moved, "--epochs 1 --out a --resume")  # the same, in another place
    Path("moved/train/a/1.jpg").rename("moved/train/a/new.jpg")  # as many as before
    with pytest.raises(InputError, match="content of --data 48 images [0-9a-f]{12} -> 48 images "):
        run("dmae", moved, "--epochs 1 --out a --resume")
    Path("moved/train/a/new.jpg").rename("moved/train/a/1.jpg")
    mae.main(words_of("mae", moved, "--epochs 2 --out other"))
    Path("elsewhere/teacher/encoder.pth").write_bytes(Path("other/encoder.pth").read_bytes())
    with pytest.raises(InputError, match="content of --teacher"):
        run("dmae", moved, "--epochs 1 --out a --resume")


def test_images_in_memory_are_known_by_shape_labels_and_every_hundredth():
    images, same, pixel, label, names = (vit.shapes.__wrapped__(300, 0) for _ in range(5))  # without conftest's cache
    pixel.items[200, 0, 0, 0] ^= 1
    label.labels[7] ^= 1
    names.classes[0] = "x"
    assert same.content() == images.content() != pixel.content() and label.content() != images.content() != names.content()
    assert images.subset(np.arange(299)).content() != images.content()


# ---- 7: images

def test_a_picture_is_turned_as_its_camera_was_held_and_what_is_transparent_is_white(tmp_path):
    pixels = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    Image.fromarray(pixels).save("turned.png", exif=exif)
    clear = np.dstack([pixels, np.zeros((20, 30), np.uint8)])
    Image.fromarray(clear, "RGBA").save("clear.png")
    Image.fromarray(clear, "RGBA").quantize(8).save("palette.png")
    Image.fromarray(np.dstack([pixels[..., 0], np.zeros((20, 30), np.uint8)]), "LA").save("grey.png")
    images = vit.open_folder(str(tmp_path), "train", False)
    seen = {name.decode(): images.open(i) for i, name in enumerate(images.items)}
    assert np.array_equal(seen["turned.png"].permute(1, 2, 0).numpy(), np.rot90(pixels, -1))
    assert all((seen[name] == 255).all() for name in ("clear.png", "palette.png", "grey.png"))


def test_a_thin_strip_takes_no_gigabytes():
    for h, w in ((1, 65000), (65000, 1)):
        begin = time.time()
        assert vit.CentreCrop((224, 224))(torch.zeros(3, h, w, dtype=torch.uint8)).shape == (3, 224, 224) and time.time() - begin < 5


def test_sixteen_bits_are_the_same_in_every_format(tmp_path):
    dark = np.linspace(0, 200, 64).astype(np.uint16).reshape(8, 8)  # far below the middle: no reason to brighten it
    Image.fromarray(dark).save("a.png"), Image.fromarray(dark).save("b.tif"), Image.fromarray(dark.astype(np.int32), "I").save("c.tif")
    Path("d.pgm").write_bytes(b"P5 8 8 65535\n" + dark.astype(">u2").tobytes())
    images = vit.open_folder(str(tmp_path), "train", False)
    assert len({bytes(images.open(i).numpy()) for i in range(4)}) == 1 and images.open(0).max() <= 1


def test_what_is_no_picture_of_ours_is_not_opened_and_every_fault_of_a_decoder_is_the_pictures(tmp_path, monkeypatch):
    Path("a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")  # Pillow would start Ghostscript
    monkeypatch.setattr(subprocess, "Popen", lambda *values, **options: pytest.fail("a program was started"))
    images = vit.open_folder(str(tmp_path), "train", False)
    with pytest.raises(InputError, match="a.jpg: cannot be read"):
        images.open(0)
    for error in (KeyError("x"), IndexError(), RuntimeError("y"), ZeroDivisionError(), AssertionError(), MemoryError()):
        monkeypatch.setattr(vit.Image, "open", lambda *values, error=error, **options: (_ for _ in ()).throw(error))
        with pytest.raises(InputError, match="a.jpg: cannot be read"):
            images.open(0)


@pytest.mark.parametrize("number", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_whatever_the_bytes_of_a_picture_are_it_is_an_image_or_its_path(number, tmp_path):
    rng, seen = np.random.default_rng(number), {True: 0, False: 0}
    pixels = Image.fromarray(rng.integers(0, 256, (40, 50, 3)).astype(np.uint8))
    kinds = {"jpg": dict(exif=Image.Exif()), "png": {}, "webp": {}, "tif": {}, "bmp": {}, "ppm": {}}
    images = vit.Images(np.array([b"x.jpg"]), root=str(tmp_path), enough=8)
    whole = {}
    for kind, options in kinds.items():
        for mode in ("RGB", "L"):
            pixels.convert(mode).save(f"a.{kind}", **options)
            whole[kind, mode] = Path(f"a.{kind}").read_bytes()
    for i in range(number):
        data = bytearray(list(whole.values())[i % len(whole)])
        for place in rng.integers(0, len(data), rng.integers(1, 12)):
            data[place] = rng.integers(256)
        Path("x.jpg").write_bytes(data[:rng.integers(len(data))] if i % 3 == 0 else data)
        try:
            image = images.open(0)
            assert image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3
        except InputError as error:
            assert f"{tmp_path}/x.jpg: cannot be read (" in str(error)
            image = None
        seen[image is not None] += 1
    assert min(seen.values()) > number / 10


@pytest.mark.parametrize("broken, fine", [(2, True), (3, False)])
@pytest.mark.parametrize("how", ["one", pytest.param("two", marks=pytest.mark.slow)])
def test_three_broken_images_in_a_hundred_end_a_run(broken, fine, how, places, tmp_path):  # noqa: F811
    data = tmp_path / "data"
    subprocess.run(["cp", "-r", places["photos"], data], check=True)
    for i in range(broken):
        (data / f"train/a/{i}.jpg").write_bytes(b"")
    words = command("mae", {**places, "photos": str(data)}, "--epochs 1 --workers 2 --out a")
    done = subprocess.run([*([sys.executable] if how == "one" else TORCHRUN), *words], capture_output=True, text=True)
    assert (done.returncode == 0) == fine and ("3 of 48 images that were asked for cannot be read" in done.stderr) == (not fine), done.stderr
    assert all(f"a/{i}.jpg: cannot be read" in done.stderr for i in range(broken))


# ---- 8: the command line and the environment

@pytest.mark.parametrize("script, words, told", [
    ("mae", "--teacher-heads 3", "--teacher-heads needs --teacher"), ("mae", "--distill-layers 1", "--distill-layers needs --teacher"),
    ("mae", "--distill-weight 2", "--distill-weight needs --teacher"), ("mae", "--decode-from 1", "--decode-from needs --teacher"),
    ("finetune", "--init {files}/teacher/encoder.pth --reuse 3", "encoder.pth has 2 blocks"),
    ("finetune", "--init {files}/classes/model.pth --eval --labels 5", "--labels is for training"),
    ("mae", "--epochs 1e300", "argument --epochs"),
    ("mae", "--image-size 1 2 3", "--image-size 1 2 3: expected one number, or height and width"),
    ("mae", "--batch-size 99999999999999999999", "argument --batch-size"), ("mae", "--depth 100000000", "argument --depth")])
def test_flags_that_do_nothing_or_too_much_are_one_line(script, words, told, places, capfd):  # noqa: F811
    usual = ["--data", places["photos"], "--recipe", "demo", "--device", "cpu"]
    assert vit.run_main(lambda: importlib.import_module(script).main([*usual, *words.format(**places).split()])) == 2
    said = capfd.readouterr().err
    assert told in said and "Traceback" not in said, said


@pytest.mark.parametrize("script, flag", [("mae", "--out"), ("mae", "--resume"), ("mae", "--init"), ("mae", "--teacher"), ("finetune", "--predict"),
                                          ("mae", "--data")])
def test_an_empty_variable_is_an_error(script, flag, places, capfd):  # noqa: F811
    words = ["--init", f"{places['files']}/classes/model.pth"] * (script == "finetune")
    assert vit.run_main(lambda: importlib.import_module(script).main(["--device", "cpu", *words, flag, ""])) == 2
    assert "empty" in capfd.readouterr().err and not Path("runs").exists()


def test_a_network_too_large_for_the_memory_is_one_line(places):  # noqa: F811
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (12 * 2 ** 30, 12 * 2 ** 30))"
    assert "out of memory" in ended(begun([sys.executable, *program("mae", places, "--width 1000000 --heads 1", patch=limit)]), 2, seconds=25)


NOBODY = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")


@pytest.mark.parametrize("changes, told", [
    (dict(RANK="x"), "RANK=x"), (dict(MASTER_PORT="-1"), "MASTER_PORT=-1"), (dict(WORLD_SIZE=""), "WORLD_SIZE="), (dict(LOCAL_WORLD_SIZE="many"), "LOCAL_WORLD_SIZE=many")])
def test_an_environment_that_torchrun_did_not_make_is_one_line(changes, told, places, monkeypatch):  # noqa: F811
    for name, value in {**NOBODY, "MASTER_PORT": "29500", **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"{told}.* in the environment: expected "):
        run("mae", places, "--out a")


@pytest.mark.parametrize("changes", [{}, *(pytest.param(changes, marks=pytest.mark.slow) for changes in (
    dict(MASTER_PORT="99999"), dict(RANK="5"), dict(MASTER_ADDR="no.such.machine.invalid", RANK="1")))])
def test_processes_that_do_not_meet_say_so(changes, places):  # noqa: F811
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    process = begun([sys.executable, *program("mae", places, patch="vit.MEETING = 4")], **{**NOBODY, "MASTER_PORT": port, **changes})
    told = ended(process, 2, seconds=45)
    assert "do not find one another" in told and "Traceback" not in told
