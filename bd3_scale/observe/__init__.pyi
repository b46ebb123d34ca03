from bd3_scale.observe.environment import read_environment as read_environment
from bd3_scale.observe.flops import model_flops as model_flops
from bd3_scale.observe.metrics import read_metrics as read_metrics
