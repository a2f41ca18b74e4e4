"""Every family by its real class: the same answers, the attention on each image, nothing left behind."""

import pytest
import torch
from families import FAMILIES
from tiny_models import image_sums, relative_error, valid_rows

import ras_fast

ROWS = ["ttItttt", "tItt", "tttt", "tIttItt"]  # one, one, no and two images, all of different lengths


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param], FAMILIES[request.param].model(request.param)


def rows_of(description):
    return ROWS if description.pixels else [row.replace("I", "t") for row in ROWS]


def test_family(family):
    description, model = family
    batch = description.inputs(model, rows_of(description))
    regions, valid = batch.pop("regions"), valid_rows(batch)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = model(**batch, output_hidden_states=True)
        tokens = model.generate(**batch, max_new_tokens=6, do_sample=False)
        text = "text_config" if "text_config" in model.config.sub_configs else ""
        before = model.config.get_text_config()._attn_implementation
        model.set_attn_implementation({text: "eager"})
        eager = model(**batch, output_attentions=True)
        model.set_attn_implementation({text: before})
        patched = ras_fast.patch(model)
        report = patched.report()
        got = model(**batch, output_hidden_states=True)
        assert relative_error(got.logits[valid], expected.logits[valid]) < 1e-5
        for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert relative_error(a[valid], b[valid]) < 1e-5
        assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False), tokens)
        assert (report.fused_layers, report.fused_norms) == description.fused, report
        assert list(model.state_dict()) == keys
        if description.pixels:
            attentions = model(**batch, output_attentions=True).attentions
            assert torch.equal(patched.region_map.ids, regions)
            assert patched.region_map.num_regions == 2
            for mass, probabilities in zip(attentions, eager.attentions, strict=True):
                sums = image_sums(probabilities, regions, 2)
                assert (mass - sums).transpose(1, 2)[valid].abs().max() < 1e-5
        patched.unpatch()
        assert torch.equal(model(**batch).logits, expected.logits)
        assert not any("forward" in module.__dict__ for module in model.modules())


# Chameleon makes discrete tokens of an image, and rounding flips them.
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "chameleon"])
def test_bfloat16_is_as_accurate_as_the_original(name):
    """Error against the float32 model at most twice the unpatched bfloat16 model's."""
    description = FAMILIES[name]
    exact, model = description.model(name), description.model(name, torch.bfloat16)
    exact.load_state_dict(model.state_dict())
    batch = description.inputs(model, rows_of(description), dtype=torch.bfloat16)
    valid = valid_rows(batch)
    batch.pop("regions")
    with torch.no_grad():
        truth = exact(**{k: v.float() if v.is_floating_point() else v for k, v in batch.items()}).logits[valid]
        before = model(**batch).logits[valid].float()
        with ras_fast.patch(model) as patched:
            after = model(**batch).logits[valid].float()
    assert patched.report().fused_norms == description.fused[1]
    assert (after - truth).norm() <= 2 * (before - truth).norm()
    assert (after - truth).abs().max() <= 2 * (before - truth).abs().max() + 1e-2
