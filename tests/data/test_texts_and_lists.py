"""Text and lists that people write: read whatever program saved them, or refused with the file's name and the line."""

import json

import pytest

from crcm_jax.data import lists, texts, video_files
from crcm_jax.errors import UserError

WORDS = "a cat, ünï\nein Hund\n狗 \U0001f415"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_with_a_mark_and_every_line_end(tmp_path, encoding, end):
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "a.txt").write_bytes(mark + WORDS.replace("\n", end).encode(encoding))
    assert texts.read(tmp_path / "a.txt") == WORDS
    assert texts.lines(tmp_path / "a.txt") == WORDS.split("\n")


@pytest.mark.parametrize(
    "content, why",
    [
        ("eins\r\nzwei\r\nfünf".encode("latin-1"), "line 3 of .*a.txt is not UTF-8: save it as UTF-8"),
        (b"one\r\xff", "line 2 of .* is not UTF-8"),
        ("one\ntwo".encode("utf-16-le"), "line 1 of .* holds a zero"),
        (b"\xff\xfe" + "one\ntwo\n".encode("utf-16-le") + b"\x00\xd8a\0", "line 3 of .* is not UTF-16-LE as its"),
        (b"\xff\xfea", "line 1 of .* is not UTF-16-LE"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "a.txt is a large-file pointer"),
    ],
)
def test_other_text_is_refused_with_its_line(tmp_path, content, why):
    (tmp_path / "a.txt").write_bytes(content)
    for read in (texts.read, texts.lines, lists.prompts):
        with pytest.raises(UserError, match=why) as caught:
            read(tmp_path / "a.txt")
        assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_one_sentence(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere.txt"):
        with pytest.raises(UserError, match=f"{path.name} cannot be read as text"):
            texts.read(path)


def test_a_prompt_is_neither_cut_nor_split(tmp_path):
    """Characters that some programs take for a line's end are part of a prompt."""
    prompts = ["a\u2028b", "c\x0bd", "e\x0cf", "g\x85h", "i\x1cj"]
    (tmp_path / "a.txt").write_text("\n".join(prompts) + "\n\n  k  \n", encoding="utf-8")
    assert lists.prompts(tmp_path / "a.txt") == [*prompts, "k"]
    rows = [{"prompt": prompt, "more": 1} for prompt in [*prompts, " two\nlines "]]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert lists.prompts(tmp_path / "a.jsonl") == [row["prompt"] for row in rows]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"empty\.txt holds no prompts"):
        lists.prompts(tmp_path / "empty.txt")


FIELDS = ("video", "prompt")


@pytest.mark.parametrize(
    "content",
    [
        'video,prompt\na.mp4,a cat\nb.mp4,"a, b"\n',
        '\ufeffvideo,prompt\r\na.mp4,a cat\r\n\r\nb.mp4,"a, b"\r\n',
        "number; prompt ;video\n1;a cat;a.mp4\n2;a, b;b.mp4",
        "prompt\tvideo\na cat\ta.mp4\na, b\tb.mp4\n",
    ],
)
def test_csv_as_spreadsheets_save_it(tmp_path, content):
    (tmp_path / "a.csv").write_bytes(content.encode())
    assert lists.entries(tmp_path / "a.csv", FIELDS) == [("a.mp4", "a cat"), ("b.mp4", "a, b")]
    (tmp_path / "a.csv").write_bytes(content.replace("\ufeff", "").encode("utf-16"))
    assert lists.prompts(tmp_path / "a.csv") == ["a cat", "a, b"]


GOOD = '{"video": "a.mp4", "prompt": "a"}\n'


@pytest.mark.parametrize(
    "name, content, why",
    [
        ("a.csv", "video,text\na,b\n", "line 1 of .*, the header, has no column prompt, only video, text"),
        ("a.csv", "video,prompt,prompt\na,b,c\n", "line 1 of .* has 2 columns prompt"),
        ("a.csv", "video,prompt\na,b\nc\n", "line 3 of .* has 1 of 2 fields"),
        (
            "a.csv",
            "video,prompt\na,a cat, a dog\n",
            "line 2 of .* has 3 of 2 fields: put a field that holds a comma in",
        ),
        ("a.csv", 'video,prompt\na,"one\ntwo"\nb\n', "line 4 of .* has 1 of 2 fields"),
        ("a.csv", 'video,prompt\na,"never closed\n', "line 2 of .* cannot be read as CSV"),
        ("a.csv", 'video,prompt\na,"b"c\n', "line 2 of .* cannot be read as CSV"),
        ("a.csv", f"video,prompt\na,{'b' * 200_000}\n", "line 2 of .* cannot be read as CSV"),
        ("a.jsonl", GOOD + '\n{"video": "b", "prompt": null}\n', "line 3 of .* has null for prompt: write text"),
        ("a.jsonl", GOOD + '{"video": "b", "prompt": 5}\n', "line 2 of .* has 5 for prompt"),
        ("a.jsonl", GOOD + '{"video": ["b"], "prompt": ""}\n', r"line 2 of .* has \[\"b\"\] for video"),
        ("a.jsonl", GOOD + '{"video": "b"}\n', "line 2 of .* has no prompt"),
        ("a.jsonl", GOOD + '{"video": "b", "prompt": "x", "prompt": "y"}\n', "line 2 of .* has prompt 2 times"),
        ("a.jsonl", GOOD + "[1]\n", "line 2 of .* is not a JSON object"),
        ("a.jsonl", GOOD + "null\n", "line 2 of .* is not a JSON object"),
        ("a.jsonl", GOOD + '{"video": "b"\n', "line 2 of .* is not JSON"),
        ("a.jsonl", GOOD + '{"video": "b", "prompt": "\\ud800"}\n', "line 2 of .* has half a character"),
        ("a.jsonl", "[" * 100_000, "line 1 of .* is not JSON"),
    ],
)
def test_lists_are_validated_whole(tmp_path, name, content, why):
    (tmp_path / name).write_text(content)
    for read in (lambda path: lists.entries(path, FIELDS), video_files.listing):
        with pytest.raises(UserError, match=why) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_captions_and_hidden_videos(tmp_path, capsys):
    for name in ("a.mp4", "._a.mp4", ".hidden/b.mp4", "@eaDir/c.mp4", "sub/d.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_bytes("eine Katze, grün".encode("utf-16"))
    (tmp_path / "sub" / "d.txt").write_bytes("\ufeffa dog\r\n".encode())
    found = video_files.listing(tmp_path)
    assert found == [(tmp_path / "a.mp4", "eine Katze, grün"), (tmp_path / "sub" / "d.mp4", "a dog")]
    assert "passed over 3 hidden files" in capsys.readouterr().err
    (tmp_path / "a.txt").write_bytes("grün".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1 of .*a\.txt is not UTF-8"):
        video_files.listing(tmp_path)


@pytest.mark.parametrize("command", ["build", "sample"])
def test_commands_name_the_line_before_weights_are_looked_for(tmp_path, command):
    from crcm_jax.cli import data, sample

    (tmp_path / "p.txt").write_bytes("a\nü".encode("latin-1"))
    (tmp_path / "l.jsonl").write_text('{"video": "a.mp4", "prompt": null}\n')
    if command == "build":
        words = ["build", "--weights=nowhere", f"--out={tmp_path / 'out'}"]
        with pytest.raises(UserError, match=r"line 1 of .* has null for prompt"):
            data.main([*words, f"--videos={tmp_path / 'l.jsonl'}"])
        run = data.main
    else:
        words, run = ["--model=wan2.1-t2v-1.3b", "--weights=nowhere"], sample.main
        with pytest.raises(UserError, match=r"line 2 of .*p\.txt is not UTF-8"):
            run([*words, "--prompt=a", f"--negative-file={tmp_path / 'p.txt'}"])
    for name, why in (("p.txt", "line 2 of .*p.txt is not UTF-8"), ("l.jsonl", "line 1 of .* has null for prompt")):
        with pytest.raises(UserError, match=why):
            run([*words, f"--prompts={tmp_path / name}"])
    assert not (tmp_path / "out").exists()
