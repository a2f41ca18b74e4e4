"""The README and docs/ as a reader meets them: snippets run, command lines are understood, links lead somewhere."""

import argparse
import copy
import os
import re
import runpy
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from ras_fast import cli, inspect
from ras_fast.evaluation import tinyworld
from ras_fast.refusals import is_refusal

ROOT = Path(__file__).resolve().parents[1]
README, *DOCS = PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)

# What the pages go on from: the README's imports and variables.
GIVEN = ("ras_fast", "torch", "tinyworld", "load", "model", "processor", "image", "inputs", "texts", "pairs")
FEW = 16  # texts and pairs that snippets calibrate on here, instead of their 50, which take three times as long
LEFT_OUT = {  # snippets that do not run here, by their first line
    "from transformers.cli.serve import Serve": "a server for a GPU, of a model from the hub",
    "from vllm import LLM": "vLLM is an environment of its own; its snippet's calls are those of tests/test_vllm_safe_llm.py",
    "from ras_fast.evaluation import calibration": "minutes; by itself, whole, in the slow test below",
}


def snippets(page: Path) -> list[tuple[int, str]]:
    """(line, code) of the page's Python."""
    text = page.read_text()
    fences = (match for match in FENCE.finditer(text) if match[2] == "python")
    return [(text[: match.start(3)].count("\n"), textwrap.dedent(match[3])) for match in fences]


def run(page: Path, line: int, code: str, variables: dict) -> None:
    exec(compile("\n" * line + code, page, "exec"), variables)


def runs(code: str) -> bool:
    return code.splitlines()[0] not in LEFT_OUT


WITH_SNIPPETS = [page for page in DOCS if any(runs(code) for _, code in snippets(page))]


def few(make: Callable[[int], list]) -> Callable[[int], list]:
    return lambda n: make(min(n, FEW))


@pytest.fixture(scope="module")
def readme() -> dict:
    """What the README's snippets leave."""
    variables: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("refused_texts", "calibration_pairs"):
            patch.setattr(tinyworld, name, few(getattr(tinyworld, name)))
        for line, code in snippets(README):
            run(README, line, code, variables)
    return variables


@pytest.fixture
def given(readme) -> dict:
    """What a page goes on from, with a model that it may leave patched."""
    return {name: readme[name] for name in GIVEN} | {"model": copy.deepcopy(readme["model"])}


def test_the_readmes_snippets(readme):
    assert len(readme["pairs"]) == FEW
    assert is_refusal(readme["answer"].text)


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.stem)
def test_the_snippets_of(page, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # they save profiles
    for line, code in snippets(page):
        if runs(code):
            run(page, line, code, given)


def test_what_is_left_out_is_there():
    first_lines = [code.splitlines()[0] for page in PAGES for _, code in snippets(page)]
    assert [first_lines.count(line) for line in LEFT_OUT] == [1] * len(LEFT_OUT)


@pytest.mark.slow  # a calibration and 80 answers
def test_a_snippet_prints_the_figure_beside_it(given, capsys):
    page = ROOT / "docs" / "methods.md"
    ((line, code),) = [snippet for snippet in snippets(page) if not runs(snippet[1])]
    run(page, line, code, given)
    assert capsys.readouterr().out.split()[-1] == re.search(r"# (\d+); at commit", code)[1]


class Understood(Exception):
    """A program has read its command line."""


def check_ras_fast(*words: str) -> None:
    if len(words) == 1:  # a command that is named, not called
        words += ("--help",)
    arguments, rest = cli._parser().parse_known_args(words)
    if arguments.command is cli._inspect:
        inspect.main(rest)
    assert rest == []


def check_python(script: str, *words: str) -> None:
    if script == "-m":
        assert words[0] in OTHERS
    elif words:
        with mock.patch.object(sys, "argv", [script, *words]), mock.patch.dict(os.environ):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        check_file(script)


def check_file(path: str, *words: str) -> None:
    assert (ROOT / path).is_file()


def check_target(target: str) -> None:
    assert f"\n{target}:" in (ROOT / "Makefile").read_text()


CHECKS = {"ras-fast": check_ras_fast, "python": check_python, "pytest": check_file, "bash": check_file, "make": check_target}
OTHERS = ("pip", "vllm", "vllm.entrypoints.openai.api_server", "pytest")  # programs that are not this package's


def understand(program: str, *words: str) -> None:
    CHECKS[program](*words)
    raise Understood


def commands() -> list[str]:
    """Lines of fences without a language, and what stands in the text between backticks and begins with a program of CHECKS."""
    text = "\n".join(page.read_text() for page in PAGES)
    text = re.sub(r"torchrun [^`]* ras_fast\.cli", "ras-fast", text)
    fenced = [line for match in FENCE.finditer(text) if not match[2] for line in re.sub(r"\\\n *", "", match[3]).splitlines()]
    spans = (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text)))
    return sorted({*fenced, *(span for span in spans if re.match(rf"(\w+=\w+ )?({'|'.join(CHECKS)}) ", span))})


@pytest.mark.parametrize("command", commands())
def test_command_lines_are_understood(command, monkeypatch):
    def parse_args(parser, *arguments):
        parse(parser, *arguments)
        raise Understood

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    program, *words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "), comments=True)
    if program in OTHERS:
        return
    with pytest.raises((Understood, SystemExit)) as end:
        understand(program, *words)
    assert getattr(end.value, "code", 0) == 0  # of --help


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text()))
    for path, _, anchor in (link.partition("#") for link in links if "://" not in link):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_files_that_contributors_are_sent_to_exist():
    spans = re.findall(r"`([\w./-]+)`", (ROOT / "docs" / "development.md").read_text())
    paths = [span for span in spans if "/" in span and "NAME" not in span and "DEVICE" not in span]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
