"""subbit: large language models towards one bit per weight and below, in files that are as small as they say.

Importing subbit lets transformers load compressed checkpoints: ``AutoModelForCausalLM.from_pretrained(directory)``.
"""

from subbit.comparison.compare import compare
from subbit.comparison.sweep import sweep
from subbit.errors import CheckpointError, UserError
from subbit.integrations.transformers import register
from subbit.loading import evaluate, inspect, load
from subbit.pipeline import compress
from subbit.recipe import Recipe

__all__ = [
    "CheckpointError",
    "Recipe",
    "UserError",
    "__version__",
    "compare",
    "compress",
    "evaluate",
    "inspect",
    "load",
    "sweep",
]
__version__ = "0.1.0"

register()
