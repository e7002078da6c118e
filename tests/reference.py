"""Our classes, run as the reference code was run for the golden files.

`evaluate(golden)` builds the network of golden["config"], fills it by the convention of the files, runs it on
golden["input"] in float64, and returns what golden["expected"] would hold, under the same names. It never looks
there, so it serves any other file of the same form.
"""
import sys
import zlib
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mae import DecoupledMAE, DistilledMAE, MaskedAutoencoder, attention_scores, patch_statistics, patchify, random_masking  # noqa: E402
from vit import ViT, position_table, resize_positions  # noqa: E402


def evaluate(golden: dict) -> dict:
    """The values of golden["expected"], computed by this project."""
    method = golden["method"].lower()
    if method == "mae":
        return mae(golden)
    if method.split()[0] in ("d-mae", "dmae", "d2-mae", "d2mae"):
        return dmae(golden)
    if method.startswith("finetune"):
        return classifier(golden)
    if "sin-cos" in method:
        return positions(golden)
    for name, module in (("moco", "moco"), ("tinymim", "tinymim"), ("g2sd", "g2sd")):
        if name in method.replace(" ", ""):
            return import_module(f"tests.reference_{module}").evaluate(golden)
    raise ValueError(f"no script of ours computes {golden['method']!r}")


def assert_meets(ours, expected, rtol: float = 1e-6, absent: frozenset | set = frozenset(), where: str = "") -> None:
    """Every value of a golden file is there and equal, but for the keys in `absent`: facts about other computations."""
    if isinstance(expected, dict):
        for key in expected.keys() - absent:
            assert key in ours, f"{where}/{key} is missing"
            assert_meets(ours[key], expected[key], rtol, absent, f"{where}/{key}")
    elif isinstance(expected, list) and expected and isinstance(expected[0], (str, dict)):
        assert len(ours) == len(expected), where
        for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert_meets(a, b, rtol, absent, f"{where}/{i}")
    elif isinstance(expected, (str, bool)):
        assert ours == expected, where
    else:
        ours, expected = torch.tensor(ours, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=1e-9, msg=lambda m: f"{where}: {m}")


# ---- the convention of the golden files

def value_for(name: str, tensor: Tensor) -> Tensor:
    """Made-up weights that follow from the parameter's name in the reference code."""
    value = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
    if tensor.ndim >= 2:
        value = 0.05 * value                                    # matrices, kernels, tokens, embeddings
    else:
        value = 1 + 0.1 * value if name.endswith("weight") else 0.1 * value
    return torch.from_numpy(np.asarray(value))


def fill(model: nn.Module, reference_name=lambda name: name) -> None:
    """Fills every trainable parameter by its reference name; fixed tables keep their values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(value_for(reference_name(name), parameter))


def images(spec: dict) -> Tensor:
    shape = (spec["batch"], spec["channels"], spec["size"], spec["size"])
    return torch.from_numpy(np.random.RandomState(spec["seed"]).standard_normal(shape))


def mask_noise(spec: dict) -> Tensor:
    return torch.from_numpy(np.random.RandomState(spec["seed"]).uniform(size=(spec["batch"], spec["patches"])))


def grad_norms(model: nn.Module, reference_name=lambda name: name) -> dict[str, float]:
    return {reference_name(name): p.grad.norm().item() for name, p in model.named_parameters() if p.grad is not None}


# ---- MAE and D-MAE

def no_encoder(name: str) -> str:
    """Reference name of a parameter: theirs has no prefix for the encoder."""
    return name.removeprefix("encoder.")


def vit_arguments(c: dict) -> dict:
    return dict(image_size=c["img_size"], patch_size=c["patch_size"], channels=c["in_chans"], width=c["embed_dim"],
                depth=c["depth"], heads=c["num_heads"], mlp_ratio=c["mlp_ratio"], qkv_bias=c.get("qkv_bias", True))


def decoder_arguments(c: dict) -> tuple[int, int, int]:
    return c["decoder_embed_dim"], c["decoder_depth"], c["decoder_num_heads"]


def build_mae(golden: dict) -> MaskedAutoencoder:
    c = golden["config"]
    model = MaskedAutoencoder(ViT(**vit_arguments(c)), decoder_arguments(c), golden["input"]["mask_ratio"], c["norm_pix_loss"]).double()
    fill(model, no_encoder)
    return model


def mae(golden: dict) -> dict:
    model = build_mae(golden)
    x, noise = images(golden["input"]["images"]), mask_noise(golden["input"]["mask_noise"])
    loss = model(x, noise)["loss"]
    loss.backward()
    norms = grad_norms(model, no_encoder)
    with torch.no_grad():
        each = [model(x[i:i + 1], noise[i:i + 1])["loss"].item() for i in range(len(x))]
        keep, restore = random_masking(noise, model.kept)
        z, _ = model.encode(x, noise)
        prediction, target = model.predict(z, restore), patchify(x, model.encoder.patch_size)
        if model.norm_pix:
            mean, std = patch_statistics(target)
            target = (target - mean) / std
    hidden = (restore >= model.kept).int()
    samples = {}
    for name, value in (("pred", prediction), ("latent", z), ("target", target)):
        samples.update({f"{name}_shape": list(value.shape), f"{name}_sum": value.sum().item(),
                        f"{name}_abs_sum": value.abs().sum().item()})
    for name, value in (("pred", prediction), ("target", target)):
        samples[f"{name}[0,0,:8]"] = value[0, 0, :8].tolist()
        if value.shape[1] > 21:
            samples[f"{name}[0,21,:8]"] = value[0, 21, :8].tolist()
        samples[f"{name}[-1,-1,-8:]"] = value[-1, -1, -8:].tolist()
    samples.update({"latent[0,0,:8] (cls)": z[0, 0, :8].tolist(), "latent[0,1,:8] (lowest noise first)": z[0, 1, :8].tolist(),
                    "latent[-1,-1,:8]": z[-1, -1, :8].tolist(), "pos_embed_sum": model.encoder.pos_embed.sum().item(),
                    "pos_embed_abs_sum": model.encoder.pos_embed.abs().sum().item()})
    return dict(loss=loss.item(), loss_per_image=each, grad_norm=norms, grad_norm_total=float(np.linalg.norm(list(norms.values()))),
                num_patches=noise.shape[1], len_keep=model.kept, mask=hidden.tolist(), mask_sum=hidden.sum().item(),
                ids_restore=restore.tolist(), ids_keep=keep.tolist(), samples=samples)


def build_dmae(golden: dict) -> tuple[DistilledMAE, ViT, list[int]]:
    """Student, teacher, and the numbers of the compared blocks in the teacher. A file with `decode_idx` is of D2-MAE:
    there the student's last block is the one of which only the queries and keys exist."""
    c = golden["config"]
    student, teacher, layers = c["student"], ViT(**vit_arguments(c["teacher"])).double(), list(c["distill_attn_idx"])
    kind, options, depth = DistilledMAE, {}, student["depth"]
    if "decode_idx" in c:
        kind, options, depth = DecoupledMAE, dict(decode_from=c["decode_idx"]), student["depth"] - 1
    ours = [depth] if options else layers
    model = kind(ViT(**{**vit_arguments(student), "depth": depth}), decoder_arguments(student), golden["input"]["mask_ratio"],
                 student["norm_pix_loss"], teacher_heads=[teacher.blocks[i - 1].attn.heads for i in layers],
                 layers=ours, weight=c["distill_attn_alpha"], **options).double()

    adapters = list(golden["input"]["adapter_fill_names"])

    def reference_name(name: str) -> str:
        if name.startswith("adapters."):
            return adapters[int(name.split(".")[1])]
        return no_encoder(name).replace("extra.", f"blocks.{depth}.")
    fill(model, reference_name)
    fill(teacher, lambda name: "tch_model." + name)
    model.reference_name = reference_name
    return model, teacher, layers


def dmae(golden: dict) -> dict:
    model, teacher, layers = build_dmae(golden)
    x, noise = images(golden["input"]["images"]), mask_noise(golden["input"]["mask_noise"])
    keep, restore = random_masking(noise, model.kept)
    with torch.no_grad():
        theirs, _ = attention_scores(teacher, x, keep, layers)
    losses = model(x, noise, theirs)
    losses["loss"].backward()
    norms = grad_norms(model, model.reference_name)
    with torch.no_grad():
        ours, _ = model.observe(x, keep)
        prediction = model.predict(model.encode(x, noise)[0], restore)
        samples = {"pred_shape": list(prediction.shape), "pred_sum": prediction.sum().item(),
                   "pred_abs_sum": prediction.abs().sum().item(), "pred[0,0,:6]": prediction[0, 0, :6].tolist()}
        compared = golden["config"].get("distill_std_attn_idx", layers)
        for layer, of_student, student, target, adapter in zip(layers, compared, ours, theirs, model.adapters, strict=True):
            adapted, entry = adapter(student), {}
            for name, value in (("student_logits", student), ("teacher_logits", target), ("adapted", adapted)):
                entry.update({f"{name}_sum": value.sum().item(), f"{name}_abs_sum": value.abs().sum().item(),
                              f"{name}[0,0,0,:6]": value[0, 0, 0, :6].tolist()})
                if name != "adapted":
                    entry.update({f"{name}_shape": list(value.shape), f"{name}[-1,-1,-1,-6:]": value[-1, -1, -1, -6:].tolist()})
            entry["loss"] = F.mse_loss(adapted, target).item()
            samples[f"attn layer {layer} (student {of_student})"] = entry
    adapters = {name: norms.pop(name) for name in list(norms) if name.startswith("attn_adapter")}
    return dict(loss=losses["loss"].item(), loss_recon=losses["reconstruction"].item(), loss_attn=losses["attention"].item(),
                grad_norm=norms, grad_norm_adapter=adapters, mask_sum=int((restore >= model.kept).sum()), ids_keep=keep.tolist(),
                samples=samples)


# ---- positions

def positions(golden: dict) -> dict:
    """Tables and stretched tables of the sizes that the file lists, with the entries that it asks for."""
    cases = []
    for case in golden["cases"]:
        table = position_table("sincos", case["dim"], (case["grid"],) * 2)[0].double()
        table = table if case["cls"] else table[1:]
        entries = [dict(token=e["token"], channel=e["channel"], value=table[e["token"], e["channel"]].item()) for e in case["entries"]]
        cases.append(dict(dim=case["dim"], grid=case["grid"], cls=case["cls"], shape=list(table.shape), sum=table.sum().item(),
                          abs_sum=table.abs().sum().item(), sq_sum=table.square().sum().item(), entries=entries))
    stretched = []
    for case in golden["interpolation"]:
        table = position_table("sincos", case["dim"], (case["from"],) * 2).double()
        if case["source"].startswith("fill_"):
            table = value_for("pos_embed", table)
        table = resize_positions(table, (case["from"],) * 2, (case["to"],) * 2)
        entries = [dict(index=e["index"], value=table[tuple(e["index"])].item()) for e in case["entries"]]
        stretched.append({"source": case["source"], "from": case["from"], "to": case["to"], "dim": case["dim"], "shape": list(table.shape),
                          "sum": table.sum().item(), "abs_sum": table.abs().sum().item(), "entries": entries})
    return dict(cases=cases, interpolation=stretched)


# ---- classification

def build_classifier(golden: dict, pool: str) -> ViT:
    c = golden["config"]
    model = ViT(**vit_arguments(c), pool=pool, classes=c["num_classes"], drop_path=c.get("drop_path_rate", 0.0)).double()
    model.pos_embed.requires_grad_(True)
    fill(model)
    return model


def classifier(golden: dict) -> dict:
    x, targets = images(golden["input"]["images"]), torch.tensor(golden["input"]["targets"])
    return {name: one_pooling(build_classifier(golden, pool), x, targets)
            for name, pool in (("global_pool", "mean"), ("cls_token", "cls"))}


def one_pooling(model: ViT, x: Tensor, targets: Tensor) -> dict:
    logits, classes = model(x), model.head.out_features
    loss = F.cross_entropy(logits, targets)
    loss.backward()
    with torch.no_grad():
        features = model.features(x)
        return {"loss": loss.item(), "logits": logits.tolist(), "features[0,:8]": features[0, :8].tolist(),
                "features_abs_sum": features.abs().sum().item(),
                "loss_label_smoothing_0.1": F.cross_entropy(logits, targets, label_smoothing=0.1).item(),
                "mixup": mixed(model, x * 0.3 + x.flip(0) * 0.7, targets, 0.3, classes),
                "cutmix": cutmixed(model, x, targets, classes), "grad_norm": grad_norms(model)}


def mixed(model: ViT, x: Tensor, targets: Tensor, lam: float, classes: int) -> dict:
    """Our loss: cross-entropy with label smoothing on unsmoothed mixed labels."""
    labels = F.one_hot(targets, classes).double()
    labels = lam * labels + (1 - lam) * labels.flip(0)
    smooth = 0.9 * labels + 0.1 / classes
    return dict(lam=lam, smoothing=0.1, soft_targets=smooth.tolist(), loss=F.cross_entropy(model(x), labels, label_smoothing=0.1).item())


def cutmixed(model: ViT, x: Tensor, targets: Tensor, classes: int) -> dict:
    rows, columns = (5, 21), (9, 30)
    x, other = x.clone(), x.flip(0)
    x[:, :, rows[0]:rows[1], columns[0]:columns[1]] = other[:, :, rows[0]:rows[1], columns[0]:columns[1]]
    lam = 1 - (rows[1] - rows[0]) * (columns[1] - columns[0]) / (x.shape[2] * x.shape[3])
    return dict(mixed(model, x, targets, lam, classes), rows=list(rows), cols=list(columns))
