"""Every claim of the five files, held against an independent oracle.

`pytest` runs all of it in about a minute on two CPU cores. An oracle is Python integers,
a slow loop, or the formula written out; one sentence names each claim.
"""

import collections
import itertools
import json
import math
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import abacus
import data
import evaluate
import looped
import train

HERE = Path(__file__).parent


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_config(**changes) -> looped.ModelConfig:
    return looped.ModelConfig(**{"width": 32, "heads": 2, "ffn_width": 32, "layers": 2,
                                 "recurrences": 3, "state_noise": 0.0} | changes)


def small_model(seed: int = 0, **changes) -> looped.LoopedTransformer:
    torch.manual_seed(seed)
    return looped.LoopedTransformer(small_config(**changes)).eval()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return data.sample_batch("addition", 8, 5, generator())[0]


# A run that takes seconds: enough to be right sometimes, on short numbers.
TINY = ("--preset laptop --device cpu --train-digits 2 --width 32 --heads 2 --ffn-width 32 "
        "--layers 1 --recurrences 2 --max-offset 30 --problems-per-context 2 --steps 240 "
        "--batch-size 64 --microbatch-size 32 --learning-rate 0.01 "
        "--eval-digits 4 --eval-every 1 --eval-samples 10").split()


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    train.main([*TINY, "--out", str(folder)])
    return folder


# --------------------------------------------------------------------------------------
# abacus.py
# --------------------------------------------------------------------------------------


def test_digit_positions_and_number_index_equal_a_slow_loop():
    ids = torch.randint(0, 13, (200, 40), generator=generator())
    is_digit, is_end = ids < 10, ids == 12
    offset = torch.randint(0, 50, (200, 1), generator=generator(1))
    expected = torch.zeros_like(ids)
    number = torch.zeros_like(ids)
    for row in range(200):
        run = separators = 0
        for column in range(40):
            run = run + 1 if is_digit[row, column] else 0
            expected[row, column] = run
            if column and is_end[row, column - 1]:
                separators = 0
            separators += int(not is_digit[row, column] and not is_end[row, column])
            # An operator counts to the number after it, an end token to what follows.
            number[row, column] = 0 if is_end[row, column] else min(separators, 3)
    assert torch.equal(abacus.digit_positions(is_digit), expected)
    assert torch.equal(abacus.digit_positions(is_digit, offset),
                       torch.where(is_digit, expected + offset, 0))
    assert torch.equal(abacus.number_index(is_digit, is_end), number)


def test_abacus_moves_digits_by_one_offset_in_training_and_by_none_in_evaluation(tokens):
    torch.manual_seed(0)
    module = abacus.Abacus(range(10), 8, max_seq_length=200, max_k=99)
    # A table whose row r holds the number r lets the rows be read off the output.
    module.embedding.weight.data = torch.arange(200.0)[:, None].expand(200, 8).clone()
    positions = abacus.digit_positions(tokens < 10)
    assert torch.equal(module.eval()(tokens)[..., 0].long(), positions)
    module.train()
    seen = set()
    for _ in range(2000):
        offsets = (module(tokens)[..., 0].long() - positions)
        assert (offsets[tokens >= 10] == 0).all()                     # row 0 stays
        assert offsets[tokens < 10].unique().numel() == 1             # one for the batch
        seen.add(int(offsets[tokens < 10][0]))
    assert seen == set(range(100))                                    # 0..max_k, all


@pytest.mark.parametrize("digits, fits", [(15, True), (16, False)])
def test_a_number_past_the_table_is_an_error_that_names_length_table_and_remedy(digits, fits):
    module = abacus.Abacus(range(10), 8, max_seq_length=16, max_k=0).eval()
    line = torch.tensor([data.encode("7" * digits + "+1=")])
    if fits:
        assert module(line).shape == (1, 18, 8)
    else:
        with pytest.raises(ValueError, match=r"position 16 .*at 15.*max_seq_length"):
            module(line)


def test_offsets_that_cannot_be_are_errors():
    line, module = torch.tensor([data.encode("1+1=")]), abacus.Abacus(range(10), 8, 16)
    for offset in (-2, 15):
        with pytest.raises(ValueError, match="offset included"):
            module(line, offset)
    with pytest.raises(ValueError, match="max_k is -1"):
        abacus.Abacus(range(10), 8, max_k=-1)


def test_learned_positions_past_the_table_are_an_error():
    with pytest.raises(ValueError, match="11 tokens.* 10 rows.*max_seq_length"):
        abacus.LearnedPositions(8, max_seq_length=10)(11)


def test_fire_equals_its_formula_pair_by_pair():
    torch.manual_seed(0)
    fire = abacus.FIRE(3, init_L=6.0)
    fire.c.data, fire.L_multiplier.data = torch.tensor(0.3), torch.tensor(0.5)
    bias = fire(9, "cpu")
    assert bias.shape == (1, 3, 9, 9)
    spread = [0, 2, 3, 7, 8, 11, 20, 21, 30]                        # positions of choice
    spread_bias = fire(9, "cpu", torch.tensor(spread))
    for matrix, at in ((bias, range(9)), (spread_bias, spread)):
        for i in range(9):
            for j in range(i + 1):
                fraction = math.log(0.3 * (at[i] - at[j]) + 1) / (
                    math.log(0.3 * max(at[i], 3) + 1) + 1e-6)
                expected = fire.mlp(torch.tensor([fraction]))
                assert torch.allclose(matrix[0, :, i, j], expected, atol=1e-5)
    assert set(fire.state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight",
                                      "mlp.2.bias", "c", "init_L", "L_multiplier"}


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        def turned(x, position):
            angles = abacus.rotary_angles(torch.tensor([[position]]), 16, 500.0)
            return abacus.rotate(x, angles)
        assert torch.allclose(turned(q, i).norm(), q.norm())
        return float((turned(q, i) * turned(k, j)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)
    assert product(0, 0) == pytest.approx(float((q * k).sum()))


def test_disjoint_offsets_never_share_a_position_and_reach_both_ends():
    offsets = abacus.disjoint_offsets(5000, 3, digits=11, max_offset=40,
                                      generator=generator())
    ordered = offsets.sort(dim=1).values
    assert (ordered.diff(dim=1) >= 11).all()
    assert offsets.min() == 0 and offsets.max() == 40
    # Each problem, also the first, gets low and high ranges alike.
    assert (offsets.float().mean(dim=0) - 20).abs().max() < 1
    with pytest.raises(ValueError, match="3 disjoint ranges of 11 .* 22 or more, not 21"):
        abacus.disjoint_offsets(1, 3, 11, 21, generator())


@pytest.mark.parametrize("how, distances", [
    ("batch", None), ("disjoint", None), ("same", {0}), ("adjacent", {4, 8})])
def test_each_way_to_draw_offsets_keeps_its_promise(how, distances):
    settings = train.preset("laptop") | {"offsets": how, "train_digits": 3,
                                         "max_offset": 50}
    offsets = train.sample_offsets(settings, 2000, generator())
    assert offsets.shape == (2000, 3) and offsets.min() >= 0 and offsets.max() <= 50
    assert len(offsets.unique(dim=0)) == 1 if how == "batch" else offsets.max() == 50
    apart = (offsets[:, :1] - offsets[:, 1:]).abs()
    if distances is None:
        assert apart.min() >= 4                     # 3 digits, and a carry's
    else:
        assert set(apart.flatten().tolist()) == distances


def test_abacus_copied_by_itself_works(tmp_path):
    shutil.copy(HERE / "abacus.py", tmp_path)
    code = ("from abacus import Abacus; import torch; "
            "print(Abacus([0, 1], 4)(torch.tensor([[0, 1, 2]])).shape)")
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.stdout.strip() == "torch.Size([1, 3, 4])", result.stderr


# --------------------------------------------------------------------------------------
# data.py
# --------------------------------------------------------------------------------------


def split(line: torch.Tensor) -> list[tuple[str, str, str]]:
    """(a, b, answer) of each problem of a context, as numbers are usually written."""
    text = data.decode(line).rstrip("_")
    assert text.endswith("$")
    return [tuple(number[::-1] for number in re.split("[+=]", problem))
            for problem in text[:-1].split("$")]


@pytest.mark.parametrize("max_digits", [1, 7, 20, 400])
@pytest.mark.parametrize("long_carries", [0.0, 1.0])
def test_sums_agree_with_python_integers_at_any_length(max_digits, long_carries):
    lines, _ = data.sample_batch("addition", 300, max_digits, generator(),
                                 problems_per_context=2, long_carries=long_carries)
    for line in lines:
        problems = split(line)
        assert len(problems) == 2
        for a, b, answer in problems:
            assert answer == str(int(a) + int(b))
            for operand in (a, b):
                assert 1 <= len(operand) <= max_digits and operand[0] != "0"


def test_carries_run_through_nines_to_the_very_end():
    ones = torch.ones(2, 6, dtype=torch.int64)
    nines = torch.tensor([[9, 9, 9, 9, 9, 0], [8, 9, 9, 9, 9, 0]])
    units = torch.tensor([1, 0, 0, 0, 0, 0]) * ones
    assert data.carry_out(nines + units).tolist() == [[True] * 5 + [False], [False] * 6]


def test_operands_have_exactly_the_lengths_asked_for_and_uniform_digits():
    lengths = torch.tensor([[[3, 1]]]).expand(20000, 1, 2)
    problems = [split(line)[0] for line in
                data.make_contexts("addition", lengths, generator())]
    assert {(len(a), len(b)) for a, b, _ in problems} == {(3, 1)}
    for place, choices in ((0, "123456789"), (1, "0123456789"), (2, "0123456789")):
        digits = [a[place] for a, _, _ in problems]
        counts = {digit: digits.count(digit) for digit in set(digits)}
        assert set(counts) == set(choices)
        assert max(counts.values()) < 1.1 * 20000 / len(choices)


def test_operand_lengths_are_uniform_and_independent():
    lines, _ = data.sample_batch("addition", 20000, 4, generator())
    pairs = [(len(a), len(b)) for line in lines for a, b, _ in split(line)]
    counts = [pairs.count((i, j)) for i in range(1, 5) for j in range(1, 5)]
    assert min(counts) > 1100 and max(counts) < 1400          # 1250 each on average


def test_long_carries_make_the_chains_that_uniform_digits_lack():
    def longest_chain(line):
        a, b, _ = split(line)[0]
        sums = [int(x) + int(y) for x, y in zip(a[::-1], b[::-1])]
        chain = best = 0
        for s in sums:
            chain = chain + 1 if s > 9 or (s == 9 and chain) else 0
            best = max(best, chain)
        return best
    lengths = torch.full((2000, 1, 2), 15)
    share = [sum(longest_chain(line) >= 6 for line in data.make_contexts(
        "addition", lengths, generator(), long_carries=value)) / 2000 for value in (0, 1)]
    # Uniform digits already chain by sums above 9; nines make long ones more common.
    assert share[1] > share[0]


def problems_of(task: str, max_digits: int, count: int = 400, **settings) -> list[str]:
    """The text of random problems, without the end token; checks that it is there."""
    lines, _ = data.sample_batch(task, count, max_digits, generator(), **settings)
    texts = [data.decode(line).rstrip("_") for line in lines]
    assert all(text.count("$") == 1 and text.endswith("$") for text in texts)
    assert max(map(len, texts)) <= evaluate.line_tokens(task, max_digits)
    return [text[:-1] for text in texts]


SOLVERS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.mark.parametrize("task, symbols", [
    ("addition", "+"), ("subtraction", "-"), ("both", "+-"), ("multiplication", "*")])
@pytest.mark.parametrize("max_digits", [1, 4, 30])
def test_sums_differences_and_products_agree_with_python_integers(task, symbols, max_digits):
    carries = [{}] if task == "multiplication" else [
        {}, {"long_carries": 1.0, "long_borrows": 1.0}]
    seen, longest = "", 0
    for settings in carries:
        for problem in problems_of(task, max_digits, **settings):
            question, answer = problem.split("=")
            a, symbol, b = re.fullmatch(r"(\d+)(\D)(\d+)", question).groups()
            for operand in (a, b):
                assert 1 <= len(operand) <= max_digits and operand[-1] != "0"
            assert answer[::-1] == str(SOLVERS[symbol](int(a[::-1]), int(b[::-1])))
            seen += symbol
            longest = max(longest, len(answer.strip("-")))
    assert set(seen) == set(symbols)
    assert abs(seen.count("+") / len(seen) - 0.5) < 0.1 or len(symbols) == 1
    assert longest <= data.TASKS[task].places(max_digits)


@pytest.mark.parametrize("a, b", [
    ("9" * 30, "9" * 30), ("9" * 30, "1"), ("1", "9" * 30), ("1" + "0" * 29, "1"),
    ("1", "1" + "0" * 29), ("12321", "12321"), ("9", "9")])
def test_extreme_operands_are_right_in_every_operation(monkeypatch, a, b):
    monkeypatch.setattr(data, "random_digits", lambda lengths, width, _: torch.tensor(
        [[int(d) for d in operand[::-1].ljust(width, "0")]
         for operand in ([a] if lengths[0] == len(a) else [b])]))
    for task, symbol in (("addition", "+"), ("subtraction", "-"), ("multiplication", "*")):
        line = data.make_contexts(task, torch.tensor([[[len(a), len(b)]]]), generator())
        expected = str(SOLVERS[symbol](int(a), int(b)))
        text = f"{a[::-1]}{symbol}{b[::-1]}={expected[::-1]}$"
        assert data.decode(line[0]).rstrip("_") == text


@pytest.mark.parametrize("task, symbols", [("add", "+"), ("sub", "-"), ("mix", "+-")])
@pytest.mark.parametrize("digits", [1, 6, 20])
def test_the_second_papers_format_is_padded_signed_and_right(task, symbols, digits):
    seen = ""
    for settings in ({}, {"long_carries": 1.0, "long_borrows": 1.0}):
        for problem in problems_of(task, digits, **settings):
            a, symbol, b, sign, answer = re.fullmatch(
                r"(\d+)([+-])(\d+)=([+-])(\d+)", problem).groups()
            assert (len(a), len(b), len(answer)) == (digits, digits, digits + 1)
            assert int(sign + answer) == SOLVERS[symbol](int(a), int(b))
            assert sign == "+" or int(answer) > 0
            assert len(problem) == 3 * digits + 4
            seen += symbol
    assert set(seen) == set(symbols)
    assert task != "mix" or 0.6 < seen.count("-") / len(seen) < 0.72


def check_labels(a: torch.Tensor, b: torch.Tensor):
    """Answers put together from labels, against int64 arithmetic on the same numbers."""
    powers = 10 ** torch.arange(a.shape[1])
    x, y = (a * powers).sum(dim=1), (b * powers).sum(dim=1)
    labels = data.digit_labels(a, b)
    for base, out, sign, truth, rows in (
            ("SA", "SV", 1, x + y, x == x), ("MD", "MV", -1, x - y, x >= y),
            ("ND", "NV", -1, y - x, x < y)):
        below = F.pad(labels[out], (1, 0))[:, :-1]
        digits = (labels[base] + sign * below) % 10
        expected = truth[:, None] // powers % 10
        assert torch.equal(digits[rows], expected[rows])
        from_labels = data.answer_from_labels(
            base[0], *(labels[name] for name in data.CLASS_LABELS[base[0]]))
        assert torch.equal(from_labels[rows][:, :-1], expected[rows])
        top = truth // 10 ** a.shape[1] if sign > 0 else 0 * truth
        assert torch.equal(from_labels[rows][:, -1], top[rows])
        assert torch.equal(labels["SV"][:, -1], x + y >= 10 ** a.shape[1])
    for three, out in (("ST", "SV"), ("MT", "MV"), ("NT", "NV")):       # TriAdd, slowly
        carry = torch.zeros(len(a), dtype=torch.long)
        for column in range(a.shape[1]):
            label = labels[three][:, column]
            carry = torch.where(label == data.UNDECIDED, carry, label)
            assert torch.equal(carry, labels[out][:, column])


def test_labels_make_up_the_answers_of_a_million_questions_and_of_all_3_digit_pairs():
    a, b = torch.randint(10, (2, 1_000_000, 6), generator=generator())
    check_labels(a, b)
    numbers = torch.arange(1000)[:, None] // torch.tensor([1, 10, 100]) % 10
    check_labels(numbers.repeat_interleave(1000, 0), numbers.repeat(1000, 1))
    labels = data.digit_labels(a[:1000], b[:1000])
    assert torch.equal(labels["SC"], (labels["ST"] == 1).long())


@pytest.mark.parametrize("question, name", [
    ("123+456", "S0"), ("105+205", "S1"), ("195+205", "S2"), ("999+001", "S3"),
    ("555+555", "S1"), ("195+905", "S2"), ("456-123", "M0"), ("450-105", "M1"),
    ("400-105", "M2"), ("511-401", "M0"), ("123-123", "M0"), ("105-450", "N1"),
    ("123-456", "N0"), ("401-500", "N2"), ("1" + "9" * 18 + "5+" + "0" * 19 + "5", "S19")])
def test_questions_are_classed_by_their_longest_cascade(question, name):
    a, symbol, b = re.fullmatch(r"(\d+)(.)(\d+)", question).groups()
    digits = [torch.tensor([[int(d) for d in n[::-1]]]) for n in (a, b)]
    assert data.question_class(*digits, torch.tensor([symbol == "-"])) == [name]


def test_long_borrows_make_equal_columns_in_differences():
    def equal_columns(problem):
        a, b = problem.split("=")[0].split("-")
        return sum(x == y for x, y in zip(a, b)) / min(len(a), len(b))
    shares = [sum(map(equal_columns, problems_of("subtraction", 15, long_borrows=value)))
              / 400 for value in (0.0, 1.0)]
    assert shares[0] < 0.2 and shares[1] > 0.4


def test_raised_digits_make_differences_negative_and_leave_sums_alone():
    for task in ("sub", "subtraction"):
        pairs = list(zip(problems_of(task, 6), problems_of(task, 6, negatives=1.0)))
        for before, after in pairs:
            (a, b), (new_a, new_b) = (text.split("=")[0].split("-") for text in (before, after))
            assert a == new_a and len(b) == len(new_b)
            assert all(x <= y for x, y in zip(b, new_b))
        negative = [sum("-" in text.split("=")[1] for text in texts) for texts in zip(*pairs)]
        assert negative[1] > negative[0]
    assert problems_of("add", 6, negatives=1.0) == problems_of("add", 6)


@pytest.mark.parametrize("max_digits", [1, 20])
def test_or_has_one_one_in_the_shorter_vector_and_the_longer_length(max_digits):
    spots, first_holds = set(), []
    for problem in problems_of("or", max_digits, 2000):
        a, b, answer = re.split("[|=]", problem)
        assert len(answer) == max(len(a), len(b)) and set(a + b) <= set("01")
        padded = [[int(d) for d in v.ljust(len(answer), "0")] for v in (a, b)]
        assert answer == "".join(str(x | y) for x, y in zip(*padded))
        shorter, longer = sorted((a, b), key=len)
        assert (a + b).count("1") == 1
        if len(a) != len(b):
            assert "1" in shorter and "1" not in longer
        else:
            first_holds.append("1" in a)
        spots.add(answer.index("1"))
    assert spots == set(range(max_digits))
    assert 0.3 < sum(first_holds) / len(first_holds) < 0.7


@pytest.mark.parametrize("size", [1, 3, 10, 30])
def test_sorting_agrees_with_pythons_stable_sort(size):
    ties = sizes = 0
    for problem in problems_of("sorting", size, 200):
        question, answer = problem.split("=")
        items = [item.split(":") for item in question.split(",")]
        names = "".join(name for name, _ in items)
        assert names in 2 * data.LETTERS and 1 <= len(names) <= size    # a circle
        numbers = [int(number[::-1]) for _, number in items]
        assert all(not number.endswith("0") and len(number) <= size
                   for _, number in items)
        order = sorted(range(len(items)), key=lambda i: numbers[i])
        assert answer == ",".join(names[i] for i in order)
        ties += len(set(numbers)) < len(numbers)
        sizes += len(items) == size
    assert ties or size == 1
    assert sizes


def test_the_cell_of_a_list_task_has_its_length_and_at_most_its_digits():
    lines = evaluate.cell_problems("sorting", (7, 4), 200, seed=0)
    items = [data.decode(line).split("=")[0].split(",") for line in lines]
    assert {len(item) for item in items} == {4}
    digits = {len(entry.split(":")[1]) for item in items for entry in item}
    assert digits == set(range(1, 8))


def test_index_hints_name_every_place_from_a_random_start_on_a_circle():
    starts = set()
    for problem in problems_of_hints():
        numbers = re.split("[+=]", problem)
        letters = [number[::2] for number in numbers]
        assert all(len(number) % 2 == 0 and number[1::2].isdigit() for number in numbers)
        longest = max(letters, key=len)
        assert longest in 2 * data.LETTERS
        assert all(longest.startswith(other) for other in letters)
        a, b, c = (int(number[1::2][::-1]) for number in numbers)
        assert a + b == c
        starts.add(longest[0])
    assert len(starts) > 80


def problems_of_hints() -> list[str]:
    lines, is_answer = data.sample_batch("addition", 500, 20, generator(),
                                         index_hints=True)
    assert lines.shape[1] <= evaluate.line_tokens("addition", 20, index_hints=True)
    for line, mask in zip(lines, is_answer):
        assert data.decode(line[mask]) == data.decode(line).partition("=")[2].rstrip("_")
    return [data.decode(line).rstrip("_")[:-1] for line in lines]


def test_random_spaces_stand_in_the_question_alone():
    lines, is_answer = data.sample_batch("addition", 500, 20, generator(), spaces=0.25)
    texts = [data.decode(line).rstrip("_") for line in lines]
    assert not any(" " in text.partition("=")[2] for text in texts)
    spaces = sum(text.count(" ") for text in texts)
    question = sum(len(text.partition("=")[0].replace(" ", "")) + 1 for text in texts)
    assert spaces / question == pytest.approx(0.25, abs=0.02)
    for text in texts:
        a, b, answer = (int(n[::-1]) for n in re.split("[+=]", text.replace(" ", "")[:-1]))
        assert a + b == answer


@pytest.mark.parametrize("task, how, last", [
    ("addition", {}, "_"), ("subtraction", {}, "-"), ("both", {}, "-"), ("or", {}, "|"),
    ("multiplication", {}, "*"), ("sorting", {}, data.LETTERS[-1]),
    ("addition", {"index_hints": True}, data.LETTERS[-1]),
    ("addition", {"spaces": 0.1}, " ")])
def test_a_model_knows_the_tokens_up_to_the_last_that_its_task_uses(task, how, last):
    size = data.vocabulary_size(task, **how)
    assert data.VOCABULARY[size - 1] == last
    assert data.sample_batch(task, 200, 9, generator(), **how)[0].max() < size


def test_text_survives_encode_and_decode_and_strangers_are_refused():
    assert data.decode(data.encode("321+54=861$__")) == "321+54=861$__"
    assert data.encode("0123456789") == list(data.DIGITS)
    with pytest.raises(ValueError, match="no token for '?'"):
        data.encode("1?2")
    assert len(set(data.VOCABULARY)) == len(data.VOCABULARY)


def test_the_answer_mask_covers_answer_and_end_token_of_every_problem():
    line = torch.tensor([data.encode("321+54=861$1+9=01$__")])
    expected = "       ^^^^    ^^^  "
    assert "".join(" ^"[int(m)] for m in data.answer_mask(line)[0]) == expected
    assert data.problem_index(line)[0].tolist() == [0] * 11 + [1] * 7 + [2] * 2


def test_microbatches_are_one_batch_with_little_padding():
    parts = list(data.sample_microbatches("addition", 1000, 64, 20, generator()))
    assert [len(tokens) for tokens, _ in parts] == [64] * 15 + [40]
    real = sum(int((tokens != data.PAD).sum()) for tokens, _ in parts)
    assert real / sum(tokens.numel() for tokens, _ in parts) > 0.9
    for tokens, is_answer in parts:
        assert torch.equal(is_answer, data.answer_mask(tokens))


def test_problems_are_dealt_evenly_and_none_is_lost():
    lengths = torch.randint(1, 11, (3, 200, 2), generator=generator())
    dealt = data.deal("addition", lengths, generator())
    assert dealt.shape == (200, 3, 2)
    assert sorted(map(tuple, dealt.view(-1, 2).tolist())) == sorted(
        map(tuple, lengths.view(-1, 2).tolist()))
    size = data.context_tokens("addition", dealt).float()
    unsorted = data.context_tokens("addition", lengths.transpose(0, 1)).float()
    assert size.std() < 0.3 * unsorted.std() and (size.diff() >= 0).all()
    # The place in the context tells nothing about the length.
    assert dealt.sum(dim=-1).float().mean(dim=0) == pytest.approx([11, 11, 11], abs=1)


@pytest.mark.parametrize("task", data.TASKS)
def test_every_preset_of_every_task_can_be_trained(task):
    for name in (*train.PRESETS, "small"):
        train.check(train.preset(name, task) | {"seed": 0})      # raises where it cannot


def test_no_number_in_training_is_longer_than_the_preset_says():
    for name in train.PRESETS:
        settings = train.preset(name)
        lines, _ = data.sample_batch(
            settings["task"], 300, settings["train_digits"], generator(), "cpu",
            settings["problems_per_context"], long_carries=settings["long_carries"])
        positions = abacus.digit_positions(lines < 10)
        in_answer = data.answer_mask(lines)
        assert positions[~in_answer].max() == settings["train_digits"]
        assert positions[in_answer].max() <= settings["train_digits"] + 1


def test_distractors_are_random_digits_that_nothing_is_asked_about():
    plain, all_asked = data.sample_batch("addition", 200, 5, generator(),
                                         problems_per_context=3)
    lines, is_answer = data.sample_batch("addition", 200, 5, generator(),
                                         problems_per_context=3, distractors=True)
    last = data.problem_index(lines) == 2
    assert torch.equal(is_answer, all_asked & last)
    assert torch.equal(lines[last], plain[last])
    assert torch.equal(lines > 9, plain > 9)            # only digits have changed
    changed = (lines != plain)[~last & (plain < 10)].float().mean()
    assert changed == pytest.approx(0.9, abs=0.02)


def test_the_same_generator_state_makes_the_same_batch():
    first, second = (data.sample_batch("addition", 50, 9, generator(3)) for _ in range(2))
    other = data.sample_batch("addition", 50, 9, generator(4))
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], other[0])


# --------------------------------------------------------------------------------------
# looped.py
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, recurrences, table_3", [
    (16, 1, 122.27), (8, 2, 63.51), (4, 4, 34.14), (2, 8, 19.45), (1, 16, 12.11)])
def test_parameters_match_table_3_up_to_the_vocabulary(layers, recurrences, table_3):
    config = looped.ModelConfig(layers=layers, recurrences=recurrences)
    ours = looped.parameter_count(config)[0] / 1e6
    assert table_3 - ours == pytest.approx(0.568, abs=0.01)     # the same for all five
    with torch.device("meta"):
        layer = sum(w.numel() for w in looped.Layer(config).parameters())
    assert layer == 7_344_128


@pytest.mark.parametrize("injection", ["none", "recurrence", "layer"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_the_model_equals_the_paper_written_out(tokens, injection, norm):
    model = small_model(input_injection=injection, norm=norm)
    config, state_dict = model.config, model.state_dict()
    weights = {name: value.double() for name, value in state_dict.items()}

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    def glu(x, name):
        a, b = (x @ weights[name + ".into.weight"].T).chunk(2, -1)
        return (F.gelu(a) * b) @ weights[name + ".out.weight"].T

    def attention(x, name):
        out = torch.zeros_like(x)
        q, k, v = (x @ weights[name + ".qkv.weight"].T).chunk(3, -1)
        for head in range(config.heads):
            part = slice(head * 16, head * 16 + 16)
            for t in range(x.shape[1]):
                scores = (k[:, :t + 1, part] @ q[:, t, part, None])[..., 0] / 4.0
                mix = scores.softmax(-1)[:, None] @ v[:, :t + 1, part]
                out[:, t, part] = mix[:, 0]
        return out @ weights[name + ".out.weight"].T

    positions = abacus.digit_positions(tokens < 10)
    injected = layer_norm(weights["tokens.weight"][tokens]
                          + weights["abacus.embedding.weight"][positions],
                          "embedding_norm")
    state = injected if injection == "none" else torch.zeros_like(injected)
    for _ in range(config.recurrences):
        state = state + injected if injection == "recurrence" else state
        for index in range(config.layers):
            name = f"layers.{index}"
            state = state + injected if injection == "layer" else state
            if norm == "post":
                state = layer_norm(state + attention(state, name + ".attention"),
                                   name + ".norm1")
                state = layer_norm(state + glu(state, name + ".ffn"), name + ".norm2")
            else:
                state = state + attention(layer_norm(state, name + ".norm1"),
                                          name + ".attention")
                state = state + glu(layer_norm(state, name + ".norm2"), name + ".ffn")
    head = layer_norm(glu(state, "head.0") @ weights["head.1.weight"].T, "head.2")
    logits = head @ weights["decoder.weight"].T
    assert torch.allclose(model(tokens).double(), logits, atol=1e-4)


ALL_EMBEDDINGS = ["none", "abacus", "learned", "fire", "rotary", "digit_rotary",
                  "abacus+fire", "abacus+rotary", "digit_rotary+segment+fire"]


@pytest.mark.parametrize("embeddings", ALL_EMBEDDINGS)
def test_a_token_sees_only_what_stands_before_it(tokens, embeddings):
    model = small_model(embeddings=embeddings)
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 13
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :6], after[:, :6], atol=1e-5)
    assert not torch.allclose(before[:, 6:], after[:, 6:], atol=1e-3)


@pytest.mark.parametrize("embeddings", ALL_EMBEDDINGS)
def test_a_cache_changes_nothing_but_the_time(embeddings):
    model = small_model(embeddings=embeddings)
    lengths = torch.tensor([[[4, 3]]]).expand(6, 1, 2)
    questions = data.make_contexts("addition", lengths, generator())[:, :9]
    slow = evaluate.generate(model, questions, 7, use_cache=False)
    assert torch.equal(slow, evaluate.generate(model, questions, 7, use_cache=True))


@pytest.mark.parametrize("equals_position, as_query, as_key", [
    ("no", 0, 0), ("query", 40, 0), ("both", 40, 40)])
def test_equals_asks_from_position_0_of_its_own_problem(equals_position, as_query, as_key):
    model = small_model(embeddings="digit_rotary", equals_position=equals_position)
    line = torch.tensor([data.encode("321+54=8")])
    positions = [41, 42, 43, 0, 41, 42, None, 41]
    for angles, at_equals in zip(model.angles(line, 40), (as_query, as_key)):
        expected = torch.tensor([[at_equals if p is None else p for p in positions]])
        cos, sin = abacus.rotary_angles(expected, 16, model.config.rotary_base)
        assert torch.equal(angles[0], cos) and torch.equal(angles[1], sin)


def test_equals_gets_the_row_below_its_problems_units_and_row_0_stays_for_the_others():
    model = small_model(embeddings="abacus", equals_position="query")
    line = torch.tensor([data.encode("321+54=861$7+8=")])
    offset = torch.tensor([[40] * 11 + [70] * 4])
    rows = torch.tensor([[41, 42, 43, 0, 41, 42, 40, 41, 42, 43, 0, 71, 0, 71, 70]])
    expected = model.tokens(line) + model.abacus.embedding(rows)
    assert torch.allclose(model.embed(line, offset), model.embedding_norm(expected))
    assert torch.equal(model(line), model(line, offset=5))       # what the test takes
    assert not torch.equal(model(line), model(line, offset=0))
    model.config.check_reach(1023, 0, "a test")
    with pytest.raises(ValueError, match="positions up to 1024"):
        model.config.check_reach(1024, 0, "a test")


def test_randomised_fire_draws_increasing_positions_from_the_whole_range():
    model = small_model(embeddings="randomised_fire", max_positions=50)
    seen = []
    model.fire.forward = lambda length, device, positions: (
        seen.append(positions) or torch.zeros(1, 2, length, length))
    for _ in range(300):
        model.attention_bias(torch.zeros(1, 12, dtype=torch.long), 0, causal_mode=True)
    drawn = torch.stack(seen)
    assert drawn.shape == (300, 12) and (drawn.diff(dim=1) > 0).all()
    assert drawn.min() == 0 and drawn.max() == 49
    with pytest.raises(ValueError, match="randomised_fire table ends at 50"):
        model.config.check_reach(5, 51, "a test")


def test_both_ways_to_attend_agree(tokens):
    model = small_model(embeddings="abacus+fire")
    with torch.no_grad():
        fused = model(tokens)
    assert torch.allclose(model(tokens), fused, atol=1e-5)


def test_the_second_papers_layer_is_relu_and_its_head_only_normalises(tokens):
    model = small_model(ffn="relu", head="none", layers=1, recurrences=1, norm="pre",
                        embeddings="learned", input_injection="none")
    layer, x = model.layers[0], torch.randn(2, 5, 32)
    into, out = layer.ffn.into.weight, layer.ffn.out.weight
    assert torch.allclose(layer.ffn(x), F.relu(x @ into.T) @ out.T, atol=1e-6)
    state = model.layers[0](model.embed(tokens, 0),
                            bias=model.attention_bias(tokens, 0, causal_mode=False))
    expected = model.decoder(model.head[0](state))
    assert len(model.head) == 1 and isinstance(model.head[0], torch.nn.LayerNorm)
    assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_torchs_own_initial_weights_are_left_as_they_are():
    model = small_model(init="torch", width=64)
    # torch's rules: uniform within 1 / sqrt(inputs), and N(0, 1) for embeddings.
    weight = model.layers[0].attention.qkv.weight
    assert 0.98 / 8 < weight.abs().max() <= 1 / 8
    assert model.abacus.embedding.weight.std().item() == pytest.approx(1, abs=0.05)


def test_initial_weights_follow_the_depth():
    model = small_model(width=512, heads=4, ffn_width=512)
    gain = (8 * 2 * 3) ** -0.25
    q, k, v = model.layers[0].attention.qkv.weight.chunk(3)
    for weight, its_gain in ((q, 1), (k, 1), (v, gain),
                             (model.layers[1].attention.out.weight, gain)):
        assert weight.std().item() == pytest.approx(its_gain * 512 ** -0.5, rel=0.02)
    wide = model.layers[0].ffn.into.weight                          # 512 -> 2 x 512
    assert wide.std().item() == pytest.approx(gain * (2 / 1536) ** 0.5, rel=0.02)
    assert model.abacus.embedding.weight.std().item() == pytest.approx(
        512 ** -0.5, rel=0.02)


def test_more_recurrences_than_in_training_work_and_matter(tokens):
    model = small_model()
    assert not torch.allclose(model(tokens, recurrences=9), model(tokens), atol=1e-3)


def test_the_state_starts_from_noise_of_the_given_size(tokens):
    model = small_model(state_noise=0.02, recurrences=1)
    seen = []
    model.recur = lambda state, *rest: seen.append(state) or state
    model(tokens)
    assert seen[0].std().item() == pytest.approx(0.02, rel=0.05)


def test_progressive_loss_at_alpha_0_is_the_mean_over_the_answer_tokens(tokens):
    model, is_answer = small_model(), data.answer_mask(tokens)
    log_p = model(tokens).log_softmax(-1)
    terms = [-log_p[b, t - 1, tokens[b, t]] for b in range(len(tokens))
             for t in range(1, tokens.shape[1]) if is_answer[b, t]]
    got = looped.progressive_loss(model, tokens, is_answer, 0.0, generator())
    expected = (sum(terms) / len(terms)).item()
    assert got.item() == pytest.approx(expected, rel=1e-5)
    half = looped.progressive_loss(model, tokens, is_answer, 0.0, generator(),
                                   answer_tokens=2 * is_answer.sum())
    assert half.item() == pytest.approx(expected / 2, rel=1e-5)


@pytest.mark.parametrize("full", [1, 2, 5])
def test_progressive_loss_draws_every_legal_pair_and_no_other(tokens, full):
    model = small_model(recurrences=full)
    drawn = []
    inner = model.forward
    model.forward = lambda tokens, recurrences=None, offset=None, without_gradient=0: (
        drawn.append((without_gradient, recurrences)) or inner(tokens, 1))
    source = generator()
    for _ in range(400):
        looped.progressive_loss(model, tokens[:1], data.answer_mask(tokens[:1]), 1.0, source)
    most = {1: 1, 2: 1, 5: 2}[full]                                # max(full // 2, 1)
    assert set(drawn) == {(n, k) for n in range(full)
                          for k in range(1, min(full - n, most) + 1)}
    first = sum(n == 0 for n, _ in drawn)
    assert first == pytest.approx(400 / full, abs=40)               # n is uniform


def test_alpha_mixes_full_and_random_pass(tokens):
    model, is_answer = small_model(recurrences=1), data.answer_mask(tokens)
    # With one recurrence both passes are the same, whatever the weight between them.
    full, mixed, random_only = (looped.progressive_loss(
        model, tokens, is_answer, alpha, generator()) for alpha in (0.0, 0.3, 1.0))
    assert mixed.item() == pytest.approx(full.item(), rel=1e-5)
    assert random_only.item() == pytest.approx(full.item(), rel=1e-5)


def test_no_gradient_flows_through_the_first_recurrences(tokens):
    model = small_model(recurrences=4)
    states = []
    inner = model.recur
    def spy(state, *rest):
        states.append(inner(state, *rest))
        return states[-1]
    model.recur = spy
    model(tokens, recurrences=2, without_gradient=2).sum().backward()
    assert [state.requires_grad for state in states] == [False, False, True, True]


def test_after_them_all_weights_learn_the_same_in_16_bits_as_in_32(tokens):
    model, gradients = small_model(), []
    for precision in (torch.float32, torch.bfloat16):
        with looped.autocast(torch.device("cpu"), precision):
            logits = model(tokens, recurrences=1, without_gradient=2)
        logits.float().logsumexp(dim=-1).sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
        model.zero_grad(set_to_none=True)
    for exact, rounded in zip(*gradients):
        assert (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("changes, message", [
    ({"embeddings": "abakus"}, "embeddings 'abakus'"),
    ({"embeddings": "rotary+digit_rotary"}, "choose one"),
    ({"norm": "middle"}, "norm 'middle'"), ({"init": "zeros"}, "init 'zeros'"),
    ({"input_injection": "often"}, "input_injection 'often'"),
    ({"width": 33}, "width 33 must be a multiple"),
    ({"recurrences": 0}, "recurrences is 0"),
])
def test_a_model_that_cannot_be_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        small_config(**changes)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------
# train.py
# --------------------------------------------------------------------------------------


def test_the_cosine_schedule_rises_for_its_warmup_and_falls_to_zero_along_a_cosine():
    settings = train.preset("paper", "add") | {"steps": 1000, "learning_rate": 1.0}
    rates = [train.schedule(settings, step)[1] for step in range(1000)]
    for step in (50, 150, 250, 500, 999):
        done = (step + 0.5) / 1000
        expected = done / 0.2 if done < 0.2 else (
            1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        assert rates[step] == pytest.approx(expected, abs=1e-9)


def test_the_schedule_in_steps_is_the_papers_schedule_on_the_wall_clock():
    settings = train.preset("paper") | {"steps": 4000, "microbatch_size": 1}
    total, small, large = sum(train.schedule(settings, s)[0] for s in range(4000)), 512, 8192
    clock = 0
    for step in range(4000):
        batch, rate = train.schedule(settings, step)
        # A step takes time in proportion to its batch: this is the share of it so far.
        share = (clock + batch / 2) / total
        clock += batch
        expected = min(large, small + (large - small) * share / 0.6)
        assert batch == pytest.approx(expected, rel=0.01)
        trapezoid = min(1, share / 0.1, (1 - share) / 0.1)
        assert rate == pytest.approx(1e-4 * trapezoid, rel=0.02, abs=1e-8)


def test_a_batch_has_the_same_gradient_however_it_is_cut():
    gradients = []
    for microbatch in (64, 16):
        settings = train.preset("laptop") | {
            "seed": 0, "batch_size": 64, "max_offset": 0,
            "problems_per_context": 1, "microbatch_size": microbatch, "grad_clip": 1e9}
        run = train.new_run(settings, torch.device("cpu"), torch.float32)
        # The same problems either way: cut one batch, instead of drawing it in parts.
        batch = data.sample_batch("addition", 64, 10, generator())
        original = data.sample_microbatches
        data.sample_microbatches = lambda *_, **__: zip(*(p.split(microbatch) for p in batch))
        run.optimizer.zero_grad = lambda **_: None
        try:
            train.train_step(run)
        finally:
            data.sample_microbatches = original
        gradients.append(torch.cat([w.grad.flatten() for w in run.model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)


def test_only_matrices_decay():
    settings = train.preset("laptop") | {"seed": 0}
    run = train.new_run(settings, torch.device("cpu"), torch.float32)
    for group in run.optimizer.param_groups:
        dimensions = {weight.ndim > 1 for weight in group["params"]}
        assert dimensions == {group["weight_decay"] > 0}


def final_weights(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.mark.parametrize("changes", ["", "--alpha 1 --state-noise 0.02"])
def test_a_killed_run_resumes_to_bit_identical_weights(tmp_path, changes):
    flags = [*TINY, "--steps", "80", *changes.split()]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "train.py", *flags, "--out", str(killed)],
                               cwd=HERE, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step     20/"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    stopped = torch.load(killed / "checkpoint.pt", weights_only=True)["step"]
    assert 18 <= stopped < 80
    train.main(["--resume", "--out", str(killed)])
    whole, resumed = final_weights(tmp_path / "whole"), final_weights(killed)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    logs = [[json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
            for folder in (tmp_path / "whole", killed)]
    assert logs[0] == logs[1] == list(range(2, 81, 2))


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "train.py", *TINY, "--steps", "100000", "--out", str(tmp_path / "run")],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("into:"):
        pass
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"--resume --out {tmp_path / 'run'}" in errors
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] > 0


def test_a_stopped_evaluation_leaves_no_file(tiny_run, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "measure", stop)
    with pytest.raises(SystemExit, match="130"):
        evaluate.main([str(tiny_run), "--json", str(tmp_path / "accuracy.json")])
    assert "nothing was written" in capsys.readouterr().err and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("words, stops_in_one_line", [
    ("CUDA out of memory. Tried to allocate 2 GiB", True),
    ("DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
    ("CUDA error: an illegal memory access was encountered", False)])
def test_only_a_lack_of_memory_is_told_as_one(tiny_run, monkeypatch, capsys, words,
                                              stops_in_one_line):
    def fail(*_, **__):
        raise RuntimeError(words)
    monkeypatch.setattr(evaluate, "measure", fail)
    monkeypatch.setattr(train, "open_run", fail)
    for main, flags in (evaluate.main, [str(tiny_run)]), (train.main, []):
        with pytest.raises(SystemExit if stops_in_one_line else RuntimeError):
            main(flags)
        assert ("out of memory: " in capsys.readouterr().err) == stops_in_one_line


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        tmp_path, monkeypatch):
    original, calls = looped.progressive_loss, []

    def poisoned(*arguments):
        calls.append(1)
        return original(*arguments) * (math.nan if len(calls) == 31 else 1)

    monkeypatch.setattr(looped, "progressive_loss", poisoned)
    with pytest.raises(SystemExit, match="not finite at step 16.*learning-rate"):
        train.main([*TINY, "--out", str(tmp_path / "run")])          # 2 microbatches a step
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 12
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_a_run_folder_is_not_overwritten_unasked(tiny_run, capsys):
    before = (tiny_run / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as caught:
        train.main([*TINY, "--out", str(tiny_run)])
    assert caught.value.code == 2 and "--overwrite" in capsys.readouterr().err
    assert (tiny_run / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("flags, message", [
    ("--steps -1", "--steps is -1"), ("--batch-size 0", "batch-size is 0"),
    ("--task addtion", "'addtion'"), ("--embeddings abakus", "'abakus'"),
    ("--learning-rate nan", "--learning-rate is nan"), ("--alpha 2", "--alpha is 2"),
    ("--device tpu", "no device 'tpu'"), ("--out /proc/nowhere/run", "/proc/nowhere"),
    ("--max-offset 3 --problems-per-context 3", "disjoint"), ("--compile yes", "on or off"),
    ("--task sorting --index-hints on", "--index-hints does not fit --embeddings abacus"),
    ("--task or --long-carries 0.5", "which has none"),
    ("--task addition --long-borrows 0.5", "--long-borrows 0.5 does not fit"),
    ("--index-hints on", "fit --embeddings digit_rotary"), ("--spaces 2", "--spaces is 2"),
    ("--embeddings fire+randomised_fire", "choose one"),
    ("--decay-shape square", "'square'"), ("--init-from nowhere", "no such checkpoint"),
    ("--offsets near", "'near'"), ("--offsets adjacent --max-offset 9", "largest offset"),
    ("--embeddings abacus --max-offset 2000", "ends at 1023"),
    ("--embeddings learned --eval-digits 900", "learned table ends at 1024"),
    ("--heads 7", "multiple"), ("--seed -1", "--seed is -1"),
    ("--adam-eps 0", "--adam-eps is 0"), ("--first-batch-size 64", "larger than"),
    ("--batch-size 100 --microbatch-size 64", "not a multiple"),
    ("--embeddings learned --train-digits 200 --eval-digits 9", "learned table"),
    ("--resume --overwrite", "choose one"), ("--resume --out /nowhere", "/nowhere"),
    ("--preset huge", "invalid choice: 'huge'"), ("--steps many", "'many'"),
])
def test_every_bad_flag_gets_one_clear_line(flags, message, tmp_path, capsys):
    flags = flags.split() if "--out" in flags else [*flags.split(), "--out", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as caught:
        train.main(["--device", "cpu", *flags])
    *usage, error = capsys.readouterr().err.strip().splitlines()
    assert len(usage) <= 1 and message in error        # argparse's own have a usage line
    assert caught.value.code == 2 and not (tmp_path / "r").exists()


def test_a_run_cut_short_anywhere_resumes_or_says_why_not(tiny_run, tmp_path, capsys):
    # A log line cut in two, and a config that is gone, do no harm.
    shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    with (tmp_path / "run" / "log.jsonl").open("a") as log:
        log.write('{"step": 5, "lo')
    train.main(["--resume", "--out", str(tmp_path / "run")])
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(6, 241, 6))
    # A folder without a checkpoint is not said to be one to resume from.
    (tmp_path / "run" / "checkpoint.pt").unlink()
    with pytest.raises(SystemExit):
        train.main([*TINY, "--out", str(tmp_path / "run")])
    assert "--resume" not in capsys.readouterr().err
    # A checkpoint of another version is refused by name.
    good = torch.load(tiny_run / "checkpoint.pt", weights_only=True)
    del good["settings"]["alpha"]
    torch.save(good, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(tmp_path / "run")])
    assert "without 'alpha'" in capsys.readouterr().err


def test_an_evaluation_past_the_table_is_refused_before_any_work(tmp_path, capsys):
    train.main([*TINY, "--steps", "2", "--embeddings", "abacus", "--max-positions", "40",
                "--out", str(tmp_path / "run")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main([str(tmp_path / "run"), "--max-digits", "60"])
    error = capsys.readouterr().err
    assert "--max-digits 60 takes positions up to 66" in error and "at 39" in error


def test_resume_refuses_flags_that_do_not_fit_the_run(tiny_run, capsys):
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(tiny_run), "--width", "64"])
    assert "--width 64 does not fit" in capsys.readouterr().err


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("malicious-code-ran"),))


def test_damaged_foreign_and_malicious_checkpoints_get_one_line_and_run_nothing(
        tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = (tiny_run / "checkpoint.pt").read_bytes()
    good = torch.load(tiny_run / "checkpoint.pt", weights_only=True)
    Path("empty").write_bytes(b"")
    Path("truncated").write_bytes(whole[:len(whole) // 2])
    Path("text").write_text("not a checkpoint")
    Path("pickle").write_bytes(pickle.dumps(Malicious(), protocol=2))
    torch.save(Malicious(), "malicious")
    torch.save({"model": {}}, "foreign")
    torch.save([1, 2], "list")
    torch.save(good | {"config": good["config"] | {"width": 64}}, "wrong-shape")
    torch.save(good | {"config": {"surprise": 1}}, "wrong-config")
    torch.save(good | {"settings": None}, "no-settings")
    for name in ("empty", "truncated", "text", "pickle", "malicious", "foreign", "list",
                 "wrong-shape", "wrong-config", "no-settings", "absent"):
        with pytest.raises(ValueError, match=name) as caught:
            looped.load(name)
        assert "\n" not in str(caught.value)
        with pytest.raises(SystemExit):
            evaluate.main([name])
        assert "Traceback" not in capsys.readouterr().err
    assert not Path("malicious-code-ran").exists()


def test_a_checkpoint_of_a_compiled_run_loads_into_a_plain_model(tmp_path):
    settings = train.preset("laptop") | {"seed": 0, "batch_size": 4}
    run = train.new_run(settings, torch.device("cpu"), torch.float32)
    for layer in run.model.layers:
        layer.compile(backend="eager")
    train.train_step(run)
    train.save(run, tmp_path / "checkpoint.pt")
    loaded = looped.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in
               zip(loaded.state_dict().values(), run.model.state_dict().values()))


def test_the_benchmark_prints_every_figure(capsys):
    train.main([*TINY, "--benchmark"])
    printed = capsys.readouterr().out
    for figure in ("problems/s", "real tokens/s", "share of real tokens", "peak memory",
                   "milliseconds a step", "TFLOP/s measured", "plain step"):
        assert figure in printed


def readme_flags() -> list[tuple[str, str]]:
    """Every command and every group of flags that the README shows, and the preset that
    it is for if it names none."""
    found = set()
    for section in (HERE / "README.md").read_text().split("\n## "):
        shown = re.findall(r"`(python (?:train|evaluate)\.py[^`]*|--[a-z][^`]*)`", section)
        shown += re.findall(r"^(python (?:train|evaluate)\.py.*)$", section, re.MULTILINE)
        # In the table of claims, flags are for both presets, those after `small` for it.
        only_small = set(re.findall(r"`small`: `([^`]*)`", section))
        for command in shown:
            presets = ["small" if command in only_small else "laptop"]
            if section.startswith("The paper, claim by claim") and (
                    command.startswith("--") and command not in only_small):
                presets = ["paper"] if f"`{command}`; `small`" in section else [
                    "paper", "small"]
            found |= {(preset, " ".join(command.split())) for preset in presets}
    return sorted(found)


@pytest.mark.parametrize("preset, command", readme_flags())
def test_every_command_of_the_readme_parses_and_builds_its_model_and_a_batch(preset, command):
    parsers = {"train.py": train.build_parser(), "evaluate.py": evaluate.build_parser()}
    flags = shlex.split(command.removeprefix("python "))
    script = flags.pop(0) if flags[0] in parsers else next(
        name for name, parser in parsers.items() if flags[0] in parser.format_help())
    if len(flags) == 1 and command.startswith("--"):
        return                                  # a flag named in passing, without value
    args = parsers[script].parse_args(flags)
    if script == "train.py":
        settings = train.new_settings(args, preset)
        settings |= {"batch_size": 4, "microbatch_size": 4}
        with torch.device("meta"):
            looped.LoopedTransformer(train.model_config(settings))
        run = train.Run(settings, torch.device("cpu"), None, None, None, None, generator())
        (tokens, is_answer), = train.sample(run, 4)
        assert is_answer.any() and len(tokens) == 4
        assert len(train.sample_offsets(settings, 4, generator())) == 4


@pytest.mark.parametrize("flags", [
    "--task both", "--task multiplication --long-carries 0", "--task or --long-carries 0",
    "--task sorting --long-carries 0 --embeddings abacus+fire", "--spaces 0.2",
    "--index-hints on --embeddings randomised_fire", "--question-loss on",
    "--distractors on", "--embeddings abacus+rotary --equals-position both"])
def test_each_task_and_each_kind_of_text_trains_and_is_tested(flags, tmp_path, capsys):
    train.main([*TINY, "--steps", "3", *flags.split(), "--out", str(tmp_path / "run")])
    bands = {key: list(value) for key, value in json.loads(
        (tmp_path / "run" / "accuracy.json").read_text()).items() if "bands" in key}
    task = flags.split()[1]
    if task == "both":
        assert set(bands) == {"bands", "bands_addition", "bands_subtraction"}
        evaluate.main([str(tmp_path / "run"), "--ask", "12-3"])
    elif task == "sorting":
        assert set(bands) == {"bands", "bands_least"}
        assert set(bands["bands"]) == {"id", "ood", "ood_digits", "ood_list", "ood_both"}
        with pytest.raises(SystemExit):
            evaluate.main([str(tmp_path / "run"), "--ask", "12-3"])
    else:
        assert bands == {"bands": ["id", "ood"]}
    assert "Traceback" not in capsys.readouterr().err


def test_the_bands_of_a_list_task_tell_longer_numbers_from_longer_lists(monkeypatch):
    # Right where the numbers are short, however long the list: a share for each band.
    monkeypatch.setattr(evaluate, "exact_match", lambda model, task, cells, *_, **__: [
        float(digits <= 2) for digits, count in cells])
    bands = evaluate.measure(None, "sorting", 2, 4, samples=1)["bands"]
    assert bands == {"id": 1.0, "ood": 4 / 12, "ood_digits": 0.0, "ood_list": 1.0,
                     "ood_both": 0.0}


# --------------------------------------------------------------------------------------
# evaluate.py
# --------------------------------------------------------------------------------------


def test_one_teacher_forced_pass_agrees_with_decoding_token_by_token(tiny_run):
    model = looped.load(tiny_run)
    verdicts = []
    for cell in ((1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (6, 6)):
        problems = evaluate.cell_problems("addition", cell, 60, seed=5)
        exact = evaluate.is_exact(problems, evaluate.predict(model, problems))
        start = int((problems[0] == data.encode("=")[0]).nonzero()) + 1
        answers = evaluate.generate(model, problems[:, :start], problems.shape[1] - start)
        answers = F.pad(answers, (0, problems.shape[1] - start - answers.shape[1]),
                        value=data.PAD)
        assert torch.equal((answers == problems[:, start:]).all(dim=1), exact)
        verdicts += exact.tolist()
    assert 20 < sum(verdicts) < len(verdicts) - 20        # else it would show nothing


class KnowsUpTo:
    """Stands in for a model: right where the first operand has at most n digits."""

    def __init__(self, n: int):
        self.n, self.digits = n, torch.arange(10)

    def __call__(self, tokens, recurrences=None):
        following = tokens.roll(-1, dims=1)
        too_long = (tokens < 10).long().cumprod(dim=1).sum(dim=1) > self.n
        said = torch.where(too_long[:, None], data.END, following)
        return F.one_hot(said, len(data.VOCABULARY)).float()


def test_the_grid_puts_the_first_operand_in_the_rows_and_the_bands_are_cell_means():
    result = evaluate.measure(KnowsUpTo(5), "addition", train_digits=3, max_digits=8,
                              samples=4)
    assert result["lengths"] == list(range(1, 9))
    assert result["grid"] == [[float(i <= 5)] * 8 for i in range(1, 9)]
    assert result["bands"] == {"id": 1.0, "ood": pytest.approx((5 * 8 - 9) / (64 - 9))}


def test_a_thinned_grid_estimates_the_same_means_and_long_equal_lengths_come_apart():
    result = evaluate.measure(KnowsUpTo(110), "addition", train_digits=10, max_digits=120,
                              samples=2, every=10)
    assert result["lengths"] == [*range(1, 11), *range(20, 101, 10)]
    assert result["diagonal"] == {110: 1.0, 120: 0.0}
    assert result["bands"]["ood_100"] == 0.5
    thin = evaluate.measure(KnowsUpTo(20), "addition", 10, 40, samples=2, every=10)
    assert thin["bands"]["ood"] == pytest.approx((20 * 40 - 100) / (1600 - 100))


def test_noise_in_the_state_repeats_and_is_not_drawn_from_the_runs_generator(tokens):
    model = small_model(state_noise=5.0)
    before = torch.get_rng_state()
    said = [evaluate.predict(model, tokens) for _ in range(2)]
    assert torch.equal(*said) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(said[0], model(tokens)[:, :-1].argmax(dim=-1))


def test_the_speed_of_one_pass_is_compared_with_decoding(tiny_run):
    table = evaluate.compare_speed(looped.load(tiny_run), "addition", 4, samples=5)
    rows = table.splitlines()
    assert [row.split("  ")[1] for row in rows] == [
        "one pass", "decoding with a cache", "decoding without"]
    assert float(rows[2].split()[-2]) > 1            # how much is no matter of a test


def test_problems_depend_on_the_cell_and_the_seed_alone():
    same = [evaluate.cell_problems("addition", (7, 9), 5, seed=0) for _ in range(2)]
    assert torch.equal(*same)
    for cell, seed in (((9, 7), 0), ((7, 9), 1)):
        other = evaluate.cell_problems("addition", cell, 5, seed)
        assert not torch.equal(other, same[0])
    # The order and the company in which cells are scored do not matter either.
    model = small_model()
    cells = [(1, 2), (3, 3), (2, 1)]
    together = evaluate.exact_match(model, "addition", cells, 20)
    assert together == [evaluate.exact_match(model, "addition", [c], 20)[0] for c in cells]


@pytest.mark.parametrize("failures, questions, low, high", [
    (0, 1_000_000, 0, 3.689), (5, 1_000_000, 1.623, 11.668), (10, 20, 271_957, 728_043),
    (20, 20, 831_566, 1_000_000), (6672, 1_000_000, 6513.7, 6833.1)])
def test_the_binomial_interval_is_the_exact_one_of_the_tables(failures, questions, low, high):
    got = evaluate.binomial_interval(failures, questions)
    assert got == pytest.approx((low, high), rel=1e-3)


def test_failures_are_counted_by_class_and_by_answer_token(monkeypatch):
    # A model that forgets the carry into A2, the hundreds, and is right otherwise.
    def forgets(model, lines, recurrences):
        said = lines[:, 1:].clone()
        a, b = lines[:, :3].flip(1), lines[:, 4:7].flip(1)
        said[:, 9] = (a + b)[:, 2] % 10              # = + A3 A2 A1 A0: 7, 8, 9, 10, ...
        return said
    monkeypatch.setattr(evaluate, "predict", forgets)
    counts = evaluate.count_failures(small_model(), "add", 3, 20_000, seed=0)
    share = counts["failures"] / 20_000
    assert share == pytest.approx(0.495, abs=0.02)           # 45% + 10% of 45% carry
    assert counts["tokens"] == {"sign": 0, "A3": 0, "A2": counts["failures"], "A1": 0,
                                "A0": 0, "end": 0}
    assert counts["classes"]["S0"][0] == 0 and counts["classes"]["S2"][0] > 0
    assert sum(seen for _, seen in counts["classes"].values()) == 20_000
    shown = evaluate.failure_table(counts)
    assert f"{counts['failures']} failures in 20,000" in shown and "A2" in shown


FIXED = ("--device cpu --task mix --train-digits 2 --eval-digits 2 --width 32 --heads 2 "
         "--ffn-width 32 --steps 4 --batch-size 8 --microbatch-size 8 --eval-samples 50")


def test_a_fixed_width_run_is_tested_asked_and_handed_on(tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    train.main([*FIXED.replace("mix", "add").split(), "--out", first])
    result = json.loads((tmp_path / "first" / "accuracy.json").read_text())
    assert result["uniform"]["questions"] == result["enriched"]["questions"] == 50
    assert result["grid"] == [[result["bands"]["id"]]]
    train.main([*FIXED.split(), "--init-from", first, "--layers", "3", "--learning-rate",
                "1e-30", "--out", second])
    old, new = looped.load(first).state_dict(), looped.load(second).state_dict()
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    assert "layers.2.ffn.into.weight" in new.keys() - old.keys()
    evaluate.main([second, "--ask", "7-12"])
    assert "is right" in capsys.readouterr().out
    for flags in (["--ask", "100+1"], ["--max-digits", "3"]):
        with pytest.raises(SystemExit):
            evaluate.main([second, *flags])
        assert "knows 2 digits only" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main([*FIXED.split(), "--init-from", first, "--width", "64"])
    assert "same --width" in capsys.readouterr().err


def test_an_answer_in_the_fixed_width_format_is_read_back_as_a_number(monkeypatch):
    def says(text, question):
        monkeypatch.setattr(evaluate, "generate", lambda *_, **__: torch.tensor(
            [data.encode(text)]))
        return evaluate.ask(None, "mix", question, width=3).splitlines()
    assert says("-0012$", "7-19")[-2:] == ["   -12", "  correct"]
    assert says("+0000$", "19-19")[-1] == "  correct"
    assert says("+0026$", "7-19")[-1].strip() == "-12  is right"


def test_a_run_leaves_a_result_that_other_programs_can_read(tiny_run):
    result = json.loads((tiny_run / "accuracy.json").read_text())
    assert {"task", "train_digits", "max_digits", "samples", "seed", "grid", "bands",
            "parameters", "device", "torch", "seconds"} <= result.keys()
    assert set(result["bands"]) == {"id", "ood"} and len(result["grid"]) == 4
    config = json.loads((tiny_run / "config.json").read_text())
    assert config["settings"]["steps"] == 240 and config["torch"] == torch.__version__


def test_the_svg_is_well_formed_and_covers_the_whole_grid_with_few_shapes():
    grid = [[float(i + j < 130) for j in range(100)] for i in range(100)]
    result = {"lengths": list(range(1, 101)), "grid": grid, "train_digits": 20,
              "task": "addition"}
    svg = evaluate.svg_picture(result, "a < title")
    root = xml.etree.ElementTree.fromstring(svg)
    paths = [element.get("d") for element in root
             if element.tag.endswith("path") and element.get("fill") != "none"]
    assert len(paths) < 300
    area = 0.0
    for path in paths:
        x0, y0, x1, y1 = map(float, re.match(
            r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H\1Z$", path).groups())
        area += (x1 - x0) * (y0 - y1)
    assert area == pytest.approx(400 * 400)
    assert "a &lt; title" in svg and 'stroke="red"' in svg


def test_the_terminal_picture_shows_short_numbers_on_top():
    result = {"lengths": [1, 2], "grid": [[1.0, 0.5], [0.0, 1.0]], "task": "sorting"}
    axes, *rows, _ = evaluate.terminal_picture(result).splitlines()
    assert rows == ["    1 @@==", "    2   @@"]
    assert "rows: most digits of a number, 1 to 2; columns: numbers in the list" == axes


def test_a_mistake_is_marked_where_it_is_also_in_a_long_line():
    line = "1" * 60 + "+" + "1" * 60 + "=" + "2" * 60 + "$"
    said = line[1:-4] + "7" + line[-3:]
    shown = evaluate.show_mistake(torch.tensor(data.encode(line)),
                                  torch.tensor(data.encode(said))).splitlines()
    true, wrong, marks = shown
    assert len(true) < 80 and marks.count("^") == 1
    assert (true[marks.index("^")], wrong[marks.index("^")]) == ("2", "7")


@pytest.mark.parametrize("line, said, kind, chain", [
    ("93+8=74$", "84$", "carry", 0), ("93+8=74$", "75$", "carry", 1),
    ("93+8=74$", "73$", "carry", 1), ("93+8=74$", "70$", "digit", 1),
    ("999+1=0001$", "000$", "ended early", 3), ("93+8=74$", "741", "ended late", 0),
    ("93+8=74$", "7+", "digit", 1), ("999+1=0001$", "0901$", "carry", 1),
])
def test_first_mistakes_are_told_apart_by_kind_and_carry_chain(line, said, kind, chain):
    tokens = torch.tensor(data.encode(line + "__"))
    start = line.index("=") + 1
    predicted = tokens[1:].clone()
    predicted[start - 1:start - 1 + len(said)] = torch.tensor(data.encode(said))
    assert evaluate.mistake_kind(tokens, predicted) == (kind, chain)
    row = f"carry chain up to {2 ** math.ceil(math.log2(chain)) if chain else 0}"
    assert any(text.strip().startswith(row) and text.count("1") >= 1 for text in
               evaluate.mistake_table([(tokens, predicted)]).splitlines())


def test_a_question_is_answered_under_its_operands_with_mistakes_marked(monkeypatch):
    def says(text):
        monkeypatch.setattr(evaluate, "generate", lambda *_, **__: torch.tensor(
            [data.encode(text)]))
        return evaluate.ask(None, "addition", "57+68")
    assert says("521$").splitlines() == ["    57", "  + 68", "  ----", "   125",
                                         "  correct"]
    assert says("531$").splitlines()[3:] == ["   135", "    ^", "   125  is right"]
    assert "did not end" in says("5211")


@pytest.mark.parametrize("question", ["", "1+", "1-2", "1+2+3", "x+1", "012+3", "1.5+2",
                                      "٣+1", "1 2+3", "1+2=="])
def test_a_question_that_cannot_be_read_gets_one_line(question):
    with pytest.raises(ValueError, match="cannot read|starts with 0"):
        evaluate.parse_question(question, "addition")


def test_attention_maps_are_those_of_the_model_layer_by_layer(tokens):
    model = small_model(embeddings="abacus+fire")
    maps = evaluate.attention_maps(model, tokens)
    assert maps.shape == (3, 2, 2, tokens.shape[1], tokens.shape[1])
    assert torch.allclose(maps.sum(dim=-1), torch.ones(()), atol=0.02)  # bfloat16, maybe
    assert maps.triu(1).max() == 0
    # The first layer, by hand: its input is the state 0 plus what is injected.
    x = model.embed(tokens, 0)
    q, k, _ = model.layers[0].attention.qkv(x).view(*x.shape[:2], 3, 2, 16).unbind(2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4
    scores = scores + model.attention_bias(tokens, 0, causal_mode=True)
    expected = scores.softmax(dim=-1).mean(dim=0)
    assert torch.allclose(maps[0, 0], expected, atol=0.02)


def test_a_head_is_told_by_the_places_it_reads():
    line = "3210+6540=9750$"                           # digits of the same place: columns
    maps = torch.zeros(1, 1, 3, len(line), len(line))
    for place in range(4):
        reader = 9 + place                             # "=" or the answer digit before
        maps[0, 0, 0, reader, place] = maps[0, 0, 0, reader, 5 + place] = 0.5
        maps[0, 0, 1, reader, 5 + max(place - 1, 0)] = 1.0
        maps[0, 0, 2, reader, 4] = 0.25                # a quarter at "+",
        maps[0, 0, 2, reader, (place + 2) % 4] = 0.75  # the rest two places off
    reads = evaluate.read_columns(maps, "addition", 4)
    first, second, third = evaluate.head_table(reads, near=1)
    assert first == {"recurrence": 1, "layer": 1, "head": 1, "same": 1.0, "near": 0.0,
                     "far": 0.0, "rest": 0.0}
    assert (second["head"], second["same"], second["near"]) == (2, 0.25, 0.75)
    assert (third["head"], third["far"], third["rest"]) == (3, 0.75, 0.25)


def test_a_tap_sees_every_node_once_and_changes_nothing_unless_asked_to(tokens):
    model, seen = small_model(layers=2, recurrences=3), []
    before = model(tokens)
    with evaluate.tapped(model, lambda where, value: seen.append(where) or value):
        assert torch.equal(model(tokens), before)
        first = list(seen)
        model(tokens)
    assert seen == 2 * first and len(set(first)) == len(first)
    assert set(first) == {(r, l, kind) for r in range(3) for l in range(2)
                          for kind in ("heads", "ffn")}
    with evaluate.tapped(model, lambda where, value: 0 * value):
        assert not torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)                        # the hooks are gone


def test_an_ablated_node_is_replaced_by_its_mean_as_written_out(monkeypatch):
    model = small_model(layers=1, recurrences=1, norm="pre", input_injection="none")
    lines = evaluate.cell_problems("addition", (2, 2), 50, seed=0)
    bias = model.attention_bias(lines, 0, causal_mode=False)
    layer = model.layers[0]
    layer.attention.out.weight.data *= 8                 # so that a head can matter
    embedded = model.embed(lines, 0)
    qkv = layer.attention.qkv(layer.norm1(embedded)).view(*lines.shape, 3, 2, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    heads = looped.attend(q, k, v, bias).transpose(1, 2)            # (B, T, H, D / H)

    def said(token, part):
        """Predictions when one part at one token is replaced by its mean."""
        mixed = heads.clone()
        if part < 2:
            mixed[:, token, part] = heads[:, token, part].mean(dim=0)
        x = embedded + layer.attention.out(mixed.flatten(2))
        out = layer.ffn(layer.norm2(x))
        if part == 2:
            out[:, token] = out[:, token].mean(dim=0)
        return model.decoder(model.head(x + out))[:, :-1].argmax(-1)

    # Every question counts as right, and fails when its prediction changes at all.
    monkeypatch.setattr(evaluate, "predict", lambda model, lines, _: model(lines)[:, :-1]
                        .argmax(-1))
    monkeypatch.setattr(evaluate, "is_exact", lambda lines, _: torch.ones(
        len(lines), dtype=torch.bool))
    is_answer = data.answer_mask(lines)[:, 1:]
    found = evaluate.ablate(model, "addition", lines, 2)
    assert found[0, 0, 0, 6].tokens != found[0, 0, 1, 6].tokens
    assert set(found) == {(0, 0, part, token) for part in range(3) for token in range(9)}
    for token, part in itertools.product((5, 6, 7), range(3)):
        wrong = (said(token, part) != lines[:, 1:]) & is_answer
        damage = found[0, 0, part, token]
        assert damage.fails == pytest.approx(wrong.any(dim=1).double().mean().item())
        for name, column in (("A0", 5), ("A1", 6), ("A2", 7)):
            assert damage.tokens.get(name, 0) == pytest.approx(
                wrong[:, column].double().mean().item())


def test_the_map_of_an_ablation_tells_what_a_node_breaks(tiny_run, tmp_path, capsys):
    nodes, shapes, printed = looked_into(tiny_run, "ablate", 1, tmp_path, capsys)
    nodes = nodes["nodes"]
    assert len(nodes) == 2 * 3 * 6               # recurrences, parts, 9+8=71$ less "$"
    best = max(nodes, key=lambda node: node["fails"])
    assert best["fails"] > 0.3 and best["classes"] and best["tokens"]
    assert f"{best['part']} at {best['token']}: {best['fails']:.0%}" in printed
    assert shapes["rect"] == 1 + len(nodes)


# Two digits, and seconds of training: the second paper's circuit, as small as it gets.
CIRCUIT = ("--preset laptop --device cpu --task add --train-digits 2 --eval-digits 2 "
           "--width 32 --heads 2 --ffn-width 64 --steps 900 --batch-size 64 "
           "--microbatch-size 64 --eval-samples 1000").split()


@pytest.fixture(scope="module")
def circuit_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "circuit"
    train.main([*CIRCUIT, "--out", str(folder)])
    return folder


def looked_into(run, what, digits, tmp_path, capsys):
    """Figures, the number of shapes of each kind in the picture, and the text."""
    files = tmp_path / "figures.json", tmp_path / "picture.svg"
    picture = [] if what == "keep" else ["--svg", str(files[1])]
    evaluate.main([str(run), f"--{what}", str(digits), "--json", str(files[0]), *picture])
    root = xml.etree.ElementTree.fromstring(files[1].read_text()) if picture else []
    shapes = collections.Counter(element.tag.rpartition("}")[2] for element in root)
    return json.loads(files[0].read_text()), shapes, capsys.readouterr().out


@pytest.mark.parametrize("task, digits", [("add", 5), ("mix", 6), ("both", 6)])
@pytest.mark.parametrize("subtask", evaluate.SUBTASKS)
def test_an_interchange_changes_an_answer_by_what_its_column_says(task, digits, subtask):
    def solved(line):
        text, _, answer = data.decode(line).rstrip("_$").partition("=")
        order = 1 if data.TASKS[task].fixed_width else -1
        a, symbol, b = re.fullmatch(r"(\d+)([+-])(\d+)", text).groups()
        value = int(answer if answer[0] in "+-" else answer[::-1])
        return int(a[::order]), symbol, int(b[::order]), value

    if task == "add" and subtask[0] != "S":
        return
    kind, what = evaluate.SUBTASKS[subtask]
    sign, answer_sign = (1 if kind == "S" else -1), (-1 if kind == "N" else 1)
    tried = told_apart = 0
    for place in range(digits):
        one = 10 ** place
        for rows in zip(*evaluate.patch_pairs(task, subtask, place, digits, 30, place)):
            (a, symbol, b, value), (new_a, _, new_b, new_value), (*same, expected) = map(
                solved, rows)
            solve, tried = SOLVERS[symbol], tried + 1
            assert same == [a, symbol, b] and (symbol == "+") == (kind == "S")
            assert (rows[0] != rows[2]).sum() == 1
            assert (value, new_value) == (solve(a, b), solve(new_a, new_b))
            assert (value < 0) == (kind == "N") == (new_value < 0)
            if kind == "N":
                a, b, new_a, new_b = b, a, new_b, new_a
            columns = [sign * (y // one % 10) + x // one % 10
                       for x, y in ((a, b), (new_a, new_b))]
            # Carries as -1, 0 or 1, None where the column leaves them to those below.
            arrives = (a % one + sign * (b % one)) // one
            carries = [None if column == (9 if kind == "S" else 0) else column // 10
                       for column in columns]
            leaves = [arrives if carry is None else carry for carry in carries]
            change = (one * (columns[1] % 10 - columns[0] % 10) if what == "digit" else
                      10 * one * (leaves[1] - leaves[0]))
            assert expected == value + answer_sign * change and change
            assert (what == "undecided") == (carries.count(None) == 1)
            # The digit that changes is not simply copied from the other answer.
            changed = len(str(abs(expected - value))) - 1
            told_apart += (abs(expected) // 10 ** changed % 10
                           != abs(new_value) // 10 ** changed % 10)
    assert tried > 30 and told_apart > 0.3 * tried


def test_a_null_patch_changes_everything_but_the_labels_of_the_column():
    clean, other, expected = evaluate.patch_pairs("mix", "MD", 2, 4, 50, 0, null=True)
    assert len(clean) == 50 and torch.equal(clean, expected)
    assert (clean != other).any(dim=0)[[0, 1, 2, 3, 5, 6, 7, 8]].all()
    for line, another in zip(clean.tolist(), other.tolist()):      # D3 D2 ... - D'3 D'2 ...
        assert (line[1] - line[6]) == (another[1] - another[6]) or (
            abs(line[1] - line[6] - another[1] + another[6]) == 10)


def test_a_patch_finds_the_column_of_each_digit_and_leaves_equal_labels_alone(
        circuit_run, tmp_path, capsys):
    found, shapes, printed = looked_into(circuit_run, "patch", 2, tmp_path, capsys)
    rows = {f"{row['subtask']}{row['place']}": row for row in found["subtasks"]}
    assert set(rows) == {"SA0", "SA1", "SC0", "SC1", "ST0", "ST1"}
    assert min(rows["SA0"]["exact"], rows["SA1"]["exact"]) > 0.6
    # A digit is put together where it is predicted, one token before it.
    assert all(node["token"] == "A1" for node in rows["SA0"]["nodes"])
    found_one = [row for row in rows.values() if row["nodes"]]
    assert len(found_one) > 3 and min(row["null"] for row in found_one) > 0.7
    assert "SA0" in printed and shapes["rect"] == 1 + 2 * 3 * 10
    assert all("where" not in row for row in rows.values() if row["exact"] <= 0.5)


def test_nodes_are_named_by_what_they_share():
    names, node = evaluate.token_names("mix", 2), evaluate.Node
    assert names == ["D1", "D0", "op", "D'1", "D'0", "=", "sign", "A2", "A1", "A0", "end"]
    assert evaluate.token_names("addition", 1) == ["D0", "op", "D'0", "=", "A0", "A1", "end"]
    once, looped_three = small_model(recurrences=1), small_model(recurrences=3)
    for model, nodes, name in (
            (once, [node(0, 1, 0, 7)], "layer 2, head 1 at A2"),
            (once, [node(0, 0, 2, 6)], "layer 1, MLP at sign"),
            (once, [node(0, 0, 0, 8), node(0, 0, 1, 8)], "layer 1, head 1 + 2 at A1"),
            (looped_three, [node(r, 1, 1, 5) for r in range(3)],
             "all recurrences, layer 2, head 2 at ="),
            (looped_three, [node(2, 0, 1, 5)], "recurrence 3, layer 1, head 2 at =")):
        assert evaluate.nodes_name(model, tuple(nodes), names) == name


def test_a_patch_of_all_that_predicts_a_digit_carries_everything(circuit_run):
    model = looped.load(circuit_run)
    clean, other, expected = evaluate.patch_pairs("add", "SA", 1, 2, 100, 0)
    right = (evaluate.is_exact(clean, evaluate.predict(model, clean))
             & evaluate.is_exact(other, evaluate.predict(model, other)))
    pairs = [lines[right] for lines in (clean, other, expected)]
    outputs = evaluate.activations(model, pairs[1])[1]
    at_A2 = [node for node in evaluate.all_nodes(model, 11) if node.token == 7]
    # The token before the tens, with its own embedding: what differs is told by nodes.
    same = pairs[0][:, 7] == pairs[1][:, 7]
    with evaluate.replaced(model, at_A2, outputs):
        said = evaluate.predict(model, pairs[0])[:, 7]
    assert torch.equal(said[same], pairs[1][same, 8])


def test_the_nodes_that_matter_suffice_and_random_ones_do_not(
        circuit_run, tmp_path, capsys, monkeypatch):
    found, _, printed = looked_into(circuit_run, "keep", 2, tmp_path, capsys)
    kept = found["kept"]
    assert kept[0]["right"] > 0.5 > kept[0]["random"] and kept[0]["nodes"] < 60
    assert [row["nodes"] for row in kept] == sorted(
        (row["nodes"] for row in kept), reverse=True)
    assert f"{kept[0]['right']:.1%}" in printed
    # All nodes kept is the model itself; with none, the tokens alone give little away.
    for fails, low, high in ((1.0, 1.0, 1.0), (0.0, 0.0, 0.4)):
        monkeypatch.setattr(evaluate, "ablate", lambda model, *_: {
            node: evaluate.Damage(fails, {}, {}) for node in evaluate.all_nodes(model, 11)})
        for row in looked_into(circuit_run, "keep", 2, tmp_path, capsys)[0]["kept"]:
            assert low <= row["right"] == row["random"] <= high


def test_the_first_component_tells_carries_apart_where_a_head_holds_them(monkeypatch):
    model = small_model(layers=1, recurrences=1)
    lines = evaluate.questions("add", 3, 300, seed=0)
    labels = data.digit_labels(*evaluate.operands(lines, "add", 3)[:2])
    heads = 0.01 * torch.randn(*lines.shape, 32, generator=generator())
    # The second head, at token 7, holds ST of the tens along one direction.
    heads[:, 7, 16:] += labels["ST"][:, 1:2] * torch.linspace(-1, 1, 16)
    monkeypatch.setattr(evaluate, "activations", lambda *_: (None, {(0, 0, "heads"): heads}))
    best, *others = evaluate.pca(model, "add", lines, 3)
    assert best["label"] == "ST1" and best["node"] == (0, 0, 1, 7)
    assert best["between"] > 0.99 and best["variance"] > 0.9
    assert max(row["between"] for row in others if row["node"] != best["node"]) < 0.2
    assert len(best["points"]) == len(best["values"]) == 300


def test_the_picture_of_the_components_has_a_dot_for_each_question(
        circuit_run, tmp_path, capsys):
    found, shapes, printed = looked_into(circuit_run, "pca", 2, tmp_path, capsys)
    assert shapes["circle"] == 200 and found["heads"][0]["between"] > 0.6
    assert f"{found['heads'][0]['between']:.1%}" in printed


def test_digits_are_read_out_by_the_chain_that_feeds_them_and_by_recurrence(monkeypatch):
    lines = data.make_contexts("addition", torch.full((300, 1, 2), 6), generator(),
                               long_carries=0.5)
    a, b, _ = evaluate.operands(lines, "addition", 6)
    chains = torch.zeros(300, 6, dtype=torch.long)
    carry = torch.zeros(300, dtype=torch.long)
    for place in range(5):
        carry = ((a + b)[:, place] + (carry > 0) >= 10) * (carry + 1)
        chains[:, place + 1] = carry

    def predict(model, lines, recurrences):
        said = lines[:, 1:].clone()                   # wrong on chains of its own length
        said[:, 13:19][chains == recurrences] = data.PAD
        return said
    monkeypatch.setattr(evaluate, "predict", predict)
    shares = evaluate.readout(None, "addition", lines, 6, most=3)
    assert set(shares) == set(chains.unique().tolist())
    for length, row in shares.items():
        assert row == {"digits": int((chains == length).sum()),
                       "right": [float(length != n) for n in (1, 2, 3)]}


def test_the_attention_report_writes_its_figures_and_its_picture(tiny_run, tmp_path, capsys):
    found, shapes, printed = looked_into(tiny_run, "attend", 6, tmp_path, capsys)
    assert len(found["heads"]) == 4                                   # 2 recurrences x 2
    assert shapes["rect"] > 3 and "same place" in printed


def test_attention_is_read_in_the_fixed_width_format_too():
    # D2 D1 D0 + D'2 D'1 D'0 = sign A3 A2 A1 A0 end: "A1" is predicted at A2, token 10.
    maps = torch.zeros(14, 14)
    maps[10, 1], maps[10, 4], maps[8, 0] = 0.5, 0.3, 0.9
    reads = evaluate.read_columns(maps, "add", 3)
    assert reads[1].tolist() == [pytest.approx([0, 0.5, 0]), pytest.approx([0, 0, 0.3])]
    assert reads[[0, 2]].sum() == 0


@pytest.mark.parametrize("flags, message", [
    ("--max-digits 0", "--max-digits is 0"), ("--attend 0", "--attend is 0"),
    ("--samples -3", "--samples is -3"),
    ("--json /nowhere/a.json", "no folder /nowhere"), ("--device tpu", "no device"),
    ("--json .", "in the way"), ("--json x.json --svg x.json", "named twice"),
    ("--json {run}/checkpoint.pt", "in the way"), ("--ask", "expected one argument"),
    ("--readout 3 --svg x.svg", "no picture"), ("--ablate 0", "--ablate is 0"),
    ("--keep 3 --svg x.svg", "no picture"), ("--patch -1", "--patch is -1"),
    ("--pca 3 --patch 3", "one at a time"), ("--keep 3 --samples 5", "say 20 or more"),
    ("--task subtraction --readout 3", "lacks the tokens"),
    ("--task sorting", "lacks the tokens"), ("--task sums", "'sums'"),
    ("--seed 2000000", "--seed is 2000000"), ("--max-digits many", "invalid int")])
def test_bad_flags_of_the_evaluation_get_one_clear_line(
        tiny_run, tmp_path, monkeypatch, flags, message, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        evaluate.main([str(tiny_run), *flags.format(run=tiny_run).split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("script, shows", [
    ("data.py", "^^^"), ("abacus.py", "row, offset 40"), ("looped.py", "63.51")])
def test_each_file_shows_a_worked_example(script, shows):
    result = subprocess.run([sys.executable, script], cwd=HERE, capture_output=True,
                            text=True)
    assert result.returncode == 0 and shows in result.stdout
