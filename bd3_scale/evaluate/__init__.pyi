from bd3_scale.evaluate.checkpoint import Evaluation as Evaluation
from bd3_scale.evaluate.checkpoint import evaluate_checkpoint as evaluate_checkpoint
from bd3_scale.evaluate.generative import Generative as Generative
from bd3_scale.evaluate.generative import evaluate_generative as evaluate_generative
from bd3_scale.evaluate.sets import NamedText as NamedText
