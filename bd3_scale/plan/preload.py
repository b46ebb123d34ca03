"""What takes seconds to import, once, for the server that the processes of ranks are forked from."""

from bd3_scale.observe.libraries import quieten_libraries

quieten_libraries()

# isort: split
import torch._inductor.compile_fx  # noqa: E402, F401

import bd3_scale.plan.rank  # noqa: E402, F401
