"""The README: everything that it prints for a shell or for Python runs, in its order, though shortly."""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mae

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [shlex.split(line) for language, block in BLOCKS if not language
            for line in block.splitlines() if re.match(r"python \w+\.py|torchrun", line)]
SHORT = ["--epochs", "0.01", "--warmup-epochs", "0", "--device", "cpu"]


def script_and_words(command: list[str]) -> tuple[str, list[str]]:
    place = next(i for i, word in enumerate(command) if word.endswith(".py"))
    return command[place].removesuffix(".py"), command[place + 1:]


def test_every_command_runs_after_those_above_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cats", "dogs"):
        Path("photos", name).mkdir(parents=True)
        for i in range(36):
            Image.fromarray(np.random.RandomState(i).randint(0, 256, (70, 90, 3), np.uint8)).save(f"photos/{name}/{i}.jpg")
    mae.main(SHORT)  # the first line, after the installation
    for command in COMMANDS:
        script, words = script_and_words(command)
        module = importlib.import_module(script)
        if "/imagenet" in words:  # as far as that goes without ImageNet
            module.parse_args(words)
        elif "--predict" in words:
            capsys.readouterr()
            module.main(words[:words.index(">")])
            assert len(capsys.readouterr().out.splitlines()) == 1 + 72
        else:
            module.main([*words, *SHORT, *["--epochs", "1"] * ("photos" in words)])
    snippet, = (block for language, block in BLOCKS if language == "python")
    found = {}
    exec(snippet, found)
    assert found["features"].shape == (4, 192) and found["images"].shape == (4, 3, 64, 64)
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize("script", ["mae", "moco_v3", "tinymim", "g2sd", "finetune", "vit"])
def test_names_that_are_pointed_at_exist(script):
    module = importlib.import_module(script)
    names = [name for row in README.splitlines() if row.endswith(f"in {script}.py |") for part in row.split("in ")[:-1]
             for name in re.findall(r"`(\w+)", part.rpartition(".py")[2])]
    assert all(hasattr(module, name) for name in names), names


def test_a_landing_page_is_short_and_its_links_lead_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith("https://arxiv.org/abs/") or (ROOT / target).exists(), target
    for flag in re.findall(r"`(--[a-z][a-z-]*)", README):
        assert any(f'"{flag}"' in (ROOT / f"{script}.py").read_text() for script in ("vit", "mae", "moco_v3", "tinymim", "g2sd", "finetune")) \
            or flag in ("--shm-size", "--shutdown-timeout"), flag
