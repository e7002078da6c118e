"""--compile on CPUs: every model is one graph, compiled once, and learns what it learns without.

With a backend that compiles in seconds: what breaks a graph, or is compiled again and again, shows all the same. `-m slow`: the real one.
"""
import json
import subprocess
from functools import partial

import pytest
import torch

from tests.test_runs import COMMANDS, ROOT, TORCHRUN, losses, own_folder, places, run, words_of  # noqa: F401

ONE_GRAPH = dict(backend="aot_eager", fullgraph=True)  # a break is an error


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_compiled_model_is_one_graph_and_learns_the_same(name, places, monkeypatch):  # noqa: F811
    run(name, places, "--out eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **ONE_GRAPH))
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(name, places, "--compile --out compiled")
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-4) and len(losses("eager")) == 12


def test_two_compiled_processes_that_accumulate_learn_the_same(places, tmp_path):  # noqa: F811
    jobs = [(COMMANDS[name][0], words_of(name, places, "--epochs 1", how, "--out", f"{name.replace(' ', '-')}{how}"))
            for name in COMMANDS for how in ("", "--compile")]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    (tmp_path / "all.py").write_text(f"""import functools, importlib, json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
torch.compile = functools.partial(torch.compile, **{ONE_GRAPH})
torch._dynamo.config.error_on_recompile = True
dist.init_process_group("gloo")
dist.init_process_group = lambda *values, **options: None  # once for all
for script, words in json.load(open("jobs.json")):
    torch._dynamo.reset()
    importlib.import_module(script).main(words)
""")
    done = subprocess.run([*TORCHRUN, "all.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in (name.replace(" ", "-") for name in COMMANDS):
        assert losses(f"{name}--compile") == pytest.approx(losses(name), rel=1e-4) and len(losses(name)) == 3


def test_a_break_or_a_second_graph_would_be_seen(places, monkeypatch):  # noqa: F811
    import mae
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **ONE_GRAPH))
    forward = mae.MaskedAutoencoder.forward
    monkeypatch.setattr(mae.MaskedAutoencoder, "forward", lambda self, *values: (print(float(values[0].sum())), forward(self, *values))[1])
    with pytest.raises(Exception, match="(?s)graph break|Graph break|item"):
        run("mae", places, "--compile --out a")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_real_compiler_gives_the_same(name, places):  # noqa: F811
    run(name, places, "--out eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        run(name, places, "--compile --out compiled")
    assert losses("compiled") == pytest.approx(losses("eager"), rel=1e-3)
