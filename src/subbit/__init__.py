"""subbit: large language models towards one bit per weight and below, in files that are as small as they say.

Importing subbit lets transformers load compressed checkpoints: ``AutoModelForCausalLM.from_pretrained(directory)``.
"""

from subbit.comparison.compare import compare
from subbit.comparison.sweep import sweep
from subbit.errors import CheckpointError, UserError
from subbit.evaluation.bench import Bench, bench
from subbit.evaluation.suite import Evaluation, evaluate_all
from subbit.integrations.transformers import register
from subbit.loading import evaluate, inspect, load
from subbit.pipeline import compress
from subbit.recipe import Recipe
from subbit.reporting.push import push
from subbit.reporting.report import report

__all__ = [
    "Bench",
    "CheckpointError",
    "Evaluation",
    "Recipe",
    "UserError",
    "__version__",
    "bench",
    "compare",
    "compress",
    "evaluate",
    "evaluate_all",
    "inspect",
    "load",
    "push",
    "report",
    "sweep",
]
__version__ = "0.1.0"

register()
