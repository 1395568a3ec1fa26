"""Prompts: worlds and files, drawn reproducibly; and what is wrong with a file."""

import json

import pytest

from diffgen.training.data import DataError, Prompts, columns
from diffgen.worlds import shapes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", r"a.txt holds no prompts"),
        ("a.txt", "\n  \n", r"a.txt holds no prompts"),
        ("a.jsonl", "", r"a.jsonl holds no prompts"),
        ("a.csv", "prompt,answer\n", r"a.csv holds no prompts"),
        ("a.jsonl", '{"text": "a"}\n', r"a.jsonl, row 1: expected a column 'prompt' with text, found \['text'\]"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"a.jsonl, row 2: expected a column 'prompt' with text"),
        ("a.jsonl", '["a"]\n', r"a.jsonl, row 1: expected a column 'prompt' with text, found list"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": \n', r"a.jsonl, line 3: not valid JSON"),
        (
            "a.jsonl",
            '{"prompt": "a", "n": 1}\n{"prompt": "b"}\n',
            r"row 2: columns \['prompt'\] differ .* \['n', 'prompt'\]",
        ),
        ("a.jsonl", '{"prompt": "a", "samples": 1}\n', r"a column can't be named samples"),
        ("a.csv", "text,n\na,1\n", r"a.csv, row 1: expected a column 'prompt' with text, found \['n', 'text'\]"),
        ("a.csv", "prompt,n\na,1\nb\n", r"a.csv, row 2: expected 2 cells \(prompt, n\), found"),
        ("a.csv", "prompt,n\na,1\nb,2,3\n", r"a.csv, row 2: expected 2 cells \(prompt, n\), found"),
        ("a.txt", b"caf\xe9\n", r"a.txt is not UTF-8 text"),
        ("a.json", "[]", r"a.json: expected a .txt, .jsonl or .csv file"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_row(name, content, message, tmp_path):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        Prompts(str(file))


@pytest.mark.parametrize("source", ["nowhere.txt", "shape:train", "/dev"])
def test_a_source_that_is_neither_world_nor_file_is_named(source):
    with pytest.raises(
        DataError, match=rf"data.prompts: '{source}' is neither 'WORLD:SPLIT' \(worlds: .*shapes.*\) nor a file"
    ):
        Prompts(source)


def test_an_unknown_split_of_a_world_is_named():
    with pytest.raises(ValueError, match=r"split 'heldout' of the world 'shapes' is unknown: did you mean 'held_out'"):
        Prompts("shapes:heldout")


def test_all_formats_give_the_same_rows(tmp_path):
    texts = ["a red circle", 'a "quoted", blue cross', "线 déjà vu", "a line\u2028separator"]
    (tmp_path / "a.txt").write_text("\r\n".join(texts) + "\r\n\r\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": t}, ensure_ascii=False) + "\n" for t in texts))
    quoted = ['"' + t.replace('"', '""') + '"' for t in texts]
    (tmp_path / "a.csv").write_text("\ufeffprompt\n" + "\n".join(quoted) + "\n", encoding="utf-8")
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert Prompts(str(tmp_path / name)).rows == [{"prompt": t} for t in texts]


def test_a_cell_of_a_csv_file_may_hold_a_line_break(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,note\n"two\nlines",x\n')
    assert Prompts(str(tmp_path / "a.csv")).rows == [{"prompt": "two\nlines", "note": "x"}]


def test_a_file_is_passed_through_epoch_by_epoch_each_in_its_own_order(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n".join(f"p{i}" for i in range(6)))
    data = Prompts(str(file))
    drawn = [row["prompt"] for update in range(6) for row in data.draw(4, seed=1, update=update)]
    epochs = [drawn[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(6)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert data.draw(4, 1, 3) == Prompts(str(file)).draw(4, 1, 3)
    assert data.draw(6, 1, 0) != data.draw(6, 2, 0)
    assert [row["prompt"] for row in data.first(8)] == ["p0", "p1", "p2", "p3", "p4", "p5", "p0", "p1"]


def test_a_world_draws_from_its_split_as_a_function_of_seed_and_update():
    data = Prompts("shapes:held_out")
    held_out = {scene.prompt for scene in shapes.scenes("held_out")}
    drawn = data.draw(50, 3, 1)
    assert {row["prompt"] for row in drawn} <= held_out
    assert drawn == data.draw(50, 3, 1)
    assert drawn != data.draw(50, 3, 2)
    assert drawn != data.draw(50, 4, 1)
    assert data.first(20) == Prompts("shapes:held_out").first(20)


def test_columns_are_all_but_the_prompt():
    assert columns([{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]) == {"n": [1, 2]}
