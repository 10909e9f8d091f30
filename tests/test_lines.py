"""The counting of lines itself, on a repository of two files."""

import subprocess

from tests.lines import read, report


def test_lines_comments_and_functions_are_counted(tmp_path):
    (tmp_path / "one").mkdir()
    file = tmp_path / "one" / "code.py"
    file.write_text(
        'x = 1  # beside code\n# alone\n\n\ndef f():\n    # inside\n    return "# text"\n'
    )
    (tmp_path / "Makefile").write_text("all:\n")
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    source = read(tmp_path, file.relative_to(tmp_path))
    assert (source.room, source.lines, source.comments) == ("one", 7, 2)
    assert source.functions == ((3, "one/code.py:5 f"),)
    (tmp_path / "one" / "untracked.py").write_text("x = 1\n")
    text = "\n".join(report(tmp_path))
    assert "Code outside tests (.py, and 0 lines of .ci): 7 lines" in text
