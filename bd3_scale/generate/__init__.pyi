from bd3_scale.generate.sampler import Sample as Sample
from bd3_scale.generate.sampler import generate as generate
from bd3_scale.generate.sampler import generate_batch as generate_batch
from bd3_scale.generate.text import Written as Written
from bd3_scale.generate.text import write_texts as write_texts
