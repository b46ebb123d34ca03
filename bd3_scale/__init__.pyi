from bd3_scale.api import Model as Model
from bd3_scale.api import load as load

__version__: str
