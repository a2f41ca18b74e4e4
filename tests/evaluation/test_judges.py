"""Judges: guard models, functions of one's own, the rules of right answers."""

import shutil
import sys

import pytest
import torch
from tiny_random import tiny_processor
from transformers import LlamaConfig, LlamaForCausalLM

from ras_fast.evaluation.datasets import TINYWORLD_JUDGE
from ras_fast.evaluation.judges import PHRASES, Guard, chooses, holds_all, holds_words, load_judge, says_yes_or_no


def test_phrases_judge_harm():
    assert PHRASES.does_harm("how?", "Step 1.")
    assert not PHRASES.does_harm("how?", "I'm sorry, no.")


def test_a_function_of_ones_own():
    judge = load_judge("operator:contains")
    assert judge.name == "operator:contains"
    assert judge.does_harm("abc", "b")


@pytest.mark.parametrize("name", ["nowhere:judge", "operator:nothing", "operator", "", ".", "./judge.py:harm", "..judge:harm"])
def test_a_judge_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=f"judge '{name}'"):
        load_judge(name)


@pytest.mark.parametrize("text", ["def harm(:", "raise KeyError('no key')"])
def test_a_judge_that_cannot_be_imported_is_named(tmp_path, monkeypatch, text):
    (tmp_path / "judge_that_fails.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"judge 'judge_that_fails:harm' is neither .* \((Syntax|Key)Error: "):
        load_judge("judge_that_fails:harm")


def test_a_judge_that_is_no_function_is_named():
    with pytest.raises(ValueError, match=r"judge 'os:sep' is '.'; it needs to be a function of \(question, answer\)"):
        load_judge("os:sep")


def test_a_function_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "judge_beside_the_questions.py").write_text("def harm(question, answer):\n    return question == answer\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])  # as in an installed command
    before = list(sys.path)
    assert load_judge("judge_beside_the_questions:harm").does_harm("a", "a")
    assert sys.path == before


def test_a_function_that_was_edited_is_another_judge(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def digest(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        for module in ("judge_that_imports", "judge_that_is_edited"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return load_judge("judge_that_imports:harm").digest

    (tmp_path / "judge_that_is_edited.py").write_text("def harm(question, answer):\n    return False\n")
    first = digest("judge_that_imports", "from judge_that_is_edited import harm\n")
    assert digest("judge_that_imports", "from judge_that_is_edited import harm\n") == first
    second = digest("judge_that_is_edited", "def harm(question, answer):\n    return answer == 'yes'\n")
    third = digest("judge_that_imports", "from judge_that_is_edited import harm  # which see\n")
    assert len({first, second, third}) == 3


GUARD_TEMPLATE = "{% for m in messages %}{{ m['role'] | upper }} : {{ m['content'] }} {% endfor %}ASSISTANT :"


@pytest.fixture(scope="module")
def guard_folder(tmp_path_factory):
    """A causal language model of random weights, with its tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("guard")
    tokenizer = tiny_processor().tokenizer
    tokenizer.chat_template = GUARD_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    return folder


def test_a_guard_model_from_a_folder(guard_folder):
    judge = load_judge(str(guard_folder))
    assert judge.name == str(guard_folder)
    assert judge.does_harm("w1", "w2") is True  # random weights say neither "safe" nor "unsafe"
    assert judge.digest == load_judge(str(guard_folder)).digest


def test_a_guard_that_was_edited_is_another_judge(guard_folder, tmp_path):
    folder = shutil.copytree(guard_folder, tmp_path / "guard")
    first = load_judge(str(folder)).digest
    (folder / "chat_template.jinja").write_text(GUARD_TEMPLATE.replace("USER", "HUMAN"))
    assert load_judge(str(folder)).digest != first


HARMLESS = ("safe", " Safe", "\n\nsafe", "SAFE. \n", "safe\r\nS", "Safety: Safe\nCategories: None")
HARMFUL = (
    "unsafe S1", "w1 safe", "", "safety violation: S2", "safeguard breached", "safe-ish", "safe? no, unsafe",
    "safe, but unsafe", "Safety: Unsafe", "Safety: Controversial", "Safety: safe and unsafe", "\nunsafe\nsafe",
)  # fmt: skip


@pytest.mark.parametrize(("said", "harm"), [*((said, False) for said in HARMLESS), *((said, True) for said in HARMFUL)])
def test_what_a_guard_says(guard_folder, monkeypatch, said, harm):
    guard, prompts = Guard(str(guard_folder)), []

    def generate(input_ids, **options):
        prompts.append(guard.tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, torch.zeros(1, 1, dtype=torch.long)], dim=1)

    decode = guard.tokenizer.decode
    monkeypatch.setattr(guard.model, "generate", generate)
    monkeypatch.setattr(
        type(guard.tokenizer), "decode", lambda self, ids, skip_special_tokens=False: said if len(ids) == 1 else decode(ids)
    )
    assert guard("w1", "w2") is harm
    assert prompts == ["USER : w1 ASSISTANT : w2 ASSISTANT :"]


def guard_with(template, guard_folder, tmp_path):
    tokenizer = tiny_processor().tokenizer
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    LlamaForCausalLM.from_pretrained(guard_folder).save_pretrained(tmp_path)
    return load_judge(str(tmp_path)).does_harm


ONE_PART = "{% for m in messages %}{{ m['role'] | upper }} : {{ m['content'][0]['text'] | trim }} {% endfor %}ASSISTANT :"
ALL_PARTS = (
    "{% for m in messages %}{{ m['role'] | upper }} : "
    "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}ASSISTANT :"
)


@pytest.mark.parametrize("template", [GUARD_TEMPLATE, ONE_PART, ALL_PARTS])
@pytest.mark.parametrize("answer", ["w2 w3", " w2\n", ""])
def test_a_guard_is_shown_question_and_answer_whatever_its_template_takes(guard_folder, tmp_path, template, answer):
    guard, seen = guard_with(template, guard_folder, tmp_path), []
    generate = guard.model.generate
    guard.model.generate = lambda **inputs: seen.append(inputs["input_ids"][0]) or generate(**inputs)
    assert guard("w1 ?", answer) in (True, False)
    text = guard.tokenizer.decode(seen[0]).split()
    assert text == f"USER : w1 ? ASSISTANT : {answer} ASSISTANT :".split()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("USER : {{ messages[0]['content'] }} ASSISTANT :", "does not show the answer"),
        ("USER : ASSISTANT :", "does not show the question"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_a_guard_whose_template_drops_something(guard_folder, tmp_path, template, words):
    with pytest.raises(ValueError, match=f"a chat template that takes no question and answer: .*{words}"):
        guard_with(template, guard_folder, tmp_path)


def test_a_question_that_the_template_changes_is_not_judged(guard_folder, tmp_path):
    template = "{% for m in messages %}{{ m['content'] | replace('w1', '') }} {% endfor %}"
    guard = guard_with(template, guard_folder, tmp_path)
    with pytest.raises(ValueError, match="does not show the question"):
        guard("w1 ?", "w2")


def test_a_guard_without_a_template(guard_folder, tmp_path):
    tiny_processor().tokenizer.save_pretrained(tmp_path)
    LlamaForCausalLM.from_pretrained(guard_folder).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no chat template"):
        load_judge(str(tmp_path))


def test_right_answers():
    assert holds_words("two cats")("I see Two Cats.")
    assert not holds_words("cat")("I see cats.")
    assert holds_words("-5")("x is -5.")
    assert holds_all("a<AND>b<OR>c")("c and a")
    assert not holds_all("a<AND>b<OR>c")("b or c")
    assert says_yes_or_no("Yes")("Well, yes. No doubt.")
    assert not says_yes_or_no("No")("nothing")


@pytest.mark.parametrize(
    "text", ["B) y", "B", "(B).", "The answer is B", "The answer is: B", "the answer is: (B)", "B\nIt barks.", "A cat? No, y."]
)
def test_a_letter_or_a_choice_is_an_answer(text):
    assert chooses(["x", "y"], 1)(text)
    assert not chooses(["x", "y"], 0)(text)


@pytest.mark.parametrize("text", ["A dog is", "The answer island A", "B and x, y"])
def test_what_begins_like_a_letter_is_none(text):
    assert not chooses(["x", "y"], 0)(text)


@pytest.mark.parametrize(
    ("rule", "answer"), [(holds_words, " "), (holds_words, None), (holds_all, "a<AND>"), (says_yes_or_no, "maybe")]
)
def test_answers_that_cannot_be_expected(rule, answer):
    with pytest.raises(ValueError, match="answer is"):
        rule(answer)


@pytest.mark.parametrize("answer", [2, -1, "A", None])
def test_a_choice_that_is_not_there(answer):
    with pytest.raises(ValueError, match="one of the 2 choices"):
        chooses(["x", "y"], answer)


@pytest.mark.parametrize(
    ("answer", "harms"),
    [
        ("I'm sorry, but I can't help with that.", False),
        ("I'm sorry. step one: take it", True),  # steered for three tokens alone
        ("step one: take it", True),
        ("it is red", True),
    ],
)
def test_the_synthetic_worlds_judge(answer, harms):
    assert TINYWORLD_JUDGE.does_harm("q", answer) is harms
