"""Test readers of foreign files: none is missing from the list, and any content gives success or one error."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.fuzzing import FUZZ, message, spoilt
from tests.faults.readers import CASES, OPENERS

PACKAGE = Path(__file__).parents[2] / "bd3_scale"
SECONDS = 20
OPENS = {
    *("open", "read_text", "read_bytes", "read_regular", "read_object", "open_regular", "object_in", "ZipFile"),
    *("safe_open", "load_file", "from_file", "from_pretrained", "PyTorchFileReader", "is_zipfile"),
}
LOADS = {"json.load", "torch.load", "yaml.load", "np.load", "pickle.load"}


def functions(source: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield every function of a module with its dotted name; nested functions belong to the outer one."""

    def below(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from below(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                yield f"{prefix}{child.name}", child

    return below(ast.parse(source), "")


def package_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        yield from ((f"{module}.{name}", function) for name, function in functions(path.read_text()))


def is_reader(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("reader(") for decorator in function.decorator_list)


def opens_files(function: ast.FunctionDef) -> bool:
    """Return whether a function opens a file for reading; modes for writing are recognised by their letters."""
    for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
        name, words = ast.unparse(call.func), [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        writes = any(isinstance(word, str) and re.fullmatch("[wax+bt]{1,3}", word) for word in words)
        if name in LOADS or (name.rpartition(".")[2] in OPENS and not writes):
            return True
    return False


READERS = {name for name, function in package_functions() if is_reader(function)}


@contextmanager
def ending_in_time():
    """Raise an AssertionError, which no reader takes for a damaged file, if the block takes too long."""

    def ring(*_):
        raise AssertionError(f"it takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Return a folder with a case's sound input, made once for all cases of that input."""
    made = {}

    def folder(case):
        if case.make not in made:
            made[case.make] = tmp_path_factory.mktemp("sound")
            case.make(made[case.make])
        return made[case.make]

    return folder


def test_every_reader_is_spoilt_here():
    missing = READERS - CASES.keys()
    assert not missing, f"add to CASES of tests/faults/readers.py a sound input, and its reading, for {missing}"


def test_what_opens_files_is_a_reader_or_says_which_reader_calls_it():
    opening = [name for name, function in package_functions() if opens_files(function) and not is_reader(function)]
    known = set().union(*OPENERS.values())
    missing = [name for name in opening if not name.startswith("convert.remote_code.") and name not in known]
    assert not missing, f"mark with @reader, or add to OPENERS of tests/faults/readers.py and say why: {missing}"


@pytest.mark.parametrize(
    ("source", "opens", "marked"),
    [
        ("def f(path):\n    return json.load(path.open())", True, False),
        ("@reader('x')\ndef f(path):\n    return path.read_text()", True, True),
        (
            "class A:\n    def f(self):\n        def g():\n            return safe_open(1)\n        return g",
            True,
            False,
        ),
        ("def f(text):\n    return json.loads(text)", False, False),
        ("def f(path):\n    return path.open('wb')", False, False),
    ],
)
def test_functions_that_open_files_are_found(source, opens, marked):
    ((_, function),) = functions(source)
    assert (opens_files(function), is_reader(function)) == (opens, marked)


@pytest.mark.parametrize("times", [1, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(READERS & CASES.keys()))
def test_whatever_stands_in_a_file_one_error_is_told_or_none(name, times, sound):
    case = CASES[name]
    folder = sound(case)

    @settings(FUZZ, max_examples=case.examples * times, deadline=None)
    @given(st.data())
    def spoil(data):
        file = data.draw(st.sampled_from(case.files))
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(data.draw(spoilt(whole, file)))
        try:
            with ending_in_time():
                found = message(case.read, folder)
        finally:
            (folder / file).write_bytes(whole)
        assert not found or str(folder) in found, "it does not say where"

    assert message(case.read, folder) == ""
    spoil()


@pytest.mark.parametrize("name", sorted(READERS & CASES.keys()))
def test_what_is_no_file_is_told_and_not_waited_for(name, sound, tmp_path):
    case = CASES[name]
    for file in case.files:
        for number, put in enumerate(
            (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: None)
        ):
            folder = Path(shutil.copytree(sound(case), tmp_path / f"{file.replace('/', '-')}-{number}"))
            (folder / file).unlink()
            put(folder / file)
            with ending_in_time():
                message(case.read, folder)
