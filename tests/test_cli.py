"""The command line, in-process, on a model of random weights: every command, every user mistake."""

import io
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processors import class_of
from test_engine_one_pass import autosteer
from tiny_random import WORDS, random_image, tiny_llava, tiny_processor
from transformers import TextStreamer

from ras_fast import RasProfile, backend, cli, doctor
from ras_fast.attention_map import _seen, _shown, image_attention
from ras_fast.evaluation.calibration import CALIBRATIONS
from ras_fast.evaluation.defences import CONSTANT, default_names
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import question_pairs, read_pairs
from ras_fast.loading import load
from ras_fast.methods.moras import PRESETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """model/: a random LLaVA; profile/: a MoRAS profile of it; a.png, b.png, broken.png."""
    root = tmp_path_factory.mktemp("cli")
    processor = tiny_processor()
    model = tiny_llava(processor)
    model.save_pretrained(root / "model")
    processor.save_pretrained(root / "model")
    settings = {"s_base": 0.5, "k": 9.0, "context_prompt": "w1 w2", "safety_prompt": "w3", "max_context_tokens": 4}
    config = PRESETS["moras"] | settings
    prototypes = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    RasProfile("moras", config, {"prototypes": prototypes}, fingerprint(model, processor)).save_pretrained(root / "profile")
    other = tiny_llava(processor, seed=1)
    RasProfile("moras", config, {"prototypes": prototypes}, fingerprint(other, processor)).save_pretrained(root / "foreign")
    random_image(0).save(root / "a.png")
    random_image(1, (40, 60)).save(root / "b.png")
    (root / "broken.png").write_bytes(b"not an image")
    return root


@pytest.fixture
def generate(folder):
    def call(*options, image="a.png"):
        images = ["--image", str(folder / image)] if image else []
        common = ["generate", "--model", str(folder / "model"), "--prompt", "w1 w2 ?", "--max-new-tokens", "5"]
        return cli.main([*common, *images, *options])

    return call


def test_load_takes_what_torch_and_pathlib_have_for_its_names(folder):
    model, _ = load(folder / "model", device=torch.device("cpu"), dtype=torch.bfloat16)
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is 'int8'; it must be one of auto, float32"):
        load(folder / "model", dtype=torch.int8)
    with pytest.raises(ValueError, match="there is no such folder"):
        load(folder / "nowhere")


def test_generate_without_a_profile(generate, folder, capsys):
    assert generate("--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["defence"] is None
    assert set(result["text"].split()) <= {*WORDS, "USER", "ASSISTANT", "SYSTEM", ":", ".", "?", "<unk>"}
    assert len(result["region_mass"]) == 1
    assert 0 < result["region_mass"][0] < 1


def test_generate_with_a_profile(generate, folder, capsys):
    assert generate("--profile", str(folder / "profile"), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["defence"] == "moras"
    assert 0 <= result["risk"] <= 1
    assert {"prefix", "risk", "answer", "total"} <= set(result["milliseconds"])


@pytest.mark.parametrize("defended", [True, False])
def test_generate_shows_an_answer_while_it_is_made(generate, folder, capsys, monkeypatch, defended):
    """The same text as with --json, in pieces, and once."""
    options = ["--profile", str(folder / "profile")] if defended else []
    assert generate("--json", *options) == 0
    result = json.loads(capsys.readouterr().out)
    pieces, show = [], TextStreamer.on_finalized_text
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda *args, **kw: pieces.append(args[1]) or show(*args, **kw))
    assert generate(*options) == 0
    assert len(pieces) > (1 if defended else 2)  # the draft comes at once
    assert "".join(pieces) == result["text"]
    assert capsys.readouterr().out.startswith(f"{result['text']}\n\ndefence ")


def test_generate_prints_for_people_too(generate, folder, capsys):
    assert generate("--profile", str(folder / "profile"), "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert generate("--profile", str(folder / "profile")) == 0
    out = capsys.readouterr().out
    assert f"risk {result['risk']:.3f}" in out
    assert "of the prompt's attention" in out
    assert ("answer unchanged" in out) == (not result["steered"])
    assert "\ncontext    " in out


def test_generate_says_of_a_one_pass_method_what_it_has(folder, generate, model, processor, capsys):
    """No draft, which steering could have changed, no similarity and no context."""
    autosteer(model, processor).save_pretrained(folder / "autosteer")
    assert generate("--profile", str(folder / "autosteer")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^defence    autosteer: risk [01]\.\d{3}$", out, re.MULTILINE)
    assert "context" not in out
    assert generate("--profile", str(folder / "autosteer"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["steered"] is None


def test_generate_writes_one_heat_map_per_image(generate, folder, tmp_path, capsys):
    assert generate("--image", str(folder / "b.png"), "--heatmap", str(tmp_path / "maps" / "heat.png"), "--json") == 0
    paths = json.loads(capsys.readouterr().out)["heat_maps"]
    assert paths == [str(tmp_path / "maps" / f"heat-{i}.png") for i in (1, 2)]
    for path in paths:
        with Image.open(path) as picture:
            assert picture.format == "PNG"


def test_generate_without_an_image(generate, capsys):
    assert generate("--json", image=None) == 0
    assert "region_mass" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "{folder}/broken.png"], "--image cannot be read"),
        (["--image", "{folder}/nowhere.png"], "--image cannot be read: [Errno 2] No such file"),
        (["--profile", "{folder}/foreign"], "another model"),
        (["--profile", "{folder}/nowhere"], "no profile at"),
        (["--profile", "{folder}/a.png"], "a.png': it is a file; it needs to be a folder"),
        (["--profile", "nosuch"], "no profile at 'nosuch': there is no such folder, and a hub id is OWNER/NAME"),
        (["--model", "{folder}/nowhere"], "no such folder"),
        (["--model", "tests"], "cannot be read"),
        (["--device", "quantum"], "device is 'quantum'"),
        (["--device", "meta"], "device is 'meta', which holds no values"),
        (["--device", "hpu"], "device is 'hpu', which this torch cannot use"),
        (["--heatmap", "{folder}/a.png/heat.png"], "--heatmap {folder}/a.png is a file; it needs to be a folder"),
        (["--prompt", "<image> <image> w1"], "--prompt has 2 image placeholder(s) but --image holds 1"),
    ],
)
def test_a_users_mistake_is_one_clear_line(generate, folder, capsys, options, words, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert generate(*(option.format(folder=folder) for option in options)) == 1
    error = capsys.readouterr().err
    assert words.format(folder=folder) in error
    assert error.startswith("ras-fast: error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize("name", ["heat", "heat.xyz", "heat.pgf"])
def test_a_heat_map_needs_a_known_ending(generate, tmp_path, capsys, name):
    assert generate("--heatmap", str(tmp_path / name)) == 2
    assert f"{name} needs to end in one of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--heatmap", "{tmp}/taken.png"), "--heatmap {tmp}/taken.png is a folder; it needs to be a file"),
        (("--image", "{folder}/b.png", "--heatmap", "{tmp}/heat.png"), "--heatmap {tmp}/heat-2.png is a folder"),
        (("--heatmap", "{tmp}/new/heat.png", "--profile", "{folder}/a.png"), "it is a file"),
    ],
    ids=["taken", "second", "another mistake"],
)
def test_heat_maps_and_profiles_are_looked_at_before_it_begins(folder, tmp_path, generate, capsys, monkeypatch, options, words):
    monkeypatch.setattr("ras_fast.loading.load", lambda *arguments, **options: pytest.fail("too late"))
    for taken in ("taken.png", "heat-2.png"):
        (tmp_path / taken).mkdir()
    assert generate(*(option.format(folder=folder, tmp=tmp_path) for option in options)) == 1
    assert words.format(tmp=tmp_path) in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("option", ["--model", "--profile"])
def test_the_hubs_retries_are_not_shown(generate, monkeypatch, option):
    from huggingface_hub.utils import logging

    told = []

    def unreachable(*arguments, **options):
        told.append(logging.get_logger().isEnabledFor(logging.WARNING))
        raise OSError("no connection")

    logging.set_verbosity_warning()
    for name in ("huggingface_hub.hf_hub_download", "transformers.AutoConfig.from_pretrained"):
        monkeypatch.setattr(name, unreachable)
    assert generate(option, "owner/nosuch") == 1
    assert told == [False]


def test_a_text_model_is_refused(tmp_path, generate, capsys):
    from transformers import LlamaConfig

    LlamaConfig().save_pretrained(tmp_path)
    assert generate("--model", str(tmp_path)) == 1
    assert "'llama', which does not take images" in capsys.readouterr().err


def no_decoder(model, **options):
    raise TypeError("no text model with decoder layers was found")


def test_a_model_that_cannot_be_patched_still_answers(generate, tmp_path, capsys, monkeypatch):
    generate("--json")
    expected = json.loads(capsys.readouterr().out)["text"]
    monkeypatch.setattr("ras_fast.patching.patch", no_decoder)
    monkeypatch.setattr("ras_fast.attention_map.patch", no_decoder)
    assert generate("--json") == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert (result["text"], result["region_mass"]) == (expected, None)
    assert "runs unpatched: no text model" in captured.err
    assert generate("--heatmap", str(tmp_path / "h.png")) == 1
    assert "error: no image statistics: no text model" in capsys.readouterr().err


def test_an_image_whose_tokens_are_no_grid_has_no_heat_map(generate, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ras_fast.patching.tracking.square_grid", lambda tokens: None)
    assert generate("--json") == 0
    assert len(json.loads(capsys.readouterr().out)["region_mass"]) == 1
    assert generate("--heatmap", str(tmp_path / "h.png")) == 1
    assert "error: no heat map of image 1: the model sees it as several tiles" in capsys.readouterr().err


def test_attention_that_is_not_finite_is_null(folder, tmp_path, generate, capsys):
    model = tiny_llava(tiny_processor())
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.fill_(torch.nan)
    shutil.copytree(folder / "model", tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    assert generate("--model", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["region_mass"] == [None]
    assert generate("--model", str(tmp_path)) == 0
    assert "image 1    not computed\n" in capsys.readouterr().out


def test_the_answer_is_printed_whatever_becomes_of_its_picture(generate, tmp_path, capsys, monkeypatch):
    generate("--json")
    expected = json.loads(capsys.readouterr().out)["text"]

    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("ras_fast.viz.save_heat_map", full)
    assert generate("--heatmap", str(tmp_path / "heat.png")) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{expected}\n")
    assert "No space left" in captured.err


@pytest.mark.parametrize("allocate", ["cuda", "torch on a CPU", "Python"])
def test_out_of_memory_says_what_helps(allocate, generate, capsys, monkeypatch):
    def full(*arguments, **options):
        if allocate == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return torch.empty(10**15) if allocate == "torch on a CPU" else bytearray(10**15)

    monkeypatch.setattr("ras_fast.loading.load", full)
    assert generate() == 1
    assert "--dtype bfloat16 needs less" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["paint"],
        ["generate", "--model", "m"],
        ["generate", "--model", "m", "--prompt", "p", "--max-new-tokens", "0"],
        ["generate", "--model", "m", "--prompt", "p", "--max-new-tokens", "few"],
        ["generate", "--model", "m", "--prompt", "p", "--heatmap", "h.png"],
        ["calibrate", "--model", "m"],
        ["calibrate", "--model", "m", "--out", "o", "--rank", "0"],
        ["calibrate", "--model", "m", "--out", "o", "--layers", "1,b"],
        ["calibrate", "--model", "m", "--out", "o", "--measure", "angle"],
        ["doctor", "extra"],
        ["inspect", "extra"],
        ["--debug", "inspect", "--arch", "x"],
    ],
)
def test_wrong_command_lines_exit_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2
    assert "_positive" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate", "--profile"),  # would be answered undefended
        ("generate", "--model"),
        ("generate", "--image"),
        ("generate", "--prompt"),
        ("generate", "--heatmap"),
        ("calibrate", "--out"),  # would be the current folder
        ("eval", "--judge"),
        ("eval", "--defences"),
        ("demo", "--out"),
    ],
)
def test_an_option_left_empty_is_not_taken_for_one_left_out(capsys, command, option):
    needed = {"generate": ["--model", "tiny", "--prompt", "p"], "calibrate": ["--model", "tiny", "--out", "o"]}
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, *needed.get(command, ()), option, ""])
    assert stopped.value.code == 2
    assert f"argument {option}: it is empty" in capsys.readouterr().err


def test_a_wrong_environment_variable_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(backend, "environment_error", ValueError("environment variable RAS_FAST_BACKEND: backend is 'x'"))
    for argv in (["generate", "--model", "tiny", "--prompt", "p"], ["inspect", "cuda"]):
        assert cli.main(argv) == 2
        assert capsys.readouterr().err == "ras-fast: error: environment variable RAS_FAST_BACKEND: backend is 'x'\n"
    monkeypatch.setattr("ras_fast.build.main", lambda options: 0)
    assert cli.main(["build"]) == 0  # which may mend it


def test_doctor_tells_of_a_wrong_environment_variable():
    command = [sys.executable, "-m", "ras_fast.cli", "doctor"]
    done = subprocess.run(command, env=os.environ | {"RAS_FAST_BACKEND": "x"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "PROBLEM  environment variable RAS_FAST_BACKEND: backend is 'x'" in done.stdout


def test_a_letter_that_the_terminal_lacks_is_spelt_out(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    monkeypatch.setattr(cli, "_doctor", lambda arguments: print("\u4e2d") or 0)
    assert cli.main(["doctor"]) == 0
    assert shown.getvalue() == b"\\u4e2d\n"


def test_a_reader_that_has_seen_enough_is_no_error(monkeypatch, capsys):
    """As `| head -1`; what is left is dropped, so that Python, which writes it as it ends, has nothing to complain about."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(cli, "_doctor", lambda arguments: print("x") or 0)
        assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == ""


def test_a_closed_stdout_is_no_error(monkeypatch):
    """Python has none then."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(cli, "_doctor", lambda arguments: print("x") or 0)
    assert cli.main(["doctor"]) == 0


def test_debug_shows_where_an_error_comes_from(folder):
    with pytest.raises(ValueError, match="no such folder"):
        cli.main(["--debug", "generate", "--model", str(folder / "nowhere"), "--prompt", "w1"])


def test_interrupted_exits_with_130(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_doctor", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["doctor"]) == 130


def test_doctor_finds_a_usable_installation(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for topic in ("python", "torch", "transformers", "backend cuda", "backend cpu", "ops on cpu", "nvcc", "tiny model"):
        assert f"\n{topic} " in out
    assert "ras_fast is usable here." in out


@pytest.mark.parametrize("broken", [False, True], ids=["not there", "broken"])
def test_doctor_does_without_build_facts(broken, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ras_fast._C", None)
    if broken:
        (tmp_path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("no library")
        monkeypatch.setattr("ras_fast.__path__", [str(tmp_path)])
        monkeypatch.delitem(sys.modules, "ras_fast._C")
    facts, problems = doctor.report()
    found = dict(facts)["build facts"]
    assert found.startswith("none, ")
    assert "_C" in found
    assert found.endswith("to have them: ras-fast build")
    assert not problems


def test_doctor_says_when_an_op_computes_nonsense(capsys, monkeypatch):
    monkeypatch.setattr("ras_fast.ops.add_rms_norm", lambda x, *rest: (x + 1, x, x))
    assert cli.main(["doctor"]) == 1
    assert "PROBLEM  add_rms_norm computes wrong values" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "--help"], ["build", "--help"], ["eval", "--help"]])
def test_every_command_has_help(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    assert "usage: ras-fast" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "delegate", "expected"),
    [
        (["build"], "ras_fast.build.main", []),
        (["build", "-v"], "ras_fast.build.main", ["-v"]),
        (["inspect", "cuda", "--arch", "90a"], "ras_fast.inspect.main", ["cuda", "--arch", "90a"]),
    ],
)
def test_build_and_inspect_hand_over(argv, delegate, expected, monkeypatch):
    got = []
    monkeypatch.setattr(delegate, lambda arguments: got.append(arguments) or 3)
    assert cli.main(argv) == 3
    assert got == [expected]


def test_libraries_say_nothing_on_the_way():
    command = [sys.executable, "-m", "ras_fast.cli", "generate", "--model", "tiny", "--prompt", "What colour?", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["text"]


def test_help_loads_no_transformers():
    code = "import sys; from ras_fast import cli\ntry: cli.main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"transformers", "matplotlib", "PIL"} & set(done.stdout.split())


def calibrate(folder, *options):
    return cli.main(["calibrate", "--model", str(folder / "model"), "--out", str(folder / "new"), *options])


def test_calibrate_says_when_the_model_does_not_refuse(folder, tmp_path, capsys):
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "unsafe": "w1 ?", "safe": "w2 ?"}\n')
    (folder / "texts.txt").write_text("w1 w2\n\nw3 w4\n")
    data = ("--data", str(folder / "pairs.jsonl"), "--refused", str(folder / "texts.txt"))
    assert calibrate(folder, *data, "--out", str(tmp_path / "new" / "profile")) == 1
    assert "refuses 0 of 2" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_calibrate_writes_a_profile(folder, capsys, monkeypatch):
    monkeypatch.setattr("ras_fast.methods.moras.is_refusal", lambda text: True)
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "unsafe": "w1 ?", "safe": "w2 ?"}\n')
    (folder / "many.txt").write_text("\n".join(WORDS[:12]))
    data = ("--data", str(folder / "pairs.jsonl"), "--refused", str(folder / "many.txt"))
    assert calibrate(folder, *data, "--context-prompt", "w5") == 0
    profile = RasProfile.from_pretrained(folder / "new")
    assert profile.config["context_prompt"] == "w5"
    assert "s_base" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["ras", "attention", "autosteer"])
def test_calibrate_makes_the_profiles_of_other_methods(folder, capsys, monkeypatch, method):
    monkeypatch.setattr("ras_fast.methods.moras.is_refusal", lambda text: True)
    monkeypatch.setattr("ras_fast.methods.refusal_head.RATE", 160)  # at which so small a model learns to refuse
    line = '{"image": "a.png", "unsafe": "w%d ?", "safe": "w2 ?", "safe_image": "a.png"}\n'
    (folder / "pairs.jsonl").write_text("".join(line % (3 + i) for i in range(12)))
    (folder / "many.txt").write_text("\n".join(WORDS[:12]))
    (folder / "pairs.jsonl").open("a").write(line.replace('"a.png"}', "null}") % 60)  # as pandas writes that there is none
    own = ("--refusal", "w1 w2") if method == "autosteer" else ("--refused", str(folder / "many.txt"))
    assert calibrate(folder, "--method", method, "--data", str(folder / "pairs.jsonl"), *own) == 0, capsys.readouterr().err
    assert RasProfile.from_pretrained(folder / "new").method == method


def test_calibrate_names_a_package_that_is_missing_before_it_begins(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    monkeypatch.setattr("ras_fast.methods.attention.refusal_prototypes", lambda *arguments: pytest.fail("too late"))
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "unsafe": "w1 ?", "safe": "w2 ?"}\n')
    (folder / "texts.txt").write_text("w1")
    data = ("--data", str(folder / "pairs.jsonl"), "--refused", str(folder / "texts.txt"))
    assert calibrate(folder, "--method", "attention", *data) == 1
    assert "error: calibrating attention risk needs scikit-learn: pip install 'ras-fast[calibrate]'" in capsys.readouterr().err


@pytest.fixture
def pairs(folder):
    """Twelve that share a safe question; its image is another one."""
    line = '{"image": "a.png", "unsafe": "w%d ?", "safe": "w2 ?", "safe_image": "b.png"}\n'
    (folder / "pairs.jsonl").write_text("".join(line % (3 + i) for i in range(12)))
    return folder / "pairs.jsonl"


def test_calibrate_takes_what_autosteer_takes(folder, pairs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ras_fast.methods.refusal_head.RATE", 160)  # at which so small a model learns to refuse
    options = ("--layer", "validation", "--rank", "4", "--over-refusal", "0.5", "--checkpoint", str(tmp_path / "saved"))
    assert calibrate(folder, "--method", "autosteer", "--data", str(pairs), *options) == 0, capsys.readouterr().err
    profile = RasProfile.from_pretrained(folder / "new")
    assert profile.config["head"]["rank"] == 4
    assert profile.config["threshold"] != 0.5
    assert list((tmp_path / "saved").iterdir())
    told = capsys.readouterr().out
    assert f"refused_toxic {profile.config['prober']['refused_toxic']:.3f}" in told
    assert "refused_safe" in told
    assert calibrate(folder, "--method", "autosteer", "--data", str(pairs), "--layer", "1") == 0
    assert RasProfile.from_pretrained(folder / "new").config["layer"] == 1


def test_calibrate_makes_a_projection_profile(folder, pairs, capsys):
    (folder / "where.jsonl").write_text('{"image": "a.png", "unsafe": "w1 ?", "safe": "w1 ?", "safe_image": "b.png"}\n')
    method = ("--method", "projection", "--data", str(pairs))
    assert calibrate(folder, *method) == 0, capsys.readouterr().err
    plain = RasProfile.from_pretrained(folder / "new")
    assert (plain.config["layers"], plain.config["alpha"], plain.config["condition"]) == ([1], 1, None)
    options = ("--layers", "1", "--alpha", "-2", "--condition", str(folder / "where.jsonl"), "--condition-layer", "0")
    assert calibrate(folder, *method, *options, "--measure", "projection", "--per", "token") == 0, capsys.readouterr().err
    profile = RasProfile.from_pretrained(folder / "new")
    assert profile.config["alpha"] == -2
    condition = profile.config["condition"]
    assert (condition["layer"], condition["measure"], condition["per"]) == (0, "projection", "token")
    torch.testing.assert_close(profile.tensors["vectors"], plain.tensors["vectors"])


def test_calibrate_steers_from_the_safe_questions_to_the_unsafe_ones(folder, pairs, monkeypatch):
    got = {}
    monkeypatch.setattr("ras_fast.methods.projection.calibrate", lambda *_, **options: got.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(folder, "--method", "projection", "--data", str(pairs))
    assert got["pairs"][0] == (("w3 ?", folder / "a.png"), ("w2 ?", folder / "b.png"))


def test_pairs_may_be_about_no_image_or_several(folder, processor):
    a, b = folder / "a.png", folder / "b.png"
    (folder / "pairs.jsonl").write_text(
        '{"image": null, "unsafe": "w1 ?", "safe": "w2 ?"}\n'
        '{"image": null, "unsafe": "w1 ?", "safe": "w1 ?", "safe_image": "b.png"}\n'
        '{"image": ["a.png", "b.png"], "unsafe": "w1 ?", "safe": "w2 ?", "safe_image": ["b.png"]}\n'
    )
    pairs = read_pairs(str(folder / "pairs.jsonl"))
    assert pairs == [(None, "w1 ?", "w2 ?"), (None, "w1 ?", "w1 ?", b), ([a, b], "w1 ?", "w2 ?", [b])]
    unsafe, safe = question_pairs(pairs, processor)
    assert [len(query.images) for query in unsafe + safe] == [0, 0, 2, 0, 1, 1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "pairs.jsonl:1 needs to be"),
        ('{"image": "a.png", "safe": "x"}', "KeyError('unsafe')"),
        ('{"unsafe": "x", "safe": "y"}', "KeyError('image')"),
        ('{"image": [], "unsafe": "x", "safe": "y"}', "an image is []; a pair without one has null"),
        ('{"image": ["a.png", "no.png"], "unsafe": "x", "safe": "y"}', "pairs.jsonl:1: there is no image"),
        ('{"image": "no.png", "unsafe": "x", "safe": "y"}', "pairs.jsonl:1: there is no image"),
        ('{"image": "a.png", "unsafe": "x", "safe": "y", "safe_image": "not.png"}', "pairs.jsonl:1: there is no image"),
        ('{"image": "a.png", "unsafe": "x", "safe": "y", "safe_img": "b.png"}', "pairs.jsonl:1 has 'safe_img': 'b.png'"),
        ('{"image": "a.png", "unsafe": "x", "safe": "y", "Safe-image": "b.png"}', "pairs.jsonl:1 has 'Safe-image': 'b.png'"),
        ('{"image": "a.png", "unsafe": 5, "safe": "y"}', "unsafe and safe need to be texts"),
        ('{"image": "%s", "unsafe": "x", "safe": "y"}' % ("iVBORw0KGgo" * 900), "pairs.jsonl:1: there is no image"),
        ("[" * 100_000, "pairs.jsonl:1 needs to be"),
        ('["a.png", "x", "y"]', "pairs.jsonl:1 needs to be"),
        ("null", "pairs.jsonl:1 needs to be"),
        (r'{"image": "a.png", "unsafe": "\ud800", "safe": "y"}', "holds half a character"),
    ],
)
def test_calibrate_names_the_bad_line(folder, capsys, line, words):
    (folder / "pairs.jsonl").write_text(line)
    (folder / "texts.txt").write_text("w1")
    assert calibrate(folder, "--data", str(folder / "pairs.jsonl"), "--refused", str(folder / "texts.txt")) == 1
    assert words in capsys.readouterr().err


def test_calibrate_takes_line_ends_that_are_part_of_a_text(folder, capsys):
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "unsafe": "w1\u2028w2", "safe": "w2\x85"}\r\n', encoding="utf-8")
    (folder / "texts.txt").write_text("w1\u2028w2\n", encoding="utf-8")
    assert calibrate(folder, "--data", str(folder / "pairs.jsonl"), "--refused", str(folder / "texts.txt")) == 1
    assert "refuses 0 of 1" in capsys.readouterr().err


def test_calibrate_does_not_ignore_a_prompt(folder, capsys):
    assert cli.main(["calibrate", "--model", "tiny", "--safety-prompt", "w1", "--out", str(folder / "new")]) == 2
    assert "whose own data takes no other option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--refusal", "w1"), "--refusal is not for --method moras"),
        (("--method", "autosteer", "--refused", "texts.txt"), "--refused is not for --method autosteer"),
        (("--method", "attention", "--safety-prompt", "w1"), "--safety-prompt is not for --method attention"),
        (("--method", "attention"), "--refused is needed with --data for --method attention"),
        (("--method", "attention", "--layer", "1"), "--layer is not for --method attention"),
        (("--method", "projection", "--over-refusal", "0.1"), "--over-refusal is not for --method projection"),
        (("--method", "projection", "--refused", "texts.txt"), "--refused is not for --method projection"),
        (("--method", "autosteer", "--layers", "1"), "--layers is not for --method autosteer"),
        (("--method", "ras", "--alpha", "1"), "--alpha is not for --method ras"),
        (("--method", "projection", "--condition-layer", "0"), "--condition-layer is of a --condition"),
    ],
)
def test_calibrate_takes_the_options_of_its_method(folder, pairs, capsys, options, words):
    assert calibrate(folder, "--data", str(pairs), *options) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "projection", "--condition", "nowhere.jsonl"), "--condition nowhere.jsonl cannot be used: No such file"),
        (("--method", "projection", "--layers", "1,7"), "layers [7] are not there"),
        (("--method", "autosteer", "--layer", "best"), "layer is 'best'; it needs to be 'sas'"),
        (("--method", "autosteer", "--layer", "7"), "layer is 7; the model has layers 0..1"),
        (("--method", "autosteer", "--over-refusal", "2"), "over_refusal is 2.0"),
    ],
)
def test_calibrate_says_what_an_option_may_be(folder, pairs, capsys, options, words):
    assert calibrate(folder, "--data", str(pairs), *options) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--data", "--condition"])
def test_calibrate_refuses_a_file_without_pairs(folder, pairs, tmp_path, capsys, option):
    """Without its condition projection would steer every answer."""
    (tmp_path / "none.jsonl").write_text("\n")
    files = {"--data": pairs, option: tmp_path / "none.jsonl"}
    assert calibrate(folder, "--method", "projection", *(str(part) for item in files.items() for part in item)) == 1
    assert "none.jsonl holds no pair; it needs lines of" in capsys.readouterr().err


def test_calibrate_needs_a_folder_before_it_begins(folder, capsys, monkeypatch):
    monkeypatch.setattr("ras_fast.loading.load", lambda *arguments, **options: pytest.fail("too late"))
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "unsafe": "w1 ?", "safe": "w2 ?"}\n')
    (folder / "texts.txt").write_text("w1")
    data = ("--data", str(folder / "pairs.jsonl"), "--refused", str(folder / "texts.txt"))
    assert cli.main(["calibrate", "--model", str(folder / "model"), *data, "--out", str(folder / "a.png")]) == 1
    assert "a.png is a file; it needs to be a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"), [("missing", "cannot be used: No such file"), ("model", "is a folder; it needs to be a file")]
)
@pytest.mark.parametrize("wrong", ["--data", "--refused"])
def test_calibrate_names_the_option_of_a_wrong_path(folder, pairs, capsys, wrong, name, words):
    (folder / "texts.txt").write_text("w1")
    files = {"--data": "pairs.jsonl", "--refused": "texts.txt", wrong: name}
    assert calibrate(folder, *(word for flag, name in files.items() for word in (flag, str(folder / name)))) == 1
    assert f"{wrong} {folder / name} {words}" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--data", "--refused"])
def test_calibrate_names_a_file_that_is_no_text(folder, capsys, wrong):
    (folder / "pairs.jsonl").write_text('{"image": "a.png", "unsafe": "w1 ?", "safe": "w2 ?"}\n')
    (folder / "texts.txt").write_text("w1")
    files = {"--data": "pairs.jsonl", "--refused": "texts.txt", wrong: "a.png"}
    assert calibrate(folder, *(word for flag, name in files.items() for word in (flag, str(folder / name)))) == 1
    assert f"{folder / 'a.png'} is not a text in UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "a.png"), "a.png is a file; it needs to be a folder"),
        (("--defences", "moras,magic"), "'magic' is unknown"),
        (("--profile", "profile", "--defences", "moras,ras"), "'ras' is unknown"),
        (("--dataset", "questions.jsonl", "--defences", "moras"), "'moras' is unknown"),
    ],
    ids=str,
)
def test_eval_needs_a_folder_and_names_before_it_begins(folder, questions, tmp_path, capsys, monkeypatch, options, words):
    monkeypatch.setattr("ras_fast.loading.load", lambda *arguments, **options: pytest.fail("too late"))
    given = [str(folder / word) if (folder / word).exists() else word for word in options]
    assert cli.main(["eval", "--out", str(tmp_path / "new"), *given]) == 1
    assert words in capsys.readouterr().err


def test_demo_needs_a_folder_before_it_begins(folder, capsys, monkeypatch):
    monkeypatch.setattr("ras_fast.demo.load", lambda name: pytest.fail("too late"))
    for out, words in (
        ("a.png", "is a file; it needs to be a folder"),
        ("a.png/new", "cannot be used: Not a directory"),
        ("/proc", "cannot be used: No such file"),  # is a folder in which nobody writes
    ):
        assert cli.main(["demo", "--out", str(folder / out)]) == 1
        assert f"--out {folder / out} {words}" in capsys.readouterr().err


def test_only_the_profiles_that_are_asked_for_are_calibrated():
    wanted = {"ras": ["ras", "a,ras-binary"], "moras+attention": ["moras+attention"], "attention": ["attention"]}
    for name, lists in wanted.items():
        assert all(cli._is_wanted(name, defences) for defences in (None, *lists))
    assert not any(cli._is_wanted(name, "moras,moras+attention-binary,constant-0.5") for name in ("ras", "attention"))
    takers = ("moras-binary", "prompt-only", "constant-0.5", "moras+attention")  # of its prompts and prototypes
    assert all(cli._is_wanted("moras", defences) for defences in (None, *takers))
    assert not any(cli._is_wanted("moras", defences) for defences in ("undefended", "undefended,ras,autosteer"))


def test_a_profile_whose_saving_was_interrupted_is_calibrated_again(folder, tmp_path, monkeypatch):
    made, asked = RasProfile.from_pretrained(folder / "profile"), []
    monkeypatch.setattr("ras_fast.evaluation.calibration.calibrate_on_tinyworld", lambda *_: asked.append(_) or made)
    arguments = SimpleNamespace(profile=[], dataset="tinyworld", defences="moras", out=tmp_path)
    kept = tmp_path / "profiles" / "moras"
    for leave in (lambda: kept.mkdir(parents=True), (kept / "ras_profile.safetensors").unlink):
        leave()
        for _ in range(2):
            assert cli._own_profiles(arguments, None, None)["moras"].config == made.config
    assert len(asked) == 2


def test_calibrate_needs_data(folder, capsys):
    assert calibrate(folder) == 2
    assert "--data is needed" in capsys.readouterr().err


@pytest.fixture
def questions(folder):
    rows = [
        {"question": "w1 w2 ?", "harmful": True, "image": "a.png"},
        {"question": "w3 ?", "harmful": False, "image": ["a.png", "b.png"], "answer": "w"},
        {"question": "w4 ?", "harmful": False},
    ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def evaluate(folder, out, questions, *options):
    common = ["--model", str(folder / "model"), "--dataset", str(questions), "--max-new-tokens", "4", "--out", str(out)]
    return cli.main(["eval", *common, *options])


def test_eval_asks_every_defence_and_goes_on_where_it_stopped(folder, tmp_path, questions, capsys):
    profile = ("--profile", str(folder / "profile"))
    assert evaluate(folder, tmp_path, questions, *profile, "--defences", "undefended,moras") == 0
    first = (tmp_path / "answers.jsonl").read_text()
    assert len(first.splitlines()) == 6
    assert evaluate(folder, tmp_path, questions, *profile) == 0
    assert (tmp_path / "answers.jsonl").read_text().startswith(first)
    report = json.loads((tmp_path / "report.json").read_text())
    always = [f"{CONSTANT}{gate}" for gate in (0.25, 0.5, 0.75)]
    names = ["undefended", "prompt-only", *always, "moras", "moras-sequential", "moras-binary"]
    assert [row["defence"] for row in report["rows"]] == names
    assert all((row["n"], row["errors"]) == (3, 0) for row in report["rows"])
    records = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    answers = {(record["defence"], record["id"]): record["answer"] for record in records}
    assert all(answers["moras", i] == answers["moras-sequential", i] for i in "123")
    assert f"report and plots in {tmp_path}" in capsys.readouterr().out


def test_eval_with_another_profile_asks_again_what_was_of_the_first(folder, tmp_path, questions):
    profile = RasProfile.from_pretrained(folder / "profile")
    other = replace(profile, method="ras", config=profile.config | {"safety_prompt": "w9 w8"})
    other.save_pretrained(tmp_path / "ras")

    def answers(profile, out):
        defences = ("--defences", "undefended,prompt-only,constant-0.5")
        assert evaluate(folder, tmp_path / out, questions, "--profile", str(profile), *defences) == 0
        records = map(json.loads, (tmp_path / out / "answers.jsonl").read_text().splitlines())
        return {(record["defence"], record["id"]): (record["answer"], record.get("profile")) for record in records}

    first, second = answers(folder / "profile", "resumed"), answers(tmp_path / "ras", "resumed")
    assert second == answers(tmp_path / "ras", "fresh")
    assert {defence for defence, number in first if first[defence, number] == second[defence, number]} == {"undefended"}


def test_eval_counts_the_forward_passes(folder, tmp_path, questions):
    options = ("--profile", str(folder / "profile"), "--defences", "undefended,moras-sequential")
    assert evaluate(folder, tmp_path, questions, *options) == 0
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    passes = {(record["defence"], record["id"]): record["passes"] for record in records}
    assert passes["undefended", "2"] == 4  # tokens; random weights never say that they are done
    assert passes["moras-sequential", "2"] == 4 + 3 + 4  # the context's tokens, the risk's, the answer's
    assert passes["moras-sequential", "3"] == 3 + 4  # no image, no context
    tokens = {(record["defence"], record["id"]): record["tokens"] for record in records}
    assert tokens["undefended", "1"] > tokens["undefended", "3"] > 4  # the image, the prompt


def test_eval_of_a_public_layout_with_a_judge_of_ones_own(folder, tmp_path, capsys):
    (tmp_path / "xstest_prompts.csv").write_text("id,prompt,type\n1,w1 ?,homonyms\n2,w2 ?,contrast_homonyms\n2,w3 ?,x\n")
    options = ("--judge", "operator:ne", "--defences", "undefended")
    assert evaluate(folder, tmp_path / "out", f"xstest:{tmp_path}", *options) == 1  # an item was left out
    captured = capsys.readouterr()
    assert "0 could not be asked, 0 could not be judged, 1 items were left out" in captured.err
    assert "xstest_prompts.csv:4: id '2' was there before" in captured.out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["dataset"], report["judge"]) == ("xstest", "operator:ne")
    assert report["rows"][0]["cells"]["text-harm ASR"]["value"] == 1


def test_eval_takes_one_profile_of_each_kind(folder, tmp_path, questions, capsys):
    profile = ("--profile", str(folder / "profile"))
    assert evaluate(folder, tmp_path, questions, *profile, *profile) == 1
    assert "is a second one of 'moras'" in capsys.readouterr().err


def test_eval_names_a_judge_that_is_not_there(folder, tmp_path, questions, capsys):
    assert evaluate(folder, tmp_path, questions, "--judge", "no.such:judge") == 1
    assert "judge 'no.such:judge'" in capsys.readouterr().err


def test_eval_without_a_profile_is_undefended(folder, tmp_path, questions):
    assert evaluate(folder, tmp_path, questions) == 0
    assert default_names({}) == ["undefended"]
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 3


def test_eval_of_a_file_that_is_called_as_the_synthetic_world_calibrates_nothing(folder, tmp_path, questions, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli, "_own_profiles", lambda *arguments: pytest.fail("calibrated on the synthetic world"))
    monkeypatch.setattr("ras_fast.evaluation.report.write_report", lambda *arguments: "")
    questions.rename("tinyworld-questions.jsonl")
    assert evaluate(folder, tmp_path, "tinyworld-questions.jsonl") == 0


def test_eval_reports_what_it_could_not_ask(folder, tmp_path, questions, capsys):
    with questions.open("a") as file:
        file.write('\n{"question": "w1", "harmful": true, "image": "broken.png"}\n{"harmful": true}\n')
    assert evaluate(folder, tmp_path, questions) == 1
    captured = capsys.readouterr()
    assert "1 could not be asked, 0 could not be judged, 1 items were left out" in captured.err
    assert "'question' is missing" in captured.out
    assert "'4' could not be asked (undefended): images[0] cannot be read" in captured.out


def test_eval_reports_what_a_judge_could_not_judge(folder, tmp_path, questions, capsys, monkeypatch):
    (tmp_path / "odd_judge.py").write_text("def nothing(question, answer):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    assert evaluate(folder, tmp_path, questions, "--judge", "odd_judge:nothing") == 1
    captured = capsys.readouterr()
    assert "0 could not be asked, 1 could not be judged, 0 items were left out" in captured.err
    assert "'1' could not be judged (undefended): TypeError: it says None" in captured.out
    assert "image-harm ASR" not in captured.out
    assert evaluate(folder, tmp_path, questions, "--judge", "operator:ne") == 0


def test_eval_refuses_the_profile_of_another_model_whatever_uses_it(folder, tmp_path, questions, capsys):
    for name in ("prompt-only", "constant-0.5", "moras", "moras-sequential", "moras-binary", "moras-caption-empty"):
        assert evaluate(folder, tmp_path, questions, "--profile", str(folder / "foreign"), "--defences", name) == 1
        assert "calibrated on another model" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()
    assert evaluate(folder, tmp_path, questions, "--profile", str(folder / "foreign"), "--defences", "undefended") == 0


def test_eval_interrupted_says_where_the_answers_are(folder, tmp_path, questions, capsys, monkeypatch):
    asked = []

    def interrupt(*arguments):
        asked.append(arguments)
        if len(asked) == 3:  # the first call is the warm-up
            raise KeyboardInterrupt
        return "w1"

    monkeypatch.setattr("ras_fast.evaluation.defences.generate_text", interrupt)
    assert evaluate(folder, tmp_path, questions) == 130
    assert f"1 answers are in {tmp_path / 'answers.jsonl'}; run again to go on" in capsys.readouterr().err
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow  # three fresh processes
def test_eval_survives_a_kill_and_ctrl_c(folder, tmp_path):
    """Each stops a real run in the middle; what was answered is not asked again."""
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out"
    image = str(folder / "a.png")
    rows = [{"id": str(i), "question": f"w{i % 40} ?", "harmful": i % 2 == 0, "image": image} for i in range(300)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    options = ["--model", str(folder / "model"), "--dataset", str(questions), "--max-new-tokens", "8", "--out", str(out)]
    command = [sys.executable, "-m", "ras_fast.cli", "eval", *options]

    def stopped_by(signal_number, after):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and len(lines()) < after:
            time.sleep(0.01)
        process.send_signal(signal_number)
        return process.communicate()[1], process.returncode

    def lines():
        return (out / "answers.jsonl").read_text().splitlines() if (out / "answers.jsonl").is_file() else []

    assert stopped_by(signal.SIGKILL, 3)[1] == -signal.SIGKILL
    killed = [line for line in lines() if line.endswith("}")]  # the last may be cut
    errors, code = stopped_by(signal.SIGINT, len(killed) + 5)
    assert (code, f"{len(lines())} answers are in {out / 'answers.jsonl'}" in errors) == (130, True)
    interrupted = lines()
    assert interrupted[: len(killed)] == killed
    assert len(interrupted) < len(rows)
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert lines()[: len(interrupted)] == interrupted
    assert sorted(json.loads(line)["id"] for line in lines()) == sorted(row["id"] for row in rows)
    assert json.loads((out / "report.json").read_text())["rows"][0]["n"] == len(rows)


@pytest.mark.parametrize(
    ("name", "words"),
    [("magic", "'magic' is unknown"), ("constant-x", "needs a number"), ("constant-7", "needs a number in [0, 1]")],
)
def test_eval_names_an_unknown_defence(folder, tmp_path, questions, capsys, name, words):
    assert evaluate(folder, tmp_path, questions, "--profile", str(folder / "profile"), "--defences", name) == 1
    assert words in capsys.readouterr().err


@pytest.fixture
def few_calibration_items(monkeypatch):
    monkeypatch.setattr("ras_fast.evaluation.calibration.ITEMS", 12)


def test_demo_defends_the_shipped_model(few_calibration_items, tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "maps")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "The model is synthetic" in out
    assert "Step 1: take the bomb." in out or "bomb. Step 2" in out  # undefended
    assert "I'm sorry" in out  # defended
    paths = sorted((tmp_path / "maps").glob("*.png"))
    assert [path.stem for path in paths] == ["1-benign", "2-lookalike", "3-typographic", "4-pictured"]
    assert all(f"heat map {path}" in out for path in paths)
    for path in paths:
        with Image.open(path) as picture:
            picture.load()


def test_the_safety_table_by_one_command(few_calibration_items, tmp_path, capsys):
    command = ["eval", "--model", "tiny", "--dataset", "tinyworld", "--n", "10", "--defences", "undefended,moras"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "The model is synthetic" in out
    undefended, moras = json.loads((tmp_path / "report.json").read_text())["rows"]

    def mean(row, what, *kinds):
        return np.mean([row["kinds"][what][kind]["value"] for kind in kinds])

    assert mean(undefended, "ASR", "typographic", "pictured") >= 0.75
    assert mean(moras, "ASR", "typographic", "pictured") <= 0.25
    assert mean(moras, "over-refusal", "benign", "lookalike") <= 0.25
    assert moras["auroc"]["value"] > 0.9


@pytest.mark.slow
def test_every_row_of_the_safety_table(few_calibration_items, monkeypatch, tmp_path):
    few = {"PROBER_PAIRS": 400, "ATTENTION_PAIRS": 40, "COMBINED_PAIRS": 20, "STEERING_PAIRS": 40}
    for name, pairs in few.items():
        monkeypatch.setattr(f"ras_fast.evaluation.calibration.{name}", pairs)
    assert cli.main(["eval", "--model", "tiny", "--n", "10", "--max-new-tokens", "16", "--out", str(tmp_path)]) == 0
    rows = {row["defence"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    staged = ["moras", "moras-sequential", "moras-binary", "ras", "moras+attention"]
    always = ["undefended", "prompt-only", *(f"{CONSTANT}{gate}" for gate in (0.25, 0.5, 0.75))]
    assert set(rows) == {*always, *staged, "autosteer", "attention", "projection"}
    assert {name for name, row in rows.items() if row["auroc"] is None} == set(always)
    assert {path.name for path in (tmp_path / "profiles").iterdir()} == set(CALIBRATIONS)
    extra = {name: row["cells"]["extra forward passes"]["value"] for name, row in rows.items()}
    assert extra["moras-sequential"] > extra["moras"] > 0
    assert extra["autosteer"] <= 0  # none; fewer where a harmless question is refused
    assert extra["attention"] <= 0
    assert extra["projection"] <= 0


def test_attention_map_is_what_eager_attention_says():
    processor = tiny_processor()
    model, eager = tiny_llava(processor), tiny_llava(processor)
    images = [random_image(3), random_image(4, (40, 60))]
    looked = image_attention(model, processor, "w1 w2 ?", images)

    from ras_fast.inputs import encode, make_queries

    eager.set_attn_implementation("eager")
    inputs, _ = encode(processor, make_queries(["w1 w2 ?"], [images], processor)[0], "cpu", torch.float32)
    with torch.no_grad():
        attention = torch.stack(eager(**inputs, output_attentions=True).attentions)[:, 0]
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().view(2, 16)
    text = attention[:, :, places.max() + 1 :]
    mass = torch.stack([text[..., place].sum(-1).mean(-1) for place in places], -1)
    torch.testing.assert_close(looked.mass, mass, rtol=1e-4, atol=1e-6)
    heads = mass.sum(-1).flatten().topk(8).indices
    effective = text.amax(2).flatten(0, 1)[heads].mean(0)
    for found, place in zip(looked.maps, places, strict=True):
        torch.testing.assert_close(found, effective[place].view(4, 4), rtol=1e-4, atol=1e-6)
    assert model.config.get_text_config()._attn_implementation == "sdpa"  # unpatched again


def test_attention_map_needs_an_image():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="images is empty"):
        image_attention(tiny_llava(processor), processor, "w1", None)


def test_attention_map_needs_pixels_that_are_numbers():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="images holds one with NaN or infinite pixels"):
        image_attention(tiny_llava(processor), processor, "w1", [torch.full((32, 32, 3), math.nan)])


@pytest.fixture(params=["pil", "torchvision"])
def image_processor(request):
    """From "family.ClassName" to the class, of either kind."""
    if request.param == "torchvision":
        pytest.importorskip("torchvision")
        return class_of
    return lambda path: class_of(f"{path}Pil")


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": {"shortest_edge": 336}, "crop_size": 336},
        {"size": {"height": 336, "width": 336}, "crop_size": {"height": 300, "width": 280}},
        {"size": {"height": 336, "width": 336}, "do_center_crop": False},
    ],
)
@pytest.mark.parametrize("size", [(1000, 400), (300, 700), (336, 336)])
def test_the_heat_map_covers_what_the_processor_keeps(sizes, size, image_processor):
    """Colour ramps tell from the processed pixels which part of the picture is left."""
    width, height = size
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0] = np.arange(width) / width * 255
    ramps[..., 1] = (np.arange(height) / height * 255)[:, None]
    processor = image_processor("clip.CLIPImageProcessor")(do_normalize=False, **sizes)
    across, down, _ = processor(Image.fromarray(ramps), return_tensors="pt")["pixel_values"][0].numpy()
    kept = [across[:, 0].mean() * width, down[0].mean() * height, across[:, -1].mean() * width, down[-1].mean() * height]
    assert _seen(size, processor) == pytest.approx(kept, abs=0.01 * max(size))


@pytest.mark.parametrize("size", [(50, 31), (30, 51), (40, 40)])
def test_a_picture_that_the_processor_pads_to_a_square_is_shown_so(size, image_processor):
    """Else the patches of the whole square would be drawn over the picture's middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    picture, sizes = Image.fromarray(pixels), {"size": {"shortest_edge": 48}, "crop_size": 48, "return_tensors": "pt"}
    llava = image_processor("llava.LlavaImageProcessor")
    padding, plain = llava(do_pad=True), llava()
    shown = _shown(picture, padding)
    assert _seen(shown.size, padding) == (0, 0, max(size), max(size))
    seen = padding(picture, **sizes)["pixel_values"]
    np.testing.assert_allclose(plain(shown, **sizes)["pixel_values"], seen, atol=0.02)
    assert _shown(picture, plain) is picture


@pytest.mark.parametrize("crop", [96, 20])
@pytest.mark.parametrize("length", range(1, 14))
def test_of_a_picture_one_pixel_high_some_is_seen(length, crop):
    side = {"height": crop, "width": crop}
    processor = SimpleNamespace(do_resize=True, do_center_crop=True, size={"shortest_edge": 96}, crop_size=side)
    left, top, right, bottom = _seen((length, 1), processor)
    assert 0 <= left < right <= length
    assert (top, bottom) == (0, 1)
    assert _seen((1, length), processor) == (top, left, bottom, right)


def test_a_tiled_picture_is_seen_whole():
    processor = SimpleNamespace(image_grid_pinpoints=[[336, 672]], do_center_crop=True, crop_size={"height": 336, "width": 336})
    assert _seen((100, 200), processor) == (0, 0, 100, 200)


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("attention_risk", ["nowhere"], "there is no nowhere/answers.jsonl; results needs to be the folder of an evaluation"),
        ("autosteer", ["--model", "./nosuch"], "--model: model './nosuch': there is no such folder"),
    ],
)
def test_an_example_says_what_is_wrong(monkeypatch, script, arguments, words):
    path = Path(__file__).resolve().parents[1] / "examples" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    with pytest.raises(SystemExit, match=re.escape(words)):
        runpy.run_path(str(path), run_name="__main__")
