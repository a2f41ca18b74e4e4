"""The command line: `ras-fast COMMAND`. A command imports transformers, which takes seconds, and what else it needs only when
it runs.

Exit status: 0 it worked, 1 it failed, 2 the command line was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ras_fast import backend, loading
from ras_fast.memory import is_out_of_memory
from ras_fast.profile import JSON_NAME, METHODS, TENSORS_NAME, RasProfile


class UsageError(ValueError):
    """Options that are wrong whatever the files, the model and the machine."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, None: from the process."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a model may say what the terminal has no letter for
        sys.stdout.reconfigure(errors="backslashreplace")
    parser = _parser()
    arguments, arguments.rest = parser.parse_known_args(argv)
    if arguments.rest and arguments.command is not _inspect:  # which has a parser of its own
        parser.error(f"unrecognized arguments: {' '.join(arguments.rest)}")
    if getattr(arguments, "heatmap", None) and not arguments.image:
        parser.error("--heatmap needs an --image")
    try:
        if backend.environment_error and arguments.command not in (_doctor, _build):  # which tell of it, or may mend it
            raise UsageError(str(backend.environment_error))
        status = arguments.command(arguments)
        if sys.stdout is not None:  # closed by whoever started this
            sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries to write the rest as it ends
        return 1
    except (ValueError, OSError, ImportError) as error:  # the last: a package of an extra, such as scikit-learn
        if arguments.debug:
            raise
        print(f"ras-fast: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except (RuntimeError, MemoryError) as error:
        if arguments.debug or not is_out_of_memory(error):
            raise
        needs = "a smaller model, fewer --max-new-tokens or --dtype bfloat16 needs less"
        print(f"ras-fast: error: out of memory; {needs} ({str(error) or type(error).__name__})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ras-fast: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ras-fast", description="Fast, safe decoding for vision-language models.")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function, text: str, **options) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **options)
        command.set_defaults(command=function)
        return command

    demo = add("demo", _demo, "answer four images with and without defence, on the tiny model that ships with the package")
    demo.add_argument("--out", type=_path, default=Path("ras-fast-demo"), help="folder of the heat maps (default: %(default)s)")

    add("doctor", _doctor, "say what is here, what is missing and what mends it")

    generate = add("generate", _generate, "answer one question about images; defended if a profile is given")
    _add_model(generate)
    generate.add_argument("--prompt", type=_text, required=True)
    generate.add_argument("--image", type=_text, action="append", default=[], metavar="FILE", help="may be given several times")
    generate.add_argument("--profile", type=_text, help="folder or hub id of a profile; without one the answer is undefended")
    generate.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N")
    generate.add_argument("--heatmap", type=_path, metavar="FILE.png", help="write where the prompt looks in the image")
    generate.add_argument("--json", action="store_true", help="print one JSON object")

    calibrate = add("calibrate", _calibrate, "make a profile for a model")
    _add_model(calibrate)
    calibrate.add_argument("--method", choices=METHODS, default="moras")
    calibrate.add_argument("--data", type=_path, metavar="PAIRS.jsonl",
                           help='lines of {"image", "unsafe", "safe"} and, where the safe question has another image, '
                           '"safe_image"; an image is a path relative to the file, a list of them, or null')  # fmt: skip
    _add_calibration_options(calibrate)
    calibrate.add_argument("--out", type=_path, required=True, metavar="DIR")

    evaluate = add("eval", _eval, "measure the defences: attack success, over-refusal, accuracy, time")
    _add_model(evaluate, default="tiny")
    _add_evaluation_options(evaluate)

    bench = add("bench", _bench, "time the Triton kernels on this GPU, with the configurations in force and with the rules'")
    bench.add_argument("--tune", action="store_true", help="try other configurations, too, and write the best to --out")
    bench.add_argument("--match", default="", help='only shape classes whose "kernel size variant" contains this')
    bench.add_argument("--out", type=_path, metavar="FILE.json", help="default: the file that the installed kernels read")

    build = add("build", _build, "build the native libraries in place")
    build.add_argument("-v", action="store_true", help="show the compiler's commands")
    add("inspect", _inspect, "read registers, spills and instructions out of the compiled kernels", add_help=False)
    return parser


def _add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument("--model", type=_text, required=default is None, default=default,
                        help="'tiny' (ships with the package), a local folder or a hub id")  # fmt: skip
    parser.add_argument("--device", type=_text, default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="auto", choices=loading.DTYPES)


def _add_calibration_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--refused", type=_path, metavar="TEXTS.txt",
                        help="one request per line that the model refuses; moras, ras and attention need it")  # fmt: skip
    staged = parser.add_argument_group("moras and ras")
    staged.add_argument("--context-prompt", type=_text, help="replaces the method's own")
    staged.add_argument("--safety-prompt", type=_text, help="replaces the method's own")
    autosteer = parser.add_argument_group("autosteer")
    autosteer.add_argument("--refusal", type=_text, help="the sentence that it answers with")
    autosteer.add_argument("--layer", type=_layer, metavar="sas|validation|L",
                           help="which is read, or what chooses it (default: sas)")  # fmt: skip
    autosteer.add_argument("--rank", type=_positive, metavar="R", help="of the refusal head (default: full)")
    autosteer.add_argument("--over-refusal", type=float, metavar="SHARE",
                           help="of held-out safe questions: how far the threshold is lowered from 0.5; no bound")  # fmt: skip
    autosteer.add_argument("--checkpoint", type=_path, metavar="DIR", help="to save in, and to go on from")
    projection = parser.add_argument_group("projection")
    projection.add_argument("--layers", type=_indices, metavar="L,M", help="that are steered (default: the middle one)")
    projection.add_argument("--alpha", type=float, help="how far (default: 1)")
    projection.add_argument("--condition", type=_path, metavar="PAIRS.jsonl",
                            help="steer only prompts that are more like the unsafe questions of these")  # fmt: skip
    projection.add_argument("--condition-layer", type=int, metavar="L",
                            help="where that is read (default: before the first that is steered)")  # fmt: skip
    projection.add_argument("--measure", choices=("projection", "cosine"), help="of the condition (default: cosine)")
    projection.add_argument("--per", choices=("sequence", "token"), help="of the condition (default: sequence)")


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", type=_text, default="tinyworld", metavar="NAME",
                        help="tinyworld, tinyworld-robust, a .jsonl file, or LAYOUT:FOLDER of a public benchmark such as "
                             "mm-safetybench, figstep, xstest, gqa (docs/evaluation.md; default: %(default)s)")  # fmt: skip
    parser.add_argument("--profile", type=_text, action="append", default=[], metavar="DIR",
                        help="may be given several times; none on tinyworld: one of each method is calibrated")  # fmt: skip
    parser.add_argument("--defences", type=_text, metavar="A,B", help="default: all that the profiles allow")
    parser.add_argument("--n", type=_positive, help="queries (default: all; 250 of tinyworld, 320 of tinyworld-robust)")
    parser.add_argument("--seed", type=int, default=0, help="which queries (default: %(default)s)")
    parser.add_argument("--judge", type=_text, help="of harm: module:function or a guard model's folder (default: phrases)")
    parser.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N")
    parser.add_argument("--out", type=_path, default=Path("ras-fast-eval"), metavar="DIR",
                        help="answers and report; run again, it goes on where it stopped (default: %(default)s)")  # fmt: skip


def _text(text: str) -> str:
    """Refuses what an unset variable of a shell script leaves: `--profile "$PROFILE"` would answer undefended."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _path(text: str) -> Path:
    return Path(_text(text))


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return number


def _indices(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 10,11") from error


def _layer(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


def _demo(arguments: argparse.Namespace) -> int:
    with _output_folder(arguments.out):
        _quiet_libraries()
        from ras_fast import demo

        return demo.main(arguments.out)


def _doctor(arguments: argparse.Namespace) -> int:
    from ras_fast import doctor

    return doctor.main()


def _bench(arguments: argparse.Namespace) -> int:
    from ras_fast import tune

    return tune.main(arguments.match, arguments.tune, arguments.out or tune.configs_file())


def _build(arguments: argparse.Namespace) -> int:
    from ras_fast import build

    return build.main(["-v"] if arguments.v else [])


def _inspect(arguments: argparse.Namespace) -> int:
    from ras_fast import inspect

    return inspect.main(arguments.rest)


def _generate(arguments: argparse.Namespace) -> int:
    from transformers import TextStreamer

    from ras_fast.inputs import make_queries

    images = arguments.image or None
    if arguments.heatmap:
        _check_heat_maps(arguments.heatmap, len(arguments.image))
    profile = _read_profile(arguments.profile) if arguments.profile else None
    model, processor = _load(arguments)
    try:
        make_queries([arguments.prompt], [images], processor)  # a bad image is reported before minutes of work
    except ValueError as error:
        raise ValueError(str(error).replace("prompts[0]", "--prompt").replace("images[0]", "--image")) from error
    streamer = None if arguments.json else TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if profile:
        result = _defended(arguments, profile, model, processor, streamer)
    else:
        result = _undefended(arguments, model, processor, streamer)
    if not arguments.json:
        print(flush=True)  # under the answer
    if images:
        result |= _look(arguments, model, processor)
    if arguments.json:
        print(json.dumps(result, allow_nan=False))
    else:
        _print_facts(result)
    return 0


def _defended(arguments: argparse.Namespace, profile: RasProfile, model, processor, streamer) -> dict:
    from ras_fast import SafeGenerator
    from ras_fast.methods import ONE_PASS

    decoding = {"max_new_tokens": arguments.max_new_tokens}
    with SafeGenerator(model, processor, profile, batch_size=1) as guard:
        (out,) = guard.generate([arguments.prompt], [arguments.image or None], streamer=streamer, **decoding)
    return {
        "text": out.text,
        "defence": profile.method,
        "risk": out.risk,
        "similarity": out.similarity if math.isfinite(out.similarity) else None,
        "steered": None if profile.method in ONE_PASS else out.steered,  # they have no draft that steering could change
        "failed_closed": out.failed_closed,
        "context": out.context,
        "milliseconds": {stage: 1000 * seconds for stage, seconds in out.timings.items()},
    }


def _undefended(arguments: argparse.Namespace, model, processor, streamer) -> dict:
    import time

    from ras_fast.decoding import Decoding
    from ras_fast.inputs import make_queries
    from ras_fast.reference import generate_text

    (query,) = make_queries([arguments.prompt], [arguments.image or None], processor)
    with _patched(model):
        start = time.perf_counter()
        text = generate_text(model, processor, query, Decoding(max_new_tokens=arguments.max_new_tokens), streamer=streamer)
        seconds = time.perf_counter() - start
    return {"text": text, "defence": None, "milliseconds": {"total": 1000 * seconds}}


def _patched(model):
    """Patches the model for a `with` block; one that cannot be patched runs as it is, with a note on stderr."""
    from contextlib import nullcontext

    from ras_fast import patch

    try:
        return patch(model)
    except TypeError as error:
        print(f"ras-fast: the model runs unpatched: {error}", file=sys.stderr)
        return nullcontext()


def _look(arguments: argparse.Namespace, model, processor) -> dict:
    """How much attention each image gets, and the heat maps if they are asked for."""
    from ras_fast.attention_map import NoImageStatistics, image_attention
    from ras_fast.viz import save_heat_map

    try:
        looked = image_attention(model, processor, arguments.prompt, arguments.image)
    except NoImageStatistics as error:
        if arguments.heatmap:
            raise
        print(f"ras-fast: {error}", file=sys.stderr)
        return {"region_mass": None, "heat_maps": []}
    untold = [str(number) for number, heat in enumerate(looked.maps, 1) if heat is None]
    if arguments.heatmap and untold:
        raise ValueError(f"no heat map of image {', '.join(untold)}: the model sees it as several tiles in one run of tokens")
    paths = _heat_map_paths(arguments.heatmap, len(looked.maps)) if arguments.heatmap else []
    for i, path in enumerate(paths):
        save_heat_map(path, looked.images[i], looked.maps[i], box=looked.boxes[i], title=arguments.prompt)
    masses = looked.mass.nanmean((0, 1)).tolist()
    shares = [mass if math.isfinite(mass) else None for mass in masses]  # as of an image that overflows half precision
    return {"region_mass": shares, "heat_maps": [str(path) for path in paths]}


def _check_heat_maps(path: Path, count: int) -> None:
    """Raises UsageError for a file type, ValueError for files that cannot be written, before minutes of work."""
    from matplotlib.figure import Figure

    formats = sorted({*Figure().canvas.get_supported_filetypes()} - {"pgf"})  # which takes LaTeX
    if path.suffix[1:].lower() not in formats:
        raise UsageError(f"--heatmap {path} needs to end in one of {', '.join(f'.{name}' for name in formats)}")
    with _naming("--heatmap", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    for file in _heat_map_paths(path, count):
        with _naming("--heatmap", file):
            is_new = not file.exists()
            file.open("ab").close()
            if is_new:
                file.unlink()


def _heat_map_paths(path: Path, count: int) -> list[Path]:
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)]


def _print_facts(result: dict) -> None:
    if result["defence"] is None:
        print("defence    none (no profile given)")
    else:
        print(f"defence    {result['defence']}: risk {result['risk']:.3f}{_staged_facts(result)}")
        if result["failed_closed"]:
            print(f"           failed closed: {result['failed_closed']}")
        if result["context"]:
            print(f"context    {result['context']}")
    for number, share in enumerate(result.get("region_mass") or (), 1):
        told = "not computed" if share is None else f"{share:.1%} of the prompt's attention, mean over layers and heads"
        print(f"image {number}    {told}")
    print(f"time       {', '.join(f'{stage} {ms:.0f} ms' for stage, ms in result['milliseconds'].items())}")
    for path in result.get("heat_maps", ()):
        print(f"heat map   {path}")


def _staged_facts(result: dict) -> str:
    """What only a method with stages has to say."""
    if result["steered"] is None:
        return ""
    similarity = "not computed" if result["similarity"] is None else f"{result['similarity']:.3f}"
    return f", similarity to a refusal {similarity}, {'steered' if result['steered'] else 'answer unchanged'}"


def _calibrate(arguments: argparse.Namespace) -> int:
    options = _calibration_options(arguments)
    with _output_folder(arguments.out):
        return _calibrate_into(arguments, options)


def _calibrate_into(arguments: argparse.Namespace, options: dict) -> int:
    from ras_fast import parallel

    parallel.join()
    model, processor = _load(arguments)
    from ras_fast import methods
    from ras_fast.evaluation.calibration import calibrate_on_tinyworld

    if arguments.data is None:
        profile = calibrate_on_tinyworld(arguments.method, model, processor)
    elif arguments.method in STAGED:
        profile = methods.moras.calibrate(model, processor, preset=arguments.method, **options)
    else:
        profile = getattr(methods, arguments.method).calibrate(model, processor, **options)
    if parallel.rank():
        return 0
    profile.save_pretrained(arguments.out)
    told = profile.config | profile.config.get("prober", {})  # of AutoSteer: what its gate refuses on held-out questions
    numbers = {name: value for name, value in told.items() if isinstance(value, float)}
    print(f"{profile.method} profile in {arguments.out}: {', '.join(f'{name} {value:.3f}' for name, value in numbers.items())}")
    return 0


STAGED = ("moras", "ras")
CALIBRATION_OPTIONS = {  # and the methods that each is for
    "refused": (*STAGED, "attention"),
    **dict.fromkeys(("context_prompt", "safety_prompt"), STAGED),
    **dict.fromkeys(("refusal", "layer", "rank", "over_refusal", "checkpoint"), ("autosteer",)),
    **dict.fromkeys(("layers", "alpha", "condition", "condition_layer", "measure", "per"), ("projection",)),
}


def _calibration_options(arguments: argparse.Namespace) -> dict:
    """What the method's `calibrate` is given. Raises UsageError for options that are missing or belong to another method."""
    given = {name: getattr(arguments, name) for name in CALIBRATION_OPTIONS if getattr(arguments, name) is not None}
    for name in given:
        if arguments.method not in CALIBRATION_OPTIONS[name]:
            raise UsageError(f"{_flag(name)} is not for --method {arguments.method}")
    if arguments.data is None:
        if given or arguments.model != "tiny":
            raise UsageError("--data is needed for any model but 'tiny', whose own data takes no other option")
        return {}
    if arguments.method in CALIBRATION_OPTIONS["refused"] and "refused" not in given:
        raise UsageError(f"--refused is needed with --data for --method {arguments.method}")
    for name in ("condition_layer", "measure", "per"):
        if name in given and "condition" not in given:
            raise UsageError(f"{_flag(name)} is of a --condition, which is not given")
    from ras_fast.inputs import read_pairs

    pairs = _read("--data", arguments.data, read_pairs)
    if "refused" in given:
        given["refused_texts"] = _read("--refused", given.pop("refused"), _read_texts)
    if "condition" in given:
        given["condition_pairs"] = _sides(_read("--condition", given.pop("condition"), read_pairs))
    return {"pairs": _sides(pairs) if arguments.method == "projection" else pairs, **given}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _sides(pairs: list[tuple]) -> list[tuple]:
    """Pairs as `ras_fast.methods.projection.calibrate` takes them: (prompt, image) of the unsafe and of the safe question."""
    return [((unsafe, image), (safe, other[0] if other else image)) for image, unsafe, safe, *other in pairs]


def _read_texts(path: Path) -> list[str]:
    from ras_fast.inputs import read_lines

    return [line.strip() for line in read_lines(path) if line.strip()]


def _eval(arguments: argparse.Namespace) -> int:
    from ras_fast.evaluation.datasets import WORLDS, load_dataset
    from ras_fast.evaluation.judges import load_judge

    dataset = load_dataset(arguments.dataset, arguments.n, arguments.seed)
    profiles = _given_profiles(arguments)
    calibrates = not profiles and arguments.dataset in WORLDS
    from ras_fast import parallel
    from ras_fast.evaluation import run
    from ras_fast.evaluation.calibration import CALIBRATIONS
    from ras_fast.evaluation.defences import borrowed_profiles, check_names, default_names, make_defences, robustness_names

    if arguments.defences:
        made = {name: name.partition("+")[0] for name in CALIBRATIONS}
        methods = made if calibrates else {name: profile.method for name, profile in profiles.items()}
        check_names(arguments.defences.split(","), methods)
    parallel.join()
    with _naming("--out", arguments.out):
        run.occupy(arguments.out)  # before minutes of work
    model, processor = _load(arguments)
    judge = load_judge(arguments.judge, model.device) if arguments.judge else dataset.judge
    if calibrates:
        profiles = _own_profiles(arguments, model, processor)
    defaults = robustness_names if dataset.name == "tinyworld-robust" else default_names
    names = arguments.defences.split(",") if arguments.defences else defaults(profiles)
    settings = run.settings_of(model, processor, dataset, arguments.seed, arguments.max_new_tokens, profiles)
    answers = run.AnswerFile(arguments.out, settings)
    with _patched(model):
        defences = make_defences(names, model, processor, profiles, arguments.max_new_tokens)
        try:
            records = run.run(dataset, defences, answers, judge, borrowed=borrowed_profiles(names, profiles))
        except KeyboardInterrupt:
            print(f"{len(answers.records)} answers are in {answers.path}; run again to go on from there", file=sys.stderr)
            raise
    return 0 if parallel.rank() else _report(arguments, records, dataset, judge)


def _report(arguments: argparse.Namespace, records: list[dict], dataset, judge) -> int:
    """Writes and shows the report of an evaluation. 1 where something could not be asked, judged or used."""
    from ras_fast.evaluation import report

    print(report.write_report(arguments.out, records, dataset, arguments.model, judge))
    print(f"report and plots in {arguments.out}")
    failed = {what: sum(key in record for record in records) for key, what in report.FAILURES.items()}
    if any(failed.values()) or dataset.skipped:
        told = ", ".join(f"{count} {what}" for what, count in failed.items())
        print(f"ras-fast: {told}, {len(dataset.skipped)} items were left out", file=sys.stderr)
        return 1
    return 0


def _given_profiles(arguments: argparse.Namespace) -> dict:
    """By the names that the table calls them."""
    from ras_fast.evaluation.defences import name_of

    profiles: dict[str, RasProfile] = {}
    for directory in arguments.profile:
        profile = _read_profile(directory)
        if name_of(profile) in profiles:
            raise ValueError(f"--profile {directory} is a second one of {name_of(profile)!r}; give one of each")
        profiles[name_of(profile)] = profile
    return profiles


def _own_profiles(arguments: argparse.Namespace, model, processor) -> dict:
    """Profiles for tinyworld by name, calibrated where an earlier run has not left them."""
    from ras_fast import parallel
    from ras_fast.evaluation.calibration import CALIBRATIONS, calibrate_on_tinyworld

    profiles: dict[str, RasProfile] = {}
    for name in CALIBRATIONS:
        if not _is_wanted(name, arguments.defences):
            continue
        folder = arguments.out / "profiles" / name
        missing = not all((folder / file).is_file() for file in (JSON_NAME, TENSORS_NAME))
        parallel.wait()
        if missing:
            profile = calibrate_on_tinyworld(name, model, processor, profiles)
            if parallel.rank() == 0:
                profile.save_pretrained(folder)
        parallel.wait()
        profiles[name] = RasProfile.from_pretrained(folder)
    return profiles


def _is_wanted(name: str, defences: str | None) -> bool:
    """Whether the profile, or a variant of it such as "ras-binary", is among the defences "a,b", or one that takes something
    from it; None: all are."""
    from ras_fast.evaluation.defences import COMBINED, CONSTANT, PROMPT_ONLY

    takers = (PROMPT_ONLY, CONSTANT, COMBINED) if name == "moras" else ()
    return defences is None or any(f"{own}-".startswith((f"{name}-", *takers)) for own in defences.split(","))


@contextmanager
def _naming(option: str, path: Path) -> Iterator[None]:
    """Has what the system says of a path begin with the option that it was given to."""
    try:
        yield
    except FileExistsError as error:  # where a folder is to be made
        raise ValueError(f"{option} {path} is a file; it needs to be a folder") from error
    except IsADirectoryError as error:
        raise ValueError(f"{option} {path} is a folder; it needs to be a file") from error
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be used: {error.strerror}") from error


def _read(option: str, path: Path, reader: Callable[[Path], list]) -> list:
    with _naming(option, path):
        return reader(path)


@contextmanager
def _output_folder(path: Path) -> Iterator[None]:
    """Makes the folder of --out, before minutes of work; where they fail and nothing was written, it does not stay."""
    with _naming("--out", path):
        new = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # whether anything can be written there
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it holds something
            for folder in new:
                folder.rmdir()
        raise


def _read_profile(name: str) -> RasProfile:
    _quiet_libraries()
    return RasProfile.from_pretrained(name)


def _load(arguments: argparse.Namespace):
    _quiet_libraries()
    return loading.load(arguments.model, device=arguments.device, dtype=arguments.dtype)


def _quiet_libraries() -> None:
    """Silences the warnings of transformers, of the hub's client and of torchao, which transformers imports where it is there:
    they are for programmers; users of the command line get this package's errors."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    for name in ("torchao", "torch.utils._pytree"):  # the latter warns of what torchao registers
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    raise SystemExit(main())
