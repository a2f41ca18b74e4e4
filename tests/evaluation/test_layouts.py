"""Every public layout on a few items made here in that layout, and what happens to the items that cannot be used."""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from ras_fast.evaluation.datasets import load_dataset
from ras_fast.evaluation.layouts import CHOICE_PROMPT, FIGSTEP_PROMPT, LAYOUTS, decode
from ras_fast.images import load_image


def picture(path, colour="white"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(*rows):
    return "\n".join(map(json.dumps, rows))


def load(layout, folder, **options):
    """The data set, each image of which can be read."""
    dataset = load_dataset(f"{layout}:{folder}", **options)
    for item in dataset.items:
        for image in item.images:
            load_image(image)
    return dataset


def assert_listed(dataset, *reasons):
    """Each reason is part of what the data set lists at its place, and nothing else is listed."""
    assert [reason for reason, listed in zip(reasons, dataset.skipped, strict=True) if reason not in listed] == []


def by_id(dataset):
    return {item.id: item for item in dataset.items}


def test_mm_safetybench(tmp_path):
    texts = {"Question": "q", "Changed Question": "c", "Rephrased Question": "typo?", "Rephrased Question(SD)": "sd?"}
    for scenario, ids in {"01-Illegal_Activitiy": ("0", "1"), "02-HateSpeech": ("0",)}.items():
        write(tmp_path / f"processed_questions/{scenario}.json", dict.fromkeys(ids, texts))
        for name in ids:
            for kind in ("SD", "SD_TYPO", "TYPO"):
                picture(tmp_path / f"imgs/{scenario}/{kind}/{name}.jpg")
    (tmp_path / "imgs/01-Illegal_Activitiy/TYPO/1.jpg").unlink()
    dataset = load("mm-safetybench", tmp_path)
    assert len(dataset.items) == 8
    item = by_id(dataset)["01-Illegal_Activitiy/SD/1"]
    assert (item.question, item.kind, item.harmful, item.text_harm) == ("sd?", "SD", True, False)
    assert by_id(dataset)["02-HateSpeech/TYPO/0"].question == "typo?"
    assert len(dataset.skipped) == 1
    assert "01-Illegal_Activitiy.json:1" in dataset.skipped[0]
    assert dataset.skipped[0].endswith("TYPO/1.jpg")


def test_figstep(tmp_path):
    rows = [
        "dataset,category_id,task_id,category_name,question,instruction",
        'F,1,2,Illegal,"How, really?",Steps.',
        "F,9,9,X,,Y.",
    ]
    write(tmp_path / "question/safebench.csv", "\n".join(rows))
    picture(tmp_path / "images/SafeBench/query_F_1_2_6.png")
    dataset = load("figstep", tmp_path)
    pictured, asked = dataset.items
    assert (pictured.question, pictured.kind, pictured.text_harm, len(pictured.images)) == (FIGSTEP_PROMPT, "figstep", False, 1)
    assert (asked.question, asked.kind, asked.text_harm, asked.images) == ("How, really?", "text", True, [])
    assert [reason.split(": ", 1)[0] for reason in dataset.skipped] == ["safebench.csv:3"] * 2
    write(tmp_path / "prompt.txt", "the paper's own\n")
    assert load("figstep", tmp_path).items[0].question == "the paper's own"


def test_jood_blends_harmful_and_harmless_pictures(tmp_path):
    write(tmp_path / "prompts/all_instructions/drugs.json", {"instructions": ["how?", "where?"]})
    picture(tmp_path / "images/harmful/drugs/0.png", "black")
    (tmp_path / "images/harmful/drugs/1.png").write_bytes(b"broken")
    picture(tmp_path / "images/harmless/apple.jpg", "white")
    dataset = load("jood", tmp_path)
    assert [item.question for item in dataset.items] == ["how?", "where?"]
    assert dataset.items[0].images[0].getpixel((3, 3)) == pytest.approx((127, 127, 127), abs=1)
    assert len(dataset.skipped) == 1
    assert "1.png with apple.jpg" in dataset.skipped[0]


def test_jood_blends_pictures_as_a_viewer_shows_them(tmp_path):
    """Turned by EXIF, transparency on white, and 16-bit grey by its upper bits."""
    write(tmp_path / "prompts/all_instructions/drugs.json", {"instructions": ["how?"]})
    folder, exif = tmp_path / "images/harmful/drugs", Image.Exif()
    folder.mkdir(parents=True)
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "black").save(folder / "0.png", exif=exif)
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "1.png")
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(folder / "2.png")
    picture(tmp_path / "images/harmless/apple.png", "white")
    shown = [item.images[0] for item in load("jood", tmp_path).items]
    assert [image.size for image in shown] == [(4, 8), (8, 8), (8, 8)]
    assert [image.getpixel((1, 1))[0] for image in shown] == pytest.approx([127, 255, 159], abs=1)


def test_a_scenario_of_jood_without_pictures_or_instructions_is_listed(tmp_path):
    for scenario, texts in {"arms": ["how?"], "drugs": ["how?"], "theft": []}.items():
        write(tmp_path / f"prompts/all_instructions/{scenario}.json", {"instructions": texts})
    picture(tmp_path / "images/harmful/drugs/0.png")
    picture(tmp_path / "images/harmful/theft/0.png")
    picture(tmp_path / "images/harmless/apple.jpg")
    dataset = load("jood", tmp_path)
    assert [item.id for item in dataset.items] == ["drugs/0.png/0"]
    assert [reason.split(":")[0] for reason in dataset.skipped] == ["arms.json", "theft.json"]
    assert dataset.skipped[0].endswith("arms holds no picture")


def test_vlsafe(tmp_path):
    rows = [
        {"image_id": "1.jpg", "caption": "c", "query": "how?"},
        {"image_id": "2.jpg", "query": "why?"},
        {"image_id": "1.jpg"},
    ]
    write(tmp_path / "VLSafe_harmlessness_examine.jsonl", lines(*rows))
    picture(tmp_path / "train2017/1.jpg")
    dataset = load("vlsafe", tmp_path)
    (item,) = dataset.items
    assert (item.question, item.harmful, item.text_harm) == ("how?", True, True)
    assert "there is no image" in dataset.skipped[0]
    assert "question is None" in dataset.skipped[1]


def test_tovilag(tmp_path):
    names = {
        "Mono_NontoxicImg_ToxicText_500Samples_convert4test": ("COCO_val2014_1.jpg", "toxic text"),
        "Mono_NontoxicText_ToxicImg_500Samples_porn_bloody_convert4test": ("bloody/1.jpg", "toxic image"),
        "cotoxic_500Samples_convert4test2": ("bloody/2.jpg", "both toxic"),
    }
    for name, (image, _) in names.items():
        write(tmp_path / f"{name}.jsonl", lines({"image_pth": image, "query": "describe"}))
        picture(tmp_path / (f"COCO2014/{image}" if image.startswith("COCO") else image))
    write(tmp_path / "Mono_NontoxicText_ToxicImg_1000Samples_porn_bloody_train.jsonl", lines({"query": "not for tests"}))
    items = load("tovilag", tmp_path).items
    assert {item.kind: item.text_harm for item in items} == {"toxic text": True, "toxic image": False, "both toxic": False}


def test_spa_vl(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    (tmp_path / "test").mkdir()
    for kind in ("harm", "help"):
        images = [
            {"bytes": file.getvalue(), "path": "a.png"},
            {"bytes": b"broken", "path": "b.png"},
            {"bytes": None, "path": "c"},
        ]
        table = pyarrow.table({"image": images, "question": [f"{kind}?", "x", "y"], "class1": ["a", "b", "c"]})
        parquet.write_table(table, tmp_path / f"test/{kind}-00000-of-00001.parquet")
    (tmp_path / "test/help-00001-of-00002.parquet").write_bytes(b"broken")
    dataset = load("spa-vl", tmp_path)
    assert [(item.question, item.harmful) for item in dataset.items] == [("harm?", True), ("help?", False)]
    assert len(dataset.skipped) == 5
    assert load_image(dataset.items[0].images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_xstest(tmp_path):
    rows = [
        "id,prompt,type,label,focus,note",
        "1,Kill a process?,homonyms,safe,kill,",
        "26,Kill it?,contrast_homonyms,unsafe,,",
    ]
    write(tmp_path / "xstest_prompts.csv", "\n".join([*rows, "26,Again?,contrast_homonyms,unsafe,,"]))
    dataset = load("xstest", tmp_path)
    assert [(item.id, item.harmful, item.kind) for item in dataset.items] == [
        ("1", False, "borderline"),
        ("26", True, "contrast"),
    ]
    assert dataset.skipped == ["xstest_prompts.csv:4: id '26' was there before"]


@pytest.mark.parametrize("heading", ["id,prompt,label", "1,ok?,homonyms", "id;prompt;type"])
def test_xstest_without_its_columns_is_an_error(tmp_path, heading):
    write(tmp_path / "xstest_prompts.csv", f"{heading}\n1,Kill it?,unsafe\n")
    with pytest.raises(ValueError, match=r"no usable item: xstest_prompts\.csv: its heading .* lacks .*'type'"):
        load("xstest", tmp_path)


def test_a_prompt_of_xstest_counts_as_harmless_only_when_its_type_says_so(tmp_path):
    rows = ["id,prompt,type", "1,Kill it?", "2,Kill it,now?,contrast_x", "3,Kill it?, ", "4,Kill it?,Contrast_x", "5,ok?,x"]
    write(tmp_path / "xstest_prompts.csv", "\n".join(rows))
    dataset = load("xstest", tmp_path)
    assert [(item.id, item.harmful) for item in dataset.items] == [("4", True), ("5", False)]
    reasons = ["csv:2: it has 2 fields, the heading has 3", "csv:3: it has 4 fields", "csv:4: type is empty"]
    assert_listed(dataset, *reasons)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ('2,"open,x', "csv:3: unexpected end of data, and with it all up to line 6"),
        ('2,"open,x\n3,"a",x', "csv:3: ',' expected after '\"', and with it all up to line 4"),
        (f'2,"{"a" * 140_000}",x', "csv:3: field larger than field limit"),
        ('2,"a"b,x', "csv:3: ',' expected after '\"'"),
    ],
)
def test_a_broken_row_of_a_table_is_listed_with_what_it_takes_along(tmp_path, broken, reason):
    write(tmp_path / "xstest_prompts.csv", "\n".join(["id,prompt,type", "1,a,x", broken, "7,b,x", "8,c,x", "9,d,x"]))
    dataset = load("xstest", tmp_path)
    assert [item.id for item in dataset.items] == (["1"] if "end of data" in reason else ["1", "7", "8", "9"])
    assert len(dataset.skipped) == 1
    assert reason in dataset.skipped[0]


def test_mm_vet(tmp_path):
    rows = {
        "v1_0": {"imagename": "v1_0.png", "question": "x?", "answer": "-1<AND>-5", "capability": ["ocr"]},
        "v1_1": {"imagename": "v1_0.png", "question": "y?", "answer": "cat<OR>kitten"},
        "v1_2": {"imagename": "v1_0.png", "question": "z?"},
    }
    write(tmp_path / "mm-vet.json", rows)
    picture(tmp_path / "images/v1_0.png")
    dataset = load("mm-vet", tmp_path)
    both, either = dataset.items
    assert (both.judge("x = -1 or x = -5"), both.judge("x = -1"), either.judge("A Kitten.")) == (True, False, True)
    assert "answer is" in dataset.skipped[0]


def test_gqa(tmp_path):
    row = {"imageId": "n1", "question": "Is it?", "answer": "no", "semantic": [{"operation": "x"}], "annotations": {"q": {}}}
    write(tmp_path / "testdev_balanced_questions.json", {"201": row, "202": row | {"imageId": "n2"}})
    picture(tmp_path / "images/n1.jpg")
    dataset = load("gqa", tmp_path)
    (item,) = dataset.items
    assert (item.id, item.judge("No."), item.judge("nothing")) == ("201", True, False)
    assert dataset.skipped[0].endswith("images/n2.jpg")


def test_a_key_that_is_there_twice_is_listed(tmp_path):
    row = json.dumps({"imageId": "n1", "question": "Is it?", "answer": "no"})
    write(tmp_path / "testdev_balanced_questions.json", f'{{"1": {row}, "1": {row}, "2": 5}}')
    picture(tmp_path / "images/n1.jpg")
    dataset = load("gqa", tmp_path)
    assert [item.id for item in dataset.items] == ["1"]
    assert ["was there before" in dataset.skipped[0], "it is a int" in dataset.skipped[1]] == [True, True]


@pytest.mark.parametrize("given", ["{}", "MME", "./MME/", "../MME/MME"])
def test_mme_of_a_folder_however_it_is_given(tmp_path, monkeypatch, given):
    folder = tmp_path / "MME" / "MME"
    write(folder / "count/000.txt", "Are there two?\tYes\n")
    picture(folder / "count/000.png")
    monkeypatch.chdir(folder.parent)
    dataset = load_dataset(f"mme:{given.format(folder)}")
    assert [item.id for item in dataset.items] == ["count/000/1"]
    assert not dataset.skipped


def test_mme_in_both_of_its_forms(tmp_path):
    write(tmp_path / "count/000.txt", "Are there two?\tYes\nAre there six?\tNo\n\n")
    picture(tmp_path / "count/000.png")
    write(tmp_path / "artwork/questions_answers_YN/7.txt", "Is it old?\tno\nNo answer\nIs it new?\tMaybe\n")
    picture(tmp_path / "artwork/images/7.jpg")
    dataset = load("mme", tmp_path)
    items = by_id(dataset)
    assert list(items) == ["artwork/7/1", "count/000/1", "count/000/2"]
    assert items["count/000/2"].question == "Are there six?"
    assert [items["count/000/2"].judge(text) for text in ("No, yes would be wrong.", "Yes.", "nothing")] == [True, False, False]
    assert items["artwork/7/1"].kind == "artwork"
    assert len(dataset.skipped) == 2


def test_scienceqa(tmp_path):
    row = {"question": "Which?", "choices": ["iron", "wood"], "answer": 1, "hint": "Look.", "image": "image.png"}
    bare = row | {"image": None, "hint": ""}
    rows = {"1": row, "2": bare, "3": row, "4": bare | {"answer": 5}, "5": bare | {"choices": None}}
    rows |= {"6": bare | {"choices": 5}, "7": bare | {"answer": True}, "8": bare | {"question": 5}}
    write(tmp_path / "problems.json", rows)
    write(tmp_path / "pid_splits.json", {"train": ["3"], "test": [*"124567", ["1"], "8", "9"]})
    picture(tmp_path / "images/test/1/image.png")
    dataset = load("scienceqa", tmp_path)
    shown, told = dataset.items
    assert shown.question == f"Look. Which? (A) iron (B) wood {CHOICE_PROMPT}"
    assert told.question == f"Which? (A) iron (B) wood {CHOICE_PROMPT}"
    assert (len(shown.images), told.images) == (1, [])
    right = ("B", "(B) wood", "The answer is B", "It is wood.", "A magnet attracts none, wood.")
    wrong = ("A", "(A).", "The answer is (A).", "iron", "iron or wood", "")
    assert [shown.judge(text) for text in right] == [True] * 5
    assert [shown.judge(text) for text in wrong] == [False] * 6
    reasons = ["answer is 5", "choices is None", "choices is 5", "answer is True", "question is 5"]
    reasons += ["problems.json holds no usable '9'", "problems.json holds no usable \"['1']\""]
    assert_listed(dataset, *reasons)


def test_a_broken_file_is_listed_once_and_the_others_are_read(tmp_path):
    texts = {"Rephrased Question": "typo?", "Rephrased Question(SD)": "sd?"}
    for name, content in {"a": "{", "b": [1], "c": {"0": texts}}.items():
        write(tmp_path / f"processed_questions/{name}.json", content)
        for kind in ("SD", "SD_TYPO", "TYPO"):
            picture(tmp_path / f"imgs/{name}/{kind}/0.jpg")
    dataset = load("mm-safetybench", tmp_path)
    assert len(dataset.items) == 3
    assert [reason.split(": ")[0] for reason in dataset.skipped] == ["a.json", "b.json"]

    write(tmp_path / "problems.json", {"1": {"question": "?", "choices": ["a"], "answer": 0}})
    for splits in ("{", {"train": []}, {"test": "1"}):
        write(tmp_path / "pid_splits.json", splits)
        with pytest.raises(ValueError, match=r"no usable item: pid_splits\.json: [^;]*$"):
            load("scienceqa", tmp_path)


def test_mixed_encodings(tmp_path):
    rows = [
        "id,prompt,type".encode("utf-8-sig"),
        "1,Une piñata?,x".encode(),
        "2,Une piñata?,x".encode("cp1252"),
        b"3,\x81,x",
        b"4,a,x",
    ]
    (tmp_path / "xstest_prompts.csv").write_bytes(b"\n".join(rows))
    dataset = load("xstest", tmp_path)
    assert [(item.id, item.question) for item in dataset.items] == [("1", "Une piñata?"), ("2", "Une piñata?"), ("4", "a")]
    assert len(dataset.skipped) == 1
    assert dataset.skipped[0].startswith("xstest_prompts.csv:4: ")


def test_a_text_of_another_encoding_spoils_no_other_text_of_its_document(tmp_path):
    texts = {"1": "日本?".encode(), "2": "café?".encode("cp1252"), "3": "日本".encode() + b"\xe9?", "4": b"a\x81?"}
    row = b'"%s": {"imageId": "n1", "question": "%s", "answer": "no"}'
    content = b", ".join(row % (key.encode(), text) for key, text in texts.items())
    (tmp_path / "testdev_balanced_questions.json").write_bytes(b"{%s}" % content)
    picture(tmp_path / "images/n1.jpg")
    dataset = load("gqa", tmp_path)
    assert {item.id: item.question for item in dataset.items} == {"1": "日本?", "2": "café?"}
    reasons = ["json:3: question is '日本\\udce9?'; it holds half a character", "json:4: question is 'a\\udc81?'"]
    assert_listed(dataset, *reasons)


def test_a_document_that_is_nested_too_deeply_is_listed(tmp_path):
    write(tmp_path / "testdev_balanced_questions.json", '{"1": ' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"questions\.json: it is nested too deeply"):
        load("gqa", tmp_path)


def test_decode():
    assert decode("\ufeffé".encode()) == "é"
    assert decode("é".encode("latin-1")) == "é"
    assert decode(b"\x81") == "\udc81"  # neither
    assert decode("é".encode() + b"\xe9") == "é\udce9"  # both


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_without_the_files_is_an_error_that_names_one(layout, tmp_path):
    if layout == "spa-vl":
        pytest.importorskip("pyarrow")  # without which the files are not looked for
    with pytest.raises(ValueError, match=r"no usable item: .*(json|csv|parquet|picture|txt)"):
        load_dataset(f"{layout}:{tmp_path}")


def test_without_pyarrow_its_layout_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"stored as parquet; pip install pyarrow"):
        load_dataset(f"spa-vl:{tmp_path}")


def test_a_folder_that_is_not_there(tmp_path):
    for folder in (tmp_path / "nowhere", ""):
        with pytest.raises(ValueError, match=r"there is no folder .*; it needs to be gqa:FOLDER"):
            load_dataset(f"gqa:{folder}")


def test_n_draws_by_the_seed(tmp_path):
    rows = [f"{i},question {i},{'contrast_x' if i % 2 else 'x'}" for i in range(100)]
    write(tmp_path / "xstest_prompts.csv", "\n".join(["id,prompt,type", *rows]))
    first, again, other = (load("xstest", tmp_path, n=10, seed=seed).items for seed in (1, 1, 2))
    assert first == again
    assert len(first) == 10
    assert {item.id for item in first} != {item.id for item in other}
    assert [int(item.id) for item in first] == sorted(int(item.id) for item in first)
