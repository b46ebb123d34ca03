from bd3_scale.generate.config import SamplingConfig as SamplingConfig
from bd3_scale.generate.draft import Sample as Sample
from bd3_scale.generate.sampler import generate as generate
from bd3_scale.generate.sampler import generate_batch as generate_batch
from bd3_scale.generate.source import open_writer as open_writer
from bd3_scale.generate.writer import Writer as Writer
from bd3_scale.generate.writer import Written as Written
