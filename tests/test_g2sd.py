"""G2SD against the values of the reference code, the mistakes that these values exclude, and both stages as commands."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import finetune
import g2sd
import mae
from g2sd import GenericStudent, MaskedViT, SpecificStudent, generic_target, nkd_loss, specific_loss
from tests import reference_g2sd as reference
from tests.reference import assert_meets, value_for
from vit import IMAGENET_MEAN, SIZES, InputError, ViT, param_groups

GENERIC, SPECIFIC = (json.loads((Path(__file__).parent / f"golden/g2sd_{stage}.json").read_text()) for stage in ("generic", "specific"))
# Facts about other computations than ours, and remarks in words.
ABSENT = {"loss_with_unrounded_float64_position_embeddings", "criterion", "eval_logits"}


# ---- golden values

@pytest.mark.parametrize("golden", [GENERIC, SPECIFIC], ids=["generic", "specific"])
def test_reference_values_are_met(golden):
    ours, expected = reference.evaluate({key: golden[key] for key in golden if key not in ("expected", "mutants")}), golden["expected"]
    no_gradient = {name for key in expected if key.startswith("grad_norm") for name, norm in expected[key].items() if norm is None}
    assert_meets(ours, expected, rtol=1e-6, absent=ABSENT | no_gradient)
    assert all(ours["grad_norm"][name] is None for name in no_gradient)
    for cases in ("logit_cases", "end_to_end"):
        for name, case in expected.get(cases, {}).items():
            assert ours[cases][name]["loss"] == pytest.approx(case["loss"], rel=1e-8)
    assert "loss" not in expected or ours["loss"] == pytest.approx(expected["loss"], rel=1e-8)


def test_decay_groups_of_the_generic_stage():
    _, student = reference.generic_models(GENERIC)
    names, unused = {id(p): reference.reference_name(n) for n, p in student.named_parameters()}, ("decoder_norm.", "decoder_pred.", "encoderf")
    for group in param_groups(student, 0.05, undecayed=("encoder.pos_embed", "decoder_pos_embed")):
        wanted = GENERIC["weight_decay_groups"]["decay" if group["weight_decay"] else "no_decay"]
        assert {names[id(p)] for p in group["params"]} == {name for name in wanted if not name.startswith(unused)}


def target_of(state_of):
    """generic_target with another state: a function of teacher, z, restore and layer."""
    return torch.no_grad()(lambda teacher, images, noise, layer: state_of(teacher, *teacher.encode(images, noise), layer))


def normalised(y, weight=None, bias=None):
    return F.layer_norm(y, y.shape[-1:], weight, bias, eps=1e-6)


def through_decoder_norm(y, prefix=""):
    return normalised(y, *(value_for(f"{prefix}decoder_norm.{name}", y.new_empty(y.shape[-1])) for name in ("weight", "bias")))


def student_with_norm(self, z, restore, blocks=None, decode=MaskedViT.decode):
    y = decode(self, z, restore, blocks)
    return through_decoder_norm(y) if blocks is None else y  # the teacher's blocks are given


# Mistakes, made in the code: (where, instead, the value that the reference lists for it or None).
GENERIC_MISTAKES = {
    "target not normalised": ("g2sd.generic_target", target_of(lambda t, z, r, layer: t.decode(z, r, layer)), "target_not_normalised"),
    "target from the last block": ("g2sd.generic_target", target_of(lambda t, z, r, layer: normalised(t.decode(z, r))),
                                   "target_from_last_decoder_block"),
    "target through decoder_norm": ("g2sd.generic_target", target_of(
        lambda t, z, r, layer: through_decoder_norm(t.decode(z, r, layer), "teacher.")), "target_is_teacher_decoder_norm"),
    "student through decoder_norm": ("g2sd.MaskedViT.decode", student_with_norm, "student_decoder_norm_applied"),
    "beta 1": ("torch.nn.functional.smooth_l1_loss", lambda *a, beta, f=F.smooth_l1_loss, **o: f(*a, beta=1.0, **o), "beta_1"),
    "squared error": ("torch.nn.functional.smooth_l1_loss", lambda *a, beta, **o: F.mse_loss(*a, **o), "mse"),
    "layer counted from 0": ("g2sd.generic_target", lambda *a, f=generic_target: f(*a[:3], a[3] + 1), None),
    "eps 1e-5 in the target": ("torch.nn.functional.layer_norm", lambda *a, f=F.layer_norm, **eps: f(*a), None),
    "masks of its own for the teacher": ("g2sd.generic_target", lambda t, x, n, layer, f=generic_target: f(t, x, n.flip(1), layer), None),
    "no norm after the encoder": ("vit.ViT.encode", lambda self, x, keep=None: self.through(self.embed(x, keep)), None),
    "class token left out": ("g2sd.GenericStudent.loss", lambda self, p, t, r: F.smooth_l1_loss(p[:, 1:], t[:, 1:], beta=2.0), None),
}


@pytest.mark.parametrize("mistake", GENERIC_MISTAKES)
def test_a_mistake_in_the_generic_stage_misses_the_reference(mistake, monkeypatch):
    where, instead, listed = GENERIC_MISTAKES[mistake]
    monkeypatch.setattr(where, instead)
    loss = reference.evaluate(GENERIC)["loss"]
    assert abs(loss / GENERIC["expected"]["loss"] - 1) > 1e-7
    assert listed is None or loss == pytest.approx(GENERIC["mutants"][f"loss_if_{listed}"], rel=1e-8)


def token_second(self, images):
    x = self.embed(images)
    x = self.norm(self.through(torch.cat([x[:, :1], self.dist_token.expand(len(x), -1, -1), x[:, 1:]], dim=1)))
    y = self.head(x[:, 0]), self.head_dist(x[:, -1])  # read from where the reference has it
    return y if self.training else (y[0] + y[1]) / 2


def token_with_position(self, images, forward=SpecificStudent.forward):
    with torch.no_grad():
        self.dist_token += self.pos_embed[:, :1]
    return forward(self, images)


def other_verdict(verdict):
    """The loss of the hard distillation with this one of the distillation token, NKD as it is."""
    def loss(a, b, labels, teacher, smoothing=0.0):
        truth = F.cross_entropy(a, labels, label_smoothing=smoothing)
        return dict(loss=(truth + verdict(b, teacher, smoothing)) / 2) if b is not None else specific_loss(a, b, labels, teacher)
    return loss


SPECIFIC_MISTAKES = {
    "token in the second place": ("g2sd.SpecificStudent.forward", token_second),
    "token with a position": ("g2sd.SpecificStudent.forward", token_with_position),
    "no factor one half": ("g2sd.specific_loss", lambda *a, f=specific_loss: {name: 2 * value for name, value in f(*a).items()}),
    "soft distillation": ("g2sd.specific_loss", other_verdict(lambda b, teacher, _: F.cross_entropy(b, teacher.softmax(1)))),
    "smoothing of the teacher's verdict": ("g2sd.specific_loss", other_verdict(
        lambda b, teacher, smoothing: F.cross_entropy(b, teacher.argmax(1), label_smoothing=smoothing))),
    "NKD without alpha's term": ("g2sd.nkd_loss", lambda s, t, y, f=nkd_loss: f(s, t, y, 1.0, 0.0)),
}


@pytest.mark.parametrize("mistake", SPECIFIC_MISTAKES)
def test_a_mistake_in_the_specific_stage_misses_the_reference(mistake, monkeypatch):
    if mistake.startswith("token"):  # the other case has no head to read
        monkeypatch.setattr(reference, "specific_student", lambda golden, kind, f=reference.specific_student: f(golden, "hard"))
    monkeypatch.setattr(*SPECIFIC_MISTAKES[mistake])
    case = "nkd_mixup" if mistake.startswith("NKD") else "hard_token_mixup"
    ours, expected = (values["end_to_end"][case]["loss"] for values in (reference.evaluate(SPECIFIC), SPECIFIC["expected"]))
    assert abs(ours / expected - 1) > 1e-5


# ---- what the losses and networks promise

SMALL = dict(image_size=(8, 16), patch_size=4, width=16, depth=2, heads=2)


def small_pair(tokens: str = "all") -> tuple[MaskedViT, GenericStudent]:
    torch.manual_seed(0)
    return MaskedViT(ViT(**SMALL), (16, 4, 2), 0.5).requires_grad_(False), GenericStudent(ViT(**SMALL), (12, 1, 2), 16, 0.5, tokens)


def test_every_parameter_of_the_students_learns():
    (teacher, generic), x, noise = small_pair(), torch.randn(2, 3, 8, 16), torch.rand(2, 8)
    generic(x, noise, generic_target(teacher, x, noise, 2))["loss"].backward()
    hard, nkd = (SpecificStudent(dict(SMALL, classes=3), token_head) for token_head in (True, False))
    for student in (hard, nkd):
        specific_loss(*student(x), torch.tensor([0, 2]), torch.randn(2, 3))["loss"].backward()
    for model in (generic, hard, nkd):
        assert [name for name, p in model.named_parameters() if p.requires_grad and not (p.grad is not None and p.grad.any())] == []
    assert torch.equal(nkd.eval()(x), nkd.train()(x)[0]) and nkd.head_dist is None
    for wrong in (lambda: small_pair("none"), lambda: SpecificStudent(SMALL), lambda: SpecificStudent(dict(SMALL, classes=3, pool="mean"))):
        with pytest.raises(InputError, match="tokens 'none'|class token"):
            wrong()


def test_teacher_stops_at_its_layer():
    (teacher, _), called = small_pair(), []
    for i, block in enumerate(teacher.decoder_blocks, start=1):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    generic_target(teacher, torch.randn(2, 3, 8, 16), torch.rand(2, 8), 2)
    assert called == [1, 2]


def test_one_batch_can_be_learned_from_the_level_of_zeros_to_nothing():
    (teacher, student), x, noise, losses = small_pair(), torch.randn(4, 3, 8, 16), torch.rand(4, 8), []
    target, optimizer = generic_target(teacher, x, noise, 2), torch.optim.Adam(student.parameters(), 1e-2)
    for _ in range(150):
        losses.append(student(x, noise, target))
        optimizer.zero_grad()
        losses[-1]["loss"].backward()
        optimizer.step()
    assert 0.2 < losses[0]["zeros"] < 0.25 and losses[0]["loss"] > 0.2 and losses[-1]["loss"] < 0.02


@pytest.mark.parametrize("size, generic, specific", [("tiny", 6_633_216, 5_910_608), ("small", 25_242_112, 22_436_048)])
def test_students_have_the_number_of_parameters_of_the_authors(size, generic, specific):
    student = GenericStudent(ViT(**SIZES[size]), g2sd.STUDENTS[size]["decoder"], 512)
    assert sum(p.numel() for p in student.parameters() if p.requires_grad) == generic  # without the modules they never use
    assert sum(p.numel() for p in SpecificStudent(dict(SIZES[size], classes=1000)).parameters()) == specific


# ---- files

SHORT = "--batch-size 8 --warmup-epochs 0 --log-every 1 --device cpu --workers 0 --epochs 0.4 --recipe demo".split()
MODEL = "--depth 1 --width 16 --heads 2 --image-size 16 --patch-size 4".split()
LARGE = dict(image_size=16, patch_size=4, width=32, depth=1, heads=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of two classes, an MAE, classifiers, and what the generic stage makes of the MAE."""
    root, generator = tmp_path_factory.mktemp("g2sd"), torch.Generator().manual_seed(0)
    for i in range(52):  # 20 of each class for training
        path = root / "data" / ("train" if i < 40 else "val") / ("dark", "light")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((torch.randint(100, (16, 16, 3), generator=generator) + 100 * (i % 2)).byte().numpy()).save(path)
    teacher = mae.MaskedAutoencoder(ViT(**LARGE), (16, 2, 4), 0.5)
    save(root / "mae.pth", teacher, teacher.encoder, args=dict(mask_ratio=0.5, decoder=(16, 2, 4)))
    save(root / "encoder.pth", teacher.encoder, teacher.encoder)
    for classes, name, mean in ((2, "classifier.pth", 0.4), (3, "three.pth", 0.4), (2, "mean.pth", 0.1)):
        save(root / name, network := ViT(**LARGE, pool="mean", classes=classes), network, mean)
    generic(root, "generic")
    return root


def save(path: Path, model: torch.nn.Module, network: ViT, mean: float = 0.4, **more) -> None:
    torch.save(dict(model=model.state_dict(), config=dict(network.config, mean=[mean] * 3, std=[0.2] * 3), **more), path)


def generic(root: Path, out: str, *more: str) -> Path:
    g2sd.main(["--data", str(root / "data"), *SHORT, *MODEL, "--decoder", "12", "1", "2", "--teacher", str(root / "mae.pth"),
               "--out", str(root / out), *more])
    return root / out


def specific(root: Path, out: str, *more: str) -> Path:
    g2sd.main(["--stage", "specific", "--data", str(root / "data"), *SHORT, "--labels", "40", "--init", str(root / "generic/encoder.pth"),
               "--teacher", str(root / "classifier.pth"), "--out", str(root / out), *"--mixup 0.8 --cutmix 1 --erasing 0.5".split(), *more])
    return root / out


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_files_of_the_generic_stage(folder):
    encoder, last = read(folder / "generic/encoder.pth"), read(folder / "generic/last.pth")
    assert encoder["config"]["mean"] == [0.4] * 3 and encoder["model"].keys() == ViT(**SMALL | dict(depth=1)).state_dict().keys()
    assert {name.split(".")[0] for name in last["model"]} == {name.split(".")[0] for name in small_pair()[1].state_dict()}  # no teacher
    assert json.loads((folder / "generic/log.jsonl").read_text().splitlines()[0]).keys() >= {"loss", "zeros"}
    settled = json.loads((folder / "generic/args.json").read_text())
    assert (settled["mask_ratio"], settled["layer"], settled["recipe"]) == (0.5, 1, "demo")  # the teacher's; half way of 2


def test_files_of_the_specific_stage_and_evaluating_again(folder, capsys):
    often, once = (specific(folder, name, "--epochs", "2", "--eval-every", name, "--drop-path", "0.1") for name in ("1", "9"))
    settled, records = json.loads((often / "args.json").read_text()), [json.loads(x) for x in (often / "log.jsonl").read_text().splitlines()]
    assert (settled["mean"], settled["std"], settled["image_size"]) == ([0.4] * 3, [0.2] * 3, [16, 16])
    assert settled["recipe"] == "demo-specific" and [r["step"] for r in records if "top1" in r] == [5, 10]
    model, other = read(often / "model.pth")["model"], read(once / "model.pth")["model"]
    assert all(torch.equal(value, other[name]) for name, value in model.items())  # looking changes nothing
    assert not torch.equal(model["pos_embed"], read(folder / "generic/encoder.pth")["model"]["pos_embed"])  # learned in this stage
    capsys.readouterr()
    g2sd.main(["--stage", "specific", "--data", str(folder / "data"), *SHORT, "--init", str(often / "model.pth"), "--eval"])
    assert f"top1 {records[-1]['top1']:.2f} %" in capsys.readouterr().out
    for classifier in (often / "model.pth", folder / "classifier.pth"):
        with pytest.raises(InputError, match="classifier already, with .*head.weight"):
            specific(folder, "again", "--init", str(classifier))


def test_the_commands_of_the_docstring_follow_one_another(folder):
    chain, labelled = folder / "chain", ["--data", str(folder / "data"), *SHORT, "--labels", "16", "--init"]
    mae.main(["--data", str(folder / "data"), *SHORT, *MODEL, "--out", str(chain / "mae")])
    generic(folder, "chain/g2sd", "--teacher", str(chain / "mae/last.pth"))
    finetune.main([*labelled, str(chain / "mae/encoder.pth"), "--out", str(chain / "classes")])
    out = specific(folder, "chain/both", "--init", str(chain / "g2sd/encoder.pth"), "--teacher", str(chain / "classes/model.pth"),
                   "--distillation", "nkd")
    assert not any(name.startswith("head_dist.") for name in read(out / "model.pth")["model"])
    finetune.main([*labelled, str(chain / "g2sd/encoder.pth"), "--out", str(chain / "finetuned")])


def test_half_precision_keeps_losses_in_float32(folder, monkeypatch):
    seen = []
    for name in ("smooth_l1_loss", "cross_entropy"):
        monkeypatch.setattr(F, name, lambda x, *a, f=getattr(F, name), **o: seen.append(x.dtype) or f(x, *a, **o))
    generic(folder, "half", "--precision", "bf16")
    specific(folder, "half-specific", "--precision", "bf16")
    assert len(seen) >= 4 and set(seen) == {torch.float32}


# ---- the teacher and the student

def official(folder: Path, drop: str = "\0") -> list[str]:
    """The teacher as facebookresearch/mae would have saved it, without the keys that hold `drop`."""
    state = {name.removeprefix("encoder."): value for name, value in read(folder / "mae.pth")["model"].items() if drop not in name}
    torch.save({"model": state}, folder / "official.pth")
    return ["--teacher", str(folder / "official.pth"), "--teacher-heads", "2"]


def test_official_files_give_the_same_teacher_and_the_usual_guesses(folder):
    args, ours = g2sd.parse_args(["--teacher", str(folder / "mae.pth")])
    assert args.mask_ratio == 0.5 and not any(p.requires_grad for p in ours.parameters())
    args, theirs = g2sd.parse_args([*official(folder), "--teacher-decoder-heads", "4", "--mask-ratio", "0.5"])
    x, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert args.mean == list(IMAGENET_MEAN) and torch.equal(generic_target(ours, x, noise, 1), generic_target(theirs, x, noise, 1))
    full = mae.MaskedAutoencoder(ViT(image_size=32, width=768, depth=1, heads=12), (512, 2, 16))
    torch.save({"model": {name.removeprefix("encoder."): value for name, value in full.state_dict().items()}}, folder / "full.pth")
    args, theirs = g2sd.parse_args(["--teacher", str(folder / "full.pth")])
    assert args.mask_ratio == 0.75 and theirs.encoder.blocks[0].attn.heads == 12 and theirs.decoder_blocks[0].attn.heads == 16


@pytest.mark.parametrize("decoder, heads", [([16, 2, 2], 2), ([16, 2, 4], 4)])
def test_how_files_of_ours_tell_the_heads_of_the_decoder(decoder, heads, folder):
    torch.save(dict(read(folder / "mae.pth"), args=dict(decoder=decoder)), folder / "other.pth")
    assert g2sd.parse_args(["--teacher", str(folder / "other.pth")])[1].decoder_blocks[0].attn.heads == heads


def test_a_teacher_without_whole_decoder_is_refused_by_name(folder):
    for drop, told in (("decoder", "mae_pretrain_vit_base_full.pth"), *[(name, name.removeprefix("encoder.")) for name in
                       ("decoder_blocks.1.attn.qkv.bias", "mask_token", "encoder.blocks.0.mlp.fc2.bias")]):
        with pytest.raises(InputError, match=told):
            g2sd.parse_args([*official(folder, drop), "--teacher-decoder-heads", "4"])
    with pytest.raises(InputError, match="16 wide, has: give --teacher-decoder-heads"):
        g2sd.parse_args(official(folder))
    (folder / "named").mkdir()
    with pytest.raises(InputError, match=r"classifier.pth knows 2 classes \(x, y, ...\), --data has 2 \(a, b, ...\)"):
        torch.save(dict(read(folder / "classifier.pth"), classes=["x", "y"]), folder / "named" / "classifier.pth")
        state, config = g2sd.read_encoder(str(folder / "named" / "classifier.pth"))
        g2sd.load_trained(str(folder / "named" / "classifier.pth"), state, config, g2sd.Images(torch.zeros(2).numpy(), None, ["a", "b"]))
    with pytest.raises(InputError, match=r"--image-size: .*encoder.pth is evaluated as it was trained, at \[16, 16\]"):
        g2sd.main(f"--stage specific --init {folder}/generic/encoder.pth --eval --image-size 32 --device cpu".split())
    with pytest.raises(InputError, match="--width 64: the network in --init has 16"):
        g2sd.parse_args(f"--stage specific --init {folder}/generic/encoder.pth --teacher t.pth --width 64".split())


@pytest.mark.parametrize("flags, heads, decoder", [
    ("--model demo", 4, 1), ("--recipe imagenet", 6, 4), ("--recipe imagenet --model tiny", 3, 4), ("--recipe cifar", 12, 4),
    ("--recipe imagenet --heads 2 --decoder 32 2 2", 2, 2)])
def test_heads_and_decoder_are_the_flags_or_the_recipes_or_the_authors(flags, heads, decoder, folder):
    words = ["--teacher", str(folder / "mae.pth"), *flags.split(), *"--image-size 16 --patch-size 4 --depth 1".split()]
    student = g2sd.build_generic(*g2sd.parse_args(words))
    assert (student.encoder.blocks[0].attn.heads, len(student.decoder_blocks)) == (heads, decoder)


@pytest.mark.parametrize("change, fault", [
    ({"mask_token": torch.zeros(1, 1, 12), "decoder_pos_embed": torch.zeros(1, 17, 12), "decoder_norm.weight": torch.ones(12),
      "encoderfeature_pred.fc1.weight": torch.zeros(2, 2), "decoderfeature_pred.fc1.weight": torch.zeros(2, 2)}, None),
    ({"norm.bias": None}, "norm.bias"), ({"blocks.7.norm1.bias": torch.zeros(16)}, "blocks.7"), ({"extra": torch.zeros(1)}, "extra")])
def test_hand_over_takes_the_authors_files_and_refuses_any_other_difference(change, fault, folder):
    ours = read(folder / "generic/encoder.pth")["model"]
    torch.save({"model": {name: value for name, value in {**ours, **change}.items() if value is not None}}, folder / "released.pth")
    args, found = g2sd.parse_args(["--stage", "specific", "--init", str(folder / "released.pth"), "--heads", "2", "--teacher", "t.pth"])
    if fault:
        with pytest.raises(InputError, match=fault):
            g2sd.build_specific(args, *found, 5)
    else:
        student = g2sd.build_specific(args, *found, 5)
        assert all(torch.equal(student.state_dict()[name], value) for name, value in ours.items())
        assert student.pos_embed.requires_grad and student.head.weight.std() < 1e-4 < student.head_dist.weight.std()


# ---- what users do wrong

@pytest.mark.parametrize("flags, told", [
    ("", "python mae.py --width 128 --heads 8 --blr 6e-3 --out runs/teacher"), ("--data /pictures", "python mae.py --data /pictures --model base"),
    ("--stage specific", "is missing"), ("--stage specific --eval", "is missing"),
    ("--teacher t.pth --recipe demo-specific", "one of --stage specific"),
    ("--stage specific --init e.pth --teacher t.pth", "e.pth: no such file"),
])
def test_what_is_missing_or_out_of_place_is_told(flags, told):
    with pytest.raises(InputError, match="(?s)" + told):
        g2sd.main(flags.split())


@pytest.mark.parametrize("option, stage", [("--labels", "generic"), ("--eval", "generic"), ("--layer", "specific")])
def test_an_option_of_the_other_stage_is_refused_by_name(option, stage, capsys):
    with pytest.raises(SystemExit) as left:
        g2sd.main([option, "1", "--stage", stage])
    assert left.value.code == 2 and f"unrecognized arguments: {option}" in capsys.readouterr().err


@pytest.mark.parametrize("flags, told", [
    ("--patch-size 8", "16 x 16 pixels in patches of 4, .* 16 x 16 in patches of 8"), ("--image-size 32", "16 x 16 pixels .* 32 x 32"),
    ("--layer 3", "--layer 3: the teacher's decoder has blocks 1 to 2")])
def test_what_does_not_fit_the_teacher_is_told(flags, told, folder):
    with pytest.raises(InputError, match=told):
        generic(folder, "refused", *flags.split())
    assert not (folder / "refused").exists()


@pytest.mark.parametrize("teacher, flags, told", [
    ("classifier.pth", "--image-size 32", r"image_size \[16, 16\], the student \[32, 32\]"), ("mean.pth", "", "the teacher has mean"),
    ("encoder.pth", "", "is no classifier but an encoder"), ("three.pth", "", r"knows 3 classes \(0, 1, 2, ...\), --data has 2")])
def test_the_specific_teacher_must_see_the_same_tensor_and_know_the_classes(teacher, flags, told, folder):
    with pytest.raises(InputError, match=told):
        specific(folder, "refused", "--teacher", str(folder / teacher), *flags.split())
