"""The contract suite: measures what mixers.base asks of a mixer and what the mixer declares about itself.

From Python ``check_mixer(build)``, in a pytest ``parametrize(build)``, on the command line ``mixlab check NAME``.
"""

from mixers.contract.checks import CHECKS
from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.excuses import declared_excuses
from mixers.contract.report import CheckResult, Report
from mixers.contract.runner import check_mixer, parametrize, require, require_device, run_check

__all__ = [
    "CHECKS",
    "CheckResult",
    "ContractError",
    "NotApplicable",
    "Report",
    "check_mixer",
    "declared_excuses",
    "parametrize",
    "require",
    "require_device",
    "run_check",
]
