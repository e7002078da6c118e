"""What a user meets in the first hour: what is said, own images, weights that go on, predictions."""
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

import finetune
import mae
import vit
from tests.test_runs import COMMANDS, TORCHRUN, command, losses, own_folder, places, run, words_of  # noqa: F401 (fixtures)
from vit import InputError, ViT, open_folder, read_encoder


def net(**changes) -> ViT:
    torch.manual_seed(1)
    model = ViT(**{**dict(image_size=16, patch_size=4, width=24, depth=3, heads=4, mean=(0.4,) * 3, std=(0.3,) * 3), **changes})
    for name, p in model.named_parameters():  # as if it had been trained
        nn.init.normal_(p, std=0.1)
    return model.eval()


def saved(model: ViT, **changes) -> str:
    torch.save({"model": {**model.state_dict(), **changes}}, "official.pth")
    return "official.pth"


# ---- a network in five lines

def test_a_network_comes_from_a_file_in_one_call(places):  # noqa: F811
    for file in ("teacher/encoder.pth", "classes/model.pth"):
        written = torch.load(f"{places['files']}/{file}")
        network = ViT.from_file(f"{places['files']}/{file}")
        assert not network.training and network.config == written["config"]
        assert all(torch.equal(x, written["model"][name]) for name, x in network.state_dict().items())
        images = torch.rand(2, 3, 16, 16)
        torch.testing.assert_close(network.normalize(images), (images - 0.5) / 0.5)
        assert network(network.normalize(images)).shape == (2, network.config["classes"] or 16)
    assert written["classes"] == ["a", "b"]
    assert ViT.from_file(f"{places['files']}/teacher/encoder.pth", image_size=(8, 24)).grid == (2, 6)
    with pytest.raises(InputError, match="official.pth does not say how many heads .* give heads="):
        ViT.from_file(saved(net()))
    assert ViT.from_file(saved(net()), heads=4).blocks[0].attn.heads == 4
    assert ViT.from_file(f"{places['files']}/classes/model.pth", classes=7).head.out_features == 7
    with pytest.raises(InputError, match="linear probe"):
        ViT.from_file(saved(net(), **{"head.1.weight": torch.zeros(3, 24)}), heads=4)


def test_a_last_block_with_other_heads_is_marked_and_no_strict_load_elsewhere_succeeds(places):  # noqa: F811
    run("tinymim", places, "--epochs 1 --teacher-last-heads 4 --out a")
    file = torch.load("a/encoder.pth")
    assert file["config"]["last_heads"] == 4 and file["model"]["last_heads"].item() == 4
    elsewhere = ViT(**{**file["config"], "last_heads": None})  # as timm's: one number of heads
    with pytest.raises(RuntimeError, match='Unexpected key.*"last_heads"'):
        elsewhere.load_state_dict(file["model"])
    assert ViT.from_file("a/encoder.pth").blocks[-1].attn.heads == 4
    torch.save(file["model"], "bare.pth")
    assert read_encoder("bare.pth", heads=2)[1]["last_heads"] == 4


# ---- files of others

def test_the_extra_block_of_d2_maes_files_is_left_out_and_a_torn_block_is_not():
    source = net()
    extra = {f"blocks.3.{name}": x for name, x in source.blocks[1].state_dict().items() if name.startswith(("norm1", "attn.qkv"))}
    state, config = read_encoder(saved(source, **extra), heads=4)
    assert config["depth"] == 3 and vit.load_encoder(ViT(**config), state, config) == []
    state, config = read_encoder(saved(source, **extra, **{"blocks.3.norm2.weight": torch.ones(24)}), heads=4)
    with pytest.raises(InputError, match="unknown: blocks.3.norm2.weight"):
        vit.load_encoder(ViT(**config), state, config)


def test_relatives_of_the_network_are_refused_by_their_name():
    with pytest.raises(InputError, match="distilled DeiT.*18 positions"):
        read_encoder(saved(net(), dist_token=torch.zeros(1, 1, 24), pos_embed=torch.zeros(1, 18, 24)), heads=4)
    with pytest.raises(InputError, match=r"relative positions \(blocks.0.attn.relative_position_bias_table\)"):
        read_encoder(saved(net(), **{"blocks.0.attn.relative_position_bias_table": torch.zeros(732, 4)}), heads=4)


def test_heads_that_are_a_guess_are_warned_of():
    with pytest.warns(UserWarning, match="12 are taken, as networks 768 wide usually have; --heads changes it"):
        assert read_encoder(saved(net(width=768, depth=1, heads=12)))[1]["heads"] == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_encoder("official.pth", heads=16)


# ---- weights that go on

@pytest.mark.parametrize("name", ["mae", "moco_v3", "tinymim", "g2sd"])
def test_pre_training_starts_from_the_weights_of_a_file(name, places):  # noqa: F811
    words = " ".join(words_of(name, places, "--epochs 0 --out b"))
    words = words.replace("--patch-size 4 ", "").replace("--width 16 --heads 2 --depth 2 ", "")
    oblong = name in ("mae", "moco_v3")
    sizes = words.replace("--image-size 16", "--image-size 8 16" if oblong else "").split()
    module = __import__(COMMANDS[name][0])
    source = net(width=16, heads=8, act="relu", qkv_bias=False, positions="learned")
    torch.save(dict(model=source.state_dict(), config=source.config), "init.pth")
    module.main([*sizes, "--init", "init.pth"])
    file = torch.load("b/encoder.pth")
    for key, x in source.state_dict().items():
        assert key == "pos_embed" and oblong or torch.equal(file["model"][key], x), key
    changed = {"image_size"} if oblong else {"last_heads"} if name == "tinymim" else {"mean", "std"}
    assert {key for key, x in source.config.items() if file["config"][key] != x} <= changed
    with pytest.raises(InputError, match="--act gelu: the network in --init has relu"):
        module.main([*sizes, "--init", "init.pth", "--act", "gelu"])


def test_the_second_of_two_trainings_goes_on_from_the_first(places):  # noqa: F811
    run("mae", places, "--out a")
    run("mae", places, "--init a/encoder.pth --out b")
    run("mae", places, "--out c")
    assert not torch.equal(torch.load("b/encoder.pth")["model"]["cls_token"], torch.load("a/encoder.pth")["model"]["cls_token"])
    assert losses("a") == losses("c") != losses("b")
    run("mae", places, f"--epochs 1 --init {places['files']}/classes/model.pth --out d")  # without a norm for all tokens


def test_a_run_is_not_made_longer_and_says_how_to_go_on(places):  # noqa: F811
    run("mae", places, "--epochs 1 --out a")
    with pytest.raises(InputError, match=r"epochs 1.0 -> 2.0. .* start another run .* by --init a/encoder.pth and another --out"):
        run("mae", places, "--epochs 2 --out a --resume")


# ---- what is said

def test_the_first_line_of_a_run_says_what_is_trained(places, capsys):  # noqa: F811
    run("mae", places, "--epochs 2 --warmup-epochs 1 --out a")
    first = capsys.readouterr().err.splitlines()[0]
    size = sum(x.numel() for x in torch.load("a/encoder.pth")["model"].values()) / 1e6
    for told in ("mae, recipe demo: ViT 16 wide, 2 blocks, 2 heads", f"{size:.3g} M parameters", "16 x 16 pixels, patches of 4",
                 "48 images, 2 epochs (1 of warm-up), 6 steps of 16", "fp32 on 1 x cpu -> a"):
        assert told in first
    run("mae", places, "--epochs 2 --warmup-epochs 1 --out a --resume")
    assert "resumed at step 6" in capsys.readouterr().err.splitlines()[0]


@pytest.mark.parametrize("words, warned", [("--epochs 1 --warmup-epochs 1", True), ("--epochs 1 --warmup-epochs 0.5", False)])
def test_a_run_that_ends_while_its_learning_rate_rises_is_warned_of(words, warned, places, capsys):  # noqa: F811
    run("mae", places, words, "--out a")
    assert ("give --warmup-epochs 0.1, or more --epochs than 1" in capsys.readouterr().err) == warned


def test_evaluations_are_told_beside_a_bar_that_fits_into_80_columns(places):  # noqa: F811
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, *command("finetune", places, "--out a")], stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    told = b""
    with suppress(OSError):  # of Linux, where the other end is closed
        while data := os.read(screen, 4096):
            told += data
    os.close(screen)
    assert process.wait() == 0
    lines = re.split(r"[\r\n]+", told.decode())
    assert sum("step 6/12  top1" in line for line in lines) == 1 and sum("step 12/12  top1" in line for line in lines) == 1
    bars = [line for line in lines if "%|" in line]
    assert bars and all(len(line.removeprefix("\x1b[A").strip()) <= 80 for line in bars), max(bars, key=len)
    assert re.search(r"12/12 \[.* left, (loss [\d.]+, \d+ images/s|waiting for images \d+%: more --workers(, or pack.py)?)\]", bars[-1])
    assert not any("%|" in line and "top1" in line for line in lines)


def test_the_next_command_works_on_the_data_that_were_given(places, capsys):  # noqa: F811
    shutil.copytree(places["photos"], "my photos")
    words = [w if w != places["photos"] else "my photos" for w in words_of("mae", places, "--epochs 1 --out")]
    mae.main([*words, "my run"])
    told = capsys.readouterr().err.partition("next:  ")[2].splitlines()[0]
    script, *rest = shlex.split(told)[1:]
    assert script == "finetune.py" and "my photos" in rest and "my run/encoder.pth" in rest
    finetune.main([*rest, "--epochs", "1", "--labels", "48", "--batch-size", "16", "--device", "cpu"])
    assert Path("runs/finetune-demo/model.pth").exists()
    mae.main([w if w != "my photos" else "my photos/train" for w in words] + ["plain"])  # no val/ there
    assert "next:  ViT.from_file('plain/encoder.pth')" in capsys.readouterr().err


def test_torchruns_report_says_the_one_thing_that_matters(places):  # noqa: F811
    done = subprocess.run([*TORCHRUN, *command("finetune", places, "--init nothing.pth")], capture_output=True, text=True)
    root = done.stderr.partition("Root Cause")[2]
    assert done.returncode == 1 and "nothing.pth: no such file" in root
    assert sum(line == "finetune.py: nothing.pth: no such file" for line in done.stderr.splitlines()) == 1


def test_a_download_that_failed_says_so(monkeypatch):
    def fail(*args, download, **options):
        raise RuntimeError("no route")
    monkeypatch.setattr(vit.datasets, "CIFAR10", fail)
    for words, told in (("--download", "the download failed .no route"), ("", "not in data; --download fetches it")):
        with pytest.raises(InputError, match=told):
            mae.main(["--data", "cifar10", "--device", "cpu", *words.split()])


def test_a_probe_of_few_images_asks_for_as_many_as_there_are(places):  # noqa: F811
    with pytest.raises(InputError, match="give --batch-size 48 or less"):
        finetune.main(f"--data {places['photos']} --init {places['files']}/teacher/encoder.pth --protocol linear --device cpu".split())
    words = f"--init {places['files']}/teacher/encoder.pth --data {places['photos']} --device cpu"
    with pytest.raises(InputError, match="BatchNorm needs .* two images in all: give 2 to 2048"):
        finetune.main([*words.split(), "--protocol", "linear", "--recipe", "demo", "--labels", "48", "--batch-size", "1"])
    assert finetune.parse_args([*words.split(), "--recipe", "demo-linear"])[0].protocol == "linear"


# ---- own images

def test_images_that_are_not_split_are_held_back_by_their_names(tmp_path, places):  # noqa: F811
    shutil.copytree(f"{places['photos']}/train", "all")
    train, val = (open_folder("all", split, True, 0.2) for split in ("train", "val"))
    assert len(train) == 38 and len(val) == 10 and train.classes == val.classes == ["a", "b"]
    assert not set(train.items) & set(val.items) and sorted(val.labels) == [0] * 5 + [1] * 5
    assert set(open_folder("all", "train", False, 0.2).items) == set(train.items)  # pre-training sees the same
    shutil.copytree("all", "more/train")
    assert set(open_folder("more", "val", True, 0.2).items) == set(val.items)
    Path("all/a/new.jpg").write_bytes(Path("all/a/0.jpg").read_bytes())
    assert len(set(open_folder("all", "val", True, 0.2).items) ^ set(val.items)) <= 2  # one comes, one may go
    with pytest.raises(InputError, match="--val-share 0.1"):
        open_folder("all", "train", True)
    with pytest.raises(InputError, match="has val/"):
        open_folder(places["photos"], "train", True, 0.1)
    shutil.rmtree("all/b")
    Path("all/b").mkdir()
    Path("all/b/one.jpg").write_bytes(Path("all/a/0.jpg").read_bytes())
    assert [int((open_folder("all", split, True, 0.9).labels == 1).sum()) for split in ("train", "val")] == [1, 0]


@pytest.mark.parametrize("script", ["mae", "finetune"])
def test_oblong_images_are_trained_and_evaluated_in_their_shape(script, places, capsys):  # noqa: F811
    words = " ".join(words_of(script, places, "--epochs 1 --out a")).replace("--image-size 16", "--image-size 8 24")
    __import__(script).main(words.split())
    assert "8 x 24 pixels" in capsys.readouterr().err
    file = "a/encoder.pth" if script == "mae" else "a/model.pth"
    assert torch.load(file)["config"]["image_size"] == [8, 24]
    crops = [vit.random_crop((8, 24), 0.2).transforms[0].make_params([torch.zeros(3, 400, 1200)]) for _ in range(200)]
    aspect = torch.tensor([crop["width"] / crop["height"] for crop in crops])
    assert 3 * 0.74 < aspect.min() and aspect.max() < 3 * 1.35 and 2.8 < aspect.median() < 3.2


def test_predictions_are_a_table_and_accuracy_is_told_by_class(places, capsys):  # noqa: F811
    run("finetune", places, "--out a")
    capsys.readouterr()
    finetune.main(f"--init a/model.pth --predict {places['photos']}/val --device cpu".split())
    head, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert head == ["file", "class", "probability"] and [row[0] for row in rows] == sorted(f"{c}/{i}.jpg" for c in "ab" for i in range(5))
    assert {row[1] for row in rows} <= {"a", "b"} and all(0.5 <= float(row[2]) <= 1 for row in rows)
    finetune.main(f"--init a/model.pth --eval --by-class --data {places['photos']} --device cpu".split())
    lines = capsys.readouterr().out.splitlines()
    right = {c: sum(row[0][0] == c == row[1] for row in rows) for c in "ab"}
    assert lines[0].startswith(f"top1 {10 * sum(right.values()):.2f} %")
    assert lines[1:] == [f"top1 of {c} (5 images) {20 * right[c]:.2f} %" for c in "ab"]
    with pytest.raises(InputError, match="is no classifier but an encoder"):
        finetune.main(f"--init {places['files']}/teacher/encoder.pth --predict {places['photos']} --device cpu".split())
    for folder, told in (("nowhere", "nowhere: No such file"), ("a", "no images in a ")):
        with pytest.raises(InputError, match=told):
            finetune.main(f"--init a/model.pth --predict {folder} --device cpu".split())
    Path("mixed").mkdir(), Path("mixed/1.jpg").write_bytes(b""), shutil.copy(f"{places['photos']}/val/a/0.jpg", "mixed/2.jpg")
    capsys.readouterr()
    finetune.main("--init a/model.pth --predict mixed --device cpu".split())
    told = capsys.readouterr()
    assert [line.split("\t")[0] for line in told.out.splitlines()] == ["file", "2.jpg"] and "1.jpg: cannot be read" in told.err
    Path("other/train/c").mkdir(parents=True), shutil.copytree(f"{places['photos']}/val", "other/val")
    for name in "ab":
        Path("other/val", name).rename(f"other/val/{'c' if name == 'a' else 'd'}")
    Path("other/train/d").mkdir()
    with pytest.raises(InputError, match=r"knows 2 classes \(a, b, ...\), --data has 2 \(c, d, ...\)"):
        finetune.main("--init a/model.pth --eval --data other --device cpu".split())


# ---- what the official code does

def test_maes_probe_draws_a_crop_once_and_cuts_it_to_the_image():
    torch.manual_seed(0)
    image, means = torch.zeros(3, 375, 500, dtype=torch.uint8), []
    for crop in (finetune.ProbeCrop(8, (0.08, 1.0)), v2.RandomResizedCrop(8, (0.08, 1.0))):
        boxes = [crop.make_params([image]) for _ in range(8000)]
        means.append(sum(box["height"] * box["width"] for box in boxes) / len(boxes) / (375 * 500))
        assert all(box["top"] + box["height"] <= 375 and box["left"] + box["width"] <= 500 for box in boxes)
    assert means == [pytest.approx(0.518, abs=0.01), pytest.approx(0.434, abs=0.01)]
    assert isinstance(vit.random_crop((8, 8), 0.08, kind=finetune.ProbeCrop).transforms[0], finetune.ProbeCrop)


def test_from_scratch_starts_as_timms_network():
    args, _ = finetune.parse_args(["--data", "d", "--model", "small"])
    model, changes = finetune.build(args, None, 10)
    assert changes == ["from scratch"] and args.layer_decay == 1.0 and model.config["positions"] == "learned"
    std = {name: x.std().item() for name, x in model.state_dict().items()}
    for name in ("pos_embed", "cls_token", "blocks.3.attn.qkv.weight", "blocks.11.mlp.fc2.weight", "head.weight"):
        assert std[name] == pytest.approx(0.02, rel=0.1), name
    assert std["patch_embed.proj.weight"] == pytest.approx((1 / 3 / 768) ** 0.5, rel=0.02)  # a convolution of torch: U(-768^-0.5, 768^-0.5)


def test_a_tiny_student_may_be_fine_tuned_with_three_heads_and_it_is_said(places, capsys):  # noqa: F811
    source = net(width=24, heads=6)
    torch.save(dict(model=source.state_dict(), config=source.config), "init.pth")
    words = f"--init init.pth --data {places['photos']} --recipe demo --labels 48 --batch-size 16 --epochs 1 --device cpu"
    finetune.main([*words.split(), "--heads", "3"])
    assert "3 heads in place of 6" in capsys.readouterr().err
    assert torch.load("runs/finetune-demo/model.pth")["config"]["heads"] == 3
    with pytest.raises(InputError, match="was trained with 6 heads"):
        finetune.main([*words.split(), "--heads", "3", "--protocol", "knn"])


def test_frozen_features_do_not_pass_through_a_block_that_was_never_trained(places, capsys):  # noqa: F811
    run("tinymim", places, "--epochs 8 --out a")
    args, weights = finetune.parse_args("--init a/encoder.pth --protocol knn --pool cls".split())
    model, changes = finetune.build(args, weights, 2)
    assert changes == ["without the last block, which was never trained"] and model.depth == 1
    whole, x = ViT.from_file("a/encoder.pth"), torch.randn(2, 3, 16, 16)
    entering = whole.through(whole.embed(x), last=1)[:, 0]
    torch.testing.assert_close(model.eval().features(x), torch.nn.functional.layer_norm(entering, (16,), eps=1e-6))
    args, weights = finetune.parse_args("--init a/encoder.pth".split())
    assert finetune.build(args, weights, 2)[0].depth == 2  # fine-tuning starts from it
    finetune.main(f"--init a/encoder.pth --protocol knn --data {places['photos']} --device cpu".split())
    assert "without the last block" in capsys.readouterr().err
    run("mae", places, "--out b")
    args, weights = finetune.parse_args("--init b/encoder.pth --protocol knn".split())
    assert finetune.build(args, weights, 2)[0].depth == 2


def test_the_decoder_of_the_cifar_recipe_is_its_own():
    args = mae.parse_args("--recipe cifar --act gelu --mlp-ratio 4 --qkv-bias --positions sincos".split())
    model = mae.build(args, None)
    block = model.decoder_blocks[0]
    assert isinstance(block.mlp.act, nn.ReLU) and block.mlp.fc1.out_features == 192 and block.attn.qkv.bias is None
    assert model.decoder_pos_embed.requires_grad and isinstance(model.encoder.blocks[0].mlp.act, nn.GELU)
