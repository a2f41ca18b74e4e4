"""Projection steering, against forward hooks on the unpatched model."""

import copy
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from tiny_random import endless_llava, mixed_batch, random_image, random_words, skip_mixed_beams, tiny_llava
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import normalize

import ras_fast
from ras_fast.inputs import encode, make_queries
from ras_fast.methods import projection
from ras_fast.methods.projection import Condition, Projection, calibrate, from_vectors, read_vectors
from ras_fast.profile import RasProfile

D, LAYERS = 32, 4
VECTORS = {layer: torch.randn(D, generator=torch.Generator().manual_seed(layer)) for layer in (2, 3)}
DIRECTION = torch.randn(D, generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def model(processor):
    return endless_llava(processor, LAYERS)


@pytest.fixture(scope="module")
def batch(processor):
    return mixed_batch(processor)


@contextmanager
def hooked(model, alpha, vectors=VECTORS, gate=None):
    """The unpatched model with α v added to its layers' outputs. gate: (layer, function of its output -> gate [B, L])."""
    gates, handles = {}, []

    def read(module, args, output):
        gates["now"] = gate[1](output)

    def add(vector):
        def hook(module, args, output):
            strength = alpha.repeat_interleave(output.shape[0] // len(alpha))[:, None]
            strength = strength * gates["now"] if gate else strength.expand(-1, output.shape[1])
            return output + strength[..., None] * vector

        return hook

    layers = model.model.language_model.layers
    if gate:
        handles.append(layers[gate[0]].register_forward_hook(read))
    handles += [layers[layer].register_forward_hook(add(vector)) for layer, vector in vectors.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def once(condition):
    """A gate of a whole answer, decided by the prompt's last token."""
    decided = {}

    def gate(output):
        if output.shape[1] == 1:
            return decided["now"][:, None].float()
        decided["now"] = held(condition, output[:, -1])
        last = torch.zeros(output.shape[:2])
        last[:, -1] = decided["now"]
        return last

    return condition.layer, gate


def each(condition):
    return condition.layer, lambda output: held(condition, output).float()


def held(condition, hidden):
    measured = hidden @ normalize(condition.direction, dim=0)
    if condition.measure == "cosine":
        measured = measured / hidden.norm(dim=-1)
    return measured > condition.threshold if condition.above else measured < condition.threshold


def conditions(model, batch, **options):
    """A condition that holds for some of the batch's rows, and which these are."""
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[2][:, -1]
    measured = hidden @ normalize(DIRECTION, dim=0)
    if options.get("measure", "cosine") == "cosine":
        measured = measured / hidden.norm(dim=-1)
    threshold = measured.sort().values[:2].mean().item()
    condition = Condition(1, DIRECTION, threshold, **options)
    return condition, held(condition, hidden)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "several answers": {"num_beams": 3, "num_return_sequences": 2},
}


def generate(model, batch, **options):
    return model.generate(**batch, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("mode", MODES)
def test_constant(model, processor, batch, mode):
    profile = from_vectors(model, processor, VECTORS, alpha=3.0)
    with hooked(model, torch.tensor([3.0])):
        expected = generate(model, batch, **MODES[mode])
        logits = model(**batch).logits.detach()
    with torch.no_grad(), ras_fast.patch(model) as patch:
        plain = generate(model, batch, **MODES[mode])
        with ras_fast.methods.attach(patch, profile) as method:
            got = generate(model, batch, **MODES[mode])
            assert method.risk.tolist() == [1.0] * (3 * MODES[mode].get("num_beams", 1))
            assert not method.failed.any()
            found = model(**batch).logits
        assert torch.equal(generate(model, batch, **MODES[mode]), plain)
    valid = batch["attention_mask"].bool()
    assert (found - logits)[valid].abs().max() < 1e-4 * logits.abs().max()
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)


def test_a_sequence_that_is_not_steered_is_at_no_risk(model, processor, batch):
    condition = Condition(1, DIRECTION, -1e9, measure="projection")
    for profile in (from_vectors(model, processor, VECTORS, condition=at) for at in (None, condition)):
        with torch.no_grad(), ras_fast.patch(model) as patch:
            with Projection(profile).attach(patch, alpha=torch.tensor([0.0, 5.0, -5.0])) as method:
                model(**batch)
            assert method.risk.tolist() == [0.0, 1.0, 1.0]
            assert not method.failed.any()


@pytest.mark.parametrize("mode", MODES)
def test_a_strength_for_each_sequence(model, processor, batch, mode):
    skip_mixed_beams(MODES[mode])
    alpha = torch.tensor([-2.0, 0.0, 4.0])
    method = Projection(from_vectors(model, processor, VECTORS))
    with hooked(model, alpha):
        expected = generate(model, batch, **MODES[mode])
    with ras_fast.patch(model) as patch:
        plain = generate(model, batch, **MODES[mode])
        with method.attach(patch, alpha=alpha):
            got = generate(model, batch, **MODES[mode])
    assert torch.equal(got, expected)
    answers = MODES[mode].get("num_return_sequences", 1)
    changed = (got != plain).any(1).view(3, answers)
    assert changed.any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("condition", [None, Condition(1, DIRECTION, -0.99, per="token")], ids=["always", "token"])
def test_a_strength_stays_with_its_sequence_when_rows_are_chosen(model, processor, condition):
    """Between two turns; the second turn does not deal them out anew."""
    first, second = (torch.arange(a, b).expand(2, -1) for a, b in ((20, 26), (40, 44)))
    profile, alpha = from_vectors(model, processor, VECTORS, condition=condition), torch.tensor([0.0, 5.0])
    with torch.no_grad(), ras_fast.patch(model) as patch, Projection(profile).attach(patch, alpha=alpha) as method:
        cache = model(input_ids=first, use_cache=True).past_key_values
        expected = model(input_ids=second, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_select_indices(torch.tensor([1, 0]))
        got = model(input_ids=second, past_key_values=cache).logits
        assert method.risk.tolist() == [1.0, 0.0]
    assert not torch.allclose(*expected, atol=1e-2)
    assert torch.equal(got, expected.flip(0))


def test_two_profiles_at_once(model, processor, batch):
    """Each with its own strength; a decode step finds that of its own."""
    first, second = ({layer: vector} for layer, vector in VECTORS.items())
    with hooked(model, torch.tensor([3.0]), first), hooked(model, torch.tensor([-2.0]), second):
        expected = generate(model, batch)
    profiles = from_vectors(model, processor, first, alpha=3.0), from_vectors(model, processor, second, alpha=-2.0)
    for outer, inner in (profiles, profiles[::-1]):
        with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, outer), ras_fast.methods.attach(patch, inner):
            assert torch.equal(generate(model, batch), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"measure": "projection"}, {"above": False}], ids=["cosine", "projection", "below"])
def test_condition_of_the_prompt(model, processor, batch, mode, options):
    skip_mixed_beams(MODES[mode])
    condition, rows = conditions(model, batch, **options)
    profile = from_vectors(model, processor, VECTORS, alpha=4.0, condition=condition)
    with hooked(model, torch.tensor([4.0]), gate=once(condition)):
        expected = generate(model, batch, **MODES[mode])
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
        got = generate(model, batch, **MODES[mode])
        wanted = rows.repeat_interleave(MODES[mode].get("num_beams", 1)).float()
        assert torch.equal(method.risk, wanted)
        assert not method.failed.any()
    assert torch.equal(got, expected)
    assert 0 < rows.sum() < 3


@pytest.mark.parametrize("mode", [*MODES, "no cache"])
def test_condition_of_each_token(model, processor, batch, mode):
    options = MODES.get(mode, {"use_cache": False})
    condition, _ = conditions(model, batch, per="token")
    profile = from_vectors(model, processor, VECTORS, alpha=4.0, condition=condition)
    with hooked(model, torch.tensor([4.0]), gate=each(condition)):
        expected = generate(model, batch, **options)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile):
        assert torch.equal(generate(model, batch, **options), expected)


@pytest.mark.parametrize("condition", [None, Condition(1, DIRECTION, -0.1, per="token")], ids=["constant", "each token"])
def test_assisted_decoding(model, processor, batch, condition):
    """Several tokens a step, some of them taken back: each one is steered as if it had come alone."""
    unpadded = batch["attention_mask"][1].bool()
    row = {name: batch[name][1:2, unpadded] for name in ("input_ids", "attention_mask")}
    profile = from_vectors(model, processor, VECTORS, alpha=3.0, condition=condition)
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile):
        expected = generate(model, row)
        assert torch.equal(generate(model, row, prompt_lookup_num_tokens=3), expected)
    assert not torch.equal(generate(model, row), expected)


def test_assisted_decoding_is_refused_where_the_prompt_is_judged(model, processor, batch):
    unpadded = batch["attention_mask"][1].bool()
    row = {name: batch[name][1:2, unpadded] for name in ("input_ids", "attention_mask")}
    profile = from_vectors(model, processor, VECTORS, condition=Condition(1, DIRECTION, 0.0))
    with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile):
        with pytest.raises(RuntimeError, match="assisted decoding"):
            generate(model, torch.utils._pytree.tree_map(lambda t: t.repeat(1, 2), row), prompt_lookup_num_tokens=3)
        generate(model, row)


def test_a_further_question_is_judged_anew(model, processor, batch):
    """It goes on from the cache of the first, which was left alone; a decode step in between changes nothing."""
    first = batch["input_ids"][1:2, batch["attention_mask"][1].bool()]
    answer, second = torch.tensor([[7]]), torch.tensor([[9, 30, 31]])
    whole = torch.cat([first, answer, second], 1)
    with torch.no_grad():
        plain = model(input_ids=whole, output_hidden_states=True)
        dots = plain.hidden_states[2][0] @ normalize(DIRECTION, dim=0)
        before, after = dots[first.shape[1] - 1].item(), dots[-1].item()
        condition = Condition(1, DIRECTION, (before + after) / 2, above=after > before, measure="projection")
        profile = from_vectors(model, processor, VECTORS, alpha=4.0, condition=condition)
        with ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
            cache = model(input_ids=first, use_cache=True).past_key_values
            assert method.risk.tolist() == [0.0]
            model(input_ids=answer, past_key_values=cache)
            assert method.risk.tolist() == [0.0]
            got = model(input_ids=second, past_key_values=cache).logits
            assert method.risk.tolist() == [1.0]
    assert torch.allclose(got[:, :-1], plain.logits[:, -3:-1], atol=1e-4)
    assert not torch.allclose(got[:, -1], plain.logits[:, -1], atol=1e-2)


def test_unsteered_rows_are_bit_identical(model, processor, batch):
    condition, rows = conditions(model, batch)
    profile = from_vectors(model, processor, VECTORS, alpha=4.0, condition=condition)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        plain = model(**batch).logits
        with ras_fast.methods.attach(patch, profile):
            steered = model(**batch).logits
    assert torch.equal(steered[~rows], plain[~rows])
    assert torch.equal(steered[:, :-1], plain[:, :-1])  # before the last token nothing is known yet
    assert (steered[rows, -1] != plain[rows, -1]).any(-1).all()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_condition_that_cannot_be_computed_steers(model, processor, batch, broken):
    condition, rows = conditions(model, batch)
    off = int((~rows).nonzero()[0])
    profile = from_vectors(model, processor, VECTORS, alpha=4.0, condition=condition)

    def breaks(module, args, output):
        output = output.clone()
        output[off, -1] = broken
        return output

    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile) as method:
        model(**batch)
        expected = method.risk.clone()
        handle = model.model.language_model.layers[0].register_forward_hook(breaks)
        model(**batch)
        handle.remove()
    expected[off] = 1
    assert torch.equal(method.risk, expected)
    assert method.failed.tolist() == [i == off for i in range(3)]


def test_a_cosine_whose_norm_overflows_steers(model, processor):
    condition = Condition(1, DIRECTION, 0.9)
    cosine, plain = (from_vectors(model, processor, VECTORS, condition=condition) for _ in range(2))
    plain.config["condition"]["measure"] = "projection"
    dots = torch.tensor([[3e19, torch.inf], [0.5, 1.0]])
    assert [found.tolist() for found in Projection(cosine).holds(dots)] == [[True, False], [True, False]]
    assert [found.tolist() for found in Projection(plain).holds(dots)] == [[True, False], [False, False]]


def test_an_error_inside_leaves_nothing_behind(model, processor, batch):
    profile = from_vectors(model, processor, VECTORS, condition=Condition(0, DIRECTION, 0.0))
    hooks = len(model.model.language_model._forward_pre_hooks)
    with torch.no_grad(), ras_fast.patch(model) as patch:
        before, inside = model(**batch).logits, len(model.model.language_model._forward_pre_hooks)
        with pytest.raises(KeyboardInterrupt), ras_fast.methods.attach(patch, profile):
            raise KeyboardInterrupt
        with ras_fast.methods.attach(patch, profile), pytest.raises(ValueError, match="is steered by something else"):
            ras_fast.methods.attach(patch, profile).__enter__()
        assert torch.equal(model(**batch).logits, before)
        assert len(model.model.language_model._forward_pre_hooks) == inside
    assert len(model.model.language_model._forward_pre_hooks) == hooks


@pytest.mark.slow
@pytest.mark.parametrize("condition", [None, Condition(1, DIRECTION, 0.0), Condition(1, DIRECTION, 0.0, per="token")])
def test_a_forward_is_one_graph(model, processor, batch, condition):
    """Nothing that is decided waits for the device: a host sync would break the graph."""
    profile = from_vectors(model, processor, VECTORS, alpha=3.0, condition=condition)
    torch._dynamo.reset()
    counter = CompileCounter()
    with torch.no_grad(), ras_fast.patch(model) as patch, ras_fast.methods.attach(patch, profile):
        expected = model(**batch, use_cache=False).logits
        got = torch.compile(model, fullgraph=True, backend=counter)(**batch, use_cache=False).logits
    assert counter.frame_count == 1
    assert torch.allclose(got, expected, atol=1e-4)


# Profiles and files


def test_a_profile_survives_its_file(model, processor, batch, tmp_path):
    condition = Condition(0, DIRECTION, 0.1, above=False, measure="projection", per="token")
    profile = from_vectors(model, processor, VECTORS, alpha=-1.5, condition=condition)
    profile.save_pretrained(tmp_path)
    loaded = RasProfile.from_pretrained(tmp_path)
    loaded.check(model, processor)
    method = Projection(loaded)
    assert (method.alpha, method.layers) == (-1.5, [2, 3])
    assert torch.equal(method.vectors, torch.stack([VECTORS[2], VECTORS[3]]))
    assert torch.equal(method.condition.direction, DIRECTION)
    assert method.condition.per == "token"
    assert not method.condition.above


def write_gguf(path, tensors, architecture="controlvector"):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_control_vector_files(model, processor, tmp_path, dtype):
    """As repeng writes them: one tensor a layer but the first; the index is that of the layer whose output is steered."""
    path = tmp_path / "happy.gguf"
    written = {layer: np.random.default_rng(layer).normal(size=D).astype(dtype) for layer in (1, 2, 3)}
    write_gguf(path, {f"direction.{layer}": vector for layer, vector in written.items()})
    read = read_vectors(path)
    assert sorted(read) == [1, 2, 3]
    for layer, vector in read.items():
        assert vector.dtype == torch.float32
        assert torch.equal(vector, torch.from_numpy(written[layer].astype(np.float32)))
    profile = from_vectors(model, processor, path, alpha=0.5, layers=[3, 1])
    assert profile.config["layers"] == [1, 3]
    assert torch.equal(profile.tensors["vectors"][1], read[3])


def test_safetensors_files(tmp_path):
    path = tmp_path / "v.safetensors"
    for names in (["2", "11"], ["direction.2", "direction.11"], ["model.layers.2", "model.layers.11"]):
        save_file({name: torch.full((D,), float(i)).half() for i, name in enumerate(names)}, path)
        read = read_vectors(path)
        assert {layer: vector[0].item() for layer, vector in read.items()} == {2: 0.0, 11: 1.0}
        assert read[2].dtype == torch.float32
    save_file({"refusal": torch.arange(D).float()}, path)
    assert torch.equal(read_vectors(path), torch.arange(D).float())


def test_one_vector_for_chosen_layers(model, processor, tmp_path):
    save_file({"v": DIRECTION}, tmp_path / "v.safetensors")
    profile = from_vectors(model, processor, tmp_path / "v.safetensors", layers=[1, 0])
    assert profile.config["layers"] == [0, 1]
    assert torch.equal(profile.tensors["vectors"], DIRECTION.expand(2, -1))


def test_files_that_cannot_be_used(tmp_path, monkeypatch):
    good = {"direction.1": np.ones(D, np.float32)}
    for name, tensors, architecture in (
        ("model", good, "llama"),
        ("empty", {"other": np.ones(D, np.float32)}, "controlvector"),
        ("matrix", {"direction.1": np.ones((2, D), np.float32)}, "controlvector"),
        ("word", {"direction.one": np.ones(D, np.float32), "direction.2": np.ones(D, np.float32)}, "controlvector"),
        ("nan", {"direction.1": np.full(D, np.nan, np.float32)}, "controlvector"),
        ("good", good, "controlvector"),
    ):
        write_gguf(tmp_path / f"{name}.gguf", tensors, architecture)
    whole = (tmp_path / "good.gguf").read_bytes()
    for i, length in enumerate((0, 3, 10, 60, len(whole) - 40)):
        (tmp_path / f"cut{i}.gguf").write_bytes(whole[:length])
    save_file({"a.1": torch.ones(D), "b.1": torch.ones(D)}, tmp_path / "twice.safetensors")
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 10)
    (tmp_path / "v.pt").write_bytes(b"")
    messages = {
        "model.gguf": "architecture 'llama'", "empty.gguf": "0 tensors", "matrix.gguf": r"needs to be a floating tensor \[d\]",
        "word.gguf": "'direction.one' does not end", "nan.gguf": "NaN", "twice.safetensors": "a layer of its own",
        "noise.safetensors": "not a safetensors file", "v.pt": "neither a .gguf nor", "none.gguf": "there is no file",
        **{f"cut{i}.gguf": "is not a GGUF file" for i in range(5)},
    }  # fmt: skip
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            read_vectors(tmp_path / name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'ras-fast\[gguf\]'"):
        read_vectors(tmp_path / "good.gguf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vectors": {}}, "vectors is empty"),
        ({"vectors": DIRECTION}, "layers needs to say where"),
        ({"vectors": {4: DIRECTION}}, r"vector of layer 4 is for layer 4; the model has layers 0\.\.3"),
        ({"vectors": {-1: DIRECTION}}, r"layers 0\.\.3"),
        ({"vectors": {1: DIRECTION[:-1]}}, "31 values; the model's hidden size is 32"),
        ({"vectors": {1: DIRECTION * torch.nan}}, "vector of layer 1 holds NaN"),
        ({"vectors": {1: [1.0]}}, "is list"),
        ({"vectors": VECTORS, "layers": [0, 2]}, r"layers \[0\] have no vector"),
        ({"vectors": DIRECTION, "layers": 2}, "layers is 2; it needs to be a list of at least one"),
        ({"vectors": {1: DIRECTION, "2": DIRECTION}}, "it needs to be a list of at least one"),
        ({"vectors": VECTORS, "alpha": float("inf")}, "alpha is inf; it needs to be finite"),
        ({"vectors": VECTORS, "condition": Condition(2, DIRECTION, 0.0)}, r"layers \[2\] are steered before it is known"),
        ({"vectors": VECTORS, "condition": Condition(-1, DIRECTION, 0.0)}, "condition's direction is for layer -1"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION, 0.0, measure="angle")}, "measure is 'angle'"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION, 0.0, per="answer")}, "per is 'answer'"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION, float("nan"))}, "'threshold' is nan"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION, 1 - 1e-12)}, "for a cosine it needs to be between -1 and 1"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION, -1.5, above=False)}, "the condition's threshold is -1.5"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION * 0, 0.0)}, "direction is 0"),
        ({"vectors": VECTORS, "condition": Condition(0, DIRECTION[1:], 0.0)}, "31 values"),
    ],
)
def test_vectors_that_do_not_fit(model, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        from_vectors(model, processor, **arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"alpha": "1"}, "'alpha' is '1'"),
        ({"layers": "2"}, "layers is '2'; it needs to be a list"),
        ({"layers": [2.0, 3]}, "layers is"),
        ({"layers": [True, 3]}, "layers is"),
        ({"layers": [2, 2]}, r"layers is \[2, 2\]; each needs to be there once"),
        ({"alpha": 1e-46}, "alpha is 1e-46; it needs to be another number, not 0 in float32"),
        ({"alpha": 1e300}, r"alpha is 1e\+300; it needs to be finite in float32"),
        ({"condition": {"layer": 1, "threshold": 0.0, "above": "no"}}, "the condition's above is 'no'"),
        ({"condition": {"layer": 1, "threshold": 0.0, "above": None}}, "the condition's above is None"),
        ({"condition": {"layer": True, "threshold": 0.0}}, "the condition's layer is True"),
        ({"condition": None}, "condition is None, and its direction there"),
        ({"condition": {"threshold": 0.0}}, "layer and threshold with them"),
        ({"condition": {"layer": 1, "threshold": None}}, "'threshold' is None"),
        ({"condition": {"layer": "1", "threshold": 0.0}}, "the condition's layer is '1'"),
        ({"condition": {"layer": 1, "threshold": 0.0, "foo": 1}}, "it needs the tensor 'condition' and settings among"),
    ],
)
def test_settings_of_other_types(model, processor, config, message):
    made = from_vectors(model, processor, VECTORS, condition=Condition(1, DIRECTION, 0.0))
    with pytest.raises(ValueError, match=message):
        Projection(RasProfile("projection", made.config | config, made.tensors))


def test_what_steers_nothing_is_refused(model, processor):
    """Its answers would have risk 1, and be the model's own."""
    with pytest.raises(ValueError, match="alpha is 0; it needs to be another number"):
        from_vectors(model, processor, VECTORS, alpha=0)
    with pytest.raises(ValueError, match="alpha is None; it needs to be a number"):
        from_vectors(model, processor, VECTORS, alpha=None)
    with pytest.raises(ValueError, match="vectors is a list; it needs to be a tensor"):
        from_vectors(model, processor, list(VECTORS.values()), layers=[1])
    with pytest.raises(ValueError, match=r"vectors of layers \[1, 2\] are 0; at least one"):
        from_vectors(model, processor, {1: torch.zeros(D), 2: torch.zeros(D)})
    made = from_vectors(model, processor, {1: torch.zeros(D), 2: torch.ones(D)}, alpha=-1)
    for vectors in (torch.zeros(2, D), torch.full((2, D), 1e-60, dtype=torch.float64)):  # which is 0 in float32
        with pytest.raises(ValueError, match=r"vectors of layers \[1, 2\] are 0"):
            Projection(RasProfile("projection", made.config, {"vectors": vectors}))


def test_a_condition_without_its_direction(model, processor):
    made = from_vectors(model, processor, VECTORS, condition=Condition(1, DIRECTION, 0.0))
    with pytest.raises(ValueError, match="its direction missing"):
        Projection(RasProfile("projection", made.config, {"vectors": made.tensors["vectors"]}))


def test_layers_that_are_skipped_without_an_image_are_refused():
    """Mllama's of cross-attention: the answer to a text alone would be the model's own, and count as steered."""
    model = FAMILIES["mllama"].model("mllama")
    text = model.config.get_text_config()
    profile = from_vectors(model, None, torch.randn(text.hidden_size), layers=[2, text.cross_attention_layers[0]])
    with ras_fast.patch(model) as patch, pytest.raises(ValueError, match=r"layers \[1\] attend to images alone"):
        Projection(profile).attach(patch).__enter__()


def test_models_that_do_not_fit(model, processor, batch):
    profile = from_vectors(model, processor, VECTORS)
    with ras_fast.patch(model, norms=False) as patch, pytest.raises(ValueError, match=r"must be one of \[\]"):
        Projection(profile).attach(patch).__enter__()
    other = tiny_llava(processor, layers=2)
    with ras_fast.patch(other) as patch, pytest.raises(ValueError, match=r"layers 0\.\.1"):
        Projection(profile).attach(patch).__enter__()
    with ras_fast.patch(model) as patch:
        unusable = torch.tensor([1.0, torch.nan]), torch.tensor([1e300], dtype=torch.float64), torch.tensor(1.0), torch.zeros(0)
        for alpha in (*unusable, [1.0], 1.0):
            with pytest.raises(ValueError, match=r"alpha is .* a tensor \[B\] of finite values"):
                Projection(profile).attach(patch, alpha=alpha).__enter__()
        with Projection(profile).attach(patch, alpha=torch.ones(2)), pytest.raises(ValueError, match="2 sequences; this"):
            generate(model, batch)
    with pytest.raises(ValueError, match="needs to be 'projection'"):
        Projection(RasProfile("moras", {}, {"prototypes": torch.zeros(3, D)}))
    with pytest.raises(ValueError, match=r"layers = 2, d"):
        Projection(RasProfile("projection", profile.config, {"vectors": torch.zeros(3, D)}))


# Calibration

PAIRS = [((random_words(i, 4), random_image(i)), (random_words(i + 40, 6), None)) for i in range(3)]


def last_states(model, processor, queries, layer):
    states = []
    for query in make_queries([q for q, _ in queries], [i for _, i in queries], processor):
        inputs, _ = encode(processor, query, "cpu", torch.float32)
        with torch.no_grad():
            # transformers gives the last layer's output after the final norm, so layers before it are compared
            states.append(model(**inputs, output_hidden_states=True).hidden_states[layer + 1][0, -1])
    return torch.stack(states)


def test_calibration_is_the_mean_difference(model, processor):
    with torch.device("meta"):  # whatever torch.set_default_device says
        profile = calibrate(model, processor, pairs=PAIRS, layers=[2, 1], alpha=2.0, progress=False)
    assert profile.config == {"alpha": 2.0, "layers": [1, 2], "condition": None}
    for row, layer in zip(profile.tensors["vectors"], (1, 2), strict=True):
        towards, away = (last_states(model, processor, side, layer) for side in zip(*PAIRS, strict=True))
        assert torch.allclose(row, (towards - away).mean(0), atol=1e-5)
    assert calibrate(model, processor, pairs=PAIRS, progress=False).config["layers"] == [LAYERS // 2]
    assert ras_fast.Patch.of(model) is None


@pytest.mark.parametrize("measure", projection.MEASURES)
def test_calibrated_condition_lies_between_the_means(model, processor, measure):
    options = {"condition_pairs": PAIRS, "measure": measure, "per": "token", "progress": False}
    condition = Projection(calibrate(model, processor, pairs=PAIRS, layers=[3], **options)).condition
    assert (condition.layer, condition.per, condition.above) == (2, "token", True)
    on, off = (last_states(model, processor, side, 2) for side in zip(*PAIRS, strict=True))
    assert torch.allclose(condition.direction, (on - off).mean(0), atol=1e-5)
    means = []
    for states in (on, off):
        projected = states @ normalize(condition.direction, dim=0)
        means.append((projected / states.norm(dim=-1) if measure == "cosine" else projected).mean().item())
    assert condition.threshold == pytest.approx(sum(means) / 2, abs=1e-4)
    assert means[1] < condition.threshold < means[0]


def test_a_condition_that_is_the_wrong_way_round_is_refused(model, processor, monkeypatch):
    """States that vary have a small cosine with the direction along which their mean is larger."""
    on, off = torch.zeros(2, 1, D), torch.zeros(2, 1, D)
    on[..., 0], off[..., 0], on[:, 0, 1] = 3, 1, torch.tensor([10.0, -10.0])
    monkeypatch.setattr(projection, "_last_states", lambda *arguments: (on, off))
    options = {"layers": [3], "condition_pairs": PAIRS, "progress": False}
    with pytest.raises(ValueError, match="by cosine at layer 2, holds for 0% of the first and 100% of the second"):
        calibrate(model, processor, pairs=PAIRS, **options)
    condition = Projection(calibrate(model, processor, pairs=PAIRS, **options, measure="projection")).condition
    assert condition.threshold == 2


def test_calibration_errors(model, processor):
    with pytest.raises(ValueError, match="pairs is empty"):
        calibrate(model, processor, pairs=[])
    with pytest.raises(ValueError, match=r"layers \[4\] are not there"):
        calibrate(model, processor, pairs=PAIRS, layers=[4], progress=False)
    broken = (("w1", np.full((8, 8, 3), np.nan)), ("w2", None))
    for arguments, message in (
        ({"pairs": [*PAIRS, broken]}, r"pairs\[3\] has an image with NaN"),
        ({"pairs": PAIRS, "condition_pairs": [broken]}, r"condition_pairs\[0\] has an image with NaN"),
        ({"pairs": [("w1", "w2")]}, r"pairs\[0\] is \('w1', 'w2'\); it needs to be \(\(prompt, images\)"),
        ({"pairs": PAIRS, "layers": []}, r"layers is \[\]; it needs to be a list of at least one"),
        ({"pairs": PAIRS, "layers": iter([1])}, "it needs to be a list of at least one"),
        ({"pairs": PAIRS, "layers": [1, 1]}, "each needs to be there once"),
        ({"pairs": PAIRS, "layers": 2}, "layers is 2; it needs to be a list of at least one"),
        ({"pairs": PAIRS, "layers": "12"}, "layers is '12'; it needs to be a list of at least one"),
        ({"pairs": PAIRS, "layers": [1.0]}, r"layers is \[1\.0\]; it needs to be a list of at least one"),
        ({"pairs": PAIRS, "condition_layer": 0.0}, r"condition_layer is 0\.0; it needs to be a decoder layer's index"),
        ({"pairs": PAIRS, "alpha": None}, "alpha is None; it needs to be a number"),
        ({"pairs": PAIRS, "measure": "angle"}, "measure is 'angle'"),
        ({"pairs": PAIRS, "alpha": 0}, "alpha is 0; it needs to be another number"),
        ({"pairs": [(PAIRS[0][0], PAIRS[0][0])], "layers": [1]}, r"vectors of layers \[1\] are 0"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(model, processor, **arguments, progress=False)


@pytest.mark.parametrize(
    ("layers", "condition_layer", "message"),
    [
        ([0], None, "layers starts at 0: a condition needs an earlier layer, not -1"),
        ([1], -1, "layers starts at 1: a condition needs an earlier layer, not -1"),
        ([1], 1, r"read at layer 1; layers \[1\] are steered before it is known"),
    ],
)
def test_a_conditions_layer_is_checked_before_any_pair_is_run(model, processor, monkeypatch, layers, condition_layer, message):
    monkeypatch.setattr("ras_fast.methods.projection._last_states", lambda *arguments: pytest.fail("a pair was run"))
    options = {"layers": layers, "condition_pairs": PAIRS, "condition_layer": condition_layer, "progress": False}
    with pytest.raises(ValueError, match=message):
        calibrate(model, processor, pairs=PAIRS, **options)
