import copy
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_random import tiny_llava, tiny_processor

from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import answer_opening
from ras_fast.loading import load
from ras_fast.profile import JSON_NAME, TENSORS_NAME, RasProfile

CONFIG = {"gamma": 0.3, "steps": 3, "s_base": 0.5, "k": 9.0}


@pytest.fixture
def profile(model, processor):
    torch.manual_seed(0)
    return RasProfile("moras", dict(CONFIG), {"prototypes": torch.randn(3, 32)}, fingerprint(model, processor))


def test_round_trip(profile, model, processor, tmp_path):
    profile.save_pretrained(tmp_path / "new" / "folder")
    loaded = RasProfile.from_pretrained(tmp_path / "new" / "folder")
    assert (loaded.method, loaded.config, loaded.fingerprint) == (profile.method, profile.config, profile.fingerprint)
    assert torch.equal(loaded.tensors["prototypes"], profile.tensors["prototypes"])
    loaded.check(model, processor)
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [JSON_NAME, TENSORS_NAME]


def test_another_model_is_refused_with_what_differs(profile, processor):
    with pytest.raises(ValueError, match="lm_head") as error:
        profile.check(tiny_llava(processor, seed=1), processor)
    assert "hidden_size" not in str(error.value)
    with pytest.raises(ValueError, match="num_hidden_layers: profile 2, model 3"):
        profile.check(tiny_llava(processor, layers=3), processor)
    with pytest.raises(ValueError, match=r"\(dtype: profile 'float32', model 'bfloat16'\); load the model in the profile's"):
        profile.check(tiny_llava(processor, dtype=torch.bfloat16), processor)


def test_the_fingerprint_of_a_model_stays_the_same():
    """Or profiles of earlier releases would be refused."""
    assert fingerprint(*load("tiny", device="cpu")) == {
        "architecture": "LlavaForConditionalGeneration",
        "hidden_size": 160,
        "num_hidden_layers": 4,
        "vocab_size": 161,
        "dtype": "bfloat16",
        "lm_head": "b56dbf6764b89c4e",
        "adapters": None,
        "tokenizer": "5ac1d6784e683f5d",
        "decoder": "a6e8a1ad51ac5e69",
        "other_parts": "e99aec6a75a95b4c",
    }


ONE_VALUE = {  # of a parameter, and the part of the fingerprint that it changes
    "lm_head, first": (lambda model: model.lm_head.weight[0, :1], "lm_head"),
    "lm_head, last": (lambda model: model.lm_head.weight[63, -1:], "lm_head"),
    "decoder, first": (lambda model: model.model.language_model.layers[0].self_attn.q_proj.weight[0, :1], "decoder"),
    "decoder, inside": (lambda model: model.model.language_model.layers[1].mlp.up_proj.weight[0, 5:6], "decoder"),
    "decoder, a norm": (lambda model: model.model.language_model.layers[-1].input_layernorm.weight[-1:], "decoder"),
    "others, inside": (lambda model: model.model.multi_modal_projector.linear_1.weight[-1, 5:6], "other_parts"),
    "others, last": (lambda model: model.model.multi_modal_projector.linear_2.bias[-1:], "other_parts"),
}


@pytest.mark.parametrize("place", ONE_VALUE)
def test_a_fingerprint_is_of_all_that_it_looks_at(model, processor, place):
    other, (find, part) = copy.deepcopy(model), ONE_VALUE[place]
    with torch.no_grad():
        find(other).add_(1)
    before, after = fingerprint(model, processor), fingerprint(other, processor)
    assert {name for name in before if before[name] != after[name]} == {part}


def test_a_profile_is_shown_in_one_line(profile):
    shown = repr(profile)
    assert shown.startswith("RasProfile('moras', {")
    assert "prototypes [3, 32]" in shown
    assert "\n" not in shown
    assert "tensor" not in shown


def test_quantised_weights_that_cannot_be_indexed(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantised = copy.deepcopy(model)
    quantization.quantize_(quantised.model.language_model, quantization.IntxWeightOnlyConfig())
    found = fingerprint(quantised)
    assert found == fingerprint(copy.deepcopy(quantised))
    assert found["decoder"] != fingerprint(model)["decoder"]


def test_which_adapters_act_is_part_of_the_fingerprint(model, processor, profile):
    """Their weights alone do not say so. The text model is not all that may have some."""
    peft = pytest.importorskip("peft")
    assert fingerprint(model)["adapters"] is None
    config = peft.LoraConfig(r=4, target_modules=".*vision_tower.*(q|v)_proj", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name="one")
    wrapped.add_adapter("two", peft.LoraConfig(r=16, target_modules=".*vision_tower.*q_proj", init_lora_weights=False))
    found = [fingerprint(wrapped)["adapters"]]
    wrapped.set_adapter("two")
    found.append(fingerprint(wrapped)["adapters"])
    wrapped.base_model.set_adapter(["one", "two"])
    found.append(fingerprint(wrapped)["adapters"])
    wrapped.merge_adapter(["one"])
    found.append(fingerprint(wrapped)["adapters"])
    wrapped.unmerge_adapter()
    wrapped.base_model.disable_adapter_layers()
    found.append(fingerprint(wrapped)["adapters"])
    assert len(set(found)) == 5
    assert found[0] == "one × 2.0"
    with pytest.raises(ValueError, match="adapters: profile None, model 'off'"):
        profile.check(wrapped, processor)
    with_adapter = RasProfile("moras", CONFIG, profile.tensors, profile.fingerprint | {"adapters": "one × 2.0"})
    with pytest.raises(ValueError, match=r"another model \(adapters: profile 'one × 2.0', model None\)"):
        with_adapter.check(model, processor)
    old = {name: value for name, value in profile.fingerprint.items() if name != "adapters"}  # from before this was noted
    RasProfile("moras", CONFIG, profile.tensors, old).check(model, processor)


CHANGES = {
    "final norm": lambda model: model.model.language_model.norm.weight.mul_(3),
    "projector": lambda model: model.model.multi_modal_projector.linear_1.weight.normal_(),
    "vision tower": lambda model: model.model.vision_tower.encoder.layers[1].mlp.fc1.weight.normal_(),
    "embeddings": lambda model: model.get_input_embeddings().weight.normal_(),
    "rest of the head": lambda model: model.lm_head.weight[64:].normal_(),
}


@pytest.mark.parametrize("part", CHANGES)
def test_a_model_with_another_part_is_refused(profile, model, processor, part):
    other = copy.deepcopy(model)
    with torch.no_grad():
        CHANGES[part](other)
    with pytest.raises(ValueError, match=r"another model \(other_parts: "):
        profile.check(other, processor)
    del profile.fingerprint["other_parts"]  # as in a profile of an earlier release
    profile.check(other, processor)


def test_a_digest_is_of_what_a_profile_is_now(profile):
    def digests():
        return profile.digest(), profile.digest(torch.zeros(2))

    found = [*digests()]
    profile.tensors["prototypes"][1, 2] += 1
    found += digests()
    profile.tensors["prototypes"] = -profile.tensors["prototypes"]
    found += digests()
    profile.config["k"] = 8.0
    found += digests()
    assert len(set(found)) == 8
    again = RasProfile(profile.method, dict(profile.config), {n: t.clone() for n, t in profile.tensors.items()})
    assert again.digest() == profile.digest()
    with torch.inference_mode():
        unversioned = RasProfile(profile.method, profile.config, {n: t.clone() for n, t in profile.tensors.items()})
        assert unversioned.digest() == profile.digest()
        unversioned.tensors["prototypes"] += 1
        assert unversioned.digest() != profile.digest()


def test_profiles_of_any_float_type_have_a_digest():
    digests = {RasProfile("moras", {}, {"prototypes": torch.ones(1, 2, dtype=dtype)}).digest()
               for dtype in (torch.float32, torch.bfloat16)}  # fmt: skip
    assert len(digests) == 2


def test_another_tokenizer_or_template_is_refused(profile, model):
    other = tiny_processor()
    other.tokenizer.add_tokens(["new"])
    with pytest.raises(ValueError, match="tokenizer"):
        profile.check(model, other)
    with pytest.raises(ValueError, match="tokenizer"):
        profile.check(model, tiny_processor(chat_template="{{ messages }}"))


def test_a_variable_set_in_the_template_reaches_every_prompt_and_the_fingerprint(model):
    opens = "{{ 'off' if enable_thinking is defined and not enable_thinking else 'on' }}"
    thinks = "{% if add_generation_prompt %}" + opens + "{% endif %}"
    plain, quiet = (tiny_processor(chat_template=start + thinks) for start in ("", "{% set enable_thinking = false %}"))
    assert [answer_opening(processor) for processor in (plain, quiet)] == ["on", "off"]
    profile = RasProfile("moras", {}, {"prototypes": torch.ones(1, 32)}, fingerprint(model, quiet))
    profile.check(model, quiet)
    with pytest.raises(ValueError, match="tokenizer"):
        profile.check(model, plain)


@pytest.mark.parametrize("name", [JSON_NAME, TENSORS_NAME])
def test_missing_file(profile, tmp_path, name):
    profile.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        RasProfile.from_pretrained(tmp_path)


def test_neither_directory_nor_hub_id(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a local directory nor"):
        RasProfile.from_pretrained(tmp_path / "not" / "here")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "{}", '{"method": "moras"}', "[" * 100_000], ids=lambda text: text[:20])
def test_corrupt_header(profile, tmp_path, text):
    profile.save_pretrained(tmp_path)
    (tmp_path / JSON_NAME).write_text(text)
    with pytest.raises(ValueError, match="not a profile header"):
        RasProfile.from_pretrained(tmp_path)


def test_a_header_that_an_editor_has_saved(profile, tmp_path):
    """With a byte order mark, as some do."""
    profile.save_pretrained(tmp_path)
    header = tmp_path / JSON_NAME
    header.write_text(header.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert RasProfile.from_pretrained(tmp_path).digest() == profile.digest()


def test_newer_format(profile, tmp_path):
    profile.save_pretrained(tmp_path)
    header = json.loads((tmp_path / JSON_NAME).read_text()) | {"format_version": 99}
    (tmp_path / JSON_NAME).write_text(json.dumps(header))
    with pytest.raises(ValueError, match="format version 99"):
        RasProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x80\x04\x95pickle"])
def test_corrupt_tensors(profile, tmp_path, content):
    profile.save_pretrained(tmp_path)
    (tmp_path / TENSORS_NAME).write_bytes(content)
    with pytest.raises(ValueError, match="not a safetensors file"):
        RasProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(profile, tmp_path, value):
    broken = profile.tensors["prototypes"].clone()
    broken[1, 2] = value
    with pytest.raises(ValueError, match="'prototypes' holds NaN or infinite"):
        RasProfile("moras", CONFIG, {"prototypes": broken})
    profile.save_pretrained(tmp_path)
    save_file({"prototypes": broken}, tmp_path / TENSORS_NAME)
    with pytest.raises(ValueError, match="'prototypes' holds NaN or infinite"):
        RasProfile.from_pretrained(tmp_path)
    profile.config["k"] = value
    with pytest.raises(ValueError, match="JSON"):
        profile.save_pretrained(tmp_path)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_crash_while_a_profile_is_replaced_leaves_no_mixture(profile, tmp_path, monkeypatch, writes):
    """Whatever file is the first not to arrive."""
    profile.save_pretrained(tmp_path)
    new = RasProfile("moras", CONFIG | {"s_base": 0.1}, {"prototypes": torch.ones(3, 32)}, profile.fingerprint)
    done, replace = [], os.replace

    def crash(source, target):
        if len(done) == writes:
            raise OSError("no space left")
        done.append(replace(source, target))

    with monkeypatch.context() as patched:
        patched.setattr("os.replace", crash)
        if writes < 2:
            with pytest.raises(OSError, match="no space"):
                new.save_pretrained(tmp_path)
        else:
            new.save_pretrained(tmp_path)
    if writes == 1:
        with pytest.raises(ValueError, match="is not the one that"):
            RasProfile.from_pretrained(tmp_path)
        return
    loaded, expected = RasProfile.from_pretrained(tmp_path), profile if writes == 0 else new
    assert loaded.config == expected.config
    assert torch.equal(loaded.tensors["prototypes"], expected.tensors["prototypes"])


def test_a_profile_without_a_digest_is_refused(profile, tmp_path):
    profile.save_pretrained(tmp_path)
    header = json.loads((tmp_path / JSON_NAME).read_text())
    assert len(header.pop("tensors")) == 64
    (tmp_path / JSON_NAME).write_text(json.dumps(header))
    with pytest.raises(ValueError, match="is not the one that"):
        RasProfile.from_pretrained(tmp_path)


def test_tensors_may_share_memory(profile, tmp_path):
    shared = torch.randn(6, 32)
    RasProfile("moras", CONFIG, {"prototypes": shared[:3], "more": shared[:3]}).save_pretrained(tmp_path)
    assert torch.equal(RasProfile.from_pretrained(tmp_path).tensors["more"], shared[:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": []}, r"profile config is \[\]; it needs to be a dict"),
        ({"config": None}, "profile config is None"),
        ({"fingerprint": None}, "profile fingerprint is None"),
        ({"fingerprint": ["a"]}, "profile fingerprint is"),
        ({"method": ["moras"]}, r"method is \['moras'\]"),
    ],
)
def test_a_header_of_other_types(profile, tmp_path, change, message):
    profile.save_pretrained(tmp_path)
    header = json.loads((tmp_path / JSON_NAME).read_text()) | change
    (tmp_path / JSON_NAME).write_text(json.dumps(header))
    with pytest.raises(ValueError, match=message):
        RasProfile.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("prototypes", "got"),
    [
        (torch.ones(3, 32, dtype=torch.int64), "torch.int64"),
        (torch.ones(3, 32, dtype=torch.complex64), "torch.complex64"),
        (torch.ones(3, 32).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (np.ones((3, 32)), "ndarray"),
        ([1.0], "list"),
    ],
    ids=["integers", "complex", "fp8", "numpy", "list"],
)
def test_tensors_that_are_not_floating(prototypes, got):
    with pytest.raises(ValueError, match=f"'prototypes' is {got}; it needs to be a floating tensor"):
        RasProfile("moras", CONFIG, {"prototypes": prototypes})


def test_unknown_method_and_missing_tensor():
    with pytest.raises(ValueError, match="'voodoo'"):
        RasProfile("voodoo", {}, {})
    with pytest.raises(ValueError, match="lacks the tensors"):
        RasProfile("ras", {}, {})


def test_the_head_may_be_that_of_a_model_inside(monkeypatch, model, processor):
    """As Nemotron-H Omni's, which has none itself."""
    expected = fingerprint(model)
    inner, head = model.model, model.lm_head
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: None)
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration, which has no head that makes logits"):
        fingerprint(model)
    monkeypatch.setattr(type(inner), "get_output_embeddings", lambda self: head)
    assert fingerprint(model) == expected


def test_what_is_no_path_is_named():
    with pytest.raises(ValueError, match="directory_or_hub_id is None; it needs to be a path or a hub id"):
        RasProfile.from_pretrained(None)
