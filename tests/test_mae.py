"""MAE and D-MAE against the values of the reference code, and the mistakes that these values exclude."""
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import mae
from mae import DistilledMAE, MaskedAutoencoder, attention_scores, patchify, random_masking, unpatchify
from tests.reference import assert_meets, build_dmae, build_mae, evaluate, images, mask_noise, no_encoder
from vit import InputError, ViT, param_groups

GOLDEN = {name: json.loads((Path(__file__).parent / f"golden/{name}.json").read_text())
          for name in ("mae_tiny", "mae_norm_pix", "dmae_tiny", "d2mae_tiny")}
ABSENT = {"loss_if_pos_embed_kept_in_float64", "loss_hidden", "loss_is", "if_pos_embeds_kept_in_float64",
          "NOT_THE_LOSS if softmax before the adapter", "NOT_THE_LOSS if softmax after the adapter",
          "NOT_THE_LOSS if class token left out"}  # facts about other computations than ours


@pytest.mark.parametrize("name", GOLDEN)
def test_reference_values_are_met(name):
    golden = GOLDEN[name]
    ours = evaluate(golden)
    assert ours["loss"] == pytest.approx(golden["expected"]["loss"], rel=1e-8)
    assert_meets(ours, golden["expected"], absent=ABSENT)
    assert ours["grad_norm"].keys() == golden["expected"]["grad_norm"].keys()


@pytest.mark.parametrize("name", ["mae_tiny", "mae_norm_pix"])
def test_three_optimizer_steps_and_decay_groups(name):
    golden = GOLDEN[name]
    model = build_mae(golden)
    x, noise = images(golden["input"]["images"]), mask_noise(golden["input"]["mask_noise"])
    groups = param_groups(model, 0.05)
    names = {id(p): no_encoder(n) for n, p in model.named_parameters()}
    for group in groups:
        wanted = golden["weight_decay_groups"]["decay" if group["weight_decay"] else "no_decay"]
        assert {names[id(p)] for p in group["params"]} == set(wanted)
    optimizer = torch.optim.AdamW(groups, 1e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(3):
        loss = model(x, noise)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(model(x, noise)["loss"].item())
    assert losses == pytest.approx(golden["train_3_steps"]["losses"], rel=1e-8)
    norms = {no_encoder(n): p.norm().item() for n, p in model.named_parameters()}
    for parameter, norm in golden["train_3_steps"]["param_norm_after"].items():
        assert norms[parameter] == pytest.approx(norm, rel=1e-6)


def test_state_dict_has_the_official_names_and_shapes():
    golden = GOLDEN["mae_tiny"]
    ours = {no_encoder(name): list(value.shape) for name, value in build_mae(golden).state_dict().items()}
    assert ours == golden["state_dict_shapes"]


def worst_deviation(golden: dict) -> float:
    """How far loss or a gradient norm is from the reference, relatively."""
    ours, expected = evaluate(golden), golden["expected"]
    pairs = [(ours["loss"], expected["loss"])]
    pairs += [(ours["grad_norm"].get(name, 0.0), value) for name, value in expected["grad_norm"].items()]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def no_class_token_in_decoder(self, z, restore, blocks=None):
    z = self.decoder_embed(z)
    masks = self.mask_token.expand(len(z), restore.shape[1] + 1 - z.shape[1], -1)
    y = mae.take(torch.cat([z[:, 1:], masks], dim=1), restore) + self.decoder_pos_embed[:, 1:]
    for block in self.decoder_blocks:
        y = block(y)
    return torch.cat([y[:, :1], y], dim=1)


# Each of the usual mistakes, made in the code: (where, what, instead).
MISTAKES = {
    "LayerNorm eps 1e-5": ("vit.layer_norm", lambda width: torch.nn.LayerNorm(width)),
    "tanh GELU": ("vit.ACTIVATIONS", {"gelu": lambda: torch.nn.GELU("tanh")}),
    "rows before columns": ("vit.sincos_2d", lambda w, g, f=mae.ViT.__init__.__globals__["sincos_2d"]: f(w, g).roll(w // 2, 1)),
    "channel-first pixels": ("mae.patchify", lambda x, p: patchify(x, p).unflatten(2, (p * p, -1)).transpose(2, 3).flatten(2)),
    "biased variance": ("mae.patch_statistics", lambda x: (x.mean(-1, True), (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt())),
    "descending noise": ("mae.random_masking", lambda noise, keep: random_masking(-noise, keep)),
    "no class token in the decoder": ("mae.MaskedViT.decode", no_class_token_in_decoder),
    "rounded number of patches": ("mae.int", round),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_code_misses_the_reference(mistake, monkeypatch):
    target, instead = MISTAKES[mistake]
    monkeypatch.setattr(target, instead, raising=target != "mae.int")
    assert worst_deviation(GOLDEN["mae_norm_pix"]) > 1e-5
    monkeypatch.undo()
    assert worst_deviation(GOLDEN["mae_norm_pix"]) < 1e-6


def small(**options) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(ViT(image_size=(8, 16), patch_size=4, width=16, depth=2, heads=2), (12, 1, 2), 0.5, **options)


def test_pixels_of_visible_patches_and_of_nothing_else_reach_the_encoder():
    model, x, noise = small(), torch.randn(2, 3, 8, 16), torch.rand(2, 8)
    _, restore = random_masking(noise, model.kept)
    hidden = unpatchify((restore >= model.kept).float().unsqueeze(-1).expand(-1, -1, 48), 4, (2, 4))
    z, _ = model.encode(x, noise)
    assert torch.equal(z, model.encode(x + hidden, noise)[0])
    assert not torch.allclose(z, model.encode(x + 1 - hidden, noise)[0])


def test_loss_ignores_predictions_on_visible_patches_unless_they_have_weight():
    x, noise = torch.randn(2, 3, 8, 16), torch.rand(2, 8)
    for weight in (0.0, 0.1):
        model = small(visible_weight=weight)
        _, restore = random_masking(noise, model.kept)
        hidden, prediction = restore >= model.kept, torch.randn(2, 8, 48)
        changed = torch.where(hidden.unsqueeze(-1), prediction, prediction + 1)
        same = torch.equal(model.reconstruction_loss(x, prediction, hidden), model.reconstruction_loss(x, changed, hidden))
        assert same == (weight == 0)


def test_visible_weight_is_a_weight_on_means():
    model, x = small(visible_weight=0.1, norm_pix=False), torch.randn(2, 3, 8, 16)
    hidden = torch.tensor([[True] * 6 + [False] * 2] * 2)
    error = patchify(x, 4).square().mean(-1)
    expected = error[hidden].mean() + 0.1 * error[~hidden].mean()
    torch.testing.assert_close(model.reconstruction_loss(x, torch.zeros(2, 8, 48), hidden), expected)


def test_patches_are_put_back_where_they_were_also_on_oblong_images():
    x = torch.randn(2, 5, 8, 12)
    patches = patchify(x, 4)
    assert torch.equal(unpatchify(patches, 4, (2, 3)), x)
    assert torch.equal(patches[0, 4].view(4, 4, 5), x[0, :, 4:8, 4:8].permute(1, 2, 0))  # second row, second column


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures_show_what_was_predicted_beside_what_was_to_be(norm_pix):
    model, x, noise = small(), torch.rand(2, 3, 8, 16), torch.rand(2, 8)
    model.norm_pix = norm_pix
    mean, std = mae.patch_statistics(patchify(x, 4)) if norm_pix else (0, 1)
    model.predict = lambda z, restore: (patchify(x, 4) - mean) / std  # a perfect prediction
    prediction, target, hidden = model.reconstruct(x, noise)
    torch.testing.assert_close(prediction, target)
    torch.testing.assert_close(patchify(target, 4) * std + mean, patchify(x, 4))
    assert hidden.mean() == 0.5


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_picture_of_an_untrained_network_tells_nothing_of_hidden_patches(norm_pix):
    """Neither do the colours of hidden patches reach it, nor is the picture like the image."""
    model, x, noise = small(norm_pix=norm_pix), torch.rand(64, 3, 8, 16), torch.rand(64, 8)
    prediction, _, hidden = model.reconstruct(x, noise)
    other, _, _ = model.reconstruct(torch.where(hidden > 0, 1 - x, x), noise)
    assert torch.equal(prediction, other)
    pairs = torch.stack([(some - some.mean())[hidden.expand_as(x) > 0] for some in (prediction, x)])
    assert abs(torch.corrcoef(pairs)[0, 1]) < 0.05


def test_every_parameter_learns():
    model = small()
    model(torch.randn(2, 3, 8, 16))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not model.encoder.pos_embed.requires_grad


@pytest.mark.parametrize("ratio", [0.0, 1.0, -1.0, 1.5])
def test_a_mask_ratio_that_hides_nothing_or_all_is_refused(ratio):
    with pytest.raises(InputError, match="mask ratio"):
        MaskedAutoencoder(ViT(image_size=8, patch_size=4, width=16, depth=1, heads=2), (12, 1, 2), ratio)


# ---- D-MAE

@pytest.mark.parametrize("name", ["dmae_tiny", "d2mae_tiny"])
def test_dmae_three_optimizer_steps(name):
    golden = GOLDEN[name]
    model, teacher, layers = build_dmae(golden)
    x, noise = images(golden["input"]["images"]), mask_noise(golden["input"]["mask_noise"])
    with torch.no_grad():
        scores, _ = attention_scores(teacher, x, random_masking(noise, model.kept)[0], layers)
    optimizer = torch.optim.AdamW(param_groups(model, 0.05), 1e-3, betas=(0.9, 0.95))
    for expected in golden["train_3_steps"]["losses"]:
        losses = model(x, noise, scores)
        assert losses["loss"].item() == pytest.approx(expected["total"], rel=1e-8)
        assert losses["attention"].item() == pytest.approx(expected["attn"], rel=1e-8)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("key, change", [
    ("softmax before the adapter", lambda adapter, s, t: F.mse_loss(adapter(s.softmax(-1)), t.softmax(-1))),
    ("softmax after the adapter", lambda adapter, s, t: F.mse_loss(adapter(s).softmax(-1), t.softmax(-1))),
    ("class token left out", lambda adapter, s, t: F.mse_loss(adapter(s)[..., 1:, 1:], t[..., 1:, 1:])),
])
@pytest.mark.parametrize("name, layer", [("dmae_tiny", "attn layer 2 (student 2)"), ("d2mae_tiny", "attn layer 3 (student 4)")])
def test_dmae_mistakes_give_the_values_that_the_reference_lists_for_them(name, layer, key, change):
    golden = GOLDEN[name]
    model, teacher, layers = build_dmae(golden)
    x, noise = images(golden["input"]["images"]), mask_noise(golden["input"]["mask_noise"])
    keep, _ = random_masking(noise, model.kept)
    with torch.no_grad():
        theirs, ours = attention_scores(teacher, x, keep, layers)[0][0], model.observe(x, keep)[0][0]
        wrong = change(model.adapters[0], ours, theirs).item()
    listed = golden["expected"]["samples"][layer][f"NOT_THE_LOSS if {key}"]
    assert wrong == pytest.approx(listed, rel=1e-8)
    assert abs(wrong / golden["expected"]["loss_attn"] - 1) > 1e-3


def test_a_student_equal_to_its_teacher_has_no_attention_loss_under_an_identity_adapter():
    torch.manual_seed(0)
    model = DistilledMAE(ViT(image_size=8, patch_size=4, width=16, depth=2, heads=2), (12, 1, 2), 0.5, teacher_heads=[2], layers=[2])
    with torch.no_grad():
        model.adapters[0].weight.copy_(torch.eye(2)[:, :, None, None])
    x, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 4)
    keep, _ = random_masking(noise, model.kept)
    scores, _ = attention_scores(model.encoder, x, keep, [2])
    assert model(x, noise, scores)["attention"] == 0
    turned, _ = attention_scores(model.encoder, x, keep.flip(1), [2])  # the same patches in another order
    assert model(x, noise, turned)["attention"] > 0


def test_several_layers_are_summed_and_the_teacher_stops_at_the_last():
    torch.manual_seed(0)
    teacher = ViT(image_size=8, patch_size=4, width=24, depth=3, heads=3)
    model = DistilledMAE(ViT(image_size=8, patch_size=4, width=16, depth=3, heads=2), (12, 1, 2), 0.5, teacher_heads=[3, 3], layers=[1, 2])
    called = []
    for i, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    x, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 4)
    scores, _ = attention_scores(teacher, x, random_masking(noise, model.kept)[0], [1, 2])
    assert called == [0]  # block 2 gives its queries and keys only
    each = [F.mse_loss(adapter(s), t) for adapter, s, t in zip(
        model.adapters, attention_scores(model.encoder, x, random_masking(noise, model.kept)[0], [1, 2])[0], scores, strict=True)]
    torch.testing.assert_close(model(x, noise, scores)["attention"], sum(each))


@pytest.mark.parametrize("mistake", ["decoder reads the last block", "norm left out", "last block's own scores"])
def test_a_mistake_in_d2mae_misses_the_reference(mistake, monkeypatch):
    true = mae.DecoupledMAE.observe

    def wrong(self, images, keep):
        scores, z = true(self, images, keep)
        if mistake == "decoder reads the last block":
            z = self.encoder.encode(images, keep)
        elif mistake == "norm left out":
            z = self.encoder.through(self.encoder.embed(images, keep), last=self.decode_from)
        else:
            scores, _ = attention_scores(self.encoder, images, keep, self.layers)
        return scores, z
    monkeypatch.setattr(mae.DecoupledMAE, "observe", wrong)
    assert worst_deviation(GOLDEN["d2mae_tiny"]) > 1e-5
    monkeypatch.undo()
    assert worst_deviation(GOLDEN["d2mae_tiny"]) < 1e-6


def test_in_d2mae_the_upper_blocks_learn_from_the_teacher_alone():
    torch.manual_seed(0)
    model = mae.DecoupledMAE(ViT(image_size=8, patch_size=4, width=16, depth=3, heads=2), (12, 1, 2), 0.5,
                             teacher_heads=[2], layers=[3], decode_from=2)
    x, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 4)
    losses = model(x, noise, [torch.randn(2, 2, 3, 3)])
    losses["reconstruction"].backward(retain_graph=True)
    learned = {name for name, p in model.named_parameters() if p.grad is not None}
    assert not any(name.startswith(("encoder.blocks.2.", "extra.", "adapters.")) for name in learned)
    losses["attention"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("flags", ["--decode-from 2", "--teacher T --decode-from 4", "--teacher T --decode-from 2 --distill-layers 1"])
def test_d2mae_flags_that_do_not_fit_are_refused(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = ViT(image_size=32, patch_size=4, width=16, depth=4, heads=2)
    torch.save(dict(model=teacher.state_dict(), config=dict(teacher.config, mean=[0.5] * 3, std=[0.5] * 3)), "t.pth")
    with pytest.raises(InputError, match="decode.from"):
        mae.main([*flags.replace("T", "t.pth").split(), "--device", "cpu"])
