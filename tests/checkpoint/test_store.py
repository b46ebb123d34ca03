"""Save and load in one process, with writes that really fail."""

from __future__ import annotations

import errno
import json
import resource
import signal

import pytest
import torch

from bd3_scale.checkpoint import storage
from bd3_scale.checkpoint.folder import list_checkpoints, remove_partial, resolve_checkpoint
from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.newest import newest_sound
from bd3_scale.checkpoint.store import boxes_to_save, load_training_state, load_weights, save_boxes
from bd3_scale.model.build import build_model
from bd3_scale.model.layout import parameter_layouts
from bd3_scale.model.rows import ModelInputs
from bd3_scale.parallel.engine import TrainingEngine
from bd3_scale.recipe.schema import (
    CheckpointRecipe,
    DataRecipe,
    DiffusionRecipe,
    ModelRecipe,
    MoeRecipe,
    OptimizerRecipe,
    Recipe,
    TrainRecipe,
)
from bd3_scale.recipe.vocabulary import Vocabulary
from tests.faults.saving import manifest_of
from tests.parallel import families  # noqa: F401

VOCABULARY = Vocabulary(size=60, eos_id=0, mask_id=59)
RECIPE = Recipe(
    name="tiny",
    model=ModelRecipe(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=24),
    diffusion=DiffusionRecipe(block_size=4),
    data=DataRecipe(path="unused", seq_len=8),
    optimizer=OptimizerRecipe(ema_decay=0.5),
    train=TrainRecipe(steps=1, global_batch_size=1, micro_batch_size=1),
)
MIXTURE = RECIPE.model_copy(
    update={
        "model": RECIPE.model.model_copy(
            update={"moe": MoeRecipe(num_experts=4, top_k=2, ffn_hidden_size=8, bias=True, bias_update_rate=0.01)}
        )
    }
)


def inputs(seed):
    """Return inputs in which every token is masked, so that the loss reaches every weight."""
    clean = torch.randint(0, 59, (1, 8), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(8)[None]
    spans = torch.stack([torch.zeros(1, 8), positions // 4 * 4, positions // 4 * 4 + 4]).int()
    tokens = torch.cat([torch.full_like(clean, 59), clean], 1)
    return ModelInputs(tokens, positions, spans, 1, torch.arange(8), clean[0], torch.ones(8), 0, 0)


class Training:
    """A small bf16 model, either new or after two steps."""

    def __init__(self, groups, seed, steps, zero_stage=1, recipe=RECIPE, **optimizer):
        self.recipe = recipe
        (self.model,) = chunks = build_model(
            recipe.model, VOCABULARY, groups, dtype=torch.bfloat16, device=torch.device("cpu"), seed=seed
        )
        self.layouts = parameter_layouts(chunks)
        parallel = RECIPE.parallel.model_copy(update={"zero_stage": zero_stage})
        self.engine = TrainingEngine(chunks, groups, RECIPE.optimizer.model_copy(update=optimizer), parallel)
        for step in range(steps):
            self.engine.step([inputs(step)], tokens=8, lr=0.01)

    def save(self, folder, step=2, keep_last=5):
        tokenizer = folder.parent / "tokenizer"
        tokenizer.mkdir(exist_ok=True)
        (tokenizer / "tokenizer.json").write_text("{}")
        manifest = manifest_of(step, self.recipe, VOCABULARY.size, self.engine.zero.names)
        return save_boxes(
            folder,
            manifest,
            boxes_to_save(self.engine.zero, self.layouts),
            tokenizer=tokenizer,
            keep=CheckpointRecipe(keep_last=keep_last),
        )

    def state(self):
        fragments = self.engine.zero.fragments()
        return [{name: value.clone() for name, value in fragment.states.items()} for fragment in fragments]


@pytest.fixture(scope="module")
def trained(groups):
    return Training(groups, seed=1, steps=2)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "checkpoints"
    made.mkdir()
    return made


def test_everything_comes_back_bitwise(trained, folder, groups):
    checkpoint = trained.save(folder)
    other = Training(groups, seed=7, steps=0)
    load_training_state(checkpoint, read_manifest(checkpoint), other.engine.zero, other.layouts)
    assert other.engine.zero.step == trained.engine.zero.step == 2
    for found, expected in zip(other.state(), trained.state(), strict=True):
        assert found.keys() == expected.keys() == {"master", "exp_avg", "exp_avg_sq", "ema"}
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert not torch.equal(found["master"], found["ema"])
    for found, expected in zip(other.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("family", "states"),
    [("lion", {"master", "exp_avg", "ema"}), ("bold-momentum", {"master", "momentum", "largest", "ema"})],
)
def test_the_states_of_any_family_come_back_and_those_of_another_are_missed(groups, folder, family, states):
    """Check states that are written under ZeRO-1 and read under ZeRO-3."""
    written = Training(groups, seed=1, steps=2, family=family)
    checkpoint = written.save(folder)
    assert {name.partition(".")[0] for name in json.loads((checkpoint / "index.json").read_text())} == states
    other = Training(groups, seed=7, steps=0, family=family, zero_stage=3)
    load_training_state(checkpoint, read_manifest(checkpoint), other.engine.zero, other.layouts)
    for found, expected in zip(other.state(), written.state(), strict=True):
        assert found.keys() == expected.keys() == states
        assert all(torch.equal(found[name], expected[name]) for name in found)
    adamw = Training(groups, seed=7, steps=0)
    with pytest.raises(ValueError, match=r"holds no exp_avg\S*.*: set optimizer.family"):
        load_training_state(checkpoint, read_manifest(checkpoint), adamw.engine.zero, adamw.layouts)


def test_a_model_alone_gets_the_moving_average(trained, folder, groups):
    checkpoint = trained.save(folder)
    (model,) = build_model(RECIPE.model, VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=None)
    load_weights(checkpoint, read_manifest(checkpoint), parameter_layouts([model]))
    average = {id(f.parameter): f.states["ema"] for f in trained.engine.zero.fragments()}
    for loaded, original in zip(model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(loaded.flatten(), average[id(original)])


@pytest.mark.parametrize(("decay", "state"), [(0.5, "ema"), (0.0, "master")])
def test_biases_of_experts_are_kept_once_and_come_back(groups, folder, decay, state):
    """Check that experts' biases are saved once, in fp32, and come back into a training and into a model."""
    written = Training(groups, seed=1, steps=2, recipe=MIXTURE, ema_decay=decay)
    expected = [mixture.router.expert_bias.clone() for mixture in written.model.mixtures.values()]
    assert all(bias.any() and bias.dtype == torch.float32 for bias in expected)
    checkpoint = written.save(folder)
    index = json.loads((checkpoint / "index.json").read_text())
    assert [name for name in index if "bias" in name] == [f"{state}.decoder.layers.mlp.router.expert_bias"]
    other = Training(groups, seed=7, steps=0, zero_stage=3, recipe=MIXTURE, ema_decay=decay)
    load_training_state(checkpoint, read_manifest(checkpoint), other.engine.zero, other.layouts)
    how = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "seed": None}
    (alone,) = build_model(MIXTURE.model, VOCABULARY, groups, **how)
    load_weights(checkpoint, read_manifest(checkpoint), parameter_layouts([alone]))
    for model in (other.model, alone):
        found = [mixture.router.expert_bias for mixture in model.mixtures.values()]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_only_json_and_safetensors_are_written(trained, folder):
    checkpoint = trained.save(folder)
    assert {path.suffix for path in checkpoint.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    index = json.loads((checkpoint / "index.json").read_text())
    qkv = index["master.decoder.layers.self_attention.linear_qkv.weight"]
    assert qkv["shape"] == [2, 48, 16]
    assert sum(torch.tensor(box["shape"]).prod() for box in qkv["boxes"]) == 2 * 48 * 16


def test_keeps_the_last_ones(trained, folder):
    for step in (1, 2, 10, 100_000_000):
        trained.save(folder, step=step, keep_last=2)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000010", "step-100000000"]
    assert resolve_checkpoint(folder.parent) == folder / "step-100000000"
    assert (folder / "latest").read_text() == "step-100000000\n"


def test_what_a_writer_wrote_counts_and_not_what_rank_0_sees(trained, folder, monkeypatch):
    """Check that no checkpoint is made from a file that rank 0 cannot see or that reads back differently."""
    first = trained.save(folder, step=1, keep_last=1)
    real = storage.write_tensors

    def hide(path, tensors):
        record = real(path, tensors)
        path.unlink()
        return record

    def flip(path, tensors):
        record = real(path, tensors)
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return record

    for fault, message in (
        (hide, "rank-00000.safetensors is missing"),
        (flip, "read back as they were written: rank-00000.safet"),
    ):
        monkeypatch.setattr(storage, "write_tensors", fault)
        with pytest.raises(OSError, match=message):
            trained.save(folder, step=2, keep_last=1)
        assert list_checkpoints(folder) == [first]


def test_latest_is_mended_where_its_writer_was_killed(trained, folder):
    checkpoint = trained.save(folder)
    (folder / "latest").write_text("step-00000099\n")
    assert newest_sound(folder, "full")[0] == checkpoint
    assert (folder / "latest").read_text() == "step-00000002\n"


def test_a_failing_write_leaves_the_older_checkpoint_and_nothing_else(trained, folder):
    """Check a failed write; the process's limit of file size stands in for a full disk."""
    first = trained.save(folder, step=1)
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"step 2 could not be written .*older ones are unchanged"):
            trained.save(folder, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(folder.iterdir()) == [folder / "latest", first]
    assert (folder / "latest").read_text() == "step-00000001\n"
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before


def test_half_written_folders_are_removed_and_never_taken(trained, folder):
    trained.save(folder, step=1)
    half = folder / ".partial-step-00000002"
    half.mkdir()
    (half / "rank-00000.safetensors").write_bytes(b"half")
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000001"]
    assert remove_partial(folder) == [half]
    assert not half.exists()


def test_another_shape_is_named(trained, folder, groups):
    checkpoint = trained.save(folder)
    wider = RECIPE.model.model_copy(update={"ffn_hidden_size": 32})
    (model,) = build_model(wider, VOCABULARY, groups, dtype=torch.float32, device=torch.device("cpu"), seed=None)
    with pytest.raises(ValueError, match=r"mlp.linear_fc1.weight has shape \(2, 48, 16\) in the checkpoint"):
        load_weights(checkpoint, read_manifest(checkpoint), parameter_layouts([model]))


def test_another_format_is_named(trained, folder):
    checkpoint = trained.save(folder)
    manifest = checkpoint / "manifest.json"
    manifest.write_text('{"format": 1, "step": 2}')
    with pytest.raises(ValueError, match=r"has format 1; this version reads formats 3 to 4"):
        read_manifest(checkpoint)


def test_hidden_files_of_a_tokeniser_are_left_out(trained, folder):
    hidden = folder.parent / "tokenizer" / ".DS_Store"
    hidden.parent.mkdir()
    hidden.write_text("x")
    checkpoint = trained.save(folder)
    assert set(read_manifest(checkpoint).files) == {"index.json", "rank-00000.safetensors", "tokenizer/tokenizer.json"}


def test_a_checkpoint_is_saved_even_where_tidying_up_fails(trained, folder, monkeypatch, caplog):
    """Check a save where `latest` is a folder and the older checkpoint is in use."""
    trained.save(folder, step=1)
    (folder / "latest").unlink()
    (folder / "latest").mkdir()

    def in_use(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    monkeypatch.setattr("shutil.rmtree", in_use)
    checkpoint = trained.save(folder, step=2, keep_last=1)
    monkeypatch.undo()
    assert read_manifest(checkpoint).step == 2
    assert "latest cannot be updated to step 2" in caplog.text
    assert "cannot be deleted" in caplog.text
    assert [path.name for path in remove_partial(folder)] == [".partial-removed-step-00000001"]
