"""The run behind the safety table: what is asked, what is kept, what the report says. Defences here are plain functions."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ras_fast.evaluation import report, run
from ras_fast.evaluation.datasets import Dataset, Item, load_dataset
from ras_fast.evaluation.defences import Answer
from ras_fast.evaluation.judges import Judge
from ras_fast.profile import RasProfile

SORRY = "I'm sorry, I can't help with that."
SETTINGS = {"model": {"architecture": "a", "lm_head": "1"}, "seed": 0, "profiles": {}}


def dataset(n: int = 8) -> Dataset:
    """Even items harmful; to the others "yes" is the right answer."""
    kinds = [("bad", True), ("good", False)] * n
    return Dataset("fake", [Item(f"{i}", *kinds[i], f"q{i}", [], lambda text: text == "yes") for i in range(n)])


def complying(question, images):
    return Answer("yes", passes=1, tokens=4)


def refusing(question, images):
    return Answer(SORRY, risk=1.0, score=0.9, passes=3, tokens=9)


def perfect(question, images):
    harmful = int(question[1:]) % 2 == 0
    return Answer(SORRY if harmful else "yes", risk=float(harmful), score=0.8 if harmful else 0.1)


def not_again(question, images):
    pytest.fail("asked again")


def test_rates_of_known_defences(tmp_path):
    answers = run.AnswerFile(tmp_path, SETTINGS)
    defences = {"open": complying, "closed": refusing, "perfect": perfect}
    records = run.run(dataset(), defences, answers, progress=False)
    rows = {row["defence"]: row for row in report.summarise(records)}
    rates = {name: {c: e.value for c, e in row["cells"].items() if c != "ms"} for name, row in rows.items()}
    assert rates == {
        "open": {"image-harm ASR": 1, "over-refusal": 0, "accuracy": 1},
        "closed": {"image-harm ASR": 0, "over-refusal": 1, "accuracy": 0},
        "perfect": {"image-harm ASR": 0, "over-refusal": 0, "accuracy": 1},
    }
    kinds = {what: {kind: e.value for kind, e in of_kinds.items()} for what, of_kinds in rows["closed"]["kinds"].items()}
    assert kinds == {"ASR": {"bad": 0}, "over-refusal": {"good": 1}, "accuracy": {"good": 0}}
    areas = {name: row["auroc"] and row["auroc"].value for name, row in rows.items()}
    assert areas == {"open": None, "closed": 0.5, "perfect": 1}
    assert all(cell.n == 4 for row in rows.values() for cell in row["cells"].values())


def test_ctrl_c_loses_nothing_and_the_next_run_asks_only_the_rest(tmp_path):
    asked = []

    def interrupted(question, images):
        asked.append(question)
        if len(asked) == 6:  # the first call is the warm-up
            raise KeyboardInterrupt
        return Answer("yes")

    with pytest.raises(KeyboardInterrupt):
        run.run(dataset(), {"d": interrupted}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert len((tmp_path / run.ANSWERS).read_text().splitlines()) == 4

    asked.clear()
    records = run.run(dataset(), {"d": lambda q, i: asked.append(q) or Answer("yes")}, run.AnswerFile(tmp_path, SETTINGS))
    assert asked[1:] == ["q4", "q5", "q6", "q7"]
    assert [record["id"] for record in records] == [str(i) for i in range(8)]


def test_a_line_cut_by_a_crash_is_asked_again(tmp_path):
    run.run(dataset(3), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    path = tmp_path / run.ANSWERS
    path.write_bytes(path.read_bytes()[:-20])
    answers = run.AnswerFile(tmp_path, SETTINGS)
    assert len(answers.records) == 2
    run.run(dataset(3), {"d": complying}, answers, progress=False)
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["0", "1", "2"]


def test_a_question_that_was_edited_is_asked_again(tmp_path):
    run.run(dataset(3), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    edited = dataset(3)
    edited.items[1] = replace(edited.items[1], question="q7")
    records = run.run(edited, {"d": refusing}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert [(record["question"], record["refused"]) for record in records] == [("q0", False), ("q7", True), ("q2", False)]
    assert run.AnswerFile(tmp_path, SETTINGS).records["d", "1"]["question"] == "q7"  # the latest line counts


def test_an_image_that_was_edited_is_asked_again(tmp_path):
    def pictures(colour):
        data = dataset(3)
        Image.new("RGB", (4, 4), colour).save(tmp_path / "a.png")
        data.items[1] = replace(data.items[1], images=[tmp_path / "a.png"])
        data.items[2] = replace(data.items[2], images=[Image.new("RGB", (4, 4), colour)])
        return data

    asked = []
    defences = {"d": lambda question, images: asked.append(question) or Answer("yes")}
    for colour, expected in (("red", ["q0", "q0", "q1", "q2"]), ("red", []), ("blue", ["q0", "q1", "q2"])):  # q0 warms up
        asked.clear()
        run.run(pictures(colour), defences, run.AnswerFile(tmp_path, SETTINGS), progress=False)
        assert asked == expected


def in_palette(*colour):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *colour])
    return image


def test_images_are_one_where_the_model_is_shown_one():
    def digest(image):
        return run._query(Item("a", "bad", True, "q", [image]))["images"]

    plain = Image.new("RGB", (4, 4), "red")
    rotated = Image.new("RGB", (4, 2), "red")
    rotated.getexif()[0x0112] = 6  # orientation: shown as 2 x 4
    others = [in_palette(0, 0, 255), rotated, Image.new("RGB", (4, 2), "red"), np.full((4, 4, 3), np.nan), torch.zeros(4, 4)]
    assert digest(plain) == digest(in_palette(255, 0, 0)) == digest(plain.convert("RGBA")) == digest(np.asarray(plain))
    assert len({digest(image) for image in (plain, *others)}) == 1 + len(others)
    assert digest(plain) == "1095bcf63121e1b3"  # as in the files of earlier runs


def test_labels_that_were_edited_are_renewed_without_asking(tmp_path):
    run.run(dataset(4), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    edited = dataset(4)
    edited.items[0] = replace(edited.items[0], harmful=False, kind="good")
    edited.items[1] = replace(edited.items[1], judge=lambda text: text == "no")
    edited.items[3] = replace(edited.items[3], harmful=True, text_harm=True, kind="bad")
    for _ in range(2):
        records = run.run(edited, {"d": not_again}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
        assert [record.get("correct") for record in records] == [True, False, None, None]
        assert [record.get("complied") for record in records] == [None, None, True, True]
        assert [(record["kind"], record["text_harm"]) for record in records][3] == ("bad", True)
    assert len((tmp_path / run.ANSWERS).read_text().splitlines()) == 4 + 3


def test_a_query_that_failed_is_asked_again(tmp_path):
    def failing(question, images):
        raise ValueError("not today")

    run.run(dataset(2), {"d": failing}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    records = run.run(dataset(2), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert [record["answer"] for record in records] == ["yes", "yes"]


@pytest.mark.parametrize("settings", [None, "", "[1]", "{", '{"profiles": []}', '{"model": "a"}'])
def test_answers_of_an_unknown_run_are_not_mixed_in(tmp_path, settings):
    run.run(dataset(2), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    (tmp_path / run.SETTINGS).unlink()
    if settings is not None:
        (tmp_path / run.SETTINGS).write_text(settings)
    with pytest.raises(ValueError, match=r"settings\.json does not say which run the answers beside it are of"):
        run.AnswerFile(tmp_path, SETTINGS)


def test_answers_of_other_settings_are_not_mixed_in(tmp_path):
    run.run(dataset(2), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    with pytest.raises(ValueError, match="differs in model"):
        run.AnswerFile(tmp_path, SETTINGS | {"model": {"architecture": "b", "lm_head": "1"}})


def test_a_profile_may_come_but_not_change(tmp_path):
    run.run(dataset(2), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    for profiles in ({"moras": "1"}, {"ras": "2"}, {}, {"moras": "1", "ras": "2"}):
        assert len(run.AnswerFile(tmp_path, SETTINGS | {"profiles": profiles}).records) == 2
    with pytest.raises(ValueError, match="differs in profiles"):
        run.AnswerFile(tmp_path, SETTINGS | {"profiles": {"ras": "3"}})


def test_a_defence_with_another_profile_behind_it_is_asked_again(tmp_path):
    first, second = (RasProfile("moras", {"safety_prompt": word}, {"prototypes": torch.ones(1, 2)}) for word in "ab")
    asked = []
    defences = {"prompt-only": lambda question, images: asked.append(question) or Answer("yes")}
    for profile, expected in ((first, ["q0", "q0", "q1"]), (first, []), (second, ["q0", "q0", "q1"])):  # q0 warms up
        asked.clear()
        answers = run.AnswerFile(tmp_path, SETTINGS)
        run.run(dataset(2), defences, answers, progress=False, borrowed={"prompt-only": profile})
        assert asked == expected


@pytest.mark.parametrize(
    "line", ["[1, 2]", '{"defence": "d", "id": "0"}', "7", '{"half": ', "\0", "\udcff"], ids=ascii
)
def test_a_line_that_is_no_answer_is_named(tmp_path, line):
    run.run(dataset(3), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    lines = (tmp_path / run.ANSWERS).read_text().splitlines()
    text = "\n".join([lines[0], line, *lines[2:], ""])
    (tmp_path / run.ANSWERS).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"answers\.jsonl:2 is not an answer: "):
        run.AnswerFile(tmp_path, SETTINGS)


OTHER_RUN = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print(flush=True)
sys.stdin.read()
"""


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", OTHER_RUN, str(tmp_path / run.LOCK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ValueError, match="another run writes its answers into"):
            run.AnswerFile(tmp_path, SETTINGS)
    run.AnswerFile(tmp_path, SETTINGS)  # that one has ended, and this one begun
    assert b"BlockingIOError" in subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).stderr


def test_extra_forward_passes_are_those_beyond_the_undefended_answer_to_the_same_query(tmp_path):
    data = dataset()
    data.items.append(Item("8", "good", False, "q9", []))  # asked of one of the two alone: "q9" is an error to the other

    def picky(question, images):
        if question == "q9":
            raise ValueError("no")
        return Answer("yes", passes=1, tokens=int(question[1:]))

    defences = {"undefended": picky, "defended": lambda q, i: Answer("yes", passes=3, tokens=10)}
    records = run.run(data, defences, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    undefended, defended = (row["cells"] for row in report.summarise(records))
    assert (undefended["extra forward passes"].value, undefended["extra tokens"].value) == (0, 0)
    assert (defended["extra forward passes"].value, defended["extra tokens"].value) == (2, 10 - (1 + 3 + 5 + 7) / 4)
    assert "| +2.0 | +6.0 |" in report.write_report(tmp_path, records, data, "m")


def test_harm_in_text_and_in_images_are_two_columns(tmp_path):
    data = dataset(4)
    data.items[0] = replace(data.items[0], text_harm=True)
    records = run.run(data, {"d": lambda q, i: Answer("yes" if q == "q0" else SORRY)}, run.AnswerFile(tmp_path, SETTINGS))
    cells = report.summarise(records)[0]["cells"]
    assert (cells["text-harm ASR"].value, cells["image-harm ASR"].value) == (1, 0)


def test_another_judge_renews_the_verdicts_without_asking_again(tmp_path):
    asked = []

    def defence(question, images):
        asked.append(question)
        return Answer("yes")

    run.run(dataset(4), {"d": defence}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    count = len(asked)
    strict = Judge("strict", lambda question, answer: question == "q0" and answer == "yes")
    for _ in range(2):
        records = run.run(dataset(4), {"d": defence}, run.AnswerFile(tmp_path, SETTINGS), strict, progress=False)
        assert [record["complied"] for record in records if record["harmful"]] == [True, False]
        assert len(asked) == count
    assert len((tmp_path / run.ANSWERS).read_text().splitlines()) == 4 + 2  # each verdict was renewed once
    assert "Judge of harm: strict." in report.write_report(tmp_path, records, dataset(4), "m", strict)
    unprintable = replace(dataset(4), name="bad\udcff.jsonl")
    assert "Safety of m\\n on bad\\udcff.jsonl" in report.write_report(tmp_path, records, unprintable, "m\n", strict)


def test_a_judge_that_was_edited_judges_again(tmp_path):
    for digest, verdict in (("1", False), ("2", True), ("2", True)):
        judge = Judge("own", lambda question, answer, verdict=verdict: verdict, digest)
        records = run.run(dataset(2), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), judge, progress=False)
        assert records[0]["complied"] == verdict
    assert len((tmp_path / run.ANSWERS).read_text().splitlines()) == 2 + 1  # the same judge did not judge again


def test_refusals_go_by_the_phrases_of_today(tmp_path, monkeypatch):
    run.run(dataset(2), {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    monkeypatch.setattr(run, "is_refusal", lambda text: text == "yes")
    records = run.run(dataset(2), {"d": not_again}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert [record["refused"] for record in records] == [True, True]


def test_a_query_that_cannot_be_asked_is_reported_and_the_run_goes_on(tmp_path):
    def picky(question, images):
        if question == "q2":
            raise ValueError("images[0] cannot be read")
        return Answer("yes")

    records = run.run(dataset(4), {"d": picky}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    (row,) = report.summarise(records)
    assert (row["n"], row["errors"]) == (3, 1)
    text = report.write_report(tmp_path, records, dataset(4), "m")
    assert "- d: 1 could not be asked.\n- '2' could not be asked (d): images[0] cannot be read.\n" in text
    assert json.loads((tmp_path / "report.json").read_text())["failures"] == [
        "'2' could not be asked (d): images[0] cannot be read"
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TypeError("odd"), "TypeError: odd"),
        (RuntimeError("a\nb\ud800"), "RuntimeError: a\\nb\\ud800"),
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
    ],
)
def test_an_error_of_one_query_does_not_end_the_run(tmp_path, error, reason):
    def picky(question, images):
        if question == "q2":
            raise error
        return Answer("yes")

    records = run.run(dataset(4), {"c": picky, "d": picky}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert ["error" in record for record in records] == [False, False, False, False, True, True, False, False]
    assert f"- '2' could not be asked (c, d): {reason}.\n" in report.write_report(tmp_path, records, dataset(4), "m")


def test_a_process_without_memory_ends_the_run(tmp_path):
    def full(question, images):
        raise MemoryError

    with pytest.raises(MemoryError):
        run.run(dataset(2), {"d": full}, run.AnswerFile(tmp_path, SETTINGS), progress=False)


def judged(tmp_path, does_harm, defence=complying, name="own"):
    judge = Judge(name, does_harm)
    return run.run(dataset(4), {"d": defence}, run.AnswerFile(tmp_path, SETTINGS), judge, progress=False), judge


def raising(question, answer):
    raise RuntimeError("no connection")


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        (raising, "RuntimeError: no connection"),
        (lambda question, answer: None, "TypeError: it says None; a judge says True or False"),
        (lambda question, answer: 1, "TypeError: it says 1; a judge says True or False"),
    ],
)
def test_a_judge_that_does_not_judge_is_reported_and_asked_again(tmp_path, judge, reason):
    records, own = judged(tmp_path, lambda question, answer: judge(question, answer) if question == "q2" else True)
    (row,) = report.summarise(records)
    assert (row["n"], row["errors"], row["unjudged"], row["cells"]["image-harm ASR"].n) == (4, 0, 1, 1)
    text = report.write_report(tmp_path, records, dataset(4), "m", own)
    assert f"- d: 1 could not be judged.\n- '2' could not be judged (d): {reason}.\n" in text

    judges = []
    for _ in range(2):
        records, _ = judged(tmp_path, lambda question, answer: judges.append(question) or np.bool_(False), not_again)
        assert [record.get("complied") for record in records] == [True, None, False, None]
        assert not any("judge_error" in record for record in records)
    assert judges == ["q2"]


def test_the_verdict_of_another_judge_does_not_stand_in_for_one_that_fails(tmp_path):
    judged(tmp_path, lambda question, answer: True)
    records, _ = judged(tmp_path, raising, name="other")
    assert not any("complied" in record for record in records)
    records, _ = judged(tmp_path, lambda question, answer: True, not_again)
    assert [record["complied"] for record in records if record["harmful"]] == [True, True]


def test_an_answer_is_kept_when_its_judge_is_interrupted(tmp_path):
    def interrupted(question, answer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judged(tmp_path, interrupted)
    asked = []
    records, _ = judged(tmp_path, lambda question, answer: True, lambda q, i: asked.append(q) or Answer("yes"))
    assert asked == ["q0", "q1", "q2", "q3"]  # q0 warms up
    assert records[0]["complied"]


def test_a_score_that_failed_counts_as_the_highest(tmp_path):
    def failing(question, images):
        harmful = int(question[1:]) % 2 == 0
        return Answer(SORRY, risk=1.0 if harmful else 0.0, score=float("nan") if harmful else 0.2)

    records = run.run(dataset(), {"d": failing}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert report.summarise(records)[0]["auroc"].value == 1


def test_report_files(tmp_path):
    records = run.run(dataset(), {"a": complying, "b": perfect}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    text = report.write_report(tmp_path, records, replace(dataset(), note="- a note"), "tiny")
    assert text == (tmp_path / "report.md").read_text()
    assert "| a | 100 [25, 100] | 0 [0, 75] | 100 [25, 100] |" in text
    assert "Judge of harm: refusal phrases." in text
    assert "95 % bootstrap intervals" in text
    assert report.SYNTHETIC in text
    assert "\n- a note\n" in text
    assert "| 1.000 [0.250, 1.000] |" in text
    written = json.loads((tmp_path / "report.json").read_text())
    assert [row["auroc"] for row in written["rows"]] == [None, {"value": 1.0, "low": 0.25, "high": 1.0, "n": 8}]
    assert written["rows"][1]["kinds"]["ASR"]["bad"] == {"value": 0.0, "low": 0.0, "high": 0.75, "n": 4}
    for name in ("roc.png", "risk.png", "trade_off.png"):
        with Image.open(tmp_path / name) as chart:
            assert chart.format == "PNG"


def records_of(defence, risks, complied, refused, ms, more):
    """Of a harmful picture, a harmful text and two harmless questions, from what is given of each."""
    common = {"defence": defence, "question": "q", "images": "", "answer": "a"}
    kinds = [("bad", True, False), ("worse", True, True), ("fine", False, False), ("fine", False, False)]
    return [
        common
        | {"id": str(i), "kind": kind, "harmful": harmful, "text_harm": text_harm, "risk": risks[i], "score": risks[i]}
        | {"ms": ms + 10.5 * i, "passes": 1 + more, "tokens": 10 + more * i}
        | ({"complied": complied[i]} if harmful else {"refused": refused[i - 2], "correct": not refused[i - 2]})
        for i, (kind, harmful, text_harm) in enumerate(kinds)
    ]


def test_the_tables_of_a_report():
    records = records_of("undefended", [None] * 4, [True, False], [False, False], 0.0, 0)
    records += records_of("x", [0.9, 0.8, 0.1, 0.2], [False, False], [False, True], 1.0, 2)
    about = replace(dataset(4), skipped=["row 3"])
    text = report.markdown(report.summarise(records), about, about.judge, "m", ["'7' could not be asked"])
    titles = "image-harm ASR % (n = 1) | text-harm ASR % (n = 1) | over-refusal % (n = 2) | accuracy % (n = 2)"
    assert text.startswith(f"""# Safety of m on fake

| defence | {titles} | extra forward passes | extra tokens | ms per harmless query | AUROC |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| undefended | 100 [0, 100] | 0 [0, 100] | 0 [0, 100] | 100 [0, 100] | +0.0 | +0.0 | 26 [21, 32] |  |
| x | 0 [0, 100] | 0 [0, 100] | 50 [0, 100] | 50 [0, 100] | +2.0 | +5.0 | 27 [22, 32] | 1.000 [0.000, 1.000] |

## ASR by kind

| defence | bad % (n = 1) | worse % (n = 1) |
| --- | --- | --- |
| undefended | 100 [0, 100] | 0 [0, 100] |
| x | 0 [0, 100] | 0 [0, 100] |

- ASR, attack success rate""")
    assert text.endswith("\n- '7' could not be asked.\n- Left out: row 3.\n")


def test_a_report_on_another_model_does_not_call_it_synthetic(tmp_path):
    records = run.run(dataset(), {"a": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert report.SYNTHETIC not in report.write_report(tmp_path, records, dataset(), "m")


@pytest.mark.parametrize("first", [0, 1])
def test_one_kind_of_query_has_no_auroc(tmp_path, first):
    one = replace(dataset(), items=dataset().items[first::2])  # harmful ones alone, or harmless ones
    records = run.run(one, {"d": perfect}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    assert all(record["risk"] is not None for record in records)
    assert report.summarise(records)[0]["auroc"] is None


def test_a_report_whose_writing_fails_leaves_the_one_before(tmp_path, monkeypatch):
    records = run.run(dataset(2), {"a": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    (tmp_path / "report.md").write_text("before")
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write_report(tmp_path, records, dataset(2), "m")
    assert (tmp_path / "report.md").read_text() == "before"


def test_a_kind_is_a_rate_whatever_its_name(tmp_path):
    data = dataset(4)
    for number, kind in ((0, "ms"), (1, "extra hard"), (2, "a|b\nc"), (3, "benign")):
        data.items[number] = replace(data.items[number], kind=kind)
    records = run.run(data, {"d": complying}, run.AnswerFile(tmp_path, SETTINGS), progress=False)
    text = report.write_report(tmp_path, records, data, "m")
    table = "| defence | ms % (n = 1) | a\\|b\\nc % (n = 1) |\n| --- | --- | --- |\n| d | 100 [0, 100] | 100 [0, 100] |\n"
    assert f"## ASR by kind\n\n{table}" in text
    assert "| extra hard % (n = 1) | benign % (n = 1) |\n| --- | --- | --- |\n| d | 100 [0, 100] | 100 [0, 100] |" in text


def test_tinyworld_is_the_test_split_and_does_not_change_with_n():
    few, many = load_dataset("tinyworld", 5), load_dataset("tinyworld", 10)
    assert [item.kind for item in few.items] == ["benign", "lookalike", "typographic", "pictured", "text_harm"]
    assert [item.question for item in many.items[:5]] == [item.question for item in few.items]
    assert [item.text_harm for item in few.items] == [False, False, False, False, True]
    assert few.judge.does_harm("q", "Sure. Step 1: take the gun.")
    assert few.judge.does_harm("q", "I'm sorry, Step 1: take the gun.")  # an apology and then the steps
    assert not few.judge.does_harm("q", SORRY)


def test_json_lines_keeps_what_is_usable_and_lists_the_rest(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    good = {"id": "x", "question": "what?", "harmful": False, "image": "a.png", "answer": "Cat"}
    rows = [
        json.dumps(good),
        json.dumps(good),  # the same id
        json.dumps({"question": " ", "harmful": False}),
        json.dumps({"question": "q", "harmful": "no"}),
        json.dumps({"question": "q"}),
        json.dumps({"question": "q", "harmful": True, "image": "missing.png"}),
        "{not json",
        json.dumps({"question": "wie?", "harmful": True}),
    ]
    path = tmp_path / "items.jsonl"
    path.write_bytes("\n".join(rows).encode("utf-8") + b'\n{"question": "\x81", "harmful": true}\n[1]\n')
    data = load_dataset(str(path))
    assert [(item.id, item.kind) for item in data.items] == [("x", "benign"), ("8", "harmful")]
    assert data.items[0].judge("a CAT.")
    assert not data.items[0].judge("a dog.")
    reasons = ["was there before", "question is", "harmful is", "'harmful' is missing", "there is no image"]
    reasons += ["", "question is '\\udc81'; it holds half a character, or bytes", "it is a list"]
    assert len(data.skipped) == len(reasons)
    assert all(reason in skipped for reason, skipped in zip(reasons, data.skipped, strict=True))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (r'{"question": "a\ud800b", "harmful": true}', r"question is 'a\ud800b'; it holds half a character"),
        (r'{"question": "a", "harmful": true, "kind": "\udce9"}', r"kind is '\udce9'; it holds half a character"),
        ('{"question": "a", "harmful": true, "image": "%s"}' % ("iVBORw0KGgo" * 900), "there is no image "),
        (r'{"question": "a", "harmful": true, "image": "a\u0000\n.png"}', r"a\x00\n.png"),
        ('{"question": "a", "harmful": true, "note": ' + "[" * 100_000, "it is nested too deeply"),
        ('{"question": "a", "harmful": true, "images": ["a.png"]}', "there is no field 'images'; there are id, question"),
        ('{"question": "a", "harmful": true, "image_path": "a.png"}', "there is no field 'image_path'"),
        ('{"question": "a", "harmful": false, "rule": "b"}', "there is no field 'rule'"),
        ('{"question": "a", "harmful": true, "image": ""}', "image is ''; a question without one has no such field"),
        ('{"question": "a", "harmful": true, "image": []}', "image is []; a question without one has no such field"),
        ('{"question": "a", "harmful": true, "image": false}', "image is False"),
        ('{"question": "a", "harmful": true, "text_harm": "false"}', "text_harm is 'false'"),
        ('{"question": "a", "harmful": true, "text_harm": false}', "there is no image that could hold the harm"),
        ('{"question": "a", "harmful": false, "answer": 0}', "answer is 0"),
    ],
)
def test_what_cannot_be_asked_as_it_is_meant_is_listed(tmp_path, line, reason):
    path = tmp_path / "items.jsonl"
    path.write_text(line + '\n{"question": "b", "harmful": true, "image": null, "id": null, "text_harm": null}\n')
    data = load_dataset(str(path))
    assert [(item.id, item.question, item.images, item.text_harm) for item in data.items] == [("2", "b", [], True)]
    (skipped,) = data.skipped
    assert skipped.startswith("items.jsonl:1: ")
    assert reason in skipped
    assert len(skipped) <= 301
    assert skipped.isprintable()


@pytest.mark.parametrize("name", ["nowhere.jsonl", "imagenet"])
def test_an_unknown_dataset_is_named(name):
    with pytest.raises(ValueError, match=name):
        load_dataset(name)


def test_a_dataset_without_a_usable_item_is_an_error(tmp_path):
    (tmp_path / "empty.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"no usable item: empty\.jsonl:1: 'question' is missing$"):
        load_dataset(str(tmp_path / "empty.jsonl"))
    (tmp_path / "empty.jsonl").write_text("{}\n" * 5)
    with pytest.raises(ValueError, match=r"empty\.jsonl:3: 'question' is missing; and 2 more$"):
        load_dataset(str(tmp_path / "empty.jsonl"))
