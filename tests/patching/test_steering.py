"""Steering through the patched layers, against forward hooks on the unpatched model."""

import copy
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from tiny_models import inputs, llava, relative_error
from torch import Tensor

import ras_fast
from ras_fast.patching.steering import Steering

BATCH = inputs(["tItt", "ttI", "tIttt"])
SIZE = 48


@pytest.fixture
def model():
    return llava()


@pytest.fixture
def vectors():
    return torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))


def hooked(module, function):
    """The unpatched model's logits with `function` applied to a module's output."""
    return module.register_forward_hook(lambda _, args, output: function(output))


SLOT = torch.tensor([1, -1, 0])
ALPHA = torch.tensor([0.7, 0.9, 2.0])


def strength(vectors):
    """α·v for each row, 0 where the slot is −1."""
    return torch.where(SLOT[:, None] >= 0, ALPHA[:, None] * vectors[SLOT.clamp(min=0)], 0)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("rows", ["all", "last"])
def test_residual_stream(model, vectors, layer, rows):
    def steer(output):
        added = strength(vectors)[:, None]
        return output + added if rows == "all" else torch.cat([output[:, :-1], output[:, -1:] + added], 1)

    with torch.no_grad():
        handle = hooked(model.model.language_model.layers[layer], steer)
        expected = model(**BATCH, output_hidden_states=True)
        handle.remove()
        with ras_fast.patch(model) as patched:
            patched.set_steering(layer, vectors, rows=rows)
            patched.steering.set_rows(SLOT, ALPHA)
            got = model(**BATCH, output_hidden_states=True)
    valid = BATCH["attention_mask"].bool()
    assert relative_error(got.logits[valid], expected.logits[valid]) < 1e-5
    for a, b in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert relative_error(a[valid], b[valid]) < 1e-5


def test_final_lerp(model, vectors):
    """Only the last position of each sequence: y ← (1 − α) y + α v."""

    def steer(output):
        last = output[:, -1]
        alpha = torch.where(SLOT >= 0, ALPHA, 0)[:, None]
        steered = (1 - alpha) * last + alpha * vectors[SLOT.clamp(min=0)]
        return torch.cat([output[:, :-1], steered[:, None]], 1)

    with torch.no_grad():
        plain = model(**BATCH).logits
        handle = hooked(model.model.language_model.norm, steer)
        expected = model(**BATCH).logits
        handle.remove()
        with ras_fast.patch(model) as patched:
            unsteered = model(**BATCH).logits
            patched.set_steering("final", vectors)
            patched.steering.set_rows(SLOT, ALPHA)
            got = model(**BATCH).logits
            patched.clear_steering()
            cleared = model(**BATCH).logits
    valid = BATCH["attention_mask"].bool()
    assert relative_error(got[valid], expected[valid]) < 1e-5
    assert relative_error(got[:, -1], plain[:, -1]) > 1e-2
    assert torch.equal(got[1], unsteered[1])
    assert torch.equal(cleared, unsteered)


def test_both_at_the_last_layer(model, vectors):
    with torch.no_grad():
        text = model.model.language_model
        handles = [
            hooked(text.layers[2], lambda h: h + strength(vectors)[:, None]),
            hooked(text.norm, lambda y: torch.cat([y[:, :-1], (y[:, -1] * (1 - ALPHA[:, None] * (SLOT >= 0)[:, None])
                                                              + strength(vectors))[:, None]], 1)),
        ]  # fmt: skip
        expected = model(**BATCH).logits
        for handle in handles:
            handle.remove()
        with ras_fast.patch(model) as patched:
            patched.set_steering(2, vectors)
            patched.set_steering("final", vectors)
            patched.steering.set_rows(SLOT, ALPHA)
            got = model(**BATCH).logits
    valid = BATCH["attention_mask"].bool()
    assert relative_error(got[valid], expected[valid]) < 1e-5


def test_final_steering_survives_a_hook_that_replaces_the_hidden_state(model, vectors):
    """The fused norm is not handed over then, but what it would have steered still is."""
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_steering("final", vectors)
        patched.steering.set_rows(torch.zeros(3, dtype=torch.int32), torch.ones(3))
        model.model.language_model.layers[2].register_forward_hook(lambda _, args, output: output.clone())
        got = model(**BATCH).logits[:, -1]
        assert relative_error(got, model.lm_head(vectors[:1]).expand_as(got)) < 1e-5


def test_idle_rows_are_bit_identical(model):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        expected = model(**BATCH).logits
        for layer in (1, "final"):
            patched.set_steering(layer, torch.full((1, SIZE), torch.nan))
        for slot, alpha in ((-1, 1.0), (0, 0.0)):
            patched.steering.set_rows(torch.full((3,), slot), torch.full((3,), alpha))
            assert torch.equal(model(**BATCH).logits, expected)


def test_rows_are_written_in_place(model, vectors):
    with ras_fast.patch(model) as patched:
        patched.steering.set_rows(SLOT, ALPHA)
        slot, alpha = patched.steering.slot, patched.steering.alpha
        patched.steering.set_rows(SLOT.flip(0), ALPHA * 2)
        assert patched.steering.slot is slot
        assert patched.steering.alpha is alpha
        assert torch.equal(alpha, ALPHA * 2)


def test_rows_that_were_set_in_inference_mode(model, vectors):
    with ras_fast.patch(model) as patched:
        with torch.inference_mode():
            patched.steering.set_rows(SLOT.clone(), ALPHA.clone())
        patched.steering.set_rows(SLOT, 2 * ALPHA)
        assert torch.equal(patched.steering.alpha, 2 * ALPHA)


def test_rows_of_a_graph_leave_it(model, vectors):
    """Rows that were computed with gradients: steps do not add up to one graph, and the model can still be copied."""
    with ras_fast.patch(model) as patched:
        patched.set_steering(0, vectors)
        patched.steering.set_rows(SLOT, ALPHA.clone().requires_grad_() * 2)
        assert not patched.steering.alpha.requires_grad
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(model)(**BATCH).logits, model(**BATCH).logits)


def test_slots_out_of_range_stay_there(model, vectors):
    """In int32 these would be -1, which is unsteered, and 0."""
    with ras_fast.patch(model) as patched:
        patched.steering.set_rows(torch.tensor([2**32 - 1, 2**32, -(2**32), -1]), torch.ones(4))
        assert patched.steering.slot.tolist() == [2**31 - 1, 2**31 - 1, -2, -1]


def test_generation(model, vectors):
    """One row of a batch follows the vector for all tokens, the others do not change."""
    with torch.no_grad(), ras_fast.patch(model) as patched:
        expected = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
        target = model.lm_head(vectors[:1]).argmax()
        patched.set_steering("final", vectors)
        patched.steering.set_rows(torch.tensor([-1, 0, -1]), torch.ones(3))
        got = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
    assert torch.equal(got[[0, 2]], expected[[0, 2]])
    assert (got[1, -4:] == target).all()


def test_errors(model, vectors):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        with pytest.raises(ValueError, match="layer is 9"):
            patched.set_steering(9, vectors)
        with pytest.raises(ValueError, match=r"d = 48"):
            patched.set_steering(0, vectors[:, :-1])
        with pytest.raises(ValueError, match=r"vectors is of dtype torch\.int64"):
            patched.set_steering(0, vectors.long())
        with pytest.raises(ValueError, match="rows is"):
            patched.set_steering(0, vectors, rows="first")
        with pytest.raises(ValueError, match=r"slot is \(2,\) and alpha \(3,\)"):
            patched.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.zeros(3))
        for dtype in (torch.float32, torch.complex64, torch.bool):
            with pytest.raises(ValueError, match=f"slot is of dtype {dtype}"):
                patched.steering.set_rows(torch.zeros(2, dtype=dtype), torch.zeros(2))
        patched.set_steering(0, vectors)
        with pytest.raises(RuntimeError, match="set_rows"):
            model(**BATCH)
        patched.steering.set_rows(torch.zeros(2, dtype=torch.int32), torch.zeros(2))
        with pytest.raises(ValueError, match="B = 3"):
            model(**BATCH)
    with pytest.raises(RuntimeError, match="is not patched"):
        patched.set_steering(0, vectors)


@pytest.mark.parametrize("place", [1, "final"])
def test_what_is_no_longer_in_the_model_is_not_steered(model, vectors, place):
    text_model = model.model.language_model
    with ras_fast.patch(model) as patched:
        owner, name = (text_model, "norm") if place == "final" else (text_model.layers, "1")
        before = owner.get_submodule(name)
        owner.register_module(name, copy.deepcopy(before))
        assert not patched.steers(place)
        assert patched.steers(0)
        with pytest.raises(ValueError, match=rf"layer is {place!r}; it must be one of .*, still in the model"):
            patched.set_steering(place, vectors)
        owner.register_module(name, before)
        assert patched.steers(place)


@pytest.mark.parametrize("place", [1, "final"])
def test_a_forward_that_was_put_in_the_place_of_a_fused_one_is_not_steered(model, vectors, place):
    """As kernels of the hub are."""
    text_model = model.model.language_model
    module = text_model.norm if place == "final" else text_model.layers[1]
    with ras_fast.patch(model) as patched:
        own = module.forward
        module.forward = MethodType(type(module).forward, module)
        assert not patched.steers(place)
        with pytest.raises(ValueError, match=rf"layer is {place!r}; it must be one of"):
            patched.set_steering(place, vectors)
        module.forward = own
        assert patched.steers(place)


def put_a_twin_in_its_place(parent, name):
    parent._modules[name] = copy.deepcopy(parent._modules[name])


def give_it_another_forward(parent, name):
    module = parent._modules[name]
    module.forward = MethodType(type(module).forward, module)


def wrap_its_forward(parent, name):
    module = parent._modules[name]
    own, module.forward = module.forward, lambda *args, **kwargs: own(*args, **kwargs)


@pytest.mark.parametrize("change", [put_a_twin_in_its_place, give_it_another_forward, wrap_its_forward])
@pytest.mark.parametrize("place", [1, "final"])
def test_what_is_replaced_while_it_is_steered_is_an_error(model, vectors, place, change):
    """Its answer would count as steered. A wrapper that runs what steers is none."""
    text_model = model.model.language_model
    parent, name = (text_model, "norm") if place == "final" else (text_model.layers, "1")
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_steering(place, vectors)
        patched.steering.set_rows(SLOT, ALPHA)
        steered, own = model(**BATCH).logits, parent._modules[name]
        forward = own.__dict__["forward"]
        change(parent, name)
        if change is wrap_its_forward:
            assert torch.equal(model(**BATCH).logits, steered)
        else:
            with pytest.raises(RuntimeError, match=f"layer {place!r} is steered, but did not run"):
                model(**BATCH)
        parent._modules[name], own.__dict__["forward"] = own, forward
        assert torch.equal(model(**BATCH).logits, steered)


@pytest.mark.parametrize("place", [1, "final"])
def test_what_is_compiled_by_itself_is_steered(model, vectors, place):
    """As regional compilation does with layers. A graph cannot note the thread that it runs in."""
    text_model = model.model.language_model
    module = text_model.norm if place == "final" else text_model.layers[1]
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_steering(place, vectors)
        patched.steering.set_rows(SLOT, ALPHA)
        expected = model(**BATCH).logits
        module.compile(backend="eager")
        for _ in range(2):
            assert torch.equal(model(**BATCH).logits, expected)
        module.forward = MethodType(type(module).forward, module)
        with pytest.raises(RuntimeError, match="did not run"):
            model(**BATCH)


@pytest.mark.parametrize("place", [1, "final"])
def test_steering_that_is_set_anew_while_a_forward_runs(model, vectors, place):
    """By another thread, say: that forward was steered as it was asked for."""
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_steering(place, vectors)
        patched.steering.set_rows(SLOT, ALPHA)
        expected = model(**BATCH).logits
        patched.text_model.register_forward_hook(lambda *called: patched.set_steering(place, vectors), prepend=True)
        assert torch.equal(model(**BATCH).logits, expected)


def test_steered_forwards_of_several_threads(model, vectors):
    """Neither takes the other's for its own."""
    with ras_fast.patch(model) as patched, ThreadPoolExecutor(4) as threads:
        for place in (1, "final"):
            patched.set_steering(place, vectors)
        patched.steering.set_rows(SLOT, ALPHA)
        with torch.no_grad():
            expected = model(**BATCH).logits
        run = torch.no_grad()(lambda _: model(**BATCH).logits)
        assert all(torch.equal(logits, expected) for logits in threads.map(run, range(40)))


def test_probe(model, vectors):
    """The dots of a layer's output after its steering, with and without steering, next to a final lerp, and switched off."""
    with torch.no_grad(), ras_fast.patch(model) as patched:
        for layer, steered, lerped in ((0, False, False), (1, True, False), (2, False, True), (2, True, True)):
            seen = []
            if steered:
                patched.set_steering(layer, vectors)
            if lerped:
                patched.set_steering("final", vectors)
            patched.steering.set_rows(SLOT, ALPHA)
            outputs = []
            handle = hooked(model.model.language_model.layers[layer], outputs.append)
            expected = model(**BATCH).logits
            probe = patched.set_probe(layer, vectors, seen.append)
            assert torch.equal(model(**BATCH).logits, expected)
            probe.active = False
            assert torch.equal(model(**BATCH).logits, expected)
            handle.remove()
            patched.clear_probe(layer)
            patched.clear_steering()
            hidden, (dots,) = outputs[1], seen
            wanted = torch.cat([hidden @ vectors.T, hidden.square().sum(-1, keepdim=True)], -1)
            assert dots.shape == (*BATCH["input_ids"].shape, 3)
            assert dots.dtype == torch.float32
            assert relative_error(dots, wanted) < 1e-5


@pytest.mark.parametrize("given", [lambda v: v.T.contiguous().T, Tensor.double], ids=["strided", "float64"])
def test_vectors_and_directions_of_any_layout(model, vectors, given):
    """They are copied: what the caller writes to their own later is not seen."""

    def run(vectors):
        seen = []
        with torch.no_grad(), ras_fast.patch(model) as patched:
            patched.set_steering(0, vectors)
            patched.set_probe(0, vectors, seen.append)
            patched.steering.set_rows(SLOT, ALPHA)
            vectors.zero_()
            return model(**BATCH).logits, *seen

    expected = run(vectors.clone())
    assert expected[1][..., :2].abs().max() > 1
    for a, b in zip(run(given(vectors.clone())), expected, strict=True):
        assert torch.equal(a, b)


def test_each_layer_follows_its_own_rows(model, vectors):
    other = Steering()
    with torch.no_grad(), ras_fast.patch(model) as patched:
        patched.set_steering(0, vectors)
        patched.steering.set_rows(SLOT, ALPHA)
        first = model(**BATCH).logits
        patched.set_steering(1, vectors, steering=other)
        other.set_rows(SLOT, 0 * ALPHA)
        assert torch.equal(model(**BATCH).logits, first)
        other.set_rows(SLOT, ALPHA)
        assert not torch.equal(model(**BATCH).logits, first)
        with pytest.raises(ValueError, match="layer 1 is steered by something else"):
            patched.set_steering(1, vectors)
        patched.clear_steering(other)
        assert torch.equal(model(**BATCH).logits, first)


def test_probe_errors(model, vectors):
    with torch.no_grad(), ras_fast.patch(model) as patched:
        for layer in ("final", 9):
            with pytest.raises(ValueError, match="layer is"):
                patched.set_probe(layer, vectors, print)
        with pytest.raises(ValueError, match="directions is of shape"):
            patched.set_probe(0, vectors[0], print)
        with pytest.raises(ValueError, match=r"directions is of dtype torch\.int64"):
            patched.set_probe(0, vectors.long(), print)
        patched.set_probe(0, vectors, print)
        with pytest.raises(ValueError, match="without a probe"):
            patched.set_probe(0, vectors, print)
        patched.clear_probe(9)


def test_what_is_of_another_type_is_named(model):
    with ras_fast.patch(model) as patched:
        for call, words in (
            (lambda: patched.set_steering(1, None), "vectors is None; it must be a tensor"),
            (lambda: patched.set_probe(1, [1.0], print), r"directions is \[1.0\]; it must be a tensor"),
            (lambda: patched.set_probe(1, torch.zeros(1, SIZE), None), "receive is None; it must be a function"),
            (lambda: patched.set_monitor([1], None), "receive is None; it must be a function"),
            (lambda: patched.set_monitor(1, print), "layers is 1; it must hold at least one index"),
            (lambda: patched.set_steering([1], torch.zeros(1, SIZE)), r"layer is \[1\]; it must be one of"),
            (lambda: patched.set_probe([1], torch.zeros(1, SIZE), print), r"layer is \[1\]; it must be one of"),
            (lambda: patched.set_region_bias(None), "bias of layer 0 is None; it must be a tensor"),
            (lambda: patched.steering.set_rows([0], ALPHA), r"slot is \[0\]; it must be a tensor"),
            (lambda: patched.steering.set_rows(SLOT, 0.5), "alpha is 0.5; it must be a tensor"),
            (lambda: setattr(patched, "region_map", 3), "region_map is a int; it must be a RegionMap or None"),
        ):
            with pytest.raises(ValueError, match=words):
                call()
