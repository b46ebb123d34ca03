from bd3_scale.checkpoint.folder import list_checkpoints as list_checkpoints
from bd3_scale.checkpoint.folder import resolve_checkpoint as resolve_checkpoint
from bd3_scale.checkpoint.manifest import CheckpointManifest as CheckpointManifest
from bd3_scale.checkpoint.manifest import read_manifest as read_manifest
from bd3_scale.checkpoint.model import open_model as open_model
from bd3_scale.checkpoint.tensors import TensorReader as TensorReader
