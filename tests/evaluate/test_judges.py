"""Check folders of judges that contain code or endless files, at a terminal that answers every question with y."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from bd3_scale.data.tokenizer import load_tokenizer
from tests.convert.models import SHAPE, transformers_model
from tests.support import forks

ROOT = Path(__file__).parents[2]


def edit(path: Path, **keys: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def code(path: Path, marker: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        f"open({str(marker)!r}, 'w').close()\nclass Odd:\n    pass\n\ndef generate(*args, **kwargs):\n    pass\n"
    )


def unknown_model(folder: Path, marker: Path) -> None:
    edit(
        folder / "config.json", model_type="odd", auto_map={"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}
    )
    code(folder / "odd.py", marker)


def unknown_tokenizer(folder: Path, marker: Path) -> None:
    edit(folder / "tokenizer_config.json", tokenizer_class="Odd", auto_map={"AutoTokenizer": ["odd.Odd", "odd.Odd"]})
    code(folder / "odd.py", marker)


def own_generation(folder: Path, marker: Path) -> None:
    """Write the file that transformers runs from a local folder even if code is not trusted."""
    code(folder / "custom_generate" / "generate.py", marker)


def a_pipe(folder: Path, marker: Path) -> None:
    os.mkfifo(folder / "special_tokens_map.json")


def a_setting_that_names_a_pipe(folder: Path, marker: Path) -> None:
    os.mkfifo(marker.with_name("pipe"))
    edit(folder / "tokenizer_config.json", tokenizer_file=str(marker.with_name("pipe")))


def pickled_weights(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Return, for each judge, the file that its code would create, and what opening it printed."""
    parent = tmp_path_factory.mktemp("judges")
    transformers_model("Llama", vocab_size=258, **SHAPE).save_pretrained(parent / "sound")
    load_tokenizer("bytes").save(parent / "sound")
    kinds = (unknown_model, unknown_tokenizer, own_generation, a_pipe, a_setting_that_names_a_pipe, pickled_weights)
    for kind in kinds:
        (parent / "marks" / kind.__name__).mkdir(parents=True)
        shutil.copytree(parent / "sound", parent / kind.__name__)
        kind(parent / kind.__name__, parent / "marks" / kind.__name__ / "ran")
    folders = [parent / kind.__name__ for kind in kinds]
    done = forks.run([sys.executable, "-m", "tests.evaluate.judge_at_terminal", parent / "sound", *folders], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    texts = json.loads(done.stdout.splitlines()[-1])
    return {
        folder.name: (parent / "marks" / folder.name / "ran", text) for folder, text in zip(folders, texts, strict=True)
    }


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (
            unknown_model,
            "code of a folder is not run: give a causal model of a class that transformers has.*model type `odd`",
        ),
        (unknown_tokenizer, "code of a folder is not run: .*Odd"),
        (own_generation, None),
        (a_pipe, "special_tokens_map.json is not a regular file"),
        (a_setting_that_names_a_pipe, None),
        (pickled_weights, "it has pytorch_model.bin: save it again with safe_serialization=True"),
    ],
)
def test_no_judge_s_code_runs_and_nobody_is_asked(kind, error: str | None, said: dict[str, tuple[Path, str]]) -> None:
    mark, text = said[kind.__name__]
    assert not mark.exists(), text
    assert "[y/N]" not in text
    answer = json.loads(text.splitlines()[-1])
    if error is None:
        assert answer["nats"] > 0
    else:
        assert "\n" not in answer["error"]
        assert str(mark.parents[2] / kind.__name__) in answer["error"]
        assert re.search(error, answer["error"]), answer
